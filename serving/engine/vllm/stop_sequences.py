"""Stop sequences of token ids, which vLLM does not have: it stops at texts and at single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class StopSequences:
    """A filter that cuts a stream of tokens before the first occurrence of a stop sequence.

    Text is held back while its tokens may be the beginning of a sequence. `decode` returns the text of token ids. With
    `include` the stream is cut after the sequence. As in vLLM, nothing stops within the first `min_tokens` tokens.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        decode: Callable[[list[int]], str],
        *,
        include: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._sequences = [list(sequence) for sequence in sequences]
        self._decode = decode
        self._include = include
        self._min_tokens = min_tokens
        self._ids: list[int] = []
        self._sent = ""
        self._held: list[tuple[int, str]] = []  # number of tokens up to the end of this text, and the text

    def feed(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, FinishReason | None]:
        """Add the next tokens and their text; return the text that is final, and the finish reason.

        A complete sequence finishes the stream with `STOP`.
        """
        for token_id in token_ids:
            self._ids.append(token_id)
            for sequence in self._sequences:
                if self._ids[-len(sequence) :] == sequence and len(self._ids) > self._min_tokens:
                    kept = self._decode(self._ids if self._include else self._ids[: -len(sequence)])
                    return kept.removeprefix(self._sent), FinishReason.STOP
        self._held.append((len(self._ids), text))
        final = len(self._ids) if finish_reason else len(self._ids) - self._undecided()
        done = "".join(text for end, text in self._held if end <= final)
        self._held = [(end, text) for end, text in self._held if end > final]
        self._sent += done
        return done, finish_reason

    def _undecided(self) -> int:
        """Return the number of last tokens that may be the beginning of a sequence."""
        longest = max(map(len, self._sequences)) - 1
        return next(
            (n for n in range(longest, 0, -1) if any(self._ids[-n:] == sequence[:n] for sequence in self._sequences)),
            0,
        )
