"""The report of a race: its numbers, its words, its page and its pictures."""

import copy
import io
import itertools
import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.text import Text
from rich.console import Console

from quadric.lab import plots
from quadric.lab.report import _curve, columns, number, results_table, standings, verdict, write_report

# name: (ours, learning rate, final error %, seconds an epoch, step ms, memory, speed of learning)
FIELD = {
    "SGD": (False, 0.3, 3.4, 0.050, 0.86, 0.038, 0.5),
    "AdamW": (False, 0.003, 2.6, 0.058, 0.97, 0.077, 0.9),
    "Muon": (False, 0.03, 2.2, 0.118, 2.05, 0.061, 1.1),
    "MFAC": (True, 0.01, 1.9, 0.101, 1.72, 2.5, 1.2),
    "Ginger": (True, 0.01, 2.3, 0.095, 1.61, 0.35, 1.0),
    "BlockMeanAdaGrad": (True, 0.03, 2.5, 0.062, 1.02, 0.039, 0.8),
}
GRID = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]


def made_up_run(rng, seed, epochs, error, epoch_seconds, step_ms, memory, speed):
    final, pace, history, elapsed = error * rng.uniform(0.92, 1.08), speed * rng.uniform(0.95, 1.05), [], 0.0
    for epoch in range(1, epochs + 1):
        elapsed += epoch_seconds * rng.uniform(0.95, 1.05)
        left = math.exp(-pace * epoch * 0.55)
        history.append(
            {
                "step": 23 * epoch,
                "epoch": epoch,
                "seconds": elapsed,
                "lr": 0.01,
                "train_loss": 2.2 * left + 0.6 * math.exp(-pace * epoch * 0.16) * rng.uniform(0.9, 1.1) + 1e-4,
                "test_loss": 2.2 * left + 0.035 * error * rng.uniform(0.97, 1.03),
                "test_metric": 100 - final - 75 * left - 6 * math.exp(-pace * epoch * 0.2) * rng.uniform(0.8, 1.2),
            }
        )
    return {
        "seed": seed,
        "diverged": False,
        "error": None,
        "seconds": elapsed,
        "step_ms": step_ms * rng.uniform(0.98, 1.02),
        "state_mb": memory,
        "history": history,
    }


def made_up_race(names=tuple(FIELD), seeds=3, epochs=30, tuned=True, target=96.0):
    """Results such as a race on digits writes, drawn from a fixed seed."""
    rng = random.Random(7)
    entrants, trials = [], {}
    for name in names:
        ours, lr, *character = FIELD[name]
        runs = [made_up_run(rng, seed, epochs, *character) for seed in range(seeds)]
        entrants.append({"name": name, "ours": ours, "hyperparameters": {"lr": lr, "weight_decay": 0.0}, "runs": runs})
        trials[name] = []
        for rate in GRID:
            off = math.log10(rate / lr)
            lost = off > 1.2 or (ours and off > 0.9)
            loss = None if lost else 0.09 + 0.25 * off**2 * (2.5 if off > 0 else 1) + 0.01 * rng.random()
            trials[name].append(
                {"lr": rate, "loss": loss, "metric": None if lost else 97 - 4 * off**2, "diverged": lost}
            )
    return {
        "quadric": "0.1.0",
        "command": "quadric race --task digits --tune",
        "task": "digits",
        "model": "mlp",
        "description": "An MLP with one hidden layer of 128 units on 1,797 handwritten digits of 8×8 pixels.",
        "parameters": 9610,
        "epochs": epochs,
        "steps": 23 * epochs,
        "batch_size": 64,
        "schedule": "cosine",
        "seeds": list(range(seeds)),
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
        "target": target,
        "environment": {
            "torch": "2.13.0",
            "python": "3.12",
            "device": "cpu",
            "threads": 2,
            "started": "2026-11-20 05:20",
        },
        "tuning": {"grid": GRID, "epochs": 5, "trials": trials} if tuned else None,
        "entrants": entrants,
    }


def short_race(finals, *, higher=True, target=None, unit="%", times=None):
    """A race given by the final metric of each seed: {name: (ours, [metric or None])}; None is a diverged run."""
    race = made_up_race(names=("SGD",), seeds=1, epochs=1, tuned=False, target=target)
    race["metric"] = {"name": "accuracy" if higher else "RMSE", "unit": unit, "higher_is_better": higher}
    race["entrants"] = []
    for name, (ours, metrics) in finals.items():
        runs = []
        for seed, metric in enumerate(metrics):
            seconds = (times or {}).get(name, [1.0] * len(metrics))[seed]
            entry = {"step": 10, "epoch": 1, "seconds": seconds, "lr": 0.1, "train_loss": 0.5, "test_loss": 0.25}
            runs.append(
                {
                    "seed": seed,
                    "diverged": metric is None,
                    "error": None,
                    "seconds": seconds,
                    "step_ms": 2.0,
                    "state_mb": 1.0,
                    "history": [{**entry, "test_metric": metric}],
                }
            )
        race["entrants"].append({"name": name, "ours": ours, "hyperparameters": {"lr": 0.1}, "runs": runs})
    race["seeds"] = list(range(max(len(metrics) for _, metrics in finals.values())))
    return race


def said(race):
    return verdict(race, standings(race))


class Page(HTMLParser):
    """Checks that every element is closed in order and collects what the page asks of the outside world."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.outside, self.ids, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "srcset", "data", "action", "xlink:href") and not value.startswith(
                ("#", "data:,")
            ):
                self.outside.append(value)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def race():
    """Six optimizers, one of whose runs diverged on the way."""
    results = made_up_race()
    run = results["entrants"][4]["runs"][1]
    run.update(diverged=True, seconds=None)
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


class TestNumbers:
    def test_mean_and_sample_deviation_over_seeds(self):
        best, other = standings(short_race({"A": (True, [90.0, 92.0, 94.0]), "B": (False, [95.0, 95.0, 95.0])}))
        assert (best.name, best.metric.mean, best.metric.std) == ("B", 95.0, 0.0)
        assert (other.metric.mean, other.metric.std, other.metric.count) == (92.0, 2.0, 3)

    def test_a_single_seed_has_no_deviation(self):
        race = short_race({"A": (True, [90.0]), "B": (False, [91.0])})
        assert [s.metric.std for s in standings(race)] == [None, None]
        assert columns(race, standings(race))[3].cells == ["91.00", "90.00"]

    def test_lower_is_better_turns_the_order(self):
        race = short_race({"A": (True, [2.0]), "B": (False, [1.0]), "C": (False, [3.0])}, higher=False, unit="")
        assert [s.name for s in standings(race)] == ["B", "A", "C"]

    def test_lost_seeds_count_in_nothing_and_send_their_optimizer_back(self):
        race = short_race({"A": (True, [99.0, None, 97.0]), "B": (False, [80.0, 82.0, 84.0])}, times={"A": [1, 50, 3]})
        first, second = standings(race)
        assert (first.name, second.name) == ("B", "A")
        assert (second.metric.mean, second.metric.count, second.seconds.mean) == (98.0, 2, 2.0)
        assert not second.complete
        # Best is marked among those that finished, and the cell says how many did.
        accuracy = columns(race, [first, second])[3]
        assert accuracy.cells[1] == "98.00 ± 1.41 (2/3)"

    @pytest.mark.parametrize("spoil", [{"diverged": True}, {"error": "RuntimeError: no"}, {"history": []}])
    def test_a_run_that_did_not_finish_is_lost_however_good_it_looked(self, spoil):
        race = short_race({"A": (True, [99.0, 50.0])})
        race["entrants"][0]["runs"][0].update(spoil)
        assert standings(race)[0].metric.mean == 50.0

    @pytest.mark.parametrize(("higher", "target", "expected"), [(True, 90.0, 3.0), (False, 70.0, 2.0)])
    def test_time_to_target_is_the_first_time(self, higher, target, expected):
        race = short_race({"A": (True, [50.0])}, higher=higher, target=target)
        run = race["entrants"][0]["runs"][0]
        path = [80.0, 70.0, 90.0, 60.0]
        run["history"] = [
            {**run["history"][0], "step": i, "seconds": float(i), "test_metric": m} for i, m in enumerate(path, 1)
        ]
        assert standings(race)[0].reached.mean == expected

    def test_seeds_that_missed_the_target_are_counted(self):
        race = short_race(
            {"A": (True, [97.0, 90.0]), "B": (False, [96.0, 97.0])}, target=96.0, times={"A": [1, 1], "B": [4, 6]}
        )
        ranked = standings(race)
        column = next(c for c in columns(race, ranked) if c.title == "to 96 %")
        assert dict(zip([s.name for s in ranked], column.cells, strict=True)) == {"B": "5", "A": "1 (1/2)"}
        assert [ranked[i].name for i in column.best] == []  # one of the two is no contest

    def test_step_cost_is_held_against_adamw(self):
        race = short_race({"MFAC": (True, [90.0]), "AdamW": (False, [80.0])})
        race["entrants"][0]["runs"][0]["step_ms"] = 3.0
        assert columns(race, standings(race))[-2].cells == ["1.50", "1.00"]

    def test_without_adamw_there_is_no_such_column(self):
        race = short_race({"MFAC": (True, [90.0]), "SGD": (False, [80.0])})
        assert not any("AdamW" in c.unit for c in columns(race, standings(race)))

    def test_best_of_each_column(self):
        race = short_race({"A": (True, [90.0, 90.0]), "B": (False, [80.0, 80.0])}, times={"A": [2, 2], "B": [1, 1]})
        by_title = {c.title: c for c in columns(race, standings(race))}
        assert by_title["accuracy"].best == {0}
        assert by_title["time"].best == {1}
        assert by_title["memory"].best == {0, 1}  # equal to the reader, equally good

    def test_one_outlier_does_not_cost_the_others_their_digits(self):
        race = short_race({"A": (True, [0.1234]), "B": (False, [0.2]), "C": (False, [12345.6])}, higher=False, unit="")
        assert columns(race, standings(race))[3].cells == ["0.1234", "0.2000", "12346"]

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0, "0"), (0.619123, "0.619"), (98765.4, "98765"), (3e-7, "3e-07"), (-0.5, "-0.5"), (2.3456e12, "2.35e+12")],
    )
    def test_numbers_for_reading(self, value, text):
        assert number(value) == text


class TestVerdict:
    def test_a_clear_win(self):
        headline, text = said(short_race({"MFAC": (True, [98.0, 98.2]), "AdamW": (False, [97.0, 97.2])}))
        assert headline == "MFAC wins on digits"
        assert "98.10 ± 0.14 % accuracy, 1.00 points better than AdamW, the best rival" in text
        assert "more than the seeds’ spread (0.20)" in text

    def test_a_defeat_is_said_and_measured_against_our_best(self):
        race = {"SGD": (False, [99.0, 99.2]), "AdamW": (False, [98.0, 98.1]), "Ginger": (True, [97.0, 97.2])}
        headline, text = said(short_race(race))
        assert headline == "SGD wins on digits"
        assert "2.00 points better than Ginger, the best of quadric’s" in text

    def test_a_winner_level_with_its_own_side_does_not_take_all(self):
        race = {"SGD": (False, [99.0, 99.2]), "AdamW": (False, [98.9, 99.1]), "Muon": (False, [98.9, 99.2])}
        headline, text = said(short_race(race | {"Ginger": (True, [97.0, 97.2])}))
        assert headline == "SGD, Muon and AdamW lead on digits"
        assert "level with Muon and AdamW within the seeds’ spread, but 2.00 points better than Ginger" in text

    def test_a_difference_within_the_spread_is_a_tie(self):
        headline, text = said(short_race({"MFAC": (True, [97.0, 99.0]), "AdamW": (False, [96.9, 98.9])}))
        assert headline == "A tie on digits"
        assert "the 0.10 points between them lie within the seeds’ spread (2.00)" in text

    def test_one_seed_proves_nothing(self):
        headline, text = said(short_race({"MFAC": (True, [98.0]), "AdamW": (False, [90.0])}))
        assert headline == "MFAC ahead on digits"
        assert "a single seed cannot say" in text

    def test_a_better_mean_over_fewer_seeds_does_not_lose_silently(self):
        headline, text = said(short_race({"MFAC": (True, [90.0, 90.2]), "AdamW": (False, [99.0, None])}))
        assert headline == "No clear winner on digits"
        assert "which lost 1 of 2 seeds, ended at 99.00 %" in text

    def test_alone(self):
        headline, text = said(short_race({"MFAC": (True, [98.0, 98.0])}))
        assert headline == "MFAC ran alone on digits"
        assert text == "MFAC ran alone and ended at 98.00 ± 0.00 % accuracy."

    def test_only_one_finished(self):
        assert said(short_race({"MFAC": (True, [98.0]), "SGD": (False, [None])}))[0] == "MFAC alone finished on digits"

    def test_none_finished(self):
        race = short_race({"MFAC": (True, [None, None]), "SGD": (False, [None, None])})
        assert said(race) == ("No run finished on digits", "All 4 runs diverged or failed.")

    def test_a_tiny_difference_is_not_printed_as_zero(self):
        race = short_race({"A": (True, [90.001, 90.001]), "B": (False, [90.0, 90.0])})
        assert "0.001 points better" in said(race)[1]

    @pytest.mark.parametrize(
        ("times", "words"),
        [
            (
                {"A": [1, 1.1], "B": [5, 5.1]},
                "A was quickest to 96 % (1.05 s, against 5.05 s for B, the quickest rival)",
            ),
            (
                {"A": [5, 5.1], "B": [1, 1.1]},
                "B was quickest to 96 % (1.05 s, against 5.05 s for A, the quickest of quad",
            ),
            ({"A": [1, 3], "B": [1.1, 3.1]}, "A and B were equally quick to 96 % within the spread (2 and 2.1 s)"),
        ],
    )
    def test_pace(self, times, words):
        race = short_race({"A": (True, [97.0, 97.0]), "B": (False, [96.5, 96.5])}, target=96.0, times=times)
        assert words in said(race)[1]

    def test_pace_of_one_level_with_its_own_side(self):
        finals = {"A": (True, [97.0, 97.0]), "B": (False, [96.5, 96.5]), "C": (False, [96.4, 96.4])}
        race = short_race(finals, target=96.0, times={"A": [5, 6], "B": [1, 2], "C": [1.1, 2.1]})
        assert "B and C were quickest to 96 % (1.5 and 1.6 s, against 5.5 s for A, the quick" in said(race)[1]

    def test_pace_where_nobody_got_there(self):
        race = short_race({"A": (True, [90.0]), "B": (False, [91.0])}, target=96.0)
        assert said(race)[1].endswith("; none reached 96 %.")

    def test_pace_of_one_that_missed_a_seed_does_not_count_against_one_that_never_did(self):
        finals = {"A": (True, [97.0, 90.0]), "B": (False, [97.0, 97.0])}
        race = short_race(finals, target=96.0, times={"A": [1, 1], "B": [5, 5]})
        assert said(race)[1].endswith("; B alone reached 96 % in every seed, in 5 s.")
        race = short_race(
            finals | {"C": (False, [97.0, 97.0])}, target=96.0, times={"A": [1, 1], "B": [5, 5], "C": [7, 7]}
        )
        assert "B was quickest to 96 % (5 s, against 7 s for C, the next), of those that got there" in said(race)[1]


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
        headline, _ = said(race)
        words = " ".join(Page(page).words)
        assert f"<h1>{headline}</h1>" in page
        assert "Ginger, seed 1: diverged after step 207" in words
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
    def test_fits_eighty_columns_and_keeps_every_name(self, race):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(results_table(race))
        lines = [line.rstrip() for line in console.export_text().splitlines()]
        assert max(map(len, lines)) <= 80
        for name, (ours, *_) in FIELD.items():
            (line,) = [line for line in lines if line.startswith(("◆ " if ours else "  ") + name)]
            assert len(line.split()) >= 9
        assert "Ginger, seed 1: diverged after step 207" in lines

    def test_marks_the_best(self):
        table = results_table(short_race({"A": (True, [90.0, 90.0]), "B": (False, [80.0, 80.0])}))
        accuracy = [cell.style for cell in table.columns[3].cells]
        assert accuracy == ["bold green", ""]


class TestPlots:
    def test_spread_out_keeps_order_distance_and_centre(self):
        moved = plots.spread_out([0.5, 0.1, 0.52, 0.51], 0.1)
        assert moved[1] == 0.1
        assert sorted(moved) == [moved[1], moved[0], moved[3], moved[2]]
        assert moved[2] - moved[3] == pytest.approx(0.1)
        assert sum(moved[i] for i in (0, 2, 3)) == pytest.approx(0.5 + 0.51 + 0.52)

    def test_styles_tell_all_apart_and_ours_are_solid(self):
        looks = plots.styles([True, False, True, False, False, True, False, True, True])
        assert len({look.colour for look in looks}) == 9
        assert [bool(look.dashes) for look in looks] == [False, True, False, True, True, False, True, False, False]

    def test_light_colours_are_told_apart_by_value(self):
        assert len({light for light, _ in plots.THEME.values()}) == len(plots.THEME)

    def test_mean_and_band_run_over_finished_seeds(self, race):
        ginger = next(s for s in standings(race) if s.name == "Ginger")
        curve = _curve(ginger, "step", "test_metric")
        kept = [run["history"] for i, run in enumerate(race["entrants"][4]["runs"]) if i != 1]
        pairs = [(a["test_metric"], b["test_metric"]) for a, b in zip(*kept, strict=True)]
        assert curve.x == [23 * epoch for epoch in range(1, 31)]
        assert curve.y == pytest.approx([(a + b) / 2 for a, b in pairs])
        assert (curve.low, curve.high) == ([min(p) for p in pairs], [max(p) for p in pairs])
        ((steps, _),) = curve.broken
        assert steps == [23 * epoch for epoch in range(1, 9)]  # the ninth had no finite value

    def test_a_gap_in_one_seed_is_a_gap_in_the_mean(self):
        race = made_up_race(names=("MFAC",), seeds=2, epochs=4, tuned=False)
        race["entrants"][0]["runs"][1]["history"][1]["test_metric"] = None
        curve = _curve(standings(race)[0], "step", "test_metric")
        assert curve.x == [23, 69, 92]

    def test_a_long_name_leaves_room_for_the_curves(self):
        figure = plots.curves(
            [plots.Series("x" * 200, plots.Style("ours-0"), [1.0], [0.5], [0.5], [0.5])], x="steps", y="loss"
        )
        (text,) = figure.axes[0].texts
        assert text.get_text() == "x" * 21 + "…"

    def series(self, y, **rest):
        x = [float(i) for i in range(1, len(y) + 1)]
        return plots.Series("A", plots.Style("ours-0"), x=x, y=y, low=y, high=y, **rest)

    def test_zoom_leaves_out_the_beginning_but_neither_target_nor_end(self):
        y = [10.0, 50.0, 90.0, *[97.0 + 0.01 * i for i in range(37)]]
        (axes,) = plots.curves([self.series(y)], x="steps", y="accuracy", target=99.0, zoom=True).axes
        low, high = axes.get_ylim()
        assert 90 < low < 97.1
        assert high > 99.0
        (axes,) = plots.curves([self.series(y)], x="steps", y="accuracy").axes
        assert axes.get_ylim()[0] < 10

    @pytest.mark.parametrize(("y", "scale"), [([1.0, 0.1], "log"), ([1.0, 0.5], "linear"), ([1.0, -0.1], "linear")])
    def test_loss_is_logarithmic_where_that_helps(self, y, scale):
        (axes,) = plots.curves([self.series(y)], x="steps", y="loss", log=True).axes
        assert axes.get_yscale() == scale

    def test_a_lost_run_ends_in_a_cross_inside_the_axes_however_far_it_flew(self):
        broken = [([1.0, 2.0], [1.0, 1e30])]
        (axes,) = plots.curves([self.series([1.0, 0.5], broken=broken)], x="steps", y="loss").axes
        (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert cross.get_ydata()[0] == axes.get_ylim()[1] < 2

    def test_names_at_the_ends_do_not_overlap(self):
        same = [plots.Series(f"N{i}", plots.Style("ours-0"), [1.0], [0.5], [0.5], [0.5]) for i in range(5)]
        figure = plots.curves(same, x="steps", y="accuracy")
        plots.png(figure)
        boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
        assert len(boxes) == 5
        assert all(above.y0 >= below.y0 + 0.7 * below.height for below, above in itertools.pairwise(boxes))

    def test_tuning_shows_the_chosen_and_the_diverged(self):
        trials = plots.Trials("A", plots.Style("ours-0"), [0.1, 0.2, 0.4], [0.5, 0.4, 900.0], [0.8], 0.2)
        (axes,) = plots.tuning([trials]).axes
        (crosses,) = [line for line in axes.lines if line.get_marker() == "x"]
        assert sorted(crosses.get_xdata()) == [0.4, 0.8]  # far off the scale counts as lost
        (ring,) = [line for line in axes.lines if line.get_markersize() == 9]
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (0.2, 0.4)
