"""A back end by hand: the REST API over HTTPS, sharing no code with the hub or the client."""

import base64
import hashlib
import hmac
import http.client
import json
import ssl
import time
from typing import Any, NamedTuple
from urllib.parse import quote

from tests.waiting import PATIENCE
from twin_device.hub import LocalHub

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER_KEY = base64.b64encode(b"another key, as good as any").decode()
VERSION = "api-version=2021-04-12"
SENSOR = {"deviceId": "sensor-1"}


class Answer(NamedTuple):
    status: int
    body: Any
    headers: Any

    @property
    def code(self) -> str:
        return str(self.headers["iothub-errorcode"])


def token(
    resource: str = "localhost", policy: str = "iothubowner", key: str = KEY, expiry: int | None = None
) -> str:
    encoded = quote(resource, safe="")
    until = int(time.time()) + 3600 if expiry is None else expiry
    digest = hmac.digest(base64.b64decode(key), f"{encoded}\n{until}".encode(), hashlib.sha256)
    signature = quote(base64.b64encode(digest), safe="")
    return f"SharedAccessSignature sr={encoded}&sig={signature}&se={until}&skn={policy}"


class Backend:
    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        context = ssl.create_default_context(cafile=hub.ca_file)
        self.connection = http.client.HTTPSConnection(
            "localhost", hub.https_port, timeout=PATIENCE, context=context
        )

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> Answer:
        """path without api-version; options: authorization, if_match, and other headers."""
        headers = {
            "Authorization": options.pop("authorization", None) or token(),
            "Content-Type": "application/json",
        }
        for name, value in options.items():
            headers[name.replace("_", "-")] = value
        mark = "&" if "?" in path else "?"
        payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, f"{path}{mark}{VERSION}", payload, headers)
        response = self.connection.getresponse()
        text = response.read()
        return Answer(response.status, json.loads(text) if text else None, response.headers)
