"""MicroPython's machine, as a board's program meets it: pins, an ADC, a watchdog, a restart."""

pins = {}
feeds = []
adc = 14000


class Restart(SystemExit):
    """What reset() does to a test: the program is over."""


def reset():
    raise Restart("restarted")


class Pin:
    OUT = 1

    def __init__(self, name, mode=None, value=0):
        self._name = name
        pins[name] = value

    def value(self, level=None):
        if level is None:
            return pins[self._name]
        pins[self._name] = level
        return level

    __call__ = value


class ADC:
    def __init__(self, channel):
        self.channel = channel

    def read_u16(self):
        return adc


class WDT:
    def __init__(self, timeout):
        assert timeout <= 8388, "a Pico W's watchdog knows no more"
        feeds.append("made")

    def feed(self):
        feeds.append("fed")
