#!/usr/bin/env python3
"""BATCHAT: a chat room in one file, which people join with telnet or a browser.

    python batchat.py           opens the room
    telnet localhost 1337       joins it, and so does
    http://localhost:1338/      in a browser

A chat room is a log, and a listener is a place in it.  What is said is
appended once to the room's log (one for telnet and one for browsers: the same
words in two formats); each listener is a cursor that follows the log's end, and
is sent all that is new in one system call.  One thread turns the wheel: select,
listen, send, tidy up.

The parts of this file, in reading order:

    1. The words        what people read
    2. The limits       every number, with its unit
    3. Log and Outbox   bytes and offsets
    4. Telnet           bytes to lines, and what a wire is
    5. The chat         states, names, commands, who hears what
    6. The reactor      sockets, the selector and the clock
    7. main             options, signals, the opening line
    8. The browser      HTTP, WebSocket and the page

Only parts 6 and 7 know of sockets.  Who does not care for browsers can stop at 7,
and has understood the program.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import functools
import ipaddress
import logging
import math
import os
import re
import selectors
import signal
import socket
import stat
import struct
import sys
import time
import unicodedata
import urllib.parse
from base64 import b64decode, b64encode
from collections import defaultdict, deque
from email.utils import formatdate
from http import HTTPStatus
from typing import Callable, Dict, Iterable, NamedTuple, Tuple, Union, cast

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
GREETING = BANNER + "\n{0}\n\n" + PROMPT
HEY = "Hey, {0}! Hope you enjoy the chat.\n\n"

# What happens in the room, as the others read it: {0} is who, {1} what they said.
JOINED = "* {0} has joined the chat\n"
SAID = "<{0}> {1}\n"
DID = "** {0} {1}\n"
RENAMED = "* {0} is now known as {1}\n"
QUIT = "* {0} has quit the chat\n"
THROWN_OUT = "* {0} was thrown out by {1}\n"
YOU_WERE_THROWN_OUT = "* You were thrown out by {0}\n"  # what that one reads

# What stands around what was said before: {0} is since when.
BEFORE = "* Said before you came, since {0}:\n"
NOW = "* That was before you came.\n"

# What people may type: the command, what it takes, what it does, whose it is.
EVERYONE, OPERATORS = "everyone", "operators"
COMMANDS = {
    "/help": ("", "show this list", EVERYONE),
    "/who": ("", "show who is here", EVERYONE),
    "/me": ("ACTION", "say what you do: /me waves", EVERYONE),
    "/msg": ("NAME TEXT", "say something to one person alone", EVERYONE),
    "/nick": ("NAME", "change your name", EVERYONE),
    "/ignore": ("NAME", "stop hearing somebody, or hear them again", EVERYONE),
    "/quit": ("", "leave the chat", EVERYONE),
    "//": ("TEXT", "say a line that starts with a slash", EVERYONE),
    "/op": ("PASSWORD", "become an operator, which anyone may try", OPERATORS),
    "/kick": ("NAME [WHY]", "throw somebody out", OPERATORS),
    "/ban": ("NAME [MINUTES]", "the same, and let nobody in from their address", OPERATORS),
    "/bans": ("", "show the addresses that are banned", OPERATORS),
    "/unban": ("ADDRESS", "let people in from there again", OPERATORS),
}
ALIASES = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/names": "/who", "/list": "/who"}

TAKEN = "The name {0} is taken."
FULL = "* BATCHAT is full, please try again later.\n"
CROWDED = "* Too many people are here from your address, please try again later.\n"
NAMELESS = "* You gave no name in time, goodbye!\n"
BANNED = "* Nobody may come in from your address for another {0} min.\n"
WRONG_PASSWORD = "That is not the password."
GOODBYE = "* That was the last try, goodbye!\n"
SHUTDOWN = "* BATCHAT is closing, goodbye!\n"
HERE = "* BATCHAT is here.\n"
TOO_SLOW = "* You asked for nothing in time.\n"
HELLO = "Hello, World!"
HINT = "* /help shows what you can type.\n"


# --------------------------------------------------------------------------
# 2. The limits
# --------------------------------------------------------------------------

LINE_LIMIT = 4096  # bytes in a line, its end not counted
NAME_LIMIT = 24  # characters in a name
SPELLING_LIMIT = 4 * NAME_LIMIT  # the same as typed: NFC makes it four times shorter at most
NAME_TRIES = 5
PASSWORD_TRIES = 3
NAME_SECONDS = 120.0  # until a caller must have given a name

WEB_PORT = 1338  # where browsers look for us, if it is free
HEAD_LIMIT = 8 << 10  # bytes of a request's head
FIELDS_LIMIT = 100  # in a head
HEAD_SECONDS = 10.0  # until a browser must have opened a WebSocket
PING_SECONDS = 30.0  # between signs of life, so that no proxy hangs up on a browser

WINDOW = 1 << 20  # bytes that neither log grows beyond, however slow somebody is
TOO_FAR_BEHIND = WINDOW // 2  # bytes: nobody is listened to while any listener is,
TURN_LIMIT = WINDOW // 2  # nor after so many bytes were said in one turn
PATIENCE_SECONDS = 2.0  # for which the room waits for those who are too far behind
RECOVERY = 0.2  # seconds of patience that come back in a second without waiting
LOOK_SECONDS = 0.05  # between two looks at them, for the selector tells of them late
SPLICE_SIZE = 128  # bytes that a splice takes, its insert not counted; shorter ones are merged
WHISPER_LIMIT = 64 << 10  # bytes of private lines unsent, before others may add no more,
PRIVATE_LIMIT = 2 * WHISPER_LIMIT  # and before we stop listening to one who has so many answers

SEND_BUFFER = 2 << 20  # bytes that the system keeps for a listener; Linux doubles it
READ_SIZE = 16 << 10  # bytes taken from one socket a turn, so that nobody starves the rest
READ_AHEAD = 64 << 10  # bytes read of somebody whom we can't listen to yet
BACKLOG = 4096  # callers that may wait for us; the system has a limit of its own
ACCEPT_BATCH = 64  # callers let in a turn
LISTEN_SECONDS = 0.05  # for listening in a turn; who is not heard by then keeps their place

# What costs tokens: a line 1, and besides
BYTES_A_TOKEN = 512  # of whatever is read, be it a line, a command or a frame,
NAME_TOKENS = 5  # and a name, old or new: all must read of it, and of their quitting
BURST_SECONDS = 5  # of the permitted rate, that may be sent at once
ADDRESS_SHARE = 10  # times a person's rate, for all from one address

HISTORY_LINES = 1000  # that may be kept for those who come later,
HISTORY_SIZE = 64 << 10  # and their bytes in either format

BAN_MINUTES = 60  # where the operator does not say
LONGEST_BAN = 525_600  # minutes
BANS_LIMIT = 1000

TICK_SECONDS = 1.0  # between two looks at everybody's time, and at what failed
CLOSING_SECONDS = 5.0  # for a leaver to take what is owed and to hang up
TURNED_AWAY_SECONDS = 1.0  # the same, for a caller who was never let in
SHUTDOWN_SECONDS = 2.0  # the same, when the room closes
LOST_SECONDS = 120.0  # for saying what somebody had sent, when nobody is there any more

SPARE_DESCRIPTORS = 16  # kept back for our own use
LOBBY = 16  # descriptors kept back for telling callers that the house is full

KEEPALIVE_IDLE = 60  # seconds of silence, until we ask whether a peer is still there,
KEEPALIVE_INTERVAL = 15  # again after so many seconds,
KEEPALIVE_COUNT = 4  # and give it up after so many questions in vain,
USER_TIMEOUT = 120_000  # or after so many milliseconds without an ACK of what we sent


class Settings(NamedTuple):
    """What whoever runs the server may set."""

    rate: int = 10  # lines a second from one person; 0 is no limit
    max_people: int = 1_000_000
    max_per_address: int = 100  # connections; 0 is no limit
    history: int = 0  # lines
    welcome: str = WELCOME
    password: str = ""  # of the operators; without one, there are none
    behind_proxy: bool = False  # who calls from this very box tells for whom


# --------------------------------------------------------------------------
# 3. Log and Outbox
# --------------------------------------------------------------------------

FOREVER = 1 << 62  # an offset that no log ever reaches
Splice = Tuple[int, int, bytes]
NO_SPLICES: list[Splice] = []  # what nearly everyone has: it stays empty, and in the cache


class Log:
    """What was said, in one wire's format: a byte stream with absolute offsets.

    Only its tail is kept.  It cannot grow or be trimmed while a memoryview of
    `data` is alive.
    """

    __slots__ = ("data", "history", "listeners", "newest", "offered", "start", "wire")

    def __init__(self, wire: type[Wire], history: int = 0) -> None:
        self.wire = wire
        self.history = History(wire, history)
        self.listeners: dict[Person, None] = {}  # those in the room, in order of arrival
        self.data = bytearray()
        self.start = 0  # the offset of data[0]
        self.newest = 0  # the offset of what was appended last
        self.offered = 0  # the offset up to which every listener was offered it

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    @property
    def news(self) -> int:
        """Bytes that no listener was offered yet."""
        # `end` would be a call more for each line
        return self.start + len(self.data) - self.offered

    def append(self, data: bytes) -> None:
        self.newest = self.end
        self.data += data

    def trim(self, offset: int) -> None:
        """Forget all that comes before `offset`."""
        del self.data[: offset - self.start]
        self.start = offset


class History:
    """What was said last, in one wire's format, for those who come in later."""

    __slots__ = ("_most", "_said", "_shown", "_size", "_wire", "made")

    def __init__(self, wire: type[Wire], most: int) -> None:
        self.made = 0  # bytes that were put together for newcomers in this turn
        self._wire = wire
        self._most = most  # lines
        self._said: deque[tuple[str, str, bytes]] = deque()  # when, from where, and how it reads
        self._size = 0  # bytes
        self._shown = b""  # all of it in one piece, which newcomers share

    def append(self, when: str, source: str, line: str) -> None:
        self._shown = b""
        self._said.append((when, source, self._wire.encode(f"{when[-5:]} {line}")))
        self._size += len(self._said[-1][2])
        while len(self._said) > self._most or self._size > HISTORY_SIZE:
            self._size -= len(self._said.popleft()[2])

    def forget(self, source: str) -> None:
        """Keep nothing that came from there."""
        self._shown = b""
        self._said = deque(each for each in self._said if each[1] != source)
        self._size = sum(len(data) for _, _, data in self._said)

    def shown(self) -> bytes:
        """What a newcomer reads of it."""
        if self._said and not self._shown:
            since, now = BEFORE.format(self._said[0][0]), self._wire.encode(NOW)
            lines = [data for _, _, data in self._said]
            self._shown = b"".join([self._wire.encode(since), *lines, now])
            self.made += len(self._shown)
        return self._shown


def local_time() -> str:
    """The time on this box; its last five characters are hours and minutes."""
    return time.strftime("%Y-%m-%d %H:%M")


class Outbox:
    """What one listener is owed: a cursor into the log, and splices.

    A splice `(at, skip, insert)` says: at offset `at` of the log, put in the
    bytes `insert` (a private reply), then leave out the next `skip` bytes (the
    listener's own line).  Splices are in order, and short ones that would touch
    are one; a long insert may be shared, and stays as it is.

    Who is not in the room stands at FOREVER, where nothing is ever said, and
    is owed inserts alone.
    """

    __slots__ = ("cursor", "deaf", "log", "private_bytes", "splices")

    def __init__(self, log: Log) -> None:
        self.log = log
        self.cursor = FOREVER
        self.splices: list[Splice] = NO_SPLICES
        self.private_bytes = 0  # bytes in the inserts of all splices
        self.deaf = False  # nobody is there to take anything any more

    @property
    def behind(self) -> int:
        """Bytes that we keep for this listener, but for inserts; below 0 for who is not in the room."""
        return self.log.end - self.cursor + len(self.splices) * SPLICE_SIZE

    @property
    def owes(self) -> bool:
        return bool(self.splices) or self.cursor < self.log.end

    def enter(self) -> None:
        """Follow the log from its end on; inserts that are still owed come first."""
        if not self.deaf:
            self.cursor = self.log.end
            self.splices = [(self.cursor, 0, insert) for _, _, insert in self.splices] or NO_SPLICES

    def leave(self) -> None:
        """Hear nothing that is said from now on; what is owed stays owed."""
        end = self.log.end
        if self._reach <= end:  # else they hear nothing anyway
            self._splice(end, FOREVER - end, b"")

    def deafen(self) -> None:
        """Owe nothing any more, now and later."""
        self.deaf = True
        self.cursor = FOREVER
        self.splices = NO_SPLICES
        self.private_bytes = 0

    def insert(self, data: bytes) -> None:
        """Owe `data` to this listener alone, after all that was said so far."""
        if data and not self.deaf:
            self.private_bytes += len(data)
            self._splice(max(self._reach, self.log.end), 0, data)

    def skip_newest(self) -> None:
        """Leave out what the log got last."""
        newest = self.log.newest
        if newest >= self._reach:  # who stands at FOREVER does not hear it anyway
            self._splice(newest, self.log.end - newest, b"")

    @property
    def _reach(self) -> int:
        """The first offset that no splice has decided upon."""
        if not self.splices:
            return self.cursor
        at, skip, _ = self.splices[-1]
        return at + skip

    def _splice(self, at: int, skip: int, insert: bytes) -> None:
        if not self.splices:
            self.splices = []  # not the one that all share
        elif at == self._reach and len(self.splices[-1][2]) + len(insert) <= SPLICE_SIZE:
            at, before, earlier = self.splices.pop()
            skip, insert = before + skip, earlier + insert
        self.splices.append((at, skip, insert))

    def unsent(self) -> memoryview:
        """All that is owed, in order; release it before the log grows."""
        log, cursor = self.log, self.cursor
        if not self.splices:
            return memoryview(log.data)[cursor - log.start :]
        with memoryview(log.data) as view:
            pieces: list[bytes | memoryview] = []
            for at, skip, insert in self.splices:
                pieces += (view[cursor - log.start : at - log.start], insert)
                cursor = at + skip
            pieces.append(view[cursor - log.start :])
            return memoryview(b"".join(pieces))

    def advance(self, sent: int) -> None:
        """Move on by `sent` bytes of `unsent`, and over what is left out there."""
        done = 0
        for at, skip, insert in self.splices:
            if sent < at - self.cursor:
                break
            sent -= at - self.cursor
            self.cursor = at + skip  # already, for what is left out need not be kept
            if sent < len(insert):
                self.splices[done] = (self.cursor, 0, insert[sent:])
                self.private_bytes -= sent
                sent = 0
                break
            sent -= len(insert)
            self.private_bytes -= len(insert)
            done += 1
        if done:
            self.splices = self.splices[done:] or NO_SPLICES
        self.cursor += sent


# --------------------------------------------------------------------------
# 4. Telnet
# --------------------------------------------------------------------------


class WireEvent(enum.Enum):
    """What a wire tells of besides lines."""

    OPENED = enum.auto()  # somebody is there to be greeted
    TOO_LONG = enum.auto()  # a line over LINE_LIMIT went by and was thrown away
    LEAVE = enum.auto()  # they want to go, or must: Ctrl-C, the end of the stream
    FORWARDED = enum.auto()  # a proxy has told who calls


# A look-up in the class costs more than all else here.
OPENED, TOO_LONG, LEAVE, FORWARDED = WireEvent
Event = Union[str, WireEvent]


class Wire:
    """A protocol without sockets: `feed` it bytes, and take the `next` event.

    `replies` gathers what the protocol itself must answer.
    """

    __slots__ = ("caller", "ended", "forwards", "replies")

    PING = b""  # a sign of life

    def __init__(self) -> None:
        self.ended = False  # nothing more will be fed
        self.replies = b""
        self.forwards = False  # the peer is a proxy that we trust, and has not told yet who calls
        self.caller = ""  # the address that it told

    @property
    def opened(self) -> bool:
        """Whether somebody is there who can read what we say."""
        return True

    @staticmethod
    def encode(text: str) -> bytes:
        """`text`, whose lines end with "\\n", as it goes over the wire."""
        raise NotImplementedError

    def feed(self, data: bytes) -> None:
        """Take what the peer sent; b"" is its end."""
        raise NotImplementedError

    def next(self) -> Event | None:
        """The next line or event; None where more must be read first."""
        raise NotImplementedError

    def heed_interrupt(self, ahead: bytes, new: int) -> bool:
        """Where they pressed Ctrl-C, throw away all that came before it, and have LEAVE come next.

        It is looked for in the `new` last bytes of what was read, but is not fed
        yet; returns whether it is there, or was fed already.
        """
        return False

    def close(self, words: str, status: HTTPStatus) -> bytes:
        """The last bytes: `words`, and a goodbye where the protocol has one.

        `status` is what the web calls the reason.
        """
        return self.encode(words)


# Escape sequences (ECMA-48, section 5.4; xterm's SS3 and OSC), be they whole or not.
ESCAPE = re.compile(
    r"""(?: \x1b\[ | \x9b ) [0-?]* [ -/]* [@-~]  # CSI, its parameters and what it does
      | \x1bO [@-~]  # SS3 and its letter
      | \x1b\] [^\x07\x1b]* (?: \x07 | \x1b\\ | \Z )  # OSC, up to its end
      | \x1b [^\x1b]?  # and whatever else stands after an ESC""",
    re.VERBOSE | re.DOTALL,
)
# Controls, line and paragraph separators, and the marks that turn writing
# around (Unicode UAX #9, 2.1 to 2.5).  What edits is not here.
FORBIDDEN = re.compile("[\0-\x07\x0a-\x14\x16-\x1f\x80-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
ERASE = re.compile("[\b\x7f\x15]")


def clean(text: str) -> str:
    """`text` as it may stand on anybody's screen, with its erasures carried out."""
    if text.isprintable():  # true of nearly all lines, and of none with a forbidden character
        return text
    # No terminal wraps at a TAB: what follows some of them may stand at the next row's start.
    text = FORBIDDEN.sub("", ESCAPE.sub("", text).replace("\t", " "))
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


IAC, WILL, WONT, DO, DONT = b"\xff", b"\xfb", b"\xfc", b"\xfd", b"\xfe"
# A telnet command that is whole, or the beginning of one at the end of a read (RFC 854).
TELNET_COMMAND = re.compile(
    rb"""\xff (?: ([\xfb-\xfe]) ([\0-\xff])  # WILL, WONT, DO, DONT and an option
                | \xfa (?: [^\xff] | \xff\xff )*  # SB ... SE, or another command, as in BSD's
                  (?: \xff\xf0 | (?= \xff[^\xf0\xff] ) | (\xff? \Z) )
                | ([^\xfa-\xfe])  # a command of one byte
                | ([\xfb-\xfe]? \Z) )  # a beginning""",
    re.VERBOSE,
)
BINARY = b"\0"  # the one option that we want, both ways (RFC 856); the others are refused
ASK_FOR_BINARY = IAC + DO + BINARY + IAC + WILL + BINARY
REFUSALS = {WILL: DONT, DO: WONT}  # WONT and DONT only say what is so already

ARE_YOU_THERE = b"\xf6"
CTRL_C, CTRL_D = b"\x03", b"\x04"
# What the commands of one byte leave in the text; all that are not here, nothing.  Until
# BINARY is agreed upon, BSD's telnet and its heirs look for their keys in every byte less
# its eighth bit: inside a character of UTF-8, a command is the byte that it was made of.
KEYS = {
    b"\xec": (CTRL_D, b"\x84"),  # EOF (RFC 1184): Ctrl-D
    b"\xed": (b"", b"\x9a"),  # SUSP (RFC 1184): Ctrl-Z
    b"\xee": (CTRL_C, b"\x9c"),  # ABORT (RFC 1184): Ctrl-\
    b"\xf3": (CTRL_C, b"\x9c"),  # BRK, break: Ctrl-\ where ABORT is not known
    b"\xf4": (CTRL_C, b"\x83"),  # IP, interrupt process: Ctrl-C
    b"\xf5": (b"", b"\x8f"),  # AO, abort output: Ctrl-O
    ARE_YOU_THERE: (b"", b"\x94"),  # AYT: Ctrl-T
    b"\xf7": (b"\b", b"\x88"),  # EC, erase character: Ctrl-H
    b"\xf8": (b"\x15", b"\x95"),  # EL, erase line: Ctrl-U
    IAC: (IAC, IAC),  # the byte itself
}
UNFINISHED = re.compile(
    rb"(?: [\xc2-\xf4] | [\xe0-\xf4][\x80-\xbf] | [\xf0-\xf4][\x80-\xbf]{2} ) \Z", re.VERBOSE
)
# The same telnets swallow Ctrl-E.  What stands before the 0x85 that made it:
SWALLOWED = re.compile(
    rb"""( [\xc3-\xdf] (?![\x80-\xbf])  # a letter of two bytes
        | \xe0[\xa0-\xbf] (?![\x80-\xbf])  # an Indic or a Thai one
        | [\xe3\xea-\xed] (?=[\x80-\xbf](?![\x80-\xbf])) )  # a Korean one""",
    re.VERBOSE,
)
# A key that leaves, among what no command was taken out of yet: one of the commands, but
# not inside of a character (whose continuations may be commands, with a timing mark each)
# nor after an IAC that escapes its own; or Ctrl-C itself, where that is no option.
LEAD = rb"(?<!\xff)[%b-\xf4]"  # of a character; after an IAC it is a command
CONTINUATIONS = [
    byte + mark
    for byte in (rb"[\x80-\xbf]", rb"\xff[\xec-\xf8]")
    for mark in (b"", rb"\xff\xfd\x06")
]
INSIDE = [
    LEAD % rb"\xc2",
    *(LEAD % rb"\xe0" + second for second in CONTINUATIONS),
    *(LEAD % rb"\xf0" + second + third for second in CONTINUATIONS for third in CONTINUATIONS),
]
INTERRUPT = re.compile(
    rb"\xff[\xee\xf3\xf4]"
    + b"".join(rb"(?<!%b\xff[\xee\xf3\xf4])" % each for each in [IAC, *INSIDE])
    + rb"|\x03(?<!\xff[\xfb-\xfe]\x03)"
)


def text_of(line: bytes) -> str:
    """A line of UTF-8, mended where telnet swallowed bytes, or with U+FFFD where it is broken."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        try:
            return SWALLOWED.sub(b"\\1\x85", line).decode()
        except UnicodeDecodeError:
            return line.decode("utf-8", "replace")


class TelnetWire(Wire):
    """Telnet (RFC 854): lines of text, with commands in between.

    Who shows that they speak it is asked once for BINARY; nobody else ever gets a
    byte that is no UTF-8.  It keeps at most what it was fed and one unfinished line.
    """

    __slots__ = ("_after_cr", "_asked", "_at", "_command", "_key", "_skipping", "_text")

    def __init__(self) -> None:
        super().__init__()
        self._asked = False  # for BINARY
        self._command = b""  # the beginning of a command whose rest is still to come
        self._after_cr = False  # the last byte was a CR: an LF now belongs to it
        self._text = b""  # with "\n" for every line end
        self._at = 0  # how far `next` has come in `_text`
        self._skipping = False  # the line is too long; its rest is thrown away
        self._key = b""  # Ctrl-C or Ctrl-D: nothing is heard after it

    @staticmethod
    def encode(text: str) -> bytes:
        return text.replace("\n", "\r\n").encode()

    def feed(self, data: bytes) -> None:
        if not data:
            self.ended = True
            return
        if self._command or IAC in data:
            data = self._obey(self._command + data)
        if not data or self._key:
            return
        for key in (CTRL_C, CTRL_D):
            data, pressed, _ = data.partition(key)
            self._key = pressed or self._key
        if self._after_cr and data[:1] in (b"\n", b"\0"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        if self._asked and data.count(b"\n") > data.count(b"\r\n"):
            self.replies += b"\r"  # in BINARY, Enter takes a telnet's cursor straight down
        # CR LF, CR NUL, or CR alone (RFC 854, pages 11 and 12)
        plain = data.replace(b"\r\n", b"\n").replace(b"\r\0", b"\n")
        self._text += plain.replace(b"\r", b"\n")
        if not self._asked and len(plain) < len(data) and not self._text.isascii():
            self._asked = True
            self.replies += ASK_FOR_BINARY

    def _obey(self, data: bytes) -> bytes:
        """Do what the telnet commands in `data` say; returns what they leave of it."""
        text, at, replies = bytearray(self._text[-3:]), 0, [self.replies]
        before = len(text)
        self._command = b""
        for command in TELNET_COMMAND.finditer(data):
            text += data[at : command.start()]
            at = command.end()
            verb, option, inside, simple, begun = command.groups()
            if not self._asked:
                self._asked = True
                replies.append(ASK_FOR_BINARY)
            if inside is not None:
                self._command = IAC + b"\xfa" + inside  # what an SB holds is not kept
            elif begun is not None:
                self._command = IAC + begun
            elif verb in REFUSALS and option != BINARY:
                replies.append(IAC + REFUSALS[verb] + option)
            elif simple in KEYS:
                key, byte = KEYS[simple]
                if UNFINISHED.search(text[-3:]):
                    text += byte
                elif simple == ARE_YOU_THERE:
                    replies.append(self.encode(HERE))
                else:
                    text += key
        self.replies = b"".join(replies)
        return bytes(text[before:]) + data[at:]

    def heed_interrupt(self, ahead: bytes, new: int) -> bool:
        if self._key != CTRL_C:
            text = self._text[-3:]  # what stands before a command decides what that one is
            data = text + self._command + ahead
            key = INTERRUPT.search(data, max(len(text), len(data) - new - 1)) if new else None
            if not key:
                return False
            # With the timing mark that follows, and that telnet waits for.
            self._text = self._command = self._key = b""
            self.feed(data[key.start() :][:BYTES_A_TOKEN])
        self._text, self._at, self._skipping = b"", 0, False
        return True

    def next(self) -> Event | None:
        while True:
            start, end = self._at, self._text.find(b"\n", self._at)
            stop = end if end >= 0 else len(self._text)
            if stop - start > LINE_LIMIT and not self._skipping:
                self._at, self._skipping = stop, True
                return TOO_LONG
            if end < 0:
                self._text, self._at = self._text[-3 if self._skipping else start :], 0
                return LEAVE if self._key or self.ended else None
            self._at = end + 1
            if not self._skipping:
                return clean(text_of(self._text[start:end]))
            self._skipping = False


# --------------------------------------------------------------------------
# 5. The chat
# --------------------------------------------------------------------------


class State(enum.Enum):
    """How far a person has come.  Chat alone moves them on; there are no other states.

    AWAITING_NAME   a good name that is free            CHATTING; the others read of it
                    a bad or a taken one                the reason and the prompt again,
                                                        and the fifth time CLOSING
                    /quit, the end of the stream, a     CLOSING
                    web request, a line that is too
                    long, no name in time
    CHATTING        /quit, Ctrl-C, Ctrl-D, the end of   CLOSING; the others read of it
                    the stream, being dropped or
                    thrown out
    CLOSING         all that was owed is sent and the   forgotten
                    peer has hung up, or time is up
    """

    AWAITING_NAME = enum.auto()  # hears nothing of what is said
    CHATTING = enum.auto()
    CLOSING = enum.auto()  # is heard no more, but may still be owed something


AWAITING_NAME, CHATTING, CLOSING = State


class TokenBucket:
    """Holds BURST_SECONDS' worth of tokens, and is filled with `rate` tokens a second.

    It may be overdrawn once; then it is empty until that is made up for.
    """

    __slots__ = ("rate", "ready_at")

    def __init__(self, rate: int) -> None:
        self.rate = rate  # 0 is no limit
        self.ready_at: float = -BURST_SECONDS  # from when on there is something in it

    @property
    def full_at(self) -> float:
        """From when on it is full."""
        return self.ready_at + BURST_SECONDS

    def spend(self, tokens: float, now: float) -> None:
        if self.rate:
            self.ready_at = max(self.ready_at, now - BURST_SECONDS) + tokens / self.rate


class Address:
    """What is kept of an address, or of an IPv6 /64, which counts as one.

    It is kept until nobody is there, it is not banned, and its bucket is full
    again, so that to come back does not fill it.
    """

    __slots__ = ("banned_by", "banned_until", "bucket", "connections", "leaving", "name")

    def __init__(self, name: str, rate: int) -> None:
        self.name = name
        self.bucket = TokenBucket(ADDRESS_SHARE * rate)
        self.connections = 0
        self.leaving: dict[Person, None] = {}  # of them, who is CLOSING
        self.banned_until = 0.0  # nobody may come in before
        self.banned_by = ""

    def banned_minutes(self, now: float) -> int:
        """For how long it is still banned; 0 where it is not."""
        return max(0, math.ceil((self.banned_until - now) / 60))


def address_group(host: str) -> str:
    """What a caller's address counts as: itself, an IPv6 /64, or "" for this very box.

    Raises ValueError where it is none.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_loopback:
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


class Person:
    """What the chat knows of somebody."""

    __slots__ = (
        "address",
        "hinted",
        "name",
        "operator",
        "origin",
        "outbox",
        "state",
        "tries",
        "wire",
    )

    def __init__(self, origin: str, log: Log) -> None:
        self.origin = origin  # where they call from, for our own log
        self.address: Address | None = None  # None for who calls from this very box
        self.wire = log.wire()
        self.outbox = Outbox(log)
        self.state = AWAITING_NAME
        self.name = ""
        self.tries = 0  # names that were refused; inside, passwords
        self.operator = False
        self.hinted = False  # they were told of /help, for they have said "help"


def source_of(person: Person) -> str:
    """Where what they said came from: their address, or themselves, where that is this very box."""
    return person.address.name if person.address else person.origin


class Refusal(Exception):
    """Somebody asked for what they can't have; the text tells them why."""


# Letters and marks that nobody can see, so that no name hides in another.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
GIVES_PASSWORD = re.compile(r"\W*/op(\s|\Z)", re.IGNORECASE)  # what stands there is never said
HTTP_REQUEST = re.compile(r"\S+ \S+ HTTP/\d")  # RFC 9112, section 3
RESERVED_NAMES = {"you", "batchat"}  # private lines call their reader so, and notices this room


def name_key(name: str) -> str:
    """The same for every spelling of a name: BOB, \uff42\uff4f\uff42 and bob are one (Unicode, D146)."""
    if len(name) > SPELLING_LIMIT:
        return name  # nobody is called so, and to normalize it takes time by the square
    key = unicodedata.normalize("NFD", name)
    for _ in range(2):
        key = unicodedata.normalize("NFKD", key.casefold())
    return key


def check_name(text: str) -> str:
    """`text` as a name, in NFC; raises Refusal where it is none."""
    name = text.strip()
    if len(name) <= SPELLING_LIMIT:
        name = unicodedata.normalize("NFC", name)
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


def unalias(command: str) -> str:
    return ALIASES.get(command, command)


def help_for(operator: bool) -> str:
    """What may be typed."""
    rows = [
        (f"{command} {takes}", does)
        for command, (takes, does, whose) in COMMANDS.items()
        if operator or whose == EVERYONE
    ]
    width = max(len(typed) for typed, _ in rows) + 3
    return "".join(f"* {typed:<{width}}{does}\n" for typed, does in rows)


class Chat:
    """The room: who is in it, what they say, and who hears it."""

    def __init__(
        self, wires: Iterable[type[Wire]], settings: Settings, clock: Callable[[], float]
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.logs = {wire: Log(wire, settings.history) for wire in wires}
        self.addresses: dict[str, Address] = {}  # by address_group
        self.people: dict[str, Person] = {}  # those who are chatting, by name_key
        # Those who were told something or let go, since somebody last saw to them.
        self.changed: dict[Person, None] = {}
        # Those who ignore somebody, by whom they ignore.
        self._ignorers: defaultdict[Person, set[Person]] = defaultdict(set)

    # Who is told what

    def tell(self, person: Person, text: str) -> None:
        """Show `text` to one person alone."""
        self.reply(person, person.wire.encode(text))

    def reply(self, person: Person, data: bytes) -> None:
        """The same, with bytes as they go over the wire."""
        person.outbox.insert(data)
        self.changed[person] = None

    def happen(self, words: str, person: Person, text: str = "") -> None:
        """Show everyone what a person does, but neither their own words to them nor
        anything of somebody to those who ignore them, until they quit."""
        line = words.format(person.name, text)
        said = words in (SAID, DID)
        for log in self.logs.values():
            if log.listeners:
                log.append(log.wire.encode(line))
        if said and self.settings.history:
            when, source = local_time(), source_of(person)
            for log in self.logs.values():
                log.history.append(when, source, line)
        for each in self._ignorers.get(person, ()):
            each.outbox.skip_newest()
        if said:
            person.outbox.skip_newest()

    def ping(self) -> None:
        """Give everyone in the room a sign of life, where their wire has one."""
        for log in self.logs.values():
            if log.listeners:
                log.append(log.wire.PING)

    # Coming and going

    def greet(self, person: Person) -> None:
        self.tell(person, GREETING.format(self.settings.welcome))

    def _enter(self, person: Person, text: str) -> None:
        banned = person.address.banned_minutes(self.clock()) if person.address else 0
        if banned:  # since they called
            self.leave(person, "is banned", BANNED.format(banned), HTTPStatus.FORBIDDEN)
            return
        try:
            name = self._free_name(person, text)
        except Refusal as why:
            person.tries += 1
            if person.tries < NAME_TRIES:
                self.tell(person, f"* {why}\n{PROMPT}")
            else:
                self.leave(person, "gave no good name", f"* {why}\n{GOODBYE}")
            return
        person.name, person.tries = name, 0
        self.happen(JOINED, person)  # before they come in and would read it
        person.state = CHATTING
        self.people[name_key(name)] = person
        person.outbox.log.listeners[person] = None
        person.outbox.enter()
        self.tell(person, HEY.format(name))
        self.reply(person, person.outbox.log.history.shown())
        logger.info("%s joined from %s (%d here)", name, person.origin, len(self.people))

    def leave(
        self,
        person: Person,
        why: str,
        words: str = "",
        status: HTTPStatus = HTTPStatus.OK,
        thrown_out_by: str = "",
    ) -> None:
        """Let a person go with some last `words`; the others read that they went.

        `why` is for our own log; `status` is what the web calls it.
        """
        if person.state is CHATTING:
            del self.people[name_key(person.name)]
            person.outbox.log.listeners.pop(person, None)
            person.outbox.leave()
            self._ignorers.pop(person, None)
            for ignorers in self._ignorers.values():
                ignorers.discard(person)
            self.happen(THROWN_OUT if thrown_out_by else QUIT, person, thrown_out_by)
            here = len(self.people)
            logger.info("%s left: %s (%s, %d here)", person.name, why, person.origin, here)
        else:
            logger.debug("%s left before joining: %s", person.origin, why)
        person.state = CLOSING
        self.reply(person, person.wire.close(words, status))

    def close(self, everyone: Iterable[Person]) -> None:
        """Let everyone go; nobody reads that the others went."""
        for log in self.logs.values():
            log.listeners.clear()
        for person in everyone:
            if person.state is not CLOSING:
                self.leave(person, "the room closes", SHUTDOWN, HTTPStatus.SERVICE_UNAVAILABLE)

    # The state machine

    def handle(self, person: Person, event: Event) -> None:
        """Do what an event means in the state that the person is in; see State."""
        try:
            if event is LEAVE:
                self.leave(person, "ended it")
            elif person.state is CHATTING:
                if isinstance(event, WireEvent):
                    raise Refusal(f"A line has at most {LINE_LIMIT} bytes; yours was not sent.")
                text = event.lstrip()
                if not text:
                    pass  # a blank line is not said
                elif event.startswith("//"):
                    self.happen(SAID, person, event[1:])
                elif event[0] == "/" or (not text[0].isalnum() and GIVES_PASSWORD.match(text)):
                    self._command(person, text[text.index("/") :])
                else:
                    self.happen(SAID, person, event)
                    if text in ("help", "?") and not person.hinted:
                        person.hinted = True
                        self.tell(person, HINT)
            elif person.state is AWAITING_NAME:
                if event is OPENED:
                    self.greet(person)
                elif isinstance(event, WireEvent) or HTTP_REQUEST.match(event):
                    self.leave(person, "sent no name")  # HTTP, or longer than any name
                elif unalias(event.strip().lower()) == "/quit":
                    self.leave(person, "quit")
                else:
                    self._enter(person, event)
        except Refusal as why:
            self.tell(person, f"* {why}\n")

    # Names

    def _free_name(self, person: Person, text: str) -> str:
        """`text` as a name that this person may take, their own included; raises Refusal."""
        name = check_name(text)
        key = name_key(name)
        if key in RESERVED_NAMES or self.people.get(key, person) is not person:
            raise Refusal(TAKEN.format(name))
        return name

    def _find(self, name: str) -> Person:
        """Who is called `name`; raises Refusal."""
        try:
            return self.people[name_key(name)]
        except KeyError:
            raise Refusal(f"Nobody here is called {name}.") from None

    # The commands

    def _command(self, person: Person, line: str) -> None:
        command, rest = [*line.split(None, 1), ""][:2]
        command, rest = unalias(command.lower()), rest.strip()
        takes, _, whose = COMMANDS.get(command, ("", "", None))
        if not (
            whose == EVERYONE
            or (whose == OPERATORS and person.operator)
            or (command == "/op" and self.settings.password)
        ):
            raise Refusal(f"There is no command {command}; /help shows those there are.")
        if len(rest.split(None, 1)) < len(takes.partition("[")[0].split()):
            raise Refusal(f"It goes like this: {command} {takes}")
        getattr(self, "_do_" + command[1:])(person, rest)

    def _do_help(self, person: Person, rest: str) -> None:
        self.tell(person, help_for(person.operator))

    def _do_who(self, person: Person, rest: str) -> None:
        people = [self.people[key] for key in sorted(self.people)]
        names = ["@" * each.operator + each.name for each in people]
        self.tell(person, f"* {len(names)} here: {', '.join(names)}\n")

    def _do_me(self, person: Person, rest: str) -> None:
        self.happen(DID, person, rest)

    def _do_msg(self, person: Person, rest: str) -> None:
        name, text = rest.split(None, 1)
        listener = self._find(name)
        if listener not in self._ignorers.get(person, ()):
            if listener.outbox.private_bytes > WHISPER_LIMIT:
                raise Refusal(f"{listener.name} has too much to read; your line was not sent.")
            self.tell(listener, f"[{person.name} -> you] {text}\n")
        self.tell(person, f"[you -> {listener.name}] {text}\n")

    def _do_nick(self, person: Person, rest: str) -> None:
        name = self._free_name(person, rest)
        if name == person.name:
            raise Refusal(f"You are {name} already.")
        del self.people[name_key(person.name)]
        self.people[name_key(name)] = person
        self.happen(RENAMED, person, name)
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

    # The operators' commands

    def _do_op(self, person: Person, rest: str) -> None:
        from hmac import compare_digest  # here, for it takes 4 MB that few need

        if compare_digest(rest.encode(), self.settings.password.encode()):
            person.operator = True
            logger.info("%s is an operator (%s)", person.name, person.origin)
            self.tell(person, "* You are an operator now; /help shows what that is.\n")
            return
        logger.info("%s gave a wrong password (%s)", person.name, person.origin)
        person.tries += 1
        if person.tries == PASSWORD_TRIES:
            self.leave(person, "gave no right password", f"* {WRONG_PASSWORD}\n{GOODBYE}")
        else:
            raise Refusal(WRONG_PASSWORD)

    def _do_kick(self, person: Person, rest: str) -> None:
        name, why = [*rest.split(None, 1), ""][:2]
        self._throw_out(self._find(name), person, why)

    def _throw_out(self, other: Person, person: Person, why: str) -> None:
        if other is person:
            raise Refusal("You can't throw out yourself; /quit leaves.")
        by = f"{person.name}: {why}" if why else person.name
        log_line = f"thrown out by {person.name}, {person.origin}"
        self.leave(other, log_line, YOU_WERE_THROWN_OUT.format(by), thrown_out_by=by)

    def _do_ban(self, person: Person, rest: str) -> None:
        name, given = [*rest.split(None, 1), ""][:2]
        other = self._find(name)
        address = other.address
        try:
            minutes = int(given or BAN_MINUTES)
        except ValueError:
            minutes = 0
        if not 1 <= minutes <= LONGEST_BAN:
            raise Refusal(f"A ban takes from 1 to {LONGEST_BAN} minutes.")
        bans = self._bans()
        if address and address not in bans and len(bans) >= BANS_LIMIT:
            raise Refusal(f"There are {BANS_LIMIT} bans already; /unban ends one.")
        self._throw_out(other, person, f"banned for {minutes} min" if address else "")
        for log in self.logs.values():
            log.history.forget(source_of(other))
        if address is None:
            raise Refusal(
                f"{other.name} is out, but called from this very box: no ban keeps them out."
            )
        address.banned_until = max(address.banned_until, self.clock() + 60 * minutes)
        address.banned_by = person.name
        logger.info("%s banned %s for %d min", person.name, address.name, minutes)
        still_here = sum(1 for each in self.people.values() if each.address is address)
        banned = f"{address.name} is banned for {minutes} min"
        self.tell(person, f"* {banned}; from there are still here: {still_here}.\n")

    def _bans(self) -> dict[Address, int]:
        """The addresses that are banned, and the minutes that are left."""
        now = self.clock()
        minutes = {each: each.banned_minutes(now) for each in self.addresses.values()}
        return {each: left for each, left in minutes.items() if left}

    def _do_bans(self, person: Person, rest: str) -> None:
        lines = [
            f"* {each.name} is banned for another {minutes} min, by {each.banned_by}.\n"
            for each, minutes in self._bans().items()
        ]
        self.tell(person, "".join(lines) or "* No address is banned.\n")

    def _do_unban(self, person: Person, rest: str) -> None:
        address = None
        with contextlib.suppress(ValueError):  # it is no address
            address = self.addresses.get(address_group(rest.partition("/")[0]))
        if address is None or address not in self._bans():
            raise Refusal(f"{rest} is not banned.")
        address.banned_until = 0
        logger.info("%s took back the ban of %s", person.name, address.name)
        self.tell(person, f"* {address.name} is no longer banned.\n")


# --------------------------------------------------------------------------
# 6. The reactor
# --------------------------------------------------------------------------

NEVER = float("inf")
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
SOCKET_OPTIONS = [
    (level, getattr(socket, name), value)
    for level, name, value in [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),  # a line leaves at once
        (socket.SOL_SOCKET, "SO_OOBINLINE", 1),  # telnet may send part of Ctrl-C as urgent data
        # A size of the system's own grows, and it looks as if a stalled listener read on.
        (socket.SOL_SOCKET, "SO_SNDBUF", SEND_BUFFER),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE_IDLE),
        (socket.IPPROTO_TCP, "TCP_KEEPALIVE", KEEPALIVE_IDLE),  # the same, as macOS calls it
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", KEEPALIVE_COUNT),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", USER_TIMEOUT),
    ]
    if hasattr(socket, name)
]
RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)  # what SO_LINGER takes


class Connection(Person):
    """A person, and the socket they are at."""

    __slots__ = (
        "bucket",
        "ended",
        "since",
        "sock",
        "turned_away",
        "unheard",
        "unsearched",
        "watched",
    )

    def __init__(self, sock: socket.socket, origin: str, log: Log, rate: int, now: float) -> None:
        super().__init__(origin, log)
        self.sock = sock
        self.bucket = TokenBucket(rate)
        self.turned_away = False
        self.unheard = b""  # what we have read, but not given to the wire yet
        self.unsearched = 0  # bytes at its end in which we have not looked for Ctrl-C
        self.ended = False  # there is no more to read
        self.since = now  # when they called, were lost, or began to leave
        self.watched = 0  # the events that the selector was asked for

    @property
    def deadline(self) -> float:
        """When their time in this state is over."""
        if self.state is CLOSING:
            return self.since + (TURNED_AWAY_SECONDS if self.turned_away else CLOSING_SECONDS)
        if self.outbox.deaf:
            return self.since + LOST_SECONDS
        if self.state is CHATTING:
            return NEVER
        return self.since + (NAME_SECONDS if self.wire.opened else HEAD_SECONDS)


class Reactor:
    """The wheel: select, listen, send, tidy up.

    While it listens the logs grow, and while it sends they must not, because
    views of them are alive.

    Whatever happens to a connection, `_settle` draws the conclusions; whatever
    fails with one, `_guard` drops that one alone.
    """

    def __init__(
        self,
        doors: dict[socket.socket, type[Wire]],
        settings: Settings,
        selector: selectors.BaseSelector | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.doors = doors  # the sockets that listen, and what is spoken there
        self.settings = settings
        self.selector = selector or selectors.DefaultSelector()
        self.clock = clock
        self.chat = Chat(doors.values(), settings, clock)

        self.connections: dict[Connection, None] = {}  # all, in order of arrival
        self.leaving: dict[Connection, None] = {}  # of them, who is CLOSING
        # Who has said what we have not taken yet, whoever waits longest first.
        self.in_line: dict[Connection, None] = {}
        # Whose socket did not take all that they are owed: no send is tried while they are here.
        self.slow: dict[Connection, None] = {}

        self.patience = PATIENCE_SECONDS  # seconds for which the room may still be held
        self.held = False  # nobody is listened to, for somebody is too far behind

        self.now = clock()  # when this turn began
        self.tick_at = self.now  # the next look at what is not urgent
        self.ping_at = self.now + PING_SECONDS  # when everyone gets the next sign of life
        self.ends_at = NEVER  # when the room closes, whoever is still there

        for door in doors:
            door.setblocking(False)
        self._open_doors()

    def run(self) -> bool:
        """Serve until `stop` is called and everyone has gone, or time is up.

        Returns False where it was an error that stopped it.
        """
        well = True
        while self.ends_at == NEVER or (self.connections and self.now < self.ends_at):
            try:
                self.turn()
            except Exception:
                logger.exception("the room closes, for an error that belongs to nobody")
                if not well:
                    break
                well = False
                self.stop()
        for connection in list(self.connections):
            self._forget(connection)
        return well

    def stop(self) -> None:
        """Close the room: tell everyone, send what is owed, wait for them to hang up."""
        if self.ends_at == NEVER:
            self.ends_at = self.now + SHUTDOWN_SECONDS
            for door in self.doors:
                self._close_door(door)
                door.close()
            self.chat.close(self.connections)

    # The wheel

    def turn(self) -> None:
        """One turn of the wheel; waits for something to do."""
        ready = self.selector.select(self._idle_seconds())
        self._pass_time()
        for key, events in ready:
            if isinstance(key.data, Connection):
                self._take_up(key.data, events)
            else:
                key.data()  # a door, or whatever else was registered with what to do
        self._listen()
        for log in self.chat.logs.values():
            self._send_news(log)
        self._settle_changed()
        if self.now >= self.tick_at:
            self._tick()
        self._mind_the_slow()
        self._trim()

    def _idle_seconds(self) -> float:
        """How long the selector may wait."""
        if self.chat.changed or any(log.news for log in self.chat.logs.values()):
            return 0
        until = min([self.tick_at, self.ends_at, *map(self._heard_at, self.in_line)])
        if self.held:
            until = min(until, self.now + LOOK_SECONDS)
        return max(0, until - self.clock())

    def _pass_time(self) -> None:
        """See what time it is; the room's patience runs down while it is held, else it comes back."""
        before, self.now = self.now, self.clock()
        passed = self.now - before
        if self.held:
            self.patience = max(0, self.patience - passed)
        else:
            self.patience = min(PATIENCE_SECONDS, self.patience + passed * RECOVERY)

    def _take_up(self, connection: Connection, events: int) -> None:
        """Do what the selector says can be done: read, or try to send again."""
        if connection in self.connections:  # not dropped in this very turn
            self.chat.changed[connection] = None
            if events & WRITE:
                self.slow.pop(connection, None)
            if events & READ:
                self._guard(self._read, connection)

    def _listen(self) -> None:
        """Listen to those in line who may be heard now; the others keep their place."""
        until = self.clock() + LISTEN_SECONDS
        for connection in list(self.in_line):
            if self.clock() > until:
                return
            if self._heard_at(connection) <= self.now:
                self._guard(self._listen_to, connection)
            elif connection.unsearched:  # they may have pressed Ctrl-C
                self._guard(self._take_lines, connection)

    def _send_news(self, log: Log) -> None:
        """Send those who follow a log what it got since the last turn, each in one system call."""
        log.history.made = 0
        offered, end = log.offered, log.end
        size = end - offered
        if not size:
            return
        changed = self.chat.changed
        with memoryview(log.data)[offered - log.start :] as news:
            for connection in cast("dict[Connection, None]", log.listeners):
                outbox = connection.outbox
                # Nearly everyone, nearly always; so it calls nothing of ours.
                if outbox.cursor == offered and not outbox.splices:
                    try:
                        sent = connection.sock.send(news)
                    except OSError:
                        sent = 0  # to settle it is to try again, and to learn why
                    if sent == size:
                        outbox.cursor = end
                        continue
                    outbox.cursor += sent
                changed[connection] = None
        log.offered = end

    def _settle_changed(self) -> None:
        """See to all to whom something happened in this turn."""
        changed = cast("dict[Connection, None]", self.chat.changed)
        self.chat.changed = {}
        for connection in changed:
            self._guard(self._settle, connection)

    def _mind_the_slow(self) -> None:
        """Hold the room while somebody is too far behind, or drop them when patience is at its end."""
        while True:
            for connection in self._too_far_behind():
                # Try to send now: the selector tells of room only when there is much of it.
                del self.slow[connection]
                self._guard(self._settle, connection)
            late = self._too_far_behind()
            if not late or self.patience >= LOOK_SECONDS:
                break
            for connection in late:  # that they quit is said to the others, so look again
                self._drop(connection, "too far behind")
        self.held = bool(late)

    def _too_far_behind(self) -> list[Connection]:
        return [each for each in self.slow if each.outbox.behind > TOO_FAR_BEHIND]

    def _trim(self) -> None:
        """Forget what everyone has who follows a log."""
        for log in self.chat.logs.values():
            cursors = [each.outbox.cursor for each in self.slow if each.outbox.log is log]
            log.trim(min([log.offered, *cursors]))

    def _tick(self) -> None:
        """Once a second: try again what failed, give signs of life, call up those whose time is up."""
        self.tick_at = self.now + TICK_SECONDS
        self._open_doors()
        pings = self.now >= self.ping_at
        if pings:
            self.ping_at = self.now + PING_SECONDS
            self.chat.ping()
        for address in list(self.chat.addresses.values()):
            needed = max(address.bucket.full_at, address.banned_until)
            if not address.connections and needed <= self.now:
                del self.chat.addresses[address.name]
        for connection in list(self.in_line):
            self._guard(self._look_for_loss, connection)
        for connection in list(self.connections):
            wire = connection.wire
            if pings and wire.PING and wire.opened and connection.state is AWAITING_NAME:
                self.chat.reply(connection, wire.PING)
            if self.now >= connection.deadline:
                self._guard(self._time_is_up, connection)

    def _time_is_up(self, connection: Connection) -> None:
        if connection.state is CLOSING or connection.outbox.deaf:
            self._drop(connection, "is gone")
        else:
            words = NAMELESS if connection.wire.opened else TOO_SLOW
            self._dismiss(connection, words, HTTPStatus.REQUEST_TIMEOUT)
            self._settle(connection)

    # The doors

    def _open_doors(self) -> None:
        """Have the selector tell of callers, unless it does already."""
        if self.ends_at == NEVER:
            for door in self.doors:
                if door not in self.selector.get_map():
                    try:
                        self.selector.register(door, READ, functools.partial(self._accept, door))
                    except OSError as error:
                        logger.warning("can't wait for callers: %s", error.strerror)

    def _close_door(self, door: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # it is closed already
            self.selector.unregister(door)

    def _accept(self, door: socket.socket) -> None:
        """Let in those who are calling."""
        for _ in range(ACCEPT_BATCH):
            if self.ends_at != NEVER:
                return  # the room was closed in this very turn
            try:
                sock, address = door.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors or memory; it may get better
                logger.warning("can't accept: %s", error.strerror)
                self._close_door(door)
                return
            if address:  # macOS gives none for a caller who is gone again
                host, port = address[:2]
                host = host[7:] if host.startswith("::ffff:") else host  # IPv4, at a door for both
                log = self.chat.logs[self.doors[door]]
                origin = f"{host} port {port}"
                connection = Connection(sock, origin, log, self.settings.rate, self.now)
                self.connections[connection] = None
                self._guard(self._admit, connection, host)

    def _admit(self, connection: Connection, host: str) -> None:
        """Greet a caller, or tell them why they can't come in."""
        connection.sock.setblocking(False)
        self._count_in(connection, host)
        connection.wire.forwards = self.settings.behind_proxy and not connection.address
        if connection.state is not CLOSING:
            self._set_options(connection.sock)
            if connection.wire.opened:
                self.chat.greet(connection)
        self._settle(connection)
        self._make_room(connection)

    def _count_in(self, connection: Connection, host: str) -> None:
        """Find out from where somebody calls, and turn them away where that is too much."""
        chat, settings, group = self.chat, self.settings, address_group(host)
        banned = from_there = 0
        if group:
            if group not in chat.addresses:
                chat.addresses[group] = Address(group, settings.rate)
            address = connection.address = chat.addresses[group]
            address.connections += 1
            from_there = address.connections - len(address.leaving)
            banned = address.banned_minutes(self.now)
        if banned:
            self._turn_away(connection, BANNED.format(banned), HTTPStatus.FORBIDDEN)
        elif len(self.connections) - len(self.leaving) > settings.max_people:
            self._turn_away(connection, FULL)
        elif 0 < settings.max_per_address < from_there:
            self._turn_away(connection, CROWDED)

    def _make_room(self, caller: Connection) -> None:
        """Where too many take leave, the first to whom nothing is owed goes at once."""
        crowd: dict[Person, None] = {}
        if len(self.connections) > self.settings.max_people + LOBBY:
            crowd = cast("dict[Person, None]", self.leaving)
        elif caller.address and 0 < self.settings.max_per_address < len(caller.address.leaving):
            crowd = caller.address.leaving
        if crowd:
            self._forget(cast(Connection, min(crowd, key=lambda each: each.outbox.owes)))

    def _set_options(self, sock: socket.socket) -> None:
        for option in SOCKET_OPTIONS:
            try:
                sock.setsockopt(*option)
            except OSError as error:
                if error.errno != errno.ENOPROTOOPT:  # a kernel that does not know it does without
                    raise

    def _turn_away(
        self,
        connection: Connection,
        words: str,
        status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE,
    ) -> None:
        connection.turned_away = True
        self._dismiss(connection, words, status)

    def _dismiss(self, connection: Connection, words: str, status: HTTPStatus) -> None:
        """Have somebody leave who has no name yet, and tell them why."""
        self.chat.leave(connection, words.strip("* \n"), words, status)

    # One connection

    def _guard(self, step: Callable[..., object], connection: Connection, *more: object) -> None:
        """Take a step with one connection; whatever fails costs that one alone."""
        if connection not in self.connections:
            return
        try:
            step(connection, *more)
            return
        except OSError as error:
            why = error.strerror or "lost"
        except Exception:
            logger.exception("an error of ours, with %s", connection.origin)
            why = "an error of ours"
        self._drop(connection, why)  # only here, where no traceback keeps a view of the log alive

    def _heard_at(self, connection: Connection) -> float:
        """When more of what somebody sent may be taken; NEVER is until something else changes."""
        if connection.state is CLOSING:
            return self.now  # it is thrown away
        outbox = connection.outbox
        # Our own log stands for all: a line adds about the same to each.
        new = outbox.log.news + outbox.log.history.made
        if self.held or new > TURN_LIMIT or outbox.private_bytes > PRIVATE_LIMIT:
            return NEVER
        if connection.address:
            return max(connection.bucket.ready_at, connection.address.bucket.ready_at)
        return connection.bucket.ready_at

    def _charge(self, connection: Connection, tokens: float) -> None:
        """Have somebody pay for what they made us do, and their address, too."""
        connection.bucket.spend(tokens, self.now)
        if connection.address:
            connection.address.bucket.spend(tokens, self.now)

    def _read(self, connection: Connection) -> None:
        """Read what somebody sent, be it their turn or not; for that, there is room (see _settle)."""
        try:
            data = connection.sock.recv(min(READ_SIZE, READ_AHEAD - len(connection.unheard)))
        except BlockingIOError:
            return
        except OSError as error:
            if connection not in self.in_line:
                raise
            self._lose(connection, error)  # for what they sent before may still be said
            data = b""
        connection.unheard += data
        connection.unsearched += len(data)
        connection.ended = not data
        self.in_line.setdefault(connection)

    def _forward(self, connection: Connection) -> None:
        """Somebody calls through a proxy on this very box, which has told for whom."""
        caller = connection.wire.caller
        connection.origin = f"{caller} by way of {connection.origin}"
        self._count_in(connection, caller)
        self._settle(connection)
        self._make_room(connection)

    def _listen_to(self, connection: Connection) -> None:
        """Take lines of somebody whose turn it is; what is left waits for the next one."""
        all_taken = self._take_lines(connection)
        self.in_line.pop(connection, None)
        if not all_taken:
            self.in_line[connection] = None  # behind the others
        self.chat.changed[connection] = None

    def _take_lines(self, connection: Connection) -> bool:
        """Handle what we have read of somebody, as far as they can pay; returns whether that is all.

        At a time it gives the wire no more than a token buys, or all, where there
        is no limit: so that those who send what is laborious do not keep the rest.
        """
        wire, rate = connection.wire, self.settings.rate
        helping, helped = BYTES_A_TOKEN if rate else READ_SIZE, False
        while connection.state is not CLOSING:
            if self._heard_at(connection) > self.now:
                new, connection.unsearched = connection.unsearched, 0
                if not wire.heed_interrupt(connection.unheard, new):
                    return False
            event, name = wire.next(), connection.name
            if wire.replies:
                self.chat.reply(connection, wire.replies)
                wire.replies = b""
            if event is FORWARDED:
                self._forward(connection)
            elif event is not None:
                self.chat.handle(connection, event)
                # Blank lines are free for who is lost, or they would hold a name for nothing.
                if rate and (event or not connection.outbox.deaf):
                    self._charge(connection, 1 if connection.name == name else NAME_TOKENS)
            elif connection.unheard:
                if helped:
                    return False
                data = connection.unheard[:helping]
                connection.unheard = connection.unheard[helping:]
                self._charge(connection, len(data) / BYTES_A_TOKEN)
                wire.feed(data)
                helped = True
            elif connection.ended:
                wire.feed(b"")
            else:
                break
        return True

    def _settle(self, connection: Connection) -> None:
        """Do all that follows from how things stand with somebody; call it as often as you like."""
        outbox, ended = connection.outbox, connection.ended
        if outbox.owes and connection not in self.slow:
            self._flush(connection)
        if outbox.owes:
            self.slow[connection] = None
        else:
            self.slow.pop(connection, None)
        if connection.state is CLOSING:
            connection.unheard = b""
            self.in_line.pop(connection, None)
            if connection not in self.leaving:
                self.leaving[connection] = None
                connection.since = self.now
                if connection.address:
                    connection.address.leaving[connection] = None
            if not outbox.owes:
                if ended:
                    self._forget(connection)
                    return
                # Before the peer's end, a close with input unread would be a reset, and the
                # peer would lose the last lines (RFC 1122, section 4.2.2.13).
                self._shut(connection, socket.SHUT_WR)
        reads = READ if not ended and len(connection.unheard) < READ_AHEAD else 0
        writes = WRITE if connection in self.slow else 0
        self._watch(connection, reads | writes)

    def _flush(self, connection: Connection) -> None:
        """Send somebody all that they are owed, as far as their socket takes it."""
        outbox = connection.outbox
        with outbox.unsent() as unsent:
            try:
                sent = connection.sock.send(unsent) if unsent else 0
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._lose(connection, error)
                return
        outbox.advance(sent)

    def _look_for_loss(self, connection: Connection) -> None:
        """See whether somebody has been reset of whom the selector does not tell: who is in line."""
        error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            self._lose(connection, OSError(error, os.strerror(error)))
            self._settle(connection)

    def _lose(self, connection: Connection, error: OSError) -> None:
        """Send somebody nothing any more, for nobody is there; or if somebody is, there is a gap.

        What they said before may still wait to be read, up to the end, and is
        said for LOST_SECONDS.
        """
        if not connection.outbox.deaf:
            level = logging.INFO if connection.state is CHATTING else logging.DEBUG
            logger.log(level, "%s takes nothing any more: %s", connection.origin, error.strerror)
            if connection.state is not CLOSING:
                connection.since = self.now
            connection.outbox.deafen()
            self._shut(connection, socket.SHUT_RDWR)

    def _shut(self, connection: Connection, how: int) -> None:
        try:
            connection.sock.shutdown(how)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the peer is gone already
                raise

    def _watch(self, connection: Connection, events: int) -> None:
        """Have the selector tell of just these events."""
        watched, sock = connection.watched, connection.sock
        if events == watched:
            return
        connection.watched = 0  # which it is where the selector fails
        if not events:
            self.selector.unregister(sock)
        elif not watched:
            self.selector.register(sock, events, connection)
        else:
            self.selector.modify(sock, events, connection)
        connection.watched = events

    def _drop(self, connection: Connection, why: str) -> None:
        """End a connection at once, with all that it is owed."""
        if connection in self.connections:
            if connection.state is not CLOSING:
                self.chat.leave(connection, why)
            # A plain close leaves a full send buffer to the system for two minutes (tcp(7)).
            with contextlib.suppress(OSError):  # it is gone either way
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        """Close a socket, and keep nothing of its connection."""
        del self.connections[connection]
        for kept in (self.leaving, self.in_line, self.slow):
            kept.pop(connection, None)
        self.chat.changed.pop(connection, None)
        if connection.address:
            connection.address.connections -= 1
            connection.address.leaving.pop(connection, None)
        if connection.watched:
            with contextlib.suppress(OSError, KeyError):  # closing it will do
                self.selector.unregister(connection.sock)
        with contextlib.suppress(OSError):  # it is gone either way
            connection.sock.close()


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


def one_line(text: str) -> str:
    """An argparse type: text as it may stand on anybody's screen."""
    return clean(text.encode("utf-8", "replace").decode())


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; exits with 2 where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="batchat.py",
        description="A chat room that people join with telnet or a browser.",
        epilog="Ctrl-C closes the room: everyone is told, and is sent all that they are owed.",
    )
    port, count = whole_number(0, 65535), whole_number(0, 1_000_000)
    rows: list[tuple[str, str, Callable[[str], object], object, str]] = [
        (
            "--host",
            "ADDRESS",
            str,
            None,
            "address to listen on (default: every one, IPv4 and IPv6)",
        ),
        ("--port", "N", port, 1337, "port to listen on; 0 takes a free one"),
        (
            *("--web-port", "N", port, None),
            f"port for browsers (default: {WEB_PORT}, or any if it is taken)",
        ),
        ("--rate", "N", count, 10, "lines a second that one person may send; 0 is no limit"),
        ("--max-people", "N", count, 0, "people at a time; 0 is as many as the system allows"),
        ("--max-per-address", "N", count, 100, "connections from one address; 0 is no limit"),
        (
            *("--history", "N", whole_number(0, HISTORY_LINES), 0),
            f"lines said before that newcomers read, at most {HISTORY_LINES}",
        ),
        ("--welcome", "TEXT", one_line, WELCOME, "what callers read first"),
        (
            *("--password-file", "FILE", str, None),
            "its first line makes an operator of whoever types /op and that",
        ),
    ]
    for flag, value, kind, default, what in rows:
        text = what if default is None else f"{what} (default: %(default)s)"
        parser.add_argument(flag, metavar=value, type=kind, default=default, help=text)
    parser.add_argument(
        "--behind-proxy",
        action="store_true",
        help="trust X-Forwarded-For of browsers that call from this very box",
    )
    parser.add_argument("--no-web", action="store_true", help="open no door for browsers")
    parser.add_argument("-v", "--verbose", action="store_true", help="log more of what happens")
    parser.add_argument("--version", action="version", version=f"BATCHAT {__version__}")
    return parser.parse_args(arguments)


def read_password(path: str) -> str:
    """The first line of a file; raises OSError, or ValueError where there is none in UTF-8."""
    with open(path, "rb") as file:
        line = file.readline(LINE_LIMIT)
        if os.name == "posix" and os.fstat(file.fileno()).st_mode & stat.S_IROTH:
            logger.warning("everybody on this box can read %s", path)
    try:
        password = clean(line.decode("utf-8-sig")).strip()
    except UnicodeDecodeError:
        raise ValueError("that is no UTF-8") from None
    if not password:
        raise ValueError("its first line is empty")
    return password


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


def open_web_listener(host: str | None, port: int | None) -> socket.socket:
    """The same for browsers; any free port will do where none was asked for and ours is taken."""
    try:
        return open_listener(host, WEB_PORT if port is None else port)
    except OSError:
        if port is not None:
            raise
        return open_listener(host, 0)


def opening_lines(host: str | None, doors: list[socket.socket]) -> str:
    """Where the room is, and how to join it from here and from another box."""
    ports = [door.getsockname()[1] for door in doors]
    kinds = "IPv4 and IPv6" if doors[0].family == socket.AF_INET6 else "IPv4"
    where = host or f"every address of this box ({kinds})"
    name = host or "localhost"
    lines = [
        f"BATCHAT is open on {where}, port {ports[0]}.",
        f"Join it: telnet {name} {ports[0]}",
    ]
    if ports[1:]:
        lines[1] += f", or in a browser: http://{f'[{name}]' if ':' in name else name}:{ports[1]}/"
    if not host:
        lines.append(f"From another box: {socket.gethostname()} in the place of localhost.")
    return "\n".join(lines)


class PatientHandler(logging.Handler):
    """Writes the log to a descriptor, and never waits for whoever should read it.

    What can't be written at once is left out, and counted in the next line that
    can.  (On Windows it may have to wait.)
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.lost = 0  # lines
        self.unwritten = b""  # the rest of one that was written in part

    def emit(self, record: logging.LogRecord) -> None:
        lost = f"... {self.lost} lines of the log were lost\n" if self.lost else ""
        line = f"{lost}{self.format(record)}\n".encode("utf-8", "backslashreplace")
        if self.unwritten:
            self.unwritten = self._write(self.unwritten)
        rest = line if self.unwritten else self._write(line)
        if rest == line:
            self.lost += 1
        else:
            self.lost, self.unwritten = 0, rest

    def _write(self, data: bytes) -> bytes:
        """Write what can be written at once; returns the rest."""
        try:
            if os.name == "nt":  # where a console can't be asked not to block
                return data[os.write(self.descriptor, data) :]
            # Only for now: a terminal that never blocks would confuse the shell we share it with.
            blocking = os.get_blocking(self.descriptor)
            os.set_blocking(self.descriptor, False)
            try:
                return data[os.write(self.descriptor, data) :]
            finally:
                os.set_blocking(self.descriptor, blocking)
        except OSError:  # it is full, or nobody will ever read it
            return data


def start_logging(level: int) -> None:
    """Log to standard error; with the time, unless it is systemd's journal, which has its own."""
    if sys.stderr is None:
        logger.addHandler(logging.NullHandler())  # its descriptor may be anybody's socket by now
        return
    handler = PatientHandler(sys.stderr.fileno())
    found = os.fstat(handler.descriptor)
    journal = os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    time_and_words = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handler.setFormatter(logging.Formatter("%(message)s") if journal else time_and_words)
    logger.addHandler(handler)
    logger.setLevel(level)


def announce(lines: str) -> None:
    """Write lines to standard output, or to the log where that can't be written to."""
    try:
        # Not print(), which tries again at the end to write what it could not, and fails.
        os.write(sys.stdout.fileno(), f"{lines}\n".encode())
    except (OSError, AttributeError):  # a closed pipe, a full disk; None, if closed from the start
        logger.info("%s", lines)


def stop_on_signals(reactor: Reactor) -> None:
    """Have Ctrl-C, SIGTERM or a closed terminal close the room; Ctrl-C or SIGTERM again ends it."""
    signals = (signal.SIGINT, signal.SIGTERM)
    ours, pythons = socket.socketpair()
    for end in (ours, pythons):
        end.setblocking(False)
    signal.set_wakeup_fd(pythons.detach())  # it is written to when a signal comes

    received = []

    def on_signal(signum: int, frame: object) -> None:
        received.append(signum)
        if received[1:]:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def on_wakeup() -> None:
        ours.recv(16)
        logger.info("closing")
        reactor.stop()

    for each in signals:
        signal.signal(each, on_signal)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        # nohup has us ignore it; else it may come twice, from the shell and from the system.
        signal.signal(signal.SIGHUP, lambda signum, frame: None)  # the wakeup will do
    reactor.selector.register(ours, READ, on_wakeup)


def main(arguments: list[str] | None = None) -> int:
    """Run the server; returns the exit status."""
    options = parse_options(arguments)
    start_logging(logging.DEBUG if options.verbose else logging.INFO)
    most = raise_descriptor_limit() - SPARE_DESCRIPTORS - LOBBY
    if most < 1:
        print("batchat: too few descriptors are allowed; see ulimit -n", file=sys.stderr)
        return 1
    try:
        password = read_password(options.password_file) if options.password_file else ""
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error.args[0]
        print(f"batchat: no password in {options.password_file}: {why}", file=sys.stderr)
        return 1
    settings = Settings(
        options.rate,
        min(most, options.max_people or most),
        options.max_per_address,
        options.history,
        options.welcome,
        password,
        options.behind_proxy,
    )
    host, port = options.host, options.port
    try:
        doors: dict[socket.socket, type[Wire]] = {open_listener(host, port): TelnetWire}
        if not options.no_web:
            port = options.web_port
            doors[open_web_listener(host, port)] = WebWire
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "that is no address"
        why = why.partition(" (while")[0]  # create_server() says again where
        print(
            f"batchat: can't listen on {host or 'any address'}, port {port}: {why}", file=sys.stderr
        )
        return 1
    reactor = Reactor(doors, settings)
    stop_on_signals(reactor)
    announce(opening_lines(host, list(doors)))
    return 0 if reactor.run() else 1


# --------------------------------------------------------------------------
# 8. The browser
# --------------------------------------------------------------------------

# A request's head, its first line and its fields (RFC 9112, sections 2.2, 3 and 5).
HEAD_END = re.compile(rb"\r?\n\r?\n")
LINE_BREAK = re.compile(r"\r?\n")
TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
REQUEST_LINE = re.compile(rf"({TOKEN.pattern}) (\S+) HTTP/1\.(\d)")
CONTROL = re.compile(r"[\0-\x08\n-\x1f\x7f]")  # all but HTAB
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
WEBSOCKET_VERSION = "13"
Request = Tuple[str, str, str, Dict[str, str]]


class HTTPError(Exception):
    """A request that gets a status and, perhaps, headers that say what would be right."""

    def __init__(self, status: HTTPStatus, *headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers


def respond(status: HTTPStatus, kind: str, body: bytes, *headers: str) -> bytes:
    """A whole response, after which the connection is closed (RFC 9110)."""
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: text/{kind}; charset=utf-8",
        *([] if status is HTTPStatus.NOT_MODIFIED else [f"Content-Length: {len(body)}"]),
        "Connection: close",
        "Cache-Control: no-cache",
        "X-Content-Type-Options: nosniff",
        f"Content-Security-Policy: {content_security_policy()}",
        *headers,
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def respond_with_page(fields: dict[str, str]) -> bytes:
    """The page, small where the browser takes it so; or 304, where it has this very one."""
    headers = [f"ETag: {etag()}", "Vary: Accept-Encoding"]
    known = fields.get("if-none-match", "")
    if known == "*" or etag()[2:] in known:
        return respond(HTTPStatus.NOT_MODIFIED, "html", b"", *headers)
    codings = fields.get("accept-encoding", "").lower().replace(" ", "").split(",")
    if "gzip" in codings or any(re.match(r"gzip;q=(1|0\.0*[1-9])", each) for each in codings):
        return respond(HTTPStatus.OK, "html", zipped_page(), *headers, "Content-Encoding: gzip")
    return respond(HTTPStatus.OK, "html", PAGE.encode(), *headers)


def digest(algorithm: str, text: str) -> str:
    """A hash of `text`, in base64."""
    import hashlib  # here, for it takes 4 MB that telnet alone does not need

    return b64encode(hashlib.new(algorithm, text.encode()).digest()).decode()


def parse_fields(lines: list[str]) -> dict[str, str]:
    """The fields of a head by their names in lower case (RFC 9112, section 5); raises HTTPError."""
    if len(lines) > FIELDS_LIMIT:
        raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not TOKEN.fullmatch(name) or CONTROL.search(value):
            raise HTTPError(HTTPStatus.BAD_REQUEST)
        name, value = name.lower(), value.strip(" \t")
        if name in fields:
            if name in ("host", "content-length"):
                raise HTTPError(HTTPStatus.BAD_REQUEST)
            value = f"{fields[name]}, {value}"  # RFC 9110, section 5.3
        fields[name] = value
    return fields


def parse_request(head: bytes) -> Request:
    """Method, target, minor version and fields (RFC 9112, section 2.1); raises HTTPError."""
    line, *lines = LINE_BREAK.split(head.decode("latin-1"))[:-2]
    found = REQUEST_LINE.fullmatch(line)
    if not found:
        raise HTTPError(HTTPStatus.BAD_REQUEST)
    method, target, minor = found.groups()
    return method, target, minor, parse_fields(lines)


def forwarded_for(fields: dict[str, str]) -> str:
    """Who calls, as the nearest proxy tells; empty where none does; raises HTTPError."""
    addresses = fields.get("x-forwarded-for")
    try:
        if addresses is None:
            return ""
        return str(ipaddress.ip_address(addresses.rpartition(",")[2].strip().replace("%", " ")))
    except ValueError:
        raise HTTPError(HTTPStatus.BAD_REQUEST) from None


def answer(request: Request) -> tuple[bytes, bool]:
    """What to answer, and whether that opens a WebSocket; raises HTTPError."""
    method, target, minor, fields = request
    try:
        path = urllib.parse.urlsplit(target).path
    except ValueError:
        raise HTTPError(HTTPStatus.BAD_REQUEST) from None
    if not fields.get("host") and minor != "0":
        raise HTTPError(HTTPStatus.BAD_REQUEST)
    if path not in ("/", "/hello", "/chat"):
        raise HTTPError(HTTPStatus.NOT_FOUND)
    if method not in ("GET", "HEAD"):
        raise HTTPError(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD")
    if path == "/":
        return respond_with_page(fields), False
    if path == "/hello":
        return respond(HTTPStatus.OK, "plain", HELLO.encode()), False
    if minor == "0":  # which knows no upgrades
        raise HTTPError(HTTPStatus.BAD_REQUEST)
    return upgrade(method, fields), True


def upgrade(method: str, fields: dict[str, str]) -> bytes:
    """The answer that opens a WebSocket (RFC 6455, section 4.2); raises HTTPError."""

    def tokens(name: str) -> list[str]:
        return [token.strip().lower() for token in fields.get(name, "").split(",")]

    if "websocket" not in tokens("upgrade") or "upgrade" not in tokens("connection"):
        raise HTTPError(HTTPStatus.UPGRADE_REQUIRED, "Upgrade: websocket", "Connection: Upgrade")
    if fields.get("sec-websocket-version") != WEBSOCKET_VERSION:
        raise HTTPError(HTTPStatus.UPGRADE_REQUIRED, f"Sec-WebSocket-Version: {WEBSOCKET_VERSION}")
    key = fields.get("sec-websocket-key", "")
    try:
        good_key = len(b64decode(key, validate=True)) == 16
    except ValueError:
        good_key = False
    if not good_key or method != "GET":
        raise HTTPError(HTTPStatus.BAD_REQUEST)
    # Another site's page may open a WebSocket to us, but it can't lie about its origin.
    origin, host = fields.get("origin"), fields["host"].lower()
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise HTTPError(HTTPStatus.FORBIDDEN)
    accept = digest("sha1", key + WEBSOCKET_GUID)
    return (
        "HTTP/1.1 101 Switching Protocols\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
    ).encode()


# A frame's opcodes, and the high bits of its first two bytes (RFC 6455, section 5.2).
CONTINUATION, TEXT, BINARY_FRAME, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
FINAL, RESERVED, MASKED = 0x80, 0x70, 0x80
NEWLINE = re.compile(r"\r\n|\r|\n")


class CloseCode(enum.IntEnum):
    """Why a WebSocket is closed (RFC 6455, section 7.4.1)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_DATA = 1007
    TOO_BIG = 1009


class FrameError(Exception):
    """The peer broke the rules of RFC 6455; the argument is the close code that says how."""


def frame(opcode: int, payload: bytes) -> bytes:
    """One whole message, as a server sends it: in one frame, not masked."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", FINAL | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", FINAL | opcode, 126, size) + payload
    return struct.pack("!BBQ", FINAL | opcode, 127, size) + payload


def unmask(payload: bytes, key: bytes) -> bytes:
    """`payload` XOR `key` over and over, in one operation (RFC 6455, section 5.3)."""
    size = len(payload)
    keys = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")


def check_close(payload: bytes) -> None:
    """See that a close frame from the peer is in order; raises FrameError."""
    if not payload:
        return
    code = int.from_bytes(payload[:2], "big")
    known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)  # as registered with IANA
    if len(payload) == 1 or not (known or 3000 <= code <= 4999):
        raise FrameError(CloseCode.PROTOCOL_ERROR)
    decode(payload[2:])


def decode(payload: bytes) -> str:
    """The text of a message; raises FrameError where it is no UTF-8."""
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise FrameError(CloseCode.INVALID_DATA) from None


def lines_of(message: str) -> list[str]:
    """The lines of a message, its first one last; a line break at its end ends the last one."""
    if "\n" not in message and "\r" not in message:
        return [message]
    lines = NEWLINE.split(message)
    if not lines[-1]:
        lines.pop()
    return lines[::-1]


class WebState(enum.Enum):
    """What a browser's bytes are to be read as."""

    REQUEST = enum.auto()
    FRAMES = enum.auto()
    NOTHING = enum.auto()


REQUEST, FRAMES, NOTHING = WebState


class WebWire(Wire):
    """A browser: one HTTP request, which gets a page or opens a WebSocket.

    In a WebSocket (RFC 6455), what we say is one text message a line; what the
    peer says in one message is one line or more.
    """

    __slots__ = ("_at", "_data", "_lines", "_message", "_state")

    PING = frame(PING, b"")

    def __init__(self) -> None:
        super().__init__()
        self._state = REQUEST
        self._data = b""
        self._at = 0  # how far we have come in `_data`
        self._message: bytes | None = None  # the fragments so far of a message
        self._lines: list[str] = []  # what is left of the last message, its next line last

    @property
    def opened(self) -> bool:
        return self._state is FRAMES

    @staticmethod
    def encode(text: str) -> bytes:
        lines = text.split("\n")
        if not lines[-1]:
            lines.pop()  # the text ended with a whole line
        return b"".join([frame(TEXT, line.encode()) for line in lines])

    def feed(self, data: bytes) -> None:
        if data:
            self._data += data
        else:
            self.ended = True

    def next(self) -> Event | None:
        try:
            while not self._lines:
                if self._state is REQUEST:
                    return self._next_request()
                if self._state is NOTHING:
                    return LEAVE
                if not self._take_frame():
                    self._data, self._at = self._data[self._at :], 0
                    return LEAVE if self.ended else None
            return clean(self._lines.pop())
        except FrameError as error:
            self.replies += self._end(error.args[0])
            return LEAVE

    def close(self, words: str, status: HTTPStatus) -> bytes:
        if self._state is REQUEST and words:
            self._state = NOTHING
            return self._as_asked(respond(status, "plain", words.encode()))
        if self._state is FRAMES:
            closing = status is HTTPStatus.SERVICE_UNAVAILABLE
            code = CloseCode.GOING_AWAY if closing else CloseCode.NORMAL
            return self.encode(words) + self._end(code)
        return b""  # the protocol has had its last word

    def _as_asked(self, reply: bytes) -> bytes:
        """A response without its body, where only the head was asked for."""
        end = reply.index(b"\r\n\r\n") + 4
        return reply[:end] if self._data.startswith(b"HEAD ") else reply

    def _end(self, code: int) -> bytes:
        """Read nothing any more; returns the close frame that says why."""
        self._state = NOTHING
        return frame(CLOSE, struct.pack("!H", code))

    def _next_request(self) -> Event | None:
        self._data = self._data.lstrip(b"\r\n")  # RFC 9112, section 2.2
        end = HEAD_END.search(self._data)
        size = end.end() if end else len(self._data)
        if not end and size <= HEAD_LIMIT:
            return LEAVE if self.ended else None
        head, opened = self._data[:size], False
        try:
            if size > HEAD_LIMIT:
                raise HTTPError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            request = parse_request(head)
            if self.forwards:
                self.forwards, self.caller = False, forwarded_for(request[3])
                if self.caller:
                    return FORWARDED  # it is answered where they may come in
            reply, opened = answer(request)
        except HTTPError as error:
            words = f"{error.status.value} {error.status.phrase}\n"
            reply = respond(error.status, "plain", words.encode(), *error.headers)
        self.replies += self._as_asked(reply)
        self._data = self._data[size:]
        self._state = FRAMES if opened else NOTHING
        return OPENED if opened else LEAVE

    def _take_frame(self) -> bool:
        """Take in the next frame; False where it is not all here; raises FrameError."""
        data, at = self._data, self._at
        here = len(data) - at
        if here < 2:
            return False
        first, size, head = data[at], data[at + 1] & 0x7F, 2
        final, opcode = first & FINAL, first & 0x0F
        if first & RESERVED or not data[at + 1] & MASKED:
            raise FrameError(CloseCode.PROTOCOL_ERROR)
        if opcode == BINARY_FRAME:
            raise FrameError(CloseCode.UNSUPPORTED_DATA)
        if opcode in (CLOSE, PING, PONG):
            good = final and size < 126
        else:
            good = opcode == (TEXT if self._message is None else CONTINUATION)
        if not good:
            raise FrameError(CloseCode.PROTOCOL_ERROR)
        if size >= 126:
            head, least = (4, 126) if size == 126 else (10, 1 << 16)
            if here < head:
                return False
            size = int.from_bytes(data[at + 2 : at + head], "big")
            if not least <= size < 1 << 63:
                raise FrameError(CloseCode.PROTOCOL_ERROR)
        if opcode in (TEXT, CONTINUATION) and size + len(self._message or b"") > LINE_LIMIT:
            raise FrameError(CloseCode.TOO_BIG)
        if here < head + 4 + size:
            return False
        start = at + head + 4
        self._at = start + size
        payload = unmask(data[start : self._at], data[start - 4 : start])
        if opcode == PING:
            self.replies += frame(PONG, payload)
        elif opcode == CLOSE:
            check_close(payload)
            self.replies += frame(CLOSE, payload[:2])
            self._state = NOTHING
        elif opcode != PONG:
            message = payload if self._message is None else self._message + payload
            self._message = None if final else message
            if final:
                self._lines = lines_of(decode(message))
        return True


STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1b1b; --soft: #5b6066; --rule: #d4d7da;
  --own: #0b5394; --private: #7a1fa2; --mark: #fff3c4;
  --n0: #b3261e; --n1: #1a56c4; --n2: #116b2e; --n3: #8a4b00;
  --n4: #7b1fa2; --n5: #00666c; --n6: #a3195b; --n7: #4f5b00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14161a; --ink: #e8e8e6; --soft: #a0a6ad; --rule: #363b42;
    --own: #8fc1ff; --private: #dca6f5; --mark: #3a3312;
    --n0: #ff8f85; --n1: #8ab4ff; --n2: #7ddc8f; --n3: #f3b562;
    --n4: #d9a3ff; --n5: #5fd7dd; --n6: #ff8fc0; --n7: #c9d25b; }
}
* { box-sizing: border-box; margin: 0; }
html { height: 100%; }
body { display: flex; flex-direction: column; height: 100dvh; background: var(--paper);
  color: var(--ink); font: 16px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
header, footer, main { padding: .6rem max(1rem, 50vw - 28rem); }
header { display: flex; justify-content: space-between; border-bottom: 1px solid var(--rule); }
main { flex: 1; overflow-y: auto; display: flex; flex-direction: column; }
#lines { margin-top: auto; }
#lines p { position: relative; min-height: 1.45em; padding-left: 9ch; text-indent: -2ch; overflow: clip;
  white-space: pre-wrap; overflow-wrap: anywhere; }
time { position: absolute; left: .7ch; text-indent: 0; color: var(--soft); font-size: .8em; line-height: 1.8; }
#lines .banner { padding: 0; text-indent: 0; white-space: pre; font-size: min(1em, 2.2vw);
  line-height: 1.2; min-height: 1em; }
.notice, #status { color: var(--soft); }
.own { box-shadow: inset 3px 0 var(--own); background: color-mix(in srgb, var(--own) 7%, transparent); }
.private { color: var(--private); }
.private, .action { font-style: italic; }
.past { opacity: .8; }
.mention { background: var(--mark); }
.name { font-weight: bold; }
.n0 { color: var(--n0); } .n1 { color: var(--n1); } .n2 { color: var(--n2); } .n3 { color: var(--n3); }
.n4 { color: var(--n4); } .n5 { color: var(--n5); } .n6 { color: var(--n6); } .n7 { color: var(--n7); }
a { color: inherit; unicode-bidi: isolate; }
.command { display: inline-block; min-width: 21ch; text-indent: 0; }
footer { border-top: 1px solid var(--rule); } form { display: flex; gap: .5rem; }
input { flex: 1; min-width: 0; padding: .5rem .7rem; font: inherit; color: inherit;
  background: transparent; border: 1px solid var(--soft); border-radius: .4rem; }
button { font: inherit; cursor: pointer; padding: .3rem .9rem; border: 0; border-radius: .4rem;
  color: var(--paper); background: var(--own); }
:focus-visible { outline: 3px solid var(--own); outline-offset: 1px; }
summary { cursor: pointer; } details { position: relative; }
ul { position: absolute; right: 0; z-index: 1; max-height: 60vh; overflow-y: auto; padding: .5rem;
  list-style: none; background: var(--paper); border: 1px solid var(--rule); border-radius: .4rem; }
li button { width: 100%; text-align: left; background: none; color: inherit; }
#more { display: block; margin: 0 auto .6rem; border-radius: 1rem; }
#more[hidden], #who[hidden] { display: none; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 500px) { .does { display: block; text-indent: 0; } }
"""

SCRIPT = r"""
"use strict";
const LINES_KEPT = 5000;
const SIZE_KEPT = 500000;  // characters
const LINKS = 10;  // in a line, at most
const PAINT_EVERY = 40;  // milliseconds
const NAME_KEPT = 150;  // seconds for which our old line, if nobody saw it end, may have our name
const COLOURS = 8;
const find = selector => document.querySelector(selector);
const log = find("main"), lines = find("#lines"), form = find("form"), input = find("input");
const more = find("#more"), status = find("#status"), who = find("#who"), names = find("ul");
const words = log.dataset;  // what the room says, with {0} for who and {1} for what
const [HEY, JOINED, QUIT, THROWN, RENAMED] = ["hey", "joined", "quit", "thrown", "renamed"].map(patternOf);

// calling: the line is not open yet, or was lost;  banner: until its first empty line;
// chatting: we read what is said, and may say something, be it our name;
// past: we read what was said before we came;  returning: the room will ask again for the
// name that we have;  answered: we have given it;  left: for good.
let state = "calling";
let socket;
let name = remember() || "";  // ours; we give it again when we come back
let lostAt = 0;  // when we last had it, in milliseconds
let pause = 1;   // seconds until the next try to come back
let queue = [];  // lines that are not painted yet
let painting = 0, size = 0;  // the timer that will, and the characters that are
let following = true;  // the last line is in sight, and shall be
let end = 0;           // where we scrolled to for it
let below = 0;     // new lines under the end of the screen
let unread = 0;    // new lines since the tab was hidden
let called = false;  // one of them has our name
let past = [];   // what was said before we came
let heard = [];  // what we have read since then, as the room says it ...
let said = [];   // ... and what we have said
let typed = [], typedAt = 0;  // what was entered, and where ArrowUp has gone to in it
let completing = null;  // the names that Tab goes through
let present = new Set();
const colours = new Map();  // of names, those who spoke last at its end
let asking = 0;  // our own questions for who is here, whose answers are not shown

// The line to the room

function connect() {
  const url = new URL("chat", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  socket = new WebSocket(url);
  state = "calling";
  asking = 0;
  present.clear();
  tell("");
  socket.onopen = () => { state = name ? "returning" : "banner"; };
  socket.onmessage = event => receive(event.data);
  socket.onclose = event => {
    present.clear();
    if (event.code === 1000) {
      state = "left";
      call("");
      tell("You have left. Press Enter to join again.");
    } else {
      if (state === "chatting") lostAt = Date.now();
      state = "calling";
      tell(`The line is lost. Trying again in ${pause} s.`);
      setTimeout(connect, pause * 1000);
      pause = Math.min(pause * 2, 30);
    }
  };
}

function receive(text) {
  if (state === "returning") {  // the banner is no news
    if (text === words.prompt) { socket.send(name); state = "answered"; }
    return;
  }
  if (state === "answered") {
    const taken = text === "* " + words.taken.replace("{0}", name);
    if (taken && Date.now() < lostAt + NAME_KEPT * 1000) { socket.close(); return; }
    if (!HEY.test(text)) call("");
    state = "chatting";
  }
  if (state === "banner" && text === "") { state = "chatting"; tell(""); }
  if (name && state === "chatting" && text.startsWith(words.before.split("{")[0])) { state = "past"; past = []; }
  if (state === "past") {
    past.push(text);
    if (text === words.now) { state = "chatting"; showPast(); }
    return;
  }
  const hey = HEY.exec(text);
  if (hey) { call(hey[1]); pause = 1; askWhoIsHere(); }
  if (noteWhoIsHere(text)) return;
  const kind = state === "banner" ? "banner" : kindOf(text);
  if (isTalk(kind)) keep(heard, text);
  show(text, kind);
}

// What finds {0}, which has no space, and {1} in what the room says.
function patternOf(key) {
  const literally = words[key].replace(/[.*+?^$()|[\]\\]/g, "\\$&");
  return new RegExp("^" + literally.replace("{0}", "(\\S+)").replace("{1}", "(.+)") + "$");
}
function askWhoIsHere() { asking += 1; socket.send("/who"); }

// Take note of who comes and goes; returns whether it is an answer that nobody but us has asked for.
function noteWhoIsHere(text) {
  const here = /^\* \d+ here: (.*)$/.exec(text);
  const joined = JOINED.exec(text), renamed = RENAMED.exec(text), gone = QUIT.exec(text) || THROWN.exec(text);
  const leave = one => { present.delete(one); present.delete("@" + one); };
  if (here) present = new Set(here[1].split(", "));
  if (joined) present.add(joined[1]);
  if (gone && !present.has(gone[1]) && !present.has("@" + gone[1])) askWhoIsHere();  // a new name of somebody ignored
  if (gone) leave(gone[1]);
  if (renamed) { present.add((present.has("@" + renamed[1]) ? "@" : "") + renamed[2]); leave(renamed[1]); }
  if (renamed && renamed[1] === name) call(renamed[2]);
  if (here || joined || gone || renamed) tell(status.textContent);
  return here && asking > 0 && asking--;
}

function call(ours) {
  name = ours;
  remember(name);
  tell("");
}

function remember(value) {  // what outlives a reload, where the browser lets us
  try { if (value !== undefined) sessionStorage.setItem("name", value); return sessionStorage.getItem("name"); }
  catch { return ""; }
}

// Say how things stand: beside the input, in it, and who is here.
function tell(text) {
  status.textContent = text;
  input.placeholder = name ? "Say something, or /help" : "Your name";
  who.hidden = present.size === 0;
  find("summary").textContent = `${present.size} here`;
  if (who.open && !names.matches(":hover, :focus-within")) names.replaceChildren(...[...present].sort().map(nameButton));
}

function nameButton(one) {
  const item = element("li", "", ""), button = element("button", "", one);
  button.type = "button";
  button.onclick = () => { who.open = false; input.value = `/msg ${one.replace("@", "")} `; input.focus(); };
  item.append(button);
  return item;
}

// Show what was said before we came, but not what is on the screen already.
function showPast() {
  const [first, ...all] = past, last = all.pop();
  const others = all.map((line, at) => [line.slice(6), at]).filter(([line]) => !said.includes(line));
  let from = 0, matching = 0;
  for (let end = others.length; end > 0; end -= 1) {
    let same = 0;
    while (same < end && others[end - 1 - same][0] === heard[heard.length - 1 - same]) same += 1;
    // Of two places, take the one that may show a line twice, but loses none.
    if (same && same >= matching) [matching, from] = [same, others[end - 1][1] + 1];
  }
  const news = all.slice(from).filter(line => !said.includes(line.slice(6)));
  if (!news.length) return;
  show(first, "past");
  for (const [time, text] of news.map(line => [line.slice(0, 5), line.slice(6)])) {
    show(text, "past", time);
    keep(isOurs(text) ? said : heard, text);
  }
  show(last, "past");
}

function isOurs(line) { return line.startsWith(`<${name}> `) || line.startsWith(`** ${name} `); }

function keep(list, line) { if (list.push(line) > LINES_KEPT) list.shift(); }

// The screen

function kindOf(text) {
  if (text.startsWith("** ")) return "action";
  if (text.startsWith("* ")) return "notice";
  if (text.startsWith("[")) return "private";
  return text.startsWith("<") ? "said" : "room";
}
function isTalk(kind) { return kind === "said" || kind === "action"; }

// Have a line painted soon, with all that come until then: each layout takes as long as the log is.
function show(text, kind, at) {
  queue.push({ text, kind, at, when: new Date() });
  if (queue.length > LINES_KEPT) queue.shift();
  const news = kind === "past" || kind === "own" ? 0 : 1;
  if (kind === "own") [following, end] = [true, 0];
  if (document.hidden) {
    unread += news;
    called = called || kind === "private" || isTalk(kind) && isCalled(text);
  }
  if (!painting) painting = setTimeout(paint, PAINT_EVERY);
}

function paint() {
  painting = 0;
  if (log.scrollTop < end - 1 && !isAtEnd()) following = false;  // the event is still to come
  const fresh = queue.splice(0).map(paragraph);
  for (const line of fresh) size += line.textContent.length;
  lines.append(...fresh);
  while (lines.childElementCount > LINES_KEPT || size > SIZE_KEPT) {
    size -= lines.firstChild.textContent.length;
    lines.firstChild.remove();
  }
  if (following) toEnd(); else below += fresh.filter(line => !line.matches(".past, .own")).length;
  count();
}

function paragraph({ text, kind, at, when }) {
  const line = element("p", kind, "");
  if (kind === "banner") { line.textContent = text; line.ariaHidden = "true"; return line; }
  const time = element("time", "", at || when.toTimeString().slice(0, 5));
  time.dateTime = at || when.toISOString();
  const parts = /^(<|\*\* |\[you -> |\[)([\p{L}\p{M}\p{Nd}_.-]+)(>| -> you\]|\]|)( .*|)$/su.exec(text);
  const help = /^\* (\/.*\S) {3,}(.*)$/.exec(text);
  if (text) line.append(time);
  if (parts) {
    if (kind !== "own" && isCalled(parts[4])) line.classList.add("mention");
    const who = element("bdi", `name n${colourOf(parts[2].toLowerCase())}`, parts[2]);
    line.append(parts[1], who, parts[3], ...linked(parts[4]));
  } else if (help) {
    line.append(element("span", "command", "* " + help[1]), element("span", "does", help[2]));
  } else {
    line.append(...linked(text));
  }
  return line;
}

function element(tag, className, textContent) {
  return Object.assign(document.createElement(tag), { className, textContent });
}

// By hash; or the next one that nobody else of the last few has.
function colourOf(one) {
  let colour = colours.get(one);
  if (colour === undefined) {
    const last = [...colours.values()].slice(1 - COLOURS);
    colour = [...one].reduce((hash, character) => (hash * 31 + character.codePointAt(0)) % 99991, 0) % COLOURS;
    while (last.includes(colour)) colour = (colour + 1) % COLOURS;
  }
  colours.delete(one);
  colours.set(one, colour);
  return colour;
}

// `text` as nodes, its links among them; where one goes elsewhere than it seems to, it says so.
function linked(text) {
  const parts = text.split(/(https?:\/\/[^\s<>"]+)/i);
  parts.push(parts.splice(2 * LINKS).join(""));
  return parts.flatMap((part, at) => {
    const trimmed = at % 2 ? part.replace(/[()[\]{}.,;:!?']+$/, "") : "";
    let url;
    try { url = new URL(trimmed); } catch { return [part]; }
    if (url.username || url.password) return [part];
    const link = element("a", "", trimmed), rel = "noopener noreferrer nofollow";
    Object.assign(link, { href: url.href, target: "_blank", rel, dir: "ltr" });
    const seems = trimmed.split("/")[2].toLowerCase() === url.host;
    return [link, seems ? "" : ` (${url.host})`, part.slice(trimmed.length)].filter(each => each !== "");
  });
}

function isCalled(text) {
  const called = text.replace(/^\S* /, "").toLowerCase().split(/[^\p{L}\p{M}\p{Nd}_.-]+/u);
  const ours = name.toLowerCase();
  return name !== "" && called.some(word => word === ours || word.replace(/[.-]+$/, "") === ours);
}

function isAtEnd() { return log.scrollHeight - log.scrollTop - log.clientHeight < 40; }

function toEnd() { log.scrollTop = log.scrollHeight; end = log.scrollTop; following = true; below = 0; }

function count() {
  more.hidden = below === 0;
  more.textContent = `\u2193 ${below} new ${below === 1 ? "line" : "lines"}`;
  document.title = unread ? `(${called ? "@" : ""}${unread}) BATCHAT` : "BATCHAT";
}

log.onscroll = () => { following = isAtEnd(); if (following) { below = 0; count(); } };
const resized = new ResizeObserver(() => { if (following) toEnd(); });
resized.observe(log);
resized.observe(lines);
document.onvisibilitychange = () => { if (!document.hidden) { unread = 0; called = false; count(); } };

// The keyboard

function say(text) {
  if (name && !text.trim()) return;  // the room says no blank line
  if (new TextEncoder().encode(text).length > words.lineLimit) {
    show(`* A line has at most ${words.lineLimit} bytes; yours was not sent.`, "notice");
    return;
  }
  socket.send(text);
  if (/^[^\p{L}\p{N}]*\/op(\s|$)/iu.test(text)) return;  // a password
  keep(typed, text);
  typedAt = typed.length;
  const me = /^\/me\s+(\S.*?)\s*$/i.exec(text), command = /^\/(?!\/)/.test(text);
  const line = (me ? `** ${name} ${me[1]}` : `<${name}> ${text.replace(/^\/\//, "/")}`).replace(/\t/g, " ");
  if (name && (me || !command)) keep(said, line);
  show(name && (me || !command) ? line : text, "own");
}

function canSay() { return socket.readyState === WebSocket.OPEN && state === "chatting"; }

form.addEventListener("submit", event => {
  event.preventDefault();
  completing = null;
  if (state === "left") { name = input.value.trim(); input.value = ""; connect(); return; }
  if (!canSay()) return;  // what was typed stays
  say(input.value);
  input.value = "";
});

input.addEventListener("paste", event => {  // an input would make one line of many
  const all = event.clipboardData.getData("text").split(/\r\n|\r|\n/);
  if (all.length === 1 || !canSay()) return;
  event.preventDefault();
  all[0] = input.value.slice(0, input.selectionStart) + all[0];
  input.value = all.pop() + input.value.slice(input.selectionEnd);
  for (const line of all) say(line);
});

input.addEventListener("input", () => { completing = null; });
input.addEventListener("keydown", event => {
  const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (!event.shiftKey && by && typed[typedAt + by] !== undefined || by === 1 && typedAt < typed.length) {
    event.preventDefault();
    typedAt += by;
    input.value = typed[typedAt] || "";
  }
  if (event.key === "Tab" && !event.shiftKey && complete()) event.preventDefault();
  if (event.key !== "Tab") completing = null;
});

// Complete the name before the cursor, or put the next one in its place; returns whether there is any.
function complete() {
  if (!completing) {
    const at = input.value.slice(0, input.selectionStart).search(/\S*$/);
    const begun = input.value.slice(at, input.selectionStart).toLowerCase();
    const found = [...present].map(one => one.replace("@", "")).sort()
      .filter(one => begun && one !== name && one.toLowerCase().startsWith(begun));
    completing = { at, found, rest: input.value.slice(input.selectionStart) };
  }
  const { at, found, rest } = completing, next = found.shift();
  if (!next) return false;
  found.push(next);
  input.setRangeText(next + (at ? " " : ": "), at, input.value.length - rest.length, "end");
  return true;
}

onkeydown = event => { if (event.key === "Escape" && who.open) { who.open = false; input.focus(); } };
who.addEventListener("toggle", () => tell(status.textContent));
log.onclick = event => { if (!getSelection().toString() && !event.target.closest("a")) input.focus(); };
more.onclick = () => { toEnd(); count(); input.focus(); };

connect();
"""

PAGE = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<title>BATCHAT</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
<header><b>BATCHAT</b><details id="who" hidden><summary></summary><ul></ul></details></header>
<main tabindex="0" aria-label="The chat"
  data-prompt="{PROMPT}" data-hey="{HEY.strip()}" data-joined="{JOINED.strip()}"
  data-quit="{QUIT.strip()}" data-thrown="{THROWN_OUT.strip()}" data-renamed="{RENAMED.strip()}"
  data-taken="{TAKEN}" data-before="{BEFORE.strip()}" data-now="{NOW.strip()}"
  data-line-limit="{LINE_LIMIT}"><div id="lines" role="log" aria-live="polite"></div></main>
<footer>
<button id="more" type="button" hidden></button>
<p id="status" role="status"></p>
<form>
<label class="unseen" for="line">Your name, and then what you say</label>
<input id="line" autocomplete="off" autocapitalize="off" enterkeyhint="send" autofocus>
<button aria-label="Send">Send</button>
</form>
</footer>
<script>{SCRIPT}</script>
</html>
"""


@functools.lru_cache(maxsize=None)
def etag() -> str:
    """What tells this very page from others; weak, for it may be zipped or not."""
    return f'W/"{digest("sha256", PAGE)[:16]}"'


@functools.lru_cache(maxsize=None)
def zipped_page() -> bytes:
    import gzip  # here, like hashlib

    return gzip.compress(PAGE.encode(), mtime=0)


@functools.lru_cache(maxsize=None)
def content_security_policy() -> str:
    """What a page of ours may do: run its own script and style, by their hashes, and no more."""
    return (
        f"default-src 'none'; script-src 'sha256-{digest('sha256', SCRIPT)}'; "
        f"style-src 'sha256-{digest('sha256', STYLE)}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


if __name__ == "__main__":
    sys.exit(main())
