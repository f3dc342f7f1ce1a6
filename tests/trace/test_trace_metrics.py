"""Metrics by hand, labels of text, the watch, and replay."""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from moestro.core.carry import Replay
from moestro.core.errors import UserError
from moestro.core.plan import Dense, ExpertChoice, demand, load
from moestro.core.trail import Key, Trail
from moestro.trace import Recording
from moestro.trace import metrics as m
from moestro.trace.labels import CHARACTERS, PYTHON, character_labels, labels_of_tokens, python_labels
from moestro.trace.read import read
from moestro.trace.record import Recorder, table_of
from moestro.trace.replay import plan_of, replay
from moestro.trace.watch import Watch
from trace_cases import plan, random_trail, record, trail

# Load -------------------------------------------------------------------------------------------------------------


def test_load_metrics_by_hand():
    counts = [[4, 2, 1, 1], [2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert m.load_share(counts)[0].tolist() == [0.5, 0.25, 0.125, 0.125]
    np.testing.assert_allclose(m.max_violation(counts), [1.0, 0.0, 3.0, np.nan])
    np.testing.assert_allclose(m.min_violation(counts), [0.5, 0.0, 1.0, np.nan])
    np.testing.assert_allclose(m.avg_violation(counts), [(1 + 0 + 0.5 + 0.5) / 4, 0.0, 1.5, np.nan])
    np.testing.assert_allclose(m.load_entropy(counts), [1.75 * math.log(2) / math.log(4), 1.0, 0.0, np.nan])
    assert m.load_entropy([[3]]).tolist() == [1.0]
    np.testing.assert_allclose(m.dropped_share([[4, 4], [0, 0]], [[3, 3], [0, 0]]), [0.25, np.nan])


def counted(steps, config=None):
    made = Recorder(config)
    for step, experts in enumerate(steps):
        made.count(step, trail({"ffn": plan([[e] for e in experts], 3)}))
    return made.trace()


def test_dead_experts_are_named_with_their_silence():
    trace = counted([[0, 1, 2]] * 2 + [[0, 1]] * 3 + [[0, 0]] * 4)
    assert m.dead_experts(trace, steps=5) == [m.Silent("ffn", 2, 7)]
    assert m.dead_experts(trace, steps=4) == [m.Silent("ffn", 1, 4), m.Silent("ffn", 2, 7)]
    assert m.dead_experts(trace, steps=8) == []
    # a run shorter than the window: only who never had a token
    assert m.dead_experts(counted([[0, 1]] * 3), steps=100) == [m.Silent("ffn", 2, 3)]
    assert m.dead_experts(Recorder().trace()) == []


def test_dead_experts_of_coarse_rows_are_not_overstated():
    steps = [[0, 1, 2]] * 10 + [[0, 1]] * 22
    trace = counted(steps, Recording(max_rows=4))
    assert len(trace.counts) == 4  # rows of 8 steps; the last token of expert 2 lies in the row 8..15
    assert m.dead_experts(trace, steps=16) == [m.Silent("ffn", 2, 16)]
    assert m.dead_experts(trace, steps=17) == []


# Tables -----------------------------------------------------------------------------------------------------------


def test_choices_leave_out_absent_virtual_and_padded_ones():
    made = plan([[0, 3], [1, -1], [2, 0]], 3, virtual=("null",), valid=torch.tensor([True, True, False]))
    unit, expert = m.choices(table_of(made, 0), 3)
    assert list(zip(unit.tolist(), expert.tolist())) == [(0, 0), (1, 1)]
    chosen = ExpertChoice(unit=torch.tensor([[[2, -1], [0, 2]]]), weight=torch.zeros(1, 2, 2), num_units=3)
    unit, expert = m.choices(table_of(chosen, 0), 2)
    assert sorted(zip(unit.tolist(), expert.tolist())) == [(0, 1), (2, 0), (2, 1)]
    unit, expert = m.choices(table_of(Dense(weight=torch.ones(2, 2)), 0), 2)
    assert len(unit) == 4


def sampled(*experts, names=None, tokens=None):
    made = Recorder()
    for i, table in enumerate(experts):
        token = torch.arange(len(table)) if tokens is None else torch.tensor(tokens[i])
        made.sample(i, "valid", trail({"ffn": plan(table, 4)}), {"token": token})
    return made.trace()


def test_saturation_is_the_share_of_choices_that_agree():
    trace = sampled([[0, 1], [2, 3], [0, 2]], [[1, 0], [2, 0], [1, 3]])  # order does not matter: 2, 1, 0 of 2 agree
    early, late = trace.samples
    assert m.saturation(trace, early, late) == {"ffn": 0.5}
    assert m.saturation(trace, late, late) == {"ffn": 1.0}


def test_saturation_of_other_tokens_is_refused():
    trace = sampled([[0], [1]], [[0], [1]], tokens=[[5, 6], [5, 7]])
    with pytest.raises(UserError, match="differ in 'token'"):
        m.saturation(trace, *trace.samples)
    trace = sampled([[0], [1]], [[0]])
    with pytest.raises(UserError, match="differ in 'token'"):
        m.saturation(trace, *trace.samples)


def test_coactivation_by_hand():
    table = table_of(plan([[0, 1], [0, 2], [1, 0], [3, -1]], 4), 0)
    counts = m.coactivation(table, 4)
    assert counts.tolist() == [[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    share = m.coactivation_share(table, 4)
    assert share[0, 1] == pytest.approx(2 / 3)
    assert share[1, 0] == 1.0
    assert np.isnan(share[0, 0])


def test_specialisation_by_hand():
    table = table_of(plan([[0, 1], [0, 2], [1, 0], [3, -1]], 4), 0)
    counts = m.label_counts(table, [0, 0, 1, -1], 3, 4)
    assert counts.tolist() == [[2, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert m.label_share(counts)[0].tolist() == [0.5, 0.25, 0.25, 0.0]
    assert np.isnan(m.label_share(counts)[2]).all()
    information, share = m.label_information([[5, 0], [0, 5]])
    assert information == pytest.approx(math.log(2))
    assert share == pytest.approx(1.0)
    assert m.label_information([[1, 3], [2, 6]]) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.0, abs=1e-12))
    assert m.label_information([[2, 3]]) == (0.0, 0.0)
    assert np.isnan(m.label_information([[0, 0]])).all()
    with pytest.raises(UserError, match="3 labels for 4 units"):
        m.label_counts(table, [0, 0, 1], 3, 4)
    tokens = m.token_counts(table, [7, 7, 9, 9], 4)
    assert {k: v.tolist() for k, v in tokens.items()} == {7: [2, 1, 1, 0], 9: [1, 1, 0, 1]}


def test_trace_lookup_names_what_exists():
    trace = sampled([[0], [1]])
    assert trace.index("ffn") == 0
    assert trace.last() is trace.samples[0]
    assert trace.last("train") is None
    with pytest.raises(UserError, match="did you mean 'ffn'"):
        trace.index("fnn")


# Labels -----------------------------------------------------------------------------------------------------------


def names_of(labels, names, data):
    return [(data[i : i + 1].decode("latin-1"), names[v]) for i, v in enumerate(labels)]


def test_kinds_of_characters():
    data = b'  aB_9\n\tx = "(+.)"\r\n'
    kinds = [name for _, name in names_of(character_labels(data), CHARACTERS, data)]
    line, want = "newline, indent", []
    want += [line, line, "lowercase", "uppercase", "underscore", "digit", line, line, "lowercase", "space", "operator"]
    want += ["space", "quote", "bracket", "operator", "punctuation", "bracket", "quote", line, line]
    assert kinds == want
    assert [CHARACTERS[i] for i in character_labels("é\0".encode())] == ["non-ASCII", "non-ASCII", "control"]
    assert character_labels(b"").shape == (0,)
    assert character_labels(np.array([97, 256, -1])).tolist() == [0, -1, -1]


def kind_at(source, piece):
    labels = python_labels(source)
    start = source.index(piece)
    kinds = {PYTHON[i] for i in labels[start : start + len(piece)]}
    assert len(kinds) == 1, f"{piece!r} is {kinds}"
    return kinds.pop()


def test_kinds_of_python_tokens():
    source = (
        b"class Ab_1(x):  # note 'quoted'\n"
        b"    text = rb\"raw # no comment\" + 'it\\'s'\n"
        b'    """doc\n\n    string"""\n'
        b"    return 0x1F + 1.5e-3 if \xc3\xa9 else None\n"
        b"$\n"
    )
    for piece, kind in {
        b"class": "keyword",
        b"Ab_1": "identifier",
        b"# note 'quoted'": "comment",
        b'rb"raw # no comment"': "string",
        b"'it\\'s'": "string",
        b'"""doc\n\n    string"""': "string",
        b"0x1F": "number",
        b"1.5e-3": "number",
        b"return": "keyword",
        b"None": "keyword",
        b"\xc3\xa9": "identifier",
        b"\n    text"[:5]: "newline, indent",
        b" = ": "space",
        b"+": "operator",
        b"$": "other",
    }.items():
        if kind == "space":
            assert PYTHON[python_labels(source)[source.index(piece)]] == "space"
        else:
            assert kind_at(source, piece) == kind


def test_every_keyword_and_only_whole_words():
    for word in keyword.kwlist:
        source = f"a{word} {word} {word}_b".encode()
        kinds = [PYTHON[i] for i in python_labels(source)]
        start = len(word) + 2
        assert set(kinds[start : start + len(word)]) == {"keyword"}
        assert set(kinds[: len(word) + 1]) == {"identifier"}


def test_unfinished_strings_end_with_the_line_or_the_text():
    assert kind_at(b"x = 'open\ny = 1\n", b"'open") == "string"
    assert kind_at(b"x = 'open\ny = 1\n", b"y") == "identifier"
    assert kind_at(b'x = """open\nstill', b"still") == "string"
    assert kind_at(b"x = '''open\\", b"open\\") == "string"
    assert kind_at(b"x = 'open\\", b"open\\") == "string"


def test_any_bytes_are_labelled():
    rng = random.Random(5)
    for _ in range(200):
        data = bytes(rng.choice(b"\"'\\#\n abc09._\xff\x00([") for _ in range(rng.randrange(60)))
        for labels, names in ((character_labels(data), CHARACTERS), (python_labels(data), PYTHON)):
            assert len(labels) == len(data)
            assert not len(labels) or (labels.min() >= 0 and labels.max() < len(names))


def test_long_hostile_text_takes_linear_time():
    for unit in (b"'", b'"""', b"\\", b"1", b"((((", b"rb", b'"\\'):
        data = unit * 40_000
        assert len(python_labels(data)) == len(data)


def test_tokens_take_the_label_of_most_of_their_bytes():
    data = b" the9)"
    labels = labels_of_tokens(character_labels(data), [4, 0, 1, 1])
    assert [CHARACTERS[i] if i >= 0 else None for i in labels] == ["lowercase", None, "digit", "bracket"]
    with pytest.raises(UserError, match="cover 3 bytes"):
        labels_of_tokens(character_labels(data), [1, 2])
    assert labels_of_tokens(character_labels(b""), []).shape == (0,)


# The watch --------------------------------------------------------------------------------------------------------


def test_an_expert_is_named_after_exactly_100_silent_steps_and_once():
    watch = Watch()
    named = {}
    for step in range(1, 251):
        counts = {"a": torch.tensor([5, int(step <= 50)]), "b": np.array([1, 1, 1])}
        for found in watch.step(counts):
            named.setdefault(step, []).append(found)
    assert named == {150: [m.Silent("a", 1, 100)]}
    assert watch.silent() == [m.Silent("a", 1, 200)]
    watch.step({"a": torch.tensor([0, 3])})
    assert watch.silent() == []


def test_the_watch_resumes_from_its_dict():
    rng = np.random.default_rng(0)
    steps = [{"x": rng.integers(0, 2, 6) * (rng.random(6) < 0.3)} for _ in range(200)]
    whole, first = Watch(4), Watch(4)
    events = [whole.step(counts) for counts in steps]
    assert any(events)
    for counts in steps[:77]:
        first.step(counts)
    second = Watch.from_dict(json.loads(json.dumps(first.to_dict())))
    assert [second.step(counts) for counts in steps[77:]] == events[77:]
    assert second.silent() == whole.silent()
    with pytest.raises(UserError, match="patience"):
        Watch(0)


# Replay -----------------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.router = nn.Linear(2, experts)
        self.router.num_experts = experts


def test_replay_gives_back_the_recorded_choices(tmp_path):
    valid = torch.arange(50) < 45
    kept = (torch.rand(50, 2, generator=torch.Generator().manual_seed(1)) < 0.7) & valid[:, None]
    trails = random_trail(3, valid=valid, kept=kept)
    made = Recorder(Recording(weights="float32"))
    made.sample(0, "valid", trails, {"token": torch.arange(50)})
    made.write(tmp_path / "t")
    trace = read(tmp_path / "t")
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.ModuleDict({"ffn": Routed(e)}) for e in (4, 6))})
    carry = replay(trace, trace.samples[0], model)
    assert sorted(carry.own) == ["blocks.0.ffn", "blocks.1.ffn"]
    for key, want in trails.plans().items():
        given = carry.own[key.path]
        assert isinstance(given, Replay)
        for name in ("expert", "weight", "kept", "valid"):
            assert torch.equal(getattr(given.plan, name), getattr(want, name)), name
        assert torch.equal(demand(given.plan), demand(want))
        assert torch.equal(load(given.plan), load(want))
    # the carry reaches its layer by narrowing, as parents do
    assert carry.at("blocks").at("1").at("ffn").mine is carry.own["blocks.1.ffn"]


def test_every_kind_of_plan_is_given_back():
    virtual = plan([[0, 4], [5, -1]], 4, virtual=("null", "copy"), meta={"task": torch.tensor([3, 1])}, capacity=9)
    chosen = ExpertChoice(
        unit=torch.tensor([[[0, 1], [1, -1]]]), weight=torch.tensor([[[0.5, 1], [1, 0]]]), num_units=2
    )
    dense = Dense(weight=torch.rand(2, 3), valid=torch.tensor([True, True]))
    made = Recorder(Recording(weights="float32"))
    made.sample(0, "x", Trail({Key("a"): record(virtual), Key("b"): record(chosen), Key("c"): record(dense)}), {})
    trace = made.trace()
    for want, table in zip((virtual, chosen, dense), trace.samples[0].tables):
        got = plan_of(table, trace.layers[table.layer])
        assert type(got) is type(want)
        for field in dataclasses.fields(want):
            a, b = getattr(got, field.name), getattr(want, field.name)
            if isinstance(b, torch.Tensor):
                assert torch.equal(a, b), field.name
            elif field.name not in ("extra", "meta"):
                assert a == b, field.name
    assert plan_of(trace.samples[0].tables[0], trace.layers[0]).meta["task"].tolist() == [3, 1]


def test_replay_into_another_model_is_refused():
    made = Recorder()
    made.sample(0, "x", random_trail(0, experts=(4,)), {})
    trace = made.trace()
    with pytest.raises(UserError, match="no module of this model"):
        replay(trace, trace.samples[0], nn.ModuleDict({"block": Routed(4)}))
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"ffn": Routed(5)})])})
    with pytest.raises(UserError, match="has 5 experts, and the trace was recorded with 4"):
        replay(trace, trace.samples[0], model)
    with pytest.raises(UserError, match="no table of pass 3"):
        replay(trace, trace.samples[0], pass_=3)
