"""MicroPython's esp32: the sensor inside the chip, in degrees Fahrenheit, and the non-volatile storage."""

kept = {}


def raw_temperature():
    return 77


class NVS:
    def __init__(self, namespace):
        self._namespace = namespace

    def set_i32(self, key, value):
        kept[self._namespace, key] = value

    def get_i32(self, key):
        return self._get(key)

    def set_blob(self, key, value):
        kept[self._namespace, key] = bytes(value)

    def get_blob(self, key, buffer):
        found = self._get(key)
        if len(found) > len(buffer):
            raise OSError(-0x110C, "ESP_ERR_NVS_INVALID_LENGTH")
        buffer[: len(found)] = found
        return len(found)

    def _get(self, key):
        try:
            return kept[self._namespace, key]
        except KeyError:
            raise OSError(-0x1102, "ESP_ERR_NVS_NOT_FOUND") from None

    def commit(self):
        pass
