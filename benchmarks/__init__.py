"""Benchmarks of the service as a black box: run as modules from the repository's root (`python -m benchmarks.suite …`).

load     the Locust user, its clips, the checks of every answer, and a closed-loop generator
compare  this service, its cluster, `vllm serve`, `ray.serve.llm` and the offline engine on the same clips
cluster  a local Ray cluster under autoscaling, rolling updates, kills, more replicas, and each way in
gpu      the first hour on a machine with GPUs: one resumable run, one report
audio    the audio path alone; short clips while long files are in progress
tenancy  fairness, ledger, cost of limits and metering, timing of caches
report   JSON to Markdown and to one page of charts; comparison of runs
micro    microbenchmarks by pytest-benchmark, each with a reference

Only `audio.audio_path`, `compare.uninstrumented` and `micro` import `serving`. README.md lists the commands.
"""
