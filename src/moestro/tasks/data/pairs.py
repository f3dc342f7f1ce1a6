"""Pairs of texts, related or not, in domains."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.errors import UserError
from .config import CoCitation, PairDomains, PubMedQA
from .examples import DataSet, Example, Labelled, Pair, Problem, SpanQuestion, Translation
from .read import find, json_lines, table
from .split import content_number, hold_out, shuffled

__all__ = ["cocitation", "mismatched", "pair_domains", "pubmedqa", "related"]


def cocitation(config: CoCitation) -> DataSet[Pair]:
    """papers.jsonl {id, title, abstract, community}, cocitation_pairs.csv {a, b, n}. A text is title and abstract."""
    texts: dict[str, str] = {}
    community: dict[str, int] = {}
    for row in json_lines(find(config, "papers.jsonl")):
        name = row.text("id")
        texts[name] = f"{row.text('title').strip()}\n{row.text('abstract').strip()}".strip()
        community[name] = row.get(int, "community")
    split = {
        name: number
        for number, part in enumerate(hold_out(sorted(texts), config.validation, config.test, str))
        for name in part
    }
    together: set[tuple[str, str]] = set()
    parts: tuple[list[tuple[str, str]], ...] = ([], [], [])
    for row in table(find(config, "cocitation_pairs.csv")):
        a, b = row.text("a"), row.text("b")
        if a not in texts or b not in texts:
            raise UserError(f"{row.where}: papers.jsonl has no {b if a in texts else a}")
        together |= {(a, b), (b, a)}
        if split[a] == split[b] and community[a] == community[b] and row.number("n") >= config.least:
            parts[split[a]].append((a, b))
    rows = [[Pair(texts[a], texts[b], True, community[a]) for a, b in part] for part in parts]
    for number in (1, 2):
        papers = [name for name in sorted(texts) if split[name] == number]
        for domain in sorted(set(community.values())):
            mine = [name for name in papers if community[name] == domain]
            wanted = sum(pair.domain == domain for pair in rows[number])
            apart = [(a, b) for i, a in enumerate(mine) for b in mine[i + 1 :] if (a, b) not in together]
            chosen = shuffled(len(apart), 0, f"apart {domain}")[:wanted]
            rows[number] += [Pair(texts[apart[i][0]], texts[apart[i][1]], False, domain) for i in chosen]
    names = tuple(f"community {i}" for i in range(1 + max(community.values(), default=-1)))
    return DataSet(config.slug, *(tuple(row) for row in rows), domains=names)


def pubmedqa(config: PubMedQA) -> DataSet[Pair]:
    """pqal.jsonl, rows {question, contexts}: a question and the paragraphs of the abstract it belongs to."""
    rows = [
        Pair(row.text("question", "QUESTION").strip(), " ".join(map(str, row.get(list, "contexts", "CONTEXTS"))))
        for row in json_lines(find(config, "pqal.jsonl"))
    ]
    train, valid, test = hold_out(rows, config.validation, config.test, lambda pair: pair.a)
    return DataSet(config.slug, train, valid + mismatched(valid), test + mismatched(test), domains=(config.slug,))


def pair_domains(config: PairDomains) -> DataSet[Pair]:
    """Domain n is the nth data set of the config. Splits are those of the data sets; training pairs are all related."""
    found: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    names: list[str] = []
    for number, part in enumerate(config.parts):
        made: DataSet[Example] = part.build()
        names.append(made.title if made.title not in names else f"{made.title} {number}")
        for split, pairs in found.items():
            examples = getattr(made, split)
            own = [p for p in examples if isinstance(p, Pair)]
            most = config.train if split == "train" else config.held_out
            rows = _some(related(examples), most)
            if split != "train":
                rows += _some(tuple(p for p in own if not p.similar), len(rows)) if own else _apart(examples, rows)
            pairs += [pair._replace(domain=number) for pair in rows]
    return DataSet(", ".join(names), *(tuple(rows) for rows in found.values()), domains=tuple(names))


def related(examples: Sequence[Example]) -> tuple[Pair, ...]:
    """The related pairs that examples give: translations, questions with solution or context, two texts of one label.

    Of every label its texts are paired up once, in an order of their own; an odd one is left over.
    """
    pairs: list[Pair] = []
    by_label: dict[int, list[str]] = {}
    for example in examples:
        if isinstance(example, Pair):
            pairs += [example] * example.similar
        elif isinstance(example, Translation):
            pairs.append(Pair(example.source, example.target))
        elif isinstance(example, Problem):
            pairs.append(Pair(example.question, example.solution))
        elif isinstance(example, SpanQuestion):
            pairs.append(Pair(example.question, example.context))
        elif isinstance(example, Labelled):
            by_label.setdefault(example.label, []).append(example.text)
        else:
            raise UserError(f"a {type(example).__name__} is no pair; choose a data set of pairs, labels or questions")
    for label, texts in sorted(by_label.items()):
        order = shuffled(len(texts), 0, f"label {label}")
        pairs += [Pair(texts[i], texts[j]) for i, j in zip(order[::2], order[1::2])]
    return tuple(pairs)


def mismatched(pairs: Sequence[Pair], same: Sequence[int] | None = None) -> tuple[Pair, ...]:
    """As many unrelated pairs: each first text with the second of a later pair of its domain.

    same: [n] numbers; pairs of equal number may be related to each other and are not mixed. A first text for which
    there is no partner is left out.
    """
    same = range(len(pairs)) if same is None else same
    groups: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.domain, []).append(i)
    found: dict[int, Pair] = {}
    for members in groups.values():
        order = [members[i] for i in shuffled(len(members), 0, "mismatched")]
        for place, i in enumerate(order):
            known = {pairs[i].a, pairs[i].b}
            others = (order[(place + step) % len(order)] for step in range(1, len(order)))
            j = next((j for j in others if same[j] != same[i] and pairs[j].b not in known), None)
            if j is not None:
                found[i] = Pair(pairs[i].a, pairs[j].b, False, pairs[i].domain)
    return tuple(found[i] for i in sorted(found))


def _apart(examples: Sequence[Example], pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Unrelated pairs beside related ones; texts of one label, or answers of one context, count as related."""
    number: dict[str, int] = {}
    for example in examples:
        if isinstance(example, Labelled):
            number[example.text] = example.label
        elif isinstance(example, SpanQuestion):
            number[example.question] = content_number(example.context)
    return mismatched(pairs, [number[p.a] for p in pairs] if number else None)


def _some(pairs: tuple[Pair, ...], most: int) -> tuple[Pair, ...]:
    if len(pairs) <= most:
        return pairs
    return tuple(pairs[i] for i in sorted(shuffled(len(pairs), 0, "some")[:most]))
