"""The timeline: cuts, captions of pieces, subtitles."""
