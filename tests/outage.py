"""10,000 clients come back after an outage: how many connects a second the hub sees. `make outage` draws it.

Every client is the core itself, told that its connection was lost, then that each dial failed, until the hub
is there again; chance comes from a seed. The ideal: all of them spread evenly over the longest wait (100 s).
It is the measure where the outage was long enough for the clients to wait so long.
"""

import argparse
import heapq
import random
import sys
from pathlib import Path

from twin_device.core.twin import Connect, Twin

CLIENTS = 10_000
LONGEST_WAIT = 100  # seconds, the core's cap
# Connects are counted over so many seconds: shorter, chance alone makes peaks.
WINDOW = 10
OUTAGES = (60, 300, 1800)
LONG = 300  # seconds: by then nearly every client waits for up to LONGEST_WAIT
IMAGE = Path(__file__).parents[1] / ".github" / "images" / "outage.svg"


def returns(outage: int, clients: int = CLIENTS, seed: int = 1) -> list[int]:
    """Connects in every second after the hub came back, when it was away for so many seconds."""
    chance = random.Random(seed)
    end = outage * 1000
    waiting: list[tuple[int, int, Twin]] = []

    def lose(number: int, twin: Twin, now: int) -> None:
        twin.disconnected(now, chance.random())
        assert twin.deadline is not None
        heapq.heappush(waiting, (twin.deadline, number, twin))

    for number in range(clients):
        twin = Twin()
        twin.start(0)
        twin.connected(0, chance.random())
        lose(number, twin, 0)
    seconds = [0] * (2 * LONGEST_WAIT)
    while waiting:
        now, number, twin = heapq.heappop(waiting)
        assert any(type(output) is Connect for output in twin.tick(now, chance.random()))
        if now < end:
            lose(number, twin, now)
        else:
            seconds[(now - end) // 1000] += 1
    return seconds


def peak(seconds: list[int]) -> float:
    """Connects a second in the busiest WINDOW."""
    return max(sum(seconds[at : at + WINDOW]) for at in range(len(seconds) - WINDOW + 1)) / WINDOW


def ideal(clients: int = CLIENTS) -> float:
    """Connects a second if all were spread evenly."""
    return clients / LONGEST_WAIT


def drawn(found: dict[int, list[int]]) -> str:
    """The figures as an SVG image: a row for each outage."""
    width, height, left, top, gap = 760, 110, 60, 34, 46
    most = 3 * ideal()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 20}" '
        f'height="{top + len(found) * (height + gap)}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18" font-size="14">{CLIENTS:,} clients come back: connects a second</text>',
    ]
    for row, (outage, seconds) in enumerate(found.items()):
        base = top + row * (height + gap) + height
        step = width / len(seconds)

        def level(value: float, base: int = base) -> float:
            return base - height * min(value, most) / most

        for second, count in enumerate(seconds):
            parts.append(
                f'<rect x="{left + second * step:.1f}" y="{level(count):.1f}" width="{step:.1f}" '
                f'height="{base - level(count):.1f}" fill="#4477aa"/>'
            )
        for value, text in ((ideal(), "even"), (2 * ideal(), "twice")):
            parts.append(
                f'<line x1="{left}" x2="{left + width}" y1="{level(value):.1f}" y2="{level(value):.1f}" '
                f'stroke="#cc3311" stroke-dasharray="4 3"/>'
                f'<text x="{left - 52}" y="{level(value) + 4:.1f}">{text} {value:.0f}</text>'
            )
        parts.append(
            f'<text x="{left}" y="{base + 16}">seconds after the hub is back (0 to {len(seconds)}); '
            f"it was away for {outage} s; at most {peak(seconds):.0f} a second over {WINDOW} s</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--image", type=Path, default=IMAGE, help="where the image goes (default: %(default)s)"
    )
    image = parser.parse_args().image
    found = {outage: returns(outage) for outage in OUTAGES}
    image.write_text(drawn(found))
    for outage, seconds in found.items():
        print(
            f"away for {outage:4} s: at most {peak(seconds):.0f} connects a second, "
            f"{peak(seconds) / ideal():.2f} x the even {ideal():.0f}"
        )
    return max(int(peak(found[outage]) > 2 * ideal()) for outage in OUTAGES if outage >= LONG)


if __name__ == "__main__":
    sys.exit(main())
