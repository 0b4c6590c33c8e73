"""Outlines of a mask as polygons, along the edges of its pixels.

A polygon's corners are corners of pixels: pixel (row y, column x) is the square from (x, y) to (x + 1, y + 1), as in
COCO. Filled, the polygons are the mask again: exactly where a pixel belongs to what holds its centre. Each part of the
mask (pixels that share an edge) is one polygon. COCO's polygons have no holes: a hole is joined to what surrounds it
by a cut of no width, which is passed in both directions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Point = tuple[int, int]


def polygons(mask: npt.NDArray[np.bool_]) -> list[list[Point]]:
    """Returns the parts of a mask `[H, W]` as polygons of corners (x, y), each closed from its last to its first."""
    rings = _rings(mask)
    edges = _VerticalEdges(rings)
    # Of each ring, by the start of an edge: height at which a hole is joined to the edge, and the hole's own outline.
    joined: dict[tuple[int, int], list[tuple[int, list[Point]]]] = defaultdict(list)
    found: dict[int, list[Point]] = {}
    # A hole is joined to what is on its left, which begins further left: from the right, each ring has all its holes.
    for number in sorted(range(len(rings)), key=lambda each: -rings[each].left):
        ring = rings[number]
        outline = _outline(ring.points, number, joined)
        if not ring.is_hole:
            found[number] = _without_straight(outline)
            continue
        x, y = ring.points[0]
        # The pixels from the hole to the left, to the first that is outside.
        outside = np.flatnonzero(~mask[y, :x])
        host_x = int(outside[-1]) + 1 if len(outside) else 0
        joined[edges.at(host_x, y)].append((y, [(host_x, y), *outline, outline[0], (host_x, y)]))
    return [found[number] for number in sorted(found)]


class _Ring(NamedTuple):
    """Corners of an outline, in order; the first begins its leftmost edge, downwards or upwards. `left`: its x."""

    points: list[Point]
    is_hole: bool
    left: int


def _rings(mask: npt.NDArray[np.bool_]) -> list[_Ring]:
    """Returns the outlines of a mask's parts and holes."""
    padded = np.pad(mask, 1)
    up_left, up_right, low_left, low_right = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    turns = up_left ^ up_right ^ low_left ^ low_right
    # Where two pixels touch at a corner alone, two outlines turn.
    falling = up_left & low_right & ~up_right & ~low_left
    rising = up_right & low_left & ~up_left & ~low_right
    double = falling | rising
    rows, columns = np.nonzero(turns | double)
    times = 1 + double[rows, columns]
    y, x = np.repeat(rows, times), np.repeat(columns, times)
    count = len(y)
    second = np.zeros(count, bool)
    second[np.cumsum(times)[times == 2] - 1] = True
    # Of two turns at one point, the first takes the edge to the left; and the edge upwards where pixels fall, else the
    # edge downwards: so that each stays with its own pixel.
    swapped = second ^ rising[y, x]
    beside = _pairs(np.lexsort((second, x, y)))
    above = _pairs(np.lexsort((swapped, y, x)))

    rings, seen = [], bytearray(count)
    xs, ys, across, down = x.tolist(), y.tolist(), beside.tolist(), above.tolist()
    for start in range(count):
        if seen[start]:
            continue
        nodes, node = [], start
        while not seen[node]:
            other = across[node]
            seen[node] = seen[other] = 1
            nodes += [node, other]
            node = down[other]
        # The first in rows and columns: what is below it on the right is within the ring.
        is_hole = not mask[ys[start], xs[start]]
        points = [(xs[node], ys[node]) for node in nodes]
        left = min(point[0] for point in points)
        rings.append(_Ring(_from_left(points, left), is_hole, left))
    return rings


def _pairs(order: Integers) -> Integers:
    """Returns for each turn the other end of its edge: turns in this order are the two ends of edges."""
    partner = np.empty_like(order)
    partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
    return partner


def _from_left(points: list[Point], left: int) -> list[Point]:
    """Returns a ring's points from the upper end of one of its leftmost edges, which leads down."""
    # Points come in pairs along rows: the leftmost edge leads from the end of one pair to the begin of the next.
    for at in range(len(points)):
        if points[at][0] == left and points[(at + 1) % len(points)][0] == left:
            if points[at][1] > points[(at + 1) % len(points)][1]:
                points = points[::-1]
                at = len(points) - 2 - at
            return points[at:] + points[:at] if at >= 0 else [points[-1], *points[:-1]]
    raise AssertionError("a ring has an edge on its left")


class _VerticalEdges:
    """The edges along columns of all rings, by where they are."""

    def __init__(self, rings: list[_Ring]) -> None:
        self._columns: dict[int, list[tuple[int, int, tuple[int, int]]]] = defaultdict(list)
        for number, ring in enumerate(rings):
            for at, (x, y) in enumerate(ring.points):
                next_x, next_y = ring.points[(at + 1) % len(ring.points)]
                if x == next_x:
                    self._columns[x].append((min(y, next_y), max(y, next_y), (number, at)))
        for edges in self._columns.values():
            edges.sort()

    def at(self, x: int, y: int) -> tuple[int, int]:
        """Returns ring and start of the edge at column line `x` beside the pixels of row `y`."""
        edges: Any = self._columns[x]
        return edges[bisect_right(edges, y, key=lambda edge: edge[0]) - 1][2]


def _outline(
    points: list[Point], number: int, joined: dict[tuple[int, int], list[tuple[int, list[Point]]]]
) -> list[Point]:
    """Returns a ring's points with the holes that are joined to its edges."""
    outline: list[Point] = []
    for at, point in enumerate(points):
        outline.append(point)
        holes = joined.get((number, at))
        if holes:
            is_down = points[(at + 1) % len(points)][1] > point[1]
            for _, hole in sorted(holes, key=lambda each: each[0], reverse=not is_down):
                outline += hole
    return outline


def _without_straight(points: list[Point]) -> list[Point]:
    """Returns a polygon without points that are given twice in a row or lie within an edge."""
    kept: list[Point] = []
    for point in points:
        if kept and kept[-1] == point:
            continue
        while len(kept) > 1 and _is_between(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    while len(kept) > 1 and kept[-1] == kept[0]:
        kept.pop()
    while len(kept) > 3 and _is_between(kept[-2], kept[-1], kept[0]):
        kept.pop()
    while len(kept) > 3 and _is_between(kept[-1], kept[0], kept[1]):
        kept.pop(0)
    return kept


def _is_between(first: Point, middle: Point, last: Point) -> bool:
    """Returns whether the way goes straight on at the middle one of three points."""
    (a, b), (c, d), (e, f) = first, middle, last
    return (c - a) * (f - d) == (d - b) * (e - c) and (c - a) * (e - c) + (d - b) * (f - d) >= 0
