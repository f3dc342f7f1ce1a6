"""Fluctuation between two states of a model, on a probe batch (03)."""

from __future__ import annotations

import copy

import pytest
import torch

from moestro.core.signals import Signals
from moestro.models.examples import encoder_decoders, examples
from moestro.moe import MoELayer
from moestro.routers import AttentionMix, Router, SimilarityMix, TopK
from moestro.trace.spending import certainty
from moestro.trace.stability import fluctuation_rate, jaccard, sets
from moestro.train.probe import probe

TOKENS = torch.randint(0, 7, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mix", [None, SimilarityMix(), AttentionMix()])
def test_a_model_against_itself_and_its_permuted_copy(mix):
    """0 against itself; high against the same function with its experts in another order; drawn anew, in between."""
    moe = MoELayer(num_experts=8, router=Router(mix=mix, select=TopK(k=2)))
    model = examples()["moe"].replace(moe=moe, init_std=None).build().train()
    before = sets(probe(model, TOKENS))
    assert model.training
    assert fluctuation_rate(before, sets(probe(model, TOKENS))) == 0.0
    assert set(jaccard(before, before).values()) == {1.0}
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in copied.layers:
            for p in (layer.ffn.router.score.weight, layer.ffn.experts.gate_up, layer.ffn.experts.down):
                p.copy_(p.roll(3, 0))
    torch.testing.assert_close(copied(TOKENS)[0], model(TOKENS)[0])
    assert fluctuation_rate(before, sets(probe(copied, TOKENS))) > 0.8


def test_entropies_before_and_after_the_mix_of_a_model():
    moe = MoELayer(num_experts=8, router=Router(mix=AttentionMix()))
    model = examples()["moe"].replace(moe=moe, init_std=None).build()
    for found in certainty(probe(model, TOKENS)).values():
        assert found.mean >= found.unmixed_mean, "entropy is concave"
        assert found.highest >= found.mean


def test_padding_of_a_probe_and_pairs_of_models():
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[:, 9:] = False
    found = sets(probe(examples()["moe"].build(), TOKENS, signals=Signals(valid=valid.reshape(-1))))
    assert all(one.valid.sum() == 36 for one in found.values())
    pair = encoder_decoders()["rotary"]
    pair = pair.replace(
        encoder=pair.encoder.replace(moe=examples()["moe"].moe), decoder=pair.decoder.replace(moe=examples()["moe"].moe)
    )
    assert {path.split(".")[0] for path in sets(probe(pair.build(), TOKENS, TOKENS))} == {"encoder", "decoder"}
