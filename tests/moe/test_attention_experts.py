"""Attention experts (05, BAM): a sum of plain attentions, by gates of the token that asks; parameters to the unit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.core.carry import Carry
from moestro.core.signals import Signals
from moestro.experts import Gated
from moestro.models.config import Decoder, ParallelBlock
from moestro.moe.attention import into_experts, per_expert
from moestro.moe.config import AttentionExperts, MoELayer
from moestro.nn.config import Attention, FeedForward
from moestro.routers import Raw, Router, TopK
from moestro.testing.compare import assert_close

ONE = Attention(num_heads=4, num_kv_heads=2, head_dim=6, bias="qkv")
N, D = 3, 16


def made(**changes: object) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """A module of attention experts, and N plain attentions with the same parameters, in float64."""
    torch.manual_seed(0)
    module = AttentionExperts(num_experts=N, attention=ONE, **changes).build(D).double()  # type: ignore[arg-type]
    plain = [ONE.build(D).double() for _ in range(N)]
    if module.config.shared_kv:
        for other in plain[1:]:
            other.k.load_state_dict(plain[0].k.state_dict())
            other.v.load_state_dict(plain[0].v.state_dict())
    with torch.no_grad():
        for name, parameter in module.attention.named_parameters():
            parts = [dict(p.named_parameters())[name] for p in plain]
            shared = module.config.shared_kv and name[0] in "kv"
            parameter.copy_(parts[0] if shared else into_experts(module, name, parts))
            if not shared:
                assert torch.equal(per_expert(module, name, parameter), torch.stack(parts))
    return module, plain


def explicit(module: torch.nn.Module, plain: list[torch.nn.Module], x: Tensor, gates: Tensor) -> Tensor:
    return sum(gates[..., j, None] * plain[j](x)[0] for j in range(N))


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("k", [None, 1, 2])
def test_it_is_the_sum_of_plain_attentions(shared_kv: bool, k: int | None) -> None:
    changes = {} if k is None else {"router": Router(select=TopK(k=k), weigh=Raw())}
    module, plain = made(shared_kv=shared_kv, **changes)
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    y, _, _, trail = module(x)
    gates = torch.softmax(x @ module.router.score.weight.T, dim=-1)
    if k is not None:
        gates = torch.where(gates >= gates.topk(k).values[..., -1:], gates, 0.0)
    want = explicit(module, plain, x, gates)
    assert_close("y", y, want, 1e-12)
    seed = torch.randn_like(y)
    got = torch.autograd.grad((y * seed).sum(), [x, module.router.score.weight])
    wanted = torch.autograd.grad((want * seed).sum(), [x, module.router.score.weight])
    for name, a, b in zip(("x", "router"), got, wanted):
        assert_close(f"gradient of {name}", a, b, 1e-10)
    (record,) = trail.records.values()
    assert record.demand.tolist() == ([14] * N if k is None else record.demand.tolist())
    assert int(record.demand.sum()) == 14 * (k or N)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_identical_experts_are_the_plain_attention(shared_kv: bool) -> None:
    module, plain = made(shared_kv=shared_kv)
    with torch.no_grad():
        for name, parameter in module.attention.named_parameters():
            parts = [dict(plain[0].named_parameters())[name]] * N
            parameter.copy_(parts[0] if shared_kv and name[0] in "kv" else into_experts(module, name, parts))
    x = torch.randn(2, 7, D, dtype=torch.float64)
    assert_close("y", module(x)[0], plain[0](x)[0], 1e-12)


@pytest.mark.parametrize(("shared_kv", "entries"), [(False, 2 * N), (True, 2)])
def test_the_cache_holds_what_was_promised_and_continues(shared_kv: bool, entries: int) -> None:
    module, _ = made(shared_kv=shared_kv)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    want = module(x)[0]
    state, parts = module.new_state(7), []
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 4), (4, 5), (5, 7)):
            signals = Signals(unit_id=None)
            y, state, _, _ = module(x[:, start:stop], signals, state, Carry())
            parts.append(y)
    assert state.key.shape[1] == entries
    assert_close("cached", torch.cat(parts, 1), want, 1e-10)


def bam(mixer: AttentionExperts | Attention, ffn: MoELayer | FeedForward) -> Decoder:
    return Decoder(vocab_size=256_000, dim=1024, num_layers=6, blocks=(ParallelBlock(mixer=mixer, ffn=ffn),) * 6)


def test_published_totals_to_the_unit() -> None:
    """The brief's four totals, small size: 8 heads, 2048 hidden units, 4 experts, untied embeddings of 256,000."""
    one, dense = Attention(num_heads=8), FeedForward(width=2048)
    moe = MoELayer(num_experts=4, router=Router(select=TopK(k=1), weigh=Raw()), experts=Gated(width=2048))
    assert bam(one, dense).num_params() == 587_209_728
    assert bam(one, moe).num_params() == 700_480_512
    expert_kv = bam(AttentionExperts(attention=one), moe)
    assert expert_kv.num_params() == 776_002_560
    assert expert_kv.num_active_params() == 662_756_352  # both routers counted; the paper prints 24,576 less
    assert bam(AttentionExperts(attention=one, shared_kv=True), moe).num_params() == 738_253_824


def test_published_flops_of_one_layer() -> None:
    """Table 10 at 256 tokens: forward FLOPs per token of one block, without embeddings and head."""
    one = Attention(num_heads=8)
    moe = MoELayer(num_experts=4, router=Router(select=TopK(k=1), weigh=Raw()), experts=Gated(width=2048))
    for mixer, printed in ((one, 21.5e6), (AttentionExperts(attention=one), 48.3e6)):
        block = ParallelBlock(mixer=mixer, ffn=moe)
        # the paper counts scores once, as 2 n d; we count scores and their product with the values, 4 n d
        heads = 4 if isinstance(mixer, AttentionExperts) else 1
        ours = block.flops_per_token(256, dim=1024) - heads * 2 * 256 * 1024
        assert ours == pytest.approx(printed, rel=0.005)
