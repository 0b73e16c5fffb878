"""Python imports this at the start of every process that the tests start: its folder is on the path."""

import os
import sys

# The tests' MicroPython is one, too, until its main(): it logs nothing and starts nothing.
_is_board = any(os.path.basename(name) == "micropython" for name in sys.orig_argv[:2])
if not _is_board:
    import leaks

    # The name by which tests import it: in a pytest that a test starts it must not be there twice.
    sys.modules["tests.leaks.leaks"] = leaks
    # The process that started this one left it its folder for what is found.
    if found := os.environ.get(leaks.FOLDER):
        leaks.watch(found)
