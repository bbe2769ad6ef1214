"""The benchmarks run; what they measure is nobody's test."""

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def hessian_diagonal():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("hessian_diagonal")


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
