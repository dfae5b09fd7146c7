"""The estimate of memory.py against MLX's own peak of two SFT steps: python -m tests.bench.memory_peak

On a random Qwen3 of 12 layers with the real vocabulary of 151,936, for several batches. The peak
counts active memory alone; buffers kept for reuse come on top, and go back when memory is short.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint

from expander import model as models
from expander.config import Config
from expander.train.batches import Row, collate
from expander.train.memory import GB, Shape, estimate
from expander.train.optim import AdamW
from expander.train.sft import completion_loss
from tests.settings import default_config
from tests.tiny import make_qwen3

PROMPT = 18
# (rows, tokens a row, gradient checkpointing); checkpointing cannot be taken back, so it is last.
CASES = [(1, 64, False), (2, 128, False), (4, 128, False), (4, 128, True)]


def peak(path: Path, config: Config, rows: int, length: int, checkpointing: bool) -> int:
    """Bytes at the highest point of two compiled steps, weights and optimiser included."""
    lora = config.lora
    model = models.load_base(path)
    models.add_lora(
        model, models.lora_config(model, lora.rank, lora.alpha, lora.dropout, lora.target_modules)
    )
    if checkpointing:
        grad_checkpoint(model.layers[0])
    optimizer = AdamW(config.training, 10)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    value_and_grad = nn.value_and_grad(model, completion_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch):
        (loss, _), gradient = value_and_grad(model, *batch)
        optimizer.update(model, gradient)
        return loss

    batch = collate([Row([i % 97 for i in range(length)], PROMPT, "") for _ in range(rows)])
    mx.eval(state, batch)
    mx.clear_cache()
    mx.reset_peak_memory()
    for _ in range(2):
        mx.eval(step(*batch), state)
    return mx.get_peak_memory()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    config = default_config()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden": 512, "layers": 12, "heads": 8, "kv_heads": 4, "head_dim": 64}
        path = make_qwen3(Path(folder), ffn=1536, full_vocab=True, **sizes)
        shape = Shape.of(json.loads((path / "config.json").read_text()))
        print("rows  tokens  checkpointing  estimate  peak  estimate / peak")
        for rows, length, checkpointing in CASES:
            config.training.batch_size = rows
            config.training.gradient_checkpointing = checkpointing
            told = estimate("sft", config, shape, length, models.compute_dtype().size).total
            found = peak(path, config, rows, length, checkpointing)
            print(
                f"{rows:4}  {length:6}  {'yes' if checkpointing else 'no':>13}  "
                f"{told / GB:5.2f} GB  {found / GB:.2f} GB  {told / found:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
