import copy
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import quadric
from quadric.lab import LabError
from quadric.lab.models import build_model
from quadric.lab.optimizers import (
    ENTRANTS,
    MuonAdamW,
    build_optimizer,
    find_entrant,
    held_bytes,
    meant,
    parse_settings,
)


def conv_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def take_step(model, optimizer, seed):
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = conv_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonAdamW(model, 0.01)
    shapes = [tuple(view.shape) for _, view in optimizer.views]
    assert shapes == [(4, 9), (8, 16)]
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(list(twin.parameters()), 0.01, weight_decay=0.0)
    muon = torch.optim.Muon([twin[3].weight], 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    take_step(model, optimizer, 1)
    take_step(twin, adamw, 1)
    with torch.no_grad():  # biases and the output layer moved as AdamW moves them, the hidden matrices otherwise
        same = [torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)]
    assert same == [False, True, False, True, True, True]
    with torch.no_grad():
        twin[3].weight.copy_(before[2])
    muon.step()
    assert torch.equal(twin[3].weight, model[3].weight)


def test_muon_has_work_in_every_model():
    for name, kind, shape in [
        ("logistic", "image", (1, 8, 8)),
        ("gpt", "text", (8,)),
        ("resnet20", "image", (1, 8, 8)),
    ]:
        model = build_model(name, SimpleNamespace(kind=kind, shape=shape, outputs=10))
        optimizer = MuonAdamW(model, 0.01)
        assert len(optimizer.views) > 0
        in_muon = {id(p) for p, _ in optimizer.views}
        in_adamw = {id(p) for group in optimizer.adamw.param_groups for p in group["params"]}
        assert in_muon | in_adamw == {id(p) for p in model.parameters()}
        assert not in_muon & in_adamw
        if name == "gpt":
            assert {id(model.token.weight), id(model.position.weight), id(model.head.weight)} <= in_adamw
        if name == "resnet20":
            assert id(model.fc.weight) in in_adamw


def test_muon_state_round_trip_continues_bitwise(tmp_path):
    model = conv_model()
    optimizer = MuonAdamW(model, 0.01)
    for seed in range(3):
        take_step(model, optimizer, seed)
    twin = copy.deepcopy(model)
    restored = MuonAdamW(twin, 0.5)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [group["lr"] for group in restored.param_groups] == [0.01, 0.01]
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
        take_step(twin, restored, seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_schedule_drives_both_parts_of_muon():
    model = conv_model()
    optimizer = MuonAdamW(model, 0.01)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer, 0)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


ISAACS = set(inspect.signature(quadric.isaac).parameters)


@pytest.mark.parametrize("name", ENTRANTS)
def test_every_entrant_trains(name):
    model = conv_model()
    optimizer = build_optimizer(name, model, 1e-3, {})
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 3).square().mean()
        getattr(optimizer, "backward", torch.Tensor.backward)(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_every_entrant_is_described_by_its_class():
    assert ENTRANTS["ginger-sampled"].samples_labels
    for entrant in ENTRANTS.values():  # no name in the registry that its class does not take
        taken = {*inspect.signature(entrant.optimizer).parameters, *(ISAACS if entrant.conditioned else ())}
        assert set(entrant.hyper) <= taken
        assert entrant.settings()["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mfac.window", "takes OPTIMIZER.KEY=VALUE, such as mfac.window=128"),
        ("window=128", "takes OPTIMIZER.KEY=VALUE"),
        ("sgd.momentum=0.8", "sgd is not in this run; its optimizers are mfac"),
        ("mfac.windw=128", "mfac has no 'windw'; it has lr, momentum, window"),
    ],
)
def test_bad_settings_are_one_sentence(text, message):
    with pytest.raises(LabError, match=message):
        parse_settings([text], ["mfac"])


def test_settings_reach_the_optimizer():
    settings = parse_settings(["mfac.window=3", "mfac.window_dtype=bfloat16"], ["mfac"])
    assert settings == {"mfac": {"window": 3, "window_dtype": "bfloat16"}}
    optimizer = build_optimizer("mfac", conv_model(), 0.1, settings["mfac"])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["window"], group["window_dtype"]) == (0.1, 3, torch.bfloat16)
    with pytest.raises(LabError, match="torch has no dtype 'float33'"):
        build_optimizer("mfac", conv_model(), 0.1, {"window_dtype": "float33"})
    with pytest.raises(LabError, match=r"mfac cannot be built .*window"):
        build_optimizer("mfac", conv_model(), 0.1, {"window": -1})
    with pytest.raises(LabError, match="there is no optimizer 'adam'; choose from sgd, adamw"):
        find_entrant("adam")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("isaac.damping=2", "damping", 2),
        ("isaac.damping=relative(0.3)", "damping", quadric.relative(0.3)),
        ("isaac.output_damping=relative(1e-1)", "output_damping", quadric.relative(0.1)),
        ("isaac.output_damping=None", "output_damping", None),
        ("isaac.targets=1", "targets", ["1"]),
        ("isaac.targets=1,3", "targets", ["1", "3"]),
        ("isaac.targets=['1', '*.weight']", "targets", ["1", "*.weight"]),
        ("isaac.ignore=blocks.*.wide, head", "ignore", ["blocks.*.wide", "head"]),
        ("isaac.targets=None", "targets", None),
    ],
)
def test_the_words_of_a_setting_mean(words, key, value):
    settings = parse_settings([words], ["isaac"])["isaac"]
    assert json.loads(json.dumps(settings)) == json.loads(json.dumps(settings, default=list))
    assert meant(f"isaac.{key}", settings[key]) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("isaac.damping=strong", r"--set isaac.damping is 'strong': give a number such as 1.0, or relative\(1.0\)"),
        ("isaac.damping=relative(x)", r"--set isaac.damping is 'relative\(x\)'"),
        ("isaac.damping=relative(-1)", r"isaac cannot be built .*-1.*; change --set isaac.damping=relative\(-1\)"),
        ("isaac.damping=-1", r"isaac cannot be built .*-1"),
        ("isaac.targets=nobody", r"isaac cannot be built .*nobody"),
        ("isaac.windw=1", r"isaac has no 'windw'; it has lr, damping"),
    ],
)
def test_settings_that_mean_nothing_are_one_sentence(words, message):
    with pytest.raises(LabError, match=message):
        build_optimizer("isaac", conv_model(), 0.1, parse_settings([words], ["isaac"])["isaac"])


def gradients_of(model, seed=0):
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", ["isaac", "isaac-adamw", "isaac-muon"])
def test_targets_choose_the_layers_that_are_conditioned(name):
    plain = gradients_of(conv_model())
    model = conv_model()
    build_optimizer(name, model, 0.1, {"targets": "0,5"})
    same = [torch.equal(a, b) for a, b in zip(gradients_of(model), plain, strict=True)]
    assert same == [False, True, True, True, False, True]


@pytest.mark.parametrize("settings", [{}, {"damping": 0.5}, {"damping": "relative(0.1)", "pooled": True}])
def test_conditioned_adamw_is_adamw_on_conditioned_gradients(settings):
    model, twin = conv_model(), conv_model()
    ours = build_optimizer("isaac-adamw", model, 0.01, settings)
    adamw = torch.optim.AdamW(twin.parameters(), 0.01, weight_decay=0.0)
    given = {"damping": "relative(1.0)", **settings}
    conditioning = quadric.isaac(twin, **{key: meant(f"isaac.{key}", value) for key, value in given.items()})
    for seed in range(3):
        take_step(model, ours, seed)
        gradients_of(twin, seed)
        if settings.get("pooled"):
            conditioning.condition_()
        adamw.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("name", "plain"), [("isaac", "sgd"), ("isaac-adamw", "adamw"), ("isaac-muon", "muon")])
def test_with_a_huge_damping_it_is_the_optimizer_beneath(name, plain):
    model, twin = conv_model(), conv_model()
    ours = build_optimizer(name, model, 0.01, {"damping": 1e12})
    theirs = build_optimizer(plain, twin, 0.01, {})
    for seed in range(3):
        take_step(model, ours, seed)
        take_step(twin, theirs, seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-6)


def test_a_conditioned_entrant_is_described_by_both():
    entrant = ENTRANTS["isaac-adamw"]
    assert {"damping", "targets", "decay", "refresh_every", "max_rows", "output_damping"} <= set(entrant.settings())
    assert {"betas", "eps", "weight_decay"} <= set(entrant.settings())
    described = entrant.described()
    assert (described["damping"], described["betas"]) == ("relative(1.0)", (0.9, 0.999))
    assert "foreach" not in described
    for name in ("isaac", "isaac-adamw", "isaac-muon"):
        json.dumps(ENTRANTS[name].described())


def test_held_bytes_counts_state_once_and_never_parameters():
    model = nn.Linear(100, 10)  # 1,010 parameters
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    adamw = torch.optim.AdamW(model.parameters(), 0.1)
    model(torch.randn(2, 100)).sum().backward()
    assert held_bytes(sgd, model) == 0
    sgd.step()
    adamw.step()
    assert held_bytes(sgd, model) == 4 * 1010
    assert held_bytes(adamw, model) == 2 * 4 * 1010 + 2 * 4  # and a step count for each of two tensors
    muon = MuonAdamW(model, 0.1)
    muon.step()
    assert held_bytes(muon, model) == 4 * 1000 + 2 * 4 * 10 + 4
    mfac = build_optimizer("mfac", model, 0.1, {"window": 50})
    mfac.step()
    assert held_bytes(mfac, model) >= 4 * 1010 * 50
    normed = nn.Sequential(nn.Linear(100, 10), nn.BatchNorm1d(10))
    assert held_bytes(build_optimizer("isaac-adamw", normed, 0.1, {}), normed) == 0
    averaging = build_optimizer("isaac-adamw", model, 0.1, {"decay": 0.9})
    model(torch.randn(20, 100)).square().sum().backward()
    assert held_bytes(averaging, model) >= 4 * 100 * 100
