"""``minilora page``: the page and its one question on 127.0.0.1, and nothing else.

Any web page that this machine's browser has open can send requests here, and so can a name that resolves to 127.0.0.1.
So Host and Origin must be our own, only the paths of `Page.files` and the one question exist, a question has a largest
size and comes as JSON (which other origins may not send unasked), and a connection has a few seconds in all. What is
refused is told why in one line.
"""

import io
import json
import socket
import threading
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..memory.config_file import LARGEST
from ..tables import plain
from .answer import ask
from .document import FILES, POLICY, document, source

LARGEST_QUESTION = 2 * LARGEST + 2**16  # bytes: quotes and line ends of a config.json take two in a JSON string
SECONDS = 10  # for a request to come and be answered, Python's own time apart
CONNECTIONS = 256  # at once; a thread each, most of which wait
QUESTIONS = threading.Lock()  # Python works on one at a time


class Deadline(io.RawIOBase):
    """What a socket sends until a moment; a read past it is a timeout, however slowly the bytes drip."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.connection.settimeout(max(self.end - time.monotonic(), 0.001))
        return self.connection.recv_into(buffer)


class Refused(Exception):
    """A request that is not answered: the status, and why."""


class Handler(BaseHTTPRequestHandler):
    server: "Page"
    server_version, sys_version = "minilora", ""
    wbufsize = -1  # an answer goes out whole
    default_request_version = "HTTP/1.0"  # what is refused before its version is read has a status too
    command = path = requestline = ""
    request_version, replied = default_request_version, False

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(Deadline(self.connection, self.server.seconds))
        self.connection.settimeout(self.server.seconds)  # of what is sent

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # whoever asked is gone, or took too long to listen
            pass

    def handle_one_request(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > 65536:
                raise Refused(414, "the address is too long")
            if self.parse_request():
                self.answer()
            elif not self.replied:
                raise Refused(400, "an empty line is no request")
        except TimeoutError:
            self.refuse(408, f"a request has {self.server.seconds:g} seconds to come")
        except Refused as error:
            self.refuse(*error.args)

    def answer(self) -> None:
        self.check()
        path = self.path.partition("?")[0]
        if self.command == "POST" and path == "/answer":
            question = self.question()
            with QUESTIONS:
                reply = ask(question)
            return self.reply(200, "application/json", json.dumps(reply))
        if path not in self.server.files and path != "/answer":
            raise Refused(404, f"there is no {path} here")
        if self.command not in ("GET", "HEAD") or path == "/answer":
            raise Refused(405, f"no {self.command} of {path} here")
        self.reply(200, *self.server.files[path])

    def check(self) -> None:
        """That whoever asks is our own page, or no web page."""
        names = [f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")]
        hosts, origins = self.headers.get_all("Host", []), self.headers.get_all("Origin", [])
        if len(hosts) != 1 or hosts[0] not in names:
            raise Refused(421, f"Host must be {names[0]}, got {' and '.join(hosts) or 'none'}")
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            raise Refused(403, f"Origin must be http://{hosts[0]}, got {' and '.join(origins)}")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            if self.command != "GET" or self.headers.get("Sec-Fetch-Mode") != "navigate":  # a link may lead here
                raise Refused(403, "another site's page asks")

    def question(self) -> object:
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a question is application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise Refused(411, "a question says its length")
        if len(length) > 9 or int(length) > LARGEST_QUESTION:
            raise Refused(413, f"a question has at most {LARGEST_QUESTION:,} bytes, got {plain(length, 20)}")
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            raise Refused(400, f"a question of {length} bytes ended after {len(content)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the question is no JSON: {error}") from None

    def reply(self, status: int, kind: str, text: str) -> None:
        content, self.replied = text.encode(), True
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(content),
                            "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
                            "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                            "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
                            "Cross-Origin-Opener-Policy": "same-origin", "Connection": "close"}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def refuse(self, status: int, why: str) -> None:
        self.close_connection = True
        self.reply(status, "text/plain", plain(f"minilora page: {why}") + "\n")

    def send_error(self, code, message=None, explain=None) -> None:
        """What http.server itself refuses."""
        self.refuse(int(code), str(message or "this is no request that is answered here"))

    def log_message(self, format, *args) -> None:
        """A terminal has better things to show, and no stranger's text."""


class Page(ThreadingHTTPServer):
    """The page on this machine. `seconds`: that a request has."""

    daemon_threads = True
    request_queue_size = CONNECTIONS

    def __init__(self, port: int = 0, seconds: float = SECONDS):
        self.seconds, self.room = seconds, threading.Semaphore(CONNECTIONS)
        self.files = {"/": ("text/html", document("served"))}
        self.files |= {f"/{name}": (kind, source(name)) for name, kind in FILES.items()}
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def process_request(self, request, client_address) -> None:
        if not self.room.acquire(blocking=False):
            try:
                request.settimeout(0.1)
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\n\r\n"
                                b"minilora page: too many connections at once\n")
            except OSError:
                pass
            return self.shutdown_request(request)
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request, client_address) -> None:
        """A connection that broke is no matter of the terminal's."""


def serve(port: int = 0, browse: bool = True) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: a port that cannot be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be between 0 (any that is free) and {2**16 - 1}, got {port}")
    try:
        page = Page(port)
    except OSError as error:
        raise ValueError(f"port {port} cannot be had: {error.strerror or error}") from None
    with page:
        print(f"the page is at {page.address} until you press Ctrl-C", flush=True)
        if browse:
            webbrowser.open(page.address)
        page.serve_forever()
