# A checkpoint of the target tensorrt-llm (the Hugging Face form) behind trtllm-serve's OpenAI-compatible API.
# Not built and not run by this project: its build machines have no GPU. From a directory that holds the engine:
#   docker build -f tensorrt-llm.Dockerfile --build-arg ENGINE=engines/llama-fp8 -t llama-fp8 .
#   docker run --rm --gpus all --ipc host -p 8000:8000 llama-fp8
# For weights that shall stay outside of the image use the base image itself and mount the engine at /engine.

FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.1
ARG ENGINE
LABEL org.opencontainers.image.description="enginesmith checkpoint for TensorRT-LLM; not built here"
COPY ${ENGINE} /engine
EXPOSE 8000
# The first health check comes after the weights are loaded and the kernels are chosen.
HEALTHCHECK --interval=15s --timeout=6s --start-period=900s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["trtllm-serve", "/engine", "--backend", "pytorch", "--host", "0.0.0.0", "--port", "8000"]
# Further flags (--tp_size, --max_batch_size, --max_seq_len): those of the engine's own serving.md.
CMD ["--max_batch_size", "4", "--max_seq_len", "4096"]
