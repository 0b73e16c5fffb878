"""The command twin-device, as a process of its own: what it prints, and its exit status."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pytest_mock import MockerFixture

from tests.hub_wire import METHODS, Closed, Wire, connect, online, publish
from tests.waiting import PATIENCE, wait_until
from twin_device import cli
from twin_device.hub import Device, LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
COMMAND = [sys.executable, "-m", "twin_device.cli"]


def run(
    *arguments: str, device: Device | None = None, stdin: str | None = None
) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    for name in ("IOTHUB_DEVICE_CONNECTION_STRING", "IOTHUB_CONNECTION_STRING"):
        environment.pop(name, None)
    if device is not None:
        environment["IOTHUB_DEVICE_CONNECTION_STRING"] = device.connection_string
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        env=environment,
        input=stdin,
    )


@contextmanager
def running(*arguments: str, device: Device | None = None) -> "Iterator[subprocess.Popen[str]]":
    environment = {**os.environ}
    if device is not None:
        environment["IOTHUB_DEVICE_CONNECTION_STRING"] = device.connection_string
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def finish(process: "subprocess.Popen[str]", number: signal.Signals) -> int:
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    return process.returncode


# ---------------------------------------------------------------------- the story


def test_the_demo_plays_its_story_to_the_end() -> None:
    done = run("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("Every step held")
    assert done.stdout.count("  ok  ") == 15
    for scene in range(1, 7):
        assert f"\n{scene}. " in done.stdout
    assert done.stderr == ""


def test_the_demo_ends_cleanly_at_ctrl_c() -> None:
    with running("demo") as process:
        while "First twin" not in line(process):
            pass
        process.send_signal(signal.SIGINT)
        # Not communicate(): it passes over what readline has buffered.
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read()
        process.wait(PATIENCE)
    # It may just have finished.
    assert (process.returncode, output.rstrip().splitlines()[-1][:11]) in [
        (130, "Interrupted"),
        (0, "Every step "),
    ]
    assert "Traceback" not in errors


def test_a_step_that_does_not_hold_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from twin_device import demo

    monkeypatch.setattr(demo._Story, "a_patch", lambda story: story.check(False, "that pigs fly"))
    assert demo.play() == 1
    assert "The story broke: not true: that pigs fly" in capsys.readouterr().out


# ---------------------------------------------------------------------- hub run


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_hub_run_says_how_to_connect_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    arguments = (
        "--mqtts-port",
        "auto",
        "--mqtt-port",
        "auto",
        "--device",
        f"dev-1:{KEY}",
        "--device",
        "gw/mod",
    )
    arguments = (*arguments, "--https-port", "auto", "--certificates", str(tmp_path), "--json")
    with running("hub", "run", *arguments) as process:
        ready = json.loads(line(process))
        names = ["event", "mqtts", "mqtt", "https", "http", "ca", "service", "page", "devices"]
        assert list(ready) == names
        assert ready["event"] == "ready"
        assert ready["page"].startswith("https://localhost:")
        assert ready["ca"] == str(tmp_path / "ca.pem")
        assert (
            ready["devices"]["dev-1"]
            == f"HostName=localhost:{ready['mqtts']};DeviceId=dev-1;SharedAccessKey={KEY}"
        )
        assert set(ready["devices"]) == {"dev-1", "gw", "gw/mod"}
        done = run(
            "report", '{"a": 1}', "--ca-file", ready["ca"], "--connection-string", ready["devices"]["gw/mod"]
        )
        assert (done.returncode, done.stdout) == (0, "reported, $version 2\n")
        plain = f"HostName=localhost:{ready['mqtt']};DeviceId=dev-1;SharedAccessKey={KEY}"
        done = run("report", '{"a": 1}', "--plaintext", "--connection-string", plain)
        assert (done.returncode, done.stdout) == (0, "reported, $version 2\n")
        assert finish(process, number) == 0


def test_hub_run_prints_lines_for_people() -> None:
    ports = ("--mqtts-port", "auto", "--https-port", "0", "--http-port", "auto")
    with running("hub", "run", *ports, "--device", f"dev-1:{KEY}") as process:
        assert line(process).startswith("ready: mqtts ")
        assert line(process).startswith("back end: HostName=localhost:")
        assert line(process).startswith("page: http://localhost:")
        assert line(process).startswith("device dev-1: HostName=localhost:")


def test_hub_run_takes_all_the_files_it_may_have() -> None:
    resource = pytest.importorskip("resource", reason="no such limit on this system")
    with running("hub", "run", "--mqtts-port", "auto", "--https-port", "0") as process:
        assert line(process).startswith("ready: ")
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard


def test_hub_run_on_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("hub", "run", "--mqtts-port", str(port), "--https-port", "0")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on port {port}" in done.stderr


# ---------------------------------------------------------------------- a back end's commands


@pytest.fixture
def served() -> Iterator[LocalHub]:
    with LocalHub(https_port=0, http_port=0, owner_key=KEY) as hub:
        yield hub


def back_end(hub: LocalHub, *arguments: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    connection = ["--connection-string", hub.service_connection_string, "--ca-file", hub.ca_file]
    return run("hub", *arguments, *connection, stdin=stdin)


def test_a_device_is_created_listed_and_deleted(served: LocalHub) -> None:
    done = back_end(served, "device", "create", "sensor-1", "--key", KEY)
    text = f"HostName=localhost;DeviceId=sensor-1;SharedAccessKey={KEY}\n"
    assert (done.returncode, done.stdout) == (0, text), done.stderr
    assert back_end(served, "device", "connection-string", "sensor-1").stdout == text
    module = back_end(served, "device", "create", "sensor-1/m").stdout
    assert module.startswith("HostName=localhost;DeviceId=sensor-1;ModuleId=m;SharedAccessKey=")
    back_end(served, "device", "create", "a")
    assert back_end(served, "device", "list").stdout == (
        "deviceId  status   connectionState  statusReason\n"
        "sensor-1  enabled  Disconnected\n"
        "a         enabled  Disconnected\n"
    )
    listed = back_end(served, "device", "list", "--json").stdout
    assert [one["deviceId"] for one in json.loads(listed)] == ["sensor-1", "a"]
    assert KEY not in listed
    assert back_end(served, "device", "delete", "sensor-1").returncode == 0
    assert [device.id for device in served.devices] == ["a"]


def test_a_twin_is_shown_and_changed(served: LocalHub) -> None:
    device = served.create_device("sensor-1", desired={"a": 1, "b": 2}, tags={"floor": 3})
    assert json.loads(back_end(served, "twin", "show", "sensor-1").stdout)["tags"] == {"floor": 3}
    done = back_end(served, "twin", "update", "sensor-1", '{"a": null, "c": {"d": "ü"}}')
    assert json.loads(done.stdout)["properties"]["desired"]["c"] == {"d": "ü"}
    assert device.desired == {"b": 2, "c": {"d": "ü"}}
    back_end(served, "twin", "tags", "sensor-1", "-", stdin='{"floor": null, "room": "x"}')
    assert device.twin["tags"] == {"room": "x"}
    back_end(served, "twin", "replace", "sensor-1", '{"only": true}')
    assert device.desired == {"only": True}
    assert device.twin["tags"] == {"room": "x"}


def test_a_query_prints_a_table(served: LocalHub) -> None:
    served.create_device("a", tags={"floor": 3})
    served.create_device("bcd", tags={"floor": {"name": "x"}})
    text = "SELECT deviceId, tags.floor AS floor FROM devices"
    assert back_end(served, "query", text).stdout == 'deviceId  floor\na         3\nbcd       {"name": "x"}\n'
    assert json.loads(back_end(served, "query", text, "--json").stdout)[0] == {"deviceId": "a", "floor": 3}
    assert back_end(served, "query", "SELECT * FROM devices WHERE deviceId = 'z'").stdout == ""


def test_the_plaintext_port_serves_where_it_is_asked_for(served: LocalHub) -> None:
    text = f"HostName=localhost:{served.http_port};SharedAccessKeyName=iothubowner;SharedAccessKey={KEY}"
    done = run("hub", "device", "create", "a", "--plaintext", "--connection-string", text)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["twin", "show", "nobody"], 1, "status 404 DeviceNotFound"),
        (["twin", "update", "a", '{"a.b": 1}'], 1, "status 400 ArgumentInvalid"),
        (["twin", "update", "a", "[]"], 2, "the document is a JSON object, not list"),
        (["device", "create", "a"], 1, "status 409 DeviceAlreadyExists"),
        (["device", "create", "b", "--key", "short!"], 2, "SharedAccessKey is not base64"),
        (["query", "SELECT nonsense"], 1, "status 400 ArgumentInvalid"),
        (["method", "a", "reboot"], 1, "status 404 DeviceNotOnline"),
        (["method", "a", "reboot", "--payload", "{"], 2, "the payload is not JSON"),
        (["job", "show", "nobody"], 2, "there is no job 'nobody'"),
        (["job", "results", "nobody"], 2, "there is no job 'nobody'"),
        (["job", "cancel", "nobody"], 1, "status 404 JobNotFound"),
        (["job", "update", "j", "{}", "--where", "tags.a ="], 1, "status 400 ArgumentInvalid"),
        (["job", "update", "j", "[]", "--where", "*"], 2, "the document is a JSON object, not list"),
        (["job", "update", "j", "{}", "--where", "*", "--start", "soon"], 1, "startTime is a time in ISO"),
        (["events", "--source", "tweets"], 1, "there are no events 'tweets'"),
        (["fault", "set", "gremlins"], 1, "no fault 'gremlins'; there are answer_lost"),
        (["fault", "set", "quota", "--with", "x"], 2, "--with is NAME=VALUE, not 'x'"),
        (["fault", "clear", "7"], 1, "status 404 FaultNotFound"),
        (["fault", "disconnect", "nobody"], 1, "status 404 DeviceNotFound"),
    ],
)
def test_what_a_hub_refuses_is_one_line(
    served: LocalHub, arguments: list[str], status: int, message: str
) -> None:
    served.create_device("a")
    done = back_end(served, *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_job_updates_twins(served: LocalHub) -> None:
    for name in ("a", "b", "c"):
        served.create_device(name, tags={"floor": 1 if name == "c" else 3})
    where = ("--where", "tags.floor = 3")
    done = back_end(served, "job", "update", "j-1", '{"interval": 60}', *where, "--wait")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["status"], job["deviceJobStatistics"]["succeededCount"]) == ("completed", 2)
    assert [served.device(name).desired for name in "abc"] == [{"interval": 60}, {"interval": 60}, {}]
    back_end(served, "job", "tags", "j-2", "-", *where, "--wait", stdin='{"floor": 4}')
    assert [served.device(name).twin["tags"]["floor"] for name in "abc"] == [4, 4, 1]
    assert json.loads(back_end(served, "job", "show", "j-1").stdout) == job
    table = back_end(served, "job", "results", "j-1").stdout.splitlines()
    assert [row.split()[:2] for row in table] == [
        ["deviceId", "status"],
        ["a", "completed"],
        ["b", "completed"],
    ]
    listed = json.loads(back_end(served, "job", "list", "--json").stdout)
    assert [one["jobId"] for one in listed] == ["j-1", "j-2"]
    assert back_end(served, "job", "list").stdout.splitlines()[1].startswith("j-1    scheduleUpdateTwin")


def test_a_job_that_fails_somewhere_is_exit_status_1(served: LocalHub) -> None:
    served.create_device("a")
    done = back_end(served, "job", "method", "j-1", "reboot", "--where", "*", "--wait")
    assert (done.returncode, json.loads(done.stdout)["deviceJobStatistics"]["failedCount"]) == (1, 1)
    assert "404103" in back_end(served, "job", "results", "j-1").stdout


def test_a_job_for_later_is_cancelled(served: LocalHub) -> None:
    arguments = ("job", "update", "j-1", "{}", "--where", "*", "--start", "2999-01-01T00:00:00Z")
    done = back_end(served, *arguments)
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "scheduled")
    done = back_end(served, *arguments[:2], "j-2", *arguments[3:], "--wait", "--timeout", "2")
    assert done.returncode == 1
    assert "job j-2 is scheduled after 2 s" in done.stderr
    assert back_end(served, "job", "cancel", "j-1").returncode == 0
    assert "cancelled" in back_end(served, "job", "list").stdout


def test_a_direct_method(served: LocalHub) -> None:
    served.create_device("dev", KEY)
    with online(served.mqtts_port, "dev", KEY, METHODS, ca_file=served.ca_file) as wire:
        arguments = ("hub", "method", "dev", "reboot", "--payload", '{"delay": 3}')
        connection = ("--connection-string", served.service_connection_string, "--ca-file", served.ca_file)
        with running(*arguments, *connection) as process:
            message = wire.message()
            assert message.payload == b'{"delay":3}'
            request_id = message.topic.partition("$rid=")[2]
            wire.send(publish(f"$iothub/methods/res/200/?$rid={request_id}", b'{"done": true}'))
            output, errors = process.communicate(timeout=PATIENCE)
    assert (json.loads(output), process.returncode) == ({"status": 200, "payload": {"done": True}}, 0), errors


def listening(hub: LocalHub, *arguments: str) -> Any:
    connection = ("--connection-string", hub.service_connection_string, "--ca-file", hub.ca_file)
    return running("hub", "events", *arguments, *connection)


def test_events_are_printed_as_they_happen(served: LocalHub) -> None:
    device = served.create_device("dev", KEY)
    publisher = served._endpoint.events
    sources = ("--source", "twinChangeEvents", "--source", "packets", "--source", "faults")
    with listening(served, *sources) as one:
        wait_until(lambda: publisher.wants("packets"), "somebody listens")
        device.patch_desired({"a": 1})
        words = line(one).split(" ", 3)
        assert words[1:3] == ["dev", "updateTwin"]
        assert json.loads(words[3])["properties"]["desired"]["a"] == 1
        served.fault("quota").clear()
        assert line(one).split(" ")[1:3] == ["-", "faults"]
        with online(served.mqtts_port, "dev", KEY, METHODS, ca_file=served.ca_file):
            assert line(one).split(" ", 1)[1] == "dev in CONNECT\n"
        if os.name == "posix":
            assert finish(one, signal.SIGTERM) == 0
    wait_until(lambda: not publisher.wants("faults"), "nobody listens any more")
    with listening(served, "--json", "--count", "1", "--device", "dev") as one:
        wait_until(lambda: publisher.wants("twinChangeEvents"), "somebody listens")
        served.create_device("other")
        device.patch_tags({"x": 1})
        output, errors = one.communicate(timeout=PATIENCE)
    assert (one.returncode, errors) == (0, "")
    event = json.loads(output)
    assert (event["device"], event["body"]["tags"]) == ("dev", {"x": 1})


def test_a_stream_that_ends_is_exit_status_1(served: LocalHub) -> None:
    with listening(served) as one:
        wait_until(lambda: served._endpoint.events.wants("faults"), "somebody listens")
        served.close()
        output, errors = one.communicate(timeout=PATIENCE)
    assert (one.returncode, output) == (1, "")
    assert "ended the stream of its events" in errors


def test_faults_are_set_and_cleared(served: LocalHub) -> None:
    arguments = ("answer_status", "--operation", "report", "--times", "3", "--with", "status=503")
    done = back_end(served, "fault", "set", *arguments, "--with", "body=not JSON", "--device", "dev")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    (fault,) = served.faults
    assert (fault.kind, fault.device, fault.operation, fault.times) == ("answer_status", "dev", "report", 3)
    assert fault.parameters == {"status": 503, "error_code": None, "body": "not JSON"}
    assert back_end(served, "fault", "set", "quota", "--seconds", "60").stdout == "2\n"
    listed = json.loads(back_end(served, "fault", "list", "--json").stdout)
    assert [one["kind"] for one in listed] == ["answer_status", "quota"]
    assert back_end(served, "fault", "clear", "1").returncode == 0
    assert [one.kind for one in served.faults] == ["quota"]
    assert back_end(served, "fault", "clear").returncode == 0
    assert back_end(served, "fault", "list").stdout == ""
    kinds = back_end(served, "fault", "kinds").stdout
    assert "answer_late             seconds_late=1.0  " in kinds
    assert json.loads(back_end(served, "fault", "kinds", "--json").stdout)["quota"]["parameters"] == {}


def test_sessions_and_connections_are_ended(served: LocalHub) -> None:
    served.create_device("dev", KEY)
    with online(served.mqtts_port, "dev", KEY, METHODS, ca_file=served.ca_file) as wire:
        assert back_end(served, "fault", "forget-sessions").returncode == 0
        assert served._endpoint.sessions == {}
        assert back_end(served, "fault", "disconnect", "dev").returncode == 0
        with pytest.raises(Closed):
            wire.packet()


@pytest.mark.parametrize("command", ["events", "fault list", "fault set quota", "fault clear"])
def test_only_a_local_hub_has_events_and_faults(command: str) -> None:
    class Another(BaseHTTPRequestHandler):
        """A hub that has never heard of them."""

        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("iothub-errorcode", "ResourceNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_DELETE = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Another) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        name = f"127.0.0.1:{server.server_address[1]}"
        text = f"HostName={name};SharedAccessKeyName=iothubowner;SharedAccessKey={KEY}"
        done = run("hub", *command.split(), "--plaintext", "--connection-string", text)
        server.shutdown()
        thread.join(PATIENCE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"twin-device: {name} is no local hub: only that has events and faults\n"


# ---------------------------------------------------------------------- a device's twin


def test_get_prints_the_twin_with_its_versions(local_hub: LocalHub, device: Device) -> None:
    done = run("get", "--ca-file", local_hub.ca_file, device=device)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "desired": {"telemetryInterval": 30, "$version": 1},
        "reported": {"$version": 1},
    }


def test_report_takes_its_patch_from_standard_input(local_hub: LocalHub, device: Device) -> None:
    done = run("report", "-", "--ca-file", local_hub.ca_file, device=device, stdin='{"größe": "weit"}')
    assert (done.returncode, done.stdout) == (0, "reported, $version 2\n")
    assert device.reported == {"größe": "weit"}


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("as_json", [False, True])
def test_watch_prints_a_line_a_change(local_hub: LocalHub, device: Device, as_json: bool) -> None:
    options = ["--json"] if as_json else []
    expected: list[Any] = [
        ({"telemetryInterval": 30}, {"telemetryInterval": 30}, "telemetryInterval = 30"),
        (
            {"a": {"b": "x"}, "telemetryInterval": None},
            {"a": {"b": "x"}},
            'a.b = "x", telemetryInterval removed',
        ),
    ]
    with running("watch", "--ca-file", local_hub.ca_file, *options, device=device) as process:
        for index, (patch, desired, words) in enumerate(expected):
            if index:
                device.patch_desired(patch)
            text = line(process).rstrip("\n")
            if as_json:
                assert json.loads(text) == {"patch": patch, "desired": desired}
            else:
                assert text == words
        assert finish(process, signal.SIGINT) == 0


@pytest.mark.parametrize(("desired_version", "status"), [(3, 0), (None, 130)])
def test_watch_may_be_ended_in_the_moment_in_which_it_begins(
    mocker: MockerFixture, desired_version: int | None, status: int
) -> None:
    client = mocker.patch.object(cli, "_client").return_value = mocker.MagicMock()
    client.desired_version = desired_version
    client.__enter__.side_effect = KeyboardInterrupt
    assert cli.main(["watch"]) == status


def test_a_token_connects_any_mqtt_client(local_hub: LocalHub) -> None:
    for name in ("dev", "dev/m"):
        device = local_hub.create_device(name, KEY) if name == "dev" else local_hub.create_device(name)
        fields = json.loads(run("token", device=device).stdout)
        with Wire(local_hub.mqtts_port, local_hub.ca_file) as wire:
            packet = connect(fields["clientId"], fields["userName"], fields["password"])
            assert wire.send(packet).packet() == (0x20, b"\0\0")
        assert device.connections == 1
    alone = run("token", "--password", "--lifetime", "60", device=device).stdout
    assert alone.startswith("SharedAccessSignature sr=localhost%2Fdevices%2Fdev%2Fmodules%2Fm&sig=")
    assert abs(int(alone.rpartition("&se=")[2]) - time.time() - 60) < PATIENCE
    for text in ("", "HostName=h;DeviceId=d;x509=true"):
        done = run("token", *(("--connection-string", text) if text else ()))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_watch_says_that_nothing_is_desired(local_hub: LocalHub) -> None:
    empty = local_hub.create_device("empty")
    with running("watch", "--ca-file", local_hub.ca_file, device=empty) as process:
        assert line(process) == "(nothing desired)\n"


def test_watch_ends_when_nobody_reads_it(local_hub: LocalHub, device: Device) -> None:
    with running("watch", "--ca-file", local_hub.ca_file, device=device) as process:
        line(process)
        assert process.stdout is not None
        process.stdout.close()

        def ended() -> bool:
            device.patch_desired({"n": 1})
            return process.poll() is not None

        wait_until(ended, "the command ends")
        assert process.returncode == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_verbose_shows_the_wire_and_no_secret(local_hub: LocalHub, device: Device) -> None:
    done = run("--verbose", "report", '{"a": 1}', "--ca-file", local_hub.ca_file, device=device)
    assert done.returncode == 0
    assert "$iothub/twin/PATCH/properties/reported" in done.stderr
    key = device.connection_string.rpartition("SharedAccessKey=")[2]
    assert key not in done.stderr
    assert "sig=" not in done.stderr


# ---------------------------------------------------------------------- what goes wrong is one line

SERVICE = f"HostName=localhost:1;SharedAccessKeyName=service;SharedAccessKey={KEY}"
CONNECTION = f"HostName=localhost:1;DeviceId=dev-1;SharedAccessKey={KEY}"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["get"], 2, "no connection string: set IOTHUB_DEVICE_CONNECTION_STRING"),
        (["get", "--connection-string", "HostName=x"], 2, "DeviceId is missing"),
        (["get", "--connection-string", CONNECTION + "="], 2, "SharedAccessKey is not base64"),
        (["report", '{"a":', "--connection-string", CONNECTION], 2, "the document is not JSON"),
        (["report", "[1]", "--connection-string", CONNECTION], 2, "the document is a JSON object, not list"),
        (["report", '{"a.b": 1}', "--connection-string", CONNECTION], 2, "a.b: a key has no"),
        (["report", '{"a": NaN}', "--connection-string", CONNECTION], 2, "a: a number must be finite"),
        (["get", "--connection-string", CONNECTION, "--ca-file", "nowhere.pem"], 2, "cannot be read"),
        (["get", "--connection-string", CONNECTION, "--timeout", "0.5"], 1, "cannot connect to localhost:1"),
        (["hub", "run", "--mqtts-port", "0", "--device", "a b"], 2, "is not an id"),
        (["hub", "device", "list"], 2, "no connection string: set IOTHUB_CONNECTION_STRING"),
        (["hub", "device", "list", "--connection-string", CONNECTION], 2, "SharedAccessKeyName is missing"),
        (["hub", "device", "list", "--connection-string", SERVICE], 1, "cannot reach localhost:1"),
        (["hub", "run", "--mqtts-port", "0", "--device", "a:short"], 2, "a key is not base64"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_a_status(arguments: list[str], status: int, message: str) -> None:
    if arguments[:2] == ["hub", "run"]:
        arguments = [*arguments, "--https-port", "0"]
    done = run(*arguments)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert KEY not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "hub",
        "hub run",
        "hub device",
        "hub device create",
        "hub twin",
        "hub twin update",
        "hub query",
        "hub method",
        "hub job",
        "hub job update",
        "hub job method",
        "hub job results",
        "hub events",
        "hub fault",
        "hub fault set",
        "get",
        "watch",
        "report",
        "token",
    ],
)
def test_help_is_there(command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    "command",
    [
        "",
        "hub",
        "hub twin",
        "hub job",
        "hub fault",
        "hub job update j {}",
        "hub events --count x",
        "fly",
        "report",
        "get --timeout never",
        "hub run --mqtts-port 70000",
    ],
)
def test_wrong_use_is_exit_status_2(command: str) -> None:
    assert run(*command.split()).returncode == 2
