"""Experts inside transformers: its own classes, computed by Moestro and by transformers' implementations, in turns.

One module per class, with one set of weights; only the name of the implementation changes. Each must first give what
the class's own forward gives in float64, gradients included, or it is named and not timed.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError, did_you_mean
from .layer import MOST_CALLS, TOLERANCE, TURN
from .peers import Absent, why
from .problem import Inputs, Shape, distance, inputs
from .record import Regimes, begin, finish
from .timing import interleave

__all__ = ["CLASSES", "IMPLEMENTATIONS", "SHAPE", "TOKENS", "measure"]

SHAPE = (512, 256, 32, 4)  # D, F, E, K
TOKENS = (1, 64, 2048)
KINDS = ("forward", "forward + backward")
IMPLEMENTATIONS = {
    "moestro": "moestro",
    "transformers grouped_mm": "grouped_mm",
    "transformers batched_mm": "batched_mm",
    "transformers eager": "eager",
}
ORACLE = "eager"
COPIES = 2**30  # bytes of weights that batched_mm may copy


@dataclasses.dataclass(frozen=True)
class Class:
    """model: the folder in transformers. names: of the class, of its config and of the fields D, F and E."""

    model: str
    experts: str
    config: str
    dim: str
    width: str
    number: str


# One of each kind: a gate of silu, wide experts by their published name, a gate of its own on transposed stacks with
# biases, no gate, a norm behind each expert.
CLASSES: dict[str, Class] = {
    "Qwen3-MoE": Class(
        "qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig", "hidden_size", "moe_intermediate_size", "num_experts"
    ),
    "Mixtral": Class(
        "mixtral", "MixtralExperts", "MixtralConfig", "hidden_size", "intermediate_size", "num_local_experts"
    ),
    "GPT-OSS": Class(
        "gpt_oss", "GptOssExperts", "GptOssConfig", "hidden_size", "intermediate_size", "num_local_experts"
    ),
    "Nemotron-H": Class(
        "nemotron_h", "NemotronHExperts", "NemotronHConfig", "hidden_size", "moe_intermediate_size", "n_routed_experts"
    ),
    "Muse Spark": Class(
        "muse_spark",
        "MuseSparkExperts",
        "MuseSparkTextConfig",
        "moe_hidden_size",
        "moe_intermediate_size",
        "num_local_experts",
    ),
}


def measure(
    *,
    classes: Sequence[str] = tuple(CLASSES),
    shape: Sequence[int] = SHAPE,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 15,
    seed: int = 0,
    threads: int = 0,
    only: str = "",
    everybody: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure classes in fp32 on the CPU, forward, and forward and backward. Returns a JSON-able record, see `record`.

    only: a part of the names of the regimes that are measured. everybody: all of transformers' implementations, not
    grouped_mm alone.
    """
    if rounds < 1:
        raise UserError("bench experts: needs at least one round")
    for name in classes:
        if name not in CLASSES:
            raise UserError(f"bench experts: unknown class {name!r}{did_you_mean(name, CLASSES)}: {', '.join(CLASSES)}")
    if threads:
        torch.set_num_threads(threads)
    place = torch.device("cpu")
    record = begin("time of experts classes of transformers", place, seed, rounds)
    record["dtype"], record["tolerance"] = "float32", TOLERANCE[torch.float32]
    say(record.get("warning", ""))
    D, F, E, K = shape
    contenders = list(IMPLEMENTATIONS)[: None if everybody else 2]
    regimes: Regimes = {}
    for name in classes:
        module: Any = None
        for T in tokens:
            size = Shape(T, D, F, E, K)
            for kind in KINDS:
                regime = f"{kind}, {name}, T {T} D {D} F {F} E {E} K {K}, balanced"
                if only not in regime:
                    continue
                try:
                    module = _module(CLASSES[name], size, seed) if module is None else module
                    rows = _race(module, size, kind != "forward", contenders, rounds, seed, lambda s: say(s), regime)
                except Absent as error:
                    rows = {who: {"absent": str(error)} for who in contenders}
                about = {"kind": f"{kind}, {name}", "routing": "balanced", **dataclasses.asdict(size)}
                regimes[regime] = about | {"ours": contenders[0], "rows": rows}
        del module
        gc.collect()
    if not regimes:
        raise UserError(f"bench experts: no regime has {only!r} in its name")
    return finish(record, "experts", regimes, place)


def _module(cls: Class, shape: Shape, seed: int) -> Any:
    """An experts module of transformers with random weights. Raises `Absent` where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ..convert.hf import register_experts

            modeling = importlib.import_module(f"transformers.models.{cls.model}.modeling_{cls.model}")
            configuration = importlib.import_module(f"transformers.models.{cls.model}.configuration_{cls.model}")
            config = getattr(configuration, cls.config)()
            experts = getattr(modeling, cls.experts)
            register_experts()
    except (ImportError, AttributeError) as error:
        raise Absent(f"transformers does not have it ({error})") from None
    for field, value in ((cls.dim, shape.dim), (cls.width, shape.width), (cls.number, shape.experts)):
        setattr(config, field, value)
    module = experts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            inputs_ = shape.width if "down" in name else shape.dim
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(inputs_))
    return module


def _race(
    module: Any,
    shape: Shape,
    backward: bool,
    contenders: Sequence[str],
    rounds: int,
    seed: int,
    say: Callable[[str], None],
    regime: str,
) -> dict[str, Any]:
    given = inputs(shape, "balanced", seed + 1, torch.device("cpu"), torch.float32)
    answer = _answer(module, given, backward)
    rows: dict[str, Any] = {}
    turns: dict[str, Callable[[], None]] = {}
    for name in contenders:
        say(f"{regime}: checking {name}")
        try:
            if name == "transformers batched_mm":
                _affordable(module, shape)
            rows[name] = {"errors": _errors(module, IMPLEMENTATIONS[name], given, answer, backward)}
        except Exception as error:
            rows[name] = {"absent": why(error)}
            continue
        where, worst = max(rows[name]["errors"].items(), key=lambda item: item[1])
        if not worst <= TOLERANCE[torch.float32]:
            rows[name]["refused"] = f"its {where} is {worst:.1e} away from float64"
            continue
        call = _call(module, IMPLEMENTATIONS[name], given, backward)
        start = time.perf_counter()
        call()
        calls = math.ceil(min(MOST_CALLS, max(1.0, TURN / (time.perf_counter() - start))))
        rows[name]["calls_per_turn"] = calls

        def turn(call: Callable[[], None] = call, calls: int = calls) -> None:
            for _ in range(calls):
                call()

        turns[name] = turn
    if turns:
        seconds = interleave(turns, rounds, each=lambda done, name: say(f"{regime}: {done} turns, {name}"))
        for name, values in seconds.items():
            rows[name]["seconds"] = [v / rows[name]["calls_per_turn"] for v in values]
    module.zero_grad(set_to_none=True)
    return rows


def _affordable(module: Any, shape: Shape) -> None:
    stacks = sum(p.nbytes for p in module.parameters()) / shape.experts * shape.tokens * shape.top_k
    if stacks > COPIES:
        raise Absent(f"it copies the weights of every choice, here {stacks / 2**30:.1f} GiB")


def _run(module: Any, given: Inputs, backward: bool) -> dict[str, Tensor]:
    """The output, and where wanted all gradients."""
    module.zero_grad(set_to_none=True)
    x, weight = (t.detach().requires_grad_(backward) for t in (given.x, given.weight))
    with torch.set_grad_enabled(backward):
        y = module(x, given.expert, weight)
    if not backward:
        return {"y": y}
    y.backward(given.grad)
    found = {"y": y.detach(), "x": x.grad, "weight": weight.grad, **{n: p.grad for n, p in module.named_parameters()}}
    return {name: t for name, t in found.items() if t is not None}


def _answer(module: Any, given: Inputs, backward: bool) -> dict[str, Tensor]:
    """What the class's own forward gives in float64, on the very values that contenders get."""
    exact = copy.deepcopy(module).double()
    exact.config._experts_implementation = ORACLE
    g = Inputs(given.x.double(), given.expert, given.weight.double(), given.grad.double())
    return _run(exact, g, backward)


def _errors(
    module: Any, implementation: str, given: Inputs, answer: dict[str, Tensor], backward: bool
) -> dict[str, float]:
    module.config._experts_implementation = implementation
    got = _run(module, given, backward)
    return {name: distance(got[name], want) if name in got else math.inf for name, want in answer.items()}


def _call(module: Any, implementation: str, given: Inputs, backward: bool) -> Callable[[], None]:
    """One call as it is timed, in the implementation's turn. It clears gradients, as a training step does."""
    parameters = list(module.parameters())

    def forward() -> None:
        module.config._experts_implementation = implementation
        with torch.no_grad():
            module(given.x, given.expert, given.weight)

    def both() -> None:
        module.config._experts_implementation = implementation
        for p in parameters:
            p.grad = None
        x, weight = given.x.detach().requires_grad_(), given.weight.detach().requires_grad_()
        module(x, given.expert, weight).backward(given.grad)

    return both if backward else forward
