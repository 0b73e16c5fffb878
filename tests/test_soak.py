"""The soak's short form, and that it would see what it is there to see."""

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.soak import App, Sample, Soak, main, plot, rise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it measures by /proc")


def test_a_short_soak_breaks_no_promise_and_leaves_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "soak.svg"
    # Each client replaces its token once or twice; too short to tell growth from warming up.
    short = [
        "--minutes",
        "0.05",
        "--clients",
        "20",
        "--renewal",
        "2",
        "--pause",
        "0.2",
        "--plot",
        str(picture),
    ]
    main(short)
    printed = capsys.readouterr().out
    broken = [line for line in printed.splitlines() if line.startswith("broken") and " grew by " not in line]
    assert broken == []
    assert "| memory |" in printed
    assert "| in use |" in printed
    assert "20 clients for" in printed
    assert "promises broken" in printed.splitlines()[-1]
    assert len(ElementTree.parse(picture).getroot().findall("{*}polyline")) == 3


FLAT = [Sample(float(second), 50 << 20, 40, 220) for second in range(100)]
# what was measured, the promise that is broken
GROWING = [
    ("", FLAT),
    ("", [replace(one, memory=(30 << 20) if one.seconds < 20 else one.memory) for one in FLAT]),
    ("", [replace(one, descriptors=220 + int(one.seconds) % 3) for one in FLAT]),
    ("memory grew", [replace(one, memory=one.memory + int(one.seconds) * 50_000) for one in FLAT]),
    ("in use grew", [replace(one, in_use=int(one.seconds) * 20_000) for one in FLAT]),
    ("threads grew", [replace(one, threads=40 + int(one.seconds) // 30) for one in FLAT]),
    ("descriptors grew", [replace(one, descriptors=220 + int(one.seconds) // 10) for one in FLAT]),
]


@pytest.mark.parametrize(("broken", "samples"), GROWING)
def test_what_grows_after_the_warm_up_is_a_broken_promise(broken: str, samples: list[Sample]) -> None:
    soak = Soak(100, 200, 1, 60, 1)
    soak.samples = samples
    soak._judge()
    assert [text.partition(" by ")[0] for text in soak.broken] == ([broken] if broken else [])


def test_the_slope_is_that_of_a_line() -> None:
    line = [replace(one, threads=int(3 * one.seconds)) for one in FLAT]
    grown, slope = rise(line, "threads")
    assert grown == pytest.approx(3 * 74, abs=3)
    assert slope == pytest.approx(3 * 3600)
    assert plot(line, "a title").startswith("<svg ")


def test_a_handler_that_is_given_the_wrong_patch_is_noticed() -> None:
    app = App("one", None)
    app.changed({"a": 1}, {"a": 1})
    assert app.wrong == []
    app.changed({"a": 2}, {"a": 3})
    app.failed(ValueError("no"))
    app.failed(ZeroDivisionError())
    assert len(app.wrong) == 2
