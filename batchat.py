#!/usr/bin/env python3
"""BATCHAT: a chat room in one file, for telnet and browsers.

    python batchat.py         starts the server
    telnet localhost 1337     joins the room, and so does
    http://localhost:1338/    in a browser

A chat room is a log, and a reader is a cursor into it.  What happens in the room is an event.
It is appended once to the log of each format (text for telnet, JSON for WebSockets), and each
reader is sent everything new in one system call.  One thread runs the event loop: select,
process input, send, reconcile.

A client is one connection, and the peer is the program at its other end.  Once it has a name, it
is one of the people in the room, and a reader of its format's log.

Parts: 1. Events  2. Settings  3. Log and Outbox  4. Protocol, Telnet  5. Client, Limiter  6. Chat
7. Reactor  8. The web  9. The page  10. main.  Only 7 and 10 use sockets.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import hmac
import ipaddress
import json
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
import weakref
from base64 import b64encode
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any, Callable, Dict, Iterable, NamedTuple, TextIO, Union

__version__ = "1.1.0"

logger = logging.getLogger("batchat")


# ---
# 1. Events

# "type", then the fields of README's table.  A WebSocket is sent JSON, telnet what `render_text`
# makes of it.
Event = Dict[str, Any]
PROTOCOL_VERSION = 1  # in a greeting: a page made for another one reloads itself

BANNER = r"""
   ____      _       _____     ____   _   _      _       _____   
U | __")uU  /"\  u  |_ " _| U /"___| |'| |'| U  /"\  u  |_ " _|  
 \|  _ \/ \/ _ \/     | |   \| | u  /| |_| |\ \/ _ \/     | |    
  | |_) | / ___ \    /| |\   | |/__ U|  _  |u / ___ \    /| |\   
  |____/ /_/   \_\  u |_|U    \____| |_| |_| /_/   \_\  u |_|U   
 _|| \\_  \\    >>  _// \\_  _// \\  //   \\  \\    >>  _// \\_  
(__) (__)(__)  (__)(__) (__)(__)(__)(_") ("_)(__)  (__)(__) (__)
"""[1:]

# How each type of event reads on telnet, and the end of a history.  The page uses these, too,
# except greeting and help.
TEMPLATES = {
    "greeting": "{banner}\n{text}\n\n",
    "prompt": "{text}",
    "welcome": "{text}\n\n",
    "said": "<{name}> {text}\n",
    "did": "** {name} {text}\n",
    "joined": "* {name} has joined the chat\n",
    "quit": "* {name} has quit the chat\n",
    "renamed": "* {name} is now known as {to}\n",
    "kicked": "* {name} was kicked by {by}: {text}\n",
    "whisper": "[{from} -> {to}] {text}\n",
    "people": "* {count} here: {names}\n",
    "help": "* {usage:22}{text}\n",  # for each command
    "history": "* Recent messages, since {since}:\n",
    "history_end": "* End of recent messages.\n",
    "notice": "* {text}\n",
    "error": "* {text}\n",
    "closing": "* {text}\n",
}

SPOKEN_TYPES = ("said", "did")  # what is kept in the history, and hidden by /ignore

# The text of "closing", by its code.
CLOSING_TEXT = {
    "banned": "Your address is banned for another {minutes} min.",
    "full": "BATCHAT is full, please try again later.",
    "crowded": "Too many people are here from your address, please try again later.",
    "kicked": "You were kicked by {by}: {text}",
    "timeout": "No name given in time, goodbye!",
    "no_name": "That is no name, goodbye!",
    "shutdown": "BATCHAT is shutting down, goodbye!",
    "tries": "That was the last try, goodbye!",
}
PROMPT = "Please enter your name, and press enter: "


def render_text(event: Event) -> str:
    """An event as telnet shows it, with newlines as line ends."""
    event_type, template = event["type"], TEMPLATES[event["type"]]
    if event_type == "people":
        names = []
        for row in event["people"]:
            mark = "@" if row["operator"] else ""
            address = f" ({row['address']})" if "address" in row else ""
            names.append(mark + row["name"] + address)
        return template.format(count=len(names), names=", ".join(names))
    if event_type == "help":
        return "".join(template.format(usage=usage, text=text) for usage, text in event["commands"])
    if event_type == "history":
        if not (events := event["events"]):
            return ""
        since = local_time("%Y-%m-%d %H:%M", events[0]["at"])
        past = [f"{local_time('%H:%M', each['at'])} {render_text(each)}" for each in events]
        return "".join([template.format(since=since), *past, TEMPLATES["history_end"]])
    return template.format_map(event)


def local_time(pattern: str, at: int) -> str:
    """Seconds since the epoch, as strftime() shows them in the server's time zone."""
    return time.strftime(pattern, time.localtime(at))


# ---
# 2. Settings, and limits of several parts

LINE_BYTES_LIMIT = 4096  # bytes, without the line end
# Private bytes pending, above which a client gets no whispers, and its input waits.
PRIVATE_LIMIT_FOR_WHISPERS, PRIVATE_LIMIT_FOR_INPUT = 64 << 10, 128 << 10

# Tokens: an allowance of --rate a second.
LINE_TOKENS = 1  # of every line or marker; the next three come on top
JOIN_TOKENS = 5 - LINE_TOKENS  # everyone reads that somebody joined, and later quit
RENAME_TOKENS = 25 - LINE_TOKENS  # everyone has to learn the new name
WRONG_PASSWORD_TOKENS = 50 - LINE_TOKENS
BYTES_PER_TOKEN = 512  # of anything that is read
WHO_BYTES_PER_TOKEN = 16 << 10  # of the answer to /who


class Settings(NamedTuple):
    """The options, and what follows from them."""

    rate: int = 10  # lines a second from one person; 0 is no limit
    max_people: int = 0  # in the room; 0 is no limit
    max_per_address: int = 100  # connections; 0 is no limit
    history: int = 0  # lines; 0 keeps none
    greeting: str = "Welcome to BATCHAT local reviews and chat!"
    password: str = ""  # of the operators; without one, there are none
    behind_proxy: bool = False  # trust X-Forwarded-For from localhost
    max_connections: int = 1_000_000  # from the limit of open descriptors


# ---
# 3. Log and Outbox

UNREACHABLE = 1 << 62  # an offset that no log ever reaches
SPLICE_LAG = 128  # bytes: what a splice adds to a lag


class Log:
    """The events of the room in one format: a byte stream with absolute offsets.

    Only its tail is kept.  It can't grow or be trimmed while a memoryview of `data` is alive.
    """

    def __init__(self, protocol_class: type[Protocol]) -> None:
        self.protocol_class = protocol_class
        self.readers: dict[Client, None] = {}  # an ordered set: those in the room
        self.data = bytearray()
        self.start = 0  # offset of data[0]
        self.newest_start = 0  # of the last event
        self.broadcast_end = 0  # all readers that are not blocked were sent it up to here

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def append(self, data: bytes) -> None:
        self.newest_start = self.end
        self.data += data

    def trim(self, offset: int) -> None:
        del self.data[: offset - self.start]
        self.start = offset


@dataclass
class Splice:
    """At `offset` of the log, insert private bytes, then go on at `resume`."""

    offset: int
    private: bytes  # for this client alone
    resume: int  # where the log goes on


class Outbox:
    """What one client still has to be sent: a cursor into the log, and splices.

    With the cursor at 100 and Splice(150, b"hi", 170), log[100:150] is sent, then hi, then the log
    from 170 on.  Outside the room the cursor is UNREACHABLE, and so are all offsets.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.cursor = UNREACHABLE
        self.splices: list[Splice] = []
        self.private_size = 0  # in all splices
        self.is_discarding = False

    @property
    def lag(self) -> int:
        """Bytes of the log that this cursor keeps; a splice counts as SPLICE_LAG."""
        return max(0, self.log.end - self.cursor) + len(self.splices) * SPLICE_LAG

    @property
    def has_pending(self) -> bool:
        return bool(self.splices) or self.cursor < self.log.end

    def start_reading(self) -> None:
        """Read the log from its end on; private bytes that are pending come first."""
        if not self.is_discarding:
            self.cursor = end = self.log.end
            self.splices = [Splice(end, each.private, end) for each in self.splices]

    def stop_reading(self) -> None:
        """Read the log no further than to its end now; private bytes may still follow."""
        self._add_splice(self.log.end, b"", UNREACHABLE)

    def discard(self) -> None:
        """Drop everything pending, and from now on what is added."""
        self.is_discarding = True
        self.cursor = UNREACHABLE
        self.splices.clear()
        self.private_size = 0

    def append_private(self, private: bytes) -> None:
        """Send `private` to this client only, after everything in the log so far."""
        resume = self.splices[-1].resume if self.splices else self.cursor
        offset = max(resume, self.log.end)
        self._add_splice(offset, private, offset)

    def exclude_newest(self) -> None:
        """Leave out the event that was appended just now; only for readers of the log."""
        self._add_splice(self.log.newest_start, b"", self.log.end)

    def _add_splice(self, offset: int, private: bytes, resume: int) -> None:
        """Add a splice.  One without bytes, where the last one resumes, is merged with it."""
        if not self.is_discarding:
            self.private_size += len(private)
            if self.splices and self.splices[-1].resume == offset and not private:
                self.splices[-1].resume = resume
            else:
                self.splices.append(Splice(offset, private, resume))

    def pending(self) -> memoryview:
        """Everything pending, in order; release it before the log grows."""
        log, cursor = self.log, self.cursor
        if not self.splices:
            return memoryview(log.data)[cursor - log.start :]  # empty from UNREACHABLE on
        with memoryview(log.data) as view:
            pieces: list[bytes | memoryview] = []
            for splice in self.splices:
                pieces += (view[cursor - log.start : splice.offset - log.start], splice.private)
                cursor = splice.resume
            pieces.append(view[cursor - log.start :])
            return memoryview(b"".join(pieces))

    def advance(self, sent: int) -> None:
        """Record that `sent` bytes were sent: log up to a splice, its private bytes, and so on."""
        while self.splices and sent >= self.splices[0].offset - self.cursor:
            splice = self.splices[0]
            sent -= splice.offset - self.cursor
            self.cursor = splice.resume
            taken = min(sent, len(splice.private))
            self.private_size -= taken
            if taken < len(splice.private):  # the rest comes before the new cursor
                splice.offset, splice.private = self.cursor, splice.private[taken:]
                return
            del self.splices[0]
            sent -= taken
        self.cursor += sent


# ---
# 4. Protocol, Telnet

class Marker(Enum):
    """What a protocol says besides lines."""

    OPENED = 0  # a WebSocket is open
    TOO_LONG = 1  # in place of a line over LINE_BYTES_LIMIT
    DISCONNECT = 2  # Ctrl-C or Ctrl-D, or the protocol has ended


OPENED, TOO_LONG, DISCONNECT = Marker
Received = Union[str, Marker]


class Protocol:
    """A protocol without sockets.

    What was read is given to `feed`, in parts.  After each, `next` returns lines and markers until
    it returns None.  After DISCONNECT there is only `finish`.
    """

    ECHOES_OWN_LINES = False
    PING_FRAME = b""  # a ping, where the protocol has one

    replies = b""  # what the protocol itself answers
    trusts_forwarded_for = False  # of Web: X-Forwarded-For, from our proxy
    forwarded_for = ""  # the address in it

    @staticmethod
    def encode(event: Event) -> bytes:
        raise NotImplementedError

    @property
    def accepts_events(self) -> bool:
        """Whether events can be sent: of Web, while a WebSocket is open."""
        return True

    def feed(self, data: bytes) -> None:
        """Take what the peer sent; b"" is the end of the stream."""
        raise NotImplementedError

    def next(self) -> Received | None:
        """The next line or marker; None if more must be fed first."""
        raise NotImplementedError

    def scan_for_interrupt(self, unfed: bytes) -> bool:
        """Look for a Ctrl-C in what waits: lines that were fed, and what is to be fed.

        Between two calls `unfed` only grows at its end, and loses at its start what was fed.
        """
        return False

    def finish(self, closing_code: str) -> None:
        """Reply what is sent last: after the `closing` event, if there is a code."""

    def take_replies(self) -> bytes:
        replies, self.replies = self.replies, b""
        return replies


# Escape sequences (ECMA-48, 5.4; xterm's SS3 and OSC) none with a slash, as in /op.
ESCAPE = re.compile(
    r"""(?: \x1b\[ \[? | \x9b ) [0-?]* [ -.]* [@-~]  # CSI, parameters, final byte
      | \x1bO [@-~]  # SS3 and its letter
      | \x1b\] [^\x07\x1b]* (?: \x07 | \x1b\\ | \Z )  # OSC up to its end
      | \x1b [^\x1b/]?  # any other character""",
    re.VERBOSE | re.DOTALL,
)
# Control characters, line separators, and bidirectional controls (Unicode UAX #9, 2.1 to 2.5).
# BS and DEL are not here: `clean` applies them.
FORBIDDEN = re.compile("[\0-\x07\x0a-\x1f\x80-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """`text` made safe to display, with backspaces and Ctrl-U applied."""
    if text.isprintable():  # the usual case; such text has no forbidden character
        return text
    # A TAB becomes a space: terminals do not wrap at a TAB.
    text = ESCAPE.sub("", text).replace("\t", " ")
    text = text.rpartition("\x15")[2]  # Ctrl-U erases the line so far
    characters: list[str] = []
    for character in FORBIDDEN.sub("", text):
        if character in "\b\x7f":
            del characters[-1:]
        else:
            characters.append(character)
    return "".join(characters)


IAC, WILL, WONT, DO, DONT = b"\xff", b"\xfb", b"\xfc", b"\xfd", b"\xfe"
# IAC, then WILL, WONT, DO or DONT and an option, or a command of one byte (RFC 854).  At the end of
# a read its last byte may be missing.  SB has no case: a client may send it only for an option that
# we agreed to, and BINARY has none.
TELNET_COMMAND = re.compile(rb"\xff([\xfb-\xfe]?)([\0-\xff]?)")
BINARY = b"\0"  # the one option that we want, in both directions (RFC 856)
ASK_FOR_BINARY = IAC + DO + BINARY + IAC + WILL + BINARY
REFUSALS = {WILL: DONT, DO: WONT}  # WONT and DONT need no answer

CTRL_C, CTRL_D = b"\x03", b"\x04"
LEAVING_KEY = re.compile(b"[" + CTRL_C + CTRL_D + b"]")
# The keys for which a telnet sends a command.  Without BINARY the common ones send it inside of
# characters, too: they ignore the top bit, and send IP for the 83 in \u0443 (D1 83) as for 03,
# Ctrl-C.  There, the command is turned into its key with the top bit set.
KEY_OF_TELNET_COMMAND = {
    b"\xec": 0x04,  # EOF (RFC 1184): Ctrl-D
    b"\xed": 0x1A,  # SUSP (RFC 1184): Ctrl-Z
    b"\xee": 0x1C,  # ABORT (RFC 1184): Ctrl-\
    b"\xf3": 0x1C,  # BRK: Ctrl-\ in a telnet without ABORT
    b"\xf4": 0x03,  # IP: Ctrl-C
    b"\xf5": 0x0F,  # AO: Ctrl-O
    b"\xf6": 0x14,  # Are You There: Ctrl-T
    b"\xf7": 0x08,  # EC, erase character: Ctrl-H
    b"\xf8": 0x15,  # EL, erase line: Ctrl-U
    IAC: 0xFF,  # the byte 255 itself
}
# The beginning of a character in UTF-8.
INCOMPLETE_CHARACTER = re.compile(
    rb"(?:[\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})\Z"
)
# The same telnets drop byte 0x85 (Ctrl-E).  This finds characters that lost it:
CHARACTER_WITHOUT_85 = re.compile(
    rb"""( [\xc3-\xdf] (?![\x80-\xbf])  # a letter of two bytes
        | \xe0[\xa0-\xbf] (?![\x80-\xbf])  # an Indic or Thai letter
        | [\xe3\xea-\xed] (?=[\x80-\xbf](?![\x80-\xbf])) )  # a Korean letter""",
    re.VERBOSE,
)


def decode_line(line: bytes) -> str:
    """A line of UTF-8, with missing bytes put back; U+FFFD stands for broken ones."""
    try:
        return line.decode()
    except UnicodeDecodeError:
        return CHARACTER_WITHOUT_85.sub(b"\\1\x85", line).decode("utf-8", "replace")


def split_telnet_commands(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Take the telnet commands out of `data`.

    Returns the plain data, with keys for commands; an incomplete character or command at the end,
    which belongs before what comes next; and the replies.
    """
    if data.isascii():  # the usual case
        return data, b"", b""
    plain, end, incomplete, replies = bytearray(), 0, b"", bytearray()
    for match in TELNET_COMMAND.finditer(data):
        plain += data[end : match.start()]
        end = match.end()
        verb, last_byte = match.groups()
        if not last_byte:
            incomplete = match[0]
        elif verb in REFUSALS and last_byte != BINARY:
            replies += IAC + REFUSALS[verb] + last_byte
        elif not verb and last_byte in KEY_OF_TELNET_COMMAND:
            top_bit = 0x80 if INCOMPLETE_CHARACTER.search(plain[-3:]) else 0
            plain.append(KEY_OF_TELNET_COMMAND[last_byte] | top_bit)
    plain += data[end:]
    if character := INCOMPLETE_CHARACTER.search(plain[-3:]):
        incomplete = character[0] + incomplete
        del plain[-len(character[0]) :]
    return bytes(plain), incomplete, bytes(replies)


class Telnet(Protocol):
    """Telnet (RFC 854): lines of text, and commands among them.

    A client that seems to be a telnet is asked once for BINARY.
    """

    def __init__(self) -> None:
        self._asked = False  # for BINARY
        self._incomplete = b""  # from `split_telnet_commands`
        self._scanned = 0  # bytes that `scan_for_interrupt` has seen, and that were not fed yet
        self._scan_incomplete = b""  # `_incomplete`, at their end
        self._last_plain_byte = b""  # an LF after a CR ends no further line
        self._data = b""  # with "\n" for every line end
        self._consumed = 0  # bytes of `_data`

    @staticmethod
    def encode(event: Event) -> bytes:
        return render_text(event).replace("\n", "\r\n").encode()

    def feed(self, data: bytes) -> None:
        if not data:
            self._data += CTRL_D  # the end of the stream counts as one
            return
        self._scanned = max(0, self._scanned - len(data))
        plain, self._incomplete, replies = split_telnet_commands(self._incomplete + data)
        if ending := LEAVING_KEY.search(plain):  # what comes after it is ignored
            plain = plain[: ending.end()]
        after_cr = self._last_plain_byte == b"\r"
        self._last_plain_byte = plain[-1:] or self._last_plain_byte
        if after_cr and plain[:1] in (b"\n", b"\0"):
            plain = plain[1:]  # that line has ended already
        # A line ends with LF, CR LF, CR NUL (RFC 854, pages 11 and 12) or CR alone.
        with_lf = plain.replace(b"\r\n", b"\n").replace(b"\r\0", b"\n")
        self._data += with_lf.replace(b"\r", b"\n")
        ends_like_telnet = len(with_lf) < len(plain)  # with CR LF or CR NUL
        is_telnet = IAC in data or (ends_like_telnet and not self._data.isascii())
        if is_telnet and not self._asked:
            self._asked = True
            self.replies += ASK_FOR_BINARY
        self.replies += replies
        if self._asked and plain.count(b"\n") > plain.count(b"\r\n"):
            self.replies += b"\r"  # with BINARY, Enter moves a telnet's cursor straight down

    def scan_for_interrupt(self, unfed: bytes) -> bool:
        # Each byte is scanned once: else 64 KiB that come byte by byte would take minutes.
        if not self._scanned:
            self._scan_incomplete = self._incomplete  # begin where `feed` has stopped
        data = self._scan_incomplete + unfed[self._scanned :]
        plain, self._scan_incomplete, replies = split_telnet_commands(data)
        self._scanned = len(unfed)
        if CTRL_C in plain:
            # Without an answer to its TIMING-MARK, telnet shows nothing more (RFC 860).
            self.replies += replies
        return CTRL_C in plain or CTRL_C in self._data

    def next(self) -> Received | None:
        start, end = self._consumed, self._data.find(b"\n", self._consumed)
        if end < 0:
            if self._data.endswith((CTRL_C, CTRL_D)):
                return DISCONNECT
            # One byte over the limit shows that a line is too long.
            self._data, self._consumed = self._data[start : start + LINE_BYTES_LIMIT + 1], 0
            return None
        line, self._consumed = self._data[start:end], end + 1
        return clean(decode_line(line)) if len(line) <= LINE_BYTES_LIMIT else TOO_LONG


# ---
# 5. Client, Limiter

LOCALHOST = "localhost"


class PeerAddress(NamedTuple):
    """Where a client connects from: a host, and its network.

    Each is a source: it can be counted or banned as one.  Examples:
    ("192.0.2.1", "192.0.2.1"), ("2001:db8::5", "2001:db8::/64"), (LOCALHOST, LOCALHOST)
    """

    host: str
    network: str  # its IPv6 /64; the host itself, if it has none

    @property
    def sources(self) -> set[str]:
        return {self.host, self.network}


@functools.lru_cache
def parse_address(text: str) -> PeerAddress:
    """`text` as an address; for an IPv6 /64, both are the /64.  Raises ValueError."""
    ip_text, _, bits = text.partition("/")
    parsed = ipaddress.ip_address(ip_text.partition("%")[0])
    parsed = getattr(parsed, "ipv4_mapped", None) or parsed
    ip = network = LOCALHOST if parsed.is_loopback else str(parsed)
    has_network = parsed.version == 6 and not parsed.is_loopback
    if has_network:
        network = str(ipaddress.ip_network((parsed, 64), strict=False))
    if bits and not (has_network and bits == "64"):  # no other network can be banned
        raise ValueError(text)
    return PeerAddress(network if bits else ip, network)


class Clock:
    """The time when this iteration of the event loop began."""

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self.read = read  # in seconds
        self.now = read()
        self.advance()

    def advance(self) -> None:
        before, self.now = self.now, self.read()
        self.elapsed = self.now - before  # since the iteration before
        self.wall_time = int(time.time())  # seconds since the epoch


BURST_SECONDS = 5  # of the rate: what can be saved up


class TokenBucket:
    """Gains `rate` tokens a second, up to BURST_SECONDS' worth.  May be overspent.

    `ready_at` is all that it has to remember (the generic cell rate algorithm).
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.ready_at = -math.inf  # when it is no longer overspent

    def spend(self, tokens: float, now: float) -> None:
        self.ready_at = max(self.ready_at, now - BURST_SECONDS) + tokens / self.rate


SOURCE_RATE_FACTOR = 10  # times a client's rate
LOCALHOST_RATE_FACTOR = 10  # times a source's rate
SERVER_SPARE_PLACES = 16  # for departing clients
SOURCE_SPARE_PLACES = 100  # the same, for each source
QUOTAS_LIMIT = 10_000  # more only while all are in use


class Quota:
    """Connections that are counted together, and the tokens that they share."""

    def __init__(self, limit: int, spare_places: int, rate: float = math.inf) -> None:
        self.limit = limit  # 0 is no limit
        self.spare_places = spare_places
        self.bucket = TokenBucket(rate)
        self.connection_count = 0
        self.departing: dict[Client, None] = {}

    @property
    def has_too_many(self) -> bool:
        """Whether not all have a place; the departing need none."""
        return 0 < self.limit < self.connection_count - len(self.departing)

    @property
    def has_too_many_departing(self) -> bool:
        """Whether the departing fill the spare places, and there is no other for them."""
        return len(self.departing) > self.spare_places and self.connection_count > self.limit


class State(Enum):
    """The state of a client: what changes it, to which, and where in the code.

    CONNECTING
      telnet: at once; browser: a WebSocket  AWAITING_NAME  Chat.greet
      too many people or connections, a ban  CLOSING        Chat._reject_if_needed
    AWAITING_NAME
      a valid name that is free              CHATTING       Chat._join
      a fifth name that is invalid or taken  CLOSING        Chat._ask_for_name
      a line too long, a web request, /quit  CLOSING        Chat._handle_name
      too many people, or a ban              CLOSING        Chat._reject_if_needed
    CHATTING
      /quit, kicked                          CLOSING        Chat._quit, _kick
    any of these
      DISCONNECT: Ctrl-C, EOF, a page sent   CLOSING        Chat.handle
      not in time (if lost, it is aborted)   CLOSING        Reactor._check_timeouts
      too far behind, an error, evicted      CLOSING        Reactor._abort
      the server is stopped                  CLOSING        Reactor.stop
    CLOSING
      all is sent, and the peer has closed   CLOSED         Reactor._reconcile
      not in time, an error, evicted         CLOSED         Reactor._abort, _evict_for
      the server ends                        CLOSED         Reactor.run

    The others are told when somebody becomes CHATTING, and when they no longer are: Chat.people
    are those.  Besides, a client may be
      over limit  from Limiter.add on: it is to be rejected
      lost        from Reactor._mark_lost on: nothing can be sent; what was read is processed
      at EOF      from Reactor._read on: nothing more can be read
      blocked     while its socket is full
      drained     CLOSING, and nothing is pending: the peer has to close
    Those who are over limit, lost or CLOSING are departing: they take no place (Quota.departing).
    To reject is to close before CHATTING, to abort is to close at once, with a reset.  To evict is
    to abort one departing too many, or to close it if it is drained.
    """

    CONNECTING, AWAITING_NAME, CHATTING, CLOSING, CLOSED = range(5)


CONNECTING, AWAITING_NAME, CHATTING, CLOSING, CLOSED = State
NEXT_STATES = {
    CONNECTING: (AWAITING_NAME, CLOSING),
    AWAITING_NAME: (CHATTING, CLOSING),
    CHATTING: (CLOSING,),
    CLOSING: (CLOSED,),
    CLOSED: (),
}
NEVER = math.inf
STATE_SECONDS = {
    CONNECTING: 10.0,  # to open a WebSocket
    AWAITING_NAME: 120.0,
    CHATTING: NEVER,
    CLOSING: 5.0,  # to send what is pending, and for the peer to close
    CLOSED: NEVER,
}
LOST_SECONDS = 120.0  # to process what the peer sent before a reset


class Client:
    """One connection, even one that only asks for the page."""

    sock: socket.socket  # for the reactor alone
    address: PeerAddress  # Limiter.add sets these three
    source_quota: Quota
    bucket: TokenBucket

    def __init__(self, peer_label: str, log: Log, now: float) -> None:
        self.peer_label = peer_label
        self.protocol = log.protocol_class()
        self.outbox = Outbox(log)
        self.state = CONNECTING
        self.state_since = now
        self.over_limit_code = ""  # "crowded" or "full", if there was no place
        self.lost_reason = ""  # why nothing can be sent any more
        self.lost_at = NEVER
        self.name = ""
        self.name_tries = 0  # prompts so far
        self.is_operator = False
        self.virtual_time = 0.0  # fair queueing: who has the lowest is served first
        # For the reactor
        self.read_buffer = b""  # read, but not fed to the protocol yet
        self.needs_scan = False  # something was read since the last scan for Ctrl-C
        self.at_eof = False  # the end of the stream was read
        self.watched_mask = 0  # what the selector is asked for
        self.silent_ticks = 0  # since the peer sent anything, while nothing was pending

    def enter(self, state: State, now: float) -> None:
        if state not in NEXT_STATES[self.state]:
            raise RuntimeError(f"{state} after {self.state}")
        self.state, self.state_since = state, now

    @property
    def deadline(self) -> float:
        """When this state ends at the latest."""
        if self.lost_reason and self.state is not CLOSING:
            return self.lost_at + LOST_SECONDS
        return self.state_since + STATE_SECONDS[self.state]

    @property
    def is_drained(self) -> bool:
        return self.state is CLOSING and not self.outbox.has_pending


class Limiter:
    """How many may connect, how much they may send, and which addresses are banned."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.clock = clock
        self.settings = settings
        self.server_quota = Quota(settings.max_connections, SERVER_SPARE_PLACES)
        self.quotas: dict[str, Quota] = {}  # by source
        self.bans: dict[str, float] = {}  # when they end, by address or /64
        self.own_networks: set[str] = set()  # of our addresses in use

    def add(self, client: Client, ip_text: str) -> None:
        """Count a connection from an address; set `over_limit_code` if there are too many.

        One from a proxy is added again, with the address that it tells.
        """
        client.over_limit_code = ""
        client.address = parse_address(ip_text)
        client.source_quota = self.quota_for(self.source_for(client.address))
        client.bucket = TokenBucket(self.settings.rate)
        for quota, closing_code in ((client.source_quota, "crowded"), (self.server_quota, "full")):
            quota.connection_count += 1
            if quota.has_too_many:
                client.over_limit_code = closing_code
        if client.over_limit_code or client.lost_reason:  # lost before it was added again
            self.mark_departing(client)
        if self.settings.rate:  # anyone who reconnects must not be served first
            self._raise_virtual_time(client, JOIN_TOKENS)

    def source_for(self, address: PeerAddress) -> str:
        """The source that is counted: an IPv6 /64; in our own networks the host."""
        return address.host if address.network in self.own_networks else address.network

    def mark_departing(self, client: Client) -> None:
        """Stop counting a connection: it ends when its input is processed, or all is sent."""
        for quota in (self.server_quota, client.source_quota):
            quota.departing[client] = None

    def remove(self, client: Client) -> None:
        for quota in (self.server_quota, client.source_quota):
            quota.connection_count -= 1
            quota.departing.pop(client, None)

    def quota_for(self, source: str) -> Quota:
        """The quota of a source; a new one if there is none."""
        if source not in self.quotas:
            if len(self.quotas) >= QUOTAS_LIMIT:
                idle = (each for each, quota in self.quotas.items() if not quota.connection_count)
                self.quotas.pop(next(idle, ""), None)
            limit, rate = self.settings.max_per_address, self.settings.rate * SOURCE_RATE_FACTOR
            if source == LOCALHOST:
                limit, rate = 0, rate * LOCALHOST_RATE_FACTOR
            self.quotas[source] = Quota(limit, SOURCE_SPARE_PLACES, rate)
        return self.quotas[source]

    def pick_to_evict(self, client: Client) -> Client | None:
        """A departing connection to close, if too many are like this one; else None."""
        for quota in (self.server_quota, client.source_quota):
            if quota.has_too_many_departing:
                # First the drained; among equals, the one who has used most.
                return max(quota.departing, key=lambda one: (one.is_drained, one.virtual_time))
        return None

    def charge(self, client: Client, tokens: float) -> None:
        """Take tokens from a client and its source."""
        if self.settings.rate:
            client.bucket.spend(tokens, self.clock.now)
            client.source_quota.bucket.spend(tokens, self.clock.now)
            self._raise_virtual_time(client, tokens)

    def _raise_virtual_time(self, client: Client, tokens: float) -> None:
        """Raise `virtual_time`: if 4 share a source's 100 tokens a second, by 0.04 s for each."""
        share = client.source_quota.bucket.rate / client.source_quota.connection_count
        client.virtual_time = max(client.virtual_time, self.clock.now) + tokens / share

    def tick(self) -> None:
        """Forget quotas that are as good as new, and bans that are over."""
        for source, quota in list(self.quotas.items()):
            bucket_is_full = quota.bucket.ready_at + BURST_SECONDS <= self.clock.now
            if bucket_is_full and not quota.connection_count:
                del self.quotas[source]
        self.bans = {source: until for source, until in self.bans.items() if until > self.clock.now}

    def ban(self, source: str, minutes: int) -> None:
        """Ban an address or a /64; a longer ban stays as it is."""
        self.bans[source] = max(self.clock.now + 60 * minutes, self.bans.get(source, 0))

    def banned_minutes(self, *sources: str) -> int:
        """Minutes until the last ban of these ends; 0 if there is none."""
        until = max(self.clock.now, *(self.bans.get(source, 0) for source in sources))
        return math.ceil((until - self.clock.now) / 60 - 1e-6)  # 5.0000001 minutes are 5


# ---
# 6. Chat

HISTORY_LINES_LIMIT = 1000
HISTORY_BYTES_LIMIT = 64 << 10


class History:
    """The last lines that were said, for newcomers."""

    def __init__(self, limit: int) -> None:
        self._entries: deque[Any] = deque(maxlen=limit)  # event, address, sizes by format
        self._encoded: dict[type[Protocol], bytes] = {}  # until the next line

    def append(self, event: Event, address: PeerAddress) -> None:
        self._entries.append((event, address, {}))
        self._encoded.clear()

    def forget(self, source: str) -> None:
        """Drop the lines that came from an address or a /64."""
        entries = [entry for entry in self._entries if source not in entry[1].sources]
        self._entries = deque(entries, self._entries.maxlen)
        self._encoded.clear()

    def encode(self, protocol_class: type[Protocol]) -> bytes:
        """The last lines, of HISTORY_BYTES_LIMIT together at most."""
        if protocol_class not in self._encoded:
            events: deque[Event] = deque()
            size = 0
            for event, _, sizes in reversed(self._entries):
                if protocol_class not in sizes:
                    sizes[protocol_class] = len(protocol_class.encode(event))
                size += sizes[protocol_class]
                if size > HISTORY_BYTES_LIMIT:
                    break
                events.appendleft(event)
            event = {"type": "history", "events": [*events]}
            self._encoded[protocol_class] = protocol_class.encode(event)
        return self._encoded[protocol_class]


class Refused(Exception):
    """What somebody typed is refused; text and code are those of the `error` event."""

    def __init__(self, text: str, code: str = "refused") -> None:
        super().__init__(text)
        self.code = code


NAME_LIMIT = 24  # characters
NORMALIZE_LIMIT = 4 * NAME_LIMIT + 4  # characters: NFC makes a text four times shorter at most
# Invisible letters and marks: they could hide one name in another.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# A line that begins with "/op", with any kind of slash or letters, also after punctuation, is never
# said.  Nor is "/op-ed": better to refuse too much than to tell a password.
OP_PATTERN = r"[/\\\u2044\u2215\u29f8\uff0f\uff3c]\s*[o\uff4f][p\uff50]"
PASSWORD_LINE = re.compile(rf"[\W_]*{OP_PATTERN}(\W.*|\Z)", re.IGNORECASE | re.DOTALL)
HTTP_REQUEST = re.compile(r"\S+ \S+ HTTP/\d")  # RFC 9112, 3


def name_key(name: str) -> str:
    """The same for every spelling of a name: BOB, \uff42ob, bob (Unicode, D146)."""
    key = unicodedata.normalize("NFD", name[:NORMALIZE_LIMIT])  # normalizing takes quadratic time
    for _ in range(2):
        key = unicodedata.normalize("NFKD", key.casefold())
    return key


def is_name_character(character: str) -> bool:
    category = unicodedata.category(character)  # L: letters, M: marks, Nd: decimal digits
    return character in "_-." or category[0] in "LM" or category == "Nd"


def parse_name(text: str) -> str:
    """`text` as a name, in NFC; raises Refused if it is none."""
    name = unicodedata.normalize("NFC", text.strip()[:NORMALIZE_LIMIT])
    is_name = (
        1 <= len(name) <= NAME_LIMIT
        and all(map(is_name_character, name))
        and unicodedata.category(name[0])[0] != "M"
        and not INVISIBLE.search(name)
        and not re.fullmatch(r"\d+(\.\d+){3}", name)  # /ban takes names and addresses
    )
    if not is_name:
        allowed = f"1 to {NAME_LIMIT} letters, digits, '_', '-' and '.'"
        raise Refused(f"A name has {allowed}, and is no IP address.", "bad_name")
    return name


CommandHandler = Callable[..., None]  # a method of Chat; takes a client and the arguments


class Command(NamedTuple):
    handler: CommandHandler
    usage: str  # its name and arguments, optional ones in brackets
    summary: str  # what it does, for /help; "" if it is not listed
    operators_only: bool


COMMANDS: dict[str, Command] = {}  # by name and alias


def command(
    usage: str, summary: str, *aliases: str, operators_only: bool = False
) -> Callable[[CommandHandler], CommandHandler]:
    """Make a method of Chat a command.

    `usage` is shown, and it is how a line is split: for "/msg NAME TEXT" the method gets a word
    and the rest of the line.
    """

    def register(handler: CommandHandler) -> CommandHandler:
        names = (usage.split()[0], *aliases)
        COMMANDS.update(dict.fromkeys(names, Command(handler, usage, summary, operators_only)))
        return handler

    return register


NAME_TRIES_LIMIT = 5
FORMER_NAMES_LIMIT = 10_000
FORMER_NAME_SECONDS = 3600.0  # how long a name given up finds its last owner
BAN_MINUTES_LIMIT = 525_600
BANS_LIMIT = 1000


class Chat:
    """The room: the people in it, what they say, and who is shown what."""

    def __init__(self, protocol_classes: Iterable[type[Protocol]], limiter: Limiter) -> None:
        self.limiter = limiter
        self.settings, self.clock = limiter.settings, limiter.clock
        self.run_id = os.urandom(8).hex()  # tells this run of the server from others
        self.logs = {each: Log(each) for each in protocol_classes}
        self.history = History(self.settings.history)
        self.people: dict[str, Client] = {}  # those who are chatting, by name_key
        # The reactor takes these two, and empties them.
        self.to_reconcile: dict[Client, None] = {}
        self.appended_bytes = 0  # of events and private bytes, in this iteration
        self._last_id = 0  # of an event
        # When a name was given up, its name_key, and its owner's address and weakref.
        self._former_names: deque[Any] = deque(maxlen=FORMER_NAMES_LIMIT)
        self._ignorers: defaultdict[Client, set[Client]] = defaultdict(set)  # who ignores each

    # The state machine
    def handle(self, client: Client, received: Received) -> None:
        """Do what a line or marker means in this state: see State."""
        self.limiter.charge(client, LINE_TOKENS)
        try:
            if received is DISCONNECT:
                self.start_closing(client, reason=client.lost_reason or "the connection ended")
            elif received is OPENED:
                self.greet(client)
            elif client.state is AWAITING_NAME:
                self._handle_name(client, received)
            elif client.state is CHATTING:
                self._handle_line(client, received)
            else:
                raise RuntimeError(f"{received!r} in {client.state}")
        except Refused as error:
            self.send(client, "error", code=error.code, text=str(error))
            if client.state is AWAITING_NAME:
                self._ask_for_name(client)

    def _handle_name(self, client: Client, received: Received) -> None:
        if not isinstance(received, str) or HTTP_REQUEST.match(received):  # TOO_LONG
            self.start_closing(client, "no_name")
        elif COMMANDS.get(received.strip().lower()) is COMMANDS["/quit"]:  # or an alias of it
            self.start_closing(client, reason="quit")
        else:
            self._join(client, received)

    def _handle_line(self, client: Client, received: Received) -> None:
        if not isinstance(received, str):  # TOO_LONG
            text = f"A line has at most {LINE_BYTES_LIMIT} bytes; yours was not sent."
            raise Refused(text, "too_long")
        line = received
        if match := PASSWORD_LINE.match(line):  # run it, so that the password is never said
            line = f"/op{match[1]}"
        body = line.lstrip()
        if body[:2] == "//":  # PASSWORD_LINE has caught //op
            self.publish("said", client, text=body[1:])
        elif body[:1] == "/":
            self._run_command(client, body)
        elif body:
            self.publish("said", client, text=line)
            if line in ("help", "?"):
                self.send(client, "notice", text="/help shows what you can type.")

    # Showing events
    def publish(self, event_type: str, client: Client, **fields: Any) -> None:
        """Show everyone in the room an event.

        What is said is left out for those who ignore the speaker, and for speakers themselves if
        their screen shows it already (not ECHOES_OWN_LINES).
        """
        self._last_id += 1
        at = self.clock.wall_time
        event = {"type": event_type, "id": self._last_id, "at": at, "name": client.name, **fields}
        for log in self.logs.values():
            if log.readers:
                data = log.protocol_class.encode(event)
                log.append(data)
                self.appended_bytes += len(data)
        if event_type in SPOKEN_TYPES:
            if self.settings.history:
                self.history.append(event, client.address)
            if not client.protocol.ECHOES_OWN_LINES:
                client.outbox.exclude_newest()
            for ignorer in self._ignorers.get(client, ()):
                ignorer.outbox.exclude_newest()

    def send(self, client: Client, event_type: str, **fields: Any) -> None:
        self.send_raw(client, client.protocol.encode({"type": event_type, **fields}))

    def send_raw(self, client: Client, data: bytes) -> None:
        if data:
            client.outbox.append_private(data)
            self.appended_bytes += len(data)
            self.to_reconcile[client] = None

    # Joining and leaving
    def greet(self, client: Client) -> None:
        """Greet a client and ask for a name, or say why it may not join."""
        forwarded_for = client.protocol.forwarded_for
        if forwarded_for:  # from a proxy: count it under this address
            client.peer_label = f"{forwarded_for} through {client.peer_label}"
            self.limiter.remove(client)
            self.limiter.add(client, forwarded_for)
        if not self._reject_if_needed(client):
            client.enter(AWAITING_NAME, self.clock.now)
            first = {"protocol": PROTOCOL_VERSION, "banner": BANNER, "text": self.settings.greeting}
            self.send(client, "greeting", **first, room=self.run_id, max_line=LINE_BYTES_LIMIT)
            self._ask_for_name(client)

    def _ask_for_name(self, client: Client) -> None:
        if client.name_tries == NAME_TRIES_LIMIT:
            self.start_closing(client, "tries")
        else:
            client.name_tries += 1
            self.send(client, "prompt", text=PROMPT)

    def _reject_if_needed(self, client: Client) -> bool:
        """Disconnect a client that may not join; returns whether it did."""
        if minutes := self.limiter.banned_minutes(*client.address.sources):
            self.start_closing(client, "banned", minutes=minutes)
        elif 0 < self.settings.max_people <= len(self.people):
            self.start_closing(client, "full")
        elif client.over_limit_code:
            self.start_closing(client, client.over_limit_code)
        return client.state is CLOSING

    def _join(self, client: Client, text: str) -> None:
        """Let a client join under the name in `text`, or reject it; raises Refused."""
        if self._reject_if_needed(client):
            return
        client.name = name = self._available_name(client, text)
        self.limiter.charge(client, JOIN_TOKENS)
        client.enter(CHATTING, self.clock.now)
        self.people[name_key(name)] = client
        self.publish("joined", client)  # before it reads the log
        client.outbox.log.readers[client] = None
        client.outbox.start_reading()
        self.send(client, "welcome", text=f"Hey, {name}! Hope you enjoy the chat.", name=name)
        if self.settings.history:
            self.send_raw(client, self.history.encode(type(client.protocol)))
        logger.info("%s joined from %s (%d here)", name, client.peer_label, len(self.people))

    def start_closing(
        self, client: Client, closing_code: str = "", reason: str = "", **fields: Any
    ) -> None:
        """Close a client's connection when everything pending is sent, and tell the others.

        With a `closing_code`, the client is told: `fields` are filled into its CLOSING_TEXT.  The
        server log gets the `reason`, or else the code.
        """
        was_chatting = client.state is CHATTING
        client.enter(CLOSING, self.clock.now)  # first: if a step fails, `_abort` repeats none
        self.to_reconcile[client] = None
        if was_chatting:
            self._release_name(client)
            client.outbox.log.readers.pop(client, None)
            client.outbox.stop_reading()
            self._ignorers.pop(client, None)
            for ignorers in self._ignorers.values():
                ignorers.discard(client)
            if closing_code == "kicked":
                self.publish("kicked", client, **fields)
            else:
                self.publish("quit", client)
            how = f"{reason or closing_code} ({client.peer_label}, {len(self.people)} here)"
            logger.info("%s left: %s", client.name, how)
        else:
            logger.debug("%s left before joining: %s", client.peer_label, reason or closing_code)
        self.limiter.mark_departing(client)
        if closing_code and client.protocol.accepts_events:
            text = CLOSING_TEXT[closing_code].format_map(fields)
            self.send(client, "closing", code=closing_code, text=text)
        client.protocol.finish(closing_code)
        self.send_raw(client, client.protocol.take_replies())

    # Names
    def _available_name(self, client: Client, text: str) -> str:
        """`text` as a name that this client may take, or already has; raises Refused."""
        name = parse_name(text)
        if self.people.get(name_key(name), client) is not client:
            raise Refused(f"The name {name} is taken.", "name_taken")
        return name

    def _release_name(self, client: Client) -> None:
        """Free a name; operators can still find its last owner."""
        key = name_key(client.name)
        del self.people[key]
        self._former_names.append((self.clock.now, key, client.address, weakref.ref(client)))

    def _find(self, name: str) -> Client:
        """Who has this name; raises Refused."""
        if not (client := self.people.get(name_key(name))):
            raise Refused(f"Nobody here is called {name}.")
        return client

    def _find_last(self, name: str) -> tuple[PeerAddress, Client | None]:
        """The address of who has this name or had it last, and who, if here; raises Refused."""
        key, oldest = name_key(name), self.clock.now - FORMER_NAME_SECONDS
        if key not in self.people:
            for given_up_at, old_key, address, owner in reversed(self._former_names):
                if old_key == key and given_up_at > oldest:
                    return address, owner()
        client = self._find(name)
        return client.address, client

    def _address_of(self, target: str) -> PeerAddress:
        """The address of a name, or `target` itself, also an IPv6 /64; raises Refused."""
        try:
            return parse_address(target)
        except ValueError:
            return self._find_last(target)[0]

    # Commands
    def _run_command(self, client: Client, line: str) -> None:
        words = line.split(None, 1)
        command_name, rest = words[0].lower(), "".join(words[1:])
        entry = COMMANDS.get(command_name)
        if not entry or (entry.operators_only and not client.is_operator):
            raise Refused(f"Unknown command {command_name}; try /help.", "unknown_command")
        _, *parameters = entry.usage.split()
        arguments = rest.strip().split(None, len(parameters) - 1) if parameters else []
        if len(arguments) < sum(each[0] != "[" for each in parameters):
            raise Refused(f"Usage: {entry.usage}", "usage")
        entry.handler(self, client, *arguments)

    @command("/help", "show this list")
    def _help(self, client: Client) -> None:
        commands = dict.fromkeys(COMMANDS.values())  # aliases left out
        allowed = [each for each in commands if client.is_operator or not each.operators_only]
        rows = [[each.usage, each.summary] for each in allowed if each.summary]
        rows.append(["//TEXT", "say a line that starts with a slash"])  # see _handle_line
        self.send(client, "help", commands=rows)

    @command("/who", "show who is here", "/names", "/list")
    def _who(self, client: Client) -> None:
        rows: list[Event] = []
        for _, other in sorted(self.people.items()):
            address = {"address": other.address.host} if client.is_operator else {}
            rows.append({"name": other.name, "operator": other.is_operator, **address})
        data = client.protocol.encode({"type": "people", "people": rows})
        self.limiter.charge(client, len(data) / WHO_BYTES_PER_TOKEN)
        self.send_raw(client, data)

    @command("/me ACTION", "say what you do: /me waves")
    def _me(self, client: Client, text: str) -> None:
        self.publish("did", client, text=text)

    @command("/msg NAME TEXT", "say something to one person alone")
    def _msg(self, client: Client, name: str, text: str) -> None:
        other = self._find(name)
        fields = {"at": self.clock.wall_time, "from": client.name, "to": other.name, "text": text}
        if other is not client and other not in self._ignorers.get(client, ()):
            if other.outbox.private_size > PRIVATE_LIMIT_FOR_WHISPERS:
                raise Refused(f"{other.name} has too much to read; your line was not sent.")
            self.send(other, "whisper", **fields)
        self.send(client, "whisper", **fields)

    @command("/nick NAME", "change your name")
    def _nick(self, client: Client, text: str) -> None:
        name = self._available_name(client, text)
        if name == client.name:
            raise Refused(f"You are {name} already.")
        self.limiter.charge(client, RENAME_TOKENS)
        logger.info("%s is now %s (%s)", client.name, name, client.peer_label)
        self.publish("renamed", client, to=name)  # with the old name
        self._release_name(client)
        client.name = name
        self.people[name_key(name)] = client

    @command("/ignore NAME", "hide what somebody says, or show it again")
    def _ignore(self, client: Client, name: str) -> None:
        other = self._find(name)
        if other is client:
            raise Refused("You can't ignore yourself.")
        ignorers = self._ignorers[other]
        if client in ignorers:
            ignorers.remove(client)
            text = f"You hear {other.name} again."
        else:
            ignorers.add(client)
            text = f"You no longer hear {other.name}."
        self.send(client, "notice", text=text)

    @command("/quit", "leave the chat", "/exit", "/bye", "/q")
    def _quit(self, client: Client) -> None:
        self.start_closing(client, reason="quit")

    @command("/op PASSWORD", "")
    def _op(self, client: Client, password: str) -> None:
        if not self.settings.password:
            raise Refused("This server has no operators.")
        if hmac.compare_digest(password.encode(), self.settings.password.encode()):
            client.is_operator = True
            logger.info("%s is an operator (%s)", client.name, client.peer_label)
            self.send(client, "notice", text="You are an operator now; see /help.")
            return
        logger.info("%s gave a wrong password (%s)", client.name, client.peer_label)
        self.limiter.charge(client, WRONG_PASSWORD_TOKENS)
        raise Refused("That is not the password.")

    @command("/kick NAME [WHY]", "remove somebody", operators_only=True)
    def _kick(self, client: Client, name: str, reason: str = "no reason given") -> None:
        _, other = self._find_last(name)
        if not other or other.state is not CHATTING:
            raise Refused(f"{name} has left already.")
        logger.info("%s kicked %s (%s)", client.name, other.name, client.peer_label)
        self.start_closing(other, "kicked", by=client.name, text=reason)

    @command("/ban NAME [MINUTES]", "kick and ban; NAME may be an address", operators_only=True)
    def _ban(self, client: Client, target: str, duration: str = "60") -> None:
        source = self.limiter.source_for(self._address_of(target))
        minutes = int(duration) if duration.isdecimal() else 0
        if not 1 <= minutes <= BAN_MINUTES_LIMIT:
            raise Refused(f"A ban lasts from 1 to {BAN_MINUTES_LIMIT} minutes.", "usage")
        if source == LOCALHOST or source in client.address.sources:
            raise Refused("Neither localhost nor your own address can be banned; use /kick.")
        if source not in self.limiter.bans and len(self.limiter.bans) >= BANS_LIMIT:
            raise Refused(f"There are {BANS_LIMIT} bans already; /unban ends one.")
        self.history.forget(source)
        self.limiter.ban(source, minutes)
        minutes = self.limiter.banned_minutes(source)
        with suppress(Refused):  # nobody is here to kick
            self._kick(client, target, f"banned for {minutes} min")
        logger.info("%s banned %s for %d min", client.name, source, minutes)
        self.send(client, "notice", text=f"{source} is banned for {minutes} min.")

    @command("/bans", "show the banned addresses", operators_only=True)
    def _bans(self, client: Client) -> None:
        self.limiter.tick()  # forgets the bans that are over
        if not self.limiter.bans:
            self.send(client, "notice", text="No address is banned.")
        for source in self.limiter.bans:
            minutes = self.limiter.banned_minutes(source)
            self.send(client, "notice", text=f"{source} is banned for another {minutes} min.")

    @command("/unban ADDRESS", "end a ban", operators_only=True)
    def _unban(self, client: Client, target: str) -> None:
        sources = self._address_of(target).sources
        ended = sorted(source for source in sources if self.limiter.bans.pop(source, None))
        if not ended:
            raise Refused(f"{target} is not banned.")
        for source in ended:
            logger.info("%s ended the ban of %s", client.name, source)
            self.send(client, "notice", text=f"{source} is no longer banned.")


# ---
# 7. Reactor

# Backpressure: a reader whose socket is full keeps the log from being trimmed.
# While any reader lags by more than LAG_LIMIT, the room is paused: no input is processed.  Input
# also waits when one iteration has made that many new bytes.  So a log is never longer than twice
# LAG_LIMIT, plus a few events.
LAG_LIMIT = 512 << 10  # bytes
STALL_BUDGET_SECONDS = 2.0  # how long the room may be paused
STALL_RECOVERY = 0.2  # seconds regained per second without a pause

TICK_SECONDS = 1.0  # between two checks of all deadlines
PROCESS_SECONDS = 0.05  # for processing input in one iteration
POLL_SECONDS = 0.05  # the shortest wait for tokens, or to send again to those who lag
SHUTDOWN_SECONDS = 2.0  # to send what is pending, and for the peers to close
PING_TICKS = 30  # of silence before each WebSocket ping; time when we did not run does not count
SILENT_TICKS_LIMIT = 4 * PING_TICKS  # with no answer to the pings: the peer is lost
ACCEPT_BATCH = 64  # accepted from a listener in one iteration
READ_SIZE = 16 << 10  # bytes: one recv
READ_AHEAD = 64 << 10  # bytes read from a client whose input waits
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
SOCKET_OPTIONS = [
    (socket.SOL_SOCKET if name[:3] == "SO_" else socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in [
        ("TCP_NODELAY", 1),  # a line is sent at once
        ("SO_OOBINLINE", 1),  # telnet sends part of Ctrl-C as urgent data
        # A buffer that the system lets grow would hide that a reader has stalled.
        ("SO_SNDBUF", 2 << 20),  # bytes; Linux takes net.core.wmem_max at most, and doubles it
        ("SO_KEEPALIVE", 1),
        ("TCP_KEEPIDLE", 60),  # seconds of silence before the first probe
        ("TCP_KEEPALIVE", 60),  # macOS's name for it
        ("TCP_KEEPINTVL", 15),  # seconds between probes
        ("TCP_KEEPCNT", 4),  # probes without an answer: the peer is lost
        ("TCP_USER_TIMEOUT", 60_000),  # milliseconds without an ACK
    ]
    if hasattr(socket, name)
]
RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)  # for SO_LINGER


class Reactor:
    """The event loop.

    `_reconcile` does what follows from a connection's state; `_guard` confines an error to one.
    State says how a connection ends.
    """

    def __init__(
        self,
        listeners: dict[socket.socket, type[Protocol]],
        settings: Settings,
        selector: selectors.BaseSelector | None = None,
        read_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.listeners = dict(listeners)  # until the server is stopped
        self.selector = selector or selectors.DefaultSelector()
        self.clock = Clock(read_clock)
        self.limiter = Limiter(settings, self.clock)
        self.chat = Chat(listeners.values(), self.limiter)
        self.clients: dict[Client, None] = {}
        self.with_input: dict[Client, None] = {}
        self.blocked: dict[Client, None] = {}
        self.stall_budget = STALL_BUDGET_SECONDS
        self.is_paused = False  # a reader lags: no input is processed
        self.tick_at = self.clock.now
        self.ends_at = NEVER  # when a stopped server ends, at the latest

    def run(self) -> bool:
        """Serve until stopped; returns False if an error stopped the server."""
        ok = True
        while self.listeners or (self.clients and self.clock.now < self.ends_at):
            try:
                self.run_once()
            except Exception:
                logger.exception("shutting down after an internal error")
                if not ok:
                    break
                ok = False
                self.stop()
        for client in list(self.clients):
            self._close(client)
        return ok

    def stop(self) -> None:
        """Tell everyone, send what is pending, wait for the peers to close."""
        if self.listeners:
            self.ends_at = self.clock.now + SHUTDOWN_SECONDS
            for listener in self.listeners:
                with suppress(KeyError):  # it is not registered
                    self.selector.unregister(listener)
                listener.close()
            self.listeners.clear()
            for log in self.chat.logs.values():
                log.readers.clear()  # nobody reads that others left
            for client in list(self.clients):
                if client.state is not CLOSING:
                    self._guard(self.chat.start_closing, client, "shutdown")

    # The event loop
    def run_once(self) -> None:
        """One iteration; waits for something to do."""
        selected = self.selector.select(self._select_timeout())
        self.clock.advance()
        for key, mask in selected:
            if isinstance(key.data, Client):
                self._on_io(key.data, mask)
            else:
                key.data()  # a function: `_accept`, or on_wakeup
        self._process_all_input()
        for log in self.chat.logs.values():
            self._broadcast(log)
        self.chat.appended_bytes = 0
        to_reconcile, self.chat.to_reconcile = self.chat.to_reconcile, {}
        for client in to_reconcile:
            self._guard(self._reconcile, client)
        if self.clock.now >= self.tick_at:
            self._tick()
        self._apply_backpressure()
        # By now each reader has been sent all up to `broadcast_end`, or is blocked.
        for log in self.chat.logs.values():
            cursors = [client.outbox.cursor for client in self.blocked if client.outbox.log is log]
            log.trim(min([log.broadcast_end, *cursors]))

    def _select_timeout(self) -> float:
        """Seconds to wait for sockets: until tokens are there, or something is due."""
        if self.chat.to_reconcile or self.chat.appended_bytes:  # by `_tick`, for example
            return 0
        input_at = min(map(self._input_ready_at, self.with_input), default=NEVER)
        if input_at > self.clock.now:  # wake up for a few tokens, not for each
            input_at = max(input_at, self.clock.now + POLL_SECONDS)
        poll_at = self.clock.now + POLL_SECONDS if self.is_paused else NEVER
        return max(0, min(input_at, poll_at, self.tick_at, self.ends_at) - self.clock.read())

    def _on_io(self, client: Client, mask: int) -> None:
        self.chat.to_reconcile[client] = None
        if mask & WRITE:
            self.blocked.pop(client, None)
        if mask & READ:
            self._guard(self._read, client)

    def _process_all_input(self) -> None:
        """Process input in the order of `virtual_time`."""
        until = self.clock.read() + PROCESS_SECONDS
        for client in sorted(self.with_input, key=lambda client: client.virtual_time):
            if self.clock.read() > until:
                return
            if self._input_ready_at(client) <= self.clock.now:
                self._guard(self._process_input, client)
            if client.needs_scan and self._input_ready_at(client) > self.clock.now:
                self._guard(self._scan_for_interrupt, client)

    def _broadcast(self, log: Log) -> None:
        """Send the readers of a log everything new, in one system call each."""
        start, end, to_reconcile = log.broadcast_end, log.end, self.chat.to_reconcile
        size = end - start
        if not size:
            return
        with memoryview(log.data) as view, view[start - log.start :] as news:
            for client in log.readers:
                outbox = client.outbox
                # Fast path: no Python call but send().
                if outbox.cursor == start and not outbox.splices:
                    try:
                        sent = client.sock.send(news)
                    except OSError:
                        sent = 0  # `_reconcile` tries again
                    if sent == size:
                        outbox.cursor = end
                        continue
                    outbox.cursor += sent
                to_reconcile[client] = None
        log.broadcast_end = end

    def _apply_backpressure(self) -> None:
        """Pause the room while a reader lags; drop it when the stall budget is spent."""
        change = self.clock.elapsed * (-1 if self.is_paused else STALL_RECOVERY)
        self.stall_budget = min(max(0, self.stall_budget + change), STALL_BUDGET_SECONDS)
        for client in self._lagging():
            # Try to send: the selector reports space only when a lot is free.
            del self.blocked[client]
            self._guard(self._reconcile, client)
        if self.stall_budget < POLL_SECONDS:  # too little for another iteration
            for client in self._lagging():
                self._guard(self._abort, client, "too far behind")
        self.is_paused = bool(self._lagging())

    def _lagging(self) -> list[Client]:
        return [client for client in self.blocked if client.outbox.lag > LAG_LIMIT]

    def _tick(self) -> None:
        self.tick_at = self.clock.now + TICK_SECONDS
        self._register_listeners()
        self.limiter.tick()
        for client in list(self.clients):
            self._guard(self._check_timeouts, client)

    def _register_listeners(self) -> None:
        """Listen: at first, and again after an error."""
        for listener in self.listeners:
            if listener not in self.selector.get_map():
                with suppress(OSError):  # the next tick tries again
                    listener.setblocking(False)
                    accept = functools.partial(self._accept, listener)
                    self.selector.register(listener, READ, accept)

    def _check_timeouts(self, client: Client) -> None:
        """End what takes too long or has an error, and ping a WebSocket that is silent."""
        unwatched = not client.watched_mask  # no error is told
        if unwatched and (error := client.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            self._mark_lost(client, os.strerror(error))
        ping = client.protocol.PING_FRAME if client.protocol.accepts_events else b""
        if self.clock.now >= client.deadline:
            if client.state is CLOSING or client.lost_reason:
                self._abort(client, "took too long")
            else:
                self.chat.start_closing(client, "timeout")
        elif ping and not client.outbox.has_pending and client not in self.with_input:
            client.silent_ticks += 1
            if client.silent_ticks >= SILENT_TICKS_LIMIT:
                self._mark_lost(client, "it answers no ping")
            elif client.silent_ticks % PING_TICKS == 0:
                self.chat.send_raw(client, ping)

    # New connections
    def _accept(self, listener: socket.socket) -> None:
        if not self.listeners:  # stopped in this iteration
            return
        for _ in range(ACCEPT_BATCH):
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptors; the next tick tries again
                logger.warning("can't accept: %s", error.strerror)
                self.selector.unregister(listener)
                return
            if not peer:  # on macOS: the peer is gone again
                continue
            ip_text, port = peer[:2]
            peer_label = f"{re.sub('^::ffff:', '', ip_text)} port {port}"  # without IPv6's prefix
            log = self.chat.logs[self.listeners[listener]]
            with suppress(OSError):  # the peer is gone again
                self.limiter.own_networks.add(parse_address(sock.getsockname()[0]).network)
            client = Client(peer_label, log, self.clock.now)
            client.sock = sock
            self.limiter.add(client, ip_text)
            self.clients[client] = None
            self._guard(self._set_up, client)

    def _set_up(self, client: Client) -> None:
        sock, protocol = client.sock, client.protocol
        sock.setblocking(False)
        for option in SOCKET_OPTIONS:
            with suppress(OSError):  # the kernel does not know it
                sock.setsockopt(*option)
        is_local = client.address.host == LOCALHOST
        protocol.trusts_forwarded_for = is_local and self.limiter.settings.behind_proxy
        if protocol.accepts_events:
            self.chat.greet(client)
        self._evict_for(client)

    def _evict_for(self, client: Client) -> None:
        """Close departing connections, while too many share a quota with this one."""
        self._reconcile(client)  # send what is pending before it may be evicted itself
        while other := self.limiter.pick_to_evict(client):
            if other.is_drained:
                self._close(other)
            else:
                self._guard(self._abort, other, "too many connections")

    # One connection
    def _guard(self, step: Callable[..., None], client: Client, *arguments: Any) -> None:
        """Take a step with one connection; if it fails, drop that one alone."""
        if client.state is CLOSED:
            return
        try:
            step(client, *arguments)
            return
        except OSError as error:
            reason = error.strerror or "lost"
        except Exception:
            logger.exception("an internal error, with %s", client.peer_label)
            reason = "an internal error"
        # Not in `except`: its traceback keeps a view of the log.  `_abort` can fail twice: then the
        # client is CLOSING, then it is CLOSED.
        self._guard(self._abort, client, reason)

    def _input_ready_at(self, client: Client) -> float:
        """When this client's input may be processed; NEVER if something must change first."""
        is_full = client.outbox.private_size > PRIVATE_LIMIT_FOR_INPUT
        is_ending = client.state in (CLOSING, CLOSED)
        if self.is_paused or is_full or is_ending or self.chat.appended_bytes > LAG_LIMIT:
            return NEVER
        return max(client.bucket.ready_at, client.source_quota.bucket.ready_at)

    def _read(self, client: Client) -> None:
        """Read ahead; only called while there is space, as recv(0) would look like EOF."""
        try:
            data = client.sock.recv(min(READ_SIZE, READ_AHEAD - len(client.read_buffer)))
        except BlockingIOError:
            return
        except OSError as error:
            self._mark_lost(client, error.strerror)  # what it sent before is still said
            data = b""
        client.silent_ticks = 0
        client.at_eof = not data
        if client.state is not CLOSING:
            client.read_buffer += data
            client.needs_scan = True
            self.with_input[client] = None

    def _process_input(self, client: Client) -> None:
        """Handle what was received, until the client has to wait; feed the protocol once."""
        self.chat.to_reconcile[client] = None
        # Move to the end: with equal virtual times they take turns, as sorted() is stable.
        self.with_input[client] = self.with_input.pop(client)
        size = BYTES_PER_TOKEN if self.limiter.settings.rate else READ_SIZE  # a token's worth
        protocol, was_fed = client.protocol, False
        while self._input_ready_at(client) <= self.clock.now:
            received = protocol.next()
            if protocol.replies:
                self.chat.send_raw(client, protocol.take_replies())
            if received is not None:
                self.chat.handle(client, received)
                if received is OPENED:  # `greet` may have counted it under another address
                    self._evict_for(client)
            elif not client.read_buffer and not client.at_eof:
                del self.with_input[client]
                return
            elif was_fed:  # others may be first now
                return
            else:
                data, client.read_buffer = client.read_buffer[:size], client.read_buffer[size:]
                self.limiter.charge(client, len(data) / BYTES_PER_TOKEN)
                protocol.feed(data)
                was_fed = True

    def _scan_for_interrupt(self, client: Client) -> None:
        """Look for Ctrl-C in input that has to wait.  If there is one, the input is dropped."""
        client.needs_scan = False
        if client.state is not CLOSING and client.protocol.scan_for_interrupt(client.read_buffer):
            self.chat.send_raw(client, client.protocol.take_replies())
            self.chat.handle(client, DISCONNECT)

    def _reconcile(self, client: Client) -> None:
        """Do all that follows from a connection's state; may be called at any time."""
        outbox = client.outbox
        if outbox.has_pending and client not in self.blocked:
            self._flush(client)
        if outbox.has_pending:
            self.blocked[client] = None
        else:
            self.blocked.pop(client, None)
        if client.state is CLOSING:  # reads go on, up to EOF
            client.read_buffer = b""
            self.with_input.pop(client, None)
        if client.is_drained:
            if client.at_eof:
                self._close(client)
                return
            # No close yet: with input unread, it resets the connection (RFC 1122, 4.2.2.13).
            with suppress(OSError):  # the peer is gone already
                client.sock.shutdown(socket.SHUT_WR)
        mask = WRITE if client in self.blocked else 0
        if not client.at_eof and len(client.read_buffer) < READ_AHEAD:
            mask |= READ
        self._watch(client, mask)

    def _flush(self, client: Client) -> None:
        with client.outbox.pending() as pending:
            try:
                # `advance` drops empty splices.
                client.outbox.advance(client.sock.send(pending) if pending else 0)
            except BlockingIOError:
                pass  # the socket's buffer is full
            except OSError as error:
                self._mark_lost(client, error.strerror)

    def _mark_lost(self, client: Client, reason: str | None) -> None:
        """Send nothing more: the peer has missed something.

        What was read is still processed.  After the shutdown, recv() returns EOF.
        """
        if not client.lost_reason:
            client.lost_reason, client.lost_at = reason or "lost", self.clock.now
            client.outbox.discard()
            self.limiter.mark_departing(client)
            with suppress(OSError):  # the peer is gone already
                client.sock.shutdown(socket.SHUT_RDWR)

    def _watch(self, client: Client, mask: int) -> None:
        if mask != client.watched_mask:
            if client.watched_mask:
                self.selector.unregister(client.sock)
            client.watched_mask = mask
            if mask:
                self.selector.register(client.sock, mask, client)

    def _abort(self, client: Client, reason: str) -> None:
        """End a connection at once; what is pending is lost."""
        if client.state is not CLOSING:
            self.chat.start_closing(client, reason=reason)
        # After a plain close the kernel keeps a full send buffer for two minutes (tcp(7)).
        with suppress(OSError):  # it is closed next
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._close(client)

    def _close(self, client: Client) -> None:
        """Forget a client."""
        client.enter(CLOSED, self.clock.now)
        for collection in (self.clients, self.with_input, self.blocked):
            collection.pop(client, None)
        self.limiter.remove(client)
        with suppress(OSError, KeyError):  # it failed, or is not registered
            self.selector.unregister(client.sock)
        with suppress(OSError):  # nothing else to do
            client.sock.close()


# ---
# 8. The web

HEAD_LIMIT = 8 << 10  # bytes of a request
# A request's head (RFC 9112, sections 3 and 5).
HEAD_END = re.compile(rb"\r?\n\r?\n")
HEADER_PATTERN = r"\r?\n([^\s:]+):([^\r\n]*)"
REQUEST_HEAD = re.compile(rf"(\S+) (\S+) HTTP/1\.\d((?:{HEADER_PATTERN})*)")
WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3


def digest(algorithm: str, text: str) -> str:
    """A hash of `text`, in base64."""
    return b64encode(hashlib.new(algorithm, text.encode()).digest()).decode()


def parse_request(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, path and headers; the last one of the same name counts.  Raises ValueError."""
    request = REQUEST_HEAD.fullmatch(head.decode("latin-1"))
    if not request:
        raise ValueError
    method, target, lines = request.group(1, 2, 3)
    headers = {name.lower(): value.strip() for name, value in re.findall(HEADER_PATTERN, lines)}
    return method, target.partition("?")[0], headers


# A frame's opcodes, and the high bits of its first two bytes (RFC 6455, 5.2).
CONTINUATION_OPCODE, TEXT_OPCODE, BINARY_OPCODE = 0x0, 0x1, 0x2
CLOSE_OPCODE, PING_OPCODE, PONG_OPCODE = 0x8, 0x9, 0xA
FIN_BIT, RSV_BITS, MASK_BIT = 0x80, 0x70, 0x80
# Close codes (RFC 6455, 7.4.1): going away, and try again later.
WEBSOCKET_CLOSE_CODES = {"shutdown": 1001, "full": 1013, "crowded": 1013}
encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """A whole message as a server sends it: in one frame, not masked."""
    first, size = FIN_BIT | opcode, len(payload)
    if size < 126:
        return bytes([first, size]) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def unmask(payload: bytes, masking_key: bytes) -> bytes:
    """`payload` XOR the repeated `masking_key`, in one operation (RFC 6455, 5.3)."""
    size = len(payload)
    keys = (masking_key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(keys, "big")).to_bytes(size, "big")


class Phase(Enum):
    """REQUEST, then WEBSOCKET if it asks for one, then ENDED."""

    REQUEST, WEBSOCKET, ENDED = range(3)


REQUEST, WEBSOCKET, ENDED = Phase


class Web(Protocol):
    """A browser or a bot: one HTTP request, which gets a response or opens a WebSocket.

    On a WebSocket (RFC 6455) each of our messages is one event, each of the peer's is lines.
    """

    ECHOES_OWN_LINES = True  # as a confirmation
    PING_FRAME = encode_frame(PING_OPCODE, b"")

    def __init__(self) -> None:
        self._phase = REQUEST
        self._data = b""
        self._fed_eof = False  # nothing more will be fed
        self._fragments: bytes | None = None  # those so far, within a message
        self._lines: deque[bytes] = deque()  # the rest of the last message

    @staticmethod
    def encode(event: Event) -> bytes:
        return encode_frame(TEXT_OPCODE, encode_json(event).encode())

    @property
    def accepts_events(self) -> bool:
        return self._phase is WEBSOCKET

    def feed(self, data: bytes) -> None:
        self._data += data
        self._fed_eof = not data

    def next(self) -> Received | None:
        if self._phase is REQUEST:
            return self._parse_head()
        while not self._lines:
            if self._phase is ENDED:
                return DISCONNECT
            if not self._parse_frame():
                return DISCONNECT if self._fed_eof else None
        return clean(self._lines.popleft().decode("utf-8", "replace"))

    def finish(self, closing_code: str) -> None:
        if self.accepts_events:
            self._send_close(WEBSOCKET_CLOSE_CODES.get(closing_code, 1000))

    def _parse_head(self) -> Received | None:
        """Parse the head of the request, if it is complete, and answer."""
        head, *rest = HEAD_END.split(self._data, 1)
        if len(head) > HEAD_LIMIT:
            return self._respond(431)
        if not rest:
            return DISCONNECT if self._fed_eof else None
        try:
            method, path, headers = parse_request(head)
            if self.trusts_forwarded_for and "x-forwarded-for" in headers:
                nearest = headers["x-forwarded-for"].rpartition(",")[2].strip()
                self.forwarded_for = str(ipaddress.ip_address(nearest.partition("%")[0]))  # no zone
        except ValueError:
            return self._respond(400)
        if method not in ("GET", "HEAD"):
            return self._respond(405)
        if path == "/chat" and method == "GET":
            return self._upgrade(headers, rest[0])
        if path == "/hello":
            return self._respond(200, "Hello, World!")
        if path == "/":
            return self._respond(200, PAGE, "html")
        return self._respond(404)

    def _upgrade(self, headers: dict[str, str], rest: bytes) -> Received:
        """Open a WebSocket (RFC 6455, 4.2); `rest` came after the head."""
        key = headers.get("sec-websocket-key", "")
        if not key or "websocket" not in headers.get("upgrade", "").lower():
            return self._respond(426)
        # Another site's page may call here, but it can't lie about its origin.
        host = headers.get("host", "").lower()
        ours = (f"http://{host}", f"https://{host}")
        if headers.get("origin", ours[0]).lower() not in ours:
            return self._respond(403)
        accept = digest("sha1", key + WEBSOCKET_GUID)
        lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        self.replies += "\r\n".join([*lines, f"Sec-WebSocket-Accept: {accept}", "", ""]).encode()
        self._phase, self._data = WEBSOCKET, rest
        return OPENED

    def _respond(self, status: int, body: str = "", subtype: str = "plain") -> Marker:
        """Send a response, and close (RFC 9110)."""
        http_status = HTTPStatus(status)
        data = (body or f"{status} {http_status.phrase}\n").encode()
        lines = [
            f"HTTP/1.1 {status} {http_status.phrase}",
            f"Content-Type: text/{subtype}; charset=utf-8",
            f"Content-Length: {len(data)}",
            "Connection: close, Upgrade",
            "Upgrade: websocket",  # for 426, as Allow is for 405
            "Allow: GET, HEAD",
            "Cache-Control: no-cache",
            "X-Content-Type-Options: nosniff",
            f"Content-Security-Policy: {CONTENT_SECURITY_POLICY}",
        ]
        self._phase = ENDED
        self.replies += "\r\n".join([*lines, "", ""]).encode()
        if not self._data.startswith(b"HEAD "):  # after an error, it is not parsed
            self.replies += data
        return DISCONNECT

    def _parse_frame(self) -> bool:
        """Parse the next frame; returns False if it is not complete."""
        data = self._data
        if len(data) < 2:
            return False
        is_final, opcode, size = data[0] & FIN_BIT, data[0] & 0x0F, data[1] & 0x7F
        start = 6  # of the payload, after two bytes and the mask
        is_control_frame = opcode in (CLOSE_OPCODE, PING_OPCODE, PONG_OPCODE)
        expected = TEXT_OPCODE if self._fragments is None else CONTINUATION_OPCODE
        is_valid = (is_final and size < 126) if is_control_frame else opcode == expected
        if not is_valid or data[0] & RSV_BITS or not data[1] & MASK_BIT:
            self._send_close(1003 if opcode == BINARY_OPCODE else 1002)
            return True
        if size >= 126:
            start = 8 if size == 126 else 14
            if len(data) < start:
                return False
            size = int.from_bytes(data[2 : start - 4], "big")
        if not is_control_frame and len(self._fragments or b"") + size > LINE_BYTES_LIMIT:
            self._send_close(1009)  # too big
            return True
        end = start + size
        if len(data) < end:
            return False
        self._data = data[end:]
        payload = unmask(data[start:end], data[start - 4 : start])
        if opcode == PING_OPCODE:
            self.replies += encode_frame(PONG_OPCODE, payload)
        elif opcode == CLOSE_OPCODE:
            websocket_code = int.from_bytes(payload[:2], "big")  # we answer with the same
            known = 1000 <= websocket_code <= 4999 and websocket_code not in (1005, 1006, 1015)
            self._send_close(websocket_code if known or not payload else 1002)
            return True
        elif not is_control_frame:
            message = (self._fragments or b"") + payload
            self._fragments = None if is_final else message
            if is_final:  # in bytes, only CR and LF end lines; the last needs no end
                self._lines = deque(message.splitlines() or [b""])
        return True

    def _send_close(self, websocket_code: int) -> None:
        """Send a close frame (0: without a code), and ignore what follows."""
        payload = struct.pack("!H", websocket_code) if websocket_code else b""
        self.replies += encode_frame(CLOSE_OPCODE, payload)
        self._phase = ENDED


# ---
# 9. The page

STYLE = """
:root { color-scheme: light dark; --soft: light-dark(#5b6066, #a0a6ad); --rule: light-dark(#d4d7da, #363b42);
  --own: light-dark(#0b5394, #8fc1ff); }
* { box-sizing: border-box; margin: 0; } h1 { font-size: 1em; } p { color: var(--soft); }
body { display: flex; flex-direction: column; height: 100dvh; background: Canvas;
  font: 16px/1.45 ui-monospace, Consolas, monospace; }
/* Reversed: the browser keeps the newest line in sight, or what is being read. */
main { flex: 1; display: flex; flex-direction: column-reverse; overflow-y: auto; }
header, footer, main { padding: .6rem max(1rem, 50vw - 28rem); } footer { border-top: 1px solid var(--rule); }
header { display: flex; justify-content: space-between; border-bottom: 1px solid var(--rule); }
main p { position: relative; overflow: clip; white-space: pre-wrap; overflow-wrap: anywhere; }
main p:has(time) { padding-left: 9ch; text-indent: -2ch; } .divider { padding: .4em 0; text-align: center; }
time { position: absolute; left: .7ch; text-indent: 0; color: var(--soft); font-size: .8em; line-height: 1.8; }
pre { margin-bottom: 1em; font: inherit; font-size: min(1em, 2.2vw); line-height: 1.2; }
.greeting, .welcome, .prompt, .said, .did { color: CanvasText; } .past, .pending, .unconfirmed { color: var(--soft); }
.whisper { color: light-dark(#7a1fa2, #dca6f5); } .whisper, .did { font-style: italic; }
.own { box-shadow: inset 3px 0 var(--own); background: light-dark(#eef4fa, #1c242e); }
.mention { background: light-dark(#fff3c4, #3a3312); } a { color: inherit; }
.name { font-weight: bold; color: light-dark(oklch(.47 .13 var(--hue)), oklch(.8 .11 var(--hue))); }
.rows { display: grid; grid-template-columns: max-content 1fr; column-gap: 3ch; text-indent: 0; }
@media (max-width: 500px) { .rows, .rows * { display: block; } .rows :nth-child(even) { padding-left: 2ch; } }
form { display: flex; gap: .5rem; } input { flex: 1; min-width: 0; padding: .5rem .7rem; font: inherit;
  border: 1px solid var(--soft); border-radius: .4rem; }
::placeholder { color: var(--soft); opacity: 1; } #status:not(:empty) { margin-bottom: .4rem; }
button { font: inherit; padding: .3rem .9rem; border: 0; border-radius: .4rem; color: Canvas; background: var(--own); }
button, summary { cursor: pointer; } details { position: relative; }
ul { position: absolute; right: 0; z-index: 1; max-height: 60vh; overflow-y: auto; padding: .5rem; list-style: none;
  background: Canvas; border: 1px solid var(--rule); border-radius: .4rem; }
li button { width: 100%; text-align: left; background: none; color: inherit; }
#below:not([hidden]) { display: block; margin: 0 auto .6rem; border-radius: 1rem; }
"""  # noqa: E501

# The script begins with: const { templates, ... } = {"templates": ...};
PAGE_CONSTANTS = {
    "templates": TEMPLATES,
    "SPOKEN_TYPES": SPOKEN_TYPES,
    "PROTOCOL_VERSION": PROTOCOL_VERSION,
    "OP_PATTERN": OP_PATTERN,
    "LOST_SECONDS": LOST_SECONDS,
}
SCRIPT = f'"use strict";\nconst {{ {", ".join(PAGE_CONSTANTS)} }} = {json.dumps(PAGE_CONSTANTS)};' + r"""
const KEPT_LINES = 1500, PAINT_BATCH = 50;  // lines painted at a time
const TALK_TYPES = [...SPOKEN_TYPES, "whisper"];
const PASSWORD_LINE = new RegExp(`^[^\\p{L}\\p{N}]*${OP_PATTERN}(?![\\p{L}\\p{N}_])`, "iu");
Object.assign(templates, { greeting: "{banner}{text}", help: "{commands}", divider: "{text}" });
const templateParts = {};  // by type: text, field, text, ...
for (const type in templates) templateParts[type] = templates[type].trim().split(/\{(\w+)\}/);
const LINK =  // parentheses only in pairs, and no punctuation at its end
  /(https?:\/\/(?:[^\s<>"()]|\([^\s<>"()]*\))+(?<![.,;:!?'\]}]))/i;
const query = selector => document.querySelector(selector);
const [scroller, linesBox, pendingBox, belowButton, form, input, statusBox, peopleBox, peopleList] =
  ["main", "#lines", "#pending", "#below", "form", "input", "#status", "details", "ul"].map(query);
let storage = {};  // the name, over a reload
try { storage = sessionStorage; } catch { /* the user does not allow it */ }

// The connection, and our name
// State         what happens                     next
// connecting    a prompt                         awaitingName
//               welcome, for a name that we had  arriving
// awaitingName  welcome                          arriving
// arriving      the answer to our own /who       chatting
// left          the user enters a name           connecting
// all others    the connection is lost           connecting
//               it is closed for good            left
let state, socket, runId, maxLine;  // the last two come from the greeting
let retrySeconds = 1;  // until the next try
let closingCode;  // the last one
let awaySince = 0;  // when the room was lost, unless we left it
let lastId;  // the highest one of an event that was shown
let ownName, mentionPattern;  // the pattern finds our name in a text
let draft = "";  // what was typed before we lost our name
function connect() {
  socket = new WebSocket("chat");
  setState("connecting");
  setStatus("");
  socket.onmessage = ({ data }) => receive(JSON.parse(data));
  socket.onclose = onDisconnect;
}
function onDisconnect({ code }) {
  setPeople([]);
  if (code !== 1000) {  // 1000: /quit, or the server closed it for good
    if (["arriving", "chatting"].includes(state)) awaySince ||= Date.now();
    setState("connecting");
    setStatus(`Disconnected. Reconnecting in ${retrySeconds} s \u2026`);
    setTimeout(connect, retrySeconds * 1000);
    retrySeconds = Math.min(retrySeconds * 2, 30);
  } else {
    setStatus((closingCode ? "Disconnected." : "You left.") + " Enter a name to rejoin.");  // before setState clears it
    setState("left");
    awaySince = 0;
    clearOwnName();
    markUnconfirmed();
  }
}
function setState(next) {
  state = next;
  if (state !== "connecting") { retrySeconds = 1; closingCode = ""; }
}
function receive(event) { (handlers[event.type] || show)(event); }
const handlers = {
  greeting(event) {
    const search = `?${event.protocol}`;
    if (event.protocol !== PROTOCOL_VERSION && location.search !== search) {  // load the new page, once
      socket.close();
      return location.replace(search);
    }
    if (!ownName) show(event);
    if (event.room !== runId) lastId = -1;
    runId = event.room;
    maxLine = event.max_line;
  },
  prompt(event) {
    if (state === "connecting" && ownName) return socket.send(ownName);
    setState("awaitingName");
    show(event);
  },
  error(event) {
    if (state === "connecting") {
      const maybeOurs = Date.now() - awaySince < 1000 * (LOST_SECONDS + 30);  // our old connection may still have it
      if (maybeOurs && event.code === "name_taken") return socket.close();  // and try again
      clearOwnName();
    }
    show(event);
  },
  welcome(event) {
    setState("arriving");
    setOwnName(event.name);
    if (!awaySince) show(event);
    input.value = draft + input.value;
    draft = "";
    socket.send("/who");
  },
  history(event) { catchUp(event.events); },
  joined(event) { people.set(event.name, false); paintPeopleSoon(); show(event); },
  quit: forgetAndShow, kicked: forgetAndShow,
  renamed(event) {
    people.set(event.to, people.get(event.name));
    forgetAndShow(event);
    if (isOwn(event)) setOwnName(event.to);
  },
  people(event) {
    setPeople(event.people);
    if (state === "chatting") return show({ ...event, count: event.people.length, names: event.people });
    catchUp(null);
    markUnconfirmed();
    setState("chatting");
  },
  closing(event) {
    if (event.code !== closingCode) show(event);  // not at every try
    closingCode = event.code;
  },
};
function forgetAndShow(event) { people.delete(event.name); paintPeopleSoon(); show(event); }
function setOwnName(value) {
  ownName = storage.name = value;
  const letter = "[\\p{L}\\p{M}\\p{Nd}_]", literally = ownName.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
  mentionPattern = new RegExp(`(?<!${letter}|[.-])${literally}(?![.-]*${letter})`, "iu");
  input.placeholder = input.ariaLabel = ownName ? "Message, or /help" : "Your name";
  query("form button").textContent = ownName ? "Send" : "Join";
}
function clearOwnName() {
  setOwnName("");
  if (input.value) input.blur();  // or the rest would be sent as a name
  draft += input.value;
  input.value = "";
}
function setStatus(text) { statusBox.textContent = text; }
function catchUp(events) {  // show what is new to us of the history; null: there is none
  let missed = (events || []).filter(event => event.id > lastId);
  if (awaySince) {
    const s = Math.round((Date.now() - awaySince) / 1000), duration = s < 100 ? `${s} s` : `${Math.round(s / 60)} min`;
    const note = events ? "" : " Messages of that time are not shown.";
    show({ type: "divider", text: `You were away for ${duration}.${note}` }, "past");
  } else if (missed.length) {
    const since = dateOf(missed[0]).toLocaleString("sv").slice(0, 16);
    missed = [{ type: "history", since }, ...missed, { type: "history_end" }];
  }
  for (const event of missed) show(event, awaySince ? "" : "past");
  awaySince = 0;
}

// Own lines are pending, as they were typed, until they come back
let pending = [];
const COMMAND = /^\s*\/(?!\/)/;
function confirmPending(event) {  // by a line with its text; the oldest, if the server changed the text
  const i = pending.findIndex(line => line.text.replace(/^\s*\/\//, "/") === event.text);  // //TEXT says /TEXT
  pending.splice(0, Math.max(i, 0) + 1);  // those before it were not said
}
function markUnconfirmed() { for (const line of pending.splice(0)) show(line, "unconfirmed"); }

// The people
let people = new Map();  // name -> whether an operator
const sortedNames = () => [...people.keys()].sort(new Intl.Collator().compare);
function setPeople(all) { people = new Map(all.map(each => [each.name, each.operator])); paintPeopleSoon(); }
function paintPeople() {
  peopleBox.hidden = !people.size;
  query("summary").textContent = `${people.size} here`;
  if (!peopleBox.open || peopleList.matches(":hover, :focus-within")) return;
  peopleList.replaceChildren(...sortedNames().map(name => {
    const onclick = () => { input.value = `/msg ${name} ` + input.value.replace(/^\/msg (\S+ )?/, ""); closeList(); };
    return element("li", {}, element("button", { onclick }, people.get(name) ? "@" : "", element("bdi", {}, name)));
  }));
}
function closeList() { peopleBox.open = false; input.focus(); }

// The lines
let queue = [];  // events to paint
let lastDay = new Date().toDateString();
let newLinesBelow = 0;  // below what is in sight
let unread = 0, mentioned = false;  // talk in a hidden tab; whether some is for us
const isOwn = event => (event.name || event.from) === ownName;
const dateOf = event => new Date(event.at * 1000 || Date.now());
function isMention(event) {
  return ownName && SPOKEN_TYPES.includes(event.type) && !isOwn(event) && mentionPattern.test(event.text);
}
function show(event, variant = "") {  // variant: "past", "pending", "unconfirmed", or "" for what is new
  if (!templateParts[event.type]) return;  // from a newer server
  if (event.id > lastId) lastId = event.id;
  if (event.type === "said" && isOwn(event)) confirmPending(event);
  if (!variant && document.hidden && TALK_TYPES.includes(event.type) && !isOwn(event)) {
    unread += 1;
    mentioned ||= event.type === "whisper" || isMention(event);
  }
  queue.push({ ...event, variant, own: isOwn(event), mention: isMention(event) });  // our name may change
  if (queue.length > KEPT_LINES) queue.shift();
  paintSoon();
}
function throttled(what) {  // run `what` at most once every 40 ms
  let timer = 0;
  return () => { timer ||= setTimeout(() => { timer = 0; what(); }, 40); };
}
const paintSoon = throttled(paint), paintPeopleSoon = throttled(paintPeople);
function paint() {
  const following = isAtEnd();
  for (const event of queue.splice(0, PAINT_BATCH)) {
    const day = event.at ? dateOf(event).toDateString() : lastDay;
    if (day !== lastDay) linesBox.append(paragraph({ type: "divider", text: lastDay = day }));
    linesBox.append(paragraph(event));
    if (!following && !event.variant && !event.own) newLinesBelow += 1;
  }
  while (linesBox.childElementCount > KEPT_LINES) linesBox.firstChild.remove();
  pendingBox.replaceChildren(...pending.slice(0, 20).map(event => paragraph({ ...event, variant: "pending", own: true })));
  if (queue.length) paintSoon();
  updateCounts();
}
function paragraph(event) {
  const { type, variant } = event, ownClass = TALK_TYPES.includes(type) && event.own && "own";
  const className = [type, variant, ownClass, event.mention && "mention"].filter(Boolean).join(" ");
  const parts = templateParts[type].flatMap((part, i) =>
    i % 2 ? fieldRenderers[part]?.(event[part]) ?? element("bdi", {}, ...linkify(String(event[part]))) : part);
  const timed = !["greeting", "prompt", "divider"].includes(type);
  if (timed) parts.unshift(element("time", {}, dateOf(event).toTimeString().slice(0, 5)));
  if (variant === "unconfirmed") parts.push(" (not confirmed)");
  return element("p", { className }, ...parts);
}
const hueOf = name => [...name].reduce((hue, letter) => (hue * 59 + letter.codePointAt() * 61) % 360, 0);
const nameElement = name => element("bdi", { className: "name", style: `--hue: ${hueOf(name)}` }, name);
const fieldRenderers = {  // how to show those that are not just text
  name: nameElement, to: nameElement, from: nameElement, by: nameElement,
  banner: text => element("pre", { ariaHidden: "true" }, text),
  names: all => all.flatMap(({ name, operator, address }, i) =>
    [(i ? ", " : "") + (operator ? "@" : ""), element("bdi", {}, name), address ? ` (${address})` : ""]),
  commands: rows => element("span", { className: "rows" }, ...rows.flat().map(cell => element("span", {}, cell))),
};
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
function linkify(text) {  // a link that does not go where it seems to is followed by its host
  const parts = text.split(LINK);
  parts.push(parts.splice(20).join(""));  // at most ten links
  return parts.flatMap((part, i) => {
    const url = i % 2 && URL.canParse(part) && new URL(part);
    if (!url || url.username || url.password) return part;
    const attributes = { href: url.href, target: "_blank", rel: "noreferrer", dir: "ltr" };
    return [element("a", attributes, part), part.split("/")[2].toLowerCase() === url.host ? "" : ` (${url.host})`];
  });
}
const isAtEnd = () => scroller.scrollTop > -1;  // 0 is the end: it is reversed
function toEnd() { scroller.scrollTop = 0; }
function updateCounts() {
  if (isAtEnd()) newLinesBelow = 0;
  belowButton.hidden = !newLinesBelow;
  belowButton.textContent = `\u2193 ${newLinesBelow} new`;
  document.title = unread ? `(${mentioned ? "@" : ""}${unread}) BATCHAT` : "BATCHAT";
}
scroller.onscroll = updateCounts;
belowButton.onclick = () => { toEnd(); input.focus(); };
document.onvisibilitychange = () => { unread = 0; mentioned = false; updateCounts(); };

// The keyboard
let inputHistory = [""], inputIndex = 0;  // the lines entered, then what is typed now; which one is shown
const canSend = () => ["awaitingName", "chatting"].includes(state);
function sendLine(line) {  // returns whether the input may be cleared
  const bytes = new TextEncoder().encode(line).length;
  if (state === "chatting" && !line.trim()) return true;  // the room says no blank line
  if (bytes > maxLine) {
    setStatus(`Not sent: ${bytes} bytes, and a line has at most ${maxLine}.`);
    return false;
  }
  socket.send(line);
  if (state !== "chatting") return true;
  if (!PASSWORD_LINE.test(line)) {
    inputHistory.splice(-1, 1, line, "");
    if (!COMMAND.test(line)) pending.push({ type: "said", at: Date.now() / 1000, name: ownName, text: line });
  }
  inputIndex = inputHistory.length - 1;
  toEnd();
  paintSoon();
  return true;
}
form.onsubmit = submit => {
  submit.preventDefault();
  if (state !== "left" && !canSend()) return;
  setStatus("");
  if (state === "left") { setOwnName(input.value.trim().slice(0, 100)); connect(); }
  else if (!sendLine(input.value)) return;
  input.value = "";
};
input.onpaste = paste => {  // an input would join the lines into one
  const all = paste.clipboardData.getData("text").split(/\r\n?|\n/);
  if (all.length === 1 || !canSend()) return;
  paste.preventDefault();
  all[0] = input.value.slice(0, input.selectionStart) + all[0];
  const last = all.pop() + input.value.slice(input.selectionEnd);
  setStatus("");
  input.value = [...all.filter(line => !sendLine(line)), last].join(" ");
};
input.onkeydown = press => {
  if (press.shiftKey || press.isComposing) return;
  const step = { ArrowUp: -1, ArrowDown: 1 }[press.key], to = inputIndex + step;
  if (step && to in inputHistory) {
    press.preventDefault();
    inputHistory[inputIndex] = input.value;
    input.value = inputHistory[inputIndex = to];
  }
  if (press.key === "Tab" && complete()) press.preventDefault();
};
function complete() {  // the first name that fits, before the cursor; false if none
  const before = input.value.slice(0, input.selectionStart);
  const start = Math.max(before.lastIndexOf(" "), before.lastIndexOf("@")) + 1, prefix = before.slice(start);
  const wanted = prefix || /^\/msg $|@$/.test(before);
  const fits = name => name !== ownName && name.toLowerCase().startsWith(prefix.toLowerCase());
  const found = wanted && sortedNames().find(fits);
  if (found) input.setRangeText(found + (start ? " " : ": "), start, before.length, "end");
  return Boolean(found);
}
onkeydown = press => { if (press.key === "Escape" && peopleBox.open) closeList(); };
peopleBox.ontoggle = peopleList.onmouseleave = paintPeople;
onpagehide = () => socket.close();  // a browser may keep the page, and its connection
setOwnName(storage.name || "");
connect();
"""  # noqa: E501

PAGE = f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, interactive-widget=resizes-content">
<title>BATCHAT</title><link rel="icon" href="data:,">
<style>{STYLE}</style>
<header><h1>BATCHAT</h1><details hidden><summary></summary><ul></ul></details></header>
<main tabindex="0" aria-label="Chat"><div><div id="lines" role="log"></div><div id="pending"></div></div></main>
<footer><button id="below" hidden></button><p id="status" role="status"></p>
<form><input dir="auto" autocomplete="off" autocapitalize="off" enterkeyhint="send" autofocus><button></button></form>
</footer><script>{SCRIPT}</script>
"""  # noqa: E501

# What the page may do: run its own script and style, by their hashes.
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src 'sha256-{digest('sha256', SCRIPT)}'; "
    f"style-src 'sha256-{digest('sha256', STYLE)}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# ---
# 10. main

TELNET_PORT = 1337
WEB_PORT = 1338
BACKLOG = 4096  # connections
OWN_DESCRIPTORS = 16  # log, signals and so on


def whole_number(largest: int, text: str) -> int:
    """A whole number from 0 to `largest`; raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) > largest:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {largest}")
    return int(text)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with status 2 if they are wrong."""
    default = Settings()
    parser = argparse.ArgumentParser(description="A chat room for telnet and browsers.")
    add = parser.add_argument
    add("--host", metavar="ADDRESS", help="listen on this address (default: all)")
    for flag, largest, value, text in [
        ("--port", 65535, TELNET_PORT, "port for telnet; 0 is any free one"),
        ("--web-port", 65535, None, f"port for browsers (default: {WEB_PORT}, or a free one)"),
        ("--rate", 10**6, default.rate, "lines a second from one person; 0 is no limit"),
        ("--max-people", 10**6, default.max_people, "people in the room; 0 is no limit"),
        ("--max-per-address", 10**6, default.max_per_address, "from one address; 0 is no limit"),
        ("--history", HISTORY_LINES_LIMIT, default.history, "lines that newcomers are shown"),
    ]:
        number = functools.partial(whole_number, largest)
        help_text = text if value is None else f"{text} (default: %(default)s)"
        add(flag, metavar="N", type=number, default=value, help=help_text)
    text = "what clients are shown first (default: %(default)s)"
    add("--greeting", metavar="TEXT", default=default.greeting, help=text)
    add("--password-file", metavar="FILE", help="the operators' password is its first line")
    add("--behind-proxy", action="store_true", help="trust X-Forwarded-For from localhost")
    add("--no-web", action="store_true", help="do not listen for browsers")
    add("-v", "--verbose", action="store_true", help="log connections that never joined, too")
    add("--version", action="version", version=f"BATCHAT {__version__}")
    return parser.parse_args(arguments)


def read_password(path: str) -> str:
    """The first line of a file; exits if there is none."""
    try:
        with open(path, "rb") as file:
            line = file.readline(LINE_BYTES_LIMIT).decode("utf-8-sig")
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                logger.warning("everybody on this machine can read %s", path)
        reason, password = "its first line is empty", clean(line).strip()
    except (OSError, UnicodeDecodeError) as error:
        password, reason = "", getattr(error, "strerror", "it is not UTF-8")
    if not password:
        sys.exit(f"batchat: no password in {path}: {reason}")
    return password


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors as far as possible; returns it."""
    try:
        import resource
    except ImportError:
        return 512  # what select() takes on Windows
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_listener(address: str | None, *ports: int) -> socket.socket:
    """Listen on the first of these ports that is free; exits if none is."""
    dual = not address and socket.has_dualstack_ipv6()
    bind_address = address or ("::" if dual else "0.0.0.0")
    for port in ports:
        try:
            info = socket.getaddrinfo(bind_address, port, type=socket.SOCK_STREAM)
            family, *_, found = info[0]
            return socket.create_server(found, family=family, dualstack_ipv6=dual, backlog=BACKLOG)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "that is no address"
    reason = reason.partition(" (while")[0]  # create_server() appends the address
    sys.exit(f"batchat: can't listen on {address or 'any address'}, port {port}: {reason}")


def announce(address: str | None, ports: list[int]) -> None:
    """Say how to join: on standard output, or else in the log."""
    shown = address or "localhost"
    site = f"[{shown}]" if ":" in shown else shown
    text = f"BATCHAT listens on {address or 'every address'}, port {ports[0]}.\n"
    text += f"Join it: telnet {shown} {ports[0]}"
    for port in ports[1:]:
        text += f", or in a browser: http://{site}:{port}/"
    if not address:
        text += f"\nFrom another machine: {socket.gethostname()} instead of localhost."
    # Not print(), which would try again at exit, and fail.
    if not write_nonblocking(sys.stdout, f"{text}\n"):
        logger.info("%s", text)


def write_nonblocking(stream: TextIO | None, text: str) -> bool:
    """Write without waiting for a reader; returns whether all was written."""
    if stream is None:  # it was closed when we started
        return False
    descriptor, data = stream.fileno(), text.encode("utf-8", "backslashreplace")
    # Non-blocking only for now: the shell may use the same terminal.  Not on Windows.
    blocking = os.name != "nt" and os.get_blocking(descriptor)
    try:
        if blocking:
            os.set_blocking(descriptor, False)
        return os.write(descriptor, data) == len(data)
    except OSError:  # it is full, or has no reader
        return False
    finally:
        if blocking:
            os.set_blocking(descriptor, True)


class NonBlockingHandler(logging.Handler):
    """Writes the log to standard error without ever waiting for its reader.

    Lines that were not written as a whole are counted.
    """

    lost_lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        # The line before may be cut.
        count = self.lost_lines
        lost = f"\n... {count} lines of the log were lost\n" if count else ""
        written = write_nonblocking(sys.stderr, f"{lost}{self.format(record)}\n")
        self.lost_lines = 0 if written else count + 1


def start_logging(level: int) -> None:
    if sys.stderr is None:
        return  # descriptor 2 may be a socket now
    handler = NonBlockingHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)


def stop_on_signals(reactor: Reactor) -> None:
    """Stop the server on Ctrl-C, SIGTERM or SIGHUP; at once on a second Ctrl-C or SIGTERM."""
    receiver, sender = socket.socketpair()

    def on_signal(signum: int, frame: object) -> None:
        sender.send(b"!")  # wakes the event loop
        for number in (signal.SIGINT, signal.SIGTERM):  # SIGHUP may come from shell and kernel
            signal.signal(number, signal.SIG_DFL)

    def on_wakeup() -> None:
        receiver.recv(16)
        logger.info("stopping")
        reactor.stop()

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        # With `&` in a script SIGINT is ignored, and with nohup SIGHUP.
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, on_signal)
    reactor.selector.register(receiver, READ, on_wakeup)


def main(arguments: list[str] | None = None) -> int:
    """Run the server; returns the exit status."""
    options = parse_options(arguments)
    # Arguments that are not UTF-8 have surrogates, which can't be encoded.
    options.greeting = clean(options.greeting.encode("utf-8", "replace").decode())
    start_logging(logging.DEBUG if options.verbose else logging.INFO)
    max_connections = raise_descriptor_limit() - OWN_DESCRIPTORS - SERVER_SPARE_PLACES
    if max_connections < 1:
        sys.exit("batchat: too few descriptors are allowed; see ulimit -n")
    password = read_password(options.password_file) if options.password_file else ""
    # Most options are settings of the same name.
    values = {name: value for name, value in vars(options).items() if name in Settings._fields}
    settings = Settings(**values, password=password, max_connections=max_connections)
    listeners: dict[socket.socket, type[Protocol]] = {}
    listeners[open_listener(options.host, options.port)] = Telnet
    if not options.no_web:
        web_ports = [WEB_PORT, 0] if options.web_port is None else [options.web_port]
        listeners[open_listener(options.host, *web_ports)] = Web
    reactor = Reactor(listeners, settings)
    stop_on_signals(reactor)
    ports = [listener.getsockname()[1] for listener in listeners]
    facts = (__version__, os.getpid(), ports, max_connections, vars(options))
    logger.info("BATCHAT %s, process %d, ports %s, %d connections at most; %s", *facts)
    announce(options.host, ports)
    ok = reactor.run()
    logger.info("stopped")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
