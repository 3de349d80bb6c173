"""`python scripts/db.py …` is `vllm-compile db …`, for a checkout not on the PATH."""

import sys

from vllm_compile.cli import main

if __name__ == "__main__":
    sys.exit(main(["db", *sys.argv[1:]]))
