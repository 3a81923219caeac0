"""Build the emulated driver for the environment this runs in.

    python tests/emulated_gpu/build.py FOLDER

One library stands for CUDA's runtime, its driver, cuBLAS and NVML. Functions that torch's, Triton's
and vLLM's libraries ask for and ``driver.c`` does not have do nothing and report success.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parent / "driver.c"
LIBRARY = "libcudart.so.13"
"""What torch's libraries ask for first, so that NVIDIA's own is not loaded for them."""
ALIASES = ("libcuda.so.1", "libnvidia-ml.so.1")
GROUPS = {
    "libcudart.so.13": "cuda*; __cuda*;",
    "libcublas.so.13": "cublas[A-KM-Z]*;",
    "libcublasLt.so.13": "cublasLt*;",
    "driver": "cu[A-Z]*; nvml*;",
}
"""Version of the symbols by name, as NVIDIA's libraries have them."""
ASKED_AT_RUN_TIME = (
    "cuCtxSetCurrent", "cuCtxGetLimit", "cuCtxSetLimit", "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2", "cuCtxSynchronize", "cuStreamSynchronize", "cuFuncSetAttribute",
    "cuFuncSetCacheConfig", "cuModuleUnload", "cuMemMap", "cuMemSetAccess",
    "cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col", "cublasLtDestroy", "cudaDeviceReset",
)  # fmt: skip
_NAME = re.compile(r"(?:__)?cu(?:da|blas)?[A-Z]\w*")


class Unavailable(Exception):
    """Why the driver cannot be built here."""


def _folder(package: str) -> Path:
    spec = find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    for place in places:
        return Path(place)
    raise Unavailable(f"{package} is not installed")


def _wanted() -> set[str]:
    """Return the functions of CUDA that the environment's libraries want of others."""
    torch, vllm = _folder("torch"), _folder("vllm")
    libraries = [*(torch / "lib").glob("libtorch*.so"), *(torch / "lib").glob("libc10_cuda.so"),
                 *vllm.glob("*.so"), *vllm.glob("vllm_flash_attn/*.so")]  # fmt: skip
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        raise Unavailable("torch is a build for CPUs")
    if not any("_C" in library.name for library in vllm.glob("*.so")):
        raise Unavailable("vLLM is a build for CPUs")
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.split()}
    return {n for n in names if _NAME.fullmatch(n) and not n.startswith("cuFile")}


def build(folder: Path) -> Path:
    """Build into a folder and return the library, to be loaded before all others.

    Raises:
        Unavailable: saying what is missing.
    """
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"there is no {tool}")
    include = _folder("nvidia") / "cu13" / "include"
    for header in ("cuda_runtime_api.h", "crt/host_defines.h"):
        if not (include / header).exists():
            raise Unavailable(f"there is no {include / header}: pip install nvidia-cuda-crt")
    folder.mkdir(parents=True, exist_ok=True)
    stubs = folder / "idle.c"  # weak: what driver.c has goes before
    stubs.write_text(
        "".join(
            f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n"
            for name in sorted(_wanted() | set(ASKED_AT_RUN_TIME))
        )
    )
    versions = folder / "versions"
    versions.write_text("".join(f"{version} {{ {names} }};\n" for version, names in GROUPS.items()))
    library = folder / LIBRARY
    command = [
        "gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}",
        f"-Wl,--version-script,{versions}", "-I", str(include), "-o", str(library),
        str(SOURCE), str(stubs), "-ldl", "-lpthread",
    ]  # fmt: skip
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"gcc: {done.stderr}")
    for alias in ALIASES:
        (folder / alias).unlink(missing_ok=True)
        (folder / alias).symlink_to(LIBRARY)
    return library


if __name__ == "__main__":
    try:
        print(build(Path(sys.argv[1])))
    except Unavailable as error:
        sys.exit(f"no emulated driver here: {error}")
