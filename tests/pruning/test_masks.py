"""Removed weights stay +0.0 whatever steps along them."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import counting
import quadric
from quadric.pruning.masks import Masks, hold_masks

STEPS = 100
TORCH = [
    each
    for each in vars(torch.optim).values()
    if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
]
RATES = {torch.optim.Adadelta: 1.0, torch.optim.LBFGS: 0.5}


def network(bias=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))


def drawn_masks(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < 0.4 for name, p in model.named_parameters() if p.ndim == 2}


def batch(step, rows=16):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 6, generator=generator)
    return x, x[:, :3] - x[:, 3:] + 1


def loss_of(model, step):
    x, y = batch(step)
    return nn.functional.mse_loss(model(x), y)


def torch_optimizer(kind, **chosen):
    """A function of a model, with momentum and weight decay where there are such things."""
    known = inspect.signature(kind).parameters
    options = {
        "lr": RATES.get(kind, 0.01),
        "weight_decay": 0.1,
        "momentum": 0.9,
        "line_search_fn": "strong_wolfe",
        "max_iter": 3,
    }
    options = {name: value for name, value in options.items() if name in known} | chosen
    return lambda model: kind(model.parameters(), **options)


def variants():
    for kind in TORCH:
        if kind is torch.optim.SparseAdam:  # has a test of its own
            continue
        yield kind.__name__, torch_optimizer(kind)
        known = inspect.signature(kind).parameters
        if "foreach" in known:
            yield f"{kind.__name__}-foreach", torch_optimizer(kind, foreach=True)
        if "fused" in known:
            yield f"{kind.__name__}-fused", torch_optimizer(kind, fused=True)
        if "amsgrad" in known:
            yield f"{kind.__name__}-amsgrad", torch_optimizer(kind, amsgrad=True)
        if "nesterov" in known:
            yield f"{kind.__name__}-nesterov", torch_optimizer(kind, nesterov=True)


OPTIMIZERS = dict(variants()) | {
    "mfac": lambda model: quadric.MFAC(model.parameters(), 0.01, window=8, damping=0.1, weight_decay=0.1),
    "ginger": lambda model: quadric.Ginger(model.parameters(), 0.01, rank=4, damping=0.1, weight_decay=0.1),
    "block-mean": lambda model: quadric.BlockMeanAdaGrad(model.parameters(), 0.01, weight_decay=0.1),
    "hesscale": lambda model: quadric.AdaHesScale(model.parameters(), 0.01, weight_decay=0.1),
    "isaac": lambda model: quadric.ISAAC(model, 0.01, weight_decay=0.1),
    "isaac-pooled": lambda model: quadric.ISAAC(model, 0.01, weight_decay=0.1, pooled=True),
}


def train(model, optimizer, steps):
    for step in steps:

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        elif isinstance(optimizer, quadric.AdaHesScale):
            optimizer.zero_grad()
            optimizer.backward(loss_of(model, step))
            optimizer.step()
        else:
            closure()
            optimizer.step()


def assert_held(model, masks):
    for name, mask in masks.items():
        p = model.get_parameter(name).detach()
        removed = p[~mask]
        assert not removed.view(torch.int32).any(), f"{name} holds something else than +0.0"
        assert p.isfinite().all()
        assert p[mask].count_nonzero() == mask.sum()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masks_are_exact_after_every_step_and_resume_is_bitwise(make):
    model, plain = network(), network()
    optimizer, unmasked = make(model), make(plain)
    train(model, optimizer, range(3))  # a past that knows all weights
    train(plain, unmasked, range(6))
    masks = drawn_masks(model)
    hold_masks(masks, optimizer, model)
    assert_held(model, masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3, 6):
        train(model, optimizer, [step])
        assert_held(model, masks)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["model"].keys() == plain.state_dict().keys()
    expected = unmasked.state_dict()["state"]
    assert {k: v.keys() for k, v in saved["optimizer"]["state"].items()} == {k: v.keys() for k, v in expected.items()}

    again = network(seed=7)
    resumed = make(again)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    hold_masks(masks, resumed, again)
    train(model, optimizer, range(6, STEPS))
    train(again, resumed, range(6, STEPS))
    assert_held(again, masks)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", list(dict(variants()).values()), ids=list(dict(variants())))
def test_what_torch_remembers_of_removed_weights_is_zero(make):
    model = network()
    optimizer, masks = make(model), drawn_masks(model)
    train(model, optimizer, range(4))
    hold_masks(masks, optimizer, model)
    seen = 0
    for _ in range(2):
        for name, mask in masks.items():
            state = optimizer.state.get(model.get_parameter(name), {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                    # Rprop keeps a least step and Adamax a least size of gradients.
                    assert value[~mask].abs().max() <= (1e-6 if key in ("exp_inf", "step_size") else 0)
                    seen += 1
        train(model, optimizer, range(4, 8))
    stateless = isinstance(optimizer, torch.optim.LBFGS | torch.optim.Adafactor)
    assert seen or stateless


def test_lbfgs_keeps_a_past_without_the_removed_weights_and_forgets_any_other():
    model = network()
    masks = drawn_masks(model)
    optimizer = torch_optimizer(torch.optim.LBFGS)(model)
    train(model, optimizer, range(3))
    hold_masks(masks, optimizer, model)
    assert not optimizer.state
    train(model, optimizer, range(3))
    hold_masks(masks, optimizer, model)
    assert optimizer.state


def test_removed_places_that_are_not_finite_become_zero():
    model = network()
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1), drawn_masks(model)
    weight, mask = model[0].weight, masks["0.weight"]
    with torch.no_grad():
        weight[~mask] = float("nan")
    hold_masks(masks, optimizer, model)
    assert_held(model, masks)
    with torch.no_grad():
        weight[~mask] = -float("inf")
    weight.grad = torch.where(mask, torch.ones(()), float("nan"))
    optimizer.step()
    assert_held(model, masks)
    assert not weight.grad[~mask].any()


def test_an_embedding_with_sparse_gradients():
    table = nn.Embedding(7, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), 0.1)
    masks = drawn_masks(table)
    hold_masks(masks, optimizer, table)
    for step in range(STEPS):
        optimizer.zero_grad()
        tokens = torch.randint(0, 7, (5,), generator=torch.Generator().manual_seed(step))
        (table(tokens) - 1).square().sum().backward()
        assert table.weight.grad.is_sparse
        assert not table.weight.grad.to_dense()[~masks["weight"]].any()
        optimizer.step()
        assert_held(table, masks)


def test_removed_weights_do_not_count_in_the_norm_that_is_clipped():
    model = network()
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1), drawn_masks(model)
    hold_masks(masks, optimizer, model)
    kept = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    norm = torch.cat([g[masks[name]] for g, name in zip(kept, masks, strict=True)]).norm()
    loss_of(model, 0).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == pytest.approx(float(norm), rel=1e-5)
    loss_of(model, 0).backward()  # accumulates
    assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_differentiable_gradients_stay_differentiable():
    model = network()
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1), drawn_masks(model)
    hold_masks(masks, optimizer, model)
    with pytest.warns(UserWarning, match="create_graph"):
        loss_of(model, 0).backward(create_graph=True)
    weight = model[0].weight
    assert not weight.grad[~masks["0.weight"]].any()
    (curved,) = torch.autograd.grad(weight.grad.square().sum(), weight)
    assert curved.any()


def test_scaled_gradients_schedules_and_wrappers():
    class Wrapper(torch.optim.Optimizer):  # as accelerate's: an optimizer without hooks of its own
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        def step(self, closure=None):
            return self.optimizer.step(closure)

    model = network()
    inner = torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    schedule = torch.optim.lr_scheduler.StepLR(inner, 1, 0.9)
    masks = drawn_masks(model)
    hold_masks(masks, Wrapper(inner), model)
    for step in range(5):
        inner.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(inner)
        scaler.update()
        schedule.step()
        assert_held(model, masks)


def test_several_groups_and_one_added_later():
    model, late = network(), nn.Linear(3, 3, bias=False)
    optimizer = torch.optim.SGD([{"params": [p], "momentum": 0.9} for p in model.parameters()], 0.1)
    masks = drawn_masks(model)
    first = hold_masks(masks, optimizer, model)
    optimizer.add_param_group({"params": late.parameters()})
    second = hold_masks(drawn_masks(late), optimizer, late)
    for step in range(5):
        optimizer.zero_grad()
        late(model(batch(step)[0])).square().sum().backward()
        optimizer.step()
        assert_held(model, masks)
        assert_held(late, drawn_masks(late))
    first.remove()
    second.remove()
    assert not optimizer._optimizer_step_post_hooks
    assert not model[0].weight._post_accumulate_grad_hooks


def test_several_optimizers_share_the_parameters():
    model = network()
    a, b = torch.optim.Muon([model[0].weight], 0.1), torch.optim.AdamW([model[2].weight], 0.1)
    masks = drawn_masks(model)
    hold_masks(masks, [a, b], model)
    for step in range(3):
        loss_of(model, step).backward()
        a.step()
        b.step()
        assert_held(model, masks)


def test_removal_and_two_holds_on_one_parameter():
    model = network()
    optimizer, weight = torch.optim.SGD(model.parameters(), 0.1), model[0].weight
    rows, columns = torch.ones(8, 6, dtype=torch.bool), torch.ones(8, 6, dtype=torch.bool)
    rows[0], columns[:, 0] = False, False
    one = hold_masks({"0.weight": rows}, optimizer, model)
    other = hold_masks({"0.weight": columns}, optimizer, model)
    train(model, optimizer, range(2))
    assert torch.equal(weight != 0, rows & columns)
    one.remove()
    train(model, optimizer, range(2))
    assert torch.equal(weight != 0, columns)
    other.remove()
    train(model, optimizer, range(2))
    assert weight.all()


def test_tied_weights_are_masked_under_any_of_their_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    one, other = drawn_masks(model)["0.weight"], drawn_masks(model, seed=2)["0.weight"]
    hold_masks({"0.weight": one, "1.weight": other}, optimizer, model)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight != 0, one & other)


def test_memory_formats_and_half_precision():
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).to(torch.bfloat16)
    mask = torch.rand(6, 4, 3, 3) < 0.5
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    hold_masks({"weight": mask}, optimizer, model)
    for _ in range(3):
        model(torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()
    assert torch.equal(model.weight != 0, mask)


def test_copies_are_plain():
    model = network()
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1), drawn_masks(model)
    hold_masks(masks, optimizer, model)
    for copied, stepped in [
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ]:
        train(copied, stepped, [0])
        assert copied[0].weight[~masks["0.weight"]].any()
        hold_masks(masks, stepped, copied)
        train(copied, stepped, [0])
        assert_held(copied, masks)
    train(model, optimizer, [0])
    assert_held(model, masks)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_model_that_moves(replaced):
    model = network()
    optimizer, masks = torch.optim.SGD(model.named_parameters(), 0.1, weight_decay=0.1), drawn_masks(model)
    held = [hold_masks(masks, optimizer, model), hold_masks(masks, optimizer)]
    train(model, optimizer, [0])
    held[0].remove()  # either way of finding a parameter is enough
    torch.__future__.set_overwrite_module_params_on_conversion(replaced)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as frameworks do
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)[0].double()).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_a_frozen_parameter_that_thaws():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), drawn_masks(model)
    hold_masks(masks, optimizer, model)
    model[0].weight.requires_grad_(True)
    train(model, optimizer, range(3))
    assert_held(model, masks)
    loss_of(model, 0).backward()
    assert not model[0].weight.grad[~masks["0.weight"]].any()


def test_it_ends_with_its_optimizer_and_keeps_nothing_alive():
    model = network()
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1), Masks.of(model, drawn_masks(model))
    hold_masks(masks, optimizer)
    optimizer.step()
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert model[0].weight.grad[~masks["0.weight"]].any()
    alive = weakref.ref(model[0])
    del model
    gc.collect()
    assert alive() is None
    assert masks.parameter("0.weight") is None


def test_masks_know_their_parameters_and_their_copies_are_plain(tmp_path):
    model = network()
    masks = Masks.of(model, {name: mask.T.contiguous().T for name, mask in drawn_masks(model).items()})
    assert masks.parameter("0.weight") is model[0].weight
    assert all(mask.is_contiguous() for mask in masks.values())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hold_masks(masks, optimizer)
    train(model, optimizer, [0])
    assert_held(model, masks)
    save_file(masks, tmp_path / "masks.safetensors")
    torch.save(masks, tmp_path / "masks.pt")
    for same in [
        copy.copy(masks),
        copy.deepcopy(masks),
        pickle.loads(pickle.dumps(masks)),
        load_file(tmp_path / "masks.safetensors"),
        torch.load(tmp_path / "masks.pt", weights_only=True),
    ]:
        assert not isinstance(same, Masks)
        assert same.keys() == masks.keys()
        assert all(torch.equal(same[name], masks[name]) for name in masks)
        hold_masks(same, optimizer, model)


def test_one_launch_for_all_parameters():
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(5)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = drawn_masks(model)
    model(torch.ones(3)).sum().backward()
    without = counting.count(optimizer.step).launches
    hold_masks(masks, optimizer, model)
    held = counting.count(optimizer.step).launches
    assert sorted(held) == sorted([*without, "aten::_foreach_mul_.List", "aten::_foreach_mul_.List"])


def test_data_parallel_processes(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for view in (False, True):
            inner = network()
            model = DistributedDataParallel(inner, gradient_as_bucket_view=view)
            optimizer, masks = torch.optim.Adam(model.parameters(), 0.1), drawn_masks(inner)
            hold_masks(masks, optimizer, inner)
            for step in range(3):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                assert not inner[0].weight.grad[~masks["0.weight"]].any()
                optimizer.step()
                assert_held(inner, masks)
            with pytest.raises(ValueError, match=r"no parameter of the model.*such as module\.0\.weight"):
                hold_masks(masks, optimizer, model)
    finally:
        dist.destroy_process_group()


def test_what_does_not_fit_is_refused_before_anything_changes():
    model, other = network(), network()
    optimizer, masks = torch.optim.SGD(model.parameters(), 0.1), drawn_masks(model)
    good = masks["0.weight"]
    for given, of, sentence in [
        ({}, model, "masks is empty"),
        ({"0.weight": good, "9.weight": good}, model, r"'9\.weight', which is no parameter.*such as 0\.weight, 2"),
        ({"0.weight": good, "0": good}, model, "'0', which is no parameter"),
        ({"0.weight": good.float()}, model, r"0\.weight is torch\.float32: make it a boolean"),
        ({"0.weight": good.tolist()}, model, r"0\.weight is list"),
        ({"0.weight": good.T}, model, r"shape \(6, 8\) and the parameter \(8, 6\)"),
        (masks, other, r"does not have '0\.weight'"),
        (masks, None, r"'0\.weight' is not to be found.*model="),
    ]:
        with pytest.raises(ValueError, match=sentence):
            hold_masks(given, optimizer, of)
    with pytest.raises(ValueError, match="got GradScaler"):
        hold_masks(masks, torch.amp.GradScaler("cpu"), model)
    with pytest.raises(ValueError, match="got dict"):
        hold_masks(masks, [{}], model)
    named = torch.optim.SGD(model.named_parameters(), 0.1)
    with pytest.raises(ValueError, match=r"the mask of 0\.weight is torch\.int64"):
        hold_masks({"0.weight": good.long()}, named)
    wide = nn.Linear(2, 2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"complex128, which masks do not take"):
        hold_masks({"weight": torch.ones(2, 2).bool()}, torch.optim.SGD(wide.parameters(), 0.1), wide)
    assert all(p.all() for p in model.parameters())
    assert not model[0].weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
