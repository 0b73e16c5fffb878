"""What CI installs is pinned, all of it, and fits what pyproject.toml asks for."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCK = Path(__file__).parents[1] / ".ci" / "lock.txt"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> dict[str, str]:
    lines = [line for line in LOCK.read_text("utf-8").splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    return {normal(name): version for name, version in pins.items()}


def asked() -> list[Requirement]:
    found = [Requirement(text) for text in metadata.requires("twin-device") or []]
    # CI does not install what fuzzing needs.
    return [one for one in found if normal(one.name) != "twin-device" and "fuzz" not in str(one.marker)]


@pytest.mark.parametrize("wanted", asked(), ids=str)
def test_each_requirement_is_pinned_to_a_version_that_fits(wanted: Requirement) -> None:
    pins = pinned()
    assert normal(wanted.name) in pins, "make lock PYTHON=python3.10"
    assert wanted.specifier.contains(pins[normal(wanted.name)], prereleases=True)
