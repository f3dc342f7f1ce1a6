"""Writing adapters as PEFT reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...core.errors import UserError
from ..attach import adapters, factors
from ..config import LoRA
from ..linear import AdaptedFeedForward, AdaptedLinear
from ..lora.bank import LoRABank
from ..lora.linear import LoRADelta
from .pairs import Pair, flat, fuse, pad
from .slots import Slot, slots

__all__ = ["CONFIG", "TENSORS", "save"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_EXPERTS_ONCE = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def save(model: nn.Module, folder: str | Path, *, to: str, base: str = "") -> Path:
    """Write the model's LoRA adapters for its counterpart of the family `to` in transformers, as PEFT would.

    Routed experts become `target_parameters` of the fused stacks, with shared factors expanded; where gate and up have
    an A each, the fused pair has the sum of their ranks, and other stacks are filled with zeros up to it. lora_dropout
    is written 0: PEFT knows none on parameters. base: name or folder of the exported base model, for PEFT's config.
    What PEFT does not know (dropout, shared factors) lies in the header of the tensors, so that `read.load` gives the
    same adapters back.

    Raises `UserError` for mixtures, merged adapters, trained routers, and places that the family does not have.
    """
    config, found = _config(model), slots(model, to)
    linear: dict[str, Pair] = {}
    stacks: dict[tuple[str, str], Pair] = {}
    for path, module in adapters(model).items():
        mine = {s.part: s for s in found if s.path == path}
        if not mine:
            raise UserError(f"{path}: {to} in transformers has no such place")
        for part, pair in _pairs(module, next(iter(mine))).items():
            slot = mine["gate" if part == "gate_up" else part]
            if slot.parameter is None:
                linear[slot.module] = pair
            else:
                stacks[slot.module, slot.parameter] = pair
    taken = _taken(linear, found)
    rank = max((a.shape[-2] for a, _ in stacks.values()), default=config.rank)
    tensors: dict[str, Tensor] = {}
    for (path, parameter), pair in stacks.items():
        inner = parameter == "gate_up_proj" and (path, "down_proj") in stacks  # PEFT nests, the first one innermost
        name = f"{PREFIX}{path}.{'base_layer.' if inner else ''}lora_"
        tensors[f"{name}A.weight"], tensors[f"{name}B.weight"] = flat(pad(pair, rank))
    for path, pair in linear.items():
        a, b = pad(pair, rank) if path in taken else pair
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
    every = [s for s in found if s.parameter is None]
    names = _names([p for p in linear if p not in taken], every)
    parameters = [*_parameters(list(stacks), found), *(f"{n}.weight" for n in _names(taken, every))]
    patterns = names if rank != config.rank else []
    scale = config.alpha / config.rank
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": _number(scale * rank),
        "lora_dropout": 0.0,
        "target_modules": names,
        "target_parameters": sorted(parameters),
        "rank_pattern": dict.fromkeys(patterns, config.rank),
        "alpha_pattern": dict.fromkeys(patterns, _number(config.alpha)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own_places = {path: _parts_of(module) for path, module in adapters(model).items()}
    header = {"format": "pt", "moestro": json.dumps({"config": config.to_dict(), "places": own_places})}
    save_file({n: t.detach() for n, t in tensors.items()}, folder / TENSORS, metadata=header)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def _taken(linear: dict[str, Pair], found: list[Slot]) -> list[str]:
    """Linear layers that PEFT 0.21 cannot have as target modules of this family: it takes their names for those that
    routed experts had before they were fused, shared experts and dense layers included. As parameters it can."""
    routed = any(s.parameter is not None for s in found)
    return [path for path in linear if routed and path.rpartition(".")[2] in _EXPERTS_ONCE]


def _config(model: nn.Module) -> LoRA:
    """The one config of all adapters, after checking that they can be written."""
    configs: list[LoRA] = []
    for path, module in adapters(model).items():
        if getattr(module, "merged", False):
            raise UserError(f"{path}: adapters are merged into the weights; unmerge them before saving")
        found = [module.lora] if isinstance(module, LoRABank) else [d.config for d in _deltas(module)]
        if not found or not all(isinstance(c, LoRA) for c in found):
            raise UserError(f"{path}: PEFT has no mixture of adapters; save it with adapt.mixture.files.save")
        configs += found
    if not configs:
        raise UserError("the model has no adapters; attach some first")
    own = set(factors(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in own:
            raise UserError(
                f"{name} trains too (Adapter.router), and an adapter of PEFT does not hold it: export the base model "
                "again, and freeze its routers before saving the adapter"
            )
    return _as_attached(configs)


def _as_attached(configs: list[LoRA]) -> LoRA:
    """The config that all adapters have; shared experts have it without `joined`."""
    first = next((c for c in configs if c.joined), configs[0])
    for c in configs:
        if c.replace(joined=first.joined) != first:
            raise UserError(f"adapters of different configs have no common file: {c} and {first}")
    return first


def _parts_of(module: nn.Module) -> list[str]:
    """Names of the adapted parts, as `attach_at` takes them; none for linear layers, which are their own."""
    if isinstance(module, LoRABank):
        return list(module.parts)
    return list(module.deltas) if isinstance(module, AdaptedFeedForward) else []


def _deltas(module: nn.Module) -> list[Any]:
    if isinstance(module, AdaptedLinear):
        return [module.delta] if isinstance(module.delta, LoRADelta) else []
    if isinstance(module, AdaptedFeedForward):
        return [d for d in module.deltas.values() if isinstance(d, LoRADelta)]
    return []


@torch.no_grad()
def _pairs(module: nn.Module, part: str) -> dict[str, Pair]:
    """Part -> pair; of routed banks gate and up as "gate_up". part: what a linear layer is called."""
    if isinstance(module, AdaptedLinear):
        return {part: (module.delta.a, module.delta.b)}  # type: ignore[dict-item]
    if isinstance(module, AdaptedFeedForward):
        return {n: (d.a, d.b) for n, d in module.deltas.items()}  # type: ignore[misc]
    assert isinstance(module, LoRABank)
    E = module.num_experts
    pairs: dict[str, Pair] = {}
    for name in module.pairs:
        factors_ = [getattr(module, f"{name}_{x}") for x in "ab"]
        a, b = (t if t.ndim == 3 else t.expand(E, *t.shape) for t in factors_)
        pairs[name] = (a, b)
    if module.role == "shared_expert":
        return {n: (a[0], b[0]) for n, (a, b) in pairs.items()}
    if "gate" in pairs or "up" in pairs:
        width = module.down.shape[2]  # type: ignore[union-attr, index]
        pairs["gate_up"] = fuse(pairs.pop("gate", None), pairs.pop("up", None), int(width))
    return pairs


def _names(modules: list[str], every: list[Slot]) -> list[str]:
    """Names of target modules: short where all layers have them, and nothing else is called so; else whole paths."""
    out: set[str] = set()
    for short in {s.short for s in every if s.module in modules}:
        alike = [s.module for s in every if s.short == short]
        out |= {short} if set(alike) <= set(modules) else set(alike) & set(modules)
    return sorted(out)


def _parameters(stacks: list[tuple[str, str]], found: list[Slot]) -> list[str]:
    every = {(s.module, s.parameter): s.short for s in found if s.parameter is not None}
    out: set[str] = set()
    for module, parameter in stacks:
        alike = [p for p, short in every.items() if short == every[module, parameter] and p[1] == parameter]
        whole = all(p in stacks for p in alike)
        out.add(f"{every[module, parameter] if whole else module}.{parameter}")
    return sorted(out)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
