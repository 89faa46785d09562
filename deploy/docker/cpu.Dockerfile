# The service with the CPU build of the engine: to try it, for development, and for CPU worker groups.
#   docker build -f deploy/docker/cpu.Dockerfile -t captioner:cpu .
# Where downloads pass through a proxy with a certificate of its own: --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt
#
# Pin the base by digest where you build for production:
#   --build-arg BASE_IMAGE=python:3.11.13-slim-bookworm@sha256:…
# Any Debian-like base with Python 3.11 and its venv module does.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# libnuma1: vLLM's CPU build. wget: the health check, and KubeRay's probes.
# Versions float within the base's Debian release, which takes security fixes only; the scan in CI reads what came.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

# What is locked, by hash, without what only GPUs need. PyPI's PyTorch is built for CUDA and does not load without most of
# NVIDIA's libraries; these it does not miss.
FROM base AS requirements
ARG WITHOUT=triton,nvidia-cusolver,nvidia-nvtx
WORKDIR /build
COPY deploy/requirements/uv.txt deploy/requirements/cpu.txt deploy/docker/besides.py ./
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=ca \
    if [ -e /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi \
    && python3 -m venv uv \
    && uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r uv.txt \
    && python3 besides.py cpu.txt --without "${WITHOUT}" > requirements.txt \
    && export UV_LINK_MODE=copy UV_HTTP_TIMEOUT=300 \
    && uv/bin/uv venv --quiet --python python3 /opt/captioner \
    && uv/bin/uv pip install --quiet --python /opt/captioner --no-deps --require-hashes --compile-bytecode \
        -r requirements.txt \
    # The application stands beside the requirements, as a layer of its own: it changes more often than they do.
    && echo /opt/captioner/app > "$(/opt/captioner/bin/python -c 'import site; print(site.getsitepackages()[0])')/app.pth" \
    && ln -s ../app/bin/captioner /opt/captioner/bin/captioner

FROM requirements AS application
COPY pyproject.toml README.md LICENSE ./
COPY serving serving
RUN uv/bin/uv pip install --quiet --python /opt/captioner --no-deps --no-build-isolation --compile-bytecode \
        --target /opt/captioner/app . \
    # Ray starts it in HAProxy's place (RAY_SERVE_HAPROXY_BINARY_PATH); an installer need not keep it a program.
    && chmod 0755 /opt/captioner/app/serving/cluster/haproxy_wrapper.py

FROM base
# Group 0 too, as some platforms give each container a user id of its own in that group.
RUN groupadd --gid 10001 captioner \
    && useradd --uid 10001 --gid captioner --home-dir /tmp --no-create-home --shell /usr/sbin/nologin captioner \
    && install -d -o captioner -g root -m 0770 /var/lib/captioner
COPY --from=requirements /opt/captioner /opt/captioner
COPY --from=application /opt/captioner/app /opt/captioner/app
# A login shell, as KubeRay starts Ray with, sets PATH anew.
COPY deploy/docker/profile.sh /etc/profile.d/captioner.sh

# USER: Ray and PyTorch want a name, also where the platform gives a user id that has none.
ENV PATH=/opt/captioner/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=captioner \
    HOME=/tmp \
    HF_HOME=/var/lib/captioner/huggingface \
    CAPTIONER_HOST=0.0.0.0 \
    CAPTIONER_DATA_DIR=/var/lib/captioner/data \
    CAPTIONER_UPLOADS_DIR=/var/lib/captioner/uploads
USER 10001:10001
WORKDIR /var/lib/captioner
# All that is written, downloads in /tmp among it: the root may be read-only.
VOLUME ["/tmp", "/var/lib/captioner"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Says whether a restart would help. Whether captions can be made, /readyz says.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=6 \
    CMD ["/bin/sh", "-c", "wget -q -O /dev/null http://127.0.0.1:${CAPTIONER_PORT:-8000}/healthz || exit 1"]
ENTRYPOINT ["captioner"]
CMD ["serve"]

ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="captioner" \
      org.opencontainers.image.description="Self-hosted Qwen3-Omni-Captioner, CPU build" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
