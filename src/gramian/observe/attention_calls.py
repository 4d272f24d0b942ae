"""Attention of any model, read where it calls PyTorch: fused, nn.MultiheadAttention, or by softmax."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gramian.errors import InputError
from gramian.observe.attention import AttentionMoments

ENTRIES = 1 << 23
"""Attention weights formed at once: bounds the memory that reading fused attention takes."""

HIDDEN = -1e4
"""A number added to a logit that hides the key: what models add is -10 000, the smallest number, or -inf."""

SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax)

Read = Callable[[str, AttentionMoments], None]


def fused_attention(
    q: Float[Tensor, "batch heads queries head_width"],
    k: Float[Tensor, "batch key_heads keys head_width"],
    attn_mask: Shaped[Tensor, "..."] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    kept: Tensor | None = None,
) -> AttentionMoments:
    """Take the sums over queries of what scaled_dot_product_attention does with these arguments.

    A = softmax(scale · Q Kᵀ + M),  scale = 1/√d_k unless given

    M is the boolean (true at keys that are seen) or additive mask, or hides the keys after a query; heads
    may share keys. Some queries are taken at a time, so that no matrix queries × keys is formed. `kept` is 1
    or true at real tokens. A query that sees no key is left out. The first token is the first real one: by
    `kept` where queries and keys are as many, otherwise the first key that a query may see.

    Shapes: q (batch, heads, queries, d_k), k (batch, heads/group, keys, d_k), attn_mask to be broadcast to
    (batch, heads, queries, keys), kept (batch, queries).
    Raises: InputError for a `kept` of another shape.
    Holds: exactly.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    q, k = (x.detach().float() if x.itemsize < 4 else x.detach() for x in (q, k))
    k = k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)
    scale = 1 / math.sqrt(width) if scale is None else scale
    shown = None if attn_mask is None else torch.broadcast_to(attn_mask, (batch, heads, queries, keys))
    first = _first_key(kept, shown, keys)
    kept = q.new_ones(batch, queries, dtype=torch.bool) if kept is None else kept.to(q.device).bool()
    if kept.shape != (batch, queries):
        raise InputError(f"a mask of shape {tuple(kept.shape)} does not fit {batch} x {queries} queries")
    rows = max(1, ENTRIES // (batch * heads * keys))
    parts = []
    for start in range(0, queries, rows):
        part = slice(start, start + rows)
        logits = _hidden(scale * (q[:, :, part] @ k.mT), None if shown is None else shown[:, :, part])
        if is_causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(start + 1)
            logits = logits.masked_fill(future, -math.inf)
        blind = (logits == -math.inf).all(-1).all(1)
        parts.append(AttentionMoments.of(logits.softmax(-1), kept[:, part] & ~blind, first))
    return sum(parts[1:], parts[0])


def _hidden(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask


def _first_key(kept: Tensor | None, mask: Tensor | None, keys: int) -> Tensor | None:
    """Column of the first real token of each sequence; None for column 0."""
    if kept is not None and kept.shape[1] == keys:
        return kept.bool().int().argmax(1)
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    return seen.any(1).any(1).int().argmax(1)


class AttentionCalls(TorchFunctionMode):
    """While entered, reads the attention of every call that a model's modules make.

    Read are scaled_dot_product_attention on (batch, heads, tokens, d_k); nn.MultiheadAttention; and a softmax
    over the last of four dimensions in a module, or in one of its parts, whose class is named ...Attention...
    Attention of other make (flash-attn's own kernels, FlexAttention) is not seen.

    Args:
        sequences: of how many sequences of every call the attention is read.
        mask: returns the mask (batch, tokens) of the pass under way, or None.
        read: is given the name of the innermost module that makes a call, and the call's sums.
        apart: names of modules whose calls are not read.
    """

    def __init__(
        self, sequences: int, mask: Callable[[], Tensor | None], read: Read, apart: Collection[str] = ()
    ):
        super().__init__()
        self.sequences, self.mask, self.read, self.apart = sequences, mask, read, apart
        self.modules: list[tuple[str, str]] = []
        """Name and class of the modules being called, the innermost last; outside of them nothing is read."""

    @no_type_check  # it sees every call: checks would slow tests down tenfold
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run the function as it is, then read it if it is attention."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reader = _READERS.get(func)
        if reader is None or not self.modules or self.site in self.apart:
            return result
        if torch._C._current_graph_task_id() == -1:  # checkpointing runs parts again
            with torch.no_grad(), torch.autocast(_device_type(args), enabled=False):
                reader(self, result, *args, **kwargs)
        return result

    def __exit__(self, *exception: object) -> None:
        """Leave the stack of modes, also from below those that an interrupt has left there."""
        stack = torch.overrides._get_current_function_mode_stack()
        if self not in stack:
            return
        above = [torch.overrides._pop_mode() for _ in stack[stack.index(self) :]]
        for mode in reversed(above[:-1]):
            torch.overrides._push_mode(mode)

    @property
    def site(self) -> str:
        """Name of the module that makes a call."""
        return self.modules[-1][0]

    def kept(self, batch: int, queries: int) -> Tensor | None:
        """Return which of the queries that are read are real tokens.

        Raises: InputError when the mask is not of these queries.
        """
        mask = self.mask()
        if mask is None:
            return None
        mask = mask[: self.sequences]
        if mask.shape == (batch, 1):
            mask = mask.expand(-1, queries)  # heads that share keys are laid out as queries of one token
        if mask.shape != (batch, queries):
            raise InputError(
                f"the attention at {self.site} has {batch} x {queries} queries where the mask has "
                f"{' x '.join(map(str, mask.shape))} tokens; say with attentions= what to read, () for none"
            )
        return mask


def _device_type(args: tuple) -> str:
    """Kind of device of the first tensor among a call's arguments."""
    return next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu")


def _fused(
    calls: AttentionCalls,
    result: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    if query.is_nested or query.ndim not in (3, 4):
        return
    q, k = (x[:, None] if x.ndim == 3 else x for x in (query, key))
    q, k = (x.expand(max(len(q), len(k)), *x.shape[1:]) for x in (q, k))
    if attn_mask is not None:
        shown = attn_mask[:, None] if query.ndim == attn_mask.ndim == 3 else attn_mask
        attn_mask = torch.broadcast_to(shown, (*q.shape[:3], k.shape[2]))[: calls.sequences]
    q, k = q[: calls.sequences], k[: calls.sequences]
    kept = calls.kept(len(q), q.shape[2])
    calls.read(calls.site, fused_attention(q, k, attn_mask, is_causal, scale, kept))


def _softmax(calls: AttentionCalls, result: Tensor, *args: Any, **kwargs: Any) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    attention = any("attention" in kind.lower() for _, kind in calls.modules[-2:])
    if not attention or result.ndim != 4 or dim not in (-1, 3):
        return
    weights = result[: calls.sequences]
    batch, _, queries, keys = weights.shape
    kept = calls.kept(batch, queries)
    first = None  # the first that is kept
    if kept is None or queries != keys:
        rows = weights if kept is None else weights * kept.to(weights.device)[:, None, :, None]
        first = (rows > 0).any(1).any(1).int().argmax(1)
    calls.read(calls.site, AttentionMoments.of(weights, kept, first))


def _multihead(calls: AttentionCalls, result: Any, *args: Any, **kwargs: Any) -> None:
    """Ask nn.MultiheadAttention once more, for the weights of the first sequences."""
    call = inspect.signature(functional.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    itself = given["query"] is given["key"]
    count, heads = calls.sequences, given["num_heads"]
    if given["query"].ndim == 3:
        for name in ("query", "key", "value"):
            given[name] = given[name][:, :count]
        for name, each in (("key_padding_mask", 1), ("static_k", heads), ("static_v", heads)):
            given[name] = None if given[name] is None else given[name][: count * each]
        if given["attn_mask"] is not None and given["attn_mask"].ndim == 3 and len(given["attn_mask"]) > 1:
            given["attn_mask"] = given["attn_mask"][: count * heads]
    given |= {"need_weights": True, "average_attn_weights": False, "training": False}
    weights = functional.multi_head_attention_forward(*call.args, **call.kwargs)[1]
    assert weights is not None
    weights = weights if weights.ndim == 4 else weights[None]
    kept = calls.kept(len(weights), weights.shape[2])
    padding = given["key_padding_mask"]
    if kept is None and itself and padding is not None:
        ignored = padding if padding.dtype == torch.bool else padding == -math.inf
        kept = ~ignored.reshape(len(weights), -1)
    calls.read(calls.site, AttentionMoments.of(weights, kept))


_READERS: dict[Any, Callable[..., None]] = {
    functional.scaled_dot_product_attention: _fused,
    functional.multi_head_attention_forward: _multihead,
    **dict.fromkeys(SOFTMAX, _softmax),
}


@contextmanager
def reading_calls(
    model: nn.Module,
    sequences: int,
    mask: Callable[[], Tensor | None],
    read: Read,
    apart: Collection[str] = (),
) -> Iterator[None]:
    """Read the attention calls of a model and its modules, but for those in `apart`, within the block."""
    calls = AttentionCalls(sequences, mask, read, apart)

    def entering(name: str, module: nn.Module) -> Callable[..., None]:
        return lambda *_: calls.modules.append((name, type(module).__name__))

    def leaving(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            names = [each for each, _ in calls.modules]
            if name in names:
                del calls.modules[len(names) - 1 - names[::-1].index(name) :]

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            name = name or type(model).__name__
            stack.callback(module.register_forward_pre_hook(entering(name, module)).remove)
            stack.callback(module.register_forward_hook(leaving(name), always_call=True).remove)
        stack.enter_context(calls)
        yield
