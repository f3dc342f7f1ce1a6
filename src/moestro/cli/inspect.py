"""`moestro inspect`: how a trained model routes any text."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..core.errors import UserError
from .parse import parse
from .passage import BATCH, Seen, publish, read_text
from .style import count, print_table

if TYPE_CHECKING:
    from ..train.load import Loaded

__all__ = ["inspect", "main"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Run a trained model, or a sparse model of Hugging Face's transformers, over any text; write its routing trace and
    a report about it. The router of a transformers model stays its own, and no code from its folder is run."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """The run folder (RUN/dense for its dense twin), or a folder with a model of Hugging Face's transformers."""
    data: str
    """A text file, or a folder with text files."""
    out: Path | None = None
    """Folder for trace.safetensors, report.html and summary.json. None = <run>-inspect-<name of the data>."""
    tokens: int = 65_536
    """The most tokens to read, from the beginning."""
    seq_len: int | None = None
    """Tokens per sequence; None = as in training, 512 for a transformers model."""
    state: Literal["best", "last"] = "best"
    """The weights that were best in validation, or those of the last state."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    json: bool = False
    """Print one line of JSON on stdout; everything else goes to stderr."""


def main(args: Sequence[str]) -> int:
    options = parse(Options, args, verb="inspect")
    command = shlex.join(["moestro", "inspect", *args])
    out = options.out or Path(f"{Path(options.run).resolve()}-inspect-{Path(options.data).stem or 'text'}")
    if _is_transformers(Path(options.run)):
        from .inspect_folder import inspect_folder

        sizes = options.tokens, options.seq_len or 512, options.device
        found = inspect_folder(Path(options.run), options.data, out, *sizes, command)
    else:
        from ..train.load import load

        loaded = load(options.run, state=options.state, device=options.device)
        found = inspect(loaded, options.data, out, options.tokens, options.seq_len, command)
    stream = sys.stderr if options.json else sys.stdout
    layers = found["layers"]
    print_table(
        stream,
        f"{found['tokens']} tokens of {options.data}: {found['bits_per_byte']:.4f} bits per byte",
        ["layer", "experts", "load entropy", "largest over mean load", "routing entropy", "without a token"],
        [
            [
                path,
                str(len(row["load"])),
                f"{row['load_entropy']:.4f}",
                f"{1 + row['max_violation']:.3f}",
                "" if row["routing_entropy"] is None else f"{row['routing_entropy']:.4f} nats",
                count(sum(n == 0 for n in row["load"])),
            ]
            for path, row in layers.items()
        ],
    )
    print(f"trace:  {found['trace']}\nreport: {found['report']}", file=stream)
    if options.json:
        print(json.dumps(found))
    return 0


def _is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model that transformers wrote: a config.json with a model_type."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def inspect(
    loaded: Loaded, data: str, out: Path, tokens: int = 65_536, seq_len: int | None = None, command: str = ""
) -> dict[str, Any]:
    """Run a model over the first `tokens` tokens of a text; write trace, report and summary to the folder `out`.

    Returns the summary: tokens, nats per token, bits_per_byte, and per routed layer its load [E], load_entropy,
    max_violation, routing_entropy (nats). Raises `UserError` for unusable text, sizes and folders.
    """
    import torch

    from ..tasks.batches import Batch
    from ..trace.record import Recorder
    from ..train.layout import is_run
    from ..train.models import language_model
    from ..train.step import signals_of

    config, model = loaded.config, loaded.model
    decoder = language_model(config.model, f"{loaded.folder}: inspect reads running text, which")
    S = seq_len or config.seq_len
    if tokens < 2 or not 1 <= S <= decoder.context:
        raise UserError(f"inspect: needs at least 2 tokens and a seq_len of 1 to {decoder.context}, the context")
    if "moe" not in decoder.kinds():
        raise UserError(f"{loaded.folder}: a dense model; there is no routing to inspect")
    if is_run(out):
        raise UserError(f"{out}: holds a run; choose another folder with --out")
    text = read_text(data, loaded.tokenizer, tokens)
    S = min(S, len(text.ids) - 1)
    windows = (len(text.ids) - 1) // S
    pieces = None if loaded.tokenizer.vocab_size == 256 else lambda i: loaded.tokenizer.decode([i])
    recorder = Recorder(
        config.recording,
        labels=text.names,
        tokenizer="bytes" if pieces is None else "tokenizer.json",
        pieces=pieces,
        run={"folder": str(loaded.folder), "step": loaded.step, "seq_len": S},
        model=config.model.to_dict(),
        data={"title": data, "tokens": len(text.ids)},
    )
    objective = config.objective.build()
    signals = dataclasses.replace(signals_of(config, config.steps), progress=1.0, keep=frozenset({"probs"}))
    device = next(model.parameters()).device
    per_pass = max(1, BATCH // S)
    nats, targets, text_bytes = 0.0, 0, 0
    for number, first in enumerate(range(0, windows, per_pass)):
        n = min(per_pass, windows - first)
        at = slice(first * S, (first + n) * S)
        after = slice(at.start + 1, at.stop + 1)
        batch = Batch(
            tokens=torch.from_numpy(text.ids[at]).view(n, S),
            targets=torch.from_numpy(text.ids[after]).view(n, S),
            unit_id=torch.arange(at.start, at.stop),
            text_bytes=float(text.lengths[after].sum()),
        )
        with torch.no_grad():
            outcome = objective(model, batch.to(device), signals)
        nats += float(outcome.loss)
        targets += n * S
        text_bytes += int(batch.text_bytes)
        recorder.count(number + 1, outcome.trail)
        if number == 0:
            columns = {name: values[at] for name, values in text.labels.items()}
            columns |= {"token": text.ids[at], "position": torch.arange(S).repeat(n)}
            recorder.sample(1, "text", outcome.trail, {**columns, "segment": torch.arange(n).repeat_interleave(S)})
    seen = Seen(
        source=str(loaded.folder),
        step=loaded.step,
        data=data,
        seq_len=S,
        nats=nats,
        targets=targets,
        text_bytes=text_bytes,
    )
    return publish(out, recorder, text, seen, config.to_dict(), command)
