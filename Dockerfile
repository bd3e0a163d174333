# vLLM's CUDA image plus this project with its CUDA library.
#   docker build -t puzzlemoe-vllm .
#   docker run --gpus all -p 8000:8000 -v /models:/models puzzlemoe-vllm /models/mixtral-puzzle
# It serves.  With --build-arg EXTRA=compress the image compresses too: --entrypoint puzzlemoe.
# Written for the layout of vLLM's public images; this file has not been built in this project's own tests.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip python3-venv && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /build && /build/bin/pip install --quiet build \
    && cd /src && PUZZLEMOE_BUILD_CUDA=1 /build/bin/python -m build --wheel --outdir /wheels

FROM vllm/vllm-openai:v0.33.0
ARG EXTRA=""
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRA:+[$EXTRA]}" && rm -r /wheels
