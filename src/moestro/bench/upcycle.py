"""The demonstration of upcycling: a dense model becomes mixtures, which are trained on beside it and given back."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert import load, save
from ..convert.config import Conversion, Copy, GranularSplit, PartialReinit
from ..convert.receipt import Receipt
from ..core.errors import UserError
from ..core.files import write
from ..models.config import Decoder
from ..nn.config import Attention, FeedForward
from ..optim.config import AdamW
from ..report.figures.lines import Curve, draw_curves
from ..serve.generate import generate
from ..train.compare import curve
from ..train.config import TrainRun
from ..train.files import write_json
from ..train.held_out import held_out_text
from ..train.layout import Layout
from ..train.load import load as load_run
from ..train.observe import Observer
from ..train.run import run
from .machine import describe_machine

__all__ = ["DENSE", "METHODS", "Upcycling", "demonstrate", "picture"]

DENSE = TrainRun(
    model=Decoder(
        dim=64,
        num_layers=3,
        attention=Attention(num_heads=2, num_kv_heads=1, head_dim=32),
        ffn=FeedForward(width=384),
        context=256,
        init_std=None,
    ),
    twin=False,
    optimizer=AdamW(lr=8e-3),
    steps=1500,
    batch_size=16,
    seq_len=128,
)

METHODS: dict[str, Conversion] = {
    "copy": Copy(num_experts=8, top_k=2),
    "granular": GranularSplit(num_experts=8, top_k=2, granularity=2),
    "reinit": PartialReinit(num_experts=8, top_k=2, share=0.25),
}

PROMPT = "import os\n\n\ndef "
NEW_TOKENS = 96

# What transformers alone makes of the exported folder: its text, greedily; importing moestro is an error there.
_ALONE = """
import json, sys
sys.modules["moestro"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer(prompt, return_tensors="pt").input_ids
made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)
print(json.dumps({"model": type(model).__name__, "tokens": made[0, ids.shape[1]:].tolist(),
                  "text": tokenizer.decode(made[0])}))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What is shown. dense: the training of the dense model. further: steps that it goes on for; every mixture gets as
    many steps as make equal active FLOPs. lr: peak learning rate of going on. family: what the best is exported as."""

    dense: TrainRun = DENSE
    methods: Mapping[str, Conversion] = dataclasses.field(default_factory=lambda: dict(METHODS))
    further: int = 1500
    lr: float = 4e-3
    family: str = "mixtral"


def demonstrate(
    out: Path,
    plan: Upcycling | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    watch: Callable[[], AbstractContextManager[Observer | None]] | None = None,
) -> dict[str, Any]:
    """Train the dense model, export it as a Llama folder, turn it into mixtures, train all on, export the best.

    In `out` (a new folder): `dense` and one folder per method (checkpoints; `receipt.json` in those of mixtures),
    `runs` (the run folders), the exported best, `record.json`. Returns the record. watch: makes an observer for each
    training. Raises `UserError` where `out` is taken, training is stopped, or transformers makes another text.
    """
    plan = plan or Upcycling()
    _claim(out)
    began = time.perf_counter()
    say("training the dense model")
    _train(plan.dense, out / "runs" / "start", watch)
    trained = load_run(out / "runs" / "start", state="last")
    save(trained.model, out / "dense", to="llama", tokenizer="bytes")
    text, num_bytes = _sample(trained)
    receipts: dict[str, Receipt] = {}
    for name, method in plan.methods.items():
        source = load(out / "dense")
        model, receipts[name] = method.build(source.model, text=text, num_bytes=num_bytes, sources=("dense",))
        save(model, out / name, to="moestro", tokenizer="bytes")
        receipts[name].write(out / name)
    arms: dict[str, dict[str, Any]] = {}
    for name in ("dense", *plan.methods):
        arms[name] = _go_on(plan, name, out, say, watch)
    best = min(plan.methods, key=lambda n: arms[n]["bits_per_byte"])
    say(f"exporting {best} as {plan.family}, and reading it with transformers alone")
    exported = _exported(out, best, plan.family)
    record = {
        "schema": 1,
        "what": "upcycling: a dense model and mixtures made of it, trained on at equal active FLOPs",
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": describe_machine(torch.device("cpu")),
        "seed": plan.dense.seed,
        "dense": plan.dense.to_dict(),
        "further": plan.further,
        "lr": plan.lr,
        "before": curve(Layout(out / "runs" / "start").metrics)[-1]["bits_per_byte"],
        "arms": {
            name: row | ({"receipt": _short(receipts[name])} if name in receipts else {}) for name, row in arms.items()
        },
        "best": best,
        "exported": exported,
        "minutes": round((time.perf_counter() - began) / 60, 2),
    }
    write_json(out / "record.json", record)
    return record


def picture(record: Mapping[str, Any], path: Path) -> None:
    """Write `path`.svg and `path`.png: validation bits per byte against the FLOPs of going on."""
    curves = [
        Curve(name, [(point["flops"] / 1e12, point["bits_per_byte"]) for point in arm["curve"]])
        for name, arm in record["arms"].items()
    ]
    level = ("the dense model before", record["before"])
    made = draw_curves(curves, "Trained on from one dense model", "active FLOPs (10^12)", "bits per byte", level)
    for form, data in made.items():
        write(path.with_suffix(f".{form}"), data)


def _claim(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder with --out, or remove it first")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); name another folder with --out") from None


def _train(config: TrainRun, out: Path, watch: Callable[[], AbstractContextManager[Any]] | None) -> Any:
    if watch is None:
        result = run(config, out=out)
    else:
        with watch() as observer:
            result = run(config, out=out, progress=observer)
    if not result.complete:
        raise UserError(f"stopped; the training in {out} is saved and can be resumed, the demonstration starts anew")
    return result.lines[0]


def _sample(trained: Any) -> tuple[Tensor, int]:
    """Held-out tokens [B, S], on which conversions are measured, and the bytes that their targets stand for."""
    valid = held_out_text(trained).corpus.valid
    S = trained.config.seq_len
    B = min(16, len(valid) // S)
    tokens = torch.from_numpy(valid[: B * S].astype("int64")).view(B, S)
    return tokens, B * (S - 1)


def _go_on(plan: Upcycling, name: str, out: Path, say: Callable[[str], None], watch: Any) -> dict[str, Any]:
    """Train one arm on, from its folder, for the FLOPs of the dense model's further steps."""
    dense, seq_len = plan.dense.model, plan.dense.seq_len
    model = load(out / name).config
    each = model.flops_per_token(seq_len)
    steps = round(plan.further * dense.flops_per_token(seq_len) / each)
    say(f"training {name} on, {steps} steps")
    config = plan.dense.replace(
        model=model,
        start=str(out / name),
        data=plan.dense.data.replace(tokenizer=""),
        steps=steps,
        seed=plan.dense.seed + 1,
        optimizer=plan.dense.optimizer.replace(lr=plan.lr),
        report=False,
    )
    line = _train(config, out / "runs" / name, watch)
    per_step = each * plan.dense.batch_size * seq_len
    points = [
        {"step": row["step"], "flops": row["step"] * per_step, "bits_per_byte": row["bits_per_byte"]}
        for row in curve(Layout(out / "runs" / name).metrics)
    ]
    return {
        "steps": steps,
        "params": line.params,
        "active_params": line.active_params,
        "flops_per_token": line.flops_per_token,
        "flops": steps * per_step,
        "bits_per_byte": line.bits_per_byte,
        "seconds": line.seconds,
        "load_entropy": line.load_entropy,
        "curve": points,
    }


def _exported(out: Path, best: str, family: str) -> dict[str, Any]:
    """Export the best mixture; the same text must come from us and from transformers alone."""
    trained = load_run(out / "runs" / best, state="last")
    save(trained.model, out / family, to=family, tokenizer="bytes")
    ids = list(PROMPT.encode())
    ours = generate(trained.model, ids, NEW_TOKENS, temperature=0.0).tokens
    command = [sys.executable, "-c", _ALONE, str(out / family), PROMPT, str(NEW_TOKENS)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"transformers cannot use {out / family}: {last}; pip install 'moestro[hf]' if it is missing")
    theirs = json.loads(ran.stdout.strip().splitlines()[-1])
    if theirs["tokens"] != list(ours):
        raise UserError(f"{out / family}: transformers makes another text than this library, which must not be")
    return {"family": family, "loaded_as": theirs["model"], "tokens_equal": len(ours), "text": theirs["text"]}


def _short(receipt: Receipt) -> dict[str, Any]:
    """What a record keeps of a receipt; the whole one lies beside its model."""
    m = receipt.measured
    return {
        "method": receipt.method,
        "exact": receipt.exact,
        "bound": receipt.bound,
        "relative": m.relative,
        "bits_before": m.bits_before,
        "bits_after": m.bits_after,
        "invented": len(receipt.invented),
        "params_before": receipt.params_before,
        "params_after": receipt.params_after,
        "notes": list(receipt.notes),
    }
