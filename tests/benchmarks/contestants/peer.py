"""azure-iot-device, its synchronous client as its samples use it."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import paho.mqtt.client
from azure.iot.device import IoTHubDeviceClient
from orders import Listening, Stopwatch, obey, until


class Port:
    """It dials 8883 and no other port: this one thing is changed for it."""

    number = 0

    def __init__(self):
        dial = paho.mqtt.client.Client.connect

        def connect(client, host, port=0, *args, **options):
            return dial(client, host, self.number, *args, **options)

        paho.mqtt.client.Client.connect = connect

    def without(self, string):
        host, _, rest = string.partition(";")
        name, _, port = host.partition(":")
        self.number = int(port)
        return f"{name};{rest}"


class Orders(Listening):
    def __init__(self):
        super().__init__()
        self.port = Port()
        self.client = None
        self.clients = []
        self.connects = {}
        self.neighbour = None
        self._dialling = None
        # Fifty calls at once need fifty threads; they are there before the time begins.
        self._pool = None

    def _made(self, string):
        client = IoTHubDeviceClient.create_from_connection_string(self.port.without(string))

        def state_changed():
            if client.connected:
                self.connects[client] = self.connects.get(client, 0) + 1

        client.on_connection_state_change = state_changed
        # That a connection was lost it would print, some hundred times over.
        client.on_background_exception = lambda error: None
        client.connect()
        client.on_twin_desired_properties_patch_received = self.seen
        client.get_twin()
        return client

    def connect(self, string):
        """Connected, told of desired patches, and the twin retrieved: what others call synchronised."""
        watch = Stopwatch()
        self.client = self._made(string)
        return watch.stop()

    def close(self):
        self.client.shutdown()

    def one_by_one(self, count, base):
        report = self.client.patch_twin_reported_properties
        watch = Stopwatch()
        for number in range(count):
            report({"batteryLevel": number % 100, "uptime": base + number})
        return watch.stop()

    def at_once(self, count, base):
        if self._pool is None:
            self._pool = ThreadPoolExecutor(count)
        # Each waits for all: every thread is made.
        barrier = threading.Barrier(count)
        list(self._pool.map(lambda _number: barrier.wait(), range(count)))
        report = self.client.patch_twin_reported_properties
        watch = Stopwatch()
        list(self._pool.map(lambda number: report({"uptime": base + number}), range(count)))
        return watch.stop(patches=count)

    def fleet(self, strings):
        # Its connect() blocks: eight callers, as a gateway would have.
        watch = Stopwatch()
        with ThreadPoolExecutor(8) as pool:
            self.clients += pool.map(self._made, strings)
        return watch.stop()

    def synchronised(self, connects):
        # Connected is all that it tells. It retrieves nothing by itself.
        until(lambda: all(self.connects.get(client, 0) >= connects for client in self.clients), "reconnected")
        return {"at": time.monotonic()}

    def hang(self, string):
        """A neighbour whose hub never answers the TLS handshake."""
        self.neighbour = IoTHubDeviceClient.create_from_connection_string(self.port.without(string))
        self._dialling = threading.Thread(target=self._dial_in_vain, daemon=True)
        self._dialling.start()
        # In this time the neighbour dials.
        time.sleep(0.5)

    def hang_up(self):
        self._dialling.join()

    def _dial_in_vain(self):
        try:
            self.neighbour.connect()
        except Exception:  # noqa: BLE001  # it has to fail, in whatever way it does
            return

    def latencies(self, count):
        times = []
        for number in range(count):
            client = self.clients[number % len(self.clients)]
            began = time.perf_counter()
            client.patch_twin_reported_properties({"uptime": number})
            times.append(time.perf_counter() - began)
        return {"latencies": times}

    def end(self):
        # To shut down some hundred clients takes a minute; the process is over in any case.
        print("{}", flush=True)
        os._exit(0)


obey(Orders())
