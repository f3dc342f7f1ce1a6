"""`moestro inspect`: how a trained model routes any text."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..core.errors import UserError
from .parse import parse
from .style import count, print_table

if TYPE_CHECKING:
    import numpy as np

    from ..tasks.tokenizer import Tokenizer
    from ..trace.tables import Trace
    from ..train.load import Loaded

__all__ = ["Passage", "inspect", "layer_rows", "main", "read_text"]

BATCH = 16_384  # tokens of one forward pass, and of the tables in the trace


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

    from ..report.page import ReportData, write
    from ..tasks.batches import Batch
    from ..trace.record import Recorder
    from ..train.files import write_json
    from ..train.layout import is_run
    from ..train.step import signals_of

    config, model = loaded.config, loaded.model
    S = seq_len or config.seq_len
    if tokens < 2 or not 1 <= S <= config.model.context:
        raise UserError(f"inspect: needs at least 2 tokens and a seq_len of 1 to {config.model.context}, the context")
    if "moe" not in config.model.kinds():
        raise UserError(f"{loaded.folder}: a dense model; there is no routing to inspect")
    if is_run(out):
        raise UserError(f"{out}: holds a run; choose another folder with --out")
    text = read_text(data, loaded.tokenizer, tokens)
    S = min(S, len(text.ids) - 1)
    windows = (len(text.ids) - 1) // S
    out.mkdir(parents=True, exist_ok=True)
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
    trace = recorder.trace()
    recorder.write(out / "trace.safetensors")
    summary = {
        "run": str(loaded.folder),
        "step": loaded.step,
        "data": data,
        "tokens": targets,
        "nats": nats / targets,
        "bits_per_byte": nats / math.log(2) / max(1, text_bytes),
        "layers": dict(layer_rows(trace)),
        "trace": str(out / "trace.safetensors"),
        "report": str(out / "report.html"),
    }
    write_json(out / "summary.json", summary)
    tiles = [
        ("bits per byte", f"{summary['bits_per_byte']:.4f}", f"{targets} tokens, {text_bytes} bytes"),
        ("nats per token", f"{summary['nats']:.4f}", f"sequences of {S}"),
    ]
    write(
        out / "report.html",
        ReportData(
            title=f"The routing of {loaded.folder.name} on {Path(data).name}",
            lead=f"{data}: {text.files} files, the first {len(text.ids)} tokens; weights of {loaded.folder}.",
            trace=trace,
            tiles=tiles,
            config=config.to_dict(),
            command=command,
            notes=("Nothing was trained. Steps in the pictures are passes over consecutive parts of the text.",),
        ),
    )
    return summary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """ids, lengths (bytes per token): [N] int64. labels: column -> [N]. names: kind -> names of its labels."""

    ids: np.ndarray
    lengths: np.ndarray
    labels: dict[str, np.ndarray]
    names: dict[str, tuple[str, ...]]
    files: int


def read_text(data: str, tokenizer: Tokenizer, most: int) -> Passage:
    """The first tokens of a text, with what kind of character and token of Python each is. Files end in a separator."""
    import numpy as np

    from ..tasks.config import Text
    from ..trace.labels import CHARACTERS, PYTHON, character_labels, labels_of_tokens, python_labels

    source = Text(path=data).build()
    names: dict[str, list[bytes]] = {}
    have = 0
    for path, text in _texts(source.pieces):
        names.setdefault(path, []).append(text)
        have += len(text)
        if have >= most * 16:  # a token is seldom longer
            break
    python = sum(name.endswith((".py", ".pyi")) for name in names) * 2 > len(names)
    makers = {"character": (character_labels, CHARACTERS)} | ({"python": (python_labels, PYTHON)} if python else {})
    ids, lengths = [], []
    labels: dict[str, list[np.ndarray]] = {f"label.{kind}": [] for kind in makers}
    total = 0
    for parts in names.values():
        text = b"".join(parts)
        made = tokenizer.encode(text)
        end = int(tokenizer.vocab_size == 256)  # the separator of bytes is a byte of text
        ids.append(np.append(made.ids, tokenizer.separator))
        lengths.append(np.append(made.lengths, end))
        fits = int(made.lengths.sum()) == len(text)
        for kind, (maker, _) in makers.items():
            found = labels_of_tokens(maker(text), made.lengths) if fits else np.full(len(made.ids), -1, np.int16)
            labels[f"label.{kind}"].append(np.append(found, -1).astype(np.int16))
        total += len(made.ids) + 1
        if total >= most:
            break
    all_ids = np.concatenate(ids)[:most].astype(np.int64)
    if len(all_ids) < 2:
        raise UserError(f"{data}: only {len(all_ids)} token; give more text")
    return Passage(
        ids=all_ids,
        lengths=np.concatenate(lengths)[:most].astype(np.int64),
        labels={name: np.concatenate(parts)[:most] for name, parts in labels.items()},
        names={kind: tuple(names_) for kind, (_, names_) in makers.items()},
        files=len(ids),
    )


def _texts(pieces: Any) -> Iterator[tuple[str, bytes]]:
    from ..tasks.source import chunks

    for piece in sorted(pieces, key=lambda p: (p.name, p.start)):
        for text in chunks(piece):
            yield piece.name, text


def layer_rows(trace: Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    from ..trace.metrics import load_entropy, max_violation

    counts = trace.counts
    for i, layer in enumerate(trace.layers):
        load = trace.load(i).sum(0)
        units = int(counts.entropy_units[:, i].sum())
        yield (
            layer.path,
            {
                "load": load.tolist(),
                "load_entropy": float(load_entropy(load)),
                "max_violation": float(max_violation(load)),
                "routing_entropy": float(counts.entropy[:, i].sum()) / units if units else None,
            },
        )
