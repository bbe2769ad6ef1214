"""`quadric curvature`: its files, its page, a person's own model, and every refusal in one line."""

import io
import itertools
import json
import re
import sys
from xml.etree import ElementTree

import pytest
from commands import command_line
from matplotlib.text import Text
from pages import Page
from rich.console import Console

from quadric.lab import plots
from quadric.lab.card import card_table, verdict, write_card
from quadric.lab.cli import run
from quadric.verify import figure

SMALL = ("--probes", "1", "--entries", "4")
FILES = {"card.json", "report.html", "exact_estimate.png", "exact_estimate.svg", "error_by_tensor.png"}
FILES |= {"error_by_tensor.svg"}

MINE = """
import torch
from torch import nn

def build():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    batch = {"x": torch.randn(10, 4), "y": torch.randint(2, (10,))}
    return model, lambda model, batch: nn.functional.cross_entropy(model(batch["x"]), batch["y"]), batch

class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2

def odd():
    return nn.Linear(4, 1), lambda model, batch: Cube.apply(model(batch)).mean(), torch.randn(10, 4)

def many():
    return nn.Linear(4, 2), lambda model, batch: model(batch), torch.randn(10, 4)

def pair():
    return nn.Linear(4, 1), torch.randn(10, 4)

def fails():
    raise FileNotFoundError("no weights\\nhere")

def lazy():
    return nn.LazyLinear(1), lambda model, batch: model(batch).sum(), torch.randn(10, 4)

def leaves():
    raise SystemExit(3)

def closed():
    def loss_fn(model, batch):
        raise KeyError("labels")
    return nn.Linear(4, 1), loss_fn, torch.randn(10, 4)

value = 3
"""


@pytest.fixture
def quadric(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    yield command_line(tmp_path, monkeypatch, capsys)
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def results(folder):
    return json.loads((folder / "card.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curvature")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(("curvature", "--epochs", "1", "--entries", "24", "--out", "card")) == 0
    return folder / "card"


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_help_has_examples_and_the_protocol(quadric):
    status, out, err = quadric("curvature", "--help")
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    assert "Examples: quadric curvature" in words
    for option in ("--task", "--model", "--data-dir", "--epochs", "--probes", "--entries", "--seed", "--device"):
        assert option in words
    for option in ("--dtype", "--fallback", "--batch-size", "--weights", "--out"):
        assert option in words
    assert "module:function" in out.replace(" ", "")
    assert "curvature" in quadric()[1]


def test_hesscale_is_close_on_digits_where_the_squared_gradient_is_not(folder):
    card = results(folder)["card"]
    scores = {estimate["key"]: estimate["score"] for estimate in card["estimates"]}
    assert scores["hesscale"]["error"] < 0.25
    assert scores["hesscale"]["cosine"] > 0.97
    assert scores["squared_gradient"]["error"] > 0.9
    assert scores["squared_gradient"]["cosine"] < 0.9
    assert {layer["name"]: len(layer["entries"]) for layer in card["layers"]} == {
        "1.weight": 24, "1.bias": 24, "3.weight": 24, "3.bias": 24, "5.weight": 24, "5.bias": 10,
    }  # fmt: skip
    assert (card["examples"], card["pieces"], card["parameters"]) == (64, 64, 8970)


def test_files_and_what_they_remember(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    told = results(folder)
    assert told["command"] == "quadric curvature --epochs 1 --entries 24 --out card"
    assert told["subject"] == "mlp on digits"
    assert "after 1 epoch of AdamW (test accuracy" in told["description"]
    assert told["options"] == {"probes": 10, "entries": 24, "seed": 0, "fallback": None, "dtype": None}
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


class TestPage:
    def test_is_well_formed_and_asks_nothing_of_the_outside(self, page):
        parsed = Page(page)
        assert parsed.outside == []
        assert "script" not in parsed.tags
        assert "http" not in page
        assert len(set(parsed.ids)) == len(parsed.ids)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(parsed.ids)
        assert parsed.tags.count("figure") == 2

    def test_takes_its_colours_from_the_page_so_that_the_dark_one_is_legible(self, page):
        body = page[page.index("<body>") :]
        assert "var(--ours-0)" in body
        assert re.findall(r": #[0-9a-f]{6}", body) == []
        assert plots.THEME.keys() >= set(re.findall(r"var\(--([a-z0-9-]+)\)", page))

    def test_says_of_each_estimate_what_it_is_of_and_its_figures(self, page, folder):
        words = " ".join(Page(page).words)
        card = results(folder)["card"]
        for estimate in card["estimates"]:
            assert estimate["title"] in words
            assert f"{estimate['of']} {figure(estimate['score']['error'])}" in words
        assert verdict(card)[0] in words
        for layer in card["layers"]:
            assert layer["name"] in words

    def test_same_results_same_bytes(self, folder, tmp_path):
        write_card(results(folder), tmp_path)
        for path in tmp_path.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()

    def test_text_that_looks_like_markup_is_text(self, folder, tmp_path):
        told = results(folder)
        told["subject"] = told["description"] = told["command"] = "<script>$x$ & [red]"
        told["card"]["layers"][0]["name"] = "<b>$\\alpha$" + 40 * "w"
        told["card"]["notes"] = ["<i>"]
        parsed = Page(write_card(told, tmp_path).read_text(encoding="utf-8"))
        assert not {"script", "b", "i"} & set(parsed.tags)

    def test_values_that_are_no_numbers_leave_gaps(self, folder, tmp_path):
        told = results(folder)
        for layer in told["card"]["layers"]:
            layer["values"]["hutchinson"] = [None] * len(layer["entries"])
            layer["scores"]["hutchinson"] = {"error": None, "cosine": None, "rank": None}
        told["card"]["estimates"][2]["score"] = {"error": None, "cosine": None, "rank": None}
        assert "–" in write_card(told, tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "columns"), [(100, 6), (76, 5), (58, 4)])
def test_the_table_fits_its_width(folder, width, columns):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(card_table(results(folder), width))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert max(map(len, lines)) <= width
    (head,) = [line for line in lines if line.lstrip().startswith("estimate")]
    assert len(head.split()) == columns
    for estimate in results(folder)["card"]["estimates"]:
        assert any(estimate["title"] in line and "…" not in line for line in lines)


def test_a_person_s_own_model(quadric, tmp_path):
    status, out, err = quadric("curvature", "--model", "mine:build", *SMALL, "--seed", "3", "--out", "a")
    assert (status, err) == (0, "")
    assert out.endswith("report: a/report.html\n")
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    told = results(tmp_path / "a")
    assert told["description"] == "mine:build: Sequential with 44 parameters"
    assert (told["card"]["examples"], told["card"]["seed"]) == (10, 3)
    (tmp_path / "runs" / "curvature-mine-build").mkdir(parents=True)
    again = quadric("curvature", "--model", "mine:build", *SMALL)[1]
    assert again.endswith("report: runs/curvature-mine-build-2/report.html\n")


def test_an_operation_without_a_rule_names_the_option(quadric, tmp_path):
    status, _, err = quadric("curvature", "--model", "mine:odd", *SMALL)
    assert (status, err.count("\n")) == (2, 1)
    assert "Cube" in err
    assert "--fallback gauss_newton or zero" in err
    assert not (tmp_path / "runs").exists()
    assert quadric("curvature", "--model", "mine:odd", *SMALL, "--fallback", "zero", "--out", "a")[0] == 0
    assert results(tmp_path / "a")["options"]["fallback"] == "zero"


def test_parameters_of_a_training(quadric, tmp_path):
    small = ("--model", "logistic", "--examples", "300", "--epochs", "1")
    assert quadric("train", "--optimizer", "sgd", *small, "--out", "t")[0] == 0
    words = ("curvature", "--model", "logistic", *SMALL)
    losses = []
    for i, weights in enumerate(("t", "t/checkpoint.pt")):
        assert quadric(*words, "--weights", weights, "--out", f"c{i}")[0] == 0
        losses.append(results(tmp_path / f"c{i}")["card"]["loss"])
    assert quadric(*words, "--out", "fresh")[0] == 0
    assert losses[0] == losses[1] < results(tmp_path / "fresh")["card"]["loss"]
    status, _, err = quadric("curvature", "--model", "mlp", *SMALL, "--weights", "t")
    assert (status, err.count("\n")) == (2, 1)
    assert "the parameters in t/model.safetensors are of another network" in err
    status, _, err = quadric(*words, "--weights", "t/config.json")
    assert (status, err.count("\n")) == (2, 1)
    assert "t/config.json holds no parameters" in err


def test_carried_in_another_type(quadric, tmp_path):
    for dtype in ("float32", "bfloat16"):
        assert quadric("curvature", *SMALL, "--dtype", dtype, "--out", dtype)[0] == 0
    exact, coarse = (
        [layer["values"] for layer in results(tmp_path / d)["card"]["layers"]] for d in ("float32", "bfloat16")
    )
    assert exact[0]["hesscale"] != coarse[0]["hesscale"]
    assert exact[0]["hesscale"] == pytest.approx(coarse[0]["hesscale"], rel=0.1, abs=1e-4)
    assert exact[0]["fisher"] == coarse[0]["fisher"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task nope", "there is no task 'nope'; choose one of digits"),
        ("--model vgg", "there is no model 'vgg'"),
        ("--model gpt", "gpt takes text inputs"),
        ("--epochs -1", "'--epochs'"),
        ("--probes 0", "'--probes'"),
        ("--entries 0", "; see quadric curvature --help"),
        ("--device tpu", "'--device'"),
        ("--dtype int8", "'--dtype'"),
        ("--fallback none", "'--fallback'"),
        ("--threads 100000", "cores; give at most"),
        ("--weights nowhere", "there is no nowhere; give --weights the folder or file that quadric train wrote"),
        ("--weights a --epochs 2", "--weights and --epochs both say which parameters to take; leave one out"),
        ("--model mine:build --epochs 2", "--epochs belongs to a built-in task"),
        (
            "--model mine:build --task digits",
            "--task belongs to a built-in task, and --model mine:build",
        ),
        ("--model nowhere:build", "cannot import nowhere (ModuleNotFoundError: No module named 'nowhere')"),
        ("--model broken:build", "cannot import broken (ZeroDivisionError: division by zero)"),
        ("--model mine:", "mine has no function ''; it has to return model, loss_fn, batch"),
        ("--model :build", "cannot import  (ValueError: Empty module name)"),
        ("--model mine:value", "mine has no function 'value'; it has to return model, loss_fn, batch"),
        ("--model mine:pair", "the function returned (Linear, Tensor); it has to return model, loss_fn, batch"),
        ("--model mine:fails", "the function fails (FileNotFoundError: no weights here)"),
        ("--model mine:many", "loss_fn returned a tensor of shape (10, 2)"),
        ("--model mine:closed", "mine:closed: KeyError: 'labels'"),
        ("--model mine:lazy", "its lazy layers have no shape yet; call the model once before returning it"),
        ("--model mine:leaves", "the function fails (SystemExit: 3)"),
        ("--out mine.py", "mine.py exists and is not a run's folder; choose another --out"),
        ("--out mine.py/a", "cannot make the folder mine.py/a (Not a directory); choose another --out"),
    ],
)
def test_bad_values_are_one_line_and_status_2(quadric, tmp_path, words, message):
    status, out, err = quadric("curvature", *words.split())
    assert (status, out) == (2, "")
    assert err.startswith("quadric: error: ")
    assert err.count("\n") == 1
    assert " ".join(message.split()) in err
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"mine.py", "broken.py"}


@pytest.mark.parametrize(
    ("method", "error", "status", "message"),
    [
        ("step", KeyboardInterrupt(), 130, "quadric: interrupted before anything was saved; repeat it, perhaps with"),
        ("say", SystemExit(1), 1, "quadric: error: who read the output has left; what was saved is in a\n"),
        ("say", BrokenPipeError(), 1, "quadric: error: who read the output has left; what was saved is in a\n"),
    ],
)
def test_an_interruption_and_a_closed_pipe_are_one_line(quadric, monkeypatch, method, error, status, message):
    def refuse(self, *given):
        raise error

    monkeypatch.setattr(f"quadric.lab.display.Display.{method}", refuse)
    monkeypatch.setattr("quadric.lab.cli._give_up_stdout", lambda: None)
    given, _, err = quadric("curvature", "--model", "mine:build", *SMALL, "--out", "a")
    assert (given, err.count("\n")) == (status, 1)
    assert err.startswith(message)


def test_asking_to_stop_stops(quadric, monkeypatch, tmp_path):
    monkeypatch.setattr("quadric.lab.display.Display.step", lambda self, steps, state: True)
    assert quadric("curvature", "--model", "mine:build", *SMALL)[0] == 130
    assert not (tmp_path / "runs").exists()


def guess(exact, values, errors=()):
    return plots.Guess("A", plots.Style("ours-0"), "o", True, "note", exact, values, list(errors))


class TestPictures:
    @pytest.mark.parametrize(("low", "high"), [(1e-6, 1e3), (1e-3, 0.5), (0.2, 0.3), (1e-9, 1e-7), (1e-30, 1.0)])
    @pytest.mark.parametrize("signs", [1, 2])
    def test_ticks_stand_apart(self, low, high, signs):
        exact = [low * (high / low) ** (i / 9) for i in range(10)]
        exact += [-v for v in exact] if signs == 2 else []
        figure = plots.agreement([guess(exact, exact)] * 7, {"Hessian": plots.Style("ours-0")})
        figure.draw_without_rendering()
        for axes in figure.axes[4:7]:
            boxes = [Text.get_window_extent(t) for t in axes.get_xticklabels()]
            assert len(boxes) >= 2
            assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))

    def test_an_axis_has_a_negative_half_only_where_there_are_such_values(self):
        both = [guess([0.1, 1.0], [0.1, 0.9]), guess([0.1, 1.0], [-1.0, 2.0])]
        axes = plots.agreement(both, {}).axes[0]
        assert axes.get_xlim()[0] > -0.1
        assert axes.get_ylim()[0] < -1.0

    def test_nothing_but_zeros_is_still_a_picture(self):
        plots.png(plots.agreement([guess([0.0, 0.0], [0.0, 0.0])], {"Hessian": plots.Style("ours-0")}))
        plots.png(plots.agreement([guess([], [])], {}))

    def test_errors_off_the_axis_stand_at_its_ends(self):
        (axes,) = plots.errors(["w", "b", "c", "d"], [guess([], [], [1e-9, 0.5, None, 1e9])]).axes
        (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
        assert list(dots.get_xdata()) == [1e-3, 0.5, 1e2]
        assert list(dots.get_ydata()) == [0, 1, 3]

    def test_a_long_name_keeps_its_end(self):
        (axes,) = plots.errors(["a" * 30 + ".weight"], [guess([], [], [0.5])]).axes
        (label,) = axes.get_yticklabels()
        assert label.get_text().endswith("a.weight")
        assert len(label.get_text()) == 28
