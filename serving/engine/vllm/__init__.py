"""The vLLM engine: the only modules that import vllm."""
