# Tests inside the image, so that the tested files are those that ship. try.sh builds and runs it.
#   docker build -f deploy/docker/test.Dockerfile --build-arg IMAGE=captioner:cpu -t captioner:cpu-test .
ARG IMAGE=captioner:cpu
FROM ${IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
USER 0
WORKDIR /src
ARG WITHOUT=triton,nvidia-cusolver,nvidia-nvtx
COPY deploy/requirements deploy/requirements
COPY deploy/docker/missing_requirements.py deploy/docker/missing_requirements.py
RUN --mount=type=cache,target=/root/.cache --mount=type=secret,id=ca \
    if [ -e /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi \
    && python3 -m venv /tmp/uv \
    && /tmp/uv/bin/pip install --quiet --disable-pip-version-check --require-hashes -r deploy/requirements/uv.txt \
    && python3 deploy/docker/missing_requirements.py deploy/requirements/cpu-dev.txt --without "${WITHOUT}" \
        > /tmp/requirements.txt \
    && export UV_LINK_MODE=copy UV_HTTP_TIMEOUT=300 \
    && /tmp/uv/bin/uv pip install --quiet --python /opt/captioner --no-deps --require-hashes --compile-bytecode \
        -r /tmp/requirements.txt
COPY . .
# The tests import the installed application, not the source tree.
RUN rm -rf serving && ln -s /opt/captioner/app/serving serving && chown 10001:10001 .
USER 10001:10001
ENTRYPOINT ["python", "-m", "pytest", "-p", "no:cacheprovider"]
CMD ["tests/scheduling/test_sorted_queue.py"]
