"""Where the user's machine keeps data, and what can be made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["data_root", "user_cache"]


def user_cache() -> Path:
    """The library's folder in the user's cache folder; it may not exist yet.

    Raises `RuntimeError` where the system knows no home folder.
    """
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "moestro"


def data_root(chosen: str = "") -> Path:
    """Where data sets and what is made from them lie: as chosen, else $MOESTRO_DATA, else the user's cache folder."""
    said = chosen or os.environ.get("MOESTRO_DATA", "")
    return Path(said).expanduser() if said else user_cache()
