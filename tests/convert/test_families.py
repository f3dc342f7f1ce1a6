"""Every family against transformers' own models, generated from the registry: a family is tested because it exists."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro import convert
from moestro.convert.families import FAMILIES, find
from moestro.core.signals import Signals
from moestro.models.decoder import Decoder
from moestro.testing.compare import assert_close

transformers = importlib.import_module("transformers")

OTHERS = [name for name in FAMILIES if name != "moestro"]  # models that transformers has by itself
CASES = [(name, example) for name in OTHERS for example in find(name).examples()]
CAUSAL = [(name, example) for name, example in CASES if find(name).architecture.endswith("ForCausalLM")]
TOKENS = torch.randint(0, 37, (2, 17), generator=torch.Generator().manual_seed(1))


def perturb(model: torch.nn.Module) -> None:
    """Random values everywhere: norms, biases and buffers too, so that none of them can be left out."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            tensor.copy_(1 + 0.2 * noise if "norm" in name and "bias" not in name else 0.3 * noise)


def made(folder: Path, family: str, example: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of an example, saved in `folder`."""
    fields = dict(find(family).examples()[example])
    config = transformers.AutoConfig.for_model(family, **fields)
    with torch.no_grad():
        model = getattr(transformers, find(family).architecture)(config).to(dtype)
        perturb(model)
    model.save_pretrained(folder)
    return model.eval()


def choices_of(model: Any, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the experts of every unit in every routed layer, ascending, as transformers chooses them."""
    seen: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()]
        seen.append(tables[0].flatten(0, -2).sort(dim=-1).values)

    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        return model(tokens).logits, seen


def config_of(folder: Path) -> dict[str, Any]:
    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {k: v for k, v in found.items() if k not in ("transformers_version", "_name_or_path")}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(("family", "example"), CAUSAL)
@torch.no_grad()
def test_logits_choices_and_decoding(tmp_path: Path, family: str, example: str) -> None:
    theirs, chosen = choices_of(made(tmp_path, family, example), TOKENS)
    model: Decoder = convert.load(tmp_path).model
    logits, _, trail = model(TOKENS)
    assert_close("logits", logits, theirs, 1e-5)
    ours = [record.plan.expert.sort(dim=-1).values for record in trail.values()]
    assert len(ours) == len(chosen)
    for mine, their in zip(ours, chosen):
        assert torch.equal(mine, their)
    carry, parts = model.new_cache(TOKENS.shape[1]), []
    for piece in TOKENS.split([11, 1, 1, 4], dim=1):
        y, carry, _ = model(piece, Signals(), carry)
        parts.append(y)
    assert_close("cached", torch.cat(parts, dim=1), theirs, 1e-5)


@pytest.mark.parametrize(("family", "example"), CASES)
def test_there_and_back(tmp_path: Path, family: str, example: str) -> None:
    made(tmp_path / "theirs", family, example)
    loaded = convert.load(tmp_path / "theirs")
    convert.save(loaded.model, tmp_path / "ours", to=family, source=loaded)
    assert_same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    convert.save(loaded.model, tmp_path / "bare", to=family)  # the config alone must say enough
    again = convert.load(tmp_path / "bare")
    assert_same_bits(again.model.state_dict(), loaded.model.state_dict())
    convert.stream(tmp_path / "theirs", tmp_path / "streamed", to=family, shard_bytes=4096)
    assert (tmp_path / "streamed" / "model.safetensors.index.json").is_file()
    assert_same_bits(convert.load(tmp_path / "streamed").model.state_dict(), loaded.model.state_dict())


@pytest.mark.parametrize(("family", "example"), CAUSAL)
def test_through_our_own_folder(tmp_path: Path, family: str, example: str) -> None:
    """Disk to disk, their layout to ours and back: the same bits, and the function's fields with them."""
    made(tmp_path / "theirs", family, example)
    convert.stream(tmp_path / "theirs", tmp_path / "own", to="moestro", shard_bytes=20_000)
    convert.stream(tmp_path / "own", tmp_path / "back", to=family)
    assert_same_bits(tensors_in(tmp_path / "back"), tensors_in(tmp_path / "theirs"))
    there, back = config_of(tmp_path / "theirs"), config_of(tmp_path / "back")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert back[name] == there[name]
    assert convert.read_config(tmp_path / "own") == convert.read_config(tmp_path / "theirs")


ALONE = """
import sys
sys.modules["moestro"] = None  # importing it raises
import torch, transformers
from safetensors.torch import load_file, save_file
tokens, out = load_file(sys.argv[1])["tokens"], {}
for architecture, folder in zip(sys.argv[3::2], sys.argv[4::2]):
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        out[folder] = model.eval()(tokens).logits.clone()
save_file(out, sys.argv[2])
"""


def test_exports_load_where_the_library_is_not(tmp_path: Path) -> None:
    wanted, arguments = {}, []
    for family, example in CAUSAL:
        folder, out = tmp_path / f"{family}-{example}", tmp_path / f"{family}-{example}-out"
        model = made(folder, family, example)
        convert.save(convert.load(folder).model, out, to=family)  # what the config alone says must do
        with torch.no_grad():
            wanted[str(out)] = model(TOKENS).logits
        arguments += [find(family).architecture, str(out)]
    tokens, logits = tmp_path / "tokens.safetensors", tmp_path / "logits.safetensors"
    save_file({"tokens": TOKENS}, tokens)
    subprocess.run([sys.executable, "-c", ALONE, str(tokens), str(logits), *arguments], check=True, timeout=100)
    found = load_file(logits)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(name, found[name], value, 1e-5)


def test_dtypes_are_kept_or_cast(tmp_path: Path) -> None:
    made(tmp_path / "theirs", "mixtral", "plain", torch.bfloat16)
    loaded = convert.load(tmp_path / "theirs")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    convert.save(loaded.model, tmp_path / "ours", to="mixtral", source=loaded)
    assert_same_bits(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    wide = convert.load(tmp_path / "theirs", dtype=torch.float32).model
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    convert.save(wide, tmp_path / "narrow", to="mixtral", dtype=torch.bfloat16)
    assert_same_bits(tensors_in(tmp_path / "narrow"), tensors_in(tmp_path / "theirs"))


def test_older_rope_fields_mean_the_same() -> None:
    base = find("llama").examples()["llama3"]
    new = {**base, "model_type": "llama"}
    scaling = {k: v for k, v in base["rope_parameters"].items() if k != "rope_theta"}
    old = {**new, "rope_theta": base["rope_parameters"]["rope_theta"], "rope_scaling": scaling}
    del old["rope_parameters"]
    assert convert.read_config(old) == convert.read_config(new)


def test_one_expert_of_mixtral_has_weight_one(tmp_path: Path) -> None:
    fields = {**find("mixtral").examples()["plain"], "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_close("logits", convert.load(tmp_path).model(TOKENS)[0], model(TOKENS).logits, 1e-5)
