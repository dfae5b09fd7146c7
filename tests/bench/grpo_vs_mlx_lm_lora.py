"""`train.py grpo` next to mlx-lm-lora's GRPO: steps an hour, generated tokens a second, peak memory.

By hand, in an environment that has `mlx-lm-lora==5.10.2` beside this project's requirements:

    python -m tests.bench.grpo_vs_mlx_lm_lora --sft outputs/sft [--rows 'FILES.jsonl'] [--steps N]
    python -m tests.bench.grpo_vs_mlx_lm_lora --sft outputs/sft --check      one rollout, both losses
    python -m tests.bench.grpo_vs_mlx_lm_lora --sft outputs/sft --profile    where our step's time goes

Both start from the fused SFT model with fresh LoRA on all projections, and sample the same prompts, group,
limit and temperature (mlx-lm-lora without its top-p and top-k), score with reward.py and take one AdamW
step with the same beta; mlx-lm-lora's reference is a second model, as its command loads it. They take
turns of one step (turns.py). Time runs from the first rollout to the end, the saving of adapters included,
without loading. Generated tokens are those sampled, the end token included.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from expander.architectures import PROJECTIONS
from expander.config import Config
from tests.bench.turns import Turn, alternate, peaks, print_table, working
from tests.settings import default_config, section

PROMPTS, GROUP, TEMPERATURE, BETA = 4, 8, 1.0, 0.02
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 5e-5
GOALS = {"steps/hour": ">= 4", "peak memory": "<= 0.7"}
SIDES = ("ours", "mlx-lm-lora")


def configuration(arguments: argparse.Namespace, folder: Path) -> Config:
    return default_config(
        model=section("model", sft=arguments.sft, output=str(folder / "ours")),
        dataset=section(
            "dataset",
            name=arguments.rows,
            eval_split=0.0,
            qmd_system_prompt_share=0.0,
            max_samples=arguments.steps * PROMPTS,
        ),
        training=section(
            "training",
            max_steps=arguments.steps,
            batch_size=arguments.micro_batch,
            gradient_accumulation_steps=PROMPTS * GROUP // arguments.micro_batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler="constant",
            warmup_ratio=0.0,
        ),
        grpo=section(
            "grpo",
            reward="percentage",
            num_generations=GROUP,
            max_completion_length=arguments.tokens,
            beta=BETA,
            loss_type="grpo",
            eval_prompts=0,
            rollout_batch_size=PROMPTS * GROUP,
        ),
        lora=section("lora", rank=RANK, alpha=ALPHA),
        generation=section("generation", temperature=TEMPERATURE),
    )


def load_policy(config: Config):
    """(model, tokenizer, end token, (query, prompt ids) pairs): SFT fused, fresh LoRA over it."""
    from expander import model as models
    from expander.train.inputs import encode_prompts, read_rows

    model, tokenizer = models.load_chain(models.read_chain(config.model.sft), fuse_last=True)
    models.add_lora(model, models.lora_config(model, RANK, ALPHA, 0.0, PROJECTIONS))
    prompts = encode_prompts(read_rows(config).train, config, tokenizer)
    return model, tokenizer, models.end_token(tokenizer), prompts


def run_mlx_lm_lora(config: Config, folder: Path) -> None:
    import mlx.optimizers as optim
    from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, train_grpo

    from expander import model as models
    from expander.prompt import IM_END
    from reward import score_expansion_detailed

    model, tokenizer, _, prompts = load_policy(config)
    reference, _ = models.load_chain(models.read_chain(config.model.sft), fuse_last=True)

    def rubric(prompts, completions, answer, types=None) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [score_expansion_detailed(q, text)["percentage"] / 100 for q, text in pairs]

    train_grpo(
        model,
        reference,
        tokenizer,
        optim.AdamW(LEARNING_RATE, weight_decay=0.0),
        [(ids, [], query, "") for query, ids in prompts],
        reward_funcs=[rubric],
        args=GRPOTrainingArgs(
            batch_size=PROMPTS,
            group_size=GROUP,
            iters=config.training.max_steps,
            steps_per_report=1,
            steps_per_save=config.training.max_steps,
            max_completion_length=config.grpo.max_completion_length,
            beta=BETA,
            temperature=TEMPERATURE,
            top_p=1.0,
            top_k=0,
            adapter_file=str(folder / "adapters.safetensors"),
        ),
        end_answer_token=IM_END,
    )


def count_rollouts(module, name: str, lengths_of, turn: Turn, figures: dict) -> None:
    """Have `module.name`, with which a step begins, wait for its turn, and count what it samples."""
    sample = getattr(module, name)
    figures.update({"completions": 0, "tokens": 0, "rollout seconds": 0.0})
    step = 0

    def counted(*args, **kwargs):
        nonlocal step
        turn.pause(f"step {step}")
        step += 1
        start = time.perf_counter()
        result = sample(*args, **kwargs)
        figures["rollout seconds"] += time.perf_counter() - start
        lengths = lengths_of(result)
        figures["completions"] += len(lengths)
        figures["tokens"] += sum(lengths)
        return result

    setattr(module, name, counted)


def work(side: str, config: Config, folder: Path) -> None:
    figures: dict = {}
    with working(folder / f"{side}.log") as turn:
        if side == "ours":
            from expander.train import grpo

            count_rollouts(
                grpo, "sample", lambda rows: [len(r.tokens) for r in rows], turn, figures
            )
            grpo.train_grpo(config, resume=False, overwrite=False)
        else:
            from mlx_lm_lora.trainer import grpo_trainer

            count_rollouts(
                grpo_trainer, "generate_grpo", lambda got: [t.size for t in got[0]], turn, figures
            )
            run_mlx_lm_lora(config, folder)
        turn.stop()
        turn.finish(figures | peaks())


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    def command(side: str) -> list:
        options = ["--sft", arguments.sft, "--rows", arguments.rows, "--side", side]
        for name in ("steps", "tokens", "micro_batch"):
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        script = [sys.executable, "-m", "tests.bench.grpo_vs_mlx_lm_lora"]
        return [*script, *options, "--folder", folder]

    print(f"{arguments.steps} steps of {PROMPTS} prompts x {GROUP} completions", end=" ")
    print(f"of at most {arguments.tokens} tokens")
    figures = alternate(SIDES, command)
    for found in figures.values():
        found["rollout tokens/s"] = found["tokens"] / found["rollout seconds"]
        found["step tokens/s"] = found["tokens"] / found["seconds"]
        found["steps/hour"] = arguments.steps * 3600 / found["seconds"]
    print_table(figures, GOALS)


def check(config: Config) -> None:
    """Advantages of both, then the loss and gradient of both on one rollout with the same ones."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm_lora.trainer import grpo_trainer

    from expander import model as models
    from expander.train.logps import completion_logps
    from expander.train.loss import group_advantages, grpo_loss
    from expander.train.rollout import sample, set_logps, stack

    model, tokenizer, end, prompts = load_policy(config)
    pairs = prompts[:2]
    limit = config.grpo.max_completion_length
    mx.random.seed(0)
    # Away from the reference: a fresh adapter has no KL.
    apart = {k: mx.random.normal(v.shape) * 0.02 for k, v in models.adapter_weights(model).items()}
    model.load_weights(list(apart.items()), strict=False)
    model.eval()
    reference, _ = models.load_chain(models.read_chain(config.model.sft), fuse_last=True)
    rows = sample(model, tokenizer, pairs, config, step=0, end=end)
    owner = [i // GROUP for i in range(len(rows))]
    # Drawn, because the rubric may well give a whole group the same.
    rewards = mx.random.uniform(shape=(2, GROUP))
    advantages = group_advantages(rewards).flatten()
    blank = [""] * len(rows)
    their_advantages, _ = grpo_trainer.calculate_rewards_and_advantages(
        [lambda **_: rewards.flatten().tolist()], blank, blank, blank, blank, owner, [0, 1]
    )
    ratio = their_advantages / advantages
    print(f"advantages, theirs over ours: {ratio.min().item():.4f} to {ratio.max().item():.4f}")

    def ours(model, loss_type: str, temperature: float):
        logps, mask, _ = completion_logps(
            model, [r.prompt for r in rows], [r.tokens for r in rows], temperature
        )
        return grpo_loss(
            logps,
            mask,
            advantages,
            ref_logps=stack([r.ref_logps for r in rows], mask.shape[1]),
            beta=BETA,
            loss_type=loss_type,
            max_completion_length=limit,
        )[0]

    def theirs(model, loss_type: str):
        return grpo_trainer.grpo_loss(
            model,
            reference,
            ([ids for _, ids in pairs],),
            completions=[mx.array(r.tokens) for r in rows],
            batch_indices=owner,
            advantages=advantages,
            beta=BETA,
            max_tokens=limit,
            grpo_loss_type=loss_type,
        )[0]

    for temperature in (1.0, 0.7):
        with models.adapters_off(model):
            set_logps(model, [rows], temperature, "ref_logps")
        for loss_type in ("grpo", "bnpo", "dr_grpo"):
            a, gradient = nn.value_and_grad(model, ours)(model, loss_type, temperature)
            b, their_gradient = nn.value_and_grad(model, theirs)(model, loss_type)
            x, y = (
                mx.concatenate([g.flatten() for _, g in tree_flatten(tree)])
                for tree in (gradient, their_gradient)
            )
            distance = mx.linalg.norm(x - y) / mx.linalg.norm(x)
            print(
                f"temperature {temperature}  {loss_type:7}  loss {a.item():.6f}, theirs "
                f"{b.item():.6f}; gradients {distance.item():.1e} of ours apart"
            )


def profile(config: Config) -> None:
    """Seconds a step of each part of `train.py grpo`."""
    import mlx.core as mx

    from expander import decode
    from expander.train import grpo
    from expander.train.logs import METRICS
    from expander.train.optim import AdamW

    seconds: dict[str, float] = {}

    def timed(owner, name: str, evaluate=lambda *_: None) -> None:
        call = getattr(owner, name)

        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            evaluate(result, *args)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, wrapped)

    timed(decode, "_prefill", lambda result, *_: mx.eval(result[1], [c.state for c in result[0]]))
    timed(grpo, "sample")
    timed(grpo, "set_rewards")
    timed(grpo, "set_logps")
    timed(AdamW, "update", lambda _, self, model, *__: mx.eval(model.parameters(), self.state))
    grpo.train_grpo(config, resume=False, overwrite=False)
    lines = Path(config.model.output, METRICS).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    total = sum(step["rollout_seconds"] + step["update_seconds"] for step in steps)
    parts = {
        "prefill": seconds["_prefill"],
        "decode": seconds["sample"] - seconds["_prefill"],
        "reward": seconds["set_rewards"],
        "reference": seconds["set_logps"],
        "optimiser": seconds["update"],
    }
    parts["forward and backward"] = total - sum(parts.values())
    for part, spent in parts.items():
        print(f"{part:22}{spent / len(steps):8.3f} s a step  {spent / total:6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sft", required=True, help="an SFT adapter's folder")
    parser.add_argument("--rows", default="data/*.jsonl", help="a file, a folder or a glob")
    parser.add_argument("--steps", type=int, default=8, help="default 8")
    parser.add_argument("--tokens", type=int, default=120, help="limit of a completion, 120")
    parser.add_argument("--micro-batch", type=int, default=4, help="our completions a pass, 4")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare losses and gradients")
    what.add_argument("--profile", action="store_true", help="our step's time by part")
    what.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if PROMPTS * GROUP % arguments.micro_batch:
        parser.error(f"--micro-batch must divide {PROMPTS * GROUP}")
    with tempfile.TemporaryDirectory() as temporary:
        config = configuration(arguments, arguments.folder or Path(temporary))
        if arguments.side:
            work(arguments.side, config, arguments.folder)
        elif arguments.check:
            check(config)
        elif arguments.profile:
            profile(config)
        else:
            compare(arguments, Path(temporary))


if __name__ == "__main__":
    main()
