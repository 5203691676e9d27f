"""Packaging of keras_usm_lite."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "keras_usm_lite/__init__.py").read_text())[1]
ONNX = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2", "tf2onnx>=1.17"]  # without torch, which brings CUDA
TOOLS = ["hypothesis>=6", "pytest>=8", "pytest-xdist>=3", "ruff>=0.17,<0.18"]

setup(
    name="keras_usm_lite",
    version=VERSION,
    description="Low-bit and N:M sparse fine-tuning of speech recognisers in Keras 3 (USM-Lite)",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["keras_usm_lite", "keras_usm_lite.*"]),
    python_requires=">=3.11.4",  # archives are unpacked with tarfile's filter
    install_requires=[
        "keras>=3.13",
        "tensorflow>=2.18",
        "tensorflow-model-optimization>=0.8",
        # Its last wheels are for Python 3.12, on Linux and macOS.
        'tensorflow-io>=0.37; python_version < "3.13" and sys_platform != "win32"',
        "jiwer>=4",
        "ai-edge-litert>=2",
        "ai-edge-quantizer>=0.8",
        "espeakng-loader>=0.2",  # speech for the example where no corpus can be reached
        "constriction>=0.4",  # the range coder of archives
        "numpy",
        "safetensors>=0.4",
        "scipy",
        "sentencepiece>=0.2",
        "soundfile>=0.12",
        "zstandard>=0.22",
    ],
    extras_require={
        "onnx": ONNX,
        "test": [*ONNX, *TOOLS, "keras-hub>=0.19", "qwix>=0.1"],
    },
    classifiers=["License :: OSI Approved :: Apache Software License", "Programming Language :: Python :: 3"],
)
