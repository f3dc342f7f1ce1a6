"""The page: one file, inert whatever the texts are, with every number behind every picture."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from moestro.core import files
from moestro.core.errors import UserError
from moestro.core.trail import Key, Record, Trail
from moestro.report.figures import curves, kinds, load
from moestro.report.figures.draw import plain
from moestro.report.page import Generated, ReportData, render, write
from moestro.report.table import Line, Table
from moestro.trace.metrics import load_share
from moestro.trace.record import Recorder
from report_cases import HOSTILE, metrics, report, routed, trace

VOID = {"meta", "link", "br", "img", "input", "hr"}
ALLOWED = set(
    re.findall(
        r"\w+",
        "html head meta title style body header h1 h2 h3 p nav a main section div span table thead tbody tr th td "
        "details summary figure figcaption footer pre small bdi b svg g path defs use text tspan rect image clippath",
    )
)


class Page(HTMLParser):
    """Checks nesting while reading, and keeps elements and texts."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.stack: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:60]}")


@pytest.fixture(scope="module")
def small():
    """A trace of two layers, so that pictures are quick."""
    return trace(steps=60, layers=2, experts=4)


@pytest.fixture(scope="module")
def normal(small):
    return render(report(trace=small))


def hostile_data(small):
    labels = {f"kind {HOSTILE}": tuple(f"{HOSTILE} {i}" for i in range(12))}
    samples = tuple(
        dataclasses.replace(s, name=HOSTILE, columns={"token": s.columns["token"], f"label.kind {HOSTILE}": l})
        for s in small.samples
        for l in [s.columns["label.character"]]
    )
    layers = tuple(dataclasses.replace(layer, path=f"{HOSTILE}.{i}") for i, layer in enumerate(small.layers))
    pieces = {int(i): HOSTILE for i in np.unique(samples[0].columns["token"])}
    bad = dataclasses.replace(
        small, labels=labels, samples=samples, layers=layers, pieces=pieces, data={HOSTILE: [HOSTILE]}
    )
    line = Line(quantity=HOSTILE, values=(1.0, 2.0), unit=HOSTILE, better="lower")
    return ReportData(
        title=HOSTILE,
        lead=HOSTILE,
        metrics=[row | {"run": HOSTILE, "model": HOSTILE} for row in metrics(60)],
        trace=bad,
        comparison=Table(title=HOSTILE, models=(HOSTILE, HOSTILE), lines=(line,), notes=(HOSTILE,)),
        config={HOSTILE: {HOSTILE: HOSTILE}, "list": [{HOSTILE: 1}]},
        environment={HOSTILE: HOSTILE},
        samples=[Generated(model=HOSTILE, prompt=HOSTILE, text=HOSTILE)],
        command=HOSTILE,
        notes=[HOSTILE],
    )


def inert(content: str) -> Page:
    """Nothing on the page can run, fetch or escape."""
    read = Page(content)
    tags = {tag for tag, _ in read.elements}
    assert tags <= ALLOWED, tags - ALLOWED
    for tag, attributes in read.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
            if name == "style":
                assert "url(" not in value.replace("url(#", ""), value
    assert "http://" not in content.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "https://" not in content
    assert "@import" not in content
    assert re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069]", content) is None
    policy = [a for tag, a in read.elements if tag == "meta" and "http-equiv" in a]
    assert policy[0]["content"].startswith("default-src 'none'")
    return read


def test_a_normal_page_is_inert_and_complete(normal):
    read = inert(normal)
    titles = [text for tag, text in read.texts if tag == "h2"]
    assert titles == [
        "Result",
        "Learning",
        "Load of the experts",
        "What the experts take",
        "Generated text",
        "Settings",
    ]
    figures = sum(tag == "figure" for tag, _ in read.elements)
    assert figures == sum(tag == "svg" for tag, _ in read.elements) == 10
    assert figures == sum(tag == "figcaption" for tag, _ in read.elements)
    assert all("aria-label" in a for tag, a in read.elements if tag == "svg")
    shown = " ".join(text for _, text in read.texts)
    for piece in ("moestro train nano --seed 0", "def main(", "2.13.0", "model.layers[0].experts", "standard library"):
        assert piece in shown
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for _, a in read.elements if a.get("href", "").startswith("#")]
    assert set(targets) <= set(ids)


def test_a_hostile_corpus_is_inert(small):
    read = inert(render(hostile_data(small)))
    assert not any(tag in ("script", "img", "iframe", "object") for tag, _ in read.elements)
    shown = [text for tag, text in read.texts if tag not in ("style", "title")]
    # it is shown as the text that it is: in headings, pictures, chips, tables, samples and settings
    places = {tag for tag, text in read.texts if "<img src=x onerror=alert(1)>" in text}
    assert places >= {"h1", "h3", "p", "pre", "span", "td", "th", "figcaption", "title"}
    assert {tag for tag, text in read.texts if "</script>" in text} >= {"text", "bdi"}  # these are cut short
    assert any("</script></style></title>" in text for text in shown)
    assert sum(tag == "style" for tag, _ in read.elements) == 1


def test_text_of_any_kind_is_plain():
    assert plain("a\x00b\x1b\x7f") == "a\u2400b\u241b\u2421"
    assert plain("tab\tline\n") == "tab\tline\n"
    assert plain("\ud800") == "?"
    assert plain("\u202eabc\u2069") == "\ufffdabc\ufffd"


def test_two_renderings_are_equal(small, normal):
    assert render(report(trace=small)) == normal


def test_an_empty_report_has_no_sections():
    read = inert(render(ReportData()))
    assert [text for tag, text in read.texts if tag == "h1"] == ["A sparse language model"]
    assert not any(tag in ("section", "figure") for tag, _ in read.elements)


def test_a_trace_of_one_pass_shows_what_it_has():
    made = Recorder()
    plan = routed(b"def f(x): return x\n" * 20, 0, 4, 2.0, 0)
    trails = Trail({Key("ffn"): Record(plan=plan)})
    made.count(0, trails)
    made.sample(0, "given text", trails, {"token": torch.arange(380) % 100})
    read = inert(render(ReportData(title="inspected", trace=made.trace())))
    shown = [text for tag, text in read.texts if tag == "h3"]
    assert shown[:1] == ["Share of each expert"]
    assert "Load of every expert over time" not in shown
    assert "The most characteristic characters of every expert" in shown


def test_silent_experts_are_named(normal, small):
    assert "blocks.1.ffn, expert 3: no token in the last 40 steps" not in normal  # patience is 100, the run has 60
    named = render(ReportData(trace=dataclasses.replace(small, samples=()), patience=30))
    assert "<b>Experts without tokens</b>" in named
    assert "blocks.1.ffn, expert 3: no token in the last 40 steps" in named
    assert "Every expert had tokens" in render(
        ReportData(trace=dataclasses.replace(trace(steps=20, layers=1, experts=4, silent=False), samples=()))
    )


def test_lost_choices_are_named(small):
    whole = dataclasses.replace(small, samples=())
    cut = dataclasses.replace(small.counts, load=small.counts.demand // 2)
    shown = render(ReportData(trace=dataclasses.replace(whole, counts=cut)))
    assert re.search(r"lost to capacity over the whole run: blocks\.0\.ffn 50\.\d\d %", shown)
    assert "lost to capacity" not in render(ReportData(trace=whole))


# Pictures and their numbers ---------------------------------------------------------------------------------------


def test_every_picture_has_its_data(small):
    sample = small.last("valid")
    pictures = [
        curves.bits_per_byte(metrics(60), "step"),
        curves.bits_per_byte(metrics(60), "seconds"),
        load.load_over_time(small),
        load.load_at_end(small),
        load.imbalance_over_time(small),
        load.entropy_over_time(small),
        kinds.kinds_map(small, sample, "character"),
        kinds.coactivation_map(small, sample),
        kinds.saturation_curve(small),
    ]
    for picture in pictures:
        assert picture.svg.startswith("<svg")
        assert "var(--" in picture.svg
        assert "#0101" not in picture.svg
        assert "#0102" not in picture.svg
        assert picture.rows
        assert {len(row) for row in picture.rows} == {len(picture.columns)}
        assert picture.caption.endswith(".")


def test_the_table_of_loads_holds_the_loads(small):
    picture = load.load_at_end(small)
    tail = small.load(0)[54:].sum(0)
    assert "steps 55–60" in picture.caption
    assert [row[2] for row in picture.rows[:4]] == pytest.approx((100 * load_share(tail)).tolist())
    assert picture.columns == ("layer", "expert", "share of rows (%)")
    over = load.load_over_time(small)
    first = small.load(1)[:1].sum(0)
    assert over.rows[4][2] == pytest.approx(4 * load_share(first)[0])
    entropy = load.entropy_over_time(small)
    assert entropy.rows[0][3] == pytest.approx(small.counts.mean_entropy()[0, 0])


def test_routing_entropy_comes_from_evaluations_where_training_did_not_measure_it(small):
    path = small.layers[1].path
    unmeasured = dataclasses.replace(small.counts, entropy_units=small.counts.entropy_units * 0)
    trace = dataclasses.replace(small, counts=unmeasured)
    assert load.entropy_over_time(trace) is None
    rows = [{"step": 20, "routing_entropy": {path: 1.25}}, {"step": 20, "routing_entropy": {}}, {"step": 40}]
    picture = load.entropy_over_time(trace, rows)
    assert [(row[0], row[3]) for row in picture.rows] == [(path, 1.25)]


def test_the_table_of_kinds_sums_to_a_hundred(small):
    picture = kinds.kinds_map(small, small.last("valid"), "character")
    for row in picture.rows:
        assert sum(row[3:]) == pytest.approx(100)
    assert {row[1] for row in picture.rows} >= {"lowercase", "space", "bracket"}
    assert "control" not in {row[1] for row in picture.rows}  # does not occur


def test_validation_points_are_all_in_the_table():
    picture = curves.bits_per_byte(metrics(400), "step")
    valid = [row for row in picture.rows if row[:2] == ("sparse", "valid")]
    want = [(r["step"], r["bpb"]) for r in metrics(400) if r["split"] == "valid" and r["model"] == "sparse"]
    assert [(row[2], row[3]) for row in valid] == want
    assert curves.bits_per_byte([], "step") is None
    assert curves.bits_per_byte([{"split": "train", "step": 1, "bpb": float("nan")}]) is None


def test_characteristic_tokens_by_hand():
    expert = torch.tensor([[0], [0], [0], [1], [1], [1], [1], [0]])
    plan = dataclasses.replace(routed(b"x", 0, 2, 1.0, 0), expert=expert, weight=torch.ones(8, 1), probs=None)
    made = Recorder()
    made.sample(0, "s", Trail({Key("ffn"): Record(plan=plan)}), {"token": [5, 5, 5, 6, 6, 7, 7, 7]})
    found = kinds.characteristic_tokens(made.trace(), made.trace().samples[0])
    # expert 0 has half of all choices and all of token 5: lift 2; expert 1 has all of 6, and 2 of 3 of 7
    assert found == [("ffn", 0, [(5, 3, 2.0)]), ("ffn", 1, [(6, 2, 2.0), (7, 2, pytest.approx(4 / 3))])]


def test_no_labels_no_map(small):
    sample = dataclasses.replace(small.last("valid"), columns={})
    assert kinds.kinds_map(small, sample, "character") is None
    assert kinds.characteristic_tokens(small, sample) == []
    top1 = dataclasses.replace(
        small.last("valid"), tables=tuple(dataclasses.replace(t, expert=t.expert[:, :1]) for t in sample.tables)
    )
    assert kinds.coactivation_map(small, top1) is None
    assert kinds.saturation_curve(dataclasses.replace(small, samples=small.samples[:2])) is None


def test_many_layers_and_experts_stay_readable():
    big = trace(steps=4, layers=13, experts=20, names="encoder.stages.{}.blocks.of.something.with.a.long.path")
    over = load.load_over_time(big)
    assert over.caption.endswith("Shown: 12 of 13 layers.")
    assert over.svg.count("<image") == 13  # 12 panels and the key
    assert over.svg.count("…") == 12
    assert len(over.rows) == 12 * 20
    together = kinds.coactivation_map(dataclasses.replace(big, layers=big.layers[:2]), big.last())
    assert together.columns[:3] == ["layer", "expert", "with expert"]  # pairs in place of matrices
    assert len(together.rows) == 80
    assert together.rows[0][3] == max(row[3] for row in together.rows[:40])


# Files and imports ------------------------------------------------------------------------------------------------


def test_writing_replaces_the_whole_file_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write(path, ReportData(title="first"))
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open_new", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(path, ReportData(title="second"))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(UserError, match="cannot write the report"):
        write(path / "below", ReportData())


def test_matplotlib_is_loaded_by_pictures_only_and_left_as_it_was():
    code = """
import sys
import moestro.report.page as page, moestro.report.table
from moestro.report.figures import curves, load, kinds
assert "matplotlib" not in sys.modules, "loaded too early"
page.render(page.ReportData(title="x"))
assert "matplotlib" not in sys.modules, "loaded without a picture"
import matplotlib
before = list(dict.items(matplotlib.rcParams))  # reading single settings would choose a backend
curves.bits_per_byte([{"split": "valid", "step": i, "bpb": 2.0 - i} for i in range(2)])
assert list(dict.items(matplotlib.rcParams)) == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
