"""The fixtures: the tiny models run, and the Hub's own clients work with the local Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import tiny
from mlx_lm.generate import generate_step
from tokenizers import Tokenizer


def python(code: str, env: dict[str, str]) -> str:
    """Run `code` in a new process: the Hub's clients read `env` when they are imported."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["tiny_qwen3", "tiny_llama"])
def test_a_tiny_model_loads_and_generates(name, request):
    model, tokenizer = mlx_lm.load(str(request.getfixturevalue(name)))
    text = "<|im_start|>user\nCafé 2024, 東京\n<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in tokenizer.eos_token_ids

    tokens = [token for token, _ in generate_step(mx.array(ids), model, max_tokens=16)]
    # A model that repeats one token would hide a wrong forward pass.
    assert len(set(tokens)) > 8


def test_the_llama_tokenizer_splits_off_digits(tiny_llama):
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("25 degrees")]
    assert pieces == ["2", "5", "Ġdegrees"]


def test_the_full_vocabulary_has_the_real_ids(tmp_path):
    folder = tiny.make_qwen3(tmp_path, full_vocab=True, hidden=32, layers=1, ffn=32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>", "</think>")]
    assert ids == [151643, 151645, 151668]
    assert tokenizer.get_vocab_size() == 151669
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 151936


def test_tiny_models_are_identical_in_every_process(tmp_path, tiny_qwen3):
    python(
        f"import tiny, pathlib; tiny.make_qwen3(pathlib.Path({str(tmp_path)!r})); print()",
        {"PYTHONPATH": str(Path(__file__).parent), "RAYON_NUM_THREADS": "1"},
    )
    for file in tiny_qwen3.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_hub_serves_the_data_set(hub, rows):
    code = """
import datasets, json
d = datasets.load_dataset("tobil/qmd-query-expansion-train-v2", split="train")
print(json.dumps([d.column_names, len(d), d[0]["text"], d[0]["messages"] == d[1]["messages"]]))
"""
    columns, count, text, same = json.loads(python(code, hub))
    assert set(columns) == {"text", "messages"}
    assert count == 2 * len(rows.read_text(encoding="utf-8").splitlines())
    assert text is None and same


def test_the_hub_serves_the_model(hub, hub_root):
    code = 'import huggingface_hub as h; print(h.snapshot_download("Qwen/Qwen3-1.7B"))'
    folder = python(code, hub)
    for file in (hub_root / "models" / "Qwen" / "Qwen3-1.7B").iterdir():
        assert (Path(folder) / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_hub_stores_uploads(hub, hub_root, tiny_qwen3):
    code = f"""
import huggingface_hub as h
h.create_repo("tester/expander", private=True)
print(h.upload_folder(repo_id="tester/expander", folder_path={str(tiny_qwen3)!r}))
"""
    python(code, hub)
    for file in tiny_qwen3.iterdir():
        uploaded = hub_root / "uploads" / "models" / "tester" / "expander" / file.name
        assert uploaded.read_bytes() == file.read_bytes(), file.name
