"""Vocabularies, padded batches, windows and streams."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.core.config import Config
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.models.examples import encoder_decoders
from moestro.models.examples import examples as examples_of_decoders
from moestro.tasks import NextToken
from moestro.tasks.data import BpeVocabulary, ByteVocabulary, Vocabulary, WordVocabulary
from moestro.tasks.data.batches import ExampleBatches, TranslationBatch, epoch_order, padded
from moestro.tasks.data.collate import AnswerTexts, LabelTexts, PairedTexts, TranslatedTexts
from moestro.tasks.data.examples import Answer, DataSet, Labelled, Pair, Passage, Problem, SpanQuestion, Translation
from moestro.tasks.data.streams import DomainBatches
from moestro.tasks.data.windows import SpanWindows, make_windows
from moestro.testing.objectives import check_objective

TEXTS = ["The cat sat on the mat.", "Die Katze saß auf der Matte, 日本!", "the cat, the cat"]


def vocabulary(config: Vocabulary, tmp_path: Path, more: tuple[str, ...] = ()):
    return (config.replace(cache=str(tmp_path)) if isinstance(config, BpeVocabulary) else config).build(TEXTS, more)


VOCABULARIES = [ByteVocabulary(), BpeVocabulary(size=300), WordVocabulary(size=40)]


@pytest.mark.parametrize("config", VOCABULARIES, ids=lambda c: type(c).__name__)
def test_vocabularies(config: Vocabulary, tmp_path: Path) -> None:
    made = vocabulary(config, tmp_path, ("[LAW]",))
    again = vocabulary(config, tmp_path, ("[LAW]",))
    assert made.key == again.key != vocabulary(config, tmp_path).key
    special = {made.pad, made.bos, made.eos, made.sep, made.cls, made.unk, made.special("[LAW]")}
    assert len(special) == 7
    for text in [*TEXTS, "", " never <eos> seen  [LAW]\n"]:
        ids, places = made.placed(text)
        assert ids == made.encode(text)
        assert len(ids) == len(places)
        assert all(0 <= i < made.size for i in ids)
        assert not (special - {made.unk}) & set(ids)
        for start, end in places:
            assert 0 <= start <= end <= len(text)
            assert not text[start:end][:1].isspace() or isinstance(config, ByteVocabulary)
        assert {c for c in range(len(text)) if not text[c].isspace()} <= {c for a, b in places for c in range(a, b)}
        if not isinstance(config, WordVocabulary):
            assert made.decode([made.bos, *ids, made.eos]) == text
    with pytest.raises(UserError, match=r"no special token '\[X\]'"):
        made.special("[X]")
    with pytest.raises(UserError, match="must differ"):
        vocabulary(config, tmp_path, ("<pad>",))
    assert Config.from_dict(config.to_dict()) == config


def test_words_by_frequency_then_alphabet() -> None:
    made = WordVocabulary(size=16).build(["b a b", "c A ! a", "d e f g h i"])
    assert made.words[:3] == ("a", "b", "!")
    assert made.size == 16
    assert made.decode(made.encode("A b zz")) == "a b"
    assert made.encode("zz") == [made.unk]
    assert WordVocabulary(lower=False).build(["a A A"]).words == ("A", "a")


def test_bytes_keep_their_values() -> None:
    made = ByteVocabulary().build()
    assert made.encode("aß") == [97, 195, 159]
    assert made.placed("aß").places == [(0, 1), (1, 2), (1, 2)]
    assert (made.pad, made.size) == (256, 262)


def test_byte_pairs_are_learnt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BpeVocabulary(size=310, cache=str(tmp_path))
    first = config.build(TEXTS)
    (file,) = (tmp_path / "tokenizers").iterdir()
    before = file.read_bytes()
    assert config.build(TEXTS).key == first.key
    assert config.replace(size=300).build(TEXTS).size == 300
    assert config.build([*TEXTS, "more"]).key != first.key
    assert len(list((tmp_path / "tokenizers").iterdir())) == 3
    file.write_text("{}")
    assert config.build(TEXTS).key == first.key
    assert file.read_bytes() == before  # damaged, so learnt and written again
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install"):
        config.build(["other"])


def test_byte_pairs_without_a_folder_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = BpeVocabulary(size=300, cache=str(tmp_path / "file")).build(TEXTS)
    assert made.decode(made.encode("the cat")) == "the cat"


# Batches ----------------------------------------------------------------------------------------------------------


def test_every_epoch_takes_each_example_once() -> None:
    orders = [np.concatenate([epoch_order(30, seed, step, 7) for step in range(30)]) for seed in (0, 0, 1)]
    for order in orders:
        for epoch in order.reshape(7, 30):
            assert sorted(epoch) == list(range(30))
    assert (orders[0] == orders[1]).all()
    assert not (orders[0] == orders[2]).all()
    assert not (orders[0][:30] == orders[0][30:60]).all()
    assert epoch_order(3, 0, 0, 8).shape == (8,)  # a batch larger than the data


def test_padding_by_hand() -> None:
    values, valid, units = padded([[1, 2, 3], [4], [5, 6]], 9, slice(1, 3))
    assert values.tolist() == [[4, 9, 9], [5, 6, 9]]
    assert valid.tolist() == [[True, False, False], [True, True, False]]
    assert units.tolist() == [3, 4, 5, 6, 7, 8]


V = ByteVocabulary().build((), ("[A]", "[B]"))


def examples(n: int = 12) -> dict[str, tuple[list, object]]:
    return {
        "label": ([Labelled("x" * i, i % 3) for i in range(n)], LabelTexts(V, 8)),
        "translation": ([Translation("a" * i, "b" * (n - i)) for i in range(n)], TranslatedTexts(V, 8)),
        "pair": ([Pair("a" * i, "b", i % 2 == 0, i % 2) for i in range(n)], PairedTexts(V, 8, ("[A]", "[B]"))),
        "answer": ([Problem("q" * i, f"{i}", f"{i}") for i in range(n)], AnswerTexts(V, 40)),
        "span": (make_windows([question(i) for i in range(n)], V, 24, 4), SpanWindows(V)),
    }


def question(i: int) -> SpanQuestion:
    return SpanQuestion(str(i), "who?", "x" * i + " ab cd", (Answer("ab", i + 1),), i % 2)


@pytest.mark.parametrize("kind", ["label", "translation", "pair", "answer", "span"])
def test_slices_are_those_of_the_global_batch(kind: str) -> None:
    batches = ExampleBatches(*examples()[kind], seed=4)
    whole = batches.train(2, 6)
    again = ExampleBatches(*examples()[kind], seed=4).train(2, 6)
    parts = [batches.train(2, 6, 0, 1), batches.train(2, 6, 1, 6)]
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(again, name))
            assert torch.equal(value, torch.cat([getattr(p, name) for p in parts])), name
    seen = [number for numbers, batch in batches.each(5, 7) for number in numbers if batch]
    assert seen == list(range(7))
    assert whole.to(torch.device("cpu")) is whole
    moved = whole.to(torch.device("meta"))
    assert all(v.is_meta for v in vars(moved).values() if isinstance(v, torch.Tensor))


def test_pools_are_dealt_by_length() -> None:
    """Four batches of three are drawn together: the same examples as unpooled, the shortest three in one batch, the
    next three in another, in an order of their own; slices as ever."""
    rows = [Labelled("x" * (1 + 7 * i % 12), i) for i in range(12)]  # every length from 1 to 12
    pooled = ExampleBatches(rows, LabelTexts(V, 20), seed=3, pool=4)
    lengths = [sorted(len(rows[i].text) for i in pooled.numbers(step, 3)) for step in range(8)]
    for turn in (lengths[:4], lengths[4:]):
        assert sorted(turn) == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    orders = {tuple(map(tuple, lengths[k : k + 4])) for k in (0, 4)}
    assert any(list(order) != sorted(order) for order in orders)
    assert torch.equal(pooled.train(5, 3).tokens[1:], pooled.train(5, 3, 1).tokens)
    assert pooled.train(0, 3).tokens.shape[1] == 1 + max(lengths[0])
    with pytest.raises(UserError, match="pool must be at least 1"):
        ExampleBatches(rows, LabelTexts(V, 20), pool=0)


def test_labels_and_translations_by_hand() -> None:
    batch = ExampleBatches([Labelled("abc", 2), Labelled("d", 0)], LabelTexts(V, 3)).each(2)
    (_, labels) = next(batch)
    assert labels.tokens.tolist() == [[V.cls, 97, 98], [V.cls, 100, V.pad]]
    assert labels.labels.tolist() == [2, 0]
    (_, made) = next(ExampleBatches([Translation("ab", "c"), Translation("d", "efgh")], TranslatedTexts(V, 4)).each(2))
    assert made.source.tolist() == [[97, 98, V.eos], [100, V.eos, V.pad]]
    assert made.tokens.tolist() == [[V.bos, 99, V.pad, V.pad], [V.bos, 101, 102, 103]]
    assert made.targets.tolist() == [[99, V.eos, -1, -1], [101, 102, 103, V.eos]]
    assert made.valid.tolist() == [[True, True, False, False], [True] * 4]
    assert made.source_unit_id.tolist() == list(range(6))


def test_pairs_by_hand() -> None:
    rows = [Pair("ab", "c", True, 1), Pair("d", "efg", False, 0)]
    (_, made) = next(ExampleBatches(rows, PairedTexts(V, 9, ("[A]", "[B]"))).each(2))
    a, b = V.special("[A]"), V.special("[B]")
    assert made.a.tolist() == [[b, 97, 98], [a, 100, V.pad]]
    assert made.b.tolist() == [[b, 99, V.pad, V.pad], [a, 101, 102, 103]]
    assert made.similar.tolist() == [True, False]
    assert len({*made.a_unit_id.tolist(), *made.b_unit_id.tolist()}) == 6 + 8
    (_, plain) = next(ExampleBatches(rows, PairedTexts(V, 9)).each(2))
    assert plain.a[:, 0].tolist() == [V.cls, V.cls]
    swap = PairedTexts(V, 9, swap=True)
    first = [swap.encode(Pair("a", f"b{i}"))[0][1] for i in range(100)]
    assert 30 < first.count(97) < 70
    with pytest.raises(UserError, match="pair of domain 2"):
        PairedTexts(V, 9, ("[A]", "[B]")).encode(Pair("a", "b", True, 2))


def test_only_answers_count() -> None:
    rows = [Problem("q", "ß1", "1"), Problem("qq", "2", "2")]
    (_, made) = next(ExampleBatches(rows, AnswerTexts(V, 64)).each(2))
    prompt = "Question: q\nAnswer: "
    assert made.tokens[0].tolist() == [V.bos, *prompt.encode(), *"ß1".encode()]
    assert made.targets[0].tolist() == [-1] * len(prompt) + [*"ß1".encode(), V.eos]
    assert made.answer_bytes.tolist() == [3, 1]
    assert made.text_bytes == 4.0
    (_, short) = next(ExampleBatches(rows, AnswerTexts(V, 8, eos=False)).each(2))
    assert short.tokens[0].tolist() == [V.bos, *b"wer: ", *"ß1".encode()[:-1]]
    (_, cut) = next(ExampleBatches([Problem("q", "123456", "6")], AnswerTexts(V, 3)).each(1))
    assert cut.targets.tolist() == [[49, 50, 51]]
    assert cut.answer_bytes.tolist() == [3]
    with pytest.raises(UserError, match="length must be at least 2"):
        AnswerTexts(V, 1)


def test_no_examples_is_an_error() -> None:
    with pytest.raises(UserError, match="is this split empty"):
        ExampleBatches([], LabelTexts(V, 4))


# Windows ----------------------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    words = WordVocabulary(size=99).build(["where is the red mat now one two three four five six seven eight"])
    context = "one two three four the RED mat five six seven eight"
    asked = SpanQuestion("q", "where red ?", context, (Answer("RED mat", context.index("RED")),), 1)
    made = make_windows([asked], words, length=12, stride=2)
    assert [len(w.ids) for w in made] == [12, 12, 9]  # 1 + 3 + 1 + 6 + 1; neighbours share 2 words
    assert [words.decode(w.ids).split()[2:] for w in made] == [
        ["one", "two", "three", "four", "the", "red"],
        ["the", "red", "mat", "five", "six", "seven"],
        ["six", "seven", "eight"],
    ]
    assert (made[0].start, made[0].end) == (0, 0)  # only half of the answer is inside
    first, last = made[1].start, made[1].end
    assert context[made[1].places[first][0] : made[1].places[last][1]] == "RED mat"
    assert made[1].matched[first : last + 1] == [1, 0]  # RED is in the question, in whatever case
    assert made[1].matched[1:4] == [0, 1, 0]
    (only,) = make_windows([asked], words, 12, 2, answered=True)
    assert only == made[1]
    (_, batch) = next(ExampleBatches(made, SpanWindows(words)).each(9))
    assert batch.context.sum(1).tolist() == [sum(b > 0 for _, b in w.places) for w in made]
    assert batch.domain.unique().tolist() == [1]
    with pytest.raises(UserError, match="need length >= 8"):
        make_windows([asked], words, 12, 9)


def test_windows_cover_every_token_of_the_context(tmp_path: Path) -> None:
    made = vocabulary(BpeVocabulary(size=300), tmp_path)
    context = "x y z " * 40 + "Katze." + " w" * 30
    asked = SpanQuestion("q", "cat?" * 30, context, (Answer("Katze", 240),))
    windows = make_windows([asked], made, 32, 6)
    assert {p for w in windows for p in w.places if p[1] > 0} >= set(made.placed(context).places)
    assert all(len(w.ids) <= 32 for w in windows)
    found = [w for w in windows if w.end]
    assert found
    for w in found:
        assert context[w.places[w.start][0] : w.places[w.end][1]].startswith("Katze")


# Streams ----------------------------------------------------------------------------------------------------------


def stream(shares: tuple[float, ...] = ()) -> DomainBatches:
    rows = (Passage("a" * 101, 0), Passage("b" * 301, 1), Passage("c" * 18, 0))
    data = DataSet("x", rows, (Passage("d" * 50, 1),), domains=("u", "v"))
    return DomainBatches(data, V, 10, seed=2, shares=shares)


def test_windows_of_text_are_of_one_domain() -> None:
    made = stream()
    batch = made.train(0, 42)
    assert batch.tokens.shape == (42, 10)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.domain.tolist() == [int(98 in row) for row in batch.targets.tolist()]
    assert batch.domain.sum() == 30  # of 12 + 30 windows, each once
    parts = [made.train(0, 42, 0, 20), made.train(0, 42, 20)]
    assert torch.equal(batch.tokens, torch.cat([p.tokens for p in parts]))
    assert torch.equal(batch.unit_id, torch.cat([p.unit_id for p in parts]))
    assert batch.text_bytes == pytest.approx(10 * (12 * 119 / 121 + 30 * 301 / 302))


def test_shares_of_domains() -> None:
    counts = stream((1, 1)).train(0, 42).domain.bincount().tolist()
    assert counts == [21, 21]
    assert stream((3, 0)).train(0, 42).domain.unique().tolist() == [0]
    with pytest.raises(UserError, match="one number of at least 0 for each of u, v"):
        stream((1,))
    with pytest.raises(UserError, match="no window of 11 tokens"):
        DomainBatches(DataSet("x", (Passage("a"),), domains=("u",)), V, 10)


def test_held_out_text_by_domain() -> None:
    made = stream()
    assert made.held_out(0, 4) == []
    batches = made.held_out(1, 4)
    assert [len(b.tokens) for b in batches] == [4, 1]
    assert batches[1].unit_id.tolist() == list(range(40, 50))
    assert sum(len(b.tokens) for b in made.held_out(1, 4, limit=2)) == 2
    assert made.held_out(1, 4, "test") == []


# With models ------------------------------------------------------------------------------------------------------


def test_a_decoder_learns_answers_and_streams() -> None:
    model = examples_of_decoders()["dense"].replace(vocab_size=V.size, context=64).build()
    batches = ExampleBatches(*examples()["answer"])
    parts = [batches.train(0, 4, 0, 1), batches.train(0, 4, 1)]
    check_objective(NextToken().build(), model, batches.train(0, 4), parts)
    made = stream()
    check_objective(NextToken().build(), model, made.train(0, 4), [made.train(0, 4, 0, 1), made.train(0, 4, 1)])


def test_padding_of_translations_changes_nothing() -> None:
    config = next(iter(encoder_decoders().values()))
    sides = {name: getattr(config, name).replace(vocab_size=V.size) for name in ("encoder", "decoder")}
    model = config.replace(**sides).build().double().eval()
    rows = [Translation("ab", "cde"), Translation("abcdef", "c")]
    collate = TranslatedTexts(V, 8)

    def nats(batch: TranslationBatch) -> tuple[float, int]:
        of_source = Signals(valid=batch.source_valid.reshape(-1), unit_id=batch.source_unit_id)
        signals = Signals(valid=batch.valid.reshape(-1), unit_id=batch.unit_id)
        total, count, _, _ = model.loss(batch.source, batch.tokens, batch.targets, signals, None, of_source)
        return total.item(), int(count)

    together = nats(next(ExampleBatches(rows, collate).each(2))[1])
    apart = [nats(batch) for _, batch in ExampleBatches(rows, collate).each(1)]
    assert together[1] == sum(count for _, count in apart) == 4 + 2
    assert together[0] == pytest.approx(sum(total for total, _ in apart), rel=1e-9)
