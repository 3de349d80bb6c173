#!/bin/sh
# Says what this machine lacks, with the Debian packages that have it: check.sh PYTHON
python=$1
need() { echo "error: $1 is missing; on Debian: apt-get install $2" >&2; exit 1; }

command -v "$python" >/dev/null || need "$python" "python3.11 python3.11-venv, or name another: make PYTHON=..."
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "venv for $python" python3.11-venv
command -v gcc >/dev/null || need gcc "gcc libc6-dev"
echo 'int main(void) { return 0; }' | gcc -fopenmp -x c -o /dev/null - 2>/dev/null || need "the C library for gcc" libc6-dev
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || need "libnuma, which vLLM's kernels link to," libnuma1
