"""Perplexity of a model as vLLM serves it: log-probabilities of prompt tokens."""

from __future__ import annotations

import math
import os
from pathlib import Path

from torch import Tensor

from puzzlemoe_offline.score.perplexity import Perplexity
from puzzlemoe_vllm.errors import UserError

BATCH = 64
"""Windows handed to vLLM at a time; it returns a Python object for every token."""


class ServingError(UserError):
    """vLLM is missing, or does not serve the model; the text says why."""


def served_perplexity(
    folder: Path, windows: Tensor, trust_remote_code: bool = False, gpu_memory_utilization: float | None = None
) -> Perplexity:
    """windows: token ids [n, T].  Each window is scored on its own, its first token only conditions.

    vLLM runs with its defaults, in bf16, and with its plugins; trust_remote_code lets it run code that the folder
    brings, gpu_memory_utilization is the share of a GPU's memory that it takes.
    Raises ServingError when vLLM is not installed, or does not start on the model or with windows of this length.
    """
    # Its log would mix with what the command prints.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        from vllm import LLM, SamplingParams, TokensPrompt
    except ImportError as error:
        raise ServingError(f"--engine vllm needs vLLM ({error}): pip install vllm, or use --engine layerwise") from None
    count, length = windows.shape
    try:
        # vLLM generates a token after every prompt, and wants room for it.
        options = {"gpu_memory_utilization": gpu_memory_utilization} if gpu_memory_utilization else {}
        llm = LLM(
            str(folder),
            dtype="bfloat16",
            max_model_len=length + 1,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except Exception as error:  # vLLM raises whatever its configuration, loader and layers raise
        reason = " ".join(str(error).split())
        raise ServingError(
            f"{folder}: vLLM does not serve it with --sequence-length {length}: {reason}; its log above says why. "
            "Where memory is short, lower --gpu-memory-utilization or, on a CPU, set VLLM_CPU_KVCACHE_SPACE (GiB)"
        ) from None
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    total = 0.0
    for batch in windows.split(BATCH):
        prompts = [TokensPrompt(prompt_token_ids=window) for window in batch.tolist()]
        for output in llm.generate(prompts, sampling, use_tqdm=False):
            # There is no log-probability of the first token.
            scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            total -= sum(logprobs[token].logprob for token, logprobs in scored)
    tokens = count * (length - 1)
    return Perplexity(math.exp(total / tokens), count, length, tokens)
