"""mosquitto's commands as a device: the twin's raw topics against the local hub, from a shell."""

import re
import shutil
import subprocess

import pytest

from tests.hub_wire import DESIRED, GET, KEY, REPORT, RES, token, user
from tests.waiting import PATIENCE, wait_until
from twin_device.hub import Device, LocalHub


class Shell:
    """Runs the commands as one device. They exclude each other: an identity has one connection."""

    def __init__(self, hub: LocalHub, device: Device) -> None:
        for command in ("mosquitto_pub", "mosquitto_sub"):
            if shutil.which(command) is None:
                pytest.skip(f"{command} is not here (Debian has it in mosquitto-clients)")
        self._device = device
        self._options = ["-h", "localhost", "-p", str(hub.mqtts_port), "--cafile", hub.ca_file]
        self._options += ["-V", "mqttv311", "-q", "1", "-i", device.id]
        self._options += ["-u", user(device.id), "-P", token(device.id, KEY)]

    def start(self, command: str, topic: str, *more: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [command, *self._options, "-t", topic, *more], stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def end(self, process: "subprocess.Popen[str]") -> str:
        """What a command printed once it has ended, well."""
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert process.returncode == 0, (process.returncode, out, err)
        return out

    def run(self, command: str, topic: str, *more: str) -> str:
        with self.start(command, topic, *more) as process:
            return self.end(process)

    def ask(self, topic: str, line: str) -> tuple[str, int]:
        """Publish a line and stay for the answer: its topic, and how long it is. The session has to be
        subscribed: mosquitto_pub cannot, but prints what it is sent."""
        before = len(self._device.packets)

        def answered() -> bool:
            # The answer goes out at QoS 1. Only then the input may end, and the command with it.
            packets = self._device.packets[before:]
            return ("in", "PUBACK") in [(one.direction, one.kind) for one in packets]

        with self.start("mosquitto_pub", topic, "-c", "-d", "-l") as process:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            wait_until(answered, "the answer")
            out = self.end(process)
        found = re.search(r"received PUBLISH \(.*, '(.*)', \.\.\. \((\d+) bytes\)\)", out)
        assert found is not None
        return found[1], int(found[2])


def test_report_desired_and_retrieve() -> None:
    # Debian's mosquitto prints no more than an answer's topic and length, and at QoS 0 too late to wait for.
    with LocalHub(answer_qos="granted") as hub:
        device = hub.create_device("dev", KEY, desired={"interval": 30})
        shell = Shell(hub, device)

        shell.run("mosquitto_pub", REPORT + "1", "-m", '{"battery": 55}')
        assert device.reported == {"battery": 55}

        with shell.start("mosquitto_sub", DESIRED, "-C", "1", "-W", "20", "-F", "%t %p") as process:
            wait_until(lambda: device.packets[-1].kind == "SUBACK", "the subscription")
            device.patch_desired({"interval": 15, "old": None})
            notification = '$version=2 {"interval":15,"old":null,"$version":2}\n'
            assert shell.end(process) == DESIRED[:-1] + "?" + notification

        # The persistent session stays, and its subscription, for the command that comes after.
        shell.run("mosquitto_sub", RES, "-c", "-E")
        document = '{"desired":{"interval":15,"$version":2},"reported":{"battery":55,"$version":2}}'
        assert shell.ask(GET + "2", "") == ("$iothub/twin/res/200/?$rid=2", len(document))
        assert shell.ask(REPORT + "3", '{"battery": 54}') == ("$iothub/twin/res/204/?$rid=3&$version=3", 0)
        topic, length = shell.ask(REPORT + "4", '{"bad key": 1}')
        assert topic == "$iothub/twin/res/400/?$rid=4"
        assert length > 0
        assert device.reported == {"battery": 54}
