"""An object store for tests (moto's server, a process of its own), and a proxy before it that misbehaves on request."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SERVE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
KEPT = ("content-length", "content-type", "etag", "content-range", "last-modified", "x-amzn-requestid")


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Port of a server with an empty bucket ``cells``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                post(port, "/cells", method="PUT")
                break
            time.sleep(0.1)
        yield port
    finally:
        server.kill()
        server.wait(20)


def post(port: int, path: str, content: bytes = b"", method: str = "POST") -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=content, method=method)
    request.add_header("Content-Type", "application/octet-stream")  # a form would be parsed
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()


class Proxy:
    """Passes requests on, unless ``fault`` says otherwise.

    Attributes
    ----------
    fault
        ``(method, path)`` to ``""``, a status such as ``"503"``, or what becomes of the answer: ``closed`` (none),
        ``mute`` (none, and the line stays open), ``cut`` (half of it, less than was promised), ``short`` (half of it,
        as promised), ``flipped`` (one bit).
    seen
        ``METHOD path`` of all requests.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[str, str], str] = lambda method, path: ""
        self.seen: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen.append(f"{self.command} {self.path}")
                fault = proxy.fault(self.command, self.path)
                self.close_connection = bool(fault)
                if fault in ("closed", "mute"):
                    time.sleep(30 if fault == "mute" else 0)
                    return
                if fault.isdigit():
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                upstream.request(self.command, self.path, body, dict(self.headers))
                found = upstream.getresponse()
                content = found.read()
                self.send_response(found.status)
                half = content[: len(content) // 2]
                content = {"cut": half, "short": half, "flipped": bytes([content[0] ^ 1]) + content[1:] if content
                           else b""}.get(fault, content)  # fmt: skip
                for key, value in found.getheaders():
                    if key.lower() in KEPT and not (fault == "short" and key.lower() == "content-length"):
                        self.send_header(key, value)
                if fault == "short":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                upstream.close()

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def times(n: int, fault: str, word: str = "/counts/") -> Callable[[str, str], str]:
    """A fault of the first ``n`` requests with a word in their path."""
    left = iter(range(n))
    return lambda method, path: fault if word in path and next(left, None) is not None else ""


def after(n: int, fault: str, word: str = "/counts/", method: str = "GET") -> Callable[[str, str], str]:
    """A fault of all requests with a word in their path but the first ``n``."""
    left = iter(range(n))
    return lambda how, path: fault if how == method and word in path and next(left, None) is None else ""
