"""Diagonal complex linear recurrence in real arithmetic: in closed form where one state is read, by a scan.

A complex vector of n numbers is a real one of 2n on the last axis, real parts first: it survives weight
decay, mixed precision, distributed training and safetensors, where complex tensors are fragile.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gramian.errors import InputError

PUBLISHED_PHASE = 6.28
"""The largest phase of an eigenvalue at the published start, nearly the whole circle."""

SMALLEST_DRAW = 1e-6
"""Uniform draws are kept this far from 0 and 1, where logarithms of them end."""

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal number that is cut off at ±2."""


def truncated_normal_(weight: Tensor, variance: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor in place with normal numbers of a variance, none beyond two deviations of the uncut law.

        w ~ N(0, s²) given |w| ≤ 2s,   s² = variance / 0.8796²

    Holds: E w² = variance, exactly.
    """
    std = math.sqrt(variance) / TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)


def multiply(a: Float[Tensor, "*batch pairs"], b: Float[Tensor, "*other pairs"]) -> Float[Tensor, "..."]:
    """Multiply complex numbers elementwise, real parts first on the last axis.

        (a_re b_re − a_im b_im,  a_re b_im + a_im b_re)

    Shapes: (…, 2n) and (…, 2n), which broadcast, -> (…, 2n).
    Holds: exactly.
    """
    (a_re, a_im), (b_re, b_im) = a.chunk(2, -1), b.chunk(2, -1)
    real = torch.addcmul(a_re * b_re, a_im, b_im, value=-1)
    return torch.cat((real, torch.addcmul(a_re * b_im, a_im, b_re)), -1)


def scan(
    inputs: Float[Tensor, "*batch time pairs"], eigenvalues: Float[Tensor, " pairs"]
) -> Float[Tensor, "*batch time pairs"]:
    """Return every state of a diagonal linear recurrence that starts at zero.

        s_t = λ ⊙ s_{t−1} + u_t = Σ_{j≤t} λ^{t−j} ⊙ u_j

    After r rounds a state holds its last 2^r inputs, so that log₂ T rounds do:
    s_t ← s_t + λ^{2^r} ⊙ s_{t−2^r}.

    Shapes: (…, time, 2n), (2n) -> (…, time, 2n), real parts first.
    Holds: exactly.
    Source: Hillis & Steele 1986, "Data parallel algorithms".
    """
    shift, power = 1, eigenvalues
    while shift < inputs.shape[-2]:
        moved = multiply(inputs[..., :-shift, :], power)
        inputs = torch.cat((inputs[..., :shift, :], inputs[..., shift:, :] + moved), -2)
        shift, power = 2 * shift, multiply(power, power)
    return inputs


def ring(
    magnitude: Float[Tensor, " state"],
    phase: Float[Tensor, " state"],
    r_min: float,
    r_max: float,
    max_phase: float,
) -> tuple[Float[Tensor, " state"], Float[Tensor, " state"], Float[Tensor, " state"]]:
    """Map uniform draws to parameters of eigenvalues on a ring, and of the gain that keeps states bounded.

        ν_log = log(−½ log(u (r_max² − r_min²) + r_min²)),   θ_log = log(u' · max_phase)
        γ_log = ½ log(1 − |λ|²),   |λ| = exp(−e^{ν_log})

    Draws of exactly 0 or 1 are moved by 1e-6.

    Shapes: (state), (state) -> ν_log, θ_log, γ_log, each (state).
    Raises: InputError unless 0 ≤ r_min ≤ r_max ≤ 1, r_min < 1, r_max > 0 and the phase is finite and
        positive.
    Holds: |λ|² is uniform on [r_min², r_max²] for uniform u, exactly.
    Source: Orvieto et al. 2023, arXiv 2303.06349.
    """
    _check_ring(r_min, r_max)
    if not 0 < max_phase < math.inf:
        raise InputError(f"the largest phase of a ring must be finite and positive, got {max_phase:g}")
    u, v = (draw.clamp(SMALLEST_DRAW, 1 - SMALLEST_DRAW) for draw in (magnitude, phase))
    log_square = (u * (r_max**2 - r_min**2) + r_min**2).log()
    gain_log = 0.5 * (-torch.expm1(log_square)).log()
    return (-0.5 * log_square).log(), (v * max_phase).log(), gain_log


class LinearRecurrence(nn.Module):
    """A recurrence that is linear and diagonal over the complex numbers, with linear maps around it.

        u_t = x_t (B ⊙ e^{γ_log}),   s_t = λ ⊙ s_{t−1} + u_t,   y_t = Re(s_t C)
        λ = exp(−e^{ν_log} + i e^{θ_log}),   B = b_re + i b_im,   C = c_re + i c_im

    |λ| < 1 whatever the parameters are, up to rounding. Eigenvalues start on a ring, B and C as truncated
    normal numbers of variance 1/(2 width) and 1/state. A largest phase of 0 makes λ real: there is then no
    θ_log. Draws come from torch's global generator, and from an explicit one by `initialise_`.

    Shapes: (…, time, width) -> (…, time, outputs).
    Raises: InputError for sizes below 1, a ring that is not within the unit disc, a phase that is negative
        or not finite.
    Holds: exactly.
    Source: Orvieto et al. 2023, arXiv 2303.06349; Ding et al. 2024, arXiv 2312.01538.
    """

    theta_log: nn.Parameter | None

    def __init__(
        self,
        width: int,
        state: int,
        outputs: int | None = None,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = PUBLISHED_PHASE,
    ) -> None:
        super().__init__()
        outputs = width if outputs is None else outputs
        if min(width, state, outputs) < 1:
            raise InputError(f"a recurrence needs positive sizes, got {width}, {state} and {outputs}")
        _check_ring(r_min, r_max)
        if not 0 <= max_phase < math.inf:
            raise InputError(f"the largest phase must be finite and not negative, got {max_phase:g}")
        self.width, self.state, self.r_min, self.r_max, self.max_phase = width, state, r_min, r_max, max_phase
        self.nu_log, self.gamma_log = (nn.Parameter(torch.empty(state)) for _ in range(2))
        self.register_parameter("theta_log", nn.Parameter(torch.empty(state)) if max_phase else None)
        self.b_re, self.b_im = (nn.Parameter(torch.empty(width, state)) for _ in range(2))
        self.c_re, self.c_im = (nn.Parameter(torch.empty(state, outputs)) for _ in range(2))
        self.initialise_(None)

    @torch.no_grad()
    def initialise_(self, generator: torch.Generator | None) -> None:
        """Draw the eigenvalues on the ring and both maps."""
        draws = torch.rand(2, self.state, generator=generator, dtype=torch.float64, device=self.nu_log.device)
        nu_log, theta_log, gamma_log = ring(draws[0], draws[1], self.r_min, self.r_max, self.max_phase or 1.0)
        self.nu_log.copy_(nu_log)
        self.gamma_log.copy_(gamma_log)
        if self.theta_log is not None:
            self.theta_log.copy_(theta_log)
        for weight, variance in ((self.b_re, 0.5 / self.width), (self.b_im, 0.5 / self.width)):
            truncated_normal_(weight, variance, generator)
        for weight in (self.c_re, self.c_im):
            truncated_normal_(weight, 1 / self.state, generator)

    def magnitudes(self) -> Float[Tensor, " state"]:
        """Return |λ|: how much of a state is left after one step."""
        return torch.exp(-self.nu_log.exp())

    def vandermonde(self, count: int) -> Float[Tensor, "count pairs"]:
        """Return the powers λ⁰, λ¹, … of the eigenvalues, one a row, computed in float32 or wider.

            V_k = e^{−k ν} (cos kθ, sin kθ),   ν = e^{ν_log},   θ = e^{θ_log}

        Shapes: -> (count, 2 state), real parts first.
        Raises: InputError for a count below 1.
        Holds: exactly.
        """
        if count < 1:
            raise InputError(f"a recurrence needs at least one power of its eigenvalues, got {count}")
        dtype = torch.promote_types(self.nu_log.dtype, torch.float32)
        k = torch.arange(count, dtype=dtype, device=self.nu_log.device)[:, None]
        decay = torch.exp(-k * self.nu_log.to(dtype).exp())
        if self.theta_log is None:
            return torch.cat((decay, torch.zeros_like(decay)), -1)
        angle = k * self.theta_log.to(dtype).exp()
        return torch.cat((decay * angle.cos(), decay * angle.sin()), -1)

    def input_map(self) -> Float[Tensor, "pairs width"]:
        """Return the matrix of u = x Wᵀ, the two parts of B ⊙ e^{γ_log} in one product."""
        gain = self.gamma_log.exp()
        return torch.cat((self.b_re * gain, self.b_im * gain), 1).mT

    def read(self, state: Float[Tensor, "*batch pairs"]) -> Float[Tensor, "*batch outputs"]:
        """Return y = Re(s C) = s_re c_re − s_im c_im of states."""
        return state.to(self.c_re.dtype) @ torch.cat((self.c_re, -self.c_im))

    def last(self, x: Float[Tensor, "*batch time width"]) -> Float[Tensor, "*batch outputs"]:
        """Return the output after the last input, in closed form.

            y_T = Re(s_T C),   s_T = Σ_k λ^k ⊙ u_{T−k}

        Shapes: (…, time, width) -> (…, outputs).
        Holds: exactly; equal to the last output of `forward`.
        """
        powers = self.vandermonde(x.shape[-2]).flip(0)
        return self.read(multiply(nn.functional.linear(x, self.input_map()), powers).sum(-2))

    def forward(self, x: Float[Tensor, "*batch time width"]) -> Float[Tensor, "*batch time outputs"]:
        """Return the outputs after every input, by a scan of logarithmic depth."""
        powers = self.vandermonde(2)
        return self.read(scan(nn.functional.linear(x, self.input_map()).to(powers.dtype), powers[1]))


def _check_ring(r_min: float, r_max: float) -> None:
    if not (0 <= r_min <= r_max <= 1 and r_min < 1 and r_max > 0):
        raise InputError(
            "eigenvalues need radii with 0 ≤ r_min ≤ r_max ≤ 1, of which r_min is not 1 and r_max not 0, "
            f"got {r_min:g} and {r_max:g}"
        )
