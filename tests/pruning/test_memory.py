"""Memory is planned before it is taken, and the plan is kept."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quadric import matrix as matrix_module
from quadric import prune
from quadric import tiles as tiles_module
from quadric.pruning import evidence as evidence_module
from quadric.pruning import memory as memory_module
from quadric.pruning.memory import available_bytes, plan_memory, size

CPU = torch.device("cpu")


class Live(TorchDispatchMode):
    """What tensors made inside hold at one time: the most bytes, and the most storages of at least ``large`` bytes."""

    def __init__(self, least, large=0):
        super().__init__()
        self.least, self.large, self.held, self.most, self.together = least, large, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage.nbytes() < self.least:
                continue
            known = self.held.get(storage._cdata)
            if known is None or known[0].expired():
                self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.held = {key: value for key, value in self.held.items() if not value[0].expired()}
                sizes = [n for _, n in self.held.values()]
                self.most = max(self.most, sum(sizes))
                self.together = max(self.together, sum(n >= self.large for n in sizes))
        return out


def plan(there, monkeypatch, *, dim=10**6, gradients=64, block_size=None, window_dtype=None, dtype=torch.float32):
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: there)
    return plan_memory(dim, gradients, block_size, dtype, window_dtype, CPU)


def test_float32_where_it_fits_and_bfloat16_where_not(monkeypatch):
    roomy = plan(10**12, monkeypatch)
    assert (roomy.dtype, roomy.by_block, roomy.device) == (torch.float32, False, CPU)
    assert roomy.window_bytes == 10**6 * 64 * 4
    needed = (roomy.window_bytes + roomy.work_bytes) / memory_module.SPARE
    assert plan(needed + 1, monkeypatch).dtype == torch.float32
    tight = plan(needed - 1e3, monkeypatch)
    assert tight.dtype == torch.bfloat16
    assert tight.window_bytes == roomy.window_bytes / 2
    assert plan(10**12, monkeypatch, dtype=torch.float64).dtype == torch.float64
    assert plan(10**12, monkeypatch, window_dtype=torch.float16).dtype == torch.float16


def test_a_type_that_was_asked_for_is_not_changed(monkeypatch):
    needed = plan(10**12, monkeypatch)
    with pytest.raises(ValueError, match="does not fit"):
        plan(needed.window_bytes, monkeypatch, window_dtype=torch.float32)


@pytest.mark.parametrize(("block_size", "gradients", "by_block"), [(32, 64, True), (33, 64, False), (None, 64, False)])
def test_small_blocks_are_summed(block_size, gradients, by_block, monkeypatch):
    found = plan(10**12, monkeypatch, block_size=block_size, gradients=gradients)
    assert found.by_block == by_block
    assert found.dtype == (torch.float64 if by_block else torch.float32)
    assert found.window_bytes == 10**6 * (block_size * 8 if by_block else gradients * 4)
    assert not plan(10**12, monkeypatch, block_size=block_size, window_dtype=torch.bfloat16).by_block


def test_what_does_not_fit_says_how_it_would(monkeypatch):
    with pytest.raises(
        ValueError, match=r"1,024 gradients of 1,000,000 weights.*does not fit; set num_grads to at most"
    ) as caught:
        plan(2e9, monkeypatch, gradients=1024)
    fits = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert 0 < fits < 1024
    assert plan(2e9, monkeypatch, gradients=fits).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"does not fit; .+"):
        plan(1e6, monkeypatch)


def test_a_system_that_does_not_say(monkeypatch):
    found = plan(None, monkeypatch)
    assert found.dtype == torch.float32
    assert "available" not in str(found)


def test_the_goal_of_25_million_weights_in_24_gib(monkeypatch):
    found = plan(24 * 2**30, monkeypatch, dim=25_000_000, gradients=256, block_size=2000)
    assert found.window_bytes + found.work_bytes < 24 * 2**30
    assert found.dtype == torch.bfloat16


def test_nothing_is_allocated_before_the_plan_says_that_it_fits(monkeypatch):
    model = nn.Linear(300, 300, bias=False)
    monkeypatch.setattr(memory_module, "available_bytes", lambda device: 10**6)
    before = model.weight.detach().clone()
    with Live(10**6) as live, pytest.raises(ValueError, match="does not fit"):
        prune(model, 0.5, batches=[torch.ones(2, 300)], loss_fn=lambda m, b: m(b).mean(), num_grads=256)
    assert live.most == 0
    assert torch.equal(model.weight, before)


def test_what_is_available_here():
    there = available_bytes(CPU)
    assert there is None or there > 10**6
    assert available_bytes(torch.device("mps")) is None


def test_limits_of_a_container(monkeypatch, tmp_path):
    """Both versions of the interface; what is cached for files can be had."""
    real = memory_module.Path
    monkeypatch.setattr(memory_module, "Path", lambda path: tmp_path if str(path) == "/sys/fs/cgroup" else real(path))
    assert memory_module._of_control_group() is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("700\n")
    (tmp_path / "memory/memory.stat").write_text("total_cache 5\ntotal_inactive_file 100\n")
    assert memory_module._of_control_group() == 400
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50\n")
    assert memory_module._of_control_group() == 550
    assert available_bytes(CPU) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_module._of_control_group() == 400


def test_bytes_for_people():
    assert size(25_600_000_000) == "25.6 GB"
    assert size(0) == "0.0 kB"


# The plan is kept. Memory that does not grow with the weights is made small, so that what grows stands out.

DIM, WORK, SLAB = 140 * 140, 2**21, 2**14


def measured(monkeypatch, large, **options):
    for module in (memory_module, evidence_module):
        monkeypatch.setattr(module, "WORK", WORK)
    for module in (tiles_module, matrix_module, evidence_module):
        monkeypatch.setattr(module, "slab_tiles", lambda rows: max(1, SLAB // (rows.shape[1] * rows.shape[2])))
    monkeypatch.setattr(tiles_module, "WIDTH", 64)
    monkeypatch.setattr(tiles_module, "_kept", tiles_module._Kept())  # what other tests have left there is no window
    torch.manual_seed(0)
    model = nn.Linear(140, 140, bias=False)
    data = [torch.randn(2, 140) for _ in range(3)]
    with Live(DIM // 4, large) as live:
        result = prune(model, 0.5, batches=data, loss_fn=lambda m, b: m(b).square().mean(), damping=1e-3, **options)
    return live, result.memory


@pytest.mark.parametrize(
    ("bytes_a_weight", "options"),
    [
        (256, {"num_grads": 64}),
        (256, {"num_grads": 64, "rounds": 2}),
        (256, {"num_grads": 64, "rounds": 2, "parts": 2, "block_size": 128}),
        (256, {"num_grads": 64, "rounds": 2, "block_size": 32}),
        (128, {"num_grads": 64, "window_dtype": torch.bfloat16, "block_size": 100, "update": "single"}),
        (256, {"num_grads": 64, "pattern": "2:4"}),
    ],
)
def test_no_window_is_there_twice_and_the_plan_is_kept(bytes_a_weight, options, monkeypatch):
    # The second round has 0.7 of the weights left, so its window would be seen beside the first.
    live, planned = measured(monkeypatch, 0.6 * DIM * bytes_a_weight, **options)
    assert DIM * bytes_a_weight <= planned.window_bytes < 1.1 * DIM * bytes_a_weight
    assert live.together == 1
    slack = 8 * 64 * 256 * 4  # a slab of at least one tile, in two types
    assert planned.window_bytes < live.most <= planned.window_bytes + planned.work_bytes + slack


def test_units_of_very_different_size_do_not_all_take_the_room_of_the_longest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 4), nn.ReLU(), nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, 2))
    dim = sum(p.numel() for p in model.parameters())
    with Live(dim) as live:
        data = [torch.randn(2, 2000)]
        prune(model, 0.5, batches=data, loss_fn=lambda m, b: m(b).square().mean(), num_grads=4, pattern="channel")
    assert live.most < 1000 * dim  # bytes; a vector of the longest unit for each unit would be 1,650 a weight
