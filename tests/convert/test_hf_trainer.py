"""Routers that follow counts move once per optimiser step, whoever trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moestro
from convert.hf_models import V, decoder, model, tokens, without_loss
from moestro.convert.hf import RouterStepsCallback, router_steps
from moestro.core.errors import UserError
from moestro.moe.config import MoELayer

STEPS = 3


class Recorded(RouterStepsCallback):
    """The callback, with every count it stepped on and every factor it set."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[dict[str, Tensor]] = []
        self.factors: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, **kwargs)
        assert self.watch is not None
        self.factors.append(self.watch.owners[0].module.loss_scale)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        assert self.watch is not None
        self.counts.append(dict(self.watch.counts))
        super().on_optimizer_step(*args, **kwargs)


def rows(n: int = 12, length: int = 6) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(n, length)]


def train(made: nn.Module, folder: Path, size: int, parts: int, **options: Any) -> Recorded:
    torch.manual_seed(0)
    said = {"eval_strategy": "steps", "eval_steps": 1, "prediction_loss_only": True} | options
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=parts,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **said,
    )
    watched = Recorded()
    Trainer(made, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[watched]).train()
    return watched


def biases(made: nn.Module) -> list[Tensor]:
    return [m.router.select.bias.clone() for m in made.modules() if hasattr(m, "router")]


def foreign(layer: MoELayer) -> LlamaForCausalLM:
    """Somebody else's model, whose FFNs are drop-in layers."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    made = LlamaForCausalLM(config)
    for block in made.model.layers:
        block.mlp = moestro.MoE(16, config=layer)  # type: ignore[assignment]
    return made


def build(kind: str) -> nn.Module:
    layer = without_loss()
    return model(moe=layer) if kind == "ours" else foreign(layer)


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_trainer_steps_once_per_optimiser_step_however_it_accumulates(kind: str, tmp_path: Path) -> None:
    whole, split = build(kind), build(kind)
    start = biases(whole)
    one, four = train(whole, tmp_path, 4, 1), train(split, tmp_path, 1, 4)
    assert len(one.counts) == len(four.counts) == STEPS
    for a, b in zip(one.counts, four.counts):
        assert a.keys() == b.keys()
        for path in a:
            assert a[path].dtype == torch.int64
            assert int(a[path].sum()) == 4 * 6 * 2  # nothing of evaluation, nothing twice
            assert torch.equal(a[path], b[path])
    moved = list(start)
    for counts in one.counts:
        moved = [m + 0.05 * (c.sum() - 4 * c).sign() for m, c in zip(moved, counts.values())]
    for got, other, want in zip(biases(whole), biases(split), moved):
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(other, want)
    for a, b in zip(whole.parameters(), split.parameters()):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)  # the order of sums, through three steps of AdamW
    assert one.factors == [1.0] * STEPS
    assert four.factors == [0.25] * STEPS
    assert one.watch is None


def test_recomputation_is_not_counted(tmp_path: Path) -> None:
    plain = train(build("ours"), tmp_path, 2, 2)
    again = train(build("ours"), tmp_path, 2, 2, gradient_checkpointing=True)
    for a, b in zip(plain.counts, again.counts):
        assert all(torch.equal(a[path], b[path]) for path in a)


def test_every_trainer_has_the_callback_and_a_second_one_changes_nothing(tmp_path: Path) -> None:
    made = build("ours")
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_strategy="no")
    trainer = Trainer(made, args, train_dataset=rows())
    found = [c for c in trainer.callback_handler.callbacks if isinstance(c, RouterStepsCallback)]
    assert len(found) == 1
    before = biases(made)
    trainer.train()
    for old, new in zip(before, biases(made)):
        assert float((new - old).abs().max()) == pytest.approx(0.05)


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path: Path) -> None:
    # 12 rows, one per batch, 5 per step: 5, 5, 2
    watched = train(build("foreign"), tmp_path, 1, 5)
    assert watched.factors == [1 / 5, 1 / 5, 1 / 2]


def test_losses_of_a_step_act_once_with_accumulation(tmp_path: Path) -> None:
    """Each batch is the same, so that the routing loss of a step is that of a batch: 4 parts equal one batch."""
    layer = without_loss(0.5)
    row = rows(1)[0]

    def gradient(parts: int, items: int | None) -> list[Tensor]:
        made = model(moe=layer).train()
        for _ in range(parts):
            batch = row["input_ids"][None]
            said = {} if items is None else {"num_items_in_batch": items}
            loss = made(batch, labels=batch, **said).loss
            (loss if items is not None else loss / parts).backward()
        return [p.grad.clone() for p in made.parameters() if p.grad is not None]

    want = gradient(1, None)
    for parts, items in ((4, 20), (4, None), (1, 5)):
        for one, two in zip(want, gradient(parts, items), strict=True):
            torch.testing.assert_close(one, two)


def test_a_loop_of_ones_own() -> None:
    made = build("foreign").train()
    ids = tokens(2, 6)
    with router_steps(made) as routers:
        for _ in range(2):
            before = biases(made)
            for part in ids.split(1):
                made(part, labels=part).loss.backward()
            made.eval()
            made(ids)
            made.train()
            with torch.no_grad():
                made(ids)
            counts = routers.step()
            assert [int(c.sum()) for c in counts.values()] == [24, 24]
            for old, new, count in zip(before, biases(made), counts.values()):
                torch.testing.assert_close(new, old + 0.05 * (count.sum() - 4 * count).sign())
    with pytest.raises(UserError, match=r"no moestro.MoE layer"), router_steps(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_training_without_counting_is_warned_about(kind: str) -> None:
    made, ids = build(kind).train(), tokens(1, 5)
    with pytest.warns(RuntimeWarning, match=r"router_steps\(model\)"):
        made(ids, labels=ids)


@pytest.mark.parametrize("target", [["q", "v"], "all-linear"])
def test_peft_trains_linear_layers_and_routers_still_move(target: Any, tmp_path: Path) -> None:
    made = model(moe=without_loss())
    ids = tokens(2, 6)
    want = made(ids).logits
    before = biases(made)
    adapted = get_peft_model(made, LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"))
    watched = train(adapted, tmp_path, 4, 1)
    assert len(watched.counts) == STEPS
    assert all(int(c.sum()) == 48 for counts in watched.counts for c in counts.values())
    assert all(not torch.equal(a, b) for a, b in zip(before, biases(made)))
    assert any(float(p.abs().sum()) > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    adapted.eval()
    adapted.save_pretrained(tmp_path / "adapter")
    assert adapted.generate(input_ids=ids, max_new_tokens=3).shape == (2, 9)
    assert not torch.equal(adapted(ids).logits, want)


def test_label_smoothing_keeps_routing_losses(tmp_path: Path) -> None:
    """Trainer takes the labels away and makes the loss itself: the routing loss rides, once per step."""

    def moved(coefficient: float) -> Tensor:
        made = model(moe=without_loss(coefficient))
        watched = train(made, tmp_path, 2, 2, label_smoothing_factor=0.1)
        assert watched.factors == [0.5] * STEPS
        return made.model.layers[0].ffn.router.score.weight.detach()

    assert not torch.equal(moved(0.0), moved(5.0))


def test_a_router_that_nobody_can_count_is_an_error() -> None:
    from moestro.moe.layer import MoELayer as Layer

    layer = decoder().moe
    assert layer is not None
    with pytest.raises(UserError, match="put moestro.MoE there"), router_steps(nn.Sequential(Layer(layer, 16))):
        pass
