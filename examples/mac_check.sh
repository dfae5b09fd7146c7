#!/usr/bin/env bash
# Measures your Mac, and prints a block of text to paste into an issue: memory limits, and the speed
# and peak memory of SFT and GRPO. Takes about ten minutes after the models are downloaded (4.6 GB).
# Close other programs first.
#
#   bash examples/mac_check.sh              Qwen3-0.6B and Qwen3-1.7B, in bfloat16 and in 4 bits
#   bash examples/mac_check.sh MODEL …      other models, as Hub ids or folders
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_venv.sh
setup_venv requirements.txt >&2
. examples/fast_blas.sh
"$python" -m examples.mac_check "$@"
