"""Tests of the bots and the bridge, with real servers in processes of their own."""
import collections
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

NEEDED = "needs the packages of examples/requirements.txt"
pytest.importorskip("nats", reason=NEEDED)
websockets = pytest.importorskip("websockets", reason=NEEDED)
connect = pytest.importorskip("websockets.sync.client").connect
FAILURES = (OSError, websockets.WebSocketException)
HERE = Path(__file__).parent


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Process:
    """A program that can be stopped and started again; `log` is a file."""
    def __init__(self, path, *command):
        self.log, self.command = path, [str(each) for each in command]

    def start(self):
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        return self

    def stop(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(10)


class Person(threading.Thread):
    """Somebody in a room who comes back after a lost connection, and says what was not said."""
    def __init__(self, room, name):
        super().__init__(daemon=True)
        self.room, self.name, self.socket, self.lock = room, name, None, threading.Lock()
        self.events, self.unsaid, self.answers = {}, collections.deque(), 0
        self.start()
        wait_until(lambda: self.answers)

    def run(self):
        while True:
            with suppress(*FAILURES), connect(self.room.url) as connection:
                connection.send(self.name)
                connection.send("/help")  # answered after the history
                for message in connection:
                    self.take(connection, json.loads(message))
            time.sleep(0.05)

    def take(self, connection, event):
        if event["type"] == "greeting":
            self.run_id = event["room"]
        elif event["type"] == "help":
            with self.lock:
                for line in self.unsaid if self.socket is not connection else ():
                    connection.send(line)
                self.socket, self.answers = connection, self.answers + 1
        for each in event.get("events", [event] if "id" in event else []):
            is_new = (self.run_id, each["id"]) not in self.events
            self.events[self.run_id, each["id"]] = each
            if is_new and each["name"] == self.name and each["type"] in ("said", "did"):
                self.unsaid.popleft()

    def say(self, *lines):
        with self.lock, suppress(*FAILURES):  # after a failure, the next join says them
            self.unsaid.extend(lines)
            for line in lines:
                self.socket.send(line)

    def catch_up(self):  # with all that the room has sent by now
        answers = self.answers
        self.socket.send("/help")
        wait_until(lambda: self.answers > answers)

    def wait_for(self, text):
        wait_until(lambda: any(text in str(each) for each in list(self.events.values())))

    def lines(self):
        return [(e["name"], e["text"]) for e in list(self.events.values()) if e["type"] == "said"]

    def heard(self):
        """What was said in all rooms, by name@room."""
        heard = collections.defaultdict(list)
        for name, text in self.lines():
            room = "" if name == "bridge" else f"{name}@{self.room.name}: "
            who, _, text = (room + text).partition(": ")
            heard[who].append(text)
        return heard


class Town:
    """Rooms, each with a bridge and some people, and a nats-server."""
    def __init__(self, folder):
        self.folder, self.port, self.processes = folder, free_port(), {}
        self.people, self.said = [], collections.defaultdict(list)

    def open(self, *names, people=1, rate=0):
        if not shutil.which("nats-server"):
            pytest.skip("needs nats-server")
        options = ("-js", "-sd", self.folder, "-a", "127.0.0.1", "-p", self.port)
        self.processes["nats"] = Process(self.folder / "nats.log", "nats-server", *options).start()
        for name in names:
            room = self.add_room(name, "--rate", rate)
            self.add_bridge(name)
            self.people += [Person(room, f"{name[0]}{i}") for i in range(people)]
        logs = [self.processes[f"{name}-bridge"].log for name in names]
        wait_until(lambda: all("linked" in log.read_text() for log in logs))
        return self.people

    def add_process(self, name, *command):
        path = self.folder / f"{name}.log"
        self.processes[name] = Process(path, sys.executable, *command).start()
        return self.processes[name]

    def add_room(self, name, *options):
        port = free_port()
        options = ("--host", "127.0.0.1", "--port", 0, "--web-port", port, *options)
        room = self.add_process(name, HERE.parent / "batchat.py", "--history", 1000, *options)
        room.name, room.url = name, f"ws://127.0.0.1:{port}/chat"
        return room

    def add_bridge(self, name, *options, process="bridge"):
        urls = ("--room", self.processes[name].url, "--nats", f"nats://127.0.0.1:{self.port}")
        return self.add_process(f"{name}-{process}", HERE / "bridge.py", name, *urls, *options)

    def talk(self, count):
        """Everyone says `count` lines more; returns when half of them have come across."""
        half = sum(map(len, self.said.values())) + count * len(self.people) // 2
        for person in self.people:
            lines = self.said[f"{person.name}@{person.room.name}"]
            new = [f"line {len(lines) + i}" for i in range(count)]
            lines += new
            person.say(*new)
        wait_until(lambda: any(len(each.lines()) > half for each in self.people))

    def kill(self, name, count):
        """Kill a server or a bridge, and start it again."""
        process = self.processes[name]
        if name == "west":  # when it has sent all: its last lines would be lost to some
            self.repeats()
            process.process.send_signal(signal.SIGSTOP)
            self.talk(count)  # what is said to it now is said again
        process.stop()
        process.start()

    def repeats(self):
        """How many lines came twice; everyone must have heard all, in each one's order."""
        total = sum(map(len, self.said.values()))
        wait_until(lambda: all(len(set(each.lines())) >= total for each in self.people))
        for person in self.people:
            person.catch_up()
            heard = person.heard()
            assert {who: list(dict.fromkeys(heard[who])) for who in heard} == self.said
        return max(len(each.lines()) for each in self.people) - total


@pytest.fixture
def town(tmp_path):
    town = Town(tmp_path)
    yield town
    for process in town.processes.values():
        process.stop()


def test_bot_of_the_readme_answers(town, tmp_path):
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n([^`]*websockets[^`]*)```", text)
    room = town.add_room("east")
    ann, _ = Person(room, "ann"), Person(room, "bot")  # so that the name is taken
    (tmp_path / "bot.py").write_text(code[1].replace("ws://localhost:1338/chat", room.url))
    town.add_process("bot", tmp_path / "bot.py")
    ann.wait_for("bot_")
    ann.say("!hello")
    ann.wait_for("Hello, ann!")


def test_bot_tells_the_time_and_greets(town):
    room = town.add_room("east")
    ann, _ = Person(room, "ann"), Person(room, "clock")  # so that the name is taken
    town.add_process("bot", HERE / "bot.py", room.url)
    ann.wait_for("clock_")
    ann.say("!time")
    ann.wait_for("It is ")
    Person(room, "bob")
    ann.wait_for("Hello, bob!")


def test_bot_comes_back_after_a_restart(town):
    room = town.add_room("east")
    ann = Person(room, "ann")
    town.add_process("bot", HERE / "bot.py", room.url)
    ann.wait_for("clock")
    room.stop()
    room.start()
    wait_until(lambda: ann.say("!time") or "It is " in str(ann.lines()))


def test_bridge_repeats_what_is_said_and_done(town):
    ann, bob = town.open("east", "west")
    ann.say("hi", "/me waves", "bye")
    bob.wait_for("bye")
    lines = ["e0@east: hi", "** e0@east waves", "e0@east: bye"]
    assert bob.lines() == [("bridge", each) for each in lines]
    assert "bridge" not in dict(ann.lines())  # it does not come back


def test_bridge_keeps_what_is_private(town):
    ann, _, bob, _ = town.open("east", "west", people=2)
    for line in "/msg e1 psst", "/msg bridge psst", "/who", "/nick":
        ann.socket.send(line)
    ann.say("hi")
    bob.wait_for("hi")
    assert bob.lines() == [("bridge", "e0@east: hi")]


def test_bridge_tells_presence_where_asked(town):
    ann, bob = town.open("east", "west")
    room, bridge = town.add_room("north"), town.add_bridge("north", "--presence")
    wait_until(lambda: "linked" in bridge.log.read_text())
    cat, _ = Person(room, "cat"), Person(town.processes["west"], "dan")
    for person, line in (cat, "cat@north: hi"), (bob, "w0@west: hi"):
        person.say("hi")
        ann.wait_for(line)
    assert [text for _, text in ann.lines() if "joined" in text] == ["* cat@north has joined"]


def test_bridge_splits_lines_too_long(town):
    ann, bob = town.open("east", "west")
    words, letters = "word " * 818 + "words", "\N{GRINNING FACE}" * 1024
    ann.say(words, letters, "end")
    bob.wait_for("end")
    heads, _, texts = zip(*(text.partition(": ") for _, text in bob.lines()))
    assert set(heads) == {"e0@east"}
    assert [" ".join(texts[:2]), "".join(texts[2:4])] == [words, letters]


def test_bridge_refuses_a_second_of_its_name(town):
    town.open("east")
    second = town.add_bridge("east", process="second")
    assert second.process.wait(30) == 1
    assert second.log.read_text().endswith("has a bridge named east already: choose another\n")


def test_bridge_waits_quietly_for_nats(town):
    ann, bob = town.open("east", "west")
    assert town.processes["east-bridge"].stop(signal.SIGINT) == 0
    town.processes["nats"].stop()
    bridge = town.add_bridge("east", process="late")
    for count in 1, 2:
        town.processes["nats"].stop()
        wait_until(lambda count=count: bridge.log.read_text().count("again") == count)
        ann.say(f"hi {count}")
        time.sleep(3)  # it tries again
        town.processes["nats"].start()
        bob.wait_for(f"e0@east: hi {count}")
    assert re.findall("trying again|Traceback", bridge.log.read_text()) == ["trying again"] * 2


def test_bridge_catches_up_from_the_history(town):
    ann, bob = town.open("east", "west")
    for text in "one", "two":
        town.processes["east-bridge"].stop()
        ann.say(text)
        wait_until(lambda: not ann.unsaid)
        town.processes["east-bridge"].start()
        bob.wait_for(text)
    assert bob.lines() == [("bridge", "e0@east: one"), ("bridge", "e0@east: two")]


@pytest.mark.parametrize("rate, count, killed", [
    (0, 56, ["nats"]), (0, 56, ["west"]), (0, 56, ["west-bridge"]),
    (10, 6, ["nats", "west", "west-bridge"])])
def test_faults_lose_nothing(town, rate, count, killed):
    """The line that a killed room or bridge was just saying may come twice."""
    town.open("east", "west", "north", people=3, rate=rate)
    for name in killed:
        town.talk(count)
        town.kill(name, count)
    town.talk(count)
    assert town.repeats() <= len({*killed} - {"nats"})
