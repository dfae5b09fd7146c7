"""Estimate a run's memory before it starts.

The estimate is arithmetic on the base model's config.json, the batch and the lengths. Its constants
were fitted to the peaks of real runs (tests/bench/memory_peak.py), which it meets within 10 %.
"""

import os
import resource
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from expander.architectures import (
    ARCHITECTURES,
    Projection,
    attention_layers,
    head_dim,
    select_projections,
)
from expander.config import TRAINED, Config
from expander.model import QUANT_GROUP, Chain, compute_dtype, model_config, recommended_memory
from expander.train.batches import round_targets, round_width

GB = 1e9
# Numbers per chunk of logits in logps.py and sft.py: 64 MiB in float32.
LOGIT_BUDGET = 1 << 24
# Float32 arrays of logits per target, and at most of chunks of token_logps: MLX runs chunks ahead.
SFT_LOGITS, CHECKPOINTED_LOGITS, GRPO_LOGITS = (3.0, 13.0), (2.4, 12.0), (3.3, 10.5)
# Tokens of the shortest prompt, which are no targets of SFT.
PROMPT_TOKENS = 20
# A new gradient, the gradient so far, and what the kept step holds: weights, two moments, the best.
ADAPTER_COPIES = 6
# Layers' worth of temporaries in the backward pass; checkpointing computes a layer again.
BACKWARD_LAYERS, CHECKPOINTED_LAYERS = 1.0, 2.5
# Float32 copies of a recurrence's state per token that the backward pass needs.
STATES = 3
# Float32 arrays of one row of logits per sequence while sampling.
SAMPLING_ARRAYS = 4
# Host memory of a compiled step, per layer and batch shape; a padded length has about 3 shapes.
COMPILED_LAYER, SHAPES_PER_LENGTH = 420_000, 3
# Python, MLX, transformers and Qwen3's tokenizer.
PROCESS = 250_000_000
# mlx-lm's key-value caches grow in steps of so many tokens.
CACHE_STEP = 256


class Quantization(NamedTuple):
    """Bits per weight; each group of weights has a scale and a bias in the compute dtype."""

    bits: int
    group: int = QUANT_GROUP


@dataclass(frozen=True)
class Shape:
    """The sizes of a base model that memory depends on."""

    layers: int
    attention: int  # layers with attention; the others have a convolution or recurrence
    hidden: int
    query: int  # attention heads x head size
    key_value: int
    heads: int
    vocabulary: int
    tied: bool
    projections: dict[str, Projection]
    kept: int  # numbers that each layer keeps per token, besides those of attention and `mixed`
    mixed: int = 0  # numbers that a convolution or recurrence keeps per token
    state: int = 0  # float32 numbers of a recurrence's state
    quantization: Quantization | None = None  # of the base's own files

    @classmethod
    def of(cls, config: dict) -> "Shape":
        """From a config.json of the supported architectures."""
        architecture = ARCHITECTURES[config.get("model_type", "qwen3")]
        heads, hidden, head = (
            config["num_attention_heads"],
            config["hidden_size"],
            head_dim(config),
        )
        packed = config.get("quantization")
        mixed, state = architecture.mixer(config)
        norms, halves = architecture.kept
        return cls(
            layers=config["num_hidden_layers"],
            attention=len(attention_layers(config)),
            hidden=hidden,
            query=heads * head,
            key_value=(config.get("num_key_value_heads") or heads) * head,
            heads=heads,
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", True),
            projections=architecture.projections(config),
            kept=norms * hidden + halves * config["intermediate_size"],
            mixed=mixed,
            state=state,
            quantization=Quantization(packed["bits"], packed["group_size"]) if packed else None,
        )

    def linear(self, targets: Collection[str]) -> int:
        """Weights of these linear maps in all layers."""
        chosen = [self.projections[name] for name in select_projections(self.projections, targets)]
        return sum(layers * inputs * outputs for inputs, outputs, layers in chosen)

    def parameters(self) -> int:
        """Weights of the embedding, the head and the linear maps; norms do not count."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.linear(self.projections)

    def weights(
        self, width: int, quantization: Quantization | None, fused: Collection[str] = ()
    ) -> float:
        """Bytes of `parameters`.

        Args:
            width: bytes of a number in the compute dtype.
            fused: linear maps with an adapter fused in, which leaves them unquantised.
        """
        linear = [name for name in fused if name not in TRAINED]
        full = self.linear(linear) + self.whole(fused)
        rest = self.parameters() - full
        if not quantization:
            return width * (full + rest)
        return width * full + (quantization.bits / 8 + 2 * width / quantization.group) * rest

    def adapter(self, rank: int, targets: Collection[str]) -> int:
        """Weights of a LoRA adapter.

        Raises:
            ValueError: the model has no such targets.
        """
        chosen = [self.projections[name] for name in select_projections(self.projections, targets)]
        return rank * sum(layers * (inputs + outputs) for inputs, outputs, layers in chosen)

    def whole(self, names: Collection[str]) -> int:
        """Weights of the embedding and the head, if they are among `names`; a tied head is one."""
        found = {"embed_tokens" if self.tied else name for name in names if name in TRAINED}
        return len(found) * self.vocabulary * self.hidden

    def layer_kinds(self, tokens: int, length: int, width: int) -> dict[int, int]:
        """Bytes that one layer keeps for the backward pass of `tokens` tokens in rows of `length`,
        by the kind of layer -> how many layers keep so much."""
        # Queries, keys and values. Attention weights are float32, where no fused kernel makes them
        # again.
        attention = (
            width * (self.kept + 3 * (self.query + self.key_value)) + 4 * self.heads * length
        )
        # A recurrence is computed token by token, and keeps its float32 state of each.
        other = width * (self.kept + self.mixed) + 4 * STATES * self.state
        kinds = {tokens * attention: self.attention, tokens * other: self.layers - self.attention}
        return {size: layers for size, layers in kinds.items() if layers}

    def backward(self, tokens: int, length: int, width: int, checkpointing: bool) -> float:
        """Bytes kept for the backward pass (with checkpointing, the layers' inputs) and temporary."""
        kinds = self.layer_kinds(tokens, length, width)
        if checkpointing:
            return self.layers * width * tokens * self.hidden + CHECKPOINTED_LAYERS * max(kinds)
        return sum(size * layers for size, layers in kinds.items()) + BACKWARD_LAYERS * max(kinds)

    def cache(self, rows: int, length: int, width: int) -> int:
        """Bytes of the keys, values and states of `rows` sequences while decoding."""
        length = -(-length // CACHE_STEP) * CACHE_STEP
        states = 4 * self.state * (self.layers - self.attention)
        return rows * (2 * length * self.attention * self.key_value * width + states)


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what holds them. The first four make up MLX's peak; the others are resident besides."""

    weights: float
    adapter: float
    activations: float
    logits: float
    buffers: float = 0.0  # freed, kept for reuse
    compiled: float = 0.0
    process: float = PROCESS

    @property
    def peak(self) -> float:
        """Comparable with mx.get_peak_memory()."""
        return self.weights + self.adapter + self.activations + self.logits

    @property
    def resident(self) -> float:
        """Of the process as the system sees it, at most; MLX frees its buffers when memory is short."""
        return self.peak + self.buffers + self.compiled + self.process

    def __str__(self) -> str:
        return (
            f"about {self.peak / GB:.1f} GB: weights {self.weights / GB:.1f}, adapter and "
            f"optimiser {self.adapter / GB:.1f}, activations {self.activations / GB:.1f}, logits "
            f"{self.logits / GB:.1f}; up to {self.resident / GB:.1f} GB resident with buffers for "
            f"reuse {self.buffers / GB:.1f}, compiled steps {self.compiled / GB:.1f}, Python "
            f"{self.process / GB:.1f}"
        )


def estimate(
    stage: str,
    config: Config,
    shape: Shape,
    longest: int,
    width: int,
    *,
    bits: int | None = None,
    fused: Collection[str] = (),
) -> Estimate:
    """Estimate the memory of a run.

    Args:
        longest: tokens of the longest row (sft) or prompt (grpo).
        width: bytes of a number in the compute dtype.
        bits: for grpo, bits per weight of the base that SFT quantised.
        fused: for grpo, the linear maps that the SFT adapter changes; they are not quantised.
    """
    if stage == "sft":
        bits, fused = config.model.bits, ()
        activations, logits = sft_step(config, shape, longest, width)
        lengths = {round_width(length) for length in range(1, longest + 1)}
        compiled = COMPILED_LAYER * shape.layers * SHAPES_PER_LENGTH * len(lengths)
    else:
        # Rollouts and updates take turns.
        activations, logits = max(
            rollout(config, shape, longest, width), update(config, shape, longest, width), key=sum
        )
        compiled = 0
    quantization = shape.quantization or (Quantization(bits) if bits else None)
    adapter = shape.adapter(config.lora.rank, config.lora.target_modules)
    adapter += shape.whole(config.lora.modules_to_save or ())
    return Estimate(
        weights=shape.weights(width, quantization, fused),
        # A narrower compute dtype casts the adapter.
        adapter=adapter * (4 * ADAPTER_COPIES + (width if width < 4 else 0)),
        activations=activations,
        logits=logits,
        buffers=cache_limit(),
        compiled=compiled,
    )


def sft_step(config: Config, shape: Shape, longest: int, width: int) -> tuple[float, float]:
    """Bytes of the activations and logits of one SFT micro-batch."""
    rows, checkpointing = config.training.batch_size, config.training.gradient_checkpointing
    length = round_width(longest - 1)
    targets = round_targets(rows * max(longest - PROMPT_TOKENS, 1), rows, length)
    logits = logit_bytes(
        targets, shape.vocabulary, width, *(CHECKPOINTED_LOGITS if checkpointing else SFT_LOGITS)
    )
    return shape.backward(rows * length, length, width, checkpointing), logits


def update(config: Config, shape: Shape, longest: int, width: int) -> tuple[float, float]:
    """Bytes of the activations and logits of one GRPO micro-batch; completions share prompts."""
    training, settings = config.training, config.grpo
    completed = training.batch_size * settings.max_completion_length
    step = training.batch_size * training.gradient_accumulation_steps
    prompts = min(training.batch_size, step // settings.num_generations)
    length = longest + settings.max_completion_length
    logits = logit_bytes(completed, shape.vocabulary, width, *GRPO_LOGITS)
    tokens = completed + prompts * longest
    return shape.backward(tokens, length, width, checkpointing=False), logits


def logit_bytes(targets: int, vocabulary: int, width: int, arrays: float, limit: float) -> float:
    """Bytes of `arrays` float32 arrays of all targets' logits, or `limit` of a chunk's."""
    if width < 4:  # on top come the head's output in this dtype, its cast, and their gradients
        arrays, limit = arrays + width, limit + width
    return 4 * min(arrays * targets * vocabulary, limit * LOGIT_BUDGET)


def rollout(config: Config, shape: Shape, longest: int, width: int) -> tuple[float, float]:
    """Bytes of the key-value cache and the logits while decoding, in training or evaluation."""
    training, settings = config.training, config.grpo
    step = training.batch_size * training.gradient_accumulation_steps
    rows = min(settings.rollout_batch_size, max(step, settings.eval_prompts))
    cache = shape.cache(rows, longest + settings.max_completion_length, width)
    return cache, rows * shape.vocabulary * (width + 4 * SAMPLING_ARRAYS)


def installed() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """Bytes of memory that this process has held at most, compiled functions and caches included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def recommended() -> int:
    """Bytes that the device recommends to stay under, or the machine's memory."""
    return recommended_memory() or installed()


def cache_limit() -> int:
    """Bytes of freed buffers that MLX may keep for reuse, on top of what a run needs.

    An eighth of what the device recommends, 2 GiB at most; on a CPU 256 MiB, because malloc reuses
    memory as well.
    """
    most = 2 << 30 if recommended_memory() else 256 << 20
    return min(most, recommended() // 8)


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
    """Describe the estimate in one line; warn with a proposal if the device has too little memory.

    Args:
        chain: the model that the run starts from.
        longest: tokens of the longest row (sft) or prompt (grpo).

    Raises:
        ModelError: the base's config.json cannot be used.
        ValueError: the model has no such lora.target_modules.
    """
    shape, limit = Shape.of(model_config(chain.path)), recommended()
    bits, fused, width = chain.bits, chain.adapted_layers(), compute_dtype().size

    def needs(settings: Config) -> Estimate:
        return estimate(stage, settings, shape, longest, width, bits=bits, fused=fused)

    needed = needs(config)
    line = f"memory: {needed}; the device recommends up to {limit / GB:.1f} GB"
    if needed.peak <= limit:
        return line, None
    warning = (
        f"this run needs about {needed.peak / GB:.1f} GB, more than the {limit / GB:.1f} GB that "
        "the device recommends: "
    )
    for smaller, changes in savings(stage, config):
        if (less := needs(smaller).peak) <= limit:
            sets = " ".join(f"--set {name}={str(value).lower()}" for name, value in changes.items())
            return line, f"{warning}about {less / GB:.1f} GB with {sets}"
    return line, f"{warning}choose a smaller base model"
