"""What every estimate keeps: a newcomer is one line of ``ESTIMATES``."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from quadric import (
    BlockMeanSum,
    Curvature,
    GradientWindow,
    HeaviestDirections,
    HessianDiagonal,
    InputMoment,
    PSDMatrix,
    relative,
)
from quadric.curvature import damping_at

DIM = 10
LABELS = torch.arange(5).repeat_interleave(2)
ESTIMATES = {
    "window": lambda damping=0.1: GradientWindow(DIM, 3, damping),
    "window-blocks": lambda damping=0.1: GradientWindow(DIM, 5, damping, block_size=4),
    "window-bfloat16": lambda damping=0.1: GradientWindow(DIM, 3, damping, dtype=torch.bfloat16),
    "heaviest": lambda damping=0.1: HeaviestDirections(DIM, 2, 0.9, damping),
    "heaviest-blocks": lambda damping=0.1: HeaviestDirections(DIM, 2, 0.9, damping, sizes=[7, 1, 2]),
    "block-means": lambda damping=0.1: BlockMeanSum(LABELS, damping=damping),
    "block-means-decayed": lambda damping=0.1: BlockMeanSum(LABELS, decay=0.9, damping=damping),
    "hessian-diagonal": lambda damping=0.1: HessianDiagonal(DIM, 0.9, damping),
    "input-moment": lambda damping=0.1: InputMoment(DIM, damping),
    "input-moment-decayed": lambda damping=0.1: InputMoment(DIM, damping, decay=0.9),
    "input-moment-groups": lambda damping=0.1: InputMoment(DIM // 2, damping, decay=0.5, groups=2),
}


@pytest.fixture(params=ESTIMATES)
def make(request):
    return ESTIMATES[request.param]


def observations(n, seed=0):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def updated(estimate, n=8):
    for observation in observations(n):
        estimate.update(observation)
    return estimate


def test_what_it_is(make):
    estimate = updated(make())
    matrix = estimate.matrix()
    assert isinstance(estimate, Curvature)
    assert isinstance(estimate, nn.Module)
    assert isinstance(matrix, PSDMatrix)
    assert (matrix.dim, matrix.dtype, matrix.device.type) == (DIM, torch.float32, "cpu")
    assert not list(estimate.parameters())
    assert estimate.updates == 8


def test_before_the_first_observation_it_is_the_damping(make):
    torch.testing.assert_close(make(0.3).matrix().to_dense(), 0.3 * torch.eye(DIM))


def test_eigenvalues_are_never_below_the_damping(make):
    estimate = make(0.3)
    for observation in observations(8):
        estimate.update(observation)
        assert float(torch.linalg.eigvalsh(estimate.matrix().to_dense())[0]) >= 0.3 - 1e-4


def test_using_the_matrix_changes_nothing(make):
    used, left = make(), make()
    for observation in observations(8):
        matrix = used.matrix()
        before = matrix.to_dense()
        matrix.solve(observation)
        matrix.diagonal(-1)
        matrix.sample(2)
        assert torch.equal(matrix.to_dense(), before)
        used.update(observation)
        left.update(observation)
    assert torch.equal(used.matrix().to_dense(), left.matrix().to_dense())


def test_observations_are_copied_and_may_require_gradients(make):
    one, other = make(), make()
    for observation in observations(5):
        given = observation.clone().requires_grad_()
        one.update(given)
        given.data.zero_()
        other.update(observation)
    assert torch.equal(one.matrix().to_dense(), other.matrix().to_dense())
    assert not one.matrix().to_dense().requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_observations_of_other_types(make, dtype):
    estimate, reference = make(), make()
    for observation in observations(6):
        estimate.update(observation.to(dtype))
        reference.update(observation)
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    dense = reference.matrix().to_dense()
    assert float((estimate.matrix().to_dense() - dense).norm() / dense.norm()) < tolerance
    for observation in observations(3, seed=1):  # and of another type than the first
        estimate.update(observation)


@pytest.mark.parametrize(
    ("observation", "shown"),
    [
        (torch.ones(DIM + 1), r"\(11,\)"),
        (torch.ones(1, 1, DIM), r"\(1, 1, 10\)"),
        (torch.tensor(1.0), r"\(\)"),
        (torch.full((DIM,), math.nan), "nan"),
        (torch.full((DIM,), -math.inf), "-inf"),
        (torch.ones(DIM, dtype=torch.long), "int64"),
        (torch.ones(DIM, dtype=torch.complex64), "complex64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [0, 5])
def test_odd_observations_are_refused_and_nothing_changes(make, observation, shown, before):
    estimate = updated(make(), before)
    dense = estimate.matrix().to_dense()
    with pytest.raises(ValueError, match=rf"{shown}.*: .+"):
        estimate.update(observation)
    assert estimate.updates == before
    assert torch.equal(estimate.matrix().to_dense(), dense)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_bad_dampings_are_refused(make, damping):
    with pytest.raises(ValueError, match=rf"damping.*got {damping}: .+"):
        make(damping)
    with pytest.raises(ValueError, match=rf"damping.*got {damping}: .+"):
        make(lambda updates: damping)


def test_schedules_are_followed(make):
    estimate = make(lambda updates: 0.5**updates)
    plain = make(1.0)
    for updates, observation in enumerate(observations(4)):
        torch.testing.assert_close(
            estimate.matrix().diagonal(), plain.matrix().diagonal() - 1 + 0.5**updates, rtol=1e-4, atol=1e-5
        )
        estimate.update(observation)
        plain.update(observation)
    assert damping_at(lambda updates: updates + 1.0, 3) == 4.0
    assert damping_at(2, 3) == 2.0


@pytest.mark.parametrize("before", [0, 2, 8])
def test_copies_and_files_go_on_bitwise(make, before):
    estimate = updated(make(), before)
    copies = [copy.deepcopy(estimate)]
    file = io.BytesIO()
    torch.save(estimate.state_dict(), file)
    file.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copies.append(loaded)
    reloaded = updated(make(), 3)  # over a state of its own
    reloaded.load_state_dict(estimate.state_dict())
    copies.append(reloaded)
    held = estimate.matrix().to_dense()
    for other in copies:
        assert torch.equal(other.matrix().to_dense(), held)
    for observation in observations(7, seed=1):
        for other in copies:
            other.update(observation)
    assert torch.equal(estimate.matrix().to_dense(), held)  # nothing is shared
    for observation in observations(7, seed=1):
        estimate.update(observation)
    for other in copies:
        assert torch.equal(other.matrix().to_dense(), estimate.matrix().to_dense())


def test_moves_with_the_module_that_holds_it(make):
    holder = nn.Sequential(updated(make()))
    holder.to("meta")
    assert all(buffer.device.type == "meta" for buffer in holder.buffers())


@pytest.mark.parametrize(
    "build",
    [
        lambda d: GradientWindow(d, 3, 0.1),
        lambda d: HeaviestDirections(d, 2, 0.9, 0.1),
        lambda d: HessianDiagonal(d),
        lambda d: InputMoment(d),
        lambda d: InputMoment(3, groups=d),
    ],
)
def test_no_coordinates(build):
    with pytest.raises(ValueError, match=r"dim must be at least 1, got 0: .+"):
        build(0)


@pytest.mark.parametrize(
    ("build", "shown"),
    [
        (lambda: GradientWindow(3, 0, 0.1), "window.*got 0"),
        (lambda: GradientWindow(3, 2, 0.1, block_size=0), "block_size.*got 0"),
        (lambda: HeaviestDirections(3, 0, 0.9, 0.1), "rank.*got 0"),
        (lambda: HeaviestDirections(3, 1, 1.0, 0.1), r"decay.*got 1\.0"),
        (lambda: HeaviestDirections(3, 1, 0.9, 0.1, sizes=[1, 1]), r"sizes.*got \[1, 1\]"),
        (lambda: BlockMeanSum(LABELS, decay=-0.1), r"decay.*got -0\.1"),
        (lambda: HessianDiagonal(3, decay=1.0), r"decay.*got 1\.0"),
        (lambda: InputMoment(3, decay=1.0), r"decay.*got 1\.0"),
        (lambda: InputMoment(3, decay=-0.1), r"decay.*got -0\.1"),
        (lambda: InputMoment(3).update(torch.ones(0, 3)), r"shape \(0, 3\).*3 columns"),
        (lambda: InputMoment(3, groups=2).update(torch.ones(4, 3)), r"shape \(4, 3\).*6 columns"),
        (lambda: relative(0.0), r"damping.*got 0\.0"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(build, shown):
    with pytest.raises(ValueError, match=rf"{shown}: .+"):
        build()


def test_rows_may_be_learnt_one_batch_at_a_time():
    """A vector is one row, and a batch of rows weighs as much as any other."""
    one, other = InputMoment(DIM, 0.1, decay=0.5), InputMoment(DIM, 0.1, decay=0.5)
    for observation in observations(4):
        one.update(observation)
        other.update(observation.expand(3, DIM))
    torch.testing.assert_close(one.matrix().to_dense(), other.matrix().to_dense())
