"""Loaders on a few rows in the formats of the originals, written here."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
    PairDomains,
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
    Choice,
    Labelled,
    Pair,
    Passage,
    Problem,
    SpanQuestion,
    Translation,
    as_text,
    prompt_and_answer,
)
from moestro.tasks.data.pairs import mismatched, related
from moestro.tasks.data.read import arrays, text
from moestro.tasks.data.reasoning import chain_of_thought
from moestro.tasks.data.spans import shorten
from moestro.tasks.data.split import hold_out, shuffled, tail

Put = Callable[[str, Any], None]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes files below MOESTRO_DATA: text as it is, lists as JSON lines, others as JSON; .gz is gzipped."""
    monkeypatch.setenv("MOESTRO_DATA", str(tmp_path))

    def write(name: str, value: Any) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, list):
            value = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in value)
        elif not isinstance(value, str):
            value = json.dumps(value)
        data = value.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    return write


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


def rows_77() -> list[dict[str, str]]:
    rows = [{"split": "train", "text": f"{label} {i}", "label": label} for label in ("lost", "card") for i in range(20)]
    return [*rows, {"split": "test", "text": "where?", "label": "lost"}]


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


# Pairs ------------------------------------------------------------------------------------------------------------


def test_cocitation(put: Put) -> None:
    papers = [{"id": f"P{i:02}", "title": f"t{i}", "abstract": "", "community": i % 2} for i in range(40)]
    put("acl_cocitation/papers.jsonl", papers)
    cited = [(i, j) for i in range(40) for j in range(i + 1, 40) if (i + j) % 3 == 0]
    put("acl_cocitation/cocitation_pairs.csv", "a,b,n\n" + "".join(f"P{i:02},P{j:02},{1 + i % 2}\n" for i, j in cited))
    made = CoCitation(validation=0.25, test=0.25).build()
    known = {frozenset((f"t{i}", f"t{j}")) for i, j in cited}
    split_texts = [{t for p in s for t in (p.a, p.b)} for s in (made.train, made.valid, made.test)]
    assert not (split_texts[0] & split_texts[1])
    assert not (split_texts[0] & split_texts[2])
    assert not (split_texts[1] & split_texts[2])
    assert all(p.similar for p in made.train)
    for pairs in (made.valid, made.test):
        assert sum(p.similar for p in pairs) > 0
        for pair in pairs:
            assert (frozenset((pair.a, pair.b)) in known) == pair.similar
            assert int(pair.a[1:]) % 2 == int(pair.b[1:]) % 2 == pair.domain
    assert len(CoCitation(least=2).build().train) < len(CoCitation().build().train)
    put("acl_cocitation/cocitation_pairs.csv", "a,b,n\nP00,P99,1\n")
    with pytest.raises(UserError, match="no P99"):
        CoCitation().build()


def test_pubmedqa_and_pairs_of_several_data_sets(put: Put) -> None:
    put("pubmedqa/pqal.jsonl", [{"question": f"q{i}", "contexts": [f"c{i}", "d"]} for i in range(20)])
    made = PubMedQA().build()
    assert made.train[0].b.endswith(" d")
    assert [p.similar for p in made.test] == [True, True, False, False]
    assert all((p.a[1:] == p.b[1:-2]) == p.similar for p in made.test)
    put("intents/banking77.jsonl", [r | {"split": s} for s in ("train", "test") for r in rows_77()[:-1]])
    put("gsm8k/train.jsonl", [{"question": f"q{i}?", "answer": f"#### {i}"} for i in range(10)])
    put("gsm8k/test.jsonl", [{"question": f"r{i}?", "answer": f"#### {i}"} for i in range(10)])
    both = PairDomains(parts=(Banking77(), Gsm8k(), PubMedQA()), train=7, held_out=4).build()
    assert both.domains == ("banking77", "gsm8k", "pubmedqa")
    assert [sum(p.domain == d for p in both.train) for d in range(3)] == [7, 7, 7]
    for pair in both.test:
        if pair.domain == 0:
            assert (pair.a.split()[0] == pair.b.split()[0]) == pair.similar
        if pair.domain == 1:
            assert (pair.a[1] == pair.b[-1]) == pair.similar
    assert [sum(not p.similar for p in both.test if p.domain == d) for d in range(3)] == [4, 4, 2]


def test_related_and_mismatched_by_hand() -> None:
    texts = [Labelled(f"{l}{i}", l) for l in range(2) for i in range(3)]
    pairs = related(texts)
    assert len(pairs) == 2  # three texts of a label make one pair
    assert all(p.a[0] == p.b[0] and p.a != p.b for p in pairs)
    assert mismatched([Pair("a", "b")]) == ()
    assert set(mismatched([Pair("a", "b"), Pair("c", "d")])) == {Pair("a", "d", False), Pair("c", "b", False)}
    assert mismatched([Pair("a", "b"), Pair("c", "d")], same=[1, 1]) == ()
    assert mismatched([Pair("a", "b"), Pair("c", "d", domain=1)]) == ()
    with pytest.raises(UserError, match="Passage is no pair"):
        related([Passage("x")])


# Reasoning --------------------------------------------------------------------------------------------------------


def test_gsm8k(put: Put) -> None:
    put("gsm8k/train.jsonl.gz", [{"question": f"q{i}?", "answer": "a"} for i in range(2)])
    with pytest.raises(UserError, match="row 1: the solution does not end in"):
        Gsm8k().build()
    answer = "She has 500*2 = <<500*2=1000>>1000.\n#### 1,000"
    put("gsm8k/train.jsonl.gz", [{"question": "q?", "answer": answer}])
    put("gsm8k/test.jsonl.gz", [])
    assert Gsm8k().build().train == (Problem("q?", answer, "1000"),)
    assert Gsm8k(notes=False).build().train[0].solution == "She has 500*2 = 1000.\n#### 1,000"


def test_word_problems(put: Put) -> None:
    put(
        "math_word_problems/svamp.jsonl",
        [{"Body": "He has 3", "Question": "Left?", "Equation": "( 3.0 - 1.0 )", "Answer": 2.0}],
    )
    put(
        "math_word_problems/mawps_single.jsonl",
        [{"sQuestion": " How? ", "lEquations": ["X=(7.0/2)"], "lSolutions": [3.5]}],
    )
    put(
        "math_word_problems/asdiv.jsonl", [{"body": "B.", "question": "Q?", "formula": "7+2=9", "answer": "9 (apples)"}]
    )
    put(
        "math_word_problems/aqua_devtest.jsonl",
        [{"question": "Which?", "options": ["A)1", "B)2"], "rationale": "So B", "correct": "B"}],
    )
    made = WordProblems(validation=0, test=0).build()
    assert made.train == (
        Problem("He has 3. Left?", "( 3.0 - 1.0 ) = 2\n#### 2", "2", 0),
        Problem("How?", "X=(7.0/2)\n#### 3.5", "3.5", 1),
        Problem("B. Q?", "7+2=9\n#### 9", "9", 2),
        Problem("Which? A)1 B)2", "So B\n#### B", "B", 3),
    )
    with pytest.raises(UserError, match="'mawps' is none of"):
        WordProblems(parts=("mawps",)).build()


def test_bbh_in_both_formats(put: Put) -> None:
    put("bbh/bbh/snarks.json", {"canary": "x", "examples": [{"input": "a", "target": "(A)"}]})
    put("bbh/cot-prompts/snarks.txt", "NOTICE\n-----\nQ: b\nA: c")
    original = Bbh().build()
    assert chain_of_thought(Bbh()) == {"snarks": "Q: b\nA: c"}
    put("bbh/bbh.jsonl", [{"task": "snarks", "input": "a", "target": "(A)"}])
    assert Bbh().build() == original
    assert original.train == (Problem("a", "(A)", "(A)", 0),)


def test_choices(put: Put) -> None:
    put("mmlu_arc/mmlu_test.jsonl", [{"subject": "law", "question": "Q?", "choices": ["x", "y"], "answer": "B"}])
    made = Mmlu().build()
    assert made.train == (Choice("Q?", ("x", "y"), 1, 0),)
    assert prompt_and_answer(made.train[0]) == ("Question: Q?\nA. x\nB. y\nAnswer: ", "B")
    rows = [{"split": s, "question": "Q?", "choices": [["1", "x"], ["2", "y"]], "answer": "2"} for s in ("dev", "test")]
    put("mmlu_arc/arc_challenge.jsonl", rows)
    assert Arc().build().test == (Choice("Q?", ("x", "y"), 1),)
    put("mmlu_arc/arc_challenge.jsonl", [rows[0] | {"answer": "C"}])
    with pytest.raises(UserError, match="'C' is none of its choices"):
        Arc().build()


# Files and splits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(b"x" * 1000)[:15], "cannot be read"),
        (gzip.compress(b"\xff\xfe"), "not UTF-8"),
        (gzip.compress(b'{"question": "q"}\n{"q'), "line 2: no JSON"),
        (gzip.compress(b"[1]"), "no object with named fields"),
        (gzip.compress(b'{"question": "q"}'), "no field 'answer'"),
        (gzip.compress(b'{"question": "q", "answer": 3}'), "answer should be str, found int"),
    ],
    ids=["plain", "cut", "latin", "half", "list", "field", "kind"],
)
def test_damaged_files_are_one_line(put: Put, tmp_path: Path, content: bytes, said: str) -> None:
    put("gsm8k/train.jsonl.gz", [])
    (tmp_path / "gsm8k" / "train.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        Gsm8k().build()
    assert "\n" not in str(caught.value)
    assert "train.jsonl.gz" in str(caught.value)


def test_arrays_hold_no_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", x=np.arange(3))
    assert arrays(tmp_path / "good.npz")["x"].tolist() == [0, 1, 2]
    np.savez(tmp_path / "bad.npz", x=np.asarray([{}], dtype=object))
    (tmp_path / "worse.npz").write_bytes(b"PK nothing")
    for name in ("bad.npz", "worse.npz", "none.npz"):
        with pytest.raises(UserError, match="no readable arrays"):
            arrays(tmp_path / name)


def test_text_has_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("\ufeffa\r\nb\n".encode())
    assert text(tmp_path / "x") == "a\nb\n"


def test_what_is_held_out_depends_on_keys_alone() -> None:
    rows = [f"k{i % 20}-{i}" for i in range(100)]
    a = hold_out(rows, 0.1, 0.2, lambda r: r.split("-")[0])
    b = hold_out(rows[::-1], 0.1, 0.2, lambda r: r.split("-")[0])
    assert [set(x) for x in a] == [set(x) for x in b]
    assert [len(x) for x in a] == [70, 10, 20]
    keys = [{r.split("-")[0] for r in part} for part in a]
    assert not keys[0] & keys[1]
    assert not keys[1] & keys[2]
    assert sorted(shuffled(50, 1)) == list(range(50)) != shuffled(50, 1) != shuffled(50, 2)


def test_limited_draws_without_replacement(put: Put) -> None:
    put("gsm8k/train.jsonl", [{"question": f"q{i:02}?", "answer": "#### 1"} for i in range(40)])
    put("gsm8k/test.jsonl", [])
    made = Gsm8k(validation=0).build()
    few = made.limited(train=9, seed=1)
    assert len(few.train) == 9
    assert list(few.train) == sorted(few.train)
    assert few != made.limited(train=9, seed=2)
    assert made.limited(train=99) == made


def test_shares_are_checked() -> None:
    with pytest.raises(UserError, match="leave something to train on"):
        Bbh(validation=0.5, test=0.5)
    with pytest.raises(UserError, match=r"Gsm8k\.validation"):
        Gsm8k(validation=1.0)
    with pytest.raises(UserError, match="parts is empty"):
        Domains()
