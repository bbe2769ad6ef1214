"""Who may look at whom: docs/architecture.md, as a dictionary over the imports in the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "quadric"
CORE = {"tiles", "matrix", "curvature", "optimizer"}
BACKPROP = {f"backprop.{name}" for name in ("registry", "saved", "squares", "sampling")}
RULES = {
    f"backprop.rules.{path.stem}" for path in (PACKAGE / "backprop" / "rules").glob("*.py") if path.stem != "__init__"
}
METHODS = {f"methods.{path.stem}" for path in (PACKAGE / "methods").glob("*.py") if path.stem != "__init__"}
PRUNING = {f"pruning.{path.stem}" for path in (PACKAGE / "pruning").glob("*.py") if path.stem != "__init__"}

MAY_IMPORT = {
    "tiles": set(),
    "matrix": {"tiles"},
    "curvature": {"tiles", "matrix"},
    "optimizer": {"tiles", "matrix", "curvature"},
    **dict.fromkeys(METHODS, CORE),  # and not one another
    "methods.hesscale": CORE | {"backprop.walk", "backprop.sampling", "distributed"},
    "methods.isaac": CORE | {"layers.handle", "layers.maps", "layers.targets"},
    "layers.__init__": set(),
    "layers.maps": set(),
    "layers.targets": set(),
    "layers.intercept": {"layers.maps"},
    "layers.handle": {"layers.intercept", "layers.targets", "distributed"},
    "distributed": set(),
    "backprop.__init__": set(),
    **{room: BACKPROP - {room} for room in BACKPROP},
    **{room: BACKPROP | RULES - {room} for room in RULES},
    "backprop.rules.__init__": RULES,
    "backprop.fallbacks": {"backprop.registry"},
    "backprop.factors": BACKPROP,
    "backprop.refusals": {"backprop.registry", "backprop.fallbacks"},
    "backprop.regions": BACKPROP | RULES,
    "backprop.route": BACKPROP
    | {f"backprop.{name}" for name in ("rules.__init__", "regions", "fallbacks", "refusals")},
    "backprop.walk": BACKPROP | {f"backprop.{name}" for name in ("route", "factors", "refusals")},
    "pruning.__init__": set(),
    "pruning.weights": {"layers.targets"},
    "pruning.gradients": {"distributed", "layers.intercept"},
    "pruning.memory": set(),
    "pruning.progress": set(),
    "pruning.evidence": {"matrix", "tiles", "pruning.memory"},
    "pruning.surgery": {"pruning.evidence"},
    "pruning.masks": set(),
    "pruning.channel_atoms": set(),
    "pruning.channel_rules": {"pruning.channel_atoms"},
    "pruning.channels": {"pruning.channel_atoms", "pruning.channel_rules"},
    "pruning.compact": {"pruning.channels", "pruning.masks"},
    "pruning.export": {"pruning.masks"},
    "pruning.batch_norm": {"pruning.gradients"},
    "pruning.patterns": {"optimizer", "layers.targets", "pruning.channels", "pruning.weights"},
    "pruning.result": {"pruning.compact", "pruning.export", "pruning.masks", "pruning.memory"},
    "pruning.operation": {"matrix", "tiles", "optimizer", "distributed", "backprop.walk"}
    | PRUNING - {"pruning.prune", "pruning.gradual", "pruning.batch_norm"},
    "pruning.prune": {"matrix", "layers.targets"} | PRUNING - {"pruning.gradual", "pruning.batch_norm"},
    "pruning.gradual": {"optimizer"} | PRUNING,
    "influence": {
        "matrix",
        "tiles",
        "optimizer",
        "pruning.weights",
        "pruning.gradients",
        "pruning.memory",
        "pruning.evidence",
        "pruning.progress",
    },
    "methods.__init__": METHODS,
    "verify": CORE | METHODS | {"backprop.walk"},
    "__init__": CORE
    | METHODS
    | {"methods.__init__", "backprop.registry", "backprop.walk", "verify"}
    | PRUNING
    | {"influence"},
}
OUTSIDE = {"torch", *sys.stdlib_module_names}


def module_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def rooms_outside_lab():
    return sorted(module_of(path) for path in PACKAGE.rglob("*.py") if "lab" not in path.relative_to(PACKAGE).parts)


def imports_of(path):
    """Full names of all modules imported anywhere in a file, in functions and under TYPE_CHECKING as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["quadric", *path.relative_to(PACKAGE).parent.parts]
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{name}.{alias.name}" for alias in node.names}
            modules = {full for full in inner if exists(full)}
            found |= modules or {name}
    return found


def exists(name):
    parts = name.split(".")
    place = PACKAGE.parent.joinpath(*parts)
    return parts[0] == "quadric" and (place.with_suffix(".py").exists() or place.is_dir())


def room_of(name):
    room = name.removeprefix("quadric").removeprefix(".") or "__init__"
    return f"{room}.__init__" if (PACKAGE / room.replace(".", "/")).is_dir() else room


def file_of(module):
    return PACKAGE / (module.replace(".", "/") + ".py")


def test_every_room_has_its_arrows():
    assert set(rooms_outside_lab()) == set(MAY_IMPORT), "a new room: say in MAY_IMPORT what it may look at"


@pytest.mark.parametrize("module", rooms_outside_lab())
def test_arrows(module):
    imported = imports_of(file_of(module))
    inside = {room_of(name) for name in imported if name.split(".")[0] == "quadric"}
    assert inside <= MAY_IMPORT[module]
    outside = {name.split(".")[0] for name in imported} - {"quadric"}
    assert outside <= OUTSIDE
    if module != "distributed":
        assert not {name for name in imported if name.startswith("torch.distributed")}


def test_the_test_sees_what_it_should(tmp_path, monkeypatch):
    (tmp_path / "quadric" / "methods").mkdir(parents=True)
    (tmp_path / "quadric" / "lab").mkdir()
    for name in ("tiles.py", "methods/ginger.py", "methods/__init__.py", "lab/train.py"):
        (tmp_path / "quadric" / name).touch()
    spy = tmp_path / "quadric" / "methods" / "spy.py"
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "quadric")
    for line, room in {
        "from quadric.methods import ginger": "methods.ginger",
        "from . import ginger": "methods.ginger",
        "from .ginger import Ginger": "methods.ginger",
        "def f():\n    from quadric.lab.train import x": "lab.train",
        "import quadric.tiles": "tiles",
        "from quadric import Ginger": "__init__",
        "from ..tiles import x": "tiles",
    }.items():
        spy.write_text(line)
        assert {room_of(name) for name in imports_of(spy)} == {room}, line
