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


def through_softmax(p: Tensor, g: Any, h: Any, dim: int) -> Any:
    """H p² (1 − 2p) + p² Σ h p²  +  g p (1 − p)(1 − 2p) …, collected by the powers of p."""
    square, twist = p * p, 1 - 2 * p
    total = None
    if h is not None:
        inner = h * square
        total = torch.addcmul(inner * twist, square, inner.sum(dim, keepdim=True))
    if g is not None:
        # g p (1 − 2p) + p² Σ g p − p (1 − p) Σ g p
        inner = g * p
        bent = twist * (inner - p * inner.sum(dim, keepdim=True))
        total = bent if total is None else total.add_(bent)
    return total


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
