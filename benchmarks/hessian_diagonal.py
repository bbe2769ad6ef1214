"""What a Hessian diagonal costs, as ratios to a plain forward and backward pass, and how wrong it is.

Run with ``make bench-diagonal`` or ``python benchmarks/hessian_diagonal.py [--quick] [--only NAME …] [--ours]``.

**Time.** A row is one way to the diagonal, on its own copy of the network. Rows take turns in one process, round after
round, and each turn comes right after the same number of plain passes (or AdamW steps, where the row says so): a ratio
compares two neighbours, and a machine that slows down slows both. The table has the median of the ratios over the
rounds, and their quartiles. Timed are forward, backward with the gradients of all parameters, and the diagonal; letting
go of the results is not. A row that looks at the Hessian every tenth time is timed over whole cycles of ten. The floor
is 5/3: one more product beside the three that forward and backward make of each one. Only ``hessian_diagonal`` alone
can be below, since it forms no gradients of parameters.

**Memory.** The peak of what torch's CPU allocator holds, from an empty start: the network, the state of an optimizer
and everything that comes and goes inside operations, until the second pass (or the second look) is over, in a thread of
its own. It is summed from the allocations and frees that torch's profiler records, so it is exact and the same in every
run; the resident size of the process would add libraries and what malloc has not given back. The batch is not counted,
and neither is the scratch memory that oneDNN takes from the system by itself. The ratio is to the same peak of the
plain pass.

**Error.** Σ|estimate − exact| / Σ|exact| over random entries of each parameter tensor, each counted for as many as it
was drawn from, where the exact second derivatives in float64 are affordable; the median of three draws for what is
random. The data are ten noisy clusters with a tenth of the labels wrong; at initialisation and after 100 steps of
AdamW.

**The walk.** Microseconds a node of a chain of about 500 nodes on tensors of one number: what a walk beside
``torch.autograd.grad`` adds to it, the part of that spent inside rules, and the rest, which is the walk's own.

BackPACK takes part where it is installed (``make peers``), on networks that it can take: chains of modules. The
published HesScale does with ``--published FOLDER``, the folder that holds its package ``hesscale``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import importlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import quadric
from quadric.backprop.walk import Walk
from quadric.lab.models import GPT, ResNet20, three_c_three_d

PATIENCE = 5.0  # seconds after which a slow row sits out the rest of the rounds
FEWEST = 3  # rounds that also a slow row plays


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Args:
        rounds: turns of each row.
        turn: seconds that the base of a fast row should run in a turn.
        steps: of training before the second look at the error.
    """

    rounds: int
    turn: float
    steps: int


@dataclass(frozen=True)
class Case:
    """A network with a batch; the loss is the mean cross-entropy.

    Args:
        title: for people.
        model: it is copied, never run itself.
        inputs: the batch.
        targets: a class for each row of logits.
        chain: made of the modules that BackPACK takes.
        without: rows left out for their size.
        entries: how many of each parameter tensor the error is measured on, 0 for no error.
    """

    title: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    chain: bool = False
    without: tuple[str, ...] = ()
    entries: int = 0


class Subject:
    """A row's own copy of a network."""

    def __init__(self, case: Case):
        self.model = copy.deepcopy(case.model)
        self.params = list(self.model.parameters())
        self.criterion = nn.CrossEntropyLoss()
        self.inputs, self.targets = case.inputs, case.targets

    def loss(self) -> Tensor:
        """Of the batch."""
        return self.criterion(self.model(self.inputs).flatten(0, -2), self.targets.flatten())

    def forget(self) -> None:
        """Drop gradients, and whatever diagonals were left on the parameters."""
        for p in self.params:
            p.grad = None
            vars(p).clear()


@dataclass(frozen=True)
class Turn:
    """What a row does.

    Args:
        run: what is timed.
        after: what follows it untimed.
        estimate: the diagonals, for their error.
    """

    run: Callable[[], Any]
    after: Callable[[], object] = lambda: None
    estimate: Callable[[], Sequence[Tensor]] | None = None


@dataclass(frozen=True)
class Row:
    """One way to the diagonal.

    Args:
        start: makes of a subject what it does in its turns.
        base: what it is compared with.
        period: it looks at the Hessian every so many turns.
        weighed: whether its memory compares with that of its base.
        draws: of a random estimate.
    """

    start: Callable[[Subject], Turn]
    base: str = "plain"
    period: int = 1
    weighed: bool = True
    draws: int = 1


def beside_backward(draws: int = 1, **options: Any) -> Row:
    """Gradients and diagonals by ``AdaHesScale.backward``, without its step."""

    def start(subject: Subject) -> Turn:
        optimizer = quadric.AdaHesScale(subject.params, **options)
        return Turn(
            lambda: optimizer.backward(subject.loss()),
            optimizer.zero_grad,
            lambda: quadric.hessian_diagonal(subject.loss(), subject.params, **options),
        )

    return Row(start, draws=draws)


def alone(subject: Subject) -> Turn:
    """The diagonal without the gradients of parameters."""
    return Turn(lambda: quadric.hessian_diagonal(subject.loss(), subject.params))


def plain(subject: Subject) -> Turn:
    """Forward and backward."""
    return Turn(lambda: subject.loss().backward())


def adamw(subject: Subject) -> Turn:
    """A training step with AdamW."""
    optimizer = torch.optim.AdamW(subject.params, lr=1e-6, foreach=True)

    def step() -> None:
        subject.loss().backward()
        optimizer.step()

    return Turn(step)


def now_and_then(refresh_every: int) -> Row:
    """``AdaHesScale.backward`` that looks at the Hessian every so many steps; the steps are not timed."""

    def start(subject: Subject) -> Turn:
        optimizer = quadric.AdaHesScale(subject.params, lr=1e-6, refresh_every=refresh_every)
        return Turn(lambda: optimizer.backward(subject.loss()), optimizer.step)

    return Row(start, period=refresh_every, weighed=False)


def training_step(refresh_every: int) -> Row:
    """A training step with AdaHesScale."""

    def start(subject: Subject) -> Turn:
        optimizer = quadric.AdaHesScale(subject.params, lr=1e-6, refresh_every=refresh_every)

        def step() -> None:
            optimizer.backward(subject.loss())
            optimizer.step()

        return Turn(step)

    return Row(start, base="AdamW", period=refresh_every)


def hutchinson(subject: Subject) -> Turn:
    """One estimate v ∘ Hv with a vector v of random signs, by differentiating twice."""

    def probe() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
            gradients = torch.autograd.grad(subject.loss(), subject.params, create_graph=True)
            signs = [torch.empty_like(p).bernoulli_(0.5).mul_(2).sub_(1) for p in subject.params]
            products = torch.autograd.grad(gradients, subject.params, signs)
        return [v * hv for v, hv in zip(signs, products, strict=True)]

    return Turn(probe, estimate=probe)


def extension(make: Callable[[], Any], draws: int = 1) -> Row:
    """A quantity that BackPACK's machinery carries, its own or the published HesScale."""
    package = importlib.import_module("backpack")

    def start(subject: Subject) -> Turn:
        package.extend(subject.model)
        package.extend(subject.criterion)

        def run() -> list[Tensor]:
            wanted = make()
            with package.backpack(wanted):
                subject.loss().backward()
            return [getattr(p, wanted.savefield) for p in subject.params]

        return Turn(run, estimate=run)

    return Row(start, draws=draws)


BASES = {"plain": plain, "AdamW": adamw}
OURS = {
    "HesScale": beside_backward(),
    "HesScale, Gauss–Newton": beside_backward(gauss_newton=True),
    "HesScale, bfloat16": beside_backward(dtype=torch.bfloat16),
    "HesScale, a quarter of the batch": beside_backward(draws=3, fraction=0.25),
    "HesScale, exact softmax": beside_backward(exact_softmax=True),
    "hessian_diagonal alone": Row(alone),
    "AdaHesScale.backward, every 10": now_and_then(10),
    "AdaHesScale step / AdamW step": training_step(1),
    "AdaHesScale step, every 10 / AdamW": training_step(10),
}
ANYWHERE = {"Hutchinson, 1 probe": Row(hutchinson, draws=3)}


def chain_rows(published: Path | None) -> dict[str, Row]:
    """The rows of other libraries, as far as they are here."""
    try:
        extensions = importlib.import_module("backpack.extensions")
    except ImportError:
        print("BackPACK is not installed and its rows are left out: make peers")
        return {}
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the batch needs no gradient
    rows = {
        "BackPACK DiagGGN-MC(1)": extension(extensions.DiagGGNMC, draws=3),
        "BackPACK DiagGGN exact": extension(extensions.DiagGGNExact),
        "BackPACK DiagHessian": extension(extensions.DiagHessian),
    }
    if published is not None:
        sys.path.insert(0, str(published))
        package = importlib.import_module("hesscale")
        rows["HesScale, published"] = extension(package.HesScale)
        if hasattr(package, "HesScaleGN"):
            rows["HesScale, published, GN"] = extension(package.HesScaleGN)
    return rows


# The networks.


def mlp(width: int, batch: int, **more: Any) -> Case:
    """Two hidden tanh layers on 784 inputs."""
    model = nn.Sequential(
        nn.Linear(784, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 10),
    )
    title = f"MLP 784-{width}-{width}-10 tanh, batch {batch}"
    return Case(title, model, *clusters(batch, (784,)), chain=True, **more)


def cifar(title: str, build: Callable[..., nn.Module], batch: int, **more: Any) -> Case:
    """A network on images of 3 × 32 × 32."""
    return Case(f"{title}, batch {batch}", build((3, 32, 32), 10), *clusters(batch, (3, 32, 32)), **more)


class Encoder(nn.Module):
    """A transformer encoder that classifies the mean of its tokens; no dropout."""

    def __init__(self, depth: int, width: int):
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, 10)."""
        return self.head(self.encoder(x).mean(dim=1))


def encoder(depth: int, batch: int, tokens: int) -> Case:
    """Width 128, 4 heads."""
    title = f"transformer encoder {depth} × 128, 4 heads, batch {batch} × {tokens} tokens"
    return Case(title, Encoder(depth, 128), *clusters(batch, (tokens, 128)))


def gpt(depth: int, batch: int, tokens: int) -> Case:
    """The lab's GPT on an alphabet of 65 letters."""
    text = torch.randint(0, 65, (batch, tokens + 1))
    title = f"GPT {depth} × 128, 4 heads, batch {batch} × {tokens} tokens"
    return Case(title, GPT((tokens,), 65, depth=depth), text[:, :-1].contiguous(), text[:, 1:].contiguous())


def clusters(batch: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ten clusters of noise, always the same ones, and the classes; a tenth of those are wrong."""
    centres = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0))
    classes = torch.randint(0, 10, (batch,))
    spoilt = torch.where(torch.rand(batch) < 0.1, torch.randint(0, 10, (batch,)), classes)
    return torch.randn(batch, *shape) + 6 / math.sqrt(math.prod(shape)) * centres[classes], spoilt


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: mlp(512, 128, entries=64),
    "mlp-1": lambda: mlp(512, 1, entries=64),
    "mlp-wide": lambda: mlp(2048, 128, without=("BackPACK DiagHessian",)),  # it would take tens of gigabytes
    "3c3d": lambda: cifar("3c3d ReLU", three_c_three_d, 64, chain=True),
    "3c3d-128": lambda: cifar("3c3d ReLU", three_c_three_d, 128, chain=True),
    "3c3d-16": lambda: cifar("3c3d ReLU", three_c_three_d, 16, chain=True, entries=32),
    "resnet20": lambda: cifar("ResNet-20", ResNet20, 64),
    "transformer": lambda: encoder(4, 16, 64),
    "gpt": lambda: gpt(4, 16, 64),
}
QUICK: dict[str, Callable[[], Case]] = {
    "mlp": lambda: mlp(64, 16, entries=4),
    "mlp-1": lambda: mlp(64, 1, entries=4),
    "mlp-wide": lambda: mlp(128, 16),
    "3c3d": lambda: cifar("3c3d ReLU", three_c_three_d, 2, chain=True),
    "3c3d-128": lambda: cifar("3c3d ReLU", three_c_three_d, 4, chain=True),
    "3c3d-16": lambda: cifar("3c3d ReLU", three_c_three_d, 2, chain=True, entries=2),
    "resnet20": lambda: cifar("ResNet-20", ResNet20, 2),
    "transformer": lambda: encoder(1, 2, 8),
    "gpt": lambda: gpt(1, 2, 8),
}


# Time and memory.


def timed(subject: Subject, turn: Turn, times: int) -> float:
    """Seconds of so many runs."""
    seconds = 0.0
    for _ in range(times):
        subject.forget()
        start = time.perf_counter()
        found = turn.run()
        seconds += time.perf_counter() - start
        del found
        turn.after()
    return seconds


def peak(case: Case, start: Callable[[Subject], Turn], times: int) -> int:
    """Bytes that torch's CPU allocator holds at most, from making the copy to the end of the last run."""
    found: list[int] = []

    def watched() -> None:
        gc.collect()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            subject = Subject(case)
            timed(subject, start(subject), times)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profile.export_chrome_trace(str(path))
            events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
        changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
        found.append(max(itertools.accumulate(changes)))

    thread = threading.Thread(target=watched)  # of its own: it has none of the memory that a library keeps for others
    thread.start()
    thread.join()
    return found[0]


def measure(case: Case, rows: dict[str, Row], effort: Effort) -> dict[str, dict[str, Any]]:
    """Time the rows in turn beside their bases, find their peaks and errors, and print the table."""
    failed = {name: failure for name, row in rows.items() if (failure := failure_of(case, row))}
    ratios, beside = ratios_of(case, {name: row for name, row in rows.items() if name not in failed}, effort)
    heaviest = {name: peak(case, start, 2) for name, start in BASES.items()}
    print(f"\n{case.title}")
    for name in BASES:
        print(f"  {name}: {1e3 * statistics.median(beside[name]):.2f} ms, {heaviest[name] / 2**20:.1f} MiB")
    moments = {"error": case, f"after {effort.steps}": trained(case, effort.steps)} if case.entries else {}
    exact = {moment: exact_entries(then) for moment, then in moments.items()}
    heads = "".join(f"{moment:>11}" for moment in moments)
    print(f"  {'':36}{'time':>7}   {'quartiles':15}{'rounds':>6}{'memory':>9}{heads}")
    results = {}
    for name, row in rows.items():
        if name in failed:
            results[name] = {"fails": failed[name]}
            print(f"  {name:36}  fails: {failed[name].splitlines()[0]}")
            continue
        low, middle, high = statistics.quantiles(ratios[name], n=4, method="inclusive")
        results[name] = {"over": row.base, "time": middle, "quartiles": [low, high]}
        line = f"  {name:36}{middle:7.2f}   {f'{low:.2f} – {high:.2f}':15}{len(ratios[name]):6}"
        if row.weighed:
            results[name]["memory"] = peak(case, row.start, row.period + 1) / heaviest[row.base]
            line += f"{results[name]['memory']:9.2f}"
        for moment, then in moments.items():
            error = error_of(then, row, *exact[moment])
            if error is not None:
                results[name][moment] = error
                line += f"{error:11.3g}"
        print(line, flush=True)
    return results


def failure_of(case: Case, row: Row) -> str:
    """What a row says where it cannot take a network."""
    subject = Subject(case)
    turn = row.start(subject)
    try:
        timed(subject, turn, 1)
    except (RuntimeError, NotImplementedError) as error:
        return str(error) or type(error).__name__
    return ""


def ratios_of(
    case: Case, rows: dict[str, Row], effort: Effort
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """For each row its time over that of its base, once a round; for each base its seconds."""
    bases = {name: (subject := Subject(case), start(subject)) for name, start in BASES.items()}
    running = {name: (subject := Subject(case), row.start(subject)) for name, row in rows.items()}
    for base in bases.values():
        timed(*base, 3)
    pace = {name: timed(*base, 3) / 3 for name, base in bases.items()}
    spent = {name: timed(*running[name], row.period) for name, row in rows.items()}
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    beside: dict[str, list[float]] = {name: [] for name in bases}
    for played in range(effort.rounds):
        for name, row in rows.items():
            if played >= FEWEST and spent[name] > PATIENCE:
                continue
            times = row.period * max(1, round(effort.turn / pace[row.base] / row.period))
            base = timed(*bases[row.base], times)
            own = timed(*running[name], times)
            ratios[name].append(own / base)
            beside[row.base].append(base / times)
            spent[name] += own
    return ratios, beside


# Error.


def trained(case: Case, steps: int) -> Case:
    """The same batch, on the network after some training on others."""
    model = copy.deepcopy(case.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        inputs, targets = clusters(64, case.inputs.shape[1:])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return dataclasses.replace(case, model=model)


def exact_entries(case: Case) -> tuple[list[Tensor], Tensor]:
    """Random places in each parameter tensor, and the second derivatives there, in float64."""
    subject = Subject(dataclasses.replace(case, model=copy.deepcopy(case.model).double(), inputs=case.inputs.double()))
    gradients = torch.autograd.grad(subject.loss(), subject.params, create_graph=True)
    places, found = [], []
    for p, gradient in zip(subject.params, gradients, strict=True):
        chosen = torch.randperm(p.numel())[: case.entries]
        for place, entry in zip(chosen, gradient.flatten()[chosen], strict=True):
            (row,) = torch.autograd.grad(entry, p, retain_graph=True)
            found.append(row.flatten()[place])
        places.append(chosen)
    return places, torch.stack(found)


def error_of(case: Case, row: Row, places: list[Tensor], exact: Tensor) -> float | None:
    """Relative L1 error of a row's diagonal, the median of its draws."""
    subject = Subject(case)
    turn = row.start(subject)
    if turn.estimate is None:
        return None
    sizes = [p.numel() / len(chosen) for p, chosen in zip(subject.params, places, strict=True) for _ in chosen]
    weight, found = torch.tensor(sizes, dtype=torch.float64), []
    for _ in range(row.draws):
        subject.forget()
        pairs = zip(turn.estimate(), places, strict=True)
        picked = torch.cat([h.flatten()[chosen].double() for h, chosen in pairs])
        found.append((weight @ (picked - exact).abs() / (weight @ exact.abs())).item())
    return statistics.median(found)


# The walk.


def tiny_chains(nodes: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of one number with about so many nodes."""

    def elementwise(x: Tensor) -> Tensor:
        for _ in range(nodes // 4):
            x = (x.tanh() * 1.01 + 0.1).sin()
        return x.sum()

    def moved(x: Tensor) -> Tensor:
        for _ in range(nodes // 4):
            x = x.view(1, 1).mT.squeeze(0)[:1]
        return x.square().sum()

    def multiplied(x: Tensor) -> Tensor:
        weight = x.detach().view(1, 1).requires_grad_()
        for _ in range(nodes // 4):  # addmm, the transposed weight and tanh
            x = nn.functional.linear(x.view(1, 1), weight, x).tanh().view(1)
        return x.sum()

    return {"tanh, mul, add, sin": elementwise, "view, transpose, squeeze, slice": moved, "linear, tanh": multiplied}


def nodes_behind(loss: Tensor) -> int:
    """Nodes of a loss's graph."""
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return len(seen)


def walk_overhead(rounds: int, nodes: int) -> dict[str, dict[str, float]]:
    """Microseconds a node that the walk adds, the rules' part and the rest, printed as a table."""
    print(f"\nThe walk on chains of about {nodes} nodes on one number, µs a node (quartiles)")
    print(f"  {'':34}{'backward':>9}{'added':>8}   {'quartiles':13}{'in rules':>9}{'the walk':>9}")
    results = {}
    for name, function in tiny_chains(nodes).items():
        x = torch.full((1,), 0.5, requires_grad=True)
        count = nodes_behind(function(x))
        without, added, ruled = [], [], []
        for _ in range(rounds + 3):
            without.append(clock(torch.autograd.grad, function(x), [x]) / count)
            added.append(clock(walk_beside_backward, function(x), x) / count - without[-1])
            ruled.append(in_rules(function(x), x) / count)
        low, middle, high = statistics.quantiles(added[3:], n=4, method="inclusive")
        plain_part, rules_part = statistics.median(without[3:]), statistics.median(ruled[3:])
        results[name] = {"added": middle, "quartiles": [low, high], "rules": rules_part, "walk": middle - rules_part}
        spread = f"{low:.1f} – {high:.1f}"
        print(f"  {name:34}{plain_part:9.1f}{middle:8.1f}   {spread:13}{rules_part:9.1f}{middle - rules_part:9.1f}")
    return results


def clock(function: Callable[..., object], *arguments: Any) -> float:
    """Microseconds of one call."""
    start = time.perf_counter()
    function(*arguments)
    return 1e6 * (time.perf_counter() - start)


def walk_beside_backward(loss: Tensor, x: Tensor) -> None:
    """What takes place in ``AdaHesScale.backward``."""
    with Walk(loss, [x]):
        torch.autograd.grad(loss, [x])


def in_rules(loss: Tensor, x: Tensor) -> float:
    """Microseconds spent inside rules during a walk."""
    spent = 0.0

    def watched(rule: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            found = rule(*arguments)
            spent += time.perf_counter() - start
            return found

        return call

    with Walk(loss, [x]) as walk:
        for number, entry in walk.route.rules.items():
            walk.route.rules[number] = dataclasses.replace(entry, rule=watched(entry.rule))
        torch.autograd.grad(loss, [x])
    return 1e6 * spent


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks and few rounds, to see it run")
    parser.add_argument("--only", nargs="+", choices=[*CASES, "walk"], help="these tables; all by default")
    parser.add_argument("--ours", action="store_true", help="leave out the rows of others, to tune one's own")
    parser.add_argument("--rounds", type=int, help="turns of each row")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file as well")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="where the published package hesscale lies")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass  # it must be set up in the main thread
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, float32")
    effort = Effort(FEWEST, 0.0, 5) if chosen.quick else Effort(25, 0.03, 100)
    if chosen.rounds:
        effort = dataclasses.replace(effort, rounds=chosen.rounds)
    peers = {} if chosen.ours else chain_rows(chosen.published)
    results: dict[str, Any] = {}
    for name, build in (QUICK if chosen.quick else CASES).items():
        if chosen.only and name not in chosen.only:
            continue
        torch.manual_seed(0)
        case = build()
        rows = OURS | ({} if chosen.ours else ANYWHERE) | (peers if case.chain else {})
        rows = {key: row for key, row in rows.items() if key not in case.without}
        results[name] = measure(case, rows, effort)
    if not chosen.only or "walk" in chosen.only:
        results["walk"] = walk_overhead(effort.rounds, 100 if chosen.quick else 500)
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
