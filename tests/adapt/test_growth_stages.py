"""Growth in stages (brief 45, B): what trains in which stage, what stays, what it costs."""

from __future__ import annotations

import pytest
import torch

from moestro.adapt import GrowthSchedule, LoRA, Stage
from moestro.adapt.attach import adapters
from moestro.adapt.growth import growing, mean_flops, shallow, stage_costs
from moestro.convert.config import Grow
from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.models import Decoder, encoders, examples
from moestro.models.growth import thaw
from moestro.nn import Attention, IdCode, LayerNorm, PlainFeedForward
from moestro.optim.config import AdamW
from moestro.routers import Frozen, Router, SoftmaxKept
from moestro.testing.compare import assert_close

TEXT = torch.randint(0, 37, (4, 16), generator=torch.Generator().manual_seed(3))
DEEP = examples()["dense"].replace(embedding=IdCode(bits=8), num_layers=4)
LOW = LoRA(rank=2, targets=("attention", "ffn"))


def nats(model) -> torch.Tensor:
    return model.loss(TEXT[:, :-1], TEXT[:, 1:])[0]


def train(model, steps: int = 3) -> set[str]:
    """Returns the names of the parameters that the optimiser has a state for."""
    optimizer = AdamW(lr=1e-2, weight_decay=0.1).build(model)
    for _ in range(steps):
        nats(model).backward()
        optimizer.step(1.0)
        optimizer.clear()
    return {name.rpartition("/")[0] for name in optimizer.to_tensors()}


def test_stages_by_hand():
    schedule = GrowthSchedule.of(2, 1, 1, last=LOW)
    assert schedule.depths() == [2, 3, 4, 4]
    assert schedule.updates(10) == [2, 3, 3, 2]  # ends at 2.5, 5, 7.5, 10, and halves are rounded to even
    assert GrowthSchedule(stages=(Stage(share=3.0), Stage())).updates(8) == [6, 2]
    assert GrowthSchedule().depths() == [3, 6, 9]
    with pytest.raises(UserError, match="too few for 4 stages"):
        schedule.updates(3)
    assert GrowthSchedule.from_dict(schedule.to_dict()) == schedule


def test_brief_45_what_stands_still_keeps_every_bit_and_has_no_state():
    """After every stage; a new block that starts at zero leaves the loss as it was."""
    before, loss = {}, None
    table = IdCode(bits=8).build(37, 16).weight
    for stage in growing(GrowthSchedule.of(2, 1, 1), DEEP):
        model, old = stage.model, (0, 2, 3)[stage.number]
        assert torch.equal(model.embed.weight, table)
        assert set(stage.frozen) == {
            n for n in model.state_dict() if n.startswith(tuple(f"layers.{i}." for i in range(old)))
        }
        if loss is not None:
            assert float(nats(model).detach()) == pytest.approx(loss, rel=1e-6)
        held = train(model)
        assert held == {n for n, _ in model.named_parameters()} - set(stage.frozen)
        after = {n: t.clone() for n, t in model.state_dict().items()}
        assert all(torch.equal(after[n], before[n]) for n in stage.frozen)
        assert not any(torch.equal(after[n], before[n]) for n in before if n not in stage.frozen)
        assert torch.equal(model.embed.weight, table)
        before, loss = after, float(nats(model).detach())
    assert model.config == DEEP


def test_brief_45_low_rank_updates_of_all_blocks_in_the_last_stage():
    """The blocks keep every bit while they train; at the end the updates are in them, and no adapter is left."""
    stages = growing(GrowthSchedule.of(3, 1, last=LOW), DEEP)
    for _ in range(2):
        train(next(stages).model)
    last = next(stages)
    model = last.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert {int(path.split(".")[1]) for path in adapters(model)} == {0, 1, 2, 3}
    held = train(model)
    assert {n.split(".")[0] for n in held if ".delta" not in n} == {"norm", "head"}
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in last.frozen)
    with torch.no_grad():
        want = model(TEXT)[0]
        assert next(stages, None) is None
        assert not adapters(model)
        assert set(model.state_dict()) == set(DEEP.build().state_dict())
        assert_close("updates added into the blocks", model(TEXT)[0], want, 1e-5)
    assert not torch.equal(model.state_dict()["layers.0.ffn.down"], before["layers.0.ffn.down"])


def test_adapters_beside_a_new_block_and_parts_that_train_all_the_same():
    schedule = GrowthSchedule(stages=(Stage(blocks=3), Stage(adapter=LOW), Stage(blocks=0, trains=("0",))))
    stages = growing(schedule, DEEP)
    train(next(stages).model)
    second = next(stages)
    assert {int(path.split(".")[1]) for path in adapters(second.model)} == {0, 1, 2}
    names = {n for n, p in second.model.named_parameters() if p.requires_grad}
    assert "layers.3.ffn.down" in names
    assert "layers.2.ffn.down" not in names
    assert nats(second.model).requires_grad
    third = next(stages)
    trains = {n for n, p in third.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trains if n.startswith("layers.")} == {"0"}
    assert {"norm.weight", "head.weight"} <= trains
    wrong = GrowthSchedule(stages=(Stage(blocks=3), Stage(adapter=LOW.replace(layers=(3,)))))
    with pytest.raises(UserError, match="block 3 is none of the 3 older ones"):
        list(growing(wrong, DEEP))


def test_costs_of_stages_by_hand():
    """Blocks below cost a forward pass, what trains three; a frozen matrix under an adapter has no gradient."""
    schedule = GrowthSchedule.of(3, 1, last=LOW)
    first, second, last = stage_costs(schedule, DEEP, 16)
    assert mean_flops(schedule, DEEP, 16) == pytest.approx((first.flops + second.flops + last.flops) / 3)
    model = DEEP.build()
    block, head, norm = (cost(m, 16) for m in (model.layers[0], model.head, model.norm))
    assert first.trained == 3 * block.params + head.params + norm.params
    assert second.trained == block.params + head.params + norm.params
    assert second.flops == (3 + 3) * block.flops + block.backward_extra + 3 * head.flops
    assert (second.gradient_bytes, second.optimizer_bytes) == (4 * second.trained, 8 * second.trained)
    assert (first.activation_share, second.activation_share, last.activation_share) == (1.0, 0.25, 1.0)
    pairs = sum(2 * sum(m.shape) for _, m in matrices_of(model.layers[0]))  # of rank 2, and gate and up have one each
    assert last.trained == 4 * pairs + head.params + norm.params
    whole = sum(m.numel() for _, m in matrices_of(model.layers[0]))
    assert last.flops == 4 * (3 * (block.flops + 2 * pairs) + block.backward_extra - 2 * whole) + 3 * head.flops


def matrices_of(block):
    """Name -> matrix, gate and up apart."""
    for name, p in block.named_parameters():
        if name.endswith("gate_up"):
            yield from ((name, part) for part in p.chunk(2))
        elif p.ndim == 2:
            yield name, p


def test_brief_45_every_published_stage_trains_as_many():
    """105.0M: three blocks and the head, in every stage of the controlled study."""
    model = Decoder(
        vocab_size=65_536,
        dim=1024,
        num_layers=9,
        attention=Attention(num_heads=32, num_kv_heads=32, head_dim=32),
        ffn=PlainFeedForward(width=4096, bias=True),
        norm=LayerNorm(),
        head_bias=True,
        embedding=IdCode(),
        context=1024,
    )
    stages = stage_costs(GrowthSchedule(), model, 1024)
    assert [round(s.trained / 1e6, 1) for s in stages] == [105.0] * 3
    assert [s.params for s in stages] == sorted(s.params for s in stages)
    assert [round(3 * s.activation_share, 6) for s in stages] == [3, 1.5, 1]


def test_a_trained_model_may_be_the_first_stage():
    model = shallow(DEEP, 3).build()
    train(model)
    kept = {n: t.clone() for n, t in model.state_dict().items()}
    stages = list(growing(GrowthSchedule.of(3, 1), DEEP, model))
    assert stages[0].model is model
    grown = stages[1].model.state_dict()
    assert all(torch.equal(grown[n], t) for n, t in kept.items())
    with pytest.raises(UserError, match="the first stage has 2 blocks, the model 3"):
        list(growing(GrowthSchedule.of(2, 2), DEEP, model))
    with pytest.raises(UserError, match="add up to 3 blocks, the model has 4"):
        next(growing(GrowthSchedule.of(2, 1), DEEP))
    with pytest.raises(UserError, match="first stage"):
        GrowthSchedule(stages=(Stage(adapter=LOW),))
    with pytest.raises(UserError, match="at least one stage"):
        GrowthSchedule(stages=())


@pytest.mark.parametrize("name", ["mixed", "moe"])
def test_blocks_of_several_kinds_grow_to_the_whole_model(name):
    whole = examples()[name]
    depth = whole.num_layers
    last = list(growing(GrowthSchedule.of(*[1] * depth), whole))[-1]
    assert last.model.config.resolved() == whole.resolved()
    assert set(last.model.state_dict()) == set(whole.build().state_dict())


def test_encoders_grow_too():
    encoder = encoders()["dense"]
    last = list(growing(GrowthSchedule.of(1, encoder.num_layers - 1), encoder))[-1]
    assert last.model.config == encoder


def test_a_frozen_router_stays_frozen_in_new_blocks_and_when_blocks_are_freed():
    moe = examples()["moe"].moe
    assert moe is not None
    router = Router(score=Frozen(), weigh=SoftmaxKept())
    config = examples()["moe"].replace(moe=moe.replace(router=router, losses=()))
    model, _ = Grow(start="random").build(config.build())
    fixed = [n for n, p in model.named_parameters() if "score" in n and not p.requires_grad]
    assert len(fixed) == config.num_layers + 1
    assert not [n for n in thaw(model, [":"]) if "score" in n]
