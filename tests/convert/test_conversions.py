"""Every registered conversion passes the conformance suite, on a decoder and, dense to MoE, in transformers' models."""

from __future__ import annotations

import pytest
import torch

from moestro.convert.config import METHODS, Extend, Specialists, Upcycle
from moestro.convert.examples import examples
from moestro.experts.config import MLP
from moestro.models.config import ParallelBlock
from moestro.models.examples import examples as decoders
from moestro.nn.config import PlainFeedForward, RelativeBias
from moestro.routers.config import Constant
from moestro.testing.conversions import check_conversion

TEXT = torch.randint(0, 37, (4, 16), generator=torch.Generator().manual_seed(3))
MOE = decoders()["moe"]


def test_every_method_has_an_example():
    assert {type(o) for o in examples().values()} == set(METHODS.values())


@pytest.mark.parametrize("name", examples())
def test_conversion(name):
    options = examples()[name]
    config = MOE.replace(moe=None) if isinstance(options, Upcycle | Specialists) else fitting(options, MOE)
    claims = {"copy": 1e-6, "copy_one": 1e-6, "copy_shared": 1e-6, "granular": 1e-6, "granular_copies": 1e-6}
    check_conversion(
        lambda model: options.build(model, text=TEXT),
        (lambda: [config.build() for _ in range(3)]) if options.several else config.build,
        lambda model: model(TEXT)[0],
        exact=(claims | {"cluster_all": 1e-6, "modular": 1e-6, "extend": 1e-6}).get(name),
    )


def fitting(options, config):
    """The model with experts that the conversion takes."""
    if not isinstance(options, Extend):
        return config
    return config.replace(moe=config.moe.replace(experts=MLP(width=12, bias=True)))


def parallel():
    """Parallel blocks, a norm of heads and a bias by distance, a tied head with a bias, multipliers."""
    mixer = MOE.attention.replace(qk_norm="head", positions=RelativeBias(buckets=4))
    blocks = (ParallelBlock(mixer=mixer, ffn=PlainFeedForward(width=20, bias=True), residual_scale=0.4),) * 2
    return MOE.replace(blocks=blocks, moe=None, tied=True, head_bias=True, logits_scaling=0.5)


def sinks():
    """Sinks, windows and biases of every map."""
    config = decoders()["sinks"]
    return config.replace(blocks=tuple(b.replace(ffn=MOE.ffn) for b in config.resolved()))


MIXTURES = [(name, False) for name, options in examples().items() if options.several]


@pytest.mark.parametrize(("name", "equal"), [*MIXTURES, ("bam_shared", True), ("bam_top", True)])
@pytest.mark.parametrize("config", [parallel(), sinks()], ids=["parallel", "sinks"])
def test_mixtures_of_other_decoders(config, name, equal):
    """Different ones, and equal ones with weights that sum to 1."""
    options = examples()[name].replace(weigh=Constant()) if equal else examples()[name]
    check_conversion(
        lambda models: options.build(models, text=TEXT),
        lambda: [config.build() for _ in range(2)],
        lambda model: model(TEXT)[0],
        exact=1e-6 if equal else None,
    )


@pytest.mark.parametrize("name", [n for n, o in examples().items() if not (o.several or isinstance(o, Upcycle))])
def test_conversion_of_layers_that_differ(name):
    """Different numbers of experts per layer and a tied head; a shared expert."""
    options = examples()[name]
    for config in (fitting(options, decoders()[kind]) for kind in ("mixed", "shared")):
        check_conversion(lambda m: options.build(m, text=TEXT), config.build, lambda model: model(TEXT)[0])


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=37, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=37)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8)
    return ViTModel(ViTConfig(patch_size=4, **sizes))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [n for n, o in examples().items() if isinstance(o, Upcycle)])
@pytest.mark.parametrize("make", [gpt2, llama, vit])
def test_conversion_of_a_model_that_is_not_ours(make, name):
    options = examples()[name]
    given = IMAGES if make is vit else TEXT

    def run(model):
        out = model(given)
        return out.last_hidden_state if make is vit else out.logits

    def made():
        torch.manual_seed(0)
        return make()

    if name == "taylor" and make is vit:

        def loss(model, batch):
            return model(batch).last_hidden_state.square().sum()

        check_conversion(lambda m: options.build(m, text=given, loss=loss), made, run)
    else:
        check_conversion(lambda m: options.build(m, text=given), made, run)
