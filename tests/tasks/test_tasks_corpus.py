"""Corpora: what is taken, what is left out, how it is split, and that it is tokenised once and streamed."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import pytest

from moestro.core.errors import UserError
from moestro.tasks import StandardLibrary, Text
from moestro.tasks import source as sources
from moestro.tasks.corpus import open_corpus, prepare
from moestro.tasks.stdlib import find, near_duplicates
from moestro.tasks.tokenizer import Bytes, Encoded


def lines(seed, count=40):
    draw = random.Random(seed)
    return "".join(f"line {draw.randint(0, 10**9)}\n" for _ in range(count)).encode()


def names(source, split):
    return [p.name for p in source.pieces if p.split == split]


def test_folder_skips_binary_hidden_and_empty_files_and_counts_them(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes(lines(1))
    (tmp_path / "a.txt").write_bytes("grüße\n".encode() * 50)
    (tmp_path / ".git" / "config").write_bytes(b"text\n")
    (tmp_path / ".hidden").write_bytes(b"text\n")
    (tmp_path / "nul.bin").write_bytes(b"text\0text" * 100)
    (tmp_path / "noise.bin").write_bytes(bytes(range(128, 256)) * 50)
    (tmp_path / "empty.txt").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    source = Text(path=str(tmp_path)).build()
    assert sorted({p.name for p in source.pieces}) == ["a.txt", "b/two.txt"]
    assert [p.name for p in source.pieces] == sorted(p.name for p in source.pieces)
    assert source.skipped == {"hidden": 1, "binary": 2, "empty": 1, "not a file": 1, "unreadable": 1}
    assert source.pieces[0].sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()


def test_folders_of_runs_are_left_out(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_bytes(lines(1))
    (tmp_path / "a.txt").write_bytes(lines(2))
    source = Text(path=str(tmp_path)).build(leave_out=lambda folder: folder.name == "runs")
    assert {p.name for p in source.pieces} == {"a.txt"}
    assert source.skipped == {"run folder": 1}


@pytest.mark.parametrize(
    ("content", "said"), [(b"a\0b" * 100, "binary"), (b"", "empty"), (bytes(range(128, 256)) * 9, "binary")]
)
def test_a_single_file_that_is_no_text_is_an_error(tmp_path, content, said):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        Text(path=str(path)).build()


def test_missing_paths_and_folders_without_text_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Text(path=str(tmp_path / "nothing")).build()
    (tmp_path / "x.bin").write_bytes(b"\0" * 99)
    with pytest.raises(UserError, match="1 binary"):
        Text(path=str(tmp_path)).build()


def test_many_files_are_split_by_file_and_few_by_their_tail(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_bytes(lines(i))
    source = Text(path=str(tmp_path)).build()
    train, valid = names(source, "train"), names(source, "valid")
    assert not set(train) & set(valid)
    assert 3 <= len(valid) <= 8
    assert all(p.start == 0 and p.stop == (tmp_path / p.name).stat().st_size for p in source.pieces)
    before = {p.name: p.split for p in source.pieces}
    (tmp_path / "zz.txt").write_bytes(lines(99, 2))  # one small file more leaves nearly all others where they were
    after = {p.name: p.split for p in Text(path=str(tmp_path)).build().pieces}
    assert sum(after[n] != before[n] for n in before) <= 1

    alone = tmp_path / "00.txt"
    pieces = Text(path=str(alone), validation=0.25).build().pieces
    assert [p.split for p in pieces] == ["train", "valid"]
    assert pieces[0].stop == pieces[1].start
    assert alone.read_bytes()[: pieces[0].stop].endswith(b"\n")
    assert pieces[0].stop == pytest.approx(0.75 * alone.stat().st_size, rel=0.05)


def test_tokens_are_the_bytes_of_the_files(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(30):
        (tmp_path / "data" / f"{i:02}.txt").write_bytes(lines(i))
    source = Text(path=str(tmp_path / "data")).build()
    corpus = prepare(source, Bytes(), tmp_path / "cache")
    want = b"".join((tmp_path / "data" / n).read_bytes() + b"\0" for n in names(source, "train"))
    assert corpus.train.tobytes() == want
    assert corpus.train.dtype == np.uint8
    assert corpus.record["splits"]["train"] == {"tokens": len(want), "bytes": len(want)}
    assert {f["name"] for f in corpus.record["files"]} == {p.name for p in source.pieces}
    assert isinstance(corpus.train, np.memmap)


def test_text_is_tokenised_once_and_a_damaged_cache_again(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_bytes(lines(1, 500))
    source = Text(path=str(path)).build()
    corpus = prepare(source, Bytes(), tmp_path / "cache")
    monkeypatch.setattr(Bytes, "encode", lambda *a: pytest.fail("tokenised twice"))
    assert prepare(source, Bytes(), tmp_path / "cache").key == corpus.key
    monkeypatch.undo()
    stored = tmp_path / "cache" / corpus.key / "train.bin"
    good = stored.read_bytes()
    stored.write_bytes(good[:50] + b"#" + good[51:])
    with pytest.raises(UserError, match="damaged"):
        open_corpus(tmp_path / "cache", corpus.key)
    said: list[str] = []
    assert prepare(source, Bytes(), tmp_path / "cache", said.append).train.tobytes() == good
    assert "damaged" in said[0]


def test_changed_text_has_another_key(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(lines(1, 100))
    first = prepare(Text(path=str(path)).build(), Bytes(), tmp_path / "cache")
    path.write_bytes(lines(1, 99) + b"line 0000000\n")
    assert prepare(Text(path=str(path)).build(), Bytes(), tmp_path / "cache").key != first.key


def test_a_large_file_is_streamed_in_chunks_that_end_with_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 256)
    text = ("äöü€😀 " * 9 + "\n").encode() * 40 + "😀".encode() * 500
    path = tmp_path / "t.txt"
    path.write_bytes(text)
    piece = sources.Piece(path, "t.txt", "", 0, len(text), "train")
    parts = list(sources.chunks(piece))
    assert b"".join(parts) == text
    assert max(map(len, parts)) <= 3 * 256
    for part in parts:
        part.decode()  # no character is cut
    assert all(p.endswith(b"\n") for p in parts[:10])


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(lines(1))
    source = Text(path=str(path)).build()
    path.write_bytes(b"short\n")
    with pytest.raises(UserError, match="changed"):
        prepare(source, Bytes(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_bytes(lines(1))

    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bytes, "encode", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(Text(path=str(path)).build(), Bytes(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_wide_vocabularies_are_stored_wide(tmp_path):
    class Wide(Bytes):
        vocab_size = 70_000
        key = "wide"

        def encode(self, text):
            ids = np.frombuffer(text, np.uint8).astype(np.int64) + 65_536
            return Encoded(ids, np.ones_like(ids))

    path = tmp_path / "t.txt"
    path.write_bytes(lines(1))
    assert prepare(Text(path=str(path)).build(), Wide(), tmp_path / "cache").train[:4].tolist() == [
        65_536 + b for b in b"line"
    ]


# The standard library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stdlib():
    return StandardLibrary().build()


def test_the_standard_library_without_tests_and_encodings(stdlib):
    parts = {part for p in stdlib.pieces for part in p.name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"}
    assert {"json", "asyncio"} <= parts
    total = sum(p.stop for p in stdlib.pieces)
    valid = sum(p.stop for p in stdlib.pieces if p.split == "valid")
    assert total > 3e6
    assert 0.07 < valid / total < 0.11
    packages = {s: {p.name.split("/")[0] for p in stdlib.pieces if p.split == s} for s in ("train", "valid")}
    assert not packages["train"] & packages["valid"]


def test_the_standard_library_is_the_same_every_time(stdlib, tmp_path):
    assert find(StandardLibrary()) == stdlib
    with pytest.raises(UserError, match="--data"):
        find(StandardLibrary(), tmp_path)


def test_near_duplicates_leave_one():
    text = lines(1, 100)
    small_change = text.replace(b"line", b"LINE", 3)
    part = b"".join(text.splitlines(keepends=True)[:50])
    found = near_duplicates({"a.py": text, "b.py": small_change, "c.py": part, "d.py": lines(2, 100)})
    assert found == {"b.py", "c.py"}
