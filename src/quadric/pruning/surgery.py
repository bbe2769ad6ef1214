r"""Surgery: what it costs to remove weights, and how the others best answer.

Removing the units of coordinates Q from the kept coordinates S moves the weights w by δ with :math:`\delta_Q = -w_Q`,
and the loss, near a minimum, by :math:`\frac12\delta^\top G\delta`. For one unit u alone, with all others free, the
least of it is its cost, and for all that go together the rest answers by

.. math::
    \rho_u = \tfrac12\, w_u^\top \big([G_{SS}^{-1}]_{uu}\big)^{-1} w_u, \qquad
    \delta_{S \setminus Q} = -G_{S \setminus Q, S \setminus Q}^{-1}\, G_{S \setminus Q, Q}\, \delta_Q .

Of a single weight the first is :math:`w_i^2 / (2 [G^{-1}]_{ii})`, optimal brain surgeon (Hassibi and Stork, 1992), and
of a diagonal G, optimal brain damage (LeCun, Denker and Solla, 1989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from quadric.pruning.evidence import Evidence

__all__ = ["Update", "remove_", "unit_costs"]

Update = Literal["joint", "single", "none"]


def unit_costs(evidence: Evidence, unit: Tensor, count: int, weights: Tensor, kept: Tensor) -> Tensor:
    """The least rise of the loss if a unit goes, for each alone, ``(count,)``.

    Args:
        evidence: The curvature.
        unit: Of each padded coordinate, ``(length,)``; −1 of none.
        count: Units.
        weights: Padded, ``(length,)``.
        kept: Which coordinates are left, ``(length,)``.
    """
    costs = torch.zeros(count, dtype=weights.dtype, device=weights.device)
    for section in evidence.sections():
        w, alive = weights[section.columns] * section.scale, kept[section.columns]
        matrix = section.matrix.restrict(alive)
        for units, owners in pieces(torch.where(alive, unit[section.columns], -1), section.block):
            # A unit that lies in several blocks costs the sum of its pieces, because blocks are not coupled.
            held = torch.where(units >= 0, w[units.clamp_min(0)], 0) * matrix.multipliers(w, units)
            # In a fixed order, which index_add does not keep on a GPU.
            owner, several = torch.unique_consecutive(owners, return_counts=True)
            costs[owner] += torch.segment_reduce(held.sum(1), "sum", lengths=several, unsafe=True) / 2
    return costs


def pieces(unit: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The coordinates of each unit within each block, ``(n, size)`` with −1 behind shorter ones, and whose they are.

    Pieces come in groups of like size, so that a long one does not lengthen all.

    Args:
        unit: Of each coordinate; −1 of none.
        block: Coordinates in a block.

    Example:
        Unit 7 has two coordinates in the first block of three and one in the second.

        >>> list(pieces(torch.tensor([7, -1, 7, 7]), block=3))
        [(tensor([[3]]), tensor([7])), (tensor([[0, 2]]), tensor([7]))]
    """
    place = (unit >= 0).nonzero().flatten()
    if bool((unit[place].diff() > 0).all()):  # each unit has one
        if len(place):
            yield place.unsqueeze(1), unit[place]
        return
    label, order = torch.sort(unit[place] * (len(unit) // block + 1) + place // block, stable=True)
    counts = torch.unique_consecutive(label, return_counts=True)[1]
    place, starts, bits = place[order], counts.cumsum(0) - counts, torch.log2(counts.double()).ceil()
    for size in torch.unique(bits):
        alike = bits == size
        ahead = torch.arange(int(counts[alike].max()), device=unit.device)
        inside = ahead < counts[alike].unsqueeze(1)
        found = place[torch.where(inside, starts[alike].unsqueeze(1) + ahead, 0)]
        yield torch.where(inside, found, -1), unit[found[:, 0]]


def remove_(evidence: Evidence, unit: Tensor, weights: Tensor, kept: Tensor, gone: Tensor, update: Update) -> float:
    """Remove coordinates and let the others answer, in place; the predicted rise of the loss.

    Args:
        evidence: The curvature.
        unit: Of each padded coordinate, ``(length,)``; −1 of none.
        weights: Padded, ``(length,)``; changed.
        kept: Which coordinates are left, ``(length,)``; changed.
        gone: Which of these go, whole units of them, ``(length,)``.
        update: ``"joint"`` the exact answer to all that goes, ``"single"`` the sum of the answers to each unit alone,
            as M-FAC's paper has it, ``"none"`` no answer.
    """
    rise = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for section in evidence.sections():
        columns, matrix = section.columns, section.matrix
        out, alive = gone[columns], kept[columns]
        w = weights[columns] * section.scale
        if update == "joint":
            move = matrix.complete(-w, out | ~alive)  # what went before is zero and stays so
        elif update == "single":
            rest = matrix.restrict(alive)
            forces = torch.zeros_like(w)
            for units, _ in pieces(torch.where(out, unit[columns], -1), section.block):
                forces[units[units >= 0]] = rest.multipliers(w, units)[units >= 0]
            move = torch.where(out, -w, -rest.solve(forces))
        else:
            move = torch.where(out, -w, 0)
        rise += matrix.quad(move) / 2
        weights[columns] += move / section.scale
    weights[gone] = 0
    kept &= ~gone
    return float(rise)
