"""Typed configuration: one dataclass per section of the YAML file.

The classes hold types and bounds. Defaults and explanations are in configs/sft.yaml and
configs/grpo.yaml: a configuration is read from the file of its stage, then from the user's file,
then from --set.

A file of the original (PyTorch) project loads unchanged. Its keys that have no effect on MLX are
accepted and reported once. Unknown keys and invalid values are errors, all reported together.
"""

import dataclasses
import difflib
import operator
import re
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from expander.files import expand_path, pointer_error

STAGES = ("sft", "grpo")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# The modules that lora.modules_to_save may name, by their names in mlx-lm.
TRAINED = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}

# Keys of the original that have no effect here, and why.
NO_EFFECT = {
    "model.trust_remote_code": "remote code is never run",
    "model.torch_dtype": "the device decides the dtype",
    "model.push_to_hub": "only convert.py publishes, after an evaluation",
    "training.save_strategy": "save_interval_minutes and save_steps decide",
    "training.ddp_find_unused_parameters": "it is a PyTorch setting",
    "generation.top_k": "rollouts use only the temperature",
    "generation.top_p": "rollouts use only the temperature",
    "generation.min_p": "rollouts use only the temperature",
    "generation.repetition_penalty": "rollouts use only the temperature",
    "gguf": "convert.py writes GGUF files",
}
# Keys and sections that only the other stage reads, and why.
OTHER_STAGE = {
    "sft": {
        "model.sft": "sft starts from model.base",
        "grpo": "sft does not read it",
        "generation.temperature": "sft does not sample",
    },
    "grpo": {
        "model.base": "the SFT adapter names its base model",
        "model.load_in_4bit": "the SFT adapter decides the base model's precision",
        "model.load_in_8bit": "the SFT adapter decides the base model's precision",
        "dataset.final_newline": "grpo uses only the queries",
        "training.max_length": "grpo.max_completion_length decides",
        "training.eval_rows": "grpo.eval_prompts decides",
        "training.gradient_checkpointing": "grpo does not use it",
    },
}
BOUNDS = {
    "above": (">", operator.gt),
    "minimum": (">=", operator.ge),
    "other_than": ("and not", operator.ne),
    "maximum": ("<=", operator.le),
}
SHORT = reprlib.Repr()  # values in messages: an alias in YAML can stand for a billion values
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 100, 100
BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}  # true and false are YAML's own
LARGEST = 2**31 - 1  # of a number without a maximum: MLX counts in 32 bits
NAME = re.compile(r"[A-Za-z_][\w.]*")  # of a layer
# Decimal, so that 012 and 0o12 (octal or not?) and 1:30 (90 in YAML 1.1) are no numbers.
NUMBER = re.compile(r"[-+]?(0|[1-9][0-9_]*|(?=\.[0-9]))(\.[0-9_]*)?([eE][-+]?[0-9]{1,3})?")


class ConfigError(ValueError):
    """Every problem of a configuration, one per line."""


def key(**bounds):
    """A dataclass field without a default.

    Args:
        bounds: above, minimum, maximum and other_than of a number; choices of a name; path=True for
            a file, folder or Hub id.
    """
    assert bounds.keys() <= {*BOUNDS, "choices", "path"}
    return field(metadata=bounds)


# Only the keys of NO_EFFECT have a default below: they are in no file of this project.


@dataclass
class Model:
    base: str = key(path=True)
    output: str = key(path=True)
    sft: str = key(path=True)
    load_in_4bit: bool
    load_in_8bit: bool
    push_to_hub: bool = False
    trust_remote_code: bool = False
    torch_dtype: str | None = None

    @property
    def bits(self) -> int | None:
        """Bits per weight of the base model in training; None if it is not quantized."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None


@dataclass
class Dataset:
    name: str = key(path=True)
    split: str
    text_field: str
    prompt_field: str
    eval_split: float = key(minimum=0.0, maximum=0.5)
    max_samples: int | None = key(minimum=1)
    final_newline: bool
    intent: bool
    qmd_system_prompt_share: float = key(minimum=0.0, maximum=1.0)


@dataclass
class Training:
    epochs: float = key(above=0.0)
    max_steps: int | None = key(minimum=-1, other_than=0)  # -1, as in the original: not set
    batch_size: int = key(minimum=1)
    gradient_accumulation_steps: int = key(minimum=1)
    learning_rate: float = key(above=0.0)
    lr_scheduler: str = key(choices=("cosine", "linear", "constant"))
    warmup_ratio: float = key(minimum=0.0, maximum=1.0)
    max_grad_norm: float = key(minimum=0.0)
    weight_decay: float = key(minimum=0.0)
    max_length: int = key(minimum=16)
    eval_steps: int = key(minimum=1)
    eval_rows: int | None = key(minimum=1)
    max_skipped_steps: int = key(minimum=1)
    patience: int | None = key(minimum=1)
    save_interval_minutes: float | None = key(above=0.0)
    save_steps: int = key(minimum=1)
    save_total_limit: int = key(minimum=1)
    gradient_checkpointing: bool
    seed: int = key(minimum=0, maximum=2**32 - 1)
    save_strategy: str | None = None
    ddp_find_unused_parameters: bool | None = None


# The weights of the penalties in expander/train/rewards.py, by the names in configs/grpo.yaml.
Penalties = dataclasses.make_dataclass(
    "Penalties",
    [
        (name, float, key(minimum=0.0))
        for name in yaml.safe_load((CONFIGS / "grpo.yaml").read_text(encoding="utf-8"))["grpo"][
            "penalties"
        ]
    ],
)


@dataclass
class Retrieval:
    collections: list[str] | None = field(metadata={"path": True})
    embedder: str
    value: str = key(choices=("rank", "hit"))  # VALUES in expander/train/judged.py
    full_text: float = key(minimum=0.0, maximum=1.0)
    gain: float = key(minimum=0.0)
    rubric: float = key(minimum=0.0)
    rubric_cap: float = key(above=0.0, maximum=1.0)
    lex_without_hit: float = key(minimum=0.0)


@dataclass
class Grpo:
    num_generations: int = key(minimum=2)
    max_completion_length: int = key(minimum=1)
    beta: float = key(minimum=0.0)
    epsilon_low: float = key(above=0.0, maximum=1.0)
    epsilon_high: float = key(above=0.0)
    num_iterations: int = key(minimum=1)
    loss_type: str = key(choices=("grpo", "bnpo", "dr_grpo", "dapo"))
    level: str = key(choices=("token", "sequence"))
    scale_rewards: str = key(choices=("group", "batch", "none"))
    mask_truncated: bool
    reward: str  # a name in expander/train/rewards.py
    retrieval: Retrieval
    credit: str = key(choices=("completion", "line"))
    penalties: Penalties
    eval_prompts: int = key(minimum=0)
    rollout_batch_size: int = key(minimum=1)


@dataclass
class Lora:
    rank: int = key(minimum=1)
    alpha: float = key(above=0.0)
    dropout: float = key(minimum=0.0, maximum=0.99)
    target_modules: list[str]  # checked against the model, see architectures.select_projections
    modules_to_save: list[str] | None  # keys of TRAINED


@dataclass
class Generation:
    temperature: float = key(above=0.0)
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass
class Tracking:
    to: str | None = key(choices=("trackio", "wandb"))
    project: str | None
    run_name: str | None


@dataclass
class Config:
    """The resolved configuration of one stage.

    It has every key: those of the other stage have that stage's defaults.
    """

    model: Model
    dataset: Dataset
    training: Training
    grpo: Grpo
    lora: Lora
    generation: Generation
    tracking: Tracking
    gguf: bool = False


# Reading a file


def _fields(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """(dotted key, field) of everything in a section, subsections included."""
    for each in dataclasses.fields(section):
        yield f"{prefix}{each.name}", each
        if dataclasses.is_dataclass(each.type):
            yield from _fields(each.type, f"{prefix}{each.name}.")


NAMES = [name for name, _ in _fields(Config)]
KEYS = {name: each for name, each in _fields(Config) if not dataclasses.is_dataclass(each.type)}


def _nearest(dotted: str) -> str:
    """A hint for an unknown key: the nearest name in its section, or else anywhere."""
    section, _, name = dotted.rpartition(".")
    prefix = f"{section}." if section else ""
    below = {k.removeprefix(prefix): k for k in NAMES if k.startswith(prefix)}
    siblings = {leaf: k for leaf, k in below.items() if "." not in leaf}
    anywhere = {k.split(".")[-1]: k for k in NAMES}
    for known in (siblings, anywhere):
        if match := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            return f"did you mean {known[match[0]]}?"
    own = "" if section else "; for a section of anchors, choose a name that begins with x-"
    return f"known keys: {', '.join(siblings)}{own}"


def _kind(hint) -> tuple[type, bool]:
    """The type of a key, and whether the key also takes null."""
    optional = isinstance(hint, types.UnionType)
    return typing.get_args(hint)[0] if optional else hint, optional


def _number(value: object, kind: type) -> int | float:
    """A number, which the reader of YAML leaves as the text that it is."""
    if not isinstance(value, str) or not NUMBER.fullmatch(value):
        raise ValueError
    number = float(value)
    if kind is int and number != int(number):
        raise ValueError
    return kind(number)


def _allowed(kind: type, optional: bool, bounds: Mapping, value: object) -> str:
    """The values that a key takes, in words."""
    if choices := bounds.get("choices"):
        allowed = f"one of {', '.join(choices)}"
    else:
        names = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
        allowed = names.get(kind, "a list of names")
    for name, (sign, _) in BOUNDS.items():
        if name in bounds:
            allowed += f" {sign} {bounds[name]}"
    if optional:
        allowed += " or null"
    if kind in (int, float) and isinstance(value, str) and value[:1].isdigit():
        if not NUMBER.fullmatch(value):
            allowed += "; write it in decimal, without leading zeros, colons or a unit"
        elif float(value) > LARGEST:
            allowed += f"; a number is at most {LARGEST}"
    return allowed


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _checked(value: object, kind: type, bounds: Mapping):
    """`value` as a `kind`; ValueError without a message if it is not one within `bounds`."""
    if kind in (int, float):
        value = _number(value, kind)
        bounds = {"maximum": LARGEST} | dict(bounds)
    elif kind in (bool, str):
        if kind is bool and isinstance(value, str):
            value = BOOLEANS.get(value.lower())
        if not isinstance(value, kind):
            raise ValueError
    else:
        allowed = _is_path if bounds.get("path") else _is_name
        if not isinstance(value, list) or not value or not all(map(allowed, value)):
            raise ValueError
    if bounds.get("choices") and value not in bounds["choices"]:
        raise ValueError
    if not all(within(value, bounds[x]) for x, (_, within) in BOUNDS.items() if x in bounds):
        raise ValueError
    return value


def _typed(value: object, hint, bounds: Mapping):
    """`value` as the type of a key.

    Raises:
        ValueError: the message says why not.
    """
    kind, optional = _kind(hint)
    if optional and value is None:
        return None
    try:
        value = _checked(value, kind, bounds)
    except (ValueError, OverflowError):
        allowed = _allowed(kind, optional, bounds, value)
        raise ValueError(f"{SHORT.repr(value)} is not allowed; it takes {allowed}") from None
    if bounds.get("path"):
        return expand_path(value) if kind is str else list(map(expand_path, value))
    return value


def _read_section(section: type, raw: dict, prefix: str, problems: list[str]) -> dict[str, object]:
    """The typed values of a mapping by dotted key; problems are collected, not raised."""
    fields = {each.name: each for each in dataclasses.fields(section)}
    values = {}
    for name, value in raw.items():
        dotted = f"{prefix}{name}"
        if name not in fields:
            problems.append(f"{dotted}: unknown key; {_nearest(dotted)}")
        elif not dataclasses.is_dataclass(fields[name].type):
            try:
                values[dotted] = _typed(value, fields[name].type, fields[name].metadata)
            except ValueError as error:
                problems.append(f"{dotted}: {error}")
        elif isinstance(value, dict):
            values |= _read_section(fields[name].type, value, f"{dotted}.", problems)
        elif value is not None:
            found = SHORT.repr(value)
            problems.append(f"{dotted}: {found} is not a section (a mapping of keys)")
    return values


def _build(section: type, values: Mapping[str, object], prefix: str = ""):
    """A section from values by dotted key."""
    arguments = {}
    for each in dataclasses.fields(section):
        dotted = f"{prefix}{each.name}"
        if dataclasses.is_dataclass(each.type):
            arguments[each.name] = _build(each.type, values, f"{dotted}.")
        elif dotted in values:
            arguments[each.name] = values[dotted]
    return section(**arguments)


class _Loader(yaml.SafeLoader):
    """Reads YAML's structure; numbers and dates stay text, for the key to decide what they are.

    YAML 1.1 takes 010 for 8, 1:30 for 90, `no` for false and 2e-4 for text. Here only null, true
    and false are not text.
    """

    yaml_implicit_resolvers: typing.ClassVar = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > 10_000:  # merges of merges grow without end
            raise yaml.YAMLError("merge keys (<<) make a mapping of over 10000 keys")


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "merge": r"<<",
}.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None
    )


def _given_twice(node: yaml.Node | None, prefix: str, seen: set[int]) -> Iterator[str]:
    """A sentence for each key that a mapping of the document has twice."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _given_twice(item, prefix, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for name, value in node.value:
        if isinstance(name, yaml.ScalarNode):
            line = name.start_mark.line + 1
            if name.value in first:
                dotted, before = f"{prefix}{name.value}", first[name.value]
                yield f"{dotted} is given twice, on lines {before} and {line}; keep one of them"
            first.setdefault(name.value, line)
            yield from _given_twice(value, f"{prefix}{name.value}.", seen)


def _parse_yaml(text: str) -> object:
    """The value of a YAML document.

    Raises:
        ValueError: it is not valid YAML, or a mapping has a key twice; the message is one line
            for each.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if twice := list(_given_twice(node, "", set())):
                raise ConfigError("\n".join(twice))
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: !!int x
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict:
    try:
        raw = path.read_bytes()
        if error := pointer_error(raw):
            raise ConfigError(f"{path}: {error}")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: config file not found; see configs/ for the defaults") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}: cannot be read: line {line} is not UTF-8; save it as UTF-8"
        ) from None
    try:
        value = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError("\n".join(f"{path}: {x}" for x in str(error).split("\n"))) from None
    if not isinstance(value, dict) or not value:
        found = SHORT.repr(value)
        raise ConfigError(f"{path}: expected sections such as model:, found {found}")
    # As in other tools, a section x-... is a place for anchors.
    return {name: section for name, section in value.items() if not str(name).startswith("x-")}


def _read_set(setting: str) -> dict:
    """'training.epochs=2' as {"training": {"epochs": 2}}.

    The value of a key that takes text is the text, even if YAML would see a comment or list in it.
    """
    dotted, equals, text = setting.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {setting:.80}: expected section.key=value")
    try:
        value = _parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {setting:.80}: {error}") from None
    except ValueError:
        value = text
    known = KEYS.get(dotted.strip())
    takes_text = known is not None and _kind(known.type)[0] is str
    text = text.strip()
    if takes_text and text not in ("", "~", "null") and text[0] not in "'\"":
        value = text
    for name in reversed(names):
        value = {name: value}
    return value


def _given(raw: dict, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a nested mapping, sections included."""
    for name, value in raw.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _given(value, f"{prefix}{name}.")


def _only_other_stage(stage: str, key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OTHER_STAGE[stage])


def _other_defaults(stage: str) -> dict[str, object]:
    """The values of the keys that `stage` does not read, from the other stage's file."""
    [other] = set(STAGES) - {stage}
    values = _read_section(Config, _read_yaml(CONFIGS / f"{other}.yaml"), "", [])
    return {key: value for key, value in values.items() if _only_other_stage(stage, key)}


def _missing(stage: str, values: Mapping[str, object]) -> list[str]:
    """A problem for each key that has no value."""
    [other] = set(STAGES) - {stage}
    return [
        f"{CONFIGS / (other if _only_other_stage(stage, key) else stage)}.yaml: {key}: missing; "
        "this file holds the default of every key"
        for key, each in KEYS.items()
        if key not in values and each.default is dataclasses.MISSING
    ]


def load_config(
    stage: str, path: str | Path | None = None, settings: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """Load the configuration of a stage.

    Args:
        stage: "sft" or "grpo".
        path: a YAML file over configs/{stage}.yaml; None to load only that file.
        settings: "section.key=value" strings, applied in order over the files.

    Returns:
        The typed configuration, and a sentence for each key of the user's that has no effect.

    Raises:
        ConfigError: with every problem of the files and of the settings, one per line.
    """
    assert stage in STAGES
    shipped = CONFIGS / f"{stage}.yaml"
    path = shipped if path is None else Path(path)
    user_layers = [(str(path), _read_yaml(path))]
    user_layers += [(f"--set {setting:.80}", _read_set(setting)) for setting in settings]
    defaults = [] if path.resolve() == shipped else [(str(shipped), _read_yaml(shipped))]

    values, problems = _other_defaults(stage), []
    for origin, raw in defaults + user_layers:
        found: list[str] = []
        values |= _read_section(Config, raw, "", found)
        problems += [f"{origin}: {problem}" for problem in found]
    if values.get("model.load_in_4bit") and values.get("model.load_in_8bit"):
        problems.append(f"{path}: model.load_in_4bit and model.load_in_8bit: choose one")
    if unknown := set(values.get("lora.modules_to_save") or ()) - TRAINED.keys():
        known = " and ".join(TRAINED)
        problems.append(f"{path}: lora.modules_to_save: {min(unknown)!r:.40}; it takes {known}")
    if problems := problems or _missing(stage, values):
        raise ConfigError("\n".join(problems))

    given = {key for _, raw in user_layers for key in _given(raw)}
    reasons = NO_EFFECT | OTHER_STAGE[stage]
    if "tracking.to" not in given:  # a file of the original names a project and no tracker
        reasons |= {"tracking": "no run is tracked unless tracking.to names a tracker"}
    ignored = [f"{name} ({why})" for name, why in reasons.items() if name in given]
    return _build(Config, values), ignored


def same_settings(stage: str, path: Path, config: Config) -> bool:
    """Whether the configuration in a file that `to_yaml` wrote and `config` agree for `stage`.

    Keys that only the other stage reads may differ: they come from the other stage's file, which
    the user may edit in the meantime.

    Raises:
        ConfigError: the file is not a configuration.
    """

    def value(tree: object, key: str) -> object:
        for name in key.split("."):
            tree = tree.get(name) if isinstance(tree, dict) else None
        return tree

    recorded = _read_section(Config, _read_yaml(path), "", [])
    current = dataclasses.asdict(config)
    return all(
        recorded.get(key) == value(current, key)
        for key in KEYS
        if not _only_other_stage(stage, key)
    )


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
