"""DeepSeek, GLM and ERNIE: released config.json files, what they leave out, what cannot be expressed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro import convert
from moestro.convert.checkpoint.family import canonical, config_fields
from moestro.convert.families import find
from moestro.core.errors import UserError
from moestro.models import EncoderDecoder, published
from moestro.nn import Attention, LatentAttention

V3: dict[str, Any] = {  # fields of the released config.json that say something about the function
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_counts_of_deepseek_v3_come_out_of_its_config() -> None:
    """Both embeddings count, the module that predicts a second token does not (671B; with it 685B)."""
    config = convert.read_config(V3)
    assert canonical(config) == canonical(published("deepseek-v3"))
    assert round(config.num_params() / 1e9, 2) == 671.03
    assert round(config.num_active_params() / 1e9, 2) == 37.55


def test_published_configs_can_be_written() -> None:
    for name, family in (
        ("deepseek-v3", "deepseek_v3"),
        ("moonlight-16b-a3b", "deepseek_v3"),
        ("deepseek-v2-lite", "deepseek_v2"),
    ):
        fields = config_fields(find(family), published(name), None)
        assert canonical(convert.read_config(fields)) == canonical(published(name))


def example(family: str, name: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **find(family).examples()[name], **changes}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (example("deepseek_v3", "plain", scoring_func="softmax"), "scoring_func"),
        (example("deepseek_v3", "plain", num_key_value_heads=1), "num_key_value_heads"),
        (example("deepseek_v3", "plain", num_experts_per_tok=1), "norm_topk_prob"),
        (example("deepseek_v3", "plain", first_k_dense_replace=-1), "first_k_dense_replace"),
        (example("deepseek_v3", "plain", topk_group=9), "kept"),
        (example("deepseek_v3", "plain", partial_rotary_factor=0.5), "partial_rotary_factor"),
        (example("deepseek_v2", "lite", norm_topk_prob=True), "norm_topk_prob"),
        (example("deepseek_v2", "lite", topk_method="noaux_tc"), "topk_method"),
        (example("deepseek_v2", "lite", moe_layer_freq=2), "moe_layer_freq"),
        (example("deepseek_v2", "lite", mlp_bias=True), "mlp_bias"),
        (example("ernie4_5_moe", "plain", use_bias=True), "use_bias"),
        (example("ernie4_5_moe", "plain", moe_layer_interval=0), "moe_layer_interval"),
        (example("ernie4_5_moe", "plain", moe_k=1), "moe_k"),
    ],
)
def test_fields_that_cannot_be_expressed_are_named(data: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        convert.read_config(data)
    assert "\n" not in str(caught.value)


def save_tiny(folder: Path, family: str, name: str) -> dict[str, torch.Tensor]:
    data = example(family, name)
    convert.save(convert.read_config(data).build(), folder, to=family, source=data)
    return load_file(folder / "model.safetensors")


def test_the_extra_prediction_layer_is_left_out_and_nothing_else(tmp_path: Path) -> None:
    """Its number is that of DeepSeek-V3's; in a smaller model it is left over like any other."""
    tensors = save_tiny(tmp_path / "a", "deepseek_v3", "plain")
    extra = {"model.layers.61.eh_proj.weight": torch.zeros(2, 2)}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file(tensors | extra, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    model = convert.load(tmp_path / "b").model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), convert.load(tmp_path / "a").model.parameters()))
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match=r"model.layers.3.eh_proj.weight"):
        convert.load(tmp_path / "b")


def test_biases_of_the_selection_must_be_there_and_arrive(tmp_path: Path) -> None:
    for family, name, key, shape in (
        ("deepseek_v3", "plain", "model.layers.1.mlp.gate.e_score_correction_bias", [8]),
        ("ernie4_5_moe", "plain", "model.layers.1.mlp.moe_statics.e_score_correction_bias", [1, 8]),
    ):
        tensors = save_tiny(tmp_path / family, family, name)
        assert list(tensors[key].shape) == shape
        path = tmp_path / family / "model.safetensors"
        save_file(tensors | {key: torch.arange(8.0).view(shape)}, path, {"format": "pt"})
        select = convert.load(tmp_path / family).model.layers[1].ffn.router.select
        assert torch.equal(select.bias, torch.arange(8.0))
        save_file({k: v for k, v in tensors.items() if k != key}, path, {"format": "pt"})
        with pytest.raises(UserError, match="e_score_correction_bias"):
            convert.load(tmp_path / family)


def test_a_model_of_another_kind_is_refused() -> None:
    v3 = convert.read_config(example("deepseek_v3", "plain"))
    for to, says in (("deepseek_v2", "softmax"), ("glm4_moe", "LatentAttention"), ("mixtral", "mixer|ffn")):
        with pytest.raises(UserError, match=says):
            config_fields(find(to), v3, None)
    plain = v3.replace(attention=Attention(num_heads=3, positions=None))
    with pytest.raises(UserError, match="needs LatentAttention"):
        config_fields(find("deepseek_v3"), plain, None)
    with pytest.raises(UserError, match="is no Decoder"):
        config_fields(find("deepseek_v3"), EncoderDecoder(), None)
    late = v3.replace(layout=("moe", "dense", "moe"))
    with pytest.raises(UserError, match="dense layers after routed ones"):
        config_fields(find("deepseek_v3"), late, None)
    assert isinstance(v3.attention, LatentAttention)
    with pytest.raises(UserError, match="norm_eps"):
        config_fields(find("deepseek_v3"), v3.replace(attention=v3.attention.replace(norm_eps=1e-5)), None)
