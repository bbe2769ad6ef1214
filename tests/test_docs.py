"""Every block of Python in the README and the documentation runs."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)```python([^\n]*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(page):
    """Its blocks in order, each padded with empty lines, so that a traceback names the line of the page."""
    text = page.read_text()
    for match in BLOCK.finditer(text):
        indent, mark, code = match.groups()
        assert mark.strip() in ("", "no-run"), f"{page.name}: ```python{mark} is neither run nor marked no-run"
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        yield mark.strip(), "\n" * (text[: match.start(3)].count("\n")) + "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__docs__"}
    for mark, code in blocks_of(page):
        compiled = compile(code, str(page), "exec")
        if mark != "no-run":
            exec(compiled, names)


def test_the_readme_has_blocks_that_run():
    assert any(mark == "" for mark, _ in blocks_of(ROOT / "README.md"))


def test_marks_are_understood(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n```python\na = 1\n```\n- item\n  ```python no-run\n  b = 2\n  ```\n```bash\nls\n```\n")
    assert list(blocks_of(page)) == [("", "\n\na = 1"), ("no-run", "\n\n\n\n\n\nb = 2")]
