"""The bars: what the clients' figures must not fall short of, each a ratio in one run or a count."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

Figures = dict[str, Any]


class Bar(NamedTuple):
    """name: what is measured. value: its figure, None if it was not measured. least: True if value must be at
    least the bound, else at most. counts: True if it is no matter of time, and holds in the smallest run."""

    name: str
    value: float | None
    least: bool
    bound: float
    counts: bool = False

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.least else self.value <= self.bound

    def __str__(self) -> str:
        figure = "not measured" if self.value is None else f"{self.value:.3g}"
        sign = ">=" if self.least else "<="
        return f"{'holds' if self.holds else 'FALLS SHORT':<12}{self.name}: {figure} ({sign} {self.bound:g})"


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _value(figure: Callable[[], float]) -> float | None:
    try:
        return figure()
    except KeyError:
        # The peer is not here.
        return None


def bars(found: Figures) -> list[Bar]:
    """Every bar, with its figure of this run."""

    def importing(other: str, name: str = "twin_device") -> Callable[[], float]:
        seconds = found["import"]
        return lambda: ratio(seconds[name]["seconds"], seconds[other]["seconds"])

    def single(kind: str, other: str) -> Callable[[], float]:
        return lambda: ratio(found["single"]["twin_device"][kind], found["single"][other][kind])

    def first(other: str) -> float:
        twins = found["first_twin"]
        return ratio(twins["twin_device"]["seconds"], twins[other]["seconds"])

    def resident(other: str) -> Callable[[], float]:
        fleets = found["fleets"]
        return lambda: float(ours["resident_kib"] / fleets[other]["sizes"][size]["resident_kib"])

    size = str(max(found["sizes"]))
    ours = found["fleets"]["twin_device.aio"]["sizes"][size]
    large = found["large"]
    many = large["twin_device.aio"]
    hang = many["hang"]
    apart, beside = ([value for values in hang[name] for value in values] for name in ("without", "with"))

    def later(share: float) -> float:
        return 1000 * (quantile(beside, share) - quantile(apart, share))

    clients = f"{many['clients']:,} clients"
    return [
        Bar("import and one client, to paho", _value(importing("paho")), False, 1.10),
        Bar("import and one client, to azure-iot-device", _value(importing("azure-iot-device")), False, 0.50),
        Bar(
            "import twin_device alone, to the bare interpreter",
            _value(importing("the bare interpreter", "import twin_device")),
            False,
            1.5,
        ),
        Bar(
            "first twin, 100 ms away, to azure-iot-device",
            _value(lambda: first("azure-iot-device")),
            False,
            0.70,
        ),
        Bar("packets of a first twin", found["first_twin"]["twin_device"]["packets"], False, 6, True),
        Bar("reports one by one, to paho at QoS 0", _value(single("one_by_one", "paho")), True, 0.95),
        Bar(
            "reports one by one, to azure-iot-device",
            _value(single("one_by_one", "azure-iot-device")),
            True,
            1.8,
        ),
        Bar("patches of 50 reports at once", max(found["single"]["twin_device"]["patches"]), False, 2, True),
        Bar(
            "50 reports at once, to azure-iot-device", _value(single("at_once", "azure-iot-device")), True, 10
        ),
        Bar(
            f"memory of {size} clients, to paho on one loop", _value(resident("paho, one loop")), False, 1.15
        ),
        Bar(f"threads of {size} clients", ours["threads"], False, 1, True),
        Bar(
            f"memory of {size} clients, to azure-iot-device", _value(resident("azure-iot-device")), False, 0.1
        ),
        Bar(f"share of {clients} synchronised", many["connected"] / many["clients"], True, 1, True),
        Bar(f"KiB each of {clients}", many["kib_each"], False, 80),
        Bar(
            f"p50 of a report among {clients} beside one whose handshake hangs, to without it",
            ratio(*(list(map(statistics.median, hang[name])) for name in ("with", "without"))),
            False,
            1.1,
        ),
        Bar("  ms that its p99 is later", later(0.99), False, 50),
    ]
