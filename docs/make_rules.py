"""Writes docs/rules.md, the table of rules, from the registry: ``make rules``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from quadric.backprop import walk as _walk  # noqa: F401  (importing it registers the rules)
from quadric.backprop.registry import RULES, Entry
from quadric.backprop.rules import __all__ as families

PAGE = Path(__file__).with_name("rules.md")
NODES = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "autograd" / "generated" / "Functions.h"

HEAD = """\
# The table of rules

Through which operations `quadric.hessian_diagonal` carries h. Made by `make rules` from the registry and torch
{version}: do not edit it. [HesScale](hesscale.md) says what a rule is and how to add one.

The name of a node is that of `tensor.grad_fn.name()`. Names that end in `_copy` have the rule of the name without it.

- **exact**: the diagonal is exact where the Hessian with respect to the output of the operation is diagonal, as it is
  where the output goes to the loss entry by entry. An operation with several inputs is exact in each of them.
- **approximate**: not exact even there; the note says why.
- **asks for g**: the rule has a second sum, or may have: it makes use of the gradient of the output.
"""

FAMILIES = {
    "movement": "Movement of data and constant multiples",
    "elementwise": "Elementwise functions",
    "products": "Products",
    "inverses": "Inverses and determinants",
    "softmax": "Softmax",
    "norms": "Normalisation",
    "attention": "Fused attention",
    "reductions": "Reductions and scans",
    "recurrent": "Fused recurrent cells",
    "losses": "Losses",
}

OTHERS = """\
## Without a name of their own

| what | status | asks for g | |
|---|---|---|---|
| elementwise operations between one tensor and another of its shape | exact | yes | as one function: x · σ(x) |
| a custom `autograd.Function` with a static method `hessian_diagonal(ctx, g, h)` | as written | yes | |
| a name given to `quadric.register_rule` | as written | yes | |

## Missing

These nodes of torch have no rule. One of them between the loss and a parameter raises `quadric.UnsupportedOperation`,
unless a `fallback` is chosen.

| | nodes |
|---|---|
"""

# What is missing, by the first pattern that a node's name matches.
MISSING = {
    "for torch's own tests": "^Test|^Foreach.*TestAutograd",
    "derivatives of derivatives: a loss that holds gradients": "BackwardBackward|BackwardDataBackward|GammaGrad",
    "linear algebra": "^Linalg|Cholesky|Lu(Solve|Unpack)|TriangularSolve|Geqrf|Orm?qr|Householder|Renorm",
    "Fourier transforms": "^Fft",
    "complex numbers": "Complex|Polar|Conj|ViewAsReal|NegView|Angle",
    "sparse tensors": "Sparse|Coalesce|ToDense|^Values",
    "nested tensors": "Nested|ToPadded",
    "fused recurrent cells": "Rnn|Lstm|Gru",
    "other kernels of attention": "Attention",
    "operations on lists of tensors (`torch._foreach_…`)": "^Foreach",
    "quantisation": "Quantize|FakeQuant|FusedMovingAvg",
    "kernels of one kind of device": "^(Cudnn|Miopen|Mkldnn|Mps|Nnpack)|CpuFallback|^ToMkldnn",
    "other names of convolution and pooling": "Conv|^MaxPool2DBackward",
    "other forms of batch norm": "BatchNorm",
    "random numbers written in place": "^(Bernoulli|Cauchy|Exponential|Geometric|(Log)?Normal|Poisson|Random|Uniform)",
    "comparisons written in place": "^(Eq|Ge|Gt|Le|Lt|Ne)Backward",
    "special functions": "^Special|Igamma|Mvlgamma|^Polygamma|StandardGamma|Nextafter|Frexp",
    "others": "",
}  # fmt: skip
FORMULA = re.compile(r"^(?:[B-Z]|A(?! [a-z]{2})|Ln|Sin|Exp)(?=[ (])")  # what a docstring had to begin in capitals


def names_of_torch() -> list[str]:
    """Every node that torch generates, and those of its own that we have rules for."""
    generated = re.findall(r"^struct TORCH_API (\w+) :", NODES.read_text(), re.MULTILINE)
    own = [name for name in RULES if name.startswith("torch::")]
    return sorted({*own, *(name for name in generated if not name.endswith("_copy"))})


def meaning_of(entry: Entry) -> str:
    """The first sentence that a rule says of itself."""
    function = inspect.getclosurevars(entry.rule).nonlocals.get("function", entry.rule)
    sentence = (inspect.getdoc(function) or "A function of one number.").partition("\n")[0]
    sentence = FORMULA.sub(lambda start: start[0].lower(), sentence)
    return sentence.replace("``", "`").replace("|", "\\|")


def code(names: list[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def table_of(family: str, names: list[str]) -> str:
    """The rules of a family, in the order of its file."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in (name for name in RULES if name in names):
        entry = RULES[name]
        if entry.family == family:
            status = "exact" if entry.exact else "approximate"
            meaning = meaning_of(entry) + (f" Note: {entry.note}." if entry.note else "")
            rows.setdefault((status, "no" if entry.linear else "yes", meaning), []).append(name)
    lines = [f"| {code(sorted(found))} | {' | '.join(row)} |" for row, found in rows.items()]
    return "\n".join(
        [f"## {FAMILIES[family]}", "", "| nodes | status | asks for g | what |", "|---|---|---|---|", *lines]
    )


def page() -> str:
    """The whole page. Rules that a user has registered are not in it."""
    names = names_of_torch()
    without = [name for name in names if name not in RULES or RULES[name].family not in FAMILIES]
    groups: dict[str, list[str]] = {title: [] for title in MISSING}
    for name in without:
        groups[next(title for title, pattern in MISSING.items() if re.search(pattern, name))].append(name)
    tables = [table_of(family, names) for family in FAMILIES if any(e.family == family for e in RULES.values())]
    missing = [f"| {title} | {code(found)} |" for title, found in groups.items() if found and "tests" not in title]
    return (
        "\n\n".join(
            [HEAD.format(version=torch.__version__.partition("+")[0]).rstrip(), *tables, OTHERS + "\n".join(missing)]
        )
        + "\n"
    )


if __name__ == "__main__":
    assert set(FAMILIES) == set(families), "a new family of rules: give it a title in FAMILIES"
    PAGE.write_text(page())
