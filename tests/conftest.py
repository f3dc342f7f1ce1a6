"""Tests are many and small: one thread each, and two at a time (`-n 2` in pyproject.toml)."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import torch

torch.set_num_threads(1)
