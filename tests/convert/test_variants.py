"""What only GPT-OSS, Granite-MoE and Phi-MoE have: formats, scales, stretched positions. (Logits: `test_families`.)"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from moestro import convert
from moestro.convert.checkpoint.mxfp4 import Dequantised, dequantise
from moestro.convert.checkpoint.tensors import DictTensors
from moestro.convert.families import find
from moestro.core.errors import UserError
from moestro.serve.generate import generate
from moestro.serve.weights import pack_model
from moestro.testing.compare import assert_close

FAMILIES = ("gpt_oss", "granitemoe", "granitemoeshared", "phimoe")
CASES = [(f, e) for f in FAMILIES for e in find(f).examples()]
TOKENS = torch.randint(0, 41, (2, 17), generator=torch.Generator().manual_seed(3))


def theirs(family: str, fields: dict[str, Any]) -> Any:
    """A transformers model with random weights, norms and biases too."""
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(family, **{"pad_token_id": None, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def files(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in safetensors.torch.load_file(file).items()}


@pytest.mark.parametrize(("family", "example"), CASES)
def test_loss_and_generation(family: str, example: str, tmp_path: Path) -> None:
    """The chunked loss and generation honour heads' biases and the scale of logits."""
    model = theirs(family, find(family).examples()[example])
    model.save_pretrained(tmp_path)
    ours = convert.load(tmp_path).model
    with torch.no_grad():
        nats, count, _, _ = ours.loss(TOKENS[:, :-1], TOKENS[:, 1:])
        logits = model(TOKENS[:, :-1]).logits
        want = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
        assert_close("loss", nats / count, want / count, 1e-5)
        written = model.generate(TOKENS[:1, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 6:]
    assert generate(ours, TOKENS[0, :6], 6).tokens.tolist() == written.tolist()


def test_norms_may_stay_in_fp32(tmp_path: Path) -> None:
    """As transformers keeps them in GPT-OSS: both dtypes are read, used and written."""
    model = theirs("gpt_oss", find("gpt_oss").examples()["plain"]).to(torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    model.save_pretrained(tmp_path / "theirs")
    loaded = convert.load(tmp_path / "theirs")
    with torch.no_grad():
        assert loaded.model(TOKENS)[0].isfinite().all()  # mixed dtypes run; how far bf16 is off depends on the weights
        wide = convert.load(tmp_path / "theirs", dtype=torch.float32).model(TOKENS)[0]
        again = type(model).from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
        assert_close("logits", wide, again(TOKENS).logits, 1e-5)
    convert.save(loaded.model, tmp_path / "ours", to="gpt_oss", source=loaded)
    before, after = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert {t.dtype for t in before.values()} == {torch.bfloat16, torch.float32}
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize(("family", "example"), CASES)
def test_configs_are_written_from_nothing(family: str, example: str) -> None:
    """Without the config.json that a model came from, its function is written whole."""
    made = find(family)
    config = convert.read_config(made.examples()[example] | {"model_type": family})
    again = convert.read_config({**json.loads(json.dumps(made.write(config))), "model_type": family})
    assert again == config


GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "vocab_size": 201_088}
PHI = {"model_type": "phimoe", "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_064}
SIZES = [  # the models' own figures: all parameters, and those of a token without the input embedding
    (GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128, "sliding_window": 128}, 116.83e9, 5.13e9),
    (GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32, "sliding_window": 128}, 20.91e9, 3.61e9),
    (PHI | {"hidden_size": 4096, "attention_bias": True, "lm_head_bias": True}, 41.9e9, 6.5e9),
]


@pytest.mark.parametrize(("fields", "total", "active"), SIZES)
def test_published_sizes(fields: dict[str, Any], total: float, active: float) -> None:
    config = convert.read_config({**fields, "max_position_embeddings": 131_072})
    assert config.num_params() == pytest.approx(total, rel=1e-3)
    assert config.num_active_params() - config.vocab_size * config.dim == pytest.approx(active, rel=2e-3)


def test_packed_weights_leave_what_they_do_not_know() -> None:
    """Clamped experts stay as they are and say why; a head's bias and the logits' scale are kept."""
    for family, example in (("gpt_oss", "plain"), ("phimoe", "longrope"), ("granitemoe", "multipliers")):
        config = convert.read_config(find(family).examples()[example] | {"model_type": family})
        model = config.build().eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
            want = model(TOKENS)[0]
            packing = pack_model(model, "bf16")
            assert_close(family, model(TOKENS)[0], want, 0.1)
        if family == "gpt_oss":
            assert packing.kept == {
                f"layers.{i}.ffn.experts": "ClampedGatedBank is no stacked bank of MLP experts" for i in range(3)
            }


# MXFP4 ----------------------------------------------------------------------------------------------------------------


def quantised(E: int, O: int, I: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (E, O, I // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 127, (E, O, I // 32), dtype=torch.uint8, generator=generator)


def test_mxfp4_by_hand() -> None:
    """0x2f: first the low half, 1111 = -6, then 0010 = 1; the scale 128 doubles them."""
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, :4] = torch.tensor([0x2F, 0x10, 0x98, 0x76])
    got = dequantise(blocks, torch.tensor([128], dtype=torch.uint8), torch.float32)
    assert got[:8].tolist() == [-12.0, 2.0, 0.0, 1.0, -0.0, -1.0, 8.0, 12.0]
    for exponent, scale in ((0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (250, 2.0**123)):
        got = dequantise(blocks, torch.tensor([exponent], dtype=torch.uint8), torch.float32)
        assert float(got[1].double()) == scale
    assert bool(dequantise(blocks, torch.tensor([255], dtype=torch.uint8)).isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_equals_transformers(dtype: torch.dtype) -> None:
    module = importlib.import_module("transformers.integrations.mxfp4")
    blocks, scales = quantised(3, 10, 64, 0)
    scales[0, :, 0] = torch.arange(10, dtype=torch.uint8) * 20 + 20
    want = module._convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # transposed, as its modules have it
    assert torch.equal(dequantise(blocks, scales, dtype).transpose(1, 2), want)
    view = Dequantised(DictTensors({"w_blocks": blocks, "w_scales": scales, "b": torch.zeros(2)}))
    assert set(view.entries()) == {"w", "b"}
    assert torch.equal(view.read("w"), want.to(torch.bfloat16))
    assert torch.equal(view.read_box("w", ((1, 3), (3, 40), (0, 7))), want.to(torch.bfloat16)[1:3, 3:40, :7])
    assert torch.equal(view.read("b"), torch.zeros(2))


def quantise(folder: Path, change: Any = None) -> dict[str, Tensor]:
    """Make a GPT-OSS checkpoint as it was released, in place; what it stands for is returned."""
    tensors = {k: v.to(torch.bfloat16) for k, v in files(folder).items()}
    plain = dict(tensors)
    for seed, name in enumerate([n for n in tensors if n.endswith("_proj") and "experts" in n]):
        E, I, O = tensors.pop(name).shape
        blocks, scales = quantised(E, O, I, seed)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = dequantise(blocks, scales).transpose(1, 2).contiguous()
    if change is not None:
        change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return plain


WIDE = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}


def test_a_quantised_checkpoint(tmp_path: Path) -> None:
    fields = find("gpt_oss").examples()["plain"] | WIDE
    model = theirs("gpt_oss", fields)
    model.save_pretrained(tmp_path / "theirs")
    plain = quantise(tmp_path / "theirs")
    loaded = convert.load(tmp_path / "theirs", dtype=torch.float32)
    model.load_state_dict({k: v.float() for k, v in plain.items()})
    with torch.no_grad():
        assert_close("logits", loaded.model(TOKENS)[0], model(TOKENS).logits, 1e-5)
    convert.stream(tmp_path / "theirs", tmp_path / "plain", to="gpt_oss")
    out = files(tmp_path / "plain")
    assert out.keys() == plain.keys()
    assert all(torch.equal(out[n], t) for n, t in plain.items())
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "down_proj_blocks: there is no"),
        (lambda t: t["model.layers.1.mlp.experts.down_proj_scales"].fill_(255), "NaN or infinite"),
        (
            lambda t: t.update({n: v[..., :8].contiguous() for n, v in t.items() if n.endswith("_blocks")}),
            "are no MXFP4 blocks",
        ),
    ],
)
def test_damaged_blocks(change: Any, message: str, tmp_path: Path) -> None:
    model = theirs("gpt_oss", find("gpt_oss").examples()["plain"] | WIDE)
    model.save_pretrained(tmp_path / "theirs")
    quantise(tmp_path / "theirs", change)
    with pytest.raises(UserError, match=message):
        convert.load(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act: 'gelu' cannot be expressed"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types: expected 3 of"),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' cannot be read"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok: 3 cannot be expressed"),
        ("phimoe", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "short_factor: is missing"),
        ("granitemoe", {"quantization_config": {"quant_method": "mxfp4"}}, "quantised weights of this family"),
    ],
)
def test_fields_that_cannot_be_read(family: str, changes: dict[str, Any], message: str) -> None:
    fields = next(iter(find(family).examples().values()))
    with pytest.raises(UserError, match=message):
        convert.read_config({**fields, "model_type": family, **changes})


def test_longrope_beyond_the_original_context() -> None:
    """The long factors are used there. (transformers' Phi-MoE has its long_mscale but the short factors.)"""
    rope = importlib.import_module("transformers.modeling_rope_utils")
    transformers = importlib.import_module("transformers")
    fields = find("phimoe").examples()["longrope"]
    rotary = convert.read_config(fields | {"model_type": "phimoe"}).attention.positions.build(6)
    config = transformers.AutoConfig.for_model("phimoe", **fields)
    for length in (48, 49):
        want, _ = rope._compute_longrope_parameters(config, "cpu", seq_len=length)
        got = rotary.long_frequency if length > 48 else rotary.frequency
        assert_close(f"{length} tokens", got, want, 1e-6)
        x = torch.randn(1, length, 1, 6)
        angle = torch.arange(length)[:, None, None] * want
        first, second = x.chunk(2, dim=-1)
        scale = 1.3 if length > 48 else 1.2
        turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
        assert_close(f"{length} tokens, turned", rotary(x, x, None)[0], scale * turned, 1e-5)
