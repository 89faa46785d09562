"""A timeline on the real engine: each segment is the caption of its piece as a clip alone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import httpx
import soundfile

from serving.audio.segment import cut
from serving.types import SAMPLE_RATE, billed_audio_tokens
from tests.audio.film import film
from tests.support.wire import COMPATIBLE, compatible_body, data_url

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tests.support.service import RunningService


def _clip(samples: npt.NDArray[np.float32]) -> str:
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="WAV", subtype="FLOAT")
    return data_url(file.getvalue())


def test_captions_of_pieces(embedded_service: RunningService) -> None:
    """Greedy captions of a timeline are those of its pieces sent one by one, and the bill is of the whole audio."""
    story = film(20, seed=3)

    def ask(samples: npt.NDArray[np.float32], **parameters: Any) -> Any:
        body = compatible_body(_clip(samples), temperature=0, max_tokens=40, **parameters)
        answer = httpx.post(f"{embedded_service.url}{COMPATIBLE}", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    whole = ask(story.samples, timeline={"max_segment_s": 8, "speech_share": True})
    segments = whole["choices"][0]["message"]["timeline"]["segments"]
    pieces = cut(story.samples, 8)
    assert [(round(16_000 * each["start"]), round(16_000 * each["end"])) for each in segments[:-1]] == [
        (piece.begin, piece.end) for piece in pieces[:-1]
    ]
    alone = [ask(story.samples[piece.audio_begin : piece.audio_end]) for piece in pieces]
    assert [each["caption"] for each in segments] == [
        answer["choices"][0]["message"]["content"].strip() for answer in alone
    ]
    assert whole["usage"]["prompt_tokens"] == billed_audio_tokens(story.samples.size) + 8
    assert whole["usage"]["completion_tokens"] == sum(answer["usage"]["completion_tokens"] for answer in alone)
