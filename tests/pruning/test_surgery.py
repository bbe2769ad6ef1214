"""Costs of units and the answers of the rest, against dense equations and brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from counting import count
from quadric import BlockMean, Dense, Diagonal, LowRank
from quadric.pruning import evidence as evidence_module
from quadric.pruning.evidence import Given, GradientBlocks, GradientRows, on_the_diagonal
from quadric.pruning.memory import Plan
from quadric.pruning.surgery import pieces, remove_, unit_costs
from quadric.tiles import Tiles

EVERY = {"joint", "single", "none"}
few = settings(max_examples=25, deadline=None, derandomize=True)


def close(found, expected, tolerance=1e-9):
    scale = max(1.0, float(torch.as_tensor(expected).abs().max())) if torch.as_tensor(expected).numel() else 1.0
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance * scale
    )


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gathered(kind, gradients, block_size, damping, shrinkage=0.0, dtype=torch.float64, width=None):
    """Evidence from gradients; ``width`` cuts one block into several tiles."""
    tiles = Tiles([gradients.shape[1]], width) if width else Tiles.runs(gradients.shape[1], block_size)
    plan = Plan(gradients.shape[1], len(gradients), False, dtype, torch.device("cpu"), 0, 0, None)
    evidence = kind(tiles, plan, damping, shrinkage)
    for gradient in gradients:
        evidence.add(gradient)
    return evidence


def check(evidence, matrix, weights, kept, unit, gone_units, tolerance=1e-9):
    """Costs, answers of all three kinds, and the rise, of one removal against the oracle."""
    tiles, units = evidence.tiles, int(unit.max()) + 1
    padded, alive = tiles.pad(unit + 1) - 1, tiles.pad(kept)
    values = tiles.pad(torch.where(kept, weights, 0))
    costs = unit_costs(evidence, padded, units, values, alive)
    assert costs.shape == (units,)
    close(costs, oracles.costs_of_units(matrix, weights, kept, unit), tolerance)
    gone = tiles.pad(torch.isin(unit, gone_units)) & alive
    for update in EVERY:
        moved, left = values.clone(), alive.clone()
        rise = remove_(evidence, padded, moved, left, gone, update)
        move, expected_rise = oracles.removed(matrix, weights, kept, unit, gone_units, update)
        expected = torch.where(kept & ~torch.isin(unit, gone_units), weights + move, 0)
        close(tiles.unpad(moved), expected, tolerance)
        assert rise == pytest.approx(expected_rise, rel=tolerance, abs=tolerance)
        assert torch.equal(left, alive & ~gone)
        assert not moved[~left].any()


def units_of(draw, dim, size, seed):
    """A unit for every coordinate, scattered so that units straddle blocks; some coordinates belong to none."""
    labels = torch.arange(dim) // size
    labels = labels[torch.randperm(dim, generator=generator(seed))] if draw(st.booleans()) else labels
    labels[torch.rand(dim, generator=generator(seed + 1)) < 0.1] = -1
    present, dense = torch.unique(labels[labels >= 0], return_inverse=True)
    out = torch.full_like(labels, -1)
    out[labels >= 0] = dense
    return out if len(present) else torch.zeros_like(labels)


@st.composite
def quadratics(draw):
    dim, rank = draw(st.integers(1, 11)), draw(st.integers(1, 9))
    seed, size = draw(st.integers(0, 10**6)), draw(st.sampled_from([1, 1, 2, 3, 11]))
    gradients = torch.randn(rank, dim, dtype=torch.float64, generator=generator(seed))
    block_size = draw(st.one_of(st.none(), st.integers(1, dim + 2)))
    unit = units_of(draw, dim, size, seed)
    weights = torch.randn(dim, dtype=torch.float64, generator=generator(seed + 2))
    kept = torch.rand(dim, generator=generator(seed + 3)) < draw(st.sampled_from([1.1, 1.1, 0.7]))
    gone = torch.arange(int(unit.max()) + 1)[torch.rand(int(unit.max()) + 1, generator=generator(seed + 4)) < 0.5]
    damping, shrinkage = draw(st.sampled_from([1e-3, 0.1, 2.0])), draw(st.sampled_from([0.0, 0.3, 1.0]))
    return gradients, block_size, weights, kept, unit, gone, damping, shrinkage


@few
@given(quadratics(), st.sampled_from([1, 2**30]), st.integers(2, 4))
def test_joint_is_the_constrained_minimum_and_costs_are_the_true_least_rises(case, work, width):
    gradients, block_size, weights, kept, unit, gone, damping, shrinkage = case
    fisher = oracles.window_fisher(list(gradients), len(gradients), damping, block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_module, "WORK", work)  # all blocks at once, or one at a time
        rows = gathered(GradientRows, gradients, block_size, damping, shrinkage)
        check(rows, oracles.shrunk(fisher, shrinkage), weights, kept, unit, gone)
        if block_size is not None:
            sums = gathered(GradientBlocks, gradients, block_size, damping, shrinkage)
            check(sums, oracles.shrunk(fisher, shrinkage), weights, kept, unit, gone)
        tiled = gathered(GradientRows, gradients, None, damping, shrinkage, width=width)
        whole = oracles.window_fisher(list(gradients), len(gradients), damping)
        check(tiled, oracles.shrunk(whole, shrinkage), weights, kept, unit, gone)


@few
@given(quadratics())
def test_any_matrix_of_the_library_serves(case):
    rows, block_size, weights, kept, unit, gone, damping, _ = case
    dim = len(weights)
    labels = torch.unique(torch.arange(dim) * 7 % 3, return_inverse=True)[1]
    moment = rows.mT @ rows
    groups = torch.nn.functional.one_hot(labels).double()
    groups /= groups.sum(0).sqrt()
    traces = groups.ne(0).double().mT @ moment.diagonal()
    for matrix in (
        Dense(moment, damping),
        Diagonal(moment.diagonal() + damping),
        LowRank(rows, damping, block_size=block_size),
        LowRank(rows[:0], damping),
        BlockMean(labels, groups.mT @ moment @ groups, traces, damping),
    ):
        check(Given(Tiles([dim], dim), matrix), matrix.to_dense(), weights, kept, unit, gone, 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rank", "block_size"), [(3, None), (3, 4), (12, 4)])
def test_gradients_of_half_precision_lose_nothing_but_their_own_digits(dtype, rank, block_size):
    gradients = torch.randn(rank, 10, generator=generator(0)).to(dtype).double()
    weights, everything = torch.randn(10, dtype=torch.float64, generator=generator(1)), torch.ones(10, dtype=torch.bool)
    evidence = gathered(GradientRows, gradients.float(), block_size, 1e-2, 0.2, dtype)
    assert evidence.rows.dtype == dtype
    matrix = oracles.shrunk(oracles.window_fisher(list(gradients), rank, 1e-2, block_size), 0.2)
    check(evidence, matrix, weights, everything, torch.arange(10), torch.tensor([1, 4, 5]), 1e-6)
    check(evidence, matrix, weights, everything, torch.arange(10) // 3, torch.tensor([1]), 1e-6)


def test_float16_takes_gradients_beyond_its_range():
    evidence = gathered(GradientRows, torch.tensor([[1e6, -1e6, 1.0]]), None, 1.0, dtype=torch.float16)
    assert evidence.rows.flatten().tolist() == [65504, -65504, 1]


def test_a_cost_is_the_least_rise_that_any_answer_reaches():
    """Against a search that knows no formula: the rise of every answer on a grid is at least the cost."""
    gradients = torch.tensor([[1.0, 2.0, 0.5], [0.5, -1.0, 1.0]], dtype=torch.float64)
    matrix = oracles.window_fisher(list(gradients), 2, 0.1)
    weights = torch.tensor([0.5, -1.0, 0.7], dtype=torch.float64)
    everything = torch.ones(3, dtype=torch.bool)
    costs = unit_costs(gathered(GradientRows, gradients, None, 0.1), torch.arange(3), 3, weights, everything)
    grid = torch.linspace(-2, 2, 401, dtype=torch.float64)
    for i in range(3):
        answers = torch.cartesian_prod(grid, grid)
        moves = torch.cat([answers[:, :i], torch.full((len(answers), 1), -float(weights[i])), answers[:, i:]], 1)
        rises = ((moves @ matrix) * moves).sum(1) / 2
        assert float(costs[i]) <= float(rises.min()) <= float(costs[i]) + 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_one_after_another_comes_close_to_the_best_subset_and_never_below(seed):
    gradients = torch.randn(4, 6, dtype=torch.float64, generator=generator(seed))
    matrix, everything = oracles.window_fisher(list(gradients), 4, 0.1), torch.ones(6, dtype=torch.bool)
    weights, unit = torch.randn(6, dtype=torch.float64, generator=generator(seed + 9)), torch.arange(6)
    evidence = gathered(GradientRows, gradients, None, 0.1)

    def best(size):
        subsets = itertools.combinations(range(6), size)
        return min(
            oracles.least_rise(matrix, weights, everything, torch.isin(unit, torch.tensor(s)))[1] for s in subsets
        )

    moved, kept, rises = weights.clone(), everything.clone(), []
    for _ in range(3):
        costs = unit_costs(evidence, unit, 6, moved, kept)
        gone = unit == torch.where(kept, costs, torch.inf).argmin()
        rises.append(remove_(evidence, unit, moved, kept, gone, "joint"))
    # The weights stay at the minimum over what is left, so rises of steps add up to the rise of all of them.
    total = (moved - weights) @ matrix @ (moved - weights) / 2
    assert sum(rises) == pytest.approx(float(total), rel=1e-9)
    assert rises[0] == pytest.approx(best(1), rel=1e-9)
    assert float(total) >= best(3) * (1 - 1e-9)
    assert float(total) == pytest.approx(oracles.least_rise(matrix, weights, everything, ~kept)[1], rel=1e-9)


def test_joint_never_rises_more_than_the_others():
    gradients = torch.randn(5, 12, dtype=torch.float64, generator=generator(3))
    weights, everything = torch.randn(12, dtype=torch.float64, generator=generator(4)), torch.ones(12, dtype=torch.bool)
    evidence, gone = gathered(GradientRows, gradients, None, 0.01), torch.arange(12) < 6
    rises = {
        update: remove_(evidence, torch.arange(12), weights.clone(), everything.clone(), gone, update)
        for update in EVERY
    }
    assert rises["joint"] < min(rises["single"], rises["none"])


def test_a_step_by_hand():
    """G = I + (1, 1)(1, 1)ᵀ = [[2, 1], [1, 2]], its inverse [[2, −1], [−1, 2]]/3, w = (2, 4)."""
    everything, gone = torch.ones(2, dtype=torch.bool), torch.tensor([True, False])
    weights = torch.tensor([2.0, 4.0], dtype=torch.float64)
    evidence = gathered(GradientRows, torch.ones(1, 2, dtype=torch.float64), None, 1.0)
    costs = unit_costs(evidence, torch.arange(2), 2, weights, everything)
    assert costs.tolist() == pytest.approx([2**2 / (2 * 2 / 3), 4**2 / (2 * 2 / 3)])
    moved, kept = weights.clone(), everything.clone()
    # δ₂ = −G₂₂⁻¹ G₂₁ δ₁ = −½ · 1 · (−2) = 1, and ½ δᵀGδ = ½ (2·4 − 2·2 + 2·1) = 3.
    assert remove_(evidence, torch.arange(2), moved, kept, gone, "joint") == pytest.approx(3.0)
    assert moved.tolist() == pytest.approx([0.0, 5.0])
    assert kept.tolist() == [False, True]


def test_large_coupled_units_and_nothing_to_do():
    gradients = torch.randn(3, 9, dtype=torch.float64, generator=generator(1))
    weights = torch.randn(9, dtype=torch.float64, generator=generator(2))
    matrix, everything = oracles.window_fisher(list(gradients), 3, 0.1), torch.ones(9, dtype=torch.bool)
    evidence = gathered(GradientRows, gradients, None, 0.1)
    check(evidence, matrix, weights, everything, torch.zeros(9, dtype=torch.long), torch.tensor([0]))
    check(evidence, matrix, weights, ~everything, torch.arange(9), torch.arange(3))
    check(evidence, matrix, weights, everything, torch.arange(9), torch.arange(0))


@pytest.mark.parametrize("block", [1, 3, 100])
def test_pieces(block):
    unit = torch.tensor([3, 3, 0, -1, 0, 3, 0, 5, 5, 5, 5, 5, 5, 5])
    expected = sorted(
        (u, [c for c in range(start, min(start + block, len(unit))) if unit[c] == u])
        for u in (0, 3, 5)
        for start in range(0, len(unit), block)
    )
    found = []
    for coordinates, owners in pieces(unit, block):
        rows = [[c for c in row if c >= 0] for row in coordinates.tolist()]
        assert all(2 * len(row) > coordinates.shape[1] for row in rows)  # no long one among short ones
        found += zip(owners.tolist(), rows, strict=True)
    assert sorted(found) == [(u, row) for u, row in expected if row]
    assert not list(pieces(torch.full((4,), -1), 2))


@pytest.mark.parametrize("kind", [GradientRows, GradientBlocks])
def test_launches_do_not_grow_with_the_number_of_blocks(kind):
    counts = []
    for dim in (40, 400):
        gradients = torch.randn(6, dim, dtype=torch.float64, generator=generator(0))
        everything, unit = torch.ones(dim, dtype=torch.bool), torch.arange(dim)
        evidence = gathered(kind, gradients, 4, 0.1)
        weights, kept, gone = torch.randn(dim, dtype=torch.float64), everything.clone(), unit % 2 == 0

        def work(evidence=evidence, unit=unit, dim=dim, weights=weights, kept=kept, gone=gone):
            unit_costs(evidence, unit, dim, weights, kept)
            unit_costs(evidence, unit // 3, dim // 3 + 1, weights, kept)
            for update in sorted(EVERY):
                remove_(evidence, unit, weights.clone(), kept.clone(), gone, update)

        counts.append(len(count(work).launches))
    assert counts[0] == counts[1]


def test_a_diagonal_is_optimal_brain_damage():
    values, weights = torch.tensor([1.0, -4.0, 0.5]), torch.tensor([2.0, 1.0, 3.0])
    evidence = on_the_diagonal(Tiles([3]), values, 0.5)
    costs = unit_costs(evidence, torch.arange(3), 3, weights, torch.ones(3, dtype=torch.bool))
    assert costs.tolist() == pytest.approx([1.5 * 4 / 2, 4.5 * 1 / 2, 1.0 * 9 / 2])
