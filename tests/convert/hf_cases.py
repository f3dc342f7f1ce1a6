"""Every experts class of transformers that is decorated, found by inspection and built from a tiny config."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "THROUGH_FP32", "build", "class_of", "config_for", "decorated_classes", "oracle", "problem"]

D, F, E, K = 16, 12, 6, 3

# What cannot be told from a class's source. Fields of its config that are left as they are, and what its constructor
# is given besides the config.
UNTOUCHED: dict[str, set[str]] = {"Ernie4_5_VLMoeMoeExperts": {"moe_intermediate_size"}}  # a list, one per modality
ARGUMENTS: dict[str, dict[str, Any]] = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": F}}

# Classes whose own forward goes through fp32 whatever the dtype: in float64 they agree to fp32 only.
THROUGH_FP32 = {"BeamExperts", "Inkling2Experts", "MuseSparkExperts", "OpenAIPrivacyFilterExperts"}


def _source() -> Path:
    found = importlib.util.find_spec("transformers")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "models"


def _scan() -> dict[str, str]:
    """Class -> module, of the sources that have the decorator; transformers is not imported."""
    found = {}
    for file in sorted(_source().glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"^@use_experts_implementation\b[^\n]*\nclass (\w+)", text, re.MULTILINE):
            found[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


CLASSES = _scan()


def class_of(name: str) -> Any:
    return getattr(importlib.import_module(CLASSES[name]), name)


def decorated_classes() -> set[str]:
    """The same, from the classes themselves: in every modelling file that mentions the decorator, those that have what
    it puts on a class."""
    from moestro.convert.hf.recognise import decorated

    found = set()
    for file in _source().glob("**/modeling_*.py"):
        if "use_experts_implementation" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, nn.Module) and decorated(value):
                assert hasattr(value, "_apply_gate")
                found.add(name)
    return found


@functools.cache
def _reads(name: str) -> dict[str, str]:
    """Attribute of the module -> field of the config that it is set from, read off the class's own __init__; fields
    that are read in other ways under their own names."""
    cls = class_of(name)
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(cls.__init__))))
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            for leaf in ast.walk(node.value):
                if _is_field(leaf):
                    found[node.targets[0].attr] = leaf.attr  # type: ignore[attr-defined]
                    break
    for node in ast.walk(tree):
        if _is_field(node) and node.attr not in found.values():  # type: ignore[attr-defined]
            found[node.attr] = node.attr  # type: ignore[attr-defined]
    return found


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"


def config_for(name: str) -> Any:
    """The config of transformers that has all the fields that the class reads, with tiny sizes and a tight clamp."""
    module = CLASSES[name].rsplit(".", 1)[0]
    reads = _reads(name)
    modeling = importlib.import_module(CLASSES[name])
    from transformers import PreTrainedConfig

    sources = [modeling]
    stem = CLASSES[name].rsplit("modeling_", 1)[1]
    sources.append(importlib.import_module(f"{module}.configuration_{stem}"))
    kinds = {
        v for m in sources for v in vars(m).values() if isinstance(v, type) and issubclass(v, PreTrainedConfig)
    } - {PreTrainedConfig}
    for kind in sorted(kinds, key=lambda c: c.__name__):
        try:
            config = kind()
        except Exception:
            continue
        if all(hasattr(config, field) for field in reads.values()):
            return _shrunk(config, name, reads)
    raise AssertionError(f"{name}: no config in {module} has {sorted(set(reads.values()))}")


def _shrunk(config: Any, name: str, reads: dict[str, str]) -> Any:
    for attribute, field in reads.items():
        size = {"num_experts": E, "hidden_dim": D, "hidden_size": D}.get(attribute)
        if attribute.startswith("intermediate"):
            size = F
        if "limit" in field:
            size = 0.7
        if size is not None and field not in UNTOUCHED.get(name, ()):
            setattr(config, field, size)
    return config


def build(name: str, dtype: torch.dtype = torch.float32, implementation: str = "moestro", seed: int = 0) -> Any:
    """An experts module with random parameters, biases and norms among them."""
    config = config_for(name)
    config._experts_implementation = implementation
    module = class_of(name)(config, **ARGUMENTS.get(name, {}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.to(dtype)


def problem(T: int, dtype: torch.dtype, seed: int = 1, foreign: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D], expert [T, K], weight [T, K], grad [T, D]. The last expert gets nothing; experts of a unit differ.
    foreign: some ids are those of experts on other ranks, E and more, and have weight 0."""
    g = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(T, D, generator=g, dtype=torch.float64) for _ in range(2))
    expert = torch.rand(T, E - 1, generator=g).argsort(1)[:, :K]
    weight = torch.rand(T, K, generator=g, dtype=torch.float64) + 0.1
    if foreign:
        elsewhere = torch.rand(T, K, generator=g) < 0.4
        elsewhere[0] = True
        expert, weight = expert.masked_fill(elsewhere, E), weight.masked_fill(elsewhere, 0)
    return x.to(dtype), expert, weight.to(dtype), grad.to(dtype)


def oracle(module: Any, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """The class's own forward. Foreign ids become choices of weight 0, which every class understands."""
    from moestro.convert.hf.recognise import original_forward

    here = expert < E
    weight = torch.where(here, weight, torch.zeros_like(weight))  # no gradient reaches foreign choices
    return original_forward(module)(module, x, expert.masked_fill(~here, 0), weight)
