"""The config of a Moestro decoder as transformers knows configs. (Files called `config.py` load no packages.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ...core.errors import UserError
from ...models.config import Decoder

__all__ = ["MoestroConfig"]


def _of_mixers(*names: str) -> Callable[[Decoder], Any]:
    """The first of these fields that a mixer of the decoder has a value for."""

    def read(decoder: Decoder) -> Any:
        values = (getattr(b.mixer, name, None) for name in names for b in decoder.resolved())
        return next((v for v in values if v is not None), None)

    return read


def _head_dim(decoder: Decoder) -> int | None:
    for block in decoder.resolved():
        if hasattr(block.mixer, "width"):
            return block.mixer.width(decoder.dim)  # type: ignore[attr-defined]
    return None


_DERIVED: dict[str, Callable[[Decoder], Any]] = {
    "vocab_size": lambda d: d.vocab_size,
    "hidden_size": lambda d: d.dim,
    "num_hidden_layers": lambda d: d.num_layers,
    "num_attention_heads": _of_mixers("num_heads"),
    "num_key_value_heads": _of_mixers("num_kv_heads", "num_heads"),
    "head_dim": _head_dim,
    "max_position_embeddings": lambda d: d.context,
    "tie_word_embeddings": lambda d: d.tied,
}


class MoestroConfig(PreTrainedConfig):
    """`MoestroConfig(model=Decoder(...))`: the decoder's config, and what transformers adds (special tokens, caching).

    model: a `models.config.Decoder`, or its `to_dict()`; it is kept as the latter. What transformers asks every config
    for (vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
    max_position_embeddings, tie_word_embeddings) is read from it: these cannot be set, and are not written to disk.
    Raises `UserError` for a decoder that cannot be, and for one of those fields with a value that contradicts it.
    """

    model_type = "moestro"
    keys_to_ignore_at_inference = ["past_key_values", "trail", "routing_loss"]

    model: Any = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.model
        decoder = given if isinstance(given, Decoder) else _read(given)
        self.model = decoder.to_dict()
        for name, derive in _DERIVED.items():
            said, is_so = kwargs.pop(name, None), derive(decoder)
            if said is not None and said != is_so:
                raise UserError(
                    f"MoestroConfig.{name} is {said}, but the config under 'model' makes it {is_so}; leave {name} out, "
                    "it is read from there"
                )
        super().__post_init__(**kwargs)

    def decoder_config(self) -> Decoder:
        """The config of the decoder itself."""
        return _read(self.model)


for _name, _derive in _DERIVED.items():
    setattr(MoestroConfig, _name, property(lambda self, derive=_derive: derive(self.decoder_config())))


def _read(data: Mapping[str, Any] | None) -> Decoder:
    return Decoder() if data is None else Decoder.from_dict(data, where="config.json: model")
