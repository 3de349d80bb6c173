"""`python scripts/analyze.py …` is `vllm-compile analyze …`, for a checkout not on the PATH."""

import sys

from vllm_compile.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
