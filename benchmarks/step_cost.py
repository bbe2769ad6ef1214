"""What an optimizer step costs, as ratios to the floor that its bytes set, measured side by side.

Run with ``make bench`` or ``python benchmarks/step_cost.py [--quick]``. Every row of a table takes its turn in one
process, round after round, so that a machine that slows down slows all of them; a ratio is the ratio of mean times,
because the work of some steps (a compression, an eigendecomposition) falls on one step in several. Gradients are new
random numbers in every round, drawn outside the timing.

The floors, in torch's own operations on plain tensors:

* M-FAC: ``torch.mv(G, v)`` and ``torch.mv(G.t(), c)`` on its window G, float32, (window, d);
* Ginger: two reads and one write of its basis, ``torch.mv(U, v)`` and ``torch.mul(U, s, out=…)``, (rank, d);
* block mean AdaGrad: none of its own; it is compared to AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import quadric


@dataclass
class Row:
    """Something timed: what to do before each round, untimed, and what to time."""

    prepare: Callable[[], object]
    run: Callable[[], object]
    memory: str = ""


def stepping(make: Callable, shapes: list[tuple[int, ...]], formula: Callable | None = None, warm: int = 60) -> Row:
    """An optimizer on parameters of these shapes, past its first steps, with its memory beside its formula's."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)

    def fresh_gradients() -> None:
        for p in params:
            p.grad.normal_()

    for _ in range(warm):
        fresh_gradients()
        optimizer.step()
    numbers = sum(p.numel() for p in params)
    memory = ""
    if formula:
        held, said = held_numbers(optimizer), formula(numbers)
        memory = f"{held / numbers:.2f} d, formula {said / numbers:.2f} d"
    return Row(fresh_gradients, optimizer.step, memory)


def held_numbers(optimizer: quadric.CurvatureOptimizer) -> float:
    """Float32 numbers that the optimizer really holds, everything in its blocks counted."""
    storages = {}
    for blocks in optimizer._blocks.values():
        for block in blocks:
            tensors = [*block.curvature.buffers(), *vars(block).values(), *block.buffers.values()]
            kept = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
            storages |= {storage.data_ptr(): storage.nbytes() for storage in kept}
    return sum(storages.values()) / 4


def measure(title: str, rows: dict[str, Row], rounds: int, base: str) -> None:
    """Time the rows in turn and print a table of means, medians and ratios to the base."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            row.prepare()
            start = time.perf_counter()
            row.run()
            times[name].append(1e3 * (time.perf_counter() - start))
    print(f"\n{title}")
    print(f"  {'':34}{'mean ms':>9}{'median ms':>11}{'ratio':>8}  memory")
    for name, row in rows.items():
        mean, ratio = statistics.mean(times[name]), statistics.mean(times[name]) / statistics.mean(times[base])
        print(f"  {name:34}{mean:9.2f}{statistics.median(times[name]):11.2f}{ratio:8.2f}  {row.memory}", flush=True)


def mfac(d: int, window: int, rounds: int) -> None:
    """M-FAC beside its two-pass floor."""
    G, v, c = torch.randn(window, d), torch.randn(d), torch.randn(window)
    adamw = stepping(lambda params: torch.optim.AdamW(params, foreach=True), [(d,)])
    rows = {
        "floor: mv(G, v), mv(G.t(), c)": Row(lambda: None, lambda: (torch.mv(G, v), torch.mv(G.t(), c))),
        "M-FAC": stepping(
            lambda params: quadric.MFAC(params, window=window), [(d,)], lambda n: (window + 2) * n, window + 2
        ),
        "M-FAC, bfloat16 window": stepping(
            lambda params: quadric.MFAC(params, window=window, window_dtype=torch.bfloat16),
            [(d,)],
            lambda n: (window / 2 + 2) * n,
            window + 2,
        ),
        "AdamW (foreach)": adamw,
    }
    measure(f"M-FAC, d = {d:,}, window = {window}", rows, rounds, next(iter(rows)))


def ginger(d: int, rank: int, rounds: int) -> None:
    """Ginger beside two reads and one write of its basis."""
    U, v = torch.randn(rank, d), torch.randn(d)
    out = torch.empty_like(U)
    rows = {
        "floor: mv(U, v), mul(U, s, out=)": Row(lambda: None, lambda: (torch.mv(U, v), torch.mul(U, 1.0001, out=out))),
        "Ginger": stepping(
            lambda params: quadric.Ginger(params, rank=rank),
            [(d,)],
            lambda n: (rank + 1 + max(4, rank // 2) + 1) * n,
        ),
        "AdamW (foreach)": stepping(lambda params: torch.optim.AdamW(params, foreach=True), [(d,)]),
    }
    measure(f"Ginger, d = {d:,}, rank = {rank}", rows, rounds, next(iter(rows)))


def block_mean(title: str, shapes: list[tuple[int, ...]], rounds: int) -> None:
    """Block mean AdaGrad beside AdamW."""
    rows = {
        "AdamW (foreach)": stepping(lambda params: torch.optim.AdamW(params, foreach=True), shapes),
        "Block mean AdaGrad": stepping(quadric.BlockMeanAdaGrad, shapes, lambda n: 3 * n),
        "Block mean AdaGrad, plain": stepping(
            lambda params: quadric.BlockMeanAdaGrad(params, whiten=False), shapes, lambda n: 2 * n
        ),
    }
    measure(f"Block mean AdaGrad, {title}", rows, rounds, "AdamW (foreach)")


def many_small(rounds: int) -> None:
    """All methods on 200 small tensors, where launches cost more than bytes."""
    shapes: list[tuple[int, ...]] = [(50, 100)] * 200
    rows = {
        "AdamW (foreach)": stepping(lambda params: torch.optim.AdamW(params, foreach=True), shapes),
        "AdamW (a loop)": stepping(lambda params: torch.optim.AdamW(params, foreach=False), shapes),
        "M-FAC, window 32": stepping(lambda params: quadric.MFAC(params, window=32), shapes),
        "Ginger, rank 4": stepping(quadric.Ginger, shapes),
        "Block mean AdaGrad": stepping(quadric.BlockMeanAdaGrad, shapes),
    }
    measure("200 tensors of 50 × 100", rows, rounds, "AdamW (foreach)")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size and fewer rounds, to see it run")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    d, few, many = (100_000, 5, 24) if arguments.quick else (1_000_000, 15, 120)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32")
    mfac(d, 128, few)
    ginger(d, 4, many)
    ginger(d, 16, many)
    side = round(d**0.5)
    block_mean(f"one {side} × {side} matrix", [(side, side)], many)
    if not arguments.quick:
        widths = [784, 512, 512, 512, 10]
        layers = [shape for a, b in itertools.pairwise(widths) for shape in ((b, a), (b,))]
        block_mean("MLP " + "-".join(map(str, widths)), layers, many)
    many_small(many // 4)


if __name__ == "__main__":
    main()
