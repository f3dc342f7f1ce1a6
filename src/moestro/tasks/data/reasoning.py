"""Problems with solutions, and questions with choices."""

from __future__ import annotations

import re

from ...core.errors import UserError
from .config import Arc, Bbh, Gsm8k, Mmlu, WordProblems
from .examples import Choice, DataSet, Problem
from .read import Row, find, home, json_file, json_lines, text, there
from .split import by_number, hold_out

__all__ = ["arc", "bbh", "chain_of_thought", "gsm8k", "mmlu", "word_problems"]


def gsm8k(config: Gsm8k) -> DataSet[Problem]:
    """Solutions end in "#### answer"; the answer has no thousands separators."""

    def split(name: str) -> list[Problem]:
        return [_gsm8k(row, config.notes) for row in json_lines(find(config, f"{name}.jsonl"))]

    train, valid, _ = hold_out(split("train"), config.validation, 0.0, lambda p: p.question)
    return DataSet(config.slug, train, valid, tuple(split("test")), domains=(config.slug,))


def _gsm8k(row: Row, notes: bool) -> Problem:
    solution = row.text("answer")
    _, mark, answer = solution.rpartition("####")
    if not mark:
        raise UserError(f"{row.where}: the solution does not end in '#### answer'")
    shown = solution if notes else re.sub(r"<<.*?>>", "", solution)
    return Problem(row.text("question").strip(), shown.strip(), answer.strip().replace(",", ""))


def word_problems(config: WordProblems) -> DataSet[Problem]:
    """Held out in each of the parts, by question."""
    parts: tuple[list[Problem], ...] = ([], [], [])
    for number, name in enumerate(config.parts):
        if name not in _SHAPES:
            raise UserError(f"WordProblems.parts: {name!r} is none of {', '.join(_SHAPES)}")
        rows = [_SHAPES[name](row)._replace(domain=number) for row in json_lines(find(config, f"{name}.jsonl"))]
        for part, found in zip(parts, hold_out(rows, config.validation, config.test, lambda p: p.question)):
            part += found
    return DataSet(config.slug, *(tuple(part) for part in parts), domains=config.parts)


def _asdiv(row: Row) -> Problem:
    formula = row.text("formula", "Formula")
    answer = re.sub(r"\s*\(.*\)$", "", row.text("answer", "Answer")).strip()
    question = f"{row.text('body', 'Body').strip()} {row.text('question', 'Question').strip()}"
    return Problem(question, f"{formula}\n#### {answer}", answer)


def _svamp(row: Row) -> Problem:
    body = row.text("Body").strip()
    answer = f"{row.number('Answer'):g}"
    question = f"{body}{'' if body.endswith(('.', '?', '!', ',')) else '.'} {row.text('Question').strip()}"
    return Problem(question, f"{row.text('Equation').strip()} = {answer}\n#### {answer}", answer)


def _mawps(row: Row) -> Problem:
    equations, solutions = row.get(list, "lEquations"), row.get(list, "lSolutions")
    try:
        answer = f"{float(solutions[0]):g}"
        equation = str(equations[0])
    except (IndexError, TypeError, ValueError):
        raise UserError(f"{row.where}: no equation or no solution") from None
    return Problem(row.text("sQuestion").strip(), f"{equation}\n#### {answer}", answer)


def _aqua(row: Row) -> Problem:
    options = " ".join(str(option) for option in row.get(list, "options"))
    answer = row.text("correct").strip()
    rationale = row.text("rationale").strip()
    return Problem(f"{row.text('question').strip()} {options}", f"{rationale}\n#### {answer}", answer)


_SHAPES = {"svamp": _svamp, "mawps_single": _mawps, "asdiv": _asdiv, "aqua_devtest": _aqua}


def bbh(config: Bbh) -> DataSet[Problem]:
    """bbh.jsonl, rows {task, input, target}; or the original TASK.json files in the folder bbh/. Held out by input."""
    if there(config, "bbh.jsonl") or not (home(config) / "bbh").is_dir():
        rows = [(r.text("task"), r.text("input"), r.text("target")) for r in json_lines(find(config, "bbh.jsonl"))]
    else:
        rows = [
            (path.stem, row.text("input"), row.text("target"))
            for path in sorted((home(config) / "bbh").glob("*.json"))
            for row in Row(json_file(path), str(path)).rows("examples")
        ]
    number = by_number([task for task, _, _ in rows])
    parts: tuple[list[Problem], ...] = ([], [], [])
    for task in number:
        mine = [
            Problem(asked.strip(), said.strip(), said.strip(), number[task]) for t, asked, said in rows if t == task
        ]
        for part, found in zip(parts, hold_out(mine, config.validation, config.test, lambda p: p.question)):
            part += found
    return DataSet(config.slug, *(tuple(part) for part in parts), domains=tuple(number))


def chain_of_thought(config: Bbh) -> dict[str, str]:
    """task -> the three worked examples that the authors put before a question, without the notice on top.

    From cot_prompts.json, or the original TASK.txt files in the folder cot-prompts/.
    """
    folder = home(config) / "cot-prompts"
    if folder.is_dir():
        found = {path.stem: text(path) for path in sorted(folder.glob("*.txt"))}
    else:
        path = find(config, "cot_prompts.json")
        found = json_file(path)
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise UserError(f"{path}: not a prompt by task; get the file again")
    return {task: said.partition("-----\n")[2] or said for task, said in found.items()}


def mmlu(config: Mmlu) -> DataSet[Choice]:
    """Held out in each subject, by question."""
    rows = [
        (row.text("subject"), row.text("question"), tuple(map(str, row.get(list, "choices"))), row)
        for row in json_lines(find(config, "mmlu_test.jsonl"))
    ]
    number = by_number([row[0] for row in rows])
    parts: tuple[list[Choice], ...] = ([], [], [])
    for subject in number:
        mine = [
            Choice(asked.strip(), choices, _letter(row, "ABCDEFGHIJ"[: len(choices)]), number[subject])
            for s, asked, choices, row in rows
            if s == subject
        ]
        for part, found in zip(parts, hold_out(mine, config.validation, config.test, lambda c: c.question)):
            part += found
    return DataSet("mmlu", *(tuple(part) for part in parts), domains=tuple(number))


def arc(config: Arc) -> DataSet[Choice]:
    found: dict[str, list[Choice]] = {"dev": [], "test": []}
    for row in json_lines(find(config, "arc_challenge.jsonl")):
        try:
            names, choices = zip(*((str(name), str(said)) for name, said in row.get(list, "choices")))
        except (TypeError, ValueError):
            raise UserError(f"{row.where}: choices should be [name, text]") from None
        answer = Choice(row.text("question").strip(), choices, _letter(row, names))
        found.setdefault(row.text("split"), []).append(answer)
    train, valid, _ = hold_out(found["dev"], config.validation, 0.0, lambda c: c.question)
    return DataSet("arc", train, valid, tuple(found["test"]), domains=("arc",))


def _letter(row: Row, names: str | tuple[str, ...]) -> int:
    answer = row.text("answer")
    if answer not in tuple(names):
        raise UserError(f"{row.where}: the answer {answer!r} is none of its choices")
    return tuple(names).index(answer)
