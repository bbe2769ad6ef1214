r"""Verify: how far is every cheap estimate of the Hessian's diagonal from the exact one, on this model and this batch?

The exact diagonal is computed by differentiating twice in float64, for a few entries of each parameter drawn at random.
The estimates run in the model's own type, as in training. Four of them do not estimate the Hessian at all but a Fisher
matrix or a square: the card says of each one what it estimates, and measures them all against the Hessian.

Cost: a double backward for each entry drawn, then a few steps of each estimate. The model is copied twice and is not
touched.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from quadric.backprop.walk import hessian_diagonal
from quadric.methods.ginger import HeaviestDirections
from quadric.methods.mfac import GradientWindow
from quadric.optimizer import require

__all__ = ["Card", "Estimate", "Layer", "Score", "verify"]

LossFunction = Callable[[Any, Any], Tensor]
Fallback = Literal["gauss_newton", "zero"]
Watch = Callable[[str, float], object]

SMALL_BATCH = 8  # examples in a piece where a model refuses single ones, or its batch norm couples them
MOST_PIECES = 256  # more examples than this are taken several at a time
TINY = 1e-30  # damping that is not seen beside a squared gradient
DECAY = 0.99  # Ginger's default
REPEATS, ENOUGH = 5, 0.5  # an estimate is timed so often, or until so many seconds are spent
ROOM = 2**25  # numbers that one batch of double backwards may keep, a quarter of a gigabyte


@dataclass(frozen=True)
class Score:
    """How an estimate compares with the exact diagonal on some entries.

    Args:
        error: relative L1 error, Σ|estimate − exact| / Σ|exact|; predicting zero has 1.
        cosine: of the angle between the two; blind to scale. NaN where either is zero.
        rank: Spearman's correlation of their signed values; blind to monotone distortion. NaN where one is constant.
    """

    error: float
    cosine: float
    rank: float


@dataclass(frozen=True)
class Estimate:
    """One way to guess the diagonal, and how it did on the whole model.

    Args:
        key: its name in ``card.errors``.
        title: its name for people, with its sample size.
        short: a name for narrow columns.
        of: which matrix's diagonal it estimates.
        seconds: for one evaluation, forward pass included.
        time: the same over the seconds of a forward and backward pass beside it.
        score: over all tensors; an entry counts for as many as it was drawn from.
    """

    key: str
    title: str
    short: str
    of: str
    seconds: float
    time: float
    score: Score


@dataclass(frozen=True)
class Layer:
    """One parameter tensor.

    Args:
        name: as in ``model.named_parameters()``.
        shape: its shape.
        entries: flat indices of the entries that were drawn.
        exact: the exact Hessian diagonal there.
        values: what each estimate says there.
        scores: how each estimate did there.
    """

    name: str
    shape: tuple[int, ...]
    entries: tuple[int, ...]
    exact: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    scores: dict[str, Score]


@dataclass(frozen=True, repr=False)
class Card:
    """The result of :func:`verify`; it prints as a table.

    Args:
        estimates: what was compared, with its score over all tensors.
        layers: the parameter tensors, in the model's order.
        loss: of the batch, in the model's own type.
        exact_loss: the same in float64.
        parameters: how many numbers the tensors hold.
        examples: in the batch; 1 where it cannot be split.
        pieces: gradients that the empirical Fisher matrix is made of; single examples where there are as many.
        step_seconds: time of one forward and backward pass.
        seed: of the entries drawn, of the probes and of the model's own random numbers.
    """

    estimates: tuple[Estimate, ...]
    layers: tuple[Layer, ...]
    loss: float
    exact_loss: float
    parameters: int
    examples: int
    pieces: int
    step_seconds: float
    seed: int

    @property
    def errors(self) -> dict[str, float]:
        """Relative L1 error of each estimate over all tensors."""
        return {estimate.key: estimate.score.error for estimate in self.estimates}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know before believing the table."""
        found = []
        if not math.isclose(self.loss, self.exact_loss, rel_tol=0.01, abs_tol=1e-6):
            found.append(
                f"the loss is {self.loss:g} in the model's type and {self.exact_loss:g} in float64: where it draws "
                "random numbers of its own, use fewer of them; else the type itself is too coarse here"
            )
        if self.pieces == 1:
            found.append("the Fisher estimates are one squared gradient: the batch is too small or cannot be split")
        elif self.pieces < self.examples:
            found.append(
                f"the Fisher estimates are made of {self.pieces} micro-batches of the {self.examples} examples"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dictionaries, tuples, strings and numbers."""
        return asdict(self) | {"notes": self.notes}

    def __str__(self) -> str:
        drawn = sum(len(layer.entries) for layer in self.layers)
        head = (
            f"diagonal of the Hessian: {drawn:,} of {self.parameters:,} entries in {len(self.layers)} tensors (seed "
            f"{self.seed}), loss {self.loss:.4g}, forward and backward {1000 * self.step_seconds:.3g} ms"
        )
        whole = [["estimate", "of", "error", "cosine", "rank", "time"]]
        for e in self.estimates:
            numbers = (e.score.error, e.score.cosine, e.score.rank)
            whole.append([e.title, e.of, *map(figure, numbers), times(e.time)])
        parts = [["error by tensor", "entries", *(e.short for e in self.estimates)]]
        for layer in self.layers:
            size = f"{len(layer.entries)}/{math.prod(layer.shape)}"
            parts.append([layer.name, size, *(figure(layer.scores[e.key].error) for e in self.estimates)])
        legend = "error: relative L1, zero has 1; rank: Spearman's; time: over forward and backward"
        return "\n".join([head, "", *_aligned(whole, 2), "", *_aligned(parts, 1), "", legend, *self.notes])

    __repr__ = __str__


def verify(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    probes: int = 10,
    entries: int = 64,
    parameters: Iterable[str | Tensor] | None = None,
    seed: int = 0,
    window: int = 32,
    rank: int = 4,
    fallback: Fallback | None = None,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Card:
    r"""Compare every estimate of the Hessian's diagonal with the exact one on random entries of each parameter.

    Estimates of the Hessian: ``hesscale`` and ``hutchinson`` (``probes`` random signs v, mean of v ∘ Hv). Of the
    Gauss–Newton matrix, which is the Hessian without the model's own curvature: ``gauss_newton``. Of the empirical
    Fisher matrix, the mean square of the gradients of single examples: ``fisher``, ``mfac`` (a window of micro-batches)
    and ``ginger`` (their heaviest directions, for each tensor). Of none: ``squared_gradient``, which Adam averages.

    Examples are separated by splitting every tensor of the batch along its first axis, which must be the same for all.
    A micro-batch of b examples counts b times its squared mean gradient. Whether the loss is a mean or a sum over
    examples is seen from the losses of the pieces.

    Cost: a double backward in float64 for each entry, in batches where torch's operations allow it.

    Args:
        model: any eager model; it, its gradients, buffers, mode and the random generators are left as they are.
        loss_fn: ``loss_fn(model, batch)`` → the scalar loss.
        batch: a tensor, or tensors in tuples, lists and dictionaries.
        probes: of Hutchinson's estimate.
        entries: drawn from each tensor; smaller tensors are taken whole.
        parameters: names or tensors to look at; all that need a gradient by default.
        seed: of entries, probes and the model's own random numbers, dropout for instance: all estimates see the same.
        window: gradients in M-FAC's window and in Ginger's average.
        rank: directions that Ginger keeps for each tensor.
        fallback: as :func:`quadric.hessian_diagonal` takes it, for operations without a rule.
        dtype: type in which HesScale carries the diagonal, as :func:`quadric.hessian_diagonal` takes it.
        watch: called with what is being done and the share that is finished.

    Raises:
        TypeError: if ``model`` is not a module, or the loss is no tensor.
        ValueError: if the loss is not a finite scalar that depends on the parameters, or an argument is out of range.
        RuntimeError: if the loss cannot be computed in float64 or differentiated twice; and
            :class:`quadric.UnsupportedOperation` for an operation without a rule.

    Example:
        One weight and the loss (3w − 1)²: the second derivative is 18, and the squared gradient at w = 1 is 12².

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight).shape
        torch.Size([1, 1])
        >>> batch = torch.tensor([[3.0]]), torch.tensor([[1.0]])
        >>> card = verify(model, lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]), batch)
        >>> card.layers[0].exact, card.layers[0].values["hesscale"], card.layers[0].values["squared_gradient"]
        ((18.0,), (18.0,), (144.0,))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: pass a torch.nn.Module")
    counts = {"probes": (probes, "10"), "entries": (entries, "64"), "window": (window, "32"), "rank": (rank, "4")}
    for name, (value, usual) in counts.items():
        require(isinstance(value, int) and value >= 1, name, value, f"{name} ≥ 1, an integer", f"{usual} is usual")
    names = _names(model, parameters)
    tell = watch or (lambda what, share: None)
    with torch.enable_grad(), torch.random.fork_rng(devices=_devices(model)):
        subject = _Subject(model, loss_fn, batch, names, seed)
        loss = subject.loss().item()  # what is wrong with the loss is said before anything takes time
        exact_subject = _Subject(model, loss_fn, batch, names, seed, exact=True)
        pieces, is_sum = _pieces(subject)
        jobs = _jobs(subject, pieces, is_sum, probes, window, rank, fallback, dtype)
        drawn = {name: _draw(p.numel(), entries, f"{seed} {name}") for name, p in subject.params.items()}
        found: dict[str, dict[str, Tensor]] = {}
        seconds, steps = {}, {}
        for done, (key, job) in enumerate(jobs.items()):
            tell(job.title, 0.5 * done / len(jobs))
            diagonal, seconds[key], steps[key] = _timed(job.run, subject.gradients, subject.devices)
            picked = zip(names, diagonal, strict=True)
            found[key] = {name: values.flatten()[drawn[name]].double().cpu() for name, values in picked}
            del diagonal
        exact_loss, exact = _exact(exact_subject, drawn, lambda share: tell("exact diagonal", 0.5 + 0.5 * share))
    layers = tuple(
        Layer(
            name=name,
            shape=tuple(subject.params[name].shape),
            entries=tuple(drawn[name]),
            exact=tuple(exact[name].tolist()),
            values={key: tuple(found[key][name].tolist()) for key in jobs},
            scores={key: score(found[key][name], exact[name]) for key in jobs},
        )
        for name in names
    )
    sizes = [p.numel() for p in subject.params.values()]
    whole = torch.cat(list(exact.values()))
    # An entry counts for as many as it was drawn from: the score is of the model, not of its small tensors.
    weight = torch.cat([x.new_full(x.shape, size / len(x)) for x, size in zip(exact.values(), sizes, strict=True)])
    estimates = tuple(
        Estimate(
            key=key,
            title=job.title,
            short=job.short,
            of=job.of,
            seconds=seconds[key],
            time=seconds[key] / steps[key],
            score=score(torch.cat(list(found[key].values())), whole, weight),
        )
        for key, job in jobs.items()
    )
    return Card(
        estimates=estimates,
        layers=layers,
        loss=loss,
        exact_loss=exact_loss,
        parameters=sum(sizes),
        examples=_examples(batch),
        pieces=len(pieces),
        step_seconds=statistics.median(steps.values()),
        seed=seed,
    )


def score(estimate: Tensor, exact: Tensor, weight: Tensor | None = None) -> Score:
    """Relative L1 error, cosine and rank correlation of some entries, each of which may stand for several.

    Example:
        >>> score(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
        Score(error=1.0, cosine=1.0, rank=1.0)
    """
    estimate, exact = estimate.double(), exact.double()
    weight = torch.ones_like(exact) if weight is None else weight.double()
    off, size = ((weight * values.abs()).sum().item() for values in (estimate - exact, exact))
    error = off / size if size else (math.inf if off else 0.0)
    a, b = (_middle_ranks(values, weight) for values in (estimate, exact))
    return Score(error, _cosine(estimate, exact, weight), _cosine(a, b, weight))


def figure(value: float | None) -> str:
    """A number of a card as it is printed: three decimals, or as many digits; a dash where there is none.

    Example:
        >>> [figure(value) for value in (0.12345, -31.416, 2e-7, 1e9, float("nan"), None)]
        ['0.123', '-31.4', '2e-07', '1e+09', '–', '–']
    """
    if value is None or not math.isfinite(value):
        return "∞" if value == math.inf else "–"
    if value and not 5e-4 <= abs(value) < 1e5:
        return f"{value:.0e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A multiple of the time of a step, as it is printed.

    Example:
        >>> [times(ratio) for ratio in (1.046, 13.16, 2657.0)]
        ['1.05×', '13.2×', '2,657×']
    """
    return f"{ratio:.3g}×" if ratio < 999.5 else f"{ratio:,.0f}×"


def _cosine(a: Tensor, b: Tensor, weight: Tensor) -> float:
    # Each over its own largest entry first: squares of second derivatives leave the range of numbers early.
    a, b = (x / x.abs().max().clamp_min(1e-300) for x in (a, b))
    norms = ((weight * a * a).sum() * (weight * b * b).sum()).sqrt()
    return ((weight * a * b).sum() / norms).clamp(-1, 1).item() if norms > 0 else math.nan


def _middle_ranks(values: Tensor, weight: Tensor) -> Tensor:
    # How many entries lie below each one, ties half, about the mean: what Spearman correlates.
    distinct, place = values.unique(return_inverse=True)
    if len(distinct) == 1:
        return torch.zeros_like(weight)
    at = weight.new_zeros(len(distinct)).index_add_(0, place, weight)
    ranks = (at.cumsum(0) - at / 2)[place]
    return ranks - weight.sum() / 2


@dataclass(frozen=True)
class _Job:
    key: str
    title: str
    short: str
    of: str
    run: Callable[[], Sequence[Tensor]]


class _Subject:
    """A copy of the model whose loss can be computed again and again, each time with the same numbers.

    Args:
        model: copied.
        loss_fn: called with the copy.
        batch: what it is called with.
        names: of the parameters looked at.
        seed: of the model's random numbers.
        exact: in float64; random numbers are drawn in the model's own type all the same, so that they are the same.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, batch: Any, names: list[str], seed: int, *, exact: bool = False
    ):
        try:
            self.model = copy.deepcopy(model)
        except RuntimeError as error:
            raise RuntimeError(
                f"the model cannot be copied ({error}): keep only parameters, buffers and detached tensors on it"
            ) from error
        for module in self.model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # a sparse gradient is the same, and has no second derivative
        self.loss_fn, self.batch, self.seed = loss_fn, batch, seed
        self.randomness: AbstractContextManager[object] = nullcontext()
        if exact:
            own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            self.randomness = _DrawnAs(own)
            self.model.double()
            self.batch = tree_map(lambda x: x.double() if _is_real(x) else x, batch)
        every = dict(self.model.named_parameters())
        for parameter in every.values():
            parameter.grad = None
        self.params = {name: every[name] for name in names}
        self.devices = _devices(self.model)
        self.buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

    def loss(self, batch: Any = None, *, seeded: bool = True) -> Tensor:
        """The loss of the batch, or of a piece of it, from the buffers and random numbers that there were at first."""
        with torch.no_grad():
            for buffer, before in self.buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        if seeded:
            torch.default_generator.manual_seed(self.seed)
            for device in self.devices:
                torch.cuda.default_generators[device].manual_seed(self.seed)
        with self.randomness:
            return _checked(self.loss_fn(self.model, self.batch if batch is None else batch))

    def gradients(self, batch: Any = None, *, twice: bool = False, seeded: bool = True) -> list[Tensor]:
        """The gradient of each parameter, zeros where there is none."""
        loss, params = self.loss(batch, seeded=seeded), list(self.params.values())
        found = torch.autograd.grad(loss, params, create_graph=twice, allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ValueError(
                "the loss depends on none of the parameters: loss_fn has to compute it with the model it is given"
            )
        if twice:
            _refuse_dead_ends(found)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def _refuse_dead_ends(gradients: Iterable[Tensor | None]) -> None:
    # What a function marked once_differentiable returns leads nowhere: torch would call its derivatives zero.
    ahead = [g.grad_fn for g in gradients if g is not None]
    seen = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function of the loss is marked once_differentiable")
        ahead += [following for following, _ in node.next_functions]


class _DrawnAs(TorchDispatchMode):
    """Random numbers of float64 tensors are drawn as another type draws them: one seed, the same noise.

    Args:
        dtype: that type.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation itself, unless it is random and its result float64."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or self.dtype == torch.float64:
            return func(*args, **kwargs)
        if func is torch.ops.aten.native_dropout.default:  # its mask alone is random
            _, mask = func(torch.ones_like(args[0], dtype=self.dtype), *args[1:], **kwargs)
            share = args[1]
            return args[0] * mask * (1 / (1 - share) if share < 1 else 0.0), mask
        lower = partial(tree_map, self._lower)
        result = func(*lower(args), **lower(kwargs))
        if func.overloadpacket.__name__.endswith("_"):
            return args[0].copy_(result)
        return tree_map(lambda x: x.double() if _is_real(x) else x, result)

    def _lower(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float64:
            return value.to(self.dtype)
        return self.dtype if value is torch.float64 else value


def _jobs(
    subject: _Subject,
    pieces: list[Any],
    is_sum: bool,
    probes: int,
    window: int,
    rank: int,
    fallback: Fallback | None,
    dtype: torch.dtype | None,
) -> dict[str, _Job]:
    """Every estimate by its key, in the order of the card."""
    micro = _split(subject.batch, min(window, len(pieces)))
    many, few = _count(len(pieces), "gradient"), _count(len(micro), "gradient")
    fisher = "empirical Fisher"
    jobs = [
        _Job("hesscale", "HesScale", "HesScale", "Hessian", lambda: _hesscale(subject, False, fallback, dtype)),
        _Job(
            "gauss_newton",
            "HesScale, Gauss–Newton form",
            "GGN",
            "Gauss–Newton",
            lambda: _hesscale(subject, True, fallback, dtype),
        ),
        _Job(
            "hutchinson",
            f"Hutchinson, {_count(probes, 'probe')}",
            "Hutchinson",
            "Hessian",
            lambda: _hutchinson(subject, probes),
        ),
        _Job("fisher", f"mean square of {many}", "Fisher", fisher, lambda: _fisher(subject, pieces, is_sum)),
        _Job("mfac", f"M-FAC, window of {len(micro)}", "M-FAC", fisher, lambda: _mfac(subject, micro, is_sum)),
        _Job(
            "ginger", f"Ginger, rank {rank} of {few}", "Ginger", fisher, lambda: _ginger(subject, micro, is_sum, rank)
        ),
        _Job("squared_gradient", "square of the gradient", "g²", "neither", lambda: _squared_gradient(subject)),
    ]
    return {job.key: job for job in jobs}


def _squared_gradient(subject: _Subject) -> Sequence[Tensor]:
    return [gradient * gradient for gradient in subject.gradients()]


def _hesscale(
    subject: _Subject, gauss_newton: bool, fallback: Fallback | None, dtype: torch.dtype | None
) -> Sequence[Tensor]:
    params = list(subject.params.values())
    return hessian_diagonal(subject.loss(), params, gauss_newton=gauss_newton, fallback=fallback, dtype=dtype)


def _hutchinson(subject: _Subject, probes: int) -> Sequence[Tensor]:
    params = list(subject.params.values())
    generator = torch.Generator().manual_seed(subject.seed)
    total = [torch.zeros_like(p) for p in params]
    with _twice_differentiable():
        gradients = subject.gradients(twice=True)
        for _ in range(probes):
            signs = [torch.randint(2, p.shape, generator=generator).mul_(2).sub_(1).to(p) for p in params]
            live = [(g, v) for g, v in zip(gradients, signs, strict=True) if g.requires_grad]
            if not live:  # a linear loss
                break
            outputs, vectors = zip(*live, strict=True)
            products = torch.autograd.grad(outputs, params, vectors, retain_graph=True, allow_unused=True)
            for sum_, v, product in zip(total, signs, products, strict=True):
                if product is not None:
                    sum_.addcmul_(v, product, value=1 / probes)
    return total


def _fisher(subject: _Subject, pieces: Sequence[Any], is_sum: bool) -> Sequence[Tensor]:
    total = [torch.zeros_like(p, dtype=torch.float32) for p in subject.params.values()]
    for weight, gradients in _piece_gradients(subject, pieces, is_sum):
        for sum_, gradient in zip(total, gradients, strict=True):
            gradient = gradient.to(sum_.dtype)
            sum_.addcmul_(gradient, gradient, value=weight / len(pieces))
    return total


def _mfac(subject: _Subject, pieces: Sequence[Any], is_sum: bool) -> Sequence[Tensor]:
    params = list(subject.params.values())
    estimate = GradientWindow(sum(p.numel() for p in params), len(pieces), TINY)
    for row in _rows(subject, pieces, is_sum):
        estimate.update(row)
    return _unflatten(estimate.matrix().diagonal(), params)


def _ginger(subject: _Subject, pieces: Sequence[Any], is_sum: bool, rank: int) -> Sequence[Tensor]:
    params = list(subject.params.values())
    sizes = [p.numel() for p in params]
    estimate = HeaviestDirections(sum(sizes), rank, DECAY, TINY, sizes=sizes)
    for row in _rows(subject, pieces, is_sum):
        estimate.update(row)
    weight = 1 - DECAY ** len(pieces)  # what the weights of the average add up to
    return _unflatten(estimate.matrix().diagonal() / weight, params)


def _rows(subject: _Subject, pieces: Sequence[Any], is_sum: bool) -> Iterator[Tensor]:
    for weight, gradients in _piece_gradients(subject, pieces, is_sum):
        yield torch.cat([g.flatten().float() for g in gradients]).mul_(weight**0.5)


def _piece_gradients(subject: _Subject, pieces: Sequence[Any], is_sum: bool) -> Iterator[tuple[float, list[Tensor]]]:
    # Each with the weight of its square in a mean over the pieces: the Fisher matrix of a mean loss is the mean of the
    # squares of single examples, or of b times the squares of means over b; that of a summed loss is the sum.
    for i, piece in enumerate(pieces):
        weight = len(pieces) if is_sum else _examples(piece)
        yield weight, subject.gradients(piece, seeded=i == 0)


def _unflatten(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def _exact(
    subject: _Subject, drawn: dict[str, list[int]], tell: Callable[[float], object]
) -> tuple[float, dict[str, Tensor]]:
    kept = 0

    def weigh(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with _twice_differentiable():
        with torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor):
            loss = subject.loss().item()
        gradients = subject.gradients(twice=True)
        result: dict[str, Tensor] = {}
        done, total = 0, sum(map(len, drawn.values()))
        for (name, places), gradient in zip(drawn.items(), gradients, strict=True):
            parameter, parts = subject.params[name], []
            for chunk in torch.tensor(places, device=parameter.device).split(max(1, ROOM // (kept + gradient.numel()))):
                parts.append(_second_derivatives(gradient, parameter, chunk))
                done += len(chunk)
                tell(done / total)
            result[name] = torch.cat(parts).cpu()
    return loss, result


def _second_derivatives(gradient: Tensor, parameter: Tensor, places: Tensor) -> Tensor:
    """The derivative of each of these entries of the gradient by its own entry of the parameter."""
    if not gradient.requires_grad:
        return gradient.new_zeros(len(places))
    rows = torch.arange(len(places), device=places.device)
    units = gradient.new_zeros(len(places), gradient.numel())
    units[rows, places] = 1
    units = units.view(len(places), *gradient.shape)

    def products(vectors: Tensor, batched: bool) -> Tensor:
        (product,) = torch.autograd.grad(
            gradient, parameter, vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return torch.zeros_like(vectors) if product is None else product

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says which operations it batches by a loop of its own
            found = products(units, True)
    except RuntimeError:  # an operation that torch cannot batch; what has no second derivative raises again here
        found = torch.stack([products(unit, False) for unit in units])
    return found.reshape(len(places), -1)[rows, places]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    # Fused attention and cuDNN's recurrent layers have no second derivative; their plain forms compute the same.
    cudnn = torch.backends.cudnn.flags(enabled=False) if torch.backends.cudnn.is_available() else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), cudnn:
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"the exact diagonal cannot be had ({error}): every operation of the loss must run in float64 and have "
                "a second derivative; write that operation in others, and pass tensors in tuples, lists or dictionaries"
            ) from error


def _timed(
    job: Callable[[], Sequence[Tensor]], step: Callable[[], object], devices: Sequence[int]
) -> tuple[Sequence[Tensor], float, float]:
    """What a job gives, its seconds, and those of a step run in turn with it: the best of a few, the first warms up."""
    own, beside = [], []
    while True:
        started = _now(devices)
        result = job()
        middle = _now(devices)
        step()
        own.append(middle - started)
        beside.append(_now(devices) - middle)
        if len(own) == REPEATS or sum(own) > ENOUGH:
            return result, min(own[1:] or own), min(beside[1:] or beside)


def _now(devices: Sequence[int]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _names(model: nn.Module, parameters: Iterable[str | Tensor] | None) -> list[str]:
    every = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not every:
        raise ValueError("no parameter of the model needs a gradient: set requires_grad of those to look at")
    if parameters is None:
        return list(every)
    wanted = [parameters] if isinstance(parameters, str | Tensor) else list(parameters)
    by_identity = {id(p): name for name, p in every.items()}
    found = {by_identity.get(id(p), p) if isinstance(p, Tensor) else p for p in wanted}
    for unknown in found - every.keys():
        shown = f"a tensor of shape {tuple(unknown.shape)}" if isinstance(unknown, Tensor) else repr(unknown)
        raise ValueError(
            f"parameters holds {shown}, which is no parameter of the model that needs a gradient: "
            f"choose from model.named_parameters(), such as {next(iter(every))!r}"
        )
    if not found:
        raise ValueError("parameters is empty: leave it out to look at all of them")
    return [name for name in every if name in found]


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}: return the loss as a tensor, with its graph")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)} and type {loss.dtype}: "
            "return one real number, for example its mean"
        )
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {loss.item()}: look for the overflow in it, or take another batch")
    if not loss.requires_grad:
        raise ValueError("the loss has no graph: loss_fn must not detach it, nor compute it under torch.no_grad")
    return loss.reshape(())


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _draw(count: int, entries: int, seed: str) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), min(count, entries)))


def _examples(batch: Any) -> int:
    """How long the first axis is that all tensors of the batch share; 1 where they do not."""
    lengths = {x.shape[0] if x.ndim else 1 for x in tree_leaves(batch) if isinstance(x, Tensor)}
    return max(1, lengths.pop()) if len(lengths) == 1 else 1


def _split(batch: Any, count: int) -> list[Any]:
    """The batch in so many pieces, as equal as can be."""
    if count == 1:
        return [batch]
    ends = [_examples(batch) * i // count for i in range(count + 1)]
    return [tree_map(lambda x, a=a, b=b: x[a:b] if isinstance(x, Tensor) else x, batch) for a, b in pairwise(ends)]


def _pieces(subject: _Subject) -> tuple[list[Any], bool]:
    """The batch in pieces as small as the model allows, and whether the loss is a sum over examples, not a mean."""
    coupled = any(isinstance(module, _BatchNorm) and module.training for module in subject.model.modules())
    whole, examples = subject.loss().item(), _examples(subject.batch)
    for size in (SMALL_BATCH,) if coupled else (1, SMALL_BATCH):
        pieces = _split(subject.batch, max(1, min(examples // size, MOST_PIECES)))
        try:
            losses = [subject.loss(piece).item() for piece in pieces]
        except Exception:  # user code that cannot take so few examples, in whichever way it says so
            continue
        mean = statistics.fmean(losses)
        return pieces, abs(sum(losses) - whole) < abs(mean - whole)
    return [subject.batch], False


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _aligned(rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """Rows as lines: so many columns of words to the left, then figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < words else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
