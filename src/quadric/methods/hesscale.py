r"""AdaHesScale: Adam with the Hessian diagonal where Adam has the squared gradient.

.. math::
    m \leftarrow \beta_1 m + (1-\beta_1)\, g, \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, h^2, \qquad
    \theta \leftarrow \theta - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)

h is HesScale's estimate of the diagonal of the loss's Hessian, carried back beside the gradient as in
:func:`quadric.hessian_diagonal`. It may be negative, so its square is averaged. Two safeguards bound a step where the
curvature is nearly zero: a clip of each entry, and a trust region of the whole step.

Cost: half of forward and backward to all of it once more, or that over ``refresh_every``, and ten passes over the
parameters; two thirds are the floor where products dominate.
Memory: 5 numbers a parameter.

Paper: Elsayed and Mahmood, HesScale: Scalable Computation of Hessian Diagonals, 2022, arXiv 2210.11639. The trust
region is the step-size scaling of its sequel on reinforcement learning, ICML 2024, arXiv 2406.03276.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_addcmul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
)

from quadric.backprop.sampling import check_fraction
from quadric.backprop.walk import Walk
from quadric.curvature import Curvature, Schedule
from quadric.distributed import alone, average_
from quadric.matrix import Diagonal
from quadric.optimizer import Block, CurvatureOptimizer, require
from quadric.tiles import Tiles

__all__ = ["AdaHesScale", "HessianDiagonal"]

WALK_OPTIONS = ("gauss_newton", "dtype", "fraction", "exact_softmax")


def share_of_newest(decay: float, count: int) -> float:
    """The weight of the newest of ``count`` values in their bias-corrected average.

    Kept corrected, an average does not shrink for a parameter that was absent from some of the updates.
    """
    return (1 - decay) / (1 - decay**count)


class HessianDiagonal(Curvature):
    r"""The root of a bias-corrected average of squared Hessian diagonals, :math:`\sqrt{\hat v} + \lambda`.

    Cost: two passes over dim numbers an update. Memory: dim numbers.

    Args:
        dim: number of coordinates.
        decay: β₂, the factor of the past.
        damping: λ, positive, or a schedule over the number of updates.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        Squares 9 and 1 are averaged with the weights 1/3 and 2/3 that a decay of one half gives them.

        >>> estimate = HessianDiagonal(1, decay=0.5, damping=1.0)
        >>> estimate.update(torch.tensor([-3.0]))
        >>> estimate.update(torch.tensor([1.0]))
        >>> round(estimate.matrix().diagonal().item() - 1, 4) == round((9 / 3 + 2 / 3) ** 0.5, 4)
        True

    Paper: arXiv 2210.11639.
    """

    column_names = ("squares",)
    squares: Tensor  # (length,), v̂

    def __init__(self, dim: int, decay: float = 0.999, damping: Schedule = 1e-8):
        super().__init__(Tiles([dim], dim), damping)
        require(0 <= decay < 1, "decay", decay, "0 ≤ decay < 1", "0.999 is usual")
        self.decay = decay
        self.register_buffer("squares", torch.empty(0))

    def absorb(self, observation: Tensor, live: Callable[[Tensor], list[Tensor]] | None = None) -> None:
        """Learn from a diagonal, in all coordinates or in the pieces that ``live`` cuts out of a flat tensor."""
        if not self.updates:
            self.squares = torch.zeros_like(observation, dtype=torch.promote_types(observation.dtype, torch.float32))
        squares, fresh = ([t] if live is None else live(t) for t in (self.squares, observation))
        self.updates += 1
        share = share_of_newest(self.decay, self.updates)
        _foreach_mul_(squares, 1 - share)
        _foreach_addcmul_(squares, fresh, fresh, value=share)

    def matrix(self) -> Diagonal:  # noqa: D102
        if not self.updates:
            return Diagonal(torch.full((self.dim,), self.damping_now()))
        return Diagonal(self.tiles.unpad(self.squares).sqrt() + self.damping_now())

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:  # noqa: D102
        return {"squares": self.squares[start:stop].clone()}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:  # noqa: D102
        super().restore(shared, columns)
        first = next(iter(columns.values()))["squares"]
        self.squares = first.new_zeros(self.tiles.length)
        for (start, stop), values in columns.items():
            self.squares[start:stop] = values["squares"]


class AdaHesScale(CurvatureOptimizer):
    r"""The AdaHesScale optimizer; ``optimizer.backward(loss)`` takes the place of ``loss.backward()``.

    .. math::
        u = \eta\, \mathrm{clip}_\rho\!\left(\frac{\hat m}{\sqrt{\hat v} + \epsilon}\right), \qquad
        \theta \leftarrow (1-\eta\,\text{wd})\,\theta - \min\!\Big(1, \sqrt{2\delta / T}\Big)\, u, \qquad
        T = \sum \sqrt{\hat v}\, u^2

    Under ``torch.distributed`` h is averaged over all processes, as gradients are; each of them must take every step.

    Cost: half of forward and backward to all of it once more, every ``refresh_every`` steps. Memory: 5 numbers a
    parameter.

    Args:
        params: parameters or parameter groups.
        lr: learning rate η.
        betas: decay of the average gradient and of the average squared diagonal.
        eps: ε, added to the root.
        clip: ρ, bound on each entry of the step before lr; None for the paper's rule.
        trust: δ of the trust region, a bound of ½ uᵀ|H|u for each group, or None.
        refresh_every: steps from one look at the Hessian diagonal to the next.
        gauss_newton: leave out the second derivatives of the network, keep those of the loss.
        dtype: what h is carried and multiplied in, such as ``torch.bfloat16``; its averages stay in float32.
        fraction: 1 over a whole number: look at h of a random block with that share of the rows of the loss; unbiased.
        exact_softmax: carry the whole Hessian of a softmax cross-entropy through the linear layer before it.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        L = 3 w²: the gradient 6 over the curvature 6 is 1, and the step half of it.

        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AdaHesScale([w], lr=0.5)
        >>> optimizer.backward(3 * (w**2).sum())
        >>> optimizer.step()
        >>> round(w.item(), 4)
        0.5

    Paper: arXiv 2210.11639; ``trust``: arXiv 2406.03276.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = 1.0,
        trust: float | None = None,
        refresh_every: int = 1,
        gauss_newton: bool = False,
        dtype: torch.dtype | None = None,
        fraction: float = 1.0,
        exact_softmax: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip": clip,
            "trust": trust,
            "refresh_every": refresh_every,
            "gauss_newton": gauss_newton,
            "dtype": dtype,
            "fraction": fraction,
            "exact_softmax": exact_softmax,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:  # noqa: D102
        super().check(group)
        betas = group["betas"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        require(pair, "betas", betas, "a pair of numbers", "(0.9, 0.999) is usual")
        require(0 <= betas[0] < 1, "betas[0]", betas[0], "0 ≤ betas[0] < 1", "0.9 is usual")
        require(0 <= betas[1] < 1, "betas[1]", betas[1], "0 ≤ betas[1] < 1", "0.999 is usual")
        require(0 < group["eps"] < math.inf, "eps", group["eps"], "0 < eps < ∞", "1e-8 is usual")
        for name in ("clip", "trust"):
            value = group[name]
            require(value is None or value > 0, name, value, f"{name} > 0", "None turns it off")
        check_fraction(group["fraction"])
        dtype = group["dtype"]
        real = dtype is None or dtype.is_floating_point
        require(real, "dtype", dtype, "dtype is a floating-point type", "torch.bfloat16 saves time")
        every = group["refresh_every"]
        whole = isinstance(every, int) and every >= 1
        require(whole, "refresh_every", every, "refresh_every ≥ 1 and whole", "10 is cheap")

    def _forget(self) -> None:
        super()._forget()
        self._walks: list[tuple[Walk, list[tuple[int, int]]]] = []  # with the places of their targets
        self._kept: dict[tuple[int, int], Tensor] = {}  # memory for h
        self._collected: dict[tuple[int, int], Tensor | None] = {}  # h so far, None where it is zero

    # From a loss to h.

    def backward(self, loss: Tensor, *, retain_graph: bool | None = None) -> None:
        """``loss.backward()`` that also collects the Hessian diagonal, which accumulates as ``.grad`` does.

        Args:
            loss: a real scalar with its graph.
            retain_graph: keep the graph for another backward.

        Raises:
            UnsupportedOperation: if h cannot be carried through an operation of the graph; nothing is changed then.
        """
        before = len(self._walks)
        self.attach(loss)
        for walk, _ in self._walks[before:]:
            walk.whole = True
        try:
            loss.backward(retain_graph=retain_graph)
        except BaseException:
            for _, places in self._walks[before:]:
                for place in places:
                    self._collected.pop(place, None)
            self._drop(self._walks[before:])
            raise

    def attach(self, loss: Tensor) -> None:
        """Collect the Hessian diagonal during the next backward of a loss, whoever calls it.

        It is the diagonal of this loss, whatever multiple of it is differentiated: ``GradScaler`` scales its gradients
        back, and h needs none. Divide a micro-batch's loss before attaching it, not after.

        Args:
            loss: a real scalar with its graph.

        Raises:
            UnsupportedOperation: if h cannot be carried through an operation of the graph; nothing is changed then.
        """
        places_of: dict[tuple, list[tuple[int, int]]] = {}
        for k, group in enumerate(self.param_groups):
            places_of.setdefault(tuple(group[name] for name in WALK_OPTIONS), []).extend(self._due(k))
        walks = []
        for values, places in places_of.items():
            if places:
                params = [self.param_groups[k]["params"][i] for k, i in places]
                walk = Walk(loss, params, **dict(zip(WALK_OPTIONS, values, strict=True)))
                walk.take = partial(self._take, places)
                walk.keep_apart(other for other, _ in self._walks)  # and not those of other settings of this loss
                walks.append((walk, places))
        self._walks += walks

    def _due(self, place: int) -> list[tuple[int, int]]:
        """The parameters of a group that look at the Hessian in this step: by its number, and those that are new."""
        group = self.param_groups[place]
        steps = {i: block.step for block in self._known_blocks(place) for i in block.members}
        return [
            (place, i)
            for i, p in enumerate(group["params"])
            if p.requires_grad and p.numel() and steps.get(i, 0) % group["refresh_every"] == 0
        ]

    def _known_blocks(self, place: int) -> list[Block]:
        if not self._blocks[place]:  # as after a copy
            self._restore(place, self.param_groups[place])
        return self._blocks[place]

    def _drop(self, walks: list[tuple[Walk, list[tuple[int, int]]]]) -> None:
        for walk, _ in walks:
            walk.close()
        self._walks = [pair for pair in self._walks if pair not in walks]

    def _take(self, places: list[tuple[int, int]], target: int, h: Tensor, multiple: Tensor | None) -> None:
        """Add a part of the h of a parameter to memory that is kept from step to step: fresh memory costs as much."""
        place = places[target]
        kept = self._kept.get(place)
        dtype = torch.promote_types(h.dtype, torch.float32)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (h.shape, dtype, h.device):
            kept = self._kept[place] = torch.empty(h.shape, dtype=dtype, device=h.device)
        if multiple is not None:
            h = h / multiple
        if self._collected.get(place) is None:
            kept.copy_(h)
        else:
            kept.add_(h)
        self._collected[place] = kept

    def _collect(self) -> None:
        """Note whose h the walks have brought, zero where nothing arrived, and average it over processes."""
        for walk, places in self._walks:
            if walk.begun is not None:  # otherwise it was attached and never differentiated
                for place in places:
                    self._collected.setdefault(place, None)
        self._drop(self._walks)
        if not alone():  # the gradients are averages over all processes, and so must h be
            for k, i in self._collected:
                if self._collected[k, i] is None:
                    p = self.param_groups[k]["params"][i]
                    self._collected[k, i] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            average_([h for _, h in sorted(self._collected.items()) if h is not None])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and the Hessian diagonals collected since the last step.

        Args:
            set_to_none: drop the gradients instead of zeroing them.
        """
        super().zero_grad(set_to_none)
        self._drop([pair for pair in self._walks if pair[0].begun is not None])  # others wait for their backward
        self._collected.clear()

    # From h to a step.

    def step(self, closure: Any = None) -> Any:
        """Perform one step.

        Args:
            closure: reevaluates the model, calls :meth:`backward` and returns the loss; run with gradients enabled.

        Raises:
            RuntimeError: if no Hessian diagonal was ever collected, or a gradient or diagonal is not finite; nothing is
                changed then.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._collect()
        try:
            self._check_collected()
            super().step()
        finally:
            self._collected.clear()
        return loss

    def _check_collected(self) -> None:
        for k, group in enumerate(self.param_groups):
            learnt = {i for block in self._known_blocks(k) if block.step for i in block.members}
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.numel() and i not in learnt and (k, i) not in self._collected:
                    raise RuntimeError(
                        f"parameter {i} of group {k} has a gradient but no Hessian diagonal was collected: call "
                        "optimizer.backward(loss) in place of loss.backward(), or optimizer.attach(loss) before it"
                    )
        kinds: dict[tuple, dict[tuple[int, int], Tensor]] = defaultdict(dict)
        for place, h in self._collected.items():
            if h is not None:
                kinds[h.device, h.dtype][place] = h
        for found in kinds.values():
            sizes = torch.stack(_foreach_norm(list(found.values()), math.inf))
            wrong = ~sizes.square().isfinite()  # squares are averaged
            if bool(wrong.any()):
                first = int(wrong.nonzero()[0])
                k, i = list(found)[first]
                raise RuntimeError(
                    f"the Hessian diagonal of parameter {i} of group {k} holds {sizes[first].item():g}; nothing was "
                    "changed: skip this batch, lower lr, or look for the overflow in the loss"
                )

    def curvature(self, params: list[list[Tensor]], group: dict[str, Any]) -> HessianDiagonal:  # noqa: D102
        return HessianDiagonal(sum(p.numel() for p in params[0]), group["betas"][1], group["eps"])

    def direction(self, block: Block, gradient: Tensor, group: dict[str, Any]) -> Tensor:  # noqa: D102
        estimate: HessianDiagonal = block.curvature  # type: ignore[assignment]
        beta, estimate.decay = group["betas"]
        estimate.damping = group["eps"]
        average, out, spare = block.buffer("average"), block.flat, block.spare
        _foreach_lerp_(block.live(average), block.live(gradient), share_of_newest(beta, block.step))
        if any((block.group, i) in self._collected for i in block.members):
            self._gather(block, [self._collected.get((block.group, i)) for i in block.members], spare)
            estimate.absorb(spare, block.live)
        root = torch.sqrt(estimate.squares, out=spare)
        torch.div(average, torch.add(root, estimate.damping_now(), out=out), out=out)
        if group["clip"] is not None:
            out.clamp_(-group["clip"], group["clip"])
        if group["trust"] is not None:
            moved = sum((r * u**2).sum() for r, u in zip(block.live(root), block.live(out), strict=True))
            out.mul_((2 * group["trust"] / (moved * float(group["lr"]) ** 2)).sqrt().clamp_max(1))
        return out
