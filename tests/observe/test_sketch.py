from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gramian.core.gram import Gram, gram
from gramian.core.path_angles import apex_angles, directional_similarity, update_angles
from gramian.core.readings import cosine
from gramian.core.trajectory import (
    displacement,
    displacement_ratio,
    displacements,
    path_length,
    steps_of,
    update_lengths,
)
from gramian.errors import InputError
from gramian.observe import sketch
from gramian.observe.sketch import CountSketch, inner_product_error, jackknife

M, P = 64, 1024


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(of: CountSketch, p: int) -> Tensor:
    return torch.stack([of.of([row]) for row in torch.eye(p)], 1)


def test_a_number_goes_into_one_bucket_with_a_sign_and_those_of_a_block_into_different_ones() -> None:
    s = matrix(CountSketch(M), P)
    assert (s.abs().sum(0) == 1).all()
    assert (s.abs().max(0).values == 1).all()
    for block in s.split(M, 1):
        assert torch.equal((block @ block.T).diagonal(), torch.ones(M, dtype=torch.float64))
    assert (s.abs().sum(1) == P / M).all()


def test_it_is_linear_and_differences_of_near_points_survive() -> None:
    a, moved = drawn(50_000), drawn(50_000, seed=1)
    of = CountSketch(256, 3)
    for size in (1.0, 1e-6):
        found = of.of([a + size * moved]) - of.of([a])
        assert (found - size * of.of([moved])).norm() < 1e-12 * a.norm()
    assert not torch.allclose(CountSketch(256, 4).of([a]), of.of([a]), rtol=0.1)
    assert not torch.allclose(CountSketch(256, 3, "other").of([a]), of.of([a]), rtol=0.1)


def test_pieces_chunks_shapes_and_precisions_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = drawn(60, 50).bfloat16()
    of = CountSketch(128)
    whole = of.of([x])
    torch.testing.assert_close(of.of([x.double()]), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(of.of([x[:7], x[7:8].T, x[8:], x[:0]]), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(of.of([x.T.contiguous().T]), whole, rtol=0, atol=1e-12)
    monkeypatch.setattr(sketch, "CHUNK", 77)
    torch.testing.assert_close(of.of([x]), whole, rtol=0, atol=1e-12)
    assert not torch.allclose(of.of([x.T]), whole, atol=1e-2)
    assert torch.equal(of.of([]), torch.zeros(128, dtype=torch.float64))


def test_a_vector_no_longer_than_the_sketch_is_kept_exactly() -> None:
    x = drawn(3, 200)
    found = torch.stack([CountSketch(256).of([row[:60], row[60:]]) for row in x])
    torch.testing.assert_close(found @ found.T, x @ x.T, rtol=1e-13, atol=0)
    longer = torch.stack([CountSketch(128).of([row]) for row in x])
    assert ((longer @ longer.T) - x @ x.T).abs().max() > 0.1


def test_the_map_never_changes() -> None:
    """Records are gone on with years later: the same seed must mean the same signs and shifts."""
    found = CountSketch(64, 7, "layers.0").of([torch.arange(1, 201)])
    assert found[:8].tolist() == GOLDEN
    assert found.sum().item() == GOLDEN_SUM


GOLDEN = [67.0, -68.0, -325.0, -134.0, 135.0, -270.0, -225.0, 138.0]
GOLDEN_SUM = -624.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_sketch() -> None:
    x, of = drawn(3_000_000).float(), CountSketch(576, 2)
    found = of.of([x.cuda(), x[:1000].cuda()])
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), of.of([x, x[:1000]]), rtol=0, atol=1e-10)


def structured() -> dict[str, tuple[Tensor, Tensor]]:
    ones, ramp = torch.ones(P), torch.arange(P) % M + 1.0
    stride, column = torch.zeros(P), torch.zeros(P // 32, 32)
    stride[3::M], column[:, 7] = 1, 1
    low = torch.outer(drawn(32), drawn(32, seed=1)).flatten()
    return {
        "constant": (ones, ones),
        "alternating": (ones, (-1.0) ** torch.arange(P)),
        "one of each block": (stride, stride),
        "neighbours in each block": (stride, stride.roll(1)),
        "one-hot column": (column.flatten(), ones),
        "low rank": (low, low),
        "periodic": (ramp, ramp),
        "unstructured": (drawn(P), drawn(P, seed=1)),
    }


def pairs_in_different_blocks(a: Tensor, b: Tensor) -> float:
    """Σ (a_i b_j + a_j b_i)² over pairs i < j of different blocks, by all pairs."""
    products = torch.outer(a.double(), b.double())
    block = torch.arange(P) // M
    return ((products + products.T).square() * (block[:, None] != block)).sum().item() / 2


@pytest.mark.parametrize("kind", structured())
def test_inner_products_have_the_stated_mean_and_variance_whatever_the_structure(kind: str) -> None:
    a, b = structured()[kind]
    draws = 600
    sketches = [(CountSketch(M, seed).of([a]), CountSketch(M, seed).of([b])) for seed in range(draws)]
    errors = torch.stack([x @ y for x, y in sketches]) - a.double() @ b.double()
    variance = pairs_in_different_blocks(a, b) / M
    assert abs(errors.mean()) < 3.5 * (variance / draws) ** 0.5
    assert errors.square().mean() == pytest.approx(variance, rel=0.25)
    norms = a.double().square().sum(), b.double().square().sum()
    bound = inner_product_error(*norms, a.double() @ b.double(), M)
    assert 0.9 * bound < variance**0.5 <= bound
    assert errors.abs().max() < 6 * bound


def test_a_cosine_is_off_by_one_minus_its_square_over_the_root_of_the_size() -> None:
    a, b = drawn(4096), 0.5 * drawn(4096, seed=1) + drawn(4096)
    exact = cosine(gram(torch.stack([a, b])))[0, 1].item()
    found = []
    for seed in range(300):
        rows = torch.stack([CountSketch(256, seed).of([row]) for row in (a, b)])
        found.append(cosine(gram(rows))[0, 1])
    assert (torch.stack(found) - exact).std().item() == pytest.approx((1 - exact**2) / 16, rel=0.2)


def test_one_pattern_of_signs_for_all_blocks_would_not_do() -> None:
    """Control of the test above: with it the errors of a constant vector are larger and far between."""
    draw, blocks = torch.Generator().manual_seed(0), P // M
    errors = []
    for _ in range(2000):
        signs = 2 * torch.randint(2, (M,), generator=draw) - 1.0
        turned = [signs.roll(int(torch.randint(M, (), generator=draw))) for _ in range(blocks)]
        outer = 2 * torch.randint(2, (blocks,), generator=draw) - 1.0
        errors.append((outer @ torch.stack(turned)).square().sum() - P)
    found, (ones, _) = torch.stack(errors), structured()["constant"]
    assert found.square().mean() > 1.5 * pairs_in_different_blocks(ones, ones) / M
    assert found.abs().max() > 6 * pairs_in_different_blocks(ones, ones) ** 0.5 / M**0.5


def training_path(optimiser: Callable[..., torch.optim.Optimizer]) -> Tensor:
    """20 points of 59 370 parameters: a perceptron on the digits."""
    images, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    images, draw = images.float() / 16, torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 160), nn.ReLU(), nn.Linear(160, 10))
    updating, points = optimiser(net.parameters()), []
    for step in range(191):
        if step % 10 == 0:
            points.append(nn.utils.parameters_to_vector(net.parameters()).detach().double())
        batch = torch.randint(len(images), (64,), generator=draw)
        updating.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        updating.step()
    return torch.stack(points)


READINGS: dict[str, Callable[[Gram], Tensor]] = {
    "cosine": lambda steps: cosine(displacements(steps))[5, 18],
    "angle of two updates": lambda steps: update_angles(steps)[9],
    "mean angle": lambda steps: update_angles(steps).mean(),
    "apex angle": lambda steps: apex_angles(steps)[10],
    "relative similarity": lambda steps: directional_similarity(displacements(steps)),
    "displacement ratio": displacement_ratio,
    "length of an update": lambda steps: update_lengths(steps)[4],
    "path length": path_length,
    "displacement": lambda steps: displacement(steps)[-1],
    "inner product": lambda steps: displacements(steps).cross[5, 18],
}


def all_readings(steps: Gram) -> Tensor:
    return torch.stack([reading(steps) for reading in READINGS.values()])


def check_coverage(points: Tensor, seeds: int, least: float) -> None:
    exact = all_readings(steps_of(points))
    estimates, bars = [], []
    for seed in range(seeds):
        sketches = torch.stack([CountSketch(512, seed).of([point]) for point in points])
        estimate, bar = jackknife([sketches], all_readings)
        estimates.append(estimate)
        bars.append(bar)
    errors, errorbars = torch.stack(estimates) - exact, torch.stack(bars)

    def covered(width: float) -> dict[str, float]:
        shares = (errors.abs() <= width * errorbars).double().mean(0)
        return dict(zip(READINGS, shares.tolist(), strict=True))

    assert min(covered(2.09).values()) >= least, covered(2.09)
    assert max(covered(1.0).values()) < 0.85, covered(1.0)  # control: half the interval is not enough
    bias = errors.mean(0).abs() / errors.std(0)
    assert bias.max() < 0.2 + 3 / seeds**0.5


def momentum(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)  # type: ignore[arg-type]


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)  # type: ignore[arg-type]


def test_error_bars_cover_what_the_parameters_say() -> None:
    points = training_path(momentum)
    check_coverage(points, seeds=30, least=0.8)
    a, b = points[6] - points[0], points[19] - points[0]
    maps = [CountSketch(512, seed) for seed in range(400)]
    errors = torch.stack([of.of([a]) @ of.of([b]) for of in maps]) - a @ b
    stated = inner_product_error(a @ a, b @ b, a @ b, 512)
    assert errors.square().mean().sqrt() == pytest.approx(stated.item(), rel=0.15)
    assert abs(errors.mean()) < 3.5 * stated / 400**0.5


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", [momentum, adam])
def test_error_bars_of_95_percent_cover_90_to_100(optimiser: Callable[..., torch.optim.Optimizer]) -> None:
    check_coverage(training_path(optimiser), seeds=200, least=0.9)


def test_the_error_bar_is_that_of_leaving_buckets_out() -> None:
    points = drawn(5, 130).cumsum(0)
    estimate, bar = jackknife([points[:, :70], points[:, 70:]], path_length, parts=4)
    values = []
    for part in range(4):
        left = torch.cat([torch.arange(70) % 4 != part, torch.arange(60) % 4 != part])
        values.append(path_length(steps_of(points[:, left])) * (4 / 3) ** 0.5)
    torch.testing.assert_close(estimate, path_length(steps_of(points)))
    torch.testing.assert_close(bar, torch.stack(values).std(correction=0) * 3**0.5)


def test_groups_add_up_and_what_is_kept_exactly_has_no_error() -> None:
    points = drawn(6, 3000).cumsum(0)
    kept, rest = points[:, :100], points[:, 100:]
    sketches = torch.stack([CountSketch(512).of([row]) for row in rest])
    own = torch.stack([CountSketch(128).of([row]) for row in kept])
    estimate, bar = jackknife([sketches], path_length, kept=[own])
    both = steps_of(torch.cat([sketches, kept], 1))
    torch.testing.assert_close(estimate, path_length(both))
    assert bar > 0
    alone, none = jackknife([], path_length, kept=[own])
    torch.testing.assert_close(alone, path_length(steps_of(kept)))
    assert none == 0
    large, _ = jackknife([], path_length, kept=[1e3 * own])
    _, relative = jackknife([sketches], path_length, kept=[1e3 * own])
    assert relative < 1e-2 * bar
    assert large > 1e2 * alone


def test_mistakes_are_named() -> None:
    for size in (0, 100, -64):
        with pytest.raises(InputError, match="multiple of 64"):
            CountSketch(size)
    points = drawn(4, 64)
    for parts in (1, 65):
        with pytest.raises(InputError, match=f"2 to 64 parts, not {parts}"):
            jackknife([points], path_length, parts)
    with pytest.raises(InputError, match="none"):
        jackknife([], path_length)
