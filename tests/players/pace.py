"""The core's patience, some twenty times shorter: a minute's outage is played in seconds."""

from twin_device.core import twin

# Seconds within which a client that hurries is right again, whatever has happened: a dial and a CONNECT that
# hang, the longest delay, and two requests that are given up, if they are given up after 2 s.
BOUND = 30.0


def hurry() -> None:
    """Shorten every wait of the core that is not an argument. They are the module's own, in milliseconds."""
    for name, value in {
        "_BACKOFF": 50,
        "_BACKOFF_CAP": 5000,
        "_SLOW": 1000,
        "_SLOW_CAP": 8000,
        "_STABLE": 3000,
        "_CONNECT_TIMEOUT": 3000,
    }.items():
        if type(getattr(twin, name)) is not int:
            raise TypeError(f"{name} is no longer a number of milliseconds")
        setattr(twin, name, value)
