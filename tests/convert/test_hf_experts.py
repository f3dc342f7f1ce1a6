"""Moestro's experts inside transformers: every decorated class, against the forward it was written with."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moestro.convert.hf as hf
from convert.hf_cases import CLASSES, THROUGH_FP32, D, E, build, decorated_classes, oracle, problem
from moestro.ops.grouped import Spec, fused, loop, native
from moestro.testing.compare import assert_close

CASES = {"one unit": (1, False), "64 units": (64, False), "experts elsewhere": (33, True)}


def test_the_classes_are_all_there_are() -> None:
    assert decorated_classes() == set(CLASSES)
    if transformers.__version__.startswith("5.23."):
        assert len(set(CLASSES.values())) == 64


def run(call: Any, module: nn.Module, x: Tensor, expert: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output, and gradients of units, router weights and all parameters."""
    module.zero_grad()
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = call(x, expert, weight)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad, "weight": weight.grad}
    found |= {name: p.grad for name, p in module.named_parameters()}
    assert all(t is not None for t in found.values()), [n for n, t in found.items() if t is None]
    return {name: t.clone() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("name", CLASSES)
def test_equals_the_class(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        module = build(name, dtype)
        exact = dtype is torch.float64 and name not in THROUGH_FP32
        tolerance = 1e-10 if exact else 2e-5
        assert hf.explain(module).path in ("fused", "fused rows", "grouped"), hf.explain(module)
        for case, (T, foreign) in CASES.items():
            x, expert, weight, grad = problem(T, dtype, foreign=foreign)
            module._is_expert_parallel = foreign
            want = run(lambda *a: oracle(module, *a), module, x, expert, weight, grad)  # noqa: B023
            got = run(module, module, x, expert, weight, grad)
            for key, value in want.items():
                assert_close(f"{name}, {case}, {dtype}, {key}", got[key], value, tolerance)
            for key in want.keys() - {"y", "x", "weight"}:
                if got[key].ndim > 1:
                    assert not got[key][E - 1].any(), f"{key}: the starved expert has a gradient"
            if foreign:
                assert not got["weight"][expert >= E].any()
            for few in (1, T):
                with torch.no_grad():
                    y = module(x[:few], expert[:few], weight[:few])
                assert_close(f"{name}, {case}, {dtype}, {few} without a gradient", y, want["y"][:few], tolerance)


@pytest.mark.parametrize("backend", ["native", "grouped_mm", "loop"])
@pytest.mark.parametrize("short", [0, 1024])
@pytest.mark.parametrize("name", ["GptOssExperts", "AriaExperts", "DeepseekV4Experts"])
def test_all_ways_of_grouped_products(name: str, short: int, backend: str, monkeypatch: Any) -> None:
    """One call for all experts or one for each, indices made by torch or by numpy, gradients whole or by expert."""
    from moestro.convert.hf import grouped

    calls = []

    def chosen(spec: Spec) -> ModuleType:
        calls.append(spec)
        return by_name[backend]

    by_name = {module.NAME: module for module in (native, fused, loop)}
    monkeypatch.setattr(grouped, "MANY", 0)
    monkeypatch.setattr(grouped, "SHORT", short)
    monkeypatch.setattr(grouped, "choose", chosen)
    module = build(name)
    for large in (0, 2**22):
        monkeypatch.setattr(grouped, "LARGE", large)
        for foreign in (False, True):
            x, expert, weight, grad = problem(64, torch.float32, foreign=foreign)
            want = run(lambda *a: oracle(module, *a), module, x, expert, weight, grad)
            got = run(module, module, x, expert, weight, grad)
            for key, value in want.items():
                assert_close(f"{name}, foreign {foreign}, large {large}, {key}", got[key], value, 2e-5)
            with torch.no_grad():
                assert_close("without a gradient", module(x, expert, weight), want["y"], 2e-5)
    assert calls


def test_few_units_that_share_experts() -> None:
    """Unsorted choices: gradients of an expert that several units chose are added up, twice in one unit too."""
    for name in ("Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"):
        module = build(name, torch.float64)
        x, expert, weight, grad = problem(4, torch.float64)
        expert = torch.tensor([[3, 0, 1], [1, 3, 4], [3, 1, 0], [2, 2, 3]])
        want = run(lambda *a: oracle(module, *a), module, x, expert, weight, grad)  # noqa: B023
        got = run(module, module, x, expert, weight, grad)
        for key, value in want.items():
            assert_close(f"{name}, {key}", got[key], value, 1e-10 if name not in THROUGH_FP32 else 2e-5)


# What a module is taken for -----------------------------------------------------------------------------------------

PATHS = {
    "Qwen3MoeExperts": ("fused", "silu"),
    "Gemma4TextExperts": ("fused", "gelu_tanh"),
    "Lfm2MoeExperts": ("fused", "silu"),
    "NemotronHExperts": ("fused", "relu2"),
    "MuseSparkExperts": ("fused rows", "norm"),
    "AriaExperts": ("grouped", "transposed"),
    "GptOssExperts": ("grouped", "gate of its own"),
    "DeepseekV4Experts": ("grouped", "gate of its own"),
    "Inkling2Experts": ("grouped", "gate of its own"),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths(name: str) -> None:
    path, word = PATHS[name]
    found = hf.explain(build(name))
    assert found.path == path
    assert word in found.reason
    assert found.reason.endswith("under torch.compile, transformers' grouped_mm")


def other_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.sigmoid(gate) * up


def subclass(module: Any) -> None:
    module.__class__ = type("Mine", (type(module),), {"_apply_gate": other_gate})


def on_the_instance(module: Any) -> None:
    module._apply_gate = other_gate.__get__(module)


def patched_class(module: Any) -> None:
    module.__class__ = type("Mine", (type(module),), {})
    type(module)._apply_gate = other_gate


def other_activation(module: Any) -> None:
    module.act_fn = nn.Tanh()


def function(module: Any) -> None:
    del module.act_fn
    module.act_fn = lambda x: torch.nn.functional.silu(x) * 1.5


def derived_activation(module: Any) -> None:
    module.act_fn = type("Mine", (nn.SiLU,), {"forward": lambda self, x: x * 2})()


def patched_activation(module: Any) -> None:
    module.act_fn.forward = lambda x: x * 2


def approximate(module: Any) -> None:
    module.act_fn = transformers.activations.ACT2FN["gelu_python_tanh"]


def clipped(module: Any) -> None:
    module.act_fn = transformers.activations.ACT2FN["gelu_10"]


@pytest.mark.parametrize(
    "change",
    [
        *(subclass, on_the_instance, patched_class, other_activation, function, derived_activation),
        *(patched_activation, approximate, clipped),
    ],
)
def test_what_is_not_the_plain_thing_is_not_taken_for_it(change: Any) -> None:
    module = build("Qwen3MoeExperts", torch.float64)
    assert hf.explain(module).path == "fused"
    x, expert, weight, grad = problem(20, torch.float64)
    plain = module(x, expert, weight)
    change(module)
    assert hf.explain(module).path == "grouped"
    module.config._experts_implementation = "batched_mm"  # the only one of theirs that knows float64 and the gate
    want = run(module, module, x, expert, weight, grad)
    module.config._experts_implementation = "moestro"
    got = run(module, module, x, expert, weight, grad)
    assert not torch.allclose(want["y"], plain)
    for key, value in want.items():
        assert_close(key, got[key], value, 1e-10)
    with torch.no_grad():
        assert_close("few", module(x[:2], expert[:2], weight[:2]), want["y"][:2], 1e-10)


def test_hooks_on_the_activation_are_called() -> None:
    module, seen = build("Qwen3MoeExperts"), []
    handle = module.act_fn.register_forward_hook(lambda *a: seen.append(a[2].shape))
    x, expert, weight, _ = problem(9, torch.float32)
    module(x, expert, weight)
    assert seen
    assert "hooks" in hf.explain(module).reason
    handle.remove()
    assert hf.explain(module).path == "fused"


def strided(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.detach().transpose(1, 2).contiguous().transpose(1, 2))


def missing(module: Any) -> None:
    del module.down_proj


def fewer(module: Any) -> None:
    module.num_experts += 1


def narrow(module: Any) -> None:
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)


def alternating(module: Any) -> None:
    module.is_concatenated = False


def mixed(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.detach().double())


class Wrapped(torch.Tensor):
    pass


def of_another_type(module: Any) -> None:
    module.gate_up_proj = nn.Parameter(module.gate_up_proj.detach().as_subclass(Wrapped))


FALLBACKS = {
    strided: ("grouped", "contiguous"),
    missing: ("eager", "no down_proj"),
    fewer: ("eager", "num_experts"),
    narrow: ("eager", "float8"),
    alternating: ("eager", "alternate"),
    mixed: ("eager", "dtype"),
    of_another_type: ("eager", "Wrapped"),
}


@pytest.mark.parametrize("change", FALLBACKS)
def test_falls_back_and_says_why(change: Any) -> None:
    module = build("Qwen3MoeExperts")
    x, expert, weight, _ = problem(9, torch.float32)
    want = module(x, expert, weight)
    change(module)
    path, word = FALLBACKS[change]
    found = hf.explain(module)
    assert (found.path, word in found.reason) == (path, True), found
    if change in (strided, fewer, alternating, of_another_type):
        assert_close("y", module(x, expert, weight), want, 1e-5)
        with torch.no_grad():
            assert_close("few", module(x[:2], expert[:2], weight[:2]), want[:2], 1e-5)


# dtypes, autograd and what is around --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"])
def test_half_precision_and_autocast(name: str) -> None:
    module = build(name, torch.float64)
    x, expert, weight, grad = problem(24, torch.float64)
    want = run(lambda *a: oracle(module, *a), module, x, expert, weight, grad)
    half = build(name).bfloat16()
    y = half(x.bfloat16(), expert, weight.float())
    assert y.dtype == torch.bfloat16
    assert_close("bfloat16", y.float(), want["y"], 3e-2)
    with torch.no_grad():
        few = half(x[:2].bfloat16(), expert[:2], weight[:2].bfloat16())
    assert few.dtype == torch.bfloat16
    assert_close("bfloat16, few", few.float(), want["y"][:2], 3e-2)
    single = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(single, single, x.float(), expert, weight.float(), grad.float())
    assert got["y"].dtype == torch.float32
    for key, value in want.items():
        assert got[key].dtype == torch.float32
        assert_close(f"autocast, {key}", got[key], value, 5e-2)


def test_units_take_the_dtype_of_the_weights() -> None:
    """As in transformers' grouped products; the class's own forward refuses them."""
    module = build("Qwen3MoeExperts").bfloat16()
    x, expert, weight, _ = problem(24, torch.float32)
    got = module(x, expert, weight)
    assert got.dtype == torch.float32
    assert torch.equal(got.bfloat16(), module(x.bfloat16(), expert, weight))


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"])
def test_gradients_of_some_only(name: str) -> None:
    """A few choices whose only gradient is that of one parameter do not take the path without one."""
    module = build(name, torch.float64)
    x, expert, weight, grad = problem(2, torch.float64)
    want = run(lambda *a: oracle(module, *a), module, x, expert, weight, grad)
    for wanted in dict(module.named_parameters()):
        for key, parameter in module.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(key == wanted)
        module(x, expert, weight).backward(grad)
        assert_close(wanted, module.get_parameter(wanted).grad, want[wanted], 1e-6)
        assert all(p.grad is None for key, p in module.named_parameters() if key != wanted)


def test_no_units() -> None:
    for name in ("Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"):
        module = build(name)
        x, expert, weight, _ = problem(4, torch.float32)
        assert module(x[:0], expert[:0], weight[:0]).shape == (0, D)
        with torch.no_grad():
            assert not module(x, torch.full_like(expert, E), weight).any()


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "AriaExperts", "GptOssExperts"])
def test_weights_are_not_copied(name: str) -> None:
    """No operation returns as much memory as a stack of the weights has."""
    from torch.utils._python_dispatch import TorchDispatchMode

    module = build(name)
    least = min(p.numel() for p in module.parameters() if p.ndim == 3)

    theirs = {p.untyped_storage().data_ptr() for p in module.parameters()}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor) and t.numel() >= least:
                    assert t.untyped_storage().data_ptr() in theirs, func
            return out

    x, expert, weight, _ = problem(4, torch.float32)
    with Sizes():
        module(x, expert, weight)
        with torch.no_grad():
            module(x, expert, weight)


@pytest.mark.parametrize("name", ["Qwen3MoeExperts", "GptOssExperts"])
def test_compiles_in_one_graph(name: str) -> None:
    module = build(name)
    x, expert, weight, _ = problem(20, torch.float32)
    torch._dynamo.reset()
    made = torch.compile(module, backend="eager", fullgraph=True)
    assert_close("compiled", made(x, expert, weight), module(x, expert, weight), 1e-5)
