"""The vLLM engine: the only importers of vllm."""
