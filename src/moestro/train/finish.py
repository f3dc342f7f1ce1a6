"""What is made when training is over: the summary, a generated sample, and the report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..report.page import Generated, ReportData, write
from ..report.table import Line as Row
from ..report.table import Table
from ..serve.generate import generate
from ..tasks.corpus import Corpus
from ..tasks.tokenizer import Tokenizer
from ..trace.read import read
from .compare import Line
from .config import TrainRun
from .layout import Layout
from .load import load
from .log import read_rows
from .save import Store

__all__ = ["finish", "report_data", "report_rows", "report_table"]

PROMPT, NEW = 48, 320  # tokens of the sample, as far as the context allows


def finish(
    config: TrainRun,
    stores: Mapping[Path, Store],
    lines: Sequence[Line],
    tokenizer: Tokenizer,
    corpus: Corpus,
    command: str,
    say: Callable[[str], None],
) -> None:
    """Write summary and report, and mark the run complete. stores: folder -> store, the run's own first."""
    main, *others = stores.values()
    for other in others:
        other.commit(complete=True)
    main.put({"summary.json": {"table": [line.to_dict() for line in lines]}})
    main.commit(complete=True)
    if config.report:
        samples = list(_samples([line.name for line in lines], main.layout, tokenizer, corpus, say))
        data = report_data(config, main.layout, lines, corpus, samples, command)
        write(main.layout.report, data)
        main.put({"report.html": None})
        main.commit(complete=True)


def report_data(
    config: TrainRun,
    layout: Layout,
    lines: Sequence[Line],
    corpus: Corpus,
    samples: Sequence[Generated] = (),
    command: str = "",
) -> ReportData:
    """What the report shows of a run, read from its folder."""
    from ..core.version import __version__

    record = corpus.record
    text = record["splits"]
    skipped = ", ".join(f"{n} {reason}" for reason, n in record["skipped"].items() if n)
    return ReportData(
        title="A sparse language model and its dense twin" if config.twin else "A language model",
        lead=f"{record['title']}: {len(record['files'])} files, {text['train']['bytes'] / 1e6:.1f} MB to learn from, "
        f"{text['valid']['bytes'] / 1e6:.2f} MB held out{f'; left out: {skipped}' if skipped else ''}.",
        metrics=[row for line in lines for row in report_rows(line.name, layout.of(line.name).metrics)],
        trace=read(layout.trace) if layout.trace.is_file() else None,
        comparison=report_table(lines),
        config=config.to_dict(),
        environment={
            "moestro": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.platform(),
            "threads": torch.get_num_threads(),
            "seed": config.seed,
            "text": corpus.key,
        },
        samples=samples,
        command=command,
        patience=config.starved_after,
    )


def report_rows(name: str, metrics: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file under the names that the report knows."""
    for row in read_rows(metrics):
        if row["kind"] in ("step", "eval"):
            yield {
                "model": name,
                "split": "train" if row["kind"] == "step" else "valid",
                "step": row["step"],
                "seconds": row["seconds"],
                "bpb": row["bits_per_byte"],
                "tokens_per_s": row.get("tokens_per_second"),
                "load_entropy": row["load_entropy"],
                "routing_entropy": {path: layer["routing_entropy"] for path, layer in row.get("layers", {}).items()},
            }


def report_table(lines: Sequence[Line]) -> Table:
    """The final table, turned: a row per quantity, a column per model."""
    # quantity, unit, field, better, digits (None = with k, M, G)
    wanted: list[tuple[str, str, str, Any, int | None]] = [
        ("validation, equal steps", "bits per byte", "bits_per_byte", "lower", 4),
        ("validation, equal training time", "bits per byte", "bits_per_byte_at_time", "lower", 4),
        ("parameters", "", "params", "", None),
        ("active parameters", "", "active_params", "", None),
        ("compute", "forward FLOPs / token", "flops_per_token", "", None),
        ("speed", "training tokens / s", "tokens_per_second", "higher", 0),
        ("load entropy", "1 = equal loads", "load_entropy", "", 3),
    ]
    notes: list[str] = []
    if lines and lines[0].evaluated is not None:
        notes.append(f"equal steps: after step {lines[0].evaluated}")
    if lines and lines[0].time is not None:
        notes.append(f"equal training time: after {lines[0].time:.0f} s of steps, read off the same two runs")
    return Table(
        title=" and ".join(line.name for line in lines),
        models=tuple(line.name for line in lines),
        lines=tuple(
            Row(quantity=q, unit=u, values=tuple(getattr(line, f) for line in lines), better=b, digits=d)
            for q, u, f, b, d in wanted
        ),
        notes=tuple(notes),
    )


def _samples(
    names: Sequence[str], layout: Layout, tokenizer: Tokenizer, corpus: Corpus, say: Callable[[str], None]
) -> Iterator[Generated]:
    """A continuation of the beginning of the held-out text, by the best weights of every model."""
    for name in names:
        loaded = load(layout.of(name).root)
        context = loaded.config.model.context
        prompt = [int(i) for i in corpus.valid[: min(PROMPT, context // 2)]]
        try:
            made = generate(
                loaded.model,
                prompt,
                min(NEW, context - len(prompt)),
                temperature=0.8,
                top_p=0.95,
                seed=loaded.config.seed,
            )
        except UserError as error:
            say(f"{name}: no sample was generated ({error})")
            continue
        yield Generated(model=name, prompt=tokenizer.decode(prompt), text=tokenizer.decode(made.tokens.tolist()))
