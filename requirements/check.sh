#!/bin/sh
# check.sh PYTHON: says what this machine lacks, and which of Debian's packages has it.
python=$1
need() { echo "error: $1 is missing; on Debian: apt-get install $2" >&2; exit 1; }

command -v "$python" >/dev/null || need "$python" "python3.11-venv, or name another Python: make PYTHON=..."
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "$python's venv" python3.11-venv
command -v gcc >/dev/null || need gcc "gcc libc6-dev"
echo 'int main(void) {}' | gcc -fopenmp -x c -o /dev/null - 2>/dev/null || need "C's library" libc6-dev
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || need "vLLM's libnuma.so.1" libnuma1
