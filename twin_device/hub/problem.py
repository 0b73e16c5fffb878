"""A request of the back end that is refused, and how IoT Hub says so: a status, a header iothub-errorcode,
and a body in one of the three shapes that the service is seen to send."""

import json
import uuid
from datetime import datetime, timezone
from typing import Any

from aiohttp import web

_NAMES = {
    400003: "InvalidOperation",
    400004: "ArgumentInvalid",
    400006: "IotHubFormatError",
    401002: "IotHubUnauthorizedAccess",
    403003: "JobQuotaExceeded",
    403100: "DeviceModelMaxPropertiesExceeded",
    403800: "DeviceMaximumInflightMethodExceeded",
    404001: "DeviceNotFound",
    404002: "JobNotFound",
    404010: "ModuleNotFound",
    404103: "DeviceNotOnline",
    404104: "DeviceConnectionClosedRemotely",
    405000: "MethodNotAllowed",
    408000: "RequestTimeout",
    409001: "DeviceAlreadyExists",
    409301: "ModuleAlreadyExistsOnDevice",
    412001: "PreconditionFailed",
    413001: "MessageTooLarge",
    413002: "TooManyDevices",
    500001: "ServerError",
    502000: "GenericBadGateway",
    503001: "ServiceUnavailable",
    504101: "GatewayTimeout",
}


class Problem(Exception):
    """code: IoT Hub's; its first three digits are the status. name: where the code has another one."""

    def __init__(self, code: int, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.name = name or _NAMES.get(code, "GenericBadRequest")

    def response(self, shape: str) -> web.Response:
        """shape: "code" ("ErrorCode:..."), "object", or "text" (the object as text)."""
        now = datetime.now(timezone.utc)
        tracking = f"{uuid.uuid4().hex}-G:0-TimeStamp:{now:%m/%d/%Y %H:%M:%S}"
        details = {
            "errorCode": self.code,
            "trackingId": tracking,
            "message": self.message,
            "timestampUtc": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        text: Any = f"ErrorCode:{self.name};{self.message}"
        if shape == "object":
            text = details
        elif shape == "text":
            text = json.dumps(details)
        return web.json_response(
            {"Message": text, "ExceptionMessage": f"Tracking ID:{tracking}"},
            status=self.code // 1000,
            headers={"iothub-errorcode": self.name},
        )
