import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from gramian.errors import InputError
from gramian.nn.norms import NORMS, Derf, DynamicTanh, RMSNorm, SingleScaleRMSNorm, norm


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(width: int, dtype: torch.dtype = torch.float64, eps: float = 1e-3) -> tuple[nn.RMSNorm, nn.RMSNorm]:
    """Ours and torch's, with equal weights away from one."""
    ours, theirs = RMSNorm(width, eps=eps, dtype=dtype), nn.RMSNorm(width, eps=eps, dtype=dtype)
    nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(9))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def everything(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x and of the weight, for a random cotangent."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [
        y.detach(),
        *torch.autograd.grad(y, [x, *module.parameters()], draw(*y.shape, seed=5).to(y.dtype)),
    ]


def equation(w: Tensor, x: Tensor, eps: float = 1e-3) -> Tensor:
    return w * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def is_fast(y: Tensor) -> bool:
    return "_Scale" in type(y.grad_fn).__name__


@pytest.mark.parametrize(
    "x",
    [
        draw(16),
        draw(7, 16),
        draw(2, 3, 5, 16),
        draw(0, 16),
        draw(16, 4).mT,
        draw(2, 3, 5, 16).transpose(1, 2),
    ],
    ids=["row", "matrix", "tensor", "empty", "columns", "strided"],
)
def test_equals_torch_with_both_gradients(x) -> None:
    ours, theirs = both(16)
    torch.testing.assert_close(everything(ours, x), everything(theirs, x), rtol=1e-12, atol=1e-12)
    assert is_fast(ours(x))
    assert not is_fast(theirs(x))


def test_epsilon_is_inside_the_root() -> None:
    ours, _ = both(16, eps=0.5)
    x = draw(7, 16)
    torch.testing.assert_close(ours(x), equation(ours.weight, x, 0.5), rtol=1e-12, atol=1e-12)
    outside = ours.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + 0.5)
    assert (ours(x) - outside).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:Please use .torch.vmap:FutureWarning")  # gradcheck's own, torch 2.6
def test_derivatives_of_first_and_second_order() -> None:
    ours, _ = both(5)
    x, weight = draw(2, 3, 5).requires_grad_(), draw(5, seed=1).requires_grad_()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return functional_call(ours, {"weight": weight}, (x,))

    assert is_fast(call(x, weight))
    assert torch.autograd.gradcheck(call, (x, weight), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, weight), check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32", "same"])
def test_low_precision_is_rounded_once(dtype, weight_dtype) -> None:
    """Against the exact result at the same rounded inputs; w and x near 1, gradients up to √rows."""
    ours, _ = both(64, weight_dtype or dtype)
    exact = RMSNorm(64, eps=1e-3, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())
    x = draw(100, 64, dtype=dtype).requires_grad_()
    cotangent = draw(100, 64, seed=1, dtype=dtype)
    y, fine = ours(x), x.detach().double().requires_grad_()
    got = [y, *torch.autograd.grad(y, [x, ours.weight], cotangent)]
    z = exact(fine)
    expected = [z, *torch.autograd.grad(z, [fine, exact.weight], cotangent.double())]
    assert [t.dtype for t in got] == [dtype, dtype, ours.weight.dtype]
    for low, high in zip(got, expected, strict=True):
        # half a unit in the last place, and what float32 sums lose
        bound = torch.finfo(low.dtype).eps / 2 * high.abs() + 1e-5
        assert ((low.double() - high).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_neither_type_nor_sums(dtype) -> None:
    ours, _ = both(64, torch.float32)
    x = draw(100, 64, dtype=dtype)
    alone = everything(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == dtype
        inside = everything(ours, x)
    torch.testing.assert_close(inside, alone, rtol=0, atol=0)


def test_rows_of_zeros_are_finite() -> None:
    module = NORMS["rmsnorm"](16)
    x = draw(3, 16, dtype=torch.float32)
    x[1] = 0
    y, grad_x, grad_weight = everything(module, x)
    assert (y[1] == 0).all()
    assert grad_x.isfinite().all()
    assert grad_weight.isfinite().all()
    torch.testing.assert_close(grad_x[1], draw(3, 16, seed=5)[1].float() * 1e3)  # 1/√ε


def test_keeps_x_the_weight_and_one_number_a_row() -> None:
    def kept(module: nn.Module) -> int:
        sizes: dict[int, int] = {}
        x = draw(50, 16).requires_grad_()

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x)
        assert y.requires_grad
        return sum(sizes.values())

    ours, theirs = both(16)
    assert kept(ours) == 50 * 16 + 16 + 50
    assert kept(theirs) > 50 * 16 + 16 + 50


# torch scripts its own rules of forward mode
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("which", [0, 1], ids=["weight", "x"])
def test_function_transforms(which) -> None:
    ours, _ = both(5)
    arguments = draw(5, seed=1), draw(5, seed=2)

    def call(weight: Tensor, x: Tensor) -> Tensor:
        return functional_call(ours, {"weight": weight}, (x,)).pow(3)

    def oracle(weight: Tensor, x: Tensor) -> Tensor:
        return equation(weight, x).pow(3)

    transforms = [
        lambda f: jacrev(f, which),
        lambda f: jacfwd(f, which),
        lambda f: jacfwd(jacfwd(f, which), which),
        lambda f: jacrev(jacfwd(f, which), which),
        lambda f: hessian(lambda *a: f(*a).sum(), which),
        lambda f: lambda w, x: vmap(grad(lambda *a: f(*a).sum(), which))(w.expand(3, 5), x * draw(3, 1)),
        lambda f: lambda w, x: torch.func.jvp(f, (w, x), (x, w))[1],
    ]
    for transform in transforms:
        got, expected = transform(call)(*arguments), transform(oracle)(*arguments)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_over_reverse_without_transforms() -> None:
    ours, theirs = both(5)

    def curvature(module: nn.Module) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(draw(3, 5).requires_grad_(), draw(3, 5, seed=1))
            (slope,) = torch.autograd.grad(module(x).pow(3).sum(), x)
            tangent = torch.autograd.forward_ad.unpack_dual(slope).tangent
            assert tangent is not None
            return tangent

    torch.testing.assert_close(curvature(ours), curvature(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="an earlier dynamo cannot trace the annotation checks of the tests",
)
def test_compiles_to_torchs_own_operation() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    ours, _ = both(16)
    x = draw(3, 16).requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), ours(x), rtol=1e-12, atol=1e-12)
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [torch.rms_norm]
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({"normalized_shape": 16}, (3, 16)),
        ({"normalized_shape": 16, "eps": 0.1, "elementwise_affine": False}, (3, 16)),
        ({"normalized_shape": (4, 16), "eps": 0.1}, (3, 4, 16)),
    ],
    ids=["no_eps", "no_weight", "two_axes"],
)
def test_other_settings_are_torchs(arguments, shape) -> None:
    ours, theirs = RMSNorm(**arguments).double(), nn.RMSNorm(**arguments).double()
    x = draw(*shape)
    assert not is_fast(ours(x.requires_grad_()))
    torch.testing.assert_close(everything(ours, x), everything(theirs, x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 1), (16, 3), ()])
def test_another_width_raises_torchs_error(shape) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"normalized_shape|at least 1"):
        NORMS["rmsnorm"](16)(torch.ones(shape))


def test_other_devices_keep_torchs_operation() -> None:
    ours, _ = both(16)
    assert is_fast(ours(draw(3, 16)))
    y = ours.to("meta")(draw(3, 16).to("meta"))
    assert y.shape == (3, 16)
    assert not is_fast(y)


def test_names() -> None:
    module = norm("rmsnorm")(16)
    assert isinstance(module, RMSNorm)
    assert module.eps == 1e-6
    assert list(module.state_dict()) == list(nn.RMSNorm(16).state_dict()) == ["weight"]
    with pytest.raises(InputError, match="unknown norm 'batch'; choose one of layernorm, rmsnorm, none"):
        norm("batch")


def written_out(module: nn.Module, x: Tensor) -> Tensor:
    """The other norms entry by entry."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        root = (sum(entry**2 for entry in row) / len(row) + 1e-6) ** 0.5
        for j, entry in enumerate(row):
            if isinstance(module, DynamicTanh):
                up, down = torch.exp(module.alpha * entry), torch.exp(-module.alpha * entry)
                entry = module.weight[j] * (up - down) / (up + down) + module.bias[j]
            elif isinstance(module, Derf):
                # erf(u) = 2Φ(√2 u) − 1
                argument = math.sqrt(2) * (module.alpha * entry + module.shift)
                entry = module.weight[j] * (2 * torch.special.ndtr(argument) - 1) + module.bias[j]
            elif isinstance(module, SingleScaleRMSNorm):
                entry = module.weight * entry / root
            else:
                entry = entry / root
            rows.append(entry)
    return torch.stack(rows).view(x.shape)


OTHERS = ("rmsnorm_no_weight", "single_scale_rmsnorm", "dynamic_tanh", "derf")
every_other = pytest.mark.parametrize("name", OTHERS)


def away_from_start(name: str, width: int) -> nn.Module:
    module = NORMS[name](width).double()
    for index, parameter in enumerate(module.parameters()):
        parameter.data += 0.3 * draw(*parameter.shape, seed=20 + index)
    return module


@every_other
def test_other_norms_equal_their_equations(name) -> None:
    module, x = away_from_start(name, 6), draw(2, 3, 6).requires_grad_()
    got, expected = module(x), written_out(module, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    inputs, cotangent = [x, *module.parameters()], draw(2, 3, 6, seed=5)
    ours = torch.autograd.grad((got * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for wrong in OTHERS:  # control: no norm fits another's equation
        if wrong != name:
            assert (written_out(away_from_start(wrong, 6), x) - got).abs().max() > 1e-3


@every_other
@pytest.mark.filterwarnings("ignore:Please use .torch.vmap:FutureWarning")
def test_gradients_of_other_norms_by_finite_differences(name) -> None:
    module, x = away_from_start(name, 5), draw(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), (x, *module.parameters()))


@every_other
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_norms_keep_the_type(name, dtype) -> None:
    exact = NORMS[name](16).double()
    for module in (NORMS[name](16), NORMS[name](16).to(dtype)):
        x = draw(50, 16, dtype=dtype)
        y = module(x)
        assert y.dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), exact(x.double()), rtol=4 * unit, atol=4 * unit)


def test_one_scale_for_all_features_and_none() -> None:
    x = draw(7, 16)
    single, plain = NORMS["single_scale_rmsnorm"](16).double(), NORMS["rmsnorm"](16).double()
    torch.testing.assert_close(single(x), plain(x), rtol=1e-12, atol=1e-12)
    assert [p.numel() for p in single.parameters()] == [1]
    assert not list(NORMS["rmsnorm_no_weight"](16).parameters())
    single.weight.data.fill_(3.0)  # length γ, the same for all rows
    lengths = torch.linalg.vector_norm(single(x), dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 3 * 4), rtol=1e-5, atol=0)
    assert "_Scale" in repr(single(x).grad_fn)
    torch.testing.assert_close(vmap(single)(x), single(x))  # torch's own operation
    with pytest.raises(RuntimeError, match="normalized_shape"):
        single(draw(7, 1))


def test_bounded_maps_are_linear_near_zero_and_bounded_far_away() -> None:
    x = 1e-4 * draw(7, 16)
    for name, slope in (("dynamic_tanh", 0.5), ("derf", 1 / math.sqrt(math.pi))):
        module = NORMS[name](16).double()
        torch.testing.assert_close(module(x), slope * x, rtol=0, atol=1e-11)
        assert module(1e6 * draw(7, 16)).abs().max() <= 1
        assert (module(0.5 + 0 * x) - slope * 0.5).abs().min() > 1e-3  # control: not linear further out
        assert (NORMS["rmsnorm"](16).double()(x) - slope * x).abs().max() > 0.1
