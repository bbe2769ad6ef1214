"""What a walk costs, counted: hooks, products, squares, and what stays in memory."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quadric import AdaHesScale, hessian_diagonal
from quadric.backprop.registry import RULES
from quadric.backprop.walk import Walk


class Seen(TorchDispatchMode):
    """The operations that ran, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args, result))
        return result


def seen(function):
    with Seen() as watched:
        function()
    return watched.calls


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2), nn.SiLU(), nn.Flatten(), nn.Linear(45, 3)
    )  # fmt: skip


def gated():
    """A swish by hand, which is a region."""

    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), Swish(), nn.BatchNorm1d(6), nn.Linear(6, 3))


MODELS = {"perceptron": (perceptron, (5,)), "convolutions": (convolutions, (2, 6, 6)), "gated": (gated, (5,))}


def build(name):
    make, shape = MODELS[name]
    model, x = make(), torch.randn(8, *shape)
    return model, lambda: F.cross_entropy(model(x), torch.arange(8) % 3)


@pytest.mark.parametrize(("name", "curved"), [("perceptron", 2), ("convolutions", 2), ("gated", 3)])
def test_hooks_are_on_the_loss_and_where_a_rule_needs_g(name, curved):
    model, loss = build(name)
    total = loss()
    with Walk(total, list(model.parameters())) as walk:
        assert len(walk.handles) == curved + 1  # the log-softmax among the curved, and the node of the loss
    assert not walk.handles


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_called_in_a_later_backward(name, monkeypatch):
    model, loss = build(name)
    total, calls = loss(), []
    visit = Walk.visit
    monkeypatch.setattr(Walk, "visit", lambda *given: calls.append(1) or visit(*given))
    with Walk(total, list(model.parameters())):
        total.backward(retain_graph=True)
        assert calls
    calls.clear()
    total.backward(retain_graph=True)
    hessian_diagonal(total, model.parameters(), retain_graph=True)
    calls.clear()
    total.backward()
    assert not calls


def test_no_gradient_of_a_weight_is_formed():
    model, loss = build("perceptron")
    total, weights = loss(), [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    calls = seen(lambda: hessian_diagonal(total, model.parameters()))
    made = [tuple(result.shape) for name, _, result in calls if name == "mm"]
    for shape in weights:
        assert made.count(shape) + made.count(shape[::-1]) == 1  # its h
    assert len(made) == 3 + 2 + 2  # h of weights, h of layers, and g as far as tanh


def test_no_gradient_of_a_filter_is_formed():
    model, loss = build("convolutions")
    total = loss()
    calls = seen(lambda: hessian_diagonal(total, model.parameters()))
    masks = [args[-1] for name, args, _ in calls if name == "convolution_backward"]
    assert sum(mask[1] for mask in masks) == 2
    assert sum(mask[0] for mask in masks) == 1  # the images need nothing, and g is needed no further than SiLU


def test_autograd_beside_the_walk_forms_each_gradient_once():
    model, loss = build("perceptron")
    optimizer, total = AdaHesScale(model.parameters()), loss()
    calls = seen(lambda: optimizer.backward(total))
    plain = seen(loss().backward)

    def products(calls):
        return sum(name in ("mm", "addmm") for name, _, _ in calls)

    assert products(calls) == 2 * products(plain)


def test_the_square_of_a_weight_is_formed_once_however_often_it_is_used():
    torch.manual_seed(0)
    model, x = nn.RNN(3, 4).double(), torch.randn(9, 2, 3, dtype=torch.float64)
    total = model(x)[0].pow(2).sum()
    calls = seen(lambda: hessian_diagonal(total, model.parameters()))
    weights = {p.data_ptr() for p in model.parameters() if p.ndim == 2}
    squares = [args[0].data_ptr() for name, args, _ in calls if name == "mul" and args[0].data_ptr() in weights]
    assert len(squares) == len(set(squares)) == 1  # nothing is carried through the weight of the input, which is data


class Failing(torch.autograd.Function):
    """A function whose rule fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def hessian_diagonal(ctx, g, h):
        raise ArithmeticError("told to fail")


def look(model, loss):
    return hessian_diagonal(loss, model.parameters())


def look_with_options(model, loss):
    return hessian_diagonal(
        loss, model.parameters(), fraction=0.25, exact_softmax=True, dtype=torch.bfloat16, gauss_newton=True
    )


def look_and_fail(model, loss):
    with pytest.raises(ArithmeticError):
        hessian_diagonal(Failing.apply(loss * 1) * 1, model.parameters())
    return [torch.zeros(1)]


def give_up(model, loss):
    walk = Walk(loss, list(model.parameters()))
    del walk
    return [torch.zeros(1)]


def step(model, loss):
    optimizer = AdaHesScale(model.parameters())
    optimizer.backward(loss)
    optimizer.step()
    return [torch.zeros(1)]


def through_a_checkpoint(model, loss):
    again = checkpoint(lambda y: y * torch.sigmoid(y), loss, use_reentrant=False)
    return hessian_diagonal(again, model.parameters())


USES = [look, look_with_options, look_and_fail, give_up, step, through_a_checkpoint]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_and_what_it_gave_die_at_once(name, use):
    model, loss = build(name)
    use(model, loss())  # whatever is made once
    activations = []
    handles = [m.register_forward_hook(lambda m, i, o: activations.append(weakref.ref(o))) for m in model]
    gc.collect()
    gc.disable()
    try:
        total = loss()
        found = use(model, total)
        dying = [*activations, weakref.ref(total), *map(weakref.ref, found)]
        del total, found
        assert [ref() for ref in dying] == [None] * len(dying)
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()


def test_the_registry_stays_as_it_is():
    before = dict(RULES)
    model, loss = build("gated")
    look(model, loss())
    assert before == RULES
