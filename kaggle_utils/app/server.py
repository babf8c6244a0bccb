"""The local server of the page: one address with a token, one connection for each open page.

Only 127.0.0.1 listens. Each address begins with a random token, and requests of other origins or for other
host names are refused, so that no page of the web can reach the server through the browser. The headers of
each answer keep the page from loading or sending anything elsewhere.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import tornado.httpserver
import tornado.ioloop
import tornado.netutil
import tornado.web
import tornado.websocket

from .. import report
from ..detector import Detector
from .desk import MOST_WAITING, SAMPLES, Desk
from .session import session_folder

ADDRESS = "127.0.0.1"
MEGABYTES, MINUTES = 2000.0, 20.0  # limits of an upload
SPARE = 200e6  # bytes that an upload must leave free on the disk
FULL = f"{MOST_WAITING} clips are waiting already."
TICK_MS = 1000  # between messages about the time left
PAGE_POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
               "connect-src 'self' ws://{host}; frame-src 'self'; base-uri 'none'; form-action 'none'; "
               "frame-ancestors 'none'")
REPORT_POLICY = ("sandbox allow-same-origin; default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                 "base-uri 'none'; form-action 'none'; frame-ancestors 'self'")
FILES = {"": ("app.html", "text/html"), "app.css": ("app.css", "text/css"),
         "app.js": ("app.js", "text/javascript")}


class Office:
    """What all handlers share: the desk, the open pages, and the limits."""

    def __init__(self, desk: Desk, most_bytes: int):
        self.desk, self.most_bytes = desk, most_bytes
        self.tabs: dict[str, Tab] = {}

    def tell(self) -> None:
        """Send every open page the state of its clips."""
        for key, tab in list(self.tabs.items()):
            tab.send({"ready": self.desk.ready, "trouble": self.desk.trouble, "clips": self.desk.states(key)})


class Local(tornado.web.RequestHandler):
    """Refuses what does not come from our own page, and sets the headers of every answer."""

    def initialize(self, office: Office) -> None:
        self.office = office

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in {
            "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        }.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        port = self.request.connection.stream.socket.getsockname()[1]
        hosts = {f"{ADDRESS}:{port}", f"localhost:{port}"}
        origin = self.request.headers.get("Origin")
        ours = origin == f"http://{self.request.host}" or (origin is None and self.request.method == "GET")
        if self.request.host not in hosts or not ours:
            raise tornado.web.HTTPError(403)

    def write_error(self, status_code: int, **_) -> None:
        self.refuse(status_code, self._reason)

    def refuse(self, status: int, message: str) -> None:
        """Answer with a message for the reader."""
        self.set_status(status)
        self.finish({"trouble": message})

    @property
    def tab(self) -> str:
        """The key of the page that asks.

        Raises:
            HTTPError: 404, no such page is open.
        """
        if (key := self.get_query_argument("tab", "")) not in self.office.tabs:
            raise tornado.web.HTTPError(404)
        return key


class Page(Local):
    def get(self, name: str) -> None:
        file, kind = FILES[name]
        self.set_header("Content-Type", f"{kind}; charset=utf-8")
        self.set_header("Content-Security-Policy", PAGE_POLICY.format(host=self.request.host))
        self.finish((Path(__file__).parent / file).read_bytes())


class Tab(Local, tornado.websocket.WebSocketHandler):
    """The connection of an open page; when it closes, the page's clips are removed."""

    def check_origin(self, origin: str) -> bool:
        return origin == f"http://{self.request.host}"

    def open(self) -> None:
        self.key = secrets.token_urlsafe(16)
        self.office.tabs[self.key] = self
        desk = self.office.desk
        self.send({"tab": self.key, "most_bytes": self.office.most_bytes,
                   "limit": limits(self.office.most_bytes, desk.longest_s),
                   "stages": report.STAGES, "samples": {key: label for key, (label, _) in SAMPLES.items()}})
        self.office.tell()

    def send(self, message: dict) -> None:
        if self.ws_connection is not None and not self.ws_connection.is_closing():
            self.write_message(json.dumps(message))

    def on_message(self, message) -> None:
        self.close()  # the page sends nothing

    def on_close(self) -> None:
        if self.office.tabs.pop(getattr(self, "key", ""), None):
            for clip in [clip for clip in self.office.desk.clips.values() if clip.tab == self.key]:
                self.office.desk.remove(clip)


@tornado.web.stream_request_body
class Upload(Local):
    """Writes a clip to disk as it arrives."""

    clip, file = None, None

    def prepare(self) -> None:
        super().prepare()
        self.request.connection.set_max_body_size(1 << 62)  # we refuse in words, tornado would in a bare 400
        if refusal := self.refusal(int(self.request.headers.get("Content-Length", -1))):
            self.set_header("Connection", "close")  # unread, the rest of the file does not matter
            return self.refuse(*refusal)
        self.clip = self.office.desk.receive(self.tab, self.get_query_argument("name", "clip"))
        self.file = open(self.clip.path, "wb")  # noqa: SIM115, it stays open between chunks

    def refusal(self, length: int) -> tuple[int, str] | None:
        """Status and message if a file of so many bytes is not taken."""
        most = self.office.most_bytes
        if length < 0:
            return 411, "The length of the file is not known."
        if length > most:
            return 413, (f"This file has {length / 1e6:.0f} MB; the limit is {most / 1e6:.0f} MB. "
                         "Cut out the part in question and try that.")
        if length > shutil.disk_usage(self.office.desk.folder).free - SPARE:
            return 507, "There is not enough space on this computer's disk for the file."
        return (429, FULL) if self.office.desk.is_full else None

    def data_received(self, chunk: bytes) -> None:
        try:
            if not self._finished:
                self.file.write(chunk)
        except OSError as error:
            self.drop()
            self.refuse(507, f"The file could not be stored: {error.strerror}.")

    def post(self) -> None:
        if self._finished:
            return
        self.file.close()
        if self.clip.tab not in self.office.tabs:  # the page closed meanwhile
            return self.drop()
        self.office.desk.enter(self.clip)
        self.finish({"id": self.clip.id})

    def drop(self) -> None:
        self.file.close()
        self.office.desk.remove(self.clip)

    def on_connection_close(self) -> None:
        if self.clip and self.clip.state == "uploading":
            self.drop()


class Sample(Local):
    def post(self, key: str) -> None:
        if key not in SAMPLES:
            raise tornado.web.HTTPError(404)
        desk = self.office.desk
        if desk.is_full:
            return self.refuse(429, FULL)
        clip = desk.receive(self.tab, f"Sample, {SAMPLES[key][0].lower()}.mp4", key)
        desk.enter(clip)
        self.finish({"id": clip.id})


class Result(Local):
    """A clip's page or verdict, to be shown or saved; DELETE removes the clip."""

    def get(self, key: str, what: str) -> None:
        clip = self.office.desk.clips.get(key)  # only its page knows the key
        if clip is None or clip.state != "done":
            raise tornado.web.HTTPError(404)
        html = what == "report"
        self.set_header("Content-Type", f"{'text/html' if html else 'application/json'}; charset=utf-8")
        self.set_header("Content-Security-Policy", REPORT_POLICY)
        if self.get_query_argument("save", ""):
            name = quote(f"{clip.name}.{'html' if html else 'json'}")
            self.set_header("Content-Disposition", f"attachment; filename*=UTF-8''{name}")
        self.finish((clip.page if html else clip.verdict).read_bytes())

    def delete(self, key: str, what: str) -> None:
        if clip := self.office.desk.clips.get(key):
            self.office.desk.remove(clip)
        self.finish({})


def limits(most_bytes: int, longest_s: float) -> str:
    size = f"{most_bytes / 1e9:g} GB" if most_bytes >= 1e9 else f"{most_bytes / 1e6:g} MB"
    return f"{size} and {longest_s / 60:g} minutes"


async def run(folder: Path, load: Callable[[], Detector], port: int, megabytes: float, minutes: float,
              announce: Callable[[str], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    office: Office
    desk = Desk(folder, load, lambda: loop.call_soon_threadsafe(lambda: office.tell()), minutes * 60)
    office = Office(desk, int(megabytes * 1e6))
    token, shared = secrets.token_urlsafe(24), {"office": office}
    application = tornado.web.Application([
        (rf"/{token}/tab", Tab, shared), (rf"/{token}/clips", Upload, shared),
        (rf"/{token}/samples/(\w+)", Sample, shared),
        (rf"/{token}/clips/([\w-]+)/(report|verdict)", Result, shared),
        (rf"/{token}/({'|'.join(FILES)})", Page, shared),
    ], default_handler_class=Nowhere, default_handler_args=shared, log_function=lambda handler: None,
        websocket_max_message_size=1024)
    sockets = tornado.netutil.bind_sockets(port, ADDRESS)
    server = tornado.httpserver.HTTPServer(application, max_header_size=16384)
    server.add_sockets(sockets)
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(ended.set))
    tornado.ioloop.PeriodicCallback(lambda: desk.is_busy and office.tell(), TICK_MS).start()
    announce(f"http://{ADDRESS}:{sockets[0].getsockname()[1]}/{token}/")
    await ended.wait()
    server.stop()


class Nowhere(Local):
    def prepare(self) -> None:
        super().prepare()
        raise tornado.web.HTTPError(404)


def serve(models: Path | None = None, prior: float = 0.5, port: int = 0, megabytes: float = MEGABYTES,
          minutes: float = MINUTES, browser: bool = False) -> None:
    """Serve the page until Ctrl-C, then delete all uploads and end the process.

    Args:
        port: 0 takes a free one.
        megabytes, minutes: larger or longer clips are refused.
        browser: also open the address in the default browser.
    """
    def load() -> Detector:
        return Detector.load(models, prior=prior)

    def announce(address: str) -> None:
        print(f"Open this address in a browser on this computer; Ctrl-C ends the program:\n\n  {address}\n",
              flush=True)
        if browser:
            webbrowser.open(address)

    with session_folder() as folder:
        asyncio.run(run(folder, load, port, megabytes, minutes, announce))
    sys.stdout.flush()
    os._exit(0)  # the analysis may be inside TensorFlow, which does not end well in the middle
