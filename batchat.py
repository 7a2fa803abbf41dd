#!/usr/bin/env python3
"""BATCHAT: a chat room in one file, which people join with telnet.

    python batchat.py           opens the room on port 1337
    telnet localhost 1337       joins it

A chat room is a log, and a listener is a place in it.  What is said is
appended once to the room's log; each listener is a cursor that runs after its
end, and is sent all that is new in one system call.  One thread turns the
wheel: select, read, write, tidy up.

The parts of this file, in reading order:

    1. The words        what people read
    2. The limits       every number, with its unit
    3. Log and Outbox   bytes and offsets
    4. The wire         bytes to lines, by telnet's rules
    5. Chat             names, commands, who hears what
    6. The reactor      sockets, the selector and the clock
    7. main             options, signals, the opening line

Nothing before part 6 knows of sockets or of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import ipaddress
import logging
import re
import selectors
import signal
import socket
import sys
import time
import unicodedata
from collections import Counter, OrderedDict, defaultdict
from typing import (
    Any,
    Callable,
    Iterator,
    NamedTuple,
    Union,
    cast,
)

try:
    import resource
except ImportError:  # Windows has no such limits to raise
    resource = None  # type: ignore[assignment]

__version__ = "1.0.0"

logger = logging.getLogger("batchat")


# --------------------------------------------------------------------------
# 1. The words
# --------------------------------------------------------------------------

BANNER = r"""
   ____      _       _____     ____   _   _      _       _____   
U | __")uU  /"\  u  |_ " _| U /"___| |'| |'| U  /"\  u  |_ " _|  
 \|  _ \/ \/ _ \/     | |   \| | u  /| |_| |\ \/ _ \/     | |    
  | |_) | / ___ \    /| |\   | |/__ U|  _  |u / ___ \    /| |\   
  |____/ /_/   \_\  u |_|U    \____| |_| |_| /_/   \_\  u |_|U   
 _|| \\_  \\    >>  _// \\_  _// \\  //   \\  \\    >>  _// \\_  
(__) (__)(__)  (__)(__) (__)(__)(__)(_") ("_)(__)  (__)(__) (__)
"""[1:]
WELCOME = "Welcome to BATCHAT local reviews and chat!"
PROMPT = "Please enter your name, and press enter: "
GREETING = f"{BANNER}\n{WELCOME}\n\n{PROMPT}"

# What people may type: the command, what it takes, what it does.
COMMANDS = {
    "/help": ("", "show this list"),
    "/who": ("", "show who is here"),
    "/me": ("ACTION", "say what you do: /me waves"),
    "/msg": ("NAME TEXT", "say something to one person alone"),
    "/nick": ("NAME", "change your name"),
    "/ignore": ("NAME", "stop hearing somebody, or hear them again"),
    "/quit": ("", "leave the chat"),
    "//": ("TEXT", "say a line that starts with a slash"),
}
HELP = "".join(
    f"* {f'{command} {takes}':<17}{does}\n" for command, (takes, does) in COMMANDS.items()
)

FULL = "* BATCHAT is full, please try again later.\n"
CROWDED = "* Too many people are here from your address, please try again later.\n"
NAMELESS = "* You gave no name in time, goodbye!\n"
GOODBYE = "* That was the last try, goodbye!\n"
SHUTDOWN = "* BATCHAT is closing, goodbye!\n"
HERE = "* BATCHAT is here.\n"


# --------------------------------------------------------------------------
# 2. The limits
# --------------------------------------------------------------------------

LINE_LIMIT = 4096  # bytes in a line, its end not counted
NAME_LIMIT = 24  # characters in a name
NAME_TRIES = 5
NAME_SECONDS = 120.0  # until a caller must have given a name

WINDOW = 1 << 20  # bytes that the log never grows beyond, whoever is slow
HOLD_ABOVE = WINDOW // 2  # bytes behind: talkers wait from here ...
HOLD_BELOW = WINDOW // 4  # ... until the slowest is back under this
STALL_SECONDS = 2.0  # that one listener may hold up the room
PRIVATE_LIMIT = 64 << 10  # bytes of private lines unsent, before we stop listening

READ_SIZE = 16 << 10  # bytes taken from one socket a turn, so that nobody starves the rest
BACKLOG = 1024  # callers that the system lets wait for us
ACCEPT_BATCH = 256  # callers let in a turn
PIECES_LIMIT = 1024  # buffers that one sendmsg takes: IOV_MAX on every system we know
BURST_SECONDS = 5  # of the permitted rate, that may be sent at once

CLOSING_SECONDS = 5.0  # for a leaver to take what is owed and to hang up
SHUTDOWN_SECONDS = 2.0  # the same, when the whole house closes
RETRY_SECONDS = 1.0  # until we accept again, after the system could not

SPARE_DESCRIPTORS = 16  # kept back for our own use
LOBBY = 16  # descriptors kept back for telling callers that the house is full

KEEPALIVE_IDLE = 60  # seconds of silence, until we ask whether a peer is still there,
KEEPALIVE_INTERVAL = 15  # again after so many seconds,
KEEPALIVE_COUNT = 4  # and give it up after so many questions in vain,
USER_TIMEOUT = 120_000  # or after so many milliseconds without an ACK of what we sent


# --------------------------------------------------------------------------
# 3. Log and Outbox
# --------------------------------------------------------------------------

FOREVER = sys.maxsize  # an offset that no log ever reaches
Buffer = Union[bytes, memoryview]


class Log:
    """What was said: a byte stream with absolute offsets, of which the end is kept.

    It cannot grow or be trimmed while a memoryview of `data` is alive.
    """

    __slots__ = ("data", "start")

    def __init__(self) -> None:
        self.data = bytearray()
        self.start = 0  # the offset of data[0]

    def __len__(self) -> int:
        return len(self.data)

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def append(self, data: bytes) -> None:
        self.data += data

    def trim(self, offset: int) -> None:
        """Forget all that comes before `offset`."""
        del self.data[: offset - self.start]
        self.start = offset


class Outbox:
    """What one listener is owed: a cursor into the log, and splices.

    A splice `(at, skip, insert)` says: at offset `at` of the log, put in the
    bytes `insert` (a private reply), then leave out the next `skip` bytes (the
    listener's own line).  Splices are in order and never touch: two that would
    are one.

    Who is not in the room stands at FOREVER, where nothing is ever said, and
    is owed inserts alone.
    """

    __slots__ = ("cursor", "log", "private_bytes", "splices")

    def __init__(self, log: Log) -> None:
        self.log = log
        self.cursor = FOREVER
        self.splices: list[tuple[int, int, bytes]] = []
        self.private_bytes = 0  # bytes in the inserts of all splices

    @property
    def owes(self) -> bool:
        return bool(self.splices) or self.cursor < self.log.end

    def enter(self) -> None:
        """Follow the log from its end on; inserts that are still owed come first."""
        self.cursor = self.log.end
        self.splices = [(self.cursor, 0, insert) for _, _, insert in self.splices]

    def leave(self) -> None:
        """Hear nothing that is said from now on; what is owed stays owed."""
        self.skip(self.log.end, FOREVER - self.log.end)

    def deafen(self) -> None:
        """Owe nothing any more: nobody is there to take it."""
        self.cursor = FOREVER
        self.splices.clear()
        self.private_bytes = 0

    def insert(self, data: bytes) -> None:
        """Owe `data` to this listener alone, after all that was said so far."""
        self.private_bytes += len(data)
        self._splice(max(self._reach, self.log.end), 0, data)

    def skip(self, at: int, size: int) -> None:
        """Leave out `size` bytes of the log from offset `at` on, its newest."""
        if at >= self._reach:  # who stands at FOREVER does not hear them anyway
            self._splice(at, size, b"")

    @property
    def _reach(self) -> int:
        """The first offset that no splice has decided upon."""
        if not self.splices:
            return self.cursor
        at, skip, _ = self.splices[-1]
        return at + skip

    def _splice(self, at: int, skip: int, insert: bytes) -> None:
        if self.splices and at == self._reach:
            at, before, earlier = self.splices.pop()
            skip, insert = before + skip, earlier + insert
        self.splices.append((at, skip, insert))

    def pieces(self, view: memoryview) -> list[Buffer]:
        """The buffers to send next, given a view of the whole log; as many as sendmsg takes."""
        start, cursor = self.log.start, self.cursor
        pieces: list[Buffer] = []
        for at, skip, insert in self.splices:
            if len(pieces) > PIECES_LIMIT - 3:  # two for this splice, and one for the end
                return pieces
            if at > cursor:
                pieces.append(view[cursor - start : at - start])
            if insert:
                pieces.append(insert)
            cursor = at + skip
        if cursor < self.log.end:
            pieces.append(view[cursor - start :])
        return pieces

    def advance(self, sent: int) -> None:
        """Move on by `sent` bytes of `pieces`, and over what is left out there."""
        done = 0
        for at, skip, insert in self.splices:
            if sent < at - self.cursor:
                break
            sent -= at - self.cursor
            self.cursor = at
            if sent < len(insert):
                self.splices[done] = (at, skip, insert[sent:])
                self.private_bytes -= sent
                sent = 0
                break
            sent -= len(insert)
            self.private_bytes -= len(insert)
            self.cursor += skip
            done += 1
        del self.splices[:done]
        self.cursor += sent


# --------------------------------------------------------------------------
# 4. The wire
# --------------------------------------------------------------------------


class WireEvent(enum.Enum):
    """What a wire tells of besides lines."""

    TOO_LONG = enum.auto()  # a line over LINE_LIMIT went by and was thrown away
    LEAVE = enum.auto()  # Ctrl-C, Ctrl-D, or the end of the stream


Event = Union[str, WireEvent]

# Controls, line and paragraph separators, and the marks that turn writing
# around (Unicode UAX #9, 2.1 to 2.5).  TAB stays.  What edits is not here.
FORBIDDEN = re.compile("[\0-\x07\x0a-\x14\x16-\x1f\x80-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
ERASE = re.compile("[\b\x7f\x15]")


def clean(text: str) -> str:
    """`text` as it may stand on anybody's screen, with its erasures carried out."""
    if text.isprintable():  # true of nearly all lines, and of none with a forbidden character
        return text
    text = FORBIDDEN.sub("", text)
    if not ERASE.search(text):
        return text
    kept: list[str] = []
    for character in text:
        if character == "\x15":
            kept.clear()
        elif character in "\b\x7f":
            del kept[-1:]
        else:
            kept.append(character)
    return "".join(kept)


# A telnet command that is whole, or the beginning of one at the end of a read (RFC 854).
TELNET_COMMAND = re.compile(
    rb"""\xff (?: ([\xfb-\xfe]) ([\0-\xff])  # WILL, WONT, DO, DONT and an option
                | \xfa (?: [^\xff] | \xff[^\xf0] )* (?: \xff\xf0 | (\xff? \Z) )  # SB ... SE
                | ([^\xfa-\xfe])  # a command of one byte
                | ([\xfb-\xfe]? \Z) )  # a beginning""",
    re.VERBOSE,
)
OPTION_REFUSALS = {b"\xfb": b"\xff\xfe", b"\xfd": b"\xff\xfc"}  # WILL x: DONT x; DO x: WONT x
ARE_YOU_THERE = b"\xf6"
# What the other commands of one byte leave in the text; all that are not here, nothing.
KEYS = {
    b"\xec": b"\x04",  # EOF (RFC 1184): Ctrl-D
    b"\xee": b"\x03",  # ABORT (RFC 1184): Ctrl-C
    b"\xf3": b"\x03",  # BRK, break
    b"\xf4": b"\x03",  # IP, interrupt process: what telnet makes of Ctrl-C
    b"\xf7": b"\b",  # EC, erase character
    b"\xf8": b"\x15",  # EL, erase line
    b"\xff": b"\xff",  # IAC IAC: the byte itself
}
LINE_END = re.compile(rb"\r[\n\0]?")  # CR LF, CR NUL, or CR alone (RFC 854, pages 11 and 12)
LINE = re.compile(rb"([^\n\x03\x04]*)([\n\x03\x04])")


def encode(text: str) -> bytes:
    """`text`, whose lines end with "\\n", as it goes over the wire."""
    return text.replace("\n", "\r\n").encode()


class TelnetWire:
    """Telnet's side of a connection (RFC 854): `feed` it bytes, take `next` events.

    It leaves telnet's commands out of the text, refuses every option, and
    keeps at most one read and one unfinished line.  `replies` gathers what the
    protocol itself must answer.
    """

    __slots__ = ("_after_cr", "_at", "_command", "_skipping", "_text", "ended", "replies")

    def __init__(self) -> None:
        self.ended = False  # the peer will send no more
        self.replies = b""
        self._command = b""  # the beginning of a command whose rest is still to come
        self._after_cr = False  # the last byte was a CR: an LF now belongs to it
        self._text = b""
        self._at = 0  # how far `next` has come in `_text`
        self._skipping = False  # the line is too long; its rest is thrown away

    def feed(self, data: bytes) -> None:
        """Take what the peer sent; b"" is its end."""
        if not data:
            self.ended = True
            return
        if self._command or b"\xff" in data:
            data, self._command = self._command + data, b""
            data = TELNET_COMMAND.sub(self._obey, data)
        if data:
            if self._after_cr and data[:1] in (b"\n", b"\0"):
                data = data[1:]
            self._after_cr = data.endswith(b"\r")
            self._text = self._text[self._at :] + LINE_END.sub(b"\n", data)
            self._at = 0

    def _obey(self, command: re.Match[bytes]) -> bytes:
        """Answer a telnet command; returns what it leaves in the text."""
        verb, option, inside, simple, begun = command.groups()
        if verb in OPTION_REFUSALS:  # WONT and DONT only say what is so already
            self.replies += OPTION_REFUSALS[verb] + option
        elif simple == ARE_YOU_THERE:
            self.replies += encode(HERE)
        elif simple:
            return KEYS.get(simple, b"")
        elif inside is not None:
            self._command = b"\xff\xfa" + inside  # what an SB holds is not kept
        elif begun is not None:
            self._command = b"\xff" + begun
        return b""

    def next(self) -> Event | None:
        """The next line or signal; None where more must be read first."""
        while True:
            found = LINE.match(self._text, self._at)
            stop = found.end(1) if found else len(self._text)
            if not self._skipping and stop - self._at > LINE_LIMIT:
                self._at, self._skipping = stop, True
                return WireEvent.TOO_LONG
            if not found:
                if self._skipping:
                    self._at = stop
                return WireEvent.LEAVE if self.ended else None
            self._at = found.end()
            skipped, self._skipping = self._skipping, False
            if found[2] != b"\n":
                return WireEvent.LEAVE
            if not skipped:
                return clean(found[1].decode("utf-8", "replace"))


# --------------------------------------------------------------------------
# 5. Chat
# --------------------------------------------------------------------------


class State(enum.Enum):
    """How far a person has come; see Chat.handle."""

    NAMING = enum.auto()  # has not given a name yet, and hears nothing
    CHATTING = enum.auto()
    CLOSING = enum.auto()  # is heard no more, but still owed something
    LINGERING = enum.auto()  # has been sent everything, and should hang up
    GONE = enum.auto()


LISTENED_TO = (State.NAMING, State.CHATTING)  # what comes in any other state is thrown away


class Person:
    """What the chat knows of somebody: a name, an outbox and a state."""

    __slots__ = ("name", "origin", "outbox", "state", "tries")

    def __init__(self, origin: str, outbox: Outbox) -> None:
        self.origin = origin  # where they call from, for the log
        self.outbox = outbox
        self.state = State.NAMING
        self.name = ""
        self.tries = 0


class Refusal(Exception):
    """Somebody asked for what they can't have; the text tells them why."""


# Letters and marks that nobody can see, so that no name hides in another.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
HTTP_REQUEST = re.compile(r"\S+ \S+ HTTP/\d")  # RFC 9112, section 3
RESERVED_NAMES = {"you"}  # private lines call their reader so


def name_key(name: str) -> str:
    """The same for every spelling of a name: BOB, \uff42\uff4f\uff42 and bob are one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def check_name(text: str) -> str:
    """`text` as a name, in NFC; raises Refusal where it is none."""
    name = unicodedata.normalize("NFC", text.strip())
    if not name:
        raise Refusal("A name has at least one character.")
    if len(name) > NAME_LIMIT:
        raise Refusal(f"A name has at most {NAME_LIMIT} characters.")
    for at, character in enumerate(name):
        kind = unicodedata.category(character)
        good = kind[0] == "L" or kind == "Nd" or character in "_-." or (kind[0] == "M" and at > 0)
        if not good or INVISIBLE.match(character):
            raise Refusal("A name is made of letters, digits, '_', '-' and '.' alone.")
    return name


class Chat:
    """The room: who is in it, what they say, and who hears it."""

    def __init__(self) -> None:
        self.log = Log()
        self.people: dict[str, Person] = {}  # those who are chatting, by name_key
        self.told: set[Person] = set()  # those who were told something and not yet sent it
        # Those who ignore somebody, by whom they ignore.
        self._ignorers: defaultdict[Person, set[Person]] = defaultdict(set)

    # What people are told

    def tell(self, person: Person, text: str) -> None:
        """Show `text` to one person alone."""
        self.reply(person, encode(text))

    def reply(self, person: Person, data: bytes) -> None:
        """The same, with bytes as they go over the wire."""
        person.outbox.insert(data)
        self.told.add(person)

    def _announce(self, text: str) -> None:
        """Show `text` to everyone in the room."""
        self.log.append(encode(text))

    def _say(self, speaker: Person, text: str) -> None:
        """Show `text` to everyone but its speaker and those who ignore them."""
        at = self.log.end
        self._announce(text)
        size = self.log.end - at
        speaker.outbox.skip(at, size)
        for listener in self._ignorers.get(speaker, ()):
            listener.outbox.skip(at, size)

    # Coming and going

    def dismiss(self, person: Person, text: str, why: str) -> None:
        """Show `text` to somebody, and have them leave."""
        self.tell(person, text)
        self.leave(person, why)

    def leave(self, person: Person, why: str) -> None:
        """Let a person go: they hear nothing more, and the others hear that they went."""
        was_chatting = person.state is State.CHATTING
        person.state = State.CLOSING
        self.told.add(person)
        if not was_chatting:
            logger.debug("%s left before joining: %s", person.origin, why)
            return
        person.outbox.leave()
        del self.people[name_key(person.name)]
        self._ignorers.pop(person, None)
        for listeners in self._ignorers.values():
            listeners.discard(person)
        self._announce(f"* {person.name} has quit the chat\n")
        logger.info("%s left: %s (%s, %d here)", person.name, why, person.origin, len(self.people))

    def close(self) -> None:
        """Tell everyone in the room that it closes."""
        self._announce(SHUTDOWN)
        for person in self.people.values():
            person.state = State.CLOSING
            person.outbox.leave()
            self.told.add(person)
        self.people.clear()

    # The state machine

    def handle(self, person: Person, event: Event) -> None:
        """Do what an event means in the state that the person is in."""
        try:
            if person.state is State.NAMING:
                if event is WireEvent.LEAVE:
                    self.leave(person, "hung up")
                elif event is WireEvent.TOO_LONG or HTTP_REQUEST.match(event):
                    self.leave(person, "sent no name")  # a browser, or a web page that attacks us
                elif event.strip().lower() == "/quit":
                    self.leave(person, "quit")
                else:
                    self._enter(person, event)
            elif person.state is State.CHATTING:
                if event is WireEvent.LEAVE:
                    self.leave(person, "hung up")
                elif event is WireEvent.TOO_LONG:
                    raise Refusal(f"A line has at most {LINE_LIMIT} bytes; yours was not sent.")
                elif event.startswith("//"):
                    self._say(person, f"<{person.name}> {event[1:]}\n")
                elif event.startswith("/"):
                    self._command(person, event)
                elif event.strip():
                    self._say(person, f"<{person.name}> {event}\n")
        except Refusal as why:
            self.tell(person, f"* {why}\n")

    def _enter(self, person: Person, text: str) -> None:
        try:
            name = self._free_name(person, text)
        except Refusal as why:
            person.tries += 1
            if person.tries == NAME_TRIES:
                self.dismiss(person, f"* {why}\n{GOODBYE}", "gave no good name")
            else:
                self.tell(person, f"* {why}\n{PROMPT}")
            return
        self._announce(f"* {name} has joined the chat\n")  # before they come in and would read it
        person.name = name
        person.state = State.CHATTING
        person.outbox.enter()
        self.people[name_key(name)] = person
        self.tell(person, f"Hey, {name}! Hope you enjoy the chat.\n\n")
        logger.info("%s joined from %s (%d here)", name, person.origin, len(self.people))

    def _free_name(self, person: Person, text: str) -> str:
        """`text` as a name that this person may take, their own included; raises Refusal."""
        name = check_name(text)
        key = name_key(name)
        if key in RESERVED_NAMES or self.people.get(key, person) is not person:
            raise Refusal(f"The name {name} is taken.")
        return name

    def _find(self, name: str) -> Person:
        """Who is called `name`; raises Refusal."""
        try:
            return self.people[name_key(name)]
        except KeyError:
            raise Refusal(f"Nobody here is called {name}.") from None

    # The commands

    def _command(self, person: Person, line: str) -> None:
        command, _, rest = line.partition(" ")
        command, rest = command.lower(), rest.strip()
        if command not in COMMANDS:
            raise Refusal(f"There is no command {command}; /help shows those there are.")
        takes = COMMANDS[command][0]
        if len(rest.split(None, 1)) < len(takes.split()):
            raise Refusal(f"It goes like this: {command} {takes}")
        getattr(self, "_do_" + command[1:])(person, rest)

    def _do_help(self, person: Person, rest: str) -> None:
        self.tell(person, HELP)

    def _do_who(self, person: Person, rest: str) -> None:
        names = [self.people[key].name for key in sorted(self.people)]
        self.tell(person, f"* {len(names)} here: {', '.join(names)}\n")

    def _do_me(self, person: Person, rest: str) -> None:
        self._say(person, f"** {person.name} {rest}\n")

    def _do_msg(self, person: Person, rest: str) -> None:
        name, text = rest.split(None, 1)
        listener = self._find(name)
        if listener not in self._ignorers.get(person, ()):
            if listener.outbox.private_bytes > PRIVATE_LIMIT:
                raise Refusal(f"{listener.name} has too much to read; your line was not sent.")
            self.tell(listener, f"[{person.name} -> you] {text}\n")
        self.tell(person, f"[you -> {listener.name}] {text}\n")

    def _do_nick(self, person: Person, rest: str) -> None:
        name = self._free_name(person, rest)
        if name == person.name:
            raise Refusal(f"You are {name} already.")
        del self.people[name_key(person.name)]
        self.people[name_key(name)] = person
        self._announce(f"* {person.name} is now known as {name}\n")
        logger.info("%s is now %s (%s)", person.name, name, person.origin)
        person.name = name

    def _do_ignore(self, person: Person, rest: str) -> None:
        other = self._find(rest)
        if other is person:
            raise Refusal("You can't ignore yourself.")
        self._ignorers[other] ^= {person}
        if person in self._ignorers[other]:
            self.tell(person, f"* You no longer hear {other.name}.\n")
        else:
            self.tell(person, f"* You hear {other.name} again.\n")

    def _do_quit(self, person: Person, rest: str) -> None:
        self.leave(person, "quit")


# --------------------------------------------------------------------------
# 6. The reactor
# --------------------------------------------------------------------------

NEVER = float("inf")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
HAS_SENDMSG = hasattr(socket.socket, "sendmsg")
SOCKET_OPTIONS = [
    (level, getattr(socket, name), value)
    for level, name, value in [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),  # a line leaves at once
        (socket.SOL_SOCKET, "SO_OOBINLINE", 1),  # telnet may send part of Ctrl-C as urgent data
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE_IDLE),
        (socket.IPPROTO_TCP, "TCP_KEEPALIVE", KEEPALIVE_IDLE),  # the same, as macOS calls it
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", KEEPALIVE_COUNT),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", USER_TIMEOUT),
    ]
    if hasattr(socket, name)
]


class Countdown:
    """Who runs out of time, and when.  All have the same time, so the first in is the first out."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends: OrderedDict[Connection, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._ends)

    def start(self, connection: Connection, now: float) -> None:
        """Give them their time, unless theirs runs already."""
        self._ends.setdefault(connection, now + self.seconds)

    def stop(self, connection: Connection) -> None:
        self._ends.pop(connection, None)

    def next_end(self) -> float:
        return next(iter(self._ends.values()), NEVER)

    def expired(self, now: float) -> Iterator[Connection]:
        """Take out those whose time is up."""
        while self.next_end() <= now:
            yield self._ends.popitem(last=False)[0]


class Connection(Person):
    """A person, and the socket they are at."""

    __slots__ = ("address_group", "full_at", "paused", "send", "sock", "watched", "wire")

    def __init__(self, sock: socket.socket, origin: str, log: Log) -> None:
        super().__init__(origin, Outbox(log))
        self.wire = TelnetWire()
        self.sock = sock
        self.send = sock.send  # bound once, for the hot loop
        self.address_group = ""  # what their address counts as, if it counts
        self.full_at = 0.0  # when their token bucket is full again
        self.paused = False  # has more to say than we take now, and is not read
        self.watched = 0  # the events that the selector was asked for


class Limits(NamedTuple):
    """What whoever runs the server may set."""

    rate: int  # lines a second from one person; 0 is no limit
    max_people: int
    max_per_address: int  # connections; 0 is no limit


def address_group(host: str) -> str:
    """What a caller's address counts as: itself, an IPv6 /64, or "" for this very box."""
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback:
        return ""
    prefix = 32 if address.version == 4 else 64
    return str(ipaddress.ip_network((address, prefix), strict=False))


class Reactor:
    """The wheel: select, read, write, tidy up.

    The log grows in the read phase and is sent in the write phase, because it
    cannot grow while views of it are alive.
    """

    def __init__(
        self,
        listener: socket.socket,
        limits: Limits,
        selector: selectors.BaseSelector | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.listener = listener
        self.limits = limits
        self.selector = selector or selectors.DefaultSelector()
        self.clock = clock
        self.now = clock()  # when this turn began
        self.chat = Chat()
        self.connections: set[Connection] = set()
        self.callers: Counter[str] = Counter()  # connections by address group

        # Those in line to be listened to: they have said something, or may have.
        self.talkers: OrderedDict[Connection, None] = OrderedDict()
        # Those whose last send came up short, and since when they have taken nothing.
        self.backlogged: dict[Connection, float] = {}
        self.failed: list[Connection] = []  # those whom an error of ours hit in this turn
        self.offered = 0  # the offset up to which everyone was offered the log

        self.held_until = self.now  # till then the talkers wait for the slowest listener
        self.retry_at = NEVER  # when we accept again, after the system could not
        self.ends_at = NEVER  # when the room closes, whoever is still there
        self.naming = Countdown(NAME_SECONDS)
        self.pacing = Countdown(1 / limits.rate if limits.rate else 0)  # a token's worth
        self.stalled = Countdown(STALL_SECONDS)
        self.closing = Countdown(CLOSING_SECONDS)
        self.countdowns = (self.naming, self.pacing, self.stalled, self.closing)

        listener.setblocking(False)
        self.selector.register(listener, READ, self._accept)

    # The wheel

    def run(self) -> None:
        """Serve until `stop` is called, and then until everyone has gone or time is up."""
        while self.ends_at == NEVER or (self.connections and self.now < self.ends_at):
            self.turn()
        for connection in list(self.connections):
            self._forget(connection)

    def turn(self) -> None:
        """One turn of the wheel; waits for something to do."""
        ready = self.selector.select(self._patience())
        self.now = self.clock()
        self._expire()
        writable = self._read_phase(ready)
        self._write_phase(writable)
        self._tidy_up()

    def stop(self) -> None:
        """Close the room: tell everyone, send what is owed, wait for them to hang up."""
        self.ends_at = self.now + SHUTDOWN_SECONDS
        self.held_until = self.now
        if self.retry_at == NEVER:
            self.selector.unregister(self.listener)
        self.retry_at = NEVER
        self.listener.close()
        self.chat.close()
        for connection in self.connections:
            if connection.state is State.NAMING:
                self.chat.dismiss(connection, SHUTDOWN, "the room closes")

    @property
    def held(self) -> bool:
        return self.now < self.held_until

    def _patience(self) -> float | None:
        """Seconds that the selector may wait; None is for ever."""
        chat = self.chat
        if chat.told or chat.log.end > self.offered or (self.talkers and not self.held):
            return 0
        end = min(self.retry_at, self.ends_at, *(timer.next_end() for timer in self.countdowns))
        if self.held:
            end = min(end, self.held_until)
        return None if end == NEVER else max(0, end - self.clock())

    def _expire(self) -> None:
        """Do what has become due."""
        for connection in self.naming.expired(self.now):
            self.chat.dismiss(connection, NAMELESS, "gave no name in time")
        for connection in self.pacing.expired(self.now):
            self.talkers[connection] = None
        for connection in self.closing.expired(self.now):
            self._forget(connection)
        if self.now >= self.retry_at:
            self.retry_at = NEVER
            self.selector.register(self.listener, READ, self._accept)

    def _read_phase(self, ready: list[tuple[selectors.SelectorKey, int]]) -> list[Connection]:
        """Listen to those who talk; returns those who can be sent something again."""
        writable = []
        for key, events in ready:
            connection = key.data
            if not isinstance(connection, Connection):
                connection()  # the listener, or whatever else was registered with what to do
            elif connection.state is not State.GONE:
                if events & READ:
                    self.talkers[connection] = None
                if events & WRITE:
                    writable.append(connection)
        if not self.held:
            while self.talkers and len(self.chat.log) <= HOLD_ABOVE:
                self._guard(self._listen_to, self.talkers.popitem(last=False)[0])
        for connection in self.talkers:
            connection.paused = True
            self._watch(connection)
        return writable

    def _write_phase(self, writable: list[Connection]) -> None:
        """Send everyone what is new to them, each in one system call."""
        log, end = self.chat.log, self.chat.log.end
        told = cast("set[Connection]", self.chat.told)
        self.chat.told = set()
        for connection in told:
            if connection.state is State.CLOSING:
                self._begin_closing(connection)
        with memoryview(log.data) as view:
            if end > self.offered:
                self._send_news(view)
            # Those with a backlog wait until they are writable.
            for connection in (told - self.backlogged.keys()).union(writable):
                self._guard(self._flush, connection, view)
        self.offered = end

    def _send_news(self, view: memoryview) -> None:
        """Send those in the room what was said since the last turn."""
        start, end = self.offered, self.chat.log.end
        size = end - start
        with view[start - self.chat.log.start :] as news:
            for connection in tuple(self.connections):
                outbox = connection.outbox
                if outbox.cursor == start and not outbox.splices:
                    # Nearly everyone, nearly always; so it has no function of its own.
                    try:
                        sent = connection.send(news)
                    except OSError as error:
                        sent = self._unsent(connection, error)
                    if sent == size:
                        outbox.cursor = end
                    else:
                        outbox.advance(sent)
                        self._after_send(connection, sent)
                elif outbox.cursor < end and connection not in self.backlogged:
                    self._guard(self._flush, connection, view)

    def _tidy_up(self) -> None:
        """Forget what nobody needs any more, and see to those who hold up the rest."""
        log = self.chat.log
        if self.stalled or len(log) > HOLD_ABOVE:
            self._mind_the_slow()
        for connection in self.failed:
            self._drop(connection, "an error of ours")
        self.failed.clear()
        log.trim(min([self.offered, *(connection.outbox.cursor for connection in self.backlogged)]))
        if self.held and len(log) < HOLD_BELOW:
            self.held_until = self.now
        elif not self.held and len(log) > HOLD_ABOVE:
            self.held_until = self.now + STALL_SECONDS

    def _mind_the_slow(self) -> None:
        """Drop those who hold up the talkers and do not catch up in time."""
        log = self.chat.log
        for connection in list(self.backlogged):
            if log.end - connection.outbox.cursor > HOLD_ABOVE:
                # The selector tells of room only when much of the send buffer is free; ask.
                with memoryview(log.data) as view:
                    self._guard(self._flush, connection, view)
            if log.end - connection.outbox.cursor <= HOLD_ABOVE:
                self.stalled.stop(connection)
            elif self.now - self.backlogged[connection] >= STALL_SECONDS:
                self._drop(connection, "takes nothing")
            else:
                self.stalled.start(connection, self.now)
        for connection in self.stalled.expired(self.now):
            self._drop(connection, "too far behind")

    # One connection

    def _guard(self, step: Callable[..., None], connection: Connection, *more: Any) -> None:
        """Take a step with one connection; an error in it costs that connection alone."""
        try:
            step(connection, *more)
        except Exception:
            logger.exception("an error of ours, with %s", connection.origin)
            self.failed.append(connection)

    def _accept(self) -> None:
        """Let in those who are calling."""
        for _ in range(ACCEPT_BATCH if self.ends_at == NEVER else 0):  # it may have closed just now
            try:
                sock, address = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors or memory; it may get better
                logger.warning("can't accept: %s", error.strerror)
                self.selector.unregister(self.listener)
                self.retry_at = self.now + RETRY_SECONDS
                return
            if address:  # macOS gives none for a caller who is gone again
                self._welcome(sock, *address[:2])

    def _welcome(self, sock: socket.socket, host: str, port: int) -> None:
        """Make a caller a connection."""
        sock.setblocking(False)
        for option in SOCKET_OPTIONS:
            with contextlib.suppress(OSError):  # a kernel that does not know it does without
                sock.setsockopt(*option)
        origin = f"{host.replace('::ffff:', '')} port {port}"
        connection = Connection(sock, origin, self.chat.log)
        self.connections.add(connection)
        self._watch(connection)
        self._guard(self._admit, connection, host)

    def _admit(self, connection: Connection, host: str) -> None:
        """Greet a caller, or tell them why they can't come in."""
        group, limits = address_group(host), self.limits
        connection.address_group = group
        self.callers[group] += 1
        if len(self.connections) - len(self.closing) > limits.max_people:
            self._turn_away(connection, FULL)
        elif group and 0 < limits.max_per_address < self.callers[group]:
            self._turn_away(connection, CROWDED)
        else:
            self.chat.tell(connection, GREETING)
            self.naming.start(connection, self.now)
        if len(self.connections) > limits.max_people + LOBBY:
            self._forget(next(iter(self.closing)))  # who has taken leave for the longest time

    def _turn_away(self, connection: Connection, text: str) -> None:
        """Tell a caller why they can't come in."""
        self.chat.dismiss(connection, text, "turned away")
        self._begin_closing(connection)
        self._flush(connection, memoryview(b""))  # now, for their place may be needed in this turn

    def _listen_to(self, connection: Connection) -> None:
        """Handle what somebody sent, and read more where that is all handled."""
        connection.paused = False
        if self._handle_lines(connection) and not connection.wire.ended:
            self._receive(connection)
            self._handle_lines(connection)
        if connection.state is not State.NAMING:
            self.naming.stop(connection)
        self._watch(connection)

    def _receive(self, connection: Connection) -> None:
        """Read from a socket once."""
        wire = connection.wire
        try:
            data = connection.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, error.strerror or "lost")
            return
        if connection.state in LISTENED_TO:
            wire.feed(data)
            if wire.replies:
                self.chat.reply(connection, wire.replies)
                wire.replies = b""
        elif not data:  # they have hung up; all else that comes now is thrown away
            wire.ended = True
            self._end_if_done(connection)

    def _handle_lines(self, connection: Connection) -> bool:
        """Handle the lines that we hold of somebody; False where they must wait with the rest."""
        while connection.state in LISTENED_TO:
            room_is_full = len(self.chat.log) > HOLD_ABOVE
            no_token = connection.full_at - self.now >= BURST_SECONDS
            if room_is_full or no_token or connection.outbox.private_bytes > PRIVATE_LIMIT:
                connection.paused = True
                if room_is_full:
                    self.talkers[connection] = None
                elif no_token:
                    self.pacing.start(connection, self.now)
                return False
            event = connection.wire.next()
            if event is None:
                break
            connection.full_at = max(connection.full_at, self.now) + self.pacing.seconds
            self.chat.handle(connection, event)
        return True

    def _flush(self, connection: Connection, view: memoryview) -> None:
        """Send somebody all that they are owed, as far as their socket takes it."""
        outbox = connection.outbox
        pieces = outbox.pieces(view)
        sent = 0
        if pieces:
            try:
                if HAS_SENDMSG:
                    sent = connection.sock.sendmsg(pieces)
                else:
                    sent = connection.send(b"".join(pieces))
            except OSError as error:
                sent = self._unsent(connection, error)
        outbox.advance(sent)
        self._after_send(connection, sent)

    def _unsent(self, connection: Connection, error: OSError) -> int:
        """See to a send that failed; returns the bytes that it sent, none."""
        if not isinstance(error, BlockingIOError):
            # Nobody is there any more.  But what they said before they went may
            # still wait to be read; reading goes on until it finds the end.
            connection.outbox.deafen()
            with contextlib.suppress(OSError):  # it has ended already
                connection.sock.shutdown(socket.SHUT_RD)
        return 0

    def _after_send(self, connection: Connection, sent: int) -> None:
        """Do what follows from how much was sent of what they are owed."""
        if connection.outbox.owes:
            if sent or connection not in self.backlogged:
                self.backlogged[connection] = self.now
        else:
            self.backlogged.pop(connection, None)
            self.stalled.stop(connection)
            self._end_if_done(connection)
        if connection.paused and connection.outbox.private_bytes <= PRIVATE_LIMIT:
            self.talkers[connection] = None
        self._watch(connection)

    def _begin_closing(self, connection: Connection) -> None:
        """Listen to somebody no more: they have some time to take what is owed and hang up."""
        connection.paused = False
        self.naming.stop(connection)
        self.pacing.stop(connection)
        self.closing.start(connection, self.now)
        self._watch(connection)

    def _end_if_done(self, connection: Connection) -> None:
        """Close a connection well: end the sending when all is sent, and wait for the peer's end.

        A close before that, with input unread, would be a reset, and the peer
        would lose the last lines (RFC 1122, section 4.2.2.13).
        """
        if connection.state is State.CLOSING and not connection.outbox.owes:
            connection.state = State.LINGERING
            with contextlib.suppress(OSError):  # the peer is gone already
                connection.sock.shutdown(socket.SHUT_WR)
        if connection.state is State.LINGERING and connection.wire.ended:
            self._forget(connection)

    def _drop(self, connection: Connection, why: str) -> None:
        """Lose a connection, with all that it is owed."""
        if connection.state in LISTENED_TO:
            self.chat.leave(connection, why)
        self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        """Close a socket, and keep nothing of its connection."""
        if connection.state is State.GONE:
            return
        connection.state = State.GONE
        self._watch(connection)
        connection.sock.close()
        self.connections.remove(connection)
        self.talkers.pop(connection, None)
        self.backlogged.pop(connection, None)
        self.chat.told.discard(connection)
        for timer in self.countdowns:
            timer.stop(connection)
        group = connection.address_group
        self.callers[group] -= 1
        if not self.callers[group]:
            del self.callers[group]

    def _watch(self, connection: Connection) -> None:
        """Have the selector look out for just what this connection's state asks for."""
        events = 0
        if connection.state is not State.GONE:
            if not connection.paused and not connection.wire.ended:
                events |= READ
            if connection in self.backlogged:
                events |= WRITE
        if events == connection.watched:
            return
        if not events:
            self.selector.unregister(connection.sock)
        elif not connection.watched:
            self.selector.register(connection.sock, events, connection)
        else:
            self.selector.modify(connection.sock, events, connection)
        connection.watched = events


# --------------------------------------------------------------------------
# 7. main
# --------------------------------------------------------------------------


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
        return value

    parse.__name__ = "whole number"  # argparse says it where int() refuses
    return parse


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; exits with 2 where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="batchat.py",
        description="A chat room that people join with telnet.",
        epilog="Ctrl-C closes the room: everyone is told, and is sent all that they are owed.",
    )
    count = whole_number(0, 1_000_000)
    for flag, kind, default, what in [
        ("--port", whole_number(0, 65535), 1337, "port to listen on; 0 takes a free one"),
        ("--rate", count, 10, "lines a second that one person may send; 0 is no limit"),
        ("--max-people", count, 0, "people at a time; 0 is as many as the system allows"),
        ("--max-per-address", count, 100, "connections from one address; 0 is no limit"),
    ]:
        text = f"{what} (default: %(default)s)"
        parser.add_argument(flag, metavar="N", type=kind, default=default, help=text)
    parser.add_argument(
        "--host", metavar="ADDRESS", help="address to listen on (default: every one, IPv4 and IPv6)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more of what happens")
    parser.add_argument("--version", action="version", version=f"BATCHAT {__version__}")
    return parser.parse_args(arguments)


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors as far as the system lets us; returns it."""
    if resource is None:
        return 512  # what select() takes on Windows
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS takes less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def open_listener(host: str | None, port: int) -> socket.socket:
    """A socket that listens on `host`, or on every address; raises OSError."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
        )
    found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    return socket.create_server(cast("tuple[str, int]", address), family=family, backlog=BACKLOG)


def opening_line(host: str | None, listener: socket.socket) -> str:
    """Where the room is, and how to join it."""
    port = listener.getsockname()[1]
    if host:
        return f"BATCHAT is open on {host}, port {port}. Join it: telnet {host} {port}"
    kinds = "IPv4 and IPv6" if listener.family == socket.AF_INET6 else "IPv4"
    return (
        f"BATCHAT is open on every address of this box ({kinds}), port {port}. "
        f"Join it: telnet localhost {port}, or from another box: telnet {socket.gethostname()} {port}"
    )


def stop_on_signals(reactor: Reactor) -> None:
    """Have Ctrl-C and SIGTERM close the room; the second of them ends it at once."""
    signals = (signal.SIGINT, signal.SIGTERM)
    ours, pythons = socket.socketpair()
    for end in (ours, pythons):
        end.setblocking(False)
    signal.set_wakeup_fd(pythons.detach())  # it is written to when a signal comes

    def on_signal(signum: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_DFL)

    def on_wakeup() -> None:
        ours.recv(16)
        logger.info("closing")
        reactor.stop()

    for each in signals:
        signal.signal(each, on_signal)
    reactor.selector.register(ours, READ, on_wakeup)


def main(arguments: list[str] | None = None) -> int:
    """Run the server; returns the exit status."""
    options = parse_options(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    most = max(1, raise_descriptor_limit() - SPARE_DESCRIPTORS - LOBBY)
    people = min(most, options.max_people or most)
    limits = Limits(options.rate, people, options.max_per_address)
    try:
        listener = open_listener(options.host, options.port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "that is no address"
        why = why.partition(" (while")[0]  # create_server() says again where
        where = options.host or "every address"
        print(f"batchat: can't listen on {where}, port {options.port}: {why}", file=sys.stderr)
        return 1
    reactor = Reactor(listener, limits)
    stop_on_signals(reactor)
    print(opening_line(options.host, listener), flush=True)
    reactor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
