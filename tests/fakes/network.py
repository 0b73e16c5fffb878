"""MicroPython's network, as a board's program meets it: a Wi-Fi whose joins go as `joins` says."""

STA_IF = 0
# What becomes of each join: True, or the status that stays. When none is left the last one counts.
joins = [True]
calls = []
settings = {}


def country(code):
    settings["country"] = code


def hostname(name):
    settings["hostname"] = name


class WLAN:
    def __init__(self, interface):
        assert interface == STA_IF
        self._state = 0

    def active(self, on):
        calls.append("on" if on else "off")
        if not on:
            self._state = 0

    def connect(self, ssid, password):
        calls.append("join " + ssid)
        self._state = joins.pop(0) if len(joins) > 1 else joins[0]

    def disconnect(self):
        calls.append("leave")
        self._state = 0

    def isconnected(self):
        return self._state is True

    def status(self):
        return self._state

    def ifconfig(self):
        return ("192.0.2.7", "255.255.255.0", "192.0.2.1", "192.0.2.1")

    def lose(self):
        """The access point goes away."""
        self._state = 0
