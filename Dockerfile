# Planning alone:      docker build -t vramwise .
#                      docker run --rm vramwise plan llama-3.1-8b 12GB
# With the stack:      docker build --target train -t vramwise:train .
#                      docker run --rm --gpus all -v "$PWD:/data" -v vramwise:/home/vramwise vramwise:train \
#                        train --model llama-3.1-8b --data train.jsonl --allow-download
FROM python:3.12-slim AS base
RUN useradd --create-home vramwise && mkdir /data && chown vramwise /data
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY planner planner
COPY launcher launcher
COPY vramwise vramwise
COPY profiles profiles
COPY docs/man docs/man
WORKDIR /data
ENTRYPOINT ["vramwise"]
CMD ["--help"]

FROM base AS train
# Triton compiles for the card where regional compilation is planned.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir '/src[train]'
USER vramwise

FROM base AS plan
RUN pip install --no-cache-dir /src
USER vramwise
