"""FFmpeg's decoders that may run, and those that return full-scale values of other codecs."""

from __future__ import annotations

DECODERS = (
    *("aac", "aac_latm", "ac3", "alac", "dca", "eac3", "flac", "gsm", "gsm_ms", "mlp", "opus", "speex", "truehd"),
    *("amrnb", "amrwb", "libopencore_amrnb", "libopencore_amrwb", "tta", "vorbis", "wavpack", "wmapro", "wmavoice"),
    *("g722", "g723_1", "g726", "g726le", "mp2", "mp2float", "mp3", "mp3float", "wmalossless", "wmav1", "wmav2"),
    *("adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms", "adpcm_swf", "adpcm_yamaha"),
    *("pcm_alaw", "pcm_bluray", "pcm_dvd", "pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le", "pcm_mulaw"),
    *("pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le", "pcm_s32be", "pcm_s32le", "pcm_s64be", "pcm_s64le"),
    *("pcm_s8", "pcm_u16be", "pcm_u16le", "pcm_u24be", "pcm_u24le", "pcm_u32be", "pcm_u32le", "pcm_u8"),
)
"""Allowlist, without decoders of pictures or video. `tests/audio/fuzz_decoders.py` fuzzes them."""

BETTER_DECODER = {"amrnb": "libopencore_amrnb", "amrwb": "libopencore_amrwb"}
"""Replacements of FFmpeg's AMR decoders, which drop frames of silence (SID, no data); others make comfort noise."""

AV_OPTIONS = {"codec_whitelist": ",".join(DECODERS), "protocol_whitelist": "none"}


def is_exact(decoder: str) -> bool:
    """Return `True` if the decoder returns the values that were encoded: none of them overshoots by its own error."""
    return decoder.startswith(("pcm_", "wavpack"))
