"""Data, training and evaluation of the comparison 02 THOR."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...optim.config import AdamW, Cosine
from ...serve.translate import translate
from ...tasks.data.batches import ExampleBatches
from ...tasks.data.collate import TranslatedTexts
from ...tasks.data.config import BpeVocabulary, Multi30k
from ...tasks.draws import over_draws
from ...tasks.metrics import bleu
from ...tasks.objectives import Translate, TwoPass
from ..fit import fit
from ..paper import Job, Outcome
from ..thor import DRAWS, HELD_OUT, LENGTH, SENTENCES, TRAIN, VOCABULARY


def data(folder: Path) -> dict[str, Any]:
    whole = Multi30k(folder=str(folder / Multi30k.slug)).build()
    found = whole.limited(train=TRAIN, valid=HELD_OUT, test=HELD_OUT)
    texts = [text for pair in found.train for text in (pair.source, pair.target)]
    with TemporaryDirectory() as cache:
        vocabulary = BpeVocabulary(size=VOCABULARY, cache=cache).build(texts)
    held = {name: sorted(getattr(found, name), key=lambda pair: len(pair.target)) for name in ("valid", "test")}
    return {"train": found.train, "vocabulary": vocabulary, **held}  # by length, so that little is padded


def sample(folder: Path) -> None:
    rows = {
        "en": ["A man rides a bicycle.", "Two dogs play in the snow.", "A girl reads a book.", "People wait."],
        "de": ["Ein Mann fährt Rad.", "Zwei Hunde spielen im Schnee.", "Ein Mädchen liest ein Buch.", "Leute warten."],
    }
    (folder / "multi30k").mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for language, lines in rows.items():
            (folder / "multi30k" / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(job: Job) -> Outcome:
    vocabulary, options = job.data["vocabulary"], job.arm.options
    collate = TranslatedTexts(vocabulary, LENGTH)
    model = job.arm.model.replace(seed=job.seed).build()  # type: ignore[union-attr]
    objective = Translate() if "alpha" not in options else TwoPass(inner=Translate(), alpha=options["alpha"])
    batches = ExampleBatches(job.data["train"], collate, job.seed, pool=16)
    optimizer = AdamW(beta2=0.98, weight_decay=1e-4, schedule=Cosine(warmup=0.1))
    fit(model, objective.build(), lambda step: batches.train(step, SENTENCES), job, optimizer=optimizer)

    draws, longest = (DRAWS[:2], 4) if job.smoke else (DRAWS, LENGTH - 1)
    draws = draws if options.get("random") else (0,)

    def measured(split: str, draws: Any, **knobs: Any) -> Any:
        held = ExampleBatches(job.data[split], collate).each(100)
        return over_draws(model, objective.build(), (batch for _, batch in held), draws, knobs)

    valid, test = measured("valid", draws[:3]), measured("test", draws)
    figures = {"nats": test.mean, "bleu": score(model, job.data["test"], vocabulary, longest)}
    if len(draws) > 1:
        figures |= {"spread": test.spread, "apart": test.distance}
        figures["ensemble"] = measured("test", (0,), experts="all").mean
    return Outcome(validation=valid.mean, test=figures)


def score(model: Any, pairs: Any, vocabulary: Any, longest: int) -> float:
    """BLEU of greedy translations, every sentence with a draw of its own."""
    sources = [[*vocabulary.encode(pair.source)[: LENGTH - 1], vocabulary.eos] for pair in pairs]
    made: list[Any] = []
    for first in range(0, len(sources), 100):
        some = sources[first : first + 100]
        seeds = list(range(first, first + len(some)))
        made += translate(model, some, longest, seed=seeds, stop=(vocabulary.eos,))
    return bleu([vocabulary.decode(m.tokens.tolist()) for m in made], [pair.target for pair in pairs]).score
