"""Command lines to dataclasses: nested fields, and errors in one line."""

from __future__ import annotations

import dataclasses

import pytest
import tyro

from moestro.cli.parse import parse
from moestro.core.errors import UserError
from moestro.moe.config import MoELayer
from moestro.routers.config import Router, TopK


@dataclasses.dataclass(frozen=True)
class Options:
    """What the tests parse."""

    name: tyro.conf.Positional[str]
    """A name."""
    layer: MoELayer = MoELayer()
    """A layer."""
    steps: int = 3
    """How many."""
    quiet: bool = False
    """Say less."""


def test_nested_fields() -> None:
    made = parse(
        Options,
        ["x", "--layer.router.select.k", "3", "--layer.num-experts", "16", "--quiet", "--steps", "5"],
        verb="trial",
    )
    layer = MoELayer(num_experts=16, router=Router(select=TopK(k=3)))
    assert made == Options(name="x", layer=layer, steps=5, quiet=True)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["x", "--setps", "5"], r"unknown option '--setps' \(did you mean '--steps'\?\)"),
        (["--setps", "5"], r"unknown option '--setps'"),  # named before the missing argument is
        (["x", "--num-experts=5"], r"unknown option '--num-experts' \(did you mean '--layer.num-experts'\?\)"),
        (["x", "--layer.num_expert", "5"], r"did you mean '--layer.num-experts'"),
        (["x", "y"], r"unexpected argument 'y'; see moestro trial --help"),
        (["x", "--steps", "many"], r"--steps: .*'many'.*\(expected --steps INT\)"),
        (["x", "--steps"], r"--steps"),
        ([], r"missing .*; see moestro trial --help"),
        (["x", "--layer.router.activation", "tanh"], r"tanh.*activation"),
        (["x", "--layer.router.virtual", "no"], r"no"),
    ],
)
def test_errors_are_one_line(args, says) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse(Options, args, verb="trial")
    line = str(caught.value)
    assert "\n" not in line
    assert "─" not in line


def test_values_that_a_config_refuses() -> None:
    @dataclasses.dataclass(frozen=True)
    class Strict:
        """Strict."""

        k: int = 2
        """K."""

        def __post_init__(self) -> None:
            if self.k > 8:
                raise UserError(f"k {self.k} is more than 8; use fewer")

    with pytest.raises(UserError, match="k 9 is more than 8; use fewer"):
        parse(Strict, ["--k", "9"], verb="trial")


def test_help_exits_without_error(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--setps", "--help"], verb="trial")
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "usage: moestro trial" in out
    assert "--layer.router.select.k INT" in out
    assert "Experts per unit." in out
