"""45, Growing Transformers: models merged by averaging, and models grown in stages, on embeddings that never train."""

from __future__ import annotations

from typing import Any

from ..adapt.config import LoRA
from ..adapt.growth_config import GrowthSchedule, Stage
from ..models.config import Decoder
from ..nn.config import Attention, FeedForward
from ..nn.embeddings import Glyphs, IdCode
from .catalogue import CATALOGUE
from .later import later
from .paper import Arm, Bars, Claim, Computed, Difference, Figures, Paper, Published, Ratio

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

    def words(name: str, about: str, train: str, trainable: bool = False, passes: int = 1, **options: Any) -> Arm:
        model = base.replace(embedding=None) if trainable else base
        cost = passes * model.flops_per_token(S, "train") * LESS / B
        return Arm(
            name=name,
            about=about,
            model=model,
            cost=cost,
            passes=passes,
            options=options,
            train=later("growing_transformers", train),
        )

    def book(name: str, about: str, schedule: GrowthSchedule, equal: Any = "updates", **changes: Any) -> Arm:
        model = deep.replace(**changes)
        options = {"schedule": schedule.to_dict()}
        cost = mean_flops(schedule, model, S)
        return Arm(
            name=name,
            about=about,
            model=model,
            options=options,
            cost=cost,
            equal=equal,
            train=later("growing_transformers", "grown"),
        )

    def pair(name: str, about: str, space: str = "logits", trains: bool = False) -> Arm:
        return words(name, about, "composed", trains, 2, space=space, trains=trains)

    return [
        words("russian", "English and Russian", "specialist", text="ru"),
        words("chinese", "English and Chinese", "specialist", text="zh"),
        pair("logit-mean", "both, logits averaged"),
        pair("probability-mean", "both, probabilities averaged", "probabilities"),
        words("joint", "one model on all, the FLOPs of both", "joint", passes=2),
        pair("unshared", "logits of two with trained embeddings", trains=True),
        book("grown", "2 + 2 + 2 blocks on the frozen code", two),
        book("grown-lora", "six times 1 block, then LoRA", one),
        book("grown-glyphs", "2 + 2 + 2 blocks on pictures of letters", two, embedding=Glyphs()),
        book("monolithic", "6 blocks at once, frozen code, equal tokens", whole),
        book("trainable", "6 blocks at once, trained embedding", whole, embedding=None),
        book("monolithic-flops", "6 blocks at once, frozen code, equal FLOPs", whole, "flops"),
        book("trainable-flops", "the same with a trained embedding", whole, "flops", embedding=None),
    ]


part_of_all = later("growing_transformers", "part_of_all")


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
    data=later("growing_transformers", "load"),
    sample=later("growing_transformers", "sample"),
    arms=arms,
    system="grown",
    updates=UPDATES,
    train=later("growing_transformers", "grown"),
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
    counted=later("growing_transformers", "counted"),
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
