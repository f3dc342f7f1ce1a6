"""Plain experts with a further branch that multiplies what they hold by one. Returns (new model, Receipt)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...core.errors import UserError
from ...experts.config import MLP, GatedExtension
from ...moe.layer import MoELayer
from ..config import Extend
from ..receipt import Receipt
from .conduct import Claim, Made, choose, conduct
from .graft import Graft, graft
from .samples import Samples

__all__ = ["extend"]


def extend(options: Extend, model: nn.Module, **given: Any) -> tuple[nn.Module, Receipt]:
    """Every bank of plain MLPs, `MLP`, becomes a `GatedExtension` whose new map is zero and whose new bias is one: the
    output is unchanged, which the receipt claims. Source: 34 (arXiv 2401.15713), first version.

    Raises `UserError` where no routed layer has plain MLPs, or where a layer has a shared expert of them.
    """
    found = [p for p, m in model.named_modules() if isinstance(m, MoELayer) and type(m.config.experts) is MLP]
    paths = choose(found, options.layers, "routed layer of plain MLP experts")

    def make(samples: Samples) -> Made:
        grafts: dict[str, Graft] = {}
        invented: dict[str, str] = {}
        for path in paths:
            layer: Any = model.get_submodule(path)
            old, E = layer.config.experts, layer.config.num_experts
            if old.sparse_grad or old.deterministic:
                raise UserError(f"{path}: extended experts know neither sparse_grad nor deterministic; leave them out")
            bank = GatedExtension(width=old.width, activation=old.activation, bias=old.bias)
            tensors = {n: t.detach() for n, t in layer.state_dict().items()}
            up = tensors["experts.up"]
            tensors["experts.new"] = torch.zeros_like(up)
            tensors["experts.new_bias"] = up.new_ones(E, old.width)
            grafts[path] = Graft(routed=layer.config.replace(experts=bank), dim=layer.dim, tensors=tensors)
            invented[f"{path}.experts.new"] = "zeros: the new branch is one everywhere"
            invented[f"{path}.experts.new_bias"] = "ones: the new branch is one everywhere"
        claim = Claim("the new branch multiplies by one, so the output is unchanged")
        return Made(model=graft(model, grafts), paths=paths, claim=claim, invented=invented)

    return conduct(options, model, make, **given)
