"""Stopping, resuming, refusing: nothing saved is lost, and a resumed run is the run."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from moestro.core import files
from moestro.core.errors import UserError
from moestro.optim import WSD, AdamW, Cosine
from moestro.tasks import Text
from moestro.train import files as train_files
from moestro.train import manifest as manifests
from moestro.train.layout import Layout, is_run
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import Steps, rows, strong, text, tiny, with_moe


class Died(Exception):
    """Stands for a crash."""


def crash_after(step):
    def then(info):
        if info.step == step:
            raise Died

    return Steps(then)


def signal_after(step, number=signal.SIGTERM):
    def then(info):
        if info.step == step:
            os.kill(os.getpid(), number)

    return Steps(then)


def same(a, b):
    """Whether two runs logged the same numbers and ended with the same bits."""
    return rows(a) == rows(b) and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(place):
    """An undisturbed run of twelve steps, evaluated after 6 and 12."""
    run(tiny(place), out=place / "reference")
    return place / "reference"


def copied(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("step", [1, 6, 7, 11])
def test_after_a_crash_the_run_goes_on_to_the_last_bit(place, reference, tmp_path, step):
    out = tmp_path / "run"
    with pytest.raises(Died):
        run(tiny(place), out=out, progress=crash_after(step))
    seen = Steps()
    result = run(out=out, resume=True, progress=seen)
    assert result.complete
    assert seen.infos[0].step == (7 if step > 6 else 1)
    assert same(out, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_returns(place, reference, tmp_path, number):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen = signal_after(3, number)
    result = run(tiny(place), out=out, progress=seen)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert not result.complete
    assert result.step == manifests.read(out).step == 4 - 1
    assert any("resume" in line for line in seen.said)
    assert run(out=out, resume=True).complete
    assert same(out, reference)


def test_metrics_after_the_checkpoint_are_cut_not_doubled(place, reference, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Died):
        run(tiny(place), out=out, progress=crash_after(9))
    assert [r["step"] for r in rows(out, "step")] == list(range(1, 10))
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # a line that the disk did not get whole
    run(out=out, resume=True)
    assert [r["step"] for r in rows(out, "step")] == list(range(1, 13))
    assert same(out, reference)


def test_a_resume_that_forgets_the_optimiser_would_show(place, reference, tmp_path, monkeypatch):
    from moestro.optim.adamw import AdamWOptimizer

    out = tmp_path / "run"
    with pytest.raises(Died):
        run(tiny(place), out=out, progress=crash_after(8))
    monkeypatch.setattr(AdamWOptimizer, "load", lambda self, tensors: None)
    run(out=out, resume=True)
    assert not same(out, reference)


def test_a_run_that_is_complete_stays_as_it_is(reference, tmp_path):
    out = copied(reference, tmp_path)
    seen = Steps()
    assert run(out=out, resume=True, progress=seen).complete
    assert seen.infos == []
    assert same(out, reference)


# Folders and settings ---------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused(place, reference):
    with pytest.raises(UserError, match="holds a run already.*resume"):
        run(tiny(place), out=reference)
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tiny(place), out=place / "nothing", resume=True)
    assert not (place / "nothing").exists()
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tiny(place), out=place, resume=True)
    assert is_run(reference)
    assert not is_run(place)


def test_a_run_that_ended_as_its_folder_was_made_begins_again(place, reference, tmp_path):
    assert run(tiny(place), out=tmp_path, resume=True).complete
    assert same(tmp_path, reference)


def test_somebody_elses_model_folder_is_not_written_into(place, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run already"):
        run(tiny(place), out=tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_place_below_a_plain_file_is_one_message(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written there.*choose another folder"):
        run(tiny(place), out=tmp_path / "file" / "run")


def test_differing_settings_are_named_and_refused(place, reference, tmp_path):
    out = copied(reference, tmp_path)
    other = with_moe(tiny(place, batch_size=8, optimizer=AdamW(lr=1e-3)), num_experts=8)
    with pytest.raises(UserError) as raised:
        run(other, out=out, resume=True)
    for change in ("batch_size: 6 -> 8", "optimizer.lr: 0.003 -> 0.001", "model.moe.num_experts: 4 -> 8"):
        assert change in str(raised.value)
    assert same(out, reference)


def test_harmless_settings_are_named_and_taken(place, reference, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Died):
        run(tiny(place), out=out, progress=crash_after(7))
    seen = Steps()
    run(tiny(place, save_every=1, threads=torch.get_num_threads()), out=out, resume=True, progress=seen)
    assert any("save_every: 0 -> 1" in line for line in seen.said)
    assert rows(out) == rows(reference)
    assert load(out).config.save_every == 1


def test_another_number_of_threads_is_said(place, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with pytest.raises(Died):
        run(tiny(place), out=out, progress=crash_after(7))
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    seen = Steps()
    assert run(out=out, resume=True, progress=seen).complete
    assert any(f"{before} threads before, {before + 1} now" in line for line in seen.said)


def test_steps_can_be_extended_while_the_past_stays_the_same(place, tmp_path):
    wsd = AdamW(lr=3e-3, schedule=WSD(warmup=2, decay=0.25))
    short, long = tiny(place, optimizer=wsd, steps=8), tiny(place, optimizer=wsd, steps=16)
    run(long, out=tmp_path / "long")
    out = tmp_path / "short"
    stopped = run(short, out=out, progress=signal_after(5))
    assert stopped.step == 5
    run(long, out=out, resume=True)
    assert [r["nats"] for r in rows(out, "step")] == [r["nats"] for r in rows(tmp_path / "long", "step")]

    cosine = AdamW(lr=3e-3, schedule=Cosine())
    other = tmp_path / "cosine"
    run(tiny(place, optimizer=cosine, steps=8), out=other, progress=signal_after(5))
    with pytest.raises(UserError, match="steps: 8 -> 16.*WSD"):
        run(tiny(place, optimizer=cosine, steps=16), out=other, resume=True)


def test_other_text_is_refused_and_moved_text_is_not(place, reference, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    moved = text(folder)
    out = tmp_path / "run"
    with pytest.raises(Died):
        run(tiny(place), out=out, progress=crash_after(7))
    moved.write_text("another text\n" * 999)
    data = Text(path=str(moved), cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="not the one that this run began with"):
        run(tiny(place, data=data), out=out, resume=True)
    text(folder)
    assert run(tiny(place, data=data), out=out, resume=True).complete
    assert rows(out) == rows(reference)


def test_a_resumed_run_finds_its_text_again_without_the_cache(place, reference, tmp_path):
    config = tiny(place)
    data = Text(path=config.data.path, cache=str(tmp_path / "cache"))
    out = tmp_path / "run"
    with pytest.raises(Died):
        run(config.replace(data=data), out=out, progress=crash_after(7))
    shutil.rmtree(tmp_path / "cache")
    assert run(out=out, resume=True).complete
    assert rows(out) == rows(reference)


# Damage -----------------------------------------------------------------------------------------------------------


def damage(path, how):
    content = path.read_bytes()
    path.unlink()  # the published weights are a link to the state's: damage one name only
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_any_damaged_file_is_named(reference, tmp_path, how):
    manifest = manifests.read(reference)
    everything = [*manifest.files, *manifest.growing, "manifest.json"]
    assert {f.name for f in reference.rglob("*") if f.is_file()} == {name.split("/")[-1] for name in everything}
    for number, name in enumerate(everything):
        out = copied(reference, tmp_path / str(number))
        damage(out / name, how)
        if name in ("model.safetensors", "trace.safetensors"):
            damage(next((out / "state").glob(f"*/{name}")), how)
        with pytest.raises(UserError) as raised:
            run(out=out, resume=True)
        assert name.split("/")[-1] in str(raised.value)
        assert "\n" not in str(raised.value)
        if name in ("config.json", "tokenizer.json", "model.safetensors", "manifest.json"):
            with pytest.raises(UserError, match=name):
                load(out)


def test_weights_that_were_not_published_yet_are_found_in_the_state(reference, tmp_path):
    out = copied(reference, tmp_path)
    good = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").write_bytes(b"older weights")  # killed between manifest and publication
    assert load(out).step == 12
    run(out=out, resume=True)
    assert (out / "model.safetensors").read_bytes() == good


def test_a_full_disk_loses_nothing_that_was_saved(place, reference, tmp_path, monkeypatch):
    out = tmp_path / "run"
    true = train_files.save_file

    def full(tensors, path, metadata):
        if "step-00000012" in str(path) and path.name.startswith(".optimizer.safetensors"):
            path.write_bytes(b"half of it")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        true(tensors, path, metadata)

    monkeypatch.setattr(train_files, "save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*intact \(step 6 .*resume"):
        run(tiny(place), out=out)
    assert [p.name for p in (out / "state").iterdir()] == ["step-00000006"]
    assert load(out).step == 6
    monkeypatch.undo()
    assert run(out=out, resume=True).complete
    assert same(out, reference)


def test_a_disk_that_is_full_in_the_middle_of_the_manifest(place, reference, tmp_path, monkeypatch):
    out = tmp_path / "run"
    true = files.open_new

    class Short:
        """A file that takes ten bytes."""

        def __init__(self, inner):
            self.inner = inner

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.inner.close()

        def write(self, part):
            self.inner.write(bytes(part)[:10])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        files,
        "open_new",
        lambda path: Short(true(path)) if path.name.startswith(".manifest.json.") and is_saved(out) else true(path),
    )

    def is_saved(folder):
        return (folder / "state" / "step-00000012").exists()

    with pytest.raises(UserError, match=r"intact \(step 6 "):
        run(tiny(place), out=out)
    monkeypatch.undo()
    assert load(out).step == 6
    assert run(out=out, resume=True).complete
    assert same(out, reference)


def test_metrics_on_a_full_disk_are_one_message(place, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    out = tmp_path / "run"

    def then(info):
        if info.step == 7:
            stores[0].metrics.path = Path("/dev/full")

    from moestro.train.save import Store

    stores = []
    with pytest.MonkeyPatch.context() as patch:
        init = Store.__init__
        patch.setattr(Store, "__init__", lambda self, *a, **k: (stores.append(self), init(self, *a, **k))[1])
        with pytest.raises(UserError, match=r"No space left on device.*intact \(step 6"):
            run(tiny(place), out=out, progress=Steps(then))
    assert run(out=out, resume=True).complete


def test_loading_accounts_for_every_tensor(reference, tmp_path):
    from moestro.train.files import read_tensors, write_tensors

    out = copied(reference, tmp_path)
    layout, manifest = Layout(out), manifests.read(out)
    tensors = read_tensors(layout.model)
    cases = {
        "lacks norm.weight": {n: t for n, t in tensors.items() if n != "norm.weight"},
        "has extra that": tensors | {"extra": torch.zeros(1)},
        r"norm.weight is \[3\]": tensors | {"norm.weight": torch.zeros(3)},
        "float64": tensors | {"norm.weight": tensors["norm.weight"].double()},
    }
    for said, changed in cases.items():
        layout.model.unlink()
        seal = write_tensors(layout.model, changed)
        made = manifests.Manifest(
            step=12, complete=True, files={**manifest.files, "model.safetensors": seal}, growing=manifest.growing
        )
        manifests.write(out, made)
        with pytest.raises(UserError, match=said):
            load(out)


def test_the_state_keeps_router_state_and_strong_losses(place, tmp_path):
    from moestro.routers import LossFree, Router, TopK

    router = Router(activation="sigmoid", select=LossFree(inner=TopK(k=4), rate=0.05))
    config = with_moe(tiny(place, micro_batch=2), router=router, num_experts=8, **strong(0.1))
    run(config, out=tmp_path / "whole")
    with pytest.raises(Died):
        run(config, out=tmp_path / "run", progress=crash_after(9))
    run(out=tmp_path / "run", resume=True)
    assert same(tmp_path / "run", tmp_path / "whole")
    model = load(tmp_path / "run").model
    assert any("bias" in name for name, _ in model.named_buffers())
