"""What a figure must carry to be worth anything: versions, machine, command."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BUSY", "describe_machine", "load_average", "peak_memory", "peak_of", "warn_if_busy"]

BUSY = 1.3  # load average from which somebody else is at work
PACKAGES = ("moestro", "torch", "numpy", "transformers")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, command line, processor and threads of this process; the accelerator where one is used."""
    about: dict[str, Any] = {
        "command": shlex.join(["moestro", *sys.argv[1:]]),
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


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` had at its most beyond what was there before it; None where the system does not tell.

    On the CPU resident memory of the process, which counts everybody's buffers, in pages.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is kept free would hide what is taken
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def load_average() -> list[float] | None:
    """Mean number of running processes over 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None


def warn_if_busy(load: list[float] | None) -> str | None:
    """One line for a machine on which somebody else is at work."""
    if load is None or load[0] <= BUSY:
        return None
    return f"warning: load average {load[0]:.1f} at the start (over {BUSY}): others are at work, figures will scatter"


def _status(name: str) -> int | None:
    """Bytes, from a line of /proc/self/status."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


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
