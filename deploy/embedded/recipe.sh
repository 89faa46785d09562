#!/usr/bin/env bash
# Create the embedded captioner from seeds: sources, pools of sounds, corpus, tokenizer, training, evaluation, model card.
# All files are in the given folder. Existing files are kept, so an interrupted run can be started again.
#   deploy/embedded/recipe.sh .cache/embedded [python] [steps]
set -euo pipefail

cache=$1
python=${2:-.venv/bin/python}
steps=${3:-}
mkdir -p "$cache"

packages=(espeak-ng flite libfluidsynth3 fluid-soundfont-gm musescore-general-soundfont csound-soundfont
  opl3-soundfont timgm6mb-soundfont libtcmalloc-minimal4 ffmpeg sox)
command -v npm >/dev/null || packages+=(npm)
dpkg --status "${packages[@]}" >/dev/null 2>&1 || {
  apt-get update --quiet
  apt-get install --yes --quiet --no-install-recommends "${packages[@]}"
}

for source in effects speech music; do
  "$python" -m "deploy.embedded.corpus.$source" "$cache"
done

workers=$(nproc)
for ((worker = 0; worker < workers; worker++)); do
  OMP_NUM_THREADS=1 "$python" -W ignore -m deploy.embedded.corpus.build "$cache" --worker "$worker" --workers "$workers" &
  pids[worker]=$!
done
for pid in "${pids[@]}"; do
  wait "$pid"
done

# glibc's malloc takes half of the time of a step.
LD_PRELOAD=libtcmalloc_minimal.so.4 "$python" -W ignore -m deploy.embedded.train "$cache" ${steps:+--steps "$steps"}

"$python" -W ignore -m deploy.embedded.measure "$cache"
