"""glibc's allocator, told to keep large blocks instead of giving each tensor back to the kernel.

On a CPU a good part of eager torch's time in a convolutional network is page faults: glibc maps
every large tensor anew. Raising two thresholds keeps the memory with the process. Results are
unchanged; the price is that freed memory is not returned before the process ends.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform

__all__ = ["tune_allocator"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEEP_BYTES = 2**31 - 1  # mallopt takes a C int
_OLD_LIMIT_BYTES = 32 * 2**20  # the largest mmap threshold that glibc before 2.35 accepts

logger = logging.getLogger(__name__)


def tune_allocator(enabled: bool = True) -> bool:
    """Raise glibc's mmap and trim thresholds for this process and say so in the log.

    Args:
        enabled: False leaves the allocator alone, so that a configuration can switch it off;
            so does the environment variable `LAMINA_TUNE_ALLOCATOR=0`.

    Returns:
        Whether the allocator took both settings.
    """
    if not enabled or os.environ.get("LAMINA_TUNE_ALLOCATOR") == "0":
        logger.info("allocator: left as it is (switched off)")
        return False
    if platform.libc_ver()[0] != "glibc":
        logger.info("allocator: left as it is (not glibc)")
        return False
    libc = ctypes.CDLL("libc.so.6")
    took_mmap = any(
        libc.mallopt(_M_MMAP_THRESHOLD, limit) == 1 for limit in (_KEEP_BYTES, _OLD_LIMIT_BYTES)
    )
    took_trim = libc.mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES) == 1
    accepted = bool(took_mmap and took_trim)
    logger.info("allocator: glibc thresholds %s", "raised" if accepted else "refused")
    return accepted
