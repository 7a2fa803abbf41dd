"""What BATCHAT promises, as tests that fail without it.

They stand in the order of README.md, under its own words: first those who help
(callers, rooms, servers, screens), then one part for each promise.  Most need no
socket: the log, the wires and the chat know of none.  What time, pacing, limits
and a network of any kind do to the whole server is tested in a simulated one;
real sockets, processes, telnet and Chromium are here for what only they know.
Everything talks to loopback addresses alone.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import gc
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import unicodedata
import urllib.request
import weakref
from collections import Counter, deque
from http import HTTPStatus
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batchat
from batchat import LEAVE, OPENED, TOO_LONG, Chat, Log, Outbox, Settings, TelnetWire, WebWire, Wire

BATCHAT = Path(batchat.__file__)
GREETING = batchat.GREETING.format(batchat.WELCOME)
PATIENCE = 20  # seconds that a test waits for what must come, before it gives up

settings.register_profile("batchat", deadline=None)
settings.load_profile("batchat")


# --------------------------------------------------------------------------
# Those who help
# --------------------------------------------------------------------------

# Bytes on a wire


def events_of(wire: Wire, *reads: bytes) -> tuple[list, bytes]:
    """What a wire makes of these reads: its events up to LEAVE, and its answers."""
    events: list = []
    for read in reads:
        wire.feed(read)
        while events[-1:] != [LEAVE]:
            event = wire.next()
            if event is None:
                break
            events.append(event)
    return events, re.sub(rb"\r\nDate: .*", b"", wire.replies)


def telnet(*reads: bytes) -> tuple[list, bytes]:
    return events_of(TelnetWire(), *reads)


def heard(*reads: bytes) -> list:
    """The same without the answers."""
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


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` as it may arrive: in pieces."""
    places = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(places, places[1:]) if a < b]


def kept_by(wire: Wire) -> int:
    """The bytes that a wire keeps."""
    names = [name for kind in type(wire).__mro__ for name in getattr(kind, "__slots__", ())]
    values = [getattr(wire, name) for name in names]
    return sum(len(value) for value in values if isinstance(value, bytes))


HANDSHAKE = {
    "Host": "chat.example:1338",
    "Upgrade": "websocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Origin": "http://chat.example:1338",
}


def request(changes: dict[str, str | None], line: str = "GET /chat HTTP/1.1") -> bytes:
    """The head of a request with a handshake's headers; a change of None leaves one out."""
    headers = {**HANDSHAKE, **changes}
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode()


OPENING = request({})


def forwarded(addresses: str | None, line: str = "GET /chat HTTP/1.1") -> bytes:
    """The same as a proxy passes it on."""
    return request({"X-Forwarded-For": addresses}, line)


def asked(head: bytes) -> tuple[int, dict[str, str], bytes]:
    """What a request gets: the status, the headers, the body."""
    _, reply = events_of(WebWire(), head)
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def masked(
    opcode: int, payload: bytes, final: bool = True, key: bytes = b"\x37\xfa\x21\x3d"
) -> bytes:
    """A frame as a client sends it."""
    whole = batchat.frame(opcode, payload)
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
    events, replies = events_of(WebWire(), OPENING + b"".join(frames))
    assert events[0] is OPENED
    return events[1:], frames_of(replies.partition(b"\r\n\r\n")[2])


# A room without sockets


class Guest(batchat.Person):
    """Somebody in a chat without sockets, whose screen is read line by line."""

    def __init__(self, chat: Chat, host: str = "") -> None:
        super().__init__(f"{host or 'nowhere'} port 4321", chat.logs[TelnetWire])
        self.chat = chat
        if host:
            group = batchat.address_group(host)
            self.address = chat.addresses.setdefault(group, batchat.Address(group, 10))
        chat.handle(self, OPENED)

    def types(self, *lines: batchat.Event) -> None:
        for line in lines:
            self.chat.handle(self, line)

    def reads(self) -> str:
        """What was shown since the last look."""
        with self.outbox.unsent() as unsent:
            shown = bytes(unsent)
        self.outbox.advance(len(shown))
        return shown.decode("utf-8", "replace").replace("\r\n", "\n")


class Room:
    def __init__(self, **settings) -> None:
        self.now = 0.0
        self.chat = Chat((TelnetWire, WebWire), Settings(**settings), lambda: self.now)
        self.guests: list[Guest] = []

    def caller(self, host: str = "") -> Guest:
        """Somebody who has not given a name yet."""
        guest = Guest(self.chat, host)
        assert guest.reads() == batchat.GREETING.format(self.chat.settings.welcome)
        return guest

    def join(self, name: str, host: str = "") -> Guest:
        guest = self.caller(host)
        guest.types(name)
        assert guest.state is batchat.State.CHATTING
        self.guests.append(guest)
        for each in self.guests:
            each.reads()
        return guest


@pytest.fixture
def room() -> Room:
    return Room()


# A house: a reactor over real sockets


def hey(name: str) -> str:
    return batchat.HEY.format(name)


class House:
    """A reactor over real sockets, whose wheel and clock turn only when a test says so."""

    def __init__(self, kind: type[selectors.BaseSelector], **limits: int) -> None:
        class Polling(kind):
            def select(self, timeout=None):
                ready = super().select(0)
                self.busy = bool(ready) or timeout == 0
                return ready

        self.now = 1000.0
        doors = {socket.create_server(("127.0.0.1", 0)): wire for wire in (TelnetWire, WebWire)}
        self.addresses = {wire: door.getsockname() for door, wire in doors.items()}
        limits = {"rate": 10, "max_people": 1000, "max_per_address": 100, **limits}
        self.reactor = batchat.Reactor(doors, Settings(**limits), Polling(), lambda: self.now)
        self.callers: list[Caller] = []

    def calls(self, sends: bytes, wire: type[Wire] = TelnetWire, buffer: int = 0) -> Caller:
        self.callers.append(Caller(self.addresses[wire], wire, buffer))
        self.callers[-1].sock.send(sends)
        return self.callers[-1]

    def turns(self) -> None:
        self.reactor.turn()
        for caller in self.callers:
            caller.receives()

    def waits(self, seconds: float = 0) -> None:
        """Let time pass, and turn the wheel until nothing more happens."""
        self.now += seconds
        quiet = 0
        while quiet < 5:
            self.turns()
            quiet = 0 if self.reactor.selector.busy else quiet + 1

    def close(self) -> None:
        for each in [*self.callers, *self.reactor.connections]:
            each.sock.close()
        for door in self.reactor.doors:
            door.close()
        self.reactor.selector.close()


class Caller:
    """Somebody at the other end of a real socket, for whom the system may keep a small `buffer`."""

    def __init__(self, address: tuple, wire: type[Wire], buffer: int) -> None:
        self.wire = wire
        self.sock = socket.socket()
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.connect(address)
        self.sock.setblocking(False)
        self.got = bytearray()
        self.reading = True

    def receives(self) -> None:
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
    """Makes houses; once with the best selector that the system has, once with the least."""
    with contextlib.ExitStack() as stack:

        def make(**limits: int) -> House:
            house = House(request.param, **limits)
            stack.callback(house.close)
            return house

        yield make


@pytest.fixture
def our_end(houses) -> socket.socket:
    """Our end of somebody's line."""
    house = houses()
    house.calls(b"mike\n")
    house.waits()
    return next(iter(house.reactor.connections)).sock


def assert_nothing_is_kept(reactor: batchat.Reactor) -> None:
    chat = reactor.chat
    assert not any([reactor.connections, reactor.leaving, reactor.in_line, reactor.slow])
    assert not any([chat.people, chat.changed])
    assert not any(each.connections or each.leaving for each in reactor.chat.addresses.values())
    assert not any(log.listeners for log in chat.logs.values())


# `python batchat.py` in a process of its own


def command_line(*options: str, descriptors: int = 0) -> list[str]:
    command = [sys.executable, str(BATCHAT), *options]
    if descriptors:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    return command


def run(*options: str, descriptors: int = 0) -> subprocess.CompletedProcess[str]:
    """Run it where it ends by itself."""
    command = command_line(*options, descriptors=descriptors)
    return subprocess.run(command, capture_output=True, check=False, text=True, timeout=PATIENCE)


class Server(contextlib.AbstractContextManager):
    """`python batchat.py` in a process of its own, on free ports."""

    def __init__(self, *options: str, descriptors: int = 0, **how) -> None:
        command = command_line("--port", "0", *options, descriptors=descriptors)
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
        self.process = subprocess.Popen(command, **how)
        self.opening_line = self.process.stdout.readline() + self.process.stdout.readline()
        self.port = int(re.search(r"port (\d+)", self.opening_line)[1])
        web = re.search(r"http://.*:(\d+)/", self.opening_line)
        self.web_port = int(web[1]) if web else 0

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def call(self, host: str = "127.0.0.1") -> Line:
        return Line(socket.create_connection((host, self.port), timeout=PATIENCE))

    def join(self, name: str, host: str = "127.0.0.1") -> Line:
        line = self.call(host)
        line.types(name)
        line.reads(GREETING + hey(name))
        return line

    def ends(self) -> tuple[int, str]:
        """Wait for it to end; returns its exit status and what it wrote to standard error."""
        _, log = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, log


class Line:
    """A plain blocking socket, whose every byte is accounted for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def types(self, *lines: str) -> None:
        self.sock.sendall("".join(f"{line}\r\n" for line in lines).encode())

    def reads(self, text: str) -> None:
        """Wait for this text, and see that nothing else comes before it."""
        expected, got = TelnetWire.encode(text), b""
        while len(got) < len(expected):
            more = self.sock.recv(len(expected) - len(got))
            assert more, f"the line ended after {got!r}"
            got += more
        assert got == expected

    def rest(self) -> str:
        """All that still comes, up to the end; then hang up."""
        with self.sock:
            return b"".join(iter(lambda: self.sock.recv(4096), b"")).decode()

    def sees_the_end(self) -> None:
        assert self.rest() == ""


def wait_until(condition) -> None:
    """Wait for what happens in other processes."""
    give_up = time.monotonic() + 3 * PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


# The real telnet, and the real Chromium


class Terminal(contextlib.AbstractContextManager):
    """A real telnet on a pseudo-terminal."""

    def __init__(self, port: int, *options: str) -> None:
        import pty

        self.process, self.screen = pty.fork()
        if not self.process:
            os.environ["LC_ALL"] = "C.UTF-8"
            os.execvp("telnet", ["telnet", *options, "127.0.0.1", str(port)])
        self.seen = b""
        self.shows("Connected to 127.0.0.1.\n")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.screen)

    def types(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def shows(self, text: str) -> None:
        """Wait for this text on the screen, and forget all up to it."""
        wanted, give_up = TelnetWire.encode(text), time.monotonic() + PATIENCE
        while wanted not in self.seen:
            assert time.monotonic() < give_up, (text, self.seen)
            with selectors.DefaultSelector() as selector:
                selector.register(self.screen, selectors.EVENT_READ)
                if selector.select(1):
                    try:
                        self.seen += os.read(self.screen, 4096)
                    except OSError:  # how Linux says that telnet has ended
                        assert wanted in self.seen, (text, self.seen)
        self.seen = self.seen.partition(wanted)[2]


class Chromium(contextlib.AbstractContextManager):
    """A real browser, driven through chromedriver (W3C WebDriver)."""

    ARGUMENTS = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
        " disable-background-networking disable-component-update disable-dev-shm-usage"
        " window-size=800,500"
    )

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.path = f"http://127.0.0.1:{port}"
        wait_until(lambda: self._ask("GET", "/status")["ready"])
        options = {
            "goog:chromeOptions": {"args": [f"--{each}" for each in self.ARGUMENTS.split()]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self._ask("POST", "/session", capabilities={"alwaysMatch": options})
        self.path += "/session/" + session["sessionId"]

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._ask("DELETE", "")
        self.driver.kill()
        self.driver.wait()

    def _ask(self, method: str, path: str, **body: object):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.path + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def joins(self, server: Server, name: str) -> None:
        self._ask("POST", "/url", url=f"http://localhost:{server.web_port}/")
        self.complaints()  # about what was open before
        self.shows(batchat.PROMPT.strip())
        self.types(name + ENTER)
        self.shows(hey(name).strip())

    def does(self, script: str):
        return self._ask("POST", "/execute/sync", script=script, args=[])

    def finds(self, selector: str, what: str) -> list:
        """Something of all that a CSS selector finds on the page."""
        return self.does(
            f"return [...document.querySelectorAll('{selector}')].map(it => it.{what})"
        )

    def types(self, text: str) -> None:
        """Press keys, wherever the keyboard is."""
        keys = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": keys}])

    def shows(self, text: str) -> None:
        wait_until(lambda: text in self.does("return document.body.innerText"))

    def sized(self, width: int, height: int) -> None:
        how = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        how = {"cmd": "Emulation.setDeviceMetricsOverride", "params": how}
        self._ask("POST", "/goog/cdp/execute", **how)

    def is_true(self, script: str) -> None:
        wait_until(lambda: self.does("return " + script))

    def titled(self, title: str) -> None:
        wait_until(lambda: self.does("return document.title") == title)

    def complaints(self) -> list[str]:
        """What its console has said since the last look."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", type="browser")]


ENTER, TAB, UP, DOWN, ESCAPE = "\ue007", "\ue004", "\ue013", "\ue015", "\ue00c"


@pytest.fixture(scope="module")
def chromium():
    if not shutil.which("chromedriver"):
        pytest.skip("chromedriver is not installed")
    with Chromium() as browser:
        yield browser


@pytest.fixture
def jonny(chromium):
    """Somebody with telnet, in a room with mike, who has Chromium."""
    with Server("--web-port", "0") as server:
        chromium.joins(server, "mike")
        jonny = server.join("jonny")
        chromium.shows("* jonny has joined the chat")
        yield jonny


# A world: the real reactor, chat and wires over sockets, a selector and a clock that
# are worse than any real ones; beside them runs a model that keeps for everyone a
# plain list of what they must read.  After every turn the two are compared.

# Settings so small that a few lines reach them.
SMALL = """LINE_LIMIT=100 WINDOW=4096 TOO_FAR_BEHIND=2048 TURN_LIMIT=2048 SPLICE_SIZE=16
    WHISPER_LIMIT=512 PRIVATE_LIMIT=1024 READ_SIZE=4096 READ_AHEAD=6000 HISTORY_SIZE=500 BANS_LIMIT=2 ACCEPT_BATCH=2 LOBBY=2 BYTES_A_TOKEN=128"""
SMALL_LIMITS = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", SMALL)}
DISMISSALS = {
    getattr(batchat, name).strip("* \n"): status
    for name, status in [
        ("FULL", HTTPStatus.SERVICE_UNAVAILABLE),
        ("CROWDED", HTTPStatus.SERVICE_UNAVAILABLE),
        ("NAMELESS", HTTPStatus.REQUEST_TIMEOUT),
        ("TOO_SLOW", HTTPStatus.REQUEST_TIMEOUT),
        ("BANNED", HTTPStatus.FORBIDDEN),
    ]
}
FULL, CROWDED, NAMELESS, TOO_SLOW, BANNED = DISMISSALS
SESAME = "sesame"  # the operators' password
VANISHED_SECONDS = 120  # until the system gives up a peer that is not there any more
BOUNDLESS = 10**9  # bytes
START = 1000.0  # on the clock, when a world begins
TODAY = "2026-11-24 14:02"  # on the wall
NEVER = batchat.NEVER
# The system calls that are made for one connection, but for send, whose failure is no end at once.
CALLS = [
    *("setblocking", "setsockopt", "getsockopt", "register", "modify", "unregister"),
    *("recv", "shutdown", "close"),
]
OURS = -1  # the errno of what is no error of the system's


class ABug(Exception):
    """An error of the server's own."""


class Far:
    """The network between somebody and the server."""

    def __init__(self, world: World, low_water: int) -> None:
        self.world = world
        self.low_water = low_water  # bytes that must fit, before the selector says so
        self.typed = b""  # all that they ever sent
        self.arrived = b""  # of that, what the server has not read yet
        self.ended = False  # they send no more
        self.broken = 0  # the errno that the server gets once
        self.vanished_at = NEVER
        self.room = BOUNDLESS  # bytes that still fit into the buffers on their way
        self.speed = 0  # bytes a second that they read, where that is little
        self.got = bytearray()  # all that the server could send them
        self.read_in = 0  # the last turn in which the server read something
        self.stuck = False  # the server could not send all that it wanted to
        self.send_error = 0  # what the next sends fail with, though the line is in order ...
        self.sends_to_fail = 0  # ... and how many of them
        self.faults: dict[str, int] = {}  # what the next call of a kind fails with

    def type(self, data: bytes) -> None:
        if not self.ended and not self.broken:
            self.typed += data
            self.arrived += data

    def reads(self, room: int, speed: int = 0) -> None:
        """From now on, they read so many bytes, and then so many a second."""
        # Room that there is can't be taken back, but for the boundless.
        self.room = room if self.reads_all else max(room, self.room)
        self.speed = speed

    @property
    def reads_all(self) -> bool:
        return self.room > BOUNDLESS // 2

    def break_down(self, error: int, loses: bool = False) -> None:
        if not self.broken:
            self.broken = error
            self.world.faults += 1
            if loses:
                self.lose()

    def lose(self) -> None:
        """What the server has not read yet, it never will."""
        self.typed = self.typed[: len(self.typed) - len(self.arrived)]
        self.arrived = b""

    def ready(self) -> int:
        readable = bool(self.arrived or self.ended or self.broken)
        writable = bool(self.broken or self.room >= self.low_water)
        return readable * selectors.EVENT_READ | writable * selectors.EVENT_WRITE


class SimulatedSocket:
    """The server's end of a line, as strict as a real one and stricter."""

    def __init__(self, far: Far, number: int, peer: Peer) -> None:
        self.far, self.number, self.peer = far, number, peer
        self.end_seen = False  # the server knows that they send no more
        self.error_seen = False  # it knows that the line is broken, or has given it up ...
        self.lost_since = NEVER  # ... since then
        self.failed = 0  # the errno of a call that failed, which is the end of the connection
        self.shut = self.closed = False

    def call(self, name: str) -> None:
        """What every call begins with: it may fail, once, at any time."""
        assert not self.closed, name
        self.far.world.work += 1
        error = self.far.faults.pop(name, 0)
        if error:
            self.far.world.reaches(name + " fails")
            self.failed = error
            raise ABug if error == OURS else OSError(error, os.strerror(error))

    def setblocking(self, blocking: bool) -> None:
        assert not blocking
        self.call("setblocking")

    def setsockopt(self, *option: int) -> None:
        self.call("setsockopt")
        raise OSError(errno.ENOPROTOOPT, "a kernel that knows none of them")

    def getsockopt(self, level: int, option: int) -> int:
        assert option == socket.SO_ERROR
        self.call("getsockopt")
        return self.sees_error() if self.far.broken else 0

    def fileno(self) -> int:
        return -1 if self.closed else self.number

    def _complain(self) -> None:
        """The error of a broken line is told once."""
        if self.sees_error():
            raise OSError(self.far.broken, os.strerror(self.far.broken))

    def sees_error(self) -> int:
        """The errno that the server is told, once."""
        told, self.error_seen = self.error_seen, True
        self.lost_since = min(self.lost_since, self.far.world.now)
        return 0 if told else self.far.broken

    def recv(self, most: int) -> bytes:
        far, world = self.far, self.far.world
        assert most <= batchat.READ_SIZE
        held = self.peer.connection in world.reactor.in_line
        try:
            self.call("recv")
        except OSError as error:
            if held:  # what the server has of them is still said, and they are as good as gone
                self.failed, self.end_seen = 0, True
                far.break_down(error.errno)
                far.lose()
                self.sees_error()
            raise
        most = min(most, world.segment)
        data, far.arrived = far.arrived[:most], far.arrived[most:]
        if data:
            far.read_in = world.turns
            return data
        if far.broken and not self.error_seen:
            self.end_seen = True
            self._complain()
        elif not far.ended and not self.error_seen:
            world.work -= 1
            raise BlockingIOError
        assert not self.end_seen, "read after the end"
        self.end_seen = True
        return b""

    def send(self, data: memoryview) -> int:
        far = self.far
        assert len(data)
        assert not self.closed
        assert not self.shut
        if far.broken:
            far.world.work += 1
            self._complain()
            raise BrokenPipeError(errno.EPIPE, "nobody is there")
        if far.sends_to_fail:
            far.sends_to_fail -= 1
            far.world.work += 1
            raise OSError(far.send_error, os.strerror(far.send_error))
        assert not self.error_seen, "sent into a gap"
        self.peer.must_get(bytes(data))
        took = min(far.room, len(data))
        far.stuck = took < len(data)
        if not took:
            raise BlockingIOError
        far.world.work += 1
        far.room -= took
        far.got += data[:took]
        return took

    def shutdown(self, how: int) -> None:
        self.call("shutdown")
        if how == socket.SHUT_RDWR:
            self.sees_error()
        if self.far.broken:
            raise OSError(errno.ENOTCONN, "nobody is there")
        self.shut = True
        self.far.ended |= how == socket.SHUT_RDWR or self.far.world.polite

    def close(self) -> None:
        assert self.peer.may_be_closed, "closed without a reason"
        try:
            self.call("close")
        finally:
            self.closed = True


class Peer:
    """What the model knows of somebody far away."""

    def __init__(self, world: World, wire: type[batchat.Wire], host: str, low_water: int) -> None:
        self.world, self.wire, self.host = world, wire, host
        self.group = batchat.address_group(host)
        self.far = Far(world, low_water)
        self.sock = SimulatedSocket(self.far, 1000 + len(world.peers), self)
        self.stage = "outside"  # then "calling", "naming", "chatting", "left"
        self.since, self.since_turn = world.now, 0  # when the stage began
        self.arrived_at = NEVER
        self.owed = bytearray()
        # What puts them behind: how much, and the bytes that they must have got to be over it.
        self.behind: deque[tuple[int, int]] = deque()
        self.name = ""
        self.tries = 0
        self.operator = False
        self.ignored: set[Peer] = set()
        self.opened = wire is TelnetWire  # they can read what is said, and are owed a goodbye
        self.events: list = []  # what the server made of what they typed
        self.replies = b""  # what the wire itself answered, and the bytes of its last answer
        self.answered = 0
        self.why = ""  # why they were let go, if they did not ask for it
        self.waited = False  # when they left, they had no token for what they had sent before
        self.pressed = 0  # how much they had typed when they pressed Ctrl-C ...
        self.key_read_at = NEVER  # ... and when the server had read that
        self.waits_since = NEVER  # since when they could have been read, but were not
        self.waits_turns = 0
        self.untaken = 0  # bytes that arrived and were not given to their wire yet
        self.looked_at = 0  # how much of what they got a test has seen

    # For tests that tell a short story

    def types(self, *lines: str) -> None:
        self.far.type(b"".join(line_on(self.wire, line) for line in lines))

    def reads(self) -> str:
        """The text that they got since the last look."""
        got, self.looked_at = bytes(self.far.got[self.looked_at :]), len(self.far.got)
        if self.wire is WebWire:
            got = got.partition(b"\r\n\r\n")[2] if got.startswith(b"HTTP") else got
            return "".join(f"{text.decode()}\n" for kind, text in frames_of(got) if kind == 0x81)
        return got.decode().replace("\r\n", "\n")

    @property
    def connection(self) -> batchat.Connection:
        return next(each for each in self.world.reactor.connections if each.sock is self.sock)

    # Their steps in a history

    def says(self, line: str, times: int) -> None:
        self.types(*[line] * times)

    def sends(self, data: tuple[bytes, bytes]) -> None:
        self.far.type(data[self.wire is WebWire])

    def takes(self, room: int, speed: int) -> None:
        self.far.reads(room, speed)
        self.world.faults += room < BOUNDLESS

    def presses_ctrl_c(self) -> None:
        """In telnet, which then shows nothing until its timing mark comes back."""
        if self.wire is TelnetWire and not self.pressed:
            self.far.type(b"\xff\xf4\xff\xfd\x06")
            # Or is it, after what they have typed before, something else?
            if telnet_by_the_byte(self.far.typed[:-3])[0][-1:] == [LEAVE]:
                self.pressed = len(self.far.typed)

    def ends(self) -> None:
        self.far.ended = True

    def breaks(self, error: int, loses: bool) -> None:
        if self.stage != "outside":
            self.far.break_down(error, loses)

    def call_fails(self, call: str, error: int) -> None:
        """A system call fails once, when it is made next."""
        self.far.faults[call] = error
        self.world.faults += 1

    def send_fails(self, error: int, times: int) -> None:
        """The system can't send for a moment; the line itself is in order."""
        if self.stage != "outside":
            self.far.send_error, self.far.sends_to_fail = error, times
            self.world.faults += 1

    def vanishes(self) -> None:
        if self.stage != "outside":
            self.far.vanished_at = self.world.now
            self.far.reads(0)
            self.world.faults += 1

    # The model

    def must_get(self, data: bytes) -> None:
        assert self.owed.startswith(data, len(self.far.got)), "they got what they must not get"

    @property
    def has_ended(self) -> bool:
        return self.far.ended or bool(self.far.broken)

    @property
    def unsent(self) -> int:
        return 0 if self.sock.error_seen else len(self.owed) - len(self.far.got)

    @property
    def is_here(self) -> bool:
        return not self.sock.closed and self.stage in ("calling", "naming", "chatting")

    def enters(self, stage: str) -> None:
        self.stage, self.since, self.since_turn = stage, self.world.now, self.world.turns

    def owe(self, data: bytes, behind: int) -> None:
        """They must get `data`; until they have it, they are so many bytes behind."""
        self.owed += data
        self.behind.append((behind, len(self.owed)))

    @property
    def bytes_behind(self) -> int:
        while self.behind and self.behind[0][1] <= len(self.far.got):
            self.behind.popleft()
        return 0 if self.sock.error_seen else sum(size for size, _ in self.behind)

    def last_words(self, words: str, status: HTTPStatus) -> bytes:
        """What they must get at the very end."""
        unavailable = status == HTTPStatus.SERVICE_UNAVAILABLE
        if not self.opened:
            return batchat.respond(status, "plain", words.encode()) if words else b""
        goodbye = b""
        if self.wire is WebWire:
            goodbye = b"\x88\x02" + struct.pack("!H", 1001 if unavailable else 1000)
            self.opened = False
        return self.wire.encode(words) + goodbye if words else goodbye

    @property
    def reasons(self) -> dict[str, bool]:
        """Why they may be let go when they did not ask for it, and whether that is so."""
        world, limits = self.world, self.world.reactor.settings
        # Whoever leaves has their place until the end of the turn.
        here = [
            each
            for each in world.peers
            if each.is_here or (each.stage == "left" and each.since_turn == world.turns)
        ]
        from_there = [each for each in here if each.group == self.group]
        too_slow = self.stage == "calling" and world.passed(batchat.HEAD_SECONDS, self.arrived_at)
        nameless = self.stage == "naming" and world.passed(batchat.NAME_SECONDS, self.arrived_at)
        late = self.bytes_behind > batchat.TOO_FAR_BEHIND
        return {
            os.strerror(self.far.broken): self.sock.error_seen,
            os.strerror(self.sock.failed): self.sock.failed > 0,
            "an error of ours": self.sock.failed == OURS,
            "is gone": world.passed(batchat.LOST_SECONDS, self.sock.lost_since),
            TOO_SLOW: too_slow,
            NAMELESS: nameless,
            FULL: len(here) > limits.max_people,
            CROWDED: self.group != "" and 0 < limits.max_per_address < len(from_there),
            BANNED.format(world.banned_minutes(self.group)): world.banned_minutes(self.group) > 0,
            "too far behind": late and world.patience < batchat.LOOK_SECONDS,
        }

    @property
    def was_banned(self) -> bool:
        return self.why.startswith(BANNED.partition("{")[0])

    @property
    def closing_seconds(self) -> float:
        away = DISMISSALS.get(BANNED if self.was_banned else self.why, 0)
        away = away in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.FORBIDDEN)
        return batchat.TURNED_AWAY_SECONDS if away else batchat.CLOSING_SECONDS

    @property
    def may_be_closed(self) -> bool:
        world, sock = self.world, self.sock
        open_now = [each for each in world.by_arrival if not each.sock.closed]
        crowd = world.reactor.settings.max_people + batchat.LOBBY
        leavers = [each for each in open_now if each.stage == "left"]
        from_there = [each for each in leavers if self.group and each.group == self.group]
        if 0 < world.reactor.settings.max_per_address < len(from_there):
            crowd, leavers = 0, from_there
        return (
            (sock.end_seen and not self.unsent)
            or bool(sock.failed)
            or (sock.error_seen and self.far.broken != 0)
            or (self.stage == "left" and world.passed(self.closing_seconds, self.since))
            or (
                len(open_now) > crowd
                and self.stage == "left"
                and (not self.unsent or all(each.unsent for each in leavers))
            )
            or world.now >= world.reactor.ends_at
            or self.why in ("too far behind", "is gone")
            or self.reasons["too far behind"]
        )


class SimulatedDoor:
    """A socket that listens."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waiting: list = []
        self.error = 0  # what accept fails with, and the selector when it should look out for us
        self.fails_until = 0.0
        self.closed = False

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def fileno(self) -> int:
        return -1 if self.closed else 1

    def ready(self) -> int:
        return selectors.EVENT_READ if self.waiting else 0

    def call(self, name: str) -> None:
        self.world.work += 1
        if self.world.now < self.fails_until and name in ("accept", "register"):
            self.world.reaches(name + " fails")
            raise OSError(self.error, os.strerror(self.error))

    def accept(self) -> tuple[SimulatedSocket, tuple]:
        self.call("accept")
        if not self.waiting:
            self.world.work -= 1
            raise BlockingIOError
        peer = self.waiting.pop(0)
        peer.enters("calling")
        peer.arrived_at = self.world.now
        self.world.by_arrival.append(peer)
        return peer.sock, (peer.host, 4321, 0, 0)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class SimulatedSelector:
    """As strict as epoll, and as forgetful where it fails; it sleeps as long as the world lets it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.keys: dict = {}

    def register(self, sock, events: int, data=None) -> None:
        assert sock not in self.keys
        assert sock.fileno() >= 0
        sock.call("register")
        self.keys[sock] = selectors.SelectorKey(sock, sock.fileno(), events, data)

    def modify(self, sock, events: int, data=None) -> None:
        assert self.keys.pop(sock).events != events
        sock.call("modify")
        self.keys[sock] = selectors.SelectorKey(sock, sock.fileno(), events, data)

    def unregister(self, sock) -> None:
        assert sock.fileno() >= 0
        del self.keys[sock]
        sock.call("unregister")

    def get_map(self) -> dict:
        return self.keys

    def _ready(self) -> list:
        all_ready = [
            (key, getattr(sock, "far", sock).ready() & key.events)
            for sock, key in self.keys.items()
        ]
        return [(key, events) for key, events in all_ready if events]

    def select(self, timeout: float) -> list:
        ready = self._ready()
        while timeout > 0 and not ready and not self.world.woken:
            timeout -= self.world.sleep(timeout)
            ready = self._ready()
        self.world.oversleep()
        first = self.world.rotation % len(ready) if ready else 0
        return ready[first:] + ready[:first]


class WatchedReactor(batchat.Reactor):
    """The real reactor, whose every turn the world looks at."""

    world: World

    def turn(self) -> None:
        self.world.before_turn()
        super().turn()
        self.world.after_turn()

    def _forward(self, connection) -> None:
        self.world.peer_of(connection).group = batchat.address_group(connection.wire.caller)
        super()._forward(connection)


class Witness(Chat):
    """The real chat; what the reactor asks of it, it asks of the model first."""

    world: World
    asked = False

    def _ask(self, what: str, *arguments, **more) -> None:
        outermost, self.asked = not self.asked, True
        if outermost:
            self.world.work += 1
            getattr(self.world, what)(*arguments, **more)
        try:
            getattr(Chat, what)(self, *arguments, **more)
        finally:
            self.asked = not outermost

    def handle(self, person, event) -> None:
        self._ask("handle", person, event)
        for log in self.logs.values():
            most = batchat.WINDOW + batchat.LINE_LIMIT + 500  # a line, and some notices
            assert len(log.data) < most

    greet = functools.partialmethod(_ask, "greet")
    leave = functools.partialmethod(_ask, "leave")
    reply = functools.partialmethod(_ask, "reply")
    ping = functools.partialmethod(_ask, "ping")
    close = functools.partialmethod(_ask, "close")


class World:
    """The server, everyone who calls it, the network between them, and the model."""

    def __init__(self, limits: Settings, drift: float = 0.0) -> None:
        self.now = START
        self.drift = drift  # seconds that every turn takes
        self.jump = 0.0  # seconds that the server oversleeps next time
        self.lag = 0.0  # seconds by which it overslept this time
        self.polite = False  # peers hang up as soon as we do
        self.budget = 0.0  # seconds that the server may sleep, before the next step
        self.woken = False  # by the next step, not by anything that it waited for
        self.turns = 0
        self.work = 0  # what was done so far, in calls and events
        self.idle_turns: list[float] = []  # when nothing was done in the last turns
        self.patience, self.patience_at = batchat.PATIENCE_SECONDS, self.now
        self.held_seconds = self.late_seconds = 0.0
        self.faults = 0
        self.reached: Counter[str] = Counter()  # what came about, of what seldom does
        self.read_by_all: Counter[str] = Counter()  # lines, by the address that made them
        self.rotation = 0  # who comes first among those who are ready
        self.segment = BOUNDLESS  # bytes that one recv gets, at most
        self.bans: dict[str, tuple[float, str]] = {}  # until when, and by whom
        self.history: dict = {wire: [] for wire in (TelnetWire, WebWire)}  # who said it, and what
        self.pinged_at = self.now
        self.stopped_at = NEVER
        self.peers: list[Peer] = []
        self.by_arrival: list[Peer] = []
        self.doors = {TelnetWire: SimulatedDoor(self), WebWire: SimulatedDoor(self)}
        self.signal = SimulatedDoor(self)  # through which the server is told to close
        self.selector = SimulatedSelector(self)
        doors = {door: wire for wire, door in self.doors.items()}
        self.reactor = WatchedReactor(doors, limits, self.selector, lambda: self.now)
        self.reactor.world = self
        self.reactor.chat = Witness(self.doors, limits, lambda: self.now)
        self.reactor.chat.world = self

    def passed(self, seconds: float, since: float) -> bool:
        return self.now - since > seconds - 1e-6

    def is_late(self, seconds: float, since: float) -> bool:
        """Whether what is due after so many seconds is overdue."""
        return self.now - since > seconds + self.lag + 1e-6

    @property
    def closes(self) -> bool:
        return self.reactor.ends_at != NEVER

    def reaches(self, what: str) -> None:
        self.reached[what] += 1

    # Steps of a story

    def calls(
        self, wire=TelnetWire, host: str = "127.0.0.1", low_water: int = 1, opens: bool = True
    ) -> Peer:
        through_proxy = host.startswith("for ")
        peer = Peer(self, wire, "127.0.0.1" if through_proxy else host, low_water)
        self.peers.append(peer)
        self.doors[wire].waiting.append(peer)
        if wire is WebWire and opens:
            peer.far.type(forwarded(host[4:]) if through_proxy else OPENING)
        return peer

    def joins(self, name: str, *caller, **more) -> Peer:
        peer = self.calls(*caller, **more)
        peer.types(name)
        return peer

    def waits(self, seconds: float = 0.01) -> None:
        """Let so much time pass; the server does all that is to be done until then."""
        self.budget, self.segment = seconds, BOUNDLESS
        self.woken = False
        for _ in range(10_000):
            if self.woken:
                return
            self.reactor.turn()
        raise AssertionError("the wheel turns and turns")

    # The other steps of a history, as hypothesis chooses them

    def take(self, step: str, *how) -> None:
        """Have the world take a step, or somebody at the other end of an open line."""
        if not hasattr(Peer, step):
            getattr(self, step)(*how)
            return
        number, *how = how
        peers = [p for p in self.peers if not p.sock.closed and p.far.vanished_at == NEVER]
        if peers:
            getattr(peers[-1 - number % len(peers)], step)(*how)

    def floods(self, number: int, line: str, other: int, room: int, speed: int) -> None:
        """Somebody says a lot, and somebody reads it slowly, or is the one who says it."""
        self.take("takes", other, room, speed)
        self.take("says", number, line, 70)

    def door_fails(self, wire, error: int, seconds: float) -> None:
        self.doors[wire].error = error
        self.doors[wire].fails_until = self.now + seconds
        self.faults += 1

    def turn(self, times: int = 1, rotation: int = 0, segment: int = BOUNDLESS) -> None:
        self.rotation, self.segment = rotation, segment
        for _ in range(times):
            self.budget = 0.0
            self.reactor.turn()

    def jumps(self, seconds: float) -> None:
        """The next turn comes late: the box was busy with something else, or asleep."""
        self.jump = seconds
        self.faults += 1

    # The clock

    def sleep(self, timeout: float) -> float:
        """Let some time pass, `timeout` at most; returns the seconds."""
        lines = [each.far for each in self.peers if not each.sock.closed and not each.far.broken]
        slow = [each for each in lines if each.speed and each.stuck]
        ends = [each.vanished_at + VANISHED_SECONDS - self.now for each in lines]
        for each in self.by_arrival:
            takes = not each.sock.closed and each.far.room >= each.far.low_water
            assert not (takes and each.unsent), "it sleeps, though it could send"
        seconds = min([timeout, self.budget, *ends, *[0.1 for _ in slow]])
        self.woken = seconds == self.budget < timeout
        self.budget -= seconds
        self.pass_by(seconds)
        return seconds

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for peer in self.peers:
            far = peer.far
            if far.speed and far.stuck and not peer.sock.closed:
                far.room += int(far.speed * seconds)
            if self.passed(VANISHED_SECONDS, far.vanished_at) and not peer.sock.closed:
                far.break_down(errno.ETIMEDOUT)

    def oversleep(self) -> None:
        self.lag, self.jump = self.jump, 0.0
        self.late_seconds += self.lag
        self.pass_by(self.lag + 1e-9)  # no system wakes anybody too early
        for peer in self.peers:
            peer.waits_since += self.lag
        # The turn begins: this is the time that the server sees.
        passed, self.patience_at = self.now - self.patience_at, self.now
        if self.reactor.held:
            self.held_seconds += passed
            self.patience = max(0.0, self.patience - passed)
        else:
            recovered = self.patience + passed * batchat.RECOVERY
            self.patience = min(batchat.PATIENCE_SECONDS, recovered)

    def before_turn(self) -> None:
        self.turns += 1
        self.pass_by(self.drift)
        self.woken = False
        self.was_held, self.before = self.reactor.held, self.progress()

    def progress(self) -> tuple[int, int]:
        """What changes in every turn that does something."""
        return self.work, sum(len(each.unheard) for each in self.reactor.connections)

    def after_turn(self) -> None:
        if self.progress() != self.before or self.woken:
            self.idle_turns.clear()
        else:
            self.idle_turns.append(self.now)
        assert len(self.idle_turns) < 5 or self.now > self.idle_turns[-5] + 1e-3, "the wheel spins"
        self.check()

    # The model: what everybody must read

    def peer_of(self, person: batchat.Person) -> Peer:
        return next(each for each in reversed(self.by_arrival) if each.sock is person.sock)

    def shows(self, peer: Peer, text: str) -> None:
        peer.owe(peer.wire.encode(text), batchat.SPLICE_SIZE)

    def announces(self, text: str, *but: Peer) -> None:
        for peer in self.peers:
            data = peer.wire.encode(text)
            if peer.stage == "chatting" and peer not in but:
                peer.owe(data, len(data))
            elif peer.stage == "chatting":
                peer.owe(b"", len(data) + batchat.SPLICE_SIZE)
            elif peer.stage == "left" and peer.unsent:
                peer.owe(b"", len(data))  # the log grows on, away from them

    def says(self, speaker: Peer, text: str) -> None:
        self.happens(speaker, text, speaker)
        most = self.reactor.settings.history
        for wire, lines in self.history.items():
            lines.append((speaker, f"{TODAY[-5:]} {text}"))
            while (
                len(lines) > most
                or sum(len(wire.encode(text)) for _, text in lines) > batchat.HISTORY_SIZE
            ):
                del lines[0]

    def said_before(self, peer: Peer) -> str:
        lines = [text for _, text in self.history[peer.wire]]
        before = f"* Said before you came, since {TODAY}:\n"
        return "".join([before, *lines, "* That was before you came.\n"]) if lines else ""

    def happens(self, peer: Peer, text: str, *but: Peer) -> None:
        """What all read but these, and those who ignore them."""
        self.read_by_all[peer.group] += 1
        self.announces(text, *but, *(each for each in self.inside if peer in each.ignored))

    @property
    def inside(self) -> list[Peer]:
        return [each for each in self.peers if each.stage == "chatting"]

    def called(self, name: str) -> Peer | None:
        key = batchat.name_key(name)
        return next((each for each in self.inside if batchat.name_key(each.name) == key), None)

    def goes(
        self, peer: Peer, words: str = "", status: int = 200, how: str = "has quit the chat"
    ) -> None:
        was_inside = peer.stage == "chatting"
        peer.enters("left")
        for other in self.peers:
            other.ignored.discard(peer)
        peer.ignored.clear()
        if was_inside and not self.closes:
            self.happens(peer, f"* {peer.name} {how}\n")
        peer.owe(peer.last_words(words, HTTPStatus(status)), 2 * batchat.SPLICE_SIZE)

    def greet(self, person) -> None:
        peer = self.peer_of(person)
        peer.enters("naming")
        self.shows(peer, GREETING)

    def banned_minutes(self, group: str) -> int:
        until, _ = self.bans.get(group, (0, ""))
        return -min(0, int((self.now - until) // 60))

    def handle(self, person, event) -> None:
        peer = self.peer_of(person)
        too_private = person.outbox.private_bytes - peer.answered > batchat.PRIVATE_LIMIT
        assert event is LEAVE or not too_private
        assert not self.was_held or event is LEAVE, "somebody is heard while the room is held"
        peer.answered = 0
        peer.waits_since, peer.waits_turns = NEVER, 0
        peer.events.append(event)
        if event is OPENED:
            peer.opened = True
            self.greet(person)
        elif event is LEAVE:
            peer.waited = self.must_wait(person)
            self.goes(peer)
        elif peer.stage == "naming":
            self.take_name(peer, event)
        elif event is TOO_LONG:
            self.shows(
                peer, f"* A line has at most {batchat.LINE_LIMIT} bytes; yours was not sent.\n"
            )
        elif event[:2] != "//" and (event[:1] == "/" or re.match(r"(?i)\W*/op(\s|\Z)", event)):
            event = event[event.index("/") :].strip()
            self.take_command(peer, *(event + " ").split(" ", 1))
        elif event.strip():
            self.says(peer, f"<{peer.name}> {event[event.startswith('//') :]}\n")

    def leave(self, person, why: str, words: str = "", status: int = 200) -> None:
        peer = self.peer_of(person)
        assert peer.reasons.get(why), why
        peer.why = why
        kind = BANNED if peer.was_banned else why
        self.reaches(kind)
        assert words.strip("* \n") == (why if kind in DISMISSALS else "")
        assert status == DISMISSALS.get(kind, 200)
        self.goes(peer, words, status)

    def reply(self, person, data: bytes) -> None:
        peer = self.peer_of(person)
        if data != peer.wire.PING:  # which `ping` has owed to them
            peer.owe(data, batchat.SPLICE_SIZE)
            peer.replies += data
            peer.answered = len(data)
            if peer.wire is WebWire and peer.opened and frames_of(data)[-1][0] == 0x88:
                peer.opened = False

    def ping(self) -> None:
        assert self.passed(batchat.PING_SECONDS, self.pinged_at)
        self.pinged_at = self.now
        for peer in self.peers:
            if peer.stage in ("naming", "chatting"):
                peer.owe(peer.wire.PING, len(peer.wire.PING) + batchat.SPLICE_SIZE)

    def close(self, everyone) -> None:
        assert list(everyone) == list(self.reactor.connections)
        for peer in self.peers:
            if peer.is_here:
                self.goes(peer, batchat.SHUTDOWN, 503)

    def why_not(self, peer: Peer, text: str) -> str:
        """Why they can't be called so; empty where they can."""
        try:
            name = batchat.check_name(text)
        except batchat.Refusal as why:
            return f"* {why}\n"
        taken = self.called(name) not in (None, peer) or name.lower() == "you"
        return f"* The name {name} is taken.\n" if taken else ""

    def has_no_token(self, connection: batchat.Connection) -> bool:
        address = connection.address
        buckets = [connection.bucket, *([address.bucket] if address else [])]
        return any(each.ready_at > self.now for each in buckets)

    def must_wait(self, connection: batchat.Connection) -> bool:
        outbox = connection.outbox
        too_much = outbox.log.news + outbox.log.history.made > batchat.TURN_LIMIT
        too_private = outbox.private_bytes > batchat.PRIVATE_LIMIT
        return self.was_held or too_much or too_private or self.has_no_token(connection)

    def take_name(self, peer: Peer, event) -> None:
        minutes = self.banned_minutes(peer.group)
        if minutes and event not in (TOO_LONG, "/quit") and not batchat.HTTP_REQUEST.match(event):
            self.goes(peer, f"* {BANNED.format(minutes)}\n", HTTPStatus.FORBIDDEN)
            return
        if event in (TOO_LONG, "/quit") or batchat.HTTP_REQUEST.match(event):
            self.goes(peer)
            return
        why = self.why_not(peer, event)
        if not why:
            peer.name = batchat.check_name(event)
            self.happens(peer, f"* {peer.name} has joined the chat\n")
            peer.enters("chatting")
            self.shows(peer, f"Hey, {peer.name}! Hope you enjoy the chat.\n\n")
            self.shows(peer, self.said_before(peer))
            peer.tries = 0
            return
        peer.tries += 1
        if peer.tries == batchat.NAME_TRIES:
            self.goes(peer, why + batchat.GOODBYE)
        else:
            self.shows(peer, why + batchat.PROMPT)

    def take_command(self, peer: Peer, verb: str, rest: str) -> None:
        verb, rest = verb.lower(), rest.strip()
        takes, _, whose = batchat.COMMANDS.get(verb, (None, "", ""))
        if whose == batchat.OPERATORS and verb != "/op" and not peer.operator:
            takes = None
        if takes is None:
            answer = f"* There is no command {verb}; /help shows those there are.\n"
        elif len(rest.split(None, 1)) < len([each for each in takes.split() if each[0] != "["]):
            answer = f"* It goes like this: {verb} {takes}\n"
        else:
            answer = getattr(self, "do_" + verb[1:])(peer, rest)
        if answer:
            self.shows(peer, answer)

    def do_help(self, peer: Peer, rest: str) -> str:
        return batchat.help_for(peer.operator)

    def do_who(self, peer: Peer, rest: str) -> str:
        people = sorted(self.inside, key=lambda each: batchat.name_key(each.name))
        names = ["@" * each.operator + each.name for each in people]
        return f"* {len(names)} here: {', '.join(names)}\n"

    def do_me(self, peer: Peer, rest: str) -> None:
        self.says(peer, f"** {peer.name} {rest}\n")

    def do_msg(self, peer: Peer, rest: str) -> str:
        name, text = rest.split(None, 1)
        other = self.called(name)
        if other is None:
            return f"* Nobody here is called {name}.\n"
        if peer not in other.ignored:
            if other.connection.outbox.private_bytes > batchat.WHISPER_LIMIT:
                self.reaches("too much to read")
                return f"* {other.name} has too much to read; your line was not sent.\n"
            self.shows(other, f"[{peer.name} -> you] {text}\n")
        return f"[you -> {other.name}] {text}\n"

    def do_nick(self, peer: Peer, rest: str) -> str:
        why = self.why_not(peer, rest)
        if why:
            return why
        name, before = batchat.check_name(rest), peer.name
        if name == before:
            return f"* You are {name} already.\n"
        peer.name = name
        self.happens(peer, f"* {before} is now known as {name}\n")
        return ""

    def do_ignore(self, peer: Peer, rest: str) -> str:
        other = self.called(rest)
        if other is None:
            return f"* Nobody here is called {rest}.\n"
        if other is peer:
            return "* You can't ignore yourself.\n"
        peer.ignored ^= {other}
        if other in peer.ignored:
            return f"* You no longer hear {other.name}.\n"
        return f"* You hear {other.name} again.\n"

    def do_quit(self, peer: Peer, rest: str) -> None:
        self.goes(peer)

    def do_op(self, peer: Peer, rest: str) -> str:
        if rest == SESAME:
            peer.operator = True
            return "* You are an operator now; /help shows what that is.\n"
        peer.tries += 1
        if peer.tries < batchat.PASSWORD_TRIES:
            return "* That is not the password.\n"
        self.goes(peer, "* That is not the password.\n" + batchat.GOODBYE)
        return ""

    def do_kick(self, peer: Peer, rest: str) -> str:
        name, *why = rest.split(None, 1)
        return self.throws_out(peer, name, ": ".join([peer.name, *why]))

    def throws_out(self, peer: Peer, name: str, by: str) -> str:
        other = self.called(name)
        if other is None:
            return f"* Nobody here is called {name}.\n"
        if other is peer:
            return "* You can't throw out yourself; /quit leaves.\n"
        self.reaches("thrown out")
        self.goes(other, f"* You were thrown out by {by}\n", how=f"was thrown out by {by}")
        return ""

    def do_ban(self, peer: Peer, rest: str) -> str:
        name, *minutes = rest.split()
        other = self.called(name)
        minutes = int(minutes[0]) if minutes else 60
        live = [group for group in self.bans if self.banned_minutes(group)]
        if other and other.group and other.group not in live and len(live) >= 2:
            self.reaches("too many bans")
            return "* There are 2 bans already; /unban ends one.\n"
        by = f"{peer.name}: banned for {minutes} min" if other and other.group else peer.name
        why_not = self.throws_out(peer, name, by)
        if why_not:
            return why_not
        for lines in self.history.values():
            lines[:] = [
                each
                for each in lines
                if each[0] is not other and not (other.group and each[0].group == other.group)
            ]
        if not other.group:
            return f"* {other.name} is out, but called from this very box: no ban keeps them out.\n"
        before, _ = self.bans.get(other.group, (0, ""))
        self.bans[other.group] = (max(before, self.now + 60 * minutes), peer.name)
        others = len([each for each in self.inside if each.group == other.group])
        return (
            f"* {other.group} is banned for {minutes} min; from there are still here: {others}.\n"
        )

    def do_bans(self, peer: Peer, rest: str) -> str:
        answer = [
            f"* {group} is banned for another {self.banned_minutes(group)} min, by {by}.\n"
            for group, (_, by) in self.bans.items()
            if self.banned_minutes(group)
        ]
        answer.sort(key=lambda line: [*self.reactor.chat.addresses].index(line.split()[1]))
        return "".join(answer) or "* No address is banned.\n"

    def do_unban(self, peer: Peer, rest: str) -> str:
        if not self.banned_minutes(rest):
            return f"* {rest} is not banned.\n"
        self.bans[rest] = (0, "")
        return f"* {rest} is no longer banned.\n"

    # What must be so after every turn

    def check(self) -> None:
        reactor, peers = self.reactor, self.peers
        connections = {each.sock: each for each in reactor.connections}
        here = [each for each in peers if each.is_here]
        assert [*connections] == [p.sock for p in self.by_arrival if not p.sock.closed]
        assert not self.is_late(batchat.PING_SECONDS + batchat.TICK_SECONDS, self.pinged_at)
        assert {key: each.sock for key, each in reactor.chat.people.items()} == {
            batchat.name_key(each.name): each.sock for each in self.inside
        }
        ignorers = reactor.chat._ignorers
        assert {(other.sock, each.sock) for other, by in ignorers.items() for each in by} == {
            (other.sock, each.sock) for each in self.inside for other in each.ignored
        }
        groups = Counter(each.group for each in here)
        del groups[""]
        assert groups == +Counter(
            {
                group: address.connections - len(address.leaving)
                for group, address in reactor.chat.addresses.items()
            }
        )
        self.check_addresses()
        assert len(here) <= reactor.settings.max_people
        assert max(groups.values(), default=0) <= (reactor.settings.max_per_address or len(here))
        doors = {door for door in self.doors.values() if not door.closed}
        watched = {sock for sock in self.selector.keys if sock not in connections} - {self.signal}
        failing = {door for door in doors if self.now - self.lag < door.fails_until + 1.001}
        assert watched | failing == doors | failing
        self.check_patience()
        for peer in self.by_arrival:
            if not peer.sock.closed:
                self.check_connection(peer, connections[peer.sock])

    def check_addresses(self) -> None:
        """What is kept of an address is bounded, and so is what all must read from there."""
        limits = self.reactor.settings
        rate = batchat.ADDRESS_SHARE * limits.rate or NEVER
        most = rate * (self.now - START + batchat.BURST_SECONDS) + 1
        for group, address in self.reactor.chat.addresses.items():
            # As many as may be here may be leaving, or have just begun to.
            assert address.connections <= 2 * limits.max_per_address + 1 or not (
                limits.max_per_address
            )
            assert self.read_by_all[group] <= most, "come and go as they may"

    def check_patience(self) -> None:
        """The room is held for those who are too far behind, and for no longer than it may."""
        reactor = self.reactor
        late = [each for each in self.by_arrival if not each.sock.closed and self.truly_late(each)]
        assert reactor.held == bool(late)
        assert not reactor.held or self.patience >= batchat.LOOK_SECONDS, "out of patience"
        share = batchat.RECOVERY / (1 + batchat.RECOVERY)
        most = batchat.PATIENCE_SECONDS + share * (self.now - START)
        assert self.held_seconds <= most + self.late_seconds + 1e-3
        if reactor.held:
            self.reaches("held")

    def truly_late(self, peer: Peer) -> bool:
        late = peer.connection.outbox.behind > batchat.TOO_FAR_BEHIND
        assert not late or peer.bytes_behind > batchat.TOO_FAR_BEHIND
        return late

    def check_connection(self, peer: Peer, connection: batchat.Connection) -> None:
        reactor, outbox, far, sock = self.reactor, connection.outbox, peer.far, peer.sock
        assert not sock.failed, "a call failed, and nothing came of it"
        seconds = {
            "calling": batchat.HEAD_SECONDS - peer.arrived_at + peer.since,
            "naming": batchat.NAME_SECONDS - peer.since + peer.arrived_at,
            "left": batchat.CLOSING_SECONDS,
        }.get(peer.stage, NEVER)
        since = peer.since
        if sock.error_seen and peer.stage != "left":
            seconds, since = batchat.LOST_SECONDS, sock.lost_since
        assert not self.is_late(seconds + batchat.TICK_SECONDS + 0.1, since), "out of time"
        key = self.selector.keys.get(sock)
        events = key.events if key else 0
        reads, writes = events & selectors.EVENT_READ, events & selectors.EVENT_WRITE
        news = outbox.log.news or connection in reactor.chat.changed
        assert bool(writes) == bool(peer.unsent) or news
        too_private = outbox.private_bytes > batchat.PRIVATE_LIMIT
        rate = reactor.settings.rate
        no_token = False
        if rate:
            most = rate * (self.now - peer.arrived_at + batchat.BURST_SECONDS) + 1
            said = [each for each in peer.events if each or not sock.error_seen]
            assert len(said) <= most + said.count(LEAVE), "more lines than the rate lets through"
            no_token = self.has_no_token(connection)
        if no_token:
            self.reaches("paced")
        key_is_read = 0 < peer.pressed <= len(far.typed) - len(far.arrived)
        if key_is_read and peer.is_here and not too_private:
            peer.key_read_at = min(peer.key_read_at, self.now)
            most = batchat.PATIENCE_SECONDS + 1  # until they are listened to, if just a bit
            assert not self.is_late(most, peer.key_read_at), "their screen is frozen"
        to_read = far.arrived or connection.unheard or (peer.has_ended and not sock.end_seen)
        full = len(connection.unheard) == batchat.READ_AHEAD
        assert bool(reads) != (full or sock.end_seen), "nobody listens to them"
        assert connection in reactor.in_line or not connection.unheard
        before, peer.untaken = peer.untaken, len(far.arrived) + len(connection.unheard)
        if to_read and not (too_private or no_token) and peer.untaken >= before > 0:
            peer.waits_since = min(peer.waits_since, self.now)
            peer.waits_turns += not (self.was_held or reactor.held)
            # Each of those in line may say all that goes into one turn.
            assert peer.waits_turns <= len(reactor.connections) + 1, "read too late, in turns"
            assert self.now - peer.waits_since <= batchat.PATIENCE_SECONDS + 0.1, "in seconds"
        else:
            peer.waits_since, peer.waits_turns = NEVER, 0

    # What must be so in the end

    def settle(self) -> None:
        """Let everyone read and time pass, until nothing is under way any more."""
        for peer in self.peers:
            if peer.far.vanished_at == NEVER:
                peer.far.room = BOUNDLESS
        for _ in range(1000):
            self.waits(1.0)
            open_now = [each for each in self.peers if not each.sock.closed]
            if not (
                self.reactor.in_line
                or any(p.far.arrived or p.unsent or p.sock.error_seen for p in open_now)
                or any(door.waiting for door in self.doors.values())
            ):
                return
        raise AssertionError("something is left to do for ever")

    def check_that_nothing_is_lost(self) -> None:
        """All that was typed was understood, and all that was owed was sent."""
        for peer in self.peers:
            wire = peer.wire()
            events, _ = events_of(wire, peer.far.typed) if peer.far.typed else ([], b"")
            by_key = events[-1:] == [LEAVE]
            if peer.sock.end_seen and not by_key and not peer.why:
                events.append(LEAVE)
            # The search ahead may err after an escaped 255, and in a subnegotiation.
            may_err = re.search(b"\xff\xff|\x03", peer.far.typed)
            if peer.waited and (by_key or may_err):  # what had to wait was thrown away
                self.reaches("interrupted")
                assert peer.events[:-1] == events[: len(peer.events) - 1]
                continue
            assert events[: len(peer.events)] == peer.events
            if peer.wire is TelnetWire:
                wire.replies, peer.replies = plain(wire.replies), plain(peer.replies)
            assert wire.replies.startswith(peer.replies)
            if peer.is_here or (peer.why and peer.why == os.strerror(peer.far.broken)):
                assert (peer.events, peer.replies) == (events, wire.replies)
                assert not (peer.far.ended and peer.is_here)
            if not peer.sock.closed:
                assert peer.owed == peer.far.got

    def everybody_hangs_up(self) -> None:
        for peer in self.peers:
            peer.far.ended = True
        self.waits(VANISHED_SECONDS)
        assert all(each.sock.closed for each in self.peers)
        kept = self.reactor.chat.addresses
        assert kept.keys() == {group for group in kept if self.banned_minutes(group)}
        assert not any(log.data for log in self.reactor.chat.logs.values())

    def the_room_closes(self) -> None:
        self.selector.register(self.signal, selectors.EVENT_READ, self.stop)
        self.signal.waiting.append(None)
        self.budget, self.segment, self.polite = NEVER, BOUNDLESS, True
        here = [each for each in self.by_arrival if each.is_here]
        open_now = [each for each in self.peers if not each.sock.closed]
        for peer in open_now:
            peer.far.ended |= peer.sock.shut
        all_read = all(each.far.reads_all for each in open_now)
        assert self.reactor.run()
        assert not self.is_late(0.1 if all_read else batchat.SHUTDOWN_SECONDS, self.stopped_at)
        assert all(each.sock.closed for each in self.by_arrival)
        assert all(door.closed for door in self.doors.values())
        for peer in here:
            if peer.far.reads_all and not (peer.far.broken or peer.sock.error_seen):
                assert peer.owed == peer.far.got or peer.sock.failed

    def stop(self) -> None:
        self.selector.unregister(self.signal)
        self.stopped_at = self.now
        self.reactor.stop()


def plain(replies: bytes) -> bytes:
    """What telnet is answered, but for what depends on how its bytes were cut up."""
    return re.sub(rb"\r(?!\n)", b"", replies.replace(ASKS_FOR_BINARY, b""))


def line_on(wire: type[batchat.Wire], line: str) -> bytes:
    return masked(1, line.encode()) if wire is WebWire else line.encode() + b"\r\n"


def every(step: str, *choices) -> st.SearchStrategy:
    """One of all the ways to take a step."""
    return st.sampled_from([(step, *how) for how in itertools.product(*choices)])


WHO = range(5)
HOSTS = ["127.0.0.1", "203.0.113.5", "::ffff:203.0.113.5", "198.51.100.9", "2001:db8::7"]
HOSTS += ["for 203.0.113.5"]  # through a proxy on the server's own box
CHAT = [
    *("hi", "how are you?", "x" * 80, "y" * 90, "z" * 101, "", "h\u00e9\x1b[2J", "//slash"),
    *("/who", "/help", "/me waves", "/msg ann psst", "/msg bob " + "p" * 80, "/msg cy", "/nope"),
    *("/op sesame", " /OP no", "/kick ann", "/kick bob get out", "/ban ann 2", "/ban bob", "/bans"),
    *("/unban 203.0.113.5", "/nick eve", "/nick ann", "/nick Bob", "/quit"),
    *("GET / HTTP/1.1", "ann", "a b"),
]
GARBAGE = [  # for telnet, and for a browser
    *[(b"half a li", masked(1, b"frag", False)), (b"\r", masked(0, b"ment")), (b"\n", OPENING)],
    *[(b"\xff\xf6", masked(9, b"ping")), (b"\xff\xfd\x06", masked(10, b"")), (b"\0", b"\x81")],
    *[(b"\xff", masked(1, b"hi")[:3]), (b"\xff\xfa\x1f\0", OPENING[:40]), (b"\xf0", OPENING[40:])],
    *[(b"\b", masked(1, b"a\nb")), (b"\xc3", masked(1, b"\xff")), (b"no end" * 99, b"G")],
    *[(b"\xff\xf6" * 60, masked(9, b"p" * 100) * 12), (b"\xff\xf1" * 99, masked(10, b"") * 99)],
    (b"\xff\xf6" * 60 + b"\n/quit\n" + b"\xff\xf1" * 2100, masked(9, b"pong" * 9) * 99),
    *[
        (
            typed_in_telnet("\u041c\u0430\u0440\u0438\u044f\n\u0443 \u30ca\u30c3\n"),
            masked(1, b"\xd0\x9c"),
        )
    ],
    *[(b"\xff\xfb\0\xff\xfd\0", b"\x88\x80"), (b"\x1b[A\tx\n", masked(1, b"\x1b]0;x\x07\t"))],
    *[(b"\xff\xf4", masked(8, b"")), (b"\x04", masked(1, b"x" * 101)), (b"\xa9", b"\xa9\r\n\r\n")],
]
ERRORS = [errno.ECONNRESET, errno.EPIPE, errno.EHOSTUNREACH]
DOOR_ERRORS = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ECONNABORTED]
CALL_ERRORS = [errno.ENOMEM, errno.EINVAL, errno.EBADF]
NAMES = ["ann", "bob", "cy", "eve", "Bob"]
JOINS = every("joins", NAMES, [TelnetWire, WebWire], HOSTS, [1, 500])


SAYS = every("says", WHO, CHAT, [1, 2, 30])
IGNORES = every("says", WHO, ["/ignore ann", "/ignore bob", "/ignore cy", "/ignore eve"], [1, 2])
LONG_ANSWERS = ["x" * 80, "/who", "/msg bob " + "p" * 80]
FLOODS = every("floods", WHO, LONG_ANSWERS, WHO, [0, 1, 1000], [0, 300, 600])
STALLS = every("takes", WHO, [0, 1, 10, 100], [0, 100])


READS = every("takes", WHO, [BOUNDLESS, 1, 100, 2500], [0])
TURNS = every("turn", [1, 2, 3], range(5), [BOUNDLESS, BOUNDLESS, 3, 40])
RAW = st.binary(max_size=9).map(lambda data: (data, data))


NETWORK_STEPS = st.one_of(
    *(TURNS, TURNS, JOINS, JOINS, SAYS, SAYS, IGNORES, FLOODS, FLOODS, FLOODS, FLOODS),
    *(STALLS, READS, every("sends", WHO, GARBAGE)),
    st.tuples(st.just("sends"), st.sampled_from(WHO), RAW),
    every("calls", [TelnetWire, WebWire], HOSTS, [1, 50, 500], [True, False]),
    *(every("waits", [0.5, 0.05, 1.9, 2.1, 2.1]), every("waits", [2.1, 6.0, 11.0, 31.0, 125.0])),
    every("presses_ctrl_c", WHO),
    *(every("ends", WHO), every("vanishes", WHO), every("breaks", WHO, ERRORS, [True, False])),
    every("call_fails", WHO, CALLS, CALL_ERRORS),
    every("call_fails", WHO, ["recv", "modify"], [OURS]),
    every("send_fails", WHO, [*CALL_ERRORS, errno.ENOBUFS], [1, BOUNDLESS]),
    every("jumps", [0.3, 3.0, 100.0]),
    every("door_fails", [TelnetWire, WebWire], DOOR_ERRORS, [0.5, 1.5]),
)


LIMITS = st.sampled_from(
    [
        Settings(*numbers, password=SESAME, behind_proxy=behind_proxy)
        for *numbers, behind_proxy in itertools.product(
            [10, 0, 0], [1000, 1000, 3], [0, 0, 2], [0, 3, 50], [False, True]
        )
    ]
)
EVENTS = st.sampled_from(range(0, 61, 4)).flatmap(
    lambda n: st.lists(NETWORK_STEPS, min_size=n, max_size=n)
)
# Often some people are there already, so that there is somebody to talk to.
HISTORIES = st.tuples(st.lists(JOINS, max_size=4), EVENTS).map(
    lambda parts: [*parts[0], ("turn", 2, 0, BOUNDLESS), *parts[1]]
)
ENDS = st.sampled_from(["all hang up", "the room closes", "the room closes at once"])
WORLDS = st.tuples(LIMITS, st.sampled_from([0.0, 1e-4]), HISTORIES, ENDS)


@contextlib.contextmanager
def no_error_of_ours(**limits):
    """Where the server may log no error but ABug, and has these limits."""

    def exception(*_: object) -> None:
        assert isinstance(sys.exc_info()[1], ABug), "an error of ours"

    ours = mock.Mock(exception=mock.Mock(side_effect=exception))
    date = mock.Mock(return_value="Tue, 15 Nov 1994 08:12:31 GMT")
    today = mock.Mock(return_value=TODAY)
    with mock.patch.multiple(batchat, logger=ours, formatdate=date, local_time=today, **limits):
        yield


def simulate(limits: Settings, drift: float, history: list, end: str) -> World:
    """One run of the world, from the first caller until everybody has gone."""
    with no_error_of_ours(**SMALL_LIMITS):
        world = World(limits, drift)
        for step in history:
            world.take(*step)
        if end == "the room closes at once":
            world.the_room_closes()
        else:
            world.settle()
            world.check_that_nothing_is_lost()
            if end == "the room closes":
                world.the_room_closes()
            else:
                world.everybody_hangs_up()
        assert_nothing_is_kept(world.reactor)
        return world


@pytest.fixture
def worlds():
    """Makes worlds with the real limits."""
    with no_error_of_ours():
        yield lambda rate=0, people=1000, per_address=0, **more: World(
            Settings(rate, people, per_address, **more)
        )


LONG = "x" * 4000


def talk(world: World, talker: Peer, kilobytes: int) -> None:
    talker.types(*[LONG] * (kilobytes // 4))
    world.waits()


def stalls(world: World, name: str, **how) -> Peer:
    """Somebody who reads nothing any more, nor has a system that does it for them."""
    peer = world.joins(name, **how)
    world.waits()
    peer.far.reads(0)
    return peer


def names(world: World) -> list[str]:
    return [each.name for each in world.inside]


# --------------------------------------------------------------------------
# A chat room is a log, and a listener is a place in it
# --------------------------------------------------------------------------


class Listener:
    """An outbox, beside the plain bytes that must come out of it."""

    def __init__(self, log: Log) -> None:
        self.outbox = Outbox(log)
        self.inside = self.deaf = False
        self.owed, self.got = bytearray(), bytearray()

    def enters(self) -> None:
        if not self.inside and not self.deaf and self.outbox.cursor == batchat.FOREVER:
            self.outbox.enter()
            self.inside = True

    def leaves(self) -> None:
        if self.inside:
            self.outbox.leave()
            self.inside = False

    def is_told(self, data: bytes) -> None:
        self.outbox.insert(data)
        if not self.deaf:
            self.owed += data

    def takes(self, most: int) -> None:
        """Be sent at most so many bytes."""
        with self.outbox.unsent() as unsent:
            sent = bytes(unsent)[:most]
        self.got += sent
        self.outbox.advance(len(sent))

    def goes_deaf(self) -> None:
        self.outbox.deafen()
        self.deaf, self.inside, self.owed = True, False, self.got[:]


LISTENERS = st.integers(0, 3)
TEXTS = st.binary(min_size=1, max_size=6)
SAY = st.tuples(st.just("say"), st.none() | LISTENERS, TEXTS)
STEPS = st.one_of(
    *(SAY, SAY),
    st.tuples(st.just(Listener.is_told), LISTENERS, TEXTS),
    st.tuples(st.just(Listener.takes), LISTENERS, st.integers(0, 9)),
    st.tuples(st.sampled_from([Listener.enters, Listener.leaves, Listener.goes_deaf]), LISTENERS),
    st.tuples(st.just("trim")),
)


@given(st.lists(STEPS, max_size=60))
def test_every_listener_gets_just_what_a_list_of_their_own_would_hold(steps):
    log = Log(TelnetWire)
    listeners = [Listener(log) for _ in range(4)]

    def trim() -> None:
        """Forget what all of them have."""
        log.trim(min([log.end, *(each.outbox.cursor for each in listeners)]))

    for step, *rest in steps:
        if step == "trim":
            trim()
        elif step == "say":
            speaker, text = rest
            log.append(text)
            for number, listener in enumerate(listeners):
                if number == speaker:
                    listener.outbox.skip_newest()
                elif listener.inside:
                    listener.owed += text
        else:
            step(listeners[rest[0]], *rest[1:])
        for each in listeners:
            assert each.owed.startswith(each.got)
            assert each.outbox.private_bytes <= len(each.owed) - len(each.got)
    for each in listeners:
        while each.outbox.owes:
            each.takes(5)
        assert each.got == each.owed
        assert each.outbox.private_bytes == 0
    trim()
    assert len(log.data) == 0


def test_a_line_is_encoded_once_for_each_format_that_anyone_listens_to(room, monkeypatch):
    mike, ann, _bob = map(room.join, ["mike", "ann", "bob"])
    encoded, encode = [], TelnetWire.encode
    for wire in (TelnetWire, WebWire):
        note = staticmethod(lambda text, wire=wire: encoded.append((wire, text)) or encode(text))
        monkeypatch.setattr(wire, "encode", note)
    mike.types("hello")
    assert ann.reads() == "<mike> hello\n"
    assert encoded == [(TelnetWire, "<mike> hello\n")]


def test_all_that_is_new_is_sent_to_each_listener_at_once_and_a_quiet_wheel_stands_still(worlds):
    world = worlds()
    talker, *_ = [world.joins(f"p{n}", [TelnetWire, WebWire][n % 2]) for n in range(10)]
    world.waits(3.0)
    talker.types("one", "two", "three")
    before, turns = world.work, world.turns
    world.waits()
    # One call reads them, three handle them, nine send them; the rest is what tells the selector.
    assert world.work - before <= 1 + 3 + 9 + 2
    assert world.turns - turns <= 2


def test_a_line_leaves_at_once(our_end):
    assert our_end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_people_with_telnet_and_with_a_browser_talk_in_one_room(worlds):
    world = worlds()
    mike, ann = world.joins("mike"), world.joins("ann", WebWire)
    world.waits()
    ann.reads()
    mike.types("hi ann!")
    world.waits()
    ann.types("hi mike!", "/me waves", "/who", "/msg mike psst", "/quit")
    world.waits()
    assert ann.reads() == "<mike> hi ann!\n* 2 here: ann, mike\n[you -> mike] psst\n"
    assert mike.reads().endswith(
        "<ann> hi mike!\n** ann waves\n[ann -> you] psst\n* ann has quit the chat\n"
    )


OPENING_SCREEN = r"""
   ____      _       _____     ____   _   _      _       _____   
U | __")uU  /"\  u  |_ " _| U /"___| |'| |'| U  /"\  u  |_ " _|  
 \|  _ \/ \/ _ \/     | |   \| | u  /| |_| |\ \/ _ \/     | |    
  | |_) | / ___ \    /| |\   | |/__ U|  _  |u / ___ \    /| |\   
  |____/ /_/   \_\  u |_|U    \____| |_| |_| /_/   \_\  u |_|U   
 _|| \\_  \\    >>  _// \\_  _// \\  //   \\  \\    >>  _// \\_  
(__) (__)(__)  (__)(__) (__)(__)(__)(_") ("_)(__)  (__)(__) (__)

Welcome to BATCHAT local reviews and chat!

Please enter your name, and press enter: """[1:]


def test_a_session_comes_out_byte_for_byte():
    with Server() as server:
        jonny, stopfarm = server.join("jonny"), server.join("JStopfarm")
        jonny.reads("* JStopfarm has joined the chat\n")
        mike = server.call()
        mike.reads(OPENING_SCREEN)
        mike.types("mike")
        mike.reads("Hey, mike! Hope you enjoy the chat.\n\n")
        for other in (jonny, stopfarm):
            other.reads("* mike has joined the chat\n")
        for speaker, name, listener, line in [
            (mike, "mike", jonny, "hey everyone!"),
            (jonny, "jonny", mike, "hi mike!"),
            (mike, "mike", jonny, "screw you jonny you dumb loser get THE HELL OUT OF HERE"),
            (jonny, "jonny", mike, "sorry"),
        ]:
            speaker.types(line)
            for each in (listener, stopfarm):
                each.reads(f"<{name}> {line}\n")
        jonny.types("/quit")
        jonny.sees_the_end()
        mike.reads("* jonny has quit the chat\n")
        stopfarm.types("mike is that you?")
        mike.reads("<JStopfarm> mike is that you?\n")
        mike.types("/quit")
        mike.sees_the_end()


has_telnet = pytest.mark.skipif(not shutil.which("telnet"), reason="telnet is not installed")


@has_telnet
@pytest.mark.parametrize("leave", ["/quit\n", "Мама, у\x03", "Мама, у\x04\x04"])
@pytest.mark.parametrize("text", ["hey everyone!", "Привет, у меня"])
def test_a_session_with_the_real_telnet_in_which_no_key_freezes_anything(text, leave):
    with Server() as server, Terminal(server.port) as mike:
        mike.shows(OPENING_SCREEN)
        mike.types("mike\n")
        mike.shows("Hey, mike! Hope you enjoy the chat.\n\n")
        jonny = server.join("jonny")
        mike.shows("* jonny has joined the chat\n")
        mike.types("\x1a")  # Ctrl-Z: telnet shows nothing until its timing mark comes back
        mike.types(f"{text}\n")
        jonny.reads(f"<mike> {text}\n")
        jonny.types("hi mike!")
        mike.shows("<jonny> hi mike!\n")
        mike.types(leave)
        mike.shows("Connection closed by foreign host.")
        jonny.reads("* mike has quit the chat\n")


# Some hold bytes that are a key of telnet's, less their eighth bit; the most hold Ctrl-C.
NAMES_IN_MANY_ALPHABETS = [
    *("Мария", "Захар", "Ünal", "Åsa", "Łukasz", "Ευαγγελία", "Արամ", "محمد", "שרה", "अमित", "ธนา"),
    *("カナ", "さくら", "王小明", "지우", "남녀"),
]
TEXTS_IN_MANY_ALPHABETS = [
    *("Привет, у меня", "Мама мыла раму", "Ünal war hier", "Γεια σου, κόσμε", "ქართული ენა"),
    *(
        "مرحبا يا عالم",
        "שמי רות",
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
        "カタカナ、ッ",
        "你好，世界",
        "안녕하세요 ㅋㅋ",
    ),
    *"ЃЄЅЈЏДЕКМ",  # D0, and every key: 83, 84, 85, 88, 8F, 94, 95, 9A, 9C
]


@has_telnet
@pytest.mark.parametrize("name", NAMES_IN_MANY_ALPHABETS)
def test_in_the_real_telnet_people_give_their_name_in_their_own_alphabet(name):
    with Server("--no-web") as server, Terminal(server.port) as guest:
        guest.shows(batchat.PROMPT)
        guest.types(f"{name}\n")
        guest.shows(hey(name))


@has_telnet
@pytest.mark.parametrize("options", [[], ["-E"], ["-8"], ["-L"]], ids=str)
def test_in_the_real_telnet_the_first_line_comes_out_as_it_was_typed(options):
    with Server("--no-web", "--rate", "0") as server:
        ann = server.join("ann")
        for text in TEXTS_IN_MANY_ALPHABETS:
            with Terminal(server.port, *options) as mike:
                mike.shows(batchat.PROMPT)
                mike.types("mike\n")
                ann.reads("* mike has joined the chat\n")
                mike.types(f"{text}\n/quit\n")
                ann.reads(f"<mike> {text}\n* mike has quit the chat\n")
                mike.shows("Connection closed by foreign host.")


@has_telnet
def test_in_binary_every_letter_may_be_typed_and_each_line_begins_at_the_start_of_its_row():
    with Server("--no-web") as server, Terminal(server.port, "-8") as mike:
        mike.shows(batchat.PROMPT)
        mike.types("Мария\n")
        mike.shows(hey("Мария"))
        jonny = server.join("jonny")
        mike.shows("* jonny has joined the chat\n")
        for text in ["Наташа ” Ý 이", "公太郎 者 ✅"]:  # with the escape key, and with Ctrl-E
            mike.types(f"{text}\n")
            jonny.reads(f"<Мария> {text}\n")
            jonny.types("hi!")
            mike.shows("\r<jonny> hi!\n")  # Enter alone would go straight down


@has_telnet
def test_ctrl_c_in_the_middle_of_a_long_paste_into_the_real_telnet_leaves_at_once():
    with Server() as server, Terminal(server.port) as mike:
        mike.shows(batchat.PROMPT)
        mike.types("mike\n")
        mike.shows(hey("mike"))
        jonny = server.join("jonny")
        for n in range(600):
            mike.types(f"line {n}\n")
            mike.shows(f"line {n}\n")
        mike.types("\x03")
        mike.shows("Connection closed by foreign host.")  # before all could have been said
        jonny.types("/quit")
        assert jonny.rest().count("<mike>") < 200


# --------------------------------------------------------------------------
# What people type
# --------------------------------------------------------------------------


def test_nobody_hears_anything_before_they_have_a_name(room):
    mike, caller = room.join("mike"), room.caller()
    mike.types("psst")
    assert caller.reads() == ""
    caller.types("ann")
    assert caller.reads() == "Hey, ann! Hope you enjoy the chat.\n\n"
    assert mike.reads() == "* ann has joined the chat\n"


@pytest.mark.parametrize(
    ("line", "others", "own"),
    [
        *[("hello", "<mike> hello\n", ""), ("  a  b ", "<mike>   a  b \n", "")],
        *[("", "", ""), (" \t ", "", ""), ("//quit", "<mike> /quit\n", "")],
        *[("/me waves", "** mike waves\n", ""), ("/ME  waves ", "** mike waves\n", "")],
        *[("/who", "", "* 3 here: ann, Bob, mike\n"), ("/help", "", batchat.help_for(False))],
        ("/msg MIKE note", "", "[mike -> you] note\n[you -> mike] note\n"),
        ("/nick mick", "* mike is now known as mick\n", "* mike is now known as mick\n"),
        ("/nick MIKE", "* mike is now known as MIKE\n", "* mike is now known as MIKE\n"),
        ("/ignore BOB", "", "* You no longer hear Bob.\n"),
        *[(leave, "* mike has quit the chat\n", "") for leave in ("/quit", LEAVE)],
    ],
)
def test_a_line_shows_everyone_else_and_its_sender_what_it_should(room, line, others, own):
    mike, ann, bob = map(room.join, ["mike", "ann", "Bob"])
    mike.types(line)
    assert (ann.reads(), bob.reads(), mike.reads()) == (others, others, own)
    assert (mike.state is batchat.State.CLOSING) == (line in ("/quit", LEAVE))


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        ("There is no command /frobnicate; /help shows those there are.", ["/frobnicate now"]),
        ("There is no command /; /help shows those there are.", ["/ /"]),
        ("It goes like this: /me ACTION", ["/me"]),
        ("It goes like this: /msg NAME TEXT", ["/msg", "/msg mike"]),
        ("It goes like this: /nick NAME", ["/nick"]),
        ("It goes like this: /ignore NAME", ["/ignore"]),
        ("Nobody here is called nobody.", ["/msg nobody hi", "/ignore nobody"]),
        ("You can't ignore yourself.", ["/ignore mike"]),
        ("You are mike already.", ["/nick mike"]),
        *[(f"The name {name} is taken.", [f"/nick {name}"]) for name in ("ANN", "you", "BatChat")],
        ("A name is made of letters, digits, '_', '-' and '.' alone.", ["/nick two words"]),
        ("A line has at most 4096 bytes; yours was not sent.", [TOO_LONG]),
    ],
)
def test_what_can_not_be_done_is_explained_to_its_sender_alone(room, answer, lines):
    mike, ann = room.join("mike"), room.join("ann")
    mike.types(*lines)
    assert (mike.reads(), ann.reads()) == (f"* {answer}\n" * len(lines), "")
    assert (mike.state, mike.name) == (batchat.State.CHATTING, "mike")


@pytest.mark.parametrize("line", ["/exit", "/bye", "/q", "/Quit"])
def test_whoever_wants_to_leave_does_so_by_any_of_its_names_inside_and_at_the_prompt(room, line):
    ann, mike, caller = room.join("ann"), room.join("mike"), room.caller()
    mike.types(line)
    assert ann.reads() == "* mike has quit the chat\n"
    caller.types(line)
    assert caller.state is batchat.CLOSING


@pytest.mark.parametrize("line", ["/names", "/list"])
def test_who_is_here_is_told_under_other_names_too(room, line):
    ann = room.join("ann")
    ann.types(line)
    assert ann.reads() == "* 1 here: ann\n"


@pytest.mark.parametrize("line", ["help", "?"])
def test_who_says_help_is_told_once_of_the_command(room, line):
    ann, mike = room.join("ann"), room.join("mike")
    mike.types(line, line)
    assert mike.reads() == "* /help shows what you can type.\n"
    assert ann.reads() == f"<mike> {line}\n" * 2


def test_help_names_every_command():
    for command in ["/help", "/who", "/me", "/msg", "/nick", "/ignore", "/quit", "//"]:
        assert f"* {command} " in batchat.help_for(False)


def test_what_is_for_one_alone_stands_in_its_right_place_among_what_all_hear(room):
    mike, ann, bob = map(room.join, ["mike", "ann", "bob"])
    ann.types("one")
    mike.types("own", "/who", "/msg ANN  over  here", "/me too", "/nick mick")
    ann.types("two")
    assert mike.reads() == (
        "<ann> one\n* 3 here: ann, bob, mike\n[you -> ann] over  here\n"
        "* mike is now known as mick\n<ann> two\n"
    )
    assert ann.reads() == (
        "<mike> own\n[mike -> you] over  here\n** mike too\n* mike is now known as mick\n"
    )
    assert bob.reads() == (
        "<ann> one\n<mike> own\n** mike too\n* mike is now known as mick\n<ann> two\n"
    )


def test_a_new_name_frees_the_old_one_and_so_does_leaving(room):
    mike, ann = room.join("mike"), room.join("ann")
    mike.types("/nick mick")
    ann.types("/nick mike")
    assert ann.reads() == "* mike is now known as mick\n* ann is now known as mike\n"
    mike.types("/quit")
    room.join("mick")


def test_who_is_ignored_is_not_heard_and_not_told_and_stays_so_through_a_new_name(room):
    mike, troll, ann = map(room.join, ["mike", "troll", "ann"])
    mike.types("/ignore troll")
    assert mike.reads() == "* You no longer hear troll.\n"
    troll.types("/nick gnome")  # which mike does not read
    for each in room.guests:
        assert each.reads() == ("" if each is mike else "* troll is now known as gnome\n")
    troll.types("hey", "/me dances", "/msg mike psst")
    ann.types("hello")
    assert mike.reads() == "<ann> hello\n"
    assert troll.reads() == "[you -> mike] psst\n<ann> hello\n"
    assert ann.reads() == "<gnome> hey\n** gnome dances\n"
    mike.types("/ignore gnome")
    troll.types("hey")
    assert mike.reads() == "* You hear gnome again.\n<gnome> hey\n"


@pytest.mark.parametrize("leaver", ["mike", "troll"])
def test_ignoring_ends_when_either_leaves(room, leaver):
    people = {name: room.join(name) for name in ("mike", "troll")}
    people["mike"].types("/ignore troll")
    people[leaver].types("/quit")
    people[leaver] = room.join(leaver)
    people["mike"].reads()
    people["troll"].types("sorry")
    assert people["mike"].reads() == "<troll> sorry\n"


# Names

GOOD_NAMES = ["mike", "J-Stop_farm.2", "x" * 24, "\u00c9lo\u00efse", "\u674e\u96f7"]
GOOD_NAMES += ["\u0939\u093f\u0902\u0926\u0940"]
BAD_NAMES = ["", "   ", "x" * 25, "two words", "<mike>", "* mike", "mike!", "a,b", "/help"]
BAD_NAMES += ["mike\u200b", "mi\ufe0fke", "\u3164", "\u0301mike", "\U0001f600"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_good_name_is_taken_as_it_is(room, name):
    assert room.join(name).name == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_with_the_reason_and_the_prompt_again(room, name):
    caller = room.caller()
    caller.types(name)
    assert re.fullmatch(f"\\* A name .*\n{batchat.PROMPT}", caller.reads())
    caller.types("mike")
    assert caller.state is batchat.State.CHATTING


@pytest.mark.parametrize("name", ["bob", "BOB", "\uff42\uff4f\uff42"])
def test_a_taken_name_is_refused_in_whatever_spelling(room, name):
    room.join("Bob")
    caller = room.caller()
    caller.types(name)
    assert caller.reads() == f"* The name {name} is taken.\n{batchat.PROMPT}"


LETTERS = st.characters(categories=["L", "M", "Nd"]) | st.sampled_from("_-.")


@given(st.text(LETTERS, min_size=1, max_size=12))
def test_two_spellings_of_one_name_are_one_name(name):
    key = batchat.name_key(name)
    for form in ["NFC", "NFD", "NFKC", "NFKD"]:
        assert batchat.name_key(unicodedata.normalize(form, name)) == key
    assert batchat.name_key(key) == key


def test_a_name_of_24_characters_may_be_typed_in_its_longest_spelling(room):
    longest = unicodedata.normalize("NFD", "\u1f82" * 24)
    assert len(longest) == batchat.SPELLING_LIMIT
    assert room.join(longest).name == "\u1f82" * 24


# --------------------------------------------------------------------------
# What was said before
# --------------------------------------------------------------------------


@pytest.fixture
def wall(monkeypatch) -> list[str]:
    """What the clock on the wall shows, as its last item."""
    shown = ["2026-11-24 13:58"]
    monkeypatch.setattr(batchat, "local_time", lambda: shown[-1])
    return shown


def test_a_newcomer_reads_the_last_lines_that_were_said_to_all_and_then_what_is_new(wall):
    room = Room(history=3)
    ann, bob = room.join("ann"), room.join("bob")
    ann.types("too long ago", "hi")
    wall.append("2026-11-24 14:03")
    bob.types("/me waves", "/msg ann psst", "/nick rob", "/nope")
    ann.types("//slash")
    mike = room.caller()
    mike.types("mike")
    ann.types("hello mike")
    assert mike.reads() == (
        "Hey, mike! Hope you enjoy the chat.\n\n"
        "* Said before you came, since 2026-11-24 13:58:\n"
        "13:58 <ann> hi\n14:03 ** bob waves\n14:03 <ann> /slash\n"
        "* That was before you came.\n"
        "<ann> hello mike\n"
    )


def test_where_nothing_was_said_or_kept_a_newcomer_reads_of_no_history():
    for room in (Room(history=3), Room()):
        ann = room.join("ann")
        if not room.chat.settings.history:
            ann.types("hi")
        mike = room.caller()
        mike.types("mike")
        assert mike.reads() == hey("mike")


def test_what_is_kept_of_what_was_said_is_bounded_in_bytes_for_each_format_of_its_own():
    room = Room(history=1000)
    ann = room.join("ann")
    ann.types(*[f"{n} {LONG}" for n in range(100)])
    for wire in (TelnetWire, WebWire):
        shown = room.chat.logs[wire].history.shown()
        assert batchat.HISTORY_SIZE - 5000 < len(shown) < batchat.HISTORY_SIZE + 200
    assert b"<ann> 99 " in shown


def test_what_was_said_is_encoded_once_however_many_come_in(monkeypatch):
    room = Room(history=1000)
    ann = room.join("ann")
    ann.types(*["hi"] * 500)
    encode = mock.Mock(side_effect=TelnetWire.encode)
    monkeypatch.setattr(TelnetWire, "encode", encode)
    room.join("mike")
    assert encode.call_count < 20


def test_newcomers_share_what_they_read_of_it_and_no_turn_makes_it_anew_for_many(worlds):
    for talkative in (False, True):
        world = worlds(history=1000)
        ann = world.joins("ann")
        world.waits()
        ann.types(*[LONG] * 16)
        world.waits()
        crowd = [world.joins(f"p{n}") for n in range(100)]
        for each in crowd:
            each.far.reads(0)
        world.waits(0.0)
        if talkative:
            for each in crowd:
                each.types("hi")
        world.waits(0.1)
        assert len(names(world)) == 101
        inserts = {insert for each in crowd for _, _, insert in each.connection.outbox.splices}
        assert sum(map(len, inserts)) < batchat.HISTORY_SIZE + 100 * 1000


# --------------------------------------------------------------------------
# Who keeps order
# --------------------------------------------------------------------------


def operator(room: Room, name: str = "ann", host: str = "") -> Guest:
    guest = room.join(name, host)
    guest.types(f"/op {SESAME}")
    assert guest.reads() == "* You are an operator now; /help shows what that is.\n"
    return guest


@pytest.mark.parametrize("line", ["/op x", "/kick mike", "/ban mike", "/bans", "/unban 1.2.3.4"])
def test_without_a_password_there_are_no_operators_commands(room, line):
    ann, mike = room.join("ann"), room.join("mike")
    ann.types(line)
    command = line.split()[0]
    assert ann.reads() == f"* There is no command {command}; /help shows those there are.\n"
    assert mike.reads() == ""


def test_to_who_is_no_operator_there_are_no_operators_commands():
    room = Room(password=SESAME)
    mike, ann = room.join("mike"), operator(room)
    for each in batchat.COMMANDS:
        if each in ("/kick", "/ban", "/bans", "/unban"):
            mike.types(f"{each} ann")
            assert mike.reads() == f"* There is no command {each}; /help shows those there are.\n"
    mike.types("/help")
    assert not re.search("/op|kick|ban", mike.reads())
    ann.types("/help")
    shown = ann.reads()
    assert all(f"* {command}" in shown for command in batchat.COMMANDS)
    assert (
        len(
            {
                line.index(does)
                for line, (_, does, _) in zip(shown.splitlines(), batchat.COMMANDS.values())
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    "line", ["\ufeff/op sesame", "/op sesame", " /op sesame", "/OP sesame", "\t/Op  sesame "]
)
def test_a_password_is_never_said_however_it_is_typed(line):
    for password in (SESAME, ""):
        room = Room(history=9, password=password)
        ann, mike = room.join("ann"), room.join("mike")
        ann.types(line, line.replace("sesame", "wrong"))
        assert mike.reads() == ""
        eve = room.caller()
        eve.types("eve")
        assert eve.reads() == hey("eve")
        assert ("operator now" in ann.reads()) == bool(password)


def test_the_third_wrong_password_ends_the_connection():
    room = Room(password=SESAME)
    mike, ann = room.join("mike"), room.join("ann")
    mike.types("/op", "/op Sesame", "/op sesam", "/op sesame2")
    wrong = "* That is not the password.\n"
    assert mike.reads() == "* It goes like this: /op PASSWORD\n" + wrong * 3 + batchat.GOODBYE
    assert ann.reads() == "* mike has quit the chat\n"


def test_operators_are_marked_until_they_leave():
    room = Room(password=SESAME)
    ann, mike = operator(room), room.join("mike")
    mike.types("/who")
    assert mike.reads() == "* 2 here: @ann, mike\n"
    ann.types("/quit")
    room.join("ann").types("/who")
    assert "@" not in mike.reads()


def test_who_is_thrown_out_is_told_by_whom_and_why_and_so_are_the_others():
    room = Room(password=SESAME)
    ann, mike, eve, bob = operator(room), room.join("mike"), room.join("eve"), room.join("bob")
    ann.types("/kick MIKE no spam, please", "/kick eve")
    assert mike.reads() == "* You were thrown out by ann: no spam, please\n"
    assert eve.reads().endswith("* You were thrown out by ann\n")
    others = "* mike was thrown out by ann: no spam, please\n* eve was thrown out by ann\n"
    assert ann.reads() == bob.reads() == others
    ann.types("/kick ann", "/kick nobody")
    assert ann.reads() == (
        "* You can't throw out yourself; /quit leaves.\n* Nobody here is called nobody.\n"
    )


def test_what_somebody_had_sent_when_they_are_thrown_out_is_thrown_away(worlds):
    world = worlds(rate=10, password=SESAME)
    ann, mike = world.joins("ann"), world.joins("mike")
    mike.types(*["spam"] * 200)
    world.waits()
    ann.types(f"/op {SESAME}", "/kick mike")
    world.waits()
    assert ann.reads().endswith("* mike was thrown out by ann\n")
    ann.types("/who")
    world.waits(60.0)
    assert ann.reads() == "* 1 here: @ann\n"


def test_from_a_banned_address_nobody_comes_in_until_its_time_is_over(worlds):
    world = worlds(password=SESAME)
    ann = world.joins("ann")
    mike, eve = [world.joins(name, host="2001:db8::7") for name in ("mike", "eve")]
    world.waits()
    ann.types(f"/op {SESAME}", "/ban mike 5")
    world.waits()
    assert mike.reads().endswith("* You were thrown out by ann: banned for 5 min\n")
    assert eve.reads().endswith("* mike was thrown out by ann: banned for 5 min\n")
    assert ann.reads().endswith(
        "* 2001:db8::/64 is banned for 5 min; from there are still here: 1.\n"
    )
    world.waits(61.0)
    again = world.joins("mike", host="2001:db8::8")
    in_a_browser = world.calls(WebWire, host="2001:db8::9")
    world.waits()
    banned = "* Nobody may come in from your address for another 4 min.\n"
    assert again.reads() == banned
    head, _, body = bytes(in_a_browser.far.got).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden")
    assert body.decode() == banned
    world.waits(240.0)
    world.joins("mike", host="2001:db8::8")
    world.waits()
    assert names(world) == ["ann", "eve", "mike"]


def test_who_was_at_the_prompt_when_their_address_was_banned_does_not_come_in_either():
    room = Room(password=SESAME)
    ann, waiting = operator(room), room.caller("203.0.113.5")
    room.join("mike", "203.0.113.5")
    ann.types("/ban mike 5", "/ban nobody")
    waiting.types("troll")
    assert waiting.reads() == "* Nobody may come in from your address for another 5 min.\n"
    assert waiting.state is batchat.CLOSING


def test_a_shorter_ban_does_not_shorten_a_longer_one():
    room = Room(password=SESAME)
    ann = operator(room)
    people = [room.join(name, "203.0.113.5") for name in ("mike", "eve")]
    ann.types("/ban mike 500", "/ban eve 5", "/bans")
    assert ann.reads().endswith("* 203.0.113.5 is banned for another 500 min, by ann.\n")
    assert all(each.state is batchat.CLOSING for each in people)


def test_what_a_banned_person_said_goes_out_of_the_history():
    room = Room(password=SESAME, history=9)
    ann, mike = operator(room), room.join("mike", "203.0.113.5")
    ann.types("hi")
    mike.types("buy my stuff")
    ann.types("/ban mike")
    eve = room.caller()
    eve.types("eve")
    shown = eve.reads()
    assert "<ann> hi\n" in shown
    assert "stuff" not in shown


def test_bans_are_listed_with_the_minutes_left_and_taken_back():
    room = Room(password=SESAME)
    ann = operator(room)
    for n, name in enumerate(["mike", "eve"]):
        room.join(name, f"203.0.113.{n}")
        ann.types(f"/ban {name}")
    ann.reads()
    room.now += 60
    ann.types("/bans", "/unban 203.0.113.0", "/unban 203.0.113.0", "/unban nonsense", "/bans")
    assert ann.reads() == (
        "* 203.0.113.0 is banned for another 59 min, by ann.\n"
        "* 203.0.113.1 is banned for another 59 min, by ann.\n"
        "* 203.0.113.0 is no longer banned.\n"
        "* 203.0.113.0 is not banned.\n* nonsense is not banned.\n"
        "* 203.0.113.1 is banned for another 59 min, by ann.\n"
    )
    room.now += 3600
    ann.types("/bans")
    assert ann.reads() == "* No address is banned.\n"


@pytest.mark.parametrize("minutes", ["0", "-1", "525601", "soon", "9" * 5000])
def test_a_ban_takes_a_number_of_minutes(minutes):
    room = Room(password=SESAME)
    ann, mike = operator(room), room.join("mike", "203.0.113.5")
    ann.reads()
    ann.types(f"/ban mike {minutes}")
    assert ann.reads() == "* A ban takes from 1 to 525600 minutes.\n"
    assert mike.state is batchat.CHATTING


def test_who_calls_from_this_very_box_is_thrown_out_alone_and_the_operator_is_told_why():
    room = Room(password=SESAME)
    ann, mike = operator(room), room.join("mike")
    ann.reads()
    ann.types("/ban mike")
    assert mike.reads() == "* You were thrown out by ann\n"
    assert ann.reads() == (
        "* mike was thrown out by ann\n* mike is out, but called from this very box: no ban keeps them out.\n"
    )


def test_there_are_at_most_a_thousand_bans():
    room = Room(password=SESAME)
    ann = operator(room)
    for n in range(1001):
        room.join(f"t{n}", f"10.0.{n // 256}.{n % 256}")
        ann.types(f"/ban t{n}")
        room.guests = [ann]
    assert ann.reads().endswith("* There are 1000 bans already; /unban ends one.\n")
    ann.types("/unban 10.0.0.0", "/ban t1000")
    assert "10.0.3.232 is banned" in ann.reads()


def test_a_ban_is_kept_with_what_is_kept_of_an_address_until_it_is_over(worlds):
    world = worlds(rate=10, password=SESAME)
    ann, mike = world.joins("ann"), world.joins("mike", host="203.0.113.5")
    world.waits()
    ann.types(f"/op {SESAME}", "/ban mike 2")
    mike.far.ended = True
    world.waits(100.0)
    assert [*world.reactor.chat.addresses] == ["203.0.113.5"]
    world.waits(30.0)
    assert not world.reactor.chat.addresses


@pytest.fixture
def password_file(tmp_path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{SESAME} \nanother line\n")
    path.chmod(0o600)
    return path


def test_the_log_says_who_became_an_operator_and_who_did_what_to_whom_but_no_password(
    password_file,
):
    with Server("--password-file", str(password_file)) as server:
        ann, mike, eve = [server.join(name) for name in ("ann", "mike", "eve")]
        mike.types("/op guess", f" /op {SESAME}x")
        ann.types(f"/op {SESAME}", "/kick mike secrets", "/ban eve")
        for each in (mike, eve):
            each.rest()
        server.process.terminate()
        _, log = server.ends()
    assert "password" not in log.replace("gave a wrong password", "")
    assert not re.search(f"{SESAME}|guess|secrets", log)
    for said in [
        *("mike gave a wrong password (127.0.0.1 port ", "ann is an operator (127.0.0.1 port "),
        *("mike left: thrown out by ann, 127.0.0.1 port ", "eve left: thrown out by ann, "),
    ]:
        assert said in log


def test_a_password_file_that_everybody_can_read_is_warned_of(password_file):
    password_file.chmod(0o644)
    with Server("--password-file", str(password_file)) as server:
        server.process.terminate()
        assert f"everybody on this box can read {password_file}\n" in server.ends()[1]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "its first line is empty"),
        (b" \nsesame\n", "its first line is empty"),
        (b"caf\xe9\n", "that is no UTF-8"),
        (b"\xef\xbb\xbf\n", "its first line is empty"),
    ],
)
def test_a_bad_password_file_is_one_clear_line_and_status_1(tmp_path, content, why):
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    ended = run("--port", "0", "--no-web", "--password-file", str(path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"batchat: no password in {path}: {why}\n"


# Behind a proxy


def test_behind_a_proxy_a_browser_is_who_the_last_address_forwarded_for_says(worlds):
    world = worlds(rate=10, per_address=2, password=SESAME, behind_proxy=True)
    world.joins("ann")
    callers = []
    for n, addresses in enumerate(
        [
            "203.0.113.5",
            "198.51.100.1, 203.0.113.5",
            "203.0.113.5",
            "2001:db8::1",
            None,
            "127.0.0.1",
        ]
    ):
        callers.append(world.calls(WebWire, opens=False))
        callers[-1].far.type(forwarded(addresses) + masked(1, f"p{n}".encode()))
        world.waits()
    assert names(world) == ["ann", "p0", "p1", "p3", "p4", "p5"]
    assert callers[2].far.got.startswith(b"HTTP/1.1 503 ")
    assert {name: each.connections for name, each in world.reactor.chat.addresses.items()} == {
        "203.0.113.5": 3,
        "2001:db8::/64": 1,
    }
    assert callers[0].connection.origin == "203.0.113.5 by way of 127.0.0.1 port 4321"


def test_behind_a_proxy_who_is_banned_reads_403_and_the_others_come_in(worlds):
    world = worlds(password=SESAME, behind_proxy=True)
    ann, troll = world.joins("ann"), world.calls(WebWire, opens=False)
    troll.far.type(forwarded("203.0.113.5") + masked(1, b"troll"))
    world.waits()
    ann.types(f"/op {SESAME}", "/ban troll")
    world.waits()
    for address, status in [("203.0.113.5", b"403 "), ("203.0.113.6", b"200 ")]:
        caller = world.calls(WebWire, opens=False)
        caller.far.type(forwarded(address, "GET / HTTP/1.1"))
        world.waits()
        assert caller.far.got.startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    "addresses", ["", "fe80::1%x", "unknown", "203.0.113.5, nonsense", "203.0.113.5,"]
)
def test_behind_a_proxy_what_is_no_address_gets_400(worlds, addresses):
    world = worlds(behind_proxy=True)
    caller = world.calls(WebWire, opens=False)
    caller.far.type(forwarded(addresses))
    world.waits()
    assert caller.far.got.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("host", "behind_proxy"), [("127.0.0.1", False), ("203.0.113.7", False), ("203.0.113.7", True)]
)
def test_without_the_option_or_from_another_box_that_header_has_no_say(worlds, host, behind_proxy):
    world = worlds(per_address=9, behind_proxy=behind_proxy)
    caller = world.calls(WebWire, host=host, opens=False)
    caller.far.type(forwarded("203.0.113.5") + masked(1, b"mike"))
    world.waits()
    assert caller.connection.origin == f"{host} port 4321"
    assert "203.0.113.5" not in world.reactor.chat.addresses


# --------------------------------------------------------------------------
# Options
# --------------------------------------------------------------------------


def test_welcome_stands_in_the_place_of_ours_and_is_cleaned():
    with Server("--no-web", "--welcome", "Hello\x1b[2J at\tmine") as server:
        line = server.call()
        line.reads(batchat.GREETING.format("Hello at mine"))


def test_it_listens_on_every_address_and_says_so():
    if not socket.has_dualstack_ipv6():
        pytest.skip("this box has no IPv6")
    with Server() as server:
        assert "every address of this box (IPv4 and IPv6)" in server.opening_line
        assert f"telnet localhost {server.port}" in server.opening_line
        mike, jonny = server.join("mike"), server.join("jonny", host="::1")
        jonny.types("hi mike!")
        mike.reads("* jonny has joined the chat\n<jonny> hi mike!\n")
        server.process.terminate()
        for each in (mike, jonny):
            each.rest()
        _, log = server.ends()
    assert "mike joined from 127.0.0.1 port" in log
    assert "jonny joined from ::1 port" in log


def test_the_opening_lines_fit_on_80_columns():
    with Server("--web-port", "0") as server:
        lines = [*server.opening_line.splitlines(), server.process.stdout.readline().rstrip()]
    assert len(lines) == 3
    assert all(len(line) <= 80 for line in lines[:2])
    assert lines[2] == f"From another box: {socket.gethostname()} in the place of localhost."


def test_it_listens_on_one_address_alone_when_told_to():
    with Server("--host", "127.0.0.1") as server:
        assert f"Join it: telnet 127.0.0.1 {server.port}" in server.opening_line
        server.join("mike")
        with pytest.raises(ConnectionRefusedError):
            server.call("127.0.0.2")


def test_the_page_and_the_websocket_are_on_a_second_port_that_the_opening_line_names():
    with Server("--web-port", "0") as server:
        mike = server.join("mike")
        for path, wanted in [("/", batchat.PAGE), ("/hello", "Hello, World!")]:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.web_port}{path}") as reply:
                assert reply.read().decode() == wanted
        with socket.create_connection(("127.0.0.1", server.web_port), timeout=PATIENCE) as ann:
            ann.sendall(OPENING + masked(1, b"ann"))
            mike.reads("* ann has joined the chat\n")
        mike.reads("* ann has quit the chat\n")


def test_where_the_web_port_is_taken_a_free_one_does_unless_that_very_one_was_asked_for():
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it is taken already
            stack.enter_context(socket.create_server(("127.0.0.1", batchat.WEB_PORT)))
        server = stack.enter_context(Server("--host", "127.0.0.1"))
        assert server.web_port not in (0, batchat.WEB_PORT)
        for options in [f"--port 0 --web-port {server.web_port}", f"--port {server.port}"]:
            done = run("--host", "127.0.0.1", *options.split())
            assert (done.returncode, done.stdout) == (1, "")
            assert re.fullmatch(r"batchat: .*port \d+: Address already in use\n", done.stderr)


def test_no_web_opens_no_door_for_browsers():
    with Server("--no-web") as server:
        assert "http" not in server.opening_line
        server.join("mike")


@pytest.mark.parametrize("host", ["256.1.1.1", "not a host", "192.0.2.1", "x" * 70])
def test_a_bad_address_is_one_clear_line_and_status_1(host):
    done = run("--host", host, "--port", "0")
    assert done.returncode == 1
    assert re.fullmatch(r"batchat: can't listen on .*\n", done.stderr)


@pytest.mark.parametrize(
    "options", ["--port 65536", "--port x", "--rate -1", "--max-people -5", "--nonsense", "x"]
)
def test_a_bad_option_is_explained_with_status_2(options):
    done = run(*options.split())
    assert done.returncode == 2
    assert done.stderr.startswith("usage: batchat.py")
    assert "Traceback" not in done.stderr


def test_help_names_every_option_and_version_the_version():
    shown = run("--help").stdout
    options = "--host --port --web-port --no-web --rate --max-people --max-per-address"
    for option in [*options.split(), "-v", "--verbose", "--version", "--help"]:
        assert option in shown
    assert run("--version").stdout == f"BATCHAT {batchat.__version__}\n"


def test_it_is_a_single_file_that_runs_wherever_it_is_copied(tmp_path):
    command = [sys.executable, "-I", shutil.copy(BATCHAT, tmp_path), "--version"]
    assert subprocess.check_output(command, text=True, cwd=tmp_path).startswith("BATCHAT ")


# The log


def test_the_log_says_who_joined_and_left_from_where_and_why_and_never_what_they_say():
    with Server("-v") as server:
        mike, ann, caller = server.join("mike"), server.join("ann"), server.call()
        caller.types("/quit")
        caller.rest()
        mike.types("secret", "/msg ann secret", "/me secret", "/secret", "/nick mick", "/quit")
        mike.rest()
        server.process.terminate()
        ann.rest()
        _, log = server.ends()
    lines = [re.sub(r"port \d+", "port N", line.split(" ", 2)[2]) for line in log.splitlines()]
    assert lines == [
        "mike joined from 127.0.0.1 port N (1 here)",
        "ann joined from 127.0.0.1 port N (2 here)",
        "127.0.0.1 port N left before joining: quit",
        "mike is now mick (127.0.0.1 port N)",
        "mick left: quit (127.0.0.1 port N, 1 here)",
        "closing",
        "ann left: the room closes (127.0.0.1 port N, 0 here)",
    ]


# --------------------------------------------------------------------------
# Nobody loses a line


class Unread:
    """A place for the log that nobody reads until they are asked to: a pipe, or a terminal."""

    def __init__(self, kind: str) -> None:
        if kind == "pipe":
            self.reader, self.writer = os.pipe()
        else:
            import pty

            self.reader, self.writer = pty.openpty()
            os.write(self.reader, b"\x13")  # Ctrl-S
        self.kind = kind
        self.seen = b""

    def has_room(self) -> bool:
        with selectors.SelectSelector() as selector:
            selector.register(self.writer, selectors.EVENT_WRITE)
            return bool(selector.select(0))

    def read(self) -> bytes:
        """All that was ever written."""
        if self.kind == "terminal":
            os.write(self.reader, b"\x11")  # Ctrl-Q
        os.set_blocking(self.reader, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.seen += os.read(self.reader, 4096)
        return self.seen

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_log_that_nobody_reads_holds_up_nobody_and_what_it_lost_is_counted(kind):
    place = Unread(kind)
    with contextlib.closing(place), Server("--rate", "0", "-v", stderr=place.writer) as server:
        mike = server.join("mike")

        def is_full() -> bool:
            for _ in range(200):
                server.call().sock.close()  # each of whom is logged
            return not place.has_room()

        def is_told() -> bool:
            server.call().sock.close()
            return b" lines of the log were lost" in place.read()

        wait_until(is_full)
        is_full()
        mike.types("/who")
        mike.reads("* 1 here: mike\n")

        wait_until(is_told)
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0


def test_where_the_log_goes_to_the_journal_it_has_no_time_of_its_own(tmp_path):
    with open(tmp_path / "journal", "w+") as journal:
        found = os.fstat(journal.fileno())
        for stream, pattern in [
            (f"{found.st_dev}:{found.st_ino}", r"mike joined from .*"),
            ("1:1", r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d mike joined from .*"),
        ]:
            env = {**os.environ, "JOURNAL_STREAM": stream}
            with Server(stderr=journal, env=env) as server:
                _mike = server.join("mike")
                line = (tmp_path / "journal").read_text().splitlines()[-1]
                assert re.fullmatch(pattern, line)


def test_callers_who_never_joined_leave_no_line_in_the_log_without_v():
    with Server() as server:
        for _ in range(50):
            with server.call().sock as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        _mike = server.join("mike")
        server.process.kill()
        log = server.ends()[1].splitlines()
        assert len(log) == 1
        assert "mike joined" in log[0]


# --------------------------------------------------------------------------


def test_who_closes_after_sending_loses_no_line_and_the_others_hear_it():
    with Server() as server:
        mike, jonny = server.join("mike"), server.call()
        jonny.types("jonny", "one", "two")
        jonny.sock.sendall(b"not ended with Enter")
        jonny.sock.shutdown(socket.SHUT_WR)
        jonny.reads(GREETING + hey("jonny"))
        jonny.sees_the_end()
        mike.reads("* jonny has joined the chat\n<jonny> one\n<jonny> two\n")
        mike.reads("* jonny has quit the chat\n")


def test_what_was_sent_before_a_line_broke_is_still_said(houses):
    house = houses(rate=100)
    mike, jonny = house.calls(b"mike\n"), house.calls(b"jonny\n")
    house.waits()
    jonny.reading = False
    jonny.sock.send(b"".join(b"line %d\n" % n for n in range(5000)))
    mike.sock.send(b"you will never read this\n")
    house.waits()
    jonny.sock.close()  # with a line unread, which makes it a reset
    mike.sock.send(b"nor this\n")  # which can not be sent
    for _ in range(50):  # seconds; the first lines were a burst
        house.waits(1)
    said = "".join(f"<jonny> line {n}\n" for n in range(5000)) + "* jonny has quit the chat\n"
    assert mike.got.endswith(TelnetWire.encode(said))


def test_who_still_sends_when_we_let_them_go_reads_the_last_words_before_a_clean_end():
    with Server() as server:
        caller = server.call()
        caller.types(*["no name"] * 5)
        caller.sock.sendall(b"x" * 3 * batchat.READ_SIZE)
        refused = "* A name is made of letters, digits, '_', '-' and '.' alone.\n"
        caller.reads(GREETING + (refused + batchat.PROMPT) * 4 + refused)
        caller.reads("* That was the last try, goodbye!\n")
        caller.sees_the_end()


def test_a_paste_beyond_the_rate_is_paced_and_arrives_whole_then_the_quit(worlds):
    world = worlds(rate=10)
    ann, mike = world.joins("ann"), world.joins("mike")
    world.waits(60.0)
    ann.reads()
    mike.types(*[f"line {n}" for n in range(2000)])
    mike.far.ended = True
    world.waits()
    assert ann.reads().count("\n") in (49, 50, 51)
    world.waits(1.0)
    assert ann.reads().count("\n") in (9, 10, 11)
    world.waits(200.0)
    assert ann.reads().endswith("<mike> line 1999\n* mike has quit the chat\n")


def test_a_listener_who_reads_on_slowly_beside_ordinary_talk_is_never_dropped(worlds):
    world = worlds(rate=10)
    slow, talkers = stalls(world, "slow"), [world.joins(f"t{n}") for n in range(5)]
    slow.far.reads(0, speed=4000)
    for _ in range(300):
        for each in talkers:
            each.types("x" * 200)
        world.waits(1.0)
    assert "slow" in names(world)
    slow.far.reads(BOUNDLESS)
    world.waits(1.0)
    assert slow.far.got == slow.owed


def test_who_leaves_and_does_not_hang_up_is_cut_off_after_five_seconds_though_they_send_on(worlds):
    world = worlds()
    quiet, loud = world.joins("quiet"), world.joins("loud")
    for each in (quiet, loud):
        each.types("/quit")
    for _ in range(40):
        loud.far.type(b"x" * batchat.READ_SIZE)
        world.waits(0.1)
    assert not quiet.sock.closed
    world.waits(2.1)
    assert quiet.sock.closed
    assert loud.sock.closed


def test_what_somebody_sent_is_said_for_two_minutes_after_they_are_gone_and_blank_lines_are_free(
    worlds,
):
    world = worlds(rate=10)
    ann = world.joins("ann")
    ghost, blank = world.joins("ghost"), world.joins("blank")
    world.waits(0.01)
    ghost.types(*["boo"] * 10_000)
    blank.types(*[""] * 10_000)
    world.waits(0.01)
    for each in (ghost, blank):
        each.far.break_down(errno.ECONNRESET)
    world.waits(30.0)
    assert names(world) == ["ann", "ghost"]
    world.waits(92.0)
    assert names(world) == ["ann"]
    assert 1200 < ann.reads().count("boo") < 1300


# --------------------------------------------------------------------------
# Nobody drowns out the others
# --------------------------------------------------------------------------


def test_what_an_address_makes_all_read_is_bounded_come_and_go_as_it_may(worlds):
    world = worlds(rate=10, per_address=100)
    witness = world.joins("witness")
    world.waits(60.0)
    witness.reads()
    for number in range(300):  # 30 a second
        peer = world.joins(f"p{number}", host="203.0.113.5")
        peer.types(*["spam"] * 20)
        peer.far.ended = True
        world.waits(1 / 30)
    seconds = 10 + batchat.BURST_SECONDS
    assert 500 < witness.reads().count("\n") <= seconds * 10 * batchat.ADDRESS_SHARE


def test_who_comes_back_finds_the_bucket_of_their_address_as_they_left_it(worlds):
    world = worlds(rate=10)
    witness = world.joins("witness")
    for number in range(20):
        world.joins(f"p{number}", host="2001:db8::1").types(*["spam"] * 60)
    world.waits(1.0)
    for peer in world.peers[1:]:
        peer.far.break_down(errno.ECONNRESET, loses=True)
    world.waits(1.0)
    witness.reads()
    world.joins("again", host="2001:db8::2").types(*["spam"] * 60)
    world.waits(0.1)
    assert witness.reads().count("spam") < 20


def test_people_on_this_very_box_share_no_bucket(worlds):
    world = worlds(rate=10)
    witness = world.joins("witness")
    for number in range(100):
        world.joins(f"p{number}").types(*["hello"] * 30)
    world.waits(0.1)
    assert witness.reads().count("hello") == 3000


@pytest.mark.parametrize(
    "flood",
    [b"x" * 512, b"\xff\xfa" + b"x" * 510, b"\xff\xf1" * 256, b"\xff\xf6" * 256, b"\n" * 512],
    ids=["an endless line", "an endless subnegotiation", "commands", "are you there", "blank"],
)
def test_whatever_is_read_is_paced_by_its_bytes(worlds, flood):
    world = worlds(rate=10)
    vandal = world.joins("vandal")
    world.waits(60.0)
    vandal.far.type(flood * 2000)
    world.waits(10.0)
    read = 2000 * 512 - len(vandal.far.arrived)
    assert read <= 512 * 10 * (10 + batchat.BURST_SECONDS) + batchat.READ_AHEAD + 512


def test_a_new_name_costs_what_five_lines_do(worlds):
    world = worlds(rate=10)
    mike = world.joins("mike")
    world.waits(60.0)
    mike.types(*["/nick mick", "/nick mike"] * 50)
    world.waits(0.01)
    assert len(mike.events) == 1 + 50 // batchat.NAME_TOKENS


def test_what_others_whisper_to_somebody_does_not_silence_them(worlds):
    world = worlds(rate=10)
    ann, mike = world.joins("ann"), stalls(world, "mike")
    trolls = [world.joins(f"troll{n}", host=f"203.0.113.{n}") for n in range(30)]
    for each in trolls:
        each.types(*["/msg mike " + LONG] * 5)
    world.waits(1.0)
    mike.types("help!")
    world.waits(0.1)
    assert "<mike> help!\n" in ann.reads()
    assert "* mike has too much to read; your line was not sent.\n" in trolls[-1].reads()


def test_nobody_is_listened_to_for_more_than_a_token_before_it_is_the_next_ones_turn(worlds):
    world = worlds(rate=10)
    ann, vandals = world.joins("ann"), [world.joins(f"v{n}") for n in range(20)]
    world.waits(60.0)
    for each in vandals:
        each.far.type(b"\xff\xf6" * 4096)
    world.turn()
    assert {len(each.connection.unheard) for each in vandals} == {8192 - batchat.BYTES_A_TOKEN}
    ann.types("/me waves")
    world.turn()
    assert {len(each.connection.unheard) for each in vandals} == {8192 - 2 * batchat.BYTES_A_TOKEN}
    assert all(b"** ann waves" in each.far.got for each in vandals)


# --------------------------------------------------------------------------
# Nobody holds up the room
# --------------------------------------------------------------------------


def test_what_the_system_holds_for_a_listener_has_a_size_that_does_not_grow(our_end):
    with socket.socket() as fixed:
        fixed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, batchat.SEND_BUFFER)  # see tcp(7)
        sizes = [each.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for each in (our_end, fixed)]
    assert sizes[0] == sizes[1]


def test_who_takes_nothing_holds_the_room_for_two_seconds_and_is_dropped(worlds):
    world = worlds()
    ann, talker = world.joins("ann"), world.joins("talker")
    stalls(world, "sleeper")
    talk(world, talker, 800)
    assert len(world.reactor.chat.logs[TelnetWire].data) <= batchat.WINDOW
    assert talker.far.arrived
    world.waits(1.9)
    assert "sleeper" in names(world)
    ann.reads()
    world.waits(0.1)
    assert names(world) == ["ann", "talker"]
    assert "* sleeper has quit the chat\n" in ann.reads()
    assert not talker.far.arrived


def test_a_row_of_people_who_stall_one_after_the_other_holds_the_room_for_a_sixth_of_the_time(
    worlds,
):
    world = worlds()
    talker, _ann = world.joins("talker"), world.joins("ann")
    for number in range(60):
        stalls(world, f"s{number}")
        talk(world, talker, 600)
        world.waits(1.0)
    minute = world.now - START
    assert world.reached["too far behind"] > 50
    assert world.held_seconds < batchat.PATIENCE_SECONDS + minute / 6 + 0.1


def test_one_address_that_floods_and_trickles_does_not_silence_the_others(worlds):
    world = worlds(rate=10)
    ann, bob = world.joins("ann"), world.joins("bob")
    there = [world.joins(f"f{n}", host="203.0.113.5") for n in range(30)]
    slow = stalls(world, "slow", host="203.0.113.5")
    slow.far.reads(1 << 20, speed=4096)  # what its system keeps, and what it reads
    for number in range(20):
        for each in there:
            each.types(*[LONG[:1500]] * 20)
        for speaker in (ann, bob):
            speaker.types(f"honest {number}")
        world.waits(0.5)
    world.waits(2.0)
    assert ann.reads().count("honest") == bob.reads().count("honest") == 20


def test_talkers_who_never_stop_are_listened_to_in_turn(worlds):
    world = worlds()
    world.joins("listener")
    talkers = [world.joins(f"talker-with-a-long-name{n}") for n in range(9)]
    world.waits()
    for each in talkers:
        each.far.type(b"x\n" * 50_000)
    for _ in range(6):  # each of which has room for two talkers or three
        world.reactor.turn()
    assert all(each.far.read_in for each in talkers)


def test_who_ignores_talkers_and_stalls_is_behind_by_what_that_costs(worlds, monkeypatch):
    monkeypatch.setattr(batchat, "TOO_FAR_BEHIND", 100 * batchat.SPLICE_SIZE)
    world = worlds()
    ann, bob, sleeper = world.joins("ann"), world.joins("bob"), world.joins("sleeper")
    sleeper.types("/ignore ann")
    world.waits()
    sleeper.far.reads(0)
    for _ in range(100):
        ann.types("x")
        bob.types("x")
        world.reactor.turn()
    world.waits(2.1)
    assert names(world) == ["ann", "bob"]


def test_whoever_reads_again_is_seen_to_though_the_selector_does_not_tell(worlds):
    world = worlds()
    talker, slow = world.joins("talker"), stalls(world, "slow", low_water=1 << 20)
    talk(world, talker, 800)
    assert world.reactor.held
    slow.far.reads(600_000)
    world.waits(0.1)
    assert not world.reactor.held
    assert not talker.far.arrived


def test_two_who_stall_together_are_dropped_together(worlds):
    world = worlds()
    talker = world.joins("talker")
    stalls(world, "one")
    stalls(world, "other")
    talk(world, talker, 800)
    world.waits(2.1)
    assert names(world) == ["talker"]


def test_whom_the_quit_of_another_puts_too_far_behind_is_dropped_as_well(worlds, monkeypatch):
    world = worlds()
    talker, _first = world.joins("talker"), stalls(world, "first")
    talk(world, talker, 4)
    second = stalls(world, "second")
    talk(world, talker, 400)
    monkeypatch.setattr(batchat, "TOO_FAR_BEHIND", second.connection.outbox.behind)
    world.waits(3.5)
    assert names(world) == ["talker"]


def test_the_room_waits_for_leavers_too_so_that_memory_is_bounded(worlds):
    world = worlds()
    talker, slow = world.joins("talker"), stalls(world, "slow")
    talk(world, talker, 400)
    slow.types("/quit")
    talk(world, talker, 400)
    assert world.reactor.held
    assert talker.far.arrived


def test_a_leaver_who_hangs_up_is_seen_to_though_the_room_is_held(worlds):
    world = worlds()
    talker, mike = world.joins("talker"), world.joins("mike")
    stalls(world, "sleeper")
    mike.types("/quit")
    talk(world, talker, 800)
    assert world.reactor.held
    mike.far.ended = True
    world.waits(0.1)
    assert mike.sock.closed


def test_a_slow_listener_costs_no_system_call_a_line(worlds):
    world = worlds()
    talker, slow = world.joins("talker"), stalls(world, "slow")
    slow.sock.send = mock.Mock(side_effect=slow.sock.send)
    for _ in range(100):
        talker.types("x")
        world.turn()
    assert slow.sock.send.call_count <= 2


# --------------------------------------------------------------------------
# Nobody freezes a screen or plays tricks on it
# --------------------------------------------------------------------------

ANYTHING = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\b\x7f\x15\x1b\u202e\t")
)
NOT_ON_A_SCREEN = set(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029]))
NOT_ON_A_SCREEN |= set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


@given(ANYTHING)
def test_cleaned_text_has_no_forbidden_character_and_cleaning_it_again_changes_nothing(text):
    cleaned = batchat.clean(text)
    assert not NOT_ON_A_SCREEN & set(cleaned)
    assert batchat.clean(cleaned) == cleaned


@given(ANYTHING)
def test_cleaning_takes_out_nothing_else(text):
    text = re.sub("[\b\x7f\x15\x1b\x9b]", "", text)
    kept = [each for each in text.replace("\t", " ") if each not in NOT_ON_A_SCREEN]
    assert batchat.clean(text) == "".join(kept)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("abc\x1b[D\x1b[D", "abc"),  # arrows
        ("\x1b[1;5Cx\x1b[?25ly\x1b[ qz\x9b31m", "xyz"),  # CSI, its parameters and its letter
        ("\x1bOPx\x1bO", "x"),  # SS3 and its letter
        ("\x1b]0;title\x07x\x1b]8;;http://x\x1b\\y\x1b]2;no end", "xy"),  # OSC up to its end
        ("a\x1b", "a"),
        ("\x1bba\x1b\x7fc", "ac"),  # Alt-b, Alt-Backspace: an ESC and one character
        ("\x1b\x1b[Aa", "a"),  # Alt and an arrow
        ("\x1b[12\u00e9", "12\u00e9"),  # nothing that a terminal knows
        ("one\ttwo\t\t", "one two  "),
    ],
)
def test_an_escape_sequence_goes_out_as_a_whole_and_a_tab_becomes_a_space(typed, shown):
    assert heard(f"{typed}\n".encode()) == [shown]
    assert sent(masked(1, typed.encode())) == ([shown], [])


@given(ANYTHING.map(batchat.clean))
def test_nothing_that_one_person_types_looks_like_a_notice_or_a_second_line(text):
    room = Room()
    mike, ann = room.join("mike"), room.join("ann")
    mike.types(text)
    shown = ann.reads()
    assert shown.count("\n") == (1 if shown else 0)
    assert shown == "" or shown.startswith(("<mike> ", "** mike ", "* mike ", "[mike -> you] "))
    assert not shown.startswith("* mike ") or text.strip().lower().startswith(("/quit", "/nick"))


# What telnet sends

# Latin, Greek, Cyrillic, Armenian, Hebrew, Arabic, Indic, Thai, Georgian, kana, Chinese, Korean
ALPHABETS = st.sampled_from(
    [" ", "a", "\u201d", "\U0001f600"]
    + [chr(n) for a, b in [(0xC0, 0x17F), (0x370, 0x6FF), (0x900, 0xDFF)] for n in range(a, b)]
    + [chr(n) for a, b in [(0xE00, 0xE5C), (0x10A0, 0x10FF), (0x3041, 0x30FF)] for n in range(a, b)]
    + [chr(n) for a, b in [(0x4E00, 0x5200), (0xAC00, 0xB000)] for n in range(a, b)]
)


def is_unfinished(text: bytes) -> bool:
    """Whether the last character of `text` lacks some of its bytes in UTF-8."""
    for size in range(1, min(4, len(text) + 1)):
        first = text[-size]
        if not 0x80 <= first < 0xC0:
            return size < (0xC2 <= first < 0xF5) * 2 + (0xE0 <= first < 0xF5) + (
                0xF0 <= first < 0xF5
            )
    return False


def telnet_by_the_byte(data: bytes) -> tuple[list, bytes]:
    """The same as `telnet`, written as plainly as RFC 854 reads: one byte at a time."""
    events, replies, line, too_long, after_cr = [], b"", b"", False, False
    text = b""  # what no command was
    rest = iter(data)
    with contextlib.suppress(StopIteration):
        while True:
            byte = next(rest)
            if byte == 255:
                command = next(rest)
                if command in (251, 252, 253, 254):
                    option = next(rest)
                    if command in (251, 253) and option:
                        replies += bytes([255, 254 if command == 251 else 252, option])
                    continue
                if command == 250:
                    while True:
                        if next(rest) == 255:
                            command = next(rest)
                            if command != 255:
                                break
                    if command != 240:  # which is none of its own, but ends it all the same
                        rest = itertools.chain([255, command], rest)
                    continue
                byte_of = {key: byte | 0x80 for byte, key in KEYS_OF_TELNET.items()}
                byte_of[243] = byte_of[238]  # an older name for it
                if command in byte_of and is_unfinished(text):
                    byte = byte_of[command]
                elif command == 246:
                    replies += b"* BATCHAT is here.\r\n"
                    continue
                elif command in (236, 238, 243, 244):
                    byte = 3
                elif command in (247, 248):
                    byte = {247: 8, 248: 21}[command]
                elif command != 255:
                    continue
            if LEAVE in events:  # commands are answered still, but nothing is heard
                continue
            text += bytes([byte])
            if after_cr and byte in (0, 10):
                after_cr = False
                continue
            ends_line, after_cr = byte in (10, 13), byte == 13
            if byte in (3, 4):
                events.append(LEAVE)
            elif ends_line:
                if not too_long:
                    events.append(batchat.clean(batchat.text_of(line)))
                line, too_long = b"", False
            elif not too_long:
                line += bytes([byte])
                if len(line) > batchat.LINE_LIMIT:
                    events.append(TOO_LONG)
                    too_long = True
    return events, replies


TELNET = st.lists(
    st.one_of(
        st.sampled_from([b"\r\n", b"\r\0", b"\r", b"\n", b"\0", b"\b", b"\x7f"]),
        st.sampled_from([b"\xff", b"\xff\xff", b"\xff\xfa", b"\xff\xf0", b"\xfa", b"\xf0"]),
        st.sampled_from([bytes([255, command]) for command in range(236, 250)]),
        st.sampled_from([b"\xd0", b"\xe3", b"\xe3\x83", b"\xf0\x9f", b"\x98\x83", b"\xff\xfb\0"]),
        st.sampled_from([b"\xff\xfd\x06", b"\xff\xfb\x1f", b"\xff\xfc\x01", b"\xff\xfe\x03"]),
        st.sampled_from([b"\xff\xfa\x1f\0\x50\xff\xff\xff\xf0", b"\x03", b"\x04", b"\xff\xf4"]),
        st.sampled_from([b"hello", "h\u00e9 \u4f60 \U0001f600".encode(), b"x" * 4096, b"y" * 4097]),
        st.binary(max_size=4),
    ),
    max_size=12,
).map(b"".join)
PLACES = st.lists(st.integers(0, 10**6), max_size=12)


@given(TELNET, PLACES)
def test_however_the_bytes_are_cut_up_the_lines_and_answers_are_the_same(data, places):
    lines, answers = telnet(*cut(data, places))
    assert (lines, plain(answers)) == telnet_by_the_byte(data)


@pytest.mark.parametrize(
    ("reads", "lines"),
    [
        ([b"a\r\nb\r\0c\nd\re\r\n"], ["a", "b", "c", "d", "e"]),
        ([b"\r\n\n\r"], ["", "", ""]),
        ([b"a\r", b"\nb\r", b"c\n"], ["a", "b", "c"]),  # a lone CR ends its line at once
        ([b"helpp\b\x7flo\b\blo\n"], ["hello"]),  # backspace and delete
        ([b"\b\bnonsense\x15sense\n"], ["sense"]),  # Ctrl-U
        ([b"hexx\xff\xf7\xff\xf7llo\n", b"oops\xff\xf8good\n"], ["hello", "good"]),  # EC, EL
        ([b"caf\xe9 \xc3\n"], ["caf\ufffd \ufffd"]),  # broken UTF-8
        ([b"one\ntwo\nthr", b""], ["one", "two", LEAVE]),  # what Enter did not end is not said
    ],
)
def test_bytes_become_the_lines_that_whoever_typed_them_meant(reads, lines):
    assert heard(*reads) == lines


def test_every_option_but_binary_is_refused_and_nothing_is_answered_to_a_refusal():
    asked = b"\xff\xfd\x06\xff\xfb\x1f\xff\xfc\x06\xff\xfe\x06\xff\xfb\0\xff\xfd\0ok\r\n"
    assert telnet(asked) == (["ok"], ASKS_FOR_BINARY + b"\xff\xfc\x06\xff\xfe\x1f")


def test_are_you_there_is_answered():
    assert telnet(b"\xff\xf6") == ([], ASKS_FOR_BINARY + b"* BATCHAT is here.\r\n")


def test_who_shows_that_they_are_a_telnet_is_asked_once_for_binary():
    text = "\u041c\u0430\u0440\u0438\u044f"
    for read in (f"{text}\r\n".encode(), f"{text}\r\0".encode(), b"\xff\xf1", b"\xff\xfb\x1f"):
        assert telnet(read, read)[1].count(ASKS_FOR_BINARY) == 1


@given(st.text(ALPHABETS), PLACES)
def test_who_has_not_shown_that_never_gets_a_byte_that_is_no_utf_8(text, places):
    for as_sent in (text.replace("\r", "").encode(), text.encode("ascii", "ignore")):
        assert telnet(*cut(as_sent, places))[1] == b""


def test_programs_that_read_plain_utf_8_read_whole_sessions_of_it(worlds):
    for end in ("\n", "\r"):
        world = worlds()
        ann = world.joins("ann", WebWire)
        world.waits()
        mike = world.calls()
        mike.far.type(f"Мария{end}Привет, у меня{end}/msg Мария ”{end}caf\xe9\t{end}".encode())
        world.waits()
        ann.types("カタカナ", "/quit")
        mike.far.type(f"/quit{end}".encode())
        world.waits()
        assert (
            mike.far.got.decode()
            == TelnetWire.encode(
                GREETING
                + "Hey, Мария! Hope you enjoy the chat.\n\n[Мария -> you] ”\n[you -> Мария] ”\n"
                + "<ann> カタカナ\n* ann has quit the chat\n"
            ).decode()
        )


def test_who_speaks_binary_gets_their_cursor_back_to_the_start_of_the_row(worlds):
    # For their terminal does no more of Enter than it was told: it goes down a row.
    world = worlds()
    mike = world.calls()
    mike.far.type(b"mike\r\n\xff\xf1")
    world.waits()
    for line, answer in [(b"in ascii\r\n", b""), (b"in binary\n", b"\r"), (b"from putty\r", b"")]:
        before = len(mike.far.got)
        mike.far.type(line)
        world.waits()
        assert mike.far.got[before:] == answer


@given(st.text(ALPHABETS), PLACES)
def test_a_text_in_any_alphabet_comes_out_of_a_telnet_as_it_was_typed(text, places):
    assert heard(*cut(typed_in_telnet(f"{text}\n"), places)) == [batchat.clean(text)]


@pytest.mark.parametrize("letter", list("\u0405\u0445\u00c5\u03c5\u0645\u0905\u0e05\u314b\ub155"))
def test_where_a_telnet_swallows_ctrl_e_the_letter_that_held_it_is_mended(letter):
    text = f"a{letter}b {letter}{letter} {letter}"
    assert b"\x85" in text.encode()
    assert heard(text.encode().replace(b"\x85", b"") + b"\r\n") == [text]


@pytest.mark.parametrize(
    "key", [b"\xff\xf4", b"\xff\xf3", b"\xff\xee", b"\xff\xec", b"\x03", b"\x04"]
)
def test_interrupt_break_abort_eof_ctrl_c_and_ctrl_d_leave_and_are_the_last_that_is_heard(key):
    assert heard(b"said\nhalf a li" + key + b"ne\nnever heard\n") == ["said", LEAVE]


def test_the_timing_mark_after_ctrl_c_is_answered_so_that_no_screen_freezes(worlds):
    world = worlds()
    mike = world.joins("mike")
    world.waits()
    mike.far.type(b"\xff\xf4\xff\xfd\x06")
    world.waits()
    assert mike.far.got.endswith(b"\xff\xfc\x06")
    assert mike.sock.shut


def test_ctrl_c_beyond_the_rate_takes_back_what_was_not_said_yet_and_leaves_at_once(worlds):
    mark = b"\xff\xfd\x06"
    after_others = [b"\xff\xf1\xff\xf4" + mark, typed_in_telnet("\u3084") + b"\xff\xf4" + mark]
    for key in (b"\xff\xf4" + mark, b"\xff\xf3" + mark, *after_others, b"\x03"):
        for seconds in (0.0, 3.0):
            world = worlds(rate=10)
            ann, mike = world.joins("ann"), world.joins("mike")
            world.waits(60.0)
            ann.reads()
            mike.types(*["\u0443 \u30ca\u30c3"] * 600)
            world.waits(seconds)
            mike.far.type(key + b"never heard\r\n")
            world.waits()
            said = ann.reads()
            assert said.endswith("* mike has quit the chat\n")
            assert 45 < said.count("\n") < 100
            assert mike.far.got.endswith(b"\xff\xfc\x06") or key == b"\x03"


@given(st.text(ALPHABETS), PLACES)
def test_no_letter_is_taken_for_ctrl_c_wherever_the_bytes_are_cut_up(text, places):
    wire = TelnetWire()
    ahead = b""
    for read in cut(typed_in_telnet(f"{text}\u30c3\U0001f3c3\n"), places):
        ahead += read
        assert not wire.heed_interrupt(ahead, len(read))
        helping = len(ahead) // 2
        if helping:
            wire.feed(ahead[:helping])
        ahead = ahead[helping:]
    wire.feed(ahead + b"\xff\xf4")
    assert wire.heed_interrupt(b"", 0)


@pytest.mark.parametrize(
    "sends",
    [
        typed_in_telnet("\u0443 \u30ca\u30c3 \U0001f603 \U0001f3c3"),  # letters made of Ctrl-C
        b"\xff\xfd\x03\xff\xfb\x03",  # options
        b"\xff\xff\xf4",  # an escaped byte, and the next
        b"\x04",  # Ctrl-D leaves when all is said
    ],
)
def test_nothing_else_takes_back_what_was_not_said_yet(worlds, sends):
    world = worlds(rate=10)
    ann, mike = world.joins("ann"), world.joins("mike")
    world.waits(60.0)
    mike.types(*["hi"] * 200)
    for byte in sends:
        mike.far.type(bytes([byte]))
        world.waits()
    mike.far.type(sends)
    world.waits()
    assert names(world) == ["ann", "mike"]
    world.waits(60.0)
    assert ann.reads().count("<mike> hi") == 200


def test_telnets_urgent_data_stays_in_the_stream():
    with Server() as server:
        mike, jonny = server.join("mike"), server.join("jonny")
        jonny.sock.send(b"on")
        jonny.sock.send(b"\xff\xf2", socket.MSG_OOB)
        jonny.sock.send(b"e\r\n")
        mike.reads("* jonny has joined the chat\n<jonny> one\n")


# --------------------------------------------------------------------------
# It does not fall over
# --------------------------------------------------------------------------


def test_a_line_of_4096_bytes_is_a_line_and_a_longer_one_is_refused():
    assert heard(b"x" * 4096 + b"\n") == ["x" * 4096]
    assert heard(b"x" * 4097 + b"\nnext\n") == [TOO_LONG, "next"]


@pytest.mark.parametrize(
    ("start", "end"),
    [(b"x", b"\n"), (b"\xff\xfa\x18", b"\xff\xf0")],
    ids=["line", "subnegotiation"],
)
def test_of_what_never_ends_no_more_is_kept_than_one_line_and_one_read(start, end):
    wire = TelnetWire()
    wire.feed(start)
    for _ in range(100):
        wire.feed(b"x" * batchat.READ_SIZE)
        while wire.next():
            pass
        assert kept_by(wire) <= batchat.LINE_LIMIT + batchat.READ_SIZE
    wire.feed(end + b"next\n")
    assert wire.next() == "next"


def test_a_text_longer_than_any_spelling_of_a_name_is_not_even_normalized(room):
    marks = "a" + "\u0344\u0316" * 1000  # their order takes time by the square of their number
    assert batchat.name_key(marks) is marks
    mike = room.join("mike")
    mike.types("/nick " + marks, "/ignore " + marks)
    assert mike.reads() == (
        f"* A name has at most 24 characters.\n* Nobody here is called {marks}.\n"
    )


def test_private_lines_to_somebody_who_reads_nothing_are_refused_not_kept(room):
    mike, ann = room.join("mike"), room.join("ann")
    for _ in range(100):
        mike.types("/msg ann " + "x" * 4000)
    assert ann.outbox.private_bytes < batchat.PRIVATE_LIMIT + batchat.LINE_LIMIT
    assert mike.reads().endswith("* ann has too much to read; your line was not sent.\n")


def test_nothing_is_kept_of_people_who_left(room):
    mike, troll = room.join("mike"), room.join("troll")
    mike.types("/ignore troll", "hello")
    troll.types("/ignore mike", "/msg mike psst")
    mike.types("/quit")
    room.chat.changed.clear()  # as the reactor does once a turn
    room.guests.remove(mike)
    left = weakref.ref(mike)
    del mike
    gc.collect()
    assert left() is None


def test_an_ipv6_64_counts_as_one_address_and_this_box_as_none():
    assert batchat.address_group("2001:db8::1") == batchat.address_group("2001:db8::ffff:2%eth0")
    assert batchat.address_group("2001:db8::1") != batchat.address_group("2001:db8:0:1::1")
    assert batchat.address_group("::ffff:192.0.2.1") == batchat.address_group("192.0.2.1")
    assert not any(map(batchat.address_group, ["127.0.0.1", "::1", "::ffff:127.1.2.3"]))


def test_with_64_descriptors_and_120_callers_those_inside_chat_on_and_newcomers_get_in_later():
    with Server(descriptors=64) as server:
        mike, ann = server.join("mike"), server.join("ann")
        mike.reads("* ann has joined the chat\n")
        callers = [server.call() for _ in range(120)]
        turned_away = 0
        for caller in callers:
            first = caller.sock.recv(len(batchat.FULL))
            turned_away += first.startswith(b"* BATCHAT is full")
        assert 120 - 62 < turned_away < 120 - 20
        mike.types("still there?")
        ann.reads("<mike> still there?\n")
        for caller in callers:
            caller.sock.close()
        # They are gone when the server has seen it; until then a newcomer is told to come again.
        wait_until(lambda: server.call().sock.recv(1) != b"*")
        server.join("late")
        mike.reads("* late has joined the chat\n")


def test_too_few_descriptors_is_one_clear_line_and_status_1():
    done = run(descriptors=30)
    assert done.returncode == 1
    assert done.stderr == "batchat: too few descriptors are allowed; see ulimit -n\n"


def test_who_does_not_read_private_replies_is_not_listened_to_until_they_do(worlds):
    world = worlds()
    mike = stalls(world, "mike")
    mike.types(*["/help"] * 2000)
    world.waits(1.0)
    assert len(mike.events) < 400
    mike.far.reads(BOUNDLESS)
    world.waits(1.0)
    assert mike.reads().count(batchat.help_for(False)) == 2000


def test_two_minutes_without_a_name_are_the_end_and_a_name_in_time_stops_the_clock(worlds):
    world = worlds()
    mike, caller, browser = world.joins("mike"), world.calls(), world.calls(WebWire)
    world.waits(119.0)
    assert caller.reads() == GREETING
    assert browser.reads().rstrip("\n") == GREETING
    world.waits(2.0)
    assert caller.reads() == browser.reads() == "* You gave no name in time, goodbye!\n"
    assert not caller.is_here
    assert mike.is_here


def test_a_full_house_says_so_and_lets_people_in_when_some_leave(worlds):
    world = worlds(people=2)
    mike, _ann, late, browser = (
        *map(world.joins, ["mike", "ann", "late"]),
        world.calls(WebWire, opens=False),
    )
    world.waits()
    assert late.reads() == "* BATCHAT is full, please try again later.\n"
    assert browser.far.got.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert browser.far.got.endswith(b"\r\n\r\n* BATCHAT is full, please try again later.\n")
    mike.far.ended = True
    world.waits()
    world.joins("eve")
    world.waits()
    assert names(world) == ["ann", "eve"]


def test_callers_who_are_turned_away_and_stay_take_up_no_room_and_cut_off_nobody_who_is_owed(
    worlds,
):
    world = worlds(people=2)
    talker, slow = world.joins("talker"), stalls(world, "slow")
    talk(world, talker, 200)
    slow.types("/quit")
    world.waits()
    for _ in range(100):
        world.calls()
        world.waits()
    assert len(world.reactor.connections) <= 2 + batchat.LOBBY
    slow.far.reads(BOUNDLESS)
    world.waits(0.1)
    assert slow.far.got == slow.owed


def test_too_many_people_from_one_address_are_turned_away_and_do_not_count(worlds):
    world = worlds(per_address=2)
    here = [world.joins(name, host="203.0.113.5") for name in ("ann", "bob")]
    world.waits()
    refused = [world.joins("cy", host="::ffff:203.0.113.5") for _ in range(3)]
    world.joins("dan", host="203.0.113.6")
    world.waits()
    for each in refused:
        assert each.reads() == (
            "* Too many people are here from your address, please try again later.\n"
        )
    here[0].far.ended = True
    world.waits()
    world.joins("eve", host="203.0.113.5")
    world.waits()
    assert names(world) == ["bob", "dan", "eve"]


def test_a_flood_of_commands_is_paced_like_lines(worlds):
    world = worlds(rate=10)
    mike, vandal = world.joins("mike"), world.calls()
    vandal.far.type(b"\xff\xf1" * 50_000)
    mike.types("/who")
    world.waits()
    assert mike.reads().endswith("* 1 here: mike\n")
    assert vandal.far.arrived


@pytest.mark.parametrize("error", DOOR_ERRORS)
def test_when_accept_fails_it_is_tried_again_each_second_and_those_inside_chat_on(worlds, error):
    world = worlds()
    mike, ann = world.joins("mike"), world.joins("ann")
    world.waits(0.5)
    world.take("door_fails", TelnetWire, error, 2.0)
    world.joins("late")
    ann.types("hello")
    world.waits(1.9)
    assert mike.reads().endswith("<ann> hello\n")
    assert 1 <= world.reached["accept fails"] + world.reached["register fails"] <= 3
    world.waits(2.0)
    assert names(world) == ["mike", "ann", "late"]


@pytest.mark.parametrize("call", CALLS)
def test_a_system_call_that_fails_costs_one_connection_and_the_log_says_why(worlds, call):
    world = worlds()
    ann, mike = world.joins("ann"), world.calls()
    mike.far.faults[call] = errno.ENOMEM
    mike.types("mike")
    world.waits()
    mike.far.reads(0)  # which asks the selector for another event
    ann.types(*["hello"] * 3)
    world.waits()
    mike.far.reads(BOUNDLESS)
    mike.types("/quit")
    world.waits()
    mike.far.ended = True
    world.waits(6.0)
    assert world.reached[f"{call} fails"] == 1 or call in ("unregister", "getsockopt")
    assert mike.sock.closed
    assert ann.is_here
    if call in ("recv", "modify", "register", "setblocking", "setsockopt"):
        logged = str(batchat.logger.method_calls)
        assert os.strerror(errno.ENOMEM) in logged


def test_where_the_selector_itself_fails_the_room_closes_well_and_says_so(worlds):
    world = worlds()
    ann = world.joins("ann")
    world.waits()
    ann.reads()
    select = world.selector.select

    def fail_once(timeout: float) -> list:
        world.selector.select = select
        raise ABug

    world.selector.select = fail_once
    world.budget, world.polite = NEVER, True
    assert not world.reactor.run()
    assert ann.reads() == "* BATCHAT is closing, goodbye!\n"
    assert batchat.logger.exception.called


@pytest.mark.parametrize(
    ("part", "step"), [(Chat, "_do_who"), (Outbox, "unsent"), (SimulatedSocket, "recv")]
)
def test_an_error_of_our_own_ends_one_connection_with_a_traceback_and_no_other(
    worlds, monkeypatch, part, step
):
    world = worlds()
    ann, mike = world.joins("ann"), world.joins("mike")
    world.waits()
    ann.reads()
    works, victim = getattr(part, step), mike.connection

    def fails(self, *arguments):
        if self in (victim.outbox, mike.sock) or victim in arguments:
            mike.sock.failed = OURS
            raise ABug
        return works(self, *arguments)

    monkeypatch.setattr(part, step, fails)
    mike.types("/who")
    world.waits()
    assert mike.sock.closed
    assert batchat.logger.exception.called
    ann.types("/who")
    world.waits()
    assert ann.reads() == "* mike has quit the chat\n* 1 here: ann\n"


def test_callers_who_are_turned_away_and_stay_take_few_descriptors_and_for_a_second(worlds):
    world = worlds(per_address=10)
    for number in range(10):
        world.joins(f"p{number}", host="203.0.113.5")
    for _ in range(50):
        for _ in range(10):
            world.calls(host="203.0.113.5")
        world.waits(0.01)
        assert len(world.reactor.connections) <= 21
    world.waits(2.1)
    assert len(world.reactor.connections) == 10


def test_after_a_stop_what_has_arrived_is_read_before_anyones_time_is_called_up(worlds):
    world = worlds()
    caller, browser = world.calls(), world.calls(WebWire)
    world.waits(5.0)
    caller.types("mike")
    browser.types("ann")
    world.jumps(1000.0)
    world.waits(0.01)
    assert names(world) == ["mike", "ann"]


def test_who_is_dropped_leaves_nothing_of_theirs_to_the_system(houses):
    house = houses(rate=0)
    talker, sleeper = house.calls(b"talker\n"), house.calls(b"sleeper\n", buffer=4096)
    house.waits()
    sleeper.reading = False
    for connection in house.reactor.connections:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    while not house.reactor.held:
        talker.sock.send(b"x" * 4000 + b"\n")
        house.turns()
    house.waits(2)
    sleeper.sock.settimeout(PATIENCE)
    with pytest.raises(ConnectionResetError):  # after a plain close, all is delivered
        while sleeper.sock.recv(1 << 16):
            pass


def test_2_000_people_may_call_at_once():
    try:
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
    except OSError:
        most = 0
    import resource

    if most < 2048 or resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2200:
        pytest.skip("the system allows no such queue")
    with Server() as server, contextlib.ExitStack() as stack:
        server.process.send_signal(signal.SIGSTOP)
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(2000):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", server.port))
            selector.register(caller, selectors.EVENT_WRITE)
        assert len(selector.select(0)) == 2000
        server.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("output", ["/dev/full", "a closed pipe", ""])
def test_where_standard_output_can_not_be_written_to_the_opening_line_goes_to_the_log(output):
    command = command_line("--port", "0", "--web-port", "0")
    out = subprocess.PIPE
    if output == "/dev/full":
        out = open(output, "w")  # noqa: SIM115
    elif not output:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    elif output:
        reader, out = os.pipe()
        os.close(reader)
    with subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        port = int(re.search(r"BATCHAT is open on .* port (\d+)", line)[1])
        with socket.create_connection(("127.0.0.1", port)) as caller:
            assert caller.recv(3) == b"   "
        process.terminate()
        process.stderr.read()
        assert process.wait(PATIENCE) == 0


HARMLESS = {
    "head": request({f"X-Header-{n}": "x" * 60 for n in range(90)}, "GET / HTTP/1.1"),
    "telnet": b"a line of ordinary length\r\n" * 300,
    "frames": masked(1, b"a line of ordinary length") * 250,
}
SHAPES = [
    *[
        ("head", b"GET / HTTP/1.1\r\nHost: x\r\n" + each)
        for each in (
            b"a:" + b" " * 8100 + b"x\r\n\r\n",
            b"a: " + b"x " * 4000 + b"\r\n\r\n",
            b"a:\r\n" * 2000 + b"\r\n",
            b"a: b\r\n" * 1300 + b"\r\n",
            b"Content-Type: multipart/mixed" + b"; boundary*0=b" * 500 + b"\r\n\r\n",
            b"Connection: " + b"," * 8000 + b"\r\n\r\n",
            b"Sec-WebSocket-Key: " + b"=" * 8000 + b"\r\n\r\n",
            b":" * 8000 + b"\r\n\r\n",
            b"\r" * 8000 + b"\n\r\n",
        )
    ],
    ("head", b"GET " + b"/" * 8000 + b" HTTP/1.1\r\n\r\n"),
    ("head", b"GET http://" + b"[" * 8000 + b" HTTP/1.1\r\n\r\n"),
    ("head", b"!" * 8100 + b"\r\n\r\n"),
    ("head", b"\r\n" * 4000),
    *[
        ("telnet", each)
        for each in (
            b"\xff\xfa" + b"\xff" * 8000,
            b"\xff\xfa" + b"\xff\xfa" * 4000,
            b"\xff\xfa" + b"x" * 8000 + b"\xff\xf0\r\n",
            b"\xff" * 8192,
            b"\xff\xf1" * 4096,
            b"\xff\xf6" * 4096,
            b"\xff\xfd\x06" * 2700,
            b"x" * 4000 + b"\b" * 4096 + b"\n",
            b"x\b" * 2000 + b"\n",
            b"\x15x" * 2000 + b"\n",
            b"\x1b[" * 2000 + b"\n",
            b"\x1b]" * 2000 + b"\n",
            b"\x1b[" + b"0" * 4000 + b"\n",
            b"\xd0\xff\xf4\xff\xfd\x06" * 1360 + b"\n",
            b"\xc3" * 4000 + b"\n",
            ("a " * 1300 + " HTTP/").encode() + b"\n",
            "\u0344".encode() * 1300 + b"\n",
            b"\r" * 8192,
        )
    ],
    *[
        ("frames", each)
        for each in (
            masked(9, b"") * 1300,
            masked(1, b"", False) + masked(0, b"", False) * 1300,
            masked(1, b"x", False) + masked(0, b"x", False) * 1000,
            masked(1, b"\n" * 4096) * 2,
            masked(1, b"\r\n" * 2000) * 2,
            masked(1, "\u202e".encode() * 1300) * 2,
        )
    ],
]


@pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=range(len(SHAPES)))
def test_8_kib_of_any_hostile_shape_cost_at_most_ten_times_as_much_as_harmless_ones(kind, shape):
    starts = {"head": b"", "telnet": b"mike\n", "frames": OPENING + masked(1, b"mike")}

    def cost(data: bytes) -> float:
        best = float("inf")
        for _ in range(5):
            room = Room()
            log = room.chat.logs[TelnetWire if kind == "telnet" else WebWire]
            guest = batchat.Person("nowhere", log)
            before = time.process_time()
            guest.wire.feed(starts[kind] + data)
            while guest.state is not batchat.CLOSING:
                event = guest.wire.next()
                if event is None:
                    break
                room.chat.handle(guest, event)
            best = min(best, time.process_time() - before)
        return best

    assert cost(shape) < 10 * cost(HARMLESS[kind]) + 1e-3


@pytest.mark.parametrize("rate", [0, 10])
def test_of_what_somebody_sends_no_more_is_read_than_is_handled_or_thrown_away(worlds, rate):
    world = worlds(rate=rate)
    mike, leaver = world.joins("mike"), world.joins("leaver")
    leaver.types("/quit")
    world.waits()
    for each in (mike, leaver):
        each.far.type(b"x\n" * 250_000)
    world.waits(3.0)
    assert not leaver.far.arrived
    for each in (mike, leaver):
        kept = kept_by(each.connection.wire) + len(each.connection.unheard)
        assert kept < batchat.READ_AHEAD + batchat.LINE_LIMIT


def test_who_can_not_be_sent_to_may_still_join_and_say_what_they_had_sent(worlds):
    world = worlds()
    ann, mike = world.joins("ann"), world.calls()
    world.waits()
    mike.far.send_error, mike.far.sends_to_fail = errno.ENOBUFS, BOUNDLESS
    mike.types("a b", "mike")
    world.turn(segment=5)  # the refusal of the first name can't be sent
    ann.types("hello")
    world.waits()
    assert names(world) == ["ann"]
    assert mike.sock.closed


def test_a_selector_that_fails_for_ever_ends_the_room(worlds):
    world = worlds()
    ann = world.joins("ann")
    world.waits()
    ann.sock.failed = errno.EIO  # so that the model lets us close it
    world.selector.select = mock.Mock(side_effect=[ABug, ABug])
    assert not world.reactor.run()


# --------------------------------------------------------------------------
# It closes well
# --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_tells_everyone_and_hangs_up_on_them_without_a_reset(number):
    with Server() as server:
        mike, caller = server.join("mike"), server.call()
        caller.reads(GREETING)
        server.process.send_signal(number)
        for each in (mike, caller):
            each.reads("* BATCHAT is closing, goodbye!\n")
            each.sees_the_end()
        status, log = server.ends()
        assert status == 0
        assert "Traceback" not in log


def test_a_second_signal_ends_it_at_once():
    with Server() as server:
        mike = server.join("mike")
        server.process.send_signal(signal.SIGINT)
        mike.reads("* BATCHAT is closing, goodbye!\n")  # but mike does not hang up
        server.process.send_signal(signal.SIGTERM)
        assert server.ends()[0] == -signal.SIGTERM


def test_closing_the_house_tells_everyone_and_waits_two_seconds_for_those_who_do_not_hang_up(
    worlds,
):
    world = worlds()
    mike, ann, caller = world.joins("mike"), world.joins("ann", WebWire), world.calls()
    early = world.calls(WebWire, opens=False)
    mike.types("last words")
    world.waits()
    for each in (mike, ann, caller):
        each.reads()
    world.reactor.stop()
    assert world.reactor.ends_at == world.now + batchat.SHUTDOWN_SECONDS
    world.budget = NEVER
    world.stopped_at = world.now
    assert world.reactor.run()
    for each in (mike, ann, caller):
        assert each.reads() == "* BATCHAT is closing, goodbye!\n"
    assert ann.far.got.endswith(b"\x88\x02\x03\xe9")
    assert early.far.got.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


def test_a_closed_terminal_closes_the_room_unless_nohup_has_it_ignored():
    with Server() as server:
        mike = server.join("mike")
        server.process.send_signal(signal.SIGHUP)
        mike.reads("* BATCHAT is closing, goodbye!\n")
        server.process.send_signal(signal.SIGHUP)  # once from the shell, once from the system
        mike.sees_the_end()
        assert server.ends()[0] == 0
    with Server(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as server:
        mike = server.join("mike")
        server.process.send_signal(signal.SIGHUP)
        mike.types("/who")
        mike.reads("* 1 here: mike\n")


# --------------------------------------------------------------------------
# A browser that strays to telnet's port
# --------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["GET / HTTP/1.1", "POST /chat HTTP/1.0", "x y HTTP/2", TOO_LONG])
def test_a_web_request_is_no_name_and_nothing_of_it_is_a_message(room, line):
    ann, browser = room.join("ann"), room.caller()
    browser.types(line, "Host: localhost", "", "evil", "hello everyone")
    assert browser.state is batchat.State.CLOSING
    assert browser.reads() == ann.reads() == ""


# --------------------------------------------------------------------------
# Another site's page has no say: HTTP and WebSocket
# --------------------------------------------------------------------------

# What may be asked


@pytest.mark.parametrize(
    ("status", "how"),
    [
        *[(101, [{"Origin": origin}]) for origin in (None, " https://CHAT.example:1338 ")],
        *[(403, [{"Origin": f"http://{host}"}]) for host in ("evil.example", "chat.example")],
        *[(403, [{"Origin": it}]) for it in ("null", "", "evil://chat.example:1338")],
        (400, [{"Host": "", "Origin": "null"}]),
        (101, [{"Upgrade": "h2c, WebSocket", "Connection": "upgrade"}]),
        *[(426, [{"Upgrade": None}]), (426, [{"Connection": "keep-alive"}])],
        (101, [{"Sec-WebSocket-Version": "13 "}]),
        *[(426, [{"Sec-WebSocket-Version": version}]) for version in ("8", None)],
        *[(400, [{"Sec-WebSocket-Key": key}]) for key in (None, "c2hvcnQ=", "no base64!")],
        *[(400, [{"Host": None}]), (400, [{"host": "another.example"}, "GET / HTTP/1.1"])],
        *[(400, [{"Host": None}, "GET / HTTP/1.1"]), (200, [{"Host": None}, "GET / HTTP/1.0"])],
        *[(400, [{}, "GET /chat HTTP/1.0"]), (400, [{}, "HEAD /chat HTTP/1.1"])],
        *[(405, [{}, f"{verb} HTTP/1.1"]) for verb in ("POST /chat", "DELETE /hello")],
        *[(200, [{}, "GET /?from=here HTTP/1.1"]), (404, [{}, "GET /nothing HTTP/1.1"])],
        (200, [{}, "GET http://chat.example:1338/hello HTTP/1.1"]),
        *[(400, [{}, line]) for line in ("GET / HTTP/2.0", "GET /  HTTP/1.1", "nonsense")],
        *[(400, [{"Bad header name": "x"}]), (400, [{}, "GET http://[/ HTTP/1.1"])],
        *[(431, [{"Cookie": "x" * 8192}]), (431, [{f"X-{n}": "x" for n in range(200)}])],
    ],
)
def test_every_request_gets_the_status_that_the_rfcs_give_it(status, how):
    got, headers, _ = asked(request(*how))
    assert got == status
    if status == 405:
        assert headers["Allow"] == "GET, HEAD"
    if status == 426:
        assert headers.get("Upgrade") == "websocket" or headers["Sec-WebSocket-Version"] == "13"


def test_a_head_over_8_kib_is_refused_before_it_ends():
    assert asked(b"GET / HTTP/1.1\r\nCookie: " + b"x" * 8192)[0] == 431


def test_hello_world_is_a_web_page():
    status, headers, body = asked(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, body) == (200, b"Hello, World!")
    wanted = {
        "Content-Length": "13",
        "Connection": "close",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    assert {name: headers[name] for name in wanted} == wanted


def test_head_gets_the_same_headers_and_no_body():
    head, get = (
        asked(f"{verb} / HTTP/1.1\r\nHost: x\r\n\r\n".encode()) for verb in ("HEAD", "GET")
    )
    assert head == (*get[:2], b"")
    assert len(get[2]) == int(get[1]["Content-Length"]) > 1000


def test_the_page_may_run_its_own_script_and_style_and_nothing_else():
    _, headers, page = asked(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    for tag in ("script", "style"):
        source = re.search(rf"<{tag}>(.*)</{tag}>".encode(), page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(source).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert b"http:" not in page
    assert b"https:" not in page


def test_the_handshake_of_the_rfc_is_answered_as_it_says():
    status, headers, _ = asked(OPENING)
    assert status == 101
    assert headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (headers["Upgrade"], headers["Connection"]) == ("websocket", "Upgrade")


# Frames


def test_the_frames_of_the_rfc_are_read_and_written_as_it_says():
    # Section 5.7: a masked "Hello"; the same in two fragments, masked; a masked pong.
    assert sent(bytes.fromhex("818537fa213d7f9f4d5158")) == (["Hello"], [])
    assert sent(masked(1, b"Hel", final=False), masked(0, b"lo")) == (["Hello"], [])
    assert sent(bytes.fromhex("8a8537fa213d7f9f4d5158")) == ([], [])
    # An unmasked "Hello", as a server sends it; 256 bytes, and 64 KiB.
    assert batchat.frame(1, b"Hello") == bytes.fromhex("810548656c6c6f")
    assert batchat.frame(2, b"x" * 256)[:4] == bytes.fromhex("827e0100")
    assert batchat.frame(2, b"x" * 65536)[:10] == bytes.fromhex("827f0000000000010000")
    assert batchat.frame(1, b"x" * 125)[:2] == bytes.fromhex("817d")


def test_a_ping_is_answered_with_its_pong_also_between_fragments():
    assert sent(masked(1, b"Hel", final=False), masked(9, b"?"), masked(0, b"lo")) == (
        ["Hello"],
        [(0x8A, b"?")],
    )


def test_a_message_is_one_line_or_more_of_up_to_4096_bytes():
    assert sent(masked(1, b"a\nb\r\nc\rd\n")) == (["a", "b", "c", "d"], [])
    assert sent(masked(1, b"x" * 4096)) == (["x" * 4096], [])


@pytest.mark.parametrize(
    ("code", "frame"),
    [
        (1002, bytes.fromhex("810548656c6c6f")),  # not masked
        (1002, b"\xc1" + masked(1, b"x")[1:]),  # a reserved bit
        *[(1002, masked(opcode, b"x")) for opcode in (3, 11, 0)],  # none such; goes on with nothing
        (1002, masked(1, b"x", final=False) + masked(1, b"y")),  # a message in a message
        *[(1002, masked(9, b"x", final=False)), (1002, masked(9, b"x" * 126))],  # a control frame
        (1002, b"\x81\xfe\x00\x05" + masked(1, b"Hello")[2:]),  # a length in too many bytes
        (1002, b"\x81\xff\xff" + bytes(7)),  # or below zero
        *[(1002, masked(8, b"x")), (1002, masked(8, b"\x03\xed"))],  # half a code; 1005
        *[(1003, masked(2, b"x")), (1007, masked(1, b"\xff")), (1007, masked(8, b"\x03\xe8\xff"))],
        *[(1009, masked(1, b"x" * 4097)), (1009, masked(1, b"x" * 70_000)[:14])],
        (1009, masked(1, b"x" * 4000, final=False) + masked(0, b"x" * 97)),
    ],
)
def test_whoever_breaks_the_rules_is_told_which(code, frame):
    assert sent(frame, masked(1, b"never read")) == ([LEAVE], [(0x88, code.to_bytes(2, "big"))])


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x03\xe9going", b"\x0f\xa0"])
def test_a_close_is_answered_with_its_own_code(payload):
    assert sent(masked(8, payload)) == ([LEAVE], [(0x88, payload[:2])])


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


DAMAGED = st.builds(
    lambda at, what: OPENING[:at] + what + OPENING[at:],
    *(st.integers(0, len(OPENING)), st.binary(max_size=3)),
)
GOOD = [OPENING, b"\r\n" + OPENING, OPENING.replace(b"\r\n", b"\n"), request({}, "GET / HTTP/1.1")]
REQUESTS = st.sampled_from(GOOD) | st.binary(max_size=20) | DAMAGED


@given(REQUESTS, FRAMES, PLACES)
def test_however_a_browsers_bytes_are_cut_up_the_events_and_answers_are_the_same(
    head, frames, places
):
    data = head + frames
    assert events_of(WebWire(), *cut(data, places)) == events_of(WebWire(), *cut(data, []))


@given(st.binary(min_size=1, max_size=300))
def test_whatever_is_asked_gets_an_answer_or_is_waited_for(data):
    events, reply = events_of(WebWire(), data)
    assert events in ([], [LEAVE])
    assert not events or reply.startswith(b"HTTP/1.1 ")


@given(st.one_of(FRAMES, st.binary(max_size=200)))
def test_whatever_arrives_a_websocket_waits_or_is_closed_with_a_code_that_says_why(frames):
    events, replies = sent(frames)
    codes = [payload for first, payload in replies if first == 0x88]
    assert len(codes) == (1 if LEAVE in events else 0)
    for code in filter(None, codes):
        assert 1000 <= int.from_bytes(code, "big") < 5000
    assert all(first in (0x88, 0x8A) for first, _ in replies)


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_unmasking_is_a_xor_of_every_byte(payload, key):
    assert batchat.unmask(payload, key) == bytes(b ^ key[at % 4] for at, b in enumerate(payload))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_said_in_frames_is_one_text_frame_a_line(text):
    frames = frames_of(WebWire.encode(text))
    lines = text.split("\n")
    assert [payload.decode() for _, payload in frames] == (lines if lines[-1] else lines[:-1])
    assert {first for first, _ in frames} <= {0x81}


def test_a_browser_that_asks_for_nothing_within_ten_seconds_is_answered_408(worlds):
    world = worlds()
    browser = world.calls(WebWire, opens=False)
    browser.far.type(b"GET / HT")
    world.waits(9.9)
    assert not browser.far.got
    world.waits(1.2)
    assert browser.far.got.startswith(b"HTTP/1.1 408 Request Timeout\r\n")


# --------------------------------------------------------------------------
# Peers that vanish are found
# --------------------------------------------------------------------------


def test_the_system_asks_after_silent_peers_and_gives_them_up_within_two_minutes(our_end):
    assert our_end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 120_000}
    for name, value in idle.items():
        if hasattr(socket, name):
            assert our_end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_browsers_are_pinged_every_30_seconds_also_at_the_prompt_and_telnet_is_not(worlds):
    world = worlds()
    mike, ann, caller = world.joins("mike"), world.joins("ann", WebWire), world.calls(WebWire)
    world.waits(62.0)
    for each in (ann, caller):
        got = each.far.got.partition(b"\r\n\r\n")[2]
        assert [kind for kind, _ in frames_of(got)].count(0x89) == 2
    assert mike.reads().endswith("* ann has joined the chat\n")


# --------------------------------------------------------------------------
# The whole server, in a simulated network
# --------------------------------------------------------------------------

SLOW_LISTENERS = [
    *[("joins", "ann"), ("joins", "bob", WebWire), ("turn", 2, 0, BOUNDLESS)],
    *[("floods", 1, "/msg bob " + "p" * 80, 0, 0, 300), ("waits", 11.0)],
    *[("floods", 1, "x" * 80, 0, 0, 300), ("waits", 6.0)],
    *[("joins", "cy"), ("turn", 2, 0, BOUNDLESS)],
    *[("floods", 1, "x" * 80, 0, 0, 0), ("waits", 6.0)],
]
# Each call fails for somebody: who calls, stalls, talks beyond their measure, and leaves.
FAILING_CALLS = [
    step
    for call in CALLS
    for step in [
        ("joins", "ann", TelnetWire, "127.0.0.1", 1),
        ("call_fails", 0, call, errno.ENOMEM),
        ("turn", 2, 0, BOUNDLESS),
        ("takes", 0, 0, 0),
        ("says", 0, "/who", 1),
        ("turn", 2, 0, BOUNDLESS),
        ("takes", 0, BOUNDLESS, 0),
        ("says", 0, "x" * 80, 70),
        ("waits", 31.0),
        ("says", 0, "/quit", 1),
        ("ends", 0),
        ("waits", 6.0),
    ]
]

CTRL_C_IN_A_PASTE = [
    *[("joins", "ann", TelnetWire, "127.0.0.1", 1), ("turn", 2, 0, BOUNDLESS)],
    *[("says", 0, "x" * 80, 70), ("turn", 2, 0, BOUNDLESS), ("presses_ctrl_c", 0)],
]

TROLLS = [
    *[("joins", "ann", TelnetWire, "127.0.0.1", 1), ("joins", "bob", WebWire, "203.0.113.5", 1)],
    *[("joins", "cy", TelnetWire, "198.51.100.9", 1), ("joins", "eve", WebWire, "2001:db8::7", 1)],
    *[("turn", 2, 0, BOUNDLESS), ("says", 2, "x" * 80, 70), ("says", 3, "/op sesame", 1)],
    *[("says", 3, "/ban bob 2", 1), ("says", 3, "/ban cy 2", 1), ("says", 3, "/ban eve 2", 1)],
    *[("says", 3, "/kick eve get out", 1), ("turn", 2, 0, BOUNDLESS)],
    *[("joins", "Bob", WebWire, "203.0.113.5", 1), ("turn", 2, 0, BOUNDLESS)],
]


def test_whatever_the_network_does_everyone_reads_all_that_they_must_and_nothing_else():
    reached: Counter[str] = Counter()

    @settings(max_examples=1000)
    @example((Settings(0, 9, 0, password=SESAME), 0.0, SLOW_LISTENERS, "all hang up"))
    @example((Settings(10, 9, 0, password=SESAME), 0.0, FAILING_CALLS, "all hang up"))
    @example((Settings(10, 9, 0, 9, password=SESAME), 0.0, TROLLS, "all hang up"))
    @example((Settings(10, 9, 0, password=SESAME), 0.0, CTRL_C_IN_A_PASTE, "all hang up"))
    @given(WORLDS)
    def runs(how):
        reached.update(simulate(*how).reached)

    runs()
    assert {*DISMISSALS, "too far behind", "held", "paced", "interrupted"} <= reached.keys()
    assert {"too much to read", "thrown out", "too many bans"} <= reached.keys()
    assert {f"{call} fails" for call in [*CALLS, "accept"]} <= reached.keys()


# --------------------------------------------------------------------------
# The soak: `pytest -m soak`
# --------------------------------------------------------------------------


def pytest_addoption(parser) -> None:
    parser.addoption("--soak-minutes", type=float, default=1, help="how long -m soak takes")


@pytest.mark.soak
def test_soak_in_the_simulated_network(pytestconfig, capsys):
    seconds = pytestconfig.getoption("--soak-minutes") * 60
    start = time.monotonic()
    tally: Counter[str] = Counter()

    @settings(max_examples=500, derandomize=False)
    @given(WORLDS)
    def some_runs(how):
        world = simulate(*how)
        tally.update(runs=1, steps=len(how[2]), faults=world.faults, seconds=world.now - START)

    while time.monotonic() < start + seconds:
        some_runs()
        hours = tally["seconds"] / 3600
        with capsys.disabled():
            print(
                f"\r{tally['runs']} runs, {tally['steps']} steps, {tally['faults']} faults injected,"
                f" {hours:.1f} simulated hours",
                end="",
                flush=True,
            )


class Crowd:
    """200 people who come and go at random, over real sockets."""

    def __init__(self, house: House, seed: int) -> None:
        self.house = house
        self.random = random.Random(seed)
        self.most = 0  # people in the room at a time
        self.reached: Counter[str] = Counter()

    def stirs(self) -> None:
        """Somebody does something."""
        house, chance = self.house, self.random.random
        if len(house.callers) < 200:
            name = f"p{self.random.randrange(1000)}"
            if chance() < 0.5:
                house.calls(line_on(TelnetWire, name), buffer=4096 if chance() < 0.1 else 0)
            else:
                house.calls(OPENING + line_on(WebWire, name), WebWire)
        caller = self.random.choice(house.callers)
        what = chance()
        with contextlib.suppress(OSError):  # we ended it already, or our buffers are full
            if what < 0.02:
                caller.sock.close()
            elif what < 0.03:
                linger = struct.pack("ii", 1, 0)
                caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                caller.sock.close()  # which makes it a reset
            elif what < 0.04:
                caller.sock.shutdown(socket.SHUT_WR)
            elif what < 0.1:
                caller.reading = not caller.reading
            else:
                times = 100 if what < 0.11 else 1
                caller.sock.send(line_on(caller.wire, self.random.choice(CHAT)) * times)
        house.callers = [each for each in house.callers if each.sock.fileno() >= 0]

    def goes_on(self, seconds: float) -> None:
        house, reactor, end = self.house, self.house.reactor, time.monotonic() + seconds
        while time.monotonic() < end:
            self.stirs()
            house.now += 0.01
            house.turns()
            self.most = max(self.most, len(reactor.chat.people))
            paced = [each for each in reactor.in_line if each.bucket.ready_at > reactor.now]
            states = {"held": reactor.held, "slow": reactor.slow, "paced": paced}
            self.reached.update(state for state, so in states.items() if so)
        for caller in house.callers:
            caller.sock.close()
        house.callers.clear()
        for _ in range(100):  # what they have sent is still said, at its pace
            house.waits(1.0)
        assert reactor.selector.get_map().keys() == {door.fileno() for door in reactor.doors}
        assert_nothing_is_kept(reactor)


def kept() -> tuple[int, int]:
    """The descriptors that this process holds, and its blocks of memory."""
    gc.collect()
    return len(os.listdir("/dev/fd")), getattr(sys, "getallocatedblocks", int)()


@pytest.mark.soak
def test_200_people_who_come_and_go_for_a_minute_leave_nothing_behind(houses, monkeypatch):
    for name, value in SMALL_LIMITS.items():
        monkeypatch.setattr(batchat, name, value)
    small = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)]
    monkeypatch.setattr(batchat, "SOCKET_OPTIONS", small)
    house, seed = houses(max_per_address=0), time.time_ns()
    print(f"seed: {seed}")
    crowd = Crowd(house, seed)
    crowd.goes_on(5)
    descriptors, blocks = kept()
    crowd.goes_on(60)
    after = kept()
    assert after[0] == descriptors
    assert after[1] < blocks + 1000
    assert crowd.most > 150
    assert crowd.reached.keys() == {"held", "slow", "paced"}


# --------------------------------------------------------------------------
# The page, in Chromium
# --------------------------------------------------------------------------


def test_people_in_chromium_and_in_telnet_talk_in_one_room(chromium, jonny):
    assert "".join(f"{line}\n" for line in chromium.finds(".banner", "textContent")) == (
        batchat.BANNER
    )
    chromium.types("hey everyone!" + ENTER)
    jonny.reads("<mike> hey everyone!\n")
    chromium.shows("<mike> hey everyone!")
    jonny.types("<b>bold</b> <script>document.title = 'hacked'</script> &amp;", "/me waves")
    jonny.types("/msg mike psst")
    chromium.shows("<jonny> <b>bold</b> <script>document.title = 'hacked'</script> &amp;")
    chromium.shows("** jonny waves")
    chromium.shows("[jonny -> you] psst")
    assert chromium.finds("main p", "className")[-3:] == ["said", "action", "private"]
    assert len(set(chromium.finds(".name", "style.cssText"))) == 1
    chromium.titled("BATCHAT")
    assert chromium.complaints() == []


def test_who_has_scrolled_up_is_not_moved_and_sees_how_many_lines_are_new(chromium, jonny):
    jonny.types(*["line"] * 40)
    wait_until(lambda: len(chromium.finds("main p .name", "textContent")) == 40)
    chromium.does("document.querySelector('main').scrollTop = 0")
    jonny.types("one more")
    chromium.shows("1 new line")
    assert chromium.finds("main", "scrollTop") == [0]
    chromium.does("document.querySelector('#more').click()")
    wait_until(lambda: chromium.finds("#more", "hidden") == [True])
    assert chromium.finds("main", "scrollTop")[0] > 0


def test_while_the_tab_is_hidden_the_title_counts_the_lines_that_nobody_has_seen(chromium, jonny):
    hide = "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
    chromium.does(hide)
    jonny.types("psst", "hey")
    chromium.titled("(2) BATCHAT")
    chromium.does("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    chromium.titled("BATCHAT")


def test_a_paste_of_many_lines_is_many_lines(chromium, jonny):
    chromium.types("say ")
    chromium.does(
        "const clipboardData = new DataTransfer();"
        "clipboardData.setData('text', 'one\\ntwo\\nthree');"
        "const paste = {clipboardData, bubbles: true, cancelable: true};"
        "document.activeElement.dispatchEvent(new ClipboardEvent('paste', paste));"
    )
    chromium.types("!" + ENTER)
    jonny.reads("<mike> say one\n<mike> two\n<mike> three!\n")


def test_a_line_that_is_too_long_is_explained_and_not_sent(chromium, jonny):
    chromium.does("document.querySelector('input').value = '\u00e9'.repeat(2049)")
    chromium.types(ENTER)
    chromium.shows("* A line has at most 4096 bytes; yours was not sent.")
    assert chromium.does("return state") == "chatting"


def test_when_the_server_comes_back_the_page_does_so_with_its_name(chromium):
    with Server("--web-port", "0") as server:
        chromium.joins(server, "mike")
        server.process.kill()
        server.process.wait()
        chromium.shows("The line is lost.")
    same_ports = ["--port", str(server.port), "--web-port", str(server.web_port)]
    with Server(*same_ports) as server:
        wait_until(lambda: chromium.does("return state") == "chatting")
        assert len(chromium.finds(".banner", "textContent")) == 7  # no second one
        server.join("jonny")
        chromium.shows("* jonny has joined the chat")
        assert all("WebSocket connection" in each for each in chromium.complaints())


def test_the_page_shows_what_was_said_before_but_no_line_twice_nor_as_unread(chromium):
    with Server("--web-port", "0", "--history", "9") as server:
        ann = server.join("ann")
        ann.types("hi", "hi", "hello")
        chromium.joins(server, "mike")
        chromium.shows(batchat.NOW.strip())
        past = [line[5:] for line in chromium.finds(".past", "textContent")[1:-1]]
        assert past == ["<ann> hi", "<ann> hi", "<ann> hello"]
        ann.reads("* mike has joined the chat\n")
        chromium.types(f"mine{ENTER}/me waves{ENTER}")
        ann.reads("<mike> mine\n** mike waves\n")
        ann.types("hi", "so")
        chromium.shows("<ann> so")
        chromium.does(LOSE_THE_LINE)
        ann.reads("* mike has quit the chat\n")
        ann.types("hi", "where are you?")
        chromium.does(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
        )
        chromium.does("again()")
        chromium.shows("where are you?")
        past = [line[5:] for line in chromium.finds(".past", "textContent")[6:-1]]
        assert past == ["<ann> hi", "<ann> where are you?"]
        chromium.titled("(2) BATCHAT")  # "Hey, mike!" and its empty line


def test_while_somebody_else_has_its_name_the_page_tries_again_until_it_is_free(chromium, jonny):
    chromium.does(LOSE_THE_LINE)
    jonny.reads("* mike has quit the chat\n")
    chromium.shows("Trying again in 1 s.")
    jonny.types("/nick mike")
    jonny.reads("* jonny is now known as mike\n")
    chromium.does("again()")
    chromium.shows("Trying again in 2 s.")
    jonny.types("/nick jonny")
    jonny.reads("* mike is now known as jonny\n")
    chromium.does("again()")
    jonny.reads("* mike has joined the chat\n")


def test_who_has_left_joins_again_with_enter(chromium, jonny):
    chromium.types("/nick mick" + ENTER)
    jonny.reads("* mike is now known as mick\n")
    chromium.types("/quit" + ENTER)
    jonny.reads("* mick has quit the chat\n")
    chromium.shows("You have left. Press Enter to join again.")
    chromium.types(ENTER)
    wait_until(lambda: chromium.does("return state") == "chatting")
    chromium.types("ann" + ENTER)
    jonny.reads("* ann has joined the chat\n")


# And come back when `again` is called.
LOSE_THE_LINE = (
    "const timer = window.setTimeout;"
    "window.setTimeout = (what, ms) => ms < 1000 ? timer(what, ms) : (window.again = what);"
    "socket.close()"
)
AT_END = "log.scrollHeight - log.scrollTop - log.clientHeight < 40"


def test_lines_that_arrive_together_are_painted_together_and_only_the_last_are_kept(
    chromium, jonny
):
    painted = chromium.does(
        "const before = lines.childElementCount;"
        "for (let n = 0; n < 12000; n += 1) receive(`<jonny> line ${n}`);"
        "return [lines.childElementCount - before, queue.length];"
    )
    assert painted == [0, 5000]
    chromium.shows("line 11999")
    assert chromium.does("return [lines.childElementCount, queue.length]") == [5000, 0]
    assert chromium.does("return " + AT_END)


def test_a_line_of_many_links_or_many_long_lines_do_not_fill_the_browser(chromium, jonny):
    chromium.does("receive('<jonny> ' + 'http://a '.repeat(400))")
    chromium.is_true("lines.lastChild.querySelectorAll('a').length === 10")
    assert chromium.does("return lines.lastChild.childNodes.length") < 30
    chromium.does("for (let n = 0; n < 1000; n += 1) receive(`<jonny> ${n} ` + 'x'.repeat(4000))")
    chromium.is_true("lines.lastChild.textContent.includes('<jonny> 999 ')")
    assert chromium.does("return lines.textContent.length") <= 500_000


def test_whoever_is_at_the_end_stays_there_whatever_changes_the_size(chromium, jonny):
    jonny.types(*[f"line {n}" for n in range(49)])
    chromium.shows("line 48")
    for height in (300, 700, 400):
        chromium.sized(390, height)
        chromium.is_true(f"innerHeight === {height} && {AT_END}")
    chromium.does("tell('a status\\nof more\\nthan one row')")
    chromium.is_true(AT_END)
    chromium.does("log.scrollTop = 100")
    chromium.is_true("!following")
    chromium.sized(390, 300)
    chromium.is_true("innerHeight === 300")
    assert chromium.does("return log.scrollTop") == 100
    chromium.types(f"mine{ENTER}")  # what one says oneself is always in sight
    chromium.is_true(AT_END)
    chromium.sized(800, 500)


def test_the_first_screen_says_what_to_do(chromium):
    with Server("--web-port", "0") as server:
        chromium._ask("POST", "/url", url=f"http://localhost:{server.web_port}/")
        chromium.shows(batchat.PROMPT.strip())
        assert chromium.does("return input.placeholder") == "Your name"
        between = (
            "input.getBoundingClientRect().top - lines.lastChild.getBoundingClientRect().bottom"
        )
        assert 0 <= chromium.does("return " + between) < 50
        assert set(chromium.finds(".banner", "ariaHidden")) == {"true"}
        chromium.types("mike")
        chromium.does("find('form button').click()")
        chromium.shows(hey("mike").strip())
        assert chromium.does("return input.placeholder") == "Say something, or /help"
        assert chromium.finds("form button", "ariaLabel") == ["Send"]


def test_each_line_has_its_time_and_name_and_hangs_in(chromium, jonny):
    jonny.types("hi")
    chromium.types(f"{ENTER} {ENTER}hello{ENTER}")  # blank lines are not said
    chromium.shows("<mike> hello")
    assert len(chromium.finds(".own", "textContent")) == 2  # with the name
    for kind, name in (("said", "jonny"), ("own", "mike")):
        line = f"[...document.querySelectorAll('.{kind}')].pop()"
        time_of = chromium.does(f"return {line}.querySelector('time').dateTime")
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", time_of)
        assert re.fullmatch(
            r"\d\d:\d\d", chromium.does(f"return {line}.querySelector('time').innerText")
        )
        assert chromium.does(f"return {line}.querySelector('bdi').textContent") == name
        style = chromium.does(
            f"const style = getComputedStyle({line});"
            "return [style.textIndent, style.paddingLeft, style.overflowX, style.boxShadow]"
        )
        assert style[0].startswith("-")
        assert float(style[1][:-2]) > -float(style[0][:-2])
        assert style[2] == "clip"
        assert (style[3] != "none") == (kind == "own")


@pytest.mark.parametrize(
    ("said", "links"),
    [
        (
            "see https://example.com/a?b=c#d.",
            {"https://example.com/a?b=c#d": "https://example.com/a?b=c#d"},
        ),
        ("(http://example.com/x), and", {"http://example.com/x": "http://example.com/x"}),
        ("javascript:alert(1) ftp://x.example data:text/html,x", {}),
        ("https://user:secret@example.com/ https://good.example@evil.example", {}),
        ("<img src=x onerror=alert(1)> https://", {}),
        (
            "https://b\u00fccher.example/",
            {"https://b\u00fccher.example/": "https://xn--bcher-kva.example/"},
        ),
    ],
)
def test_links_can_be_clicked_and_go_where_they_seem_to(chromium, jonny, said, links):
    jonny.types(said)
    chromium.is_true(f"lines.lastChild.textContent.includes({json.dumps(said[:12])})")
    found = chromium.finds(".said:last-child a", "textContent")
    assert dict(zip(found, chromium.finds(".said:last-child a", "href"))) == links
    assert {*chromium.finds(".said:last-child a", "rel")} <= {"noopener noreferrer nofollow"}
    assert {*chromium.finds(".said:last-child a", "target")} <= {"_blank"}
    shown = chromium.does("return lines.lastChild.textContent")
    assert ("(xn--bcher-kva.example)" in shown) == ("\u00fc" in said)
    assert not chromium.finds("img", "src")


def test_who_is_here_is_counted_and_listed_and_a_click_whispers_to_one(chromium, jonny):
    chromium.is_true("find('summary').textContent === '2 here'")
    assert "2 here: " not in chromium.does("return lines.innerText")  # which it asked by itself
    jonny.types("/nick john")
    chromium.does("who.open = true")
    chromium.is_true("names.innerText === 'john\\nmike'")
    chromium.does("find('li button').click()")
    assert chromium.does("return [input.value, who.open, document.activeElement.id]") == [
        *("/msg john ", False, "line")
    ]
    chromium.does("input.value = ''")
    chromium.types(f"/who{ENTER}")
    chromium.shows("* 2 here: john, mike")
    jonny.types("/quit")
    chromium.is_true("find('summary').textContent === '1 here'")


def test_arrows_go_through_what_one_said_and_tab_completes_names_and_escape_closes(chromium, jonny):
    chromium.is_true("present.size === 2")
    chromium.types(f"one{ENTER}two{ENTER}{UP}{UP}")
    assert chromium.does("return input.value") == "one"
    chromium.types(DOWN)
    assert chromium.does("return input.value") == "two"
    chromium.types(f"{DOWN}jo{TAB}")
    assert chromium.does("return input.value") == "jonny: "
    chromium.types(f"ask Jo{TAB}")
    assert chromium.does("return input.value") == "jonny: ask jonny "
    chromium.does("who.open = true")
    chromium.types(ESCAPE)
    assert not chromium.does("return who.open")
    chromium.types(f"nobody{TAB}")
    assert chromium.does("return document.activeElement.id") != "line"


def test_a_line_with_ones_own_name_is_marked_and_the_title_of_a_hidden_tab_says_so(chromium, jonny):
    chromium.does("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    jonny.types("mikes are not meant", "but MIKE, you are")
    chromium.titled("(@2) BATCHAT")
    assert [text[5:] for text in chromium.finds(".mention", "textContent")] == [
        "<jonny> but MIKE, you are"
    ]


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_colour_can_be_read_on_its_paper_in_light_and_in_dark():
    light, dark = [
        dict(re.findall(r"--(\w+): (#\w{6})", part))
        for part in batchat.STYLE.split("@media", 2)[:2]
    ]
    assert light.keys() == dark.keys()
    for colours in (light, dark):
        papers = [luminance(colours["paper"]), luminance(colours["mark"])]
        for colour in {*colours} - {"paper", "mark", "rule"}:
            for paper in papers:
                low, high = sorted([luminance(colours[colour]), paper])
                assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_the_names_of_five_people_who_talk_have_five_colours(chromium, jonny):
    chromium.does("for (const one of 'ann bob cy dan eve'.split(' ')) receive(`<${one}> hi`)")
    chromium.shows("<eve> hi")
    assert len({*chromium.finds(".said bdi", "className")}) >= 5


def test_who_was_idle_at_the_prompt_gives_their_name_with_enter(chromium):
    with Server("--web-port", "0") as server:
        chromium._ask("POST", "/url", url=f"http://localhost:{server.web_port}/")
        chromium.shows(batchat.PROMPT.strip())
        chromium.does("socket.onclose({code: 1000}); socket.onclose = null; socket.close()")
        chromium.shows("Press Enter to join again.")
        chromium.types(f"mike{ENTER}")
        chromium.shows(hey("mike").strip())


def test_a_name_outlives_a_reload_and_is_asked_for_again_when_it_is_taken(chromium, jonny):
    chromium._ask("POST", "/refresh")
    jonny.reads("* mike has quit the chat\n* mike has joined the chat\n")
    chromium.does("sessionStorage.setItem('name', 'jonny')")
    chromium._ask("POST", "/refresh")
    chromium.shows("* The name jonny is taken.")
    chromium.types(f"mick{ENTER}")
    chromium.shows(hey("mick").strip())


def test_help_can_be_read_on_a_phone(chromium, jonny):
    chromium.sized(390, 844)
    chromium.types(f"/help{ENTER}")
    chromium.shows("leave the chat")
    assert chromium.does("return lines.scrollWidth <= lines.clientWidth")
    tops = chromium.finds(".command", "getBoundingClientRect().top")
    assert all(a < b for a, b in zip(tops, chromium.finds(".does", "getBoundingClientRect().top")))
    assert all(each < 40 for each in chromium.finds(".command", "getBoundingClientRect().height"))
    chromium.sized(800, 500)


def test_the_page_is_sent_small_where_that_is_taken_and_not_at_all_where_it_is_known():
    for accepts, zipped in [
        ("gzip, br", True),
        (None, False),
        ("br", False),
        ("gzip;q=0", False),
        ("GZip; q=0.5", True),
        ("not-gzip", False),
    ]:
        status, headers, body = asked(request({"Accept-Encoding": accepts}, "GET / HTTP/1.1"))
        assert (status, headers.get("Content-Encoding")) == (200, "gzip" if zipped else None)
        assert (gzip.decompress(body) if zipped else body).decode() == batchat.PAGE
        assert len(body) < 12_000 or not zipped
        assert headers["Vary"] == "Accept-Encoding"
    etag = headers["ETag"]
    for known in (etag, f'"other", {etag}', "*"):
        status, headers, body = asked(request({"If-None-Match": known}, "GET / HTTP/1.1"))
        assert (status, body, headers["ETag"]) == (304, b"", etag)
        assert "Content-Length" not in headers
    assert asked(request({"If-None-Match": '"other"'}, "GET / HTTP/1.1"))[0] == 200


# --------------------------------------------------------------------------
# python bench/fanout.py
# --------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    """A copy of the benchmark, which finds no other servers, as a command."""
    (tmp_path / "bench").mkdir()
    shutil.copy(BATCHAT, tmp_path)
    shutil.copy(BATCHAT.parent / "bench" / "fanout.py", tmp_path / "bench")
    program = [sys.executable, str(tmp_path / "bench" / "fanout.py")]
    return [*program, "--people", "20", "--talkers", "2", "--repeat", "1"]


def servers_of(bench: list[str]) -> list[Path]:
    """The processes that run the copy of BATCHAT beside that benchmark."""
    program = os.fsencode(Path(bench[1]).parent.parent / "batchat.py")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if program in (process / "cmdline").read_bytes().split(b"\0")[:3]:
                found.append(process)
    return found


def test_the_benchmark_prints_a_row_for_every_load_and_says_what_is_missing(bench, tmp_path):
    command = [*bench, "--seconds", "0.2", "--peers", "batchat", "nats"]
    done = subprocess.run(
        command, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=True
    )
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_benchmark_ends_its_servers_however_it_ends_itself(bench, number):
    with subprocess.Popen(
        [*bench, "--seconds", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: servers_of(bench))
        process.send_signal(number)
    wait_until(lambda: not servers_of(bench))
