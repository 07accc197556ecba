# One image for driver, workers and shards; installed by the script that the tests' own environment comes from.
#   docker build -t felrec-dist .                                   CUDA
#   docker build -t felrec-dist:cpu --build-arg TORCH_BUILD=cpu .
FROM python:3.11.14-slim-bookworm

ARG TORCH_BUILD=cuda

# No process writes beside the package; numba's cache goes to the user's home.
ENV PATH=/opt/felrec/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    NUMBA_CACHE_DIR=/home/felrec/.cache/numba

# KubeRay's probes ask Ray with wget; Debian keeps only the newest version of a package, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 felrec \
    && useradd --create-home --uid 1000 --gid 1000 felrec
WORKDIR /app

# PyTorch first: the largest layer, and the one that changes least.
COPY launch/install.sh launch/
RUN TORCH_BUILD=$TORCH_BUILD launch/install.sh /opt/felrec torch

COPY pyproject.toml README.md ./
COPY felrec_dist felrec_dist
COPY cache_server cache_server
COPY benchmarks benchmarks
COPY launch launch
COPY configs configs
RUN EXTRAS=ray,s3,report,torchrec launch/install.sh /opt/felrec felrec \
    && python -m compileall -q felrec_dist cache_server benchmarks launch

# By number: where Kubernetes is told runAsNonRoot it does not look up a name.
USER 1000:1000
# Of a container on its own; Kubernetes has probes of its own and ignores it.
HEALTHCHECK --interval=30s --timeout=20s CMD ["python", "-c", "import felrec_dist, cache_server"]
CMD ["felrec", "--help"]
