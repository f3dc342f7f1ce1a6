"""Metrics by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moestro.core.errors import UserError
from moestro.tasks.data import WordVocabulary
from moestro.tasks.data.examples import Answer, SpanQuestion
from moestro.tasks.data.windows import Window, make_windows
from moestro.tasks.metrics import (
    accuracy,
    accuracy_by,
    best_f1,
    best_spans,
    bleu,
    exact_match,
    normalised,
    similarities,
    span_scores,
    token_f1,
)
from moestro.tasks.metrics.answers import answer_bits, answer_nats, final_number, same_number
from moestro.tasks.metrics.bleu import words_13a

# BLEU -------------------------------------------------------------------------------------------------------------


def test_bleu_by_hand() -> None:
    # 7 words against 8: 6/7 unigrams, 4/6 bigrams, 2/5 trigrams, 1/4 fourgrams; exp(1 - 8/7) for the length
    made = bleu(["the cat sat on mat b c"], ["the cat sat on the mat b d"])
    assert made.precisions == pytest.approx((6 / 7, 4 / 6, 2 / 5, 1 / 4))
    assert made.brevity == pytest.approx(math.exp(1 - 8 / 7))
    assert made.score == pytest.approx(100 * math.exp(1 - 8 / 7) * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    assert (made.hypothesis_length, made.reference_length) == (7, 8)


def test_bleu_counts_are_clipped_and_pooled() -> None:
    assert bleu(["the the the the"], ["the cat is on"], order=1).precisions == (0.25,)
    assert bleu(["the the the"], [["the cat is", "the the dog"]], order=1).precisions == (2 / 3,)
    # 1 of 2 and 3 of 3 words: 4/5 together, not the mean of 1/2 and 1
    assert bleu(["a x", "b c d"], ["a b", "b c d"], order=1).score == pytest.approx(80)


def test_bleu_brevity_takes_the_nearest_reference_and_the_shorter_of_two() -> None:
    assert bleu(["a b c d"], [["a b c d e f", "a b c d e"]], order=1).reference_length == 5
    assert bleu(["a b c d"], [["a b c d e", "a b c"]], order=1).reference_length == 3
    assert bleu(["a b c d e f"], ["a b c d"], order=1).brevity == 1.0


def test_bleu_extremes() -> None:
    said = ["Two men, outside, in 2.5 minutes .", "A well-known dog."]
    assert bleu(said, said).score == pytest.approx(100)
    assert bleu(["a b"], ["c d"]).score == 0
    assert bleu([""], ["c d"]).score == 0
    assert bleu(["a b c"], ["a b c"]).score == 0  # no fourgram in it
    # bigram, trigram without a match: 1/2 of 3 and 1/4 of 2, fourgram 1/8 of 1
    smooth = bleu(["a c b d"], ["a b c d"], smooth=True)
    assert smooth.precisions == pytest.approx((1, 1 / 6, 1 / 8, 1 / 8))
    with pytest.raises(UserError, match="2 hypotheses and 1 references"):
        bleu(["a", "b"], ["a"])
    with pytest.raises(UserError, match="without a reference"):
        bleu(["a"], [[]])


def test_words_of_mteval_13a() -> None:
    assert words_13a('He said: "2,5 &amp; 3.0-4", don\'t!') == [
        *("He", "said", ":", '"', "2,5", "&", "3.0", "-", "4", '"', ",", "don't", "!"),
    ]
    assert words_13a("well-known (e.g. U.S.)") == ["well-known", "(", "e", ".", "g", ".", "U", ".", "S", ".", ")"]


# Spans ------------------------------------------------------------------------------------------------------------


def test_squad_normalisation() -> None:
    assert normalised(" The  Cat's, an a-b!  THE end") == "cats ab end"
    assert normalised("theory") == "theory"
    assert normalised("the") == ""


@pytest.mark.parametrize(
    ("said", "wanted", "exact", "f1"),
    [
        ("The cat.", "cat", 1, 1),
        ("a red cat", "the red dog", 0, 0.5),
        ("red red cat", "red cat", 0, 0.8),
        ("", "cat", 0, 0),
        ("the", "", 1, 1),
        ("cat", "", 0, 0),
        ("cat", "dog", 0, 0),
    ],
)
def test_exact_match_and_f1_by_hand(said: str, wanted: str, exact: float, f1: float) -> None:
    assert exact_match(said, wanted) == exact
    assert token_f1(said, wanted) == pytest.approx(f1)
    assert token_f1(wanted, said) == pytest.approx(f1)


def test_the_best_answer_of_a_question_counts() -> None:
    scores = span_scores(["the red mat", "", "x"], [["mat", "red mat"], [], ["x y z"]])
    assert scores.exact_match == pytest.approx(100 * 2 / 3)
    assert scores.f1 == pytest.approx(100 * (1 + 1 + 0.5) / 3)
    with pytest.raises(UserError, match="1 predictions for 2"):
        span_scores(["a"], [["a"], ["b"]])


def logits(window: Window, **values: float) -> np.ndarray:
    out = np.full(len(window.ids) + 3, -1.0)  # and padding
    for place, value in values.items():
        out[int(place[1:])] = value
    return out


def test_best_spans() -> None:
    words = WordVocabulary(size=40).build(["who"])
    asked = [SpanQuestion(str(i), "who", "a b c d e f g h", (Answer("a", 0),)) for i in range(2)]
    first, second = make_windows(asked, words, 16, 2)
    assert first.places[3] == (0, 1)  # cls who sep a
    flat = logits(second)

    def found(start: np.ndarray, end: np.ndarray, **options: object) -> list[str]:
        return best_spans(asked, [first, second], [start, flat], [end, flat], **options)  # type: ignore[arg-type]

    assert found(logits(first, _4=5.0), logits(first, _6=5.0))[0] == "b c d"
    # special tokens, the question and padding never win; an end before the start neither
    outside = {"_0": 9.0, "_1": 9.0, "_11": 9.0, "_12": 9.0}
    assert found(logits(first, _4=5.0, **outside), logits(first, _6=5.0, _3=7.0, **outside))[0] == "b c d"
    assert found(logits(first, _4=5.0), logits(first, _4=5.0, _5=4.0))[0] == "b"
    assert found(logits(first, _4=5.0), logits(first, _4=5.0, _5=4.0), as_released=True)[0] == "b c"
    assert found(logits(first, _4=5.0), logits(first, _9=5.0, _6=4.0), longest=4)[0] == "b c d"
    assert found(logits(first, _3=5.0, _6=4.0), logits(first, _3=2.0, _5=1.0), candidates=1)[0] == "a"
    both = best_spans(asked[:1], [first, first], [flat, logits(first, _4=5.0)], [flat, logits(first, _6=5.0)])
    assert both == ["b c d"]  # the best of its windows
    assert best_spans(asked, [first], [flat], [flat])[1] == ""


# Pairs ------------------------------------------------------------------------------------------------------------


def test_f1max_by_hand() -> None:
    # thresholds 0.9: P 1, R 1/3; 0.8: 1/2; 0.7: P 2/3, R 2/3; 0.4: P 3/4, R 1 -> 6/7; 0.1: P 3/5
    made = best_f1([0.8, 0.9, 0.1, 0.7, 0.4], [False, True, False, True, True])
    assert made.f1 == pytest.approx(6 / 7)
    assert (made.precision, made.recall, made.threshold) == (0.75, 1.0, 0.4)


def test_f1max_of_separated_and_of_constant_scores() -> None:
    related = np.arange(10) < 3
    assert best_f1(-np.arange(10.0), related) == (1.0, 1.0, 1.0, -2.0)
    constant = best_f1(np.full(10, 0.5), related)
    assert constant == (pytest.approx(2 * 0.3 / 1.3), 0.3, 1.0, 0.5)  # everything is called related
    with pytest.raises(UserError, match="at least one related"):
        best_f1([1.0], [False])
    with pytest.raises(UserError, match="finite"):
        best_f1([1.0, math.nan], [True, False])


def test_similarities() -> None:
    assert similarities([0.9, 0.7, 0.2], [True, True, False]) == (pytest.approx(0.8), 0.2, pytest.approx(4.0))
    assert math.isnan(similarities([0.9, 0.0], [True, False]).ratio)
    with pytest.raises(UserError, match="both kinds"):
        similarities([0.9], [True])


def test_accuracy() -> None:
    assert accuracy([1, 2, 3, 4], [1, 2, 0, 0]) == 0.5
    assert accuracy_by([1, 2, 3], [1, 0, 3], [2, 0, 2], ["a", "b", "c"]) == {"a": 0.0, "c": 1.0}
    with pytest.raises(UserError, match="need as many"):
        accuracy([1, 2], [1])


# Answers ----------------------------------------------------------------------------------------------------------


def test_task_loss_of_a_uniform_model_is_log2_of_the_vocabulary() -> None:
    targets = torch.tensor([[-1, -1, 3, 5], [-1, 2, -1, -1]])
    nats, tokens = answer_nats(torch.zeros(2, 4, 32), targets)
    assert tokens.tolist() == [2, 1]
    bits = answer_bits(nats, tokens, [4, 1])
    assert bits.per_token == pytest.approx(5, rel=1e-6)
    assert bits.per_byte == pytest.approx((2 * 5 / 4 + 5) / 2, rel=1e-6)  # of each example, then the mean
    assert bits.nats == pytest.approx(1.5 * math.log(32), rel=1e-6)


def test_task_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]], dtype=torch.float64)
    nats, tokens = answer_nats(logits, torch.tensor([[1, 0]]))
    assert nats.item() == pytest.approx(-math.log(0.75) - math.log(0.5))
    assert answer_bits(nats, tokens, [2]).per_token == pytest.approx((math.log2(4 / 3) + 1) / 2)
    inf = torch.full((1, 1, 2), -torch.inf)
    inf[..., 0] = 0
    nats, _ = answer_nats(inf, torch.tensor([[-1]]))
    assert nats.item() == 0
    with pytest.raises(UserError, match="all answers long"):
        answer_bits([1.0], [0], [1])


def test_final_numbers() -> None:
    assert final_number("So 3 + 4 = 7.\n#### 1,007") == "1007"
    assert final_number("it is -2.5 then 3.50.") == "3.50"
    assert final_number("#### B") == "B"
    assert final_number("none") == ""
    assert same_number("3.50", "3.5")
    assert not same_number("3", "4")
    assert same_number(" b", "B")
    assert not same_number("b", "3")
