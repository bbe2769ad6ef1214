"""The walk: h beside g through the autograd graph of a loss, while autograd runs its own backward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge

from quadric.backprop.factors import SoftmaxFactors
from quadric.backprop.refusals import check_finite, check_loss, check_targets
from quadric.backprop.registry import Entry
from quadric.backprop.route import Edge, Route, ancestors
from quadric.backprop.sampling import RowBlock, check_fraction
from quadric.backprop.saved import raw_names, rereadable, widened
from quadric.backprop.squares import keeping

__all__ = ["Walk", "hessian_diagonal"]

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class Walk:
    """Hooks on the graph of a loss that carry h to chosen tensors during the next backward.

    A hook fires before its node, when every user of the node has delivered: it takes the h that has arrived and the g
    that autograd hands over, and delivers h to the inputs of the node. Hooks know the walk by a weak reference, so that
    dropping the walk frees the graph. As a context it cleans up at the end, whatever happens.

    Args:
        loss: a real scalar with a graph.
        targets: tensors whose h is wanted, leaves or not.
        gauss_newton: leave out the second derivatives of everything below the first curved operation.
        fallback: what to do at a node without a rule: None raises, otherwise a key of ``FALLBACKS``.
        dtype: what h is carried and multiplied in; None for that of g, and float32 where g has half precision.
        fraction: the share of the rows of the loss whose second derivatives are carried, scaled by its inverse.
        exact_softmax: carry the whole Hessian of a softmax cross-entropy through the product before it.
        seed: what the backward starts from that h shall ride along with; None for the next one, whatever that be.
        take: called with the number of a leaf among ``targets``, a part of its h as soon as there is one, and the
            multiple of the loss that it belongs to; by default the parts are added up in ``diagonals``.

    Raises:
        ValueError: if the loss is not a scalar with a graph, or an argument is out of range.
        UnsupportedOperation: if h cannot be carried through a node on the way to a target.
    """

    def __init__(
        self,
        loss: Tensor,
        targets: Sequence[Tensor],
        *,
        gauss_newton: bool = False,
        fallback: str | None = None,
        dtype: torch.dtype | None = None,
        fraction: float = 1.0,
        exact_softmax: bool = False,
        seed: Tensor | None = None,
        take: Callable[[int, Tensor, Tensor | None], None] | None = None,
    ):
        check_loss(loss, fallback, dtype)
        check_fraction(fraction)
        self.gauss_newton, self.dtype = gauss_newton, dtype
        self.block = RowBlock(fraction) if fraction < 1 else None
        self.factors = SoftmaxFactors() if exact_softmax else None
        self.shapes = [target.shape for target in targets]
        self.diagonals: list[Tensor | None] = [None] * len(targets)
        self.take, self.seed = take, seed
        self.whole = False  # whether the loss itself will be differentiated, and no multiple of it
        self.multiple: Tensor | None = None  # of the loss that is differentiated
        self.begun: int | None = None  # the pass of autograd that h rides along with
        self.unseen: set[int] = set()  # nodes at which that backward stopped
        self.later: set[int] = set()  # nodes to be passed when it is over
        self.deferred: list[int] = []  # those of them that are ready
        self.lock = threading.Lock()  # autograd runs a thread for each device
        self.squares: dict[tuple, Tensor] = {}
        self.handles: list[Any] = []
        self.rivals: list[weakref.ref[Walk]] = []
        self.route = Route(loss, targets, fallback)
        self.arrived: list[dict[int, Tensor]] = [{} for _ in self.route.nodes]
        self.missing = [0] * len(self.route.nodes)  # deliveries that a node still waits for
        for number in self.route.rules:
            for edge in self.route.edges[number]:
                if edge is not None:
                    self.missing[edge[0]] += 1
        me: weakref.ref[Walk] = weakref.ref(self)
        for number in {number for number, entry in self.route.rules.items() if not entry.linear or not number}:
            self.handles.append(self.route.nodes[number].register_prehook(hook_of(me, number)))

    # During backward.

    def visit(self, number: int, gradients: tuple[Tensor | None, ...]) -> None:
        """Take the g of a node, and deliver h to its inputs and on through all that needs no g."""
        task = torch._C._current_graph_task_id()
        if self.begun is None and number == 0:
            self._begin(task, gradients)
        if task != self.begun:
            return  # another backward over a graph that both share
        self.unseen.discard(number)
        try:
            self._pass(number, gradients)
        except BaseException:
            self.close()
            raise

    def _begin(self, task: int, gradients: tuple[Tensor | None, ...]) -> None:
        if self.seed is not None:
            if gradients[self.route.root] is self.seed:  # otherwise another thread's backward over the same graph
                self.begun = task
            return
        self.begun = task
        self.multiple = None if self.whole else gradients[self.route.root]
        if any(rival is not None and rival.begun == task for rival in (ref() for ref in self.rivals)):
            self.close()
            raise RuntimeError(
                "two attached losses that share a part of their graph were differentiated together: attach their sum"
            )
        Variable._execution_engine.queue_callback(self.close)

    def keep_apart(self, others: Iterable[Walk]) -> None:
        """Refuse to ride along with the same backward as another walk over a part of the same graph.

        There, g is that of both losses together, and neither's h could be told.
        """
        mine = {self.route.nodes[number] for number in self.route.rules}
        for other in others:
            if any(other.route.nodes[number] in mine for number in other.route.rules if other.route.nodes):
                self.rivals.append(weakref.ref(other))
                other.rivals.append(weakref.ref(self))  # either may begin first

    def _pass(self, number: int, gradients: tuple[Tensor | None, ...] | None) -> None:
        if self.route.reused:
            with keeping(self.route.reused, self.squares):
                self._follow(number, gradients)
        else:
            self._follow(number, gradients)

    def _follow(self, number: int, gradients: tuple[Tensor | None, ...] | None) -> None:
        edges, ready = self.route.edges, [number]
        while ready:
            here = ready.pop()
            if here in self.later:
                self.deferred.append(here)
                continue
            self._capture(here)
            entry = self.route.rules.get(here)
            if entry is None:
                continue
            below = self._apply(here, entry, gradients if here == number else None)
            for place, edge in enumerate(edges[here]):
                if edge is not None and self._deliver(edge, None if below is None else below[place]):
                    ready.append(edge[0])

    def _apply(
        self, number: int, entry: Entry, gradients: tuple[Tensor | None, ...] | None
    ) -> tuple[Tensor | None, ...] | None:
        """The h of the inputs of a node, whose g may be given."""
        g, h = self._at(number, entry, gradients)
        if g is None and h is None:
            return None
        node = self.route.nodes[number]
        rule = partial(self._written_out, entry) if entry.expands else entry.rule
        if self.block is not None:
            rule = partial(self.block.apply, rule)
        if number in self.route.checkpointed:
            with rereadable(self.route.checkpointed[number]):
                below: Any = rule(node, g, h)
        else:
            below = rule(node, g, h)
        if below is None:
            return None
        below = below if type(below) is tuple else (below,)
        if len(below) != len(self.route.edges[number]):
            raise ValueError(
                f"the rule of {node.name()} returned {len(below)} tensors for {len(node.next_functions)} inputs: "
                "return one for each of node.next_functions, None where there is none"
            )
        return (
            below if self.factors is None else self.factors.follow(number, node, self.route.edges[number], g, h, below)
        )

    def _at(self, number: int, entry: Entry, gradients: tuple[Tensor | None, ...] | None) -> tuple[Any, Any]:
        """The g and h at the outputs of a node, each None where there is none or the rule has no use for it."""
        arrived, self.arrived[number] = self.arrived[number], {}
        expected = self.route.outputs[number]
        # A type of one's own is for products; other kernels want h in that of what they saved.
        own = self.dtype is not None and entry.family != "products"
        own = own and (not entry.linear or bool(raw_names(type(self.route.nodes[number]))))
        for output, h in arrived.items():
            if list(h.shape) != expected[output].shape:  # a rule may leave it to us to sum over what was broadcast
                arrived[output] = h = h.sum_to_size(expected[output].shape)
            if own:
                dtype = expected[output].dtype
                arrived[output] = self._converted(h, WIDER.get(dtype, dtype))
        if gradients is None or entry.linear or (self.gauss_newton and arrived):
            gradients = (None,) * len(expected)
        parts = [part if part is None else widened(part) for part in gradients]
        if self.block is not None:
            parts = [self.block.cut(part) for part in parts]
        if len(expected) == 1:
            return parts[0], arrived.get(0)
        g = tuple(parts) if any(part is not None for part in parts) else None
        return g, tuple(arrived.get(output) for output in range(len(expected))) if arrived else None

    def _written_out(self, entry: Entry, node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...]:
        """Through a fused operation: y is computed again, and g y + h (y − its value)²/2 is a loss with its g and h."""
        count = len(node._input_metadata)
        every = [part if type(part) is tuple else (part,) * count for part in (g, h)]
        with torch.enable_grad():
            outputs, inputs = entry.rule(node)
            slopes = [y * a for y, a in zip(outputs, every[0], strict=True) if a is not None]
            bends = [(y - y.detach()) ** 2 * b / 2 for y, b in zip(outputs, every[1], strict=True) if b is not None]
            loss = torch.stack([term.sum() for term in slopes + bends]).sum()
        wanted = [x for x in inputs if x is not None]
        found = iter(hessian_diagonal(loss, wanted, gauss_newton=self.gauss_newton, dtype=self.dtype))
        return tuple(None if x is None else next(found) for x in inputs)

    def _deliver(self, edge: Edge, h: Tensor | None) -> bool:
        """Hand h to an input; whether that was the last it waited for and it can be passed without its g."""
        number, output = edge
        target = self.route.leaf.get(number)
        with self.lock:
            if target is None:
                if h is not None:
                    self._arrive(number, output, self._converted(h, self.dtype))
                self.missing[number] -= 1
                return not self.missing[number] and number in self.route.rules and self.route.rules[number].linear
            if h is not None:
                h = h if h.layout == torch.strided else h.to_dense()
                if h.shape != self.shapes[target]:
                    h = self._converted(h, None).sum_to_size(self.shapes[target])
                if self.take is not None:
                    self.take(target, h, self.multiple)
                else:
                    before, h = self.diagonals[target], self._converted(h, None)
                    self.diagonals[target] = h if before is None else before + h
            return False

    def _converted(self, h: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or WIDER.get(h.dtype, h.dtype)
        return h if h.dtype == dtype else h.to(dtype)

    def _arrive(self, number: int, output: int, h: Tensor) -> None:
        before = self.arrived[number].get(output)
        if before is not None:
            if before.shape != h.shape:
                shape = self.route.nodes[number]._input_metadata[output].shape
                before, h = before.sum_to_size(shape), h.sum_to_size(shape)
            h = before + h
        self.arrived[number][output] = h

    def _capture(self, number: int) -> None:
        for output, target in self.route.inner.get(number, {}).items():
            if output in self.arrived[number]:
                self.diagonals[target] = self.arrived[number][output]

    # With a backward of its own, which forms no gradient of a target.

    def run(self, loss: Tensor, retain_graph: bool | None) -> None:
        """Let autograd go only as deep as some rule needs g.

        The gradients of weights are needed nowhere: that saves one product in three of a backward.
        """
        curved = {number for number, entry in self.route.rules.items() if not entry.linear}
        above, asked = ancestors(curved, self.route.users), set()
        while True:
            # Under autograd a node computes what is asked for alone: we ask for all but what costs a product.
            asked = (curved - above) | {
                edge[0]
                for number in above & self.route.rules.keys()
                for edge in self.route.edges[number]
                if edge is not None and edge[0] not in above and self.route.rules[number].family != "products"
            }
            more = ancestors(asked, self.route.users) - above
            if not more:
                break
            above |= more
        last = curved - above
        self.unseen = set(last)
        self.later = self.route.rules.keys() - curved - above
        outputs = [(n, k) for n in asked for k in range(len(self.route.nodes[n]._input_metadata))]
        stops = [(n, GradientEdge(self.route.nodes[n], k)) for n, k in outputs]
        gradients: dict[int, list[Tensor | None]] = {number: [] for number in last}
        if stops:
            edges = [edge for _, edge in stops]
            found = torch.autograd.grad(loss, edges, self.seed, retain_graph=retain_graph, allow_unused=True)
            for (number, _), gradient in zip(stops, found, strict=True):
                if number in gradients:
                    gradients[number].append(gradient)
        with torch.no_grad():
            if self.route.rules and not stops:
                self.deferred.append(0)
            for number in self.unseen:
                self._pass(number, tuple(gradients[number]))
            self.later = set()
            for number in self.deferred:
                self._pass(number, None)

    # After backward.

    def close(self) -> None:
        """Remove every hook and let go of the graph."""
        for handle in self.handles:
            handle.remove()
        for number in self.route.inner:
            self._capture(number)  # autograd stops above a tensor below which it has nothing to do
        self.route.clear()
        self.handles, self.arrived, self.squares, self.take = [], [], {}, None

    def finished(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """The h of each target, in its shape, and zeros where none arrived."""
        return [
            torch.zeros_like(target, dtype=WIDER.get(target.dtype)) if h is None
            else self._converted(
                h if h.shape == target.shape else h.sum_to_size(target.shape), WIDER.get(target.dtype, target.dtype)
            ).contiguous()
            for h, target in zip(self.diagonals, targets, strict=True)
        ]  # fmt: skip

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hook_of(walk: weakref.ref[Walk], number: int) -> Callable[[tuple[Tensor | None, ...]], None]:
    """What autograd calls before a node."""

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        alive = walk()
        if alive is None:
            return
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                alive.visit(number, gradients)
        else:
            alive.visit(number, gradients)

    return hook


def hessian_diagonal(
    loss: Tensor,
    params: Iterable[Tensor] | Tensor,
    *,
    gauss_newton: bool = False,
    fallback: str | None = None,
    retain_graph: bool | None = None,
    dtype: torch.dtype | None = None,
    fraction: float = 1.0,
    exact_softmax: bool = False,
) -> tuple[Tensor, ...]:
    r"""The diagonal of a loss's Hessian by HesScale, for any eager network; compare ``torch.autograd.grad``.

    .. math::
        h_x[i] = \sum_k \Big(\frac{\partial y_k}{\partial x_i}\Big)^2 h_y[k]
                 + \sum_k g_y[k]\, \frac{\partial^2 y_k}{\partial x_i^2}

    at every node y = f(x) of the graph, from the loss (g = 1, h = 0) back; where x is used several times the
    contributions add. Off-diagonal terms of the Hessian with respect to y are left out. The last layer is exact.

    Cost: forward, and for each of its products three more, two of them with squares: about 4/3 of the time of forward
    and backward. No gradient of a parameter is formed.

    Args:
        loss: a real scalar that still has its graph.
        params: tensors of the graph, leaves or not; all of them require gradients.
        gauss_newton: leave out the second sum everywhere below the first curved operation, which the loss ends with:
            the diagonal of a Gauss–Newton matrix, never negative for a convex loss.
        fallback: what to do at an operation without a rule: ``"gauss_newton"`` estimates the first sum with one random
            vector and leaves out the second, ``"zero"`` leaves out both, None raises.
        retain_graph: keep the graph for another backward.
        dtype: what h is carried and multiplied in, such as ``torch.bfloat16``; sums over a parameter's uses stay in
            float32. None takes that of the gradient, and float32 where it has half precision.
        fraction: 1 over a whole number: h of a random block with that share of the rows of the loss, scaled by its
            inverse, which is unbiased. It saves time where examples do not mix, as they do in batch normalisation.
        exact_softmax: carry the whole Hessian of a softmax cross-entropy, and not its diagonal alone, through the
            linear layer before it, so that the inputs of that layer are exact too: two more products of that layer.

    Returns:
        One tensor for each of ``params``, of its shape; zeros where the loss does not depend on it.

    Raises:
        ValueError: if the loss is not a real scalar with a graph, or a parameter does not require gradients.
        UnsupportedOperation: if there is no rule for an operation between the loss and ``params``; nothing is changed.

    Example:
        L = (w x − 2)² / 2 with x = 3 has the second derivative x² = 9.

        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> loss = ((w * 3 - 2) ** 2).sum() / 2
        >>> hessian_diagonal(loss, [w])
        (tensor([9.]),)

    Paper: Elsayed and Mahmood, HesScale: Scalable Computation of Hessian Diagonals, arXiv 2210.11639.
    """
    targets = check_targets(params)
    check_loss(loss, fallback, dtype)
    check_finite(loss)
    unique = list({id(target): target for target in targets}.values())
    walk = Walk(
        loss,
        unique,
        gauss_newton=gauss_newton,
        fallback=fallback,
        dtype=dtype,
        fraction=fraction,
        exact_softmax=exact_softmax,
        seed=torch.ones_like(loss),
    )
    with walk:
        if torch._C._current_graph_task_id() == -1 and not walk.route.checkpointed:
            walk.run(loss, retain_graph)
        else:  # inside another backward a node computes what that asks for; outside any, what is checkpointed anew
            torch.autograd.grad(loss, unique, walk.seed, retain_graph=retain_graph, allow_unused=True)
    found = {id(target): h for target, h in zip(unique, walk.finished(unique), strict=True)}
    return tuple(found[id(target)] for target in targets)
