"""Predictions that know when they do not know, as scikit-learn estimators."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from gramian.bayes.classification import Classifier
from gramian.bayes.ensemble import EnsembleConfig, fit_classifier, fit_ensemble
from gramian.bayes.trained import Ensemble
from gramian.core.conditioning import log_evidence
from gramian.data.tables import Standardiser
from gramian.errors import InputError
from gramian.nn.mlp import mlp, prior_variances
from gramian.theory.duals import dual
from gramian.theory.kernels import kernels, variances
from gramian.theory.maps import Activation, Dense, Serial

BOUNDS = {"noise_variance": (1e-6, 10.0), "weight_std": (0.1, 10.0), "bias_std": (1e-3, 10.0)}
"""Where hyper-parameters are looked for."""

KERNELS = ("ntk", "nngp")
"""Kernels of a Gaussian process: of training by gradient descent, and of the network's outputs."""

ROWS = 2048
"""Rows predicted at once by a Gaussian process."""


class _Standardised(BaseEstimator):
    """What all estimators share: numbers in, standardised by the training rows if that is asked for."""

    standardise: bool
    x_scale_: Standardiser

    def _learn_inputs(self, x: Any) -> Tensor:
        """Return the training inputs, and keep their scale."""
        rows = torch.tensor(np.ascontiguousarray(x))
        self.x_scale_ = self._scale(rows)
        return self.x_scale_(rows)

    def _scale(self, rows: Tensor) -> Standardiser:
        if self.standardise:
            return Standardiser.of(rows)
        return Standardiser(torch.zeros_like(rows[0]), torch.ones_like(rows[0]))

    def _inputs(self, x: Any) -> Tensor:
        """Return inputs on the scale of the training inputs."""
        check_is_fitted(self)
        rows = validate_data(self, x, dtype=np.float64, reset=False)
        return self.x_scale_(torch.tensor(np.ascontiguousarray(rows)))


class _Regressor(RegressorMixin, _Standardised):
    """The same, with a number to be predicted."""

    y_scale_: Standardiser

    def _learn(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Return the training rows on the scale that is learnt on."""
        x, y = validate_data(self, x, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        targets = torch.tensor(np.ascontiguousarray(y, dtype=np.float64))
        self.y_scale_ = self._scale(targets)
        return self._learn_inputs(x), self.y_scale_(targets)


class NTKGPRegressor(_Regressor):
    """Regression by the Gaussian process of an infinitely wide perceptron, whose evidence sets its priors.

        f ~ GP(0, Θ), or GP(0, K) of the network's outputs alone;  y = f + ε,  ε ~ N(0, σ²)
        K⁰ = σ_w² ⟨x, x'⟩/d + σ_b²,  K^l = σ_w² E[φφ] + σ_b²,  Θ^l = K^l + σ_w² E[φ'φ'] Θ^{l−1},  Θ⁰ = K⁰
        log p(y) = −½ yᵀC⁻¹y − ½ ln det C − (n/2) ln 2π,  C = Θ + (σ² + jitter · mean Θ_ii) I

    With `optimise` the evidence is maximised over the logarithms of σ², σ_w and σ_b in `BOUNDS` by L-BFGS-B,
    from the values given and from `restarts` more drawn within a factor e of them; on `evidence_rows` rows,
    drawn at random, where there are more. Deviations and covariances are those of new targets: the noise is
    in them.

    Args:
        kernel: ntk (Θ, what training by gradient descent has) or nngp (K, the prior of the outputs).
        activation: φ, by name (`gramian list`).
        depth: hidden layers.
        weight_std: σ_w, where the search starts.
        bias_std: σ_b likewise; 0 stays 0.
        noise_variance: σ² likewise, on the scale that is learnt on.
        optimise: whether these three are chosen by the evidence.
        restarts: further starts of the search.
        evidence_rows: most rows that the evidence is taken of.
        jitter: what is added to the kernel's diagonal, as a share of its mean.
        standardise: whether inputs and targets are standardised by the training rows.
        random_state: seed of the starts and of the rows of the evidence.

    After `fit`, `noise_variance_`, `weight_std_` and `bias_std_` hold what was chosen, `log_evidence_` the
    evidence of all rows and `jitter_` the number that was added, all on the scale that is learnt on.

    Raises: InputError for settings out of range; ValueError as scikit-learn for data that cannot be used.
    Holds: exactly, for the process.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864; Jacot, Gabriel, Hongler 2018, arXiv 1806.07572;
        evidence: Rasmussen, Williams 2006, Eq. 2.30.
    """

    def __init__(
        self,
        kernel: str = "ntk",
        activation: str = "relu",
        depth: int = 2,
        weight_std: float = 1.0,
        bias_std: float = 0.3,
        noise_variance: float = 0.1,
        optimise: bool = True,
        restarts: int = 1,
        evidence_rows: int = 1000,
        jitter: float = 1e-8,
        standardise: bool = True,
        random_state: Any = None,
    ):
        self.kernel = kernel
        self.activation = activation
        self.depth = depth
        self.weight_std = weight_std
        self.bias_std = bias_std
        self.noise_variance = noise_variance
        self.optimise = optimise
        self.restarts = restarts
        self.evidence_rows = evidence_rows
        self.jitter = jitter
        self.standardise = standardise
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> "NTKGPRegressor":  # noqa: N803
        """Choose the hyper-parameters, and factorise the kernel of the rows.

        Raises: ValueError as scikit-learn for data that cannot be used; InputError for settings out of range.
        """
        self._check()
        self.x_, targets = self._learn(X, y)
        given = {name: float(getattr(self, name)) for name in BOUNDS}
        chosen = self._likeliest(given, targets) if self.optimise else given
        self.noise_variance_, self.weight_std_, self.bias_std_ = (chosen[name] for name in BOUNDS)
        kernel = self._prior(self.x_)
        self.log_evidence_ = float(log_evidence(kernel, targets, self.noise_variance_, self.jitter))
        self.jitter_ = self.jitter * float(kernel.diagonal().mean())
        kernel.diagonal().add_(self.noise_variance_ + self.jitter_)
        self.factor_ = torch.linalg.cholesky(kernel)
        self.weights_ = torch.cholesky_solve(targets[:, None], self.factor_)[:, 0]
        return self

    def predict(self, X: Any, return_std: bool = False, return_cov: bool = False) -> Any:  # noqa: N803
        """Return the mean of new targets (n), with their deviation (n) or covariance (n, n) if asked for.

        Raises: InputError when both are asked for; NotFittedError before `fit`.
        """
        if return_std and return_cov:
            raise InputError("ask for the deviation or for the covariance, not for both")
        x, scale = self._inputs(X), self.y_scale_.scale
        if return_cov:
            mean, covariance = self._posterior(x, self._prior(x))
            covariance.diagonal().add_(self.noise_variance_)
            return self.y_scale_.back(mean).numpy(), (covariance * scale**2).numpy()
        parts = [self._posterior(part, self._prior_variance(part)) for part in x.split(ROWS)]
        means, latent = (torch.cat(part) for part in zip(*parts, strict=True))
        mean = self.y_scale_.back(means).numpy()
        deviation = (latent.clamp(min=0) + self.noise_variance_).sqrt() * scale
        return (mean, deviation.numpy()) if return_std else mean

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:  # noqa: N803
        """Draw new targets at the inputs, jointly: (n, n_samples)."""
        mean, covariance = self.predict(X, return_cov=True)
        normal = check_random_state(random_state).standard_normal((len(mean), n_samples))
        values, vectors = np.linalg.eigh(covariance)
        return mean[:, None] + vectors * np.sqrt(values.clip(min=0)) @ normal

    def _network(self, weight_std: float, bias_std: float) -> Serial:
        dense, between = Dense(weight_std, bias_std), Activation(dual(self.activation))
        return Serial(*(each for _ in range(self.depth) for each in (dense, between)), dense)

    def _prior(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Return the kernel of inputs (n, d) and (m, d), or of the same ones: (n, m)."""
        return getattr(kernels(self._network(self.weight_std_, self.bias_std_), x, other), self.kernel)

    def _prior_variance(self, x: Tensor) -> Tensor:
        return getattr(variances(self._network(self.weight_std_, self.bias_std_), x), self.kernel)

    def _posterior(self, x: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of f, or its covariance where that is the prior's form."""
        cross = self._prior(x, self.x_)
        half = torch.linalg.solve_triangular(self.factor_, cross.mT, upper=False)
        explained = half.square().sum(0) if prior.ndim == 1 else half.mT @ half
        return cross @ self.weights_, prior - explained

    def _likeliest(self, given: dict[str, float], targets: Tensor) -> dict[str, float]:
        """Return the hyper-parameters of the largest evidence found."""
        random = check_random_state(self.random_state)
        kept = torch.from_numpy(random.permutation(len(targets))[: self.evidence_rows])
        x, y = self.x_[kept], targets[kept]
        free = [name for name in BOUNDS if given[name] > 0 or name != "bias_std"]
        limits = np.log([BOUNDS[name] for name in free])

        def cost(logarithms: np.ndarray) -> float:
            values = given | dict(zip(free, np.exp(logarithms).tolist(), strict=True))
            found = kernels(self._network(values["weight_std"], values["bias_std"]), x)
            evidence = log_evidence(getattr(found, self.kernel), y, values["noise_variance"], self.jitter)
            return -float(evidence) / len(y)

        first = np.log([max(given[name], BOUNDS[name][0]) for name in free])
        starts = [first, *(first + random.uniform(-1, 1, len(free)) for _ in range(self.restarts))]
        found = [
            minimize(cost, start.clip(*limits.T), method="L-BFGS-B", bounds=limits, options={"eps": 1e-5})
            for start in starts
        ]
        best = min(found, key=lambda each: each.fun)
        return given | dict(zip(free, np.exp(best.x).tolist(), strict=True))

    def _check(self) -> None:
        if self.kernel not in KERNELS:
            raise InputError(f"unknown kernel {self.kernel!r}; choose one of {', '.join(KERNELS)}")
        if not 0 < self.weight_std < math.inf:
            raise InputError(f"weight_std must be positive and finite, got {self.weight_std:g}")
        others = ("depth", "bias_std", "noise_variance", "jitter", "restarts")
        least = {**dict.fromkeys(others, 0), "evidence_rows": 2}
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be finite and at least {low}, got {getattr(self, name):g}")


class NTKEnsemble(_Standardised, ABC):
    """The settings of the estimators that train an ensemble, and how networks are made of them.

    With the defaults the prior variance of a standardised target is 1, as in `NTKGPRegressor`: wider priors
    need more members and more data.

    Args:
        method: deep_ensemble, rp_param, rp_fn, ntkgp_param, ntkgp_fn or ntkgp_lin.
        members: number of networks, at least 2.
        widths: features of the hidden layers.
        activation: of the hidden layers, by name.
        weight_std: σ_w of weights N(0, σ_w²/fan_in).
        bias_std: σ_b of biases N(0, σ_b²); 0 for none.
        noise_variance: σ² of the targets, on the scale that is learnt on.
        exact: the corrected variants of rp_fn and ntkgp_fn.
        steps: steps of Adam, whose rate falls to 0 along a cosine.
        learning_rate: its rate.
        batch: rows of a step; all when None.
        standardise: whether inputs (and a regression's targets) are standardised by the training rows.
        network: a function (features, outputs) -> torch module in place of the perceptron that `widths`,
            `activation`, `weight_std` and `bias_std` describe.
        random_state: seed of the draws.
    """

    def __init__(
        self,
        method: str = "ntkgp_param",
        members: int = 10,
        widths: Sequence[int] = (64, 64),
        activation: str = "relu",
        weight_std: float = 1.0,
        bias_std: float = 0.3,
        noise_variance: float = 0.1,
        exact: bool = False,
        steps: int = 2000,
        learning_rate: float = 3e-3,
        batch: int | None = None,
        standardise: bool = True,
        network: Callable[[int, int], nn.Module] | None = None,
        random_state: Any = None,
    ):
        self.method = method
        self.members = members
        self.widths = widths
        self.activation = activation
        self.weight_std = weight_std
        self.bias_std = bias_std
        self.noise_variance = noise_variance
        self.exact = exact
        self.steps = steps
        self.learning_rate = learning_rate
        self.batch = batch
        self.standardise = standardise
        self.network = network
        self.random_state = random_state

    @abstractmethod
    def fit(self, X: Any, y: Any) -> "NTKEnsemble":  # noqa: N803
        """Train all members."""

    def _how(self, features: int, outputs: int) -> tuple[Callable[[], nn.Module], EnsembleConfig]:
        """Return what draws a network, and how the ensemble is trained."""
        if self.network is not None:
            make, prior = partial(self.network, features, outputs), None
        else:
            make = partial(
                mlp, features, outputs, widths=tuple(self.widths), activation=self.activation,
                weight_std=self.weight_std, bias_std=self.bias_std,
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                prior = prior_variances(make())
        return make, EnsembleConfig(
            method=self.method, members=self.members, noise_variance=self.noise_variance, exact=self.exact,
            prior=prior, steps=self.steps, learning_rate=self.learning_rate, batch=self.batch,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
        )  # fmt: skip


class NTKEnsembleRegressor(_Regressor, NTKEnsemble):
    """Regression by an ensemble of networks whose members are posterior draws; settings: `NTKEnsemble`.

        mean and variance over the members f̃_m(x), and σ²

    Deviations are those of new targets: √(variance over members + σ²).

    Raises: InputError for settings out of range; ValueError as scikit-learn for data that cannot be used.
    Holds: as `bayes.ensemble.fit_ensemble`.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864.
    """

    ensemble_: Ensemble

    def fit(self, X: Any, y: Any) -> "NTKEnsembleRegressor":  # noqa: N803
        """Train all members.

        Raises: ValueError as scikit-learn for data that cannot be used; InputError for settings out of range.
        """
        x, targets = self._learn(X, y)
        make, config = self._how(x.shape[1], 1)
        self.ensemble_ = fit_ensemble(make, x, targets, config)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:  # noqa: N803
        """Return the mean of new targets (n), with their deviation (n) if asked for."""
        x = self._inputs(X)
        found = self.ensemble_.predict(x)
        mean = self.y_scale_.back(found.mean).numpy()
        return (mean, (found.std * self.y_scale_.scale).numpy()) if return_std else mean

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:  # noqa: N803
        """Draw new targets at the inputs: members at random, with noise of their own; (n, n_samples)."""
        x, random = self._inputs(X), check_random_state(random_state)
        functions = self.ensemble_.functions(x)[..., 0].mT.numpy()
        chosen = functions[:, random.randint(functions.shape[1], size=n_samples)]
        noise = self.ensemble_.config.noise_variance**0.5 * random.standard_normal(chosen.shape)
        return self.y_scale_.back(torch.from_numpy(chosen + noise)).numpy()


class NTKEnsembleClassifier(ClassifierMixin, NTKEnsemble):
    """Classification by an ensemble that regresses on classes; settings: `NTKEnsemble`.

        p(k | x) = mean_m softmax_k(f̃_m(x)/T),  targets [label = k] − 1/K

    The temperature T is tuned on a tenth of the rows, which no member learns from.

    Raises: InputError for settings out of range; ValueError as scikit-learn for data that cannot be used, a
        single class among them.
    Holds: empirically.
    Source: He, Lakshminarayanan, Teh 2020, arXiv 2007.05864.
    """

    classifier_: Classifier
    classes_: np.ndarray

    def fit(self, X: Any, y: Any) -> "NTKEnsembleClassifier":  # noqa: N803
        """Train all members, and tune the temperature.

        Raises: ValueError as scikit-learn for data that cannot be used; InputError for settings out of range.
        """
        x, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"at least two classes are needed, but all rows are of class {self.classes_[0]}")
        rows = self._learn_inputs(x)
        make, config = self._how(rows.shape[1], len(self.classes_))
        self.classifier_ = fit_classifier(make, rows, torch.from_numpy(labels), config)
        outputs = self.classifier_.predict_probabilities(rows[:1]).shape[1]
        if outputs != len(self.classes_):
            raise InputError(f"the network has {outputs} outputs, but there are {len(self.classes_)} classes")
        return self

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the probabilities of the classes, in the order of `classes_`: (n, classes)."""
        x = self._inputs(X)
        return self.classifier_.predict_probabilities(x).numpy()

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return the most probable class (n)."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]
