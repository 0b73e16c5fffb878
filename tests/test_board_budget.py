"""What the board's client may cost, in short; `make board-budget` measures it."""

from collections.abc import Iterator

import pytest

from tests.benchmarks.board import CASES, MOST_MPY, Bench, Case


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("budget")) as bench:
        yield bench


@pytest.mark.parametrize("case", [case for case in CASES if case.budget], ids=lambda case: case.name)
def test_the_twin_fits(bench: Bench, case: Case) -> None:
    assert case.budget is not None
    assert bench.fits(case, case.budget)


def test_a_heap_that_is_too_small_is_noticed(bench: Bench) -> None:
    assert not bench.fits(CASES[0], 60)


def test_the_modules_that_every_app_loads_fit(bench: Bench) -> None:
    loaded = bench.loaded()
    assert loaded == {"__init__.mpy"}
    assert sum(bench.sizes[name] for name in loaded) <= MOST_MPY
