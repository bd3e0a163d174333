"""Proof of a refactoring: every tensor that this tree's tool writes equals, bit for bit, what another commit's writes.

    python tools/same_tensors.py COMMIT [--only TEXT]

Both run here, in processes of their own, on examples/tiny-moe and on a tiny random model of each family: every code,
rule, pairing and sparsity, MergeMoE, unpacking and the baselines.  What a commit wrote is kept in `.same-tensors/`, by
its full hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / ".same-tensors"

CODES = ("mask16", "angle16", "angle8", "angle6", "mask6")
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek", "olmoe")
BASELINES = ("int4", "gptq-int3", "wanda-2:4", "drop-50", "hc-smoe-50", "paper-3")

PAIRS = {
    "default": [],
    "default 25%": ["--sparsity", "0.25"],
    "paper": ["--recipe", "paper"],
    "paper 25%": ["--recipe", "paper", "--sparsity", "0.25"],
    "paper tau 0.2 searched": ["--recipe", "paper", "--tau", "0.2", "--pairing", "search"],
    "paper magnitude": ["--recipe", "paper", "--saliency", "magnitude"],
    "least squares": ["--recipe", "paper", "--rule", "least-squares", "--pairing", "coactivation"],
    "least squares compensated": ["--code", "mask16"],
    **{f"{code} random": ["--code", code, "--no-compensate", "--pairing", "random"] for code in CODES[1:]},
    **{f"{code} compensated, seed 3": ["--code", code, "--seed", "3"] for code in CODES[1:]},
    "angle8 group 32": ["--group-size", "32", "--no-compensate"],
}
CLUSTERS = {"mergemoe": ["--method", "mergemoe", "--clusters", "3"]}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a model folder, with its dtype and shape."""
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            import torch

            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found


def run_cases(only: str) -> dict[str, dict[str, str]]:
    """What the tool on sys.path writes, by case."""
    import importlib

    from support.models import build

    main = importlib.import_module(os.environ["SAME_TENSORS_MAIN"]).main
    old = os.environ["SAME_TENSORS_MAIN"].endswith(".cli")
    found: dict[str, dict[str, str]] = {}

    def tool(*words: object) -> None:
        options = [str(word) for word in words]
        if old:  # before the word had one meaning
            options = ["--experts" if word == "--clusters" else word for word in options]
        sys.argv = ["puzzlemoe", *options]
        try:
            main()
        except SystemExit as stopped:
            if stopped.code:
                raise RuntimeError(f"puzzlemoe {' '.join(options)} failed") from None

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        text = scratch / "text.txt"
        text.write_text((ROOT / "examples/tiny-moe/calibration.txt").read_text(encoding="utf-8")[:60_000])
        sources = {"tiny-moe": ROOT / "examples" / "tiny-moe" / "model"}
        sources |= {family: build(family, scratch / family) for family in FAMILIES}
        sources["mixtral fused"] = build("mixtral", scratch / "fused", fused=True)
        for source, folder in sources.items():
            calibration = ["--calibration", text, "--samples", "12", "--sequence-length", "128", "--device", "cpu"]
            cases = {label: ("compress", options) for label, options in (PAIRS | CLUSTERS).items()}
            cases |= {label: ("baseline", ["--method", label]) for label in BASELINES}
            for label, (verb, options) in cases.items():
                case = f"{source}: {label}"
                if only not in case or (source == "deepseek_v2" and label == "drop-50"):
                    continue
                out = scratch / "out" / str(len(found))
                tool(verb, folder, out, *options, *calibration)
                found[case] = digests(out)
                if label in ("default 25%", "mergemoe"):
                    tool("unpack", out, scratch / "unpacked" / str(len(found)))
                    found[f"{case}, unpacked"] = digests(scratch / "unpacked" / str(len(found)))
    return found


def written_by(tree: Path, main: str, target: Path, only: str) -> dict[str, dict[str, str]]:
    """The same of the tool in a folder, by a process of its own."""
    tests = ROOT / "tests"
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tests}", "SAME_TENSORS_MAIN": main}
    command = [sys.executable, __file__, "--write", str(target), "--only", only]
    subprocess.run(command, check=True, env=environment, cwd=tree, stdout=subprocess.DEVNULL)
    return json.loads(target.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(json.dumps(run_cases(arguments.only)))
        return 0
    commit = subprocess.run(
        ["git", "rev-parse", arguments.commit], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    KEPT.mkdir(exist_ok=True)
    kept = KEPT / f"{commit}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as name:
            tree = Path(name, "tree")
            subprocess.run(["git", "worktree", "add", "--detach", "-q", str(tree), commit], cwd=ROOT, check=True)
            try:
                flat = (tree / "puzzlemoe_offline" / "cli.py").exists()
                written_by(tree, "puzzlemoe_offline.cli" if flat else "puzzlemoe_offline.cli.main", kept, "")
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    expected = {case: held for case, held in json.loads(kept.read_text()).items() if arguments.only in case}
    with tempfile.TemporaryDirectory() as name:
        found = written_by(ROOT, "puzzlemoe_offline.cli.main", Path(name, "found.json"), arguments.only)
    different = sorted(case for case in expected.keys() | found.keys() if expected.get(case) != found.get(case))
    for case in different:
        one, other = expected.get(case, {}), found.get(case, {})
        names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        print(f"{case}: {len(names)} of {len(one)} tensors differ, first {names[0]}")
    tensors = sum(map(len, expected.values()))
    print(f"{len(expected)} models, {tensors} tensors: {len(different)} models differ from {commit[:7]}")
    return bool(different)


if __name__ == "__main__":
    raise SystemExit(main())
