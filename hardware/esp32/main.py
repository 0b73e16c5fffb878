# A thermometer with the sensor inside the chip, and the LED of most development boards.
import esp32
import machine
import thermometer

led = machine.Pin(2, machine.Pin.OUT, value=0)


def temperature():
    # ESP32-C3, S2, S3 and C6 measure in Celsius under another name.
    if hasattr(esp32, "mcu_temperature"):
        return esp32.mcu_temperature()
    return (esp32.raw_temperature() - 32) / 1.8


thermometer.run(temperature, led.value, lambda: machine.WDT(timeout=8000))
