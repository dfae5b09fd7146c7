#!/usr/bin/env bash
# Sets up .venv (and, where npm is there, a real llama.cpp for the GGUF tests), then runs the tests.
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
"$python" -m pytest "$@"
