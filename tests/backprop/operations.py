"""The catalogue: every operation that has a rule, as a name and a call on tensors drawn anew for each test."""

import contextlib
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence


@dataclass(frozen=True)
class Draw:
    """A tensor to be drawn: how, of which shape, and whether the operation is differentiated with respect to it."""

    sampler: Any
    shape: tuple
    differentiated: bool = True

    def tensor(self, dtype):
        return self.sampler(self.shape).to(dtype).requires_grad_(self.differentiated)


def spread(shape):
    """Values in random order, none closer to another or to zero than a margin: no ties, no kinks, no poles."""
    count = torch.Size(shape).numel()
    return ((torch.randperm(count) + 0.5 - count // 2) / 3).reshape(shape)


def normal(*shape):
    return Draw(torch.randn, shape)


def apart(*shape):
    return Draw(spread, shape)


def positive(*shape):
    return Draw(lambda s: 0.3 + 2 * torch.rand(s), shape)


def unit(*shape):
    return Draw(lambda s: 0.9 * (2 * torch.rand(s) - 1), shape)


def probability(*shape):
    return Draw(lambda s: 0.1 + 0.8 * torch.rand(s), shape)


def simplex(*shape):
    return Draw(lambda s: torch.randn(s).softmax(-1), shape)


def fixed(draw):
    """The same draw held constant."""
    return Draw(draw.sampler, draw.shape, False)


@dataclass(frozen=True)
class Case:
    """``call(*arguments, **keywords)``, and where it cannot be differentiated twice, plain code that means the same."""

    call: Any
    arguments: tuple
    keywords: dict = field(default_factory=dict)
    reference: Any = None

    def draw(self, dtype=torch.float64):
        torch.manual_seed(0)
        return [a.tensor(dtype) if isinstance(a, Draw) else a for a in self.arguments]

    def evaluate(self, arguments, exact=False):
        """The outputs that have a gradient; random operations draw the same numbers every time."""
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if exact and self.reference is not None:
                outputs = self.reference(*arguments)
            else:
                outputs = self.call(*arguments, **self.keywords)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return [y for y in outputs if y.requires_grad]


def case(call, *arguments, reference=None, **keywords):
    return Case(call, arguments, keywords, reference)


def pieces(split):
    """An operation on a list of tensors as an operation on its arguments."""
    return lambda *tensors: split(tensors)


MASK = torch.tensor([[True, False, True, False], [False, True, True, True], [True, True, False, False]])

ACTIVATIONS = {
    str(module): case(module, Draw(lambda s: 2 * torch.randn(s), (2, 7)))
    for module in [
        nn.ReLU(), nn.ReLU6(), nn.ELU(0.7), nn.SELU(), nn.CELU(0.5), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(),
        nn.Softplus(), nn.Softplus(2.0, 1.5), nn.LeakyReLU(0.2), nn.RReLU().eval(), nn.RReLU(), nn.Hardswish(),
        nn.Hardtanh(-1.0, 0.5), nn.LogSigmoid(), nn.Softshrink(0.3), nn.Hardshrink(0.3),
        nn.Threshold(0.1, 2.0), nn.Sigmoid(), nn.Tanh(), nn.Identity(),
    ]
} | {"Hardsigmoid()": case(F.hardsigmoid, normal(2, 7), reference=lambda x: (x + 3).clamp(0, 6) / 6)}  # fmt: skip

UNARY = {
    name: case(getattr(torch, name), draw(2, 5))
    for draw, names in [
        (normal, "exp exp2 expm1 neg sin cos sinh cosh asinh atan tanh erf erfc square sigmoid sinc deg2rad rad2deg"),
        (apart, "abs sign sgn floor ceil round trunc frac nan_to_num positive"),
        (positive, "log log2 log10 log1p sqrt rsqrt reciprocal lgamma digamma i0"),
        (unit, "tan asin acos atanh erfinv"),
    ]
    for name in names.split()
} | {
    "acosh": case(lambda x: torch.acosh(1.1 + x), positive(6)),
    "logit": case(torch.logit, probability(6)),
    "logit eps": case(torch.logit, probability(6), eps=0.2),
    "polygamma": case(lambda x: torch.polygamma(1, x), positive(6)),
    "special.log_ndtr": case(torch.special.log_ndtr, normal(6)),
    "special.entr": case(torch.special.entr, positive(6)),
    "special.erfcx": case(torch.special.erfcx, positive(6)),
    "special.ndtri": case(torch.special.ndtri, probability(6)),
    "pow 2": case(lambda x: x**2, normal(6)),
    "pow 3": case(lambda x: x**3, normal(6)),
    "pow 1": case(lambda x: x**1, normal(6)),
    "pow 0": case(lambda x: x**0, normal(6)),
    "pow -1.5": case(lambda x: x**-1.5, positive(6)),
    "pow 0.5": case(lambda x: x**0.5, positive(6)),
    "scalar base": case(lambda x: 2.5**x, normal(6)),
    "float_power": case(torch.float_power, positive(6), 2.5),
    "add scalar": case(lambda x: x + 2, normal(6)),
    "scalar add": case(lambda x: 2 + x, normal(6)),
    "sub scalar": case(lambda x: x - 2, normal(6)),
    "scalar sub": case(lambda x: 2 - x, normal(6)),
    "rsub alpha": case(lambda x: torch.rsub(x, 2, alpha=3), normal(6)),
    "mul scalar": case(lambda x: x * -3, normal(6)),
    "scalar mul": case(lambda x: 1.5 * x, normal(6)),
    "div scalar": case(lambda x: x / 3, normal(6)),
    "div trunc": case(lambda x: torch.div(x, 0.3, rounding_mode="trunc"), normal(6)),
    "div floor": case(lambda x: torch.div(x, 0.3, rounding_mode="floor"), normal(6)),
    "scalar div": case(lambda x: 3 / x, positive(6)),
    "remainder": case(lambda x: x % 0.7, normal(6)),
    "fmod": case(lambda x: torch.fmod(x, 0.7), normal(6)),
    "clamp both": case(lambda x: x.clamp(-1, 0.7), normal(9)),
    "clamp min": case(lambda x: x.clamp(min=-0.1), normal(9)),
    "clamp max": case(lambda x: x.clamp(max=0.1), normal(9)),
    "masked_fill": case(lambda x: x.masked_fill(MASK, 2.0), normal(3, 4)),
    "masked_fill broadcast": case(lambda x: x.masked_fill(MASK[:, :1], 2.0), normal(3, 4)),
    "where scalar": case(lambda x: torch.where(MASK, x, 2.0), normal(3, 4)),
    "clone": case(torch.clone, normal(6)),
    "dropout": case(F.dropout, normal(4, 6), p=0.4),
    "dropout eval": case(F.dropout, normal(4, 6), training=False),
    "native_dropout": case(lambda x: torch.native_dropout(x, 0.4, True)[0], normal(4, 6)),
    "alpha_dropout": case(F.alpha_dropout, normal(4, 6), training=True),
    "dropout2d": case(F.dropout2d, normal(2, 4, 2, 2)),
    "feature_alpha_dropout": case(F.feature_alpha_dropout, normal(2, 4, 2, 2), training=True),
}

BINARY = {
    "add": case(torch.add, normal(3, 4), normal(3, 4)),
    "add broadcast": case(torch.add, normal(3, 1, 4), normal(2, 1)),
    "add alpha": case(torch.add, normal(3, 4), normal(4), alpha=-2.5),
    "sub": case(torch.sub, normal(3, 4), normal(3, 1)),
    "sub alpha": case(torch.sub, normal(4), normal(3, 4), alpha=0.5),
    "mul": case(torch.mul, normal(3, 4), normal(3, 4)),
    "mul broadcast": case(torch.mul, normal(3, 1, 4), normal(2, 1)),
    "mul scalar tensor": case(torch.mul, normal(), normal(3, 4)),
    "mul constant": case(torch.mul, normal(3, 4), fixed(normal(4))),
    "mul by itself": case(lambda x: x * x, normal(3, 4)),
    "div": case(torch.div, normal(3, 4), positive(3, 4)),
    "div broadcast": case(torch.div, normal(3, 1, 4), positive(2, 1)),
    "div constant": case(torch.div, normal(3, 4), fixed(positive(4))),
    "div rounded": case(lambda x, y: torch.div(x, y, rounding_mode="floor"), normal(3, 4), positive(3, 4)),
    "div by itself": case(lambda x: x / x, positive(3, 4)),
    "addcmul": case(torch.addcmul, normal(3, 4), normal(4), normal(3, 1), value=-1.5),
    "addcdiv": case(torch.addcdiv, normal(4), normal(3, 4), positive(3, 1), value=-1.5),
    "lerp": case(torch.lerp, normal(3, 4), normal(4), 0.3),
    "lerp tensor": case(torch.lerp, normal(3, 4), normal(4), normal(3, 1)),
    "pow": case(torch.pow, positive(3, 4), normal(4)),
    "pow tensor base constant": case(torch.pow, fixed(positive(3, 4)), normal(4)),
    "pow to itself": case(lambda x: x**x, positive(5)),
    "atan2": case(torch.atan2, normal(3, 4), normal(4)),
    "hypot": case(torch.hypot, normal(3, 4), normal(4)),
    "logaddexp": case(torch.logaddexp, normal(3, 4), normal(4)),
    "logaddexp2": case(torch.logaddexp2, normal(3, 4), normal(4)),
    "xlogy": case(torch.xlogy, normal(3, 4), positive(4)),
    "xlogy of itself": case(lambda x: torch.xlogy(x, x), positive(5)),
    "xlogy scalar": case(lambda x: torch.xlogy(2.0, x), positive(5)),
    "xlog1py": case(torch.special.xlog1py, normal(3, 4), positive(4)),
    "maximum": case(torch.maximum, normal(3, 4), normal(4)),
    "minimum": case(torch.minimum, normal(3, 4), normal(4)),
    "fmax": case(torch.fmax, normal(3, 4), normal(4)),
    "fmin": case(torch.fmin, normal(3, 4), normal(4)),
    "where": case(lambda x, y: torch.where(MASK, x, y), normal(3, 4), normal(4)),
    "clamp tensors": case(torch.clamp, normal(3, 4), fixed(normal(4)), fixed(positive(4))),
    "clamp by parameters": case(lambda x, a, b: x.clamp(a, a + b), normal(3, 4), normal(4), fixed(positive(4))),
    "clamp min tensor": case(lambda x, a: x.clamp(min=a), normal(3, 4), normal(4)),
    "masked_fill tensor": case(lambda x, v: x.masked_fill(MASK, v), normal(3, 4), normal()),
    "remainder tensor": case(torch.remainder, normal(3, 4), positive(4)),
    "fmod tensor": case(torch.fmod, normal(3, 4), positive(4)),
    "copysign": case(torch.copysign, normal(3, 4), fixed(normal(4))),
    "ldexp": case(torch.ldexp, normal(3), torch.tensor([1, 0, 3])),
    "prelu": case(F.prelu, normal(2, 3, 2), normal(3)),
    "prelu one weight": case(F.prelu, normal(2, 3, 2), normal(1)),
    "glu": case(F.glu, normal(3, 6)),
    "glu dim": case(F.glu, normal(4, 3), dim=0),
}

# One tensor used several times, the uses meeting again entry by entry.
HAND_WRITTEN = {
    "Softsign()": case(F.softsign, normal(2, 7)),
    "Tanhshrink()": case(F.tanhshrink, normal(2, 7)),
    "SiLU by hand": case(lambda x: x * x.sigmoid(), normal(2, 7)),
    "GELU by hand": case(
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), normal(2, 7)
    ),
    "square of a difference by hand": case(lambda x: (x - 1) * (x - 1), normal(6)),
    "cube by hand": case(lambda x: x * x * x, normal(6)),
    "twice": case(lambda x: x + x, normal(6)),
    "ratio": case(lambda x: x / (1 + x.exp()), normal(6)),
    "density of tanh": case(lambda x: torch.log(1 - x.tanh() ** 2 + 1e-6) - x**2 / 2, normal(6)),
}

ELEMENTWISE = ACTIVATIONS | UNARY | BINARY | HAND_WRITTEN

REDUCTIONS = (
    {
        "sum": case(torch.sum, normal(3, 4)),
        "sum dim": case(torch.sum, normal(3, 4, 2), dim=(0, 2)),
        "sum keepdim": case(torch.sum, normal(3, 4), dim=1, keepdim=True),
        "mean": case(torch.mean, normal(3, 4)),
        "mean dim": case(torch.mean, normal(3, 4, 2), dim=(-1, 0)),
        "mean keepdim": case(torch.mean, normal(3, 4), dim=1, keepdim=True),
        "nansum": case(torch.nansum, normal(3, 4)),
        "nanmean": case(torch.nanmean, normal(3, 4), dim=1),
        "trace": case(torch.trace, normal(3, 3)),
        "prod": case(torch.prod, normal(5)),
        "prod dim": case(torch.prod, normal(3, 4), dim=1),
        "prod with zero": case(lambda x: (x * torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype)).prod(), normal(3)),
        "cumsum": case(torch.cumsum, normal(3, 4), dim=1),
        "cumprod": case(torch.cumprod, normal(3, 4), dim=1),
        "logcumsumexp": case(torch.logcumsumexp, normal(3, 4), dim=1),
        "cummax": case(torch.cummax, normal(3, 4), dim=1),
        "cummin": case(torch.cummin, normal(3, 4), dim=0),
        "var": case(torch.var, normal(3, 4)),
        "var dim": case(torch.var, normal(3, 4, 2), dim=(0, 2), correction=0),
        "var keepdim": case(torch.var, normal(3, 4), dim=1, keepdim=True),
        "std": case(torch.std, normal(3, 4)),
        "std dim": case(torch.std, normal(3, 4), dim=0, correction=2),
        "var_mean": case(torch.var_mean, normal(3, 4), dim=1),
        "std_mean": case(torch.std_mean, normal(3, 4), dim=1),
        "max": case(torch.max, apart(3, 4)),
        "min": case(torch.min, apart(3, 4)),
        "max dim": case(torch.max, apart(3, 4), dim=1),
        "min dim": case(torch.min, apart(3, 4), dim=0, keepdim=True),
        "amax": case(torch.amax, apart(3, 4), dim=(0, 1)),
        "amin": case(torch.amin, apart(3, 4), dim=1),
        "aminmax": case(torch.aminmax, apart(3, 4), dim=1),
        "median": case(torch.median, apart(3, 5)),
        "median dim": case(torch.median, apart(3, 5), dim=1),
        "nanmedian": case(torch.nanmedian, apart(3, 5), dim=1),
        "kthvalue": case(torch.kthvalue, apart(3, 5), k=2),
        "mode": case(torch.mode, apart(3, 5)),
        "logsumexp": case(torch.logsumexp, normal(3, 4), dim=1),
        "logsumexp dims": case(torch.logsumexp, normal(3, 4, 2), dim=(0, 2), keepdim=True),
        "softmax": case(torch.softmax, normal(3, 4), dim=-1),
        "softmax dim": case(torch.softmax, normal(3, 4, 2), dim=1),
        "softmax with -inf": case(lambda x: x.masked_fill(MASK, float("-inf")).softmax(-1), normal(3, 4)),
        "log_softmax": case(torch.log_softmax, normal(3, 4), dim=-1),
        "log_softmax dim": case(torch.log_softmax, normal(3, 4, 2), dim=1),
        "softmin": case(F.softmin, normal(3, 4), dim=0),
        "Softmax2d": case(nn.Softmax2d(), normal(2, 3, 2, 2)),
        "norm": case(torch.norm, normal(3, 4)),
        "pdist": case(
            F.pdist, normal(4, 3), reference=lambda x: (x[[0, 0, 0, 1, 1, 2]] - x[[1, 2, 3, 2, 3, 3]]).norm(dim=1)
        ),
        "pairwise_distance": case(F.pairwise_distance, normal(3, 4), normal(3, 4)),
        "pairwise_distance 1": case(F.pairwise_distance, normal(3, 4), normal(3, 4), p=1),
        "pairwise_distance 3": case(F.pairwise_distance, normal(3, 4), normal(4), p=3),
    }
    | {
        f"vector_norm {order} {dim}": case(torch.linalg.vector_norm, apart(3, 4), ord=order, dim=dim)
        for order in (0, 0.5, 1, 1.5, 2, 3, float("inf"), float("-inf"))
        for dim in (None, 1, (0, 1))
    }
    | {
        f"norm {order}": case(torch.norm, apart(3, 4), p=order, dim=0, keepdim=True)
        for order in ("fro", 1, 2, 3, float("inf"))
    }
    | {
        f"cdist {p}": case(
            torch.cdist,
            normal(2, 3, 2),
            normal(2, 4, 2),
            p=p,
            reference=lambda x, y, p=p: (x.unsqueeze(2) - y.unsqueeze(1)).norm(p=p, dim=-1),
        )
        for p in (1.0, 2.0, 3.0, float("inf"))
    }
)

RANKS = {"1": (3,), "2": (2, 3), "3": (2, 2, 3), "4": (2, 1, 2, 3)}
PARTNERS = {"1": (3,), "2": (3, 4), "3": (2, 3, 2), "4": (1, 2, 3, 2)}
PRODUCTS = (
    {
        f"matmul {a} {b}": case(torch.matmul, normal(*left), normal(*right))
        for a, left in RANKS.items()
        for b, right in PARTNERS.items()
    }
    | {
        "cross": case(torch.linalg.cross, normal(4, 3), normal(4, 3)),
        "bilinear": case(F.bilinear, normal(3, 2), normal(3, 4), normal(2, 2, 4), normal(2)),
        "bilinear no bias": case(F.bilinear, normal(2, 3, 2), normal(2, 3, 2), normal(2, 2, 2)),
        "mm": case(torch.mm, normal(2, 3), normal(3, 4)),
        "mm transposed": case(lambda x, y: x.mT @ y.mT, normal(3, 2), normal(4, 3)),
        "mm constant": case(torch.mm, normal(2, 3), fixed(normal(3, 4))),
        "bmm": case(torch.bmm, normal(2, 2, 3), normal(2, 3, 2)),
        "mv": case(torch.mv, normal(2, 3), normal(3)),
        "dot": case(torch.dot, normal(4), normal(4)),
        "vdot": case(torch.vdot, normal(4), normal(4)),
        "dot with itself": case(lambda x: torch.dot(x, x), normal(4)),
        "inner": case(torch.inner, normal(2, 3), normal(4, 3)),
        "outer": case(torch.outer, normal(3), normal(4)),
        "ger": case(torch.ger, normal(3), normal(4)),
        "addmm": case(torch.addmm, normal(2, 4), normal(2, 3), normal(3, 4)),
        "addmm beta alpha": case(torch.addmm, normal(4), normal(2, 3), normal(3, 4), beta=0.5, alpha=-2.0),
        "addbmm": case(torch.addbmm, normal(2, 4), normal(3, 2, 2), normal(3, 2, 4), beta=0.5, alpha=-2.0),
        "baddbmm": case(torch.baddbmm, normal(3, 2, 4), normal(3, 2, 2), normal(3, 2, 4), beta=0.5, alpha=-2.0),
        "baddbmm broadcast": case(torch.baddbmm, normal(1, 4), normal(3, 2, 2), normal(3, 2, 4)),
        "addmv": case(torch.addmv, normal(2), normal(2, 3), normal(3), beta=0.5, alpha=-2.0),
        "addr": case(torch.addr, normal(2, 3), normal(2), normal(3), beta=0.5, alpha=-2.0),
        "chain_matmul": case(
            lambda x, y, z: torch.linalg.multi_dot([x, y, z]), fixed(normal(2, 3)), normal(3, 4), fixed(normal(4, 2))
        ),
        "einsum bilinear": case(lambda x, y: torch.einsum("bij,bjk->bik", x, y), normal(2, 2, 3), normal(2, 3, 2)),
        "einsum contraction": case(
            lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y), normal(2, 2, 2, 3), normal(2, 2, 3, 3)
        ),
        "einsum outer": case(lambda x, y: torch.einsum("i,j->ij", x, y), normal(3), normal(4)),
        "einsum to a scalar": case(lambda x, y: torch.einsum("ij,ij->", x, y), normal(3, 2), normal(3, 2)),
        "einsum trace": case(lambda x: torch.einsum("ii->", x), normal(3, 3)),
        "einsum diagonal": case(lambda x: torch.einsum("...ii->...i", x), normal(2, 3, 3)),
        "einsum transposed": case(lambda x: torch.einsum("ij->ji", x), normal(2, 3)),
        "tensordot": case(lambda x, y: torch.tensordot(x, y, dims=([1, 2], [1, 0])), normal(2, 3, 2), normal(2, 3, 2)),
        "tensordot outer": case(lambda x, y: torch.tensordot(x, y, dims=0), normal(2), normal(3)),
        "kron": case(torch.kron, normal(2, 2), normal(2, 3)),
    }
    | {
        f"linear {rank}{' no bias' * (not bias)}": case(F.linear, normal(*shape), normal(4, 3), *[normal(4)] * bias)
        for rank, shape in RANKS.items()
        for bias in (True, False)
    }
)

CONVOLUTIONS = {
    "conv1d": case(F.conv1d, normal(2, 2, 5), normal(3, 2, 3), normal(3)),
    "conv1d no batch": case(F.conv1d, normal(2, 5), normal(3, 2, 3), normal(3)),
    "conv1d stride padding": case(F.conv1d, normal(2, 2, 6), normal(3, 2, 3), normal(3), stride=2, padding=1),
    "conv1d same": case(F.conv1d, normal(2, 2, 5), normal(2, 2, 2), normal(2), padding="same"),
    "conv1d groups dilation": case(F.conv1d, normal(1, 4, 6), normal(6, 2, 2), normal(6), groups=2, dilation=2),
    "conv1d one": case(F.conv1d, normal(2, 3, 4), normal(2, 3, 1)),
    "conv2d": case(F.conv2d, normal(2, 2, 4, 4), normal(3, 2, 3, 3), normal(3)),
    "conv2d no bias": case(F.conv2d, normal(1, 2, 4, 3), normal(3, 2, 2, 3)),
    "conv2d all": case(
        F.conv2d,
        normal(1, 4, 6, 5),
        normal(2, 2, 2, 3),
        normal(2),
        stride=(2, 1),
        padding=(1, 2),
        dilation=(2, 1),
        groups=2,
    ),
    "conv2d depthwise": case(F.conv2d, normal(2, 3, 4, 4), normal(3, 1, 3, 3), normal(3), padding=1, groups=3),
    "conv2d channels last": case(
        lambda x, w: F.conv2d(x.to(memory_format=torch.channels_last), w, padding=1),
        normal(2, 2, 3, 3),
        normal(2, 2, 3, 3),
    ),
    "conv2d constant input": case(F.conv2d, fixed(normal(2, 2, 4, 4)), normal(3, 2, 3, 3), normal(3)),
    "conv2d circular": case(
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w), normal(1, 1, 4, 4), normal(2, 1, 3, 3)
    ),
    "conv2d reflect": case(
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w), fixed(normal(1, 1, 4, 4)), normal(2, 1, 3, 3)
    ),
    "conv2d replicate": case(
        lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), w),
        fixed(normal(1, 1, 4, 4)),
        normal(2, 1, 3, 3),
    ),
    "conv3d": case(F.conv3d, normal(1, 2, 3, 3, 2), normal(2, 2, 2, 2, 1), normal(2), padding=(1, 0, 0)),
    "conv3d groups": case(F.conv3d, normal(1, 2, 3, 2, 2), normal(2, 1, 2, 2, 2), stride=2, padding=1, groups=2),
    "conv_transpose1d": case(F.conv_transpose1d, normal(2, 2, 3), normal(2, 3, 3), normal(3), stride=2),
    "conv_transpose2d": case(F.conv_transpose2d, normal(1, 2, 3, 2), normal(2, 2, 2, 3), normal(2)),
    "conv_transpose2d all": case(
        F.conv_transpose2d,
        normal(1, 4, 2, 3),
        normal(4, 1, 3, 2),
        normal(2),
        stride=2,
        padding=1,
        output_padding=(1, 0),
        groups=2,
        dilation=(1, 2),
    ),
    "conv_transpose3d": case(F.conv_transpose3d, normal(1, 2, 2, 2, 2), normal(2, 1, 2, 2, 2), normal(1), stride=2),
}

TOKENS = torch.tensor([[0, 2, 4], [2, 2, 1]])
LOOKUPS = {
    "embedding": case(lambda w: F.embedding(TOKENS, w), normal(5, 3)),
    "embedding padding_idx": case(lambda w: F.embedding(TOKENS, w, padding_idx=2), normal(5, 3)),
    "embedding scale_grad_by_freq off, one index": case(lambda w: F.embedding(torch.tensor(3), w), normal(5, 3)),
    "embedding_bag sum": case(
        lambda w: F.embedding_bag(TOKENS, w, mode="sum"), normal(5, 3), reference=lambda w: w[TOKENS].sum(1)
    ),
    "embedding_bag mean": case(
        lambda w: F.embedding_bag(TOKENS, w, mode="mean"), normal(5, 3), reference=lambda w: w[TOKENS].mean(1)
    ),
    "embedding_bag offsets": case(
        lambda w: F.embedding_bag(TOKENS.flatten(), w, torch.tensor([0, 4]), mode="mean"),
        normal(5, 3),
        reference=lambda w: torch.stack([w[TOKENS.flatten()[:4]].mean(0), w[TOKENS.flatten()[4:]].mean(0)]),
    ),
    "embedding_bag weights": case(
        lambda w, s: F.embedding_bag(TOKENS, w, per_sample_weights=s, mode="sum"),
        normal(5, 3),
        normal(2, 3),
        reference=lambda w, s: (w[TOKENS] * s[..., None]).sum(1),
    ),
}

POOLING = {
    "max_pool1d": case(F.max_pool1d, apart(2, 2, 6), kernel_size=2),
    "max_pool2d": case(F.max_pool2d, apart(2, 2, 4, 5), kernel_size=(2, 3), stride=(1, 2), padding=1),
    "max_pool2d ceil dilation": case(F.max_pool2d, apart(1, 1, 5, 5), kernel_size=2, dilation=2, ceil_mode=True),
    "max_pool2d no batch": case(F.max_pool2d, apart(2, 4, 4), kernel_size=2),
    "max_pool3d": case(F.max_pool3d, apart(1, 1, 4, 4, 2), kernel_size=2),
    "avg_pool1d": case(F.avg_pool1d, normal(2, 2, 6), kernel_size=3, stride=2, padding=1),
    "avg_pool1d no pad counted": case(F.avg_pool1d, normal(2, 2, 6), kernel_size=3, padding=1, count_include_pad=False),
    "avg_pool2d": case(F.avg_pool2d, normal(2, 2, 4, 5), kernel_size=(2, 3), stride=(1, 2), padding=(0, 1)),
    "avg_pool2d ceil": case(F.avg_pool2d, normal(1, 1, 5, 5), kernel_size=2, ceil_mode=True),
    "avg_pool2d ceil no pad counted": case(
        F.avg_pool2d, normal(1, 1, 5, 5), kernel_size=3, padding=1, ceil_mode=True, count_include_pad=False
    ),
    "avg_pool2d divisor": case(F.avg_pool2d, normal(1, 1, 5, 5), kernel_size=2, divisor_override=3),
    "avg_pool3d": case(F.avg_pool3d, normal(1, 1, 4, 4, 3), kernel_size=2, padding=1, count_include_pad=False),
    "adaptive_avg_pool1d": case(F.adaptive_avg_pool1d, normal(2, 2, 5), output_size=3),
    "adaptive_avg_pool2d": case(F.adaptive_avg_pool2d, normal(2, 2, 5, 4), output_size=(3, 2)),
    "adaptive_avg_pool2d one": case(F.adaptive_avg_pool2d, normal(2, 2, 3, 4), output_size=1),
    "adaptive_avg_pool3d": case(F.adaptive_avg_pool3d, normal(1, 1, 3, 4, 3), output_size=(2, 2, 3)),
    "adaptive_max_pool1d": case(F.adaptive_max_pool1d, apart(2, 2, 5), output_size=3),
    "adaptive_max_pool2d": case(F.adaptive_max_pool2d, apart(1, 2, 5, 4), output_size=(3, 2)),
    "adaptive_max_pool3d": case(F.adaptive_max_pool3d, apart(1, 1, 3, 4, 3), output_size=2),
    "fractional_max_pool2d": case(F.fractional_max_pool2d, apart(1, 1, 6, 6), kernel_size=2, output_size=3),
    "lp_pool1d": case(F.lp_pool1d, positive(2, 2, 6), norm_type=2.0, kernel_size=2),
    "lp_pool2d": case(F.lp_pool2d, positive(1, 1, 4, 4), norm_type=3.0, kernel_size=2, stride=1),
    "lp_pool3d": case(F.lp_pool3d, positive(1, 1, 2, 4, 2), norm_type=2.0, kernel_size=2),
    "max_unpool2d": case(lambda x: F.max_unpool2d(x, torch.tensor([[[[0, 3], [9, 14]]]]), 2), normal(1, 1, 2, 2)),
}

MEAN, VARIANCE = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([0.5, 2.0, 1.3])


def batch_norm(training):
    def call(x, *affine):
        mean, variance = MEAN.to(x.dtype), VARIANCE.to(x.dtype)
        return F.batch_norm(x, mean.clone(), variance.clone(), *affine, training=training)

    return call


NORMS = {
    "batch_norm": case(batch_norm(True), normal(4, 3), normal(3), normal(3)),
    "batch_norm plain": case(batch_norm(True), normal(4, 3)),
    "batch_norm no running": case(lambda x: F.batch_norm(x, None, None, training=True), normal(4, 3)),
    "batch_norm 1d": case(batch_norm(True), normal(3, 3, 2), normal(3), normal(3)),
    "batch_norm 2d": case(batch_norm(True), normal(2, 3, 2, 2), normal(3), normal(3)),
    "batch_norm 3d": case(batch_norm(True), normal(2, 3, 1, 2, 2), normal(3), normal(3)),
    "batch_norm eval": case(batch_norm(False), normal(4, 3), normal(3), normal(3)),
    "batch_norm eval plain": case(batch_norm(False), normal(2, 3, 2, 2)),
    "batch_norm weight constant": case(batch_norm(True), normal(4, 3), fixed(normal(3)), normal(3)),
    "batch_norm input constant": case(batch_norm(True), fixed(normal(4, 3)), normal(3), normal(3)),
    "layer_norm": case(lambda x, w, b: F.layer_norm(x, (4,), w, b), normal(3, 4), normal(4), normal(4)),
    "layer_norm plain": case(lambda x: F.layer_norm(x, (4,)), normal(3, 4)),
    "layer_norm no bias": case(lambda x, w: F.layer_norm(x, (4,), w), normal(2, 3, 4), normal(4)),
    "layer_norm two axes": case(
        lambda x, w, b: F.layer_norm(x, (2, 3), w, b), normal(3, 2, 3), normal(2, 3), normal(2, 3)
    ),
    "group_norm": case(lambda x, w, b: F.group_norm(x, 2, w, b), normal(2, 4, 3), normal(4), normal(4)),
    "group_norm plain": case(lambda x: F.group_norm(x, 2), normal(2, 4, 2, 2)),
    "group_norm one": case(lambda x, w, b: F.group_norm(x, 1, w, b), normal(2, 4), normal(4), normal(4)),
    "instance_norm": case(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), normal(2, 3, 4), normal(3), normal(3)),
    "instance_norm plain": case(F.instance_norm, normal(2, 3, 2, 2)),
    "instance_norm running": case(
        lambda x: F.instance_norm(x, MEAN.to(x.dtype), VARIANCE.to(x.dtype), use_input_stats=False), normal(2, 3, 4)
    ),
}

ROWS, COLUMNS = torch.tensor([2, 0, 2]), torch.tensor([1, 3, 1])


def invertible(*shape):
    return Draw(lambda s: torch.randn(s) + 3 * torch.eye(s[-1]), shape)


INVERSES = {
    "inverse": case(torch.linalg.inv, invertible(2, 3, 3)),
    "solve": case(torch.linalg.solve, invertible(2, 3, 3), normal(2, 3, 2)),
    "solve one vector": case(torch.linalg.solve, invertible(3, 3), normal(3)),
    "solve vectors": case(torch.linalg.solve, invertible(2, 3, 3), normal(2, 3)),
    "solve from the right": case(lambda a, b: torch.linalg.solve(a, b, left=False), invertible(3, 3), normal(2, 3)),
    "solve many for one": case(torch.linalg.solve, invertible(3, 3), normal(2, 3, 2)),
    "solve_triangular": case(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False), invertible(2, 3, 3), normal(2, 3, 2)
    ),
    "solve_triangular with ones": case(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True, unitriangular=True), normal(3, 3), normal(3, 2)
    ),
    "solve_triangular from the right": case(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True, left=False), invertible(3, 3), normal(2, 3)
    ),
    "det": case(torch.linalg.det, invertible(2, 3, 3)),
    "slogdet": case(lambda a: torch.linalg.slogdet(a)[1], invertible(2, 3, 3)),
    "logdet": case(torch.logdet, Draw(lambda s: torch.rand(s) + 5 * torch.eye(3), (3, 3))),
}

PICK = torch.tensor([[0, 2, 1, 0], [2, 2, 0, 1]])
MOVEMENT = {
    "index int": case(lambda x: x[1], normal(3, 4)),
    "index negative": case(lambda x: x[-1, -2], normal(3, 4)),
    "index slice": case(lambda x: x[1:, ::2], normal(3, 4)),
    "index ellipsis none": case(lambda x: x[..., None, 1:3], normal(2, 3, 4)),
    "index list": case(lambda x: x[[0, 2, 2]], normal(3, 4)),
    "index pairs": case(lambda x: x[ROWS, COLUMNS], normal(3, 4)),
    "index apart": case(lambda x: x[ROWS, :, COLUMNS], normal(3, 2, 4)),
    "index broadcast": case(lambda x: x[ROWS[:, None], COLUMNS], normal(3, 4)),
    "index mask": case(lambda x: x[MASK], normal(3, 4)),
    "index mask rows": case(lambda x: x[MASK[:, 0]], normal(3, 4)),
    "index tensor int": case(lambda x: x[torch.tensor(1)], normal(3, 4)),
    "index_select": case(lambda x: x.index_select(1, COLUMNS), normal(3, 4)),
    "take": case(lambda x: x.take(PICK), normal(3, 4)),
    "gather": case(lambda x: x.gather(0, PICK), normal(3, 4)),
    "take_along_dim": case(lambda x: x.take_along_dim(PICK, 0), normal(3, 4)),
    "masked_select": case(lambda x: x.masked_select(MASK), normal(3, 4)),
    "masked_scatter": case(lambda x, y: x.masked_scatter(MASK, y), normal(3, 4), normal(8)),
    "index_fill": case(lambda x: x.index_fill(0, ROWS, 1.0), normal(3, 4)),
    "index_fill tensor": case(lambda x, v: x.index_fill(1, COLUMNS, v), normal(3, 4), normal()),
    "index_add": case(lambda x, y: x.index_add(0, ROWS, y), normal(3, 4), normal(3, 4)),
    "index_add alpha": case(lambda x, y: x.index_add(0, ROWS, y, alpha=-1.5), normal(3, 4), normal(3, 4)),
    "index_copy": case(lambda x, y: x.index_copy(0, torch.tensor([2, 0]), y), normal(3, 4), normal(2, 4)),
    "index_put": case(
        lambda x, y: x.index_put((torch.tensor([2, 0]), torch.tensor([1, 1])), y), normal(3, 4), normal(2)
    ),
    "index_put accumulate": case(
        lambda x, y: x.index_put((ROWS, COLUMNS), y, accumulate=True), normal(3, 4), normal(3)
    ),
    "index_put broadcast": case(lambda x, y: x.index_put((MASK,), y), normal(3, 4), normal()),
    "index_reduce amax": case(
        lambda x, y: x.index_reduce(0, ROWS, y, "amax"),
        apart(3, 4),
        fixed(normal(3, 4)),
        reference=lambda x, y: torch.stack([x[0].maximum(y[1]), x[1], x[2].maximum(y[0].maximum(y[2]))]),
    ),
    "scatter": case(lambda x, y: x.scatter(0, PICK[:1], y), normal(3, 4), normal(1, 4)),
    "scatter value": case(lambda x: x.scatter(0, PICK[:1], 2.0), normal(3, 4)),
    "scatter_add": case(lambda x, y: x.scatter_add(0, PICK, y), normal(3, 4), normal(2, 4)),
    "scatter_reduce sum": case(lambda x, y: x.scatter_reduce(0, PICK, y, "sum"), normal(3, 4), normal(2, 4)),
    "scatter_reduce amax": case(lambda x, y: x.scatter_reduce(0, PICK, y, "amax"), apart(3, 4), fixed(normal(2, 4))),
    "scatter_reduce mean": case(
        lambda x, y: x.scatter_reduce(0, PICK, y, "mean", include_self=False), normal(3, 4), normal(2, 4)
    ),
    "select_scatter": case(lambda x, y: x.select_scatter(y, 0, 1), normal(3, 4), normal(4)),
    "slice_scatter": case(lambda x, y: x.slice_scatter(y, 1, 1, 3), normal(3, 4), normal(3, 2)),
    "diagonal_scatter": case(lambda x, y: x.diagonal_scatter(y), normal(3, 4), normal(3)),
    "select": case(lambda x: x.select(1, 2), normal(3, 4)),
    "narrow": case(lambda x: x.narrow(1, 1, 2), normal(3, 4)),
    "diag": case(torch.diag, normal(3, 3)),
    "diag_embed": case(torch.diag_embed, normal(2, 3)),
    "diagonal": case(torch.diagonal, normal(2, 3, 3), offset=1, dim1=1, dim2=2),
    "tril": case(torch.tril, normal(3, 4), diagonal=1),
    "triu": case(torch.triu, normal(3, 4)),
    "view": case(lambda x: x.view(2, 6), normal(3, 4)),
    "view dtype kept": case(lambda x: x.view(-1), normal(3, 4)),
    "reshape copy": case(lambda x: x.t().reshape(2, 6), normal(3, 4)),
    "flatten": case(torch.flatten, normal(2, 3, 2), start_dim=1),
    "unflatten": case(lambda x: x.unflatten(1, (2, 3)), normal(2, 6)),
    "ravel": case(torch.ravel, normal(3, 4)),
    "squeeze": case(torch.squeeze, normal(3, 1, 2)),
    "squeeze dim": case(lambda x: x.squeeze(1), normal(3, 1, 2)),
    "squeeze dims": case(lambda x: x.squeeze((1, 2)), normal(3, 1, 1)),
    "unsqueeze": case(lambda x: x.unsqueeze(1), normal(3, 4)),
    "t": case(torch.t, normal(3, 4)),
    "transpose": case(lambda x: x.transpose(0, 2), normal(2, 3, 2)),
    "permute": case(lambda x: x.permute(2, 0, 1), normal(2, 3, 2)),
    "movedim": case(lambda x: x.movedim(0, -1), normal(2, 3, 2)),
    "swapaxes": case(lambda x: x.swapaxes(0, 1), normal(2, 3)),
    "adjoint": case(lambda x: x.mH, normal(2, 3)),
    "contiguous": case(lambda x: x.mT.contiguous(), normal(2, 3)),
    "as_strided": case(lambda x: x.as_strided((3, 2), (2, 1), 1), normal(3, 4)),
    "as_strided overlapping": case(lambda x: x.as_strided((3, 3), (1, 1)), normal(5)),
    "expand": case(lambda x: x.expand(2, 3, 4), normal(3, 1)),
    "expand_as": case(lambda x, y: x.expand_as(y) + y, normal(4), normal(3, 4)),
    "broadcast_tensors": case(torch.broadcast_tensors, normal(3, 1), normal(4)),
    "meshgrid": case(lambda x, y: torch.meshgrid(x, y, indexing="ij"), normal(3), normal(2)),
    "repeat": case(lambda x: x.repeat(2, 3), normal(2, 3)),
    "repeat_interleave": case(lambda x: x.repeat_interleave(2, dim=1), normal(2, 3)),
    "repeat_interleave tensor": case(lambda x: x.repeat_interleave(torch.tensor([2, 0, 3]), dim=1), normal(2, 3)),
    "tile": case(lambda x: x.tile(2, 2), normal(2, 3)),
    "flip": case(lambda x: x.flip(0, 1), normal(2, 3)),
    "fliplr": case(torch.fliplr, normal(2, 3)),
    "roll": case(lambda x: x.roll((1, -1), (0, 1)), normal(3, 4)),
    "pack a padded sequence": case(
        lambda x: pack_padded_sequence(x, torch.tensor([2, 4, 1]), enforce_sorted=False).data, normal(4, 3, 2)
    ),
    "roll flat": case(lambda x: x.roll(2), normal(3, 4)),
    "rot90": case(torch.rot90, normal(3, 4)),
    "cat": case(pieces(lambda xs: torch.cat(xs, 1)), normal(2, 3), normal(2, 1), normal(2, 2)),
    "cat constant": case(pieces(torch.cat), normal(2, 3), fixed(normal(1, 3)), normal(1, 3)),
    "cat twice the same": case(lambda x: torch.cat([x, x]), normal(2, 3)),
    "stack": case(pieces(lambda xs: torch.stack(xs, 1)), normal(2, 3), normal(2, 3)),
    "hstack": case(pieces(torch.hstack), normal(2, 3), normal(2, 1)),
    "block_diag": case(torch.block_diag, normal(2, 3), normal(1, 2)),
    "cartesian_prod": case(torch.cartesian_prod, normal(3), normal(2)),
    "split": case(lambda x: x.split(2, 1), normal(2, 5)),
    "split sizes": case(lambda x: x.split([1, 3], 1)[1], normal(2, 4)),
    "chunk": case(lambda x: x.chunk(3, 1)[::2], normal(2, 6)),
    "tensor_split": case(lambda x: x.tensor_split([1, 3], 1), normal(2, 5)),
    "unbind": case(lambda x: x.unbind(1), normal(2, 3)),
    "unbind one": case(lambda x: x.unbind(0)[1], normal(3, 2)),
    "pad constant": case(lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), normal(2, 3)),
    "pad negative": case(lambda x: F.pad(x, (-1, 2)), normal(2, 3)),
    "pad circular": case(lambda x: F.pad(x, (2, 1), mode="circular"), normal(1, 2, 4)),
    "tensor.unfold": case(lambda x: x.unfold(1, 3, 1), normal(2, 5)),
    "unfold": case(lambda x: F.unfold(x, 2, padding=1, stride=2, dilation=1), normal(1, 2, 4, 4)),
    "fold": case(lambda x: F.fold(x, (3, 3), 2), normal(1, 4, 4)),
    "sort": case(lambda x: x.sort(dim=1, descending=True), apart(3, 4)),
    "msort": case(torch.msort, apart(3, 4)),
    "topk": case(lambda x: x.topk(2, dim=1), apart(3, 4)),
    "pixel_shuffle": case(lambda x: F.pixel_shuffle(x, 2), normal(1, 4, 2, 1)),
    "pixel_unshuffle": case(lambda x: F.pixel_unshuffle(x, 2), normal(1, 1, 4, 2)),
    "channel_shuffle": case(lambda x: torch.channel_shuffle(x, 2), normal(1, 4, 2, 2)),
    "to itself": case(lambda x: x.to(x.dtype), normal(3)),
    "real of real": case(torch.real, normal(3)),
    "atleast_3d": case(torch.atleast_3d, normal(3)),
} | {
    f"pad {mode} {axes}d": case(
        lambda x, mode=mode, axes=axes: F.pad(x, (1, 2) * axes, mode=mode),
        normal(*{1: (1, 2, 4), 2: (1, 1, 3, 4), 3: (1, 1, 3, 3, 3)}[axes]),
    )
    for mode in ("reflect", "replicate")
    for axes in (1, 2, 3)
}


def grid_sample_reference(x, grid):
    """Bilinear sampling with align_corners=True and zeros outside, by indexing."""
    height, width = x.shape[-2:]
    column, row = (grid[..., 0] + 1) / 2 * (width - 1), (grid[..., 1] + 1) / 2 * (height - 1)
    total = 0
    for dy in (0, 1):
        for dx in (0, 1):
            i, j = row.detach().floor() + dy, column.detach().floor() + dx
            weight = (1 - (row - i).abs()) * (1 - (column - j).abs())
            inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
            i, j = i.clamp(0, height - 1).long(), j.clamp(0, width - 1).long()
            picked = torch.stack([image[:, a, b] for image, a, b in zip(x, i, j, strict=True)])
            total = total + picked * (weight * inside).unsqueeze(1)
    return total


RESAMPLING = {
    " ".join(["interpolate", mode, f"{len(shape) - 2}d", size, *corners]): case(
        F.interpolate, normal(*shape), **size_of, mode=mode, **corners
    )
    for mode, shape, corners in [
        ("nearest", (1, 2, 3), {}),
        ("nearest", (1, 1, 3, 2), {}),
        ("nearest", (1, 1, 2, 2, 2), {}),
        ("nearest-exact", (1, 1, 3, 2), {}),
        ("linear", (1, 2, 4), {}),
        ("linear", (1, 2, 4), {"align_corners": True}),
        ("bilinear", (1, 1, 3, 4), {}),
        ("bilinear", (1, 1, 3, 4), {"align_corners": True}),
        ("bilinear", (1, 1, 3, 4), {"antialias": True}),
        ("bicubic", (1, 1, 4, 3), {}),
        ("bicubic", (1, 1, 4, 3), {"align_corners": True}),
        ("bicubic", (1, 1, 4, 3), {"antialias": True}),
        ("trilinear", (1, 1, 2, 3, 2), {}),
        ("area", (1, 2, 5), {}),
        ("area", (1, 1, 5, 4), {}),
    ]
    for size, size_of in [("up", {"scale_factor": 2}), ("to 3", {"size": (3,) * (len(shape) - 2)})]
} | {
    "grid_sample input": case(
        lambda x, grid: F.grid_sample(x, grid, align_corners=True),
        normal(1, 2, 3, 4),
        fixed(Draw(lambda s: 2.2 * torch.rand(s) - 1.1, (1, 2, 3, 2))),
        reference=grid_sample_reference,
    ),
    "grid_sample grid": case(
        lambda x, grid: F.grid_sample(x, grid, align_corners=True),
        fixed(normal(2, 1, 3, 4)),
        Draw(lambda s: 2.2 * torch.rand(s) - 1.1, (2, 2, 2, 2)),
        reference=grid_sample_reference,
    ),
    "affine_grid": case(lambda theta: F.affine_grid(theta, [2, 1, 2, 3], align_corners=False), normal(2, 2, 3)),
}


def attention(backend, **keywords):
    def call(q, k, v, *mask):
        with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, *mask, **keywords)

    return call


def plain_attention(q, k, v, mask=None, *, is_causal=False, scale=None, enable_gqa=False):
    """The definition of scaled dot product attention."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


BACKENDS = {"chosen": None, "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
FLOATS = torch.tensor([[0.0, -1.0, 0.5, 2.0], [1.0, 0.0, -0.3, 0.0], [0.2, 0.1, -3.0, 1.0]])
ATTENTION_FORMS = {
    "": ({}, (2, 2, 3, 4), (2, 2, 4, 4), (2, 2, 4, 4), ()),
    "causal": ({"is_causal": True}, (1, 2, 4, 3), (1, 2, 4, 3), (1, 2, 4, 3), ()),
    "bool mask": ({}, (1, 2, 3, 4), (1, 2, 4, 4), (1, 2, 4, 4), (MASK,)),
    "float mask": ({}, (1, 2, 3, 4), (1, 2, 4, 4), (1, 2, 4, 4), (FLOATS,)),
    "mask per batch": ({}, (2, 1, 3, 4), (2, 1, 4, 4), (2, 1, 4, 4), (MASK.expand(2, 1, 3, 4),)),
    "scale": ({"scale": 0.7}, (1, 1, 3, 4), (1, 1, 4, 4), (1, 1, 4, 4), ()),
    "grouped": ({"enable_gqa": True}, (1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2), ()),
    "wider values": ({}, (1, 2, 3, 2), (1, 2, 4, 2), (1, 2, 4, 5), ()),
    "three axes": ({}, (2, 3, 4), (2, 4, 4), (2, 4, 4), ()),
    "long": ({"is_causal": True}, (1, 1, 40, 2), (1, 1, 40, 2), (1, 1, 40, 2), ()),
}


def attentions(differentiated):
    """Every form on every backend that runs it, differentiated with respect to some of query, key and value."""
    cases = {}
    for form, (keywords, *shapes, masks) in ATTENTION_FORMS.items():
        for name, backend in BACKENDS.items():
            if name == "flash" and form in ("wider values", "three axes"):
                continue  # this kernel wants four axes and one head dimension
            draws = [
                normal(*shape) if letter in differentiated else fixed(normal(*shape))
                for letter, shape in zip("qkv", shapes, strict=True)
            ]
            cases[f"attention {differentiated} {name} {form}".strip()] = case(
                attention(backend, **keywords),
                *draws,
                *masks,
                reference=lambda *a, keywords=keywords: plain_attention(*a, **keywords),
            )
    return cases


ATTENTION = attentions("v")

EXACT = (
    ELEMENTWISE
    | REDUCTIONS
    | PRODUCTS
    | CONVOLUTIONS
    | LOOKUPS
    | POOLING
    | NORMS
    | INVERSES
    | MOVEMENT
    | RESAMPLING
    | ATTENTION
)

CLASSES, PIXELS = torch.tensor([2, 0, 1]), torch.tensor([[[0, 2], [1, 1]], [[2, 2], [0, 1]]])
IGNORED, WEIGHTS = torch.tensor([2, -100, 1]), torch.tensor([0.5, 2.0, 1.3, 1.0])


def classification(loss, *arguments, **keywords):
    """A loss of float weights, in the type of its input."""

    def call(x, target, weight=None):
        return loss(x, target, weight=None if weight is None else weight.to(x.dtype), **keywords)

    return case(call, *arguments)


def multi_margin_reference(x, target, p=1, margin=1.0):
    excess = (margin - x.gather(1, target[:, None]) + x).clamp(min=0) ** p
    return (excess * (1 - F.one_hot(target, x.shape[1]))).mean()


def multilabel_reference(x):
    total = 0
    for row, labels in zip(x, LABELS, strict=True):
        right = labels[: labels.tolist().index(-1)].tolist()
        wrong = [j for j in range(len(row)) if j not in right]
        total = total + (1 - row[right][:, None] + row[wrong]).clamp(min=0).sum()
    return total / x.numel()


LABELS = torch.tensor([[3, 0, -1, 1], [0, -1, 2, 3]])
SIGNS = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, 1.0, 1.0], [1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
LOSSES = (
    {
        "cross_entropy": classification(F.cross_entropy, normal(3, 4), CLASSES),
        "cross_entropy sum": classification(F.cross_entropy, normal(3, 4), CLASSES, reduction="sum"),
        "cross_entropy none": classification(F.cross_entropy, normal(3, 4), CLASSES, reduction="none"),
        "cross_entropy weights": classification(F.cross_entropy, normal(3, 4), CLASSES, WEIGHTS),
        "cross_entropy ignored": classification(F.cross_entropy, normal(3, 4), IGNORED, WEIGHTS),
        "cross_entropy ignored sum": classification(F.cross_entropy, normal(3, 4), IGNORED, reduction="sum"),
        "cross_entropy smoothed": classification(F.cross_entropy, normal(3, 4), CLASSES, label_smoothing=0.2),
        "cross_entropy all": classification(F.cross_entropy, normal(3, 4), IGNORED, WEIGHTS, label_smoothing=0.2),
        "cross_entropy soft": classification(F.cross_entropy, normal(3, 4), fixed(simplex(3, 4))),
        "cross_entropy soft weights": classification(
            F.cross_entropy, normal(3, 4), fixed(simplex(3, 4)), WEIGHTS, label_smoothing=0.1
        ),
        "cross_entropy soft learnt": classification(F.cross_entropy, fixed(normal(3, 4)), simplex(3, 4)),
        "cross_entropy 2d": classification(F.cross_entropy, normal(2, 3, 2, 2), PIXELS),
        "cross_entropy 2d weights": classification(
            F.cross_entropy, normal(2, 3, 2, 2), PIXELS, WEIGHTS[:3], ignore_index=2
        ),
        "cross_entropy 2d smoothed": classification(F.cross_entropy, normal(2, 3, 2, 2), PIXELS, label_smoothing=0.1),
        "cross_entropy one": classification(F.cross_entropy, normal(4), torch.tensor(2)),
        "nll of log_softmax": classification(
            lambda x, *a, **k: F.nll_loss(x.log_softmax(-1), *a, **k), normal(3, 4), CLASSES, WEIGHTS
        ),
        "nll 2d": classification(lambda x, *a, **k: F.nll_loss(x.log_softmax(1), *a, **k), normal(2, 3, 2, 2), PIXELS),
        "nll of softmax log": classification(lambda x, *a, **k: F.nll_loss(x.log(), *a, **k), simplex(3, 4), CLASSES),
        "gather of log_softmax": case(lambda x: -x.log_softmax(-1).gather(1, CLASSES[:, None]), normal(3, 4)),
    }
    | {
        f"{loss.__name__} {reduction}": case(loss, normal(3, 4), normal(3, 4), reduction=reduction)
        for loss in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
        for reduction in ("mean", "sum", "none")
    }
    | {
        "mse weights": case(
            lambda x, y, w: F.mse_loss(x, y, weight=w), normal(3, 4), fixed(normal(3, 4)), fixed(positive(3, 4))
        ),
        "mse by hand": case(lambda x, y: (x - y).pow(2).mean(), normal(3, 4), normal(3, 4)),
        "smooth_l1 beta": case(F.smooth_l1_loss, normal(3, 4), fixed(normal(3, 4)), beta=0.4),
        "smooth_l1 beta 0": case(F.smooth_l1_loss, normal(3, 4), fixed(normal(3, 4)), beta=0.0),
        "huber delta": case(F.huber_loss, normal(3, 4), fixed(normal(3, 4)), delta=0.4),
        "bce": case(F.binary_cross_entropy, probability(3, 4), fixed(probability(3, 4))),
        "bce weight none": case(
            F.binary_cross_entropy, probability(3, 4), fixed(probability(3, 4)), fixed(positive(4)), reduction="none"
        ),
        "bce target": case(F.binary_cross_entropy, fixed(probability(3, 4)), probability(3, 4)),
        "bce logits": case(F.binary_cross_entropy_with_logits, normal(3, 4), fixed(probability(3, 4))),
        "bce logits sum": case(
            F.binary_cross_entropy_with_logits, normal(3, 4), fixed(probability(3, 4)), reduction="sum"
        ),
        "bce logits weights": case(
            lambda x, y, w, p: F.binary_cross_entropy_with_logits(x, y, w, pos_weight=p, reduction="none"),
            normal(3, 4),
            fixed(probability(3, 4)),
            fixed(positive(3, 4)),
            fixed(positive(4)),
        ),
        "bce logits pos_weight": case(
            lambda x, y, p: F.binary_cross_entropy_with_logits(x, y, pos_weight=p),
            normal(3, 4),
            fixed(probability(3, 4)),
            fixed(positive(4)),
        ),
        "bce logits target": case(F.binary_cross_entropy_with_logits, fixed(normal(3, 4)), probability(3, 4)),
        "kl": case(F.kl_div, normal(3, 4), fixed(simplex(3, 4)), reduction="batchmean"),
        "kl of log_softmax": case(
            lambda x, y: F.kl_div(x.log_softmax(-1), y, reduction="sum"), normal(3, 4), fixed(simplex(3, 4))
        ),
        "kl target": case(F.kl_div, normal(3, 4), simplex(3, 4), reduction="sum"),
        "kl log_target": case(F.kl_div, normal(3, 4), fixed(normal(3, 4)), reduction="none", log_target=True),
        "kl log_target of log_softmax": case(
            lambda x, y: F.kl_div(x.log_softmax(-1), y.log(), reduction="batchmean", log_target=True),
            normal(3, 4),
            fixed(simplex(3, 4)),
        ),
        "gaussian nll": case(F.gaussian_nll_loss, normal(3, 4), fixed(normal(3, 4)), positive(3, 4)),
        "gaussian nll full": case(
            F.gaussian_nll_loss, normal(3, 4), normal(3, 4), positive(3, 1), full=True, reduction="sum"
        ),
        "gaussian nll of log std": case(
            lambda x, y, s: (s + ((y - x) ** 2 / (2 * (2 * s).exp()))).mean(),
            fixed(normal(3, 4)),
            fixed(normal(3, 4)),
            normal(3, 4),
        ),
        "Normal.log_prob mean": case(
            lambda m, x: torch.distributions.Normal(m, 0.7).log_prob(x), normal(3, 4), fixed(normal(3, 4))
        ),
        "poisson nll": case(F.poisson_nll_loss, normal(3, 4), fixed(positive(3, 4))),
        "poisson nll full": case(F.poisson_nll_loss, normal(3, 4), fixed(positive(3, 4)), full=True, reduction="sum"),
        "poisson nll rate": case(F.poisson_nll_loss, positive(3, 4), fixed(positive(3, 4)), log_input=False),
        "hinge embedding": case(F.hinge_embedding_loss, normal(3, 4), SIGNS),
        "margin ranking": case(F.margin_ranking_loss, normal(4), normal(4), SIGNS[0], margin=0.3),
        "soft margin": case(lambda x: F.soft_margin_loss(x, SIGNS.to(x.dtype)), normal(3, 4)),
        "multi margin": case(F.multi_margin_loss, normal(3, 4), CLASSES, reference=multi_margin_reference),
        "multi margin p 2": case(
            F.multi_margin_loss,
            normal(3, 4),
            CLASSES,
            p=2,
            margin=0.7,
            reference=lambda x, y: multi_margin_reference(x, y, 2, 0.7),
        ),
        "multilabel soft margin": case(
            lambda x: F.multilabel_soft_margin_loss(x, (SIGNS > 0).to(x.dtype)), normal(3, 4)
        ),
        "multilabel margin": case(
            lambda x: F.multilabel_margin_loss(x, LABELS), normal(2, 4), reference=multilabel_reference
        ),
        "triplet": case(F.triplet_margin_loss, normal(3, 4), normal(3, 4), normal(3, 4), margin=2.0),
        "triplet 1": case(
            F.triplet_margin_loss, normal(3, 4), normal(3, 4), normal(3, 4), margin=2.0, p=1.0, reduction="none"
        ),
        "clipped ratio": case(
            lambda new, old, gain: (
                -torch.min((new - old).exp() * gain, (new - old).exp().clamp(0.8, 1.2) * gain).mean()
            ),
            normal(8),
            fixed(normal(8)),
            fixed(normal(8)),
        ),
        "logsumexp loss": case(lambda x: x.logsumexp(-1).mean() - x[:, 0].mean(), normal(3, 4)),
        "sum of squares": case(lambda x: x.square().sum(), normal(3, 4)),
        "norm": case(torch.norm, normal(3, 4)),
        "squared norm": case(lambda x: x.norm() ** 2, normal(3, 4)),
    }
)


def ctc_reference(logits, blank=0):
    """−log of the sum over alignments of the labels (1, 2) in four steps, by enumeration."""
    log_p = logits.log_softmax(-1)
    steps = range(len(log_p))
    total = []
    for path in torch.cartesian_prod(*[torch.arange(3)] * len(log_p)).tolist():
        squeezed = [a for a, b in zip(path, [None, *path[:-1]], strict=True) if a != b]
        if [a for a in squeezed if a != blank] == [1, 2]:
            total.append(sum(log_p[t, path[t]] for t in steps))
    return -torch.stack(total).logsumexp(0)


LINKED = "the operands of one product depend on the same input, and only diagonals travel"
MIXED = "two operations in a row mix coordinates, and what lies off the diagonal between them is dropped"
X, W = torch.linspace(-1, 1, 20).reshape(5, 4), torch.linspace(-1, 1, 12).reshape(4, 3).cos()
ATTENTION_ERRORS = {
    "": 0.5, "causal": 0.8, "bool mask": 1.3, "float mask": 1.0, "mask per batch": 1.3, "scale": 0.4, "grouped": 2.1,
    "wider values": 0.7, "three axes": 1.1, "long": 0.9,
}  # fmt: skip

# Compositions: the case, the relative L1 error that was measured and rounded up, and why it is not zero.
APPROXIMATE = {
    "normalize": (case(F.normalize, normal(3, 4)), 1.3, LINKED),
    "cosine_similarity": (case(F.cosine_similarity, normal(3, 4), normal(3, 4)), 2.0, LINKED),
    "cosine embedding": (case(F.cosine_embedding_loss, normal(3, 4), normal(3, 4), SIGNS[0, :3]), 1.8, LINKED),
    "rms_norm": (case(lambda x, w: F.rms_norm(x, (4,), w), normal(3, 4), normal(4)), 2.4, LINKED),
    "local_response_norm": (case(F.local_response_norm, normal(1, 4, 3), size=2, alpha=0.5), 1.1, LINKED),
    "entropy": (case(lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), normal(3, 4)), 3.8, LINKED),
    "weight norm": (
        case(lambda v, g: F.linear(X.to(v.dtype), torch._weight_norm(v, g, 0)), normal(3, 4), normal(3, 1)), 1.2, MIXED
    ),
    "conv2d reflect input": (
        case(lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), w), normal(1, 1, 4, 4),
             fixed(normal(2, 1, 3, 3))), 0.1, MIXED
    ),
    "two layers": (case(lambda x, w: torch.tanh(x @ w) @ W.to(x.dtype), normal(3, 4), normal(4, 4)), 0.2, MIXED),
    "ctc": (
        case(
            lambda x: F.ctc_loss(x.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), (4,), (2,), reduction="sum"),
            normal(4, 3), reference=ctc_reference,
        ), 0.5, "the loss counts on the log-softmax before it",
    ),
} | {
    f"attention {form}".strip(): (attentions("qkv")[f"attention qkv math {form}".strip()], bound, MIXED)
    for form, bound in ATTENTION_ERRORS.items()
}  # fmt: skip
