"""The local hub's page in a real Chromium: what people see, type and hear."""

import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import Any

import pytest

from tests.hub_backend import KEY, token
from tests.hub_wire import DESIRED, RES, Wire, connect, online, publish, user
from tests.hub_wire import KEY as DEVICE_KEY
from tests.hub_wire import token as device_token
from tests.waiting import PATIENCE, wait_until
from twin_device import TwinClient
from twin_device.hub import Device, LocalHub
from twin_device.hub.faults import KINDS

pytest.importorskip("playwright", reason="the browser's driver has no wheel for this platform")
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is on PATH")
FLAGS = [
    "--no-sandbox",  # it shows nothing but our own page, and CI is root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REPORT = "$iothub/twin/PATCH/properties/reported/?$rid=1"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
# Ids may have all of these; as an address and in a query each of them means something.
ODD = "o'b%2Fc#d?e=f+%25(g)*:@;$!,_."
NONE = "\u2013"  # what a cell shows without a value
HOSTILE = [
    "<script>ran=1</script>",
    "<img/src=x/onerror=ran=1>",
    "</textarea><svg/onload=ran=1>",
    "\"'><iframe/srcdoc='<script>parent.ran=1</script>'>",
    "javascript:ran=1",
    "\u202ereversed\u2066 \u200bunseen\ufeff \u2028",
    "${ran=1}{{ran=1}}&lt;b&gt;",
]


# ---------------------------------------------------------------------- a hub, a browser, a page


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(None, 0, http_port=0, owner_key=KEY) as hub:
        yield hub


@pytest.fixture
def device(hub: LocalHub) -> Device:
    return hub.create_device(
        "dev", DEVICE_KEY, desired={"interval": 30, "limits": {"max": 26}}, tags={"site": "A"}
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver, ExitStack() as stack:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        stack.callback(browser.close)
        expect.set_options(timeout=PATIENCE * 1000)
        yield browser


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Page:
    # One for all who want nothing special: a new one costs as much as a test.
    return browser.new_page(viewport=DESKTOP)


@pytest.fixture
def visit(browser: Browser, tab: Page, hub: LocalHub) -> Iterator[Callable[..., Page]]:
    """visit(address behind the port, **a context's options): a page that may not complain until the end."""
    complaints: list[str] = []

    def complain(message: Any) -> None:
        # A refused request is told there, too; what the page makes of it is tested.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            complaints.append(message.text)

    def ask(request: Any) -> None:
        if not request.url.startswith((f"http://localhost:{hub.http_port}/", "data:,")):
            complaints.append(f"it asked for {request.url}")

    def answer(dialog: Any) -> None:
        complaints.append(dialog.message)
        dialog.dismiss()

    def wrong(error: Any) -> None:
        complaints.append(str(error))

    listeners = {"console": complain, "pageerror": wrong, "dialog": answer, "request": ask}
    contexts = []

    def visit(address: str | None = None, **options: Any) -> Page:
        page = tab
        if options:
            contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
            page = contexts[-1].new_page()
        if page is not tab or tab.url == "about:blank":
            page.set_default_timeout(PATIENCE * 1000)
            for event, listener in listeners.items():
                page.on(event, listener)
        page.goto(hub.page_url or "" if address is None else f"http://localhost:{hub.http_port}/{address}")
        return page

    yield visit
    for context in contexts:
        context.close()
    if tab.url != "about:blank":
        for event, listener in listeners.items():
            tab.remove_listener(event, listener)
        # A late request may be with its handler still: the test that wanted it has ended.
        tab.unroute_all(behavior="ignoreErrors")
        # A later hub may have this port.
        tab.evaluate("sessionStorage.clear()")
        tab.set_viewport_size(DESKTOP)
        tab.goto("about:blank")
    assert complaints == []


@pytest.fixture
def page(visit: Callable[..., Page], device: Device) -> Page:
    """The page, with the device chosen."""
    page = visit()
    page.evaluate("location.hash = '#device=dev'")
    expect(page.get_by_role("heading", level=2, name="dev", exact=True)).to_be_visible()
    return page


def choose(page: Page, name: str) -> None:
    page.locator("#device-list").get_by_text(name, exact=True).click()
    expect(page.get_by_role("heading", level=2, name=name, exact=True)).to_be_visible()


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))


def expect_cells(page: Page, name: str, *texts: str) -> None:
    expect(row(page, name).get_by_role("cell")).to_have_text([*texts])


def send(page: Page, mode: str, text: str) -> None:
    page.get_by_role("radio", name=mode).check()
    page.get_by_label("JSON object").fill(text)
    page.get_by_role("button", name="Send").click()


def device_client(hub: LocalHub, device: Device) -> TwinClient:
    return TwinClient.from_connection_string(device.plaintext_connection_string, tls=False, timeout=PATIENCE)


# ---------------------------------------------------------------------- the story


def test_a_change_typed_here_reaches_the_device_and_its_report_appears(
    hub: LocalHub, device: Device, page: Page
) -> None:
    expect_cells(page, "interval", "30", NONE, "○not reported")
    page.evaluate("window.stays = true")
    client = device_client(hub, device)
    client.on_desired(lambda _patch, desired: client.report({"interval": desired["interval"]}))
    with client:
        expect(page.locator("#facts")).to_contain_text("Connection connected", use_inner_text=True)
        expect_cells(page, "interval", "30", "30", "=same")
        send(page, "Patch desired", '{"interval": 15}')
        expect_cells(page, "interval", "15", "15", "=same")
        expect(page.get_by_text("Done. Desired has version 2, the twin version ")).to_be_visible()
        assert client.desired["interval"] == 15
        client.report({"interval": 20})
        expect_cells(page, "interval", "15", "20", "≠differs")
        expect(page.locator("#twin-summary")).to_have_text("2 of 2 desired values differ.")
    expect(page.locator("#facts")).to_contain_text("not connected")
    assert page.evaluate("window.stays")


def test_the_first_words_say_what_this_is(visit: Callable[..., Page]) -> None:
    page = visit()
    assert page.locator("body").inner_text().startswith("local hub for development, not a production hub")
    expect(page.get_by_text("There is no device yet.")).to_be_visible()


# ---------------------------------------------------------------------- what a device says is text


def test_whatever_a_device_says_is_shown_as_text(
    hub: LocalHub, device: Device, visit: Callable[..., Page]
) -> None:
    signs = str.maketrans({" ": "_", ".": "_", "$": "_", "#": "_", "\u2028": "_"})
    deep: dict[str, Any] = {"bottom": HOSTILE[0]}
    for level in range(9, 0, -1):
        deep = {f"level{level}": deep}
    report = {
        **{text.translate(signs): text for text in HOSTILE},
        "list": HOSTILE,
        "__proto__": "own",
        "constructor": {"prototype": 1},
        "toString": None,
        "long": "<b>" * 1300,
        **deep,
    }
    name = user("dev", tail="/?api-version=2021-04-12&model-id=dtmi:<img%20src=x%20onerror=ran%3D1>;1")
    with Wire(hub.mqtt_port) as wire:
        wire.send(connect("dev", name, device_token("dev", DEVICE_KEY))).packet()
        wire.subscribe(RES, DESIRED)
        page = visit()
        choose(page, "dev")
        assert "/204/" in wire.ask(REPORT, json.dumps(report).encode()).topic
        wire.send(publish("devices/dev/messages/events/<img src=x onerror=ran=1>", HOSTILE[1].encode()))
        for text in HOSTILE[:5]:
            expect(row(page, text.translate(signs)).get_by_role("cell").nth(1)).to_have_text(json.dumps(text))
        unseen = "\\u202ereversed\\u2066_\\u200bunseen\\ufeff__"
        expect(row(page, unseen)).to_contain_text("\\u202ereversed\\u2066 \\u200bunseen\\ufeff \\u2028")
        expect_cells(page, "__proto__", NONE, '"own"', "·reported only")
        expect_cells(page, "constructor. prototype", NONE, "1", "·reported only")
        path = "".join(f"level{n}." for n in range(1, 10))
        expect_cells(page, f"{path} bottom", NONE, json.dumps(HOSTILE[0]), "·reported only")
        expect(page.locator("#facts")).to_contain_text("dtmi:<img src=x onerror=ran=1>;1")
        expect(page.locator("#log")).to_contain_text("events/<img src=x onerror=ran=1>")
        row(page, "long").get_by_text("… all 3,902 characters").click()
        expect(row(page, "long").locator(".whole")).to_have_text(json.dumps("<b>" * 1300))
    # The hub repeats in its refusal what was sent.
    send(page, "Patch desired", json.dumps({"a $" + HOSTILE[1]: 1}))
    expect(page.get_by_role("alert").filter(has_text=HOSTILE[1])).to_be_visible()
    choose_method(page, '<img src=x onerror="ran=1">')
    assert page.evaluate("typeof ran") == "undefined"
    assert page.locator("body :is(script, img, svg, iframe, b, [onerror], [onload], [srcdoc])").count() == 0
    shown = page.locator("body").inner_text()
    assert not any(sign in shown for sign in "\u202e\u2066\u200b\ufeff\u2028")


def choose_method(page: Page, name: str) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_role("button", name="Call").click()
    expect(page.locator("#method-error")).not_to_be_empty()


def test_a_thousand_keys_are_shown_and_kept_up_to_date(
    hub: LocalHub, device: Device, visit: Callable[..., Page]
) -> None:
    with online(hub.mqtt_port) as wire:
        wire.ask(REPORT, json.dumps({f"key{n}": n for n in range(1000)}).encode())
        page = visit()
        choose(page, "dev")
        expect(page.locator("#rows tr")).to_have_count(1003)
        wire.ask(REPORT, b'{"key999": "changed"}')
        expect_cells(page, "key999", NONE, '"changed"', "·reported only")
        page.get_by_label("Differing only").check()
        expect(page.get_by_role("rowheader")).to_have_text(["interval", "limits", "limits.max"])


@pytest.mark.parametrize("name", [ODD, f"{ODD}/{ODD}"])
def test_any_id_can_be_chosen_and_stays_chosen(hub: LocalHub, visit: Callable[..., Page], name: str) -> None:
    device = hub.create_device(name, DEVICE_KEY)
    page = visit()
    choose(page, name)
    with online(hub.mqtt_port, name) as wire:
        page.reload()
        expect(page.get_by_role("heading", level=2, name=name, exact=True)).to_be_visible()
        send(page, "Patch desired", '{"a": 1}')
        assert wire.message().payload == b'{"a":1,"$version":2}'
        expect(page.locator("#log")).to_contain_text('{"a":1,"$version":2}')
        page.get_by_role("button", name="Disconnect").click()
        wait_until(lambda: not device.connected, "it is disconnected")
    expect(page.get_by_text("Its connection was ended.")).to_be_visible()


# ---------------------------------------------------------------------- comparing and reading JSON

DESIRED_AND_REPORTED: list[tuple[Any, Any, list[list[Any]]]] = [
    ({"a": 1}, {"a": 1.0}, [["a", "same"]]),
    ({"a": 1}, {"a": "1"}, [["a", "differs"]]),
    ({"a": 1}, {"a": True}, [["a", "differs"]]),
    ({"a": 1}, {}, [["a", "unreported"]]),
    ({}, {"a": 1}, [["a", "unasked"]]),
    ({"a": {"b": 1, "c": 2}}, {"a": {"c": 2}}, [["a", "group"], ["a.b", "unreported"], ["a.c", "same"]]),
    ({"a": {"b": 1}}, {"a": 2}, [["a", "differs"]]),
    ({"a": {}}, {"a": {}}, [["a", "same"]]),
    ({"a": {}}, {"a": {"b": 1}}, [["a", "differs"]]),
    ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, [["a", "same"]]),
    ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, [["a", "differs"]]),
    ({"a": [1]}, {"a": {"0": 1}}, [["a", "differs"]]),
    ({"a": 1, "$version": 3}, {"a": 1, "$version": 9, "$metadata": {}}, [["a", "same"]]),
    ({"constructor": 1}, {}, [["constructor", "unreported"]]),
    # How a device answers one setting: its value is what counts.
    ({"a": 1}, {"a": {"value": 1, "ac": 200, "av": 2}}, [["a", "same"]]),
    ({"a": 2}, {"a": {"value": 1, "ac": 202, "av": 2}}, [["a", "differs"]]),
    ({"a": {"b": 1}}, {"a": {"value": {"b": 1}, "status": "Success"}}, [["a", "same"]]),
    (
        {"a": {"value": 1}},
        {"a": {"value": 1, "ac": 200}},
        [["a", "group"], ["a.value", "same"], ["a.ac", "unasked"]],
    ),
]


def test_which_rows_differ(visit: Callable[..., Page]) -> None:
    page = visit("page/json.js")
    compare = """async ([desired, reported]) => {
        const { compared } = await import("/page/json.js");
        return compared(desired, reported).map(({ path, state }) => [path.join("."), state]);
    }"""
    for desired, reported, rows in DESIRED_AND_REPORTED:
        assert page.evaluate(compare, [desired, reported]) == rows, (desired, reported)


NOT_JSON = {
    "": "Line 1, column 1: an object is expected here, in { and }.",
    "[1]": "Line 1, column 1: an object is expected here, in { and }.",
    '{"a": 1,\n "b" 2}': "Line 2, column 6: a colon is expected here.",
    '{"a": 1,\n}': "Line 2, column 1: a name in double quotes is expected here.",
    "{'a': 1}": "Line 1, column 2: a name in double quotes is expected here.",
    '{"a": 01}': "Line 1, column 8: a comma or } is expected here.",
    '{"a": [1 2]}': "Line 1, column 10: a comma or ] is expected here.",
    '{"a": NaN}': "Line 1, column 7: a value is expected here.",
    '{"a": "x\ny"}': "Line 1, column 7: a value is expected here.",
    '{"a": "\\x"}': "Line 1, column 7: a value is expected here.",
    '{"a": 1}\n{': "Line 2, column 1: nothing is expected behind the object.",
    '{"a": 1, "\\u0061": 2}': 'Line 1, column 10: the name "\\u0061" is here for the second time.',
    '{"a": ' + "[" * 2000: "Line 1, column 107: it nests too deeply.",
    '{"a": "' + "x" * 40_000: "Line 1, column 7: a value is expected here.",
}
ARE_JSON = [
    "{}",
    ' \n{ "a" : [ ] , "b" : { } }\t',
    '{"a": [-0.5e-3, 1E9, 0, "\\ud83d\\ude00\\n\\"", true, false, null]}',
    '{"__proto__": 1, "constructor": {"a": {"a": [{"a": 1}, {"a": 1}]}}}',
    '{"a": "' + "é" * 40_000 + '"}',
]


def test_where_a_text_is_no_json(visit: Callable[..., Page]) -> None:
    page = visit("page/json.js")
    verdict = (
        "text => import('/page/json.js').then(m => m.check(text)).then(() => '', error => error.message)"
    )
    for text, message in NOT_JSON.items():
        assert page.evaluate(verdict, text) == message, text
    for text in ARE_JSON:
        json.loads(text)
        assert page.evaluate(verdict, text) == "", text


# ---------------------------------------------------------------------- changing


@pytest.mark.parametrize("shape", ["code", "object", "text"])
def test_a_refused_change_shows_the_hubs_message_and_keeps_the_text(browser: Browser, shape: str) -> None:
    told = "Value of Property or Tag cannot be null. Error in Property/Tag a"
    message = {"code": f"ErrorCode:ArgumentInvalid;{told}"}.get(shape, f"{told} (errorCode 400004)")
    with LocalHub(None, None, http_port=0, service_error=shape) as hub, ExitStack() as stack:
        device = hub.create_device("dev", desired={"b": 1})
        context = browser.new_context()
        stack.callback(context.close)
        page = context.new_page()
        page.goto(hub.page_url or "")
        choose(page, "dev")
        text = '{"a": [null]}'
        send(page, "Patch desired", text)
        alert = page.get_by_role("alert").filter(has_text="The hub refused it")
        expect(alert).to_have_text(f"The hub refused it, 400: {message}")
        device.patch_desired({"b": 2})
        expect_cells(page, "b", "2", NONE, "○not reported")
        area = page.get_by_label("JSON object")
        expect(area).to_have_value(text)
        expect(area).to_be_focused()
        expect(area).to_have_attribute("aria-invalid", "true")
        send(page, "Patch desired", '{"a": [0]}')
        expect(alert).to_be_hidden()
        wait_until(lambda: device.desired == {"a": [0], "b": 2}, "it is written")


def test_a_text_that_is_no_json_is_not_sent(page: Page, device: Device) -> None:
    text = '{\n  "interval": 15,\n}'
    send(page, "Patch desired", text)
    alert = page.get_by_role("alert").filter(has_text="Line 3, column 1")
    expect(alert).to_contain_text("a name in double quotes is expected here. Nothing was sent.")
    area = page.get_by_label("JSON object")
    assert area.evaluate("area => [area.value, area.selectionStart]") == [text, len(text) - 1]
    assert device.desired_version == 1


def test_a_replacement_keeps_the_tags_and_does_not_overwrite_what_nobody_saw(
    page: Page, device: Device
) -> None:
    area = page.get_by_label("JSON object")
    page.get_by_role("radio", name="Replace desired").check()
    expect(area).to_have_value(json.dumps({"interval": 30, "limits": {"max": 26}}, indent=2))
    # Nobody has typed: it follows.
    device.patch_desired({"interval": 31})
    expect(area).to_have_value(json.dumps({"interval": 31, "limits": {"max": 26}}, indent=2))
    area.fill('{"mine": 20.0}')
    device.patch_desired({"theirs": 2})
    notice = (
        "Meanwhile the twin was changed by somebody else: desired has version 3, you began with version 2."
    )
    expect(page.get_by_text(notice)).to_be_visible()
    expect(area).to_have_value('{"mine": 20.0}')
    page.get_by_role("button", name="Send").click()
    alert = page.get_by_role("alert").filter(has_text="changed by somebody else")
    expect(alert).to_contain_text("The hub says: ErrorCode:PreconditionFailed;Precondition failed: ")
    expect(area).to_have_value('{"mine": 20.0}')
    assert device.desired == {"interval": 31, "limits": {"max": 26}, "theirs": 2}
    page.get_by_role("button", name="Replace all the same").click()
    expect(page.get_by_text("Done. Desired has version 4")).to_be_visible()
    assert (device.desired, device.twin["tags"]) == ({"mine": 20.0}, {"site": "A"})
    # As it was typed.
    assert isinstance(device.desired["mine"], float)
    send(page, "Replace desired", '{"mine": 21}')
    expect(page.get_by_text("Done. Desired has version 5")).to_be_visible()


def test_tags_are_patched_and_shown(page: Page, device: Device) -> None:
    send(page, "Patch tags", '{"floor": 3, "site": null}')
    expect(page.get_by_role("region", name="Tags").last).to_have_text(json.dumps({"floor": 3}, indent=2))
    device.patch_tags({"floor": 4})
    expect(page.get_by_role("region", name="Tags").last).to_contain_text("4")
    assert device.desired_version == 1


def test_what_is_typed_is_kept_for_each_device_and_kind_of_change(
    hub: LocalHub, page: Page, device: Device
) -> None:
    hub.create_device("other", desired={"n": 1})
    area, radio = page.get_by_label("JSON object"), page.get_by_role("radio")
    area.fill("half a pat")
    page.get_by_role("radio", name="Replace desired").check()
    area.fill("half a repl")
    choose(page, "other")
    expect(area).to_have_value(json.dumps({"n": 1}, indent=2))
    area.fill("of the other")
    device.patch_desired({"interval": 1})
    choose(page, "dev")
    expect_cells(page, "interval", "1", NONE, "○not reported")
    expect(area).to_have_value("half a repl")
    radio.first.check()
    expect(area).to_have_value("half a pat")
    page.get_by_role("radio", name="Replace desired").check()
    page.get_by_role("button", name="Start from the current document").click()
    expect(area).to_have_value(json.dumps({"interval": 1, "limits": {"max": 26}}, indent=2))


# ---------------------------------------------------------------------- the wire


def test_what_goes_over_the_wire_is_shown_once_and_in_order(
    hub: LocalHub, device: Device, visit: Callable[..., Page]
) -> None:
    with online(hub.mqtt_port) as wire:
        page = visit()
        choose(page, "dev")
        log = page.locator("#log > li")
        expect(log).to_have_count(4)
        wire.ask(REPORT, b'{"a": 1}')
        expect(log).to_have_count(6)
        directions = page.locator("#log .way").all_inner_texts()
        assert [" ".join(text.split()) for text in directions] == [
            f"{'→' if inward else '←'} {'device to hub' if inward else 'hub to device'}"
            for inward in (True, False, True, False, True, False)
        ]
        assert page.locator("#log strong").all_inner_texts() == [
            *("CONNECT", "CONNACK", "SUBSCRIBE", "SUBACK", "PUBLISH", "PUBLISH")
        ]
        expect(log.nth(4)).to_contain_text(REPORT)
        expect(log.nth(4)).to_contain_text('{"a": 1}')
        page.get_by_role("button", name="Pause").click()
        for _ in range(3):
            wire.ask(REPORT, b"{}")
        expect(page.get_by_text("6 packets; 6 more since the pause")).to_be_visible()
        page.get_by_role("button", name="Pause").click()
        expect(log).to_have_count(12)
        page.get_by_role("button", name="Clear", exact=True).click()
        expect(log).to_have_count(0)
        for _ in range(300):
            wire.ask(REPORT, b"{}")
        expect(page.get_by_text("the last 500 packets")).to_be_visible()
        expect(log).to_have_count(500)
        # The newest is in sight, until somebody reads further up.
        frame = page.get_by_role("region", name="Packets")
        gap = "frame => frame.scrollHeight - frame.scrollTop - frame.clientHeight"
        assert frame.evaluate(gap) < 2
        frame.evaluate("frame => { frame.scrollTop = 0; }")
        wire.ask(REPORT, b'{"last": 1}')
        expect(log.last).to_contain_text("/204/")
        assert frame.evaluate(gap) > 1000
        page.reload()
        expect(log).to_have_count(500)
        expect(log.nth(498)).to_contain_text('{"last": 1}')


def test_a_packet_that_comes_while_the_log_begins_is_shown_once(
    hub: LocalHub, device: Device, visit: Callable[..., Page]
) -> None:
    with online(hub.mqtt_port) as wire:
        page = visit()

        def meanwhile(route: Route) -> None:
            wire.ask(REPORT, b'{"n": 1}')
            route.continue_()

        page.route("**/local/packets?*", meanwhile)
        choose(page, "dev")
        # Alike, and right behind what was shown as history.
        wire.ask(REPORT, b'{"n": 1}')
        wire.ask(REPORT, b'{"n": 2}')
        expect(page.locator("#log")).to_contain_text('{"n": 2}')
        expect(page.locator("#log > li").last).to_contain_text("/204/")
        expect(page.locator("#log > li")).to_have_count(10)
        assert page.locator("#log").get_by_text('{"n": 1}').count() == 2


# ---------------------------------------------------------------------- faults


def switch(page: Page, kind: str) -> Locator:
    return page.get_by_role("switch", name=kind, exact=True)


def test_each_fault_has_a_switch(hub: LocalHub, page: Page) -> None:
    expect(page.get_by_role("switch")).to_have_count(len(KINDS))
    for kind in KINDS:
        expect(switch(page, kind)).to_have_accessible_description(KINDS[kind].text)
        switch(page, kind).click()
        expect(switch(page, kind)).to_have_attribute("aria-checked", "true")
        (fault,) = hub.faults
        assert (fault.kind, fault.device, fault.parameters) == (kind, None, KINDS[kind].parameters)
        switch(page, kind).click()
        expect(switch(page, kind)).to_have_attribute("aria-checked", "false")
        assert hub.faults == []


def test_a_fault_is_set_for_one_device_and_a_few_times(hub: LocalHub, device: Device, page: Page) -> None:
    page.get_by_label("Device", exact=True).select_option("dev")
    page.get_by_label("Times, at most").fill("2")
    group = page.get_by_role("group", name="Parameters of answer_status")
    group.get_by_label("operation").select_option("report")
    group.get_by_label("status").fill("503")
    group.get_by_label("error_code").fill("503001")
    group.get_by_label("body").fill("empty")
    switch(page, "answer_status").click()
    (fault,) = wait_until(lambda: hub.faults, "it is set")
    assert (fault.device, fault.operation, fault.times, fault.seconds) == ("dev", "report", 2, None)
    assert fault.parameters == {"status": 503, "error_code": 503001, "body": "empty"}
    active = page.get_by_role("region", name="Active faults").get_by_role("listitem")
    expect(active).to_contain_text(
        "dev, report, status 503, error_code 503001, body empty, happened 0 of 2 times"
    )
    with online(hub.mqtt_port) as wire:
        assert "/503/" in wire.ask(REPORT, b"{}").topic
        expect(active).to_contain_text("happened 1 of 2 times")
        assert "/503/" in wire.ask(REPORT, b"{}").topic
    expect(active).to_have_count(0)
    expect(switch(page, "answer_status")).to_have_attribute("aria-checked", "false")


def test_an_answer_that_an_event_overtook_is_not_shown(hub: LocalHub, device: Device, page: Page) -> None:
    active = page.get_by_role("region", name="Active faults").get_by_role("listitem")
    with online(hub.mqtt_port) as wire:

        def late(route: Route) -> None:
            if route.request.method != "GET":
                route.continue_()
                return
            answer = route.fetch()
            wire.ask(REPORT, b"{}")
            expect(active).to_contain_text("happened 1 time")
            route.fulfill(response=answer)

        page.route("**/local/faults?*", late)
        with page.expect_event("requestfinished", lambda request: request.method == "GET"):
            switch(page, "quota").click()
            wait_until(lambda: hub.faults, "it is set")
        hub.create_device("afterwards")
        expect(page.locator("#device-list a")).to_have_count(2)
        expect(active).to_contain_text("happened 1 time")


def test_a_fault_that_the_hub_refuses_says_why(hub: LocalHub, page: Page) -> None:
    page.get_by_label("Device", exact=True).select_option("dev")
    switch(page, "hanging_tls").click()
    expect(page.get_by_text("hanging_tls comes before the hub knows which device it is")).to_be_visible()
    expect(switch(page, "hanging_tls")).to_have_attribute("aria-checked", "false")
    assert hub.faults == []


def test_faults_that_others_set_or_time_ends_are_followed(hub: LocalHub, page: Page) -> None:
    hub.fault("quota")
    hub.fault("quota", device="dev")
    hub.fault("half_open", device="dev")
    active = page.get_by_role("region", name="Active faults")
    expect(active.get_by_role("listitem")).to_have_count(3)
    active.get_by_role("button", name="Clear half_open, number 3").click()
    expect(active.get_by_role("listitem")).to_have_count(2)
    # What had the focus is gone; the keyboard is not lost.
    expect(page.get_by_role("heading", name="Faults", exact=True)).to_be_focused()
    switch(page, "quota").click()
    expect(active).to_be_hidden()
    hub.fault("quota")
    active.get_by_role("button", name="Clear all").click()
    expect(active).to_be_hidden()
    assert hub.faults == []
    # No event tells of its end.
    hub.fault("quota", seconds=0.5)
    expect(switch(page, "quota")).to_have_attribute("aria-checked", "true")
    expect(switch(page, "quota")).to_have_attribute("aria-checked", "false")


def test_sessions_are_forgotten(hub: LocalHub, device: Device, page: Page) -> None:
    with online(hub.mqtt_port) as wire:
        page.get_by_role("button", name="Forget all sessions").click()
        expect(page.get_by_text("All sessions are forgotten.")).to_be_visible()
        device.patch_desired({"a": 1})
        wire.nothing_waits()


# ---------------------------------------------------------------------- identities and methods


def test_an_identity_is_created_and_deleted(hub: LocalHub, visit: Callable[..., Page]) -> None:
    page = visit()
    page.get_by_text("New device").click()
    page.get_by_label("Id: device, or device/module").fill("not an id")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("alert").filter(has_text="is not an id")).to_be_visible()
    page.get_by_label("Id: device, or device/module").fill("new#1")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("heading", level=2, name="new#1")).to_be_visible()
    assert [one.id for one in hub.devices] == ["new#1"]
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Keep").click()
    assert [one.id for one in hub.devices] == ["new#1"]
    page.get_by_role("button", name="Delete …").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_text("There is no device yet.")).to_be_visible()
    expect(page.get_by_role("heading", name="No device chosen")).to_be_visible()
    assert hub.devices == []


def test_a_device_that_others_delete_is_gone_here_too(hub: LocalHub, device: Device, page: Page) -> None:
    device.delete()
    expect(page.get_by_text("Device dev not registered")).to_be_visible()
    hub.create_device("dev", desired={"again": 1})
    expect_cells(page, "again", "1", NONE, "○not reported")


def test_a_connection_string_can_be_copied(hub: LocalHub, device: Device, visit: Callable[..., Page]) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    choose(page, "dev")
    page.get_by_role("button", name="Copy connection string").click()
    expect(page.get_by_text("Copied.")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == device.plaintext_connection_string.replace(f":{hub.mqtt_port}", "")
    assert DEVICE_KEY not in page.content()


def test_a_direct_method_is_called(hub: LocalHub, device: Device, page: Page) -> None:
    choose_method(page, "reboot")
    expect(page.locator("#method-error")).to_contain_text("DeviceNotOnline")
    with online(hub.mqtt_port, "dev", DEVICE_KEY, "$iothub/methods/POST/#") as wire:
        page.get_by_label("Payload, JSON; empty for none").fill('{"delay": 5}')
        page.get_by_role("button", name="Call").click()
        asked = wire.message()
        assert json.loads(asked.payload) == {"delay": 5}
        number = asked.topic.rpartition("=")[2]
        wire.send(publish(f"$iothub/methods/res/200/?$rid={number}", b'{"done": "<b>"}'))
        expect(page.locator("#method-answer")).to_have_text('Status 200: {"done":"<b>"}')


# ---------------------------------------------------------------------- the list


def test_two_thousand_devices_stay_usable(hub: LocalHub, visit: Callable[..., Page]) -> None:
    for number in range(2000):
        hub.create_device(f"sensor-{number}", DEVICE_KEY)
    began = time.monotonic()
    page = visit()
    entries = page.locator("#device-list a")
    expect(page.get_by_text("2,000 in all, 0 connected")).to_be_visible()
    expect(entries).to_have_count(200)
    assert time.monotonic() - began < PATIENCE / 2
    # By number, not by sign.
    assert entries.locator(".id").all_inner_texts()[:3] == ["sensor-0", "sensor-1", "sensor-2"]
    page.get_by_role("button", name="Show 200 more of 1800").click()
    expect(entries).to_have_count(400)
    expect(entries.nth(200)).to_be_focused()
    page.get_by_label("Filter by id").fill("R-1999")
    expect(entries).to_have_count(1)
    with online(hub.mqtt_port, "sensor-1999"):
        expect(entries).to_have_accessible_name("sensor-1999 connected")
        page.get_by_label("Filter by id").fill("")
        page.get_by_label("Connected only").check()
        expect(entries).to_have_count(1)
    expect(page.get_by_text("No id fits.")).to_be_visible()
    page.get_by_label("Connected only").uncheck()
    choose(page, "sensor-7")
    hub.device("sensor-3").disable()
    choose(page, "sensor-3")
    expect(page.get_by_role("link", name="sensor-3 disabled")).to_have_attribute("aria-current", "true")


def test_every_identity_is_told_in_one_request(hub: LocalHub) -> None:
    hub.create_device("a")
    hub.create_device("a/m", DEVICE_KEY)
    hub.create_device("b").disable()
    with (
        online(hub.mqtt_port, "a/m"),
        closing(http.client.HTTPConnection("localhost", hub.http_port or 0, timeout=PATIENCE)) as asked,
    ):
        for policy, status in (("service", 200), ("device", 401)):
            asked.request("GET", "/local/devices", headers={"Authorization": token(policy=policy)})
            answer = asked.getresponse()
            body = json.loads(answer.read())
            assert answer.status == status
            if status == 200:
                assert body == [
                    {"id": "a", "connected": False, "enabled": True},
                    {"id": "a/m", "connected": True, "enabled": True},
                    {"id": "b", "connected": False, "enabled": False},
                ]


# ---------------------------------------------------------------------- signing in


def sign_in(page: Page, connection_string: str) -> None:
    page.get_by_label("Service connection string").fill(connection_string)
    page.get_by_role("button", name="Sign in").click()


def test_the_links_token_leaves_the_address(
    hub: LocalHub, device: Device, visit: Callable[..., Page]
) -> None:
    page = visit()
    expect(page.get_by_text("1 in all, 0 connected")).to_be_visible()
    assert page.url == f"http://localhost:{hub.http_port}/"
    choose(page, "dev")
    assert page.url == f"http://localhost:{hub.http_port}/#device=dev"
    assert page.evaluate("Object.keys(sessionStorage)") == ["token"]
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.get_by_role("heading", level=2, name="dev", exact=True)).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    assert page.evaluate("sessionStorage.length") == 0
    expect(page.get_by_label("Service connection string")).to_be_focused()


def test_signing_in_with_a_connection_string(hub: LocalHub, visit: Callable[..., Page]) -> None:
    hub.create_device("dev")
    page = visit("")
    alert = page.get_by_role("alert")
    for text, message in (
        ("HostName=localhost", "A service connection string has a SharedAccessKeyName; this one has none."),
        ("HostName=x;SharedAccessKeyName=service;SharedAccessKey=%", "The SharedAccessKey is not base64."),
        (
            f"HostName=localhost;SharedAccessKeyName=service;SharedAccessKey={DEVICE_KEY}A===",
            "The SharedAccessKey is not base64.",
        ),
        (
            "HostName=localhost;SharedAccessKeyName=service;SharedAccessKey=d3Jvbmc=",
            "ErrorCode:IotHubUnauthorizedAccess;Unauthorized: the token's signature is wrong",
        ),
        (
            f"HostName=localhost;SharedAccessKeyName=registryRead;SharedAccessKey={KEY}",
            "ErrorCode:IotHubUnauthorizedAccess;Unauthorized: the policy does not grant ServiceConnect",
        ),
    ):
        sign_in(page, text)
        expect(alert).to_have_text([message])
    sign_in(page, hub.service_connection_string)
    expect(page.get_by_text("1 in all, 0 connected")).to_be_visible()
    assert KEY not in page.content()
    assert page.get_by_label("Service connection string", exact=True).input_value() == ""
    assert page.evaluate("Object.keys(sessionStorage)") == ["token"]
    made = page.evaluate("sessionStorage.token")
    assert KEY not in made
    # The host's name without its port.
    assert made.startswith("SharedAccessSignature sr=localhost&sig=")


def test_a_policy_without_a_right_is_told_so_and_stays(hub: LocalHub, visit: Callable[..., Page]) -> None:
    page = visit("#" + token(policy="service").replace("%", "%25").replace(" ", "%20"))
    page.get_by_text("New device").click()
    page.get_by_label("Id: device, or device/module").fill("new")
    page.get_by_role("button", name="Create").click()
    expect(
        page.get_by_role("alert").filter(has_text="the policy does not grant RegistryWrite")
    ).to_be_visible()
    expect(page.get_by_text("There is no device yet.")).to_be_visible()


@pytest.mark.parametrize("address", ["#SharedAccessSignature%20sr%3Dx", "#%E0%A4%A", "#device=dev"])
def test_without_a_good_token_the_page_asks(visit: Callable[..., Page], address: str) -> None:
    page = visit(address)
    expect(page.get_by_label("Service connection string")).to_be_focused()
    expect(page.get_by_role("heading", name="Devices")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_token_that_expires_meanwhile_leads_to_the_form(hub: LocalHub, device: Device, page: Page) -> None:
    page.evaluate("token => sessionStorage.setItem('token', token)", token(expiry=1))
    device.patch_desired({"interval": 1})
    expect(page.get_by_role("alert").filter(has_text="the token has expired")).to_be_visible()
    sign_in(page, hub.service_connection_string)
    expect_cells(page, "interval", "1", NONE, "○not reported")


def test_a_refusal_of_an_older_token_is_nobodys_any_more(page: Page) -> None:
    held: list[Any] = []
    page.route("**/local/late?*", lambda route: held.append(route))
    with page.expect_request("**/local/late?*"):
        page.evaluate(
            "() => { window.told = import('/page/hub.js').then(m => m.ask('GET', '/local/late'))"
            ".catch(error => error.message) }"
        )
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_function("() => !sessionStorage.getItem('token')")
    held[0].fulfill(status=401, body='{"Message": "too late"}')
    assert page.evaluate("window.told") == "too late"
    expect(page.locator("#sign-in-error")).to_have_text("")


# ---------------------------------------------------------------------- when the hub goes away


def test_the_page_comes_back_after_the_hub(hub: LocalHub, device: Device, page: Page) -> None:
    status = page.get_by_role("banner").get_by_role("status")
    expect(status).to_have_text("Connected to the hub")
    page.get_by_label("JSON object").fill('{"interval": 5}')
    hub.close()
    expect(status).to_have_text("No connection to the hub; trying again …")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert").filter(has_text="The hub did not answer.")).to_be_visible()
    device.patch_desired({"interval": 7})
    hub.create_device("new")
    hub.fault("quota")
    hub.start()
    page.get_by_role("button", name="Try now").click()
    expect(status).to_have_text("Connected to the hub")
    # What happened meanwhile is there, what was typed, too, and it goes on.
    expect_cells(page, "interval", "7", NONE, "○not reported")
    expect(page.locator("#device-list a")).to_have_count(2)
    expect(switch(page, "quota")).to_have_attribute("aria-checked", "true")
    expect(page.get_by_label("JSON object")).to_have_value('{"interval": 5}')
    with online(hub.mqtt_port) as wire:
        expect(page.locator("#log > li")).to_have_count(4)
        page.get_by_role("button", name="Send").click()
        assert json.loads(wire.message().payload)["interval"] == 5
    expect_cells(page, "interval", "5", NONE, "○not reported")


def test_who_missed_events_asks_anew(hub: LocalHub, visit: Callable[..., Page]) -> None:
    page = visit("")
    asked: list[str] = []
    lost = 'event: lost\ndata: {"count": 3}\n\n'

    def stream(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=f": listening\n\n{lost}{lost}")

    page.route("**/local/events?*", stream)
    page.on("request", lambda request: asked.append(request.url.partition("?")[0].rpartition("/")[2]))
    sign_in(page, hub.service_connection_string)
    expect(page.get_by_role("banner").get_by_role("status")).to_contain_text("trying again")
    of_state = [name for name in asked if name in ("events", "devices", "faults")]
    assert of_state[:7] == ["events", *("devices", "faults") * 3]


def test_a_tab_that_nobody_sees_holds_no_stream(hub: LocalHub, device: Device, page: Page) -> None:
    expect(page.get_by_role("banner").get_by_role("status")).to_have_text("Connected to the hub")
    see = """hidden => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    ended: list[str] = []
    begun: list[str] = []
    page.on("requestfailed", lambda request: ended.append(request.url.partition("?")[0][-7:]))
    page.on("request", lambda request: begun.append(request.url))
    page.evaluate(see, True)
    deadline = time.monotonic() + PATIENCE
    while len(ended) < 2 and time.monotonic() < deadline:
        page.evaluate("0")  # lets the driver tell
    assert (ended, begun) == (["/events", "/events"], [])
    device.patch_desired({"interval": 8})
    page.evaluate(see, False)
    expect_cells(page, "interval", "8", NONE, "○not reported")


# ---------------------------------------------------------------------- for everybody


def focus(page: Page, name: str, most: int = 60) -> None:
    """Press Tab until what has the focus goes by this name."""
    script = """() => {
        const element = document.activeElement;
        const label = element.labels?.[0]?.textContent ?? element.getAttribute("aria-label");
        const labelled = document.getElementById(element.getAttribute("aria-labelledby"))?.textContent;
        return (labelled ?? label ?? element.textContent).trim();
    }"""
    seen = []
    for _ in range(most):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(script))
        if seen[-1].startswith(name):
            # Whoever sees it sees where the focus is.
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"no {name} in {seen}")


def test_the_keyboard_is_enough(hub: LocalHub, device: Device, visit: Callable[..., Page]) -> None:
    hub.create_device("other")
    page = visit()
    expect(page.get_by_text("2 in all, 0 connected")).to_be_visible()
    focus(page, "Filter by id")
    page.keyboard.type("de")
    expect(page.locator("#device-list a")).to_have_count(1)
    focus(page, "dev")
    hub.create_device("a-dev")
    expect(page.locator("#device-list a")).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=2, name="dev", exact=True)).to_be_focused()
    focus(page, "Patch desired")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    focus(page, "JSON object")
    page.keyboard.press("Control+A")
    page.keyboard.type('{"interval": 9}')
    page.keyboard.press("Control+Enter")
    expect_cells(page, "interval", "9", NONE, "○not reported")
    expect(page.get_by_label("JSON object")).to_be_focused()
    focus(page, "quota")
    page.keyboard.press("Space")
    expect(switch(page, "quota")).to_have_attribute("aria-checked", "true")
    expect(switch(page, "quota")).to_be_focused()
    page.keyboard.press("Space")
    expect(switch(page, "quota")).to_have_attribute("aria-checked", "false")


# Roles that have to say what they are.
NAMED = {
    *("button", "link", "textbox", "searchbox", "checkbox", "radio", "switch", "combobox", "spinbutton"),
    *("table", "region", "navigation", "dialog", "DisclosureTriangle"),
}


def accessibility(page: Page) -> list[tuple[str, str, dict[str, Any]]]:
    """Role, name and properties of what a screen reader finds, in its order."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    return [
        (
            node["role"]["value"],
            node.get("name", {}).get("value", "").strip(),
            {one["name"]: one["value"].get("value") for one in node.get("properties", [])},
        )
        for node in nodes
        if not node["ignored"]
    ]


def check_accessibility(page: Page) -> None:
    nodes = accessibility(page)
    nameless = [(role, properties) for role, name, properties in nodes if role in NAMED and not name]
    assert nameless == []
    levels = [properties["level"] for role, _, properties in nodes if role == "heading"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    roles = [role for role, _, _ in nodes]
    assert (roles.count("banner"), roles.count("main")) == (1, 1)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


def test_everything_has_a_name_for_a_screen_reader(
    hub: LocalHub, device: Device, visit: Callable[..., Page]
) -> None:
    page = visit("")
    expect(page.get_by_label("Service connection string")).to_be_focused()
    check_accessibility(page)
    page = visit()
    expect(page.get_by_role("switch")).to_have_count(len(KINDS))
    check_accessibility(page)
    with online(hub.mqtt_port):
        for kind in KINDS:
            hub.fault(kind)
        page.get_by_text("New device").click()
        choose(page, "dev")
        expect(page.locator("#log > li")).not_to_have_count(0)
        expect(page.get_by_role("region", name="Active faults").get_by_role("listitem")).to_have_count(
            len(KINDS)
        )
        check_accessibility(page)
        # The same table however it is laid out.
        tree = [
            (role, name) for role, name, _ in accessibility(page) if role in ("rowheader", "columnheader")
        ]
        page.set_viewport_size(PHONE)
        narrow = [
            (role, name) for role, name, _ in accessibility(page) if role in ("rowheader", "columnheader")
        ]
        assert [role for role, _ in tree] == ["columnheader"] * 4 + ["rowheader"] * 3
        assert narrow == tree
        page.get_by_role("button", name="Delete …").click()
        expect(page.get_by_role("dialog", name="Delete dev?")).to_be_visible()


def test_changes_are_said_in_words_and_not_too_often(hub: LocalHub, device: Device, page: Page) -> None:
    page.evaluate("""() => {
        window.said = [];
        const region = document.getElementById("announcements");
        new MutationObserver(() => said.push(region.textContent)).observe(region, { childList: true });
    }""")
    device.patch_desired({"interval": 15, "limits": None})
    region = page.locator("#announcements")
    expect(region).to_have_text("desired interval is 15. desired limits.max is gone.")
    assert region.get_attribute("aria-live") == "polite"
    with online(hub.mqtt_port) as wire:
        expect(region).to_have_text("dev is connected.")
        wire.ask(REPORT, json.dumps({f"key{number}": number for number in range(9)}).encode())
        three = ". ".join(f"reported key{number} is {number}" for number in range(3))
        expect(region).to_have_text(f"{three}. And 6 more changes.")
        said = page.evaluate("said.length")
        for number in range(100):
            wire.ask(REPORT, json.dumps({"battery": number}).encode())
        expect_cells(page, "battery", NONE, "99", "·reported only")
        assert page.evaluate("said.length") - said < 5


def test_a_phone_scrolls_only_down(hub: LocalHub, device: Device, visit: Callable[..., Page]) -> None:
    long = "W" * 128
    hub.create_device(f"{long}/{long}", DEVICE_KEY)
    device.patch_desired({"W" * 1000: "W" * 4000, "a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": long}}}}}}}})
    device.patch_tags({long: long})
    hub.fault("answer_status", device=f"{long}/{long}", body=long * 3)
    with online(hub.mqtt_port) as wire:
        wire.ask(REPORT, json.dumps({long: long}).encode())
        wire.send(publish(f"devices/dev/messages/events/{long}={long}", long.encode()))
        page = visit(viewport=PHONE, is_mobile=True, has_touch=True)
        width = "() => [document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]"
        expect(page.get_by_role("switch")).to_have_count(len(KINDS))
        page.get_by_text("New device").click()
        assert page.evaluate(width) == [360] * 3
        choose(page, "dev")
        expect(page.locator("#log")).to_contain_text(long)
        for part in ("#log-frame", "#tags", "#device-list"):
            assert page.locator(part).evaluate("part => part.scrollWidth - part.clientWidth") == 0
        send(page, "Patch desired", json.dumps({long: [None]}))
        expect(page.get_by_role("alert").filter(has_text=long)).to_be_visible()
        for details in page.locator("#rows details summary").all():
            details.click()
        assert page.evaluate(width) == [360] * 3
        choose(page, f"{long}/{long}")
        assert page.evaluate(width) == [360] * 3
        # Beside one another still, and with room for their words.
        choose(page, "dev")
        expect(page.locator("#log")).to_contain_text(long)
        boxes = [cell.bounding_box() for cell in row(page, long).get_by_role("cell").all()[:2]]
        assert all(box and box["width"] > 120 for box in boxes)


# For every text that is seen: the contrast of its colour and of what is behind it (WCAG 2, 1.4.3).
CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const behind = (element) => {
        for (let one = element; one; one = one.parentElement) {
            const colour = rgba(getComputedStyle(one).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const luminance = (colour) => {
        const [r, g, b] = colour.map((part) => part / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
        if (element.closest(":disabled")) continue;
        const [one, other] = [rgba(getComputedStyle(element).color), behind(element)].map(luminance);
        const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
        found.push([contrast, walker.currentNode.data.trim().slice(0, 30)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(
    hub: LocalHub, device: Device, visit: Callable[..., Page], scheme: str
) -> None:
    hub.fault("quota", device="another")
    with online(hub.mqtt_port) as wire:
        wire.ask(REPORT, b'{"interval": {"value": 31, "ac": 200}, "extra": 1}')
        page = visit(color_scheme=scheme, reduced_motion="reduce")
        choose(page, "dev")
        expect(page.locator("#log > li")).not_to_have_count(0)
        expect_cells(page, "interval", "30", "31ac 200", "≠differs")
        send(page, "Patch desired", "{")
        expect(page.get_by_text("Nothing was sent.")).to_be_visible()
        wire.ask(REPORT, b'{"extra": 2}')
        expect_cells(page, "extra", NONE, "2", "·reported only")
        # Who wants no motion gets none.
        expect(page.locator(".fresh")).to_have_count(1)
        assert page.locator(".fresh").evaluate("cell => getComputedStyle(cell).animationName") == "none"
        found = page.evaluate(CONTRASTS)
    assert len(found) > 150
    assert [one for one in found if one[0] < 4.5] == []
