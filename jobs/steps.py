"""Run the README's commands in a job on the Hub.

    python -m jobs.steps sft | grpo | eval OWNER/NAME [options of train.py or eval.py]

`sft` and `grpo` publish the model. If it is not better than the published one, convert.py refuses
it and prints the figures; the model is lost when the machine stops. `eval` publishes nothing.
"""

import argparse
import subprocess
import sys

from expander import cli

ADAPTERS = "outputs/published/adapters"


def python(*arguments: str) -> None:
    """Run a command of the project; exit with its code if it fails."""
    print("$ python", *arguments, flush=True)
    if code := subprocess.run([sys.executable, *arguments], check=False).returncode:
        sys.exit(code)


def modern(arguments: list[str]) -> list[str]:
    """The command line with the original's options in this project's form.

    >>> modern(["sft", "--sft-only", "--upload-repo", "me/x", "--set", "training.epochs=1"])
    ['sft', 'me/x', '--set', 'training.epochs=1']
    """
    arguments = [x for x in arguments if (x, arguments[0]) != ("--sft-only", "sft")]
    if "--upload-repo" in arguments[:-1]:
        place = arguments.index("--upload-repo")
        _, repo = arguments[place : place + 2]
        arguments[place : place + 2] = []
        arguments.insert(1, repo)
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train or evaluate, then publish.",
        epilog="The original's --upload-repo OWNER/NAME names the repository too; its --sft-only is "
        "what the job sft does.",
    )
    parser.add_argument("stage", choices=("sft", "grpo", "eval"))
    parser.add_argument("repo", metavar="OWNER/NAME", help="the model's repository on the Hub")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of train.py or eval.py")
    arguments = parser.parse_args(modern(sys.argv[1:]))
    stage, repo, options = arguments.stage, arguments.repo, arguments.options

    if stage != "sft":
        hub = ("-m", "huggingface_hub.cli.hf", "download", repo)
        python(*hub, "--include", "adapters/*", "--local-dir", "outputs/published")
    if stage == "eval":
        python("eval.py", "--model", ADAPTERS, *options)
        return
    model = f"outputs/{stage}"
    start = ("--set", f"model.sft={ADAPTERS}") if stage == "grpo" else ()
    python("train.py", stage, *options, *start, "--set", f"model.output={model}")
    python("eval.py", "--model", model, "--retrieval", "-o", f"{model}/evaluation.json")
    python("convert.py", "--model", model, "--push", repo)


if __name__ == "__main__":
    cli.run(main)
