"""A sparse model and its dense twin: same start, same data, one table, one report, one resume."""

from __future__ import annotations

import json

import pytest
import torch

from moestro.core.errors import UserError
from moestro.models.twin import dense_twin
from moestro.train import manifest as manifests
from moestro.train.compare import at_time
from moestro.train.layout import Layout
from moestro.train.load import load
from moestro.train.log import read_rows
from moestro.train.run import run
from moestro.train.weights import tensors_of
from train.train_cases import Steps, rows, strong, tiny, with_moe

NASTY = "</script><img src=x onerror=alert(1)> & <b>x</b>\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    (folder / "text.txt").write_text((NASTY + "some plain words here\n") * 300)
    return folder


@pytest.fixture(scope="module")
def pair(place):
    """(folder, result, observer) of a finished pair with report and TensorBoard logs."""
    seen = Steps()
    config = with_moe(tiny(place, twin=True, report=True, tensorboard=True, starved_after=2), **strong(0.1))
    result = run(config, out=place / "run", progress=seen, command="moestro train tiny")
    return place / "run", result, seen


def test_both_arms_take_turns_from_evaluation_to_evaluation(pair):
    _, _, seen = pair
    order = [info.arm for info in seen.infos]
    assert order == ["sparse"] * 6 + ["dense"] * 6 + ["sparse"] * 6 + ["dense"] * 6


def test_shared_weights_start_equal_and_flops_agree(place):
    config = tiny(place).model
    dense = dense_twin(config, 16)
    sparse_tensors, dense_tensors = tensors_of(config.build()), tensors_of(dense.build())
    shared = {n for n in dense_tensors if ".ffn." not in n}
    assert len(shared) > 10
    assert all(torch.equal(sparse_tensors[n], dense_tensors[n]) for n in shared)
    assert dense.flops_per_token(16) == pytest.approx(config.flops_per_token(16), rel=0.01)


def test_the_dense_arm_is_what_a_run_of_the_twin_alone_would_be(place, pair):
    folder, _, _ = pair
    config = load(folder / "dense").config
    assert not config.twin
    alone = place / "alone"
    run(config.replace(report=False, tensorboard=False), out=alone)
    assert rows(alone) == rows(folder / "dense")


def test_the_table_says_what_the_metrics_say(pair):
    folder, result, _ = pair
    assert result.complete
    sparse, dense = result.lines
    assert (sparse.name, dense.name) == ("sparse", "dense")
    assert sparse.params > dense.params
    assert abs(sparse.flops_per_token / dense.flops_per_token - 1) < 0.01
    assert sparse.load_entropy is not None
    assert dense.load_entropy is None
    for line, at in ((sparse, folder), (dense, folder / "dense")):
        curve = list(read_rows(at / "metrics.jsonl", "eval"))
        assert (line.evaluated, line.bits_per_byte) == (12, curve[-1]["bits_per_byte"])
        assert line.best_bits_per_byte == min(r["bits_per_byte"] for r in curve)
        assert line.time == min(sparse.seconds, dense.seconds)
        assert line.bits_per_byte_at_time == at_time(curve, line.time)
        assert line.tokens_per_second == pytest.approx(12 * 6 * 16 / line.seconds)
    assert json.loads((folder / "summary.json").read_text())["table"] == [sparse.to_dict(), dense.to_dict()]
    json.dumps(result.to_dict(), allow_nan=False)


def test_bits_per_byte_at_a_time_lie_on_the_line_between_evaluations():
    curve = [{"seconds": 1.0, "bits_per_byte": 4.0}, {"seconds": 3.0, "bits_per_byte": 2.0}]
    assert at_time(curve, 1.0) == 4.0
    assert at_time(curve, 2.5) == 2.5
    assert at_time(curve, 3.0) == 2.0
    assert at_time(curve, 0.5) is None
    assert at_time(curve, 3.5) is None


def test_the_run_folder_holds_what_it_promises_and_the_manifest_covers_it(pair):
    folder, result, _ = pair
    for root in (folder, folder / "dense"):
        manifest = manifests.read(root)
        assert manifest.complete
        manifests.verify(root, manifest)
        here = {
            str(f.relative_to(root))
            for f in root.rglob("*")
            if f.is_file() and "dense" not in f.relative_to(root).parts
        }
        assert here == {*manifest.files, *manifest.growing, "manifest.json"}
        assert any(name.startswith("tensorboard/") for name in manifest.growing)
    assert result.report == folder / "report.html"
    assert {"trace.safetensors", "report.html", "corpus.json", "tokenizer.json", "summary.json"} <= set(
        manifests.read(folder).files
    )


def test_the_report_shows_the_run_and_escapes_its_text(pair):
    folder, _, _ = pair
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=aler" in page  # the prompt of the sample is the held-out text
    assert "moestro train tiny" in page


def test_the_trace_counts_every_step_and_samples_held_out_text(pair):
    from moestro.trace.read import read

    folder, _, seen = pair
    trace = read(folder / "trace.safetensors")
    assert [layer.path for layer in trace.layers] == ["layers.0.ffn", "layers.1.ffn"]
    assert trace.counts.demand.sum() == 12 * 2 * 6 * 16 * 2  # steps, layers, sequences, tokens, choices
    assert trace.counts.units.sum() == 12 * 2 * 6 * 16
    assert trace.counts.entropy_units.sum() == trace.counts.units.sum()
    sample = trace.last("valid")
    assert sample is not None
    assert {"token", "position", "label.character"} <= set(sample.columns)
    by_step = {i.step: i for i in seen.infos if i.arm == "sparse"}
    assert trace.counts.demand[0, 1, :4].tolist() == by_step[1].counts["layers.1.ffn"].tolist()


def test_a_pair_goes_on_in_both_arms(place, pair):
    folder, _, _ = pair

    class Died(Exception):
        pass

    def then(info):
        if info.arm == "dense" and info.step == 9:
            raise Died

    config = load(folder).config.replace(report=False, tensorboard=False)
    out = place / "again"
    with pytest.raises(Died):
        run(config, out=out, progress=Steps(then))
    seen = Steps()
    assert run(out=out, resume=True, progress=seen).complete
    assert [(i.arm, i.step) for i in seen.infos] == [("dense", s) for s in range(7, 13)]
    for part in ("", "dense"):
        assert rows(out / part) == rows(folder / part)
        assert (out / part / "model.safetensors").read_bytes() == (folder / part / "model.safetensors").read_bytes()
    assert (out / "trace.safetensors").is_file()


def test_damage_in_the_twin_is_named_too(place, pair, tmp_path):
    import shutil

    shutil.copytree(pair[0], tmp_path / "run")
    path = Layout(tmp_path / "run").twin.config
    path.write_text(path.read_text().replace("}", "} ", 1))
    with pytest.raises(UserError, match=r"dense/config\.json: damaged"):
        run(out=tmp_path / "run", resume=True)


def test_a_dense_model_has_no_twin(place, tmp_path):
    config = tiny(place, twin=True)
    with pytest.raises(UserError, match="no routed layer"):
        run(config.replace(model=config.model.replace(moe=None)), out=tmp_path / "run")
    dense = config.replace(model=config.model.replace(moe=None), twin=False, steps=2, eval_every=2)
    (line,) = run(dense, out=tmp_path / "other").lines
    assert line.name == "model"
    assert not (tmp_path / "other" / "trace.safetensors").exists()
