"""Published systems: the table of all of them, the contract of a comparison, and the runner that makes its record."""

from .catalogue import CATALOGUE, Entry, entry
from .paper import Agree, Arm, Bars, Claim, Computed, Counted, Difference, Job, Lines, Outcome, Paper, Published, Ratio
from .registry import State, comparison, registered, state

__all__ = [
    "CATALOGUE",
    "Agree",
    "Arm",
    "Bars",
    "Claim",
    "Computed",
    "Counted",
    "Difference",
    "Entry",
    "Job",
    "Lines",
    "Outcome",
    "Paper",
    "Published",
    "Ratio",
    "State",
    "comparison",
    "entry",
    "registered",
    "state",
]
