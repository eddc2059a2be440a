"""The reference system's pages in Debian's Chromium, against real processes."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Page,
    Route,
    WebSocket,
    WebSocketRoute,
    expect,
)
from playwright.sync_api import Request as BrowserRequest

from celeriac.status import Event, Status
from celeriac.web import STATIC
from system import System

MARKUP = '<img src=x onerror="window.hacked = true">'
FORMS = ("/users/form/", "/users/form_ws/")
PAGES = ("/", *FORMS, "/task/no-such-task/")
TASK_PATH = re.compile(r"/task/([0-9a-f-]{36})/")


@pytest.fixture
def client(system: System) -> Celery:
    """To send tasks and revoke them from outside, as an operator does."""
    return system.producer


@pytest.fixture(autouse=True)
def _leaves_no_loop() -> None:
    """Instead of the check for all tests: Playwright's own loop lasts as long as the browser."""


@pytest.fixture
def context(browser: Browser, system: System) -> Iterator[BrowserContext]:
    context = browser.new_context(base_url=system.base)
    context.set_default_timeout(15_000)
    yield context
    context.close()


@contextmanager
def watched(page: Page) -> Iterator[list[str]]:
    """Collect what goes wrong inside `page`; none of it may, except for a network that is away."""
    faults: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    def asked(dialog: Dialog) -> None:
        faults.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", heard)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", asked)
    yield faults
    network = ("Failed to load resource", "WebSocket connection to")
    assert [fault for fault in faults if not fault.startswith(network)] == []


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    page = context.new_page()
    with watched(page):
        yield page


def address() -> str:
    return f"{uuid4().hex}@example.com"


def submit(page: Page, path: str, email: str | None = None) -> str:
    """Open a form and send it; the task's id."""
    page.goto(path)
    page.get_by_label("Email").fill(email or address())
    page.get_by_label("Username").fill("someone")
    page.get_by_role("button", name="Subscribe").click()
    expect(page.locator("#task-link")).to_have_attribute("href", TASK_PATH)
    found = TASK_PATH.fullmatch(page.locator("#task-link").get_attribute("href") or "")
    assert found
    return found[1]


def expect_end(page: Page, state: str, message: str | re.Pattern[str]) -> None:
    expect(page.locator("#state")).to_have_attribute("data-state", state, timeout=15_000)
    expect(page.locator("#state")).to_be_visible()
    expect(page.locator("#message")).to_have_text(message)


def expect_no_markup(page: Page) -> None:
    expect(page.locator("img")).to_have_count(0)
    assert page.evaluate("window.hacked") is None


def history(page: Page) -> list[str]:
    return page.locator("#history li span").all_text_contents()


@pytest.mark.parametrize("path", FORMS)
def test_p42_p45_a_form_reaches_success(page: Page, system: System, path: str) -> None:
    system.behave(delay=0.6)
    button = page.get_by_role("button", name="Subscribe")
    task_id = submit(page, path)
    expect(page.locator("#message")).to_have_text("Processing…")
    expect(button).to_be_disabled()
    expect_end(page, "SUCCESS", re.compile("^Done"))
    expect(button).to_be_enabled()
    page.get_by_role("link", name=task_id).click()
    expect_end(page, "SUCCESS", re.compile(r"^Done: \w+@example\.com is on the list$"))


@pytest.mark.parametrize("path", FORMS)
def test_a_form_shows_why_its_task_failed_and_can_be_sent_again(
    page: Page, system: System, path: str
) -> None:
    system.behave(fail_next=1)
    submit(page, path)
    expect_end(page, "FAILURE", "Failed: TemporaryError: the mailing list answered 503")
    page.get_by_role("button", name="Subscribe").click()
    expect_end(page, "SUCCESS", re.compile("^Done"))


@pytest.mark.parametrize("path", FORMS)
def test_a_form_ends_when_its_task_is_revoked(
    page: Page, system: System, client: Celery, path: str
) -> None:
    system.behave(delay=8)  # which the mailing list sits out, even when it is to end
    task_id = submit(page, path)
    expect(page.locator("#state")).to_have_attribute("data-state", "STARTED")
    client.control.revoke(task_id, terminate=True)
    expect_end(page, "REVOKED", re.compile("^Stopped: TaskRevokedError"))
    expect(page.get_by_role("button", name="Subscribe")).to_be_enabled()


def test_the_websocket_form_posts_once_and_never_polls(page: Page, system: System) -> None:
    system.behave(delay=0.6)
    requests: list[BrowserRequest] = []
    sockets: list[WebSocket] = []

    def requested(request: BrowserRequest) -> None:
        requests.append(request)

    def opened(socket: WebSocket) -> None:
        sockets.append(socket)

    page.on("request", requested)
    page.on("websocket", opened)
    task_id = submit(page, "/users/form_ws/")
    [socket] = sockets
    if not socket.is_closed():
        socket.wait_for_event("close")
    expect_end(page, "SUCCESS", re.compile("^Done: .* is on the list$"))
    assert [request.url for request in requests if request.method == "POST"] == [
        f"{system.base}/users/form/"
    ]
    assert not [request for request in requests if "task_status" in request.url]
    assert [socket.url for socket in sockets] == [
        f"{system.base.replace('http', 'ws')}/ws/task_status/{task_id}"
    ]
    assert history(page)[-2:] == ["STARTED", "SUCCESS"]
    expect(page.locator("#history time")).to_have_count(len(history(page)))


def test_a_task_page_follows_any_task_and_shows_its_result(page: Page, system: System) -> None:
    page.goto("/")
    task_id = system.send("project.users.tasks.divide", 1, 2, countdown=2)
    page.get_by_label("Task id").fill(f" {task_id} ")
    page.get_by_role("button", name="Show the task").click()
    expect(page.locator("#state")).to_have_attribute("data-state", "PENDING")
    expect_end(page, "SUCCESS", "Done")
    expect(page.locator("#result")).to_have_text("0.5")


def test_markup_in_an_error_or_a_result_is_shown_as_text(page: Page, system: System) -> None:
    failed = system.send("project.users.tasks.divide", kwargs={MARKUP: 1})
    page.goto(f"/task/{failed}/")
    expect_end(page, "FAILURE", re.compile(re.escape(MARKUP)))
    expect_no_markup(page)
    done = system.send("project.users.tasks.subscribe_to_list", MARKUP)
    page.goto(f"/task/{done}/")
    expect_end(page, "SUCCESS", f"Done: {MARKUP} is on the list")
    expect_no_markup(page)
    page.route(
        "**/users/task_status/*", lambda route: route.fulfill(json={"detail": MARKUP}, status=404)
    )
    submit(page, "/users/form/")
    expect(page.locator("#message")).to_have_text(f"{MARKUP}.")
    expect_no_markup(page)


def test_markup_in_the_address_of_a_task_page_is_text(page: Page) -> None:
    page.goto('/task/"><img src=x onerror="window.hacked = true">/')
    expect(page.locator("#message")).to_have_text(f'Nothing is known of task ">{MARKUP}.')
    expect(page.locator("#task-id")).to_have_text(f'">{MARKUP}')
    expect_no_markup(page)


def test_polling_outlives_a_server_that_is_away(page: Page, system: System) -> None:
    system.behave(delay=1)
    statuses = "**/users/task_status/*"
    page.route(statuses, lambda route: route.abort())
    submit(page, "/users/form/")
    expect(page.locator("#message")).to_have_text("Connection lost, trying again…")
    expect(page.get_by_role("button", name="Subscribe")).to_be_disabled()
    page.unroute(statuses)
    page.route(statuses, answer_once(502, "<h1>Bad gateway</h1>"))
    expect_end(page, "SUCCESS", "Done")


def answer_once(status: int, body: str) -> Callable[[Route], None]:
    """As a proxy does while the server behind it starts."""
    answered: list[Route] = []

    def handle(route: Route) -> None:
        if answered:
            route.continue_()
        else:
            answered.append(route)
            route.fulfill(status=status, body=body)

    return handle


def test_polling_outlives_a_browser_without_network(
    page: Page, context: BrowserContext, system: System
) -> None:
    system.behave(delay=0.5)
    submit(page, "/users/form/")
    context.set_offline(True)
    expect(page.locator("#message")).to_have_text("Connection lost, trying again…")
    context.set_offline(False)
    expect_end(page, "SUCCESS", "Done")


def test_a_killed_server_is_found_again_by_both_forms(
    context: BrowserContext, page: Page, system: System
) -> None:
    other = context.new_page()
    system.behave(delay=1)
    submit(page, "/users/form/")
    submit(other, "/users/form_ws/")
    expect(other.locator("#state")).to_have_attribute("data-state", "STARTED")
    system.web().kill()  # the runner starts it again
    for each in (page, other):
        expect(each.locator("#message")).to_have_text("Connection lost, trying again…")
    expect_end(other, "SUCCESS", re.compile("^Done"))
    expect_end(page, "SUCCESS", "Done")
    assert history(other)[-2:] == ["STARTED", "SUCCESS"]


def test_a_websocket_closed_without_an_end_is_opened_again(page: Page, system: System) -> None:
    sockets: list[WebSocketRoute] = []

    def break_the_first(route: WebSocketRoute) -> None:
        sockets.append(route)
        if len(sockets) == 1:
            route.close(code=1000)
        else:
            route.connect_to_server()

    page.route_web_socket("**/ws/task_status/*", break_the_first)
    system.behave(delay=2)  # of a task that has ended it would read the end instead
    submit(page, "/users/form_ws/")
    expect_end(page, "SUCCESS", re.compile("^Done"))
    assert len(sockets) == 2


def test_a_refused_websocket_says_so_and_is_not_tried_again(page: Page) -> None:
    page.route_web_socket(
        "**/ws/task_status/*", lambda route: route.close(code=1008, reason="not yours")
    )
    submit(page, "/users/form_ws/")
    expect(page.locator("#message")).to_have_text("not yours")
    expect(page.get_by_role("button", name="Subscribe")).to_be_enabled()


def test_wrong_input_is_explained_at_the_field(page: Page) -> None:
    page.goto("/users/form/")
    email, username = page.get_by_label("Email"), page.get_by_label("Username")
    email.fill("someone@nowhere")
    page.get_by_role("button", name="Subscribe").click()
    expect(email).to_have_attribute("aria-invalid", "true")
    expect(email).to_have_accessible_description(re.compile("not a valid email address"))
    expect(email).to_be_focused()
    expect(username).to_have_accessible_description(re.compile("at least 1 character"))
    expect(page.locator("#message")).to_have_text("Not sent: see the marked fields.")
    expect(page.locator("#state")).to_be_hidden()
    email.fill(address())
    username.fill("someone")
    page.get_by_role("button", name="Subscribe").click()
    expect_end(page, "SUCCESS", re.compile("^Done"))
    expect(email).not_to_have_attribute("aria-invalid", "true")
    expect(email).to_have_accessible_description("")


def test_a_refused_form_says_why_and_comes_back(page: Page) -> None:
    replies: list[dict[str, Any]] = [
        {"status": 503, "json": {"detail": "the queue is away"}},
        {"status": 409, "json": {"detail": "exists already"}},
        {"status": 502, "body": "<h1>Bad gateway</h1>"},
    ]

    def handle(route: Route) -> None:
        if route.request.method != "POST":
            route.continue_()
        elif replies:
            route.fulfill(**replies.pop(0))
        else:
            route.abort()

    page.route("**/users/form/", handle)
    page.goto("/users/form/")
    for text in (
        "The queue is away.",
        "Exists already.",
        "The server answered with an error (502).",
        "The server does not answer. Please try again.",
    ):
        page.get_by_role("button", name="Subscribe").click()
        expect(page.locator("#message")).to_have_text(text)
        expect(page.get_by_role("button", name="Subscribe")).to_be_enabled()
        expect(page.locator("#task-link")).to_be_hidden()


def test_a_form_is_sent_with_the_keyboard_alone(page: Page) -> None:
    page.goto("/users/form_ws/")
    press = page.keyboard.press
    press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    press("Enter")
    press("Tab")
    page.keyboard.type(address())
    press("Tab")
    page.keyboard.type("someone")
    press("Tab")
    button = page.get_by_role("button", name="Subscribe")
    expect(button).to_be_focused()
    assert button.evaluate("it => getComputedStyle(it).outlineStyle") != "none"
    press("Enter")
    expect_end(page, "SUCCESS", re.compile("^Done"))
    expect(button).to_be_focused()


def test_no_page_is_wider_than_a_small_phone(page: Page, system: System) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    long = system.send("project.users.tasks.divide", kwargs={"x" * 300: 1})
    for path in (*PAGES, f"/task/{long}/"):
        page.goto(path)
        if "no-such" in path:
            expect(page.locator("#message")).to_contain_text("Nothing is known")
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, path
    expect_end(page, "FAILURE", re.compile("x{300}"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_every_page_loads_without_a_complaint(page: Page) -> None:
    with watched(page) as faults:
        for path in PAGES:
            response = page.goto(path, wait_until="load")
            assert response is not None
            assert "default-src 'self'" in response.headers["content-security-policy"]
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            expect(page.get_by_role("button", disabled=True)).to_have_count(0)
        expect(page.locator("#message")).to_have_text("Nothing is known of task no-such-task.")
        assert faults == []


def test_every_link_of_the_first_page_leads_somewhere(page: Page, system: System) -> None:
    page.goto("/")
    links = page.get_by_role("link").evaluate_all("all => all.map(it => it.href)")
    paths = {link.removeprefix(system.base) for link in links if link.startswith(system.base)}
    assert paths >= {"/", *FORMS, "/docs"}
    for path in paths:
        assert page.request.get(path).status == 200, path
    flower = page.get_by_role("link", name="Flower")
    expect(flower).to_have_attribute("href", system.flower)
    expect(flower).to_have_attribute("target", "_blank")


def test_every_page_says_that_it_needs_javascript(browser: Browser, system: System) -> None:
    context = browser.new_context(base_url=system.base, java_script_enabled=False)
    with closing(context):
        page = context.new_page()
        for path in PAGES:
            page.goto(path)
            # Chromium does not show <noscript> where Playwright has switched scripts off.
            assert "JavaScript" in page.locator("noscript").inner_html()
            expect(page.get_by_role("button", disabled=False)).to_have_count(0)


# The browser's side of live status by itself: /celeriac/client.js

WATCH = """
async ([id, options]) => {
  const { watchTask } = await import("/celeriac/client.js");
  const seen = [];
  let lost = 0;
  try {
    const onEvent = (event) => seen.push(event);
    const end = await watchTask(id, { base: "/", ...options, onEvent, onLost: () => lost++ });
    return { seen, lost, end };
  } catch (error) {
    return { seen, lost, error: error.name };
  }
}
"""


@pytest.mark.parametrize("way", ["websocket", "sse", "poll"])
def test_a_task_is_watched_to_its_end_in_every_way(page: Page, system: System, way: str) -> None:
    system.behave(delay=0.5)
    page.goto("/")
    task_id = system.send("project.users.tasks.subscribe_to_list", "a@example.com")
    outcome = page.evaluate(WATCH, [task_id, {"transports": [way]}])
    assert outcome["end"]["result"] == "a@example.com is on the list"
    numbers = [event["id"] for event in outcome["seen"]]
    assert numbers == sorted(set(numbers))
    assert [event["state"] for event in outcome["seen"]][-2:] == ["STARTED", "SUCCESS"]
    assert outcome["lost"] == 0
    again = page.evaluate(WATCH, [task_id, {"transports": [way]}])
    assert again["seen"] == [outcome["end"]]
    after = {"transports": [way], "after": outcome["end"]["id"]}
    over = page.evaluate(WATCH, [task_id, after])
    assert (over["seen"], over["lost"]) == ([], 0)
    assert over["end"]["result"] == outcome["end"]["result"]
    unknown = page.evaluate(WATCH, ["no-such-task", {"transports": [way]}])
    assert unknown["error"] == "UnknownTask"


def test_where_one_way_is_blocked_the_next_is_taken(page: Page, system: System) -> None:
    page.goto("/")
    task_id = system.send("project.users.tasks.divide", 1, 2)
    page.route_web_socket("**/ws/task_status/*", lambda route: route.close(code=1011))
    assert page.evaluate(WATCH, [task_id, {}])["end"]["result"] == 0.5
    page.route("**/tasks/*/events*", lambda route: route.abort())
    assert page.evaluate(WATCH, [task_id, {}])["end"]["result"] == 0.5


def test_a_lost_connection_costs_no_event_and_repeats_none(page: Page, system: System) -> None:
    system.behave(fail_next=1)
    sockets: list[WebSocketRoute] = []

    def cut(route: WebSocketRoute) -> None:
        """After its first frame, twice."""
        sockets.append(route)
        server = route.connect_to_server()

        def passed(message: str | bytes) -> None:
            route.send(message)
            if len(sockets) < 3:
                route.close(code=1001)

        server.on_message(passed)

    page.goto("/")
    page.route_web_socket("**/ws/task_status/*", cut)
    task_id = system.send("project.users.tasks.process_notification")
    outcome = page.evaluate(WATCH, [task_id, {"after": 0}])
    assert [event["id"] for event in outcome["seen"]] == [1, 2, 3, 4]
    states = [event["state"] for event in outcome["seen"]]
    assert states == ["STARTED", "RETRY", "STARTED", "SUCCESS"]
    assert outcome["lost"] == 2


def test_who_asks_does_so_once_for_each_state_and_knows_what_was_missed(page: Page) -> None:
    """Also where the last event seen is one of the task's own, whose number no state has."""
    states: list[dict[str, Any]] = [
        {"id": 3, "state": "STARTED"},
        {"id": 8, "state": "PROGRESS"},
        {"id": 10, "state": "SUCCESS"},
    ]
    asked: list[tuple[bool, str | None]] = []

    def answer(route: Route) -> None:
        tag = route.request.headers.get("if-none-match")
        asked.append(("wait=20" in route.request.url, tag))
        state = states.pop(0)
        headers = {"ETag": f'"{state["id"]}-x"'}
        route.fulfill(json={"task_id": "a", **state}, headers=headers)

    page.route("**/tasks/a?**", answer)
    page.route("**/tasks/a", answer)
    page.goto("/")
    outcome = page.evaluate(WATCH, ["a", {"transports": ["poll"], "after": 7}])
    assert asked == [(False, None), (True, '"3-x"'), (True, '"8-x"')]
    seen = [(event["id"], event.get("recovered")) for event in outcome["seen"]]
    assert seen == [(8, None), (10, False)]
    assert outcome["lost"] == 0


def test_why_a_task_waits_is_told_once_and_a_store_that_is_away_ends_no_way(page: Page) -> None:
    pending = {"task_id": "a", "id": 0, "state": "PENDING"}
    opened: list[str] = []

    def serve(route: WebSocketRoute) -> None:
        opened.append(route.url)
        if len(opened) < 4:
            route.close(code=1013)
            return
        said = [pending, *[pending | {"waiting": "no worker"}] * 2]
        for each in (*said, pending, {"task_id": "a", "id": 1, "state": "SUCCESS"}):
            route.send(json.dumps(each))

    page.route_web_socket("**/ws/task_status/*", serve)
    page.goto("/")
    outcome = page.evaluate(WATCH, ["a", {}])
    shown = [(event["state"], event.get("waiting")) for event in outcome["seen"]]
    assert shown == [("PENDING", None), ("PENDING", "no worker"), ("SUCCESS", None)]
    assert (len(opened), outcome["lost"]) == (4, 3)


def test_who_has_given_up_beforehand_asks_nothing(page: Page) -> None:
    asked: list[str] = []
    page.route_web_socket("**/ws/task_status/*", lambda route: asked.append(route.url))
    page.goto("/")
    error = page.evaluate(
        """async () => {
          const { watchTask } = await import("/celeriac/client.js");
          const signal = AbortSignal.abort();
          const watched = watchTask("a", { base: "/", signal });
          const late = new Promise((resolve) => setTimeout(resolve, 1000, "nothing"));
          return Promise.race([watched.catch((error) => error.name), late]);
        }"""
    )
    assert (error, asked) == ("AbortError", [])


def test_an_element_shows_a_task(page: Page, system: System) -> None:
    page.goto("/")
    task_id = system.send("project.users.tasks.divide", kwargs={MARKUP: 1})
    page.evaluate(
        """async (id) => {
          await import("/celeriac/client.js");
          const element = document.createElement("task-status");
          element.setAttribute("task-id", id);
          element.setAttribute("base", "/");
          document.querySelector("main").append(element);
        }""",
        task_id,
    )
    element = page.locator("task-status")
    expect(element).to_have_attribute("data-state", "FAILURE")
    expect(element.get_by_role("status")).to_contain_text("Failed: TypeError: divide() got")
    expect(element.locator("progress")).to_be_hidden()
    expect_no_markup(page)


LOOK = """
async () => {
  const module = await import("/celeriac/client.js");
  const read = new Set();
  const options = new Proxy({ base: "/" }, {
    get: (given, name) => { read.add(name); return given[name]; },
  });
  const error = await module.watchTask("no-such-task", options).catch((error) => error);
  const each = (look) => Object.fromEntries(
    Object.entries(module).map(([name, it]) => [name, look(it)])
  );
  return {
    lengths: each((it) => it.length),
    parents: each((it) => Object.getPrototypeOf(it).name ?? null),
    kinds: each((it) => it.constructor.name),
    options: [...read],
    attributes: module.TaskStatusElement.observedAttributes,
    isDefined: customElements.get("task-status") === module.TaskStatusElement,
    isUnknown: error instanceof module.UnknownTask,
  };
}
"""


def test_the_declared_types_are_those_of_the_module(page: Page) -> None:
    text = (STATIC / "client.d.ts").read_text()
    functions = dict(re.findall(r"^export function (\w+)\((.*)\): Promise<", text, re.MULTILINE))
    classes = dict(re.findall(r"^export class (\w+) extends (\w+)", text, re.MULTILINE))
    constants = dict(re.findall(r"^export const (\w+): (\w+)", text, re.MULTILINE))
    page.goto("/")
    found = page.evaluate(LOOK)
    assert set(found["kinds"]) == {*functions, *classes, *constants}
    assert {name: found["parents"][name] for name in classes} == classes
    assert {name: found["kinds"][name] for name in constants} == constants
    for name, given in functions.items():
        assert found["kinds"][name] in ("Function", "AsyncFunction")
        # Those with a default do not count in JavaScript.
        needed, most = len(re.findall(r"\w:", given)), len(re.findall(r"\w\??:", given))
        assert needed <= found["lengths"][name] <= most, name
    assert set(found["options"]) == members(text, "WatchOptions")
    assert found["attributes"] == re.findall(r'([\w-]+)="…"', text)
    assert found["isDefined"]
    assert found["isUnknown"]


def test_the_declared_event_has_all_that_is_sent() -> None:
    given: dict[str, Any] = {"id": 1, "result": 1, "time": 1.0, "retry_at": 1.0, "waiting": "x"}
    told: list[Status | Event] = [
        Status("a", "PROGRESS", **given),
        Status("a", "FAILURE", error="x", code="x", recovered=False),
        Event("a", 1, "line", "x"),
    ]
    sent = {name for each in told for name in each.as_json()}
    assert members((STATIC / "client.d.ts").read_text(), "TaskEvent") == sent


def members(declared: str, interface: str) -> set[str]:
    body = declared.partition(f"interface {interface} {{\n")[2].partition("\n}\n")[0]
    return set(re.findall(r"^  (\w+)\??:", body, re.MULTILINE))
