"""Links BATCHAT rooms over NATS: a bridge repeats in its room what is said in the others.

After a restart it resumes from the stream: from the Nats-Msg-Id ("ROOM-ID:EVENT-ID") of its room's
last line there, and from what it has acknowledged.  After any error it connects again."""
import argparse
import asyncio
import json
import logging
import textwrap
from contextlib import suppress

import nats
from websockets import ConnectionClosed, WebSocketException, connect

FAILURES = (OSError, asyncio.TimeoutError, nats.errors.Error, WebSocketException)
NATS = {"allow_reconnect": False, "max_reconnect_attempts": 1, "ping_interval": 10}
STREAM = {"duplicate_window": 3600, "max_msgs_per_subject": 1_000_000}
CONSUMER = {"deliver_policy": nats.js.api.DeliverPolicy.NEW, "max_ack_pending": 1, "ack_wait": 5}
BRIDGE = "bridge"  # our name in the room; nobody else can have it, so there are no loops
PRESENCE = {"joined": "* {name}@{room} has joined", "quit": "* {name}@{room} has quit",
            "kicked": "* {name}@{room} was kicked", "renamed": "* {name}@{room} is now {to}"}
PREFIXES = {"said": "{name}@{room}: ", "did": "** {name}@{room} ", **PRESENCE}


def is_after(ids, last):
    """Whether an event follows `last` in its room, or is of another run of the room's server."""
    (room, id), (last_room, last_id) = ids.split(":"), last.split(":")
    return room != last_room or int(id) > int(last_id)


class Bridge:
    async def run(self, options):
        self.options, self.own_subject = options, f"{options.subject}.{options.name}"
        self.seen, self.start, self.repeated = ":0", None, {}  # ids: our room's, the other rooms'
        self.joined, self.linked, self.queue = asyncio.Event(), asyncio.Event(), asyncio.Queue()
        self.states, self.line, self.said = {}, None, None  # line: what the room has not said yet
        sessions = self.retry("room", self.read_room), self.retry("NATS", self.read_stream)
        await asyncio.gather(*sessions, self.publish())

    async def retry(self, peer, session):
        while True:
            try:
                await session()
            except FAILURES as error:
                self.log(peer, "unavailable, trying again", error or type(error).__name__)
            await asyncio.sleep(1)

    def log(self, peer, state, details):
        if self.states.get(peer) != state:  # each state is logged once
            logging.getLogger("bridge").info("%s: %s (%s)", peer, state, details)
        self.states[peer] = state

    async def read_room(self):
        """One connection to the room: queue what is said, and notice our own line among it."""
        async with connect(self.options.room) as socket:
            while True:
                event = json.loads(await socket.recv())
                if (kind := event["type"]) == "greeting":
                    room, self.limit = event["room"], event["max_line"]
                    await socket.send(BRIDGE)
                    await socket.send("/help")  # is answered after the history, if there is one
                elif kind == "help":
                    self.socket, self.start = socket, self.start or self.seen
                    if self.line:  # nor is it in the history: it got lost
                        await socket.send(self.line)
                    self.joined.set()
                    self.log("room", "joined", self.options.room)
                elif kind in ("error", "closing"):
                    return self.log("room", "refuses us, trying again", event["text"])
                for each in event.get("events", [event] if "id" in event else []):
                    if is_after(ids := f"{room}:{each['id']}", self.seen):
                        self.seen = ids
                        if each["name"] == BRIDGE:
                            if self.line and (kind != "history" or each["text"] == self.line):
                                self.line = self.said.set_result(None)
                        elif each["type"] not in PRESENCE or self.options.presence:
                            self.queue.put_nowait((ids, json.dumps(each).encode()))

    async def publish(self):
        await self.linked.wait()
        while True:
            ids, data = await self.queue.get()
            while is_after(ids, self.published):
                try:
                    await self.js.publish(self.own_subject, data, headers={"Nats-Msg-Id": ids})
                    self.published = ids
                except FAILURES:
                    await asyncio.sleep(1)

    def format_lines(self, message):
        """A message as lines that the room takes; none if it is our own or was repeated before."""
        try:
            ids, event = message.headers["Nats-Msg-Id"], json.loads(message.data)
            room = message.subject.rpartition(".")[2]
            if room == self.options.name or not is_after(ids, self.repeated.get(room, ":0")):
                return []
            prefix = PREFIXES[event["type"]].format_map({**event, "room": room})
            text = "" if event["type"] in PRESENCE else event["text"]
            width = (self.limit - len(prefix.encode())) // max(len(c.encode()) for c in text + " ")
            self.repeated[room] = ids
            return [" ".join((prefix + x).splitlines()) for x in textwrap.wrap(text, width) or [""]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return self.log("stream", "skipped what is not from a bridge", repr(error)) or []

    async def read_stream(self):
        """One connection to NATS: say what the others publish."""
        options, name, subject = self.options, self.options.name, self.options.subject
        async with await nats.connect(options.nats, user_credentials=options.creds, **NATS) as nc:
            js, subjects = nc.jetstream(), f"{subject}.*"
            with suppress(nats.js.errors.BadRequestError):  # it has other limits by now
                await js.add_stream(name=subject, subjects=[subjects], **STREAM)
            with suppress(nats.js.errors.NotFoundError):
                if (await js.consumer_info(subject, name)).push_bound and not self.linked.is_set():
                    raise ValueError(f"{subject} has a bridge named {name} already: choose another")
            await self.joined.wait()
            config = nats.js.api.ConsumerConfig(description=self.start, **CONSUMER)
            messages = await js.subscribe(subjects, durable=name, stream=subject, config=config)
            last = (await messages.consumer_info()).config.description
            with suppress(nats.js.errors.NotFoundError, KeyError, TypeError):
                last = (await js.get_last_msg(subject, self.own_subject)).headers["Nats-Msg-Id"]
            self.js, self.published = js, last
            self.linked.set()
            self.log("NATS", "linked", subject)
            while True:
                with suppress(nats.errors.TimeoutError):  # nats-py may overlook a lost connection
                    message = await messages.next_msg(5)
                    for line in self.format_lines(message):
                        self.line, self.said = line, asyncio.get_running_loop().create_future()
                        with suppress(ConnectionClosed):  # then it is sent after the next join
                            await self.socket.send(line)
                        while not (await asyncio.wait([self.said], timeout=2))[0]:
                            with suppress(nats.errors.Error):
                                await message.in_progress()
                    await message.ack()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Links a BATCHAT room to others over NATS.")
    parser.add_argument("name", help="what the others call this room; no dots")
    parser.add_argument("--room", metavar="URL", default="ws://localhost:1338/chat")
    parser.add_argument("--nats", metavar="URL", default="nats://localhost:4222")
    parser.add_argument("--subject", default="batchat", help="common to all linked rooms; no dots")
    parser.add_argument("--creds", metavar="FILE", help="a credentials file of NATS")
    parser.add_argument("--presence", action="store_true", help="tell who joins and leaves, too")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    try:
        asyncio.run(Bridge().run(parser.parse_args()))
    except (KeyboardInterrupt, ValueError, ImportError) as error:
        raise SystemExit(str(error) or 0) from None
