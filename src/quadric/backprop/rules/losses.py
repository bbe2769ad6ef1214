"""The losses of torch.nn, with their exact diagonals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quadric.backprop.registry import linear, rule
from quadric.backprop.rules.elementwise import curved
from quadric.backprop.rules.movement import overloads
from quadric.backprop.saved import first, widened

MEAN = 1  # torch's number for reduction="mean"


def share(node: Any, count: int) -> float:
    """What one element's loss weighs in the result."""
    return 1 / count if node._saved_reduction == MEAN else 1.0


@linear(*overloads("NllLoss", "NllLoss2D"))
def negative_log_likelihood(node: Any, h: Any) -> Tensor:
    """Linear, with one weight for each row: backward gives it, and it times h."""
    h = first(h)
    return node(torch.ones_like(h)) * node(h)


@rule("MseLossBackward0")
def mean_squared_error(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor]:
    """(x − y)²: slope 2 (x − y), bend 2."""
    gap = widened(node._saved_self) - widened(node._saved_target)
    c = share(node, gap.numel())
    below = curved(h, 2 * c * gap, g, torch.full_like(gap, 2 * c))
    return below, below


@rule("HuberLossBackward0")
def huber(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor]:
    """Bend 1 within δ of the target."""
    gap, delta = widened(node._saved_self) - widened(node._saved_target), node._saved_delta
    c = share(node, gap.numel())
    below = curved(h, gap.clamp(-delta, delta) * c, g, (gap.abs() <= delta).to(gap) * c)
    return below, below


@rule("SmoothL1LossBackward0")
def smooth_l1(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor]:
    """Bend 1/β within β of the target."""
    gap, beta = widened(node._saved_self) - widened(node._saved_target), node._saved_beta
    c = share(node, gap.numel())
    if beta == 0:
        below = curved(h, gap.sign() * c, g, torch.zeros_like(gap))
    else:
        below = curved(h, (gap / beta).clamp(-1, 1) * c, g, (gap.abs() < beta).to(gap) * (c / beta))
    return below, below


@rule("BinaryCrossEntropyBackward0")
def binary_cross_entropy(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor | None]:
    """−y ln x − (1 − y) ln(1 − x); linear in the target."""
    x, y = widened(node._saved_self), widened(node._saved_target)
    weight = 1.0 if node._saved_weight is None else node._saved_weight
    c = share(node, x.numel()) * weight
    slope = c * (x - y) / (x * (1 - x)).clamp_min(1e-12)
    bend = c * (y / x.square() + (1 - y) / (1 - x).square())
    of_target = None if h is None else h * (c * (torch.log1p(-x).clamp_min(-100) - x.log().clamp_min(-100))).square()
    return curved(h, slope, g, bend), of_target


@rule("BinaryCrossEntropyWithLogitsBackward0")
def binary_cross_entropy_with_logits(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor | None]:
    """Bend s (1 − s), times 1 + (w − 1) y for a weight w of the positive class."""
    x, y = widened(node._saved_self), widened(node._saved_target)
    s = torch.sigmoid(x)
    positive = 1.0 if node._saved_pos_weight is None else node._saved_pos_weight
    weight = 1.0 if node._saved_weight is None else node._saved_weight
    c = share(node, x.numel()) * weight
    mass = 1 + (positive - 1) * y
    below = curved(h, c * (mass * s - positive * y), g, c * mass * s * (1 - s))
    if h is None:
        return below, None
    log_sigmoid = torch.nn.functional.logsigmoid
    return below, h * (c * (log_sigmoid(-x) - positive * log_sigmoid(x))).square()


@rule("SoftMarginLossBackward0")
def soft_margin(node: Any, g: Any, h: Any) -> Tensor:
    """ln(1 + exp(−y x))."""
    x, y = widened(node._saved_self), node._saved_target
    s, c = torch.sigmoid(-y * x), share(node, x.numel())
    return curved(h, -c * y * s, g, c * y * y * s * (1 - s))


@linear("MultilabelMarginLossBackward0")
def multilabel_margin(node: Any, h: Tensor) -> Tensor:
    """Made of straight pieces; an entry reaches the loss of its row only."""
    return node(torch.ones_like(h)) * node(h)


@rule("MultiMarginLossBackward0")
def multi_margin(node: Any, g: Any, h: Any) -> Tensor:
    """Σ w max(0, margin − x_y + x_j)ᵖ / C over the wrong classes j of each row: bent where p = 2."""
    below = torch.zeros_like(node._saved_self) if h is None else node(torch.ones_like(h)) * node(h)
    if g is None or node._saved_p == 1:
        return below
    x, label = widened(node._saved_self), node._saved_target.unsqueeze(-1)
    active = (node._saved_margin - x.gather(-1, label) + x > 0).to(x).scatter(-1, label, 0.0)
    active = active.scatter(-1, label, active.sum(-1, keepdim=True))
    weight = 1.0 if node._saved_weight is None else node._saved_weight[label]
    scale = 2 * share(node, label.numel()) / x.shape[-1]
    return below + scale * weight * active * (g if g.ndim == 0 else g.unsqueeze(-1))


@rule(
    "CtcLossBackward0",
    "CtcLossBackward1",
    exact=False,
    note="as if its input came out of a log-softmax, as backward does",
)
def connectionist_temporal_classification(node: Any, g: Any, h: Any) -> Tensor:
    """For probabilities p of the network and q given the labels: slope p − q, bend p (1 − p) − q (1 − q)."""
    slope = node(torch.ones_like(g if h is None else h))
    p = widened(node._saved_log_probs).exp()
    q = p - slope
    return curved(
        None if h is None else h.unsqueeze(-1), slope, None if g is None else g.unsqueeze(-1), p - p * p - q + q * q
    )
