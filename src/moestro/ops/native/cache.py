"""Compiled libraries kept in a folder that only the user can write to, each sealed with a SHA-256 at its end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from ...core.folders import user_cache
from ...core.version import __version__
from .compiler import Compiler, flags
from .unavailable import Unavailable

__all__ = ["folder", "intact", "key", "put"]

_SEAL = hashlib.sha256().digest_size
_KEPT = 16  # libraries of other versions, compilers and machines with the same home
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def key(instructions: str, compiler: Compiler, files: Iterable[Path]) -> str:
    """The name of a library: changes with the package, its sources, the compiler, the flags and the instruction set."""
    parts = [__version__, instructions, compiler.version, *compiler.command, "|", *flags(instructions), "|"]
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape"))
    for file in files:
        content = file.read_bytes()
        digest.update(f"\0{file.name}\0{len(content)}\0".encode() + content)
    return f"kernels-{instructions}-{digest.hexdigest()[:32]}.so"


def folder() -> Path:
    """The cache folder, made (0700) where it is missing. Raises `Unavailable` where it is not the user's alone."""
    try:
        place = user_cache() / "native"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        about = place.lstat()
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        raise Unavailable(f"there is no cache folder{where} ({why})") from error
    if not stat.S_ISDIR(about.st_mode):
        raise Unavailable(f"the cache folder {place} is a link")
    if about.st_uid != os.geteuid():
        raise Unavailable(f"the cache folder {place} belongs to another user")
    if about.st_mode & _OTHERS_WRITE:
        raise Unavailable(f"others can write to the cache folder {place} (chmod 700 it)")
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        raise Unavailable(f"the cache folder {place} lies on a file system without execution")
    return place


def intact(path: Path) -> bool:
    """Whether a library is there, the user's own and as it was written.

    Asked before loading: a library that was cut short kills the process that loads it.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & _OTHERS_WRITE:
                return False
            content = file.read()
    except OSError:
        return False
    return len(content) > _SEAL and hashlib.sha256(content[:-_SEAL]).digest() == content[-_SEAL:]


def put(library: Path, path: Path) -> None:
    """Keep a library under `path`: whole or not at all, whoever else does the same. Raises `Unavailable`."""
    content = library.read_bytes()
    try:
        handle, fresh = tempfile.mkstemp(prefix=".new-", dir=path.parent)  # for the user alone: 0600
        try:
            with open(handle, "wb") as file:
                file.write(content + hashlib.sha256(content).digest())  # loaders ignore what follows an ELF file
                file.flush()
                os.fsync(handle)
            os.replace(fresh, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh)
            raise
    except OSError as error:
        raise Unavailable(f"the cache folder {path.parent} cannot be written to ({error.strerror})") from error
    _prune(path.parent)


def _prune(place: Path) -> None:
    """Remove all but the newest libraries, and what a killed process left. Loaded ones stay loaded."""
    with contextlib.suppress(OSError):
        aged = sorted(((p.stat().st_mtime, p) for p in place.glob("kernels-*.so")), reverse=True)
        yesterday = time.time() - 86400
        left = [(p.stat().st_mtime, p) for p in place.glob(".new-*")]
        for path in [p for _, p in aged[_KEPT:]] + [p for made, p in left if made < yesterday]:
            path.unlink(missing_ok=True)
