import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gramian.core.reference_paths import jitter, random_walk, straight_line
from gramian.core.trajectory import steps_of, updates
from gramian.errors import InputError
from gramian.observe.phase import diffusion_ratio, phase, without_noise
from path_oracles import circle, jittering, line, normal, spiral, walk

Path = Callable[[int, int, int], Tensor]


def slowing(n: int, p: int, seed: int) -> Tensor:
    return torch.arange(n).double().sqrt()[:, None] * normal(1, p, seed=seed)


def drifting(cosine: float) -> Path:
    def path(n: int, p: int, seed: int) -> Tensor:
        drift = math.sqrt(cosine) * normal(1, p, seed=seed + 50)
        return (math.sqrt(1 - cosine) * normal(n, p, seed=seed) + drift).cumsum(0)

    return path


def attracted(correlation: float, start: float = 0) -> Path:
    """Ornstein–Uhlenbeck process about the origin, at equal times: stochastic gradients in a bowl."""

    def path(n: int, p: int, seed: int) -> Tensor:
        kicks, points = normal(n, p, seed=seed), [torch.full((p,), start, dtype=torch.float64)]
        for kick in kicks[1:]:
            points.append(correlation * points[-1] + kick)
        return torch.stack(points)

    return path


def heavy_ball(n: int, p: int, seed: int) -> Tensor:
    """Momentum .9 in a valley: nearly flat along half of the dimensions, steep across the others."""
    curvature = torch.cat([torch.full((p // 2,), 1e-3), torch.linspace(5, 18, p - p // 2)]).double()
    point, velocity = normal(p, seed=seed), torch.zeros(p, dtype=torch.float64)
    points = [point]
    for _ in range(n - 1):
        velocity = 0.9 * velocity - 0.1 * curvature * point
        point = point + velocity
        points.append(point)
    return torch.stack(points)


def zigzag(n: int, p: int, seed: int) -> Tensor:
    times = torch.arange(n).double()[:, None]
    return times * normal(1, p, seed=seed) + 2 * (-1.0) ** times * normal(1, p, seed=seed + 50)


def stopped(n: int, p: int, seed: int) -> Tensor:
    points = walk(n, p, seed)
    points[n // 2 :] = points[n // 2]
    return points


def descent(n: int, p: int, seed: int) -> Tensor:
    """Gradient descent to the bottom of a bowl."""
    return 0.8 ** torch.arange(n).double()[:, None] * normal(1, p, seed=seed)


def settling(n: int, p: int, seed: int) -> Tensor:
    """A walk of small steps left over when the way is done: one thousandth of its speed."""
    early = walk(n // 4, p, seed)
    return torch.cat([early, early[-1] + 1e-3 * walk(n - n // 4, p, seed + 50)])


CASES: dict[str, tuple[Path, str]] = {
    "line": (line, "going straight"),
    "slowing line": (slowing, "going straight"),
    "strong drift": (drifting(0.8), "going straight"),
    "arc": (lambda n, p, seed: circle(n, p, 400, seed), "going straight"),
    "random walk": (walk, "exploring"),
    "weak drift": (drifting(0.15), "exploring"),
    "jitter": (jittering, "oscillating"),
    "attractor": (attracted(0.5), "oscillating"),
    "slow attractor": (attracted(0.8), "oscillating"),
    "attractor from afar": (attracted(0.8, 20), "oscillating"),
    "circle": (lambda n, p, seed: circle(n, p, 8, seed), "oscillating"),
    "spiral": (lambda n, p, seed: spiral(n, p, 0.8, 0.97, seed), "oscillating"),
    "zigzag": (zigzag, "oscillating"),
    "heavy ball": (lambda n, p, seed: heavy_ball(40, p, seed), "oscillating"),
    "stopped": (stopped, "dead end"),
    "descent": (descent, "dead end"),
    "fast spiral": (lambda n, p, seed: spiral(150, p, 0.8, 0.9, seed), "dead end"),
    "settled walk": (settling, "dead end"),
}


@pytest.mark.parametrize("name", CASES)
def test_known_paths(name: str):
    path, expected = CASES[name]
    for n in (41, 100):
        for p in (200, 2000):
            for seed in range(3):
                points = path(n, p, seed)
                found = phase(steps_of(points), range(len(points)))
                assert found.name == expected, (n, p, seed, found)
                assert "nan" not in found.sentence
                assert found.sentence.endswith(".")


def test_slow_oscillations_are_seen_in_strides():
    found = phase(steps_of(circle(150, 200, 20)), range(150))
    assert found.name == "oscillating"
    assert found.evidence["diffusion_ratio"] > 2 / 3 > found.evidence["coarse_diffusion_ratio"]
    assert phase(steps_of(circle(150, 200, 150)), range(150)).name != "oscillating"  # control: a quarter turn


def test_walks_are_called_exploring_in_every_draw():
    for n in (13, 41, 150):
        for seed in range(40):
            assert phase(steps_of(walk(n, 100, seed)), range(n)).name == "exploring", (n, seed)


@pytest.mark.parametrize("speed", [1, 0.3, 0.1])
def test_walks_of_falling_speed_and_uneven_times_are_still_exploring(speed: float):
    n = 60
    speeds = torch.logspace(0, math.log10(speed), n)[:, None]
    assert phase(steps_of((speeds * normal(n, 500)).cumsum(0)), range(n)).name == "exploring"
    times = [int(1.2**t) + t for t in range(n)]
    gaps = torch.tensor([1, *[late - early for early, late in pairwise(times)]])
    points = (gaps.sqrt()[:, None] * normal(n, 500)).cumsum(0)
    found = phase(steps_of(points), times)
    assert found.name == "exploring"
    assert found.evidence["diffusion_ratio"] == pytest.approx(1, abs=0.15)


def test_rest_is_a_matter_of_time_and_not_of_checkpoints():
    points, n = line(40, 50), 40
    points[20:] = points[20] + 0.005 * (points[20:] - points[20])
    steps = steps_of(points)
    assert phase(steps, range(n)).name == "dead end"
    crowded = [*range(0, 20_000, 1000), *range(20_000, 20_020)]  # the late checkpoints are 1000 times denser
    assert phase(steps, crowded).name == "going straight"


def test_slow_progress_after_a_wild_start_is_no_rest():
    wild = torch.cat([normal(20, 300), torch.zeros(20, 300)])
    along = torch.arange(40).double()[:, None] * normal(1, 300, seed=7)
    found = phase(steps_of(wild + 0.005 * along), range(40))
    assert found.evidence["relative_speed"] < 0.01
    assert found.name == "going straight"
    assert (
        phase(steps_of(wild + 0.001 * along), range(40)).name == "dead end"
    )  # control: no progress to speak of


def test_rounding_is_not_taken_for_oscillation():
    n, p, size = 60, 20_000, 1e-3
    exact = normal(1, p) + size * walk(n, p, seed=1) / 4
    stored = exact + size * normal(n, p, seed=2)
    noise = torch.full((n - 1,), 2 * size**2 * p, dtype=torch.float64)
    blind, told = phase(steps_of(stored), range(n)), phase(steps_of(stored), range(n), noise)
    assert (blind.name, told.name) == ("oscillating", "rounding")
    assert told.evidence["noise_share"] == pytest.approx(2 / (2 + 1 / 16), rel=0.05)
    assert "97%" in told.sentence


def test_a_smaller_part_of_rounding_is_taken_out():
    n, p = 60, 20_000
    stored = walk(n, p, seed=1) + 0.65 * normal(n, p, seed=2)
    noise = torch.full((n - 1,), 2 * 0.65**2 * p, dtype=torch.float64)
    found = phase(steps_of(stored), range(n), noise)
    assert found.name == "exploring"
    assert found.evidence["mean_update_cosine"] == pytest.approx(0, abs=0.05)
    assert found.evidence["diffusion_ratio"] == pytest.approx(1, abs=0.1)
    assert phase(steps_of(stored), range(n)).evidence["mean_update_cosine"] < -0.2  # control
    clean, expected = updates(without_noise(steps_of(stored), noise)), updates(steps_of(walk(n, p, seed=1)))
    torch.testing.assert_close(clean.cross[1:-1, 1:-1], expected.cross[1:-1, 1:-1], rtol=0, atol=0.1 * p)


def test_rounding_to_bfloat16_hides_a_slow_walk():
    n, p = 41, 20_000
    exact = normal(1, p) + 1e-4 * walk(n, p, seed=1)
    # most of these updates are below the spacing of bfloat16, and the weights that move do so by a whole one
    spacing = 2.0 ** (exact[0].abs().log2().floor() - 7)
    noise = (spacing.square().sum() / 6).expand(n - 1)
    assert phase(steps_of(exact.bfloat16()), range(n), noise).name == "rounding"
    assert phase(steps_of(exact), range(n)).name == "exploring"


def test_diffusion_ratio_of_known_paths():
    assert float(diffusion_ratio(random_walk(30))) == pytest.approx(1, rel=1e-10)
    lags = [j - i for i in range(9) for j in range(i, 9) if j - i >= 4]
    assert float(diffusion_ratio(straight_line(9))) == pytest.approx(
        sum(lag**2 for lag in lags) / sum(lags), rel=1e-10
    )
    assert float(diffusion_ratio(jitter(9))) == pytest.approx(len(lags) / sum(lags), rel=1e-10)


def test_the_sentence_has_the_numbers():
    found = phase(steps_of(line(41, 50)), range(41))
    assert found.sentence == (
        "Going straight: the last 10 updates end 100% of their length from where they began "
        "(a random walk: 32%) and turn by 0° on average."
    )
    still = phase(steps_of(torch.ones(20, 3)), range(20))
    assert (still.name, still.sentence) == (
        "dead end",
        "At a dead end: no weight has changed from start to end.",
    )


def test_short_paths_are_too_short():
    for n in (1, 2, 5, 8):
        found = phase(steps_of(walk(n, 20)), range(n))
        assert (found.name, found.evidence) == ("too short", {})
        assert f"{n - 1} updates" in found.sentence
    assert phase(steps_of(walk(9, 200)), range(9)).name == "exploring"


def test_bad_input_is_named():
    steps = steps_of(walk(10, 20))
    for times in (range(9), [0, 1, 1, 2, 3, 4, 5, 6, 7, 8]):
        with pytest.raises(InputError, match="10 checkpoints need 10 increasing times"):
            phase(steps, times)
    with pytest.raises(InputError, match="9 updates need the noise of each, not 10"):
        phase(steps, range(10), torch.zeros(10))
    broken = walk(10, 20)
    broken[3, 4] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        phase(steps_of(broken), range(10))
