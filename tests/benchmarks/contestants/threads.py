"""twin_device.TwinClient, for threads."""

import time

from orders import Listening, Stopwatch, obey, until

from twin_device import TwinClient


class Orders(Listening):
    def __init__(self):
        super().__init__()
        self.client = None
        self.clients = []

    def connect(self, string):
        """Connect one client; it is synchronised at the end of the time."""
        watch = Stopwatch()
        self.client = TwinClient.from_connection_string(string)
        self.client.on_desired(lambda patch, _desired: self.seen(patch))
        self.client.connect()
        return watch.stop()

    def close(self):
        self.client.close()

    def one_by_one(self, count, base):
        report = self.client.report
        watch = Stopwatch()
        for number in range(count):
            report({"batteryLevel": number % 100, "uptime": base + number})
        return watch.stop()

    def at_once(self, count, base):
        """Many reports before the first is answered."""
        sent = self.client.statistics["reports"]
        watch = Stopwatch()
        reports = [self.client.report({"uptime": base + number}, wait=False) for number in range(count)]
        for report in reports:
            report.wait()
        found = watch.stop()
        return {**found, "patches": self.client.statistics["reports"] - sent}

    def fleet(self, strings):
        watch = Stopwatch()
        made = [TwinClient.from_connection_string(string) for string in strings]
        for client in made:
            client.on_desired(lambda patch, desired: None)
            client.connect(wait=False)
        self.clients += made
        self.synchronised(1)
        return watch.stop()

    def synchronised(self, connects):
        """Wait until every client is, after so many connections."""
        for client in self.clients:
            until(
                lambda client=client: (
                    client.state == "synchronised" and client.statistics["connects"] >= connects
                ),
                client,
            )
        return {"at": time.monotonic()}

    def end(self):
        for client in self.clients:
            client.disconnect()


obey(Orders())
