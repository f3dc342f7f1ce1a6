"""Command lines to dataclasses, by tyro, with errors in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from ..core.errors import UserError, did_you_mean

__all__ = ["Settings", "parse"]

C = TypeVar("C")

Settings = tyro.conf.UseAppendAction[tuple[str, ...]]  # an option that may be given several times

_MARKERS = (tyro.conf.AvoidSubcommands,)
_FLAG = re.compile(r"^[│|\s]*(?:-\w(?: \S+)?, )?(--[\w.-]+(?:, --[\w.-]+)*)")


def parse(
    options: type[C], args: Sequence[str], *, verb: str, usage: str = "", default: C | None = None, hint: str = ""
) -> C:
    """`args` as an `options` dataclass. `--help` prints and exits; anything wrong is a `UserError` of one line.

    usage: what help shows after the program's name, if not the verb alone. hint: what to say of a stray argument.
    """
    text = inspect.cleandoc(options.__doc__ or "")
    kwargs: dict[str, Any] = {"prog": f"moestro {usage or verb}", "description": text, "config": _MARKERS}
    if default is not None:
        kwargs["default"] = default
    if "--help" in args or "-h" in args:
        args = ["--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            made, rest = tyro.cli(options, args=list(args), return_unknown_args=True, **kwargs)
    except SystemExit as stop:
        if not stop.code:
            raise
        _refuse_unknown(options, args, verb, kwargs)
        raise UserError(_first_sentence(said.getvalue(), verb)) from None
    if rest:
        _refuse_unknown(options, rest, verb, kwargs)
        raise UserError(f"unexpected argument {rest[0]!r}; {hint or f'see moestro {verb} --help'}")
    return made


def _refuse_unknown(options: Any, args: Sequence[str], verb: str, kwargs: dict[str, Any]) -> None:
    """Raise for the first flag that does not exist, with the nearest one that does."""
    given = [a.partition("=")[0].replace("_", "-") for a in args if a.startswith("--") and a != "--"]
    if not given:
        return
    known = _flags(options, kwargs)
    for flag in given:
        if flag not in known:
            raise UserError(f"unknown option {flag!r}{_nearest(flag, known)}; see moestro {verb} --help")


def _flags(options: Any, kwargs: dict[str, Any]) -> list[str]:
    """Every flag, as the help text lists them."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(options, args=["--help"], **kwargs)
    found = (m.group(1) for m in map(_FLAG.match, text.getvalue().splitlines()) if m)
    return [flag for group in found for flag in group.split(", ")]


def _nearest(flag: str, known: Sequence[str]) -> str:
    last = flag.lstrip("-").rpartition(".")[2]  # a field asked for without its path, or with a wrong one
    ends = [k for k in known if k.lstrip("-").rpartition(".")[2] == last]
    return f" (did you mean {ends[0]!r}?)" if ends else did_you_mean(flag, known)


def _first_sentence(box: str, verb: str) -> str:
    """What tyro's framed message says above its first rule, in one line, with the expected form of the value."""
    lines = box.splitlines()
    rows = [line.strip("│ \t") for line in lines if not line.startswith(("╭", "╰"))]
    rows = [r for r in rows if r]
    rules = [i for i, r in enumerate(rows) if set(r) <= {"─", "-"}]
    if not box.startswith("╭") and rules[:1] == [1]:  # without box characters the title is a row with a rule below
        rows, rules = rows[2:], [i - 2 for i in rules[1:]]
    said = rows[: rules[0]] if rules else rows
    if said and said[0].startswith("Missing from"):
        names = [r for r in said[1:] if r.startswith("--") or r.isupper()]
        return f"missing {', '.join(names)}; see moestro {verb} --help"
    message = " ".join(said)
    wrong = re.match(r"Error parsing (--\S+): (.*)", message)
    if wrong is None:
        return message or f"bad arguments; see moestro {verb} --help"
    flag, why = wrong.groups()
    form = next((r for r in rows if r.startswith(flag + " ")), "")
    return f"{flag}: {why}" + (f" (expected {form})" if form else "")
