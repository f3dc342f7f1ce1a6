"""`moestro train`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moestro.cli.progress import Bars, Lines, figures
from moestro.cli.train import read
from moestro.core.errors import UserError
from moestro.dispatch.config import examples as exchanges
from moestro.experts.config import Gated
from moestro.experts.config import examples as experts
from moestro.losses.config import examples as losses
from moestro.models.config import Decoder
from moestro.models.examples import examples as models
from moestro.moe.config import AveragedExperts
from moestro.optim import ExpertAveraging
from moestro.routers.config import TopK, TopP
from moestro.routers.examples import examples as routers
from moestro.tasks.config import StandardLibrary, Text
from moestro.train.config import TrainRun
from moestro.train.observe import Arm, StepInfo
from moestro.train.presets import preset

from .conftest import Trained, command


def test_run_folder_and_json_line(trained: Trained) -> None:
    assert trained.out.count("\n") == 1
    said = trained.json
    assert said["folder"] == str(trained.folder)
    assert said["complete"] is True
    assert [line["name"] for line in said["table"]] == ["sparse", "dense"]
    for name in ("config.json", "model.safetensors", "metrics.jsonl", "manifest.json", "trace.safetensors"):
        assert (trained.folder / name).is_file()
    assert said["report"] == str(trained.folder / "report.html")


def test_human_output_is_on_stderr_with_json(trained: Trained) -> None:
    assert "validation, equal steps" in trained.err
    assert "sparse  step 6/6  loss" in trained.err
    assert "bits/byte" in trained.err


def test_flags_reach_the_run(trained: Trained) -> None:
    made = TrainRun.from_dict(json.loads((trained.folder / "config.json").read_text()))
    assert (made.steps, made.eval_every, made.recording.every) == (6, 3, 3)
    assert isinstance(made.data, Text)
    assert made.data.path == str(trained.text)


def test_table_on_stdout_without_json(trained: Trained, tmp_path: Path) -> None:
    status, out, err = command(*trained.line, "--no-twin", "--no-report", "--out", str(tmp_path / "r"))
    assert status == 0
    assert "active parameters" in out
    assert f"run folder: {tmp_path / 'r'}" in out
    assert "step 6/6" in err
    assert not (tmp_path / "r" / "dense").exists()


def test_a_folder_with_a_run_is_refused(trained: Trained) -> None:
    status, out, err = command(*trained.line, "--out", str(trained.folder))
    assert status == 2
    assert (out, err.count("\n")) == ("", 1)
    assert "holds a run already" in err


def test_resume_takes_the_settings_of_the_run(trained: Trained) -> None:
    _, config, options = read(["--resume", "--out", str(trained.folder)])
    assert options.resume
    assert (config.steps, config.data) == (6, Text(path=str(trained.text), cache=str(trained.text.parent / "cache")))
    status, out, _ = command("train", "--resume", "--out", str(trained.folder), "--json")
    assert (status, json.loads(out)["step"]) == (0, 6)


def test_resume_names_what_differs(trained: Trained) -> None:
    status, _, err = command("train", "--resume", "--out", str(trained.folder), "--seed", "7")
    assert status == 2
    assert "seed: 0 -> 7" in err


# Reading the command line -----------------------------------------------------------------------------------------


def test_without_arguments_it_is_the_default_preset() -> None:
    name, config, _ = read([])
    assert (name, config) == ("stdlib", preset("stdlib"))


def test_nested_fields_are_flags() -> None:
    line = "tiny --model.dim 32 --model.moe.num-experts 8 --model.moe.router.select.k 3 --no-twin --optimizer.lr 0.5"
    name, config, _ = read(line.split())
    assert name == "tiny"
    assert isinstance(config.model, Decoder)
    assert config.model.moe is not None
    assert config.model.moe.router.select == TopK(k=3)  # type: ignore[attr-defined]
    assert (config.model.dim, config.model.moe.num_experts, config.twin) == (32, 8, False)
    assert config.optimizer.lr == 0.5  # type: ignore[attr-defined]
    assert config.steps == preset("tiny").steps


def test_another_type_brings_its_own_flags() -> None:
    line = ["tiny", "--set", "model.moe.router.select=routers.TopP", "--model.moe.router.select.p", "0.3"]
    _, config, _ = read(line)
    assert config.model.moe.router.select == TopP(p=0.3)  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"unknown option '--model.moe.router.select.p'"):
        read(["tiny", "--model.moe.router.select.p", "0.3"])


def test_hooks_after_the_step_and_their_layer_are_set_by_name() -> None:
    """Experts weights averaging (48), from the command line."""
    hooks = """after=[{"type":"optim.ExpertAveraging","share":0.3}]"""
    bank = """model.moe={"type":"moe.AveragedExperts","num_experts":4,"experts":{"type":"experts.Gated","width":24}}"""
    _, config, _ = read(["tiny", "--set", hooks, "--set", bank, "--steps", "3"])
    assert config.after == (ExpertAveraging(share=0.3),)
    assert config.model.moe == AveragedExperts(experts=Gated(width=24))
    assert config.after[0].build(config.model.build(), 3).stacks
    assert read(["tiny", "--set", 'after=["optim.ExpertAveraging"]'])[1].after == (ExpertAveraging(),)
    with pytest.raises(UserError, match="share must lie in 0..1"):
        read(["tiny", "--set", hooks.replace("0.3", "1.3")])


def test_data_and_tokenizer() -> None:
    _, config, _ = read(["tiny", "--data", "a.txt", "--tokenizer", "t.json", "--data.validation", "0.2"])
    assert config.data == Text(path="a.txt", tokenizer="t.json", validation=0.2)
    assert isinstance(read(["tiny"])[1].data, StandardLibrary)


def test_a_config_file_is_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(preset("tiny").replace(steps=17).to_dict()))
    assert read([str(path)])[1] == preset("tiny").replace(steps=17)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tinny", r"did you mean 'tiny'"),
        ("mixtral-8x7b", r"too large to train"),
        ("--steps 3 tiny", r"'tiny'; a preset comes before all options"),
        ("tiny --stepps 3", r"unknown option '--stepps' \(did you mean '--steps'\?\)"),
        ("tiny --num-heads 3", r"did you mean '--model.attention.num-heads'"),
        ("tiny --steps 0", r"steps must be at least 1"),
        ("tiny --steps many", r"--steps: .*many"),
        ("tiny --set steps", r"PATH=VALUE"),
        ("tiny --set stepps=3", r"did you mean 'steps'"),
        ("tiny --model.moe.router.activation tanh", r"tanh"),
        ("tiny --model.layout moe", r"1 entries for num_layers 2"),
        ("tiny --seq-len 1000", r"longer than the model's context 64"),
    ],
)
def test_what_cannot_be_read(line: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(line.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--model.moe.router.select.k 5", "top_k 5"),
        ("--model.attention.num-heads 3 --model.attention.head-dim None", "num_heads 3"),
        ("--data {here}/nothing.txt", "nothing.txt: no such file"),
        ("--data {here}/empty.txt", "empty"),
        ("--data {here}/binary", "binary"),
        ("--tokenizer {here}/binary", "binary"),
        ("--device tpu", "tpu"),
    ],
)
def test_impossible_runs_leave_nothing_behind(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    out = tmp_path / "run"
    given = line.format(here=tmp_path).split()
    status, stdout, err = command("train", "tiny", "--out", str(out), *given)
    assert (status, stdout) == (2, "")
    assert says in err
    assert err.startswith("moestro: error: ")
    assert err.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, err = command("train", "tiny", "--out", str(tmp_path / "file" / "run"))
    assert status == 2
    assert "cannot be written there" in err


# Watching ---------------------------------------------------------------------------------------------------------

ARM = Arm(
    name="sparse", folder=Path("r"), steps=200, start=10, params=1_700_000, active=223_000, flops_per_token=511_000
)
ROW = {"loss": 2.5, "bits_per_byte": 3.25, "tokens_per_second": 12_345.0, "load_entropy": 0.987}


def info(step: int, **changes: object) -> StepInfo:
    return StepInfo(arm="sparse", step=step, steps=200, row={**ROW, **changes}, counts={}, seconds_left=75.0)


def test_lines_are_sparing() -> None:
    stream, now = io.StringIO(), [0.0]
    lines = Lines(Console(file=stream, width=200), clock=lambda: now[0])
    lines.on_start([ARM], {})
    for step in range(11, 61):
        now[0] += 0.1
        lines.on_step(info(step))
    lines.on_step(info(200))
    start, *steps, last = stream.getvalue().splitlines()
    assert start == "sparse  1.7M parameters, 223k active, 511k FLOPs per token, 200 steps, from step 10"
    assert len(steps) == 1
    assert last == "sparse  step 200/200  loss 2.5000  bits/byte 3.2500  tokens/s 12.3k  left 1:15  load 0.987"


def test_a_dense_model_has_no_load() -> None:
    assert "load" not in [name for name, text in figures(info(3, load_entropy=None)).items() if text]


def test_bars_show_the_figures() -> None:
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=160, highlight=False))
    bars.on_start([ARM], {})
    bars.on_step(info(57))
    bars.on_message("a message [with] brackets")
    bars.close()
    shown = stream.getvalue()
    for part in ("57/200", "bits/byte 3.2500", "tokens/s 12.3k", "left 1:15", "load 0.987", "[with] brackets"):
        assert part in shown


def test_bars_fit_a_terminal_of_80_columns() -> None:
    stream = io.StringIO()
    bars = Bars(Console(file=stream, force_terminal=True, width=80, highlight=False))
    bars.on_start([ARM], {})
    bars.on_step(info(157, load_entropy=0.987))
    bars.close()
    assert "loss 2.5000 b/B 3.2500 tok/s 12.3k 1:15 load 0.987" in stream.getvalue()
    assert "157/200" in stream.getvalue()


def test_module_and_torchrun_environment(tmp_path: Path) -> None:
    """`python -m moestro` is the command; a wrong argument is one line there too, and no torch is loaded for it."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "moestro", "train", "tiny", "--stepps", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "20"},
        timeout=120,
        check=False,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert errors == ["moestro: error: unknown option '--stepps' (did you mean '--steps'?); see moestro train --help"]
    assert done.returncode == 2
    assert "| torch\n" not in done.stderr


def runs_of_every_part() -> dict[str, TrainRun]:
    """Runs whose configs hold every kind of part that has an example."""
    base = preset("tiny")
    assert base.model.moe is not None
    made = {f"model {n}": TrainRun(model=m, seq_len=16) for n, m in models().items()}
    kinds = {"router": routers(), "experts": experts(), "exchange": exchanges()}
    for field, examples in kinds.items():
        for name, part in examples.items():
            moe = base.model.moe.replace(**{field: part})
            made[f"{field} {name}"] = base.replace(model=base.model.replace(moe=moe))
    moe = base.model.moe.replace(losses=tuple(losses().values()))
    return made | {"losses": base.replace(model=base.model.replace(moe=moe))}


@pytest.mark.parametrize("name", list(runs_of_every_part()))
def test_the_parser_understands_every_part(name: str, tmp_path: Path) -> None:
    run = runs_of_every_part()[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run.to_dict()))
    assert read([str(path), "--steps", "7"])[1] == run.replace(steps=7)
