"""The table of rules in the documentation is that of the registry."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from quadric import register_rule
from quadric.backprop.registry import RULES

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "rules.md").read_text()


def fresh_page():
    return runpy.run_path(str(DOCS / "make_rules.py"))["page"]()


@pytest.mark.skipif(
    f"torch\n{torch.__version__.partition('+')[0]}:" not in PAGE, reason="the page lists the nodes of another torch"
)
def test_the_page_is_up_to_date():
    assert fresh_page() == PAGE, "run make rules"


def test_a_rule_of_the_user_is_not_in_it(monkeypatch):
    before = fresh_page()
    monkeypatch.setitem(RULES, "FftC2CBackward0", None)  # to be taken back after the test
    monkeypatch.delitem(RULES, "FftC2CBackward0")
    register_rule("FftC2CBackward0", lambda node, g, h: h)
    register_rule("MysteryBackward", lambda node, g, h: h)
    try:
        assert fresh_page() == before
    finally:
        del RULES["MysteryBackward"]


def test_every_node_is_listed_once():
    nodes = [
        node for line in PAGE.splitlines() if line.startswith("| `") for node in re.findall(r"`(\w+Backward\w*)`", line)
    ]
    assert len(nodes) == len(set(nodes)) > 250
    assert {"TanhBackward0", "ConvolutionBackward0", "ScaledDotProductFlashAttentionForCpuBackward0"} <= set(nodes)


@pytest.mark.parametrize(
    ("name", "status"), [("MmBackward0", "exact"), ("CtcLossBackward0", "approximate"), ("TanhBackward0", "exact")]
)
def test_the_status_is_the_registry_s(name, status):
    (row,) = [line for line in PAGE.splitlines() if f"`{name}`" in line]
    assert row.split(" | ")[1] == status
    assert RULES[name].exact == (status == "exact")
