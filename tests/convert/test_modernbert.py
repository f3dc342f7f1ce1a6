"""ModernBERT against transformers' own, and the layout of brief 34's second generation against a float64 reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro import convert
from moestro.convert.config import Copy
from moestro.convert.families import find, recognised
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models.config import Encoder, Headed
from moestro.testing.compare import assert_close

B, S = 3, 17
TOKENS = torch.randint(3, 41, (B, S), generator=torch.Generator().manual_seed(0))
VALID = torch.arange(S)[None] < torch.tensor([17, 9, 1])[:, None]


def theirs(name: str = "odd", kind: str = "ModernBertModel") -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.ModernBertConfig(**find("modernbert").examples()[name])
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", find("modernbert").examples())
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Windows shorter than the texts, on both sides; rotary bases by kind of layer; no norm before the first block."""
    source = theirs(name)
    source.save_pretrained(tmp_path)
    model = convert.load(tmp_path).model
    for valid in (torch.ones(B, S, dtype=torch.bool), VALID):
        want = source(input_ids=TOKENS, attention_mask=valid.long()).last_hidden_state
        got, _, _ = model(TOKENS, Signals(valid=valid.reshape(-1)))
        assert_close("hidden states", got[valid], want[valid], 1e-5)


@torch.no_grad()
def test_the_head_of_masked_words_is_left_aside(tmp_path: Path) -> None:
    source = theirs("plain", "ModernBertForMaskedLM")
    source.save_pretrained(tmp_path)
    model = convert.load(tmp_path).model
    assert isinstance(model.config, Encoder)
    assert_close("hidden states", model(TOKENS)[0], source.model(TOKENS).last_hidden_state, 1e-5)


def test_older_fields_say_the_same() -> None:
    fields = find("modernbert").examples()["plain"]
    older = {"global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "global_attn_every_n_layers": 3}
    said = convert.read_config(fields | older | {"model_type": "modernbert"})
    assert said == convert.read_config(fields | {"model_type": "modernbert"})
    assert [b.mixer.window for b in said.blocks] == [None, 4, 4, None]


@pytest.mark.parametrize(
    ("field", "value"),
    [("mlp_bias", True), ("hidden_activation", "swish?"), ("layer_types", ["full_attention"]), ("hidden_size", "24"),
     ("rope_parameters", {"full_attention": {"rope_type": "yarn"}})],
)  # fmt: skip
def test_fields_that_cannot_be_expressed_are_named(field: str, value: Any) -> None:
    data = {"model_type": "modernbert", **find("modernbert").examples()["plain"], field: value}
    with pytest.raises(UserError, match=field):
        convert.read_config(data)


# Dense into experts -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_leave_outputs_equal_for_any_assignment(tmp_path: Path) -> None:
    """Brief 34: identical to the dense model for any assignment, before training; to the last bit of the products."""
    theirs("plain").save_pretrained(tmp_path)
    dense = convert.load(tmp_path).model
    moe, receipt = Copy(num_experts=3, top_k=1, router="label").build(dense, text=TOKENS)
    assert receipt.bound == 0.0
    assert not any("router" in name for name in receipt.invented)
    want = dense(TOKENS)[0]
    for seed in range(3):
        label = torch.randint(0, 3, (B, 1), generator=torch.Generator().manual_seed(seed)).expand(B, S)
        got, _, trail = moe(TOKENS, Signals(label=label.reshape(-1)))
        assert_close("outputs", got, want, 1e-6)
        loads = [record.load.tolist() for record in trail.values()]
        assert loads == [torch.bincount(label.reshape(-1), minlength=3).tolist()] * 4


# The authors' layout ------------------------------------------------------------------------------------------------

SAID = {**find("modernbert_moe").examples()["experts"], "model_type": "modernbert"}
D, F, H, E, L = 24, 20, 4, 3, 4


def tensors(num_experts: int = E) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    out = {"bert.embeddings.tok_embeddings.weight": draw(41, D)}
    norms = ["bert.embeddings.norm", "bert.final_norm", "pooler.layernorm"]
    for i in range(L):
        at = f"bert.layers.{i}."
        norms += [f"{at}mlp_norm"] + ([f"{at}attn_norm"] if i else [])
        out |= {f"{at}attn.Wqkv.weight": draw(3 * D, D), f"{at}attn.Wo.weight": draw(D, D)}
        for mlp in [f"mlp.experts.{e}" for e in range(num_experts)] if num_experts > 1 else ["mlp"]:
            out |= {f"{at}{mlp}.Wi.weight": draw(2 * F, D), f"{at}{mlp}.Wo.weight": draw(D, F)}
    out |= {f"{name}.weight": 1 + draw(D) for name in norms}
    out["pooler.layernorm.bias"] = draw(D)
    for name in ("w1", "w2"):
        out |= {f"pooler.{name}.weight": draw(D, D), f"pooler.{name}.bias": draw(D)}
    return out


def folder(path: Path, changed: dict[str, Tensor] | None = None, **said: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(SAID | said))
    save_file(tensors() if changed is None else changed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def norm(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias


def turned(x: Tensor, base: float) -> Tensor:
    """x [S, d] with entries i and i + d/2 turned by place * base^(-2i/d)."""
    d = x.shape[1]
    angle = torch.arange(len(x)).double()[:, None] * base ** (-torch.arange(0, d, 2).double() / d)
    a, b = x[:, : d // 2], x[:, d // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)


def reference(t: dict[str, Tensor], tokens: Tensor, expert: int) -> Tensor:
    """One text [S] without padding -> its embedding [D], step by step as brief 34 describes G2, in float64."""
    t = {name: value.double() for name, value in t.items()}
    h = norm(t["bert.embeddings.tok_embeddings.weight"][tokens], t["bert.embeddings.norm.weight"])
    place = torch.arange(len(tokens))
    for i in range(L):
        at = f"bert.layers.{i}."
        x = h if i == 0 else norm(h, t[f"{at}attn_norm.weight"])
        q, k, v = (x @ t[f"{at}attn.Wqkv.weight"].T).split(D, 1)
        heads, size = [], D // H
        for n in range(H):
            part = slice(n * size, (n + 1) * size)
            base = 10_000.0 if i % 3 else 160_000.0
            score = turned(q[:, part], base) @ turned(k[:, part], base).T / math.sqrt(size)
            if i % 3:  # local_attention 6: three on each side
                score = score.masked_fill((place[:, None] - place).abs() > 3, -math.inf)
            heads.append(score.softmax(-1) @ v[:, part])
        h = h + torch.cat(heads, 1) @ t[f"{at}attn.Wo.weight"].T
        wi, wo = (t[f"{at}mlp.experts.{expert}.{n}.weight"] for n in ("Wi", "Wo"))
        put, gate = (norm(h, t[f"{at}mlp_norm.weight"]) @ wi.T).chunk(2, 1)
        h = h + (put * 0.5 * (1 + torch.erf(put / math.sqrt(2))) * gate) @ wo.T
    pooled = norm(h, t["bert.final_norm.weight"]).mean(0)
    y = norm(pooled, t["pooler.layernorm.weight"], t["pooler.layernorm.bias"])
    y = torch.tanh(t["pooler.w1.weight"] @ y + t["pooler.w1.bias"])
    return t["pooler.w2.weight"] @ y + t["pooler.w2.bias"]


@torch.no_grad()
def test_embeddings_are_those_of_the_authors_layout(tmp_path: Path) -> None:
    model = convert.load(folder(tmp_path)).model.double()
    domain = torch.tensor([2, 0, 1])
    label = domain[:, None].expand(B, S).reshape(-1)
    got, _, _ = model(TOKENS, Signals(valid=VALID.reshape(-1), label=label))
    want = [reference(tensors(), TOKENS[b][VALID[b]], int(domain[b])) for b in range(B)]
    assert_close("embeddings", got, torch.stack(want), 1e-6)  # rotary angles are fp32


def test_there_and_back_in_the_authors_keys(tmp_path: Path) -> None:
    for name, count in (("experts", E), ("dense", 1)):
        said = find("modernbert_moe").examples()[name]
        loaded = convert.load(folder(tmp_path / name, tensors(count), **said))
        assert isinstance(loaded.config, Headed)
        out = convert.save(loaded.model, tmp_path / f"{name} again", to="modernbert_moe")
        before, after = (load_file(f / "model.safetensors") for f in (tmp_path / name, out))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert convert.read_config(out) == loaded.config
    assert recognised({"model_type": "modernbert"}).model_type == "modernbert"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("bert.layers.2.mlp.experts.1.Wo.weight"), r"missing bert\.layers\.2\.mlp\.experts\.1\.Wo"),
        (lambda t: t.update({"pooler.w3.weight": torch.zeros(2)}), r"left over pooler\.w3"),
        (
            lambda t: t.update({"bert.layers.0.attn_norm.weight": torch.ones(D)}),
            r"left over bert\.layers\.0\.attn_norm",
        ),
        (lambda t: t.update({"pooler.w1.bias": torch.zeros(5)}), r"another shape pooler\.w1\.bias"),
    ],
)
def test_keys_that_do_not_fit_are_one_clear_error(change: Any, says: str, tmp_path: Path) -> None:
    found = tensors()
    change(found)
    with pytest.raises(UserError, match=says):
        convert.load(folder(tmp_path, found))
