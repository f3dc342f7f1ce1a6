"""Dense models into experts that labels name (34): what brief 34 asks of a conversion, and enlarged experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moestro.convert.config import Copy, Extend, PartialReinit
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.experts.config import MLP
from moestro.models.config import Headed
from moestro.models.examples import encoders
from moestro.models.heads_config import EmbeddingHead
from moestro.nn.config import PlainFeedForward
from moestro.testing.compare import assert_close
from moestro.testing.conversions import check_conversion

TOKENS = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(3))
ENCODER = encoders()["dense"].replace(checkpoint=False)
HEADED = Headed(encoder=ENCODER, head=EmbeddingHead())
COPY = Copy(num_experts=3, top_k=1, router="label")


def labels(*domains: int) -> Signals:
    return Signals(label=torch.tensor(domains)[:, None].expand(4, 9).reshape(-1))


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("config", [ENCODER, HEADED], ids=["encoder", "headed"])
def test_conversion(config: Headed, layers: tuple[int, ...] | None) -> None:
    """Also of a model with a head; all layers, or one in the middle."""
    options = COPY.replace(layers=layers)
    told = Signals(label=torch.arange(TOKENS.numel()) % 3)
    check_conversion(
        lambda model: options.build(model, text=TOKENS), config.build, lambda model: model(TOKENS, told)[0], exact=1e-6
    )


@torch.no_grad()
def test_any_assignment_gives_the_dense_output() -> None:
    dense = HEADED.build()
    moe, receipt = COPY.build(dense)
    assert receipt.bound == 0.0
    for domains in ((0, 0, 0, 0), (2, 1, 0, 2), (1, 1, 2, 0)):
        assert_close("embeddings", moe(TOKENS, labels(*domains))[0], dense(TOKENS)[0], 1e-6)


def test_only_experts_named_in_a_batch_get_a_gradient_and_attention_always_does() -> None:
    moe, _ = COPY.build(HEADED.build())
    moe(TOKENS, labels(0, 2, 2, 0))[0].square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        if ".experts." in name:
            assert [bool(g.any()) for g in parameter.grad] == [True, False, True], name
        elif ".mixer." in name:
            assert parameter.grad.any(), name


@torch.no_grad()
def test_outputs_are_in_input_order_and_a_batch_of_one_domain_is_a_dense_pass() -> None:
    moe, _ = PartialReinit(num_experts=3, top_k=1, router="label", share=0.5).build(HEADED.build())
    whole, _, _ = moe(TOKENS, labels(2, 0, 2, 1))
    for e in range(3):
        dense = HEADED.build()
        state = moe.state_dict()
        own = {n.replace("experts.", ""): t[e] for n, t in state.items() if ".experts." in n}
        dense.load_state_dict({n: t for n, t in state.items() if ".experts." not in n} | own)
        alone = dense(TOKENS)[0]
        assert_close("one domain", moe(TOKENS, labels(e, e, e, e))[0], alone, 1e-5)
        mine = torch.tensor([2, 0, 2, 1]) == e
        assert_close("among others", whole[mine], alone[mine], 1e-5)


def test_labels_name_one_expert_and_reach_our_models_only() -> None:
    with pytest.raises(UserError, match="Copy.top_k: a label names one expert"):
        Copy(router="label")

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    with pytest.raises(UserError, match="mlp: labels reach routed layers in models of Moestro only"):
        COPY.build(Foreign(), text=torch.randn(2, 3, 8))


def test_first_version_of_brief_34_dense_to_copies_to_enlarged_experts() -> None:
    """W_new = 0 and b_new = 1: the expert equals the original MLP at the start."""
    dense = ENCODER.replace(ffn=PlainFeedForward(width=20, activation="gelu", bias=True)).build()
    moe, _ = COPY.build(dense, text=TOKENS)
    made, receipt = Extend(layers=(1,)).build(moe, text=TOKENS)
    assert receipt.bound == 1e-6
    assert set(receipt.invented) == {"layers.1.ffn.experts.new", "layers.1.ffn.experts.new_bias"}
    assert type(made.config.resolved()[0].ffn.experts) is MLP
    with torch.no_grad():
        assert_close("hidden", made(TOKENS, labels(1, 0, 2, 0))[0], dense(TOKENS)[0], 1e-6)
    with pytest.raises(UserError, match="no routed layer of plain MLP experts"):
        Extend().build(encoders()["moe"].build(), text=TOKENS)
