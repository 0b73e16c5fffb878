"""Every error of twin_device: first who is to blame, then what to do.

    TwinError
     +- LocalError          the app asked for something the protocol forbids; nothing was sent
     |   +- PatchError          a property breaks a limit of the hub: path, limit, size
     |   +- NotConnected        the client was never started, or is closed
     +- RemoteError         the hub broke its documented protocol
     +- ReportRejected      the hub refused a report: status, error_code, tracking_id
     +- ReportTimeout       no answer to a report in time; it stays gathered and is still sent
     +- RetrieveRejected    the hub refused a retrieve: status, error_code, tracking_id
     +- RetrieveTimeout     no answer to a retrieve in time
     +- ConnectRefused      no connection: why, and whether trying again can help
     +- StoreError          the store's file was damaged, or cannot be written; the client goes on

Single inheritance only: MicroPython allows one native base class.
"""


class TwinError(Exception):
    """Base of every error that twin_device raises on purpose."""


class LocalError(TwinError):
    """The app asked for something the protocol forbids. Nothing was sent, nothing was changed."""


class PatchError(LocalError):
    """A patch that the hub would refuse. Nothing of it was taken over.

    path: str, the offending key ("temperatureThreshold.min", "list[2]", "" for the patch itself).
    limit: str, the rule that it breaks. size: the offending size or value, or None.
    """

    def __init__(self, path: str, limit: str, size: object = None) -> None:
        text = (path or "the patch") + ": " + limit
        if size is not None:
            text += ", not " + str(size)
        super().__init__(text)
        self.path = path
        self.limit = limit
        self.size = size


class NotConnected(LocalError):
    """The client was never started or is closed, so nobody would ever send this."""


class RemoteError(TwinError):
    """The hub broke its documented protocol. The client asks again or reconnects on its own."""


class _Rejected(TwinError):
    _what = "report"

    def __init__(
        self, status: int, error_code: object = None, tracking_id: object = None, message: object = None
    ) -> None:
        text = "the hub refused the " + self._what + " with status " + str(status)
        if error_code is not None:
            text += ", errorCode " + str(error_code)
        if message:
            text += ": " + str(message)
        if tracking_id:
            text += " (trackingId " + str(tracking_id) + ")"
        # The hub's words, however many they are.
        super().__init__(text[:2048])
        self.status = status
        self.error_code = error_code
        self.tracking_id = tracking_id


class ReportRejected(_Rejected):
    """The hub refused a report; the reported properties are as they were.

    status: int. error_code, tracking_id: as the hub gave them, None where it gave none.
    """


class ReportTimeout(TwinError):
    """No answer to a report in time. The report stays gathered: it is sent again until it is answered."""


class RetrieveRejected(_Rejected):
    """The hub refused to give the twin. Attributes as for ReportRejected."""

    _what = "retrieve"


class RetrieveTimeout(TwinError):
    """No answer to a retrieve in time."""


class ConnectRefused(TwinError):
    """There is no connection.

    can_retry: bool, True if trying again can help without anybody changing credentials, certificates or
    the identity. The client tries again in both cases, slowly in the second.
    """

    def __init__(self, why: str, can_retry: bool = True) -> None:
        super().__init__(why)
        self.can_retry = can_retry


class StoreError(TwinError):
    """The store's file was damaged and set aside, or cannot be written. The client goes on without it, and
    tries again to write it with the next change."""
