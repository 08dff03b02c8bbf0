# Headwater in a container: `docker build -t headwater .`, then docs/deploy/docker.md.
# Two stages: the first has what is needed to build, the second only what runs. Every package is checked against the
# hashes of requirements.txt. There is no VOLUME line: Railway refuses images that have one; mount a volume at /data.

# `docker build --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:...` builds on that very image
ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir uv==0.13.9 && uv venv --no-project /opt/headwater
WORKDIR /build
# with those of the extras `lake` and `scale`; the packages first: they change less often than the code, so their layer is kept
COPY requirements.txt ./
# of Google's descriptions of all its services, 110 MB, only that of Drive is read
RUN uv pip install --no-cache --python /opt/headwater/bin/python --require-hashes -r requirements.txt && \
    find /opt/headwater -path '*/discovery_cache/documents/*' -not -name drive.v3.json -delete
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY sql ./sql
COPY docs ./docs
RUN uv build --no-cache --wheel --out-dir dist && \
    uv pip install --no-cache --python /opt/headwater/bin/python --no-deps dist/*.whl

FROM ${PYTHON_IMAGE}
# a fixed number, so that runAsNonRoot and the owner of a volume can be stated outside the image
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin headwater && \
    install --directory --owner=headwater --group=headwater /data
COPY --from=build /opt/headwater /opt/headwater
# bytecode is compiled above, so that nothing has to be written beside the code at run time
ENV PATH=/opt/headwater/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    ARROW_DEFAULT_MEMORY_POOL=system \
    HOST=0.0.0.0 \
    PORT=8080 \
    DATA_DIR=/data
WORKDIR /data
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
# exec form: SIGTERM reaches Python itself, which then stops at the next safe point
CMD ["python", "-m", "app"]
