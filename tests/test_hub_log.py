"""What the hub remembers of its devices is bounded for the whole hub, and fair as long as it can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hub_wire import KEY, REPORT, RES, Wire, online, publish
from twin_device.hub import LocalHub
from twin_device.hub.log import Log

NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), NAMES, st.integers(0, 12)),
        st.tuples(st.just("append"), st.just("a"), st.integers(0, 1)),
        st.tuples(st.just("clear"), NAMES, st.none()),
        st.tuples(st.just("renew"), NAMES, st.none()),
    ),
    max_size=120,
)
EACH, MOST, MOST_BYTES = 4, 7, 20


@given(steps=STEPS)
def test_the_oldest_of_all_go_first(steps: list[tuple[str, str, int | None]]) -> None:
    log: Log[tuple[int, int]] = Log(EACH, MOST, MOST_BYTES, lambda item: item[1])
    for name in "abc":
        log.add(name)
    kept: list[tuple[str, tuple[int, int]]] = []
    for number, (step, name, size) in enumerate(steps):
        if step == "append":
            item = (number, size or 0)
            log.append(name, item)
            kept.append((name, item))
            if sum(one == name for one, _ in kept) > EACH:
                kept.remove(next(pair for pair in kept if pair[0] == name))
            while len(kept) > MOST or sum(item[1] for _, item in kept) > MOST_BYTES:
                del kept[0]
        else:
            log.clear(name)
            if step == "renew":
                log.remove(name)
                assert name not in log
                log.add(name)
            kept = [pair for pair in kept if pair[0] != name]
        assert len(log) == len(kept)
        for one in "abc":
            assert log[one] == tuple(item for owner, item in kept if owner == one)


def test_a_talkative_one_costs_a_quiet_one_nothing_as_long_as_there_is_room() -> None:
    log: Log[int] = Log(10, 100, 1000, lambda _item: 1)
    for name in ("quiet", "talkative"):
        log.add(name)
    log.append("quiet", -1)
    for number in range(5000):
        log.append("talkative", number)
    assert log["quiet"] == (-1,)
    assert log["talkative"] == tuple(range(4990, 5000))
    # What has left is forgotten, too.
    assert len(log._turns) <= 2 * 100


def test_all_devices_of_a_hub_share_the_room_for_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.mqtt._ALL_PACKETS", 40)
    with LocalHub(None, 0) as hub:
        names = [f"dev{number}" for number in range(5)]
        for name in names:
            hub.create_device(name, KEY)
        wires: list[Wire] = []
        try:
            # CONNECT, CONNACK, SUBSCRIBE and SUBACK of each: 20 packets.
            wires += [online(hub.mqtt_port, name, KEY, RES) for name in names]
            assert [len(hub.device(name).packets) for name in names] == [4] * 5
            # 30 more; the first 10 have to go.
            for number in range(15):
                wires[4].ask(f"{REPORT}{number}", b"{}")
            assert [len(hub.device(name).packets) for name in names] == [0, 0, 2, 4, 34]
            assert [one.kind for one in hub.device("dev2").packets] == ["SUBSCRIBE", "SUBACK"]
            # When it was last heard of is known all the same.
            heard = [hub.device(name).twin["lastActivityTime"] for name in names]
            assert heard == sorted(heard)
            assert heard[0] > "2000"
            hub.device("dev4").clear_packets()
            assert hub.device("dev4").twin["lastActivityTime"] == heard[4]
        finally:
            for wire in wires:
                wire.close()


def test_large_packets_are_counted_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twin_device.hub.mqtt._ALL_BYTES", 300_000)
    with LocalHub(None, 0) as hub:
        device = hub.create_device("dev", KEY)
        with online(hub.mqtt_port) as wire:
            for size in (100_000, 120_000, 140_000):
                wire.send(publish("devices/dev/messages/events/", b"x" * size))
            wire.nothing_waits()
        sizes = [len(one.payload) for one in device.packets if one.kind == "PUBLISH"]
        assert sizes == [120_000, 140_000]
        assert [len(one.payload) for one in device.telemetry] == [120_000, 140_000]
