# The lab for machines with an NVIDIA GPU (docs/hardware.md, "In a container"):
#   docker build -t orpo-lab .
#   docker run --rm --gpus all -v orpo-lab-hub:/hub -v "$PWD:/work" orpo-lab train model=mistral_7b dataset=ultrafeedback
# torch's wheel brings CUDA's libraries; the host has the driver
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton compiles its kernels where they run, with a C compiler and Python's headers
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's image has a user of this number already; files in a mounted folder belong to the number
RUN useradd --create-home --non-unique --uid 1000 lab \
    && mkdir /hub /work \
    && chown lab /hub /work

ENV PATH=/opt/lab/bin:$PATH HF_HOME=/hub PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/lab

# Extras, divided by commas: docker build --build-arg EXTRAS=search,curate ...
ARG EXTRAS=
WORKDIR /tmp/lab
COPY LICENSE README.md constraints.txt pyproject.toml setup.py ./
COPY conf conf
COPY orpo_lab orpo_lab
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRAS:+[$EXTRAS]}" \
    && rm -rf /tmp/lab

USER lab
WORKDIR /work
# Models and data sets of the hub; where runs land
VOLUME ["/hub", "/work"]
ENTRYPOINT ["orpo-lab"]
CMD ["--help"]
