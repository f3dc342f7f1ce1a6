"""Data and training of the comparison of 39 Optimal sparsity."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...models.sizes import tokens_per_parameter
from ...tasks.config import NextToken
from ...tasks.data.config import Arc, BpeVocabulary, Gsm8k, Mmlu
from ...tasks.data.examples import DataSet, Passage, prompt_and_answer
from ...tasks.data.split import shuffled
from ...tasks.data.streams import DomainBatches
from ...tasks.probes import Example, facts_of, few_shot, generalisation_gap, memorisation, reasoning, task_loss
from ...tasks.tokenizer_file import FileTokenizer
from ..fit import fit
from ..optimal_sparsity import FACTS, PROBED, PROBLEMS, ROUNDS, SHOTS, B, S
from ..paper import Job, Outcome

SPLITS = ("train", "valid", "test")


def load(folder: Path) -> dict[str, Any]:
    """The stream of problems and facts in windows, and both to be probed: problems trained on, and held-out ones."""
    problems = Gsm8k(folder=str(folder / "gsm8k")).build()
    choices = [kind(folder=str(folder / "mmlu_arc")).build() for kind in (Arc, Mmlu)]
    facts = facts_of([c for data in choices for part in (data.train, data.valid, data.test) for c in part])
    examples = {name: [Example(*prompt_and_answer(p)) for p in getattr(problems, name)] for name in SPLITS}
    text = ["".join(e) for e in (*examples["train"][: 2 * PROBLEMS], *facts)]
    with TemporaryDirectory() as cache:
        vocabulary: Any = BpeVocabulary(size=1024, cache=cache).build(text)
    tokenizer = FileTokenizer(vocabulary.to_json(), "byte pairs")
    short = {name: [e for e in es if len(vocabulary.encode("".join(e))) < S] for name, es in examples.items()}
    seen, facts = short["train"][:PROBLEMS], facts[:FACTS]
    passages = [
        Passage("".join(f"{part[i].prompt}{part[i].answer}\n\n" for i in shuffled(len(part), turn, name)), d)
        for d, (name, part, rounds) in enumerate(zip(("problems", "facts"), (seen, facts), ROUNDS))
        for turn in range(rounds)
    ]
    data = DataSet("problems and facts", tuple(passages), domains=("problems", "facts"))
    return {
        "batches": DomainBatches(data, vocabulary, S),
        "tokenizer": tokenizer,
        "facts": few_shot(facts[SHOTS:], facts[:SHOTS]),
        **{name: es[:PROBED] for name, es in (("train", seen), ("valid", short["valid"]), ("test", short["test"]))},
    }


def sample(folder: Path) -> None:
    for slug in ("gsm8k", "mmlu_arc"):
        (folder / slug).mkdir()
    for split, count in (("train", 60), ("test", 8)):
        rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(count)]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arc = {"split": "test", "question": "Which is a gas?", "choices": [["A", "iron"], ["B", "air"]], "answer": "B"}
    mmlu = {"subject": "law", "question": "Who judges?", "choices": ["a judge", "a baker"], "answer": "A"}
    for name, row in (("arc_challenge", arc), ("mmlu_test", mmlu)):
        rows = [{**row, "question": f"{n}. {row['question']}"} for n in range(20)]
        (folder / "mmlu_arc" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def train(job: Job) -> Outcome:
    config: Any = job.arm.model
    data, tokenizer, size = job.data, job.data["tokenizer"], 2 if job.smoke else B
    model = config.replace(seed=job.seed).build()
    nats: list[float] = []
    fit(
        model,
        NextToken().build(),
        lambda step: data["batches"].train(10_000 * job.seed + step, size),
        job,
        watch=lambda step, outcome: nats.append(float(outcome.loss.detach()) / int(outcome.count)),
    )
    last = nats[-max(1, len(nats) // 10) :]
    valid = task_loss(model, tokenizer, data["valid"]).bits_per_byte
    facts = memorisation(model, tokenizer, data["facts"])
    seen, unseen = (reasoning(model, tokenizer, data[split], max_new_tokens=0) for split in ("train", "test"))
    return Outcome(
        validation=valid,
        test={
            "train_loss": sum(last) / len(last) / math.log(2),
            "facts": facts.loss.bits_per_byte,
            "recall": facts.exact,
            "solution_seen": seen.solution.bits_per_byte,
            "solution_unseen": unseen.solution.bits_per_byte,
            "gap": generalisation_gap(seen.solution, unseen.solution),
            "final_seen": seen.final.bits_per_byte,
            "final_unseen": unseen.final.bits_per_byte,
            "tpp": tokens_per_parameter(config, job.updates * size * S),
        },
    )
