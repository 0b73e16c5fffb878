import asyncio
import json

from twin_device import TwinClient

with open("config.json") as file:
    config = json.load(file)
client = TwinClient.from_connection_string(config["connectionString"], ca_file=config["caFile"])


@client.on_desired
async def changed(patch, desired):
    print("changed:", patch)
    await client.report({"telemetryInterval": desired.get("telemetryInterval", 30)})


asyncio.run(client.run())
