# Frontends, Ray's head and the administration, without vLLM, PyTorch and CUDA. Engines have the image of cuda.Dockerfile.
#   docker build -f deploy/docker/frontend.Dockerfile -t captioner:frontend .
# If downloads pass through a proxy with a private certificate: --secret id=ca,src=/etc/ssl/certs/ca-certificates.crt
#
# For production pin the base by digest:
#   --build-arg BASE_IMAGE=python:3.12.14-slim-bookworm@sha256:…
# Ray accepts only nodes with one minor version of Python, so the base must have that of the engines' image: 3.12 in vLLM's.
ARG BASE_IMAGE=python:3.12.14-slim-bookworm

FROM ${BASE_IMAGE} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# wget: the health check, and KubeRay's probes.
# Versions float within the base's Debian release, which accepts only security fixes; the scan in CI reads them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates wget \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

# Locked requirements, by hash: those of cuda.txt that a process without an engine needs.
FROM base AS requirements
WORKDIR /build
COPY deploy/requirements/uv.txt deploy/requirements/frontend.txt ./
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=ca \
    if [ -e /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi \
    && python3 -m venv uv \
    && uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r uv.txt \
    && export UV_LINK_MODE=copy UV_HTTP_TIMEOUT=300 \
    && uv/bin/uv venv --quiet --python python3 /opt/captioner \
    && uv/bin/uv pip install --quiet --python /opt/captioner --no-deps --require-hashes --compile-bytecode \
        -r frontend.txt \
    # The application is in a separate layer, because it changes more often than the requirements.
    && echo /opt/captioner/app > "$(/opt/captioner/bin/python -c 'import site; print(site.getsitepackages()[0])')/app.pth" \
    && ln -s ../app/bin/captioner /opt/captioner/bin/captioner

FROM requirements AS application
COPY pyproject.toml README.md LICENSE ./
COPY serving serving
RUN uv/bin/uv pip install --quiet --python /opt/captioner --no-deps --no-build-isolation --compile-bytecode \
        --target /opt/captioner/app . \
    # Ray starts this file in HAProxy's place (RAY_SERVE_HAPROXY_BINARY_PATH); installers may drop the executable bit.
    && chmod 0755 /opt/captioner/app/serving/cluster/haproxy_wrapper.py

FROM base
# Group 0 has access, because some platforms run each container under an arbitrary user id in that group.
RUN groupadd --gid 10001 captioner \
    && useradd --uid 10001 --gid captioner --home-dir /tmp --no-create-home --shell /usr/sbin/nologin captioner \
    && install -d -o captioner -g root -m 0770 /var/lib/captioner
COPY --from=requirements /opt/captioner /opt/captioner
COPY --from=application /opt/captioner/app /opt/captioner/app
# KubeRay starts Ray with a login shell, which resets PATH.
COPY deploy/docker/profile.sh /etc/profile.d/captioner.sh

# USER: Ray and PyTorch need a user name, even if the platform's user id has none.
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
# All written files, including downloads in /tmp. The root may be read-only.
VOLUME ["/tmp", "/var/lib/captioner"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# Fails when a restart would help. /readyz reports whether captions can be made.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=6 \
    CMD ["/bin/sh", "-c", "wget -q -O /dev/null http://127.0.0.1:${CAPTIONER_PORT:-8000}/healthz || exit 1"]
ENTRYPOINT ["captioner"]
CMD ["serve"]

ARG BASE_IMAGE
ARG VERSION=0.2.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="captioner" \
      org.opencontainers.image.description="Self-hosted Qwen3-Omni-Captioner, frontends without an engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
