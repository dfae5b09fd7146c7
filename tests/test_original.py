"""Files and command lines of the original project, as its users have them, and docs/original.md."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from documents import ROOT
from test_docs import parse  # noqa: F401, a fixture

from expander.config import KEYS, ConfigError, load_config

PAGE = (ROOT / "docs" / "original.md").read_text(encoding="utf-8")
SEVEN = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
TRAINING = """epochs: 5, batch_size: 4, gradient_accumulation_steps: 4, learning_rate: 2e-4,
            max_length: 512, warmup_ratio: 0.03, lr_scheduler: "cosine\""""
# Keys and values are the original's; the layout is not.
FILES = {
    "configs/sft.yaml": f"""
model: {{base: "Qwen/Qwen3-1.7B", output: "outputs/sft"}}
dataset: {{name: "data/train/", text_field: "text", split: "train", eval_split: 0.1}}
training: {{{TRAINING}, save_interval_minutes: 30, save_steps: 200, save_total_limit: 3}}
lora: {{rank: 16, alpha: 32, dropout: 0.0, target_modules: {SEVEN}}}
tracking: {{project: "qmd-query-expansion", run_name: "sft-1.7B"}}
""",
    "configs/sft_local.yaml": f"""
model: {{base: "Qwen/Qwen3-1.7B", output: "outputs/sft", push_to_hub: false}}
dataset: {{name: "data/train", text_field: "text", split: "train", eval_split: 0.1}}
training: {{epochs: 5, batch_size: 2, gradient_accumulation_steps: 4, learning_rate: 0.0002,
           max_length: 512, warmup_ratio: 0.03, lr_scheduler: "cosine",
           ddp_find_unused_parameters: false, save_interval_minutes: 30, save_steps: 200}}
lora: {{rank: 16, alpha: 32, dropout: 0.05, target_modules: {SEVEN}}}
tracking: {{project: "qmd-query-expansion", run_name: "{{day}} {{time}}"}}
""",
    "configs/sft_v4.yaml": f"""
model: {{base: "Qwen/Qwen3-0.6B", output: "tobil/qmd-query-expansion-0.6B-v4"}}
dataset: {{name: "tobil/qmd-query-expansion-train-v2", text_field: "text", split: "train",
          eval_split: 0.1}}
training: {{epochs: 3, batch_size: 4, gradient_accumulation_steps: 4, learning_rate: 2e-4,
           max_length: 512, warmup_ratio: 0.03, lr_scheduler: "cosine"}}
lora: {{rank: 16, alpha: 32, dropout: 0.0, target_modules: {SEVEN}}}
tracking: {{project: "qmd-query-expansion", run_name: "sft-v4-key-term-preservation"}}
""",
    "configs/sft-lfm2.yaml": f"""
model: {{base: "LiquidAI/LFM2.5-1.2B-Instruct", output: "outputs/sft-lfm2", trust_remote_code: true}}
dataset: {{name: "data/train-lfm2/", text_field: "text", split: "train", eval_split: 0.1}}
training: {{{TRAINING}}}
lora: {{rank: 16, alpha: 32, dropout: 0.0,
       target_modules: ["conv.in_proj", "conv.out_proj", "q_proj", "k_proj", "v_proj", "out_proj",
                        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]}}
generation: {{temperature: 0.1, top_k: 50, top_p: 0.1, repetition_penalty: 1.05}}
gguf: false
tracking: {{project: "qmd-query-expansion", run_name: "sft-lfm2-1.2B"}}
""",
    "experiments/lfm2/sft_lfm2.yaml": f"""
model: {{base: "LiquidAI/LFM2-1.2B", output: "outputs/sft-lfm2"}}
dataset: {{name: "data/train/", text_field: "text", split: "train", eval_split: 0.1}}
training: {{{TRAINING}}}
lora: {{rank: 16, alpha: 32, dropout: 0.0,
       target_modules: [q_proj, k_proj, v_proj, out_proj, in_proj, w1, w2, w3]}}
tracking: {{project: "qmd-query-expansion", run_name: "sft-lfm2-1.2B"}}
generation: {{temperature: 0.3, min_p: 0.15, repetition_penalty: 1.05}}
""",
    "experiments/grpo/grpo.yaml": """
model: {base: "Qwen/Qwen3-1.7B", sft: "outputs/sft", output: "outputs/grpo", push_to_hub: false,
        torch_dtype: "bfloat16", load_in_4bit: false, load_in_8bit: false}
dataset: {name: "data/train/", prompt_field: "messages", max_samples: 1000}
training: {epochs: 1, batch_size: 2, gradient_accumulation_steps: 8, learning_rate: 0.0000005,
           max_grad_norm: 0.5, max_steps: 200, save_interval_minutes: 30, save_steps: 50}
grpo: {num_generations: 4, max_completion_length: 200, beta: 0.04}
lora: {rank: 4, alpha: 8, dropout: 0.05, target_modules: ["q_proj", "v_proj"]}
tracking: {project: "qmd-query-expansion", run_name: "grpo-1.7B"}
""",
    "configs/grpo_v4.yaml": """
model: {sft: "tobil/qmd-query-expansion-0.6B-v4", base: "Qwen/Qwen3-0.6B",
        output: "tobil/qmd-query-expansion-0.6B-v4-grpo"}
dataset: {name: "tobil/qmd-query-expansion-train-v2", prompt_field: "messages", max_samples: 2000}
training: {epochs: 1, batch_size: 2, gradient_accumulation_steps: 8, learning_rate: 1e-6,
           max_grad_norm: 0.5}
grpo: {num_generations: 4, max_completion_length: 200}
lora: {rank: 4, alpha: 8, dropout: 0.05, target_modules: ["q_proj", "v_proj"]}
tracking: {project: "qmd-query-expansion", run_name: "grpo-v4-key-term-preservation"}
""",
}

# What a user types from habit, and the script that it is here.
COMMANDS = [
    "train.py sft --config configs/sft.yaml --dry-run",
    "train.py grpo --config configs/grpo.yaml",
    "eval.py ./outputs/sft --queries evals/queries.txt --max-new-tokens 400 --batch-size 2 "
    "--max-queries 0 --max-time 0 -o scores.json -v",
    "eval.py --model tobil/qmd-query-expansion-1.7B-grpo --base-model Qwen/Qwen3-1.7B "
    "--sft-model tobil/qmd-query-expansion-1.7B-sft --max-tokens 200 --summary-only --verbose",
    "eval.py --score-only evals/results_old.jsonl --output scores.json",
    "eval_retrieval.py ./outputs/sft --golden data/qmd_expansion_v3_structured.jsonl --threshold 0.5 "
    "--sample 100 --seed 42 --max-new-tokens 400 --show-mismatches -v",
    "eval_retrieval.py ./outputs/sft --golden data/qmd_expansion_v2.jsonl --type-thresholds --sample 0",
    "convert_gguf.py --size 1.7B --no-upload",
    "convert_gguf.py --size 4B --skip-quantize",
    "convert_gguf.py --base Qwen/Qwen3-1.7B --sft tobil/qmd-query-expansion-1.7B-sft "
    "--grpo tobil/qmd-query-expansion-1.7B-grpo --output tobil/qmd-query-expansion-1.7B-gguf",
    "dataset/prepare_data.py --input data/*.jsonl --output data/train --split 0.1 --seed 42",
    "dataset/analyze_data.py --input data/qmd_expansion_v3_structured.jsonl --show-examples 0",
    "dataset/generate_only_variants.py data/a.jsonl data/b.jsonl --combine --stats -o only.jsonl",
    "dataset/score_data.py",
    "dataset/validate_schema.py",
    "jobs/steps.py sft --sft-only --upload-repo OWNER/NAME",
]
RENAMED = {"eval_retrieval.py": "eval.py", "convert_gguf.py": "convert.py"}
LEFT_OUT = (
    "convert_onnx.py",
    "benchmark.py",
    "gepa",
    "train_unsloth.py",
    "accelerate_multi_gpu.yaml",
)


def section(title: str) -> str:
    return PAGE.partition(f"## {title}")[2].partition("\n## ")[0]


def leaves(tree: dict, prefix: str = "") -> set[str]:
    """The dotted keys of a configuration's values."""
    return {
        leaf
        for name, value in tree.items()
        for leaf in (
            leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
        )
    }


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_file_of_the_original_loads(name, tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(FILES[name], encoding="utf-8")
    try:
        config, ignored = load_config("grpo" if "grpo" in name else "sft", path)
    except ConfigError as error:
        # LFM2's layers have names of their own; a model that has none of them is another error.
        assert "lfm2" in name and "\n" not in str(error) and "lora.target_modules" in str(error)
        return
    given = yaml.safe_load(FILES[name])
    assert config.lora.alpha == given["lora"]["alpha"]
    assert config.training.learning_rate == float(given["training"]["learning_rate"])
    assert config.model.output == given["model"]["output"]
    named = " ".join(ignored)
    for key in leaves(given) & {"generation.min_p", "model.trust_remote_code", "gguf"}:
        assert key in named


def test_min_p_loads_and_is_named_as_without_effect(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("generation: {min_p: 0.15}", encoding="utf-8")
    config, ignored = load_config("grpo", path)
    assert config.generation.min_p == 0.15
    assert any(line.startswith("generation.min_p (") for line in ignored)


def test_the_page_says_what_became_of_every_key():
    listed = set(re.findall(r"`([a-z_.0-9]+)`", section("Configuration files")))
    keys = set().union(*(leaves(yaml.safe_load(text)) for text in FILES.values()))
    assert len(keys) > 35 and keys <= listed
    rows = re.findall(r"^\| (`.+?) \|", section("Configuration files"), re.MULTILINE)
    named = {key for row in rows for key in re.findall(r"`([^`]+)`", row)}
    assert named <= set(KEYS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_of_the_original_is_understood(command, parse, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    script, *arguments = shlex.split(command)
    module = RENAMED.get(script, script).removesuffix(".py").replace("/", ".")
    parse(module, arguments)
    assert Path(script).name in PAGE or module == "jobs.steps"


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_in_the_table_with_a_reason(name):
    [row] = [line for line in section("Left out").splitlines() if name in line]
    _, original, why, instead, _ = (cell.strip() for cell in row.split("|"))
    assert name in original and len(why) > 10 and "`" in instead
