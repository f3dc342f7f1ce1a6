"""JSON and tensors in files that are either whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import files
from ..core.errors import UserError
from ..core.files import Seal

__all__ = ["read_json", "read_tensors", "write_json", "write_tensors"]


def write_json(path: Path, value: Any) -> Seal:
    return files.write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Seal:
    """Write a safetensors file. Raises `OSError` for what the disk refuses; what was at `path` is untouched then."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def fill(beside: Path) -> None:
        try:
            save_file(plain, beside, metadata={"format": "pt"})
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error

    return files.replace(path, fill)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises `UserError` naming the file when it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); restore the file from a copy") from None


def read_json(path: Path) -> Any:
    """The JSON value in a file. Raises `UserError` naming the file when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise UserError(f"{path}: damaged, it holds no JSON; restore the file from a copy") from None
