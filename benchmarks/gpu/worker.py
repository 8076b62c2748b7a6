"""The process that runs parts, one after the other, and sends its results over a pipe."""

import gc
import os
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu.parts import Part

__all__ = ["work"]


def work(connection: Connection, parts: Sequence[Part], device: str, tiny: bool, ends: float, patience: float) -> None:
    """Run `parts`. On CUDA, stop after the first that fails, because a failed kernel leaves the device unusable.

    Messages: "machine" or "impossible" once; for every part "begin", the messages of `Bench`, and "end" with "error"
    (None if the part succeeded).

    Args:
        ends: deadline for all parts, by `time.monotonic`.
        patience: factor for the limits of the parts.
    """
    # These variables are read when torch and transformers are imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    from benchmarks.gpu.bench import Bench, OutOfTime, time_limit
    from benchmarks.gpu.machine import describe

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        connection.send({"kind": "impossible", "text": "There is no CUDA device. Use --device cpu --tiny."})
        return
    connection.send({"kind": "machine", "value": describe(target)})
    for part in parts:
        limit = min(time.monotonic() + part.seconds * patience, ends)
        connection.send({"kind": "begin", "part": part.name})
        error: dict[str, Any] | None = None
        torch.manual_seed(0)
        try:
            with time_limit(limit - time.monotonic()):
                import_module(f"benchmarks.gpu.{part.name}").run(Bench(target, tiny, limit, connection.send))
        except OutOfTime as late:
            error = {"status": "out of time", "text": str(late)}
        # No exception of a part may keep the others from running.
        except Exception as broken:
            text = f"{type(broken).__name__}: {broken}"
            error = {"status": "failed", "text": text, "traceback": traceback.format_exc()}
        connection.send({"kind": "end", "error": error})
        if error is not None and error["status"] == "failed" and target.type == "cuda":
            return
        gc.collect()
        if target.type == "cuda":
            torch.cuda.empty_cache()
