"""Text for language models, in labelled domains."""

from __future__ import annotations

from .config import ChinesePoetry, Data, Domains, Gutenberg, RussianPlays, TinyShakespeare, WikiText2
from .examples import DataSet, Passage, as_text
from .read import find, home, missing, text, there
from .split import by_number, shuffled, tail

__all__ = ["chinese_poetry", "domains", "gutenberg", "russian_plays", "tiny_shakespeare", "wikitext2"]


def tiny_shakespeare(config: TinyShakespeare) -> DataSet[Passage]:
    return _one(config, "input.txt", "tinyshakespeare.txt")


def russian_plays(config: RussianPlays) -> DataSet[Passage]:
    return _one(config, "ru.txt")


def chinese_poetry(config: ChinesePoetry) -> DataSet[Passage]:
    return _one(config, "zh.txt")


def wikitext2(config: WikiText2) -> DataSet[Passage]:
    """With train.txt the official splits; without it test.txt is trained on, and valid.txt cut into two halves."""
    test = text(find(config, "test.txt"))
    valid = text(find(config, "valid.txt"))
    if path := there(config, "train.txt"):
        parts = text(path), valid, test
    else:
        head, back, _ = tail(valid, 0.5, 0.0)
        parts = test, head, back
    return _splits(config.slug, [parts], (config.slug,))


def gutenberg(config: Gutenberg) -> DataSet[Passage]:
    """Of every book the tail is held out; domains are the words before the first underscore of the file names."""
    folder = home(config)
    paths = sorted([*folder.glob("*_*.txt.gz"), *folder.glob("[a-z]*_*.txt")]) if folder.is_dir() else []
    if not paths:
        raise missing(config, "DOMAIN_TITLE.txt")
    names = [path.name.partition("_")[0] for path in paths]
    number = by_number(names)
    books = [tail(text(path), config.validation, config.test) for path in paths]
    return _splits(config.slug, books, tuple(number), [number[n] for n in names])


def domains(config: Domains) -> DataSet[Passage]:
    """Every data set of the config as running text; passages keep their order, other examples are mixed.

    Many data sets come sorted by label; the order of their examples is that of a hash, so that it tells nothing.
    """
    names: list[str] = []
    found: dict[str, list[Passage]] = {"train": [], "valid": [], "test": []}
    for part in config.parts:
        made = part.build()
        own = made.domains if config.split_books and len(made.domains) > 1 else ()
        first = len(names)
        title = made.title if made.title not in names else f"{made.title} {first}"
        names += [f"{title}/{name}" for name in own] or [title]
        for split, passages in found.items():
            texts: dict[int, list[str]] = {}
            examples = getattr(made, split)
            if examples and not isinstance(examples[0], Passage):
                examples = [examples[i] for i in shuffled(len(examples), 0, title)]
            for example in examples:
                texts.setdefault(example.domain if own else 0, []).append(as_text(example, made.labels))
            passages += [Passage("".join(pieces), first + number) for number, pieces in sorted(texts.items())]
    return DataSet(", ".join(names), *(tuple(rows) for rows in found.values()), domains=tuple(names))


def _one(config: Data, *names: str) -> DataSet[Passage]:
    shares = config.validation, config.test  # type: ignore[attr-defined]
    return _splits(config.slug, [tail(text(find(config, *names)), *shares)], (config.slug,))


def _splits(
    title: str, parts: list[tuple[str, str, str]], names: tuple[str, ...], numbers: list[int] | None = None
) -> DataSet[Passage]:
    numbers = numbers or [0] * len(parts)
    rows = [tuple(Passage(p[i], n) for p, n in zip(parts, numbers) if p[i]) for i in range(3)]
    return DataSet(title, *rows, domains=names)
