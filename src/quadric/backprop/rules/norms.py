"""Normalisations: batch, layer, group, instance and root mean square."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from quadric.backprop.registry import rule
from quadric.backprop.saved import widened

Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def through_standardisation(x: Tensor, rstd: Tensor, g: Any, h: Any, dims: list[int], centred: bool = True) -> Tensor:
    """Through x̂ = (input − mean)·rstd over ``dims`` with N entries; ``x`` is x̂, g and h are those of x̂.

    r²[h(1 − 2/N − 2x̂²/N) + (Σh + 2x̂ Σhx̂ + x̂² Σhx̂²)/N²]
    + r²[−(2x̂/N)(g − Σg/N) + (3x̂²/N − (1 − 1/N)) Σ(g x̂)/N], and without the terms of the mean where nothing is centred.
    """
    n = math.prod(x.shape[axis] for axis in dims)
    square = x * x
    total = None
    if h is not None:
        hx = h * x
        if centred:
            total = h * ((1 - 2 / n) - square * (2 / n))
            total += h.sum(dims, keepdim=True) / n**2
            total += x * (hx.sum(dims, keepdim=True) * (2 / n**2))
        else:
            total = h * (1 - square * (2 / n))
        total.addcmul_(square, (hx * x).sum(dims, keepdim=True) / n**2)
    if g is not None:
        gx = (g * x).sum(dims, keepdim=True) / n
        mean = g.sum(dims, keepdim=True) / n if centred else 0.0
        bent = (x * (mean - g)).mul_(2 / n)
        bent += (square * (3 / n) - (1 - 1 / n if centred else 1.0)) * gx
        total = bent if total is None else total.add_(bent)
    return total.mul_(rstd * rstd)  # pyright: ignore[reportOptionalMemberAccess]


def scaled(weight: Tensor | None, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """G and h of x̂ from those of weight · x̂ + shift."""
    if weight is None:
        return g, h
    return None if g is None else g * weight, None if h is None else h * (weight * weight)


def of_affine(
    x: Tensor, h: Tensor | None, dims: list[int], weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """H of the weight, Σ h x̂², and of the shift, Σ h, over ``dims``."""
    if h is None or weight is None:
        return None, None
    return (h * x * x).sum(dims), h.sum(dims)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(node: Any, g: Any, h: Any) -> Parts:
    """Over everything but the channels; with the running statistics in evaluation it only scales."""
    g, h = (t[0] if type(t) is tuple else t for t in (g, h))
    training = getattr(node, "_saved_training", True)
    x = widened(node._saved_input)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    if training:
        mean, rstd = node._saved_result1, node._saved_result2
    else:
        mean, rstd = node._saved_running_mean, (node._saved_running_var + eps_of(node)).rsqrt()
    mean, rstd = mean.view(shape).to(x.dtype), rstd.view(shape).to(x.dtype)
    weight = node._saved_weight
    standard = (x - mean).mul_(rstd)
    of_weight, of_shift = of_affine(standard, h, axes, weight)
    g, h = scaled(None if weight is None else widened(weight).view(shape), g, h)
    if training:
        below = through_standardisation(standard, rstd, g, h, axes)
    else:
        below = None if h is None else h * (rstd * rstd)
    return below, of_weight, of_shift


def eps_of(node: Any) -> float:
    """The small number under the root."""
    return node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon


@rule("NativeLayerNormBackward0")
def layer_norm(node: Any, g: Any, h: Any) -> Parts:
    """Over the last axes."""
    g, h = (t[0] if type(t) is tuple else t for t in (g, h))
    x, weight = widened(node._saved_input), node._saved_weight
    last = list(range(x.ndim - len(node._saved_normalized_shape), x.ndim))
    first = list(range(last[0]))
    rstd = node._saved_result2.to(x.dtype)
    standard = (x - node._saved_result1).mul_(rstd)
    if not first:
        of_weight, of_shift = (None, None) if h is None else (h * standard * standard, h)
    else:
        of_weight, of_shift = of_affine(standard, h, first, weight)
    g, h = scaled(None if weight is None else widened(weight), g, h)
    return through_standardisation(standard, rstd, g, h, last), of_weight, of_shift


@rule("NativeGroupNormBackward0")
def group_norm(node: Any, g: Any, h: Any) -> Parts:
    """Over the channels of a group and all places, for each example."""
    g, h = (t[0] if type(t) is tuple else t for t in (g, h))
    x, weight = widened(node._saved_input), node._saved_weight
    full = x.shape
    grouped = (node._saved_N, node._saved_group, node._saved_C // node._saved_group, node._saved_HxW)
    x = x.reshape(grouped)
    g, h = (None if t is None else t.reshape(grouped) for t in (g, h))
    mean, rstd = (s.to(x.dtype).view(*grouped[:2], 1, 1) for s in (node._saved_result1, node._saved_result2))
    standard = (x - mean).mul_(rstd)
    of_weight, of_shift = of_affine(standard, h, [0, 3], weight)
    g, h = scaled(None if weight is None else widened(weight).view(1, *grouped[1:3], 1), g, h)
    below = through_standardisation(standard, rstd, g, h, [2, 3]).reshape(full)
    return below, None if of_weight is None else of_weight.flatten(), None if of_shift is None else of_shift.flatten()


@rule("FusedRmsNormBackward0")
def rms_norm(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """Over the last axes, nothing centred."""
    g, h = (t[0] if type(t) is tuple else t for t in (g, h))
    x, weight = widened(node._saved_input), node._saved_weight
    last = list(range(x.ndim - len(node._saved_normalized_shape), x.ndim))
    rstd = node._saved_result1.to(x.dtype)
    standard = x * rstd
    of_weight, _ = of_affine(standard, h, list(range(last[0])), weight)
    g, h = scaled(None if weight is None else widened(weight), g, h)
    return through_standardisation(standard, rstd, g, h, last, centred=False), of_weight
