"""The route: what lies between a loss and the tensors whose h is wanted, and how h passes each node of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from quadric.backprop import rules as _families  # noqa: F401  (importing them registers them)
from quadric.backprop.fallbacks import FALLBACKS
from quadric.backprop.refusals import HIDING, unsupported
from quadric.backprop.regions import ELEMENTWISE, find_region
from quadric.backprop.registry import Entry, find_rule
from quadric.backprop.saved import checkpoints

__all__ = ["Edge", "Route", "ancestors"]

Edge = tuple[int, int]  # a node by its number, and which of its outputs

LEAF = "torch::autograd::AccumulateGrad"


class Route:
    """Nodes of an autograd graph by number, the loss's first.

    Args:
        loss: a scalar with a graph.
        targets: tensors of the graph, leaves or not.
        fallback: what to do at a node without a rule: None raises, otherwise a key of ``FALLBACKS``.

    Raises:
        UnsupportedOperation: if h cannot be carried through a node on the way to a target.
    """

    def __init__(self, loss: Tensor, targets: Sequence[Tensor], fallback: str | None):
        self.root = loss.output_nr  # which output of the first node the loss is
        self.nodes, self.edges, self.users = graph_of(loss)
        self.leaf: dict[int, int] = {}  # the target of a node that accumulates a leaf's gradient
        self.inner: dict[int, dict[int, int]] = {}  # the targets of any other node, by its outputs
        self.rules: dict[int, Entry] = {}  # of the nodes that h passes
        self.outputs: dict[int, Any] = {}  # shape, type and device of what these nodes gave
        self.checkpointed: dict[int, list[Any]] = {}  # what stands in for tensors that a node did not keep
        self._find_targets(targets)
        ends = {*self.leaf, *self.inner}
        passed = ancestors(ends, self.users)
        for node in self.nodes:
            if node.name() in HIDING:
                raise unsupported(node, targets)
        for number in passed:
            self._find_rule(number, targets, fallback, passed | ends)
        self._join_regions(ends)

    def _find_targets(self, targets: Sequence[Tensor]) -> None:
        leaves = {id(target): place for place, target in enumerate(targets) if target.is_leaf}
        reused = set()
        for number, node in enumerate(self.nodes):
            if not self.edges[number] and node.name() == LEAF and id(node.variable) in leaves:
                self.leaf[number] = leaves[id(node.variable)]
                if len(self.users[number]) > 1:
                    reused.add(node.variable.data_ptr())
        self.reused = frozenset(reused)  # addresses of the leaves with several users
        if len(leaves) < len(targets):
            numbers = {node: number for number, node in enumerate(self.nodes)}
            for place, target in enumerate(targets):
                if target.grad_fn in numbers:
                    self.inner.setdefault(numbers[target.grad_fn], {})[target.output_nr] = place

    def _find_rule(self, number: int, targets: Sequence[Tensor], fallback: str | None, needed: set[int]) -> None:
        node = self.nodes[number]
        entry = find_rule(node) or FALLBACKS.get(fallback or "")
        if entry is None:
            raise unsupported(node, targets)
        self.outputs[number] = node._input_metadata
        if any(output.dtype.is_complex for output in self.outputs[number]):
            raise unsupported(node, targets, "complex numbers have no rules: compute with real ones")
        self.rules[number] = entry
        self.edges[number] = [edge if edge is not None and edge[0] in needed else None for edge in self.edges[number]]
        if holders := checkpoints(node):
            self.checkpointed[number] = holders

    def _join_regions(self, ends: set[int]) -> None:
        meets = [n for n in self.rules if sum(edge is not None for edge in self.edges[n]) > 1]
        # What a checkpoint computes again has no graph behind it, and so no second derivatives.
        meets = [n for n in meets if self.nodes[n].name() in ELEMENTWISE and n not in self.checkpointed]
        kept = ends | self.checkpointed.keys()
        for number in sorted(meets, key=lambda n: -self.nodes[n]._sequence_nr()):  # the latest first
            region = find_region(number, self.nodes, self.edges, self.users, kept) if number in self.rules else None
            if region is not None:
                self.rules[number] = region.entry(self.nodes, self.edges)
                self.edges[number] = [region.source]
                for inside in region.nodes[1:]:
                    del self.rules[inside]

    def clear(self) -> None:
        """Let go of the graph."""
        for part in (self.nodes, self.edges, self.users, self.leaf, self.inner, self.rules, self.checkpointed):
            part.clear()


def graph_of(loss: Tensor) -> tuple[list[Any], list[list[Edge | None]], list[list[int]]]:
    """The nodes behind a loss, for each what its inputs are outputs of, and for each who uses it."""
    nodes: list[Any] = [loss.grad_fn] if loss.grad_fn is not None else []
    edges: list[list[Edge | None]] = []
    users: list[list[int]] = [[]]
    numbers: dict[Any, int] = {loss.grad_fn: 0}
    for number, node in enumerate(nodes):  # grows as it is read
        below: list[Edge | None] = []
        for other, output in node.next_functions:
            if other is None:
                below.append(None)
                continue
            place = numbers.get(other)
            if place is None:
                place = numbers[other] = len(nodes)
                nodes.append(other)
                users.append([])
            users[place].append(number)
            below.append((place, output))
        edges.append(below)
    return nodes, edges, users


def ancestors(ends: Iterable[int], users: list[list[int]]) -> set[int]:
    """All nodes that are computed, directly or not, from one of ``ends``."""
    found: set[int] = set()
    waiting = list(ends)
    while waiting:
        for user in users[waiting.pop()]:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found
