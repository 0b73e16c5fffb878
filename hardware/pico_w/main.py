# A thermometer with the sensor inside the RP2040 or RP2350, and the LED beside the radio.
import machine
import thermometer

led = machine.Pin("LED", machine.Pin.OUT, value=0)
sensor = machine.ADC(4)


def temperature():
    # RP2040 datasheet, 4.9.5: 0.706 V at 27 degrees, 1.721 mV less for each degree more.
    return 27 - (sensor.read_u16() * 3.3 / 65535 - 0.706) / 0.001721


thermometer.run(temperature, led.value, lambda: machine.WDT(timeout=8000))
