"""What routers do while a model is fine-tuned."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from adapt.adapt_cases import decoder, loss, tokens
from moestro.adapt import LoRA
from moestro.adapt.attach import attach, factors
from moestro.adapt.policy import apply_policy, coefficients, parameter_groups
from moestro.core.errors import UserError
from moestro.core.params import describe
from moestro.models.examples import examples
from moestro.optim.hooks import RouterSteps
from moestro.routers.config import Frozen, Linear, LossFree, Router, TopK
from moestro.train.run import run
from train.train_cases import Steps, tiny


def model(router: Router, name: str = "moe"):
    return decoder(name, moe=examples()[name].moe.replace(router=router))


BIASED = Router(score=Linear(bias=True), select=LossFree(inner=TopK(k=2)))


@pytest.mark.parametrize("policy", ["train", "freeze", "bias_only"])
def test_frozen_scores_stay_frozen(policy):
    """41: the random router never trains, whatever routers do."""
    m = model(Router(score=Frozen(inner=Linear(bias=True)), select=LossFree(inner=TopK(k=2))))
    report = apply_policy(m, policy)
    assert report.trains == report.frozen == ()
    still = {n for n, p in m.named_parameters() if not p.requires_grad}
    assert still == {f"layers.{i}.ffn.router.score.inner.{t}" for i in (0, 1) for t in ("weight", "bias")}


@pytest.mark.parametrize(
    ("policy", "trains"),
    [("train", {"weight", "bias"}), ("freeze", set()), ("bias_only", {"bias"})],
)
def test_what_trains(policy, trains):
    m = model(BIASED)
    others = {n for n, i in describe(m).items() if i.role != "router"}
    report = apply_policy(m, policy)
    on = {n for n, p in m.named_parameters() if p.requires_grad}
    assert on - others == set(report.trains) == {f"layers.{i}.ffn.router.score.{t}" for i in (0, 1) for t in trains}
    assert others <= on
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    loss(m, tokens()).backward()
    optimizer.step()
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert moved - others == set(report.trains)


@pytest.mark.parametrize(("policy", "moves"), [("train", True), ("freeze", False), ("bias_only", True)])
def test_balancing_biases_stand_still_when_frozen(policy, moves):
    m = model(BIASED)
    report = apply_policy(m, policy)
    _, _, trail = m(tokens())
    RouterSteps(m)(0, trail.counts())
    assert bool(m.layers[0].ffn.router.select.bias.any()) == moves
    assert any(("stand still" in line) != moves for line in report.lines if "balancing" in line)
    apply_policy(m, "train")
    RouterSteps(m)(1, trail.counts())
    assert bool(m.layers[0].ffn.router.select.bias.any())


def test_coefficients_in_effect_are_printed():
    m = decoder()
    assert "loss load_balancing_loss: coefficient 0.01 in 2 layers" in apply_policy(m, "train").lines
    report = apply_policy(m, "freeze")
    assert "routers: freeze, 0 of 2 tensors train" in report.lines
    assert "loss load_balancing_loss: coefficient 0.01 in 2 layers" in report.lines
    assert any("still act on what these routers read" in line for line in report.lines)
    assert coefficients(m) == {("load_balancing_loss", 0.01): 2}
    _, _, trail = m(tokens())
    (grad,) = torch.autograd.grad(trail.loss(), m.embed.weight)
    assert bool(grad.any())  # that is so


def test_adapters_and_policies_together():
    m = decoder()
    attached = attach(m, LoRA(router="train"))
    on = {n for n, p in m.named_parameters() if p.requires_grad}
    assert on == set(factors(m)) | {f"layers.{i}.ffn.router.score.weight" for i in (0, 1)}
    assert "routers: train, 2 of 2 tensors train" in attached.lines


def test_policies_in_a_run(tmp_path):
    """A run with frozen routers moves none of them, says so, and is another run than one that trains them."""
    config = tiny(tmp_path, steps=3, eval_every=3)
    moe = config.model.moe.replace(router=config.model.moe.router.replace(select=LossFree(inner=TopK(k=2))))
    config = config.replace(model=config.model.replace(moe=moe))
    states, said = {}, {}
    for policy in ("train", "freeze", "bias_only"):
        observer = Steps()
        assert run(config.replace(routers=policy), out=tmp_path / policy, progress=observer).complete
        states[policy], said[policy] = load_file(tmp_path / policy / "model.safetensors"), observer.said
    start = config.replace(model=config.model.replace(vocab_size=256)).model.build().state_dict()
    routers = {n for n in start if ".router." in n}
    weights, biases = {n for n in routers if "score" in n}, {n for n in routers if n.endswith("select.bias")}
    assert weights
    assert biases

    def moved(policy, names):
        return {n for n in names if not torch.equal(states[policy][n], start[n])}

    assert moved("train", routers) == routers
    assert moved("freeze", routers) == set()
    assert moved("bias_only", routers) == biases
    assert moved("freeze", set(start)) > set()
    assert any("routers: freeze, 0 of" in line for line in said["freeze"])
    assert not any("routers:" in line for line in said["train"])
    with pytest.raises(UserError, match="settings that would make it another run: routers"):
        run(config.replace(routers="train"), out=tmp_path / "freeze", resume=True)


def test_refusals():
    with pytest.raises(UserError, match="no router has a bias"):
        apply_policy(decoder(), "bias_only")
    with pytest.raises(UserError, match="did you mean 'freeze'"):
        apply_policy(decoder(), "frozen")  # type: ignore[arg-type]


def test_parameter_groups_by_role():
    m = decoder()
    groups = parameter_groups(m, {"router": {"lr": 1e-5}, "expert": {"lr": 1e-3, "weight_decay": 0.1}})
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in m.parameters())
    by_role = {g["role"]: g for g in groups}
    assert by_role["router"]["lr"] == 1e-5
    assert by_role["expert"]["weight_decay"] == 0.1
    assert by_role["norm"]["weight_decay"] == 0.0
    torch.optim.AdamW(groups, lr=1e-4)
    apply_policy(m, "freeze")
    assert "router" not in {g["role"] for g in parameter_groups(m)}
    with pytest.raises(UserError, match="no trainable parameter has the role 'router'"):
        parameter_groups(m, {"router": {"lr": 1.0}})
    with pytest.raises(UserError, match="did you mean 'router'"):
        parameter_groups(m, {"routers": {"lr": 1.0}})
