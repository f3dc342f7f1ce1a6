"""What a figure must carry to be worth anything: versions, machine, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from typing import Any

import torch

__all__ = ["describe_machine", "peak_memory"]

PACKAGES = ("moestro", "torch", "numpy", "transformers")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, command line, processor and threads of this process; the accelerator where one is used."""
    about: dict[str, Any] = {
        "command": " ".join(["moestro", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        about["accelerator"] = torch.cuda.get_device_name(device)
    return about


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the most that this process has had resident, and has had allocated on the accelerator."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["accelerator"] = torch.cuda.max_memory_allocated(device)
    return peak


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
