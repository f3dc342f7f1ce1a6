"""The task loss of answers, and final numbers (Optimal Sparsity, arXiv 2508.18672, Task loss)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ...core.errors import UserError

__all__ = ["AnswerBits", "answer_bits", "answer_nats", "final_number", "same_number"]


class AnswerBits(NamedTuple):
    """Bits per token and per byte: means over examples of each example's own quotient. nats: mean per example."""

    per_token: float
    per_byte: float
    nats: float


def answer_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Per example -log p(answer) and the number of its tokens.

    Shapes: logits [B, S, V]; targets [B, S], -1 = not part of the answer -> nats [B] float32 or float64, tokens [B]
    int64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counted = targets >= 0
    chosen = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -torch.where(counted, chosen, chosen.new_zeros(())).sum(-1), counted.sum(-1)


def answer_bits(nats: ArrayLike, tokens: ArrayLike, num_bytes: ArrayLike) -> AnswerBits:
    """bits/token = nats / (ln 2 * tokens), bits/byte = nats / (ln 2 * UTF-8 bytes of the answer), then the means.

    Shapes: all [N]. Examples without tokens or bytes raise `UserError`.
    """
    n, t, b = (np.asarray(x, dtype=np.float64) for x in (nats, tokens, num_bytes))
    if not n.shape == t.shape == b.shape or not n.size or (t <= 0).any() or (b <= 0).any():
        raise UserError(
            f"task loss: nats {n.shape}, tokens {t.shape}, bytes {b.shape} must be as many, all answers long"
        )
    return AnswerBits(float((n / t).mean() / math.log(2)), float((n / b).mean() / math.log(2)), float(n.mean()))


def final_number(text: str) -> str:
    """The answer at the end of a solution: what follows "####", else the last number; "" for none. No separators."""
    _, mark, after = text.rpartition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", after if mark else text)
    if not found:
        return after.strip() if mark else ""
    return (found[0] if mark else found[-1]).replace(",", "")


def same_number(said: str, wanted: str) -> bool:
    """Whether two answers are equal, as numbers where both are."""
    try:
        return math.isclose(float(said), float(wanted), rel_tol=1e-6)
    except ValueError:
        return said.strip().lower() == wanted.strip().lower()
