"""A schedule inside somebody else's loop."""

import copy
import io

import pytest
import torch
from torch import nn

from quadric.pruning.gradual import GradualPruner
from quadric.pruning.masks import hold_masks
from quadric.pruning.prune import prune

OPTIONS = {"num_grads": 6, "damping": 1e-2}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(0.2), nn.Linear(10, 4))


def batches():
    x = torch.randn(6, 16, 6, generator=torch.Generator().manual_seed(1))
    return [(part, part[:, :4].tanh() - part[:, 2:]) for part in x]


def loss_fn(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def adam(model):
    return torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)


def pruner_of(model, optimizer, **chosen):
    options = {"sparsity": 0.8, "batches": batches(), "loss_fn": loss_fn, "start": 2, "end": 8, "every": 2, **OPTIONS}
    return GradualPruner(model, optimizer, **options | chosen)


def train(model, optimizer, steps, after=lambda: None):
    data, found = batches(), []
    for step in steps:
        torch.manual_seed(step)  # of dropout
        optimizer.zero_grad()
        loss_fn(model, data[step % len(data)]).backward()
        optimizer.step()
        found.append(after())
    return found


def share_of_zeros(model):
    weights = [p for name, p in model.named_parameters() if name in ("0.weight", "4.weight")]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        # 1 − (1 − k/4)³ of 0.8 on 100 weights
        ({"schedule": "cubic", "end": 9, "start": 1}, {1: 0.0, 3: 0.46, 5: 0.70, 7: 0.79, 9: 0.80}),
        ({"schedule": "cubic", "initial": 0.5, "end": 8, "start": 4}, {4: 0.50, 6: 0.76, 8: 0.80}),
        ({"schedule": "geometric", "sparsity": 0.75, "end": 4}, {2: 0.50, 4: 0.75}),
        ({"schedule": "geometric", "sparsity": 0.75, "initial": 0.4375, "end": 2}, {1: 0.44, 2: 0.75}),
        ({"end": 5, "start": 1, "every": 3}, {1: 0.0, 4: 0.79, 5: 0.80}),  # no whole number of intervals
        ({"end": 3, "start": 3, "every": 1}, {3: 0.80}),
    ],
)
def test_the_schedule_is_the_written_one(options, levels):
    model, found = network(), {}
    optimizer = adam(model)
    pruner = pruner_of(model, optimizer, **{"start": 0, "curvature": "magnitude"} | options)
    for step in range(1, 13):
        train(model, optimizer, [step])
        result, now = pruner.step(), max((level for at, level in levels.items() if at <= step), default=0.0)
        assert share_of_zeros(model) == pruner.sparsity == pytest.approx(now)
        if result is not None:
            found[step] = result.sparsity
    assert found == pytest.approx({step: level for step, level in levels.items() if level})


def test_it_is_prune_and_hold_again_and_again():
    one, other = network(), network()
    ours, theirs = adam(one), adam(other)
    pruner = pruner_of(one, ours)
    results = train(one, ours, range(10), pruner.step)
    masks, held = {}, None
    for step in range(10):
        train(other, theirs, [step])
        if step + 1 in (4, 6, 8):
            if held is not None:
                held.remove()
            level = 0.8 - 0.8 * (1 - (step - 1) / 6) ** 3
            result = prune(other, level, batches=batches(), loss_fn=loss_fn, masks=masks, **OPTIONS)
            assert result.sparsity == results[step].sparsity
            for name, mask in masks.items():
                assert not result.masks[name][~mask].any()
            masks, held = result.masks, hold_masks(result.masks, theirs)
    assert pruner.sparsity == pytest.approx(0.8)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_modes_gradients_and_momentum_are_left_alone():
    model = network()
    optimizer = adam(model)
    pruner = pruner_of(model, optimizer, start=0, end=0)
    model[0].eval()
    train(model, optimizer, [0])
    modes = [module.training for module in model.modules()]
    gradients = [p.grad.clone() for p in model.parameters()]
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    statistics = [buffer.clone() for buffer in model.buffers()]
    assert pruner.step() is not None
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), statistics, strict=True))
    for number, (name, _) in enumerate(model.named_parameters()):
        before, after = moments[number]["exp_avg"], optimizer.state_dict()["state"][number]["exp_avg"]
        assert torch.equal(after, before * pruner.masks[name] if name in pruner.masks else before)


@pytest.mark.parametrize("saved_after", [1, 3, 4, 8, 9])
def test_resume_is_bitwise(saved_after):
    model = network()
    optimizer = adam(model)
    pruner = pruner_of(model, optimizer)
    train(model, optimizer, range(saved_after), pruner.step)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, pruner)], file)
    file.seek(0)
    again = network(seed=3)
    resumed = adam(again)
    fresh = pruner_of(again, resumed)
    for each, state in zip((again, resumed, fresh), torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    expected = train(model, optimizer, range(saved_after, 12), pruner.step)
    found = train(again, resumed, range(saved_after, 12), fresh.step)
    assert [str(result) for result in found] == [str(result) for result in expected]
    assert str(fresh) == str(pruner)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert share_of_zeros(again) == pytest.approx(0.8)


def test_a_pruning_that_fails_is_tried_again():
    model, broken = network(), [True]
    optimizer = adam(model)

    def fails(model, batch):
        if broken[0]:
            raise ArithmeticError
        return loss_fn(model, batch)

    pruner = pruner_of(model, optimizer, loss_fn=fails, start=1, end=1)
    train(model, optimizer, [0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArithmeticError):
        pruner.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    broken[0] = False
    assert pruner.step() is not None
    assert pruner.sparsity == pytest.approx(0.8)


def test_what_was_removed_before_stays_so_and_counts():
    model = network()
    optimizer = adam(model)
    first = prune(model, 0.5, curvature="magnitude")
    pruner = pruner_of(model, optimizer, masks=first.masks, start=0)
    assert pruner.sparsity == 0.5
    results = train(model, optimizer, range(8), pruner.step)
    assert [step for step, result in enumerate(results, 1) if result] == [4, 6, 8]  # after step 2 it would be 46 %
    assert pruner.sparsity == pytest.approx(0.8)
    for name, mask in first.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    pruner.remove()
    train(model, optimizer, [0])
    assert share_of_zeros(model) < 0.5


def test_it_prints_where_it_is():
    model = network()
    optimizer = adam(model)
    pruner = pruner_of(model, optimizer, curvature="magnitude")
    train(model, optimizer, range(5), pruner.step)
    assert str(pruner).splitlines() == [
        "GradualPruner: 56.0 % removed after 5 steps",
        "cubic from 0.0 % after step 2 to 80.0 % after step 8, every 2 steps",
        "next: 77.0 % after step 6; 2 to come",
    ]
    train(model, optimizer, range(5), pruner.step)
    assert str(pruner).endswith("all done, the masks are held")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 1.0}, r"0 < sparsity < 1, got 1\.0"),
        ({"initial": 0.8}, r"0 ≤ initial < 0\.8, got 0\.8"),
        ({"initial": -0.1}, r"got -0\.1"),
        ({"every": 0}, "every ≥ 1, an integer, got 0"),
        ({"every": 1.5}, r"every ≥ 1, an integer, got 1\.5"),
        ({"start": -1}, "start ≥ 0, an integer, got -1"),
        ({"end": 1}, "end ≥ 2, an integer, got 1"),
        ({"schedule": "linear"}, "'cubic' or 'geometric', got 'linear'"),
        ({"num_grad": 3}, "prune has no option 'num_grad': choose among"),
        ({"batches": iter([])}, "batches is a list_iterator that ends once"),
        ({"pattern": "1:10"}, r"1:10 removes at least 0\.9 of the weights, and sparsity is 0\.8"),
        ({"masks": {"9.weight": torch.ones(1).bool()}}, "'9.weight', which is no parameter"),
    ],
)
def test_schedules_that_cannot_be_followed(options, sentence):
    model = network()
    with pytest.raises(ValueError, match=sentence):
        pruner_of(model, adam(model), **options)


def test_cells_lose_their_weights_bit_by_bit_and_are_exact_at_the_end():
    model = network()
    optimizer = adam(model)
    pruner = pruner_of(model, optimizer, sparsity=0.5, pattern="5:10", initial=0.2, schedule="geometric")
    kept = []
    train(model, optimizer, range(10), lambda: pruner.step() and kept.append((model[4].weight != 0).sum(1).tolist()))
    assert kept == [[8] * 4, [7] * 4, [6] * 4, [5] * 4]  # of ten: 0.2, 0.32, 0.41 and 0.5 of them gone, rounded


def test_strangers_are_refused():
    model = network()
    with pytest.raises(ValueError, match=r"does not have '4\.weight'.*ignore='4\.weight'"):
        pruner_of(model, torch.optim.SGD(model[:2].parameters(), 0.1))
    optimizer = adam(model)
    pruner = pruner_of(model, optimizer)
    with pytest.raises(ValueError, match="the state has no 'masks'"):
        pruner.load_state_dict({"steps": 1, "prunings": 1})
    with pytest.raises(ValueError, match=r"shape \(1,\) and the parameter \(10, 6\)"):
        pruner.load_state_dict({"steps": 1, "prunings": 1, "masks": {"0.weight": torch.ones(1).bool()}})
    assert pruner.state_dict() == {"steps": 0, "prunings": 0, "masks": {}}
