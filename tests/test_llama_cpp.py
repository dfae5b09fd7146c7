"""Exported files in a real llama.cpp: the same tokens, the same answers, the prompt QMD makes.

Collected only when npm has installed tests/package.json, as tests/run.sh does where npm is there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from chains import make_chain

import convert
import model as models
from model import read_chain
from prompt import render_prompt, user_message
from qmd import QMD_SYSTEM_PROMPT
from vocabulary import PROBES

HERE = Path(__file__).parent
QUERIES = ("auth config", "flights to Lisbon in May", "日本語 search")
STEPS = 16


def export(folder: Path, output: Path, kind: str = "f16") -> Path:
    arguments = ["convert.py", "--model", str(folder), "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--quantize", kind, "--name", "tiny"])
        convert.main()
    return output / f"tiny-{kind}.gguf"


def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(render_prompt(query), add_special_tokens=False) for query in QUERIES]


def llama_cpp(path: Path, ids: list[list[int]], folder: Path) -> dict:
    """What tests/llama_cpp.mjs finds out about a file."""
    request = {
        "model": str(path),
        "texts": PROBES,
        "prompts": ids,
        "steps": STEPS,
        "query": user_message("auth config"),
    }
    subprocess.run(
        ["node", HERE / "llama_cpp.mjs", folder / "result.json"],
        input=json.dumps(request),
        text=True,
        check=True,
        timeout=120,
        # The fast BLAS is for MLX alone.
        env={key: value for key, value in os.environ.items() if key != "LD_PRELOAD"},
    )
    return json.loads((folder / "result.json").read_text())


def mlx(model, ids: list[int]) -> list[int]:
    """Greedy tokens after a prompt in float32, the whole text read again for each."""
    found = []
    for _ in range(STEPS):
        logits = model(mx.array([ids + found]))[0, -1]
        found.append(logits.argmax().item())
    return found


@pytest.fixture(scope="class", params=["tied", "untied", "llama"])
def exported(request, tmp_path_factory) -> tuple[Path, dict, list[list[int]], Path]:
    """A chain's folder, what llama.cpp says about its F16 file, the prompts, a folder to write in.

    The Qwen3s have the real one's 151,936 rows of vocabulary.
    """
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        base = tiny.make_llama(root / "base")
    else:
        tied = request.param == "tied"
        base = tiny.make_qwen3(root / "base", tied=tied, hidden=32, full_vocab=True)
    folder = make_chain(root, base)
    ids = prompts(models.load_tokenizer(base))
    return folder, llama_cpp(export(folder, root / "gguf"), ids, root), ids, root


class TestLlamaCpp:
    __test__ = (HERE / "node_modules" / "node-llama-cpp").is_dir()

    def test_greedy_answers_are_those_of_mlx(self, exported):
        folder, found, ids, _ = exported
        model, _ = models.load_chain(read_chain(str(folder)), fuse_last=True)
        assert found["greedy"] == [mlx(model, prompt) for prompt in ids]

    def test_without_the_last_adapter_they_differ(self, exported):
        """The test above can fail: the SFT model alone, and the base alone, answer otherwise."""
        folder, found, ids, _ = exported
        for name in (folder / "sft", read_chain(str(folder)).path):
            model, _ = models.load_chain(read_chain(str(name)), fuse_last=True)
            answers = [mlx(model, prompt) for prompt in ids]
            same = sum(
                a == b
                for answer, other in zip(answers, found["greedy"], strict=True)
                for a, b in zip(answer, other, strict=True)
            )
            assert same < len(ids) * STEPS / 2

    def test_tokens_are_those_of_the_base(self, exported):
        folder, found, _, _ = exported
        tokenizer = models.load_tokenizer(read_chain(str(folder)).path)
        for text, tokens in zip(PROBES, found["tokens"], strict=True):
            assert tokens == tokenizer.encode(text, add_special_tokens=False), text

    def test_the_prompt_qmd_makes(self, exported):
        """The trained frame with QMD's system turn: no BOS in front, no think block."""
        _, found, _, _ = exported
        assert found["wrapper"] == "JinjaTemplate"
        assert found["chat"] == render_prompt("auth config", QMD_SYSTEM_PROMPT)

    @pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
    def test_quantised_files_load_and_answer(self, tmp_path, kind):
        """Random weights do not survive 4 bits word for word; the first token mostly does."""
        base = tiny.make_qwen3(
            tmp_path / "base", hidden=256, layers=4, heads=2, kv_heads=1, ffn=256
        )
        ids = prompts(models.load_tokenizer(base))
        found = llama_cpp(export(base, tmp_path / "gguf", kind), ids, tmp_path)
        model = models.load_base(base)
        same = [
            answer[0] == mlx(model, prompt)[0]
            for answer, prompt in zip(found["greedy"], ids, strict=True)
        ]
        assert sum(same) >= 2
