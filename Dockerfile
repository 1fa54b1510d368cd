# The exact environment behind the numbers of the README.
#   docker build -t gradeclip_ft .
#   docker run --rm --gpus all --ipc host -v "$PWD/runs:/home/user/gradeclip_ft/runs" gradeclip_ft train +exp=shapes
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv make git \
 && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 user
USER user
WORKDIR /home/user/gradeclip_ft
ENV PATH=/home/user/gradeclip_ft/.venv/bin:$PATH

COPY --chown=user pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY --chown=user gradeclip_ft gradeclip_ft
COPY --chown=user conf conf
COPY --chown=user tools tools
RUN PIP_CONSTRAINT=constraints.txt make .venv/installed

ENTRYPOINT ["python", "-m", "gradeclip_ft"]
CMD ["--help"]
