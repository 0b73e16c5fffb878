# Runs at power-up, before main.py: a network and a right clock, or a restart.
import online

try:
    online.up(online.configuration())
except ValueError as error:
    # Only a person can mend the configuration: stay here, so that mpremote can.
    print("boot:", error)
except OSError as error:
    import machine

    print("boot:", error, "- restarting")
    machine.reset()
