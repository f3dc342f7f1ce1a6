"""A family of published models: how its config.json and its tensors correspond to a config and a model of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...core.config import Config
from ...core.errors import UserError
from ...models.config import Stack
from ..borrowed import name_of
from ..families.shared.rope import LEGACY
from .fields import Fields
from .rules import Table
from .tensors import Tensors

__all__ = ["Family", "canonical", "config_fields", "difference", "read_fields"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One published layout, in `convert/families/<model_type>.py` as `FAMILY`.

    says: what config.json gives as `model_type`, where that is the name of another family (`convert.borrowed`).

    read: config.json -> our config; refuses fields that we cannot express. write: our config -> the fields that
    describe it, without those that every family shares; it may lose what the family cannot express, which is found by
    reading it back. examples: name -> tiny config.json contents that tests build transformers' own models from.
    unpack: a view of tensors that are stored in another form (quantised blocks), where the family has such.
    also: other architectures that are read, of which `unpack` leaves the same network; None = any.
    """

    model_type: str
    architecture: str
    table: Table
    read: Callable[[Fields], Config]
    write: Callable[[Any], dict[str, Any]]
    examples: Callable[[], dict[str, dict[str, Any]]]
    unpack: Callable[[Tensors, Mapping[str, Any]], Tensors] | None = None
    says: str | None = None
    also: tuple[str, ...] | None = ()


def read_fields(family: Family, data: Mapping[str, Any], where: object) -> Config:
    """Our config of a config.json. Raises `UserError` for what contradicts itself or cannot be expressed."""
    fields = Fields(data, where)
    kinds = fields.strings("architectures")
    if kinds and family.also is not None and not {family.architecture, *family.also} & {*kinds}:
        raise fields.error("architectures", f"{kinds[0]!r} is no {family.architecture}, which model_type says it is")
    try:
        config = family.read(fields)
    except UserError as error:
        said = str(error)
        raise error if said.startswith(str(where)) else UserError(f"{where}: {said}") from None
    if data.get("quantization_config") is not None and "quantization_config" not in fields.taken:
        raise fields.error("quantization_config", "quantised weights of this family cannot be read; get others")
    return config


# What makes two configs the same function ---------------------------------------------------------------------------

_TRAINING = {
    "seed",
    "init_std",
    "init_depth_scaled",
    "checkpoint",
    "dropout",
    "allow_noncausal",
    "losses",
    "expected",
    "deterministic",
    "sparse_grad",
    "exchange",
    "rate",
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # absent, a family's defaults would be taken for them
_BY_BLOCK = ("attention", "ffn", "moe", "layout", "num_experts", "residual_scale", "cross", "source_dim")


def canonical(config: Config) -> dict[str, Any]:
    """A config as a tree, without what does not change the function, and with defaults that follow from others."""
    tree = config.to_dict()
    if isinstance(config, Stack):
        tree = {k: v for k, v in tree.items() if k not in _BY_BLOCK}
        tree["blocks"] = [block.to_dict() for block in config.resolved()]
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        part = getattr(config, field.name)
        if isinstance(part, Stack):
            tree[field.name] = canonical(part)
    _clean(tree, tree.get("dim"))
    return tree


def _clean(tree: Any, dim: Any) -> None:
    if isinstance(tree, list):
        for value in tree:
            _clean(value, dim)
    if not isinstance(tree, dict):
        return
    for name in _TRAINING & tree.keys():
        del tree[name]
    if "num_kv_heads" in tree and "num_heads" in tree:
        tree["num_kv_heads"] = tree["num_kv_heads"] or tree["num_heads"]
        if tree.get("head_dim") is None and dim is not None:
            tree["head_dim"] = dim // tree["num_heads"]
        if tree.get("scale") is None and tree.get("head_dim"):
            tree["scale"] = tree["head_dim"] ** -0.5
        if not tree.get("qk_norm"):
            tree.pop("norm_eps", None)
    for value in tree.values():
        _clean(value, dim)


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """The path of the first value in which two trees differ, with both values; None = none."""
    if isinstance(a, dict) and isinstance(b, dict) and a.get("type") == b.get("type"):
        for name in a | b:
            found = difference(a.get(name), b.get(name), f"{path}.{name}" if path else name)
            if found:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        found = (difference(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b)))
        return next((f for f in found if f), None)
    return None if a == b and isinstance(a, bool) == isinstance(b, bool) else f"{path} ({_show(a)}, not {_show(b)})"


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("type", "a value")).split(".")[-1]
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def config_fields(family: Family, config: Config, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json of a model of ours in this family.

    source: the config.json that the model came from, of this family or another; its special tokens stay, what it says
    beside the function where it is of this family, and all of it where the function is unchanged too. Raises
    `UserError` that names a field of ours which the family cannot express.
    """
    kept = dict(source or {}) if source and _is_of(source, family) else {}
    for name in ("auto_map", "quantization_config", "torch_dtype"):
        kept.pop(name, None)
    head = {"architectures": [family.architecture], "model_type": family.says or family.model_type}
    wanted = canonical(config)
    if kept:
        try:
            if canonical(read_fields(family, kept, "source")) == wanted:
                return head | kept
        except UserError:
            pass
        for name in LEGACY:
            kept.pop(name, None)
    ids = {name: (source or {}).get(name) for name in _IDS} if family.architecture.endswith("ForCausalLM") else {}
    try:
        fields = ids | kept | head | family.write(config)
        back = canonical(read_fields(family, fields, family.model_type))
    except UserError as error:
        raise UserError(f"the model cannot be written as {family.model_type}: {error}") from None
    found = difference(wanted, back)
    if found:
        raise UserError(
            f"the model cannot be written as {family.model_type}, which does not express its {found}; "
            "choose another family, or moestro, which holds any model"
        )
    return fields


def _is_of(source: Mapping[str, Any], family: Family) -> bool:
    """Whether a config.json is of the family, not of one that has the same `model_type`."""
    if source.get("model_type") != (family.says or family.model_type):
        return False
    return name_of(source) == family.model_type
