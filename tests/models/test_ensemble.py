"""Several decoders as one (brief 45, A): averages by hand, caches, generation, evaluation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.core.trail import Key
from moestro.models import Decoder, examples
from moestro.models.ensemble import Ensemble, ensemble
from moestro.models.ensembles import Ensemble as EnsembleConfig
from moestro.moe import Whole
from moestro.nn import IdCode
from moestro.routers import Constant, Label, Router, Uniform
from moestro.serve.generate import generate
from moestro.testing.compare import assert_close
from moestro.testing.models import check_model
from moestro.train.held_out import held_out, validate
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import tiny

BASE = examples()["dense"].replace(embedding=IdCode(bits=8), init_std=0.3)
TOKENS = torch.randint(0, 37, (3, 11), generator=torch.Generator().manual_seed(0))


def members(config: Decoder = BASE, count: int = 2) -> list:
    return [config.replace(seed=i).build().eval() for i in range(count)]


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_what_holds_for_decoders_holds_for_ensembles(space):
    moe, dense = examples()["moe"], examples()["dense"]
    check_model(EnsembleConfig(models=(moe, dense.replace(seed=3)), space=space))


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_brief_45_a_model_with_itself_is_itself(space):
    (model,) = members(count=1)
    y = ensemble([model, model], space)(TOKENS)[0]
    assert_close("distribution", y.softmax(-1), model(TOKENS)[0].softmax(-1), 1e-6)


def test_brief_45_mean_of_logits_is_the_normalised_geometric_mean():
    a, b = members()
    p, q = (m(TOKENS)[0].double().softmax(-1) for m in (a, b))
    root = (p * q).sqrt()
    assert_close("logits", ensemble([a, b])(TOKENS)[0].softmax(-1), (root / root.sum(-1, keepdim=True)).float(), 1e-5)
    mean = ensemble([a, b], "probabilities")(TOKENS)[0].exp()
    assert_close("probabilities", mean, ((p + q) / 2).float(), 1e-5)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_the_loss_is_that_of_the_average(space):
    both = ensemble(members(), space)
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:].clone()
    targets[0, :4] = -1
    valid = torch.ones(30, dtype=torch.bool)
    valid[-3:] = False
    total, count, _, _ = both.loss(inputs, targets, Signals(valid=valid))
    found = F.log_softmax(both(inputs, Signals(valid=valid))[0], -1)
    want = [
        -found[b, s, int(targets[b, s])] for b in range(3) for s in range(10) if targets[b, s] >= 0 and 10 * b + s < 27
    ]
    assert int(count) == len(want) == 23
    assert float(total.detach()) == pytest.approx(float(torch.stack(want).detach().sum()), rel=1e-5)


def test_members_keep_what_they_route_under_their_own_paths():
    config = examples()["moe"]
    both = ensemble(members(config))
    _, carry, trail = both(TOKENS, None, both.new_cache(20))
    assert {key.path for key in trail} == {f"models.{i}.layers.{j}.ffn" for i in (0, 1) for j in (0, 1)}
    assert "models.1.layers.0.mixer" in carry.own
    alone = both.models[1](TOKENS)[2][Key("layers.0.ffn", 0)]
    assert torch.equal(trail[Key("models.1.layers.0.ffn", 0)].plan.expert, alone.plan.expert)  # type: ignore[union-attr]
    assert cost(both, 11).flops == sum(cost(m, 11).flops for m in both.models)


def greedy(models: list, prompt: list[int], new: int) -> list[int]:
    """Token by token from whole passes."""
    out = list(prompt)
    for _ in range(new):
        z: Tensor = sum(m(torch.tensor([out]))[0][0, -1] for m in models)  # type: ignore[assignment]
        out.append(int(z.argmax()))
    return out[len(prompt) :]


def test_generation_from_caches_is_that_of_whole_passes():
    models = members()
    both = ensemble(models)
    prompts = [[1, 5, 9], [30, 2, 4, 4, 8], [7]]
    want = [greedy(models, p, 8) for p in prompts]
    assert [g.tokens.tolist() for g in generate(both, prompts, 8)] == want
    assert generate(both, prompts[1], 8).tokens.tolist() == want[1]
    assert want[1] != greedy(models[:1], prompts[1], 8)
    drawn = generate(ensemble(models, "probabilities"), prompts[0], 6, temperature=1.0, seed=3).tokens
    assert drawn.tolist() != generate(both, prompts[0], 6, temperature=1.0, seed=4).tokens.tolist()


def test_whole_models_with_and_without_a_router():
    """`moe.compose.Whole` gives the same average; a label picks one model per sequence."""
    models = members()
    assert_close("whole", Whole().build(models)(TOKENS)[0], ensemble(models)(TOKENS)[0], 1e-6)
    label = Router(score=Uniform(), select=Label(), weigh=Constant())
    which, read = torch.tensor([1, 0, 1]), torch.zeros(3, 4)
    picked = Whole(router=label).build(models, 4)(TOKENS, Signals(label=which), router_input=read)[0]
    for row, model in enumerate(which.tolist()):
        assert_close(f"sequence {row}", picked[row], models[model](TOKENS)[0][row], 1e-6)


def test_a_mixture_of_specialists_beats_each_on_the_mixture():
    """Two models that each know one half: on both halves together the average is better than either."""
    a, b = members(BASE.replace(init_std=0.02))
    low, high = (torch.arange(12).repeat(4)[None] % 6 + start for start in (0, 20))
    for model, text in ((a, low), (b, high)):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        for _ in range(15):
            optimizer.zero_grad()
            loss = model.loss(text[:, :31], text[:, 1:32])[0]
            loss.backward()
            optimizer.step()
    both = [torch.cat([t[:, i : i + 31] for t in (low, high)]) for i in (0, 1)]
    with torch.no_grad():
        nats = {n: float(m.loss(*both)[0]) for n, m in {"a": a, "b": b, "mean": ensemble([a, b])}.items()}
    assert nats["mean"] < min(nats["a"], nats["b"])


def test_runs_are_evaluated_together(tmp_path):
    """The held-out loss of a run's model, twice over, is that of the run; of two states, that of their average."""
    result = tmp_path / "run"
    run(tiny(tmp_path, steps=4, eval_every=2, eval_windows=2), out=result)
    last, batches = load(result, state="last"), held_out(load(result))
    other = last.config.model.replace(seed=5, vocab_size=256).build()
    alone = validate(last, batches)
    twice = dataclasses.replace(last, model=ensemble([last.model, last.model]))  # type: ignore[list-item]
    assert validate(twice, batches) == pytest.approx(alone, rel=1e-6)
    mixed = dataclasses.replace(last, model=ensemble([last.model, other]))  # type: ignore[list-item]
    assert validate(mixed, batches) != pytest.approx(alone, rel=1e-3)


def test_configs_travel_and_name_what_does_not_fit():
    config = EnsembleConfig(models=(BASE, BASE.replace(context=16)), space="probabilities")
    assert EnsembleConfig.from_dict(config.to_dict()) == config
    assert (config.vocab_size, config.context) == (37, 16)
    model = config.build()
    assert isinstance(model, Ensemble)
    with pytest.raises(UserError, match="shortest context of these models, 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(UserError, match="one vocabulary, found 37 and 40"):
        EnsembleConfig(models=(BASE, BASE.replace(vocab_size=40)))
    with pytest.raises(UserError, match="at least one"):
        EnsembleConfig(models=())
    with pytest.raises(UserError, match="not a decoder"):
        ensemble([torch.nn.Linear(2, 2)])  # type: ignore[list-item]
    assert math.isclose(model.config.num_params(), 2 * BASE.num_params())
