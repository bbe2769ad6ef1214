r"""ISAAC: the gradient of a layer's weight, conditioned by the layer's inputs inside the backward.

Beside the outputs' side, the Gauss–Newton matrix of a linear layer has the second moment aᵀa/B of its inputs, which is
at hand before any gradient. The weight gradient gᵀa is multiplied by the inverse of the damped moment, and by λ so that
it keeps its size where the moment is small:

    ζ* = λ gᵀa (aᵀa/B + λI)⁻¹ = gᵀ (I + aaᵀ/(Bλ))⁻¹ a

Where there are fewer rows B than features n, the second form meets a B × B matrix and one of the two factors, before
their product is taken; otherwise an n × n matrix meets the smaller of the input and the product. Of many rows a random
sample stands for all in the moment.

Cost beside the layer's 6 B n o: about 2 B² (n + o) or 2 n² (B + o), and a factorisation of the small matrix.

Paper: arXiv 2305.00604 (ICLR 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, _foreach_add_, _foreach_mul_, nn  # pyright: ignore[reportPrivateImportUsage]

from quadric.curvature import Curvature, Schedule, damping_at
from quadric.layers.handle import Conditioning, Layer
from quadric.layers.maps import Linear, Map, Sizes
from quadric.layers.targets import Choice, Target
from quadric.matrix import Dense, Diagonal
from quadric.optimizer import Block, CurvatureOptimizer, require
from quadric.tiles import Tiles

__all__ = ["ISAAC", "InputMoment", "isaac", "relative"]

TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
LITTLE = 2**25  # multiplications and additions that take about as long as the bookkeeping of a layer
INVERSE = 4  # a factorisation and inverse of k × k take as long as products of so many k³ multiplications and additions


# The damping.


@dataclass(frozen=True)
class relative:
    r"""A damping in units of the mean square of a layer's inputs, :math:`\lambda = c\,\mathrm{tr}(a^\top a/B)/n`.

    One value then serves layers of any width and scale; the groups of a convolution share it.

    Args:
        share: c, positive, or a schedule of it over the number of passes.

    Raises:
        ValueError: if it is not positive and finite.

    Example:
        Rows (2, 0) and (0, 2): the moment is 2 I, so λ = 0.5 · 2 and every eigenvalue is 2 + 1.

        >>> estimate = InputMoment(2, damping=relative(0.5))
        >>> estimate.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        >>> estimate.matrix().diagonal()
        tensor([3., 3.])
    """

    share: Schedule

    def __post_init__(self) -> None:
        damping_at(self.share, 0)

    def __call__(self, updates: int) -> float:
        """C after so many passes."""
        return damping_at(self.share, updates)


Damping = Schedule | relative


def damping_now(damping: Damping, passes: int) -> Damping:
    """The damping of a pass, no longer a schedule."""
    level = damping_at(damping, passes)
    return relative(level) if isinstance(damping, relative) else level


# The mathematics. The moment is damped as rows are: ρ = λ·rows beside a sum over rows.


def summed_damping(damping: Damping, passes: int, rows: Tensor) -> Tensor | float:
    """The ρ of rows, ``(..., rows, columns)``; a number where nobody differentiates it or would wait for it."""
    level = damping_at(damping, passes)
    if not isinstance(damping, relative):
        return rows.shape[-2] * level
    flat = rows.reshape(-1)
    columns, least = rows.numel() / rows.shape[-2], TINY[rows.dtype]  # where all inputs are zero, any damping serves
    waits = rows.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    if torch.is_grad_enabled() or not waits:
        return (flat.dot(flat) * (level / columns)).clamp_min(least)
    return max(flat.dot(flat).item() * level / columns, least)


class Smoother(NamedTuple):
    """What the damping leaves of a sum over rows.

    Args:
        matrix: ρ (S + ρI)⁻¹, eigenvalues between 0 and 1.
        rho: ρ, as it had to be.
        raised: Whether it had to be raised.
    """

    matrix: Tensor
    rho: Tensor | float
    raised: bool


def smoother_of(left: Tensor, right: Tensor | None, rho: Tensor | float) -> Smoother | None:
    """``ρ (left right + ρI)⁻¹``, with a larger ρ where rounding has hidden it; None where it is not finite.

    The inverse is formed, because products with a small dense matrix run several times faster than triangular solves.

    Args:
        left: ``(..., k, m)``, or S itself.
        right: ``(..., m, k)``; None where ``left`` is S.
        rho: ρ.
    """
    size, raised = left.shape[-2], False
    while True:
        eye = identity(size, left.dtype, left.device)
        if not isinstance(rho, float):
            damped = (left if right is None else left @ right) / rho + eye
        elif right is not None and left.ndim == 2:
            damped = torch.addmm(eye, left, right, alpha=1 / rho)
        else:
            damped = torch.add(eye, left if right is None else left @ right, alpha=1 / rho)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if torch._C._are_functorch_transforms_active():  # where a value may not decide anything
            matrix = torch.cholesky_inverse(factor)
            return Smoother(torch.where((failed > 0)[..., None, None], math.nan, matrix), rho, False)
        if not bool(failed if failed.ndim == 0 else failed.any()):
            return Smoother(torch.cholesky_inverse(factor), rho, raised)
        largest = damped.detach().diagonal(dim1=-2, dim2=-1).max() * rho
        rho, raised = 10 * rho + size * torch.finfo(left.dtype).eps * largest.item(), True
        if not math.isfinite(rho):
            return None


def identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity; small ones, in which a layer may spend much of its time, are kept."""
    return _kept_identity(size, dtype, device) if size <= 256 else torch.eye(size, dtype=dtype, device=device)


_kept_identity = lru_cache(maxsize=64)(lambda size, dtype, device: torch.eye(size, dtype=dtype, device=device))


class Way(NamedTuple):
    """A way to compute ζ.

    Args:
        name: For people.
        flops: Multiplications and additions beside those of the plain layer.
    """

    name: str
    flops: float


@lru_cache(maxsize=1024)
def cheapest(sizes: Sizes, looked: int, sides: tuple[int, int], some: bool) -> Way:
    """The cheapest way to condition a gradient by so many of the rows.

    Args:
        sizes: Of the map.
        looked: Rows that the moment is taken of.
        sides: Of the map: :meth:`quadric.layers.maps.Map.smaller_sides`.
        some: Whether the map can mix some of the rows, as a linear layer can.
    """
    groups, r, n, o = sizes
    s, (columns, smoothed) = looked, sides
    ways = [
        Way("features", 2 * s * n * n + INVERSE * n**3 + 2 * n * n * smoothed),
        Way("sampled rows", 2 * s * s * n + INVERSE * s**3 + 4 * o * n * s + 2 * o * s * s),
    ]
    if s == r:
        ways.append(Way("rows", 2 * r * r * n + INVERSE * r**3 + 2 * r * r * columns))
    elif some:
        ways.append(Way("mixed rows", 2 * r * s * (n + o) + INVERSE * s**3 + 2 * s * s * o))
    best = min(ways, key=lambda way: way.flops)
    return best._replace(flops=groups * best.flops)


@lru_cache(maxsize=1024)
def most_rows(sizes: Sizes, sides: tuple[int, int]) -> int | None:
    """None, for all rows, where they are a usual batch or cost little; otherwise a number that did as well."""
    groups, r, n, o = sizes
    exact = cheapest(sizes, r, sides, some=False).flops
    return None if r <= 512 or exact <= max(LITTLE, 6 * groups * r * n * o / 10) else 64


def average_cost(sizes: Sizes, looked: int, smoothed: int, every: int) -> float:
    """The extra flops where a moment is looked at now and then, and its inverse meets so many rows of numbers."""
    groups, _, n, _ = sizes
    return groups * (2 * n * n * smoothed + (2 * looked * n * n + INVERSE * n**3) / every)


def condition(
    kind: Map, g: Tensor, a: Tensor, weight: Tensor, picks: Tensor | None, damping: Damping, passes: int, way: str
) -> tuple[Tensor, bool]:
    """ζ* of one map: the conditioned gradient of its weight, and whether the damping had to be raised.

    Args:
        kind: The map.
        g: The gradient of its output.
        a: Its input.
        weight: Its weight.
        picks: The rows that stand for all in the moment; None takes all.
        damping: λ.
        passes: So far, for a schedule of λ.
        way: One of :func:`cheapest`.
    """
    dtype = a.dtype if a.dtype in TINY else torch.float32
    rows = kind.rows(g, a, weight, picks).to(dtype)
    rho = summed_damping(damping, passes, rows)
    cross = kind.rows(g, a, weight, None).to(dtype) @ rows.mT if way == "mixed rows" else rows
    if way == "mixed rows":
        smoother = smoother_of(cross.index_select(0, picks), None, rho)  # pyright: ignore[reportArgumentType]
    else:
        smoother = smoother_of(*((rows.mT, rows) if way == "features" else (rows, rows.mT)), rho)
    if smoother is None:  # the plain gradient shows what is wrong with the inputs, or nothing is wrong with it
        return kind.weight_gradient(g, a, weight), False
    matrix, rho, raised = smoother
    if way == "features":
        gradient = kind.smoothed_gradient(g, a, weight, matrix)
    elif way == "rows":
        gradient = kind.mixed_gradient(g, a, weight, lambda factor: (matrix @ factor.to(dtype)).to(factor.dtype))
    elif way == "sampled rows":
        gradient = kind.matrix(kind.weight_gradient(g, a, weight)).to(dtype)
        reduce = torch.addmm if gradient.ndim == 2 else torch.baddbmm
        gradient = kind.weight(reduce(gradient, (gradient @ rows.mT) @ (matrix / rho), rows, alpha=-1), weight)
    else:
        flat = kind.output_rows(g, a, weight, None)
        part = (matrix / rho) @ (cross.mT @ flat.to(dtype))
        mixed = flat.index_add(0, picks, part.to(flat.dtype), alpha=-1)  # pyright: ignore[reportArgumentType]
        gradient = kind.weight_gradient(mixed, a, weight)
    return gradient.to(weight.dtype), raised


def single(rows: Tensor) -> Tensor:
    """Rows without their graph, in float32 at least: what moments are taken of."""
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))


def sample(rows: int, most: int, device: torch.device) -> Tensor | None:
    """Numbers of ``most`` of the rows, one drawn from each of as many equal stretches; None for all of them."""
    if rows <= most:
        return None
    double = {"dtype": torch.float64, "device": device}
    # A transform of torch.func would not let numbers be drawn: there it is the middle of each stretch.
    drawn = 0.5 if torch._C._are_functorch_transforms_active() else torch.rand(most, **double)
    return torch.arange(most, **double).add_(drawn).mul_(rows / most).long().clamp_(max=rows - 1)


# The estimate.


class InputMoment(Curvature):
    r"""The second moment of a layer's inputs: of the last batch, or an average over batches that forgets.

    .. math::
        G = \lambda I + M, \qquad
        M \leftarrow a^\top a/B \quad\text{or}\quad M \leftarrow \beta M + (1-\beta)\, a^\top a/B

    Averages are bias-corrected: after one batch they are that batch's.

    Cost: 2 B n² an update. Memory: n² numbers.

    Args:
        features: n, the length of a row.
        damping: λ, positive, or a schedule of it, or :func:`relative` to the mean of M's diagonal.
        decay: β, or None to keep only the last batch.
        groups: matrices side by side, each over ``features`` columns of the rows.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        One row (3, 4): its outer product, plus λ.

        >>> estimate = InputMoment(2, damping=1.0)
        >>> estimate.update(torch.tensor([[3.0, 4.0]]))
        >>> estimate.matrix().to_dense()
        tensor([[10., 12.],
                [12., 17.]])
    """

    moment: Tensor  # (groups, n, n), the average not yet corrected for its start

    def __init__(self, features: int, damping: Damping = 1.0, *, decay: float | None = None, groups: int = 1):
        super().__init__(Tiles([features * groups]), damping)
        averages = decay is None or 0 <= decay < 1
        require(averages, "decay", decay, "0 ≤ decay < 1", "None keeps the last batch alone, 0.9 averages")
        self.features, self.groups, self.decay = features, groups, decay
        self.register_buffer("moment", torch.empty(0))
        self._smoother: Tensor | None = None  # until the next update
        self.raised = False  # whether it took more damping

    @torch.no_grad()
    def update(self, observation: Tensor) -> None:
        """Learn from the inputs of one batch.

        Args:
            observation: rows of inputs, ``(rows, features · groups)``; a vector is one row.

        Raises:
            ValueError: if it has another shape or holds a number that is not finite; nothing is changed then.
        """
        if observation.ndim not in (1, 2) or observation.shape[-1] != self.dim or not observation.numel():
            raise ValueError(
                f"the observation has shape {tuple(observation.shape)}, but this estimate has {self.dim} columns: pass "
                f"rows of inputs as (rows, {self.dim})"
            )
        self.check(observation, True)
        self.absorb(observation.reshape(-1, self.groups, self.features).movedim(1, 0))

    def absorb(self, observation: Tensor) -> None:
        """:meth:`update` for rows of each group, ``(groups, rows, features)``, known to be finite."""
        rows = single(observation)
        self.blend(rows.mT @ rows / rows.shape[-2])

    def blend(self, moment: Tensor) -> None:
        """:meth:`absorb` for the second moment of a batch, ``(groups, n, n)``."""
        past = 0.0 if self.decay is None else self.decay
        new = moment * (1 - past)
        self.moment = new if not self.moment.numel() else self.moment.to(new) * past + new
        self.updates += 1
        self._smoother = None

    def moved(self, device: torch.device) -> InputMoment:
        """The same estimate, on another device."""
        self.moment, self._smoother = self.moment.to(device), None
        return self

    def average(self) -> Tensor:
        """M, ``(groups, n, n)``."""
        if not self.updates:
            return torch.zeros(self.groups, self.features, self.features)
        return self.moment if self.decay is None else self.moment / (1 - self.decay**self.updates)

    def level(self) -> float:
        """λ, now."""
        level = self.damping_now()
        if not isinstance(self.damping, relative):
            return level
        return max(level * self.average().diagonal(dim1=1, dim2=2).mean().item(), TINY[self.average().dtype])

    def matrix(self) -> Dense:  # noqa: D102
        return Dense(self.average(), self.level())

    def smoother(self) -> Tensor | None:
        """``λ (M + λI)⁻¹``, ``(groups, n, n)``, made once after an update; None for the identity, before the first."""
        if self._smoother is None and self.updates:
            made = smoother_of(self.average(), None, self.level())
            if made is not None:
                self._smoother, _, self.raised = made
        return self._smoother

    def shared(self) -> dict[str, Tensor]:  # noqa: D102
        return super().shared() | {"moment": self.moment.clone()}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:  # noqa: D102
        super().restore(shared, columns)
        self.moment, self._smoother = shared["moment"].clone(), None


# The layers of a model.


class ConditionedLayer(Layer):
    """One weight whose gradient is ζ*, or the two-sided ζ."""

    def __init__(self, target: Target, start: int | None, handle: Conditioning):
        super().__init__(target, start, handle)
        self.passes = 0
        self.sizes = Sizes(0, 0, 0, 0)  # of the last pass, as the next three
        self.looked = 0
        self.way = Way("", 0.0)
        self.raised = False
        self.moments: dict[str, InputMoment] = {}  # by side and shape, where more than this batch counts
        self.kind: Map | None = None  # of what is pooled
        self.task = -1  # the last backward that pooled

    def __call__(self, kind: Map, g: Tensor, a: Tensor, weight: Tensor) -> Tensor | None:
        """The gradient of the weight; None where only its outputs are looked at."""
        sizes = kind.sizes(g, a, weight)
        if 0 in sizes:
            return kind.weight_gradient(g, a, weight)
        self.choose_way(kind, sizes)
        if a.device.type == "meta" or hasattr(a, "fake_mode"):  # shapes are all there is
            return kind.weight_gradient(g, a, weight)
        if torch.is_autocast_enabled(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return self.gradient(kind, g, a, weight)
        return self.gradient(kind, g, a, weight)

    def choose_way(self, kind: Map, sizes: Sizes) -> None:
        """Decide how many rows to look at, and what to do with them."""
        settings, sides = self.handle.settings, kind.smaller_sides(sizes)
        every, most = settings["refresh_every"], settings["max_rows"]
        if most == "auto":
            most = most_rows(sizes, sides)
        self.sizes, self.looked = sizes, sizes.rows if most is None else min(most, sizes.rows)
        if settings["pooled"]:
            self.way = Way("pooled", average_cost(sizes, self.looked, sizes.outputs, 1))
        elif settings["decay"] is not None or every > 1:
            self.way = Way("average", average_cost(sizes, self.looked, sides[1], every))
        else:
            self.way = cheapest(sizes, self.looked, sides, isinstance(kind, Linear))

    def gradient(self, kind: Map, g: Tensor, a: Tensor, weight: Tensor) -> Tensor | None:
        """:meth:`__call__`, in the way that is chosen."""
        settings, way = self.handle.settings, self.way.name
        picks = sample(self.sizes.rows, self.looked, a.device)
        if self.handle.observing:
            self.learn("outputs", kind.output_rows(g, a, weight, picks))
            return None
        looks, self.raised = self.passes % settings["refresh_every"] == 0, False
        self.passes += 1
        if way == "pooled":
            self.add_to_pool(kind, kind.rows(g, a, weight, picks), weight)
            return kind.weight_gradient(g, a, weight)
        if way == "average":
            if looks:
                self.learn("inputs", kind.rows(g, a, weight, picks))
            smoother = self.smoother("inputs", weight.device)
            if smoother is None:
                gradient = kind.weight_gradient(g, a, weight)
            else:
                gradient = kind.smoothed_gradient(g, a, weight, smoother)
        else:
            gradient, self.raised = condition(kind, g, a, weight, picks, settings["damping"], self.passes, way)
        if settings["output_damping"] is not None:
            if looks and not self.handle.sampled:
                self.learn("outputs", kind.output_rows(g, a, weight, picks))
            smoother = self.smoother("outputs", weight.device)
            if smoother is not None:
                gradient = kind.weight(smoother @ kind.matrix(gradient).to(smoother.dtype), weight)
        if self.raised:
            self.warn()
        return gradient.to(weight.dtype)

    def moment(self, side: str) -> InputMoment:
        """The moment of one side, under the settings of now."""
        settings, (groups, _, features, outputs) = self.handle.settings, self.sizes
        columns = features if side == "inputs" else outputs
        key = f"{side} {groups}x{columns}"  # a module of the user's may multiply by several forms of its weight
        if key not in self.moments:
            self.moments[key] = InputMoment(columns, groups=groups)
        moment = self.moments[key]
        moment.damping = damping_now(settings["damping" if side == "inputs" else "output_damping"], self.passes)
        moment.decay = settings["decay"]
        return moment

    def smoother(self, side: str, device: torch.device) -> Tensor | None:
        """What the moment of one side multiplies a gradient by, as the map's matrices are shaped; None for nothing."""
        moment = self.moment(side)
        smoother = moment.smoother()
        if smoother is not None and smoother.device != device:  # the model was moved, or a file was read elsewhere
            smoother = moment.moved(device).smoother()
        self.raised |= moment.raised
        return smoother[0] if smoother is not None and self.sizes.groups == 1 else smoother

    def learn(self, side: str, rows: Tensor) -> None:
        """Add rows, ``(..., rows, columns)``, to the moment of one side, unless one of them is not finite."""
        self.refuse_transforms()
        rows = single(rows)
        if side == "outputs":
            rows = rows * self.sizes.rows  # the mean over rows is not theirs
        if bool(torch.isfinite(rows).all()):
            self.moment(side).absorb(rows.reshape(-1, *rows.shape[-2:]))

    def add_to_pool(self, kind: Map, rows: Tensor, weight: Tensor) -> None:
        """Add rows to what the next step will condition its gradient by, unless one of them is not finite.

        Raises:
            RuntimeError: if the weight is computed from the one whose gradient will be conditioned.
        """
        self.refuse_transforms()
        own = self.weight[self.part()]
        if own.shape != weight.shape:
            raise RuntimeError(
                f"{self.name} has the shape {tuple(own.shape)} and is multiplied by as {tuple(weight.shape)}, but "
                "pooled statistics condition the gradients of whole weights: use pooled=False, or name it in ignore"
            )
        task = torch._C._current_graph_task_id()  # a layer may be used several times in one backward
        if self.weight.grad is None and task != self.task and self.pool is not None:  # the step was skipped
            if not self.handle.pooled:
                self.handle.say_once(
                    "pool",
                    f"the pooled statistics of {self.name} were never used: call handle.attach(optimizer), or "
                    "handle.condition_() before each step",
                )
            self.pool, self.pool_rows = None, 0.0
        self.kind, self.task = kind.plain(), task
        if bool(torch.isfinite(rows).all()):
            rows = single(rows)
            gram = rows.mT @ rows * (self.sizes.rows / rows.shape[-2])
            self.pool = gram if self.pool is None else self.pool.to(gram) + gram
            self.pool_rows += self.sizes.rows

    def part(self) -> slice:
        """The rows of the weight that this is the gradient of."""
        return slice(None) if self.start is None else slice(self.start, self.start + self.sizes.outputs)

    def warn(self) -> None:
        """Say that more damping was used."""
        self.handle.say_once(
            "damping",
            f"a damped moment of {self.name} had no Cholesky factor, and more damping was used than "
            f"{self.handle.settings['damping']}: raise it, or look for inputs that are huge",
        )

    def refuse_transforms(self) -> None:
        """Raise inside a transform of ``torch.func``, which may not change what a layer keeps."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{self.name} would have to keep a moment, and a transform of torch.func may not change it: call isaac "
                "with decay=None, refresh_every=1, pooled=False and output_damping=None there"
            )

    def condition_pooled_(self, pool: Tensor, rows: float) -> None:
        weight, kind, self.raised = self.weight, self.kind, False
        if weight.grad is None or kind is None or not rows:
            return
        moment = self.moment("inputs")
        moment.blend((pool / rows).reshape(moment.groups, moment.features, moment.features))
        smoother = self.smoother("inputs", weight.device)
        if smoother is not None:
            gradient = weight.grad[self.part()]
            gradient.copy_(kind.weight(kind.matrix(gradient).to(smoother.dtype) @ smoother, gradient))
        if self.raised:
            self.warn()

    def state(self) -> dict[str, Tensor]:
        if not self.passes and not self.moments:
            return {}
        kept = {f"{side}.{key}": value for side, m in self.moments.items() for key, value in m.shared().items()}
        return kept | {"passes": torch.tensor(self.passes)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.passes = int(state.get("passes", 0))
        self.moments = {}
        for side in {key.partition(".")[0] for key in state} - {"passes"}:
            own = {key.removeprefix(f"{side}."): value for key, value in state.items() if key.startswith(f"{side}.")}
            groups, features = own["moment"].shape[:2]
            self.moments[side] = InputMoment(features, groups=groups)
            self.moments[side].restore(own, {})

    def seen(self) -> tuple[str, ...] | None:
        if not self.looked:
            return None
        groups, rows, features, outputs = self.sizes
        extra = self.way.flops / (6 * groups * rows * features * outputs)
        return str(features), str(outputs), str(rows), str(self.looked), self.way.name, f"{100 * extra:.2g} %"


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: if one is.
    """
    for name in ("damping", "output_damping"):
        level = settings[name](1) if callable(settings[name]) else settings[name]
        positive = isinstance(level, (int, float)) and 0 < level < math.inf
        absent = name == "output_damping" and level is None
        require(positive or absent, name, level, f"0 < {name} < ∞", "quadric.relative(1.0) is a start")
    InputMoment(1, decay=settings["decay"])
    every, most = settings["refresh_every"], settings["max_rows"]
    require(_count(every), "refresh_every", every, "refresh_every ≥ 1, an integer", "1 looks at every batch")
    known = most is None or most == "auto" or _count(most)
    require(known, "max_rows", most, "max_rows ≥ 1, an integer, None or 'auto'", "None looks at all rows")
    other = settings["output_damping"]
    one_sided = other is None or not settings["pooled"]
    require(one_sided, "output_damping", other, "output_damping is None where pooled=True", "choose one of the two")


def checked(model: Any) -> nn.Module:
    """A model, and nothing else.

    Raises:
        ValueError: if it is something else, such as its parameters.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass it, not its parameters")
    return model


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def isaac(
    model: nn.Module,
    damping: Damping = 1.0,
    *,
    targets: Choice = None,
    ignore: Choice = None,
    output_damping: Damping | None = None,
    decay: float | None = None,
    refresh_every: int = 1,
    max_rows: int | Literal["auto"] | None = "auto",
    pooled: bool = False,
) -> Conditioning:
    r"""Condition the weight gradients of a model's layers by their inputs, inside the backward, for any optimizer.

    .. math::
        \zeta^* = \lambda\, g^\top a\, (a^\top a/B + \lambda I)^{-1}

    Outputs, input gradients and bias gradients keep their bits; so do types, parameters and files of the model.

    Cost: see :mod:`quadric.methods.isaac`; print the handle after a backward to see it layer by layer.

    Args:
        model: linear layers, convolutions, transposed convolutions and attentions in it are conditioned, each use of a
            layer by the rows of that use.
        damping: λ in units of the inputs' squares, or a schedule over the passes, or :func:`relative`.
        targets: patterns of names of weights or of modules around them, or types of modules, to condition only these; a
            module that is no layer of torch is conditioned if it is named and calls ``F.linear`` or a convolution.
        ignore: the same, to leave alone.
        output_damping: λ_g of the two-sided :math:`\zeta = \lambda_g(\bar g^\top\bar g/B + \lambda_g I)^{-1}\zeta^*`,
            with ḡ = B g; use :func:`relative` under a GradScaler. None leaves the outputs' side out.
        decay: factor of the past in an average of moments; None conditions by the batch alone.
        refresh_every: passes of a layer from one look at the moments to the next.
        max_rows: of more rows than these (tokens, positions) a random sample stands for all in the moments; None looks
            at all, "auto" too up to 512, and of more where that costs less than a tenth of the layer or next to
            nothing, and otherwise at 64.
        pooled: one moment for all passes and all processes since the last step, met by the complete gradient: call
            ``handle.attach(optimizer)``. Otherwise each micro-batch and each replica is conditioned by its own inputs.

    Raises:
        ValueError: if a setting is out of range, a pattern matches nothing, or a forward is replaced already.

    Example:
        One row a = (1, 1), λ = 1: the moment has the eigenvalue 2 along a, so the gradient is divided by 2 + 1.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> handle = isaac(layer, damping=1.0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad
        tensor([[0.3333, 0.3333]])
        >>> handle.remove()

    Paper: arXiv 2305.00604.
    """
    settings = {
        "damping": damping,
        "output_damping": output_damping,
        "decay": decay,
        "refresh_every": refresh_every,
        "max_rows": max_rows,
        "pooled": pooled,
    }
    check_settings(settings)
    return Conditioning(checked(model), settings, targets, ignore, ConditionedLayer)


# The optimizer.


class Conditioned(Curvature):
    """What is left to learn of gradients that arrive conditioned: nothing; it carries the moments of the layers.

    Args:
        dim: Coordinates.
        handle: Whose state travels with it; None for none.
    """

    def __init__(self, dim: int, handle: Conditioning | None):
        super().__init__(Tiles([dim]), 1.0)
        self.handle = handle

    def absorb(self, observation: Tensor) -> None:
        self.updates += 1

    def matrix(self) -> Diagonal:
        """The identity."""
        return Diagonal(torch.ones(self.dim))

    def shared(self) -> dict[str, Tensor]:
        return super().shared() | ({} if self.handle is None else self.handle.state_dict())

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:
        super().restore(shared, columns)
        if self.handle is not None:
            self.handle.load_state_dict(shared)


class ISAAC(CurvatureOptimizer):
    r"""Stochastic gradient descent on gradients conditioned by :func:`isaac`.

    .. math::
        b \leftarrow \mu b + \zeta^*, \qquad \theta \leftarrow (1 - \eta\,\text{wd})\,\theta - \eta b

    Cost: that of :func:`isaac` in the backward, and four passes over the parameters. Memory: 2 numbers a parameter, and
    n² for each layer where moments are kept.

    Args:
        model: as in :func:`isaac`; all its parameters are trained.
        lr: learning rate η.
        damping: λ, as in :func:`isaac`.
        momentum: μ.
        targets: weights to condition, as in :func:`isaac`.
        ignore: weights to leave alone.
        output_damping: λ_g of the two-sided ζ.
        decay: factor of the past in an average of moments.
        refresh_every: passes from one look at the moments to the next.
        max_rows: the most rows that a moment is taken of; "auto" bounds the cost.
        pooled: one moment for all passes and processes since the last step.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        One row (1, 1) and λ as large as the mean square of its entries, 1: the gradient is divided by 2 + 1.

        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> optimizer = ISAAC(model, lr=0.3)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.tolist()
        [[-0.10000000149011612, -0.10000000149011612]]

    Paper: arXiv 2305.00604.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        damping: Damping = relative(1.0),
        momentum: float = 0.9,
        targets: Choice = None,
        ignore: Choice = None,
        output_damping: Damping | None = None,
        decay: float | None = None,
        refresh_every: int = 1,
        max_rows: int | Literal["auto"] | None = "auto",
        pooled: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "output_damping": output_damping,
            "decay": decay,
            "refresh_every": refresh_every,
            "max_rows": max_rows,
            "pooled": pooled,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(checked(model).parameters(), defaults)
        self.handle = Conditioning(model, self.param_groups[0], targets, ignore, ConditionedLayer)

    def check(self, group: dict[str, Any]) -> None:  # noqa: D102
        super().check(group)
        check_settings(group)
        momentum = group["momentum"]
        require(0 <= momentum < 1, "momentum", momentum, "0 ≤ momentum < 1", "0.9 is usual")

    def step(self, closure: Any = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model and returns the loss; run with gradients enabled.

        Raises:
            RuntimeError: if a gradient is not finite; no parameter is changed then.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if self.handle.settings["pooled"]:
            self.handle.condition_()
        super().step()
        return loss

    def curvature(self, params: list[list[Tensor]], group: dict[str, Any]) -> Conditioned:  # noqa: D102
        first = group is self.param_groups[0] and not self._blocks[0]
        return Conditioned(sum(p.numel() for p in params[0]), self.handle if first else None)

    def direction(self, block: Block, gradient: Tensor, group: dict[str, Any]) -> Tensor:  # noqa: D102
        block.curvature.absorb(gradient)
        momentum = block.buffer("momentum_buffer")
        _foreach_mul_(block.live(momentum), group["momentum"])
        _foreach_add_(block.live(momentum), block.live(gradient))
        return momentum

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "handle": self.handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "handle" in state:  # torch's load_state_dict brings none
            self.handle: Conditioning = state["handle"]
        super().__setstate__({name: value for name, value in state.items() if name != "handle"})
        self.handle.settings = self.param_groups[0]
        for place, group in enumerate(self.param_groups):  # before the next backward, which moves the moments
            self._restore(place, group)
