"""Part 1: hardware and versions of this machine, and how fast it copies and multiplies."""

import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

from benchmarks.clock import median_seconds
from benchmarks.floor import matmul_rate
from benchmarks.gpu.bench import Bench

__all__ = ["describe", "run"]

_PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "liger-kernel", "flash-attn")


def describe(device: torch.device) -> dict[str, Any]:
    """Card, driver and versions."""
    found: dict[str, Any] = {"device": device.type, "python": platform.python_version()}
    found |= {name: _version(name) for name in _PACKAGES}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "memory_gb": card.total_memory / 1e9,
            "multiprocessors": card.multi_processor_count,
        }
        found |= {"cuda": torch.version.cuda, "driver": _driver(), "capability": f"{card.major}.{card.minor}"}
    else:
        found |= {"card": None, "driver": None, "processor": platform.processor() or platform.machine()}
        found["threads"] = torch.get_num_threads()
    return found


def run(bench: Bench) -> None:
    size = 256 if bench.tiny else 8192
    numbers = 2**20 if bench.tiny else 2**31
    source = torch.zeros(numbers, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), bench.device, repeats=10)
    bench.report("copy", 2 * numbers / seconds / 1e9, "GB/s, read and written")
    for dtype in (torch.float32, torch.bfloat16):
        rate = matmul_rate(size, 10, device=bench.device, dtype=dtype)
        bench.report(f"matmul {str(dtype).removeprefix('torch.')}", rate / 1e12, f"TFLOP/s at {size} x {size}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver version from nvidia-smi; None if there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0]
