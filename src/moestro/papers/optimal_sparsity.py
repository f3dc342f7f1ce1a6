"""39 Optimal sparsity: more experts at equal active compute, seen in facts to recite and problems to reason about."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..experts.config import Gated
from ..losses.config import SwitchBalance, ZLoss
from ..models.config import Decoder
from ..models.sizes import iso_compute, optimal_sparsity_grid, size_table, tokens_per_parameter
from ..moe.config import MoELayer
from ..nn.config import Attention, RMSNorm
from .catalogue import entry
from .paper import Agree, Arm, Bars, Claim, Computed, Counted, Difference, Figures, Job, Outcome, Paper, Published

S, B = 256, 4
EXPERTS = (2, 4, 8, 16, 32)
PROBLEMS, FACTS, PROBED, SHOTS = 500, 120, 150, 2
ROUNDS = (9, 40)  # orders in which problems and facts stand in the stream


def family(smoke: bool) -> dict[str, Decoder]:
    """Models of equal active FLOPs: experts are as wide as the router and their number per token leave room for."""
    base = Decoder(
        vocab_size=1024,
        dim=32 if smoke else 64,
        num_layers=1 if smoke else 3,
        attention=Attention(num_heads=4),
        moe=MoELayer(
            num_experts=8,
            experts=Gated(width=128),
            losses=(SwitchBalance(coefficient=0.01), ZLoss(coefficient=0.001)),
        ),
        norm=RMSNorm(eps=1e-5),
        context=S,
        init_std=None,
    )
    return iso_compute(base, EXPERTS, (2,)) | iso_compute(base, (16,), (4,))


def arms(smoke: bool) -> list[Arm]:
    about = {"E2-k2": "dense: both experts, always", "E16-k4": "half as wide, twice as many per token"}
    return [
        Arm(name=name, about=about.get(name, f"{name[1:-3]} experts"), model=model, seq_len=S, equal="both")
        for name, model in family(smoke).items()
    ]


def load(folder: Path) -> dict[str, Any]:
    """The stream of problems and facts in windows, and both to be probed: problems trained on, and held-out ones."""
    from ..tasks.data.config import Arc, BpeVocabulary, Gsm8k, Mmlu
    from ..tasks.data.examples import DataSet, Passage, prompt_and_answer
    from ..tasks.data.split import shuffled
    from ..tasks.data.streams import DomainBatches
    from ..tasks.probes import Example, facts_of, few_shot
    from ..tasks.tokenizer_file import FileTokenizer

    problems = Gsm8k(folder=str(folder / "gsm8k")).build()
    choices = [kind(folder=str(folder / "mmlu_arc")).build() for kind in (Arc, Mmlu)]
    facts = facts_of([c for data in choices for part in (data.train, data.valid, data.test) for c in part])
    examples = {name: [Example(*prompt_and_answer(p)) for p in getattr(problems, name)] for name in SPLITS}
    text = ["".join(e) for e in (*examples["train"][: 2 * PROBLEMS], *facts)]
    with TemporaryDirectory() as cache:
        vocabulary: Any = BpeVocabulary(size=1024, cache=cache).build(text)
    tokenizer = FileTokenizer(vocabulary.to_json(), "byte pairs")
    fit = {name: [e for e in es if len(vocabulary.encode("".join(e))) < S] for name, es in examples.items()}
    seen, facts = fit["train"][:PROBLEMS], facts[:FACTS]
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
        **{name: es[:PROBED] for name, es in (("train", seen), ("valid", fit["valid"]), ("test", fit["test"]))},
    }


SPLITS = ("train", "valid", "test")


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
    from ..tasks.config import NextToken
    from ..tasks.probes import generalisation_gap, memorisation, reasoning, task_loss
    from .fit import fit

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


NAMES = tuple(f"E{e}-k2" for e in EXPERTS)


def falls(figure: str) -> Computed:
    """The least fall of a figure from one size to the next, plus 1 percent of it: what is taken for noise."""

    def least(figures: Figures) -> float:
        values = [figures[name][figure] for name in NAMES]
        return min((a - b) / a for a, b in itertools.pairwise(values)) + 0.01

    return Computed(text=f"{figure}: least relative fall from one E to the next, plus 0.01", function=least)


def gain(figure: str) -> Difference:
    return Difference(figure=figure, of=NAMES[-1], than=NAMES[0], relative=True)


def sparsest_over_best(figures: Figures) -> float:
    """How much worse the most experts are on held-out solutions than the best of fewer, plus 1 percent."""
    *fewer, most = (figures[name]["solution_unseen"] for name in NAMES)
    return most / min(fewer) - 1 + 0.01


@functools.cache
def counted() -> tuple[Counted, ...]:
    """Every model of the published grid, named by counting; published sizes beside them where known."""
    known = {"d512-E8-k2": (320e6, 170e6), "d1024-E16-k2": (1.9e9, 470e6), "d2048-E128-k2": (52e9, 1.5e9)}
    grid = optimal_sparsity_grid()
    found: list[Counted] = []
    for short, size in zip(grid, size_table(grid.values())):
        total, active = known.get(short, (None, None))
        found.append(Counted(what=f"{size.name}: parameters", ours=size.total, published=total))
        if active is not None:
            found.append(Counted(what=f"{size.name}: active", ours=size.active, published=active))
    return tuple(found)


GAP = Difference(figure="gap", of=NAMES[-1], than=NAMES[0], better="higher")
SPARSEST = Computed(text="solution_unseen of E32-k2 over the best of fewer, - 1, + 0.01", function=sparsest_over_best)
SAME_K = Agree(figure="solution_unseen", of="E16-k4", than="E16-k2", within=0.02, relative=True)

PAPER = Paper(
    entry=entry("optimal-sparsity"),
    parts={
        "decoder of routed layers": "moestro.models.config:Decoder",
        "top-k choice": "moestro.routers.config:TopK",
        "balance loss": "moestro.losses.config:SwitchBalance",
        "z-loss": "moestro.losses.config:ZLoss",
        "families of equal compute": "moestro.models.sizes:iso_compute",
        "sizes by counting": "moestro.models.sizes:size_table",
        "tokens per parameter": "moestro.models.sizes:tokens_per_parameter",
        "task loss": "moestro.tasks.probes:task_loss",
        "recall of facts": "moestro.tasks.probes:memorisation",
        "worked solutions": "moestro.tasks.probes:reasoning",
        "the authors' checkpoints": "moestro.convert.families.mixtral:FAMILY",
    },
    example="""from moestro.models.sizes import iso_compute, optimal_sparsity, size_name, size_table

print(size_name(optimal_sparsity(512, 8, 2)))
base = optimal_sparsity(64, 8, 2, vocab_size=512, num_layers=2)
for size in size_table(iso_compute(base, (4, 8, 16), (2,)).values(), tokens=1e9):
    print(size.name, size.flops, size.tokens_per_parameter)""",
    data=load,
    sample=sample,
    arms=arms,
    system="E8-k2",
    updates=900,
    train=train,
    grid=(4e-3, 8e-3),
    tuning=0.2,
    figures={
        "train_loss": "bits per token in the last tenth of training",
        "facts": "bits per byte of the answers of facts trained on",
        "recall": "share of facts recited word for word",
        "solution_seen": "bits per byte of solutions trained on",
        "solution_unseen": "bits per byte of held-out solutions",
        "gap": "the difference of the two",
        "final_seen": "bits per byte of final numbers trained on",
        "final_unseen": "bits per byte of held-out final numbers",
        "tpp": "training tokens per parameter",
    },
    claims=(
        Claim(text="the training loss falls with E", effect=gain("train_loss"), threshold=0.03),
        Claim(text="the training loss falls at every doubling of E", effect=falls("train_loss")),
        Claim(text="the loss of facts falls with E", effect=gain("facts"), threshold=0.03),
        Claim(text="the loss of facts falls at every doubling of E", effect=falls("facts")),
        Claim(text="the gap of held-out to seen solutions grows with E", effect=GAP, threshold=0.02),
        Claim(text="held-out solutions gain at most 1 percent from the most experts, or lose", effect=SPARSEST),
        Claim(text="at equal active compute K alone has little effect", effect=SAME_K, main=False),
    ),
    published=(
        Published(
            what="tokens per parameter where reasoning is best", figure=20.0, why="that of the sizes trained there"
        ),
        Published(what="TriviaQA, HellaSwag, GSM8K accuracy", figure="curves", why="needs 125 billion tokens"),
    ),
    counted=counted,
    picture=Bars(figures=("train_loss", "facts", "solution_seen", "solution_unseen", "gap")),
    preset="optimal-sparsity",
    notes=(
        "500 problems of GSM8K, read 8 times, and 120 facts, read 36 times, in ever new orders, the same for all arms: "
        "questions of ARC with the words of the right answer, asked after two others. 1024 byte pairs, width 64, 3 "
        "layers, 0.9 million tokens. The paper reads 125 billion tokens once.",
        "The brief proposes 3 to 4 epochs. In a trial of 400 updates of 2048 tokens on 1000 problems that left nothing "
        "to see: the gaps of 2 and 32 experts were 0.193 and 0.194. Hence fewer problems, read more often.",
        "A first run was stopped after its first arm: facts stood in one fixed order, and none was known out of it.",
        "Experts get narrower by what the router costs, so that FLOPs are equal within 1 percent, not only by name.",
        "E2-k2 takes both experts always: it is dense.",
        "The grid is counted without K = E. Vocabulary and heads are inferred; with them the known names are "
        "reproduced.",
        "GRPO and test-time compute are not shown: models of this size solve no problem of GSM8K.",
    ),
)
