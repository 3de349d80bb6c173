"""`python scripts/verify.py …` is `vllm-compile verify …`, for a checkout not on the PATH."""

import sys

from vllm_compile.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
