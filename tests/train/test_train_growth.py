"""Growth as a chain of runs: the commands that the preset's docstring names."""

from __future__ import annotations

from pathlib import Path

import torch

from moestro.adapt import LoRA
from moestro.cli.train import read
from moestro.convert.config import Grow
from moestro.train.conversion import convert
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import text


def trained(folder: Path, out: str, *args: str) -> dict[str, torch.Tensor]:
    """The weights of a small run of the preset."""
    _, config, _ = read(["growing-transformers", "--data", str(folder / "text.txt"), *args])
    config = config.replace(
        data=config.data.replace(cache=str(folder / "cache")),  # type: ignore[union-attr]
        steps=3,
        batch_size=4,
        seq_len=16,
        eval_windows=4,
        report=False,
        tensorboard=False,
        device="cpu",
    )
    run(config, out=folder / out)
    return dict(load(folder / out, state="last").model.state_dict())


def test_brief_45_stages_as_runs(tmp_path: Path) -> None:
    text(tmp_path)
    first = trained(tmp_path, "stage1", "--model.dim", "32")
    deeper = tmp_path / "deeper"
    receipt = convert([tmp_path / "stage1"], deeper, Grow(blocks=1))
    assert receipt is not None
    assert receipt.exact == "the new blocks add zeros, so the output is unchanged"
    second = trained(tmp_path, "stage2", "--start", str(deeper), "--frozen", "embed", "0:2")
    best = dict(load(tmp_path / "stage1").model.state_dict())  # a run's best weights are converted
    old = {n for n in first if n.startswith("layers.")}
    assert {n.split(".")[1] for n in second if n.startswith("layers.")} == {"0", "1", "2"}
    assert all(torch.equal(second[n], best[n]) for n in old)
    assert not torch.equal(second["head.weight"], best["head.weight"])
    assert bool(second["layers.2.ffn.down"].any())
    assert "embed.weight" not in second
    last = ["growing-transformers", "--start", str(tmp_path / "stage2"), "--set", "adapters=adapt.LoRA"]
    _, config, _ = read([*last, "--adapters.targets", "attention", "ffn"])
    assert config.adapters == LoRA(targets=("attention", "ffn"))
