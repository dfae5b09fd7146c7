#!/usr/bin/env bash
# Creates .venv (and, if npm is installed, a real llama.cpp for the GGUF tests) and runs the tests.
# Extra arguments go to pytest: bash tests/run.sh tests/test_reward.py -v
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_venv.sh
setup_venv requirements-dev.txt
if command -v npm >/dev/null && [ ! -d tests/node_modules/node-llama-cpp ]; then
    echo "installing llama.cpp for the GGUF tests into tests/node_modules"
    npm install --prefix tests --no-audit --no-fund --ignore-scripts --loglevel=error
fi
. examples/fast_blas.sh
# Two processes, a file to each: more would not help on two cores, and llama.cpp takes memory.
"$python" -m pytest -n 2 --dist loadfile "$@"
