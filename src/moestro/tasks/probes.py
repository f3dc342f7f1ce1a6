"""Probes on (prompt, answer) pairs: the task loss of answers, verbatim recall, and problems with a final number.

Source: Optimal Sparsity of Mixture-of-Experts Language Models for Reasoning Tasks, brief 39.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..convert.change.samples import evaluating
from ..core.errors import UserError
from ..core.signals import Signals
from ..serve.generate import generate
from .data.examples import Choice
from .metrics.answers import answer_bits, final_number, same_number
from .tokenizer import Tokenizer

__all__ = [
    "Example",
    "Reasoning",
    "Recall",
    "TaskLoss",
    "facts_of",
    "few_shot",
    "generalisation_gap",
    "memorisation",
    "reasoning",
    "task_loss",
]

MARK = "####"  # what precedes the final number in GSM8K
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


class Example(NamedTuple):
    """What is given, and what should follow."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TaskLoss:
    """Losses of N answers given their prompts.

    nats: [N] float64, sum over an answer's tokens. tokens, bytes: [N] int64, of the answer. right: [N] int64, tokens
    that were the most probable one given all before.
    """

    nats: Tensor
    tokens: Tensor
    bytes: Tensor
    right: Tensor

    @property
    def bits_per_token(self) -> float:
        """Mean over examples of nats / (ln 2 * tokens): log2(V) for a uniform model."""
        return answer_bits(self.nats, self.tokens, self.bytes).per_token

    @property
    def bits_per_byte(self) -> float:
        """Mean over examples of nats / (ln 2 * UTF-8 bytes)."""
        return answer_bits(self.nats, self.tokens, self.bytes).per_byte

    @property
    def exact(self) -> float:
        """Share of answers of which every token was the most probable one: what greedy decoding would recite."""
        return float((self.right == self.tokens).double().mean())


class _Encoded(NamedTuple):
    number: int
    ids: list[int]
    first: int  # of the answer
    answer_bytes: int


@torch.no_grad()
def task_loss(
    model: nn.Module,
    tokenizer: Tokenizer,
    examples: Sequence[Example | tuple[str, str]],
    *,
    tokens_per_pass: int = 8192,
    as_released: bool = False,
) -> TaskLoss:
    """-log p(answer | prompt) of each example, summed over the answer's tokens, in evaluation mode.

    Prompt and answer are tokenised together. A token that holds the end of the prompt and the beginning of the answer
    belongs to the answer; as_released: the answer begins after as many tokens as the prompt alone has, which can be off
    by one. Without a prompt the answer follows the tokenizer's separator. tokens_per_pass: of one forward pass, padding
    included. model: anything that is called as a decoder is (`models.Decoder`, `models.Ensemble`). Raises `UserError`
    for an empty answer and for an example that is longer than the context.
    """
    limit = int(model.config.context)  # type: ignore[union-attr, arg-type]
    read = [_encode(i, Example(*e), tokenizer, limit, as_released) for i, e in enumerate(examples)]
    if not read:
        raise UserError("task_loss: give at least one example")
    nats = torch.zeros(len(read), dtype=torch.float64)
    right = torch.zeros(len(read), dtype=torch.int64)
    with evaluating(model):
        for group in _groups(read, tokens_per_pass):
            _measure(model, group, nats, right)
    return TaskLoss(
        nats=nats,
        tokens=torch.tensor([len(e.ids) - e.first for e in read]),
        bytes=torch.tensor([e.answer_bytes for e in read]),
        right=right,
    )


def _encode(number: int, example: Example, tokenizer: Tokenizer, limit: int, as_released: bool) -> _Encoded:
    prompt, answer = (part.encode("utf-8") for part in example)
    if not answer:
        raise UserError(f"task_loss: the answer of example {number} is empty")
    ids, lengths = tokenizer.encode(prompt + answer)
    first = len(tokenizer.encode(prompt).ids) if as_released else int((lengths.cumsum() <= len(prompt)).sum())
    found = [int(i) for i in ids]
    if first == 0:
        found, first = [tokenizer.separator, *found], 1
    if first >= len(found):
        raise UserError(f"task_loss: the answer of example {number} has no token of its own; leave as_released out")
    if len(found) - 1 > limit:
        raise UserError(
            f"task_loss: example {number} has {len(found)} tokens, the model's context is {limit}; shorten its prompt"
        )
    return _Encoded(number, found, first, len(answer))


def _groups(read: Sequence[_Encoded], most: int) -> Iterator[list[_Encoded]]:
    """Examples of similar length together, at most so many padded tokens or one example each."""
    group: list[_Encoded] = []
    for e in sorted(read, key=lambda e: (len(e.ids), e.number)):
        if group and len(e.ids) * (len(group) + 1) > most:
            yield group
            group = []
        group.append(e)
    if group:
        yield group


def _measure(model: nn.Module, group: Sequence[_Encoded], nats: Tensor, right: Tensor) -> None:
    S = max(len(e.ids) for e in group) - 1
    tokens, targets = (torch.zeros(len(group), S, dtype=torch.int64) for _ in range(2))
    valid, counted = (torch.zeros(len(group), S, dtype=torch.bool) for _ in range(2))
    for row, e in enumerate(group):
        n = len(e.ids) - 1
        tokens[row, :n], targets[row, :n] = torch.tensor(e.ids[:-1]), torch.tensor(e.ids[1:])
        valid[row, :n], counted[row, e.first - 1 : n] = True, True
    device = next(model.parameters()).device
    signals = Signals(valid=None if bool(valid.all()) else valid.reshape(-1).to(device), quiet=True)
    logits = model(tokens.to(device), signals)[0]
    rows, targets = counted.nonzero()[:, 0], targets[counted]
    scores = logits[counted.to(device)]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
    picked = scores.gather(-1, targets.to(device)[:, None])[:, 0].double().cpu()
    if not bool(picked.isfinite().all()):
        raise UserError("task_loss: the model's logits are not finite; its weights are damaged or training diverged")
    hits = (scores.argmax(-1).cpu() == targets).long()
    where = torch.tensor([e.number for e in group])[rows]
    nats.index_add_(0, where, -picked)
    right.index_add_(0, where, hits)


def generalisation_gap(train: TaskLoss, held_out: TaskLoss, per: Literal["byte", "token"] = "byte") -> float:
    """Loss on held-out answers minus loss on answers that were trained on, in bits per byte or token."""
    name = f"bits_per_{per}"
    return getattr(held_out, name) - getattr(train, name)


def few_shot(
    examples: Sequence[Example | tuple[str, str]], shots: Sequence[Example | tuple[str, str]], separator: str = "\n\n"
) -> list[Example]:
    """The examples, each prompt after all shots, which end in `separator`."""
    head = "".join(f"{prompt}{answer}{separator}" for prompt, answer in shots)
    return [Example(head + prompt, answer) for prompt, answer in examples]


# Memorisation -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """How much of given facts a model holds. loss: of the answers. exact: share that greedy decoding would recite word
    for word. tokens: share of the answers' tokens that were the most probable one, given the answer so far.
    """

    loss: TaskLoss
    exact: float
    tokens: float


def facts_of(questions: Sequence[Choice], longest: int = 160) -> list[Example]:
    """Questions with choices as facts to be recited: the question -> the words of its right answer.

    longest: characters of question and answer together; longer ones are left out, and those whose question came before.
    """
    found = {q.question: q.choices[q.answer].strip() for q in reversed(questions)}
    kept = ((q, found[q]) for q in dict.fromkeys(q.question for q in questions))
    return [Example(f"Question: {q}\nAnswer: ", a) for q, a in kept if a and len(q) + len(a) <= longest]


def memorisation(
    model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Example | tuple[str, str]], **given: Any
) -> Recall:
    """Recall of facts that were trained on (a reference -> its words). given: what `task_loss` takes besides.

    Greedy decoding recites an answer exactly where every token of it is the most probable after the ones before, so one
    pass over the answers says both.
    """
    loss = task_loss(model, tokenizer, facts, **given)
    return Recall(loss=loss, exact=loss.exact, tokens=float(loss.right.sum()) / float(loss.tokens.sum()))


# Reasoning --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reasoning:
    """How a model solves problems. solution: loss of the whole answer. final: loss of the final number, given the
    worked solution before it. accuracy: share of problems whose number the model's own answer has; None where nothing
    was generated. texts: what it wrote.
    """

    solution: TaskLoss
    final: TaskLoss
    accuracy: float | None
    texts: tuple[str, ...]


def reasoning(
    model: nn.Module,
    tokenizer: Tokenizer,
    problems: Sequence[Example | tuple[str, str]],
    *,
    max_new_tokens: int = 256,
    stop: Sequence[str] = ("\n\n",),
    extract: Callable[[str], str] = final_number,
    batch: int = 32,
    **given: Any,
) -> Reasoning:
    """Losses of worked answers and of their final numbers, and accuracy of the model's own, decoded greedily.

    Answers end in "#### number" (GSM8K), or their last number is the final one. max_new_tokens: 0 = losses alone.
    extract: text -> what is compared, as a number where it is one. batch: problems decoded at once. given: what
    `task_loss` takes besides. Raises `UserError` for an answer without a number.
    """
    read = [Example(*p) for p in problems]
    cut = [_final(i, p) for i, p in enumerate(read)]
    solution, final = (task_loss(model, tokenizer, part, **given) for part in (read, cut))
    texts: list[str] = []
    if max_new_tokens:
        stops = [[int(i) for i in tokenizer.encode(s.encode()).ids] for s in stop]
        for start in range(0, len(read), batch):
            prompts = [[int(i) for i in tokenizer.encode(p.prompt.encode()).ids] for p in read[start : start + batch]]
            made = generate(model, prompts, max_new_tokens, stop=stops)
            texts += [tokenizer.decode(g.tokens.tolist()) for g in made]
    wanted = [extract(p.answer) for p in read]
    hits = [same_number(extract(text), want) for text, want in zip(texts, wanted)]
    accuracy = sum(hits) / len(hits) if hits else None
    return Reasoning(solution=solution, final=final, accuracy=accuracy, texts=tuple(texts))


def _final(number: int, problem: Example) -> Example:
    """The problem with all of its solution but the final number in the prompt."""
    prompt, answer = problem
    at = answer.rfind(MARK)
    if at >= 0 and answer[at + len(MARK) :].strip():
        at += len(MARK)
    else:
        found = list(_NUMBER.finditer(answer))
        if not found:
            raise UserError(f"reasoning: the answer of problem {number} has no number; give one, or '{MARK} number'")
        at = found[-1].start()
    return Example(prompt + answer[:at], answer[at:])
