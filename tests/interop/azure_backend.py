"""Microsoft's service SDK against the local hub: run with its own interpreter, not with pytest.

Argument: the service connection string. REQUESTS_CA_BUNDLE names the CA. Every line on standard output tells
what the SDK saw.
"""

import json
import sys
import time
from datetime import datetime, timedelta, timezone

from azure.iot.hub import IoTHubJobManager, IoTHubRegistryManager
from azure.iot.hub.models import (
    AuthenticationMechanism,
    CloudToDeviceMethod,
    ExportImportDevice,
    JobRequest,
    QuerySpecification,
    SymmetricKey,
    Twin,
    TwinProperties,
)

SOON = 20  # seconds
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


def bulk(name, mode):
    keys = AuthenticationMechanism(type="sas", symmetric_key=SymmetricKey(primary_key=KEY, secondary_key=KEY))
    return ExportImportDevice(id=name, import_mode=mode, status="enabled", authentication=keys)


def reboot():
    return CloudToDeviceMethod(
        method_name="reboot",
        payload={"delay": 5},
        response_timeout_in_seconds=SOON,
        connect_timeout_in_seconds=SOON,
    )


def done(jobs, name):
    """The job once it is over."""
    deadline = time.monotonic() + SOON
    while True:
        job = jobs.get_scheduled_job(name)
        if job.status not in ("scheduled", "queued", "running"):
            return job
        if time.monotonic() > deadline:
            raise TimeoutError(job.status)


def play_identities(hub):
    tell("devices", [one.device_id for one in hub.get_devices()])
    query = QuerySpecification(query="SELECT * FROM devices WHERE properties.desired.only = true")
    tell("query", [one.device_id for one in hub.query_iot_hub(query, None, 10).items])
    result = hub.bulk_create_or_update_devices([bulk("sensor-2", "create"), bulk("sensor-3", "create")])
    tell("bulk", [result.is_successful, result.errors])
    result = hub.bulk_create_or_update_devices([bulk("sensor-2", "create")])
    tell("bulk again", [result.is_successful, [[one.device_id, one.error_code] for one in result.errors]])
    tell("devices", [one.device_id for one in hub.get_devices()])
    tell("bulk deleted", hub.bulk_create_or_update_devices([bulk("sensor-2", "delete")]).is_successful)
    tell("devices", [one.device_id for one in hub.get_devices()])


def play_methods(hub, jobs):
    absent = CloudToDeviceMethod(method_name="reboot", response_timeout_in_seconds=5)
    refused("not online", lambda: hub.invoke_device_method("sensor-3", absent))
    # The test is a device that answers two of them.
    tell("methods", 2)
    answer = hub.invoke_device_method("sensor-1", reboot())
    tell("answer", [answer.status, answer.payload])
    request = JobRequest(
        job_id="reboot",
        type="scheduleDeviceMethod",
        cloud_to_device_method=reboot(),
        query_condition="deviceId = 'sensor-1'",
        max_execution_time_in_seconds=SOON,
    )
    made = jobs.create_scheduled_job("reboot", request)
    job = done(jobs, "reboot")
    counts = job.device_job_statistics
    tell("job", [made.status, job.status, counts.succeeded_count, counts.failed_count])


def play_jobs(hub, jobs):
    def request(name, interval, **more):
        twin = Twin(etag="*", properties=TwinProperties(desired={"interval": interval}))
        return JobRequest(
            job_id=name, type="scheduleUpdateTwin", update_twin=twin, query_condition="*", **more
        )

    jobs.create_scheduled_job("twins", request("twins", 60, max_execution_time_in_seconds=SOON))
    job = done(jobs, "twins")
    counts = job.device_job_statistics
    tell("twin job", [job.status, counts.succeeded_count, counts.failed_count])
    tell("twins", [hub.get_twin(f"sensor-{n}").properties.desired["interval"] for n in (1, 3)])
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    tell("scheduled", jobs.create_scheduled_job("later", request("later", 90, start_time=tomorrow)).status)
    cancelled = jobs.cancel_scheduled_job("later")
    tell("cancelled", [cancelled.status, jobs.get_scheduled_job("later").status])
    query = QuerySpecification(query="SELECT * FROM devices.jobs WHERE devices.jobs.jobId = 'reboot'")
    found = hub.query_iot_hub(query, None, 10)
    tell("jobs' devices", [[one.device_id, found.type] for one in found.items])


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
    jobs = IoTHubJobManager.from_connection_string(sys.argv[1])
    play_identities(hub)
    play_methods(hub, jobs)
    play_jobs(hub, jobs)
    disabled = hub.update_device_with_sas("sensor-1", created.etag, KEY, KEY, "disabled")
    tell("disabled", [disabled.status, hub.get_device("sensor-1").status])
    tell("statistics", hub.get_device_registry_statistics().disabled_device_count)
    hub.delete_device("sensor-1")
    refused("deleted", lambda: hub.get_device("sensor-1"))


main()
