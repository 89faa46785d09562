#!/usr/bin/env bash
# Build the CPU image and test it as an unprivileged user, with a read-only root.
# Not part of `make test`: it downloads 3 GB, writes about 20 GB, and needs root.
#   deploy/docker/try.sh [base | build | size | run | pod | chart | test [pytest arguments] | all]
#
# BASE_IMAGE   base image; default: a Debian created by mmdebstrap
# IMAGE        name of the image; default: localhost/captioner:cpu
# CA           certificate bundle for downloads through a proxy with a private certificate
set -euo pipefail
cd "$(dirname "$0")/../.."

image=${IMAGE:-localhost/captioner:cpu}
cache=.cache/images
port=${PORT:-18480}
name=captioner-try-$$
ca=()
[ -z "${CA:-}" ] || ca=(--secret "id=ca,src=$CA")
kinds=(--read-only --cap-drop all --security-opt no-new-privileges)

need() {
  for program in "$@"; do
    command -v "$program" >/dev/null && continue
    echo "missing: $program. On Debian: apt-get install -y --no-install-recommends buildah podman runc catatonit" \
      "containernetworking-plugins mmdebstrap jq curl" >&2
    exit 1
  done
}

say() { printf '\n== %s\n' "$*"; }

fail() {
  echo "FAILED: $*" >&2
  podman logs "$name" 2>&1 | tail -n 30 >&2 || true
  exit 1
}

containers_conf() { # for a machine without systemd, where crun and its cgroups do not work
  [ -z "${CONTAINERS_CONF:-}" ] || return 0
  [ ! -d /run/systemd/system ] || return 0
  mkdir -p "$cache"
  cat >"$cache/containers.conf" <<'CONF'
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
CONF
  export CONTAINERS_CONF=$PWD/$cache/containers.conf
}

base() {
  [ -z "${BASE_IMAGE:-}" ] || return 0
  BASE_IMAGE=localhost/python-base:bookworm
  podman image exists "$BASE_IMAGE" && return 0
  say "create a base image from Debian packages"
  need mmdebstrap
  mkdir -p "$cache"
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$cache/base.tar"
  podman import --quiet "$cache/base.tar" "$BASE_IMAGE"
  rm "$cache/base.tar"
}

build() {
  need buildah podman
  base
  say "build $image on $BASE_IMAGE"
  # --isolation chroot and the host's network also work inside containers. --format docker: OCI has no health check.
  buildah bud --isolation chroot --network host --format docker --layers "${ca[@]}" \
    --build-arg "BASE_IMAGE=$BASE_IMAGE" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
    --build-arg "CREATED=$(date -u +%Y-%m-%dT%H:%M:%SZ)" -f deploy/docker/cpu.Dockerfile -t "$image" .
}

size() {
  need podman jq
  say "size of $image: total, and each layer from the base up"
  podman image inspect "$image" | jq -r '.[0].Size / 1e6 | floor | "\(.) MB"'
  podman history --format json "$image" |
    jq -r 'reverse | .[] | select(.size > 0) | "\(.size / 1e4 | floor / 100) MB\t\(.CreatedBy[0:100])"'
}

request() { # request PORT [KEY]: print the caption of the sample
  printf '{"model":"qwen3-omni-30b-a3b-captioner","messages":[{"role":"user","content":[{"type":"input_audio",%s}]}]}' \
    "\"input_audio\":{\"data\":\"data:;base64,$(base64 -w0 serving/embedded/sample.mp3)\"}" |
    curl --silent --show-error --max-time 120 "http://127.0.0.1:$1/v1/chat/completions" -d @- \
      -H 'Content-Type: application/json' ${2:+-H "Authorization: Bearer $2"} |
    jq -er '.choices[0].message.content'
}

wait_ready() { # wait_ready PORT: up to 300 s
  for _ in $(seq 150); do
    ! curl --silent --fail --output /dev/null --max-time 5 "http://127.0.0.1:$1/readyz" || return 0
    podman inspect "$name" --format '{{.State.Running}}' 2>/dev/null | grep -q true || fail "the container has stopped"
    sleep 2
  done
  fail "not ready after 300 s"
}

wait_for() { # wait_for PORT: up to 120 s, for a pod
  for _ in $(seq 60); do
    ! curl --silent --fail --output /dev/null --max-time 5 "http://127.0.0.1:$1/readyz" || return 0
    sleep 2
  done
}

serve() { # serve TITLE PODMAN-ARGUMENTS… -- CAPTIONER-ARGUMENTS…: start, request a caption, check, stop
  local title=$1 options=() caption code
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  say "$title"
  podman run --detach --name "$name" "${kinds[@]}" --publish "127.0.0.1:$port:8000" --env CAPTIONER_API_KEYS=sk-try \
    "${options[@]}" "$image" serve "$@" >/dev/null
  wait_ready "$port"
  caption=$(request "$port" sk-try) || fail "no caption"
  echo "$caption"
  podman healthcheck run "$name" >/dev/null || fail "the health check failed"
  podman exec "$name" sh -c 'id; ! touch /root-is-written /opt/captioner/x 2>/dev/null' || fail "the root is writable"
  podman exec "$name" bash -lc 'for p in ray serve captioner python wget; do command -v $p; done' || fail "a login shell does not find the programs"
  podman stop --time 60 "$name" >/dev/null
  code=$(podman inspect "$name" --format '{{.State.ExitCode}}')
  [ "$code" = 0 ] || fail "exit status $code after SIGTERM"
  podman rm --volumes "$name" >/dev/null
}

run() {
  need podman jq curl
  say "captioner version"
  podman run --rm "${kinds[@]}" "$image" version
  serve "the fake engine" -- --engine=fake
  serve "the fake engine, under an unknown user id" --user 12345:0 \
    --tmpfs /var/lib/captioner:mode=1777 -- --engine=fake
  serve "the embedded stand-in on the real engine" -- --audio-workers=2
}

pod() {
  need podman jq curl
  say "podman play kube deploy/docker/pod.yaml"
  sed "s#localhost/captioner:cpu#$image#; s#hostPort: 8000#hostPort: $port#; s#name: captioner-pod#name: $name#" \
    deploy/docker/pod.yaml >"$cache/pod.yaml"
  podman play kube "$cache/pod.yaml" >/dev/null
  wait_for "$port"
  request "$port" || { podman logs --tail 5 "$name-captioner"; exit 1; }
  podman exec "$name-captioner" sh -c 'id; ! touch /root-is-written 2>/dev/null'
  podman play kube --down "$cache/pod.yaml" >/dev/null
}

chart() { # the chart's pod without Ray, as rendered; needs helm, and PyYAML in .venv
  need podman jq curl helm
  local secret container key
  say "the chart's Deployment with podman play kube"
  helm template "$name" helm/captioner -f helm/captioner/profiles/cpu-embedded.yaml --set workload=deployment \
    --set-string "image.repository=${image%:*}" --set-string "image.tag=${image##*:}" \
    --set image.pullPolicy=Never >"$cache/chart.yaml"
  secret=$(.venv/bin/python deploy/docker/playable.py "$port" "$cache/secret.json" <"$cache/chart.yaml" 2>&1 \
    >"$cache/chart-pod.yaml")
  podman secret create "$secret" "$cache/secret.json" >/dev/null
  key=$(jq -r '."api-keys" | @base64d' "$cache/secret.json")
  rm "$cache/secret.json"
  podman play kube "$cache/chart-pod.yaml" >/dev/null
  container=$(podman ps --format '{{.Names}}' | grep "^$name.*-captioner\$")
  wait_for "$port"
  request "$port" "$key" || { podman logs --tail 5 "$container"; exit 1; }
  podman exec "$container" sh -c 'id; ! touch /root-is-written 2>/dev/null'
  podman play kube --down "$cache/chart-pod.yaml" >/dev/null
  podman secret rm "$secret" >/dev/null
}

tests() { # the project's tests inside the image
  need buildah podman
  say "tests inside the image: ${*:-tests/api/test_operations.py tests/api/dialects tests/audio}"
  buildah bud --isolation chroot --network host --format docker --layers "${ca[@]}" --build-arg "IMAGE=$image" \
    --ignorefile deploy/docker/test.Dockerfile.dockerignore -f deploy/docker/test.Dockerfile -t "$image-test" .
  [ $# -gt 0 ] || set -- tests/api/test_operations.py tests/api/dialects tests/audio
  podman run --rm --network host "$image-test" "$@"
}

trap 'podman rm --force --volumes "$name" >/dev/null 2>&1 || true; podman pod rm --force "$name" >/dev/null 2>&1 || true' EXIT
containers_conf
what=${1:-all}
[ $# -eq 0 ] || shift
mkdir -p "$cache"
case $what in
  base | build | size | run | pod | chart) "$what" ;;
  test) tests "$@" ;;
  all) build; size; run; pod; tests ;;
  *) sed -n '2,4p' "$0" >&2; exit 2 ;;
esac
