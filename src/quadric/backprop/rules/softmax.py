"""Softmax, log-softmax and their relatives, along one axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import rule
from quadric.backprop.saved import axes, axis, widened


@rule("SoftmaxBackward0", "SafeSoftmaxBackward0")
def softmax(node: Any, g: Any, h: Any) -> Any:
    """The probabilities of x."""
    return through_softmax(widened(node._saved_result), g, h, axis(node._saved_dim))


def through_softmax(p: Tensor, g: Any, h: Any, dim: int, slope: Any = None) -> Any:
    """(1 − 2p)(t − p G) + p² S with t = p (h p + g), G = Σ g p and S = Σ h p²; ``slope`` is G where it is known."""
    if g is None:
        t = (h * p).mul_(p)
        total = t.sum(dim, keepdim=True)
    else:
        if slope is None:
            slope = (g * p).sum(dim, keepdim=True)
        t = g * p if h is None else (h * p).add_(g).mul_(p)
        total = None if h is None else t.sum(dim, keepdim=True).sub_(slope)
        t.addcmul_(p, slope, value=-1)
    inner = t * -2 if total is None else (p * total).sub_(t, alpha=2)
    return t.addcmul_(p, inner)


@rule("LogSoftmaxBackward0")
def log_softmax(node: Any, g: Any, h: Any) -> Any:
    """H (1 − 2p) + p² Σ h − p (1 − p) Σ g."""
    dim = axis(node._saved_dim)
    p = widened(node._saved_result).exp()
    total = None
    if h is not None:
        total = torch.addcmul(h * (1 - 2 * p), p * p, h.sum(dim, keepdim=True))
    if g is not None:
        bent = (p * p - p).mul_(g.sum(dim, keepdim=True))
        total = bent if total is None else total.add_(bent)
    return total


@rule("LogsumexpBackward0")
def logsumexp(node: Any, g: Any, h: Any) -> Any:
    """Slope p, bend p (1 − p)."""
    x, result = widened(node._saved_self), widened(node._saved_result)
    dims: list[int] = [place % max(x.ndim, 1) for place in axes(node._saved_dim)]
    if not node._saved_keepdim:
        for place in sorted(dims):
            result = result.unsqueeze(place)
            g, h = (t if t is None else t.unsqueeze(place) for t in (g, h))
    p = (x - result).exp()
    total = p * p * h if h is not None else None
    bent = (p - p * p) * g if g is not None else None
    return total if bent is None else bent if total is None else total + bent
