r"""Block mean AdaGrad: full-matrix AdaGrad through the block means of the sum of gradients' outer products.

.. math::
    M_t = \sum_{\tau \le t} g_\tau g_\tau^\top, \qquad x_t = (\hat M_t + \delta I)^{-1/2} g_t

where M̂ replaces every block of M by its mean (see :class:`quadric.BlockMean`). Only sums over groups of coordinates
are ever needed: C += u uᵀ with u = Qᵀg, and the sums of squares D. Inside a group all coordinates share one scale, so
this does not contain diagonal AdaGrad; the *whitened* form, the default, does. It first divides each coordinate by the
root of its own mean square, w = g / √v, and approximates the correlations that remain.

Cost: about twenty passes over d numbers a step, and an L × L eigendecomposition every ``refresh_every`` steps.
Memory: 3 d numbers (2 d plain), and 2 L² doubles.

Paper: Lu, Harandi, Hartley and Pascanu, Block Mean Approximation for Efficient Second Order Optimization, 2018,
arXiv 1804.05484.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, _foreach_add_, _foreach_addcmul_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]

from quadric.curvature import Curvature, Schedule
from quadric.matrix import BlockMean, Groups
from quadric.optimizer import Block, CurvatureOptimizer, require
from quadric.tiles import Tiles, wide

__all__ = ["BlockMeanAdaGrad", "BlockMeanSum"]

FLOOR = 1e-32  # of a second moment: zero over its root is zero


def row_groups(shapes: list[torch.Size], refresh_every: int) -> list[tuple[int, int]]:
    """Groups of each tensor, ``(groups, size)``: its rows (output neurons or channels), whole if it has one axis.

    There are at most ∛(refresh_every · d / 4) groups in all, so that an eigendecomposition costs little beside the
    passes over d numbers between two of them; rows of a tensor are joined, equally many, until they fit.
    """
    rows = [shape[0] if len(shape) > 1 else 1 for shape in shapes]
    dim = sum(shape.numel() for shape in shapes)
    share = min(1.0, max(1.0, (refresh_every * dim / 4) ** (1 / 3)) / sum(rows))
    counts = [max(n for n in range(1, max(1, int(r * share)) + 1) if r % n == 0) for r in rows]
    return [(n, shape.numel() // n) for n, shape in zip(counts, shapes, strict=True)]


class BlockMeanSum(Curvature):
    r"""The block means of the sum, or decayed average, of observations' outer products, plus :math:`\delta I`.

    Cost: two passes over dim numbers and L² an update. Memory: L² + L doubles.

    Args:
        groups: the group of every coordinate, ``(dim,)`` integers, or :class:`quadric.matrix.Groups`.
        decay: None for the sum; otherwise the factor of the past in a bias-corrected average.
        damping: δ, positive, or a schedule over the number of updates.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        Both coordinates in one group: the mean diagonal of g gᵀ is (1 + 9) / 2, the mean beside it 3.

        >>> estimate = BlockMeanSum(torch.tensor([0, 0]), damping=1.0)
        >>> estimate.update(torch.tensor([1.0, 3.0]))
        >>> estimate.matrix().to_dense()
        tensor([[6., 3.],
                [3., 6.]])
    """

    coupling: Tensor  # (L, L), outer products of the groups' sums, float64
    traces: Tensor  # (L,), D, float64
    example: Tensor  # (0,), of the type that the matrix has

    def __init__(self, groups: Tensor | Groups, *, decay: float | None = None, damping: Schedule = 1e-8):
        groups = groups if isinstance(groups, Groups) else Groups(groups)
        super().__init__(Tiles([groups.dim], groups.dim), damping)
        require(decay is None or 0 <= decay < 1, "decay", decay, "0 ≤ decay < 1", "None sums, 0.99 averages")
        self.groups, self.decay = groups, decay
        for name in ("coupling", "traces", "example"):
            self.register_buffer(name, torch.empty(0))

    def absorb(self, observation: Tensor) -> None:  # noqa: D102
        if not self.updates:
            self.example = observation.new_empty(0, dtype=torch.promote_types(observation.dtype, torch.float32))
            small = {"dtype": wide(observation), "device": observation.device}
            self.coupling = torch.zeros(self.groups.count, self.groups.count, **small)
            self.traces = torch.zeros(self.groups.count, **small)
        past, now = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
        self.sums = self.groups.sum(observation).to(self.coupling.dtype)
        self.coupling.addr_(self.sums, self.sums, beta=past, alpha=now)
        self.traces.mul_(past).add_(self.groups.square_sum(observation), alpha=now)
        self.updates += 1

    def matrix(self) -> BlockMean:  # noqa: D102
        if not self.updates:
            nothing = torch.zeros(self.groups.count, self.groups.count)
            return BlockMean(self.groups, nothing, nothing[0], self.damping_now())
        weight, roots = self.weight(), self.groups.roots
        coupling = self.coupling / (weight * torch.outer(roots, roots))
        return BlockMean(self.groups, coupling, self.traces / weight, self.damping_now(), dtype=self.example.dtype)

    def weight(self) -> float:
        """What the weights of the observations add up to where they are averaged, otherwise one."""
        return 1.0 if self.decay is None else 1 - self.decay**self.updates

    def shared(self) -> dict[str, Tensor]:  # noqa: D102
        return super().shared() | {"coupling": self.coupling.clone(), "traces": self.traces.clone()}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:  # noqa: D102
        super().restore(shared, columns)
        self.coupling, self.traces = shared["coupling"].clone(), shared["traces"].clone()


class InverseRoot(BlockMeanSum):
    """A :class:`BlockMeanSum` that keeps the inverse square root of its coupling and remakes it now and then."""

    across: Tensor  # (L, L), (C + δI)^-½ at the last refresh

    def __init__(self, groups: Groups, decay: float | None, damping: Schedule):
        super().__init__(groups, decay=decay, damping=damping)
        self.register_buffer("across", torch.empty(0))

    def refresh(self, every: int) -> None:
        """Remake the root at each of the first ``every`` updates, while one changes it much, then at one in so many."""
        if self.updates <= every or self.updates % every == 0:
            self.across = self.matrix().parts(-0.5)[1]

    def scale_newest(self, observation: Tensor, out: Tensor) -> Tensor:
        """``(M̂ + δI)^-½ g`` for the observation g of the last update: one pass.

        Inside groups the root is that of now. Across them it is that of the last refresh, and what it makes of u is cut
        to the length that the root of now cannot exceed, since C holds u uᵀ already: a direction that C had not seen at
        the refresh would otherwise be divided by √δ.
        """
        weight, roots = self.weight(), self.groups.roots
        spread = self.groups.spread(self.coupling.diagonal() / self.groups.sizes, self.traces)
        within = (spread / weight + self.damping_now()).rsqrt()
        u = self.sums / roots
        coupled = u @ self.across
        longest = (weight if self.decay is None else weight / (1 - self.decay)) ** 0.5
        coupled = coupled * (longest / coupled.norm()).clamp_max(1)
        return self.groups.blend(observation, u, within, coupled, out)

    def shared(self) -> dict[str, Tensor]:
        return super().shared() | {"across": self.across.clone()}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:
        super().restore(shared, columns)
        self.across = shared["across"].clone()


class BlockMeanAdaGrad(CurvatureOptimizer):
    r"""The block mean AdaGrad optimizer, whitened by default.

    .. math::
        v \leftarrow v + g^2, \quad w = g\,/\sqrt{v/t}, \quad
        \theta \leftarrow (1-\eta\,\text{wd})\,\theta - \eta\,\big(\hat M_t + \delta\, t\, I\big)^{-1/2} w, \quad
        M_t = \sum_\tau w_\tau w_\tau^\top

    Where the w are uncorrelated this is AdaGrad, divided by √(1 + δ). With ``decay`` sums become bias-corrected
    averages, as from AdaGrad to RMSprop, and δ t becomes δ. With ``whiten=False``, w = g and δ is added as it is, as in
    the paper.

    Cost: about twenty passes over the parameters a step. Memory: 3 numbers a parameter.

    Args:
        params: parameters or parameter groups; all parameters of a group share a matrix, whose groups of coordinates
            are the rows of each tensor (output neurons or channels), joined where they are too many.
        lr: learning rate η.
        decay: None for AdaGrad's sums, or the factor of the past in averages.
        damping: δ, or a schedule over the steps. Whitened it counts mean squares of w, and 1.0 is the default, half
            way to diagonal AdaGrad; plain it is added to the sum of squares, 1e-6 by default.
        refresh_every: steps between two eigendecompositions, after the first so many steps.
        whiten: divide each coordinate by its own root mean square first.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        One coordinate is its own group: plain AdaGrad, 0.5 · 2 / √(2² + 5).

        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = BlockMeanAdaGrad([w], lr=0.5, damping=5.0, whiten=False)
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> round(w.item(), 4)
        0.6667

    Paper: arXiv 1804.05484.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        *,
        decay: float | None = None,
        damping: Schedule | None = None,
        refresh_every: int = 20,
        whiten: bool = True,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "decay": decay,
            "damping": damping if damping is not None else 1.0 if whiten else 1e-6,
            "refresh_every": refresh_every,
            "whiten": whiten,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check(self, group: dict[str, Any]) -> None:  # noqa: D102
        super().check(group)
        BlockMeanSum(torch.tensor([0]), decay=group["decay"], damping=group["damping"])
        every = group["refresh_every"]
        whole = isinstance(every, int) and every >= 1
        require(whole, "refresh_every", every, "refresh_every ≥ 1, an integer", "10 to 20 steps are usual")

    def partition(self, params: list[Tensor], group: dict[str, Any]) -> list[list[int]]:  # noqa: D102
        sizes = [size for _, size in row_groups([p.shape for p in params], group["refresh_every"])]
        return [sorted(range(len(params)), key=sizes.__getitem__)]  # groups of one size side by side: one launch

    def curvature(self, params: list[list[Tensor]], group: dict[str, Any]) -> InverseRoot:  # noqa: D102
        runs: list[tuple[int, int]] = []
        for count, size in row_groups([p.shape for p in params[0]], group["refresh_every"]):
            if runs and runs[-1][1] == size:
                count += runs.pop()[0]
            runs.append((count, size))
        return InverseRoot(Groups.consecutive(runs, params[0][0].device), group["decay"], group["damping"])

    def direction(self, block: Block, gradient: Tensor, group: dict[str, Any]) -> Tensor:  # noqa: D102
        estimate: InverseRoot = block.curvature  # type: ignore[assignment]
        decay, step = group["decay"], block.step
        estimate.decay, estimate.damping = decay, group["damping"]
        if group["whiten"]:
            moment, live = block.buffer("second_moment"), block.live(gradient)
            past, now = (1.0, 1.0) if decay is None else (decay, 1 - decay)
            if decay is not None or step == 1:
                _foreach_mul_(block.live(moment), past)
                _foreach_add_(block.live(moment), FLOOR)
            _foreach_addcmul_(block.live(moment), live, live, value=now)
            mean = step if decay is None else 1 - decay**step
            root = torch.rsqrt(moment, out=block.spare)
            torch.addcmul(gradient.new_zeros(()), gradient, root, value=mean**0.5, out=gradient)
        estimate.absorb(gradient)
        if group["whiten"] and decay is None:  # the sum of the squares of w grows by one a step
            estimate.damping = estimate.damping_now() * step
        estimate.refresh(group["refresh_every"])
        return estimate.scale_newest(gradient, out=block.spare)
