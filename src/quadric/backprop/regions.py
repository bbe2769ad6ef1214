"""Regions: elementwise operations that start from one tensor and end in one, where h adds up wrongly on the way.

In x · σ(x), x · x or a GELU written by hand, one tensor is used several times and the uses meet again, entry by entry.
Passed one operation at a time, h would lose the products of the paths. Such a region is one elementwise function: its
f′ is the backward of its operations applied to ones, its f″ comes from a double backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from quadric.backprop.registry import RULES, Entry, Rule
from quadric.backprop.rules.movement import overloads

__all__ = ["ELEMENTWISE", "Region", "find_region"]

LONGEST = 32  # operations looked at behind one that could end a region
Edge = tuple[int, int]

ELEMENTWISE = frozenset(
    {name for name, entry in RULES.items() if entry.family == "elementwise"}
    - {"GluBackward0", "PreluKernelBackward0", "torch::autograd::CopySlices"}
    | set(overloads("Add", "Addcdiv", "Addcmul", "Clamp", "ClampMax", "ClampMin", "Clone", "Hardsigmoid", "Hardtanh"))
    | {"BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0"}
    | set(overloads("LeakyRelu", "Lerp", "MaskedFill", "Mul", "Neg", "Relu", "Rsub", "Sub", "Threshold", "Where"))
)


@dataclass(frozen=True)
class Region:
    """Operations between one tensor and one that is computed from it entry by entry.

    Args:
        nodes: their numbers, the last operation first, each behind its users.
        source: the tensor that they start from.
    """

    nodes: list[int]
    source: Edge

    def entry(self, nodes: list[Any], edges: list[list[Edge | None]]) -> Entry:
        """The rule of the region as a whole, to stand in for that of its last operation."""
        steps = [(nodes[number], edges[number]) for number in self.nodes]
        source = GradientEdge(nodes[self.source[0]], self.source[1])
        return Entry(rule_of(self.nodes, steps, self.source, source), "regions")


def rule_of(numbers: list[int], steps: list[tuple[Any, list]], end: Edge, source: GradientEdge) -> Rule:
    """H of the source from g and h of the last operation."""

    def backward(g: Tensor) -> Tensor:
        arrived: dict[Edge, Tensor] = {(numbers[0], 0): g}
        for number, (node, edges) in zip(numbers, steps, strict=True):
            below = node(arrived.pop((number, 0)).to(node._input_metadata[0].dtype))  # as autograd converts it
            for edge, part in zip(edges, below if type(below) is tuple else (below,), strict=True):
                if edge is not None and part is not None:
                    arrived[edge] = arrived[edge] + part if edge in arrived else part
        return arrived[end]

    def through_region(_: Any, g: Any, h: Any) -> Tensor:
        known = g if h is None else h
        slope = backward(torch.ones_like(known)).to(known.dtype)
        below = None if h is None else h * slope.square()
        if g is None:
            return below  # pyright: ignore[reportReturnType]
        with torch.enable_grad():
            total = backward(g.clone().requires_grad_()).sum()
        (bent,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
        if bent is None:
            return torch.zeros_like(slope) if below is None else below
        bent = bent.to(known.dtype)
        return bent if below is None else below + bent

    return through_region


def find_region(
    last: int, nodes: list[Any], edges: list[list[Edge | None]], users: list[list[int]], kept: set[int]
) -> Region | None:
    """The region that ends with an operation, if there is one.

    Args:
        last: the number of the operation.
        nodes: all nodes.
        edges: for each node, the outputs that it takes.
        users: for each node, the nodes that take its outputs.
        kept: nodes that no region may swallow.
    """
    inside = [last]
    frontier = {edge for edge in edges[last] if edge is not None}
    shape = nodes[last]._input_metadata[0].shape
    while len(frontier) > 1 and len(inside) < LONGEST:
        latest = max(frontier, key=lambda edge: order_of(nodes[edge[0]]))
        number = latest[0]
        if number in kept or not swallowable(nodes[number], shape) or not set(users[number]) <= set(inside):
            return None
        inside.append(number)
        frontier.remove(latest)
        frontier.update(edge for edge in edges[number] if edge is not None)
    if len(frontier) != 1:
        return None
    (source,) = frontier
    below = nodes[source[0]]
    found = below.variable.shape if hasattr(below, "variable") else below._input_metadata[source[1]].shape
    return Region(inside, source) if list(found) == shape else None


def order_of(node: Any) -> int:
    """When an operation ran; leaves come before all of them."""
    return -1 if hasattr(node, "variable") else node._sequence_nr()


def swallowable(node: Any, shape: list[int]) -> bool:
    """Whether an operation works entry by entry and gives one tensor of a shape."""
    return node.name() in ELEMENTWISE and len(node._input_metadata) == 1 and node._input_metadata[0].shape == shape
