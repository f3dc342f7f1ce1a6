"""The composite router: score -> activation -> mix -> select -> limit -> commit -> weigh."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..core.carry import Carry, Replay
from ..core.errors import UserError
from ..core.plan import AnyPlan, Dense, ExpertChoice, Plan
from ..core.pytree import changed
from ..core.signals import Signals
from ..ops.choice import commit
from . import config as cfg
from .few import common, of_few
from .steps import LimitStep, MixStep, Scores, ScoreStep, SelectStep, Step, WeighStep
from .subset import Subset

__all__ = ["StepRouter"]


class StepRouter(nn.Module):
    """`(x [T, D], signals, carry) -> (Plan | ExpertChoice | Dense, carry)`, in five replaceable steps.

    Logits, selection and weights are computed in fp32, in fp64 where x is fp64, with autocast off. The whole decision
    passes `ops.choice.commit` once; weights are recomputed after it, so gradients flow under checkpointing. If
    `carry.mine` is a `Replay`, its choices are taken instead (and not committed: they are an input, not a decision).

    causal: whether the plan of unit t depends on units up to t only. needs: signals that must be given. top_k: the most
    experts a unit can get, as configured (expert choice: the mean).
    Call-time knobs: temperature here; top_k, top_p, capacity_factor in the steps.
    """

    def __init__(self, config: cfg.Router, dim: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.virtual = config.virtual
        self.subset = Subset(config.subset, num_experts, len(config.virtual))
        local, ids = self.subset.num_local, self.subset.num_local + len(config.virtual)
        self.score: ScoreStep = config.score.build(dim, ids)
        self.mix: MixStep | None = None if config.mix is None else config.mix.build(dim, ids)
        self.select: SelectStep = config.select.build(local, ids)
        self.limit: LimitStep | None = None if config.limit is None else config.limit.build(local, ids)
        self.weigh: WeighStep = config.weigh.build()
        _check_steps(config, self.select, self.weigh)
        steps = [m for m in self.modules() if isinstance(m, Step)]
        self.causal = all(s.causal for s in steps)
        self.needs = tuple(dict.fromkeys(n for s in steps for n in s.needs))
        self.top_k = self.select.top_k
        self.common = common(config)

    def forward(self, x: Tensor, signals: Signals | None = None, carry: Carry | None = None) -> tuple[AnyPlan, Carry]:
        signals = Signals() if signals is None else signals
        carry = Carry() if carry is None else carry
        signals.require(self.needs, by="the router")
        if x.ndim != 2:
            raise UserError(f"a router takes units [T, D], not a tensor of shape {list(x.shape)}; flatten it first")
        for name in ("valid", "unit_id", *self.needs):
            given = getattr(signals, name)
            if isinstance(given, Tensor) and given.ndim and given.shape[0] != x.shape[0]:
                raise UserError(f"signals.{name} has {given.shape[0]} entries for {x.shape[0]} units")
        replay = carry.mine
        if self.common is not None and replay is None and (plan := of_few(self, self.common, x, signals)) is not None:
            return plan, carry
        with _no_autocast(x.device.type):
            scores, carry = self._scores(x, signals, carry)
            if isinstance(replay, Replay):
                return self._replay(replay.plan, scores, signals), carry
            return self._decide(x, scores, signals), carry

    def step(self, counts: Tensor) -> None:
        """Move the state of those steps that have one. counts: [E] int64, demand of one optimiser step, all ranks."""
        for part in self.modules():
            if part is not self and hasattr(part, "step"):
                part.step(self.subset.narrow(counts))  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, activation={self.config.activation}, causal={self.causal}"

    # ------------------------------------------------------------------------------------------------------------

    def _scores(self, x: Tensor, signals: Signals, carry: Carry) -> tuple[Scores, Carry]:
        x = x if x.dtype == torch.float64 else x.float()
        scores, after = self.score(x, signals.at("score"), carry.at("score"))
        carry = carry.back("score", after)
        temperature = signals.knob("temperature", self.config.temperature)
        noisy = scores.extra.get("noisy_logits")
        scores = changed(
            scores,
            probs=self._activate(scores.logits, temperature),
            rank=None if noisy is None else self._activate(noisy.detach(), temperature),
            valid=signals.valid,
            temperature=temperature,
        )
        if self.mix is not None:
            before = scores.probs
            scores, after = self.mix(scores, x, signals.at("mix"), carry.at("mix"))
            carry = carry.back("mix", after)
            scores = changed(scores, extra={**scores.extra, "unmixed_probs": before})
        return scores, carry

    def _activate(self, logits: Tensor, temperature: float | Tensor) -> Tensor:
        logits = logits / temperature if isinstance(temperature, Tensor) or temperature != 1.0 else logits
        if self.config.activation == "softmax":
            return torch.softmax(logits, dim=-1)
        return torch.sigmoid(logits) if self.config.activation == "sigmoid" else logits

    def _decide(self, x: Tensor, scores: Scores, signals: Signals) -> AnyPlan:
        choice = self.select(scores, x, signals.at("select"))
        if choice.unit is not None:
            return self._by_expert(commit(choice.unit), scores, signals)
        if choice.expert is None:
            return self._dense(scores, signals)
        expert, kept, capacity, extra = choice.expert, None, None, {}
        if signals.valid is not None:
            expert = torch.where(signals.valid[:, None], expert, -1)
        if self.limit is None:
            expert = commit(expert)
        else:
            limited = self.limit(expert, None, scores, signals.at("limit"))
            capacity = limited.capacity
            # one decision, one commit: the low bit is `kept`, and -1 survives the arithmetic shift
            packed = [limited.expert * 2 + limited.kept]
            if limited.chosen is not None:
                packed.append(limited.chosen)
            first, *others = commit(torch.stack(packed)).unbind(0)
            expert, kept = first >> 1, (first & 1).bool()
            if others:
                extra = {"chosen": self.subset.to_bank(others[0])}
        everywhere = choice.complete and self.limit is None and signals.valid is None
        complete = everywhere and not self.virtual
        scores = changed(scores, everywhere=everywhere)
        return self._table(expert, kept, scores, signals, capacity=capacity, complete=complete, extra=extra)

    def _replay(self, plan: AnyPlan, scores: Scores, signals: Signals) -> AnyPlan:
        T, made = scores.logits.shape[0], type(plan).__name__
        if made != self.select.makes:
            raise UserError(f"cannot replay a {made}: this router makes {self.select.makes} plans")
        if isinstance(plan, Dense):
            return self._dense(scores, signals)
        found = plan.num_units if isinstance(plan, ExpertChoice) else plan.expert.shape[0]
        if found != T:
            raise UserError(f"cannot replay a plan of {found} units on {T} units; give the plan of this very batch")
        if plan.num_experts != self.num_experts:
            raise UserError(f"cannot replay a plan over {plan.num_experts} experts in a layer of {self.num_experts}")
        if isinstance(plan, ExpertChoice):
            _in_range("unit", plan.unit, T)
            return self._by_expert(self.subset.local_rows(plan.unit), scores, signals)
        if plan.virtual != self.virtual:
            raise UserError(f"cannot replay a plan with virtual ids {plan.virtual} where they are {self.virtual}")
        _in_range("expert", plan.expert, self.num_experts + len(self.virtual))
        expert = self.subset.to_local(plan.expert)
        if signals.valid is not None:
            expert = torch.where(signals.valid[:, None], expert, -1)
        extra = {n: t for n, t in plan.extra.items() if n == "chosen"}
        complete = plan.complete and signals.valid is None
        return self._table(expert, plan.kept, scores, signals, capacity=plan.capacity, complete=complete, extra=extra)

    def _table(
        self,
        expert: Tensor,
        kept: Tensor | None,
        scores: Scores,
        signals: Signals,
        *,
        capacity: int | None,
        complete: bool,
        extra: dict[str, Tensor],
    ) -> Plan:
        if self.weigh.draws:
            weight = self.weigh.drawn(scores, expert, signals.at("weigh"))
        else:
            weight = self.weigh(scores, expert)
        if not scores.everywhere:
            counted = expert >= 0 if kept is None else (expert >= 0) & kept
            weight = torch.where(counted, weight, 0.0)
        return Plan(
            expert=self.subset.to_bank(expert),
            weight=weight,
            kept=kept,
            num_experts=self.num_experts,
            virtual=self.virtual,
            capacity=capacity,
            complete=complete,
            **self._shared(scores, signals, extra),
        )

    def _by_expert(self, unit: Tensor, scores: Scores, signals: Signals) -> ExpertChoice:
        taken = unit >= 0
        if signals.valid is not None:
            taken = taken & signals.valid[unit.clamp_min(0)]
        weight = torch.where(taken, self.weigh.of_slots(scores, unit), 0.0)
        return ExpertChoice(
            unit=self.subset.spread(unit, dim=1, fill=-1),
            weight=self.subset.spread(weight, dim=1, fill=0.0),
            num_units=scores.logits.shape[0],
            **self._shared(scores, signals, {}),
        )

    def _dense(self, scores: Scores, signals: Signals) -> Dense:
        T, ids = scores.logits.shape
        every = torch.arange(ids, device=scores.logits.device).expand(T, ids)
        weight = self.weigh(scores, every)
        if signals.valid is not None:
            weight = torch.where(signals.valid[:, None], weight, 0.0)
        return Dense(weight=self.subset.spread(weight, dim=1, fill=0.0), **self._shared(scores, signals, {}))

    def _shared(self, scores: Scores, signals: Signals, extra: dict[str, Tensor]) -> dict[str, Any]:
        """What all three types of plan carry, over the ids of the whole bank."""
        probs, logits, named = self.subset.spread_scores(scores)
        return {
            "probs": probs,
            "logits": logits,
            "valid": signals.valid,
            "extra": {**named, **extra},
            "meta": signals.labels(),
        }


def _no_autocast(device_type: str) -> Any:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _in_range(name: str, ids: Tensor, end: int) -> None:
    if ids.numel() and not ids.is_meta and (int(ids.min()) < -1 or int(ids.max()) >= end):
        raise UserError(
            f"cannot replay: {name} ids must lie in -1..{end - 1}, found {int(ids.min())}..{int(ids.max())}"
        )


def _check_steps(config: cfg.Router, select: SelectStep, weigh: WeighStep) -> None:
    """Combinations that have no meaning."""
    if select.makes != "Plan":
        if config.virtual:
            raise UserError(f"Router: {type(config.select).__name__} knows no virtual ids; leave `virtual` empty")
        if config.limit is not None:
            raise UserError(f"Router: {type(config.select).__name__} needs no limit; leave `limit` empty")
    if select.makes == "ExpertChoice" and not weigh.slots:
        raise UserError(
            f"Router: weights of {type(config.weigh).__name__} are defined per unit, but here experts choose; use Raw()"
        )
