"""Microsoft's device SDK against the local hub: run with its own interpreter, not with pytest.

Arguments: the connection strings of two devices and of two modules, the CA's path; or of one device, which
comes over WebSockets. In the place of a connection string, as JSON: {"certificate": [FILE, KEY FILE], and the
arguments of create_from_x509_certificate}. Each line on standard output tells what the SDK saw.
"""

import asyncio
import json
import queue
import sys
from importlib.metadata import version

from azure.iot.device import X509, IoTHubDeviceClient, IoTHubModuleClient, MethodResponse, aio

SOON = 20  # seconds


def tell(what, value=None):
    print(json.dumps([what, value], sort_keys=True), flush=True)


def patch_with(patches, key):
    """The next patch with this key. The SDK hands over the whole document as a patch, too."""
    while True:
        patch = patches.get(timeout=SOON)
        if key in patch:
            return patch


def answer_to(request, name):
    tell(f"{name} asked", [request.name, request.payload])
    seconds = {"seconds": request.payload["delay"]}
    return MethodResponse.create_from_method_request(request, 202, seconds)


def play(client, name):
    patches = queue.SimpleQueue()
    client.on_twin_desired_properties_patch_received = patches.put
    client.connect()
    tell(f"{name} twin", client.get_twin())
    client.patch_twin_reported_properties({"battery": 55, "nested": {"a": 1}})
    client.patch_twin_reported_properties({"nested": {"a": None}})
    tell(f"{name} reported", client.get_twin()["reported"])
    tell(f"{name} ready")
    tell(f"{name} patch", patch_with(patches, "first"))
    try:
        client.patch_twin_reported_properties({"bad key": 1})
    except Exception as error:  # noqa: BLE001  # whatever the SDK raises is to be told
        tell(f"{name} refused", type(error).__name__)
    # The test ends the connection; the SDK makes another one by itself.
    tell(f"{name} again", patch_with(patches, "second"))
    client.patch_twin_reported_properties({"battery": 54})
    requests = queue.SimpleQueue()
    client.on_method_request_received = requests.put
    tell(f"{name} listens")
    client.send_method_response(answer_to(requests.get(timeout=SOON), name))
    client.send_message("hello")
    client.shutdown()
    tell(f"{name} over")


async def play_async(client, name):
    # The SDK calls handlers in a loop, and thread, of its own.
    patches, requests = queue.SimpleQueue(), queue.SimpleQueue()

    async def keep(patch):
        patches.put(patch)

    async def keep_request(request):
        requests.put(request)

    client.on_twin_desired_properties_patch_received = keep
    await client.connect()
    tell(f"{name} twin", await client.get_twin())
    await client.patch_twin_reported_properties({"battery": 55, "nested": {"a": 1}})
    await client.patch_twin_reported_properties({"nested": {"a": None}})
    tell(f"{name} reported", (await client.get_twin())["reported"])
    tell(f"{name} ready")
    tell(f"{name} patch", await asyncio.to_thread(patch_with, patches, "first"))
    try:
        await client.patch_twin_reported_properties({"bad key": 1})
    except Exception as error:  # noqa: BLE001  # whatever the SDK raises is to be told
        tell(f"{name} refused", type(error).__name__)
    tell(f"{name} again", await asyncio.to_thread(patch_with, patches, "second"))
    await client.patch_twin_reported_properties({"battery": 54})
    client.on_method_request_received = keep_request
    tell(f"{name} listens")
    request = await asyncio.to_thread(requests.get, timeout=SOON)
    await client.send_method_response(answer_to(request, name))
    await client.send_message("hello")
    await client.shutdown()
    tell(f"{name} over")


def made(kind, text, ca):
    if not text.startswith("{"):
        return kind.create_from_connection_string(text, server_verification_cert=ca)
    options = json.loads(text)
    certificate = X509(*options.pop("certificate"))
    return kind.create_from_x509_certificate(x509=certificate, server_verification_cert=ca, **options)


def main():
    *texts, ca_file = sys.argv[1:]
    with open(ca_file) as file:
        ca = file.read()
    tell("versions", [version("azure-iot-device"), version("paho-mqtt").partition(".")[0]])
    if len(texts) == 1:
        options = {"server_verification_cert": ca, "websockets": True}
        play(IoTHubDeviceClient.create_from_connection_string(texts[0], **options), "device")
        return
    kinds = (IoTHubDeviceClient, IoTHubModuleClient, aio.IoTHubDeviceClient, aio.IoTHubModuleClient)
    device, module, aio_device, aio_module = (
        made(kind, text, ca) for kind, text in zip(kinds, texts, strict=True)
    )
    play(device, "device")
    play(module, "module")
    asyncio.run(play_async(aio_device, "aio device"))
    asyncio.run(play_async(aio_module, "aio module"))


main()
