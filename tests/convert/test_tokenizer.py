"""Tokenizer files: the library's bytes for tools that do not know it, and copies of a source's."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro import convert
from moestro.convert.checkpoint.tokenizer import FILES, byte_characters, write_tokenizer
from moestro.convert.families import FAMILIES, find
from moestro.core.errors import UserError
from moestro.models import Decoder
from moestro.tasks.tokenizer import Bytes

tokenizers = importlib.import_module("tokenizers")
TEXTS = (
    "",
    "a",
    " two  spaces\n\tand tabs\r\n",
    "naïve – café, ﬁ, e\u0301",
    "日本語 🙂\U0010ffff",
    "\x00\x7f\x80ÿ",
    "<s></s>[INST]",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(out, "bytes")
    return out


def test_the_alphabet() -> None:
    assert sorted(byte_characters().values()) == list(range(256))
    theirs = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(byte_characters()) == set(theirs)


@given(text=st.text(max_size=60))
@settings(max_examples=50, deadline=None)
def test_ids_are_bytes(folder: Path, text: str) -> None:
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = made.encode(text).ids
    assert ids == list(text.encode())
    assert made.decode(ids) == text


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "moestro"])
def test_transformers_loads_it_beside_any_model(folder: Path, family: str) -> None:
    transformers = importlib.import_module("transformers")
    example = next(iter(find(family).examples().values()))
    fields = {**example, "model_type": family, "architectures": [find(family).architecture]}
    (folder / "config.json").write_text(json.dumps(fields))
    made = transformers.AutoTokenizer.from_pretrained(folder)
    assert made.vocab_size == len(made) == Bytes.vocab_size
    for text in TEXTS:
        ids = made(text)["input_ids"]
        assert ids == Bytes().encode(text.encode()).ids.tolist()
        assert made.decode(ids) == text


def test_saved_beside_a_model_and_copied_on(tmp_path: Path) -> None:
    model = Decoder(vocab_size=256, dim=16, num_layers=1).build()
    convert.save(model, tmp_path / "a", to="llama", tokenizer="bytes")
    loaded = convert.load(tmp_path / "a")
    convert.save(loaded.model, tmp_path / "b", to="llama", source=loaded)
    convert.stream(tmp_path / "a", tmp_path / "c", to="moestro")
    (tmp_path / "a" / "tokenization_evil.py").write_text("raise SystemExit")
    convert.save(loaded.model, tmp_path / "d", to="mistral", tokenizer=tmp_path / "a")
    for name in ("b", "c", "d"):
        files = {p.name for p in (tmp_path / name).iterdir()} & {*FILES, "tokenization_evil.py"}
        assert files == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(UserError, match="holds no tokenizer files"):
        convert.save(model, tmp_path / "e", to="llama", tokenizer=tmp_path)
    assert not (tmp_path / "e").exists()
