"""What runs on a GPU machine without nvcc: kernels built on one machine, checked on another; FlashAttention.

    python -m tests.schedules.cuda_cases build DIR     # TVM, nvcc, no GPU
    python -m tests.schedules.cuda_cases check DIR     # a Hopper GPU, torch; TVM is imported, not used
    python -m tests.schedules.cuda_cases flash         # a Hopper GPU, vLLM; no TVM

`check` is all that can be checked there, `flash` a part of it (cuda_flash_cases.py).
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from . import cuda_flash_cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("build", "check", "flash"):
        options = steps.add_parser(step)
        options.add_argument("--seed", type=int, default=None, help="of the inputs (default: random)")
        if step != "flash":
            options.add_argument("folder", type=Path)
    given = parser.parse_args()
    seed = secrets.randbits(31) if given.seed is None else given.seed
    failed = 0
    if given.step != "flash":
        from . import cuda_kernel_cases  # which needs TVM

        if given.step == "build":
            cuda_kernel_cases.build(given.folder, seed)
            return 0
        failed += cuda_kernel_cases.check(given.folder, seed)
    failed += cuda_flash_cases.check(seed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
