"""The handle on a conditioned model: its plan, its state, and the way back."""

import copy
import io

import pytest
import torch
from torch import nn

from quadric import isaac, relative


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Embedding(2, 2)).double()


def train(model, seeds):
    """The gradients of some backwards, one after another."""
    found = []
    for seed in seeds:
        model.zero_grad()
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed)).double()
        model[:3](x).square().mean().backward()
        found.append([p.grad.clone() for p in model[:3].parameters()])
    return found


def same(a, b):
    return all(torch.equal(p, q) for left, right in zip(a, b, strict=True) for p, q in zip(left, right, strict=True))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


OPTIONS = {
    "plain": {},
    "decay": {"decay": 0.9},
    "seldom": {"refresh_every": 3, "damping": relative(0.5)},
    "two sides": {"decay": 0.5, "output_damping": relative(1.0), "refresh_every": 2},
    "a schedule": {"damping": lambda passes: 1.0 / passes},
}


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_states_go_through_files_and_on_bitwise(options, before):
    model, again = network(), network()
    handle, resumed = isaac(model, **options), isaac(again, **options)
    train(model, range(before))
    train(again, [50])  # over a state of its own
    resumed.load_state_dict(through_a_file(handle.state_dict()))
    assert same(train(model, range(before, before + 5)), train(again, range(before, before + 5)))
    assert handle.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in handle.state_dict().items())


def test_a_state_is_a_copy():
    model = network()
    handle = isaac(model, decay=0.9)
    train(model, range(2))
    state = handle.state_dict()
    before = copy.deepcopy(state)
    train(model, range(2))
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_state_names_weights_sides_and_what_was_sampled():
    model = network()
    handle = isaac(model, decay=0.9, output_damping=1.0)
    train(model, [0])
    state = handle.state_dict()
    assert not bool(state["sampled"])
    assert {name.split("/")[0] for name in state} == {"0.weight", "2.weight", "sampled"}
    assert all(name.startswith(("0.weight/", "2.weight/")) or name == "sampled" for name in state)
    handle.observe(model[:3](torch.randn(4, 6).double()).sum())
    state = handle.state_dict()
    assert bool(state["sampled"])
    other = network()
    resumed = isaac(other, decay=0.9, output_damping=1.0)
    resumed.load_state_dict(state)
    assert resumed.sampled
    train(other, [1])
    (looks,) = (
        moment.updates for side, moment in resumed.layers["0.weight", None].moments.items() if "outputs" in side
    )
    assert looks == 2  # the gradients at hand were not looked at


def test_copies_condition_copies():
    model = network()
    handle = isaac(model, decay=0.9)
    train(model, range(3))
    other_model, other = copy.deepcopy((model, handle))
    assert other.model is other_model
    assert same(train(model, range(3, 6)), train(other_model, range(3, 6)))
    other.remove()
    assert "forward" not in vars(other_model[0])
    assert "forward" in vars(model[0])


# The plan.


def test_the_plan_before_and_after_a_pass():
    model = network()
    handle = isaac(model, relative(0.5), ignore="2", max_rows=4)
    before = str(handle)
    assert before == repr(handle)
    assert before.splitlines()[0].startswith("1 weights conditioned: damping relative(share=0.5), output_damping None")
    assert "max_rows 4" in before
    assert "rows and costs are known after a backward pass" in before
    assert "left alone: 2.weight: ignore names it" in before
    assert "left alone: 3.weight: its inputs are one-hot" in before
    train(model, [0])
    lines = str(handle).splitlines()
    assert lines[1].split() == ["weight", "inputs", "outputs", "rows", "looked", "at", "way", "extra"]
    name, features, outputs, rows, looked, *way, extra, percent = lines[2].split()
    assert (name, features, outputs, rows, looked) == ("0.weight", "6", "8", "10", "4")
    (layer,) = handle.layers.values()
    assert " ".join(way) == layer.way.name
    assert percent == "%"
    assert float(extra) == pytest.approx(100 * layer.way.flops / (6 * 10 * 6 * 8), rel=0.05)
    assert "known after" not in str(handle)
    assert all(line.startswith("left alone: ") for line in lines[3:])


def test_the_plan_of_a_batch_is_that_of_its_pass_and_touches_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    handle = isaac(model, relative(0.5), decay=0.9, refresh_every=2)
    before, state = copy.deepcopy(model.state_dict()), str(handle)
    batch = torch.randn(4, 3, 8, 8)
    promised = handle.plan(batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert str(handle) == state
    assert set(handle.state_dict()) == {"sampled"}
    model(batch).square().mean().backward()
    assert str(handle) == promised
    assert "known after" not in promised


class Choosy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -x


def test_a_plan_without_gradients_and_of_a_model_that_wants_values():
    with torch.no_grad():
        assert " rows " in isaac(nn.Linear(3, 2)).plan(torch.ones(2, 3)).splitlines()[2]
    with pytest.raises(RuntimeError, match=r"wants more than shapes .*: print the handle after a backward"):
        isaac(Choosy()).plan(torch.ones(2, 3))


def test_the_plan_shows_the_parts_of_an_attention_that_were_met():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True), "head": nn.Linear(8, 2)})
    handle = isaac(model)
    assert "attention.in_proj_weight " in str(handle)
    assert "in_proj_weight[" not in str(handle)
    query, key = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    model["attention"](query, key, key)[0].sum().backward()
    names = [line.split()[0] for line in str(handle).splitlines()[2:]]
    assert names[:3] == ["attention.in_proj_weight[0:]", "attention.in_proj_weight[8:]", "attention.out_proj.weight"]
    assert "head.weight" in names
    assert "attention.in_proj_weight" not in names


def test_the_plan_follows_the_settings():
    handle = isaac(nn.Linear(3, 2))
    handle.settings["damping"] = 7.0
    assert "damping 7.0" in str(handle)


def test_a_model_without_layers_has_an_empty_plan():
    handle = isaac(nn.Sequential(nn.ReLU()))
    assert str(handle).startswith("0 weights conditioned")
    handle.remove()


# The way back.


def test_remove_restores_the_model_and_may_be_called_twice():
    model, plain = network(), network()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = isaac(model)
    assert not same(train(model, [0]), train(plain, [0]))
    for _ in range(2):
        handle.remove()
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert same(train(model, [0]), train(plain, [0]))
    again = isaac(model, 0.5)
    assert not same(train(model, [0]), train(plain, [0]))
    again.remove()


def test_a_refused_model_is_left_as_it_was():
    model = network()
    model[2].forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of 2 is replaced already"):
        isaac(model)
    assert "forward" not in vars(model[0])


def test_optimizers_are_detached():
    model = network()
    handle = isaac(model, pooled=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle.attach(optimizer)
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
