"""How moe_jax is installed. `make lock` turns these ranges into requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

# What `make train` needs. A lower bound is the oldest release the code was run with; the upper bound
# on JAX is there because its explicit-sharding API still moves between minor releases.
CORE = [
    "absl-py>=2.1",
    "etils[epath]>=1.9",  # the paths of Orbax: folders and buckets alike
    "flax>=0.12.7",
    "jax>=0.10,<0.13",  # 0.10 is the last for Python 3.11; pip takes a newer one on 3.12 and 3.13
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.34",
    "rich>=13",
    "scipy>=1.13",  # sparse counts in the analyses, Student's t in sweeps; JAX needs it anyway
    "sentencepiece>=0.2",
    "tensorboardX>=2.6.2",
    "tqdm>=4.66",
]

# TensorFlow and seqio: 600 MB and more, so they are asked for by name. tensorflow-text is what seqio
# tokenises with; it is listed so that its lower bound is ours.
DATA = [
    "seqio>=0.0.20",
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.9",
    "tensorflow-text>=2.21",
]

DEV = [
    "filelock>=3.13",  # JAX's compilation cache needs it to be shared between test processes
    "hypothesis>=6.100",
    "ipykernel>=6.29",  # with nbclient and nbformat: the notebooks are run by a test
    "nbclient>=0.10",
    "nbformat>=5.10",
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.6",
    "tokenizers>=0.20",  # texts of imported models
]

setup(
    name="moe_jax",
    version="0.1.0",
    description="Mixture-of-experts language models in JAX: train, ablate and look inside, from a laptop to a TPU pod",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["moe_jax", "moe_jax.*"]),
    package_data={"moe_jax": ["**/*.html", "**/*.css", "**/*.json", "**/*.txt"]},
    install_requires=CORE,
    extras_require={
        # The accelerator extras only add JAX's own plugin; the Makefile picks one by looking at the machine.
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],  # the CUDA 12 libraries run on every driver from 525 on
        "cuda13": ["jax[cuda13]"],  # driver 580 or newer
        "tokamax": ["tokamax>=0.0.12"],  # kernels for moe.grouped_matmul="tokamax", on GPUs above all
        "data": DATA,
        # tokenizers: the text of imported models. The others: only for comparing imported checkpoints, and speed, with the
        # original implementation; no test needs them.
        "hf": ["safetensors>=0.4", "tokenizers>=0.20", "torch", "transformers>=5"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["moe-jax = moe_jax.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
