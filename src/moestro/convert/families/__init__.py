"""Families of checkpoints by name, each in a file of its own, loaded when it is asked for.

A family's name is the `model_type` of its config.json, but for those whose authors gave it that of another family: they
are recognised by fields that only theirs has.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError, did_you_mean
from .. import authors
from ..borrowed import name_of

if TYPE_CHECKING:
    from ..checkpoint.family import Family

__all__ = ["FAMILIES", "find", "recognised"]

FAMILIES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))
"""The model types that transformers has too: one for every file of this folder."""


def find(model_type: object, where: object = "convert") -> Family:
    """The family of a `model_type`, of this folder or of `convert.authors`. Raises `UserError` for an unknown one."""
    if isinstance(model_type, str) and model_type in authors.AUTHORS:
        return importlib.import_module(f"{authors.__name__}.{model_type}").FAMILY
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = did_you_mean(model_type, FAMILIES) if isinstance(model_type, str) else ""
        raise UserError(f"{where}: unknown model_type {model_type!r}{hint}; known: {', '.join(FAMILIES)}")
    return importlib.import_module(f"{__name__}.{model_type}").FAMILY


def recognised(data: Mapping[str, Any], where: object = "convert") -> Family:
    """The family of a config.json, by its `model_type` and by fields that give borrowers away; `UserError` for none."""
    return find(name_of(data), where)
