#!/usr/bin/env python3
"""Draws `screenshot.png` beside this file: a conversation in the real telnet and in Chromium.

    .venv/bin/python bench/screenshot.py

It wants what the tests want, telnet and chromedriver among it.
"""

from __future__ import annotations

import base64
import html
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH.parent))

import batchat
from test_batchat import ENTER, GREETING, Chromium, Server, Terminal

TALK = [  # who says what; ann sits at the telnet that is shown, mike in the browser
    ("bob", "has anybody tried the new place on Elm Street?"),
    ("ann", "yes! the soup is wonderful"),
    ("mike", "https://example.com/menu has what they cook"),
    ("Мария", "Привет, у меня вопрос: столик на пятерых?"),
    ("李雷", "四川菜也有，很辣"),
    ("ann", "mike: seven o'clock?"),
    ("mike", "/me reserves a table"),
]

TOGETHER = """<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; display: flex; gap: 16px; padding: 16px; background: #8d99a6; height: 568px; }}
pre, img {{ border-radius: 8px; box-shadow: 0 4px 16px #0006; }}
pre {{ margin: 0; padding: 16px; width: 600px; box-sizing: border-box; overflow: hidden;
  color: #e6e6e6; background: #10141a;
  font: 14px/1.35 "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }}
</style><pre>{terminal}</pre><img src="data:image/png;base64,{page}">"""


def see(browser: Chromium, width: int, height: int) -> str:
    """The page as it is, as a PNG in base64."""
    browser.sized(width, height)
    time.sleep(0.5)  # for what is painted a little later
    picture: str = browser._ask("GET", "/screenshot")
    return picture


def main() -> None:
    with Server("--web-port", "0") as server, Chromium() as browser:
        with Terminal(server.port) as ann:
            shown = ["$ telnet localhost 1337"]

            def ann_sees(line: str) -> None:
                ann.shows(f"{line}\n")
                shown.append(line)

            ann.shows(batchat.PROMPT)
            ann.types("ann\n")
            ann.shows("enjoy the chat.\n\n")
            shown += f"{GREETING}ann".splitlines()
            shown += ["Hey, ann! Hope you enjoy the chat.", ""]
            browser.joins(server, "mike")
            ann_sees("* mike has joined the chat")
            people = {}
            for name in ("bob", "Мария", "李雷"):
                people[name] = server.connect()
                people[name].sock.sendall(f"{name}\n".encode())
                ann_sees(f"* {name} has joined the chat")
            for name, text in TALK:
                if name == "ann":
                    ann.types(f"{text}\n")
                    shown.append(text)
                else:
                    if name == "mike":
                        browser.types(text + ENTER)
                    else:
                        people[name].sock.sendall(f"{text}\n".encode())
                    ann_sees(f"<{name}> {text}".replace("<mike> /me", "** mike"))
                browser.shows(text.replace("/me ", ""))
            page = see(browser, 600, 568)
        with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
            file.write(TOGETHER.format(terminal=html.escape("\n".join(shown)), page=page))
            file.flush()
            browser._ask("POST", "/url", url=f"file://{file.name}")
            (BENCH / "screenshot.png").write_bytes(base64.b64decode(see(browser, 1248, 600)))


if __name__ == "__main__":
    main()
