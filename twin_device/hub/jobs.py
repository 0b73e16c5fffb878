"""Jobs: one twin update or direct method for every device that a condition chooses.

    status     when
    ---------  ------------------------------------------------------------------------------------------
    scheduled  its start time is to come
    queued     it has just been made, or its start time has just come
    running    its devices are chosen, some are not done yet
    completed  all are done, well or not, or its longest time is over (then the rest has failed)
    cancelled  it was cancelled; what was done stays done
    failed     it could not choose its devices

Source: IoT Hub, "Schedule jobs on multiple devices". What real hubs were seen to do: a job without a start
time runs at once, a second one with its id is refused, one that is not known has type and status "unknown".
"""

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from . import query, twins
from .mqtt import Endpoint, MethodFailed

if TYPE_CHECKING:
    from .storage import Storage

_log = logging.getLogger("twin_device.hub")
Document = dict[str, Any]

TYPES = ("scheduleUpdateTwin", "scheduleDeviceMethod")
_DONE = ("completed", "cancelled", "failed")
_ID = re.compile(r"[A-Za-z0-9\-]{1,64}\Z")
# Printable US-ASCII without what HTTP calls separators.
_METHOD_NAME = re.compile(r"[^\x00-\x20\x7f-\U0010ffff$()<>@,;:\\\"/\[\]?={}]{1,128}\Z")
_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)?"
    r"(?:([Zz])|([+-])([0-9]{2}):?([0-9]{2}))?\Z"
)
_USUAL_SECONDS = 3600
_MOST_SECONDS = 172800
_MAX_JOBS = 1000
# How many of a job's devices are dealt with before others get their turn, and how many methods run at once.
_SLICE = 20
_AT_ONCE = 50


class JobRefused(Exception):
    """code: IoT Hub's. name: where the code has no name of its own."""

    def __init__(self, code: int, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.name = name


@dataclass
class Outcome:
    """What became of a job on one device. status: pending, running, completed, failed or cancelled. times:
    Unix seconds."""

    status: str = "pending"
    started: float | None = None
    ended: float | None = None
    response: Document | None = None
    error: Document | None = None


@dataclass
class Method:
    """A direct method as the back end asks for it. payload: JSON text, or empty."""

    name: str
    payload: bytes
    connect_within: float
    respond_within: float


@dataclass
class Job:
    """One job. work: updateTwin or cloudToDeviceMethod as given. Times are Unix seconds."""

    id: str
    type: str
    work: Document
    condition: str
    start: float
    limit: float
    created: float
    status: str = "queued"
    ended: float | None = None
    failure: str | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.status in _DONE

    def view(self) -> Document:
        """As the REST API shows it."""
        states = [outcome.status for outcome in self.outcomes.values()]
        statistics = {
            "deviceCount": len(states),
            "failedCount": states.count("failed"),
            "succeededCount": states.count("completed"),
            "runningCount": states.count("running"),
            "pendingCount": states.count("pending"),
        }
        shown: Document = {
            "jobId": self.id,
            "type": self.type,
            "status": self.status,
            "createdTime": _text(self.created),
            "startTime": _text(self.start),
            "endTime": _text(self.ended),
            "maxExecutionTimeInSeconds": int(self.limit),
            "queryCondition": self.condition,
            "updateTwin" if self.type == TYPES[0] else "cloudToDeviceMethod": self.work,
            "failureReason": self.failure,
        }
        if self.status not in ("scheduled", "queued"):
            shown["deviceJobStatistics"] = statistics
        return {name: value for name, value in shown.items() if value is not None}

    def rows(self) -> list[Document]:
        """What became of it on each device, as queries of devices.jobs see it."""
        return [
            {
                "deviceId": device,
                "jobId": self.id,
                "jobType": self.type,
                "status": outcome.status,
                "startTimeUtc": _text(outcome.started),
                "endTimeUtc": _text(outcome.ended),
                "createdDateTimeUtc": _text(self.created),
                "lastUpdatedDateTimeUtc": _text(outcome.ended or outcome.started or self.created),
                "outcome": {"deviceMethodResponse": outcome.response},
                "error": outcome.error,
            }
            for device, outcome in self.outcomes.items()
        ]

    @classmethod
    def from_dict(cls, data: Document) -> "Job":
        """What dataclasses.asdict gave, once more; without outcomes."""
        return cls(**{**data, "outcomes": {}})


class Jobs:
    """The jobs of one hub. Everything here runs in the hub's event loop, from start() on."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.storage: Storage | None = None

    def __iter__(self) -> Any:
        return iter(self._jobs.values())

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    # ------------------------------------------------------------------ its life

    def load(self, storage: "Storage") -> None:
        """Take over what is kept; it goes on with start()."""
        self.storage = storage
        for data, outcomes in storage.load_jobs():
            job = Job.from_dict(data)
            job.outcomes = {device: Outcome(**outcome) for device, outcome in outcomes.items()}
            self._jobs[job.id] = job

    def start(self) -> None:
        """Go on with every job that is not done."""
        for job in self._jobs.values():
            if not job.is_done:
                self._begin(job)

    async def close(self) -> None:
        """Stop where they are."""
        tasks, self._tasks = self._tasks, {}
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    def create(self, job_id: str, body: Document) -> Job:
        """Make a job of a PUT's body and have it run when its time comes.

        JobRefused, Invalid or QueryError say why not; nothing is made then.
        """
        job = _job(job_id, body, self._endpoint.settings.rules)
        if job_id in self._jobs:
            raise JobRefused(409000, f"A job with ID '{job_id}' exists already.", "JobAlreadyExists")
        if len(self._jobs) >= _MAX_JOBS:
            oldest = next((one for one in self._jobs.values() if one.is_done), None)
            if oldest is None:
                raise JobRefused(403003, f"{_MAX_JOBS} jobs are not done yet.")
            self._forget(oldest)
        self._jobs[job_id] = job
        self._keep(job)
        self._begin(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """Do no more of it; JobRefused if there is no such job, or it is done."""
        job = self._jobs.get(job_id)
        if job is None:
            raise JobRefused(404002, f"There is no job {job_id}.")
        if job.is_done:
            raise JobRefused(400003, f"Job {job_id} is {job.status} already.")
        self._end(job, "cancelled")
        return job

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        if self.storage is not None:
            self.storage.remove_job(job.id)

    def _keep(self, job: Job) -> None:
        if self.storage is not None:
            self.storage.save_job({**asdict(job), "outcomes": {}})

    def _keep_outcome(self, job: Job, device: str) -> None:
        if self.storage is not None:
            self.storage.save_outcome(job.id, device, asdict(job.outcomes[device]))

    # ------------------------------------------------------------------ its work

    def _begin(self, job: Job) -> None:
        self._tasks[job.id] = asyncio.get_running_loop().create_task(self._run(job))

    async def _run(self, job: Job) -> None:
        try:
            await self._work(job)
        except Exception:  # noqa: BLE001  # no job may stay half done without a word
            _log.exception("job %s ended by an error of the hub", job.id)
            self._end(job, "failed", "An error of the local hub; its log tells more.")

    async def _work(self, job: Job) -> None:
        if job.start > time.time():
            job.status = "scheduled"
            self._keep(job)
            # Wall time, which may be set anew meanwhile: looked at again and again.
            while job.start > time.time():
                await asyncio.sleep(min(60.0, job.start - time.time()))
        if job.status != "running":
            job.status = "queued"
            await asyncio.sleep(0)
            try:
                self._choose(job)
            except query.QueryError as error:
                self._end(job, "failed", str(error))
                return
        work = self._update_all(job) if job.type == TYPES[0] else self._invoke_all(job)
        try:
            await asyncio.wait_for(work, max(0.0, job.start + job.limit - time.time()))
        except asyncio.TimeoutError:
            self._end(job, "completed", error="The job's longest time is over.")
        else:
            self._end(job, "completed")

    def _choose(self, job: Job) -> None:
        chosen = query.parse_condition(job.condition)
        identities = self._endpoint.registry.identities.values()
        documents = [self._endpoint.twin_view(one) for one in identities if one.module_id is None]
        job.outcomes = {one["deviceId"]: Outcome() for one in query.run(chosen, documents)}
        job.status = "running"
        with self._together():
            self._keep(job)
            for device in job.outcomes:
                self._keep_outcome(job, device)

    def _end(self, job: Job, status: str, failure: str | None = None, error: str | None = None) -> None:
        now = time.time()
        left = [one for one, outcome in job.outcomes.items() if outcome.status in ("pending", "running")]
        with self._together():
            for device in left:
                outcome = job.outcomes[device]
                outcome.status = "cancelled" if error is None else "failed"
                outcome.error = None if error is None else {"code": "JobTimedOut", "description": error}
                outcome.ended = now
                self._keep_outcome(job, device)
            job.status, job.failure, job.ended = status, failure, now
            self._keep(job)
        task = self._tasks.pop(job.id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._endpoint.changed()

    def _together(self) -> Any:
        return contextlib.nullcontext() if self.storage is None else self.storage.together()

    async def _update_all(self, job: Job) -> None:
        body = {name: value for name, value in job.work.items() if name in ("tags", "properties")}
        for number, device in enumerate(list(job.outcomes), 1):
            outcome = job.outcomes[device]
            if outcome.status in ("pending", "running"):
                # The twin and what became of it are kept in one step: no restart does it twice.
                with self._together():
                    self._update(job, device, outcome, body)
            if number % _SLICE == 0:
                await asyncio.sleep(0)

    def _update(self, job: Job, device: str, outcome: Outcome, body: Document) -> None:
        outcome.started = time.time()
        try:
            self._endpoint.update_twin(device, body)
        except KeyError:
            outcome.error = {"code": "DeviceNotFound", "description": f"Device {device} is gone."}
        except twins.Invalid as error:
            outcome.error = {"code": str(error.code), "description": error.message}
        outcome.status = "completed" if outcome.error is None else "failed"
        outcome.ended = time.time()
        self._keep_outcome(job, device)

    async def _invoke_all(self, job: Job) -> None:
        method = method_of(job.work)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def invoke(device: str) -> None:
            outcome = job.outcomes[device]
            async with gate:
                outcome.status, outcome.started = "running", time.time()
                try:
                    response = await invoked(self._endpoint, device, method)
                except MethodFailed as error:
                    outcome.error = {"code": str(error.code), "description": error.message}
                    outcome.status = "failed"
                else:
                    outcome.response, outcome.status = response, "completed"
                outcome.ended = time.time()
                self._keep_outcome(job, device)

        work: list[Coroutine[Any, Any, None]] = [
            invoke(device)
            for device, outcome in job.outcomes.items()
            # One that runs when the hub ends is asked again: whether it was done nobody knows.
            if outcome.status in ("pending", "running")
        ]
        await asyncio.gather(*work)


def method_of(body: Document) -> Method:
    """A direct method out of a request's body; JobRefused names what is wrong with it."""
    name = body.get("methodName")
    if not isinstance(name, str) or not _METHOD_NAME.match(name):
        raise JobRefused(400004, "methodName is 1 to 128 printable ASCII characters, no separators.")
    seconds = []
    for member, usual, least in (("connectTimeoutInSeconds", 0, 0), ("responseTimeoutInSeconds", 30, 5)):
        value = usual if body.get(member) is None else body[member]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 3600:
            raise JobRefused(400004, f"{member} is an integer from {least} to 3600.")
        seconds.append(float(value))
    try:
        payload = twins.encode(body["payload"]) if "payload" in body else b""
    except UnicodeEncodeError:
        raise JobRefused(400006, "The payload is not valid Unicode.") from None
    return Method(name, payload, *seconds)


async def invoked(endpoint: Endpoint, identity_id: str, method: Method) -> Document:
    """A device's answer to a direct method, as the REST API tells it: status and payload. MethodFailed."""
    status, payload = await endpoint.invoke(
        identity_id, method.name, method.payload, method.connect_within, method.respond_within
    )
    try:
        answer = json.loads(payload) if payload.strip() else None
    except (ValueError, RecursionError):
        raise MethodFailed(502000, "The device's answer is not JSON.") from None
    return {"status": status, "payload": answer}


def _job(job_id: str, body: Document, rules: twins.Rules) -> Job:
    if not _ID.match(job_id):
        raise JobRefused(400004, "A jobId is 1 to 64 letters, digits and dashes.")
    if body.get("jobId") not in (None, job_id):
        raise JobRefused(400004, "jobId in the body is not the one in the path.")
    kind = body.get("type")
    if kind not in TYPES:
        raise JobRefused(400004, f"type is {' or '.join(TYPES)}.")
    condition = body.get("queryCondition")
    if not isinstance(condition, str):
        raise JobRefused(400004, 'queryCondition is a text; "*" is all devices.')
    query.parse_condition(condition)
    member = "updateTwin" if kind == TYPES[0] else "cloudToDeviceMethod"
    work = body.get(member)
    if not isinstance(work, dict):
        raise JobRefused(400004, f"{kind} has an object {member}.")
    if kind == TYPES[0]:
        _check_update(work, rules)
    else:
        method_of(work)
    now = time.time()
    start = _seconds(body.get("startTime"), now)
    limit = body.get("maxExecutionTimeInSeconds") or _USUAL_SECONDS
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= _MOST_SECONDS:
        raise JobRefused(400004, f"maxExecutionTimeInSeconds is an integer from 1 to {_MOST_SECONDS}.")
    status = "scheduled" if start > now else "queued"
    return Job(job_id, kind, work, condition, start, float(limit), now, status)


def _check_update(work: Document, rules: twins.Rules) -> None:
    if work.get("etag") not in (None, "*"):
        raise JobRefused(400004, "scheduleUpdateTwin accepts '*' as the etag only.")
    properties = work.get("properties") or {}
    if not isinstance(properties, dict):
        raise JobRefused(400004, "updateTwin.properties is no object.")
    for section in (work.get("tags"), properties.get("desired")):
        if section is not None:
            twins.written(section, nulls=True, rules=rules)


def _seconds(text: Any, usual: float) -> float:
    """Unix seconds of a time in ISO 8601; without an offset it is UTC."""
    if text in (None, ""):
        return usual
    match = _TIME.match(text) if isinstance(text, str) else None
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute = (int(match[number]) for number in range(1, 6))
        moment = datetime(year, month, day, hour, minute, int(match[6] or 0), tzinfo=timezone.utc)
        offset = timedelta(hours=int(match[10] or 0), minutes=int(match[11] or 0))
        moment = moment + offset if match[9] == "-" else moment - offset
        return moment.timestamp() + float(f"0.{match[7] or 0}")
    except (ValueError, OverflowError):
        raise JobRefused(400004, f"startTime is a time in ISO 8601, not {text!r:.60}.") from None


def _text(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
