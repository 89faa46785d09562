"""The CUDA build of vLLM on a machine without GPU: everything up to the first kernel.

`build.py` installs the build that `deploy/requirements/cuda.txt` locks, apart from the environment of the tests;
`probe/` runs in it, one process per question; the tests compare its answers with literals.
"""
