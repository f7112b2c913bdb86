"""Figures as SVG, in colours of the page's style; no package is needed."""

from collections.abc import Sequence
from html import escape
from math import ceil, floor, isfinite, isnan, log10
from typing import NamedTuple

from .runs import digits, duration

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 250, 56, 14, 12, 34
_MOST = 400  # points of a line


class Line(NamedTuple):
    """A line of a chart.

    Args:
        name: for the legend and the tooltips.
        points: (x, y), by x.
        colour: its number among the runs.
        dots: whether each point is marked.
        marks: (x, what happened there, kind): "bad" for losses, "good" for the best, "note" for checkpoints.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dots: bool = False
    marks: Sequence[tuple[float, str, str]] = ()


def chart(title: str, lines: Sequence[Line], x_name: str, zero: bool = False) -> str:
    """A chart of lines; "" if there is nothing in it.

    Args:
        title: above it.
        lines: what is shown.
        x_name: wall shows times, else numbers.
        zero: whether the y axis begins at 0.
    """
    lines = [line._replace(points=thin([p for p in line.points if all(map(isfinite, p))])) for line in lines]
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    xs, ys = zip(*points)
    logarithmic = not zero and min(ys) > 0 and max(ys) / min(ys) > 100
    x_axis = _Axis(min(0.0, *xs), max(xs), _LEFT, _WIDTH - _RIGHT, x_name == "wall")
    y_axis = _Axis(0.0 if zero else min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP, logarithmic=logarithmic)
    body = [_grid(x_axis, y_axis, "wall time" if x_name == "wall" else x_name)]
    for line in lines:
        body.append(_marks(line, x_axis))
        path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in line.points)
        body.append(f'<polyline class="line c{line.colour % 8}" points="{path}"/>')
        shown = line.points if line.dots or len(line.points) == 1 else line.points[-1:]
        for x, y in shown if len(shown) <= 80 else line.points[-1:]:
            at = duration(x) if x_name == "wall" else f"{x_name} {x:.4g}"
            body.append(
                f'<circle class="dot c{line.colour % 8}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3">'
                f"<title>{escape(line.name)}: {digits(y)} at {escape(at)}</title></circle>"
            )
    scale = " (logarithmic)" if logarithmic else ""
    return _figure(title + scale, body, _HEIGHT)


def heatmap(
    title: str, rows: Sequence[Sequence[float]], edges: Sequence[float], names: Sequence[str], unit: str
) -> str:
    """Cells in time, a row for each name: their colour is the value, from none to the most.

    `rows[i][j]`: the value of `names[i]` between `edges[j]` and `edges[j + 1]`, seconds; NaN: no cell.
    """
    if len(edges) < 2 or not rows:
        return ""
    high = max((value for row in rows for value in row if not isnan(value)), default=0.0) or 1.0
    row_height = max(3.0, min(22.0, 200 / len(rows)))
    bottom = _TOP + row_height * len(rows)
    axis = _Axis(edges[0], edges[-1], _LEFT + 24, _WIDTH - _RIGHT, True)
    body = []
    every = ceil(len(rows) * 11 / 200) if row_height < 11 else 1
    for i, (row, name) in enumerate(zip(rows, names)):
        y = _TOP + i * row_height
        if i % every == 0:
            body.append(
                f'<text class="tick" x="{_LEFT + 18}" y="{y + row_height / 2 + 4:.1f}" text-anchor="end">'
                f"{escape(name)}</text>"
            )
        for value, low, up in zip(row, edges, edges[1:]):
            if isnan(value):
                continue
            width = axis.at(up) - axis.at(low)
            body.append(
                f'<rect class="cell" x="{axis.at(low):.1f}" y="{y:.1f}" width="{max(width - 0.6, 0.4):.1f}" '
                f'height="{max(row_height - 1, 1):.1f}" fill-opacity="{0.04 + 0.96 * value / high:.3f}">'
                f"<title>{escape(name)}: {digits(value)} {unit}, {duration(low)} to {duration(up)}</title></rect>"
            )
    for value, label in axis.ticks():
        body.append(
            f'<text class="tick" x="{axis.at(value):.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{label}</text>'
        )
    return _figure(f"{title}; darkest: {digits(high)} {unit}", body, int(bottom + 26))


def thin(points: Sequence[tuple[float, float]], most: int = _MOST) -> list[tuple[float, float]]:
    """At most about `most` points: of each part the mean; the first and the last stay.

    >>> len(thin([(float(i), 1.0) for i in range(5000)])) <= 402
    True
    """
    if len(points) <= most:
        return list(points)
    size = ceil((len(points) - 2) / most)
    inner = points[1:-1]
    parts = [inner[i : i + size] for i in range(0, len(inner), size)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [points[0], *means, points[-1]]


class _Axis:
    """Where values lie between two places."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, time: bool = False, logarithmic: bool = False
    ) -> None:
        self._time, self._log = time, logarithmic
        if logarithmic:
            low, high = log10(low), log10(high)
        margin = 0.0 if time or start < stop else 0.06 * (high - low)
        floored = low - margin if low != 0 else 0.0
        self._low, self._high = floored, high + margin
        if self._low == self._high:
            self._low, self._high = self._low - (0.5 if self._low else 0.0), self._high + 0.5
        self._start, self._stop = start, stop

    def at(self, value: float) -> float:
        """Where `value` lies."""
        value = log10(value) if self._log else value
        return self._start + (value - self._low) / (self._high - self._low) * (self._stop - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        """Values to name, and their names."""
        if self._log:
            return [(10.0**n, f"{10.0**n:g}") for n in range(ceil(self._low), floor(self._high) + 1)]
        step = _nice((self._high - self._low) / 6, self._time)
        first = ceil(self._low / step - 1e-9)
        values = [n * step for n in range(first, floor(self._high / step + 1e-9) + 1)]
        if not self._time:
            return [(value, f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}") for value in values]
        return [(value, _clock(value, step)) for value in values]


def _nice(step: float, time: bool) -> float:
    """A round step of at least `step`."""
    if time and step > 5:
        choices = (10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)
        return next((float(n) for n in choices if n >= step), 86400.0 * ceil(step / 86400))
    power = 10.0 ** floor(log10(step))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= step * (1 - 1e-9))


def _clock(seconds: float, step: float) -> str:
    if step >= 86400:
        return f"{seconds / 86400:g} d"
    if step >= 3600:
        return f"{seconds / 3600:g} h"
    return f"{seconds / 60:g} min" if step >= 60 else f"{seconds:g} s"


def _grid(x_axis: _Axis, y_axis: _Axis, name: str) -> str:
    parts = []
    for value, label in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in x_axis.ticks():
        x = x_axis.at(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(name)}</text>')
    return "".join(parts)


def _marks(line: Line, axis: _Axis) -> str:
    parts = []
    for x, text, kind in line.marks:
        at = f"{axis.at(x):.1f}"
        top = _HEIGHT - _BOTTOM - 7 if kind == "note" else _TOP
        parts.append(
            f'<line class="mark {kind}" x1="{at}" x2="{at}" y1="{top}" y2="{_HEIGHT - _BOTTOM}">'
            f"<title>{escape(text)}</title></line>"
        )
    return "".join(parts)


def _figure(title: str, body: Sequence[str], height: int) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )
