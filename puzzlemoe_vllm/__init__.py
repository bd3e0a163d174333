"""PuzzleMoE for vLLM: the `puzzlemoe` quantization method.  Importing this neither imports vLLM nor touches a GPU."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, more than once."""
    import puzzlemoe_vllm.config  # noqa: F401  (registers the method when imported)
