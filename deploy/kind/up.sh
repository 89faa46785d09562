#!/usr/bin/env bash
# The whole service on a laptop: a kind cluster, the KubeRay operator, and the chart with the embedded stand-in.
#   deploy/kind/up.sh              create or update cluster, operator and release, then send audio and check the caption
#   deploy/kind/up.sh --dry-run    print the commands without running them
#   deploy/kind/up.sh --down       delete the cluster
# Requirements: docker, kind, kubectl, helm; 4 CPUs, 12 GiB of memory, 25 GB of disk. Outside the cluster it changes only
# kubectl's configuration, to which kind adds the context kind-captioner.
set -euo pipefail
cd "$(dirname "$0")/../.."

cluster=captioner
namespace=captioner
image=${IMAGE:-captioner:$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-cpu}
node_image=${NODE_IMAGE:-kindest/node:v1.34.0}
kuberay=${KUBERAY_VERSION:-1.6.0}
timeout=${TIMEOUT:-20m}
context=(--context "kind-$cluster")

dry=
case ${1:-} in
  "") ;;
  --dry-run) dry=yes ;;
  --down) exec kind delete cluster --name "$cluster" ;;
  *) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac

run() {
  printf '+'
  printf ' %q' "$@"
  echo
  [ -n "$dry" ] || "$@"
}

if [ -z "$dry" ]; then
  for program in docker kind kubectl helm; do
    command -v "$program" >/dev/null || { echo "missing: $program" >&2; exit 1; }
  done
fi

if [ -n "$dry" ] || ! docker image inspect "$image" >/dev/null 2>&1; then
  run docker build -f deploy/docker/cpu.Dockerfile -t "$image" .
fi
if [ -n "$dry" ] || ! kind get clusters | grep -qx "$cluster"; then
  run kind create cluster --name "$cluster" --image "$node_image" --wait 5m
fi
run kind load docker-image "$image" --name "$cluster"
run helm upgrade --install kuberay-operator kuberay-operator --kube-context "kind-$cluster" \
  --repo https://ray-project.github.io/kuberay-helm/ --version "$kuberay" \
  --namespace kuberay-system --create-namespace --wait --timeout 5m
run helm upgrade --install captioner helm/captioner --kube-context "kind-$cluster" \
  -f helm/captioner/profiles/cpu-embedded.yaml \
  --set-string "image.repository=${image%:*}" --set-string "image.tag=${image##*:}" --set image.pullPolicy=Never \
  --namespace "$namespace" --create-namespace --timeout "$timeout"
# Helm's --wait does not support RayServices, so kubectl waits for the condition.
run kubectl "${context[@]}" --namespace "$namespace" wait --for=condition=Ready rayservice/captioner --timeout "$timeout"
run helm test captioner --kube-context "kind-$cluster" --namespace "$namespace" --logs --timeout 5m

echo "Connect: kubectl ${context[*]} --namespace $namespace port-forward service/captioner-serve-svc 8000:8000"
echo "Delete:  deploy/kind/up.sh --down"
