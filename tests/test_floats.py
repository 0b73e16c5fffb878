"""A board's floats have 32 bits: neither a report nor a setting may come again because of it.

No interpreter with such floats installs here; the core is told that it has them, and is given numbers as a
board would read them.
"""

import json
import struct

import pytest

from twin_device.core import patch, settings, twin


def on_board(number: float) -> float:
    """What a board makes of a number."""
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def text_of(number: float) -> str:
    """What MicroPython writes for it: seven digits, which are not always enough."""
    return f"{number:.7g}"


class Board:
    """A twin on a board, and a hub that holds what was written, digit by digit."""

    def __init__(self) -> None:
        self.twin = twin.Twin()
        self.settings = settings.Settings(self.twin)
        self.applied: list[object] = []
        self.reported: dict[str, object] = {}
        self.reported_version = 1
        self.sent: list[dict[str, object]] = []

    def connect(self, desired: str) -> None:
        """A connection from its beginning to synchronised. desired: JSON, as the hub has it."""
        self.perform(self.twin.disconnected(0, 0.0))
        self.perform(self.twin.start(0))
        self.perform(self.twin.tick(0, 0.0))
        self.perform(self.twin.connected(0, 0.0))
        self.desired = desired
        self.perform(self.twin.subscribed((0, 0), 0, 0.0))

    def report(self, document: dict[str, object]) -> None:
        self.perform(self.twin.report(document, 0)[1])

    def perform(self, outputs: list[object]) -> None:
        for output in outputs + self.settings.observe(outputs, 0):
            if isinstance(output, settings.Apply):
                self.applied.append(output.value)
                self.perform(self.settings.applied(output.name, None, 0))
            elif isinstance(output, twin.Publish):
                self._answer(output.topic, output.payload)

    def _answer(self, topic: str, payload: bytes) -> None:
        request = topic.partition("$rid=")[2]
        if "/GET/" in topic:
            held = json.dumps(self.reported)
            document = f'{{"desired": {self.desired}, "reported": {held}}}'
            read = json.loads(document, parse_float=lambda text: on_board(float(text)))
            read["desired"]["$version"] = 1
            read["reported"]["$version"] = self.reported_version
            answer, answered = f"$iothub/twin/res/200/?$rid={request}", read
        else:
            sent = json.loads(payload, parse_float=lambda text: float(text_of(float(text))))
            self.sent.append(sent)
            self.reported = patch.merge(self.reported, sent)
            self.reported_version += 1
            answer = f"$iothub/twin/res/204/?$rid={request}&$version={self.reported_version}"
            answered = b""
        self.perform(self.twin.message_received(answer, answered, 0, 0.0))


# 16777.217 and 0.1 * 3 are not the same again after seven digits.
NUMBERS = [59.91273812, 0.1 * 3, 16777.217, 8388608.5, 1.17549435e-38, -123.4567]


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(patch, "_NOISE", 1e-6)
    return Board()


@pytest.mark.parametrize("number", NUMBERS)
def test_what_was_reported_is_not_reported_again(board: Board, number: float) -> None:
    board.connect("{}")
    board.report({"temperature": on_board(number), "list": [on_board(number)]})
    assert len(board.sent) == 1
    for _ in range(3):
        board.connect("{}")
    board.report({"temperature": on_board(number)})
    assert len(board.sent) == 1
    board.report({"temperature": on_board(number * 1.001)})
    assert len(board.sent) == 2


@pytest.mark.parametrize("number", NUMBERS)
def test_what_was_applied_is_not_applied_again(board: Board, number: float) -> None:
    board.settings.declare("gain")
    board.connect(f'{{"gain": {{"high": {number!r}}}}}')
    assert board.applied == [{"high": on_board(number)}]
    sent = len(board.sent)
    for _ in range(3):
        board.connect(f'{{"gain": {{"high": {number!r}}}}}')
    assert len(board.applied) == 1
    assert len(board.sent) == sent


def test_with_64_bits_every_digit_counts() -> None:
    assert not patch.same(1.0, 1.0000000001)
    assert patch.same(1.0, 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1.0, 1, True), (1.0, True, False), (0.0, 0.0, True), (0.0, 1e-9, False), (1.5, "1.5", False)],
)
def test_other_kinds_are_told_apart_as_ever(board: Board, one: object, other: object, same: bool) -> None:
    assert patch.same(one, other) is same
    assert patch.same(other, one) is same
