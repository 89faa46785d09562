"""Self-hosted Qwen3-Omni-Captioner: audio in, one English description out."""
