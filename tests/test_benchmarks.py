"""The benchmarks run; what they measure is nobody's test."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def hessian_diagonal():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("hessian_diagonal")


@pytest.fixture(scope="module")
def isaac_overhead():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("isaac_overhead")


@pytest.fixture(scope="module")
def pruning():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("pruning")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_table(hessian_diagonal, tmp_path, capsys):
    hessian_diagonal.main(
        ["--quick", "--only", "mlp-1", "--ours", "--threads", "1", "--json", str(tmp_path / "out.json")]
    )
    rows = json.loads((tmp_path / "out.json").read_text())["mlp-1"]
    assert set(rows) == set(hessian_diagonal.OURS)
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert "fails" not in row
        assert row["time"] > 0
        assert name in printed
    # Parameters, gradients and diagonals over parameters and gradients, and what comes and goes.
    assert 1.5 <= rows["HesScale"]["memory"] < 2
    assert rows["HesScale"]["error"] < 0.3 < rows["HesScale, Gauss–Newton"]["error"]


def test_peak_counts_what_is_alive_together(hessian_diagonal):
    case = hessian_diagonal.mlp(8, 2)
    empty = hessian_diagonal.peak(case, lambda subject: hessian_diagonal.Turn(lambda: None), 1)

    def three_in_turn():
        for _ in range(3):
            torch.empty(1000)

    def three_at_once():
        return [torch.empty(1000) for _ in range(3)]

    assert hessian_diagonal.peak(case, lambda subject: hessian_diagonal.Turn(three_in_turn), 2) == empty + 4000
    assert hessian_diagonal.peak(case, lambda subject: hessian_diagonal.Turn(three_at_once), 2) == empty + 12000
    assert empty == 4 * sum(p.numel() for p in case.model.parameters())


def test_errors_of_an_exact_and_a_zero_estimate(hessian_diagonal):
    case = hessian_diagonal.mlp(8, 2, entries=3)
    places, exact = hessian_diagonal.exact_entries(case)

    def estimating(answer):
        return hessian_diagonal.Row(lambda subject: hessian_diagonal.Turn(answer, estimate=lambda: answer(subject)))

    def zero(subject):
        return [torch.zeros_like(p) for p in subject.params]

    def true(subject):
        found = zero(subject)
        for h, chosen, values in zip(found, places, exact.split([len(chosen) for chosen in places]), strict=True):
            h.view(-1)[chosen] = values.float()
        return found

    assert hessian_diagonal.error_of(case, estimating(zero), places, exact) == pytest.approx(1)
    assert hessian_diagonal.error_of(case, estimating(true), places, exact) < 1e-6


def test_walk(hessian_diagonal, capsys):
    rows = hessian_diagonal.walk_overhead(rounds=2, nodes=12)
    assert set(rows) == set(hessian_diagonal.tiny_chains(12))
    for row in rows.values():
        assert row["rules"] > 0


class PublishedLinear(torch.nn.Linear):
    """What the published layer looks like from outside."""

    def __init__(self, in_features, out_features, la, **options):
        super().__init__(in_features, out_features, **options)
        self.la = la

    def forward(self, x):
        assert x.dim() == 2
        return super().forward(x)


@pytest.fixture
def published(monkeypatch):
    package = types.SimpleNamespace(Linear=PublishedLinear)
    monkeypatch.setitem(sys.modules, "isaac", package)
    return package


def test_overhead_tables(isaac_overhead, published, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    names = ["256x16", "1024x64", "resnet20", "gpt"]
    isaac_overhead.main(
        ["--quick", "--only", *names, "--rounds", "2", "--threads", "1", "--json", str(out), "--plot", str(picture)]
    )
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert list(results) == names
    assert [results[name]["size"] for name in names] == [[16, 2], [64, 8], None, None]
    every = {isaac_overhead.AGAIN, isaac_overhead.RELATIVE, isaac_overhead.ABSOLUTE, isaac_overhead.PUBLISHED}
    assert set(results["256x16"]["rows"]) == set(results["gpt"]["rows"]) == every
    assert set(results["resnet20"]["rows"]) == every - {isaac_overhead.PUBLISHED}
    assert results["gpt"]["rows"][isaac_overhead.PUBLISHED]["fails"].startswith("AssertionError")
    for job in results.values():
        assert job["title"] in printed
        for name in (isaac_overhead.AGAIN, isaac_overhead.RELATIVE, isaac_overhead.ABSOLUTE):
            assert job["rows"][name]["time"] > 0
        assert job["rows"][isaac_overhead.AGAIN]["memory"] == 1
    # Weight and gradient are there anyway; a matrix of the rows comes and goes before the latter.
    assert 1 <= results["1024x64"]["rows"][isaac_overhead.RELATIVE]["memory"] < 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_row_conditions_what_it_times(isaac_overhead):
    torch.manual_seed(0)
    job = isaac_overhead.layer(6, 4)
    subjects = {}
    for row in (isaac_overhead.plain, isaac_overhead.conditioned(damping=0.5)):
        subjects[row] = subject = isaac_overhead.Subject(job.case)
        isaac_overhead.starting(job, row)(subject).run()
    plain, ours = (subject.model.weight.grad for subject in subjects.values())
    a = job.case.inputs
    torch.testing.assert_close(ours, 0.5 * plain @ torch.linalg.inv(a.T @ a / 4 + 0.5 * torch.eye(6)))


def test_bounds_of_rows(isaac_overhead, tmp_path, capsys):
    out = tmp_path / "out.json"
    isaac_overhead.main(["--quick", "--only", "mlp", "--max-rows", "2", "4", "--rounds", "2", "--json", str(out)])
    rows = json.loads(out.read_text())["mlp"]["rows"]
    assert [name for name in rows if "=" in name] == [f"isaac, max_rows={number}" for number in (2, 4, None)]
    assert all(row["time"] > 0 for row in rows.values())
    heads, line = capsys.readouterr().out.splitlines()[-2:]
    assert heads.split() == ["by", "default", "2", "4", "None"]
    assert line.split()[-4:] == [f"{row['time']:.3f}" for name, row in rows.items() if name.startswith("isaac")]


def test_without_the_published_code(isaac_overhead, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "isaac", None)
    assert isaac_overhead.published_rows() == {}
    assert "left out: make peers" in capsys.readouterr().out


def test_exchanged_layers_keep_their_parameters(isaac_overhead, published):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)))
    before, x = dict(model.named_parameters()), torch.randn(5, 3)
    outputs = model(x)
    exchanged = isaac_overhead.exchanged(published)(model)
    assert [type(module) for module in exchanged.modules()].count(PublishedLinear) == 2
    assert all(p is before[name] for name, p in exchanged.named_parameters())
    assert torch.equal(exchanged(x), outputs)


def invented(isaac_overhead, ratios):
    rows = {size: {isaac_overhead.RELATIVE: {"time": ratio}} for size, ratio in ratios.items()}
    return {
        f"{size[0]}x{size[1]}": {"title": f"{size}", "size": list(size), "goal": 1.25, "rows": rows[size]}
        for size in ratios
    }


def test_goals_met_and_missed(isaac_overhead, capsys):
    isaac_overhead.print_goals(invented(isaac_overhead, {(8, 2): 1.25, (16, 2): 1.251}), isaac_overhead.RELATIVE)
    _, _, _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("met")
    assert second.endswith("missed")


def test_plot_has_a_panel_for_each_batch(isaac_overhead):
    figure = isaac_overhead.plot(invented(isaac_overhead, {(8, 2): 1.2, (16, 2): 1.1, (16, 4): 1.4}))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 2", "batch 4"]
    line = figure.axes[0].get_lines()[1]
    assert list(line.get_xdata()) == [8, 16]
    assert list(line.get_ydata()) == [1.2, 1.1]


def test_plot_needs_a_layer(isaac_overhead):
    with pytest.raises(ValueError, match="none of mlp is one"):
        isaac_overhead.plot({"mlp": {"title": "mlp", "size": None, "goal": None, "rows": {}}})


def test_pruning_measures_what_is_not_there_yet(pruning, tmp_path, capsys):
    out, picture, page = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "page.md"
    page.write_text("before\n<!-- table one-shot -->\nold\n<!-- end -->\nafter\n")
    path, halfway = "joint, path of 6 rounds, 4 parts", "4 parts"
    wanted = ["--quick", "--json", str(out), "--only", "one-shot", "choices", "--rows", "magnitude", path, halfway]
    pruning.main([*wanted, "--seeds", "0", "--plot", str(picture), "--page", str(page)])
    cells = json.loads(out.read_text())["cells"]
    columns = pruning.EXPERIMENTS["one-shot"].columns
    assert set(cells) == {
        *(pruning.key("one-shot", row, column, 0) for row in ("magnitude", path) for column in columns),
        pruning.key("choices", halfway, "80 %", 0),
    }
    images = [cells[pruning.key("one-shot", path, column, 0)]["images"] for column in columns]
    assert images == [4 * pruning.BATCH * rounds for rounds in range(1, 7)]
    assert cells[pruning.key("one-shot", "magnitude", "50 %", 0)]["images"] == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table one-shot -->\n\n| one-shot | 50 % |")
    assert f"\n| {path} | " in text
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    pruning.main([*wanted, "--seeds", "0", "1"])
    printed = capsys.readouterr().out
    assert "seed 0" not in printed
    assert "seed 1 magnitude" not in printed  # it does not depend on the seed
    assert f"seed 1 {path}" in printed


def test_a_fine_tuned_network_is_as_sparse_as_its_level(pruning):
    torch.manual_seed(0)
    bench, judged = pruning.tiny(), []
    bench.cell = lambda model, *_, **__: judged.append(model.state_dict()["3.weight"].clone()) or {}
    row = pruning.gradual(bench, 0, curvature="magnitude", update="none", scope="layer")
    assert len(list(row)) == 3
    assert [round(float((weight == 0).float().mean()), 2) for weight in judged] == [0.75, 0.88, 0.94]


def test_folding_batch_norm_changes_nothing(pruning):
    torch.manual_seed(0)
    model = torch.nn.Sequential(pruning.ResidualBlock(3, 4, 2), pruning.ResidualBlock(4, 4, 1))
    model(torch.randn(8, 3, 6, 6))  # statistics that are not those of the start
    x = torch.randn(2, 3, 6, 6)
    expected = model.eval()(x)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    folded = pruning.fold(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), expected)
