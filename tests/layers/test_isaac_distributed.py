"""Processes that train one conditioned model: what each of them conditions, and what they condition together."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import quadric

PROCESSES, ROUNDS, LAMBDA = 2, 3, 0.5


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches():
    return torch.randn(ROUNDS, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def backward(model, batch, share=1.0):
    (share * model(batch).square().mean()).backward()


def rounds(model, handle, parts, call=None):
    """The gradients of each round; where statistics are pooled, as the optimizer would see them."""
    found = []
    for part in parts:
        model.zero_grad()
        backward(model if call is None else call, part)
        if handle.settings["pooled"]:
            handle.condition_()
        found.append(gradients(model))
    return found


def replicas(parts, **options):
    model = network()
    handle = quadric.isaac(model, LAMBDA, **options)
    return rounds(model, handle, parts, DistributedDataParallel(model, gradient_as_bucket_view=True))


def wrapped_before(parts):
    model = DistributedDataParallel(network())
    return rounds(model, quadric.isaac(model, LAMBDA), parts)


def accumulated(parts, pooled):
    model = network()
    handle = quadric.isaac(model, LAMBDA, pooled=pooled)
    together = DistributedDataParallel(model)
    first, second = parts[0].split(2)
    with together.no_sync():
        backward(together, first, 0.5)
    backward(together, second, 0.5)
    if pooled:
        handle.condition_()
    return gradients(model)


def trained(parts, pooled):
    model = network()
    optimizer = quadric.ISAAC(model, 0.05, pooled=pooled, decay=0.9)
    together = DistributedDataParallel(model)
    for part in parts:
        optimizer.zero_grad()
        backward(together, part)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def sharded(parts, before):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model = network()
    handles = [quadric.isaac(model, LAMBDA)] if before else []
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    handles = handles or [quadric.isaac(model, LAMBDA)]
    backward(model, parts[0])
    found = [p.grad.full_tensor() for p in model.parameters()]
    handles[0].remove()
    return found


class Gated(nn.Module):
    """A model whose first layer only some processes use."""

    def __init__(self):
        super().__init__()
        self.first, self.second = network()[0], nn.Linear(8, 3).double()
        self.third = nn.Linear(4, 8).double()

    def forward(self, batch, used):
        hidden = self.third(batch)
        return self.second(hidden + self.first(batch) if used else hidden)


def absent(parts):
    torch.manual_seed(0)
    model = Gated()
    handle = quadric.isaac(model, LAMBDA, pooled=True)
    together = DistributedDataParallel(model, find_unused_parameters=True)
    together(parts[0], dist.get_rank() == 1).square().mean().backward()
    plain = gradients(model)
    with pytest.warns(
        RuntimeWarning, match=r"first\.weight was not used by every process, and its gradient stays plain"
    ):
        handle.condition_()
    return [plain, gradients(model)]


def overflown(parts):
    model = network()
    handle = quadric.isaac(model, LAMBDA, pooled=True)
    together = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        rounds(model, handle, parts[:1] * (float("inf") if dist.get_rank() == 1 else 1), together)
    return rounds(model, handle, parts[1:2], together)[0]


SCENARIOS = {
    "apart": replicas,
    "wrapped before": wrapped_before,
    "apart, averages": lambda parts: replicas(parts, decay=0.5),
    "pooled": lambda parts: replicas(parts, pooled=True),
    "pooled averages": lambda parts: replicas(parts, pooled=True, decay=0.5),
    "accumulated apart": lambda parts: accumulated(parts, False),
    "accumulated and pooled": lambda parts: accumulated(parts, True),
    "absent": absent,
    "overflown": overflown,
    "trained apart": lambda parts: trained(parts, False),
    "trained on pooled": lambda parts: trained(parts, True),
    "sharded": lambda parts: sharded(parts, False),
    "conditioned and sharded": lambda parts: sharded(parts, True),
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    parts = batches()[:, rank::PROCESSES]
    torch.save({name: scenario(parts) for name, scenario in SCENARIOS.items()}, f"{folder}/{rank}.pt")
    dist.barrier()  # who leaves early takes the others down
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still running would abort an orderly exit, now and then


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def alone(batch, **options):
    """What one process finds on the same rounds."""
    model = network()
    return rounds(model, quadric.isaac(model, LAMBDA, **options), batch)


def mean(several):
    return [torch.stack(same).mean(0) for same in zip(*several, strict=True)]


def agree(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SCENARIOS)
def test_processes_agree_to_the_last_bit(found, name):
    flat = [torch.utils._pytree.tree_leaves(each[name]) for each in found]
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))


@pytest.mark.parametrize("name", ["apart", "wrapped before", "apart, averages"])
def test_a_gradient_is_the_mean_of_what_each_process_has_conditioned(found, name):
    options = {"decay": 0.5} if "averages" in name else {}
    each = [alone(batches()[:, rank::PROCESSES], **options) for rank in range(PROCESSES)]
    for place in range(ROUNDS):
        agree(found[0][name][place], mean([one[place] for one in each]))


@pytest.mark.parametrize("name", ["pooled", "pooled averages"])
def test_a_pooled_gradient_is_that_of_the_whole_batch(found, name):
    options = {"decay": 0.5} if "averages" in name else {}
    whole, apart = alone(batches(), pooled=True, **options), alone(batches(), **options)
    for place in range(ROUNDS):
        agree(found[0][name][place], whole[place])
        agree(found[0][name][place], apart[place])  # one batch, one process: there is nothing to pool


def test_the_two_differ(found):
    assert not torch.allclose(found[0]["apart"][0][0], found[0]["pooled"][0][0])


def test_accumulated_gradients_are_the_mean_of_all_micro_batches(found):
    micro = [half for rank in range(PROCESSES) for half in batches()[0, rank::PROCESSES].split(2)]
    agree(found[0]["accumulated apart"], mean([alone([batch])[0] for batch in micro]))


def test_accumulated_and_pooled_gradients_are_those_of_the_whole_batch(found):
    agree(found[0]["accumulated and pooled"], alone(batches())[0])


def test_a_layer_that_one_process_did_not_use_keeps_its_gradient(found):
    names = [name for name, _ in Gated().named_parameters()]
    plain, conditioned = (dict(zip(names, gradients, strict=True)) for gradients in found[0]["absent"])
    changed = {name for name in names if not torch.equal(plain[name], conditioned[name])}
    assert changed == {"second.weight", "third.weight"}


def test_an_overflow_in_one_process_spoils_one_step_only(found):
    agree(found[0]["overflown"], alone(batches()[1:2])[0])


def test_processes_on_pooled_statistics_train_as_one(found):
    model = network()
    optimizer = quadric.ISAAC(model, 0.05, pooled=True, decay=0.9)
    for batch in batches():
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    agree(found[0]["trained on pooled"], [p.detach() for p in model.parameters()])


@pytest.mark.parametrize("name", ["sharded", "conditioned and sharded"])
def test_sharded_parameters_are_conditioned_like_replicas(found, name):
    agree(found[0][name], found[0]["apart"][0])
