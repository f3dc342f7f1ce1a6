"""Frozen dataclasses as pytrees: tensors travel as children, everything marked `static` stays behind as context.

Plans, trails, carries and signals are such values. They pass through `torch.utils.checkpoint`, `torch.compile` and
FSDP hooks, which all look for tensors with `torch.utils._pytree`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch.utils import _pytree

__all__ = ["changed", "pytree", "static"]

C = TypeVar("C", bound=type)
V = TypeVar("V")


def static(**kwargs: Any) -> Any:
    """A dataclass field that is no tensor: it becomes part of the tree's structure and must be comparable."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def changed(value: V, /, **fields: Any) -> V:
    """The frozen dataclass `value` with other fields: `dataclasses.replace` at a fifth of its price.

    For classes without `__post_init__` and slots, and for names that are fields: nothing is checked. Every layer of
    every decoded token narrows its signals and its carry this way.
    """
    if torch.compiler.is_compiling():
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]
    made = object.__new__(type(value))
    made.__dict__.update(value.__dict__, **fields)
    return made


def pytree(cls: C) -> C:
    """Register a frozen dataclass as a pytree node; fields made with `static` are context, the others children."""
    fields = dataclasses.fields(cls)
    children = tuple(f.name for f in fields if not f.metadata.get("static"))
    context = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, n) for n in children], tuple(getattr(value, n) for n in context)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], Any]:
        leaves, ctx = flatten(value)
        return [(_pytree.GetAttrKey(n), leaf) for n, leaf in zip(children, leaves, strict=True)], ctx

    def unflatten(leaves: Any, ctx: Any) -> Any:
        return cls(**dict(zip(children, leaves, strict=True)), **dict(zip(context, ctx, strict=True)))

    _pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
    return cls
