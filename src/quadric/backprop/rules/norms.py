"""Normalisations: batch, layer, group, instance and root mean square."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import rule
from quadric.backprop.saved import axis, first, widened

Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def through_standardisation(
    x: Tensor, rstd: Tensor, g: Any, h: Any, dims: list[int], weight: Any, centred: bool = True
) -> tuple[Tensor, Any]:
    """Through y = weight · x̂ with x̂ = (input − mean) · rstd over ``dims``, N entries; ``x`` is x̂, g and h those of y.

    With G = weight · g and H = weight² · h it is rstd² (a + x̂ (b + x̂ c)), without the means where nothing is centred:

        a = (1 − 2/N) H + ΣH/N² − (1 − 1/N) ΣGx̂/N
        b = −(2/N) G + (2/N²) (ΣG + ΣHx̂)
        c = −(2/N) H + ΣHx̂²/N² + (3/N²) ΣGx̂

    Beside it comes h x̂², which the weight sums up.
    """
    n = math.prod(x.shape[axis] for axis in dims)
    weight = x.new_ones(()) if weight is None else weight
    square = weight * weight
    a: Any = 0.0
    b: Any = 0.0
    c: Any = 0.0
    hxx = None
    if h is not None:
        hx = h * x
        hxx = hx * x
        a = weighted_sum(h, square, dims) / n**2 if centred else a
        b = weighted_sum(hx, square, dims) * (2 / n**2) if centred else b
        c = weighted_sum(hxx, square, dims) / n**2
    if g is not None:
        gx = weighted_sum(g * x, weight, dims) / n
        a = a - gx * (1 - 1 / n if centred else 1.0)
        b = b + weighted_sum(g, weight, dims) * (2 / n**2) if centred else b
        c = c + gx * (3 / n)
    inner = c * x if h is None else torch.addcmul(c, h, square, value=-2 / n).mul_(x)
    if g is not None:
        inner.addcmul_(g, weight, value=-2 / n)
    inner.add_(b).mul_(x)
    if h is not None:
        inner.addcmul_(h, square, value=1 - 2 / n if centred else 1.0)
    return inner.add_(a).mul_(rstd * rstd), hxx


def weighted_sum(t: Tensor, weight: Tensor, dims: list[int]) -> Tensor:
    """Σ weight · t over ``dims``, which are kept; a weight that is constant along them waits until the end."""
    behind = [axis - t.ndim for axis in dims]
    if all(place < -weight.ndim or weight.shape[place] == 1 for place in behind):
        return t.sum(dims, keepdim=True) * weight
    if weight.ndim == 1 and behind == [-1]:
        return (t @ weight).unsqueeze(-1)
    return (t * weight).sum(dims, keepdim=True)


def of_affine(h: Any, hxx: Any, dims: list[int], weight: Any) -> tuple[Tensor | None, Tensor | None]:
    """What the weight gets, Σ h x̂², and the shift, Σ h, over ``dims``."""
    if h is None or weight is None:
        return None, None
    return (hxx.sum(dims), h.sum(dims)) if dims else (hxx, h)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(node: Any, g: Any, h: Any) -> Parts:
    """Over everything but the channels; with the running statistics in evaluation it only scales."""
    g, h = first(g), first(h)
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
    scale = None if weight is None else widened(weight).view(shape)
    if training:
        below, hxx = through_standardisation(standard, rstd, g, h, axes, scale)
    else:
        slope = rstd if scale is None else rstd * scale
        below, hxx = (None, None) if h is None else (h * (slope * slope), h * standard * standard)
    return below, *of_affine(h, hxx, axes, weight)


def eps_of(node: Any) -> float:
    """The small number under the root."""
    return node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon


@rule("NativeLayerNormBackward0")
def layer_norm(node: Any, g: Any, h: Any) -> Parts:
    """Over the last axes."""
    g, h = first(g), first(h)
    x, weight = widened(node._saved_input), node._saved_weight
    last = list(range(x.ndim - len(node._saved_normalized_shape), x.ndim))
    others = list(range(last[0]))
    rstd = node._saved_result2.to(x.dtype)
    standard = (x - node._saved_result1).mul_(rstd)
    scale = None if weight is None else widened(weight)
    below, hxx = through_standardisation(standard, rstd, g, h, last, scale)
    return below, *of_affine(h, hxx, others, weight)


@rule("NativeGroupNormBackward0")
def group_norm(node: Any, g: Any, h: Any) -> Parts:
    """Over the channels of a group and all places, for each example."""
    g, h = first(g), first(h)
    x, weight = widened(node._saved_input), node._saved_weight
    full = x.shape
    grouped = (node._saved_N, node._saved_group, node._saved_C // node._saved_group, node._saved_HxW)
    x = x.reshape(grouped)
    g, h = (None if t is None else t.reshape(grouped) for t in (g, h))
    mean, rstd = (s.to(x.dtype).view(*grouped[:2], 1, 1) for s in (node._saved_result1, node._saved_result2))
    standard = (x - mean).mul_(rstd)
    scale = None if weight is None else widened(weight).view(1, *grouped[1:3], 1)
    below, hxx = through_standardisation(standard, rstd, g, h, [2, 3], scale)
    of_weight, of_shift = of_affine(h, hxx, [0, 3], weight)
    if of_weight is not None and of_shift is not None:
        of_weight, of_shift = of_weight.flatten(), of_shift.flatten()
    return below.reshape(full), of_weight, of_shift


@rule("FusedRmsNormBackward0")
def rms_norm(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """Over the last axes, nothing centred."""
    g, h = first(g), first(h)
    x, weight = widened(node._saved_input), node._saved_weight
    last = list(range(x.ndim - len(node._saved_normalized_shape), x.ndim))
    rstd = node._saved_result1.to(x.dtype)
    standard = x * rstd
    scale = None if weight is None else widened(weight)
    below, hxx = through_standardisation(standard, rstd, g, h, last, scale, centred=False)
    return below, of_affine(h, hxx, list(range(last[0])), weight)[0]


@rule("WeightNormInterfaceBackward0")
def weight_norm(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor | None]:
    """Weights s v/‖v‖ for each slice along an axis, with u = v/‖v‖ and r = s/‖v‖.

    v gets r² (h (1 − 2u²) + u² Σhu²) + (r/‖v‖) ((3u² − 1) Σgu − 2gu), and s gets Σhu².
    """
    g, h = first(g), first(h)
    v, s, length = widened(node._saved_v), widened(node._saved_g), widened(node._saved_result1)
    kept = axis(node._saved_dim) % v.ndim
    others = [place for place in range(v.ndim) if place != kept]
    length = length.view(s.shape)
    u, ratio = v / length, s / length
    below, of_scale = torch.zeros_like(v), None
    if h is not None:
        of_scale = (h * u * u).sum(others, keepdim=True)
        below = ratio.square() * (h * (1 - 2 * u * u) + u * u * of_scale)
    if g is not None:
        gu = (g * u).sum(others, keepdim=True)
        below = below + ratio / length * ((3 * u * u - 1) * gu - 2 * g * u)
    return below, of_scale
