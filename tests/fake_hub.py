"""A Hugging Face Hub on the loopback interface, for the real client to talk to: standard library only.

    with FakeHub(tmp_path) as hub:
        hub.fault("POST", "/commit/", status=503, times=2)
        subprocess.run([...], env=hub.environment(tmp_path / "home"))
        assert [r.path for r in hub.requests if r.method == "POST"] == [...]

Large files live behind another origin (``localhost`` instead of ``127.0.0.1``), as they do behind the Hub's CDN, and
that side refuses a request that carries a token. With ``xet=True`` a client that has hf_xet stores its chunks in
``local://``: undocumented, so one canary test watches it.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.fake_hub_routes import READ_TOKEN, WRITE_TOKEN, Answer, Routes
from tests.fake_hub_store import Blob, Repo, Store

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "FakeHub", "Fault", "Request"]


#: No wait of the fake is longer than this, whatever a test forgets to release.
LONGEST_WAIT = 30.0
#: An endless answer ends here, where a client takes all of it.
MOST_BYTES = 256 << 20


@dataclass
class Request:
    """One line of the log; ``sent`` counts body bytes of the answer."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What to do instead of answering, or (``after``) when the work is done and the answer is lost.

    ``truncate`` breaks the connection after that many bytes of the answer's body. ``change`` makes another answer of
    the right one. ``endless`` repeats its body for as long as the client takes it, ``drip`` waits that many seconds
    between bytes. ``reached`` is set when a request arrives here; with ``hold`` it then waits until ``release`` is set.
    """

    method: str
    pattern: str
    times: int
    status: int | None = None
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    after: bool = False
    hold: bool = False
    truncate: int | None = None
    change: Callable[[Answer], Answer] | None = None
    endless: bool = False
    drip: float = 0.0
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        self.reached.set()
        if self.hold:
            self.release.wait(LONGEST_WAIT)


class FakeHub:
    """The server; use it as a context manager."""

    def __init__(self, folder: Path, *, xet: bool = False, part_size: int | None = None, ranges: bool = True) -> None:
        self.xet, self.part_size, self.ranges = xet, part_size, ranges
        self.store = Store(folder / "xet-store")
        self.store.xet_folder.mkdir(parents=True, exist_ok=True)
        self.requests: list[Request] = []
        self.connections = 0
        self.parts: dict[str, dict[int, bytes]] = {}
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *client: None  # clients that are killed hang up without a word
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}/cdn"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for fault in self._faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = WRITE_TOKEN, **more: str) -> dict[str, str]:
        """The environment of a subprocess that sees this Hub and nothing of this machine's own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        if not self.xet:
            own["HF_HUB_DISABLE_XET"] = "1"
        if token is not None:
            own["HF_TOKEN"] = token
        return kept | own | more

    def repo(self, name: str, files: dict[str, bytes] | None = None, **attributes: Any) -> Repo:
        """A repository that exists already, with ``files`` on its main branch."""
        repo = self.store.create(name, name.partition("/")[0])
        for key, value in attributes.items():
            setattr(repo, key, value)
        if files:
            self.store.add_files(repo, files)
        return repo

    def fault(self, method: str, pattern: str, *, times: int = 1, **what: Any) -> Fault:
        """Meet the next ``times`` requests whose path matches ``pattern`` with a fault."""
        self._faults.append(Fault(method, pattern, times, **what))
        return self._faults[-1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.store.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def files(self, name: str, revision: str = "main") -> dict[str, Blob]:
        return self.store.repos[name].resolve(revision).files

    def content(self, name: str, path: str, revision: str = "main") -> bytes | None:
        return self.store.content(self.files(name, revision)[path])

    def log(self, method: str, pattern: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client to acknowledge its headers
    hub: FakeHub

    def setup(self) -> None:
        self.hub.connections += 1
        super().setup()

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_HEAD = do_GET

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.request_record = Request(self.command, parts.path, parse_qs(parts.query), dict(self.headers.items()), body)
        self.hub.requests.append(self.request_record)
        fault = self.hub.take_fault(self.command, parts.path)
        answer = None
        if fault is None or fault.after or fault.truncate is not None:
            answer = self._work()
        if fault is not None and fault.change is not None:
            answer = fault.change(self._work())
        if fault is not None:
            fault.wait()
            if fault.drop:
                self.close_connection = True
                return
            if fault.status:
                answer = Answer(fault.status, fault.body, fault.headers)
        self._send(answer or self._work(), fault)

    def _work(self) -> Answer:
        try:
            return Routes(self.hub, self.request_record).answer()
        except Answer as answer:
            return answer

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send_for_ever(self, body: bytes) -> None:
        while self.request_record.sent < MOST_BYTES:
            self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
            self.request_record.sent += len(body)
        self.close_connection = True

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        self.request_record.status = answer.status
        try:
            self.send_response(answer.status)
            endless = fault is not None and fault.endless and self.command != "HEAD"
            length = {"Transfer-Encoding": "chunked"} if endless else {"Content-Length": str(len(answer.body))}
            for name, value in {**length, **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if endless:
                self._send_for_ever(answer.body)
            elif fault is not None and fault.drip:
                for place in range(len(answer.body)):
                    self.wfile.write(answer.body[place : place + 1])
                    if fault.release.wait(fault.drip):
                        break
            elif self.command != "HEAD":
                body = answer.body[: None if fault is None else fault.truncate]
                self.request_record.sent = len(body)
                self.wfile.write(body)
                self.close_connection = self.close_connection or len(body) < len(answer.body)
        except OSError:
            self.close_connection = True  # the client was killed: that is what some tests do
