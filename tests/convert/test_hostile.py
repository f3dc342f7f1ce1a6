"""Checkpoints that are damaged, contradict themselves or mean harm: one clear line each, and nothing left behind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moestro import convert
from moestro.convert.families import find
from moestro.core import files
from moestro.core.errors import UserError
from moestro.experts import Gated
from moestro.models import Decoder
from moestro.moe import MoELayer
from moestro.nn import Attention, Rotary
from moestro.routers import Cosine, Raw, Router, TopK

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
MARK = "ran.txt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint of Mixtral in several shards."""
    made = tmp_path / "inside" / "checkpoint"
    fields = find("mixtral").examples()["plain"]
    model = convert.read_config({**fields, "model_type": "mixtral"}).build()
    convert.save(model, made, to="mixtral", shard_bytes=20_000)
    assert len(list(made.glob("*.safetensors"))) > 2
    return made


def merged(folder: Path) -> dict[str, Tensor]:
    """Turn the shards into one file; its tensors."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {n: t.clone() for n, t in load_file(shard).items()}
        shard.unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / SINGLE)
    return tensors


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = merged(folder)
        change(found)
        save_file(found, folder / SINGLE)

    return apply


def index(change: Callable[[dict[str, str], Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        said = json.loads((folder / INDEX).read_text())
        change(said["weight_map"], folder)
        (folder / INDEX).write_text(json.dumps(said))

    return apply


def elsewhere(folder: Path, name: str = "stolen.safetensors") -> Path:
    """A sound file outside of the folder, which holds the router."""
    path = folder.parent / name
    save_file({ROUTER: torch.zeros(4, 24)}, path)
    return path


def linked(weights: dict[str, str], folder: Path) -> None:
    (folder / "link.safetensors").symlink_to(elsewhere(folder))
    weights[ROUTER] = "link.safetensors"


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path(MARK), "ran"))


def pickled(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        merged(folder)
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(pickle.dumps({"a": Bomb()}))

    return apply


def pickle_named_safetensors(folder: Path) -> None:
    merged(folder)
    (folder / SINGLE).write_bytes(pickle.dumps({"a": Bomb()}))


def indexed_pickle(weights: dict[str, str], folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Bomb()}))
    weights[ROUTER] = "pytorch_model.bin"


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        merged(folder)
        path = folder / SINGLE
        path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])

    return apply


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        merged(folder)
        path = folder / SINGLE
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        said = json.loads(content[8 : 8 + length])
        change(said)
        text = json.dumps(said).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def overlapping(said: dict[str, Any]) -> None:
    said[ROUTER]["data_offsets"] = [0, 4 * 24 * 4]


def twice(folder: Path) -> None:
    """The same name twice in a header: which of the two is meant?"""
    tensors = merged(folder)
    path = folder / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    end = sum(t.nbytes for t in tensors.values())
    more = json.dumps({ROUTER: {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}})
    text = content[8 : 8 + length].rstrip()[:-1] + b"," + more[1:].encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (tensors(lambda t: t.pop(EXPERT)), rf"missing {EXPERT}\."),
    "extra": (tensors(lambda t: t.update({"model.extra": torch.zeros(1)})), r"left over model.extra\."),
    "misshaped": (tensors(lambda t: t.update({ROUTER: torch.zeros(5, 24)})), rf"another shape {ROUTER} \(\[5, 24\]"),
    "nan": (tensors(lambda t: t[EXPERT][2, 3:4].fill_(float("nan"))), r"NaN or infinite .*experts"),
    "infinite": (tensors(lambda t: t[ROUTER][1, :1].fill_(float("inf"))), r"NaN or infinite .*(router|gate)"),
    "mixed dtypes": (tensors(lambda t: t.update({EXPERT: t[EXPERT].half()})), "of several dtypes"),
    "unknown model_type": (lambda f: config(f, model_type="mixtrol"), "did you mean 'mixtral'"),
    "model_type of another": (
        lambda f: config(f, model_type="olmoe"),
        "architectures: 'MixtralForCausalLM' is no O",
    ),
    "wrong model_type": (
        lambda f: config(f, model_type="llama", architectures=["LlamaForCausalLM"]),
        r"missing model.layers.0.mlp.down_proj.weight.*; left over .*experts",
    ),
    "no model_type": (lambda f: config(f, model_type=None), "unknown model_type None"),
    "more layers": (lambda f: config(f, num_hidden_layers=3), r"missing model.layers.2.* and \d+ more"),
    "fewer experts": (lambda f: config(f, num_local_experts=3), "left over .*experts.3"),
    "another width": (lambda f: config(f, hidden_size=32), "of another shape"),
    "another type of value": (lambda f: config(f, num_hidden_layers="2"), "num_hidden_layers: expected int, found '2'"),
    "absurd depth": (lambda f: config(f, num_hidden_layers=10**9), "num_hidden_layers: 1000000000 does not lie"),
    "absurd width": (lambda f: config(f, hidden_size=4 * 10**16), "no model can be built|another shape"),
    "absurd experts": (lambda f: config(f, num_local_experts=10**9), "1000000000 experts are more than"),
    "absurd number": (lambda f: config(f, vocab_size=10**30), "no model can be built"),
    "odd heads": (lambda f: config(f, num_attention_heads=5), "no multiple"),
    "negative size": (lambda f: config(f, vocab_size=-1), "vocab_size must be at least 1"),
    "unknown activation": (lambda f: config(f, hidden_act="mish"), "hidden_act: 'mish' cannot be expressed"),
    "unknown rope": (lambda f: config(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type: 'dyn"),
    "quantised": (lambda f: config(f, quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "untied where tied": (lambda f: config(f, tie_word_embeddings=True), "not the copy of model.embed_tokens.weight"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "holds no JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "index parent": (index(lambda w, f: w.update({ROUTER: f"../{elsewhere(f).name}"})), "outside its folder"),
    "index absolute": (index(lambda w, f: w.update({ROUTER: str(elsewhere(f))})), "outside its folder"),
    "index below": (index(lambda w, f: w.update({ROUTER: "sub/x.safetensors"})), "outside its folder"),
    "index link out": (index(linked), "outside the checkpoint's folder"),
    "index to pickle": (index(indexed_pickle), "pytorch_model.bin', which is no safetensors"),
    "index to nothing": (index(lambda w, f: w.update({ROUTER: "model-9.safetensors"})), "which is not in the folder"),
    "index wrong file": (index(lambda w, f: w.update({ROUTER: min(w.values())})), "says that .* holds"),
    "index lacks one": (index(lambda w, f: w.pop(ROUTER)), "of which .* knows nothing"),
    "index empty": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
    "pickle bin": (pickled("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "pickle pt": (pickled("consolidated.00.pth"), "consolidated.00.pth is a pickle"),
    "pickle renamed": (pickle_named_safetensors, "cut short, or no safetensors"),
    "cut in data": (cut(lambda n: n - 5), "bytes of data where its header lists"),
    "cut in header": (cut(lambda n: 100), "cut short"),
    "cut in length": (cut(lambda n: 5), "cut short"),
    "empty": (cut(lambda n: 0), "cut short"),
    "header sizes": (header(lambda h: h[ROUTER].update(shape=[4, 25])), "gives .* bytes where"),
    "header negative": (header(lambda h: h[ROUTER].update(shape=[-4, -24])), "nothing sensible"),
    "header huge": (header(lambda h: h[ROUTER].update(shape=[2**62, 2**62])), "gives .* bytes where"),
    "header offsets": (header(lambda h: h[ROUTER].update(data_offsets=[10**12, 10**12 + 384])), "does not begin"),
    "header overlap": (header(overlapping), "does not begin where"),
    "header dtype": (header(lambda h: h[ROUTER].update(dtype="F7")), "dtype 'F7'"),
    "header twice": (twice, "header is no JSON|nothing sensible"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(folder.parent)
    damage, message = CASES[name]
    damage(folder)
    there = sorted(folder.parent.iterdir())
    for act in (
        lambda: convert.load(folder),
        lambda: convert.stream(folder, folder.parent / "out", to="mixtral", shard_bytes=30_000),
    ):
        with pytest.raises(UserError, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        assert sorted(folder.parent.iterdir()) == there  # no output, no part of one, nothing that ran
    assert not (folder.parent / MARK).exists()


def test_code_in_a_checkpoint_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"}, trust_remote_code=True)
    (folder / "evil.py").write_text(f"open({MARK!r}, 'w')")
    loaded = convert.load(folder)
    out = convert.save(loaded.model, folder.parent / "out", to="mixtral", source=loaded)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not (out / "evil.py").exists()
    assert not (folder.parent / MARK).exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_no_file_from_elsewhere_is_copied(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / name).symlink_to(folder.parent / "secret")
    with pytest.raises(UserError, match=f"{name}: leads to .*secret, outside"):
        convert.stream(folder, folder.parent / "out", to="mixtral")
    assert not (folder.parent / "out").exists()


def test_a_link_into_the_hub_cache_is_followed(folder: Path) -> None:
    home = folder.parent / "models--a--b"
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    assert convert.load(snapshot).config.num_layers == 2


def test_a_copy_of_the_embedding_beside_a_tied_head_is_ignored(folder: Path) -> None:
    found = merged(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, folder / SINGLE)
    config(folder, tie_word_embeddings=True)
    assert convert.load(folder).config.tied


MOE = MoELayer(num_experts=4, router=Router(select=TopK(k=2)), experts=Gated(width=12))
OURS = Decoder(vocab_size=41, dim=24, num_layers=2, attention=Attention(num_heads=4), moe=MOE)
REFUSED = {
    "weights of the chosen": (OURS.replace(moe=MOE.replace(router=MOE.router.replace(weigh=Raw()))), "weigh"),
    "another score": (OURS.replace(moe=MOE.replace(router=MOE.router.replace(score=Cosine()))), "score"),
    "a temperature": (OURS.replace(moe=MOE.replace(router=MOE.router.replace(temperature=2.0))), "temperature"),
    "a shared expert": (OURS.replace(moe=MOE.replace(shared=Gated(width=8))), "shared"),
    "experts per layer": (OURS.replace(num_experts=(4, 6)), "num_experts"),
    "widths per expert": (OURS.replace(moe=MOE.replace(experts=Gated(width=(4, 8, 4, 8)))), "width"),
    "a dense layer": (OURS.replace(layout=("moe", "dense")), r"blocks\[1\].ffn"),
    "a bias": (OURS.replace(attention=Attention(num_heads=4, bias="qkv")), "bias"),
    "norms in attention": (OURS.replace(attention=Attention(num_heads=4, qk_norm="head")), "qk_norm"),
    "a scale": (OURS.replace(attention=Attention(num_heads=4, scale=0.5)), "scale"),
    "other pairs": (OURS.replace(attention=Attention(num_heads=4, positions=Rotary(style="interleaved"))), "style"),
    "no positions": (OURS.replace(attention=Attention(num_heads=4, positions=None)), "positions"),
    "scaled embeddings": (OURS.replace(embedding_scale=2.0), "embedding_scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_export_refuses_what_the_family_cannot_express(tmp_path: Path, name: str) -> None:
    model, field = REFUSED[name]
    with pytest.raises(UserError, match=rf"cannot be written as mixtral.*{field}"):
        convert.save(model.build(), tmp_path / "out", to="mixtral")
    assert list(tmp_path.iterdir()) == []
    convert.save(model.build(), tmp_path / "own", to="moestro")  # which holds any model
    assert convert.load(tmp_path / "own").config == model


def test_between_families(tmp_path: Path, folder: Path) -> None:
    dense = OURS.replace(moe=None, attention=Attention(num_heads=4, num_kv_heads=2)).build()
    convert.save(dense, tmp_path / "llama", to="llama")
    convert.stream(tmp_path / "llama", tmp_path / "mistral", to="mistral", dtype=torch.bfloat16)
    there, here = load_file(tmp_path / "llama" / SINGLE), load_file(tmp_path / "mistral" / SINGLE)
    assert there.keys() == here.keys()
    for name, tensor in there.items():
        assert torch.equal(here[name], tensor.bfloat16())
    assert json.loads((tmp_path / "mistral" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(UserError, match="cannot be written as llama: ffn: MoELayer has no place in this family"):
        convert.stream(folder, tmp_path / "dense", to="llama")
    with pytest.raises(UserError, match=r"cannot be written as qwen3_moe, which does not express its .*qk_norm"):
        convert.stream(folder, tmp_path / "qwen", to="qwen3_moe")
    with pytest.raises(UserError, match="unknown model_type 'mixtrall' .did you mean 'mixtral'"):
        convert.stream(folder, tmp_path / "typo", to="mixtrall")


def test_what_an_export_writes_it_writes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OURS.build()
    with torch.no_grad():
        model.layers[1].ffn.experts.down[3, 2, 1] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite model.layers.1.block_sparse_moe.experts.3.w2.weight"):
        convert.save(model, tmp_path / "out", to="mixtral")
    assert list(tmp_path.iterdir()) == []

    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "open_new", full)
    with pytest.raises(OSError, match="No space"):
        convert.save(OURS.build(), tmp_path / "out", to="mixtral")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert.save(OURS.build(), tmp_path / "out", to="mixtral")  # an empty folder may be filled
    before = (tmp_path / "out" / SINGLE).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        convert.save(OURS.replace(seed=1).build(), tmp_path / "out", to="mixtral")
    assert (tmp_path / "out" / SINGLE).read_bytes() == before


def test_a_model_that_is_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    model = OURS.build()
    model.layers[0].mixer.q.register_parameter("bias", torch.nn.Parameter(torch.zeros(24)))
    with pytest.raises(UserError, match=r"layers.0.mixer.q.bias is in the model, which its config does not say"):
        convert.save(model, tmp_path / "out", to="moestro")


def test_a_model_of_somebody_else_is_refused(tmp_path: Path) -> None:
    for config, message in ((None, "has no config"), (object(), "no model of this library; .* save_pretrained")):
        model = torch.nn.Linear(2, 2)
        model.config = config  # type: ignore[assignment]
        with pytest.raises(UserError, match=message):
            convert.save(model, tmp_path / "out", to="mixtral")
    assert list(tmp_path.iterdir()) == []
