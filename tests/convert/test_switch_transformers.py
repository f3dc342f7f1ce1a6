"""Switch Transformers against transformers' own: logits, choices, drops, cached decoding, and the way back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moestro import convert
from moestro.convert.families import find
from moestro.core.errors import UserError
from moestro.core.plan import Plan
from moestro.core.signals import Signals
from moestro.models import encoder_decoders
from moestro.serve.translate import translate
from moestro.testing.compare import assert_close

FAMILY = find("switch_transformers")
EXAMPLES = FAMILY.examples()
B, N, S = 3, 13, 9


def original(name: str) -> Any:
    """transformers' model of an example, all of whose parameters matter."""
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**EXAMPLES[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=EXAMPLES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(transformers' model, ours as it was loaded, its folder)."""
    theirs = original(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, convert.load(folder), folder


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    source, target = (torch.randint(2, 41, (B, n), generator=generator) for n in (N, S))
    return source, target


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_logits_choices_and_drops_are_equal(case: tuple[Any, Any, Path], padded: bool) -> None:
    theirs, loaded, _ = case
    source, target = pair()
    valid = torch.ones(B, N, dtype=torch.bool)
    if padded:
        valid[1, 9:] = False
    chosen: list[Tensor] = []
    routers = [m for m in theirs.modules() if type(m).__name__ == "SwitchTransformersTop1Router"]
    hooks = [m.register_forward_hook(lambda m, a, out: chosen.append(out[0])) for m in routers]
    want = theirs(input_ids=source, decoder_input_ids=target, attention_mask=valid.long()).logits
    for hook in hooks:
        hook.remove()
    got, _, trail = loaded.model(source, target, None, None, Signals(valid=valid.view(-1)))
    assert_close("logits", got, want, 1e-5)
    assert len(trail) == len(chosen) == len(routers)
    for (key, record), mask in zip(trail.items(), chosen):
        plan = record.plan
        assert isinstance(plan, Plan)
        assert plan.kept is not None
        mine = torch.where(plan.kept, plan.expert, -1)[:, 0]
        other = torch.where(mask.any(-1), mask.argmax(-1), -1).flatten()
        seen = valid.view(-1) if key.path.startswith("encoder") else torch.ones(B * S, dtype=torch.bool)
        assert torch.equal(mine[seen], other[seen]), key


@torch.no_grad()
def test_generation_is_that_of_transformers(case: tuple[Any, Any, Path]) -> None:
    """Greedy, from caches. Rooms are per call in both, so that one token at a time is never dropped."""
    theirs, loaded, _ = case
    source, _ = pair()
    start = loaded.config.start
    want = theirs.generate(source, max_new_tokens=6, do_sample=False, decoder_start_token_id=start, eos_token_id=None)
    assert want[0, 0] == start
    got = translate(loaded.model, list(source), max_new_tokens=6)
    assert [row.tokens.tolist() for row in got] == want[:, 1:].tolist()


def test_export_gives_the_same_folder(case: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, loaded, folder = case
    out = convert.save(loaded.model, tmp_path / "out", to="switch_transformers", source=loaded)
    before, after = (load_file(f / "model.safetensors") for f in (folder, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    configs = [SwitchTransformersConfig.from_pretrained(f).to_dict() for f in (folder, out)]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]


def test_exports_from_configs_alone_load_without_the_library(tmp_path: Path) -> None:
    """Nothing but our config and tensors goes in; transformers loads it where moestro cannot be imported."""
    source, target = pair()
    want = {}
    for name in EXAMPLES:
        theirs = original(name)
        theirs.save_pretrained(tmp_path / "in" / name)
        loaded = convert.load(tmp_path / "in" / name)
        out = convert.save(loaded.model, tmp_path / name, to="switch_transformers")
        assert convert.read_config(out) == loaded.config
        with torch.no_grad():
            want[name] = theirs(input_ids=source, decoder_input_ids=target).logits
    torch.save((source, target), tmp_path / "pair.pt")
    program = (
        "import sys; sys.modules['moestro'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "at, *names = sys.argv[1:]\n"
        "source, target = torch.load(at + '/pair.pt', weights_only=True)\n"
        "logits = {}\n"
        "for name in names:\n"
        "    model, info = AutoModelForSeq2SeqLM.from_pretrained(at + '/' + name, output_loading_info=True)\n"
        "    assert not any(info.values()), info\n"
        "    with torch.no_grad():\n"
        "        logits[name] = model.eval()(input_ids=source, decoder_input_ids=target).logits\n"
        "torch.save(logits, at + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), *EXAMPLES], check=True, capture_output=True)
    for name, logits in torch.load(tmp_path / "logits.pt", weights_only=True).items():
        assert_close(f"logits of {name}", logits, want[name], 1e-6)


def test_tied_copies_must_be_copies(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    original("plain").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    convert.load(folder)
    tensors["encoder.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"not the copy of shared\.weight"):
        convert.load(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tie_word_embeddings", False), ("router_dtype", "bfloat16"), ("dense_act_fn", "gated-gelu"), ("d_model", "16")],
)
def test_fields_that_we_cannot_express_are_named(field: str, value: Any) -> None:
    data = {"model_type": "switch_transformers", **EXAMPLES["plain"], field: value}
    with pytest.raises(UserError, match=field):
        convert.read_config(data)


def test_models_that_the_family_cannot_express_are_refused(case: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model = encoder_decoders()["rotary"].build()
    with pytest.raises(UserError, match="cannot be written as switch_transformers"):
        convert.save(model, tmp_path / "out", to="switch_transformers")
    config = case[1].config
    layout = ("moe",) + ("dense",) * (config.encoder.num_layers - 1)
    uneven = config.replace(encoder=config.encoder.replace(layout=layout)).build()
    with pytest.raises(UserError, match="sparse blocks must come at equal distances"):
        convert.save(uneven, tmp_path / "out", to="switch_transformers")
    assert not (tmp_path / "out").exists()


def test_our_own_folder_holds_it(case: tuple[Any, Any, Path], tmp_path: Path) -> None:
    _, loaded, _ = case
    out = convert.save(loaded.model, tmp_path / "out", to="moestro")
    assert json.loads((out / "config.json").read_text())["model"]["type"] == "models.EncoderDecoder"
    again = convert.load(out)
    assert again.config == loaded.config
    state = loaded.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.model.state_dict().items())
