"""`train.py grpo` next to other GRPO trainers for MLX: steps per hour, CPU time, peak memory.

By hand, in an environment with this project's requirements and the rival:

    python -m tests.bench.grpo_rivals --rival mlx-lm-lora --sft outputs/sft [--beta 0] [--steps N]
    python -m tests.bench.grpo_rivals --sft outputs/sft --check      one rollout, both losses
    python -m tests.bench.grpo_rivals --sft outputs/sft --profile    where our step's time goes

    mlx-lm-lora   pip install mlx-lm-lora==5.10.2
    mlxrl         pip install inductive-mlxrl==0.2.4
    unsloth       pip install --no-deps unsloth-zoo==2026.10.9 && pip install psutil msgspec
                  (its own pins want older transformers and datasets, and torch outside of a Mac)

Both sides start from the fused SFT model in the device's dtype with fresh LoRA on all projections, each
loaded and adapted by its own code. They sample the same prompts with the same group, limit and
temperature, without top-p and top-k, score with reward.py and take one Adam step per rollout with the
same beta. They take turns of one step (turns.py). The first step is not measured, because it compiles,
and with beta ours needs no reference while the adapter is zero; --warm-up changes that. Time runs from
the first measured rollout to the end, adapters saved. Generated tokens are those sampled, the end token included.

    ours          decodes all 32 completions together and computes a prompt once per step. The reference
                  is the policy with its adapter off. Forward passes of --micro-batch full-length rows.
    mlx-lm-lora   computes a prompt once per group, decodes 4 completions at a time (its limit is the
                  number of prompts), passes of 4 right-padded rows with their prompts. The reference is a
                  second model, as its command loads it; with beta 0 it gets none, which its command
                  would load all the same.
    mlxrl         computes a prompt once per group, decodes all completions together if the limit is so
                  low that none ends before it, otherwise one by one, which its batched rollout would
                  start over with. A forward pass of all rows gives the rollout's log-probabilities, one
                  more the reference's, with the adapter off. Passes of --micro-batch right-padded rows
                  with their prompts.
    unsloth       decodes all 32 completions together, each with its own prompt. The reference is the
                  policy with its adapter off. Compiled passes of --micro-batch right-padded rows, without
                  gradient checkpointing, which would trade time for memory.
"""

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from expander.config import Config
from tests.bench.turns import Turn, alternate, peaks, print_table, working
from tests.settings import default_config, section

PROMPTS, GROUP, TEMPERATURE, BETA = 4, 8, 1.0, 0.02
RANK, ALPHA, LEARNING_RATE, SEED = 16, 32.0, 5e-5, 42
GOALS = {"peak memory": "<= 0.7"}
UNENDED = 48  # tokens: hardly any completion ends sooner
FUSED = "fused"


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
            beta=arguments.beta,
            loss_type="grpo",
            eval_prompts=0,
            rollout_batch_size=PROMPTS * GROUP,
        ),
        lora=section("lora", rank=RANK, alpha=ALPHA),
        generation=section("generation", temperature=TEMPERATURE),
    )


def add_fresh_lora(model, config: Config) -> None:
    """Add the LoRA layers that a run begins with."""
    import mlx.core as mx

    from expander import model as models

    lora = config.lora
    mx.random.seed(config.training.seed)
    models.add_lora(
        model, models.lora_config(model, lora.rank, lora.alpha, lora.dropout, lora.target_modules)
    )


def load_policy(config: Config):
    """(model, tokenizer, end token, (query, prompt ids) pairs): SFT fused, fresh LoRA over it."""
    from expander import model as models
    from expander.train.inputs import encode_prompts, read_rows

    model, tokenizer = models.load_chain(models.read_chain(config.model.sft), fuse_last=True)
    add_fresh_lora(model, config)
    prompts = encode_prompts(read_rows(config).train, config, tokenizer)
    return model, tokenizer, models.end_token(tokenizer), prompts


def save_fused(config: Config, folder: Path) -> None:
    """Write the fused SFT model as a folder that the rivals' own loaders read."""
    from mlx_lm.utils import save_model

    from expander import model as models

    chain = models.read_chain(config.model.sft)
    model, _ = models.load_chain(chain, fuse_last=True)
    folder.mkdir()
    save_model(folder, model)
    for path in chain.path.glob("*.json"):
        if "safetensors" not in path.name:
            shutil.copy(path, folder)


def rival_prompts(config: Config, folder: Path) -> list[tuple[str, list[int]]]:
    """The (query, prompt ids) pairs that ours trains on."""
    from expander import model as models
    from expander.train.inputs import encode_prompts, read_rows

    return encode_prompts(read_rows(config).train, config, models.load_tokenizer(folder / FUSED))


def reward_of(query: str, text: str) -> float:
    from reward import score_expansion_detailed

    return score_expansion_detailed(query, text)["percentage"] / 100


def run_ours(config: Config, folder: Path, count) -> None:
    from expander.train import grpo

    count(grpo, "sample", lambda rows: [len(row.tokens) for row in rows])
    grpo.train_grpo(config, resume=False, overwrite=False)


def run_mlx_lm_lora(config: Config, folder: Path, count) -> None:
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm_lora.trainer import grpo_trainer
    from mlx_lm_lora.utils import from_pretrained

    from expander.prompt import IM_END

    path, beta = str(folder / FUSED), config.grpo.beta
    lora = {"rank": RANK, "scale": ALPHA / RANK, "num_layers": -1}
    model, tokenizer, _ = from_pretrained(path, lora_config=lora)
    count(grpo_trainer, "generate_grpo", lambda found: [ids.size for ids in found[0]])

    def rubric(prompts, completions, answer, types=None) -> list[float]:
        return [reward_of(*pair) for pair in zip(prompts, completions, strict=True)]

    grpo_trainer.train_grpo(
        model,
        load(path)[0].freeze() if beta else None,
        tokenizer,
        optim.AdamW(LEARNING_RATE, weight_decay=0.0),
        [(ids, [], query, "") for query, ids in rival_prompts(config, folder)],
        reward_funcs=[rubric],
        args=grpo_trainer.GRPOTrainingArgs(
            batch_size=PROMPTS,
            group_size=GROUP,
            iters=config.training.max_steps,
            steps_per_report=1,
            steps_per_save=config.training.max_steps,
            max_completion_length=config.grpo.max_completion_length,
            beta=beta,
            temperature=TEMPERATURE,
            top_p=1.0,
            top_k=0,
            adapter_file=str(folder / "adapters.safetensors"),
        ),
        end_answer_token=IM_END,
    )


def run_mlxrl(config: Config, folder: Path, count) -> None:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten
    from mlxrl.algo import GRPOAlgorithm
    from mlxrl.policy import LoRAConfig, load_policy_with_lora, pad_token_id_from_tokenizer
    from mlxrl.rollout import optimized
    from mlxrl.train import batch_from_rollouts, optimizer_step

    lora = LoRAConfig(rank=RANK, scale=ALPHA / RANK)
    model, tokenizer, _ = load_policy_with_lora(str(folder / FUSED), lora)
    count(
        optimized,
        "generate_prefix_cached_group_rollouts",
        lambda rows: [len(row.completion_tokens) for row in rows],
    )
    prompts, beta = rival_prompts(config, folder), config.grpo.beta
    optimizer, algorithm = optim.Adam(LEARNING_RATE), GRPOAlgorithm()
    pad = pad_token_id_from_tokenizer(tokenizer)
    for step in range(config.training.max_steps):
        chunk = prompts[step * PROMPTS : (step + 1) * PROMPTS]
        rollouts = optimized.generate_prefix_cached_group_rollouts(
            model,
            tokenizer,
            [tokenizer.decode(ids) for _, ids in chunk],
            GROUP,
            optimized.SamplingConfig(
                max_tokens=config.grpo.max_completion_length, temperature=TEMPERATURE, top_p=1.0
            ),
            use_chat_template=False,  # the prompts are in the model's chat format
            compile_decode_step=True,
            batch_groups=config.grpo.max_completion_length <= UNENDED,
        )
        assert all(list(row.prompt_tokens) == chunk[row.prompt_index][1] for row in rollouts)
        batch = batch_from_rollouts(
            model,
            rollouts,
            [reward_of(chunk[row.prompt_index][0], row.text) for row in rollouts],
            GROUP,
            pad,
            algorithm,
            compute_reference=beta != 0,
        )
        micro_batch = config.training.batch_size
        optimizer_step(model, optimizer, batch, beta, pad, algorithm, micro_batch_size=micro_batch)
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


def run_unsloth(config: Config, folder: Path, count) -> None:
    # Without this its package wants torch and a GPU where it does not run on a Mac.
    os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"
    from unsloth_zoo.mlx import generate
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXGRPOConfig, MLXGRPOTrainer

    model, tokenizer = FastMLXModel.from_pretrained(
        str(folder / FUSED), load_in_4bit=False, dtype="float32", random_state=SEED
    )
    model = FastMLXModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=False, random_state=SEED
    )
    count(  # it leaves out the end token
        generate,
        "generate_batch",
        lambda rows: [len(row.token_ids) + (row.finish_reason == "stop") for row in rows],
    )

    def rubric(completions, query, **_) -> list[float]:
        return [reward_of(*pair) for pair in zip(query, completions, strict=True)]

    prompts = rival_prompts(config, folder)
    rows = [{"prompt": tokenizer.decode(ids), "query": query} for query, ids in prompts]
    for row, (_, ids) in zip(rows, prompts, strict=True):
        assert tokenizer.encode(row["prompt"], add_special_tokens=False) == ids
    MLXGRPOTrainer(
        model,
        tokenizer,
        rows,
        reward_funcs=[rubric],
        args=MLXGRPOConfig(
            per_device_train_batch_size=config.training.batch_size,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            max_steps=config.training.max_steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            num_generations=GROUP,
            max_completion_length=config.grpo.max_completion_length,
            temperature=TEMPERATURE,
            beta=config.grpo.beta,
            loss_type="grpo",
            gradient_checkpointing=False,
            output_dir=str(folder / "unsloth"),
            seed=SEED,
        ),
    ).train()


RIVALS = {"mlx-lm-lora": run_mlx_lm_lora, "mlxrl": run_mlxrl, "unsloth": run_unsloth}


def count_rollouts(turn: Turn, figures: dict, warm_up: int, module, name: str, lengths_of) -> None:
    """Have `module.name`, with which a step begins, wait for its turn, and count what it samples."""
    sample = getattr(module, name)
    step = 0

    def counted(*args, **kwargs):
        nonlocal step
        turn.pause(f"step {step}")
        if step <= warm_up:
            turn.restart()
            figures.update({"completions": 0, "tokens": 0, "rollout seconds": 0.0})
        step += 1
        start = time.perf_counter()
        result = sample(*args, **kwargs)
        figures["rollout seconds"] += time.perf_counter() - start
        lengths = lengths_of(result)
        figures["completions"] += len(lengths)
        figures["tokens"] += sum(lengths)
        return result

    setattr(module, name, counted)


def work(side: str, config: Config, folder: Path, warm_up: int) -> None:
    figures: dict = {}
    with working(folder / f"{side}.log") as turn:
        run = RIVALS.get(side, run_ours)
        run(config, folder, functools.partial(count_rollouts, turn, figures, warm_up))
        turn.stop()
        turn.finish(figures | peaks())


def compare(arguments: argparse.Namespace, config: Config, folder: Path) -> None:
    def command(side: str) -> list:
        options = ["--sft", arguments.sft, "--rows", arguments.rows, "--side", side]
        for name in ("steps", "warm_up", "tokens", "micro_batch", "beta"):
            options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        script = [sys.executable, "-m", "tests.bench.grpo_rivals"]
        return [*script, *options, "--folder", folder]

    print(f"{arguments.steps} steps of {PROMPTS} prompts x {GROUP} completions", end=" ")
    print(f"of at most {arguments.tokens} tokens, beta {arguments.beta}")
    save_fused(config, folder / FUSED)
    figures = alternate(("ours", arguments.rival), command)
    for found in figures.values():
        found["rollout tokens/s"] = found["tokens"] / found["rollout seconds"]
        found["step tokens/s"] = found["tokens"] / found["seconds"]
        found["CPU s/token"] = found["CPU seconds"] / found["tokens"]
        found["steps/hour"] = (arguments.steps - arguments.warm_up) * 3600 / found["seconds"]
    goal = (
        (">= 4" if arguments.beta == 0 else ">= 3") if arguments.rival == "mlx-lm-lora" else "> 1"
    )
    print_table(figures, GOALS | {"steps/hour": goal})


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
    parser.add_argument(
        "--rival", choices=RIVALS, default="mlx-lm-lora", help="default mlx-lm-lora"
    )
    parser.add_argument("--beta", type=float, default=BETA, help="weight of the KL, 0.02")
    parser.add_argument("--steps", type=int, default=8, help="default 8")
    parser.add_argument("--warm-up", type=int, default=1, help="of them not measured, 1")
    parser.add_argument("--tokens", type=int, default=120, help="limit of a completion, 120")
    parser.add_argument("--micro-batch", type=int, default=4, help="completions per pass, 4")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare losses and gradients")
    what.add_argument("--profile", action="store_true", help="our step's time by part")
    what.add_argument("--side", choices=("ours", *RIVALS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if PROMPTS * GROUP % arguments.micro_batch:
        parser.error(f"--micro-batch must divide {PROMPTS * GROUP}")
    if arguments.steps <= arguments.warm_up:
        parser.error("--steps must be more than --warm-up")
    with tempfile.TemporaryDirectory() as temporary:
        config = configuration(arguments, arguments.folder or Path(temporary))
        if arguments.side:
            work(arguments.side, config, arguments.folder, arguments.warm_up)
        elif arguments.check:
            check(config)
        elif arguments.profile:
            profile(config)
        else:
            compare(arguments, config, Path(temporary))


if __name__ == "__main__":
    main()
