"""What importing loads: the package and the help texts are cheap, parts load on first use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "matplotlib", "tyro", "rich", "transformers", "triton", "tokenizers", "tensorboard")


def loaded(code: str) -> tuple[set[str], str]:
    """The heavy packages in sys.modules after running `code` in a new interpreter, and what it printed before."""
    probe = f"{code}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.rstrip().split("\n")
    return set(json.loads(last)), "\n".join(printed)


def test_import_moestro_loads_nothing_heavy() -> None:
    assert loaded("import moestro")[0] == set()


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded("import moestro; moestro.Plan")[0] >= {"torch"}


def test_layers_load_no_pictures_and_no_command_line() -> None:
    heavy = loaded("import moestro; moestro.MoE(8, 4)")[0]
    assert heavy & {"matplotlib", "tyro", "rich", "transformers"} == set()


@pytest.mark.parametrize(
    "line",
    ["--help", "train --help", "generate --help", "inspect --help", "info --help", "papers --help", "reproduce --help"],
)
def test_help_loads_no_torch(line: str) -> None:
    code = f"from moestro.cli.app import run\nassert run({line.split()!r}) == 0"
    heavy, text = loaded(code)
    assert "usage: moestro" in text
    assert heavy & {"torch", "matplotlib", "transformers"} == set()


def test_lists_of_systems_load_no_torch() -> None:
    heavy, text = loaded(
        "from moestro.cli.app import run\nfrom moestro.papers.catalogue import CATALOGUE\n"
        "assert not any(run(['papers', *one]) for one in ([], *([slug] for slug in CATALOGUE)))"
    )
    assert "moestro.adapt.config:LayerAllocation" in text
    assert heavy & {"torch", "matplotlib", "transformers"} == set()


def test_unknown_names_are_errors() -> None:
    import moestro

    with pytest.raises(AttributeError, match="Moe"):
        moestro.Moe
    assert "MoE" in dir(moestro)
