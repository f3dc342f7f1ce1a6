"""`moestro train`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import tyro

from ..core.errors import UserError
from ..models.published import PUBLISHED
from ..tasks.config import Corpus, Examples, Text
from ..train.config import TrainRun
from ..train.models import language_model
from ..train.presets import DEFAULT, PRESETS
from .find import find
from .override import override
from .parse import Settings, parse

if TYPE_CHECKING:
    from ..train.run import Result

__all__ = ["main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What decides which other options there are; read first."""

    out: Path | None = None
    """The run folder; one that holds a run is refused unless --resume. None = runs/<time>-<preset>."""
    resume: bool = False
    """Continue the run in --out, exactly; with its own settings unless a preset or options say otherwise."""
    set: Settings = ()
    """PATH=VALUE, as often as you like: change a part, also to another type, before the options below apply.
    model.moe.router.select=routers.TopP, or as JSON '{"type": "routers.TopP", "p": 0.4}'."""
    data: str | None = None
    """What to learn from: a text file or a folder of them; for presets of other tasks, a file or folder of their rows
    (see the data options). None = the preset's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class First(Place):
    """`Place`, and what of the run itself decides about other options."""

    start: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Place):
    """Train a sparse model and its dense twin of equal active FLOPs per token; end with a table and a report.

    PRESET is a name (moestro presets), a run folder or a config.json; without one it is "stdlib", which learns from the
    source text of Python's standard library. Every field of the preset is an option below."""

    tokenizer: str | None = None
    """For text: tokenizer file (JSON of Hugging Face's tokenizers), copied into the run. None = the preset's, else
    bytes."""
    json: bool = False
    """Print one line of JSON on stdout at the end; everything else goes to stderr."""
    config: Annotated[TrainRun, tyro.conf.arg(name="")]


def main(args: Sequence[str]) -> int:
    name, config, options = read(args)
    check(config)
    from ..train.run import run
    from .progress import watcher

    with contextlib.closing(watcher(sys.stderr)) as progress:
        result = run(
            config,
            out=options.out,
            resume=options.resume,
            progress=progress,
            name=name,
            command=shlex.join(["moestro", "train", *args]),
        )
    if result.lines:  # the first rank's
        _show(sys.stderr if options.json else sys.stdout, result)
        if options.json:
            print(json.dumps(result.to_dict()), flush=True)
    return 0


def check(config: TrainRun) -> None:
    """Raise `UserError` for models that cannot be built, before anything is written."""
    if config.twin:
        from ..models.twin import dense_twin

        dense_twin(config.model, config.seq_len).num_params()
    config.model.num_params()


def read(args: Sequence[str]) -> tuple[str, TrainRun, Options]:
    """(name of the preset, the run that a command line asks for, its other options)."""
    preset, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    place = _place(rest)
    name = DEFAULT if preset is None else preset
    if name in PUBLISHED and name not in PRESETS:
        raise UserError(f"{name!r} is the shape of a published model, too large to train here; see moestro info {name}")
    if preset is None and place.resume and place.out is not None:
        name = str(place.out)
        base = find(name) if (place.out / "config.json").is_file() else find(DEFAULT)
    else:
        base = find(name)
    if place.start and not place.resume:
        base = _started(base, place.start)
    base = override(base, place.set)
    if place.data is not None:
        base = base.replace(data=_at(base.data, place.data))
    options = parse(
        Options,
        rest,
        verb="train",
        usage="train [PRESET]",
        default=Options(config=base),
        hint="a preset comes before all options",
    )
    config = options.config
    if options.tokenizer is not None:
        if not isinstance(config.data, Corpus):
            raise UserError("--tokenizer is for text; what examples become is said by --set data.vocabulary=...")
        config = config.replace(data=config.data.replace(tokenizer=options.tokenizer))
    return name if name in PRESETS else "run", config, options


def _at(data: Any, path: str) -> Any:
    """Data of the same kind and settings, from a file or folder."""
    if isinstance(data, Examples):
        return data.at(path)
    if not isinstance(data, Text):
        data = Text(tokenizer=data.tokenizer, cache=data.cache)
    return data.replace(path=path)


def _started(base: TrainRun, folder: str) -> TrainRun:
    """The run on the model of a folder: with its tokenizer, at most its context, and no twin."""
    model = language_model(find(folder).model, "--start")
    tokenizer = Path(folder) / "tokenizer.json"
    given = tokenizer.is_file() and isinstance(base.data, Corpus)
    data = base.data.replace(tokenizer=str(tokenizer)) if given else base.data
    return base.replace(model=model, start=folder, twin=False, data=data, seq_len=min(base.seq_len, model.context))


def _place(args: Sequence[str]) -> First:
    """Its options, whatever else there is. What is wrong with them is said when all options are read."""
    given = [a for a in args if a not in ("-h", "--help")]
    with contextlib.redirect_stderr(None), contextlib.suppress(SystemExit):
        return tyro.cli(First, args=given, return_unknown_args=True)[0]
    return First()


def _show(stream: TextIO, result: Result) -> None:
    """The final table, and where everything is."""
    from ..train.finish import report_table
    from .style import print_table

    made = report_table(result.lines)
    both = len(made.models) == 2
    rows: list[list[Any]] = []
    for line in made.lines:
        shown = list(line.shown())
        best = line.best()
        if best is not None:
            shown[best] += " *"
        rows.append([line.quantity, line.unit, *shown, *([line.difference()] if both else [])])
    notes = "; ".join([*made.notes, *(["* better"] if both else [])])
    columns = ["", "unit", *made.models, *(["difference"] if both else [])]
    print_table(stream, f"{made.title}, step {result.step}", columns, rows, notes)
    if not result.complete:
        print(
            f"not finished; continue with: moestro train --resume --out {shlex.quote(str(result.folder))}", file=stream
        )
    print(f"run folder: {result.folder}", file=stream)
    if result.report is not None:
        print(f"report:     {result.report}", file=stream)
