"""``minilora page`` on this machine: what it answers, and everything else, each refused in one line while it lives."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from page_browser import running

from minilora.page.asked import START
from minilora.page.document import document, source
from minilora.page.server import LARGEST_QUESTION, Page, serve

SECONDS = 1.5  # that a request has, here
QUESTION = json.dumps({"state": START})


@pytest.fixture(scope="module")
def page():
    with running(Page(seconds=SECONDS)) as page:
        yield page


def heard(connection: socket.socket) -> bytes:
    """All that is said until the connection ends."""
    got = b""
    try:
        while part := connection.recv(2**16):
            got += part
    except ConnectionResetError:  # it did not wait for the rest of what we sent
        pass
    return got


def send(page, content: bytes, close: bool = False, slowly: float = 0) -> tuple[int, dict[str, str], str]:
    """Status, headers and content of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", page.server_port), timeout=20) as connection:
        try:
            for i in range(0, len(content), 4096 if not slowly else 1):
                connection.sendall(content[i:i + (4096 if not slowly else 1)])
                time.sleep(slowly)
            if close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has heard enough
        got = heard(connection)
    head, _, body = got.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


def request(page, method="GET", path="/", body=None, **headers) -> bytes:
    """A request as a browser would send it, but for what is named."""
    given = {"Host": f"127.0.0.1:{page.server_port}"}
    if body is not None:
        given |= {"Content-Type": "application/json", "Content-Length": str(len(body.encode()))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return ("\r\n".join(lines) + "\r\n\r\n" + (body or "")).encode()


def alive(page) -> bool:
    status, _, body = send(page, request(page, "POST", "/answer", QUESTION))
    return status == 200 and json.loads(body)["json"]["peak"] > 0


def test_it_serves_its_files_and_answers_its_question(page):
    for path, text in {"/": document("served"), "/page.js": source("page.js"), "/page.css": source("page.css"),
                       "/licences.txt": source("licences.txt")}.items():
        status, headers, body = send(page, request(page, "GET", path))
        assert (status, body) == (200, text)
        assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    own = f"http://localhost:{page.server_port}"
    assert send(page, request(page, Host=own[7:], Origin=own, Sec_Fetch_Site="same-origin"))[0] == 200
    assert send(page, request(page, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate"))[0] == 200  # a link
    assert send(page, request(page, "HEAD"))[2] == "" and alive(page)
    assert json.loads(send(page, request(page, "POST", "/answer", '{"state": {"model": "gpt5"}}'))[2])["error"]


PATHS = ["/..", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.js/../server.py", "/server.py",
         "/page.js%00", "/answer/", "/favicon.ico", "/pyodide/pyodide.mjs", "http://127.0.0.1/", "/" + "a" * 60_000, "*",
         "/\x1b[31m", "C:\\windows"]
HOSTS = ["evil.example", "evil.example:80", "127.0.0.1", "localhost", "127.0.0.1:1", "0.0.0.0", "[::1]", "", None,
         "127.0.0.1.evil.example"]
ORIGINS = ["http://evil.example", "null", "https://127.0.0.1", "http://localhost", "file://", "http://127.0.0.1:1", ""]
METHODS = ["PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "BREW"]
BODIES = ["", "{", "[" * 100_000, "9" * 5000, '{"a":' * 50_000, "\x00\xff", "'state'"]
RAW = [b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00" + b"\x00" * 50 + b"\r\n", b"x" * 70_000,
       b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n"]


def hostile(page) -> dict[str, tuple[bytes, bool]]:
    """What is sent, by a name, and whether the sender then stops sending."""
    good = {"Content_Type": "application/json"}
    bad = {f"path {path[:30]!r}": request(page, "GET", path) for path in PATHS}
    bad |= {f"host {host}": request(page, Host=host) for host in HOSTS}
    bad |= {f"origin {origin}": request(page, "POST", "/answer", QUESTION, Origin=origin) for origin in ORIGINS}
    bad |= {f"method {method}": request(page, method) for method in METHODS}
    bad |= {f"body {body[:10]!r}": request(page, "POST", "/answer", body) for body in BODIES}
    bad |= {"get answer": request(page, "GET", "/answer"), "post page": request(page, "POST", "/", QUESTION),
            "form": request(page, "POST", "/answer", "state=", Content_Type="application/x-www-form-urlencoded"),
            "text": request(page, "POST", "/answer", QUESTION, Content_Type="text/plain"),
            "another site": request(page, "POST", "/answer", QUESTION, Sec_Fetch_Site="cross-site"),
            "another site's image": request(page, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors"),
            "huge": request(page, "POST", "/answer", "x" * (LARGEST_QUESTION + 1)),
            "said to be huge": request(page, "POST", "/answer", "{}", Content_Length="9" * 4000),
            "negative": request(page, "POST", "/answer", "{}", Content_Length="-1", **good),
            "without a length": request(page, "POST", "/answer", "{}", Content_Length=None),
            "in chunks": request(page, "POST", "/answer", "2\r\n{}\r\n0\r\n\r\n", Transfer_Encoding="chunked")}
    bad |= {f"raw {content[:20]!r}": content for content in RAW}
    found = {name: (content, False) for name, content in bad.items()}
    return found | {"ends too soon": (request(page, "POST", "/answer", "{}", Content_Length="500"), True)}


def test_each_of_fifty_hostile_requests_is_refused_in_one_line(page):
    requests = hostile(page)
    assert len(requests) >= 50
    for name, (content, close) in requests.items():
        status, headers, body = send(page, content, close)
        assert 400 <= status < 600, name
        assert re.fullmatch(r"minilora page: [ -~]{5,700}\n", body), (name, body)
        assert "Access-Control-Allow-Origin" not in headers
    assert alive(page)


def test_who_sends_slowly_is_cut_off(page):
    start = time.monotonic()
    for content in (request(page, "POST", "/answer", QUESTION), b"GET / HT", request(page)[:-2]):
        status, _, body = send(page, content, slowly=0.05)
        assert status == 408 and body == f"minilora page: a request has {SECONDS:g} seconds to come\n"
    assert time.monotonic() - start < 60 and alive(page)


def test_two_hundred_at_once(page):
    """Most say nothing and hold their connection; who asks properly meanwhile is answered."""
    silent = [socket.create_connection(("127.0.0.1", page.server_port), timeout=20) for _ in range(200)]
    try:
        assert alive(page)
        with ThreadPoolExecutor(50) as pool:
            statuses = list(pool.map(lambda _: send(page, request(page))[0], range(200)))
        assert set(statuses) <= {200, 503} and 200 in statuses
        for connection in silent:
            assert b"minilora page: " in heard(connection)  # too slow, or one too many
    finally:
        for connection in silent:
            connection.close()
    until_gone = time.monotonic() + 20
    while threading.active_count() > 20 and time.monotonic() < until_gone:
        time.sleep(0.05)
    assert threading.active_count() <= 20 and alive(page)


def test_the_command_says_where_it_is_and_ends_quietly():
    program = [sys.executable, "-m", "minilora", "page", "--quiet"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            said = run.stdout.readline()
            port = int(re.fullmatch(r"the page is at http://127\.0\.0\.1:(\d+)/ until you press Ctrl-C\n", said)[1])
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.0 200")
        finally:
            run.terminate()
        assert run.stderr.read() == ""


@pytest.mark.parametrize("port, said", [(-1, "port must be between"), (70_000, "port must be between")])
def test_a_port_that_is_none(port, said):
    with pytest.raises(ValueError, match=said):
        serve(port, browse=False)


def test_a_port_that_is_taken(page):
    with pytest.raises(ValueError, match=f"port {page.server_port} cannot be had"):
        serve(page.server_port, browse=False)
