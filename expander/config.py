"""Typed configuration: one dataclass per section of the YAML file.

A file written for the original (PyTorch) project loads unchanged. Keys that mean nothing on MLX are
accepted and named once as having no effect; unknown keys and wrong values are errors, all of them
reported together. What every key does is said beside it in configs/sft.yaml and configs/grpo.yaml.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

STAGES = ("sft", "grpo")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Keys of the original that are read by nothing here, and why.
NO_EFFECT = {
    "model.trust_remote_code": "remote code is never run",
    "model.torch_dtype": "the dtype follows the device",
    "model.push_to_hub": "convert.py publishes, by the evaluation",
    "training.save_strategy": "save_interval_minutes and save_steps decide",
    "training.ddp_find_unused_parameters": "a PyTorch setting",
    "generation.top_k": "rollouts sample by temperature alone",
    "generation.top_p": "rollouts sample by temperature alone",
    "generation.repetition_penalty": "rollouts sample by temperature alone",
    "gguf": "convert.py writes GGUF",
}
# The same for keys that only the other stage reads.
OTHER_STAGE = {
    "sft": {
        "model.sft": "sft starts from model.base",
        "grpo": "sft does not read it",
        "generation.temperature": "sft does not sample",
    },
    "grpo": {
        "model.base": "it comes with the SFT adapter",
        "model.load_in_4bit": "the base is what the SFT adapter was trained on",
        "model.load_in_8bit": "the base is what the SFT adapter was trained on",
        "dataset.final_newline": "grpo uses the queries alone",
        "training.max_length": "grpo.max_completion_length decides",
        "training.eval_rows": "grpo.eval_prompts decides",
        "training.gradient_checkpointing": "grpo does not use it",
    },
}


class ConfigError(ValueError):
    """Every problem found in a configuration, one a line."""


def key(default, *, above=None, least=None, most=None, choices=None):
    """A dataclass field with the bounds that its value must keep."""
    bounds = {"above": above, "least": least, "most": most, "choices": choices}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata=metadata)


@dataclass
class Model:
    base: str = "Qwen/Qwen3-1.7B"
    output: str = "outputs/sft"
    sft: str = "outputs/sft"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    push_to_hub: bool = False
    trust_remote_code: bool = False
    torch_dtype: str | None = None

    @property
    def bits(self) -> int | None:
        """Of the base's weights while it trains; None: not quantised."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class Dataset:
    name: str = "tobil/qmd-query-expansion-train-v2"
    split: str = "train"
    text_field: str = "text"
    prompt_field: str = "prompt"
    eval_split: float = key(0.1, least=0.0, most=0.5)
    max_samples: int | None = key(None, least=1)
    final_newline: bool = True
    intent: bool = False
    qmd_system_prompt_share: float = key(0.5, least=0.0, most=1.0)


@dataclass
class Training:
    epochs: float = key(5.0, above=0.0)
    max_steps: int | None = key(None, least=-1)
    batch_size: int = key(4, least=1)
    gradient_accumulation_steps: int = key(4, least=1)
    learning_rate: float = key(2e-4, above=0.0)
    lr_scheduler: str = key("cosine", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = key(0.03, least=0.0, most=1.0)
    max_grad_norm: float = key(1.0, least=0.0)
    weight_decay: float = key(0.0, least=0.0)
    max_length: int = key(512, least=16)
    eval_steps: int = key(50, least=1)
    eval_rows: int | None = key(128, least=1)
    max_skipped_steps: int = key(5, least=1)
    patience: int | None = key(None, least=1)
    save_interval_minutes: float | None = key(30.0, above=0.0)
    save_steps: int = key(50, least=1)
    save_total_limit: int = key(3, least=1)
    gradient_checkpointing: bool = False
    seed: int = key(42, least=0, most=2**32 - 1)
    save_strategy: str | None = None
    ddp_find_unused_parameters: bool | None = None


@dataclass
class Penalties:
    """Weights of the terms of penalties.py, taken off the reward."""

    empty: float = key(0.5, least=0.0)
    truncated: float = key(0.3, least=0.0)
    extra_lines: float = key(0.3, least=0.0)
    duplicate_lines: float = key(0.3, least=0.0)
    dropped_lines: float = key(0.3, least=0.0)
    no_final_newline: float = key(0.1, least=0.0)


@dataclass
class Grpo:
    num_generations: int = key(8, least=2)
    max_completion_length: int = key(200, least=1)
    beta: float = key(0.02, least=0.0)
    epsilon_low: float = key(0.2, above=0.0, most=1.0)
    epsilon_high: float = key(0.2, above=0.0)
    num_iterations: int = key(1, least=1)
    loss_type: str = key("dapo", choices=("grpo", "bnpo", "dr_grpo", "dapo"))
    level: str = key("token", choices=("token", "sequence"))
    scale_rewards: str = key("group", choices=("group", "batch", "none"))
    mask_truncated: bool = False
    reward: str = key("percentage", choices=("percentage", "score"))
    penalties: Penalties = field(default_factory=Penalties)
    eval_prompts: int = key(32, least=0)
    rollout_batch_size: int = key(32, least=1)


@dataclass
class Lora:
    rank: int = key(16, least=1)
    alpha: float = key(32.0, above=0.0)
    dropout: float = key(0.0, least=0.0, most=0.99)
    target_modules: list[str] = field(
        default_factory=lambda: list(PROJECTIONS), metadata={"choices": PROJECTIONS}
    )


@dataclass
class Generation:
    temperature: float = key(1.0, above=0.0)
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None


@dataclass
class Tracking:
    to: str | None = key(None, choices=("trackio", "wandb"))
    project: str | None = None
    run_name: str | None = None


@dataclass
class Config:
    """The resolved configuration of one stage."""

    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    training: Training = field(default_factory=Training)
    grpo: Grpo = field(default_factory=Grpo)
    lora: Lora = field(default_factory=Lora)
    generation: Generation = field(default_factory=Generation)
    tracking: Tracking = field(default_factory=Tracking)
    gguf: bool = False


# What a grpo file leaves out where the two stages differ: as configs/grpo.yaml has it.
GRPO_DEFAULTS = {
    "model": {"output": "outputs/grpo"},
    "dataset": {"max_samples": 1000, "qmd_system_prompt_share": 0.0},
    "training": {
        "epochs": 1.0,
        "max_steps": 28,
        "batch_size": 2,
        "gradient_accumulation_steps": 16,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.5,
        "eval_steps": 8,
    },
}


def _all_keys() -> list[str]:
    """Every dotted key there is."""
    return _keys(dataclasses.asdict(Config()))


def _nearest(dotted: str) -> str:
    """What an unknown key may have been meant as: the same section first, then any."""
    section, _, name = dotted.rpartition(".")
    prefix = f"{section}." if section else ""
    below = {k.removeprefix(prefix): k for k in _all_keys() if k.startswith(prefix)}
    siblings = {leaf: k for leaf, k in below.items() if "." not in leaf}
    anywhere = {k.split(".")[-1]: k for k in _all_keys()}
    for known in (siblings, anywhere):
        if match := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            return f"did you mean {known[match[0]]}?"
    return f"known here: {', '.join(siblings)}"


def _number(value, whole: bool) -> int | float:
    """A YAML number, or a string that is one: PyYAML reads 2e-4 as a string (YAML 1.1)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = value if isinstance(value, int) else float(value)
    if not math.isfinite(number) or (whole and number != int(number)):
        raise ValueError
    return int(number) if whole else float(number)


def _typed(value, hint, bounds: dict):
    """`value` as the type of `hint`, within `bounds`; ValueError carries what is allowed."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        optional = " or null"
    else:
        optional = ""
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(
        hint, "a list of names"
    )
    choices = bounds.get("choices")
    if choices:
        wanted = f"{'a list out of' if hint not in (str,) else 'one of'} {', '.join(choices)}"
    for name, sign in (("above", ">"), ("least", ">="), ("most", "<=")):
        if name in bounds:
            wanted += f" {sign} {bounds[name]}"
    try:
        if hint in (int, float):
            value = _number(value, whole=hint is int)
        elif hint is bool or hint is str:
            if not isinstance(value, hint):
                raise ValueError
        elif not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
            raise ValueError
        else:
            value = list(value)  # not the caller's own, which may be a default
        if choices and not set(value if isinstance(value, list) else [value]) <= set(choices):
            raise ValueError
        if (
            ("above" in bounds and not value > bounds["above"])
            or ("least" in bounds and not value >= bounds["least"])
            or ("most" in bounds and not value <= bounds["most"])
        ):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{wanted}{optional}") from None
    return value


def _fill(target, raw: dict, prefix: str, problems: list[str]) -> None:
    """Set `target`'s fields from a mapping, collecting problems instead of raising."""
    hints = typing.get_type_hints(type(target))
    fields = {f.name: f for f in dataclasses.fields(target)}
    for name, value in raw.items():
        dotted = f"{prefix}{name}"
        if name not in fields:
            problems.append(f"{dotted}: unknown key; {_nearest(dotted)}")
        elif dataclasses.is_dataclass(getattr(target, name)):
            if value is None:
                continue
            if isinstance(value, dict):
                _fill(getattr(target, name), value, f"{dotted}.", problems)
            else:
                problems.append(f"{dotted}: {value!r} is not a section (a mapping of keys)")
        else:
            try:
                setattr(target, name, _typed(value, hints[name], fields[name].metadata))
            except ValueError as allowed:
                problems.append(f"{dotted}: {value!r} is not allowed; it takes {allowed}")


def _read_yaml(path: Path) -> dict:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such config file; see configs/ for the two defaults"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if not isinstance(raw, dict) or not raw:
        raise ConfigError(f"{path}: expected sections such as model:, found {raw!r:.60}")
    return raw


def _read_set(setting: str) -> dict:
    """'training.epochs=2' as {"training": {"epochs": 2}}."""
    dotted, equals, text = setting.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {setting}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text
    for name in reversed(names):
        value = {name: value}
    return value


def _keys(raw: dict, prefix: str = "") -> list[str]:
    """Every dotted key of a nested mapping, sections included."""
    found = []
    for name, value in raw.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, dict):
            found += _keys(value, f"{prefix}{name}.")
    return found


def load_config(
    stage: str, path: str | Path | None = None, settings: typing.Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """The configuration of `stage` from a YAML file and `--set` overrides.

    Args:
        stage: "sft" or "grpo"; it decides the defaults of keys that the file leaves out.
        path: a YAML file; None takes configs/{stage}.yaml beside this module.
        settings: "section.key=value" strings, applied in order over the file.

    Returns:
        The typed configuration, and one sentence for each key given that has no effect.

    Raises:
        ConfigError: with every problem of the file and of the settings, one a line.
    """
    assert stage in STAGES
    path = (
        Path(path) if path is not None else Path(__file__).parents[1] / "configs" / f"{stage}.yaml"
    )
    layers = [(str(path), _read_yaml(path))]
    layers += [(f"--set {setting}", _read_set(setting)) for setting in settings]

    config, problems = Config(), []
    if stage == "grpo":
        _fill(config, GRPO_DEFAULTS, "", problems)
    for origin, raw in layers:
        found: list[str] = []
        _fill(config, raw, "", found)
        problems += [f"{origin}: {problem}" for problem in found]
    if config.model.load_in_4bit and config.model.load_in_8bit:
        problems.append(f"{path}: model.load_in_4bit and model.load_in_8bit: choose one")
    if problems:
        raise ConfigError("\n".join(problems))

    given = {dotted for _, raw in layers for dotted in _keys(raw)}
    reasons = NO_EFFECT | OTHER_STAGE[stage]
    if "tracking.to" not in given:  # a file of the original names a project and no tracker
        reasons |= {"tracking": "no run is tracked unless tracking.to names where"}
    ignored = [f"{name} ({why})" for name, why in reasons.items() if name in given]
    return config, ignored


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
