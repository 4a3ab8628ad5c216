"""Which points no other one beats, of figures that are better the smaller they are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def frontier(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """The names of the points that no other is at least as good as in both numbers and better in one, by the first number."""

    def beaten(name: Name) -> bool:
        a, b = points[name]
        return any(x <= a and y <= b and (x, y) != (a, b) for x, y in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])
