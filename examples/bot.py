"""A bot that tells the time and greets whoever joins: python bot.py [ws://HOST:1338/chat]"""
import asyncio
import json
import sys
import time
from contextlib import suppress

import websockets


async def chat(url="ws://localhost:1338/chat", name="clock"):
    async with websockets.connect(url) as room:
        async for message in room:
            event = json.loads(message)
            if event["type"] == "prompt":
                await room.send(name)
                name += "_"  # the next try, if it is taken
            elif event["type"] == "joined":
                await room.send(f"Hello, {event['name']}!")
            elif event["type"] == "said" and event["text"] == "!time":
                await room.send(time.strftime("It is %H:%M."))
while True:
    with suppress(OSError, asyncio.TimeoutError, websockets.WebSocketException):
        asyncio.run(chat(*sys.argv[1:]))
    time.sleep(1)
