"""What a service says to systemd: that it is ready and alive, and how grave a line of its log is.

sd_notify(3), sd-daemon(3) and systemd.exec(5) say what must be written where; no library is needed for it.
"""

import os
import socket
from typing import TextIO

# Priorities of a line of the log: syslog's, as sd-daemon(3) has them.
ERROR = 3
WARNING = 4
INFO = 6


def notify(text: str) -> bool:
    """Send assignments such as "READY=1" or "WATCHDOG=1", one a line, to the service manager.

    False: nobody asked for it (NOTIFY_SOCKET is not set), or nobody is listening. Never waits.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@") or not hasattr(socket, "AF_UNIX"):
        return False
    if address.startswith("@"):
        # Linux' abstract names.
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
        sending.setblocking(False)
        try:
            sending.sendto(text.encode(), address)
        except OSError:
            return False
    return True


def watchdog_seconds() -> float | None:
    """How long the service manager waits for WATCHDOG=1 until it kills this process; None: it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not (microseconds.isascii() and microseconds.isdigit()) or int(microseconds) == 0:
        return None
    return int(microseconds) / 1e6


def is_journal(stream: TextIO) -> bool:
    """True if what is written to the stream goes straight to the journal."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def prefixed(text: str, priority: int) -> str:
    """The text with its priority before each line, as the journal takes it off again."""
    return "\n".join(f"<{priority}>{line}" for line in text.split("\n"))
