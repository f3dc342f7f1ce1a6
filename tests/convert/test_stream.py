"""Streaming holds little: a gigabyte passes through less anonymous memory than a shard and a tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.convert.checkpoint.apply import to_theirs
from moestro.convert.checkpoint.folder import FolderTensors
from moestro.convert.checkpoint.tensors import Entry
from moestro.convert.families import find
from moestro.convert.loading import meta_entries, read_config

MB = 1 << 20
SHARD = 256 * MB
CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 7168,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "max_position_embeddings": 64,
}

WORK = """
import os, sys, threading, time
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
import torch
from moestro.convert import stream
from moestro.convert.families import find
from moestro.convert.loading import meta_entries, read_config
meta_entries(read_config({"model_type": "mixtral", **find("mixtral").examples()["plain"]}))  # imports what it needs
os.fsync = lambda file: None  # the disk's speed is not what is tested
before, most, done = anonymous(), 0, threading.Event()
def watch():
    global most
    while not done.is_set():
        most = max(most, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
stream(sys.argv[1], sys.argv[2], to=sys.argv[3], shard_bytes=int(sys.argv[4]))
done.set(); thread.join()
print(most - before)
"""


class _Shapes:
    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def entries(self) -> dict[str, Entry]:
        return self._entries

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(name)


def make(folder: Path) -> int:
    """A checkpoint in shards of at most 256 MB, of bf16: zeros, and a pattern at the start of every tensor. Returns the
    number of shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    ours, _ = meta_entries(read_config(CONFIG))
    theirs = to_theirs(_Shapes(ours), find("mixtral").table, "made").entries()
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in theirs.items():
        if size + entry.numel * 2 > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.numel * 2
    files: dict[str, str] = {}
    for i, names in enumerate(shards):
        name, end, header = f"model-{i + 1:05}-of-{len(shards):05}.safetensors", 0, {}
        for n in names:
            start, end = end, end + theirs[n].numel * 2
            header[n] = {"dtype": "BF16", "shape": list(theirs[n].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
            for n in names:
                file.seek(8 + len(text) + header[n]["data_offsets"][0])
                pattern = torch.full((512,), float(len(files) + names.index(n)), dtype=torch.bfloat16)
                file.write(pattern.view(torch.uint8).numpy().tobytes())
        files |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return len(shards)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell anonymous memory")
def test_anonymous_memory_stays_below_a_shard_and_a_tensor(tmp_path: Path) -> None:
    assert make(tmp_path / "in") >= 4
    command = [sys.executable, "-c", WORK, str(tmp_path / "in"), str(tmp_path / "out"), "moestro", str(SHARD)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout)
    before, after = FolderTensors(tmp_path / "in"), FolderTensors(tmp_path / "out")
    largest = max(e.nbytes for e in (*before.entries().values(), *after.entries().values()))
    shard = max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < grown < 1.2 * (shard + largest), (grown / MB, shard / MB, largest / MB)
    bank = after.read("model.layers.2.ffn.experts.gate_up")
    for name, rows in (("w1", slice(0, 7168)), ("w3", slice(7168, None))):
        part = before.read(f"model.layers.2.block_sparse_moe.experts.3.{name}.weight")
        assert torch.equal(bank[3, rows], part)
