#!/usr/bin/env python3
"""How fast BATCHAT fans lines out, beside the chat and pub/sub servers on this machine.

    python bench/fanout.py                  everything that is on the PATH; some minutes
    python bench/fanout.py --peers batchat redis --repeat 5

Each server gets the same three loads, in turn, on a process of its own:

    one at a time   one line, and the next when everyone has it
    flat out        the talkers say as much as they can, with 1,000 lines in flight
    one stalls      ten people, of whom one talks flat out and one reads nothing

It prints one table of medians as Markdown, and draws it as `fanout.svg` beside
this file.  It talks to loopback addresses alone, and ends every process that it
started.

Deliveries are counted in bytes, where all lines of a server are equally long on
the wire, which a first line tells.  One listener keeps what it reads, and in the
end every line must be there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import platform
import re
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
from typing import Iterator, List, NamedTuple, Tuple

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BENCH = Path(__file__).resolve().parent
HOST = "127.0.0.1"
TEXT_SIZE = 32  # bytes of text in a line, its number included
IN_FLIGHT = 1000  # lines that are said and not yet delivered, when people talk flat out
BURST = 256  # lines that are said, before what was delivered is read
SINGLE_LINES = 200  # lines in the load of one at a time, if time allows
MARK = b"^"  # ends every text, and is nowhere else
JOIN_SECONDS = 60.0  # for everyone to come in
PATIENCE = 8.0  # seconds without a delivery, until the rest counts as lost
STALLED_BUFFER = 4096  # bytes that the system may keep for a listener who reads nothing
GROWTH = (10, 100, 1000, 5000)  # people, for how BATCHAT grows


# --------------------------------------------------------------------------
# The servers
# --------------------------------------------------------------------------


Dialogue = List[Tuple[bytes, bytes]]  # what to say, and what to read before going on


class Server:
    """A server: how to start it, to join it and to say a line."""

    name = program = ""
    bus = False  # those who talk do not listen
    even = True  # all lines are equally long
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

    def command(self, folder: Path, port: int) -> list[str]:
        options = ["--host", HOST, "--port", str(port), "--no-web", "--rate", "0"]
        return [self.program, str(BENCH.parent / "batchat.py"), *options]

    def dialogue(self, name: str, listens: bool) -> Dialogue:
        return [(b"", b"enter: "), (name.encode() + b"\n", b"enjoy the chat")]


class Ncat(Server):
    name = program = "ncat"
    even = False  # it says who speaks once for all that it reads at once
    join_batch = 10  # it has no more callers wait

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


SERVERS = {kind.name.lower(): kind() for kind in (Batchat, Redis, Nats, Ngircd, Inspircd, Ncat)}


def free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


# The shell ends the server when its own input ends: that is, when we do, however we do.
WATCHED = '"$@" </dev/null >log 2>&1 & echo $!; read line; kill -9 $! 2>/dev/null'


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
            start_new_session=True,  # so that Ctrl-C reaches us alone
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


# --------------------------------------------------------------------------
# The load
# --------------------------------------------------------------------------


class Load(NamedTuple):
    """What people do."""

    name: str
    people: int
    talkers: int
    in_flight: int  # lines
    most: int  # lines
    seconds: float  # that they talk at most
    stalled: bool = False  # one of them reads nothing


class Result(NamedTuple):
    """What came of it; of several, the medians, but for `lost` and `remark`."""

    deliveries: float  # a second
    cpu: float  # microseconds of the server for a delivery
    peak: float  # megabytes that the server took at most
    p50: float  # milliseconds until the last listener has a line
    p99: float
    longest: float
    lost: int  # lines, over all listeners
    busy: float  # the part of the time that this side was busy
    remark: str = ""


def marks(read: memoryview) -> int:
    """How many texts end there; -1 for none, since 0 is the end of the stream."""
    return len(read) and (bytes(read).count(MARK) or -1)


class Crowd:
    """Everyone who is connected to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.selector = selectors.DefaultSelector()
        self.buffer = memoryview(bytearray(1 << 18))
        self.received = 0  # bytes, by all who listen
        self.witnessed = bytearray()  # what one of them read
        self.dropped = 0
        self.talkers: list[socket.socket] = []
        self.everyone: list[socket.socket] = []
        self.listeners = 0
        self.stalled: socket.socket | None = None
        self.said = 0  # lines
        self.rests: dict[int, bytes] = {}  # what talkers could not send yet
        self.line_size = 0  # bytes of a line, as a listener gets it

    def join(self, port: int, load: Load) -> None:
        """Connect everyone, and say a first line; raises OSError where that does not work."""
        size = self.server.join_batch
        give_up = time.monotonic() + JOIN_SECONDS
        for first in range(0, load.people, size):
            if time.monotonic() > give_up:
                raise OSError(f"lets in {first} people in {JOIN_SECONDS:.0f} s")
            numbers = range(first, min(first + size, load.people))
            try:
                batch = [self._call(port, number, load) for number in numbers]
            except OSError as error:
                raise OSError(f"lets in about {first} people: {error}") from None
            for steps in itertools.zip_longest(*(d for _, d in batch), fillvalue=(b"", b"")):
                for (person, _), (say, _) in zip(batch, steps):
                    person.sendall(say)
                for (person, _), (_, marker) in zip(batch, steps):
                    expect(person, marker)
            for person, _ in batch:
                person.setblocking(False)
            self.read(0)
        self.settle()
        before = self.received
        self.say(0)
        self.settle()
        self.line_size, rest = divmod(self.received - before, max(self.hearers, 1))
        if rest or not self.line_size:
            raise OSError("not everyone heard the first line alike")

    @property
    def hearers(self) -> int:
        """Those who get a line: in a chat nobody hears themselves, on a bus no talker listens."""
        return self.listeners if self.server.bus else self.listeners - 1

    def _call(self, port: int, number: int, load: Load) -> tuple[socket.socket, Dialogue]:
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
        if talks:
            self.talkers.append(person)
        if stalls:
            self.stalled = person
        else:
            self.listeners += listens
            if not listens:
                take = self._ignore(person)
            elif not number:
                take = self._witness(person)
            elif not self.server.even:
                take = self._count(person)
            else:
                take = person.recv_into
            self.selector.register(person, selectors.EVENT_READ, take)
        return person, self.server.dialogue(f"p{number:05}", listens)

    def _ignore(self, person: socket.socket):
        """What a bus answers to those who talk."""

        def take(buffer: memoryview) -> int:
            return -1 if person.recv_into(buffer) else 0

        return take

    def _witness(self, person: socket.socket):
        def take(buffer: memoryview) -> int:
            size = person.recv_into(buffer)
            self.witnessed += buffer[:size]
            return size if self.server.even else marks(buffer[:size])

        return take

    def _count(self, person: socket.socket):
        return lambda buffer: marks(buffer[: person.recv_into(buffer)])

    def read(self, timeout: float) -> bool:
        """Take all that is there; whether there was anything."""
        received, buffer = 0, self.buffer
        ready = self.selector.select(timeout)
        for key, _ in ready:
            try:
                size = key.data(buffer)
            except OSError:
                size = 0
            if size > 0:
                received += size
            elif not size:
                self.dropped += 1
                self.selector.unregister(key.fileobj)
        self.received += received
        return bool(ready)

    def settle(self) -> None:
        while self.read(self.server.settle_seconds):
            pass

    def say(self, talker: int) -> bool:
        """Say the next line, or the rest of the last one; False where the talker has to wait."""
        rest = self.rests.pop(talker, b"")
        if not rest:
            text = b"%08d" % self.said + b"x" * (TEXT_SIZE - 9) + MARK
            rest = self.server.line(text)
            self.said += 1
        try:
            rest = rest[self.talkers[talker].send(rest) :]
        except OSError:  # their buffer is full, or the server has hung up
            pass
        if rest:
            self.rests[talker] = rest
        return not rest

    def lost(self) -> int:
        """Lines that the witness should have read, and did not."""
        seen = {int(number) for number in re.findall(rb"(\d{8})x+\^", self.witnessed)}
        return self.said - len(seen)

    def close(self) -> None:
        for person in self.everyone:
            person.close()
        self.selector.close()


def talk(crowd: Crowd, load: Load) -> tuple[list[float], float]:
    """Do what the load says; returns for each line the seconds until all had it, and those in all."""
    first, before, per_line = crowd.said, crowd.received, crowd.line_size * crowd.hearers
    latencies: list[float] = []
    waiting: deque[float] = deque()  # when the lines in flight were said
    talkers = itertools.cycle(range(load.talkers))
    start = last_progress = now = time.perf_counter()
    while now - last_progress < PATIENCE:
        talking = now < start + load.seconds and crowd.said - first < load.most
        if not talking and not waiting:
            break
        burst = min(BURST, load.in_flight - len(waiting)) if talking else 0
        for talker in itertools.islice(talkers, burst):
            said_at = time.perf_counter()
            if not crowd.say(talker):
                break
            waiting.append(said_at)
        received = crowd.received
        crowd.read(0 if burst == BURST else 0.05)
        now = time.perf_counter()
        delivered = (crowd.received - before) // per_line
        while waiting and len(latencies) < delivered:
            latencies.append(now - waiting.popleft())
        if crowd.received > received:
            last_progress = now
    return latencies + [math.inf] * len(waiting), last_progress - start


def put(server: Server, load: Load) -> Result:
    """Start a server and put a load on it; raises OSError where it does not take it."""
    with contextlib.ExitStack() as stack:
        port, pid = stack.enter_context(started(server))
        crowd = Crowd(server)
        stack.callback(crowd.close)
        crowd.join(port, load)
        first, received = crowd.said, crowd.received
        cpu, own_cpu = cpu_seconds(pid), time.process_time()
        latencies, wall = talk(crowd, load)
        own_cpu = time.process_time() - own_cpu
        cpu = cpu_seconds(pid) - cpu
        if crowd.received == received:
            raise OSError("delivers nothing")
        deliveries = (crowd.received - received) / crowd.line_size
        expected = (crowd.said - first) * crowd.hearers
        remarks = [f"dropped {crowd.dropped} people"] if crowd.dropped else []
        if crowd.stalled:
            remarks.append(what_became_of(crowd.stalled))
        latencies.sort()
        return Result(
            deliveries / wall,
            cpu * 1e6 / deliveries,
            peak_megabytes(pid),
            latencies[len(latencies) // 2] * 1e3,
            latencies[len(latencies) * 99 // 100] * 1e3,
            latencies[-1] * 1e3,
            max(round(expected - deliveries), crowd.lost()),
            own_cpu / wall,
            ", ".join(remarks),
        )


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


# --------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table: one server under one load."""

    load: Load
    server: str
    result: Result | None  # None where there is nothing to show but the remark
    remark: str = ""


def median(results: list[Result]) -> Result:
    columns = list(zip(*results))
    middle = [statistics.median(column) for column in columns[:-1]]
    lost = max(columns[Result._fields.index("lost")])
    remark = max(columns[-1], key=columns[-1].count)
    return Result(*middle, remark)._replace(lost=lost)


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
        if result is None:
            lines.append((people, server, *["–"] * 8, remark))
            continue
        lines.append(
            (
                people,
                server,
                *map(significant, result[:6]),
                f"{result.lost:,}",
                f"{result.busy:.0%}",
                result.remark,
            )
        )
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


def picture(rows: list[Row]) -> str:
    """The rows as bars, in SVG: what is flat out by deliveries, the others by time."""
    parts, y = [], 10
    for name, title, value in [
        ("flat out", "deliveries a second, flat out: more is better", lambda r: r.deliveries),
        ("one at a time", "ms until the last listener has a line: less is better", lambda r: r.p50),
        (
            "one stalls",
            "ms at most for a line, while one reads nothing: less is better",
            lambda r: r.longest,
        ),
    ]:
        shown = [row for row in rows if row.load.name == name and row.result]
        if not shown:
            continue
        people = f"{shown[0].load.people:,} people"
        y += 22
        parts.append(f'<text class="title" x="10" y="{y}">{people}: {title}</text>')
        y += 8
        numbers = [value(row.result) for row in shown]
        most = max((number for number in numbers if number < math.inf), default=1.0)
        for row, number in zip(shown, numbers):
            width = max(1, 430 * min(number / most, 1))
            ours = ' class="ours"' if row.server == Batchat.name else ""
            parts.append(f'<text x="84" y="{y + 15}" text-anchor="end">{row.server}</text>')
            parts.append(f'<rect{ours} x="92" y="{y + 3}" width="{width:.1f}" height="16" rx="2"/>')
            parts.append(
                f'<text class="faint" x="{98 + width:.1f}" y="{y + 15}">{significant(number)}</text>'
            )
            y += 22
        y += 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {y}" width="640" height="{y}">'
    )
    return "\n".join([head, f"<style>{STYLE}\n</style>", *parts, "</svg>"]) + "\n"


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def progress(text: str) -> None:
    print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast BATCHAT fans lines out, beside other servers on this machine."
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--people", default=1000, help="listeners (1000)", **number)
    parser.add_argument("--talkers", default=100, help="of them talk flat out (100)", **number)
    parser.add_argument("--repeat", default=3, help="times that each is measured (3)", **number)
    parser.add_argument(
        "--seconds", default=3.0, type=float, metavar="S", help="for one measurement (3)"
    )
    parser.add_argument("--peers", nargs="+", choices=SERVERS, default=list(SERVERS))
    options = parser.parse_args()
    if not 0 < 2 * options.talkers <= options.people or options.repeat < 1:
        parser.error("at least one talker, as many others, and one repetition")
    return options


def measure(options: argparse.Namespace) -> list[Row]:
    """Put every load on every server, in turn, several times."""
    people, seconds = options.people, options.seconds
    loads = [
        Load("flat out", people, options.talkers, IN_FLIGHT, sys.maxsize, seconds),
        Load("one at a time", people, 1, 1, SINGLE_LINES, seconds),
        Load("one stalls", 10, 1, IN_FLIGHT, sys.maxsize, 2 * seconds, stalled=True),
    ]
    tasks = [(load, SERVERS[name]) for load in loads for name in options.peers]
    if Batchat.name.lower() in options.peers:
        for people in GROWTH:
            if people <= 5 * options.people:
                load = Load("growth", people, 1, 1, SINGLE_LINES, seconds)
                tasks.append((load, SERVERS[Batchat.name.lower()]))
    results: dict[tuple[Load, Server], list[Result]] = {task: [] for task in tasks}
    failures: dict[tuple[Load, Server], str] = {}
    for turn in range(options.repeat):
        for done, (load, server) in enumerate(tasks):
            progress(
                f"{turn + 1}/{options.repeat}, {done + 1}/{len(tasks)}: {load.name}, {server.name}"
            )
            if (load, server) in failures:
                continue
            if not shutil.which(server.program):
                failures[load, server] = "not on the PATH"
                continue
            try:
                results[load, server].append(put(server, load))
            except OSError as error:
                failures[load, server] = " ".join(str(error).split())
    progress("")
    return [
        Row(load, server.name, median(found) if found else None, failures.get((load, server), ""))
        for (load, server), found in results.items()
    ]


def main() -> None:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if resource:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows = measure(options)
    print(f"\n{machine()}; medians of {options.repeat}\n")
    print(table(rows))
    (BENCH / "fanout.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
