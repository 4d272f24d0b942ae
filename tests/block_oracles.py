"""Transformer blocks written out slowly: head by head, query by query, in explicit matrices."""

import math
from typing import Any

import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from gramian.nn.init import Reparametrised
from gramian.nn.mixing import ClippedSoftmaxMixing, ShapedMixing, SinkMixing, SoftCapMixing
from gramian.nn.prescribed import CausalExponential, CausalUniform, Exponential, PrescribedMixing
from gramian.nn.shaped import CentredMixing
from gramian.nn.skipless import Modulated
from gramian.nn.tailored import TailoredLeakyReLU


def norm(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        root = (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return centred / root * module.weight + module.bias
    if isinstance(module, nn.RMSNorm):
        normed = x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return normed if module.weight is None else normed * module.weight
    assert isinstance(module, nn.Identity)
    return x


def linear(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, Reparametrised):
        start = torch.eye(x.shape[-1], dtype=x.dtype) if module.base is None else module.base
        return x @ (module.alpha * start + module.beta * module.delta.weight).T
    assert isinstance(module, nn.Linear)
    return x @ module.weight.T + (0 if module.bias is None else module.bias)


def clipped(weight: Tensor, offset: float) -> Tensor:
    """clip((1 − g) w + g, 0, 1) of one softmax weight."""
    stretched = (1 - offset) * weight + offset
    return 0 * weight if stretched < 0 else stretched


def target(prescription: Any, parameter: float, tokens: int) -> Tensor:
    """The correlation of tokens that a prescribed attention aims at, by its rate or its correlation."""
    if isinstance(prescription, (CausalExponential, Exponential)):
        place = torch.arange(tokens, dtype=torch.float64)
        apart = (place[:, None] - place).abs()
        return torch.where(apart == 0, 1.0, torch.exp(-parameter * apart.clamp(min=1)))
    return torch.full((tokens, tokens), parameter, dtype=torch.float64).fill_diagonal_(1.0)


def prescribed(prescription: Any, tokens: int) -> Tensor:
    """The matrix that takes one target to the next, by dense linear algebra."""
    goal = getattr(prescription, "rate", None) or prescription.correlation
    after, before = (target(prescription, value, tokens) for value in (goal, prescription.before))
    if isinstance(prescription, (CausalExponential, CausalUniform)):
        return torch.linalg.cholesky(after) @ torch.linalg.inv(torch.linalg.cholesky(before))
    one, other = (torch.from_numpy(sqrtm(matrix.numpy()).real) for matrix in (after, before))
    return one @ torch.linalg.inv(other)


def mixing_matrix(mixing: Any, head: int, q: Tensor, k: Tensor, width: int) -> Tensor:
    """Return what multiplies the values of one head: (tokens, tokens)."""
    tokens = len(q)
    matrix = torch.zeros(tokens, tokens, dtype=q.dtype)
    for i in range(tokens):
        seen = range(i + 1 if mixing.causal else tokens)
        logits = torch.stack([q[i] @ k[j] / q.shape[1] ** 0.5 for j in seen])
        if isinstance(mixing, CentredMixing):
            logits = logits / (mixing.temperature * width**0.5)
        if isinstance(mixing, SoftCapMixing):
            logits = mixing.cap * torch.tanh(logits / mixing.cap)
        total = logits.exp().sum()
        if isinstance(mixing, SinkMixing):
            total = total + math.exp(mixing.sink) if isinstance(mixing.sink, float) else total
            total = total + mixing.sink[head].exp() if isinstance(mixing.sink, Tensor) else total
        weights = logits.exp() / total
        if isinstance(mixing, PrescribedMixing):
            row = prescribed(mixing.prescription, tokens)[i, list(seen)]
            weights = row * logits.exp() / (row @ logits.exp()) * row.sum()
        if isinstance(mixing, ClippedSoftmaxMixing):
            weights = torch.stack([clipped(weight, mixing.offset) for weight in weights])
        for j in seen:
            matrix[i, j] = weights[j]
            if isinstance(mixing, CentredMixing):
                matrix[i, j] += (i == j) - 1 / len(seen)
    if isinstance(mixing, ShapedMixing):
        uniform = torch.ones(tokens, tokens, dtype=q.dtype)
        uniform = uniform.tril() if mixing.causal else uniform
        uniform = uniform / uniform.sum(1, keepdim=True)
        gamma = 0 if mixing.gamma is None else mixing.gamma[head]
        identity = torch.eye(tokens, dtype=q.dtype)
        matrix = mixing.alpha[head] * identity + mixing.beta[head] * matrix - gamma * uniform
        matrix = matrix if mixing.gain is None else mixing.gain * matrix
    return matrix


def attention(module: Any, x: Tensor) -> Tensor:
    """x (tokens, width) -> (tokens, width)."""
    width, size = x.shape[1], module.head_width
    joined, v = linear(module.query_key, x), linear(module.value, x)
    q, k = joined[:, :width], joined[:, width:]
    heads, count = [], width // size
    for head in range(count):
        key_head, value_head = head * k.shape[1] // width, head * v.shape[1] // width
        query = norm(module.query_norm, q[:, head * size : (head + 1) * size])
        key = norm(module.key_norm, k[:, key_head * size : (key_head + 1) * size])
        value = v[:, value_head * size : (value_head + 1) * size]
        mixed = mixing_matrix(module.mixing, head, query, key, width) @ value
        if module.gate is not None:  # one gate a head
            logit = x @ module.gate.weight[head] + module.gate.bias[head]
            mixed = mixed / (1 + torch.exp(-logit))[:, None]
        heads.append(mixed)
    return linear(module.projection, torch.cat(heads, -1))


def mlp(module: Any, x: Tensor) -> Tensor:
    hidden = linear(module.up, x)
    if not module.gated:
        return linear(module.down, hidden.clamp(min=0))
    half = hidden.shape[-1] // 2
    return linear(module.down, hidden[:, :half].clamp(min=0) * hidden[:, half:])


def leaky(module: TailoredLeakyReLU, x: Tensor) -> Tensor:
    scale = (2 / (1 + module.negative_slope**2)) ** 0.5
    return scale * torch.where(x > 0, x, module.negative_slope * x)


def orthogonal_mlp(module: Any, x: Tensor) -> Tensor:
    inner, down = module
    up, activation = inner.branch if isinstance(inner, Modulated) else inner
    hidden = leaky(activation, linear(up, x))
    return linear(down, hidden * (1 + linear(inner.gate, x)) if isinstance(inner, Modulated) else hidden)


def norm_free(name: str, module: Any, x: Tensor) -> Tensor:
    """A block of `gramian.nn.skipless` or `gramian.nn.shaped`, its skips where its name says."""
    before, attend, feed = module
    x, kept = norm(before, x), 0.99**0.5 if name == "shaped" else 0.98  # γ = 0.1
    new = (1 - kept**2) ** 0.5
    if name in ("e_spa_attention_skip", "e_spa_skips", "shaped"):
        x = kept * x + new * attention(attend.branch, x)
    else:
        x = attention(attend, x)
    if name in ("e_spa_mlp_skip", "e_spa_skips", "shaped"):
        return kept * x + new * orthogonal_mlp(feed.branch, x)
    return orthogonal_mlp(feed, x)


def block(name: str, module: Any, x: Tensor) -> Tensor:
    """One sequence through a block, from the equation of its docstring and the parts' places in it."""
    if name in ("v_skipinit", "u_spa", "shaped") or name.startswith("e_spa"):
        return norm_free(name, module, x)
    if name == "sas":
        before, attend, feed = module
        middle = attention(attend, norm(before, x))
        return feed.skip * middle + feed.gain * mlp(feed.branch[1], norm(feed.branch[0], middle))
    if name == "peri_norm":
        first, second = (residual.branch for residual in module)
        middle = x + norm(first[2], attention(first[1], norm(first[0], x)))
        return middle + norm(second[2], mlp(second[1], norm(second[0], middle)))
    plain = name.startswith("pre_norm")  # with one part exchanged, perhaps
    if plain or name in ("sas_reparametrised", "value_skipinit", "outlier_protected"):
        first, second = module
        before = norm(first.branch[0], x)
        middle = first.skip * x + first.gain * attention(first.branch[1], before)
        if name == "outlier_protected":
            return second.skip * middle + second.gain * mlp(second.branch, middle)
        inner = mlp(second.branch[1], norm(second.branch[0], middle))
        return second.skip * middle + second.gain * inner
    if name == "post_norm":
        first, norm1, second, norm2 = module
        middle = norm(norm1, x + attention(first.branch, x))
        return norm(norm2, middle + mlp(second.branch, middle))
    if name == "parallel":
        normed = norm(module.branch[0], x)
        attend, feed = module.branch[1].branches
        return x + attention(attend, normed) + mlp(feed, normed)
    assert name in ("sas_p", "sas_p_no_norm")
    normed = norm(module[0], x)
    attend, feed = module[1].branches
    return attention(attend, normed) + feed.gain * mlp(feed.branch, normed)
