"""What both kinds of `moestro inspect` share: the text with its labels, and the files that they leave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ..tasks.tokenizer import Tokenizer
    from ..trace.record import Recorder
    from ..trace.tables import Trace

__all__ = ["BATCH", "Passage", "Seen", "publish", "read_text"]

BATCH = 16_384  # tokens of one forward pass, and of the tables in the trace


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


def _layer_rows(trace: Trace) -> Iterator[tuple[str, dict[str, Any]]]:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What passed over a text gave. nats: their sum. targets, text_bytes: what they are of. seq_len: of the passes."""

    source: str
    step: int
    data: str
    seq_len: int
    nats: float
    targets: int
    text_bytes: int


def publish(
    out: Path, recorder: Recorder, text: Passage, seen: Seen, config: dict[str, Any], command: str
) -> dict[str, Any]:
    """Write trace, report and summary to the folder `out`; returns the summary."""
    from ..report.page import ReportData, write
    from ..train.files import write_json

    trace = recorder.trace()
    out.mkdir(parents=True, exist_ok=True)
    recorder.write(out / "trace.safetensors")
    summary = {
        "run": seen.source,
        "step": seen.step,
        "data": seen.data,
        "tokens": seen.targets,
        "nats": seen.nats / seen.targets,
        "bits_per_byte": seen.nats / math.log(2) / max(1, seen.text_bytes),
        "layers": dict(_layer_rows(trace)),
        "trace": str(out / "trace.safetensors"),
        "report": str(out / "report.html"),
    }
    write_json(out / "summary.json", summary)
    tiles = [
        ("bits per byte", f"{summary['bits_per_byte']:.4f}", f"{seen.targets} tokens, {seen.text_bytes} bytes"),
        ("nats per token", f"{summary['nats']:.4f}", f"sequences of {seen.seq_len}"),
    ]
    write(
        out / "report.html",
        ReportData(
            title=f"The routing of {Path(seen.source).resolve().name} on {Path(seen.data).name}",
            lead=f"{seen.data}: {text.files} files, the first {len(text.ids)} tokens; weights of {seen.source}.",
            trace=trace,
            tiles=tiles,
            config=config,
            command=command,
            notes=("Nothing was trained. Steps in the pictures are passes over consecutive parts of the text.",),
        ),
    )
    return summary
