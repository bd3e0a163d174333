"""What a model says in one process: log-probabilities of random prompts' tokens, and tokens of greedy decoding.

    python benchmarks/generate.py MODEL --tensor-parallel 2 --output generated.json

The same prompts for every model with that vocabulary.  Tokens are scheduled alike in every run: the engine is in this
process and gets all prompts before its first step, without a cache of prefixes or CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from pathlib import Path
from typing import Any

PROMPTS, LENGTH = 16, 256
"""Prompts, and the tokens of each."""
GENERATED = 16
"""Tokens after each prompt."""

KV_CACHE = 1 << 30
"""Bytes on each GPU: enough for all prompts.  vLLM would measure what is free, which other engines change."""


def generate(folder: Path, tensor_parallel: int, expert_parallel: bool, gpu_memory: float) -> dict[str, Any]:
    """Log-probabilities, a list for each prompt of its tokens from the second on; generated tokens, a list for each
    prompt; versions of vLLM and torch."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    import vllm
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(
        str(folder),
        tensor_parallel_size=tensor_parallel,
        enable_expert_parallel=expert_parallel,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=LENGTH + GENERATED,
        max_num_seqs=PROMPTS,
        enable_prefix_caching=False,
        gpu_memory_utilization=gpu_memory,
        kv_cache_memory_bytes=KV_CACHE,
    )
    vocabulary = engine.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = [random.Random(number).choices(range(vocabulary), k=LENGTH) for number in range(PROMPTS)]
    sampling = SamplingParams(temperature=0, max_tokens=GENERATED, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    return {
        "prompt_logprobs": [
            [found[token].logprob for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(prompts, outputs, strict=True)
        ],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    """Writes the JSON.  Raises ValueError when a log-probability is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--expert-parallel", action="store_true")
    parser.add_argument("--gpu-memory", type=float, default=0.9)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    said = generate(arguments.model, arguments.tensor_parallel, arguments.expert_parallel, arguments.gpu_memory)
    if not all(math.isfinite(each) for prompt in said["prompt_logprobs"] for each in prompt):
        raise ValueError(f"{arguments.model}: some log-probabilities are not finite")
    arguments.output.write_text(json.dumps(said))


if __name__ == "__main__":
    main()
