"""Run folders as models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from ..convert.checkpoint.tokenizer import byte_files
from ..core.errors import UserError
from ..models.decoder import Decoder
from ..tasks.tokenizer import Bytes
from .load import Loaded, load

if TYPE_CHECKING:
    from ..convert.hf.model import MoestroForCausalLM

__all__ = ["Run", "from_run", "write_run"]


class Run(NamedTuple):
    """A trained run: a `MoestroForCausalLM` in evaluation mode, and a `PreTrainedTokenizerFast`."""

    model: MoestroForCausalLM
    tokenizer: Any


def from_run(folder: str | Path, *, state: Literal["best", "last"] = "best") -> Run:
    """The model of a run folder (`RUN`, or `RUN/dense`) for transformers, with its tokenizer.

    Generation ends at the token that separates files. Raises `UserError` as `train.load.load` does, and for a run whose
    model is no decoder.
    """
    from transformers import PreTrainedTokenizerFast

    from ..convert.hf import MoestroConfig, MoestroForCausalLM

    loaded = load(folder, state=state)
    if not isinstance(loaded.model, Decoder):
        raise UserError(f"{folder}: its model is no decoder ({type(loaded.model).__name__}); generation needs one")
    end = _end(loaded)
    with torch.device("meta"):
        model = MoestroForCausalLM(MoestroConfig(model=loaded.model.config, eos_token_id=end, pad_token_id=end))
    model.model = loaded.model
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = end
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(loaded),
        model_max_length=loaded.model.config.context,
        clean_up_tokenization_spaces=False,
    )
    return Run(model.eval(), tokenizer)


def write_run(run: str | Path, folder: str | Path) -> Path:
    """Write a run as a folder that the Auto classes of transformers load after `import moestro.convert.hf`."""
    model, tokenizer = from_run(run)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _tokenizer(loaded: Loaded) -> Any:
    import tokenizers

    if isinstance(loaded.tokenizer, Bytes):
        return tokenizers.Tokenizer.from_str(json.dumps(byte_files()["tokenizer.json"]))
    return tokenizers.Tokenizer.from_str(loaded.tokenizer.to_json())


def _end(loaded: Loaded) -> int | None:
    """The id that ends a text; None where files are only separated by line breaks."""
    separator = loaded.tokenizer.separator
    return None if "\n" in loaded.tokenizer.decode([separator]) else separator
