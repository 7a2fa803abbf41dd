"""What BATCHAT promises, as tests that fail without it.

Rooms, as in batchat.py: the log and its listeners, the wire, the chat, the
reactor over real sockets, and at last `python batchat.py` itself, with the real
telnet program.  Everything talks to loopback addresses alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
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
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batchat
from batchat import Chat, Limits, Log, Outbox, Person, Reactor, State, TelnetWire, WireEvent

BATCHAT = Path(batchat.__file__)
PATIENCE = 20  # seconds that a test waits for what must come, before it gives up
GREETING = batchat.encode(batchat.GREETING)

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
        with memoryview(self.outbox.log.data) as view:
            sent = b"".join(self.outbox.pieces(view))[:most]
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


@given(st.lists(STEPS, max_size=60))
def test_every_listener_gets_just_what_a_list_of_their_own_would_hold(steps):
    log = Log()
    listeners = [Listener(log) for _ in range(4)]
    for step, *rest in steps:
        if step == "trim":
            log.trim(min([log.end, *(each.outbox.cursor for each in listeners)]))
        elif step == "say":
            at, (speaker, text) = log.end, rest
            log.append(text)
            for number, listener in enumerate(listeners):
                if number == speaker:
                    listener.outbox.skip(at, len(text))
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
    assert len(log) == 0


def test_one_send_never_takes_more_pieces_than_the_system_does():
    log = Log()
    listener = Listener(log)
    listener.outbox.enter()
    for _ in range(3000):
        log.append(b"a line")
        listener.outbox.insert(b"a reply")
    with memoryview(log.data) as view:
        assert 1000 <= len(listener.outbox.pieces(view)) <= 1024
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
    return events, wire.replies


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
# The chat
# --------------------------------------------------------------------------


class Guest(Person):
    """Somebody in a chat without sockets, whose screen is read line by line."""

    def __init__(self, chat: Chat) -> None:
        super().__init__("nowhere", Outbox(chat.log))
        self.chat = chat

    def types(self, *lines: str) -> None:
        for line in lines:
            self.chat.handle(self, line)

    def reads(self) -> str:
        """What was shown since the last look."""
        with memoryview(self.chat.log.data) as view:
            shown = b"".join(self.outbox.pieces(view))
        self.outbox.advance(len(shown))
        return shown.decode().replace("\r\n", "\n")


class Room:
    def __init__(self) -> None:
        self.chat = Chat()
        self.guests: list[Guest] = []

    def caller(self) -> Guest:
        guest = Guest(self.chat)
        self.chat.tell(guest, batchat.GREETING)
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


def test_empty_lines_are_ignorers(room):
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


def test_who_is_ignorers_is_not_heard_and_not_told_and_stays_so_through_a_new_name(room):
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

    def __init__(self, kind: type[selectors.BaseSelector], **limits: int) -> None:
        class Polling(kind):
            def select(self, timeout=None):
                return super().select(0)

        self.clock = Clock()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.reactor = Reactor(
            listener,
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
            before = [len(caller.unread) for caller in self.callers], len(self.reactor.connections)
            self.turn()
            after = [len(caller.unread) for caller in self.callers], len(self.reactor.connections)
            busy = self.reactor._patience() == 0 or before != after
            quiet = 0 if busy else quiet + 1

    def wait(self, seconds: float) -> None:
        self.clock.time += seconds
        self.settle()

    def call(self, buffer: int = 0) -> Caller:
        caller = Caller(self, buffer)
        self.callers.append(caller)
        return caller

    def join(self, name: str, buffer: int = 0) -> Caller:
        caller = self.call(buffer)
        caller.types(name)
        caller.reads(GREETING.decode() + f"Hey, {name}! Hope you enjoy the chat.\n\n")
        for other in self.callers:
            other.unread.clear()
        return caller

    def connection(self, name: str) -> batchat.Connection:
        return self.chat.people[batchat.name_key(name)]

    def close(self) -> None:
        for caller in self.callers:
            caller.sock.close()
        for connection in list(self.reactor.connections):
            self.reactor._forget(connection)
        with contextlib.suppress(KeyError, ValueError):
            self.reactor.selector.unregister(self.reactor.listener)
        self.reactor.listener.close()
        self.reactor.selector.close()


class Caller:
    """Somebody at the other end of a real socket."""

    def __init__(self, house: House, buffer: int) -> None:
        self.house = house
        self.sock = socket.socket()
        if buffer:  # bytes that the system keeps for a listener who does not read
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.connect(house.address)
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


@pytest.fixture(params=["epoll, sendmsg", "select, send"])
def houses(request, monkeypatch):
    """Makes houses; once with the best that the system has, once with the least."""
    kind = selectors.DefaultSelector
    if request.param == "select, send":
        monkeypatch.setattr(batchat, "HAS_SENDMSG", False)
        kind = selectors.SelectSelector
    with contextlib.ExitStack() as stack:

        def make(**limits: int) -> House:
            house = House(kind, **limits)
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
    assert not reactor.chat.people
    assert not reactor.chat.told
    assert not reactor.backlogged
    assert not reactor.talkers
    assert not any(reactor.countdowns)
    assert not reactor.callers
    assert len(reactor.selector.get_map()) == 1  # the listener


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
                before = len(house.chat.log), house.reactor.offered
                house.turn()
                if house.reactor.held and before == (len(house.chat.log), house.reactor.offered):
                    return count
    raise AssertionError("nothing held the talker back")


def test_a_listener_who_takes_nothing_holds_the_room_for_two_seconds_and_is_dropped(houses):
    house = houses(rate=0)
    ann, talker, sleeper = house.join("ann"), house.join("talker"), house.join("sleeper", 4096)
    sleeper.reading = False
    flood(house, talker)
    assert batchat.HOLD_ABOVE < len(house.chat.log) < batchat.WINDOW
    assert house.connection("talker").watched == 0
    house.wait(1.9)
    assert "sleeper" in house.chat.people
    ann.unread.clear()
    house.wait(0.2)
    assert "sleeper" not in house.chat.people
    assert b"* sleeper has quit the chat\r\n" in ann.unread
    assert not house.reactor.held
    house.settle()
    assert len(house.chat.log) == 0
    talker.sends(b"\r\nhello again\r\n")
    house.until(lambda: ann.unread.endswith(b"<talker> hello again\r\n"))


def test_talkers_go_on_when_the_slowest_listener_has_caught_up(houses):
    house = houses(rate=0)
    talker, slow = house.join("talker"), house.join("slow", 4096)
    slow.reading = False
    flood(house, talker)
    slow.reading = True
    house.until(lambda: len(house.chat.log) < batchat.HOLD_BELOW)
    house.until(lambda: not house.reactor.held)
    talker.sends(b"\r\nhello again\r\n")
    house.until(lambda: slow.unread.endswith(b"<talker> hello again\r\n"))
    assert "slow" in house.chat.people
    assert set(bytes(slow.unread).split(b"\r\n")) >= {b"<talker> " + LONG.encode()}


def test_a_listener_who_trickles_is_never_dropped_and_loses_nothing(houses):
    house = houses(rate=0)
    talker, slow = house.join("talker"), house.join("slow", 4096)
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
    house.connection("slow").sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    slow.reading = True
    house.until(lambda: len(house.chat.log) < batchat.HOLD_ABOVE - 10_000)
    slow.reading = False
    house.settle()
    assert house.reactor.held
    house.wait(2)
    before = house.reactor.offered
    house.until(lambda: house.reactor.offered > before or len(house.chat.log) > batchat.HOLD_ABOVE)


def test_who_does_not_read_private_replies_is_not_read_until_they_do(houses):
    house = houses(rate=0)
    mike = house.join("mike", 4096)
    connection = house.connection("mike")
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    mike.reading = False
    mike.sends(b"/help\n" * 2000)
    house.settle()
    assert batchat.PRIVATE_LIMIT < connection.outbox.private_bytes < batchat.PRIVATE_LIMIT + 1000
    assert not connection.watched & selectors.EVENT_READ
    mike.reading = True
    help_text = batchat.HELP.replace("\n", "\r\n").encode()
    house.until(lambda: len(mike.unread) == 2000 * len(help_text))
    assert mike.unread == help_text * 2000


def test_a_talker_who_never_stops_does_not_starve_the_others(houses):
    house = houses(rate=0)
    listener = house.join("listener")
    talkers = [house.join(f"talker{n}") for n in range(8)]
    for talker in talkers:
        with contextlib.suppress(BlockingIOError):
            while True:
                talker.sock.send(b"\xff" * 4094 + b"\n")  # of which nothing is left
    talkers[-1].sends(b"hello\n")
    house.until(lambda: b"<talker7> " in listener.unread)


def test_one_turn_reads_little_enough_that_the_log_keeps_to_its_window(houses):
    house = houses(rate=0)
    talkers = [house.join(f"talker-with-a-long-name{n}") for n in range(4)]
    for talker in talkers:
        with contextlib.suppress(BlockingIOError):
            while True:
                talker.sock.send(b"x\n" * 8192)
    for _ in range(20):
        house.turn()
        assert len(house.chat.log) <= batchat.WINDOW


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


class Elsewhere:
    """A listener whose callers come from wherever a test says; all else is real."""

    def __init__(self, listener: socket.socket, *hosts: str) -> None:
        self.listener = listener
        self.hosts = list(hosts)

    def __getattr__(self, name: str):
        return getattr(self.listener, name)

    def accept(self):
        sock, _ = self.listener.accept()
        return sock, (self.hosts.pop(0), 4321, 0, 0)


def test_too_many_people_from_one_address_are_turned_away(houses):
    house = houses(max_per_address=2)
    house.reactor.listener = Elsewhere(
        house.reactor.listener,
        *["203.0.113.5", "::ffff:203.0.113.5", "203.0.113.5", "203.0.113.6", "203.0.113.5"],
    )
    one, _two = house.join("one"), house.join("two")
    three = house.call()
    three.reads("* Too many people are here from your address, please try again later.\n")
    three.sees_the_end()
    three.hangs_up()
    house.join("four")
    one.hangs_up()
    house.settle()
    house.join("five")


def test_an_ipv6_64_counts_as_one_address_and_this_box_as_none():
    assert batchat.address_group("2001:db8::1") == batchat.address_group("2001:db8::ffff:2%eth0")
    assert batchat.address_group("2001:db8::1") != batchat.address_group("2001:db8:0:1::1")
    assert batchat.address_group("::ffff:192.0.2.1") == batchat.address_group("192.0.2.1")
    assert not any(map(batchat.address_group, ["127.0.0.1", "::1", "::ffff:127.1.2.3"]))


class Broken(Elsewhere):
    """A listener that can not accept."""

    def __init__(self, listener: socket.socket, code: int) -> None:
        super().__init__(listener)
        self.code = code
        self.calls = 0

    def accept(self):
        self.calls += 1
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ECONNABORTED])
def test_when_accept_fails_it_waits_a_second_without_spinning(house, code):
    mike = house.join("mike")
    listener = house.reactor.listener
    house.reactor.listener = broken = Broken(listener, code)
    ann = house.call()
    house.until(lambda: broken.calls)
    house.settle()
    assert broken.calls == 1
    assert house.reactor._patience() == 1
    mike.types("/who")
    mike.reads("* 1 here: mike\n")
    house.reactor.listener = listener
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

    def fail(self, view):
        assert self is not victim
        return pieces(self, view)

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
    assert house.reactor._patience() == 2
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


# --------------------------------------------------------------------------
# python batchat.py
# --------------------------------------------------------------------------


class Server(contextlib.AbstractContextManager):
    """`python batchat.py` in a process of its own, on a free port."""

    def __init__(self, *options: str, descriptors: str = "") -> None:
        command = [sys.executable, str(BATCHAT), "--port", "0", *options]
        if descriptors:
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.opening_line = self.process.stdout.readline()
        self.port = int(re.search(r"port (\d+)", self.opening_line)[1])

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


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BATCHAT), *options],
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE,
    )


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
