"""THOR's checkpoints (brief 02): fairseq's keys, against a forward pass in float64 that knows nothing of ours."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro import convert
from moestro.convert.families import find
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.testing.compare import assert_close

EXAMPLES = find("thor").examples()
B, N, S = 3, 7, 5
SOURCE, TARGET = (torch.randint(3, 19, (B, n), generator=torch.Generator().manual_seed(n)) for n in (N, S))
VALID = torch.arange(N) < torch.tensor([7, 4, 6])[:, None]


def tensors_of(fields: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors in the authors' keys."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.4

    made: dict[str, Tensor] = {}

    def linear(name: str, out: int, inner: int) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = draw(out, inner), draw(out)

    for side in ("encoder", "decoder"):
        d, f = fields[f"{side}_embed_dim"], fields[f"{side}_ffn_embed_dim"]
        sizes = {"encoder": fields.get("source_vocab_size", fields["vocab_size"]), "decoder": fields["vocab_size"]}
        made[f"{side}.version"] = torch.tensor([3.0])
        made[f"{side}.embed_positions._float_tensor"] = torch.zeros(1)
        made[f"{side}.embed_tokens.weight"] = draw(sizes[side], d)
        for i in range(fields[f"{side}_layers"]):
            at = f"{side}.layers.{i}"
            kinds = {"self_attn": d} | ({"encoder_attn": fields["encoder_embed_dim"]} if side == "decoder" else {})
            for kind, seen in kinds.items():
                for name in "kvqo":
                    place = "out_proj" if name == "o" else f"{name}_proj"
                    linear(f"{at}.{kind}.{place}", d, seen if name in "kv" else d)
            for kind in (*kinds, "final"):
                name = f"{at}.{kind}_layer_norm" if kind != "final" else f"{at}.final_layer_norm"
                made[f"{name}.weight"], made[f"{name}.bias"] = 1 + draw(d), draw(d)
            for e in range(fields["num_experts"]) if i % 2 == 0 else ("",):
                suffix = f".{e}" if i % 2 == 0 else ""
                linear(f"{at}.fc1{suffix}", f, d)
                linear(f"{at}.fc2{suffix}", d, f)
    if fields["share_all_embeddings"]:
        made["encoder.embed_tokens.weight"] = made["decoder.embed_tokens.weight"].clone()
    tied = fields["share_all_embeddings"] or fields.get("share_decoder_input_output_embed", False)
    head = made["decoder.embed_tokens.weight"]
    made["decoder.output_projection.weight"] = head.clone() if tied else draw(*head.shape)
    return made


def written(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "thor", **fields}))
    save_file(tensors, folder / "model.safetensors")
    return folder


# The reference ------------------------------------------------------------------------------------------------------


class Reference:
    """The Transformer of Vaswani et al. as fairseq has it, one token and one head at a time, in float64.

    expert(path, b, t) -> weights [E] of the experts for a token, of layers such as "encoder.layers.0".
    """

    def __init__(self, tensors: dict[str, Tensor], fields: dict[str, Any], expert: Any) -> None:
        self.p = {name: t.double() for name, t in tensors.items()}
        self.fields, self.expert = fields, expert
        self.act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu}[fields.get("activation_fn", "relu")]

    def map(self, name: str, x: Tensor) -> Tensor:
        return self.p[f"{name}.weight"] @ x + self.p[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5) * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def embed(self, side: str, ids: list[int]) -> list[Tensor]:
        d = self.fields[f"{side}_embed_dim"]
        half = d // 2
        rate = [math.exp(-math.log(10000) / (half - 1) * i) for i in range(half)]
        made = []
        for t, token in enumerate(ids):
            place = t + 2  # behind the padding token, 1
            waves = [math.sin(place * r) for r in rate] + [math.cos(place * r) for r in rate]
            row = self.p[f"{side}.embed_tokens.weight"][token]
            made.append(row * math.sqrt(d) + torch.tensor(waves, dtype=torch.float64))
        return made

    def attend(self, name: str, heads: int, x: Tensor, seen: list[Tensor]) -> Tensor:
        q = self.map(f"{name}.q_proj", x).chunk(heads)
        k = [self.map(f"{name}.k_proj", u).chunk(heads) for u in seen]
        v = [self.map(f"{name}.v_proj", u).chunk(heads) for u in seen]
        parts = []
        for h in range(heads):
            weight = torch.stack([q[h] @ key[h] / math.sqrt(len(q[h])) for key in k]).softmax(0)
            parts.append(sum(w * value[h] for w, value in zip(weight, v)))
        return self.map(f"{name}.out_proj", torch.cat(parts))  # type: ignore[arg-type]

    def feed(self, at: str, i: int, x: Tensor, b: int, t: int) -> Tensor:
        if i % 2:
            return self.map(f"{at}.fc2", self.act(self.map(f"{at}.fc1", x)))
        weight = self.expert(at, b, t)
        each = [self.map(f"{at}.fc2.{e}", self.act(self.map(f"{at}.fc1.{e}", x))) for e in range(len(weight))]
        return sum(float(w) * y for w, y in zip(weight, each))  # type: ignore[return-value]

    def side(self, side: str, ids: list[int], b: int, memory: list[Tensor] | None = None) -> list[Tensor]:
        x, heads = self.embed(side, ids), self.fields[f"{side}_attention_heads"]
        for i in range(self.fields[f"{side}_layers"]):
            at = f"{side}.layers.{i}"
            before = x
            x = []
            for t, h in enumerate(before):
                seen = before if memory is None else before[: t + 1]
                h = self.norm(f"{at}.self_attn_layer_norm", h + self.attend(f"{at}.self_attn", heads, h, seen))
                if memory is not None:
                    looked = self.attend(f"{at}.encoder_attn", heads, h, memory)
                    h = self.norm(f"{at}.encoder_attn_layer_norm", h + looked)
                x.append(self.norm(f"{at}.final_layer_norm", h + self.feed(at, i, h, b, t)))
        return x

    def __call__(self) -> Tensor:
        rows = []
        for b in range(B):
            memory = self.side("encoder", SOURCE[b, VALID[b]].tolist(), b)
            said = self.side("decoder", TARGET[b].tolist(), b, memory)
            rows.append(torch.stack([self.p["decoder.output_projection.weight"] @ h for h in said]))
        return torch.stack(rows)


# Tests --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
@torch.no_grad()
def test_logits_are_those_of_the_authors_layout(name: str, tmp_path: Path) -> None:
    """Brief 02, state_dict keys: with every expert forced in all layers, with their mean, and with drawn ones."""
    fields = EXAMPLES[name]
    tensors, E = tensors_of(fields), fields["num_experts"]
    model = convert.load(written(tmp_path, fields, tensors)).model.double()
    valid = Signals(valid=VALID.reshape(-1))
    for wanted in ("all", E - 1):
        knobs = {"experts": wanted}
        got, _, _ = model(SOURCE, TARGET, Signals(knobs=knobs), None, Signals(valid=VALID.reshape(-1), knobs=knobs))
        weights = [1 / E] * E if wanted == "all" else [0.0] * (E - 1) + [1.0]
        want = Reference(tensors, fields, lambda at, b, t, w=weights: w)()
        assert_close(f"experts {wanted}", got, want, 1e-9)
    got, _, trail = model(SOURCE, TARGET, Signals(seed=4), None, valid)
    drawn = {key.path.removesuffix(".ffn"): record.plan.expert[:, 0] for key, record in trail.items()}

    def expert(at: str, b: int, t: int) -> list[float]:
        table = drawn[at].view(B, -1)
        return [float(e == int(table[b, t])) for e in range(E)]

    assert_close("drawn", got, Reference(tensors, fields, expert)(), 1e-9)
    if fields["inference_level"] == 1:
        for at, table in drawn.items():
            for b, row in enumerate(table.view(B, -1)):
                seen = row[VALID[b]] if at.startswith("encoder") else row
                assert len(set(seen.tolist())) == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_there_and_back_in_the_authors_keys(name: str, tmp_path: Path) -> None:
    tensors = tensors_of(EXAMPLES[name])
    loaded = convert.load(written(tmp_path / "in", EXAMPLES[name], tensors))
    out = convert.save(loaded.model, tmp_path / "out", to="thor", source=loaded)
    back = load_file(out / "model.safetensors")
    marks = {key for key in tensors if key.endswith((".version", "._float_tensor"))}
    assert back.keys() == tensors.keys() - marks  # fairseq makes them anew
    assert all(torch.equal(back[key], tensors[key]) for key in back)
    assert convert.load(out).config == loaded.config
    bare = convert.save(loaded.model, tmp_path / "bare", to="thor")  # from our config alone
    assert convert.read_config(bare).replace() == loaded.config
    own = convert.save(loaded.model, tmp_path / "own")
    again = convert.stream(own, tmp_path / "again", to="thor")
    assert all(torch.equal(t, back[key]) for key, t in load_file(again / "model.safetensors").items())


def test_the_released_draw_is_an_option(tmp_path: Path) -> None:
    fields = EXAMPLES["plain"] | {"inference_as_released": True}
    model = convert.load(written(tmp_path, fields, tensors_of(fields))).model
    _, _, trail = model(SOURCE, TARGET, Signals(seed=1))
    for record in trail.values():
        table = record.plan.expert.view(B, -1)
        assert (table == table[:1]).all()  # per position, the same for all sentences
    assert any(len(set(record.plan.expert[:, 0].tolist())) > 1 for record in trail.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("encoder.layers.0.fc1.1.bias"), r"missing encoder\.layers\.0\.fc1\.1\.bias"),
        (lambda t: t.update({"encoder.layers.0.fc1.2.bias": torch.zeros(12)}), r"left over encoder\.layers\.0\.fc1\.2"),
        (lambda t: t.update({"decoder.layers.1.fc1.weight": torch.zeros(3, 8)}), "of another shape decoder"),
        (lambda t: t["encoder.embed_tokens.weight"].add_(1), r"not the copy of decoder\.embed_tokens\.weight"),
        (lambda t: t["decoder.layers.2.fc2.0.bias"].fill_(math.nan), "NaN or infinite decoder"),
    ],
)
def test_tensors_that_do_not_fit_are_one_clear_error(change: Any, says: str, tmp_path: Path) -> None:
    tensors = tensors_of(EXAMPLES["plain"])
    change(tensors)
    with pytest.raises(UserError, match=says):
        convert.load(written(tmp_path, EXAMPLES["plain"], tensors))


@pytest.mark.parametrize(
    ("field", "value"),
    [("encoder_normalize_before", True), ("layernorm_embedding", True), ("inference_level", 2), ("activation_fn", "x")],
)
def test_settings_that_cannot_be_expressed(field: str, value: Any, tmp_path: Path) -> None:
    fields = EXAMPLES["plain"] | {field: value}
    with pytest.raises(UserError, match=f"{field}: .* cannot be expressed"):
        convert.load(written(tmp_path, fields, tensors_of(EXAMPLES["plain"])))


def test_a_model_that_the_layout_cannot_hold(tmp_path: Path) -> None:
    model: Any = convert.load(written(tmp_path / "in", EXAMPLES["plain"], tensors_of(EXAMPLES["plain"]))).model
    config = model.config.replace(encoder=model.config.encoder.replace(positions=None))
    with pytest.raises(UserError, match=r"cannot be written as thor, .*encoder\.positions"):
        convert.save(config.build(), tmp_path / "out", to="thor")


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_best.pt").write_bytes(pickle.dumps({"model": {}}))
    with pytest.raises(UserError, match=r"checkpoint_best\.pt is a pickle.*save_file"):
        convert.load(tmp_path)
