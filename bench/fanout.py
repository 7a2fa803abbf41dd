#!/usr/bin/env python3
"""How fast BATCHAT fans lines out, beside the chat and pub/sub servers on this machine.

    python bench/fanout.py                  everything that is on the PATH; some minutes
    python bench/fanout.py --peers batchat redis --repeat 5

Each server gets the same three loads, in turn, on a process of its own:

    one at a time   one line, and the next when everyone has it
    flat out        the talkers say as much as they can, with 1,000 lines in flight
    one stalls      ten people, of whom one talks flat out and one reads nothing
    growth          one at a time, for BATCHAT alone, among more and more people

It prints one table of medians as Markdown, and draws it as `fanout.svg` beside
this file.  It talks to loopback addresses alone, and ends every process that it
started.

A line is delivered when the slowest of those who only listen has it; the first
line that they get counts as the first that was said, and so on.  Listeners count
bytes, not lines, for that costs them least: a server sends all lines equally
long (but for ncat), and a line said before the load tells how long.  One listener
keeps what it reads, and in the end looks for every line.

A server that loses lines is waited for in vain, which counts as time, too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import math
import os
import platform
import re
import resource
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Tuple

BENCH = Path(__file__).resolve().parent
HOST = "127.0.0.1"
TEXT_SIZE = 32  # bytes of text in a line, its number included
IN_FLIGHT = 1000  # lines that are said and not yet delivered, when people talk flat out
BURST = 256  # lines that are said, before what was delivered is read
MARK = b"^"  # ends every text, and is nowhere else
JOIN_SECONDS = 60.0  # for everyone to come in, or for all that is owed to come
PATIENCE = 8.0  # seconds without a delivery, until the rest counts as lost
STALLED_BUFFER = 4096  # bytes that the system may keep for a listener who reads nothing
GROWTH = (10, 100, 1000, 5000)  # people, for how BATCHAT grows
SATURATED = 0.95  # of the time busy: a client that could not have done more


# ------------
# The servers
# ------------


Take = Callable[[memoryview], int]
Dialogue = List[Tuple[bytes, bytes]]  # what to say, and what to read before going on


class Server:
    """A server: how to start it, to join it and to say a line."""

    name = program = ""
    bus = False  # those who talk do not listen
    echo = False  # those who talk hear themselves
    equal_lines = True  # on the wire, all are equally long
    join_batch = 100  # people who come in side by side
    settle_seconds = 0.3  # of silence, after all have joined
    configuration = ""

    def command(self, folder: Path, port: int) -> list[str]:
        raise NotImplementedError

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        """How to come in."""
        return []

    def line(self, text: bytes) -> bytes:
        return text + b"\n"

    def configure(self, folder: Path, port: int) -> str:
        """Write the configuration; returns where."""
        file = folder / "server.conf"
        file.write_text(self.configuration.format(host=HOST, port=port, folder=folder))
        file.chmod(0o644)
        return str(file)


def expect(person: socket.socket, marker: bytes) -> None:
    """Read until `marker` comes; raises OSError where it does not."""
    seen = b""
    while marker not in seen:
        data = person.recv(1 << 16)
        if not data:
            raise ConnectionError("hung up")
        seen = seen[-len(marker) :] + data


class Batchat(Server):
    name, program = "BATCHAT", sys.executable

    def listeners(self, port: int) -> list[str]:
        return ["--port", str(port), "--no-web"]

    def command(self, folder: Path, port: int) -> list[str]:
        options = ["--host", HOST, *self.listeners(port), "--rate", "0"]
        return [self.program, str(BENCH.parent / "batchat.py"), *options]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        return [(b"", b"enter: "), (name.encode() + b"\n", b"enjoy the chat")]


OPENING = (
    f"GET /chat HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
).encode()


def frame(text: bytes) -> bytes:
    """A short text message as a client sends it, masked with zeros (RFC 6455, section 5.2)."""
    return bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text


class WebServer(Server):
    def line(self, text: bytes) -> bytes:
        return frame(text)


class BatchatWeb(WebServer, Batchat):
    name = "BATCHAT, web"
    equal_lines = False  # they hold the event's number
    echo = True

    def listeners(self, port: int) -> list[str]:
        return ["--port", "0", "--web-port", str(port)]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        return [(OPENING, b'"type":"prompt"'), (frame(name.encode()), b'"type":"welcome"')]


# As its documentation has it for a broadcast, without compression, which costs more.
WEBSOCKETS_SERVER = """
import asyncio, sys, websockets
people = set()

async def talk(person):
    people.add(person)
    await person.send("joined")
    try:
        async for text in person:
            websockets.broadcast(people - {person}, text)
    finally:
        people.discard(person)

async def main():
    where = sys.argv[1], int(sys.argv[2])
    async with websockets.serve(talk, *where, compression=None, backlog=1000):
        await asyncio.Future()

asyncio.run(main())
"""


class Websockets(WebServer):
    name = "websockets, web"
    program = sys.executable if importlib.util.find_spec("websockets") else "websockets"

    def command(self, folder: Path, port: int) -> list[str]:
        return [self.program, "-c", WEBSOCKETS_SERVER, HOST, str(port)]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        return [(OPENING, b"joined")]


class Ncat(Server):
    name = program = "ncat"
    equal_lines = False  # it says who speaks once for all that it reads at once
    join_batch = 10  # it has no more clients wait

    def command(self, folder: Path, port: int) -> list[str]:
        options = ["--chat", "--nodns", "--max-conns", "10000"]
        return [self.program, "--listen", HOST, str(port), *options]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        return [(b"", b"already connected: ")]


class Irc(Server):
    def dialogue(self, name: str, listens: bool) -> Dialogue:
        hello = f"NICK {name}\r\nUSER {name} 0 * :{name}\r\n".encode()
        return [(hello, b" 001 "), (b"JOIN #c\r\n", b" 366 ")]

    def line(self, text: bytes) -> bytes:
        return b"PRIVMSG #c :" + text + b"\r\n"


class Ngircd(Irc):
    name = program = "ngircd"
    configuration = """
[Global]
Name = irc.local
Listen = {host}
Ports = {port}
[Limits]
MaxConnections = 0
MaxConnectionsIP = 0
MaxJoins = 0
MaxPenaltyTime = 0
PingTimeout = 3600
[Options]
DNS = no
Ident = no
PAM = no
"""

    def command(self, folder: Path, port: int) -> list[str]:
        return [self.program, "--nodaemon", "--config", self.configure(folder, port)]


class Inspircd(Irc):
    name = program = "inspircd"
    join_batch = 500  # it looks for news once a second
    configuration = """
<config format="xml">
<server name="irc.local" description="bench" network="bench" id="1AB">
<admin name="bench" nick="bench" email="bench@irc.local">
<bind address="{host}" port="{port}" type="clients">
<connect allow="*" timeout="60" pingfreq="1h" threshold="1000000000" commandrate="1000000000"
 fakelag="no" hardsendq="8M" softsendq="8M" recvq="1M" localmax="100000" globalmax="100000"
 maxconnwarn="no" resolvehostnames="no" useident="no" limit="100000">
<performance somaxconn="1024" softlimit="100000">
<pid file="{folder}/pid">
"""

    def command(self, folder: Path, port: int) -> list[str]:
        as_root = ["--runasroot"] if os.geteuid() == 0 else []
        file = self.configure(folder, port)
        return [self.program, "--nofork", "--nolog", f"--config={file}", *as_root]


class Redis(Server):
    name, program, bus = "redis", "redis-server", True
    configuration = """
bind {host}
port {port}
save ""
appendonly no
maxclients 100000
dir {folder}
"""

    def command(self, folder: Path, port: int) -> list[str]:
        return [self.program, self.configure(folder, port)]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        return [(b"SUBSCRIBE c\r\n", b":1\r\n")] if listens else []

    def line(self, text: bytes) -> bytes:
        return b"PUBLISH c " + text + b"\r\n"


class Nats(Server):
    name, program, bus = "nats", "nats-server", True
    settle_seconds = 3.0  # it pings everyone about two seconds after they came
    configuration = """
host: {host}
port: {port}
max_connections: 100000
ping_interval: "1h"
"""

    def command(self, folder: Path, port: int) -> list[str]:
        return [self.program, "-c", self.configure(folder, port)]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        subscribe = b"SUB c 1\r\n" if listens else b""
        hello = b'CONNECT {"verbose":false}\r\n' + subscribe + b"PING\r\n"
        return [(b"", b"\r\n"), (hello, b"PONG\r\n")]

    def line(self, text: bytes) -> bytes:
        return b"PUB c %d\r\n%s\r\n" % (len(text), text)


KINDS = (Batchat, BatchatWeb, Redis, Nats, Ngircd, Inspircd, Ncat, Websockets)
SERVERS = {kind.__name__.lower(): kind() for kind in KINDS}


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


# When its input ends, that is, when we do, the shell ends itself and all that it started.
WATCHED = '"$@" </dev/null >log 2>&1 & echo $!; read line; kill -9 0'


@contextlib.contextmanager
def started(server: Server) -> Iterator[tuple[int, int]]:
    """Run a server for a while; gives its port and its process; raises OSError."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # a server that gives up being root must still read it
        command = ["/bin/sh", "-c", WATCHED, "sh", *server.command(folder, port)]
        watch = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches us alone, and that kill only them
        )
        assert watch.stdin
        assert watch.stdout
        try:
            pid = int(watch.stdout.readline())
            give_up = time.monotonic() + 10
            while True:
                try:
                    with socket.create_connection((HOST, port), timeout=PATIENCE) as first:
                        for say, marker in server.dialogue("first", listens=True):
                            first.sendall(say)
                            expect(first, marker)
                    break
                except OSError:
                    if time.monotonic() > give_up:
                        said = (folder / "log").read_text(errors="replace").strip()
                        raise OSError(f"did not start: {said[-200:]}") from None
                    time.sleep(0.05)
            yield port, pid
        finally:
            watch.stdin.close()
            watch.stdout.close()
            watch.wait()


def cpu_seconds(pid: int) -> float:
    """What a process has used so far; NaN where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_megabytes(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else float("nan")


# ------------
# The load
# ------------


class Load(NamedTuple):
    """What people do."""

    name: str
    people: int
    talkers: int
    in_flight: int  # lines that are said and not yet delivered, at most
    seconds: float  # that they talk
    stalled: bool = False  # one of them reads nothing


class Result(NamedTuple):
    """What came of it; of several, the medians, but for `lost`."""

    deliveries: float  # a second
    cpu: float  # microseconds of the server for a delivery
    peak: float  # megabytes that the server took at most
    p50: float  # milliseconds until the last listener has a line
    p99: float
    longest: float
    lost: int  # lines, over all listeners
    client_busy: float  # the part of the time that this side had something to do


def marks(read: memoryview) -> int:
    """How many texts end there; -1 for none, since 0 is the end of the stream."""
    return len(read) and (bytes(read).count(MARK) or -1)


class Crowd:
    """Everyone who is connected to one server."""

    def __init__(self, server: Server, people: int) -> None:
        self.server = server
        self.selector = selectors.DefaultSelector()
        self.buffer = memoryview(bytearray(1 << 18))
        self.everyone: list[socket.socket] = []
        self.talkers: list[socket.socket] = []
        self.stalled: socket.socket | None = None
        self.hearers = 0  # those who get a line: nobody hears themselves, nor talkers on a bus
        self.line_size = 0  # bytes of a line, as they get it
        self.received = 0  # bytes, by all
        # Bytes, by each of those who only listen; nobody waits for the others.
        self.heard = [math.inf] * people
        self.witnessed = bytearray()  # what the first of them read
        self.dropped = 0  # people
        self.said = 0  # lines
        self.unsent: dict[int, bytes] = {}  # what talkers have said and could not send yet

    def join(self, port: int, load: Load) -> None:
        """Connect everyone, and say a first line; raises OSError where that does not work."""
        size = self.server.join_batch
        give_up = time.monotonic() + JOIN_SECONDS
        for first in range(0, load.people, size):
            if time.monotonic() > give_up:
                raise OSError(f"lets in {first} people in {JOIN_SECONDS:.0f} s")
            try:
                self._join_together(port, range(first, min(first + size, load.people)), load)
            except OSError as error:
                raise OSError(f"lets in about {first} people: {error}") from None
        if not (self.server.bus or self.server.echo):
            self.hearers -= 1
        self.settle()
        self.start_counting()
        self.say(0)
        self.settle()
        self.line_size, rest = divmod(self.received, max(self.hearers, 1))
        if rest or not self.line_size:
            raise OSError("not everyone heard the first line alike")

    def _join_together(self, port: int, numbers: range, load: Load) -> None:
        """Take some people through the server's dialogue, side by side."""
        batch = [self._connect(port, number, load) for number in numbers]
        dialogues = [dialogue for _, dialogue in batch]
        for steps in itertools.zip_longest(*dialogues, fillvalue=(b"", b"")):
            for (person, _), (say, _) in zip(batch, steps):
                person.sendall(say)
            for (person, _), (_, marker) in zip(batch, steps):
                expect(person, marker)
        for person, _ in batch:
            person.setblocking(False)
        self.read(0)

    def _connect(self, port: int, number: int, load: Load) -> tuple[socket.socket, Dialogue]:
        """Connect somebody; returns how they come in."""
        half = load.people // 2  # ncat names people by number, and the talkers' are of one length
        talks = half <= number < half + load.talkers
        stalls = load.stalled and number == load.people - 1
        listens = not (talks and self.server.bus)
        person = socket.socket()
        self.everyone.append(person)
        if stalls:
            person.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STALLED_BUFFER)
        person.settimeout(PATIENCE)
        person.connect((HOST, port))
        person.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if stalls:
            self.stalled = person
        else:
            self.hearers += listens
            if talks:
                self.talkers.append(person)
            else:
                self.heard[number] = 0
            take = self._how_to_take(person, listens, witness=not number)
            self.selector.register(person, selectors.EVENT_READ, (take, number))
        return person, self.server.dialogue(f"p{number:05}", listens)

    def _how_to_take(self, person: socket.socket, listens: bool, witness: bool) -> Take:
        """What reads from a socket; it returns what that counts, and 0 at the end alone."""

        def ignore(buffer: memoryview) -> int:  # what a bus answers to those who talk
            return -1 if person.recv_into(buffer) else 0

        def keep(buffer: memoryview) -> int:
            size = person.recv_into(buffer)
            self.witnessed += buffer[:size]
            return size if self.server.equal_lines else marks(buffer[:size])

        def count_marks(buffer: memoryview) -> int:
            return marks(buffer[: person.recv_into(buffer)])

        if not listens:
            return ignore
        if witness:
            return keep
        return person.recv_into if self.server.equal_lines else count_marks

    def start_counting(self) -> None:
        """Forget what was received so far."""
        self.received = 0
        self.heard = [0 if size < math.inf else size for size in self.heard]

    def read(self, timeout: float) -> bool:
        """Take all that is there; whether there was anything."""
        received, buffer, heard = 0, self.buffer, self.heard
        ready = self.selector.select(timeout)
        for key, _ in ready:
            take, number = key.data
            try:
                size = take(buffer)
            except OSError:
                size = 0
            if size > 0:
                received += size
                heard[number] += size
            elif not size:
                self.dropped += 1
                self.selector.unregister(key.fileobj)
        self.received += received
        return bool(ready)

    def settle(self) -> None:
        """Read until nothing comes any more; raises OSError where that does not end."""
        give_up = time.monotonic() + JOIN_SECONDS
        while self.read(self.server.settle_seconds):
            if time.monotonic() > give_up:
                raise OSError("never falls silent")

    @property
    def delivered(self) -> int:
        """Lines that all who only listen have."""
        return int(min(self.heard)) // self.line_size

    def say(self, talker: int) -> bool:
        """Say the next line; False where the talker's last one must go out first."""
        if not self.send(talker):
            return False
        text = b"%08d" % self.said + b"x" * (TEXT_SIZE - 9) + MARK
        self.unsent[talker] = self.server.line(text)
        self.said += 1
        self.send(talker)
        return True

    def send(self, talker: int) -> bool:
        """Send what a talker has said; whether all of it went out."""
        data = self.unsent.pop(talker, b"")
        if data:
            try:
                data = data[self.talkers[talker].send(data) :]
            except OSError:  # their buffer is full, or the server has hung up
                pass
        if data:
            self.unsent[talker] = data
        return not data

    def lost(self) -> int:
        """Lines that the witness should have read, and did not."""
        seen = {int(number) for number in re.findall(rb"(\d{8})x+\^", self.witnessed)}
        return self.said - len(seen)

    def close(self) -> None:
        for person in self.everyone:
            person.close()
        self.selector.close()


def talk(crowd: Crowd, load: Load) -> tuple[list[float], float]:
    """Do what the load says; returns the seconds that each line took, and those in all."""
    latencies: list[float] = []
    waiting: deque[float] = deque()  # when the lines in flight were said
    talkers = itertools.cycle(range(load.talkers))
    crowd.start_counting()
    start = last_progress = now = time.perf_counter()
    give_up = start + load.seconds + JOIN_SECONDS
    while now < min(last_progress + PATIENCE, give_up):
        talking = now < start + load.seconds
        if not talking and not waiting:
            break
        burst = min(BURST, load.in_flight - len(waiting)) if talking else 0
        for talker in itertools.islice(talkers, burst):
            said_at = time.perf_counter()
            if not crowd.say(talker):
                break
            waiting.append(said_at)
        if not talking:
            for talker in list(crowd.unsent):
                crowd.send(talker)
        received = crowd.received
        crowd.read(0 if burst == BURST else 0.05)
        now = time.perf_counter()
        delivered = crowd.delivered
        while waiting and len(latencies) < delivered:
            latencies.append(now - waiting.popleft())
        if crowd.received > received:
            last_progress = now
    return latencies + [math.inf] * len(waiting), now - start


def put(server: Server, load: Load) -> tuple[Result, list[str]]:
    """Put a load on a server; returns the figures and remarks; raises OSError where it fails."""
    with contextlib.ExitStack() as stack:
        port, pid = stack.enter_context(started(server))
        crowd = Crowd(server, load.people)
        stack.callback(crowd.close)
        crowd.join(port, load)
        first = crowd.said
        cpu, own_cpu = cpu_seconds(pid), time.process_time()
        latencies, wall = talk(crowd, load)
        own_cpu = time.process_time() - own_cpu
        crowd.settle()  # the talkers may still have to read what the others have
        cpu = cpu_seconds(pid) - cpu
        if not crowd.received:
            raise OSError("delivers nothing")
        deliveries = crowd.received / crowd.line_size
        expected = (crowd.said - first) * crowd.hearers
        remarks = [f"drops {crowd.dropped} people"] if crowd.dropped else []
        if crowd.stalled:
            remarks.append(what_became_of(crowd.stalled))
        latencies.sort()
        result = Result(
            deliveries / wall,
            cpu * 1e6 / deliveries,
            peak_megabytes(pid),
            latencies[len(latencies) // 2] * 1e3,
            latencies[len(latencies) * 99 // 100] * 1e3,
            latencies[-1] * 1e3,
            max(round(expected - deliveries), crowd.lost()),
            own_cpu / wall,
        )
        return result, remarks


def what_became_of(stalled: socket.socket) -> str:
    """Whether the server has hung up on somebody who read nothing."""
    stalled.settimeout(1)
    give_up = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < give_up:
            if not stalled.recv(1 << 16):
                return "drops the stalled one"
    except socket.timeout:
        pass  # nothing more comes, not even the end
    except OSError:  # a reset
        return "drops the stalled one"
    return "keeps the stalled one"


# ------------
# The report
# ------------


class Row(NamedTuple):
    """A line of the table: one server under one load."""

    load: Load
    server: str
    result: Result | None  # None where there is nothing to show but the remark
    remark: str


def median(results: list[Result]) -> Result:
    middle = Result(*map(statistics.median, zip(*results)))
    return middle._replace(lost=max(result.lost for result in results))


def significant(number: float) -> str:
    """A figure with the three digits that mean something."""
    if math.isnan(number):
        return "?"
    if math.isinf(number):
        return "never"
    if number >= 1e6:
        return f"{number / 1e6:.3g} M"
    if number >= 1e4:
        return f"{number / 1e3:.3g} k"
    number = float(f"{number:.3g}")
    return f"{number:g}" if number < 1e3 else f"{number:,.0f}"


HEADINGS = (
    *("load", "server", "deliveries/s", "server CPU µs/delivery", "peak MB"),
    *("p50 ms", "p99 ms", "longest ms", "lines lost or broken", "client busy", ""),
)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [HEADINGS, ("---", "---", *["---:"] * 8, "---")]
    for load, server, result, remark in rows:
        people = f"{load.name}, {load.people:,} people"
        figures = ["–"] * 8
        if result:
            figures = [
                *map(significant, result[:6]),
                f"{result.lost:,}",
                f"{result.client_busy:.0%}",
            ]
        lines.append((people, server, *figures, remark))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 }
.faint { fill: #57606a }
rect { fill: #8c959f }
rect.ours { fill: #2da44e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .faint { fill: #9da7b3 }
  rect { fill: #6e7681 }
  rect.ours { fill: #3fb950 }
}"""


# What the picture shows: of which load, which field, under what title.
CHARTS = (
    ("flat out", "deliveries", "deliveries a second, flat out: more is better"),
    ("one at a time", "p50", "ms until the last listener has a line: less is better"),
    ("one stalls", "longest", "ms at most for a line, while one reads nothing: less is better"),
)


def picture(rows: list[Row]) -> str:
    """The rows as bars, in SVG."""
    parts, y = [], 10
    for name, field, title in CHARTS:
        shown = [row for row in rows if row.load.name == name and row.result]
        if not shown:
            continue
        people = f"{shown[0].load.people:,} people"
        y += 22
        parts.append(f'<text class="title" x="10" y="{y}">{people}: {title}</text>')
        y += 8
        numbers = [getattr(row.result, field) for row in shown]
        most = max((number for number in numbers if number < math.inf), default=1.0)
        for row, number in zip(shown, numbers):
            width = max(1, 390 * min(number / most, 1))
            won = row.server.startswith(Batchat.name) and name != "one stalls"
            ours = ' class="ours"' if won else ""
            parts.append(f'<text x="124" y="{y + 15}" text-anchor="end">{row.server}</text>')
            parts.append(
                f'<rect{ours} x="132" y="{y + 3}" width="{width:.1f}" height="16" rx="2"/>'
            )
            parts.append(
                f'<text class="faint" x="{138 + width:.1f}" y="{y + 15}">'
                f"{significant(number)}</text>"
            )
            y += 22
        y += 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {y}" width="640" height="{y}">'
    )
    return "\n".join([head, f"<style>{STYLE}\n</style>", *parts, "</svg>"]) + "\n"


def machine() -> str:
    system = f"{platform.system()} {platform.machine()}"
    return f"{os.cpu_count()} cores, {system}, Python {platform.python_version()}"


def progress(text: str) -> None:
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    print(f"{start}{text:<70}", end=end, file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast BATCHAT fans lines out, beside other servers on this machine."
    )
    for flag, kind, default, what in [
        ("--people", int, 1000, "in the room"),
        ("--talkers", int, 100, "of them, talk flat out"),
        ("--repeat", int, 3, "times that each is measured"),
        ("--seconds", float, 3.0, "of talking in a measurement"),
    ]:
        text = f"{what} (%(default)s)"
        parser.add_argument(flag, type=kind, default=default, metavar="N", help=text)
    parser.add_argument("--peers", nargs="+", choices=SERVERS, default=list(SERVERS))
    options = parser.parse_args()
    if not 0 < options.talkers <= options.people // 2:
        parser.error("at least one must talk, and as many only listen")
    if options.repeat < 1 or not options.seconds > 0:
        parser.error("nothing can be measured in no time")
    return options


def measure(options: argparse.Namespace) -> list[Row]:
    """Put every load on every server, in turn, several times."""
    seconds = options.seconds
    loads = [
        Load("flat out", options.people, options.talkers, IN_FLIGHT, seconds),
        Load("one at a time", options.people, 1, 1, seconds),
        Load("one stalls", 10, 1, IN_FLIGHT, 2 * seconds, stalled=True),
    ]
    tasks = [(load, name) for load in loads for name in options.peers]
    ours = "batchat"
    if ours in options.peers:
        most = 5 * options.people  # so that what was asked to be small stays so
        tasks += [(Load("growth", n, 1, 1, seconds), ours) for n in GROWTH if n <= most]
    results: dict[tuple[Load, str], list[Result]] = {task: [] for task in tasks}
    remarks: dict[tuple[Load, str], list[str]] = {task: [] for task in tasks}
    failed = set()
    for turn in range(options.repeat):
        for number, (load, name) in enumerate(results):
            task, server = (load, name), SERVERS[name]
            done = f"{turn + 1} of {options.repeat} times, {number + 1} of {len(results)}"
            progress(f"{done}: {load.name}, {load.people:,} people, {server.name}")
            if task in failed:
                continue
            try:
                if not shutil.which(server.program):
                    raise OSError("not on the PATH")
                result, noticed = put(server, load)
                results[task].append(result)
                remarks[task] += noticed
            except OSError as error:
                failed.add(task)
                why = " ".join(str(error).split())
                remarks[task].append(
                    f"measured {turn} of {options.repeat} times: {why}" if turn else why
                )
    progress("")
    rows = []
    for (load, name), found in results.items():
        middle = median(found) if found else None
        said = remarks[load, name]
        if middle and middle.client_busy >= SATURATED:
            said.append("the client could do no more")
        rows.append(Row(load, SERVERS[name].name, middle, ", ".join(dict.fromkeys(said))))
    return rows


def main() -> None:
    options = parse_options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS takes less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows = measure(options)
    print(f"\n{machine()}; medians of {options.repeat}\n")
    print(table(rows))
    (BENCH / "fanout.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
