"""MicroPython's time, but nobody waits: every pause is written down in `slept`."""

from utime import *  # noqa: F403  # all of the real one

slept = []
sleep_ms = slept.append
