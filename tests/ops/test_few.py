"""The kernels of decoding against their definitions, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moestro.ops.few import attend_one, linear, linears, naive, rms_norm
from moestro.ops.few.linears import SOME
from moestro.ops.native import load
from moestro.testing.compare import assert_close
from ops.native_cases import compiles


@pytest.fixture(autouse=True)
def _no_gradient():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@compiles
@pytest.mark.parametrize("rows", [(1,), (2, 1), (4,), (3, 3), (SOME,)])
@pytest.mark.parametrize(("I", "O"), [(1, (1,)), (7, (3, 5)), (64, (33,)), (130, (257, 1, 300)), (520, (129, 64, 65))])
@pytest.mark.parametrize("bias", [False, True])
def test_linears(rows: tuple[int, ...], I: int, O: tuple[int, ...], bias: bool) -> None:
    x, weights = normal(*rows, I), tuple(normal(o, I, seed=i) for i, o in enumerate(O))
    biases = tuple(normal(o, seed=9) if bias and i != 1 else None for i, o in enumerate(O))
    made = linears(x, weights, biases)
    assert made is not None
    for i, (y, want) in enumerate(zip(made, naive.linears(x, weights, biases), strict=True)):
        assert_close(f"product {i}", y, want, 1e-6)
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        again = linears(x, weights, biases)
        torch.set_num_threads(before)
        assert again is not None
        assert all(torch.equal(a, b) for a, b in zip(made, again))


@compiles
@pytest.mark.parametrize("T", [2, 8, 9, SOME])
def test_a_row_does_not_depend_on_the_others(T: int) -> None:
    x, w = normal(SOME, 50), normal(70, 50, seed=1)
    whole, part = linears(x, (w,), (None,)), linears(x[SOME - T :], (w[3:],), (None,))
    assert whole is not None
    assert part is not None
    assert torch.equal(whole[0][SOME - T :, 3:], part[0])


@compiles
def test_a_changed_weight_changes_the_product() -> None:
    x, weight = normal(1, 1, 16), torch.nn.Parameter(normal(8, 16))
    first = linears(x, (weight,), (None,))
    weight.mul_(2.0)
    second = linears(x, (weight,), (None,))
    assert first is not None
    assert second is not None
    assert torch.equal(second[0], first[0] * 2)


@compiles
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (2, 3, 33), (1, 512)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape) * 3, normal(shape[-1], seed=1)
    made = rms_norm(x, weight, 1e-5)
    assert made is not None
    assert_close("norm", made, naive.rms_norm(x, weight, 1e-5), 1e-6)


@compiles
@pytest.mark.parametrize("held", [0, 1, 5, 40])
@pytest.mark.parametrize(("H", "G", "d"), [(1, 1, 2), (4, 2, 24), (6, 2, 64), (3, 3, 160)])
@pytest.mark.parametrize("rotation", ["none", "halves", "interleaved", "partial"])
def test_attend_one(held: int, H: int, G: int, d: int, rotation: str) -> None:
    B, size = 2, 41
    q, k, v = normal(B, 1, H, d), normal(B, 1, G, d, seed=1), normal(B, 1, G, d, seed=2)
    key, value = normal(B, G, size, d, seed=3), normal(B, G, size, d, seed=4)
    half = d // 4 if rotation == "partial" else d // 2
    frequency = None if rotation == "none" or not half else 0.7 ** torch.arange(half)
    options = {"position": 11, "frequency": frequency, "factor": 1.25, "interleaved": rotation == "interleaved"}
    options |= {"first": held // 3, "scale": 0.3 if rotation == "partial" else None}
    if held % 2:
        options["norms"] = normal(d, seed=5), normal(d, seed=6), 1e-3
    before = key.clone(), value.clone()
    want, new_key, new_value = naive.attend_one(q, k, v, key, value, held, **options)  # type: ignore[arg-type]
    made = attend_one(q.flatten(2), k.flatten(2), v.flatten(2), key, value, held, **options)  # type: ignore[arg-type]
    assert made is not None
    assert_close("attention", made, want.flatten(2), 2e-6)
    for name, buffer, old, new in (("key", key, before[0], new_key), ("value", value, before[1], new_value)):
        assert_close(name, buffer[:, :, held], new[:, 0], 1e-6)
        rest = torch.arange(size) != held
        assert torch.equal(buffer[:, :, rest], old[:, :, rest]), "nothing else is written"


def test_what_is_not_theirs_is_left_to_torch() -> None:
    x, w = normal(1, 16), normal(8, 16)
    cases = {
        "fp64": (x.double(), w.double()),
        "bf16": (x.bfloat16(), w.bfloat16()),
        "mixed": (x, w.double()),
        "no rows": (x[:0], w),
        "many rows": (normal(SOME + 1, 16), w),
        "strided": (x, normal(16, 8).T),
        "too narrow": (x, normal(8, 15)),
    }
    assert linears(x, (w,), (normal(1),)) is None, "a bias of one number"
    for name, (rows, weight) in cases.items():
        assert linears(rows, (weight,), (None,)) is None, name
    with torch.enable_grad():
        assert linears(x, (w,), (None,)) is None
        assert rms_norm(x, w[0], 1e-5) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linears(x, (w,), (None,)) is None
    assert rms_norm(x.double(), w[0].double(), 1e-5) is None
    assert rms_norm(x, w[0, :8], 1e-5) is None
    full, one = normal(1, 1, 4, 16), normal(1, 1, 16)
    assert attend_one(one, one, one, full, full, held=4) is None, "no place is left"
    assert attend_one(one, one, one, full.expand(2, 1, 4, 16), full.expand(2, 1, 4, 16), held=1) is None
    assert attend_one(one.double(), one, one, full, full, held=1) is None
    assert attend_one(one, one, one, full, full, held=1, norms=(w[0], w[0, :8], 1e-5)) is None
    assert attend_one(normal(1, 2, 16), one, one, full, full, held=1) is None, "two queries"


@compiles
def test_defaults_of_torch_do_not_matter() -> None:
    x, w = normal(1, 16), normal(8, 16)
    torch.set_default_dtype(torch.float64)
    try:
        made = linears(x, (w,), (None,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert made is not None
    assert made[0].dtype == torch.float32
    assert_close("product", made[0], naive.linears(x, (w,), (None,))[0], 1e-6)


@compiles
def test_vmap_and_tensors_in_disguise_are_left_to_torch() -> None:
    x, w = normal(3, 16), normal(8, 16)
    assert_close("vmap", torch.vmap(lambda row: linear(row, w))(x), x @ w.T, 1e-6)

    class Wrapped(Tensor):
        pass

    assert linears(x, (w.as_subclass(Wrapped),), (None,)) is None
    assert rms_norm(x.as_subclass(Wrapped), w[0], 1e-5) is None


def test_they_are_used_where_a_compiler_is() -> None:
    x, w = normal(1, 16), normal(8, 16)
    assert (linears(x, (w,), (None,)) is not None) == (load() is not None)
