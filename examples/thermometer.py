"""A thermometer whose interval the back end sets. Run it against `twin-device hub run`; see README."""

import os

from twin_device import TwinClient

client = TwinClient.from_connection_string(os.environ["DEVICE"], ca_file=os.environ.get("CA"))


@client.on_desired
def changed(patch, desired):
    print("changed:", patch, "now:", desired)
    client.report({"telemetryInterval": desired.get("telemetryInterval", 30)})


with client:
    print("reported version", client.report({"batteryLevel": 97}))
    client.run_forever()
