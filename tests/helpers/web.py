"""A web server on the loopback that serves shards, and fails as servers fail."""

import socket
import struct
import time
from collections.abc import Callable

from loopback import LoopbackHandler, LoopbackServer

FAULTS = ("500", "reset", "short", "stall")


class Handler(LoopbackHandler):
    def answer(self, *, body: bool) -> None:
        web: Web = self.server
        name = self.path.partition("?")[0]
        asked = self.headers.get("Range") if web.ranges else None
        web.users.add(self.headers.get("Authorization"))
        web.seen.append((self.command, name, self.headers.get("Range")))
        fault = web.fault(self.command, name, self.headers.get("Range"))
        data = web.files.get(name)
        if fault == "500":
            return self.send(status=500)
        if fault == "403":
            return self.send(status=403)
        if data is None:
            return self.send(status=404)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)  # closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        if fault == "stall":
            time.sleep(1.5)
            self.close_connection = True
            return None
        first, last = 0, len(data) - 1
        if asked:
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", web.etag(name))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            web.sent += len(part)
            time.sleep(web.delay)
            self.wfile.write(part[: len(part) // 2] if fault == "short" else part)
            self.close_connection = fault == "short"
        return None


class Web(LoopbackServer):
    """files by path; fault(method, path, range): one of `FAULTS`, "403", None; seen: requests."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.files: dict[str, bytes] = {}
        self.fault: Callable[[str, str, str | None], str | None] = lambda *request: None
        self.ranges, self.delay, self.sent = True, 0.0, 0
        self.version = 1
        self.users: set[str | None] = set()
        self.seen: list[tuple[str, str, str | None]] = []

    def etag(self, name: str) -> str:
        return f'"{name}-{self.version}"'

    def url(self, name: str, *, user: str = "") -> str:
        return f"http://{user}127.0.0.1:{self.server_port}{name}"

    def first(self, fault: str, times: int, method: str = "GET") -> None:
        """Fail so many requests, then work."""
        left = [times]

        def choose(asked: str, name: str, span: str | None) -> str | None:
            if asked != method or left[0] == 0:
                return None
            left[0] -= 1
            return fault

        self.fault = choose

    def handle_error(self, request, address) -> None:
        pass  # a client that goes away is no news


def serve() -> Web:
    web = Web()
    web.start()
    return web
