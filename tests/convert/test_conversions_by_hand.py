"""Conversions against small cases worked by hand, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from moestro.convert.change.conduct import Claim, Made, conduct, experts_of
from moestro.convert.change.mlp import find
from moestro.convert.config import (
    AddExperts,
    Average,
    Cluster,
    Copy,
    GranularSplit,
    MergeExperts,
    Modular,
    MostLoaded,
    PartialReinit,
    Prune,
    Taylor,
)
from moestro.convert.receipt import ConversionError, Receipt, read, verify
from moestro.convert.upcycle.neurons import importance, kmeans
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.experts.config import MLP, Gated
from moestro.models.config import Block
from moestro.models.examples import examples as decoders
from moestro.moe.config import AveragedExperts
from moestro.moe.dropin import MoE
from moestro.nn.config import PlainFeedForward
from moestro.routers.config import Raw, SoftmaxKept
from moestro.testing.compare import assert_close
from moestro.testing.conversions import check_conversion

TEXT = torch.randint(0, 37, (3, 16), generator=torch.Generator().manual_seed(3))


def moved(config, dtype=torch.float32):
    model = config.build()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.to(dtype).eval()


def dense(dtype=torch.float32):
    return moved(decoders()["moe"].replace(moe=None), dtype)


class Plain(nn.Module):
    """y = down(relu(up x)) of two neurons, with the shape of a model."""

    def __init__(self):
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        with torch.no_grad():
            self.ffn[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
            self.ffn[0].bias.zero_()
            self.ffn[2].weight.copy_(torch.tensor([[1.0, 0, 2], [0, 3, 0]]))
            self.ffn[2].bias.copy_(torch.tensor([0.5, 0]))

    def forward(self, x):
        return self.ffn(x)


def test_two_identical_experts_are_the_dense_model():
    model = dense()
    new, receipt = Copy(num_experts=2).build(model, text=TEXT)
    assert receipt.measured.relative <= 1e-6
    assert receipt.bound == 1e-6
    assert new.config.moe.num_experts == 2
    for e in range(2):
        assert torch.equal(new.layers[0].ffn.experts.gate_up[e], model.layers[0].ffn.gate_up)
    exact, double = Copy(num_experts=2).build(dense(torch.float64), text=TEXT)
    assert double.measured.relative <= 1e-12
    assert double.bound == 1e-12
    assert exact.head.weight.dtype == torch.float64


def test_one_expert_of_weight_one_is_the_dense_model_bit_for_bit():
    for dtype in (torch.float32, torch.float64):
        _, receipt = Copy(num_experts=2, top_k=1).build(dense(dtype), text=TEXT)
        assert receipt.bound == 0.0
        assert receipt.measured.relative <= 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(4, 2, 2), (8, 8, 4), (10, 5, 5)])
def test_every_token_meets_every_slice_once_per_copy(dtype, bound, experts, top_k, granularity):
    options = GranularSplit(num_experts=experts, top_k=top_k, granularity=granularity, router_std=1.0)
    model = dense(dtype)
    new, receipt = options.build(model, text=TEXT)
    assert receipt.measured.relative <= bound == receipt.bound
    times = "once" if top_k == granularity else f"{top_k // granularity} times"
    assert receipt.notes[-1] == f"each of {2 * TEXT.numel()} routed tokens met each slice exactly {times}"
    _, _, trail = new(TEXT)
    for record in trail.values():
        slices = (record.plan.expert % granularity).sort(1).values
        want = torch.arange(granularity).repeat_interleave(top_k // granularity)
        assert torch.equal(slices, want.expand_as(slices))
    first = experts_of(new.layers[0].ffn.experts)[0]
    width = model.layers[0].ffn.down.shape[1] // granularity
    assert torch.equal(first.down, model.layers[0].ffn.down[:, :width] * granularity)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_mean_of_all_slices_is_the_dense_layer(dtype, bound):
    """41: an averaging combine wants slices times N. Few of them estimate the layer; equal logits are equal weights."""
    ffn = PlainFeedForward(width=20, bias=True)
    model = moved(decoders()["moe"].replace(moe=None, ffn=ffn), dtype)
    new, receipt = Modular(num_experts=5, top_k=5).build(model, text=TEXT)
    assert receipt.measured.relative <= bound == receipt.bound
    assert not any(p.requires_grad for n, p in new.named_parameters() if "router" in n)
    assert "layers.0.ffn.router.score.inner.weight" in receipt.invented
    old, made = find(model)[0].mlp, experts_of(new.layers[0].ffn.experts)
    assert torch.equal(made[2].up, old.up[8:12])
    assert torch.equal(made[2].down, old.down[:, 8:12] * 5)
    assert torch.equal(made[2].down_bias, old.down_bias)
    dim = new.config.dim
    assert new.config.num_params() - model.config.num_params() == 2 * ((5 - 1) * dim + 5 * dim)  # biases; routers
    x = torch.randn(64, dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    layer = new.layers[0].ffn
    each = torch.stack([expert(x) for expert in made])
    y, _, trail = layer(x, Signals(knobs={"top_k": 2}))
    (chosen,) = (plan.expert for plan in trail.plans().values())
    assert_close("mean of the chosen", y, each.gather(0, chosen.T[..., None].expand(2, 64, dim)).mean(0), 10 * bound)
    assert chosen[:, 0].unique().numel() > 2  # every slice has a router row of its own
    published, receipt = Modular(num_experts=5, top_k=5, weigh=SoftmaxKept(), router_std=0.0).build(model, text=TEXT)
    assert receipt.exact is None
    assert_close("softmax of equal logits", published(TEXT)[0], model(TEXT)[0], 10 * bound)


def test_a_share_of_neurons_is_redrawn_like_the_original():
    model = dense()
    new, receipt = PartialReinit(num_experts=3, share=0.25).build(model, text=TEXT)
    old = find(model)[0].mlp
    changed = []
    for expert in experts_of(new.layers[0].ffn.experts):
        same = (expert.up == old.up).all(1)
        assert torch.equal(same, (expert.down == old.down).all(0))
        assert int((~same).sum()) == round(0.25 * old.width)
        changed.append(same)
    assert not torch.equal(changed[0], changed[1])
    assert receipt.exact is None
    assert "layers.0.ffn.experts.down" in receipt.invented
    wide = PartialReinit(num_experts=2, share=1.0).build(moved(decoders()["moe"].replace(moe=None, dim=64)), text=TEXT)
    for name in ("down", "gate_up"):
        drawn = getattr(wide[0].layers[0].ffn.experts, name)
        source = getattr(moved(decoders()["moe"].replace(moe=None, dim=64)).layers[0].ffn, name)
        assert float(drawn.detach().std() / source.detach().std()) == pytest.approx(1, abs=0.1)


def test_kmeans_finds_what_is_apart_and_fills_evenly():
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0], [9.1], [5.0]])
    label, centres = kmeans(points, 3, torch.Generator().manual_seed(0))
    assert len({int(label[0]), int(label[3]), int(label[5])}) == 3
    assert int(label[0]) == int(label[2])
    assert sorted(round(float(c), 2) for c in centres[:, 0]) == [0.1, 5.0, 9.05]
    even, _ = kmeans(points, 3, torch.Generator().manual_seed(0), balanced=True)
    assert torch.bincount(even).tolist() == [2, 2, 2]
    with pytest.raises(UserError, match="2 points cannot form 3 clusters"):
        kmeans(points[:2], 3, torch.Generator())


def test_importance_of_a_neuron_is_its_activation_times_its_slope():
    model = Plain()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    found = importance(model, find(model), _inputs(x), lambda m, b: m(b).sum())
    # activations [[1, 2, 3], [3, 0, 2]]; the loss's slope for a neuron is its column's sum: [1, 3, 2]
    assert found["ffn"].tolist() == [1 * 4, 3 * 2, 2 * 5]


def _inputs(x):
    from moestro.convert.change.samples import Samples

    return Samples((x,), "inputs")


def test_the_most_important_neurons_are_shared_and_the_rest_dealt_by_rank():
    model = Plain()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    options = Taylor(num_experts=2, top_k=2, shared=0.34)
    new, _ = options.build(model, text=x, loss=lambda m, b: m(b).sum())
    layer = new.ffn
    assert isinstance(layer, MoE)
    assert layer.shared.up[0].tolist() == [[1, 1]]  # the third neuron, importance 10
    assert layer.shared.down_bias[0].tolist() == [0.5, 0]
    assert layer.experts.up[:, 0].tolist() == [[0, 1], [1, 0]]  # importance 6, then 4
    assert not layer.experts.down_bias.any()


def test_groups_of_neurons_may_differ_in_width():
    model = dense()
    options = Cluster(num_experts=3, balanced=False, by="activations")
    new, receipt = options.build(model, text=TEXT)
    widths = new.layers[0].ffn.config.experts.width
    assert sum(widths) == model.layers[0].ffn.down.shape[1]
    assert receipt.params_after - receipt.params_before == 2 * 3 * 16  # routers only


def test_counts_differ_per_layer_and_some_layers_stay():
    new, receipt = Copy(num_experts=(3, 5)).build(dense())
    assert new.config.num_experts == (3, 5)
    assert receipt.measured.source == "random tokens"
    assert receipt.measured.bits_before is None
    one, _ = Copy(num_experts=(3,), layers=(1,)).build(dense())
    assert one.config.kinds() == ("dense", "moe")
    pruned, receipt = Prune(keep=(2, 3), score="load").build(new, text=TEXT)
    assert pruned.config.num_experts == (2, 3)
    assert [(w.experts_before, w.experts_after) for w in receipt.layers] == [(3, 2), (5, 3)]


def test_there_and_back_is_the_same_model():
    model = dense()
    new, _ = Copy(num_experts=3).build(model)
    for options in (Average(), MostLoaded()):
        back, receipt = options.build(new, text=TEXT)
        assert back.config == model.config
        assert all(torch.equal(a, back.state_dict()[n]) for n, a in model.state_dict().items())
        assert receipt.bound == 1e-6


def test_the_mean_of_two_experts_by_hand():
    new, _ = Copy(num_experts=2).build(dense())
    with torch.no_grad():
        new.layers[0].ffn.experts.down[0].fill_(1.0)
        new.layers[0].ffn.experts.down[1].fill_(4.0)
    back, receipt = Average().build(new)
    assert bool((back.layers[0].ffn.down == 2.5).all())
    assert receipt.exact is None
    merged, _ = MergeExperts(keep=2).build(_four(), text=TEXT)
    assert merged.config.moe.num_experts == 2


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_averaged_experts_become_the_dense_model_that_evaluation_shows(plain, dtype, bound):
    """48, Experts Weights Averaging: the layer in evaluation, and the dense model with its parameters and names."""
    config = decoders()["moe"].replace(moe=None)
    bank, ffn = Gated(width=20), config.ffn
    if plain:
        bank, ffn = (
            MLP(width=20, activation="gelu", bias=True),
            PlainFeedForward(width=20, activation="gelu", bias=True),
        )
    layer = AveragedExperts(num_experts=3, experts=bank)
    model = moved(config.replace(moe=layer, ffn=ffn), dtype)
    back, receipt = Average().build(model, text=TEXT)
    wanted = config.replace(ffn=ffn)
    assert back.config == wanted
    assert {n: t.shape for n, t in back.state_dict().items()} == {
        n: t.shape for n, t in wanted.build().state_dict().items()
    }
    assert receipt.params_after == receipt.active_after == wanted.num_params()
    assert receipt.exact == "the mean of the experts is what each layer shows in evaluation"
    assert receipt.bound == bound
    assert_close("logits", back(TEXT)[0], model(TEXT)[0], bound)
    assert_close("down", back.layers[1].ffn.down, model.layers[1].ffn.experts.down.mean(0), bound)
    _, other = MostLoaded().build(model, text=TEXT)
    assert other.exact is None
    mixed = config.replace(num_layers=3, blocks=(Block(ffn=layer), Block(ffn=ffn), Block(ffn=layer)))
    check_conversion(lambda m: Average(layers=(1,)).build(m, text=TEXT), mixed.build, lambda m: m(TEXT)[0], exact=1e-6)


def _four():
    model, _ = Copy(num_experts=4).build(dense())
    with torch.no_grad():  # 0 and 2 alike, 1 and 3 alike
        for e in (1, 3):
            model.layers[0].ffn.experts.down[e].mul_(-1)
            model.layers[1].ffn.experts.down[e].mul_(-1)
    return model


def test_alike_experts_are_merged_and_pruned():
    for score in ("output_similarity", "weight_similarity"):
        new, receipt = MergeExperts(keep=2, score=score).build(_four(), text=TEXT)
        assert receipt.notes[0] == "layers.0.ffn: groups [[0, 2], [1, 3]]"
        a, b = new.layers[0].ffn.experts.down
        assert torch.equal(a, -b)
        left, receipt = Prune(keep=2, score=score).build(_four(), text=TEXT)
        c, d = left.layers[0].ffn.experts.down
        assert torch.equal(c, -d)


def test_the_expert_that_adds_least_goes_and_router_rows_follow():
    model, _ = Copy(num_experts=4).build(dense())
    with torch.no_grad():
        model.layers[0].ffn.experts.down[1].mul_(1e-4)
    rows = model.layers[0].ffn.router.score.weight.clone()
    new, receipt = Prune(keep=3, layers=(0,)).build(model, text=TEXT)
    assert receipt.notes == ("layers.0.ffn: experts [0, 2, 3] kept",)
    assert torch.equal(new.layers[0].ffn.router.score.weight, rows[[0, 2, 3]])
    more, _ = AddExperts(add=2).build(new, text=TEXT)
    assert torch.equal(more.layers[0].ffn.router.score.weight, rows[[0, 2, 3, 0, 2]])


def test_a_false_claim_is_refused():
    model, options = dense(), Copy(num_experts=2)

    def make(samples):
        new, _ = PartialReinit(num_experts=2).build(model)
        return Made(model=new, paths=["layers.0.ffn"], claim=Claim("nothing changes"))

    with pytest.raises(ConversionError, match="nothing changes: not so"):
        conduct(options, model, make, text=TEXT)


def test_a_receipt_is_written_read_and_verified(tmp_path):
    new, receipt = Copy(num_experts=2).build(dense(), text=TEXT, num_bytes=100)
    receipt.write(tmp_path)
    assert read(tmp_path) == receipt
    verify(new, receipt)
    assert receipt.measured.unit == "byte"
    assert len(receipt.checksums["layers.0.ffn.experts.down"]) == 2
    assert len(set(receipt.checksums["layers.0.ffn.experts.down"])) == 1
    with torch.no_grad():
        new.layers[0].ffn.experts.down[1, 0, 0] += 1
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.experts\.down differ"):
        verify(new, receipt)
    with pytest.raises(UserError, match="not a whole receipt"):
        Receipt.from_dict({"format": 1})


def test_low_precision_is_checked_in_float64():
    _, receipt = Copy(num_experts=4).build(dense(torch.bfloat16), text=TEXT)
    assert receipt.exact is not None
    assert "checked in float64" in receipt.notes[0]


def test_what_is_refused():
    model = dense()
    for options, message in (
        (Copy(layers=(7,)), "7 is none of the 2 layers"),
        (Copy(num_experts=(2, 2, 2)), "3 numbers for 2 converted layers"),
        (Taylor(), "give text"),
        (Copy(router="centroids"), "give text"),
        (GranularSplit(num_experts=6, top_k=3, granularity=3), "width 20 is no multiple of granularity 3"),
        (Modular(num_experts=3, top_k=3), "width 20 is no multiple of num_experts 3"),
        (Average(), "no routed layer"),
    ):
        with pytest.raises(UserError, match=message):
            options.build(model)
    with pytest.raises(UserError, match="no multiple of granularity"):
        GranularSplit(num_experts=8, top_k=3)
    with pytest.raises(UserError, match="below top_k"):
        Copy(num_experts=1)
    routed, _ = Copy(num_experts=4).build(model)
    with pytest.raises(UserError, match="fewer than the 2 that every token meets"):
        Prune(keep=1).build(routed, text=TEXT)
    with pytest.raises(UserError, match="no dense feed-forward layer"):
        Copy().build(routed)


def test_weights_that_do_not_sum_to_one_claim_nothing():
    _, receipt = Copy(num_experts=4, weigh=Raw()).build(dense(), text=TEXT)
    assert receipt.exact is None
    assert receipt.measured.relative > 1e-3
    assert dataclasses.asdict(receipt.measured)["bits_after"] != receipt.measured.bits_before
