"""What a run asks of a model's config, whichever kind it is, and what it fills in."""

from __future__ import annotations

from ..core.errors import UserError
from ..models.config import Decoder, EncoderDecoder, Headed, Stack
from ..models.heads_config import ClassHead
from ..moe.config import MoELayer
from ..routers.config import Label, Router

__all__ = ["Model", "context_of", "filled", "is_routed", "language_model", "routed_by_label", "stacks_of"]

Model = Decoder | EncoderDecoder | Headed


def stacks_of(model: Model) -> tuple[Stack, ...]:
    """The decoder, or the encoder, or both."""
    if isinstance(model, EncoderDecoder):
        return model.encoder, model.decoder
    return (model.encoder,) if isinstance(model, Headed) else (model,)


def context_of(model: Model) -> int:
    """The most tokens that every part of the model takes."""
    return min(stack.context for stack in stacks_of(model))


def is_routed(model: Model) -> bool:
    """Whether any layer of the model is routed."""
    top = isinstance(model, Headed) and isinstance(model.top, MoELayer)
    return top or any("moe" in stack.kinds() for stack in stacks_of(model))


def routed_by_label(model: Model) -> list[MoELayer]:
    """The layers whose experts a signal names, which with examples is the number of their domain."""
    layers = [block.ffn for stack in stacks_of(model) for block in stack.resolved()]
    layers += [model.top] if isinstance(model, Headed) else []
    routed = [layer for layer in layers if isinstance(layer, MoELayer) and isinstance(layer.router, Router)]
    return [layer for layer in routed if isinstance(layer.router.select, Label)]  # type: ignore[attr-defined]


def filled(model: Model, *, vocab_size: int, seed: int, start: int = 0, classes: int = 0) -> Model:
    """The model for a vocabulary, a seed and, where it has use for them, a first token of targets and classes."""
    if isinstance(model, EncoderDecoder):
        sides = {name: getattr(model, name).replace(vocab_size=vocab_size) for name in ("encoder", "decoder")}
        return model.replace(**sides, start=start, seed=seed)
    if isinstance(model, Headed):
        head = model.head.replace(num_classes=classes) if isinstance(model.head, ClassHead) else model.head
        return model.replace(encoder=model.encoder.replace(vocab_size=vocab_size), head=head, seed=seed)
    return model.replace(vocab_size=vocab_size, seed=seed)


def language_model(model: Model, what: str) -> Decoder:
    """The model, where it is a language model; else `UserError`: `what` needs one."""
    if not isinstance(model, Decoder):
        raise UserError(f"{what} needs a language model (Decoder); this one is {_article(type(model).__name__)}")
    return model


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
