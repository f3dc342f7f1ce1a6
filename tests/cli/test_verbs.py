"""`moestro generate`, `inspect`, `info`, `presets`, `bench`."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moestro.cli.generate import Writer
from moestro.cli.info import describe
from moestro.convert.families import find
from moestro.models.published import published
from moestro.tasks.tokenizer import Bytes
from moestro.trace.read import read
from moestro.train.presets import preset

from .conftest import Trained, command

# generate ---------------------------------------------------------------------------------------------------------


def test_generate_writes_the_new_text_only(trained: Trained) -> None:
    line = ("generate", str(trained.folder), "--prompt", "def f", "--max-tokens", "12")
    status, out, err = command(*line)
    assert (status, err) == (0, "")
    assert not out.startswith("def f")
    assert command(*line) == (status, out, err)
    said = json.loads(command(*line, "--json")[1])
    assert said["text"] == out.removesuffix("\n")
    assert (said["prompt"], said["tokens"], said["reason"], said["seed"]) == ("def f", 12, "length", 0)


def test_seed_and_temperature_matter(trained: Trained) -> None:
    line = ("generate", str(trained.folder), "--prompt", "def f", "--max-tokens", "24", "--temperature")
    drawn = {command(*line, "2", "--top-p", "1", "--seed", seed)[1] for seed in "123"}
    greedy = {command(*line, "0", "--seed", seed)[1] for seed in "123"}
    assert (len(drawn), len(greedy)) == (3, 1)


def test_prompt_from_stdin(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"def f")))
    line = ("generate", str(trained.folder), "--max-tokens", "5", "--prompt")
    assert command(*line, "-") == command(*line, "def f")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", "x" * 100), "shorten it to"),
        (("--prompt", "x", "--temperature", "-1"), "temperature"),
        ((), "missing --prompt STR; see moestro generate --help"),
    ],
)
def test_generate_refuses(trained: Trained, line: tuple[str, ...], says: str) -> None:
    status, out, err = command("generate", str(trained.folder), *line)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


@pytest.mark.parametrize("verb", [("generate", "--prompt", "x"), ("inspect", "--data", __file__)])
def test_no_run_there(verb: tuple[str, ...], tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        status, out, err = command(verb[0], str(folder), *verb[1:])
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert str(folder) in err


def test_characters_of_several_tokens_are_written_whole() -> None:
    shown: list[str] = []
    writer = Writer(Bytes(), SimpleNamespace(write=shown.append, flush=lambda: None))
    text = "é€😀x"
    for byte in text.encode():
        writer.add(byte)
    writer.add(0xE2)  # the beginning of a character that never ends
    assert "".join(shown) == text
    assert writer.end() == text + "\ufffd"
    assert [s for s in shown if s] == ["é", "€", "😀", "x", "\ufffd", "\n"]


# inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_writes_trace_and_report(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    line = (
        "inspect",
        str(trained.folder),
        "--data",
        str(trained.text),
        "--out",
        str(out),
        "--tokens",
        "2001",
        "--json",
    )
    status, printed, err = command(*line)
    assert status == 0, err
    said = json.loads(printed)
    assert said == json.loads((out / "summary.json").read_text())
    windows = 2000 // 32
    assert said["tokens"] == windows * 32
    assert said["bits_per_byte"] == pytest.approx(said["nats"] / math.log(2))
    trace = read(out / "trace.safetensors")
    assert [layer.path for layer in trace.layers] == list(said["layers"]) == ["layers.0.ffn", "layers.1.ffn"]
    for row in said["layers"].values():
        assert sum(row["load"]) == 2 * windows * 32
        assert 0 < row["load_entropy"] <= 1
        assert row["routing_entropy"] > 0
    sample = trace.samples[0]
    assert set(sample.columns) >= {"token", "position", "segment", "label.character", "label.python"}
    assert bytes(sample.columns["token"].tolist()) == trained.text.read_bytes()[: windows * 32]
    report = (out / "report.html").read_text()
    assert "The routing of run on text.py" in report
    assert "load entropy" in err


def test_inspect_beside_the_run_by_default(trained: Trained) -> None:
    status, out, _ = command("inspect", str(trained.folder), "--data", str(trained.text), "--tokens", "100")
    assert status == 0
    assert (trained.folder.parent / "run-inspect-text" / "report.html").is_file()
    assert "routing entropy" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("{run}", "--data", "{here}/binary"), "binary"),
        (("{run}", "--data", "{here}/none"), "no such file"),
        (("{run}", "--data", "{text}", "--out", "{run}"), "holds a run"),
        (("{run}", "--data", "{text}", "--seq-len", "65"), "1 to 64"),
        (("{run}", "--data", "{text}", "--tokens", "1"), "at least 2"),
        (("{run}/dense", "--data", "{text}"), "no routing to inspect"),
    ],
)
def test_inspect_refuses(trained: Trained, line: tuple[str, ...], says: str, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    given = [a.format(run=trained.folder, here=tmp_path, text=trained.text) for a in line]
    status, out, err = command("inspect", *given)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


# info, presets ----------------------------------------------------------------------------------------------------


def test_info_counts_what_the_config_counts() -> None:
    model = preset("stdlib").model
    about = describe(model, 128)
    assert about["parameters"] == model.num_params()
    assert about["active"] == model.num_active_params()
    assert about["flops"] == model.flops_per_token(128)
    assert about["train_flops"] == model.flops_per_token(128, "train")
    assert about["bytes"] == 4 * about["parameters"]
    tops = [part for part in about["parts"] if part["kind"] in ("Embedding", "Block", "RMSNorm", "Head")]
    outer = [part for part in tops if part["path"].count(".") == (1 if part["kind"] == "Block" else 0)]
    for name in ("parameters", "active", "flops", "train_flops", "bytes"):
        assert sum(part[name] for part in outer) == about[name]


def test_info_of_a_run_its_twin_and_a_published_model(trained: Trained) -> None:
    said = json.loads(command("info", str(trained.folder), "--json")[1])
    table = {line["name"]: line for line in trained.json["table"]}
    assert said["parameters"] == table["sparse"]["params"]
    assert said["flops"] == table["sparse"]["flops_per_token"]
    twin = json.loads(command("info", str(trained.folder), "--twin", "--json")[1])
    assert twin["parameters"] == table["dense"]["params"]
    known = json.loads(command("info", "olmoe-1b-7b", "--json", "--dtype", "bfloat16")[1])
    assert known["active"] == published("olmoe-1b-7b").num_active_params()
    assert (known["bytes"], known["seq_len"]) == (2 * known["parameters"], 4096)


def test_info_of_checkpoint_folders_reads_no_tensors(tmp_path: Path) -> None:
    """Sizes of released models from their config.json alone."""
    mixtral = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    for name in (tmp_path, tmp_path / "config.json"):
        said = json.loads(command("info", str(name), "--json")[1])
        assert said["parameters"] == published("mixtral-8x7b").num_params()
        assert said["active"] == published("mixtral-8x7b").num_active_params()
    (tmp_path / "config.json").write_text(json.dumps({**mixtral, "model_type": "mixtrol"}))
    status, _, err = command("info", str(tmp_path))
    assert status != 0
    assert "did you mean 'mixtral'" in err
    switch = {"model_type": "switch_transformers", **find("switch_transformers").examples()["plain"]}
    (tmp_path / "config.json").write_text(json.dumps(switch))
    said = json.loads(command("info", str(tmp_path), "--json")[1])
    assert said["kind"] == "EncoderDecoder"
    assert said["active"] < said["parameters"]


def test_info_table_folds_equal_layers() -> None:
    status, out, _ = command("info", "stdlib", "--set", "model.num_layers=6", "--set", "model.layout=null")
    assert status == 0
    paths = [line.split()[0] for line in out.splitlines() if line.strip()]
    assert "layers.0-5" in paths
    assert "layers.0-5.ffn" in paths
    assert "total" in paths


def test_presets() -> None:
    out = command("presets")[1]
    for name in ("stdlib", "tiny", "mixtral-8x7b"):
        assert f"\n {name} " in out
    said = json.loads(command("presets", "--json")[1])
    assert said["presets"]["tiny"] == preset("tiny").to_dict()
    assert said["default"] == "stdlib"
