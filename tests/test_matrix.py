import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import block_means, dense_power, low_rank_power, spans
from quadric import BlockMean, Dense, Diagonal, GradientWindow, LowRank
from quadric.matrix import Groups, cholesky
from quadric.tiles import Tiles

few = settings(deadline=None, max_examples=20)
POWERS = [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, -0.3, 1.7, 3]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b, tolerance):
    """Relative to the largest entry of what is expected."""
    assert a.shape == b.shape
    assert float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max())


@st.composite
def low_ranks(draw):
    """Rows with singular values spread over up to four decades: the squares, over eight."""
    rank, dim = draw(st.integers(0, 14)), draw(st.integers(1, 12))
    block_size = draw(st.one_of(st.none(), st.integers(1, 14)))
    decades, seed = draw(st.sampled_from([0.0, 2.0, 4.0])), draw(st.integers(0, 99))
    scales = torch.logspace(-decades / 2, decades / 2, max(rank, 1), dtype=torch.float64)[:rank]
    rows = torch.randn(rank, dim, dtype=torch.float64, generator=generator(seed)) * scales.unsqueeze(1)
    if draw(st.booleans()) and rank > 1:
        rows[-1] = rows[0]  # linearly dependent
    top = float(torch.linalg.matrix_norm(rows, 2)) ** 2 if rank else 1.0
    return rows, max(top, 1e-3) / draw(st.sampled_from([1e1, 1e4, 1e8])), block_size


def check_against_dense(matrix, dense, tolerance, powers=POWERS):
    """Every operation against powers of the same matrix made dense, ``dense(power)``."""
    dim = matrix.dim
    v = torch.randn(2, 3, dim, dtype=torch.float64, generator=generator(1000))  # no seed of the rows
    for power in powers:
        bound = tolerance * max(1.0, abs(power))  # the relative error of x**p is |p| times that of x
        close(matrix.apply(v, power), v @ dense(power), bound)
        close(matrix.apply(v[0, 0], power), dense(power) @ v[0, 0], bound)
        close(matrix.diagonal(power), dense(power).diagonal(), bound)
        close(matrix.quad(v, power), torch.einsum("abi,ij,abj->ab", v, dense(power), v), bound)
    close(matrix.solve(v), v @ dense(-1.0), tolerance)
    close(matrix.inverse_diagonal(), dense(-1.0).diagonal(), tolerance)
    close(matrix.to_dense(), dense(1.0), tolerance)
    close(matrix @ v, v @ dense(1.0), tolerance)
    close(matrix.trace(), dense(1.0).trace(), tolerance)
    assert float(matrix.logdet()) == pytest.approx(float(torch.linalg.slogdet(dense(1.0))[1]), rel=1e-7, abs=1e-6)
    assert matrix.shape == (dim, dim)
    assert matrix.apply(v[:0]).shape == (0, 3, dim)


@few
@given(low_ranks())
def test_low_rank_is_its_dense_definition(case):
    rows, damping, block_size = case
    matrix = LowRank(rows, damping, block_size=block_size)
    assert matrix.rank == len(rows)
    close(matrix.rows, rows, 0) if rows.numel() else None
    check_against_dense(matrix, lambda power: low_rank_power(rows, damping, power, block_size), 1e-8)


@pytest.mark.parametrize("ratio", [1e2, 1e5, 1e8])
@pytest.mark.parametrize(("rank", "dim"), [(1, 400), (16, 400), (64, 30), (30, 30)])
def test_float32_solves_hold_at_extreme_damping(ratio, rank, dim):
    rows = torch.randn(rank, dim, generator=generator(3))
    damping = float(torch.linalg.matrix_norm(rows.double(), 2)) ** 2 / ratio
    matrix, dense = LowRank(rows, damping), low_rank_power(rows, damping, -1.0)
    generic = torch.randn(5, dim, generator=generator(4))
    inside = torch.randn(5, rank, generator=generator(5)).double() @ rows.double()
    for v in (generic, inside.float(), rows):
        # What is asked of the solution is measured at the very vector handed in, rounded to float32 as it is.
        expected = v.double() @ dense
        error = (matrix.solve(v).double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.max()) <= 1e-3
        assert matrix.solve(v).dtype == torch.float32
    close(matrix.inverse_diagonal(), dense.diagonal(), 1e-3)


def test_types_and_devices():
    rows = torch.randn(3, 7, generator=generator(0))
    for stored in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        matrix = LowRank(rows.to(stored), 0.5)
        wanted = torch.float64 if stored == torch.float64 else torch.float32
        assert (matrix.dtype, matrix.device.type) == (wanted, "cpu")
        close(matrix.solve(torch.ones(7)), low_rank_power(rows.to(stored), 0.5, -1.0).sum(0), 1e-5)
        assert matrix.apply(torch.ones(7, dtype=torch.float64), 0.5).dtype == torch.float64
        assert matrix.apply(torch.ones(7, dtype=torch.bfloat16)).dtype == wanted
        assert matrix.diagonal().dtype == matrix.logdet().dtype == matrix.trace().dtype == wanted
        assert matrix.sample(2).dtype == wanted
    assert "dim=7" in repr(LowRank(rows, 0.5))


def test_vectors_of_any_layout():
    rows = torch.randn(3, 8, dtype=torch.float64, generator=generator(0))
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 2, 0])
    v = torch.randn(8, 5, dtype=torch.float64, generator=generator(1))
    for matrix in (
        LowRank(rows, 0.5),
        LowRank(rows, 0.5, block_size=3),
        Diagonal(rows[0] ** 2),
        Dense((rows.T @ rows)[:4, :4].expand(2, 4, 4), 0.5),
        by_means(rows, labels),
    ):
        for power in (-1.0, 0.5, 1.0):
            assert torch.equal(matrix.apply(v.T, power), matrix.apply(v.T.contiguous(), power))
            assert matrix.apply(v[:, 0].expand(4, 8), power).shape == (4, 8)
            assert matrix.apply(v[:, :0].T, power).shape == (0, 8)


def test_a_matrix_is_a_value():
    rows, values = torch.ones(2, 3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    coupling, traces = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    small = torch.eye(3, dtype=torch.float64)
    matrices = [LowRank(rows, 1.0), Diagonal(values), BlockMean(labels, coupling, traces, 1.0), Dense(small, 1.0)]
    before = [matrix.to_dense() for matrix in matrices]
    for tensor in (rows, values, coupling, traces, labels, small):
        tensor.zero_()
    v = torch.ones(3, dtype=torch.float64)
    for matrix, dense in zip(matrices, before, strict=True):
        assert torch.equal(matrix.to_dense(), dense)
        result = matrix.apply(v, 0)
        result.zero_()
        assert torch.equal(v, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("power", [1.0, -1.0])
@pytest.mark.parametrize("block_size", [None, 2])
def test_samples_have_the_covariance_asked_for(power, block_size):
    rows = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    matrix, n = LowRank(rows, 0.5, block_size=block_size), 40_000
    draws = matrix.sample(n, power, generator=generator(0))
    covariance, dense = draws.T @ draws / n, low_rank_power(rows, 0.5, power, block_size)
    # The standard error of an entry of a sample covariance is at most sqrt(2 / n) times the largest variance.
    assert float((covariance - dense).abs().max()) < 5 * math.sqrt(2 / n) * float(dense.diagonal().max())
    assert float(draws.mean(0).abs().max()) < 5 * math.sqrt(float(dense.diagonal().max()) / n)
    assert torch.equal(draws, matrix.sample(n, power, generator=generator(0)))


def test_rank_zero_is_a_multiple_of_the_identity():
    matrix = LowRank(torch.zeros(0, 5), 4.0)
    v = torch.arange(5.0)
    torch.testing.assert_close(matrix.solve(v), v / 4)
    torch.testing.assert_close(matrix.apply(v, -0.5), v / 2)
    torch.testing.assert_close(matrix.logdet(), torch.tensor(5 * math.log(4.0)))


def test_tiny_and_huge_numbers_side_by_side():
    """Directions without any curvature, next to some of 1e12."""
    rows = torch.diag(torch.tensor([1e6, 1.0, 1e-9, 0.0], dtype=torch.float64))
    matrix = LowRank(rows, 1e-3)
    for power in POWERS:
        close(matrix.diagonal(power), (rows.diagonal() ** 2 + 1e-3) ** power, 1e-8)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_low_rank_refuses_a_bad_damping(damping):
    with pytest.raises(ValueError, match=rf"damping.*got {damping}: .+"):
        LowRank(torch.ones(1, 2), damping)


@pytest.mark.parametrize(
    ("rows", "shown"),
    [(torch.tensor([[1.0, math.nan]]), "nan"), (torch.tensor([[math.inf]]), "inf"), (torch.ones(3), r"\(3,\)")],
)
def test_low_rank_refuses_bad_rows(rows, shown):
    with pytest.raises(ValueError, match=rf"rows.*{shown}.*: .+"):
        LowRank(rows, 1.0)
    with pytest.raises(ValueError, match="block_size must be an integer of at least 1, got 0"):
        LowRank(torch.ones(1, 2), 1.0, block_size=0)


@pytest.mark.parametrize("shape", [(), (2,), (3, 4), (0,)])
def test_vectors_of_another_length_are_refused(shape):
    for matrix in (
        LowRank(torch.ones(1, 3), 1.0),
        Diagonal(torch.ones(3)),
        Dense(torch.eye(3), 1.0),
        by_means(torch.ones(1, 3), torch.zeros(3).long()),
    ):
        for power in (-1.0, 0, 1.0):
            with pytest.raises(ValueError, match=r"shape \(.*\).*3 entries: .+"):
                matrix.apply(torch.ones(shape), power)


def test_gradients_flow_through_vectors_but_not_into_the_matrix():
    """A quadratic penalty around old weights (EWC, Laplace) is differentiated in its vector."""
    rows = torch.randn(2, 5, generator=generator(0), requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 1])
    means = by_means(rows.detach(), labels)
    dense = Dense(rows.T @ rows, 0.5)
    for matrix in (LowRank(rows, 0.5), LowRank(rows, 0.5, block_size=2), Diagonal(rows[0].detach() ** 2), means, dense):
        for power in (-1.0, 0.5, 1.0):
            v = torch.randn(3, 5, generator=generator(1), requires_grad=True)
            matrix.quad(v, power).sum().backward()
            torch.testing.assert_close(v.grad, 2 * matrix.apply(v.detach(), power).to(v.dtype))
            assert not matrix.diagonal(power).requires_grad
    assert rows.grad is None


def test_inference_mode_leaves_nothing_behind():
    with torch.inference_mode():
        inside = LowRank(torch.ones(2, 3), 1.0)
        first = inside.solve(torch.ones(3)).clone()
    torch.testing.assert_close(LowRank(torch.ones(2, 3), 1.0).solve(torch.ones(3)), first)
    torch.testing.assert_close(inside.solve(torch.ones(3)), first)


# Diagonal.


@few
@given(st.integers(1, 9), st.integers(0, 99))
def test_diagonal_is_its_dense_definition(dim, seed):
    values = torch.rand(dim, dtype=torch.float64, generator=generator(seed)) * 100 + 0.01
    check_against_dense(Diagonal(values), lambda power: torch.diag(values**power), 1e-12)


@pytest.mark.parametrize(
    ("values", "shown"),
    [(torch.tensor([1.0, math.nan]), "nan"), (torch.tensor([-math.inf]), "-inf"), (torch.ones(2, 2), r"\(2, 2\)")],
)
def test_diagonal_refuses_bad_values(values, shown):
    with pytest.raises(ValueError, match=rf"values.*{shown}.*: .+"):
        Diagonal(values)
    with pytest.raises(ValueError, match="negative"):
        Diagonal(torch.tensor([1.0, -1e-9]))


# Dense.


@st.composite
def dense_ones(draw):
    """Positive semi-definite blocks of any rank, their eigenvalues over up to eight decades."""
    blocks, n, rank = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 8))
    scales = torch.logspace(-draw(st.sampled_from([0.0, 2.0])), 0, max(rank, 1), dtype=torch.float64)[:rank]
    seed = generator(draw(st.integers(0, 99)))
    rows = torch.randn(blocks, rank, n, dtype=torch.float64, generator=seed) * scales.unsqueeze(1)
    return rows.mT @ rows, draw(st.sampled_from([1e-4, 1.0, 10.0]))


@few
@given(dense_ones())
def test_dense_is_its_definition(case):
    values, damping = case
    whole = torch.block_diag(*values) + damping * torch.eye(values.shape[0] * values.shape[1], dtype=torch.float64)
    check_against_dense(Dense(values, damping), lambda power: dense_power(whole, power), 1e-8)
    if len(values) == 1:
        check_against_dense(Dense(values[0], damping), lambda power: dense_power(whole, power), 1e-8)


@pytest.mark.parametrize("ratio", [1e2, 1e6, 1e10])
def test_dense_solves_hold_in_float32_at_extreme_damping(ratio):
    """The matrix is the same numbers in double precision, where λ is not hidden."""
    rows = torch.randn(5, 9, generator=generator(0))
    values = rows.T @ rows
    damping = float(torch.linalg.matrix_norm(values.double(), 2)) / ratio
    matrix = Dense(values, damping)
    v = torch.randn(3, 9, generator=generator(1))
    # Single precision leaves M eigenvalues as negative as 1e-7 of the largest: below λ where the ratio is 1e2 or 1e6.
    solved = matrix.solve(v)
    assert solved.dtype == torch.float32
    assert bool((matrix.quad(v, -1.0) > 0).all())
    if ratio < 1e6:
        dense = values.double() + damping * torch.eye(9, dtype=torch.float64)
        close(solved, torch.linalg.solve(dense, v.double().T).T, 1e-5)


def test_dense_types():
    values = torch.eye(2).expand(3, 2, 2)
    for stored in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        matrix = Dense(values.to(stored), 0.5)
        wanted = torch.float64 if stored == torch.float64 else torch.float32
        assert (matrix.dtype, matrix.device.type, matrix.dim) == (wanted, "cpu", 6)
        for power in (-1.0, 0.5, 1.0):
            assert matrix.apply(torch.ones(6, dtype=torch.bfloat16), power).dtype == wanted
            assert matrix.apply(torch.ones(6, dtype=torch.float64), power).dtype == torch.float64
            assert matrix.diagonal(power).dtype == wanted
        assert matrix.logdet().dtype == matrix.sample(2).dtype == wanted
        torch.testing.assert_close(matrix.solve(torch.ones(6)).float(), torch.full((6,), 1 / 1.5))


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_dense_refuses_a_bad_damping(damping):
    with pytest.raises(ValueError, match=rf"damping.*got {damping}: .+"):
        Dense(torch.eye(2), damping)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (torch.tensor([[math.nan]]), "nan"),
        (torch.tensor([[-math.inf]]), "-inf"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(2, 3), r"\(2, 3\)"),
        (torch.ones(2, 2, 3, 3), r"\(2, 2, 3, 3\)"),
    ],
)
def test_dense_refuses_bad_values(values, shown):
    with pytest.raises(ValueError, match=rf"values.*{shown}.*: .+"):
        Dense(values, 1.0)


# Block means.


def indicator(labels):
    count = int(labels.max()) + 1
    return torch.nn.functional.one_hot(labels, count).double()


def by_means(rows, labels, damping=0.25):
    """The block mean matrix of ``rowsᵀ rows``."""
    dense, P = rows.double().T @ rows.double(), indicator(labels)
    Q = P / P.sum(0).sqrt()
    return BlockMean(labels, Q.T @ dense @ Q, P.T @ dense.diagonal(), damping)


@st.composite
def grouped(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if draw(st.booleans()):
        labels = labels[torch.randperm(len(labels), generator=generator(draw(st.integers(0, 99))))]
    rank = draw(st.integers(1, 9))
    rows = torch.randn(rank, len(labels), dtype=torch.float64, generator=generator(draw(st.integers(0, 99))))
    return rows, labels, draw(st.sampled_from([1e-6, 1e-2, 1.0]))


@few
@given(grouped())
def test_block_mean_is_its_dense_definition(case):
    rows, labels, damping = case
    dense = block_means(rows.T @ rows, labels) + damping * torch.eye(len(labels), dtype=torch.float64)
    check_against_dense(by_means(rows, labels, damping), lambda power: dense_power(dense, power), 1e-8)


@few
@given(grouped())
def test_block_means_stay_positive_semidefinite(case):
    rows, labels, _ = case
    dense = rows.T @ rows
    lowest = float(torch.linalg.eigvalsh(block_means(dense, labels))[0])
    assert lowest >= -1e-12 * float(dense.trace())
    matrix = by_means(rows, labels, 0.0)
    close(matrix.to_dense(), block_means(dense, labels), 1e-12)
    assert float(matrix.trace()) == pytest.approx(float(dense.trace()))


def test_groups_of_one_element_keep_the_whole_matrix():
    rows = torch.randn(6, 4, dtype=torch.float64, generator=generator(0))
    matrix, dense = by_means(rows, torch.tensor([2, 0, 3, 1]), 0.0), rows.T @ rows
    for power in (-1.0, -0.5, 2.0):
        close(matrix.apply(torch.eye(4, dtype=torch.float64), power), dense_power(dense, power), 1e-8)


def test_consecutive_groups_are_the_same_as_labels():
    runs, labels = [(2, 3), (1, 4), (3, 1)], torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5])
    v = torch.randn(2, 13, dtype=torch.float64, generator=generator(0))
    groups = Groups.consecutive(runs, torch.device("cpu"))
    assert torch.equal(groups.sizes, Groups(labels).sizes)
    torch.testing.assert_close(groups.sum(v), Groups(labels).sum(v))
    torch.testing.assert_close(groups.sum(v), v @ indicator(labels))
    scale, shift = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    torch.testing.assert_close(groups.affine(v, scale, shift), v * scale[labels] + shift[labels])
    torch.testing.assert_close(Groups(labels).affine(v, scale, shift), v * scale[labels] + shift[labels])


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (torch.tensor([0, 2]), "group 1 of 3 has no member"),
        (torch.tensor([-1, 0]), r"\(2,\)"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([], dtype=torch.long), r"\(0,\)"),
        (torch.zeros(2, 2, dtype=torch.long), r"\(2, 2\)"),
    ],
)
def test_bad_groups_are_refused(labels, shown):
    with pytest.raises(ValueError, match=rf"{shown}.*: .+"):
        Groups(labels)


def test_block_mean_refuses_what_does_not_fit():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"\(3, 3\).*number 2: .+"):
        BlockMean(labels, torch.eye(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"got -1\.0: .+"):
        BlockMean(labels, torch.eye(2), torch.ones(2), -1.0)


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_block_mean_does_not_invert_a_singular_matrix(power):
    one_each = BlockMean(torch.tensor([0, 1]), torch.ones(2, 2), torch.ones(2))
    no_spread = BlockMean(torch.tensor([0, 0]), torch.ones(1, 1), torch.ones(1))
    for matrix in (one_each, no_spread):
        with pytest.raises(ValueError, match=r"singular.*damping"):
            matrix.apply(torch.ones(2), power)
        assert torch.isfinite(matrix.apply(torch.ones(2), 0.5)).all()


# What they share.


def test_cholesky_of_a_matrix_that_rounding_made_indefinite():
    small = torch.tensor([[1e30, 1e30], [1e30, 1e30]], dtype=torch.float64) - torch.eye(2, dtype=torch.float64) * 1e13
    factor = cholesky(small, 1e-2)
    assert bool(torch.isfinite(factor).all())
    close(factor @ factor.mT, small, 1e-12)
    assert float(factor.diagonal().abs().min()) > 0


def test_a_matrix_of_a_window_that_has_moved_on_refuses():
    window = GradientWindow(3, 2, 0.5)
    window.update(torch.ones(3))
    matrix = window.matrix()
    before = matrix.solve(torch.ones(3))
    window.update(torch.zeros(3))
    for use in (matrix.solve, matrix.apply, matrix.quad):
        with pytest.raises(RuntimeError, match=r"updated since: call matrix\(\) again"):
            use(torch.ones(3))
    assert not torch.equal(window.matrix().solve(torch.ones(3)), before)


def test_spans_of_the_oracle():
    assert spans(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert spans(5) == [(0, 5)]


# Parts of a matrix: what pruning asks of it.


def check_parts(matrix, seed, tolerance=1e-8):
    """Restriction, completion and multipliers against the dense matrix; a unit may hold any coordinates."""
    draw, dense = generator(seed), matrix.to_dense().double()
    dim, kept = matrix.dim, torch.rand(matrix.dim, generator=draw) < 0.6
    v = torch.randn(dim, dtype=torch.float64, generator=draw)
    expected = torch.zeros_like(dense)
    expected[kept.outer(kept)] = dense[kept.outer(kept)]
    for restricted in (matrix.restrict(kept), matrix.restrict(torch.ones_like(kept)).restrict(kept)):
        inside = restricted.to_dense().double()
        assert bool((inside.diagonal() > 0).all())
        close(torch.where(kept.outer(kept), inside, 0), expected, tolerance)
        assert float((inside.fill_diagonal_(0) * ~kept.outer(kept)).abs().max()) < 1e-12
        inverse = torch.linalg.inv(dense[kept][:, kept])
        close(restricted.inverse_diagonal()[kept], inverse.diagonal(), tolerance) if bool(kept.any()) else None

    answer = matrix.complete(v, ~kept)
    best = -torch.linalg.solve(dense[kept][:, kept], dense[kept][:, ~kept] @ v[~kept])
    close(answer[~kept], v[~kept], 0) if not bool(kept.all()) else None
    if bool(kept.any()):
        assert float((answer[kept] - best).abs().max()) <= tolerance * max(1.0, float(best.abs().max()))

    inverse = torch.linalg.inv(dense)
    for size in {1, min(2, dim), dim}:
        units = torch.randperm(dim, generator=draw)[: dim // size * size].view(-1, size)
        units[0, size // 2 + 1 :] = -1
        found = matrix.multipliers(v, units)
        for unit, multipliers in zip(units, found, strict=True):
            u = unit[unit >= 0]
            close(multipliers[: len(u)], torch.linalg.solve(inverse[u][:, u], v[u]), 100 * tolerance)
            assert not multipliers[len(u) :].any()


@few
@given(low_ranks(), st.integers(0, 99), st.integers(1, 5))
def test_parts_of_low_rank(case, seed, width):
    rows, damping, block_size = case
    check_parts(LowRank(rows, damping, block_size=block_size), seed, 1e-6)
    whole = Tiles([rows.shape[1]], width)  # one block in several tiles, its columns scaled
    columns = torch.rand(whole.count, whole.width, dtype=torch.float64, generator=generator(seed)) + 0.5
    check_parts(LowRank.of_tiles(whole.cut(whole.pad(rows)), whole, damping, 0.5, columns), seed, 1e-6)


@few
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_parts_of_dense_and_diagonal(blocks, n, seed):
    rows = torch.randn(blocks, n + 1, n, dtype=torch.float64, generator=generator(seed))
    check_parts(Dense(rows.mT @ rows, 0.1), seed)
    check_parts(Diagonal(torch.rand(blocks * n, dtype=torch.float64, generator=generator(seed)) + 0.1), seed)


@few
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_parts_of_block_means(labels, seed):
    _, labels = torch.unique(torch.tensor(labels), return_inverse=True)
    count = int(labels.max()) + 1
    rows = torch.randn(count + 2, count, dtype=torch.float64, generator=generator(seed))
    coupling = rows.mT @ rows
    traces = coupling.diagonal() * (1 + torch.bincount(labels))
    groups = Groups(labels)
    assert torch.equal(groups.labels, labels)
    check_parts(BlockMean(groups, coupling, traces, damping=0.1), seed)


def test_units_of_more_coordinates_than_rows_in_several_blocks():
    """Each unit lies within one block, as pruning cuts them; one factor for each block."""
    rows = torch.randn(2, 12, dtype=torch.float64, generator=generator(5))
    matrix = LowRank(rows, 0.1, block_size=6)
    inverse = torch.linalg.inv(matrix.to_dense())
    v = torch.randn(12, dtype=torch.float64, generator=generator(6))
    units = torch.tensor([[6, 7, 8, 11], [0, 2, 4, -1], [9, 10, -1, -1]])
    for kept in (torch.ones(12, dtype=torch.bool), torch.arange(12) != 3):
        restricted = matrix.restrict(kept)
        inverse = torch.linalg.inv(restricted.to_dense())
        for unit, found in zip(units, restricted.multipliers(v, units), strict=True):
            u = unit[unit >= 0]
            close(found[: len(u)], torch.linalg.solve(inverse[u][:, u], v[u]), 1e-9)
