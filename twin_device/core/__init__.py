"""The rules of a correct twin client, without I/O: the same files run on CPython and on MicroPython."""
