"""Memory: what the gradients of a pruning need, planned against what there is before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Plan", "available_bytes", "plan_memory"]

VECTORS = 200  # bytes a weight for everything that is as long as the weights: values, costs, their order, an update
TOGETHER = 16  # gradients that wait to be added to sums of outer products in one product
WORK = 2**30  # bytes for the small matrices of as many blocks as are worked on at a time
SPARE = 0.95  # of what is available may be used


@dataclass(frozen=True)
class Plan:
    """How the gradients are kept.

    Args:
        dim: Weights.
        gradients: Kept of each round.
        by_block: Whether the sums of their outer products are kept in place of the gradients.
        dtype: In which type.
        device: Where.
        window_bytes: Of the gradients or sums.
        work_bytes: Of everything else.
        available: Bytes there are; None where the system does not say.
    """

    dim: int
    gradients: int
    by_block: bool
    dtype: torch.dtype
    device: torch.device
    window_bytes: int
    work_bytes: int
    available: int | None

    def __str__(self) -> str:
        what = "sums over blocks of" if self.by_block else "window of"
        type_name = str(self.dtype).removeprefix("torch.")
        there = "" if self.available is None else f" of {size(self.available)} available"
        return (
            f"memory: {what} {self.gradients:,} gradients of {self.dim:,} weights in {type_name} on {self.device}: "
            f"{size(self.window_bytes)}, and {size(self.work_bytes)} to work with,{there}"
        )


def plan_memory(
    dim: int,
    gradients: int,
    block_size: int | None,
    dtype: torch.dtype,
    window_dtype: torch.dtype | None,
    device: torch.device,
) -> Plan:
    """The best way to keep the gradients that fits: in float32, in bfloat16, then the same on the CPU.

    Blocks of at most half as many weights as there are gradients need less than the gradients themselves: of these the
    sums of outer products are kept, in double precision.

    Args:
        dim: Weights.
        gradients: To be kept.
        block_size: Weights in a block; None for one block.
        dtype: Of the gradients.
        window_dtype: Type to keep them in; None chooses.
        device: Of the model.

    Raises:
        ValueError: if nothing fits.
    """
    double = torch.float32 if device.type == "mps" else torch.float64
    by_block = block_size is not None and block_size * double.itemsize <= gradients * 4 and window_dtype is None
    types = [double] if by_block else [window_dtype] if window_dtype else [dtype, torch.bfloat16]
    places = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    plans = []
    for place in places:
        there = available_bytes(place)
        for kind in types:
            columns = block_size if by_block and block_size is not None else gradients
            tile = gradients * min(block_size or 8192, dim)  # in double precision
            waiting = TOGETHER * dim if by_block else 0
            work = VECTORS * dim + min(WORK, 64 * dim * gradients) + double.itemsize * (tile + waiting)
            plan = Plan(dim, gradients, by_block, kind, place, dim * columns * kind.itemsize, work, there)
            plans.append(plan)
            if there is None or plan.window_bytes + plan.work_bytes <= SPARE * there:
                return plan
    least = plans[-1]
    assert least.available is not None
    room = int(SPARE * least.available) - least.work_bytes
    fits = max(0, room // (dim * least.dtype.itemsize))
    remedy = (
        f"set num_grads to at most {fits}" if fits and not by_block else "free memory or prune fewer targets at a time"
    )
    raise ValueError(f"{least}: that does not fit; {remedy}, or choose a smaller block_size")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that a program may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [value for value in (_of_machine(), _of_control_group()) if value is not None]
    return min(found, default=None) if device.type == "cpu" else None


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else None


def _of_control_group() -> int | None:
    """What the limit of a container leaves; files that the kernel caches for it would make room."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most = int((root / limit).read_text())
            now = int((root / used).read_text())
            stat = (root / limit).with_name("memory.stat").read_text().split()
            return most - now + int(stat[stat.index(cached) + 1])
        except (OSError, ValueError):  # another version of the interface, or "max": no limit
            continue
    return None


def size(count: int) -> str:
    """Bytes for people.

    Example:
        >>> size(12_800_000_000), size(3_500_000), size(9_000)
        ('12.8 GB', '3.5 MB', '9.0 kB')
    """
    unit, name = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"
