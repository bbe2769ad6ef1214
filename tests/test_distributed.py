"""Several processes that train one model take one step."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import quadric

STEPS, PROCESSES = 3, 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 8, 4, generator=generator)
    return list(zip(x, torch.randint(0, 3, (STEPS, 8), generator=generator), strict=True))


def train(model, rank=0, processes=1):
    optimizer = quadric.AdaHesScale(model.parameters(), 0.05)
    for x, y in batches():
        optimizer.zero_grad()
        part = slice(rank, None, processes)
        optimizer.backward(nn.functional.cross_entropy(model(x[part]), y[part]))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.save(train(DistributedDataParallel(network()), rank, PROCESSES), f"{folder}/{rank}.pt")
    dist.barrier()  # who leaves early takes the others down
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still running would abort an orderly exit, now and then


def test_two_processes_on_halves_of_a_batch_step_as_one_on_the_whole(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=PROCESSES)
    alone = train(network())
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for a, b, c in zip(*found, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)


def test_one_process_averages_nothing(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("a message to nobody"))
    train(network())
