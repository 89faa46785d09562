#!/usr/bin/env bash
# The first hour on a GPU: measures what could not be measured where this project is built, where there is no GPU.
#
#   benchmarks/gpu/first.sh --model Qwen/Qwen3-Omni-30B-A3B-Captioner --profile deploy/profiles/1xh100-80g.toml --price 3.5
#   benchmarks/gpu/first.sh --load-format dummy …   # without the weights: speeds and memory, but captions without sense
#   benchmarks/gpu/first.sh --small                 # the embedded stand-in on the CPU, to try this script
#
# Needs: `make serve BUILD=cuda` has installed .venv-cuda, and the weights are in the hub's cache or a directory. Nothing
# else is installed. Each step writes OUT/steps/NAME.json; the same command goes on where it was stopped, and repeats what
# failed. A failed step is recorded, and the next one runs. Please send OUT/report.json and OUT/report.md back.
#
# Unknown until this has run on a GPU (deploy/cuda.md has the list of what is known): whether the kernels run and agree
# with `vllm serve`; peak memory; time to load, compile and capture; V2 against V1; what FP8 does to captions; NCCL; speed.
# Of the script itself, the steps doctor, parity, drain and memory were run on the CPU build with the embedded stand-in
# (--small), and start and throughput with a fake engine. The other steps, `--load-format dummy`, the branches that read
# `nvidia-smi`, and vllm-omni, are untried.
set -euo pipefail
cd "$(dirname "$0")/../.."
for python in "${PYTHON:-}" .venv-cuda/bin/python .venv/bin/python; do
  if [[ -n $python && -x $python ]]; then exec "$python" -m benchmarks.gpu "$@"; fi
done
echo "first.sh: neither .venv-cuda nor .venv is here: run \`make serve BUILD=cuda\` once, or set PYTHON" >&2
exit 1
