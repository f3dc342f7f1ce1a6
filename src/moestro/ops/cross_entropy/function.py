"""`cross_entropy`: vocabulary projection and loss together, a chunk of units at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UserError
from ..precision import autocast_off, operands, sum_dtype

__all__ = ["chunk_size", "cross_entropy"]

# Bytes of one chunk's logits. On the CPU 8 to 64 MiB are equally fast (T 1024-4096, V 8192-50000, D 128) and smaller
# ones slower, because every chunk reads and writes the whole gradient of the head; elsewhere products are to be larger.
CHUNK_BYTES = {"cpu": 16 * 2**20}
CHUNK_BYTES_ELSEWHERE = 256 * 2**20
LEAST = 64  # units; a vocabulary so large that fewer would fit pays more for the head's gradient than for its logits


def chunk_size(vocab: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> int:
    """How many units are projected at a time: 16 MiB of logits on the CPU, 256 MiB elsewhere, but at least 64 units."""
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES_ELSEWHERE)
    return max(LEAST, budget // (max(1, vocab) * sum_dtype(dtype).itemsize))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        head: Tensor,
        bias: Tensor | None,
        target: Tensor,
        counted: Tensor,
        chunk: int,
        with_grad: bool,
    ) -> Tensor:
        dtype, (T, D), V = sum_dtype(h.dtype), h.shape, head.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=h.device)
        d_h = torch.empty_like(h, memory_format=torch.contiguous_format) if with_grad else None
        d_head = torch.zeros(V, D, dtype=dtype, device=h.device) if with_grad else None
        d_bias = torch.zeros(V, dtype=dtype, device=h.device) if with_grad and bias is not None else None
        wide, shift = head.to(dtype), None if bias is None else bias.to(dtype)
        buffers = torch.empty(2, min(chunk, T), V, dtype=dtype, device=h.device).unbind(0)
        with autocast_off(h.device):
            for start in range(0, T, chunk):
                part = slice(start, min(start + chunk, T))
                ignored = ~counted[part, None]
                # With zeros for what is ignored, its share of the head's gradient is exactly zero.
                x = h[part].to(dtype).masked_fill(ignored, 0)
                goal = target[part, None].masked_fill(ignored, 0)
                logits, logs = (b[: x.shape[0]] for b in buffers)
                if shift is None:
                    torch.mm(x, wide.t(), out=logits)
                else:
                    torch.addmm(shift, x, wide.t(), out=logits)
                torch.ops.aten._log_softmax.out(logits, 1, False, out=logs)
                total -= logs.gather(1, goal).masked_fill_(ignored, 0).sum(dtype=torch.float64)
                if d_h is None or d_head is None:
                    continue
                d_logits = logs.exp_().scatter_add_(1, goal, logs.new_full(goal.shape, -1.0))
                d_h[part] = torch.mm(d_logits, wide).masked_fill_(ignored, 0)
                torch.addmm(d_head, d_logits.t(), x, out=d_head)
                if d_bias is not None:
                    torch.addmv(d_bias, d_logits.t(), counted[part].to(dtype), out=d_bias)
        if d_h is not None and d_head is not None:
            ctx.save_for_backward(d_h, d_head.to(head.dtype), None if bias is None else d_bias.to(bias.dtype))  # type: ignore[union-attr]
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]  # often 1 / number of targets: not to be rounded to bfloat16
        made = (None if d is None else (d.to(scale.dtype) * scale).to(d.dtype) for d in ctx.saved_tensors)
        return *made, None, None, None, None


def cross_entropy(
    h: Tensor,
    head: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    chunk: int | None = None,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Next-token loss without ever holding all logits: (sum of nats [], number of targets [] int64).

    Shapes: h [T, D], head [V, D], target [T] int64 with -1 = ignored, valid [T] bool or None (False = ignored too),
    bias [V] or None, added to the logits. Logits, softmax and sum are fp32 (float64 for float64 inputs) whatever the
    inputs' dtype. `chunk` is the number of units projected at a time, see `chunk_size`. The gradient is computed during
    the forward pass.
    Raises `UserError` for shapes that do not fit.
    """
    if h.ndim != 2 or head.ndim != 2 or h.shape[1] != head.shape[1]:
        raise UserError(f"cross_entropy needs h [T, D] and head [V, D], not {list(h.shape)} and {list(head.shape)}")
    for name, tensor in (("target", target), ("valid", valid)):
        if tensor is not None and tensor.shape != h.shape[:1]:
            raise UserError(f"cross_entropy: {name} must be [{h.shape[0]}], not {list(tensor.shape)}")
    if bias is not None and bias.shape != head.shape[:1]:
        raise UserError(f"cross_entropy: bias must be [{head.shape[0]}], not {list(bias.shape)}")
    if chunk is not None and chunk < 1:
        raise UserError(f"cross_entropy: chunk must be at least 1 unit, not {chunk}")
    if head.shape[0] == 0:
        raise UserError("cross_entropy: the vocabulary is empty")
    counted = target >= 0 if valid is None else (target >= 0) & valid
    h, head, bias = operands("cross_entropy", h, head, bias)
    with_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (h, head, bias))
    size = chunk_size(head.shape[0], h.dtype, h.device.type) if chunk is None else chunk
    total = _CrossEntropy.apply(h, head, bias, target, counted, size, with_grad)
    return total, counted.sum()  # type: ignore[return-value]
