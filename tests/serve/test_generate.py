"""Generation against recomputing everything for every token; sampling against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.core.draws import fold, uniform
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models import Decoder, examples
from moestro.models.decoder import Decoder as DecoderModule
from moestro.serve.generate import Generated, generate
from moestro.serve.sampling import choose, distribution
from moestro.testing.compare import assert_close

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]


def build(name: str = "moe") -> DecoderModule:
    return examples()[name].replace(init_std=0.3, init_depth_scaled=False).build()


def by_recomputation(model: DecoderModule, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", examples())
def test_greedy_equals_recomputation(name: str) -> None:
    model = build(name).eval()
    want = [by_recomputation(model, p, 12) for p in PROMPTS]
    assert len({tuple(w) for w in want}) > 1, "the model's answers depend on the prompt"
    for prompt, w in zip(PROMPTS, want):
        got = generate(model, prompt, 12)
        assert got.tokens.tolist() == w
        assert got.reason == "length"
    together = generate(model, PROMPTS, 12)
    assert [g.tokens.tolist() for g in together] == want, "ragged prompts together are as those alone"


@pytest.mark.parametrize("name", examples())
def test_cached_logits_of_a_padded_batch_equal_recomputation(name: str) -> None:
    """Ragged prompts padded on the left, then ten tokens one by one, far beyond the window."""
    model = build(name).eval()
    follow = torch.randint(0, 37, (3, 10), generator=torch.Generator().manual_seed(0))
    length, longest = [len(p) for p in PROMPTS], max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    place = torch.arange(longest + 10) - (longest - torch.tensor(length))[:, None]
    carry, parts, at = model.new_cache(longest + 10), [], 0
    with torch.no_grad():
        for step in (padded, *follow.split(1, dim=1)):
            now = place[:, at : at + step.shape[1]]
            signals = Signals(valid=(now >= 0).reshape(-1), position=now.clamp_min(0).reshape(-1))
            logits, carry, _ = model(step, signals, carry)
            parts.append(logits[:, -1])
            at += step.shape[1]
        for i, prompt in enumerate(PROMPTS):
            want = model(torch.tensor([prompt + follow[i].tolist()]))[0][0, length[i] - 1 :]
            assert_close(f"prompt {i}", torch.stack([p[i] for p in parts]), want, 1e-5)


def test_of_a_prompt_only_the_last_position_meets_the_head() -> None:
    model, seen = build().eval(), []
    want = by_recomputation(model, PROMPTS[0], 3)
    model.head.register_forward_pre_hook(lambda _, args: seen.append(list(args[0].shape[:2])))
    assert generate(model, PROMPTS[0], 3).tokens.tolist() == want
    assert seen == [[1, 1]] * 3
    generate(model, PROMPTS, 2)
    assert seen[3:] == [[3, 1]] * 2


def test_a_watched_or_changed_decoder_is_called() -> None:
    model, calls = build().eval(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    want = by_recomputation(build().eval(), PROMPTS[0], 3)
    assert generate(model, PROMPTS[0], 3).tokens.tolist() == want
    assert len(calls) == 3

    class Reversed(DecoderModule):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            logits, carry, trail = super().forward(*args, **kwargs)
            return -logits, carry, trail

    model = build().eval()
    model.__class__ = Reversed
    assert generate(model, PROMPTS[0], 1).tokens.tolist() == by_recomputation(model, PROMPTS[0], 1)


@pytest.mark.parametrize("name", ["moe", "windowed", "mixed"])
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    model = build(name)
    options = {"temperature": 1.2, "top_p": 0.9, "top_k": 20}
    alone = [generate(model, p, 10, seed=7, **options) for p in PROMPTS]  # type: ignore[arg-type]
    together = generate(model, PROMPTS, 10, seed=7, **options)  # type: ignore[arg-type]
    assert [a.tokens.tolist() for a in alone] == [t.tokens.tolist() for t in together]
    again = generate(model, PROMPTS[::-1], 10, seed=7, **options)  # type: ignore[arg-type]
    assert [a.tokens.tolist() for a in again[::-1]] == [t.tokens.tolist() for t in together]


def test_seeds() -> None:
    model = build()
    several = generate(model, [PROMPTS[0]] * 3, 12, temperature=1.0, seed=(1, 2, 1))
    a, b, c = (g.tokens.tolist() for g in several)
    assert a == c
    assert a != b
    assert generate(model, PROMPTS[0], 12, temperature=1.0, seed=2).tokens.tolist() == b
    with pytest.raises(UserError, match="2 seeds for 3 prompts"):
        generate(model, PROMPTS, 3, seed=(1, 2))


def test_a_sample_continues_when_its_beginning_becomes_the_prompt() -> None:
    """Draws are addressed by position: what was generated may be given back as prompt."""
    model = build()
    whole = generate(model, PROMPTS[0], 12, temperature=1.0, seed=5).tokens.tolist()
    rest = generate(model, PROMPTS[0] + whole[:5], 7, temperature=1.0, seed=5).tokens.tolist()
    assert rest == whole[5:]


def test_prompt_types_and_modes() -> None:
    model = build().train()
    model.layers[0].eval()
    ids = PROMPTS[0]
    want = generate(model, ids, 4).tokens.tolist()
    assert isinstance(generate(model, torch.tensor(ids), 4), Generated)
    assert generate(model, torch.tensor(ids, dtype=torch.int32), 4).tokens.tolist() == want
    pair = generate(model, torch.tensor([ids, ids]), 4)
    assert [g.tokens.tolist() for g in pair] == [want, want]
    assert model.training
    assert not model.layers[0].training, "every module's mode is as before"
    nothing = generate(model, ids, 0)
    assert (nothing.tokens.tolist(), nothing.reason) == ([], "length")


def test_stop_tokens_and_sequences() -> None:
    model = build()
    free = generate(model, PROMPTS[0], 12).tokens.tolist()
    at = next(i for i in range(2, 12) if free[i] not in free[:i])
    got = generate(model, PROMPTS[0], 12, stop=[free[at]])
    assert got.tokens.tolist() == free[:at]
    assert got.reason == "stop"
    pair = generate(model, PROMPTS[0], 12, stop=[(free[at - 1], free[at])])
    assert pair.tokens.tolist() == free[: at - 1]
    with pytest.raises(UserError, match="empty stop sequence"):
        generate(model, PROMPTS[0], 3, stop=[()])


def test_streaming_shows_exactly_the_result() -> None:
    model = build()
    free = generate(model, PROMPTS[0], 12).tokens.tolist()
    at = next(i for i in range(2, 11) if free[i] not in free[:i])
    never = next(t for t in range(37) if t != free[at + 1])
    shown: dict[int, list[int]] = {0: [], 1: [], 2: []}
    got = generate(
        model,
        PROMPTS,
        12,
        stop=[(free[at - 1], free[at], never), (free[at], free[at + 1])],
        stream=lambda row, token: shown[row].append(token),
    )
    assert got[0].tokens.tolist() == free[:at]
    assert [shown[i] for i in range(3)] == [g.tokens.tolist() for g in got]


def test_the_context_ends_generation() -> None:
    model = build()
    context = model.config.context
    long = [i % 37 for i in range(context - 3)]
    got = generate(model, [long, [1]], 10)
    assert (len(got[0].tokens), got[0].reason) == (3, "context")
    assert (len(got[1].tokens), got[1].reason) == (10, "length")
    full = generate(model, [i % 37 for i in range(context)], 10)
    assert (len(full.tokens), full.reason) == (0, "context")
    assert got[0].tokens.tolist() == by_recomputation(model.eval(), long, 3)


def test_what_cannot_be_continued() -> None:
    model = build()
    cases: dict[str, list[int] | Tensor] = {
        "the prompt has 33 tokens, the model's context is 32": [1] * 33,
        "the prompt is empty": [],
        "the token 37, the vocabulary is 0..36": [1, 37],
        "the token -1": [-1],
        r"token ids, not \[1, 1, 1\]": torch.zeros(1, 1, 1, dtype=torch.int64),
    }
    for message, prompt in cases.items():
        with pytest.raises(UserError, match=message):
            generate(model, prompt, 3)
    with pytest.raises(UserError, match="prompt 1 has 40 tokens"):
        generate(model, [[1], [1] * 40], 3)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}):
        with pytest.raises(UserError, match="sampling needs"):
            generate(model, [1], 3, **bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_new_tokens"):
        generate(model, [1], -1)
    with torch.no_grad():
        model.embed.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(model, [1], 3)


def test_distribution_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert distribution(logits)[0].tolist() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert distribution(logits, top_k=2)[0].tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert distribution(logits, top_p=0.7)[0].tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert distribution(logits, top_p=0.71)[0].tolist() == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert distribution(logits, top_p=0.01)[0].tolist() == [0, 1, 0, 0]
    assert distribution(logits, temperature=0.5)[0].tolist() == pytest.approx([x / 30 for x in (1, 16, 4, 9)])
    assert distribution(torch.zeros(1, 4), top_k=2)[0].tolist() == [0.5, 0.5, 0, 0], "ties go to the lower id"
    assert distribution(torch.zeros(1, 4), top_p=0.5)[0].tolist() == [0.5, 0.5, 0, 0]


def test_greedy_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(2, 100)
    logits[1, [70, 30]] = 1.0
    zero = torch.zeros(2, dtype=torch.int64)
    assert choose(logits, zero, zero).tolist() == [0, 30]


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.05, 0.0, 0.5, 0.15, 0.3])
    n = 4000
    logits = probs.log().expand(n, 5)
    drawn = choose(logits, torch.full((n,), 11), torch.arange(n), temperature=1.0)
    share = torch.bincount(drawn, minlength=5) / n
    assert share[1] == 0, "what has no probability is never drawn"
    assert bool(((share - probs).abs() < 4 * (probs * (1 - probs) / n).sqrt() + 1e-9).all())
    u = uniform(fold(11, "sample"), torch.tensor([17]), 1, dtype=torch.float64)
    assert int(drawn[17]) == int(torch.searchsorted(probs.double().cumsum(0), u[0], right=True))


def test_the_default_context_is_enough() -> None:
    config = Decoder(dim=8, num_layers=1, context=64)
    assert len(generate(config.build(), [1, 2], 70).tokens) == 62
