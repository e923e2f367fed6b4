"""The patterns of zeros that a recipe may ask for; `prune.unstructured` makes them."""

import re

from edgewright.errors import BadInput


def parse_pattern(pattern: str, where: str = "prune.zero") -> tuple[str, tuple[int, int]]:
    """ "magnitude", "tensor", "N:M" or "block", and the two numbers of the latter two."""
    if pattern in ("magnitude", "tensor"):
        return pattern, (0, 0)
    if found := re.fullmatch(r"([1-9]\d?)([:x])([1-9]\d?)", pattern):
        first, second = int(found[1]), int(found[3])
        if found[2] == ":" and first < second:
            return "N:M", (first, second)
        if found[2] == "x" and first * second > 1:
            return "block", (first, second)
    raise BadInput(
        where,
        expected='"magnitude", "tensor", blocks of outputs by inputs such as "4x1", or N:M with '
        '0 < N < M such as "2:4"',
        found=repr(pattern),
    )
