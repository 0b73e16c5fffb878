"""The command twin-device: a local hub, a demo, and a device's twin from the shell."""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from typing import Any

from . import __version__
from .core.errors import LocalError, TwinError

_VARIABLE = "IOTHUB_DEVICE_CONNECTION_STRING"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 the hub or the network failed, 2 wrong use."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None or (options.command == "hub" and options.hub_command is None):
        (parser if options.command is None else options.parser).print_help()
        return 2
    if options.verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(name)s %(message)s")
    try:
        return int(options.run(options))
    except LocalError as error:
        return _complain(error, 2)
    except TwinError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python must not complain about that at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(error: object, status: int) -> int:
    print(f"twin-device: {error}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="twin-device",
        description="Azure IoT Hub device twins: a correct client, and a local hub to develop against.",
        epilog="Exit status: 0 done, 1 the hub or the network failed, 2 wrong use.",
    )
    parser.add_argument("--version", action="version", version=f"twin-device {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help="show on standard error what goes over the wire"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="play a device's story against a local hub",
        description="Start a local hub on free loopback ports, connect a device to it over TLS and play six "
        "scenes: what the back end wants, what the device gets and reports, also over a lost connection. "
        "Needs twin-device[hub]. Exit status 0 only if every step held.",
    )
    demo.set_defaults(run=_demo)

    hub = commands.add_parser("hub", help="a local hub", description="A local hub for development and tests.")
    hub.set_defaults(parser=hub)
    hub_commands = hub.add_subparsers(dest="hub_command", metavar="COMMAND")
    run = hub_commands.add_parser(
        "run",
        help="run a local hub until SIGINT or SIGTERM",
        description="Run a local hub with the device endpoint of an IoT Hub: MQTT over TLS, device twins. "
        "When it is ready it prints how to connect to it. Needs twin-device[hub]. For development: it keeps "
        "everything in memory and is no production hub.",
        epilog="Example: twin-device hub run --device sensor-temp-042",
    )
    port = _port_or_auto
    run.add_argument(
        "--mqtts-port",
        type=port,
        default=8883,
        metavar="PORT",
        help="MQTT over TLS; 0 is off, auto a free port (default 8883)",
    )
    run.add_argument(
        "--mqtt-port",
        type=port,
        default=0,
        metavar="PORT",
        help="MQTT in plaintext, on loopback only; 0 is off, auto a free port (default 0)",
    )
    run.add_argument(
        "--host-name",
        action="append",
        metavar="NAME",
        help="a name that the hub goes by; may be repeated (default localhost)",
    )
    run.add_argument("--owner-key", metavar="BASE64", help="the key of the hub's policies; made when absent")
    run.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="ID[:KEY]",
        help="a device, or module (DEVICE/MODULE), to begin with; the key in base64 is made when absent",
    )
    run.add_argument(
        "--certificates",
        metavar="DIR",
        help="ca.pem and server.pem: used when there, made when DIR is empty (default: a folder that goes "
        "with the hub)",
    )
    run.add_argument("--json", action="store_true", help="print the line that says how to connect as JSON")
    run.set_defaults(run=_hub_run)

    device = argparse.ArgumentParser(add_help=False)
    device.add_argument(
        "--connection-string",
        metavar="TEXT",
        help=f"the device's connection string; better in the environment variable {_VARIABLE}, since other "
        "users of this machine can see a command's arguments",
    )
    device.add_argument(
        "--ca-file", metavar="PEM", help="trust this CA instead of the system's (a local hub's ca.pem)"
    )
    device.add_argument(
        "--plaintext", action="store_true", help="no TLS: for a local hub's plaintext port only"
    )
    device.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="longest wait (default 60)"
    )

    get = commands.add_parser(
        "get",
        parents=[device],
        help="print a device's twin as JSON",
        description="Retrieve the device's twin and print it as JSON, each section with its $version.",
    )
    get.set_defaults(run=_get)
    watch = commands.add_parser(
        "watch",
        parents=[device],
        help="print every change of the desired properties",
        description="Print one line for the desired properties as they are, and one for every change, until "
        "SIGINT or SIGTERM. After a lost connection there is one line for all that was missed.",
    )
    watch.add_argument("--json", action="store_true", help='print {"patch": ..., "desired": ...} a change')
    watch.set_defaults(run=_watch)
    report = commands.add_parser(
        "report",
        parents=[device],
        help="report properties",
        description="Bring a JSON merge patch of the reported properties to the hub; null removes one.",
        epilog="""Example: twin-device report '{"batteryLevel": 55}'""",
    )
    report.add_argument("patch", metavar="JSON", help="the patch, or - to read it from standard input")
    report.set_defaults(run=_report)
    return parser


def _port_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isascii() and text.isdigit() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, or auto, not {text!r}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"a time is a positive number of seconds, not {text!r}")
    return seconds


def _line(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False)


# ---------------------------------------------------------------------- the local hub


def _demo(_options: argparse.Namespace) -> int:
    try:
        from .demo import play
    except ModuleNotFoundError as error:
        return _missing(error)
    return play()


def _missing(error: ModuleNotFoundError) -> int:
    return _complain(f"this command needs the package {error.name}: pip install 'twin-device[hub]'", 2)


def _hub_run(options: argparse.Namespace) -> int:
    from .hub import LocalHub

    def asked(port: int | str) -> int | None:
        return 0 if port == "auto" else int(port) or None

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: ended.set())
    try:
        hub = LocalHub(
            mqtts_port=asked(options.mqtts_port),
            mqtt_port=asked(options.mqtt_port),
            host_names=tuple(options.host_name or ("localhost",)),
            owner_key=options.owner_key,
            certificates=options.certificates,
        )
        hub.start()
    except ModuleNotFoundError as error:
        return _missing(error)
    except ValueError as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(error.strerror or error, 1)
    with hub:
        try:
            for text in options.device:
                # A key in base64 has no colon; an id may have one.
                name, colon, key = text.rpartition(":")
                hub.create_device(name if colon else text, key=key if colon else None)
        except ValueError as error:
            return _complain(error, 2)
        encrypted = hub.mqtts_port is not None
        devices = {
            device.id: device.connection_string if encrypted else device.plaintext_connection_string
            for device in hub.devices
        }
        ready: dict[str, Any] = {
            "event": "ready",
            "mqtts": hub.mqtts_port or 0,
            "mqtt": hub.mqtt_port or 0,
            "https": 0,
            "http": 0,
            "ca": os.path.abspath(hub.ca_file) if encrypted else None,
            "service": hub.service_connection_string,
            "devices": devices,
        }
        if options.json:
            print(_line(ready), flush=True)
        else:
            ports = [f"{name} {ready[name]}" for name in ("mqtts", "mqtt") if ready[name]]
            print(f"ready: {', '.join(ports) or 'no port'}" + (f"; CA {ready['ca']}" if encrypted else ""))
            for name, text in devices.items():
                print(f"device {name}: {text}")
            sys.stdout.flush()
        while not ended.is_set():
            # Without a time limit no signal could end the wait on Windows.
            ended.wait(3600 if os.name == "posix" else 0.5)
    return 0


# ---------------------------------------------------------------------- a device's twin


def _client(options: argparse.Namespace) -> Any:
    from .client import TwinClient

    text = options.connection_string or os.environ.get(_VARIABLE)
    if not text:
        raise LocalError(f"no connection string: set {_VARIABLE}, or give --connection-string")
    return TwinClient.from_connection_string(
        text, ca_file=options.ca_file, tls=not options.plaintext, timeout=options.timeout
    )


def _get(options: argparse.Namespace) -> int:
    with _client(options) as client:
        twin = client.retrieve()
        twin["desired"]["$version"] = client.desired_version
        twin["reported"]["$version"] = client.reported_version
    print(json.dumps(twin, ensure_ascii=False, indent=2))
    return 0


def _watch(options: argparse.Namespace) -> int:
    client = _client(options)
    broken = []

    @client.on_desired  # type: ignore[untyped-decorator]  # client is Any: its module is imported late
    def changed(patch: dict[str, Any], desired: dict[str, Any]) -> None:
        words = ", ".join(_changes(patch, "")) or "(nothing desired)"
        line = _line({"patch": patch, "desired": desired}) if options.json else words
        try:
            print(line, flush=True)
        except BrokenPipeError as error:
            broken.append(error)
            client.close()

    @client.on_error  # type: ignore[untyped-decorator]  # as above
    def failed(error: Exception) -> None:
        _complain(error, 1)

    with client:
        if not client.desired:
            # Nothing is no change: no handler was called for it.
            changed({}, {})
        client.run_forever()
    if broken:
        raise broken[0]
    return 0


def _changes(patch: dict[str, Any], path: str) -> list[str]:
    """A patch in words, one for each leaf: "temperatureThreshold.min = 20.0", "loggingLevel removed"."""
    words = []
    for key, value in patch.items():
        if value is None:
            words.append(f"{path}{key} removed")
        elif isinstance(value, dict) and value:
            words += _changes(value, f"{path}{key}.")
        else:
            words.append(f"{path}{key} = {_line(value)}")
    return words


def _report(options: argparse.Namespace) -> int:
    text = sys.stdin.read() if options.patch == "-" else options.patch
    try:
        patch = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LocalError(f"the patch is not JSON: {error}") from None
    from .core.patch import check

    # Before any connection: what is wrong with it needs no hub to be seen.
    check(patch)
    with _client(options) as client:
        version = client.report(patch)
    print(f"reported, $version {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
