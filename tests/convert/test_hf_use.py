"""Switching whole models of transformers to Moestro's experts, and refusing those that would not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moestro.convert.hf as hf
from convert.hf_cases import class_of
from moestro.core.errors import UserError
from moestro.testing.compare import assert_close


def tiny(kind: str = "Qwen3Moe", **fields: Any) -> Any:
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=16,
        intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=61,
    )
    config = getattr(transformers, f"{kind}Config")(**(sizes | fields))
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def test_use_switches_a_model_and_explains() -> None:
    model = tiny()
    ids = torch.arange(14).view(2, 7)
    model.set_experts_implementation("eager")
    want = model(ids).logits
    found = hf.use(model)
    assert list(found) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(e.path == "fused" for e in found.values())
    assert_close("logits", model(ids).logits, want, 1e-5)
    assert hf.use(model) == found
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False)[:, :7], ids)


def test_a_model_is_built_and_loaded_with_the_name(tmp_path: Any) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moestro")
    ids = torch.arange(14).view(2, 7)
    assert made.model.layers[0].mlp.experts.config._experts_implementation == "moestro"
    assert_close("logits", made(ids).logits, model(ids).logits, 1e-5)


def test_a_model_whose_own_module_hides_the_decorator() -> None:
    """transformers looks for the decorator in the source of the model's class: a subclass elsewhere is not switched by
    it, and nobody is told."""
    base = type(tiny())
    mine = type("Mine", (base,), {"__module__": "enum", "_can_set_experts_implementation_cached_value": None})
    config = tiny().config
    config._experts_implementation = "eager"
    model = mine(config)
    model.set_experts_implementation("moestro")
    assert model.config._experts_implementation == "eager"
    assert len(hf.use(model)) == 2
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "moestro"


def undecorated() -> dict[str, Any]:
    t = transformers
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=61, hidden_size=32)
    return {
        "Switch": lambda: t.SwitchTransformersForConditionalGeneration(
            t.SwitchTransformersConfig(
                d_model=32,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=2,
                num_experts=4,
                vocab_size=61,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
            )
        ),
        "Llama4": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(
                **sizes,
                head_dim=16,
                intermediate_size=16,
                intermediate_size_mlp=16,
                num_local_experts=4,
                pad_token_id=0,
            )
        ),
    }


@pytest.mark.parametrize("name", ["Switch", "Llama4"])
def test_use_refuses_models_that_would_not_change(name: str) -> None:
    model = undecorated()[name]()
    model.set_experts_implementation("moestro")  # accepted
    with pytest.raises(UserError, match="nothing can be switched.*computes its experts itself"):
        hf.use(model)


def test_use_refuses_a_dense_model() -> None:
    with pytest.raises(UserError, match="no routed experts"):
        hf.use(nn.Linear(3, 3))


def test_use_names_what_it_cannot_switch_and_changes_nothing() -> None:
    model = tiny()
    experts = model.model.layers[1].mlp.experts
    experts.__class__ = type("MyExperts", (type(experts),), {"forward": lambda self, x, i, w: x})
    before = model.config._experts_implementation
    with pytest.raises(UserError, match=r"1 experts modules could.*layers\.1\.mlp\.experts \(MyExperts overrides"):
        hf.use(model)
    assert model.config._experts_implementation == before


def test_use_refuses_another_interface() -> None:
    from transformers.integrations import finegrained_fp8, moe

    model = tiny()
    base = class_of("Qwen3MoeExperts")
    plain = type("Theirs", (nn.Module,), {"forward": lambda self, *a: a[0], "__init__": nn.Module.__init__})
    other = moe.use_experts_implementation(experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS)(plain)
    model.model.layers[0].mlp.experts.__class__ = type("FP8Experts", (other, base), {})
    with pytest.raises(UserError, match="FP8ExpertsInterface"):
        hf.use(model)


def test_explain_wants_a_decorated_module() -> None:
    with pytest.raises(UserError, match="Linear"):
        hf.explain(nn.Linear(3, 3))
