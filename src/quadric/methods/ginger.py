r"""Ginger: steps along the inverse of a decayed Gauss–Newton matrix kept to its heaviest directions.

.. math::
    G_t = \text{the } \tau \text{ heaviest directions of } \alpha\, G_{t-1} + (1-\alpha)\, d_t d_t^\top, \qquad
    x_t = (G_t + \gamma I)^{-1} \hat m_t

Here d is the gradient at labels sampled from the model, scaled so that its square averages to the Fisher matrix (see
:func:`sampled_loss`), or the plain gradient, which gives the empirical Fisher matrix; m̂ is the usual bias-corrected
average of gradients. Rows R with G = RᵀR are never rotated in a step. They are small float64 combinations of a few long
*slots*: the basis of the last compression, then the vectors seen since. So a step writes one new slot, reads all slots
once for its inner products and once for the direction; the rest is algebra on matrices of the size of the rank. Nothing
of it subtracts large numbers, so γ may be as small as 1e-8 in float32 and may change at every step.

Cost: two reads of about rank + 1 + max(2, rank/4) slots a step, and a compression of all slots every max(4, rank/2)
steps. Memory: (rank + 2 + max(4, rank/2)) d numbers, momentum included.

Paper: Hao, Cao and Mou, Ginger: An Efficient Curvature Approximation with Linear Complexity for General Neural
Networks, 2024, arXiv 2402.03295.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quadric.curvature import Curvature, Schedule
from quadric.matrix import LowRank
from quadric.optimizer import Block, CurvatureOptimizer, refuse_sparse, require
from quadric.tiles import Tiles, combine, project, remix_, wide

__all__ = ["Ginger", "HeaviestDirections", "sampled_loss"]


def decay_and_truncate(mixing: Tensor, gram: Tensor, slot: int, decay: float | Tensor) -> Tensor:
    """The rows of ``α RᵀR + (1−α) d dᵀ`` without its lightest direction, as combinations of the slots.

    Args:
        mixing: R as combinations of the slots, ``(blocks, rank, slots)``.
        gram: inner products of the slots, ``(blocks, slots, slots)``.
        slot: where d is.
        decay: α, one or ``(blocks, 1, 1)``.
    """
    rows = F.pad(decay**0.5 * mixing, (0, 0, 0, 1))
    rows[:, -1:, slot : slot + 1] = (1 - decay) ** 0.5
    vectors = torch.linalg.eigh(rows @ gram @ rows.mT).eigenvectors  # ascending: the lightest comes first
    return vectors[:, :, 1:].mT @ rows


def split(vector: Tensor, mixing: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A combination of the slots as a combination of the orthogonal rows R and what is orthogonal to them.

    Returns:
        The coefficients of the rows, ``(blocks, 1, rank)``, the rest as a combination of the slots,
        ``(blocks, 1, slots)``, and the squared lengths of the rows, ``(blocks, 1, rank)``.
    """
    heights = mixing @ gram
    weights = (heights * mixing).sum(-1).unsqueeze(1).clamp_min(0)
    along = torch.where(weights > 1e-30, vector @ heights.mT / weights, 0)
    return along, vector - along @ mixing, weights


class HeaviestDirections(Curvature):
    r"""The heaviest directions of a decayed sum of squares, :math:`\gamma I + R^\top R`.

    Cost: one read of the slots an update, a compression of them every max(4, rank // 2) updates. Memory:
    (rank + 1 + max(4, rank // 2)) dim numbers of the first observation's type.

    Args:
        dim: number of coordinates of an observation.
        rank: τ, directions kept.
        decay: α, the factor of the past in an update.
        damping: γ, positive, or a schedule over the number of updates.
        sizes: coordinates in consecutive blocks of these sizes, each with a matrix of its own; one block by default.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        Of the two directions seen, one of weight 9 and one of weight 1, the heavier is kept.

        >>> estimate = HeaviestDirections(dim=2, rank=1, decay=0.5, damping=1.0)
        >>> estimate.update(torch.tensor([6.0, 0.0]))
        >>> estimate.update(torch.tensor([0.0, 1.0]))
        >>> estimate.matrix().diagonal()
        tensor([10.,  1.])
    """

    column_names = ("slots",)
    slots: Tensor  # (slots, length)
    gram: Tensor  # (blocks, slots, slots) inner products of the slots, float64
    mixing: Tensor  # (blocks, rank, slots), R as combinations of the slots, float64
    average: Tensor  # (blocks, 1, slots), the average of tracked gradients, likewise
    weight: Tensor  # (blocks, 1, 1), what the weights in that average add up to
    lengths: Tensor  # (blocks, 1, 1), coordinates of each block
    real: Tensor  # (blocks, rank, 1), which rows a block has the coordinates for

    def __init__(self, dim: int, rank: int, decay: float, damping: Schedule, *, sizes: list[int] | None = None):
        super().__init__(Tiles(sizes or [dim]), damping)
        require(self.dim == dim, "sizes", sizes, f"the sizes add up to dim = {dim}", "leave them out for one block")
        require(isinstance(rank, int) and rank >= 1, "rank", rank, "rank ≥ 1, an integer", "4 to 16 are usual")
        require(0 <= decay < 1, "decay", decay, "0 ≤ decay < 1", "0.99 is usual")
        self.rank, self.decay = rank, decay
        # Rows and average after a compression, then room for the vectors up to the next.
        self.capacity = rank + 1 + max(4, rank // 2)
        self.filled = 0
        for name in ("slots", "gram", "mixing", "average", "weight", "lengths", "real"):
            self.register_buffer(name, torch.empty(0))

    def _make(self, dtype: torch.dtype, device: torch.device) -> None:
        tiles, blocks, capacity = self.tiles, len(self.tiles.sizes), self.capacity
        self.slots = torch.zeros(capacity, tiles.length, dtype=dtype, device=device)
        small = {"dtype": wide(self.slots), "device": device}
        self.gram = torch.zeros(blocks, capacity, capacity, **small)
        self.mixing = torch.zeros(blocks, self.rank, capacity, **small)
        self.average = torch.zeros(blocks, 1, capacity, **small)
        self.weight = torch.zeros(blocks, 1, 1, **small)
        self.lengths = torch.tensor(self.tiles.sizes, device=device).view(-1, 1, 1)
        # A block of fewer coordinates than rank has no more directions than coordinates: the others are rounding.
        self.real = torch.arange(self.rank, 0, -1, device=device).view(-1, 1) <= self.lengths

    def inbox(self, flat: Tensor) -> Tensor:
        """The next free slot, ``(tiles.length,)``, or ``flat`` where room has to be made first."""
        if not self.slots.numel():
            self._make(torch.promote_types(flat.dtype, torch.float32), flat.device)
        return self.slots[self.filled] if self.filled < self.capacity else flat

    def absorb(self, observation: Tensor, present: Tensor | None = None) -> None:
        """Learn from a padded observation.

        Args:
            observation: d, ``(tiles.length,)``.
            present: which blocks it covers; the others stay as they are.
        """
        slot = self._store(observation)
        decay = self._factor(self.decay, present)
        self.mixing = decay_and_truncate(self.mixing, self.gram, slot, decay) * self.real
        self.updates += 1

    def track(self, gradient: Tensor | None, beta: float, present: Tensor | None = None) -> None:
        """Move the average of gradients on, ``m ← β m + (1−β) g``.

        Args:
            gradient: g, padded; None for the observation just absorbed.
            beta: β.
            present: which blocks it covers; the others stay as they are.
        """
        slot = self.filled - 1 if gradient is None else self._store(gradient)
        past = self._factor(beta, present)
        self.average.mul_(past)[:, :, slot : slot + 1] += 1 - past
        self.weight.mul_(past).add_(1 - past)

    def solve_average(self, out: Tensor | None = None) -> Tensor:
        """``(G + γI)⁻¹ m̂`` for the bias-corrected average m̂, ``(tiles.length,)``: one read of the slots.

        Where the slots are full they are compressed on the way, which changes how the matrix is kept, not which it is.
        The result then lies in a free slot: use it before the next update.

        Args:
            out: memory for the result otherwise.
        """
        damping = self.damping_now()
        along, rest, weights = self._split_average()
        weights_of_slots = rest / damping + (along / (damping + weights)) @ self.mixing
        weights_of_slots /= self.weight.clamp_min(1e-300)
        if self.filled == self.capacity:  # a compression is due: one read of the slots serves both
            self._compress(along, rest, weights_of_slots)
            return self.slots[self.filled]
        return self._combine(weights_of_slots[..., : self.filled], out).flatten()

    def matrix(self) -> LowRank:  # noqa: D102
        if not self.updates:
            return LowRank(torch.zeros(0, self.dim), self.damping_now())
        return LowRank.of_tiles(self._combine(self.mixing[..., : self.filled]), self.tiles, self.damping_now())

    def _factor(self, value: float, present: Tensor | None) -> float | Tensor:
        """A factor of the past, one for blocks that are not present."""
        return value if present is None else torch.where(present.view(-1, 1, 1), value, torch.ones_like(self.weight))

    def _combine(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        coefficients = self.tiles.spread(coefficients.to(self.slots.dtype)).contiguous()
        out = None if out is None else self.tiles.cut(out).unsqueeze(1)
        return combine(coefficients, self.tiles.cut(self.slots[: self.filled]), out)

    def _store(self, vector: Tensor) -> int:
        """Put a padded vector into a free slot, with its inner products; return the slot."""
        free = self.inbox(vector)
        if self.filled == self.capacity:  # only now: a vector written to an inbox may still have been refused
            self._compress(*self._split_average()[:2])
            free = self.slots[self.filled]
        if vector.data_ptr() != free.data_ptr():
            free.copy_(vector)
        slot, self.filled = self.filled, self.filled + 1
        newest = self.tiles.cut(self.slots[slot : slot + 1])
        products = self.tiles.total(project(self.tiles.cut(self.slots[: self.filled]), newest))
        self.gram[:, slot, : self.filled] = products.squeeze(1)
        self.gram[:, : self.filled, slot] = products.squeeze(1)
        return slot

    def _split_average(self) -> tuple[Tensor, Tensor, Tensor]:
        along, rest, weights = split(self.average, self.mixing, self.gram)
        # The rows of a block of no more coordinates than rank span it all once so many vectors have been seen. What
        # rounding leaves of the rest must not be divided by a small γ.
        open_ = (self.lengths > self.rank) | (self.lengths > self.updates)
        return along, rest * open_, weights

    def _compress(self, along: Tensor, rest: Tensor, *besides: Tensor) -> None:
        """Make slots of the rows themselves and of the average's part across them, freeing all others.

        Args:
            along: the average's coefficients of the rows, ``(blocks, 1, rank)``.
            rest: its part across them, ``(blocks, 1, slots)``.
            besides: combinations to leave in the first free slots, ``(blocks, 1, slots)`` each.
        """
        kept = torch.cat([self.mixing, rest], 1)
        mixed = torch.cat([kept, *besides], 1).to(self.slots.dtype)
        remix_(self.tiles.cut(self.slots), self.tiles.spread(mixed).contiguous())
        gram = kept @ self.gram @ kept.mT
        for small in (self.gram, self.mixing, self.average):
            small.zero_()
        self.filled = self.rank + 1
        self.gram[:, : self.filled, : self.filled] = gram
        self.mixing[:, range(self.rank), range(self.rank)] = 1
        self.average[:, :, : self.rank] = along
        self.average[:, :, self.rank] = 1

    def columns(self, start: int, stop: int) -> dict[str, Tensor]:  # noqa: D102
        slots = self.slots[:, start:stop].clone()
        slots[self.filled :] = 0  # whatever was written to an inbox and refused
        return {"slots": slots}

    def shared(self) -> dict[str, Tensor]:  # noqa: D102
        small = {"gram": self.gram, "mixing": self.mixing, "average": self.average, "weight": self.weight}
        return super().shared() | {k: v.clone() for k, v in small.items()} | {"filled": torch.tensor(self.filled)}

    def restore(self, shared: dict[str, Tensor], columns: dict[tuple[int, int], dict[str, Tensor]]) -> None:  # noqa: D102
        super().restore(shared, columns)
        first = next(iter(columns.values()))["slots"]
        self._make(first.dtype, first.device)
        self.filled = int(shared["filled"])
        for name in ("gram", "mixing", "average", "weight"):
            setattr(self, name, shared[name].clone())
        for (start, stop), values in columns.items():
            self.slots[:, start:stop] = values["slots"]

    def get_extra_state(self) -> Tensor:  # noqa: D102
        return torch.tensor([self.updates, self.filled])

    def set_extra_state(self, state: Tensor) -> None:  # noqa: D102
        self.updates, self.filled = state.tolist()


def sampled_loss(outputs: Tensor, kind: str = "categorical", *, generator: torch.Generator | None = None) -> Tensor:
    r"""A loss at labels sampled from the model, scaled so that its squared gradient averages to the Fisher matrix.

    .. math::
        \frac{1}{\sqrt N} \sum_{n=1}^N -\log p_n(\tilde y_n), \qquad \tilde y_n \sim p_n

    The outputs set the distribution of each of N labels (of examples, tokens or outputs). The gradient d has mean zero,
    and the mean of d dᵀ is the Fisher matrix of the *mean* of N such losses, for these kinds equal to its generalised
    Gauss–Newton matrix.

    Cost: one loss forward; its gradient is one more backward.

    Args:
        outputs: of the model, with their graph: logits ``(..., classes)`` for "categorical", logits of independent
            labels of any shape for "bernoulli", means at unit variance of any shape for "gaussian" (whose loss is half
            the squared error).
        kind: "categorical", "bernoulli" or "gaussian".
        generator: source of the labels.

    Raises:
        ValueError: if ``kind`` is another, or ``outputs`` is empty or not finite.

    Example:
        A model sure of its class samples that class, at no loss.

        >>> sampled_loss(torch.tensor([[100.0, 0.0]]), kind="categorical").item()
        0.0
    """
    if kind == "categorical" and not outputs.ndim:
        raise ValueError("outputs of shape () are no logits: pass one for each class along the last axis")
    looks = not torch._C._are_functorch_transforms_active()  # where a value may not decide anything
    if outputs.numel() == 0 or (looks and not bool(torch.isfinite(outputs).all())):
        found = "no number" if outputs.numel() == 0 else outputs[~torch.isfinite(outputs)][0].item()
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} hold {found}: no label can be sampled, skip this batch"
        )
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    means = outputs.detach()
    if kind == "categorical":
        logits = outputs.reshape(-1, outputs.shape[-1])
        probabilities = means.reshape(logits.shape).softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
        total, count = F.cross_entropy(logits, labels, reduction="sum"), len(logits)
    elif kind == "bernoulli":
        labels = torch.bernoulli(means.sigmoid(), generator=generator)
        total, count = F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum"), outputs.numel()
    elif kind == "gaussian":
        noise = torch.randn(means.shape, dtype=means.dtype, device=means.device, generator=generator)
        total, count = (outputs - (means + noise)).square().sum() / 2, outputs.numel()
    else:
        raise ValueError(
            f"kind must be 'categorical', 'bernoulli' or 'gaussian', got {kind!r}: name the model's outputs"
        )
    return total / count**0.5


class Ginger(CurvatureOptimizer):
    r"""The Ginger optimizer: the average gradient times the inverse of a low-rank Gauss–Newton matrix of each tensor.

    .. math::
        \theta \leftarrow (1 - \eta\,\text{wd})\,\theta - \eta\, \mathrm{clip}_\rho\big((G + \gamma I)^{-1} \hat m\big)

    Without :meth:`observe` the plain gradient feeds G, which is then the empirical Fisher, not the Gauss–Newton matrix.

    Cost: two reads of about rank + 1 + max(2, rank/4) numbers a parameter a step, and a compression of all of them
    every max(4, rank/2) steps. Memory: rank + 2 + max(4, rank/2) numbers a parameter.

    Args:
        params: parameters or parameter groups; each tensor has a matrix of its own.
        lr: learning rate η.
        betas: decay of the average gradient, and α of the curvature.
        rank: τ, directions kept for each tensor.
        damping: γ, or a schedule over the steps. Along directions the matrix does not hold, the step is η/γ times the
            average gradient: choose lr and damping together. The paper's 1e-5 goes with its ``clip=1.0``.
        clip: ρ, bound on each entry of the direction, or None.
        weight_decay: decoupled weight decay.
        maximize: ascend instead.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        One gradient 2: the curvature is (1 − 0.5) · 2², and the step 0.5 · 2 / (2 + 1).

        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Ginger([w], lr=0.5, betas=(0.9, 0.5), damping=1.0)
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> round(w.item(), 4)
        0.6667

    Paper: arXiv 2402.03295.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        rank: int = 4,
        damping: Schedule = 1e-2,
        clip: float | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "rank": rank,
            "damping": damping,
            "clip": clip,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _forget(self) -> None:
        super()._forget()
        self._observed: dict[tuple[int, int], Tensor] = {}  # by places of group and parameter
        self._observations = 0

    def check(self, group: dict[str, Any]) -> None:  # noqa: D102
        super().check(group)
        betas = group["betas"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        require(pair, "betas", betas, "a pair of numbers", "(0.9, 0.99) is usual")
        require(0 <= betas[0] < 1, "betas[0]", betas[0], "0 ≤ betas[0] < 1", "0.9 is usual")
        HeaviestDirections(1, group["rank"], betas[1], group["damping"])
        clip = group["clip"]
        require(clip is None or clip > 0, "clip", clip, "clip > 0", "None turns it off")

    def observe(self, loss: Tensor) -> None:
        """Feed the curvature of the next step from a loss at sampled labels, in place of the plain gradient.

        Called between the forward and the backward pass; ``.grad`` stays untouched and the graph is kept. Several calls
        before a step, one a micro-batch, count as one larger batch.

        Args:
            loss: ``sampled_loss(outputs)`` of the model's outputs.

        Raises:
            RuntimeError: if no parameter has a gradient or one is not finite; the observation is dropped then.
        """
        places = [(k, i) for k, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        params = {(k, i): self.param_groups[k]["params"][i] for k, i in places}
        params = {place: p for place, p in params.items() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        found = {place: grad for place, grad in zip(params, grads, strict=True) if grad is not None}
        if not found:
            raise RuntimeError(
                "the observed loss depends on no parameter: pass sampled_loss(outputs) of outputs with their graph"
            )
        refuse_sparse(found.values())
        norms = torch.stack([torch.linalg.vector_norm(grad).cpu() for grad in found.values()])
        if not bool(torch.isfinite(norms).all()):
            raise RuntimeError(f"the observed loss {loss.item():g} has gradients that are not finite: skip this batch")
        for place, grad in found.items():
            self._observed[place] = self._observed[place] + grad if place in self._observed else grad
        self._observations += 1

    def step(self, closure: Any = None) -> Any:  # noqa: D102
        try:
            return super().step(closure)
        finally:
            self._observed.clear()
            self._observations = 0

    def partition(self, params: list[Tensor], group: dict[str, Any]) -> list[list[int]]:  # noqa: D102
        return [[i] for i in range(len(params))]

    def curvature(self, params: list[list[Tensor]], group: dict[str, Any]) -> HeaviestDirections:  # noqa: D102
        sizes = [p.numel() for (p,) in params]
        return HeaviestDirections(sum(sizes), group["rank"], group["betas"][1], group["damping"], sizes=sizes)

    def direction(self, block: Block, gradient: Tensor, group: dict[str, Any]) -> Tensor:  # noqa: D102
        estimate: HeaviestDirections = block.curvature  # type: ignore[assignment]
        beta, estimate.decay = group["betas"]
        estimate.damping = group["damping"]
        present = None if all(block.present) else torch.tensor(block.present, device=gradient.device)
        if self._observations:
            observed = torch.empty_like(gradient)
            self._gather(block, [self._observed.get((block.group, i)) for i in block.members], observed)
            estimate.track(gradient, beta, present)  # first: it lies in the slot that the next vector would take
            estimate.absorb(observed.div_(self._observations**0.5), present)
        else:
            estimate.absorb(gradient, present)
            estimate.track(None, beta, present)
        direction = estimate.solve_average(out=block.flat)
        return direction if group["clip"] is None else direction.clamp_(-group["clip"], group["clip"])
