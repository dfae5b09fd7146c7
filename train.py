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

import cli
from config import Config, load_config, to_yaml


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
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    parser.add_argument(
        "--overwrite", action="store_true", help="drop an unfinished run's checkpoints"
    )
    return parser.parse_args()


def read_rows(config: Config):
    """The data set's rows, split, as the configuration asks."""
    from dataset.schema import load_rows

    data = config.dataset
    return load_rows(
        data.name,
        split=data.split,
        text_field=data.text_field,
        prompt_field=data.prompt_field,
        eval_split=data.eval_split,
        max_samples=data.max_samples,
        seed=config.training.seed,
    )


def dry_run(stage: str, config: Config) -> None:
    """Print the resolved configuration and what would be loaded; load no model, ask no Hub."""
    from dataset.schema import local_files

    print(to_yaml(config).rstrip())
    base, data = config.model.base, config.dataset.name
    if stage == "grpo":
        print(f"# start: {sft_folder(config)} (fused), fresh LoRA over it")
    else:
        print(f"# base: {base} ({'local folder' if Path(base).expanduser().is_dir() else 'Hub'})")
    if local_files(data):
        print(f"# data: {data}: {read_rows(config).summary()}")
    else:
        print(f"# data: {data} (Hub)")
    print(f"# result: {config.model.output}")


def sft_folder(config: Config) -> Path:
    folder = Path(config.model.sft).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model.sft {folder}: there is no SFT adapter; run python train.py sft first, or name "
            "its folder with --set model.sft=DIR"
        )
    if folder.resolve() == Path(config.model.output).expanduser().resolve():
        raise ValueError(
            f"model.output and model.sft are the same folder, {folder}: choose another"
        )
    return folder


def check_output(config: Config) -> None:
    """Fail on a folder that cannot be written before anything is loaded.

    Raises:
        OSError: it cannot be made, or nothing can be written in it.
    """
    from checkpoint import write_text

    folder = Path(config.model.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"model.output {folder}: cannot be written: {error.strerror}") from None


def tokenize(examples, config: Config, tokenizer, limit: int):
    """(rows for SFT, number of examples left out because they are longer than `limit`)."""
    from prompt import render_prompt, render_target
    from qmd import QMD_SYSTEM_PROMPT
    from sft import Row

    data, rows = config.dataset, []
    rng = random.Random(config.training.seed)
    for example in examples:
        # QMD sends its system turn with every query; this share of the rows shows it.
        system = QMD_SYSTEM_PROMPT if rng.random() < data.qmd_system_prompt_share else None
        intent = example.intent if data.intent else None
        prompt = tokenizer.encode(
            render_prompt(example.query, system, intent), add_special_tokens=False
        )
        target = tokenizer.encode(
            render_target(example.lines, data.final_newline), add_special_tokens=False
        )
        if len(prompt) + len(target) <= limit:
            rows.append(Row(prompt + target, len(prompt), example.source))
    return rows, len(examples) - len(rows)


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

    import model as models
    from run import CACHE_LIMIT_BYTES, AdamW, Run
    from sft import Batches, completion_loss, validate

    training = config.training
    check_output(config)
    data = read_rows(config)
    print(f"{config.dataset.name}: {data.summary()}")
    bits = 4 if config.model.load_in_4bit else 8 if config.model.load_in_8bit else None
    chain = models.read_chain(config.model.base)
    if chain.adapters:
        raise ValueError(f"model.base {config.model.base}: an adapter folder; name a base model")
    tokenizer = models.load_tokenizer(chain.path)
    models.end_token(tokenizer)
    rows, long_train = tokenize(data.train, config, tokenizer, training.max_length)
    held, long_held = tokenize(data.validation, config, tokenizer, training.max_length)
    if long_train or long_held:
        print(
            f"{long_train + long_held} rows left out: over training.max_length {training.max_length}"
        )
    if not rows:
        raise ValueError(f"dataset.name {config.dataset.name}: no row is left to train on")

    batches = Batches(
        rows, training.batch_size, training.gradient_accumulation_steps, training.seed
    )
    total = total_steps(training, batches.steps_per_epoch)
    run = Run(config, "sft", total, resume, overwrite)

    mx.random.seed(training.seed)
    model = models.load_base(chain.path, bits)
    lora = config.lora
    adapter_config = models.lora_config(
        model, lora.rank, lora.alpha, lora.dropout, lora.target_modules
    )
    models.add_lora(model, adapter_config)
    adapter_config |= {
        "stage": "sft",
        "model": config.model.base,
        "revision": chain.revision,
        "quantize_bits": bits,
    }
    optimizer = AdamW(training, total)
    optimizer.init(model.trainable_parameters())
    if resume:
        run.restore(model, optimizer)

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
            "tokens": int(info["trained_tokens"]),
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
        if run.signum is not None:
            raise run.interrupted(run.save(model, optimizer))
        if run.save_due():
            run.save(model, optimizer)

    callback = TrainingCallback()
    callback.on_train_loss_report = end_of_step
    make_console().quiet = True  # mlx-lm's table would repeat our lines
    accumulation = training.gradient_accumulation_steps
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
                        iters=(total - run.step) * accumulation,
                        steps_per_report=accumulation,
                        steps_per_save=(total + 1) * accumulation,
                        grad_checkpoint=training.gradient_checkpointing,
                        grad_accumulation_steps=accumulation,
                        clear_cache_threshold=CACHE_LIMIT_BYTES,
                    ),
                    loss=completion_loss,
                    iterate_batches=lambda **_: batches(run.step),
                    training_callback=callback,
                )
        except Ended:
            pass
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
    print("next: python train.py grpo")


def score_greedily(model, tokenizer, queries, prompts, limit: int, end: int) -> tuple[float, float]:
    """(mean percentage, share cut off at the limit) of greedy completions."""
    from decode import generate
    from reward import score_expansion_detailed

    model.eval()
    completions = generate(model, prompts, max_tokens=limit, end=end)
    texts = [tokenizer.decode([t for t in c.tokens if t != end]) for c in completions]
    scores = [
        score_expansion_detailed(q, t)["percentage"] for q, t in zip(queries, texts, strict=True)
    ]
    return sum(scores) / len(scores), sum(not c.finished for c in completions) / len(completions)


def train_grpo(config: Config, resume: bool, overwrite: bool) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    import grpo
    import model as models
    from prompt import render_prompt
    from qmd import QMD_SYSTEM_PROMPT
    from reward import score_expansion, score_expansion_detailed
    from run import AdamW, Run

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

    def encode(examples):
        rng = random.Random(training.seed)
        pairs = []
        for example in examples:
            share = config.dataset.qmd_system_prompt_share
            system = QMD_SYSTEM_PROMPT if rng.random() < share else None
            intent = example.intent if config.dataset.intent else None
            text = render_prompt(example.query, system, intent)
            pairs.append((example.query, tokenizer.encode(text, add_special_tokens=False)))
        return pairs

    records = encode(data.train)
    held = encode(data.validation[: settings.eval_prompts])
    steps_per_epoch = -(-len(records) // per_step)
    total = total_steps(training, steps_per_epoch)
    run = Run(config, "grpo", total, resume, overwrite)

    mx.random.seed(training.seed)
    model, _ = models.load_chain(chain, fuse_last=True)
    lora = config.lora
    adapter_config = models.lora_config(
        model, lora.rank, lora.alpha, lora.dropout, lora.target_modules
    )
    models.add_lora(model, adapter_config)
    adapter_config |= {"stage": "grpo", "parent": "sft"}
    optimizer = AdamW(training, total)
    optimizer.init(model.trainable_parameters())
    if resume:
        run.restore(model, optimizer)

    def reward_of(query: str, text: str) -> float:
        if settings.reward == "score":
            return score_expansion(query, text)
        return score_expansion_detailed(query, text)["percentage"] / 100

    def loss_of(batch, normalizer, share):
        logps, mask, entropy = grpo.completion_logps(model, batch, temperature, with_entropy=True)
        if settings.mask_truncated:
            mask = mask * mx.array([[int(r.finished)] for r in batch])
        width = mask.shape[1]
        loss, stats = grpo.grpo_loss(
            logps,
            mask,
            mx.array([r.advantage for r in batch]),
            old_logps=grpo.stack([r.old_logps for r in batch], width),
            ref_logps=grpo.stack([r.ref_logps for r in batch], width),
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

    def prompts_of(step: int) -> list[tuple[str, list[int]]]:
        """Each prompt once an epoch, in an order that depends on the seed and the epoch alone."""
        epoch, position = divmod(step, steps_per_epoch)
        order = list(range(len(records)))
        random.Random(f"{training.seed}:{epoch}").shuffle(order)
        return [records[i] for i in order[position * per_step : (position + 1) * per_step]]

    def evaluate() -> str:
        queries, prompts = zip(*held, strict=True)
        score, truncated = score_greedily(
            model, tokenizer, queries, prompts, settings.max_completion_length, end
        )
        best = run.consider(score, model, higher_is_better=True)
        run.log({"eval_reward": score, "eval_truncated": truncated})
        return f"held-out {score:.1f}%{' (best)' if best else ''}"

    print(
        f"GRPO from {sft}: {len(records)} prompts, {total} steps of {per_step} prompts x {group}, "
        f"{mx.default_device()}"
    )
    with run:
        if held and run.step == 0:
            run.say(f"{evaluate()}  (the SFT model)")
        while run.step < total:
            started = time.monotonic()
            queries, prompts = zip(*prompts_of(run.step), strict=True)
            model.eval()
            rollouts = grpo.roll_out(
                model,
                tokenizer,
                queries,
                prompts,
                num_generations=group,
                max_tokens=settings.max_completion_length,
                temperature=temperature,
                end=end,
                batch_size=len(prompts) * group,
            )
            for r in rollouts:
                r.reward = reward_of(r.query, r.text)
            rewards = mx.array([r.reward for r in rollouts]).reshape(-1, group)
            advantages = grpo.group_advantages(rewards, settings.scale_rewards)
            for r, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
                r.advantage = advantage
            batches = grpo.micro_batches(rollouts, training.batch_size)
            if settings.beta:
                with models.adapters_off(model):
                    grpo.remember_logps(model, batches, temperature, "ref_logps")
            if settings.num_iterations > 1:
                grpo.remember_logps(model, batches, temperature, "old_logps")
            sampled = time.monotonic() - started

            trained = [r for r in rollouts if r.finished or not settings.mask_truncated]
            active = sum(len(r.tokens) for r in trained)
            model.train()
            for _ in range(settings.num_iterations):
                gradient, sums = None, None
                for batch in batches:
                    share = grpo.batch_share(batch, rollouts, settings.loss_type)
                    (_, stats), grad = value_and_grad(batch, active, share)
                    gradient = grad if gradient is None else tree_map(mx.add, gradient, grad)
                    sums = stats if sums is None else {k: sums[k] + stats[k] for k in stats}
                    mx.eval(gradient, sums)
                optimizer.update(model, gradient)
                mx.eval(model.trainable_parameters(), optimizer.state)
            run.step += 1

            sums = {name: value.item() for name, value in sums.items()}
            tokens = max(sums.pop("tokens"), 1.0)
            lengths = [len(r.tokens) for r in rollouts]
            norm = optimizer.state["grad_norm"].item()
            if not math.isfinite(norm) or not math.isfinite(sums["kl"]):
                raise run.not_finite("the gradient or the KL", [repr(q) for q in queries])
            spread = grpo.sample_std(rewards)
            record = {
                "epoch": round(run.step / steps_per_epoch, 4),
                "reward": rewards.mean().item(),
                "reward_std": spread.mean().item(),
                "frac_reward_zero_std": (spread < 1e-8).astype(mx.float32).mean().item(),
                "kl": sums["kl"] / tokens,
                "entropy": sums["entropy"] / tokens,
                "clip_ratio/low_mean": sums["clip_low"] / tokens,
                "clip_ratio/high_mean": sums["clip_high"] / tokens,
                "completions/mean_length": sum(lengths) / len(lengths),
                "completions/min_length": min(lengths),
                "completions/max_length": max(lengths),
                "completions/clipped_ratio": sum(not r.finished for r in rollouts) / len(rollouts),
                "grad_norm": norm,
                "learning_rate": optimizer.learning_rate.item(),
                "rollout_seconds": sampled,
                "update_seconds": time.monotonic() - started - sampled,
                "tokens_per_second": sum(lengths) / (time.monotonic() - started),
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
                "seconds": run.elapsed(),
            }
            run.log(record)
            line = (
                f"reward {record['reward']:.3f} ± {record['reward_std']:.3f}  kl {record['kl']:.4f}  "
                f"length {record['completions/mean_length']:.0f}"
            )
            if held and (run.step % training.eval_steps == 0 or run.step == total):
                line += f"  {evaluate()}"
            run.say(
                f"{line}  {record['tokens_per_second']:.0f} tok/s  "
                f"peak {record['peak_memory_gb']:.1f} GB  {run.left()} left"
            )
            if run.out_of_patience():
                break
            if run.signum is not None and run.step < total:
                raise run.interrupted(run.save(model, optimizer))
            if run.step < total and run.save_due():
                run.save(model, optimizer)

    models.copy_adapters(chain, run.folder / "sft")
    run.finish(model, adapter_config, {"prompts": len(records), "held_out_prompts": len(held)})
    if held and run.best_step == 0:
        print("no step beat the SFT model on the held-out prompts: the result is the SFT model")
    print(f"{config.model.output}: adapter of step {run.best_step or run.step}")
    print(f"next: python eval.py --model {config.model.output}")


def main() -> None:
    arguments = parse_arguments()
    config, ignored = load_config(arguments.stage, arguments.config, arguments.set)
    if ignored:
        print(f"no effect here: {'; '.join(ignored)}")
    if arguments.dry_run:
        dry_run(arguments.stage, config)
    elif arguments.stage == "sft":
        train_sft(config, arguments.resume, arguments.overwrite)
    else:
        train_grpo(config, arguments.resume, arguments.overwrite)


if __name__ == "__main__":
    cli.run(main)
