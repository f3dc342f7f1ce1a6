"""The contract of a published system's comparison: what is compared, on what, and which rule decides. No torch here.

A file `papers/<slug>.py` sets `PAPER = Paper(...)`. It may not load torch when it is imported (lists and help read it);
what trains imports torch inside its functions.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ..core.config import Config
from ..core.errors import UserError
from .catalogue import Entry

__all__ = [
    "Agree",
    "Arm",
    "Bars",
    "Claim",
    "Computed",
    "Counted",
    "Difference",
    "Diverged",
    "Effect",
    "Figures",
    "Job",
    "Lines",
    "Outcome",
    "Paper",
    "Published",
    "Ratio",
    "describe_part",
    "find_part",
]

Figures = Mapping[str, Mapping[str, float]]  # arm -> figure -> value, of one seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One contender: the system, a baseline, or the system without one of its ingredients.

    equal: what it shares with the system's arm. "updates": as many optimiser steps; "flops": as many steps as make
    equal training FLOPs; "both": as many steps, and FLOPs that must agree within 1 percent (a dense twin).
    """

    name: str
    about: str = ""
    """What it is, in a few words."""
    model: Config | None = None
    """What is trained; its `flops_per_token` counts the arm. None where `cost` says it."""
    seq_len: int = 1
    """Tokens per sequence that FLOPs are counted at."""
    passes: int = 1
    """Forward and backward passes per update."""
    cost: float | None = None
    """Training FLOPs per token and update, where the model alone does not give them (frozen parts, several models)."""
    equal: Literal["updates", "flops", "both"] = "updates"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else `train` must know of it: values that JSON can hold."""
    train: Callable[[Job], Outcome] | None = None
    """How it is trained, if not as the paper's other arms."""

    def flops(self) -> float:
        """Training FLOPs per token of one update, counted from the config."""
        if self.cost is not None:
            return self.cost
        if self.model is None:
            raise UserError(f"arm {self.name}: give it a model or a cost, so that its FLOPs can be counted")
        return self.passes * self.model.flops_per_token(self.seq_len, "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training that an arm is asked for.

    shared: a folder that all arms of this seed read, filled by the paper's `prepare`. tick: to be called after every
    update (or several at once), for the progress bar.
    """

    arm: Arm
    seed: int
    lr: float
    updates: int
    data: Any
    shared: Path
    smoke: bool = False
    tick: Callable[[int], None] = lambda updates: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training gave. validation: what learning rates are chosen by, lower is better, from validation data only.

    test: figure -> value, on test data. curves: name -> points (x, y) for the picture.
    """

    validation: float
    test: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[float, float]]] = dataclasses.field(default_factory=dict)


class Diverged(UserError):
    """A training whose loss is no longer finite. While learning rates are chosen, it only rules one of them out."""


class Effect(Protocol):
    """A number per seed, above 0 where that seed is as the paper predicts."""

    def __call__(self, figures: Figures) -> float: ...

    def describe(self) -> str:
        """The rule in words: kept in the record."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better arm `of` is than arm `than` in a figure; `relative`: as a share of the latter's.

    within: how much worse it may be and still be as predicted ("no worse than"); the effect is then the distance to
    that border. than_figure: the other arm's figure, where it has another name.
    """

    figure: str
    of: str
    than: str
    better: Literal["lower", "higher"] = "lower"
    relative: bool = False
    within: float = 0.0
    than_figure: str = ""

    def __call__(self, figures: Figures) -> float:
        ours, theirs = figures[self.of][self.figure], figures[self.than][self.than_figure or self.figure]
        gain = theirs - ours if self.better == "lower" else ours - theirs
        return (gain / abs(theirs) if self.relative else gain) + self.within

    def describe(self) -> str:
        other = f"{self.than_figure} of {self.than}" if self.than_figure else self.than
        share = ", as a share of the latter" if self.relative else ""
        margin = f", plus {self.within:g}" if self.within else ""
        return f"{self.figure}: how much {self.better} {self.of} is than {other}{share}{margin}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agree:
    """How far inside `within` the figures of two arms lie of each other; `relative`: as a share of the second's."""

    figure: str
    of: str
    than: str
    within: float
    relative: bool = False

    def __call__(self, figures: Figures) -> float:
        ours, theirs = figures[self.of][self.figure], figures[self.than][self.figure]
        apart = abs(ours - theirs)
        return self.within - (apart / abs(theirs) if self.relative else apart)

    def describe(self) -> str:
        share = ", as a share of the latter" if self.relative else ""
        return f"{self.figure}: {self.within:g} minus the distance of {self.of} and {self.than}{share}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times smaller (better "higher": larger) a figure of `of` is than that of `than`, minus `times`."""

    figure: str
    of: str
    than: str
    times: float = 1.0
    better: Literal["lower", "higher"] = "lower"

    def __call__(self, figures: Figures) -> float:
        ours, theirs = figures[self.of][self.figure], figures[self.than][self.figure]
        above, below = (theirs, ours) if self.better == "lower" else (ours, theirs)
        if below == 0:
            raise UserError(f"{self.describe()}: a division by 0")
        return above / below - self.times

    def describe(self) -> str:
        return f"{self.figure}: how many times {self.better} {self.of} is than {self.than}, minus {self.times:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computed:
    """Any other effect: a function of arm -> figure -> value, with the rule in words."""

    text: str
    function: Callable[[Figures], float]

    def __call__(self, figures: Figures) -> float:
        return self.function(figures)

    def describe(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper and the rule that decides on it, see `record.judge`.

    threshold: what the mean effect must reach. main: whether the paper's verdict rests on it.
    """

    text: str
    effect: Effect
    threshold: float = 0.0
    main: bool = True

    def describe(self) -> str:
        return f"{self.effect.describe()}; above 0 in every seed and at least {self.threshold:g} on the mean"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of the paper, with ours beside it: the mean of `ours` over seeds. why: what keeps us from showing it."""

    what: str
    figure: float | str
    unit: str = ""
    ours: Effect | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """A quantity that is computed, not trained: ours beside the published one."""

    what: str
    ours: float
    published: float | None = None
    unit: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """A picture with one panel per figure and one bar per arm: mean, whiskers of one standard deviation."""

    figures: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """A picture with one curve per arm that has it, averaged over seeds where they share x."""

    curve: str
    x: str
    y: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """One published system: its citation, its parts, and the comparison that shows its claim."""

    entry: Entry
    """The citation, from the catalogue."""
    parts: Mapping[str, str]
    """What it is made of -> `module:Name`, usable in any model."""
    example: str
    """Python that uses the parts in a few lines; it is run by the tests."""
    data: Callable[[Path], Any]
    """Loads the data from a folder, in the original format. Raises `UserError` saying where missing files come from."""
    sample: Callable[[Path], object]
    """Writes a few rows in the original format into a folder, for smoke runs."""
    arms: Callable[[bool], Sequence[Arm]]
    """The contenders; called with True for a smoke run, which may have smaller models."""
    system: str
    """Name of the arm that is the paper's system: the others get its updates or its FLOPs."""
    updates: int
    """Optimiser steps of the system's arm."""
    train: Callable[[Job], Outcome]
    """Trains one arm and evaluates it."""
    grid: tuple[float, ...]
    """Learning rates that every arm may choose from, by validation, with the first seed."""
    figures: Mapping[str, str]
    """Figure -> what it is, with its unit."""
    claims: tuple[Claim, ...]
    picture: Bars | Lines
    prepare: Callable[[Job], object] | None = None
    """Fills `job.shared` once per seed: a base model that several arms begin with. (The job's arm is the system's.)"""
    published: tuple[Published, ...] = ()
    counted: Callable[[], Sequence[Counted]] | None = None
    preset: str = ""
    """The preset that trains it on other data: moestro train PRESET."""
    tuning: float = 1.0
    """Share of an arm's updates that choosing its learning rate takes per candidate. At 1 the chosen candidate is the
    first seed's run."""
    smoke_updates: int = 2
    revision: int = 1
    """To be raised when `train`, `prepare` or `data` give something else: runs of before are then not gone on with."""
    notes: tuple[str, ...] = ()
    """What a reader must know: what was tried, what differs from the paper."""

    def __post_init__(self) -> None:
        where = self.entry.slug
        if not self.grid or len(set(self.grid)) != len(self.grid) or min(self.grid) <= 0:
            raise UserError(f"{where}: the grid needs learning rates, each above 0 and there once")
        if not 0 < self.tuning <= 1:
            raise UserError(f"{where}: tuning must be above 0 and at most 1, found {self.tuning}")
        if min(self.updates, self.smoke_updates) < 1:
            raise UserError(f"{where}: updates must be at least 1")
        if not any(claim.main for claim in self.claims):
            raise UserError(f"{where}: the verdict needs a main claim")


def find_part(name: str) -> Any:
    """What `module:Name` names. Raises `UserError` where there is no such thing."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError):  # ValueError: an empty name
        raise UserError(f"no part {name!r}; parts are named package.module:Name") from None


def describe_part(name: str) -> str:
    """The first line of a part's docstring (a value's: of its module's), read from source: nothing is loaded."""
    module, _, attribute = name.partition(":")
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise UserError(f"no part {name!r}; parts are named package.module:Name")
    tree = ast.parse(Path(found.origin).read_text(encoding="utf-8"))
    told: ast.AST = tree
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            told = node
        if isinstance(node, ast.ImportFrom) and any((n.asname or n.name) == attribute for n in node.names):
            package = module if found.submodule_search_locations else module.rpartition(".")[0]
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            return describe_part(f"{origin}:{attribute}")
    return (ast.get_docstring(told) or "").split("\n")[0]
