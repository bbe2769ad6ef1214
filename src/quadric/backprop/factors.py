"""The exact Hessian of softmax cross-entropy, carried one product further than its diagonal.

Behind a log-softmax the Hessian of each row is s (diag p − p pᵀ) with s = −Σ g. Through z = x Wᵀ its diagonal is
s [p (W∘W) − (p W)∘(p W)], where the rule of a product gives s (p − p²)(W∘W): with u = √s p the rest is
u²(W∘W) − (u W)∘(u W).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quadric.backprop.saved import axis, widened
from quadric.backprop.squares import square

__all__ = ["SoftmaxFactors"]

VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
LEFT = {"MmBackward0": 0, "AddmmBackward0": 1}  # the input that is multiplied by the weights


class SoftmaxFactors:
    """The u of rows on their way from a log-softmax to the product before it."""

    def __init__(self) -> None:
        self.waiting: dict[int, list[Tensor]] = {}  # by the node that takes them

    def follow(self, number: int, node: Any, edges: list[Any], g: Any, h: Any, below: tuple) -> tuple:
        """What a rule gave, corrected where a factor meets a product."""
        name, factors = node.name(), self.waiting.pop(number, [])
        if name == "LogSoftmaxBackward0" and h is None and g is not None and edges[0] is not None:
            p = widened(node._saved_result).exp()
            if axis(node._saved_dim) % p.ndim == p.ndim - 1:
                self._send(edges[0], [p * g.sum(-1, keepdim=True).neg().clamp_min(0).sqrt()])
        elif factors and name in VIEWS and edges[0] is not None:
            self._send(edges[0], [node(u) for u in factors])
        elif factors and name in LEFT and below[LEFT[name]] is not None:
            weight, alpha = widened(node._saved_mat2), getattr(node, "_saved_alpha", 1)
            corrected = below[LEFT[name]]
            for u in factors:
                whole = (u * u) @ square(weight, u).mT - (u @ weight.mT).square()
                corrected = corrected + (whole if alpha == 1 else whole * alpha**2)
            below = (*below[: LEFT[name]], corrected, *below[LEFT[name] + 1 :])
        return below

    def _send(self, edge: tuple[int, int], factors: list[Tensor]) -> None:
        self.waiting.setdefault(edge[0], []).extend(factors)
