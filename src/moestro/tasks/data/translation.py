"""Aligned sentences of two languages."""

from __future__ import annotations

from ...core.errors import UserError
from .config import Multi30k
from .examples import DataSet, Translation
from .read import find, text

__all__ = ["multi30k"]


def multi30k(config: Multi30k) -> DataSet[Translation]:
    """The official splits; the test set is that of 2016. Lines that are empty in one language are left out."""
    languages = config.source_language, config.target_language

    def split(name: str) -> tuple[Translation, ...]:
        paths = [find(config, f"{name}.{language}") for language in languages]
        sides = [text(path).removesuffix("\n").split("\n") for path in paths]
        if len(sides[0]) != len(sides[1]):
            raise UserError(
                f"{paths[0]} has {len(sides[0])} lines and {paths[1].name} {len(sides[1])}: not aligned, get both again"
            )
        lines = ((a.strip(), b.strip()) for a, b in zip(*sides))
        return tuple(Translation(a, b) for a, b in lines if a and b)

    title = f"{config.slug} {languages[0]}-{languages[1]}"
    return DataSet(title, split("train"), split("val"), split("test_2016_flickr"), domains=(title,))
