"""How the memory of a training step grows with the batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["BatchMemory", "Line", "highest"]

Line = tuple[int, int]  # bytes whatever the batch, bytes per sample


@dataclass(frozen=True)
class BatchMemory:
    """Peak memory of an update, for any batch.

    At every moment of a step what is alive is a line over the batch, and the peak is the highest of
    them: the optimizer's with few samples, that of the activations with many.

    Args:
        lines: of an update with one step.
        later_lines: of the second step of an update, when the gradients of the first are there, and
            of the optimizer after two; empty where an update of several steps is not known to be
            different.
        held_bytes: what each sample of earlier steps takes until the update.
        notes: what a reader of the figures should know.

    Example:
        >>> memory = BatchMemory.affine(100, 50)
        >>> memory.at(3), memory.largest_batch(320)
        (250, 4)
    """

    lines: tuple[Line, ...]
    later_lines: tuple[Line, ...] = ()
    held_bytes: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def affine(cls, base_bytes: int, sample_bytes: int) -> BatchMemory:
        """Return a memory that is a single line."""
        return cls(((base_bytes, sample_bytes),))

    def at(self, batch: int, steps: int = 1) -> int:
        """Return the bytes at the peak of an update of `steps` steps with `batch` samples each."""
        return max(base + each * batch for base, each in self._lines(steps))

    def largest_batch(self, limit_bytes: int, steps: int = 1) -> int:
        """Return the samples per step that fit into `limit_bytes`, 0 where not even one does.

        Where no sample adds anything the answer is a very large number.
        """
        room = [(limit_bytes - base, each) for base, each in self._lines(steps)]
        if any(left < each for left, each in room):
            return 0
        return min((left // each for left, each in room if each), default=2**31)

    def _lines(self, steps: int) -> list[Line]:
        if steps == 1:
            return list(self.lines)
        held = self.held_bytes * (steps - 2)
        later = [(base, each + held) for base, each in self.later_lines or self.lines]
        return [*self.lines, *later]


def highest(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Return `lines` without those that another one exceeds for every batch."""
    kept: list[Line] = []
    for base, each in sorted(set(lines), key=lambda line: (-line[1], -line[0])):
        if not kept or base > kept[-1][0]:
            kept.append((base, each))
    return tuple(kept)
