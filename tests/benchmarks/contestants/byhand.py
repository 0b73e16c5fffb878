"""The twin by hand on bare paho: subscribe, retrieve, report, and no more.

No versions are compared, nothing is checked, merged, sent again or given up; a lost connection is dialled
again at once. What a program does that gets by.
"""

import base64
import hmac
import json
import ssl
import threading
import time
from urllib.parse import quote

import paho.mqtt.client as mqtt

FILTERS = [("$iothub/twin/res/#", 0), ("$iothub/twin/PATCH/properties/desired/#", 0)]
REPORT = "$iothub/twin/PATCH/properties/reported/?$rid=%d"


def make(identifier):
    return mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, identifier, clean_session=False)


class Device:
    """One device. context: the TLS that all of a process share."""

    def __init__(self, string, context, handler=lambda patch: None):
        fields = dict(part.split("=", 1) for part in string.split(";"))
        self.host, _, port = fields["HostName"].partition(":")
        self.port = int(port)
        self.connects = 0
        self.twin = None
        self.synchronised = False
        self.answered = threading.Event()
        self._handler = handler
        self._rid = 0
        self._waiting = {}
        name = fields["DeviceId"]
        self.mqtt = client = make(name)
        resource = quote(f"{self.host}/devices/{name}", safe="")
        expiry = int(time.time()) + 3600
        key = base64.b64decode(fields["SharedAccessKey"])
        digest = hmac.digest(key, f"{resource}\n{expiry}".encode(), "sha256")
        signature = quote(base64.b64encode(digest), safe="")
        client.username_pw_set(
            f"{self.host}/{name}/?api-version=2021-04-12",
            f"SharedAccessSignature sr={resource}&sig={signature}&se={expiry}",
        )
        client.tls_set_context(context)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message

    def connect(self):
        """Dial, with the TLS handshake; blocks."""
        self.synchronised = False
        self.mqtt.connect(self.host, self.port)

    def send(self, patch, ended):
        """Send a report; ended is set, or called, when its answer comes."""
        self._rid += 1
        self._waiting[str(self._rid)] = ended
        self.mqtt.publish(REPORT % self._rid, json.dumps(patch))

    def _on_connect(self, _client, _userdata, _flags, reason, _properties):
        if reason.is_failure:
            raise ValueError(reason)
        self.connects += 1
        self.mqtt.subscribe(FILTERS)

    def _on_subscribe(self, _client, _userdata, _mid, _codes, _properties):
        self.mqtt.publish("$iothub/twin/GET/?$rid=first", b"")

    def _on_message(self, _client, _userdata, message):
        topic = message.topic
        if topic.startswith("$iothub/twin/PATCH"):
            patch = json.loads(message.payload)
            merge(self.twin["desired"], patch)
            self._handler(patch)
            return
        status = topic.split("/")[3]
        rid = topic.partition("$rid=")[2].partition("&")[0]
        if not status.startswith("20"):
            raise ValueError(topic)
        if rid == "first":
            self.twin = json.loads(message.payload)
            self.synchronised = True
            self.answered.set()
        else:
            self._waiting.pop(rid)()


def merge(target, patch):
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            member = target.get(key)
            if not isinstance(member, dict):
                member = target[key] = {}
            merge(member, value)
        else:
            target[key] = value


def context():
    return ssl.create_default_context()
