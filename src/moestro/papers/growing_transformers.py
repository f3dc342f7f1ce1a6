"""45, Growing Transformers: models merged by averaging, and models grown in stages, on embeddings that never train."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

from ..adapt.config import LoRA
from ..adapt.growth_config import GrowthSchedule, Stage
from ..core.errors import UserError
from ..models.config import Decoder
from ..nn.config import Attention, FeedForward, LayerNorm, PlainFeedForward
from ..nn.embeddings import Glyphs, IdCode
from ..tasks.config import NextToken
from ..tasks.data.config import ByteVocabulary, ChinesePoetry, Domains, Gutenberg, Mmlu, RussianPlays
from .catalogue import CATALOGUE
from .paper import Arm, Bars, Claim, Computed, Counted, Difference, Figures, Job, Outcome, Paper, Published, Ratio

S, B, LESS, UPDATES = 64, 16, 8, 1500  # tokens; sequences of B, of A; updates
TEXTS = {"en": (1, 0, 0, 0), "ru": (1, 1, 0, 0), "zh": (1, 0, 1, 0), "all": (2, 1, 1, 0)}  # shares of the domains
DOMAINS = ("en", "ru", "zh", "questions")
CODE = IdCode(bits=16)
BASE = Decoder(
    vocab_size=262,  # bytes and six marks
    dim=32,
    num_layers=4,
    attention=Attention(num_heads=2),
    ffn=FeedForward(width=88),
    embedding=CODE,
    context=S,
    init_std=None,
)
FIRST = Stage(blocks=2, share=2.0)  # as long as both others: nothing below it trains again
GROWN = GrowthSchedule(stages=(FIRST, Stage(blocks=2), Stage(blocks=2)), start="random")
LOW = LoRA(rank=8, targets=("attention", "ffn"))
ONE_BY_ONE = GrowthSchedule(stages=(Stage(share=2.0), *[Stage()] * 5, Stage(blocks=0, adapter=LOW)), start="random")
AT_ONCE = GrowthSchedule.of(6)
THEIRS = Decoder(
    vocab_size=65_536,
    dim=1024,
    num_layers=9,
    attention=Attention(num_heads=32, num_kv_heads=32, head_dim=32),
    ffn=PlainFeedForward(width=4096, bias=True),
    norm=LayerNorm(),
    head_bias=True,
    embedding=CODE,
    context=1024,
)


def load(folder: Path) -> dict[str, Any]:
    """English books, Russian plays, Chinese poems and English questions, as bytes; batches of every mixture."""
    from ..tasks.data.streams import DomainBatches

    kinds = Gutenberg, RussianPlays, ChinesePoetry, Mmlu
    text = Domains(parts=tuple(kind(folder=str(folder / kind.slug)) for kind in kinds)).build()
    words = ByteVocabulary().build()
    return {name: DomainBatches(text, words, S, shares=shares) for name, shares in TEXTS.items()}


def sample(folder: Path) -> None:
    import json

    said = {
        "gutenberg_domains/fiction_a.txt": "It was the best of times, it was the worst of times.\n",
        "rusdracor_plays/ru.txt": "Быть или не быть, вот в чём вопрос.\n",
        "chinese_poetry/zh.txt": "床前明月光，疑是地上霜。\n",
        "mmlu_arc/mmlu_test.jsonl": "",
    }
    rows = [
        {"subject": "sums", "question": f"{i} + 1?", "choices": [str(i), str(i + 1)], "answer": "B"} for i in range(99)
    ]
    for name, line in said.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(line * 60 or "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Training ---------------------------------------------------------------------------------------------------------


def taught(model: Any, job: Job, text: str, updates: int, first: int = 0) -> Any:
    """The model, trained; other seeds read the same text in another order."""
    from .fit import fit

    start = first + 100_000 * job.seed
    tick = job.tick if job.arm.passes == 1 else lambda n: None  # two trainings, or two steps, per update
    job = dataclasses.replace(job, updates=updates, tick=tick)
    fit(model, NextToken().build(), lambda step: job.data[text].train(start + step, B if text == "en" else LESS), job)
    return model


def nats(model: Any, job: Job, domain: str, split: str) -> float:
    from ..tasks.language import mean_nats

    windows = job.data["all"].held_out(DOMAINS.index(domain), 64, split, 4 if job.smoke else 192)
    return mean_nats(model, windows)


def languages(model: Any, job: Job, known: tuple[str, ...] = ("en", "ru", "zh")) -> Outcome:
    test = {domain: nats(model, job, domain, "test") for domain in DOMAINS}
    test["mixed"] = (test["en"] + test["ru"] + test["zh"]) / 3
    return Outcome(validation=sum(nats(model, job, d, "valid") for d in known) / len(known), test=test)


def fresh(job: Job, number: int = 0) -> Any:
    assert job.arm.model is not None
    return job.arm.model.replace(seed=2 * job.seed + number).build()


def stored(job: Job, text: str) -> Path:
    return job.shared / f"{text}-{job.updates}.safetensors"


def specialist(job: Job) -> Outcome:
    """A model of English and one other language, kept for those that are made of two."""
    from safetensors.torch import save_file

    text = job.arm.options["text"]
    model = taught(fresh(job, int(text == "zh")), job, text, job.updates)
    job.shared.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), stored(job, text))
    return languages(model, job, ("en", text))


def composed(job: Job) -> Outcome:
    """The two specialists' outputs averaged; nothing is trained, but where their embeddings are not the same."""
    from safetensors.torch import load_file

    from ..models.ensemble import ensemble

    models = [fresh(job, i) for i in (0, 1)]
    for model, text in zip(models, ("ru", "zh")):
        if job.arm.options["trains"]:
            taught(model, job, text, job.updates)
        elif stored(job, text).is_file():
            model.load_state_dict(load_file(stored(job, text)))
        else:
            raise UserError(f"{stored(job, text)} is gone; remove the record and begin again")
    made = languages(ensemble(models, job.arm.options["space"]), job)
    return dataclasses.replace(made, test={**made.test, "single": min(languages(m, job).test["mixed"] for m in models)})


def joint(job: Job) -> Outcome:
    """One model on both languages, with as many updates as both specialists together."""
    return languages(taught(fresh(job), job, "all", 2 * job.updates), job)


def grown(job: Job) -> Outcome:
    """A model on the English books, stage by stage; with one stage, all of it at once."""
    from ..adapt.growth import growing
    from ..train.memory import step_memory

    schedule = GrowthSchedule.from_dict(job.arm.options["schedule"])
    assert isinstance(job.arm.model, Decoder)
    steps, seen, trained, held = schedule.updates(job.updates), [], [], []
    batch, memory, model = job.data["en"].train(0, B), None, None
    for stage in growing(schedule, job.arm.model.replace(seed=job.seed)):
        model = stage.model
        taught(model, job, "en", steps[stage.number], first=sum(steps[: stage.number]))
        seen.append(nats(model, job, "en", "valid"))
        memory = step_memory(model, lambda m: m.loss(batch.tokens, batch.targets)[0])
        trained.append(memory.trained)
        held.append(memory.gradients + memory.optimizer)
    assert memory is not None
    test = {"book": nats(model, job, "en", "test"), "trained": float(max(trained)), "state": float(max(held))}
    test |= {"activations": float(memory.activations)}
    if len(seen) > 1:
        test |= {"fall": min(1 - b / a for a, b in itertools.pairwise(seen)), "least trained": float(min(trained))}
    return Outcome(validation=seen[-1], test=test)


# Arms and claims --------------------------------------------------------------------------------------------------


def arms(smoke: bool) -> list[Arm]:
    from ..adapt.growth import mean_flops

    base, deep, one = BASE, BASE.replace(num_layers=6), ONE_BY_ONE
    two, whole = GROWN, AT_ONCE
    if smoke:
        small = base.replace(dim=16, ffn=FeedForward(width=24))
        base, deep, whole = small.replace(num_layers=1), small.replace(num_layers=3), GrowthSchedule.of(3)
        two, one = (
            GrowthSchedule.of(1, 1, 1),
            GrowthSchedule.of(1, 1, 1, last=LoRA(rank=2, targets=("attention", "ffn"))),
        )

    def words(name: str, about: str, train: Any, trainable: bool = False, passes: int = 1, **options: Any) -> Arm:
        model = base.replace(embedding=None) if trainable else base
        cost = passes * model.flops_per_token(S, "train") * LESS / B
        return Arm(name=name, about=about, model=model, cost=cost, passes=passes, options=options, train=train)

    def book(name: str, about: str, schedule: GrowthSchedule, equal: Any = "updates", **changes: Any) -> Arm:
        model = deep.replace(**changes)
        options = {"schedule": schedule.to_dict()}
        cost = mean_flops(schedule, model, S)
        return Arm(name=name, about=about, model=model, options=options, cost=cost, equal=equal, train=grown)

    def pair(name: str, about: str, space: str = "logits", trains: bool = False) -> Arm:
        return words(name, about, composed, trains, 2, space=space, trains=trains)

    return [
        words("russian", "English and Russian", specialist, text="ru"),
        words("chinese", "English and Chinese", specialist, text="zh"),
        pair("logit-mean", "both, logits averaged"),
        pair("probability-mean", "both, probabilities averaged", "probabilities"),
        words("joint", "one model on all, the FLOPs of both", joint, passes=2),
        pair("unshared", "logits of two with trained embeddings", trains=True),
        book("grown", "2 + 2 + 2 blocks on the frozen code", two),
        book("grown-lora", "six times 1 block, then LoRA", one),
        book("grown-glyphs", "2 + 2 + 2 blocks on pictures of letters", two, embedding=Glyphs()),
        book("monolithic", "6 blocks at once, frozen code, equal tokens", whole),
        book("trainable", "6 blocks at once, trained embedding", whole, embedding=None),
        book("monolithic-flops", "6 blocks at once, frozen code, equal FLOPs", whole, "flops"),
        book("trainable-flops", "the same with a trained embedding", whole, "flops", embedding=None),
    ]


@functools.cache
def part_of_all() -> float:
    """(head, norm and 2 blocks) / (all parameters, the embedding too), counted."""
    from ..adapt.growth import stage_costs

    deep = BASE.replace(num_layers=6)
    return stage_costs(GROWN, deep)[-1].trained / deep.replace(embedding=None).num_params()


@functools.cache
def counted() -> list[Counted]:
    from ..adapt.growth import stage_costs

    stage, whole = stage_costs(GrowthSchedule(), THEIRS)[-1], THEIRS.replace(embedding=None).num_params()
    frozen = THEIRS.num_params()
    rows = (
        ("trained in a stage: 3 blocks and head", stage.trained / 1e6, 105.0, "million"),
        ("9 blocks without the embedding", frozen / 1e6, 180.5, "million"),
        ("9 blocks with a trained embedding", whole / 1e6, 247.6, "million"),
        ("9 blocks with the stored 16-bit code", (frozen + 65_536 * 16) / 1e6, 181.6, "million"),
        ("gradients and AdamW state, of a stage", 12 * stage.trained / 1e9, None, "GB"),
        ("gradients and AdamW state, all at once", 12 * whole / 1e9, None, "GB"),
        ("share of the blocks that keep activations, last stage", stage.activation_share, None, ""),
    )
    return [Counted(what=what, ours=ours, published=theirs, unit=unit) for what, ours, theirs, unit in rows]


def beats_each(of: str) -> Computed:
    rule = f"mixed: how much lower {of} is than the better of its two specialists"
    return Computed(text=rule, function=lambda f: f[of]["single"] - f[of]["mixed"])


def better(of: str, than: str, within: float = 0.0) -> Difference:
    return Difference(figure="book", of=of, than=than, relative=True, within=within)


def at_home(f: Figures) -> float:
    return min(f["logit-mean"]["ru"] - f["russian"]["ru"], f["logit-mean"]["zh"] - f["chinese"]["zh"])


def joint_is_best(f: Figures) -> float:
    others = "russian", "chinese", "logit-mean", "probability-mean"
    return min(f[arm]["mixed"] for arm in others) - f["joint"]["mixed"]


def as_many(f: Figures) -> float:
    return 1.001 - f["grown"]["trained"] / f["grown"]["least trained"]


def as_counted(f: Figures) -> float:
    return 0.01 - abs(f["grown"]["state"] / f["trainable"]["state"] - part_of_all())


HOME = Computed(text="ru, zh: how much lower its specialist is than logit-mean, the smaller of both", function=at_home)
BEST = Computed(text="mixed: how much lower joint is than the best of the others", function=joint_is_best)
FALL = Computed(text="the least fall of a stage of grown, as a share", function=lambda f: f["grown"]["fall"])
MANY = Computed(text="1.001 minus most / fewest parameters that a stage of grown trains", function=as_many)
STATE = Computed(text="0.01 minus the distance of state(grown) / state(trainable) to the share", function=as_counted)
HALF = Ratio(figure="activations", of="grown", than="monolithic", times=2.0)
CLAIMS = (
    Claim(text="A: on all languages the mean of logits beats each specialist", effect=beats_each("logit-mean")),
    Claim(text="A: in its own language each specialist beats that mean", effect=HOME),
    Claim(text="A: one model trained on all, with the FLOPs of both, is best", effect=BEST),
    Claim(text="A: the mean of probabilities beats each too", effect=beats_each("probability-mean"), main=False),
    Claim(text="A: no shared embedding is needed for it", effect=beats_each("unshared"), main=False),
    Claim(text="B: validation loss falls in every stage, by 1 percent or more", effect=FALL, threshold=0.01),
    Claim(text="B: every stage trains as many parameters", effect=MANY),
    Claim(text="B: measured bytes of gradients and AdamW are (blocks + head) / all", effect=STATE),
    Claim(text="B: at equal tokens monolithic ends lower", effect=better("monolithic", "grown"), threshold=0.02),
    Claim(text="B: by 10 percent at most", effect=better("grown", "monolithic", 0.1)),
    Claim(text="B: and six single blocks with LoRA too", effect=better("grown-lora", "monolithic", 0.1), main=False),
    Claim(text="B: the last stage keeps at most half as many activations", effect=HALF, main=False),
)

PAPER = Paper(
    entry=CATALOGUE["growing-transformers"],
    parts={
        "embeddings of codes": "moestro.nn.embeddings:IdCode",
        "embeddings of glyphs": "moestro.nn.embeddings:Glyphs",
        "embeddings of a file": "moestro.nn.embeddings:FrozenTable",
        "several models as one": "moestro.models.ensembles:Ensemble",
        "growth by layers": "moestro.convert.config:Grow",
        "growth in stages": "moestro.adapt.growth_config:GrowthSchedule",
        "carried out": "moestro.adapt.growth:growing",
        "what a stage costs": "moestro.adapt.growth:stage_costs",
        "what a step holds": "moestro.train.memory:step_memory",
    },
    example="""
from moestro.adapt import GrowthSchedule, LoRA
from moestro.adapt.growth import growing
from moestro.models.config import Decoder
from moestro.models.ensemble import ensemble
from moestro.nn.embeddings import IdCode

model = Decoder(num_layers=4, dim=64, embedding=IdCode(bits=16))
for stage in growing(GrowthSchedule.of(2, 1, 1, last=LoRA(rank=4, targets=("attention", "ffn"))), model):
    print(stage.model.config.num_layers, "blocks,", len(stage.frozen), "tensors stand still")  # train stage.model here
both = ensemble([model.build(), model.replace(seed=1).build()])  # decoders on one vocabulary
""",
    data=load,
    sample=sample,
    arms=arms,
    system="grown",
    updates=UPDATES,
    train=grown,
    grid=(5e-3, 1e-2),
    tuning=0.2,
    smoke_updates=4,
    figures={
        "mixed": "nats per byte, mean of English, Russian and Chinese; lower is better",
        "en": "nats per byte of English books",
        "ru": "nats per byte of Russian plays",
        "zh": "nats per byte of Chinese poems",
        "questions": "nats per byte of MMLU's questions, which nobody was trained on",
        "single": "mixed, of the better of the two specialists alone",
        "book": "nats per byte of English books, lower is better",
        "fall": "least fall of the validation loss in a stage, as a share",
        "trained": "most parameters that a stage trains",
        "least trained": "fewest parameters that a stage trains",
        "state": "most bytes of gradients and optimiser in a stage, measured",
        "activations": "bytes kept for the backward pass in the last stage, measured",
    },
    claims=CLAIMS,
    picture=Bars(figures=("mixed", "book")),
    published=(
        Published(what="MMLU, percent: ru, zh, merged (best_bvv)", figure="22.29, 19.42, 23.44", why="chance is 25"),
        Published(what="nats saved by merging", figure="not stated", ours=beats_each("logit-mean")),
        Published(
            what="SQuAD, percent: 1 to 6 blocks", figure="1.21, 0.82, 3.75, 3.16, 2.30, 5.55", why="1.3B and more"
        ),
        Published(
            what="share of the loss saved by a frozen code (MMLU there: 22.29, trained 11.37)",
            figure="not stated",
            ours=better("monolithic", "trainable"),
        ),
        Published(
            what="share of the loss saved by growth at equal FLOPs",
            figure="not stated",
            ours=better("grown", "monolithic-flops"),
        ),
    ),
    counted=counted,
    preset="growing-transformers",
    notes=(
        "The authors train on 9 billion tokens of English, Russian and Chinese; here bytes of English books, Russian "
        "plays and Tang poems (the data kept for this paper, in place of captions) are read by decoders 32 wide.",
        "Optimiser, tokens per stage and the start of new blocks are not stated: here AdamW with warm-up and cosine "
        "in every stage, and new blocks drawn at random; the first stage takes as long as the two others, as nothing "
        "below trains again. Blocks that add nothing at first gave the same loss within 1 percent in a trial. In the "
        "last stage of `grown-lora` the head trains with the adapters.",
        "That growth ends at most 10 percent above holds on the mean (9 percent), not in every seed. Tried before, one "
        "seed, on validation text, 64 wide and 400 to 550 updates: equal stages 10 to 11 percent, a first stage as "
        "long as both others 9 to 10. Tried after, on the first seed's validation text (11 percent): LoRA on all older "
        "blocks in the later stages, 8 percent. Two blocks that train all the time end 4 percent above six.",
        "At equal FLOPs growth ends 1 percent above a monolithic model on the same code; it holds 40 percent of its "
        "gradients and optimiser state, and a third of its activations.",
        "The mean of logits needs a common vocabulary, not a common embedding: see the arm `unshared`.",
        "MMLU and SQuAD cannot be shown: questions are read as text, and their loss is reported.",
    ),
)
