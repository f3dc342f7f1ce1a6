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
from ..serve.translate import translate
from ..tasks.config import Corpus, LabelledTexts, SpanQuestions, TextPairs, Translations
from ..trace.read import read
from .adapters import export, family
from .compare import Line
from .config import TrainRun
from .layout import Layout
from .load import load
from .log import read_rows
from .material import ExampleMaterial, Material, TextMaterial
from .models import context_of
from .save import Store

__all__ = ["finish", "report_data", "report_rows", "report_table"]

PROMPT, NEW = 48, 320  # tokens of the sample, as far as the context allows
SENTENCES = 4  # that are translated

_KINDS = {
    Corpus: "language model",
    Translations: "translation model",
    LabelledTexts: "classifier of texts",
    SpanQuestions: "model that answers questions",
    TextPairs: "model of text embeddings",
}


def finish(
    config: TrainRun,
    stores: Mapping[Path, Store],
    lines: Sequence[Line],
    material: Material,
    command: str,
    say: Callable[[str], None],
) -> None:
    """Write summary and report, and mark the run complete. stores: folder -> store, the run's own first."""
    main, *others = stores.values()
    for other in others:
        other.commit(complete=True)
    main.put({"summary.json": {"table": [line.to_dict() for line in lines]}})
    main.commit(complete=True)
    if config.adapters is not None:
        _adapter(config, main, say)
    if config.report:
        samples = list(_samples([line.name for line in lines], main.layout, material, say))
        data = report_data(config, main.layout, lines, material, samples, command)
        write(main.layout.report, data)
        main.put({"report.html": None})
        main.commit(complete=True)


def _adapter(config: TrainRun, main: Store, say: Callable[[str], None]) -> None:
    """The best model's adapters, in files of their own."""
    place = main.layout / "adapter"
    try:
        export(load(main.layout.root).model, place, to=family(config.start), base=config.start)
    except UserError as error:
        say(f"adapter/ is not written: {error}")
        return
    main.put({f"adapter/{path.name}": None for path in sorted(place.iterdir())})
    main.commit(complete=True)


def report_data(
    config: TrainRun,
    layout: Layout,
    lines: Sequence[Line],
    material: Material,
    samples: Sequence[Generated] = (),
    command: str = "",
) -> ReportData:
    """What the report shows of a run, read from its folder."""
    from ..core.version import __version__

    kind = next(name for base, name in _KINDS.items() if isinstance(config.data, base))
    return ReportData(
        title=f"A sparse {kind} and its dense twin" if config.twin else f"A {kind}",
        lead=material.lead(),
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
            "text" if isinstance(config.data, Corpus) else "data": material.key,
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
                **({"bpb": row["bits_per_byte"]} if "bits_per_byte" in row else {"nats": row["nats"]}),
                "tokens_per_s": row.get("tokens_per_second"),
                "load_entropy": row["load_entropy"],
                "routing_entropy": {path: layer["routing_entropy"] for path, layer in row.get("layers", {}).items()},
            }


def report_table(lines: Sequence[Line]) -> Table:
    """The final table, turned: a row per quantity, a column per model."""
    # quantity, unit, field, better, digits (None = with k, M, G)
    measure = lines[0].measure if lines else "bits_per_byte"
    unit = {"bits_per_byte": "bits per byte", "nats": "nats per target"}[measure]
    wanted: list[tuple[str, str, str, Any, int | None]] = [
        ("validation, equal steps", unit, measure, "lower", 4),
        ("validation, equal training time", unit, f"{measure}_at_time", "lower", 4),
        ("parameters", "", "params", "", None),
        ("active parameters", "", "active_params", "", None),
        ("compute", "forward FLOPs / token", "flops_per_token", "", None),
        ("speed", "training tokens / s", "tokens_per_second", "higher", 0),
        ("load entropy", "1 = equal loads", "load_entropy", "", 3),
    ]
    made = [
        Row(quantity=q, unit=u, values=tuple(getattr(line, f) for line in lines), better=b, digits=d)
        for q, u, f, b, d in wanted
    ]
    for i, name in enumerate(lines[0].metrics or () if lines else ()):
        values = tuple((line.metrics or {}).get(name) for line in lines)
        better = "higher" if name == "accuracy" else ""
        made.insert(2 + i, Row(quantity=f"validation {name}, equal steps", values=values, better=better))
    notes: list[str] = []
    if lines and lines[0].evaluated is not None:
        notes.append(f"equal steps: after step {lines[0].evaluated}")
    if lines and lines[0].time is not None:
        notes.append(f"equal training time: after {lines[0].time:.0f} s of steps, read off the same two runs")
    return Table(
        title=" and ".join(line.name for line in lines),
        models=tuple(line.name for line in lines),
        lines=tuple(made),
        notes=tuple(notes),
    )


def _samples(
    names: Sequence[str], layout: Layout, material: Material, say: Callable[[str], None]
) -> Iterator[Generated]:
    """A continuation of the beginning of the held-out text, or translations of the first held-out sentences, by the
    best weights of every model; nothing for other tasks."""
    if isinstance(material, ExampleMaterial):
        if isinstance(material.prepared.config, Translations):
            yield from _translated(names, layout, material)
        return
    assert isinstance(material, TextMaterial)
    tokenizer = material.tokenizer
    for name in names:
        loaded = load(layout.of(name).root)
        context = context_of(loaded.config.model)
        prompt = [int(i) for i in material.corpus.valid[: min(PROMPT, context // 2)]]
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


def _translated(names: Sequence[str], layout: Layout, material: ExampleMaterial) -> Iterator[Generated]:
    vocabulary = material.prepared.vocabulary
    for name in names:
        loaded = load(layout.of(name).root)
        most = loaded.config.seq_len
        for example in material.prepared.data.valid[:SENTENCES]:
            source = [*vocabulary.encode(example.source)[: most - 1], vocabulary.eos]
            made = translate(loaded.model, source, most - 1, stop=[vocabulary.eos])  # type: ignore[arg-type]
            said = vocabulary.decode(made.tokens.tolist())  # type: ignore[union-attr]
            yield Generated(model=name, prompt=f"{example.source}\n", text=said)
