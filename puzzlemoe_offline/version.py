"""The installed version, which provenance records."""

from importlib.metadata import version

VERSION = version("puzzlemoe-vllm")
