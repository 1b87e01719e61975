"""`pip install -e .` installs what the main job needs on a CPU; accelerators are extras."""

import pathlib

from setuptools import find_packages, setup

setup(
    name="lightning_jax",
    version="0.1.0",
    description="Training stack for hybrid lightning-attention language models in JAX and Flax",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lightning_jax", "lightning_jax.*", "pallas_kernels", "pallas_kernels.*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.15",
        "ml-collections>=1.1",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources",  # tensorflow-datasets imports it and does not declare it on Python 3.9 and newer
        "array_record>=0.8",
        "pyarrow>=15",
        "tokenizers>=0.22",
        "tensorstore",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "tensorboardX>=2.6.2",
        "numpy>=2.0",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "evaluation": ["lm_eval>=0.4.13"],
        "rewards": ["math-verify>=0.9", "langdetect>=1.0.9"],  # answers of math; constraints on a text's language
        # The compilers of TPUs and of NVIDIA GPUs, for any Linux machine: the tests of the kernels that need them run.
        "tpu-compile": ["libtpu"],
        "gpu-compile": ["jax-cuda13-plugin>=0.11", "jax-cuda13-pjrt>=0.11", "nvidia-cuda-nvcc>=13"],
        "zstd": ["zstandard"],  # reads .jsonl.zst
        "test": ["pytest>=9", "pytest-xdist", "hypothesis>=6.100", "ruff>=0.12", "zstandard", "safetensors>=0.5"],
    },
)
