"""Train the query expansion model: `python train.py sft`, then `python train.py grpo`.

sft hands mlx-lm's LoRA trainer our loss, batches and callback (sft.py); grpo samples groups of
completions from the SFT model, scores them with reward.py and follows the policy gradient (grpo.py).
Each leaves an adapter folder that mlx-lm's own tools load. Left out: full fine-tuning, other base
architectures than mlx-lm's Qwen3, Qwen2 and Llama, uploading.
"""

import argparse
import math
import random
import time
from pathlib import Path

from expander import cli
from expander.config import Config, load_config
from expander.train.inputs import dry_run, encode_prompts, read_rows, sft_folder
from expander.train.tracking import check_installed


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
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, then stop")
    unfinished = parser.add_mutually_exclusive_group()
    unfinished.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    unfinished.add_argument(
        "--overwrite", action="store_true", help="drop an unfinished run's checkpoints"
    )
    return parser.parse_args()


def total_steps(training, steps_per_epoch: int) -> int:
    """max_steps where it is set (-1 or null: not), else the epochs' steps."""
    if training.max_steps is not None and training.max_steps > 0:
        return training.max_steps
    return math.ceil(training.epochs * steps_per_epoch)


def train_sft(config: Config, resume: bool, overwrite: bool) -> None:
    import mlx.core as mx
    from mlx_lm.cli_ui import make_console
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    from expander import model as models
    from expander.queries import write_query_digests
    from expander.train import distributed
    from expander.train.memory import cache_limit
    from expander.train.run import Run, check_output
    from expander.train.sft import Batches, completion_loss, tokenize, validate

    training = config.training
    check_output(config)
    data = read_rows(config)
    print(f"{config.dataset.name}: {data.summary()}")
    chain = models.read_chain(config.model.base)
    if chain.adapters:
        raise ValueError(f"model.base {config.model.base}: an adapter folder; name a base model")
    tokenizer = models.load_tokenizer(chain.path)
    models.end_token(tokenizer)

    def encode(examples):
        prompts = [ids for _, ids in encode_prompts(examples, config, tokenizer)]
        limit = training.max_length
        return tokenize(examples, prompts, tokenizer, config.dataset.final_newline, limit)

    rows, long_train = encode(data.train)
    held, long_held = encode(data.validation)
    if long_train or long_held:
        print(
            f"{long_train + long_held} rows left out: over training.max_length {training.max_length}"
        )
    if not rows:
        raise ValueError(f"dataset.name {config.dataset.name}: no row is left to train on")

    batches = Batches(
        rows,
        training.batch_size,
        training.gradient_accumulation_steps,
        training.seed,
        distributed.rank(),
        distributed.size(),
    )
    total = total_steps(training, batches.steps_per_epoch)
    run = Run(config, "sft", total, resume, overwrite)
    run.preflight(chain, max(len(row.ids) for row in rows))
    if distributed.size() > 1:
        distributed.check_same(
            configuration=run.config_text,
            data=[row.ids for row in rows + held],
            model=chain.revision,
        )

    mx.random.seed(training.seed)
    model = models.load_base(chain.path, config.model.bits)
    adapter_config, optimizer = run.add_adapter(model)
    adapter_config |= {
        "stage": "sft",
        "model": config.model.base,
        "revision": chain.revision,
        "quantize_bits": config.model.bits,
    }

    def micro_batches(**_):
        for number, batch in enumerate(batches(run.step)):
            if number % batches.accumulation == 0:
                run.seed()
            # Metal ends a command that waits 5 seconds, here for the gradient of a slower rank.
            distributed.barrier()
            yield batch

    class Ended(Exception):
        """Leaves the trainer's loop: its own last save is not atomic."""

    def end_of_step(info: dict) -> None:
        run.step += 1
        loss, norm = info["train_loss"], optimizer.state["grad_norm"].item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise run.not_finite("the loss or its gradient", [r.source for r in batches.current])
        epoch = run.step / batches.steps_per_epoch
        record = {
            "epoch": round(epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": info["learning_rate"],
            "tokens": sum(len(row.ids) - row.start for row in batches.current),
            "tokens_per_second": info["tokens_per_second"],
            "peak_memory_gb": info["peak_memory"],
            "seconds": run.elapsed(),
        }
        line = f"epoch {epoch:.2f}  loss {loss:.4f}"
        if held and (run.step % training.eval_steps == 0 or run.step == total):
            value, accuracy = validate(model, held, training.batch_size)
            record |= {"val_loss": value, "val_token_accuracy": accuracy}
            best = run.consider(value, model, higher_is_better=False)
            line += f"  val {value:.4f}{' (best)' if best else ''}  accuracy {accuracy:.3f}"
        run.log(record)
        run.say(
            f"{line}  lr {info['learning_rate']:.1e}  {info['tokens_per_second']:.0f} tok/s  "
            f"peak {info['peak_memory']:.1f} GB  {run.left()} left"
        )
        if run.step == total or run.out_of_patience():
            raise Ended
        run.end_step(model, optimizer)

    callback = TrainingCallback()
    callback.on_train_loss_report = end_of_step
    make_console().quiet = True  # mlx-lm's table would repeat our lines
    print(
        f"SFT of {config.model.base}: {len(rows)} rows, {total} steps of {batches.effective}, "
        f"{mx.default_device()}"
    )
    with run:
        try:
            if run.step < total:
                trainer.train(
                    model,
                    optimizer,
                    rows,
                    args=trainer.TrainingArgs(
                        batch_size=training.batch_size,
                        iters=(total - run.step) * batches.accumulation,
                        steps_per_report=batches.accumulation,
                        steps_per_save=(total + 1) * batches.accumulation,
                        grad_checkpoint=training.gradient_checkpointing,
                        grad_accumulation_steps=batches.accumulation,
                        clear_cache_threshold=cache_limit(),
                    ),
                    loss=completion_loss,
                    iterate_batches=micro_batches,
                    training_callback=callback,
                )
        except Ended:
            pass
    if not run.leads:
        return
    write_query_digests(run.folder, [example.query for example in data.train])
    run.finish(
        model,
        adapter_config,
        {
            "rows": len(rows),
            "validation_rows": len(held),
            "best_is": "lowest validation loss" if held else "the last step",
        },
    )
    why = (
        f"validation loss {run.best_value:.4f} at step {run.best_step}" if held else "the last step"
    )
    print(f"{config.model.output}: adapter of {why}, {cli.duration(run.elapsed())}")
    elsewhere = "" if run.folder == Path("outputs/sft") else f" --set model.sft={run.folder}"
    print(f"next: python train.py grpo{elsewhere}")


def train_grpo(config: Config, resume: bool, overwrite: bool) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    from expander import model as models
    from expander.decode import random_keys
    from expander.queries import write_query_digests
    from expander.train import distributed
    from expander.train.logps import completion_logps, remember_logps, stack
    from expander.train.loss import group_advantages, grpo_loss
    from expander.train.rollout import (
        active_tokens,
        batch_share,
        exchange,
        group_metrics,
        micro_batches,
        roll_out,
        score_greedily,
        set_rewards,
    )
    from expander.train.run import Run, check_output

    training, settings = config.training, config.grpo
    group, temperature = settings.num_generations, config.generation.temperature
    per_step, remainder = divmod(training.batch_size * training.gradient_accumulation_steps, group)
    if remainder or not per_step:
        raise ValueError(
            f"training.batch_size x gradient_accumulation_steps ({training.batch_size} x "
            f"{training.gradient_accumulation_steps} completions a step) must be a multiple of "
            f"grpo.num_generations ({group})"
        )
    sft = sft_folder(config)
    check_output(config)
    data = read_rows(config)
    print(f"{config.dataset.name}: {data.summary()}")
    chain = models.read_chain(str(sft))
    tokenizer = models.load_tokenizer(chain.path)
    end = models.end_token(tokenizer)
    prompts = encode_prompts(data.train, config, tokenizer)
    if not prompts:
        raise ValueError(f"dataset.name {config.dataset.name}: no row is left to train on")
    held = encode_prompts(data.validation[: settings.eval_prompts], config, tokenizer)
    steps_per_epoch = -(-len(prompts) // per_step)
    total = total_steps(training, steps_per_epoch)
    run = Run(config, "grpo", total, resume, overwrite)
    run.preflight(chain, max(len(ids) for _, ids in prompts))
    if distributed.size() > 1:
        distributed.check_same(
            configuration=run.config_text,
            data=prompts + held,
            model=chain.describe(),
        )

    mx.random.seed(training.seed)
    model, _ = models.load_chain(chain, fuse_last=True)
    adapter_config, optimizer = run.add_adapter(model)
    adapter_config |= {"stage": "grpo", "parent": "sft"}

    def step_prompts(step: int) -> list[tuple[str, list[int]]]:
        """Each prompt once an epoch, in an order that depends on the seed and the epoch alone."""
        epoch, position = divmod(step, steps_per_epoch)
        order = list(range(len(prompts)))
        random.Random(f"{training.seed}:{epoch}").shuffle(order)
        return [prompts[i] for i in order[position * per_step : (position + 1) * per_step]]

    def loss_of(batch, normalizer: int, share: float):
        logps, mask, entropy = completion_logps(model, batch, temperature, with_entropy=True)
        if settings.mask_truncated:
            mask = mask * mx.array([[int(r.finished)] for r in batch])
        width = mask.shape[1]
        loss, stats = grpo_loss(
            logps,
            mask,
            mx.array([r.advantage for r in batch]),
            old_logps=stack([r.old_logps for r in batch], width),
            ref_logps=stack([r.ref_logps for r in batch], width),
            beta=settings.beta,
            epsilon_low=settings.epsilon_low,
            epsilon_high=settings.epsilon_high,
            loss_type=settings.loss_type,
            level=settings.level,
            normalizer=normalizer,
            max_completion_length=settings.max_completion_length,
        )
        stats["entropy"] = (entropy * mask).sum()
        return loss * share, stats

    value_and_grad = nn.value_and_grad(model, loss_of)

    def evaluate() -> str:
        found = score_greedily(model, tokenizer, held, settings, end)
        # By the reward: the rubric alone would prefer what the penalties are there to prevent.
        best = run.consider(found["reward"], model, higher_is_better=True)
        run.log({f"eval_{name}": value for name, value in found.items()})
        return (
            f"held-out {found['score']:.1f}%, reward {found['reward']:.3f}"
            f"{' (best)' if best else ''}"
        )

    print(
        f"GRPO from {sft}: {len(prompts)} prompts, {total} steps of {per_step} x {group} "
        f"completions, {mx.default_device()}"
    )
    with run:
        if held and run.step == 0:
            run.say(f"{evaluate()}  (the SFT model)")
        while run.step < total and not run.out_of_patience():
            started = time.monotonic()
            run.seed()
            # 1. Sample a group of completions for each prompt, the same on one Mac and on several.
            model.eval()
            chosen = step_prompts(run.step)
            names = [f"{run.step} {i}" for i in range(len(chosen) * group)]
            keys = random_keys(names, training.seed).reshape(-1, group, 2)
            rollouts = roll_out(
                model,
                tokenizer,
                distributed.share_out(chosen),
                keys=distributed.share_out(keys),
                max_tokens=settings.max_completion_length,
                temperature=temperature,
                end=end,
                batch_size=settings.rollout_batch_size,
            )
            # 2. Score them; 3. compare each with its group.
            set_rewards(rollouts, settings)
            rollouts = exchange(rollouts)
            rewards = mx.array([r.reward for r in rollouts]).reshape(-1, group)
            advantages = group_advantages(rewards, settings.scale_rewards).flatten().tolist()
            for rollout, advantage in zip(rollouts, advantages, strict=True):
                rollout.advantage = advantage
            # Without a KL term, a completion as good as its group has no gradient.
            useful = [r for r in rollouts if settings.beta or r.advantage]
            # Memory is paid for batch_size rows of full length: of shorter ones, more fit.
            row_budget = training.batch_size * settings.max_completion_length
            batches = micro_batches(distributed.share_out(useful), row_budget)
            # 4. The reference is the same model with the adapter out.
            if settings.beta:
                with models.adapters_off(model):
                    remember_logps(model, batches, temperature, "ref_logps")
            if settings.num_iterations > 1:
                remember_logps(model, batches, temperature, "old_logps")
            sampled = time.monotonic() - started

            # 5. Follow the gradient of all completions at once, summed over micro-batches.
            active = active_tokens(rollouts, settings.mask_truncated)
            model.train()
            sums = {"tokens": 0.0, "kl": 0.0, "entropy": 0.0, "clip_low": 0.0, "clip_high": 0.0}
            for _ in range(settings.num_iterations):
                gradient = tree_map(mx.zeros_like, model.trainable_parameters())
                for batch in batches:
                    share = batch_share(
                        batch, rollouts, settings.loss_type, settings.mask_truncated
                    )
                    (_, stats), part = value_and_grad(batch, active, share)
                    gradient = tree_map(mx.add, gradient, part)
                    mx.eval(gradient, stats)
                    sums = {name: value + stats[name].item() for name, value in sums.items()}
                optimizer.update(model, distributed.all_sum(gradient))
                mx.eval(model.trainable_parameters(), optimizer.state)
            parts = distributed.gather(sums)
            sums = {name: sum(part[name] for part in parts) for name in sums}
            run.step += 1

            norm = optimizer.state["grad_norm"].item()
            if not math.isfinite(norm) or not math.isfinite(sums["kl"]):
                queries = sorted({r.query for r in rollouts})
                raise run.not_finite("the gradient or the KL", [repr(q) for q in queries])
            seconds, tokens = time.monotonic() - started, max(sums["tokens"], 1.0)
            record = {
                "epoch": round(run.step / steps_per_epoch, 4),
                **group_metrics(rollouts, group),
                "kl": sums["kl"] / tokens,
                "entropy": sums["entropy"] / tokens,
                "clip_ratio/low_mean": sums["clip_low"] / tokens,
                "clip_ratio/high_mean": sums["clip_high"] / tokens,
                "grad_norm": norm,
                "learning_rate": optimizer.learning_rate.item(),
                "rollout_seconds": sampled,
                "update_seconds": seconds - sampled,
                "tokens_per_second": sum(len(r.tokens) for r in rollouts) / seconds,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
                "seconds": run.elapsed(),
            }
            run.log(record)
            run.watch(record)
            line = (
                f"reward {record['reward']:.3f} ± {record['reward_std']:.3f}  "
                f"kl {record['kl']:.4f}  length {record['completions/mean_length']:.0f}"
            )
            if run.step == 1 or run.step % training.eval_steps == 0 or run.step == total:
                run.log_samples(rollouts, group)
            if held and (run.step % training.eval_steps == 0 or run.step == total):
                line += f"  {evaluate()}"
            run.say(
                f"{line}  {record['tokens_per_second']:.0f} tok/s  "
                f"peak {record['peak_memory_gb']:.1f} GB  {run.left()} left"
            )
            if run.step < total:
                run.end_step(model, optimizer)

    if not run.leads:
        return
    models.copy_adapters(chain, run.folder / "sft")
    write_query_digests(run.folder, [query for query, _ in prompts])
    run.finish(
        model,
        adapter_config,
        {
            "prompts": len(prompts),
            "held_out_prompts": len(held),
            "best_is": "highest held-out reward" if held else "the last step",
        },
    )
    if held and run.best_step == 0:
        print("no step beat the SFT model on the held-out queries: the result is the SFT model")
    else:
        print(f"{run.folder}: adapter of step {run.best_step or run.step}")
    print(f"next: python eval.py --model {run.folder}")


def main() -> None:
    arguments = parse_arguments()
    config, ignored = load_config(arguments.stage, arguments.config, arguments.set)
    if ignored:
        print(f"no effect here: {'; '.join(ignored)}")
    check_installed(config.tracking)
    if arguments.dry_run:
        dry_run(arguments.stage, config)
        return
    from expander.train import distributed

    train = train_sft if arguments.stage == "sft" else train_grpo
    with distributed.joined():
        train(config, arguments.resume, arguments.overwrite)


if __name__ == "__main__":
    cli.run(main)
