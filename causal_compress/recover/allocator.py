"""What glibc does with memory that training frees."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Parameters of mallopt(3), as malloc.h numbers them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _OWN_MAPPING = 2**31 - 1, 2**30
_USUAL_MAPPING = 2**25


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process, to be used again; afterwards what is free goes back to the system.

    Each training step allocates and frees the same activations. glibc gives the free end of its heap back in between,
    so that thousands of pages are mapped and cleared anew in every step, unless chance has put something lasting there.

    Source: mallopt(3).
    Limits: glibc only; elsewhere nothing is done. The process's peak is that of its largest step, as ever. Settings
        can't be read, so afterwards they are those to which glibc itself comes once it has freed blocks of 32 MiB; a
        process that had set its own (`MALLOC_TRIM_THRESHOLD_`, mallopt) sets them again.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    library.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_MAPPING)
        library.mallopt(_MMAP_THRESHOLD, _USUAL_MAPPING)
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library if it is glibc's; None elsewhere."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None
    wanted = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return library if all(hasattr(library, name) for name in wanted) else None
