"""Random masks on linear regression, where everything has a closed form.

n rows, columns X_j, s_j = |X_j|²/n, fixed weights w, β = λ ∘ w. The formulas are those of
E|Y − X(m ∘ w)|²/n with independent m_j ~ Bernoulli(λ_j).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gramian.errors import InputError


@dataclass(frozen=True)
class LinearMasks:
    """A linear model with fixed weights under random masks, and its data.

    Shapes: x (n, p), y (n,), weight (p,).
    Raises: InputError when the shapes do not belong together.
    Holds: exactly.
    Source: Hayou, He, Dziugaite 2021, arXiv 2110.11804, whose abstract states the L1 and L2 penalties and
    the role of feature alignment; the formulas are derived here.
    """

    x: Float[Tensor, "n p"]
    y: Float[Tensor, " n"]
    weight: Float[Tensor, " p"]

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1] or self.weight.shape != self.x.shape[1:]:
            raise InputError(
                f"x (n, p), y (n,) and weight (p,) do not belong together, got {tuple(self.x.shape)}, "
                f"{tuple(self.y.shape)} and {tuple(self.weight.shape)}"
            )

    @property
    def scale(self) -> Float[Tensor, " p"]:
        """s_j = |X_j|²/n."""
        return self.x.square().sum(0) / len(self.x)

    def loss(self, masks: Float[Tensor, "k p"]) -> Float[Tensor, " k"]:
        """Return |Y − X(m ∘ w)|²/n of every mask, or of any factors in its place."""
        return (self.y - (masks * self.weight) @ self.x.mT).square().mean(-1)

    def expected_loss(self, probabilities: Float[Tensor, " p"]) -> Float[Tensor, ""]:
        """Return the mean loss of the random mask.

        F = |Y − Xβ|²/n + Σ_j s_j λ_j (1 − λ_j) w_j²
        """
        spread = (self.scale * probabilities * (1 - probabilities) * self.weight.square()).sum()
        return self.loss(probabilities[None])[0] + spread

    def gradient(self, probabilities: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return the slopes of the expected loss.

        ∂F/∂λ_j = −2 w_j X_jᵀ(Y − Xβ)/n + s_j (1 − 2λ_j) w_j²
        """
        return self.straight_through(probabilities) + self.straight_through_bias(probabilities)

    def straight_through(self, probabilities: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return the mean of the straight-through gradient by λ: −2 w_j X_jᵀ(Y − Xβ)/n."""
        residual = self.y - self.x @ (probabilities * self.weight)
        return -2 * self.weight * (self.x.mT @ residual) / len(self.x)

    def straight_through_bias(self, probabilities: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """Return what the straight-through gradient misses: s_j (1 − 2λ_j) w_j²."""
        return self.scale * (1 - 2 * probabilities) * self.weight.square()

    def adaptive_l1(self, beta: Float[Tensor, " p"]) -> Float[Tensor, ""]:
        """Return the expected loss of learnt λ = β/w: squared error with an L1 penalty that adapts.

            |Y − Xβ|²/n + Σ_j s_j (|w_j||β_j| − β_j²)

        Raises: InputError unless every β_j lies between 0 and w_j.
        """
        if not ((beta * self.weight >= 0) & (beta.abs() <= self.weight.abs())).all():
            raise InputError("each β must lie between 0 and its weight, as λ in [0, 1] makes it")
        penalty = self.scale * (self.weight.abs() * beta.abs() - beta.square())
        return (self.y - self.x @ beta).square().mean() + penalty.sum()

    def dropout_l2(self, beta: Float[Tensor, " p"], keep: float) -> Float[Tensor, ""]:
        """Return the expected loss of dropout with learnt weights β/λ and one λ: an L2 penalty.

            |Y − Xβ|²/n + ((1 − λ)/λ) Σ_j s_j β_j²

        Raises: InputError unless 0 < λ ≤ 1.
        """
        if not 0 < keep <= 1:
            raise InputError(f"the probability to keep must be more than 0 and at most 1, got {keep}")
        penalty = (1 - keep) / keep * (self.scale * beta.square()).sum()
        return (self.y - self.x @ beta).square().mean() + penalty

    def alignment(self) -> Float[Tensor, " p"]:
        """Return the alignment of each weight with the targets, −∂F/∂λ_j where columns are orthogonal.

        a_j = (2 w_j X_jᵀY − w_j² |X_j|²)/n
        """
        return 2 * self.weight * (self.x.mT @ self.y) / len(self.x) - self.scale * self.weight.square()

    def kept(self, probabilities: Float[Tensor, " p"]) -> Bool[Tensor, " p"]:
        """Return the best value of each mask variable, the others at λ.

        keep j iff 2 w_j X_jᵀ r_{−j} > w_j² |X_j|²,  r_{−j} = Y − Σ_{k≠j} λ_k w_k X_k
        """
        return self.gradient(probabilities) < 0

    def coordinate_descent(
        self, probabilities: Float[Tensor, " p"], rounds: int = 100
    ) -> Float[Tensor, " p"]:
        """Return the mask where no single change lowers the expected loss, one variable after the other.

        F never rises on the way, and after the first round λ is a mask.

        Raises: InputError when the rounds do not suffice.
        """
        mask = probabilities.clone()
        for _ in range(rounds):
            before = mask.clone()
            for j in range(len(mask)):
                mask[j] = self.kept(mask)[j].to(mask.dtype)
            if torch.equal(before, mask):
                return mask
        raise InputError(f"{rounds} rounds do not settle the mask; allow more")

    def mirror_flow(self, logits: Float[Tensor, " p"], time: float, steps: int = 200) -> Float[Tensor, " p"]:
        """Return the logits after mirror flow, ds_j/dt = −∂F/∂λ_j.

        Raises: InputError for a negative time or less than one step.
        Holds: exactly for orthogonal columns, where s(t) = s(0) + t a; otherwise with an error
            O(steps⁻⁴), by the classical Runge–Kutta method.
        """
        return self._flow(logits, time, steps, mirror=True)

    def gradient_flow(
        self, logits: Float[Tensor, " p"], time: float, steps: int = 200
    ) -> Float[Tensor, " p"]:
        """Return the logits after gradient flow, ds_j/dt = −λ_j (1 − λ_j) ∂F/∂λ_j.

        Raises: InputError for a negative time or less than one step.
        Holds: with an error O(steps⁻⁴), by the classical Runge–Kutta method.
        """
        return self._flow(logits, time, steps, mirror=False)

    def _flow(self, logits: Tensor, time: float, steps: int, mirror: bool) -> Tensor:
        if time < 0 or steps < 1:
            raise InputError(f"a flow needs a time ≥ 0 and at least one step, got {time} and {steps}")

        def slope(s: Tensor) -> Tensor:
            chance = s.sigmoid()
            return -self.gradient(chance) * (1 if mirror else chance * (1 - chance))

        s, h = logits.clone(), time / steps
        for _ in range(steps):
            first = slope(s)
            second = slope(s + h / 2 * first)
            third = slope(s + h / 2 * second)
            s = s + h / 6 * (first + 2 * second + 2 * third + slope(s + h * third))
        return s


def divergence_bound(
    time: float, alignment: Float[Tensor, " p"], prior_alignment: Float[Tensor, " p"]
) -> Float[Tensor, ""]:
    """Bound the divergence of the mask trained on all data from the mask trained on the prior's share.

        KL(λ(t) ‖ λ⁰(t)) ≤ (t²/8) Σ_j (a_j − a⁰_j)²

    Both by mirror flow from one start, with the same weights, for the time t.

    Holds: exactly for designs with orthogonal columns in both data sets, since the log-partition function of
    a Bernoulli variable has a second derivative of at most ¼.
    """
    return time**2 / 8 * (alignment - prior_alignment).square().sum()
