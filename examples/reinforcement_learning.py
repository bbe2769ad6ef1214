"""PPO on classic control with Adam and AdaHesScale, over learning rates and seeds: which runs stay up?

``python examples/reinforcement_learning.py`` takes about a minute on two cores; it needs ``pip install
'.[examples]'``. Every optimizer runs with every learning rate and seed, AdaHesScale once for each ``--trust``, where 0
is none; docs/hesscale_rl.md tells what came out:

    python examples/reinforcement_learning.py --trust 0 1e-7 --lr 1e-3 1e-2 1e-1 1 --seeds 0 1 2 3 4 --steps 60000

Runs are kept in OUT/runs.jsonl, and those already there are not run again. The usual safety belts are off: the learning
rate is constant, no KL divergence ends an epoch early, and gradients are clipped only by ``--max-norm 0.5``.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
from pathlib import Path

import gymnasium
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import quadric

ENVS, HORIZON, EPOCHS, BATCH = 8, 128, 4, 256
DISCOUNT, SMOOTHING, RATIO_CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01
SETTINGS = ("title", "optimizer", "trust", "clip", "env", "steps", "max_norm", "lr", "seed")  # of a run
COLOURS = ["#7b8794", "#d55e00", "#0072b2", "#00916a", "#8a4fa8", "#b98500", "#cc79a7"]
STYLES = [{"color": COLOURS[0], "linestyle": "--"}, *({"color": colour} for colour in COLOURS[1:])]


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def collect(envs, actor, critic, state, resetting):
    """Play HORIZON steps in every environment; return what was seen, and where to go on."""
    steps = []
    for _ in range(HORIZON):
        action = torch.multinomial(actor(state).softmax(-1), 1).squeeze(-1)
        following, reward, terminated, truncated, _ = envs.step(action.numpy())
        # The observation after the end of an episode is its last one; the step after that only resets.
        reward, terminated, truncated = map(torch.as_tensor, (reward, terminated, truncated))
        steps.append((state, action, reward.float(), terminated, terminated | truncated, resetting))
        state, resetting = torch.as_tensor(following, dtype=torch.float32), terminated | truncated
    states, actions, rewards, terminated, ended, skipped = map(torch.stack, zip(*steps, strict=True))
    values = critic(torch.cat([states, state[None]])).squeeze(-1)
    # Rewards times 1 - DISCOUNT make values averages of rewards, so that the critic's loss is of the size of one.
    surprise = (1 - DISCOUNT) * rewards + DISCOUNT * values[1:] * ~terminated - values[:-1]
    advantages, later = [], torch.zeros(ENVS)
    for now, end in zip(surprise.flip(0), ended.flip(0), strict=True):
        later = now + DISCOUNT * SMOOTHING * ~end * later
        advantages.insert(0, later)
    advantages = torch.stack(advantages)
    before = log_chosen(actor(states).log_softmax(-1), actions)
    seen = [part[~skipped] for part in (states, actions, before, advantages, advantages + values[:-1])]
    seen[3] = (seen[3] - seen[3].mean()) / (seen[3].std() + 1e-8)
    return seen, state, resetting


def log_chosen(log_policy, actions):
    return log_policy.gather(-1, actions[..., None]).squeeze(-1)


def ppo_loss(actor, critic, states, actions, before, advantages, targets):
    """The clipped objective, half the squared error of the critic, and a bonus for entropy."""
    log_policy = actor(states).log_softmax(-1)
    ratio = (log_chosen(log_policy, actions) - before).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(1 - RATIO_CLIP, 1 + RATIO_CLIP) * advantages).mean()
    entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
    return 0.5 * (critic(states).squeeze(-1) - targets).square().mean() - gain - ENTROPY * entropy


def update(optimizer, loss, parameters, max_norm):
    """One step; a FloatingPointError if the gradient or the Hessian diagonal is not finite."""
    optimizer.zero_grad()
    if isinstance(optimizer, quadric.AdaHesScale):
        optimizer.backward(loss)
    else:
        loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
    if not norm.isfinite():
        raise FloatingPointError(f"the norm of the gradient is {norm.item()}")
    try:
        optimizer.step()
    except RuntimeError as error:  # AdaHesScale refuses it
        raise FloatingPointError(str(error)) from error


def train(run):
    """Train once; return the run with its curve, (environment steps, mean return of the last 20 episodes)."""
    torch.set_num_threads(1)  # networks of this size are as fast on one
    torch.manual_seed(run["seed"])
    envs = gymnasium.make_vec(run["env"], num_envs=ENVS, vectorization_mode="sync")
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=20)
    inputs = envs.single_observation_space.shape[0]
    actor, critic = network(inputs, int(envs.single_action_space.n)), network(inputs, 1)
    parameters = [*actor.parameters(), *critic.parameters()]
    groups = [{"params": actor.parameters()}, {"params": critic.parameters()}]  # each has its own trust region
    if run["optimizer"] == "adam":
        optimizer = torch.optim.Adam(groups, run["lr"])
    else:
        optimizer = quadric.AdaHesScale(groups, run["lr"], clip=run["clip"] or None, trust=run["trust"] or None)
    state = torch.as_tensor(envs.reset(seed=run["seed"])[0], dtype=torch.float32)
    resetting, curve = torch.zeros(ENVS, dtype=torch.bool), []
    try:
        for steps in range(ENVS * HORIZON, run["steps"] + 1, ENVS * HORIZON):
            with torch.no_grad():
                seen, state, resetting = collect(envs, actor, critic, state, resetting)
            if not envs.return_queue:
                continue  # the curve begins with the untrained policy
            curve.append((steps, float(statistics.mean(envs.return_queue))))
            for rows in itertools.chain(*(torch.randperm(len(seen[0])).split(BATCH) for _ in range(EPOCHS))):
                loss = ppo_loss(actor, critic, *(part[rows] for part in seen))
                update(optimizer, loss, parameters, run["max_norm"])
    except FloatingPointError as error:
        return {**run, "curve": curve, "diverged": str(error)}
    if not curve:
        raise ValueError(f"no episode of {run['env']} ended within {run['steps']} steps: take more")
    return {**run, "curve": curve, "diverged": None}


def final(run):
    """The return over the last tenth of the run; a run that diverged has the lowest it ever had."""
    returns = [value for _, value in run["curve"]]
    return min(returns) if run["diverged"] else statistics.mean(returns[-max(1, len(returns) // 10) :])


def collapsed(run):
    """Diverged, or kept no more than half of what it had gained at its best; so does a run that gained nothing."""
    returns = [value for _, value in run["curve"]]
    return bool(run["diverged"]) or final(run) <= (returns[0] + max(returns)) / 2


def tell(sweep):
    """Print one row for each optimizer and learning rate."""
    table = Table("optimizer", "lr", "final return", "worst seed", "collapsed")
    for title, rates in sweep.items():
        for lr, runs in rates.items():
            finals = [final(run) for run in runs]
            spread = f"{statistics.mean(finals):.0f} ± {statistics.pstdev(finals):.0f}"
            table.add_row(title, f"{lr:g}", spread, f"{min(finals):.0f}", f"{sum(map(collapsed, runs))} of {len(runs)}")
    Console().print(table)


def band(axes, places, values, **style):
    """The mean over seeds as a line, from the lowest to the highest seed as a band."""
    (line,) = axes.plot(places, [statistics.mean(v) for v in values], **style)
    axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.13, lw=0)


def draw(sweep, path):
    """Final return and share of collapses against lr, and curves where the return of the whole run was the highest."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for (title, rates), style in zip(sweep.items(), itertools.cycle(STYLES), strict=False):
        finals = {lr: list(map(final, runs)) for lr, runs in rates.items()}
        band(left, list(rates), list(finals.values()), label=title, marker="o", **style)
        share = [100 * statistics.mean(map(collapsed, runs)) for runs in rates.values()]
        middle.plot(list(rates), share, marker="o", **style)
        best = max(rates, key=lambda lr: statistics.mean(value for run in rates[lr] for _, value in run["curve"]))
        curves = {}
        for steps, value in itertools.chain(*(run["curve"] for run in rates[best])):
            curves.setdefault(steps / 1000, []).append(value)
        band(right, list(curves), list(curves.values()), label=f"lr {best:g}", **style)
    left.set(xlabel="learning rate", xscale="log")
    middle.set(xlabel="learning rate", xscale="log", ylim=(-4, 104))
    right.set(xlabel="thousand environment steps")
    titles = {left: "Return at the end", middle: "Runs that collapsed (%)", right: "Return, each at its best lr"}
    for axes, title in titles.items():
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6ea")
    right.legend(frameon=False, loc="lower right")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1", help="an environment of gymnasium with discrete actions")
    parser.add_argument("--optimizer", nargs="+", choices=["adam", "adahesscale"], default=["adam", "adahesscale"])
    parser.add_argument("--trust", nargs="+", type=float, default=[0, 1e-7], help="δ of the trust region; 0 for none")
    parser.add_argument("--clip", type=float, default=1.0, help="bound on AdaHesScale's steps before lr; 0 for none")
    parser.add_argument("--max-norm", type=float, default=0, help="clip gradients to this norm; 0 for none")
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 1e-2, 1e-1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps of a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, default=Path("runs/reinforcement_learning"), help="folder for the results")
    args = parser.parse_args(arguments)
    if not isinstance(gymnasium.make(args.env).action_space, gymnasium.spaces.Discrete):
        parser.error(f"{args.env} has no discrete actions; choose an environment that has, such as Acrobot-v1")
    competitors = [("Adam", "adam", 0, 0)] if "adam" in args.optimizer else []
    for trust in args.trust if "adahesscale" in args.optimizer else []:
        title = f"AdaHesScale, trust {trust:g}" if trust else "AdaHesScale"
        competitors.append((title, "adahesscale", trust, args.clip))
    same = (args.env, args.steps, args.max_norm)
    plan = [(*c, *same, lr, seed) for c, lr, seed in itertools.product(competitors, args.lr, args.seeds)]

    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "runs.jsonl"
    runs = map(json.loads, kept.read_text().splitlines() if kept.exists() else [])
    done = {tuple(run[field] for field in SETTINGS): run for run in runs}
    todo = [dict(zip(SETTINGS, settings, strict=True)) for settings in plan if settings not in done]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, kept.open("a") as file:
        for run in track(map(train, todo) if args.jobs == 1 else pool.imap_unordered(train, todo), total=len(todo)):
            done[tuple(run[field] for field in SETTINGS)] = run
            print(json.dumps(run), file=file, flush=True)
    sweep = {title: {lr: [] for lr in args.lr} for title, *_ in competitors}
    for settings in plan:
        sweep[settings[0]][done[settings]["lr"]].append(done[settings])
    tell(sweep)
    draw(sweep, args.out / "stability.png")


if __name__ == "__main__":
    main()
