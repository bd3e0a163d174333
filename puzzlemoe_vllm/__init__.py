"""PuzzleMoE for vLLM: the `puzzlemoe` quantization method.  Importing this neither imports vLLM nor touches a GPU."""

import functools

TESTED = ((0, 26), (0, 33))
"""The oldest and the newest release of vLLM that this version is tested with."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, more than once."""
    import vllm

    _warn_of_untested(vllm.__version__)
    import puzzlemoe_vllm.config  # noqa: F401  (registers the method when imported)


@functools.cache
def _warn_of_untested(version: str) -> None:
    import logging
    import re

    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or not TESTED[0] <= (int(match[1]), int(match[2])) <= TESTED[1]:
        oldest, newest = (".".join(map(str, release)) for release in TESTED)
        logging.getLogger(__name__).warning(
            "puzzlemoe: vLLM %s is not among the releases that this version is tested with, %s to %s: if a packed "
            "model does not start, install one of those or upgrade puzzlemoe-vllm",
            version,
            oldest,
            newest,
        )
