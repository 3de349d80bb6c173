"""`python scripts/tune.py …` is `vllm-compile tune …`, for a checkout not on the PATH."""

import sys

from vllm_compile.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
