"""Gradients of mini-batches and of single examples."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quadric
from quadric import prune
from quadric.pruning import gradients as gradients_module
from quadric.pruning.gradients import endless, evaluating, example_gradients, mean_gradients


def generator(seed):
    return torch.Generator().manual_seed(seed)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(rows=5, count=3):
    draw = generator(1)
    return [(torch.randn(rows, 6, generator=draw), torch.randint(0, 3, (rows,), generator=draw)) for _ in range(count)]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_means_are_those_of_autograd():
    model, params = network(), None
    params = [model[0].weight, model[4].weight]
    with evaluating(model, params):
        found = list(itertools.islice(mean_gradients(model, loss_fn, iter(batches()), params), 3))
        for batch, gradient in zip(batches(), found, strict=True):
            expected = torch.autograd.grad(loss_fn(model, batch), params)
            assert all(torch.equal(a, b) for a, b in zip(gradient, expected, strict=True))
    assert model.training


@pytest.mark.parametrize("chunk", [1, 2**27])
def test_examples_are_batches_of_one(chunk, monkeypatch):
    monkeypatch.setattr(gradients_module, "CHUNK", chunk)
    model = network()
    params = [model[0].weight, model[4].weight]
    with evaluating(model, params):
        found = list(example_gradients(model, loss_fn, iter(batches()), params))
        singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(5)]
        expected = list(mean_gradients(model, loss_fn, iter(singles), params))
    assert len(found) == len(expected) == 15
    for gradient, single in zip(found, expected, strict=True):
        for a, b in zip(gradient, single, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_per_example_is_the_same_as_batches_of_one():
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in batches() for i in range(5)]
    first, second = network().double(), network().double()

    def smooth(model, batch):
        return F.cross_entropy(model(batch[0].double()), batch[1])

    options = {"loss_fn": smooth, "num_grads": 13, "rounds": 2, "damping": 1e-3}
    prune(first, 0.5, batches=singles, **options)
    prune(second, 0.5, batches=batches(), per_example=True, **options)
    # The second round of the one goes on where the first stopped, of the other with the next batch.
    options["rounds"] = 1
    first, second = network().double(), network().double()
    one = prune(first, 0.5, batches=singles, **options)
    other = prune(second, 0.5, batches=batches(), per_example=True, **options)
    assert all(torch.equal(one.masks[name], other.masks[name]) for name in one.masks)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_examples_of_dictionaries_and_other_things():
    model = network()
    params = [model[0].weight]
    data = [{"x": x, "more": (y, "kept", 3)} for x, y in batches()]

    def with_names(model, batch):
        assert batch["more"][1:] == ("kept", 3)
        return loss_fn(model, (batch["x"], batch["more"][0]))

    with evaluating(model, params):
        found = list(example_gradients(model, with_names, iter(data), params))
        expected = list(example_gradients(model, loss_fn, iter(batches()), params))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, expected, strict=True))


def test_labels_that_are_sampled_for_each_example():
    model = network()
    params = [model[4].weight]
    x = torch.zeros(64, 6)  # one input: only the labels differ
    with evaluating(model, params):
        found = list(
            example_gradients(model, lambda model, batch: quadric.sampled_loss(model(batch)), iter([x]), params)
        )
    kinds = {tuple(gradient[0].flatten().tolist()) for gradient in found}
    assert len(found) == 64
    assert len(kinds) == 3


def test_weights_without_a_part_have_a_gradient_of_zero():
    model, other = network(), nn.Linear(2, 2)
    params = [model[0].weight, other.weight]
    with evaluating(model, params):
        for source in (mean_gradients, example_gradients):
            whole = nn.ModuleList([model, other])
            (first, *_) = source(whole, lambda m, batch: loss_fn(m[0], batch), iter(batches()), params)
            assert bool(first[0].any())
            assert not first[1].any()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda model, batch: batch[0].sum(), r"does not depend on the parameters: .+"),
        (lambda model, batch: 1.0, r"loss_fn returned float: .+"),
        (lambda model, batch: None, r"loss_fn returned NoneType: .+"),
        (lambda model, batch: model(batch[0]), r"loss_fn returned a tensor of shape .*: .+"),
    ],
)
@pytest.mark.parametrize("source", [mean_gradients, example_gradients])
def test_losses_that_are_none(loss, told, source):
    model = network()
    params = [model[0].weight]
    with evaluating(model, params), pytest.raises(ValueError, match=told):
        next(source(model, loss, iter(batches()), params))


def test_a_loss_that_cannot_be_mapped():
    model = network()
    params = [model[0].weight]

    def branching(model, batch):
        loss = loss_fn(model, batch)
        return loss if loss.item() > 0 else -loss

    with evaluating(model, params), pytest.raises(RuntimeError, match=r"cannot map .*: set per_example=False"):
        next(example_gradients(model, branching, iter(batches()), params))


@pytest.mark.parametrize(
    "batch", [(torch.ones(3, 6), torch.ones(2)), (torch.ones(()),), ("text",), (torch.ones(3, 6), torch.ones(()))]
)
def test_batches_without_examples(batch):
    model = network()
    with evaluating(model, []), pytest.raises(ValueError, match=r"one first axis, got .*: set per_example=False"):
        next(example_gradients(model, loss_fn, iter([batch]), [model[0].weight]))


def test_endless():
    assert list(itertools.islice(endless([1, 2]), 5)) == [1, 2, 1, 2, 1]
    once = endless(iter([1, 2]))
    assert [next(once), next(once)] == [1, 2]
    with pytest.raises(ValueError, match=r"ended after 2 .*: pass a list"):
        next(once)
    with pytest.raises(ValueError, match=r"batches is empty: pass a list"):
        next(endless([]))
    assert list(itertools.islice(endless(itertools.count()), 3)) == [0, 1, 2]
