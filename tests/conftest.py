"""Fixtures shared by the tests: tiny models, rows, a loopback Hub, and a way to run a command."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

from expander.prompt import render_lines, render_prompt, render_target, user_message

# On a Mac too, the models of this process run on the CPU, and all in float32: exact tolerances hold.
# QMD_TEST_DTYPE=bfloat16 tests the dtype of a Mac's GPU (dtypes.py). Child processes inherit it.
mx.set_default_device(mx.cpu)
os.environ["QMD_DTYPE"] = os.environ.get("QMD_TEST_DTYPE") or "float32"

ROOT = Path(__file__).parent.parent
MODEL_ID = "Qwen/Qwen3-1.7B"
DATASET_ID = "tobil/qmd-query-expansion-train-v2"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The vectors of tests stay out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Qwen3: tied, 2 layers, about 500 tokens. Read only."""
    return tiny.make_qwen3(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random llama in SmolLM2's layout. Read only."""
    return tiny.make_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def rows() -> Path:
    """24 canonical rows, with /only: variants, an intent and two other languages. Read only."""
    return ROOT / "tests" / "rows.jsonl"


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(["train.py", "sft", "--help"])`: a command of the project in a process of its own.

    `env` is added to the environment. The exit code is for the test to check.
    """

    def run(
        args: Sequence[str | Path],
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        script, *rest = args
        return subprocess.run(
            [sys.executable, ROOT / script, *rest],
            cwd=cwd,
            env=os.environ | dict(env or {}),
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """`script("score_data", path)`: dataset/score_data.py in this process; (exit code, output)."""

    def call(name: str, *args: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        code = importlib.import_module(f"dataset.{name}").main() or 0
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def hub_root(tmp_path: Path, rows: Path) -> Path:
    """What the loopback Hub serves; uploads land in its `uploads/`, requests in `requests.log`."""
    root = tmp_path / "hub"
    # One layer, and completions that end: the default GRPO takes 60 steps.
    small = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 32}
    tiny.end_early(tiny.make_qwen3(root / "models" / MODEL_ID, **small))
    dataset = root / "datasets" / DATASET_ID
    dataset.mkdir(parents=True)
    with (dataset / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in _hub_rows(rows):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return root


@pytest.fixture
def hub(hub_root: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A running loopback Hub; yields the environment that makes a command use it.

    It serves a tiny Qwen3 as Qwen/Qwen3-1.7B, and the rows as the published data set.
    """
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "fake_hub.py", hub_root],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        home = tmp_path / "hf-home"
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{int(server.stdout.readline())}",
            "HF_HOME": str(home),
            # Named one by one: a developer's own settings would win over HF_HOME.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def _hub_rows(rows: Path) -> Iterator[dict]:
    """The rows as the published set has them: each twice, once with `text` null."""
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [
            {"role": "user", "content": user_message(row["query"])},
            {"role": "assistant", "content": render_lines(row["output"])},
        ]
        yield {"text": None, "messages": messages}
        target = render_target(row["output"], final_newline=False)
        yield {"text": f"{render_prompt(row['query'])}{target}\n", "messages": messages}
