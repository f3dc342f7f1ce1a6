"""Choosing a verb, and failing in one line."""

from __future__ import annotations

import errno
import sys
import types

import pytest

from moestro.cli import app, failure
from moestro.core.errors import UserError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch):
    """A verb `try` whose function the test gives."""

    def install(function) -> None:
        module = types.ModuleType("moestro.cli.trial")
        module.main = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "moestro.cli.trial", module)
        monkeypatch.setitem(app.VERBS, "trial", "a verb of the tests")

    return install


def raises(error: BaseException):
    def function(args: list[str]) -> int:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("top_k 9 > 8 experts;\n use fewer"), 2, "top_k 9 > 8 experts; use fewer"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a/state"), 1, "runs/a/state: the disk is full; free"),
        (PermissionError(errno.EACCES, "no", "/x"), 2, "/x: permission denied; choose"),
        (
            NotADirectoryError(errno.ENOTDIR, "no", "/etc/passwd/run"),
            2,
            "/etc/passwd/run: a part of the path is a file",
        ),
        (FileNotFoundError(errno.ENOENT, "no", "nowhere.txt"), 2, "nowhere.txt: no such file"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("loss is nan"), 1, "RuntimeError: loss is nan (moestro --debug"),
        (ZeroDivisionError(), 1, "ZeroDivisionError: no message"),
    ],
)
def test_every_failure_is_one_line(verb, capsys, error, status, says) -> None:
    verb(raises(error))
    assert app.run(["trial"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"moestro: error: {says}")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(verb) -> None:
    verb(raises(UserError("no")))
    with pytest.raises(UserError):
        app.run(["--debug", "trial"])


def test_status_of_a_verb(verb) -> None:
    verb(lambda args: None)
    assert app.run(["trial"]) == 0
    verb(lambda args: 3)
    assert app.run(["trial"]) == 3
    verb(raises(SystemExit("text")))
    assert app.run(["trial"]) == 1


def test_arguments_reach_the_verb(verb) -> None:
    seen: list[str] = []
    verb(seen.extend)
    app.run(["trial", "a", "--b"])
    assert seen == ["a", "--b"]


@pytest.mark.parametrize("line", [["trian"], ["--tarin"]])
def test_unknown_verb(capsys, line) -> None:
    assert app.run(line) == 2
    err = capsys.readouterr().err
    assert line[0] in err
    assert err.count("\n") == 1


def test_suggestion(capsys) -> None:
    app.run(["trian"])
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("line", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(capsys, line) -> None:
    assert app.run(line) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in app.VERBS)


def test_version(capsys) -> None:
    import moestro

    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"moestro {moestro.__version__}\n"


def test_hint_only_for_known_os_errors() -> None:
    assert failure.explain(OSError(errno.ECONNRESET, "reset"))[1] == 1
