"""Gradual pruning: a little at a time while training goes on, with curvature from where the weights are by then."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from quadric.optimizer import is_number, require, whole
from quadric.pruning.gradients import LossFunction
from quadric.pruning.masks import HeldMasks, Masks, hold_masks, optimizers_of
from quadric.pruning.operation import Request
from quadric.pruning.patterns import find_pattern
from quadric.pruning.prune import prune
from quadric.pruning.result import PruneResult

__all__ = ["GradualPruner"]

Schedule = Literal["cubic", "geometric"]
OPTIONS = inspect.signature(prune).parameters.keys() - {"model", "sparsity", "final", "masks"}


class GradualPruner:
    r"""Prunes a model step by step while any loop trains it, and holds the masks in between and afterwards.

    After t steps of the optimizer, at t = ``start``, ``start + every``, … and ``end``, the sparsity becomes

    .. math::
        s_t = s_f + (s_i - s_f) \Big(1 - \frac{t - t_0}{t_1 - t_0}\Big)^3 \quad\text{(cubic)}, \qquad
        1 - s_t = (1 - s_i) \Big(\frac{1 - s_f}{1 - s_i}\Big)^{(t - t_0)/(t_1 - t_0)} \quad\text{(geometric)}

    from the initial :math:`s_i` to the final :math:`s_f` between start :math:`t_0` and end :math:`t_1`. Each time
    :func:`quadric.prune` takes new gradients; what is removed stays so. The optimizer keeps its state, and that of
    removed weights becomes zero. Modes and ``.grad`` stay as they are.

    Cost: of :func:`quadric.prune`, once in ``every`` steps until ``end``; of :func:`quadric.hold_masks` in all.

    Args:
        model: The model.
        optimizer: What trains it, as :func:`quadric.hold_masks` takes it.
        sparsity: Share of the weights that is zero at the end, 0 < sparsity < 1.
        batches: Training data for :func:`quadric.prune`, which is gone through anew each time; processes that train one
            model together average their gradients.
        loss_fn: ``loss_fn(model, batch)`` → the mean loss of the batch.
        start: Steps before the first pruning. A schedule that starts at 0 begins with the first step.
        end: Steps after which the final sparsity is reached. Train on for a while after it.
        every: Steps between two prunings.
        initial: Sparsity of the first pruning; 0.0 removes nothing there.
        schedule: "cubic" removes most while there is most to remove; "geometric" the same share of what is left.
        masks: Weights that are removed already, by the names of parameters. They stay so and count.
        options: Of :func:`quadric.prune`.

    Raises:
        ValueError: if the schedule cannot be followed, :func:`quadric.prune` has no such option, or the optimizer does
            not have the weights.

    Example:
        Halfway the cubic schedule has (1/2)³ of the way before it; the geometric one would keep √(1 − s) of the
        weights.

        >>> model = nn.Linear(10, 10, bias=False)
        >>> import torch
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = GradualPruner(model, optimizer, 0.8, end=4, every=2, curvature="magnitude")
        >>> for step in range(5):
        ...     model(torch.ones(10)).sum().backward()
        ...     optimizer.step()
        ...     print(pruner.step() is not None, round(pruner.sparsity, 3))
        False 0.0
        True 0.7
        False 0.7
        True 0.8
        False 0.8

    Paper: Zhu and Gupta, To prune, or not to prune, arXiv 1710.01878.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        sparsity: float,
        *,
        end: int,
        every: int,
        batches: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        start: int = 0,
        initial: float = 0.0,
        schedule: Schedule = "cubic",
        masks: Mapping[str, Tensor] | None = None,
        **options: Any,
    ):
        start, every = whole("start", start, 0, "it counts steps"), whole("every", every, 1, "it counts steps")
        end = whole("end", end, start, "it counts steps")
        require(is_number(sparsity), "sparsity", repr(sparsity), "0 < sparsity < 1", "0.9 removes nine weights of ten")
        require(0 < sparsity < 1, "sparsity", sparsity, "0 < sparsity < 1", "0.9 removes nine weights of ten")
        require(0 <= initial < sparsity, "initial", initial, f"0 ≤ initial < {sparsity}", "0.0 is usual")
        require(schedule in SCHEDULES, "schedule", repr(schedule), "'cubic' or 'geometric'", "choose one of the two")
        unknown = sorted(options.keys() - OPTIONS)
        if unknown:
            raise ValueError(f"prune has no option {unknown[0]!r}: choose among {', '.join(sorted(OPTIONS))}")
        given = inspect.signature(prune).bind(model, sparsity, **options)
        given.apply_defaults()
        asked: dict[str, Any] = {field.name: given.arguments[field.name] for field in fields(Request)}
        asked["final"] = sparsity
        Request(**asked).refuse_missing_data(batches, loss_fn)
        if isinstance(batches, Iterator):
            raise ValueError(
                f"batches is a {type(batches).__name__} that ends once and for all, and every pruning needs data: "
                "pass a list or a DataLoader"
            )
        self._model, self._optimizer, self._options = model, optimizers_of(optimizer), options
        self._batches, self._loss_fn = batches, loss_fn
        self._final, self._initial, self._schedule = sparsity, initial, schedule
        self._start, self._end, self._every = start, end, every
        self._steps = self._served = 0
        self._refuse_weights()
        self._held: HeldMasks | None = None
        self._hold(Masks.of(model, masks or {}))

    @property
    def sparsity(self) -> float:
        """The share of the masked weights that is removed now; 0 before the first pruning."""
        return self._sparsity

    def step(self) -> PruneResult | None:
        """Count a step of the optimizer, and prune if it is time.

        Call it after each ``optimizer.step()``. An exception of :func:`quadric.prune` leaves everything as it was, and
        the next call tries again.

        Returns:
            What :func:`quadric.prune` returned; None in the steps between.
        """
        self._steps += 1
        due = self._due(self._steps)
        if due == self._served:
            return None
        result, level = None, self._level(self._point(due - 1))
        if level > self._sparsity:
            result = prune(
                self._model,
                level,
                batches=self._batches,
                loss_fn=self._loss_fn,
                masks=self.masks,
                final=self._final,
                **self._options,
            )
            self._hold(result.masks)
        self._served = due
        return result

    def remove(self) -> None:
        """End it: removed weights are trained like any others from now on."""
        if self._held is not None:
            self._held.remove()
        self._held = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the schedule and the masks: two whole numbers and boolean tensors by name."""
        return {"steps": self._steps, "prunings": self._served, "masks": dict(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, and hold its masks; training then continues bitwise.

        Load the states of the model and of the optimizer as well. The schedule itself is that of the constructor.

        Args:
            state: Of a pruner of the same model.

        Raises:
            ValueError: if a mask fits no parameter; nothing is changed then.
        """
        missing = {"steps", "prunings", "masks"} - state.keys()
        if missing:
            raise ValueError(f"the state has no {min(missing)!r}: load what GradualPruner.state_dict() gave")
        masks = Masks.of(self._model, state["masks"])
        self._hold(masks)
        self._steps, self._served = int(state["steps"]), int(state["prunings"])

    def __repr__(self) -> str:
        total = self._due(self._end)
        lines = [
            f"GradualPruner: {100 * self._sparsity:.1f} % removed after {self._steps} steps",
            f"{self._schedule} from {100 * self._initial:.1f} % after step {self._start} to {100 * self._final:.1f} % "
            f"after step {self._end}, every {self._every} steps",
        ]
        if self._served < total:
            point = max(self._point(self._served), self._steps + 1)
            level = max(self._level(self._point(self._served)), self._sparsity)
            lines += [f"next: {100 * level:.1f} % after step {point}; {total - self._served} to come"]
        else:
            lines += ["all done, the masks are held"]
        return "\n".join(lines)

    def _due(self, steps: int) -> int:
        # How many prunings are to have taken place.
        if steps >= self._end:
            return math.ceil((self._end - self._start) / self._every) + 1
        return max(0, (steps - self._start) // self._every + 1)

    def _point(self, number: int) -> int:
        return min(self._start + number * self._every, self._end)

    def _level(self, point: int) -> float:
        way = (point - self._start) / (self._end - self._start) if self._end > self._start else 1.0
        return self._final if way == 1 else SCHEDULES[self._schedule](self._initial, self._final, way)

    def _hold(self, masks: Masks) -> None:
        self.remove()
        self._held = hold_masks(masks, self._optimizer) if masks else None
        self.masks = masks
        removed = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
        self._sparsity = removed / max(1, sum(mask.numel() for mask in masks.values()))

    def _refuse_weights(self) -> None:
        owned = {id(p) for each in self._optimizer for group in each.param_groups for p in group["params"]}
        given = {name: self._options.get(name) for name in ("targets", "ignore")}
        pattern, scope = self._options.get("pattern", "unstructured"), self._options.get("scope", "global")
        weights, _ = find_pattern(pattern, scope, self._final, self._model, **given)
        for name, p in zip(weights.names, weights.params, strict=True):
            if id(p) not in owned:
                raise ValueError(
                    f"the optimizer does not have {name!r}, which is to be pruned: give it to the optimizer, or leave "
                    f"it out with ignore={name!r}"
                )


def cubic(initial: float, final: float, way: float) -> float:
    """The sparsity of Zhu and Gupta after a share of the way."""
    return final + (initial - final) * (1 - way) ** 3


def geometric(initial: float, final: float, way: float) -> float:
    """The sparsity where the density shrinks by the same factor each time."""
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** way


SCHEDULES = {"cubic": cubic, "geometric": geometric}
