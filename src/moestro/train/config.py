"""Config of a training run. No torch at import: the command line reads its help texts from here."""

from __future__ import annotations

from typing import Literal

from ..adapt.config import Adapter
from ..core.config import Config, config
from ..core.errors import UserError
from ..models.config import Decoder, EncoderDecoder, Headed
from ..models.heads_config import ClassHead, EmbeddingHead, SpanHead
from ..optim.config import AdamW, AfterStep, Optimizer
from ..tasks.config import (
    Classify,
    Corpus,
    FindSpan,
    LabelledTexts,
    MatchPairs,
    Material,
    NextToken,
    Objective,
    SpanQuestions,
    StandardLibrary,
    TextPairs,
    Translate,
    Translations,
    TwoPass,
)
from ..trace.config import Recording
from .knobs import CosineRamp, ExponentialRamp, Knob, LinearRamp, Ramp, Staircase
from .models import context_of

__all__ = ["CosineRamp", "ExponentialRamp", "Knob", "LinearRamp", "Ramp", "Staircase", "TrainRun"]

# What is learnt from a kind of material: objective, model and, of models with a head, the head.
_TASKS: dict[type[Material], tuple[type[Objective], type[Config], type[Config] | None]] = {
    Corpus: (NextToken, Decoder, None),
    Translations: (Translate, EncoderDecoder, None),
    LabelledTexts: (Classify, Headed, ClassHead),
    SpanQuestions: (FindSpan, Headed, SpanHead),
    TextPairs: (MatchPairs, Headed, EmbeddingHead),
}


@config
class TrainRun(Config):
    """A model, the text or the examples it learns from, and how."""

    model: Decoder | EncoderDecoder | Headed = Decoder()
    """The model. Its vocabulary and its classes are those of the data, its seed is the run's."""
    start: str = ""
    """Folder of the weights to begin with: a run, or a checkpoint folder (transformers' or ours); empty = none, weights
    are drawn. The model is that of the folder, its vocabulary too, and there is no twin. Language models only."""
    adapters: Adapter | None = None
    """Adapters on the weights to begin with, which then stay as they are (adapt.LoRA, adapt.Mixture; their `router`
    says what the model's routers do, and their seed is the run's); None = the whole model trains."""
    twin: bool = True
    """Train the dense twin of equal active FLOPs per token beside it, for comparison."""
    data: Material = StandardLibrary()
    """The text, or the examples."""
    objective: Objective = NextToken()
    """What is learnt."""
    optimizer: Optimizer = AdamW()
    """How parameters move."""
    routers: Literal["train", "freeze", "bias_only"] = "train"
    """What the model's routers do: train, stay as they are (balancing biases too), or move their biases only."""
    frozen: tuple[str, ...] = ()
    """Parts of a model that stay as they are: embed, norm, head, experts, routers, and blocks as "3" or "0:4" (without
    4); of an encoder with a head also encoder, top and features."""
    after: tuple[AfterStep, ...] = ()
    """What happens after every optimiser step, besides the steps of routers."""
    knobs: tuple[Knob, ...] = ()
    """Schedules of values that routers take at each call (top_k, top_p, ...). Evaluations use the last value; outside
    of training the router's own holds. The twin has none."""
    steps: int = 600
    """Optimiser steps."""
    batch_size: int = 32
    """Sequences (examples) per optimiser step, over all ranks and micro-batches."""
    seq_len: int = 128
    """Tokens per sequence; the most of an example, whose rest is cut."""
    micro_batch: int = 0
    """Sequences per forward pass on one rank; 0 = the rank's whole share."""
    balance_over: Literal["batch", "micro_batch"] = "batch"
    """Where balance losses are taken: over the whole global batch, exactly (with micro-batches, all but one run forward
    once more, without gradient, to be counted); or inside each micro-batch of each rank, averaged: another, stricter
    loss, which depends on the number of ranks and micro-batches."""
    seed: int = 0
    """Seed of initial values, data order and random draws."""
    eval_every: int = 0
    """Steps between evaluations (each also saves); 0 = ten evenly spaced ones."""
    eval_windows: int = 256
    """Most held-out sequences per evaluation; always the same ones."""
    save_every: int = 0
    """Steps between further saves; 0 = none besides those at evaluations."""
    starved_after: int = 100
    """Name experts that got no token for so many steps."""
    recording: Recording = Recording()
    """What the routing trace keeps."""
    report: bool = True
    """Write report.html at the end."""
    tensorboard: bool = True
    """Write TensorBoard logs into the run folder, where tensorboard is installed."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto = a GPU where there is one. On GPUs, matrix products run in bf16 by autocast."""
    threads: int = 0
    """CPU threads; 0 = as torch chooses. Results repeat to the last bit only with the same number."""

    def __post_init__(self) -> None:
        self.at_least(1, "steps", "batch_size", "seq_len", "eval_windows", "starved_after")
        self.at_least(0, "micro_batch", "eval_every", "save_every", "threads")
        names = [knob.name for knob in self.knobs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"TrainRun.knobs: {name} has {names.count(name)} schedules; keep one")
        if self.start and self.twin:
            raise UserError(
                "TrainRun.start: weights are given for the model but not for its dense twin; set twin=False"
            )
        if self.adapters is not None and self.twin:
            raise UserError("TrainRun.adapters: they go on given weights, and the dense twin has none; set twin=False")
        context = context_of(self.model)
        if self.seq_len > context:
            where = {EncoderDecoder: "encoder.context and model.decoder.context", Headed: "encoder.context"}
            raise UserError(
                f"TrainRun.seq_len {self.seq_len} is longer than the model's context {context}; "
                f"shorten it or raise model.{where.get(type(self.model), 'context')}"
            )
        self._fits()

    def _fits(self) -> None:
        """Raise `UserError` where model, objective and data belong to different tasks."""
        data, model = self.data, self.model
        objective = self.objective.inner if isinstance(self.objective, TwoPass) else self.objective
        kind = next((k for k in _TASKS if isinstance(data, k)), None)
        if kind is None:
            raise UserError(f"TrainRun.data: {type(data).__name__} is only a base; choose a kind of text or examples")
        learns, builds, head = _TASKS[kind]
        of_tasks = tuple(entry[0] for entry in _TASKS.values())
        if isinstance(objective, of_tasks) and not isinstance(objective, learns):
            raise UserError(
                f"TrainRun.objective: {type(objective).__name__} cannot be learnt from {type(data).__name__}, which "
                f"are for {learns.__name__}"
            )
        found = f"{type(model).__name__} with {type(model.head).__name__}" if isinstance(model, Headed) else None
        if not isinstance(model, builds) or (head is not None and not isinstance(getattr(model, "head", None), head)):
            wanted = builds.__name__ if head is None else f"{builds.__name__} with {head.__name__}"
            raise UserError(
                f"TrainRun.model: data of {type(data).__name__} need {wanted}, found {found or type(model).__name__}"
            )
        if self.start and not isinstance(model, Decoder):
            raise UserError("TrainRun.start is for language models only; leave it out")
        if self.frozen and isinstance(model, EncoderDecoder):
            raise UserError("TrainRun.frozen is not for an encoder-decoder; leave it out")

    def borders(self) -> list[int]:
        """The steps after which the model is evaluated, the last one included."""
        if self.eval_every:
            found = list(range(self.eval_every, self.steps, self.eval_every))
        else:
            found = sorted({round(self.steps * i / 10) for i in range(1, 10)} - {0, self.steps})
        return [*found, self.steps]
