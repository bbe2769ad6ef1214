"""Influence against dense oracles, closed forms and retraining without one example."""

import math
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import quadric
from quadric.influence import influence


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def problem(seed=0, *, train=7, test=3, features=4, classes=3, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Linear(features, classes, dtype=dtype)
    parts = [(torch.randn(n, features, dtype=dtype), torch.randint(classes, (n,))) for n in (train, test)]
    return model, *parts


def gradient_rows(model, loss_fn, batch):
    """One row for each example, from plain backward passes."""
    params = list(model.parameters())
    losses = (loss_fn(model, tuple(x[i : i + 1] for x in batch)) for i in range(len(batch[0])))
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses])


def dense_influence(train_rows, test_rows, fisher_rows, *, damping, block_size=None, shrinkage=0.0):
    """The definition, with the whole matrix."""
    dim = train_rows.shape[1]
    moment = fisher_rows.T @ fisher_rows / len(fisher_rows)
    block = torch.arange(dim) // (block_size or dim)
    moment = moment * (block[:, None] == block)
    matrix = damping * torch.eye(dim, dtype=moment.dtype) + (1 - shrinkage) * moment
    matrix += shrinkage * torch.diag(moment.diagonal())
    return test_rows @ torch.linalg.solve(matrix, train_rows.T) / len(train_rows)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_it_is_the_definition(data):
    draw = data.draw
    train, test = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    features, classes = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    model, training, testing = problem(
        draw(st.integers(0, 99)), train=train, test=test, features=features, classes=classes
    )
    dim = (features + 1) * classes
    options = {
        "damping": draw(st.sampled_from([1e-3, 0.1, 10.0])),
        "block_size": draw(st.none() | st.integers(1, dim + 2)),
        "shrinkage": draw(st.sampled_from([0.0, 0.3, 1.0])),
    }
    repeats = draw(st.sampled_from([None, 1, 8]))  # many gradients are kept as sums, the others as they are
    size = draw(st.integers(1, train))
    batches = list(zip(*(x.split(size) for x in training), strict=True))
    found = influence(model, batches, testing, loss_fn=cross_entropy, num_grads=repeats and repeats * train, **options)
    rows = gradient_rows(model, cross_entropy, training)
    expected = dense_influence(rows, gradient_rows(model, cross_entropy, testing), rows, **options)
    assert found.shape == (test, train)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_of_a_network_in_evaluation_mode_and_it_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    images = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(4, (6,))
    model[1](model[0](images[0]))  # statistics that are not the initial ones
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = influence(model, images, images, loss_fn=cross_entropy, damping=0.01)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    rows = gradient_rows(model.eval(), cross_entropy, images)
    torch.testing.assert_close(found, dense_influence(rows, rows, rows, damping=0.01), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block_size", [None, 3000])
def test_of_more_parameters_than_a_tile(block_size):
    model, training, testing = problem(train=5, features=100, classes=100)
    assert sum(p.numel() for p in model.parameters()) > 8192
    options = {"loss_fn": cross_entropy, "block_size": block_size, "damping": 1e-3}
    found = influence(model, training, testing, **options)
    rows = gradient_rows(model, cross_entropy, training)
    window = quadric.LowRank(rows / math.sqrt(5), 1e-3, block_size=block_size)
    expected = gradient_rows(model, cross_entropy, testing) @ window.solve(rows).T / 5
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    handed_in = influence(model, training, testing, loss_fn=cross_entropy, curvature=window)
    torch.testing.assert_close(handed_in, expected, rtol=1e-9, atol=1e-9)


def test_least_squares_without_one_example_is_the_closed_form():
    """Without the example j a ridge regression moves by G⁻¹g/(n(1 − h)), where h = xᵀG⁻¹x/n is its leverage."""
    torch.manual_seed(0)
    n, damping = 20, 0.1
    x, y = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    x_test, y_test = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def solution(kept):
        left, right = x[kept].T @ x[kept] / n, x[kept].T @ y[kept] / n
        return torch.linalg.solve(left + damping * torch.eye(4, dtype=x.dtype), right)

    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    w = solution(torch.ones(n, dtype=torch.bool))
    model.weight.data.copy_(w)
    found = influence(
        model,
        (x, y),
        (x_test, y_test),
        loss_fn=lambda model, batch: (model(batch[0]).squeeze(-1) - batch[1]).square().mean() / 2,
        fisher_loss_fn=lambda model, batch: model(batch[0]).mean(),  # its gradient is x, and G the exact Hessian
        damping=damping,
    )
    gradients = (x_test @ w - y_test).unsqueeze(1) * x_test
    without = torch.stack([solution(torch.arange(n) != j) for j in range(n)])
    matrix = x.T @ x / n + damping * torch.eye(4, dtype=x.dtype)
    leverage = (x * torch.linalg.solve(matrix, x.T).T).sum(1) / n
    torch.testing.assert_close(found / (1 - leverage), gradients @ (without - w).T, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def retrained():
    """A logistic regression at its minimum, and the rise of the test losses without each example in turn, retrained."""
    points, labels = load_breast_cancer(return_X_y=True)
    x, y = torch.tensor(points), torch.tensor(labels, dtype=torch.float64)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    (x, x_test), (y, y_test) = x[order].split(469), y[order].split(469)
    damping = 0.1

    def newton(weights, w):
        for _ in range(50):
            p = (x @ w).sigmoid()
            gradient = x.T @ (weights * (p - y)) + damping * w
            hessian = (x.T * (weights * p * (1 - p))) @ x + damping * torch.eye(31, dtype=x.dtype)
            step = torch.linalg.solve(hessian, gradient)
            w = w - step
            if step.abs().max() < 1e-12:
                return w, hessian
        raise AssertionError("no minimum found")

    ones = torch.full((469,), 1 / 469, dtype=x.dtype)
    w, hessian = newton(ones, torch.zeros(31, dtype=x.dtype))
    left_out = torch.arange(0, 469, 4)
    moved = torch.stack([newton(ones * (torch.arange(469) != j), w)[0] for j in left_out])
    test_losses = F.binary_cross_entropy_with_logits(
        torch.cat([w[None], moved]) @ x_test.T, y_test.expand(len(moved) + 1, -1), reduction="none"
    )
    model = nn.Linear(31, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(w)
    curvature = hessian - damping * torch.eye(31, dtype=x.dtype)
    return model, (x, y), (x_test, y_test), damping, curvature, left_out, (test_losses[1:] - test_losses[0]).T


EXACT = 0.998  # what is missing is of second order in 1/n


def logistic(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(-1), batch[1])


def sampled(model, batch):
    return quadric.sampled_loss(model(batch[0]).squeeze(-1), "bernoulli")


def root_of_hessian(model, batch):
    z = model(batch[0]).squeeze(-1)
    p = z.detach().sigmoid()
    return (z * (p * (1 - p)).sqrt()).mean()


@pytest.mark.parametrize(
    ("curvature", "fisher_loss_fn", "least"),
    [
        ("exact", None, EXACT),
        ("fisher", root_of_hessian, EXACT),
        ("fisher", None, 0.94),
        ("fisher", sampled, 0.96),
    ],
)
def test_it_predicts_what_retraining_without_an_example_finds(retrained, curvature, fisher_loss_fn, least):
    model, training, testing, damping, hessian, left_out, risen = retrained
    torch.manual_seed(0)
    found = influence(
        model,
        training,
        testing,
        loss_fn=logistic,
        curvature=quadric.Dense(hessian, damping) if curvature == "exact" else curvature,
        fisher_loss_fn=fisher_loss_fn,
        num_grads=None if fisher_loss_fn is None else 4 * 469,
        damping=damping,
    )
    for predicted, true in ((found, risen), (found.sum(0, keepdim=True), risen.sum(0, keepdim=True))):
        pair = torch.stack([predicted[:, left_out].flatten(), true.flatten()])
        assert torch.corrcoef(pair)[0, 1] > least
    if least == EXACT:
        rows = gradient_rows(model, logistic, training)
        matrix = hessian + damping * torch.eye(31, dtype=hessian.dtype)
        expected = gradient_rows(model, logistic, testing) @ torch.linalg.solve(matrix, rows.T) / 469
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["tuple", "dictionary", "list", "loader", "ones"])
def test_examples_come_in_any_form(form):
    model, (x, y), testing = problem()
    expected = influence(model, (x, y), testing, loss_fn=cross_entropy)
    given = {
        "tuple": (x, y),
        "dictionary": {0: x, 1: y},
        "list": [(x[:4], y[:4]), (x[4:], y[4:])],
        "loader": DataLoader(TensorDataset(x, y), batch_size=3),
        "ones": [(x[i : i + 1], y[i : i + 1]) for i in range(7)],
    }[form]
    torch.testing.assert_close(influence(model, given, testing, loss_fn=cross_entropy), expected)


def test_a_tensor_is_one_batch():
    model = nn.Linear(2, 2).double()
    rows = torch.randn(5, 2, dtype=torch.float64)
    found = influence(model, rows, [rows], loss_fn=lambda model, x: model(x).square().mean())
    torch.testing.assert_close(found, found.T)


def test_a_loss_that_cannot_be_mapped_over_examples_takes_them_one_by_one():
    model, training, testing = problem()
    sizes = []

    def branching(model, batch):
        sizes.append(len(batch[0]))
        return cross_entropy(model, batch) if batch[0].sum().item() < math.inf else None

    found = influence(model, training, testing, loss_fn=branching)
    torch.testing.assert_close(found, influence(model, training, testing, loss_fn=cross_entropy))
    assert set(sizes) == {1}


def test_gradients_are_drawn_from_all_examples_before_any_comes_again():
    model, (x, y), testing = problem(train=50)
    drawn = []

    def watching(model, batch):
        drawn.append(batch[0].sum().item())
        return cross_entropy(model, batch)

    counts = {}
    for wanted in (10, 10, 120):
        drawn.clear()
        influence(model, (x, y), testing, loss_fn=cross_entropy, fisher_loss_fn=watching, num_grads=wanted)
        # The first calls are on trial.
        counts[wanted] = [*counts.get(wanted, []), Counter(drawn[-wanted:])]
    few, again = counts[10]
    assert few == again
    assert set(few.values()) == {1}
    assert len(few) == 10
    assert set(counts[120][0].values()) == {2, 3}
    assert len(counts[120][0]) == 50


def test_params_choose_what_would_move():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    training = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    options = {"loss_fn": cross_entropy, "damping": 0.1}
    found = influence(model, training, training, params=model[2].parameters(), **options)
    features = model[1](model[0](training[0])).detach(), training[1]
    torch.testing.assert_close(found, influence(model[2], features, features, **options))
    model[0].requires_grad_(False)
    torch.testing.assert_close(found, influence(model, training, training, **options))
    influence(model, training, training, params=model[0].weight, **options)
    assert not model[0].weight.requires_grad


def test_single_precision():
    model, training, testing = problem(dtype=torch.float32)
    found = influence(model, training, testing, loss_fn=cross_entropy, damping=1e-3)
    assert found.dtype == torch.float32
    double = [(x.double(), y) for x, y in (training, testing)]
    expected = influence(model.double(), *double, loss_fn=cross_entropy, damping=1e-3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_progress_is_told(capsys):
    model, training, testing = problem()
    told = []
    influence(model, training, testing, loss_fn=cross_entropy, progress=lambda *news: told.append(news))
    assert told[0][0].startswith("memory: ")
    assert told[0][1] == 0
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert told[-1] == ("done", 1.0)
    assert capsys.readouterr().err == ""
    influence(model, training, testing, loss_fn=cross_entropy, progress=True)
    assert "100 %  done" in capsys.readouterr().err


X, Y = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"curvature": "hessian"}, r"curvature is 'fisher' or a matrix, got 'hessian': quadric.Dense"),
        ({"curvature": torch.eye(15)}, r"got Tensor: quadric.Dense\(hessian, damping\) makes one"),
        ({"curvature": quadric.Diagonal(torch.ones(4))}, "4 coordinates and the parameters 15: flatten weight, bias"),
        ({"num_grads": 0}, "num_grads ≥ 1, an integer, got 0: None takes all"),
        ({"block_size": 2.0}, r"block_size ≥ 1, an integer, got 2\.0"),
        ({"shrinkage": 2}, "0 ≤ shrinkage ≤ 1, got 2"),
        ({"damping": 0.0}, r"0 < damping < ∞, got 0\.0"),
        ({"params": [nn.Linear(2, 2).weight]}, r"a tensor of shape \(2, 2\), no parameter of Linear: pass some"),
        ({"params": []}, "no parameter that asks for a gradient: pass params"),
        ({"train": iter([(X, Y)])}, "train is list_iterator, which ends after one pass: pass a list or a DataLoader"),
        (
            {"train": DataLoader(TensorDataset(X, Y), shuffle=True)},
            "train shuffles, .* make the DataLoader with shuffle=",
        ),
        ({"test": [(X, Y[:3])]}, r"batch 0 of test has \(4, 4\), \(3,\): pass batches whose tensors have"),
        ({"test": []}, "test is empty: pass at least one example"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, r"loss_fn returned a tensor of shape \(1, 3\)"),
        ({"loss_fn": lambda model, batch: batch[0].sum()}, "the loss does not depend on the parameters"),
        ({"fisher_loss_fn": lambda model, batch: model(batch[0]).sum() * math.nan}, "the loss of batch 0 is nan"),
    ],
)
def test_refusals(given, told):
    model, train, test = problem()
    arguments = {"train": train, "test": test, "loss_fn": cross_entropy, **given}
    with pytest.raises(ValueError, match=told):
        influence(model, **arguments)


def test_parameters_that_are_not_finite_or_have_no_shape_are_refused():
    model, train, test = problem()
    model.bias.data[1] = math.inf
    with pytest.raises(ValueError, match="bias holds inf: load weights that are finite"):
        influence(model, train, test, loss_fn=cross_entropy)
    with pytest.raises(ValueError, match="weight has no shape yet: call the model once"):
        influence(nn.LazyLinear(3), train, test, loss_fn=cross_entropy)
    with pytest.raises(ValueError, match=r"weight is of torch\.complex64: .*"):
        influence(nn.Linear(4, 3, dtype=torch.complex64), train, test, loss_fn=cross_entropy)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_example_whose_gradient_is_not_finite_is_named(part):
    model, train, test = problem()
    {"train": train, "test": test}[part][0][2] = math.nan
    with pytest.raises(ValueError, match=f"gradient of example 2 of {part} is not finite: leave that example out"):
        influence(model, train, test, loss_fn=cross_entropy)


def test_too_many_test_examples_for_the_memory_are_refused_before_any_work(monkeypatch):
    model, train, test = problem(test=900)
    room = sys.modules["quadric.influence"]  # the package has the function under this name
    monkeypatch.setattr(room, "available_bytes", lambda device: 100_000)
    calls = []
    with pytest.raises(ValueError, match=r"900 test gradients of 15 parameters .* pass at most (\d+) test") as error:
        influence(model, train, test, loss_fn=lambda model, batch: calls.append(batch), damping=0.1)
    assert not calls
    most = int(str(error.value).split("at most ")[1].split()[0])
    assert most < 900
    influence(model, train, [(test[0][:most], test[1][:most])], loss_fn=cross_entropy)
    monkeypatch.setattr(room, "available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match="that does not fit; set a lower num_grads"):
        influence(model, train, test, loss_fn=cross_entropy)
