"""Which settings of a run may change when it is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core.config import Config
from ..core.errors import UserError
from .config import TrainRun

__all__ = ["Change", "changes", "check"]

# What these change is where, how fast or how often, not what is computed. `data` is judged by the text itself.
HARMLESS = (
    "device",
    "threads",
    "save_every",
    "report",
    "tensorboard",
    "starved_after",
    "recording",
    "data",
    "eval_every",
)


class Change(tuple[str, Any, Any]):
    """(field path, old value, new value)."""

    def __str__(self) -> str:
        return f"{self[0]}: {self[1]} -> {self[2]}"


def changes(old: TrainRun, new: TrainRun) -> list[Change]:
    """Every setting that differs, by path."""
    return list(_differ("", old.to_dict(), new.to_dict()))


def check(old: TrainRun, new: TrainRun, step: int) -> list[Change]:
    """The differing settings, when a run at `step` may go on with them. Raises `UserError` naming those that may not.

    Harmless are device, threads, how often is saved and evaluated, the trace and the report; micro_batch, when balance
    losses are taken over the whole batch; the path of the data, when the text is the same; and steps, when the
    learning rate of every step already taken stays what it was (WSD before its decay), as do the values of knobs, and
    no step is left undone.
    """
    found = changes(old, new)
    bad = [c for c in found if not _harmless(c[0], old, new, step)]
    if bad:
        raise UserError(
            f"resume: settings that would make it another run: {'; '.join(map(str, bad))}. Leave them out, or start a "
            "new run in another folder" + _hint(bad)
        )
    return found


def _harmless(path: str, old: TrainRun, new: TrainRun, step: int) -> bool:
    if path.split(".")[0] in HARMLESS:
        return True
    if path == "micro_batch":
        return old.balance_over == new.balance_over == "batch"
    if path == "steps":
        past = old.optimizer.schedule
        taken = range(step)
        if any(knob.value(s, old.steps) != knob.value(s, new.steps) for knob in old.knobs for s in taken):
            return False
        return new.steps >= step and all(past.factor(s, old.steps) == past.factor(s, new.steps) for s in taken)
    return False


def _hint(bad: list[Change]) -> str:
    if any(c[0] == "steps" for c in bad):
        return "; steps can be changed while the learning rate of the steps taken stays the same (schedule WSD)"
    return ""


def _differ(path: str, old: Any, new: Any) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            below = f"{path}.{name}" if path else name
            if name not in old or name not in new:
                yield Change((below, old.get(name, "unset"), new.get(name, "unset")))
            else:
                yield from _differ(below, old[name], new[name])
    elif old != new:
        yield Change((path, _short(old), _short(new)))


def _short(value: Any) -> Any:
    if isinstance(value, Config):
        return value.type_name()
    return value if len(str(value)) <= 60 else str(value)[:57] + "..."
