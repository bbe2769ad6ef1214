import math

import pytest
import torch
from torch import nn

import oracles
from counting import bytes_kept, count
from quadric import BlockMeanAdaGrad, BlockMeanSum
from quadric.matrix import Groups
from quadric.methods.block_mean import InverseRoot, row_groups

SHAPES = [(3, 4), (5,), (), (2, 2, 2)]
SIZES = [12, 5, 1, 8]


def draws(n, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, dtype=torch.float64, generator=generator)  # coordinates that move together
    return list((shared + 0.5 * torch.randn(n, dim, dtype=torch.float64, generator=generator)).to(dtype))


def parameters(flat):
    return [nn.Parameter(piece.clone().reshape(s)) for piece, s in zip(flat.split(SIZES), SHAPES, strict=True)]


def put(params, flat):
    for p, piece in zip(params, flat.split(SIZES), strict=True):
        p.grad = piece.clone().reshape(p.shape)


def flatten(params):
    return torch.cat([p.detach().reshape(-1) for p in params]).double()


def labels_of(shapes, refresh_every):
    """The partition as labels of the flat parameters: each tensor's rows, joined where they are too many."""
    labels, start = [], 0
    for groups, size in row_groups([torch.Size(shape) for shape in shapes], refresh_every):
        labels.append(torch.arange(start, start + groups).repeat_interleave(size))
        start += groups
    return torch.cat(labels)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_optimizer_is_its_dense_definition(whiten, decay, dtype, tolerance):
    start, *gradients = draws(31, sum(SIZES), dtype)
    given = {"lr": 0.1, "decay": decay, "damping": 0.3, "whiten": whiten, "weight_decay": 0.1}
    labels = labels_of(SHAPES, 80)
    assert int(labels.max()) + 1 == 3 + 1 + 1 + 2  # few enough to be left alone
    params, oracle = parameters(start), oracles.BlockMeanAdaGrad(start, labels, **given)
    optimizer = BlockMeanAdaGrad(params, refresh_every=80, **given)  # remade at each of the first 80 steps
    for gradient in gradients:
        put(params, gradient)
        optimizer.step()
        oracle.step(gradient)
        assert float((flatten(params) - oracle.theta).norm() / oracle.theta.norm()) < tolerance


def test_between_two_refreshes_the_root_stays():
    start, *gradients = draws(13, sum(SIZES))
    params = parameters(start)
    optimizer = BlockMeanAdaGrad(params, refresh_every=4, whiten=False)
    roots = []
    for gradient in gradients:
        put(params, gradient)
        optimizer.step()
        roots.append(optimizer._blocks[0][0].curvature.across)
    changed = [i + 2 for i in range(11) if not torch.equal(roots[i], roots[i + 1])]
    assert changed == [2, 3, 4, 8, 12]


def test_first_step_by_hand():
    """g = (3, 4) in one group: C = (3+4)²/2, D = 25, so λ = ½ across and 24½ along (1, 1); δ = ½ makes 1 and 25."""
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = BlockMeanAdaGrad([w], lr=1.0, damping=0.5, whiten=False)
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(-w.detach(), torch.tensor([3.5 / 5 - 0.5, 3.5 / 5 + 0.5], dtype=torch.float64))


def test_rows_of_one_number_are_full_matrix_adagrad():
    w = nn.Parameter(torch.zeros(3, 1, dtype=torch.float64))
    optimizer = BlockMeanAdaGrad([w], lr=1.0, damping=0.1, whiten=False, refresh_every=50)
    total = 0.1 * torch.eye(3, dtype=torch.float64)
    for gradient in draws(8, 3):
        before, w.grad = w.detach().clone(), gradient.view(3, 1).clone()
        total += torch.outer(gradient, gradient)
        optimizer.step()
        torch.testing.assert_close((before - w.detach()).flatten(), oracles.dense_power(total, -0.5) @ gradient)


def test_whitened_and_uncorrelated_it_is_adagrad():
    """Orthogonal signs: the mean of w wᵀ is the identity, and the step AdaGrad's over √(1 + δ)."""
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    scales = torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)
    w = nn.Parameter(torch.zeros(4, 1, dtype=torch.float64))
    optimizer = BlockMeanAdaGrad([w], lr=1.0, damping=0.5, refresh_every=70)
    for step in range(8):
        before, gradient = w.detach().clone(), signs[step % 4] * scales
        w.grad = gradient.view(4, 1).clone()
        optimizer.step()
        if step % 4 == 3:  # as many of each sign
            adagrad = gradient / (scales**2 * (step + 1)).sqrt()
            torch.testing.assert_close((before - w.detach()).flatten(), adagrad / 1.5**0.5)


@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [1, 0, 1, 0], [0, 0, 1, 2], [2, 1, 1, 0]])
def test_the_sum_is_its_dense_definition(decay, labels):
    labels, dense = torch.tensor(labels), torch.zeros(4, 4, dtype=torch.float64)
    estimate = BlockMeanSum(labels, decay=decay, damping=0.2)
    torch.testing.assert_close(estimate.matrix().to_dense(), 0.2 * torch.eye(4))
    for step, gradient in enumerate(draws(7, 4)):
        estimate.update(gradient)
        product = torch.outer(gradient, gradient)
        dense = dense + product if decay is None else decay * dense + (1 - decay) * product
        mean = dense if decay is None else dense / (1 - decay ** (step + 1))
        expected = oracles.block_means(mean, labels) + 0.2 * torch.eye(4)
        torch.testing.assert_close(estimate.matrix().to_dense(), expected)
        assert float(torch.linalg.eigvalsh(expected)[0]) >= 0.2 - 1e-9
        torch.testing.assert_close(estimate.matrix().trace(), mean.trace() + 0.8)


def test_groups_are_few_and_whole():
    for shapes, refresh_every in [(SHAPES, 1), ([(1000, 7), (64,), (97, 3)], 20), ([(3, 5)], 10**9), ([()], 1)]:
        groups = row_groups([torch.Size(shape) for shape in shapes], refresh_every)
        dim = sum(math.prod(shape) for shape in shapes)
        for (count_of, size), shape in zip(groups, shapes, strict=True):
            assert count_of * size == math.prod(shape)
            assert size % (math.prod(shape) // (shape[0] if len(shape) > 1 else 1)) == 0  # rows stay whole
        assert sum(n for n, _ in groups) <= len(shapes) + (refresh_every * dim / 4) ** (1 / 3)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"decay": 1.0}, r"1\.0"),
        ({"decay": -0.5}, r"-0\.5"),
        ({"refresh_every": 0}, "0"),
        ({"refresh_every": 2.5}, r"2\.5"),
        ({"decay": math.nan}, "nan"),
    ],
)
def test_bad_hyper_parameters(given, shown):
    with pytest.raises(ValueError, match=rf"{next(iter(given))}.*got {shown}: .+"):
        BlockMeanAdaGrad([nn.Parameter(torch.ones(2))], **given)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_stale_root_makes_no_step_longer_than_the_root_of_now_could(decay):
    """C holds u uᵀ, so that ‖(C + δI)^-½ u‖² ≤ 1 (averages: the inverse of the newest weight), also for an unseen u."""
    estimate = InverseRoot(Groups(torch.arange(4)), decay, damping=1e-12)
    for step, observation in enumerate(3 * torch.eye(4, dtype=torch.float64)):
        estimate.absorb(observation)
        estimate.refresh(every=2)  # the root of step 2 serves step 3, whose direction it has not seen
        scaled = estimate.scale_newest(observation, out=torch.empty_like(observation))
        weight = 1.0 if decay is None else (1 - decay ** (step + 1)) / (1 - decay)
        torch.testing.assert_close(scaled, observation / 3 * weight**0.5)


def test_plain_it_descends_with_its_defaults():
    curvature = torch.logspace(-2, 0, 30)
    w = nn.Parameter(torch.ones(30))
    optimizer = BlockMeanAdaGrad([w], whiten=False)
    losses = []
    for _ in range(200):
        loss = (curvature * w**2).sum() / 2
        losses.append(loss.item())
        w.grad = curvature * w.detach()
        optimizer.step()
    assert max(losses[1:]) < losses[0]
    assert losses[-1] < 0.9 * losses[0]


def test_a_loaded_estimate_keeps_its_type():
    labels = torch.tensor([0, 0, 1])
    one, other = BlockMeanSum(labels), BlockMeanSum(labels)
    one.update(torch.ones(3, dtype=torch.float64))
    other.load_state_dict(one.state_dict())
    assert other.matrix().dtype == torch.float64
    assert torch.equal(other.matrix().to_dense(), one.matrix().to_dense())


@pytest.mark.parametrize("whiten", [False, True])
def test_launches_do_not_grow_with_the_number_of_tensors(whiten):
    launches = []
    for tensors in (1, 200):
        params = [nn.Parameter(torch.ones(4, 3) if k % 2 else torch.ones(5)) for k in range(tensors)]
        optimizer = BlockMeanAdaGrad(params, whiten=whiten)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(25):
            optimizer.step()
        launches.append([len(count(optimizer.step).launches) for _ in range(20)])
    assert max(launches[1]) <= max(launches[0]) + 15
    assert max(launches[1]) <= 100
    assert sorted(launches[1])[10] <= 50


@pytest.mark.parametrize("whiten", [False, True])
def test_memory_is_what_the_docstring_says(whiten):
    w = nn.Parameter(torch.zeros(100, 500))
    optimizer = BlockMeanAdaGrad([w], whiten=whiten)
    for _ in range(3):
        w.grad = torch.randn(100, 500)
        optimizer.step()
    groups = optimizer._blocks[0][0].curvature.groups.count
    formula = 4 * 50_000 * (3 if whiten else 2) + 8 * 2 * groups**2
    assert bytes_kept(optimizer) == pytest.approx(formula, rel=0.1)
