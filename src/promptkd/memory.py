"""The memory of this process: what it holds, its peak, and what to say when an allocator fails."""

import errno
import re
import sys
from pathlib import Path

import psutil

_CLEAR_REFS = Path("/proc/self/clear_refs")
_NO_MEMORY = (
    "out of memory",  # CUDA and MPS, also where it is no torch.OutOfMemoryError, as in the capture of a graph
    "DefaultCPUAllocator: can't allocate memory",  # Linux
    "DefaultCPUAllocator: not enough memory",  # elsewhere
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_before_restarts = 0


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def resident_memory() -> int:
    return psutil.Process().memory_info().rss  # bytes


def peak_memory() -> int:
    """The most bytes of main memory that this process has held, also before `restart_peak`."""
    return max(_before_restarts, _since_restart())


def restart_peak() -> int | None:
    """Restart the system's count of the peak; return the peak since the last restart, None if the system cannot."""
    global _before_restarts
    reached = _since_restart()
    try:
        _CLEAR_REFS.write_text("5")  # proc(5): sets the peak of the resident set to its current size
    except OSError:
        return None
    _before_restarts = max(_before_restarts, reached)
    return reached


def _since_restart() -> int:
    if sys.platform == "linux" and (found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # of Unix alone

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, of a device or of main memory, said that it has no more memory."""
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in _NO_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def memory_status(error: BaseException) -> str:
    """What was held, of how much, and how much more was requested, as far as known: a sentence."""
    import torch  # commands that need none ask for the peak, too

    more = ""
    if asked := re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", str(error), re.IGNORECASE):
        more = f", and {gibibytes(int(float(asked[1]) * _UNITS[asked[2].lower()]))} more were asked for"
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        return f"{gibibytes(torch.cuda.memory_allocated())} of the GPU's {gibibytes(total)} were allocated{more}."
    total = psutil.virtual_memory().total
    return f"The process held {gibibytes(resident_memory())} of the machine's {gibibytes(total)}{more}."
