"""Machine code of CUDA kernels, as text."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest


def sass_of(library: Path) -> dict[str, str]:
    """SASS of each kernel of a library by symbol; skips the test where there is no disassembler."""
    folders = [str(folder) for folder in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(folders))
    if cuobjdump is None:
        pytest.skip("needs cuobjdump (CUDA's toolkit, or pip install nvidia-cuda-cuobjdump)")
    text = subprocess.run([cuobjdump, "--dump-sass", str(library)], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"Function : (\w+)_kernel\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def loads_before_waiting(code: str) -> list[str]:
    """Loads to registers that come before the wait for the kernels before: of nothing that those may still write."""
    early, wait, _ = code.partition("ACQBULK")
    assert wait, "it does not wait at all"
    return re.findall(r"LDG\.\S+", early)
