"""What ``quadric prune`` found: tables for the terminal and a page to read, in the look of a race's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from quadric.lab import plots, report
from quadric.lab.standings import (
    Spread,
    decimals,
    finite,
    listed,
    measured,
    noise_of_difference,
    number,
    printable,
    share,
    unit_of,
)

# key: (name, look, mark, whether it is filled, what it does)
LOOKS: dict[str, tuple[str, plots.Style, str, bool, str]] = {
    "joint": (
        "joint update",
        plots.Style("ours-0"),
        "o",
        True,
        "chooses as Fisher does, and moves what stays by the exact step of optimal brain surgeon for the whole removed "
        "set",
    ),
    "single": (
        "sum of single updates",
        plots.Style("ours-1"),
        "s",
        True,
        "chooses as Fisher does, and moves what stays by the sum of the steps for each removed weight alone, as in "
        "M-FAC’s paper",
    ),
    "fisher": (
        "Fisher without update",
        plots.Style("ours-2"),
        "^",
        False,
        "removes where w²/(2[F⁻¹]ᵢᵢ) is small, F the mean of ggᵀ over gradients g; moves nothing",
    ),
    "obd": (
        "optimal brain damage",
        plots.Style("ours-3"),
        "D",
        False,
        "removes where hw²/2 is small, h the diagonal of the Hessian; moves nothing",
    ),
    "magnitude": (
        "magnitude",
        plots.Style("rival-0", (4, 1.6)),
        "X",
        True,
        "removes the smallest weights; moves nothing",
    ),
}
MOST_ROWS = 40  # layers in the picture
MOST_NOTES = 5  # below the table of layers


@dataclass(frozen=True)
class Row:
    """One method: its key, its name, and its metric over the seeds at each sparsity."""

    key: str
    name: str
    style: plots.Style
    runs: list[dict[str, Any]]
    metric: dict[float, Spread | None]

    def at(self, sparsity: float) -> list[dict[str, Any]]:
        """Its runs at a sparsity."""
        return [run for run in self.runs if run["sparsity"] == sparsity]


def rows(results: dict[str, Any]) -> list[Row]:
    """The methods of results.json, the best at the largest sparsity first."""
    made = []
    for method in results["methods"]:
        name, style, *_ = LOOKS[method["key"]]
        runs = method["runs"]
        spreads = {
            s: Spread.of(finite(run["metric"]) for run in runs if run["sparsity"] == s) for s in results["sparsities"]
        }
        made.append(Row(method["key"], name, style, runs, spreads))
    last = results["sparsities"][-1]
    sign = -1 if results["metric"]["higher_is_better"] else 1
    return sorted(made, key=lambda row: sign * m.mean if (m := row.metric[last]) else math.inf)


def percent(sparsity: float) -> str:
    """A share of the weights as a person says it.

    >>> percent(0.9), percent(0.875)
    ('90 %', '87.5 %')
    """
    return f"{100 * sparsity:.4g} %"


def value(metric: float | None, of: dict[str, Any]) -> str:
    """A single value of the metric with its unit."""
    if metric is None:
        return "–"
    return measured(Spread(metric, None, 1), decimals([metric], of["unit"])) + unit_of(of)


def results_table(results: dict[str, Any], width: int = 80) -> Group:
    """Method by sparsity for the terminal: the best of each column bold, the verdict and lost runs below.

    Args:
        results: As in results.json.
        width: Characters there are; the spread, then the smaller sparsities are left out until the rest fits.
    """
    every = results["sparsities"]
    table, lines = _table(results, every, spread=True)
    for first in range(len(every)):
        if _width(table) <= width:
            break
        table, lines = _table(results, every[first:], spread=False)
    # Title and caption of a table would be as narrow as the table.
    return Group(Text(verdict(results)[0], "bold"), table, Text("\n".join(lines), "dim italic"))


def _table(results: dict[str, Any], shown: Sequence[float], spread: bool) -> tuple[Table, list[str]]:
    ranked = rows(results)
    lines = [verdict(results)[1], *_lost(ranked), _legend(results, spread)]
    if len(shown) < len(results["sparsities"]):
        lines.append(f"below {percent(shown[0])}: in the report")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("method", no_wrap=True)
    for sparsity in shown:
        table.add_column(percent(sparsity), justify="right", no_wrap=True)
    for row in ranked:
        looks = ["bold green" if row in _best(results, ranked, sparsity) else "" for sparsity in shown]
        cells = [Text(_cell(results, row, s, spread), look) for s, look in zip(shown, looks, strict=True)]
        table.add_row(row.name, *cells)
    return table, lines


def _width(table: Table) -> int:
    # Of the columns alone: title and caption are wrapped.
    bare = Table(box=table.box, padding=table.padding, show_edge=False)
    bare.columns, bare.rows = table.columns, table.rows
    return Console(width=1000).measure(bare).maximum


def layers_table(results: dict[str, Any], width: int = 80) -> Table | None:
    """The layers of the best method at the largest sparsity; None where no run finished there.

    Args:
        results: As in results.json.
        width: Characters there are; shapes are left out where they do not fit.
    """
    if (found := _winner(results)) is None:
        return None
    row, run = found
    titles = ["layer", "shape", "weights", "kept", "sparsity"]
    cells = [_layer(layer) for layer in run["layers"]]
    cells.append(_layer(_together(run["layers"])))
    alone = [f"left alone: {printable(name)} ({printable(why)})" for name, why in run["left_alone"].items()]
    if len(alone) > MOST_NOTES:
        alone[MOST_NOTES:] = [f"and {len(alone) - MOST_NOTES} more, in the report"]
    for spare in ((), ("shape",), ("shape", "weights")):
        table = Table(
            title=Text(f"{row.name} at {percent(run['sparsity'])}, layer by layer"), caption=Text("\n".join(alone)),
            caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False,
        )  # fmt: skip
        kept = [i for i, title in enumerate(titles) if title not in spare]
        for i in kept:
            table.add_column(titles[i], justify="right" if i else "left", no_wrap=True)
        for number_of, line in enumerate(cells):
            table.add_row(
                *(Text(line[i]) for i in kept), style="bold" if number_of == len(cells) - 1 else "",
                end_section=number_of == len(cells) - 2,
            )  # fmt: skip
        if _width(table) <= width:
            break
    return table


def _together(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(layer[key] for layer in layers) for key in ("weights", "removed")}
    return {"name": "all", "shape": None, **sums}


def _layer(layer: dict[str, Any]) -> list[str]:
    weights, removed = layer["weights"], layer["removed"]
    shape = "" if layer["shape"] is None else "×".join(map(str, layer["shape"])) or "1"
    gone = f"{100 * removed / weights:.1f} %" if weights else "–"
    return [printable(layer["name"]), shape, f"{weights:,}", f"{weights - removed:,}", gone]


def write_page(results: dict[str, Any], folder: Path) -> Path:
    """Write `report.html`, complete in itself, and its pictures as PNG and SVG; return the page's path.

    Args:
        results: As in results.json.
        folder: Where to write; made if it is not there.
    """
    return report.write_page(folder, lambda: _pictures(results), lambda pictures: _page(results, pictures))


def verdict(results: dict[str, Any]) -> tuple[str, str]:
    """A headline and a sentence with its figures: who keeps most at the largest sparsity, and by how much."""
    ranked, last, metric = rows(results), results["sparsities"][-1], results["metric"]
    judged = [(row, spread) for row in ranked if (spread := row.metric[last])]
    name = printable(metric["name"])
    dense = f"the dense network has {value(finite(results['dense']['metric']), metric)}"
    if not judged:
        return "No run finished", f"Nothing was pruned to {percent(last)}; {dense}."
    places = decimals([spread.mean for _, spread in judged], metric["unit"])
    told = [f"{measured(spread, places)}{unit_of(metric)}" for _, spread in judged]
    first, best = judged[0]
    sentence = f"With {percent(last)} of the weights removed, {first.name} has {name} {told[0]}, and {dense}"
    level = [row.name for row, spread in judged[1:] if _level(best, spread)]
    if len(judged) > 1:
        rest = [f"{row.name} {words}" for (row, _), words in zip(judged[1:], told[1:], strict=True)]
        sentence += f"; {listed(rest)}"
        sentence += "; a single seed cannot say whether that is luck" if len(results["seeds"]) == 1 else ""
    if len(judged) == 1:
        headline = f"{first.name} at {percent(last)}: {name} {told[0]}"
    elif level:
        headline = f"{listed([first.name, *level])} are level at {percent(last)}"
    else:
        headline = f"{first.name} keeps most at {percent(last)}"
    return headline[:1].upper() + headline[1:], f"{sentence}."


def _level(a: Spread, b: Spread) -> bool:
    # Within the seeds' spread; for a single seed only what is equal.
    return abs(a.mean - b.mean) <= (noise_of_difference(a, b) or 0.0)


def _winner(results: dict[str, Any]) -> tuple[Row, dict[str, Any]] | None:
    # The best method at the largest sparsity and its first run there.
    row = rows(results)[0]
    runs = [run for run in row.at(results["sparsities"][-1]) if finite(run["metric"]) is not None]
    return (row, runs[0]) if runs else None


def _best(results: dict[str, Any], ranked: Sequence[Row], sparsity: float) -> list[Row]:
    # Those whose cells read like the best one's; nobody where nobody can be compared.
    means = {row.key: spread.mean for row in ranked if (spread := row.metric[sparsity])}
    if len(means) < 2:
        return []
    top = (max if results["metric"]["higher_is_better"] else min)(means.values())
    words = {_cell(results, row, sparsity, False) for row in ranked if means.get(row.key) == top}
    return [row for row in ranked if row.key in means and _cell(results, row, sparsity, False) in words]


def _cell(results: dict[str, Any], row: Row, sparsity: float, spread: bool = True) -> str:
    found = row.metric[sparsity]
    if found is None:
        return "–"
    means = [s.mean for s in row.metric.values() if s]
    shown = found if spread else Spread(found.mean, None, found.count)
    return measured(shown, decimals(means, results["metric"]["unit"])) + share(found.count, len(row.at(sparsity)))


def _lost(ranked: Sequence[Row]) -> list[str]:
    # What failed, once for each reason.
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in ranked:
        for run in row.runs:
            if run["error"] is not None:
                reasons.setdefault((row.name, printable(run["error"])), []).append(percent(run["sparsity"]))
            elif finite(run["metric"]) is None:
                reasons.setdefault((row.name, "the pruned model has no finite value"), []).append(
                    percent(run["sparsity"])
                )
    return [f"{name} at {listed(list(dict.fromkeys(at)))}: {why}" for (name, why), at in reasons.items()]


def _legend(results: dict[str, Any], spread: bool = True) -> str:
    metric = results["metric"]
    better = "higher" if metric["higher_is_better"] else "lower"
    unit = f", {printable(metric['unit'])}" if metric["unit"] else ""
    seeds = "; ±: standard deviation over seeds" if spread and len(results["seeds"]) > 1 else ""
    return f"{printable(metric['name'])}{unit}, by share of weights removed ({better} is better); bold: best{seeds}"


def _pictures(results: dict[str, Any]) -> dict[str, Figure]:
    ranked, metric = rows(results), results["metric"]
    name = printable(metric["name"])
    quality = name[:1].upper() + name[1:] + (f" ({printable(metric['unit'])})" if metric["unit"] else "")
    figures = {}
    series = [_series(row) for row in ranked]
    if any(s.x for s in series) and len(results["sparsities"]) > 1:
        figures["metric_sparsity"] = plots.against_sparsity(
            [s for s in series if s.x], y=quality, dense=finite(results["dense"]["metric"])
        )
    elif any(s.x for s in series):
        at = results["sparsities"][-1]
        seeds = [
            plots.Series(
                row.name,
                row.style,
                x=[v for run in row.at(at) if (v := finite(run["metric"])) is not None],
                y=[spread.mean] if (spread := row.metric[at]) else [],
            )
            for row in ranked
        ]
        figures["metric_sparsity"] = plots.ends(seeds, x=f"{quality} at {percent(at)}", title="Each method, each seed")
    if (found := _winner(results)) is not None:
        layers = [layer for layer in found[1]["layers"] if layer["weights"]]
        largest = sorted(layers, key=lambda layer: -layer["weights"])[:MOST_ROWS]
        names = [layer["name"] for layer in layers if layer in largest]
        figures["sparsity_layers"] = plots.sparsity_by_layer(
            [printable(layer) for layer in names],
            [_marks(row, names, results["sparsities"][-1]) for row in ranked],
            100 * found[1]["reached"],
        )
    return figures


def _series(row: Row) -> plots.Series:
    points = [
        (100 * sparsity, spread.mean, [v for run in row.at(sparsity) if (v := finite(run["metric"])) is not None])
        for sparsity, spread in row.metric.items()
        if spread
    ]
    return plots.Series(
        row.name,
        row.style,
        x=[x for x, _, _ in points],
        y=[mean for _, mean, _ in points],
        low=[min(values) for _, _, values in points],
        high=[max(values) for _, _, values in points],
    )


def _marks(row: Row, names: Sequence[str], sparsity: float) -> plots.Marks:
    _, style, marker, filled, _ = LOOKS[row.key]
    runs = [run for run in row.at(sparsity) if run["error"] is None]
    gone = {layer["name"]: 100 * layer["removed"] / layer["weights"] for layer in runs[0]["layers"]} if runs else {}
    return plots.Marks(row.name, style, marker, filled, [gone.get(name) for name in names])


def _page(results: dict[str, Any], pictures: dict[str, str]) -> str:
    headline, sentence = verdict(results)
    ranked = rows(results)
    lost = "".join(f"<li>{report.text(line)}</li>" for line in _lost(ranked))
    aside = f"<aside><strong>Not every run finished.</strong><ul>{lost}</ul></aside>" if lost else ""
    seeds = len(results["seeds"]) > 1
    if len(results["sparsities"]) > 1:
        curve = "What a method keeps as more is removed, nothing retrained." if not results["finetune"] else ""
        curve = curve or f"What a method keeps as more is removed, after {_epochs(results['finetune'])} of training."
        curve += " Line: mean; band: lowest to highest seed." if seeds else ""
    else:
        curve = "A dot for each seed, a bar at their mean." if seeds else "What each method keeps."
    runs = sum(len(row.runs) for row in ranked)
    body = f"""{aside}
<section>
<h2>Result</h2>
{_summary(results, ranked)}
<div class="plots">{report.picture(pictures, "metric_sparsity", curve)}</div>
</section>
{_layers(results, pictures)}
<section>
<h2>How it was measured</h2>
{_method(results)}
</section>
<section>
<h2>Every run</h2>
<details><summary>{runs} {"run" if runs == 1 else "runs"}</summary>
{_raw(results, ranked)}
</details>
</section>"""
    return report.document(results, "quadric prune", results["subject"], headline, sentence, body)


def _epochs(count: int) -> str:
    return f"{count} {'epoch' if count == 1 else 'epochs'}"


def _summary(results: dict[str, Any], ranked: Sequence[Row]) -> str:
    every = results["sparsities"]
    head = "<th scope=col>removed</th>" + "".join(f"<th scope=col>{percent(s)}</th>" for s in every)
    body = ""
    for row in ranked:
        cells = "".join(
            f"<td{' class=best' if row in _best(results, ranked, s) else ''}>{report.text(_cell(results, row, s))}</td>"
            for s in every
        )
        body += f"<tr><th scope=row>{report.swatch(row.style)}{report.text(row.name)}</th>{cells}</tr>"
    legend = _legend(results).replace("bold: best", "bold on a tint: best of its column")
    dense = f"Nothing removed: {value(finite(results['dense']['metric']), results['metric'])}."
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    note = f"{legend[:1].upper()}{legend[1:]}. {dense}"
    return f"<div class=scroll>{table}</div><p class=note>{report.text(note)}</p>"


def _layers(results: dict[str, Any], pictures: dict[str, str]) -> str:
    if (found := _winner(results)) is None:
        return ""
    row, run = found
    layers = run["layers"]
    shown = min(len(layers), MOST_ROWS)
    which = "Every layer" if shown == len(layers) else f"The {shown} largest of {len(layers)} layers"
    caption = f"{which}, in the model’s order from top to bottom, at {percent(run['sparsity'])}"
    caption += f", seed {run['seed']}." if len(results["seeds"]) > 1 else "."
    body = "".join(
        f"<tr><th scope=row>{report.text(name)}</th>{''.join(f'<td>{report.text(cell)}</td>' for cell in rest)}</tr>"
        for name, *rest in map(_layer, [*layers, _together(layers)])
    )
    titles = ("layer", "shape", "weights", "kept", "sparsity")
    head = "".join(f"<th scope=col>{title}</th>" for title in titles)
    table = f"<table class=small><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    alone = "".join(
        f"<dt>{report.text(name)}</dt><dd>{report.text(why)}</dd>" for name, why in run["left_alone"].items()
    )
    alone = f"<details><summary>Left alone</summary><dl>{alone}</dl></details>" if alone else ""
    return f"""<section>
<h2>Layer by layer</h2>
<div class="plots">{report.picture(pictures, "sparsity_layers", caption)}
<div class="scroll"><p class=note>{report.text(f"{row.name} at {percent(run['sparsity'])}")}</p>{table}</div></div>
{alone}
</section>"""


def _method(results: dict[str, Any]) -> str:
    options = results["options"]
    gradients = f"{options['num_grads']} in each of {options['rounds']} rounds" if options["rounds"] > 1 else ""
    gradients = gradients or f"{options['num_grads']}"
    size = "" if results["batch_size"] is None else f" of {results['batch_size']} examples"
    gradients += ", of single examples" if options["per_example"] else f", of mini-batches{size}"
    told = ", ".join(f"{key} {_option(given)}" for key, given in options.items() if given is not None)
    after = ["statistics of batch norm estimated again"] if results["batch_norm"] else []
    after += [f"{_epochs(results['finetune'])} of AdamW with the masks held"] if results["finetune"] else []
    facts = {
        "Model": report.text(results["description"]),
        "Start": "Every run starts from the same dense weights; none continues another one’s.",
        "Gradients": report.text(f"{gradients}, of training data; the metric is of data that no gradient saw."),
        "Seeds": report.text(f"{', '.join(map(str, results['seeds']))}: the batches that the gradients are of"),
        "Options": report.text(told),
        "Memory": report.text(_memory(results)),
        "Afterwards": report.text(", then ".join(after) or "nothing is retrained or estimated again"),
    }
    for method in results["methods"]:
        name, style, _, _, words = LOOKS[method["key"]]
        facts[f"{report.swatch(style)}{report.text(name)}"] = report.text(words)
    if results["kept"]:
        kept = results["kept"]
        files = " and ".join(kept["files"])
        facts["Files"] = report.text(
            f"{files}: {LOOKS[kept['method']][0]} at {percent(kept['sparsity'])}, seed {kept['seed']}"
        )
    return report.how_measured(results, facts)


def _memory(results: dict[str, Any]) -> str:
    # The same in every run that keeps gradients.
    runs = [run for method in results["methods"] for run in method["runs"]]
    plan = next((plan for run in runs if (plan := run.get("memory"))), None)
    if plan is None:
        return "no gradients are kept"
    what = "sums over blocks of the gradients’ products" if plan["by_block"] else f"{plan['gradients']:,} gradients"
    return f"{what} in {plan['dtype']} on {plan['device']}: {plan['window_bytes'] / 1e6:,.1f} MB"


def _option(given: Any) -> str:
    if isinstance(given, list):
        return ",".join(map(str, given))
    return f"{given:g}" if isinstance(given, float) else str(given)


def _raw(results: dict[str, Any], ranked: Sequence[Row]) -> str:
    metric = results["metric"]
    losses = finite(results["dense"]["loss"]) is not None
    titles = ["method", "asked", "reached", "seed", printable(metric["name"]) + unit_of(metric)]
    titles += [*(["test loss"] if losses else []), "predicted increase", "seconds"]
    body = ""
    for row in ranked:
        for run in row.runs:
            told = [percent(run["sparsity"]), "–" if run["error"] else f"{100 * run['reached']:.2f} %", run["seed"]]
            told.append(number(finite(run["metric"]), 4))
            told += [number(finite(run.get("loss")), 4)] if losses else []
            told += [number(finite(run.get("loss_increase"))), number(finite(run.get("seconds")))]
            body += f"<tr><th scope=row>{report.swatch(row.style)}{report.text(row.name)}</th>"
            body += "".join(f"<td>{report.text(cell)}</td>" for cell in told) + "</tr>"
    head = "".join(f"<th scope=col>{report.text(title)}</th>" for title in titles)
    return f"<div class=scroll><table class=small><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
