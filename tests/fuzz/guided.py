"""One target under atheris: `python -m tests.fuzz.guided NAME [libFuzzer's options]`. It ends the process."""

import sys
import tempfile
from pathlib import Path
from types import FunctionType

import atheris

with atheris.instrument_imports(include=["twin_device.core", "twin_device.store"]):
    import twin_device.core.credentials
    import twin_device.core.settings
    import twin_device.core.stream
    import twin_device.store  # noqa: F401  # imported here first, to be instrumented
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS

# The board's module is not imported by its name, which is what the above goes by.
for _one in vars(targets._mqtt).values():
    for _function in vars(_one).values() if isinstance(_one, type) else [_one]:
        if isinstance(_function, FunctionType) and _function.__module__ == targets._mqtt.__name__:
            atheris.instrument_func(_function)


def main(arguments: list[str]) -> None:
    target = TARGETS[arguments[1]]
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for number, data in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(data)
        words = Path(corpus, "..", f"{Path(corpus).name}.dict")
        lines = ["".join(rf"\x{byte:02x}" for byte in word) for word in target.words]
        words.write_text("".join(f'"{line}"\n' for line in lines))
        atheris.Setup([arguments[0], *arguments[2:], f"-dict={words}", corpus], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
