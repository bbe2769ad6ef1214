"""Pictures: curves with seed bands, where each seed ended, what was tuned, estimates beside exact values, layers.

Nothing here knows a results file. A picture is a function of the `Series` it draws; `svg` and `png` turn a picture
into bytes, and `inline` turns an SVG into markup that takes its colours from the page around it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from sklearn.isotonic import isotonic_regression

# name → (colour on light, colour on dark). Every light colour occurs once: `inline` finds them again by value.
# The hues are those of Okabe and Ito, told apart under the common colour deficiencies; rivals take the quieter ones
# and are dashed, so that colour never carries a distinction alone.
THEME = {
    "ink": ("#1f2328", "#e6e9ed"),
    "muted": ("#66707b", "#98a2ad"),
    "grid": ("#e3e6ea", "#2e353d"),
    "paper": ("#fefefe", "#14181d"),
    "ours-0": ("#0072b2", "#4aa8e8"),
    "ours-1": ("#d55e00", "#ff8f4a"),
    "ours-2": ("#00916a", "#2fc79b"),
    "ours-3": ("#8a4fa8", "#c79be6"),
    "ours-4": ("#a3123a", "#ff7a9c"),
    "rival-0": ("#7b8794", "#a3aeba"),
    "rival-1": ("#b98500", "#e3b341"),
    "rival-2": ("#cc79a7", "#e6a5c8"),
    "rival-3": ("#3fa0d0", "#7fcbf2"),
}
INK, MUTED, GRID = (THEME[name][0] for name in ("ink", "muted", "grid"))
_DASHES = ((4, 1.6), (1.4, 1.4), (6, 1.6, 1.4, 1.6), (8, 2))
_WIDTH, _HEIGHT = 5.2, 3.3  # inches; at this width the 9 point letters are still legible on a phone
_SMALL, _NORMAL = 9.0, 10.0
_LINEAR = 0.6  # decades that the linear part of a symmetric logarithmic axis is as long as


@dataclass(frozen=True)
class Style:
    """How one optimizer looks in every picture: a colour of `THEME` and, for rivals, dashes in units of line width."""

    key: str
    dashes: tuple[float, ...] = ()

    @property
    def colour(self) -> str:
        """The colour on a light ground."""
        return THEME[self.key][0]

    @property
    def line(self) -> str | tuple[float, tuple[float, ...]]:
        """The same dashes in matplotlib's words."""
        return (0, self.dashes) if self.dashes else "-"


def styles(ours: Sequence[bool]) -> list[Style]:
    """One style for each optimizer, in order; beyond the palette colours repeat.

    Args:
        ours: Which of them are this library's.
    """
    given, result = {True: 0, False: 0}, []
    for mine in ours:
        i = given[mine]
        given[mine] += 1
        result.append(Style(f"ours-{i % 5}") if mine else Style(f"rival-{i % 4}", _DASHES[i % 4]))
    return result


@dataclass(frozen=True)
class Series:
    """What a picture shows of one optimizer.

    Args:
        label: Its name.
        style: Its look.
        x: Horizontal positions.
        y: Mean over the seeds.
        low: Lowest seed.
        high: Highest seed.
        broken: The runs that did not finish, as (x, y) each.
    """

    label: str
    style: Style
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    broken: list[tuple[list[float], list[float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Trials:
    """The learning rates tried for one optimizer: those with a loss, those without, and the one chosen."""

    label: str
    style: Style
    rates: list[float]
    losses: list[float]
    lost: list[float]
    chosen: float | None


@contextmanager
def settings() -> Iterator[None]:
    """Draw and save inside this: the reader's own matplotlibrc must not change a report, nor a report the reader's."""
    wanted: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": _SMALL,
        "text.usetex": False,
        "svg.fonttype": "none",  # letters stay letters: small files, and the page's own font
        "svg.hashsalt": "quadric",
    }
    with matplotlib.rc_context(wanted), warnings.catch_warnings():
        # A name in a script the bundled font lacks: boxes in the PNG, but a browser has the letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def curves(
    series: Sequence[Series], *, x: str, y: str, target: float | None = None, log: bool = False, zoom: bool = False
) -> Figure:
    """Mean lines with seed bands, each labelled at its end.

    Args:
        series: What to draw.
        x: Name of the horizontal axis; anything but "steps" turns logarithmic where the last values differ much.
        y: Name of the vertical axis.
        target: A value to mark with a line.
        log: Use a logarithmic vertical axis if all is positive and spans enough.
        zoom: Fit the vertical axis to the values after the first quarter.
    """
    figure, (axes,) = _figure(1)
    _draw_curves(axes, series, x=x, y=y, target=target, log=log, zoom=zoom)
    return figure


def race(left: Sequence[Series], right: Sequence[Series], *, y: str, target: float | None, log: bool) -> Figure:
    """The same quantity over steps and over seconds, side by side."""
    figure, (a, b) = _figure(2)
    _draw_curves(a, left, x="steps", y=y, target=target, log=log, zoom=True, named=False)
    _draw_curves(b, right, x="training seconds", y=y, target=target, log=log, zoom=True)
    return figure


def _draw_curves(
    axes: Axes,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    target: float | None,
    log: bool,
    zoom: bool,
    named: bool = True,
) -> None:
    low, high = _window(series, target, zoom)
    log = log and low > 0 and high > 5 * low
    if log:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, low, high)
    bottom, top = _widened(low, high, log)
    axes.set_ylim(bottom, top)
    paths = [s.x for s in series if s.x] + [xs for s in series for xs, _ in s.broken]
    first, last = min(xs[0] for xs in paths), [xs[-1] for xs in paths]
    if x != "steps" and first > 0 and max(last) > 8 * min(last):
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, first, max(last))
    else:
        axes.set_xlim(0, max(last) * 1.02 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if target is not None:
        axes.axhline(target, color=MUTED, lw=0.9, ls=(0, (2, 2)), zorder=1)
        # Above the axes: anywhere on the line it could lie on a curve.
        axes.set_title(f"dotted: {target:g}, the target", loc="right", color=MUTED, fontsize=_SMALL - 1, pad=9)
    band = min(0.15, 0.6 / len(series))  # seven bands on top of each other would drown the lines
    for s in series:
        colour = s.style.colour
        for xs, ys in s.broken:
            axes.plot(xs, ys, color=colour, lw=0.9, ls=s.style.line, alpha=0.7)
            axes.plot(xs[-1:], [min(max(ys[-1], bottom), top)], "x", color=colour, ms=6, mew=1.6, clip_on=False)
        if s.x:
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=band, lw=0)
            axes.plot(s.x, s.y, color=colour, lw=1.8, ls=s.style.line)
            axes.plot(s.x[-1:], s.y[-1:], "o", color=colour, ms=3.6)
    _dress(axes, x, y)
    if named:
        _label_ends(axes, series)


def ends(series: Sequence[Series], *, x: str, title: str = "Where each seed ended", log: bool = False) -> Figure:
    """One row for each optimizer or method: a dot for each seed, a bar at the mean.

    Args:
        series: `x` the seeds' values, `y` their mean; both empty if none finished.
        x: Name of the horizontal axis.
        title: What stands above.
        log: Make it logarithmic if all is positive and spans much.
    """
    figure, (axes,) = _figure(1)
    values = [v for s in series for v in s.x]
    if log and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, min(values), max(values))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for row, s in enumerate(series):
        if s.x:
            axes.plot([min(s.x), max(s.x)], [row, row], color=s.style.colour, lw=1.2, alpha=0.5)
            axes.plot(s.x, [row] * len(s.x), "o", color=s.style.colour, ms=6, alpha=0.75, mew=0)
            axes.plot(s.y, [row] * len(s.y), "|", color=s.style.colour, ms=17, mew=2.2)
    _dress(axes, x, title)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.grid(visible=False, axis="y")
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_yticks(range(len(series)), [_short(s.label) for s in series], color=INK, parse_math=False)
    return figure


def tuning(trials: Sequence[Trials]) -> Figure:
    """Validation loss against learning rate, a panel for each optimizer, with the others faint behind it.

    Losses beyond a hundred times the best are drawn with the diverged ones, as crosses at the top.
    """
    best = min((loss for t in trials for loss in t.losses), default=1.0)
    roof = best * 100 if best > 0 else math.inf
    kept = [[(r, v) for r, v in zip(t.rates, t.losses, strict=True) if v <= roof] for t in trials]
    lost = [[*t.lost, *(r for r, v in zip(t.rates, t.losses, strict=True) if v > roof)] for t in trials]
    values, rates = [v for k in kept for _, v in k], [r for t in trials for r in [*t.rates, *t.lost]]
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    logarithmic = low > 0
    columns = min(2, len(trials))
    rows = -(-len(trials) // columns)
    roomy = ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.06)
    figure = Figure((_WIDTH, 0.5 + 1.6 * rows), layout=roomy)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, (axes, t) in enumerate(zip(panels, trials, strict=False)):
        if logarithmic:
            axes.set_yscale("log")
            _log_ticks(axes.yaxis, low, high)
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, min(rates), max(rates), most=6)  # a narrow panel
        for k in kept:
            axes.plot([r for r, _ in k], [v for _, v in k], color=GRID, lw=1.2)
        axes.plot(*_columns(kept[i]), color=t.style.colour, lw=1.6, ls=t.style.line, marker="o", ms=3.4)
        axes.plot(
            lost[i],
            [0.93] * len(lost[i]),
            "x",
            color=t.style.colour,
            ms=6,
            mew=1.6,
            transform=axes.get_xaxis_transform(),
        )
        ring = [(r, v) for r, v in kept[i] if r == t.chosen]
        axes.plot(*_columns(ring), "o", ms=9, mfc="none", mec=INK, mew=1.3)
        _dress(axes, "learning rate" if i + columns >= len(trials) else "", _short(t.label))
        axes.tick_params(labelbottom=i + columns >= len(trials))
        axes.set_xlim(*_widened(min(rates), max(rates), True))
        axes.set_ylim(_widened(low, high, logarithmic, 0.15)[0], _widened(low, high, logarithmic, 0.3)[1])
    for axes in panels[len(trials) :]:
        axes.set_visible(False)
    return figure


@dataclass(frozen=True)
class Guess:
    """What an estimate says of some entries of a diagonal.

    Args:
        label: Its name.
        style: Its look.
        marker: Its mark, in matplotlib's letters.
        filled: Whether the mark is.
        note: What stands below its name.
        exact: The exact values.
        values: The estimate of each.
        errors: Its relative error on each tensor; None where there is none.
    """

    label: str
    style: Style
    marker: str
    filled: bool
    note: str
    exact: list[float]
    values: list[float]
    errors: list[float | None]


def agreement(guesses: Sequence[Guess], colours: Mapping[str, Style]) -> Figure:
    """Estimate against exact value, a panel for each estimate, all on the same symmetric logarithmic axes.

    Both axes are linear about zero, where a fifth of the exact values that are not zero lie.

    Args:
        guesses: What to draw.
        colours: What a colour means; told where a panel is free.
    """
    sizes = sorted(abs(v) for v in guesses[0].exact if v)
    largest = max((abs(v) for g in guesses for v in (*g.exact, *g.values)), default=0.0) or 1.0
    linear = max(sizes[len(sizes) // 5] if sizes else largest, largest * 1e-5)
    linear = 10.0 ** math.floor(math.log10(linear))
    reach = 2 * max(largest, linear)
    # Values below zero get their half of an axis only where there are any.
    left, bottom = (
        -reach if min(values, default=0.0) < -linear else -linear / 2
        for values in (guesses[0].exact, [v for g in guesses for v in (*g.exact, *g.values)])
    )
    columns = 4
    rows = -(-len(guesses) // columns)
    figure = Figure((9.0, 0.3 + 2.55 * rows), layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.05))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(guesses) :]:
        axes.set_axis_off()
    if len(panels) > len(guesses):
        marks = [Line2D([], [], marker="o", ls="", ms=7, color=style.colour) for style in colours.values()]
        marks.append(Line2D([], [], color=MUTED, lw=0.9))
        legend = panels[-1].legend(
            marks, [*colours, "exact"], title="estimate of", loc="center left", frameon=False, labelcolor=INK,
            fontsize=_NORMAL, title_fontsize=_NORMAL, alignment="left",
        )  # fmt: skip
        legend.get_title().set_color(INK)
    for i, axes in enumerate(panels[: len(guesses)]):
        guess, below = guesses[i], i + columns >= len(guesses)
        for axis, scale, floor in ((axes.xaxis, axes.set_xscale, left), (axes.yaxis, axes.set_yscale, bottom)):
            scale("symlog", linthresh=linear, linscale=_LINEAR)
            axis.set_major_locator(FixedLocator(_symmetric_ticks(floor, reach, linear)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: _signed_power(value)))
        axes.plot([-reach, reach], [-reach, reach], color=MUTED, lw=0.9, zorder=1)
        colour = guess.style.colour
        look: dict[str, Any] = {"mfc": colour if guess.filled else "none", "mew": 0 if guess.filled else 0.7}
        axes.plot(guess.exact, guess.values, guess.marker, ms=3, mec=colour, alpha=0.55, zorder=2, **look)
        _dress(axes, "exact" if below else "", "")
        axes.set_title(f"{_short(guess.label)}\n", loc="left", fontsize=_NORMAL, color=INK, pad=5, parse_math=False)
        axes.text(0, 1.03, guess.note, transform=axes.transAxes, fontsize=_SMALL - 1, color=MUTED, parse_math=False)
        axes.grid(axis="both", color=GRID, lw=0.8)
        axes.set_xlim(left, reach)
        axes.set_ylim(bottom, reach)
        axes.tick_params(labelbottom=below, labelleft=i % columns == 0)
    return figure


def errors(names: Sequence[str], guesses: Sequence[Guess]) -> Figure:
    """Relative error of each estimate on each tensor, a row a tensor, the first estimate on top of the others.

    Errors off the axis are drawn at its ends.
    """
    low, high = 1e-3, 1e2
    marks = [
        Marks(g.label, g.style, g.marker, g.filled, [None if e is None else min(max(e, low), high) for e in g.errors])
        for g in guesses
    ]
    figure, axes = _rows(names, marks, x="relative L1 error (dotted: predicting zero)")
    axes.set_xscale("log")
    axes.axvline(1, color=MUTED, lw=0.9, ls=(0, (2, 2)), zorder=1)
    _log_ticks(axes.xaxis, low, high)
    axes.set_xlim(low, high)
    return figure


@dataclass(frozen=True)
class Marks:
    """A value of somebody for each of several rows.

    Args:
        label: Its name.
        style: Its look.
        marker: Its mark, in matplotlib's letters.
        filled: Whether the mark is.
        values: One for each row; None where there is none.
    """

    label: str
    style: Style
    marker: str
    filled: bool
    values: list[float | None]


def sparsity_by_layer(names: Sequence[str], marks: Sequence[Marks], whole: float) -> Figure:
    """How much of each layer is gone under each method, a row a layer, and in it the methods from top to bottom.

    Args:
        names: Of the layers.
        marks: Per cent removed of each.
        whole: Per cent removed of all together, marked by a line.
    """
    figure, axes = _rows(names, marks, x=f"weights removed, % (dotted: {whole:.4g} of all)", height=0.36, reach=0.28)
    axes.axvline(whole, color=MUTED, lw=0.9, ls=(0, (2, 2)), zorder=1)
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def _rows(
    names: Sequence[str], marks: Sequence[Marks], x: str, height: float = 0.24, reach: float = 0.0
) -> tuple[Figure, Axes]:
    # Marks of one row stand on its line, or up to `reach` rows above and below, where they would hide one another.
    figure = Figure((_WIDTH, 1.4 + height * len(names)), layout="constrained")
    axes = figure.subplots()
    for place, m in enumerate(marks):
        aside = reach * (2 * place / (len(marks) - 1) - 1) if len(marks) > 1 else 0.0
        shown = [(value, row + aside) for row, value in enumerate(m.values) if value is not None]
        colour = m.style.colour
        axes.plot(
            *_columns(shown), m.marker, color=colour, mfc=colour if m.filled else "none", mec=colour, ms=5.5,
            mew=1.2, alpha=0.85, clip_on=False, label=m.label, zorder=3 - place / len(marks),
        )  # fmt: skip
    _dress(axes, "", "")
    axes.grid(axis="both", color=GRID, lw=0.8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [_end(name) for name in names], color=INK, parse_math=False)
    axes.tick_params(axis="y", pad=8)  # beside a mark on the edge
    axes.set_xlabel(x, color=MUTED, fontsize=_SMALL)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=_SMALL, labelcolor=INK)
    return figure, axes


def against_sparsity(series: Sequence[Series], *, y: str, dense: float | None) -> Figure:
    """A line with a band over the seeds for each method, over the share of weights removed, and one for none removed.

    Args:
        series: What to draw; `x` in per cent.
        y: Name of the vertical axis.
        dense: The value before anything is removed.
    """
    figure, (axes,) = _figure(1)
    values = [v for s in series for v in [*s.low, *s.high]] + ([] if dense is None else [dense])
    axes.set_ylim(*_widened(min(values), max(values), False))
    places = sorted({x for s in series for x in s.x})
    axes.set_xlim(*_widened(places[0], places[-1], False, 0.03))
    apart = (places[-1] - places[0]) / 14
    ticks = [x for i, x in enumerate(places) if i in (0, len(places) - 1) or x - places[i - 1] >= apart]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    if dense is not None:
        axes.axhline(dense, color=MUTED, lw=0.9, ls=(0, (2, 2)), zorder=1)
        axes.set_title(f"dotted: {dense:.4g}, nothing removed", loc="right", color=MUTED, fontsize=_SMALL - 1, pad=9)
    for place, s in enumerate(series):
        colour, front = s.style.colour, 3 - place / len(series)
        axes.fill_between(s.x, s.low, s.high, color=colour, alpha=min(0.15, 0.6 / len(series)), lw=0)
        axes.plot(s.x, s.y, color=colour, lw=1.8, ls=s.style.line, marker="o", ms=3.6, zorder=front)
    _dress(axes, "weights removed, %", y)
    _label_ends(axes, series)
    return figure


def svg(figure: Figure) -> str:
    """The picture as an SVG document, the same bytes for the same picture."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The picture as a PNG, sharp on a dense screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()


def inline(document: str, prefix: str) -> str:
    """Markup of an SVG document for use inside a page: the page's font and colours, identifiers of its own.

    Args:
        document: What `svg` returned.
        prefix: Distinguishes its identifiers from those of other pictures on the page.
    """
    markup = document[document.index("<svg") :].strip()
    markup = re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", markup)  # the page decides how large it is
    markup = markup.replace("xlink:href", "href")
    # The figure's and the axes' own grounds are drawn first, each as one patch; the page shows through instead.
    markup = re.sub(r'style="fill: #ffffff"', 'style="fill: none"', markup)
    for name, (light, _) in THEME.items():
        markup = markup.replace(f": {light}", f": var(--{name})")
    markup = re.sub(r"'DejaVu Sans',[^;\"]*", "sans-serif", markup)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", markup)


def spread_out(positions: Sequence[float], gap: float, top: float = math.inf) -> list[float]:
    """Move positions apart until neighbours are `gap` from each other, none above `top`, as little as can be in square.

    >>> spread_out([0.0, 5.0, 5.0], 1.0), spread_out([0.0, 5.0, 5.0], 1.0, top=5.0)
    ([0.0, 4.5, 5.5], [0.0, 4.0, 5.0])
    """
    order = np.argsort(positions, kind="stable")
    apart = gap * np.arange(len(order))
    moved = np.empty(len(order))
    # With i·gap taken off, "apart by gap" reads "not decreasing".
    moved[order] = isotonic_regression(np.asarray(positions)[order] - apart, y_max=top - apart[-1]) + apart
    return moved.tolist()


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure((_WIDTH if columns == 1 else 9.0, _HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False).ravel())


def _window(series: Sequence[Series], target: float | None, zoom: bool) -> tuple[float, float]:
    # The first quarter of a training runs through values nobody compares; curves enter the window from outside.
    start = 0.25 if zoom else 0.0
    values = [v for s in series for band in (s.low, s.high) for v in band[int(len(band) * start) :]]
    values = sorted(values or [v for s in series for _, ys in s.broken for v in ys])
    cut = len(values) // 20 if zoom else 0
    kept = [*values[cut : len(values) - cut], *(v for s in series for v in [*s.low[-1:], *s.high[-1:]])]
    kept += [] if target is None else [target]
    return min(kept), max(kept)


def _widened(low: float, high: float, log: bool, share: float = 0.06) -> tuple[float, float]:
    if log:
        a, b = _widened(math.log10(low), math.log10(high), False, share)
        return 10**a, 10**b
    margin = share * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _log_ticks(axis, low: float, high: float, most: int = 8) -> None:
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=most))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value) if decades > 3 else f"{value:g}"))


def _symmetric_ticks(floor: float, reach: float, linear: float) -> list[float]:
    # Zero and powers of ten outside the linear part, as many as stand a fifth of the axis apart.
    first, last = round(math.log10(linear)), math.floor(math.log10(reach))
    middle = _LINEAR / 0.9  # the linear part on one side, in decades: matplotlib's linscale over 1 − 1/base
    sides = 2.0 if floor < -linear else 1.0
    gap = sides * (math.log10(reach / linear) + middle) / 5
    powers = []
    for k in range(last, first - 1, -1):
        place = k - first + middle
        if place >= gap and (not powers or powers[-1] - k >= gap):
            powers.append(k)
    ticks = [10.0**k for k in powers]
    return sorted([0.0, *ticks, *(-tick for tick in ticks if -tick > floor)])


def _signed_power(value: float) -> str:
    return "0" if value == 0 else ("−" if value < 0 else "") + _power(abs(value))


def _power(value: float) -> str:
    # Of ten, in letters that every font has: "1e-05" and "0.0001" side by side would run into each other.
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_title(y, loc="left", fontsize=_NORMAL, color=INK, pad=9, parse_math=False)
    axes.set_xlabel(x, color=MUTED, fontsize=_SMALL, parse_math=False)
    axes.tick_params(colors=MUTED, labelsize=_SMALL, length=0)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.spines["bottom"].set_linewidth(0.8)


def _label_ends(axes: Axes, series: Sequence[Series]) -> None:
    # Names stand right of the axes, in the order of the curves' ends, each tied to its end by a hair line.
    tips = [
        (s, s.x[-1], s.y[-1]) if s.x else (s, s.broken[0][0][-1], s.broken[0][1][-1]) for s in series if s.x or s.broken
    ]
    bottom, top = axes.get_ylim()
    scale = math.log if axes.get_yscale() == "log" else float
    inside = [min(max(y, bottom), top) for _, _, y in tips]
    heights = [(scale(y) - scale(bottom)) / (scale(top) - scale(bottom)) for y in inside]
    places = spread_out(heights, 1.35 * _SMALL / (0.78 * 72 * _HEIGHT), top=1.0)
    for (s, x, _), y, place in zip(tips, inside, places, strict=True):
        hair = {"arrowstyle": "-", "color": s.style.colour, "lw": 0.8, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(
            _short(s.label), (x, y), xytext=(1.06, place), textcoords="axes fraction", va="center", color=INK,
            fontsize=_SMALL, arrowprops=hair, annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _short(label: str) -> str:
    return label if len(label) <= 22 else label[:21] + "…"


def _end(name: str) -> str:
    # Names of tensors differ where they end.
    return name if len(name) <= 28 else "…" + name[-27:]


def _columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]
