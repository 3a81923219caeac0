"""Walk the executor ``vllm`` through emulated GPUs.

    python tests/emulated_gpu/run.py VENV [WORDS FOR PYTHON ...]

Makes the environment VENV with vLLM's CUDA wheel (about 7 GB; ``make emulated-gpu`` names
``.venv-cuda``) unless it is there, builds the driver for it and runs the tests marked ``gpu`` on
two GPUs, or what is given after VENV. Where that cannot be, it says why and ends with 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
PYTHON = "3.11"
REQUIRED = ["--editable", ".[vllm]", "vllm==0.32.0", "nvidia-cuda-crt<13.1", "pytest",
            "pytest-timeout", "hypothesis"]  # fmt: skip
LEFT_OUT = [
    "anthropic", "cuda-python", "fastsafetensors", "flashinfer-python", "humming-kernels",
    "instanttensor", "mcp", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "pynvvideocodec",
    "quack-kernels", "tilelang", "tokenspeed-mla",
]  # fmt: skip
"""What vLLM's wheel asks for and engines start without: 2 GB, and kernels compiled at run time."""


def make_environment(folder: Path) -> None:
    """Install vLLM's CUDA wheel and this checkout into a new environment.

    Raises:
        subprocess.CalledProcessError: if a package cannot be had.
    """
    uv = [sys.executable, "-m", "uv"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as never:
        never.write("".join(f"{name}; sys_platform == 'none'\n" for name in LEFT_OUT))
        never.flush()
        inside = str(folder / "bin" / "python")
        subprocess.run([*uv, "venv", "--quiet", "--python", PYTHON, str(folder)], check=True)
        subprocess.run(
            [*uv, "pip", "install", "--python", inside, "--override", never.name, *REQUIRED],
            cwd=REPOSITORY,
            check=True,
        )


def environment(driver: Path, folder: Path) -> Mapping[str, str]:
    """Return the variables under which processes find the emulated GPUs.

    Args:
        driver: folder with the built library.
        folder: for what processes hold, and for caches.
    """
    return os.environ | {
        "LD_PRELOAD": str(driver / "libcudart.so.13"),
        "LD_LIBRARY_PATH": str(driver),
        "TRITON_LIBCUDA_PATH": str(driver),
        "PYTHONPATH": str(HERE / "site"),
        "EMULATED_GPU_TABLE": str(folder / "table"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
    }


def main(words: list[str]) -> int:
    """Make what is missing and run."""
    venv = Path(words[0]).absolute()
    inside = str(venv / "bin" / "python")
    if not Path(inside).exists():
        try:
            make_environment(venv)
        except subprocess.CalledProcessError as error:
            shutil.rmtree(venv, ignore_errors=True)
            print(f"skipped: vLLM's CUDA wheel is not to be had here ({error})")
            return 0
    with tempfile.TemporaryDirectory(prefix="emulated-gpu-") as name:
        folder = Path(name)
        command = [inside, str(HERE / "build.py"), str(folder / "driver")]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            print(f"skipped: {built.stderr.strip()}")
            return 0
        what = words[1:] or ["-m", "pytest", "-m", "gpu", "tests/vllm"]
        done = subprocess.run(
            [inside, *what], env=environment(folder / "driver", folder), cwd=REPOSITORY, check=False
        )
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
