"""Questions to the CUDA build, each answered by a process of it (`python -m tests.cuda.probe`)."""
