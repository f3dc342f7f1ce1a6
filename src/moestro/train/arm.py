"""One model in training: steps, evaluations, saves, and an exact state. A run has one arm, or two with a twin."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapt.attach import attach
from ..adapt.policy import apply_policy
from ..core.account import cost
from ..core.errors import UserError
from ..models.growth import still
from ..optim.clip import clip, grad_norm
from ..optim.hooks import AfterStep, RouterSteps
from ..tasks.batches import Feed
from ..tasks.predictions import readings
from ..trace.metrics import load_entropy, max_violation
from ..trace.record import Recorder
from ..trace.watch import Watch
from . import observe
from .adapters import seen
from .config import TrainRun
from .evaluate import Sampled, bits_per_byte, evaluate
from .knobs import knobs_at
from .observe import Observer, StepInfo
from .ranks import Ranks
from .save import Saved, Store
from .step import Gradient, Gradients
from .stop import Stop
from .sweep import check_knobs
from .weights import load_weights, tensors_of

__all__ = ["Arm"]


class Arm:
    """A model, its optimiser, and everything that must survive a restart.

    store: its run folder; None on ranks that write nothing. recorder: None for models without routed layers, and there.
    """

    def __init__(
        self,
        name: str,
        config: TrainRun,
        batches: Feed,
        ranks: Ranks,
        store: Store | None,
        observer: Observer,
        recorder: Recorder | None,
        shown: Any = None,
    ) -> None:
        self.name, self.config, self.ranks, self.store, self.observer = name, config, ranks, store, observer
        self.batches, self.recorder, self._shown = batches, recorder, shown
        self.model = config.model.build().to(ranks.device)
        if config.adapters is not None:
            attach(self.model, config.adapters)
        ranks.copy_first(list(tensors_of(self.model).values()))
        self._routers()
        check_knobs(config.knobs, self.model, config.steps)
        self.objective = seen(config.objective.build(), self.model)
        self.optimizer = config.optimizer.build(self.model)
        self.gradients = Gradients(self.model, self.objective, batches, config, ranks)
        hooks = [hook.build(self.model, config.steps) for hook in config.after]
        self.after: list[AfterStep] = [RouterSteps(self.model), *hooks]
        self.watch = Watch(config.starved_after)
        self.cost = cost(self.model, config.seq_len)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.best: dict[str, Any] | None = None
        self._rng = _fresh_rng(config.seed, ranks)
        self._checked = False

    def _routers(self) -> None:
        """Set what routers do, and say it, with the losses' coefficients."""
        adapted = self.config.adapters
        policy = self.config.routers if adapted is None else adapted.router
        report = apply_policy(self.model, policy)
        if self.ranks.first and adapted is not None:
            moving = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            self.observer.on_message(f"{self.name}: adapters, {moving:,} parameters train")
        if self.ranks.first and policy != "train":
            for line in report.lines:
                self.observer.on_message(f"{self.name}: {line}")
        if self.config.frozen:
            names = still(self.model, self.config.frozen)
            if self.ranks.first:
                self.observer.on_message(f"{self.name}: {len(names)} tensors stay as they are")

    def about(self) -> observe.Arm:
        """What observers are told."""
        assert self.store is not None
        return observe.Arm(
            name=self.name,
            folder=self.store.layout.root,
            steps=self.config.steps,
            start=self.step,
            params=self.cost.params,
            active=self.cost.active,
            flops_per_token=self.cost.flops,
        )

    def figures(self) -> dict[str, Any]:
        """What `compare.table` needs besides the metrics."""
        return {
            "name": self.name,
            "steps": self.step,
            "params": self.cost.params,
            "active_params": self.cost.active,
            "flops_per_token": self.cost.flops,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }

    def advance(self, border: int, stop: Stop) -> bool:
        """Train up to step `border`, evaluate and save. Returns False when asked to stop; the state is saved then."""
        if self.step >= border:
            return True
        _set_rng(self._rng)
        while self.step < border:
            stopping = self._train_step(stop)
            self._rng = _rng()
            every = self.config.save_every
            if stopping or (every and self.step % every == 0 and self.step < border):
                self.save(best=False)
            if stopping:
                return False
        self._evaluate()
        self._rng = _rng()
        return True

    # One step -----------------------------------------------------------------------------------------------------

    def _train_step(self, stop: Stop) -> bool:
        begin = time.perf_counter()
        found = self.gradients(self.step, stop)
        if not self._checked:
            self.gradients.reach.check()
            self._checked = True
        grads = [p.grad for p in self.gradients.parameters if p.grad is not None]
        norm = float(grad_norm(grads))
        self._refuse_nan(found, norm)
        clip(grads, norm, self.config.optimizer.clip)
        factor = self.config.optimizer.schedule.factor(self.step, self.config.steps)
        self.optimizer.step(factor)
        self.optimizer.clear()
        for hook in self.after:
            hook(self.step, found.counts)
        taken = time.perf_counter() - begin
        self.step += 1
        self.seconds += taken
        self.tokens += found.tokens
        if self.ranks.first:
            self._note(found, norm, factor, taken)
        return found.stop or (self.ranks.world == 1 and stop.requested)

    def _refuse_nan(self, found: Gradient, norm: float) -> None:
        if math.isfinite(found.loss) and math.isfinite(norm):
            return
        bad = [f"{k.name} of {k.path} {value}" for k, value in found.terms.items() if not math.isfinite(value)]
        parts = [f"{found.nats} nats per target", f"gradient norm {norm}", *bad[:4]]
        safe = self.store.where() if self.store else "see the first rank's message"
        raise UserError(
            f"{self.name}: the loss of step {self.step + 1} is not finite ({', '.join(parts)}); training stopped "
            f"before it changed the weights. Last good state: {safe}. Lower the learning rate, lengthen the "
            "warm-up, or clip harder, and start anew"
        )

    def _note(self, found: Gradient, norm: float, factor: float, taken: float) -> None:
        """Write and tell what the step was."""
        assert self.store is not None
        counts = {path: c.cpu().numpy() for path, c in found.counts.items()}
        entropies = [float(load_entropy(c)) for c in counts.values() if c.sum()]
        violations = [float(max_violation(c)) for c in counts.values() if c.sum()]
        row = {
            "kind": "step",
            "step": self.step,
            "seconds": self.seconds,
            "loss": found.loss,
            "nats": found.nats,
            **_measures(found.nats, found.targets, found.text_bytes, found.metrics),
            "grad_norm": norm,
            "lr": self.config.optimizer.lr * factor,
            "tokens": self.tokens,
            **({"text_bytes": found.text_bytes} if found.text_bytes else {"targets": found.targets}),
            "tokens_per_second": found.tokens / taken,
            "terms": _means({k.name: [v for j, v in found.terms.items() if j.name == k.name] for k in found.terms}),
            "load_entropy": math.fsum(entropies) / len(entropies) if entropies else None,
            "max_violation": max(violations, default=None),
        }
        if self.config.knobs:
            row["knobs"] = knobs_at(self.config.knobs, self.step - 1, self.config.steps)
        self.store.log(row)
        if self.recorder is not None:
            self.recorder.count(self.step, found.routing)
        for path, experts in _by_layer(self.watch.step(counts)).items():
            self.store.log({"kind": "starved", "step": self.step, "path": path, "experts": experts})
            self.observer.on_message(
                f"{self.name}: no token went to expert{'s' if len(experts) > 1 else ''} "
                f"{', '.join(map(str, experts))} of {path} for {self.watch.patience} steps"
            )
        left = self.seconds / self.step * (self.config.steps - self.step)
        self.observer.on_step(
            StepInfo(
                arm=self.name, step=self.step, steps=self.config.steps, row=row, counts=found.counts, seconds_left=left
            )
        )

    # Evaluation and saving ----------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        found = evaluate(self.model, self.objective, self.batches, self.config, self.ranks, self.step)
        better = math.isfinite(found.nats) and (self.best is None or found.nats < self.best["nats"])
        row = {
            "kind": "eval",
            "step": self.step,
            "seconds": self.seconds,
            "nats": found.nats,
            **_measures(found.nats, found.targets, found.text_bytes, found.metrics),
            "tokens": found.tokens,
            "best": better,
            "load_entropy": found.load_entropy,
            "routing_entropy": found.routing_entropy,
            "layers": found.layers,
        }
        if not math.isfinite(found.nats):
            safe = self.store.where() if self.store else "see the first rank's message"
            raise UserError(
                f"{self.name}: the validation loss after step {self.step} is not finite; training stopped. Last good "
                f"state: {safe}. Lower the learning rate and start anew"
            )
        if better:
            self.best = {n: row[n] for n in ("step", "nats", "bits_per_byte") if n in row}
        if self.ranks.first:
            assert self.store is not None
            self.store.log(row)
            self._sample(found.sampled)
        self.save(best=better)
        if self.ranks.first:
            self.observer.on_eval(self.name, row)

    def _sample(self, sampled: Sampled) -> None:
        """Keep the routing of the first held-out windows, where one is due."""
        if self.recorder is None or self._shown is None or self.step not in sample_steps(self.config):
            return
        trail, columns = self._shown(sampled)
        self.recorder.sample(self.step, "valid", trail, columns)

    def save(self, best: bool) -> None:
        """Save the state, exactly as it is now. All ranks take part."""
        rng = {f"rank{i}": state for i, state in enumerate(self.ranks.gather(self._rng["cpu"]))}
        if "cuda" in self._rng:
            rng |= {f"rank{i}.cuda": state for i, state in enumerate(self.ranks.gather(self._rng["cuda"]))}

        def work() -> None:
            assert self.store is not None
            tensors = {"model": tensors_of(self.model), "optimizer": self.optimizer.to_tensors(), "rng": rng}
            saved = Saved(step=self.step, tensors=tensors, progress=self._progress())
            self.store.save(saved, best, self.recorder.write if self.recorder is not None else None)

        self.ranks.together(work)
        if self.ranks.first:
            self.observer.on_save(self.name, self.step)

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "best": self.best,
            "watch": self.watch.to_dict(),
            "ranks": self.ranks.world,
            "threads": torch.get_num_threads(),
        }

    def restore(self, saved: Saved, place: Any) -> None:
        """Continue from a saved state."""
        load_weights(self.model, saved.tensors["model"], place / "model.safetensors")
        self.optimizer.load(saved.tensors["optimizer"])
        progress = saved.progress
        self.step, self.seconds, self.tokens = progress["step"], progress["seconds"], progress["tokens"]
        self.best = progress["best"]
        self.watch = Watch.from_dict(progress["watch"])
        here = {"ranks": self.ranks.world, "threads": torch.get_num_threads()}
        other = [f"{progress[n]} {n} before, {here[n]} now" for n in here if progress[n] != here[n]]
        if other:
            self.observer.on_message(
                f"{self.name}: {', '.join(other)}; the run goes on, but not to the last bit as if it had never stopped"
            )
        for kind, name in (("cpu", f"rank{self.ranks.rank}"), ("cuda", f"rank{self.ranks.rank}.cuda")):
            if name in saved.tensors["rng"] and kind in self._rng:
                self._rng[kind] = saved.tensors["rng"][name]


def sample_steps(config: TrainRun) -> set[int]:
    """The evaluations whose first windows go into the trace: `recording.every` steps apart or more, and the last."""
    chosen = [0]
    for border in config.borders():
        if border - chosen[-1] >= config.recording.every:
            chosen.append(border)
    return {*chosen[1:], config.steps}


def _measures(nats: float, targets: int, text_bytes: float, sums: Mapping[str, float]) -> dict[str, Any]:
    """What a row says besides nats: bits per byte of text; where targets stand for none, readings of the task."""
    if text_bytes:
        return {"bits_per_byte": bits_per_byte(nats, targets, text_bytes)}
    return {"metrics": readings(sums, targets)}


def _means(values: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: math.fsum(all_) / len(all_) for name, all_ in values.items()}


def _by_layer(silent: list[Any]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for s in silent:
        out.setdefault(s.path, []).append(s.expert)
    return out


def _fresh_rng(seed: int, ranks: Ranks) -> dict[str, Tensor]:
    torch.manual_seed(seed * 1_000_003 + ranks.rank)
    return _rng()


def _rng() -> dict[str, Tensor]:
    """torch's generators of this process. Nothing here draws from them, but a model may."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def _set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
