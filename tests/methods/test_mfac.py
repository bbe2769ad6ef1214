import math

import pytest
import torch
from torch import nn

import oracles
from counting import bytes_kept, count
from quadric import MFAC, GradientWindow
from quadric.methods.mfac import newest_coefficients

SHAPES = [(3, 4), (5,), (), (2, 2)]
DIM = 22


def draws(n, dim, dtype=torch.float64, seed=0):
    return list(torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype))


def parameters(flat, shapes=SHAPES):
    pieces = flat.split([math.prod(shape) for shape in shapes])
    return [nn.Parameter(piece.clone().reshape(shape)) for piece, shape in zip(pieces, shapes, strict=True)]


def put(params, flat):
    for p, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = piece.clone().reshape(p.shape)


def flatten(params):
    return torch.cat([p.detach().reshape(-1) for p in params])


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("block_size", [None, 1, 4, 7, 21, 100])
@pytest.mark.parametrize("window", [1, 3, 10])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_optimizer_is_its_dense_definition(block_size, window, dtype, tolerance):
    start, *gradients = draws(13, DIM, dtype)
    given = {
        "lr": 0.1,
        "momentum": 0.8,
        "window": window,
        "damping": 1e-2,
        "block_size": block_size,
        "weight_decay": 0.1,
    }
    params, oracle = parameters(start), oracles.MFAC(start, **given)
    optimizer = MFAC(params, **given)
    for gradient in gradients:
        put(params, gradient)
        optimizer.step()
        oracle.step(gradient)
        assert relative(flatten(params), oracle.theta) < tolerance


def test_groups_and_devices_of_their_own():
    start, *gradients = draws(9, DIM)
    params = parameters(start)
    first, second = {"lr": 0.1, "window": 3, "damping": 0.1}, {"lr": 0.2, "window": 5, "damping": 0.01, "momentum": 0.0}
    optimizer = MFAC([{"params": params[:2], **first}, {"params": params[2:], **second}])
    first_oracle, second_oracle = (
        oracles.MFAC(start[:17], momentum=0.9, **first),
        oracles.MFAC(start[17:], **second),
    )
    for gradient in gradients:
        put(params, gradient)
        optimizer.step()
        first_oracle.step(gradient[:17])
        second_oracle.step(gradient[17:])
    assert relative(flatten(params), torch.cat([first_oracle.theta, second_oracle.theta])) < 1e-9


@pytest.mark.parametrize("params_type", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window_type", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [4, 64])
def test_rounded_windows_step_along_what_they_hold(params_type, window_type, window):
    start, *gradients = draws(8, DIM, params_type)
    given = {"lr": 0.05, "momentum": 0.0, "window": window, "damping": 1e-2}
    params, oracle = parameters(start), oracles.MFAC(start, **given)
    optimizer = MFAC(params, window_dtype=window_type, **given)
    for gradient in gradients:
        put(params, gradient)
        optimizer.step()
        oracle.step(gradient.to(window_type))
    assert relative(flatten(params), oracle.theta) < (0.02 if params_type == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("block_size", [None, 1, 3, 5, 64])
@pytest.mark.parametrize("window", [1, 2, 6])
def test_window_is_its_dense_definition_while_it_fills_and_after(block_size, window):
    gradients = draws(2 * window + 3, 8)
    estimate = GradientWindow(8, window, 0.05, block_size=block_size)
    for i, gradient in enumerate(gradients):
        estimate.update(gradient)
        dense = oracles.window_fisher(gradients[: i + 1], window, 0.05, block_size)
        matrix = estimate.matrix()
        torch.testing.assert_close(matrix.to_dense(), dense)
        torch.testing.assert_close(matrix.inverse_diagonal(), torch.linalg.inv(dense).diagonal())
        solution = estimate.tiles.unpad(estimate.solve_newest())
        torch.testing.assert_close(solution, torch.linalg.solve(dense, gradient))
        assert estimate.filled == min(i + 1, window)


def test_first_step_by_hand():
    """One gradient g: F⁻¹ g = g / (λ + |g|²), here (3, 4) / 26."""
    w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = MFAC([w], lr=26.0, damping=1.0, window=4)
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([-2.0, -3.0], dtype=torch.float64))


def test_a_filling_window_is_not_diluted():
    """The same gradient n times has the same mean of squares as once: every direction is the first one."""
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for block_size in (None, 1):
        estimate = GradientWindow(2, 5, 1.0, block_size=block_size)
        estimate.update(gradient)
        first = estimate.solve_newest()
        for _ in range(12):
            estimate.update(gradient)
            torch.testing.assert_close(estimate.solve_newest(), first)


def test_directions_descend_and_are_bounded():
    """0 < gᵀF⁻¹g ≤ n: the newest gradient is part of F, whatever its size."""
    for scale in (1e-3, 1.0, 1e6):
        estimate = GradientWindow(30, 5, 1e-4)
        for gradient in draws(12, 30):
            estimate.update(gradient * scale)
            height = float(gradient @ estimate.solve_newest()) * scale
            assert 0 < height <= estimate.filled * (1 + 1e-9)


@pytest.mark.parametrize("window", [8, 64])
def test_push_through_keeps_its_digits_where_the_naive_form_has_none(window):
    """λ = 1e-5 and |g|² ≈ 2000 in float32, the paper's regime."""
    dim, damping = 2000, 1e-5
    gradients = draws(window + 5, dim, torch.float32)
    estimate = GradientWindow(dim, window, damping)
    for gradient in gradients:
        estimate.update(gradient)
    kept = torch.stack(gradients[-window:])
    newest, rows = gradients[-1].double(), kept.double()
    weights = torch.linalg.solve(window * damping * torch.eye(window) + rows @ rows.T, torch.eye(window).double()[-1])
    expected = window * rows.T @ weights
    # The oracle against itself: F times the solution is the gradient.
    assert relative(damping * expected + rows.T @ (rows @ expected) / window, newest) < 1e-10
    assert relative(estimate.tiles.unpad(estimate.solve_newest()), expected) < 1e-4
    small = window * damping * torch.eye(window) + kept @ kept.T
    naive = (gradients[-1] - kept.T @ torch.linalg.solve(small, kept @ gradients[-1])) / damping
    assert relative(naive, expected) > 0.1


def test_newest_coefficients_solve_for_a_unit_vector():
    rows = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = rows @ rows.mT
    weights = newest_coefficients(gram, 2, 0.3)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[:, 2] = 4
    torch.testing.assert_close((gram @ weights.unsqueeze(-1)).squeeze(-1) + 4 * 0.3 * weights, expected)


def test_rows_that_repeat_and_vanish():
    """A singular Gram matrix at a damping far below its rounding."""
    for block_size in (None, 2):
        estimate = GradientWindow(6, 4, 1e-12, block_size=block_size)
        for gradient in [torch.ones(6) * 1e3] * 3 + [torch.zeros(6)] * 2 + [torch.ones(6)] * 6:
            estimate.update(gradient)
            assert bool(torch.isfinite(estimate.solve_newest()).all())


@pytest.mark.parametrize("window", [3, 64])
def test_half_precision_windows_saturate(window):
    estimate = GradientWindow(4, window, 0.1, dtype=torch.float16)
    for size in (1.0, 1e6, -1e30, 1.0):
        estimate.update(torch.full((4,), size))
        assert bool(torch.isfinite(estimate.solve_newest()).all())
        assert bool(torch.isfinite(estimate.matrix().diagonal(-1)).all())
    with pytest.raises(ValueError, match=r"got torch\.int32: .+"):
        MFAC([nn.Parameter(torch.ones(2))], window_dtype=torch.int32)


def test_momentum_of_a_parameter_without_gradient_waits():
    start, *gradients = draws(6, DIM)
    params = parameters(start)
    optimizer = MFAC(params, lr=0.1, window=3, damping=0.1)
    for gradient in gradients[:4]:
        put(params, gradient)
        optimizer.step()
    before = {i: state["momentum_buffer"] for i, state in optimizer.state_dict()["state"].items()}
    put(params, gradients[4])
    params[1].grad = None
    optimizer.step()
    after = {i: state["momentum_buffer"] for i, state in optimizer.state_dict()["state"].items()}
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_schedules_of_the_damping():
    gradients = draws(5, DIM)
    estimate = GradientWindow(DIM, 3, lambda updates: 1.0 / (1 + updates))
    for i, gradient in enumerate(gradients):
        estimate.update(gradient)
        dense = oracles.window_fisher(gradients[: i + 1], 3, 1.0 / (2 + i))
        torch.testing.assert_close(estimate.tiles.unpad(estimate.solve_newest()), torch.linalg.solve(dense, gradient))
        torch.testing.assert_close(estimate.matrix().to_dense(), dense)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"window": 0}, "0"),
        ({"window": -4}, "-4"),
        ({"window": 2.5}, r"2\.5"),
        ({"block_size": 2.5}, r"2\.5"),
        ({"momentum": 1.0}, r"1\.0"),
        ({"momentum": -0.1}, r"-0\.1"),
        ({"momentum": math.nan}, "nan"),
        ({"block_size": 0}, "0"),
    ],
)
def test_bad_hyper_parameters(given, shown):
    with pytest.raises(ValueError, match=rf"{next(iter(given))}.*got {shown}: .+"):
        MFAC([nn.Parameter(torch.ones(2))], **given)


@pytest.mark.parametrize("window_type", [torch.float32, torch.bfloat16])
def test_two_passes_over_the_window_a_step(window_type):
    dim, window = 40_000, 8
    w = nn.Parameter(torch.zeros(dim))
    optimizer = MFAC([w], window=window, window_dtype=window_type)
    w.grad = torch.ones(dim)
    for _ in range(window + 1):
        optimizer.step()
    counted = count(optimizer.step, large=window * dim)
    products = [name for name in counted.passes if "bmm" in name]
    others = [name for name in counted.passes if name not in products]
    if window_type == torch.float32:
        assert len(products) == 2
        assert len(others) <= 1  # the new row, written through a view
    else:  # each pass converts a slab of rows and multiplies it
        assert len(counted.passes) <= 5, counted.passes


def test_launches_do_not_grow_with_the_number_of_tensors():
    launches = []
    for tensors in (1, 200):
        params = [nn.Parameter(torch.ones(4, 3)) for _ in range(tensors)]
        optimizer = MFAC(params, window=4)
        for p in params:
            p.grad = torch.ones(4, 3)
        for _ in range(6):
            optimizer.step()
        launches.append(len(count(optimizer.step).launches))
    assert launches[1] <= launches[0] + 2
    assert launches[1] <= 45, launches


@pytest.mark.parametrize("window_type", [None, torch.bfloat16])
def test_memory_is_what_the_docstring_says(window_type):
    dim, window = 50_000, 16
    w = nn.Parameter(torch.zeros(dim))
    optimizer = MFAC([w], window=window, window_dtype=window_type)
    w.grad = torch.ones(dim)
    for _ in range(3):
        optimizer.step()
    formula = window * dim * (2 if window_type else 4) + 2 * dim * 4 + 8 * window**2
    assert bytes_kept(optimizer) == pytest.approx(formula, rel=0.1)
