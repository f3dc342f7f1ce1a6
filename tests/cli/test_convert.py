"""`moestro convert`: formats, methods as flags and YAML, receipts, and what is refused in one line."""

from __future__ import annotations

import json
import shutil

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


@pytest.fixture
def three(at):
    """Three folders of small Llamas of one config."""
    for name, seed in (("b", 1), ("c", 2)):
        convert.save(CONFIG.replace(seed=seed).build(), at / name, to="llama")
    return [at / "llama", at / "b", at / "c"]


def test_several_models_into_one(at, three, capsys):
    flags = ["--method", "btx", "--to", "mixtral", "--text", at / "text.txt"]
    status, out, _ = moestro(capsys, *three, at / "btx", *flags)
    assert status == 0
    assert "the mean of the outputs of 3 sources" in out
    assert f"source 2 ({three[2]}) alone" in "".join(out.splitlines())
    receipt = receipts.read(at / "btx")
    assert receipt.sources == tuple(map(str, three))
    assert receipt.measured.unit == "byte"
    loaded = convert.load(at / "btx")
    assert loaded.family.model_type == "mixtral"
    assert loaded.model.config.moe.num_experts == 3
    receipts.verify(loaded.model, receipt)
    (at / "recipe.yaml").write_text("method: bam\nshared_kv: true\nextra: 1\nweigh: {type: routers.Constant}\n")
    assert moestro(capsys, *three, at / "bam", "--recipe", at / "recipe.yaml", "--attention-top-k", 2)[0] == 0
    receipt, loaded = receipts.read(at / "bam"), convert.load(at / "bam")
    receipts.verify(loaded.model, receipt)
    assert loaded.family.model_type == "moestro"
    assert loaded.model.config.attention.num_experts == 3
    assert loaded.model.config.attention.shared_kv
    assert loaded.model.config.moe.num_experts == 4
    copies = [three[0], at / "again", at / "same"]
    shutil.copytree(three[0], at / "again")
    assert moestro(capsys, *copies, "--method", "bam", "--set", "weigh=routers.Constant")[0] == 0
    assert receipts.read(at / "same").bound == 1e-6


def test_several_models_that_do_not_fit_leave_nothing(at, three, capsys):
    convert.save(CONFIG.replace(vocab_size=300).build(), at / "wide", to="llama")
    for name, words in (("b", "a"), ("c", "b")):
        (at / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {words: 0}}}))
    before = sorted(p.name for p in at.iterdir())
    for line, message in (
        ([three[0], at / "out", "--method", "btx"], "takes several SOURCEs and OUT, found 1 SOURCE"),
        ([*three, at / "out"], "method none takes one SOURCE, found 3"),
        ([*three, at / "out", "--method", "copy"], "takes one SOURCE, found 3"),
        ([three[0], at / "nothing", at / "out", "--method", "bam"], "no such folder"),
        ([three[0], at / "wide", at / "out", "--method", "bam"], f"source 1 ({at / 'wide'}) and source 0"),
        ([*three, at / "out", "--method", "bam"], "its tokenizer is not that of"),
        ([*three[:2], at / "out", "--method", "btx", "--top-k", "5"], "top_k: 5 of 2 experts"),
        ([*three[:2], at / "out", "--method", "bam", "--to", "mixtral"], "cannot be written as mixtral"),
    ):
        status, _, err = moestro(capsys, *line)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
        assert sorted(p.name for p in at.iterdir()) == before


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
    for name in ("moe", "ours"):  # for tools that read nothing but the folder
        assert (tmp_path / name / "tokenizer.json").is_file()
