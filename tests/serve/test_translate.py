"""Generation with encoder-decoders: against passes without caches, and beams against all targets there are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.errors import UserError
from moestro.models import Decoder, Encoder, EncoderDecoder, encoder_decoders
from moestro.moe import MoELayer
from moestro.nn import Attention, CrossAttention, FeedForward
from moestro.routers import Constant, Random, Router, Uniform
from moestro.serve.generate import generate
from moestro.serve.translate import Beam, beam_search, translate
from moestro.serve.weights import pack_model
from moestro.testing.compare import relative_error


def loud(config: EncoderDecoder) -> Any:
    wide = {"init_std": 0.4, "init_depth_scaled": False}
    sides = {"encoder": config.encoder.replace(**wide), "decoder": config.decoder.replace(**wide)}
    return config.replace(**sides).build().eval()


def sources(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in (7, 4, 9)]


@torch.no_grad()
def by_hand(model: Any, source: list[int], count: int, prefix: tuple[int, ...] = ()) -> list[int]:
    """The most probable token after the other, every pass over everything, nothing padded."""
    written = [model.config.start, *prefix]
    for _ in range(count):
        logits, _, _ = model(torch.tensor([source]), torch.tensor([written]))
        written.append(int(logits[0, -1].argmax()))
    return written[1 + len(prefix) :]


@pytest.mark.parametrize("name", encoder_decoders())
def test_greedy_equals_passes_without_a_cache(name: str) -> None:
    model = loud(encoder_decoders()[name])
    given = sources(model.config.encoder.vocab_size)
    want = [by_hand(model, source, 8) for source in given]
    assert [row.tokens.tolist() for row in translate(model, given, 8)] == want
    one = translate(model, given[1], 8)
    assert one.tokens.tolist() == want[1]  # type: ignore[union-attr]
    assert [row.tokens.tolist() for row in generate(model, given, 8)] == want
    begun = translate(model, given[0], 4, prefix=(5, 6))
    assert begun.tokens.tolist() == by_hand(model, given[0], 4, (5, 6))  # type: ignore[union-attr]
    assert not model.training
    assert beam_search(model, given[2], 8, beams=1, length_penalty=0.0)[0].tokens.tolist() == want[2]  # type: ignore[union-attr]


def test_stops_streams_and_limits() -> None:
    model = loud(encoder_decoders()["dense"])
    given = sources(37)
    want = by_hand(model, given[0], 8)
    first = want.index(want[3])
    shown: list[tuple[int, int]] = []
    made = translate(model, [given[0]], 8, stop=(want[3],), stream=lambda i, token: shown.append((i, token)))
    assert made[0].tokens.tolist() == want[:first]  # type: ignore[index]
    assert made[0].reason == "stop"  # type: ignore[index]
    assert shown == [(0, token) for token in want[:first]]
    assert translate(model, given[0], 100).reason == "context"  # type: ignore[union-attr]
    drawn = [translate(model, given[0], 8, temperature=1.0, seed=s).tokens.tolist() for s in (1, 1, 2)]  # type: ignore[union-attr]
    assert drawn[0] == drawn[1] != drawn[2]


def test_random_routers_draw_the_same_for_a_source_alone_and_in_a_batch() -> None:
    router = Router(score=Uniform(), select=Random(k=1), weigh=Constant())
    moe = MoELayer(num_experts=4, router=router, losses=())
    config = encoder_decoders()["dense"]
    model = loud(config.replace(decoder=config.decoder.replace(moe=moe)))
    given = sources(37)[0]
    assert translate(model, [given, given], 6)[1].tokens.tolist() == translate(model, given, 6).tokens.tolist()  # type: ignore[union-attr, index]


@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
def test_random_encoders_too_and_by_seed(level: Any) -> None:
    """Alone as in a batch; other seeds draw other experts, in beams as well."""
    router = Router(score=Uniform(), select=Random(level=level), weigh=Constant())
    moe = MoELayer(num_experts=4, router=router, losses=())
    config = encoder_decoders()["dense"]
    model = loud(config.replace(encoder=config.encoder.replace(moe=moe), decoder=config.decoder.replace(moe=moe)))
    first, second, _ = sources(37)
    seeds = (5, 6, 7, 8)
    alone: Any = [translate(model, first, 6, seed=s) for s in seeds]
    together: Any = translate(model, [first, second, *[first] * 3], 6, seed=(5, 9, 6, 7, 8))
    made = [row.tokens.tolist() for row in alone]
    assert [row.tokens.tolist() for row in (together[0], *together[2:])] == made
    assert (len({tuple(m) for m in made}) > 1) == (level != "batch")
    for seed, want in zip(seeds, made):
        assert beam_search(model, first, 6, beams=1, seed=seed)[0].tokens.tolist() == want  # type: ignore[union-attr]
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        beam_search(model, first, 6, seed=(1, 2))


def tiny(vocab: int = 4) -> Any:
    sizes = {"vocab_size": vocab, "dim": 8, "num_layers": 1, "ffn": FeedForward(width=8), "context": 8}
    encoder = Encoder(attention=Attention(num_heads=2, causal=False), **sizes)
    decoder = Decoder(attention=Attention(num_heads=2), cross=CrossAttention(num_heads=2), tied=True, **sizes)
    return loud(EncoderDecoder(encoder=encoder, decoder=decoder, seed=5))


@torch.no_grad()
def all_targets(model: Any, source: list[int], count: int, stop: int, penalty: float) -> list[tuple[float, tuple]]:
    """Every target of at most `count` tokens with its score, best first."""
    vocab, made = model.config.decoder.vocab_size, {}
    for target in itertools.product(range(vocab), repeat=count):
        read = torch.tensor([[model.config.start, *target[:-1]]])
        logs = model(torch.tensor([source]), read)[0][0].double().log_softmax(-1)
        length = target.index(stop) + 1 if stop in target else count
        score = sum(float(logs[i, target[i]]) for i in range(length))
        made[target[: length - 1] if stop in target else target] = score / length**penalty
    return sorted(((score, target) for target, score in made.items()), key=lambda pair: -pair[0])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_wide_beams_find_the_best_of_all_targets(penalty: float) -> None:
    model, given = tiny(), [[1, 2, 3, 0], [3, 1]]
    got = beam_search(model, given, 4, beams=64, length_penalty=penalty, stop=(2,))
    for source, found in zip(given, got):
        want = all_targets(model, source, 4, 2, penalty)
        assert isinstance(found, list)
        assert len(found) == 64
        assert found[0].tokens.tolist() == list(want[0][1])
        for beam, (score, target) in zip(found, want):
            assert beam.score == pytest.approx(score, rel=1e-5), target
            assert beam.reason == ("length" if len(beam.tokens) == 4 else "stop")


@pytest.mark.parametrize("beams", [2, 3])
def test_narrow_beams_by_hand(beams: int) -> None:
    """The search written out over whole passes: no caches, no batches, one source at a time."""
    model = tiny(7)
    given = [[1, 2, 3, 0, 6], [5, 1], [4, 4, 4, 2]]
    for source, found in zip(given, beam_search(model, given, 5, beams=beams, stop=(2,))):
        assert isinstance(found, list)
        want = plain_search(model, source, 5, beams, 2)
        assert [b.tokens.tolist() for b in found] == [list(t) for _, t in want]
        assert [b.score for b in found] == pytest.approx([s for s, _ in want], rel=1e-5)
        assert [b.score for b in found] == sorted((b.score for b in found), reverse=True)


@torch.no_grad()
def plain_search(model: Any, source: list[int], count: int, beams: int, stop: int) -> list[tuple[float, list[int]]]:
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for step in range(1, count + 1):
        reached = []
        for score, written in alive:
            read = torch.tensor([[model.config.start, *written]])
            logs = model(torch.tensor([source]), read)[0][0, -1].double().log_softmax(-1)
            reached += [(score + float(v), [*written, t]) for t, v in enumerate(logs)]
        reached.sort(key=lambda pair: -pair[0])
        for score, written in reached[:beams]:
            if written[-1] == stop:
                done.append((score / step, written[:-1]))
            elif step == count:
                done.append((score / step, written))
        alive = [pair for pair in reached if pair[1][-1] != stop][:beams]
        done = sorted(done, key=lambda pair: -pair[0])[:beams]
        if len(done) == beams and alive[0][0] / count <= done[-1][0]:
            break
    return done


def test_prefix_context_and_errors() -> None:
    model, source = loud(encoder_decoders()["t5"]), [1, 2, 3]
    (best, *_) = beam_search(model, source, 4, beams=3, prefix=(5, 6))
    assert isinstance(best, Beam)
    assert isinstance(best.tokens, Tensor)
    assert len(best.tokens) == 4
    assert math.isfinite(best.score)
    assert beam_search(model, source, 100, beams=2)[0].reason == "context"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="beams >= 1"):
        beam_search(model, source, 4, beams=0)
    with pytest.raises(UserError, match="stops at single tokens"):
        beam_search(model, source, 4, stop=((1, 2),))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="source 1 is empty"):
        translate(model, [[1], []])
    with pytest.raises(UserError, match="the source has the token 37"):
        translate(model, [1, 37])
    with pytest.raises(UserError, match="the source has 33 tokens, the encoder's context is 32"):
        beam_search(model, [1] * 33)
    with pytest.raises(UserError, match="leaves no room"):
        beam_search(model, source, prefix=(1,) * 32)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, source)


def test_packed_weights() -> None:
    """bf16 maps, and cross-attention's with them; what stays is named."""
    model = loud(encoder_decoders()["t5"])
    source = torch.tensor([[1, 2, 3, 4]])
    want, _, _ = model(source, source)
    packing = pack_model(model, "bf16")
    assert "decoder.layers.0.cross.k" in packing.packed
    assert list(packing.kept) == ["encoder.layers.0.ffn", "decoder.layers.1.ffn"]
    with torch.no_grad():
        assert relative_error(model(source, source)[0], want) < 0.05
    assert len(translate(model, [1, 2, 3], 4).tokens) == 4  # type: ignore[union-attr]
