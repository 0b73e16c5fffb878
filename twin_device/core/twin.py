"""The state machine of a correct twin client: inputs in, ordered outputs out, no I/O.

    state         input                        next state     outputs
    ------------  ---------------------------  -------------  ---------------------------------------------
    offline       start, tick when it is time  offline        Connect
    offline       connected                    subscribing    Subscribe
    offline       refused, disconnected        offline        Failed where only a person can help
    subscribing   subscribed, all granted      retrieving     Publish (retrieve)
    subscribing   subscribed, one refused      offline        Disconnect, Failed
    subscribing   notification                 subscribing    none; it is kept
    retrieving    notification                 retrieving     none; it is kept
    retrieving    document                     synchronised   DesiredChanged, Publish (report)
    synchronised  notification, next version   synchronised   DesiredChanged
    synchronised  notification, old version    synchronised   none; it is discarded
    synchronised  notification, a gap          retrieving     Publish (retrieve)
    any but offline  disconnected              offline        none
    any but offline  two answers lost in a row offline        Disconnect
    any but offline  renewal due               offline        Disconnect, Connect
    any           stop                         offline        Disconnect

Every change of state gives a StateChanged as well. Times are integers above 0, in milliseconds of a clock
that only goes forward; jitter is a number from 0.0 to below 1.0, drawn anew for every input that takes one.
After each input the shell performs the outputs in their order, then arranges for tick() at `deadline`.
"""

from collections import namedtuple

from .errors import ConnectRefused, LocalError, NotConnected, RemoteError, ReportRejected, RetrieveRejected
from .patch import MAX_SECTION, check, check_section, compose, copy, diff, dumps, loads, merge, same, size
from .topics import DESIRED, FILTERS, RESPONSE, Topic, parse, report_topic, retrieve_topic

const = int  # MicroPython's compiler puts the numbers in place of the names

OFFLINE = "offline"
SUBSCRIBING = "subscribing"
RETRIEVING = "retrieving"
SYNCHRONISED = "synchronised"

# Outputs for MQTT.
# Connect: dial and send CONNECT; answer with connected(), refused() or disconnected().
Connect = namedtuple("Connect", ())
# Disconnect: end this connection; the machine is offline already and wants no answer.
Disconnect = namedtuple("Disconnect", ())
# Subscribe: one SUBSCRIBE packet with all filters (tuple of str), QoS 0; answer with subscribed().
Subscribe = namedtuple("Subscribe", ("filters",))
# Publish: topic (str), payload (bytes), QoS 0, no retain.
Publish = namedtuple("Publish", ("topic", "payload"))

# Outputs for the app.
# StateChanged: old and new state (str).
StateChanged = namedtuple("StateChanged", ("old", "new"))
# DesiredChanged: merge patch and the desired properties after it (dicts, shared: never to be changed).
DesiredChanged = namedtuple("DesiredChanged", ("patch", "desired"))
# Reported: the end of the report with this ticket: version (int, or None if the hub gave none) or error. The
# ticket is None for what an earlier run had reported, or the hub had lost.
Reported = namedtuple("Reported", ("ticket", "version", "error"))
# Retrieved: the end of the retrieve with this ticket: {"desired": ..., "reported": ...} or error.
Retrieved = namedtuple("Retrieved", ("ticket", "twin", "error"))
# Failed: an error (TwinError) that belongs to no call of the app.
Failed = namedtuple("Failed", ("error",))

# Milliseconds. IoT Hub's own recommendation for clients: from 1 s to 100 s (Azure SDK for Embedded C,
# MQTT state machine).
_BACKOFF = const(1000)
_BACKOFF_CAP = const(100000)
# Refused credentials, a used-up quota: nothing that seconds can mend.
_SLOW = const(60000)
_SLOW_CAP = const(900000)
_STABLE = const(60000)
_OVERDUE = const(1)  # a time that is long past
_CONNECT_TIMEOUT = const(60000)  # the hub delays CONNACK when it is throttled

_TAKEN_OVER = const(3)
_TAKEN_OVER_TEXT = (
    "3 connections in a row were ended within a minute: does another client use this identity? "
    "Each new connection ends the one before"
)

_MAX_KEPT = const(64)  # notifications kept before the document
_MAX_KEPT_BYTES = const(262144)  # the largest message of the hub
_MAX_PARTS = const(32)  # reports kept apart, so that a refusal hits only the one that earned it
_MAX_QUEUE = const(1024)

# What is counted, in Twin._counts; Twin.counts has the names.
_CONNECTS = const(0)
_RETRIEVES = const(1)
_NOTIFICATIONS = const(2)
_STALE = const(3)
_GAPS = const(4)
_REPORTS = const(5)
_COALESCED = const(6)
_REJECTED = const(7)
_THROTTLED = const(8)
_IGNORED = const(9)


class _Part:
    """A report that is gathered or in flight."""

    def __init__(self, patch: "dict[str, object]", ticket: "int | None", version: "int | None", alone: bool):
        self.patch = patch
        self.ticket = ticket  # None for what the machine itself restores
        self.version = version  # the condition, if it has one
        self.alone = alone  # sent as it is, not as a part of a difference
        self.sent = 0  # times that have no answer (yet); -1: refused with 412 after one that has none
        self.tries = 0  # times that it was throttled


class _Kept:
    """A notification that waits for the document."""

    def __init__(self, version: int, patch: "dict[str, object]", size: int):
        self.version = version
        self.patch = patch
        self.size = size
        self.outlived = False  # a document came that does not reach to it


class Twin:
    """One device's twin, as the device sees it.

    timeout: milliseconds after which a request is given up and asked again.
    request_id: int, the first `$rid`; drawn by chance, so that a late answer to an earlier process on a
    resumed session does not look like an answer to this one.
    keep_reported: False keeps no copy of the reported properties (boards): reports that do not compose go
    out one after another, and one that changes nothing is sent all the same.
    desired, reported, reports: what a store kept of an earlier run (its `unanswered`); they are taken over,
    not copied. reported without reports is the whole target.
    """

    def __init__(
        self,
        timeout: int = 20000,
        request_id: int = 1,
        keep_reported: bool = True,
        desired: "dict[str, object] | None" = None,
        reported: "dict[str, object] | None" = None,
        reports: "list[tuple[dict[str, object], int | None, bool]] | None" = None,
    ) -> None:
        self.state = OFFLINE
        self.desired: "dict[str, object]" = desired or {}
        self.desired_version: "int | None" = None
        # What the hub is known to hold; None until the first document, and always without keep_reported.
        self.reported = reported if keep_reported else None
        self.reported_version: "int | None" = None
        self._counts = [0] * 10
        self._last_error: "str | None" = None
        self._timeout = timeout
        self._request = request_id
        self._keep_reported = keep_reported
        self._ticket = 0
        # Offline: when to connect; None while a connection is being made, or not wanted.
        self._connect_at: "int | None" = None
        self._connect_tries: int  # since start()
        # When this connection counts as stable, and how long that is after it became synchronised: less
        # than _STABLE where it follows another by a planned renewal, for a token may live less than that.
        self._stable_at: "int | None" = None
        self._stable_in = _STABLE
        # Connections in a row that were synchronised and did not live for _STABLE.
        self._short = 0
        # What the hub is asked for: the request id of a retrieve, True for CONNECT and SUBSCRIBE. And when
        # that is given up.
        self._get: "str | bool | None" = None
        self._get_wait: int
        # When to send a retrieve.
        self._get_at: "int | None" = None
        # As the retrieve in flight was sent: the desired version, and the last ticket.
        self._get_version: "int | None"
        self._get_ticket: int
        # Since it was sent: True if a report was answered; True if a notification came that is not kept.
        self._moved: bool
        self._again: bool
        # Tickets of retrieves, in order.
        self._askers: "list[int]" = []
        # Every report not answered yet, in order. Of those in flight, which are the first: their number, the
        # request id, the patch, and when it is given up.
        self._queue: "list[_Part]" = []
        self._flying: int
        self._flight: "str | None" = None
        self._flight_patch: "dict[str, object]"
        self._flight_wait: int
        # True while nobody knows whether the hub merged the last patch in flight.
        self._unsure = False
        # When the next may leave; and the same, if that is to gather some that nobody waits for.
        self._report_at = 0
        self._gather_until: "int | None" = None
        # True once a document of this connection has told what the hub holds.
        self._known = False
        self._bound: "int | None" = None
        # When to renew this connection; _OVERDUE while that waits for what is in flight.
        self._renew_at: "int | None" = None
        # Of one connection, from connected() on: answers lost in a row; retrieves in a row that did not help;
        # notifications that wait for the document.
        self._lost: int
        self._get_tries: int
        self._kept: "list[_Kept]"
        if reports:
            self._resume(reports)

    def _resume(self, reports: "list[tuple[dict[str, object], int | None, bool]]") -> None:
        # Nobody of this run waits for a report of an earlier one: it has no ticket.
        self._queue = [_Part(patch, None, version, alone) for patch, version, alone in reports]
        for part in self._queue:
            if part.alone:
                # It may have been sent: the document tells, as after a lost connection. What is before it
                # needs no such care: of that only what the document lacks is sent.
                part.sent = 1
                self._unsure = True
                self._flight_patch = part.patch
                break

    # ------------------------------------------------------------------ what the shell asks

    @property
    def deadline(self) -> "int | None":
        """When tick() has something to do, in milliseconds; None if nothing is due without an input."""
        soonest = None
        for due in (
            self._connect_at,
            self._get_at if self._get is None else self._get_wait,
            self._flight_wait
            if self._flight is not None
            else self._report_at
            if self._queue and self._known
            else None,
            self._renew_at if self._known else None,
        ):
            if due is not None and (soonest is None or due < soonest):
                soonest = due
        return soonest

    @property
    def counts(self) -> "dict[str, object]":
        """Counts since this was made, and last_error (str or None)."""
        counts = self._counts
        return {
            "connects": counts[_CONNECTS],
            "retrieves": counts[_RETRIEVES],
            "notifications": counts[_NOTIFICATIONS],
            "stale": counts[_STALE],
            "gaps": counts[_GAPS],
            "reports": counts[_REPORTS],
            "coalesced": counts[_COALESCED],
            "rejected": counts[_REJECTED],
            "throttled": counts[_THROTTLED],
            "ignored": counts[_IGNORED],
            "last_error": self._last_error,
        }

    @property
    def target(self) -> "dict[str, object]":
        """What the app wants reported: the known reported properties and every report not answered yet."""
        target: "dict[str, object]" = self.reported or {}
        for part in self._queue:
            target = merge(target, part.patch)
        return target

    @property
    def unanswered(self) -> "list[tuple[dict[str, object], int | None, bool]]":
        """Every report not answered yet, in order: patch (shared: never to be changed), the version that it
        is bound to, and whether it goes alone."""
        return [(part.patch, part.version, part.alone) for part in self._queue]

    @property
    def outstanding(self) -> bool:
        """True while a report is gathered or in flight."""
        return bool(self._queue)

    # ------------------------------------------------------------------ inputs: the connection

    def start(self, now: int) -> "list[object]":
        """Want a connection from now on. Does nothing if it is wanted already."""
        out: "list[object]" = []
        if self.state == OFFLINE and self.deadline is None:
            self._connect_tries = 0
            self._dial(now, out)
        return out

    def stop(self) -> "list[object]":
        """Want no connection any more. What is gathered stays, for the next start()."""
        out: "list[object]" = []
        if self.state != OFFLINE or self.deadline is not None:
            out.append(Disconnect())
            self._leave(0, out)
            self._connect_at = None
        return out

    def abandon(self) -> "list[object]":
        """Give up everything that is gathered or asked: each ticket ends in NotConnected."""
        error = NotConnected("the client was closed before the hub answered")
        out: "list[object]" = []
        if self._flight is not None:
            self._flight = None
            self._unsure = True
        for part in self._queue:
            if part.ticket is not None:
                out.append(Reported(part.ticket, None, error))
        for ticket in self._askers:
            out.append(Retrieved(ticket, None, error))
        self._queue, self._askers = [], []
        return out

    def connected(self, now: int, jitter: float, lifetime: "int | None" = None) -> "list[object]":
        """CONNACK accepted. Whether the hub kept a session does not matter.

        lifetime: milliseconds until the credentials of this connection expire, None if they do not. The
        machine reconnects after 80 % to 85 % of it, as soon as nothing is in flight.
        """
        out: "list[object]" = []
        if self.state == OFFLINE and self._get is not None:
            self._counts[_CONNECTS] += 1
            self._lost = self._get_tries = 0
            self._kept = []
            self._renew_at = None if lifetime is None else now + int(lifetime * (16 + jitter) / 20)
            self._enter(SUBSCRIBING, out)
            self._get_wait = now + self._timeout
            out.append(Subscribe(FILTERS))
        return out

    def refused(self, return_code: int, now: int, jitter: float) -> "list[object]":
        """CONNACK with an MQTT 3.1.1 return code other than 0."""
        if return_code == 3:
            return self.disconnected(now, jitter, ConnectRefused("the hub is unavailable (CONNACK 3)"))
        if return_code in (4, 5):
            why = (
                "the hub refused the credentials (CONNACK "
                + str(return_code)
                + "): check the key and the clock, or the certificate and its thumbprint, "
                + "and that the identity exists and is enabled"
            )
        else:
            why = "the hub refused the connection (CONNACK " + str(return_code) + ")"
        return self.disconnected(now, jitter, ConnectRefused(why, False))

    def disconnected(self, now: int, jitter: float, error: "Exception | None" = None) -> "list[object]":
        """The connection was lost, or could not be made. error: why, where that is known."""
        out: "list[object]" = []
        if self.state != OFFLINE or self._get is not None:
            young = self._stable_at is not None and now < self._stable_at
            self._leave(now, out)
            # Full jitter: clients that lost the same hub must not come back together.
            delay = min(_BACKOFF_CAP, _BACKOFF << min(self._connect_tries, 10))
            self._connect_at = now + int(jitter * delay)
            self._connect_tries += 1
            if error is not None:
                self._last_error = str(error)
                if not getattr(error, "can_retry", True):
                    self._slow_down(error, now, jitter, out)
            if young:
                self._short += 1
                if self._short == _TAKEN_OVER:
                    # Told once: the newest connection of an identity ends the one before it.
                    error = ConnectRefused(_TAKEN_OVER_TEXT)
                    self._last_error = str(error)
                    out.append(Failed(error))
        return out

    def subscribed(self, granted: "tuple[int, ...]", now: int, jitter: float) -> "list[object]":
        """SUBACK: one return code a filter, 0x80 for a refused one (MQTT 3.1.1, 3.9.3)."""
        out: "list[object]" = []
        if self.state == SUBSCRIBING:
            if len(granted) != len(FILTERS) or max(granted) >= 0x80:
                self._not_subscribed(granted, now, jitter, out)
            else:
                self._lost = 0
                self._get = None
                self._get_at = now
                self._enter(RETRIEVING, out)
                self._flow(now, out)
        return out

    def _not_subscribed(
        self, granted: "tuple[int, ...]", now: int, jitter: float, out: "list[object]"
    ) -> None:
        text = "the hub refused a subscription (SUBACK " + str(list(granted))
        self._drop(ConnectRefused(text + "): is it a Basic tier hub?", False), now, jitter, out)

    def tick(self, now: int, jitter: float) -> "list[object]":
        """Time has passed. Does nothing before `deadline`."""
        out: "list[object]" = []
        if self._connect_at is not None and now >= self._connect_at:
            self._dial(now, out)
        if (self._get is not None and now >= self._get_wait) or (
            self._flight is not None and now >= self._flight_wait
        ):
            self._give_up(now, jitter, out)
        self._flow(now, out)
        return out

    def _give_up(self, now: int, jitter: float, out: "list[object]") -> None:
        """Give up what is late, and the connection if that is the second answer that is lost."""
        if self.state == OFFLINE:
            self._drop(ConnectRefused("the hub did not answer CONNECT in time"), now, jitter, out)
            return
        what = ""
        if self._get is not None and now >= self._get_wait:
            self._lost += 1
            if self.state == SUBSCRIBING:
                what = "SUBSCRIBE"
                self._get_wait = now + self._timeout
            else:
                what = "a retrieve"
                self._get = None
                self._get_at = now
        if self._flight is not None and now >= self._flight_wait and self._lost < 2:
            self._lost += 1
            what = "a report"
            self._flight = None
            self._unsure = True
        # The first lost answer may be the hub's, the second in a row says that the connection is dead.
        if self._lost >= 2:
            error = RemoteError("the hub did not answer " + what + ", twice in a row")
            self._drop(error, now, jitter, out)
        elif self.state == SUBSCRIBING:
            out.append(Subscribe(FILTERS))

    # ------------------------------------------------------------------ inputs: messages

    def reading(self, topic: str) -> "bool | None":
        """How to read a payload in chunks: the `twin` of a stream.reader; None: b"" will do in its place."""
        where = parse(topic)
        if where is None or self.state == OFFLINE:
            return None
        if where.kind == DESIRED:
            return False
        request_id = where.request_id or ""
        if request_id == self._get:
            return where.status // 100 == 2  # type: ignore[no-any-return]  # a namedtuple has no types
        return False if request_id == self._flight else None

    def message_received(self, topic: str, payload: object, now: int, jitter: float) -> "list[object]":
        """A PUBLISH of the hub. Foreign topics, and answers that nobody waits for, change nothing.

        payload: its bytes; or, where the shell reads in chunks, the document of a reader, which is the
        machine's from then on, or b"" if there is none. A machine that keeps the reported properties needs
        a reader that reads them.
        """
        out: "list[object]" = []
        where = parse(topic)
        if where is None or self.state == OFFLINE:
            return out
        if where.kind == DESIRED:
            self._notified(where.version, payload, now, jitter, out)
        elif where.kind == RESPONSE:
            accepted = (where.status // 100 == 2 and where.request_id) or ""
            if accepted == self._get:
                self._retrieved(payload, now, jitter, out)
            elif accepted == self._flight:
                self._reported(where.version, now, jitter, out)
            else:
                self._not_accepted(where, payload, now, jitter, out)
            self._flow(now, out)
        return out

    def _not_accepted(
        self, where: Topic, payload: object, now: int, jitter: float, out: "list[object]"
    ) -> None:
        """An answer that is no 2xx, or that nobody waits for."""
        request_id = where.request_id
        if request_id is None:
            return
        if request_id == self._get:
            self._retrieve_refused(where, payload, now, jitter, out)
        elif request_id == self._flight:
            self._report_refused(where, payload, now, jitter, out)
        else:
            self._counts[_IGNORED] += 1
            if where.status // 100 == 2 and self._flight is None and self._keep_reported:
                self._doubt(where.version, 0, now, jitter)

    # ------------------------------------------------------------------ inputs: the app

    def report(
        self,
        patch: "dict[str, object]",
        now: int,
        version: "int | None" = None,
        always: bool = False,
    ) -> "tuple[int, list[object]]":
        """Have a merge patch of the reported properties brought to the hub.

        Returns its ticket and the outputs; Reported with that ticket tells the end. Reports that coalesced
        may share a ticket. version: the reported version that the hub must be at, else status 412. always:
        send it even if it changes nothing. PatchError: the hub would refuse it; nothing was changed.
        LocalError: too much is gathered already.
        """
        bound = check(patch)
        alone = always or version is not None
        ticket = None
        if self._keep_reported or len(self._queue) >= _MAX_PARTS:
            ticket = self._fitted(patch, bound, alone)
        if ticket is None:
            self._ticket += 1
            ticket = self._ticket
            self._queue.append(_Part(copy(patch), ticket, version, alone))  # type: ignore[arg-type]  # a dict, as patch
        out: "list[object]" = []
        self._flow(now, out)
        return ticket, out

    def _fitted(self, patch: "dict[str, object]", bound: int, alone: bool) -> "int | None":
        """Make room for a patch: the ticket of the report that it was joined to, None if it goes apart.

        bound: of its own size. PatchError: the target would be too large. LocalError: as report().
        """
        if self._keep_reported:
            # The exact size is looked at only once the bound says that it could be too much.
            bound += size(self.target) if self._bound is None else self._bound
            if bound > MAX_SECTION:
                target = merge(self.target, patch)
                check_section(target, patch)
                bound = size(target)
        waiting = len(self._queue) - (0 if self._flight is None else self._flying)
        ticket = None if waiting < _MAX_PARTS else self._join(patch, alone, waiting >= _MAX_QUEUE)
        self._bound = bound
        return ticket

    def _join(self, patch: "dict[str, object]", alone: bool, full: bool) -> "int | None":
        """Make one of the last report and a patch; its ticket, or None if they have to go apart.

        LocalError: they have to, and too much is gathered already.
        """
        last = self._queue[-1]
        # Apart stay: a part without a ticket, which restores what was reported before, and one that the hub
        # may have merged already.
        if not (alone or last.alone or last.ticket is None or last.sent):
            base = None
            if full and self.reported is not None:
                # The last resort, since it counts on every report before it to be accepted.
                del self._queue[-1]
                base = self.target
                self._queue.append(last)
            joined = compose(last.patch, patch, base)
            if joined is not None:
                last.patch = joined
                self._counts[_COALESCED] += 1
                return last.ticket
        if full:
            raise LocalError("too many reports are gathered that cannot be joined; wait for their answers")
        return None

    def gather(self, now: int, delay: int) -> None:
        """Have the next reports wait for others to leave with them; for this many milliseconds at most.

        They wait only where the first of them follows another at once. 0, and flush(), end that.
        """
        if not delay:
            if self._report_at == self._gather_until:
                self._report_at = 0
        elif now >= self._report_at and len(self._queue) == (0 if self._flight is None else self._flying):
            lately = self._counts[_REPORTS] and now < self._flight_wait - self._timeout + delay
            if self._flight is not None or lately:
                self._report_at = self._gather_until = now + delay

    def flush(self, now: int) -> "list[object]":
        """Have what is gathered leave as soon as the way is free: somebody waits for it."""
        out: "list[object]" = []
        self.gather(now, 0)
        self._flow(now, out)
        return out

    def ask(self, now: int) -> "tuple[int, list[object]]":
        """Ask the hub for the twin as it is now. Returns a ticket; Retrieved with it tells the end."""
        out: "list[object]" = []
        self._ticket += 1
        self._askers.append(self._ticket)
        if self._known and self._get is None and self._get_at is None:
            self._get_at = now
            self._flow(now, out)
        return self._ticket, out

    # ------------------------------------------------------------------ the connection

    def _fail(self, error: Exception, out: "list[object]") -> None:
        self._last_error = str(error)
        out.append(Failed(error))

    def _enter(self, state: str, out: "list[object]") -> None:
        if state != self.state:
            out.append(StateChanged(self.state, state))
            self.state = state

    def _dial(self, now: int, out: "list[object]") -> None:
        self._connect_at = None
        self._get = True
        self._get_wait = now + _CONNECT_TIMEOUT
        out.append(Connect())

    def _leave(self, now: int, out: "list[object]") -> None:
        if self._stable_at is not None and now >= self._stable_at:
            self._connect_tries = self._short = 0
        # The answers of this connection will not come: what was asked is asked again on the next one.
        if self._flight is not None:
            self._flight = None
            self._unsure = True
        self._get = self._get_at = self._stable_at = self._renew_at = None
        self._stable_in = _STABLE
        self._known = False
        self._enter(OFFLINE, out)

    def _drop(self, error: Exception, now: int, jitter: float, out: "list[object]") -> None:
        """End a connection that is no good. However young it is, that is nobody else's doing."""
        if self._stable_at is not None and now < self._stable_at:
            self._stable_at = None
        out.append(Disconnect())
        out.extend(self.disconnected(now, jitter, error))

    def _slow_down(self, error: Exception, now: int, jitter: float, out: "list[object]") -> None:
        """What only a person can help against is told, and tried again slowly."""
        self._connect_at = now + _half_jitter(_SLOW, _SLOW_CAP, self._connect_tries - 1, jitter)
        out.append(Failed(error))

    # ------------------------------------------------------------------ desired properties

    def _ask_again(self, now: int, jitter: float) -> None:
        """Retrieve again: at once the first time, then ever more slowly until something goes right."""
        # It may be just for the app that one is due now: that is no reason for haste.
        if self._get_at is None or (self._askers and self._get_at == now):
            self._get_at = now
            if self._get_tries:
                self._get_at += _half_jitter(_BACKOFF, _BACKOFF_CAP, self._get_tries - 1, jitter)
            self._get_tries += 1

    def _notified(
        self, version: object, payload: object, now: int, jitter: float, out: "list[object]"
    ) -> None:
        patch = payload if isinstance(payload, dict) else _parsed(payload)
        if patch is not None:
            # The body's $version counts; the topic's stands in only where the body has none.
            version = _stripped(patch, version)
            following = self.desired_version + 1 if self.state == SYNCHRONISED else None  # type: ignore[operator]  # there is one
            if version == following and type(version) is int:
                self.desired = merge(self.desired, patch)
                self.desired_version = version
                self._counts[_NOTIFICATIONS] += 1
                out.append(DesiredChanged(patch, self.desired))
                return
        self._missed(version, patch, payload, now, jitter, out)

    def _missed(
        self,
        version: object,
        patch: "dict[str, object] | None",
        payload: object,
        now: int,
        jitter: float,
        out: "list[object]",
    ) -> None:
        """Discard a notification that is old, keep one that is early, or retrieve again."""
        if patch is None:
            text = "a desired notification is no JSON object; the twin is retrieved again"
            self._fail(RemoteError(text), out)
            version = None
        if self.state == SYNCHRONISED and type(version) is int and version <= self.desired_version:  # type: ignore[operator]  # synchronised: there is one
            self._counts[_STALE] += 1
            return
        # Of a document that a board has read, this is just the number of keys.
        size = sum([kept.size for kept in self._kept]) + len(payload)  # type: ignore[arg-type]  # bytes or a dict
        if (
            patch is not None
            and type(version) is int
            and len(self._kept) < _MAX_KEPT
            and size <= _MAX_KEPT_BYTES
        ):
            self._kept.append(_Kept(version, patch, len(payload)))  # type: ignore[arg-type]  # as above
        elif self._get is not None and self.state != SUBSCRIBING:
            # The document that is on its way may be older than what cannot be kept.
            self._again = True
        if self.state == SYNCHRONISED:
            self._counts[_GAPS] += 1
            self._enter(RETRIEVING, out)
            if self._get is None:
                self._ask_again(now, jitter)
                self._flow(now, out)

    def _retrieved(self, payload: object, now: int, jitter: float, out: "list[object]") -> None:
        self._get = None
        self._lost = 0
        twin = (payload if isinstance(payload, dict) else _parsed(payload)) or {}
        desired, version = _section(twin, "desired")
        reported, reported_version = _section(twin, "reported")
        if desired is None or version is None or reported is None:
            self._unreadable(twin, now, jitter, out)
            return
        if self._askers:
            self._answer(desired, reported, now, out)
        asked_at = self._get_version
        if asked_at is None or version < asked_at or version >= self.desired_version:  # type: ignore[operator]  # has one
            # Older than what it was asked at: the twin was deleted and created again.
            self._adopt(desired, version, now, jitter, out)
        elif self.state == RETRIEVING:
            # Notifications have overtaken it meanwhile; what is missing came after them.
            self._ask_again(now, jitter)
        # A document that was on its way while a report was answered tells nothing about it.
        if not self._moved and self._flight is None:
            self.reported_version = reported_version
            if self._keep_reported:
                self._reconcile(reported, reported_version, out)
            self._known = True

    def _unreadable(self, twin: "dict[str, object]", now: int, jitter: float, out: "list[object]") -> None:
        properties = twin.get("properties")
        if "desired" not in twin and isinstance(properties, dict) and "desired" in properties:
            self._retrieved(properties, now, jitter, out)
            return
        text = "the retrieved twin is no JSON object with desired and reported properties"
        self._fail(RemoteError(text), out)
        self._ask_again(now, jitter)

    def _answer(
        self, desired: "dict[str, object]", reported: "dict[str, object]", now: int, out: "list[object]"
    ) -> None:
        """Give the document to those who asked before the retrieve was sent; the others wait for the next."""
        later = []
        for ticket in self._askers:
            if ticket > self._get_ticket:
                later.append(ticket)
                self._get_at = now
            else:
                out.append(Retrieved(ticket, {"desired": copy(desired), "reported": copy(reported)}, None))
        self._askers = later

    def _retrieve_refused(
        self, where: Topic, payload: object, now: int, jitter: float, out: "list[object]"
    ) -> None:
        status = where.status
        code, tracking_id, message = _explained(payload)
        delay = _retry_delay(where, code, self._get_tries, jitter)
        asked = [ticket for ticket in self._askers if ticket <= self._get_ticket]
        self._get = None
        self._lost = 0
        if delay is None:
            error = RetrieveRejected(status, code, tracking_id, message)
            for ticket in asked:
                out.append(Retrieved(ticket, None, error))
            del self._askers[: len(asked)]
            asked = []
            self._fail(error, out)
            delay = _half_jitter(_SLOW, _SLOW_CAP, self._get_tries, jitter)
        else:
            self._counts[_THROTTLED] += 1
            self._last_error = "status " + str(status) + " to a retrieve"
        self._get_tries += 1
        if self.state == RETRIEVING or asked or not self._known:
            self._get_at = now + delay
        elif self._askers and self._get_at is None:
            self._get_at = now

    def _adopt(
        self, desired: "dict[str, object]", version: int, now: int, jitter: float, out: "list[object]"
    ) -> None:
        """The document is the truth. The app gets one change: from what it was last given to this."""
        if self._kept:
            desired, version = self._caught_up(desired, version)
        change = diff(self.desired, desired)
        self.desired_version = version
        if change:
            self.desired = desired
            out.append(DesiredChanged(change, desired))
        if self._kept or self._again:
            self._still_behind(now, jitter, out)
        else:
            self._get_tries = 0
            if self._stable_at is None:
                self._stable_at = now + self._stable_in
            self._enter(SYNCHRONISED, out)

    def _still_behind(self, now: int, jitter: float, out: "list[object]") -> None:
        if self._kept:
            self._counts[_GAPS] += 1
        self._enter(RETRIEVING, out)
        self._ask_again(now, jitter)

    def _caught_up(self, desired: "dict[str, object]", version: int) -> "tuple[dict[str, object], int]":
        """A document with the notifications that follow it; behind a gap they are kept."""
        gap = []
        # By version only: sort() would go on to compare the patches.
        self._kept.sort(key=lambda kept: kept.version)
        for kept in self._kept:
            if kept.version == version + 1:
                desired = merge(desired, kept.patch)
                version += 1
                self._counts[_NOTIFICATIONS] += 1
            elif kept.version <= version or kept.outlived:
                # Old; or a second document in a row does not know it: no such version was ever written.
                self._counts[_STALE] += 1
            else:
                kept.outlived = True
                gap.append(kept)
        self._kept = gap
        return desired, version

    # ------------------------------------------------------------------ reported properties

    def _reconcile(self, reported: "dict[str, object]", version: "int | None", out: "list[object]") -> None:
        """What the hub holds is known now; what it lost of the target is put first in the queue."""
        before = self.reported
        self._bound = None
        # Where the answer was lost, only the document can tell whether the patch was merged.
        merged = self._unsure and same(merge(reported, self._flight_patch), reported)
        self._unsure = False
        for part in self._queue[:1]:
            if part.version is not None and part.sent:
                if version == part.version and part.sent > 0:
                    merged = False  # it would have moved the version
                    break
                del self._queue[0]
                if not merged:
                    error = ReportRejected(412, message="the reported version is " + str(version))
                    self._end_refused(part, error, out)
                else:
                    out.append(Reported(part.ticket, version, None))
        if before is not None:
            if merged:
                before = merge(before, self._flight_patch)
            restore = diff(reported, before)
            if restore:
                self._queue.insert(0, _Part(restore, None, None, False))
        self.reported = reported

    def _flow(self, now: int, out: "list[object]") -> None:
        """Send whatever may go now: at most one retrieve and one report are in flight."""
        if self._renew_at is not None and now >= self._renew_at:
            self._renew(now, out)
        if self._get is None and self._get_at is not None and now >= self._get_at:
            self._get_at = None
            self._get = self._next_request()
            self._get_wait = now + self._timeout
            self._get_version = self.desired_version
            self._get_ticket = self._ticket
            self._moved = self._again = False
            self._counts[_RETRIEVES] += 1
            out.append(Publish(retrieve_topic(self._get), b""))
        if self._flight is None and self._known and self._queue and now >= self._report_at:
            self._send_report(now, out)

    def _renew(self, now: int, out: "list[object]") -> None:
        if not self._known and self._renew_at != _OVERDUE:
            return  # a connection becomes synchronised first
        self._renew_at = _OVERDUE
        # So nothing more is sent.
        self._known = False
        self._get_at = None
        if self._get is None and self._flight is None:
            # Planned: no backoff, no attempt that counts, and nobody else's doing.
            self._short = 0
            stable_in = self._stable_in if self._stable_at is None else max(0, self._stable_at - now)
            out.append(Disconnect())
            self._leave(now, out)
            self._stable_in = stable_in
            self._dial(now, out)

    def _next_request(self) -> str:
        self._request += 1
        return str(self._request)

    def _send_report(self, now: int, out: "list[object]") -> None:
        first = self._queue[0]
        patch = first.patch
        self._flying = 1
        if not first.alone and (len(self._queue) > 1 or self.reported is not None):
            patch = self._joined(out)  # type: ignore[assignment]  # None is looked at next
            if patch is None:
                return
            first = self._queue[0]
        first.sent += 1
        self._flight = self._next_request()
        self._flight_patch = patch
        self._flight_wait = now + self._timeout
        self._counts[_REPORTS] += 1
        out.append(Publish(report_topic(self._flight, first.version), dumps(patch).encode()))

    def _joined(self, out: "list[object]") -> "dict[str, object] | None":
        """One patch of those at the head of the queue that may go together; None if nothing is left to send.

        What changes nothing is answered.
        """
        while self._queue:
            parts, patch = self._next_patch()
            if patch is not None:
                self._flying = len(parts)
                self._counts[_COALESCED] += len(parts) - 1
                for part in parts[1:]:
                    part.sent += 1
                return patch
            del self._queue[: len(parts)]
            for part in parts:
                out.append(Reported(part.ticket, self.reported_version, None))
        return None

    def _next_patch(self) -> "tuple[list[_Part], dict[str, object] | None]":
        """The parts at the head of the queue that go out together, and their patch; None: nothing changes."""
        first = self._queue[0]
        patch = first.patch
        parts = [first]
        if first.alone:
            return parts, patch
        if self.reported is None:
            for part in self._queue[1:]:
                joined = None if part.alone else compose(patch, part.patch)
                if joined is None:
                    break
                patch = joined
                parts.append(part)
            return parts, patch
        return parts, self._difference(parts)

    def _difference(self, parts: "list[_Part]") -> "dict[str, object] | None":
        """What leads from the known reported properties to the target; the parts up to there are added."""
        known: "dict[str, object]" = self.reported  # type: ignore[assignment]  # it is kept, and known
        target = merge(known, parts[0].patch)
        for part in self._queue[1:]:
            if part.alone:
                break
            target = merge(target, part.patch)
            parts.append(part)
        if not self._unsure:
            return diff(known, target) or None
        lost = self._flight_patch
        return compose(lost, diff(merge(known, lost), target), known)

    def _reported(self, version: "int | None", now: int, jitter: float, out: "list[object]") -> None:
        if self._keep_reported:
            self._take_over(version, now, jitter)
        self._flight = None
        self._lost = 0
        self._moved = True
        self.reported_version = version
        for _ in range(self._flying):
            out.append(Reported(self._queue.pop(0).ticket, version, None))

    def _take_over(self, version: "int | None", now: int, jitter: float) -> None:
        """What was in flight is a part of the known reported properties now."""
        # Sent again, it may have been merged twice.
        self._doubt(version, 2 if self._queue[0].sent > 1 else 1, now, jitter)
        self.reported = merge(self.reported, self._flight_patch)
        self._unsure = False

    def _report_refused(
        self, where: Topic, payload: object, now: int, jitter: float, out: "list[object]"
    ) -> None:
        status = where.status
        code, tracking_id, message = _explained(payload)
        parts = self._queue[: self._flying]
        first = parts[0]
        delay = _retry_delay(where, code, first.tries, jitter)
        error = ReportRejected(status, code, tracking_id, message)
        self._flight = None
        self._lost = 0
        for part in parts:
            part.sent -= 1  # this time has an answer
        if delay is not None:
            first.tries += 1
            self._report_at = now + delay
            self._counts[_THROTTLED] += 1
            self._last_error = "status " + str(status) + " to a report"
        elif status == 412 and first.sent > 0 and self._keep_reported:
            # The first time may have been applied and its answer lost: the document tells.
            first.sent = -1
            self._known = False
            self._moved = True
            self._ask_again(now, jitter)
        else:
            self._bound = None
            self._unsure = False
            self._last_error = str(error)
            if len(parts) > 1:
                # The hub refuses a patch whole. Each part goes again by itself: only the guilty one is lost.
                for part in parts:
                    part.alone = True
            else:
                del self._queue[0]
                self._end_refused(first, error, out)

    def _doubt(self, version: "int | None", writes: int, now: int, jitter: float) -> None:
        """Look at the document if the reported version has grown by more than our own writes.

        A report that was given up may still be merged by a slow hub, after the ones that followed it.
        """
        known = self.reported_version
        if self._known and known is not None and version is not None and version > known + writes:
            self._known = False
            self._moved = True
            self._ask_again(now, jitter)

    def _end_refused(self, part: _Part, error: ReportRejected, out: "list[object]") -> None:
        self._counts[_REJECTED] += 1
        out.append(Failed(error) if part.ticket is None else Reported(part.ticket, None, error))


def _parsed(payload: object) -> "dict[str, object] | None":
    """The document of these bytes; None if they are no JSON object."""
    try:
        document = loads(payload)  # type: ignore[arg-type]  # it is bytes
    except (ValueError, RuntimeError):
        return None
    return document if isinstance(document, dict) else None


def _stripped(document: "dict[str, object]", version: object) -> object:
    """Take the `$` keys out of a document; its `$version`, or this one if it has none."""
    version = document.get("$version", version)
    for key in list(document):
        if key.startswith("$"):
            del document[key]
    return version


def _section(twin: "dict[str, object]", name: str) -> "tuple[dict[str, object] | None, int | None]":
    """One section of a twin, without `$` keys and nulls, and its `$version`. The section is changed."""
    section = twin.get(name)
    if not isinstance(section, dict):
        return None, None
    version = _stripped(section, None)
    _drop_nulls(section)
    return section, version if type(version) is int else None


def _drop_nulls(document: "dict[str, object]") -> None:
    for key in list(document):
        value = document[key]
        if value is None:
            del document[key]
        elif isinstance(value, dict):
            _drop_nulls(value)


def _explained(payload: object) -> "tuple[object, object, object]":
    """errorCode, trackingId and message of an error's body; None for what it does not have."""
    body = (payload if isinstance(payload, dict) else _parsed(payload)) or {}
    return body.get("errorCode"), body.get("trackingId"), body.get("message")


def _retry_delay(where: Topic, code: object, tries: int, jitter: float) -> "int | None":
    """Milliseconds until a request with this answer is worth sending again; None if it never is."""
    status = where.status
    if status == 429 or status >= 500 or status in (408, 499):
        delay = _half_jitter(_BACKOFF, _BACKOFF_CAP, tries, jitter)
    elif status == 403 and code == 403002:
        delay = _half_jitter(_SLOW, _SLOW_CAP, tries, jitter)
    else:
        return None
    # The hub knows best, but no wait is without end.
    return max(delay, min((where.retry_after or 0) * 1000, _SLOW_CAP))


def _half_jitter(base: int, cap: int, tries: int, jitter: float) -> int:
    # Half of the delay is certain, so that chance cannot make a burst of it.
    return int(min(cap, base << min(tries, 10)) * (0.5 + 0.5 * jitter))
