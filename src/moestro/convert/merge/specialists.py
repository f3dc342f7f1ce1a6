"""Several dense models of one ancestor into one mixture: BTX and BAM. Returns (new model, Receipt)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import UserError
from ...models.decoder import Decoder
from ...moe.attention import AttentionExperts, into_experts
from ...routers.config import Constant
from ..change.conduct import BOUNDS, Claim, Made, conduct, generator, in_float64
from ..change.graft import fill
from ..change.samples import Samples, evaluating, forward, measure
from ..checkpoint.family import canonical, difference
from ..config import BranchAttendMix, Specialists
from ..receipt import ConversionError, LayerChange, Receipt
from ..reduce.parts import mean
from ..upcycle.routed import one_in_all
from .table import Origin, attends, chosen, mixture, origins

__all__ = ["mix"]

ALIKE = "the sources are equal, and so is the mixture"


def mix(
    options: Specialists,
    models: Sequence[nn.Module],
    *,
    text: Any = None,
    num_bytes: int | None = None,
    sources: Sequence[str] = (),
) -> tuple[Decoder, Receipt]:
    """One decoder of N dense decoders of one config: expert j is source j, what is no expert their mean.

    The receipt compares it with the mean of the sources' outputs, and in its notes with each source alone. Where all
    sources are equal, it claims and checks that the output is theirs; weights that do not sum to 1 are exchanged for
    such in that check, and only there. Raises `UserError` for sources that do not fit each other.
    """
    names = _names(models, sources)
    decoders = _alike(options, models, names)
    first = decoders[0]
    layout = mixture(options, first.config, len(decoders))
    states = [d.state_dict() for d in decoders]
    paths = [f"layers.{i}" for i in chosen(options, first.config)]
    equal = all(torch.equal(t, s[n].to(t)) for s in states[1:] for n, t in states[0].items())

    def make(samples: Samples) -> Made:
        made: Decoder = layout.build()
        made.to(device=first.embed.weight.device, dtype=first.embed.weight.dtype)
        table = origins(options, made.state_dict(), states)
        fill(made, {n: _tensor(options, made, n, origin, states) for n, origin in table.items()})
        frozen = {n for n, p in first.named_parameters() if not p.requires_grad}
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(table[name].theirs not in frozen)
        made.train(first.training)
        invented = {n: "small random values" for n, o in table.items() if o.how == "new"}
        claim = Claim(ALIKE) if equal and _sums_to_one(options) else None
        return Made(
            model=made,
            claim=claim,
            changes=lambda samples: _changes(decoders, made, paths, samples, layout),
            invented=invented,
            notes=_notes(options, table, len(decoders)),
        )

    new, receipt = conduct(
        options, first, make, others=decoders[1:], text=text, num_bytes=num_bytes, sources=tuple(sources)
    )
    notes = list(receipt.notes)
    samples = Samples.of(first, text, options.seed, num_bytes)
    with evaluating(*decoders, new):
        if equal and not _sums_to_one(options):
            notes.append(_without_gates(options, first, new, len(decoders), samples))
        if not equal:
            notes += [_beside(name, d, new, samples) for name, d in zip(names, decoders, strict=True)]
    return new, dataclasses.replace(receipt, notes=tuple(notes))  # type: ignore[return-value]


def _names(models: Any, sources: Sequence[str]) -> list[str]:
    """What to call each source in messages."""
    if not isinstance(models, Sequence):
        raise UserError(f"takes a list of models, not a {type(models).__name__}")
    return [f"source {i}" + (f" ({sources[i]})" if len(sources) == len(models) else "") for i in range(len(models))]


def _alike(options: Specialists, models: Sequence[nn.Module], names: Sequence[str]) -> list[Decoder]:
    """The models, if they are decoders of one config, with tensors of the same names, shapes and dtypes."""
    kind = type(options).__name__
    if len(models) < 2:
        raise UserError(f"{kind}: takes several models, found {len(models)}")
    out: list[Decoder] = []
    for name, model in zip(names, models, strict=True):
        if not isinstance(model, Decoder):
            what = type(model).__name__
            raise UserError(f"{kind}: {name} is no decoder but a module called {what}; see moestro.convert.load")
        if any(model is other for other in out):
            raise UserError(f"{kind}: {name} is another source's very model; give each once, see `extra` for copies")
        out.append(model)
    first, tensors = canonical(out[0].config), out[0].state_dict()
    for name, model in zip(names[1:], out[1:], strict=True):
        if found := difference(canonical(model.config), first):
            more = ": their tokenizers differ" if found.startswith("vocab_size") else ""
            raise UserError(f"{kind}: {name} and {names[0]} are no models of one config: {found}{more}")
        own = model.state_dict()
        if odd := sorted(own.keys() ^ tensors.keys()):
            raise UserError(f"{kind}: {odd[0]} is only in one of {name} and {names[0]}")
        for n, t in own.items():
            a, b = (list(t.shape), t.dtype), (list(tensors[n].shape), tensors[n].dtype)
            if a != b:
                raise UserError(f"{kind}: {n} is {a[0]} {a[1]} in {name}, {b[0]} {b[1]} in {names[0]}")
    return out


def _tensor(
    options: Specialists, made: Decoder, name: str, origin: Origin, states: Sequence[dict[str, Tensor]]
) -> Tensor:
    """The value of one tensor of the mixture."""
    if origin.how == "new":
        shape = made.state_dict()[name].shape
        return torch.empty(shape).normal_(0.0, options.router_std, generator=generator(options.seed, name))
    parts = [s[origin.theirs].to(states[0][origin.theirs].device) for s in states]
    if origin.how == "experts":
        return torch.stack([*parts, *parts[:1] * options.extra])
    if origin.how == "heads":
        path, _, inner = name.partition(".attention.")
        module = made.get_submodule(path)
        assert isinstance(module, AttentionExperts)
        return into_experts(module, inner, parts)
    if not parts[0].is_floating_point():
        if not all(torch.equal(p, parts[0]) for p in parts):
            raise UserError(f"{name}: whole numbers that differ between sources have no mean")
        return parts[0]
    return mean([{name: p} for p in parts], [1.0] * len(parts))[name]


def _notes(options: Specialists, table: dict[str, Origin], sources: int) -> list[str]:
    counts = Counter(o.how for o in table.values())
    said = {
        "experts": f"stacked, one expert per source{f' and {options.extra} more of source 0' if options.extra else ''}",
        "heads": "set side by side as heads of attention experts",
        "average": f"the mean of {sources} sources",
        "new": "drawn at random",
    }
    notes = ["tensors: " + "; ".join(f"{counts[how]} {text}" for how, text in said.items() if counts[how])]
    kept = sorted({o.theirs.split(".", 3)[3] for n, o in table.items() if o.how == "average" and ".attention." in n})
    if attends(options) and kept:
        notes.append(f"attention experts share {', '.join(kept)}: the mean of the sources'")
    notes.append("parameters before are those of one source")
    notes.append("layers: what a block adds to the residual stream, over each source's own inputs and outputs")
    return notes


# Exactness --------------------------------------------------------------------------------------------------------


def _sums_to_one(options: Specialists) -> bool:
    """Whether every unit's weights sum to 1, of attention experts too."""
    ffn = one_in_all(options.weights(options.top_k, options.weigh), options.top_k)
    if not isinstance(options, BranchAttendMix):
        return ffn
    k = options.attention_top_k
    weigh = options.weights(1 if k is None else k, options.attention_weigh)
    soft = k is None and getattr(weigh, "scale", None) == 1.0  # a softmax over all, whole or renormalised
    return ffn and (soft or (k is not None and one_in_all(weigh, k)))


def _without_gates(options: Specialists, first: Decoder, new: nn.Module, sources: int, samples: Samples) -> str:
    """Equal sources and the same tensors with weights that sum to 1: the output is the source's, or it is an error."""
    changes: dict[str, Any] = {"weigh": Constant()}
    if isinstance(options, BranchAttendMix):
        soft = options.attention_top_k is None
        changes["attention_weigh"] = None if soft else Constant()
    twin = mixture(options.replace(**changes), first.config, sources).build()
    twin.to(device=first.embed.weight.device, dtype=first.embed.weight.dtype)
    fill(twin, new.state_dict())
    with evaluating(twin):
        found, bound = in_float64(first, twin, samples), BOUNDS[torch.float64]
    if not found <= bound:
        raise ConversionError(
            f"{ALIKE} up to the weights: not so, the outputs differ by {found:.3g} in float64 (over {bound:g})"
        )
    return f"{ALIKE} up to the factor of its weights: with weights that sum to 1 {found:.3g} in float64"


# What moved -------------------------------------------------------------------------------------------------------


def _beside(name: str, source: Decoder, new: nn.Module, samples: Samples) -> str:
    found = measure(lambda b: forward(source, b), lambda b: forward(new, b), samples)
    said = f"{name} alone: relative difference {found.relative:.3g}"
    if found.bits_before is None:
        return said
    return f"{said}; bits per {found.unit} {found.bits_before:.4f} -> {found.bits_after:.4f}"


@torch.no_grad()
def _changes(
    sources: Sequence[Decoder], new: Decoder, paths: Sequence[str], samples: Samples, layout: Any
) -> list[LayerChange]:
    gap, size = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)
    for source in sources:
        for batch in samples.batches:
            for path, (args, kwargs, out) in _calls(source, paths, batch).items():
                y = new.get_submodule(path)(*args, **kwargs)[0].double()
                h, want = args[0].double(), out[0].double()
                gap[path] += float((y - want).square().sum())
                size[path] += float((want - h).square().sum())
    rows = []
    for path in paths:
        distance = math.sqrt(gap[path] / size[path]) if size[path] else math.sqrt(gap[path])
        count = layout.resolved()[int(path.split(".")[1])].ffn.num_experts
        rows.append(LayerChange(path=path, distance=distance, experts_before=0, experts_after=count))
    return rows


def _calls(model: nn.Module, paths: Sequence[str], batch: Any) -> dict[str, Any]:
    """path -> (args, kwargs, output) of these modules while the model runs one batch."""
    seen: dict[str, Any] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seen[path] = (args, kwargs, out)

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(record(path), with_kwargs=True)
            stack.callback(handle.remove)
        forward(model, batch)
    return seen
