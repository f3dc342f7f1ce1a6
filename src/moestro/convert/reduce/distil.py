"""Routed layers become dense ones that were trained to do the same on given text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.errors import UserError
from ..change.conduct import Made, conduct, generator
from ..change.graft import Graft, graft
from ..change.mlp import DenseMLP
from ..change.samples import Samples, forward, tokens_of
from ..config import Distil
from ..receipt import Receipt
from .dense import mean_expert, with_shared
from .resize import observe, routed_paths

__all__ = ["distil"]


def distil(options: Distil, model: nn.Module, **given: Any) -> tuple[nn.Module, Receipt]:
    """From the mean of the experts: Adam on the squared error of each layer's output, relative to its size, or on
    KL(old || new) of the whole model's next-token distributions. Nothing else of the model moves."""
    paths = routed_paths(model, options.layers)

    def make(samples: Samples) -> Made:
        grafts: dict[str, Graft] = {}
        notes: list[str] = []
        for path, seen in observe(model, paths, samples).items():
            layer: Any = model.get_submodule(path)
            with torch.no_grad():
                dense, note, _ = with_shared(layer, mean_expert(layer), seen)
            notes += [f"{path}: {note}"] if note else []
            if options.match == "layers":
                x, y = torch.cat([s.x for s in seen]), torch.cat([s.y for s in seen])
                dense, before, after = _layer(options, path, dense.clone(), x, y)
                notes.append(
                    f"{path}: relative squared error {before:.4g} before {options.steps} steps, {after:.4g} after"
                )
            grafts[path] = Graft(dense=dense)
        made = graft(model, grafts)
        if options.match == "logits":
            notes.append(_whole(options, model, made, paths, samples))
        reason = f"trained for {options.steps} steps from the mean of the experts"
        names = [n for n in made.state_dict() if any(n.startswith(f"{p}.") for p in paths)]
        return Made(model=made, paths=paths, invented=dict.fromkeys(names, reason), notes=notes)

    return conduct(options, model, make, **given)


def _layer(options: Distil, path: str, mlp: DenseMLP, x: Tensor, y: Tensor) -> tuple[DenseMLP, float, float]:
    """(the trained layer, relative squared error before and after)."""
    dtype = mlp.up.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {n: t.to(wide).requires_grad_() for n, t in mlp.tensors().items()}
    student, x, y = mlp.changed(**leaves), x.to(wide), y.to(wide)
    size = y.square().mean().clamp_min(1e-30)
    with torch.no_grad():
        before = float((student(x) - y).square().mean() / size)
    batches = _indices(x.shape[0], options.batch, generator(options.seed, path))
    _train(options, list(leaves.values()), lambda: _error(student, x, y, next(batches)) / size)
    with torch.no_grad():
        after = float((student(x) - y).square().mean() / size)
    return mlp.changed(**{n: t.detach().to(dtype) for n, t in leaves.items()}), before, after


def _error(student: DenseMLP, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    return (student(x[ids]) - y[ids]).square().mean()  # data, not parameters: no gradient passes the index


def _whole(options: Distil, model: nn.Module, made: nn.Module, paths: Sequence[str], samples: Samples) -> str:
    """Train the new layers of the whole model; returns a note."""
    tokens = [t for b in samples.batches if (t := tokens_of(b)) is not None]
    if len(tokens) != len(samples.batches):
        raise UserError("Distil.match logits: needs text, tokens [B, S]")
    rows = [row for t in tokens for row in t.split(1)]
    per_step = max(1, options.batch // rows[0].shape[1])
    order = _indices(len(rows), per_step, generator(options.seed, "rows"))
    parameters = [p for path in paths for p in made.get_submodule(path).parameters()]
    found: list[float] = []

    def loss() -> Tensor:
        chosen = [rows[i] for i in next(order).tolist()]
        batch = torch.cat([r for r in chosen if r.shape == chosen[0].shape])
        with torch.no_grad():
            want = forward(model, batch)[0].flatten(0, -2).float().log_softmax(-1)
        got = forward(made, batch)[0].flatten(0, -2).float().log_softmax(-1)
        value = F.kl_div(got, want, reduction="batchmean", log_target=True)
        found.append(float(value.detach()))
        return value

    made.eval()
    _train(options, parameters, loss)
    made.train(model.training)
    return f"KL per token in nats: {found[0]:.4g} at the first of {options.steps} steps, {found[-1]:.4g} at the last"


def _train(options: Distil, parameters: Sequence[Tensor], loss: Any) -> None:
    optimiser = torch.optim.Adam(parameters, lr=options.lr)
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = options.lr * (1 - step / options.steps)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
    for parameter in parameters:
        parameter.grad = None


def _indices(count: int, batch: int, draws: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices without end, every index once per round."""
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while left.numel() < min(batch, count):
            left = torch.cat([left, torch.randperm(count, generator=draws)])
        taken, left = left.split([min(batch, count), left.numel() - min(batch, count)])
        yield taken
