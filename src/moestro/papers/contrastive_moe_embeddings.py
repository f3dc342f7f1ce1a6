"""34: one expert per domain, named by the domain and not by a gate, in an encoder of texts that is trained on pairs."""

from __future__ import annotations

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
    """Encoded pairs of every split, a list for each domain; the first token of a text is that of its domain."""
    from ..tasks.data.collate import PairedTexts
    from ..tasks.data.config import Banking77, CoCitation, Gsm8k, Multi30k, PairDomains, WordVocabulary

    sets = (Banking77(), Multi30k(), Multi30k(target_language="fr"), Gsm8k(notes=False), CoCitation())
    parts = tuple(part.replace(folder=str(folder / part.slug)) for part in sets)
    found = PairDomains(parts=parts, train=TRAIN, held_out=HELD_OUT).build()
    names = [f"<domain {i}>" for i in range(DOMAINS)]
    vocabulary = WordVocabulary(size=VOCABULARY).build((t for p in found.train for t in (p.a, p.b)), names)
    collate = PairedTexts(vocabulary, LENGTH, names, swap=True)
    splits: dict[str, Any] = {}
    for split in ("train", "valid", "test"):
        splits[split] = [[] for _ in names]
        for pair in getattr(found, split):
            splits[split][pair.domain].append(collate.encode(pair))
    splits["valid"] = [_some(pairs, CHOICE) for pairs in splits["valid"]]
    return splits | {"collate": collate, "cls": vocabulary.cls, "size": vocabulary.size}


def _some(pairs: list[Any], most: int) -> list[Any]:
    """Related and other pairs, as many of each."""
    return [p for kind in (True, False) for p in [p for p in pairs if p[2] is kind][:most]]


def sample(folder: Path) -> None:
    import json

    def lines(name: str, rows: list[Any]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")

    count = range(80)
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
    cited = [f"P{i},P{j},1" for i in count for j in count if i < j and (i + j) % 5 == 0]
    lines("acl_cocitation/cocitation_pairs.csv", ["a,b,n", *cited])


def arms(smoke: bool) -> list[Arm]:
    from ..losses.config import MNR, MNRPlus
    from ..train.presets.pairs import embedder, labelled

    sizes = {"dim": 16, "width": 16, "num_layers": 2} if smoke else {"dim": 96, "width": 192, "num_layers": 3}
    dense = embedder(vocab_size=VOCABULARY, context=LENGTH, **sizes)
    every = labelled(dense, DOMAINS)
    middle = labelled(dense, DOMAINS, layers=(dense.encoder.num_layers // 2,))
    plus = {"loss": MNRPlus().to_dict(), "tokens": True}
    both: dict[str, Any] = {"seq_len": LENGTH, "equal": "both"}
    return [
        Arm(name="moe", about="an expert per domain, domain tokens", model=every, options=plus, **both),
        Arm(name="middle", about="experts in the middle layer only", model=middle, options=plus, **both),
        Arm(name="dense", about="one model, domain tokens", model=dense, options=plus, **both),
        Arm(name="single", about="a model per domain, a fifth of the updates each", model=dense, train=train_single,
            options=plus | {"tokens": False}, **both),
        Arm(name="moe-mnr", about="as moe, trained on mnr", model=every, options=plus | {"loss": MNR().to_dict()}, **both),
    ]  # fmt: skip


def prepare(job: Job) -> None:
    """The dense model that all arms begin with, trained on all domains without domain tokens."""
    from safetensors.torch import save_file

    from ..losses.config import MNRPlus

    model = _model(job)
    updates = job.updates if job.smoke else BASE_UPDATES
    _fit(model, job, BASE_LR, updates, MNRPlus(), range(DOMAINS), False)
    cls, first = job.data["cls"], job.data["collate"].first
    table = model.encoder.embed.weight.data
    table[first] = table[cls].clone()
    save_file(model.state_dict(), job.shared / "dense.safetensors")


def _model(job: Job, load: bool = False) -> Any:
    """The dense model with the vocabulary's size, new or as `prepare` left it."""
    from safetensors.torch import load_file

    from ..moe.config import MoELayer
    from ..train.presets.pairs import embedder

    config: Any = job.arm.model
    ffn = next(b.ffn for b in config.encoder.resolved())
    width = ffn.experts.width if isinstance(ffn, MoELayer) else ffn.width
    sizes = {"dim": config.encoder.dim, "num_layers": config.encoder.num_layers, "width": width}
    model = embedder(vocab_size=job.data["size"], context=LENGTH, **sizes).replace(seed=job.seed).build()
    if load:
        model.load_state_dict(load_file(job.shared / "dense.safetensors"))
    return model


def _routed(job: Job) -> Any:
    """The arm's model: the dense one with its experts, whose outputs are checked to be equal."""
    from ..convert.config import Copy

    dense = _model(job, load=True)
    kinds = job.arm.model.encoder.kinds()  # type: ignore[union-attr]
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "moe")
    if not layers:
        return dense, 0.0
    moe, receipt = Copy(num_experts=DOMAINS, top_k=1, router="label", layers=layers).build(dense)
    return moe, receipt.measured.relative


def _first(pair: Any, job: Job, tokens: bool) -> Any:
    if tokens:
        return pair
    return [job.data["cls"], *pair[0][1:]], [job.data["cls"], *pair[1][1:]], *pair[2:]


def _fit(model: Any, job: Job, lr: float, updates: int, loss: Any, domains: Any, tokens: bool) -> None:
    """Every batch holds DOMAINS groups of pairs, a group from one domain each, in turns where there are fewer."""
    import dataclasses

    from ..optim.config import AdamW, Cosine
    from ..tasks.data.batches import epoch_order
    from ..tasks.objectives import MatchPairs
    from .fit import fit

    turns = [list(domains)[i % len(domains)] for i in range(DOMAINS)]
    share = GROUP * (DOMAINS // len(domains))  # pairs of a domain in a batch

    def batch(step: int) -> Any:
        rows = []
        for domain in dict.fromkeys(turns):
            pairs = job.data["train"][domain]
            rows += [_first(pairs[i], job, tokens) for i in epoch_order(len(pairs), job.seed, step, share)]
        return job.data["collate"].pad(rows, slice(0, len(rows)))

    settings = AdamW(schedule=Cosine(warmup=0.1))
    objective = MatchPairs(loss=loss, group=GROUP).build()
    fit(model, objective, batch, dataclasses.replace(job, lr=lr, updates=updates), optimizer=settings)


def _f1(model: Any, job: Job, split: str, tokens: bool, domains: Any = None, most: int = HELD_OUT) -> list[Any]:
    """F1max of each domain, with its similarities, on at most so many pairs of both kinds."""
    import torch

    from ..core.signals import Signals
    from ..tasks.metrics import best_f1, similarities
    from ..tasks.predictions import told

    found = []
    model.eval()
    for domain in range(DOMAINS) if domains is None else domains:
        pairs = _some(job.data[split][domain], most)
        cosines: list[float] = []
        for first in range(0, len(pairs), 250):
            rows = [_first(p, job, tokens) for p in pairs[first : first + 250]]
            b = job.data["collate"].pad(rows, slice(0, len(rows)))
            with torch.no_grad():
                one, two = (
                    model(x, told(Signals(), x, unit, valid, b.domain))[0]
                    for x, unit, valid in ((b.a, b.a_unit_id, b.a_valid), (b.b, b.b_unit_id, b.b_valid))
                )
            cosines += torch.cosine_similarity(one, two).tolist()
        related = [p[2] for p in pairs]
        found.append((best_f1(cosines, related).f1, similarities(cosines, related)))
    return found


def _outcome(f1: dict[str, list[float]], more: dict[str, float]) -> Outcome:
    mean = {split: 100 * sum(values) / len(values) for split, values in f1.items()}
    each = {f"f1-{i}": 100 * value for i, value in enumerate(f1["test"])}
    return Outcome(validation=-mean["valid"], test={"f1": mean["test"], **each, **more})


def train(job: Job) -> Outcome:
    from ..losses.config import PairLoss

    model, apart = _routed(job)
    tokens = job.arm.options["tokens"]
    more = {} if job.arm.name == "dense" else {"apart": apart}
    if job.arm.name == "dense":
        more["start"] = 100 * sum(f for f, _ in _f1(model, job, "test", False)) / DOMAINS
    _fit(model, job, job.lr, job.updates, PairLoss.from_dict(job.arm.options["loss"]), range(DOMAINS), tokens)
    found = {split: _f1(model, job, split, tokens) for split in ("valid", "test")}
    more["gap"] = sum(s.related - s.others for _, s in found["test"]) / DOMAINS
    return _outcome({k: [f for f, _ in v] for k, v in found.items()}, more)


def train_single(job: Job) -> Outcome:
    """A dense model for each domain, and how it does on the other domains."""
    from ..losses.config import PairLoss

    f1: dict[str, list[float]] = {"valid": [], "test": []}
    away: list[float] = []
    for domain in range(DOMAINS):
        model = _model(job, load=True)
        steps = max(1, round(job.updates / DOMAINS))
        _fit(model, job, job.lr, steps, PairLoss.from_dict(job.arm.options["loss"]), [domain], False)
        for split, values in f1.items():
            values += [f for f, _ in _f1(model, job, split, False, [domain])]
        others = [i for i in range(DOMAINS) if i != domain]
        away += [f for f, _ in _f1(model, job, "test", False, others, AWAY)]
    return _outcome(f1, {"f1-away": 100 * sum(away) / len(away)})


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
        "domain tokens, pairs turned round": "moestro.tasks.data.collate:PairedTexts",
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
        "gap": "mean cosine of related pairs minus that of others",
    },
    claims=CLAIMS,
    picture=Bars(figures=("f1", "gap")),
    published=(
        Published(what="F1max, one MoE on all domains, above one dense model", figure=1.05, unit="points", ours=GAIN),
        Published(what="F1max on the whole test set, MoE with domain tokens", figure=88.75, unit="percent",
                  ours=Computed(text="f1 of moe", function=lambda f: f["moe"]["f1"]), why="other data and a small model"),
        Published(what="share of the gain that one MoE layer keeps (first version)", figure=85, unit="percent",
                  why="a quotient of two small differences here: see the claim"),
    ),
    counted=counted,
    preset="",
    notes=(
        "Domains: queries with one intent (Banking77), captions in English and German, in English and French (Multi30k), "
        "problems and solutions (GSM8K), abstracts cited together (ACL Anthology). The biomedical sets are not there.",
        "Width 96, 3 layers, texts of 24 words; what all arms begin with is trained on all pairs for 300 updates.",
        "A pair's negatives are 15 others of its domain in every arm: batches of mixed domains have easy negatives.",
        "Best models are not chosen on the test split, as the released code does; there is no early stopping.",
        "The paper's readme says that below about 100M parameters experts do not help: no gain would be no surprise.",
        "The released mutual-information loss has no gradient; the library's has. Its first version's conversion did not "
        "keep the outputs (another norm, not copied); `Copy` and `Extend` do.",
    ),
)  # fmt: skip
