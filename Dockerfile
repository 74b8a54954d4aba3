# vlmserve on a CUDA host. CPU only: --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#   docker build -t vlmserve .
#   docker run --gpus all -p 8000:8000 -v vlmserve-cache:/cache vlmserve [MODEL]
FROM python:3.11-slim

ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/cache

RUN useradd --create-home --uid 1000 vlmserve && mkdir /cache && chown vlmserve /cache
RUN python -m venv /opt/vlmserve
ENV PATH=/opt/vlmserve/bin:$PATH

WORKDIR /src
COPY requirements/base.txt requirements/
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
      pip install --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' requirements/base.txt)"; \
    fi && pip install -r requirements/base.txt
COPY . .
RUN pip install --no-deps .

USER vlmserve
WORKDIR /home/vlmserve
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v1/health/live', timeout=4)"]
ENTRYPOINT ["vlmserve", "serve", "--host", "0.0.0.0", "--port", "8000"]
