"""MoestroForCausalLM does what transformers' causal language models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

import moestro
from convert.hf_models import V, decoder, model, tokens
from moestro import convert
from moestro.convert.hf import MoestroConfig, MoestroForCausalLM
from moestro.core.errors import RecomputationError, UserError
from moestro.serve.generate import generate


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_round_trip_is_exact(tmp_path: Path, tied: bool) -> None:
    made = model(tied=tied)
    made.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "moestro"
    assert data["architectures"] == ["MoestroForCausalLM"]
    assert data["model"] == decoder(tied=tied).to_dict()
    assert "vocab_size" not in data
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens(2, 9)
    assert type(again) is MoestroForCausalLM
    assert list(again.state_dict()) == list(made.state_dict())
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(again(ids).logits, made(ids).logits)
    ours = convert.load(tmp_path).model
    assert torch.equal(ours(ids)[0], made(ids).logits)
    convert.save(made.model, tmp_path / "ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(back(ids).logits, made(ids).logits)


def test_loading_in_bf16_is_the_models_own_cast(tmp_path: Path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    want = made.to(torch.bfloat16)
    assert half.model.layers[0].ffn.router.select.bias.dtype == torch.float32
    assert half.model.layers[0].mixer.positions.frequency.dtype == torch.float32
    for name, tensor in want.state_dict().items():
        assert tensor.dtype == half.state_dict()[name].dtype, name
        assert torch.equal(tensor, half.state_dict()[name]), name
    ids = tokens(2, 9)
    assert torch.equal(want(ids).logits, half(ids).logits)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.ffn.experts.down"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model.layers.1.ffn.experts.down"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_answers_what_transformers_asks() -> None:
    config = MoestroConfig(model=decoder())
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (V, 16, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.max_position_embeddings == 48
    assert config.get_text_config(decoder=True) is config
    assert config.decoder_config() == decoder()
    assert type(AutoConfig.for_model("moestro", model=decoder().to_dict())) is MoestroConfig
    with pytest.raises(UserError, match="hidden_size is 5"):
        MoestroConfig(model=decoder(), hidden_size=5)
    with pytest.raises(UserError, match="config.json: model"):
        MoestroConfig(model={"dimm": 3})


def test_greedy_generation_equals_ours_also_up_to_the_context() -> None:
    made, ids = model(), tokens(5)
    new = made.generate(ids[None], max_new_tokens=500, do_sample=False)[0, 5:]
    want = generate(made.model, ids, 500)
    assert want.reason == "context"
    assert new.tolist() == want.tokens.tolist()


def test_left_padded_prompts_generate_as_alone() -> None:
    made, long, short = model(), tokens(7), tokens(4, seed=1)
    ids = torch.stack([long, F.pad(short, (3, 0))])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    new = made.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)[:, 7:]
    for row, prompt in zip(new, (long, short)):
        assert row.tolist() == generate(made.model, prompt, 9).tokens.tolist()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_reorder_the_cache(options: dict[str, Any]) -> None:
    made, ids = model(), tokens(2, 6)
    said = {"max_new_tokens": 8, "do_sample": False, **options}
    assert torch.equal(made.generate(ids, **said), made.generate(ids, use_cache=False, **said))


def test_sampling_repeats_with_the_seed_and_needs_no_cache() -> None:
    from transformers import set_seed

    made, ids, texts = model(), tokens(2, 6), []
    for use_cache in (True, True, False):
        set_seed(3)
        texts.append(made.generate(ids, max_new_tokens=8, do_sample=True, use_cache=use_cache))
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(
        made.generate(ids, max_new_tokens=8, do_sample=True, top_k=1), made.generate(ids, max_new_tokens=8)
    )


def test_prompt_lookup_crops_the_cache() -> None:
    made, ids = model(), tokens(3).repeat(3)[None]
    want = made.generate(ids, max_new_tokens=10, do_sample=False)
    assert torch.equal(made.generate(ids, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=3), want)


def test_a_loop_of_ones_own_continues_the_cache_past_its_first_room() -> None:
    made, ids = model(context=200), tokens(1, 150)
    with torch.no_grad():
        out, parts = made(ids[:, :30], use_cache=True), []
        parts.append(out.logits)
        for start in range(30, 150, 40):
            out = made(ids[:, start : start + 40], past_key_values=out.past_key_values)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), made(ids).logits)
    with pytest.raises(UserError, match="context of 200"):
        made(tokens(1, 51), past_key_values=out.past_key_values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(side: str) -> None:
    made, ids = model().train(), tokens(1, 6)
    at = (3, 0) if side == "left" else (0, 3)
    mask = F.pad(torch.ones(1, 6, dtype=torch.int64), at)
    real = slice(3, None) if side == "left" else slice(0, 6)
    alone = made(ids, labels=ids)
    padded = made(F.pad(ids, at, value=1), attention_mask=mask, labels=F.pad(ids, at, value=1))
    torch.testing.assert_close(padded.logits[:, real], alone.logits)
    torch.testing.assert_close(padded.loss, alone.loss)
    for key, record in alone.trail.items():
        assert torch.equal(record.demand, padded.trail[key].demand)


def test_packed_sequences_do_not_see_each_other() -> None:
    made, a, b = model(), tokens(1, 5), tokens(1, 4, seed=1)
    places = torch.cat([torch.arange(5), torch.arange(4)])[None]
    packed = made(torch.cat([a, b], 1), position_ids=places).logits
    torch.testing.assert_close(packed, torch.cat([made(a).logits, made(b).logits], 1))


def test_the_loss_is_transformers_and_routing_joins_it_once() -> None:
    made, ids = model(), tokens(3, 9)
    labels = ids.clone()
    labels[0, :6] = -100
    out = made(ids, labels=labels)
    want = F.cross_entropy(out.logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100)
    torch.testing.assert_close(out.loss, want)
    made.train()
    trained = made(ids, labels=labels)
    routing = made.model(ids)[2].loss()
    torch.testing.assert_close(trained.loss, want + routing)
    torch.testing.assert_close(trained.routing_loss, routing)
    # two halves of what Trainer would call one step: targets 3 + 16, weights add up to one
    items = (labels[:, 1:] != -100).sum()
    parts = [made(ids[s], labels=labels[s], num_items_in_batch=items) for s in (slice(0, 1), slice(1, 3))]
    share = [3 / 19, 16 / 19]
    torch.testing.assert_close(sum(p.loss for p in parts), want + sum(w * p.routing_loss for w, p in zip(share, parts)))


def test_without_labels_routing_rides_on_the_logits() -> None:
    made, ids = model().train(), tokens(2, 9)
    made.loss_scale = 0.25

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        made.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in made.parameters()]

    rode = gradients(made(ids).logits.square().mean())
    logits, _, trail = made.model(ids)
    for one, two in zip(rode, gradients(logits.square().mean() + 0.25 * trail.loss())):
        torch.testing.assert_close(one, two)


def test_the_trail_names_modules_of_the_model() -> None:
    made, ids = model(), tokens(2, 5)
    out = made(ids)
    assert [k.path for k in out.trail] == ["model.layers.0.ffn", "model.layers.1.ffn"]
    assert made.get_submodule("model.layers.1.ffn").router is not None
    with torch.no_grad():
        assert made(ids[:, :1], past_key_values=out.past_key_values).trail is None
    states = made(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(made.model.head(states[-1]), out.logits)
    torch.testing.assert_close(made(inputs_embeds=made.get_input_embeddings()(ids)).logits, out.logits)
    torch.testing.assert_close(made(ids, logits_to_keep=2).logits, out.logits[:, -2:])


def test_checkpointing_keeps_routes_and_other_checkpoints_are_told_the_remedy() -> None:
    made, ids = model().train(), tokens(2, 9)

    def gradients() -> list[torch.Tensor]:
        made.zero_grad()
        made(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in made.parameters()]

    plain = gradients()
    made.activation_checkpointing_enable()
    assert made.is_activation_checkpointing
    for one, two in zip(plain, gradients()):
        assert torch.equal(one, two)
    made.activation_checkpointing_disable()
    assert not made.model.config.checkpoint
    made.activation_checkpointing_enable({"use_reentrant": False, "context_fn": moestro.checkpoint_context})
    with pytest.raises(UserError, match="without reentrant mode"):
        made.activation_checkpointing_enable({"use_reentrant": True})
    made.activation_checkpointing_disable()
    from torch.utils.checkpoint import checkpoint

    def foreign() -> torch.Tensor:
        return checkpoint(lambda x: made(x, labels=x).loss, ids, use_reentrant=False)

    with pytest.raises(RecomputationError, match="checkpoint_context"):
        foreign().backward()


def test_wrong_calls_say_what_to_do() -> None:
    made, ids = model(), tokens(2, 5)
    for call, said in (
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 5, 16)}, "either"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 5, 5)}, "one entry per token"),
        ({"input_ids": ids, "output_attentions": True}, "attention maps"),
        ({"input_ids": ids, "past_key_values": ((),)}, "cannot hold"),
        ({"input_ids": ids, "labels": ids, "logits_to_keep": 1}, "one label per token"),
        ({"input_ids": tokens(1, 49)}, "context of 48"),
    ):
        with pytest.raises(UserError, match=said):
            made(**call)
    with pytest.raises(UserError, match="vocabulary of 37"):
        made.resize_token_embeddings(50)
    with pytest.raises(UserError, match="cache of their own"):
        made.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_text_generation_pipeline(tmp_path: Path) -> None:
    model(vocab_size=256).save_pretrained(tmp_path)
    from moestro.convert.checkpoint.tokenizer import write_tokenizer

    write_tokenizer(tmp_path, "bytes")
    made = pipeline("text-generation", model=str(tmp_path), device="cpu")
    (said,) = made("def ", max_new_tokens=5, do_sample=False)
    assert said["generated_text"].startswith("def ")
