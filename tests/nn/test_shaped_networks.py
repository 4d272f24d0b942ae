"""Networks through their covariances: the same as with every weight drawn, and one step of the SDE's."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gramian.core.sde import square_root
from gramian.errors import InputError
from gramian.nn.shaped import shaped_slopes
from gramian.nn.shaped_networks import (
    ShapedNetworks,
    shaped_attention,
    softmax_attention,
    uncentred_attention,
    wishart_factor,
)
from gramian.theory.covariance_sde import Branch, ShapedAttention, ShapedMLP, covariance

START = torch.tensor([[1, 0.3, 0.1], [0.3, 1.2, 0.4], [0.1, 0.4, 0.8]], dtype=torch.float64)


def normal(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def of_size(m: int) -> Tensor:
    x = normal(m)(m, m + 2)
    return x @ x.mT / (m + 2)


def upper(v: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(v.shape[-1], v.shape[-1]).unbind()
    return v[..., rows, columns]


def tokens(v: Tensor, width: int) -> Tensor:
    """Tokens of a given covariance, any: their first features carry it."""
    return math.sqrt(width) * torch.nn.functional.pad(square_root(v), (0, width - len(v)))


def literal_attention(nets: ShapedNetworks, v: Tensor, count: int, draw) -> Tensor:
    n, x = nets.width, tokens(v, nets.width)
    keys, queries = draw(count, n, nets.key_width), draw(count, n, nets.key_width)
    tau = nets.tau0 * math.sqrt(n * nets.key_width)
    logits = (x @ keys) @ (x @ queries).mT / n / tau
    m = len(v)
    rows = [slice(0, i + 1 if nets.causal else m) for i in range(m)]
    a = torch.eye(m, dtype=torch.float64).expand(count, m, m).clone()
    for i, seen in enumerate(rows):
        a[:, i, seen] += logits[:, i, seen].softmax(-1) - 1 / logits[0, i, seen].numel()
    new = math.sqrt(1 - nets.gamma**2) * x + nets.gamma * a @ x @ draw(count, n, n) / math.sqrt(n)
    return new @ new.mT / n


def literal_mlp(nets: ShapedNetworks, v: Tensor, count: int, draw) -> Tensor:
    n, x = nets.width, tokens(v, nets.width)
    up, down = 1 + nets.positive / math.sqrt(n), 1 + nets.negative / math.sqrt(n)
    c = 2 / (up**2 + down**2)
    hidden = x @ draw(count, n, n) / math.sqrt(n)
    shaped = up * hidden.clamp(min=0) + down * hidden.clamp(max=0)
    branch = shaped * math.sqrt(c / n) @ draw(count, n, n)
    new = math.sqrt(1 - nets.gamma**2) * x + nets.gamma * branch
    return new @ new.mT / n


def apart(x: Tensor, y: Tensor) -> float:
    """Largest difference in mean and covariance of rows, in standard errors."""
    errors = []
    for f in (lambda z: z, lambda z: torch.einsum("ra,rb->rab", z - y.mean(0), z - y.mean(0)).flatten(1)):
        a, b = f(x), f(y)
        spread = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        errors.append(((a.mean(0) - b.mean(0)).abs() / spread.clamp(min=1e-12)).max().item())
    return max(errors)


SMALL = ShapedNetworks(12, 0.9, 0.5, key_width=5, positive=0.4, negative=-2.0)


@pytest.mark.parametrize(
    "nets",
    [SMALL, replace(SMALL, causal=True), replace(SMALL, width=5, key_width=2), replace(SMALL, width=3)],
)
def test_covariances_are_those_of_networks_with_every_weight_drawn(nets) -> None:
    count, draw = 30_000, normal(0)
    generator = torch.Generator().manual_seed(1)
    v, other = START.expand(count, 3, 3), replace(nets, gamma=0.7)
    for fast, slow in ((nets.attended, literal_attention), (nets.transformed, literal_mlp)):
        found, expected = fast(v, generator), slow(nets, START, count, draw)
        assert apart(upper(found), upper(expected)) < 5
        assert apart(upper(getattr(other, fast.__name__)(v, generator)), upper(expected)) > 10


@pytest.mark.parametrize("freedom", [1, 2, 3, 7])
def test_wishart_factors(freedom) -> None:
    generator = torch.Generator().manual_seed(0)
    t = wishart_factor(60_000, 3, freedom, START, generator)
    n = normal(5)(60_000, 3, freedom)
    assert t.shape == (60_000, 3, min(3, freedom))
    assert apart(upper(t @ t.mT), upper(n @ n.mT)) < 5
    other = wishart_factor(60_000, 3, freedom + 1, START, generator)
    assert apart(upper(other @ other.mT), upper(n @ n.mT)) > 10


def drift_of_attention(width: int, branch: ShapedAttention, draws: int) -> Tensor:
    """n (E V' − V) with the mean over the values taken exactly and logits of both signs."""
    nets = ShapedNetworks(width, branch.gamma, branch.tau0, key_width=256)
    root, total = square_root(START), torch.zeros_like(START)
    draw, generator = normal(width), torch.Generator().manual_seed(width)
    keys = wishart_factor(draws, 3, nets.key_width, START, generator)
    logits = root @ keys @ draw(draws, 3, 3) @ root.mT / (nets.tau0 * math.sqrt(width * nets.key_width))
    for signed in (logits, -logits):
        a = shaped_attention(signed, branch.centring(START))
        total += (a @ START @ a.mT).mean(0) / 2
    return width * branch.gamma**2 * (total - START)


def slope(widths: list[int], errors: list[float]) -> float:
    x, y = torch.tensor(widths).double().log(), torch.tensor(errors).double().log()
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def test_the_drift_of_attention_is_that_of_the_sde_up_to_one_over_the_width() -> None:
    branch, widths = ShapedAttention(0.8, 0.5), [8, 32, 128]
    errors = [(drift_of_attention(n, branch, 200_000) - branch.drift(START)).norm().item() for n in widths]
    assert abs(slope(widths, errors) + 1) < 0.15
    wrong = ShapedAttention(0.8, 0.6).drift(START)
    assert (drift_of_attention(128, branch, 200_000) - wrong).norm() > 4 * errors[-1]


def test_the_drift_of_the_mlp_is_that_of_the_sde_up_to_the_root_of_the_width() -> None:
    """The exact kernel of the leaky ReLU: no sampling."""
    gamma, widths = 0.8, [256, 4096, 65536]
    size = START.diagonal().sqrt()
    rho = (START / torch.outer(size, size)).clamp(max=1)
    errors = []
    for n in widths:
        up, down = shaped_slopes(n, 0.0, -1.0)
        bend = (up - down) ** 2 / (math.pi * (up**2 + down**2))
        kernel = rho + bend * ((1 - rho**2).sqrt() - rho * rho.arccos())
        found = n * gamma**2 * torch.outer(size, size) * (kernel - rho)
        errors.append((found - ShapedMLP(gamma).drift(START)).norm().item())
    assert abs(slope(widths, errors) + 0.5) < 0.03


@pytest.mark.parametrize("m", [2, 4, 8])
@pytest.mark.parametrize("branch", [ShapedAttention(0.7, 0.8), ShapedMLP(0.7)], ids=["attention", "mlp"])
def test_one_step_has_the_diffusion_of_the_sde(m, branch: Branch) -> None:
    width, count, v = 256, 12_000, of_size(m)
    nets = ShapedNetworks(width, 0.7, 0.8)
    generator = torch.Generator().manual_seed(m)
    move = nets.attended if isinstance(branch, ShapedAttention) else nets.transformed
    parts = [move(v.expand(count // 10, m, m), generator) for _ in range(10)]
    moved = upper(torch.cat(parts) - v) * math.sqrt(width)
    products = torch.einsum("ra,rb->rab", moved - moved.mean(0), moved - moved.mean(0))
    expected, error = covariance(branch, v), products.std(0) / math.sqrt(count)
    assert ((products.mean(0) - expected).abs() < 5 * error + 0.02 * expected.abs().max()).all()
    assert ((products.mean(0) - 1.2 * expected).abs() > 5 * error + 0.02 * expected.abs().max()).any()
    drift = (upper(torch.cat(parts)) - upper(v)).mean(0) * width - upper(branch.drift(v))
    assert (drift.abs() < 5 * moved.std(0) * math.sqrt(width / count)).all()


@pytest.mark.parametrize("branch", [ShapedAttention(0.8, 0.5), ShapedMLP(0.8)], ids=["attention", "mlp"])
def test_one_step_s_diffusion_is_that_of_the_sde_up_to_one_over_the_width(branch: Branch) -> None:
    """n Cov V' by 200 000 draws; the chance of it, 0.4 %, is below the smallest of the errors."""
    widths, expected, errors = [8, 16, 32], covariance(branch, START), []
    for n in widths:
        nets, generator = ShapedNetworks(n, 0.8, 0.5), torch.Generator().manual_seed(n)
        move = nets.attended if isinstance(branch, ShapedAttention) else nets.transformed
        parts = [upper(move(START.expand(25_000, 3, 3), generator)) for _ in range(8)]
        errors.append(((n * torch.cov(torch.cat(parts).mT) - expected).norm() / expected.norm()).item())
    assert abs(slope(widths, errors) + 1) < 0.35
    assert errors[-1] < 0.06
    assert (1.2 * expected - expected).norm() / expected.norm() > 3 * errors[-1]  # control: another diffusion


def test_controls_leave_the_limit() -> None:
    """A mean that is added again grows, an averaging stack collapses, a fixed temperature is no SDE."""
    eye = torch.eye(4, dtype=torch.float64)
    start, settings = 0.2 + 0.8 * eye, {"networks": 100, "seed": 0}
    nets = ShapedNetworks(64, 0.5)

    def cosine(v: Tensor) -> float:
        v = v[torch.isfinite(v).all(-1).all(-1)]
        return (v[:, 0, 1] / (v[:, 0, 0] * v[:, 1, 1]).sqrt()).median().item()

    shaped = nets.simulate(start, 32, **settings)
    collapsed = replace(nets, gamma=1.0, attention=softmax_attention).simulate(start, 32, **settings)
    assert cosine(collapsed.states[-1]) > 0.999
    assert cosine(shaped.states[-1]) < 0.6
    uncentred = replace(nets, attention=uncentred_attention).simulate(start, 32, **settings)
    assert uncentred.states[-1][:, 0, 0].median() > 2 * shaped.states[-1][:, 0, 0].median()
    assert cosine(uncentred.states[-1]) > 0.9
    growth = []
    for width in (64, 1024):  # four blocks: the first order of logits that do not shrink is of order one
        cold = replace(nets, width=width, power=0.0)
        moved = cold.simulate(start, 4, networks=200, seed=0).states[-1] - start
        growth.append(moved.mean(0).norm().item())
    right = replace(nets, width=1024).simulate(start, 4, networks=200, seed=0).states[-1] - start
    assert growth[1] > 0.7 * growth[0]
    assert growth[1] > 5 * right.mean(0).norm().item()


def test_records_parts_and_seeds() -> None:
    start, told = torch.eye(8, dtype=torch.float64), []
    nets = ShapedNetworks(512, 0.3)
    found = nets.simulate(start, 3, networks=300, seed=5, records=(0, 1, 3), progress=told.append)
    assert found.states.shape == (3, 300, 8, 8)
    assert found.times.tolist() == pytest.approx([0, 1 / 512, 3 / 512])
    assert (found.states[0] == start).all()
    assert told[-1] == 300
    assert len(told) > 1
    assert len(found.states[-1, :, 0, 1].unique()) == 300
    again = nets.simulate(start, 3, networks=300, seed=5, records=(0, 1, 3))
    assert torch.equal(found.states, again.states)
    assert not torch.equal(
        found.states, nets.simulate(start, 3, networks=300, seed=6, records=(0, 1, 3)).states
    )


def test_what_cannot_be_sampled_is_named() -> None:
    for change, words in (
        ({"width": 0}, "width"),
        ({"key_width": 0}, "key_width"),
        ({"gamma": 1.5}, "gain"),
        ({"tau0": 0.0}, "tau0"),
        ({"negative": math.inf}, "finite"),
        ({"width": 4, "positive": -2.0}, "slope"),
    ):
        with pytest.raises(InputError, match=words):
            replace(SMALL, **change)
    eye = torch.eye(20, dtype=torch.float64)
    for start, depth, networks, words in (
        (eye, 2, 2, "20 tokens"),
        (START, 0, 2, "depth"),
        (START, 2, 0, "net"),
    ):
        with pytest.raises(InputError, match=words):
            SMALL.simulate(start, depth, networks=networks, seed=0)
    for start, words in ((3 - 2 * START.new_ones(3).diag(), "semidefinite"), (START[:1, :1], "two tokens")):
        with pytest.raises(InputError, match=words):
            SMALL.simulate(start, 2, networks=2, seed=0)
