"""Mixtures of LoRA experts: how different the experts are, published files, ready adapters."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapt.adapt_cases import decoder, perturb, tokens
from adapt.mixture_cases import SEVEN, TWO, llama
from moestro.adapt import LayerAllocation, LoRA, Mixture
from moestro.adapt.attach import adapters, attach, factors, merge, unload
from moestro.adapt.mixture import files
from moestro.adapt.mixture.balance import diversity
from moestro.core.carry import Carry
from moestro.core.errors import UserError
from moestro.core.signals import Signals
from moestro.routers.config import All, Raw, Router
from moestro.routers.steps import Scores
from moestro.testing.compare import assert_close

# Diversity and files --------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_distance_of_whole_updates() -> None:
    model = llama()
    attach(model, Mixture(targets=("*.q_proj", "*.down_proj"), allocation=TWO))
    assert {j: d.distance for j, d in diversity(model).items()} == {0: 0.0, 1: 0.0}
    perturb(model)
    want: dict[int, list[float]] = {0: [], 1: []}
    for path, m in adapters(model).items():
        whole = [m.experts.scale * b @ a for a, b in zip(m.experts.a.unbind(0), m.experts.b.unbind(0))]
        pairs = [float((x - y).detach().norm()) for x, y in itertools.combinations(whole, 2)]
        want[int(path.split(".")[2])].append(sum(pairs) / len(pairs))
    found = {j: d.distance for j, d in diversity(model).items()}
    assert found == {j: pytest.approx(sum(v) / len(v), rel=1e-5) for j, v in want.items()}


@pytest.mark.parametrize("where", ["decoder", "llama"])
def test_files_have_the_published_names_and_come_back(tmp_path: Path, where: str) -> None:
    def make() -> nn.Module:
        model = decoder("dense") if where == "decoder" else llama()
        attach(model, Mixture(targets=("attention", "ffn") if where == "decoder" else SEVEN, allocation=TWO))
        return model

    model, other = make(), make()
    perturb(model)
    files.save(model, tmp_path)
    names = files.to_published(model)
    head = "base_model.model.model.layers.1"
    assert {n for n in names if n.startswith(f"{head}.self_attn.q_proj")} == {
        *(f"{head}.self_attn.q_proj.lora_{x}_{e}.weight" for x in "AB" for e in range(4)),
        f"{head}.self_attn.q_proj.router.router.weight",
    }
    assert len(names) == 7 * (2 * 2 + 1 + 2 * 4 + 1)
    assert names[f"{head}.mlp.down_proj.lora_A_3.weight"].shape[0] == 3
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["number_experts"], said["top_k"], said["r"]) == ([2, 4], [2, 2], [3, 3])
    assert said["target_modules"] == sorted(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))
    files.load(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(factors(model).values(), factors(other).values()))
    bad = dict(names)
    bad.pop(f"{head}.mlp.down_proj.lora_A_3.weight")
    with pytest.raises(UserError, match=r"missing: base_model.*lora_A_3"):
        files.from_published(other, bad)
    with pytest.raises(UserError, match="left over: base_model.x"):
        files.from_published(other, names | {"base_model.x": torch.zeros(1)})
    key = f"{head}.mlp.down_proj.lora_A_3.weight"
    with pytest.raises(UserError, match="has shape"):
        files.from_published(other, names | {key: torch.zeros(1)})
    with pytest.raises(UserError, match="not finite"):
        files.from_published(other, names | {key: names[key] * float("nan")})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle, which is never loaded"):
        files.load(other, tmp_path)


def test_ready_adapters_become_experts(tmp_path: Path) -> None:
    """Two LoRA adapters in PEFT's format, routed over: with all weight on one, it is that adapter."""
    want, base = [], llama()
    for e, rank in enumerate((3, 2)):
        model = llama()
        attach(model, LoRA(targets=("*.q_proj", "*.v_proj"), rank=rank, alpha=4.0 + e))
        perturb(model, 0.2 + 0.1 * e)
        want.append(model(tokens()).logits.detach())
        tensors = {}
        for path, m in adapters(model).items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = m.delta.a.detach()
            tensors[f"base_model.model.{path}.lora_B.weight"] = m.delta.b.detach()
        folder = tmp_path / str(e)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        said = {"peft_type": "LORA", "r": rank, "lora_alpha": 4.0 + e}
        (folder / "adapter_config.json").write_text(json.dumps(said))
    soft = Router(select=All(), weigh=Raw())
    allocation_ = LayerAllocation(experts=(2,), top_k=(1,), rank=(3,))
    attach(base, Mixture(targets=("*.q_proj", "*.v_proj"), allocation=allocation_, choice=soft, dropout=0.0))
    for e in (0, 1):
        files.load_expert(base, e, tmp_path / str(e))
    for e in (0, 1):
        for m in adapters(base).values():
            m.router.score = Always(e)
        assert_close(f"adapter {e}", base(tokens()).logits, want[e], 1e-5)


class Always(nn.Module):
    """A score that gives one expert everything."""

    causal, needs = True, ()

    def __init__(self, expert: int) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        logits = x.new_full((x.shape[0], 2), -1e4)
        logits[:, self.expert] = 0.0
        return Scores(logits=logits), carry


def test_ready_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = llama()
    attach(model, Mixture(targets=("*.q_proj",), allocation=LayerAllocation(experts=(2,), rank=(3,))))

    def write(**change: Tensor) -> Path:
        names = [f"base_model.model.model.layers.{j}.self_attn.q_proj.lora_{x}.weight" for j in (0, 1) for x in "AB"]
        tensors = {n: torch.zeros(2, 16) if "A." in n else torch.zeros(16, 2) for n in names}
        for n, t in change.items():
            tensors[names[int(n[1])] if n[0] == "n" else n] = t
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
        return tmp_path

    files.load_expert(model, 1, write())
    with pytest.raises(UserError, match="no expert 2 of 2"):
        files.load_expert(model, 2, write())
    with pytest.raises(UserError, match="do not fit experts of rank 3"):
        files.load_expert(model, 0, write(n0=torch.zeros(4, 16)))
    with pytest.raises(UserError, match="fits no mixture"):
        files.load_expert(model, 0, write(more=torch.zeros(1)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no readable LoRA config"):
        files.load_expert(model, 0, tmp_path)


def test_mixtures_cannot_be_merged_but_removed() -> None:
    model = decoder("dense")
    want = model(tokens())[0].detach()
    names = [n for n, _ in model.named_parameters()]
    attach(model, Mixture(allocation=TWO))
    perturb(model)
    with pytest.raises(UserError, match="depends on the token"):
        merge(model)
    unload(model)
    assert torch.equal(model(tokens())[0], want)
    assert [n for n, _ in model.named_parameters()] == names
    with pytest.raises(UserError, match="not on banks of experts"):
        attach(decoder(), Mixture(targets=("experts",)))
