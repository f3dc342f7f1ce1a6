"""Loaders of pairs and of reasoning text, and what all of them do with files and splits."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from moestro.core.errors import UserError
from moestro.tasks.data import (
    Arc,
    Banking77,
    Bbh,
    CoCitation,
    Domains,
    Gsm8k,
    Mmlu,
    PairDomains,
    PubMedQA,
    WordProblems,
)
from moestro.tasks.data.examples import (
    Choice,
    Labelled,
    Pair,
    Passage,
    Problem,
    prompt_and_answer,
)
from moestro.tasks.data.pairs import mismatched, related
from moestro.tasks.data.read import arrays, text
from moestro.tasks.data.reasoning import chain_of_thought
from moestro.tasks.data.split import hold_out, shuffled

from .conftest import Put, rows_77

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
