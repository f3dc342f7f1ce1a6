"""Checkpoints in the layout of Dynamic_MoE (21), drawn at random in the authors' keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.reference_cases import draw, llama_like, swiglu
from moestro import convert
from moestro.convert.families import find, recognised
from moestro.core.errors import UserError
from moestro.models.config import Decoder
from moestro.routers.config import TopP
from moestro.testing.compare import assert_close

EXAMPLES = find("dynamic_moe").examples()
TOKENS = torch.randint(0, 41, (13,), generator=torch.Generator().manual_seed(1))


def config_json(name: str, **changes: Any) -> dict[str, Any]:
    said = {"architectures": ["MoEForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "use_cache": True}
    return {**said, **EXAMPLES[name], "auto_map": {"AutoModelForCausalLM": "modeling_moe.MoEForCausalLM"}, **changes}


def tensors_of(fields: dict[str, Any]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    d, f, v = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    made = {"model.embed_tokens.weight": draw(g, v, d), "lm_head.weight": draw(g, v, d)}
    made["model.norm.weight"] = draw(g, d, around=1.0)
    for i in range(fields["num_hidden_layers"]):
        at = f"model.layers.{i}."
        made |= {f"{at}self_attn.{n}_proj.weight": draw(g, d, d) for n in "qkvo"}
        made[f"{at}self_attn.rotary_emb.inv_freq"] = 10_000.0 ** -(torch.arange(3) / 3)
        made |= {f"{at}{n}.weight": draw(g, d, around=1.0) for n in ("input_norm", "post_attention_norm")}
        parts = [f"{at}mlp.mlp."]
        if i % fields["expert_frequency"] == 0:
            made[f"{at}mlp.router.weight"] = draw(g, fields["num_experts"], d)
            parts = [f"{at}mlp.experts.{e}." for e in range(fields["num_experts"])]
        for part in parts:
            made |= {f"{part}{n}_proj.weight": draw(g, f, d) for n in ("gate", "up")}
            made[f"{part}down_proj.weight"] = draw(g, d, f)
    return made


def write(folder: Path, name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder.mkdir(exist_ok=True)
    fields = config_json(name, **changes)
    tensors = tensors_of(fields)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return fields, tensors


def feed(p: float, taken: list[int]) -> Any:
    """The feed-forward layer of the paper's equations 3 to 6, token by token."""

    def one(w: dict[str, Tensor], x: Tensor, part: str) -> Tensor:
        return swiglu(x, *(w[f"{part}{n}_proj.weight"] for n in ("gate", "up", "down")))

    def run(w: dict[str, Tensor], layer: int, x: Tensor) -> Tensor:
        at = f"model.layers.{layer}.mlp."
        if f"{at}router.weight" not in w:
            return one(w, x, f"{at}mlp.")
        out = []
        for row in x:
            probs = torch.softmax(w[f"{at}router.weight"] @ row, dim=0)
            total, y = 0.0, torch.zeros_like(row)
            count = 0
            for e in sorted(range(len(probs)), key=lambda e: -float(probs[e])):
                count += 1
                y = y + probs[e] * one(w, row, f"{at}experts.{e}.")
                total += float(probs[e])
                if total > p:
                    break
            taken.append(count)
            out.append(y)
        return torch.stack(out)

    return run


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_logits_are_those_of_the_equations_in_float64(tmp_path: Path, name: str) -> None:
    fields, tensors = write(tmp_path, name)
    taken: list[int] = []
    want = llama_like(
        tensors,
        TOKENS,
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        eps=fields["rms_norm_eps"],
        norms=("input_norm", "post_attention_norm"),
        ffn=feed(fields["top_p_threshold"], taken),
    )
    loaded = convert.load(tmp_path, dtype=torch.float64)
    logits, _, trail = loaded.model(TOKENS[None])
    assert_close("logits", logits[0], want, 1e-6)  # the library keeps rotations in single precision
    chosen = [int(n) for plan in trail.plans().values() for n in (plan.expert >= 0).sum(1)]
    assert chosen == taken
    assert len(set(taken)) > 1, "the example should not take equally many everywhere"


@pytest.mark.parametrize("name", EXAMPLES)
def test_there_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """All but the buffers that follow from the config."""
    fields, tensors = write(tmp_path / "in", name)
    loaded = convert.load(tmp_path / "in")
    for out, source in (("kept", loaded), ("bare", None)):
        convert.save(loaded.model, tmp_path / out, to="dynamic_moe", source=source)
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == {n for n in tensors if "inv_freq" not in n}
        assert all(torch.equal(found[n], tensors[n]) for n in found)
        said = json.loads((tmp_path / out / "config.json").read_text())
        assert (said["model_type"], said["architectures"]) == ("llama", ["MoEForCausalLM"])
        assert {n: said[n] for n in ("num_experts", "expert_frequency", "top_p_threshold")} == {
            n: fields[n] for n in ("num_experts", "expert_frequency", "top_p_threshold")
        }
        assert "auto_map" not in said
        assert convert.read_config(tmp_path / out) == loaded.config
    convert.stream(tmp_path / "in", tmp_path / "own", to="moestro")
    convert.stream(tmp_path / "own", tmp_path / "back", to="dynamic_moe")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[n], t) for n, t in tensors.items() if "inv_freq" not in n)


def test_it_is_known_by_its_own_fields_and_no_llama_is_taken_for_it() -> None:
    assert recognised(config_json("every layer")).model_type == "dynamic_moe"
    for own in ("top_p_threshold", "expert_frequency"):
        assert recognised({"model_type": "llama", own: 1}).model_type == "dynamic_moe"
    plain = {"model_type": "llama", **find("llama").examples()["plain"]}
    assert recognised(plain).model_type == "llama"
    assert recognised({**plain, "num_experts": 4}).model_type == "llama"
    stripped = config_json("every layer")
    del stripped["top_p_threshold"], stripped["expert_frequency"]
    with pytest.raises(UserError, match="MoEForCausalLM"):
        convert.read_config(stripped)  # its architecture is not Llama's either
    with pytest.raises(UserError, match="unknown model_type"):
        convert.read_config({"model_type": "llamas", "top_p_threshold": 0.4})


def test_a_llama_saved_from_it_is_a_llama(tmp_path: Path) -> None:
    """The config.json that a model came from is not kept for a family of the same `model_type`."""
    write(tmp_path / "in", "every layer")
    loaded = convert.load(tmp_path / "in")
    with pytest.raises(UserError, match="cannot be written as llama"):
        convert.save(loaded.model, tmp_path / "out", to="llama", source=loaded)
    dense = Decoder(vocab_size=41, dim=24, num_layers=1).build()
    convert.save(dense, tmp_path / "dense", to="llama", source=loaded)
    said = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"top_p_threshold", "expert_frequency", "num_experts"} & said.keys()
    assert convert.read_config(tmp_path / "dense").moe is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_experts": -1}, "num_experts"),
        ({"expert_frequency": 0}, "expert_frequency"),
        ({"rope_theta": 5e5}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_fields_that_cannot_be_expressed_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        convert.read_config(config_json("every layer", **changes))


def test_missing_left_over_and_misshaped_tensors_are_one_error(tmp_path: Path) -> None:
    _, tensors = write(tmp_path, "every second layer")
    del tensors["model.layers.0.mlp.router.weight"]
    tensors["model.layers.1.mlp.router.weight"] = torch.zeros(6, 24)  # a dense layer
    tensors["model.norm.weight"] = torch.zeros(23)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        convert.load(tmp_path)
    for part in ("missing model.layers.0.mlp.router", "left over model.layers.1.mlp.router", "model.norm.weight ([23]"):
        assert part in str(error.value)


def test_models_that_it_cannot_hold_are_refused(tmp_path: Path) -> None:
    config = convert.read_config(config_json("every layer"))
    router = config.moe.router
    for changed, says in (
        (config.replace(layout=("dense", "moe", "moe")), "layout"),
        (config.replace(moe=config.moe.replace(router=router.replace(select=TopP(max_k=2)))), "max_k"),
        (config.replace(moe=None, layout=None), "no block has a MoELayer"),
    ):
        with pytest.raises(UserError, match=rf"cannot be written as dynamic_moe.*({says}|blocks)"):
            convert.save(changed.build(), tmp_path / "out", to="dynamic_moe")
    told = router.replace(select=TopP(p=0.4, expected=1.8))  # counting alone changes
    convert.save(config.replace(moe=config.moe.replace(router=told)).build(), tmp_path / "told", to="dynamic_moe")
    assert convert.read_config(tmp_path / "told") == config
