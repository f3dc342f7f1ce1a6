"""The vector functions of the C kernels against float64."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moestro.ops.expert_mlp import ACTIVATIONS
from moestro.ops.expert_mlp.naive import activate
from ops.kernel_cases import levels, own_source
from ops.native_cases import compiles

SMALLEST = 1.2e-38  # fp32 below it has fewer digits
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {  # definition, range, relative error
    "v_exp": (torch.exp, -87.0, 88.7, 1.2e-7),
    "v_sigmoid": (torch.sigmoid, -87.0, 87.0, 2e-7),
    "v_tanh": (torch.tanh, -12.0, 12.0, 2e-7),
    "v_erf": (torch.special.erf, -6.0, 6.0, 2e-7),
    "v_erfc": (torch.special.erfc, 0.0, 9.0, 5e-7),
    "v_normal": (lambda x: torch.special.erfc(-x / math.sqrt(2)) / 2, -12.0, 12.0, 5e-7),
}
SOURCE = (
    '#include "mathv.h"\n'
    + "".join(
        f"void {name}_all(float *y, const float *x, int64_t n)\n"
        f"{{ for (int64_t i = 0; i < n; i += VW) v_store(y + i, {name}(v_load(x + i))); }}\n"
        for name in FUNCTIONS
    )
    + """
void activate_all(float *y, const float *x, int64_t n, int which)
{ for (int64_t i = 0; i < n; i += VW) v_store(y + i, v_activate(v_load(x + i), which)); }
void part(float *y, const float *x, int64_t n) { v_store_n(y, v_load_n(x, n), n); }
float total(const float *x) { return v_sum(v_load(x)); }
int width(void) { return VW; }
"""
)


@pytest.fixture(scope="module", params=levels())
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return own_source(SOURCE, request.param, folder)


def run(function: ctypes._NamedFuncPointer, x: Tensor, *rest: int) -> Tensor:
    y = torch.empty_like(x)
    function(ctypes.c_void_p(y.data_ptr()), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), *rest)
    return y


def worst(got: Tensor, want: Tensor) -> float:
    normal = want.abs() > SMALLEST
    return float(((got.double() - want).abs() / want.abs())[normal].max())


@compiles
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_functions(own: ctypes.CDLL, name: str) -> None:
    definition, low, high, bound = FUNCTIONS[name]
    even = torch.linspace(low, high, 2**16)
    tiny = torch.logspace(-30, 0, 2**12) * min(high, 1.0)
    for x in (even, tiny, -tiny if low < 0 else tiny):
        x = x.float().contiguous()
        assert worst(run(getattr(own, f"{name}_all"), x), definition(x.double())) <= bound


@compiles
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(own: ctypes.CDLL, name: str) -> None:
    x = torch.cat([torch.linspace(-8, 8, 2**15), torch.logspace(-30, 1, 2**12), -torch.logspace(-30, 0.9, 2**12)])
    got, want = run(own.activate_all, x, list(ACTIVATIONS).index(name)), activate(x.double(), name)
    assert float((got.double() - want).abs().max() / want.max()) <= 2e-7
    above = x > -1  # the oracle itself loses digits in the lower tail
    assert worst(got[above], want[above]) <= 4e-7


@compiles
def test_what_is_no_number(own: ctypes.CDLL) -> None:
    x = torch.zeros(16)
    x[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    for name, (definition, low, *_) in FUNCTIONS.items():
        if low < 0:
            got, want = run(getattr(own, f"{name}_all"), x), definition(x)
            assert torch.isnan(got[0])
            assert torch.equal(got[1:3], want[1:3]), name
    for i in range(len(ACTIVATIONS)):
        assert torch.isnan(run(own.activate_all, x, i)[0])


@compiles
def test_parts_touch_nothing_else(own: ctypes.CDLL) -> None:
    width = own.width()
    x = torch.arange(1.0, width + 1)
    for n in range(width + 1):
        y = torch.full((width,), -1.0)
        own.part(ctypes.c_void_p(y.data_ptr()), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(n))
        assert torch.equal(y, torch.where(torch.arange(width) < n, x, -1.0))
    own.total.restype = ctypes.c_float
    assert own.total(ctypes.c_void_p(x.data_ptr())) == x.sum()
