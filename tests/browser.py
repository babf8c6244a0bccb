"""Debian's Chromium, driven by selenium, where both are installed; and a server of the app to point it at."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def browser(folder: Path, width: int = 1280, height: int = 1600):
    """A new browser with a profile and a folder of downloads of its own; logs of console and network are on."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    driver = shutil.which("chromedriver")
    if CHROMIUM is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET, f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "saved")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        window.set_window_size(width, height)
        yield window
    finally:
        window.quit()


def addresses(window) -> set[str]:
    """All that the browser asked for since the last call: addresses of requests and of web sockets."""
    found = set()
    for entry in window.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.add(message["params"]["request"]["url"])
        elif message["method"] == "Network.webSocketCreated":
            found.add(message["params"]["url"])
    return found


@contextmanager
def app(folder: Path, *options: str, environment: dict | None = None):
    """A running app: its process and its address. ``folder`` holds its temporary files."""
    import os

    (folder / "temporary").mkdir(parents=True, exist_ok=True)
    variables = os.environ | {"TMPDIR": str(folder / "temporary")} | (environment or {})
    command = [sys.executable, "-m", "kaggle_utils", "app", *options]
    with open(folder / "stderr.txt", "w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        lines = iter(process.stdout.readline, "")
        address = next((line.strip() for line in lines if line.strip().startswith("http://")), None)
        assert address, (folder / "stderr.txt").read_text()
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
