"""The app in a real browser and over plain HTTP: upload, progress, page, save; limits, other origins, kills."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import addresses, app, browser
from helpers import MOST_MEMORY, bombs_in, ffmpeg, peak_of
from selenium.common.exceptions import StaleElementReferenceException
from test_report import clip_with
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

from kaggle_utils.app import desk as desks
from kaggle_utils.app.session import safe_name, session_folder

LONG_S = 240  # until a page is there, on a machine with other work
EVIL = "<img src=x onerror=alert(1)>.mp4"


def wait_for(condition, seconds: float = LONG_S):
    """The first true value of ``condition``; an element that the page replaced meanwhile is looked for again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(StaleElementReferenceException):
            if value := condition():
                return value
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def texts(window, selector: str) -> list[str]:
    """The visible texts of all matches, read in one step: the page may replace an element between two."""
    return window.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)", selector
    )


def rows(window) -> list[str]:
    return texts(window, "#clips li")


def choose(window, *paths) -> None:
    window.find_element("id", "file").send_keys("\n".join(map(str, paths)))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A running app with small limits: its folder, its process, its address."""
    folder = tmp_path_factory.mktemp("app")
    with app(folder, "--megabytes", "5", "--minutes", "0.5") as (process, address):
        yield folder, process, address


@pytest.fixture(scope="module")
def window(served, tmp_path_factory):
    """One browser for all tests; each opens the page anew."""
    with browser(tmp_path_factory.mktemp("browser")) as window:
        window.folder = Path(window.capabilities["chrome"]["userDataDir"]).parent
        yield window


@pytest.fixture
def page(window, served):
    window.get("about:blank")
    addresses(window)
    window.get_log("browser")
    window.get(served[2])
    wait_for(lambda: window.find_elements("css selector", "#samples button"), 30)
    return window


def test_upload_progress_report_save_and_a_second_clip(page, miniature, served):
    first, second = clip_with(miniature, people=2), clip_with(miniature, people=1, sound=True)
    evil = served[0] / EVIL
    shutil.copy(first, evil)
    choose(page, evil)
    seen = set()

    def shown():
        seen.update(step.partition(",")[0] for step in texts(page, ".step"))
        return page.find_element("id", "result").is_displayed()

    wait_for(shown)
    assert {"Step 2 of 5: faces", "Step 3 of 5: face network"} <= seen
    assert EVIL in rows(page)[0] and "Remove" in rows(page)[0]
    said = page.find_element("id", "news").get_attribute("textContent")
    assert "The report is ready" in said
    frame = page.find_element("id", "report")
    assert frame.get_attribute("sandbox") == "allow-same-origin"
    page.switch_to.frame(frame)
    wait_for(lambda: page.find_elements("css selector", ".word"), 10)
    text = page.find_element("css selector", "main").text
    page.switch_to.default_content()
    assert EVIL in text and "Person B" in text
    inner = page.execute_script("return arguments[0].contentDocument.documentElement.scrollHeight", frame)
    assert abs(int(frame.size["height"]) - inner) <= 2, "one scroll bar, not two"

    page.find_element("id", "savepage").click()
    page.find_element("id", "savejson").click()
    saved = page.folder / "saved"
    wait_for(lambda: saved.is_dir() and len([p for p in saved.iterdir() if p.suffix in (".html", ".json")]) == 2, 20)
    verdict = json.loads(next(saved.glob("*.json")).read_text())
    assert verdict["file"] == EVIL and 0 <= verdict["probability"] <= 1 and len(verdict["tracks"]) == 2
    assert "</html>" in next(saved.glob("*.html")).read_text(encoding="utf-8")

    choose(page, second)
    wait_for(lambda: any(second.name in row and "Show the report" in row for row in rows(page)))
    page.switch_to.frame(page.find_element("id", "report"))
    assert wait_for(lambda: second.name in page.find_element("tag name", "body").text, 10)
    page.switch_to.default_content()
    assert len(rows(page)) == 2
    uploads = [path for path in (served[0] / "temporary").rglob("*.mp4")]
    assert not uploads, "a clip is deleted as soon as it was analysed"

    asked = {place for place in addresses(page) if not place.startswith(("data:", "chrome:", "about:"))}
    assert {urlsplit(place).hostname for place in asked} == {"127.0.0.1"}, asked
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_file_that_is_no_clip_and_one_that_is_too_large_or_too_long(page, tmp_path):
    text, huge, long = tmp_path / "text.mp4", tmp_path / "huge.mp4", tmp_path / "long.mp4"
    text.write_text("no clip")
    with open(huge, "wb") as file:
        file.truncate(3_000_000_000)
    ffmpeg("-f", "lavfi", "-i", "color=size=64x64:rate=5:duration=40", long)
    choose(page, text, huge, long)
    found = wait_for(lambda: (all("Remove" in row and "." in row for row in rows(page)) and len(rows(page)) == 3
                              and not page.find_elements("css selector", ".work:not([hidden])") and rows(page)), 60)
    assert "cannot be read as a video" in next(row for row in found if row.startswith("text.mp4"))
    assert "3000 MB" in next(row for row in found if row.startswith("huge.mp4"))
    assert "40.0 s" in (row := next(row for row in found if row.startswith("long.mp4"))) or "39.8 s" in row
    assert "limit is 30.0 s" in row
    page.find_element("css selector", "#clips li .remove").click()
    wait_for(lambda: len(rows(page)) == 2, 10)


def test_two_tabs_queue_and_a_closed_one_leaves_nothing(page, miniature, served):
    clip = clip_with(miniature, people=1, sound=True)
    first = page.current_window_handle
    choose(page, clip)
    wait_for(lambda: "Step" in " ".join(rows(page)), 60)
    page.switch_to.new_window("tab")
    try:
        page.get(served[2])
        wait_for(lambda: page.find_elements("css selector", "#samples button"), 30)
        choose(page, clip, clip_with(miniature, people=0))
        wait_for(lambda: len(rows(page)) == 2 and "before this one" in rows(page)[1], 60)
        assert len([p for p in (served[0] / "temporary").rglob("*.mp4")]) >= 2
    finally:
        page.close()
        page.switch_to.window(first)
    assert len(rows(page)) == 1, "each tab has its own clips"
    wait_for(lambda: "Show the report" in rows(page)[0])
    assert [p for p in (served[0] / "temporary").rglob("*.mp4")] == []


def test_a_sample_is_one_click_away_by_keyboard_at_390_px(page):
    from selenium.webdriver import ActionChains, Keys

    page.set_window_size(390, 844)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        for _ in range(10):
            ActionChains(page).send_keys(Keys.TAB).perform()
            if "No face" in page.switch_to.active_element.text:
                break
        ActionChains(page).send_keys(Keys.ENTER).perform()
        wait_for(lambda: page.find_element("id", "result").is_displayed())
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        names = page.execute_script(
            "return [...document.querySelectorAll('button, a, input, iframe, progress')].filter(x => x.checkVisibility())"
            ".map(x => x.ariaLabel || x.title || x.textContent.trim() || (x.labels && x.labels[0]?.textContent.trim()))"
        )
        assert names and all(names)
    finally:
        page.set_window_size(1280, 1600)


# --- without a browser ---------------------------------------------------------------------------------------
def ask(address: str, path: str = "", method: str = "GET", body: bytes | None = None, **headers):
    """Status, headers and text of one request."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, place.path + path, body, {"Origin": f"http://{place.netloc}", **names})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_only_its_own_page_is_answered(served):
    address = served[2]
    place = urlsplit(address)
    assert ask(address)[0] == 200 and place.hostname == "127.0.0.1"
    assert ask(f"http://{place.netloc}/")[0] == ask(f"http://{place.netloc}/wrong/")[0] == 404
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        assert ask(address, **headers)[0] == ask(address, "clips?tab=x", "POST", b"x", **headers)[0] == 403
    assert ask(address, "tab", Origin="http://evil.example", Upgrade="websocket", Connection="Upgrade")[0] == 403
    assert ask(address, "clips?tab=x", "POST", b"x")[0] == 404, "no such page is open"
    assert ask(address, "clips/../../etc/passwd")[0] == 404
    for path in ("", "app.js", "app.css"):
        policy = ask(address, path)[1]["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "*" not in policy


def test_an_upload_over_the_limit_is_refused_in_words(served):
    status, _, text = ask(served[2], "clips?tab=x&name=a.mp4", "POST", b"x" * 10, Content_Length="6000000")
    assert status == 413 and "the limit is 5 MB" in json.loads(text)["trouble"]


def test_bombs_leave_the_app_within_three_gib_over_all_processes(served, tmp_path):
    """A page uploads them, a wall of faces first; each has a report."""
    _, process, address = served
    origin = f"http://{urlsplit(address).netloc}"

    async def upload(paths: list[Path]) -> list[dict]:
        request = HTTPRequest(f"ws{address[4:]}tab", headers={"Origin": origin})
        tab = await websocket_connect(request)
        key = json.loads(await tab.read_message())["tab"]
        for path in paths:
            asked = f"{address}clips?tab={key}&name={path.name}"
            await AsyncHTTPClient().fetch(asked, method="POST", body=path.read_bytes(), headers={"Origin": origin})
        while True:
            clips = json.loads(await tab.read_message())["clips"]
            if len(clips) == len(paths) and all(clip["state"] in ("done", "failed") for clip in clips):
                tab.close()
                return clips

    paths = [path for path in bombs_in(tmp_path) if path.name in ("wall_of_faces.mp4", "picture.mp4")]
    ended = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        peak = beside.submit(peak_of, process, ended.is_set)
        try:
            clips = asyncio.run(asyncio.wait_for(upload(paths), 2 * LONG_S))
        finally:
            ended.set()
    assert all(clip["state"] == "done" for clip in clips)
    assert process.poll() is None and peak.result() < MOST_MEMORY


def test_nobody_else_can_connect(served):
    """The server listens on the loopback address alone."""
    port = urlsplit(served[2]).port
    local = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {line[1] for line in local if line[3] == "0A" and line[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_uploads_are_deleted_after_a_kill(tmp_path, number):
    with app(tmp_path) as (process, _):
        temporary = tmp_path / "temporary"
        (folder,) = temporary.glob("deepfake-clip.*")
        (folder / "upload.mp4").write_bytes(b"x")
        os.kill(process.pid, number)
        process.wait(60)
        wait_for(lambda: not any(temporary.glob("deepfake-clip.*")), 20)


def test_session_folder_is_private_and_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with session_folder() as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        assert os.environ["TMPDIR"].startswith(str(folder))
    assert not folder.exists() and os.environ["TMPDIR"] == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a.mp4", "a.mp4"),
        ("../../etc/passwd", "passwd"),
        ("C:\\clips\\a.mp4", "a.mp4"),
        ("a\0\n\x1b[2J.mp4", "a[2J.mp4"),
        ("..", "clip"),
        ("", "clip"),
        ("\ud800.mp4", "?.mp4"),
        ("映像 🎬.mp4", "映像 🎬.mp4"),
    ],
)
def test_names_of_strangers(name, kept):
    assert safe_name(name) == kept


class Standing:
    """A detector that only waits; ``study`` is replaced in these tests."""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A desk whose analysis ends when the test lets it."""
    import threading

    gate = threading.Semaphore(0)

    def study(path, detector, progress):
        progress("faces")
        gate.acquire()
        progress("voice")
        raise MemoryError("enough")

    monkeypatch.setattr(desks, "warm_up", lambda detector: None)
    monkeypatch.setattr(desks.report, "study", study)
    desks.IDLE_S = 1e6  # for good: a desk's thread outlives its test, and would stop the reader of later tests
    made = desks.Desk(tmp_path, Standing, lambda: None, 60)
    made.gate = gate
    yield made
    gate.release(1000)


def enter(desk, tab: str):
    clip = desk.receive(tab, "a.mp4")
    clip.path.write_bytes(b"x")
    desk.enter(clip)
    return clip


def test_the_line_knows_places_and_a_failure_does_not_stop_it(desk):
    first, second, third = enter(desk, "one"), enter(desk, "two"), enter(desk, "two")
    wait_for(lambda: first.stage == "faces", 5)
    assert [state["place"] for state in desk.states("two")] == [1, 2]
    assert [state["state"] for state in desk.states("one")] == ["running"]
    assert desk.states("two")[0]["left_s"] < desk.states("two")[1]["left_s"]
    desk.remove(second)
    assert [state["place"] for state in desk.states("two")] == [1] and not second.folder.exists()
    desk.gate.release()
    wait_for(lambda: third.stage == "faces", 5)
    assert first.state == "failed" and "enough" in first.trouble and not first.path.exists()
    desk.remove(third)
    desk.gate.release()
    wait_for(lambda: not desk.is_busy, 5)
    assert desk.states("two") == []


def test_networks_that_cannot_be_loaded_are_named(tmp_path):
    def load():
        raise FileNotFoundError("models/face.keras")

    broken = desks.Desk(tmp_path, load, lambda: None, 60)
    assert "models/face.keras" in wait_for(lambda: broken.trouble, 5)
