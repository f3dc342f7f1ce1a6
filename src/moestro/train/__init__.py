"""Training: the loop, exact resume, the dense twin, run folders. `run.run` does it all, `load.load` reads a run."""

from .config import TrainRun

__all__ = ["TrainRun"]
