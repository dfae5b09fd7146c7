"""Exported files in a real llama.cpp: equal tokens, equal greedy answers, and QMD's prompt.

Collected only if tests/package.json is installed, which tests/run.sh does if npm is available.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import tiny
from chains import make_chain
from mlx.utils import tree_flatten

import convert
from expander import model as models
from expander.convert import formats
from expander.convert.gguf_tokenizer import PROBES
from expander.files import save_arrays
from expander.model import read_chain
from expander.prompt import encode_prompt, render_prompt, user_message
from expander.qmd import QMD_SYSTEM_PROMPT

HERE = Path(__file__).parent
QUERIES = ("auth config", "flights to Lisbon in May", "日本語 search")
# Each ends, end token included, within STEPS tokens.
ANSWERS = ("lex: auth\n<|im_end|>", "vec: flights to Lisbon\n<|im_end|>", "lex: 日本\n<|im_end|>")
STEPS = 16


def export(folder: Path, output: Path, *kinds: str) -> list[Path]:
    """Run convert.py in this process; returns the GGUF files."""
    command = ["convert.py", "--model", folder, "--output", output, "--name", "tiny", "--quantize"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*map(str, command), *kinds])
        convert.main()
    return [output / f"tiny-{kind}.gguf" for kind in kinds]


def prompts(tokenizer) -> list[list[int]]:
    return [encode_prompt(tokenizer, query) for query in QUERIES]


def llama_cpp(
    paths: list[Path], ids: list[list[int]], folder: Path, query: str | None = None
) -> list[dict]:
    """The results of tests/llama_cpp.mjs for each file."""
    request = {
        "models": [str(path) for path in paths],
        "texts": PROBES,
        "prompts": ids,
        "steps": STEPS,
        "query": query,
    }
    subprocess.run(
        ["node", HERE / "llama_cpp.mjs", folder / "result.json"],
        input=json.dumps(request),
        text=True,
        check=True,
        timeout=120,
        # The fast BLAS is only for MLX.
        env={key: value for key, value in os.environ.items() if key != "LD_PRELOAD"},
    )
    return json.loads((folder / "result.json").read_text())


def mlx(model, ids: list[int]) -> list[int]:
    """Greedy tokens after a prompt in float32, computed without a cache."""
    found = []
    for _ in range(STEPS):
        logits = model(mx.array([ids + found]))[0, -1]
        found.append(logits.argmax().item())
    return found


def surprise(model, ids: list[list[int]], answers: list[list[int]]) -> float:
    """How far below MLX's best logit llama.cpp's choices are, at most, in standard deviations."""
    worst = 0.0
    for prompt, answer in zip(ids, answers, strict=True):
        logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]  # (T, V)
        chosen = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
        gaps = (logits.max(axis=-1) - chosen) / mx.std(logits, axis=-1)
        worst = max(worst, gaps.max().item())
    return worst


# "tied" has the 151,936 rows of Qwen3's vocabulary. The seeds are chosen so that in float32, for each
# of the 48 tokens, the two largest logits differ by 0.7 % of the logits' range or more, ten times the
# rounding of F16.
BASES = {
    "tied": lambda folder: tiny.make_qwen3(folder, hidden=32, full_vocab=True, seed=3),
    "untied": lambda folder: tiny.make_qwen3(folder, tied=False, hidden=32, seed=41),
    "llama": lambda folder: tiny.make_llama(folder, seed=4),
    "smollm3": lambda folder: tiny.make_smollm3(folder, seed=312),
    "granite": lambda folder: tiny.make_granite(folder, seed=129),
    "lfm2": lambda folder: tiny.make_lfm2(folder, seed=37),
    "gemma3": lambda folder: tiny.make_gemma3(folder, seed=1),
    "qwen35": lambda folder: tiny.make_qwen35(folder, seed=0),
}
# The layers of the second adapter.
TARGETS = {"lfm2": ("conv.in_proj", "v_proj"), "qwen35": ("in_proj_qkv", "v_proj")}


@pytest.fixture(scope="class", autouse=True)
def loaded_once():
    """Load each tokenizer once: one with 151,669 tokens takes seconds."""
    load_once = functools.cache(models.load_tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_tokenizer", load_once)
        patch.setattr(formats, "load_tokenizer", load_once)
        yield


@pytest.fixture(scope="class", params=BASES)
def exported(request, loaded_once, tmp_path_factory) -> tuple[Path, list[dict], list[list[int]]]:
    """A chain's folder, llama.cpp's results for its F16 and Q4_K_M files, and the prompts."""
    root = tmp_path_factory.mktemp(request.param)
    base = BASES[request.param](root / "base")
    folder = make_chain(root, base, TARGETS.get(request.param, ("q_proj", "v_proj")))
    ids = prompts(models.load_tokenizer(base))
    paths = export(folder, root / "gguf", "f16", "q4_k_m")
    return folder, llama_cpp(paths, ids, root, user_message("auth config")), ids


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"type": "linear", "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}

# What a config.json may hold, and what would be trained if it was overlooked:
# architecture -> name -> (keys that are missing, keys that are changed, keys of the misread model).
VARIANTS = {
    "llama": {
        "rope_parameters": (["rope_theta"], {"rope_parameters": PLAIN}, {"rope_theta": 10000}),
        "linear": ([], {"rope_scaling": LINEAR}, {"rope_scaling": None}),
        "yarn": ([], {"rope_scaling": YARN}, {"rope_scaling": None}),
        "llama3": ([], {"rope_parameters": LLAMA3}, {"rope_parameters": None}),
        "untied": (["tie_word_embeddings"], {}, {"tie_word_embeddings": True}),
        "biases": ([], {}, {}),
    },
    "smollm3": {
        "rope_parameters": (["rope_theta"], {"rope_parameters": PLAIN}, {"rope_theta": 5000000}),
        "linear": ([], {"rope_parameters": LINEAR}, {"rope_parameters": None}),
        "yarn": ([], {"rope_scaling": YARN}, {"rope_scaling": None}),
        "untied": (["tie_word_embeddings"], {}, {"tie_word_embeddings": True}),
    },
    "granite": {
        "rope_parameters": (["rope_theta"], {"rope_parameters": PLAIN}, {"rope_theta": 10000000}),
        "linear": ([], {"rope_parameters": LINEAR}, {"rope_parameters": None}),
        "yarn": ([], {"rope_scaling": YARN}, {"rope_scaling": None}),
        "untied": (["tie_word_embeddings"], {}, {"tie_word_embeddings": True}),
        "embeddings": ([], {"embedding_multiplier": 12}, {"embedding_multiplier": 1}),
        "attention": (["attention_multiplier"], {}, {"attention_multiplier": 0.25}),
        "residual": (["residual_multiplier"], {}, {"residual_multiplier": 0.2}),
        "biases": ([], {}, {}),
    },
    "qwen2": {
        "rope_parameters": (["rope_theta"], {"rope_parameters": PLAIN}, {"rope_theta": 1000000}),
        "linear": ([], {"rope_parameters": LINEAR}, {"rope_parameters": None}),
        "yarn": ([], {"rope_scaling": YARN}, {"rope_scaling": None}),
        "untied": (["tie_word_embeddings"], {}, {"tie_word_embeddings": True}),
    },
    "qwen3": {
        "rope_parameters": (["rope_theta"], {"rope_parameters": PLAIN}, {"rope_theta": 1000000}),
        "linear": ([], {"rope_scaling": LINEAR}, {"rope_scaling": None}),
        "yarn": ([], {"rope_parameters": YARN}, {"rope_parameters": None}),
        "untied": (["tie_word_embeddings"], {}, {"tie_word_embeddings": True}),
    },
}


def make_variant(folder: Path, kind: str, name: str) -> Path:
    make = {
        "llama": tiny.make_llama,
        "smollm3": tiny.make_smollm3,
        "granite": tiny.make_granite,
        "qwen2": tiny.make_qwen2,
        "qwen3": tiny.make_qwen3,
    }[kind]
    make(folder, tied=name != "untied", seed=5)
    if name == "biases":
        tiny.add_biases(folder)
    missing, changes, _ = VARIANTS[kind][name]
    return tiny.configure(folder, *missing, **changes)


def misread(folder: Path, kind: str, name: str) -> nn.Module:
    """The model of a folder from `make_variant` if the variant's keys were overlooked."""
    tiny.configure(folder, **{"rope_parameters": None} | VARIANTS[kind][name][2])
    if name == "untied":
        weights = dict(mx.load(str(folder / "model.safetensors")))
        del weights["lm_head.weight"]
        save_arrays(folder / "model.safetensors", weights)
    return models.load_base(folder)


@pytest.fixture(scope="class")
def trained(loaded_once, tmp_path_factory) -> Path:
    """A Qwen3 with rows of 256 values, as K-quants need, trained to answer each query."""
    folder = tiny.make_qwen3(
        tmp_path_factory.mktemp("trained") / "base", hidden=256, heads=4, kv_heads=2, ffn=256
    )
    model, tokenizer = models.load_base(folder), models.load_tokenizer(folder)
    rows = [
        prompt + tokenizer.encode(answer, add_special_tokens=False)
        for prompt, answer in zip(prompts(tokenizer), ANSWERS, strict=True)
    ]

    def loss(model: nn.Module) -> mx.array:
        return sum(
            nn.losses.cross_entropy(model(mx.array([row[:-1]]))[0], mx.array(row[1:])).mean()
            for row in rows
        )

    model.unfreeze()
    optimizer, value_and_grad = optim.Adam(2e-3), nn.value_and_grad(model, loss)
    for _ in range(60):
        value, gradient = value_and_grad(model)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, value)
    save_arrays(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    return folder


class TestLlamaCpp:
    __test__ = (HERE / "node_modules" / "node-llama-cpp").is_dir()

    def test_greedy_answers_equal_mlxs(self, exported):
        folder, (found, _), ids = exported
        model, _ = models.load_chain(read_chain(str(folder)), fuse_last=True)
        assert found["greedy"] == [mlx(model, prompt) for prompt in ids]

    def test_probabilities_equal_mlxs(self, exported):
        """A factor of the logits changes no greedy token."""
        folder, (found, _), ids = exported
        model, _ = models.load_chain(read_chain(str(folder)), fuse_last=True)
        for prompt, answer, confidence in zip(
            ids, found["greedy"], found["confidence"], strict=True
        ):
            logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]  # (T, V)
            chosen = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
            logps = chosen - mx.logsumexp(logits, axis=-1)
            assert mx.allclose(logps, mx.log(mx.array(confidence)), rtol=0, atol=0.05)

    def test_without_the_last_adapter_they_differ(self, exported):
        """The test above would fail for a file of the SFT model."""
        folder, (found, _), ids = exported
        model, _ = models.load_chain(read_chain(str(folder / "sft")), fuse_last=True)
        same = [
            ours == theirs
            for prompt, answer in zip(ids, found["greedy"], strict=True)
            for ours, theirs in zip(mlx(model, prompt), answer, strict=True)
        ]
        assert sum(same) < len(same) / 2

    def test_tokens_equal_the_base_models(self, exported):
        folder, (found, _), _ = exported
        tokenizer = models.load_tokenizer(read_chain(str(folder)).path)
        for text, tokens in zip(PROBES, found["tokens"], strict=True):
            assert tokens == tokenizer.encode(text, add_special_tokens=False), text

    def test_the_prompt_in_qmd(self, exported):
        """The trained frame with QMD's system turn, no other BOS and no think block."""
        folder, (found, _), _ = exported
        frame = read_chain(str(folder)).frame()
        assert found["wrapper"] == "JinjaTemplate"
        assert found["chat"] == render_prompt("auth config", QMD_SYSTEM_PROMPT, frame=frame)

    def test_the_q4_k_m_file_answers_much_like_it(self, exported):
        """At least a third of its tokens are what the unquantised model would choose in MLX; by chance
        it would be one in 500."""
        folder, (_, found), ids = exported
        model, _ = models.load_chain(read_chain(str(folder)), fuse_last=True)
        same = []
        for prompt, answer in zip(ids, found["greedy"], strict=True):
            logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1]  # (T, V)
            same += (logits.argmax(axis=-1) == mx.array(answer)).tolist()
        assert sum(same) > len(same) / 3

    def test_every_type_keeps_the_trained_answers(self, trained, tmp_path):
        tokenizer = models.load_tokenizer(trained)
        kinds = ("f32", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
        paths = export(trained, tmp_path, *kinds)
        results = llama_cpp(paths, prompts(tokenizer), tmp_path)
        for kind, found in zip(kinds, results, strict=True):
            for tokens, answer in zip(found["greedy"], ANSWERS, strict=True):
                assert tokenizer.decode(tokens).startswith(answer), kind

    @pytest.mark.parametrize("kind", VARIANTS)
    def test_every_form_of_a_configuration_is_read_alike(self, kind, tmp_path):
        """llama.cpp rounds keys and values to F16, so it may choose the second of two near ties."""
        bases = {name: make_variant(tmp_path / name, kind, name) for name in VARIANTS[kind]}
        ids = prompts(models.load_tokenizer(bases["linear"]))[:1]
        paths = [export(base, base / "gguf", "f32")[0] for base in bases.values()]
        results = llama_cpp(paths, ids, tmp_path)
        for (name, base), found in zip(bases.items(), results, strict=True):
            right = surprise(models.load_base(base), ids, found["greedy"])
            wrong = surprise(misread(base, kind, name), ids, found["greedy"])
            print(name, right, wrong)
            assert right < 0.02, name
            assert name == "biases" or wrong > 0.5, name
