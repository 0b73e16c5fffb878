"""Tokens are replaced under load, and nobody notices: the short form of `make renewals`."""

from tests.renewals import Run


def test_renewals_under_load_lose_nothing() -> None:
    run = Run(renewals=60, clients=20, lifetime=2)
    assert run.run() == []
    assert run.renewals >= 60
    assert sum(side.answered for side in run.sides) > 60
