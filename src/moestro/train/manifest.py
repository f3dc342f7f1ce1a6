"""The manifest of a run: size and SHA-256 of every file. Its replacement is the moment at which a save counts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import Seal, seal
from .files import write_json

__all__ = ["Manifest", "read", "resolve", "verify", "write"]

SCHEMA = 1
_REMEDY = "restore it from a copy, or start a new run in another folder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """step: optimiser steps of the state it names. complete: whether the run has ended as planned.

    files: name below the run folder -> seal. growing: the same for files that grow, sealed up to this state.
    """

    step: int
    complete: bool
    files: Mapping[str, Seal]
    growing: Mapping[str, Seal]


def write(root: Path, manifest: Manifest) -> None:
    """Replace the manifest in one piece."""
    from .. import __version__

    body: dict[str, Any] = {
        "schema": SCHEMA,
        "moestro": __version__,
        "step": manifest.step,
        "complete": manifest.complete,
        "files": {n: s._asdict() for n, s in sorted(manifest.files.items())},
        "growing": {n: s._asdict() for n, s in sorted(manifest.growing.items())},
    }
    write_json(root / "manifest.json", body | {"sha256": _digest(body)})


def read(root: Path) -> Manifest:
    """The manifest of a run, itself checked. Raises `UserError` when it is missing or damaged."""
    path = root / "manifest.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        said = body.pop("sha256")
        if said != _digest(body):
            raise ValueError
        if body["schema"] != SCHEMA:
            raise UserError(
                f"{path}: written by another version (schema {body['schema']}); use moestro {body['moestro']}"
            )
        files, growing = ({n: Seal(**s) for n, s in body[part].items()} for part in ("files", "growing"))
        return Manifest(step=body["step"], complete=body["complete"], files=files, growing=growing)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{root}: no run there (no manifest.json); name the folder of a run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; {_REMEDY}") from None


def verify(root: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Raise `UserError` naming the first file (of `names`, or of all) that is missing or not what the manifest says."""
    for name in sorted(manifest.files) if names is None else names:
        resolve(root, manifest, name)
    if names is None:
        for name, wanted in sorted(manifest.growing.items()):
            _compare(root / name, wanted, wanted.bytes)


def resolve(root: Path, manifest: Manifest, name: str) -> Path:
    """The verified path of a file.

    Where the file is not the right one but the last state holds its content, that one is meant: the run ended between
    the commit of a state and the publication of its weights.
    """
    if name not in manifest.files:
        raise UserError(f"{root}: this run has no {name} yet (it ended before its first save); resume it first")
    wanted = manifest.files[name]
    try:
        _compare(root / name, wanted)
    except UserError:
        for other, found in manifest.files.items():
            if other.startswith("state/") and not name.startswith("state/") and found == wanted:
                with contextlib.suppress(UserError):
                    _compare(root / other, wanted)
                    return root / other
        raise
    return root / name


def _compare(path: Path, wanted: Seal, size: int | None = None) -> None:
    try:
        found = seal(path, size)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, although the manifest names it; {_REMEDY}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    if found.bytes != wanted.bytes:
        raise UserError(f"{path}: damaged, {found.bytes} bytes instead of {wanted.bytes}; {_REMEDY}")
    if found.sha256 != wanted.sha256:
        raise UserError(f"{path}: damaged, its content is not what was written (SHA-256 differs); {_REMEDY}")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
