"""An app that reports 1,000 times with a store, and says each time that report() has returned; to be killed.

Arguments: connection string, CA, the store's file, "answered" to wait for every answer or "accepted" not to.
"""

import sys
from typing import Any

from twin_device import TwinClient

REPORTS = 1000


def patch_of(number: int) -> dict[str, Any]:
    """The report of this number: keys change, come and go."""
    if number % 7 == 3:
        return {f"k{number % 20}": None, "nested": {f"n{number % 5}": None}}
    return {f"k{number % 20}": number, "nested": {f"n{number % 5}": {"number": number}}}


def main(text: str, ca_file: str, store: str, how: str) -> None:
    client = TwinClient.from_connection_string(text, ca_file=ca_file, store=store)
    client.connect()
    print("ready", flush=True)
    # What is done to the hub is done by the time this comes.
    sys.stdin.readline()
    for number in range(REPORTS):
        client.report(patch_of(number), wait=how == "answered")
        print(number, flush=True)
    # Killed in any case.
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
