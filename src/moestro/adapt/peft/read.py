"""Reading adapters that PEFT, or `write.save`, wrote."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core.errors import UserError
from ...experts.bank import Bank
from ..attach import Attached, adapters, attach_at
from ..config import LoRA
from ..linear import AdaptedFeedForward, AdaptedLinear
from ..lora.bank import LoRABank
from .pairs import Pair, pad, stacked, unfuse
from .slots import Slot, slots
from .write import CONFIG, PREFIX, TENSORS

__all__ = ["load"]

_REFUSED = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "use_qalora")


@dataclasses.dataclass
class _Found:
    """One pair of the file. scale: alpha / r as PEFT computes it."""

    slot: Slot
    pair: Pair
    scale: float


def load(model: nn.Module, folder: str | Path, *, of: str) -> Attached:
    """Attach a LoRA adapter in PEFT's format to a model, and fill it. of: the family that the adapter was made for.

    Of adapters that `write.save` wrote, config and factors come back as they were, but for factors shared by experts
    whose copies differ. Of PEFT's own, gate and up share one A (`joined`), ranks below the largest are filled with
    zeros, and scales that differ are folded into B. Nothing is attached where something does not fit: raises
    `UserError` for missing, left over, misshaped or non-finite tensors, for a pickle, and for what PEFT offers beyond
    LoRA.
    """
    folder = Path(folder)
    said, header, tensors = _files(folder)
    found = _match(tensors, said, slots(model, of), _experts(model), folder)
    config = _config(header, found, folder)
    where: dict[str, list[str]] = {}
    for f in found:
        parts = ["gate", "up"] if f.slot.parameter == "gate_up_proj" else [f.slot.part]
        said_parts = ((header or {}).get("places") or {}).get(f.slot.path)
        where.setdefault(f.slot.path, []).extend(p for p in parts if not said_parts or p in said_parts)
    attached = attach_at(model, config, where)
    modules = adapters(model)
    for f in found:
        _fill(modules[f.slot.path], f, config)
    return attached


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Tensor]]:
    path = folder / TENSORS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        hint = f"; {pickle.name} is a pickle, which is never loaded" if pickle.is_file() else ""
        raise UserError(f"{folder}: there is no {TENSORS}{hint}")
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(path, "pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            own = (file.metadata() or {}).get("moestro")
        header = None if own is None else {k: json.loads(own)[k] for k in ("config", "places")}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable adapter ({error})") from None
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = said.get("peft_type") if isinstance(said, dict) else type(said).__name__
        raise UserError(f"{folder / CONFIG}: peft_type is {kind!r}; only LORA can be read")
    for name in _REFUSED:
        if said.get(name):
            raise UserError(f"{folder / CONFIG}: {name} = {said[name]!r} is not known here")
    if said.get("bias", "none") != "none":
        raise UserError(f"{folder / CONFIG}: bias = {said['bias']!r} is not known here")
    return said, header, tensors


def _experts(model: nn.Module) -> dict[str, int]:
    return {path: m.num_experts for path, m in model.named_modules() if isinstance(m, Bank)}


def _match(
    tensors: dict[str, Tensor], said: dict[str, Any], every: list[Slot], experts: dict[str, int], folder: Path
) -> list[_Found]:
    """Every pair of the file at its place; every tensor is used."""
    left, found, problems = set(tensors), [], []
    parameters = said.get("target_parameters") or []
    for slot in every:
        if slot.part == "up" and slot.parameter is not None:
            continue  # lies in gate's stack
        key = slot.module if slot.parameter is None else f"{slot.module}.{slot.parameter}"
        if slot.parameter is not None and not any(key == p or key.endswith(f".{p}") for p in parameters):
            continue
        nested = slot.parameter == "gate_up_proj" and any(
            f"{slot.module}.down_proj".endswith(f".{p}") or f"{slot.module}.down_proj" == p for p in parameters
        )
        names = [f"{PREFIX}{slot.module}.{'base_layer.' if nested else ''}lora_{x}.weight" for x in "AB"]
        missing = [n for n in names if n not in tensors]
        if missing:
            if len(missing) == 1 or slot.parameter is not None:
                problems.append(f"missing: {missing[0]}")
            continue
        a, b = (tensors[n] for n in names)
        left -= set(names)
        rank, scale = _scaling(said, key)
        if not all(bool(torch.isfinite(t).all()) for t in (a, b)):
            problems.append(f"not finite: {names[0]} or B")
            continue
        E = 1 if slot.parameter is None else experts[slot.path]
        if a.shape[0] != rank * E or b.ndim != 2 or b.shape[1] != rank * E:
            problems.append(f"{names[0]} {list(a.shape)} and B {list(b.shape)} have not rank {rank} for {E} experts")
            continue
        found.append(_Found(slot, (a, b) if slot.parameter is None else stacked(a, b, E), scale))
    problems += [f"left over: {n}" for n in sorted(left)]
    if problems or not found:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        text = "; ".join(problems[:5]) or "it has no tensor"
        raise UserError(f"{folder}: this adapter does not fit the model: {text}{more}")
    return found


def _scaling(said: dict[str, Any], key: str) -> tuple[int, float]:
    """(rank, scale) of a place, with PEFT's patterns."""

    def of(name: str, default: Any) -> Any:
        for pattern, value in (said.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        return default

    rank, alpha = int(of("rank_pattern", said.get("r", 8))), float(of("alpha_pattern", said.get("lora_alpha", 8)))
    return rank, alpha / (rank**0.5 if said.get("use_rslora") else rank)


def _config(header: Any, found: list[_Found], folder: Path) -> LoRA:
    """The config of our own header, or one that fits what PEFT wrote."""
    if header is not None:
        return LoRA.from_dict(header["config"], where=str(folder / TENSORS)).replace(partial=True)
    largest = max(found, key=lambda f: f.pair[0].shape[-2])  # the first of them
    rank = largest.pair[0].shape[-2]
    return LoRA(rank=rank, alpha=largest.scale * rank, joined=True, partial=True)


@torch.no_grad()
def _fill(module: nn.Module, f: _Found, config: LoRA) -> None:
    factor = f.scale * config.rank / config.alpha
    factor = 1.0 if abs(factor - 1) < 1e-12 else factor
    a, b = f.pair
    b = b * factor
    for name, pair in _parts(module, f.slot, (a, b), config).items():
        if isinstance(module, LoRABank):
            targets = [getattr(module, f"{name}_{x}") for x in "ab"]
        elif isinstance(module, AdaptedFeedForward):
            targets = [module.deltas[name].a, module.deltas[name].b]  # type: ignore[union-attr]
        else:
            assert isinstance(module, AdaptedLinear)
            targets = [module.delta.a, module.delta.b]
        for target, value in zip(targets, pair):
            _copy(target, value, f.slot)  # type: ignore[arg-type]


def _parts(module: nn.Module, slot: Slot, pair: Pair, config: LoRA) -> dict[str, Pair]:
    """The pair as the module keeps it."""
    a, b = pair
    if not isinstance(module, LoRABank):
        return {slot.part: _at_rank(pair, config.rank, slot)}
    if slot.parameter is None:  # a shared expert, linear layer by linear layer
        return {slot.part: _at_rank((a[None], b[None]), config.rank, slot)}
    if slot.parameter != "gate_up_proj" or "gate_up" in module.pairs:
        return {("gate_up" if slot.parameter == "gate_up_proj" else slot.part): _at_rank(pair, config.rank, slot)}
    halves = {"gate": b.chunk(2, 1)[0], "up": b.chunk(2, 1)[1]}
    if "gate" in module.pairs and "up" in module.pairs:
        both = unfuse(pair, config.rank)
        if both is not None:
            return {"gate": both[0], "up": both[1]}
    elif not any(bool(half.any()) for name, half in halves.items() if name not in module.pairs):
        return {n: _at_rank((a, half), config.rank, slot) for n, half in halves.items() if n in module.pairs}
    raise UserError(f"{slot.module}: the adapter's header says that gate and up are apart, but they are not")


def _at_rank(pair: Pair, rank: int, slot: Slot) -> Pair:
    """The pair at exactly this rank: filled with zeros, or freed of zeros."""
    a, b = pair
    if a.shape[-2] <= rank:
        return pad(pair, rank)
    if bool(a[..., rank:, :].any()) or bool(b[..., rank:].any()):
        raise UserError(f"{slot.module}: rank {a.shape[-2]} where the adapter's header says {rank}")
    return a[..., :rank, :], b[..., :rank]


def _copy(target: Tensor, value: Tensor, slot: Slot) -> None:
    if target.ndim == value.ndim - 1:  # shared by all experts
        if not bool((value == value[:1]).all()):
            raise UserError(f"{slot.module}: the adapter's header says that experts share a factor, but theirs differ")
        value = value[0]
    if target.shape != value.shape:
        raise UserError(f"{slot.module}: {slot.part} has shape {list(value.shape)}, not {list(target.shape)}")
    target.copy_(value)
