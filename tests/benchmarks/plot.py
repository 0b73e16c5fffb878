"""The clients' figures as a picture: python -m tests.benchmarks.plot figures.json picture.svg

An SVG without any library: a group of bars for each figure, each group to a scale of its own.
"""

import json
import statistics
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

_COLOURS = {
    "twin_device": "#1565c0",
    "twin_device.aio": "#42a5f5",
    "azure-iot-device": "#ef6c00",
    "paho": "#757575",
    "paho, one loop": "#757575",
}
_LABELS, _BARS, _ROW, _GAP = 190, 420, 18, 30  # pixels


def groups(found: Figures) -> list[tuple[str, str, dict[str, float]]]:
    """Each group's title, how its values are written, and a value for each contestant that has one."""

    def of(section: str, value: Callable[[Figures], float]) -> dict[str, float]:
        return {name: value(figures) for name, figures in found[section].items() if name in _COLOURS}

    size = str(max(found["sizes"]))

    def at_rest(figure: str) -> dict[str, float]:
        return of("fleets", lambda one: one["sizes"][size][figure])

    median = statistics.median
    return [
        ("import and one client, ms", "{:.0f}", of("import", lambda one: 1000 * median(one["seconds"]))),
        (
            "first twin through a link of 100 ms, ms",
            "{:.0f}",
            of("first_twin", lambda one: 1000 * median(one["seconds"])),
        ),
        ("reports a second, one by one", "{:,.0f}", of("single", lambda one: median(one["one_by_one"]))),
        ("reports a second, 50 at once", "{:,.0f}", of("single", lambda one: median(one["at_once"]))),
        (
            f"memory of {size} clients in one process, MiB",
            "{:.0f}",
            {name: kib / 1024 for name, kib in at_rest("resident_kib").items()},
        ),
        (f"threads of {size} clients", "{:,.0f}", at_rest("threads")),
        (f"wake-ups a second of {size} idle clients", "{:,.0f}", at_rest("wakeups")),
    ]


def draw(found: Figures) -> str:
    """The whole SVG."""
    drawn: list[str] = []
    y = 10

    def text(x: float, y: float, what: str, **attributes: str) -> None:
        more = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        drawn.append(f'<text x="{x:.0f}" y="{y:.0f}"{more}>{escape(what)}</text>')

    for title, form, values in groups(found):
        y += _ROW
        text(10, y, title, font_weight="bold")
        most = max(values.values()) or 1.0
        for name, value in values.items():
            y += _ROW
            width = max(1.0, _BARS * value / most)
            text(_LABELS - 8, y, name, text_anchor="end")
            drawn.append(
                f'<rect x="{_LABELS}" y="{y - 12}" width="{width:.1f}" height="14" fill="{_COLOURS[name]}"/>'
            )
            text(_LABELS + width + 6, y, form.format(value))
        y += _GAP - _ROW
    width = _LABELS + _BARS + 80
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 10}" width="{width}" '
            f'height="{y + 10}" font-family="sans-serif" font-size="13">',
            f'<rect width="{width}" height="{y + 10}" fill="white"/>',
            *drawn,
            "</svg>\n",
        ]
    )


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    figures, picture = map(Path, sys.argv[1:])
    picture.write_text(draw(json.loads(figures.read_text("utf-8"))), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
