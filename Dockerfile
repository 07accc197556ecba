# One image for driver, workers and shards.
#   docker build -t felrec-dist .                                  CUDA
#   docker build -t felrec-dist:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.11-slim-bookworm

ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=https://pypi.org/simple

# A process that Ray starts must not write beside the package; numba's cache goes to the user's home.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    NUMBA_CACHE_DIR=/home/felrec/.cache/numba

RUN useradd --create-home --uid 1000 felrec
WORKDIR /app

# PyTorch first: the largest layer, and the one that changes least.
RUN pip install "torch==${TORCH_VERSION}" --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple
COPY launch/constraints.txt launch/constraints.txt
COPY pyproject.toml README.md ./
COPY felrec_dist felrec_dist
COPY cache_server cache_server
COPY launch launch
COPY configs configs
RUN pip install ".[ray,s3]" --constraint launch/constraints.txt

USER felrec
HEALTHCHECK --interval=30s --timeout=20s CMD ["python", "-c", "import felrec_dist, cache_server"]
CMD ["felrec", "--help"]
