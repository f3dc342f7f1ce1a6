"""`moestro serve`: a run or a folder, behind transformers' own server."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Trained, command
from moestro.cli import serve
from moestro.core.errors import UserError
from moestro.serve.generate import generate
from moestro.train.hf import from_run, write_run
from moestro.train.load import load

PROMPT = "def f1(x"


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(trained.folder, tmp_path_factory.mktemp("serve") / "model")


def test_a_run_opens_as_a_model_of_transformers(trained: Trained) -> None:
    made, loaded = from_run(trained.folder), load(trained.folder)
    text = "día\tΩ\x00 <|endoftext|>\n\n  x"
    ids = made.tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert made.tokenizer.decode(ids) == text
    assert made.model.generation_config.eos_token_id == 0
    prompt = made.tokenizer(PROMPT, return_tensors="pt")
    new = made.model.generate(**prompt, max_new_tokens=9, do_sample=False)[0, len(PROMPT) :]
    assert new.tolist() == generate(loaded.model, list(PROMPT.encode()), 9).tokens.tolist()


def test_the_written_folder_is_the_run(trained: Trained, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, want = AutoModelForCausalLM.from_pretrained(folder), load(trained.folder).model
    for name, tensor in want.state_dict().items():
        assert made.model.state_dict()[name].equal(tensor), name
    assert AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"] == list(PROMPT.encode())


def test_the_verb_hands_over_to_transformers(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.cli.serve as theirs
    import transformers.utils.import_utils as found

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(theirs, "Serve", lambda **said: seen.append(said))
    monkeypatch.setattr(found, "is_serve_available", lambda: True)
    kept = tmp_path / "kept"
    status, out, err = command("serve", str(trained.folder), "--port", "8123", "--device", "cpu", "--out", str(kept))
    assert status == 0, err
    want = {"host": "localhost", "port": 8123, "device": "cpu", "dtype": "auto", "log_level": "warning"}
    assert seen == [{"force_model": str(kept), **want}]
    assert (kept / "model.safetensors").is_file()
    assert "http://localhost:8123/v1" in out
    assert command("serve", str(kept))[0] == 0
    assert seen[1]["force_model"] == str(kept)
    assert command("serve", str(trained.folder), "--out", str(kept))[0] == 2
    monkeypatch.setattr(found, "is_serve_available", lambda: False)
    status, _, err = command("serve", str(kept))
    assert status == 2
    assert "pip install 'transformers[serving]'" in err


def test_what_cannot_be_served_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run and no model folder"):
        serve.prepared(str(tmp_path), tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type"):
        serve.prepared(str(tmp_path), tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "moestro"}')
    with pytest.raises(UserError, match="no tokenizer"):
        serve.prepared(str(tmp_path), tmp_path / "out")


def test_the_server_completes_text(trained: Trained, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    options = serve.Options(model=str(folder), port=port, device="cpu")
    server = serve.start(folder, options, non_blocking=True)
    try:
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        said = _post(f"http://localhost:{port}/v1/completions", body)
    finally:
        server.kill_server()
    want = generate(load(trained.folder).model, list(PROMPT.encode()), 6).tokens.tolist()
    assert said["choices"][0]["text"].encode() == bytes(want).decode(errors="replace").encode()


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    import time

    for _ in range(100):
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not come up")
