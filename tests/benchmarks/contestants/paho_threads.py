"""Bare paho with its own network thread."""

import threading

from byhand import Device, context
from orders import SOON, Listening, Stopwatch, obey


class Orders(Listening):
    def __init__(self):
        super().__init__()
        self.device = None
        self.context = None

    def connect(self, string):
        watch = Stopwatch()
        self.context = self.context or context()
        self.device = Device(string, self.context, self.seen)
        self.device.connect()
        self.device.mqtt.loop_start()
        if not self.device.answered.wait(SOON):
            raise TimeoutError("the first twin")
        return watch.stop()

    def close(self):
        self.device.mqtt.disconnect()
        self.device.mqtt.loop_stop()

    def one_by_one(self, count, base):
        send = self.device.send
        ended = threading.Event()
        watch = Stopwatch()
        for number in range(count):
            ended.clear()
            send({"batteryLevel": number % 100, "uptime": base + number}, ended.set)
            if not ended.wait(SOON):
                raise TimeoutError("an answer")
        return watch.stop()

    def at_once(self, count, base):
        ended = [threading.Event() for _ in range(count)]
        watch = Stopwatch()
        for number, one in enumerate(ended):
            self.device.send({"uptime": base + number}, one.set)
        for one in ended:
            if not one.wait(SOON):
                raise TimeoutError("an answer")
        return watch.stop(patches=count)


obey(Orders())
