"""Rules: every kind there and back, what they read, and what tables that do not fit say."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moestro.convert.checkpoint.apply import to_ours, to_theirs
from moestro.convert.checkpoint.boxes import View
from moestro.convert.checkpoint.rules import (
    Copy,
    Fuse,
    Ignored,
    Interleaved,
    Invented,
    Reshape,
    Split,
    Stack,
    StackFuse,
    Table,
    Transpose,
)
from moestro.convert.checkpoint.tensors import DictTensors, Entry
from moestro.core.errors import UserError


def numbered(*shape: int, start: int = 0) -> Tensor:
    count = int(torch.tensor(shape).prod())
    return torch.arange(start, start + count, dtype=torch.float32).view(shape)


A, B, C = numbered(3, 4), numbered(3, 4, start=100), numbered(6, 4, start=200)
BANK = numbered(2, 6, 4)
CASES: dict[str, tuple[Table, dict[str, Tensor], dict[str, Tensor]]] = {
    "copy": ((Copy("a", "x.y"),), {"a": A}, {"x.y": A}),
    "layers": ((Copy("l.{layer}.a", "m.{layer}.n.{layer}"),), {"l.7.a": A}, {"m.7.n.7": A}),
    "any name": ((Copy("{name}", "model.{name}"),), {"a.b": A, "c": B}, {"model.a.b": A, "model.c": B}),
    "transpose": ((Copy("a", "x", (Transpose(),)),), {"a": A}, {"x": A.t()}),
    "reshape": ((Copy("a", "x", (Reshape((3, 4), (12,)),)),), {"a": A}, {"x": A.view(12)}),
    "fuse": ((Fuse("a", ("x", "y")),), {"a": torch.cat((A, B))}, {"x": A, "y": B}),
    "fuse columns": ((Fuse("a", ("x", "y"), axis=1),), {"a": torch.cat((A, B), 1)}, {"x": A, "y": B}),
    "fuse unequal": ((Fuse("a", ("x", "y"), sizes=(2, 1)),), {"a": torch.cat((C, B))}, {"x": C, "y": B}),
    "fuse changed": ((Fuse("a", ("x", "y"), 0, (Transpose(),)),), {"a": torch.cat((A, B))}, {"x": A.t(), "y": B.t()}),
    "split": ((Split(("a", "b"), "x"),), {"a": A, "b": C}, {"x": torch.cat((A, C))}),
    "stack": ((Stack("a", "x.{expert}"),), {"a": BANK}, {"x.0": BANK[0], "x.1": BANK[1]}),
    "stack changed": (
        (Stack("a", "x.{expert}", (Transpose(),)),),
        {"a": BANK},
        {"x.0": BANK[0].t(), "x.1": BANK[1].t()},
    ),
    "stack fuse": (
        (StackFuse("a", ("x.{expert}", "y.{expert}")),),
        {"a": BANK},
        {"x.0": BANK[0, :3], "y.0": BANK[0, 3:], "x.1": BANK[1, :3], "y.1": BANK[1, 3:]},
    ),
    "interleaved": (
        (Copy("a", "x", (Transpose(), Interleaved(1))),),
        {"a": BANK},
        {"x": torch.stack((BANK[:, :3], BANK[:, 3:]), dim=2).flatten(1, 2).transpose(1, 2)},
    ),
    "invented": ((Copy("a", "x"), Invented("b", "not published", 2.0)), {"a": A, "b": torch.full((2,), 2.0)}, {"x": A}),
    "scalar": ((Copy("a", "x"),), {"a": torch.tensor(3.0)}, {"x": torch.tensor(3.0)}),
}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    return dict(DictTensors(tensors).entries())


def assert_equal(found: View, wanted: Mapping[str, Tensor]) -> None:
    assert dict(found.entries()) == shapes(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found.read(name), tensor), name
        out = torch.empty_like(tensor)
        found.read_into(name, out)
        assert torch.equal(out, tensor), name


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str) -> None:
    table, ours, theirs = CASES[name]
    mine, their = to_ours(DictTensors(theirs), table, shapes(ours), "x"), to_theirs(DictTensors(ours), table, "x")
    assert_equal(mine, ours)
    assert_equal(their, theirs)
    assert_equal(to_theirs(mine, table, "x"), theirs)  # a view of a view
    assert_equal(to_ours(their, table, shapes(ours), "x"), ours)


@pytest.mark.parametrize("name", CASES)
def test_boxes(name: str) -> None:
    """Any box of a tensor is that box of the whole."""
    table, ours, theirs = CASES[name]
    view = to_ours(DictTensors(theirs), table, shapes(ours), "x")
    for ours_name, tensor in ours.items():
        for start in range(3):
            box = tuple((min(start, n - 1), n) for n in tensor.shape)
            wanted = tensor[tuple(slice(*span) for span in box)]
            assert torch.equal(view.read_box(ours_name, box), wanted)


class Counting(DictTensors):
    """Notes which tensors are read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.seen: list[str] = []

    def read(self, name: str) -> Tensor:
        self.seen.append(name)
        return super().read(name)


def test_only_what_is_needed_is_read() -> None:
    table, ours, theirs = CASES["stack fuse"]
    source = Counting(theirs)
    back = to_theirs(to_ours(source, table, shapes(ours), "x"), table, "x")
    assert source.seen == []
    assert torch.equal(back.read("y.1"), BANK[1, 3:])
    assert source.seen == ["y.1"]
    whole = Counting({"x": A})
    read = to_ours(whole, (Copy("a", "x"),), {"a": Entry((3, 4), torch.float32)}, "x").read("a")
    assert read.data_ptr() == A.data_ptr()  # no copy


FUSE: Table = (Fuse("l.{layer}.a", ("x.{layer}", "y.{layer}")), Ignored("t.{name}", "said twice", equals="x.0"))
SIX = {"l.0.a": Entry((6, 4), torch.float32)}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"x.0": A}, r"here: missing y\.0\. "),
        ({"x.0": A, "y.0": B, "z": C, "w": C}, r"left over w, z\. "),
        ({"x.0": A, "y.0": C}, r"of another shape y.0 \(\[6, 4\], the config says \[3, 4\]\)"),
        ({"x.0": A, "y.0": B.half()}, "of several dtypes where one is needed x.0"),
        ({"x.0": A, "y.0": B, "t.x": B}, "not the copy of x.0 that the config says t.x"),
        ({"x.0": A, "z": A}, "missing y.0; left over z"),
        ({f"z{i}": A for i in range(9)}, "missing x.0, y.0; left over z0, z1, z2 and 6 more"),
    ],
)
def test_one_error_lists_all(theirs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_ours(DictTensors(theirs), FUSE, SIX, "here")


@pytest.mark.parametrize(
    ("table", "ours", "message"),
    [
        ((Copy("a", "x"),), {"a": A, "b": B}, "no rule of this layout speaks of b"),
        ((Copy("a", "x"), Copy("{name}", "m.{name}")), {"a": A}, "two rules speak of a"),
        ((Split(("a", "b"), "x"),), {"a": A}, "a rule needs beside others of ours b"),
        ((Fuse("a", ("x", "y")),), {"a": numbered(5, 2)}, "does not divide"),
        ((Split(("a", "b"), "x"),), {"a": A, "b": C.half()}, "of several dtypes where one is needed x"),
        ((Invented("a", "why"),), {"a": A}, "the layout has no place for a"),
    ],
)
def test_models_that_a_table_cannot_hold(table: Table, ours: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_theirs(DictTensors(ours), table, "there")
