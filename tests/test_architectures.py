"""Every architecture beside Qwen3 and llama: batches, gradients, memory, LoRA's targets, frames.

What they export is compared with llama.cpp in test_llama_cpp.py.
"""

import subprocess
import sys
from pathlib import Path

import jinja2
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from expander import model as models
from expander.architectures import (
    ARCHITECTURES,
    GRANITE_FACTORS,
    PROJECTIONS,
    select_projections,
)
from expander.config import load_config
from expander.decode import Sampler, generate
from expander.model import ModelError
from expander.prompt import encode_prompt, frame_of, render_prompt, user_message
from expander.qmd import QMD_SYSTEM_PROMPT
from expander.rows import parse_row
from expander.train.batches import Row, collate
from expander.train.logps import completion_logps
from expander.train.memory import Shape, estimate
from expander.train.sft import completion_loss, validate

ROOT = Path(__file__).parent.parent
MAKE = {
    "smollm3": tiny.make_smollm3,
    "granite": tiny.make_granite,
    "lfm2": tiny.make_lfm2,
    "gemma3": tiny.make_gemma3,
    "qwen35": tiny.make_qwen35,
}
QUERIES = ["tls", "rotate nginx logs", "sourdough starter smells like acetone", "Lisbon tram 28"]
LIMIT = 16


@pytest.fixture(scope="module", params=MAKE)
def folder(request, tmp_path_factory) -> Path:
    return MAKE[request.param](tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def loaded(folder) -> tuple:
    """A model with LoRA layers that do something, its tokenizer, and prompts of unequal lengths."""
    model, tokenizer = models.load_base(folder), models.load_tokenizer(folder)
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, PROJECTIONS))
    mx.random.seed(0)
    fresh = [
        (n, mx.random.normal(v.shape, scale=0.1)) for n, v in models.adapter_weights(model).items()
    ]
    model.load_weights(fresh, strict=False)
    prompts = [encode_prompt(tokenizer, query) for query in QUERIES]
    assert len(set(map(len, prompts))) == len(prompts)
    return model, tokenizer, prompts


def own_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> mx.array:
    """The log-probabilities of a completion from the model's own forward pass, (T,)."""
    logits = model(mx.array([prompt + completion]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(completion)[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


def gradient(model: nn.Module, loss) -> np.ndarray:
    model.train()
    _, grads = nn.value_and_grad(model, loss)(model)
    model.eval()
    return np.concatenate([np.array(g).ravel() for _, g in sorted(tree_flatten(grads))])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_completions_do_not_depend_on_the_batch(batch_size, loaded):
    """They equal those of mlx-lm's own generator, one prompt at a time."""
    model, _, prompts = loaded
    expected = [
        [token for token, _ in generate_step(mx.array(p), model, max_tokens=LIMIT)] for p in prompts
    ]
    end = expected[0][LIMIT // 2]  # rows end at different times, and others take their place
    expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
    found = generate(model, prompts * 2, max_tokens=LIMIT, end=end, batch_size=batch_size)
    assert [completion.tokens for completion in found] == expected * 2


def test_log_probabilities_and_gradients_equal_those_of_single_rows(loaded):
    """Prompts are padded on the left, completions on the right, and prompts are shared."""
    model, _, prompts = loaded
    rng = np.random.default_rng(0)
    prompts = [*prompts, prompts[0]]
    completions = [rng.integers(20, 300, n).tolist() for n in (9, 1, 14, 5, 12)]
    found, _, _ = completion_logps(model, prompts, completions, 1.0)
    for row, prompt, completion in zip(found, prompts, completions, strict=True):
        expected = own_logps(model, prompt, completion)
        assert mx.allclose(row[: len(completion)], expected, rtol=0, atol=2e-4)

    def together(model):
        return completion_logps(model, prompts, completions, 1.0)[0].sum()

    def one_by_one(model):
        return sum(own_logps(model, p, c).sum() for p, c in zip(prompts, completions, strict=True))

    ours, expected = gradient(model, together), gradient(model, one_by_one)
    assert np.abs(expected).max() > 0
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_sft_loss_and_gradient_equal_those_of_single_rows(loaded):
    model, _, prompts = loaded
    rng = np.random.default_rng(1)
    rows = [
        Row(p + rng.integers(20, 300, n).tolist(), len(p), "")
        for p, n in zip(prompts, (9, 3, 14, 5), strict=True)
    ]
    total = float(sum(row.targets for row in rows))

    def together(model):
        return completion_loss(model, *collate(rows))[0]

    def one_by_one(model):
        logps = [own_logps(model, row.ids[: row.start], row.ids[row.start :]) for row in rows]
        return -sum(x.sum() for x in logps) / total

    ours, expected = gradient(model, together), gradient(model, one_by_one)
    assert together(model).item() == pytest.approx(one_by_one(model).item(), rel=1e-5)
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
    assert validate(model, rows, 2)[0] == pytest.approx(together(model).item(), rel=1e-5)


def test_a_sampler_reads_the_models_own_logits(loaded):
    """Temperature and penalties depend on their scale, the greedy choice does not."""
    model, _, prompts = loaded
    seen = []

    class Recorder(Sampler):
        def __call__(self, logits, state):
            seen.append(logits[0])
            return super().__call__(logits, state)

    (completion,) = generate(model, prompts[:1], max_tokens=4, end=-1, sampler=Recorder())
    logits = model(mx.array([prompts[0] + completion.tokens]))[0, len(prompts[0]) - 1 :]
    for found, expected in zip(seen[:4], logits, strict=False):
        assert mx.allclose(found, expected, rtol=0, atol=1e-4 * mx.abs(expected).max().item())


def test_the_memory_estimate_counts_its_matrices_and_adapter(folder):
    model, config = models.load_base(folder), models.model_config(folder)
    shape = Shape.of(config)
    matrices = [p.size for _, p in tree_flatten(model.parameters()) if p.ndim == 2]
    assert shape.parameters() == sum(matrices)
    for targets in (PROJECTIONS, ["q_proj", "v_proj"]):
        fresh = models.load_base(folder)
        models.add_lora(fresh, models.lora_config(fresh, 4, 8.0, 0.0, targets))
        trainable = sum(a.size for a in models.adapter_weights(fresh).values())
        assert shape.adapter(4, targets) == trainable
    settings, _ = load_config("sft")
    plain = estimate("sft", settings, shape, 128, width=2)
    settings.training.gradient_checkpointing = True
    assert estimate("sft", settings, shape, 128, width=2).activations < plain.activations


def test_the_default_targets_are_all_linear_layers(folder):
    model = models.load_base(folder)
    keys = models.lora_config(model, 4, 8.0, 0.0, PROJECTIONS)["lora_parameters"]["keys"]
    assert keys == sorted(ARCHITECTURES[model.model_type].projections(models.model_config(folder)))


def test_the_file_and_ollama_frame_a_chat_as_the_prompt_does(folder):
    tokenizer = models.load_tokenizer(folder)
    frame = frame_of(tokenizer)
    assert frame is ARCHITECTURES[models.model_config(folder)["model_type"]].frame
    jinja = jinja2.Environment().from_string(frame.jinja())
    plain = [{"role": "user", "content": user_message("tls", instruction=frame.instruction)}]
    assert jinja.render(messages=plain, add_generation_prompt=True) == render_prompt(
        "tls", frame=frame
    )
    system = {"role": "system", "content": QMD_SYSTEM_PROMPT}
    asked = [system, {"role": "user", "content": user_message("tls")}]
    prompt = render_prompt("tls", QMD_SYSTEM_PROMPT, frame=frame)
    assert jinja.render(messages=asked, add_generation_prompt=True) == prompt
    chat = [*asked, {"role": "assistant", "content": "lex: tls\n"}]
    assert jinja.render(messages=chat) == f"{prompt}lex: tls\n{frame.end}"
    assert tokenizer.decode(encode_prompt(tokenizer, "tls", QMD_SYSTEM_PROMPT)) == prompt


def command(*args: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_train_it_and_decode_as_qmd_does(folder, rows, tmp_path):
    if models.model_config(folder)["model_type"] == "qwen3_5":
        pytest.skip("without a GPU, compiling its recurrence token by token takes minutes")
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    common = [f"dataset.name={rows}", "training.max_steps=2"]

    def sets(*settings: str) -> list[str]:
        return [part for setting in settings for part in ("--set", setting)]

    options = [*common, f"model.base={folder}", f"model.output={sft}", "training.eval_steps=2"]
    command("train.py", "sft", *sets(*options))
    options = [*common, f"model.sft={sft}", f"model.output={grpo}", "grpo.eval_prompts=0"]
    short = ("grpo.max_completion_length=6", "training.gradient_accumulation_steps=4")
    command("train.py", "grpo", *sets(*options, *short))
    queries = tmp_path / "queries.txt"
    queries.write_text("auth config\nflights to Lisbon\n")
    result = ("eval.py", "--model", grpo, "--queries", queries, "--max-new-tokens", "8")
    assert "auth config" in command(*result, "--decode", "qmd", "-v")


# LoRA's targets

LFM2_YAML = """
model: {base: LiquidAI/LFM2.5-1.2B-Instruct, output: outputs/sft-lfm2}
lora:
  rank: 16
  alpha: 32
  dropout: 0.0
  target_modules:
    [conv.in_proj, conv.out_proj, q_proj, k_proj, v_proj, out_proj,
     feed_forward.w1, feed_forward.w2, feed_forward.w3]
generation: {temperature: 0.3, min_p: 0.15, repetition_penalty: 1.05}
"""


def test_the_originals_targets_of_lfm2_are_all_of_its_maps(tmp_path):
    path = tmp_path / "sft_lfm2.yaml"
    path.write_text(LFM2_YAML)
    config, notes = load_config("sft", path)
    folder = tiny.make_lfm2(tmp_path / "base")
    model = models.load_base(folder)
    chosen = models.lora_config(model, 4, 8.0, 0.0, config.lora.target_modules)
    default = models.lora_config(model, 4, 8.0, 0.0, PROJECTIONS)
    assert chosen == default
    assert any("min_p" in str(note) for note in notes)


def test_a_target_matches_whole_parts_of_a_name():
    names = ["self_attn.out_proj", "conv.out_proj", "feed_forward.w1"]
    assert select_projections(names, ["conv.out_proj"]) == ["conv.out_proj"]
    assert select_projections(names, ["out_proj"]) == ["conv.out_proj", "self_attn.out_proj"]
    with pytest.raises(ValueError, match=r"no layer o_proj, proj; it has conv.out_proj, feed_"):
        select_projections(names, ["proj", "w1", "o_proj"])


def test_an_unknown_target_is_reported_before_anything_is_loaded(tmp_path):
    folder = tiny.make_lfm2(tmp_path / "base")
    settings = ("--set", f"model.base={folder}", "--set", "lora.target_modules=[gate_proj]")
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            "sft",
            "--dry-run",
            *settings,
            "--set",
            "dataset.name=data/*.jsonl",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no layer gate_proj; it has conv.in_proj" in done.stderr


# LFM2's settings and rows


def test_a_row_of_the_originals_lfm2_data():
    text = (
        "<|startoftext|><|im_start|>user\nExpand this search query: git rebase<|im_end|>\n"
        "<|im_start|>assistant\nlex: git rebase -i\nvec: how to rebase\nhyde: Run it.<|im_end|>\n"
    )
    row = parse_row({"text": text})
    assert row.query == "git rebase"
    assert row.lines == (("hyde", "Run it."), ("lex", "git rebase -i"), ("vec", "how to rebase"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["conv"] * 4, "full_attn_idxs": None}, "layer_types"),
        ({"conv_bias": True}, "conv_bias"),
        ({"tie_embedding": False}, "tie_embedding"),
        ({"block_dim": 32}, "block_dim"),
        ({"conv_L_cache": 0}, "conv_L_cache"),
        ({"norm_eps": None, "block_norm_eps": None}, "rms_norm_eps"),
        ({"block_multiple_of": 0}, "block_multiple_of"),
        ({"block_ff_dim": 96}, "intermediate_size is 64"),
    ],
)
def test_settings_of_lfm2_that_are_not_computed_alike(changes, message, tmp_path):
    folder = tiny.configure(tiny.make_lfm2(tmp_path / "base"), **changes)
    with pytest.raises(ModelError, match=message):
        models.model_config(folder)


# SmolLM3's layers without RoPE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1] * 5}, "no_rope_layers"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
        ({"no_rope_layers": None, "no_rope_layer_interval": 3}, "no_rope_layer_interval 3"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": None, "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, "layer_types: sliding"),
    ],
)
def test_settings_of_smollm3_that_are_not_computed_alike(changes, message, tmp_path):
    folder = tiny.configure(tiny.make_smollm3(tmp_path / "base"), **changes)
    with pytest.raises(ModelError, match=message):
        models.model_config(folder)


def test_without_the_keys_every_fourth_layer_of_smollm3_has_no_rope(tmp_path):
    tokens = mx.array([[5, 100, 5, 200, 7]])
    folder = tiny.make_smollm3(tmp_path / "base")
    expected = models.load_base(folder)(tokens)
    for missing, changes in (
        (["no_rope_layers"], {}),
        (["no_rope_layer_interval"], {"no_rope_layers": None}),
        ([], {"no_rope_layers": [True, True, True, False, True]}),
    ):
        tiny.configure(folder, *missing, **changes)
        assert mx.array_equal(models.load_base(folder)(tokens), expected)


# Granite's factors


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_of_granite_divides_its_logits(tied, tmp_path):
    model = models.load_base(tiny.make_granite(tmp_path / "base", tied=tied))
    modules = ["embed_tokens", "lm_head"]
    models.add_lora(model, models.lora_config(model, 4, 8.0, 0.0, PROJECTIONS, modules))
    prompt, completion = [5, 100, 200], [17, 300, 45]

    def ours(model):
        return completion_logps(model, [prompt], [completion], 1.0)[0].sum()

    def own(model):
        return own_logps(model, prompt, completion).sum()

    assert ours(model).item() == pytest.approx(own(model).item(), rel=1e-5)
    found, expected = gradient(model, ours), gradient(model, own)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits_scaling": 0}, "logits_scaling is 0, expected a number above 0"),
        ({"embedding_multiplier": "12"}, "embedding_multiplier is '12'"),
        ({"attention_multiplier": -0.5}, "attention_multiplier is -0.5"),
        ({"residual_multiplier": True}, "residual_multiplier is True"),
        ({"mlp_bias": 1}, "mlp_bias is 1"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not supported"),
    ],
)
def test_settings_of_granite_that_are_not_computed_alike(changes, message, tmp_path):
    folder = tiny.configure(tiny.make_granite(tmp_path / "base"), **changes)
    with pytest.raises(ModelError, match=message):
        models.model_config(folder)


def test_transformers_defaults_of_granite(tmp_path):
    """mlx-lm needs keys that transformers may leave out."""
    folder = tiny.make_granite(tmp_path / "base")
    tokens = mx.array([[5, 100, 5, 200, 7]])
    tiny.configure(folder, **dict.fromkeys(GRANITE_FACTORS, 1.0))
    expected = models.load_base(folder)(tokens)
    missing = (*GRANITE_FACTORS[:2], "attention_bias")
    tiny.configure(folder, *missing, residual_multiplier=None, logits_scaling=1, mlp_bias=None)
    assert mx.array_equal(models.load_base(folder)(tokens), expected)
