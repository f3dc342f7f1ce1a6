"""Loaders on a few rows in the formats of the originals, written here."""

from __future__ import annotations

from pathlib import Path

import pytest

from moestro.core.config import Config
from moestro.core.errors import UserError
from moestro.core.folders import data_root, user_cache
from moestro.tasks.data import (
    Arc,
    Banking77,
    Bbh,
    ChinesePoetry,
    Clinc150,
    CoCitation,
    CovidQA,
    Data,
    Domains,
    Gsm8k,
    Gutenberg,
    Mmlu,
    Multi30k,
    PubMedQA,
    RussianPlays,
    SquadShifts,
    TinyShakespeare,
    Trcd,
    Tsac,
    WikiText2,
    WordProblems,
)
from moestro.tasks.data.examples import (
    Answer,
    Labelled,
    Passage,
    SpanQuestion,
    Translation,
    as_text,
)
from moestro.tasks.data.spans import shorten
from moestro.tasks.data.split import tail

from .conftest import Put, rows_77


def every() -> list[Data]:
    kinds = [TinyShakespeare, WikiText2, Gutenberg, RussianPlays, ChinesePoetry, Multi30k, Banking77, Clinc150, Tsac]
    kinds += [SquadShifts, CovidQA, Trcd, CoCitation, PubMedQA, Gsm8k, WordProblems, Bbh, Mmlu, Arc]
    return [kind() for kind in kinds]


@pytest.mark.parametrize("config", every(), ids=lambda c: type(c).__name__)
def test_missing_files_are_one_line_that_says_where_to_get_them(config: Data, put: Put, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file") as caught:
        config.build()
    said = str(caught.value)
    assert "\n" not in said
    assert str(tmp_path / config.slug) in said
    assert config.source in said
    assert "MOESTRO_DATA" in said
    assert Config.from_dict(config.to_dict()) == config


def test_the_root_is_chosen_or_said_or_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOESTRO_DATA", raising=False)
    assert data_root() == user_cache()
    monkeypatch.setenv("MOESTRO_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root("/elsewhere") == Path("/elsewhere")


def test_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESTRO_DATA", raising=False)
    (tmp_path / "input.txt").write_text("ab\n" * 100)
    made = TinyShakespeare(folder=str(tmp_path)).build()
    assert sum(len(p.text) for p in (*made.train, *made.valid, *made.test)) == 300
    with pytest.raises(UserError, match="give another folder"):
        TinyShakespeare(folder=str(tmp_path / "no")).build()


# Text -------------------------------------------------------------------------------------------------------------


def test_one_text_is_cut_at_lines(put: Put) -> None:
    put("tiny_shakespeare/input.txt.gz", "0123456\n" * 100)
    made = TinyShakespeare(validation=0.1, test=0.2).build()
    assert [len(split[0].text) for split in (made.train, made.valid, made.test)] == [560, 80, 160]
    assert tail("x" * 10, 0.2, 0.2) == ("x" * 6, "xx", "xx")


def test_books_are_domains(put: Put) -> None:
    for name in ("law_a", "fiction_b", "fiction_c"):
        put(f"gutenberg_domains/{name}.txt.gz", f"{name}\n" * 50)
    put("gutenberg_domains/LICENCE_x.txt", "not a book")
    made = Gutenberg().build()
    assert made.domains == ("fiction", "law")
    assert [p.domain for p in made.train] == [0, 0, 1]
    assert all(len(split) == 3 for split in (made.train, made.valid, made.test))


def test_wikitext_with_and_without_its_training_text(put: Put) -> None:
    put("wikitext2_valtest/test.txt.gz", "t\n" * 10)
    put("wikitext2_valtest/valid.txt.gz", "v\n" * 10)
    made = WikiText2().build()
    assert [p[0].text for p in (made.train, made.valid, made.test)] == ["t\n" * 10, "v\n" * 5, "v\n" * 5]
    put("wikitext2_valtest/train.txt", "r\n")
    made = WikiText2().build()
    assert [p[0].text for p in (made.train, made.valid, made.test)] == ["r\n", "v\n" * 10, "t\n" * 10]


def test_domains_join_data_sets(put: Put) -> None:
    put("tiny_shakespeare/input.txt", "line\n" * 40)
    put("gsm8k/train.jsonl", [{"question": f"q{i}?", "answer": f"a{i}\n#### {i}"} for i in range(10)])
    put("gsm8k/test.jsonl", [{"question": "last?", "answer": "b\n#### 7"}])
    put("bbh/bbh.jsonl", [{"task": t, "input": f"{t}{i}", "target": "yes"} for t in "ab" for i in range(10)])
    made = Domains(parts=(TinyShakespeare(), Gsm8k(), Bbh())).build()
    assert made.domains == ("tiny_shakespeare", "gsm8k", "bbh")
    assert [p.domain for p in made.train] == [0, 1, 2]
    assert made.test[1] == Passage("Question: last?\nAnswer: b\n#### 7\n\n", 1)
    assert sorted(made.train[1].text.split("\n\n")) == sorted(
        [""] + [as_text(p).removesuffix("\n\n") for p in Gsm8k().build().train]
    )
    apart = Domains(parts=(Bbh(), Gsm8k()), split_books=True).build()
    assert apart.domains == ("bbh/a", "bbh/b", "gsm8k")
    assert [p.domain for p in apart.train] == [0, 1, 2]


# Translation, classification --------------------------------------------------------------------------------------


def test_multi30k(put: Put) -> None:
    for split in ("train", "val", "test_2016_flickr"):
        put(f"multi30k/{split}.en.gz", f"A {split}.\nTwo .\n\n")
        put(f"multi30k/{split}.fr.gz", f"Un {split}.\nDeux\u2028.\nleer\n")
    made = Multi30k(source_language="fr", target_language="en").build()
    assert made.train == (Translation("Un train.", "A train."), Translation("Deux\u2028.", "Two ."))
    assert made.title == "multi30k fr-en"
    put("multi30k/val.en.gz", "one\n")
    with pytest.raises(UserError, match="not aligned"):
        Multi30k(target_language="fr").build()
    with pytest.raises(UserError, match="both 'de'"):
        Multi30k(source_language="de")


def test_banking77_in_both_formats(put: Put) -> None:
    put("intents/train.csv", "text,category\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows_77()[:-1]))
    put("intents/test.csv", "text,category\nwhere?,lost\n")
    original = Banking77(validation=0.25).build()
    put("intents/banking77.jsonl.gz", rows_77())
    made = Banking77(validation=0.25).build()
    assert made == original
    assert made.labels == ("card", "lost")
    assert made.test == (Labelled("where?", 1),)
    assert sorted(row.label for row in made.valid) == [0] * 5 + [1] * 5  # a quarter of each label
    assert not {row.text for row in made.valid} & {row.text for row in made.train}


def test_clinc150_in_both_formats(put: Put) -> None:
    put("intents/data_full.json", {"train": [["a", "x"], ["b", "y"]], "oos_val": [["c", "oos"]], "test": [["d", "x"]]})
    put("intents/domains.json", {"home": ["y"], "bank": ["x"]})
    made = Clinc150().build()
    assert (made.labels, made.domains) == (("x", "y"), ("bank", "home"))
    assert made.train == (Labelled("a", 0, 0), Labelled("b", 1, 1))
    assert made.valid == ()
    kept = Clinc150(out_of_scope=True).build()
    assert kept.labels == ("oos", "x", "y")
    assert kept.valid == (Labelled("c", 0, kept.domains.index("clinc150")),)
    rows = [("train", "a", "x"), ("train", "b", "y"), ("test", "d", "x")]
    put("intents/clinc150.jsonl", [dict(zip(("split", "text", "label"), row)) for row in rows])
    assert Clinc150().build() == made


def test_tsac(put: Put) -> None:
    put(
        "tsac/tsac.jsonl",
        [{"split": s, "label": l, "text": f"{s}{l}"} for s in ("train", "test") for l in ("pos", "neg")],
    )
    made = Tsac(validation=0).build()
    assert made.labels == ("neg", "pos")
    assert made.test == (Labelled("testpos", 1), Labelled("testneg", 0))


# Spans ------------------------------------------------------------------------------------------------------------

CONTEXT = "The cat sat on the red mat."


def test_squadshifts_in_both_formats(put: Put) -> None:
    short = [
        {"context": f"{CONTEXT} {i}", "qas": [[f"i{i}", " Where? ", [["red mat", 19], ["red mat", 19]]]]}
        for i in range(10)
    ]
    put("squadshifts/reddit.jsonl.gz", short)
    original = [
        {
            "context": row["context"],
            "qas": [{"id": q, "question": w, "answers": [{"text": t, "answer_start": s} for t, s in a]}],
        }
        for row in short
        for q, w, a in row["qas"]
    ]
    put("squadshifts/nyt_v1.0.json", {"data": [{"paragraphs": original[:4]}, {"paragraphs": original[4:]}]})
    made = SquadShifts(domains=("reddit", "nyt")).build()
    assert [len(s) for s in (made.train, made.valid, made.test)] == [16, 2, 2]
    assert [q._replace(domain=0) for q in made.train if q.domain] == [q for q in made.train if not q.domain]
    first = made.train[0]
    assert (first.question, first.answers) == ("Where?", (Answer("red mat", 19),))


def test_wrong_answers_are_refused(put: Put) -> None:
    row = {"id": 3, "context": CONTEXT, "question": "Who?", "answers": [["cat", 5]]}
    put("covid_qa/covid_qa_windows.jsonl", [row])
    with pytest.raises(UserError, match=r"row 1: the answer 'cat' does not stand at character 5"):
        CovidQA().build()
    put("covid_qa/covid_qa_windows.jsonl", [row | {"answers": [["cat", 4]]}])
    assert CovidQA().build().train == (SpanQuestion("3", "Who?", CONTEXT, (Answer("cat", 4),)),)


def test_trcd(put: Put) -> None:
    for split in ("train", "val", "test"):
        put(f"trcd_tunisian_qa/{split}.jsonl", [{"context": "رئيس الحكومة", "qas": [[split, "؟", [["الحكومة", 5]]]]}])
    made = Trcd().build()
    assert [s[0].id for s in (made.train, made.valid, made.test)] == ["train", "val", "test"]


def test_contexts_are_shortened_round_the_answer() -> None:
    words = [f"w{i}" for i in range(200)]
    context = "  ".join(words)
    at = context.index("w100")
    question = SpanQuestion("q", "?", context, (Answer("w100  w101", at), Answer("w3", context.index("w3"))))
    places = set()
    for seed in range(20):
        short = shorten(question, 12, seed)
        assert len(short.context.split()) == 12
        (answer,) = short.answers
        assert short.context[answer.start : answer.start + len(answer.text)] == "w100  w101"
        places.add(answer.start)
    assert len(places) > 3
    assert shorten(question, 1).context == "w100  w101"
    assert shorten(question, 500) == question
    last = question._replace(answers=(Answer("w199", context.index("w199")),))
    assert {len(shorten(last, 12, seed).context.split()) for seed in range(9)} == {12}
