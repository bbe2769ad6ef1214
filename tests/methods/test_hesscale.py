import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import oracles
from counting import bytes_kept, count
from quadric import AdaHesScale, HessianDiagonal, UnsupportedOperation, hessian_diagonal
from quadric.methods import hesscale

SHAPES = [(3, 4), (5,), (), (1, 2), (7, 3)]
SIZES = [12, 5, 1, 2, 21]


def draws(n, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -2, dim, dtype=torch.float64)
    return list((torch.randn(n, dim, dtype=torch.float64, generator=generator) * scales).to(dtype))


def parameters(flat):
    return [nn.Parameter(piece.clone().reshape(s)) for piece, s in zip(flat.split(SIZES), SHAPES, strict=True)]


def made(params, gradient, diagonal):
    """A loss with this gradient and this Hessian, which is diagonal, wherever the parameters are."""
    sizes = [p.numel() for p in params]
    parts = zip(params, gradient.split(sizes), diagonal.split(sizes), strict=True)
    return sum(
        (p.flatten() * g).sum() + ((p - p.detach()).flatten() ** 2 * h).sum() / 2
        for p, g, h in parts
        if p.requires_grad
    )


def take(optimizer, params, gradient, diagonal):
    optimizer.zero_grad()
    optimizer.backward(made(params, gradient, diagonal))
    optimizer.step()


def relative(a, b):
    return float((a.detach().double().flatten() - b.double()).norm() / b.double().norm())


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3)).to(dtype)


def batch(seed=1, dtype=torch.float64):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model, seed=1, dtype=torch.float64):
    return F.cross_entropy(model(batch(seed, dtype)), torch.arange(8) % 3)


def values(params):
    return [p.detach().clone() for p in params]


def squares(optimizer):
    """The average of squares of each parameter."""
    state = optimizer.state_dict()["state"]
    return [state[i]["squares"] for i in sorted(state)]


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((values(params), optimizer.state_dict()["state"]))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.fixture
def looks(monkeypatch):
    """The losses that were looked at, one entry for each walk."""
    seen = []

    class Counted(hesscale.Walk):
        def __init__(self, loss, *args, **kwargs):
            seen.append(loss.item())
            super().__init__(loss, *args, **kwargs)

    monkeypatch.setattr(hesscale, "Walk", Counted)
    return seen


class Mystery(torch.autograd.Function):
    """sin x, without a rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0].cos() * g


# What a step is.


def test_first_two_steps_by_hand():
    """2w² at 1: gradient 4 over curvature 4 + 1. Then w² at 0.6: gradients 4, 1.2 and squares 16, 4, at weights 1:2."""
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = AdaHesScale([w], lr=0.5, betas=(0.5, 0.5), eps=1.0, clip=None)
    positions = []
    for curvature in (2, 1):
        optimizer.zero_grad()
        optimizer.backward(curvature * (w**2).sum())
        optimizer.step()
        positions.append(w.item())
    mean, root = (4 + 2 * 1.2) / 3, ((16 + 2 * 4) / 3) ** 0.5
    assert positions == pytest.approx([0.6, 0.6 - 0.5 * mean / (root + 1)], rel=1e-12)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"clip": 0.3},
        {"trust": 1e-3},
        {"clip": 0.5, "trust": 1e-2, "weight_decay": 0.1},
        {"maximize": True, "weight_decay": 0.1},
        {"betas": (0.0, 0.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_optimizer_is_its_dense_definition(given, dtype, tolerance):
    start, *vectors = draws(41, sum(SIZES), dtype)
    given = {"lr": 0.05, "betas": (0.8, 0.7), "eps": 1e-2, "clip": None} | given
    params, oracle = parameters(start), oracles.AdaHesScale(start, **given)
    optimizer = AdaHesScale(params, **given)
    for gradient, diagonal in zip(vectors[::2], vectors[1::2], strict=True):
        take(optimizer, params, gradient, diagonal)
        oracle.step(gradient, diagonal)
        assert relative(torch.cat([p.flatten() for p in params]), oracle.theta) < tolerance


def test_each_group_has_its_own_hyper_parameters():
    start, *vectors = draws(31, sum(SIZES))
    params, cut = parameters(start), SIZES[0] + SIZES[1]
    first = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "clip": 0.2, "trust": None, "weight_decay": 0.1}
    second = {"lr": 0.01, "betas": (0.9, 0.6), "eps": 1e-1, "clip": None, "trust": 1e-4, "weight_decay": 0.0}
    optimizer = AdaHesScale([{"params": params[:2], **first}, {"params": params[2:], **second}])
    expected = [oracles.AdaHesScale(start[:cut], **first), oracles.AdaHesScale(start[cut:], **second)]
    for gradient, diagonal in zip(vectors[::2], vectors[1::2], strict=True):
        take(optimizer, params, gradient, diagonal)
        expected[0].step(gradient[:cut], diagonal[:cut])
        expected[1].step(gradient[cut:], diagonal[cut:])
        theta = torch.cat([oracle.theta for oracle in expected])
        assert relative(torch.cat([p.flatten() for p in params]), theta) < 1e-12


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_one_step_solves_a_diagonal_quadratic(shapes, seed, scale):
    """And where the curvature is negative the step is the same away from the extremum."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]  # noqa: E731
    starts, ends, bends = draw(), draw(), draw()
    bends = [scale * (h + h.sign()) for h in bends]  # none of them small
    params = [nn.Parameter(p.clone()) for p in starts]
    optimizer = AdaHesScale(params, lr=1.0, betas=(0.0, 0.0), eps=1e-14, clip=None)
    optimizer.backward(sum((h * (p - q) ** 2).sum() / 2 for p, q, h in zip(params, ends, bends, strict=True)))
    optimizer.step()
    for p, start, end, bend in zip(params, starts, ends, bends, strict=True):
        torch.testing.assert_close(p.detach(), torch.where(bend > 0, end, 2 * start - end), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    trust=st.sampled_from([1e-8, 1e-4, 1.0, 1e4]),
    lr=st.sampled_from([1e-3, 1.0]),
    clip=st.sampled_from([None, 0.1, 1.0]),
)
def test_no_step_leaves_the_trust_region_and_steps_inside_are_left_alone(seed, trust, lr, clip):
    start, *vectors = draws(9, sum(SIZES), seed=seed)
    params, free = parameters(start), parameters(start)
    given = {"lr": lr, "betas": (0.7, 0.8), "eps": 1e-6, "clip": clip}
    optimizer, unbounded = AdaHesScale(params, trust=trust, **given), AdaHesScale(free, **given)
    for gradient, diagonal in zip(vectors[::2], vectors[1::2], strict=True):
        before = values(params)
        for p, q in zip(free, params, strict=True):
            p.data.copy_(q.data)
        take(optimizer, params, gradient, diagonal)
        take(unbounded, free, gradient, diagonal)
        moves = [p.detach() - b for p, b in zip(params, before, strict=True)]
        whole = [p.detach() - b for p, b in zip(free, before, strict=True)]
        roots = [s.sqrt() for s in squares(optimizer)]
        bent = sum(float((r * u**2).sum()) / 2 for r, u in zip(roots, moves, strict=True))
        unbent = sum(float((r * u**2).sum()) / 2 for r, u in zip(roots, whole, strict=True))
        assert bent == pytest.approx(min(trust, unbent), rel=1e-6, abs=1e-25)
        shrunk = min(1.0, (trust / unbent) ** 0.5)
        for u, w in zip(moves, whole, strict=True):
            torch.testing.assert_close(u, w * shrunk, rtol=1e-6, atol=1e-12)


def test_the_first_step_is_no_longer_than_the_clip():
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdaHesScale([w], lr=0.1, clip=0.5)
    take(optimizer, [w], torch.tensor([1.0, -1.0, 0.1], dtype=torch.float64), torch.tensor([0.0, 1e-9, -2.0]))
    torch.testing.assert_close(w.detach(), torch.tensor([-0.05, 0.05, -0.005], dtype=torch.float64))


# What is collected.


def test_h_is_that_of_hessian_diagonal():
    model = network()
    expected = hessian_diagonal(loss_of(model), model.parameters())
    optimizer = AdaHesScale(model.parameters())
    optimizer.backward(loss_of(model))
    optimizer.step()
    torch.testing.assert_close(squares(optimizer), [h**2 for h in expected], rtol=1e-12, atol=0)


def test_gauss_newton_and_dtype_belong_to_a_group():
    model = network()
    full = hessian_diagonal(loss_of(model), model.parameters())
    bent = hessian_diagonal(loss_of(model), model.parameters(), gauss_newton=True)
    params = list(model.parameters())
    optimizer = AdaHesScale(
        [
            {"params": params[:2], "gauss_newton": True},
            {"params": params[2:4], "dtype": torch.bfloat16},
            {"params": params[4:]},
        ]
    )
    optimizer.backward(loss_of(model))
    optimizer.step()
    found = squares(optimizer)
    torch.testing.assert_close(found[:2], [h**2 for h in bent[:2]], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[4:], [h**2 for h in full[4:]], rtol=1e-12, atol=0)
    assert all(relative(f.flatten(), (h**2).flatten()) < 0.1 for f, h in zip(found[2:4], full[2:4], strict=True))
    assert not torch.allclose(found[0], full[0] ** 2, rtol=0.1)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_add_up_to_the_batch(parts):
    one, other = network(), network()
    whole, split = AdaHesScale(one.parameters()), AdaHesScale(other.parameters())
    for step in range(3):
        whole.zero_grad()
        split.zero_grad()
        whole.backward(one(batch(step)).pow(2).sum() / 8)
        for piece in batch(step).chunk(parts):
            split.backward(other(piece).pow(2).sum() / 8)
        whole.step()
        split.step()
        torch.testing.assert_close(squares(whole), squares(split), rtol=1e-10, atol=1e-18)
        torch.testing.assert_close(values(one.parameters()), values(other.parameters()), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(factor=st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6))
def test_h_is_that_of_the_attached_loss_whatever_multiple_is_differentiated(factor):
    model = network()
    expected = hessian_diagonal(loss_of(model), model.parameters())
    optimizer = AdaHesScale(model.parameters())
    loss = loss_of(model)
    optimizer.attach(loss)
    (factor * loss).backward()
    optimizer.step()
    torch.testing.assert_close(squares(optimizer), [h**2 for h in expected], rtol=1e-10, atol=0)


def test_a_kept_graph_may_be_differentiated_again():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    loss = loss_of(model)
    optimizer.backward(loss, retain_graph=True)
    optimizer.backward(loss)
    other.backward(2 * loss_of(reference))
    optimizer.step()
    other.step()
    torch.testing.assert_close(squares(optimizer), squares(other), rtol=1e-12, atol=0)
    assert all(len(p.grad) for p in model.parameters())


def test_zero_grad_forgets():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    optimizer.backward(100 * loss_of(model, seed=7))
    optimizer.zero_grad()
    optimizer.backward(loss_of(model))
    other.backward(loss_of(reference))
    optimizer.step()
    other.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_zero_grad_leaves_an_attached_loss_that_waits_for_its_backward():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    loss = loss_of(model)
    optimizer.attach(loss)
    optimizer.zero_grad()
    loss.backward()
    other.backward(loss_of(reference))
    optimizer.step()
    other.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_a_loss_that_was_attached_and_never_differentiated_counts_for_nothing():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    optimizer.attach(loss_of(model, seed=5))
    optimizer.backward(loss_of(model))
    other.backward(loss_of(reference))
    optimizer.step()
    other.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_h_serves_one_step():
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHesScale([w], betas=(0.9, 0.5))
    for _ in range(2):
        take(optimizer, [w], torch.ones(2, dtype=torch.float64), torch.full((2,), 3.0))
    torch.testing.assert_close(squares(optimizer)[0], torch.full((2,), 9.0, dtype=torch.float64))
    optimizer.step()  # the same gradient, and no news of the curvature
    torch.testing.assert_close(squares(optimizer)[0], torch.full((2,), 9.0, dtype=torch.float64))


def test_a_linear_loss_has_no_curvature_and_steps_by_the_clip():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = AdaHesScale([w], lr=0.1)
    optimizer.backward((w * torch.tensor([3.0, -1e-3])).sum())
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([-0.1, 0.1], dtype=torch.float64))


# Several losses.


def test_two_losses_over_one_graph_are_refused_together_and_add_one_after_the_other():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    outputs = model(batch())
    one, two = outputs.pow(2).mean(), outputs.exp().mean()
    optimizer.attach(one)
    optimizer.attach(two)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"two attached losses .* differentiated together: attach their sum"):
        (one + two).backward(retain_graph=True)
    assert same(snapshot(optimizer), before)
    optimizer.zero_grad()
    assert not any(p.grad is not None for p in model.parameters())

    optimizer.attach(one)
    optimizer.attach(two)
    one.backward(retain_graph=True)
    two.backward()
    outputs = reference(batch())
    other.backward(outputs.pow(2).mean() + outputs.exp().mean())
    optimizer.step()
    other.step()
    torch.testing.assert_close(squares(optimizer), squares(other), rtol=1e-10, atol=0)
    torch.testing.assert_close(values(model.parameters()), values(reference.parameters()), rtol=1e-10, atol=0)


def test_losses_over_graphs_of_their_own_may_be_differentiated_together():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    one, two = loss_of(model), loss_of(model, seed=2)
    optimizer.attach(one)
    optimizer.attach(two)
    (one + 3 * two).backward()
    optimizer._collect()
    found = [optimizer._collected[0, i] for i in range(6)]
    other.backward(loss_of(reference))
    other.backward(loss_of(reference, seed=2))
    other._collect()
    torch.testing.assert_close(found, [other._collected[0, i] for i in range(6)], rtol=1e-12, atol=0)


def test_two_networks_that_play_against_each_other():
    torch.manual_seed(0)
    draw, judge = nn.Linear(2, 5).double(), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    artist, critic = AdaHesScale(draw.parameters()), AdaHesScale(judge.parameters())
    for step in range(3):
        fakes = draw(batch(step)[:, :2]).tanh()
        critic.zero_grad()
        critic.backward(F.softplus(judge(fakes.detach())).mean() + F.softplus(-judge(batch(step))).mean())
        critic.step()
        artist.zero_grad()
        loss = F.softplus(-judge(fakes)).mean()
        held = [p.detach().clone().requires_grad_() for p in draw.parameters()]
        apart = F.softplus(-judge(F.linear(batch(step)[:, :2], *held).tanh())).mean()
        artist.backward(loss)
        artist._collect()
        for i, h in enumerate(hessian_diagonal(apart, held)):
            torch.testing.assert_close(artist._collected[0, i], h, rtol=1e-10, atol=0)
        artist.step()
    assert all(p.isfinite().all() for p in (*draw.parameters(), *judge.parameters()))


# Seldom looks.


@pytest.mark.parametrize("every", [1, 3, 4])
def test_the_hessian_is_looked_at_in_every_kth_step_only(looks, every):
    start, *vectors = draws(21, sum(SIZES))
    given = {"lr": 0.05, "betas": (0.8, 0.7), "eps": 1e-2, "clip": None}
    params, oracle = parameters(start), oracles.AdaHesScale(start, **given)
    optimizer = AdaHesScale(params, refresh_every=every, **given)
    for step, (gradient, diagonal) in enumerate(zip(vectors[::2], vectors[1::2], strict=True)):
        take(optimizer, params, gradient, diagonal)
        oracle.step(gradient, diagonal if step % every == 0 else None)
        assert len(looks) == step // every + 1
        assert relative(torch.cat([p.flatten() for p in params]), oracle.theta) < 1e-12


@pytest.mark.parametrize("before", range(1, 8))
def test_resumed_in_the_middle_of_a_period_bitwise(looks, before):
    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(loss_of(model, seed=step, dtype=torch.float32))
            optimizer.step()

    model = network(torch.float32)
    optimizer = AdaHesScale(model.parameters(), refresh_every=3)
    train(model, optimizer, range(before))
    again = copy.deepcopy(model)
    resumed = AdaHesScale(again.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins = [(again, resumed), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    looks.clear()
    train(model, optimizer, range(before, before + 5))
    seen = len(looks)
    assert seen == len([step for step in range(before, before + 5) if step % 3 == 0])
    for other, its in twins:
        looks.clear()
        train(other, its, range(before, before + 5))
        assert len(looks) == seen
        assert same(snapshot(its), snapshot(optimizer))


def test_micro_batches_of_a_step_are_all_looked_at(looks):
    model = network()
    optimizer = AdaHesScale(model.parameters(), refresh_every=2)
    for _ in range(4):
        optimizer.zero_grad()
        for seed in range(3):
            optimizer.backward(loss_of(model, seed=seed))
        optimizer.step()
    assert len(looks) == 6


def test_a_parameter_that_is_new_is_looked_at_without_the_others():
    params = parameters(draws(1, sum(SIZES))[0])
    optimizer = AdaHesScale(params, refresh_every=4)
    gradient, diagonal = draws(2, sum(SIZES), seed=1)

    def some(used, factor):
        optimizer.zero_grad()
        loss = made(params, gradient, factor * diagonal)
        parts = [p for i, p in enumerate(params) if i not in used]
        for p in parts:
            p.requires_grad_(False)
        loss = made(params, gradient, factor * diagonal)
        for p in parts:
            p.requires_grad_(True)  # as a layer that this batch does not pass
        optimizer.backward(loss)
        optimizer.step()

    updates = lambda: {i: int(s["shared_updates"]) for i, s in enumerated() if "shared_updates" in s}  # noqa: E731
    enumerated = lambda: sorted(optimizer.state_dict()["state"].items())  # noqa: E731
    some([0, 1, 2], 1.0)
    some([0, 1, 2], 2.0)
    assert updates() == {0: 1}
    some([0, 1, 2, 3], 3.0)  # the fourth comes between two looks of the others, the fifth never
    assert updates() == {0: 1, 3: 1}
    pieces = diagonal.split(SIZES)
    torch.testing.assert_close(squares(optimizer)[0].flatten(), pieces[0] ** 2)
    torch.testing.assert_close(squares(optimizer)[3].flatten(), (3 * pieces[3]) ** 2)
    some([0, 1, 2, 3], 4.0)
    some([0, 1, 2, 3], 5.0)
    assert updates() == {0: 2, 3: 1}


# Parameters that come and go.


def test_frozen_parameters_may_be_unfrozen():
    model, reference = network(), network()
    model[0].requires_grad_(False)
    optimizer = AdaHesScale(model.parameters(), weight_decay=0.1)
    other = AdaHesScale(list(reference.parameters())[2:], weight_decay=0.1)
    for step in range(3):
        for held, its in ((model, optimizer), (reference, other)):
            its.zero_grad()
            its.backward(loss_of(held, seed=step))
            its.step()
    assert same(values(model.parameters()), values(reference.parameters()))
    assert set(optimizer.state_dict()["state"]) == {2, 3, 4, 5}
    model[0].requires_grad_(True)
    expected = hessian_diagonal(loss_of(model), list(model[0].parameters()))
    optimizer.zero_grad()
    optimizer.backward(loss_of(model))
    optimizer.step()
    torch.testing.assert_close(squares(optimizer)[:2], [h**2 for h in expected], rtol=1e-12, atol=0)
    model[2].requires_grad_(False)
    held = values(model[2].parameters())
    optimizer.zero_grad()
    optimizer.backward(loss_of(model))
    optimizer.step()
    assert same(values(model[2].parameters()), held)


def test_averages_of_a_parameter_do_not_shrink_while_it_is_absent():
    """With a constant gradient and curvature the direction is their ratio, however many steps were missed."""
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = AdaHesScale(params, lr=1.0, betas=(0.9, 0.9), clip=None)
    for step in range(30):
        optimizer.zero_grad()
        present = params if step in (0, 25) else params[:1]
        ones = torch.ones(2 * len(present), dtype=torch.float64)
        optimizer.backward(made(present, 3 * ones, 4 * ones))
        before = values(params)
        optimizer.step()
        for p, old in zip(present, before, strict=False):
            torch.testing.assert_close(old - p.detach(), torch.full((2,), 0.75, dtype=torch.float64))
    torch.testing.assert_close(squares(optimizer)[1], torch.full((2,), 16.0, dtype=torch.float64))


def test_parameters_never_used_and_parameters_without_entries():
    used, unused, empty = (nn.Parameter(torch.ones(s)) for s in ((3,), (2,), (0, 4)))
    optimizer = AdaHesScale([used, unused, empty], weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward((used**2).sum() + (empty**2).sum())
        optimizer.step()
    assert same(unused.detach(), torch.ones(2))
    assert set(optimizer.state_dict()["state"]) == {0}


def test_parameters_whose_contents_are_swapped():
    model, reference = network(torch.float32), network(torch.float32)
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    for step in range(4):
        for p in model.parameters():
            renewed = nn.Parameter(p.detach().clone())
            p.grad = None
            torch.utils.swap_tensors(p, renewed)
        for held, its in ((model, optimizer), (reference, other)):
            its.zero_grad()
            its.backward(loss_of(held, seed=step, dtype=torch.float32))
            its.step()
        assert same(snapshot(optimizer), snapshot(other))


# How it is called.


def test_closure():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        optimizer.backward(loss)
        seen.append(loss)
        return loss

    for _ in range(3):
        with torch.no_grad():
            assert optimizer.step(closure) is seen[-1]
        other.zero_grad()
        other.backward(loss_of(reference))
        other.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_grad_scaler():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, seed=step)
        optimizer.attach(loss)
        scaler.scale(loss).backward()
        if step == 1:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)
        if step == 2:
            model[0].bias.grad[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert scaler.get_scale() == 2.0**9
            assert same(snapshot(optimizer), before)
            continue
        other.zero_grad()
        other.backward(loss_of(reference, seed=step))
        other.step()
    # Powers of two scale and unscale without rounding.
    assert same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_keep_their_curvature_in_float32(dtype):
    model, reference = network(dtype), network(torch.float32)
    reference.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    for held, its in ((model, optimizer), (reference, other)):
        its.backward(loss_of(held, dtype=next(held.parameters()).dtype))
        its.step()
    assert all(p.dtype == dtype for p in model.parameters())
    for mine, exact in zip(squares(optimizer), squares(other), strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, exact.flatten()) < 0.1
    again = copy.deepcopy(model)
    resumed = AdaHesScale(again.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    assert same(snapshot(resumed), snapshot(optimizer))


@pytest.fixture
def _one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_a_model_wrapped_for_several_processes():
    model, reference = network(), network()
    wrapped = DistributedDataParallel(model)
    optimizer, other = AdaHesScale(wrapped.parameters()), AdaHesScale(reference.parameters())
    for step in range(3):
        for held, its in ((wrapped, optimizer), (reference, other)):
            its.zero_grad()
            its.backward(loss_of(held, seed=step))
            its.step()
    assert same(snapshot(optimizer), snapshot(other))


# What goes wrong.


def interrupted(model):
    """A loss whose backward fails half-way, and something that lives as long as its graph."""

    def fail(_):
        raise ArithmeticError("told to fail")

    hidden = model[:3](batch())
    hidden.register_hook(fail)
    return F.cross_entropy(model[3:](hidden), torch.arange(8) % 3), weakref.ref(fail)


def test_a_backward_that_fails_leaves_nothing_behind():
    model, reference = network(), network()
    optimizer, other = AdaHesScale(model.parameters()), AdaHesScale(reference.parameters())
    for step in range(3):
        loss, graph = interrupted(model)
        with pytest.raises(ArithmeticError, match="told to fail"):
            optimizer.backward(loss)
        assert not optimizer._walks
        del loss
        gc.collect()
        assert graph() is None
        for held, its in ((model, optimizer), (reference, other)):
            its.zero_grad()
            its.backward(loss_of(held, seed=step))
            its.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_an_operation_without_a_rule_changes_nothing():
    model = network()
    optimizer = AdaHesScale(
        [{"params": model[2:].parameters()}, {"params": model[0].parameters(), "gauss_newton": True}]
    )
    loss = F.cross_entropy(model[2:](Mystery.apply(model[:2](batch()))), torch.arange(8) % 3)
    for attempt in (optimizer.backward, optimizer.attach):
        with pytest.raises(UnsupportedOperation, match="Mystery"):
            attempt(loss)
        assert not optimizer._walks
        assert all(p.grad is None for p in model.parameters())
    loss.backward()
    assert not optimizer._collected


@pytest.mark.parametrize(
    ("bad", "shown"), [(math.inf, "inf"), (-math.inf, "inf"), (math.nan, "nan"), (1e25, "1e\\+25")]
)
@pytest.mark.parametrize("when", [0, 2])
def test_a_diagonal_that_is_not_finite_is_one_error_and_nothing_changes(bad, shown, when):
    start, *vectors = draws(13, sum(SIZES), torch.float32)
    params, calm = parameters(start), parameters(start)
    optimizer, other = AdaHesScale(params, weight_decay=0.1), AdaHesScale(calm, weight_decay=0.1)
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    for gradient, diagonal in pairs[:when]:
        take(optimizer, params, gradient, diagonal)
        take(other, calm, gradient, diagonal)
    before = snapshot(optimizer)
    spoilt = vectors[1].clone()
    spoilt[14] = bad
    with pytest.raises(RuntimeError, match=rf"parameter 1 of group 0 holds {shown}; nothing was changed: .+"):
        take(optimizer, params, vectors[0], spoilt)
    assert same(snapshot(optimizer), before)
    for gradient, diagonal in pairs[when:]:
        take(optimizer, params, gradient, diagonal)
        take(other, calm, gradient, diagonal)
    assert same(snapshot(optimizer), snapshot(other))


def test_a_step_without_any_look_is_refused():
    model = network()
    optimizer = AdaHesScale(model.parameters(), weight_decay=0.1)
    before = snapshot(optimizer)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .* call optimizer\.backward\(loss\) in place of"):
        optimizer.step()
    assert same(snapshot(optimizer), before)
    optimizer.attach(loss_of(model))  # and never differentiated
    with pytest.raises(RuntimeError, match=r"optimizer\.attach\(loss\) before it"):
        optimizer.step()
    assert same(snapshot(optimizer), before)
    optimizer.zero_grad()
    optimizer.backward(loss_of(model))
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()  # with the curvature it has


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"betas": (0.9,)}, r"\(0\.9,\)"),
        ({"betas": 0.9}, r"0\.9"),
        ({"betas": (1.0, 0.9)}, r"1\.0"),
        ({"betas": (0.9, 1.0)}, r"1\.0"),
        ({"betas": (0.9, -0.1)}, r"-0\.1"),
        ({"eps": 0.0}, r"0\.0"),
        ({"eps": math.nan}, "nan"),
        ({"clip": 0.0}, r"0\.0"),
        ({"clip": math.nan}, "nan"),
        ({"trust": -1e-8}, "-1e-08"),
        ({"refresh_every": 0}, "0"),
        ({"refresh_every": 2.5}, r"2\.5"),
    ],
)
def test_bad_hyper_parameters(given, shown):
    ((name, _),) = given.items()
    with pytest.raises(ValueError, match=rf"{name}.*got {shown}: .+"):
        AdaHesScale([nn.Parameter(torch.ones(2))], **given)


# The estimate.


def test_the_matrix_is_its_dense_definition():
    observations = draws(6, 9)
    estimate = HessianDiagonal(9, decay=0.8, damping=0.05)
    for n, observation in enumerate(observations, 1):
        estimate.update(observation)
        weights = torch.tensor([0.8 ** (n - k) for k in range(1, n + 1)], dtype=torch.float64)
        mean = (weights[:, None] * torch.stack(observations[:n]) ** 2).sum(0) / weights.sum()
        torch.testing.assert_close(estimate.matrix().diagonal(), mean.sqrt() + 0.05)


# Counts.


def stepped(params, **given):
    optimizer = AdaHesScale(params, **given)
    optimizer.backward(sum((p**2).sum() for p in params))
    optimizer.step()
    optimizer.backward(sum((p**2).sum() for p in params))
    return optimizer


def test_passes_over_the_parameters_a_step():
    dim = 40_000
    optimizer = stepped([nn.Parameter(torch.ones(dim))])
    assert len(count(optimizer.step, large=dim).passes) <= 9  # and four by foreach, which are not counted


def test_launches_do_not_grow_with_the_number_of_tensors():
    launches = []
    for tensors in (1, 200):
        optimizer = stepped([nn.Parameter(torch.ones(4, 1 + k % 3)) for k in range(tensors)], trust=1.0)
        launches.append(len(count(optimizer.step).launches))
    assert launches[1] <= launches[0] + 5
    assert launches[1] <= 60, launches


def test_memory_is_what_the_docstring_says():
    dim = 50_000
    optimizer = stepped([nn.Parameter(torch.ones(dim))])
    optimizer.step()
    assert bytes_kept(optimizer) == pytest.approx(4 * dim * 4, rel=0.1)
