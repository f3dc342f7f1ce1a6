"""Texts with one label each."""

from __future__ import annotations

from ...core.errors import UserError
from .config import Banking77, Clinc150, Tsac
from .examples import DataSet, Labelled
from .read import find, json_file, json_lines, table, there
from .split import by_number, hold_out

__all__ = ["banking77", "clinc150", "tsac"]

_Row = tuple[str, str, str]  # split, text, label


def banking77(config: Banking77) -> DataSet[Labelled]:
    """banking77.jsonl, rows {split, text, label}; or the original train.csv and test.csv, rows text,category."""
    if there(config, "banking77.jsonl") or not there(config, "train.csv"):
        rows = _rows(config, "banking77.jsonl")
    else:
        rows = [
            (split, row.text("text"), row.text("category"))
            for split in ("train", "test")
            for row in table(find(config, f"{split}.csv"))
        ]
    return _held("banking77", rows, config.validation)


def tsac(config: Tsac) -> DataSet[Labelled]:
    return _held("tsac", _rows(config, "tsac.jsonl"), config.validation)


def clinc150(config: Clinc150) -> DataSet[Labelled]:
    """clinc150.jsonl, rows {split, text, label}; or the original data_full.json. Domains are those of domains.json."""
    if there(config, "clinc150.jsonl") or not there(config, "data_full.json"):
        rows = _rows(config, "clinc150.jsonl")
    else:
        path = find(config, "data_full.json")
        try:
            rows = [(str(s), str(t), str(l)) for s, found in json_file(path).items() for t, l in found]
        except (AttributeError, TypeError, ValueError):
            raise UserError(f"{path}: not lists of [text, label] by split; get the file again") from None
    rows = [(s.removeprefix("oos_"), t, l) for s, t, l in rows if config.out_of_scope or l != "oos"]
    path = there(config, "clinc150_domains.json", "domains.json")
    of: dict[str, str] = {}
    if path:
        try:
            of = {label: domain for domain, labels in json_file(path).items() for label in labels}
        except (AttributeError, TypeError):
            raise UserError(f"{path}: not lists of intents by domain; get the file again") from None
    return _splits("clinc150", {"train": rows, "val": rows, "test": rows}, of)


def _rows(config: Banking77 | Clinc150 | Tsac, name: str) -> list[_Row]:
    return [(r.text("split"), r.text("text"), r.text("label")) for r in json_lines(find(config, name))]


def _held(title: str, rows: list[_Row], validation: float) -> DataSet[Labelled]:
    """Validation is taken from the training rows, label by label, so that every label is in both."""
    kept: list[_Row] = []
    held: list[_Row] = []
    for label in sorted({label for _, _, label in rows}):
        mine = [row for row in rows if row[0] == "train" and row[2] == label]
        a, b, _ = hold_out(mine, validation, 0.0, lambda row: row[1])
        kept += a
        held += [("val", *row[1:]) for row in b]
    return _splits(title, {"train": kept, "val": held, "test": rows})


def _splits(title: str, rows: dict[str, list[_Row]], of: dict[str, str] | None = None) -> DataSet[Labelled]:
    of = of or {}
    every = [row for found in rows.values() for row in found]
    labels = by_number([label for _, _, label in every])
    domains = by_number([of.get(label, title) for label in labels])
    made = [
        tuple(Labelled(t.strip(), labels[l], domains[of.get(l, title)]) for s, t, l in found if s == split)
        for split, found in rows.items()
    ]
    return DataSet(title, *made, labels=tuple(labels), domains=tuple(domains))
