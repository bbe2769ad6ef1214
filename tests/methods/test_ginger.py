import math

import pytest
import torch
from torch import nn

import oracles
from counting import bytes_kept, count
from quadric import Ginger, HeaviestDirections, sampled_loss
from quadric.methods.ginger import decay_and_truncate, split

SHAPES = [(3, 4), (5,), (), (1, 2), (7, 3)]
SIZES = [12, 5, 1, 2, 21]


def draws(n, dim, dtype=torch.float64, seed=0):
    """Gradients with a few directions that matter, as in training."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -2, dim, dtype=torch.float64)
    return list((torch.randn(n, dim, dtype=torch.float64, generator=generator) * scales).to(dtype))


def parameters(flat):
    return [nn.Parameter(piece.clone().reshape(s)) for piece, s in zip(flat.split(SIZES), SHAPES, strict=True)]


def put(params, flat):
    for p, piece in zip(params, flat.split(SIZES), strict=True):
        p.grad = piece.clone().reshape(p.shape)


def inner(params, flat):
    return sum((p.flatten() * d).sum() for p, d in zip(params, flat.split(SIZES), strict=True))


def relative(a, b):
    return float((a.detach().double().flatten() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("rank", [1, 2, 4, 9, 30])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_optimizer_is_its_dense_definition(rank, clip, dtype, tolerance):
    start, *gradients = draws(26, sum(SIZES), dtype)
    given = {"lr": 0.1, "betas": (0.8, 0.7), "rank": rank, "damping": 1e-1, "clip": clip, "weight_decay": 0.1}
    params = parameters(start)
    expected = [oracles.Ginger(piece, **given) for piece in start.split(SIZES)]
    optimizer = Ginger(params, **given)
    for gradient in gradients:
        put(params, gradient)
        optimizer.step()
        for p, oracle, piece in zip(params, expected, gradient.split(SIZES), strict=True):
            oracle.step(piece)
            assert relative(p, oracle.theta) < tolerance


@pytest.mark.parametrize("rank", [2, 5])
def test_observed_losses_feed_the_curvature_and_gradients_the_average(rank):
    start, *vectors = draws(41, sum(SIZES))
    given = {"lr": 0.1, "betas": (0.8, 0.7), "rank": rank, "damping": 1e-1}
    params, oracle = parameters(start), [oracles.Ginger(piece, **given) for piece in start.split(SIZES)]
    optimizer = Ginger(params, **given)
    for step, (gradient, observed) in enumerate(zip(vectors[::2], vectors[1::2], strict=True)):
        put(params, gradient)
        if step % 3 == 1:  # two micro-batches count as one of twice the size
            halves = observed * 2**0.5 / 2
            for _ in range(2):
                optimizer.observe(
                    sum((p.flatten() * d).sum() for p, d in zip(params, halves.split(SIZES), strict=True))
                )
        elif step % 3 == 2:
            optimizer.observe(inner(params, observed))
        else:
            observed = None
        optimizer.step()
        pieces = [None] * len(SIZES) if observed is None else observed.split(SIZES)
        for p, dense, g, d in zip(params, oracle, gradient.split(SIZES), pieces, strict=True):
            dense.step(g, d)
            assert relative(p, dense.theta) < 1e-8


def test_observe_leaves_grad_and_graph_alone():
    model = nn.Linear(3, 2)
    optimizer = Ginger(model.parameters())
    outputs = model(torch.randn(5, 3))
    optimizer.observe(sampled_loss(outputs))
    assert model.weight.grad is None
    outputs.sum().backward()  # the graph is still there
    before = model.weight.grad.clone()
    optimizer.observe(sampled_loss(model(torch.randn(5, 3))))
    assert torch.equal(model.weight.grad, before)
    model.bias.requires_grad_(False)
    optimizer.observe(sampled_loss(model(torch.randn(5, 3))))


def test_an_observation_that_is_not_finite_is_dropped():
    w = nn.Parameter(torch.ones(3))
    other = nn.Parameter(torch.ones(3))
    optimizer, undisturbed = Ginger([w], damping=0.1), Ginger([other], damping=0.1)
    for step in range(3):
        with pytest.raises(RuntimeError, match=r"(inf|nan).*: skip this batch"):
            optimizer.observe((w * math.inf).sum())
        w.grad = other.grad = torch.arange(3.0) + step
        optimizer.step()
        undisturbed.step()
    assert torch.equal(w, other)


def test_an_observation_serves_one_step():
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer, undisturbed = Ginger([w], damping=0.1), Ginger([other], damping=0.1)
    optimizer.observe((w * 5).sum())
    w.grad = torch.full((3,), math.nan)
    with pytest.raises(RuntimeError):
        optimizer.step()
    for _ in range(2):
        w.grad = other.grad = torch.arange(3.0)
        optimizer.step()
        undisturbed.step()
    assert torch.equal(w, other)


def test_a_loss_that_reaches_no_parameter_is_refused():
    w = nn.Parameter(torch.ones(3))
    optimizer = Ginger([w])
    with pytest.raises(RuntimeError, match=r"no parameter: pass sampled_loss"):
        optimizer.observe(torch.ones(2, requires_grad=True).sum())


def test_sparse_observations_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(RuntimeError, match=r"sparse.*: make the layer with sparse=False"):
        Ginger(embedding.parameters()).observe(embedding(torch.tensor([1])).sum())


def test_a_skipped_tensor_goes_on_as_if_the_step_had_not_been():
    start, *gradients = draws(20, sum(SIZES))
    params, alone = parameters(start), parameters(start)
    given = {"lr": 0.1, "rank": 3, "damping": 1e-2}
    optimizer, single = Ginger(params, **given), Ginger(alone[1:2], **given)
    for step, gradient in enumerate(gradients):
        put(params, gradient)
        put(alone, gradient)
        if step % 3 == 1:
            params[1].grad = None
        else:
            single.step()
        optimizer.step()
    torch.testing.assert_close(params[1], alone[1])


@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_the_matrix_is_its_dense_definition(rank):
    dim, sizes = 20, [9, 1, 10]
    estimate = HeaviestDirections(dim, rank, 0.9, 0.05, sizes=sizes)
    dense = [torch.zeros(s, s, dtype=torch.float64) for s in sizes]
    for observation in draws(40, dim):
        estimate.update(observation)
        pieces = observation.split(sizes)
        dense = [oracles.decay_and_truncate(g, d, 0.9, rank) for g, d in zip(dense, pieces, strict=True)]
        expected = torch.block_diag(*dense) + 0.05 * torch.eye(dim, dtype=torch.float64)
        matrix = estimate.matrix()
        torch.testing.assert_close(matrix.to_dense(), expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(matrix.inverse_diagonal(), torch.linalg.inv(expected).diagonal(), rtol=1e-7, atol=0)


def test_nothing_is_lost_while_the_rank_suffices():
    """The decayed sum itself, until more directions have been seen than are kept; below it ever after."""
    estimate, total = HeaviestDirections(12, 5, 0.9, 1e-3), torch.zeros(12, 12, dtype=torch.float64)
    for step, observation in enumerate(draws(30, 12)):
        estimate.update(observation)
        total = 0.9 * total + 0.1 * torch.outer(observation, observation)
        lost = total - (estimate.matrix().to_dense() - 1e-3 * torch.eye(12))
        if step < 5:
            torch.testing.assert_close(lost, torch.zeros_like(lost), rtol=0, atol=1e-10)
        assert float(torch.linalg.eigvalsh(lost)[0]) > -1e-9 * float(total.trace())
    assert float(lost.trace()) > 1e-3


def test_truncation_drops_the_lightest_direction_only():
    generator = torch.Generator().manual_seed(0)
    slots = torch.randn(2, 6, 9, dtype=torch.float64, generator=generator)
    mixing = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    rows, gram = mixing @ slots, slots @ slots.mT
    new = decay_and_truncate(mixing, gram, 4, torch.full((2, 1, 1), 0.7, dtype=torch.float64)) @ slots
    for block in range(2):
        mixed = 0.7 * rows[block].T @ rows[block] + 0.3 * torch.outer(slots[block, 4], slots[block, 4])
        values, vectors = torch.linalg.eigh(mixed)
        expected = vectors[:, -3:] @ torch.diag(values[-3:]) @ vectors[:, -3:].T
        torch.testing.assert_close(new[block].T @ new[block], expected)


def test_split_is_orthogonal():
    slots = torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixing = torch.zeros(1, 2, 5, dtype=torch.float64)
    basis = torch.linalg.qr(slots[0, :2].T).Q.T
    mixing[0, :, :2] = torch.linalg.lstsq(slots[0, :2].T, basis.T).solution.T * torch.tensor([[2.0], [0.5]])
    vector = torch.randn(1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    along, rest, weights = split(vector, mixing, slots @ slots.mT)
    rows = (mixing @ slots)[0]
    torch.testing.assert_close(weights.flatten(), rows.square().sum(1))
    torch.testing.assert_close((along @ mixing + rest) @ slots, vector @ slots)
    torch.testing.assert_close((rest @ slots)[0] @ rows.T, torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_first_two_steps_by_hand():
    """α = ½, β = 0: after 2 and 4, G is ½·4 = 2, then ½·2 + ½·16 = 9; with γ = 1 the steps are 2/3 and 4/10."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Ginger([w], lr=1.0, betas=(0.0, 0.5), rank=1, damping=1.0)
    positions = []
    for gradient in (2.0, 4.0):
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        positions.append(w.item())
    assert positions == pytest.approx([-2 / 3, -2 / 3 - 0.4], rel=1e-12)


@pytest.mark.parametrize("damping", [1e-8, 1e-5])
@pytest.mark.parametrize(
    ("dim", "rank", "span"), [(400, 4, 200), (50, 16, 40), (3, 4, 3), (1, 4, 1), (400, 4, 3), (50, 16, 3)]
)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_float32_holds_at_tiny_damping(damping, dim, rank, span, beta):
    """The published inverse-space form has no digit left at γ = 1e-8. Also for gradients inside a few directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(span, dim, generator=generator) * 5 / span**0.5
    w, given = nn.Parameter(torch.zeros(dim)), {"lr": 1.0, "betas": (beta, 0.9), "rank": rank, "damping": damping}
    optimizer, oracle = Ginger([w], **given), oracles.Ginger(torch.zeros(dim), **given)
    for step in range(30):
        w.data.zero_()
        oracle.theta.zero_()
        w.grad = torch.randn(span, generator=generator) @ basis
        optimizer.step()
        oracle.step(w.grad)
        error = float((w.detach().double() - oracle.theta).norm())
        # The basis is kept in float32: what its rounding moves out of the span is, rightly, divided by γ.
        rounding = 0.0 if span > rank or dim <= rank else 5e-7 * float(w.grad.norm()) / damping
        # Blocks of no more coordinates than rank are spanned, with nothing left over, once so many have been seen.
        assert step < dim <= rank or error <= (1e-2 if dim <= rank else 1e-3) * float(oracle.theta.norm()) + rounding


def test_states_across_a_compression_are_the_same_matrix():
    estimate = HeaviestDirections(30, 3, 0.95, 1e-3)
    vectors = draws(60, 30)
    for vector in vectors:
        estimate.absorb(estimate.tiles.pad(vector))
        estimate.track(None, 0.9)
        before = estimate.matrix().to_dense(), estimate.solve_average()
        if estimate.filled == estimate.capacity:
            estimate._compress()
            assert estimate.filled == 4
            torch.testing.assert_close(estimate.matrix().to_dense(), before[0])
            torch.testing.assert_close(estimate.solve_average(), before[1])


# Labels sampled from the model.


def exact_fisher(outputs_of, flat, kind):
    """``1/N Σ Jᵀ H J`` over labels, with H the second derivative of the loss in the outputs."""
    jacobian = torch.autograd.functional.jacobian(outputs_of, flat)
    outputs = outputs_of(flat)
    if kind == "categorical":
        jacobian, outputs = jacobian.reshape(-1, outputs.shape[-1], len(flat)), outputs.reshape(-1, outputs.shape[-1])
        p = outputs.softmax(-1)
        hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        return torch.einsum("nci,ncd,ndj->ij", jacobian, hessian, jacobian) / len(outputs)
    jacobian, outputs = jacobian.reshape(-1, len(flat)), outputs.flatten()
    hessian = outputs.sigmoid() * (1 - outputs.sigmoid()) if kind == "bernoulli" else torch.ones_like(outputs)
    return jacobian.T @ (hessian.unsqueeze(1) * jacobian) / len(outputs)


@pytest.mark.parametrize("kind", ["categorical", "bernoulli", "gaussian"])
def test_gradients_of_sampled_losses_average_to_the_fisher_matrix(kind):
    generator, n = torch.Generator().manual_seed(0), 4000
    inputs = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)  # two sequences of three tokens
    flat = torch.randn(6, dtype=torch.float64, generator=generator)
    outputs_of = lambda theta: inputs @ theta.view(2, 3)  # noqa: E731
    exact = exact_fisher(outputs_of, flat, kind)
    theta = flat.clone().requires_grad_()
    outputs = outputs_of(theta)
    total = torch.zeros(6, 6, dtype=torch.float64)
    squares, mean = torch.zeros_like(total), torch.zeros(6, dtype=torch.float64)
    for _ in range(n):
        (d,) = torch.autograd.grad(sampled_loss(outputs, kind, generator=generator), theta, retain_graph=True)
        product = torch.outer(d, d)
        total, squares, mean = total + product, squares + product**2, mean + d
    average = total / n
    error = ((squares / n - average**2) / n).sqrt()  # the standard error of each entry
    assert float(((average - exact).abs() / error).max()) < 5
    assert float((average - exact).norm() / exact.norm()) < 0.1
    assert float((mean / n).abs().max()) < 5 * float((exact.diagonal().max() / n).sqrt())


def test_sampled_losses_of_half_precision_and_one_generator():
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for kind in ("categorical", "bernoulli", "gaussian"):
        first, second = (sampled_loss(outputs, kind, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, second)
        loss = sampled_loss(outputs.bfloat16().requires_grad_(), kind)
        assert loss.dtype == torch.float32
        loss.backward()


@pytest.mark.parametrize(
    ("outputs", "kind", "shown"),
    [
        (torch.ones(2, 2), "poisson", "'poisson'"),
        (torch.tensor([[1.0, math.nan]]), "categorical", "nan"),
        (torch.tensor([[1.0, -math.inf]]), "bernoulli", "-inf"),
        (torch.ones(0, 3), "categorical", r"\(0, 3\)"),
        (torch.tensor(1.0), "categorical", r"\(\)"),
    ],
)
def test_sampled_loss_refuses(outputs, kind, shown):
    with pytest.raises(ValueError, match=rf"{shown}.*[:,] .+"):
        sampled_loss(outputs, kind)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"rank": 0}, "0"),
        ({"rank": 2.5}, r"2\.5"),
        ({"betas": (0.9,)}, r"\(0\.9,\)"),
        ({"betas": 0.9}, r"0\.9"),
        ({"betas": (1.0, 0.9)}, r"1\.0"),
        ({"betas": (0.9, 1.0)}, r"1\.0"),
        ({"betas": (-0.1, 0.9)}, r"-0\.1"),
        ({"clip": 0.0}, r"0\.0"),
        ({"clip": -1.0}, r"-1\.0"),
        ({"clip": math.nan}, "nan"),
    ],
)
def test_bad_hyper_parameters(given, shown):
    with pytest.raises(ValueError, match=rf"got {shown}: .+"):
        Ginger([nn.Parameter(torch.ones(2))], **given)


# Counts.


def test_two_passes_over_the_slots_a_step():
    dim = 40_000
    w = nn.Parameter(torch.zeros(dim))
    optimizer = Ginger([w], rank=8)
    w.grad = torch.ones(dim)
    passes = []
    for _ in range(40):
        estimate = optimizer._blocks[0][0].curvature if optimizer._blocks[0] else None
        filled = estimate.filled if estimate else 0
        counted = count(optimizer.step, large=3 * dim)  # more than the gradient, the direction and the parameter
        if filled > 3:
            passes.append(len(counted.passes))
    assert sorted(passes)[len(passes) // 2] == 2
    assert max(passes) <= 4  # one in four or more steps makes room: a read and a write


def test_launches_do_not_grow_with_the_number_of_tensors():
    launches = []
    for tensors in (1, 200):
        params = [nn.Parameter(torch.ones(4, 1 + k % 3)) for k in range(tensors)]
        optimizer = Ginger(params)
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(12):
            optimizer.step()
        launches.append(max(len(count(optimizer.step).launches) for _ in range(6)))
    assert launches[1] <= launches[0] + 5
    assert launches[1] <= 100, launches


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_memory_is_what_the_docstring_says(rank):
    dim = 50_000
    w = nn.Parameter(torch.zeros(dim))
    optimizer = Ginger([w], rank=rank)
    w.grad = torch.ones(dim)
    for _ in range(3):
        optimizer.step()
    assert bytes_kept(optimizer) == pytest.approx(4 * dim * (rank + 2 + max(4, rank // 2)), rel=0.1)
