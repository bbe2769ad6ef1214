"""The report of a race: a page to read and a table for the terminal. Both only word what `standings` computed."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from operator import methodcaller
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quadric.lab import plots
from quadric.lab.checkpoint import write_atomically
from quadric.lab.standings import (
    Column,
    Standing,
    columns,
    finite,
    goal,
    lost_runs,
    number,
    printable,
    share,
    standings,
    unit_of,
    verdict,
)


def results_table(results: dict[str, Any], width: int = 80) -> Table:
    """The summary for the terminal: ours with a ◆, the best of each column bold, the verdict and lost runs below.

    Args:
        results: What a race measured, as in its results.json.
        width: Characters there are; columns that the page has too are left out until the rest fits.
    """
    ranked = standings(results)
    shown = columns(results, ranked)
    table = _table(results, ranked, shown)
    for spare in ("step ×", "lr", "memory", "test loss", "step", "time"):
        if Console(width=1000).measure(table).maximum <= width:
            break
        shown = [column for column in shown if column.title != spare]
        table = _table(results, ranked, shown)
    return table


def _table(results: dict[str, Any], ranked: Sequence[Standing], shown: Sequence[Column]) -> Table:
    headline, sentence = verdict(results, ranked)
    lines = [
        sentence,
        *lost_runs(ranked),
        "◆ quadric’s own; bold: best of its column; ±: standard deviation over seeds",
    ]
    caption = Text("\n".join(lines))
    # The box alone sets columns apart: padding would cost a column on a terminal of 80 characters.
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False}
    table = Table(title=Text(headline), caption=caption, caption_justify="left", **look)
    for i, column in enumerate(shown):
        head = f"{column.title}\n{column.unit}" if column.unit else column.title.replace(" ", "\n")
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=True, max_width=None if i else 24)
    for row, standing in enumerate(ranked):
        name = Text(("◆ " if standing.ours else "  ") + standing.name, style="cyan" if standing.ours else "")
        rest = [Text(c.cells[row].replace(" ± ", "±"), "bold green" if row in c.best else "") for c in shown[1:]]
        table.add_row(name, *rest)
    return table


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write `report.html`, complete in itself, and each of its pictures as PNG and SVG; return the page's path.

    Args:
        results: What a race measured, as in its results.json.
        folder: Where to write; made if it is not there.
    """
    ranked = standings(results)
    return write_page(folder, lambda: _pictures(results, ranked), lambda pictures: _page(results, ranked, pictures))


def write_page(
    folder: Path,
    draw: Callable[[], dict[str, Figure]],
    word: Callable[[dict[str, str]], str],
    again: str = "repeat with --resume",
) -> Path:
    """Write `report.html` and each of its pictures as PNG and SVG; return the page's path.

    Args:
        folder: Where to write; made if it is not there.
        draw: Gives the pictures by their names.
        word: Makes the page of their markup.
        again: What to do once a disk that refuses no longer does.
    """
    files: dict[str, bytes] = {}
    pictures: dict[str, str] = {}
    with plots.settings():
        for name, figure in draw().items():
            drawing = plots.svg(figure)
            files |= {f"{name}.svg": drawing.encode(), f"{name}.png": plots.png(figure)}
            pictures[name] = plots.inline(drawing, name)
    files["report.html"] = word(pictures).encode()
    for name, content in files.items():
        write_atomically(folder / name, methodcaller("write", content), again)
    return folder / "report.html"


def _curve(standing: Standing, x: str, y: str) -> plots.Series:
    # Mean and band run over the steps all finished runs have in common, so that they average the same seeds throughout.
    done, broken = [], []
    for run in standing.runs:
        points: dict[int, tuple[float, float]] = {}
        for entry in run.history:
            a, b = finite(entry[x]), finite(entry[y])
            if a is not None and b is not None:
                points[entry["step"]] = a, b
        if run.finished:
            done.append(points)
        elif points:
            broken.append(([a for a, _ in points.values()], [b for _, b in points.values()]))
    steps = sorted(set.intersection(*map(set, done))) if done else []
    values = [[points[step][1] for points in done] for step in steps]
    return plots.Series(
        standing.name,
        standing.style,
        x=[fmean(points[step][0] for points in done) for step in steps],
        y=[fmean(v) for v in values],
        low=[min(v) for v in values],
        high=[max(v) for v in values],
        broken=broken,
    )


def _pictures(results: dict[str, Any], ranked: Sequence[Standing]) -> dict[str, Figure]:
    metric, target, log = results["metric"], finite(results["target"]), not results["metric"]["higher_is_better"]
    quality = f"Test {printable(metric['name'])}" + (f" ({printable(metric['unit'])})" if metric["unit"] else "")
    over = {"steps": ("step", "steps"), "seconds": ("seconds", "training seconds")}
    losses = {key: [_curve(s, x, "train_loss") for s in ranked] for key, (x, _) in over.items()}
    tests = {key: [_curve(s, x, "test_metric") for s in ranked] for key, (x, _) in over.items()}
    figures = {}
    for key, (_, x) in over.items():
        if any(s.x or s.broken for s in tests[key]):
            figures[f"metric_{key}"] = plots.curves(tests[key], x=x, y=quality, target=target, log=log, zoom=True)
        if any(s.x or s.broken for s in losses[key]):
            figures[f"loss_{key}"] = plots.curves(losses[key], x=x, y="Training loss", log=True)
    if {"metric_steps", "metric_seconds"} <= figures.keys():
        figures["race"] = plots.race(tests["steps"], tests["seconds"], y=quality, target=target, log=log)
    if any(s.metric for s in ranked):
        seeds = [
            plots.Series(
                s.name + share(s.metric.count if s.metric else 0, len(s.runs)),
                s.style,
                x=[run.last["test_metric"] for run in s.runs if run.finished],
                y=[s.metric.mean] if s.metric else [],
            )
            for s in ranked
        ]
        figures["seeds"] = plots.ends(seeds, x=quality, log=log)
    tried = [t for s in ranked if (t := _trials(s, results["tuning"])).rates or t.lost] if results["tuning"] else []
    if tried:
        figures["tuning"] = plots.tuning(tried)
    return figures


def _tried(standing: Standing, tuning: dict[str, Any]) -> list[dict[str, Any]]:
    return {printable(name): trials for name, trials in tuning["trials"].items()}.get(standing.name, [])


def _trials(standing: Standing, tuning: dict[str, Any]) -> plots.Trials:
    good, lost = [], []
    for trial in _tried(standing, tuning):
        if (loss := finite(trial["loss"])) is None:
            lost.append(trial["lr"])
        else:
            good.append((trial["lr"], loss))
    chosen = finite(standing.hyperparameters.get("lr"))
    return plots.Trials(standing.name, standing.style, [r for r, _ in good], [v for _, v in good], lost, chosen)


def _page(results: dict[str, Any], ranked: Sequence[Standing], pictures: dict[str, str]) -> str:
    headline, sentence = verdict(results, ranked)
    lost = "".join(f"<li>{text(line)}</li>" for line in lost_runs(ranked))
    aside = f"<aside><strong>Not every run finished.</strong><ul>{lost}</ul></aside>" if lost else ""
    sides = "Solid: quadric’s own; dashed: rivals. " if len({s.ours for s in ranked}) == 2 else ""
    band = "Line: mean; band: lowest to highest seed. " if len(results["seeds"]) > 1 else ""
    cross = "×: where a lost run stopped. " if lost else ""
    legend = f"{sides}{band}{cross}The test axes are fitted to what came after the first quarter of training."
    captions = {
        "metric_seconds": "What a second buys.",
        "metric_steps": "What a step buys.",
        "loss_seconds": "Training loss against training time.",
        "loss_steps": "Training loss against steps.",
    }
    curves = "".join(picture(pictures, name, words) for name, words in captions.items())
    runs = sum(len(s.runs) for s in ranked)
    body = f"""{aside}
<section>
<h2>Result</h2>
{_summary(results, ranked, pictures)}
</section>
<section>
<h2>The race</h2>
<p class="note">{text(legend)}</p>
<div class="plots">{curves or "<p>No run recorded a finite value.</p>"}</div>
</section>
{_tuning(results, ranked, pictures)}
<section>
<h2>How it was measured</h2>
{_method(results)}
</section>
<section>
<h2>Every run</h2>
<details><summary>{runs} {"run" if runs == 1 else "runs"}, and what each optimizer was given</summary>
{_raw(results, ranked)}
</details>
</section>"""
    return document(results, "quadric race", f"{results['model']} on {results['task']}", headline, sentence, body)


def document(results: dict[str, Any], command: str, subject: str, headline: str, sentence: str, body: str) -> str:
    """A whole page, complete in itself.

    Args:
        results: What it is of; gives the day and the note below the headline.
        command: Which command wrote it.
        subject: What it was given.
        headline: What was found.
        sentence: The same with its figures.
        body: Markup of everything below; the other arguments are plain text.
    """
    started = str(results["environment"].get("started", "")).partition(" ")[0]
    eyebrow = " · ".join(filter(None, [command, subject, started]))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(headline)} · {text(command)}</title>
<link rel="icon" href="data:,">
<style>{_css()}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">{text(eyebrow)}</p>
<h1>{text(headline)}</h1>
<p class="lede">{re.sub(r"(?<=[0-9]) (?=%|s )", "&nbsp;", text(sentence))}</p>
<p class="note">{text(results["description"])}</p>
</header>
{body}
</main>
</body>
</html>
"""


def _summary(results: dict[str, Any], ranked: Sequence[Standing], pictures: dict[str, str]) -> str:
    summary = columns(results, ranked)
    head = "".join(f"<th scope=col>{text(c.title)}<small>{text(c.unit)}</small></th>" for c in summary)
    body = ""
    for row, s in enumerate(ranked):
        mark = "<span class=tag>quadric</span>" if s.ours else ""
        cells = "".join(f"<td{' class=best' if row in c.best else ''}>{text(c.cells[row])}</td>" for c in summary[1:])
        name = f"<th scope=row>{swatch(s.style)}{text(s.name)}{mark}</th>"
        body += f"<tr{' class=ours' if s.ours else ''}>{name}{cells}</tr>"
    note = ["Bold on a tint: best of its column." if len(ranked) > 1 else ""]
    note += ["±: standard deviation over seeds." if len(results["seeds"]) > 1 else ""]
    if results["target"] is not None:
        name = printable(results["metric"]["name"])
        note += [f"“to {goal(results)}”: training seconds until the test {name} first got there."]
    if any(spread and spread.count < len(s.runs) for s in ranked for spread in (s.metric, s.reached)):
        note += ["(2/3): a mean over the two of three seeds that finished, or got there."]
    return (
        f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<div class="plots">{picture(pictures, "seeds", "A dot for each seed, a bar at their mean.")}'
        f"<p class=note>{text(' '.join(note))}</p></div>"
    )


def _tuning(results: dict[str, Any], ranked: Sequence[Standing], pictures: dict[str, str]) -> str:
    tuning = results["tuning"]
    if not tuning:
        return ""
    grid = tuning["grid"]
    words = (
        f"The same {len(grid)} learning rates from {number(min(grid))} to {number(max(grid))} for each optimizer, "
        f"{tuning['epochs']} epochs each, judged on validation data under a seed apart from the race’s."
    )
    metric, rows = results["metric"], ""
    for s in ranked:
        tried = _tried(s, tuning)
        chosen = next((t for t in tried if t["lr"] == s.hyperparameters.get("lr")), {"loss": None, "metric": None})
        lost = sum(finite(t["loss"]) is None for t in tried)
        cells = [number(finite(s.hyperparameters.get("lr"))), number(finite(chosen["loss"]))]
        cells += [number(finite(chosen["metric"]), 4), f"{lost} of {len(tried)}"]
        rows += f"<tr><th scope=row>{swatch(s.style)}{text(s.name)}</th>"
        rows += "".join(f"<td>{text(cell)}</td>" for cell in cells) + "</tr>"
    titles = ["optimizer", "chosen lr", "validation loss", f"{metric['name']}{unit_of(metric)}", "lost"]
    head = "".join(f"<th scope=col>{text(title)}</th>" for title in titles)
    edge = [s.name for s in ranked if s.hyperparameters.get("lr") in (min(grid), max(grid))]
    notes = [f"{', '.join(edge)}: chosen at the edge of the grid; a better rate may lie beyond it."] if edge else []
    refused: dict[tuple[str, str], list[str]] = {}
    for name, trial in ((s.name, trial) for s in ranked for trial in _tried(s, tuning) if trial["error"] is not None):
        refused.setdefault((name, trial["error"]), []).append(number(trial["lr"]))
    notes += [f"{name} at {', '.join(rates)}: {error}" for (name, error), rates in refused.items()]
    caption = "Validation loss against learning rate. Ring: the rate chosen. × at the top: lost, or far off the scale."
    return (
        f'<section><h2>Tuning</h2><p class=note>{text(words)}</p><div class="plots">'
        f'{picture(pictures, "tuning", caption)}<div class="scroll"><table class="small">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"{''.join(f'<p class=note>{text(note)}</p>' for note in notes)}</div></div></section>"
    )


def _method(results: dict[str, Any]) -> str:
    facts = {
        "Task": text(results["description"]),
        "Budget": text(
            f"{results['epochs']} epochs = {results['steps']:,} steps of batch size {results['batch_size']}, "
            f"{results['schedule']} schedule, the same for every optimizer"
        ),
        "Seeds": text(
            ", ".join(map(str, results["seeds"])) + ": each optimizer starts from the same weights and batches"
        ),
        "Seconds": "Training alone: forward, backward and optimizer step. Evaluation is not counted.",
        "Step": "Median milliseconds of one whole training step, mean over the seeds.",
        "Memory": "Tensors the optimizer keeps between steps, in 10⁶ bytes.",
        "A win": "The means differ by more than √(σ₁² + σ₂²), σ the standard deviations over seeds; else a tie.",
    }
    return how_measured(results, facts)


def how_measured(results: dict[str, Any], facts: dict[str, str]) -> str:
    """A list of terms and their markup, between the command and the environment it ran in."""
    environment = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    every = {
        "Command": f"<code>{text(results['command'])}</code>",
        **facts,
        "Environment": text(f"quadric {results['quadric']}, {environment}"),
    }
    return "<dl>" + "".join(f"<dt>{term}</dt><dd>{words}</dd>" for term, words in every.items()) + "</dl>"


def _raw(results: dict[str, Any], ranked: Sequence[Standing]) -> str:
    titles = ["optimizer", "seed", "outcome", "steps", "train loss", "test loss", results["metric"]["name"], "seconds"]
    titles += ["to target", "step ms", "memory MB"]
    body = ""
    for s in ranked:
        for run in s.runs:
            losses = [number(finite(run.last[key]), 5) for key in ("train_loss", "test_loss", "test_metric")]
            costs = [number(value, 4) for value in (run.seconds, run.reached, run.step_ms, run.memory)]
            cells = [run.seed, run.words, run.steps, *losses, *costs]
            body += f"<tr><th scope=row>{swatch(s.style)}{text(s.name)}</th>"
            body += (
                "".join(f"<td{' class=words' if i == 1 else ''}>{text(c)}</td>" for i, c in enumerate(cells)) + "</tr>"
            )
    head = "".join(
        f"<th scope=col{' class=words' if title == 'outcome' else ''}>{text(title)}</th>" for title in titles
    )
    given = ""
    for s in ranked:
        words = ", ".join(f"{key}={value}" for key, value in s.hyperparameters.items())
        given += f"<dt>{text(s.name)}</dt><dd><code>{text(words)}</code></dd>"
    table = f"<table class=small><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div><dl>{given}</dl>"


def picture(pictures: dict[str, str], name: str, caption: str) -> str:
    """A picture with its caption, or nothing where there is none."""
    if name not in pictures:
        return ""
    markup = pictures[name].replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    return f"<figure>{markup}<figcaption>{text(caption)}</figcaption></figure>"


def swatch(style: plots.Style) -> str:
    """A short piece of an optimizer's line."""
    dashes = " ".join(f"{2 * d:g}" for d in style.dashes)
    return (
        f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path d="M1 4H27" '
        f'stroke="var(--{style.key})" stroke-width="2.5" stroke-dasharray="{dashes}"/></svg>'
    )


def text(value: Any) -> str:
    """Anything as markup that shows it as it is."""
    return html.escape(printable(value))


def _css() -> str:
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in plots.THEME.items()) for i in (0, 1))
    night = f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return f":root{{color-scheme:light dark;{light}}}{night}{_RULES}"


# Dark colours are for screens alone, and a fold opens on paper: what is printed is complete and on white.
_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:72rem;margin:0 auto;padding:clamp(1.5rem,5vw,4.5rem) clamp(1rem,4vw,3rem)}
section{margin-top:clamp(2.5rem,6vw,4.5rem)}
h1,h2,.lede{font-family:Charter,"Iowan Old Style","Source Serif Pro",Georgia,serif;text-wrap:balance}
h1{font-size:clamp(2rem,5.5vw,3.4rem);line-height:1.1;font-weight:600;letter-spacing:-.015em;margin:.2em 0 .4em}
h2{font-size:1.55rem;font-weight:600;margin:0 0 .8rem}
.lede{font-size:clamp(1.15rem,2.4vw,1.45rem);line-height:1.5;max-width:44rem;margin:0 0 1.2rem;text-wrap:pretty}
.eyebrow,.note,figcaption,dt{color:var(--muted)}
.eyebrow{margin:0;font-size:.875rem;letter-spacing:.03em}
.note{font-size:.9rem;max-width:46rem;margin:.6rem 0 1.4rem}
aside{border-left:3px solid var(--ours-1);padding:.2rem 0 .2rem 1.1rem;margin:2rem 0 0;font-size:.95rem}
aside ul{margin:.3rem 0;padding-left:1.1rem}
.scroll{overflow-x:auto;min-width:0}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th,td{padding:.55rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{font-weight:500;color:var(--muted);vertical-align:bottom;line-height:1.3;border-bottom:1px solid var(--muted)}
thead small{display:block;font-size:.8rem;min-height:1.3em}
th:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:var(--paper)}
tbody th{font-weight:400}
.ours th:first-child{font-weight:600}
.best{font-weight:700;background:color-mix(in srgb,var(--ours-2) 14%,transparent)}
.words{text-align:left;white-space:normal;min-width:9rem}
.small{font-size:.82rem;width:auto}.small :is(th,td){padding:.4rem .5rem}
.small th:first-child{padding-left:0}.small thead th{white-space:normal}
.tag{font-size:.72rem;font-weight:500;color:var(--muted);border:1px solid var(--grid);border-radius:1em;
  padding:.05em .6em;margin-left:.6em;vertical-align:.1em}
.swatch{width:28px;height:8px;margin-right:.6rem;vertical-align:.08em;fill:none}
.plots{margin-top:1.6rem;align-items:start;display:grid;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,27rem),1fr));gap:2.2rem 2.5rem}
figure{margin:0;break-inside:avoid;max-width:36rem}
.wide figure{max-width:none}
figure>svg{display:block;width:100%;height:auto}
figure text{font-family:inherit!important}
figcaption{font-size:.85rem;margin-top:.4rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.5rem 1.6rem;margin:1rem 0;font-size:.95rem}
dd{margin:0;overflow-wrap:anywhere}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
summary{cursor:pointer;margin-bottom:1rem}
@media (max-width:34rem){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.8rem}.tag{display:none}
  table{font-size:.85rem}.swatch{width:20px;margin-right:.35rem}th,td{padding:.5rem .45rem}}
@media print{body{font-size:11px}main{padding:0;max-width:none}section{margin-top:2rem}.scroll{overflow:visible}
  th,td{padding:.3rem .4rem}.plots{grid-template-columns:1fr 1fr}tr,.note{break-inside:avoid}
  h2,section>.note{break-after:avoid}
  .small{font-size:.75rem}.small :is(th,td){padding:.25rem .3rem}.swatch{width:18px;margin-right:.3rem}
  details::details-content{content-visibility:visible;display:block;height:auto}}
"""
