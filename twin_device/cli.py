"""The command twin-device: a local hub, a demo, and a device's twin from the shell."""

import argparse
import hashlib
import json
import logging
import os
import signal
import ssl
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from typing import Any

from . import __version__
from .core.errors import LocalError, RemoteError, TwinError

_VARIABLE = "IOTHUB_DEVICE_CONNECTION_STRING"
_SERVICE_VARIABLE = "IOTHUB_CONNECTION_STRING"
_JOB_POLL = 0.2  # seconds
_MAX_CERTIFICATE = 1 << 20  # characters of a file


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 the hub or the network failed, 2 wrong use."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        # A command of commands, without one of them.
        options.parser.print_help()
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
    parser.set_defaults(run=None, parser=parser)
    parser.add_argument("--version", action="version", version=f"twin-device {__version__}")
    parser.add_argument(
        "--verbose", action="store_true", help="show on standard error what goes over the wire"
    )
    commands = parser.add_subparsers(metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="play a device's story against a local hub",
        description="Start a local hub on free loopback ports, connect a device to it over TLS and play six "
        "scenes: what the back end wants, what the device gets and reports, also over a lost connection. "
        "Needs twin-device[hub]. Exit status 0 only if every step held.",
    )
    demo.set_defaults(run=_demo)

    hub = commands.add_parser(
        "hub",
        help="a local hub, and a back end's commands for any hub",
        description="Run a local hub; or do a back end's work on any hub, local or a real IoT Hub, by its "
        "REST API with a service connection string.",
    )
    hub.set_defaults(parser=hub)
    hub_commands = hub.add_subparsers(metavar="COMMAND")
    run = hub_commands.add_parser(
        "run",
        help="run a local hub until SIGINT or SIGTERM",
        description="Run a local hub: devices connect by MQTT over TLS, back ends by the REST API. "
        "When it is ready it prints how to connect to it. Needs twin-device[hub]. For development: it is no "
        "production hub.",
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
        "--https-port",
        type=port,
        default=8443,
        metavar="PORT",
        help="the back end's REST API over TLS; 0 is off, auto a free port (default 8443)",
    )
    run.add_argument(
        "--http-port",
        type=port,
        default=0,
        metavar="PORT",
        help="the REST API and a web page in plaintext, on loopback only; 0 is off, auto a free port "
        "(default 0)",
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
    run.add_argument(
        "--device-ca",
        action="append",
        default=[],
        metavar="FILE",
        help="a CA in PEM that may sign devices' certificates; may be repeated",
    )
    run.add_argument(
        "--data",
        metavar="DIR",
        help="keep identities, twins, sessions and jobs there over a restart (default: in memory alone)",
    )
    run.add_argument("--json", action="store_true", help="print the line that says how to connect as JSON")
    run.set_defaults(run=_hub_run)
    _add_backend_commands(hub_commands)
    _add_gateway_commands(commands)

    device = argparse.ArgumentParser(add_help=False)
    device.add_argument(
        "--connection-string",
        metavar="TEXT",
        help=f"the device's connection string; better in the environment variable {_VARIABLE}, since other "
        "users of this machine can see a command's arguments",
    )
    _add_connection_options(device)

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
    token = commands.add_parser(
        "token",
        help="print what a device's CONNECT needs, for other MQTT clients",
        description="Print the three fields of a device's CONNECT as JSON: clientId, userName, and as "
        "password a SAS token. Nothing is dialled. Whoever has the token is the device until it expires.",
    )
    token.add_argument("--connection-string", metavar="TEXT", help=f"as for get; better in {_VARIABLE}")
    token.add_argument(
        "--lifetime",
        type=_seconds,
        default=3600.0,
        metavar="SECONDS",
        help="how long the token is good (default 3600)",
    )
    token.add_argument("--password", action="store_true", help="print the token alone")
    token.set_defaults(run=_token)
    return parser


def _add_gateway_commands(commands: Any) -> None:
    gateway = commands.add_parser(
        "gateway",
        help="speak for a fleet of devices",
        description="Keep the twins of many devices synchronised in one process.",
    )
    gateway.set_defaults(parser=gateway)
    gateway_commands = gateway.add_subparsers(metavar="COMMAND")
    run = gateway_commands.add_parser(
        "run",
        help="connect all devices of a file and keep them connected, until SIGINT or SIGTERM",
        description="Connect all devices of a CSV file and keep them connected, until SIGINT or SIGTERM. On "
        "a terminal there is a live table of them, elsewhere a line for what happens. SIGHUP reads the file "
        "again. Systemd is told when it asks for it.",
        epilog="The file's first line names its columns, one of them connection_string; certificate and "
        "certificate_key name the files of a device with x509=true; lines that begin with # do not count. "
        "Exit status: 0 ended by a signal, 1 it failed, 2 wrong use, such as a bad file.",
    )
    run.add_argument("fleet", metavar="CSV", help="the devices; it holds keys, so only you should read it")
    _add_connection_options(run)
    run.add_argument(
        "--connects-per-second",
        type=_rate,
        default=20.0,
        metavar="NUMBER",
        help="how fast devices connect, at first and after an outage (default 20)",
    )
    run.add_argument(
        "--app",
        metavar="FILE",
        help="a Python file with a function setup(gateway), plain or coroutine, called before anything "
        "connects: there it declares handlers and starts tasks",
    )
    run.add_argument(
        "--status",
        metavar="FILE",
        help="keep the table there as JSON, for twin-device gateway health (default: status.json in the "
        "folder that systemd's RuntimeDirectory= made, if any)",
    )
    run.add_argument(
        "--store",
        metavar="DIR",
        help="keep what was desired, and what is to be reported, there over a restart, in a file a device "
        "(default: the folder that systemd's StateDirectory= made, if any)",
    )
    run.add_argument("--plain", action="store_true", help="lines in place of the table, on a terminal, too")
    run.set_defaults(run=_gateway_run)
    health = gateway_commands.add_parser(
        "health",
        help="tell whether a running gateway is well, for a monitor",
        description="Read the status file of a running gateway and tell how its devices are.",
        epilog="Exit status: 0 all devices are synchronised, 1 some are not, 2 no gateway writes the file.",
    )
    health.add_argument(
        "--status", metavar="FILE", help="as of gateway run (default /run/twin-gateway/status.json)"
    )
    health.add_argument(
        "--grace",
        type=_count,
        default=0,
        metavar="SECONDS",
        help="forgive a device that is not synchronised for a shorter time; each reconnects for a moment "
        "when its token is replaced (default 0)",
    )
    health.add_argument("--json", action="store_true", help="print the whole table as JSON")
    health.set_defaults(run=_gateway_health)


def _add_backend_commands(commands: Any) -> None:
    """The commands of a back end, which speak the REST API alone."""
    hub = argparse.ArgumentParser(add_help=False)
    hub.add_argument(
        "--connection-string",
        metavar="TEXT",
        help=f"the hub's service connection string; better in the environment variable {_SERVICE_VARIABLE}",
    )
    _add_connection_options(hub)

    device = commands.add_parser(
        "device", help="create, list and delete devices", description="Devices and modules."
    )
    device.set_defaults(parser=device)
    device_commands = device.add_subparsers(metavar="COMMAND")
    name_help = "the device, or DEVICE/MODULE"
    for word, about, work in (
        ("create", "create a device or module and print its connection string", _device_create),
        ("delete", "delete a device with its modules, or a module", _device_delete),
        ("connection-string", "print the connection string of a device or module", _device_connection_string),
    ):
        one = device_commands.add_parser(
            word, parents=[hub], help=about, description=about.capitalize() + "."
        )
        one.add_argument("name", metavar="ID", help=name_help)
        if word == "create":
            proof = one.add_mutually_exclusive_group()
            proof.add_argument("--key", metavar="BASE64", help="its key; made by the hub when absent")
            proof.add_argument(
                "--thumbprint",
                action="append",
                default=[],
                metavar="HEX",
                help="it connects with the certificate of this SHA-1 or SHA-256; twice for either of two",
            )
            proof.add_argument(
                "--x509-certificate",
                action="append",
                default=[],
                metavar="FILE",
                help="it connects with the certificate in this PEM file; twice for either of two",
            )
            proof.add_argument(
                "--ca-signed",
                action="store_true",
                help="it connects with a certificate signed by a CA that the hub knows",
            )
        one.set_defaults(run=work)
    about = "list the devices: id, status, connection"
    one = device_commands.add_parser("list", parents=[hub], help=about, description=about.capitalize() + ".")
    one.add_argument("--json", action="store_true", help="print the identities without their keys, as JSON")
    one.set_defaults(run=_device_list)

    twin = commands.add_parser(
        "twin", help="show and change twins", description="The twins of devices and modules."
    )
    twin.set_defaults(parser=twin)
    twin_commands = twin.add_subparsers(metavar="COMMAND")
    show = "print the whole twin as JSON"
    one = twin_commands.add_parser("show", parents=[hub], help=show, description=show.capitalize() + ".")
    one.add_argument("name", metavar="ID", help=name_help)
    one.set_defaults(run=_twin_show)
    for word, about, work in (
        ("update", "merge a patch into the desired properties; null removes one", _twin_update),
        ("replace", "replace all desired properties; tags stay", _twin_replace),
        ("tags", "merge a patch into the tags; null removes one", _twin_tags),
    ):
        one = twin_commands.add_parser(
            word,
            parents=[hub],
            help=about,
            description=about.capitalize() + ". Prints the twin after it.",
            epilog=f"""Example: twin-device hub twin {word} sensor-temp-042 '{{"telemetryInterval": 15}}'""",
        )
        one.add_argument("name", metavar="ID", help=name_help)
        one.add_argument(
            "document", metavar="JSON", help="a JSON object, or - to read it from standard input"
        )
        one.set_defaults(run=work)

    query = commands.add_parser(
        "query",
        parents=[hub],
        help="ask for twins with a query",
        description="Run a query in IoT Hub's query language and print its rows as a table.",
        epilog="""Example: twin-device hub query "SELECT deviceId, version FROM devices" """,
    )
    query.add_argument(
        "text", metavar="QUERY", help="SELECT ... FROM devices, devices.modules or devices.jobs ..."
    )
    query.add_argument("--json", action="store_true", help="print the rows as a JSON array")
    query.set_defaults(run=_hub_query)

    about = "have a device perform a direct method"
    method = commands.add_parser(
        "method",
        parents=[hub],
        help=about,
        description=about.capitalize() + ". Prints its status and payload as JSON.",
        epilog="""Example: twin-device hub method sensor-temp-042 reboot --payload '{"delay": 3}'""",
    )
    method.add_argument("name", metavar="ID", help=name_help)
    _add_method_options(method)
    method.set_defaults(run=_hub_method)
    _add_job_commands(commands, hub)
    _add_local_commands(commands, hub)


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", metavar="METHOD", help="the method's name")
    parser.add_argument("--payload", metavar="JSON", help="what the device is given; nothing when absent")
    parser.add_argument(
        "--response-timeout",
        type=_count,
        default=30,
        metavar="SECONDS",
        help="wait this long for the device's answer (default 30)",
    )
    parser.add_argument(
        "--connect-timeout",
        type=_count,
        default=0,
        metavar="SECONDS",
        help="wait this long for a device that is not there (default 0)",
    )


def _add_job_commands(commands: Any, hub: argparse.ArgumentParser) -> None:
    job = commands.add_parser(
        "job",
        help="update the twins of many devices, or have them perform a method",
        description="Jobs: one piece of work for every device that a condition chooses.",
    )
    job.set_defaults(parser=job)
    jobs = job.add_subparsers(metavar="COMMAND")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument(
        "--where",
        metavar="CONDITION",
        required=True,
        help="which devices, as behind WHERE in a query; '*' is all",
    )
    chosen.add_argument("--start", metavar="TIME", help="when, in ISO 8601 with Z (default: at once)")
    chosen.add_argument(
        "--longest", type=_count, default=3600, metavar="SECONDS", help="its longest time (default 3600)"
    )
    chosen.add_argument(
        "--wait",
        action="store_true",
        help="wait until it is done, at most --timeout seconds; exit status 1 if it failed on a device",
    )
    for word, about, section in (
        ("update", "merge a patch into the desired properties of many devices", "desired"),
        ("tags", "merge a patch into the tags of many devices", "tags"),
    ):
        one = jobs.add_parser(
            word,
            parents=[hub, chosen],
            help=about,
            description=about.capitalize() + ".",
            epilog=f"""Example: twin-device hub job {word} job-1 '{{"a": 1}}' --where "tags.site = 'A'" """,
        )
        one.add_argument("job", metavar="JOB", help="a new name: letters, digits and dashes")
        one.add_argument("document", metavar="JSON", help="the patch, or - to read it from standard input")
        one.set_defaults(run=_job_update, section=section)
    about = "have many devices perform a direct method"
    one = jobs.add_parser("method", parents=[hub, chosen], help=about, description=about.capitalize() + ".")
    one.add_argument("job", metavar="JOB", help="a new name: letters, digits and dashes")
    _add_method_options(one)
    one.set_defaults(run=_job_method)
    for word, about, work in (
        ("show", "print a job as JSON", _job_show),
        ("results", "print what became of a job on each device", _job_results),
        ("cancel", "do no more of a job", _job_cancel),
    ):
        one = jobs.add_parser(word, parents=[hub], help=about, description=about.capitalize() + ".")
        one.add_argument("job", metavar="JOB")
        if word == "results":
            one.add_argument("--json", action="store_true", help="print the rows as a JSON array")
        one.set_defaults(run=work)
    about = "list the jobs that the hub still knows"
    one = jobs.add_parser("list", parents=[hub], help=about, description=about.capitalize() + ".")
    one.add_argument("--json", action="store_true", help="print them as a JSON array")
    one.set_defaults(run=_job_list)


def _add_local_commands(commands: Any, hub: argparse.ArgumentParser) -> None:
    about = "print what happens in a local hub, as it happens"
    events = commands.add_parser(
        "events",
        parents=[hub],
        help=about,
        description=about.capitalize() + ": one line an event, until SIGINT. Only the local hub has this.",
        epilog="Sources: twinChangeEvents, deviceLifecycleEvents, deviceConnectionStateEvents, Telemetry, "
        "packets, faults.",
    )
    events.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="SOURCE",
        help="only these; may be repeated (default: all but packets)",
    )
    events.add_argument("--device", metavar="ID", help="only of this device, or DEVICE/MODULE")
    events.add_argument("--count", type=_count, metavar="NUMBER", help="end after so many")
    events.add_argument("--json", action="store_true", help="print each event as a line of JSON")
    events.set_defaults(run=_hub_events)

    fault = commands.add_parser(
        "fault",
        help="have a local hub do wrong",
        description="What a local hub does wrong on demand. Only the local hub has this.",
    )
    fault.set_defaults(parser=fault)
    faults = fault.add_subparsers(metavar="COMMAND")
    about = "have something go wrong from now on; prints its id"
    one = faults.add_parser(
        "set",
        parents=[hub],
        help=about,
        description=about.capitalize() + ".",
        epilog="Example: twin-device hub fault set answer_late --operation report --times 3 "
        "--with seconds_late=2",
    )
    one.add_argument("kind", metavar="KIND", help="what: see twin-device hub fault kinds")
    one.add_argument("--device", metavar="ID", help="only with this device, or DEVICE/MODULE")
    one.add_argument("--operation", choices=("retrieve", "report"), help="only with this operation")
    one.add_argument("--times", type=_count, metavar="NUMBER", help="how often")
    one.add_argument("--seconds", type=_seconds, metavar="SECONDS", help="how long")
    one.add_argument(
        "--with",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the kind; the value is JSON or text; may be repeated",
    )
    one.set_defaults(run=_fault_set)
    for word, about, work in (
        ("kinds", "list what can go wrong", _fault_kinds),
        ("list", "list what is set", _fault_list),
    ):
        one = faults.add_parser(word, parents=[hub], help=about, description=about.capitalize() + ".")
        one.add_argument("--json", action="store_true", help="print it as JSON")
        one.set_defaults(run=work)
    about = "clear one fault, or all"
    one = faults.add_parser("clear", parents=[hub], help=about, description=about.capitalize() + ".")
    one.add_argument("fault", metavar="FAULT", nargs="?", help="the number that set printed")
    one.set_defaults(run=_fault_clear)
    about = "forget what devices subscribed to and which messages wait for them"
    one = faults.add_parser(
        "forget-sessions", parents=[hub], help=about, description=about.capitalize() + "."
    )
    one.set_defaults(run=_fault_forget_sessions)
    about = "end a device's connection"
    one = faults.add_parser("disconnect", parents=[hub], help=about, description=about.capitalize() + ".")
    one.add_argument("name", metavar="ID", help="the device, or DEVICE/MODULE")
    one.set_defaults(run=_fault_disconnect)


def _add_connection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ca-file", metavar="PEM", help="trust this CA instead of the system's (a local hub's ca.pem)"
    )
    parser.add_argument(
        "--plaintext", action="store_true", help="no TLS: for a local hub's plaintext port only"
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="longest wait (default 60)"
    )


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


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0
    if not 0 < rate < 1e6:
        raise argparse.ArgumentTypeError(f"a rate is a positive number, not {text!r}")
    return rate


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"a number from 0 up, not {text!r}")
    return int(text)


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


def _allow_many_files() -> None:
    """As many open files as the system lets this process have: each device is one, and 1,024 is usual."""
    try:
        import resource
    except ImportError:
        return  # Windows has no such limit
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _hub_run(options: argparse.Namespace) -> int:
    from .hub import LocalHub

    _allow_many_files()

    def asked(port: int | str) -> int | None:
        return 0 if port == "auto" else int(port) or None

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: ended.set())
    try:
        hub = LocalHub(
            mqtts_port=asked(options.mqtts_port),
            mqtt_port=asked(options.mqtt_port),
            https_port=asked(options.https_port),
            http_port=asked(options.http_port),
            host_names=tuple(options.host_name or ("localhost",)),
            owner_key=options.owner_key,
            certificates=options.certificates,
            device_ca=options.device_ca,
            data=options.data,
        )
        hub.start()
    except ModuleNotFoundError as error:
        return _missing(error)
    except ValueError as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(error.strerror or error, 1)
    with hub:
        known = {device.id: device.keys for device in hub.devices}
        try:
            for text in options.device:
                # A key in base64 has no colon; an id may have one.
                name, colon, key = text.rpartition(":")
                name, key = (name, key) if colon else (text, "")
                if options.data and name in known:
                    # Kept from an earlier run, with its key.
                    if key and key not in known[name]:
                        raise ValueError(f"{name!r} is kept with another key in {options.data}")
                    continue
                hub.create_device(name, key=key or None)
        except ValueError as error:
            return _complain(error, 2)
        encrypted = hub.mqtts_port is not None or hub.https_port is not None
        devices = {}
        if hub.mqtts_port is not None:
            devices = {device.id: device.connection_string for device in hub.devices}
        elif hub.mqtt_port is not None:
            devices = {device.id: device.plaintext_connection_string for device in hub.devices}
        ready: dict[str, Any] = {
            "event": "ready",
            "mqtts": hub.mqtts_port or 0,
            "mqtt": hub.mqtt_port or 0,
            "https": hub.https_port or 0,
            "http": hub.http_port or 0,
            "ca": os.path.abspath(hub.ca_file) if encrypted else None,
            "service": hub.service_connection_string,
            "page": hub.page_url,
            "devices": devices,
        }
        if options.json:
            print(_line(ready), flush=True)
        else:
            ports = [f"{name} {ready[name]}" for name in ("mqtts", "mqtt", "https", "http") if ready[name]]
            print(f"ready: {', '.join(ports) or 'no port'}" + (f"; CA {ready['ca']}" if encrypted else ""))
            print(f"back end: {ready['service']}")
            if hub.http_port is not None:
                print(f"page: {ready['page']}")
            for name, text in devices.items():
                print(f"device {name}: {text}")
            sys.stdout.flush()
        while not ended.is_set():
            # Without a time limit no signal could end the wait on Windows.
            ended.wait(3600 if os.name == "posix" else 0.5)
    return 0


# ---------------------------------------------------------------------- a gateway


def _gateway_run(options: argparse.Namespace) -> int:
    from .service import run

    _allow_many_files()
    return run(options)


def _gateway_health(options: argparse.Namespace) -> int:
    from .service import health

    return health(options)


# ---------------------------------------------------------------------- a back end's work


def _backend(options: argparse.Namespace) -> Any:
    from .backend import Backend

    text = options.connection_string or os.environ.get(_SERVICE_VARIABLE)
    if not text:
        raise LocalError(f"no connection string: set {_SERVICE_VARIABLE}, or give --connection-string")
    return Backend(text, ca_file=options.ca_file, tls=not options.plaintext, timeout=options.timeout)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if text == "-" else text)
    except (ValueError, RecursionError) as error:
        raise LocalError(f"{what} is not JSON: {error}") from None


def _document(text: str) -> dict[str, Any]:
    document = _json(text, "the document")
    if not isinstance(document, dict):
        raise LocalError(f"the document is a JSON object, not {type(document).__name__}")
    return document


def _device_create(options: argparse.Namespace) -> int:
    thumbprints = [*options.thumbprint, *map(_thumbprint_of, options.x509_certificate)]
    if len(thumbprints) > 2:
        raise LocalError(f"an identity has two certificates at most, not {len(thumbprints)}")
    with _backend(options) as backend:
        backend.create(options.name, options.key, thumbprints=thumbprints, ca_signed=options.ca_signed)
        print(backend.connection_string(options.name))
    return 0


def _thumbprint_of(path: str) -> str:
    """SHA-256 of the first certificate in a PEM file."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            text = file.read(_MAX_CERTIFICATE)
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}") from None
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    _, found, rest = text.partition(begin)
    try:
        if not found or end not in rest:
            raise ValueError
        der = ssl.PEM_cert_to_DER_cert(f"{begin}{rest.partition(end)[0]}{end}")
    except ValueError:
        raise LocalError(f"{path} holds no certificate in PEM") from None
    return hashlib.sha256(der).hexdigest().upper()


def _device_delete(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        backend.delete(options.name)
    return 0


def _device_connection_string(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        print(backend.connection_string(options.name))
    return 0


def _device_list(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        found = backend.identities()
    rows = [
        {name: one.get(name) for name in ("deviceId", "status", "connectionState", "statusReason")}
        for one in found
    ]
    _print_rows(rows, options.json)
    return 0


def _twin_show(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        _print_document(backend.twin(options.name))
    return 0


def _twin_update(options: argparse.Namespace) -> int:
    document = _document(options.document)
    with _backend(options) as backend:
        _print_document(backend.update_twin(options.name, {"properties": {"desired": document}}))
    return 0


def _twin_replace(options: argparse.Namespace) -> int:
    document = _document(options.document)
    with _backend(options) as backend:
        # A replacement replaces the tags, too: they are sent back as they are.
        tags = backend.twin(options.name).get("tags") or {}
        body = {"tags": tags, "properties": {"desired": document}}
        _print_document(backend.update_twin(options.name, body, replace=True))
    return 0


def _twin_tags(options: argparse.Namespace) -> int:
    document = _document(options.document)
    with _backend(options) as backend:
        _print_document(backend.update_twin(options.name, {"tags": document}))
    return 0


def _hub_query(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        _print_rows(backend.query(options.text), options.json)
    return 0


def _method(options: argparse.Namespace) -> dict[str, Any]:
    method: dict[str, Any] = {
        "methodName": options.method,
        "responseTimeoutInSeconds": options.response_timeout,
        "connectTimeoutInSeconds": options.connect_timeout,
    }
    if options.payload is not None:
        method["payload"] = _json(options.payload, "the payload")
    return method


def _hub_method(options: argparse.Namespace) -> int:
    method = _method(options)
    # The hub answers when the device has, or that it did not.
    options.timeout = max(options.timeout, options.response_timeout + options.connect_timeout + 10)
    with _backend(options) as backend:
        _print_document(backend.invoke(options.name, method))
    return 0


def _job_update(options: argparse.Namespace) -> int:
    document = _document(options.document)
    twin = {"tags": document} if options.section == "tags" else {"properties": {"desired": document}}
    return _make_job(options, {"type": "scheduleUpdateTwin", "updateTwin": {"etag": "*", **twin}})


def _job_method(options: argparse.Namespace) -> int:
    return _make_job(options, {"type": "scheduleDeviceMethod", "cloudToDeviceMethod": _method(options)})


def _make_job(options: argparse.Namespace, work: dict[str, Any]) -> int:
    body = {**work, "queryCondition": options.where, "maxExecutionTimeInSeconds": options.longest}
    if options.start is not None:
        body["startTime"] = options.start
    with _backend(options) as backend:
        job = backend.create_job(options.job, body)
        if options.wait:
            deadline = time.monotonic() + options.timeout
            while job.get("status") not in ("completed", "failed", "cancelled"):
                if time.monotonic() > deadline:
                    raise RemoteError(f"job {options.job} is {job['status']} after {options.timeout:g} s")
                time.sleep(_JOB_POLL)
                job = backend.job(options.job)
    _print_document(job)
    failed = (job.get("deviceJobStatistics") or {}).get("failedCount")
    return 1 if options.wait and (failed or job["status"] != "completed") else 0


def _job_show(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        _print_document(backend.job(options.job))
    return 0


def _job_results(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        backend.job(options.job)
        text = f"SELECT * FROM devices.jobs WHERE devices.jobs.jobId = {json.dumps(options.job)}"  # noqa: S608  # no SQL
        rows = backend.query(text)
    if not options.json:
        names = ("deviceId", "status", "outcome", "error", "endTimeUtc")
        rows = [{name: row.get(name) for name in names} for row in rows]
        for row in rows:
            row["outcome"] = (row["outcome"] or {}).get("deviceMethodResponse")
    _print_rows(rows, options.json)
    return 0


def _job_cancel(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        backend.cancel_job(options.job)
    return 0


def _job_list(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        jobs = backend.jobs()
    if not options.json:
        names = ("jobId", "type", "status", "queryCondition", "startTime", "endTime")
        counts = ("deviceCount", "succeededCount", "failedCount")
        jobs = [
            {name: job.get(name) for name in names}
            | {name: (job.get("deviceJobStatistics") or {}).get(name) for name in counts}
            for job in jobs
        ]
    _print_rows(jobs, options.json)
    return 0


def _hub_events(options: argparse.Namespace) -> int:
    left = options.count
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The hub says every 15 s that it is there.
    options.timeout = max(options.timeout, 60.0)
    with suppress(KeyboardInterrupt), _backend(options) as backend:
        for event in backend.events(options.source, options.device):
            if left == 0:
                break
            if event:
                print(_line(event) if options.json else _told(event), flush=True)
                left = None if left is None else left - 1
                if left == 0:
                    break
    return 0


def _told(event: dict[str, Any]) -> str:
    """An event in a line: when, of whom, what."""
    if "count" in event:
        return f"({event['count']} events were missed: they came too fast)"
    when = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S.%f")[:-3]
    body = event["body"]
    if event["source"] == "packets":
        words = [body["direction"], body["kind"], body["topic"] or "", body["payload"]]
        return " ".join([when, event["device"], *(word for word in words if word)])
    words = [when, event["device"] or "-", event["properties"].get("opType") or event["source"]]
    return " ".join([*words, body if isinstance(body, str) else _line(body)])


def _fault_set(options: argparse.Namespace) -> int:
    parameters = {}
    for text in options.parameters:
        name, sign, value = text.partition("=")
        if not sign:
            raise LocalError(f"--with is NAME=VALUE, not {text!r}")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    wanted = {name: getattr(options, name) for name in ("kind", "device", "operation", "times", "seconds")}
    with _backend(options) as backend:
        print(backend.set_fault({**wanted, "parameters": parameters})["id"])
    return 0


def _fault_kinds(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        kinds = backend.faults()["kinds"]
    if options.json:
        _print_document(kinds)
        return 0
    rows = [
        {
            "kind": name,
            "parameters": ", ".join(f"{one}={_line(value)}" for one, value in kind["parameters"].items()),
            "operation": "any" if kind["ofOperations"] else "",
            "what happens": kind["text"],
        }
        for name, kind in kinds.items()
    ]
    _print_rows(rows, False)
    return 0


def _fault_list(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        _print_rows(backend.faults()["active"], options.json)
    return 0


def _fault_clear(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        backend.clear_faults(options.fault)
    return 0


def _fault_forget_sessions(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        backend.forget_sessions()
    return 0


def _fault_disconnect(options: argparse.Namespace) -> int:
    with _backend(options) as backend:
        backend.disconnect(options.name)
    return 0


def _print_document(document: Any) -> None:
    print(json.dumps(document, ensure_ascii=False, indent=2))


def _print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table with a column for every member that a row has, or a JSON array."""
    if as_json:
        _print_document(rows)
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells if names else []:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else _line(value)


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
    _print_document(twin)
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

    try:
        with client:
            if not client.desired:
                # Nothing is no change: no handler was called for it.
                changed({}, {})
            client.run_forever()
    except KeyboardInterrupt:
        # What it prints may be seen, and ended, before run_forever() waits for that.
        if client.desired_version is None:
            raise
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
    patch = _document(options.patch)
    from .core.patch import check

    # Before any connection: what is wrong with it needs no hub to be seen.
    check(patch)
    with _client(options) as client:
        version = client.report(patch)
    print(f"reported, $version {version}")
    return 0


def _token(options: argparse.Namespace) -> int:
    from .core.credentials import from_connection_string

    text = options.connection_string or os.environ.get(_VARIABLE)
    if not text:
        raise LocalError(f"no connection string: set {_VARIABLE}, or give --connection-string")
    credentials = from_connection_string(text)
    if credentials.key is None:
        raise LocalError("the connection string has no SharedAccessKey, so no token can be made of it")
    password = credentials.password(int(time.time() + options.lifetime))
    if options.password:
        print(password)
    else:
        names = {"clientId": credentials.client_id, "userName": credentials.user_name()}
        _print_document({**names, "password": password})
    return 0


if __name__ == "__main__":
    sys.exit(main())
