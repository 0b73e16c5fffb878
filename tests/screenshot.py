"""Takes the picture of the page that README shows: .venv/bin/python -m tests.screenshot

A hub with a few devices, one of them connected, with values that differ and a fault that is active.
"""

import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from tests.waiting import PATIENCE
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub

PICTURE = Path(__file__).parents[1] / ".github" / "images" / "page.png"
SIZE = {"width": 1280, "height": 950}
DESIRED = {
    "telemetryInterval": 15,
    "temperatureThreshold": {"min": 20.5, "max": 26.5, "alertEnabled": True},
    "loggingLevel": "info",
    "firmware": {"version": "1.4.2"},
}
REPORTED = {
    "telemetryInterval": {"value": 15, "ac": 200, "av": 1, "ad": "success"},
    "temperatureThreshold": {"min": 20.5, "max": 30.5, "alertEnabled": True},
    "loggingLevel": "info",
    "batteryLevel": 87,
}


def story(hub: LocalHub) -> Device:
    """The devices, and the one to look at."""
    for name in ("boiler-1", "gateway-7/uplink", "gateway-7/valve", *(f"sensor-{n}" for n in range(1, 9))):
        hub.create_device(name, desired={"telemetryInterval": 30})
    hub.device("sensor-5").disable()
    return hub.create_device("sensor-temp-042", desired=DESIRED, tags={"site": "Building 43", "floor": 2})


def main() -> None:
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with LocalHub(None, 0, http_port=0) as hub, sync_playwright() as driver:
        device = story(hub)
        client = TwinClient.from_connection_string(device.plaintext_connection_string, tls=False)
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-lcd-text"],
        )
        page = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
        expect.set_options(timeout=PATIENCE * 1000)
        with client:
            client.report(REPORTED)
            hub.fault("answer_lost", device=device, operation="report", times=3)
            page.goto(f"{hub.page_url}")
            page.get_by_role("link", name=device.id).click()
            expect(page.locator("#log > li")).to_have_count(8)
            page.get_by_label("JSON object").fill('{\n  "telemetryInterval": 60,\n  "loggingLevel": null\n}')
            # Neither the caret nor a ring around what was clicked.
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=PICTURE)
        browser.close()
    print(f"{PICTURE}: {PICTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
