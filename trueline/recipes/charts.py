"""Line charts as inline SVG, for reports. Every number drawn can be read: axes, ticks, and a tooltip on each marked point.

Colours are CSS variables (`--c0`, `--c1`, ...) of the page, so a chart follows light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 34  # margins that hold the tick labels
LINE_POINTS = 300  # a chart is under 400 pixels wide: more points cannot be seen
NOISY = 60  # longer lines are drawn faintly, with their running mean on top
MARKS = 40  # points with a tooltip


@dataclass(frozen=True)
class Series:
    """One line: `(step, value)` in order of steps. `colour` is one of the page's, 0 to 2; `dashed` sets evaluation apart from training."""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over the same steps, in one unit."""

    title: str
    series: tuple[Series, ...]
    hint: str = ""  # one sentence: what is drawn, and which way is good
    x_name: str = "step"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover `[low, high]`, about `wanted` + 1 of them, in steps of 1, 2, 2.5 or 5 times a power of ten.

    >>> ticks(0.13, 0.94)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # constant but for rounding
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def number(x: float) -> str:
    """Short and exact enough to read off: 4 significant digits, thousands with a k, tiny ones as powers.

    >>> number(0.000012), number(1234567), number(0.98765), number(3.0)
    ('1.2e-5', '1235k', '0.9877', '3')
    """
    if x and abs(x) < 2e-3:
        mantissa, exponent = f"{x:.3g}".split("e") if "e" in f"{x:.3g}" else f"{x:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(x) >= 1e15:
        return f"{x:.3g}"
    if abs(x) >= 1e4:
        return f"{x / 1000:.4g}k" if abs(x) < 1e6 else f"{x / 1000:.0f}k"
    return f"{x:.4g}"


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the points, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred running mean over about a thirtieth of the points, so that a trend shows through the noise."""
    half = max(1, len(points) // 60)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    spans = ((max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points)))
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, spans, strict=True)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _axes(across: list[float], up: list[float], x_low: float, x_high: float, place: "Place", x_name: str) -> list[str]:
    """Grid, tick labels and the name of the x axis."""
    parts = []
    for y in up:
        _, py = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py + 3.5:.1f}" text-anchor="end">{number(y)}</text>')
    for x in across:
        if x_low <= x <= x_high:
            px, _ = place(x, up[0])
            anchor = "end" if px > WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{number(x)}</text>')
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>')
    return parts


@dataclass(frozen=True)
class Place:
    """Data coordinates to those of the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def __call__(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _line(series: Series, place: Place) -> list[str]:
    """One series: noisy long ones as a faint line under their running mean; marked points carry tooltips."""
    points = series.points
    noisy = len(points) > NOISY
    shown = smooth(points) if noisy else list(points)
    dash = ' stroke-dasharray="5 3"' if series.dashed else ""
    parts = []
    if noisy:
        parts.append(
            f'<path class="raw" style="stroke:var(--c{series.colour})" d="{_path([place(*p) for p in thin(points, LINE_POINTS)])}"/>'
        )
    if len(points) > 1:
        drawn = _path([place(*p) for p in thin(shown, LINE_POINTS)])
        parts.append(f'<path class="line" style="stroke:var(--c{series.colour})"{dash} d="{drawn}"/>')
    for x, y in thin(shown, MARKS):
        px, py = place(x, y)
        seen = 0 if noisy else 2.2
        label = f"{escape(series.name)}, {number(x)}: {number(y)}"
        parts.append(
            f'<g class="mark" style="fill:var(--c{series.colour})"><circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="{seen}"/>'
            f'<circle class="touch" cx="{px:.1f}" cy="{py:.1f}" r="7"/><title>{label}</title></g>'
        )
    return parts


def _extent(series: Series) -> list[float]:
    """What the y axis must cover. A single spike must not flatten the rest: of a noisy line the running mean and 96 % of the points."""
    values = [y for _, y in series.points]
    if len(values) <= NOISY:
        return values
    ordered, tail = sorted(values), len(values) // 50
    return [ordered[tail], ordered[-1 - tail], *(y for _, y in smooth(series.points))]


def draw(chart: Chart) -> Markup:
    """The chart as an `<svg>` element that fills its container's width. A chart without points says so."""
    finite = [(s, tuple(p for p in s.points if all(map(math.isfinite, p)))) for s in chart.series]
    series = [replace(s, points=points) for s, points in finite if points]
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" xmlns="http://www.w3.org/2000/svg">'
    if not series:
        return Markup(head + f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no points</text></svg>')
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for y in _extent(s)]
    up = ticks(min(ys), max(ys))
    place = Place(min(xs), max(xs), up[0], up[-1])
    across = [x for x in ticks(min(xs), max(xs)) if x == round(x)] if max(xs) > min(xs) else [xs[0]]
    body = _axes(across, up, min(xs), max(xs), place, chart.x_name)
    wide, high = WIDTH - LEFT, HEIGHT - BOTTOM + 3
    clip = f'<svg x="{LEFT}" y="0" width="{wide}" height="{high}" viewBox="{LEFT} 0 {wide} {high}">'  # noise stays inside the axes
    lines = [part for s in series for part in _line(s, place)]
    return Markup("".join([head, *body, clip, *lines, "</svg></svg>"]))


def increasing(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The points in order of steps; of several at one step (a resumed run) the last written."""
    return tuple(sorted(dict(points).items()))
