"""Tokenizer files: exact byte lengths, separators, the missing package."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moestro.core.errors import UserError
from moestro.tasks import Text
from moestro.tasks.corpus import prepare
from moestro.tasks.labelling import Labels
from moestro.tasks.tokenizer import Bytes
from moestro.tasks.tokenizer_file import read_tokenizer

TEXT = "def größe(x):\n    return '€😀' + x  # naïve\n" * 30


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_lengths_add_up_to_the_bytes_of_the_text(file):
    tokenizer = read_tokenizer(file)
    made = tokenizer.encode(TEXT.encode())
    assert made.lengths.sum() == len(TEXT.encode())
    assert (made.lengths >= 0).all()
    assert len(made.ids) < len(TEXT)
    assert tokenizer.decode(made.ids.tolist()) == TEXT
    plain = tokenizer.encode(b"return x")
    assert [tokenizer.decode([i]).encode() for i in plain.ids] == [
        b"return x"[a:b] for a, b in zip(np.cumsum(plain.lengths) - plain.lengths, np.cumsum(plain.lengths))
    ]


def test_a_corpus_of_tokens_knows_its_bytes(file, tmp_path):
    text = tmp_path / "t.py"
    text.write_text(TEXT, encoding="utf-8")
    tokenizer = read_tokenizer(file)
    corpus = prepare(Text(path=str(text)).build(), tokenizer, tmp_path / "cache")
    assert corpus.train.dtype == np.uint16
    assert corpus.train[-1] == corpus.valid[-1] == tokenizer.separator == 0
    said = corpus.record["splits"]
    assert said["train"]["bytes"] + said["valid"]["bytes"] == len(TEXT.encode())
    assert corpus.valid_lengths is not None
    assert corpus.valid_lengths.sum() == said["valid"]["bytes"]
    assert corpus.bytes_per_token > 1.5


def test_the_run_folder_gets_the_same_tokenizer(file, tmp_path):
    for tokenizer in (read_tokenizer(file), Bytes()):
        copy = tmp_path / "copy.json"
        copy.write_text(tokenizer.to_json(), encoding="utf-8")
        again = read_tokenizer(copy)
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode(b"def f").ids.tolist() == tokenizer.encode(b"def f").ids.tolist()


def test_without_the_package_there_is_one_clear_line(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'moestro\[tokenizers\]'"):
        read_tokenizer(file)
    assert read_tokenizer("").vocab_size == 256


@pytest.mark.parametrize(
    ("content", "said"), [("{", "no JSON"), ('{"a": 1}', "no tokenizer"), (None, "cannot be read")]
)
def test_bad_files_are_one_clear_line(tmp_path, content, said):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_tokenizer(path)


def test_labels_of_held_out_tokens(file, tmp_path):
    text = tmp_path / "t.py"
    text.write_text(TEXT, encoding="utf-8")
    source = Text(path=str(text), validation=0.3).build()
    for tokenizer in (Bytes(), read_tokenizer(file)):
        corpus = prepare(source, tokenizer, tmp_path / "cache")
        labels = Labels(corpus, tokenizer, 40)
        assert set(labels.names) == {"character", "python"}
        made = labels(np.array([0, 5]))
        assert {n: len(v) for n, v in made.items()} == {"label.character": 80, "label.python": 80}
        ids = corpus.valid[:40].tolist()
        kinds = [labels.names["python"][i] for i in made["label.python"][:40]]
        first_word = [k for i, k in zip(ids, kinds) if tokenizer.decode([i]).strip() in ("def", "d", "de")]
        assert first_word[:1] == ["keyword"]
