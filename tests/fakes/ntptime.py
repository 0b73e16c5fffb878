"""MicroPython's ntptime: `lost` packets of UDP are lost first; then it has set the clock, if it may."""

host = "pool.ntp.org"
lost = 0
asked = []


def settime():
    global lost
    asked.append(host)
    if lost:
        lost -= 1
        raise OSError(110)
