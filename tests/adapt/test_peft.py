"""Adapters in PEFT's format: PEFT alone loads ours on the exported base, and we load PEFT's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adapt.adapt_cases import decoder, perturb, tokens
from moestro import convert
from moestro.adapt import LoRA, Mixture
from moestro.adapt.attach import adapters, attach, factors, merge
from moestro.adapt.peft.pairs import flat, fuse, pad, stacked, unfuse
from moestro.adapt.peft.read import load
from moestro.adapt.peft.slots import slots
from moestro.adapt.peft.write import CONFIG, TENSORS, save
from moestro.convert.families import FAMILIES, find
from moestro.core.errors import UserError
from moestro.experts.bank import Bank
from moestro.models.config import Decoder
from moestro.testing.compare import assert_close

ROUTED = LoRA(targets=("experts", "attention"), rank=3, alpha=5.0, dropout=0.1)
CASES = {  # name -> (family, which of its examples, config)
    "mixtral": ("mixtral", 0, ROUTED),
    "mixtral_shared_factors": ("mixtral", 0, ROUTED.replace(shared="both", joined=True, targets=("experts",))),
    "mixtral_some_layers": ("mixtral", 0, ROUTED.replace(layers=(1,), shared="a")),
    "mixtral_parts": ("mixtral", 0, LoRA(targets=("experts.up", "attention.q"), rank=2, partial=True)),
    "qwen3_moe": ("qwen3_moe", 1, ROUTED.replace(targets=("experts", "attention", "ffn"))),
    "qwen2_moe": ("qwen2_moe", 0, ROUTED.replace(targets=("experts", "attention", "shared"))),
    "deepseek_v3": ("deepseek_v3", 0, ROUTED.replace(targets=("experts", "attention", "shared", "ffn"))),
    "olmoe": ("olmoe", 0, ROUTED.replace(shared="b")),
    "phimoe": ("phimoe", 0, ROUTED),
    "llama": ("llama", 0, LoRA(targets=("attention", "ffn"), rank=2, alpha=3.0)),
}
OTHER_LAYOUTS = ("gpt_oss", "granitemoe", "granitemoeshared")
ALONE = """
import json, sys, warnings
sys.modules["moestro"] = None  # importing it raises
warnings.simplefilter("error", RuntimeWarning)
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
for case in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(case + "/base")
    tokens = torch.load(case + "/tokens.pt")
    out = {"base": base(tokens).logits}
    model = PeftModel.from_pretrained(base, case + "/adapter").eval()
    out["adapted"] = model(tokens).logits
    for name, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            out["delta " + name + " " + module.parameter_name] = module.get_delta_weight("default")
    model.save_pretrained(case + "/again")
    if "theirs" in json.load(open(case + "/what.json")):
        base = AutoModelForCausalLM.from_pretrained(case + "/base")
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False,
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], rank_pattern={"q_proj": 2})
        torch.manual_seed(1)
        model = get_peft_model(base, config).eval()
        out["theirs"] = model(tokens).logits
        model.save_pretrained(case + "/theirs")
    torch.save({n: t.detach().clone() for n, t in out.items()}, case + "/out.pt")
"""


def base_of(case: str) -> nn.Module:
    family, number, _ = CASES[case]
    fields = list(find(family).examples().values())[number]
    torch.manual_seed(0)
    return convert.read_config({"model_type": family, **fields}).build()


def given() -> Tensor:
    return tokens(2, 9, vocab=37)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case exported, adapted and saved here; loaded, run and saved again by PEFT without Moestro."""
    root = tmp_path_factory.mktemp("peft")
    for case, (family, _, config) in CASES.items():
        folder, model = root / case, base_of(case)
        folder.mkdir()
        convert.save(model, folder / "base", to=family)
        attach(model, config)
        perturb(model)
        save(model, folder / "adapter", to=family)
        torch.save(given(), folder / "tokens.pt")
        (folder / "what.json").write_text(json.dumps(["theirs"] if case in ("mixtral", "qwen3_moe") else []))
    line = [sys.executable, "-c", ALONE, *(str(root / case) for case in CASES)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def adapted(case: str) -> nn.Module:
    model = base_of(case)
    attach(model, CASES[case][2])
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_peft_alone_gives_equal_logits(made: Path, case: str) -> None:
    out = torch.load(made / case / "out.pt")
    model = base_of(case).eval()
    assert_close("base", out["base"], model(given())[0], 1e-5)
    want = adapted(case)(given())[0]
    assert_close("adapted", out["adapted"], want, 1e-5)
    assert float((want - out["base"]).detach().norm() / out["base"].norm()) > 0.05, "the adapter does nothing"


@pytest.mark.parametrize("case", [c for c in CASES if c != "llama"])
def test_every_experts_update_is_the_same_matrix_in_peft(made: Path, case: str) -> None:
    """The order of rows: read wrongly, experts and ranks change places, and shapes still fit."""
    out = torch.load(made / case / "out.pt")
    checked = 0
    for path, bank in adapters(adapted(case)).items():
        if not path.endswith("ffn.experts"):
            continue
        bank.merge(keep=True)
        merged = {n: getattr(bank, n).detach().clone() for n in ("gate_up", "down")}
        bank.unmerge()
        layer = path.split(".")[1]
        for name, value in merged.items():
            hits = [t for n, t in out.items() if f".layers.{layer}." in n and n.endswith(f".experts {name}_proj")]
            hits += [t for n, t in out.items() if f".layers.{layer}." in n and n.endswith(f"base_layer {name}_proj")]
            if not hits:
                assert torch.equal(value, getattr(bank, name))
                continue
            assert_close(f"{path}.{name}", hits[0], value - getattr(bank, name), 1e-5)
            checked += 1
    assert checked


@pytest.mark.parametrize("case", CASES)
def test_ours_come_back_as_they_were(made: Path, case: str) -> None:
    family = CASES[case][0]
    model, want = base_of(case), adapted(case)
    attached = load(model, made / case / "adapter", of=family)
    assert attached.trainable == sum(p.numel() for p in factors(want).values())
    own, other = factors(model), factors(want)
    assert list(own) == list(other)
    for n, p in own.items():
        assert torch.equal(p, other[n]), n
    first = next(iter(adapters(model).values()))
    config = getattr(first, "lora", None) or next(m.config for m in first.modules() if hasattr(m, "scale"))
    assert config.dropout == CASES[case][2].dropout


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_again_is_read(made: Path, case: str) -> None:
    """Without our header: gate and up share an A of the sum of their ranks, and the function is the same."""
    model = base_of(case)
    load(model, made / case / "again", of=CASES[case][0])
    assert_close("logits", model.eval()(given())[0], adapted(case)(given())[0], 1e-5)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_an_adapter_made_by_peft_is_read_and_written_back(made: Path, case: str, tmp_path: Path) -> None:
    family = CASES[case][0]
    model = base_of(case)
    load(model, made / case / "theirs", of=family)
    want = torch.load(made / case / "out.pt")["theirs"]
    assert_close("logits", model.eval()(given())[0], want, 1e-5)
    save(model, tmp_path, to=family)
    theirs, ours = (load_file(f / TENSORS) for f in (made / case / "theirs", tmp_path))
    assert set(theirs) == set(ours)
    for n in theirs:
        if "experts" in n:
            assert torch.equal(theirs[n], ours[n]), n


def test_what_the_file_says(made: Path) -> None:
    said = json.loads((made / "mixtral" / "adapter" / CONFIG).read_text())
    assert said["lora_dropout"] == 0.0
    assert said["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert said["target_modules"] == [f"self_attn.{n}_proj" for n in "koqv"]
    assert said["lora_alpha"] / said["r"] == pytest.approx(5 / 3)
    some = json.loads((made / "mixtral_some_layers" / "adapter" / CONFIG).read_text())
    assert some["target_parameters"][0] == "model.layers.1.mlp.experts.down_proj"
    assert not any(".layers.0." in n for n in load_file(made / "mixtral_some_layers" / "adapter" / TENSORS))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"moestro"}))
def test_places_are_those_of_transformers(family: str) -> None:
    """Every place of every family that has a file: module, parameter and shape there, or a refusal with the reason."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, fields in find(family).examples().items():
        config = convert.read_config({"model_type": family, **fields})
        if not isinstance(config, Decoder):
            continue
        with torch.device("meta"):
            model = config.build()
            theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        if family in OTHER_LAYOUTS:
            with pytest.raises(UserError, match="in another layout"):
                slots(model, family)
            continue
        found = slots(model, family)
        assert {s.part for s in found} >= {"gate", "up", "down", "o"}, name
        stacks = {p for p, m in model.named_modules() if isinstance(m, Bank) and m.role == "expert"}
        assert {s.path for s in found if s.parameter} == stacks
        for s in found:
            module = theirs.get_submodule(s.module)
            if s.parameter is None:
                assert isinstance(module, nn.Linear), s
                continue
            bank = model.get_submodule(s.path)
            shape = bank.down.shape if s.part == "down" else bank.gate_up.shape
            assert getattr(module, s.parameter).shape == shape, s
            assert not getattr(module, "is_transposed", False)


# Pairs ----------------------------------------------------------------------------------------------------------------


def test_order_of_rows_and_fusing() -> None:
    E, r, inputs, F = 3, 2, 5, 4
    gate, up = ((torch.randn(E, r, inputs), torch.randn(E, F, r)) for _ in range(2))
    a, b = flat(gate)
    assert torch.equal(a[1 * r + 1], gate[0][1, 1])  # A: expert 1, rank 1
    assert torch.equal(b[:, 1 * E + 2], gate[1][2, :, 1])  # B: rank 1, expert 2
    assert all(torch.equal(x, y) for x, y in zip(stacked(a, b, E), gate))
    whole = fuse(gate, up, F)
    want = torch.cat([gate[1] @ gate[0], up[1] @ up[0]], 1)
    assert_close("fused", whole[1] @ whole[0], want, 1e-6)
    assert_close("padded", torch.matmul(*reversed(pad(whole, 9))), want, 1e-6)
    back = unfuse(pad(whole, 9), r)
    assert back is not None
    assert all(torch.equal(x, y) for one, two in zip(back, (gate, up)) for x, y in zip(one, two))
    assert unfuse((whole[0], torch.randn(E, 2 * F, 2 * r)), r) is None
    alone = fuse(None, up, F)
    assert_close("up alone", alone[1] @ alone[0], torch.cat([torch.zeros(E, F, inputs), up[1] @ up[0]], 1), 1e-6)


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(folder: Path, match: str, model: nn.Module | None = None) -> None:
    model = base_of("mixtral") if model is None else model
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(UserError, match=match):
        load(model, folder, of="mixtral")
    assert [n for n, _ in model.named_parameters()] == names, "a refused load has changed the model"


def test_files_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    good, folder = made / "mixtral" / "adapter", tmp_path / "a"
    tensors, said = load_file(good / TENSORS), json.loads((good / CONFIG).read_text())
    key = "base_model.model.model.layers.1.mlp.experts.lora_A.weight"

    def write(change: dict[str, Tensor | None] | None = None, **fields: object) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        new = {n: t for n, t in (tensors | (change or {})).items() if t is not None}
        save_file({n: t.clone() for n, t in new.items()}, folder / TENSORS)
        (folder / CONFIG).write_text(json.dumps(said | fields))
        return folder

    load(base_of("mixtral"), write(), of="mixtral")
    refused(write({key: None}), "missing: base_model.*experts.lora_A.weight")
    refused(write({"base_model.model.model.layers.9.x.lora_A.weight": torch.zeros(1)}), "left over: .*layers.9")
    refused(write({key: torch.zeros(3, 3)}), r"have not rank 6 for 4 experts")
    refused(write({key: tensors[key] * float("nan")}), "not finite")
    refused(write(peft_type="IA3"), "only LORA can be read")
    refused(write(use_dora=True), "use_dora = True is not known here")
    refused(write(modules_to_save=["gate"]), "modules_to_save")
    refused(write(r=5), "have not rank 5")
    refused(write(), "no rule of this layout|does not fit|cannot hold", decoder("dense"))
    (write() / TENSORS).rename(folder / "adapter_model.bin")
    refused(folder, "a pickle, which is never loaded")
    (write() / TENSORS).write_bytes(b"nonsense")
    refused(folder, "no readable adapter")
    (write() / CONFIG).write_text("[]")
    refused(folder, "peft_type is 'list'")
    refused(tmp_path / "nowhere", "there is no adapter_model.safetensors")


def test_adapters_that_peft_cannot_hold_are_refused(tmp_path: Path) -> None:
    def model(config: object) -> nn.Module:
        made = base_of("mixtral")
        attach(made, config)  # type: ignore[arg-type]
        return made

    merged = model(ROUTED)
    merge(merged)
    for bad, match in (
        (merged, "are merged into the weights"),
        (model(ROUTED.replace(router="train")), "router.score.weight trains too"),
        (model(Mixture(targets=("attention",))), "no mixture of adapters"),
        (base_of("mixtral"), "no adapters"),
    ):
        with pytest.raises(UserError, match=match):
            save(bad, tmp_path / "x", to="mixtral")
        assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="unknown model_type 'mistrel'"):
        save(model(ROUTED), tmp_path / "x", to="mistrel")
