"""Reductions and scans that are not mere sums: products, extremes, variances, norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import rule
from quadric.backprop.rules.elementwise import curved
from quadric.backprop.saved import axes, axis, first, widened


def spread(node: Any, x: Tensor, *values: Any) -> list[Any]:
    """Values of a reduction with the reduced axes put back, of length one."""
    dims = axes(getattr(node, "_saved_dim", None))
    if not dims or x.ndim == 0:
        return [None if v is None else v.reshape([1] * x.ndim) for v in values]
    if node._saved_keepdim:
        return list(values)
    out = []
    for value in values:
        for place in sorted(place % x.ndim for place in dims):
            value = None if value is None else value.unsqueeze(place)
        out.append(value)
    return out


@rule("AmaxBackward0", "AminBackward0", "MaxBackward1", "MinBackward1", "MedianBackward0", "NanmedianBackward0")
def extreme(node: Any, g: Any, h: Any) -> Tensor | None:
    """The gradient is shared evenly among n equal extremes: 1/n each."""
    if h is None:
        return None
    slope = node(torch.ones_like(h))
    return slope * node(h)


@rule("MaximumBackward0", "MinimumBackward0", "FmaxBackward0", "FminBackward0")
def larger(node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...] | None:
    """The larger of two; where they are equal each has slope ½."""
    if h is None:
        return None
    return tuple(None if s is None else s * s * h for s in node(torch.ones_like(h)))


@rule("VarBackward0", "VarMeanBackward0")
def variance(node: Any, g: Any, h: Any) -> Tensor:
    """Slope 2 (x − mean)/(N − c), bend 2 (1 − 1/N)/(N − c); the mean, where it is given too, has slope 1/N."""
    x = widened(node._saved_self)
    g = first(g)
    h, h_mean = h if type(h) is tuple else (h, None)
    g, h, h_mean = spread(node, x, g, h, h_mean)
    deviation, n, rest = deviations(node, x)
    below = torch.zeros_like(x)
    if h is not None:
        below = below + h * (2 / rest * deviation).square()
    if g is not None:
        below = below + g * (2 / rest * (1 - 1 / n))
    if h_mean is not None:
        below = below + h_mean / n**2
    return below


@rule("StdBackward0", "StdMeanBackward0")
def deviation(node: Any, g: Any, h: Any) -> Tensor:
    """Slope d/(s r), bend (1 − 1/N)/(s r) − d²/(s³ r²), with d = x − mean and r = N − c."""
    x = widened(node._saved_self)
    g = first(g)
    h, h_mean = h if type(h) is tuple else (h, None)
    result = node._saved_result if hasattr(node, "_saved_result") else node._saved_result0
    s, g, h, h_mean = spread(node, x, widened(result), g, h, h_mean)
    d, n, rest = deviations(node, x)
    slope = d / (s * rest)
    below = torch.zeros_like(x)
    if h is not None:
        below = below + h * slope.square()
    if g is not None:
        below = below + g * ((1 - 1 / n) / (s * rest) - slope.square() / s)
    if h_mean is not None:
        below = below + h_mean / n**2
    return below


def deviations(node: Any, x: Tensor) -> tuple[Tensor, int, float]:
    """X − its mean, the number N of entries it is over, and N − correction."""
    dims = axes(node._saved_dim) or list(range(x.ndim))
    mean = x.mean(dims, keepdim=True)
    n = x.numel() // max(mean.numel(), 1)
    correction = 1 if node._saved_correction is None else node._saved_correction
    return x - mean, n, n - correction


@rule("LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "NormBackward2", "NormBackward3")
def vector_norm(node: Any, g: Any, h: Any) -> Tensor:
    """(Σ|x|ᵖ)^(1/p) = r: slope s = sign(x) |x/r|^(p−1), bend (p − 1)(|x/r|^(p−2) − s²)/r."""
    x = widened(node._saved_self)
    p = node._saved_ord if hasattr(node, "_saved_ord") else node._saved_p
    p = 2.0 if p is None else float(p)
    r, g, h = spread(node, x, widened(node._saved_result), g, h)
    if p == 0 or math.isinf(p):
        slope = node(torch.ones_like(node._saved_result)) if p else None
        return torch.zeros_like(x) if h is None or slope is None else slope.square() * h
    return curved(h, *derivatives_of_norm(x, r, p, g))


def derivatives_of_norm(x: Tensor, r: Tensor, p: float, g: Any) -> tuple[Tensor, Any, Tensor]:
    """Slope up to its sign, g, and bend of r = (Σ|x|ᵖ)^(1/p); zero where r is."""
    ratio = torch.where(r == 0, 0.0, x.abs() / r)
    slope = torch.where(ratio == 0, 0.0, ratio ** (p - 1))
    if p == 1:
        return slope, g, torch.zeros_like(slope)
    curve = torch.ones_like(ratio) if p == 2 else ratio ** (p - 2)
    return slope, g, torch.where(r == 0, 0.0, (p - 1) * (curve - slope.square()) / r)


def through_distances(gaps: Tensor, r: Tensor, p: float, g: Any, h: Any) -> Tensor:
    """What arrives at differences whose norms along the last axis are the distances r."""
    r = r.unsqueeze(-1)
    g, h = (t if t is None else t.unsqueeze(-1) for t in (g, h))
    if p == 0:
        return torch.zeros_like(gaps)
    if math.isinf(p):
        return torch.zeros_like(gaps) if h is None else (gaps.abs() == r) * h
    return curved(h, *derivatives_of_norm(gaps, r, p, g))


@rule("CdistBackward0", "EuclideanDistBackward0")
def distances(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor]:
    """All distances between the rows of one matrix and those of another."""
    one, other = widened(node._saved_x1), widened(node._saved_x2)
    gaps = one.unsqueeze(-2) - other.unsqueeze(-3)
    below = through_distances(gaps, widened(node._saved_result), getattr(node, "_saved_p", 2.0), g, h)
    return below.sum(-2), below.sum(-3)


@rule("PdistBackward0")
def distances_within(node: Any, g: Any, h: Any) -> Tensor:
    """The distances between the rows of a matrix, each pair once."""
    x = widened(node._saved_self)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    below = through_distances(x[i] - x[j], widened(node._saved_result), node._saved_p, g, h)
    return torch.zeros_like(x).index_add_(0, i, below).index_add_(0, j, below)


@rule("ProdBackward0", "ProdBackward1")
def product(node: Any, g: Any, h: Any) -> Tensor | None:
    """Linear in each factor: the square of the product of all the others."""
    if h is None:
        return None
    slope = node(torch.ones_like(h))
    (h,) = spread(node, widened(node._saved_self), h)
    return slope.square() * h


@rule("CumprodBackward0")
def cumulative_product(node: Any, g: Any, h: Any) -> Tensor | None:
    """Linear in each factor, and its square is the cumulative product of the squares."""
    if h is None:
        return None
    x, y = widened(node._saved_self), widened(node._saved_result)
    return torch.ops.aten.cumprod_backward(h, x * x, axis(node._saved_dim), y * y)


@rule("LogcumsumexpBackward0")
def log_of_cumulative_sum(node: Any, g: Any, h: Any) -> Tensor:
    """Slope p = exp(x − y), bend p − p²."""
    x, y, dim = widened(node._saved_self), widened(node._saved_result), axis(node._saved_dim)

    def after(values: Tensor, power: int) -> Tensor:
        """Σ values · p**power over all later places, by logarithms of the positive values and of the negative."""
        logs = (torch.where(sign * values > 0, (sign * values).log(), -math.inf) - power * y for sign in (1, -1))
        above, below = (part.flip(dim).logcumsumexp(dim).flip(dim) + power * x for part in logs)
        return above.exp() - below.exp()

    if g is None:
        return after(h, 2)
    return after(g, 1) + after(-g if h is None else h - g, 2)
