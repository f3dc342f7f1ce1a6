"""Ways to run experts on one token, and the time to read what they touch."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts.packed import PackedBank
from ..ops import native
from ..ops.packed import Kind, bytes_of
from .layers import our_bank, plan_of
from .peers import Absent, transformers_experts
from .problem import Shape, Weights, plain_loop

__all__ = ["KINDS", "OURS", "Maker", "Step", "makers"]

Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [1, D], expert [1, K], weight [1, K] -> y [1, D]

OURS = "moestro fp32"
KINDS: tuple[Kind, ...] = ("bf16", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Maker:
    """build() gives one step per layer, or raises `Absent`. kind: of the weights. reader: it computes nothing."""

    build: Callable[[], list[Step]]
    shape: Shape
    kind: Kind | Literal["fp32"] = "fp32"
    compiled: bool = False
    reader: bool = False

    def bytes_per_layer(self) -> int:
        """Of weights that one token touches."""
        D, width = self.shape.dim, self.shape.width
        if self.kind == "fp32":
            return self.shape.top_k * self.shape.expert_bytes
        return self.shape.top_k * (bytes_of(self.kind, (2 * width, D)) + bytes_of(self.kind, (D, width)))


def makers(shape: Shape, shared: Sequence[Weights], peers: bool) -> dict[str, Maker]:
    """Name -> maker. peers: compiled ones and transformers' too."""
    packed = {kind: _Packed(shape, shared, kind) for kind in KINDS}
    made = {OURS: Maker(lambda: [_bank(our_bank(w), shape) for w in shared], shape)}
    for kind in KINDS:
        made[f"moestro {kind}"] = Maker(packed[kind].steps, shape, kind)
    made["read once, fp32"] = Maker(lambda: [_reader((w.gate_up, w.down)) for w in shared], shape, reader=True)
    for kind in KINDS:
        made[f"read once, {kind}"] = Maker(packed[kind].readers, shape, kind, reader=True)
    made["loop, unbind"] = Maker(lambda: [_loop(w) for w in shared], shape)
    if peers:
        made["gather + bmm compiled"] = Maker(lambda: _gathered(shared), shape, compiled=True)
        for name, implementation, compiled in (
            ("transformers grouped_mm", "grouped_mm", False),
            ("transformers batched_mm", "batched_mm", False),
            ("transformers batched_mm compiled", "batched_mm", True),
            ("transformers eager", "eager", False),
        ):
            made[name] = Maker(
                lambda i=implementation, c=compiled: [_transformers(w, i, c) for w in shared], shape, compiled=compiled
            )
    return made


def _bank(bank: Any, shape: Shape) -> Step:
    return lambda x, expert, weight: bank.mixture(x, plan_of(expert, weight, shape.experts))


def _loop(w: Weights) -> Step:
    return lambda x, expert, weight: plain_loop(x, expert, weight, w.gate_up, w.down)


def _transformers(w: Weights, implementation: str, compiled: bool) -> Step:
    experts: Any = transformers_experts(w.gate_up, w.down, implementation)
    return torch.compile(experts, dynamic=False) if compiled else experts


def _gathered(shared: Sequence[Weights]) -> list[Step]:
    """What compiles best: the chosen matrices gathered, then batched products; the compiler makes one loop of both."""

    def step(x: Tensor, expert: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        chosen = expert[0]
        gate, up = torch.bmm(gate_up[chosen], x.expand(len(chosen), -1)[:, :, None]).squeeze(-1).chunk(2, dim=1)
        out = torch.bmm(down[chosen], (F.silu(gate) * up)[:, :, None]).squeeze(-1)
        return (weight[0][:, None] * out).sum(0, keepdim=True)

    compiled = torch.compile(step, dynamic=False)
    return [lambda x, expert, weight, w=w: compiled(x, expert, weight, w.gate_up, w.down) for w in shared]


def _reader(tensors: Sequence[Tensor]) -> Step:
    """Reads the chosen experts' slices of tensors [E, ...] once, with all threads: the floor of everything above."""
    library = native.load()
    if library is None:
        raise Absent(f"no reader without C kernels: {native.reason()}")
    read, threads = library.moestro_read, torch.get_num_threads()
    known: dict[int, tuple[Any, Any, int]] = {}  # a token's table lies where it lies: its pieces are looked up once

    def step(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        found = known.get(expert.data_ptr())
        if found is None:
            pieces = [t[e] for e in expert[0].tolist() for t in tensors]
            places = (ctypes.c_void_p * len(pieces))(*(p.data_ptr() for p in pieces))
            sizes = (ctypes.c_int64 * len(pieces))(*(p.numel() * p.element_size() for p in pieces))
            found = known[expert.data_ptr()] = (places, sizes, len(pieces))
        read(*found, threads)
        return x

    return step


class _Packed:
    """Banks with weights of one kind, made once for those who compute with them and those who read them."""

    def __init__(self, shape: Shape, shared: Sequence[Weights], kind: Kind) -> None:
        self.shape, self.shared = shape, shared
        self.kind: Kind = kind
        self.made: list[PackedBank] = []

    def banks(self) -> list[PackedBank]:
        if not self.made:
            self.made = [PackedBank(our_bank(w), self.kind) for w in self.shared]
        return self.made

    def steps(self) -> list[Step]:
        return [_bank(bank, self.shape) for bank in self.banks()]

    def readers(self) -> list[Step]:
        return [_reader(list(bank.buffers())) for bank in self.banks()]
