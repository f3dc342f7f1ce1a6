"""MoLA's published layout: random tensors under its names against a float64 model written token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapt.adapt_cases import tokens
from moestro.adapt import LayerAllocation, Mixture
from moestro.adapt.attach import adapters, attach, factors
from moestro.adapt.mixture import files
from moestro.convert import save
from moestro.core.errors import UserError
from moestro.models.config import Decoder
from moestro.nn.config import Attention, FeedForward
from moestro.testing.compare import assert_close

D, F, H, V, L, R, ALPHA = 8, 12, 2, 37, 2, 3, 6.0
EXPERTS, TOP_K = (2, 4), (2, 3)
SIZES = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "gate": (F, D), "up": (F, D), "down": (D, F)}  # out, in
MODEL = Decoder(
    vocab_size=V, dim=D, num_layers=L, attention=Attention(num_heads=H), ffn=FeedForward(width=F), context=16, seed=3
)


def module(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{'mlp' if name in ('gate', 'up', 'down') else 'self_attn'}.{name}_proj"


def published() -> dict[str, Tensor]:
    """Random tensors under the names that the authors' code saves."""
    draws = torch.Generator().manual_seed(0)
    out = {}
    for j, number in enumerate(EXPERTS):
        for name, (outputs, inputs) in SIZES.items():
            head = f"base_model.model.{module(j, name)}"
            for e in range(number):
                out[f"{head}.lora_A_{e}.weight"] = torch.randn(R, inputs, generator=draws) * 0.5
                out[f"{head}.lora_B_{e}.weight"] = torch.randn(outputs, R, generator=draws) * 0.5
            out[f"{head}.router.router.weight"] = torch.randn(number, inputs, generator=draws)
    return out


def folder(path: Path, tensors: dict[str, Tensor], **fields: object) -> Path:
    """An adapter's folder as the released code leaves it, but for the pickle."""
    path.mkdir(exist_ok=True)
    said = {
        "peft_type": "LORA",
        "number_experts": list(EXPERTS),
        "top_k": list(TOP_K),
        "r": [R] * L,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "obalance": False,
        "target_modules": [f"{name}_proj" for name in SIZES],
    }
    (path / "adapter_config.json").write_text(json.dumps(said | fields))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


# The reference --------------------------------------------------------------------------------------------------------


class Llama:
    """Llama with MoLA on every map in float64, one token and one expert at a time. w: names as in transformers."""

    def __init__(self, base: dict[str, Tensor], more: dict[str, Tensor]) -> None:
        self.w = {name: t.double() for name, t in base.items()}
        self.more = {name.removeprefix("base_model.model."): t.double() for name, t in more.items()}

    def map(self, x: Tensor, layer: int, name: str) -> Tensor:
        path = module(layer, name)
        out = self.w[f"{path}.weight"] @ x
        logits = self.more[f"{path}.router.router.weight"] @ x
        p = torch.exp(logits - logits.max())
        p = p / p.sum()
        best = sorted(range(EXPERTS[layer]), key=lambda e: -float(p[e]))[: TOP_K[layer]]
        for e in best:
            a, b = self.more[f"{path}.lora_A_{e}.weight"], self.more[f"{path}.lora_B_{e}.weight"]
            out = out + p[e] / sum(p[i] for i in best) * ALPHA / R * (b @ (a @ x))
        return out

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + 1e-6) * self.w[name]

    def turned(self, x: Tensor, place: int) -> Tensor:
        """Rotary positions: entries i and i + n/2 of every head as a pair."""
        heads = []
        for head in x.split(D // H):
            n = len(head)
            angle = torch.tensor([place * 10000.0 ** (-2 * i / n) for i in range(n // 2)], dtype=torch.float64)
            a, b = head.chunk(2)
            heads.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]))
        return torch.cat(heads)

    def __call__(self, ids: list[int]) -> Tensor:
        """[S, V] logits of one sequence."""
        x = [self.w["model.embed_tokens.weight"][i] for i in ids]
        for j in range(L):
            read = [self.norm(t, f"model.layers.{j}.input_layernorm.weight") for t in x]
            q = [self.turned(self.map(t, j, "q"), i).split(D // H) for i, t in enumerate(read)]
            k = [self.turned(self.map(t, j, "k"), i).split(D // H) for i, t in enumerate(read)]
            v = [self.map(t, j, "v").split(D // H) for t in read]
            for i in range(len(x)):
                seen = []
                for h in range(H):
                    score = torch.stack([q[i][h] @ k[t][h] / math.sqrt(D // H) for t in range(i + 1)])
                    weight = torch.softmax(score, 0)
                    seen.append(sum((weight[t] * v[t][h] for t in range(i + 1)), torch.zeros(D // H).double()))
                x[i] = x[i] + self.map(torch.cat(seen), j, "o")
            for i, t in enumerate(x):
                t = self.norm(t, f"model.layers.{j}.post_attention_layernorm.weight")
                gate = self.map(t, j, "gate")
                x[i] = x[i] + self.map(gate * torch.sigmoid(gate) * self.map(t, j, "up"), j, "down")
        return torch.stack([self.w["lm_head.weight"] @ self.norm(t, "model.norm.weight") for t in x])


def base(path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with weights of some size, and the same under Llama's names."""
    model = MODEL.build()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.4)
    save(model, path / "llama", to="llama")
    return model.eval(), load_file(path / "llama" / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_published_tensors_give_the_logits_of_a_loop_over_tokens_and_come_back(tmp_path: Path) -> None:
    model, weights = base(tmp_path)
    tensors = published()
    given = tokens(B=2, S=6)
    want = torch.stack([Llama(weights, tensors)(row) for row in given.tolist()])
    attached = files.attach(model, folder(tmp_path / "mola", tensors))
    assert attached.trainable == sum(t.numel() for t in tensors.values())
    assert_close("logits", model(given)[0], want, 1e-5)
    files.save(model, tmp_path / "again")
    back = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], tensors[n]) for n in tensors)
    said = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (said["number_experts"], said["top_k"], said["r"]) == (list(EXPERTS), list(TOP_K), [R] * L)
    other, _ = base(tmp_path / "other")
    files.attach(other, tmp_path / "again")
    assert torch.equal(other(given)[0], model(given)[0])


@pytest.mark.parametrize("trouble", ["missing", "unknown", "shape", "experts", "modules", "half", "layers", "fields"])
def test_what_does_not_fit_is_one_clear_error_and_attaches_nothing(tmp_path: Path, trouble: str) -> None:
    model, tensors = MODEL.build(), published()
    key = f"base_model.model.{module(1, 'down')}.lora_A_3.weight"
    fields: dict[str, object] = {}
    if trouble == "missing":
        del tensors[key]
        says = f"missing: {key}"
    elif trouble == "unknown":
        tensors[key.replace("lora_A_3", "lora_A_4")] = torch.zeros(R, F)
        says = "left over: .*lora_A_4"
    elif trouble == "shape":
        tensors[key] = torch.zeros(R, F + 1)
        says = rf"lora_A_3.weight has shape \[{R}, {F + 1}\], not \[{R}, {F}\]"
    elif trouble == "experts":
        fields["number_experts"], says = [2, 5], "missing: .*_4.weight"
    elif trouble == "modules":
        fields["target_modules"], says = ["q_proj"], "left over"
    elif trouble == "half":
        fields["target_modules"], says = ["q_proj", "up_proj"], "up_proj alone has no place"
    elif trouble == "layers":
        fields["number_experts"], fields["top_k"], fields["r"] = [2] * 3, [2] * 3, [R] * 3
        says = "3 numbers for 2 adapted layers"
    else:
        fields["top_k"], says = "two", "no readable config of a mixture"
    with pytest.raises(UserError, match=says) as error:
        files.attach(model, folder(tmp_path, tensors, **fields))
    assert "\n" not in str(error.value)
    assert not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_one_number_stands_for_all_layers(tmp_path: Path) -> None:
    model = MODEL.build()
    attach(model, Mixture(allocation=LayerAllocation(experts=(2,), rank=(R,)), alpha=ALPHA))
    files.save(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    del said["moestro"]  # as the released code writes it
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"number_experts": 2, "top_k": 2, "r": R}))
    other = MODEL.build()
    files.attach(other, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(factors(model).values(), factors(other).values()))
