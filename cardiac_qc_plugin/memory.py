"""Memory of a training process."""

import ctypes

__all__ = ["keep_memory"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_memory() -> bool:
    """Let the C library keep what a training step frees, for the next step.

    glibc gives buffers of 32 MiB and more back to the kernel, which fills every page of the next one with zeros: steps
    of the DN and the U-net take much longer (docs/performance.md). The process's memory stays at its peak.

    Returns:
        Whether the C library could be told: it is glibc.

    Example::

        >>> keep_memory() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20}
    return all([mallopt(option, value) for option, value in settings.items()])
