"""Recurrent layers, fused by a kernel or not: single precision on a CPU is fused for the LSTM, double never is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import oracles
from quadric import AdaHesScale, hessian_diagonal


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LAYERS = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "three layers, both directions": {"num_layers": 3, "bidirectional": True},
    "both directions": {"bidirectional": True},
    "batch first": {"batch_first": True, "num_layers": 2},
    "no bias": {"bias": False, "bidirectional": True},
}
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN of ReLUs": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}


def layer(kind, dtype, **options):
    torch.manual_seed(0)
    return KINDS[kind](3, 4, **options).to(dtype)


def curved(*outputs):
    """Every output counts, with a slope and a bend."""
    return sum(
        (randn(*y.shape, seed=5, dtype=y.dtype) * y + (y - randn(*y.shape, seed=6, dtype=y.dtype)) ** 2).mean()
        for y in outputs
    )


def names_of(loss):
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        fresh = {below for below, _ in waiting.pop().next_functions if below is not None} - seen
        seen |= fresh
        waiting += fresh
    return {node.name() for node in seen}


def in_both_types(make_loss, fused, **options):
    """h in single precision against double, which no kernel fuses; loss and tensors come from ``make_loss(dtype)``."""
    loss, targets = make_loss(torch.float32)
    assert ("MkldnnRnnLayerBackward0" in names_of(loss)) == fused
    found = hessian_diagonal(loss, targets, **options)
    loss, targets = make_loss(torch.float64)
    expected = hessian_diagonal(loss, targets, **options)
    assert any(h.abs().sum() > 0 for h in expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_as_the_unfused_path(kind, options, gauss_newton):
    def make(dtype):
        model = layer(kind, dtype, **LAYERS[options])
        x = randn(5, 6, 3, dtype=dtype).requires_grad_()
        outputs, last = model(x)
        return curved(outputs, *(last if kind == "LSTM" else [last])), [x, *model.parameters()]

    in_both_types(make, kind == "LSTM", gauss_newton=gauss_newton)


@pytest.mark.parametrize("kind", KINDS)
def test_given_states_have_a_diagonal_too(kind):
    def make(dtype):
        model = layer(kind, dtype, num_layers=2, bidirectional=True)
        states = [randn(4, 6, 4, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2)]
        given = tuple(states) if kind == "LSTM" else states[0]
        outputs, _ = model(randn(5, 6, 3, dtype=dtype), given)
        return curved(outputs), [*(states if kind == "LSTM" else states[:1]), *model.parameters()]

    in_both_types(make, kind == "LSTM")


@pytest.mark.parametrize("last_alone", [False, True])
def test_states_alone_or_outputs_alone_may_reach_the_loss(last_alone):
    def make(dtype):
        model = layer("LSTM", dtype, num_layers=2)
        outputs, (_, cell) = model(randn(5, 6, 3, dtype=dtype))
        return curved(cell[-1] if last_alone else outputs[-1]), list(model.parameters())

    in_both_types(make, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["two layers", "both directions"])
def test_packed_sequences(kind, options):
    def make(dtype):
        model = layer(kind, dtype, **LAYERS[options])
        x = randn(5, 6, 3, dtype=dtype).requires_grad_()
        packed = pack_padded_sequence(x, torch.tensor([5, 1, 3, 2, 4, 5]), enforce_sorted=False)
        outputs, _ = pad_packed_sequence(model(packed)[0])
        return curved(outputs), [x, *model.parameters()]

    in_both_types(make, False)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # which tells that no kernel fuses them
def test_projections():
    def make(dtype):
        model = layer("LSTM", dtype, num_layers=2, proj_size=2)
        return curved(model(randn(5, 6, 3, dtype=dtype))[0]), list(model.parameters())

    in_both_types(make, False)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_exact_for_one_step_and_right_in_single(kind):
    def make(dtype):
        torch.manual_seed(0)
        cell, x, state = kind(3, 4).to(dtype), randn(6, 3, dtype=dtype), None
        for _ in range(3):
            state = cell(x, state)
        return curved(*(state if isinstance(state, tuple) else [state])), list(cell.parameters())

    in_both_types(make, False)


def test_a_frozen_layer_below_and_a_dropout_between():
    def make(dtype):
        model = layer("LSTM", dtype, num_layers=2, dropout=0.5).eval()
        for name, p in model.named_parameters():
            p.requires_grad_("l1" in name)
        return curved(model(randn(5, 6, 3, dtype=dtype))[0]), [p for p in model.parameters() if p.requires_grad]

    in_both_types(make, True)


def test_a_batch_of_one_without_its_axis_and_a_sequence_of_one():
    for shape in ((5, 3), (1, 6, 3)):

        def make(dtype, shape=shape):
            model = layer("LSTM", dtype)
            return curved(model(randn(*shape, dtype=dtype))[0]), list(model.parameters())

        in_both_types(make, True)


def test_the_head_behind_a_fused_layer_is_exact():
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.LSTM(3, 5, 2, batch_first=True), "head": nn.Linear(5, 3)})
    x, labels = randn(6, 4, 3, dtype=torch.float32), torch.arange(6) % 3

    def loss():
        return F.cross_entropy(model["head"](model["body"](x.to(model["head"].weight.dtype))[0][:, -1]), labels)

    found = hessian_diagonal(loss(), model["head"].parameters())
    model.double()
    for one, other in zip(found, oracles.hessian_diagonal(loss(), list(model["head"].parameters())), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def test_a_fused_layer_in_the_optimizer_and_its_gradient_stays_bitwise():
    torch.manual_seed(0)
    model, x = nn.LSTM(3, 5, 2), randn(4, 6, 3, dtype=torch.float32)
    params = list(model.parameters())
    plain = torch.autograd.grad(curved(model(x)[0]), params)
    optimizer = AdaHesScale(params)
    optimizer.backward(curved(model(x)[0]))
    for p, gradient in zip(params, plain, strict=True):
        assert torch.equal(p.grad, gradient)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
