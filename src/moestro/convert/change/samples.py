"""What models are run on to be compared: given text or other inputs, or random ones; and what they do there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ...core.signals import Signals
from ...models.headed import Headed
from ...models.stack import Stack
from ..receipt import Measured

__all__ = ["Samples", "evaluating", "forward", "labels_for", "mean_output", "measure", "next_token_loss"]

Batch = Tensor | Mapping[str, Tensor]
ROWS, LENGTH, TOKENS = 4, 64, 4096  # shape of random tokens; the most tokens of one forward pass


@dataclasses.dataclass(frozen=True)
class Samples:
    """Inputs of a model, in batches. source: "text", "inputs" or "random ..."; num_bytes: of the text, where known."""

    batches: tuple[Batch, ...]
    source: str
    num_bytes: int | None = None

    @property
    def given(self) -> bool:
        return not self.source.startswith("random")

    @classmethod
    def of(cls, model: nn.Module, text: Any = None, seed: int = 0, num_bytes: int | None = None) -> Samples:
        """What the caller gave: tokens [B, S], other inputs as a tensor or as named tensors, or a list of such; None =
        random tokens (or images) of sizes that the model's config names. Raises `UserError` where it names none.
        """
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if text is None:
            batch, source = _random(model, seed)
            return cls((_on(batch, device),), source)
        items = list(text) if isinstance(text, Sequence) else [text]
        if not items or not all(isinstance(b, Tensor | Mapping) and len(b) for b in items):
            raise UserError("text: give tokens [B, S], named tensors, or a list of such, and at least one")
        batches = [part for b in items for part in _parts(_on(b, device))]
        words = all(tokens_of(b) is not None for b in batches)
        return cls(tuple(batches), "text" if words else "inputs", num_bytes)


def _on(batch: Batch, device: torch.device) -> Batch:
    return batch.to(device) if isinstance(batch, Tensor) else {k: v.to(device) for k, v in batch.items()}


def _parts(batch: Batch) -> Iterator[Batch]:
    """Tokens in passes of at most `TOKENS`."""
    if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
        yield from batch.split(max(1, TOKENS // batch.shape[1]))
    else:
        yield batch


def tokens_of(batch: Batch) -> Tensor | None:
    """[B, S] int64, or None where the batch holds something else."""
    found = batch if isinstance(batch, Tensor) else batch.get("input_ids")
    return found if found is not None and found.ndim == 2 and not found.is_floating_point() else None


def _random(model: nn.Module, seed: int) -> tuple[Batch, str]:
    config, generator = getattr(model, "config", None), torch.Generator().manual_seed(seed)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(config, "image_size"):
        shape = (ROWS, config.num_channels, config.image_size, config.image_size)  # type: ignore[union-attr]
        return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}, "random images"
    config = getattr(config, "encoder", config) if isinstance(model, Headed) else config
    vocab = getattr(config, "vocab_size", None)
    if not isinstance(vocab, int):
        raise UserError("the model's config names no vocab_size, so there are no random tokens for it; give its inputs")
    limits = [getattr(config, n, None) for n in ("context", "max_position_embeddings", "n_positions")]
    length = min([LENGTH, *(n for n in limits if isinstance(n, int))])
    return torch.randint(0, vocab, (ROWS, length), generator=generator), "random tokens"


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """(the model's main output, whether these are logits). Where routers of ours ask for labels, see `labels_for`."""
    told = labels_for(model, batch.numel()) if isinstance(batch, Tensor) and isinstance(model, Stack | Headed) else None
    if told is not None:
        out: Any = model(batch, told)
    else:
        out = model(batch) if isinstance(batch, Tensor) else model(**batch)
    if isinstance(out, Tensor):
        return out, False
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), Tensor):
            return getattr(out, name), name == "logits"
    if isinstance(out, Mapping):
        out = tuple(out.values())
    if isinstance(out, tuple) and isinstance(out[0], Tensor):
        return out[0], hasattr(model, "head") and not isinstance(model, Headed)
    raise UserError(f"{type(model).__name__} returns a {type(out).__name__}, in which no output tensor is found")


def labels_for(model: nn.Module, units: int) -> Signals | None:
    """Signals that name unit t's expert, t modulo the fewest experts of a layer, where routers ask for `label` or
    `task`: every expert is met. None where none asks."""
    routers = [m for m in model.modules() if hasattr(m, "num_experts")]
    asking = [m for m in routers if {"label", "task"} & set(getattr(m, "needs", ()))]
    if not asking:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    number = torch.arange(units, device=device) % min(int(m.num_experts) for m in asking)  # type: ignore[arg-type]
    return Signals(label=number, task=number)


def mean_output(models: Sequence[nn.Module], batch: Batch) -> tuple[Tensor, bool]:
    """(the mean of the models' outputs, summed in float64, whether these are logits)."""
    first, named = forward(models[0], batch)
    if len(models) == 1:
        return first, named
    total = first.double()
    for model in models[1:]:
        total = total + forward(model, batch)[0].double()
    return (total / len(models)).to(first.dtype), named


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """(sum of nats, number of targets) of predicting each next token. Raises `UserError` for other models."""
    tokens, (logits, named) = tokens_of(batch), forward(model, batch)
    if tokens is None or not named or logits.ndim != 3 or tokens.shape[1] < 2:
        raise UserError("importance needs a loss: the model gives no logits for next tokens; pass loss=")
    return _nats(logits, tokens), tokens[:, 1:].numel()


def _nats(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(_exact(logits[:, :-1]).flatten(0, 1), tokens[:, 1:].reshape(-1), reduction="sum")


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def measure(old: Callable[[Batch], tuple[Tensor, bool]], new: Callable[[Batch], tuple[Tensor, bool]], samples: Samples):
    """What differs between two models, as functions of a batch that return (output, whether it is logits)."""
    gap = size = largest = divergence = 0.0
    before = after = 0.0
    positions = targets = 0
    bitwise = logits = True
    for batch in samples.batches:
        (a, named), (b, _) = old(batch), new(batch)
        if a.shape != b.shape:
            raise UserError(f"the models' outputs differ in shape: {list(a.shape)} and {list(b.shape)}")
        bitwise = bitwise and torch.equal(a, b)
        d = b.double() - a.double()
        gap, size = gap + float(d.square().sum()), size + float(a.double().square().sum())
        largest = max(largest, float(d.abs().max()))
        positions += a[..., 0].numel()
        logits = logits and named
        if named:
            p, q = _exact(a).log_softmax(-1), _exact(b).log_softmax(-1)
            divergence += float((p.exp() * (p - q)).sum())
        tokens = tokens_of(batch)
        if named and tokens is not None and a.ndim == 3 and tokens.shape[1] > 1 and samples.source == "text":
            before, after = before + float(_nats(a, tokens)), after + float(_nats(b, tokens))
            targets += tokens[:, 1:].numel()
    units = samples.num_bytes if samples.num_bytes else targets
    bits = [n / math.log(2) / units if targets else None for n in (before, after)]
    return Measured(
        source=samples.source,
        positions=positions,
        relative=math.sqrt(gap / size) if size else math.sqrt(gap),
        largest=largest,
        bitwise=bitwise,
        kl=max(0.0, divergence / positions) if logits else None,
        bits_before=bits[0],
        bits_after=bits[1],
        unit=("byte" if samples.num_bytes else "token") if targets else None,
    )
