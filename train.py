"""Train the query expansion model: python train.py sft, then python train.py grpo.

sft gives mlx-lm's LoRA trainer our loss, batches and callback (expander/train/sft.py). grpo samples
groups of completions from the SFT model, scores them with reward.py and follows the policy gradient
(expander/train/grpo.py). Each writes an adapter folder that mlx-lm's own tools load. Left out: full
fine-tuning and uploading.
"""

import argparse
from collections.abc import Callable

from expander import cli


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the query expansion model with LoRA on MLX.",
        epilog="example: python train.py sft --set dataset.name='data/*.jsonl' --dry-run",
    )
    parser.add_argument(
        "stage", choices=("sft", "grpo"), help="sft first, then grpo on its adapter"
    )
    parser.add_argument("--config", metavar="PATH", help="YAML file (default: configs/STAGE.yaml)")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key, e.g. training.epochs=2; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the configuration and the memory needed, then stop",
    )
    parser.add_argument(
        "--no-caffeinate", action="store_true", help="let an idle Mac go to sleep during the run"
    )
    unfinished = parser.add_mutually_exclusive_group()
    unfinished.add_argument("--resume", action="store_true", help="continue an unfinished run")
    unfinished.add_argument(
        "--overwrite", action="store_true", help="delete an unfinished run and start over"
    )
    return parser.parse_args()


def stage_function(stage: str) -> Callable:
    """Import a stage only if it runs: mlx-lm and transformers take seconds to load."""
    if stage == "sft":
        from expander.train.sft import train_sft

        return train_sft
    from expander.train.grpo import train_grpo

    return train_grpo


def main() -> None:
    arguments = parse_arguments()
    from expander.config import load_config
    from expander.train import distributed, inputs, rewards, tracking

    config, ignored = load_config(arguments.stage, arguments.config, arguments.set)
    if ignored:
        print(f"no effect here: {'; '.join(ignored)}")
    tracking.check_installed(config.tracking)
    if arguments.stage == "grpo":
        rewards.check_settings(config.grpo)
    if arguments.dry_run:
        inputs.dry_run(arguments.stage, config)
        return
    if not arguments.no_caffeinate:
        cli.keep_awake()
    with distributed.joined():
        train = stage_function(arguments.stage)
        train(config, arguments.resume, arguments.overwrite)


if __name__ == "__main__":
    cli.run(main)
