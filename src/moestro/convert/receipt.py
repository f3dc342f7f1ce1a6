"""What a conversion can show for itself: what is exact, what was measured, what was invented, and checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import files
from ..core.errors import UserError
from ..core.params import describe

__all__ = ["ConversionError", "LayerChange", "Measured", "Receipt", "checksums", "read", "verify"]

NAME = "receipt.json"
FORMAT = 1


class ConversionError(RuntimeError):
    """A conversion that claims to keep the output does not, or left a tensor without a value; nothing is returned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Outputs of the old and of the new model on the same inputs.

    source: "text", "random tokens" (nothing was given) or "inputs". positions: how many outputs were compared.
    against: whose outputs the old ones are; of several sources their mean.
    relative: |new - old| / |old| (L2). largest: the largest absolute difference. bitwise: whether all bits are equal.
    kl: mean of KL(old || new) in nats, where outputs are logits. bits_before, bits_after: of the next token, per byte
    where the number of bytes was given (`unit` says "byte"), else per token; None where there was no text.
    """

    source: str
    positions: int
    relative: float
    largest: float
    bitwise: bool
    kl: float | None = None
    bits_before: float | None = None
    bits_after: float | None = None
    unit: str | None = None
    against: str = "the source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerChange:
    """One converted layer: relative L2 distance of its outputs on the inputs that it has in the old model."""

    path: str
    distance: float
    experts_before: int
    experts_after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """A conversion, on paper.

    method, options: type name and fields of the options. sources: what was converted (folders, where known).
    exact: what is unchanged, in words, or None; bound: the relative difference within which that was checked (0 =
    every bit, see `notes` for what was compared). measured, layers: what was found. invented: tensors of the new model
    that hold values which no source had, with the reason. checksums: SHA-256 per tensor of the new model; of stacks
    one per expert. params and active: parameters, and those that a token meets.
    """

    method: str
    options: Mapping[str, Any]
    seed: int
    exact: str | None
    bound: float | None
    measured: Measured
    layers: tuple[LayerChange, ...]
    invented: Mapping[str, str]
    checksums: Mapping[str, tuple[str, ...]]
    params_before: int
    params_after: int
    active_before: int
    active_after: int
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"format": FORMAT} | json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, data: Any, where: str = "receipt") -> Receipt:
        """The receipt of `to_dict`. Raises `UserError` for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f"{where}: no receipt of format {FORMAT}")
        try:
            values = {k: v for k, v in data.items() if k != "format"}
            values["measured"] = Measured(**values["measured"])
            values["layers"] = tuple(LayerChange(**row) for row in values["layers"])
            values["checksums"] = {k: tuple(v) for k, v in values["checksums"].items()}
            values["sources"], values["notes"] = tuple(values["sources"]), tuple(values["notes"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: not a whole receipt ({error})") from None

    def write(self, path: str | Path) -> Path:
        """Write the receipt to a file, or as `receipt.json` into a folder; whole or not at all. Returns the path."""
        path = Path(path)
        path = path / NAME if path.is_dir() else path
        files.write(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        return path


def read(path: str | Path) -> Receipt:
    """A receipt from its file, or from the folder beside which it was written. Raises `UserError`."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the receipt {path}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{path}: no valid JSON, so no receipt") from None
    return Receipt.from_dict(data, str(path))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes in row-major order."""
    value = tensor.detach().cpu().contiguous()
    made = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
    made.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def checksums(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name -> digest of every parameter and persistent buffer; stacks of experts have one digest per expert."""
    infos = describe(model)
    out: dict[str, tuple[str, ...]] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        axis = infos[name].expert_axis if name in infos else None
        parts = (tensor,) if axis is None else tensor.unbind(axis)
        out[name] = tuple(digest(p) for p in parts)
    return out


def verify(model: nn.Module, receipt: Receipt) -> None:
    """Raise `UserError`, naming the first tensors that differ, unless the model holds exactly what the receipt says."""
    found, said = checksums(model), dict(receipt.checksums)
    wrong = [n for n in sorted(found.keys() | said.keys()) if found.get(n) != said.get(n)]
    if wrong:
        names = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UserError(f"the model is not the one of this receipt: {names} differ")
