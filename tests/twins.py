"""Twins of the sizes that boards are measured with: half of the leaves desired, half reported."""

import json
import random
from typing import Any

# By their size as JSON: how many leaves the twin has.
LEAVES = {8: 315, 32: 1376, 64: 2809}
_UNITS = ("celsius", "percent", "hectopascal", "parts per million")
_MODES = ("automatic", "manual", "off")


def section(leaves: int, seed: int) -> dict[str, Any]:
    """Sensors in halls, each an object of eight properties; 23 bytes of JSON a leaf."""
    chance = random.Random(seed)
    document: dict[str, Any] = {}
    count = 0
    while count < leaves:
        number = len(document)
        sensor = {
            "telemetryInterval": chance.randrange(5, 900),
            "threshold": chance.randrange(0, 1000) / 10,
            "enabled": chance.random() < 0.5,
            "unit": chance.choice(_UNITS),
            "place": f"sensor {number} beside door {chance.randrange(40)} of hall No. {chance.randrange(9)}",
            "offset": chance.randrange(-100, 100),
            "gain": chance.randrange(1, 1000) / 100,
            "mode": chance.choice(_MODES),
        }
        sensor = dict(list(sensor.items())[: leaves - count])
        document[f"sensor{number:03}"] = sensor
        count += len(sensor)
    return document


def twin(size: int) -> dict[str, Any]:
    """A twin of about so many KB of JSON (8, 32 or 64), as a retrieve gives it."""
    half = LEAVES[size] // 2
    return {
        "desired": {**section(half, 1), "$version": 1},
        "reported": {**section(LEAVES[size] - half, 2), "$version": 1},
    }


def json_bytes(document: Any) -> int:
    """Bytes of a document as compact JSON."""
    return len(json.dumps(document, separators=(",", ":")))
