"""Embeddings that are fixed in advance (brief 45): bits of the number, pictures of characters, tables from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moestro import convert
from moestro.core.account import cost
from moestro.core.errors import UserError
from moestro.models import Decoder, EncoderDecoder, encoder_decoders, examples
from moestro.nn import FrozenTable, Glyphs, IdCode, LayerNorm, PlainFeedForward
from moestro.nn.embedding import read_table
from moestro.nn.glyphs import bitmaps, code_points, glyph_table, polar_order

BASE = examples()["dense"]


def test_brief_45_id_code_by_hand():
    table = IdCode(bits=4).build(11, 8).weight
    assert table[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0]
    assert table[1].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    assert table[10].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]  # 10 = 2 + 8


def test_brief_45_id_code_tells_tokens_apart_with_a_rank_of_its_bits():
    table = IdCode().build(3000, 32).weight
    assert len(table.unique(dim=0)) == 3000
    assert int(torch.linalg.matrix_rank(table)) == 12  # 3000 tokens use 12 of the 16 bits
    assert torch.equal(table[:, :16], table[:, 16:])


@pytest.mark.parametrize(("vocab", "dim", "said"), [(300, 16, "tell 256 tokens apart"), (20, 12, "no multiple of")])
def test_id_code_refuses_sizes(vocab, dim, said):
    with pytest.raises(UserError, match=said):
        IdCode(bits=8).build(vocab, dim)


def test_brief_45_active_parameters_of_the_published_shapes():
    """105.0M trained in a stage, 180.5M with frozen and 247.6M with trained embeddings, to rounding."""
    model = Decoder(
        vocab_size=65_536,
        dim=1024,
        num_layers=9,
        attention=BASE.attention.replace(num_heads=32, num_kv_heads=32, head_dim=32),
        ffn=PlainFeedForward(width=4096, bias=True),
        norm=LayerNorm(),
        head_bias=True,  # with it and biases in the MLPs alone, all four published figures come out
        context=1024,
    )
    frozen = model.replace(embedding=IdCode())
    assert round(model.num_params() / 1e6, 1) == 247.6
    assert round(frozen.num_params() / 1e6, 1) == 180.5
    assert frozen.flops_per_token(8) == model.flops_per_token(8)
    with torch.device("meta"):
        built = frozen.build()
    stage = sum(cost(m).params for m in (*built.layers[:3], built.head))
    assert round(stage / 1e6, 1) == 105.0
    assert round((frozen.num_params() + 65_536 * 16) / 1e6, 1) == 181.6  # with the code as they store it, [V, 16]


def test_no_step_moves_a_frozen_embedding_and_no_gradient_reaches_it():
    model = BASE.replace(embedding=Glyphs(cell=8), dim=16).build()
    before = model.embed.weight.clone()
    assert "embed.weight" not in dict(model.named_parameters())
    tokens = torch.arange(20)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.loss(tokens, tokens)[0].backward()
    optimizer.step()
    assert torch.equal(model.embed.weight, before)
    model.initialise(7)
    assert torch.equal(model.embed.weight, before)


def test_the_code_survives_casts_and_the_meta_device_without_being_saved():
    config = BASE.replace(embedding=IdCode(bits=8))
    with torch.device("meta"):
        model = config.build()
    assert "embed.weight" not in model.state_dict()
    model.to_empty(device="cpu")
    assert torch.equal(model.embed.weight, config.build().embed.weight)
    half = config.build().to(torch.bfloat16)
    assert half(torch.arange(9)[None])[0].dtype == torch.bfloat16
    assert torch.equal(half.embed.weight.float(), model.embed.weight)


def test_brief_45_glyphs_have_norm_one_and_repeat():
    table = Glyphs(cell=24).build(256, 64).weight
    assert torch.allclose(table.norm(dim=1), torch.ones(256))
    assert torch.equal(table, Glyphs(cell=24).build(256, 64).weight)
    assert len(table.unique(dim=0)) == 256


def test_bitmaps_are_pictures():
    """Black is 1; a stroke stands where it should; what cannot be seen shows its number."""
    bar, under, space, wide = bitmaps(["|", "_", " ", "||"], 24)
    assert bar.max() == 1
    assert bar[:, 9:15].sum() == bar.sum() > 0
    assert under[:16].sum() == 0 < under[16:].sum()
    assert space.sum() == 0
    assert wide[:, :12].sum() > 0
    assert wide[:, 12:].sum() > 0
    assert code_points(66)[10] == "0A"
    assert code_points(66)[65] == "A"


def test_pixels_go_from_the_centre_outwards():
    assert polar_order(2).tolist() == [0, 1, 3, 2]  # one radius; angles -135, -45, 45, 135 degrees
    order = polar_order(4).tolist()
    assert sorted(order[:4]) == [5, 6, 9, 10]
    assert sorted(order[-4:]) == [0, 3, 12, 15]


def test_components_that_a_vocabulary_lacks_are_zero():
    table = glyph_table(["a", "b", "c"], 6, 8)
    assert bool((table[:, 2:] == 0).all())
    assert bool((table[:, :2] != 0).any(0).all())  # three points span a plane
    with pytest.raises(UserError, match="raise cell"):
        glyph_table(["a"], 17, 4)
    with pytest.raises(UserError, match="cannot be read"):
        Glyphs(font=__file__).build(8, 8)


@pytest.mark.parametrize("suffix", ["safetensors", "npy", "pt"])
def test_a_table_from_a_file_goes_into_the_model_and_its_checkpoint(tmp_path, suffix):
    """The authors' layout: normalized_embeddings_weights, fp32 [V, dim]."""
    table = torch.randn(37, 16)
    path = tmp_path / f"normalized_embeddings_weights.{suffix}"
    if suffix == "npy":
        np.save(path, table.numpy())
    elif suffix == "pt":
        torch.save(table, path)
    else:
        save_file({"weight": table}, path)
    config = BASE.replace(embedding=FrozenTable(path=str(path)))
    model = config.build()
    assert torch.equal(model.embed.weight, table)
    assert torch.equal(model.state_dict()["embed.weight"], table)
    path.unlink()
    with torch.device("meta"):
        other = config.build()
    other.to_empty(device="cpu")
    assert bool(other.embed.weight.isnan().all())  # not anything that could pass for a table
    other.load_state_dict(model.state_dict())
    tokens = torch.arange(9)[None]
    assert torch.equal(other(tokens)[0], model(tokens)[0])
    with pytest.raises(UserError, match="is no file"):
        config.build()


def test_files_that_are_no_tables(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    torch.save({"a": object}, tmp_path / "code.pt")
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    save_file({"a": torch.full((2, 2), float("nan"))}, tmp_path / "nan.safetensors")
    (tmp_path / "table.csv").write_text("1,2")
    said = {"objects.npy": "no plain", "code.pt": "no plain", "two.safetensors": "set FrozenTable.name"}
    for name, text in (said | {"nan.safetensors": "finite", "table.csv": "are read from"}).items():
        with pytest.raises(UserError, match=text):
            read_table(tmp_path / name)
    assert read_table(tmp_path / "two.safetensors", "b").shape == (2, 2)
    with pytest.raises(UserError, match=r"\[2, 2\], the model needs \[37, 16\]"):
        BASE.replace(embedding=FrozenTable(path=str(tmp_path / "two.safetensors"), name="a")).build()


def test_an_encoder_decoder_shares_a_frozen_table():
    pair = encoder_decoders()["dense"]
    config: EncoderDecoder = pair.replace(decoder=pair.decoder.replace(embedding=IdCode(bits=8)))
    model = config.build()
    assert model.encoder.embed.weight is model.decoder.embed.weight
    assert not any("embed" in n for n, _ in model.named_parameters())


def test_the_config_travels_as_json():
    config = BASE.replace(embedding=IdCode(bits=8))
    assert Decoder.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("embedding", [IdCode(bits=8), Glyphs(cell=8)])
def test_checkpoints_hold_it_and_other_families_refuse_it(tmp_path, embedding):
    model = BASE.replace(embedding=embedding).build().eval()
    convert.save(model, tmp_path / "own")
    again = convert.load(tmp_path / "own").model
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    with pytest.raises(UserError, match="embedding"):
        convert.save(model, tmp_path / "theirs", to="llama")
