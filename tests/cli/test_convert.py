"""`moestro convert`: formats, methods as flags and YAML, receipts, and what is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch

from moestro import convert
from moestro.cli.app import run
from moestro.convert import receipt as receipts
from moestro.models.config import Decoder
from moestro.nn.config import Attention, FeedForward

CONFIG = Decoder(
    vocab_size=256, dim=16, num_layers=2, attention=Attention(num_kv_heads=2), ffn=FeedForward(width=24), context=64
)


@pytest.fixture
def at(tmp_path):
    """A folder with a small Llama and a text."""
    convert.save(CONFIG.build(), tmp_path / "llama", to="llama")
    (tmp_path / "text.txt").write_text("the same few words, again and again; " * 60)
    return tmp_path


def moestro(capsys, *line):
    status = run(["convert", *map(str, line)])
    found = capsys.readouterr()
    return status, found.out, found.err


def test_dense_to_moe_and_back(at, capsys):
    flags = ["--method", "copy", "--num-experts", 4, "--to", "mixtral", "--text", at / "text.txt"]
    status, out, _ = moestro(capsys, at / "llama", at / "moe", *flags)
    assert status == 0
    assert "1e-06" in out
    receipt = receipts.read(at / "moe")
    assert receipt.measured.unit == "byte"
    assert receipt.sources == (str(at / "llama"),)
    loaded = convert.load(at / "moe")
    assert loaded.family.model_type == "mixtral"
    receipts.verify(loaded.model, receipt)
    status, *_ = moestro(capsys, at / "moe", at / "dense", "--method", "average", "--to", "llama")
    assert status == 0
    old, new = convert.load(at / "llama").model.state_dict(), convert.load(at / "dense").model.state_dict()
    assert all(torch.equal(t, new[n]) for n, t in old.items())


def test_only_the_format(at, capsys):
    status, out, _ = moestro(capsys, at / "llama", at / "ours", "--to", "moestro", "--dtype", "bfloat16")
    assert status == 0
    assert "written" in out
    assert json.loads((at / "ours" / "config.json").read_text())["model_type"] == "moestro"
    assert convert.load(at / "ours").model.embed.weight.dtype == torch.bfloat16
    assert not (at / "ours" / "receipt.json").exists()


def test_a_recipe_and_flags_over_it(at, capsys):
    (at / "recipe.yaml").write_text(
        "method: granular\nnum_experts: 8\ngranularity: 2\nto: mixtral\nweigh: {type: routers.Renormalised}\n"
    )
    status, *_ = moestro(capsys, at / "llama", at / "out", "--recipe", at / "recipe.yaml", "--num-experts", 4)
    assert status == 0
    receipt = receipts.read(at / "out")
    assert receipt.method == "convert.GranularSplit"
    assert receipt.options["num_experts"] == 4
    assert receipt.options["weigh"]["type"] == "routers.Renormalised"
    assert convert.load(at / "out").family.model_type == "mixtral"


def test_options_that_are_parts_are_set_by_name(at, capsys):
    line = [at / "llama", at / "out", "--method", "copy", "--top-k", 1, "--set", "weigh=routers.Raw"]
    assert moestro(capsys, *line)[0] == 0
    assert receipts.read(at / "out").exact is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--method", "coppy"], "did you mean 'copy'"),
        (["--method", "copy", "--num-expert", "3"], "did you mean '--num-experts'"),
        (["--method", "taylor"], "give text"),
        (["--method", "copy", "--to", "mixtrl"], "mixtrl"),
        (["--method", "copy", "--top-k", "9"], "num_experts 8 is below top_k 9"),
        (["--method", "prune", "--text", "TEXT"], "no routed layer"),
        (["--method", "copy", "--text", "nowhere.txt"], "cannot read the text"),
        (["--method", "copy", "--to", "olmoe"], "cannot be written as olmoe"),
        (["--set", "weigh=routers.Raw"], "method none has no options"),
        (["--recipe", "RECIPE"], "did you mean 'num_experts'"),
        (["--recipe", "TAGGED"], "no valid YAML of plain values"),
        (["--recipe", "nowhere.yaml"], "cannot read the recipe"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(at, capsys, line, message):
    (at / "bad.yaml").write_text("method: copy\nnum_expert: 8\n")
    (at / "tagged.yaml").write_text("method: !!python/object/apply:os.system ['true']\n")
    names = {"TEXT": at / "text.txt", "RECIPE": at / "bad.yaml", "TAGGED": at / "tagged.yaml"}
    status, _, err = moestro(capsys, at / "llama", at / "out", *[names.get(part, part) for part in line])
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in at.iterdir()) == ["bad.yaml", "llama", "tagged.yaml", "text.txt"]


def test_sources_and_targets_that_cannot_be(at, capsys):
    for line, message in (
        ([at / "llama"], "name SOURCE and OUT"),
        ([at / "nothing", at / "out"], "no such folder"),
        ([at / "llama", at / "llama"], "exists already"),
        ([at / "llama", at / "llama", at / "out", "--method", "copy"], "takes one SOURCE, found 2"),
    ):
        status, _, err = moestro(capsys, *line)
        assert status == 2
        assert message in err


def test_help_lists_the_options_of_the_method(capsys):
    assert run(["convert", "--method", "granular", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--granularity" in out
    assert "--num-experts" in out


def test_a_run_is_a_source(trained, tmp_path, capsys):
    """The dense twin of a run becomes a MoE; its bytes are its tokens, and it is compared on its own text."""
    line = [
        trained.folder / "dense",
        tmp_path / "moe",
        "--method",
        "reinit",
        "--num-experts",
        2,
        "--text",
        trained.text,
    ]
    assert moestro(capsys, *line)[0] == 0
    receipt = receipts.read(tmp_path / "moe")
    assert receipt.measured.source == "text"
    assert receipt.measured.bits_before is not None
    receipts.verify(convert.load(tmp_path / "moe").model, receipt)
    assert moestro(capsys, trained.folder, tmp_path / "ours")[0] == 0
    assert convert.load(tmp_path / "ours").model.config.moe is not None
