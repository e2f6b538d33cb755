"""What tells one drawn insect from another: build, pattern, colour, legs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import ConfigurationError

__all__ = ["COLOURS", "MOST_CLASSES", "Build", "Pattern", "Traits", "traits_of"]

Build = Literal["beetle", "moth", "wasp", "caterpillar", "bug", "grasshopper", "fly", "ant"]
Pattern = Literal["plain", "banded", "spotted", "lined", "two-toned"]

# Colour of the body and of the pattern on it: red, green, blue.
COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "brown": ((122, 78, 42), (226, 190, 120)),
    "black": ((44, 42, 50), (232, 196, 70)),
    "red": ((182, 46, 34), (34, 26, 26)),
    "yellow": ((222, 186, 58), (46, 38, 28)),
    "green": ((104, 158, 66), (30, 58, 30)),
    "blue": ((58, 96, 156), (206, 218, 226)),
    "pale": ((220, 208, 178), (112, 76, 52)),
    "orange": ((222, 120, 36), (52, 34, 28)),
}

_BUILDS: tuple[Build, ...] = get_args(Build)
_PATTERNS: tuple[Pattern, ...] = get_args(Pattern)
MOST_CLASSES = len(_BUILDS) * len(_PATTERNS) * len(COLOURS) * 2


@dataclass(frozen=True)
class Traits:
    """The marks of a class.

    Args:
        build: shape of the body, wings and legs.
        pattern: on the abdomen, or on the wings of a moth.
        colour: key of `COLOURS`.
        long_legs: legs and antennae half as long again.
    """

    build: Build
    pattern: Pattern
    colour: str
    long_legs: bool

    @property
    def name(self) -> str:
        """Return a name for the class, different from those of all others."""
        legs = "long-legged " if self.long_legs else ""
        return f"{legs}{self.colour} {self.pattern} {self.build}"


def traits_of(label: int) -> Traits:
    """Return the marks of class `label`.

    The first eight classes differ in their build, and in pattern and colour as well. From the ninth
    on some share all but one mark.

    Raises:
        ConfigurationError: there is no such class.
    """
    if not 0 <= label < MOST_CLASSES:
        raise ConfigurationError(
            f"label {label} of an insect phantom; expected 0 to {MOST_CLASSES - 1}"
        )
    turn, build = divmod(label, len(_BUILDS))
    turn, pattern = divmod(turn, len(_PATTERNS))
    legs, colour = divmod(turn, len(COLOURS))
    # Shifts by build and pattern: one to one, and neighbours differ in more than one mark.
    pattern = (pattern + build) % len(_PATTERNS)
    colour = (colour + 3 * pattern + 2 * build) % len(COLOURS)
    return Traits(
        build=_BUILDS[build],
        pattern=_PATTERNS[pattern],
        colour=list(COLOURS)[colour],
        long_legs=bool((legs + pattern + build) % 2),
    )
