"""Making transformers know Moestro decoders: Auto classes, pipelines, Trainer and its server, without remote code."""

from __future__ import annotations

import sys

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import transformers_module  # importing it replaces the package in sys.modules
from transformers.trainer import DEFAULT_CALLBACKS

from .configuration import MoestroConfig
from .model import MoestroForCausalLM
from .trainer import RouterStepsCallback

__all__ = ["register_models"]


def register_models() -> None:
    """Register the config and the model; calling it again changes nothing."""
    name = MoestroForCausalLM.__name__
    AutoConfig.register(MoestroConfig.model_type, MoestroConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoestroConfig, MoestroForCausalLM, exist_ok=True)
    AutoTokenizer.register(MoestroConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
    # Trainer's label smoothing shifts the labels of models that are listed here by name, and of no others; the server
    # looks for the class that config.json names among transformers' own attributes.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoestroConfig.model_type] = name
    for package in (transformers_module, sys.modules["transformers"]):
        setattr(package, name, MoestroForCausalLM)
    if RouterStepsCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(RouterStepsCallback)  # type: ignore[arg-type]
