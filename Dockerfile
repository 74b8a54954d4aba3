# vlmserve for a CUDA host: torch's wheels bring the CUDA libraries, the host only its driver.
#   docker build -t vlmserve .
# For a host without a GPU, a far smaller image:
#   docker build -t vlmserve:cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
# With Ray, for deploy/ray/kuberay.yaml: --build-arg EXTRA=ray
# What follows the image's name are arguments of `vlmserve serve`; see docs/deploy.md.
FROM python:3.11-slim AS build

ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/vlmserve/bin:$PATH

RUN python -m venv /opt/vlmserve
WORKDIR /src
# The requirements by themselves, so that a change of the code does not install them again.
COPY requirements requirements
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
      pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements/base.txt)"; \
    fi
RUN pip install -r requirements/base.txt "$(grep '^bitsandbytes==' requirements/test.txt)"
COPY . .
ARG EXTRA=""
RUN pip install --no-deps . && \
    if [ "$EXTRA" = ray ]; then \
      pip install -c requirements/base.txt -c requirements/ray/newest.txt '.[ray]'; \
    fi

FROM python:3.11-slim

# Triton compiles a small launcher of each kernel; on a CPU vlmserve compiles its products.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
# KubeRay's probes call wget.
ARG EXTRA=""
RUN if [ "$EXTRA" = ray ]; then \
      apt-get update && apt-get install -y --no-install-recommends wget \
      && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --uid 1000 --create-home vlmserve && install -d -o vlmserve /cache
COPY --from=build /opt/vlmserve /opt/vlmserve

ENV PATH=/opt/vlmserve/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton
# By number, so that Kubernetes can tell that it is not root.
USER 1000
WORKDIR /home/vlmserve
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v1/health/ready', timeout=4)"]
ENTRYPOINT ["vlmserve", "serve", "--host", "0.0.0.0", "--port", "8000"]
