"""What BATCHAT promises, as tests that fail without it.

Rooms, as in batchat.py: the log and its listeners, the wires, the chat, the
reactor over real sockets; then the whole server in a simulated network; and at
last `python batchat.py` itself, with the real telnet and a real browser.
Everything talks to loopback addresses alone.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import gc
import hashlib
import itertools
import json
import logging
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
from collections import Counter, deque
from http import HTTPStatus
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batchat
from batchat import (
    Chat,
    Limits,
    Log,
    Outbox,
    Person,
    Reactor,
    State,
    TelnetWire,
    WebWire,
    WireEvent,
)

BATCHAT = Path(batchat.__file__)
PATIENCE = 20  # seconds that a test waits for what must come, before it gives up
GREETING = TelnetWire.encode(batchat.GREETING)

settings.register_profile("batchat", deadline=None)
settings.load_profile("batchat")


# --------------------------------------------------------------------------
# Log and Outbox
# --------------------------------------------------------------------------


class Listener:
    """An outbox, beside the plain bytes that must come out of it."""

    def __init__(self, log: Log) -> None:
        self.outbox = Outbox(log)
        self.inside = False
        self.owed = bytearray()
        self.got = bytearray()

    def take(self, most: int) -> None:
        """Be sent at most so many bytes."""
        sent = b"".join(self.outbox.pieces())[:most]
        self.got += sent
        self.outbox.advance(len(sent))


LISTENERS = st.integers(0, 3)
TEXTS = st.binary(min_size=1, max_size=6)
STEPS = st.one_of(
    st.tuples(st.just("say"), st.none() | LISTENERS, TEXTS),
    st.tuples(st.just("say"), st.none() | LISTENERS, TEXTS),
    st.tuples(st.just("tell"), LISTENERS, TEXTS),
    st.tuples(st.just("enter"), LISTENERS),
    st.tuples(st.just("leave"), LISTENERS),
    st.tuples(st.just("take"), LISTENERS, st.integers(0, 9)),
    st.tuples(st.just("trim")),
)


def test_a_listener_is_behind_by_what_we_keep_for_them_and_a_little_for_every_splice():
    log = Log(TelnetWire)
    outbox = Outbox(log)
    outbox.enter()
    for data, own in [(b"mine", True), (b"theirs", False), (b"mine again", True)]:
        log.append(data)
        if own:
            outbox.skip_newest()
    assert outbox.behind == len(b"minetheirsmine again") + 2 * batchat.SPLICE_SIZE


@given(st.lists(STEPS, max_size=60))
def test_every_listener_gets_just_what_a_list_of_their_own_would_hold(steps):
    log = Log(TelnetWire)
    listeners = [Listener(log) for _ in range(4)]
    for step, *rest in steps:
        if step == "trim":
            log.trim(min([log.end, *(each.outbox.cursor for each in listeners)]))
        elif step == "say":
            speaker, text = rest
            log.append(text)
            for number, listener in enumerate(listeners):
                if number == speaker:
                    listener.outbox.skip_newest()
                elif listener.inside:
                    listener.owed += text
        else:
            listener = listeners[rest[0]]
            if step == "tell":
                listener.outbox.insert(rest[1])
                listener.owed += rest[1]
            elif step == "take":
                listener.take(rest[1])
            elif (
                step == "enter"
                and not listener.inside
                and listener.outbox.cursor == batchat.FOREVER
            ):
                listener.outbox.enter()
                listener.inside = True
            elif step == "leave" and listener.inside:
                listener.outbox.leave()
                listener.inside = False
        for each in listeners:
            assert each.owed.startswith(each.got)
            assert each.outbox.private_bytes <= len(each.owed) - len(each.got)
    for each in listeners:
        while each.outbox.owes:
            each.take(5)
        assert each.got == each.owed
        assert each.outbox.private_bytes == 0
    log.trim(min([log.end, *(each.outbox.cursor for each in listeners)]))
    assert len(log.data) == 0


def test_one_send_never_takes_more_pieces_than_the_system_does():
    log = Log(TelnetWire)
    listener = Listener(log)
    listener.outbox.enter()
    for _ in range(3000):
        log.append(b"a line")
        listener.outbox.insert(b"a reply")
    assert 1000 <= len(listener.outbox.pieces()) <= 1024
    while listener.outbox.owes:
        listener.take(10**9)
    assert listener.got == b"a linea reply" * 3000


# --------------------------------------------------------------------------
# The wire
# --------------------------------------------------------------------------


def events_of(*reads: bytes) -> tuple[list, bytes]:
    """The events that a wire makes of these reads, and what it answers."""
    wire, events = TelnetWire(), []
    for read in reads:
        if read:
            wire.feed(read)
        events += iter(wire.next, None)
    return events, bytes(wire.replies)


def lines_of(*reads: bytes) -> list:
    return events_of(*reads)[0]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(places, places[1:])]


def telnet_by_the_byte(data: bytes) -> tuple[list, bytes]:
    """The same as `events_of`, written as plainly as RFC 854 reads: one byte at a time."""
    events, replies, line, too_long, after_cr = [], b"", b"", False, False
    data = list(data)

    def take() -> int:
        return data.pop(0)

    with contextlib.suppress(IndexError):
        while True:
            byte = take()
            if byte == 255:
                command = take()
                if command in (251, 252, 253, 254):
                    option = take()
                    if command in (251, 253):
                        replies += bytes([255, 254 if command == 251 else 252, option])
                    continue
                if command == 250:
                    while take() != 255 or take() != 240:
                        pass
                    continue
                if command == 246:
                    replies += b"* BATCHAT is here.\r\n"
                    continue
                if command in (236, 238, 243, 244):
                    byte = 3
                elif command in (247, 248):
                    byte = {247: 8, 248: 21}[command]
                elif command != 255:
                    continue
            if after_cr and byte in (0, 10):
                after_cr = False
                continue
            ends_line, after_cr = byte in (10, 13), byte == 13
            if byte in (3, 4):
                events.append(WireEvent.LEAVE)
                line, too_long = b"", False
            elif ends_line:
                if not too_long:
                    events.append(batchat.clean(line.decode("utf-8", "replace")))
                line, too_long = b"", False
            elif not too_long:
                line += bytes([byte])
                if len(line) > batchat.LINE_LIMIT:
                    events.append(WireEvent.TOO_LONG)
                    line, too_long = b"", True
    return events, replies


TELNET = st.lists(
    st.one_of(
        st.sampled_from([b"\r\n", b"\r\0", b"\r", b"\n", b"\0", b"\x03", b"\x04", b"\b", b"\x7f"]),
        st.sampled_from([b"\xff", b"\xff\xff", b"\xff\xfa", b"\xff\xf0", b"\xfa", b"\xf0"]),
        st.sampled_from([b"\xff\xf4", b"\xff\xf6", b"\xff\xf7", b"\xff\xf8", b"\xff\xf1"]),
        st.sampled_from([b"\xff\xfd\x06", b"\xff\xfb\x1f", b"\xff\xfc\x01", b"\xff\xfe\x03"]),
        st.sampled_from(
            [b"\xff\xfa\x1f\0\x50\xff\xff\xff\xf0", "h\u00e9 \u4f60\u597d \U0001f600".encode()]
        ),
        st.sampled_from([b"hello", b"x" * 4096, b"y" * 4097]),
        st.binary(max_size=4),
    ),
    max_size=12,
).map(b"".join)


@given(TELNET, st.lists(st.integers(0, 10**6), max_size=12))
def test_however_the_bytes_are_cut_up_the_lines_and_answers_are_the_same(data, places):
    assert events_of(*cut(data, places)) == events_of(data) == telnet_by_the_byte(data)


def test_a_line_ends_with_cr_lf_or_cr_nul_or_lf_or_cr():
    assert lines_of(b"a\r\nb\r\0c\nd\re\r\n") == ["a", "b", "c", "d", "e"]
    assert lines_of(b"\r\n\n\r") == ["", "", ""]


def test_a_lone_cr_ends_its_line_at_once_and_an_lf_that_comes_later_belongs_to_it():
    assert lines_of(b"a\r", b"\nb\r", b"c\n") == ["a", "b", "c"]


def test_every_option_is_refused_and_nothing_is_answered_to_a_refusal():
    assert events_of(b"\xff\xfd\x06\xff\xfb\x1f\xff\xfc\x06\xff\xfe\x06ok\r\n") == (
        ["ok"],
        b"\xff\xfc\x06\xff\xfe\x1f",
    )


def test_are_you_there_is_answered():
    assert events_of(b"\xff\xf6") == ([], b"* BATCHAT is here.\r\n")


def test_a_subnegotiation_is_skipped_and_not_stored():
    wire = TelnetWire()
    wire.feed(b"hel\xff\xfa\x18")
    for _ in range(100):
        wire.feed(b"x" * 16384)
    assert sum(len(getattr(wire, each)) for each in ("_command", "_text", "replies")) < 10
    wire.feed(b"\xff\xf0lo\r\n")
    assert wire.next() == "hello"


@pytest.mark.parametrize(
    "key", [b"\xff\xf4", b"\xff\xf3", b"\xff\xee", b"\xff\xec", b"\x03", b"\x04"]
)
def test_interrupt_break_abort_eof_ctrl_c_and_ctrl_d_leave(key):
    assert lines_of(b"half a li" + key) == [WireEvent.LEAVE]


def test_the_end_of_the_stream_leaves_after_all_lines_and_drops_the_unfinished_one():
    wire = TelnetWire()
    wire.feed(b"one\ntwo\nthr")
    wire.feed(b"")
    assert [wire.next(), wire.next(), wire.next()] == ["one", "two", WireEvent.LEAVE]


def test_a_line_of_4096_bytes_is_a_line_and_one_more_is_too_long():
    assert lines_of(b"x" * 4096 + b"\n") == ["x" * 4096]
    assert lines_of(b"x" * 4097 + b"\nnext\n") == [WireEvent.TOO_LONG, "next"]


def test_nothing_of_a_line_that_is_too_long_is_kept():
    wire = TelnetWire()
    for _ in range(100):
        wire.feed(b"x" * 16384)
        while wire.next():
            pass
    assert len(wire._text) - wire._at == 0
    wire.feed(b"the end of it\nnext\n")
    assert wire.next() == "next"


def test_broken_utf8_becomes_the_replacement_character():
    assert lines_of(b"caf\xe9 \xc3\n") == ["caf\ufffd \ufffd"]


ANYTHING = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\b\x7f\x15\x1b\u202e\t")
)
NOT_ON_A_SCREEN = set(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029])) - {"\t"}
NOT_ON_A_SCREEN |= set(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))


@given(ANYTHING)
def test_cleaned_text_has_no_forbidden_character_and_cleaning_it_again_changes_nothing(text):
    cleaned = batchat.clean(text)
    assert not NOT_ON_A_SCREEN & set(cleaned)
    assert batchat.clean(cleaned) == cleaned


@given(ANYTHING)
def test_cleaning_takes_out_nothing_else(text):
    text = re.sub("[\b\x7f\x15]", "", text)
    assert batchat.clean(text) == "".join(each for each in text if each not in NOT_ON_A_SCREEN)


def test_backspace_and_delete_erase_the_character_before_and_ctrl_u_the_line():
    assert batchat.clean("helpp\b\x7flo\b\blo") == "hello"
    assert batchat.clean("\b\bnonsense\x15sense") == "sense"
    assert lines_of(b"hexx\xff\xf7\xff\xf7llo\n", b"oops\xff\xf8good\n") == ["hello", "good"]


# --------------------------------------------------------------------------
# The browser's wire
# --------------------------------------------------------------------------

HANDSHAKE = {
    "Host": "chat.example:1338",
    "Upgrade": "websocket",
    "Connection": "keep-alive, Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Origin": "http://chat.example:1338",
}


def request(line: str, headers: dict[str, str | None], **changes: str | None) -> bytes:
    """A request's head; a change of None leaves that header out."""
    headers = {**headers, **{name.replace("_", "-"): value for name, value in changes.items()}}
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode()


OPENING = request("GET /chat HTTP/1.1", HANDSHAKE)


def masked(
    opcode: int, payload: bytes, final: bool = True, key: bytes = b"\x37\xfa\x21\x3d"
) -> bytes:
    """A frame as a client sends it."""
    whole = batchat.frame(opcode, payload)
    size = len(whole) - len(payload)
    head = bytes([whole[0] & (0xFF if final else 0x7F), whole[1] | 0x80]) + whole[2:size]
    return head + key + bytes(byte ^ key[at % 4] for at, byte in enumerate(payload))


def frames_of(data: bytes) -> list[tuple[int, bytes]]:
    """The whole frames that a server sent, as opcodes and payloads."""
    frames = []
    while len(data) >= 2:
        size, head = data[1], 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[2:head], "big")
        if len(data) < head + size:
            break
        frames.append((data[0], data[head : head + size]))
        data = data[head + size :]
    assert not data
    return frames


def undated(response: bytes) -> bytes:
    return re.sub(rb"Date: .*\r\n", b"", response)


def web_events_of(*reads: bytes) -> tuple[list, bytes]:
    """As the telnet wire's: the events up to the end, and the answers."""
    wire, events = WebWire(), []
    for read in reads:
        if read:
            wire.feed(read)
        while (event := wire.next()) is not None:
            events.append(event)
            if event is WireEvent.LEAVE:
                break
    while events[-2:] == [WireEvent.LEAVE] * 2:
        events.pop()
    return events, undated(bytes(wire.replies))


def asked(head: bytes) -> tuple[int, dict[str, str], bytes]:
    """What a request gets: the status, the headers, the body."""
    _, reply = web_events_of(head)
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def said(*frames: bytes) -> tuple[list, list]:
    """What comes of frames in an open WebSocket: events, and frames in answer."""
    events, replies = web_events_of(OPENING + b"".join(frames))
    assert events[0] is WireEvent.OPENED
    return events[1:], frames_of(replies.partition(b"\r\n\r\n")[2])


FRAMES = st.lists(
    st.one_of(
        st.builds(
            masked,
            st.sampled_from([0, 1, 1, 1, 9, 10]),
            st.sampled_from([b"", b"hi", b"a\nb\r\nc\n", "\u00e9\U0001f600".encode()]),
            st.booleans(),
        ),
        st.builds(
            masked,
            st.integers(0, 15),
            st.binary(max_size=130),
            st.booleans(),
            st.binary(min_size=4, max_size=4),
        ),
        st.sampled_from(
            [masked(1, b"x" * 4096), masked(1, b"x" * 4097), masked(8, b"\x03\xe8bye")]
        ),
        st.binary(max_size=4),
    ),
    max_size=8,
).map(b"".join)
REQUESTS = st.one_of(
    st.just(OPENING),
    st.sampled_from(
        [
            b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\r\n" + OPENING,
            OPENING.replace(b"\r\n", b"\n"),
        ]
    ),
    st.binary(max_size=20),
    st.builds(
        lambda a, b: OPENING[: a % len(OPENING)] + b + OPENING[a % len(OPENING) :],
        st.integers(0, 999),
        st.binary(max_size=3),
    ),
)


@given(REQUESTS, FRAMES, st.lists(st.integers(0, 10**6), max_size=12))
def test_however_a_browsers_bytes_are_cut_up_the_events_and_answers_are_the_same(
    head, frames, places
):
    data = head + frames
    assert web_events_of(*cut(data, places)) == web_events_of(data)


@given(st.one_of(FRAMES, st.binary(max_size=200)))
def test_whatever_arrives_a_websocket_waits_or_is_closed_with_a_code_that_says_why(frames):
    events, replies = said(frames)
    codes = [payload for first, payload in replies if first == 0x88]
    assert len(codes) == (1 if WireEvent.LEAVE in events else 0)
    if codes and codes[0]:
        code = int.from_bytes(codes[0], "big")
        assert code in (1002, 1003, 1007, 1009) or 1000 <= code < 5000
    assert all(first in (0x88, 0x8A) for first, _ in replies)


@given(st.binary(max_size=300))
def test_whatever_is_asked_gets_an_answer_or_is_waited_for(data):
    events, reply = web_events_of(data)
    assert events in ([], [WireEvent.LEAVE])
    assert not events or reply.startswith(b"HTTP/1.1 ")


def test_the_handshake_of_the_rfc_is_answered_as_it_says():
    status, headers, _ = asked(OPENING)
    assert status == 101
    assert headers["Sec-WebSocket-Accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (headers["Upgrade"], headers["Connection"]) == ("websocket", "Upgrade")


@pytest.mark.parametrize(
    ("status", "line", "changes"),
    [
        (101, "GET /chat HTTP/1.1", {"Origin": None}),
        (101, "GET /chat HTTP/1.1", {"Upgrade": "h2c, WebSocket", "Connection": "upgrade"}),
        (
            101,
            "GET /chat HTTP/1.1",
            {"Sec_WebSocket_Version": "13 ", "Origin": " http://chat.example:1338 "},
        ),
        (400, "GET /chat HTTP/1.0", {}),
        (426, "GET /chat HTTP/1.1", {"Upgrade": None}),
        (426, "GET /chat HTTP/1.1", {"Connection": "keep-alive"}),
        (426, "GET /chat HTTP/1.1", {"Sec_WebSocket_Version": "8"}),
        (426, "GET /chat HTTP/1.1", {"Sec_WebSocket_Version": None}),
        (400, "GET /chat HTTP/1.1", {"Sec_WebSocket_Key": None}),
        (400, "GET /chat HTTP/1.1", {"Sec_WebSocket_Key": "c2hvcnQ="}),
        (400, "GET /chat HTTP/1.1", {"Sec_WebSocket_Key": "no base64!"}),
        (403, "GET /chat HTTP/1.1", {"Origin": "http://evil.example"}),
        (403, "GET /chat HTTP/1.1", {"Origin": "http://chat.example"}),
        (403, "GET /chat HTTP/1.1", {"Origin": "null"}),
        (403, "GET /chat HTTP/1.1", {"Origin": ""}),
        (405, "POST /chat HTTP/1.1", {}),
        (400, "GET /chat HTTP/1.1", {"Host": None}),
        (400, "GET / HTTP/1.1", {"Host": None}),
        (200, "GET / HTTP/1.0", {"Host": None}),
        (200, "GET /?from=here HTTP/1.1", {}),
        (200, "GET http://chat.example:1338/hello HTTP/1.1", {}),
        (404, "GET /nothing HTTP/1.1", {}),
        (405, "DELETE /hello HTTP/1.1", {}),
        (400, "GET / HTTP/2.0", {}),
        (400, "GET /  HTTP/1.1", {}),
        (400, "nonsense", {}),
        (400, "GET / HTTP/1.1", {"Bad header name": "x"}),
        (400, "GET http://[/ HTTP/1.1", {}),
        (431, "GET / HTTP/1.1", {"Cookie": "x" * 8192}),
        (431, "GET / HTTP/1.1", {f"X-{n}": "x" for n in range(200)}),
    ],
)
def test_every_request_gets_the_status_that_the_rfcs_give_it(status, line, changes):
    got, headers, _ = asked(request(line, HANDSHAKE, **changes))
    assert got == status
    if status == 405:
        assert headers["Allow"] == "GET, HEAD"
    if status == 426:
        assert headers.get("Upgrade") == "websocket" or headers["Sec-WebSocket-Version"] == "13"


def test_two_hosts_are_refused():
    assert asked(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")[0] == 400


def test_a_head_over_8_kib_is_refused_before_it_ends():
    assert asked(b"GET / HTTP/1.1\r\nCookie: " + b"x" * 8192)[0] == 431


def test_hello_world_is_a_web_page():
    status, headers, body = asked(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, body) == (200, b"Hello, World!")
    assert headers["Content-Length"] == "13"
    assert headers["Connection"] == "close"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-cache"


def test_head_gets_the_same_headers_and_no_body():
    got, wanted = (
        asked(f"{verb} / HTTP/1.1\r\nHost: x\r\n\r\n".encode()) for verb in ("HEAD", "GET")
    )
    assert got == (*wanted[:2], b"")
    assert len(wanted[2]) == int(wanted[1]["Content-Length"]) > 1000


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


def test_the_frames_of_the_rfc_are_read_and_written_as_it_says():
    # Section 5.7: a masked "Hello"; the same in two fragments, masked; a masked pong.
    assert said(bytes.fromhex("818537fa213d7f9f4d5158")) == (["Hello"], [])
    assert said(masked(1, b"Hel", final=False), masked(0, b"lo")) == (["Hello"], [])
    assert said(bytes.fromhex("8a8537fa213d7f9f4d5158")) == ([], [])
    # An unmasked "Hello", as a server sends it; 256 bytes, and 64 KiB.
    assert batchat.frame(1, b"Hello") == bytes.fromhex("810548656c6c6f")
    assert batchat.frame(2, b"x" * 256)[:4] == bytes.fromhex("827e0100")
    assert batchat.frame(2, b"x" * 65536)[:10] == bytes.fromhex("827f0000000000010000")
    assert batchat.frame(1, b"x" * 125)[:2] == bytes.fromhex("817d")


def test_a_ping_is_answered_with_its_pong_also_between_fragments():
    assert said(masked(1, b"Hel", final=False), masked(9, b"?"), masked(0, b"lo")) == (
        ["Hello"],
        [(0x8A, b"?")],
    )


def test_a_line_break_inside_a_message_makes_several_lines():
    assert said(masked(1, b"a\nb\r\nc\rd\n")) == (["a", "b", "c", "d"], [])


@pytest.mark.parametrize(
    ("code", "frame"),
    [
        (1002, bytes.fromhex("810548656c6c6f")),  # not masked
        (1002, b"\xc1" + masked(1, b"x")[1:]),  # a reserved bit
        (1002, masked(3, b"x")),  # no such opcode
        (1002, masked(11, b"x")),
        (1002, masked(0, b"x")),  # goes on with nothing
        (1002, masked(1, b"x", final=False) + masked(1, b"y")),  # a message in a message
        (1002, masked(9, b"x", final=False)),  # a control frame in fragments
        (1002, masked(9, b"x" * 126)),  # or too long
        (1002, b"\x81\xfe\x00\x05" + masked(1, b"Hello")[2:]),  # a length in too many bytes
        (1002, b"\x81\xff\xff" + bytes(7)),  # or below zero
        (1002, masked(8, b"x")),  # half a close code
        (1002, masked(8, b"\x03\xed")),  # 1005, which is never sent
        (1003, masked(2, b"x")),
        (1007, masked(1, b"\xff")),
        (1007, masked(8, b"\x03\xe8\xff")),
        (1009, masked(1, b"x" * 4097)),
        (1009, masked(1, b"x" * 70_000)[:14]),  # before any of it has come
        (1009, masked(1, b"x" * 4000, final=False) + masked(0, b"x" * 97)),
    ],
)
def test_whoever_breaks_the_rules_is_told_which(code, frame):
    assert said(frame, masked(1, b"never read")) == (
        [WireEvent.LEAVE],
        [(0x88, code.to_bytes(2, "big"))],
    )


@pytest.mark.parametrize("payload", [b"", b"\x03\xe8", b"\x03\xe9going", b"\x0f\xa0"])
def test_a_close_is_answered_with_its_own_code(payload):
    assert said(masked(8, payload)) == ([WireEvent.LEAVE], [(0x88, payload[:2])])


def test_a_message_of_4096_bytes_is_a_line():
    assert said(masked(1, b"x" * 4096)) == (["x" * 4096], [])


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_unmasking_is_a_xor_of_every_byte(payload, key):
    assert batchat.unmask(payload, key) == bytes(b ^ key[at % 4] for at, b in enumerate(payload))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_said_in_frames_is_one_text_frame_a_line(text):
    frames = frames_of(WebWire.encode(text))
    lines = text.split("\n")
    assert [payload.decode() for _, payload in frames] == (lines if lines[-1] else lines[:-1])
    assert {first for first, _ in frames} <= {0x81}


# --------------------------------------------------------------------------
# The chat
# --------------------------------------------------------------------------


class Guest(Person):
    """Somebody in a chat without sockets, whose screen is read line by line."""

    def __init__(self, chat: Chat, wire: type[batchat.Wire] = TelnetWire) -> None:
        super().__init__("nowhere", Outbox(chat.logs[wire]))
        self.chat = chat
        self.shown = b""
        chat.handle(self, WireEvent.OPENED)

    def types(self, *lines: str) -> None:
        for line in lines:
            self.chat.handle(self, line)

    def reads(self) -> str:
        """What was shown since the last look."""
        shown = b"".join(self.outbox.pieces())
        self.outbox.advance(len(shown))
        self.shown += shown
        return shown.decode("utf-8", "replace").replace("\r\n", "\n")

    def looks(self) -> list[str]:
        """All lines that were ever shown, on whichever wire."""
        self.reads()
        if self.outbox.log.wire is WebWire:
            return [payload.decode() for _, payload in frames_of(self.shown)]
        lines = self.shown.decode().split("\r\n")
        # The name that is typed after the prompt ends its line on a screen, not on the wire.
        at = next(at for at, line in enumerate(lines) if line.startswith(batchat.PROMPT))
        lines[at : at + 1] = [batchat.PROMPT, lines[at][len(batchat.PROMPT) :]]
        return lines[:-1]


class Room:
    def __init__(self) -> None:
        self.chat = Chat()
        self.guests: list[Guest] = []

    def caller(self) -> Guest:
        guest = Guest(self.chat)
        assert guest.reads().endswith(batchat.PROMPT)
        return guest

    def join(self, name: str) -> Guest:
        guest = self.caller()
        guest.types(name)
        assert guest.state is State.CHATTING
        self.guests.append(guest)
        for each in self.guests:
            each.reads()
        return guest


@pytest.fixture
def room() -> Room:
    return Room()


def test_what_is_said_reaches_everyone_else_and_never_its_speaker(room):
    mike, jonny, ann = map(room.join, ["mike", "jonny", "ann"])
    jonny.types("hi mike!")
    assert mike.reads() == ann.reads() == "<jonny> hi mike!\n"
    assert jonny.reads() == ""


def test_nobody_hears_anything_before_they_have_a_name(room):
    mike, caller = room.join("mike"), room.caller()
    mike.types("psst")
    assert caller.reads() == ""
    caller.types("ann")
    assert caller.reads() == "Hey, ann! Hope you enjoy the chat.\n\n"


def test_newcomers_and_leavers_are_announced_to_the_others(room):
    mike, jonny = room.join("mike"), room.caller()
    jonny.types("jonny")
    assert mike.reads() == "* jonny has joined the chat\n"
    jonny.types("/quit")
    assert mike.reads() == "* jonny has quit the chat\n"
    assert jonny.state is State.CLOSING
    assert jonny.reads() == "Hey, jonny! Hope you enjoy the chat.\n\n"


def test_empty_lines_are_ignored(room):
    mike, jonny = room.join("mike"), room.join("jonny")
    mike.reads()
    jonny.types("", "   ", "\t")
    assert mike.reads() == jonny.reads() == ""


def test_two_slashes_say_a_line_that_starts_with_one(room):
    mike, jonny = room.join("mike"), room.join("jonny")
    jonny.types("//quit is a command", "/ /")
    assert mike.reads() == "<jonny> /quit is a command\n"


def test_an_unknown_command_is_explained_to_its_sender_alone(room):
    mike, jonny = room.join("mike"), room.join("jonny")
    jonny.types("/frobnicate now")
    assert mike.reads() == ""
    assert jonny.reads() == "* There is no command /frobnicate; /help shows those there are.\n"


def test_help_names_every_command(room):
    mike = room.join("mike")
    mike.types("/help")
    shown = mike.reads()
    for command in ["/quit", "/help", "/who", "/me", "/msg", "/nick", "/ignore", "//"]:
        assert f"* {command}" in shown


def test_who_is_here_is_sorted(room):
    for name in ["mike", "Bob", "ann"]:
        guest = room.join(name)
    guest.types("/WHO")
    assert guest.reads() == "* 3 here: ann, Bob, mike\n"


def test_an_action_is_read_by_the_others(room):
    mike, ann = room.join("mike"), room.join("ann")
    mike.types("/me waves")
    assert (ann.reads(), mike.reads()) == ("** mike waves\n", "")


def test_a_private_line_is_read_by_one_person_alone(room):
    mike, ann, bob = map(room.join, ["mike", "ann", "bob"])
    mike.types("/msg ANN  over  here")
    assert ann.reads() == "[mike -> you] over  here\n"
    assert mike.reads() == "[you -> ann] over  here\n"
    assert bob.reads() == ""


def test_a_new_name_is_announced_to_all_and_frees_the_old_one(room):
    mike, ann = room.join("mike"), room.join("ann")
    mike.types("/nick mick")
    assert mike.reads() == ann.reads() == "* mike is now known as mick\n"
    ann.types("/nick mike", "/nick MIKE")
    assert mike.reads() == "* ann is now known as mike\n* mike is now known as MIKE\n"
    ann.types("/nick mick")
    assert ann.reads().endswith("* The name mick is taken.\n")
    assert mike.reads() == ""


def test_a_text_longer_than_any_spelling_of_a_name_is_not_even_normalized(room):
    marks = "a" + "\u0344\u0316" * 1000  # their order takes time by the square of their number
    assert batchat.name_key(marks) is marks
    mike = room.join("mike")
    mike.types("/nick " + marks, "/ignore " + marks)
    assert mike.reads() == (
        f"* A name has at most 24 characters.\n* Nobody here is called {marks}.\n"
    )
    longest = unicodedata.normalize("NFD", "\u1f82" * batchat.NAME_LIMIT)
    assert len(longest) == batchat.SPELLING_LIMIT
    mike.types("/nick " + longest)
    assert mike.reads().startswith("* mike is now known as \u1f82")


def test_who_is_ignored_is_not_heard_and_not_told_and_stays_so_through_a_new_name(room):
    mike, troll, ann = map(room.join, ["mike", "troll", "ann"])
    mike.types("/ignore troll")
    assert mike.reads() == "* You no longer hear troll.\n"
    troll.types("/nick gnome")
    for each in room.guests:
        assert each.reads() == "* troll is now known as gnome\n"
    troll.types("hey", "/me dances", "/msg mike psst")
    ann.types("hello")
    assert mike.reads() == "<ann> hello\n"
    assert troll.reads() == "[you -> mike] psst\n<ann> hello\n"
    assert ann.reads() == "<gnome> hey\n** gnome dances\n"
    mike.types("/ignore gnome")
    troll.types("hey")
    assert mike.reads() == "* You hear gnome again.\n<gnome> hey\n"


def test_ignoring_ends_when_either_leaves(room):
    mike, troll = room.join("mike"), room.join("troll")
    mike.types("/ignore troll")
    troll.types("/quit")
    mike.reads()
    troll = room.join("troll")
    troll.types("sorry")
    assert mike.reads() == "<troll> sorry\n"
    mike.types("/ignore troll", "/quit")
    assert not any(room.chat._ignorers.values())


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/me", "It goes like this: /me ACTION"),
        ("/msg", "It goes like this: /msg NAME TEXT"),
        ("/msg mike", "It goes like this: /msg NAME TEXT"),
        ("/nick", "It goes like this: /nick NAME"),
        ("/ignore", "It goes like this: /ignore NAME"),
        ("/msg nobody hi", "Nobody here is called nobody."),
        ("/ignore nobody", "Nobody here is called nobody."),
        ("/ignore mike", "You can't ignore yourself."),
        ("/nick mike", "You are mike already."),
        ("/nick you", "The name you is taken."),
        ("/nick BatChat", "The name BatChat is taken."),
        ("/nick two words", "A name is made of letters, digits, '_', '-' and '.' alone."),
        (WireEvent.TOO_LONG, "A line has at most 4096 bytes; yours was not sent."),
    ],
)
def test_what_can_not_be_done_is_explained_to_its_sender_alone(room, line, answer):
    mike, ann = room.join("mike"), room.join("ann")
    mike.types(line)
    assert (mike.reads(), ann.reads()) == (f"* {answer}\n", "")
    assert mike.state is State.CHATTING


@pytest.mark.parametrize(
    "name",
    [
        "mike",
        "J-Stop_farm.2",
        "x" * 24,
        "\u00c9lo\u00efse",
        "\u674e\u96f7",
        "\u0939\u093f\u0902\u0926\u0940",
    ],
)
def test_a_good_name_is_taken_as_it_is(room, name):
    assert room.join(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "x" * 25,
        "two words",
        "<mike>",
        "* mike",
        "mike\u200b",
        "mi\ufe0fke",
        "\u3164",
        "\u0301mike",
        "mike!",
    ]
    + ["\u202emike", "\U0001f600", "a,b", "/help"],
)
def test_a_bad_name_is_refused_with_the_reason_and_the_prompt_again(room, name):
    caller = room.caller()
    caller.types(batchat.clean(name))
    if batchat.clean(name) == "mike":
        assert caller.state is State.CHATTING
        return
    reason, prompt = caller.reads().split("\n")
    assert reason.startswith("* A name ")
    assert prompt == batchat.PROMPT
    caller.types("mike")
    assert caller.state is State.CHATTING


def test_a_taken_name_is_refused_in_whatever_spelling(room):
    room.join("Bob")
    caller = room.caller()
    for name in ["bob", "BOB", "\uff42\uff4f\uff42"]:
        caller.types(name)
        assert caller.reads() == f"* The name {name} is taken.\n{batchat.PROMPT}"


def test_five_bad_names_are_the_end(room):
    caller = room.caller()
    for _ in range(4):
        caller.types("no name")
        assert caller.reads().endswith(batchat.PROMPT)
    caller.types("no name")
    assert caller.reads().endswith("* That was the last try, goodbye!\n")
    assert caller.state is State.CLOSING


@pytest.mark.parametrize(
    "line", ["GET / HTTP/1.1", "POST /chat HTTP/1.0", "x y HTTP/2", WireEvent.TOO_LONG]
)
def test_an_http_request_ends_the_connection_and_nothing_of_it_is_a_name(room, line):
    ann, browser = room.join("ann"), room.caller()
    browser.types(line, "Host: localhost", "", "evil", "hello everyone")
    assert browser.state is State.CLOSING
    assert browser.reads() == ann.reads() == ""


def test_a_name_is_given_back_when_its_bearer_leaves(room):
    room.join("mike").types("/quit")
    room.join("mike")


LETTERS = st.characters(categories=["L", "M", "Nd"]) | st.sampled_from("_-.")


@given(st.text(LETTERS, min_size=1, max_size=12))
def test_two_spellings_of_one_name_are_one_name(name):
    key = batchat.name_key(name)
    for form in ["NFC", "NFD", "NFKC", "NFKD"]:
        assert batchat.name_key(unicodedata.normalize(form, name)) == key
    assert batchat.name_key(key) == key


@given(ANYTHING.map(batchat.clean))
def test_nothing_that_one_person_types_looks_like_a_notice_or_a_second_line(text):
    room = Room()
    mike, ann = room.join("mike"), room.join("ann")
    mike.types(text)
    shown = ann.reads()
    assert shown.count("\n") == (1 if shown else 0)
    assert shown == "" or shown.startswith(("<mike> ", "** mike ", "* mike ", "[mike -> you] "))
    assert not shown.startswith("* mike ") or text.strip().lower().startswith(("/quit", "/nick"))


def test_a_private_line_to_somebody_who_reads_nothing_is_refused_not_kept_for_ever(room):
    mike, ann = room.join("mike"), room.join("ann")
    for _ in range(100):
        mike.types("/msg ann " + "x" * 4000)
    assert ann.outbox.private_bytes < batchat.PRIVATE_LIMIT + 5000
    assert mike.reads().endswith("* ann has too much to read; your line was not sent.\n")


# --------------------------------------------------------------------------
# The reactor, over real sockets
# --------------------------------------------------------------------------


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class House:
    """A reactor over real sockets, which turns only while a test waits for something."""

    def __init__(self, kind: type[selectors.BaseSelector], door=None, **limits: int) -> None:
        class Polling(kind):
            def select(self, timeout=None):
                self.ready = super().select(0)
                return self.ready

        self.clock = Clock()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.door = door(listener) if door else listener
        web = socket.create_server(("127.0.0.1", 0))
        self.web_address = web.getsockname()
        self.reactor = Reactor(
            {self.door: TelnetWire, web: WebWire},
            Limits(**{"rate": 10, "max_people": 1000, "max_per_address": 100, **limits}),
            Polling(),
            self.clock,
        )
        self.chat = self.reactor.chat
        self.callers: list[Caller] = []

    def turn(self) -> None:
        self.reactor.turn()
        for caller in self.callers:
            caller.receive()

    def until(self, condition) -> None:
        """Turn the wheel until it is so."""
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < give_up, "waited in vain"
            self.turn()

    def settle(self) -> None:
        """Turn the wheel until nothing more happens."""
        quiet = 0
        while quiet < 5:
            self.turn()
            busy = self.reactor.selector.ready or self.reactor._patience() == 0
            quiet = 0 if busy else quiet + 1

    def wait(self, seconds: float) -> None:
        self.clock.time += seconds
        self.settle()

    def call(self, buffer: int = 0) -> Caller:
        caller = Caller(self, buffer)
        self.callers.append(caller)
        return caller

    def join(self, name: str, buffer: int = 0, wide: bool = False) -> Caller:
        """Somebody who has joined; with small buffers on their way, on our side unless `wide`."""
        caller = self.call(buffer)
        caller.types(name)
        caller.reads(GREETING.decode() + f"Hey, {name}! Hope you enjoy the chat.\n\n")
        if buffer and not wide:
            sock = self.connection(name).sock
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        for other in self.callers:
            other.unread.clear()
        return caller

    def browse(self, name: str) -> Browser:
        browser = Browser(self)
        browser.types(name)
        browser.reads(batchat.GREETING + f"\nHey, {name}! Hope you enjoy the chat.\n\n")
        for other in self.callers:
            other.unread.clear()
        return browser

    def ask(self, head: bytes) -> Browser:
        return Browser(self, head)

    def connection(self, name: str) -> batchat.Connection:
        return self.chat.people[batchat.name_key(name)]

    def close(self) -> None:
        for caller in self.callers:
            caller.sock.close()
        for connection in list(self.reactor.connections):
            self.reactor._forget(connection)
        for door in self.reactor.doors:
            door.close()
        self.reactor.selector.close()


class Caller:
    """Somebody at the other end of a real socket."""

    def __init__(self, house: House, buffer: int, address: tuple | None = None) -> None:
        self.house = house
        self.sock = socket.socket()
        if buffer:  # bytes that the system keeps for a listener who does not read
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.connect(address or house.address)
        self.sock.setblocking(False)
        self.unread = bytearray()
        self.reading = True
        self.gone = ""  # how the line ended: "closed" or "reset"

    def receive(self, most: int = 1 << 20) -> None:
        if not self.reading or self.gone or self.sock.fileno() < 0:
            return
        try:
            data = self.sock.recv(most)
            self.unread += data
            self.gone = "" if data else "closed"
        except BlockingIOError:
            pass  # nothing there yet
        except ConnectionResetError:
            self.gone = "reset"

    def types(self, *lines: str) -> None:
        self.sends("".join(f"{line}\r\n" for line in lines).encode())

    def sends(self, data: bytes) -> None:
        give_up = time.monotonic() + PATIENCE
        while data:
            assert time.monotonic() < give_up, "nobody takes what is sent"
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                self.house.turn()

    def reads(self, text: str) -> None:
        """Wait for this text, and see that nothing else comes before it."""
        expected = text.replace("\r\n", "\n").replace("\n", "\r\n").encode()
        self.house.until(lambda: len(self.unread) >= len(expected) or self.gone)
        assert bytes(self.unread[: len(expected)]) == expected
        del self.unread[: len(expected)]

    def reads_nothing(self) -> None:
        self.house.settle()
        assert self.unread == b""

    def sees_the_end(self, how: str = "closed") -> None:
        self.house.until(lambda: self.gone)
        assert (self.gone, bytes(self.unread)) == (how, b"")

    def hangs_up(self) -> None:
        self.sock.close()

    def says_no_more(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def resets(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


class Browser(Caller):
    """A WebSocket client, of which `unread` is the text of the frames, a line each."""

    def __init__(self, house: House, opening: bytes = b"") -> None:
        super().__init__(house, 0, house.web_address)
        self.raw = b""
        self.pings = 0
        self.closed_with = 0
        house.callers.append(self)
        self.sends(opening or OPENING)
        if not opening:
            house.until(lambda: b"\r\n\r\n" in self.raw)
            self.raw = self.raw.partition(b"\r\n\r\n")[2]
            self.open = True
            self.sort()

    open = False

    def receive(self, most: int = 1 << 20) -> None:
        before = len(self.unread)
        super().receive(most)
        self.raw += self.unread[before:]
        del self.unread[before:]
        if self.open:
            self.sort()

    def sort(self) -> None:
        for first, payload in frames_of(self.raw):
            if first == 0x81:
                self.unread += payload + b"\r\n"
            elif first == 0x89:
                self.pings += 1
            else:
                self.closed_with = int.from_bytes(payload, "big")
        self.raw = b""

    def types(self, *lines: str) -> None:
        self.sends(b"".join(masked(1, line.encode()) for line in lines))


@pytest.fixture(params=["epoll, sendmsg", "select, send"])
def houses(request, monkeypatch):
    """Makes houses; once with the best that the system has, once with the least."""
    kind = selectors.DefaultSelector
    if request.param == "select, send":
        monkeypatch.setattr(batchat, "HAS_SENDMSG", False)
        kind = selectors.SelectSelector
    with contextlib.ExitStack() as stack:

        def make(**options) -> House:
            house = House(kind, **options)
            stack.callback(house.close)
            return house

        yield make


@pytest.fixture
def house(houses) -> House:
    return houses()


def assert_nothing_is_left(house: House) -> None:
    """A house that is empty keeps nothing of those who were there."""
    reactor = house.reactor
    house.until(lambda: not reactor.connections)
    assert len(reactor.selector.get_map()) == 2  # the doors
    assert_nothing_is_kept(reactor)


def assert_nothing_is_kept(reactor: Reactor) -> None:
    assert not reactor.connections
    assert not reactor.chat.people
    assert not reactor.chat.told
    assert not reactor.backlogged
    assert not reactor.talkers
    assert not any(reactor.countdowns)
    assert not reactor.callers
    assert not any(log.listeners for log in reactor.chat.logs.values())


def test_people_talk_and_leave(house):
    mike, jonny = house.join("mike"), house.join("jonny")
    jonny.types("hi mike!")
    mike.reads("<jonny> hi mike!\n")
    jonny.reads_nothing()
    jonny.types("/quit")
    jonny.sees_the_end()
    mike.reads("* jonny has quit the chat\n")
    jonny.hangs_up()
    mike.hangs_up()
    assert_nothing_is_left(house)


def test_what_is_typed_while_others_talk_stands_in_its_right_place(house):
    mike, ann = house.join("mike"), house.join("ann")
    ann.types("one")
    house.settle()
    mike.types("own", "/me too", "/nick mick")
    house.settle()
    ann.types("two")
    mike.reads("<ann> one\n* mike is now known as mick\n<ann> two\n")
    ann.reads("<mike> own\n** mike too\n* mike is now known as mick\n")


def test_whoever_closes_after_sending_loses_no_line_and_the_others_hear_it(house):
    mike, jonny = house.join("mike"), house.call()
    jonny.types("jonny", "one", "two")
    jonny.says_no_more()
    jonny.reads(GREETING.decode() + "Hey, jonny! Hope you enjoy the chat.\n\n")
    jonny.sees_the_end()
    mike.reads("* jonny has joined the chat\n<jonny> one\n<jonny> two\n* jonny has quit the chat\n")


def test_lines_that_were_sent_before_a_reset_are_not_lost(house):
    mike, jonny = house.join("mike"), house.join("jonny", buffer=4096)
    jonny.reading = False
    jonny.sends(b"".join(b"line %d\n" % n for n in range(5000)))
    mike.types("you will never read this")
    jonny.hangs_up()  # with a line unread, which makes it a reset
    house.settle()
    mike.types("nor this")  # which fails to be sent
    expected = "".join(f"<jonny> line {n}\n" for n in range(5000)) + "* jonny has quit the chat\n"
    for _ in range(501):
        house.wait(1)
    mike.reads(expected)


@pytest.mark.parametrize("stage", ["at once", "half a name", "chatting", "half a line", "closing"])
def test_a_reset_at_any_stage_costs_nobody_else_anything(house, stage):
    mike = house.join("mike")
    vandal = house.call()
    if stage == "half a name":
        vandal.sends(b"van")
        house.settle()
    elif stage != "at once":
        vandal.types("vandal")
        mike.reads("* vandal has joined the chat\n")
        vandal.sends(
            b"/quit\n" if stage == "closing" else b"foo" if stage == "half a line" else b""
        )
        house.settle()
    vandal.resets()
    mike.types("still here")
    if stage in ("chatting", "half a line", "closing"):
        mike.reads("* vandal has quit the chat\n")
    mike.reads_nothing()
    mike.hangs_up()
    assert_nothing_is_left(house)


def test_two_minutes_without_a_name_are_the_end(house):
    caller = house.call()
    caller.reads(GREETING.decode())
    house.wait(119)
    caller.reads_nothing()
    house.wait(1)
    caller.reads("* You gave no name in time, goodbye!\n")
    caller.sees_the_end()


def test_a_name_in_time_stops_the_clock(house):
    mike = house.join("mike")
    house.wait(1000)
    mike.types("/who")
    mike.reads("* 1 here: mike\n")


def test_who_does_not_hang_up_is_cut_off_after_five_seconds(house):
    caller = house.call()
    caller.types("/quit")
    house.settle()
    assert len(house.reactor.connections) == 1
    house.wait(5)
    assert_nothing_is_left(house)


def test_people_take_turns_line_by_line_where_somebody_listens_slowly(houses):
    house = houses(rate=0)
    slow, ann, mike, jonny = house.join("slow", 4096), *map(house.join, ["ann", "mike", "jonny"])
    slow.reading = False
    while len(house.chat.logs[TelnetWire].data) <= batchat.HOLD_BELOW:
        ann.types("x" * 4000)
        house.settle()
    jonny.unread.clear()
    for each in (ann, mike):
        each.types(*["y" * 4000] * 4)
    their_sockets = [house.connection(name).sock for name in ("ann", "mike")]
    wait_until(lambda: all(len(s.recv(20000, socket.MSG_PEEK)) > 16000 for s in their_sockets))
    house.settle()
    speakers = [line.split()[0] for line in jonny.unread.decode().splitlines()]
    assert len(speakers) == 8
    assert max(len([*turn]) for _, turn in itertools.groupby(speakers)) <= 2


def test_who_goes_on_sending_after_quit_is_cut_off_after_five_seconds(houses):
    house = houses(rate=0)
    caller = house.call()
    many_to_answer = b"\xff\xf6" * 4000  # so that "/quit" has to wait for its turn
    caller.sends(many_to_answer + b"\r\n/quit\r\n" + b"x" * batchat.READ_SIZE)
    house.settle()
    assert len(house.reactor.connections) == 1
    house.wait(5)
    assert_nothing_is_left(house)


def test_a_paste_beyond_the_rate_is_paced_and_arrives_whole_then_the_quit(houses):
    house = houses(rate=10)
    mike, jonny = house.join("mike"), house.join("jonny")
    jonny.sends(b"".join(b"line %d\n" % n for n in range(2000)))
    jonny.says_no_more()
    house.settle()
    assert mike.unread.count(b"\n") in (49, 50)  # a burst; the name was a line too
    mike.unread.clear()
    house.wait(1)
    assert mike.unread.count(b"\n") in (10, 11)
    for _ in range(200):
        house.wait(1)
    assert mike.unread.endswith(b"<jonny> line 1999\r\n* jonny has quit the chat\r\n")


def test_who_waits_for_a_token_is_not_read_and_the_wheel_stands_still(houses):
    house = houses(rate=10)
    house.join("mike")
    jonny = house.join("jonny")
    jonny.types(*["spam"] * 90)
    house.settle()
    connection = house.connection("jonny")
    assert connection.watched == 0
    assert house.reactor._patience() == pytest.approx(0.1)
    house.wait(60)
    assert connection.watched == selectors.EVENT_READ


LONG = "x" * 4000


def flood(house: House, talker: Caller, lines: int = 10_000) -> int:
    """Talk until the room lets nobody talk any more; returns how many lines went in."""
    for count in range(lines):
        data = f"{LONG}\r\n".encode()
        while data:
            try:
                data = data[talker.sock.send(data) :]
            except BlockingIOError:
                before = len(house.chat.logs[TelnetWire].data), house.chat.logs[TelnetWire].offered
                house.turn()
                if house.reactor.held and before == (
                    len(house.chat.logs[TelnetWire].data),
                    house.chat.logs[TelnetWire].offered,
                ):
                    return count
    raise AssertionError("nothing held the talker back")


def test_a_listener_who_takes_nothing_holds_the_room_for_two_seconds_and_is_dropped(houses):
    house = houses(rate=0)
    ann, talker, sleeper = house.join("ann"), house.join("talker"), house.join("sleeper", 4096)
    sleeper.reading = False
    flood(house, talker)
    assert batchat.HOLD_ABOVE < len(house.chat.logs[TelnetWire].data) < batchat.WINDOW
    assert house.connection("talker").watched == 0
    house.wait(1.9)
    assert "sleeper" in house.chat.people
    ann.unread.clear()
    house.wait(0.2)
    assert "sleeper" not in house.chat.people
    assert b"* sleeper has quit the chat\r\n" in ann.unread
    assert not house.reactor.held
    house.settle()
    assert len(house.chat.logs[TelnetWire].data) == 0
    talker.sends(b"\r\nhello again\r\n")
    house.until(lambda: ann.unread.endswith(b"<talker> hello again\r\n"))


def test_what_the_system_keeps_for_a_listener_has_a_size_that_does_not_grow(houses):
    house = houses()
    house.join("ann")
    ours, fixed = house.connection("ann").sock, socket.socket()
    with fixed:
        fixed.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, batchat.SEND_BUFFER)  # see tcp(7)
        sizes = [each.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for each in (ours, fixed)]
    assert sizes[0] == sizes[1]


def test_talkers_go_on_when_the_slowest_listener_has_caught_up(houses):
    house = houses(rate=0)
    talker, slow = house.join("talker"), house.join("slow", 4096)
    slow.reading = False
    flood(house, talker)
    slow.reading = True
    house.until(lambda: len(house.chat.logs[TelnetWire].data) < batchat.HOLD_BELOW)
    house.until(lambda: not house.reactor.held)
    talker.sends(b"\r\nhello again\r\n")
    house.until(lambda: slow.unread.endswith(b"<talker> hello again\r\n"))
    assert "slow" in house.chat.people
    assert set(bytes(slow.unread).split(b"\r\n")) >= {b"<talker> " + LONG.encode()}


def test_a_listener_who_trickles_is_never_dropped_and_loses_nothing(houses):
    house = houses(rate=0)
    talker, slow = house.join("talker"), house.join("slow", 4096, wide=True)
    slow.reading = False
    said = flood(house, talker) + 1
    heard = bytearray()
    for _ in range(100):
        slow.reading = True
        slow.receive(4096)
        slow.reading = False
        house.wait(0.5)
        assert "slow" in house.chat.people
    slow.reading = True
    talker.sends(b"\r\nbye\r\n")
    house.until(lambda: slow.unread.endswith(b"<talker> bye\r\n"))
    heard += slow.unread
    lines = bytes(heard).split(b"\r\n")[:-2]
    assert said - 1 <= len(lines) <= said + 1
    assert all(LONG.encode().startswith(line[len(b"<talker> ") :]) for line in lines)


def test_nobody_holds_the_room_for_longer_than_two_seconds(houses):
    house = houses(rate=0)
    talker, slow = house.join("talker"), house.join("slow", 4096)
    slow.reading = False
    flood(house, talker)
    # It comes back under the half, but not under the quarter, and then takes nothing.
    slow.reading = True
    house.until(lambda: len(house.chat.logs[TelnetWire].data) < batchat.HOLD_ABOVE - 10_000)
    slow.reading = False
    house.settle()
    assert house.reactor.held
    house.wait(2)
    before = house.chat.logs[TelnetWire].offered
    house.until(
        lambda: (
            house.chat.logs[TelnetWire].offered > before
            or len(house.chat.logs[TelnetWire].data) > batchat.HOLD_ABOVE
        )
    )


def test_who_does_not_read_private_replies_is_not_read_until_they_do(houses):
    house = houses(rate=0)
    mike = house.join("mike", 4096)
    connection = house.connection("mike")
    mike.reading = False
    mike.sends(b"/help\n" * 2000)
    house.settle()
    assert batchat.PRIVATE_LIMIT < connection.outbox.private_bytes < batchat.PRIVATE_LIMIT + 1000
    assert not connection.watched & selectors.EVENT_READ
    mike.reading = True
    help_text = batchat.HELP.replace("\n", "\r\n").encode()
    house.until(lambda: len(mike.unread) == 2000 * len(help_text))
    assert mike.unread == help_text * 2000


def test_talkers_who_never_stop_are_listened_to_in_turn(houses):
    house = houses(rate=0)
    listener = house.join("listener")
    names = {f"talker-with-a-long-name{n}" for n in range(9)}
    talkers = [house.join(name) for name in sorted(names)]
    heard = set()
    for _ in range(8):  # each of which has room for two talkers or three
        for talker in talkers:
            talker.unread.clear()
            with contextlib.suppress(BlockingIOError):
                while True:
                    talker.sock.send(b"x\n" * 8192)
        house.turn()
        heard |= set(re.findall(r"<(\S+)> ", listener.unread.decode()))
        listener.unread.clear()
    assert heard == names


def test_one_turn_reads_little_enough_that_the_log_keeps_to_its_window(houses):
    house = houses(rate=0)
    talkers = [house.join(f"talker-with-a-long-name{n}") for n in range(4)]
    for talker in talkers:
        with contextlib.suppress(BlockingIOError):
            while True:
                talker.sock.send(b"x\n" * 8192)
    for _ in range(8):
        house.turn()
        assert len(house.chat.logs[TelnetWire].data) <= batchat.WINDOW


def test_a_full_house_says_so_and_lets_people_in_when_some_leave(houses):
    house = houses(max_people=2)
    mike, jonny, ann = house.join("mike"), house.join("jonny"), house.call()
    ann.reads("* BATCHAT is full, please try again later.\n")
    ann.sees_the_end()
    jonny.types("/quit")
    jonny.sees_the_end()
    mike.reads("* jonny has quit the chat\n")
    house.join("ann")


def test_callers_who_are_turned_away_and_stay_take_up_no_room(houses):
    house = houses(max_people=1)
    mike = house.join("mike")
    callers = [house.call() for _ in range(100)]
    for caller in callers:
        caller.reads("* BATCHAT is full, please try again later.\n")
    assert len(house.reactor.connections) <= 1 + batchat.LOBBY
    mike.hangs_up()
    house.settle()
    house.join("ann")


class StandIn:
    """A listening socket of which a test decides what `accept` says; all else is real."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.hosts: list[str] = []  # where the next callers come from
        self.error = 0  # what goes wrong
        self.calls = 0

    def __getattr__(self, name: str):
        return getattr(self.listener, name)

    def accept(self):
        self.calls += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        sock, address = self.listener.accept()
        return sock, (self.hosts.pop(0), 4321, 0, 0) if self.hosts else address


def test_too_many_people_from_one_address_are_turned_away(houses):
    house = houses(max_per_address=2, door=StandIn)
    house.door.hosts += ["203.0.113.5", "::ffff:203.0.113.5", "203.0.113.5"]
    house.door.hosts += ["203.0.113.6", "203.0.113.5"]
    one, _two = house.join("one"), house.join("two")
    three = house.call()
    three.reads("* Too many people are here from your address, please try again later.\n")
    three.sees_the_end()
    three.hangs_up()
    house.join("four")
    one.hangs_up()
    house.settle()
    house.join("five")


def test_who_is_turned_away_does_not_count_among_those_from_their_address(houses):
    house = houses(max_per_address=1, door=StandIn)
    house.door.hosts += ["203.0.113.5"] * 5
    mike = house.join("mike")
    refused = [house.call() for _ in range(3)]  # who do not hang up
    for each in refused:
        each.reads("* Too many people are here from your address, please try again later.\n")
    mike.hangs_up()
    house.settle()
    house.join("ann")


def test_callers_who_are_turned_away_cut_off_nobody_who_is_still_owed_something(houses):
    house = houses(max_people=2, rate=0)
    talker, slow = house.join("talker"), house.join("slow", 4096)
    slow.reading = False
    talker.types(*[LONG] * 50, "the end")
    house.settle()
    slow.types("/quit")
    house.settle()
    house.join("late")
    for _ in range(30):
        house.call().reads("* BATCHAT is full, please try again later.\n")
    slow.reading = True
    house.until(lambda: slow.gone)
    assert slow.unread.endswith(b"<talker> the end\r\n")


def test_a_flood_of_commands_is_paced_like_lines(houses):
    house = houses(rate=10)
    mike, vandal = house.join("mike"), house.call()
    vandal.sends(b"\xff\xf1" * 50_000)
    house.settle()
    (connection,) = house.reactor.connections.keys() - {house.connection("mike")}
    assert connection.paused
    mike.types("/who")
    mike.reads("* 1 here: mike\n")


def test_who_ignores_talkers_and_stalls_is_behind_by_what_that_costs(houses):
    house = houses(rate=0)
    ann, bob, sleeper = house.join("ann"), house.join("bob"), house.join("sleeper", 4096)
    sleeper.types("/ignore ann")
    house.settle()
    sleeper.reading = False
    outbox = house.connection("sleeper").outbox
    for _ in range(10_000):
        ann.types("x")
        bob.types("x")
        house.turn()
        assert len(outbox.splices) < 5000
        if house.reactor.held:
            break
    house.wait(2)
    assert "sleeper" not in house.chat.people


def test_an_ipv6_64_counts_as_one_address_and_this_box_as_none():
    assert batchat.address_group("2001:db8::1") == batchat.address_group("2001:db8::ffff:2%eth0")
    assert batchat.address_group("2001:db8::1") != batchat.address_group("2001:db8:0:1::1")
    assert batchat.address_group("::ffff:192.0.2.1") == batchat.address_group("192.0.2.1")
    assert not any(map(batchat.address_group, ["127.0.0.1", "::1", "::ffff:127.1.2.3"]))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ECONNABORTED])
def test_when_accept_fails_it_waits_a_second_without_spinning(houses, code):
    house = houses(door=StandIn)
    mike = house.join("mike")
    house.door.error, house.door.calls = code, 0
    ann = house.call()
    house.until(lambda: house.door.calls)
    house.settle()
    assert house.door.calls == 1
    assert house.reactor._patience() == 1
    mike.types("/who")
    mike.reads("* 1 here: mike\n")
    house.door.error = 0
    house.wait(1)
    ann.reads(GREETING.decode())


def test_an_error_of_ours_costs_its_connection_and_nothing_else(house, monkeypatch, caplog):
    mike, jonny = house.join("mike"), house.join("jonny")

    def fail(self, person, rest):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Chat, "_do_me", fail)
    jonny.types("/me trips")
    mike.reads("* jonny has quit the chat\n")
    house.until(lambda: jonny.gone)
    assert "Traceback" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    mike.types("/who")
    mike.reads("* 1 here: mike\n")


def test_an_error_of_ours_while_sending_costs_its_connection_and_nothing_else(house, monkeypatch):
    mike, jonny = house.join("mike"), house.join("jonny")
    victim = house.connection("jonny").outbox
    pieces = Outbox.pieces

    def fail(self):
        assert self is not victim
        return pieces(self)

    monkeypatch.setattr(Outbox, "pieces", fail)
    jonny.types("/who")
    mike.reads("* jonny has quit the chat\n")
    mike.types("/who")
    mike.reads("* 1 here: mike\n")


def test_ctrl_c_leaves_and_its_timing_mark_is_answered_so_that_no_screen_freezes(house):
    mike, jonny = house.join("mike"), house.join("jonny")
    jonny.sends(b"\xff\xf4\xff\xfd\x06")
    house.until(lambda: jonny.gone)
    assert (bytes(jonny.unread), jonny.gone) == (b"\xff\xfc\x06", "closed")
    mike.reads("* jonny has quit the chat\n")


def test_telnets_urgent_data_stays_in_the_stream(house):
    mike, jonny = house.join("mike"), house.join("jonny")
    jonny.sends(b"on")
    house.settle()
    jonny.sock.send(b"\xff\xf2", socket.MSG_OOB)
    jonny.sends(b"e\r\n")
    mike.reads("<jonny> one\n")


def test_peers_that_vanish_are_found_within_two_minutes(house):
    house.join("mike")
    sock = house.connection("mike").sock
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    wanted = {
        "TCP_KEEPIDLE": 60,
        "TCP_KEEPINTVL": 15,
        "TCP_KEEPCNT": 4,
        "TCP_USER_TIMEOUT": 120_000,
    }
    for name, value in wanted.items():
        if hasattr(socket, name):
            assert sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


def test_a_line_leaves_at_once(house):
    house.join("mike")
    assert house.connection("mike").sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_closing_the_house_tells_everyone_and_ends_every_line_cleanly(house):
    mike, ann, caller = house.join("mike"), house.join("ann"), house.call()
    caller.reads(GREETING.decode())
    mike.types("last words")
    ann.reads("<mike> last words\n")
    house.reactor.stop()
    for each in (mike, ann, caller):
        each.reads("* BATCHAT is closing, goodbye!\n")
        each.sees_the_end()
        each.hangs_up()
    house.reactor.run()
    assert not house.reactor.connections


def test_closing_the_house_waits_two_seconds_for_those_who_do_not_hang_up(house):
    house.join("mike").reading = False
    house.reactor.stop()
    house.settle()
    assert house.reactor.connections
    assert house.reactor._patience() == pytest.approx(2)
    house.clock.time += 2
    house.reactor.run()
    assert not house.reactor.connections


def test_the_log_says_who_came_and_went_and_why_and_never_what_was_said(houses, caplog):
    caplog.set_level(logging.DEBUG)
    house = houses(rate=0)
    mike, jonny, sleeper = house.join("mike"), house.join("jonny"), house.join("sleeper", 4096)
    mike.types("secret", "/msg jonny secret", "/me secret", "/secret", "/nick mick")
    jonny.types("/quit")
    house.until(lambda: jonny.gone)
    sleeper.reading = False
    flood(house, mike)
    house.wait(2)
    assert "mike joined from 127.0.0.1 port" in caplog.text
    assert "(3 here)" in caplog.text
    assert "mike is now mick" in caplog.text
    assert "jonny left: quit" in caplog.text
    assert re.search("sleeper left: (too far behind|takes nothing)", caplog.text)
    assert "secret" not in caplog.text
    assert "xxx" not in caplog.text


def test_a_browser_and_a_telnet_user_talk_in_one_room_and_nobody_hears_themselves(house):
    mike, ann = house.join("mike"), house.browse("ann")
    mike.types("hi ann!")
    ann.reads("<mike> hi ann!\n")
    ann.types("hi mike!", "/me waves", "/who", "//slash", "/msg mike psst")
    mike.reads("<ann> hi mike!\n** ann waves\n<ann> /slash\n[ann -> you] psst\n")
    ann.reads("* 2 here: ann, mike\n[you -> mike] psst\n")
    mike.types("/ignore ann")
    mike.reads("* You no longer hear ann.\n")
    ann.types("hello?")
    mike.reads_nothing()
    ann.reads_nothing()


def test_a_websocket_is_closed_with_1000_after_quit(house):
    mike, ann = house.join("mike"), house.browse("ann")
    ann.types("/quit")
    ann.sees_the_end()
    assert ann.closed_with == 1000
    mike.reads("* ann has quit the chat\n")
    for each in (mike, ann):
        each.hangs_up()
    assert_nothing_is_left(house)


def test_a_websocket_is_closed_with_1001_when_the_room_closes(house):
    ann = house.browse("ann")
    house.reactor.stop()
    ann.reads("* BATCHAT is closing, goodbye!\n")
    ann.sees_the_end()
    assert ann.closed_with == 1001


def test_a_message_over_the_limit_closes_its_websocket_alone(house):
    mike, ann = house.join("mike"), house.browse("ann")
    ann.types("x" * 4097)
    ann.sees_the_end()
    assert ann.closed_with == 1009
    mike.reads("* ann has quit the chat\n")


def test_browsers_are_pinged_every_30_seconds_and_telnet_is_not(house):
    mike, ann = house.join("mike"), house.browse("ann")
    house.wait(30)
    assert ann.pings == 1
    ann.sends(masked(10, b""))
    house.wait(30)
    assert ann.pings == 2
    mike.reads_nothing()
    ann.reads_nothing()


def test_a_browser_at_the_prompt_is_pinged_too(house):
    browser = Browser(house)
    house.wait(30)
    assert browser.pings == 1


def test_one_turn_sends_a_line_to_each_listener_once_and_those_without_splices_by_one_send(
    house, monkeypatch
):
    mike, ann, bob = house.join("mike"), house.browse("ann"), house.join("bob")
    flushed = []
    flush = Reactor._flush
    monkeypatch.setattr(
        Reactor, "_flush", lambda self, it: flushed.append(it.name) or flush(self, it)
    )
    mike.types("hello")
    ann.reads("<mike> hello\n")
    bob.reads("<mike> hello\n")
    assert flushed == ["mike"]


def test_where_people_call_from_is_logged_as_they_would_write_it(houses, caplog):
    caplog.set_level(logging.INFO)
    house = houses(door=StandIn)
    house.door.hosts += ["::ffff:192.0.2.7", "2001:db8::ffff:1"]
    house.join("mike")
    house.join("ann")
    assert "mike joined from 192.0.2.7 port 4321" in caplog.text
    assert "ann joined from 2001:db8::ffff:1 port 4321" in caplog.text


def test_a_line_is_encoded_once_for_each_format_that_anyone_listens_to(house, monkeypatch):
    mike, ann = house.join("mike"), house.join("ann")
    encoded = []
    monkeypatch.setattr(WebWire, "encode", staticmethod(lambda text: encoded.append(text) or b""))
    mike.types("hello")
    ann.reads("<mike> hello\n")
    assert encoded == []


def test_a_request_that_does_not_come_within_10_seconds_is_answered_408(house):
    browser = house.ask(b"GET / HT")
    house.settle()
    assert browser.raw == b""
    house.wait(10)
    assert browser.raw.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert browser.gone == "closed"


def test_a_page_is_sent_whole_and_the_connection_closed(house):
    browser = house.ask(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    house.until(lambda: browser.gone)
    assert browser.gone == "closed"
    assert browser.raw.endswith(batchat.PAGE.encode())
    browser.hangs_up()
    assert_nothing_is_left(house)


def test_a_browser_that_says_nothing_after_the_handshake_has_two_minutes_for_a_name(house):
    browser = Browser(house)
    house.wait(119)
    assert not browser.gone
    house.wait(1)
    assert browser.unread.endswith(b"* You gave no name in time, goodbye!\r\n")
    assert browser.closed_with == 1000


def test_a_full_house_answers_a_browser_503(houses):
    house = houses(max_people=1)
    house.join("mike")
    browser = house.ask(OPENING)
    house.until(lambda: browser.gone)
    assert browser.raw.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert browser.raw.endswith(b"\r\n\r\n* BATCHAT is full, please try again later.\n")


def test_a_room_that_closes_answers_a_browser_503_that_has_not_asked_yet(house):
    browser = house.ask(b"GET ")
    house.settle()
    house.reactor.stop()
    house.until(lambda: browser.gone)
    assert browser.raw.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


def test_a_stalled_browser_is_dropped_and_costs_telnet_two_seconds(houses):
    house = houses(rate=0)
    talker, sleeper = house.join("talker"), house.browse("sleeper")
    sleeper.reading = False
    flood(house, talker)
    house.wait(2.1)
    assert list(house.chat.people) == ["talker"]
    assert len(house.chat.logs[TelnetWire].data) == 0


ROOM_STEPS = st.one_of(
    st.tuples(st.just("join"), st.integers(0, 3), st.sampled_from([TelnetWire, WebWire])),
    st.tuples(st.just("say"), st.integers(0, 3), st.sampled_from(["hi", "\u00e9", "x" * 200])),
    st.tuples(st.just("say"), st.integers(0, 3), st.sampled_from(["hi", "\u00e9", "x" * 200])),
    st.tuples(st.just("msg"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("quit"), st.integers(0, 3)),
    st.tuples(st.just("read"), st.integers(0, 3)),
    st.tuples(st.just("trim")),
)


@given(st.lists(ROOM_STEPS, max_size=40))
def test_a_room_of_both_wires_shows_everyone_just_what_a_list_of_their_own_would_hold(steps):
    chat, inside = Chat(), {}
    owed, everyone = {}, []
    for step, *rest in steps:
        number = rest[0] if rest else None
        if step == "trim":
            for log in chat.logs.values():
                at = [each.outbox.cursor for each in everyone if each.outbox.log is log]
                log.trim(min([log.end, *at]))
        elif step == "join":
            if number not in inside:
                for other in inside.values():
                    owed[other].append(f"* p{number} has joined the chat")
                guest = Guest(chat, rest[1])
                everyone.append(guest)
                guest.types(f"p{number}")
                inside[number] = guest
                owed[guest] = [*batchat.GREETING.split("\n")]
                owed[guest] += [f"Hey, p{number}! Hope you enjoy the chat.", ""]
        elif number in inside:
            guest = inside[number]
            if step == "say":
                guest.types(rest[1])
                for other in inside.values():
                    if other is not guest:
                        owed[other].append(f"<p{number}> {rest[1]}")
            elif step == "msg" and rest[1] in inside:
                guest.types(f"/msg p{rest[1]} psst")
                owed[inside[rest[1]]].append(f"[p{number} -> you] psst")
                owed[guest].append(f"[you -> p{rest[1]}] psst")
            elif step == "quit":
                guest.types("/quit")
                del inside[number]
                for other in inside.values():
                    owed[other].append(f"* p{number} has quit the chat")
            elif step == "read":
                guest.looks()
    for guest in everyone:
        assert guest.looks() == owed[guest]
    for log in chat.logs.values():
        log.trim(log.end)
        assert len(log.data) == 0


# --------------------------------------------------------------------------
# The whole server, in a simulated network
#
# The real reactor, chat and wires run over sockets, a selector and a clock that
# are worse than any real ones; beside them runs a model that keeps for everyone
# a plain list of what they must read.  After every turn the two are compared.
# --------------------------------------------------------------------------

# Limits so small that a few lines reach them.
SMALL_LIMITS = {
    "LINE_LIMIT": 100,
    "WINDOW": 4096,
    "HOLD_ABOVE": 2048,
    "HOLD_BELOW": 1024,
    "SPLICE_SIZE": 16,
    "PRIVATE_LIMIT": 1024,
    "READ_SIZE": 4096,
    "ACCEPT_BATCH": 2,
    "PIECES_LIMIT": 5,
    "LOBBY": 2,
    "COMMANDS_A_TOKEN": 4,
}
FULL, CROWDED, NAMELESS, TOO_SLOW, SHUTDOWN = DISMISSALS = [
    getattr(batchat, name).strip("* \n")
    for name in ["FULL", "CROWDED", "NAMELESS", "TOO_SLOW", "SHUTDOWN"]
]
NORMAL, GOING_AWAY = b"\x88\x02\x03\xe8", b"\x88\x02\x03\xe9"  # the last frames we send
VANISHED_SECONDS = 120  # until the system gives up a peer that is not there any more
BOUNDLESS = 10**9  # bytes
START = 1000.0  # on the clock, when a world begins


class Peer:
    """Somebody far away, and the socket that the server has of them."""

    def __init__(self, world: World, wire: type[batchat.Wire], host: str, low_water: int) -> None:
        self.world, self.wire, self.host = world, wire, host
        self.group = batchat.address_group(host)
        # The network between the two.
        self.typed = b""  # all that they ever sent
        self.arrived = b""  # of that, what the server has not read yet
        self.ended = False  # they send no more ...
        self.end_seen = False  # ... and the server knows
        self.broken = 0  # the errno that the server gets once ...
        self.send_error = 0  # the same, from a send on a line that is not broken
        self.error_seen = False  # ... and has got
        self.vanished_at = batchat.NEVER
        self.room = BOUNDLESS  # bytes that still fit into the buffers on their way
        self.speed = 0  # bytes a second that they read, where that is little
        self.low_water = low_water  # bytes that must fit, before the selector says so
        self.got = bytearray()  # all that the server could send them
        self.short_since = batchat.NEVER  # since when they took nothing, though they are owed
        self.shut = self.closed = False  # what the server has done
        # What the model knows of them.
        self.stage = "outside"  # then "calling", "naming", "chatting", "left"
        self.since, self.since_turn = self.world.now, 0  # when the stage began
        self.arrived_at = batchat.NEVER
        self.owed = bytearray()
        # What puts them behind: how much, and the bytes that they must have got to be over it.
        self.behind: deque[tuple[int, int]] = deque()
        self.name = ""
        self.tries = 0
        self.ignored: set[Peer] = set()
        self.says_goodbye = False  # an open WebSocket, which is owed a close frame
        self.events: list = []  # what the server made of what they typed
        self.replies = b""  # what the wire itself answered, and the bytes of its last answer
        self.answered = 0
        self.dismissal = b""  # what they were told when they were let go
        self.why = ""  # why they were let go
        self.late_since = batchat.NEVER  # since when they have been behind by half a window
        self.waits_since = batchat.NEVER  # since when they could have been read, but were not
        self.waits_turns = 0

    # The socket

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def setsockopt(self, *option: int) -> None:
        pass  # as a kernel that knows them all

    def fileno(self) -> int:
        return -1 if self.closed else 1000 + self.world.peers.index(self)

    def break_down(self, error: int) -> None:
        if not self.broken:
            self.broken = error
            self.world.faults += 1

    def reads(self, room: int, speed: int) -> None:
        # Room that there is can't be taken back, but for the boundless.
        self.room = room if self.reads_all else max(room, self.room)
        self.speed = speed

    def enters(self, stage: str) -> None:
        self.stage, self.since, self.since_turn = stage, self.world.now, self.world.turns

    def _complain(self, error: int) -> None:
        """The error of a broken line is told once."""
        self.world.work += 1
        self.short_since = batchat.NEVER
        if not self.error_seen:
            self.error_seen = True
            raise OSError(error, os.strerror(error))

    def recv(self, most: int) -> bytes:
        assert not self.closed
        assert most <= batchat.READ_SIZE
        most = min(most, self.world.segment)
        data, self.arrived = self.arrived[:most], self.arrived[most:]
        if data:
            self.world.work += 1
            self.waits_since, self.waits_turns = batchat.NEVER, 0
            return data
        if self.broken:
            self._complain(self.broken)
        elif not self.ended:
            raise BlockingIOError
        assert not self.end_seen, "read after the end"
        self.world.work += 1
        self.end_seen = True
        return b""

    def send(self, data: bytes) -> int:
        assert data
        assert not self.closed
        assert self.error_seen or not self.shut
        error = self.broken or self.send_error
        if error:
            self._complain(error)
            raise BrokenPipeError(errno.EPIPE, "nobody is there")
        assert self.owed.startswith(data, len(self.got)), "they got what they must not get"
        took = min(self.room, len(data))
        if not took:
            self.short_since = min(self.short_since, self.world.now)
            raise BlockingIOError
        self.world.work += 1
        self.room -= took
        self.got += data[:took]
        self.short_since = self.world.now if self.unsent else batchat.NEVER
        while self.behind and self.behind[0][1] <= len(self.got):
            self.behind.popleft()
        return took

    def sendmsg(self, pieces: list) -> int:
        assert 0 < len(pieces) <= batchat.PIECES_LIMIT
        return self.send(b"".join(pieces))

    def shutdown(self, how: int) -> None:
        self.world.work += 1
        if self.broken:
            raise OSError(errno.ENOTCONN, "nobody is there")
        assert self.unsent == 0
        self.shut = True
        self.ended |= how == socket.SHUT_RDWR or self.world.polite

    def close(self) -> None:
        assert not self.closed
        assert self.may_be_closed, "closed without a reason"
        self.closed = True
        self.world.work += 1

    def ready(self) -> int:
        readable = self.arrived or self.ended or self.broken
        writable = self.broken or self.room >= self.low_water
        return (selectors.EVENT_READ if readable else 0) | (
            selectors.EVENT_WRITE if writable else 0
        )

    # What must be so

    @property
    def connection(self) -> batchat.Connection:
        return next(each for each in self.world.reactor.connections if each.sock is self)

    @property
    def unsent(self) -> int:
        return 0 if self.error_seen else len(self.owed) - len(self.got)

    @property
    def reads_all(self) -> bool:
        return self.room > BOUNDLESS // 2

    @property
    def is_here(self) -> bool:
        return not self.closed and self.stage in ("calling", "naming", "chatting")

    def owe(self, data: bytes, behind: int) -> None:
        """They must get `data`; until they have it, they are so many bytes behind."""
        self.owed += data
        self.behind.append((behind, len(self.owed)))

    @property
    def reasons(self) -> dict[str, bool]:
        """Why they may be let go when they did not ask for it, and whether that is so."""
        world, limits = self.world, self.world.reactor.limits
        # Whoever leaves has their place until the end of the turn.
        here = [
            each
            for each in world.peers
            if each.is_here or (each.stage == "left" and each.since_turn == world.turns)
        ]
        from_there = [each for each in here if each.group == self.group]
        too_far = sum(size for size, _ in self.behind) > batchat.HOLD_ABOVE
        return {
            os.strerror(self.broken): self.error_seen,
            TOO_SLOW: self.stage == "calling" and world.passed(batchat.HEAD_SECONDS, self.since),
            NAMELESS: self.stage == "naming" and world.passed(batchat.NAME_SECONDS, self.since),
            FULL: len(here) > limits.max_people,
            CROWDED: self.group != "" and 0 < limits.max_per_address < len(from_there),
            SHUTDOWN: world.closes,
            "takes nothing": too_far and world.passed(batchat.STALL_SECONDS, self.short_since),
            "too far behind": too_far and world.passed(batchat.STALL_SECONDS, self.late_since),
        }

    @property
    def may_be_closed(self) -> bool:
        world, reasons = self.world, self.reasons
        open_now = [each for each in world.by_arrival if not each.closed]
        return (
            self.error_seen
            or (self.end_seen and self.shut)
            or (self.stage == "left" and world.passed(batchat.CLOSING_SECONDS, self.since))
            or (
                len(open_now) > world.reactor.limits.max_people + batchat.LOBBY
                and self.stage == "left"
                and (not self.unsent or all(p.unsent for p in open_now if p.stage == "left"))
            )
            or world.now >= world.reactor.ends_at
            or reasons["takes nothing"]
            or reasons["too far behind"]
        )


class SimulatedDoor:
    """A socket that listens."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waiting: list[Peer] = []
        self.error = 0  # what accept fails with ...
        self.fails_until = 0.0
        self.closed = False

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def fileno(self) -> int:
        return -1 if self.closed else 1

    def ready(self) -> int:
        return selectors.EVENT_READ if self.waiting else 0

    def accept(self) -> tuple[Peer, tuple]:
        if self.world.now < self.fails_until:
            self.world.reaches("accept fails")
            raise OSError(self.error, os.strerror(self.error))
        if not self.waiting:
            raise BlockingIOError
        self.world.work += 1
        peer = self.waiting.pop(0)
        peer.enters("calling")
        peer.arrived_at = self.world.now
        self.world.by_arrival.append(peer)
        return peer, (peer.host, 4321, 0, 0)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class SimulatedSignal:
    """What tells the server to close."""

    def fileno(self) -> int:
        return 2

    def ready(self) -> int:
        return selectors.EVENT_READ


class WatchedReactor(Reactor):
    """The real reactor, whose every turn the world looks at."""

    world: World

    def turn(self) -> None:
        self.world.before_turn()
        super().turn()
        self.world.after_turn()


class SimulatedSelector:
    """As strict as epoll; it sleeps for no longer than the world lets it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.keys: dict = {}

    def register(self, sock, events: int, data=None) -> None:
        assert sock not in self.keys
        assert sock.fileno() >= 0
        self.keys[sock] = selectors.SelectorKey(sock, sock.fileno(), events, data)
        self.world.work += 1

    def modify(self, sock, events: int, data=None) -> None:
        self.unregister(sock)
        self.register(sock, events, data)

    def unregister(self, sock) -> None:
        assert sock.fileno() >= 0
        del self.keys[sock]
        self.world.work += 1

    def _ready(self) -> list:
        ready = [(key, sock.ready() & key.events) for sock, key in self.keys.items()]
        return [(key, events) for key, events in ready if events]

    def select(self, timeout: float | None = None) -> list:
        timeout = batchat.NEVER if timeout is None else timeout
        ready = self._ready()
        while timeout > 0 and not ready and not self.world.woken:
            timeout -= self.world.sleep(timeout)
            ready = self._ready()
        self.world.oversleep()
        first = self.world.rotation % len(ready) if ready else 0
        return ready[first:] + ready[:first]


class Witness(Chat):
    """The real chat; what the reactor asks of it, it asks of the model first."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.asked = False

    def _ask(self, what: str, *arguments) -> None:
        outermost, self.asked = not self.asked, True
        if outermost:
            getattr(self.world, what)(*arguments)
        try:
            getattr(Chat, what)(self, *arguments)
        finally:
            self.asked = not outermost

    def handle(self, person, event) -> None:
        self._ask("handle", person, event)
        for log in self.logs.values():
            assert len(log.data) < batchat.WINDOW + 500, "more than a line and some notices"

    def leave(self, person, why) -> None:
        self._ask("leave", person, why)

    def reply(self, person, data) -> None:
        self._ask("reply", person, data)

    def ping(self) -> None:
        self._ask("ping")

    def close(self) -> None:
        self._ask("close")


class World:
    """The server, everyone who calls it, the network between them, and the model."""

    def __init__(self, limits: Limits, drift: float) -> None:
        self.now = START
        self.drift = drift  # seconds that every turn takes
        self.jump = 0.0  # seconds that the server oversleeps next time
        self.lag = 0.0  # seconds by which it overslept this time
        self.polite = False  # peers hang up as soon as we do
        self.budget = 0.0  # seconds that the server may sleep, before the next step
        self.woken = False  # by the next step, not by anything that it waited for
        self.turns = 0
        self.was_held = self.was_idle = False
        self.work = 0  # what was done so far, in calls and events
        self.faults = 0
        self.reached: Counter[str] = Counter()  # what came about, of what seldom does
        self.rotation = 0  # who comes first among those who are ready
        self.segment = BOUNDLESS  # bytes that one recv gets, at most
        self.pinged_at = self.now
        self.peers: list[Peer] = []
        self.by_arrival: list[Peer] = []
        self.doors = {TelnetWire: SimulatedDoor(self), WebWire: SimulatedDoor(self)}
        self.signal = SimulatedSignal()
        self.selector = SimulatedSelector(self)
        self.reactor = WatchedReactor(
            {door: wire for wire, door in self.doors.items()},
            limits,
            self.selector,
            lambda: self.now,
        )
        self.reactor.world = self
        self.reactor.chat = Witness(self)

    def passed(self, seconds: float, since: float) -> bool:
        return self.now - since > seconds - 1e-6

    def is_late(self, seconds: float, since: float) -> bool:
        """Whether what is due after so many seconds is overdue."""
        return self.now - since > seconds + self.lag + 1e-6

    @property
    def closes(self) -> bool:
        return self.reactor.ends_at != batchat.NEVER

    def reaches(self, what: str) -> None:
        self.reached[what] += 1

    # The steps

    def take(self, step: str, *how) -> None:
        """Take a step as hypothesis chose it."""
        getattr(self, "step_" + step)(*how)

    def somebody(self, number: int) -> Peer | None:
        """One of those who are at the other end of an open line."""
        peers = [
            each for each in self.peers if not each.closed and each.vanished_at == batchat.NEVER
        ]
        return peers[-1 - number % len(peers)] if peers else None

    def call(self, wire: type[batchat.Wire], host: str, low_water: int) -> Peer:
        peer = Peer(self, wire, host, low_water)
        self.peers.append(peer)
        self.doors[wire].waiting.append(peer)
        return peer

    def step_calls(self, wire, host: str, low_water: int, polite: bool) -> None:
        peer = self.call(wire, host, low_water)
        if wire is WebWire and polite:
            self.type(peer, OPENING)

    def step_joins(self, wire, host: str, low_water: int, name: str) -> None:
        peer = self.call(wire, host, low_water)
        if wire is WebWire:
            self.type(peer, OPENING)
        self.type(peer, line_on(wire, name))

    def type(self, peer: Peer, data: bytes) -> None:
        if not peer.ended and not peer.broken:
            peer.typed += data
            peer.arrived += data

    def step_says(self, number: int, line: str, times: int) -> None:
        peer = self.somebody(number)
        if peer:
            self.type(peer, line_on(peer.wire, line) * times)

    def step_sends(self, number: int, data: tuple[bytes, bytes]) -> None:
        peer = self.somebody(number)
        if peer:
            self.type(peer, data[peer.wire is WebWire])

    def step_reads(self, number: int, room: int, speed: int) -> None:
        """From now on, they read so many bytes, and then so many a second."""
        peer = self.somebody(number)
        if peer:
            peer.reads(room, speed)
            self.faults += room < BOUNDLESS

    def step_floods(self, number: int, line: str, other: int, room: int, speed: int) -> None:
        """Somebody says a lot, and somebody reads it slowly, or is the one who says it."""
        self.step_reads(other, room, speed)
        self.step_says(number, line, 70)

    def step_ends(self, number: int) -> None:
        peer = self.somebody(number)
        if peer:
            peer.ended = True

    def step_breaks(self, number: int, error: int, keeps: bool) -> None:
        peer = self.somebody(number)
        if peer and peer.stage != "outside":
            peer.break_down(error)
            if not keeps:
                peer.typed = peer.typed[: len(peer.typed) - len(peer.arrived)]
                peer.arrived = b""

    def step_send_fails(self, number: int) -> None:
        """The system is out of memory for a moment; the line itself is in order."""
        peer = self.somebody(number)
        if peer and peer.stage != "outside":
            peer.send_error = errno.ENOBUFS
            self.faults += 1

    def step_vanishes(self, number: int) -> None:
        peer = self.somebody(number)
        if peer and peer.stage != "outside":
            peer.vanished_at = self.now
            peer.reads(0, 0)
            self.faults += 1

    def step_accept_fails(self, wire, error: int, seconds: float) -> None:
        self.doors[wire].error = error
        self.doors[wire].fails_until = self.now + seconds
        self.faults += 1

    def step_turns(self, times: int, rotation: int, segment: int) -> None:
        self.rotation, self.segment = rotation, segment
        for _ in range(times):
            self.budget = 0.0
            self.reactor.turn()

    def step_jumps(self, seconds: float) -> None:
        """The next turn comes late: the box was busy with something else, or asleep."""
        self.jump = seconds
        self.faults += 1

    def step_waits(self, seconds: float) -> None:
        self.budget, self.segment = seconds, BOUNDLESS
        self.woken = False
        for _ in range(10_000):
            if self.woken:
                return
            self.reactor.turn()
        raise AssertionError("the wheel turns and turns")

    def sleep(self, timeout: float) -> float:
        """Let some time pass, `timeout` at most; returns the seconds."""
        lines = [each for each in self.peers if not each.closed and not each.broken]
        slow = [each for each in lines if each.speed and each.short_since != batchat.NEVER]
        ends = [each.vanished_at + VANISHED_SECONDS - self.now for each in lines]
        seconds = min([timeout, self.budget, *ends, *[0.1 for _ in slow]])
        self.woken = seconds == self.budget < timeout
        self.budget -= seconds
        self.pass_by(seconds)
        return seconds

    def pass_by(self, seconds: float) -> None:
        self.now += seconds
        for peer in self.peers:
            if peer.speed and peer.short_since != batchat.NEVER and not peer.closed:
                took = int(peer.speed * seconds)
                peer.room += took
                if took:
                    peer.short_since = self.now
            if self.passed(VANISHED_SECONDS, peer.vanished_at) and not peer.closed:
                peer.break_down(errno.ETIMEDOUT)

    def oversleep(self) -> None:
        self.lag, self.jump = self.jump, 0.0
        self.pass_by(self.lag + 1e-9)  # no system wakes anybody too early
        for peer in self.peers:
            peer.waits_since += self.lag

    def before_turn(self) -> None:
        self.turns += 1
        self.pass_by(self.drift)
        self.woken = False
        self.was_held = self.reactor.held
        self.before = self.progress()

    def progress(self) -> tuple:
        """What changes in every turn that does something."""
        # Whoever has spent many tokens at once is looked at each time that one is back.
        return self.work, self.reactor.pacing.next_end()

    def after_turn(self) -> None:
        idle = self.before == self.progress() and not self.woken
        assert not (idle and self.was_idle), "the wheel turned twice with nothing to do"
        self.was_idle = idle
        self.check(self.was_held or self.reactor.held)

    # The model: what everybody must read

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
        deaf = [each for each in self.inside if speaker in each.ignored]
        self.announces(text, speaker, *deaf)

    @property
    def inside(self) -> list[Peer]:
        return [each for each in self.peers if each.stage == "chatting"]

    def called(self, name: str) -> Peer | None:
        key = batchat.name_key(name)
        return next((each for each in self.inside if batchat.name_key(each.name) == key), None)

    def goes(self, peer: Peer, notice: bool = True) -> None:
        was_inside = peer.stage == "chatting"
        peer.enters("left")
        if was_inside and notice:
            self.announces(f"* {peer.name} has quit the chat\n")
        for other in self.peers:
            other.ignored.discard(peer)
        peer.ignored.clear()
        if peer.says_goodbye:
            peer.owe(GOING_AWAY if self.closes else NORMAL, 2 * batchat.SPLICE_SIZE)
        else:
            peer.owe(b"", batchat.SPLICE_SIZE)

    def handle(self, person, event) -> None:
        peer = person.sock
        assert person.outbox.private_bytes - peer.answered <= batchat.PRIVATE_LIMIT
        peer.answered = 0
        self.work += 1
        peer.waits_since, peer.waits_turns = batchat.NEVER, 0
        if event is not WireEvent.OPENED or peer.wire is WebWire:
            peer.events.append(event)
        if event is WireEvent.OPENED:
            peer.enters("naming")
            peer.says_goodbye = peer.wire is WebWire
            self.shows(peer, batchat.GREETING)
        elif event is WireEvent.LEAVE or peer.stage == "calling":
            self.goes(peer)
        elif peer.stage == "naming":
            self.take_name(peer, event)
        elif event is WireEvent.TOO_LONG:
            self.shows(peer, "* A line has at most 100 bytes; yours was not sent.\n")
        elif event.startswith("/") and not event.startswith("//"):
            self.take_command(peer, *(event + " ").split(" ", 1))
        elif event.strip():
            self.says(peer, f"<{peer.name}> {event[event.startswith('//') :]}\n")

    def leave(self, person, why: str) -> None:
        peer = person.sock
        assert peer.reasons.get(why), why
        self.work += 1
        self.reaches(why)
        if why in DISMISSALS:
            too_late = why in (NAMELESS, TOO_SLOW)
            status = HTTPStatus.REQUEST_TIMEOUT if too_late else HTTPStatus.SERVICE_UNAVAILABLE
            must = peer.wire.encode(f"* {why}\n")
            if peer.wire is WebWire and not peer.says_goodbye:
                must = batchat.respond(status, "plain", f"* {why}\n")
            assert undated(peer.dismissal) == undated(must)
            peer.owe(peer.dismissal, batchat.SPLICE_SIZE)
        peer.why = why
        self.goes(peer)

    def reply(self, person, data: bytes) -> None:
        peer = person.sock
        if any(text.encode() in data for text in DISMISSALS):
            peer.dismissal = data
        elif data != peer.wire.PING:  # which `ping` has owed to them
            peer.owe(data, batchat.SPLICE_SIZE)
            peer.replies += data
            peer.answered = len(data)
            if peer.says_goodbye and frames_of(data)[-1][0] == 0x88:
                peer.says_goodbye = False

    def ping(self) -> None:
        assert self.passed(batchat.PING_SECONDS, self.pinged_at)
        self.work += 1
        self.pinged_at = self.now
        for peer in self.peers:
            if peer.stage in ("naming", "chatting"):
                peer.owe(peer.wire.PING, len(peer.wire.PING) + batchat.SPLICE_SIZE)

    def close(self) -> None:
        self.announces(batchat.SHUTDOWN)
        for peer in self.inside:
            self.goes(peer, notice=False)

    def why_not(self, peer: Peer, text: str) -> str:
        """Why they can't be called so; empty where they can."""
        try:
            name = batchat.check_name(text)
        except batchat.Refusal as why:
            return f"* {why}\n"
        taken = self.called(name) not in (None, peer) or name.lower() == "you"
        return f"* The name {name} is taken.\n" if taken else ""

    def take_name(self, peer: Peer, event) -> None:
        if event in (WireEvent.TOO_LONG, "/quit") or batchat.HTTP_REQUEST.match(event):
            self.goes(peer)
            return
        why = self.why_not(peer, event)
        if not why:
            peer.name = batchat.check_name(event)
            self.announces(f"* {peer.name} has joined the chat\n")
            peer.enters("chatting")
            self.shows(peer, f"Hey, {peer.name}! Hope you enjoy the chat.\n\n")
            return
        peer.tries += 1
        last = peer.tries == batchat.NAME_TRIES
        self.shows(peer, why + (batchat.GOODBYE if last else batchat.PROMPT))
        if last:
            self.goes(peer)

    def take_command(self, peer: Peer, verb: str, rest: str) -> None:
        verb, rest = verb.lower(), rest.strip()
        takes = batchat.COMMANDS[verb][0] if verb in batchat.COMMANDS else None
        if takes is None:
            answer = f"* There is no command {verb}; /help shows those there are.\n"
        elif len(rest.split(None, 1)) < len(takes.split()):
            answer = f"* It goes like this: {verb} {takes}\n"
        else:
            answer = getattr(self, "do_" + verb[1:])(peer, rest)
        if answer:
            self.shows(peer, answer)

    def do_help(self, peer: Peer, rest: str) -> str:
        return batchat.HELP

    def do_who(self, peer: Peer, rest: str) -> str:
        names = [each.name for each in self.inside]
        names.sort(key=batchat.name_key)
        return f"* {len(names)} here: {', '.join(names)}\n"

    def do_me(self, peer: Peer, rest: str) -> None:
        self.says(peer, f"** {peer.name} {rest}\n")

    def do_msg(self, peer: Peer, rest: str) -> str:
        name, text = rest.split(None, 1)
        other = self.called(name)
        if other is None:
            return f"* Nobody here is called {name}.\n"
        if peer not in other.ignored:
            if other.connection.outbox.private_bytes > batchat.PRIVATE_LIMIT:
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
        self.announces(f"* {before} is now known as {name}\n")
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

    # What must be so after every turn

    def check(self, held: bool) -> None:
        reactor, peers = self.reactor, self.peers
        connections = {each.sock: each for each in reactor.connections}
        here = [each for each in peers if each.is_here]
        assert [*connections] == [p for p in self.by_arrival if not p.closed]
        assert not self.is_late(batchat.PING_SECONDS, self.pinged_at)
        assert {key: each.sock for key, each in reactor.chat.people.items()} == {
            batchat.name_key(each.name): each for each in self.inside
        }
        ignorers = {} if self.closes else reactor.chat._ignorers
        assert {(other.sock, each.sock) for other, by in ignorers.items() for each in by} == {
            (other, each) for each in self.inside for other in each.ignored
        }
        assert {each.sock for each in ignorers} <= set(self.inside)
        groups = Counter(each.group for each in here)
        del groups[""]
        assert reactor.callers == groups
        assert len(here) <= reactor.limits.max_people
        assert max(groups.values(), default=0) <= (reactor.limits.max_per_address or len(here))
        for timer, stage, seconds in [
            (reactor.calling, "calling", batchat.HEAD_SECONDS),
            (reactor.naming, "naming", batchat.NAME_SECONDS),
            (reactor.closing, "left", batchat.CLOSING_SECONDS),
        ]:
            timed = {p for p in connections if p.stage == stage}
            assert {each.sock for each in timer} == timed
            assert not any(self.is_late(seconds, each.since) for each in timed)
        for kept in (reactor.stalled, reactor.pacing, reactor.talkers, reactor.backlogged):
            assert all(each.sock in connections for each in kept)
        assert all(each in reactor.backlogged for each in reactor.stalled)
        assert all(each.paused and each not in reactor.talkers for each in reactor.pacing)
        doors = set(self.doors.values())
        if reactor.retry_at != batchat.NEVER or self.closes:
            doors = set()
        others = {sock for sock in self.selector.keys if sock not in connections}
        assert others - {self.signal} == doors
        behind = [each.outbox.behind for each in connections.values()]
        assert not reactor.held or max(behind) >= batchat.HOLD_BELOW, "held for nobody"
        assert reactor.held_until <= self.now + batchat.STALL_SECONDS, "held for too long"
        if reactor.held:
            self.reaches("held")
        if reactor.pacing:
            self.reaches("paced")
        for peer, connection in connections.items():
            self.check_connection(peer, connection, held)

    def check_connection(self, peer: Peer, connection: batchat.Connection, held: bool) -> None:
        reactor, outbox = self.reactor, connection.outbox
        key = self.selector.keys.get(peer)
        events = key.events if key else 0
        reads, writes = events & selectors.EVENT_READ, events & selectors.EVENT_WRITE
        assert bool(reads) == (not connection.paused and not peer.end_seen)
        assert writes or peer.short_since == batchat.NEVER, "a send was short, and nobody goes on"
        news = outbox.log.end > outbox.log.offered or connection in reactor.chat.told
        assert bool(writes) == bool(peer.unsent) or news
        too_private = outbox.private_bytes > batchat.PRIVATE_LIMIT
        rate = reactor.limits.rate
        if rate:
            most = rate * (self.now - peer.arrived_at + batchat.BURST_SECONDS) + 1
            assert len(peer.events) <= most, "more lines than the rate lets through"
        in_line = connection in reactor.talkers or connection in reactor.pacing
        assert in_line or too_private or not connection.paused
        late = outbox.behind > batchat.HOLD_ABOVE
        was_late = peer.late_since != batchat.NEVER
        peer.late_since = min(peer.late_since, self.now) if late else batchat.NEVER
        assert not self.is_late(batchat.STALL_SECONDS, peer.late_since), "not dropped in time"
        if was_late and late:
            assert not self.is_late(batchat.STALL_SECONDS, peer.short_since), "takes nothing"
        to_read = peer.arrived or ((peer.ended or peer.broken) and not peer.end_seen)
        if to_read and not (too_private or connection in reactor.pacing):
            peer.waits_since = min(peer.waits_since, self.now)
            peer.waits_turns += not held
            # Each of those in line may fill the room, and each listener may hold it once.
            most = len(reactor.connections) + 1
            assert peer.waits_turns <= most, "read too late, in turns"
            seconds = most * (batchat.STALL_SECONDS + 0.1)  # each may come a little late
            assert self.now - peer.waits_since <= seconds, "in seconds"
        else:
            peer.waits_since, peer.waits_turns = batchat.NEVER, 0

    # What must be so in the end

    def settle(self) -> None:
        """Let everyone read and time pass, until nothing is under way any more."""
        for peer in self.peers:
            if peer.vanished_at == batchat.NEVER:
                peer.room = BOUNDLESS
        for _ in range(1000):
            self.step_waits(1.0)
            open_now = [each for each in self.peers if not each.closed]
            if not (
                self.reactor.talkers
                or self.reactor.pacing
                or any(p.arrived or p.unsent or p.error_seen for p in open_now)
                or any(door.waiting for door in self.doors.values())
            ):
                return
        raise AssertionError("something is left to do for ever")

    def check_that_nothing_is_lost(self) -> None:
        """All that was typed was understood, and all that was owed was sent."""
        for peer in self.peers:
            events, replies = (events_of if peer.wire is TelnetWire else web_events_of)(peer.typed)
            if peer.end_seen and (peer.wire is TelnetWire or events[-1:] != [WireEvent.LEAVE]):
                events.append(WireEvent.LEAVE)
            seen = undated(peer.replies)
            assert events[: len(peer.events)] == peer.events
            assert replies.startswith(seen)
            if peer.is_here or peer.why == os.strerror(peer.broken):
                assert (peer.events, seen) == (events, replies)
                assert not (peer.ended and peer.is_here)
            if not peer.closed:
                assert peer.owed == peer.got

    def everybody_hangs_up(self) -> None:
        for peer in self.peers:
            peer.ended = True
        self.step_waits(VANISHED_SECONDS)
        assert all(each.closed for each in self.peers)
        assert not any(log.data for log in self.reactor.chat.logs.values())

    def the_room_closes(self) -> None:
        self.selector.register(self.signal, selectors.EVENT_READ, self.stop)
        self.budget, self.segment, self.polite = batchat.NEVER, BOUNDLESS, True
        here = [each for each in self.by_arrival if each.is_here]
        open_now = [each for each in self.peers if not each.closed]
        for peer in open_now:
            peer.ended |= peer.shut
        all_read = all(each.reads_all for each in open_now)
        self.reactor.run()
        assert not self.is_late(0.1 if all_read else batchat.SHUTDOWN_SECONDS, self.stopped_at)
        assert all(each.closed for each in self.by_arrival)
        assert all(door.closed for door in self.doors.values())
        for peer in here:
            if peer.reads_all and not peer.broken and not peer.error_seen:
                assert peer.owed == peer.got

    def stop(self) -> None:
        self.selector.unregister(self.signal)
        self.stopped_at = self.now
        self.reactor.stop()
        for peer in self.peers:  # those who left in this very turn read the reason of the rest
            if peer.since_turn == self.turns and peer.owed.endswith(NORMAL):
                peer.owed[-len(NORMAL) :] = GOING_AWAY


def line_on(wire: type[batchat.Wire], line: str) -> bytes:
    return masked(1, line.encode()) if wire is WebWire else line.encode() + b"\r\n"


def every(step: str, *choices) -> st.SearchStrategy:
    """One of all the ways to take a step."""
    return st.sampled_from([(step, *how) for how in itertools.product(*choices)])


WHO = range(5)
HOSTS = ["127.0.0.1", "203.0.113.5", "::ffff:203.0.113.5", "2001:db8::7"]
CHAT = [
    *("hi", "how are you?", "x" * 80, "y" * 90, "z" * 101, "", "h\u00e9\x1b[2J", "//slash"),
    *("/who", "/help", "/me waves", "/msg ann psst", "/msg bob " + "p" * 80, "/msg cy", "/nope"),
    *("/nick eve", "/nick ann", "/nick Bob", "/quit", "GET / HTTP/1.1", "ann", "a b"),
]
GARBAGE = [  # for telnet, and for a browser
    *[(b"half a li", masked(1, b"frag", False)), (b"\r", masked(0, b"ment")), (b"\n", OPENING)],
    *[(b"\xff\xf6", masked(9, b"ping")), (b"\xff\xfd\x06", masked(10, b"")), (b"\0", b"\x81")],
    *[(b"\xff", masked(1, b"hi")[:3]), (b"\xff\xfa\x1f\0", OPENING[:40]), (b"\xf0", OPENING[40:])],
    *[(b"\b", masked(1, b"a\nb")), (b"\xc3", masked(1, b"\xff")), (b"no end" * 99, b"G")],
    *[(b"\xff\xf6" * 60, masked(9, b"p" * 100) * 12), (b"\xff\xf1" * 99, masked(10, b"") * 99)],
    (b"\xff\xf6" * 60 + b"\n/quit\n" + b"\xff\xf1" * 2100, masked(9, b"pong" * 9) * 99),
    *[(b"\xff\xf4", masked(8, b"")), (b"\x04", masked(1, b"x" * 101)), (b"\xa9", b"\xa9\r\n\r\n")],
]
ERRORS = [errno.ECONNRESET, errno.EPIPE, errno.EHOSTUNREACH]
ACCEPT_ERRORS = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ECONNABORTED]
NAMES = ["ann", "bob", "cy", "eve", "Bob"]
JOINS = every("joins", [TelnetWire, WebWire], HOSTS, [1, 500], NAMES)
SAYS = every("says", WHO, CHAT, [1, 2, 30])
IGNORES = every("says", WHO, ["/ignore ann", "/ignore bob", "/ignore cy", "/ignore eve"], [1, 2])
FLOODS = every(
    "floods", WHO, ["x" * 80, "/who", "/msg bob " + "p" * 80], WHO, [0, 1, 1000], [0, 300, 600]
)
STALLS = every("reads", WHO, [0, 1, 10, 100], [0, 100])
READS = every("reads", WHO, [BOUNDLESS, 1, 100, 2500], [0])
TURNS = every("turns", [1, 2, 3], range(5), [BOUNDLESS, BOUNDLESS, 3, 40])
NETWORK_STEPS = st.one_of(
    TURNS,
    TURNS,
    JOINS,
    JOINS,
    SAYS,
    SAYS,
    IGNORES,
    FLOODS,
    FLOODS,
    FLOODS,
    FLOODS,
    STALLS,
    READS,
    every("calls", [TelnetWire, WebWire], HOSTS, [1, 50, 500], [True, False]),
    every("sends", WHO, GARBAGE),
    st.tuples(
        st.just("sends"), st.sampled_from(WHO), st.binary(max_size=9).map(lambda data: (data, data))
    ),
    every("waits", [0.5, 0.05, 1.9, 2.1, 2.1]),
    every("waits", [2.1, 6.0, 11.0, 31.0, 125.0]),
    every("ends", WHO),
    every("breaks", WHO, ERRORS, [True, False]),
    every("vanishes", WHO),
    every("send_fails", WHO),
    every("jumps", [0.3, 3.0, 100.0]),
    every("accept_fails", [TelnetWire, WebWire], ACCEPT_ERRORS, [0.5, 1.5]),
)
LIMITS = st.sampled_from(
    [Limits(*each) for each in itertools.product([10, 0, 0], [1000, 1000, 3], [0, 0, 2])]
)
EVENTS = st.sampled_from(range(0, 61, 4)).flatmap(
    lambda n: st.lists(NETWORK_STEPS, min_size=n, max_size=n)
)
# Often some people are there already, so that there is somebody to talk to.
HISTORIES = st.tuples(st.lists(JOINS, max_size=4), EVENTS).map(
    lambda parts: [*parts[0], ("turns", 2, 0, BOUNDLESS), *parts[1]]
)
ENDS = st.sampled_from(["all hang up", "the room closes", "the room closes at once"])
WORLDS = st.tuples(LIMITS, st.sampled_from([0.0, 1e-4]), HISTORIES, ENDS, st.booleans())


SLOW_LISTENERS = [
    ("joins", TelnetWire, "127.0.0.1", 1, "ann"),
    ("joins", WebWire, "127.0.0.1", 1, "bob"),
    ("turns", 2, 0, BOUNDLESS),
    ("floods", 1, "/msg bob " + "p" * 80, 0, 0, 300),
    ("waits", 11.0),
    ("floods", 1, "x" * 80, 0, 0, 300),
    ("waits", 6.0),
    ("joins", TelnetWire, "127.0.0.1", 1, "cy"),
    ("turns", 2, 0, BOUNDLESS),
    ("floods", 1, "x" * 80, 0, 0, 0),
    ("waits", 6.0),
]


def simulate(limits: Limits, drift: float, history: list, end: str, sendmsg: bool) -> World:
    """One run of the world, from the first caller until everybody has gone."""
    ours = mock.Mock(exception=mock.Mock(side_effect=AssertionError))
    with mock.patch.multiple(batchat, HAS_SENDMSG=sendmsg, logger=ours, **SMALL_LIMITS):
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


def test_whatever_the_network_does_everyone_reads_all_that_they_must_and_nothing_else():
    reached: Counter[str] = Counter()

    @settings(max_examples=1000)
    @example((Limits(0, 9, 0), 0.0, SLOW_LISTENERS, "all hang up", True))
    @given(WORLDS)
    def runs(how):
        reached.update(simulate(*how).reached)

    runs()
    assert {*DISMISSALS, "takes nothing", "too far behind"} <= reached.keys()
    assert {"held", "paced", "accept fails", "too much to read"} <= reached.keys()


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
            number = self.random.randrange(1000)
            if chance() < 0.5:
                house.call(4096 if chance() < 0.1 else 0).sends(b"p%d\r\n" % number)
            else:
                Browser(house, OPENING + masked(1, b"w%d" % number))
        caller = self.random.choice(house.callers)
        what = chance()
        with contextlib.suppress(OSError):  # we ended it already, or our buffers are full
            if what < 0.02:
                caller.hangs_up()
            elif what < 0.03:
                caller.resets()
            elif what < 0.04:
                caller.says_no_more()
            elif what < 0.1:
                caller.reading = not caller.reading
            else:
                wire = WebWire if isinstance(caller, Browser) else TelnetWire
                times = 100 if what < 0.11 else 1
                caller.sock.send(line_on(wire, self.random.choice(CHAT)) * times)
        house.callers = [
            each for each in house.callers if each.sock.fileno() >= 0 and not each.gone
        ]

    def goes_on(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.stirs()
            self.house.clock.time += 0.01
            self.house.turn()
            reactor = self.house.reactor
            self.most = max(self.most, len(reactor.chat.people))
            states = {"held": reactor.held, "stalled": reactor.stalled, "paced": reactor.pacing}
            self.reached.update(state for state, so in states.items() if so)
        for caller in self.house.callers:
            caller.hangs_up()
        for _ in range(100):  # what they have sent is still said, at its pace
            self.house.wait(1.0)
        assert_nothing_is_left(self.house)
        self.house.callers.clear()


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
    assert crowd.reached.keys() == {"held", "stalled", "paced"}


# --------------------------------------------------------------------------
# python batchat.py
# --------------------------------------------------------------------------


def command_line(*options: str, descriptors: str = "") -> list[str]:
    command = [sys.executable, str(BATCHAT), *options]
    if descriptors:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    return command


class Server(contextlib.AbstractContextManager):
    """`python batchat.py` in a process of its own, on a free port."""

    def __init__(self, *options: str, descriptors: str = "") -> None:
        self.process = subprocess.Popen(
            command_line("--port", "0", *options, descriptors=descriptors),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.opening_line = self.process.stdout.readline()
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
        line.reads(batchat.GREETING + f"Hey, {name}! Hope you enjoy the chat.\n\n")
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
        expected = text.replace("\n", "\r\n").encode()
        got = b""
        while len(got) < len(expected):
            more = self.sock.recv(len(expected) - len(got))
            assert more, f"the line ended after {got!r}"
            got += more
        assert got == expected

    def sees_the_end(self) -> None:
        assert self.sock.recv(100) == b""
        self.sock.close()


BRIEF_OPENING = (
    "   ____      _       _____     ____   _   _      _       _____   \r\n"
    'U | __")uU  /"\\  u  |_ " _| U /"___| |\'| |\'| U  /"\\  u  |_ " _|  \r\n'
    " \\|  _ \\/ \\/ _ \\/     | |   \\| | u  /| |_| |\\ \\/ _ \\/     | |    \r\n"
    "  | |_) | / ___ \\    /| |\\   | |/__ U|  _  |u / ___ \\    /| |\\   \r\n"
    "  |____/ /_/   \\_\\  u |_|U    \\____| |_| |_| /_/   \\_\\  u |_|U   \r\n"
    " _|| \\\\_  \\\\    >>  _// \\\\_  _// \\\\  //   \\\\  \\\\    >>  _// \\\\_  \r\n"
    '(__) (__)(__)  (__)(__) (__)(__)(__)(_") ("_)(__)  (__)(__) (__)\r\n'
    "\r\n"
    "Welcome to BATCHAT local reviews and chat!\r\n"
    "\r\n"
    "Please enter your name, and press enter: "
)


def test_the_session_of_the_brief_comes_out_byte_for_byte():
    with Server() as server:
        jonny, stopfarm = server.join("jonny"), server.join("JStopfarm")
        jonny.reads("* JStopfarm has joined the chat\n")
        mike = server.call()
        mike.reads(BRIEF_OPENING.replace("\r\n", "\n"))
        mike.types("mike")
        mike.reads("Hey, mike! Hope you enjoy the chat.\n\n")
        for other in (jonny, stopfarm):
            other.reads("* mike has joined the chat\n")
        mike.types("hey everyone!")
        jonny.reads("<mike> hey everyone!\n")
        jonny.types("hi mike!")
        mike.reads("<jonny> hi mike!\n")
        mike.types("screw you jonny you dumb loser get THE HELL OUT OF HERE")
        jonny.reads("<mike> screw you jonny you dumb loser get THE HELL OUT OF HERE\n")
        jonny.types("sorry")
        mike.reads("<jonny> sorry\n")
        jonny.types("/quit")
        jonny.sees_the_end()
        mike.reads("* jonny has quit the chat\n")
        stopfarm.types("mike is that you?")
        mike.reads("<JStopfarm> mike is that you?\n")
        mike.types("/quit")
        mike.sees_the_end()


class Terminal(contextlib.AbstractContextManager):
    """A real telnet on a pseudo-terminal."""

    def __init__(self, port: int) -> None:
        import pty

        self.process, self.screen = pty.fork()
        if not self.process:
            os.execvp("telnet", ["telnet", "127.0.0.1", str(port)])
        self.seen = b""
        self.shows("Escape character is '^]'.\r\n")

    def types(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def shows(self, text: str) -> None:
        """Wait for this text on the screen, and forget all up to it."""
        give_up = time.monotonic() + PATIENCE
        while text.encode() not in self.seen:
            assert time.monotonic() < give_up, (text, self.seen)
            with selectors.DefaultSelector() as selector:
                selector.register(self.screen, selectors.EVENT_READ)
                if selector.select(1):
                    try:
                        self.seen += os.read(self.screen, 4096)
                    except OSError:  # how Linux says that telnet has ended
                        assert text.encode() in self.seen, (text, self.seen)
        self.seen = self.seen.partition(text.encode())[2]

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.screen)


needs_telnet = pytest.mark.skipif(not shutil.which("telnet"), reason="telnet is not installed")


@needs_telnet
def test_the_session_with_the_real_telnet():
    with Server() as server, Terminal(server.port) as mike:
        mike.shows(BRIEF_OPENING)
        mike.types("mike\n")
        mike.shows("Hey, mike! Hope you enjoy the chat.\r\n\r\n")
        jonny = server.join("jonny")
        mike.shows("* jonny has joined the chat\r\n")
        mike.types("hey everyone!\n")
        jonny.reads("<mike> hey everyone!\n")
        jonny.types("hi mike!")
        mike.shows("<jonny> hi mike!\r\n")
        mike.types("/quit\n")
        mike.shows("Connection closed by foreign host.")
        jonny.reads("* mike has quit the chat\n")


@needs_telnet
@pytest.mark.parametrize("key", ["\x03", "\x04\n\x04"])
def test_ctrl_c_and_ctrl_d_in_the_real_telnet_leave(key):
    with Server() as server, Terminal(server.port) as mike:
        jonny = server.join("jonny")
        mike.shows(batchat.PROMPT)
        mike.types("mike\n")
        jonny.reads("* mike has joined the chat\n")
        mike.types(key)
        mike.shows("Connection closed by foreign host.")
        jonny.reads("* mike has quit the chat\n")


@needs_telnet
def test_ctrl_z_in_the_real_telnet_freezes_nothing():
    with Server() as server, Terminal(server.port) as mike:
        jonny = server.join("jonny")
        mike.shows(batchat.PROMPT)
        mike.types("mike\n")
        jonny.reads("* mike has joined the chat\n")
        mike.types("\x1a")  # suspend: telnet shows nothing until its timing mark comes back
        mike.types("go on\n")
        jonny.reads("<mike> go on\n")
        jonny.types("can you see this?")
        mike.shows("<jonny> can you see this?\r\n")


def test_a_peer_that_is_killed_has_quit():
    with Server() as server:
        mike = server.join("mike")
        vandal = f"import socket; s = socket.create_connection(('127.0.0.1', {server.port}));"
        vandal += "s.sendall(b'jonny\\n'); s.recv(999); input()"
        with subprocess.Popen([sys.executable, "-c", vandal], stdin=subprocess.PIPE) as jonny:
            mike.reads("* jonny has joined the chat\n")
            jonny.kill()
        mike.reads("* jonny has quit the chat\n")


def test_it_listens_on_ipv4_and_ipv6_and_says_so():
    with Server() as server:
        if not socket.has_dualstack_ipv6():
            pytest.skip("this box has no IPv6")
        assert "every address of this box (IPv4 and IPv6)" in server.opening_line
        assert f"telnet localhost {server.port}" in server.opening_line
        mike, jonny = server.join("mike"), server.join("jonny", host="::1")
        jonny.types("hi mike!")
        mike.reads("* jonny has joined the chat\n<jonny> hi mike!\n")


def test_it_listens_on_one_address_alone_when_told_to():
    with Server("--host", "127.0.0.1") as server:
        assert f"Join it: telnet 127.0.0.1 {server.port}" in server.opening_line
        server.join("mike")
        with pytest.raises(ConnectionRefusedError):
            server.call("127.0.0.2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_closes_the_house_well(number):
    with Server() as server:
        mike, caller = server.join("mike"), server.call()
        caller.reads(batchat.GREETING)
        server.process.send_signal(number)
        for each in (mike, caller):
            each.reads("* BATCHAT is closing, goodbye!\n")
            each.sees_the_end()
        status, log = server.ends()
        assert status == 0
        assert "Traceback" not in log


def test_a_closing_house_waits_for_nobody_for_ever():
    with Server() as server:
        server.join("mike")  # who never hangs up
        server.process.send_signal(signal.SIGTERM)
        assert server.ends()[0] == 0


def test_a_second_signal_ends_it_at_once():
    with Server() as server:
        mike = server.join("mike")
        server.process.send_signal(signal.SIGINT)
        mike.reads("* BATCHAT is closing, goodbye!\n")  # but mike does not hang up
        server.process.send_signal(signal.SIGTERM)
        assert server.ends()[0] == -signal.SIGTERM


def test_with_64_descriptors_and_120_callers_those_inside_chat_on_and_newcomers_get_in_later():
    with Server(descriptors="64") as server:
        mike, ann = server.join("mike"), server.join("ann")
        mike.reads("* ann has joined the chat\n")
        callers = [server.call() for _ in range(120)]
        told = []
        for caller in callers:
            first = caller.sock.recv(len(batchat.FULL))
            told.append(first.startswith(b"* BATCHAT is full"))
        assert 20 < told.count(False) < 62
        assert told.count(True) == 120 - told.count(False)
        mike.types("still there?")
        ann.reads("<mike> still there?\n")
        for caller in callers:
            caller.sock.close()
        # They are gone when the server has seen it; until then a newcomer is told to come again.
        give_up = time.monotonic() + PATIENCE
        while server.call().sock.recv(1) == b"*":
            assert time.monotonic() < give_up
        server.join("late")
        mike.reads("* late has joined the chat\n")


def test_the_page_and_the_websocket_are_on_a_second_port_that_the_opening_line_names():
    with Server("--web-port", "0") as server:
        mike = server.join("mike")
        with urllib.request.urlopen(f"http://127.0.0.1:{server.web_port}/hello") as reply:
            assert reply.read() == b"Hello, World!"
        ann = socket.create_connection(("127.0.0.1", server.web_port), timeout=PATIENCE)
        ann.sendall(OPENING + masked(1, b"ann"))
        mike.reads("* ann has joined the chat\n")
        ann.close()
        mike.reads("* ann has quit the chat\n")


def test_where_the_web_port_is_taken_a_free_one_does_unless_that_very_one_was_asked_for():
    with socket.create_server(("127.0.0.1", batchat.WEB_PORT)) if port_is_free(
        batchat.WEB_PORT
    ) else contextlib.nullcontext(), Server("--host", "127.0.0.1") as server:
        assert server.web_port not in (0, batchat.WEB_PORT)
        done = run("--host", "127.0.0.1", "--port", "0", "--web-port", str(server.web_port))
    assert done.returncode == 1
    assert re.fullmatch(r"batchat: .*port \d+: Address already in use\n", done.stderr)


def port_is_free(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
        return True
    return False


def test_no_web_opens_no_door_for_browsers():
    with Server("--no-web") as server:
        assert server.web_port == 0
        assert "http" not in server.opening_line
        server.join("mike")


class Chromium(contextlib.AbstractContextManager):
    """A real browser, driven through chromedriver (W3C WebDriver)."""

    ARGUMENTS = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
        " disable-background-networking disable-component-update disable-dev-shm-usage"
    )

    def __init__(self, url: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.path = f"http://127.0.0.1:{port}"
        wait_until(lambda: self.ask("GET", "/status")["ready"])
        arguments = [f"--{each}" for each in self.ARGUMENTS.split()]
        options = {
            "goog:chromeOptions": {"args": [*arguments, "--window-size=800,500"]},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        session = self.ask("POST", "/session", capabilities={"alwaysMatch": options})
        self.path += "/session/" + session["sessionId"]
        self.ask("POST", "/url", url=url)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.ask("DELETE", "")
        self.driver.kill()
        self.driver.wait()

    def ask(self, method: str, path: str, **body: object):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.path + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def does(self, script: str):
        return self.ask("POST", "/execute/sync", script=script, args=[])

    def types(self, text: str) -> None:
        """Press keys, wherever the keyboard is."""
        keys = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        action = {"type": "key", "id": "keyboard", "actions": keys}
        self.ask("POST", "/actions", actions=[action])

    def shows(self, text: str) -> None:
        wait_until(lambda: text in self.does("return document.body.innerText"))

    def complaints(self) -> list[str]:
        """What its console has said since the last look."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", type="browser")]


def wait_until(condition) -> None:
    give_up = time.monotonic() + 3 * PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


needs_chromium = pytest.mark.skipif(
    not shutil.which("chromedriver"), reason="chromedriver is not installed"
)
ENTER = "\ue007"


@needs_chromium
def test_people_in_chromium_and_in_telnet_talk_in_one_room():
    with Server("--web-port", "0") as server:
        url, ports = f"http://localhost:{server.web_port}/", (server.port, server.web_port)
        with Chromium(url) as mike:
            mike.shows('U | __")uU')
            mike.shows(batchat.PROMPT.strip())
            mike.types("mike" + ENTER)
            mike.shows("Hey, mike! Hope you enjoy the chat.")
            jonny = server.join("jonny")
            mike.shows("* jonny has joined the chat")
            mike.types("hey everyone!" + ENTER)
            jonny.reads("<mike> hey everyone!\n")
            mike.shows("hey everyone!")
            assert mike.does("return document.querySelector('.own:last-child').textContent")
            assert "<mike> hey" not in mike.does("return document.body.innerText")
            jonny.types("<b>bold</b> <script>document.title = 'hacked'</script> &amp;", "/me waves")
            mike.shows("<jonny> <b>bold</b> <script>document.title = 'hacked'</script> &amp;")
            mike.shows("** jonny waves")
            jonny.types("/msg mike psst")
            mike.shows("[jonny -> you] psst")
            classes = (
                "return [...document.querySelectorAll('main p')].slice(-3).map(p => p.className)"
            )
            assert mike.does(classes) == ["said", "action", "private"]
            hues = "return [...document.querySelectorAll('.name')].map(n => n.style.cssText)"
            assert len(set(mike.does(hues))) == 1
            assert mike.does("return document.title") == "BATCHAT"

            # Who has scrolled up is not moved, and sees how many lines are new.
            jonny.types(*["line"] * 40)
            wait_until(lambda: mike.does("return document.querySelectorAll('.said').length > 40"))
            mike.does("document.querySelector('main').scrollTop = 0")
            jonny.types("one more")
            mike.shows("1 new line")
            assert mike.does("return document.querySelector('main').scrollTop") == 0
            mike.does("document.querySelector('#more').click()")
            wait_until(lambda: mike.does("return document.querySelector('#more').hidden"))
            assert mike.does("return document.querySelector('main').scrollTop") > 0

            # While the tab is hidden, the title counts the lines that nobody has seen.
            hide = "Object.defineProperty(document, 'hidden', {{value: {}, configurable: true}});"
            mike.does(hide.format("true"))
            jonny.types("psst", "hey")
            wait_until(lambda: mike.does("return document.title") == "(2) BATCHAT")
            mike.does(
                hide.format("false") + "document.dispatchEvent(new Event('visibilitychange'))"
            )
            assert mike.does("return document.title") == "BATCHAT"
            assert mike.complaints() == []

            # A restart: it says that the line is lost, comes back, and takes its name again.
            server.process.kill()
            server.process.wait()
            mike.shows("The line is lost.")
            with Server("--port", str(ports[0]), "--web-port", str(ports[1])) as again:
                wait_until(lambda: "\nmike\n" in who_is_here(again))
                assert mike.does("return document.querySelectorAll('.banner').length") == 7
                jonny = again.join("jonny")
                mike.shows("* jonny has joined the chat")

                # A lost line: the name may still be taken for a while; it tries until it has it.
                mike.does("pause = 2; socket.close()")
                jonny.reads("* mike has quit the chat\n")
                jonny.types("/nick mike")
                mike.shows("Trying again in 4 s.")
                jonny.types("/nick jonny")
                jonny.reads("* jonny is now known as mike\n* mike is now known as jonny\n")
                jonny.reads("* mike has joined the chat\n")
                mike.types("/nick mick" + ENTER)
                jonny.reads("* mike is now known as mick\n")
                mike.types("/quit" + ENTER)
                jonny.reads("* mick has quit the chat\n")
                mike.shows("You have left. Press Enter to join again.")
                assert all("WebSocket connection" in each for each in mike.complaints())


def who_is_here(server: Server) -> str:
    """The names in a room, each on a line of its own."""
    line = server.join("who")
    line.types("/who", "/quit")
    answer = b""
    while data := line.sock.recv(4096):
        answer += data
    return answer.decode().replace("here: ", "\n").replace(", ", "\n").replace("\r", "")


def run(*options: str, descriptors: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line(*options, descriptors=descriptors),
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE,
    )


def test_too_few_descriptors_is_one_clear_line_and_status_1():
    done = run(descriptors="30")
    assert done.returncode == 1
    assert done.stderr == "batchat: too few descriptors are allowed; see ulimit -n\n"


def test_a_port_that_is_taken_is_one_clear_line_and_status_1():
    with Server() as server:
        done = run("--port", str(server.port))
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"batchat: .*port \d+: Address already in use\n", done.stderr)


@pytest.mark.parametrize("host", ["256.1.1.1", "not a host", "192.0.2.1", "x" * 70])
def test_a_bad_address_is_one_clear_line_and_status_1(host):
    done = run("--host", host, "--port", "0")
    assert done.returncode == 1
    assert re.fullmatch(r"batchat: can't listen on .*\n", done.stderr)


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "65536"],
        ["--port", "x"],
        ["--rate", "-1"],
        ["--max-people", "-5"],
        ["--nonsense"],
        ["x"],
    ],
)
def test_a_bad_option_is_explained_with_status_2(options):
    done = run(*options)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: batchat.py")
    assert "Traceback" not in done.stderr


def test_help_names_every_option_and_version_the_version():
    shown = run("--help").stdout
    for option in [
        "--host",
        "--port",
        "--rate",
        "--max-people",
        "--max-per-address",
        "--web-port",
        "--no-web",
        "--verbose",
        "--version",
    ]:
        assert option in shown
    assert run("--version").stdout == f"BATCHAT {batchat.__version__}\n"


def test_it_is_a_single_file_that_runs_wherever_it_is_copied(tmp_path):
    copied = shutil.copy(BATCHAT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", copied, "--version"],
        capture_output=True,
        check=False,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout == f"BATCHAT {batchat.__version__}\n"


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
    assert [(row[0].strip("| "), row[1]) for row in rows] == [
        ("flat out, 20 people", "BATCHAT"),
        ("flat out, 20 people", "nats"),
        ("one at a time, 20 people", "BATCHAT"),
        ("one at a time, 20 people", "nats"),
        ("one stalls, 10 people", "BATCHAT"),
        ("one stalls, 10 people", "nats"),
        ("growth, 10 people", "BATCHAT"),
        ("growth, 100 people", "BATCHAT"),
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
