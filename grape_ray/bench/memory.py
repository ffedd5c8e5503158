"""Peak bytes above the loaded model, in a process that does nothing else.

On CPU the kernel's own record of the resident peak is reset once the model is loaded, and read
after the steps: (VmHWM after) - (VmRSS before). So everything is counted that the process touches
at once: optimizer state, gradients, activations, the allocator's waste, library scratch. Four
things keep it close to live bytes: glibc is told (ALLOCATOR) to map every block of 64 KiB or more
by itself, so that a freed tensor goes back to the kernel at once and no hole of an earlier step
hides a later one; there is one arena; a tiny model has taken the same steps before, so that lazy
imports, thread pools and compiled kernels are in the baseline; and free pages are returned before
the baseline is read. What stays is noise of a few MiB (pages and threads' stacks), so trust it to
about 1 % where the peak is hundreds of MiB, and not at all where it is a few. On a GPU it is
torch's own count.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
_PROC = Path("/proc/self")


def peak_bytes(device: str, work: Callable[[], None]) -> int | None:
    """Peak bytes of `work()` above what is held now; None where the kernel keeps no record that can
    be reset (not Linux).
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _reset_peak():
        return None
    before = status_bytes("VmRSS")
    work()
    return max(status_bytes("VmHWM") - before, 0)


def _reset_peak() -> bool:
    """Returns free pages to the kernel, then sets VmHWM to VmRSS (proc(5): clear_refs 5)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROC / "clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(
        line for line in (_PROC / "status").read_text().splitlines() if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024
