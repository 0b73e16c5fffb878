"""Microsoft's device SDK against the local hub: run with its own interpreter, not with pytest.

Arguments: the connection strings of a device and of a module, the CA's path. Each line on standard input is a
step that the test has done; each line on standard output tells what the SDK saw.
"""

import asyncio
import json
import queue
import sys

from azure.iot.device import IoTHubDeviceClient, IoTHubModuleClient
from azure.iot.device.aio import IoTHubDeviceClient as AsyncDeviceClient


def tell(what, value):
    print(json.dumps([what, value], sort_keys=True), flush=True)


def play(client, name):
    patches = queue.SimpleQueue()
    client.on_twin_desired_properties_patch_received = patches.put
    client.connect()
    tell(f"{name} twin", client.get_twin())
    client.patch_twin_reported_properties({"battery": 55, "nested": {"a": 1}})
    client.patch_twin_reported_properties({"nested": {"a": None}})
    tell(f"{name} reported", client.get_twin()["reported"])
    tell(f"{name} ready", None)
    patch = patches.get(timeout=20)
    while "old" not in patch:
        # The SDK hands over the whole document as a patch, too.
        patch = patches.get(timeout=20)
    tell(f"{name} patch", patch)
    try:
        client.patch_twin_reported_properties({"bad key": 1})
    except Exception as error:  # noqa: BLE001  # whatever the SDK raises is to be told
        tell(f"{name} refused", type(error).__name__)
    client.shutdown()


async def play_async(text, ca):
    client = AsyncDeviceClient.create_from_connection_string(text, server_verification_cert=ca)
    # The SDK calls handlers in a loop, and thread, of its own.
    patches = queue.SimpleQueue()

    async def keep(patch):
        patches.put(patch)

    client.on_twin_desired_properties_patch_received = keep
    await client.connect()
    tell("aio twin", await client.get_twin())
    tell("aio ready", None)
    patch = await asyncio.to_thread(patches.get, timeout=20)
    while "old" not in patch:
        patch = await asyncio.to_thread(patches.get, timeout=20)
    tell("aio patch", patch)
    await client.shutdown()


def main():
    device, module, ca_file = sys.argv[1:]
    with open(ca_file) as file:
        ca = file.read()
    play(IoTHubDeviceClient.create_from_connection_string(device, server_verification_cert=ca), "device")
    play(IoTHubModuleClient.create_from_connection_string(module, server_verification_cert=ca), "module")
    asyncio.run(play_async(device, ca))


main()
