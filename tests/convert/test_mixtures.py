"""Several models into one (BTX; 05, BAM): the sources' own modules, the published totals, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from moestro.convert.config import BranchAttendMix, BranchTrainMix, Copy
from moestro.convert.merge.table import mixture
from moestro.convert.receipt import verify
from moestro.core.errors import UserError
from moestro.losses import SwitchBalance, ZLoss
from moestro.models.config import Block, Decoder, ParallelBlock
from moestro.models.examples import encoders
from moestro.models.examples import examples as decoders
from moestro.moe.attention import per_expert
from moestro.nn.config import Attention, FeedForward, LatentAttention
from moestro.routers.config import Constant, Raw, Renormalised
from moestro.testing.compare import assert_close

TEXT = torch.randint(0, 37, (3, 16), generator=torch.Generator().manual_seed(3))
ONE, FFN = Attention(num_heads=4, num_kv_heads=2, head_dim=6, bias="qkv"), FeedForward(width=20)
N = 3


def config(kind=Block, **mixer):
    return decoders()["dense"].replace(blocks=(kind(mixer=ONE.replace(**mixer), ffn=FFN),) * 2)


def models(config, dtype=torch.float64, count=N, seed=0):
    """Models of which no two tensors are alike."""
    made = []
    for i in range(count):
        model, generator = config.build(), torch.Generator().manual_seed(seed + i)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
        made.append(model.to(dtype).eval())
    return made


def gates(router, x, k):
    """[B, S, E]: the softmax, the k highest of it kept as they are."""
    probs = torch.softmax(x @ router.score.weight.T, dim=-1)
    return torch.where(probs >= probs.topk(k, dim=-1).values[..., -1:], probs, 0.0)


def mean(tensors):
    return torch.stack(list(tensors)).mean(0)


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
@pytest.mark.parametrize(
    "options",
    [
        BranchAttendMix(router_std=1.0),
        BranchAttendMix(router_std=1.0, shared_kv=True, top_k=2, weigh=Raw()),
        BranchAttendMix(router_std=1.0, attention_top_k=1, extra=1),
        BranchTrainMix(router_std=1.0, top_k=1),
    ],
    ids=["soft", "shared", "top", "btx"],
)
def test_a_block_is_the_sum_of_the_sources_own_layers(kind, options):
    """y_att = sum_j a_j(x) Attention_j(x), y_ffn = sum over chosen i of g_i(x) FFN_i(x), all else the mean."""
    sources = models(config(kind))
    new, receipt = options.build(sources, text=TEXT)
    verify(new, receipt)
    blocks, block = [m.layers[1] for m in sources], new.layers[1]
    h = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norms = ["norm"] * 2 if kind is ParallelBlock else ["mixer_norm", "ffn_norm"]
    for name in norms:
        assert_close("norm", getattr(block, name).weight, mean(getattr(b, name).weight for b in blocks), 1e-12)
    plain = [copy.deepcopy(b.mixer) for b in blocks]
    if getattr(options, "shared_kv", False) or isinstance(options, BranchTrainMix):
        names = ("q", "k", "v", "o") if isinstance(options, BranchTrainMix) else ("k", "v")
        for name in names:
            for part, own in plain[0].get_submodule(name).named_parameters():
                value = mean(b.mixer.get_parameter(f"{name}.{part}") for b in blocks)
                for mixer in plain:
                    mixer.get_parameter(f"{name}.{part}").data.copy_(value)
                assert own.shape == value.shape
    x = getattr(block, norms[0])(h)
    if isinstance(options, BranchTrainMix):
        y = plain[0](x)[0]
    else:
        a = gates(block.mixer.router, x, options.attention_top_k or N)
        y = sum(a[..., j, None] * plain[j](x)[0] for j in range(N))
    x = x if kind is ParallelBlock else getattr(block, norms[1])(h + y)
    ffns = [b.ffn for b in blocks] + [blocks[0].ffn] * options.extra
    g = gates(block.ffn.router, x, options.top_k)
    z = sum(g[..., i, None] * ffn(x)[0] for i, ffn in enumerate(ffns))
    with torch.no_grad():
        got, _, trail = block(h, *_empty())
    assert_close("block", got, h + y + z, 1e-10)
    record = next(r for k, r in trail.records.items() if k.path == "ffn")
    assert {t.loss.name: t.loss.coefficient for t in record.terms.values()} == {
        "load_balancing_loss": 1e-2,
        "z_loss": 1e-3,
    }
    assert_close("embedding", new.embed.weight, mean(m.embed.weight for m in sources), 1e-12)
    assert_close("head", new.head.weight, mean(m.head.weight for m in sources), 1e-12)


def _empty():
    from moestro.core.carry import Carry
    from moestro.core.signals import Signals

    return Signals(), Carry()


def test_the_published_totals_come_out_of_the_conversion():
    """590M seed of the brief, by the function that the conversion itself builds from."""
    dense = Decoder(
        vocab_size=256_000,
        dim=1024,
        num_layers=6,
        blocks=(ParallelBlock(mixer=Attention(num_heads=8), ffn=FeedForward(width=2048)),) * 6,
    )
    assert dense.num_params() == 587_209_728
    assert mixture(BranchTrainMix(top_k=1), dense, 4).num_params() == 700_480_512
    bam = mixture(BranchAttendMix(), dense, 4)
    assert (bam.num_params(), bam.num_active_params()) == (776_002_560, 662_756_352)
    assert mixture(BranchAttendMix(shared_kv=True), dense, 4).num_params() == 738_253_824
    assert bam.blocks is not None
    assert bam.blocks[0].ffn.losses == (SwitchBalance(coefficient=1e-2), ZLoss(coefficient=1e-3))
    # the same number of parameters with six experts, the further two copied from the seed
    wide = mixture(BranchTrainMix(top_k=3, extra=2), dense, 4)
    assert wide.num_params() == 700_480_512 + 6 * 2 * (3 * 1024 * 2048 + 1024)


def test_the_model_is_built_from_that_config():
    for options in (BranchTrainMix(), BranchAttendMix(shared_kv=True), BranchAttendMix(layers=(1,))):
        for dense in (config(ParallelBlock), decoders()["dense"]):
            new, receipt = options.build(models(dense), text=TEXT)
            assert new.config == mixture(options, dense, N)
            assert receipt.params_after == new.config.num_params()
            assert receipt.params_before == dense.num_params()
    new, receipt = BranchTrainMix(extra=1, layers=(1,)).build(models(decoders()["dense"]))
    assert new.config.kinds() == ("dense", "moe")
    assert new.config.blocks is None
    bank, sources = new.layers[1].ffn.experts, models(decoders()["dense"])
    for e, source in enumerate([*sources, sources[0]]):
        assert torch.equal(bank.down[e], source.layers[1].ffn.down)
    assert receipt.measured.source == "random tokens"
    assert "4 more" not in receipt.notes[0]
    assert "one expert per source and 1 more of source 0" in receipt.notes[0]


def test_shared_keys_are_the_mean_and_queries_are_the_sources():
    sources = models(config())
    new, receipt = BranchAttendMix(shared_kv=True).build(sources, text=TEXT)
    mixer = new.layers[0].mixer
    assert_close("keys", mixer.attention.k.weight, mean(m.layers[0].mixer.k.weight for m in sources), 1e-12)
    want = torch.stack([m.layers[0].mixer.q.weight for m in sources])
    assert torch.equal(per_expert(mixer, "q.weight", mixer.attention.q.weight), want)
    assert set(receipt.invented) == {
        f"layers.{i}.{part}.router.score.weight" for i in (0, 1) for part in ("mixer", "ffn")
    }
    assert float(mixer.router.score.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", [Block, ParallelBlock])
@pytest.mark.parametrize("shared", [False, True])
def test_equal_sources_are_the_seed_whatever_the_gates_say(dtype, bound, kind, shared):
    source = models(config(kind), dtype, 1)[0]
    equal = [copy.deepcopy(source) for _ in range(N)]
    for options in (
        BranchAttendMix(shared_kv=shared, weigh=Constant(value=1.0), router_std=2.0),
        BranchAttendMix(shared_kv=shared, top_k=2, attention_top_k=2, router_std=2.0),
        BranchTrainMix(router_std=2.0, extra=int(shared)),
    ):
        new, receipt = options.build(equal, text=TEXT)
        assert receipt.bound == bound
        assert receipt.measured.relative <= bound
        assert_close("logits", new(TEXT)[0], source(TEXT)[0], bound)
    _, receipt = BranchAttendMix(shared_kv=shared, router_std=2.0, attention_top_k=1).build(equal, text=TEXT)
    assert receipt.exact is None
    assert receipt.measured.relative > 1e-3
    assert "up to the factor of its weights" in receipt.notes[-1]


def test_a_mixture_that_is_not_what_it_says_is_refused(monkeypatch):
    """Equal sources, and an expert that is another model's: the conversion raises, also with raw gates."""
    from moestro.convert.merge import specialists
    from moestro.convert.receipt import ConversionError

    right = specialists._tensor

    def wrong(options, made, name, origin, states):
        value = right(options, made, name, origin, states)
        return value * 1.01 if name == "layers.1.ffn.experts.down" else value

    monkeypatch.setattr(specialists, "_tensor", wrong)
    source = models(config(), count=1)[0]
    for options in (BranchTrainMix(), BranchAttendMix()):
        with pytest.raises(ConversionError, match="not so"):
            options.build([source, copy.deepcopy(source)], text=TEXT)


@torch.no_grad()
def test_the_receipt_compares_with_the_mean_and_with_each_source():
    sources = models(config(), torch.float32)
    new, receipt = BranchTrainMix().build(sources, text=TEXT, sources=["a", "b", "c"])
    want = mean(m(TEXT)[0] for m in sources)
    assert float((new(TEXT)[0] - want).norm() / want.norm()) == pytest.approx(receipt.measured.relative, rel=1e-4)
    assert receipt.sources == ("a", "b", "c")
    assert receipt.measured.against == "the mean of the outputs of 3 sources"
    for i, (name, source) in enumerate(zip("abc", sources)):
        note = next(n for n in receipt.notes if n.startswith(f"source {i} ({name}) alone"))
        found = float((new(TEXT)[0] - source(TEXT)[0]).norm() / source(TEXT)[0].norm())
        assert f"relative difference {found:.3g};" in note
    # by hand, the distance of a block: what it adds, over the sources' own inputs
    gap = size = 0.0
    for source in sources:
        h = source.embed(TEXT)
        old, made = source.layers[0](h, *_empty())[0], new.layers[0](h, *_empty())[0]
        gap, size = gap + float((made - old).square().sum()), size + float((old - h).square().sum())
    assert receipt.layers[0].distance == pytest.approx((gap / size) ** 0.5, rel=1e-4)
    assert (receipt.layers[0].path, receipt.layers[0].experts_after) == ("layers.0", 3)


def test_what_is_refused():
    dense = config()
    a, b = models(dense, count=2)
    small = dense.replace(vocab_size=31)
    latent = dense.replace(blocks=None, attention=LatentAttention(num_heads=2))
    for options, given, message in (
        (BranchTrainMix(), [a], "takes several models, found 1"),
        (BranchTrainMix(), a, "takes a list of models, not a Decoder"),
        (BranchTrainMix(), [a, a], "source 1 is another source's very model"),
        (BranchTrainMix(), [a, torch.nn.Linear(2, 2)], "source 1 is no decoder but a module called Linear"),
        (BranchTrainMix(), [a, encoders()["dense"].build()], "source 1 is no decoder but a module called Encoder"),
        (BranchTrainMix(), [a, small.build()], r"vocab_size \(31, not 37\): their tokenizers differ"),
        (BranchTrainMix(), [a, config(num_heads=2).build()], r"blocks\[0\].mixer.num_heads \(2, not 4\)"),
        (BranchTrainMix(), [a, copy.deepcopy(b).float()], "torch.float32 in source 1, .* torch.float64 in source 0"),
        (BranchTrainMix(top_k=3), [a, b], "top_k: 3 of 2 experts"),
        (BranchAttendMix(attention_top_k=3), [a, b], "attention_top_k: 3 of 2 attention experts"),
        (BranchAttendMix(layers=(5,)), [a, b], "5 is none of the 2 layers"),
        (BranchAttendMix(), models(config(qk_norm="full"), count=2), "qk_norm 'full' would be one norm"),
        (BranchAttendMix(), models(latent, count=2), "a LatentAttention cannot become an attention expert"),
        (BranchTrainMix(), models(decoders()["moe"], count=2), r"layers\.0\.ffn is routed already"),
        (BranchAttendMix(weigh=Renormalised()), [a, b], "the router would learn nothing"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            options.build(given, text=TEXT)
        assert "\n" not in str(caught.value)
    odd = copy.deepcopy(b)
    odd.layers[1].ffn.down = torch.nn.Parameter(torch.zeros(16, 21, dtype=torch.float64))
    with pytest.raises(UserError, match=r"layers\.1\.ffn\.down is \[16, 21\] .* in source 1, \[16, 20\]"):
        BranchTrainMix().build([a, odd], text=TEXT)
    with pytest.raises(UserError, match="extra must be at least 0"):
        BranchTrainMix(extra=-1)
    assert Copy.several is False


def test_sources_of_other_seeds_and_training_settings_fit_and_stay_as_they_are():
    a, b = models(config().replace(seed=1, dropout=0.1), count=1)[0], models(config(), count=1, seed=5)[0]
    before = copy.deepcopy(a.state_dict())
    a.layers[0].mixer.q.weight.requires_grad_(False)
    new, _ = BranchAttendMix().build([a, b], text=TEXT)
    assert all(torch.equal(t, before[n]) for n, t in a.state_dict().items())
    assert not new.layers[0].mixer.attention.q.weight.requires_grad
    assert new.layers[0].mixer.router.score.weight.requires_grad
    new.train()
    total, count, _, trail = new.loss(TEXT[:, :-1], TEXT[:, 1:])
    (total / count + trail.loss()).backward()
    assert all(p.grad is not None for p in new.parameters() if p.requires_grad)
