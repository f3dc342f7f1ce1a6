"""Small runs on examples: their files, as users would write them, and a run of each kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from moestro.experts import Gated
from moestro.models.config import Decoder, Encoder, EncoderDecoder, Headed
from moestro.models.heads_config import ClassHead, EmbeddingHead, SpanHead
from moestro.moe import MoELayer
from moestro.nn.config import Attention, CrossAttention, FeedForward
from moestro.optim import AdamW
from moestro.tasks import (
    Classify,
    FindSpan,
    LabelledTexts,
    MatchPairs,
    SpanQuestions,
    TextPairs,
    Translate,
    Translations,
    TwoPass,
)
from moestro.tasks.data import ByteVocabulary
from moestro.train.config import TrainRun

KINDS = ("translation", "labels", "questions", "pairs")
WORDS = ["red", "green", "blue", "cat", "dog", "sat", "ran", "fast", "slow", "house", "tree"]


def write(folder: Path, n: int = 40) -> dict[str, Path]:
    """kind -> a file of n examples."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 7))) for _ in range(n)]
    files = {
        "translation": folder / "t.tsv",
        "labels": folder / "l.csv",
        "questions": folder / "q.json",
        "pairs": folder / "p.jsonl",
    }
    rows = "".join(f"{t}\t{' '.join(reversed(t.split()))}\n" for t in texts)
    files["translation"].write_text(f"source\ttarget\n{rows}", encoding="utf-8")
    rows = "".join(f'"{t}, {i}",{"cat" if "cat" in t else "none"}\n' for i, t in enumerate(texts))
    files["labels"].write_text(f"text,label\n{rows}", encoding="utf-8")
    made = [{"a": t, "b": f"so {t}", "domain": "xy"[i % 2], "similar": i % 8 > 0} for i, t in enumerate(texts)]
    files["pairs"].write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    parts = []
    for i, t in enumerate(texts):
        word = t.split()[1]
        answers = [{"text": word, "answer_start": t.index(word)}]
        parts.append({"context": f"{t}", "qas": [{"id": f"{i}", "question": f"where is {word}?", "answers": answers}]})
    files["questions"].write_text(json.dumps({"data": [{"title": "x", "paragraphs": parts}]}), encoding="utf-8")
    return files


def layer(**changes: Any) -> MoELayer:
    return MoELayer(num_experts=4, experts=Gated(width=8)).replace(**changes)


def encoder(**changes: Any) -> Encoder:
    attention = Attention(num_heads=2, num_kv_heads=2, head_dim=8, causal=False)
    made = Encoder(
        dim=16, num_layers=2, layout=("dense", "moe"), attention=attention, ffn=FeedForward(width=16), moe=layer()
    )
    return made.replace(context=64, dropout=0.1, **changes)


def decoder() -> Decoder:
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    return Decoder(
        dim=16,
        num_layers=1,
        attention=Attention(**heads),
        cross=CrossAttention(**heads),
        moe=layer(),
        context=64,
    )


def task_run(kind: str, path: Path, **changes: Any) -> TrainRun:
    """A run of four steps on a file of `write`, without a twin."""
    parts: dict[str, dict[str, Any]] = {
        "translation": {
            "model": EncoderDecoder(encoder=encoder(), decoder=decoder()),
            "data": Translations(path=str(path), pool=3),
            "objective": TwoPass(inner=Translate(), alpha=1.0),
        },
        "labels": {
            "model": Headed(encoder=encoder(), head=ClassHead(num_classes=9)),
            "data": LabelledTexts(path=str(path)),
            "objective": Classify(smoothing=0.1),
        },
        "questions": {
            "model": Headed(encoder=encoder(), head=SpanHead(), features=1),
            "data": SpanQuestions(path=str(path), stride=4, vocabulary=ByteVocabulary()),
            "objective": FindSpan(),
        },
        "pairs": {
            "model": Headed(encoder=encoder(), head=EmbeddingHead()),
            "data": TextPairs(path=str(path), domain_tokens=True),
            "objective": MatchPairs(group=2),
        },
    }
    common: dict[str, Any] = {
        "optimizer": AdamW(lr=3e-3),
        "twin": False,
        "report": False,
        "tensorboard": False,
        "steps": 4,
        "batch_size": 8,
        "seq_len": 48,
        "eval_every": 2,
        "eval_windows": 4,
    }
    return TrainRun(**{**common, **parts[kind], **changes})
