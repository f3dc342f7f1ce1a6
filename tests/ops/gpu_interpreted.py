"""The GPU kernels run by Triton's interpreter on CPU tensors; a program, because it must be said before Triton loads.

`python -m ops.gpu_interpreted GROUP ...` prints one JSON object: group -> case -> tensor -> error, relative to the
oracle.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from moestro.core.plan import AnyPlan, Plan
from moestro.ops.combine import table_weight
from moestro.ops.expert_mlp import ACTIVATIONS, choose, gated_mixture, naive
from moestro.ops.expert_mlp.gpu import run
from moestro.ops.expert_mlp.gpu.blocks import Block, Blocks
from moestro.ops.expert_mlp.problem import Grads, Problem, Spec, Wanted
from moestro.ops.rows import rows
from moestro.testing.compare import relative_error
from ops import expert_cases as oracle
from ops.ops_cases import bounds, every_plan, rand, randn, topk_plan

torch.set_num_threads(1)
_SMALL = Block(16, 16, 16, 4, 2)
SMALL = Blocks(_SMALL, _SMALL, _SMALL, _SMALL)
UNLIKE = Blocks(Block(32, 16, 16, 4, 2), Block(32, 32, 16, 4, 2), Block(32, 16, 32, 4, 2), Block(16, 32, 16, 4, 2))
NAMES = ("x", "weight", "first", "down", "first_bias", "down_bias")
ALL = Wanted()
Errors = dict[str, float]


def widen_products() -> None:
    """The interpreter keeps bf16 as integers and multiplies those; products here are of the values."""
    plain = interpreter.InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    interpreter.InterpreterBuilder.create_dot = dot


def mixture(
    plan: AnyPlan,
    D: int = 24,
    F: int = 20,
    *,
    gated: bool = True,
    activation: str = "silu",
    biases: tuple[bool, bool] = (False, False),
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    sizes: Blocks = SMALL,
) -> Errors:
    """Output and every gradient of a mixture against the oracle."""
    index, E = rows(plan), plan.num_experts
    p = Problem(
        x=randn(index.num_units, D, dtype=dtype),
        weight=table_weight(plan, index).to(weight_dtype),
        first=randn(E, (2 if gated else 1) * F, D, seed=1, dtype=dtype),
        down=randn(E, D, F, seed=2, dtype=dtype),
        first_bias=randn(E, F, seed=3, dtype=dtype) if biases[0] else None,
        down_bias=randn(E, D, seed=4, dtype=dtype) if biases[1] else None,
        offsets=index.offsets,
        unit=index.unit,
        slot=index.slot,
        inverse=index.inverse,
        activation=activation,
        gated=gated,
    )

    def want(x: Tensor, weight: Tensor, first: Tensor, down: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
        if gated:
            return oracle.gated_mixture(x, weight, index, first, down, activation)
        return oracle.mlp_mixture(x, weight, index, first, down, activation, b, c)

    return errors(p, want, sizes)


def sorted_rows(counts: tuple[int, ...], nobodys: int, sizes: Blocks = SMALL) -> Errors:
    """Rows that are sorted already, some after the last expert's."""
    D, F, E, offsets = 20, 12, len(counts), bounds(*counts)
    x = randn(int(offsets[-1]) + nobodys, D)
    p = Problem(
        x=x,
        first=randn(E, 2 * F, D, seed=1),
        down=randn(E, D, F, seed=2),
        offsets=offsets,
        activation="silu",
        gated=True,
    )

    def want(x: Tensor, _: Any, first: Tensor, down: Tensor, *__: Any) -> Tensor:
        y = naive.gated_mlp(x, first, down, offsets, "silu")
        return torch.cat([y, y.new_zeros(nobodys, D)])

    return errors(p, want, sizes)


def errors(p: Problem, want: Callable[..., Tensor], sizes: Blocks) -> Errors:
    given = [getattr(p, name) for name in NAMES]
    leaves = [None if t is None else t.double().requires_grad_() for t in given]
    y, hidden = run.forward(p, True, sizes)
    reference = want(*leaves)
    grad = randn(*y.shape, seed=9, dtype=y.dtype)
    reference.backward(grad.double())
    wanted = Wanted(*(t is not None for t in given))
    grads = run.backward(p, hidden, grad, wanted, sizes)
    assert hidden.shape == p.hidden_shape()
    assert y.dtype == p.x.dtype
    found = {"output": relative_error(y, reference)}
    for name, tensor, leaf, got in zip(NAMES, given, leaves, grads, strict=True):
        assert (got is None) == (tensor is None), name
        if leaf is not None:
            assert got.dtype == tensor.dtype, name
            assert got.shape == tensor.shape, name
            found[name] = relative_error(got, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return found


def plans() -> dict[str, AnyPlan]:
    """Those of all plans that have rows: the others never reach a GPU backend."""
    few = {name: plan for name, plan in every_plan().items() if rows(plan).unit.numel()}
    share = 1 / (torch.arange(6) + 1.0) ** 3
    expert = torch.topk(share.log() - (-rand(30, 6, seed=7).log()).log(), 2, dim=1).indices
    few["skewed"] = Plan(expert=expert, weight=rand(30, 2, seed=8), num_experts=6, complete=True)
    return few


def routings() -> dict[str, Errors]:
    return {
        name: mixture(plan, 16, 20 if i % 2 else 16, sizes=UNLIKE if i % 2 else SMALL)
        for i, (name, plan) in enumerate(plans().items())
    }


def kinds() -> dict[str, Errors]:
    plan = topk_plan(T=9, K=2, E=2)
    found = {f"gated {a}": mixture(plan, 16, 16, activation=a) for a in ACTIVATIONS}
    for a in ACTIVATIONS:
        found[f"plain {a}"] = mixture(plan, 16, 16, gated=False, activation=a, biases=(True, True))
    found["both biases"] = mixture(plan, gated=False, activation="silu", biases=(True, True))
    found["no bias"] = mixture(plan, gated=False, activation="gelu")
    found["first bias"] = mixture(plan, gated=False, activation="gelu", biases=(True, False))
    found["down bias"] = mixture(plan, 40, 24, gated=False, activation="gelu", biases=(False, True), sizes=UNLIKE)
    return found


def shapes() -> dict[str, Errors]:
    plan = topk_plan(T=9, K=2, E=3)
    sizes = {"odd": (7, 5), "one": (1, 1), "even": (32, 32), "wide": (19, 70)}
    found = {name: mixture(plan, D, F, sizes=UNLIKE) for name, (D, F) in sizes.items()}
    found["many rows"] = mixture(topk_plan(T=70, K=1, E=1), 16, 16)
    found["sorted"] = sorted_rows((3, 0, 18), 0)
    found["nobody's"] = sorted_rows((3, 0, 18), 20)
    found["only nobody's"] = sorted_rows((0, 1), 40)
    return found


def dtypes() -> dict[str, Errors]:
    plan = topk_plan(T=9, K=2, E=3)
    return {
        "bfloat16": mixture(plan, dtype=torch.bfloat16),
        "bfloat16 plain": mixture(
            plan, gated=False, activation="gelu_tanh", biases=(True, True), dtype=torch.bfloat16, sizes=UNLIKE
        ),
        "bfloat16 weights": mixture(plan, dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
        "float16": mixture(plan, dtype=torch.float16),
    }


def promises() -> dict[str, Errors]:
    """Each value counts entries that break a promise."""
    plan = topk_plan(T=20, K=2, E=4, used=3)
    index = rows(plan)
    D, F = 16, 12
    p = Problem(
        x=randn(20, D),
        weight=plan.weight,
        first=randn(4, 2 * F, D, seed=1),
        down=randn(4, D, F, seed=2),
        offsets=index.offsets,
        unit=index.unit,
        slot=index.slot,
        inverse=index.inverse,
        activation="silu",
        gated=True,
    )
    grad = randn(20, D, seed=9)

    def both(q: Problem, wanted: Wanted = ALL) -> tuple[Tensor, Grads]:
        y, hidden = run.forward(q, True, SMALL)
        return y, run.backward(q, hidden, grad, wanted, SMALL)

    y, all_grads = both(p)
    found: dict[str, Errors] = {}
    assert all_grads.first is not None
    assert all_grads.down is not None
    found["idle"] = {"entries": float(all_grads.first[3].count_nonzero() + all_grads.down[3].count_nonzero())}
    lone, hidden = run.forward(p, False, SMALL)
    found["not saved"] = {"y": float((lone != y).sum()), "hidden": float(hidden.numel())}
    found["one at a time"] = {}
    for name in ("x", "weight", "first", "down"):
        _, some = both(p, Wanted(**{n: n == name for n in ("x", "weight", "first", "down")}))
        others = [g for n, g in zip(NAMES, some) if n != name and g is not None]
        found["one at a time"][name] = float((getattr(some, name) != getattr(all_grads, name)).sum()) + len(others)
    strange = dataclasses.replace(
        p,
        x=p.x.t().contiguous().t(),
        weight=p.weight.t().contiguous().t() if p.weight is not None else None,
        first=p.first.transpose(0, 1).contiguous().transpose(0, 1),
        down=p.down.transpose(1, 2).contiguous().transpose(1, 2),
    )
    same, grads = both(strange)
    found["not contiguous"] = {"y": float((same != y).sum())}
    for name, a, b in zip(NAMES[:4], grads, all_grads):
        assert a is not None
        found["not contiguous"][name] = float((a != b).sum()) + (not a.is_contiguous())
    # One unit alone, and what an expert's rows that are not numbers do to the others.
    single = rows(Plan(expert=plan.expert[5:6], weight=plan.weight[5:6], num_experts=4, complete=True))
    alone = dataclasses.replace(
        p,
        x=p.x[5:6],
        weight=plan.weight[5:6],
        offsets=single.offsets,
        unit=single.unit,
        slot=single.slot,
        inverse=single.inverse,
    )
    found["alone"] = {"y": float((run.forward(alone, False, SMALL)[0] != y[5:6]).sum())}
    x = randn(7, D)
    x[4:] = float("nan")
    q = Problem(x=x, first=p.first[:2], down=p.down[:2], offsets=bounds(4, 2), activation="silu", gated=True)
    out, hidden = run.forward(q, True, SMALL)
    grads = run.backward(q, hidden, torch.ones_like(out), Wanted(weight=False), SMALL)
    found["not numbers"] = {"y": float(out[:4].isnan().sum() + out[6].count_nonzero())}
    for name, n in (("x", 4), ("first", 1), ("down", 1)):
        found["not numbers"][name] = float(getattr(grads, name)[:n].isnan().sum())
    assert bool(out[4:6].isnan().all())
    return found


class Interpreted:
    """The backend as the op sees it."""

    NAME = "interpreted"

    @staticmethod
    def supported(spec: Spec) -> tuple[bool, str]:
        return min(spec.rows, spec.dim, spec.width, spec.experts) > 0, ""

    @staticmethod
    def forward(p: Problem, save: bool) -> tuple[Tensor, Tensor]:
        return run.forward(p, save, SMALL)

    @staticmethod
    def backward(p: Problem, hidden: Tensor, grad: Tensor, wanted: Wanted) -> Grads:
        return run.backward(p, hidden, grad, wanted, SMALL)


def operation() -> dict[str, Errors]:
    """Through the registered op, as it is and compiled as one graph."""
    choose.BACKENDS = (Interpreted,)  # type: ignore[assignment]
    plan = topk_plan(T=9, K=2, E=3)
    index = rows(plan)
    given = [randn(9, 16), plan.weight, randn(3, 24, 16, seed=1), randn(3, 16, 12, seed=2)]

    def layer(x: Tensor, weight: Tensor, first: Tensor, down: Tensor) -> Tensor:
        return gated_mixture(x * 2, weight, index, first, down, "silu") + 1

    theirs = [t.double().requires_grad_() for t in given]
    want = oracle.gated_mixture(theirs[0] * 2, theirs[1], index, theirs[2], theirs[3], "silu") + 1
    grad = randn(9, 16, seed=9)
    want.backward(grad.double())
    found: dict[str, Errors] = {}
    for name, function in (
        ("eager", layer),
        ("compiled", torch.compile(layer, fullgraph=True, backend="aot_eager")),
        ("expanded gradient", layer),
        ("no gradient", layer),
    ):
        mine = [t.clone().requires_grad_(name != "no gradient") for t in given]
        y = function(*mine)
        found[name] = {"output": relative_error(y, want)}
        if name == "expanded gradient":
            y.sum().backward()
            y = layer(*(again := [t.clone().requires_grad_() for t in given]))
            y.backward(torch.ones_like(y))
            differ = [float((a.grad != b.grad).sum()) for a, b in zip(mine, again)]  # type: ignore[operator]
            found[name].update(zip(NAMES, differ))
        elif name != "no gradient":
            y.backward(grad)
            found[name].update({n: relative_error(a.grad, b.grad) for n, a, b in zip(NAMES, mine, theirs)})  # type: ignore[arg-type]
    return found


if __name__ == "__main__":
    groups = {f.__name__: f for f in (routings, kinds, shapes, dtypes, promises, operation)}
    widen_products()
    print(json.dumps({name: groups[name]() for name in sys.argv[1:]}))
