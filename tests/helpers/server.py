"""A web server that serves a folder, counts what it is asked for, and misbehaves as it is told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("cut", "cut_chunked", "cut_at_once", "stall", "drip", "404", "500", "short", "long", "corrupt")


class Server(ThreadingHTTPServer):
    """Serves `folder` at `address` from a thread. `fault(name, nth)` names how the n-th request (from 0) for a file
    goes wrong, or returns None. A context; `requests` counts whole and failed answers by file name."""

    daemon_threads = True

    def __init__(self, folder: Path, fault: Callable[[str, int], str | None] = lambda name, nth: None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault = folder, fault
        self.requests: Counter[str] = Counter()
        self.over = threading.Event()
        self.guard = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what these tests are about."""

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/set/")
        with self.server.guard:
            nth = self.server.requests[name]
            self.server.requests[name] += 1
        fault = self.server.fault(name, nth)
        self.close_connection = True
        if fault == "cut_at_once":
            return
        if fault in ("404", "500"):
            self.send_error(int(fault))
            return
        try:
            body = (self.server.folder / name).read_bytes()
        except OSError:
            self.send_error(404)
            return
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "long":
            body += bytes(512)
        if fault == "corrupt":
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        self.send_response(200)
        if fault == "cut_chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(body) + body[: len(body) // 2])
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if fault in ("cut", "stall", "drip") else len(body)
        self.wfile.write(body[:half])
        if fault == "stall":
            self.server.over.wait()
        while fault == "drip" and not self.server.over.wait(0.1):
            self.wfile.write(body[half : half + 1])

    def log_message(self, *_: object) -> None: ...
