"""Memory that was freed and that the allocator has kept."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps tensors of tens of megabytes, and more with every use."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
