"""expander/config.py: defaults, types and bounds, error messages, files of the original project."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from expander import config as configuration
from expander.architectures import PROJECTIONS
from expander.config import (
    CONFIGS,
    KEYS,
    NO_EFFECT,
    ConfigError,
    load_config,
    same_settings,
    to_yaml,
)

# Keys that only one stage reads. The other stage's file leaves them out.
SFT_ONLY = {
    "model.base",
    "model.load_in_4bit",
    "model.load_in_8bit",
    "dataset.final_newline",
    "training.max_length",
    "training.eval_rows",
    "training.gradient_checkpointing",
}
GRPO_ONLY = {"model.sft", "generation.temperature"}

# The original's two files, and the other keys that it knew.
ORIGINAL_SFT = """
model:
  base: "Qwen/Qwen3-1.7B"
  output: "someone/expander-sft"
  push_to_hub: false
  trust_remote_code: true
  torch_dtype: bfloat16
  load_in_4bit: false
  load_in_8bit: false
dataset:
  name: "tobil/qmd-query-expansion-train-v2"
  text_field: "text"
  split: "train"
  eval_split: 0.1
  max_samples: null
training:
  epochs: 5
  batch_size: 4
  gradient_accumulation_steps: 4
  learning_rate: 2e-4
  max_length: 512
  warmup_ratio: 0.03
  lr_scheduler: "cosine"
  save_interval_minutes: 30
  save_steps: 200
  save_total_limit: 3
  save_strategy: "steps"
  eval_steps: 200
  ddp_find_unused_parameters: false
lora:
  rank: 16
  alpha: 32
  dropout: 0.0
  target_modules:
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
gguf: true
tracking:
  project: "expander"
  run_name: "sft {day} {time}"
"""
ORIGINAL_GRPO = """
model:
  base: "Qwen/Qwen3-1.7B"
  sft: "someone/expander-sft"
  output: "someone/expander-grpo"
dataset:
  name: "tobil/qmd-query-expansion-train-v2"
  prompt_field: "messages"
  max_samples: 1000
training:
  epochs: 1
  max_steps: 200
  batch_size: 2
  gradient_accumulation_steps: 8
  learning_rate: 5e-7
  max_grad_norm: 0.5
grpo:
  num_generations: 4
  max_completion_length: 200
  beta: 0.04
lora:
  rank: 4
  alpha: 8
  dropout: 0.05
  target_modules: ["q_proj", "v_proj"]
generation:
  temperature: 1.0
  top_k: 20
  top_p: 0.8
  repetition_penalty: 1.05
tracking:
  project: "expander"
  run_name: "grpo {day} {time}"
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(stage: str, path: Path, settings=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(stage, path, settings)
    return str(caught.value).splitlines()


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    """Dotted key → value of everything in a nested mapping that is not a mapping."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_keys_left_out_have_the_shipped_values(stage, tmp_path):
    shipped, ignored = load_config(stage)
    almost_empty, _ = load_config(stage, write(tmp_path, "model: {}"))
    assert shipped == almost_empty
    assert ignored == []


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_shipped_file_has_every_key_of_its_stage_with_a_comment(stage):
    text = (CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8")
    grpo_only = GRPO_ONLY | {key for key in KEYS if key.startswith("grpo.")}
    other = grpo_only if stage == "sft" else SFT_ONLY
    assert set(leaves(yaml.safe_load(text))) == KEYS.keys() - NO_EFFECT.keys() - other
    for line in text.splitlines():
        if re.match(r"\s+\w+:", line):
            assert re.search(r"\s#\s\w.{5,}", line), f"no comment: {line}"


def test_only_keys_without_effect_have_a_default_in_the_code():
    defaults = {name for name, each in KEYS.items() if each.default is not dataclasses.MISSING}
    assert defaults == NO_EFFECT.keys()
    assert all(each.default_factory is dataclasses.MISSING for each in KEYS.values())


def test_the_other_stages_file_supplies_only_the_keys_that_the_stage_does_not_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(configuration, "CONFIGS", tmp_path)
    for stage in ("sft", "grpo"):
        text = (CONFIGS / f"{stage}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{stage}.yaml").write_text(text, encoding="utf-8")
    grpo = tmp_path / "grpo.yaml"
    text = grpo.read_text(encoding="utf-8").replace("beta: 0.02", "beta: 0.5")
    grpo.write_text(text.replace("seed: 42", "seed: 7"), encoding="utf-8")
    config, _ = load_config("sft")
    assert (config.grpo.beta, config.training.seed) == (0.5, 42)

    sft = tmp_path / "sft.yaml"
    text = sft.read_text(encoding="utf-8")
    sft.write_text(re.sub(r"  (epochs|seed): .*\n", "", text), encoding="utf-8")
    found = problems("sft", write(tmp_path, "training: {seed: 1}"))
    assert [line.partition("; ")[0] for line in found] == [f"{sft}: training.epochs: missing"]


def test_the_values_of_sft_are_the_originals():
    sft, _ = load_config("sft")
    assert sft.model.base == "Qwen/Qwen3-1.7B"
    assert sft.dataset.name == "tobil/qmd-query-expansion-train-v2"
    assert (sft.dataset.eval_split, sft.training.epochs) == (0.1, 5)
    assert (sft.training.batch_size, sft.training.gradient_accumulation_steps) == (4, 4)
    assert (sft.training.learning_rate, sft.training.warmup_ratio) == (2e-4, 0.03)
    assert (sft.training.lr_scheduler, sft.training.max_length) == ("cosine", 512)
    assert (sft.training.max_grad_norm, sft.training.weight_decay) == (1.0, 0.0)
    assert (sft.training.save_interval_minutes, sft.training.save_total_limit) == (30, 3)
    assert (sft.lora.rank, sft.lora.alpha, sft.lora.dropout) == (16, 32, 0)
    assert len(sft.lora.target_modules) == 7


def test_the_grpo_file_names_the_originals_value_where_it_differs():
    original = leaves(yaml.safe_load(ORIGINAL_GRPO))
    shipped = leaves(dataclasses.asdict(load_config("grpo")[0]))
    lines = (CONFIGS / "grpo.yaml").read_text(encoding="utf-8").splitlines()
    read = [k for k in original if k.partition(".")[0] in ("training", "grpo", "lora")]
    differing = {
        k for k in read if str(shipped[k]) != str(original[k]) and shipped[k] != original[k]
    }
    assert len(differing) >= 5
    for key in read:
        [place] = [i for i, x in enumerate(lines) if x.startswith(f"  {key.split('.')[1]}:")]
        # In the key's own comment: on its line or, if that line is full, on the next.
        own = lines[place : place + 1] + [x for x in lines[place + 1 : place + 2] if x[2:3] == " "]
        assert ("original: " in " ".join(own)) == (key in differing), key


@pytest.mark.parametrize(("stage", "text"), [("sft", ORIGINAL_SFT), ("grpo", ORIGINAL_GRPO)])
def test_a_file_of_the_original_loads_unchanged(stage, text, tmp_path):
    config, ignored = load_config(stage, write(tmp_path, text))
    given = leaves(yaml.safe_load(text))
    resolved = leaves(dataclasses.asdict(config))
    given["training.learning_rate"] = float(given["training.learning_rate"])  # "2e-4" in YAML 1.1
    assert {key: resolved[key] for key in given} == given
    named = {sentence.split(" (")[0] for sentence in ignored}
    top_level = {key.partition(".")[0] for key in given} & set(NO_EFFECT)
    assert named >= (set(given) & set(NO_EFFECT)) | top_level
    assert all(re.fullmatch(r"[\w.]+ \(.+\)", sentence) for sentence in ignored)


def test_a_number_that_yaml_reads_as_a_string_is_a_number(tmp_path):
    assert isinstance(yaml.safe_load("2e-4"), str)
    path = write(tmp_path, "training: {learning_rate: 2e-4, epochs: '3', max_steps: 1e2}")
    training = load_config("sft", path)[0].training
    assert training.learning_rate == 0.0002
    assert (training.epochs, type(training.epochs)) == (3.0, float)
    assert (training.max_steps, type(training.max_steps)) == (100, int)


def test_all_problems_are_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        model: {bose: x}
        training: {learning_rte: 1, epochs: many, batch_size: 2.5, seed: true, max_grad_norm: -1}
        lora: {rank: 0, target_modules: q_proj, dropout: .nan}
        grpo: 7
        """,
    )
    found = problems("sft", path, ["training.lr_scheduler=cosin", "lora.ranc=4"])
    expected = [  # key, value, and what is allowed or the nearest key
        ("model.bose", "unknown key", "did you mean model.base?"),
        ("training.learning_rte", "unknown key", "did you mean training.learning_rate?"),
        ("training.epochs", "'many'", "a number > 0.0"),
        ("training.batch_size", "2.5", "an integer >= 1"),
        ("training.seed", "True", "an integer >= 0"),
        ("training.max_grad_norm", "-1", ">= 0.0"),
        ("lora.rank", "0", "an integer >= 1"),
        ("lora.target_modules", "'q_proj'", "a list of names"),
        ("lora.dropout", "nan", "a number >= 0.0 <= 0.99"),
        ("grpo", "7", "not a section"),
        ("training.lr_scheduler", "'cosin'", "cosine, linear, constant"),
        ("lora.ranc", "unknown key", "did you mean lora.rank?"),
    ]
    assert len(found) == len(expected)
    for line, (key, value, allowed) in zip(found, expected, strict=True):
        assert f"{key}: " in line and value in line and allowed in line
    assert all(line.startswith(f"{path}: ") for line in found[:10])
    assert found[10].startswith("--set training.lr_scheduler=cosin: ")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("trainig: {}", "did you mean training?"),
        ("model: {rank: 4}", "did you mean lora.rank?"),
        ("learning_rate: 1", "did you mean training.learning_rate?"),
        ("lora: {zzz: 4}", "known keys: rank, alpha, dropout, target_modules"),
        ("model: {7: 4}", "known keys: base, output"),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_key(text, hint, tmp_path):
    [line] = problems("sft", write(tmp_path, text))
    assert "unknown key" in line and hint in line


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training: {seed: 4294967296}", "training.seed"),  # MLX and NumPy take no larger one
        (f"training: {{max_steps: 1{'0' * 400}}}", "training.max_steps"),  # beyond a float
        ("training: {epochs: .inf}", "training.epochs"),
        ("training: {epochs: null}", "training.epochs"),
        ("training: {save_interval_minutes: 0}", "training.save_interval_minutes"),
        ("dataset: {eval_split: 0.6}", "dataset.eval_split"),
        ("dataset: {max_samples: 0}", "dataset.max_samples"),
        ("training: {max_steps: 0}", "training.max_steps"),  # not set, or no step at all?
        ("training: {max_steps: -2}", "training.max_steps"),
        ("training: {epochs: 1e999}", "training.epochs"),
        ("training: {batch_size: 1000000000000000000000000000000}", "training.batch_size"),
        ("training: {epochs: 1e30}", "training.epochs"),
        ("training: {batch_size: 010}", "training.batch_size"),  # 8 in YAML 1.1, 10 in YAML 1.2
        ("training: {batch_size: 0o10}", "training.batch_size"),
        ("training: {batch_size: 0x10}", "training.batch_size"),
        ("training: {save_interval_minutes: 1:30}", "training.save_interval_minutes"),
        ("training: {save_interval_minutes: 30min}", "training.save_interval_minutes"),
        ("training: {epochs: ３}", "training.epochs"),
        ("model: {load_in_4bit: maybe}", "model.load_in_4bit"),
        ("model: {output: null}", "model.output"),
        ("model: {load_in_4bit: 1}", "model.load_in_4bit"),
        ("lora: {target_modules: q_proj}", "lora.target_modules"),
        ("lora: {target_modules: []}", "lora.target_modules"),
        ("lora: {target_modules: [1]}", "lora.target_modules"),
        ("grpo: {loss_type: ppo}", "grpo.loss_type"),
    ],
)
def test_a_value_out_of_bounds_is_refused(text, key, tmp_path):
    [line] = problems("sft", write(tmp_path, text))
    assert f"{key}: " in line and "is not allowed; it takes " in line


def test_null_is_listed_where_it_is_allowed(tmp_path):
    [line] = problems("sft", write(tmp_path, "training: {patience: no}"))
    assert line.endswith("it takes an integer >= 1 or null")
    config, _ = load_config("sft", write(tmp_path, "training: {save_interval_minutes: null}"))
    assert config.training.save_interval_minutes is None


def test_4_bits_and_8_bits_together_are_an_error(tmp_path):
    [line] = problems("sft", write(tmp_path, "model: {load_in_4bit: true, load_in_8bit: true}"))
    assert "choose one" in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected sections"),
        ("# nothing but a comment\n", "expected sections"),
        ("- a\n- list\n", "expected sections"),
        ("just text", "expected sections"),
        ("model: [unclosed", "not valid YAML"),
        ("model:\n\tbase: tab", "not valid YAML"),
        ("model: {base: !!int x}", "not valid YAML"),
        ("model: {base: a\0b}", "not valid YAML"),
        ("model: {base: a}\n---\nmodel: {base: b}", "not valid YAML"),
        ("model: {base: *nothing}", "not valid YAML"),
        ("&a [*a]", "expected sections"),
        ("[\n" * 5000, "not valid YAML: nested too deeply"),
        ("- " * 5000, "not valid YAML: nested too deeply"),
        ("model: {base: a}".encode("utf-16"), "line 1 is not UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model: {base: \xe9}".encode("latin-1"), "cannot be read"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_reported_in_one_line(text, reason, tmp_path):
    path = write(tmp_path, text)
    [line] = problems("sft", path)
    assert line.startswith(f"{path}: ") and reason in line and len(line) < 300


def test_a_key_given_twice_is_reported_with_both_lines(tmp_path):
    text = "training:\n  epochs: 1\n  epochs: 2\nmodel:\n  base: a/b\n\ntraining:\n  seed: 3\n"
    path = write(tmp_path, text)
    first, second = problems("sft", path)
    assert first.startswith(f"{path}: training.epochs is given twice, on lines 2 and 3")
    assert second.startswith(f"{path}: training is given twice, on lines 1 and 7")
    path = write(tmp_path, "grpo:\n  penalties: {empty: 1, 'empty': 2}\n")
    assert "grpo.penalties.empty is given twice, on lines 2 and 2" in problems("grpo", path)[0]
    found = problems("grpo", None, ["grpo.penalties={empty: 1, empty: 2}"])
    assert "--set grpo.penalties=" in found[0] and "empty is given twice" in found[0]


def test_anchors_and_merge_keys_work_from_a_section_of_the_users_own(tmp_path):
    text = "x-small: &small {rank: 4, alpha: 8}\nlora: {<<: *small, alpha: 16}\n"
    config, ignored = load_config("sft", write(tmp_path, text))
    assert (config.lora.rank, config.lora.alpha) == (4, 16) and ignored == []
    [line] = problems("sft", write(tmp_path, ".anchors: &small {rank: 4}\nlora: {<<: *small}\n"))
    assert "anchors: unknown key" in line and "x-" in line


def test_a_mapping_that_refers_to_itself_or_grows_without_end_is_refused(tmp_path):
    assert "is not allowed" in problems("sft", write(tmp_path, "model: &m {base: *m}"))[0]
    levels = "".join(f"x-{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 30))
    [line] = problems("sft", write(tmp_path, f"x-0: &b0 [a]\n{levels}model: {{base: *b29}}"))
    assert "model.base: " in line and len(line) < 500
    merges = "".join(
        f"x-{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 30)
    )
    [line] = problems("sft", write(tmp_path, f"x-0: &m0 {{a: 1, b: 2}}\n{merges}"))
    assert "not valid YAML: merge keys" in line


def test_a_text_is_what_the_file_has_even_if_yaml_would_see_something_else(tmp_path):
    for text in ("2026-01-01", "010", "1:30", "no", "on", "2e-4", "0x10", "a#b"):
        config, _ = load_config("sft", write(tmp_path, f"tracking: {{run_name: {text}}}"))
        assert config.tracking.run_name == text
        again, _ = load_config("sft", write(tmp_path, to_yaml(config)))
        assert again == config


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("Off", False), ("TRUE", True)])
def test_a_switch_takes_the_words_of_yaml(text, value, tmp_path):
    path = write(tmp_path, f"model: {{load_in_4bit: {text}}}")
    assert load_config("sft", path)[0].model.load_in_4bit is value


@pytest.mark.parametrize("value", ["-1", "null", "~"])
def test_max_steps_can_be_not_set(value):
    config, _ = load_config("grpo", None, [f"training.max_steps={value}"])
    assert config.training.max_steps in (-1, None)


def test_home_and_environment_variables_in_paths_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUN", "b c")
    path = write(tmp_path, "model: {output: '${HOME}/runs/$RUN', base: ~/models/x, sft: ~}")
    assert "model.sft: None is not allowed" in problems("sft", path)[0]
    path = write(tmp_path, "model: {output: '${HOME}/runs/$RUN', base: ~/models/x}")
    config, _ = load_config("sft", path, ["dataset.name=$HOME/**/*.jsonl", "model.sft=~/sft"])
    assert (config.model.output, config.model.base) == ("/home/me/runs/b c", "/home/me/models/x")
    assert (config.dataset.name, config.model.sft) == ("/home/me/**/*.jsonl", "/home/me/sft")


@pytest.mark.parametrize("key", ["model.base", "model.output", "model.sft", "dataset.name"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("$NO_SUCH/x", "$NO_SUCH is not set"),
        ("${NO_SUCH}", "${NO_SUCH} is not set"),
        ("~nobody-of-that-name/x", "no such user"),
        ("''", "empty"),
        ("' '", "empty"),
        ('"a\\0b"', "control character"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(key, value, reason):
    [line] = problems("sft", None, [f"{key}={value}"])
    assert f"{key}: " in line and reason in line


def test_a_missing_file_and_a_folder_are_reported(tmp_path):
    [line] = problems("sft", tmp_path / "none.yaml")
    assert "none.yaml: " in line and "not found" in line
    [line] = problems("sft", tmp_path)
    assert "cannot be read" in line


def test_a_byte_order_mark_is_ignored(tmp_path):
    config, _ = load_config("sft", write(tmp_path, b"\xef\xbb\xbfmodel: {base: a/b}\r\n"))
    assert config.model.base == "a/b"


def test_settings_are_typed_and_applied_in_order(tmp_path):
    path = write(tmp_path, "training: {epochs: 9, batch_size: 9}\nmodel: {base: file/kept}")
    config, ignored = load_config(
        "sft",
        path,
        [
            "training.epochs=2",
            "training.epochs=0.5",
            "training.learning_rate=1e-3",
            "training.max_steps=null",
            "dataset.final_newline=false",
            "dataset.name=data/*.jsonl",
            "lora.target_modules=[q_proj, v_proj]",
            "model.torch_dtype=float16",
        ],
    )
    assert (config.training.epochs, config.training.batch_size) == (0.5, 9)
    assert config.training.learning_rate == 0.001
    assert config.training.max_steps is None
    assert config.dataset.final_newline is False
    assert config.dataset.name == "data/*.jsonl"
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.model.base == "file/kept"
    assert [sentence.split(" (")[0] for sentence in ignored] == ["model.torch_dtype"]


@pytest.mark.parametrize(
    "text",
    [
        "*.jsonl",
        "a #b.jsonl",
        "a#b.jsonl",
        "[ab]",
        "{a: b}",
        "a: b",
        "# a",
        "true",
        "012",
        "!x",
        "&a",
    ],
)
def test_the_value_of_a_setting_that_takes_text_is_the_text(text):
    assert load_config("sft", None, [f"dataset.name={text}"])[0].dataset.name == text


@pytest.mark.parametrize("setting", ["training.epochs", "=3", "training.=3", ""])
def test_a_setting_without_key_or_value_is_refused(setting):
    with pytest.raises(ConfigError, match=r"^--set .*expected section.key=value"):
        load_config("sft", None, [setting])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_to_yaml_reads_back_to_an_equal_config(stage, tmp_path):
    config, _ = load_config(
        stage,
        None,
        ["training.learning_rate=3e-5", "training.patience=2", "dataset.name='données/*.jsonl'"],
    )
    again, _ = load_config(stage, write(tmp_path, to_yaml(config)))
    assert again == config
    assert to_yaml(again) == to_yaml(config)


def test_changing_a_configuration_does_not_change_the_defaults(tmp_path):
    path = write(tmp_path, "model: {}")
    load_config("grpo", path)[0].lora.target_modules.append("k_proj")
    assert load_config("grpo", path)[0].lora.target_modules == list(PROJECTIONS)


def test_settings_are_the_same_if_every_key_of_the_stage_is(tmp_path):
    path = write(tmp_path, to_yaml(load_config("sft")[0]))
    for settings, same in (
        ([], True),
        (["grpo.penalties.empty=0.9", "model.sft=elsewhere", "generation.temperature=0.5"], True),
        (["training.seed=1"], False),
        (["lora.target_modules=[q_proj]"], False),
    ):
        assert same_settings("sft", path, load_config("sft", None, settings)[0]) == same
        assert not same_settings("grpo", path, load_config("grpo")[0])
