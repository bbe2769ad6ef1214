"""The contract of torch.optim, which every optimizer of the package keeps.

A newcomer is one line of ``OPTIMIZERS``: a function of parameters and hyper-parameters, with defaults small enough that
a handful of steps fills every buffer of the method and lets something go.
"""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import quadric


class Looking(quadric.AdaHesScale):
    """The tests below put gradients: before each step this one looks at a loss of its own, which leaves them alone."""

    def _collect(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in params]
        for p in params:
            p.grad = None
        with torch.enable_grad():
            loss = sum((p**2 / 2 + nn.functional.softplus(p)).sum() for p in params if not p.is_complex())
        if params:
            self.backward(loss)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        super()._collect()


class Bag(nn.Module):
    """A model of parameters without a layer: what ISAAC does not condition, it steps along as it is."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def parameters(self, recurse=True):
        return iter(self.held)


def isaac(params, **given):
    """ISAAC, which takes a model, on whatever torch's optimizers take."""
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    first, *others = groups
    optimizer = quadric.ISAAC(Bag(list(first["params"])), **{"lr": 0.05} | given)
    optimizer.param_groups[0].update({name: value for name, value in first.items() if name != "params"})
    for group in others:
        optimizer.add_param_group(group)
    return optimizer


OPTIMIZERS = {
    "mfac": lambda params, **given: quadric.MFAC(params, **{"lr": 0.05, "window": 3, "damping": 1e-2} | given),
    "mfac-blocks": lambda params, **given: quadric.MFAC(
        params, **{"lr": 0.05, "window": 5, "damping": 1e-2, "block_size": 4} | given
    ),
    "mfac-wide-window": lambda params, **given: quadric.MFAC(
        params, **{"lr": 0.05, "window": 64, "damping": 1e-2, "momentum": 0.0} | given
    ),
    "mfac-bfloat16-window": lambda params, **given: quadric.MFAC(
        params, **{"lr": 0.05, "window": 3, "damping": 1e-2, "window_dtype": torch.bfloat16} | given
    ),
    "ginger": lambda params, **given: quadric.Ginger(params, **{"lr": 0.05, "rank": 2, "damping": 1e-2} | given),
    "ginger-clipped": lambda params, **given: quadric.Ginger(
        params, **{"lr": 0.05, "rank": 3, "damping": 1e-2, "clip": 0.3} | given
    ),
    "block-mean": lambda params, **given: quadric.BlockMeanAdaGrad(params, **{"lr": 0.05, "refresh_every": 3} | given),
    "block-mean-plain": lambda params, **given: quadric.BlockMeanAdaGrad(
        params, **{"lr": 0.05, "refresh_every": 4, "whiten": False, "decay": 0.9, "damping": 0.1} | given
    ),
    "hesscale": lambda params, **given: Looking(params, **{"lr": 0.05, "eps": 1e-2, "clip": 1.0} | given),
    "hesscale-published": lambda params, **given: Looking(params, **{"lr": 0.05, "eps": 1e-2, "clip": None} | given),
    "hesscale-trust": lambda params, **given: Looking(params, **{"lr": 0.05, "eps": 1e-2, "trust": 1e-3} | given),
    "hesscale-seldom": lambda params, **given: Looking(params, **{"lr": 0.05, "eps": 1e-2, "refresh_every": 4} | given),
    "isaac": isaac,
    "isaac-pooled": lambda params, **given: isaac(params, **{"pooled": True, "refresh_every": 3} | given),
    "isaac-decayed": lambda params, **given: isaac(params, **{"decay": 0.9, "momentum": 0.0, "damping": 0.5} | given),
}
DAMPED = sorted(name for name in OPTIMIZERS if not name.startswith("hesscale"))  # the others have eps, a plain number
SHAPES = [(4, 3), (5,), (), (2, 3, 2)]
STEPS = 9  # more than any window or buffer above holds


@pytest.fixture(params=OPTIMIZERS)
def make(request):
    return OPTIMIZERS[request.param]


def damping_of(make):
    """What an optimizer calls that which it adds to the curvature."""
    return "damping" if "damping" in make(parameters()).defaults else "eps"


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def put_gradients(params, step, scale=1.0):
    """Gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        drawn = torch.randn(p.shape, generator=generator)
        p.grad = (drawn * scale).to(p.dtype) if p.requires_grad else None


def walk(optimizer, params, steps=range(STEPS), scale=1.0):
    for step in steps:
        put_gradients(params, step, scale)
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def snapshot(optimizer, params):
    return copy.deepcopy((values(params), optimizer.state_dict()))


def same(a, b):
    """Equal to the last bit, in shape and in type, through any nesting."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def finite(params):
    return all(bool(p.isfinite().all()) for p in params)


# What a step is.


def test_descends_a_quadratic(make):
    params = parameters()
    optimizer = make(params, lr=0.05)
    loss = lambda: sum((p**2).sum() for p in params)  # noqa: E731
    start = loss().item()
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * start


def test_closure_runs_with_gradients_and_its_loss_is_returned(make):
    params = parameters()
    optimizer = make(params)
    losses, modes = [], []

    def closure():
        modes.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert modes == [True]
    assert optimizer.step(lambda: "whatever") == "whatever"
    assert optimizer.step() is None


def test_never_writes_grad(make):
    params = parameters()
    optimizer = make(params, weight_decay=0.1, maximize=True)
    for step in range(STEPS):
        put_gradients(params, step)
        grads = [p.grad for p in params]
        before = copy.deepcopy(grads)
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
        assert same(grads, before)


def test_does_nothing_without_any_gradient(make):
    params = parameters()
    optimizer = make(params, weight_decay=0.5)
    before = snapshot(optimizer, params)
    optimizer.step()
    assert same(snapshot(optimizer, params), before)
    assert optimizer.state_dict()["state"] == {}


def test_a_parameter_without_gradient_is_untouched_with_its_momentum(make):
    params = parameters()
    optimizer = make(params, weight_decay=0.1)
    walk(optimizer, params, range(4))
    before, state = values(params), optimizer.state_dict()["state"]
    put_gradients(params, 4)
    params[1].grad = None
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[0], before[0])
    for name in state[1]:
        if "momentum" in name:
            assert torch.equal(after[1][name], state[1][name])
    walk(optimizer, params, range(5, 9))
    assert not torch.equal(params[1], before[1])
    assert finite(params)


def test_a_parameter_never_used_has_no_state(make):
    params = parameters()
    optimizer = make(params)
    for step in range(3):
        put_gradients(params, step)
        params[2].grad = None
        optimizer.step()
    assert set(optimizer.state_dict()["state"]) == {0, 1, 3}


def test_frozen_parameters_may_be_unfrozen_later_and_resumed(make):
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = make(params, weight_decay=0.1)
    frozen = params[0].detach().clone()
    walk(optimizer, params, range(4))
    assert torch.equal(params[0], frozen)
    params[0].requires_grad_(True)
    walk(optimizer, params, range(4, 7))
    assert not torch.equal(params[0], frozen)

    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(again, weight_decay=0.1)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    walk(optimizer, params, range(7, 12))
    walk(resumed, again, range(7, 12))
    assert same(values(params), values(again))


def test_gradients_accumulate_over_micro_batches(make):
    whole, parts = parameters(), parameters()
    one, other = make(whole), make(parts)
    for step in range(STEPS):
        for p, q in zip(whole, parts, strict=True):
            p.grad = q.grad = None
            (p * 2).sum().backward()
            (p * step).sum().backward()
            (q * (2 + step)).sum().backward()
        one.step()
        other.step()
    assert same(values(whole), values(parts))


def test_clipped_gradients_are_what_counts(make):
    clipped, scaled = parameters(), parameters()
    one, other = make(clipped), make(scaled)
    for step in range(STEPS):
        put_gradients(clipped, step)
        put_gradients(scaled, step)
        nn.utils.clip_grad_value_(clipped, 0.5)
        for p in scaled:
            p.grad.clamp_(-0.5, 0.5)
        one.step()
        other.step()
    assert same(values(clipped), values(scaled))
    reference = parameters()
    walk(make(reference), reference)
    assert not same(values(clipped), values(reference))


# Groups and hyper-parameters.


def test_each_group_has_its_own_hyper_parameters(make):
    together, alone, own = parameters(), parameters(), {"lr": 0.01, damping_of(make): 0.5}
    optimizer = make([{"params": together[:2], **own}, {"params": together[2:]}], weight_decay=0.1)
    first = make(alone[:2], **own, weight_decay=0.1)
    second = make(alone[2:], weight_decay=0.1)
    for step in range(STEPS):
        put_gradients(together, step)
        put_gradients(alone, step)
        optimizer.step()
        first.step()
        second.step()
    assert same(values(together), values(alone))


def test_add_param_group_in_the_middle(make):
    params, alone = parameters(), parameters()
    optimizer, first = make(params[:2]), make(alone[:2])
    late = make(alone[2:], lr=0.02)
    for step in range(STEPS):
        put_gradients(params, step)
        put_gradients(alone, step)
        if step == 4:
            optimizer.add_param_group({"params": params[2:], "lr": 0.02})
        optimizer.step()
        first.step()
        if step >= 4:
            late.step()
    assert same(values(params), values(alone))
    with pytest.raises(ValueError, match=r"got -2\.0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -2.0})
    assert len(optimizer.param_groups) == 2


def test_all_hyper_parameters_are_in_the_groups(make):
    optimizer = make(parameters())
    assert {"lr", "weight_decay", "maximize", damping_of(make)} <= set(optimizer.param_groups[0])
    assert set(optimizer.defaults) | {"params"} == set(optimizer.param_groups[0])


def test_named_parameters(make):
    params = parameters()
    optimizer = make([(f"p{i}", p) for i, p in enumerate(params)])
    walk(optimizer, params, range(2))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["p0", "p1", "p2", "p3"]


BAD = [
    {"lr": -1.0},
    {"lr": math.nan},
    {"lr": math.inf},
    {"weight_decay": -0.5},
    {"weight_decay": math.nan},
    {"damping": 0.0},
    {"damping": -3.0},
    {"damping": math.nan},
    {"damping": math.inf},
]


@pytest.mark.parametrize("given", BAD, ids=str)
def test_a_bad_hyper_parameter_is_refused_with_its_value(make, given):
    ((name, value),) = given.items()
    name = damping_of(make) if name == "damping" else name
    with pytest.raises(ValueError, match=rf"{name}.*got {value}.*: .+"):
        make(parameters(), **{name: value})


@pytest.mark.parametrize("make", DAMPED, indirect=True)
def test_a_bad_schedule_is_refused_with_its_value(make):
    with pytest.raises(ValueError, match=r"damping.*got -7\.0.*: .+"):
        make(parameters(), damping=lambda step: -7.0)


def test_no_parameters(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ConstantLR(o)],
            [3],
        ),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.1, total_steps=20, cycle_momentum="betas" in o.defaults or bool(o.defaults.get("momentum"))
        ),
    ],
    ids=["step", "cosine", "lambda", "sequential", "plateau", "onecycle"],
)
def test_learning_rate_schedules(make, schedule):
    scheduled, by_hand = parameters(), parameters()
    one, other = make(scheduled), make(by_hand)
    scheduler = schedule(one)
    for step in range(6):
        for name in ("lr", "momentum", "betas"):  # OneCycleLR moves the momentum as well
            if name in one.param_groups[0]:
                other.param_groups[0][name] = one.param_groups[0][name]
        put_gradients(scheduled, step)
        put_gradients(by_hand, step)
        one.step()
        other.step()
        scheduler.step(*[1.0] * isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))
    assert same(values(scheduled), values(by_hand))
    assert isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or one.param_groups[0]["lr"] != 0.05


def test_learning_rate_as_a_tensor(make):
    plain, given = parameters(), parameters()
    one, other = make(plain, lr=0.125), make(given, lr=torch.tensor(0.125))
    walk(one, plain)
    walk(other, given)
    assert same(values(plain), values(given))
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor)
    scheduler = torch.optim.lr_scheduler.StepLR(other, 1, 0.5)
    walk(one, plain, [0])
    walk(other, given, [0])
    scheduler.step()
    one.param_groups[0]["lr"] = 0.0625
    walk(one, plain, [1])
    walk(other, given, [1])
    assert same(values(plain), values(given))


def test_maximize_is_a_step_along_the_negated_gradient(make):
    up, down = parameters(), parameters()
    one, other = make(up, maximize=True, weight_decay=0.1), make(down, weight_decay=0.1)
    walk(one, up, scale=-1.0)
    walk(other, down)
    assert same(values(up), values(down))


def test_weight_decay_is_decoupled_exactly(make):
    params = parameters(dtype=torch.float64)
    optimizer = make(params, lr=0.25, weight_decay=0.5)
    before = values(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(values(params), [p * (1 - 0.25 * 0.5) for p in before])

    decayed, plain = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    one, other = make(decayed, lr=0.25, weight_decay=0.5), make(plain, lr=0.25)
    for step in range(STEPS):
        start = values(decayed)
        for p, q in zip(plain, start, strict=True):
            p.data.copy_(q)
        put_gradients(decayed, step)
        put_gradients(plain, step)
        one.step()
        other.step()
        for p, q, s in zip(decayed, plain, start, strict=True):
            torch.testing.assert_close(p, q - 0.125 * s, rtol=1e-13, atol=1e-13)


# Layouts and types.


def test_strides_of_gradients_and_parameters_do_not_matter(make):
    shapes = [(2, 3, 4, 5), (6, 5), (6,)]
    plain, odd = parameters(shapes), parameters(shapes)
    odd[0] = nn.Parameter(odd[0].detach().to(memory_format=torch.channels_last))
    odd[1] = nn.Parameter(odd[1].detach().t().contiguous().t())
    one, other = make(plain, weight_decay=0.1), make(odd, weight_decay=0.1)
    for step in range(STEPS):
        put_gradients(plain, step)
        put_gradients(odd, step)
        if step % 2:
            odd[0].grad = odd[0].grad.to(memory_format=torch.channels_last)
            odd[1].grad = odd[1].grad.t().contiguous().t()
            odd[2].grad = odd[2].grad.repeat_interleave(2)[::2]
            assert not odd[2].grad.is_contiguous()
        one.step()
        other.step()
    assert same(values(plain), values(odd))
    assert odd[0].is_contiguous(memory_format=torch.channels_last)
    state = other.state_dict()
    odd_again = [nn.Parameter(p.detach().clone()) for p in odd]
    third = make(odd_again, weight_decay=0.1)
    third.load_state_dict(state)
    walk(other, odd, range(3))
    walk(third, odd_again, range(3))
    assert same(values(odd), values(odd_again))


def test_expanded_gradients(make):
    params = [nn.Parameter(torch.ones(4, 3))]
    optimizer = make(params)
    params[0].sum().backward()
    params[0].grad = torch.ones(()).expand(4, 3)
    optimizer.step()
    assert len(params[0].unique()) == 1
    assert finite(params)


def test_scalars_and_empty_tensors(make):
    params = parameters([(), (0,), (3, 0, 2), (1,)])
    optimizer = make(params, weight_decay=0.1)
    before = values(params)
    walk(optimizer, params)
    assert not torch.equal(params[0], before[0])
    assert finite(params)
    state = through_a_file(optimizer.state_dict())
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(again, weight_decay=0.1)
    resumed.load_state_dict(state)
    walk(optimizer, params, range(3))
    walk(resumed, again, range(3))
    assert same(values(params), values(again))

    only_empty = parameters([(0, 3)])
    optimizer = make(only_empty)
    walk(optimizer, only_empty)
    assert optimizer.state_dict()["state"] == {}


def test_float64_stays_float64(make):
    single, double = parameters(), parameters(dtype=torch.float64)
    walk(make(single), single)
    optimizer = make(double)
    walk(optimizer, double)
    assert all(p.dtype == torch.float64 for p in double)
    for p, q in zip(single, double, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0.05, atol=0.05)
    window = optimizer.param_groups[0].get("window_dtype")
    for state in optimizer.state_dict()["state"].values():
        for name, value in state.items():
            if value.ndim and value.is_floating_point() and not (name == "window" and window):
                assert value.dtype == torch.float64, name


def test_half_precision_parameters_keep_their_type_and_float32_curvature(make):
    for dtype in (torch.bfloat16, torch.float16):
        params = parameters(dtype=dtype)
        optimizer = make(params)
        walk(optimizer, params)
        assert all(p.dtype == dtype for p in params)
        assert finite(params)
        window = optimizer.param_groups[0].get("window_dtype")
        for state in optimizer.state_dict()["state"].values():
            for name, value in state.items():
                if value.ndim and value.is_floating_point() and not (name == "window" and window):
                    assert value.dtype in (torch.float32, torch.float64), name


def test_types_may_be_mixed_in_a_group(make):
    types = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [p.detach().to(dtype).requires_grad_() for p, dtype in zip(parameters(), types, strict=True)]
    optimizer = make(params, weight_decay=0.1)
    before = values(params)
    walk(optimizer, params)
    assert [p.dtype for p in params] == types
    assert finite(params)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    alone = [q.requires_grad_() for q in before]
    double = make(alone[2:3], weight_decay=0.1)
    for step in range(STEPS):
        put_gradients(alone, step)
        double.step()
    assert torch.equal(params[2], alone[2])  # float64 is computed apart, in float64
    again = [p.detach().clone().requires_grad_() for p in params]
    resumed = make(again, weight_decay=0.1)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    walk(optimizer, params, range(4))
    walk(resumed, again, range(4))
    assert same(values(params), values(again))


def test_gradients_that_carry_a_graph(make):
    plain, graphed = parameters(), parameters()
    one, other = make(plain), make(graphed)
    for _ in range(3):
        sum((p**3).sum() for p in plain).backward()
        loss = sum((p**3).sum() for p in graphed)
        for p, grad in zip(graphed, torch.autograd.grad(loss, graphed, create_graph=True), strict=True):
            p.grad = grad
        one.step()
        other.step()
        one.zero_grad()
        other.zero_grad()
    assert same(values(plain), values(graphed))
    assert all(p.is_leaf for p in graphed)


def test_autocast_does_not_reach_the_step(make):
    plain, cast = parameters(), parameters()
    walk(make(plain), plain)
    with torch.autocast("cpu", torch.bfloat16):
        walk(make(cast), cast)
    assert same(values(plain), values(cast))


def test_another_default_device_or_type_does_not_reach_the_step(make):
    plain, other = parameters(), parameters()
    walk(make(plain), plain)
    optimizer = make(other)
    for step in range(STEPS):
        put_gradients(other, step)
        with torch.device("meta"):
            optimizer.step()
    assert same(values(plain), values(other))


# Numbers that should not be there.


def odd_gradients():
    def replaced(value):
        def spoil(p):
            p.grad.view(-1)[-1] = value

        return spoil

    def sparse(p):
        p.grad = p.grad.to_sparse()

    return {
        "nan": (replaced(math.nan), "nan"),
        "inf": (replaced(math.inf), "inf"),
        "-inf": (replaced(-math.inf), "-inf"),
        "overflow": (replaced(1e30), "1e\\+30"),
        "sparse": (sparse, "sparse"),
    }


@pytest.mark.parametrize("kind", odd_gradients())
@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_odd_gradient_is_one_error_and_nothing_changes(make, kind, when):
    spoil, shown = odd_gradients()[kind]
    params, reference = parameters(), parameters()
    groups = lambda p: [{"params": p[:1]}, {"params": p[1:], "lr": 0.01}]  # noqa: E731
    optimizer, undisturbed = make(groups(params), weight_decay=0.1), make(groups(reference), weight_decay=0.1)
    walk(optimizer, params, range(when))
    walk(undisturbed, reference, range(when))
    put_gradients(params, 99)
    spoil(params[3])
    before, grads = snapshot(optimizer, params), [p.grad for p in params]
    with pytest.raises(RuntimeError, match=rf"{shown}.*: .+"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    walk(optimizer, params, range(when, when + 4))
    walk(undisturbed, reference, range(when, when + 4))
    assert same(snapshot(optimizer, params), snapshot(undisturbed, reference))


def test_squares_that_overflow_only_together_are_refused(make):
    params = parameters([(3, 5)] * 6)
    optimizer = make(params)
    for p in params:
        p.grad = torch.full_like(p, 4e18)  # the squares of one parameter add up to 2.4e38
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"4e\+18; nothing was changed: .+"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)


def test_a_refused_first_step_leaves_no_block_behind(make):
    params, reference = parameters(), parameters()
    optimizer, undisturbed = make(params), make(reference)
    params[1].grad = torch.full_like(params[1], math.nan)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0|parameter 1 of group 0"):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    walk(optimizer, params)
    walk(undisturbed, reference)
    assert same(snapshot(optimizer, params), snapshot(undisturbed, reference))


def test_complex_parameters_are_refused(make):
    params = [*parameters(), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    optimizer = make(params)
    put_gradients(params[:4], 0)
    params[4].grad = torch.ones(2, dtype=torch.complex64)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"complex.*view_as_real"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)


def test_a_parameter_that_changed_its_shape_is_refused(make):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params, range(2))
    params[1].grad = None
    params[1].data = torch.zeros(7)
    put_gradients(params, 2)
    before = snapshot(optimizer, params)
    with pytest.raises(RuntimeError, match=r"\(7,\).*\(5,\).*new optimizer"):
        optimizer.step()
    assert same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("make", DAMPED, indirect=True)
def test_a_schedule_that_turns_bad_changes_nothing(make):
    params = parameters()
    optimizer = make(params, damping=lambda step: 0.1 if step < 4 else -0.5)
    with pytest.raises(ValueError, match=r"damping.*got -0\.5"):
        walk(optimizer, params, range(20))
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"damping.*got -0\.5"):
        walk(optimizer, params, range(20))
    after = snapshot(optimizer, params)
    assert same(before[0], after[0])
    assert same(before[1]["state"], after[1]["state"])


def test_zero_gradients_move_nothing(make):
    params = parameters()
    optimizer = make(params)
    before = values(params)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same(values(params), before)
    walk(optimizer, params)
    assert finite(params)
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("scale", [1e-12, 1e8, 1e15])
def test_tiny_and_huge_gradients(make, scale):
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]  # where the smallest step leaves a trace
    optimizer = make(params)
    walk(optimizer, params, scale=scale)
    assert finite(params)
    assert all(bool((p != 0).all()) for p in params)


@pytest.mark.parametrize("make", ["mfac", "mfac-blocks", "mfac-bfloat16-window"], indirect=True)
def test_an_outburst_is_forgotten(make):
    params, calm = parameters(), parameters()
    optimizer, other = make(params), make(calm)
    walk(optimizer, params, [100], scale=1e12)
    walk(other, calm, [101])
    walk(optimizer, params, range(8))
    walk(other, calm, range(8))
    for group in (*optimizer.param_groups, *other.param_groups):
        group["momentum"] = 0.0
    start, start_calm = values(params), values(calm)
    walk(optimizer, params, [9])
    walk(other, calm, [9])
    for p, q, a, b in zip(params, calm, start, start_calm, strict=True):
        torch.testing.assert_close(p - a, q - b, rtol=1e-3, atol=1e-5)


# Gradient scaling.


def test_grad_scaler_skips_a_step_that_overflowed(make):
    params = parameters()
    optimizer = make(params, weight_decay=0.1)
    walk(optimizer, params, range(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = snapshot(optimizer, params)
    optimizer.zero_grad()
    scaler.scale(sum((p**2).sum() for p in params)).backward()
    params[1].grad[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert same(snapshot(optimizer, params), before)
    assert scaler.get_scale() == 4.0

    reference = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(reference, weight_decay=0.1)
    other.load_state_dict(optimizer.state_dict())
    for unscale in (False, True):
        optimizer.zero_grad()
        other.zero_grad()
        scaler.scale(sum((p**2).sum() for p in params)).backward()
        sum((p**2).sum() for p in reference).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert same(values(params), values(reference))


# Copies and files.


def copies(optimizer, params, make):
    def loaded(state):
        again = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = make(again)
        resumed.load_state_dict(state)
        return resumed, again

    return {
        "deepcopy": lambda: copy.deepcopy((optimizer, params)),
        "pickle": lambda: pickle.loads(pickle.dumps((optimizer, params))),
        "state_dict": lambda: loaded(optimizer.state_dict()),
        "file": lambda: loaded(through_a_file(optimizer.state_dict())),
        "reduce": lambda: loaded(copy.deepcopy(optimizer).state_dict()),
    }


@pytest.mark.parametrize("how", copies(None, [], None))
@pytest.mark.parametrize("before", [0, 1, 2, STEPS])
def test_a_copy_goes_on_bitwise_and_alone(make, how, before):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params, range(before))
    other, others = copies(optimizer, params, make)[how]()
    held = snapshot(optimizer, params)
    assert same(held, snapshot(other, others))
    steps = range(before, before + STEPS)
    walk(other, others, steps)
    assert same(snapshot(optimizer, params), held)
    walk(optimizer, params, steps)
    assert same(snapshot(optimizer, params), snapshot(other, others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resume_is_bitwise(make, dtype):
    params = parameters(dtype=dtype)
    optimizer = make(params, weight_decay=0.01)
    for step in range(STEPS):
        state = through_a_file(optimizer.state_dict())
        again = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = make(again, weight_decay=0.01, lr=77.0)  # the file knows better
        resumed.load_state_dict(state)
        assert same(resumed.state_dict(), optimizer.state_dict())
        walk(optimizer, params, [step])
        walk(resumed, again, [step])
        assert same(snapshot(optimizer, params), snapshot(resumed, again))


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    present=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=8),
    saved=st.integers(0, 7),
)
def test_resume_is_bitwise_whichever_gradients_come_and_go(make, present, saved):
    params = parameters()
    optimizer = make(params, weight_decay=0.01)
    again, resumed = params, optimizer
    for step, has in enumerate(present):
        if step == saved:
            again = [nn.Parameter(p.detach().clone()) for p in params]
            resumed = make(again, weight_decay=0.01)
            resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        for stepped, held in [(optimizer, params)] + [(resumed, again)] * (resumed is not optimizer):
            put_gradients(held, step)
            before = values(held)
            for p, there in zip(held, has, strict=True):
                p.grad = p.grad if there else None
            stepped.step()
            assert all(torch.equal(p, q) != there for p, q, there in zip(held, before, has, strict=True))
    assert same(snapshot(optimizer, params), snapshot(resumed, again))


def test_state_dict_shows_each_parameter_its_own(make):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params)
    state = optimizer.state_dict()["state"]
    assert sorted(state) == [0, 1, 2, 3]
    for i, p in enumerate(params):
        for name, value in state[i].items():
            assert isinstance(value, torch.Tensor), name
            if not name.startswith("shared_") and name not in ("step", "block"):
                assert value.shape[value.ndim - p.ndim :] == p.shape, name
        assert float(state[i]["step"]) == STEPS


def test_state_is_there_for_whoever_looks(make):
    params = parameters()
    optimizer = make(params)
    assert not optimizer.state
    walk(optimizer, params, range(2))
    assert same(dict(optimizer.state[params[1]]), optimizer.state_dict()["state"][1])
    assert same(optimizer.__getstate__()["state"][params[0]], optimizer.state_dict()["state"][0])


def test_state_dict_is_a_copy(make):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params, range(4))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    walk(optimizer, params, range(4, 6))
    assert same(state, before)


@pytest.mark.parametrize("make", DAMPED, indirect=True)
def test_a_schedule_of_the_damping_survives_a_file(make):
    schedule = lambda step: 1.0 / (step + 1)  # noqa: E731
    params = parameters()
    optimizer = make(params, damping=schedule)
    walk(optimizer, params, range(4))
    state = through_a_file(optimizer.state_dict())
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(again, damping=schedule)
    resumed.load_state_dict(state)
    walk(optimizer, params, range(4, 8))
    walk(resumed, again, range(4, 8))
    assert same(values(params), values(again))


def test_a_state_of_another_optimizer_is_refused(make):
    params = parameters()
    foreign = torch.optim.SGD(params, momentum=0.9)
    walk(foreign, params, range(1))
    optimizer = make(params)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=rf"state_dict has no .*{damping_of(make)}.*: load the state of a"):
        optimizer.load_state_dict(foreign.state_dict())
    assert same(snapshot(optimizer, params), before)
    assert same(optimizer.param_groups[0]["lr"], 0.05)


@pytest.mark.parametrize(
    "make", sorted(OPTIMIZERS.keys() - {"block-mean-plain"}), indirect=True
)  # which keeps no coordinates
def test_a_state_of_another_model_is_refused(make):
    params = parameters()
    optimizer = make(params)
    walk(optimizer, params, range(2))
    state = optimizer.state_dict()
    others = parameters([(4, 3), (5,), (), (2, 2, 3)])
    resumed = make(others)
    walk(resumed, others, range(2))
    before = snapshot(resumed, others)
    with pytest.raises(ValueError, match=r"2, 3, 2\) for parameter 3 of shape \(2, 2, 3\): .+"):
        resumed.load_state_dict(state)
    assert same(snapshot(resumed, others), before)


def test_hyper_parameters_come_from_the_file(make):
    params = parameters()
    optimizer = make(params, **{damping_of(make): 0.5}, lr=0.02)
    walk(optimizer, params, range(5))
    again = [nn.Parameter(p.detach().clone()) for p in params]
    structural = {"window": 7, "rank": 4, "refresh_every": 11}
    resumed = make(again, **{k: v for k, v in structural.items() if k in optimizer.defaults})
    walk(resumed, again, range(3))
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(optimizer.state_dict())
    walk(optimizer, params, range(5, 9))
    walk(resumed, again, range(5, 9))
    assert same(snapshot(optimizer, params), snapshot(resumed, again))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint(make, tmp_path):
    def training():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        return model, make(model.parameters(), weight_decay=0.1)

    def steps(model, optimizer, seeds):
        for seed in seeds:
            put_gradients(list(model.parameters()), seed)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = training()
    steps(model, optimizer, range(5))
    before = snapshot(optimizer, list(model.parameters()))
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    assert same(snapshot(optimizer, list(model.parameters())), before)
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint", no_dist=True)

    other, resumed = training()
    held = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(held, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    other.load_state_dict(held["model"])
    set_optimizer_state_dict(other, resumed, held["optimizer"])
    assert same(snapshot(resumed, list(other.parameters())), before)
    steps(model, optimizer, range(5, 11))
    steps(other, resumed, range(5, 11))
    assert same(snapshot(resumed, list(other.parameters())), snapshot(optimizer, list(model.parameters())))


def test_parameters_may_be_swapped_between_steps(make):
    params, reference = parameters(), parameters()
    optimizer, other = make(params), make(reference)
    for step in range(STEPS):
        if step in (0, 3, 6):
            renewed = {p: nn.Parameter(p.detach().clone()) for p in params}
            for group in optimizer.param_groups:
                group["params"] = [renewed.get(p, p) for p in group["params"]]
            params = list(renewed.values())
        walk(optimizer, params, [step])
        walk(other, reference, [step])
        assert same(snapshot(optimizer, params), snapshot(other, reference))


# Repetition and hooks.


def test_same_seed_same_bits(make):
    results = []
    for _ in range(2):
        params = parameters()
        walk(make(params), params)
        results.append(values(params))
    assert same(*results)


def test_hooks(make):
    params = parameters()
    optimizer = make(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    walk(optimizer, params, range(2))
    assert calls == ["before", "after"] * 2

    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    assert optimizer.state_dict()["note"] == 1
    assert calls[-1] == "saving"
    optimizer.load_state_dict(optimizer.state_dict())
    held = [value for name, value in vars(optimizer).items() if name.startswith("_optimizer_") and "hooks" in name]
    assert sum(len(hooks) for hooks in held) == 4  # those above and no other


def test_load_hooks_see_and_may_replace_what_is_loaded(make):
    params = parameters(dtype=torch.bfloat16)
    optimizer = make(params)
    walk(optimizer, params, range(3))
    wanted = copy.deepcopy(optimizer.state_dict())
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(again)
    seen = []
    resumed.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(copy.deepcopy(o.state_dict())))
    resumed.load_state_dict({"wrapped": wanted})
    assert same(seen[0], wanted)
    walk(optimizer, params, range(3, 6))
    walk(resumed, again, range(3, 6))
    assert same(values(params), values(again))


def test_repr_names_the_hyper_parameters(make):
    assert damping_of(make) in repr(make(parameters()))
