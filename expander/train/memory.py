"""What a run will need of the device's memory, told before it starts.

The estimate is arithmetic on the base model's config.json, the batch and the lengths. The counts of
arrays that stay for the backward pass were fitted to MLX's own peaks (tests/bench/memory_peak.py).
"""

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx

from expander.config import Config
from expander.model import QUANT_GROUP, Chain, compute_dtype, model_config
from expander.train.logps import LOGIT_BUDGET

GB = 1e9
# Arrays of logits alive for a chunk of token_logps, and at most: MLX allocates a few chunks ahead.
LOGIT_ARRAYS, LOGIT_ARRAYS_AHEAD = 3, 12
# A LoRA weight, its gradient, AdamW's two moments, and the best one so far.
ADAPTER_COPIES = 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model that memory depends on."""

    layers: int
    hidden: int
    ffn: int
    query: int  # attention heads × head size
    key_value: int
    heads: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: dict) -> "Shape":
        """From a config.json of the supported architectures."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head = config.get("head_dim") or hidden // heads
        return cls(
            config["num_hidden_layers"],
            hidden,
            config["intermediate_size"],
            heads * head,
            (config.get("num_key_value_heads") or heads) * head,
            heads,
            config["vocab_size"],
            config.get("tie_word_embeddings", True),
        )

    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's linear maps."""
        hidden, query, key_value, ffn = self.hidden, self.query, self.key_value, self.ffn
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, ffn),
            "up_proj": (hidden, ffn),
            "down_proj": (ffn, hidden),
        }

    def parameters(self) -> int:
        """Weights of the embedding, the head and the linear maps; norms do not count."""
        linear = self.layers * sum(a * b for a, b in self.projections().values())
        return linear + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int, targets) -> int:
        """LoRA weights."""
        return self.layers * rank * sum(sum(self.projections()[name]) for name in targets)

    def activations(self, tokens: int, length: int, checkpointing: bool) -> int:
        """Numbers kept for the backward pass of `tokens` tokens in rows of `length`."""
        layer = 6 * self.hidden + 5 * self.ffn + 3 * (self.query + self.key_value)
        layer += self.heads * length  # attention scores, where no fused kernel makes them again
        if checkpointing:
            return tokens * (self.layers * self.hidden + layer)
        return tokens * self.layers * layer

    def cache(self, tokens: int) -> int:
        """Keys and values of `tokens` tokens while decoding."""
        return 2 * tokens * self.layers * self.key_value


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what holds them."""

    weights: float
    adapter: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations + self.logits

    def __str__(self) -> str:
        return (
            f"about {self.total / GB:.1f} GB: weights {self.weights / GB:.1f}, adapter and "
            f"optimiser {self.adapter / GB:.1f}, activations {self.activations / GB:.1f}, logits "
            f"{self.logits / GB:.1f}"
        )


def estimate(stage: str, config: Config, shape: Shape, length: int, width: int) -> Estimate:
    """The peak of a run.

    Args:
        length: tokens of the longest row (sft) or prompt (grpo).
        width: bytes of a number in the device's dtype.
    """
    training = config.training
    # For grpo the SFT adapter is fused, and with it every layer that was quantised.
    bits = config.model.bits if stage == "sft" else None
    # A quantised group has a scale and a bias.
    per_weight = bits / 8 + 2 * width / QUANT_GROUP if bits else width
    rows = training.batch_size
    if stage == "sft":
        logit_rows, cache = rows * length, 0
        tokens, checkpointing = rows * length, training.gradient_checkpointing
    else:
        # Rollouts and updates take turns: the cache of one, the activations of the other.
        settings = config.grpo
        completions = rows * training.gradient_accumulation_steps
        decoded = min(settings.rollout_batch_size, completions)
        logit_rows = max(decoded, rows * settings.max_completion_length)
        length += settings.max_completion_length
        tokens, checkpointing = rows * length, False
        cache = shape.cache(decoded * length)
    logits = min(LOGIT_ARRAYS * logit_rows * shape.vocabulary, LOGIT_ARRAYS_AHEAD * LOGIT_BUDGET)
    return Estimate(
        weights=shape.parameters() * per_weight,
        adapter=4 * ADAPTER_COPIES * shape.adapter(config.lora.rank, config.lora.target_modules),
        activations=width * max(cache, shape.activations(tokens, length, checkpointing)),
        logits=4 * logits,
    )


def installed() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Bytes of memory that this process has held at most, compiled functions and caches included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def recommended() -> int:
    """Bytes that the device recommends to stay under; without a word from it, the machine's memory."""
    return mx.device_info().get("max_recommended_working_set_size", installed())


def cache_limit() -> int:
    """Bytes of freed buffers that MLX may keep for reuse: an eighth of what the device recommends,
    2 GiB at most. They come on top of what a run needs."""
    return min(2 << 30, recommended() // 8)


def savings(stage: str, config: Config) -> Iterator[tuple[Config, dict[str, object]]]:
    """Settings that need less memory, the cheapest in time first, each added to those before.

    Yields:
        The configuration, and every dotted key changed in it.
    """
    changes: dict[str, object] = {}

    def change(section: str, **values) -> tuple[Config, dict[str, object]]:
        nonlocal config
        config = replace(config, **{section: replace(getattr(config, section), **values)})
        changes.update({f"{section}.{name}": value for name, value in values.items()})
        return config, dict(changes)

    while stage == "grpo" and config.grpo.rollout_batch_size > 8:
        yield change("grpo", rollout_batch_size=config.grpo.rollout_batch_size // 2)
    while (rows := config.training.batch_size) % 2 == 0:
        passes = config.training.gradient_accumulation_steps
        yield change("training", batch_size=rows // 2, gradient_accumulation_steps=passes * 2)
    if stage == "sft":
        yield change("training", gradient_checkpointing=True)
        yield change("model", load_in_8bit=False, load_in_4bit=True)


def preflight(stage: str, config: Config, chain: Chain, longest: int) -> tuple[str, str | None]:
    """What a run will need, in one line; and a warning with a proposal when it is too much.

    Args:
        chain: what the run starts from.
        longest: tokens of the longest row (sft) or prompt (grpo).

    Raises:
        ModelError: the base's config.json cannot be used.
    """
    shape, width, limit = Shape.of(model_config(chain.path)), compute_dtype().size, recommended()

    needed = estimate(stage, config, shape, longest, width)
    line = f"memory: {needed}; the device recommends up to {limit / GB:.1f} GB"
    if needed.total <= limit:
        return line, None
    warning = (
        f"this run needs about {needed.total / GB:.1f} GB, more than the {limit / GB:.1f} GB that "
        "the device recommends: "
    )
    for smaller, changes in savings(stage, config):
        if (less := estimate(stage, smaller, shape, longest, width).total) <= limit:
            sets = " ".join(f"--set {name}={str(value).lower()}" for name, value in changes.items())
            return line, f"{warning}about {less / GB:.1f} GB with {sets}"
    return line, f"{warning}choose a smaller base model"
