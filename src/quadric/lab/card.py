"""The card of ``quadric curvature``: a page to read and a table for the terminal, in the look of a race's report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quadric.lab import plots, report
from quadric.lab.standings import printable
from quadric.verify import figure, times

# What an estimate is of decides its colour in every picture, so that a Fisher matrix is not taken for a Hessian.
STYLES = {
    "Hessian": plots.Style("ours-0"),
    "Gauss–Newton": plots.Style("ours-2"),
    "empirical Fisher": plots.Style("ours-1"),
    "neither": plots.Style("rival-0"),
}
MARKERS = {
    "hesscale": ("o", True),
    "gauss_newton": ("s", True),
    "hutchinson": ("o", False),
    "fisher": ("D", True),
    "mfac": ("^", False),
    "ginger": ("v", False),
    "squared_gradient": ("X", True),
}
# What stands above a panel, where it has to be short.
PANELS: dict[str, str] = {
    "gauss_newton": "Gauss–Newton form",
    "fisher": "Empirical Fisher",
    "squared_gradient": "Squared gradient",
}
MOST_POINTS = 400  # of a panel; more only make the page heavy
MOST_ROWS = 40  # tensors in the picture


def card_table(results: dict[str, Any], width: int = 80) -> Table:
    """The card for the terminal: every estimate over the whole model, the closest bold, then its error by tensor.

    Args:
        results: As in card.json.
        width: Characters there are; spare columns are left out until the rest fits.
    """
    card = results["card"]
    headline, sentence = verdict(card)
    lines = [
        sentence,
        *(printable(note) for note in card["notes"]),
        "error: relative L1, zero has 1; time: over forward and backward; bold: closest",
    ]
    for spare in ((), ("rank",), ("rank", "of"), ("rank", "of", "time")):
        table = Table(
            title=Text(headline), caption=Text("\n".join(lines)), caption_justify="left", box=box.SIMPLE_HEAD,
            padding=(0, 1), show_edge=False,
        )  # fmt: skip
        kept = [title for title in ("estimate", "of", "error", "cosine", "rank", "time") if title not in spare]
        for title in kept:
            table.add_column(title, justify="left" if title in ("estimate", "of") else "right", no_wrap=True)
        for e in card["estimates"]:
            cells = _cells(e)
            look = "bold green" if e["key"] == _closest(card)["key"] else ""
            table.add_row(*(Text(cells[title], look) for title in kept))
        if Console(width=1000).measure(table).maximum <= width:
            break
    return table


def write_card(results: dict[str, Any], folder: Path) -> Path:
    """Write `report.html`, complete in itself, and its pictures as PNG and SVG; return the page's path.

    Args:
        results: As in card.json.
        folder: Where to write; made if it is not there.
    """
    return report.write_page(
        folder, lambda: _pictures(results["card"]), lambda pictures: _page(results, pictures), again="repeat"
    )


def verdict(card: dict[str, Any]) -> tuple[str, str]:
    """A headline and a sentence with its figures."""
    best = _closest(card)
    gradient = next(e for e in card["estimates"] if e["key"] == "squared_gradient")
    (error, cosine), (plain_error, plain_cosine) = (
        (_figure(e["score"]["error"]), _figure(e["score"]["cosine"])) for e in (best, gradient)
    )
    headline = f"{best['title']} comes closest to the Hessian’s diagonal"
    sentence = (
        f"Its relative L1 error is {error}, its cosine {cosine}, at {times(best['time'])} the price of forward and "
        f"backward. The squared gradient’s error is {plain_error}, its cosine {plain_cosine}."
    )
    return headline, sentence


def _figure(value: float | None) -> str:
    return figure(value).replace("-", "−")


def _closest(card: dict[str, Any]) -> dict[str, Any]:
    errors = ((e["score"]["error"], e) for e in card["estimates"])
    return min(errors, key=lambda pair: math.inf if pair[0] is None else pair[0])[1]


def _cells(estimate: dict[str, Any]) -> dict[str, str]:
    score = {name: _figure(estimate["score"][name]) for name in ("error", "cosine", "rank")}
    return {"estimate": estimate["title"], "of": estimate["of"], **score, "time": times(estimate["time"])}


def _pictures(card: dict[str, Any]) -> dict[str, Figure]:
    largest = sorted(card["layers"], key=lambda layer: -math.prod(layer["shape"]))[:MOST_ROWS]
    rows = [layer for layer in card["layers"] if layer in largest]
    guesses = []
    for e in card["estimates"]:
        pairs = [
            pair
            for layer in card["layers"]
            for pair in zip(layer["exact"], layer["values"][e["key"]], strict=True)
            if None not in pair
        ]
        pairs = pairs[:: -(-len(pairs) // MOST_POINTS) or 1]
        marker, filled = MARKERS[e["key"]]
        cells = _cells(e)
        guesses.append(
            plots.Guess(
                label=PANELS[e["key"]] if e["key"] in PANELS else e["short"],
                style=STYLES[e["of"]],
                marker=marker,
                filled=filled,
                note=f"error {cells['error']}, cosine {cells['cosine']}",
                exact=[exact for exact, _ in pairs],
                values=[value for _, value in pairs],
                errors=[layer["scores"][e["key"]]["error"] for layer in rows],
            )
        )
    return {
        "exact_estimate": plots.agreement(guesses, STYLES),
        "error_by_tensor": plots.errors([printable(layer["name"]) for layer in rows], guesses),
    }


def _page(results: dict[str, Any], pictures: dict[str, str]) -> str:
    card = results["card"]
    headline, sentence = verdict(card)
    notes = "".join(f"<li>{report.text(note)}</li>" for note in card["notes"])
    aside = f"<aside><strong>Before you believe it.</strong><ul>{notes}</ul></aside>" if notes else ""
    shown = min(len(card["layers"]), MOST_ROWS)
    which = "Every tensor" if shown == len(card["layers"]) else f"The {shown} largest of {len(card['layers'])} tensors"
    where = f"{which}, in the model’s order from top to bottom. Marks at the ends of the axis lie beyond it."
    scatter = "Estimate against exact value of the entries drawn; on the line they agree. Both axes are logarithmic on "
    scatter += "either side of zero. Blue: of the Hessian; green: Gauss–Newton; orange: empirical Fisher."
    body = f"""{aside}
<section>
<h2>Result</h2>
{_summary(card)}
</section>
<section>
<h2>Entry by entry</h2>
<div class="wide">{report.picture(pictures, "exact_estimate", scatter)}</div>
</section>
<section>
<h2>Tensor by tensor</h2>
<div class="plots">{report.picture(pictures, "error_by_tensor", where)}
</div>
<details><summary>Errors as numbers</summary>{_tensors(card)}</details>
</section>
<section>
<h2>How it was measured</h2>
{_method(results)}
</section>"""
    return report.document(results, "quadric curvature", results["subject"], headline, sentence, body)


def _summary(card: dict[str, Any]) -> str:
    titles = {
        "estimate": "",
        "of": "",
        "error": "relative L1",
        "cosine": "of the angle",
        "rank": "Spearman",
        "time": "× step",
    }
    head = "".join(
        f"<th scope=col{' class=words' if title == 'of' else ''}>{title}<small>{unit}</small></th>"
        for title, unit in titles.items()
    )
    body = ""
    for e in card["estimates"]:
        cells = _cells(e)
        best = " class=best" if e is _closest(card) else ""
        name = f"<th scope=row>{report.swatch(STYLES[e['of']])}{report.text(cells['estimate'])}</th>"
        rest = "".join(f"<td{best}>{cells[title]}</td>" for title in ("error", "cosine", "rank", "time"))
        body += f"<tr>{name}<td class=words>{cells['of']}</td>{rest}</tr>"
    note = (
        "“of” says which matrix an estimate is of; all are compared with the Hessian. An error of 1 is that of "
        "predicting zero. Cosine does not see scale, rank does not see any monotone distortion. Bold on a tint: the "
        "smallest error."
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div><p class=note>{note}</p>"


def _tensors(card: dict[str, Any]) -> str:
    titles = ["tensor", "shape", "entries", *(e["short"] for e in card["estimates"])]
    head = "".join(f"<th scope=col>{report.text(title)}</th>" for title in titles)
    body = ""
    for layer in card["layers"]:
        cells = ["×".join(map(str, layer["shape"])) or "1", len(layer["entries"])]
        cells += [_figure(layer["scores"][e["key"]]["error"]) for e in card["estimates"]]
        rest = "".join(f"<td>{report.text(cell)}</td>" for cell in cells)
        body += f"<tr><th scope=row>{report.text(layer['name'])}</th>{rest}</tr>"
    table = f"<table class=small><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def _method(results: dict[str, Any]) -> str:
    card, options = results["card"], results["options"]
    drawn = sum(len(layer["entries"]) for layer in card["layers"])
    facts = {
        "Model": report.text(results["description"]),
        "Exact": f"Second derivatives by autograd in float64, for {drawn:,} of {card['parameters']:,} entries: up to "
        f"{options['entries']} of each tensor, drawn with seed {card['seed']}. In the whole model an entry counts for "
        "as many as it was drawn from.",
        "Hessian": "HesScale carries the diagonal back beside the gradient. Hutchinson averages v ∘ Hv over random "
        "signs v.",
        "Gauss–Newton": "The Hessian without the second derivatives of the model itself; those of the loss remain.",
        "Empirical Fisher": "The mean square of gradients of single examples or micro-batches. It is no Hessian: at "
        "the given labels, gradients of examples that fit vanish, and their curvature need not.",
        "Time": f"Forward pass and everything after it, over forward and backward of the same batch "
        f"({figure(1000 * card['step_seconds'])} ms), measured in turn. In training M-FAC and Ginger learn from the "
        "gradients of past steps and pay none of these.",
    }
    return report.how_measured(results, facts)
