"""The page, used as people use it, in real Chromium with the fake engine.

Every scenario also fails for a breach of the page's policy, an error in the console or a request to another host; those
that look at the whole page fail for a finding of axe and for anything wider than the window.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.sdk.environments import node_environment, python_environment
from tests.support.wire import events, wav

if TYPE_CHECKING:
    from pathlib import Path

    from tests.page.conftest import Browser
    from tests.support.service import RunningService

CAPTION = re.compile(r"This clip of ([0-9.]+) seconds has the fingerprint [0-9a-f]{8}\. A quiet room opens the clip")


def test_a_dropped_clip_is_captioned(browser: Browser) -> None:
    """The clip is drawn; the caption is streamed and announced once; figures, account and history show it."""
    seen = browser.run("drop")
    waveform, spectrogram = seen["pictures"]
    assert 0.2 < waveform < 0.4
    assert 0.01 < spectrogram < 0.2
    assert seen["pieces"] >= 5
    found = CAPTION.match(seen["text"])
    assert found
    assert found[1] == "3.00"
    assert seen["done"] == seen["text"]
    assert seen["history"] == [seen["text"]]
    assert seen["focused"] == "result"
    length, first, total, factor, tokens, price, request_id = seen["facts"]
    assert length == "3 s"
    assert 0.2 <= float(first.split()[0]) < float(total.split()[0]) < 20
    assert float(factor.split()[0]) == pytest.approx(float(total.split()[0]) / 3, abs=0.02)
    # 38 + 8 tokens of input and 24 of output, at 0.0158 and 0.0127 for 1,000.
    assert (tokens, price) == ("46 + 24", "0.0010316 CNY before free tokens")
    assert re.fullmatch(r"[0-9a-f-]{36}", request_id)
    assert seen["limits"][-1] == "Requests at the same time (this key)4 of 4 left"
    assert seen["limits"][2].startswith("Tokens per month49,")
    assert seen["times"] is True
    assert seen["bars"] == int(seen["chart"].partition(" to ")[2][8:10])


def test_a_chosen_clip_is_played(browser: Browser) -> None:
    """The position follows the keyboard, a click on the picture and the player."""
    seen = browser.run("choose_and_play")
    assert seen["end"] == "0:03.0 / 0:03.0"
    assert seen["middle"] == pytest.approx(1.5, abs=0.05)
    assert seen["playing"] == "Pause"
    assert 50 < seen["cursor"] <= 100


def test_a_recording_is_captioned(browser: Browser) -> None:
    """The microphone, a fake device that beeps, is recorded, drawn and captioned."""
    seen = browser.run("record")
    assert seen["label"] == "Stop recording"
    assert seen["wave"] > 0.001
    assert seen["name"].startswith("Recording ")
    found = CAPTION.match(seen["text"])
    assert found
    assert 1 < float(found[1]) < 15
    assert "'clip.webm'" in seen["snippet"]


def test_a_refused_microphone_is_explained(browser: Browser) -> None:
    """The message has the reason and what to do."""
    seen = browser.run("no_microphone")
    assert seen.startswith("The microphone cannot be used: Permission denied. Allow it in the browser's settings")


def test_errors_say_what_to_do(browser: Browser) -> None:
    """A wrong key, an unreadable file, a lost service, a limit, a broken stream and a large file are explained."""
    seen = browser.run("errors")
    assert seen["first"] == ""
    assert seen["pasted"].startswith("Check the key for missing characters")
    assert seen["wrong"] == (
        "Incorrect API key provided. Check the key for missing characters, or ask your administrator for a new one."
    )
    message, hint, request_id = seen["unreadable"]
    assert message == "The audio format is illegal and cannot be opened: it is text"
    assert hint.startswith("Try another file: MP3, WAV")
    assert request_id.startswith("Request id: ")
    assert seen["away"] == [
        "The service cannot be reached.",
        "Check the connection and whether the service runs, then try again.",
    ]
    assert seen["limited"][1:] == ["Wait 17 s, then try again.", "Request id: r-1"]
    assert seen["broken"][:2] == ["A dog", "inference internal error."]
    assert seen["large"].startswith("The file has 9.0 MB; 7.5 MB can be sent from here.")


def test_a_caption_is_stopped(browser: Browser) -> None:
    """The text so far stays."""
    seen = browser.run("stop")
    assert seen["state"] == "Stopped."
    assert seen["text"].startswith("This clip")
    assert not seen["text"].endswith("says")


def test_history_and_key_are_the_persons(browser: Browser) -> None:
    """Texts and theme outlive a reload; texts stay until they are cleared, the key until it is forgotten."""
    seen = browser.run("history")
    assert seen.pop("backgrounds") == ["rgb(245, 246, 249)", "rgb(18, 20, 26)", "rgb(18, 20, 26)"]
    assert seen == {"kept": 1, "stays": True, "left": None, "focused": "key", "session": 0}


def test_the_keyboard_is_enough(browser: Browser) -> None:
    """A caption starts by Enter, tabs change by arrows, focus follows the page's order; the account is saved as CSV."""
    seen = browser.run("keyboard")
    assert seen["python"].startswith("import base64, os")
    assert seen["node"].startswith('import { readFileSync } from "node:fs";')
    assert seen["order"] == ["copy-code", "snippet-panel", "measure"]
    assert re.fullmatch(r"Money by day, \d{4}-\d\d-01 to .*; 0\.\d{2,9} CNY in all", seen["chart"])
    name, heads = seen["csv"]
    assert re.fullmatch(r"usage-\d{4}-\d\d-01-\d{4}-\d\d-\d\d\.csv", name)
    assert heads.startswith("day,key,key_name,currency,requests,")


def test_segments_are_played(browser: Browser) -> None:
    """With times, segments come as they are streamed, and a click plays one from its start."""
    seen = browser.run("timeline")
    assert seen["asked"] is True
    assert seen["text"] is False, "the segments have the same words"
    assert seen["segments"] == ["Play 0:00.0 \u2013 0:01.5A tone.", "Play 0:01.5 \u2013 0:03.0The tone goes on."]
    assert '"timeline":true' in seen["snippet"]


def test_a_long_clip_does_not_freeze_the_page(browser: Browser) -> None:
    """While 40 minutes are drawn, the page never waits for more than a second (measured: 0.06 to 0.12 s)."""
    assert browser.run("long")["stall"] < 1000


@pytest.mark.parametrize("scenario", ["phone", "dark", "phone_dark_chinese"])
def test_every_window_and_theme(browser: Browser, scenario: str) -> None:
    """Nothing is wider than a window of 320 or 360 px, and axe finds nothing, also in the dark."""
    browser.run(scenario)


def test_chinese(browser: Browser) -> None:
    """A Chinese browser gets Chinese texts; the caption stays marked as English; the choice of language works."""
    seen = browser.run("chinese")
    assert seen["heads"] == ["API Key", "音频", "描述", "用代码发送此请求", "用量与限制", "历史记录"]
    assert seen["english"] == ["Your key", "Clip", "Caption", "This request in code", "Usage and limits", "History"]
    assert (seen["lang"], seen["caption"]) == ("zh-CN", "en")


def test_the_lines_to_copy_run(browser: Browser, page_service: tuple[RunningService, str], tmp_path: Path) -> None:
    """The page's lines for curl, Python and Node, run as they are, caption the same clip."""
    (tmp_path / "tone.wav").write_bytes(wav(3))
    seen = browser.run("keyboard")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CAPTIONER_KEY": page_service[1]}

    def printed(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    chunks = events(printed("bash", "-c", seen["curl"]))
    texts = ["".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks if chunk["choices"])]
    texts.append(printed(str(python_environment("openai-3.54.0") / "bin" / "python"), "-c", seen["python"]))
    (tmp_path / "node_modules").symlink_to(node_environment("openai-npm-7.57.0") / "node_modules")
    (tmp_path / "lines.mjs").write_text(seen["node"])
    texts.append(printed("node", "lines.mjs"))
    for text in texts:
        found = CAPTION.match(text)
        assert found, text
        assert found[1] == "3.00"
