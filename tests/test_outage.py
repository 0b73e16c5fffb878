"""After an outage the clients do not come back together."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests import outage


@pytest.mark.parametrize("seed", [1, 2])
def test_a_fleet_comes_back_at_no_more_than_twice_an_even_rate(seed: int) -> None:
    seconds = outage.returns(outage.LONG, seed=seed)
    assert sum(seconds) == outage.CLIENTS
    assert outage.peak(seconds) <= 2 * outage.ideal()


def test_the_peak_is_that_of_the_busiest_window() -> None:
    assert outage.peak([0] * 20 + [outage.WINDOW] * outage.WINDOW + [0] * 20) == outage.WINDOW
    # All at once, as clients without jitter come.
    assert outage.peak([outage.CLIENTS] + [0] * 99) > 2 * outage.ideal()


def test_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outage, "OUTAGES", (outage.LONG,))
    monkeypatch.setattr("sys.argv", ["outage", "--image", str(tmp_path / "outage.svg")])
    assert outage.main() == 0
    assert "1.9" in capsys.readouterr().out
    bars = ElementTree.parse(tmp_path / "outage.svg").iter("{http://www.w3.org/2000/svg}rect")
    assert sum(1 for _ in bars) == 1 + 2 * outage.LONGEST_WAIT
