"""Which rule carries h through which autograd node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["RULES", "Entry", "UnsupportedOperation", "find_rule", "register_rule", "rule"]

Rule = Callable[[Any, Any, Any], Any]
"""``(node, g, h) -> h of each input``, see :func:`register_rule`; inside the library g or h may be None for zero."""
Linear = Callable[[Any, Any], Any]
"""``(node, h) -> h of each input``, of an operation without second derivatives."""
Expansion = Callable[[Any], tuple[Any, Any]]
"""``node -> (outputs, inputs)``: the graph of the outputs starts from the inputs, None for one that needs no h."""


class UnsupportedOperation(RuntimeError):
    """The graph of a loss holds an operation that h cannot be carried through."""


@dataclass(frozen=True)
class Entry:
    """The rule of a node.

    Args:
        rule: The function.
        family: The file it stands in.
        exact: Whether it gives the diagonal exactly where the Hessian with respect to the node's output is diagonal.
        note: What a reader of the table of rules should know.
        linear: Whether it has no use for g.
        expands: Whether the function writes the operation out instead: ``node -> (outputs, inputs)``.
    """

    rule: Callable[..., Any]
    family: str
    exact: bool = True
    note: str = ""
    linear: bool = False
    expands: bool = False


RULES: dict[str, Entry] = {}


def rule(*names: str, exact: bool = True, note: str = "", linear: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule of the library under the names of its nodes."""

    def register(function: Rule) -> Rule:
        family = function.__module__.rpartition(".")[2]
        RULES.update(dict.fromkeys(names, Entry(function, family, exact, note, linear)))
        return function

    return register


def linear(*names: str, note: str = "") -> Callable[[Linear], Linear]:
    """Register ``(node, h) -> h of each input`` for an operation without second derivatives."""

    def register(function: Linear) -> Linear:
        def linear_rule(node: Any, g: Any, h: Any) -> Any:
            return None if h is None else function(node, h)

        linear_rule.__module__ = function.__module__
        rule(*names, note=note, linear=True)(linear_rule)
        return function

    return register


def expansion(*names: str, note: str = "") -> Callable[[Expansion], Expansion]:
    """Register ``node -> (outputs, inputs)``, which computes a fused operation again by operations that have rules."""

    def register(function: Expansion) -> Expansion:
        family = function.__module__.rpartition(".")[2]
        RULES.update(dict.fromkeys(names, Entry(function, family, exact=False, note=note, expands=True)))
        return function

    return register


def register_rule(name: str, rule: Rule) -> None:
    r"""Say how the Hessian diagonal passes an operation.

    .. math::
        h_x[i] = \sum_k J_{ki}^2\, h_y[k] + \sum_k g_y[k]\, \frac{\partial^2 y_k}{\partial x_i^2}

    A later rule replaces an earlier one of the same name, one of the library's included. A custom
    ``torch.autograd.Function`` needs no registration: give it a static method ``hessian_diagonal(ctx, g, h)``.

    Args:
        name: of the autograd node, ``tensor.grad_fn.name()``, such as ``"TanhBackward0"``.
        rule: ``rule(node, g, h)``, where g and h are the gradient and the Hessian diagonal with respect to the
            output, of its shape (tuples of them if the node has several outputs), and ``node._saved_*`` what the
            operation saved; g is zero where only the Gauss–Newton term is wanted. It returns the h of the input, or a
            tuple with one for each of ``node.next_functions``, None for an input that needs none.

    Raises:
        ValueError: if the name is not a node's or the rule is not callable.

    Example:
        y = x³ has slope 3x² and bend 6x: at x = 2 the h of the sum is 6 · 2 times its gradient 1.

        >>> import quadric
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**3
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         return 3 * ctx.saved_tensors[0] ** 2 * g
        >>> def cube(node, g, h):
        ...     x = node.saved_tensors[0]
        ...     return 9 * x**4 * h + 6 * x * g
        >>> quadric.register_rule("CubeBackward", cube)
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> quadric.hessian_diagonal(Cube.apply(x).sum(), [x])
        (tensor([12.]),)

    Paper: the formula is that of arXiv 2210.11639.
    """
    if not isinstance(name, str) or not name or not callable(rule):
        raise ValueError(
            f"register_rule takes the name of a node and a function, got {name!r}: see tensor.grad_fn.name()"
        )
    RULES[name] = Entry(filled(rule), "registered", exact=False, note="registered by the user")


def filled(rule: Rule) -> Rule:
    """A user's rule, which is never handed None."""

    def with_zeros(node: Any, g: Any, h: Any) -> Any:
        shapes = [(m.shape, m.dtype, m.device) for m in node._input_metadata]
        if len(shapes) == 1:
            like: Any = h if g is None else g
            return rule(node, torch.zeros_like(like) if g is None else g, torch.zeros_like(like) if h is None else h)
        blank = (None,) * len(shapes)

        def fill(values: Any) -> tuple:
            return tuple(
                torch.zeros(shape, dtype=dtype, device=device) if value is None else value
                for value, (shape, dtype, device) in zip(values or blank, shapes, strict=True)
            )

        return rule(node, fill(g), fill(h))

    return with_zeros


def find_rule(node: Any) -> Entry | None:
    """The rule of a node, or None: what was registered, or what a custom Function carries itself."""
    entry = RULES.get(node.name())
    if entry is not None:
        return entry
    own = getattr(getattr(node, "_forward_cls", None), "hessian_diagonal", None)
    return None if own is None else Entry(filled(own), "custom", exact=False)
