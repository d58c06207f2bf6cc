# cnclip-ft in a container, at the versions of constraints.txt.
#
#   docker build -t cnclip-ft .                                                             # CPU
#   docker build -t cnclip-ft:cuda --build-arg BASE=nvidia/cuda:TAG-base-ubuntu24.04 .      # CUDA; run with --gpus all
#   docker run --rm -v "$PWD":/data cnclip-ft data check /data/store/train
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN if ! command -v python3 >/dev/null || ! python3 -m venv --help >/dev/null 2>&1; then \
      apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv && \
      rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /opt/cnclip-ft
COPY setup.cfg setup.py* pyproject.toml* README.md LICENSE NOTICE constraints.txt ./
COPY cnclip_ft cnclip_ft
COPY data_tools data_tools
COPY run_scripts run_scripts
# torch first and alone, as run_scripts/environment.sh does; TORCH_INDEX= names another list of builds (CPU ones are smaller).
ARG TORCH_INDEX=
RUN python3 -m venv /opt/venv && \
    /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch && \
    /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[fast,plots,lora,onnx,parquet,webdataset,serve,faiss]'

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# What is written belongs to whoever runs it: docker run --user "$(id -u):$(id -g)".
RUN mkdir -p /data && chmod 777 /data
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["cnclip-ft"]
CMD ["--help"]
