"""Sounds made by formula: alarms, engines, weather, and beats at a known rate. No recording, no licence."""

# ruff: noqa: D103  # each function makes the sound that it is named after

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import signal

from deploy.embedded.corpus.pool import SAMPLE_RATE

if TYPE_CHECKING:
    from collections.abc import Callable

RATES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Beats per second; far enough apart that what is said is either right or wrong."""

Rng = np.random.Generator


def time_axis(seconds: float) -> np.ndarray:
    """Times of the samples of `seconds` in seconds."""
    return np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def noise(rng: Rng, samples: int, slope: float = 0.0) -> np.ndarray:
    """Gaussian noise whose power falls with frequency to the `slope`: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(samples + samples % 2))
    spectrum *= np.maximum(np.arange(len(spectrum)), 20 * len(spectrum) / 8000) ** (-slope / 2)
    colour = np.fft.irfft(spectrum)[:samples]
    return colour / (np.abs(colour).max(initial=0) + 1e-9)


def band(rng: Rng, samples: int, low: float, high: float) -> np.ndarray:
    """Noise between two frequencies in Hz."""
    sections = signal.butter(2, (low, min(high, 7900)), "bandpass", fs=SAMPLE_RATE, output="sos")
    passed = signal.sosfilt(sections, rng.standard_normal(samples))
    return passed / (np.abs(passed).max(initial=0) + 1e-9)


def repeated(
    rng: Rng, seconds: float, rate: float, strike: Callable[[int], np.ndarray], jitter: float = 0.02
) -> np.ndarray:
    """`strike(n)` at every beat of `rate` per second."""
    out = np.zeros(int(seconds * SAMPLE_RATE))
    for beat in range(int(np.ceil(seconds * rate))):
        at = int(max(0, beat + rng.normal(0, jitter) * (beat > 0)) / rate * SAMPLE_RATE)
        if at < len(out):
            piece = strike(beat)[: len(out) - at]
            out[at : at + len(piece)] += piece
    return out


def decaying(rng: Rng, partials: list[float], seconds: float, decay: float) -> np.ndarray:
    """Partials in Hz that die away, the higher the sooner."""
    t = time_axis(seconds)
    return sum(
        rng.uniform(0.4, 1) * np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) * np.exp(-t * decay * (1 + 0.3 * n))
        for n, f in enumerate(partials)
        if f < 7800
    ) + np.zeros(len(t))


def phase(frequency_hz: np.ndarray) -> np.ndarray:
    """The phase of a tone whose frequency changes."""
    return 2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE


def hammering(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    base = rng.uniform(700, 2200)
    partials = [base * k for k in (1, 1.51, 2.32, 2.9, 4.1)]
    blow = band(rng, 400, 1500, 7000) * np.exp(-np.arange(400) / 60)

    def strike(_: int) -> np.ndarray:
        ring = decaying(rng, partials, 0.35, rng.uniform(10, 18)) * rng.uniform(0.7, 1)
        ring[: len(blow)] += 2 * blow
        return ring

    return repeated(rng, seconds, rate, strike)


def knocking(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    base = rng.uniform(130, 320)
    return repeated(
        rng, seconds, rate, lambda _: decaying(rng, [base, base * 1.6, base * 2.7], 0.15, 38) * rng.uniform(0.7, 1)
    )


def clicking(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    high = rng.uniform(3000, 6000)
    return repeated(rng, seconds, rate, lambda _: band(rng, 160, high / 2, high) * np.exp(-np.arange(160) / 25))


def clock(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    tick = [rng.uniform(2000, 3000), rng.uniform(3500, 5000)]

    def strike(beat: int) -> np.ndarray:
        shift = 1.0 if beat % 2 else 0.72
        return decaying(rng, [f * shift for f in tick], 0.06, 90)

    return repeated(rng, seconds, rate, strike, 0)


def beeping(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    t = time_axis(min(0.5 / rate, 0.25))
    beep = np.sin(2 * np.pi * rng.uniform(800, 3200) * t) * np.minimum(1, np.minimum(t, t[-1] - t) / 0.005)
    return repeated(rng, seconds, rate, lambda _: beep, 0)


def heartbeat(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    base = rng.uniform(45, 75)

    def strike(_: int) -> np.ndarray:
        out = np.zeros(int(SAMPLE_RATE * 0.4))
        for at, gain in ((0, 1.0), (0.28 / max(rate, 1), 0.6)):
            thump = decaying(rng, [base, base * 1.9], 0.12, 28) * gain
            start = int(at * SAMPLE_RATE)
            out[start : start + len(thump)] += thump
        return out

    return repeated(rng, seconds, rate, strike, 0.01)


def footsteps(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    low, high = rng.uniform(80, 200), rng.uniform(900, 2500)

    def strike(_: int) -> np.ndarray:
        n = 2200
        heel = band(rng, n, low, high) * np.exp(-np.arange(n) / 280)
        toe = np.roll(band(rng, n, high / 2, high * 2) * np.exp(-np.arange(n) / 200), 0)
        out = np.zeros(n + 900)
        out[:n] += heel
        out[900:] += 0.5 * toe
        return out

    return repeated(rng, seconds, rate, strike, 0.03)


def sawing(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    length = int(SAMPLE_RATE / rate * 0.8)
    shape = np.sin(np.linspace(0, np.pi, length)) ** 0.7
    low = rng.uniform(900, 1800)

    def strike(beat: int) -> np.ndarray:
        shift = 1.0 if beat % 2 else 1.5
        teeth = 1 + 0.7 * np.sign(np.sin(2 * np.pi * rng.uniform(70, 110) * np.arange(length) / SAMPLE_RATE))
        return band(rng, length, low * shift, low * shift * 2.2) * shape * teeth

    return repeated(rng, seconds, rate, strike)


def bell(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    base = rng.uniform(250, 700)
    partials = [base * k for k in (0.5, 1, 1.19, 1.5, 2, 2.52, 3.01, 4.1)]
    return repeated(rng, seconds, rate, lambda _: decaying(rng, partials, 2.5, 1.6))


def alarm(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    low = rng.uniform(500, 1100)
    high = low * rng.uniform(1.25, 1.6)
    t = time_axis(seconds)
    wave = np.sin(phase(np.where((t * rate).astype(int) % 2 == 0, low, high)))
    return np.tanh(2.5 * wave)


def siren(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t = time_axis(seconds)
    centre, period = rng.uniform(700, 1100), rng.uniform(1.6, 4.0)
    wail = np.sin(phase(centre * (1 + 0.42 * np.sin(2 * np.pi * t / period + rng.uniform(0, 6)))))
    return np.tanh(1.5 * wail)


def telephone(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t = time_axis(seconds)
    low = rng.uniform(420, 520)
    trill = np.sin(2 * np.pi * low * t) + np.sin(2 * np.pi * low * 1.22 * t) + 0.4 * np.sin(2 * np.pi * low * 2.9 * t)
    ringing = (np.sin(2 * np.pi * 20 * t) > -0.2) * ((t % 1.8) < 1.1)
    return trill * ringing


def dialling(rng: Rng, seconds: float, _: float) -> np.ndarray:
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    t = time_axis(0.12)
    return repeated(
        rng,
        seconds,
        rng.uniform(3.5, 5),
        lambda _: np.sin(2 * np.pi * rng.choice(rows) * t) + np.sin(2 * np.pi * rng.choice(columns) * t),
        0.05,
    )


def tone(rng: Rng, seconds: float, _: float) -> np.ndarray:
    return np.sin(2 * np.pi * rng.uniform(250, 3000) * time_axis(seconds))


def buzzer(rng: Rng, seconds: float, _: float) -> np.ndarray:
    return signal.sawtooth(2 * np.pi * rng.uniform(140, 320) * time_axis(seconds)) + 0.1 * band(
        rng, int(seconds * SAMPLE_RATE), 500, 5000
    )


def hum(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t, mains = time_axis(seconds), rng.choice((50.0, 60.0))
    return sum(np.sin(2 * np.pi * mains * k * t + rng.uniform(0, 6)) / k for k in (1, 2, 3, 4, 6)) + np.zeros(len(t))


def hiss(rng: Rng, seconds: float, _: float) -> np.ndarray:
    return noise(rng, int(seconds * SAMPLE_RATE), rng.uniform(0, 0.4))


def rumble(rng: Rng, seconds: float, _: float) -> np.ndarray:
    return band(rng, int(seconds * SAMPLE_RATE), 25, rng.uniform(90, 160))


def rain(rng: Rng, seconds: float, _: float) -> np.ndarray:
    n = int(seconds * SAMPLE_RATE)
    drops = np.zeros(n)
    hits = rng.integers(0, max(n - 400, 1), int(seconds * rng.uniform(60, 140)))
    for at in hits:
        drop = decaying(rng, [rng.uniform(1800, 5500)], 0.012, 350) * rng.uniform(0.2, 1)
        drops[at : at + len(drop)] += drop[: n - at]
    return drops + 0.35 * noise(rng, n, 0.6)


def wind(rng: Rng, seconds: float, _: float) -> np.ndarray:
    n = int(seconds * SAMPLE_RATE)
    knots = max(3, int(seconds * 1.2))
    gust = np.interp(np.linspace(0, knots - 1, n), np.arange(knots), rng.uniform(0.15, 1, knots))
    whistle = band(rng, n, 300, 700) * gust**2
    return band(rng, n, 60, 350) * gust + 0.7 * whistle


def waves(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t, period = time_axis(seconds), rng.uniform(2.5, 5)
    swell = (0.5 + 0.5 * np.sin(2 * np.pi * t / period + rng.uniform(0, 6))) ** 2
    return noise(rng, len(t), 1.0) * (0.08 + swell) + 0.3 * band(rng, len(t), 2000, 6000) * swell**2


def fire(rng: Rng, seconds: float, _: float) -> np.ndarray:
    n = int(seconds * SAMPLE_RATE)
    out = 0.08 * noise(rng, n, 1.5)
    cracks = [band(rng, 240, 800, 6000) * np.exp(-np.arange(240) / rng.uniform(10, 50)) for _ in range(12)]
    for at in rng.integers(0, max(n - 300, 1), int(seconds * rng.uniform(12, 30))):
        crack = cracks[rng.integers(12)] * rng.uniform(0.1, 1) ** 2
        out[at : at + 240] += crack[: n - at]
    return out


def thunder(rng: Rng, seconds: float, _: float) -> np.ndarray:
    n = int(seconds * SAMPLE_RATE)
    t = time_axis(seconds)
    roll = noise(rng, n, 2.0) * np.exp(-t / max(seconds / 3, 0.5))
    knots = max(4, int(seconds * 6))
    return roll * np.interp(np.linspace(0, knots - 1, n), np.arange(knots), rng.uniform(0.2, 1, knots))


def applause(rng: Rng, seconds: float, _: float) -> np.ndarray:
    n = int(seconds * SAMPLE_RATE)
    out = np.zeros(n)
    hands = rng.uniform(700, 1600, 20)
    claps = [band(rng, 260, low, low * 2.5) * np.exp(-np.arange(260) / 45) for low in hands]
    for at in rng.integers(0, max(n - 300, 1), int(seconds * rng.uniform(60, 150))):
        clap = claps[rng.integers(20)] * rng.uniform(0.3, 1)
        out[at : at + 260] += clap[: n - at]
    return out


def engine(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t = time_axis(seconds)
    firing = rng.uniform(22, 60) * (1 + 0.03 * np.sin(2 * np.pi * 0.7 * t))
    wave = sum(np.sin(k * phase(firing) + rng.uniform(0, 6)) / k**0.7 for k in range(1, 14))
    return np.tanh(wave) * (1 + 0.3 * noise(rng, len(t), 1)) + 0.15 * noise(rng, len(t), 1)


def helicopter(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t = time_axis(seconds)
    chop = (0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(10, 14) * t)) ** 4
    return noise(rng, len(t), 1.6) * (chop + 0.08)


def birds(rng: Rng, seconds: float, _: float) -> np.ndarray:
    base = rng.uniform(2500, 4500)

    def strike(_: int) -> np.ndarray:
        t = time_axis(rng.uniform(0.06, 0.2))
        glide = base * (1 + rng.uniform(-0.25, 0.25) * t / t[-1]) * (1 + 0.06 * np.sin(2 * np.pi * 28 * t))
        return np.sin(phase(glide)) * np.sin(np.pi * t / t[-1]) * rng.uniform(0.4, 1)

    return repeated(rng, seconds, rng.uniform(3, 6), strike, 0.25)


def rising(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t = time_axis(seconds)
    low = rng.uniform(150, 400)
    return np.sin(phase(low * (rng.uniform(6, 16)) ** (t / seconds)))


def falling(rng: Rng, seconds: float, rate: float) -> np.ndarray:
    return rising(rng, seconds, rate)[::-1]


def laser(rng: Rng, seconds: float, _: float) -> np.ndarray:
    t = time_axis(0.22)
    zap = np.sin(phase(rng.uniform(2500, 5000) * np.exp(-t * rng.uniform(9, 14)) + 120)) * np.exp(-t * 6)
    return repeated(rng, seconds, rng.uniform(1.2, 2.5), lambda _: zap, 0.1)


def bouncing(rng: Rng, seconds: float, _: float) -> np.ndarray:
    out = np.zeros(int(seconds * SAMPLE_RATE))
    gap, gain = rng.uniform(0.5, 0.8), 1.0
    base, at = rng.uniform(180, 400), 0.0
    while at < seconds - 0.05:
        thud = decaying(rng, [base, base * 2.1, base * 3.3], 0.08, 50) * gain
        start = int(at * SAMPLE_RATE)
        out[start : start + len(thud)] += thud[: len(out) - start]
        at, gap, gain = at + gap, gap * 0.8, gain * 0.88
        if gap < 0.05:
            gap, gain, at = rng.uniform(0.5, 0.8), 1.0, at + 0.3
    return out


RHYTHMIC = {
    "hammering": (hammering, RATES),
    "knocking": (knocking, RATES),
    "clicking": (clicking, RATES),
    "clock": (clock, RATES[:5]),
    "beeping": (beeping, RATES),
    "heartbeat": (heartbeat, RATES[:3]),
    "footsteps": (footsteps, RATES[:4]),
    "sawing": (sawing, RATES[:4]),
    "bell": (bell, RATES[:3]),
    "alarm": (alarm, RATES[:5]),
}
"""Kinds with a rate, and the rates they come at."""

STEADY = {
    "siren": siren,
    "telephone": telephone,
    "dialling": dialling,
    "tone": tone,
    "buzzer": buzzer,
    "hum": hum,
    "hiss": hiss,
    "rumble": rumble,
    "rain": rain,
    "wind": wind,
    "waves": waves,
    "fire": fire,
    "thunder": thunder,
    "applause": applause,
    "engine": engine,
    "helicopter": helicopter,
    "birds": birds,
    "rising sweep": rising,
    "falling sweep": falling,
    "laser": laser,
    "bouncing ball": bouncing,
}
"""Kinds without a rate."""


def make(rng: Rng, kind: str, seconds: float) -> tuple[np.ndarray, float]:
    """`seconds` of `kind`, and its rate in beats per second (0 if it has none, or if too few beats would fit)."""
    if kind in STEADY:
        return STEADY[kind](rng, seconds, 0.0), 0.0
    sound, rates = RHYTHMIC[kind]
    told = [rate for rate in rates if rate * seconds >= 3.2] or [rates[-1]]
    rate = float(rng.choice(told))
    samples = sound(rng, seconds, rate * rng.uniform(0.97, 1.03))
    return samples, rate
