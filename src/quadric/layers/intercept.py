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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
        of_weight = of_weight and _wanted(ctx)
        kind = ctx.kind.during(g, a, of_input=of_input, of_bias=of_bias) if of_weight else ctx.kind
        weight_gradient = formed(ctx.former, kind, g, a, weight) if of_weight else None
        input_gradient, bias_gradient = kind.other_gradients(g, a, weight, of_input=of_input, of_bias=of_bias)
        return input_gradient, weight_gradient, bias_gradient, None, None

    @staticmethod
    def hessian_diagonal(ctx: Any, g: Tensor, h: Tensor) -> tuple:
        """The rule of a product for :func:`quadric.hessian_diagonal`: the other operand squared."""
        a, weight = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        of_a, of_b = ctx.kind.other_gradients(h, a, weight.square(), of_input=of_input, of_bias=of_bias)
        of_weight = ctx.kind.weight_gradient(h, a.square(), weight) if of_weight else None
        return (of_a, of_weight, of_b)[: len(ctx.next_functions)]


# What decides by values cannot be recorded once and replayed; older releases of torch have no word for it.
_TAGS: dict[str, Any] = {"tags": torch.Tag.cudagraph_unsafe} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("quadric::weight_gradient", mutates_args=(), **_TAGS)
def opaque_gradient(g: Tensor, a: Tensor, weight: Tensor, former: int, geometry: list[int]) -> Tensor:
    """The gradient of a weight, as one operation of a compiled graph."""
    if former not in FORMERS:
        raise RuntimeError(
            "the handle of isaac is gone between the forward and the backward of a compiled model: keep it until then"
        )
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
        of_a, of_weight, of_bias, *_ = tangents  # zeros where there are none
        a, weight = ctx.saved_tensors
        return ctx.kind.output(of_a, weight, None) + ctx.kind.output(a, of_weight, of_bias)  # pyright: ignore


# torch's own entrance binds the defaults of every forward that has a setup_context: a third of a small layer's time.
_apply = super(torch.autograd.Function, DualProduct).apply  # pyright: ignore[reportAttributeAccessIssue]


def product(kind: Map, a: Tensor, weight: Tensor, bias: Tensor | None, former: Former) -> Tensor:
    """The output of a map; the gradient of its weight will come from ``former``."""
    if a.device.type != "meta" and torch.is_autocast_enabled(a.device.type):
        a, weight, bias = _autocast(a), _autocast(weight), None if bias is None else _autocast(bias)
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling():
        if transformed:
            torch._dynamo.graph_break(
                msg="inside a transform of torch.func a compiler does not tell isaac what is differentiated: "
                "leave fullgraph=True out, and the transform runs eagerly"
            )
        return Product.apply(a, weight, bias, kind, former)
    if transformed:
        return DualProduct.apply(a, weight, bias, kind, former)
    return _apply(a, weight, bias, kind, former)


def _wanted(ctx: Any) -> bool:
    # Whether this backward will use the gradient of the weight: one that asks for inputs alone does not.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[1][0])
    except RuntimeError as error:  # autograd.grad does not answer for the leaves that it was asked for
        if "leaf node" not in str(error):
            raise
        return True


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
        former: Gives the former of a weight by its name and, of a part of a joint weight, its first row.
    """

    def __init__(self, module: nn.Module, names: dict[str, str], former: Callable[[str, int | None], Former]):
        self.module, self.names, self.former = module, names, former
        self.plain = type(module).forward
        self.active = True  # somebody may hold it after it was released
        if isinstance(module, nn.MultiheadAttention):
            self.attention = _with_products(F.multi_head_attention_forward, self.linear)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with its products recognised."""
        own = [_parameter(self.module, path) for path in self.names]
        if not self.active or not any(weight is None or _differentiated(weight) for weight in own):
            return self.plain(self.module, *args, **kwargs)
        with Recognition(self):
            return self.plain(self.module, *args, **kwargs)

    def __repr__(self) -> str:
        return f"isaac's conditioning of {', '.join(self.names.values())}"

    def __reduce__(self) -> tuple:
        # A copy or a file of the model holds the module's own forward.
        return getattr, (self.module, "forward")

    def linear(self, input: Tensor, weight: Tensor | Part, bias: Tensor | None = None) -> Tensor:
        """``torch.nn.functional.linear``."""
        weight, former = self.recognise(input, weight)
        return F.linear(input, weight, bias) if former is None else product(LINEAR, input, weight, bias, former)

    def recognise(self, a: Tensor, weight: Tensor | Part) -> tuple[Tensor, Former | None]:
        """A weight, and who forms its gradient; None for torch."""
        start = None
        if isinstance(weight, Part):
            weight, start = weight.tensor, weight.start
        if not _differentiated(weight) or a.is_nested or a.layout != torch.strided:
            return weight, None
        for path, name in self.names.items():
            own = _parameter(self.module, path)
            if own is None:  # it is computed anew for each forward
                found = not weight.is_leaf
            else:
                # A weight of the same shape that is computed, for instance masked, is taken for it.
                found = weight is own or weight._base is own or (not weight.is_leaf and weight.shape == own.shape)
            if found or (start is not None and path == "in_proj_weight"):
                return weight, self.former(name, start)
        return weight, None


@contextmanager
def left_to_torch(model: nn.Module) -> Iterator[None]:
    """The gradients of all weights as torch forms them, as long as the block lasts."""
    overlaid = (vars(module).get("forward") for module in model.modules())
    sites = [site for site in overlaid if isinstance(site, Site) and site.active]
    try:
        for site in sites:
            site.active = False
        yield
    finally:
        for site in sites:
            site.active = True


class LinearSite(Site):
    """An ``nn.Linear``, whose one product need not be recognised."""

    def __init__(self, module: nn.Module, names: dict[str, str], former: Callable[[str, int | None], Former]):
        super().__init__(module, names, former)
        self.only = former(names["weight"], None)

    def __call__(self, input: Tensor) -> Tensor:
        """The module's forward."""
        module = self.module
        weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
        bias: Tensor | None = module.bias  # pyright: ignore[reportAssignmentType]
        if not self.active or not _differentiated(weight) or input.is_nested or input.layout != torch.strided:
            return F.linear(input, weight, bias)
        return product(LINEAR, input, weight, bias, self.only)


class Part(NamedTuple):
    """Some rows of a joint weight.

    Args:
        tensor: The rows.
        start: The first of them.
    """

    tensor: Tensor
    start: int


class JointWeight:
    """The joint projection of an attention, whose parts know where they begin.

    Args:
        weight: Of queries, keys and values, ``(3 width, width)``.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight

    def split(self, sizes: list[int]) -> list[Part]:
        """Parts of so many rows."""
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [Part(part, start) for part, start in zip(self.weight.split(sizes), starts, strict=True)]

    def chunk(self, count: int) -> list[Part]:
        """So many equal parts."""
        return self.split([self.weight.shape[0] // count] * count)


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
        if func is F.multi_head_attention_forward and isinstance(self.site.module, nn.MultiheadAttention):
            return self.site.attention(*args, **kwargs)
        if func in CONVOLUTIONS:
            return self.convolution(func, *args, **kwargs)
        return func(*args, **kwargs)

    def convolution(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """A convolution of ``torch.nn.functional``."""
        weight, former = self.site.recognise(input, weight)
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


def intercept(module: nn.Module, names: dict[str, str], former: Callable[[str, int | None], Former]) -> Site:
    """Overlay the forward of a module; see :class:`Site`.

    Raises:
        ValueError: if its forward is overlaid already.
    """
    present = module.forward
    if getattr(present, "__func__", None) is not type(module).forward:
        layer = next(iter(names.values())).rpartition(".")[0] or "the model"
        raise ValueError(f"the forward of {layer} is replaced already, by {present!r}: remove that before")
    kind = LinearSite if type(module).forward is nn.Linear.forward else Site
    module.forward = site = kind(module, names, former)
    return site


def release(site: Site) -> None:
    """Take the overlay away, or switch it off where somebody has put another one over it."""
    site.active = False
    if vars(site.module).get("forward") is site:
        del site.module.forward


def _parameter(module: nn.Module, path: str) -> Tensor | None:
    # What a path leads to where it is a parameter; None where it is computed.
    *way, name = path.split(".")
    for step in way:
        module = module.get_submodule(step)
    return module._parameters.get(name)


def attribute(module: nn.Module, path: str) -> Tensor:
    """What a dotted path from a module leads to."""
    for name in path.split("."):
        module = getattr(module, name)
    return module  # pyright: ignore[reportReturnType]


def _differentiated(weight: Tensor) -> bool:
    # Whether a weight may get a gradient, of real numbers and on one device. What transforms and compilers wrap does
    # not tell whether it wants one: autograd will.
    if not torch.is_grad_enabled() or weight.is_complex() or hasattr(weight, "to_local"):
        return False
    return weight.requires_grad or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


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
    joint = scope["_in_projection_packed"]
    scope["_in_projection_packed"] = lambda q, k, v, weight, bias: joint(
        q, k, v, weight if q is k is v else JointWeight(weight), bias
    )
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
