"""Voice activity: the probability of speech in each 32 ms of audio, by Silero VAD (MIT licence), in NumPy.

The network reads 36 ms for each value: a short-time Fourier transform, four convolutions, and an LSTM cell that
remembers the audio so far. NumPy needs no torch in an audio worker, and the weights are 0.5 MB. The short name of each
weight is that of the package (`silero_vad/README.md`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import rfft

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

CHUNK = 512
"""Samples at 16 kHz for each probability."""

_CONTEXT, _REFLECTED = 64, 64
"""Samples before a chunk that are read as well, and samples at its end that are reflected."""

_WINDOW, _HOP = 256, 128
_FRAMES = 4
_BLOCK_CHUNKS = 512
"""Chunks whose convolutions are computed together: 16 s, for 12 MB."""

_WEIGHTS = Path(__file__).parent / "silero_vad" / "weights.npz"
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)).astype(np.float32)


def speech_probabilities(samples: Floats) -> Floats:
    """Return the probability of speech, 0 to 1, in each chunk of 16 kHz mono; the last one is filled with silence."""
    weights = load()
    count = -(-samples.size // CHUNK)
    probabilities = np.empty(count, np.float32)
    state = np.zeros((2, 128), np.float32)
    for first in range(0, count, _BLOCK_CHUNKS):
        last = min(count, first + _BLOCK_CHUNKS)
        gates = _encode(_windows(samples, first, last), weights)
        probabilities[first:last] = _remember(gates, state, weights)
    return probabilities


@cache
def load() -> dict[str, Floats]:
    """Return the weights by name. The first call opens their file."""
    with np.load(_WEIGHTS) as file:
        weights = {name: file[name].astype(np.float32) for name in file.files}
    for name in ("conv1", "conv2", "conv3", "conv4"):
        kernel = weights[f"{name}_weight"]  # (out, in, 3)
        weights[name] = np.ascontiguousarray(kernel.transpose(2, 1, 0).reshape(-1, len(kernel)))
    weights["recurrent"] = np.ascontiguousarray(weights["lstm_cell_weight_hh"].T)
    return weights


def _windows(samples: Floats, first: int, last: int) -> Floats:
    """Return the context, the chunk and its reflected end, for each chunk, shape (chunks, 640)."""
    begin, end = first * CHUNK - _CONTEXT, last * CHUNK
    part = samples[max(0, begin) : end]
    part = np.pad(part, (max(0, -begin), max(0, end - samples.size)))
    chunks = sliding_window_view(part, _CONTEXT + CHUNK)[::CHUNK]
    return np.concatenate((chunks, chunks[:, -2 : -2 - _REFLECTED : -1]), axis=1)


def _encode(windows: Floats, weights: dict[str, Floats]) -> Floats:
    """Return the inputs of the LSTM cell's gates, shape (chunks, 512)."""
    frames = sliding_window_view(windows, _WINDOW, axis=1)[:, ::_HOP]
    values: Floats = np.abs(rfft(frames * _HANN))  # (chunks, 4, 129)
    for name, stride in (("conv1", 1), ("conv2", 2), ("conv3", 2), ("conv4", 1)):
        padded = np.pad(values, ((0, 0), (1, 1), (0, 0)))
        taps = sliding_window_view(padded, 3, axis=1)[:, ::stride].swapaxes(2, 3)  # (chunks, frames, 3, channels)
        values = taps.reshape(*taps.shape[:2], -1) @ weights[name]
        values += weights[f"{name}_bias"]
        np.maximum(values, 0, out=values)
    gates: Floats = values[:, 0] @ weights["lstm_cell_weight_ih"].T
    gates += weights["lstm_cell_bias_ih"] + weights["lstm_cell_bias_hh"]
    return gates


def _remember(gates: Floats, state: Floats, weights: dict[str, Floats]) -> Floats:
    """Run the LSTM cell over the chunks, from `state` on, which is updated; return the probabilities."""
    recurrent, (hidden, cell) = weights["recurrent"], state
    outputs = np.empty((len(gates), hidden.size), np.float32)
    for number, gate in enumerate(gates):
        gate += hidden @ recurrent  # noqa: PLW2901 - in place: the array is ours
        squashed = 0.5 + 0.5 * np.tanh(0.5 * gate)  # the logistic function, without overflow
        cell *= squashed[128:256]
        cell += squashed[:128] * np.tanh(gate[256:384])
        np.multiply(squashed[384:], np.tanh(cell), out=hidden)
        outputs[number] = hidden
    logits = np.maximum(outputs, 0) @ weights["final_conv_weight"][0, :, 0] + weights["final_conv_bias"]
    probabilities: Floats = 0.5 + 0.5 * np.tanh(0.5 * logits)
    return probabilities
