"""Microsoft's service SDK against the local hub: run with its own interpreter, not with pytest.

Argument: the service connection string. REQUESTS_CA_BUNDLE names the CA. Every line on standard output tells
what the SDK saw.
"""

import json
import sys

from azure.iot.hub import IoTHubRegistryManager
from azure.iot.hub.models import QuerySpecification, Twin, TwinProperties

KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


def tell(what, value):
    print(json.dumps([what, value], sort_keys=True), flush=True)


def refused(what, work):
    try:
        work()
    except Exception as error:  # noqa: BLE001  # whatever the SDK raises is to be told
        tell(what, getattr(getattr(error, "response", None), "status_code", type(error).__name__))
    else:
        tell(what, "accepted")


def desired(**members):
    return Twin(properties=TwinProperties(desired=members))


def main():
    hub = IoTHubRegistryManager.from_connection_string(sys.argv[1])
    created = hub.create_device_with_sas("sensor-1", KEY, KEY, "enabled")
    tell("created", [created.device_id, created.status, created.authentication.symmetric_key.primary_key])
    refused("created twice", lambda: hub.create_device_with_sas("sensor-1", KEY, KEY, "enabled"))
    twin = hub.get_twin("sensor-1")
    tell("new twin", [twin.etag, twin.version, twin.properties.desired["$version"]])
    updated = hub.update_twin("sensor-1", desired(interval=15), twin.etag)
    tell("updated", [updated.properties.desired["interval"], updated.version])
    refused("stale", lambda: hub.update_twin("sensor-1", desired(interval=16), twin.etag))
    replaced = hub.replace_twin("sensor-1", desired(only=True), "*")
    tell("replaced", [replaced.properties.desired.get("interval"), replaced.properties.desired["only"]])
    module = hub.create_module_with_sas("sensor-1", "m", "", KEY, KEY)
    tell("module", [module.module_id, hub.get_module_twin("sensor-1", "m").module_id])
    tell("modules", [one.module_id for one in hub.get_modules("sensor-1")])
    tell("devices", [one.device_id for one in hub.get_devices()])
    query = QuerySpecification(query="SELECT * FROM devices WHERE properties.desired.only = true")
    tell("query", [one.device_id for one in hub.query_iot_hub(query, None, 10).items])
    disabled = hub.update_device_with_sas("sensor-1", created.etag, KEY, KEY, "disabled")
    tell("disabled", [disabled.status, hub.get_device("sensor-1").status])
    tell("statistics", hub.get_device_registry_statistics().disabled_device_count)
    hub.delete_device("sensor-1")
    refused("deleted", lambda: hub.get_device("sensor-1"))


main()
