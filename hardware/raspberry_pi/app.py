"""What this gateway does for its devices: each takes over the telemetryInterval that is desired of it.

`twin-device gateway run --app` calls setup() before anything connects.
"""

import logging

_log = logging.getLogger("twin_gateway")


def setup(gateway):
    @gateway.on_desired
    async def changed(device_id, patch, desired):
        interval = desired.get("telemetryInterval", 30)
        if type(interval) is not int or not 1 <= interval <= 86400:
            _log.warning("%s: telemetryInterval %r is not from 1 to 86400", device_id, interval)
            return
        await gateway.report(device_id, {"telemetryInterval": interval})
