"""The floors of the house: a file imports only from lower floors or from its own folder; configs load no torch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.core.config import Config
from moestro.papers.catalogue import CATALOGUE
from moestro.papers.registry import registered

SOURCE = Path(__file__).parents[1] / "src" / "moestro"

FLOORS = {
    "core": 0,
    **dict.fromkeys(("ops", "cost", "optim"), 1),
    "nn": 2,
    **dict.fromkeys(("routers", "experts", "dispatch", "losses", "trace"), 3),
    "moe": 4,
    "models": 5,
    **dict.fromkeys(("parallel", "placement", "serve", "convert"), 6),
    **dict.fromkeys(("adapt", "report"), 7),
    "tasks": 8,
    **dict.fromkeys(("train", "hardware"), 9),
    **dict.fromkeys(("papers", "bench"), 10),
    "cli": 11,
    "testing": 12,
}
ONLY_FOR = {"bench": {"cli"}, "testing": set(), "cli": {"__main__"}}
HEAVY = {"torch", "matplotlib", "transformers", "rich", "tyro", "tokenizers", "triton"}


def module_name(file: Path, source: Path) -> str:
    parts = ["moestro", *file.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every dotted name that the tree imports, wherever: modules, and names taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
                base = ".".join([*parts, *base.split(".")] if base else parts)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def folder(name: str) -> str:
    """moestro.train.run -> train; moestro -> ''."""
    return name.split(".")[1] if name.startswith("moestro.") else ""


def violations(source: Path) -> list[str]:
    found = []
    for file in sorted(source.rglob("*.py")):
        module = module_name(file, source)
        mine = folder(module)
        at = file.relative_to(source)
        if mine not in FLOORS and mine not in ("", "__main__"):
            found.append(f"{at}: the folder {mine!r} has no floor")
            continue
        for name, line in imports(ast.parse(file.read_text()), module, file.name == "__init__.py"):
            theirs = folder(name)
            if theirs not in FLOORS or theirs == mine:
                continue
            if theirs in ONLY_FOR and mine not in ONLY_FOR[theirs]:
                found.append(f"{at}:{line} imports {name}: {theirs} is not for {mine or 'the package'}")
            elif mine in FLOORS and FLOORS[theirs] >= FLOORS[mine]:
                found.append(f"{at}:{line} (floor {FLOORS[mine]}) imports {name} (floor {FLOORS[theirs]})")
    return found


def at_import(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, nothing under TYPE_CHECKING."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # type: ignore[assignment]

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt] | None:
            if "TYPE_CHECKING" in ast.dump(node.test):
                return [self.visit(n) for n in node.orelse]
            return self.generic_visit(node)

    return Cut().visit(tree)


def heavy_imports(source: Path, start: str) -> list[str]:
    """Heavy packages that importing the module `start` loads, directly or through other moestro modules."""
    files = {module_name(f, source): f for f in source.rglob("*.py")}
    found, waiting, seen = [], [start], set()
    while waiting:
        module = waiting.pop()
        if module in seen or module not in files:
            continue
        seen.add(module)
        if "." in module:
            waiting.append(module.rpartition(".")[0])  # packages run their __init__ first
        file = files[module]
        for name, line in imports(at_import(ast.parse(file.read_text())), module, file.name == "__init__.py"):
            if name.split(".")[0] in HEAVY:
                found.append(f"{start} loads {name} (in {file.relative_to(source)}:{line})")
            if name.split(".")[0] == "moestro":
                waiting += [name, name.rpartition(".")[0]]
    return found


def torch_free() -> list[str]:
    """Modules that help texts are made from."""
    configs = [module_name(f, SOURCE) for f in SOURCE.rglob("config.py")]
    extra = ["moestro", "moestro.__main__", "moestro.core.errors", "moestro.cli.app", "moestro.cli.override"]
    papers = ["moestro.papers.registry", "moestro.papers.tables"]
    papers += [f"moestro.papers.{e.module}" for e in CATALOGUE.values() if registered(e) is not None]
    return sorted({*configs, *extra, *papers, "moestro.train.presets", "moestro.models.published"})


def test_floors() -> None:
    assert violations(SOURCE) == []


def test_configs_load_nothing_heavy() -> None:
    assert "moestro.routers.config" in torch_free()
    assert [bad for module in torch_free() for bad in heavy_imports(SOURCE, module)] == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("nn/norm.py", "from ..moe.layer import MoELayer"),
        ("nn/norm.py", "from .. import moe"),
        ("nn/norm.py", "import moestro.moe.layer"),
        ("nn/norm.py", "def f():\n    from ..models import decoder"),
        ("routers/score.py", "from ..experts.config import Gated"),
        ("train/run.py", "from ..bench.train import measure"),
        ("moe/layer.py", "from ..testing import check_router"),
        ("papers/x.py", "from ..cli.app import run"),
        ("newfolder/x.py", "import torch"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert len(violations(tmp_path)) == 1


def test_right_imports_are_let_through(tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "layer.py").write_text(
        "import torch\nfrom ..core.plan import Plan\nfrom .config import MoELayer\nfrom .. import __version__\n"
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize("through", ["import torch", "from ..core.plan import Plan", "from ..core import plan"])
def test_a_heavy_config_is_found(tmp_path: Path, through: str) -> None:
    for name in ("core", "routers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "core" / "plan.py").write_text("import torch")
    (tmp_path / "routers" / "config.py").write_text(through)
    assert len(heavy_imports(tmp_path, "moestro.routers.config")) == 1


def test_late_imports_are_no_import_time_imports(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n"
    )
    assert heavy_imports(tmp_path, "moestro.config") == []


def test_what_configs_build_exists_and_lies_no_higher() -> None:
    """`builds` names modules as strings, which the parsing above cannot see."""
    kinds = [importlib.import_module(module_name(f, SOURCE)) for f in SOURCE.rglob("config.py")]
    configs = {c for m in kinds for c in vars(m).values() if isinstance(c, type) and issubclass(c, Config) and c.builds}
    assert len(configs) > 30
    for config in configs:
        module, _, name = config.builds.partition(":")
        assert hasattr(importlib.import_module(module), name), config
        assert FLOORS[folder(module)] <= FLOORS[folder(config.__module__)], config
