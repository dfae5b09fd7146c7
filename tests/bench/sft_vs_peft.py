"""SFT next to PyTorch, PEFT and transformers: losses, gradients and weights of 20 steps. By hand:

    python -m tests.bench.sft_vs_peft --torch /path/to/python

The other interpreter is one whose environment has `torch transformers peft` and none of this project.
Both train a tiny random model from the same LoRA weights on the same rows, 5 rows a micro-batch, 10 a
step and 4 in the last of an epoch. Ours runs mlx-lm's trainer as train.py does; the other side is
transformers' own loss with `num_items_in_batch`, torch.optim.AdamW, transformers' cosine schedule and
clip_grad_norm_. Exit code 1 when a loss differs by more than 1e-3.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

STEPS, BATCH, ACCUMULATION, RANK, ALPHA = 20, 5, 2, 8, 16.0
LEARNING_RATE, WARMUP, CLIP = 1e-3, 0.15, 1.0
TOLERANCE = 1e-3


def train_ours(folder: Path, architecture: str) -> dict:
    """Write what the other side needs into `folder`; our losses, norms, first gradients, weights."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten
    from mlx_lm.cli_ui import make_console
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    from expander import model as models
    from expander.architectures import PROJECTIONS
    from expander.rows import load_rows
    from expander.train.batches import Batches, tokenize
    from expander.train.inputs import encode_prompts
    from expander.train.optim import AdamW
    from expander.train.sft import completion_loss
    from tests import tiny
    from tests.settings import default_config, section

    base = {"qwen3": tiny.make_qwen3, "llama": tiny.make_llama}[architecture](folder / "model")
    config = default_config(
        training=section(
            "training",
            batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=LEARNING_RATE,
            warmup_ratio=WARMUP,
            max_grad_norm=CLIP,
        )
    )
    tokenizer = models.load_tokenizer(base)
    examples = load_rows("tests/rows.jsonl").train
    prompts = [ids for _, ids in encode_prompts(examples, config, tokenizer)]
    rows = tokenize(examples, prompts, tokenizer, True, config.training.max_length)
    batches = Batches(rows, BATCH, ACCUMULATION, seed=0)

    model = models.load_base(base)
    models.add_lora(model, models.lora_config(model, RANK, ALPHA, 0.0, PROJECTIONS))
    mx.random.seed(0)
    # Not LoRA's zeros: both factors then have a gradient at step 1.
    initial = {k: mx.random.normal(v.shape) * 0.1 for k, v in models.adapter_weights(model).items()}
    model.load_weights(list(initial.items()), strict=False)
    save_file({k: np.array(v) for k, v in initial.items()}, folder / "initial.safetensors")
    epochs = -(-STEPS // batches.steps_per_epoch)
    steps = [step for epoch in range(epochs) for step in batches.step_rows(epoch)][:STEPS]
    (folder / "steps.json").write_text(
        json.dumps([[[row.ids, row.start] for row in step] for step in steps])
    )

    gradients: dict = {}
    for batch in batches.micro_batches(steps[0]):
        _, part = nn.value_and_grad(model, completion_loss)(model, *batch)
        for name, gradient in tree_flatten(part):
            # The trainer divides by the number of batches.
            gradients[name] = gradients.get(name, 0) + gradient / batches.accumulation
    optimizer = AdamW(config.training, STEPS)
    optimizer.init(model.trainable_parameters())
    result = {"loss": [], "norm": [], "gradients": {k: np.array(v) for k, v in gradients.items()}}
    callback = TrainingCallback()

    def remember(info: dict) -> None:
        result["loss"].append(info["train_loss"])
        result["norm"].append(optimizer.state["grad_norm"].item())

    callback.on_train_loss_report = remember
    make_console().quiet = True
    trainer.train(
        model,
        optimizer,
        rows,
        args=trainer.TrainingArgs(
            batch_size=BATCH,
            iters=STEPS * batches.accumulation,
            steps_per_report=batches.accumulation,
            grad_accumulation_steps=batches.accumulation,
            adapter_file=folder / "adapters.safetensors",
        ),
        loss=completion_loss,
        iterate_batches=lambda **_: batches(0),
        training_callback=callback,
    )
    result["weights"] = {k: np.array(v) for k, v in models.adapter_weights(model).items()}
    return result


def train_torch(folder: Path) -> None:
    """The other side, in its own environment: theirs.json, gradients and weights into `folder`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    torch.set_num_threads(1)  # on so small a model threads only wait for each other
    initial = load_file(folder / "initial.safetensors")
    targets = sorted({name.split(".")[-2] for name in initial})
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets)
    model = get_peft_model(base, lora).train()
    factors = {}  # our name → their parameter, whose matrix is ours transposed
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = name.removeprefix("base_model.model.").replace(".default.weight", "")
            ours = ours.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
            factors[ours] = parameter
            parameter.data = torch.tensor(initial[ours].T.copy())
    assert factors.keys() == initial.keys()
    parameters = list(factors.values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * STEPS), STEPS)

    losses, norms = [], []
    for step, rows in enumerate(json.loads((folder / "steps.json").read_text())):
        items = sum(len(ids) - start for ids, start in rows)
        total = 0.0
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            shape = (len(part), max(len(ids) for ids, _ in part))
            inputs, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
            labels = torch.full(shape, -100)
            for i, (ids, start) in enumerate(part):
                inputs[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
                labels[i, start : len(ids)] = torch.tensor(ids[start:])
            loss = model(
                input_ids=inputs, attention_mask=mask, labels=labels, num_items_in_batch=items
            ).loss
            loss.backward()
            total += loss.item()
        if step == 0:
            gradients = {k: p.grad.numpy().T.copy() for k, p in factors.items()}
            save_file(gradients, folder / "gradients.safetensors")
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    weights = {k: p.detach().numpy().T.copy() for k, p in factors.items()}
    save_file(weights, folder / "weights.safetensors")
    (folder / "theirs.json").write_text(json.dumps({"loss": losses, "norm": norms}))


def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest |difference| / |theirs| of a tensor, both as Euclidean norms."""
    assert ours.keys() == theirs.keys()
    return max(np.linalg.norm(ours[k] - theirs[k]) / np.linalg.norm(theirs[k]) for k in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has torch and peft")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the other side's start
    arguments = parser.parse_args()
    if arguments.folder:
        train_torch(arguments.folder)
        return
    if not arguments.torch:
        parser.error("--torch PYTHON is needed")
    worst = 0.0
    for architecture in ("qwen3", "llama"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            ours = train_ours(folder, architecture)
            subprocess.run([arguments.torch, __file__, "--folder", folder], check=True)
            theirs = json.loads((folder / "theirs.json").read_text())
            gradients = distance(ours["gradients"], load_file(folder / "gradients.safetensors"))
            weights = distance(ours["weights"], load_file(folder / "weights.safetensors"))
            start = load_file(folder / "initial.safetensors")
        print(f"{architecture}\nstep      ours     torch  relative    norm, ours and torch")
        apart = []
        for step, (a, b) in enumerate(zip(ours["loss"], theirs["loss"], strict=True)):
            apart.append(abs(a - b) / abs(b))
            norms = f"{ours['norm'][step]:.5f}  {theirs['norm'][step]:.5f}"
            print(f"{step + 1:4}  {a:.6f}  {b:.6f}   {apart[-1]:.1e}    {norms}")
        print(f"largest relative difference of a loss            {max(apart):.1e}")
        print(f"of a tensor's gradient at step 1                 {gradients:.1e}")
        print(f"of a tensor's weights after {STEPS} steps            {weights:.1e}")
        moved = distance(ours["weights"], start)
        print(f"  (training moved a tensor by up to              {moved:.1e})")
        worst = max(worst, *apart)
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
