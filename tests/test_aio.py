"""The asyncio TwinClient against the local hub, and against a hub that speaks whatever bytes a test wants.

What it shares with the thread client is in test_aio_shared; here is what only a loop has.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from pytest_mock import MockerFixture

from tests.hub_wire import frame, text
from tests.waiting import PATIENCE
from twin_device import (
    ConnectRefused,
    LocalError,
    NotConnected,
    PatchError,
    ReportRejected,
    ReportTimeout,
    RetrieveTimeout,
    StoreError,
    aio,
    shell,
)
from twin_device.aio import Report, TwinClient
from twin_device.hub import Device, LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
MakeClient = Callable[..., TwinClient]


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run the test in a loop, in time; no task, socket or timer may be left in it."""

    async def whole() -> None:
        loop: Any = asyncio.get_running_loop()
        before = len(loop._selector.get_map())
        await asyncio.wait_for(test, 3 * PATIENCE)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(loop._selector.get_map()) == before
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []

    asyncio.run(whole())


async def until(condition: Callable[[], Any], what: str) -> Any:
    """For what no event tells: look again and again, with a deadline."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.005)
    return found


async def soon(work: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(work, PATIENCE)


def sockets_to(port: int) -> list[socket.socket]:
    """This process' open sockets that were connected to this port, or are about to be."""
    found = []
    for one in [it for it in gc.get_objects() if isinstance(it, socket.socket)]:
        try:
            if one.getpeername()[1] == port:
                found.append(one)
        except (OSError, IndexError):
            pass
    return found


@pytest.fixture
def make(local_hub: LocalHub) -> MakeClient:
    def make(device: Device, **options: Any) -> TwinClient:
        options = {"ca_file": local_hub.ca_file, "timeout": PATIENCE, **options}
        return TwinClient.from_connection_string(device.connection_string, **options)

    return make


# ---------------------------------------------------------------------- the verbs


def test_the_verbs_are_the_thread_clients(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        patches = []
        client.on_desired(lambda patch, desired: patches.append(patch))
        async with client:
            assert client.state == "synchronised"
            assert client.desired == {"telemetryInterval": 30}
            assert (client.desired_version, client.reported_version) == (1, 1)
            assert await client.report({"a": 1}) == 2
            assert await client.report({"a": 2}, version=2, timeout=PATIENCE) == 3
            assert await client.report({"a": 2}, always=True) == 4
            assert await client.retrieve() == {"desired": {"telemetryInterval": 30}, "reported": {"a": 2}}
            assert client.reported == {"a": 2} == device.reported
            with pytest.raises(ReportRejected):
                await client.report({"a": 3}, version=1)
            with pytest.raises(PatchError):
                await client.report({"a": float("nan")})
        assert client.state == "offline"
        assert patches == [{"telemetryInterval": 30}]
        assert client.statistics["reports"] == 4
        await client.close()

    run(test())


def test_a_report_that_nobody_waits_for_is_there_at_once(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        early = client.report({"early": True}, wait=False)
        async with client:
            awaited = await client.report({"a": 1}, wait=False)
            plain = client.report({"b": 1}, wait=False)
            assert isinstance(awaited, Report)
            assert isinstance(plain, Report)
            assert not plain.done
            assert repr(plain) == "<Report on its way>"
            versions = await asyncio.gather(early.wait(), awaited.wait(), plain.wait())
            assert versions[0] == 2
            assert plain.done
            assert repr(plain) == "<Report accepted>"
        assert device.reported == {"early": True, "a": 1, "b": 1}

    run(test())


def test_waits_end_in_time(local_hub: LocalHub, make: MakeClient, device: Device) -> None:
    async def test() -> None:
        async with make(device) as client:
            fault = local_hub.fault("answer_lost")
            with pytest.raises(ReportTimeout, match="still on its way"):
                await client.report({"a": 1}, timeout=0.02)
            with pytest.raises(RetrieveTimeout):
                await client.retrieve(timeout=0.02)
            fault.clear()
            await client.disconnect()
            assert client._retrieves == {}
            await client.connect()
        assert device.reported == {"a": 1}

    run(test())


def test_a_client_outlives_its_loop(make: MakeClient, device: Device) -> None:
    client = make(device)

    async def test(version: int) -> None:
        await client.connect()
        assert await client.report({"version": version}) == version
        await client.disconnect()

    run(test(2))
    run(test(3))


def test_calls_on_a_closed_or_unconnected_client_say_so(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        with pytest.raises(NotConnected, match="connect"):
            await client.report({"a": 1})
        with pytest.raises(NotConnected, match="connect"):
            await client.retrieve()
        report = client.report({"a": 1}, wait=False)
        await client.close()
        with pytest.raises(NotConnected):
            await report.wait()
        with pytest.raises(NotConnected, match="closed"):
            await client.connect()
        with pytest.raises(NotConnected, match="closed"):
            client.report({"a": 1}, wait=False)

    run(test())


# ---------------------------------------------------------------------- handlers and changes


def test_handlers_are_plain_functions_or_coroutines_one_at_a_time(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        order: list[Any] = []
        release = asyncio.Event()

        @client.on_desired
        def plain(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            order.append(("plain", patch))

        @client.on_desired
        async def slow(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            order.append(("slow", patch))
            await release.wait()
            order.append(("slow ends", patch))

        async with client:
            device.patch_desired({"a": 1})
            await until(lambda: client.desired.get("a") == 1, "the patch is here")
            # The handler that waits holds up handlers only.
            assert await client.report({"meanwhile": True}) == 2
            first = {"telemetryInterval": 30}
            assert order == [("plain", first), ("slow", first)]
            release.set()
            await until(lambda: len(order) == 6, "both are handled")
            assert order[2:] == [
                ("slow ends", first),
                ("plain", {"a": 1}),
                ("slow", {"a": 1}),
                ("slow ends", {"a": 1}),
            ]

    run(test())


def test_a_handler_may_call_every_method(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        done: asyncio.Queue[Any] = asyncio.Queue()

        @client.on_desired
        async def answer(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            await done.put(await client.report({"got": patch}))
            await done.put((await client.retrieve())["reported"])
            await client.disconnect()
            await client.connect()
            await client.close()
            await done.put("closed")

        await client.connect(wait=False)
        assert await soon(done.get()) == 2
        assert await soon(done.get()) == {"got": {"telemetryInterval": 30}}
        assert await soon(done.get()) == "closed"
        await client.close()

    run(test())


def test_what_handlers_raise_goes_to_the_error_handlers(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        errors: list[BaseException] = []

        @client.on_desired
        def broken(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            raise KeyError("a bug of the app")

        @client.on_desired
        async def broken_too(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            raise ValueError("another")

        @client.on_state
        async def broken_as_well(old: str, new: str) -> None:
            if new == "synchronised":
                raise TypeError("a third")

        @client.on_error
        async def note(error: BaseException) -> None:
            await asyncio.sleep(0)
            errors.append(error)
            raise error

        async with client:
            await until(lambda: len(errors) == 3, "the errors are told")
            assert [type(error) for error in errors] == [KeyError, ValueError, TypeError]
            device.patch_desired({"a": 1})
            await until(lambda: len(errors) == 5, "the next ones, too")
            assert await client.report({"still": "alive"}) == 2

    run(test())


def test_plain_handlers_give_others_a_turn(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        async with make(device) as client:
            handled = before = most = 0

            @client.on_state
            def count(old: str, new: str) -> None:
                nonlocal handled
                handled += 1

            for _ in range(500):
                client._put(aio.twin.StateChanged("offline", "offline"))
            while handled < 500:
                await asyncio.sleep(0)
                most = max(most, handled - before)
                before = handled
            assert most == 1

    run(test())


def test_a_handler_that_blocks_the_loop_is_named(
    make: MakeClient, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        client = make(device)
        patches = []

        @client.on_desired
        def blocks(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            if "slow" in patch:
                threading.Event().wait(0.06)
            patches.append(patch)

        async with client:
            await until(lambda: len(patches) == 1, "a quick call")
            assert "kept the event loop" not in caplog.text
            device.patch_desired({"slow": True})
            await until(lambda: len(patches) == 2, "a slow call")
        assert re.search(
            r"sensor-temp-042: the handler .*blocks kept the event loop for 0\.\d\d s", caplog.text
        )

    run(test())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 cannot tell who was cancelled")
def test_a_handler_that_awaits_something_cancelled_is_an_error_like_others(
    make: MakeClient, device: Device
) -> None:
    async def test() -> None:
        client = make(device)
        errors: list[BaseException] = []
        client.on_error(errors.append)

        @client.on_desired
        async def careless(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            cancelled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            cancelled.cancel()
            await cancelled

        async with client:
            device.patch_desired({"a": 1})
            await until(lambda: len(errors) == 2, "both are told")
            assert isinstance(errors[1], asyncio.CancelledError)

    run(test())


def test_a_setting_may_be_applied_by_a_coroutine(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)

        @client.setting("interval")
        async def apply(value: dict[str, Any]) -> None:
            await client.report({"applying": value})
            if value["s"] == 0:
                raise ValueError("too often")

        async with client:
            device.patch_desired({"interval": {"s": 5}})
            await until(lambda: device.reported.get("interval") == {"s": 5, "status": "Success"}, "applied")
            assert device.reported["applying"] == {"s": 5}
            device.patch_desired({"interval": {"s": 0}})
            failed = {"s": 5, "status": "Failed", "reason": "too often"}
            await until(lambda: device.reported["interval"] == failed, "refused")

    run(test())


def test_a_setting_whose_handler_is_cut_short_is_applied_again(
    make: MakeClient, device: Device, mocker: MockerFixture
) -> None:
    async def test() -> None:
        mocker.patch.object(aio, "FLUSH", 0.05)
        client = make(device)
        calls: list[Any] = []

        @client.setting("telemetryInterval")
        async def apply(value: Any) -> None:
            calls.append(value)
            if len(calls) == 1:
                await asyncio.Event().wait()

        await client.connect()
        await until(lambda: calls, "it is being applied")
        await client.disconnect()
        await client.connect()
        applied = {"value": 30, "status": "Success"}
        await until(lambda: device.reported.get("telemetryInterval") == applied, "it is applied")
        assert calls == [30, 30]
        await client.close()

    run(test())


def test_states_are_told_in_order(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        states: list[str] = []
        client.on_state(lambda old, new: states.append(new))
        async with client:
            device.disconnect()
            await until(lambda: states.count("synchronised") == 2, "it is back")
        way = ["subscribing", "retrieving", "synchronised", "offline"]
        assert states == way + way

    run(test())


def test_changes_are_everything_first_and_then_each_change(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        async with client:
            changes, others = client.changes(), client.changes()
            device.patch_desired({"a": {"b": [1]}})
            patch, desired = await soon(anext_of(changes))
            assert patch == desired == {"telemetryInterval": 30}
            desired.clear()
            assert patch == {"telemetryInterval": 30}
            change = await soon(anext_of(changes))
            assert change.patch == {"a": {"b": [1]}}
            assert change.desired == {"telemetryInterval": 30, "a": {"b": [1]}} == client.desired
            change.patch["a"]["b"].append(2)
            assert (await soon(anext_of(others))).patch == {"telemetryInterval": 30}
            assert (await soon(anext_of(others))).patch == {"a": {"b": [1]}}

    run(test())


async def anext_of(changes: Any) -> Any:
    # Python 3.10's anext() is no coroutine function; wait_for wants one.
    return await changes.__anext__()


def test_a_cancelled_wait_for_a_change_loses_none(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        async with make(device) as client:
            changes = client.changes()
            await soon(anext_of(changes))
            for rounds in range(5):
                waiting = asyncio.ensure_future(anext_of(changes))
                await asyncio.sleep(0)
                changes._add({"n": rounds}, {})
                for _ in range(rounds):
                    await asyncio.sleep(0)
                waiting.cancel()
                (change,) = await asyncio.gather(waiting, return_exceptions=True)
                if isinstance(change, asyncio.CancelledError):
                    change = await soon(anext_of(changes))
                assert change.patch == {"n": rounds}

    run(test())


def test_changes_end_when_the_client_is_closed(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        await client.connect()
        patches: list[dict[str, Any]] = []

        async def read() -> None:
            async for change in client.changes():
                patches.append(change.patch)

        reading = asyncio.ensure_future(read())
        await until(lambda: patches, "the first change")
        async for _ in client.changes():
            break
        gc.collect()
        assert len(client._iterators or ()) == 1
        await client.close()
        await soon(reading)
        assert patches == [{"telemetryInterval": 30}]

    run(test())


# ---------------------------------------------------------------------- cancelled, and closed


def test_a_cancelled_report_is_on_its_way_all_the_same(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        async with make(device) as client:
            waiting = [asyncio.ensure_future(client.report({f"k{n}": n})) for n in range(20)]
            for task in waiting[::2]:
                task.cancel()
            await asyncio.sleep(0)
            for task in waiting[1::2]:
                task.cancel()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert any(isinstance(result, asyncio.CancelledError) for result in results)
            await client.report({"last": True})
        assert device.reported == {**{f"k{n}": n for n in range(20)}, "last": True}

    run(test())


def test_a_refusal_that_nobody_waits_for_any_more_is_told(
    local_hub: LocalHub, make: MakeClient, device: Device
) -> None:
    async def test() -> None:
        client = make(device)
        errors: list[BaseException] = []
        client.on_error(errors.append)
        local_hub.fault("answer_status", operation="report", status=400, times=1)
        async with client:
            waiting = asyncio.ensure_future(client.report({"bad": 1}))
            await asyncio.sleep(0)
            waiting.cancel()
            await until(lambda: errors, "the refusal is told")
            assert isinstance(errors[0], ReportRejected)
            # And one that comes in the moment of the cancellation.
            report = client.report({"x": 1})
            ticket, known = next(iter(client._reports.items()))
            waiting = asyncio.ensure_future(report)
            await asyncio.sleep(0)
            client._reported(aio.twin.Reported(ticket, None, ReportRejected(400)))
            waiting.cancel()
            await until(lambda: len(errors) == 2, "this one is told, too")
            assert known.done

    run(test())


@pytest.mark.parametrize("fault", [None, "hanging_tls", "half_open", "connack_slow", "suback_late"])
def test_a_cancelled_connect_leaves_nothing(
    local_hub: LocalHub, make: MakeClient, device: Device, fault: str | None
) -> None:
    async def test() -> None:
        if fault:
            local_hub.fault(fault)
        client = make(device)
        for rounds in (0, 1, 2, 5, 20, 50):
            connecting = asyncio.ensure_future(client.connect())
            for _ in range(rounds):
                await asyncio.sleep(0)
            if fault and rounds == 50:
                await until(lambda: sockets_to(local_hub.mqtts_port), "it dials")
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            await client.disconnect()
            assert asyncio.all_tasks() == {asyncio.current_task()} | {
                task for task in asyncio.all_tasks() if "whole" in repr(task)
            }
            assert sockets_to(local_hub.mqtts_port) == []
        local_hub.clear_faults()
        async with client:
            assert await client.report({"a": 1}) == 2

    run(test())


@pytest.mark.parametrize("fault", ["hanging_tls", "half_open"])
def test_close_while_it_dials(local_hub: LocalHub, make: MakeClient, device: Device, fault: str) -> None:
    async def test() -> None:
        local_hub.fault(fault)
        client = make(device)
        connecting = asyncio.ensure_future(client.connect())
        await until(lambda: sockets_to(local_hub.mqtts_port), "it dials")
        started = time.monotonic()
        await client.close()
        with pytest.raises(NotConnected, match="disconnected while it connected"):
            await connecting
        assert time.monotonic() - started < PATIENCE / 3
        assert sockets_to(local_hub.mqtts_port) == []

    run(test())


def test_close_bounds_a_handler_that_does_not_end(
    make: MakeClient, device: Device, mocker: MockerFixture
) -> None:
    async def test() -> None:
        mocker.patch.object(aio, "FLUSH", 0.05)
        client = make(device)
        ended: list[str] = []

        @client.on_desired
        async def endless(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("cancelled")

        await client.connect()
        await client.close()
        assert ended == ["cancelled"]

    run(test())


def test_close_lets_a_handler_end(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        told: list[str] = []
        release = asyncio.Event()

        @client.on_desired
        async def slow(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            await release.wait()
            told.append("handled")

        @client.on_state
        def state(old: str, new: str) -> None:
            told.append(new)

        await client.connect()
        closing = asyncio.ensure_future(client.close())
        await until(lambda: client.state == "offline", "it is disconnected")
        assert "handled" not in told
        release.set()
        await closing
        assert told[-3:] == ["handled", "synchronised", "offline"]

    run(test())


def test_connections_do_not_pile_up_and_no_thread_stays(
    local_hub: LocalHub, make: MakeClient, device: Device
) -> None:
    before = threading.active_count()

    async def test() -> None:
        client = make(device)
        for _ in range(10):
            await client.connect()
            assert len(sockets_to(local_hub.mqtts_port)) == 1
            await client.disconnect()
        assert sockets_to(local_hub.mqtts_port) == []
        await client.close()
        await until(lambda: threading.active_count() <= before, "the look-ups' threads end")

    run(test())


def test_run_forever_ends_when_the_client_is_closed(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        client = make(device)
        running = asyncio.ensure_future(client.run_forever())
        await until(lambda: client.state == "synchronised", "it connects")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert client.state == "synchronised"
        running = asyncio.ensure_future(client.run_forever())
        await asyncio.sleep(0)
        await client.close()
        await soon(running)
        await soon(client.run_forever())
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous

    run(test())


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_forever_ends_for_all_clients_at_a_signal(local_hub: LocalHub, number: signal.Signals) -> None:
    devices = [local_hub.create_device(f"dev-{n}") for n in range(2)]
    # The report tells that the signals are caught: run_forever does that before it waits.
    program = f"""
import asyncio, signal
from twin_device.aio import TwinClient
async def main():
    clients = [TwinClient.from_connection_string(text, ca_file={str(local_hub.ca_file)!r})
        for text in {[device.connection_string for device in devices]!r}]
    for client in clients:
        await client.connect()
    running = [asyncio.ensure_future(client.run_forever()) for client in clients]
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        await asyncio.sleep(0)
    for client in clients:
        await client.report({{"running": True}})
    await asyncio.gather(*running)
    print([client.state for client in clients], signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            for device in devices:
                device.wait_for({"running": True}, PATIENCE)
            process.send_signal(number)
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert (process.returncode, output) == (0, "['offline', 'offline'] True\n")


# ---------------------------------------------------------------------- refused, and nobody there


def test_a_wrong_key_is_told_at_once(local_hub: LocalHub, make: MakeClient, device: Device) -> None:
    async def test() -> None:
        text = device.connection_string.rpartition("SharedAccessKey=")[0] + "SharedAccessKey=" + KEY
        client = TwinClient.from_connection_string(text, ca_file=local_hub.ca_file, timeout=PATIENCE)
        with pytest.raises(ConnectRefused, match="key and the clock") as raised:
            await client.connect()
        assert not raised.value.can_retry
        assert sockets_to(local_hub.mqtts_port) == []
        assert device.connections == 0

    run(test())


def test_a_clock_that_cannot_be_right_is_named(
    make: MakeClient, device: Device, mocker: MockerFixture
) -> None:
    early = SimpleNamespace(**{**vars(time), "time": lambda: 1.5e9, "gmtime": lambda: time.gmtime(1.5e9)})
    mocker.patch.object(shell, "time", early)

    async def test() -> None:
        with pytest.raises(ConnectRefused, match="clock is not set, it says 2017-07-14, before") as raised:
            await make(device).connect()
        assert not raised.value.can_retry
        assert device.connections == 0

    run(test())


def test_an_unknown_ca_is_told_at_once(device: Device) -> None:
    async def test() -> None:
        client = TwinClient.from_connection_string(device.connection_string, timeout=PATIENCE)
        with pytest.raises(ConnectRefused, match=r"certificate .* not to be trusted") as raised:
            await client.connect()
        assert not raised.value.can_retry

    run(test())


def test_a_wrong_host_name_is_told_at_once(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(
        str(tmp_path / "server.pem")
    )

    async def test(hub: LocalHub, device: Device) -> None:
        client = TwinClient.from_connection_string(device.connection_string, ca_file=hub.ca_file)
        with pytest.raises(ConnectRefused, match="not to be trusted: Hostname mismatch") as raised:
            await client.connect()
        assert not raised.value.can_retry

    with LocalHub(certificates=tmp_path) as hub:
        device = hub.create_device("dev-1")
        run(test(hub, device))
    assert device.connections == 0


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), ("no certificate", "no certificate in PEM form")]
)
def test_a_bad_ca_file_is_named(
    device: Device, make: MakeClient, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)

    async def test() -> None:
        with pytest.raises(LocalError, match=message):
            await make(device, ca_file=path).connect()

    run(test())


def test_nobody_there_is_told_in_time(local_hub: LocalHub, make: MakeClient, device: Device) -> None:
    async def test() -> None:
        local_hub.stop_listening()
        client = make(device)
        with pytest.raises(ConnectRefused, match="cannot connect to localhost") as raised:
            await client.connect(timeout=0.3)
        assert raised.value.can_retry
        await client.connect(wait=False)
        report = client.report({"patient": True}, wait=False)
        local_hub.listen_again()
        assert await report.wait() == 2
        await client.close()

    run(test())


@pytest.mark.parametrize("fault", ["half_open", "hanging_tls"])
def test_a_hub_that_never_answers_does_not_hold_the_app(
    local_hub: LocalHub, make: MakeClient, device: Device, fault: str
) -> None:
    async def test() -> None:
        local_hub.fault(fault)
        started = time.monotonic()
        with pytest.raises(ConnectRefused):
            await make(device).connect(timeout=0.3)
        # Long before the deadline of the handshake itself.
        assert time.monotonic() - started < PATIENCE / 3
        assert sockets_to(local_hub.mqtts_port) == []

    run(test())


def test_a_handshake_that_hangs_is_given_up(local_hub: LocalHub, make: MakeClient, device: Device) -> None:
    async def test() -> None:
        fault = local_hub.fault("hanging_tls", times=1)
        client = make(device, timeout=0.6)
        await client.connect(timeout=PATIENCE)
        assert fault.hits == 1
        assert "no answer in time" in client.statistics["last_error"]
        await client.close()

    run(test())


def test_a_name_without_an_address_is_told(mocker: MockerFixture) -> None:
    async def test() -> None:
        failure = socket.gaierror(-2, "Name or service not known")
        mocker.patch.object(socket, "getaddrinfo", side_effect=failure)
        client = TwinClient("no-such-hub.example", "dev-1", key=KEY)
        with pytest.raises(ConnectRefused, match="Name or service not known"):
            await client.connect(timeout=1)

    run(test())


def test_a_name_server_that_hangs_holds_nobody(mocker: MockerFixture) -> None:
    release = threading.Event()
    calls: list[Any] = []

    def hang(host: str, port: int, **options: Any) -> Any:
        if not options.get("flags"):
            calls.append(host)
            release.wait(PATIENCE)
        raise socket.gaierror(-2, "Name or service not known")

    async def test() -> None:
        mocker.patch.object(socket, "getaddrinfo", hang)
        clients = [TwinClient("hub.example", f"dev-{n}", key=KEY) for n in range(20)]
        results = await asyncio.gather(
            *(client.connect(timeout=0.1) for client in clients), return_exceptions=True
        )
        assert {type(result) for result in results} == {ConnectRefused}
        # One look-up for all of them.
        assert calls == ["hub.example"]
        release.set()

    run(test())


# ---------------------------------------------------------------------- a store


def store_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "twin-store"]


def test_a_card_that_hangs_holds_up_no_loop(
    local_hub: LocalHub, make: MakeClient, device: Device, tmp_path: Path, mocker: MockerFixture
) -> None:
    async def test() -> None:
        hanging, go_on = threading.Event(), threading.Event()
        sync = os.fsync

        def hang(descriptor: int) -> None:
            hanging.set()
            assert go_on.wait(PATIENCE)
            sync(descriptor)

        other = local_hub.create_device("dev-2")
        async with make(device, store=tmp_path / "twin.json") as client, make(other) as neighbour:
            mocker.patch("os.fsync", hang)
            report = asyncio.ensure_future(client.report({"a": 1}))
            await until(hanging.is_set, "the write hangs")
            assert await neighbour.report({"b": 1}) == 2
            device.wait_for({"a": 1})
            assert await client.retrieve() == {"desired": {"telemetryInterval": 30}, "reported": {"a": 1}}
            assert not report.done()
            go_on.set()
            assert await soon(report) == 2
        assert b'"a":1' in (tmp_path / "twin.json").read_bytes()
        await until(lambda: store_threads() == [], "no thread stays")

    run(test())


def test_a_write_that_does_not_end_is_told_in_time(
    make: MakeClient, device: Device, tmp_path: Path, mocker: MockerFixture
) -> None:
    async def test() -> None:
        go_on = threading.Event()
        errors: list[Exception] = []
        client = make(device, store=tmp_path / "twin.json", timeout=0.3)
        client.on_error(errors.append)
        await client.connect(timeout=PATIENCE)
        await until(lambda: (tmp_path / "twin.json").exists(), "the first document is kept")
        mocker.patch("os.fsync", side_effect=lambda descriptor: go_on.wait(PATIENCE))
        assert await client.report({"a": 1}) == 2
        await until(lambda: errors, "it is told")
        assert isinstance(errors[0], StoreError)
        assert "twin.json: a write does not end" in str(errors[0])
        closing = time.monotonic()
        await client.close()
        assert time.monotonic() - closing < PATIENCE / 2
        go_on.set()
        await until(lambda: store_threads() == [], "no thread stays")

    run(test())


def test_a_handler_may_close_a_client_with_a_store(make: MakeClient, device: Device, tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "twin.json"
        client = make(device, store=path)
        left = asyncio.Event()

        @client.on_desired
        async def reboot(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            client.report({"left": 1}, wait=False)
            await client.close()
            with pytest.raises(LocalError, match="is used by another client"):
                make(device, store=path)
            left.set()

        await client.connect(wait=False)
        await soon(left.wait())
        again = await until(lambda: client._dispatcher is None and make(device, store=path), "the end")
        assert again.desired == {"telemetryInterval": 30}
        async with again:
            await until(lambda: device.reported == {"left": 1}, "what was left is delivered")
        assert client._dispatcher is None

    run(test())


def test_a_handler_cut_short_is_called_again_by_the_next_run(
    make: MakeClient, device: Device, tmp_path: Path
) -> None:
    async def test() -> None:
        path = tmp_path / "twin.json"
        client = make(device, store=path, timeout=0.2)
        begun = asyncio.Event()

        @client.on_desired
        async def sleeps(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            begun.set()
            await asyncio.sleep(3600)

        await client.connect(timeout=PATIENCE)
        await soon(begun.wait())
        await client.close()
        patches: list[Any] = []
        again = make(device, store=path)
        assert again.desired == {}
        again.on_desired(lambda patch, desired: patches.append(patch))
        async with again:
            await until(lambda: patches, "the patch")
        assert patches == [{"telemetryInterval": 30}]

    run(test())


def test_settings_go_on_where_a_client_was_closed(make: MakeClient, device: Device, tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "twin.json"
        applied: list[Any] = []
        for _ in range(2):
            client = make(device, store=path)
            client.setting("telemetryInterval")(applied.append)
            async with client:
                await until(
                    lambda: device.reported.get("telemetryInterval", {}).get("status") == "Success", "applied"
                )
                await client.retrieve()
        assert applied == [30]

    run(test())


# ---------------------------------------------------------------------- neighbours


def test_a_sick_connection_delays_no_neighbour(local_hub: LocalHub, make: MakeClient) -> None:
    async def test() -> None:
        devices = [local_hub.create_device(f"dev-{n}") for n in range(100)]
        clients = [make(device) for device in devices]
        *healthy, sick = clients
        release = asyncio.Event()
        handling: list[Any] = []

        @clients[0].on_desired
        async def sleep(patch: dict[str, Any], desired: dict[str, Any]) -> None:
            handling.append(patch)
            await release.wait()

        async def slowest_report() -> float:
            """Of all reports from before the sick one dials until long after it hangs, in seconds."""
            slowest, count, hits = 0.0, 0, hanging.hits
            dialling = asyncio.ensure_future(sick.connect(wait=False))
            while hanging.hits == hits or count < 200:
                started = time.perf_counter()
                await healthy[count % 99].report({"now": started})
                slowest = max(slowest, time.perf_counter() - started)
                count += 1
            await dialling
            await sick.disconnect()
            return slowest

        await asyncio.gather(*(client.connect() for client in healthy))
        hanging = local_hub.fault("hanging_tls")
        devices[0].patch_desired({"a": 1})
        await until(lambda: handling, "the handler sleeps")
        # Others may take the processor for a while, but not each time.
        for _ in range(10):
            slowest = await slowest_report()
            if slowest < 0.05:
                break
        assert slowest < 0.05
        assert clients[0]._dispatcher is not None
        assert [thread for thread in threading.enumerate() if "asyncio" in thread.name] == []
        release.set()
        await asyncio.gather(*(client.close() for client in clients))
        assert sockets_to(local_hub.mqtts_port) == []

    run(test())


class Pest(threading.Thread):
    """A hub that synchronises one client and then writes without end, in a thread of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(daemon=True)
        self._size = size
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.ended = threading.Event()
        self.sent = 0

    def run(self) -> None:
        connected, _ = self._listening.accept()
        self._listening.close()
        with connected:
            for answer in (CONNACK, SUBACK, b""):
                asked = connected.recv(65536)
                rid = re.search(rb"rid=(\d+)", asked)
                if rid is not None:
                    answer = published(f"$iothub/twin/res/200/?$rid={int(rid[1])}", DOCUMENT)
                connected.sendall(answer)
            topic = "$iothub/twin/PATCH/properties/desired/?$version="
            version = 5
            with contextlib.suppress(OSError):
                while not self.ended.is_set():
                    many = range(version, version + 500)
                    version += 500
                    data = b"".join(
                        published(f"{topic}{n}", b'{"n":%d,"$version":%d}' % (n, n)) for n in many
                    )
                    for at in range(0, len(data), self._size):
                        connected.sendall(data[at : at + self._size])
                        self.sent += 1


@pytest.mark.parametrize("size", [1, 65536], ids=["trickles", "floods"])
def test_a_hub_that_writes_without_end_delays_no_neighbour(
    local_hub: LocalHub, make: MakeClient, device: Device, size: int
) -> None:
    async def test() -> None:
        pest = Pest(size)
        pest.start()
        sick = TwinClient("127.0.0.1", "dev-1", key=KEY, tls=False, port=pest.port, timeout=PATIENCE)
        patches = []
        sick.on_desired(lambda patch, desired: patches.append(patch))
        async with make(device) as healthy, sick:
            before = pest.sent
            # What one round of the loop costs its thread, whoever else wants the processor: nobody who is in
            # it waits for longer.
            busiest, ends = 0.0, time.monotonic() + 0.3
            report = asyncio.ensure_future(healthy.report({"a": 1}))
            while time.monotonic() < ends or not report.done():
                started = time.thread_time()
                await asyncio.sleep(0)
                busiest = max(busiest, time.thread_time() - started)
            assert await report == 2
            assert busiest < 0.05
            assert pest.sent > before
            assert patches
            pest.ended.set()
        pest.join(PATIENCE)

    run(test())


def test_a_fleet_that_comes_back_shakes_hands_one_after_the_other(
    local_hub: LocalHub, make: MakeClient, mocker: MockerFixture
) -> None:
    async def test() -> None:
        rounds = 0
        steps: dict[int, int] = {}

        def step(self: Any, *arguments: Any) -> Any:
            steps[rounds] = steps.get(rounds, 0) + 1
            return shake(self, *arguments)

        async def count() -> None:
            nonlocal rounds
            while True:
                rounds += 1
                await asyncio.sleep(0)

        shake = ssl.SSLSocket.do_handshake
        mocker.patch.object(ssl.SSLSocket, "do_handshake", step)
        counting = asyncio.ensure_future(count())
        clients = [make(local_hub.create_device(f"dev-{n}")) for n in range(20)]
        await asyncio.gather(*(client.connect() for client in clients))
        counting.cancel()
        await asyncio.gather(counting, *(client.close() for client in clients), return_exceptions=True)
        # Mostly two each; one, if the hub was quick.
        assert sum(steps.values()) >= 20
        assert max(steps.values()) <= 2

    run(test())


# ---------------------------------------------------------------------- the bytes


class Wire:
    """A hub that says what a test tells it to, in plaintext."""

    def __init__(self) -> None:
        self.received = b""
        self.connections = 0

    async def __aenter__(self) -> "Wire":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.writer: asyncio.StreamWriter | None = None
        self.tasks: list[Any] = []
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.current_task())
        self.connections += 1
        self.writer = writer
        try:
            while data := await reader.read(65536):
                self.received += data
        except (OSError, asyncio.CancelledError):
            # The test is over, or the client has hung up.
            pass
        finally:
            writer.close()

    def client(self, **options: Any) -> TwinClient:
        return TwinClient(
            "127.0.0.1", "dev-1", key=KEY, tls=False, port=self.port, timeout=PATIENCE, **options
        )

    async def say(self, data: bytes, size: int = 1 << 20) -> None:
        """Send the bytes, size at a time."""
        writer: Any = await until(lambda: self.writer, "the client is here")
        for at in range(0, len(data), size):
            writer.write(data[at : at + size])
            await writer.drain()
            await asyncio.sleep(0)

    async def heard(self, part: bytes) -> bytes:
        """Wait until the client has said this; gives everything up to its end, and forgets it."""
        await until(lambda: part in self.received, f"{part!r}")
        before, found, self.received = self.received.partition(part)
        return before + found


CONNACK = frame(0x20, b"\x00\x00")
SUBACK = frame(0x90, b"\x00\x01\x00\x00")


def published(topic: str, payload: bytes, head: int = 0x30, packet_id: bytes = b"") -> bytes:
    return frame(head, text(topic) + packet_id + payload)


async def synchronise(wire: Wire, client: TwinClient, document: bytes, size: int = 1 << 20) -> None:
    await client.connect(wait=False)
    await wire.heard(b"&se=")
    await wire.say(CONNACK, size)
    await wire.heard(b"properties/desired/#\x00")
    await wire.say(SUBACK, size)
    await wire.heard(b"$rid=")
    request = client._twin._get
    await wire.say(published(f"$iothub/twin/res/200/?$rid={request}", document), size)
    await until(lambda: client.state == "synchronised", "it is synchronised")


DOCUMENT = json.dumps({"desired": {"x": "y" * 300, "$version": 4}, "reported": {"$version": 7}}).encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 130, 1 << 20])
def test_packets_may_be_cut_anywhere(size: int) -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client()) as client:
            await synchronise(wire, client, DOCUMENT, size)
            assert client.desired == {"x": "y" * 300}
            topic = "$iothub/twin/PATCH/properties/desired/?$version="
            await wire.say(
                frame(0xD0)
                + published("a/topic", b"")
                + b"".join(
                    published(topic + str(n), b'{"n": %d, "$version": %d}' % (n, n)) for n in range(5, 25)
                )
                + published(topic + "25", b'{"x": null, "$version": 25}'),
                size,
            )
            await until(lambda: client.desired == {"n": 24}, "everything was read")
            assert client.statistics["gaps"] == 0

    run(test())


class Closing:
    """Closes a client that a test connects by itself."""

    def __init__(self, client: TwinClient) -> None:
        self.client = client

    async def __aenter__(self) -> TwinClient:
        return self.client

    async def __aexit__(self, *_: Any) -> None:
        await self.client.close()


def test_what_the_client_says_is_mqtt_3_1_1() -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client(keep_alive=300, product_info="p" * 200)) as client:
            await client.connect(wait=False)
            said = await wire.heard(b"&se=")
            user = "127.0.0.1/dev-1/?api-version=2021-04-12&DeviceClientType=" + "p" * 200
            start = b"\x00\x04MQTT\x04\xc0" + (300).to_bytes(2, "big") + text("dev-1") + text(user)
            assert said[:1] == b"\x10"
            # More than 127 bytes: the remaining length takes two.
            assert said[3:].startswith(start)
            length = (said[1] & 127) | said[2] << 7
            await until(lambda: len(said + wire.received) == 3 + length, "the packet is as long as it says")
            wire.received = b""
            await wire.say(CONNACK)
            body = b"\x00\x01" + text("$iothub/twin/res/#") + b"\x00"
            body += text("$iothub/twin/PATCH/properties/desired/#") + b"\x00"
            await wire.heard(frame(0x82, body))
            assert wire.received == b""
            await wire.say(SUBACK)
            await until(lambda: client._twin.state == "retrieving", "it retrieves")
            request = client._twin._get
            await wire.heard(frame(0x30, text(f"$iothub/twin/GET/?$rid={request}")))
            await client.disconnect()
            await wire.heard(b"\xe0\x00")

    run(test())


def test_a_message_with_qos_1_is_acknowledged() -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client()) as client:
            await synchronise(wire, client, DOCUMENT)
            wire.received = b""
            topic = "$iothub/twin/PATCH/properties/desired/?$version=5"
            await wire.say(published(topic, b'{"x": 1}', 0x32, b"\x12\x34"))
            await wire.heard(b"\x40\x02\x12\x34")
            assert client.desired == {"x": 1}

    run(test())


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (published("a", b""), "before CONNACK"),
        (frame(0x20, b"\x00"), "type 2"),
        (CONNACK + CONNACK, "type 2"),
        (CONNACK + frame(0x10), "type 1"),
        (CONNACK + published("a", b"", 0x34, b"\x00\x01"), "QoS 2"),
        (CONNACK + frame(0x30, b"\x00\x09short"), "ends in its topic"),
        (CONNACK + frame(0x30), "ends in its topic"),
        (CONNACK + b"\x30\xff\xff\xff\xff\x01", "more than four bytes"),
        (CONNACK + b"\x30\x80\x80\x80\x01", "2097152 bytes"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "before CONNACK"),
    ],
)
def test_a_hub_that_breaks_mqtt_costs_a_connection(said: bytes, why: str) -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client()) as client:
            await client.connect(wait=False)
            await wire.say(said)
            await until(lambda: client.statistics["last_error"], "it is noticed")
            assert why in client.statistics["last_error"]
            assert client.state == "offline"
            await until(lambda: wire.connections == 2, "it comes back")

    run(test())


def test_a_topic_that_is_no_text_is_ignored() -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client()) as client:
            await synchronise(wire, client, DOCUMENT)
            await wire.say(frame(0x30, text(b"\xff\xfe") + b"{}"))
            await wire.say(published("$iothub/twin/PATCH/properties/desired/?$version=5", b'{"x": 1}'))
            await until(lambda: client.desired == {"x": 1}, "it goes on")
            assert client.state == "synchronised"

    run(test())


def test_a_burst_is_read_in_slices() -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client()) as client:
            await synchronise(wire, client, DOCUMENT)
            one = published("a/foreign/topic", b"x" * 83)
            count = 20000
            taken = most = 0

            def received(topic: str, payload: bytes) -> list[Any]:
                nonlocal taken
                taken += 1
                return [None]  # something

            client._received = received  # type: ignore[method-assign]  # it only counts
            burst = asyncio.ensure_future(wire.say(one * count, 1 << 22))
            before = 0
            while taken < count:
                await asyncio.sleep(0)
                most = max(most, taken - before)
                before = taken
            await burst
            assert most <= 16384 // len(one) + 1

    run(test())


def test_what_tls_has_read_ahead_is_not_forgotten(
    make: MakeClient, device: Device, mocker: MockerFixture
) -> None:
    async def test() -> None:
        # Far less than one record: the socket itself has nothing more to read, and wakes nobody.
        mocker.patch.object(aio, "READ_AT_ONCE", 100)
        async with make(device) as client:
            big = {f"key{n}": "x" * 900 for n in range(20)}
            device.patch_desired(big)
            await until(lambda: client.desired.get("key19"), "everything was read")
            assert client.desired == {"telemetryInterval": 30, **big}

    run(test())


def test_a_silent_hub_is_asked_and_then_given_up() -> None:
    async def test() -> None:
        async with Wire() as wire, Closing(wire.client(keep_alive=1)) as client:
            await synchronise(wire, client, DOCUMENT)
            link: Any = client._link
            # Milliseconds; an app may not go below one second.
            link._keep_alive = 50
            link.due = 0
            client._arm()
            await wire.heard(b"\xc0\x00")
            await wire.say(b"\xd0\x00")
            await wire.heard(b"\xc0\x00")
            assert client.state == "synchronised"
            await until(lambda: client.statistics["last_error"], "the silence is noticed")
            assert "PINGREQ" in client.statistics["last_error"]

    run(test())


def test_a_hub_that_does_not_read_loses_nothing() -> None:
    """What the socket does not take is sent later, whole and in order."""

    async def test() -> None:
        async with Wire() as wire, Closing(wire.client()) as client:
            await synchronise(wire, client, DOCUMENT)
            wire.received = b""
            link: Any = client._link
            link._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            sent = [b"%d" % n * 20000 for n in range(10)]
            for payload in sent:
                link.publish("t", payload)
            assert link._out
            expected = b"".join(published("t", payload) for payload in sent)
            await until(lambda: len(wire.received) >= len(expected), "everything has arrived")
            assert wire.received == expected
            assert not link._watches_writes

    run(test())


# ---------------------------------------------------------------------- options, secrets, costs


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("hub.example", True)])
def test_plaintext_off_loopback_is_warned_about(
    mocker: MockerFixture, caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    async def test() -> None:
        # The network is cut off: only the warning is of interest.
        mocker.patch.object(TwinClient, "_dial_soon")
        client = TwinClient(host, "dev-1", key=KEY, tls=False)
        await client.connect(wait=False)
        assert ("plaintext" in caplog.text) is warned
        await client.close()

    run(test())


def test_no_secret_reaches_a_log_or_a_repr(
    make: MakeClient, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    shown = ""

    async def test() -> None:
        nonlocal shown
        async with make(device) as client:
            await client.report({"a": 1})
            shown = repr(client) + repr(vars(client))

    run(test())
    shown += caplog.text
    key = device.connection_string.rpartition("SharedAccessKey=")[2]
    assert "$iothub/twin/PATCH/properties/reported" in caplog.text
    assert key not in shown
    assert not re.search("sig=|SharedAccessSignature", shown)


def test_an_idle_client_has_no_task(make: MakeClient, device: Device) -> None:
    async def test() -> None:
        client = make(device)
        client.on_desired(lambda patch, desired: None)
        async with client:
            await until(lambda: client._dispatcher is None, "the handler has run")
            await asyncio.sleep(0)
            assert client._dials == set()
            assert {task for task in asyncio.all_tasks() if "Closing" in repr(task)} == set()
            names = [repr(task) for task in asyncio.all_tasks()]
            assert not [name for name in names if "TwinClient" in name], names

    run(test())


def test_importing_brings_in_no_paho_and_no_hub() -> None:
    program = "from twin_device.aio import TwinClient; import sys; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"paho", "twin_device.client", "twin_device.hub", "trustme"}.isdisjoint(found)


def test_the_public_names_are_few_and_all_there() -> None:
    assert aio.__all__ == sorted(aio.__all__)
    for name in aio.__all__:
        assert getattr(aio, name).__module__ == "twin_device.aio"
