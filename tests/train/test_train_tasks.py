"""Runs on examples: trained, resumed to the last bit, loaded and evaluated again; what is wrong is said in one line."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli.app import run as command
from moestro.cli.train import read
from moestro.core.errors import UserError
from moestro.models.config import Decoder, EncoderDecoder, Headed
from moestro.models.heads_config import ClassHead
from moestro.nn.config import FeedForward
from moestro.routers.config import Constant, Label, Router, Uniform
from moestro.tasks import (
    Classify,
    FindSpan,
    LabelledTexts,
    NextToken,
    SpanQuestions,
    TextPairs,
    Translate,
    Translations,
    TwoPass,
)
from moestro.tasks.data import Banking77, BpeVocabulary, ByteVocabulary, Gsm8k, WordVocabulary
from moestro.tasks.feed import prepare_examples
from moestro.tasks.vocabulary_file import VocabularyTokenizer, read_vocabulary
from moestro.testing.kills import compare
from moestro.train.config import TrainRun
from moestro.train.held_out import evaluated, held_out
from moestro.train.load import load
from moestro.train.presets import PRESETS
from moestro.train.run import run
from moestro.train.stop import Stop
from train.task_cases import KINDS, encoder, layer, task_run, write
from train.test_train_steps import grads
from train.train_cases import Steps, rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def files(place: Path) -> dict[str, Path]:
    return write(place)


@pytest.fixture(scope="module")
def done(place: Path, files: dict[str, Path]) -> dict[str, Path]:
    """kind -> the folder of a finished run."""
    for kind in KINDS:
        config = task_run(kind, files[kind], save_every=1)
        run(config.replace(twin=kind == "translation", report=kind == "translation"), out=place / kind)
    return {kind: place / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_say_nats_and_the_tasks_metrics(done: dict[str, Path], kind: str) -> None:
    steps, evals = rows(done[kind], "step"), rows(done[kind], "eval")
    assert (len(steps), len(evals)) == (4, 2)
    for row in steps + evals:
        assert "bits_per_byte" not in row
        assert math.isfinite(row["nats"])
        assert 0 <= row["metrics"]["accuracy"] <= 1
    assert {"consistency"} & set(steps[0]["metrics"]) == ({"consistency"} if kind == "translation" else set())
    assert steps[-1]["tokens"] == sum(
        b.num_tokens for b in (held_out(load(done[kind])).train(step, 8) for step in range(4))
    )
    summary = json.loads((done[kind] / "summary.json").read_text())["table"]
    assert summary[0]["nats"] == evals[-1]["nats"]
    assert summary[0]["metrics"] == evals[-1]["metrics"]
    assert "bits_per_byte" not in summary[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_loaded_and_evaluated_as_it_was(done: dict[str, Path], kind: str) -> None:
    loaded = load(done[kind], state="last")
    found = evaluated(loaded, held_out(loaded))
    assert found.score == rows(done[kind], "eval")[-1]["nats"]
    assert isinstance(loaded.tokenizer, VocabularyTokenizer)


def test_models_are_filled_with_what_the_data_say(done: dict[str, Path]) -> None:
    models = {kind: load(done[kind]).config.model for kind in KINDS}
    vocabulary = {kind: load(done[kind]).tokenizer.vocabulary for kind in KINDS}  # type: ignore[attr-defined]
    both = models["translation"]
    assert isinstance(both, EncoderDecoder)
    assert both.encoder.vocab_size == both.decoder.vocab_size == vocabulary["translation"].size
    assert both.start == vocabulary["translation"].bos
    headed = models["labels"]
    assert isinstance(headed, Headed)
    assert isinstance(headed.head, ClassHead)
    assert headed.head.num_classes == 2
    assert vocabulary["questions"].size == 262
    assert vocabulary["pairs"].specials[-2:] == ("<x>", "<y>")


def test_the_twin_and_the_report(done: dict[str, Path]) -> None:
    assert [r["step"] for r in rows(done["translation"] / "dense", "eval")] == [2, 4]
    page = (done["translation"] / "report.html").read_text()
    assert "A sparse translation model and its dense twin" in page
    assert "Nats per target" in page
    assert "validation accuracy" in page


@pytest.mark.parametrize("kind", ["translation", "pairs"])
def test_a_run_goes_on_to_the_last_bit(place: Path, files: dict[str, Path], done: dict[str, Path], kind: str) -> None:
    class Died(Exception):
        pass

    def then(info: Any) -> None:
        if info.step == 3 and info.arm != "dense":
            raise Died

    out = place / f"again-{kind}"
    config = task_run(kind, files[kind], save_every=1, twin=kind == "translation")
    with pytest.raises(Died):
        run(config, out=out, progress=Steps(then))
    assert run(out=out, resume=True).complete
    assert compare(done[kind], out) == []


def test_other_examples_are_another_run(place: Path, files: dict[str, Path]) -> None:
    path = place / "changed.csv"
    path.write_text(files["labels"].read_text())
    run(task_run("labels", path, steps=1, eval_every=1), out=place / "changed")
    path.write_text(files["labels"].read_text().replace("red", "blue"))
    with pytest.raises(UserError, match=r"resume: the data of changed\.csv is not the one"):
        run(out=place / "changed", resume=True)
    with pytest.raises(UserError, match="not what this run was trained on"):
        held_out(load(place / "changed"))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(files: dict[str, Path], kind: str) -> None:
    from moestro.train.ranks import Ranks
    from moestro.train.step import Gradients

    found = []
    for size in (0, 2):
        config = task_run(kind, files[kind], micro_batch=size)
        prepared = prepare_examples(config.data)  # type: ignore[arg-type]
        from moestro.train.material import ExampleMaterial

        model = ExampleMaterial(prepared).fill(config).build()
        made = Gradients(model, config.objective.build(), prepared.feed(48, 0), config, Ranks())
        found.append((made(0, Stop()), grads(model)))
    (whole, want), (parts, got) = found
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.tokens == whole.tokens
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)
    scale = max(float(g.norm()) for g in want.values())
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-5 * scale, name


def test_a_pairs_domain_is_the_label_of_its_tokens(place: Path, files: dict[str, Path]) -> None:
    """Brief 34: enforced routing, expert = domain."""
    labelled = layer(num_experts=2, router=Router(score=Uniform(), select=Label(), weigh=Constant()), losses=())
    config = task_run("pairs", files["pairs"], steps=1, eval_every=1, batch_size=16)
    model = config.model.replace(encoder=encoder(moe=labelled))
    seen = Steps()
    run(config.replace(model=model), out=place / "domains", progress=seen)
    (info,) = seen.infos
    batch = held_out(load(place / "domains")).train(0, 16)
    each = batch.a_valid.sum(1) + batch.b_valid.sum(1)
    want = torch.zeros(2, dtype=torch.int64).index_add(0, batch.domain, each)
    assert info.counts["encoder.layers.1.ffn"].tolist() == want.tolist()
    few = config.replace(model=config.model.replace(encoder=encoder(moe=labelled.replace(num_experts=1))))
    with pytest.raises(UserError, match=r"2 domains \(x, y, \.\.\.\), but a layer .* has 1; give it as many"):
        run(few, out=place / "too-few")


def test_published_sets_and_folders_with_splits(tmp_path: Path) -> None:
    found = [{"split": s, "text": f"text {i}", "label": "ab"[i % 2]} for i in range(30) for s in ("train", "test")]
    (tmp_path / "banking77.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    made = prepare_examples(LabelledTexts(published=Banking77(folder=str(tmp_path))))
    assert made.record["labels"] == ["a", "b"]
    with pytest.raises(UserError, match="holds Labelled examples, not Translation"):
        prepare_examples(Translations(published=Banking77(folder=str(tmp_path))))
    place = tmp_path / "own"
    place.mkdir()
    with gzip.open(place / "train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": f"t {i}", "label": i % 11}) + "\n" for i in range(22)))
    (place / "dev.csv").write_text("text,label\nt,10\n")
    made = prepare_examples(LabelledTexts(path=str(place)))
    assert made.record["splits"] == {"train": {"examples": 22}, "valid": {"examples": 1}}
    assert made.record["labels"] == [str(i) for i in range(11)]  # numbers in their order
    assert made.data.valid[0].label == 10


@pytest.mark.parametrize("config", [ByteVocabulary(), WordVocabulary(size=20), BpeVocabulary(size=300)])
def test_vocabularies_come_back_from_their_files(tmp_path: Path, config: Any) -> None:
    if isinstance(config, BpeVocabulary):
        config = config.replace(cache=str(tmp_path))
    made = config.build(["the cat sat", "the dog sät <eos>"], more=("<x>",))
    (tmp_path / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
    again = read_vocabulary(tmp_path / "tokenizer.json")
    assert (again.key, again.size, again.specials) == (made.key, made.size, made.specials)
    text = "the cat <eos> sät"
    assert again.encode(text) == made.encode(text)
    assert VocabularyTokenizer(again).encode(text.encode()).lengths.sum() == len(text.encode())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no vocabulary of examples"):
        read_vocabulary(tmp_path / "tokenizer.json")


BAD: list[tuple[type, str, str, str]] = [
    (Translations, "x.tsv", "source\ttarget\na\tb\nc\n", r"x\.tsv, line 3: 1 columns, the first line names 2"),
    (Translations, "x.tsv", "a\tb\nc\td\n", r"x\.tsv, line 1: no column 'source' \(found a, b\)"),
    (Translations, "x.csv", 'source,target\n"a,b\n', r"x\.csv, line 2: no table"),
    (Translations, "x.jsonl", '{"source": "a", "target": "b"}\n\n{"source": "a"\n', r"x\.jsonl, line 3: no JSON"),
    (Translations, "x.jsonl", '{"source": "a"}\n', r"x\.jsonl, line 1: no 'target' \(found source\)"),
    (Translations, "x.jsonl", '{"source": "a", "target": 3}\n', r"x\.jsonl, line 1: target should be a text, found 3"),
    (Translations, "x.json", '{"source": "a"}', r"x\.json: no list of objects with source, target"),
    (Translations, "x.json", "[3]", r"x\.json, entry 1: no object with named fields"),
    (Translations, "x.txt", "a", r"x\.txt: not one of \.jsonl"),
    (Translations, "x.tsv", "source\ttarget\na\tb\n", r"0 examples to learn from and 1 held out|1 examples"),
    (LabelledTexts, "x.csv", "text,label\na,\n", r"x\.csv, line 2: label should be a name or a whole number"),
    (LabelledTexts, "x.jsonl", '{"text": "a", "label": 0.5}\n', r"line 1: label should be a name or a whole number"),
    (TextPairs, "x.csv", "a,b,similar\nu,v,perhaps\n", r"x\.csv, line 2: similar should be 1 or 0, found 'perhaps'"),
    (TextPairs, "x.jsonl", '{"a": "u", "b": "v", "domain": "d"}\n{"a": "u", "b": "v"}\n', r"line 2: no 'domain'"),
    (SpanQuestions, "x.json", '{"data": [{"paragraphs": [{}]}]}', r"x\.json.*paragraphs 1: no field 'context'"),
    (SpanQuestions, "x.csv", "context,question,answers\n", r"x\.csv: questions are JSON in SQuAD's format"),
]


@pytest.mark.parametrize(("kind", "name", "content", "said"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_files_are_named_with_their_line(tmp_path: Path, kind: Any, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        prepare_examples(kind(path=str(tmp_path / name)))


def test_places_without_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        prepare_examples(TextPairs(path=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"no file here ends in \.jsonl"):
        prepare_examples(TextPairs(path=str(tmp_path)))
    with pytest.raises(UserError, match="TextPairs: no examples; name a file or folder with rows of a, b"):
        prepare_examples(TextPairs())
    with pytest.raises(UserError, match="grade-school-math"):
        prepare_examples(TextPairs(published=Gsm8k(folder=str(tmp_path))))


def test_what_does_not_belong_together_is_refused() -> None:
    labels = {"data": LabelledTexts(), "objective": Classify()}
    both = {"data": Translations(), "objective": Translate(), "model": EncoderDecoder()}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**labels}, "data of LabelledTexts need Headed with ClassHead, found Decoder"),
        ({**labels, "objective": NextToken(), "model": Headed()}, "NextToken cannot be learnt from LabelledTexts"),
        ({"objective": TwoPass(inner=FindSpan())}, "FindSpan cannot be learnt from StandardLibrary"),
        ({**labels, "model": Headed(), "seq_len": 999}, r"raise model\.encoder\.context"),
        ({**both, "frozen": ("embed",)}, r"TrainRun\.frozen is not for an encoder-decoder"),
        ({**labels, "model": Headed(), "start": "x", "twin": False}, r"TrainRun\.start is for language models"),
    ]
    for fields, said in wrong:
        with pytest.raises(UserError, match=said):
            TrainRun(**fields)
    run = TrainRun(**labels, model=Headed(top=FeedForward(width=8)))
    assert TrainRun.from_dict(run.to_dict()) == run
    with pytest.raises(UserError, match=r"data\.model: Headed has no field 'dim'"):
        TrainRun.from_dict({"model": {"type": "models.Headed", "dim": 3}}, where="data")


def test_the_data_option_keeps_what_else_the_preset_says(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]
) -> None:
    monkeypatch.setitem(PRESETS, "mine", lambda: task_run("pairs", Path("elsewhere")))
    _, config, _ = read(["mine", "--data", str(files["pairs"]), "--steps", "3", "--data.pool", "2"])
    assert config.data == TextPairs(path=str(files["pairs"]), domain_tokens=True, pool=2)
    assert config.steps == 3
    with pytest.raises(UserError, match="--tokenizer is for text"):
        read(["mine", "--tokenizer", "x.json"])


def test_generate_translates_lines_and_refuses_the_rest(
    done: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ["generate", str(done["translation"]), "--prompt", "red cat\ndog ran", "--max-tokens", "3"]
    assert command(args) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert command([*args, "--json", "--beams", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["beams"] == 1
    assert command(["generate", str(done["labels"]), "--prompt", "red cat"]) != 0
    assert "needs a language model (Decoder); this one is a Headed" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("red cat sat " * 20)
    assert command(["inspect", str(done["pairs"]), "--data", str(tmp_path / "text.txt")]) != 0
    assert "inspect reads running text, which needs a language model" in capsys.readouterr().err


def test_the_trace_tells_sequences_of_one_kind_apart(done: dict[str, Path]) -> None:
    from moestro.trace.read import read as read_trace

    for kind, path in (("translation", "decoder.layers.0.ffn"), ("pairs", "encoder.layers.1.ffn")):
        trace = read_trace(done[kind] / "trace.safetensors")
        sample = trace.last("valid")
        assert sample is not None
        tables = [t for t in sample.tables if trace.layers[t.layer].path == path]
        assert [(t.pass_, t.units) for t in tables] == [(0, len(sample.columns["token"]))]
        assert set(trace.pieces) >= {int(i) for i in sample.columns["token"]}
    assert "label.domain" in sample.columns
    assert isinstance(load(done["translation"]).config.model, EncoderDecoder | Decoder)
