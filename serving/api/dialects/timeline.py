"""The timeline extension of both dialects: its parameter, and its member of responses.

    "timeline": true, or {"max_segment_s": 5 to 30, "loudness": true, "speech_share": true}
    "timeline": {"segments": [{"index", "start", "end", "caption", "finish_reason", …}]}

Without the parameter no response has the member.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serving.api.dialects.base import MAX_TEXT_BYTES, lines
from serving.api.dialects.json_codec import quote
from serving.api.dialects.parameters import boolean, number
from serving.errors import InvalidRequest
from serving.timeline.captions import TimelineDelta
from serving.types import TimelineOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from serving.timeline.segments import Segment
    from serving.types import CaptionDelta

SHORTEST_S, LONGEST_S = 5, 30
"""Range of `max_segment_s`: the model describes up to 30 s in most detail; below 5 s most sounds would be cut."""

_NAMES = frozenset(("max_segment_s", "loudness", "speech_share"))
_TYPE = "'timeline' must be Boolean or Object"


def timeline_options(values: Mapping[str, Any]) -> TimelineOptions | None:
    """Return the options of the timeline that is requested, `None` if none is. Raises `InvalidRequest`."""
    value = values.get("timeline")
    if value is None or value is False:
        return None
    if value is True:
        return TimelineOptions()
    if not isinstance(value, dict):
        raise InvalidRequest(_TYPE, param="timeline")
    if unknown := next((name for name in value if name not in _NAMES), None):
        raise InvalidRequest(f"'timeline' has no member {quote(unknown[:64])}", param="timeline")
    longest_s = number(value, "max_segment_s")
    if longest_s is not None and not SHORTEST_S <= longest_s <= LONGEST_S:
        raise InvalidRequest(f"Range of max_segment_s should be [{SHORTEST_S}, {LONGEST_S}]", param="timeline")
    return TimelineOptions(
        max_segment_s=TimelineOptions().max_segment_s if longest_s is None else longest_s,
        loudness=boolean(value, "loudness"),
        speech_share=boolean(value, "speech_share"),
    )


def timeline_member(delta: CaptionDelta) -> str:
    """Return the JSON member with the delta's segments, after a comma; empty for the delta of one caption."""
    if not isinstance(delta, TimelineDelta):
        return ""
    return f',"timeline":{{"segments":[{",".join(map(_segment, delta.segments))}]}}'


def stream_parts(delta: CaptionDelta) -> Iterator[tuple[str, str]]:
    """Yield the texts of a delta that fit one line each, and for each the timeline member of its event."""
    member = timeline_member(delta)
    texts = [*lines(delta.text)]
    if not member or (len(texts) == 1 and len(quote(texts[0])) + len(member) <= MAX_TEXT_BYTES):
        yield from ((text, member) for text in texts)
        return
    yield from ((text, "") for text in texts)
    if len(member) <= MAX_TEXT_BYTES:  # else the text alone has the caption
        yield "", member


def _segment(segment: Segment) -> str:
    """Return a segment as JSON: times in seconds to the millisecond, and only what is known or requested."""
    members = [f'"index":{segment.index}', f'"start":{segment.start_s:.3f}', f'"end":{segment.end_s:.3f}']
    members.append(f'"caption":{quote(segment.caption)}')
    if segment.finish_reason is not None:
        members.append(f'"finish_reason":"{segment.finish_reason}"')
    if segment.loudness_db is not None:
        members.append(f'"loudness_db":{segment.loudness_db:.1f}')
    if segment.speech_share is not None:
        members.append(f'"speech_share":{segment.speech_share:.2f}')
    if segment.error is not None:
        members.append(f'"error":{quote(segment.error)}')
    return f"{{{','.join(members)}}}"
