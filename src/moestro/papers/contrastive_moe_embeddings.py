"""34: one expert per domain, named by the domain and not by a gate, in an encoder of texts that is trained on pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .catalogue import entry
from .paper import Arm, Bars, Claim, Computed, Counted, Difference, Figures, Job, Outcome, Paper, Published

DOMAINS = 5  # intents of bank customers, English-German and English-French captions, problems, co-cited papers
GROUP, LENGTH, VOCABULARY = 16, 24, 6000  # pairs that are each other's negatives, tokens of a text, words
TRAIN, HELD_OUT, CHOICE = 4000, 500, 100  # most pairs of a domain: training, test, choice of learning rates
AWAY = 200  # and to see how a model does on another domain
BASE_UPDATES, BASE_LR = 300, 2e-3

EXAMPLE = """
import torch
from moestro.convert.config import Copy
from moestro.core.signals import Signals
from moestro.train.presets.pairs import embedder

dense = embedder(dim=32, num_layers=2, width=48, vocab_size=99).build()
moe, receipt = Copy(num_experts=3, top_k=1, router="label").build(dense)
print(receipt.exact, receipt.bound)
texts, domain = torch.arange(12).view(2, 6), torch.tensor([0, 2])  # the second text is of domain 2
embedding, _, trail = moe(texts, Signals(label=domain.repeat_interleave(6)))
print(embedding.shape, trail[("encoder.layers.1.ffn", 0)].load.tolist())
"""


def data(folder: Path) -> dict[str, Any]:
    """Pairs of every split, a list for each domain; collates without and with the token of a domain in front."""
    from ..tasks.data.collate import PairedTexts
    from ..tasks.data.config import Banking77, CoCitation, Gsm8k, Multi30k, PairDomains, WordVocabulary

    sets = (Banking77(), Multi30k(), Multi30k(target_language="fr"), Gsm8k(notes=False), CoCitation())
    parts = tuple(part.replace(folder=str(folder / part.slug)) for part in sets)
    found = PairDomains(parts=parts, train=TRAIN, held_out=HELD_OUT).build()
    splits = {split: [[] for _ in sets] for split in ("train", "valid", "test")}
    for split, domains in splits.items():
        for pair in getattr(found, split):
            a, b = (" ".join(text.split()[:LENGTH]) for text in (pair.a, pair.b))
            domains[pair.domain].append(pair._replace(a=a, b=b))
    names = [f"<domain {i}>" for i in range(DOMAINS)]
    texts = (text for pairs in splits["train"] for pair in pairs for text in (pair.a, pair.b))
    vocabulary = WordVocabulary(size=VOCABULARY).build(texts, names)
    collates = [PairedTexts(vocabulary, LENGTH, tokens, swap=True) for tokens in ((), names)]
    return splits | {"vocabulary": vocabulary, "collates": collates}


def sample(folder: Path) -> None:
    import json

    def lines(name: str, rows: list[Any]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")

    count = range(60)
    lines("intents/banking77.jsonl", [
        {"split": s, "text": f"question {i} about card {i % 2} {s}", "label": f"card {i % 2}"}
        for s in ("train", "test") for i in count
    ])  # fmt: skip
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("en", "de", "fr"):
            lines(f"multi30k/{split}.{language}", [f"{language} sentence {i} of {split}" for i in count])
    for split in ("train", "test"):
        rows = [{"question": f"{i} and {i} in {split}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in count]
        lines(f"gsm8k/{split}.jsonl", rows)
    papers = [{"id": f"P{i}", "title": f"Paper {i}", "abstract": f"On topic {i % 2}.", "community": 0} for i in count]
    lines("acl_cocitation/papers.jsonl", papers)
    cited = [f"P{i},P{j},1" for i in count for j in count if i < j and (i + j) % 9 == 0]
    lines("acl_cocitation/cocitation_pairs.csv", ["a,b,n", *cited])


def arms(smoke: bool) -> list[Arm]:
    from ..losses.config import MNR, MNRPlus
    from ..train.presets.pairs import embedder, labelled

    sizes = {"dim": 16, "width": 16, "num_layers": 2} if smoke else {"dim": 96, "width": 192, "num_layers": 3}
    dense = embedder(vocab_size=VOCABULARY, context=LENGTH, **sizes)
    every = labelled(dense, DOMAINS)
    middle = labelled(dense, DOMAINS, layers=(dense.encoder.num_layers // 2,))
    both: dict[str, Any] = {"seq_len": LENGTH, "equal": "both"}
    plus, mnr = ({"loss": loss.to_dict(), "tokens": True} for loss in (MNRPlus(), MNR()))
    alone = {"train": train_single, "options": plus | {"tokens": False}}
    return [
        Arm(name="moe", about="an expert per domain, domain tokens", model=every, options=plus, **both),
        Arm(name="middle", about="experts in the middle layer only", model=middle, options=plus, **both),
        Arm(name="dense", about="one model, domain tokens", model=dense, options=plus, **both),
        Arm(name="single", about="a model per domain, a fifth of the updates each", model=dense, **alone, **both),
        Arm(name="moe-mnr", about="as moe, trained on mnr", model=every, options=mnr, **both),
    ]


def prepare(job: Job) -> None:
    """The dense model that all arms begin with, trained on all domains; domain tokens begin as copies of [cls]."""
    from safetensors.torch import save_file

    from ..losses.config import MNRPlus

    model, vocabulary = dense_model(job), job.data["vocabulary"]
    updates = job.updates if job.smoke else BASE_UPDATES
    learn(model, dataclasses.replace(job, lr=BASE_LR, updates=updates), range(DOMAINS), MNRPlus(), tokens=False)
    table = model.encoder.embed.weight.data
    table[job.data["collates"][1].first] = table[vocabulary.cls].clone()
    save_file(model.state_dict(), job.shared / "dense.safetensors")


def dense_model(job: Job, load: bool = False) -> Any:
    """The dense model, new or as `prepare` left it."""
    from safetensors.torch import load_file

    config: Any = next(arm for arm in arms(job.smoke) if arm.name == "dense").model
    encoder = config.encoder.replace(vocab_size=job.data["vocabulary"].size)
    model = config.replace(encoder=encoder, seed=job.seed).build()
    if load:
        model.load_state_dict(load_file(job.shared / "dense.safetensors"))
    return model


def parts(job: Job, split: str, domains: Any, tokens: bool, most: int = HELD_OUT) -> list[Any]:
    """The examples of each of these domains; of held-out ones at most so many related and as many others."""
    from ..tasks.data.batches import ExampleBatches

    found = []
    for domain in domains:
        pairs = job.data[split][domain]
        if split != "train":
            pairs = [p for kind in (True, False) for p in [p for p in pairs if p.similar is kind][:most]]
        found.append(ExampleBatches(pairs, job.data["collates"][tokens], job.seed))
    return found


def learn(model: Any, job: Job, domains: Any, loss: Any, tokens: bool) -> None:
    """Every batch holds as many groups of pairs as there are domains in all."""
    from ..optim.config import AdamW, Cosine
    from ..tasks.matching import GroupedPairs
    from ..tasks.objectives import MatchPairs
    from .fit import fit

    batches = GroupedPairs(parts(job, "train", domains, tokens), GROUP)
    objective = MatchPairs(loss=loss, group=GROUP).build()
    optimizer = AdamW(schedule=Cosine(warmup=0.1))
    fit(model, objective, lambda step: batches.train(step, GROUP * DOMAINS), job, optimizer=optimizer)


def measure(model: Any, job: Job, split: str, tokens: bool, domains: Any = range(DOMAINS), most: int = HELD_OUT) -> Any:
    """What `match` says of each domain."""
    from ..tasks.matching import match

    held = parts(job, split, domains, tokens, most)
    return [match(model, (batch for _, batch in part.each(250))) for part in held]


def outcome(valid: list[Any], test: list[Any], **more: float) -> Outcome:
    def mean(values: list[float]) -> float:
        return 100 * sum(values) / len(values)

    f1 = {f"f1-{i}": 100 * found.best.f1 for i, found in enumerate(test)}
    more |= {"f1": mean([t.best.f1 for t in test]), "gap": mean([t.cosines.related - t.cosines.others for t in test])}
    return Outcome(validation=-mean([v.best.f1 for v in valid]), test=f1 | more)


def train(job: Job) -> Outcome:
    from ..convert.config import Copy
    from ..losses.config import PairLoss

    tokens, more = job.arm.options["tokens"], {}
    model = dense_model(job, load=True)
    kinds = job.arm.model.encoder.kinds()  # type: ignore[union-attr]
    if "moe" in kinds:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "moe")
        model, receipt = Copy(num_experts=DOMAINS, top_k=1, router="label", layers=layers).build(model)
        more["apart"] = receipt.measured.relative
    else:
        start = measure(model, job, "test", tokens=False)
        more["start"] = 100 * sum(found.best.f1 for found in start) / DOMAINS
    learn(model, job, range(DOMAINS), PairLoss.from_dict(job.arm.options["loss"]), tokens)
    return outcome(measure(model, job, "valid", tokens, most=CHOICE), measure(model, job, "test", tokens), **more)


def train_single(job: Job) -> Outcome:
    """A dense model for each domain, and how it does on the other domains."""
    from ..losses.config import PairLoss

    valid: list[Any] = []
    test: list[Any] = []
    away: list[float] = []
    each = dataclasses.replace(job, updates=max(1, round(job.updates / DOMAINS)))
    for domain in range(DOMAINS):
        model = dense_model(job, load=True)
        learn(model, each, [domain], PairLoss.from_dict(job.arm.options["loss"]), tokens=False)
        valid += measure(model, job, "valid", False, [domain], CHOICE)
        test += measure(model, job, "test", False, [domain])
        others = [i for i in range(DOMAINS) if i != domain]
        away += [found.best.f1 for found in measure(model, job, "test", False, others, AWAY)]
    return outcome(valid, test, **{"f1-away": 100 * sum(away) / len(away)})


def counted() -> list[Counted]:
    from ..train.presets.pairs import embedder, labelled

    base = embedder(dim=768, width=1152, num_layers=22, num_heads=12, vocab_size=50_368, context=8192)
    sizes = {n: m.num_params() / 1e6 for n, m in (("dense", base), ("5 experts", labelled(base, 5)))}
    same = labelled(base, 5).flops_per_token(512) / base.flops_per_token(512)
    rows = [Counted(what=f"parameters at ModernBERT-base's size, {n}", ours=v, unit="M") for n, v in sizes.items()]
    return [*rows, Counted(what="FLOPs per token, 5 experts to dense", ours=same, published=1.0, unit="times")]


def _kept(figures: Figures) -> float:
    """How much more than half of the gain the middle layer keeps; the gain itself where that is less."""
    whole, part = (figures[name]["f1"] - figures["dense"]["f1"] for name in ("moe", "middle"))
    return min(whole, part - whole / 2)


GAIN = Difference(figure="f1", of="moe", than="dense", better="higher")
CLAIMS = (
    Claim(
        text="right after conversion outputs equal the dense model's to 1e-6",
        effect=Computed(
            text="1e-6 minus the relative difference of the outputs, the largest of moe, middle and moe-mnr",
            function=lambda f: 1e-6 - max(f[name]["apart"] for name in ("moe", "middle", "moe-mnr")),
        ),
    ),
    Claim(text="an expert per domain is better than one model", effect=GAIN),
    Claim(text="by half a point at least", effect=GAIN, threshold=0.5, main=False),
    Claim(
        text="and at most 2 points worse than a model per domain",
        effect=Difference(figure="f1", of="moe", than="single", better="higher", within=2.0),
    ),
    Claim(
        text="models of one domain lose 5 points or more on the others",
        effect=Difference(figure="f1", of="single", than="single", than_figure="f1-away", better="higher"),
        threshold=5.0,
    ),
    Claim(
        text="experts in the middle layer alone keep over half of the gain",
        effect=Computed(
            text="f1: the smaller of moe over dense, and middle over dense minus half of that", function=_kept
        ),
    ),
)

PAPER = Paper(
    entry=entry("contrastive-moe-embeddings"),
    parts={
        "routing by the domain": "moestro.routers.config:Label",
        "routing of whole sentences": "moestro.routers.config:SegmentMean",
        "a dense model's copies as experts": "moestro.convert.config:Copy",
        "enlarged experts that start unchanged": "moestro.experts.config:GatedExtension",
        "plain experts into enlarged ones": "moestro.convert.config:Extend",
        "embedding head": "moestro.models.heads_config:EmbeddingHead",
        "mnr, clip": "moestro.losses.pair_config:MNR",
        "mnr_plus": "moestro.losses.pair_config:MNRPlus",
        "mutual information of domain and expert": "moestro.losses.config:MutualInformation",
        "loss that names the expert": "moestro.losses.config:SpecifiedExpert",
        "objective of pairs": "moestro.tasks.objectives:MatchPairs",
        "domain tokens, pairs turned round": "moestro.tasks.config:TextPairs",
        "F1max": "moestro.tasks.metrics:best_f1",
        "the authors' checkpoints": "moestro.convert.loading:load",
    },
    example=EXAMPLE,
    data=data,
    sample=sample,
    arms=arms,
    system="moe",
    updates=250,
    train=train,
    prepare=prepare,
    grid=(1e-3, 3e-3),
    tuning=0.25,
    figures={
        "f1": "F1max of 500 related and 500 other test pairs, mean of five domains, percent, higher is better",
        **{f"f1-{i}": f"F1max of domain {i}, percent" for i in range(DOMAINS)},
        "f1-away": "F1max of a model of one domain on the four others, mean, percent",
        "start": "F1max of what all arms begin with, percent",
        "apart": "difference of outputs before and after the conversion, as a share of their norm",
        "gap": "mean cosine of related pairs minus that of others, times 100",
    },
    claims=CLAIMS,
    picture=Bars(figures=("f1", "gap")),
    published=(
        Published(what="F1max, one MoE on all domains, above one dense model", figure=1.05, unit="points", ours=GAIN),
        Published(
            what="F1max on the whole test set, MoE with domain tokens",
            figure=88.75,
            unit="percent",
            ours=Computed(text="f1 of moe", function=lambda f: f["moe"]["f1"]),
            why="other data and a small model",
        ),
        Published(
            what="share of the gain that one MoE layer keeps (first version)",
            figure=85,
            unit="percent",
            why="a quotient of two small differences here: see the claim",
        ),
    ),
    counted=counted,
    preset="contrastive-moe-embeddings",
    notes=(
        "Domains: queries with one intent (Banking77), captions in English and German, in English and French "
        "(Multi30k), problems and solutions (GSM8K), abstracts cited together (ACL Anthology).",
        "Width 96, 3 layers, texts of 24 words; what all arms begin with is trained on all pairs for 300 updates.",
        "A pair's negatives are 15 others of its domain in every arm: batches of mixed domains have easy negatives.",
        "Models are not chosen on the test split, as the released code does; there is no early stopping.",
        "The paper's readme says that below about 100M parameters experts do not help: no gain would be no surprise.",
        "The released mutual-information loss has no gradient; the library's has. The first version's conversion did "
        "not keep the outputs (another norm, not copied); `Copy` and `Extend` do.",
    ),
)
