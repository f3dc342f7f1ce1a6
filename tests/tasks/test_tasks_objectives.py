"""Every registered objective is a sum over its targets; equations by hand; two passes draw apart and are kept alike."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moestro.core.draws import fold
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.experts import MLP
from moestro.losses import MNR
from moestro.losses.consistency import symmetric_kl
from moestro.models import encoder_decoders, examples, with_heads
from moestro.moe.config import MoELayer
from moestro.routers.config import Constant, Random, Router, Uniform
from moestro.tasks import Classify, FindSpan, MatchPairs, NextToken, Objective, Translate, TwoPass, objectives
from moestro.tasks.batches import Batch
from moestro.tasks.data.batches import LabelBatch, PairBatch, SpanBatch, TranslationBatch
from moestro.tasks.predictions import Prediction, nats
from moestro.testing.compare import assert_close
from moestro.testing.objectives import check_objective
from moestro.train.config import TrainRun

B, S, N = 6, 7, 5
RANDOM = MoELayer(
    num_experts=2,
    router=Router(score=Uniform(), select=Random(level="batch"), weigh=Constant()),
    experts=MLP(width=12, activation="relu"),
    losses=(),
)


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 31, (B, length), generator=torch.Generator().manual_seed(seed))


def short(length: int) -> Tensor:
    """Row r has its last r % 3 tokens missing."""
    return torch.arange(length) < length - torch.arange(B)[:, None] % 3


def batches() -> dict[str, Any]:
    units, more, domain = torch.arange(B * S), 1000 + torch.arange(B * N), torch.arange(B) % 2
    tokens, source = ids(S), ids(N, 1)
    targets = torch.where(short(S), tokens.roll(-1, 1), -1)
    start = torch.tensor([1, 2, 0, 3, -1, 2])
    return {
        "text": Batch(tokens=tokens, targets=targets, unit_id=units, text_bytes=0.0),
        "translation": TranslationBatch(
            source=source,
            source_valid=short(N),
            source_unit_id=more,
            tokens=tokens,
            targets=targets,
            valid=short(S),
            domain=domain,
            unit_id=units,
        ),
        "labels": LabelBatch(
            tokens=tokens, valid=short(S), labels=torch.tensor([0, 4, 2, -1, 1, 3]), domain=domain, unit_id=units
        ),
        "spans": SpanBatch(
            tokens=tokens,
            matched=tokens % 2,
            valid=short(S),
            context=short(S),
            start=start,
            end=start + 1,
            domain=domain,
            example=torch.arange(B),
            unit_id=units,
        ),
        "pairs": PairBatch(
            a=tokens,
            a_valid=short(S),
            a_unit_id=units,
            b=source,
            b_valid=short(N),
            b_unit_id=more,
            similar=torch.tensor([True, True, True, False, True, True]),
            domain=domain,
        ),
    }


def rows(batch: Any, part: slice) -> Any:
    """Some of a batch's sequences."""
    widths = {"unit_id": S, "a_unit_id": S, "source_unit_id": N, "b_unit_id": N}
    made = {}
    for f in dataclasses.fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            value = value.view(B, widths[f.name])[part].reshape(-1) if f.name in widths else value[part]
        made[f.name] = value
    return dataclasses.replace(batch, **made)


def fitting(config: Objective) -> tuple[Any, Any]:
    """(model, batch) for an objective."""
    inner = config.inner if isinstance(config, TwoPass) else config
    if isinstance(inner, Translate):
        return encoder_decoders()["rotary"].build(), batches()["translation"]
    if isinstance(inner, Classify):
        return with_heads()["classes"].build(), batches()["labels"]
    if isinstance(inner, FindSpan):
        return with_heads()["spans"].build(), batches()["spans"]
    if isinstance(inner, MatchPairs):
        return with_heads()["embeddings"].build(), batches()["pairs"]
    return examples()["moe"].build(), batches()["text"]


@pytest.mark.parametrize("name", objectives())
def test_suite(name: str) -> None:
    config = objectives()[name]
    model, batch = fitting(config)
    check_objective(config.build(), model, batch, [rows(batch, slice(0, 2)), rows(batch, slice(2, B))])
    assert Objective.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", objectives())
def test_padding_has_no_influence(name: str) -> None:
    """What stands in padding changes neither loss nor metrics."""
    model, batch = fitting(objectives()[name])
    loud = dataclasses.replace(
        batch,
        **{
            key: torch.where(short(getattr(batch, key).shape[1]), getattr(batch, key), 30)
            for key in ("tokens", "source", "a", "b")
            if hasattr(batch, key)
        },
    )
    objective, signals = objectives()[name].build(), Signals(seed=2)
    one, two = (objective(model.eval(), b, signals) for b in (batch, loud))
    if name in ("next_token", "two_pass"):
        return  # packed text has no padding: targets alone are left out there
    assert_close("loss", two.loss, one.loss, 1e-5)
    for key, value in one.metrics.items():
        assert_close(key, two.metrics[key], value, 1e-5)


# Equations ----------------------------------------------------------------------------------------------------------


def test_label_smoothing_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), target 0, s = 0.1: 0.9 log 2 + 0.1 (log 2 + 2 log 4) / 3. Brief 02, step 3."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [9.0, 0.0, 0.0]], dtype=torch.float64).log()
    logits = torch.where(logits.isfinite(), logits, -5.0)
    loss, metrics = nats([Prediction(logits, torch.tensor([0, -1]))], 0.1)
    assert float(loss) == pytest.approx(0.9 * math.log(2) + 0.1 * (math.log(2) + 2 * math.log(4)) / 3)
    assert float(metrics["nats"]) == pytest.approx(math.log(2))
    assert int(metrics["correct"]) == 1


def test_the_plain_translation_is_the_smoothed_one_without_a_share() -> None:
    model, batch = fitting(Translate())
    plain = Translate(smoothing=0.0).build()
    smooth = Translate(smoothing=0.1).build()(model, batch, Signals(seed=1))
    fused = plain(model, batch, Signals(seed=1))
    assert_close("nats", smooth.metrics["nats"], fused.loss.detach(), 1e-5)
    assert int(fused.count) == int(smooth.count) == plain.count(batch)


def test_the_span_loss_of_brief_13() -> None:
    """(CE_start + CE_end) / 2 over the tokens of the window; a hit needs both ends."""
    model, batch = fitting(FindSpan())
    outcome = FindSpan().build()(model.eval(), batch, Signals())
    valid = batch.valid.reshape(-1)
    said = model(batch.tokens, Signals(valid=valid), None, batch.matched[..., None].float())[0].detach()
    want = hits = 0.0
    for r in range(B):
        if int(batch.start[r]) < 0:
            continue
        logs = torch.log_softmax(said[r][batch.valid[r]], dim=0)
        want -= float(logs[batch.start[r], 0] + logs[batch.end[r], 1]) / 2
        hits += (logs.argmax(0) == torch.stack((batch.start[r], batch.end[r]))).all().item()
    assert float(outcome.loss.detach()) == pytest.approx(want, rel=1e-5)
    assert int(outcome.metrics["correct"]) == hits
    assert int(outcome.count) == 5


def test_pairs_are_compared_inside_their_group_and_counted_if_similar() -> None:
    model, batch = fitting(MatchPairs())
    outcome = MatchPairs(loss=MNR(), group=3).build()(model.eval(), batch, Signals())
    each = [
        (batch.a, batch.a_valid, batch.a_unit_id, S),
        (batch.b, batch.b_valid, batch.b_unit_id, N),
    ]
    a, b = (
        model(x, Signals(valid=v.reshape(-1), unit_id=u, label=batch.domain.repeat_interleave(n)))[0]
        for x, v, u, n in each
    )
    want = torch.zeros(())
    for part in (slice(0, 3), slice(3, 6)):
        scores = a[part] @ b[part].T
        want = want + (-torch.log_softmax(scores, -1).diagonal() * batch.similar[part]).sum()
    assert_close("loss", outcome.loss, want, 1e-5)
    assert {key.pass_ for key in outcome.trail} == {0, 1}
    with pytest.raises(UserError, match="groups of 4"):
        MatchPairs(group=4).build()(model, batch, Signals())


# Two passes: THOR, brief 02 -----------------------------------------------------------------------------------------


def thor(E: int = 2, dropout: float = 0.0) -> Any:
    """An encoder-decoder with one expert drawn per layer and pass."""
    pair = encoder_decoders()["post_norm"]
    moe = RANDOM.replace(num_experts=E)
    sides = {n: s.replace(moe=moe, dropout=dropout) for n, s in (("encoder", pair.encoder), ("decoder", pair.decoder))}
    return pair.replace(**sides).build().train()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_one_expert_without_dropout_is_twice_the_plain_loss() -> None:
    """Check 1 of brief 02: both passes are identical, the consistency is 0, the gradient twice the plain one."""
    model, batch = thor(E=1), batches()["translation"]
    plain = Translate().build()(model, batch, Signals(seed=3))
    want = gradients(model, plain.loss)
    both = TwoPass(inner=Translate()).build()(model, batch, Signals(seed=3))
    assert float(both.metrics["consistency"]) == pytest.approx(0.0, abs=1e-9)
    assert_close("loss", both.loss, 2 * plain.loss, 1e-6)
    for name, gradient in gradients(model, both.loss).items():
        assert_close(name, gradient, 2 * want[name], 1e-4)


def test_the_loss_is_the_sum_of_brief_02_step_5() -> None:
    """L = CE1 + CE2 + alpha * CR, of two passes whose seeds differ; the first is the plain objective's pass."""
    model, batch, signals = thor(E=4, dropout=0.1), batches()["translation"], Signals(seed=3)
    got = TwoPass(inner=Translate(), alpha=5.0).build()(model, batch, signals)
    inner = Translate().build()
    seeds = (3, fold(3, "pass.1"))
    passes = [inner.predict(model, batch, Signals(seed=s)) for s in seeds]
    (p,), (q,) = (said for said, _ in passes)
    counted = batch.targets.reshape(-1) >= 0
    want = sum(inner(model, batch, Signals(seed=s)).loss for s in seeds)
    want = want + 5.0 * symmetric_kl(p.logits, q.logits, counted)
    assert_close("loss", got.loss, want, 1e-6)
    assert float(got.metrics["consistency"]) > 0
    assert int(got.count) == int(counted.sum())
    for i, (_, trail) in enumerate(passes):
        for key, record in trail.items():
            assert torch.equal(got.trail[Key(key.path, i)].plan.expert, record.plan.expert)  # type: ignore[union-attr]


def test_both_passes_have_a_gradient_and_experts_draw_apart() -> None:
    """Check 4 of brief 02: only drawn experts get a gradient, both passes' of them; and p and q both move."""
    model, batch = thor(E=4), batches()["translation"]
    seed = next(s for s in range(50) if _drawn(model, batch, s)[0] != _drawn(model, batch, s)[1])
    outcome = TwoPass(inner=Translate()).build()(model, batch, Signals(seed=seed))
    path = next(key.path for key in outcome.trail if key.path.startswith("decoder"))
    got = gradients(model, outcome.loss)[f"{path}.experts.up"]
    drawn = {int(outcome.trail[Key(path, i)].plan.expert[0, 0]) for i in (0, 1)}  # type: ignore[union-attr]
    assert {e for e in range(4) if bool(got[e].any())} == drawn == set(_drawn(model, batch, seed))


def _drawn(model: Any, batch: Any, seed: int) -> tuple[int, int]:
    """The decoder's expert in each pass."""
    with torch.no_grad():
        trail = TwoPass(inner=Translate()).build()(model, batch, Signals(seed=seed)).trail
    path = next(key.path for key in trail if key.path.startswith("decoder"))
    one, two = (int(trail[Key(path, i)].plan.expert[0, 0]) for i in (0, 1))  # type: ignore[union-attr]
    return one, two


def test_r_drop_of_a_classifier_tells_passes_apart_by_dropout() -> None:
    config = with_heads()["classes"]
    model = config.replace(encoder=config.encoder.replace(dropout=0.2)).build().train()
    outcome = TwoPass(inner=Classify(), alpha=1.0).build()(model, batches()["labels"], Signals(seed=1))
    assert float(outcome.metrics["consistency"]) > 0
    assert_close("loss", outcome.loss.detach(), outcome.metrics["nats"] + outcome.metrics["consistency"], 1e-6)


def test_evaluation_is_one_pass() -> None:
    model, batch = fitting(TwoPass())
    got = TwoPass().build()(model.eval(), batch, Signals(seed=1))
    assert torch.equal(got.loss, NextToken().build()(model, batch, Signals(seed=1)).loss)
    assert {key.pass_ for key in got.trail} == {0}


def test_a_run_can_be_configured_with_it() -> None:
    run = TrainRun(objective=TwoPass(alpha=2.0))
    assert TrainRun.from_dict(run.to_dict()) == run


def test_impossible() -> None:
    with pytest.raises(UserError, match=r"TwoPass\.inner: MatchPairs"):
        TwoPass(inner=MatchPairs())
    with pytest.raises(UserError, match=r"TwoPass\.alpha"):
        TwoPass(alpha=-1.0)
    with pytest.raises(UserError, match=r"Translate\.smoothing"):
        Translate(smoothing=1.0)
    with pytest.raises(UserError, match="no negatives"):
        MatchPairs(group=1)
    with pytest.raises(UserError, match="FindSpan: batches have 1 feature"):
        FindSpan().build()(with_heads()["spans_dense"].build(), batches()["spans"], Signals())
