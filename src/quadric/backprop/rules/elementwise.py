"""Elementwise functions: h_x = f′² h + f″ g."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from quadric.backprop.registry import Rule, UnsupportedOperation, linear, rule
from quadric.backprop.saved import axis, wanted, widened


def curved(h: Any, slope: Tensor, g: Any, bend: Tensor) -> Tensor:
    """f′² h + f″ g, either of which may be missing."""
    if g is None:
        return slope.square() * h
    if h is None:
        return bend * g
    return (bend * g).addcmul_(slope.square(), h)


# Functions of one number: the slope f′ of the saved tensor, and the bend f″ of it and the slope.

SQRT_PI, SQRT_2PI, LN2, LN10 = math.sqrt(math.pi), math.sqrt(2 * math.pi), math.log(2), math.log(10)

OF_INPUT = {
    "Acos": (lambda x: -((1 - x * x).rsqrt()), lambda x, s: x * s**3),
    "Acosh": (lambda x: (x * x - 1).rsqrt(), lambda x, s: -x * s**3),
    "Asin": (lambda x: (1 - x * x).rsqrt(), lambda x, s: x * s**3),
    "Asinh": (lambda x: (1 + x * x).rsqrt(), lambda x, s: -x * s**3),
    "Atan": (lambda x: 1 / (1 + x * x), lambda x, s: -2 * x * s * s),
    "Atanh": (lambda x: 1 / (1 - x * x), lambda x, s: 2 * x * s * s),
    "Cos": (lambda x: -x.sin(), lambda x, s: -x.cos()),
    "Cosh": (lambda x: x.sinh(), lambda x, s: x.cosh()),
    "Digamma": (lambda x: torch.polygamma(1, x), lambda x, s: torch.polygamma(2, x)),
    "Erf": (lambda x: torch.exp(-x * x) * (2 / SQRT_PI), lambda x, s: -2 * x * s),
    "Erfc": (lambda x: torch.exp(-x * x) * (-2 / SQRT_PI), lambda x, s: -2 * x * s),
    "Erfinv": (lambda x: torch.exp(torch.erfinv(x) ** 2) * (SQRT_PI / 2), lambda x, s: 2 * torch.erfinv(x) * s * s),
    "Hardswish": (lambda x: (x / 3 + 0.5).where(x.abs() < 3, (x > 0).to(x)), lambda x, s: (x.abs() < 3).to(x) / 3),
    "I0": (torch.special.i1, lambda x, s: torch.special.i0(x) - torch.where(x == 0, 0.5, s / x)),
    "Lgamma": (lambda x: torch.digamma(x), lambda x, s: torch.polygamma(1, x)),
    "Log": (lambda x: 1 / x, lambda x, s: -s * s),
    "Log10": (lambda x: 1 / (x * LN10), lambda x, s: -s / x),
    "Log1P": (lambda x: 1 / (x + 1), lambda x, s: -s * s),
    "Log2": (lambda x: 1 / (x * LN2), lambda x, s: -s / x),
    "LogSigmoid": (lambda x: torch.sigmoid(-x), lambda x, s: s * (s - 1)),
    "Sin": (lambda x: x.cos(), lambda x, s: -x.sin()),
    "Sinh": (lambda x: x.cosh(), lambda x, s: x.sinh()),
    "SpecialEntr": (lambda x: -x.log() - 1, lambda x, s: -1 / x),
}
OF_RESULT = {
    "Exp": (lambda y: y, lambda y, s: y),
    "Exp2": (lambda y: y * LN2, lambda y, s: s * LN2),
    "Expm1": (lambda y: y + 1, lambda y, s: s),
    "Reciprocal": (lambda y: -y * y, lambda y, s: -2 * y * s),
    "Rsqrt": (lambda y: -0.5 * y**3, lambda y, s: -1.5 * y * y * s),
    "SpecialNdtri": (lambda y: torch.exp(y * y / 2) * SQRT_2PI, lambda y, s: y * s * s),
    "Sqrt": (lambda y: 0.5 / y, lambda y, s: -s / (2 * y * y)),
    "Tan": (lambda y: 1 + y * y, lambda y, s: 2 * y * s),
}


def function_rule(saved: str, slope: Callable[[Tensor], Tensor], bend: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """The rule of a function of one number."""

    def apply(node: Any, g: Any, h: Any) -> Tensor:
        x = widened(getattr(node, saved))
        first = slope(x)
        return first.square() * h if g is None else curved(h, first, g, bend(x, first))

    apply.__module__ = __name__
    return apply


for name, derivatives in OF_INPUT.items():
    rule(f"{name}Backward0")(function_rule("_saved_self", *derivatives))
for name, derivatives in OF_RESULT.items():
    rule(f"{name}Backward0")(function_rule("_saved_result", *derivatives))


# Activations.


@rule("TanhBackward0")
def tanh(node: Any, g: Any, h: Any) -> Tensor:
    """f′ = 1 − y², f″ = −2 y f′: f′ (f′ h − 2 y g)."""
    y = widened(node._saved_result)
    slope = 1 - y * y
    if h is None:
        return (y * g).mul_(slope).mul_(-2)
    inner = slope * h
    return (inner if g is None else inner.addcmul_(y, g, value=-2)).mul_(slope)


@rule("SigmoidBackward0")
def sigmoid(node: Any, g: Any, h: Any) -> Tensor:
    """f′ = y (1 − y), f″ = f′ (1 − 2 y)."""
    y = widened(node._saved_result)
    slope = y - y * y
    inner = slope * h if h is not None else None
    if g is None:
        return inner.mul_(slope)  # pyright: ignore[reportOptionalMemberAccess]
    bent = (1 - 2 * y).mul_(g)
    return (bent if inner is None else bent.add_(inner)).mul_(slope)


@rule("SiluBackward0")
def silu(node: Any, g: Any, h: Any) -> Tensor:
    """X σ(x): f′ = σ (1 + x (1 − σ)), f″ = σ (1 − σ)(2 + x (1 − 2σ))."""
    x = widened(node._saved_self)
    s = torch.sigmoid(x)
    rest = 1 - s
    return curved(h, s * (1 + x * rest), g, s * rest * (2 + x * (1 - 2 * s)))


@rule("GeluBackward0")
def gelu(node: Any, g: Any, h: Any) -> Tensor:
    """X Φ(x): f′ = Φ + x φ, f″ = (2 − x²) φ; or its form with tanh."""
    x = widened(node._saved_self)
    if node._saved_approximate == "none":
        density = torch.exp(x.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
        slope = torch.special.ndtr(x) + x * density
        return curved(h, slope, g, (2 - x.square()) * density)
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (x + k * x**3))
    inner, inner2 = c * (1 + 3 * k * x.square()), 6 * c * k * x
    bell = 1 - t.square()
    slope = 0.5 * (1 + t + x * bell * inner)
    return curved(h, slope, g, bell * (inner + 0.5 * x * (inner2 - 2 * t * inner.square())))


@rule("MishBackward0")
def mish(node: Any, g: Any, h: Any) -> Tensor:
    """X t with t = tanh(softplus(x)): f′ = t + x t′, f″ = 2 t′ + x t″."""
    x = widened(node._saved_self)
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    first = (1 - t.square()) * s
    second = (1 - t.square()) * s * (1 - s) - 2 * t * first * s
    return curved(h, t + x * first, g, 2 * first + x * second)


@rule("SoftplusBackward0")
def softplus(node: Any, g: Any, h: Any) -> Tensor:
    """f′ = σ(βx), f″ = β σ (1 − σ); linear above the threshold."""
    x, beta = widened(node._saved_self) * node._saved_beta, node._saved_beta
    linear = x > node._saved_threshold
    s = torch.sigmoid(x).masked_fill(linear, 1.0)
    return curved(h, s, g, beta * s * (1 - s))


@rule("EluBackward0", "EluBackward1")
def elu(node: Any, g: Any, h: Any) -> Tensor:
    """ELU and SELU: below zero f″ = f′ · (input scale)."""
    like = g if g is not None else h
    slope = node(torch.ones_like(like))
    x = node._saved_self if hasattr(node, "_saved_self") else node._saved_result
    return curved(h, slope, g, torch.where(x > 0, 0.0, slope * node._saved_input_scale))


@rule("CeluBackward0", "CeluBackward1")
def celu(node: Any, g: Any, h: Any) -> Tensor:
    """Below zero f″ = f′ / α."""
    like = g if g is not None else h
    slope = node(torch.ones_like(like))
    x = node._saved_self if hasattr(node, "_saved_self") else node._saved_result
    return curved(h, slope, g, torch.where(x > 0, 0.0, slope / node._saved_alpha))


@rule("PreluKernelBackward0")
def prelu(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor] | None:
    """The slope below zero is learnt; nothing is curved in either operand alone."""
    if h is None:
        return None
    x, weight = widened(node._saved_self), widened(node._saved_weight)
    return torch.where(x > 0, h, h * weight.square()), torch.where(x > 0, 0.0, h * x.square())


@rule("GluBackward0")
def glu(node: Any, g: Any, h: Any) -> Tensor:
    """A σ(b) for the halves a and b."""
    a, b = widened(node._saved_self).chunk(2, axis(node._saved_dim))
    s = torch.sigmoid(b)
    slope = s * (1 - s)
    below_a = s.square() * h if h is not None else torch.zeros_like(s)
    return torch.cat((below_a, curved(h, a * slope, g, a * slope * (1 - 2 * s))), axis(node._saved_dim))


@rule("SincBackward0")
def sinc(node: Any, g: Any, h: Any) -> Tensor:
    """Sin z / z with z = πx; near zero, where differences would cancel, by its series."""
    z = math.pi * widened(node._saved_self)
    near = z.abs() < 0.1
    z_or_one = torch.where(near, 1.0, z)
    y = z_or_one.sin() / z_or_one
    slope = (z_or_one.cos() - y) / z_or_one
    square = z.square()
    slope_near = z * (-1 / 3 + square * (1 / 30 + square * (-1 / 840 + square / 45360)))
    bend_near = -1 / 3 + square * (1 / 10 + square * (-1 / 168 + square / 6480))
    bend = torch.where(near, bend_near, -y - 2 * slope / z_or_one)
    return curved(h, math.pi * torch.where(near, slope_near, slope), g, math.pi**2 * bend)


@rule("PolygammaBackward0")
def polygamma(node: Any, g: Any, h: Any) -> Tensor:
    """The next two of the family."""
    x, n = widened(node._saved_self), node._saved_n
    return curved(h, torch.polygamma(n + 1, x), g, torch.polygamma(n + 2, x))


@rule("SpecialLogNdtrBackward0")
def log_ndtr(node: Any, g: Any, h: Any) -> Tensor:
    """The logarithm of Φ: f′ = φ/Φ, f″ = −f′ (x + f′)."""
    x, y = widened(node._saved_self), widened(node._saved_result)
    slope = torch.exp(x.square() / -2 - y) * (1 / SQRT_2PI)
    return curved(h, slope, g, -slope * (x + slope))


@rule("SpecialErfcxBackward0")
def erfcx(node: Any, g: Any, h: Any) -> Tensor:
    """Exp(x²) erfc(x): f′ = 2 x y − 2/√π, f″ = 2 (y + x f′)."""
    x, y = widened(node._saved_self), widened(node._saved_result)
    slope = 2 * x * y - 2 / SQRT_PI
    return curved(h, slope, g, 2 * (y + x * slope))


@rule("LogitBackward0")
def logit(node: Any, g: Any, h: Any) -> Tensor:
    """Ln x − ln(1 − x): f′ = 1 / (x (1 − x)), f″ = (2 x − 1) f′², and flat where x is clamped."""
    x, eps = widened(node._saved_self), node._saved_eps
    slope = 1 / (x * (1 - x))
    if eps is not None and eps >= 0:
        slope = slope.masked_fill((x < eps) | (x > 1 - eps), 0.0)
    return curved(h, slope, g, (2 * x - 1) * slope.square())


@rule("PowBackward0")
def power(node: Any, g: Any, h: Any) -> Tensor:
    """X to a constant power n: n xⁿ⁻¹ and n (n − 1) xⁿ⁻²."""
    x, n = widened(node._saved_self), node._saved_exponent
    if n == 2:
        if h is None:
            return 2 * g  # pyright: ignore[reportOperatorIssue]
        below = (4 * h).mul_(x.square())
        return below if g is None else below.add_(g, alpha=2)
    slope = n * x ** (n - 1) if n != 0 else torch.zeros_like(x)
    return curved(h, slope, g, n * (n - 1) * x ** (n - 2) if n not in (0, 1) else torch.zeros_like(x))


@rule("PowBackward1")
def power_of_tensors(node: Any, g: Any, h: Any) -> tuple[Tensor, Tensor]:
    """xⁿ of two tensors, each with the other constant."""
    x, n, y = (widened(t) for t in (node._saved_self, node._saved_exponent, node._saved_result))
    slope = torch.where(n == 0, 0.0, n * x ** (n - 1))
    bend = torch.where((n == 0) | (n == 1), 0.0, n * (n - 1) * x ** (n - 2))
    log_x = torch.where((x == 0) & (n >= 0), 0.0, x.log())
    return curved(h, slope, g, bend), curved(h, y * log_x, g, y * log_x.square())


@rule("PowBackward2")
def power_of_number(node: Any, g: Any, h: Any) -> Tensor:
    """cⁿ: y ln c and y ln² c."""
    y, log_c = widened(node._saved_result), math.log(node._saved_self) if node._saved_self > 0 else 0.0
    return curved(h, y * log_c, g, y * log_c**2)


@rule("AbsBackward0")
def absolute(node: Any, g: Any, h: Any) -> Tensor | None:
    """|x|: the square of its slope is 1, and 0 at zero."""
    return None if h is None else h * (node._saved_self != 0)


# Functions of two numbers, each with the other constant.


@rule("DivBackward0")
def divide(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """A / b: 1/b in a, −a/b² and 2a/b³ in b."""
    a_wanted, b_wanted = wanted(node)
    inverse = divisor(node._saved_other, g if h is None else h).reciprocal()
    below_a = inverse.square() * h if a_wanted and h is not None else None
    if not b_wanted:
        return below_a, None
    slope = -widened(node._saved_self) * inverse.square()
    return below_a, curved(h, slope, g, -2 * slope * inverse)


def divisor(b: Tensor, like: Tensor) -> Tensor:
    """What is divided by, where a whole number would make float32 of everything."""
    return widened(b) if b.is_floating_point() else b.to(like.dtype)


@rule("AddcdivBackward0")
def addcdiv(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """C + v a / b."""
    inverse, v = widened(node._saved_tensor2).reciprocal(), node._saved_value
    of_a = None if h is None else h * (v * inverse).square()
    if not wanted(node)[2]:
        return h, of_a, None
    slope = -v * widened(node._saved_tensor1) * inverse.square()
    return h, of_a, curved(h, slope, g, -2 * slope * inverse)


@rule("Atan2Backward0")
def atan2(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """The angle of (a, b): b/r² and −a/r², −2 a b/r⁴ and its negative."""
    a, b = widened(node._saved_self), widened(node._saved_other)
    inverse = 1 / (a.square() + b.square())
    bend = -2 * a * b * inverse.square()
    return curved(h, b * inverse, g, bend), curved(h, a * inverse, g, -bend)


@rule("HypotBackward0")
def hypot(node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...]:
    """√(a² + b²) = r: a/r and (1 − a²/r²)/r."""
    inverse = widened(node._saved_result).reciprocal()
    slopes = (None if side is None else widened(side) * inverse for side in (node._saved_self, node._saved_other))
    return tuple(None if s is None else curved(h, s, g, (1 - s.square()) * inverse) for s in slopes)


@rule("LogaddexpBackward0", "Logaddexp2Backward0")
def logaddexp(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """Ln(eᵃ + eᵇ), or to the base 2: s = σ(a − b) and s (1 − s)."""
    unit = LN2 if "2" in node.name().removesuffix("0") else 1.0
    s = torch.sigmoid((widened(node._saved_self) - widened(node._saved_other)) * unit)
    bend = unit * s * (1 - s)
    return curved(h, s, g, bend), curved(h, 1 - s, g, bend)


@rule("XlogyBackward0", "XlogyBackward1", "XlogyBackward2")
def xlogy(node: Any, g: Any, h: Any) -> Any:
    """X ln y, where either may be a number."""
    return times_log(node, g, h, 0.0)


@rule("SpecialXlog1PyBackward0", "SpecialXlog1PyBackward1", "SpecialXlog1PyBackward2")
def xlog1py(node: Any, g: Any, h: Any) -> Any:
    """X ln(1 + y), where either may be a number."""
    return times_log(node, g, h, 1.0)


def times_log(node: Any, g: Any, h: Any, shift: float) -> Any:
    """X ln(y + shift) is linear in x."""
    x, y = (
        widened(t) if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        for t in (node._saved_self, node._saved_other)
    )
    overload = int(node.name()[-1])
    of_x = of_y = None
    if overload != 1 and h is not None:
        of_x = h * torch.where(x == 0, 0.0, (y + shift).log()).square()
    if overload != 2:
        slope = x / (y + shift)
        of_y = curved(h, slope, g, -slope / (y + shift))
    return {0: (of_x, of_y), 1: of_y, 2: of_x}[overload]


@rule("DivBackward2")
def divide_and_round(node: Any, g: Any, h: Any) -> Any:
    """Flat, unless nothing is rounded."""
    if node._saved_rounding_mode is None:
        return divide(node, g, h)
    return None


@linear("RemainderBackward1", "FmodBackward1")
def remainder(node: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """X − y n for a whole number n."""
    slopes = node(torch.ones_like(h))
    return h, None if slopes[1] is None else h * slopes[1].square()


@rule("LdexpBackward0")
def ldexp(node: Any, g: Any, h: Any) -> tuple[Tensor | None, Tensor | None]:
    """A 2ᵇ = y: 2ᵇ in a, y ln 2 and y ln² 2 in b."""
    a_wanted, b_wanted = wanted(node)
    of_a = h * torch.exp2(2.0 * node._saved_other) if a_wanted and h is not None else None
    if not b_wanted:
        return of_a, None
    slope = LN2 * widened(node._saved_result)
    return of_a, curved(h, slope, g, LN2 * slope)


# An operation that hides what it does.


@rule("torch::autograd::CopySlices", note="an update in place of a part of a tensor, by an elementwise operation")
def update_in_place(node: Any, g: Any, h: Any) -> tuple[Tensor | None, ...]:
    """f′ by backward applied to ones, f″ by double backward, for an f found to be elementwise."""
    known = g if h is None else h
    spots = signs_like(known)
    slopes, found = backward_of_all(node, torch.ones_like(known)), backward_of_all(node, spots)
    if slopes[0] is not None and not torch.allclose(found[0], slopes[0] * spots):
        raise UnsupportedOperation(
            f"{node.name()} updates a part of a tensor in place by an operation that is not elementwise: compute the "
            "part apart and join the parts with torch.cat or torch.where"
        )
    below: list[Any] = [None] * len(slopes)
    if h is not None:
        below = [None if s is None else s * c for s, c in zip(slopes, backward_of_all(node, h), strict=True)]
    if g is not None:
        with torch.enable_grad():
            sums = [None if part is None else part.sum() for part in backward_of_all(node, g.clone().requires_grad_())]
        for place, (total, edge) in enumerate(zip(sums, node.next_functions, strict=True)):
            if total is not None and edge[0] is not None:
                (bent,) = torch.autograd.grad(total, GradientEdge(*edge), retain_graph=True, allow_unused=True)
                if bent is not None:
                    below[place] = bent if below[place] is None else below[place] + bent
    return tuple(below)


def backward_of_all(node: Any, g: Tensor) -> tuple[Any, ...]:
    """What a node's backward gives to its inputs, however many there are."""
    below = node(g)
    return below if type(below) is tuple else (below,)


def signs_like(x: Tensor) -> Tensor:
    """+1 and −1 in an irregular order."""
    return torch.where(torch.arange(x.numel(), device=x.device).square() % 7 < 3, 1.0, -1.0).to(x.dtype).view(x.shape)
