"""Tell that memory ran out from other errors, on any device."""

from __future__ import annotations

__all__ = ["is_out_of_memory"]

# How torch says it where it does not raise its OutOfMemoryError: the CPU's allocator on Linux and
# on Windows, cuDNN and cuBLAS.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that a device or the machine has no memory left.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
        True
        >>> is_out_of_memory(RuntimeError("shapes do not match"))
        False
    """
    # by name, so that asking does not load torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in _WORDS)
