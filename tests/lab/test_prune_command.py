"""`quadric prune`: its files and pictures, a person's own model, resuming, and every refusal in one line."""

import io
import itertools
import json
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from commands import command_line
from pages import Page
from rich.console import Console
from safetensors.torch import load_file, save_file

from quadric.lab import plots, prune_page
from quadric.lab.cli import run
from quadric.lab.prune import METHODS
from quadric.lab.prune_page import layers_table, results_table, verdict

SMALL = ("--epochs", "2", "--num-grads", "16")
PICTURES = {f"{name}.{kind}" for name in ("metric_sparsity", "sparsity_layers") for kind in ("png", "svg")}
FILES = {"config.json", "dense.json", "dense.safetensors", "runs", "results.json", "report.html", *PICTURES}
FILES |= {"pruned.safetensors", "masks.safetensors"}

MINE = """
import torch
from torch import nn

class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2

def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

def build():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(10, 8, 4)
    return model, loss_fn, ({"x": x[i], "y": (x[i].sum(1) > 0).long()} for i in range(10))

def scored():
    model, loss_fn, batches = build()
    return model, loss_fn, list(batches), lambda model: sum(p.abs().sum() for p in model.parameters())

def tied():
    model, loss_fn, batches = build()
    model[0] = nn.Linear(4, 8)
    model.append(nn.Linear(2, 2))
    model.append(nn.Linear(2, 2))
    model[6].weight = model[5].weight
    return model, loss_fn, batches

def normed():
    model, loss_fn, batches = build()
    return nn.Sequential(nn.BatchNorm1d(4), model), loss_fn, batches

def odd():
    model = nn.Linear(4, 2)
    x = torch.randn(10, 8, 4)
    return model, lambda model, batch: Cube.apply(model(batch)).square().mean(), list(x)

def few():
    model, loss_fn, batches = build()
    return model, loss_fn, list(batches)[:4]

def none():
    return nn.Linear(4, 2), loss_fn, [], float

def word():
    return (*build(), lambda model: "high")

def loose():
    return nn.Linear(4, 2), loss_fn, 3

def closed():
    def loss_fn(model, batch):
        raise KeyError("labels")
    return nn.Linear(4, 1), loss_fn, [torch.randn(10, 4)], lambda model: 1.0

def infinite():
    return nn.Linear(4, 1), lambda model, batch: model(batch).sum() / 0, [torch.randn(10, 4)], lambda model: 1.0

def single():
    return nn.Linear(4, 1), torch.randn(10, 4)
"""


@pytest.fixture
def quadric(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(MINE)
    yield command_line(tmp_path, monkeypatch, capsys)
    sys.modules.pop("mine", None)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def measured(folder):
    """What a folder says apart from times."""
    told = results(folder)
    runs = [run for method in told["methods"] for run in method["runs"]]
    return [{key: value for key, value in run.items() if key != "seconds"} for run in runs], told["dense"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(("prune", *SMALL, "--sparsity", "0.9,0.5", "--seeds", "2", "--out", "p")) == 0
    return folder / "p"


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_help_has_examples_and_names_everything(quadric):
    status, out, err = quadric("prune", "--help")
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    assert "Examples: quadric prune" in words
    for option in (
        "--task", "--model", "--checkpoint", "--sparsity", "--methods", "--num-grads", "--batch-size", "--block-size",
        "--damping", "--rounds", "--parts", "--shrinkage", "--per-example", "--pattern", "--scope", "--targets",
        "--ignore", "--batch-norm", "--finetune", "--seed", "--seeds", "--device", "--threads", "--out", "--resume",
    ):  # fmt: skip
        assert option in words
    for method in METHODS:
        assert method in words
    assert "module:function" in out.replace(" ", "")
    assert "prune" in quadric()[1]


class TestFiles:
    def test_every_method_ran_at_every_sparsity_with_every_seed(self, folder):
        told = results(folder)
        assert {path.name for path in folder.iterdir()} == FILES
        assert [method["key"] for method in told["methods"]] == list(METHODS)
        for method in told["methods"]:
            assert [(run["seed"], run["sparsity"]) for run in method["runs"]] == [
                (0, 0.5),
                (0, 0.9),
                (1, 0.5),
                (1, 0.9),
            ]
            for run_ in method["runs"]:
                assert run_["reached"] == pytest.approx(run_["sparsity"], abs=1e-3)
                assert sum(layer["removed"] for layer in run_["layers"]) == round(run_["sparsity"] * 8832)
        assert told["command"] == f"quadric prune {' '.join(SMALL)} --sparsity 0.9,0.5 --seeds 2 --out p"
        assert "after 2 epochs of AdamW (test accuracy" in told["description"]

    def test_seeds_decide_the_batches_and_nothing_else(self, folder):
        by_key = {method["key"]: method["runs"] for method in results(folder)["methods"]}
        at = {key: [run["metric"] for run in runs if run["sparsity"] == 0.9] for key, runs in by_key.items()}
        assert at["magnitude"][0] == at["magnitude"][1]
        losses = [run["loss"] for run in by_key["joint"] if run["sparsity"] == 0.9]
        assert losses[0] != losses[1]

    def test_an_update_is_worth_something(self, folder):
        found = {
            method["key"]: [run["loss"] for run in method["runs"] if run["sparsity"] == 0.5]
            for method in results(folder)["methods"]
        }
        assert sum(found["joint"]) < sum(found["fisher"])
        assert sum(found["joint"]) < sum(found["magnitude"])

    def test_the_pruned_network_is_zero_where_the_masks_say_so(self, folder):
        pruned, masks = load_file(folder / "pruned.safetensors"), load_file(folder / "masks.safetensors")
        dense = load_file(folder / "dense.safetensors")
        assert pruned.keys() == dense.keys()
        assert masks.keys() == {"1.weight", "3.weight", "5.weight"}
        for name, mask in masks.items():
            assert mask.dtype == torch.bool
            assert torch.equal(pruned[name] != 0, mask)
        assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.9 * 8832)
        assert torch.equal(pruned["1.bias"], dense["1.bias"])
        assert results(folder)["kept"] == {
            "method": "joint", "sparsity": 0.9, "seed": 0, "files": ["pruned.safetensors", "masks.safetensors"],
        }  # fmt: skip

    def test_pictures_are_well_formed(self, folder):
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

    def test_says_what_was_found(self, page, folder):
        words = " ".join(" ".join(Page(page).words).split())
        told = results(folder)
        assert verdict(told)[0] in words
        for row in prune_page.rows(told):
            assert f"{row.name} {' '.join(prune_page._cell(told, row, s) for s in (0.5, 0.9))}" in words
        for name in ("1.weight", "3.weight", "5.weight"):
            assert name in words
        assert "16, of mini-batches of 64 examples" in words

    def test_same_results_same_bytes(self, folder, tmp_path):
        prune_page.write_page(results(folder), tmp_path)
        for path in tmp_path.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes()

    def test_text_that_looks_like_markup_is_text(self, folder, tmp_path):
        told = results(folder)
        told["subject"] = told["description"] = told["command"] = told["metric"]["name"] = "<script>$x$ & [red]"
        told["options"]["targets"] = ["<b>"]
        for method in told["methods"]:
            for run_ in method["runs"]:
                run_["layers"][0]["name"] = "<b>$\\alpha$" + 40 * "w"
                run_["left_alone"] = {"<i>": "<i>"}
        told["methods"][0]["runs"][0] |= {"error": "<i>", "metric": None}
        parsed = Page(prune_page.write_page(told, tmp_path).read_text(encoding="utf-8"))
        assert not {"script", "b", "i"} & set(parsed.tags)

    def test_a_single_sparsity_shows_each_seed(self, folder, tmp_path):
        told = results(folder)
        told["sparsities"] = [0.9]
        for method in told["methods"]:
            method["runs"] = [run for run in method["runs"] if run["sparsity"] == 0.9]
        words = " ".join(Page(prune_page.write_page(told, tmp_path).read_text(encoding="utf-8")).words)
        assert "A dot for each seed, a bar at their mean." in words

    def test_where_nothing_finished_there_is_no_picture(self, folder, tmp_path):
        told = results(folder)
        for method in told["methods"]:
            method["runs"] = [
                {"sparsity": run["sparsity"], "seed": run["seed"], "error": "RuntimeError: no", "metric": None}
                for run in method["runs"]
            ]
        parsed = Page(prune_page.write_page(told, tmp_path).read_text(encoding="utf-8"))
        assert "figure" not in parsed.tags
        assert "No run finished" in " ".join(parsed.words)
        assert layers_table(told) is None


def printed(table, width):
    console = Console(width=width, record=True, file=io.StringIO(), color_system="standard", force_terminal=True)
    console.print(table)
    lines = [line.rstrip() for line in console.export_text(clear=False).splitlines()]
    assert max(map(len, lines)) <= width
    return lines, console.export_text(styles=True)


@pytest.mark.parametrize(("width", "columns"), [(100, 3), (40, 3), (34, 2)])
def test_the_table_fits_its_width(folder, width, columns):
    lines, _ = printed(results_table(results(folder), width), width)
    (head,) = [line for line in lines if line.lstrip().startswith("method")]
    assert len(head.replace(" %", "%").split()) == columns
    for row in prune_page.rows(results(folder)):
        assert any(line.lstrip().startswith(row.name) for line in lines)
    lines, _ = printed(layers_table(results(folder), width), width)
    assert any(line.split()[:1] == ["5.weight"] and line.endswith("%") for line in lines)
    assert any(line.split()[:1] == ["all"] and line.endswith("90.0 %") for line in lines)


def made_up(values, seeds=1, higher=True):
    """Results with a metric for each method and seed, of one sparsity."""
    layer = {"name": "w", "shape": [4, 5], "weights": 20, "removed": 18}
    return {
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": higher},
        "dense": {"metric": 90.0, "loss": None},
        "sparsities": [0.9],
        "seeds": list(range(seeds)),
        "methods": [
            {
                "key": key,
                "runs": [
                    {"sparsity": 0.9, "seed": i, "error": None, "metric": m, "layers": [layer], "left_alone": {}}
                    for i, m in enumerate(metrics)
                ],
            }
            for key, metrics in values.items()
        ],
    }


def test_the_verdict_names_the_best_and_calls_a_tie_a_tie():
    assert verdict(made_up({"magnitude": [10.0], "joint": [61.7]})) == (
        "Joint update keeps most at 90 %",
        "With 90 % of the weights removed, joint update has accuracy 61.70 %, and the dense network has 90.00 %; "
        "magnitude 10.00 %; a single seed cannot say whether that is luck.",
    )
    assert verdict(made_up({"joint": [60.0, 61.0], "single": [60.1, 60.7]}, 2))[0] == (
        "Joint update and sum of single updates are level at 90 %"
    )
    assert verdict(made_up({"joint": [0.4], "magnitude": [0.2]}, higher=False))[0] == "Magnitude keeps most at 90 %"
    assert verdict(made_up({"joint": [61.7]}))[0] == "Joint update at 90 %: accuracy 61.70 %"
    assert verdict(made_up({"joint": [None]})) == (
        "No run finished", "Nothing was pruned to 90 %; the dense network has 90.00 %."
    )  # fmt: skip


def test_the_best_of_a_column_is_bold_and_equal_cells_are_equally_good():
    _, styled = printed(results_table(made_up({"magnitude": [10.0], "joint": [61.7], "single": [61.701]})), 80)
    assert len(re.findall(r"\x1b\[1;32m *61.70", styled)) == 2
    assert not re.search(r"\x1b\[1;32m *10.00", styled)
    _, styled = printed(results_table(made_up({"joint": [61.7]})), 80)
    assert "1;32m" not in styled


def test_a_person_s_own_model_is_judged_by_the_loss_on_batches_held_back(quadric, tmp_path):
    words = ("prune", "--model", "mine:build", "--sparsity", "0.5", "--num-grads", "4", "--seed", "3")
    status, out, err = quadric(*words, "--out", "a")
    assert (status, err) == (0, "")
    assert out.endswith("report: a/report.html\n")
    assert "joint at 50 %: a/pruned.safetensors" in out
    assert "memory: window of 4 gradients of 112 weights" in out
    told = results(tmp_path / "a")
    assert told["description"] == (
        "mine:build: Sequential with 130 parameters, 4 batches for gradients, judged on 1 batches held back, as its "
        "function returned it"
    )
    assert told["metric"] == {"name": "loss on held-back batches", "unit": "", "higher_is_better": False}
    assert quadric(*words)[1].endswith("report: runs/prune-mine-build/report.html\n")
    assert measured(tmp_path / "a") == measured(tmp_path / "runs/prune-mine-build")


def test_a_person_s_own_judgement(quadric, tmp_path):
    words = ("prune", "--model", "mine:scored", "--methods", "magnitude", "--sparsity", "0.5", "--num-grads", "3")
    assert quadric(*words, "--out", "a")[0] == 0
    told = results(tmp_path / "a")
    assert told["metric"]["name"] == "score"
    left = load_file(tmp_path / "a" / "pruned.safetensors")
    assert told["methods"][0]["runs"][0]["metric"] == pytest.approx(sum(float(v.abs().sum()) for v in left.values()))
    assert told["dense"]["metric"] > told["methods"][0]["runs"][0]["metric"]


def test_parameters_from_a_file(quadric, tmp_path):
    words = ("prune", "--model", "mine:tied", "--methods", "magnitude", "--sparsity", "0.5", "--num-grads", "4")
    assert quadric(*words, "--out", "a")[0] == 0
    pruned = tmp_path / "a" / "pruned.safetensors"
    state = load_file(pruned)
    assert torch.equal(state["5.weight"], state["6.weight"])
    assert quadric(*words, "--checkpoint", str(pruned), "--out", "b")[0] == 0
    assert results(tmp_path / "b")["dense"]["metric"] == results(tmp_path / "a")["methods"][0]["runs"][0]["metric"]
    once = {name: value for name, value in state.items() if name != "6.weight"}  # as files keep tied weights
    save_file(once, tmp_path / "once.safetensors")
    assert quadric(*words, "--weights", "once.safetensors", "--out", "c")[0] == 0
    assert measured(tmp_path / "c")[0] == measured(tmp_path / "b")[0]
    for change, why in (
        ({"2.weight": None}, "2.weight is missing"),
        ({"extra": torch.ones(1)}, "extra is not in this one"),
        ({"0.bias": torch.ones(3)}, "0.bias is 3 there and 8 here"),
    ):
        save_file({k: v for k, v in {**once, **change}.items() if v is not None}, tmp_path / "other.safetensors")
        status, out, err = quadric(*words, "--checkpoint", "other.safetensors", "--out", "d")
        assert (status, out) == (2, "")
        assert err == (
            f"quadric: error: the parameters in other.safetensors are of another network ({why}); give the "
            "--checkpoint of this model\n"
        )
    assert not (tmp_path / "d").exists()


def test_what_quadric_train_wrote_is_pruned_and_both_names_of_the_option_serve(quadric, tmp_path):
    assert quadric("train", "--model", "logistic", "--examples", "300", "--epochs", "1", "--out", "t")[0] == 0
    words = ("prune", "--model", "logistic", "--methods", "magnitude", "--sparsity", "0.5")
    for i, checkpoint in enumerate(("t", "t/checkpoint.pt")):
        assert quadric(*words, "--checkpoint", checkpoint, "--out", f"p{i}")[0] == 0
    assert measured(tmp_path / "p0")[0] == measured(tmp_path / "p1")[0]
    assert (
        load_file(tmp_path / "p0" / "pruned.safetensors").keys()
        == load_file(tmp_path / "t" / "model.safetensors").keys()
    )
    status, _, err = quadric("curvature", "--checkpoint", "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no nowhere" in err


def test_a_pattern_says_the_sparsity_and_is_kept(quadric, tmp_path):
    words = ("prune", "--model", "mine:build", "--num-grads", "4", "--methods", "joint", "--pattern", "2:4")
    assert quadric(*words, "--out", "a")[0] == 0
    assert results(tmp_path / "a")["sparsities"] == [0.5]
    for name, mask in load_file(tmp_path / "a" / "masks.safetensors").items():
        assert name in ("0.weight", "2.weight", "4.weight")
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
    told = quadric(*words, "--ignore", "4", "--sparsity", "0.75", "--out", "b")[1]
    assert "left alone: 4.weight (ignore names it)" in told


def test_fine_tuning_holds_the_masks(quadric, tmp_path):
    words = ("prune", "--epochs", "1", "--num-grads", "4", "--methods", "magnitude", "--sparsity", "0.9")
    for epochs in ("0", "1"):
        assert quadric(*words, "--finetune", epochs, "--out", epochs)[0] == 0
    plain, tuned = (results(tmp_path / e)["methods"][0]["runs"][0] for e in ("0", "1"))
    assert tuned["loss"] < plain["loss"]
    pruned, masks = (load_file(tmp_path / "1" / f"{name}.safetensors") for name in ("pruned", "masks"))
    for name, mask in masks.items():
        assert bool((pruned[name][~mask] == 0).all())


def test_batch_norm_is_estimated_again_for_every_method(quadric, tmp_path):
    words = ("prune", "--model", "mine:normed", "--num-grads", "4", "--methods", "magnitude,joint", "--sparsity", "0.5")
    for out, more in (("a", ()), ("b", ("--batch-norm",))):
        assert quadric(*words, *more, "--out", out)[0] == 0
    for plain, again in zip(measured(tmp_path / "a")[0], measured(tmp_path / "b")[0], strict=True):
        assert plain["metric"] != again["metric"]
    pruned = load_file(tmp_path / "b" / "pruned.safetensors")
    assert int(pruned["0.num_batches_tracked"]) == 4
    status, _, err = quadric(*words, "--model", "mine:build", "--batch-norm")
    assert (status, err.count("\n")) == (2, 1)
    assert "mine:build keeps no statistics that --batch-norm could estimate again; leave it out" in err


def test_a_method_that_fails_leaves_the_others_and_is_told(quadric, tmp_path):
    words = ("prune", "--model", "mine:odd", "--num-grads", "4", "--sparsity", "0.5", "--out", "a")
    status, out, err = quadric(*words, "--methods", "magnitude,obd")
    assert (status, err) == (0, "")
    assert "obd at 50 %: failed, UnsupportedOperation" in out
    told = results(tmp_path / "a")
    assert [method["runs"][0]["error"] is None for method in told["methods"]] == [True, False]
    assert told["kept"] is None
    assert not (tmp_path / "a" / "pruned.safetensors").exists()
    assert "Not every run finished." in (tmp_path / "a" / "report.html").read_text()
    status, _, err = quadric(*words[:-1], "b", "--methods", "obd")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("quadric: error: no run finished (UnsupportedOperation")


@pytest.fixture
def interrupting(monkeypatch):
    """Makes the display ask to stop after so many looks."""
    import quadric.lab.display

    step = quadric.lab.display.Display.step

    def after(count):
        looks = itertools.count()
        monkeypatch.setattr(
            "quadric.lab.display.Display.step",
            lambda *given: step(*given) or (count is not None and next(looks) >= count),
        )

    return after


def test_a_stopped_one_continues_to_the_same_results(quadric, tmp_path, interrupting):
    words = (
        "prune",
        "--epochs",
        "1",
        "--num-grads",
        "8",
        "--parts",
        "1",
        "--sparsity",
        "0.5,0.9",
        "--methods",
        "obd,joint",
    )
    assert quadric(*words, "--out", "whole")[0] == 0
    interrupting(60)
    status, _, err = quadric(*words, "--out", "half")
    assert status == 130
    assert err == (
        "quadric: interrupted; continue with: quadric prune --epochs 1 --num-grads 8 --parts 1 --sparsity 0.5,0.9 "
        "--methods obd,joint --out half --resume\n"
    )
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "half" / "runs").glob("*.json")}
    assert len(finished) == 3
    interrupting(None)
    status, _, err = quadric("prune", "--out", "half", "--resume")
    assert (status, err) == (0, "")
    assert measured(tmp_path / "half") == measured(tmp_path / "whole")
    for name in ("dense", "pruned", "masks"):
        file = f"{name}.safetensors"
        assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    for name, before in finished.items():
        assert (tmp_path / "half" / "runs" / name).stat().st_mtime_ns == before
    status, _, err = quadric("prune", "--out", "half", "--resume", "--sparsity", "0.7")
    assert (status, err.count("\n")) == (2, 1)
    assert "half was started with another configuration (sparsities [0.5, 0.9], now [0.7])" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sparsity 1.5", "--sparsity takes shares between 0 and 1, such as 0.9 or 0.5,0.9, not '1.5'"),
        ("--sparsity 0.5,x", "--sparsity takes shares between 0 and 1"),
        ("--sparsity nan", "--sparsity takes shares between 0 and 1"),
        ("--sparsity 0", "--sparsity takes shares between 0 and 1"),
        ("--pattern 3:2", "--pattern N:M keeps N of M neighbours, and 3:2 keeps all; give the smaller number first"),
        ("--pattern 0:4", "--pattern is unstructured, N:M such as 2:4, block:RxC such as block:4x1, or channel"),
        ("--pattern rows", "or channel, not 'rows'"),
        ("--pattern 2:4 --sparsity 0.3,0.9", "--pattern 2:4 removes 0.5 of the weights at least; --sparsity cannot"),
        ("--methods joint,obs", "there is no method 'obs'; choose from magnitude, obd, fisher, single, joint"),
        ("--methods joint,joint", "--methods takes different names with commas between them, not 'joint,joint'"),
        ("--num-grads 0", "'--num-grads'"),
        ("--rounds 0", "'--rounds'"),
        ("--parts 0", "; see quadric prune --help"),
        ("--block-size 0", "'--block-size'"),
        ("--damping 0", "--damping must be a positive number, not 0"),
        ("--damping nan", "--damping must be a positive number, not nan"),
        ("--shrinkage 1.5", "--shrinkage must be between 0 and 1, not 1.5"),
        ("--scope rows", "'--scope'"),
        ("--seeds 1,1", "--seeds takes a number of seeds"),
        ("--task nope", "there is no task 'nope'"),
        ("--model vgg", "there is no model 'vgg'"),
        ("--targets conv", "mlp on digits: 'conv' matches no weight of this model"),
        ("--ignore ,", "--ignore takes different names"),
        ("--batch-norm", "mlp on digits keeps no statistics that --batch-norm could estimate again; leave it out"),
        (
            "--checkpoint nowhere",
            "there is no nowhere; give --checkpoint the folder or file that quadric train wrote, or a",
        ),
        ("--checkpoint mine.py", "mine.py holds no parameters ("),
        (
            "--checkpoint damaged.pt",
            "damaged.pt holds no parameters (it is damaged or not quadric's); give --checkpoint",
        ),
        (
            "--checkpoint mine.py --epochs 2",
            "--checkpoint and --epochs both say which parameters to take; leave one out",
        ),
        ("--checkpoint other.safetensors", "are of another network (1.weight is missing); give the --task and --model"),
        ("--model mine:build --epochs 2", "--epochs belongs to a built-in task, and --model mine:build brings its own"),
        ("--model mine:build --finetune 2", "--finetune belongs to a built-in task"),
        ("--model mine:single", "the function returned (Linear, Tensor); it has to return model, loss_fn, batches"),
        ("--model mine:loose", "its batches cannot be read (TypeError: 'int' object is not iterable)"),
        ("--model mine:few", "it gave 4 batches, and a fifth is held back to judge by; give 5 or more, or return"),
        ("--model mine:none", "it gave 0 batches, and gradients need one at least; give 1 or more"),
        ("--resume", "there is nothing to resume in runs/prune-digits-mlp; start it without --resume"),
        ("--threads 100000", "cores; give at most"),
        ("--out mine.py", "mine.py exists and is not a run's folder; choose another --out"),
    ],
)
def test_bad_values_are_one_line_and_status_2(quadric, tmp_path, words, message):
    (tmp_path / "damaged.pt").write_bytes(b"PK nothing")
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    status, out, err = quadric("prune", *words.split())
    assert (status, out) == (2, "")
    assert err.startswith("quadric: error: ")
    assert err.count("\n") == 1
    assert message in err
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"mine.py", "damaged.pt", "other.safetensors"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mine:word", "--model mine:word: evaluate returned str; it has to return a number"),
        ("mine:closed", "mine:closed: KeyError: 'labels'"),
        ("mine:infinite", "mine:infinite: "),
    ],
)
def test_what_only_shows_on_the_way_is_one_line_too(quadric, words, message):
    status, _, err = quadric("prune", "--model", words, "--num-grads", "4", "--sparsity", "0.5", "--methods", "joint")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"quadric: error: {message}")


class TestPictures:
    def series(self, x, y):
        return plots.Series("A", plots.Style("ours-0"), x=x, y=y, low=y, high=y)

    def test_ticks_are_the_sparsities_that_have_room(self):
        x = [50.0, 75.0, 87.5, 93.75, 96.9, 98.4]
        (axes,) = plots.against_sparsity([self.series(x, [90.0, 89.0, 85.0, 70.0, 40.0, 10.0])], y="q", dense=91.4).axes
        axes.figure.draw_without_rendering()
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels[0] == "50"
        assert labels[-1] == "98.4"
        assert "96.9" not in labels
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))

    def test_the_dense_network_is_on_the_axis_and_named(self):
        (axes,) = plots.against_sparsity([self.series([50.0, 90.0], [40.0, 10.0])], y="q", dense=91.4).axes
        assert axes.get_ylim()[1] > 91.4
        assert axes.get_title(loc="right") == "dotted: 91.4, nothing removed"

    def test_marks_of_a_row_do_not_hide_one_another(self):
        marks = [plots.Marks(n, plots.Style("ours-0"), "o", True, [50.0, None]) for n in "abc"]
        (axes,) = plots.sparsity_by_layer(["v", "w"], marks, 60.0).axes
        heights = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert heights == pytest.approx([-0.28, 0, 0.28])
        assert all(len(line.get_ydata()) == 1 for line in axes.lines if line.get_marker() == "o")
