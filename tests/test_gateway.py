"""TwinGateway against the local hub: a fleet that is added, refused, cut off and removed."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_mock import MockerFixture

from tests.test_aio import run, sockets_to, soon, until
from tests.waiting import PATIENCE
from twin_device import ConnectRefused, LocalError, NotConnected, ReportRejected, aio, gateway
from twin_device.gateway import TwinGateway
from twin_device.hub import Device, LocalHub

MakeGateway = Callable[..., TwinGateway]
WRONG_KEY = "d3Jvbmd3cm9uZ3dyb25nd3Jvbmd3cm9uZ3dyb25nISE="


@pytest.fixture
def make_gateway(local_hub: LocalHub) -> MakeGateway:
    def make(**options: Any) -> TwinGateway:
        options = {"ca_file": local_hub.ca_file, "timeout": PATIENCE, "connects_per_second": 1000, **options}
        return TwinGateway(**options)

    return make


@pytest.fixture
def fleet(local_hub: LocalHub) -> Callable[[int], list[Device]]:
    return lambda count: [local_hub.create_device(f"dev-{n}", desired={"n": n}) for n in range(count)]


def wrong(text: str) -> str:
    before, _, _ = text.rpartition("SharedAccessKey=")
    return f"{before}SharedAccessKey={WRONG_KEY}"


def refusals(states: TwinGateway) -> list[str]:
    return [row.device_id for row in states.status if row.rejected is not None]


# ---------------------------------------------------------------------- a fleet


def test_a_fleet_gets_its_patches_and_reports_for_itself(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        devices = fleet(20)
        calls: dict[str, list[Any]] = {}
        made = make_gateway()

        @made.on_desired
        async def changed(device_id: str, patch: dict[str, Any], desired: dict[str, Any]) -> None:
            calls.setdefault(device_id, []).append((dict(patch), dict(desired)))
            await made.report(device_id, {"n": desired["n"]})
            # They are the handler's own.
            patch.clear()
            desired.clear()

        for device in devices[:10]:
            made.add(device.connection_string)
        assert made.summary == (10, 0, 0, 0, None)
        async with made:
            for device in devices[10:]:
                made.add(device.connection_string)
            assert await made.settled(PATIENCE)
            summary = made.summary
            assert (summary.devices, summary.connected, summary.synchronised, summary.rejected) == (
                20,
                20,
                20,
                0,
            )
            devices[3].patch_desired({"n": 300})
            await until(lambda: devices[3].reported == {"n": 300}, "the report")
            for device in devices:
                await until(lambda d=device: d.reported, f"the report of {device.id}")
            assert {device.id: device.reported["n"] for device in devices} == {
                f"dev-{n}": n if n != 3 else 300 for n in range(20)
            }
            row = {row.device_id: row for row in made.status}["dev-3"]
            assert (row.state, row.connected, row.synchronised, row.rejected) == (
                "synchronised",
                True,
                True,
                None,
            )
            assert row.last_change is not None
            assert time.time() - PATIENCE < row.since <= row.last_change <= time.time()
            assert made.summary.last_change == row.last_change
            assert await made.report("dev-5", {"n": 5}, always=True) == 3
            with pytest.raises(ReportRejected, match="412"):
                await made.report("dev-5", {"n": 6}, version=1)
            assert [row.device_id for row in made.status] == [device.id for device in devices]
        assert calls["dev-3"] == [({"n": 3}, {"n": 3}), ({"n": 300}, {"n": 300})]
        assert all(calls[f"dev-{n}"] == [({"n": n}, {"n": n})] for n in range(20) if n != 3)
        assert made.summary.connected == 0

    run(test())


def test_devices_come_and_go_while_it_runs(
    local_hub: LocalHub, make_gateway: MakeGateway, fleet: Any
) -> None:
    async def test() -> None:
        first, second = fleet(2)
        states: list[Any] = []
        async with make_gateway() as made:
            assert await made.settled(0)
            client = made.add(first.connection_string)
            made.on_state(lambda device_id, old, new: states.append((device_id, new)))
            assert made.client("dev-0") is client
            with pytest.raises(LocalError, match="the gateway has dev-0 already"):
                made.add(first.connection_string)
            assert not await made.settled(0)
            made.add(second.connection_string)
            assert await made.settled(PATIENCE)
            await made.remove("dev-0")
            assert client.state == "offline"
            assert [row.device_id for row in made.status] == ["dev-1"]
            with pytest.raises(LocalError, match="the gateway has no 'dev-0'"):
                await made.report("dev-0", {"a": 1})
            with pytest.raises(LocalError, match="the gateway has no 'dev-0'"):
                await made.remove("dev-0")
            made.add(first.connection_string)
            assert await made.settled(PATIENCE)
            assert made.summary[:4] == (2, 2, 2, 0)
            assert await made.report("dev-0", {"a": 1}) == 2
        assert ("dev-0", "synchronised") in states
        assert ("dev-1", "synchronised") in states
        assert sockets_to(local_hub.mqtts_port or 0) == []

    run(test())


def test_a_module_stands_beside_its_device(local_hub: LocalHub, make_gateway: MakeGateway) -> None:
    async def test() -> None:
        device, module = local_hub.create_device("dev-0"), local_hub.create_device("dev-0/thermostat")
        async with make_gateway() as made:
            for one in (device, module):
                made.add(one.connection_string)
            assert await made.settled(PATIENCE)
            assert await made.report("dev-0/thermostat", {"a": 1}) == 2
        assert (device.reported, module.reported) == ({}, {"a": 1})

    run(test())


def test_a_device_may_have_options_and_handlers_of_its_own(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        first, second = fleet(2)
        made = make_gateway(keep_alive=30)
        special = made.add(first.connection_string, keep_alive=77)
        plain = made.add(second.connection_string)
        assert (special._keep_alive, plain._keep_alive) == (77, 30)
        applied = []
        special.setting("n")(applied.append)
        async with made:
            await until(lambda: first.reported.get("n", {}).get("status") == "Success", "it is applied")
        assert applied == [0]

    run(test())


# ---------------------------------------------------------------------- what goes wrong with one


@pytest.mark.parametrize("how", ["wrong key", "disabled", "unknown"])
def test_a_device_that_is_refused_does_not_disturb_the_rest(
    make_gateway: MakeGateway, fleet: Any, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        devices = fleet(5)
        texts = [device.connection_string for device in devices]
        if how == "disabled":
            devices[2].disable()
        else:
            texts[2] = wrong(texts[2]) if how == "wrong key" else texts[2].replace("dev-2", "dev-9")
        refused = "dev-9" if how == "unknown" else "dev-2"
        made = make_gateway()
        async with made:
            for text in texts:
                made.add(text)
            assert await made.settled(PATIENCE)
            assert made.summary[:4] == (5, 4, 4, 1)
            assert refusals(made) == [refused]
            row = made.status[2]
            assert row.rejected is not None
            assert row.rejected.startswith("the hub refused the credentials (CONNACK 5)")
            assert [await made.report(f"dev-{n}", {"a": 1}) for n in (0, 1, 3, 4)] == [2, 2, 2, 2]
            # It is tried again slowly, not at the pace of an outage.
            deadline = made.client(refused)._twin.deadline
            assert deadline is not None
            assert deadline - time.monotonic() * 1000 > 20_000
        (told,) = [record.getMessage() for record in caplog.records if record.name == "twin_device.gateway"]
        assert told.startswith(f"{refused}: the hub refused the credentials")
        assert WRONG_KEY not in caplog.text

    run(test())


def test_who_waits_for_the_fleet_does_not_wait_for_what_was_removed(
    make_gateway: MakeGateway, fleet: Any
) -> None:
    async def test() -> None:
        async with make_gateway(connects_per_second=0.01) as made:
            for device in fleet(2):
                made.add(device.connection_string)
            settled = asyncio.ensure_future(made.settled())
            await until(lambda: made.summary.synchronised == 1, "the first has no wait")
            assert not settled.done()
            await made.remove("dev-1")
            assert await soon(settled) is True

    run(test())


def test_a_certificate_that_cannot_be_right_is_its_own_devices_affair(
    local_hub: LocalHub, make_gateway: MakeGateway, fleet: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        errors: list[Any] = []
        files = (tmp_path / "none.pem", tmp_path / "none.key")
        made = make_gateway()
        made.on_error(lambda device_id, error: errors.append((device_id, str(error))))
        host = f"HostName=localhost:{local_hub.mqtts_port};x509=true;DeviceId="
        made.add(f"{host}early", certificate=files)
        async with made:
            made.add(fleet(1)[0].connection_string)
            made.add(f"{host}late", certificate=files)
            assert await made.settled(PATIENCE)
            assert made.summary[:4] == (3, 1, 1, 2)
            assert refusals(made) == ["early", "late"]
        assert [device_id for device_id, _ in errors] == ["early", "late"]
        assert all("none.pem' cannot be read: No such file" in told for _, told in errors)

    run(test())


def test_a_device_that_is_enabled_again_is_rejected_no_longer(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        (device,) = fleet(1)
        device.disable()
        async with make_gateway() as made:
            made.add(device.connection_string)
            assert await made.settled(PATIENCE)
            assert refusals(made) == ["dev-0"]
            device.enable()
            await made.remove("dev-0")
            made.add(device.connection_string)
            assert await made.settled(PATIENCE)
            assert refusals(made) == []
            device.disable()
            await until(lambda: refusals(made) == ["dev-0"], "it is refused again")
            assert made.summary[:4] == (1, 0, 0, 1)
            device.enable()
            # The next attempt, now.
            client = made.client("dev-0")
            client._twin._connect_at = 0
            client._arm()
            await until(lambda: made.summary[:4] == (1, 1, 1, 0), "it is in again")

    run(test())


def test_errors_go_to_the_handlers_with_the_devices_name(
    make_gateway: MakeGateway, fleet: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        devices = fleet(3)
        errors: list[Any] = []
        made = make_gateway()
        made.on_error(lambda device_id, error: errors.append((device_id, error)))

        @made.on_desired
        def changed(device_id: str, patch: dict[str, Any], desired: dict[str, Any]) -> None:
            if device_id == "dev-1":
                raise ValueError("not today")

        async with made:
            for device in devices:
                text = device.connection_string
                made.add(wrong(text) if device.id == "dev-2" else text)
            assert await made.settled(PATIENCE)
            await until(lambda: len(errors) == 2, "both errors")
        found = dict(errors)
        assert isinstance(found["dev-1"], ValueError)
        assert isinstance(found["dev-2"], ConnectRefused)
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []

    run(test())


def test_a_handler_that_takes_its_time_holds_up_its_own_device_only(
    make_gateway: MakeGateway, fleet: Any
) -> None:
    async def test() -> None:
        devices = fleet(3)
        release = asyncio.Event()
        called: list[str] = []
        made = make_gateway()

        @made.on_desired
        async def changed(device_id: str, patch: dict[str, Any], desired: dict[str, Any]) -> None:
            called.append(device_id)
            if device_id == "dev-0":
                await release.wait()

        for device in devices:
            made.add(device.connection_string)
        async with made:
            await until(lambda: sorted(called) == ["dev-0", "dev-1", "dev-2"], "all were called")
            devices[0].patch_desired({"x": 1})
            devices[1].patch_desired({"x": 1})
            await until(lambda: called.count("dev-1") == 2, "the others go on")
            assert called.count("dev-0") == 1
            release.set()
            await until(lambda: called.count("dev-0") == 2, "and then this one")

    run(test())


# ---------------------------------------------------------------------- a store


def test_a_folder_keeps_a_file_for_each_device(
    local_hub: LocalHub, make_gateway: MakeGateway, tmp_path: Path
) -> None:
    names = ["dev-0", "dev-0/module", "d" * 128, "*" * 100]
    devices = [local_hub.create_device(name, desired={"n": n}) for n, name in enumerate(names)]

    async def test() -> None:
        patches: list[Any] = []
        for n in range(2):
            made = make_gateway(store=tmp_path)
            made.on_desired(lambda device_id, patch, desired: patches.append((device_id, patch)))
            for device in devices:
                made.add(device.connection_string)
            assert made.client("dev-0").desired == ({"n": 0} if n else {})
            if n:
                local_hub.stop_listening()
                await made.start()
                for name in names:
                    await made.client(name).report({"later": n}, wait=False)
            else:
                async with made:
                    assert await made.settled(PATIENCE)
                    await until(lambda: len(patches) == 4, "each has its document")
            await made.close()
        assert sorted(patches) == sorted((name, {"n": n}) for n, name in enumerate(names))
        local_hub.listen_again()
        async with make_gateway(store=tmp_path) as made:
            for device in devices:
                made.add(device.connection_string)
            for device in devices:
                await until(lambda device=device: device.reported == {"later": 1}, "what was left behind")
            # Removed, it gives its file back.
            await made.remove("dev-0")
            made.add(devices[0].connection_string)
        assert len(list(tmp_path.glob("*.json"))) == 4
        assert (tmp_path / "dev-0%2Fmodule.json").exists()

    run(test())


def test_a_store_folder_that_is_not_there_is_named(make_gateway: MakeGateway, fleet: Any) -> None:
    made = make_gateway(store="nowhere")
    with pytest.raises(LocalError, match="there is no folder"):
        made.add(fleet(1)[0].connection_string)
    assert made.status == []


# ---------------------------------------------------------------------- whose turn it is


def test_turns_are_spread_by_rate_and_jitter(mocker: MockerFixture) -> None:
    mocker.patch.object(gateway, "time", SimpleNamespace(monotonic=lambda: 100.0))
    made = TwinGateway(connects_per_second=100)
    turns = [made._turn() for _ in range(1000)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert turns[0] == 0
    assert 0.0049 < min(gaps) < 0.006
    assert 0.014 < max(gaps) < 0.0151
    assert 9.5 < turns[-1] < 10.5


def test_who_has_not_dialled_for_long_has_no_turns_to_spare(mocker: MockerFixture) -> None:
    clock = mocker.patch.object(gateway, "time", SimpleNamespace(monotonic=lambda: 100.0))
    made = TwinGateway(connects_per_second=10)
    assert made._turn() == 0
    clock.monotonic = lambda: 200.0
    assert made._turn() == 0
    assert 0.05 <= made._turn() <= 0.15


def test_a_fleet_comes_up_and_back_at_the_rate(
    local_hub: LocalHub, make_gateway: MakeGateway, fleet: Any, mocker: MockerFixture
) -> None:
    async def test() -> None:
        devices = fleet(20)
        dials: list[float] = []
        dial = aio._connected

        async def noted(*arguments: Any) -> Any:
            dials.append(time.monotonic())
            return await dial(*arguments)

        mocker.patch.object(aio, "_connected", noted)
        async with make_gateway(connects_per_second=50) as made:
            for device in devices:
                made.add(device.connection_string)
            assert await made.settled(PATIENCE)
            # Twenty turns have nineteen gaps of at least half an interval.
            assert len(dials) == 20
            assert dials[-1] - dials[0] > 19 * 0.01
            # Now with a backoff that would bring all back at once.
            mocker.patch.object(aio.random, "random", return_value=0.0)
            dials.clear()
            local_hub.stop_listening()
            for device in devices:
                device.disconnect()
            local_hub.listen_again()
            await until(lambda: made.summary.synchronised == 20 and len(dials) >= 20, "all are back")
            assert len(dials) >= 20
            assert max(sum(1 for at in dials if start <= at < start + 0.1) for start in dials) <= 12
            assert await made.report("dev-7", {"a": 1}) == 2

    run(test())


def test_who_waits_for_its_turn_can_be_removed_and_closed(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        devices = fleet(4)
        async with make_gateway(connects_per_second=0.01) as made:
            for device in devices:
                made.add(device.connection_string)
            await until(lambda: made.summary.synchronised == 1, "the first has no wait")
            early = made.client("dev-1").report({"early": True}, wait=False)
            await soon(made.remove("dev-3"))
            assert not await made.settled(0.01)
        assert devices[1].reported == {}
        with pytest.raises(NotConnected):
            await early.wait()

    run(test())


# ---------------------------------------------------------------------- its start and end


def test_one_context_for_all(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        async with make_gateway() as made:
            for device in fleet(3):
                made.add(device.connection_string)
            assert await made.settled(PATIENCE)
            contexts = {id(made.client(f"dev-{n}")._context) for n in range(3)}
            assert contexts == {id(made._context)}

    run(test())


def test_a_bad_ca_file_is_told_at_the_start(tmp_path: Any, fleet: Any) -> None:
    async def test() -> None:
        made = TwinGateway(ca_file=tmp_path / "none.pem")
        made.add(fleet(1)[0].connection_string)
        with pytest.raises(LocalError, match=r"none\.pem"):
            await made.start()

    run(test())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connects_per_second": 0}, "connects_per_second is a positive number, not 0"),
        ({"connects_per_second": float("nan")}, "connects_per_second is a positive number, not nan"),
        ({"keep_alive": 0}, "keep_alive is from 1 to 1177 seconds, not 0"),
        ({"timeout": -1}, "timeout is a positive number of seconds, not -1"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalError) as caught:
        TwinGateway(**options)
    assert str(caught.value) == message


def test_a_bad_connection_string_changes_nothing_and_shows_no_key() -> None:
    made = TwinGateway()
    with pytest.raises(LocalError, match="SharedAccessKey is not base64") as caught:
        made.add("HostName=localhost;DeviceId=dev-1;SharedAccessKey=c2VjcmV0=")
    assert "c2VjcmV0" not in str(caught.value)
    assert made.status == []
    assert repr(made) == "<TwinGateway with 0 devices>"


def test_a_closed_gateway_says_so(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        made = make_gateway()
        waiting = asyncio.ensure_future(made.settled())
        made.add(fleet(1)[0].connection_string)
        unsettled = asyncio.ensure_future(made.settled())
        await asyncio.sleep(0)
        await made.close()
        await made.close()
        assert await soon(waiting) in (True, False)
        assert await soon(unsettled) is False
        await soon(made.run_forever())
        with pytest.raises(NotConnected):
            await made.start()
        with pytest.raises(NotConnected):
            made.add("HostName=localhost;DeviceId=dev-1;SharedAccessKey=c2VjcmV0")

    run(test())


def test_a_cancelled_close_leaves_nothing(local_hub: LocalHub, make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        made = make_gateway()
        for device in fleet(5):
            made.add(device.connection_string)
        await made.start()
        assert await made.settled(PATIENCE)
        # An answer that does not come keeps close() waiting.
        local_hub.fault("answer_lost", operation="report")
        made.client("dev-1").report({"a": 1}, wait=False)
        closing = asyncio.ensure_future(made.close())
        await asyncio.sleep(0)
        closing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await soon(closing)
        assert closing.cancelled()
        assert made.summary.connected == 0
        assert sockets_to(local_hub.mqtts_port or 0) == []

    run(test())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_forever_ends_at_a_signal(make_gateway: MakeGateway, fleet: Any, number: signal.Signals) -> None:
    before = signal.getsignal(number)

    async def test() -> None:
        made = make_gateway()
        for device in fleet(3):
            made.add(device.connection_string)
        made.on_state(
            lambda device_id, old, new: made.summary.synchronised == 3 and os.kill(os.getpid(), number)
        )
        await soon(made.run_forever())
        assert made.summary.connected == 0

    run(test())
    assert signal.getsignal(number) is before


def test_run_forever_ends_when_it_is_closed(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        made = make_gateway()
        made.add(fleet(1)[0].connection_string)
        running = asyncio.ensure_future(made.run_forever())
        await until(lambda: made.summary.synchronised, "it is there")
        await made.close()
        await soon(running)

    run(test())


def test_an_idle_gateway_has_no_task(make_gateway: MakeGateway, fleet: Any) -> None:
    async def test() -> None:
        before = asyncio.all_tasks()
        async with make_gateway() as made:
            for device in fleet(3):
                made.add(device.connection_string)
            assert await made.settled(PATIENCE)
            await until(lambda: asyncio.all_tasks() == before, "nothing is left to do")

    run(test())


def test_the_example_runs_as_it_stands(local_hub: LocalHub, fleet: Any) -> None:
    devices = fleet(3)
    with subprocess.Popen(
        [sys.executable, "-u", str(Path(__file__).parents[1] / "examples" / "gateway.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "CA": local_hub.ca_file},
    ) as process:
        try:
            assert process.stdin is not None
            process.stdin.write("".join(device.connection_string + "\n" for device in devices))
            process.stdin.close()
            process.stdin = None
            devices[1].wait_for({"telemetryInterval": 30}, timeout=PATIENCE)
            devices[1].patch_desired({"telemetryInterval": 15})
            devices[1].wait_for({"telemetryInterval": 15}, timeout=PATIENCE)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert "dev-1 changed: {'telemetryInterval': 15}\n" in output
    assert process.returncode == 0
