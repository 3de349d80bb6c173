"""`python scripts/compile.py …` is `vllm-compile compile …`, for a checkout not on the PATH."""

import sys

from vllm_compile.cli import main

if __name__ == "__main__":
    sys.exit(main(["compile", *sys.argv[1:]]))
