"""Elementwise regions: several uses of one tensor that meet again are one function of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import oracles
import quadric
from quadric import hessian_diagonal
from quadric.backprop.route import Route
from quadric.backprop.walk import Walk


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape, seed=0):
    return randn(*shape, seed=seed).requires_grad_()


def curved(y):
    """A loss with a gradient and a diagonal Hessian in y, both of any sign."""
    return (randn(*y.shape, seed=8) * y + randn(*y.shape, seed=9) * (y - y.detach()) ** 2).sum()


def joined(loss, *targets):
    """How many regions lie between a loss and tensors."""
    return sum(entry.family == "regions" for entry in Route(loss, targets, None).rules.values())


def close(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def exact(loss, *inputs):
    close(hessian_diagonal(loss(*inputs), inputs), oracles.hessian_diagonal(loss(*inputs), inputs))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gaussian_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS = {
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu": gelu,
    "gelu by erf": gaussian_gelu,
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "softsign": lambda x: x / (1 + x.abs()),
    "tanhshrink": lambda x: x - x.tanh(),
    "snake": lambda x: x + torch.sin(1.7 * x).pow(2) / 1.7,
    "square": lambda x: x * x,
    "cube": lambda x: x * x * x,
    "double": lambda x: x + x,
    "nothing": lambda x: x - x,
    "one": lambda x: x / x,
    "half squared ReLU": lambda x: torch.relu(x) * x,
    "hard swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "quotient": lambda x: x.sin() / (2 + x.cos()),
    "addcmul": lambda x: torch.addcmul(x, x, x.exp(), value=0.3),
    "addcdiv": lambda x: torch.addcdiv(x, x, 1 + x * x, value=2.0),
    "lerp": lambda x: torch.lerp(x, x.exp(), 0.3),
    "masked": lambda x: (x * x.exp()).masked_fill(x < 0, 0.25) + x,
    "Horner": lambda x: ((0.3 * x + 1) * x - 2) * x + 0.5,
    "maximum": lambda x: torch.maximum(x.sin(), 0.5 * x),
    "in place": lambda x: (x * 2).mul_(x).add_(x),
    "power": lambda x: (x * x + 1) ** 1.5 * x,
    "product of the same": lambda x: (lambda y: y * y)(x.exp()),
    "arc tangent": lambda x: torch.atan2(x, 1 + x * x),
    "nested": lambda x: (lambda y: y * torch.sigmoid(y) + x)(x * torch.sigmoid(x)),
    "three times": lambda x: x * x.sin() * x.exp() + x.tanh() * x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_by_hand_is_exact_on_a_leaf(name):
    exact(lambda x: curved(ACTIVATIONS[name](x)), leaf(3, 5))
    exact(lambda x: (randn(3, 5, seed=3) * ACTIVATIONS[name](x)).sum(), leaf(3, 5))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_by_hand_is_exact_behind_a_product(name):
    x = randn(4, 3, seed=2)
    exact(lambda w: curved(ACTIVATIONS[name](x @ w)), leaf(3, 2, seed=1))
    exact(lambda w: curved(ACTIVATIONS[name](torch.tanh(w))), leaf(3, 2, seed=1))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gauss_newton_squares_the_whole_slope(name):
    x, bends = leaf(3, 5), randn(3, 5, seed=9)
    (slope,) = torch.autograd.grad(ACTIVATIONS[name](x).sum(), x)
    loss = (bends * (ACTIVATIONS[name](x) - 0.5) ** 2).sum()
    close(hessian_diagonal(loss, [x], gauss_newton=True), [2 * bends * slope**2])


def test_a_chain_of_them_is_exact_and_as_many_regions():
    def loss(x):
        for name in ("swish", "tanhshrink", "gelu", "softsign", "snake"):
            x = ACTIVATIONS[name](x)
        return curved(x)

    x = leaf(4, 3)
    assert joined(loss(x), x) == 5 + 1  # and that of the loss
    exact(loss, x)


def test_a_tensor_between_regions_is_told_too():
    x = leaf(6)
    y = ACTIVATIONS["swish"](x)
    z = ACTIVATIONS["snake"](y)
    loss = curved(z)
    found = hessian_diagonal(loss, [x, y, z])
    copies = [t.detach().clone().requires_grad_() for t in (x, y, z)]
    expected = [
        oracles.hessian_diagonal(curved(ACTIVATIONS["snake"](ACTIVATIONS["swish"](copies[0]))), copies[:1])[0],
        oracles.hessian_diagonal(curved(ACTIVATIONS["snake"](copies[1])), copies[1:2])[0],
        oracles.hessian_diagonal(curved(copies[2]), copies[2:])[0],
    ]
    close(found, expected)


# What is no region.


def test_a_tensor_asked_for_inside_is_passed_one_operation_at_a_time():
    x = leaf(5)
    s = torch.sigmoid(x)
    loss = (x * s).sum()
    assert joined(loss, x) == 1
    assert joined(loss, x, s) == 0
    value = s.detach()
    slope = value * (1 - value)
    close(hessian_diagonal(loss, [x, s]), [x.detach() * slope * (1 - 2 * value), torch.zeros(5).double()])


def test_a_second_user_outside_keeps_operations_apart():
    x = leaf(5)
    s = torch.sigmoid(x)
    loss = curved(x * s) + s.sum()
    value, bends = s.detach(), 2 * randn(5, seed=9)
    assert joined(loss, x) == 1  # that of the loss alone
    slope = value * (1 - value)
    g = randn(5, seed=8) * x.detach() + 1
    of_s = bends * x.detach() ** 2
    close(hessian_diagonal(loss, [x]), [bends * value**2 + of_s * slope**2 + g * slope * (1 - 2 * value)])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.mean(),
        lambda x: x * x[:1],
        lambda x: x * x.mT,
        lambda x: x * x.softmax(-1),
        lambda x: x - x.logsumexp(-1, keepdim=True),
        lambda x: x * x.flip(0),
        lambda x: x * x.cumsum(0),
        lambda x: (x * x.unsqueeze(0)).sum(0) if x.ndim < 2 else x[0] * x,
    ],
)
def test_operations_that_mix_entries_are_not_joined(function):
    x = leaf(3, 3)
    loss = function(x).exp().sum()
    assert joined(loss, x) == 0
    (h,) = hessian_diagonal(loss, [x])
    assert h.isfinite().all()


def test_a_learnable_number_inside_keeps_operations_apart():
    x, a = leaf(4, 5), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def loss(x, a):
        return (x + torch.sin(a * x).pow(2) / a).sum()

    assert joined(loss(x, a), x, a) == 0
    assert joined(loss(x, a.detach()), x) == 1
    exact(lambda x: loss(x, a.detach()), x)
    for h in hessian_diagonal(loss(x, a), [x, a]):
        assert h.isfinite().all()


def test_a_learnable_factor_of_each_entry_is_its_own_input():
    x, a = leaf(4, 5), leaf(4, 5, seed=1)
    exact(lambda x: (x * torch.sigmoid(a.detach() * x)).sum(), x)
    exact(lambda x, a: (torch.exp(x) * torch.exp(a)).sum(), x, a)


def test_a_region_longer_than_the_search_is_passed_in_pieces():
    def loss(x):
        y = x
        for _ in range(20):
            y = (y * 0.9).sin()
        return (x * y).sum()

    x = leaf(4)
    assert joined(loss(x), x) == 0
    (h,) = hessian_diagonal(loss(x), [x])
    assert h.isfinite().all()


# Types and memory.


@pytest.mark.parametrize("name", ["swish", "gelu", "softsign", "snake"])
def test_autocast_gives_a_diagonal_in_single(name):
    x, w = randn(6, 4, dtype=torch.float32), randn(4, 3, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ACTIVATIONS[name](x @ w).float().pow(2).mean()
    (found,) = hessian_diagonal(loss, [w])
    copy = w.detach().double().requires_grad_()
    (expected,) = oracles.hessian_diagonal(ACTIVATIONS[name](x.double() @ copy).pow(2).mean(), [copy])
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["swish", "gelu", "softsign", "snake", "nested"])
def test_checkpointed_operations_are_passed_one_at_a_time(name, monkeypatch):
    x, w = randn(4, 3, seed=2), leaf(3, 2, seed=1)
    loss = curved(checkpoint(lambda w: ACTIVATIONS[name](x @ w), w, use_reentrant=False))
    found = hessian_diagonal(loss, [w])
    monkeypatch.setattr(quadric.backprop.route, "find_region", lambda *_: None)
    close(found, hessian_diagonal(curved(ACTIVATIONS[name](x @ w)), [w]))


@pytest.mark.parametrize("name", ["swish", "gelu", "softsign", "snake", "nested"])
def test_activations_behind_a_checkpoint_are_exact(name):
    x, w = randn(4, 3, seed=2), leaf(3, 2, seed=1)

    def loss(keep):
        return curved(ACTIVATIONS[name](checkpoint(torch.matmul, x, w, use_reentrant=False) if keep else x @ w))

    close(hessian_diagonal(loss(True), [w]), oracles.hessian_diagonal(loss(False), [w]))


def test_a_graph_kept_gives_the_same_again_and_its_gradient_stays():
    x = leaf(4, 3)
    loss = curved(ACTIVATIONS["nested"](x))
    first = hessian_diagonal(loss, [x], retain_graph=True)
    assert torch.equal(hessian_diagonal(loss, [x], retain_graph=True)[0], first[0])
    with Walk(loss, [x]) as walk:
        loss.backward()
    assert torch.equal(walk.finished([x])[0], first[0])
    assert torch.equal(x.grad, torch.autograd.grad(curved(ACTIVATIONS["nested"](x)), x)[0])


# Any function of one tensor.

UNARY = {
    "sin": torch.sin,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "relu": torch.relu,
    "abs": torch.abs,
    "square": lambda x: x.tanh() ** 2,
    "clamp": lambda x: x.clamp(-0.8, 0.9),
    "affine": lambda x: 0.7 * x - 0.2,
    "negative": lambda x: -x,
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "ratio": lambda x, y: x / (1.5 + y.sin()),
    "where": lambda x, y: torch.where(x.detach() > 0.1, x, y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y),
}


@st.composite
def programs(draw):
    """Steps that each take earlier values, the last ones more often."""
    steps = []
    for place in range(draw(st.integers(2, 6))):
        if draw(st.booleans()):
            steps.append((UNARY[draw(st.sampled_from(sorted(UNARY)))], [draw(st.integers(0, place))]))
        else:
            operands = [place, draw(st.integers(0, place))]
            steps.append((BINARY[draw(st.sampled_from(sorted(BINARY)))], operands))
    return steps


@settings(deadline=None, max_examples=60)
@given(programs(), st.booleans())
def test_any_elementwise_function_of_one_tensor_is_exact(steps, behind):
    def run(x):
        values = [x * 1.1 if behind else x]
        for function, operands in steps:
            values.append(function(*(values[i] for i in operands)))
        return curved(values[-1])

    exact(run, leaf(4, seed=5))
