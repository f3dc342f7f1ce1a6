"""Runs that train adapters on given weights: frozen bases, pooled balance losses, exact resuming, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.adapt import LoRA, Mixture, ShapedAllocation
from moestro.adapt.attach import adapters, attach, factors
from moestro.adapt.mixture import files
from moestro.adapt.mixture.balance import watch
from moestro.adapt.peft import read
from moestro.convert import save
from moestro.convert.loading import load as load_checkpoint
from moestro.core.errors import UserError
from moestro.models.config import Decoder
from moestro.nn.config import Attention, FeedForward
from moestro.routers.config import LossFree, Renormalised, Router, TopK
from moestro.tasks.objectives import NextToken
from moestro.train.adapters import seen
from moestro.train.config import TrainRun
from moestro.train.load import load
from moestro.train.run import run
from train.train_cases import Steps, rows, tiny

MODEL = Decoder(dim=16, num_layers=2, attention=Attention(num_heads=2), ffn=FeedForward(width=24), context=32, seed=5)
SHAPED = ShapedAllocation(total=8, rank=2)  # 2 experts, then 6 in the layer above
MIXTURE = Mixture(targets=("attention.q", "ffn"), allocation=SHAPED, balance=0.1, dropout=0.1)  # four maps per layer


@pytest.fixture
def config(tmp_path: Path) -> TrainRun:
    save(MODEL.build(), tmp_path / "llama", to="llama")
    return tiny(
        tmp_path, model=MODEL, start=str(tmp_path / "llama"), adapters=MIXTURE, steps=4, eval_every=2, batch_size=4
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder, state="last").model.state_dict())


def test_the_base_keeps_every_bit_and_the_adapters_are_written_as_published(config: TrainRun, tmp_path: Path) -> None:
    said = Steps()
    run(config, out=tmp_path / "run", progress=said)
    trained = load(tmp_path / "run").model
    base = load_checkpoint(tmp_path / "llama").model.state_dict()
    found = trained.state_dict()
    assert all(torch.equal(found[n], t) for n, t in base.items())
    own = factors(trained)
    assert own.keys() == found.keys() - base.keys()
    assert all(bool(p.any()) for n, p in own.items() if n.endswith(".b"))
    assert any("adapters, " in line for line in said.said)
    fresh = load_checkpoint(tmp_path / "llama").model
    files.attach(fresh, tmp_path / "run" / "adapter")
    given = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(fresh.eval()(given)[0], trained(given)[0])
    step, evaluated = rows(tmp_path / "run", "step")[-1], rows(tmp_path / "run", "eval")[-1]
    balance = step["terms"]["load_balancing_loss"]  # mean over the two layers
    assert step["loss"] == pytest.approx(step["nats"] + 0.1 * 2 * balance)
    assert balance >= 0.9
    layers = {path: sum(said["load"]) for path, said in evaluated["layers"].items()}
    assert len(layers) == 8
    assert set(layers.values()) == {2 * evaluated["tokens"]}  # two choices per token and map
    assert (tmp_path / "run" / "trace.safetensors").is_file()


@pytest.mark.parametrize("over", ["batch", "micro_batch"])
def test_balance_losses_are_pooled_over_micro_batches(config: TrainRun, tmp_path: Path, over: str) -> None:
    """Over the batch exactly; inside each micro-batch it is another loss."""
    adapted = MIXTURE.replace(dropout=0.0, balance=1.0)
    one = config.replace(adapters=adapted, steps=1, balance_over=over)
    run(one, out=tmp_path / "one")
    run(one.replace(micro_batch=2), out=tmp_path / "two")
    a, b = (rows(tmp_path / name, "step")[-1]["terms"]["load_balancing_loss"] for name in ("one", "two"))
    assert (abs(a - b) < 1e-4) == (over == "batch")
    if over == "batch":
        first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
        assert all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)


def test_a_stopped_run_goes_on_to_the_same_bits(config: TrainRun, tmp_path: Path) -> None:
    whole = config.replace(save_every=1)
    run(whole, out=tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(info: object) -> None:
        if info.step == 3:  # type: ignore[attr-defined]
            raise Stopped

    with pytest.raises(Stopped):
        run(whole, out=tmp_path / "parts", progress=Steps(stop))
    assert run(out=tmp_path / "parts", resume=True).complete
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[n], second[n]) for n in first)
    with pytest.raises(UserError, match="adapters.balance: 0.1 -> 0.2"):
        run(whole.replace(adapters=MIXTURE.replace(balance=0.2)), out=tmp_path / "parts", resume=True)


def test_a_second_stage_begins_with_the_adapters_of_the_first(config: TrainRun, tmp_path: Path) -> None:
    config = config.replace(steps=2)
    run(config, out=tmp_path / "first")
    still = config.replace(start=str(tmp_path / "first"), optimizer=config.optimizer.replace(lr=0.0), seed=9, steps=1)
    run(still, out=tmp_path / "second")
    first, second = load(tmp_path / "first").model.state_dict(), load(tmp_path / "second").model.state_dict()
    assert all(torch.equal(first[n], second[n]) for n in first)
    with pytest.raises(UserError, match="that the model does not have"):
        run(still.replace(adapters=None), out=tmp_path / "third")


def test_lora_is_written_as_peft_reads_it(config: TrainRun, tmp_path: Path) -> None:
    run(config.replace(adapters=LoRA(targets=("attention", "ffn"), rank=2, alpha=4.0)), out=tmp_path / "run")
    trained = load(tmp_path / "run").model
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    fresh = load_checkpoint(tmp_path / "llama").model
    read.load(fresh, tmp_path / "run" / "adapter", of="llama")
    assert len(adapters(fresh)) == len(adapters(trained))
    assert all(torch.equal(p, q) for p, q in zip(factors(fresh).values(), factors(trained).values()))


def test_routers_of_adapters_that_have_a_state_are_stepped(config: TrainRun, tmp_path: Path) -> None:
    choice = Router(select=LossFree(inner=TopK(k=2)), weigh=Renormalised())
    adapted = MIXTURE.replace(choice=choice, balance=0.0)
    run(config.replace(adapters=adapted, steps=3, eval_every=3), out=tmp_path / "run")
    model = load(tmp_path / "run", state="last").model
    biases = [b for n, b in model.named_buffers() if "layers.1." in n and n.endswith("bias")]
    assert len(biases) == 4
    assert all(bool(b.any()) for b in biases)


def test_an_objective_sees_the_adapters_of_a_model() -> None:
    model, objective = MODEL.build(), NextToken().build()
    assert seen(objective, model) is objective
    attach(model, MIXTURE)
    with watch(model) as routing:
        pass
    assert not routing.losses()
    assert seen(objective, model).config == NextToken()


def test_adapters_without_weights_or_with_a_twin_are_refused(config: TrainRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need weights to go on; name their folder with start"):
        run(config.replace(start=""), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="set twin=False"):
        config.replace(start="", twin=True)


def test_the_preset_takes_the_model_of_the_folder(tmp_path: Path) -> None:
    from moestro.cli.train import read as parsed

    save(MODEL.build(), tmp_path / "llama", to="llama", tokenizer="bytes")
    _, config, _ = parsed(["mola", "--start", str(tmp_path / "llama"), "--adapters.dropout", "0"])
    assert (config.model.num_layers, config.start) == (2, str(tmp_path / "llama"))
    assert isinstance(config.adapters, Mixture)
    assert config.adapters.dropout == 0
    assert config.adapters.allocation.of(1, 2)[0] > config.adapters.allocation.of(0, 2)[0]
