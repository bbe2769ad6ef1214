"""The report of a race: its page, its table and the curves it draws."""

import copy
import io
import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest
from pages import Page
from races import FIELD, made_up_race, short_race
from rich.console import Console

from quadric.lab import plots
from quadric.lab.report import _curve, results_table, write_report
from quadric.lab.standings import standings, verdict


@pytest.fixture(scope="module")
def race():
    """Six optimizers, one of whose runs diverged on the way."""
    results = made_up_race()
    run = results["entrants"][4]["runs"][1]
    run.update(diverged=True, seconds=None, steps=210)
    del run["history"][9:]
    run["history"][-1].update(train_loss=None, test_loss=None, test_metric=None)
    return results


@pytest.fixture(scope="module")
def folder(race, tmp_path_factory):
    folder = tmp_path_factory.mktemp("race") / "not" / "there" / "yet"
    assert write_report(race, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class TestPage:
    def test_is_well_formed_and_asks_nothing_of_the_outside(self, page):
        parsed = Page(page)
        assert parsed.outside == []
        assert "script" not in parsed.tags
        assert "http" not in page
        assert re.findall(r"@import|url\((?!#)", page) == []

    def test_identifiers_are_unique_and_every_reference_resolves(self, page):
        ids = Page(page).ids
        assert len(set(ids)) == len(ids)
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
        assert used
        assert used <= set(ids)

    def test_every_picture_stands_in_it_and_beside_it(self, page, folder):
        names = {"metric_steps", "metric_seconds", "loss_steps", "loss_seconds", "seeds", "tuning", "race"}
        assert {p.stem for p in folder.glob("*.svg")} == {p.stem for p in folder.glob("*.png")} == names
        assert Page(page).tags.count("figure") == 6  # all but "race", which is two of them side by side
        for path in folder.glob("*.svg"):
            assert ElementTree.parse(path).getroot().tag.endswith("svg")

    def test_says_the_verdict_and_who_was_lost(self, page, race):
        headline, _ = verdict(race, standings(race))
        words = " ".join(Page(page).words)
        assert f"<h1>{headline}</h1>" in page
        assert "Ginger, seed 1: diverged after step 210" in words
        assert "97.64 ± 0.19 (2/3)" in words

    def test_holds_every_run_and_every_given(self, page):
        raw = page[page.index("<details>") :]
        assert raw.count("<tr>") == 1 + 18
        assert "lr=0.003, weight_decay=0.0" in raw

    def test_takes_its_colours_from_the_page_so_that_the_dark_one_is_legible(self, page):
        body = page[page.index("<body>") :]
        assert "var(--ours-0)" in body
        assert re.findall(r": #[0-9a-f]{6}", body) == []
        for name in set(re.findall(r"var\(--([a-z0-9-]+)\)", page)):
            assert name in plots.THEME

    def test_same_results_same_bytes(self, race, folder, tmp_path):
        write_report(race, tmp_path)
        assert [p.name for p in sorted(tmp_path.iterdir())] == [p.name for p in sorted(folder.iterdir())]
        for path in tmp_path.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()

    def test_leaves_matplotlib_and_the_results_as_they_were(self, race, tmp_path):
        small = short_race({"A": (True, [90.0, 91.0])})
        kept, settings = copy.deepcopy(small), dict(matplotlib.rcParams)
        write_report(small, tmp_path)
        assert small == kept
        assert dict(matplotlib.rcParams) == settings

    def test_warns_of_a_choice_at_the_edge_of_the_grid(self, page):
        assert "SGD: chosen at the edge of the grid" in page


HOSTILE = '漢<b>$\\alpha$ [red]& "é\n\x00\ud800 and very long indeed'
SHOWN = '漢<b>$\\alpha$ [red]& "é �� and very long indeed'


def hostile():
    race = made_up_race(names=("MFAC", "SGD"), seeds=2, epochs=2)
    race["tuning"]["trials"][HOSTILE] = race["tuning"]["trials"].pop("MFAC")
    race["entrants"][0]["name"] = race["task"] = race["description"] = race["command"] = HOSTILE
    race["entrants"][0]["runs"][0]["error"] = "<script>alert(1)</script>"
    race["entrants"][0]["hyperparameters"]["note"] = "<i>"
    race["metric"]["name"] = "a<c $\\no$"
    race["environment"]["device"] = "<u>"
    return race


def all_lost(recorded):
    race = made_up_race(names=("MFAC", "SGD"), seeds=2, epochs=3)
    for run in (run for entrant in race["entrants"] for run in entrant["runs"]):
        run.update(diverged=True, seconds=None, step_ms=None)
        del run["history"][recorded:]
    for trial in (t for trials in race["tuning"]["trials"].values() for t in trials):
        trial.update(diverged=True, loss=None, metric=None)
    return race


def losing_everything_but_time():
    race = short_race({"A": (True, [1e9, 2e9]), "B": (False, [0.5, 0.6])}, higher=False, unit="", target=0.1)
    race["entrants"][0]["runs"][0]["history"][0]["train_loss"] = -1.0
    return race


ODD = {
    "one optimizer, one seed, one evaluation": lambda: short_race({"MFAC": (True, [98.0])}),
    "all diverged at once": lambda: all_lost(0),
    "all diverged on the way": lambda: all_lost(2),
    "hostile text": hostile,
    "lower is better, far apart, never at the target": losing_everything_but_time,
    "a score of zero": lambda: short_race({"A": (True, [0.0, 0.0]), "B": (False, [0.0, 0.0])}, target=0.0),
    "not a number, not yet through JSON": lambda: short_race({"A": (True, [math.nan]), "B": (False, [math.inf])}),
    "more optimizers than colours": lambda: short_race({f"N{i}": (i % 2 == 0, [90.0 + i]) for i in range(14)}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_races_make_a_whole_page_and_table(case, tmp_path):
    race = ODD[case]()
    page = write_report(race, tmp_path).read_text(encoding="utf-8")
    parsed = Page(page)
    assert parsed.outside == []
    assert not {"script", "b", "i", "u"} & set(parsed.tags)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(race))
    shown = console.export_text()
    for entrant in race["entrants"]:
        name = SHOWN if entrant["name"] == HOSTILE else entrant["name"]
        assert name in " ".join(parsed.words)
        assert name[:18] in shown
    for s in standings(race):
        for run in s.runs:
            assert run.finished or f"{s.name}, seed {run.seed}: {run.words}" in " ".join(parsed.words)


class TestTable:
    @pytest.mark.parametrize(("width", "kept"), [(200, 9), (80, 8), (60, 5)])
    def test_fits_its_width_and_keeps_every_name_and_figure_whole(self, race, width, kept):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(results_table(race, width))
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines)
        for name, (ours, *_) in FIELD.items():
            (line,) = [line for line in lines if line.startswith(("◆ " if ours else "  ") + name)]
            figures = line.replace("◆", "").replace("(2/3)", "").split()
            assert len(figures) == kept
            assert "±" in "".join(figures)
        assert "Ginger, seed 1: diverged after step 210" in lines

    def test_marks_the_best(self):
        table = results_table(short_race({"A": (True, [90.0, 90.0]), "B": (False, [80.0, 80.0])}))
        accuracy = [cell.style for cell in table.columns[3].cells]
        assert accuracy == ["bold green", ""]


def test_mean_and_band_run_over_finished_seeds(race):
    ginger = next(s for s in standings(race) if s.name == "Ginger")
    curve = _curve(ginger, "step", "test_metric")
    kept = [run["history"] for i, run in enumerate(race["entrants"][4]["runs"]) if i != 1]
    pairs = [(a["test_metric"], b["test_metric"]) for a, b in zip(*kept, strict=True)]
    assert curve.x == [23 * epoch for epoch in range(1, 31)]
    assert curve.y == pytest.approx([(a + b) / 2 for a, b in pairs])
    assert (curve.low, curve.high) == ([min(p) for p in pairs], [max(p) for p in pairs])
    ((steps, _),) = curve.broken
    assert steps == [23 * epoch for epoch in range(1, 9)]  # the ninth had no finite value


def test_a_gap_in_one_seed_is_a_gap_in_the_mean():
    race = made_up_race(names=("MFAC",), seeds=2, epochs=4, tuned=False)
    race["entrants"][0]["runs"][1]["history"][1]["test_metric"] = None
    curve = _curve(standings(race)[0], "step", "test_metric")
    assert curve.x == [23, 69, 92]
