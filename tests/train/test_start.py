"""Runs that begin with weights that are there: a run's, a checkpoint's, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moestro.convert import save
from moestro.core.errors import UserError
from moestro.models.config import Decoder
from moestro.nn.config import Attention, FeedForward
from moestro.tasks.config import Text
from moestro.train.config import TrainRun
from moestro.train.load import load
from moestro.train.run import run

MODEL = Decoder(
    vocab_size=256, dim=16, num_layers=2, attention=Attention(num_heads=2), ffn=FeedForward(width=24), context=32
)


@pytest.fixture
def config(tmp_path: Path) -> TrainRun:
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} quick brown fox jumps over the lazy dog. " * 60)
    data = Text(path=str(tmp_path / "text"), cache=str(tmp_path / "cache"))
    return TrainRun(
        model=MODEL, twin=False, data=data, steps=3, batch_size=4, seq_len=16, eval_windows=4, report=False,
        tensorboard=False, device="cpu",
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).model.state_dict())


def test_a_run_begins_where_a_checkpoint_ends(config: TrainRun, tmp_path: Path) -> None:
    model = MODEL.replace(seed=5).build()
    save(model, tmp_path / "llama", to="llama")
    frozen = config.replace(start=str(tmp_path / "llama"), optimizer=config.optimizer.replace(lr=0.0))
    run(frozen, out=tmp_path / "run")
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_run_begins_where_a_run_ended_and_resumes_as_itself(config: TrainRun, tmp_path: Path) -> None:
    run(config, out=tmp_path / "first")
    still = config.replace(start=str(tmp_path / "first"), optimizer=config.optimizer.replace(lr=0.0))
    run(still, out=tmp_path / "second")
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(first[n], second[n]) for n in first)
    moved = config.replace(start=str(tmp_path / "first"), seed=3)
    run(moved, out=tmp_path / "third")
    third = weights(tmp_path / "third")
    again = run(out=tmp_path / "third", resume=True)
    assert again.complete
    assert all(torch.equal(third[n], weights(tmp_path / "third")[n]) for n in third)
    assert not all(torch.equal(third[n], first[n]) for n in first)


def test_what_does_not_fit_is_said_before_training(config: TrainRun, tmp_path: Path) -> None:
    save(MODEL.build(), tmp_path / "llama", to="llama")
    wider = config.replace(model=MODEL.replace(ffn=FeedForward(width=32)), start=str(tmp_path / "llama"))
    with pytest.raises(UserError, match=r"another one than that of this run: .*width"):
        run(wider, out=tmp_path / "a")
    with pytest.raises(UserError, match="is no folder"):
        run(config.replace(start=str(tmp_path / "nowhere")), out=tmp_path / "b")
    with pytest.raises(UserError, match="set twin=False"):
        config.replace(start="x", twin=True)
    small = MODEL.replace(vocab_size=40)
    save(small.build(), tmp_path / "small", to="llama")
    with pytest.raises(UserError, match="the tokenizer has 256 ids"):
        run(config.replace(model=small, start=str(tmp_path / "small")), out=tmp_path / "c")


def test_the_command_line_takes_model_and_tokenizer_from_the_folder(tmp_path: Path) -> None:
    from moestro.cli.train import read

    save(MODEL.build(), tmp_path / "llama", to="llama", tokenizer="bytes")
    _, config, _ = read(["--start", str(tmp_path / "llama"), "--steps", "7"])
    assert (config.model.dim, config.twin, config.steps, config.seq_len) == (16, False, 7, 32)
    assert config.start == str(tmp_path / "llama")
    assert config.data.tokenizer == str(tmp_path / "llama" / "tokenizer.json")
