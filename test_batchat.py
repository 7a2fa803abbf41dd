"""What BATCHAT promises, in the order of README.md, as tests that fail without it.

First come helpers: clients, rooms, servers, screens, a simulated network.
"""

from __future__ import annotations

import base64
import errno
import gc
import hashlib
import inspect
import itertools
import json
import os
import pickle
import random
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.request
import weakref
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import batchat
from batchat import CHATTING, CLOSING, DISCONNECT, Chat, Protocol, Settings, Telnet, Web, clean

BATCHAT = Path(batchat.__file__)
GREETING = f"{batchat.BANNER}\n{Settings().greeting}\n\n{batchat.PROMPT}"
NAME_RULE = "A name has 1 to 24 letters, digits, '_', '-' and '.', and is no IP address."
GOODBYE = "* That was the last try, goodbye!\n"
SHUTTING_DOWN = "* BATCHAT is shutting down, goodbye!\n"
FULL = "* BATCHAT is full, please try again later.\n"
CROWDED = "* Too many people are here from your address, please try again later.\n"
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
PORTS = itertools.count(4321)
ENTER, TAB, UP, DOWN, ESCAPE = "\ue007", "\ue004", "\ue013", "\ue015", "\ue00c"
LONG = "x" * 4000
TIMEOUT = 20  # seconds that a test waits for what must come

# Everyone tries the same examples; CI tries new ones each time (.ci/run sets BATCHAT_PROFILE), and
# does not shrink those that fail, which takes minutes.
ALWAYS = {"deadline": None, "suppress_health_check": list(HealthCheck)}
PHASES = [Phase.explicit, Phase.generate]
settings.register_profile("same", derandomize=True, **ALWAYS)
settings.register_profile("ci", database=None, print_blob=True, phases=PHASES, **ALWAYS)
PROFILE = os.environ.get("BATCHAT_PROFILE", "same")
settings.load_profile(PROFILE)
SIMULATIONS = 1000 if PROFILE == "ci" else 250  # of the network


def cases(names: str, *rows: object, **how) -> pytest.MarkDecorator:
    """Run a test once for each row of a table."""
    return pytest.mark.parametrize(names, rows, **how)


# ------------
# Those who help

def messages_of(protocol: Protocol, *reads: bytes) -> tuple[list, bytes]:
    """What a protocol makes of these reads: messages up to DISCONNECT, and answers."""
    messages: list = []
    for read in reads:
        protocol.feed(read)
        while messages[-1:] != [DISCONNECT]:
            message = protocol.next()
            if message is None:
                break
            messages.append(message)
    return messages, protocol.replies


def telnet(*reads: bytes) -> tuple[list, bytes]:
    return messages_of(Telnet(), *reads)


def heard(*reads: bytes) -> list:
    return telnet(*reads)[0]


def typed_in_telnet(text: str) -> bytes:
    """What BSD's telnet and its heirs send for what was typed, before BINARY is agreed upon."""
    typed = bytearray()
    for byte in text.encode():
        # They look at every byte without its eighth bit.
        key = KEYS_OF_TELNET.get(byte & 0x7F) if byte & 0x80 else None
        typed += bytes([255, key, 255, 253, 6]) if key else bytes([byte])
    return bytes(typed).replace(b"\n", b"\r\n")


# Ctrl-C IP, Ctrl-D EOF, Ctrl-H EC, Ctrl-O AO, Ctrl-T AYT, Ctrl-U EL, Ctrl-Z SUSP, Ctrl-\\ ABORT
KEYS_OF_TELNET = {3: 244, 4: 236, 8: 247, 15: 245, 20: 246, 21: 248, 26: 237, 28: 238}
ASKS_FOR_BINARY = b"\xff\xfd\0\xff\xfb\0"


def crlf(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` as it may arrive: in pieces."""
    places = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(places, places[1:]) if a < b]


HANDSHAKE = {
    "Host": "chat.example:1338", "Upgrade": "websocket", "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13",
    "Origin": "http://chat.example:1338",
}


def request(changes: dict[str, str | None], line="GET /chat HTTP/1.1") -> bytes:
    """The head of a request with a handshake's headers; a change of None leaves one out."""
    headers = {**HANDSHAKE, **changes}
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode()


OPENING = request({})


def forwarded(addresses: str | None, line="GET /chat HTTP/1.1") -> bytes:
    return request({"X-Forwarded-For": addresses}, line)


def asked(head: bytes) -> tuple[int, dict[str, str], bytes]:
    """What a request gets: the status, the headers, the body."""
    _, reply = messages_of(Web(), head)
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def masked(opcode: int, payload: bytes, final=True, key=b"\x37\xfa\x21\x3d") -> bytes:
    """A frame as a client sends it."""
    whole = batchat.encode_frame(opcode, payload)
    size = len(whole) - len(payload)
    head = bytes([whole[0] & (0xFF if final else 0x7F), whole[1] | 0x80]) + whole[2:size]
    return head + key + bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


def frames_of(data: bytes) -> list[tuple[int, bytes]]:
    """The frames that a server sent, which must be whole: first bytes and payloads."""
    frames = []
    while data:
        size, head = data[1], 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[2:head], "big")
        assert len(data) >= head + size
        frames.append((data[0], data[head : head + size]))
        data = data[head + size :]
    return frames


def sent(*frames: bytes) -> tuple[list, list]:
    """What comes of frames in an open WebSocket: events, and frames in answer."""
    messages, replies = messages_of(Web(), OPENING + b"".join(frames))
    assert messages[0] == batchat.OPENED
    return messages[1:], frames_of(replies.partition(b"\r\n\r\n")[2])


def events_in(data: bytes) -> list[dict]:
    data = data.partition(b"\r\n\r\n")[2] if data.startswith(b"HTTP") else data
    return [json.loads(payload) for kind, payload in frames_of(data) if kind == 0x81]


class Guest(batchat.Client):
    """Somebody in a chat without sockets."""

    def __init__(self, chat: Chat, host="127.0.0.1", protocol=Telnet):
        super().__init__(f"{host} port {next(PORTS)}", chat.logs[protocol], chat.limiter.clock.now)
        self.chat = chat
        if protocol is Web:
            messages_of(self.protocol, OPENING)
            self.protocol.replies = b""
        chat.limiter.add(self, host)
        chat.greet(self)

    def types(self, *lines: batchat.Received):
        for line in lines:
            if self.state is not CLOSING:
                self.chat.handle(self, line)

    def read(self) -> str:
        """What was shown since the last look; on the WebSocket, one line for each event."""
        with self.outbox.pending() as pending:
            shown = bytes(pending)
        self.outbox.advance(len(shown))
        if self.outbox.log.protocol_class is Web:
            return "".join(f"{text.decode()}\n" for kind, text in frames_of(shown) if kind == 0x81)
        return shown.decode().replace("\r\n", "\n")

    def expect(self, text: str):
        assert self.read() == text


class Room:
    def __init__(self, **settings):
        clock = batchat.Clock(lambda: 0.0)
        clock.wall_time = 0
        self.limiter = batchat.Limiter(Settings(**settings), clock)
        self.chat = Chat((Telnet, Web), self.limiter)
        self.guests: list[Guest] = []

    def wait(self, seconds: float):
        self.limiter.clock.now += seconds
        self.limiter.tick()

    def newcomer(self, *lines: str, **where) -> Guest:
        """Somebody who was asked for a name, and has typed these lines."""
        guest = Guest(self.chat, **where)
        guest.read()
        guest.types(*lines)
        return guest

    def join(self, name: str, host="127.0.0.1", protocol=Telnet) -> Guest:
        guest = self.newcomer(name, host=host, protocol=protocol)
        assert guest.state is CHATTING
        self.guests.append(guest)
        for each in self.guests:
            each.read()
        return guest


@pytest.fixture
def room() -> Room:
    return Room()


HELP = """
* /help                 show this list
* /who                  show who is here
* /me ACTION            say what you do: /me waves
* /msg NAME TEXT        say something to one person alone
* /nick NAME            change your name
* /ignore NAME          hide what somebody says, or show it again
* /quit                 leave the chat
* //TEXT                say a line that starts with a slash
"""[1:]


def hey(name: str) -> str:
    return f"Hey, {name}! Hope you enjoy the chat.\n\n"


class House(AbstractContextManager):
    """A reactor over real sockets; a test runs it, and moves its clock."""

    def __init__(self, kind: type[selectors.BaseSelector], **limits: int):
        self.now = 1000.0
        listeners = {socket.create_server(("127.0.0.1", 0)): each for each in (Telnet, Web)}
        self.addresses = {each: listener.getsockname() for listener, each in listeners.items()}
        self.reactor = batchat.Reactor(listeners, Settings(**limits), kind(), lambda: self.now)
        self.reactor._select_timeout = lambda: 0
        self.newcomers: list[RealPeer] = []

    def connects(self, sends: bytes, protocol=Telnet, buffer=0) -> RealPeer:
        self.newcomers.append(RealPeer(self.addresses[protocol], protocol, buffer))
        self.newcomers[-1].sock.send(sends)
        return self.newcomers[-1]

    def run_once(self):
        self.reactor.run_once()
        for newcomer in self.newcomers:
            newcomer.receives()

    def wait(self, seconds=0):
        """Let time pass, and run until nothing more happens."""
        self.now += seconds
        for _ in range(50):
            self.run_once()

    def __exit__(self, *_):
        for each in [*self.newcomers, *self.reactor.clients]:
            each.sock.close()
        for listener in self.reactor.listeners:
            listener.close()
        self.reactor.selector.close()


class RealPeer:
    """Somebody at the other end of a real socket, perhaps with a small receive `buffer`."""

    def __init__(self, address: tuple, protocol: type[Protocol], buffer: int):
        self.protocol = protocol
        self.sock = socket.socket()
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.connect(address)
        self.sock.setblocking(False)
        self.got = bytearray()
        self.reading = True

    def receives(self):
        if self.reading and self.sock.fileno() >= 0:
            try:
                data = self.sock.recv(1 << 20)
            except BlockingIOError:
                return  # nothing there yet
            except ConnectionResetError:
                data = b""
            self.got += data
            if not data:
                self.sock.close()


@pytest.fixture(params=[selectors.DefaultSelector, selectors.SelectSelector])
def houses(request):
    """Makes houses; once with the best selector of the system, once with the least."""
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(House(request.param, **limits))


@pytest.fixture
def our_end(houses) -> socket.socket:
    """Our end of somebody's line."""
    house = houses()
    house.connects(b"mike\n")
    house.wait()
    return next(iter(house.reactor.clients)).sock


def assert_nothing_is_kept(reactor: batchat.Reactor):
    quotas = [reactor.limiter.server_quota, *reactor.limiter.quotas.values()]
    kept = [reactor.clients, reactor.with_input, reactor.blocked]
    kept += [reactor.chat.people, reactor.chat._ignorers]
    kept += [each.connection_count for each in quotas] + [each.departing for each in quotas]
    assert not any([*kept, *(log.readers for log in reactor.chat.logs.values())])


def command_line(*options: str, descriptors=0, first="") -> list[str]:
    """How to start it, perhaps after a `first` command of the shell."""
    command = [sys.executable, str(BATCHAT), *options]
    if descriptors:
        first = f"ulimit -n {descriptors}"
    return ["sh", "-c", f'{first}; exec "$@"', "sh", *command] if first else command


def run(*command: str, **how) -> subprocess.CompletedProcess[str]:
    how = {"capture_output": True, "text": True, "timeout": TIMEOUT, **how}
    return subprocess.run(command, check=False, **how)


class Server(AbstractContextManager):
    """`python batchat.py` in a process of its own, on free ports."""

    def __init__(
        self, *options: str, ports="--port 0 --web-port 0", descriptors=0, first="", **how
    ):
        command = command_line(*ports.split(), *options, descriptors=descriptors, first=first)
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
        self.process = subprocess.Popen(command, **how)
        self.opening_line = self.process.stdout.readline() + self.process.stdout.readline()
        self.port = int(re.search(r"port (\d+)", self.opening_line)[1])
        web = re.search(r"http://.*:(\d+)/", self.opening_line)
        self.web_port = int(web[1]) if web else 0

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def connect(self, host="127.0.0.1") -> Line:
        return Line(socket.create_connection((host, self.port), timeout=TIMEOUT))

    def join(self, name: str, host="127.0.0.1") -> Line:
        line = self.connect(host)
        line.types(name)
        line.expect(GREETING + hey(name))
        return line

    def ends(self) -> tuple[int, str]:
        """Wait for its end; returns its exit status and what it wrote to standard error."""
        _, log = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, log


@pytest.fixture
def server():
    with Server() as server:
        yield server


class Line(AbstractContextManager):
    """A plain blocking socket, whose every byte is accounted for."""

    def __init__(self, sock: socket.socket):
        self.sock = sock

    def __exit__(self, *_):
        self.sock.close()

    def types(self, *lines: str):
        self.sock.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def expect(self, text: str):
        """Wait for this text; nothing else may come before it."""
        expected, got = crlf(text), b""
        while len(got) < len(expected):
            more = self.sock.recv(len(expected) - len(got))
            got += more or pytest.fail(f"the line ended after {got!r}")
        assert got == expected

    def rest(self) -> str:
        """All that still comes, up to the end; then hang up."""
        with self.sock:
            return b"".join(iter(lambda: self.sock.recv(4096), b"")).decode()


def wait_until(condition, wanted=""):
    """Wait for what happens in other processes."""
    give_up = time.monotonic() + 3 * TIMEOUT
    while True:
        with suppress(OSError):
            if condition():
                return
        assert time.monotonic() < give_up, f"waited in vain {wanted}"
        time.sleep(0.01)


class Terminal(AbstractContextManager):
    """A real telnet on a pseudo-terminal."""

    def __init__(self, port: int, *options: str):
        import pty

        self.process, self.screen = pty.fork()
        if not self.process:
            os.environ["LC_ALL"] = "C.UTF-8"
            os.execvp("telnet", ["telnet", *options, "127.0.0.1", str(port)])
        os.set_blocking(self.screen, False)
        self.seen = b""
        self.shows("Connected to 127.0.0.1.\n")

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.screen)

    def join(self, name: str):
        self.shows(batchat.PROMPT)
        self.types(f"{name}\n")
        self.shows(hey(name))

    def types(self, keys: str):
        os.write(self.screen, keys.encode())

    def shows(self, text: str):
        """Wait for this text on the screen, and forget all up to it."""
        wanted = crlf(text)

        def is_there() -> bool:
            with suppress(OSError):  # nothing is there yet, or telnet has ended
                self.seen += os.read(self.screen, 4096)
            return wanted in self.seen

        wait_until(is_there, text)
        self.seen = self.seen.partition(wanted)[2]


class Chromium(AbstractContextManager):
    """A real browser, driven through chromedriver (W3C WebDriver)."""

    ARGUMENTS = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
        " disable-background-networking disable-component-update disable-dev-shm-usage"
        " window-size=800,500"
    )

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], **SILENT)
        self.path = f"http://127.0.0.1:{port}"
        wait_until(lambda: self._ask("GET", "/status")["ready"])
        options = {
            "goog:chromeOptions": {"args": [f"--{each}" for each in self.ARGUMENTS.split()]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._ask("POST", "/session", capabilities={"alwaysMatch": options})
        self.path += "/session/" + session["sessionId"]

    def __exit__(self, *_):
        with suppress(OSError):
            self._ask("DELETE", "")
        self.driver.kill()
        self.driver.wait()

    def _ask(self, method: str, path: str, **body: object):
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.path + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def loads(self, server: Server):
        """Load a server's page, which knows nothing of an earlier one."""
        self.does("if (location.protocol === 'http:') sessionStorage.clear()")
        self._ask("POST", "/url", url=f"http://localhost:{server.web_port}/")
        self.complaints()  # about what was open before

    def opens(self, server: Server):
        """The same, and wait until it asks for a name."""
        self.loads(server)
        self.gives("state === 'awaitingName' && document.activeElement === input")

    def joins(self, server: Server, name: str):
        self.opens(server)
        self.enters(name)
        self.gives("state === 'chatting'")

    def reloads(self):
        self._ask("POST", "/refresh")
        self.gives("document.activeElement === input")

    def receives(self, *events: dict):
        self.does(f"for (const event of {json.dumps(events)}) receive(event)")

    def lines(self, inside="#lines") -> list[str]:
        """The lines on the screen, without their times."""
        time = "it.querySelector('time')?.textContent.length"
        return self.finds(f"{inside} p", f"textContent.slice({time})")

    def does(self, script: str):
        return self._ask("POST", "/execute/sync", script=script, args=[])

    def gives(self, expression: str, value: object = True):
        """Wait until an expression has a value."""
        got, give_up = None, time.monotonic() + 3 * TIMEOUT
        while got != value and time.monotonic() < give_up:
            with suppress(OSError):  # for as long as it cannot be evaluated
                got = self.does("return " + expression)
        assert got == value, expression

    def shows(self, text: str):
        self.gives(f"document.body.innerText.includes({json.dumps(text)})")

    def finds(self, selector: str, what: str) -> list:
        """Something of all that a CSS selector finds on the page."""
        return self.does(
            f"return [...document.querySelectorAll('{selector}')].map(it => it.{what})"
        )

    def types(self, text: str):
        """Press keys, wherever the keyboard is."""
        keys = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": keys}])

    def enters(self, *lines: str):
        self.types("".join(line + ENTER for line in lines))

    def emulates(self, command: str, **how: object):
        self._ask("POST", "/goog/cdp/execute", cmd=command, params=how)

    def sized(self, width: int, height: int, mobile=False):
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.emulates("Emulation.setDeviceMetricsOverride", **how)

    def complaints(self) -> list[str]:
        """What its console has said since the last look."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", type="browser")]


@pytest.fixture(scope="module")
def mike():
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not installed")
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_server():
    with Server() as server:
        yield server


@pytest.fixture
def jonny(mike, page_server):
    """Somebody with telnet, in a room with mike, who is in Chromium."""
    mike.joins(page_server, "mike")
    with page_server.join("jonny") as jonny:
        mike.shows("* jonny has joined the chat")
        yield jonny


# ------------
# A simulated network

# The real reactor, chat and protocols run on sockets, a selector and a clock that are stricter
# and less reliable than real ones.  A model takes what is shown from the calls of the real Chat
# (publish, send_raw, disconnect), and decides by itself which peers must be sent it, in which
# order and until when.  After each iteration the two are compared.

# Limits so small that a few lines reach them.
SMALL_LIMITS = {
    "LINE_BYTES_LIMIT": 100, "HISTORY_BYTES_LIMIT": 500, "BANS_LIMIT": 2, "ACCEPT_BATCH": 2,
    "SPLICE_LAG": 16, "LAG_LIMIT": 2048, "PRIVATE_LIMIT_FOR_WHISPERS": 512,
    "PRIVATE_LIMIT_FOR_INPUT": 1024, "SERVER_SPARE_PLACES": 2, "SOURCE_SPARE_PLACES": 2,
    "READ_SIZE": 4096, "READ_AHEAD": 6000, "BYTES_PER_TOKEN": 128,
}
PASSWORD = "sesame"
UNLIMITED = NEVER = batchat.NEVER
START = 1000.0  # on the clock
# System calls for one connection whose failure ends it; a failure of `send` may be temporary.
CALLS = ["setblocking", "register", "unregister", "recv", "close"]
OURS = -1  # an "errno" that stands for an error in the server itself


class OurError(Exception):
    """An error in the server itself, which a test has planted."""


class Peer:
    """A simulated client, the network up to it, and what the model knows about it."""

    connection: batchat.Client  # since it was accepted
    deadline = NEVER  # when its last state would have ended

    def __init__(self, world: World, protocol: type[Protocol], host: str, low_water: int):
        self.world, self.protocol, self.host = world, protocol, host
        # The client and the network
        self.typed = self.arrived = b""  # sent to the server: all; what it has not read yet
        self.ended = False  # the client sends nothing more
        self.broken = 0  # the errno that the server is told once
        self.low_water = low_water  # bytes that must fit before the selector reports it
        self.room = UNLIMITED  # bytes that the buffers on the way still take
        self.speed = 0  # bytes a second that the client reads, where that is limited
        self.is_full = False  # the server could not send everything
        self.got = bytearray()  # everything that the server has sent
        self.looked_at = 0  # how many bytes of it a test has seen
        self.send_error = self.sends_to_fail = 0  # what the next sends fail with; how many
        self.sock = SimulatedSocket(self)
        self.faults = self.sock.faults
        # The model
        self.stage = "queued"  # then "naming", "chatting", "closing"
        self.expected = bytearray()  # everything that must be sent
        self.ignored: set[Peer] = set()
        self.messages: list = []  # what the server made of what was typed
        self.why = ""  # the reason for disconnecting
        self.untaken = self.waited = 0  # bytes that the server has to take; iterations without it

    def types(self, *lines: str):
        self.type(b"".join(line_on(self.protocol, line) for line in lines))

    def read(self) -> str:
        """What was shown since the last look; events as telnet shows them."""
        got, self.looked_at = bytes(self.got[self.looked_at :]), len(self.got)
        if self.protocol is Web:
            return "".join(map(batchat.render_text, events_in(got)))
        return got.decode().replace("\r\n", "\n")

    def expect(self, text: str):
        assert self.read() == text

    def type(self, data: bytes):
        if not (self.ended or self.broken):
            self.typed += data
            self.arrived += data

    def says(self, line: str, times=1):
        self.types(*[line] * times)

    def sends(self, data: tuple[bytes, bytes]):
        self.type(data[self.protocol is Web])

    def accepts(self, room: int, speed=0):
        """From now on, the client reads so many bytes, and then so many a second."""
        self.room = room if self.room == UNLIMITED else max(room, self.room)  # no buffer shrinks
        self.speed = speed

    def ends(self):
        self.ended = True

    def break_down(self, error: int, loses=False):
        """Perhaps what the server has not read yet is lost, too."""
        if self.stage != "queued":
            self.broken = self.broken or error
            if loses:
                self.typed = self.typed[: len(self.typed) - len(self.arrived)]
                self.arrived = b""

    def call_fails(self, call: str, error: int):
        self.faults[call] = error

    def send_fails(self, error: int, times: int):
        self.send_error, self.sends_to_fail = error, times

    # The model
    def must_be_sent(self, data: bytes):
        if not self.sock.error_seen:
            self.expected += data

    @property
    def unsent(self) -> int:
        return 0 if self.sock.error_seen else len(self.expected) - len(self.got)

    @property
    def is_here(self) -> bool:
        return not self.sock.closed and self.stage not in ("queued", "closing")

    @property
    def departs(self) -> bool:
        over_limit = self.connection.over_limit_code != ""
        return over_limit or self.sock.error_seen or self.stage == "closing"

    @property
    def may_be_dropped(self) -> dict[str, bool]:
        """Reasons why the server ends a connection by itself, and whether they apply."""
        world, sock = self.world, self.sock
        over = world.now > min(self.deadline, self.connection.deadline) - 1e-6
        crowd = sum(each.departs for each in world.open)
        return {
            os.strerror(self.broken): sock.error_seen and self.broken != 0,
            os.strerror(sock.failed): sock.failed > 0,
            "an internal error": sock.failed == OURS, "timeout": over and not sock.error_seen,
            "took too long": over and (sock.error_seen or self.stage == "closing"),
            "too far behind": self.connection.outbox.lag > batchat.LAG_LIMIT,
            "too many connections": self.departs and crowd > batchat.SERVER_SPARE_PLACES,
            "shutdown": world.reactor.ends_at != NEVER,
        }


class SimulatedFile:
    """A socket that fails a test where a real one may not complain."""

    def __init__(self, world: World):
        self.world = world
        self.faults: dict[str, int] = {}  # what the next call of a kind fails with
        self.failed = 0  # the errno of a call that failed
        self.closed = False

    def call(self, name: str):
        """How each call begins: it may fail, once, at any time."""
        assert not self.closed, name
        self.world.work += 1
        error = self.faults.pop(name, 0)
        if error:
            self.world.reached[name + " fails"] += 1
            self.failed = error
            raise OurError if error == OURS else OSError(error, os.strerror(error))

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1337

    def setblocking(self, blocking: bool):
        assert not blocking
        self.call("setblocking")

    def close(self):
        try:
            self.call("close")
        finally:
            self.closed = True


class SimulatedSocket(SimulatedFile):
    """The server's end of a connection."""

    def __init__(self, peer: Peer):
        super().__init__(peer.world)
        self.peer = peer
        self.end_seen = False  # the server knows that the peer sends nothing more
        self.error_seen = False  # it knows that the connection is broken, or has given it up
        self.shut = False

    def setblocking(self, blocking: bool):
        *_, self.peer.connection = self.world.reactor.clients
        super().setblocking(blocking)

    def setsockopt(self, *option: int):
        self.call("setsockopt")
        raise OSError(errno.ENOPROTOOPT, "a kernel that has none of them")

    def getsockopt(self, *_option: int) -> int:
        return self.see_error() if self.peer.broken else 0

    def ready(self) -> int:
        peer = self.peer
        readable = bool(peer.arrived or peer.ended or peer.broken)
        writable = bool(peer.broken or peer.room >= peer.low_water)
        return readable * selectors.EVENT_READ | writable * selectors.EVENT_WRITE

    def see_error(self) -> int:
        """The errno of a broken connection, which the server is told once."""
        told, self.error_seen = self.error_seen, True
        return 0 if told else self.peer.broken

    def recv(self, most: int) -> bytes:
        peer, world = self.peer, self.world
        assert most <= batchat.READ_SIZE
        try:
            self.call("recv")
        except OSError as error:  # the same as a reset: what the server has read is still said
            self.failed, self.end_seen = 0, True
            peer.break_down(error.errno, loses=True)
            self.see_error()
            raise
        most = min(most, world.segment)
        data, peer.arrived = peer.arrived[:most], peer.arrived[most:]
        if data:
            return data
        if peer.broken and not self.error_seen:
            self.end_seen = True
            raise OSError(self.see_error(), os.strerror(peer.broken))
        if not peer.ended and not self.error_seen:
            world.work -= 1
            raise BlockingIOError
        assert not self.end_seen, "read after the end"
        self.end_seen = True
        return b""

    def send(self, data: memoryview) -> int:
        peer = self.peer
        assert len(data) and not self.closed and not self.shut
        if peer.broken:
            error = self.see_error() or errno.EPIPE
            raise OSError(error, os.strerror(error))
        if peer.sends_to_fail:
            peer.sends_to_fail -= 1
            raise OSError(peer.send_error, os.strerror(peer.send_error))
        assert not self.error_seen, "sent after a gap"
        assert peer.expected.startswith(data, len(peer.got)), "sent what must not be sent"
        taken = min(peer.room, len(data))
        peer.is_full = taken < len(data)
        if not taken:
            raise BlockingIOError
        self.world.work += 1
        peer.room -= taken
        peer.got += data[:taken]
        return taken

    def shutdown(self, how: int):
        self.world.work += 1
        if how == socket.SHUT_RDWR:
            self.see_error()
        if self.peer.broken:
            raise OSError(errno.ENOTCONN, "nobody is there")
        self.shut = True
        self.peer.ended |= how == socket.SHUT_RDWR or self.world.polite

    def close(self):
        peer, dropped = self.peer, ("took too long", "too far behind", "too many connections")
        done = self.end_seen and not peer.unsent
        assert done or peer.why in dropped or any(peer.may_be_dropped.values()), "without a reason"
        super().close()


class SimulatedListener(SimulatedFile):
    """A socket that listens; or that tells the server to stop."""

    def __init__(self, world: World):
        super().__init__(world)
        self.waiting: list = []
        self.error = self.fails_until = 0.0  # what accept fails with, and registering it

    def call(self, name: str):
        if name in ("accept", "register") and self.world.now < self.fails_until:
            self.faults[name] = self.error
        super().call(name)

    def ready(self) -> int:
        return selectors.EVENT_READ if self.waiting else 0

    def accept(self) -> tuple[SimulatedSocket, tuple]:
        self.call("accept")
        if not self.waiting:
            self.world.work -= 1
            raise BlockingIOError
        peer = self.waiting.pop(0)
        peer.stage = "naming"
        return peer.sock, (peer.host, next(PORTS), 0, 0)


class SimulatedSelector:
    """As strict as epoll; when a call fails, the socket is no longer registered."""

    def __init__(self, world: World):
        self.world = world
        self.keys: dict = {}

    def register(self, sock, events: int, data=None):
        assert sock not in self.keys and not sock.closed
        sock.call("register")
        self.keys[sock] = selectors.SelectorKey(sock, 0, events, data)

    def unregister(self, sock):
        assert not sock.closed
        del self.keys[sock]
        sock.call("unregister")

    def get_map(self) -> dict:
        return self.keys

    def _ready(self) -> list:
        ready = [(key, key.fileobj.ready() & key.events) for key in self.keys.values()]
        return [(key, events) for key, events in ready if events]

    def select(self, timeout: float) -> list:
        while timeout > 0 and not self._ready() and not self.world.woken:
            timeout -= self.world.sleep(timeout)
        ready, world = self._ready(), self.world
        # What the server does not know until select returns
        world.late_by, world.jump = world.jump, 0.0
        world.pass_by(world.late_by + 1e-9)  # no system wakes anybody too early
        return ready


class WatchedReactor(batchat.Reactor):
    """The real reactor, and what must be so in each of its iterations."""

    def progress(self) -> tuple[int, int]:
        """What changes in each iteration that does something."""
        return self.world.work, sum(len(each.read_buffer) for each in self.clients)

    def run_once(self):
        world, began_at, before = self.world, self.world.now, self.progress()
        world.iterations += 1
        world.pass_by(world.drift)
        world.woken, world.was_paused = False, self.is_paused
        super().run_once()
        busy = self.progress() != before or world.woken
        world.idle = [] if busy else [*world.idle[-4:], world.now]
        assert len(world.idle) < 5 or world.now > world.idle[-5] + 1e-3, "the event loop spins"
        world.paused_seconds += (world.now - world.late_by - began_at) * world.was_paused
        world.check()

    def _close(self, client):
        client.sock.peer.deadline = client.deadline
        super()._close(client)


class WatchedChat(Chat):
    """The real chat; the model notes what anybody must be sent."""

    speaker: Peer | None = None  # whose message is being handled

    def handle(self, person, message):
        world, peer = self.world, person.sock.peer
        assert peer.is_here
        assert not world.was_paused or message is DISCONNECT
        self.speaker = peer
        world.work += 1
        world.spent.update([peer, self.limiter.source_for(person.address)])
        peer.messages.append(message)
        peer.waited = 0
        ignore = re.fullmatch(r"/ignore (\w+)", message) if isinstance(message, str) else None
        if ignore and peer.stage == "chatting":
            key = batchat.name_key(ignore[1])
            others = {p for p in world.inside if batchat.name_key(p.connection.name) == key}
            peer.ignored ^= others - {peer}
        super().handle(person, message)
        self.speaker = None

    def send_raw(self, person, data: bytes):
        person.sock.peer.must_be_sent(data)
        super().send_raw(person, data)

    def publish(self, kind: str, person, **fields):
        before = {log: log.end for log in self.logs.values()}
        super().publish(kind, person, **fields)
        who, most = person.sock.peer, 2 * batchat.LAG_LIMIT + 4 * (batchat.LINE_BYTES_LIMIT + 100)
        assert all(len(log.data) < most for log in before)
        data = {log.protocol_class: bytes(log.data[at - log.start :]) for log, at in before.items()}
        for peer in self.world.inside:
            own = peer is who and peer.protocol is Telnet
            if kind not in ("said", "did") or not (own or who in peer.ignored):
                peer.must_be_sent(data[peer.protocol])
        self.world.reached[kind] += 1
        if kind == "joined":
            who.stage = "chatting"

    def start_closing(self, person, code="", reason="", **fields: str):
        peer, why = person.sock.peer, reason or code
        asked = self.speaker or person.state is batchat.CONNECTING
        assert peer.may_be_dropped.get(why, asked), why
        self.world.reached[why] += 1
        peer.why, peer.stage = why, "closing"
        super().start_closing(person, code, reason, **fields)


class World:
    """The server, its clients, the network between them, and the model."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.now = START
        self.drift = 0.0  # seconds that each iteration takes
        self.jump = 0.0  # seconds that the server oversleeps next time
        self.late_by = 0.0  # seconds by which it overslept this time
        self.polite = False  # peers close as soon as the server does
        self.budget = 0.0  # seconds that the server may sleep before the next step
        self.woken = False  # by the next step, not by what it waited for
        self.iterations = 0
        self.work = 0  # what was done so far, in calls and messages
        self.idle: list[float] = []  # when nothing was done in the last iterations
        self.paused_seconds = 0.0  # in all, but for those that it overslept
        self.reached: Counter[str] = Counter()  # what came about, of what seldom does
        self.spent: Counter = Counter()  # tokens, by person and by address
        self.segment = UNLIMITED  # bytes that one recv returns, at most
        self.stopped_at = NEVER
        self.peers: list[Peer] = []
        self.listeners = {Telnet: SimulatedListener(self), Web: SimulatedListener(self)}
        self.selector = SimulatedSelector(self)
        listeners = {listener: protocol for protocol, listener in self.listeners.items()}
        self.reactor = WatchedReactor(listeners, settings, self.selector, lambda: self.now)
        self.reactor.world = self
        self.reactor.chat = WatchedChat(self.listeners, self.reactor.limiter)
        self.reactor.chat.world = self

    def connects(self, protocol=Telnet, host="127.0.0.1", low_water=1, opens=True) -> Peer:
        through_proxy = host.startswith("for ")
        peer = Peer(self, protocol, "127.0.0.1" if through_proxy else host, low_water)
        self.peers.append(peer)
        self.listeners[protocol].waiting.append(peer)
        if protocol is Web and opens:
            peer.type(forwarded(host[4:]) if through_proxy else OPENING)
        return peer

    def joins(self, name: str, *newcomer, **more) -> Peer:
        peer = self.connects(*newcomer, **more)
        peer.types(name)
        return peer

    def wait(self, seconds=0.01):
        """Let time pass; the server does all that it has to do."""
        self.budget, self.segment, self.woken = seconds, UNLIMITED, False
        for _ in range(10_000):
            if self.woken:
                return
            self.reactor.run_once()
        raise AssertionError("the event loop never waits")

    def take(self, step: str, *how):
        """Take a step of the world, or of somebody who is connected."""
        if not hasattr(Peer, step):
            getattr(self, step)(*how)
            return
        number, *how = how
        peers = [p for p in self.peers if not p.sock.closed]
        if peers:
            getattr(peers[-1 - number % len(peers)], step)(*how)

    def floods(self, number: int, line: str, other: int, room: int, speed: int):
        """One says a lot, and one reads slowly; both may be the same."""
        self.take("accepts", other, room, speed)
        self.take("says", number, line, 70)

    def listener_fails(self, protocol, error: int):
        listener = self.listeners[protocol]
        listener.error, listener.fails_until = error, self.now + 1.5

    def run_once(self, times=1, segment=UNLIMITED):
        self.segment = segment
        for _ in range(times):
            self.budget = 0.0
            self.reactor.run_once()

    def jumps(self, seconds: float):
        """The next iteration comes late: the machine was busy, or suspended."""
        self.jump = seconds

    def sleep(self, timeout: float) -> float:
        """Let some time pass, `timeout` at most; returns the seconds."""
        for each in self.open:
            assert each.room < each.low_water or not each.unsent, "it sleeps, though it could send"
        slow = any(each.speed and each.is_full and not each.broken for each in self.open)
        seconds = min(timeout, self.budget, 0.1 if slow else NEVER)
        self.woken = seconds == self.budget < timeout
        self.budget -= seconds
        self.pass_by(seconds)
        return seconds

    def pass_by(self, seconds: float):
        self.now += seconds
        for peer in self.peers:
            if peer.speed and peer.is_full:
                peer.room += int(peer.speed * seconds)

    # The model, and what must be so after each iteration
    @property
    def inside(self) -> list[Peer]:
        return [each for each in self.peers if each.stage == "chatting"]

    @property
    def open(self) -> list[Peer]:
        return [each for each in self.peers if each.stage != "queued" and not each.sock.closed]

    def check(self):
        reactor, people = self.reactor, self.reactor.chat.people
        assert {*reactor.clients} == {each.connection for each in self.open}
        assert {*people.values()} == {each.connection for each in self.inside}
        assert len(people) <= self.settings.max_people or not self.settings.max_people
        for log in reactor.chat.logs.values():
            if log.broadcast_end == log.end:  # else more was published since
                lags = [each.outbox.lag for each in reactor.clients if each.outbox.log is log]
                assert len(log.data) <= max([0, *lags]), "more of the log is kept than is needed"
        self.check_limits()
        late = [p for p in self.open if p.connection.outbox.lag > batchat.LAG_LIMIT]
        assert reactor.is_paused == bool(late)
        self.reached["paused"] += reactor.is_paused
        share = batchat.STALL_RECOVERY / (1 + batchat.STALL_RECOVERY)
        budget = batchat.STALL_BUDGET_SECONDS + share * (self.now - START)
        assert self.paused_seconds <= budget + 1e-3
        for peer in self.open:
            self.check_connection(peer, peer.connection)

    def check_limits(self):
        """How many are connected, and how much each and each address may say."""
        limiter, rate = self.reactor.limiter, self.settings.rate
        for quota in [limiter.server_quota, *limiter.quotas.values()]:
            whole = quota is limiter.server_quota
            here = [p for p in self.open if whole or quota is p.connection.source_quota]
            departing = {each.connection for each in here if each.departs}
            assert (quota.connection_count, {*quota.departing}) == (len(here), departing)
            if quota.limit:
                assert len(here) - len(departing) <= quota.limit
                assert len(here) <= quota.limit + quota.spare_places + 1
        for who, tokens in self.spent.items() if rate else ():
            share = 1 if isinstance(who, Peer) else batchat.SOURCE_RATE_FACTOR
            share *= batchat.LOCALHOST_RATE_FACTOR if who == batchat.LOCALHOST else 1
            assert tokens <= rate * share * (self.now - START + batchat.BURST_SECONDS) + 1

    def check_connection(self, peer: Peer, connection: batchat.Client):
        assert not peer.sock.failed, "a call failed, and nothing came of it"
        assert not connection.lost_reason or connection.outbox.is_discarding
        log, reactor = connection.outbox.log, self.reactor
        if connection not in reactor.chat.to_reconcile and log.broadcast_end == log.end:
            assert connection.outbox.has_pending == (connection in reactor.blocked)
            assert connection.state is not CLOSING or connection not in reactor.with_input
        late = self.now - self.late_by - connection.deadline
        assert late <= batchat.TICK_SECONDS + 0.1, "out of time"
        outbox = connection.outbox
        most = len(outbox.log.data) + len(outbox.splices) * batchat.SPLICE_LAG
        assert outbox.lag <= most, "private lines are no lag"
        buckets = [connection.bucket, connection.source_quota.bucket]
        paced = max(each.ready_at for each in buckets) > self.now and self.settings.rate > 0
        self.reached["paced"] += paced
        waits = self.was_paused or self.reactor.is_paused or paced
        waits |= outbox.private_size > batchat.PRIVATE_LIMIT_FOR_INPUT
        waits |= connection.virtual_time > self.now  # others come first for a while
        before, peer.untaken = peer.untaken, len(peer.arrived) + len(connection.read_buffer)
        peer.waited = 0 if waits or not peer.untaken >= before > 0 else peer.waited + 1
        # Each of those who are ready may take as much as fits into one iteration.
        assert peer.waited <= len(self.reactor.clients) + 1, "read too late"

    # In the end
    def drain(self):
        """Let everyone read and time pass, until nothing is under way."""
        for peer in self.peers:
            peer.room = UNLIMITED
        for _ in range(200):
            self.wait(5.0)
            busy = [p for p in self.open if p.arrived or p.unsent or p.ended or p.sock.error_seen]
            queued = [each for each in self.peers if each.stage == "queued"]
            if not (self.reactor.with_input or busy or queued):
                return
        raise AssertionError("something is never done")

    def check_nothing_is_lost(self):
        for peer in self.peers:
            typed, _ = messages_of(peer.protocol(), peer.typed) if peer.typed else ([], b"")
            handled = peer.messages
            if handled[-1:] == [DISCONNECT] == typed[-1:]:  # it drops what has to wait
                self.reached["interrupted"] += handled != typed
                assert handled[:-1] == typed[: len(handled) - 1]
                continue
            if handled[-1:] == [DISCONNECT] and peer.sock.end_seen:
                typed.append(DISCONNECT)
            assert typed[: len(handled)] == handled
            reset = peer.why and peer.why == os.strerror(peer.broken) and not peer.sock.failed
            assert handled == typed or not (peer.is_here or reset)

    def all_close(self):
        for peer in self.peers:
            peer.ended = True
        self.wait(120.0)
        assert not self.reactor.limiter.quotas
        assert not any(log.data for log in self.reactor.chat.logs.values())

    def server_stops(self):
        self.budget, self.segment, self.polite = NEVER, UNLIMITED, True
        signal = SimulatedListener(self)
        signal.waiting.append(None)
        self.selector.register(signal, selectors.EVENT_READ, lambda: self.stop(signal))
        self.selector.keys = {signal: self.selector.keys.pop(signal), **self.selector.keys}
        for peer in self.peers:
            peer.ended |= peer.sock.shut
        here = self.open
        assert self.reactor.run()
        all_read = all(each.room == UNLIMITED for each in self.peers)
        seconds = 0.1 if all_read else batchat.SHUTDOWN_SECONDS
        assert self.now - self.stopped_at <= seconds + self.late_by + 1e-6
        assert all(listener.closed for listener in self.listeners.values())
        well = [p for p in here if p.room == UNLIMITED and not (p.broken or p.sock.failed)]
        assert not any(each.unsent for each in well)

    def stop(self, signal: SimulatedListener):
        self.selector.unregister(signal)
        self.stopped_at = self.now
        self.reactor.stop()


def line_on(protocol: type[batchat.Protocol], line: str) -> bytes:
    return masked(1, line.encode()) if protocol is Web else line.encode() + b"\r\n"


def every(step: str, *choices) -> st.SearchStrategy:
    """One of all the ways to take a step."""
    return st.sampled_from([(step, *how) for how in itertools.product(*choices)])


ANYONE = range(5)
HOSTS = ["127.0.0.1", "203.0.113.5", "::ffff:203.0.113.5", "198.51.100.9", "2001:db8::7"]
HOSTS += ["for 203.0.113.5"]  # through a proxy on localhost
CHAT = [
    *("hi", "how are you?", "x" * 80, "y" * 90, "z" * 101, "", "h\u00e9\x1b[2J", "//slash", "help"),
    *("/who", "/help", "/me waves", "/msg ann psst", "/msg bob " + "p" * 80, "/msg cy", "/nope"),
    *("/op sesame", " /OP no", "/kick ann", "/kick bob get out", "/ban ann 2", "/ban bob", "/bans"),
    *("/unban 203.0.113.5", "/nick eve", "/nick ann", "/nick Bob", "/quit"),
    *("GET / HTTP/1.1", "ann", "a b"),
]
MARIA = typed_in_telnet("\u041c\u0430\u0440\u0438\u044f\n\u0443 \u30ca\u30c3\n")
GARBAGE = [  # on telnet, and on the web
    *[(b"half a li", masked(1, b"frag", False)), (b"\r", masked(0, b"ment")), (b"\n", OPENING)],
    *[(b"\xff\xf6", masked(9, b"ping")), (b"\xff\xfd\x06", masked(10, b"")), (b"\0", b"\x81")],
    *[(b"\xff", masked(1, b"hi")[:3]), (b"\xff\xfa\x1f\0", OPENING[:40]), (b"\xf0", OPENING[40:])],
    *[(b"\b", masked(1, b"a\nb")), (b"\xc3", masked(1, b"\xff")), (b"no end" * 99, b"G")],
    *[(b"\xff\xf6" * 60, masked(9, b"p" * 100) * 12), (b"\xff\xf1" * 99, masked(10, b"") * 99)],
    (b"\xff\xf6" * 60 + b"\n/quit\n" + b"\xff\xf1" * 2100, masked(9, b"pong" * 9) * 99),
    *[(MARIA, masked(1, b"\xd0\x9c")), (b"\r\n" * 99, request({}, "GET / HTTP/1.1"))],
    *[(b"\xff\xfb\0\xff\xfd\0", b"\x88\x80"), (b"\x1b[A\tx\n", masked(1, b"\x1b]0;x\x07\t"))],
    *[(b"\xff\xf4", masked(8, b"")), (b"\x04", masked(1, b"x" * 101)), (b"\xa9", b"\xa9\r\n\r\n")],
]
CTRL_C = b"\xff\xf4\xff\xfd\x06"  # in telnet, which shows nothing until the mark comes back
ERRORS = [errno.ENOMEM, errno.EMFILE, errno.ECONNABORTED, errno.ENOBUFS]
JOINS = every("joins", ["ann", "bob", "cy", "eve", "Bob"], [Telnet, Web], HOSTS, [1, 500])
SAYS = every("says", ANYONE, CHAT, [1, 2, 30])
LONG_ANSWERS = ["x" * 80, "/who", "/msg bob " + "p" * 80]
FLOODS = every("floods", ANYONE, LONG_ANSWERS, ANYONE, [0, 1, 1000], [0, 300, 600])
STALLS = every("accepts", ANYONE, [0, 1, 10, 100, UNLIMITED, 2500], [0, 100])
ITERATIONS = every("run_once", [1, 2, 3], [UNLIMITED, UNLIMITED, 3, 40])
NETWORK_STEPS = st.one_of(
    *(ITERATIONS, ITERATIONS, JOINS, JOINS, SAYS, SAYS, FLOODS, FLOODS, FLOODS, FLOODS),
    *(STALLS, STALLS, every("sends", ANYONE, GARBAGE)),
    every("says", ANYONE, ["/ignore ann", "/ignore bob", "/ignore cy"], [1, 2]),
    st.tuples(st.just("type"), st.sampled_from(ANYONE), st.binary(max_size=9)),
    every("connects", [Telnet, Web], HOSTS, [1, 50, 500], [True, False]),
    *(every("wait", [0.05, 0.5, 1.9, 2.1]), every("wait", [2.1, 6.0, 11.0, 31.0, 125.0])),
    *(every("type", ANYONE, [CTRL_C]), every("ends", ANYONE)),
    every("break_down", ANYONE, [errno.ECONNRESET, errno.ETIMEDOUT], [True, False]),
    *(every("call_fails", ANYONE, CALLS, ERRORS), every("send_fails", ANYONE, ERRORS, [1, 99])),
    every("call_fails", ANYONE, ["recv", "register"], [OURS]),
    *(every("jumps", [0.3, 3.0, 100.0]), every("listener_fails", [Telnet, Web], ERRORS)),
)
SETTINGS = st.builds(  # in the order of its fields
    Settings, *map(st.sampled_from, [[10, 0, 0], [0, 0, 3], [0, 0, 2], [0, 3, 50]]),
    *map(st.just, [Settings().greeting, PASSWORD]),
    *(st.booleans(), st.sampled_from([1000, 1000, 4])),
)
# Often some people are there already, so that there is somebody to talk to.
HISTORIES = st.builds(
    lambda joins, steps: [*joins, ("run_once", 2), *steps],
    st.lists(JOINS, max_size=4),
    st.sampled_from(range(0, 61, 4)).flatmap(
        lambda size: st.lists(NETWORK_STEPS, min_size=size, max_size=size)
    ),
)
ENDS = st.sampled_from(["all close", "the server stops", "the server stops at once"])
WORLDS = st.tuples(SETTINGS, HISTORIES, ENDS)


@contextmanager
def no_error_of_ours(**limits):
    """While the server has these limits, and may log no error but OurError."""

    def exception(*_: object):
        assert isinstance(sys.exc_info()[1], OurError), "an internal error"

    ours = mock.Mock(exception=mock.Mock(side_effect=exception))
    with mock.patch.multiple(batchat, logger=ours, **limits):
        yield


def simulate(settings: Settings, history: list, end: str) -> World:
    """One run of a world, from the first connection to the last."""
    with no_error_of_ours(**SMALL_LIMITS):
        world = World(settings)
        world.drift = 1e-4
        for step in history:
            world.take(*step)
        if end != "the server stops at once":
            world.drain()
            world.check_nothing_is_lost()
        if end == "all close":
            world.all_close()
        else:
            world.server_stops()
        assert_nothing_is_kept(world.reactor)
        return world


@pytest.fixture
def worlds():
    """Makes worlds with the real limits."""
    with no_error_of_ours():
        yield lambda rate=0, people=0, per_address=0, **more: World(
            Settings(rate, people, per_address, **more)
        )


def talk(world: World, talker: Peer, kilobytes: int):
    talker.types(*[LONG] * (kilobytes // 4))
    world.wait()


def stalls(world: World, name: str, **how) -> Peer:
    """Somebody who joins, and then reads nothing more."""
    peer = world.joins(name, **how)
    world.wait()
    peer.accepts(0)
    return peer


def names(world: World) -> list[str]:
    return [each.connection.name for each in world.inside]


# ------------
# The log and its readers

KINDS = ["say", "say", "say", "send", "take", "take", "join", "leave", "lose", "trim"]
STEP = st.tuples(st.sampled_from(KINDS), st.integers(0, 4), st.binary(min_size=1, max_size=6))


@given(st.lists(STEP, max_size=60))
def test_outbox_sends_what_a_plain_list_holds(steps):
    log = batchat.Log(Telnet)
    outboxes = [batchat.Outbox(log) for _ in range(4)]
    inside, expected, got = set(), [b""] * 4, [b""] * 4
    for kind, number, data in [*steps, *[("take", n, b"") for n in range(4)], ("trim", 0, b"")]:
        n = number % 4
        outbox = outboxes[n]
        if kind == "say":
            log.append(data)
            for other in inside - {number}:  # four is nobody's number
                expected[other] += data
            if number in inside or number < 4 and outbox.is_discarding:
                outbox.exclude_newest()
        elif kind == "send":
            outbox.append_private(data)
            expected[n] += b"" if outbox.is_discarding else data
        elif kind == "take":
            with outbox.pending() as pending:
                sent = bytes(pending)[: data[0] % 10 if data else None]
            got[n] += sent
            outbox.advance(len(sent))
        elif kind == "join" and outbox.cursor == batchat.UNREACHABLE and not outbox.is_discarding:
            inside.add(n)
            outbox.start_reading()
        elif kind in ("leave", "lose") and n in inside:
            inside.remove(n)
            outbox.stop_reading()
        if kind == "lose":
            outbox.discard()
            expected[n] = got[n]
        if kind == "trim":
            log.trim(min([log.end, *(each.cursor for each in outboxes)]))
        assert all(map(bytes.startswith, expected, got))
        assert outbox.private_size <= len(expected[n]) - len(got[n])
    assert got == expected
    assert not any([*(each.has_pending for each in outboxes), log.data])


def test_own_lines_in_a_row_are_one_splice():
    log = batchat.Log(Telnet)
    outbox = batchat.Outbox(log)
    outbox.start_reading()
    for _ in range(1000):
        log.append(b"own")
        outbox.exclude_newest()
    assert outbox.splices == [batchat.Splice(0, b"", 3000)]


def test_line_encoded_once_per_format(room, monkeypatch):
    for protocol in (Telnet, Web):
        monkeypatch.setattr(protocol, "encode", mock.Mock(side_effect=protocol.encode))
    mike, *_ = map(room.join, ["mike", "ann", "bob"])
    for expected in ([1, 0], [1, 1]):  # the second time, somebody reads JSON
        Telnet.encode.reset_mock()
        mike.types("hello")
        assert [Telnet.encode.call_count, Web.encode.call_count] == expected
        room.newcomer("eve", protocol=Web)
        Web.encode.reset_mock()


def test_news_sent_in_one_call_per_reader(world):
    talker, *_ = [world.joins(f"p{n}", [Telnet, Web][n % 2]) for n in range(10)]
    world.wait(3.0)
    talker.types("one", "two", "three")
    before, turns = world.work, world.iterations
    world.wait()
    # One call reads them, three handle them, nine send them; the rest is what tells the selector.
    assert world.work - before <= 1 + 3 + 9 + 2
    assert world.iterations - turns <= 2


# ------------
# Start it, and join it

README = (BATCHAT.parent / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_first_screen(server):
    lines = server.opening_line + server.process.stdout.readline()
    for port, known in [(server.port, "1337"), (server.web_port, "1338")]:
        lines = re.sub(rf"\b{port}\b", known, lines)
    lines = re.escape(lines).replace(re.escape(socket.gethostname()), r"\S+")
    assert re.search(rf"python3? batchat\.py\n{lines}", README)
    assert f"$ telnet localhost 1337\n{GREETING}mike\n{hey('mike')}" in README


def test_session_is_byte_for_byte(server):
    jonny, stopfarm = server.join("jonny"), server.join("JStopfarm")
    jonny.expect("* JStopfarm has joined the chat\n")
    mike = server.join("mike")
    for other in (jonny, stopfarm):
        other.expect("* mike has joined the chat\n")
    for line in ["hey everyone!", "screw you jonny you dumb loser get THE HELL OUT OF HERE"]:
        mike.types(line)
        for each in (jonny, stopfarm):
            each.expect(f"<mike> {line}\n")
        jonny.types("hi mike!")
        for each in (mike, stopfarm):
            each.expect("<jonny> hi mike!\n")
    jonny.types("/quit")
    assert jonny.rest() == ""
    mike.expect("* jonny has quit the chat\n")
    stopfarm.types("mike is that you?")
    mike.expect("<JStopfarm> mike is that you?\n")


def test_web_port_serves_the_page_and_websocket(server):
    mike = server.join("mike")
    for path, wanted in [("/", batchat.PAGE), ("/hello", "Hello, World!")]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.web_port}{path}") as reply:
            assert reply.read().decode() == wanted
    with socket.create_connection(("127.0.0.1", server.web_port), timeout=TIMEOUT) as ann:
        ann.sendall(OPENING + masked(1, b"ann") + masked(1, b"hi mike!"))
        mike.expect("* ann has joined the chat\n<ann> hi mike!\n")
        mike.types("hi ann!")
        wait_until(lambda: re.search(rb'"at":\d{10},.*"hi ann!"', ann.recv(1 << 16)))
    mike.expect("* ann has quit the chat\n")


has_telnet = pytest.mark.skipif(not shutil.which("telnet"), reason="telnet is not installed")
CLOSED = "Connection closed by foreign host."
# Some hold bytes that are a key of telnet's without their eighth bit; most of them Ctrl-C.
NAMES_ABROAD = """Мария Захар Ünal Åsa Łukasz Ευαγγελία Արամ محمد שרה अमित ธนา カナ
    さくら 王小明 지우 남녀"""
TEXTS_ABROAD = [
    *("Привет, у меня", "Мама мыла раму", "Ünal war hier", "Γεια σου, κόσμε", "ქართული ენა"),
    *("مرحبا يا عالم", "שמי רות", "नमस्ते दुनिया", "สวัสดีชาวโลก", "カタカナ、ッ", "你好，世界"),
    *("안녕하세요 ㅋㅋ", *"ЃЄЅЈЏДЕКМ"),  # D0, and every key: 83, 84, 85, 88, 8F, 94, 95, 9A, 9C
]


@has_telnet
@cases("leave", "/quit\n", "Мама, у\x03", "Мама, у\x04\x04")
@cases("text", "hey everyone!", "Привет, у меня")
def test_telnet_session_has_no_frozen_screen(server, text, leave):
    with Terminal(server.port) as mike:
        mike.shows(batchat.BANNER)
        mike.join("mike")
        jonny = server.join("jonny")
        mike.shows("* jonny has joined the chat\n")
        mike.types("\x1a")  # Ctrl-Z: telnet shows nothing until its timing mark comes back
        mike.types(f"{text}\n")
        jonny.expect(f"<mike> {text}\n")
        jonny.types("hi mike!")
        mike.shows("<jonny> hi mike!\n")
        mike.types(leave)
        mike.shows(CLOSED)
        jonny.expect("* mike has quit the chat\n")


@has_telnet
@cases("options", [], ["-E"], ["-8"], ["-L"], ids=str)
def test_telnet_takes_many_alphabets(options):
    """In names, and in the first line after a name in ASCII."""
    guests = [("mike", text) for text in TEXTS_ABROAD]
    guests += [(name, "hi") for name in NAMES_ABROAD.split()]
    if options == ["-8"]:  # in BINARY, even letters with the escape key, or with Ctrl-E
        guests += [("Мария", "Наташа ” Ý 이"), ("Мария", "公太郎 者 ✅")]
    with Server("--rate", "0") as server:
        ann = server.join("ann")
        for name, text in guests:
            with Terminal(server.port, *options) as guest:
                guest.join(name)
                guest.types(f"{text}\n/quit\n")
                ann.expect(f"* {name} has joined the chat\n<{name}> {text}\n")
                ann.expect(f"* {name} has quit the chat\n")
                guest.shows(CLOSED)


# ------------
# What people type

def event(kind: str, **fields) -> str:
    """An event on the WebSocket, byte for byte."""
    return json.dumps({"type": kind, **fields}, ensure_ascii=False, separators=(",", ":")) + "\n"


def public(kind: str, **fields) -> str:
    return event(kind, id=4, at=7, **fields)


WAVES, HIDDEN = public("did", name="mike", text="waves"), "You no longer hear bob."
RENAMED = "* mike is now known as"
KICKED, KICK = "* bob was kicked by mike", {"name": "bob", "by": "mike"}
NO_REASON = "no reason given"
PSST = event("whisper", at=7, **{"from": "mike", "to": "ann", "text": "psst"})
PEOPLE = event("people", people=[{"name": n, "operator": False} for n in ("ann", "bob", "mike")])
COMMANDS = event("help", commands=re.findall(r"\* (.*?)  +(.+)", HELP))
BAD_BANS = [f"/ban ann {minutes}" for minutes in ("0", "-1", "525601", "soon", "9" * 4000)]


@cases(
    "line, others, own, shown",
    ('h\u00e9 "', '<mike> h\u00e9 "\n', "", public("said", name="mike", text='h\u00e9 "')),
    ("  a  b ", "<mike>   a  b \n", "", public("said", name="mike", text="  a  b ")),
    ("//quit", "<mike> /quit\n", "", public("said", name="mike", text="/quit")),
    *[(me, "** mike waves\n", "", WAVES) for me in ("/me waves", "/ME  waves ")],
    ("/nick mick", *[f"{RENAMED} mick\n"] * 2, public("renamed", name="mike", to="mick")),
    ("/nick MIKE", *[f"{RENAMED} MIKE\n"] * 2, public("renamed", name="mike", to="MIKE")),
    ("/kick BOB", *[f"{KICKED}: {NO_REASON}\n"] * 2, public("kicked", **KICK, text=NO_REASON)),
    ("/kick bob a b", *[f"{KICKED}: a b\n"] * 2, public("kicked", **KICK, text="a b")),
    *[(psst, *["[mike -> ann] psst\n"] * 2, PSST) for psst in ("/msg ANN psst", " /msg ann psst")],
    ("/msg bob psst", "", "[mike -> bob] psst\n", PSST.replace("ann", "bob")),
    ("/msg mike psst", "", "[mike -> mike] psst\n", PSST.replace("ann", "mike")),
    *[(who, "", "* 3 here: ann, bob, mike\n", PEOPLE) for who in ("/who", "/names", "/list")],
    ("/help", "", HELP, COMMANDS),
    ("/ignore BOB", "", f"* {HIDDEN}\n", event("notice", text=HIDDEN)),
    *[(blank, "", "", "") for blank in ("", " \t ")],
)
@cases("protocol", Telnet, Web)
def test_line_is_shown_to_the_right_people(room, protocol, line, others, own, shown):
    """As text, or as an event on the WebSocket, where speakers read their own lines."""
    _bob, ann, mike = [room.join(name, protocol=protocol) for name in ("bob", "ann", "mike")]
    mike.is_operator, room.chat.clock.wall_time = "/kick" in line, 7
    mike.types(line)
    ann.expect(others if protocol is Telnet else others and shown)
    mike.expect(own if protocol is Telnet else shown)


@cases("line", "/quit", "/exit", "/bye", "/q", "/Quit", DISCONNECT)
def test_quit_leaves_the_room_and_the_prompt(room, line):
    mike, newcomer, ann = room.join("mike"), room.newcomer(), room.join("ann")
    for each in (mike, newcomer):
        each.types(line)
        assert (each.read(), each.state) == ("", CLOSING)
    ann.expect("* mike has quit the chat\n")


@cases(
    "code, answer, lines",
    ("unknown_command", "Unknown command /frobnicate; try /help.", ["/frobnicate now"]),
    ("unknown_command", "Unknown command /; try /help.", ["/ /"]),
    ("usage", "Usage: /msg NAME TEXT", ["/msg", "/msg mike"]),
    *[("usage", f"Usage: {each} NAME", [each]) for each in ("/nick", "/ignore")],
    ("usage", "Usage: /me ACTION", ["/me"]),
    ("refused", "Nobody here is called cy.", ["/msg cy x", "/ignore cy", "/ban cy", "/unban cy"]),
    ("refused", "You can't ignore yourself.", ["/ignore mike"]),
    ("refused", "You are mike already.", ["/nick mike"]),
    ("name_taken", "The name ANN is taken.", ["/nick ANN"]),
    ("bad_name", NAME_RULE, ["/nick a b", "/nick 192.0.2.1", "/nick \uff11.2.3.4"]),
    ("too_long", "A line has at most 4096 bytes; yours was not sent.", [batchat.TOO_LONG]),
    ("usage", "A ban lasts from 1 to 525600 minutes.", BAD_BANS),
    ("refused", "1.2.3.4 is not banned.", ["/unban 1.2.3.4"]),
)
def test_refusal_goes_to_sender_only(room, code, answer, lines):
    ann = room.join("ann")
    error = event("error", code=code, text=answer)
    for protocol, shown in [(Telnet, f"* {answer}\n"), (Web, error)]:
        mike = room.join("mike", protocol=protocol)
        mike.is_operator = True
        mike.types(*lines)
        assert (mike.read(), ann.read()) == (shown * len(lines), "")
        assert (mike.state, mike.name) == (CHATTING, "mike")
        mike.types("/quit")


def test_private_lines_come_in_their_right_place(room):
    mike, ann, bob = map(room.join, ["mike", "ann", "bob"])
    ann.types("one")
    mike.types("?", "/msg ANN  over  here", "?", "/me too", "/nick mick", "/who")
    ann.types("two")
    renamed, psst = "* mike is now known as mick\n", "[mike -> ann] over  here\n"
    hint = "* /help shows what you can type.\n"
    mike.expect(f"<ann> one\n{hint}{psst}{hint}{renamed}* 3 here: ann, bob, mick\n<ann> two\n")
    ann.expect(f"<mike> ?\n{psst}<mike> ?\n** mike too\n{renamed}")
    bob.expect(f"<ann> one\n<mike> ?\n<mike> ?\n** mike too\n{renamed}<ann> two\n")


def test_ignored_person_is_not_heard(room):
    """What they say, do and whisper is hidden; their new name is not."""
    mike, troll, ann = map(room.join, ["mike", "troll", "ann"])
    mike.types("/ignore troll")
    mike.expect("* You no longer hear troll.\n")
    troll.types("/nick gnome", "hey", "/me dances", "/msg mike psst")
    ann.types("hello")
    mike.expect("* troll is now known as gnome\n<ann> hello\n")
    troll.expect("* troll is now known as gnome\n[gnome -> mike] psst\n<ann> hello\n")
    ann.expect("* troll is now known as gnome\n<gnome> hey\n** gnome dances\n")
    mike.types("/ignore gnome")
    troll.types("hey", "/quit")
    mike.expect("* You hear gnome again.\n<gnome> hey\n* gnome has quit the chat\n")


@cases("leaver", "mike", "troll")
def test_ignore_ends_when_either_leaves(room, leaver):
    people = {name: room.join(name) for name in ("mike", "troll")}
    people["mike"].types("/ignore troll")
    people[leaver].types("/quit")
    people[leaver] = room.join(leaver)
    people["mike"].read()
    people["troll"].types("sorry")
    people["mike"].expect("<troll> sorry\n")


# Names

INVISIBLE = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u200b\u3164\ufe00\ufe0f\uffa0\U000e0100\U000e01ef"
BAD_NAMES = ["", "   ", "x" * 25, "two words", "<mike>", "* mike", "mike!", "m\u00b2", "/help"]
BAD_NAMES += ["\u0301mike", "\U0001f600", "\u3164", *(f"mi{each}ke" for each in INVISIBLE)]
LETTERS = st.characters(categories=["L", "M", "Nd"]) | st.sampled_from("_-.")


@cases(
    "typed, name",
    *[(name, name) for name in ("mike", "J-Stop_farm.2", "x" * 24, "you", "李雷", "हिंदी")],
    *[("  mike ", "mike"), ("E\u0301lo\u00efse", "\u00c9lo\u00efse")],
    (unicodedata.normalize("NFD", "\u1f82" * 24), "\u1f82" * 24),  # the longest spelling
)
def test_good_name_is_taken(room, typed, name):
    room.newcomer(typed).expect(hey(name))


@cases("name", *BAD_NAMES, "bob", "BOB", "\uff42\uff4f\uff42")
def test_bad_or_taken_name_is_refused(room, name):
    room.join("Bob")
    newcomer = room.newcomer(name)
    text = r"A name .*" if name in BAD_NAMES else f"The name {name} is taken\\."
    assert re.fullmatch(f"\\* {text}\n{batchat.PROMPT}", newcomer.read())
    newcomer.types("mike")
    newcomer.expect(hey("mike"))


@given(st.text(LETTERS, min_size=1, max_size=12))
def test_name_key_is_one_for_all_spellings(name):
    key = batchat.name_key(name)
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    assert {batchat.name_key(each) for each in [*forms, key]} == {key}


# ------------
# Options

def test_greeting_replaces_ours_and_is_cleaned():
    with Server("--greeting", "Hello\x1b[2J at\tmine") as server:
        server.connect().expect(GREETING.replace(Settings().greeting, "Hello at mine"))


@cases(
    "options, where, joins",
    ("", "every address", "localhost T, or in a browser: http://localhost:W/"),
    ("--host ::1", "::1", "::1 T, or in a browser: http://[::1]:W/"),
    ("--host 127.1.2.3", "127.1.2.3", "127.1.2.3 T, or in a browser: http://127.1.2.3:W/"),
    ("--host 127.1.2.3 --no-web --web-port 0", "127.1.2.3", "127.1.2.3 T"),
)
def test_opening_lines_say_how_to_join(options, where, joins):
    if "127" not in where and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    with Server(*options.split()) as server:
        joins = joins.replace("T", str(server.port)).replace("W", str(server.web_port))
        lines = [f"BATCHAT listens on {where}, port {server.port}.", f"Join it: telnet {joins}"]
        assert server.opening_line.splitlines() == lines
        hosts = ["127.0.0.1", "::1"] if "every" in where else [where]
        for name, host in zip(["mike", "ann"], hosts):
            server.join(name, host)
        if "127" in where:
            with pytest.raises(ConnectionRefusedError):
                server.connect("127.0.0.1")
        server.process.kill()
        newcomers = ["127.0.0.1" if "127" in host else host for host in hosts]
        assert re.findall(r"joined from (\S+) port", server.ends()[1]) == newcomers


def test_ports_are_1337_and_1338_or_a_free_one():
    host = ["--host", "127.{}.{}.{}".format(*os.urandom(3))]  # localhost, but its ports are free
    with ExitStack() as stack:
        usual, other = [stack.enter_context(Server(*host, ports=p)) for p in ("", "--port 0")]
        assert [usual.port, usual.web_port] == [1337, 1338]
        assert other.web_port not in (0, 1338)
        for options in ("", "--port 0 --web-port 1338"):  # which are taken now
            done = run(*command_line(*host, *options.split()))
            assert (done.returncode, done.stdout) == (1, "")
            assert re.fullmatch(r"batchat: .*port \d+: Address already in use\n", done.stderr)


@cases("options, least, most", ("", 40, 45), ("--rate 6", 20, 25), ("--rate 0", 100, 100))
def test_rate_sets_how_many_lines_are_said(options, least, most):
    """Ctrl-C takes back what was not said at once; a join costs 5 lines of a burst of 5 s."""
    with Server(*options.split()) as server:
        ann, mike = server.join("ann"), server.connect()
        mike.sock.sendall(b"mike\n" + b"hi\n" * 100 + b"\x03")
        mike.rest()
        ann.types("/quit")
        assert least <= ann.rest().count("<mike> hi\r\n") <= most


@cases(
    "options, shown", *[("", "welcome"), ("--max-people 2", "welcome"), ("--max-people 1", "full")],
    *[("--max-per-address 1", "welcome"), ("--behind-proxy", "welcome")],
    ("--behind-proxy --max-per-address 1", "crowded"),
)
def test_limits_are_as_the_options_say(options, shown):
    """Two join through a proxy, from one address; what is the second one shown?"""
    with Server(*options.split()) as server, ExitStack() as stack:
        for name, last in [("mike", "welcome"), ("ann", shown)]:
            sock = socket.create_connection(("127.0.0.1", server.web_port), timeout=TIMEOUT)
            stack.enter_context(sock).sendall(forwarded("203.0.113.5") + masked(1, name.encode()))
            got = b""
            while f'"{last}"' not in got.decode("latin-1"):
                got += sock.recv(4096) or pytest.fail(f"it ends after {got!r}")


def test_max_people_counts_people_in_the_room():
    room = Room(max_people=1)
    newcomer, mike = room.newcomer(), room.join("mike")
    newcomer.types("eve")
    newcomer.expect(FULL)
    mike.types("hi", "/quit")
    room.newcomer("eve").expect(hey("eve"))


def test_soft_descriptor_limit_is_raised():
    with Server(first="ulimit -S -n 64") as server:
        people = [server.join(f"p{n}") for n in range(60)]
        people[-1].types("/who")
        assert people[-1].sock.recv(10) == b"* 60 here:"


CANT_LISTEN, USAGE = r"batchat: can't listen on .*\n", r"usage: batchat\.py(?s:.*)error: .*\n"
NO_PASSWORD = "batchat: no password in {}: {}\n"
BAD_OPTIONS = ["--port 65536", "--port x", "--rate -1", "--rate 1000001", "--max-people -5"]
BAD_FILES = [("absent", "No such file or directory"), ("latin-1", "it is not UTF-8")]
BAD_FILES += [(name, "its first line is empty") for name in ("empty", "blank", "bom")]


@cases(
    "options, status, text",
    *[(f"--host {host}", 1, CANT_LISTEN) for host in ("192.0.2.1", "256.1.1.1", "x" * 70)],
    *[(bad, 2, USAGE) for bad in [*BAD_OPTIONS, "--history 1000000", "--nonsense", "x"]],
    *[(f"--password-file {bad[0]}", 1, NO_PASSWORD.format(*bad)) for bad in BAD_FILES],
)
def test_bad_option_is_explained(tmp_path, monkeypatch, options, status, text):
    monkeypatch.chdir(tmp_path)
    files = {"latin-1": b"caf\xe9\n", "empty": b"", "blank": b" \nx\n", "bom": b"\xef\xbb\xbf\n"}
    for name, content in files.items():
        Path(name).write_bytes(content)
        Path(name).chmod(0o600)
    done = run(*command_line(*options.split()))
    assert (done.returncode, done.stdout) == (status, "")
    assert re.fullmatch(text, done.stderr)


def test_status_is_1_after_an_error_of_the_server():
    code = "import runpy, selectors; selectors.DefaultSelector.select = None; "
    code += f"runpy.run_path({str(BATCHAT)!r}, run_name='__main__')"
    done = run(sys.executable, "-c", code, "--port", "0", "--no-web")
    assert done.returncode == 1
    assert "shutting down after an internal error" in done.stderr


def test_one_file_runs_wherever_it_is_copied(tmp_path):
    done = run(sys.executable, "-I", shutil.copy(BATCHAT, tmp_path), "--version")
    assert done.stdout == f"BATCHAT {batchat.__version__}\n"


DEFAULTS = {
    "host": None, "port": 1337, "web_port": None, "no_web": False, "rate": 10,
    "max_people": 0, "max_per_address": 100, "history": 0, "greeting": Settings().greeting,
    "password_file": None, "behind_proxy": False, "verbose": False,
}
# The tables of README: of each row, the code in the first cell, and what is said of it.
CODE = re.compile(r"`([^`]+)`")
ROWS = re.findall(r"^\|(.*?)\|(.*)\|$", README, re.MULTILINE)
ROWS = [(CODE.findall(first), first + rest) for first, rest in ROWS]
NAMED = {code.split()[0] for codes, _ in ROWS for code in codes}
UNIT = re.search(r"```ini\n(.*?)```", README, re.DOTALL)[1]


def test_readme_and_help_name_every_option():
    assert vars(batchat.parse_options([])) == DEFAULTS
    options = {f"--{name.replace('_', '-')}": default for name, default in DEFAULTS.items()}
    options.update({"--web-port": 1338, "--version": None, "--help": None})
    named = {name for name in NAMED if name[0] == "-"}
    assert {*options} - {"--verbose"} <= named <= {*options, "-v", "-h"}
    usage = " ".join(run(*command_line("--help")).stdout.partition("browsers.\n")[2].split())
    for option, default in options.items():
        value = re.escape(str(default))
        told = rf"(, --\w+)? [A-Z]+,? [^()]*\(default: {value}[,)]"
        assert re.search(rf"{option}\b{told if type(default) in (str, int) else ''}", usage)
        rows = [text for codes, text in ROWS if re.search(rf"{option}\b", " ".join(codes))]
        assert not default or re.search(rf"(?<!\w){value}(?!\w)", " ".join(rows))


def test_readme_names_commands_and_what_they_show():
    named = {"//" if name[:2] == "//" else name for name in NAMED if name[0] == "/"}
    usages = {each.usage.split()[0] for each in batchat.COMMANDS.values()}
    assert usages - {"/op"} <= named - {"//"} <= {*batchat.COMMANDS}
    examples = [(line, shown) for line, text in ROWS for shown in CODE.findall(text)]
    examples = [each for each in examples if re.match(r"(<|\[|\*+ )mike", each[1])]
    assert len(examples) >= 3  # said, did, and whispered
    for (line, *_), shown in examples:
        room = Room()
        mike, ann = room.join("mike"), room.join("ann")
        mike.types(line)
        ann.expect(f"{shown}\n")


# History

def test_newcomer_reads_the_last_lines_first():
    room = Room(history=3)
    ann, bob = room.join("ann"), room.join("bob")
    ann.types("too long ago", "hi")
    room.chat.clock.wall_time = 300
    bob.types("/me waves", "/msg ann psst", "/nick rob", "/nope")
    ann.types("//slash")
    mike = room.newcomer("mike")
    ann.types("hello mike")
    first, later = [time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in (0, 300)]
    mike.expect(
        f"{hey('mike')}* Recent messages, since {first}:\n"
        f"{first[-5:]} <ann> hi\n{later[-5:]} ** bob waves\n{later[-5:]} <ann> /slash\n"
        "* End of recent messages.\n<ann> hello mike\n"
    )


@cases(
    "text, telnet, web",
    *[(text, 17, 16) for text in ("x" * 4000, "\u0443" * 2000, "\u30ab" * 1333)],
    *[('"' * 4000, 17, 9), ("hi", 829, 515)],
)
def test_history_holds_64_kib(text, telnet, web):
    """Names, and what JSON adds, are counted."""
    room, name = Room(history=1000), "\u4e2d" * 24
    room.join(name).types(*[text] * 999, "the last")
    shown = [room.newcomer(each.__name__, protocol=each).read() for each in (Telnet, Web)]
    assert [(each.count(name), each.count("the last")) for each in shown] == [(telnet, 1), (web, 1)]


def test_newcomers_share_the_bytes_of_history(worlds):
    """If it changes before each of them, nine at most join in one iteration."""
    world = worlds(history=1000)
    talk(world, world.joins("ann"), 64)
    crowd = [world.joins(f"p{n}") for n in range(20)]
    for each in crowd:
        each.accepts(0)
    world.wait()
    private = {id(s.private): s.private for p in crowd for s in p.connection.outbox.splices}
    assert 64_000 < sum(map(len, private.values())) < 70_000 + 20 * 1000
    pairs = [(world.joins(f"talker{n}"), world.connects()) for n in range(30)]
    world.wait()
    for number, (talker, newcomer) in enumerate(pairs):
        talker.types("a line")
        newcomer.types(f"newcomer{number}")
    world.run_once()
    assert 0 < sum(name.startswith("newcomer") for name in names(world)) <= 9


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_readme_unit_is_valid_and_hardened(tmp_path):
    """systemd's own measure of its exposure is below 3.0."""
    unit = tmp_path / "batchat.service"
    unit.write_text(UNIT.replace("/opt/batchat.py", str(BATCHAT)))
    assert "batchat.service" not in run("systemd-analyze", "verify", str(unit)).stderr
    done = run("systemd-analyze", "security", "--offline=yes", "--threshold=30", str(unit))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_readme_unit_starts_the_server(tmp_path):
    """With a password file in systemd's credentials folder."""
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    command = re.search(r"ExecStart=\S+ \S+ (.*)", UNIT)[1].replace("%d", str(tmp_path))
    with Server(*command.split()) as server:
        ann = server.join("ann")
        ann.types(f"/op {PASSWORD}")
        ann.expect("* You are an operator now; see /help.\n")


# The log file

def test_log_names_people_but_not_what_they_say(tmp_path):
    path = tmp_path / "password"
    path.write_text(f"{PASSWORD} \nanother line\n")
    path.chmod(0o644)
    with Server("-v", "--rate", "0", "--password-file", str(path)) as server:
        mike, ann, eve, newcomer = *map(server.join, ["mike", "ann", "eve"]), server.connect()
        newcomer.types("/quit")
        newcomer.rest()
        mike.types("secret", "/msg ann secret", "/me secret", "/secret", "/nick mick", "/op guess")
        mike.types(f" /op {PASSWORD}x", "/quit")
        mike.rest()
        ann.types(f"/op {PASSWORD}", "/kick eve secret", "/quit")
        ann.rest()
        eve.rest()
        server.process.terminate()
        _, log = server.ends()
    log = re.sub(r"127\.0\.0\.1 port \d+", "HERE", log)
    lines = [line.split(" ", 2)[2] for line in log.splitlines()]
    ports = rf"\[{server.port}, {server.web_port}\], \d+ connections at most; .*'max_people': 0,.*"
    what = rf"BATCHAT {batchat.__version__}, process {server.process.pid}, ports {ports}"
    assert re.fullmatch(what, lines.pop(1))
    assert lines.pop() == "stopped"
    assert lines == [
        f"everybody on this machine can read {path}",
        *[f"{who} joined from HERE ({n} here)" for n, who in enumerate(["mike", "ann", "eve"], 1)],
        *("HERE left before joining: quit", "mike is now mick (HERE)"),
        *["mick gave a wrong password (HERE)"] * 2,
        *("mick left: quit (HERE, 2 here)", "ann is an operator (HERE)", "ann kicked eve (HERE)"),
        *("eve left: kicked (HERE, 1 here)", "ann left: quit (HERE, 0 here)", "stopping"),
    ]


def test_server_runs_without_standard_error():
    with Server(first="exec 2>&-") as server:
        mike = server.join("mike")
        mike.types("/who", "/quit")
        mike.expect("* 1 here: mike\n")
        assert mike.rest() == ""
        server.process.terminate()
        assert server.ends()[0] == 0


# ------------
# Operators

@pytest.fixture
def kept() -> Room:
    """A room with a password."""
    return Room(password=PASSWORD, history=1000)


@pytest.fixture
def ann(kept) -> Guest:
    ann = kept.join("ann")
    ann.types(f"/op {PASSWORD}")
    ann.expect("* You are an operator now; see /help.\n")
    return ann


NO_BANS = "* No address is banned.\n"
NOT_BANNED = "* Neither localhost nor your own address can be banned; use /kick.\n"


@cases("password", "", PASSWORD)
def test_operator_commands_are_unknown_to_others(password):
    mike = Room(password=password).join("mike")
    mike.types("/kick mike", "/ban mike", "/bans", "/unban x", "/help", "/op x")
    unknown = [f"* Unknown command /{x}; try /help.\n" for x in ("kick", "ban", "bans", "unban")]
    op = "That is not the password." if password else "This server has no operators."
    mike.expect("".join(unknown) + HELP + f"* {op}\n")
    mike.types(*["/op wrong"] * 12, f"/op {PASSWORD}")
    assert mike.is_operator == bool(password)


def test_help_for_operators_names_every_command(ann):
    ann.types("/help")
    rows = re.findall(r"\* (.*?)  +(.*)\n", ann.read())
    commands = {each.usage: each.summary for each in batchat.COMMANDS.values() if each.summary}
    assert rows == [*commands.items(), ("//TEXT", "say a line that starts with a slash")]


def test_usage_of_a_command_fits_its_method():
    for each in batchat.COMMANDS.values():
        _, _, *taken = inspect.signature(each.handler).parameters.values()
        optional = [word[0] == "[" for word in each.usage.split()[1:]]
        assert optional == [x.default is not x.empty for x in taken]


@cases("line", "\ufeff/op sesame", "/op sesame", " /op sesame", "/OP sesame", "\t/Op  sesame ")
@cases("password", "", PASSWORD)
def test_password_is_never_said(line, password):
    room = Room(history=9, password=password)
    ann, mike = room.join("ann"), room.join("mike")
    ann.types(line, line.replace("sesame", "wrong"))
    mike.expect("")
    room.newcomer("eve").expect(hey("eve"))
    assert ("operator now" in ann.read()) == bool(password)


@given(
    st.text(st.characters(exclude_categories=["C", "L", "N"]), max_size=8),
    st.sampled_from("/\\\u2044\u2215\u29f8\uff0f\uff3c"),
    st.sampled_from(["op", "OP", " op", "\uff4f\uff50", "\uff2f\uff30"]),
    st.sampled_from([" sesame", "", "\u3000x", ":x", '" x']),
)
def test_no_line_with_a_password_is_said(before, slash, word, rest):
    room = Room(password=PASSWORD)
    ann, mike = room.join("ann"), room.join("mike")
    mike.types(f"{before}{slash}{word}{rest}")
    ann.expect("")
    assert mike.state is CHATTING


def test_op_within_a_line_is_said(room):
    ann, mike = room.join("ann"), room.join("mike")
    mike.types("type /op and the password")
    ann.expect("<mike> type /op and the password\n")


def test_fifth_name_is_the_last(room):
    assert room.newcomer(*["a b"] * 4, "eve").state is CHATTING
    eve = room.newcomer(*["a b"] * 5)
    assert eve.read().endswith(f"{NAME_RULE}\n{GOODBYE}") and eve.state is CLOSING


def test_kick_drops_what_was_not_said_yet(worlds):
    world = worlds(rate=10, password=PASSWORD)
    ann, mike = world.joins("ann"), world.joins("mike")
    mike.types(*["spam"] * 200)
    world.wait()
    ann.types(f"/op {PASSWORD}", "/kick mike", "/who")
    world.wait(60.0)
    kicked = f"* mike was kicked by ann: {NO_REASON}\n"
    assert ann.read().endswith(f"{kicked}* 1 here: @ann (localhost)\n")


def test_ban_refuses_an_address_for_its_time(kept, ann):
    mike, eve = [kept.join(name, "2001:db8::7") for name in ("mike", "eve")]
    waiting = kept.newcomer(host="2001:db8::9")
    ann.types("/ban mike 5")
    mike.expect("* You were kicked by ann: banned for 5 min\n")
    kicked = "* mike was kicked by ann: banned for 5 min\n"
    eve.expect(kicked)
    ann.expect(f"{kicked}* 2001:db8::/64 is banned for 5 min.\n")
    waiting.types("troll")
    for seconds, more in [(0, 5), (239, 2), (60, 1)]:
        kept.wait(seconds)
        newcomer = Guest(kept.chat, "2001:db8::8") if seconds else waiting
        newcomer.expect(f"* Your address is banned for another {more} min.\n")
        assert newcomer.state is CLOSING
    kept.wait(1)
    kept.join("mike", "2001:db8::8")


def test_ban_takes_their_lines_out_of_the_history(kept, ann):
    """There is space for others again."""
    ann.types("hi")
    mike, local = kept.join("mike", "2001:db8::5"), kept.join("local")
    mike.types(*["spam" * 1000] * 16)
    local.types("me, too")
    assert "<mike>" in kept.newcomer("cy").read()
    ann.types("/ban mike")
    assert "<mike>" not in kept.newcomer("dan").read()
    ann.types(*[LONG] * 16)
    said = re.findall("<(.*)> (.*)", kept.newcomer("eve").read())
    assert said == [("ann", "hi"), ("local", "me, too"), *[("ann", LONG)] * 16]


@cases("host, addresses", ("127.0.0.1", "127.0.0.1 ::1"), ("203.0.113.5", "203.0.113.5"))
def test_localhost_and_own_address_not_banned(kept, host, addresses):
    """Operators could not come back."""
    ann, mike = [kept.join(name, host) for name in ("ann", "mike")]
    ann.types(f"/op {PASSWORD}", "/bans", *[f"/ban {x}" for x in f"ann mike {addresses}".split()])
    assert ann.read().endswith(NO_BANS + NOT_BANNED * len(f"ann mike {addresses}".split()))
    assert mike.state is CHATTING


def test_bans_are_listed_and_ended(kept, ann, caplog):
    """A shorter one does not shorten a longer one; nobody need be connected."""
    caplog.set_level("INFO")
    hosts = ["203.0.113.0", "203.0.113.1", "2001:db8::7", "2001:db8::8"]
    people = [kept.join(f"p{n}", host) for n, host in enumerate(hosts)]
    ann.types("/ban 203.0.113.0 60", "/ban p0 5")
    assert ann.read().count("banned for 60 min") == 3
    ann.types("/ban p1", "/ban p2 500", "/ban p3 5")
    assert ann.read().count("2001:db8::/64 is banned for 500 min") == 2
    for each in people:
        kept.limiter.remove(each)
    kept.wait(60)
    ann.types("/bans", "/unban 203.0.113.0", "/unban 2001:db8::/64", "/bans")
    one = "* 203.0.113.1 is banned for another 59 min.\n"
    ann.expect(
        f"* 203.0.113.0 is banned for another 59 min.\n{one}"
        "* 2001:db8::/64 is banned for another 499 min.\n"
        f"* 203.0.113.0 is no longer banned.\n* 2001:db8::/64 is no longer banned.\n{one}"
    )
    kept.limiter.clock.now += 3600
    ann.types("/bans", "/unban 203.0.113.1")
    ann.expect(f"{NO_BANS}* 203.0.113.1 is not banned.\n")
    assert [*kept.limiter.quotas] == ["localhost"]
    logged = {"ann banned 203.0.113.0 for 60 min", "ann ended the ban of 203.0.113.0"}
    assert logged <= {*caplog.messages}


def test_at_most_1000_bans(kept, ann):
    again = kept.join("again", "10.0.0.0")
    for n in range(1001):
        kept.join(f"t{n}", f"10.0.{n // 256}.{n % 256}")
        ann.types(f"/ban t{n}")
        kept.guests = [ann, again]
    ann.expect("* There are 1000 bans already; /unban ends one.\n")
    ann.types("/ban again 90", "/unban 10.0.0.0", "/ban t1000")  # banned already, now for longer
    banned = re.findall(r"\* (\S+) is banned for (\d+)", ann.read())
    assert banned == [("10.0.0.0", "90"), ("10.0.3.232", "60")]


@cases("times", 1, 9000)
def test_former_names_are_found(kept, ann, times):
    """A new name every second dodges no operator, here or gone."""
    troll = kept.join("troll", "203.0.113.5")
    troll.types(*[f"/nick t{n}" for n in range(times)])
    ann.types("/kick troll spam", "/ban troll 5")
    assert troll.read().endswith(f" as t{times - 1}\n* You were kicked by ann: spam\n")
    assert "* 203.0.113.5 is banned for 5 min." in ann.read()


def test_former_name_is_the_latest_of_an_hour(kept, ann):
    """Somebody who has the name now comes first."""
    first, second = kept.join("bob", "203.0.113.1"), kept.join("cy", "203.0.113.2")
    first.types("/nick rob")
    second.types("/nick bob", "/nick roy")
    third = kept.join("bob", "203.0.113.3")
    for _ in range(3):
        ann.types("/ban bob")
        assert ann.read().count("* 203.0.113.3 is banned") == 1
        assert third.state is CLOSING
    ann.types("/kick bob")
    ann.expect("* bob has left already.\n")
    assert (first.state, second.state) == (CHATTING, CHATTING)
    kept.wait(3601)
    ann.types("/ban bob")
    ann.expect("* Nobody here is called bob.\n")


def test_ban_takes_an_address(kept, ann):
    """People from there stay.  A network is no address, but for the /64 that counts as one."""
    eve = kept.join("eve", "203.0.113.5")
    kept.limiter.clock.now = 892.3772230426861  # in floats, 5 minutes more is over 5 minutes later
    ann.types("/ban 203.0.113.5/64", "/ban 203.0.113.5 5", "/ban 2001:db8::7", "/ban 1.2.3")
    ann.types("/ban 203.0.113.0/24", "/ban 2001:db8::/48", "/ban 2001:DB8:1::7/64 9", "/bans")
    ann.expect(
        "* Nobody here is called 203.0.113.5/64.\n"
        "* 203.0.113.5 is banned for 5 min.\n"
        "* 2001:db8::/64 is banned for 60 min.\n"
        "* Nobody here is called 1.2.3.\n"
        "* Nobody here is called 203.0.113.0/24.\n"
        "* Nobody here is called 2001:db8::/48.\n"
        "* 2001:db8:1::/64 is banned for 9 min.\n"
        "* 203.0.113.5 is banned for another 5 min.\n"
        "* 2001:db8::/64 is banned for another 60 min.\n"
        "* 2001:db8:1::/64 is banned for another 9 min.\n"
    )
    assert eve.state is CHATTING


def test_ban_in_our_own_network(kept, ann):
    """Each address is banned alone, also after it has gone and if a proxy tells it; or all are.

    Before anybody has called over it, nobody knows which network is ours: the /64 is banned.
    """
    ann.types("/ban 2001:db8::5")
    ann.expect("* 2001:db8::/64 is banned for 60 min.\n")
    here, gone, behind_proxy = [batchat.Client("", kept.chat.logs[Telnet], 0.0) for _ in "123"]
    kept.limiter.own_networks.add("2001:db8::/64")
    kept.limiter.add(gone, "2001:db8::5")
    kept.limiter.add(here, "2001:db8::6")
    kept.limiter.remove(gone)
    kept.wait(20)
    kept.limiter.add(behind_proxy, "2001:db8::5")
    assert kept.limiter.source_for(behind_proxy.address) == "2001:db8::5"
    ann.types("/unban 2001:db8::5")
    ann.expect("* 2001:db8::/64 is no longer banned.\n")
    for line, banned in [("/ban 2001:DB8::5", [0, 60, 60]), ("/unban 2001:DB8::5", [0, 0, 0]),
                         ("/ban 2001:db8::/64", [60, 60, 60])]:
        ann.types(line)
        people = here, gone, behind_proxy
        assert [kept.limiter.banned_minutes(*each.address) for each in people] == banned


def test_ban_in_our_own_network_spares_the_others(kept, ann):
    """What they said, too."""
    kept.limiter.own_networks.add("2001:db8::/64")
    for name, host in ("bob", "2001:db8::5"), ("cy", "2001:db8::6"):
        kept.join(name, host).types("hi")
    ann.types("/ban bob")
    assert kept.newcomer("bob", host="2001:db8::5").state is CLOSING
    assert "<cy> hi" in (dan := kept.newcomer("dan", host="2001:db8::6")).read()
    assert "<bob> hi" not in kept.newcomer("eve").read() and dan.state is CHATTING


def test_who_shows_operators_each_address(kept, ann):
    mike = kept.join("mike", "2001:db8::5")
    for each, text in [(ann, "@ann (localhost), mike (2001:db8::5)"), (mike, "@ann, mike")]:
        each.types("/who")
        each.expect(f"* 2 here: {text}\n")


@cases("line, cost", ("mike", 5), ("/op-ed", 1), ("/nick mick", 25), ("/op wrong", 50))
def test_some_lines_cost_more(kept, line, cost):
    mike = kept.newcomer(*["mike"] * (cost != 5), host="203.0.113.5")
    before = mike.bucket.ready_at
    mike.types(line)
    assert mike.bucket.ready_at - max(before, -5) == pytest.approx(cost / 10, abs=0.01)


# ------------
# JSON events

def test_first_events_of_a_newcomer(kept, ann):
    bob, eve = kept.join("bob", protocol=Web), Guest(kept.chat, protocol=Web)
    ann.types("hi")
    kept.chat.clock.wall_time = 7
    eve.types("a b", "eve", "/quit")
    prompt = event("prompt", text="Please enter your name, and press enter: ")
    said = {"type": "said", "id": 3, "at": 0, "name": "ann", "text": "hi"}
    greeting = {"protocol": 1, "banner": batchat.BANNER, "text": Settings().greeting}
    assert eve.read().splitlines(True) == [
        event("greeting", **greeting, room=kept.chat.run_id, max_line=4096),
        *(prompt, event("error", code="bad_name", text=NAME_RULE), prompt),
        event("welcome", text="Hey, eve! Hope you enjoy the chat.", name="eve"),
        event("history", events=[said]),
    ]
    joined = public("joined", name="eve")
    assert bob.read().endswith(joined + event("quit", id=5, at=7, name="eve"))
    assert len({Room().chat.run_id for _ in range(9)}) == 9  # random for each run


@cases("line, why", ("/kick eve", NO_REASON), ("/kick eve why", "why"))
def test_closing_says_why(kept, ann, line, why):
    texts = {**batchat.CLOSING_TEXT, "kicked": f"You were kicked by ann: {why}"}
    for code in texts.keys() - {"banned"}:
        eve = kept.join("eve", protocol=Web)
        if code == "kicked":
            ann.types(line)
        else:
            kept.chat.start_closing(eve, code)
        eve.expect(event("closing", code=code, text=texts[code]))


def test_readme_bot_answers(server):
    pytest.importorskip("websockets")
    ann = server.join("ann")
    _bot = server.join("bot")
    ann.expect("* bot has joined the chat\n")
    bot = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    bot = bot.replace("localhost:1338", f"localhost:{server.web_port}")
    process = subprocess.Popen([sys.executable, "-c", bot])
    with process, ExitStack() as stack:
        stack.callback(process.kill)
        ann.expect("* bot_ has joined the chat\n")
        ann.types("!hello")
        ann.expect("<bot_> Hello, ann!\n")


# ------------
# Behind a proxy

def test_proxy_tells_the_address_of_a_browser(worlds):
    """The last address is the one that the nearest proxy has seen."""
    world, told = worlds(rate=10, per_address=2, behind_proxy=True), "203.0.113.5"
    browsers = []
    for addresses in [told, f"198.51.100.1, {told}", told, "2001:db8::1", None, "127.0.0.1"]:
        browsers.append(world.connects(Web, opens=False))
        browsers[-1].type(forwarded(addresses) + masked(1, f"p{len(browsers)}".encode()))
        world.wait()
    assert names(world) == ["p1", "p2", "p4", "p5", "p6"]
    assert b'"code":"crowded"' in browsers[2].got
    counted = {name: each.connection_count for name, each in world.reactor.limiter.quotas.items()}
    assert counted == {"localhost": 2, told: 3, "2001:db8::/64": 1}
    assert re.fullmatch(rf"{told} through 127\.0\.0\.1 port \d+", browsers[0].connection.peer_label)


def test_proxy_newcomer_who_is_banned_is_told(worlds):
    world = worlds(password=PASSWORD, behind_proxy=True)
    ann, _troll = world.joins("ann"), world.joins("troll", Web, host="for 203.0.113.5")
    world.wait()
    ann.types(f"/op {PASSWORD}", "/ban troll")
    world.wait()
    banned, other = (world.joins("eve", Web, host=f"for 203.0.113.{n}") for n in (5, 6))
    world.wait()
    text = "Your address is banned for another 60 min."
    assert events_in(banned.got) == [{"type": "closing", "code": "banned", "text": text}]
    assert names(world) == ["ann", "eve"] and not other.sock.shut


@cases(
    "proxy, host, told, status",
    *[(True, "127.0.0.1", told, 400) for told in ("", "%x", "x", "1.2.3.4, x", "1.2.3.4,")],
    *[(False, host, "1.2.3.4", 101) for host in ("127.0.0.1", "203.0.113.7")],
    (True, "203.0.113.7", "1.2.3.4", 101),
)
def test_no_other_address_is_believed(worlds, proxy, host, told, status):
    world = worlds(per_address=9, behind_proxy=proxy)
    newcomer = world.connects(Web, host=host, opens=False)
    newcomer.type(forwarded(told) + masked(1, b"mike"))
    world.wait()
    assert newcomer.got.startswith(b"HTTP/1.1 %d " % status)
    assert [*world.reactor.limiter.quotas] == [batchat.parse_address(host).network]


# ------------
# Nobody loses a line

@pytest.fixture
def world(worlds) -> World:
    return worlds()


@pytest.fixture
def paced(worlds) -> World:
    """A world with the default rate."""
    return worlds(rate=10)


def rested(world: World, *people: str, **newcomer) -> list[Peer]:
    """People who joined a minute ago, so that their buckets are full."""
    peers = [world.joins(name, **newcomer) for name in people]
    world.wait(60.0)
    for each in world.peers:
        each.read()
    return peers


def test_lines_sent_before_a_reset_are_said(houses, caplog):
    caplog.set_level("INFO", "batchat")
    house = houses(rate=100)
    mike, jonny = house.connects(b"mike\n"), house.connects(b"jonny\n")
    house.wait()
    jonny.reading = False
    jonny.sock.send(b"".join(b"line %d\n" % n for n in range(5000)))
    mike.sock.send(b"you will never read this\n")
    house.wait()
    jonny.sock.close()  # with a line unread, which makes it a reset
    mike.sock.send(b"nor this\n")  # which can't be sent
    for _ in range(50):  # seconds; the first lines were a burst
        house.wait(1)
    said = "".join(f"<jonny> line {n}\n" for n in range(5000)) + "* jonny has quit the chat\n"
    assert mike.got.endswith(crlf(said))
    assert "jonny left: Connection reset by peer" in caplog.text


def test_paste_is_paced_and_arrives_whole(paced):
    ann, mike = rested(paced, "ann", "mike")
    mike.types(*[f"line {n}" for n in range(2000)])
    mike.ended = True
    paced.wait(200.0)
    ann.expect("".join(f"<mike> line {n}\n" for n in range(2000)) + "* mike has quit the chat\n")


def test_leaver_is_closed_after_5_s(world):
    """Even one who does not hang up and sends on."""
    quiet, loud = world.joins("quiet"), world.joins("loud")
    for each in (quiet, loud):
        each.types("/quit")
    for _ in range(49):
        loud.type(b"x" * 16_384)
        world.wait(0.1)
    assert not quiet.sock.closed and not loud.sock.closed and not loud.arrived
    world.wait(1.2)
    assert quiet.sock.closed and loud.sock.closed


def test_lost_person_is_heard_for_2_minutes(paced):
    """Their lines are paced."""
    ann, ghost = rested(paced, "ann", "ghost")
    ghost.types(*["boo"] * 10_000)
    paced.wait()
    ghost.break_down(errno.ECONNRESET)
    for seconds, here in [(30.0, ["ann", "ghost"]), (92.0, ["ann"])]:
        paced.wait(seconds)
        assert names(paced) == here
    assert 1200 < ann.read().count("boo") < 1300


# ------------
# Nobody drowns out the others

@cases(
    "rest, lines, seconds, done",
    *[(60.0, ["hi"], 0.01, 50), (60.0, ["hi"], 10.0, 150)],
    (0.01, ["hi"], 0.01, 45),  # their joining was worth five lines
    (60.0, ["/nick mick", "/nick mike"], 9.0, 6),  # of 25 each; the last one on credit
)
def test_person_may_do_what_tokens_buy(paced, rest, lines, seconds, done):
    ann, mike = paced.joins("ann"), paced.joins("mike")
    paced.wait(rest)
    ann.read()
    mike.types(*lines * 200)
    paced.wait(seconds)
    assert 0.97 * done <= ann.read().count("\n") <= done


def test_long_answers_cost_more(room):
    """Else a few who ask who is here could use up a network."""
    ann = room.join("ann")
    for n in range(1000):
        room.newcomer(f"{'x' * 20}{n}")
    room.wait(60)
    before = room.limiter.clock.now - 5
    ann.types("/who")
    assert 2 < (ann.bucket.ready_at - before) * 10 < 4


def test_waiting_people_wake_the_loop_together(paced):
    """Every 50 ms at most, however many they are."""
    for each in rested(paced, *[f"t{n}" for n in range(60)]):
        each.types(*["hi"] * 100)
    paced.wait(2.0)
    before = paced.iterations
    paced.wait(1.0)
    assert paced.iterations - before < 30


@cases("host, people, share", ("203.0.113.5", 20, 10), ("::1", 120, 100))
def test_address_may_say_what_10_people_may(worlds, host, people, share):
    """All of localhost may say what 100 may; a burst is worth five seconds."""
    world = worlds(rate=1)
    witness = world.joins("witness", host="198.51.100.9")
    for each in rested(world, *[f"t{n}" for n in range(people)], host=host):
        each.types(*["hi"] * 10)
    for seconds, least, most in [(0.01, 4.5, 5), (2.0, 1.5, 2)]:
        world.wait(seconds)
        assert least * share < witness.read().count("hi") <= most * share + 1


@cases("host", "127.0.0.1", "203.0.113.5")
def test_lost_people_are_few_at_a_time(worlds, host):
    """However many say much and are reset; others are still heard, even those who are lost."""
    world = worlds(rate=10, per_address=20)
    ann, mike, eve = rested(world, "ann", "mike", "eve", host=host)
    eve.types(*["here"] * 60)
    world.wait(0.01)
    eve.break_down(errno.ECONNRESET)
    for n in range(130):
        peer = world.joins(f"p{n}", host=host)
        peer.types(*["y"] * 500)
        world.wait(0.01)
        peer.break_down(errno.ECONNRESET)
    world.wait(0.01)
    assert 10 < len(world.reactor.clients) <= 2 + 100 + 2
    mike.types("one", "two", "three")
    world.wait(2.0)
    shown = ann.read()
    assert re.findall("<mike> (.*)\n", shown) == ["one", "two", "three"]
    world.wait(10.0)
    assert (shown + ann.read()).count("<eve> here") == 60


def test_lost_people_are_heard_while_places_are_free(worlds):
    world = worlds(rate=10)
    ann = world.joins("ann", host="198.51.100.1")
    for n in range(40):
        peer = world.joins(f"p{n}", host=f"203.0.113.{n}")
        peer.types(*["hi"] * 60)
        world.wait(0.01)
        peer.break_down(errno.ECONNRESET)
    world.joins("mike", host="198.51.100.2")
    world.wait(10.0)
    assert ann.read().count("hi") == 40 * 60


def test_those_who_are_done_are_evicted_first(worlds):
    """Before those who have something to read."""
    world = worlds(rate=10, max_connections=2)
    (ann,), (mike,) = rested(world, "ann"), rested(world, "mike", host="203.0.113.5")
    mike.accepts(0)
    ann.types("hello")
    mike.types(*["hi"] * 30, "/quit")
    world.wait(0.01)
    for _ in range(40):
        world.connects()
        world.wait(0.001)
    mike.accepts(UNLIMITED)
    world.wait(0.1)
    mike.expect("<ann> hello\n")


def test_reconnecting_refills_no_bucket(paced):
    witness = paced.joins("witness")
    for number in range(40):
        if number == 20:
            paced.wait(6.0)  # all have left; the address may say 100 to 200 lines by now
            assert witness.read().count("spam") == 800
        peer = paced.joins(f"p{number}", host=f"2001:db8::{number}")
        peer.types(*["spam"] * 40)
        peer.ended = True
    paced.wait(0.1)
    assert 50 < witness.read().count("spam") < 150


@cases(
    "flood",
    *(b"x" * 512, b"\xff\xfa" + b"x" * 510, b"\xff\xf1" * 256, b"\xff\xf6" * 256, b"\n" * 512),
    ids=["line", "subnegotiation", "commands", "are you there", "blank lines"],
)
def test_input_is_paced_by_its_bytes(paced, flood):
    """A token buys a step of 512 bytes.  Others are heard beside it."""
    ann, vandal = rested(paced, "ann", "vandal")
    vandal.type(flood * 2000)
    paced.run_once()
    assert len(vandal.connection.read_buffer) == 16_384 - 512
    ann.types("/who")
    paced.wait()
    ann.expect("* 2 here: ann, vandal\n")
    paced.wait(10.0)
    assert 2000 * 512 - len(vandal.arrived) <= 512 * 10 * (10 + 5) + 65_536 + 512


def test_private_lines_do_not_silence_reader(paced):
    ann, mike = paced.joins("ann"), stalls(paced, "mike")
    trolls = [paced.joins(f"troll{n}", host=f"203.0.113.{n}") for n in range(30)]
    for each in trolls:
        each.types(*["/msg mike " + LONG] * 5)
    paced.wait(1.0)
    assert 65_536 < mike.connection.outbox.private_size < 65_536 + 4200
    assert "* mike has too much to read; your line was not sent.\n" in trolls[-1].read()
    mike.types("help!")
    paced.wait(0.1)
    assert "<mike> help!\n" in ann.read()


@cases("flood, start", ("renames", 300), ("joins", 0))
def test_line_passes_flooding_neighbours(worlds, flood, start):
    """Those who have had least of their address's share are served first."""
    world = worlds(rate=10, per_address=100)
    (witness,), (ann,) = rested(world, "witness"), rested(world, "ann", host="203.0.113.5")
    flooders: list[Peer] = []
    for tick in range(start + 50):  # of a tenth of a second
        flooders = [each for each in flooders if not each.sock.closed]
        for n in range(95 - len(flooders)):
            flooders.append(world.joins(f"f{tick}-{n}", host="203.0.113.5"))
            flooders[-1].types(*[f"/nick a{n}", f"/nick b{n}"] * 20 * (flood == "renames"))
        for each in flooders:
            each.ended |= flood == "joins" and each.stage == "chatting"
        if tick >= start and tick % 25 == 10:
            ann.types("hello")
        world.wait(0.1)
        if tick >= start and tick % 25 == 19:
            assert witness.read().count("<ann> hello\n") == 1


def test_iteration_handles_50_ms_of_input(world):
    """A step takes 20 ms here.  Those who were served wait until the others were, too."""
    talkers = rested(world, *[f"t{n}" for n in range(9)])
    step, served = world.reactor._process_input, []

    def slow_step(connection):
        served.append(connection.name)
        step(connection)
        world.pass_by(0.02)

    world.reactor._process_input = slow_step
    for each in talkers:
        each.type(b"x" * 50_000)
    for iteration in range(1, 7):
        world.run_once()
        assert len(served) == 3 * iteration
    assert [*Counter(served).values()] == [2] * 9


# ------------
# Nobody holds up the room

def pauses(world: World) -> tuple[Peer, Peer]:
    """A talker and a stalled reader, for whom the room is paused."""
    talker, sleeper = world.joins("talker"), stalls(world, "sleeper")
    talk(world, talker, 800)
    assert world.reactor.is_paused and talker.arrived
    return talker, sleeper


def test_sockets_have_their_options(our_end):
    """A send buffer of 2 MiB that does not grow, no delay, urgent data in its place."""
    with socket.socket() as fixed:
        fixed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20)  # see tcp(7)
        sizes = [each.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for each in (our_end, fixed)]
    assert sizes[0] == sizes[1]
    assert (socket.SOL_SOCKET, socket.SO_SNDBUF, 2 << 20) in batchat.SOCKET_OPTIONS
    assert our_end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert our_end.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)


def test_room_pauses_above_512_kib_of_lag(world):
    talker, sleeper = world.joins("talker"), stalls(world, "sleeper")
    for lines in (["x" * (1024 - len("<talker> \r\n"))] * 512, ["one more"]):
        assert not world.reactor.is_paused
        talker.types(*lines)
        world.wait()
        assert sleeper.connection.outbox.lag >= 524_288
    assert world.reactor.is_paused


def test_iteration_adds_512_kib(world):
    talkers = rested(world, *[f"talker{n}" for n in range(60)])
    for each in talkers:
        each.types(*[LONG] * 4)
    end = world.reactor.chat.logs[Telnet].end
    world.run_once()
    assert 524_288 < world.reactor.chat.logs[Telnet].end - end < 524_288 + 4096
    world.wait()
    assert not any(each.arrived for each in talkers)


def test_full_iteration_lets_others_go_next(world, monkeypatch):
    """Equal ones take turns, whether or not all that they were fed is processed."""
    monkeypatch.setattr(batchat, "LAG_LIMIT", 2048)
    flooder, mike = rested(world, "flooder", "mike")
    flooder.types(*["/who"] * 1000)
    world.run_once()
    mike.types("hi")
    world.run_once()
    world.run_once()
    assert "<mike> hi" in flooder.read()


def test_input_is_read_16_kib_at_a_time(world):
    mike, _ = world.joins("mike"), pauses(world)
    mike.type(b"x" * 200_000)
    for total in (16_384, 32_768, 49_152, 65_536, 65_536):
        world.run_once()
        assert 200_000 - len(mike.arrived) == total
    assert world.reactor.is_paused


def test_stalled_readers_dropped_after_2_s(world):
    """A fifth of the time without a pause is given back to the stall budget."""
    ann, _other, (talker, _) = world.joins("ann"), stalls(world, "other"), pauses(world)
    world.wait(1.9)
    assert names(world) == ["ann", "other", "talker", "sleeper"]
    world.wait(0.1)
    assert names(world) == ["ann", "talker"]
    assert "* sleeper has quit the chat\n" in ann.read() and not talker.arrived
    stalls(world, "third")
    world.wait(5.0)
    talk(world, talker, 600)
    for seconds, here in [(0.9, ["third"]), (0.2, [])]:
        world.wait(seconds)
        assert names(world) == ["ann", "talker", *here]


def test_ignored_lines_count_as_lag(room):
    ann, bob, sleeper = map(room.join, ["ann", "bob", "sleeper"])
    sleeper.types("/ignore ann")
    for each in [ann, bob] * 100:
        each.types("x")
    assert sleeper.outbox.lag > 100 * 128


def test_reader_noticed_before_selector_tells(world):
    talker, slow = pauses(world)
    slow.low_water = 1 << 20
    slow.accepts(600_000)
    world.wait(0.1)
    assert not world.reactor.is_paused and not talker.arrived


def test_room_waits_for_leavers_too(world):
    """Else what they must still read would grow without bound."""
    talker, slow = world.joins("talker"), stalls(world, "slow")
    talk(world, talker, 400)
    slow.types("/quit")
    talk(world, talker, 400)
    assert world.reactor.is_paused and talker.arrived


def test_slow_reader_costs_no_call_per_line(world):
    talker, slow = world.joins("talker"), stalls(world, "slow")
    slow.sock.send = mock.Mock(side_effect=slow.sock.send)
    for _ in range(100):
        talker.types("x")
        world.run_once()
    assert slow.sock.send.call_count <= 2


# ------------
# Nobody freezes a screen or plays tricks on it

ANYTHING = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\b\x7f\x15\x1b\u202e\t")
)
ERASING = "\b\x7f\x15\x1b\x9b"
NOT_ON_A_SCREEN = {*map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029])}
NOT_ON_A_SCREEN |= {*map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)])}
COMMAND_LINES = st.sampled_from(["/me ", "/msg ann ", "/nick ", "//", "/", "/quit ", "\t/bye"])


def test_each_forbidden_character_is_removed():
    everything = [*map(chr, [*range(0xD800), *range(0xE000, 0x30000)])]
    kept = clean("".join(each for each in everything if each not in ERASING))
    assert {*everything} - {*kept} == NOT_ON_A_SCREEN


@cases(
    "typed, shown",
    ("abc\x1b[D\x1b[D", "abc"),  # arrows
    ("\x1b[1;5Cx\x1b[?25ly\x1b[ qz\x9b31m", "xyz"),  # CSI, its parameters and its letter
    ("\x1bOPx\x1bO\x1b[[Ay", "xy"),  # SS3 and its letter; F1 on Linux's console
    ("\x1b]0;title\x07x\x1b]8;;http://x\x1b\\y\x1b]2;no end", "xy"),  # OSC up to its end
    ("a\x1b", "a"),
    ("\x1bba\x1b\x7fc", "ac"),  # Alt-b, Alt-Backspace: an ESC and one character
    ("\x1b\x1b[Aa", "a"),  # Alt and an arrow
    ("\x1b[12\u00e9", "12\u00e9"),  # nothing that a terminal knows
    *[(f"{each}/op x", "/op x") for each in ("\x1b", "\x1b\x1b", "\x1b[", "\x9b")],
    ("one\ttwo\t\t", "one two  "),
)
def test_escape_sequences_are_removed_whole(typed, shown):
    assert heard(f"{typed}\n".encode()) == [shown]
    assert sent(masked(1, typed.encode())) == ([shown], [])


@given(st.one_of(st.just(""), COMMAND_LINES), ANYTHING)
def test_typed_text_looks_like_no_notice(start, text):
    room = Room()
    mike, ann = room.join("mike"), room.join("ann")
    typed = clean(start + text)
    assert clean(typed) == typed and not NOT_ON_A_SCREEN & set(typed)
    mike.types(typed)
    shown = ann.read()
    assert shown.count("\n") == (1 if shown else 0)
    assert shown == "" or shown.startswith(("<mike> ", "** mike ", "* mike ", "[mike -> ann] "))
    if shown.startswith("* mike "):
        assert batchat.COMMANDS[typed.split()[0].lower()].usage in ("/quit", "/nick NAME")


# What telnet sends

# Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Indic, Thai, Georgian, kana, Chinese, Korean
SCRIPTS = [(0xC0, 0x17F), (0x370, 0x6FF), (0x900, 0xDFF), (0xE00, 0xE5C), (0x10A0, 0x10FF)]
SCRIPTS += [(0x3041, 0x30FF), (0x4E00, 0x5200), (0xAC00, 0xB000)]
ALPHABETS = st.sampled_from(
    [*" a\u201d\U0001f600", *(chr(n) for first, end in SCRIPTS for n in range(first, end))]
)


def is_unfinished(text: bytes) -> bool:
    """Whether the last character of `text` lacks some of its bytes in UTF-8."""
    last = re.search(rb"([\xc2-\xf4])([\x80-\xbf]*)\Z", text)
    return bool(last) and len(last[2]) < 1 + (last[1] >= b"\xe0") + (last[1] >= b"\xf0")


def telnet_by_the_byte(data: bytes) -> tuple[list, bytes]:
    """The same as `telnet`, as RFC 854 reads: commands byte by byte, then lines."""
    byte_of = {key: byte | 0x80 for byte, key in KEYS_OF_TELNET.items()}
    byte_of[243] = byte_of[238]  # an older name for it
    typed = {**{command: byte & 0x7F for command, byte in byte_of.items()}, 255: 255}
    text, replies, rest = b"", b"", iter(data)
    with suppress(StopIteration):
        while True:
            byte = next(rest)
            if byte == 255:
                command = next(rest)
                if command in (251, 252, 253, 254):
                    option = next(rest)
                    if command in (251, 253) and option:
                        replies += bytes([255, 254 if command == 251 else 252, option])
                elif command in byte_of and is_unfinished(text):
                    text += bytes([byte_of[command]])
                elif command in typed:
                    text += bytes([typed[command]])
                continue
            text += bytes([byte])
    said, key = re.match(rb"([^\3\4]*)([\3\4]?)", text).groups()
    *lines, _ = re.split(rb"\r\n|\r\0|\r|\n", said)
    messages = [
        batchat.TOO_LONG if len(line) > 4096 else clean(batchat.decode_line(line)) for line in lines
    ]
    return messages + [DISCONNECT] * len(key), replies


TELNET_PIECES = [
    *(b"\r\n", b"\r\0", b"\r", b"\n", b"\0", b"\b", b"\x7f", b"\x03", b"\x04", b"\xff\xf4"),
    *(b"\xff", b"\xff\xff"),
    *(b"\xd0", b"\xe3", b"\xe3\x83", b"\xf0\x9f", b"\x98\x83", b"\xff\xfb\0"),
    *(b"\xff\xfd\x06", b"\xff\xfb\x1f", b"\xff\xfc\x01", b"\xff\xfe\x03"),
    *(b"hello", "h\u00e9 \u4f60 \U0001f600".encode(), b"x" * 4096, b"y" * 4097),
    *(bytes([255, n]) for n in range(236, 251)),
]
TELNET = st.lists(st.sampled_from(TELNET_PIECES) | st.binary(max_size=4), max_size=12)
PLACES = st.lists(st.integers(0, 10**6), max_size=12)
# Ctrl-C as IP, or as it is; Ctrl-D as EOF, or as it is
QUIT_KEYS = [b"\xff\xf4", b"\x03", b"\xff\xec", b"\x04"]
MARK = CTRL_C[2:]


@example(b"\x03\xd0\xff\xf6", [1, 2])  # after Ctrl-C, half a letter and AYT
@given(TELNET.map(b"".join), PLACES)
def test_cuts_change_no_line_and_no_answer(data, places):
    messages, answers = telnet(*cut(data, places))
    same = re.sub(rb"\r(?!\n)", b"", answers.replace(ASKS_FOR_BINARY, b""))  # however it is cut
    assert (messages, same) == telnet_by_the_byte(data)


@cases(
    "reads, lines", ([b"a\r\nb\r\0c\nd\re\r\n"], ["a", "b", "c", "d", "e"]),
    ([b"\r\n\n\r"], ["", "", ""]),
    ([b"a\r", b"\nb\r", b"c\n"], ["a", "b", "c"]),  # a lone CR ends its line at once
    ([b"a\r", b"\0" + b"x" * 4096 + b"\n"], ["a", "x" * 4096]),  # CR NUL, cut in two
    ([b"helpp\b\x7flo\b\blo\n"], ["hello"]),  # backspace and delete
    ([b"\b\bnonsense\x15sense\n"], ["sense"]),  # Ctrl-U
    ([b"hexx\xff\xf7\xff\xf7llo\n", b"oops\xff\xf8good\n"], ["hello", "good"]),  # EC, EL
    ([b"caf\xe9 \xe9\n"], ["caf\ufffd \ufffd"]),  # broken UTF-8
    ([b"one\ntwo\nthr", b""], ["one", "two", DISCONNECT]),  # what Enter did not end is not said
    *(([b"said\nno" + key + b"no\nno\n"], ["said", DISCONNECT]) for key in QUIT_KEYS),
    ([b"x" * 4096 + b"\n", b"x" * 4097 + b"\nnext\n"], ["x" * 4096, batchat.TOO_LONG, "next"]),
    ([b"a\xc2", b"\xff\xfb\0", b"\xff\xf4b\n"], ["ab"]),  # half a letter, BINARY, the rest
    ([b"\xe3", b"\x83", b"\xff\xf3\n"], ["\u30dc"]),  # a letter in three reads
)
def test_bytes_become_the_lines_typed(reads, lines):
    assert heard(*reads) == lines


@cases(
    "answer, reads",
    (b"\xff\xfc\x06\xff\xfe\x1f", [b"\xff\xfd\x06\xff\xfb\x1f"]),  # options are refused
    (b"", [b"\xff\xfc\x06\xff\xfe\x06"]),  # refusals
    (b"", [b"\xff\xfb\0\xff\xfd\0"]),  # BINARY, which is wanted
    *[(b"", [read, read]) for read in ("М\r\n".encode(), "М\r\0".encode(), b"\xff\xf1")],
    *[(b"", [b"\xff\xf1", line]) for line in (b"in ascii\r\n", b"from putty\r")],
    (b"\r", [b"\xff\xf1", b"in binary\n"]),  # where Enter moves the cursor straight down
)
def test_telnet_is_answered(answer, reads):
    """It is asked for BINARY, once."""
    assert telnet(*reads)[1] == ASKS_FOR_BINARY + answer


@given(st.text(ALPHABETS), PLACES)
def test_other_clients_get_utf_8_alone(text, places):
    """Until it has shown to be a telnet, a client is sent no telnet command."""
    assert telnet(*cut(f"{text}\n{text}\n".encode(), places))[1] == b""
    assert telnet(*cut(f"{text}\r\n".encode("ascii", "ignore"), places))[1] == b""


@cases("letter", *"\u0405\u0445\u00c5\u03c5\u0645\u0905\u0e05\u314b\ub155")
def test_letter_without_its_ctrl_e_is_mended(letter):
    text = f"a{letter}b {letter}{letter} {letter}"
    assert b"\x85" in text.encode()
    assert heard(text.encode().replace(b"\x85", b"") + b"\r\n") == [text]


@cases("lines, seconds", (5_585, 0.0), (600, 3.0), (0, 0.0))
@cases(
    "reads", *([CTRL_C], [b"\xff\xf1" + CTRL_C], [b"\x03"]),
    [typed_in_telnet("\u3084") + CTRL_C],  # after a letter that holds a key
    [b"\xff", b"\xf4" + MARK],  # cut in two
)
def test_ctrl_c_drops_what_waits_and_leaves(paced, reads, lines, seconds):
    """5,585 of these lines have 60 KiB."""
    ann, mike = rested(paced, "ann", "mike")
    mike.types(*["\u0443 \u30ca\u30c3"] * lines)
    paced.wait(seconds)
    for read in [*reads, b"never heard\r\n"]:
        mike.type(read)
        paced.wait()
    said = ann.read()
    assert said.endswith("* mike has quit the chat\n")
    assert 45 < said.count("\n") < 100 or said.count("\n") == 1 and not lines
    assert mike.sock.shut
    assert mike.got.endswith(b"\xff\xfc\x06") or reads == [b"\x03"]


@given(st.text(ALPHABETS), PLACES)
def test_no_letter_is_lost_or_taken_for_ctrl_c(text, places):
    text += "\u30c3\U0001f3c3"
    protocol, ahead = Telnet(), b""
    for n, read in enumerate(cut(typed_in_telnet(f"{text}\n"), places)):
        ahead += read
        assert n % 2 or not protocol.scan_for_interrupt(ahead)
        half = len(ahead) // 2
        if half:
            protocol.feed(ahead[:half])
        ahead = ahead[half:]
    protocol.feed(ahead)
    assert protocol.next() == clean(text)
    protocol.feed(b"\xff\xf4")
    assert protocol.scan_for_interrupt(b"")


@cases("leaves, least, most", (b"", 10_000, 12_000), (b"\x04", 0, 0))
def test_each_byte_is_scanned_once_for_ctrl_c(paced, monkeypatch, leaves, least, most):
    """Of those who wait; of those who have left, none."""
    mike, counting = paced.joins("mike"), mock.Mock(side_effect=batchat.split_telnet_commands)
    mike.type(leaves or b"hi\r\n" * 60)
    paced.wait(0.1)
    monkeypatch.setattr(batchat, "split_telnet_commands", counting)
    for _ in range(100):
        mike.type(b"x" * 100)
        paced.run_once()
    assert least <= sum(len(call[0][0]) for call in counting.call_args_list) <= most


@cases(
    "sends",
    typed_in_telnet("\u0443 \u30ca\u30c3 \U0001f603 \U0001f3c3"),  # letters made of Ctrl-C
    b"\xff\xfd\x03\xff\xfb\x03",  # options
    b"\xff\xff\xf4",  # an escaped byte, and the next
    b"\xc2\xff\xfb\0\xff\xf4",  # half a letter, BINARY, the rest
    b"\x04",  # Ctrl-D leaves when all is said
)
def test_nothing_else_drops_what_waits(paced, sends):
    ann, mike = rested(paced, "ann", "mike")
    mike.types(*["hi"] * 200)
    for byte in sends:
        mike.type(bytes([byte]))
        paced.wait()
    mike.type(sends)
    paced.wait()
    assert names(paced) == ["ann", "mike"]
    paced.wait(60.0)
    assert ann.read().count("<mike> hi") == 200


# ------------
# It does not fall over

def test_endless_input_is_not_kept():
    """No more is kept than a line and a read."""
    protocol = Telnet()
    for _ in range(100):
        protocol.feed(b"x" * 16_384)
        while protocol.next():
            pass
        assert len(pickle.dumps(protocol)) <= 4096 + 16_384 + 1000
    protocol.feed(b"\nnext\n")
    assert [protocol.next(), protocol.next()] == [batchat.TOO_LONG, "next"]


def test_long_name_is_not_normalized_as_a_whole(room):
    """That takes time by the square of its marks."""
    mike, marks = room.join("mike"), "a" + "\u0344\u0316" * 1000
    assert len(batchat.name_key(marks)) < 400
    mike.types("/nick " + marks, "/ignore " + marks)
    mike.expect(f"* {NAME_RULE}\n* Nobody here is called {marks}.\n")


def test_nothing_is_kept_of_people_who_left(room):
    """But the last 10,000 former names and their addresses, for operators."""
    mike, troll = room.join("mike"), room.join("troll")
    mike.types("/ignore troll", "hello")
    troll.types("/ignore mike", "/msg mike psst")
    mike.types("/quit")
    room.chat.to_reconcile.clear()  # as the reactor does in each iteration
    room.limiter.remove(mike)
    room.guests.remove(mike)
    left = weakref.ref(mike)
    del mike
    gc.collect()
    assert left() is None and room.chat._find_last("mike")
    troll.types(*[f"/nick t{n}" for n in range(10_000)])
    with pytest.raises(batchat.Refused):
        room.chat._find_last("mike")


@cases(
    "host, ours, group",
    *[(host, "", "2001:db8::/64") for host in ("2001:db8::1", "2001:db8::ffff:2%eth0")],
    *[("2001:db8:0:1::1", "", "2001:db8:0:1::/64"), ("::ffff:192.0.2.1", "", "192.0.2.1")],
    *[(host, "", "localhost") for host in ("127.0.0.1", "::1", "::ffff:127.1.2.3")],
    *[("2001:db8::7", "2001:db8::1", "2001:db8::7"), ("fe80::7%eth0", "fe80::1%eth0", "fe80::7")],
    ("2001:db8::7", "2001:db8:0:1::1", "2001:db8::/64"),
    *[("203.0.113.5", ours, "203.0.113.5") for ours in ("203.0.113.1", "fe80::1%eth0")],
)
def test_ipv6_64_counts_as_one_address(worlds, monkeypatch, host, ours, group):
    """But in our own network, each address does."""
    world = worlds()
    monkeypatch.setattr(SimulatedSocket, "getsockname", lambda sock: (ours or "127.0.0.1", 1337))
    world.joins("mike", host=host)
    world.wait()
    assert [*world.reactor.limiter.quotas] == [group]


def test_table_of_addresses_is_bounded(room, monkeypatch):
    """Those in use stay."""
    monkeypatch.setattr(batchat, "QUOTAS_LIMIT", 100)
    room.join("mike", "203.0.113.1")
    for n in range(300):
        room.limiter.remove(room.newcomer(host=f"10.0.{n // 256}.{n % 256}"))
    assert len(room.limiter.quotas) <= 100
    assert "203.0.113.1" in room.limiter.quotas


def test_64_descriptors_and_120_newcomers():
    full = b"* BATCHAT is full"
    with Server(descriptors=64) as server:
        mike, ann = server.join("mike"), server.join("ann")
        mike.expect("* ann has joined the chat\n")
        newcomers = [server.connect() for _ in range(120)]
        assert 58 < sum(each.sock.recv(len(full)) == full for each in newcomers) < 100
        mike.types("still there?")
        ann.expect("<mike> still there?\n")
        for newcomer in newcomers:
            newcomer.sock.close()
        # They are gone when the server has seen it; until then a newcomer is rejected.
        wait_until(lambda: server.connect().sock.recv(1) != b"*")
        server.join("late")


def test_too_few_descriptors_end_with_status_1():
    done = run(*command_line(descriptors=30))
    assert done.returncode == 1
    assert done.stderr == "batchat: too few descriptors are allowed; see ulimit -n\n"


def test_unread_replies_keep_their_reader_waiting(world):
    mike = stalls(world, "mike")
    mike.types(*["/help"] * 2000)
    world.wait(1.0)
    assert 131_072 < mike.connection.outbox.private_size < 131_072 + len(crlf(HELP))
    mike.accepts(UNLIMITED)
    world.wait(1.0)
    assert mike.read().count(HELP) == 2000


def test_newcomer_has_2_minutes_to_give_a_name(world):
    """What has arrived when the machine was suspended counts first."""
    _mike, newcomer, browser, late = world.joins("mike"), *map(world.connects, (Telnet, Web, Web))
    world.wait(119.0)
    for each in (newcomer, browser):
        assert each.read().rstrip("\n") == GREETING
    browser.type(masked(10, b""))  # it answers pings
    late.types("ann")
    world.jumps(2.0)
    world.wait()
    assert newcomer.read() == browser.read() == "* No name given in time, goodbye!\n"
    assert names(world) == ["mike", "ann"]


@cases(
    "limits, host, text",
    *[({limit: 2}, "203.0.113.6", FULL) for limit in ("people", "max_connections")],
    ({"per_address": 2}, "203.0.113.5", CROWDED),
)
def test_where_it_is_full_newcomers_are_rejected(worlds, limits, host, text):
    """They are told so, and do not count; when somebody leaves, there is space again."""
    world = worlds(**limits)
    ann, _ = world.joins("ann", host="203.0.113.5"), world.joins("bob", host="::ffff:203.0.113.5")
    world.wait()
    late = [*(world.joins("cy", host=host) for _ in range(3)), world.connects(Web, host)]
    world.wait()
    assert {each.read() for each in late} == {text}
    assert late[-1].got.endswith(b"\x88\x02\x03\xf5")  # 1013, try again later
    ann.ended = True
    world.wait(1.1)
    world.joins("eve", host=host)
    world.wait()
    assert names(world) == ["bob", "eve"]


@cases(
    "limits, protocol, host, most", ({"max_connections": 10}, Telnet, "198.51.100.9", 10 + 16),
    ({"per_address": 10}, Telnet, "203.0.113.5", 10 + 100),
    ({"per_address": 10, "behind_proxy": True, "rate": 9}, Web, "for 203.0.113.5", 10 + 100),
)
def test_rejected_newcomers_take_no_place(worlds, limits, protocol, host, most):
    """They are few at a time.  Nobody else is closed for them."""
    world = worlds(**limits)
    here = rested(world, *[f"p{n}" for n in range(10)], protocol=protocol, host=host)
    for _ in range(30):
        for _ in range(5):
            world.connects(protocol, host)
        world.wait(0.01)
        assert len(world.reactor.clients) <= most
    world.wait(6.1)
    assert not any(each.sock.closed for each in here)
    assert len(world.reactor.clients) == 10


@cases(
    "call, error", *[(call, errno.ENOMEM) for call in CALLS],
    *[(call, OURS) for call in ("recv", "register", "parse_name", "joined", "renamed", "quit")],
)
def test_failed_call_costs_one_connection(world, monkeypatch, call, error):
    """The log says why; for errors of ours, with a traceback."""
    (ann,), mike = rested(world, "ann"), world.connects()
    mike.faults[call] = error
    if call == "parse_name":
        monkeypatch.setattr(batchat, call, lambda _: mike.sock.call(call))
    chat, publish = world.reactor.chat, world.reactor.chat.publish
    if call in batchat.TEMPLATES:  # showing that mike has joined, for example
        fail = {call: lambda *_, **how: mike.sock.call(call)}
        chat.publish = lambda kind, *who, **how: fail.get(kind, publish)(kind, *who, **how)
    mike.types("mike")
    world.wait()
    mike.accepts(0)  # which asks the selector for another event
    ann.types(*["hello"] * 3)
    world.wait()
    mike.accepts(UNLIMITED)
    mike.types("/nick mick", "/quit")
    world.wait()
    mike.ended = True
    world.wait(6.0)
    assert world.reached[f"{call} fails"] or call == "unregister"
    assert mike.sock.closed and ann.is_here
    if call not in ("unregister", "close"):
        why = "an internal error" if error == OURS else os.strerror(error)
        assert why in str(batchat.logger.method_calls)
        assert batchat.logger.exception.called == (error == OURS)


@cases("times, shown", (1, SHUTTING_DOWN), (2, ""))
def test_failed_selector_shuts_down(world, times, shown):
    (ann,) = rested(world, "ann")
    ann.sock.failed = errno.EIO * (times - 1)  # so that the model lets us close it
    fails, works = mock.Mock(side_effect=OurError), world.selector.select
    selects = itertools.chain([fails] * times, itertools.repeat(works))
    world.selector.select = lambda timeout: next(selects)(timeout)
    world.budget, world.polite = NEVER, True
    assert not world.reactor.run()
    assert ann.read() == shown
    assert batchat.logger.exception.called


def test_input_counts_though_no_reply_can_be_sent(world):
    ann, mike = world.joins("ann"), world.connects()
    world.wait()
    mike.send_error, mike.sends_to_fail = errno.ENOBUFS, UNLIMITED
    mike.types("a b", "mike")
    world.run_once(segment=5)  # the refusal of the first name can't be sent
    ann.types("hello")
    world.wait()
    assert "* mike has joined the chat\n* mike has quit the chat\n" in ann.read()
    assert mike.sock.closed


def test_dropped_reader_leaves_nothing_buffered(houses):
    house = houses(rate=0)
    talker, sleeper = house.connects(b"talker\n"), house.connects(b"sleeper\n", buffer=4096)
    house.wait()
    sleeper.reading = False
    for connection in house.reactor.clients:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while not house.reactor.is_paused:
        talker.sock.send(b"x" * 4000 + b"\n")
        house.run_once()
    house.wait(2)
    sleeper.sock.settimeout(TIMEOUT)
    with pytest.raises(ConnectionResetError):  # after a plain close, all is delivered
        all(iter(lambda: sleeper.sock.recv(1 << 16), b""))


def test_2_000_people_may_call_at_once():
    resource = pytest.importorskip("resource")
    queue = Path("/proc/sys/net/core/somaxconn")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200
    if not queue.exists() or min(int(queue.read_text()), most) < 2000:
        pytest.skip("the system allows no such queue")
    with ExitStack() as stack:
        listener = stack.enter_context(batchat.open_listener("127.0.0.1", 0))
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(2000):
            newcomer = stack.enter_context(socket.socket())
            newcomer.setblocking(False)
            newcomer.connect_ex(listener.getsockname())
            selector.register(newcomer, selectors.EVENT_WRITE)
        assert len(selector.select(0)) == 2000


@cases("output, has_reader", (">/dev/full", True), (">&-", True), ("", False), ("", True))
def test_opening_lines_go_to_the_log_if_need_be(output, has_reader):
    """Where standard output is full, is not open, or nobody reads it."""
    command = command_line("--port", "0", "--web-port", "0", first=f"exec {output}")
    ours, theirs = socket.socketpair()
    if has_reader:  # a byte at a time, so that not one more fits
        with suppress(BlockingIOError):
            while ours.send(b"x", socket.MSG_DONTWAIT):
                pass
    else:
        theirs.close()
    process = subprocess.Popen(command, stdout=ours, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    with ours, theirs, process:
        line = next(line for line in process.stderr if "listens on" in line)
        port = int(re.search(r"port (\d+)", line)[1])
        with socket.create_connection(("127.0.0.1", port)) as newcomer:
            assert newcomer.recv(3) == b"   "
        process.terminate()
        process.stderr.read()
        assert process.wait(TIMEOUT) == 0
        watchdog.cancel()


HOSTILE_FIELDS = [
    *(b"a:" + b" " * 8100 + b"x", b"a: " + b"x " * 4000, b"a:\r\n" * 2000, b"a: b\r\n" * 1300),
    b"Content-Type: multipart/mixed" + b"; boundary*0=b" * 500,
    *(b"Connection: " + b"," * 8000, b"Sec-WebSocket-Key: " + b"=" * 8000, b":" * 8000),
    b"\r" * 8000,
]
# Of each kind, the first is harmless.
SHAPES = {
    "head": [
        request({f"X-Header-{n}": "x" * 60 for n in range(90)}, "GET / HTTP/1.1"),
        *(b"GET / HTTP/1.1\r\nHost: x\r\n" + each + b"\r\n\r\n" for each in HOSTILE_FIELDS),
        b"GET " + b"/" * 8000 + b" HTTP/1.1\r\n\r\n",
        b"GET http://" + b"[" * 8000 + b" HTTP/1.1\r\n\r\n",
        *(b"!" * 8100 + b"\r\n\r\n", b"\r\n" * 4000),
    ],
    "telnet": [
        *(b"a line of ordinary length\r\n" * 300, b"\xff" * 8192),
        *(b"\xff\xf1" * 4096, b"\xff\xf6" * 4096, b"\xff\xfd\x06" * 2700, b"\r" * 8192),
        *(b"x" * 4000 + b"\b" * 4096 + b"\n", b"x\b" * 2000 + b"\n", b"\x15x" * 2000 + b"\n"),
        *(b"\x1b[" * 2000 + b"\n", b"\x1b]" * 2000 + b"\n", b"\x1b[" + b"0" * 4000 + b"\n"),
        *(b"\xd0\xff\xf4\xff\xfd\x06" * 1360 + b"\n", b"\xc3" * 4000 + b"\n"),
        *(b"a " * 1300 + b" HTTP/\n", "\u0344".encode() * 1300 + b"\n"),
    ],
    "frames": [
        *(masked(1, b"a line of ordinary length") * 250, masked(9, b"") * 1300),
        masked(1, b"", False) + masked(0, b"", False) * 1300,
        masked(1, b"x", False) + masked(0, b"x", False) * 1000,
        *(masked(1, each) * 2 for each in (b"\n" * 4096, b"\r\n" * 2000, "\u202e".encode() * 1300)),
    ],
}
STARTS = {"head": b"", "telnet": b"mike\n", "frames": OPENING + masked(1, b"mike")}


def seconds_of(kind: str, data: bytes) -> float:
    """How long the program works on what somebody sends."""
    room = Room(rate=0)
    guest = batchat.Client("", room.chat.logs[Telnet if kind == "telnet" else Web], 0.0)
    room.limiter.add(guest, "127.0.0.1")
    if kind == "telnet":
        room.chat.greet(guest)
    before = time.process_time()
    guest.protocol.scan_for_interrupt(STARTS[kind] + data)
    guest.protocol.feed(STARTS[kind] + data)
    while guest.state is not CLOSING and (message := guest.protocol.next()) is not None:
        room.chat.handle(guest, message)
    return time.process_time() - before


@cases("kind, number", *[(kind, n) for kind in SHAPES for n in range(1, len(SHAPES[kind]))])
def test_hostile_input_is_no_dearer_than_plain(kind, number):
    """8 KiB of any shape cost twenty times as much at most."""
    runs = [[seconds_of(kind, SHAPES[kind][n]) for n in (0, number)] for _ in range(5)]
    plain, hostile = map(min, zip(*runs))
    assert hostile < 20 * plain + 1e-3


def test_unread_log_delays_nobody(monkeypatch):
    """Lines that a pipe does not take as a whole are counted."""
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    handler, long = batchat.NonBlockingHandler(), "x" * 100_000  # more than fits

    def log(*lines: str):
        for line in lines:
            handler.emit(batchat.logger.makeRecord("", 0, "", 0, line, (), None))

    thread = threading.Thread(target=log, args=["first", *[long] * 20], daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive() and os.get_blocking(writer)  # for others who write to it
    got = os.read(reader, 1 << 20)
    log("next", "last")
    got += os.read(reader, 1 << 20)
    pattern = r"first\nx+\n\.\.\. 20 lines of the log were lost\nnext\nlast\n"
    assert re.fullmatch(pattern, got.decode())
    sys.stderr.close()
    os.close(reader)


def test_log_is_of_people_who_joined(tmp_path):
    """Without -v."""
    with open(tmp_path / "log", "w") as log, Server(stderr=log) as server:
        for _ in range(50):
            with server.connect().sock as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, batchat.RESET)
        _mike = server.join("mike")
    pattern = r"[-\d]+ [:\d]+ BATCHAT.*\n[-\d]+ [:\d]+ mike joined from 127.0.0.1 .*\n"
    assert re.fullmatch(pattern, (tmp_path / "log").read_text())


def test_states_are_as_their_table_says():
    """Its arrows are NEXT_STATES, and nothing else changes a state."""
    table = inspect.getdoc(batchat.State).partition("The others")[0].partition("\n")[2]
    arrows, named = {s: set() for s in batchat.State}, {Chat.start_closing, batchat.Reactor._close}
    for indent, text in re.findall(r"^(  )?(\S.*)$", table, re.MULTILINE):
        if not indent:
            states = [each for each in arrows if each.name == text] or [*arrows][:-2]
            continue
        *_, then, owner, methods = re.split(r"  +|\.", text)
        named |= {getattr(batchat, owner).__dict__[each] for each in methods.split(", ")}
        for state in states:
            arrows[state].add(batchat.State[then])
    assert arrows == {each: {*then} for each, then in batchat.NEXT_STATES.items()}
    methods = filter(inspect.isfunction, [*vars(Chat).values(), *vars(batchat.Reactor).values()])
    changes = re.compile(r"\.(enter|start_closing|_close)\b")
    assert named == {each for each in methods if changes.search(inspect.getsource(each))}


@cases("line", "GET / HTTP/1.1", "POST /chat HTTP/1.0", "x y HTTP/2", LONG * 2)
def test_web_request_is_no_name(world, line):
    """Nor is anything that follows it a message."""
    ann, browser = world.joins("ann"), world.connects()
    browser.types(line, "Host: localhost", "", "evil", "hello everyone")
    world.wait()
    browser.expect(f"{GREETING}* That is no name, goodbye!\n")
    ann.expect(GREETING + hey("ann"))
    assert browser.sock.shut


# ------------
# It closes well

@cases("number", signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
def test_signal_tells_everyone_and_closes_well(number):
    with Server(preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)) as server:
        mike, newcomer = server.join("mike"), server.connect()
        newcomer.expect(GREETING)
        server.process.send_signal(number)
        mike.expect(SHUTTING_DOWN)
        if number == signal.SIGHUP:
            server.process.send_signal(number)  # once from the shell, once from the system
        newcomer.expect(SHUTTING_DOWN)
        for each in (mike, newcomer):
            assert each.rest() == ""
        status, log = server.ends()
        assert (status, "Traceback" in log) == (0, False)


def test_second_signal_ends_it_at_once(server):
    mike = server.join("mike")
    server.process.terminate()
    mike.expect(SHUTTING_DOWN)  # but mike does not hang up
    server.process.terminate()
    assert server.ends()[0] == -signal.SIGTERM


def test_shutdown_takes_2_s_at_most(world):
    """It waits for those who do not hang up.  A silent browser is sent nothing."""
    mike, ann, newcomer = world.joins("mike"), world.joins("ann", Web), world.connects(Web)
    early = world.connects(Web, opens=False)
    early.type(b"GET / ")
    mike.types("last words")
    world.wait()
    for each in (mike, ann, newcomer):
        each.read()
    world.reactor.stop()
    world.budget, world.stopped_at = NEVER, world.now
    assert world.reactor.run()
    assert 2.0 <= world.now - world.stopped_at < 2.1
    for each in (mike, ann, newcomer):
        each.expect(SHUTTING_DOWN)
        assert each is mike or each.got.endswith(b"\x88\x02\x03\xe9")  # 1001, going away
    assert early.got == b""


@cases("number", signal.SIGINT, signal.SIGHUP)
def test_ignored_signal_stays_ignored(number):
    """A shell has `&` ignore Ctrl-C, and nohup a closed terminal."""
    with Server(preexec_fn=lambda: signal.signal(number, signal.SIG_IGN)) as server:
        mike = server.join("mike")
        server.process.send_signal(number)
        for _ in range(2):
            mike.types("/who")
            mike.expect("* 1 here: mike\n")


# ------------
# Another site's page has no say: HTTP and WebSocket

PLAIN = "GET / HTTP/1.1"
ASK_PAGE = f"{PLAIN}\r\nHost: x\r\n\r\n".encode()


@cases(
    "status, how",
    *[(101, [{"Origin": origin}]) for origin in (None, " https://CHAT.example:1338 ")],
    *[(403, [{"Origin": f"http://{host}"}]) for host in ("evil.example", "chat.example")],
    *[(403, [{"Origin": it}]) for it in ("null", "", "evil://chat.example:1338")],
    *[(403, [{"Host": "", "Origin": origin}]) for origin in ("null", "", "http://evil.example")],
    *[(403, [{"Host": None}]), (101, [{"Host": None, "Origin": None}])],
    *[(101, [{"Upgrade": "h2c, WebSocket"}]), (426, [{"Upgrade": None}])],
    *[(426, [{"Sec-WebSocket-Key": None}]), (404, [{}, "HEAD /chat HTTP/1.1"])],
    (200, [{"Host": None}, "GET / HTTP/1.0"]),
    *[(405, [{}, f"{verb} HTTP/1.1"]) for verb in ("POST /chat", "DELETE /hello")],
    *[(200, [{}, "GET /?from=here HTTP/1.1"]), (404, [{}, "GET /nothing HTTP/1.1"])],
    *[(400, [{}, line]) for line in ("GET / HTTP/2.0", "GET /  HTTP/1.1", "nonsense")],
    *[(400, [{"Bad header name": "x"}]), (400, [{"Cookie": "a\rb"}])],
    *[(200, [{"Cookie": "a\tb"}, PLAIN]), (431, [{"Cookie": "x" * 8192}])],
)
def test_http_status(status, how):
    assert asked(request(*how))[0] == status


def test_http_head_over_8_kib_is_refused():
    """Before it ends."""
    assert messages_of(Web(), b"GET / HTTP/1.1\r\nCookie: " + b"x" * (8192 - 24)) == ([], b"")
    assert asked(b"GET / HTTP/1.1\r\nCookie: " + b"x" * (8193 - 24))[0] == 431


def test_http_response_has_its_headers():
    _, headers, _ = asked(ASK_PAGE)
    wanted = {"Connection": "close, Upgrade", "Upgrade": "websocket", "Allow": "GET, HEAD"}
    wanted.update({"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"})
    assert {**headers, **wanted} == headers


@cases("path", "/", "/hello", "/nothing", "/ not one", f"/{LONG * 3}")
def test_http_head_request_gets_no_body(path):
    """But the same headers as for GET."""
    replies = []
    for verb in ("GET", "HEAD"):
        reply = messages_of(Web(), request({}, f"{verb} {path} HTTP/1.1"))[1]
        replies.append(reply.partition(b"\r\n\r\n"))
    (head, end, body), headless = replies
    assert headless == (head, end, b"")
    assert f"\r\nContent-Length: {len(body)}\r\n".encode() in head


def test_http_policy_allows_our_script_and_style():
    """And nothing else: no other source, connection, form or frame."""
    _, headers, page = asked(ASK_PAGE)
    wanted = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    wanted += ["form-action 'none'", "frame-ancestors 'none'"]
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*)</{tag}>".encode(), page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(source).digest()).decode()
        wanted.append(f"{tag}-src 'sha256-{digest}'")
    assert sorted(headers["Content-Security-Policy"].split("; ")) == sorted(wanted)
    assert not re.search(b"https?:", page)


@cases(
    "why, code, limits",
    *[("full", 1013, {"people": 1}), ("crowded", 1013, {"per_address": 3}), ("banned", 1000, {})],
)
def test_web_refusal_waits_for_the_request(worlds, why, code, limits):
    """It says why; the page can be had, to show it."""
    world = worlds(**limits, password=PASSWORD)
    ann = world.joins("ann", host="203.0.113.5" if why == "crowded" else "127.0.0.1")
    for name in ("bob", "cy"):
        world.joins(name, host="203.0.113.5")
    world.wait()
    ann.types(*["/op sesame", "/ban bob 5"] * (why == "banned"))
    silent, browser, page = (world.connects(Web, "203.0.113.5", opens=False) for _ in range(3))
    world.wait()
    for each, data in [(silent, b"GET / "), (browser, OPENING), (page, ASK_PAGE)]:
        each.type(data)
    world.wait()
    text = batchat.CLOSING_TEXT[why].format(minutes=5)
    assert events_in(browser.got) == [{"type": "closing", "code": why, "text": text}]
    assert browser.got.endswith(batchat.encode_frame(8, code.to_bytes(2, "big")))
    assert page.got.startswith(b"HTTP/1.1 200 ")
    assert silent.got == b""


@cases("sends", b"GET / HT", b"", b"\r\n")
def test_web_request_must_come_within_10_s(world, sends):
    """Nobody is told, as nobody has asked for anything yet."""
    browser = world.connects(Web, opens=False)
    browser.type(sends)
    world.wait(9.9)
    assert not browser.sock.shut
    world.wait(1.2)
    assert (browser.sock.shut, browser.got) == (True, b"")


def test_websocket_handshake_of_the_rfc():
    status, headers, _ = asked(OPENING)
    assert status == 101
    assert headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (headers["Upgrade"], headers["Connection"]) == ("websocket", "Upgrade")


@cases(
    "frames, lines, answers",
    (bytes.fromhex("818537fa213d7f9f4d5158"), ["Hello"], []),  # RFC 6455, section 5.7
    (masked(1, b"Hel", final=False) + masked(0, b"lo"), ["Hello"], []),
    (bytes.fromhex("8a8537fa213d7f9f4d5158"), [], []),  # a pong
    (masked(1, b"Hel", final=False) + masked(9, b"?") + masked(0, b"lo"), ["Hello"], [b"?"]),
    (masked(1, b"a\nb\r\nc\rd\n"), ["a", "b", "c", "d"], []),
    (masked(1, b"\xff\n\xff"), ["\ufffd", "\ufffd"], []),  # as on telnet
    (masked(1, b"x" * 4096), ["x" * 4096], []),
)
def test_websocket_frames_are_read(frames, lines, answers):
    """A ping is answered with its pong, also between fragments."""
    assert sent(frames) == (lines, [(0x8A, answer) for answer in answers])


@cases(
    "opcode, size, head",
    *[(1, 0, "8100"), (1, 125, "817d"), (2, 126, "827e007e"), (2, 65535, "827effff")],
    (2, 65536, "827f0000000000010000"),
)
def test_websocket_frames_are_written(opcode, size, head):
    assert batchat.encode_frame(opcode, b"x" * size) == bytes.fromhex(head) + b"x" * size


@cases(
    "code, frame",
    (1002, bytes.fromhex("810548656c6c6f")),  # not masked
    (1002, b"\xc1" + masked(1, b"x")[1:]),  # a reserved bit
    *[(1002, masked(opcode, b"x")) for opcode in (3, 11, 0)],  # unknown; continues nothing
    (1002, masked(1, b"x", final=False) + masked(1, b"y")),  # a message in a message
    (1003, masked(2, b"x")),
    *[(1002, masked(9, b"x", final=False)), (1002, masked(9, b"x" * 126))],  # a control frame
    (1002, masked(8, b"x")),  # half a close code, and some that nobody may send
    *[(1002, masked(8, code.to_bytes(2, "big"))) for code in (0, 999, 1005, 1006, 1015, 5000)],
    (1009, masked(1, b"x" * 4097)),
    *[(1009, masked(1, b"x" * 70_000)[:14]), (1009, b"\x81" + b"\xff" * 9)],
    (1009, masked(1, b"x" * 4000, final=False) + masked(0, b"x" * 97)),
)
def test_websocket_protocol_error_gets_its_code(code, frame):
    messages, answers = sent(frame, masked(1, b"never read"))
    assert (messages, answers) == ([DISCONNECT], [(0x88, code.to_bytes(2, "big"))])


@cases("code", 1000, 1001, 1003, 1007, 1014, 3000, 4000, 4999, None)
def test_websocket_close_is_answered(code):
    """With its own code, if it has one."""
    payload = b"" if code is None else code.to_bytes(2, "big")
    assert sent(masked(8, payload + b"going" * bool(code))) == ([DISCONNECT], [(0x88, payload)])


MESSAGES = st.sampled_from([b"", b"hi", b"a\nb\r\nc\n", "\u00e9\U0001f600".encode()])
KEYS = st.binary(min_size=4, max_size=4)
FRAMES = st.lists(
    st.one_of(
        st.builds(masked, st.sampled_from([0, 1, 1, 1, 9, 10]), MESSAGES, st.booleans()),
        st.builds(masked, st.integers(0, 15), st.binary(max_size=130), st.booleans(), KEYS),
        st.sampled_from([masked(1, b"x" * n) for n in (4096, 4097)] + [masked(8, b"\x03\xe8bye")]),
        st.binary(max_size=4),
    ),
    max_size=8,
).map(b"".join)
PLACE, JUNK = st.integers(0, len(OPENING)), st.binary(max_size=3)
DAMAGED = st.builds(lambda at, junk: OPENING[:at] + junk + OPENING[at:], PLACE, JUNK)
GOOD = [OPENING, b"\r\n" + OPENING, OPENING.replace(b"\r\n", b"\n"), request({}, PLAIN)]
REQUESTS = st.sampled_from(GOOD) | st.binary(max_size=20) | DAMAGED


@given(REQUESTS, FRAMES, PLACES)
def test_web_bytes_mean_the_same_however_cut(head, frames, places):
    data = head + frames
    assert messages_of(Web(), *cut(data, places)) == messages_of(Web(), *cut(data, []))


@given(st.binary(min_size=1, max_size=300))
def test_web_nonsense_is_answered_or_waited_for(data):
    messages, reply = messages_of(Web(), data)
    assert messages in ([], [DISCONNECT])
    assert not messages or reply.startswith(b"HTTP/1.1 ")


@given(st.one_of(FRAMES, st.binary(max_size=200)))
def test_websocket_closes_once_and_with_a_code(frames):
    messages, replies = sent(frames)
    codes = [payload for first, payload in replies if first == 0x88]
    assert len(codes) == (1 if DISCONNECT in messages else 0)
    assert all(len(code) in (0, 2) for code in codes)
    assert all(first in (0x88, 0x8A) for first, _ in replies)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_unmasking_is_xor(payload, key):
    assert batchat.unmask(payload, key) == bytes(b ^ key[at % 4] for at, b in enumerate(payload))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_websocket_event_is_one_text_message(text):
    event = {"type": "said", "id": 1, "at": 1, "name": "ann", "text": text}
    [(first, payload)] = frames_of(Web.encode(event))
    assert (first, json.loads(payload)) == (0x81, event)
    assert payload.startswith(b'{"type":"said","id":1,"at":1,"name":"ann","text":"')


# ------------
# Peers that vanish are found

def test_silent_peers_are_given_up_after_2_min(our_end):
    assert our_end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}
    for name, value in idle.items():
        if hasattr(socket, name):
            assert our_end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_reset_is_noticed_where_no_more_is_read(houses):
    """The selector tells nothing of those whose read buffer is full."""
    house = houses(rate=10)
    mike = house.connects(b"mike\n" + b"\n" * 200_000)
    house.wait()
    mike.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, batchat.RESET)
    mike.sock.close()
    house.wait(1)
    assert [each.lost_reason for each in house.reactor.clients] == [os.strerror(errno.ECONNRESET)]


def test_browser_that_answers_no_ping_is_lost(world):
    """Three in a row, while nothing else was pending for it."""
    mike, ann, eve = (world.joins(name, Web) for name in ("mike", "ann", "eve"))
    slow = stalls(world, "slow", protocol=Web)
    for _ in range(3):
        world.wait(30.0)
        ann.type(masked(10, b""))
        eve.types("hi")
    assert names(world) == ["mike", "ann", "eve", "slow"]
    world.wait(31.0)
    assert names(world) == ["ann", "eve", "slow"]
    assert mike.sock.closed
    assert not slow.sock.closed


def test_browsers_are_pinged_every_30_s(world):
    """Also before they have a name; telnet is not."""
    mike, ann, newcomer = world.joins("mike"), world.joins("ann", Web), world.connects(Web)
    for seconds, pings in [(29.9, 0), (1.2, 1), (28.8, 1), (1.2, 2)]:
        world.wait(seconds)
        assert [bytes(each.got).count(b"\x89\0") for each in (ann, newcomer)] == [pings, pings]
    mike.expect(GREETING + hey("mike") + "* ann has joined the chat\n")


# ------------
# The whole server, in a simulated network

RUN, FLOOD = ("run_once", 2), "x" * 80
ANN = ("joins", "ann", Telnet, "127.0.0.1", 1)
SLOW_READERS = [
    *[ANN, ("joins", "bob", Web), RUN, ("floods", 1, LONG_ANSWERS[2], 0, 0, 300), ("wait", 11.0)],
    *[("floods", 1, FLOOD, 0, 0, 300), ("wait", 6.0), ("joins", "cy"), RUN],
    *[("floods", 1, FLOOD, 0, 0, 0), ("wait", 6.0)],
]
WAITING = [ANN, RUN, ("says", 0, FLOOD, 70), RUN]
TWO_FAILING_CALLS = [
    *[*WAITING, ("says", 0, "hi", 1), ("call_fails", 0, "recv", errno.ENOMEM)],
    *[("call_fails", 0, "unregister", errno.ENOMEM), RUN],
]
CTRL_C_IN_A_PASTE = [*WAITING, ("type", 0, CTRL_C)]
OPERATOR = [
    *[ANN, ("joins", "bob", Web, "203.0.113.5", 1), ("joins", "cy", Telnet, "198.51.100.9", 1)],
    *[("joins", "eve", Web, "2001:db8::7", 1), ("wait", 0.1), ("says", 2, FLOOD, 70)],
    *[("says", 3, line, 1) for line in ("/op sesame", "/ban bob 2", "/ban cy 2", "/ban eve 2")],
    *[("says", 3, "/kick eve get out", 1), ("wait", 0.5), ("joins", "Bob", Web, "203.0.113.5", 1)],
]
CONNECT = ("connects", Telnet, "203.0.113.5")
RESET = [("break_down", 0, errno.ECONNRESET, False), ("wait", 1.1)]
LOST = [ANN, RUN, ("says", 0, "a", 1900), RUN, *RESET, ("wait", 125.0)]
# So many connections from one address were lost while lines wait that one of them must go.
LOST_TOGETHER = [CONNECT, RUN, ("says", 0, "a b", 70), RUN, *RESET] * 3
REJECTED = [*[CONNECT] * 4, RUN, *[("connects", Web, "203.0.113.5", 1, False)] * 4, RUN]
# One is evicted in the same iteration in which something from that one is read.
EVICTED = [ANN, ("connects", Web, "127.0.0.1", 1, False), RUN, CONNECT, CONNECT, RUN]
EVICTED += [("says", 3, "/quit", 1), ("type", 2, OPENING), ("says", 1, "hi", 1), ("wait", 0.5)]
LISTENER_FAILS = [("listener_fails", Telnet, errno.EMFILE), ANN, ("wait", 2.0)]
IGNORING = [ANN, ("joins", "bob", Web), RUN, ("says", 0, "/ignore ann", 1), RUN]
IGNORING += [("says", 1, line, 1) for line in ("hi", "/nick eve", "/me waves")]
PACED = Settings(10, 9, 0, 9, password=PASSWORD)
EXAMPLES = [
    *[(PACED, TWO_FAILING_CALLS), (PACED, OPERATOR), (PACED, CTRL_C_IN_A_PASTE), (PACED, LOST)],
    *[(Settings(0), SLOW_READERS), (Settings(0), IGNORING), (Settings(0), LISTENER_FAILS)],
    (Settings(0, max_connections=2), EVICTED),
    (Settings(max_people=1), [ANN, ("joins", "bob", Web), RUN]),
    (Settings(max_people=1, max_per_address=2), LOST_TOGETHER),
    *[(Settings(max_connections=2), REJECTED), (Settings(max_per_address=2), REJECTED)],
]


def test_simulated_network():
    """Whatever it does, everyone is sent all that they must be sent, and nothing else."""
    reached: Counter[str] = Counter()

    @settings(max_examples=SIMULATIONS)
    @given(WORLDS)
    def runs(how):
        reached.update(simulate(*how).reached)

    for given_, history in EXAMPLES:
        reached.update(simulate(given_, history, "all close").reached)
    runs()
    wanted = {"full", "crowded", "banned", "kicked", "took too long", "too many connections"}
    wanted |= {"interrupted", "paused", "paced", "too far behind", "accept fails"}
    assert wanted <= {name for name, times in reached.items() if times}


# The soak: `pytest -m soak`

def pytest_addoption(parser):
    parser.addoption("--soak-minutes", type=float, default=1, help="how long -m soak takes")


@pytest.mark.soak
def test_soak_simulated_network(pytestconfig):
    end = time.monotonic() + pytestconfig.getoption("--soak-minutes") * 60

    @settings(settings.get_profile("ci"), max_examples=500)
    @given(WORLDS)
    def some_runs(how):
        simulate(*how)

    while time.monotonic() < end:
        some_runs()


@pytest.mark.soak
def test_soak_crowd_leaves_nothing_behind(houses):
    """200 people come and go over real sockets; no descriptor and no memory is lost."""
    held, small = [], {"SOCKET_OPTIONS": [(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)]}
    with mock.patch.multiple(batchat, FORMER_NAMES_LIMIT=100, **small, **SMALL_LIMITS):
        house = houses(max_per_address=0, max_connections=500)
        for steps in (1000, 5000):
            for step in range(steps):
                protocol = random.choice([Telnet, Web])
                name = line_on(protocol, f"p{step}")
                house.connects(OPENING * (protocol is Web) + name, protocol, buffer=4096)
                newcomer = random.choice(house.newcomers)
                newcomer.reading = random.random() < 0.9
                with suppress(OSError):  # it was closed, or our buffers are full
                    line = line_on(newcomer.protocol, random.choice(CHAT))
                    newcomer.sock.send(line * random.choice([1, 1, 1, 100]))
                if len(house.newcomers) > 200:
                    house.newcomers.pop(0).sock.close()  # a reset, where it has not read all
                house.now += 0.01
                house.run_once()
            for newcomer in house.newcomers:
                newcomer.sock.close()
            house.newcomers.clear()
            for _ in range(100):  # what they have sent is still said, at its pace
                house.wait(1.0)
            assert len(house.reactor.selector.get_map()) == len(house.addresses)
            assert_nothing_is_kept(house.reactor)
            gc.collect()
            assert not any(owner() for *_, owner in house.reactor.chat._former_names)
            held.append((len(os.listdir("/dev/fd")), getattr(sys, "getallocatedblocks", int)()))
    assert held[0][0] == held[1][0]
    assert held[1][1] < held[0][1] + 1000


# ------------
# The page, in Chromium

class Relay(AbstractContextManager):
    """A relay before a server's web port: it can hold what is sent, and be cut."""

    def __init__(self, port: int):
        self.port, self.open, self.sockets = port, True, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.web_port = self.listener.getsockname()[1]
        self.to_server, self.to_page = threading.Event(), threading.Event()
        self.flows()
        threading.Thread(target=self._accept, daemon=True).start()

    def __exit__(self, *_):
        self.cut()
        self.listener.close()

    def flows(self):
        self.to_server.set()
        self.to_page.set()

    def cut(self):
        """Lose all connections and what is held; take no new ones until `open`."""
        self.open = False
        hang_up(*self.sockets)
        self.flows()

    def _accept(self):
        with suppress(OSError):
            for near, _ in iter(self.listener.accept, None):
                if not self.open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.port))
                self.sockets += [near, far]
                for way in ((near, far, self.to_server), (far, near, self.to_page)):
                    threading.Thread(target=self._pump, args=way, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, flows: threading.Event):
        page = False  # that is never held
        with suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                page = page or data.startswith(b"HTTP/1.1 200")
                page or flows.wait()
                sink.sendall(data)
        hang_up(source, sink)


def hang_up(*sockets: socket.socket):
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def page(mike, page_server):
    """Chromium as mike, alone in a room."""
    mike.joins(page_server, "mike")
    return mike


def said(text="", name="ann", **fields: object) -> dict:
    """That event, or another with these fields."""
    return {"type": "said", "id": 0, "at": int(time.time()), "name": name, "text": text, **fields}


def joined(name: str) -> dict:
    return said(name=name, type="joined")


def whisper(sender: str, to: str) -> dict:
    return {"type": "whisper", "at": int(time.time()), "from": sender, "to": to, "text": "psst"}


HIDE = "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
MUTE = "socket.send = () => {};"  # nothing reaches the room
LAST = "[...linesBox.querySelectorAll('p')].at(-1)"
AT_END = f"{LAST}.getBoundingClientRect().bottom <= scroller.getBoundingClientRect().bottom"
TOP = "query('.prompt').getBoundingClientRect().top"
HERE = "query('summary').textContent"
MANY = "for (let n = 0; n < %d; n += 1) receive({...%s, text: `${n} ` + 'x'.repeat(%d)});"


def test_page_and_telnet_talk_in_one_room(mike, jonny):
    """What is typed is read as text, and never as markup."""
    mike.enters("hey everyone!")
    jonny.expect("<mike> hey everyone!\n")
    markup = "<b>bold</b> <script>document.title = 'hacked'</script> &amp;"
    jonny.types(markup, "/me waves", "/msg mike psst")
    whispered = "[jonny -> mike] psst"
    mike.shows(whispered)
    shown = ["<mike> hey everyone!", f"<jonny> {markup}", "** jonny waves", whispered]
    assert mike.lines()[-4:] == shown
    assert mike.finds("#lines p", "className")[-3:] == ["said", "did", "whisper"]
    mike.gives("document.title", "BATCHAT")
    assert mike.complaints() == []


def test_page_first_screen_says_what_to_do(mike, page_server):
    """The question is right above the input; its button says Join, later Send."""
    mike.opens(page_server)
    words = "[input.placeholder, input.ariaLabel, query('form button').textContent]"
    mike.gives(words, ["Your name", "Your name", "Join"])
    gap = f"input.getBoundingClientRect().top - {LAST}.getBoundingClientRect().bottom"
    mike.gives(f"{LAST}.className === 'prompt' && {gap} < 50")
    mike.gives("[query('pre').textContent, query('pre').ariaHidden]", [batchat.BANNER, "true"])
    mike.gives("query('h1').textContent", "BATCHAT")
    mike.types("mike")
    mike.does("query('form button').click()")
    mike.shows("Hey, mike!")
    mike.gives(words, ["Message, or /help", "Message, or /help", "Send"])


def test_page_says_why_a_name_is_refused(mike, page_server):
    mike.opens(page_server)
    mike.enters("not a name")
    mike.gives("linesBox.querySelectorAll('.prompt').length", 2)
    assert mike.finds("#lines p", "className")[-2:] == ["error", "prompt"]
    mike.enters("mike")
    mike.gives("state", "chatting")


def test_page_has_no_sentence_of_the_room():
    script = batchat.SCRIPT.split("};", 1)[1].replace("joined(event)", "")
    words = ("joined", "has quit", "known as", "was kicked", "Hey", "is taken", "full,")
    assert not [word for word in words if word in script]


# Own lines

def test_page_shows_own_lines_as_pending(mike, page_server):
    """Until they come back, in the order in which the room hears them; but no commands."""
    with Relay(page_server.web_port) as relay:
        mike.joins(relay, "mike")
        with page_server.join("ann") as ann:
            mike.shows("* ann has joined the chat")
            relay.to_page.clear()
            mike.enters("one", "/me waves", "//two", "/who")
            mine = ["<mike> one", "** mike waves", "<mike> /two"]
            ann.expect("\n".join([*mine, ""]))
            mike.gives("pendingBox.childElementCount", 2)
            assert mike.lines("#pending") == ["<mike> one", "<mike> //two"]
            assert mike.lines()[-1] == "* ann has joined the chat"
            ann.types("hi")
            relay.flows()
            mike.shows("<ann> hi")
            assert mike.lines("#pending") == []
            # The room may hear /who before or after what ann said.
            rest = [line for line in mike.lines()[-5:] if "here" not in line]
            assert rest == [*mine, "<ann> hi"]
            assert mike.finds("#lines .own", "className")[1] == "did own"


def test_page_confirms_the_line_that_came_back(page):
    """A line that the room did not say does not stay pending before one that it said."""
    page.does(MUTE)
    page.enters("one or two", "two", "three", "//four", "five")
    page.receives(said("waves", "mike", type="did"), said(name="mike", type="renamed", to="mike"))
    page.gives("[pendingBox.childElementCount, pending.length]", [5, 5])
    page.receives(said("two", "mike"))
    page.gives("pendingBox.childElementCount", 3)
    page.receives(said("/four", "mike"))
    page.gives("pendingBox.childElementCount", 1)
    assert page.lines("#pending") == ["<mike> five"]
    page.receives(said("changed by the room", "mike"))
    page.gives("[pendingBox.childElementCount, pending.length]", [0, 0])


def test_page_marks_own_lines_before_a_rename(page):
    page.receives(said("hi", "mike"), said(name="mike", type="renamed", to="mick"))
    page.gives("ownName", "mick")
    page.gives("document.querySelectorAll('#lines .said.own').length", 1)


def test_page_shows_a_few_of_many_pending_lines(page):
    """They do not fill the screen; all of them are confirmed."""
    page.does(MUTE + "for (let n = 0; n < 500; n += 1) sendLine('line ' + n)")
    page.gives("pendingBox.childElementCount", 20)
    page.receives(*[said(f"line {n}", "mike") for n in range(490)])
    page.gives("pendingBox.childElementCount", 10)
    assert page.lines("#pending")[0] == "<mike> line 490"


@cases("history", 0, 9)
def test_page_loses_nothing_when_cut_off(mike, history):
    """After a cut: what was missed, once; what became of own lines; and how long it took."""
    with Server("--history", str(history)) as server, Relay(server.web_port) as relay:
        ann = server.join("ann")
        ann.types("before")
        mike.joins(relay, "mike")
        ann.expect("* mike has joined the chat\n")
        ann.types("hi")
        mike.enters("mine")
        ann.expect("<mike> mine\n")
        mike.shows("<ann> hi")
        mike.gives("pending.length + queue.length", 0)
        shown = mike.lines()
        relay.to_page.clear()
        mike.enters("//heard ", "/me nods")
        heard = ["<mike> /heard ", "** mike nods"]
        ann.expect("\n".join([*heard, ""]))
        relay.to_server.clear()
        mike.enters("not heard")
        mike.gives("pending.length", 2)
        mike.does("retrySeconds = 0.2")
        relay.cut()
        ann.expect("* mike has quit the chat\n")
        ann.types("missed", "/who")
        ann.expect("* 1 here: ann\n")
        mike.shows("Disconnected. Reconnecting in 0.")
        mike.gives("pendingBox.childElementCount", 2)
        relay.open = True
        mike.shows("(not confirmed)")
        gap, *rest = mike.lines()[len(shown) :]
        note = "" if history else r" Messages of that time are not shown\."
        assert re.fullmatch(r"You were away for \d+ s\." + note, gap)
        unsure = [f"<mike> {line} (not confirmed)" for line in ("//heard ", "not heard")]
        assert rest == ([*heard, "<ann> missed", unsure[1]] if history else unsure)
        assert mike.lines()[: len(shown)] == shown
        what_is_new = mike.finds("#lines p", "className")[len(shown) + 1 :]
        assert not [each for each in what_is_new if "past" in each]
        assert mike.lines("#pending") == []
        ann.expect("* mike has joined the chat\n")
        mike.enters("again")
        ann.expect("<mike> again\n")
        mike.shows("<mike> again")


def test_page_knows_a_restarted_server(mike):
    """Its ids start anew: nothing is taken for shown already."""
    with Server("--history", "9") as server:
        mike.joins(server, "mike")
        mike.does("receive({type: 'joined', id: 1000, at: 0, name: 'eve'}); retrySeconds = 0.2")
    mike.shows("Disconnected. Reconnecting in")
    same_ports = ["--port", str(server.port), "--web-port", str(server.web_port)]
    with Server(*same_ports, "--history", "9") as server:
        mike.gives("state === 'chatting' && lastId < 1000")
        assert len(mike.finds("pre", "tagName")) == 1
        server.join("jonny")
        mike.shows("* jonny has joined the chat")
        assert all("WebSocket connection" in each for each in mike.complaints())


def test_page_shows_the_history(mike):
    """Between two lines of the room, not as new; and nothing where it is empty."""
    with Server("--history", "9") as server:
        mike.joins(server, "mike")
        ann = server.join("ann")
        mike.shows("* ann has joined the chat")
        assert not [line for line in mike.lines() if "ecent messages" in line]
        ann.types("hi", "/me waves")
        mike.opens(server)
        mike.does(HIDE)
        mike.enters("mike")
        mike.shows("End of recent messages.")
        first, *rest = mike.lines()[-4:]
        assert re.fullmatch(r"\* Recent messages, since 20\d\d-\d\d-\d\d \d\d:\d\d:", first)
        assert rest == ["<ann> hi", "** ann waves", "* End of recent messages."]
        mike.gives("document.title", "BATCHAT")


# Reconnecting

def test_page_waits_until_its_name_is_free(mike, jonny):
    """Its own lost connection may still have the name; the pause grows."""
    mike.does("retrySeconds = 0.1; socket.close()")
    jonny.expect("* mike has quit the chat\n")
    jonny.types("/nick mike")
    jonny.expect("* jonny is now known as mike\n")
    mike.shows("Reconnecting in 0.8 s \u2026")
    jonny.types("/nick jonny")
    jonny.expect("* mike is now known as jonny\n* mike has joined the chat\n")


@cases(
    "what, shown",
    ("state = 'arriving'", "Reconnecting in 0.8 s \u2026"),
    ("awaySince = Date.now() - 151_000", "* The name jonny is taken."),
)
def test_page_waits_150_s_for_its_name(mike, jonny, what, shown):
    """Also if it was lost before the history came."""
    mike.does(f"setOwnName('jonny'); retrySeconds = 0.1; {what}; socket.close()")
    mike.shows(shown)


def test_page_pause_has_a_maximum(page):
    page.does("window.setTimeout = () => 0")
    seconds = "socket.onclose({code: 1006}), parseInt(statusBox.textContent.split(' in ')[1])"
    page.gives(f"Array.from({{length: 8}}, () => ({seconds}))", [1, 2, 4, 8, 16, 30, 30, 30])
    page.receives({"type": "welcome", "text": "", "name": "mike"})
    page.gives("retrySeconds", 1)


def test_page_shows_why_it_was_disconnected(page):
    page.does("window.setTimeout = (what, ms) => (ms < 1000 ? what() : 0)")
    again, never = ["full", "crowded", "shutdown"], ["banned", "kicked", "timeout", "tries"]
    for code in again + never:
        page.receives({"type": "closing", "code": code, "text": f"That was {code}."})
        number = batchat.WEBSOCKET_CLOSE_CODES.get(code, 1000)
        page.does(f"awaySince = retrySeconds = 1; socket.onclose({{code: {number}}})")
        page.gives(f"{LAST}.innerText.endsWith('* That was {code}.')")
        way = "Reconnecting in 1 s \u2026" if code in again else "Enter a name to rejoin."
        page.gives("statusBox.textContent", f"Disconnected. {way}")
    page.gives("[state, retrySeconds, closingCode, awaySince]", ["left", 1, "", 0])


def test_page_that_is_refused_comes_in_later(mike):
    """A full room is said once, and tried again."""
    with Server("--max-people", "1") as server:
        ann = server.join("ann")
        mike.loads(server)
        mike.shows("* BATCHAT is full")
        mike.does("retrySeconds = 0.2")
        mike.shows("Disconnected. Reconnecting in 0.4 s")
        assert len(mike.lines()) == 1
        ann.types("/quit")
        mike.gives("[state, retrySeconds, closingCode]", ["awaitingName", 1, ""])
        mike.enters("mike")
        mike.gives("state", "chatting")


def test_page_of_somebody_kicked_stays_out(mike, tmp_path):
    """They read why; others no longer see them in the list."""
    (tmp_path / "password").write_text("sesame\n")
    with Server("--password-file", str(tmp_path / "password")) as server:
        mike.joins(server, "mike")
        eve, ann = server.join("eve"), server.join("ann")
        ann.types("/op sesame", "/kick eve spam")
        mike.shows("* eve was kicked by ann: spam")
        mike.gives(HERE, "2 here")
        mike.types("draft")
        ann.types("/kick mike")
        mike.shows(f"* You were kicked by ann: {NO_REASON}")
        mike.shows("Disconnected. Enter a name to rejoin.")
        mike.gives("[input.value, draft, document.activeElement === input]", ["", "draft", False])
        assert eve.rest().endswith("* You were kicked by ann: spam\r\n")


def test_page_that_left_asks_for_a_name(mike, jonny):
    mike.enters("/nick mick", "/quit")
    jonny.expect("* mike is now known as mick\n* mick has quit the chat\n")
    mike.shows("You left. Enter a name to rejoin.")
    mike.gives("query('form button').textContent", "Join")
    mike.does("input.value = 'x'.repeat(5000); form.requestSubmit()")
    mike.shows(f"* {NAME_RULE}")
    mike.enters("jonny")
    mike.shows("* The name jonny is taken.")
    mike.enters("ann")
    jonny.expect("* ann has joined the chat\n")
    mike.shows("Hey, ann!")


def test_page_reloads_for_another_protocol(mike, jonny):
    """Once: if the server sends the same page again, that has to do."""
    greeting = "receive({type: 'greeting', protocol: 2, banner: '', text: '', max_line: 99})"
    mike.does(f"window.old = true; {greeting}")
    jonny.expect("* mike has quit the chat\n* mike has joined the chat\n")
    mike.gives("!window.old && state === 'chatting'")
    mike.does(f"window.old = true; {greeting}")
    mike.enters("still here")
    jonny.expect("<mike> still here\n")
    mike.gives("window.old")


def test_page_leaves_when_another_is_opened(mike, jonny):
    """Although the browser may keep it for a step back; after that, it is there again."""
    mike._ask("POST", "/url", url="about:blank")
    jonny.expect("* mike has quit the chat\n")
    mike._ask("POST", "/back")
    jonny.expect("* mike has joined the chat\n")


def test_page_name_outlives_a_reload(mike, jonny):
    """It is asked for where somebody else has it now."""
    mike.enters("/nick mick")
    mike.gives("ownName", "mick")
    mike.reloads()
    jonny.expect("* mike is now known as mick\n* mick has quit the chat\n")
    jonny.expect("* mick has joined the chat\n")
    mike.gives("state", "chatting")
    mike.does("sessionStorage.setItem('name', 'jonny')")
    mike.reloads()
    mike.shows("* The name jonny is taken.")
    mike.enters("mike")
    mike.gives("[ownName, state]", ["mike", "chatting"])


@cases("name", "mike", "jonny")
def test_page_keeps_what_is_typed_before_welcome(mike, jonny, page_server, name):
    """It is not sent, and not lost."""
    with Relay(page_server.web_port) as relay:
        mike.joins(relay, "mike")
        jonny.expect("* mike has quit the chat\n* mike has joined the chat\n")
        mike.does(f"sessionStorage.setItem('name', '{name}')")
        relay.to_page.clear()
        mike.reloads()
        jonny.expect("* mike has quit the chat\n")
        mike.enters("draft")
        relay.flows()
        if name == "jonny":
            mike.shows("* The name jonny is taken.")
            mike.does("input.focus()")
            mike.enters("mike")
        jonny.expect("* mike has joined the chat\n")
        mike.gives("[state, input.value]", ["chatting", "draft"])


@cases("early", "state = 'connecting'", "state = 'arriving'")
def test_page_sends_nothing_before_it_is_asked(page, early):
    page.does(early)
    page.enters("draft")
    page.gives("[input.value, pending.length]", ["draft", 0])


# What is new

def test_page_does_not_move_who_scrolled_up(page):
    page.receives(*[said(f"line {n}") for n in range(40)])
    page.shows("line 39")
    page.does(f"scroller.scrollTop = -200; window.before = {TOP}")
    page.receives(said("one more"))
    page.shows("1 new")
    for count in (1, 500):  # within a block, and in several
        page.receives(*[said(f"more {n}") for n in range(count)])
        page.gives(f"queue.length === 0 && Math.abs({TOP} - before) < 2 && !({AT_END})")
    page.does("belowButton.click()")
    page.gives(f"belowButton.hidden && {AT_END}")


def test_page_title_counts_what_nobody_has_seen(page):
    page.does(HIDE)
    page.receives(said("psst"), said("waves", type="did"), said("mine", "mike"))
    page.receives(whisper("mike", "ann"), joined("ann"))
    page.gives("document.title", "(2) BATCHAT")
    page.does("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.gives("document.title", "BATCHAT")


def test_page_title_says_that_one_is_called(page):
    page.does(HIDE)
    page.receives(said("mikes and mike.x are not meant"))
    page.gives("document.title", "(1) BATCHAT")
    page.receives(said("but MIKE..., you are"))
    page.gives("document.title", "(@2) BATCHAT")
    page.gives("linesBox.querySelectorAll('.mention').length", 1)
    page.does("unread = 0; mentioned = false")
    page.receives(whisper("ann", "mike"))
    page.gives("document.title", "(@1) BATCHAT")


def test_page_stays_at_the_end_when_sizes_change(page):
    """In steps as a phone's keyboard comes up, too; but not for who has scrolled up."""
    page.receives(*[said(f"line {n} " + "x" * n * 5) for n in range(60)])
    page.shows("line 59")
    for mobile in (False, True):
        for heights in ((300,), (700,), (844, 760, 690, 610, 560, 500, 430, 380), (844,), (400,)):
            for height in heights:
                page.sized(390, height, mobile)
            page.gives(f"innerHeight === {heights[-1]} && {AT_END}")
    page.does("setStatus('a status\\n of more than one row '.repeat(9))")
    page.gives(AT_END)
    page.does("scroller.scrollTop = -100")
    page.sized(390, 300)
    page.gives(f"innerHeight === 300 && scroller.scrollTop < -50 && !({AT_END})")
    page.enters("mine")  # what one says is always in sight
    page.gives(AT_END)
    page.sized(800, 500)


# Lines

def test_page_shows_days_and_times_of_the_reader(page):
    """In their own time zone, with a line between two days."""
    page.emulates("Emulation.setTimezoneOverride", timezoneId="Asia/Kolkata")
    at = 1764095400  # 2025-11-26 00:00 in India, 2025-11-25 18:30 UTC
    page.receives(said("first", at=at - 60), said("same day", at=at - 1), said("next", at=at))
    page.shows("<ann> next")
    first = ["Tue Nov 25 2025", "<ann> first", "<ann> same day"]
    assert page.lines()[-5:] == [*first, "Wed Nov 26 2025", "<ann> next"]
    page.gives(f"{LAST}.firstChild.outerHTML", "<time>00:00</time>")
    page.emulates("Emulation.setTimezoneOverride", timezoneId="")


def test_page_lines_hang_in_and_no_blank_is_sent(mike, jonny):
    mike.enters("", " ", "hello")
    jonny.expect("<mike> hello\n")
    mike.gives(f"{LAST}.textContent.endsWith('hello')")
    mike.does("window.style = getComputedStyle(query('p.said'))")
    mike.gives("-parseFloat(style.textIndent) > 0 && style.boxShadow !== 'none'")
    mike.gives("parseFloat(style.paddingLeft) > -parseFloat(style.textIndent)")
    mike.gives("style.overflowX", "clip")


def test_page_lines_keep_their_direction(page):
    """Names in the list of people, too."""
    arabic = "\u0645\u0631\u062d\u0628\u0627"
    page.receives(said(f"{arabic}, 1", arabic), joined(arabic))
    page.gives(f"{LAST}.className", "joined")
    assert page.finds(".said > *", "tagName") == ["TIME", "BDI", "BDI"]
    # The name is at the left of what it said, although both are written from the right.
    name, text = page.finds(".said bdi", "getBoundingClientRect().left")
    assert name < text
    page.gives("input.dir", "auto")
    page.does("peopleBox.open = true")
    page.gives(f"[...peopleList.querySelectorAll('bdi')].some(it => it.innerText === '{arabic}')")


def test_page_links_go_where_they_seem_to(page):
    """Without what belongs to the sentence; the real host is told where it looks different."""
    for text, link in (
        ("see https://example.com/a?b=c#d.", "https://example.com/a?b=c#d"),
        ("(http://example.com/x), and", "http://example.com/x"),
        ("https://example.com/Python_(language)", "https://example.com/Python_(language)"),
        ("(see https://example.com/a_(b)).", "https://example.com/a_(b)"),
        ("[https://example.com/?a[]=1]!?", "https://example.com/?a[]=1"),
        ("https://example.com/(((", "https://example.com/"),
        ("javascript:alert(1) ftp://x.example data:text/html,x", None),
        ("https://user:secret@example.com/ https://good.example@evil.example", None),
        ("<img src=x onerror=alert(1)> https://", None),
        ("https://b\u00fccher.example/", "https://b\u00fccher.example/"),
    ):
        real = text.replace("b\u00fccher", "xn--bcher-kva")
        page.receives(said(text))
        page.gives(f"{LAST}.textContent.includes({json.dumps(text)})")
        how = ["_blank", "noreferrer"]
        found = f"[...{LAST}.querySelectorAll('a')].map(a => [a.text, a.href, a.target, a.rel])"
        page.gives(found, [[link, link.replace(text, real), *how]] if link else [])
        assert ("(xn--bcher-kva.example)" in page.lines()[-1]) == (real != text)
    assert page.finds("img", "src") == []


def test_page_help_can_be_read_on_a_phone(page):
    """Two columns, or on a narrow screen one above the other."""
    page.enters("/help")
    page.shows("leave the chat")
    first, second, *_ = page.finds(".rows > span", "getBoundingClientRect().top")
    assert first == second
    page.sized(390, 844)
    page.gives("innerWidth", 390)
    tops = page.finds(".rows > span", "getBoundingClientRect().top")
    assert tops == sorted(set(tops))
    page.gives("linesBox.scrollWidth <= linesBox.clientWidth")
    page.sized(800, 500)


# People

def test_page_list_of_people_is_up_to_date(mike, jonny):
    """Counted and listed; its own question for it is not shown, the user's is."""
    mike.gives(HERE, "2 here")
    assert not [line for line in mike.lines() if "2 here: " in line]
    jonny.types("/nick john")
    mike.does("peopleBox.open = true")
    mike.gives("peopleList.innerText", "john\nmike")
    mike.enters("/who")
    mike.shows("* 2 here: john, mike")
    jonny.types("/quit")
    mike.gives(f"[{HERE}, peopleList.innerText]", ["1 here", "mike"])


def test_page_operators_keep_their_mark(page):
    both = [{"name": "ann", "operator": True}, {"name": "mike", "operator": False}]
    page.receives({"type": "people", "people": both}, said(type="renamed", to="anna"))
    page.does("peopleBox.open = true")
    page.gives("peopleList.innerText", "@anna\nmike")
    page.shows("* 2 here: @ann, mike")


def test_page_click_on_a_name_writes_to_them(page):
    page.receives(joined("ann"))
    page.types("a draft")
    page.does("peopleBox.open = true")
    page.gives("peopleList.innerText", "ann\nmike")
    page.does("query('li button').click()")
    page.gives("[input.value, peopleBox.open]", ["/msg ann a draft", False])
    page.gives("document.activeElement === input")
    page.does("peopleBox.open = true; query('li:last-child button').click()")
    page.gives("input.value", "/msg mike a draft")


@cases("line", "//op sesame", " /op sesame", " /who", "/nick mick")
def test_page_shows_no_command_as_pending(page, line):
    page.does(f"socket.send = () => {{}}; sendLine('{line}')")
    page.gives("pending.length", 0)


def test_page_notes_ones_own_new_name(page):
    page.enters("/nick mick", "hello")
    page.gives(f"[ownName, pending.length, {LAST}.className]", ["mick", 0, "said own"])


# The keyboard

def test_page_paste_of_many_lines_is_many_lines(mike, jonny):
    mike.types("say ")
    mike.does(
        "const clipboardData = new DataTransfer(), how = {clipboardData, cancelable: true};"
        f"clipboardData.setData('text', 'one\\n{LONG * 2}\\ntwo\\nthree');"
        "input.dispatchEvent(new ClipboardEvent('paste', how));"
    )
    mike.gives("[statusBox.innerText.slice(0, 9), input.value]", ["Not sent:", f"{LONG * 2} three"])
    mike.does("input.value = 'three'")
    mike.types("!" + ENTER)
    jonny.expect("<mike> say one\n<mike> two\n<mike> three!\n")
    mike.gives("statusBox.textContent", "")


def test_page_does_not_send_a_line_too_long(mike, jonny):
    """The limit is the server's; what was typed stays."""
    mike.does("input.value = '\u00e9'.repeat(2049)")
    mike.types(ENTER)
    mike.shows("Not sent: 4098 bytes, and a line has at most 4096.")
    mike.gives("[state, input.value.length, pending.length]", ["chatting", 2049, 0])
    mike.does("input.value = '\u00e9'.repeat(2048)")
    mike.types(ENTER)
    jonny.expect(f"<mike> {chr(233) * 2048}\n")


def test_page_arrows_go_through_what_was_entered(page):
    """A draft survives that; an operator's password is not kept."""
    page.enters("one", "\\open", "/op sesame", ". /OP sesame", "\uff3c \uff4f\uff50:x", "\u2215op")
    page.types("draft")
    for key, values in ((UP, ["\\open", "one", "one"]), (DOWN, ["\\open", "draft", "draft"])):
        for value in values:
            page.types(key)
            page.gives("input.value", value)


def test_page_tab_completes_names(page):
    """At the start of a line, in it, after @ and after /msg; else it moves on."""
    page.receives(joined("jonny"), joined("Joe"))
    start = {"jon": "jonny: ", "jo": "Joe: ", "ask Jo": "ask Joe ", "ask @jo": "ask @Joe "}
    rest = {"@jon": "@jonny ", "/msg jon": "/msg jonny ", "/msg ": "/msg Joe "}
    for typed, value in {**start, **rest}.items():
        page.does("input.value = ''")
        page.types(typed + TAB)
        page.gives("input.value", value)
    page.types(f"nobody{TAB}")
    page.gives("document.activeElement !== input")


def test_page_escape_closes_the_list(page):
    page.does("peopleBox.open = true")
    page.types(ESCAPE)
    page.gives("!peopleBox.open && document.activeElement === input")


# Colours

ALL_COLOURS = """
socket.send = () => {}; sendLine('pending'); newLinesBelow = 2; peopleBox.open = true;
show({type: 'said', name: 'ann', text: 'mike'}, 'past'); setStatus('a status');
show({type: 'said', name: 'mike', text: 'lost'}, 'unconfirmed');
show({type: 'divider', text: 'away'}); while (queue.length) paint();
for (let hue = 0; hue < 360; hue += 15) for (const className of ['said', 'own', 'mention']) {
  const name = element('bdi', {className: 'name', style: `--hue: ${hue}`}, 'ann');
  linesBox.append(element('p', {className}, name));
}
const canvas = new OffscreenCanvas(1, 1).getContext('2d');
const rgba = colour => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = colour => rgba(colour).slice(0, 3)  // WCAG 2.2
  .map(c => c / 255 <= .04045 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4)
  .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], .05);
const paperOf = it => {
  const colour = getComputedStyle(it).backgroundColor;
  return colour === 'rgba(0, 0, 0, 0)' ? paperOf(it.parentElement) : colour;
};
const texts = [...document.body.querySelectorAll('*')].filter(it => it.tagName !== 'SCRIPT'
  && [...it.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
return [...texts.map(it => [it, '']), [input, '::placeholder']].map(([it, part]) => {
  const { color, opacity } = getComputedStyle(it, part), paper = paperOf(it);
  const [low, high] = [luminance(color), luminance(paper)].sort((a, b) => a - b);
  const opaque = opacity === '1' && rgba(color)[3] === 255 && rgba(paper)[3] === 255;
  return [it.outerHTML + part, opaque ? high / low : 0];
});"""


@cases("scheme", "light", "dark")
def test_page_texts_have_contrast(page, scheme):
    """4.5:1 for all on the screen, as it is painted."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.emulates("Emulation.setEmulatedMedia", features=media)
    page.receives(said("hi mike"), said("mine", "mike"), said("waves", type="did"))
    page.receives(whisper("ann", "mike"), whisper("mike", "ann"))
    page.receives({"type": "notice", "text": "a notice"}, {"type": "error", "text": "an error"})
    found = page.does(ALL_COLOURS)
    assert len(found) > 90 and not [each for each in found if each[1] < 4.5]
    page.emulates("Emulation.setEmulatedMedia", features=[])


def test_page_names_have_different_colours(page):
    """And each keeps theirs."""
    names = ["ann", "bob", "cy", "dan", "eve", "p1", "p2", "1p"]
    page.receives(*[said("hi", name) for name in names * 2], said("that is all"))
    page.shows("that is all")
    colours = page.finds(".said .name", "style.cssText")[:16]
    assert len({*colours}) == 8 and colours[:8] == colours[8:]


# Much to paint

@cases("count, length", (4000, 5), (1600, 4000))
def test_page_keeps_the_last_lines(page, count, length):
    """The log is bounded, and so is what waits to be painted."""
    bounded = f"return [{LAST}?.className, queue.length]"
    last, waiting = page.does(MANY % (count, json.dumps(said()), length) + bounded)
    assert last != "said" and waiting <= 1500
    page.gives(f"queue.length === 0 && {LAST}.textContent.includes('<ann> {count - 1} ')")
    page.gives("linesBox.childElementCount", 1500)
    page.gives(AT_END)


def test_page_paints_little_at_a_time(page):
    page.does(
        "window.painted = []; window.shown = 0; const count = updateCounts;"
        "updateCounts = () => { count(); const now = linesBox.textContent.length;"
        "  if (now > shown) painted.push(now - shown); shown = now; };"
        + MANY % (500, json.dumps(said()), 100)
    )
    page.gives("queue.length === 0 && painted.length >= 10 && Math.max(...painted) < 7000")


def test_page_makes_few_links_of_a_line(page):
    page.receives(said("http://a " * 400))
    page.gives(f"{LAST}.querySelectorAll('a').length", 10)
    page.gives(f"{LAST}.querySelector('bdi:last-child').childNodes.length < 40")


def test_page_is_quick_with_every_line(page):
    """No line takes ten times as long as a plain link of its size."""
    link, size = "https://x.y/", 100_000
    shapes = {"": [".", "-.", "mike.", "http://", " ", "a", "\u05d0a"], "/me": " "}
    shapes.update({link + "(" * 50_000: ")]", link: [").", "http://a ", *").(a"]})
    texts = [(start + end * size)[:size] for start, ends in shapes.items() for end in ends]
    script = (
        "{...%s, date: new Date()}; return Math.min(...[1, 2, 3].map(() => {"
        "const start = performance.now(); input.value = event.text; complete(); isMention(event);"
        "paragraph(event); COMMAND.test(event.text); PASSWORD_LINE.test(event.text);"
        "input.value = ''; return performance.now() - start; }));"
    )
    *times, plain = [page.does("const event = " + script % json.dumps(said(it))) for it in texts]
    assert max(times) < 10 * plain, times


# ------------
# python bench/fanout.py

@pytest.fixture
def bench(tmp_path):
    """A copy of the benchmark, which finds no other servers, as a command."""
    (tmp_path / "bench").mkdir()
    shutil.copy(BATCHAT, tmp_path)
    shutil.copy(BATCHAT.parent / "bench" / "fanout.py", tmp_path / "bench")
    program = [sys.executable, str(tmp_path / "bench" / "fanout.py")]
    return [*program, "--people", "20", "--talkers", "2", "--repeat", "1"]


def has_servers(bench: list[str]) -> bool:
    """Whether the copy beside that benchmark runs; raises OSError if a process has just ended."""
    program = os.fsencode(Path(bench[1]).parent.parent / "batchat.py")
    commands = [each.read_bytes() for each in Path("/proc").glob("[0-9]*/cmdline")]
    return any(program in each.split(b"\0")[:3] for each in commands)


def test_benchmark_prints_a_row_for_each_load(bench, tmp_path):
    peers = ["--peers", "batchat", "nats"]
    done = run(*bench, "--seconds", "0.2", *peers, env={"PATH": ""}, timeout=60)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    loads = ["flat out, 20 people", "one at a time, 20 people", "one stalls, 10 people"]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        *itertools.product(loads, ["BATCHAT", "nats"]),
        *[("growth, 10 people", "BATCHAT"), ("growth, 100 people", "BATCHAT")],
    ]
    for row in rows:
        assert row[8] == "0" if row[1] == "BATCHAT" else "not on the PATH" in row[10]
    drawing = ElementTree.parse(tmp_path / "bench" / "fanout.svg")
    assert "BATCHAT" in [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="there is no /proc")
@cases("number", signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
def test_benchmark_ends_its_servers(bench, number):
    with subprocess.Popen([*bench, "--seconds", "60"], **SILENT) as process:
        wait_until(lambda: has_servers(bench))
        process.send_signal(number)
    wait_until(lambda: not has_servers(bench))
