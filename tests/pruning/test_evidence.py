"""Evidence: sections of a matrix over padded coordinates, from gradients one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from quadric import LowRank
from quadric.pruning import evidence as evidence_module
from quadric.pruning.evidence import TOGETHER, Given, GradientBlocks, GradientRows, on_the_diagonal
from quadric.pruning.memory import Plan
from quadric.tiles import Tiles

CPU = torch.device("cpu")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gathered(kind, gradients, tiles, damping, shrinkage, dtype=torch.float64):
    evidence = kind(tiles, Plan(tiles.dim, len(gradients), False, dtype, CPU, 0, 0, None), damping, shrinkage)
    for gradient in gradients:
        evidence.add(gradient)
    return evidence


def dense(evidence):
    """The matrix over unpadded coordinates, from its sections, which must cover every coordinate once."""
    length, tiles = evidence.tiles.length, evidence.tiles
    out, covered = torch.zeros(length, length, dtype=torch.float64), torch.zeros(length, dtype=torch.long)
    for section in evidence.sections():
        scale = section.scale.double().expand(section.columns.stop - section.columns.start)
        inside = scale.unsqueeze(1) * section.matrix.to_dense().double() * scale
        out[section.columns, section.columns] = inside
        covered[section.columns] += 1
        assert section.columns.start % section.block == 0
    assert bool((covered == 1).all())
    real = tiles.pad(torch.ones(tiles.dim, dtype=torch.bool))
    assert not out[real][:, ~real].any()
    return out[real][:, real]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 12), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 14)),
    st.sampled_from([1e-5, 0.1, 3.0]), st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([1, 2**30]),
    st.integers(1, 5),
)  # fmt: skip
def test_sections_are_the_matrix(dim, rank, block_size, damping, shrinkage, work, width):
    gradients = torch.randn(rank, dim, dtype=torch.float64, generator=generator(dim + 100 * rank))
    cut = Tiles([dim], dim) if block_size is None or block_size >= dim else Tiles.runs(dim, block_size)
    fisher = oracles.shrunk(oracles.window_fisher(list(gradients), rank, damping, block_size), shrinkage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_module, "WORK", work)
        for kind in (GradientRows, GradientBlocks):
            evidence = gathered(kind, gradients, cut, damping, shrinkage)
            torch.testing.assert_close(dense(evidence), fisher, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(dense(evidence), fisher, rtol=1e-10, atol=1e-12)  # looking changes nothing
        whole = oracles.shrunk(oracles.window_fisher(list(gradients), rank, damping), shrinkage)
        tiled = gathered(GradientRows, gradients, Tiles([dim], width), damping, shrinkage)
        torch.testing.assert_close(dense(tiled), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, TOGETHER - 1, TOGETHER, TOGETHER + 1, 2 * TOGETHER + 5])
def test_sums_take_any_number_of_gradients(count):
    gradients = torch.randn(count, 7, dtype=torch.float64, generator=generator(count))
    evidence = gathered(GradientBlocks, gradients, Tiles.runs(7, 3), 0.1, 0.0)
    fisher = oracles.window_fisher(list(gradients), count, 0.1, 3)
    torch.testing.assert_close(dense(evidence), fisher, rtol=1e-12, atol=1e-12)


def test_what_is_given():
    matrix = LowRank(torch.randn(2, 6, generator=generator(0)).double(), 0.5)
    torch.testing.assert_close(dense(Given(Tiles([6], 6), matrix)), matrix.to_dense())
    values = torch.tensor([1.0, -2.0, 0.0])
    torch.testing.assert_close(
        dense(on_the_diagonal(Tiles([3], 2), values, 0.5)), torch.diag(torch.tensor([1.5, 2.5, 0.5]).double())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_window_and_computes_in_double(dtype):
    gradients = torch.randn(3, 8, generator=generator(0)).to(dtype)
    evidence = gathered(GradientRows, gradients.float(), Tiles.runs(8, 5), 1e-3, 0.1, dtype)
    assert evidence.rows.dtype == dtype
    fisher = oracles.shrunk(oracles.window_fisher(list(gradients.double()), 3, 1e-3, 5), 0.1)
    torch.testing.assert_close(dense(evidence), fisher, rtol=1e-6, atol=1e-9)
