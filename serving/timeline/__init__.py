"""Timeline of one audio: captions with times, from cuts at pauses to JSON, SRT and WebVTT."""
