"""The processes of a training: who they are, sums over all of them, and saying things together.

Everything is a plain collective of torch.distributed on values that are already summed on each rank: sums of
statistics and counts in one flat float64 message (exact for counts up to 2^53), gradients in flat buckets.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.errors import UserError

__all__ = ["Ranks", "joined"]

R = TypeVar("R")
_BUCKET = 1 << 25  # bytes of gradients sent at once


class Ranks:
    """This process among `world` ones. One process needs no process group and sends nothing."""

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, device: str = "cpu") -> None:
        self.rank, self.world, self.local = rank, world, local
        self.device = torch.device(device)

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, total: int) -> tuple[int, int]:
        """The contiguous part start..stop of `total` things that belongs to this rank."""
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    def add(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor summed over ranks, in one message; dtypes and shapes stay."""
        if self.world == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.detach().to(self.device, torch.float64).reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [p.view(t.shape).to(t.dtype) for p, t in zip(parts, tensors, strict=True)]

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over ranks in place. A parameter without one on any rank stays without."""
        if self.world == 1:
            return
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        dist.all_reduce(present)
        taking = [p for p, n in zip(parameters, present.tolist(), strict=True) if n]
        for bucket in _buckets(taking):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view(p.shape).clone()

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of the first rank."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def agree(self, value: R) -> R:
        """The first rank's value, on all ranks."""
        if self.world == 1:
            return value
        said: list[Any] = [value]
        dist.broadcast_object_list(said, 0)
        return said[0]

    def together(self, work: Callable[[], R]) -> R | None:
        """Let the first rank do something; where it fails, all ranks raise. Its result there, None elsewhere."""
        result, problem = None, None
        if self.first:
            try:
                result = work()
            except Exception as error:
                if self.world == 1:
                    raise
                problem = error
        if self.world > 1:
            said: list[Any] = [None if problem is None else str(problem)]
            dist.broadcast_object_list(said, 0)
            if problem is not None:
                raise problem
            if said[0] is not None:
                raise UserError(said[0])
        return result

    def by_machine(self, work: Callable[[], R]) -> R:
        """Let the first rank of every machine do something, then all others, which find it done."""
        if self.world == 1:
            return work()
        result: Any = None
        problem: Exception | None = None
        for turn in (self.local == 0, self.local != 0):
            if turn:
                try:
                    result = work()
                except Exception as error:
                    problem = error
            failed = torch.tensor([float(problem is not None)], device=self.device)
            dist.all_reduce(failed)
            if problem is not None:
                raise problem
            if failed.item():
                raise UserError("another rank could not read the text; its message says why")
        return result

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in order of rank."""
        if self.world == 1:
            return [tensor]
        out = [torch.empty_like(tensor, device=self.device) for _ in range(self.world)]
        dist.all_gather(out, tensor.to(self.device))
        return out


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        if bucket and (size >= _BUCKET or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel() * p.element_size()
    if bucket:
        yield bucket


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone. device: as in `TrainRun.device`.

    A process group that is made here stays until the process ends: torchrun's store serves one group only.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, local)
    if world == 1:
        yield Ranks(device=chosen)
        return
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
        atexit.register(_leave)
    yield Ranks(dist.get_rank(), dist.get_world_size(), local, chosen)


def _leave() -> None:
    """Close the process group. A thread of gloo may still hold the last message's tensor and needs the interpreter to
    let go of it: without the pause it can meet one that is shutting down, and abort a process that did all it had to.
    """
    time.sleep(0.1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(said: str, local: int) -> str:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if said == "auto" else said
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {said!r} is unknown; use cpu, cuda, cuda:1 or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {said!r}: training runs on cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device {said!r}: this torch finds no GPU; use device cpu")
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    return str(device)
