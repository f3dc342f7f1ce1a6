"""`moestro inspect` on a folder of transformers: plans are what the router said, and bad folders are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moestro.cli.app import run as main
from moestro.convert.hf.trace import watch
from moestro.core.errors import UserError
from moestro.trace.read import read

WORDS = ["<|endoftext|>", "\n", " ", *"abcdefghijklmnopqrstuvwxyz", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,()_="]


def model_of(kind: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        vocab_size=80,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **fields,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


MODELS = {
    "Mixtral": lambda: model_of("Mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "GptOss": lambda: model_of("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "Dots1": lambda: model_of(
        "Dots1",
        n_routed_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        norm_topk_prob=True,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_the_routers_own(name: str) -> None:
    model = MODELS[name]()
    said: list[Any] = []
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("router")]
    for router in routers:
        router.register_forward_hook(lambda m, a, out: said.append(out))
    ids = torch.randint(1, 80, (2, 9))
    with watch(model) as seen, torch.no_grad():
        model(ids)
        trail = seen.take()
        assert not seen.take()
    assert len(trail) == len(said) == len(routers)
    for (key, plan), out in zip(trail.plans().items(), said):
        plan.check()  # type: ignore[union-attr]
        logits, weights, index = out
        assert key.path.endswith("mlp.experts") or key.path.endswith("experts")
        assert torch.equal(plan.expert, index)  # type: ignore[union-attr]
        assert torch.equal(plan.weight, weights)
        want = logits.sigmoid() if name == "Dots1" else logits.softmax(-1)
        torch.testing.assert_close(plan.probs, want / want.sum(-1, keepdim=True))
    with torch.no_grad():
        model(ids)
    assert not seen.take()


def test_what_cannot_be_seen_is_refused() -> None:
    with pytest.raises(UserError, match="no routed experts"), watch(torch.nn.Linear(2, 2)):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("hf") / "tiny-mixtral"
    MODELS["Mixtral"]().save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path / "tokenizer.json"))
    (path.parent / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40, encoding="utf-8")
    return path


def test_the_command_writes_trace_and_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(folder.parent / "text.txt"), folder.parent / "out"
    code = main(
        ["inspect", str(folder), "--data", data, "--tokens", "500", "--seq-len", "32", "--out", str(out), "--json"]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    found = json.loads(said.out)
    trace = read(out / "trace.safetensors")
    assert [layer.path for layer in trace.layers] == list(found["layers"])
    assert len(trace.layers) == 2
    for row in found["layers"].values():
        assert sum(row["load"]) == 2 * found["tokens"]
        assert 0 < row["routing_entropy"] <= 1.39
    assert "routing of tiny-mixtral" in (out / "report.html").read_text(encoding="utf-8")
    ids = torch.from_numpy(trace.samples[0].columns["token"].astype("int64"))[:32].view(1, -1)
    with watch(model := MODELS["Mixtral"]()) as seen, torch.no_grad():
        model(ids)
    plan: Any = seen.take().plans()[("model.layers.1.mlp.experts", 0)]
    table = trace.samples[0].table(1)
    assert table is not None
    assert (table.expert[:32] == plan.expert.numpy()).all()  # type: ignore[index]


def broken(folder: Path, path: Path, change: Any) -> Path:
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    change(path)
    return path


def with_config(**fields: Any) -> Any:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")

    return change


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def cut(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-100])


BROKEN = {
    "pickle": (pickled, "no safetensors"),
    "cut": (cut, "transformers cannot read it"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer.json"),
    "code": (
        with_config(model_type="mine", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
        "transformers cannot read it",
    ),
    "another shape": (with_config(intermediate_size=48), "tensors are missing|cannot read it"),
    "no language model": (with_config(model_type="vit"), "no causal language model"),
    "dense": (with_config(model_type="llama"), "missing|no routed experts|cannot read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_folders_give_one_line(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BROKEN[name]
    bad = broken(folder, tmp_path / "bad", change)
    (bad / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    out = tmp_path / "out"
    assert main(["inspect", str(bad), "--data", str(folder.parent / "text.txt"), "--out", str(out)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moestro")]
    assert len(said) == 1
    import re

    assert re.search(words, said[0]), said
    assert not out.exists()
