"""Engines that write captions: one protocol, three implementations (vLLM, remote, fake)."""
