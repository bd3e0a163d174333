#!/bin/bash
# NEEDS VLLM: does vLLM's own FP8 method serve the linear layers beside our experts as it serves them in a stock FP8 model (same tokens), quantised here (Qwen3-MoE) and kept from an FP8 source (DeepSeek-V2, MLA, edge blocks); about 130 s.
export PYTHONPATH=$PWD:$PWD/tests:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0 PUZZLEMOE_BACKEND=triton
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 VLLM_ALLOW_INSECURE_SERIALIZATION=1 VLLM_LOGGING_LEVEL=INFO
[ -e .gpu/vllm-site.tar.xz ] && ! python3 -c "import vllm" 2>/dev/null && mkdir -p /tmp/site && tar xJf .gpu/vllm-site.tar.xz -C /tmp/site && export PYTHONPATH=/tmp/site:$PYTHONPATH
cat > /tmp/make.py <<'PY'
import json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from support import models
from support.fp8 import write_fp8
from support.runs import run_method, unpack
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.recipe import PairRecipe
METHOD = PairMethod(PairRecipe(saliency="magnitude"))
ROOT = Path("/tmp/m")
def make(family, kept, **sizes):
    root = ROOT / family
    source = models.build(family, root / "source", **sizes)
    if kept:
        source = write_fp8(source, root / "fp8source", "deepseek")
    run_method(source, root / "packed-fp8", METHOD, dense="fp8")
    run_method(source, root / "packed-bf16", METHOD)
    unpack(root / "packed-fp8", root / "unpacked")
    # What stock vLLM serves: dense experts, the same FP8 linear layers.
    stock = root / "stock-fp8"
    shutil.copytree(root / "unpacked", stock)
    packed = {k: v for f in (root / "packed-fp8").glob("*.safetensors") for k, v in load_file(f).items()}
    config = json.loads((root / "packed-fp8/config.json").read_text())
    fp8 = config["quantization_config"]["fp8"]
    where = {}
    for f in stock.glob("*.safetensors"):
        t = load_file(f)
        for layer in fp8:
            if f"{layer}.weight" in t:
                t[f"{layer}.weight"] = packed[f"{layer}.weight"]
                t[f"{layer}.weight_scale_inv"] = packed[f"{layer}.weight_scale_inv"]
        save_file(t, f, metadata={"format": "pt"})
        where |= dict.fromkeys(t, f.name)
    (stock / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    c = json.loads((stock / "config.json").read_text())
    linear = [k.removesuffix(".weight") for k in where if k.endswith(".weight") and ("proj" in k or ".gate." in k)]
    c["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": [128, 128], "ignored_layers": [n for n in linear if n not in fp8] + ["lm_head"]}
    (stock / "config.json").write_text(json.dumps(c))
    print(family, len(fp8), "layers in FP8", {k.split(".", 3)[3] for k in fp8})
make("qwen3_moe", False, hidden_size=512, head_dim=128, moe_intermediate_size=128)
make("deepseek_v2", True, hidden_size=512, num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512,
     qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_intermediate_size=128, intermediate_size=512)
PY
python3 /tmp/make.py || exit 1
cat > /tmp/serve.py <<'PY'
import gc, random, sys, torch
import puzzlemoe_vllm
puzzlemoe_vllm.register()
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
PROMPTS = [random.Random(n).choices(range(256), k=4 * n) for n in range(1, 25)]
def run(folder, **options):
    llm = LLM(folder, dtype="bfloat16", max_model_len=256, max_num_batched_tokens=512, max_num_seqs=32, gpu_memory_utilization=0.2,
              skip_tokenizer_init=True, enable_prefix_caching=False, **({"enforce_eager": True} | options))
    kinds = llm.apply_model(lambda m: sorted({(n.split(".")[-1], type(l.quant_method).__name__, str(l.weight.dtype)) for n, l in m.named_modules() if hasattr(l, "quant_method") and hasattr(l, "weight")}))
    print(folder, options, kinds[0])
    s = SamplingParams(temperature=0, max_tokens=12, logprobs=2, ignore_eos=True, detokenize=False)
    out = llm.generate([TokensPrompt(prompt_token_ids=p) for p in PROMPTS], s, use_tqdm=False)
    del llm; gc.collect(); cleanup_dist_env_and_memory()
    return [(o.outputs[0].token_ids, [p[t].logprob for t, p in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)]) for o in out]
def compare(name, a, b):
    same = sum(x == y for (t, _), (u, _) in zip(a, b) for x, y in zip(t, u))
    first = max(abs(p[0] - q[0]) for (t, p), (u, q) in zip(a, b) if t[0] == u[0])
    print(f"RESULT {name}: {same} of {12 * len(a)} tokens alike, first tokens' logprobs at most {first:.4f} apart", flush=True)
for family in sys.argv[1:]:
    try:
        root = f"/tmp/m/{family}"
        ours = run(f"{root}/packed-fp8")
        compare(f"{family} packed with FP8 - stock vLLM FP8 with dense experts", ours, run(f"{root}/stock-fp8"))
        compare(f"{family} packed with FP8 - packed with bf16", ours, run(f"{root}/packed-bf16"))
        compare(f"{family} packed with FP8 - unpacked bf16", ours, run(f"{root}/unpacked"))
        if family == "qwen3_moe":
            compare(f"{family} eager - compiled with CUDA graphs", ours, run(f"{root}/packed-fp8", enforce_eager=False))
    except Exception as error:
        import traceback; traceback.print_exc(); print("RESULT", family, "FAILED", type(error).__name__, str(error)[:600], flush=True)
PY
for f in qwen3_moe deepseek_v2; do timeout 150 python3 /tmp/serve.py $f > /tmp/$f.log 2>&1; grep -h "RESULT\|quant_method\|Selected\|LinearMethod\|Kernel" /tmp/$f.log | cut -c1-900 | head -40; grep -q RESULT /tmp/$f.log || tail -30 /tmp/$f.log; done
