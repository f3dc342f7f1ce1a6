"""Training on a GPU: fp32 parameters and optimiser, bf16 products, and a resume that goes on."""

from __future__ import annotations

import pytest
import torch

from moestro.train.files import read_tensors
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import Steps, rows, strong, tiny, with_moe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Died(Exception):
    pass


def test_a_run_on_a_gpu_learns_saves_in_fp32_and_goes_on(tmp_path):
    config = with_moe(tiny(tmp_path, device="cuda", micro_batch=4), **strong(0.1))
    result = run(config, out=tmp_path / "run")
    first, *_, last = rows(tmp_path / "run", "step")
    assert last["nats"] < first["nats"]
    (state,) = (tmp_path / "run" / "state").iterdir()
    for name in ("model", "optimizer"):
        assert all(t.dtype != torch.bfloat16 for t in read_tensors(state / f"{name}.safetensors").values())
    assert all(p.dtype == torch.float32 for p in load(tmp_path / "run").model.parameters())

    def then(info):
        if info.step == 9:
            raise Died

    with pytest.raises(Died):
        run(config, out=tmp_path / "again", progress=Steps(then))
    assert run(out=tmp_path / "again", resume=True).complete
    line, again = result.lines[0].bits_per_byte, rows(tmp_path / "again", "eval")[-1]["bits_per_byte"]
    assert again == pytest.approx(line, rel=1e-2)


def test_a_gpu_and_a_cpu_begin_alike(tmp_path):
    run(tiny(tmp_path, device="cpu", steps=2, eval_every=2), out=tmp_path / "cpu")
    run(tiny(tmp_path, device="cuda", steps=2, eval_every=2), out=tmp_path / "cuda")
    a, b = (rows(tmp_path / name, "step")[0] for name in ("cpu", "cuda"))
    assert b["nats"] == pytest.approx(a["nats"], rel=1e-2)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)
