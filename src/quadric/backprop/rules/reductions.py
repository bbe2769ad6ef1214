"""Reductions and scans that are not mere sums: products, extremes, variances, norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import rule
from quadric.backprop.saved import axes, widened


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
    g = g[0] if type(g) is tuple else g
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
    g = g[0] if type(g) is tuple else g
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
    like = h if h is not None else g
    if p in (0.0, 1.0, float("inf"), float("-inf")):
        slope = node(torch.ones_like(node._saved_result))
        return torch.zeros_like(x) if h is None else slope.square() * h
    ratio = torch.where(r == 0, 0.0, x.abs() / r)
    slope = torch.where(ratio == 0, 0.0, ratio ** (p - 1))
    below = torch.zeros_like(x * like)
    if h is not None:
        below = below + h * slope.square()
    if g is not None:
        curve = torch.ones_like(ratio) if p == 2 else ratio ** (p - 2)
        below = below + torch.where(r == 0, 0.0, g * (p - 1) * (curve - slope.square()) / r)
    return below


@rule("ProdBackward0", "ProdBackward1")
def product(node: Any, g: Any, h: Any) -> Tensor | None:
    """Linear in each factor: the square of the product of all the others."""
    if h is None:
        return None
    slope = node(torch.ones_like(h))
    (h,) = spread(node, widened(node._saved_self), h)
    return slope.square() * h
