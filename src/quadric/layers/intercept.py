"""Interception: a layer computes what it always did, and somebody else forms the gradient of its weight.

A module keeps its type, its parameters and its place; only its ``forward`` is overlaid, on that one instance. Inside
it, the products with the module's own weights run as :class:`Product`, whose output, input gradient and bias gradient
have the bits of torch's own, and whose weight gradient comes from a callable.
"""

from __future__ import annotations

import itertools
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quadric.layers.maps import Convolution, Linear, Map, map_of

__all__ = ["Former", "attribute", "intercept", "release"]


class Former(ABC):
    """Somebody who forms the gradient of a weight."""

    def __init__(self) -> None:
        self.key = next(_keys)  # by which a compiled graph finds it
        FORMERS[self.key] = self

    @abstractmethod
    def __call__(self, kind: Map, g: Tensor, a: Tensor, weight: Tensor) -> Tensor | None:
        """The gradient of the weight from a map, the gradient g of its output, its input and the weight."""


_keys = itertools.count()
# A compiler must not look into what a former does: it may keep something, or decide by a value.
FORMERS: weakref.WeakValueDictionary[int, Former] = weakref.WeakValueDictionary()

LINEAR = Linear()


class Product(torch.autograd.Function):
    """One map of a layer, with the gradient of its weight formed by somebody else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, weight: Tensor, bias: Tensor | None, kind: Map, former: Former) -> Tensor:
        return kind.output(a, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        a, weight, _, ctx.kind, ctx.former = inputs
        ctx.save_for_backward(a, weight)
        ctx.save_for_forward(a, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        (g,) = grad_outputs
        a, weight = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        input_gradient, bias_gradient = ctx.kind.other_gradients(g, a, weight, of_input=of_input, of_bias=of_bias)
        return (
            input_gradient,
            formed(ctx.former, ctx.kind, g, a, weight) if of_weight else None,
            bias_gradient,
            None,
            None,
        )


@torch.library.custom_op("quadric::weight_gradient", mutates_args=())
def opaque_gradient(g: Tensor, a: Tensor, weight: Tensor, former: int, geometry: list[int]) -> Tensor:
    """The gradient of a weight, as one operation of a compiled graph."""
    gradient = FORMERS[former](map_of(geometry), g, a, weight)
    return torch.zeros_like(weight) if gradient is None else gradient.contiguous()


@opaque_gradient.register_fake
def _(g: Tensor, a: Tensor, weight: Tensor, former: int, geometry: list[int]) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def formed(former: Former, kind: Map, g: Tensor, a: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a weight from its former."""
    if torch.compiler.is_compiling():
        return opaque_gradient(g, a, weight, former.key, kind.geometry())
    return former(kind, g, a, weight)


class DualProduct(Product):
    """A product in forward mode as well; compilers do not take it."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """The tangent of the output, as the plain layer has it."""
        a_tangent, weight_tangent, bias_tangent, *_ = tangents
        a, weight = ctx.saved_tensors
        terms = [] if a_tangent is None else [ctx.kind.output(a_tangent, weight, None)]
        if weight_tangent is not None:
            terms.append(ctx.kind.output(a, weight_tangent, bias_tangent))
        elif bias_tangent is not None:
            terms.append(ctx.kind.output(torch.zeros_like(a), weight, bias_tangent))
        return torch.stack(terms).sum(0)


# torch's own entrance binds the defaults of every forward that has a setup_context: a third of a small layer's time.
_apply = super(torch.autograd.Function, DualProduct).apply  # pyright: ignore[reportAttributeAccessIssue]


def product(kind: Map, a: Tensor, weight: Tensor, bias: Tensor | None, former: Former) -> Tensor:
    """The output of a map; the gradient of its weight will come from ``former``."""
    if torch.is_autocast_enabled(a.device.type):
        a, weight, bias = _autocast(a), _autocast(weight), None if bias is None else _autocast(bias)
    if torch.compiler.is_compiling():
        return Product.apply(a, weight, bias, kind, former)
    if torch._C._are_functorch_transforms_active():
        return DualProduct.apply(a, weight, bias, kind, former)
    return _apply(a, weight, bias, kind, former)


def _autocast(tensor: Tensor) -> Tensor:
    # What autocast does at the door of a product, done before it: the gradients then come in the lower type too.
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


class Site:
    """A module whose products with its own weights are intercepted.

    Args:
        module: Its ``forward`` is overlaid.
        names: The weights in question, by their path from the module: the name of each.
        former: Gives the former of a weight by its name and, where only some rows of it are multiplied (as in the joint
            projection of an attention), the first of these rows.
    """

    def __init__(self, module: nn.Module, names: dict[str, str], former: Callable[[str, int | None], Former | None]):
        self.module, self.names, self.former = module, names, former
        self.plain = type(module).forward
        if self.plain is nn.Linear.forward:
            self.forward = self.linear_forward
        self.attention = _with_products(F.multi_head_attention_forward, self.linear)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __repr__(self) -> str:
        return f"isaac's conditioning of {', '.join(self.names.values())}"

    def __reduce__(self) -> tuple:
        # A copy or a file of the model holds the module's own forward.
        return getattr, (self.module, "forward")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its products recognised."""
        if not torch.is_grad_enabled():
            return self.plain(self.module, *args, **kwargs)
        with Recognition(self):
            return self.plain(self.module, *args, **kwargs)

    def linear_forward(self, input: Tensor) -> Tensor:
        """The forward of ``nn.Linear``, without the detour of recognising its one product."""
        return self.linear(input, self.module.weight, self.module.bias)  # pyright: ignore[reportArgumentType]

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``torch.nn.functional.linear``."""
        former = self.recognise(input, weight)
        return F.linear(input, weight, bias) if former is None else product(LINEAR, input, weight, bias, former)

    def recognise(self, a: Tensor, weight: Tensor) -> Former | None:
        """Who forms the gradient of this weight; None for torch."""
        if not (weight.requires_grad and torch.is_grad_enabled()) or a.is_nested or weight.is_complex():
            return None
        for path, name in self.names.items():
            own = attribute(self.module, path)
            if weight is own:
                return self.former(name, None)
            if weight._base is not None and weight._base is own:
                return self.former(name, weight.storage_offset() // weight.stride(0))
        # A weight that is computed, for instance masked, belongs here; another module's parameter does not.
        return None if weight.is_leaf else self.former(next(iter(self.names.values())), None)


class Recognition(TorchFunctionMode):
    """While it is active, the linear maps and convolutions of a site's own weights run as products."""

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Torch calls this for every one of its functions."""
        kwargs = kwargs or {}
        if func is F.linear:
            return self.site.linear(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.site.attention(*args, **kwargs)
        if func in CONVOLUTIONS:
            return self.convolution(func, *args, **kwargs)
        return func(*args, **kwargs)

    def convolution(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """A convolution of ``torch.nn.functional``."""
        former = self.site.recognise(input, weight)
        axes = weight.ndim - 2
        if former is None:
            return func(input, weight, bias, *args, **kwargs)
        names = TRANSPOSED if CONVOLUTIONS[func] else STRAIGHT
        given = dict(zip(names, args, strict=False)) | kwargs
        geometry = {name: _each(given.get(name, default), axes) for name, default in names.items() if name != "groups"}
        if isinstance(given.get("padding"), str):
            input, geometry["padding"] = _padded(input, given["padding"], weight, geometry["dilation"])
        kind = Convolution(
            **{"output_padding": (0,) * axes} | geometry, transposed=CONVOLUTIONS[func], groups=given.get("groups", 1)
        )
        batched = input.ndim == weight.ndim
        output = product(kind, input if batched else input.unsqueeze(0), weight, bias, former)
        return output if batched else output.squeeze(0)


CONVOLUTIONS = {
    F.conv1d: False,
    F.conv2d: False,
    F.conv3d: False,
    F.conv_transpose1d: True,
    F.conv_transpose2d: True,
    F.conv_transpose3d: True,
}
STRAIGHT = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
TRANSPOSED = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def intercept(module: nn.Module, names: dict[str, str], former: Callable[[str, int | None], Former | None]) -> None:
    """Overlay the forward of a module; see :class:`Site`.

    Raises:
        ValueError: if its forward is overlaid already.
    """
    present = module.forward
    if getattr(present, "__func__", None) is not type(module).forward:
        layer = next(iter(names.values())).rpartition(".")[0] or "the model"
        raise ValueError(f"the forward of {layer} is replaced already, by {present!r}: remove that before")
    module.forward = Site(module, names, former)


def release(module: nn.Module) -> None:
    """Take the overlay away."""
    if isinstance(vars(module).get("forward"), Site):
        del module.forward


def attribute(module: nn.Module, path: str) -> Tensor:
    """What a dotted path from a module leads to."""
    for name in path.split("."):
        module = getattr(module, name)
    return module  # pyright: ignore[reportReturnType]


def _each(value: Any, axes: int) -> tuple[int, ...]:
    # One number for all axes, or one for each.
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padded(input: Tensor, padding: str, weight: Tensor, dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    # "same" and "valid" in numbers; where the two sides differ, the right one is padded more, as torch does.
    if padding == "valid":
        return input, (0,) * len(dilation)
    total = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    if any(size % 2 for size in total):
        input = F.pad(input, [side for size in reversed(total) for side in (0, size % 2)])
    return input, tuple(size // 2 for size in total)


def _with_products(function: Any, linear: Any) -> Any:
    # torch's own code, in which the global name `linear` is another function; so are the helpers that call it.
    scope = dict(vars(F)) | {"linear": linear}
    del scope["__name__"]  # a compiler would look names up in the module of that name
    for name in ("_in_projection", "_in_projection_packed"):
        scope[name] = types.FunctionType(getattr(F, name).__code__, scope, name, getattr(F, name).__defaults__)
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
