"""The whole of our decoder in transformers: a Qwen3-MoE of the same shape and the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UserError
from ..experts.config import Gated
from ..models.decoder import Decoder
from ..moe.config import MoELayer
from ..nn.config import Attention
from ..tasks.batches import Batches
from ..train.config import TrainRun
from ..train.ranks import Ranks
from ..train.step import autocast
from .peers import Absent, transformers_modules

__all__ = ["Trained", "counterpart", "in_their_names"]

NAMES = (  # theirs -> ours
    ("model.", ""),
    ("embed_tokens", "embed"),
    ("lm_head", "head"),
    ("input_layernorm", "mixer_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn", "mixer"),
    ("mlp.", "ffn."),
    ("ffn.gate.weight", "ffn.router.score.weight"),
    ("ffn.down_proj.weight", "ffn.down"),  # of a dense layer
    ("_proj.weight", ".weight"),
    ("gate_up_proj", "gate_up"),
    ("down_proj", "down"),
)


def counterpart(ours: Decoder, implementation: str, share: bool) -> Any:
    """Their model on our tensors (`share`) or on copies. Raises `Absent` where theirs has no such parts.

    What differs silently (another router, another position encoding) must be found by comparing results.
    """
    configuration, modeling = transformers_modules()
    config = configuration.Qwen3MoeConfig(**_sizes(ours))
    config._experts_implementation = implementation
    with torch.device("meta"):
        model: Any = modeling.Qwen3MoeForCausalLM(config)
    values = in_their_names(ours.state_dict(), list(model.state_dict()))
    model.load_state_dict({name: v if share else v.clone() for name, v in values.items()}, assign=True)
    model.model.rotary_emb = modeling.Qwen3MoeRotaryEmbedding(config).to(ours.embed.weight.device)  # in no state dict
    return model


def _sizes(ours: Decoder) -> dict[str, Any]:
    shape, blocks = ours.config, ours.config.resolved()
    dense = [i for i, block in enumerate(blocks) if not isinstance(block.ffn, MoELayer)]
    kinds = {block.ffn for i, block in enumerate(blocks) if i not in dense}
    widths = {getattr(blocks[i].ffn, "width", 0) for i in dense}
    mixers = {block.mixer for block in blocks}
    if len(kinds) != 1 or len(widths) > 1 or len(mixers) != 1:
        raise Absent("its layers of one kind are all alike")
    (layer,), (mixer,) = kinds, mixers
    assert isinstance(layer, MoELayer)
    if not isinstance(layer.experts, Gated) or layer.shared is not None or not isinstance(mixer, Attention):
        raise Absent("it has no such layers")
    if mixer.qk_norm != "head" or shape.tied:
        raise Absent("it norms queries and keys by head, and its head has a matrix of its own")
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads or mixer.num_heads,
        "head_dim": mixer.head_dim or shape.dim // mixer.num_heads,
        "intermediate_size": max(widths, default=1),
        "mlp_only_layers": dense,
        "moe_intermediate_size": layer.experts.width,
        "num_experts": layer.num_experts,
        "num_experts_per_tok": getattr(getattr(layer.router, "select", None), "k", 1),
        "norm_topk_prob": True,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def in_their_names(values: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Our tensors under their names. Raises `UserError` for one that we do not have."""
    found = {}
    for name in names:
        ours = name
        for theirs, replacement in NAMES:
            ours = ours.replace(theirs, replacement)
        prefix, _, last = ours.rpartition("ffn.")
        if ours not in values and last in ("gate.weight", "up.weight"):
            found[name] = values[f"{prefix}ffn.gate_up"].chunk(2)[last == "up.weight"]
        elif ours in values:
            found[name] = values[ours]
        else:
            raise UserError(f"bench: transformers' {name} has no counterpart {ours}")
    return found


class Trained:
    """Their whole model in training: their forward pass and balance loss, torch's cross-entropy, clipping and AdamW.

    It takes the batches and the schedule of our contender. Their balance loss pools over layers and they have no
    z-loss, so gradients are compared without either, see `first`.
    """

    def __init__(self, run: TrainRun, ours: Decoder, implementation: str, batches: Batches, ranks: Ranks) -> None:
        self.run, self.batches, self.ranks = run, batches, ranks
        self.model: Any = counterpart(ours, implementation, share=False).to(ranks.device).train()
        for parameter in self.model.parameters():
            parameter.requires_grad_()
        o: Any = run.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=o.lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=True,
        )
        layer = next(b.ffn for b in ours.config.resolved() if isinstance(b.ffn, MoELayer))
        self.balance = sum(loss.coefficient for loss in layer.losses if "Balance" in type(loss).__name__)
        self.number = 0

    def steps(self, n: int) -> None:
        """Take n optimiser steps."""
        for _ in range(n):
            self._backward(self.balance)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.optimizer.clip)
            factor = self.run.optimizer.schedule.factor(self.number, self.run.steps)
            for inner in self.optimizer.param_groups:
                inner["lr"] = self.run.optimizer.lr * factor
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.number += 1
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def first(self) -> dict[str, Tensor]:
        """Gradients of the cross-entropy of the next step by their names, and its nats; no parameter moves."""
        nats = self._backward(0.0)
        found = {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found | {"nats": nats.detach().double()}

    def _backward(self, balance: float) -> Tensor:
        batch = self.batches.train(self.number, self.run.batch_size).to(self.ranks.device)
        with autocast(self.ranks.device):
            out = self.model(input_ids=batch.tokens, use_cache=False, output_router_logits=True)
            nats = F.cross_entropy(out.logits.flatten(0, 1).float(), batch.targets.flatten())
        (nats + balance * out.aux_loss if balance else nats).backward()
        return nats
