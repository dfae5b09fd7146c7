"""Expand queries from Python: load the model once, then generate.

    python examples/expand.py "auth config" "sourdough starter" --model outputs/grpo

Prints the lines that QMD would search with. Decoding is greedy; `eval.py --decode qmd` samples under
QMD's grammar.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli


def main() -> None:
    parser = argparse.ArgumentParser(description="Expand search queries.")
    parser.add_argument("queries", nargs="+", metavar="QUERY")
    parser.add_argument("--model", help="adapter folder, model folder or Hub id")
    arguments = parser.parse_args()

    from expander.decode import generate
    from expander.model import end_token, load_chain, read_chain, trained_model
    from expander.prompt import encode_prompt
    from expander.qmd import kept_lines

    model, tokenizer = load_chain(read_chain(arguments.model or trained_model()), fuse_last=True)
    end = end_token(tokenizer)
    prompts = [encode_prompt(tokenizer, query) for query in arguments.queries]
    completions = generate(model, prompts, max_tokens=200, end=end)
    for query, completion in zip(arguments.queries, completions, strict=True):
        print(query)
        for kind, line in kept_lines(query, completion.text(tokenizer)):
            print(f"  {kind}: {line}")


if __name__ == "__main__":
    cli.run(main)
