"""Running text in labelled domains as windows of tokens: every window is of one domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UserError
from ..batches import Batch
from .batches import epoch_order, moved
from .examples import DataSet, Passage
from .vocabulary import TextVocabulary

__all__ = ["DomainBatch", "DomainBatches", "DomainStream"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainBatch(Batch):
    """Windows of running text. Shapes: tokens, targets [B, S]; domain [B] int64."""

    domain: Tensor

    def to(self, device: torch.device) -> DomainBatch:
        return moved(self, device)


class DomainStream:
    """Passages as ids of one split, joined by domain with eos between them. bytes: of text, by domain."""

    def __init__(self, passages: Sequence[Passage], vocabulary: TextVocabulary) -> None:
        found: dict[int, list[np.ndarray]] = {}
        self.bytes: dict[int, int] = {}
        for passage in passages:
            ids = [*vocabulary.encode(passage.text), vocabulary.eos]
            found.setdefault(passage.domain, []).append(np.asarray(ids, dtype=np.int32))
            size = len(passage.text.encode("utf-8", "replace"))
            self.bytes[passage.domain] = self.bytes.get(passage.domain, 0) + size
        self.ids = {domain: np.concatenate(ids) for domain, ids in sorted(found.items())}

    def windows(self, seq_len: int) -> list[tuple[int, int]]:
        """(domain, start) of all windows of seq_len + 1 tokens that overlap by one."""
        return [(domain, start) for domain, ids in self.ids.items() for start in range(0, len(ids) - seq_len, seq_len)]


class DomainBatches:
    """Windows of training text in the order of (seed, step), windows of held-out text by domain.

    shares: how often each domain is drawn, by its number; () = in proportion to its text, each window once per epoch.
    Raises `UserError` where a split has no window.
    """

    def __init__(
        self,
        data: DataSet[Passage],
        vocabulary: TextVocabulary,
        seq_len: int,
        seed: int = 0,
        shares: Sequence[float] = (),
    ) -> None:
        self.data, self.seq_len, self.seed = data, seq_len, seed
        self.split = {name: DomainStream(getattr(data, name), vocabulary) for name in ("train", "valid", "test")}
        self._windows = {name: stream.windows(seq_len) for name, stream in self.split.items()}
        if not self._windows["train"]:
            raise UserError(
                f"{data.title}: the training text has no window of {seq_len + 1} tokens; use a smaller seq_len"
            )
        self._places = self._drawn(shares)

    def _drawn(self, shares: Sequence[float]) -> list[tuple[int, int]]:
        """The windows of one epoch; with shares each domain's are repeated or thinned to its share of as many."""
        windows = self._windows["train"]
        if not shares:
            return windows
        domains = sorted({domain for domain, _ in windows})
        if len(shares) != len(self.data.domains) or min(shares) < 0 or sum(shares[d] for d in domains) <= 0:
            raise UserError(f"shares: one number of at least 0 for each of {', '.join(self.data.domains)}")
        total = sum(shares[d] for d in domains)
        out: list[tuple[int, int]] = []
        for domain in domains:
            mine = [w for w in windows if w[0] == domain]
            wanted = round(len(windows) * shares[domain] / total)
            out += [
                mine[i * len(mine) // wanted] if wanted <= len(mine) else mine[i % len(mine)] for i in range(wanted)
            ]
        return out

    def train(self, step: int, size: int, start: int = 0, stop: int | None = None) -> DomainBatch:
        """Windows start..stop of the global batch of `size` windows of this step."""
        numbers = epoch_order(len(self._places), self.seed, step, size)
        part = slice(start, size if stop is None else stop)
        return self._gather("train", [self._places[i] for i in numbers[part]], part.start)

    def held_out(self, domain: int, size: int, split: str = "valid", limit: int | None = None) -> list[DomainBatch]:
        """Windows of one domain, at most `limit` and evenly spaced, in batches of at most `size`."""
        mine = [w for w in self._windows[split] if w[0] == domain]
        if limit is not None and limit < len(mine):
            mine = [mine[i * len(mine) // limit] for i in range(limit)]
        return [self._gather(split, mine[i : i + size], i) for i in range(0, len(mine), size)]

    def _gather(self, split: str, windows: Sequence[tuple[int, int]], first: int) -> DomainBatch:
        S, stream = self.seq_len, self.split[split]
        ids = torch.from_numpy(np.stack([stream.ids[d][s : s + S + 1] for d, s in windows]).astype(np.int64))
        per_token = [stream.bytes[d] / len(stream.ids[d]) for d, _ in windows]
        return DomainBatch(
            tokens=ids[:, :-1].contiguous(),
            targets=ids[:, 1:].contiguous(),
            unit_id=torch.arange(first * S, (first + len(windows)) * S),
            text_bytes=float(sum(per_token) * S),
            domain=torch.tensor([d for d, _ in windows], dtype=torch.int64),
        )
