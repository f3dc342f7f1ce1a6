"""Layer-wise growth (brief 45, B): what stays, what trains, what a step costs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moestro.adapt.attach import attach
from moestro.adapt.config import LoRA
from moestro.convert.change.grow import grown
from moestro.convert.config import Grow
from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.models import Block, Decoder, ParallelBlock, encoders, examples
from moestro.models.growth import step_cost, still, thaw
from moestro.nn import Attention, FeedForward, IdCode, PlainFeedForward
from moestro.optim.config import AdamW
from moestro.optim.hooks import RouterSteps
from moestro.routers import LossFree, Router, TopK
from moestro.testing.conversions import check_conversion

TEXT = torch.randint(0, 37, (4, 16), generator=torch.Generator().manual_seed(3))
BASE = examples()["dense"].replace(embedding=IdCode(bits=8))
KINDS = ("dense", "moe", "mixed", "parallel", "sinks", "latent", "sparse_mixer", "attention_experts", "multipliers")


@pytest.mark.parametrize("name", KINDS)
def test_brief_45_zero_started_blocks_change_no_output(name):
    config = examples()[name]
    check_conversion(lambda m: Grow(blocks=2).build(m, text=TEXT), config.build, lambda m: m(TEXT)[0], exact=1e-6)


def test_blocks_of_another_kind_and_encoders():
    block = ParallelBlock(mixer=Attention(num_heads=2), ffn=PlainFeedForward(width=12, bias=True))
    new, receipt = Grow(block=block).build(BASE.build(), text=TEXT)
    assert new.config.resolved()[-1] == block
    assert receipt.measured.bitwise
    encoder = encoders()["dense"]
    new, receipt = Grow().build(encoder.build(), text=TEXT)
    assert receipt.bound is not None
    assert new.config.num_layers == 3


def test_random_blocks_change_the_output_and_the_receipt_says_how_far():
    new, receipt = Grow(blocks=2, start="random").build(BASE.build(), text=TEXT)
    assert receipt.exact is None
    assert [c.path for c in receipt.layers] == ["layers.2", "layers.3"]
    h = new.run(new.embed(TEXT), stop=2)[0]
    after = new.run(h, start=2, stop=3)[0]
    assert receipt.layers[0].distance == pytest.approx(float(((after - h).norm() / h.norm()).detach()), rel=1e-4)


def test_configs_grow_in_the_shortest_form():
    assert grown(BASE, 3) == BASE.replace(num_layers=5)
    mixed = grown(examples()["mixed"], 1)
    assert mixed.blocks is not None
    assert mixed.resolved()[:3] == examples()["mixed"].resolved()
    assert mixed.resolved()[3] == mixed.resolved()[2]
    assert Decoder.from_dict(mixed.to_dict()) == mixed


def test_brief_45_stages_leave_embedding_and_older_blocks_bit_identical():
    """Two stages with AdamW and decay: no frozen bit moves, and no frozen tensor has a state."""
    model = BASE.build()
    for old in (2, 3):
        model, _ = Grow().build(model, text=TEXT)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        embed = model.embed.weight.clone()
        optimizer = AdamW(lr=1e-2, weight_decay=0.1).build(model)
        first = float(model.loss(TEXT[:, :-1], TEXT[:, 1:])[0].detach())
        for _ in range(5):
            loss = model.loss(TEXT[:, :-1], TEXT[:, 1:])[0]
            loss.backward()
            optimizer.step(1.0)
            optimizer.clear()
        assert float(loss.detach()) < first
        moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        new = {n for n in before if n.startswith((f"layers.{old}.", "norm.", "head."))}
        assert moved == new
        assert torch.equal(model.embed.weight, embed)
        held = " ".join(optimizer.to_tensors())
        assert f"layers.{old}." in held
        assert f"layers.{old - 1}." not in held


def test_balancing_biases_of_frozen_blocks_stand_still():
    moe = examples()["moe"].moe
    assert moe is not None
    config = examples()["moe"].replace(moe=moe.replace(router=Router(select=LossFree(inner=TopK(k=2)))))
    model, _ = Grow().build(config.build(), text=TEXT)
    counts = {f"layers.{i}.ffn": torch.tensor([9, 1, 1, 1]) for i in range(3)}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    RouterSteps(model)(1, counts)
    moved = {n.split(".")[1] for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"2"}


def test_brief_45_a_last_stage_with_low_rank_updates_of_all_blocks():
    """LoRA on the old blocks, the new block and the head whole; what the old blocks were stays, bit for bit."""
    model, _ = Grow().build(BASE.build(), text=TEXT)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        want = model(TEXT)[0]
    attach(model, LoRA(rank=2, targets=("ffn", "attention"), layers=(0, 1)))
    names = thaw(model, ["2", "norm", "head"])
    assert {n.split(".")[1] for n in names if n.startswith("layers.")} == {"0", "1", "2"}
    with torch.no_grad():
        assert torch.equal(model(TEXT)[0], want)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.loss(TEXT[:, :-1], TEXT[:, 1:])[0]
        loss.backward()
        optimizer.step()
    after = model.state_dict()
    for name in before:
        if name.startswith(("layers.0.", "layers.1.")):
            assert torch.equal(after[name], before[name]), name
    with torch.no_grad():
        assert float((model(TEXT)[0] - want).norm()) > 0
    assert not torch.equal(after["layers.2.ffn.down"], before["layers.2.ffn.down"])


def test_what_a_step_costs():
    """By hand: a block below all that trains costs forward only, above also the gradient of its input."""
    model = BASE.replace(num_layers=4).build()
    block, head = cost(model.layers[0], 16), cost(model.head, 16)
    everything = step_cost(model, 16)
    assert everything.flops == cost(model, 16).train_flops
    assert everything.trained == cost(model).params
    still(model, ["embed", "0:2", "3"])
    found = step_cost(model, 16)
    trained = block.params + head.params + cost(model.norm).params
    assert found.trained == trained
    assert (found.gradient_bytes, found.optimizer_bytes) == (4 * trained, 8 * trained)
    assert found.flops == (2 * 1 + 3 + 2) * block.flops + 2 * block.backward_extra + 3 * head.flops
    assert found.activation_share == 0.5


def test_a_tied_head_costs_what_its_matrix_does():
    model = BASE.replace(embedding=None, tied=True).build()
    assert step_cost(model, 16).flops == cost(model, 16).train_flops
    still(model, ["embed"])
    # the head passes a gradient on, and takes none for its matrix
    assert step_cost(model, 16).flops == cost(model, 16).train_flops - 2 * model.embed.weight.numel()
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["1:9"], "blocks 1:9 of a model with 2"),
        (["2"], "blocks 2 of"),
        (["mixer"], "is no part"),
        ([":", "embed", "norm", "head"], "nothing"),
    ],
)
def test_parts_that_cannot_be_frozen(parts, said):
    with pytest.raises(UserError, match=said):
        still(BASE.build(), parts)


def test_what_cannot_grow():
    with pytest.raises(UserError, match="not a Linear"):
        Grow().build(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="leave it out"):
        Grow(layers=(0,)).build(BASE.build())
    post = BASE.replace(norm_order="post", embedding=None).build()
    with pytest.raises(UserError, match="post-norm"):
        Grow().build(post, text=TEXT)
    assert Grow(start="random").build(post, text=TEXT)[1].exact is None


def test_options_travel_as_json():
    options = Grow(block=Block(ffn=FeedForward(width=8)))
    assert Grow.from_dict(options.to_dict()) == options
    assert dataclasses.replace(options, blocks=3).blocks == 3
