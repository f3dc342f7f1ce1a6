"""Questions answered by a stretch of a context (SQuAD's format)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ...core.errors import UserError
from .config import CovidQA, SquadShifts, Trcd
from .examples import Answer, DataSet, SpanQuestion
from .read import Row, find, json_file, json_lines
from .split import hold_out, shuffled

__all__ = ["covid_qa", "questions", "shorten", "squadshifts", "trcd"]


def squadshifts(config: SquadShifts) -> DataSet[SpanQuestion]:
    """DOMAIN.jsonl, a context per line; or the original DOMAIN_v1.0.json. Held out by context, in each domain."""
    parts: tuple[list[SpanQuestion], ...] = ([], [], [])
    for number, name in enumerate(config.domains):
        path = find(config, f"{name}.jsonl", f"{name}_v1.0.json")
        found = hold_out(questions(path, number), config.validation, config.test, lambda q: q.context)
        for part, rows in zip(parts, found):
            part += rows
    return DataSet(config.slug, *(tuple(part) for part in parts), domains=config.domains)


def covid_qa(config: CovidQA) -> DataSet[SpanQuestion]:
    """covid_qa_windows.jsonl, a question per line; or the original 200423_covidQA.json. Held out by context."""
    path = find(config, "covid_qa_windows.jsonl", "200423_covidQA.json")
    rows = hold_out(questions(path, 0), config.validation, config.test, lambda q: q.context)
    return DataSet(config.slug, *rows, domains=(config.slug,))


def trcd(config: Trcd) -> DataSet[SpanQuestion]:
    """The official splits."""
    rows = [tuple(questions(find(config, f"{s}.jsonl", f"{s}.json"), 0)) for s in ("train", "val", "test")]
    return DataSet(config.slug, *rows, domains=(config.slug,))


def shorten(question: SpanQuestion, words: int, seed: int = 0) -> SpanQuestion:
    """The question on a stretch of at most `words` words of its context that holds its first answer.

    Where the answer lies in the stretch is drawn from (seed, id). Answers that are not wholly inside are left out;
    an answer longer than `words` keeps all its words.
    """
    found = list(re.finditer(r"\S+", question.context))
    if len(found) <= words or not question.answers:
        return question
    first = question.answers[0]
    inside = [i for i, m in enumerate(found) if m.end() > first.start and m.start() < first.start + len(first.text)]
    low, high = (inside[0], inside[-1]) if inside else (0, 0)
    room = max(0, words - (high - low + 1))
    before = shuffled(room + 1, seed, question.id)[0]
    begin = max(0, min(low - before, len(found) - words))
    begin = min(begin, low)
    end = min(max(begin + words, high + 1), len(found))
    start, stop = found[begin].start(), found[end - 1].end()
    start = min(start, first.start)
    stop = max(stop, first.start + len(first.text))
    answers = tuple(
        Answer(a.text, a.start - start) for a in question.answers if start <= a.start and a.start + len(a.text) <= stop
    )
    return question._replace(context=question.context[start:stop], answers=answers)


def questions(path: Path, domain: int = 0) -> list[SpanQuestion]:
    """The questions of one file: JSON in SQuAD's format, or rows of JSON with a context or a question each."""
    if ".jsonl" in path.name:
        return [q for row in json_lines(path) for q in _context(row, domain)]
    value = json_file(path)
    articles = Row(value, str(path)).rows("data")
    return [q for article in articles for row in article.rows("paragraphs") for q in _context(row, domain)]


def _context(row: Row, domain: int) -> Iterable[SpanQuestion]:
    """The questions of one row: grouped by context, of SQuAD's own shape or short, or a single question."""
    context = row.text("context")
    if "qas" not in row.values:
        yield _question(row, row.get(object, "id"), row.text("question"), row.get(list, "answers"), context, domain)
        return
    for entry in row.get(list, "qas"):
        if isinstance(entry, dict):
            inner = Row(entry, row.where)
            id_, asked, answers = inner.get(object, "id"), inner.text("question"), inner.get(list, "answers")
        else:
            try:
                id_, asked, answers = entry
            except (TypeError, ValueError):
                raise UserError(f"{row.where}: a question should be [id, question, answers]") from None
        yield _question(row, id_, asked, answers, context, domain)


def _question(row: Row, id_: object, asked: str, answers: list, context: str, domain: int) -> SpanQuestion:
    made: list[Answer] = []
    for answer in answers:
        try:
            said, start = (answer["text"], answer["answer_start"]) if isinstance(answer, dict) else answer
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{row.where}: an answer should be [text, start]") from None
        if not isinstance(said, str) or not isinstance(start, int) or context[start : start + len(said)] != said:
            raise UserError(f"{row.where}: the answer {said!r} does not stand at character {start} of its context")
        if (found := Answer(said, start)) not in made:
            made.append(found)
    return SpanQuestion(str(id_), asked.strip(), context, tuple(made), domain)
