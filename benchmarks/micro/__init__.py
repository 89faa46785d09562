"""Microbenchmarks by pytest-benchmark, each with a reference: `pytest benchmarks/micro`."""
