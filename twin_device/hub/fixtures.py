"""The pytest plugin of twin-device[hub]: the fixture `local_hub`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from . import LocalHub


@pytest.fixture(scope="session")
def _local_hub_certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Made once: a CA and a key cost more than the hub itself.
    return tmp_path_factory.mktemp("local-hub-certificates")


@pytest.fixture
def local_hub(_local_hub_certificates: Path) -> "Iterator[LocalHub]":
    """A running local hub, MQTT over TLS on a free loopback port; trust `local_hub.ca_file`."""
    from . import LocalHub

    hub = LocalHub(certificates=_local_hub_certificates)
    try:
        hub.start()
    except ModuleNotFoundError as error:
        pytest.fail(
            f"the fixture local_hub needs {error.name}: pip install 'twin-device[hub]'", pytrace=False
        )
    with hub:
        yield hub
