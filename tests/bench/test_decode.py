"""Cold decoding: everybody meets tokens of its own, errors are those of the kind of weights, and models agree."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from moestro.bench import decode, decoders, whole
from moestro.bench.problem import Shape, weights
from moestro.bench.timing import interleave
from moestro.core.errors import UserError

SIZES = "2 layers, D 32 F 32 E 4 K 2"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    few = {name: whole.PEERS[name] for name in ("transformers grouped_mm", "transformers eager")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "PEERS", few)
        patch.setattr(torch, "compile", lambda function, **options: function)  # what is compiled is tested elsewhere
        return decode.measure(
            (32, 32, 4, 2), layers=2, tokens=3, passes=2, model_rounds=2, new_tokens=5, peers=True, threads=1
        )


def test_cold(record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record)) == record
    regime = record["regimes"][f"cold decode, {SIZES}"]
    assert (regime["ours"], regime["layers"]) == ("moestro fp32", 2)
    for name in ("moestro fp32", "loop, unbind", "gather + bmm compiled", "transformers grouped_mm"):
        row = regime["rows"][name]
        assert len(row["seconds"]) == 6
        assert 0 < row["errors"]["y"] <= decode.TOLERANCE["fp32"]
        assert row["bytes"] == 2 * 3 * 32 * 32 * 4
    for kind in decoders.KINDS:
        row = regime["rows"][f"moestro {kind}"]
        assert 1e-4 < row["errors"]["y"] <= decode.TOLERANCE[kind]
        assert row["bytes"] < regime["rows"]["moestro fp32"]["bytes"]
    floor = regime["rows"]["read once, fp32"]
    assert "errors" not in floor


def test_whole_models_agree(record: dict[str, Any]) -> None:
    regime = record["regimes"][f"whole model, {SIZES}"]
    for name in ("moestro", "transformers grouped_mm", "transformers eager"):
        row = regime["rows"][name]
        assert (row["agree"], row["of"], len(row["seconds"])) == (5, 5, 2)
    packed = {f"moestro {kind}" for kind in decoders.KINDS}
    assert set(regime["ratios"]) == {"transformers grouped_mm", "transformers eager", *packed}
    assert all(0 <= regime["rows"][name]["agree"] <= 5 for name in packed)


def test_no_token_follows_itself() -> None:
    seen: list[int] = []
    stream = [
        decode.Token((torch.tensor([[float(i)]]),), (torch.zeros(1, 1, dtype=torch.int64),), (torch.ones(1, 1),))
        for i in range(decode.TOKENS)
    ]

    def note(x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(int(x))
        return x

    turns = {str(i): decode._turn([note], stream, i * decode.STRIDE) for i in range(20)}
    interleave(turns, 3 * decode.TOKENS, warmup=0)
    assert len(seen) == 3 * 20 * decode.TOKENS
    assert all(a != b for a, b in itertools.pairwise(seen))
    assert {seen.count(i) for i in range(decode.TOKENS)} == {60}


def test_a_wrong_decoder_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoders.makers

    def with_a_wrong_one(shape: Shape, shared: Any, peers: bool) -> dict[str, decoders.Maker]:
        made = right(shape, shared, peers)
        steps = made["loop, unbind"].build()
        worse = [lambda x, e, w, s=s: s(x, e, w) * 1.01 for s in steps]
        kept = {name: made[name] for name in ("moestro fp32", "loop, unbind")}
        return kept | {"wrong": decoders.Maker(lambda: worse, shape)}

    monkeypatch.setattr(decoders, "makers", with_a_wrong_one)
    record = decode.measure((16, 8, 4, 2), layers=1, tokens=2, passes=1, model_rounds=0, threads=1)
    (regime,) = record["regimes"].values()
    assert "its output is 1.0e-02 away" in regime["rows"]["wrong"]["refused"]
    assert "seconds" not in regime["rows"]["wrong"]


def test_a_model_with_other_tokens_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*_: Any) -> whole.Continue:
        return lambda prompt: [-1, -1, -1]

    monkeypatch.setattr(whole, "_transformers", other)
    found = whole.measure(Shape(1, 16, 8, 4, 2), 1, 1, 3, True, 0, lambda line: None)
    for name in whole.PEERS:
        assert found["rows"][name]["refused"] == "0 of 3 tokens are the same"
        assert "seconds" not in found["rows"][name]


def test_the_reader_reads_the_touched_experts() -> None:
    shape = Shape(1, 32, 16, 4, 2)
    shared = weights(shape, 0, torch.device("cpu"), torch.float32)
    maker = decoders.makers(shape, [shared], False)["read once, fp32"]
    assert maker.reader
    assert maker.bytes_per_layer() == sum(t[:2].numel() * 4 for t in (shared.gate_up, shared.down))
    with pytest.raises(UserError, match="at least one layer"):
        decode.measure(layers=0)
