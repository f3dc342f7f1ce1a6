"""A Moestro decoder as a causal language model of transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ...core.carry import Carry
from ...core.errors import UserError
from ...core.signals import Signals
from ...core.trail import Trail
from ...models.decoder import Decoder
from ...moe.carrier import ride
from ...moe.dropin import Port
from ...moe.routed import Routed
from ...nn.constants import Constants
from ...ops.choice import checkpoint_context
from .cache import MoestroCache
from .configuration import MoestroConfig
from .inputs import signals_of, targets_of

__all__ = ["MoestroForCausalLM", "MoestroOutput"]


@dataclasses.dataclass
class MoestroOutput(CausalLMOutputWithPast):
    """What transformers' causal language models return, and what the routers did.

    loss: [] mean of nats over targets and, in training, the routing losses with their coefficients. routing_loss: []
    those losses by themselves. trail: `core.trail.Trail`, cut from the graph; paths are those of the model's modules.
    """

    routing_loss: Tensor | None = None
    trail: Trail | None = None


class MoestroForCausalLM(PreTrainedModel, GenerationMixin):
    """`MoestroForCausalLM(MoestroConfig(model=Decoder(...)))`; the decoder itself is `.model`.

    Routing losses act exactly once. With `labels`, in training, they are part of `loss`: sum of coefficient * value,
    weighted by this batch's share of the targets where `num_items_in_batch` is given (as under Trainer), so that
    accumulating gradients over several batches takes their mean. Without labels, in training, they ride on the gradient
    of the logits with the factor `loss_scale` (which Trainer's callback keeps right, see `trainer.py`); do not add them
    again. In evaluation `loss` is the mean of nats alone, and nothing rides.

    Positions whose attention mask is 0, on either side, are routed nowhere, counted nowhere, seen by nobody; they are
    no targets and predict none. What else a router or loss needs goes into `signals`.
    """

    config_class = MoestroConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "signals"]
    _supports_sdpa = True
    _supports_context_parallel = False

    config: MoestroConfig
    model: Decoder

    def __init__(self, config: MoestroConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config.decoder_config())
        self.loss_scale = 1.0
        self.gradient_checkpointing = self.model.config.checkpoint
        self.port = Port(any(isinstance(m, Routed) and m.moves for m in self.model.modules()))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoestroCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_trail: bool | None = None,
        signals: Signals | None = None,
        **kwargs: Any,
    ) -> MoestroOutput:
        """Logits, and with labels the loss.

        Shapes: input_ids [B, S] int64 or inputs_embeds [B, S, D]; attention_mask [B, N], N = tokens in the cache + S,
        0 = padding; position_ids [B, S], by default counted over what the mask leaves (a row that starts over from 0
        holds several sequences, packed); labels [B, S], -100 = no target, shifted here -> logits [B, S, V], or of the
        last `logits_to_keep` positions.

        output_trail: None = except in passes that are given a cache, which are decoding. signals: what routers need
        beyond tokens, padding and positions, flat [B * S]. kwargs: num_items_in_batch, shift_labels; others go to
        `loss_function`. Raises `UserError` for masks that are no [B, N] and for what a decoder cannot give.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("MoestroForCausalLM takes either input_ids or inputs_embeds")
        if output_attentions:
            raise UserError("Moestro's attention keeps no attention maps; leave output_attentions out")
        x = input_ids if inputs_embeds is None else inputs_embeds
        assert x is not None
        if x.shape[1] > self.model.config.context:
            raise UserError(f"{x.shape[1]} tokens do not fit the model's context of {self.model.config.context}")
        cache = self._cache(past_key_values, use_cache, labels)
        decoding = past_key_values is not None and not self.training
        signals = signals_of(
            x,
            attention_mask,
            position_ids,
            given=signals,
            past=0 if cache is None else cache.length,
            training=self.training,
            quiet=decoding and not output_trail,
        )
        carry = Carry() if cache is None else cache.room(x.shape[1])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        h, carry, trail, states = self._hidden(input_ids, inputs_embeds, signals, carry, bool(output_hidden_states))
        if cache is not None:
            cache.put(carry, x.shape[1])
        logits = self.model.head(_kept(h, logits_to_keep))
        trail = self.port(trail.under("model"))
        routing = trail.loss()
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self._loss(logits, labels, signals.valid, routing, kwargs)
        elif self.training:
            logits = ride(logits, routing, self.loss_scale)
        return MoestroOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=states,
            routing_loss=routing.detach() if isinstance(routing, Tensor) else None,
            trail=None if decoding and not output_trail else trail.detach(),
        )

    def _cache(self, given: Any, use_cache: bool | None, labels: Tensor | None) -> MoestroCache | None:
        if given is not None:
            if not isinstance(given, MoestroCache):
                raise UserError(
                    f"past_key_values: {type(given).__name__} cannot hold the states of Moestro's mixers; pass what "
                    "the model returned, or None"
                )
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        return MoestroCache(self.model) if use_cache and not (self.training and self.gradient_checkpointing) else None

    def _hidden(
        self, ids: Tensor | None, embeds: Tensor | None, signals: Signals, carry: Carry, all_states: bool
    ) -> tuple[Tensor, Carry, Trail, tuple[Tensor, ...] | None]:
        """What the head takes; with `all_states` also the embeddings and what every block gives (the last normed)."""
        if ids is not None and not all_states:
            return *self.model.hidden(ids, signals, carry), None
        if ids is not None:
            h = self.model.embed(ids)
            if signals.token is None:
                signals = dataclasses.replace(signals, token=ids.reshape(-1))
        else:
            assert embeds is not None
            h = embeds
        if not all_states:
            return *self.model.run(h, signals, carry), None
        states, trail = [h], Trail()
        for i in range(self.model.config.num_layers):
            h, carry, left = self.model.run(h, signals, carry, i, i + 1)
            states.append(h)
            trail = trail | left
        return h, carry, trail, tuple(states)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        valid: Tensor | None,
        routing: Tensor | float,
        kwargs: dict[str, Any],
    ) -> Tensor:
        shifted = kwargs.pop("shift_labels", None)
        targets = targets_of(labels, shifted, valid, logits)
        loss = self.loss_function(
            logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets, **kwargs
        )
        if not self.training:
            return loss
        items = kwargs.get("num_items_in_batch")
        if items is None:
            return loss + routing
        share = (targets != -100).sum() / torch.as_tensor(items, device=loss.device)
        return loss + share * routing

    # Parts that transformers asks for --------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise UserError("the embeddings of a Moestro decoder follow from its config; build another decoder")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        raise UserError("the head of a Moestro decoder follows from its config; build another decoder")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """The embeddings as they are; `UserError` for another number of tokens."""
        if new_num_tokens not in (None, self.model.config.vocab_size):
            raise UserError(
                f"a Moestro decoder keeps its vocabulary of {self.model.config.vocab_size} tokens; train with a "
                f"tokenizer of {new_num_tokens} from the start, or take unused ids for new tokens"
            )
        return self.model.embed

    def _init_weights(self, module: nn.Module) -> None:
        """Decoders draw their own initial values; only what follows from the config is missing after loading."""
        if isinstance(module, Constants):
            module.make_constants(next(module.buffers()).device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers does it, but a tensor that is missing, left over or of another shape is a `UserError`."""
        told = kwargs.pop("output_loading_info", False)
        made, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        wrong = {
            "lacks": sorted(info["missing_keys"]),
            "has besides": sorted(info["unexpected_keys"]),
            "has in another shape": sorted(str(m[0]) for m in info["mismatched_keys"]),
        }
        said = [f"{what} {', '.join(n[:3])}{' ...' if n[3:] else ''} ({len(n)})" for what, n in wrong.items() if n]
        if said:
            raise UserError(
                f"{pretrained_model_name_or_path}: the checkpoint {'; it '.join(said)}; its config.json belongs to "
                "another model, or files are missing: take both from one source"
            )
        return (made, info) if told else made

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = torch_checkpoint, every_n_layers: int = 1
    ) -> None:
        """Recompute every block with `moestro.checkpoint`, which keeps routing decisions."""
        said = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and (
            every_n_layers != 1
            or said.get("use_reentrant")
            or said.get("context_fn", checkpoint_context) is not checkpoint_context
            or getattr(gradient_checkpointing_func, "func", torch_checkpoint) is not torch_checkpoint
        ):
            raise UserError(
                "Moestro recomputes each of its blocks by moestro.checkpoint, which keeps routing decisions: enable "
                "gradient checkpointing without reentrant mode, offloading, every_n_layers or another context_fn"
            )
        self.gradient_checkpointing = enable
        self.model.config = self.model.config.replace(checkpoint=enable)

    # Generation ------------------------------------------------------------------------------------------------

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Generation ends when the context is full, as in `moestro.generate`."""
        made = super()._prepare_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]
        made.max_length = min(made.max_length, self.model.config.context)
        return made

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation {generation_config.cache_implementation!r}: the states of Moestro's mixers "
                "have a cache of their own; leave it out"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MoestroCache(self.model, max_cache_length + 1)


def _kept(h: Tensor, keep: int | Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return h[:, keep]
    return h[:, -keep:].contiguous() if keep else h
