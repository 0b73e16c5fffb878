import asyncio
import os
import sys

from twin_device.gateway import TwinGateway

gateway = TwinGateway(ca_file=os.environ.get("CA"))


@gateway.on_desired
async def changed(device_id, patch, desired):
    print(device_id, "changed:", patch)
    await gateway.report(device_id, {"telemetryInterval": desired.get("telemetryInterval", 30)})


@gateway.on_state
def state(device_id, old, new):
    print(device_id, new, gateway.summary)


for connection_string in sys.stdin:
    gateway.add(connection_string)
asyncio.run(gateway.run_forever())
