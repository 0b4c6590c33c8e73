# groupvit serve on CPUs, with the bundled model unless another is named:
#
#   docker build -t groupvit .
#   docker run --rm -p 8000:8000 groupvit
#   docker run --rm -p 8000:8000 -v "$PWD/model:/model:ro" groupvit --model /model

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conversion conversion
COPY groupvit_common groupvit_common
COPY groupvit_tf groupvit_tf
COPY groupvit_torch groupvit_torch
# PyTorch's own index has wheels without CUDA, a tenth of the size.
RUN python -m venv /opt/groupvit \
    && /opt/groupvit/bin/pip install --constraint constraints.txt \
       --extra-index-url https://download.pytorch.org/whl/cpu '.[torch,serve]'

FROM python:3.11-slim
ENV PATH=/opt/groupvit/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/home/groupvit/.cache/huggingface
RUN useradd --create-home --uid 10001 groupvit
COPY --from=build /opt/groupvit /opt/groupvit
USER 10001
WORKDIR /home/groupvit
EXPOSE 8000
# The first answer waits for the model.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["groupvit", "serve", "--host", "0.0.0.0", "--port", "8000"]
