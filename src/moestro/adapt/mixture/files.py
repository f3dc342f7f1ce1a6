"""Mixtures of adapters under the names that MoLA publishes, and single LoRA adapters as their experts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...core.errors import UserError, did_you_mean
from ...routers.score import LinearScore
from ..attach import Attached, places, unload
from ..attach import attach as put_in
from ..config import LayerAllocation, Mixture
from .linear import MixtureDelta

__all__ = ["attach", "from_published", "load", "load_expert", "save", "to_published"]

PREFIX = "base_model.model."
_LLAMA = {  # where Moestro's decoder keeps what Llama keeps elsewhere
    r"layers\.(\d+)\.mixer\.(q|k|v|o)$": r"model.layers.\1.self_attn.\2_proj",
    r"layers\.(\d+)\.ffn\.deltas\.(gate|up|down)$": r"model.layers.\1.mlp.\2_proj",
}


def published_path(path: str) -> str:
    """The path of an adapted map as published: Moestro's decoder under Llama's names, other models as they are."""
    for pattern, name in _LLAMA.items():
        if re.fullmatch(pattern, path):
            return re.sub(pattern, name, path)
    return path


def _deltas(model: nn.Module) -> dict[str, MixtureDelta]:
    """Published path -> mixture."""
    found: dict[str, MixtureDelta] = {}
    for path, m in model.named_modules():
        if isinstance(m, MixtureDelta):
            if type(m.router.score) is not LinearScore or m.router.score.bias is not None:
                raise UserError(f"{path}: the published format holds linear routers without bias only")
            found[published_path(path.removesuffix(".delta"))] = m
    if not found:
        raise UserError("the model has no mixture of adapters; attach one first")
    return found


def to_published(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor as published: `...q_proj.lora_A_{e}.weight` [r, in], `.lora_B_{e}.weight` [out, r],
    `.router.router.weight` [E, in], under `base_model.model.`."""
    out: dict[str, Tensor] = {}
    for path, delta in _deltas(model).items():
        for e in range(delta.experts.num_experts):
            out[f"{PREFIX}{path}.lora_A_{e}.weight"] = delta.experts.a.detach()[e].contiguous()
            out[f"{PREFIX}{path}.lora_B_{e}.weight"] = delta.experts.b.detach()[e].contiguous()
        out[f"{PREFIX}{path}.router.router.weight"] = delta.router.score.weight.detach().contiguous()
    return out


@torch.no_grad()
def from_published(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take over tensors named as `to_published` names them. All or nothing: raises `UserError` with what is missing,
    left over, of another shape or not finite."""
    want = to_published(model)
    problems = [f"missing: {n}{did_you_mean(n, tensors)}" for n in want if n not in tensors]
    problems += [f"left over: {n}" for n in tensors if n not in want]
    for n, value in want.items():
        if n in tensors and tensors[n].shape != value.shape:
            problems.append(f"{n} has shape {list(tensors[n].shape)}, not {list(value.shape)}")
        elif n in tensors and not bool(torch.isfinite(tensors[n]).all()):
            problems.append(f"{n} is not finite")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"this adapter does not fit the model: {'; '.join(problems[:5])}{more}")
    for path, delta in _deltas(model).items():
        for e in range(delta.experts.num_experts):
            delta.experts.a[e].copy_(tensors[f"{PREFIX}{path}.lora_A_{e}.weight"])
            delta.experts.b[e].copy_(tensors[f"{PREFIX}{path}.lora_B_{e}.weight"])
        delta.router.score.weight.copy_(tensors[f"{PREFIX}{path}.router.router.weight"])


def save(model: nn.Module, folder: str | Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` (the fields of the released code, and `moestro` with
    the whole config)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_published(model)
    deltas = _deltas(model)
    config = next(iter(deltas.values())).config
    by_layer = {d.layer: d for d in deltas.values()}
    order = [by_layer[j] for j in sorted(by_layer)]
    fields: dict[str, Any] = {
        "peft_type": "MOLA",
        "number_experts": [d.experts.num_experts for d in order],
        "top_k": [int(d.router.top_k) for d in order],
        "r": [d.experts.rank for d in order],
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "obalance": bool(config.balance),
        "target_modules": sorted({path.rpartition(".")[2] for path in deltas}),
        "moestro": config.to_dict(),
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load(model: nn.Module, folder: str | Path) -> None:
    """Fill the mixtures of a model from a folder that `save` wrote. Raises `UserError` for whatever does not fit."""
    from_published(model, read_tensors(Path(folder)))


def attach(model: nn.Module, folder: str | Path) -> Attached:
    """Attach the mixtures that a folder of MoLA's, or one that `save` wrote, describes, and fill them.

    Of `adapter_config.json` these fields are read: number_experts, top_k and r (a number per layer, or one),
    lora_alpha, lora_dropout, obalance and target_modules. Nothing is attached where something does not fit.
    """
    folder = Path(folder)
    tensors, config = read_tensors(folder), _config(model, folder / "adapter_config.json")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    attached = put_in(model, config)
    try:
        from_published(model, tensors)
    except UserError:
        unload(model)
        for n, p in model.named_parameters():
            p.requires_grad_(before[n])
        raise
    return attached


def _config(model: nn.Module, path: Path) -> Mixture:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        own = said.get("moestro")
        numbers = {n: _whole(said[n]) for n in ("number_experts", "top_k", "r")}
        names = [str(n) for n in said["target_modules"]]
        alpha, dropout = float(said["lora_alpha"]), float(said.get("lora_dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no readable config of a mixture ({type(error).__name__}: {error})") from None
    if own is not None:
        return Mixture.from_dict(own, where=str(path))
    targets = [f"*.{name}" for name in names]
    if any(place.group == "attention" for place in places(model)):  # a decoder of ours: by logical names
        mlp = {"gate_proj", "up_proj", "down_proj"}
        if mlp & set(names) and not mlp <= set(names):
            raise UserError(
                f"{path}: a mixture on {', '.join(sorted(mlp & set(names)))} alone has no place in a Decoder"
            )
        targets = [f"attention.{name.removesuffix('_proj')}" for name in names if name not in mlp]
        targets += ["ffn"] if mlp <= set(names) else []
    return Mixture(
        targets=tuple(targets),
        allocation=LayerAllocation(experts=numbers["number_experts"], top_k=numbers["top_k"], rank=numbers["r"]),
        alpha=alpha,
        dropout=dropout,
        balance=0.001 if said.get("obalance") else 0.0,
    )


def _whole(value: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder; safetensors only."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        hint = f"; {pickle.name} is a pickle, which is never loaded" if pickle.is_file() else ""
        raise UserError(f"{folder}: there is no adapter_model.safetensors{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: no readable safetensors file ({error})") from None


@torch.no_grad()
def load_expert(model: nn.Module, expert: int, folder: str | Path) -> None:
    """Make a plain LoRA adapter in PEFT's format the expert number `expert` of every mixture of the model.

    For routing over ready adapters: freeze the experts and train the routers. Its rank may be lower; its scale is
    folded into B. Raises `UserError` where it lacks a map or fits none.
    """
    folder = Path(folder)
    tensors = read_tensors(folder)
    try:
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        scale = float(said["lora_alpha"]) / (float(said["r"]) ** (0.5 if said.get("use_rslora") else 1.0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: no readable LoRA config ({error})") from None
    if said.get("rank_pattern") or said.get("alpha_pattern"):
        raise UserError(f"{folder}: adapters with rank_pattern or alpha_pattern cannot become experts")
    left = set(tensors)
    fill: list[tuple[MixtureDelta, Tensor, Tensor]] = []
    for path, delta in _deltas(model).items():
        names = [f"{PREFIX}{path}.lora_{x}.weight" for x in "AB"]
        if not all(n in tensors for n in names):
            raise UserError(f"{folder}: the adapter has no {names[0]!r}{did_you_mean(names[0], tensors)}")
        a, b = (tensors[n] for n in names)
        own = delta.experts
        if a.shape[1] != own.dim or b.shape[0] != own.outputs or a.shape[0] > own.rank or b.shape[1] != a.shape[0]:
            raise UserError(
                f"{folder}: {names[0]} {list(a.shape)} and B {list(b.shape)} do not fit experts of rank {own.rank} "
                f"from {own.dim} to {own.outputs}"
            )
        if not 0 <= expert < own.num_experts:
            raise UserError(f"{path}: there is no expert {expert} of {own.num_experts}")
        left -= set(names)
        fill.append((delta, a, b * (scale / own.scale)))
    if left:
        raise UserError(f"{folder}: the adapter has a tensor {min(left)!r} that fits no mixture of the model")
    for delta, a, b in fill:
        for stack, value in ((delta.experts.a, a), (delta.experts.b, b)):
            stack[expert].zero_()
            stack[expert][: value.shape[0], : value.shape[1]].copy_(value)
