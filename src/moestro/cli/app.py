"""Choosing the verb, and turning what goes wrong into one line and an exit status."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ..core.errors import UserError, did_you_mean
from .failure import report

__all__ = ["VERBS", "run"]

VERBS = {
    "train": "train a sparse model and its dense twin, end with a table and a report",
    "generate": "continue a text with a trained run",
    "serve": "serve a run or a model folder with transformers' server",
    "inspect": "run a trained run over any text, write its routing trace and a report",
    "convert": "checkpoints into other formats, dense models into MoE and back, with a receipt",
    "info": "parameters, active parameters, FLOPs and bytes of a preset, a published shape or a run",
    "presets": "list what `train` and `info` know by name",
    "papers": "published systems: what each adds, how far it is here, its parts and its last verdict",
    "reproduce": "a published system against its baselines at equal compute, with a verdict",
    "demo": "a whole story from beginning to end: upcycling a dense model",
    "bench": "measure layers, decoding and training against other implementations",
}


def run(args: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit status. Nothing is raised for bad input."""
    args = list(args)
    debug = args[:1] == ["--debug"]
    try:
        return _verb(args[1:] if debug else args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        if debug:
            raise
        return report(error)


def _verb(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        from .. import __version__

        print(f"moestro {__version__}")
        return 0
    name, *rest = args
    if name not in VERBS:
        kind = "option" if name.startswith("-") else "verb"
        raise UserError(f"unknown {kind} {name!r}{did_you_mean(name, VERBS)}; see moestro --help")
    return importlib.import_module(f"{__package__}.{name}").main(rest) or 0


def _help() -> str:
    verbs = "\n".join(f"  {name:<10}{line}" for name, line in VERBS.items())
    return (
        "usage: moestro [--debug] VERB ...\n\n"
        "Mixture-of-experts transformers: train them, look inside them, run them.\n\n"
        f"verbs:\n{verbs}\n\n"
        "  moestro VERB --help   options of a verb\n"
        "  moestro --version     version\n"
        "  moestro --debug VERB  show the traceback when something fails\n"
    )
