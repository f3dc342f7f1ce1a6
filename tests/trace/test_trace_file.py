"""The file: what is recorded comes back, memory is bounded, damage and foreign files are refused in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import random

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

from moestro.core import files
from moestro.core.errors import UserError
from moestro.core.plan import Dense, ExpertChoice
from moestro.core.stats import Stats
from moestro.core.trail import Key, Record, Term, Trail
from moestro.losses import RoutingEntropy
from moestro.trace import Recording
from moestro.trace.read import read
from moestro.trace.record import Recorder, routing_stats
from moestro.trace.write import smallest, write
from trace_cases import plan, random_trail, record, trail


def same(a, b):
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        assert a.dtype.kind == b.dtype.kind or a.dtype.kind in "iu"
        np.testing.assert_array_equal(a, b)
    elif dataclasses.is_dataclass(a):
        assert type(a) is type(b)
        for field in dataclasses.fields(a):
            same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    elif isinstance(a, dict):
        assert sorted(a) == sorted(b)
        for key in a:
            same(a[key], b[key])
    else:
        assert a == b


def recorded(**config):
    made = Recorder(
        Recording(**config),
        labels={"character": ("letter", "other")},
        tokenizer="words.json",
        pieces=lambda i: f"<{i}>",
        run={"seed": 3},
        model={"dim": 64},
        data={"name": "stdlib", "bytes": 12},
    )
    for step in range(5):
        made.count(step, random_trail(step))
    columns = {
        "token": torch.arange(50) * 300,
        "position": torch.arange(50),
        "label.character": torch.arange(50) % 3 - 1,
        "loss": torch.rand(50),
    }
    valid = torch.arange(50) < 40
    kept = torch.rand(50, 2) < 0.8
    made.sample(3, "valid", random_trail(9, valid=valid, kept=kept & valid[:, None]), columns)
    return made


def test_what_is_written_is_read(tmp_path):
    made = recorded()
    made.write(tmp_path / "trace.safetensors")
    same(read(tmp_path / "trace.safetensors"), made.trace())


def test_the_file_is_small_and_open_to_other_readers(tmp_path):
    path = tmp_path / "trace.safetensors"
    recorded().write(path)
    arrays = load_arrays(path.read_bytes())
    assert arrays["sample.0.table.0.expert"].dtype == np.int8
    assert arrays["sample.0.table.0.weight"].dtype == np.float16
    assert arrays["sample.0.table.0.kept"].shape == (13,)  # 50 * 2 bits
    assert arrays["sample.0.token"].dtype == np.int16
    assert arrays["sample.0.label.character"].dtype == np.int8
    assert arrays["counts.demand"].dtype == np.int64
    assert arrays["counts.demand"].shape == (5, 2, 6)
    assert "counts.load" not in arrays  # nothing was dropped in the counted steps


def test_every_kind_of_plan_and_pass_comes_back(tmp_path):
    virtual = plan([[0, 4], [5, -1], [3, 2]], 4, virtual=("null", "copy"), meta={"task": torch.tensor([0, 1, 7])})
    chosen = ExpertChoice(
        unit=torch.tensor([[[0, 2], [1, -1]]]), weight=torch.tensor([[[0.5, 1], [1, 0]]]), num_units=3
    )
    dense = Dense(weight=torch.rand(3, 2), valid=torch.tensor([True, True, True]))
    whole = plan([[0], [1], [1]], 2, complete=True, capacity=2)
    trails = Trail({Key("a"): record(virtual), Key("b"): record(chosen), Key("c"): record(dense)})
    trails = trails | Trail({Key("a", 1): record(virtual), Key("d"): record(whole)})
    made = Recorder()
    made.count(0, trails)
    made.sample(0, "train", trails, {"token": torch.tensor([104, 105, 33])})
    made.write(tmp_path / "t")
    back = read(tmp_path / "t")
    same(back, made.trace())
    assert [(t.layer, t.pass_, t.type) for t in back.samples[0].tables] == [
        (0, 0, "Plan"),
        (1, 0, "ExpertChoice"),
        (2, 0, "Dense"),
        (0, 1, "Plan"),
        (3, 0, "Plan"),
    ]
    assert back.layers[0].virtual == ("null", "copy")
    assert back.samples[0].tables[0].meta["task"].tolist() == [0, 1, 7]
    assert back.demand(0).tolist() == [[2, 0, 2, 2]]  # two passes; virtual ids are no experts
    assert back.counts.units[0].tolist() == [6, 3, 3, 3]


def test_counts_add_over_micro_batches_passes_and_ranks():
    one, two = Recorder(), Recorder()
    parts = [random_trail(s) for s in range(4)]
    for part in parts:
        one.count(7, part)
    sums = [routing_stats(p) for p in parts]
    two.count(7, {path: sums[0][path] + sums[1][path] + sums[2][path] + sums[3][path] for path in sums[0]})
    same(one.trace().counts, two.trace().counts)
    assert one.trace().counts.units.tolist() == [[200, 200]]
    assert len(one.trace().counts) == 1
    passes = Recorder()
    passes.count(7, parts[0] | parts[1].as_pass(1))
    passes.count(7, parts[2] | parts[3].as_pass(1))
    same(passes.trace().counts, one.trace().counts)


def test_counts_are_those_of_the_plans():
    made = Recorder()
    kept = torch.tensor([[True, False], [True, True]])
    made.count(0, trail({"x": plan([[0, 1], [1, 2]], 3, kept=kept)}))
    trace = made.trace()
    assert trace.demand(0).tolist() == [[1, 2, 1]]
    assert trace.load(0).tolist() == [[1, 1, 1]]
    padded = Recorder()
    padded.count(0, trail({"x": plan([[0, 1], [1, 2]], 3, valid=torch.tensor([True, False]))}))
    assert padded.trace().demand(0).tolist() == [[1, 1, 0]]
    assert padded.trace().counts.units.tolist() == [[1]]


def test_entropy_from_the_loss_term_or_from_kept_probabilities():
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    valid = torch.tensor([True, True, False])
    full = plan([[0], [0], [1]], 2, probs=probs, valid=valid)
    loss = RoutingEntropy().build()
    term = {loss.name: Term(stats=loss.stats(full), loss=loss)}
    slim = dataclasses.replace(full, probs=None)
    made = Recorder()
    made.count(0, Trail({Key("x"): record(full)}))
    made.count(1, Trail({Key("x"): record(slim, terms=term)}))
    made.count(2, Trail({Key("x"): record(slim)}))
    mean = made.trace().counts.mean_entropy()[:, 0]
    assert mean[:2].tolist() == pytest.approx([np.log(2) / 2] * 2)
    assert np.isnan(mean[2])


def test_a_layer_without_plans_is_counted_by_its_record():
    made = Recorder()
    made.count(0, Trail({Key("x"): Record(demand=torch.tensor([2, 3]))}))
    assert made.trace().demand(0).tolist() == [[2, 3]]
    made.count(0, Trail({Key("y"): Record()}))  # says nothing, counts nothing
    assert [layer.path for layer in made.trace().layers] == ["x"]


# Bounds -----------------------------------------------------------------------------------------------------------


def test_rows_are_bounded_and_no_count_is_lost():
    made = Recorder(Recording(max_rows=8))
    total = 0
    for step in range(100):
        counts = torch.tensor([step, 1])
        zero = torch.zeros((), dtype=torch.int64)
        sums = {"demand": counts, "load": counts, "units": zero, "entropy_units": zero, "entropy": zero.double()}
        made.count(step, {"x": Stats(sums)})
        total += step
    trace = made.trace()
    assert len(trace.counts) <= 8
    assert trace.demand(0).sum(0).tolist() == [total, 100]
    assert trace.counts.first.tolist() == [0, 16, 32, 48, 64, 80, 96]
    assert trace.counts.last.tolist() == [15, 31, 47, 63, 79, 95, 99]
    assert made._stride == 16


def test_samples_are_thinned_evenly_and_units_cut():
    made = Recorder(Recording(max_samples=4, max_units=10))
    for step in range(12):
        made.sample(step, "valid", random_trail(step), {"token": torch.arange(50)})
    made.sample(0, "train", random_trail(0), {"token": torch.arange(50)})
    steps = [s.step for s in made.trace().samples if s.name == "valid"]
    assert len(steps) <= 4
    assert steps[0] == 0
    assert steps[-1] == 11
    assert [s.step for s in made.trace().samples if s.name == "train"] == [0]
    assert all(s.tables[0].units == 10 and len(s.columns["token"]) == 10 for s in made.trace().samples)


def test_an_expert_choice_table_is_cut_to_the_units_that_are_kept():
    chosen = ExpertChoice(unit=torch.tensor([[[0, 9], [4, 5]]]), weight=torch.ones(1, 2, 2), num_units=10)
    made = Recorder(Recording(max_units=5))
    made.sample(0, "x", trail({"a": chosen}), {})
    table = made.trace().samples[0].tables[0]
    assert table.unit.tolist() == [[[0, -1], [4, -1]]]
    assert table.weight.tolist() == [[[1.0, 0.0], [1.0, 0.0]]]


def test_smallest_integers():
    assert smallest(np.array([0, 255])).dtype == np.uint8
    assert smallest(np.array([-1, 127])).dtype == np.int8
    assert smallest(np.array([-1, 128])).dtype == np.int16
    assert smallest(np.array([2**31])).dtype == np.int64
    assert smallest(np.array([-1, 200]), (np.int8, np.int16)).dtype == np.int16
    with pytest.raises(UserError, match="do not fit"):
        smallest(np.array([2**40]), (np.int8, np.int32))


# Resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 40, 41])
def test_a_resumed_recorder_writes_the_same_file(tmp_path, stop):
    def feed(made, steps):
        for step in steps:
            made.count(step, random_trail(step))
            if step % 7 == 0:
                made.sample(step, "valid", random_trail(step), {"token": torch.arange(50)})

    config = Recording(max_rows=16)
    whole = Recorder(config, pieces=str)
    feed(whole, range(60))
    first = Recorder(config, pieces=str)
    feed(first, range(stop))
    first.write(tmp_path / "t")
    second = Recorder.resume(tmp_path / "t", config, pieces=str, after=stop - 1)
    feed(second, range(stop, 60))
    same(second.trace(), whole.trace())


def test_cut_forgets_later_steps():
    made = recorded()
    made.cut(2)
    assert made.trace().counts.last.tolist() == [0, 1, 2]
    assert made.trace().samples == ()
    made.count(3, random_trail(3))


def test_steps_that_go_back_and_layers_that_change_are_refused():
    made = recorded()
    with pytest.raises(UserError, match=r"call cut\(2\)"):
        made.count(3, random_trail(0))
    with pytest.raises(UserError, match="had 6 experts and now has 7"):
        made.count(9, random_trail(0, experts=(4, 7)))
    with pytest.raises(UserError, match="columns of unequal length"):
        made.sample(9, "x", random_trail(0), {"token": torch.arange(5), "position": torch.arange(6)})
    with pytest.raises(UserError, match=r"Recording\.max_rows"):
        Recording(max_rows=1)


# Writing is all or nothing ----------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "trace.safetensors"
    recorded().write(path)
    before = path.read_bytes()

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open_new", lambda _: Full())
    with pytest.raises(UserError, match="No space left on device"):
        recorded().write(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["trace.safetensors"]


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "plain").write_text("x")
    with pytest.raises(UserError, match="cannot write the trace"):
        recorded().write(tmp_path / "plain" / "trace")
    with pytest.raises(UserError, match="cannot read the trace"):
        read(tmp_path / "plain" / "trace")
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "nothing")


# Damage -----------------------------------------------------------------------------------------------------------


def rewrite(tmp_path, change):
    """A good file with its header and arrays changed."""
    path = tmp_path / "t"
    recorded().write(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["moestro-trace"])
    arrays = dict(load_arrays(content))
    metadata = {}
    change(header, arrays, metadata)
    metadata = metadata or {"moestro-trace": json.dumps(header)}
    path.write_bytes(save(arrays, metadata=metadata))
    return path


CHANGES = {
    "another version": (lambda h, a, m: h.update(version=99), "reads version 1"),
    "another format": (lambda h, a, m: m.update(format="pt"), "no routing trace"),
    "no header": (lambda h, a, m: m.update({"moestro-trace": "{"}), "no valid JSON"),
    "deep header": (lambda h, a, m: m.update({"moestro-trace": "[" * 100_000}), "no valid JSON"),
    "a list": (lambda h, a, m: m.update({"moestro-trace": "[1]"}), "trace version None"),
    "no layers": (lambda h, a, m: h.pop("layers"), "malformed"),
    "layers a number": (lambda h, a, m: h.update(layers=3), "malformed"),
    "layer without a path": (lambda h, a, m: h["layers"][0].pop("path"), "malformed"),
    "path a number": (lambda h, a, m: h["layers"][0].update(path=3), "where a text belongs"),
    "negative experts": (lambda h, a, m: h["layers"][0].update(num_experts=-1), "whole number"),
    "huge experts": (lambda h, a, m: h["layers"][0].update(num_experts=10**30), "expected 5x2x"),
    "run a list": (lambda h, a, m: h.update(run=[]), "must be an object"),
    "missing counts": (lambda h, a, m: a.pop("counts.demand"), "'counts.demand' is missing"),
    "negative counts": (lambda h, a, m: a.update({"counts.demand": a["counts.demand"] - 5}), "negative"),
    "float counts": (lambda h, a, m: a.update({"counts.demand": a["counts.demand"] * 1.0}), "counts.demand"),
    "rows out of order": (lambda h, a, m: a.update({"counts.first": a["counts.first"][::-1].copy()}), "order"),
    "nan entropy": (lambda h, a, m: a.update({"counts.entropy": a["counts.entropy"] * np.nan}), "NaN"),
    "experts out of range": (
        lambda h, a, m: a.update({"sample.0.table.0.expert": a["sample.0.table.0.expert"] + 4}),
        r"must lie in -1\.\.3",
    ),
    "wrong shape": (lambda h, a, m: a.update({"sample.0.table.0.weight": np.zeros((50, 3), np.float16)}), "50x2"),
    "short bits": (lambda h, a, m: a.update({"sample.0.table.0.kept": np.zeros(3, np.uint8)}), "expected 13"),
    "columns of unequal length": (lambda h, a, m: a.update({"sample.0.token": np.arange(3)}), "expected 50|expected 3"),
    "unknown label": (lambda h, a, m: a.update({"sample.0.label.character": np.full(50, 9)}), "label.character"),
    "unknown table": (lambda h, a, m: h["samples"][0]["tables"][0].update(type="Fancy"), "unknown kind of table"),
    "layer out of range": (lambda h, a, m: h["samples"][0]["tables"][0].update(layer=7), "belongs to layer 7"),
    "extra tensor": (lambda h, a, m: a.update(surplus=np.zeros(3)), "unexpected tensor 'surplus'"),
    "piece without a number": (lambda h, a, m: h.update(pieces={"x": "y"}), "malformed|whole number|header"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_malformed_is_named(tmp_path, name):
    change, message = CHANGES[name]
    with pytest.raises(UserError, match=message) as caught:
        read(rewrite(tmp_path, change))
    assert str(tmp_path / "t") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "t"
    for content in (b"", b"short", b"not a safetensors file at all", os.urandom(300), b"PK\x03\x04" * 20):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no routing trace"):
            read(path)
    path.write_bytes(save({"w": np.zeros(3)}))
    with pytest.raises(UserError, match="no routing trace"):
        read(path)


def test_truncated_files_are_refused_at_every_length(tmp_path):
    path = tmp_path / "t"
    recorded().write(path)
    content = path.read_bytes()
    rng = random.Random(0)
    for length in [8, 100, len(content) - 1, *(rng.randrange(len(content)) for _ in range(40))]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="cut short"):
            read(path)


def test_flipped_bits_give_a_trace_or_a_user_error(tmp_path):
    path = tmp_path / "t"
    recorded().write(path)
    content = path.read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content) // 2)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):  # anything else fails the test
            read(path)


def test_writing_what_was_read_gives_the_same_bytes(tmp_path):
    recorded().write(tmp_path / "a")
    write(read(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
