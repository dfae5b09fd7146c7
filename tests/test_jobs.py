"""The jobs as the Hub runs them: a single file in an empty folder, here with a local Hub, on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

import pytest
from clone import QUERIES, ROOT, make_clone

JOBS = ("sft", "grpo", "eval")
REPO = "tester/expander"


def header(job: str) -> dict:
    """The PEP 723 metadata of a job."""
    text = (ROOT / "jobs" / f"{job}.py").read_text(encoding="utf-8")
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+)# ///\n", text)
    return tomllib.loads("".join(line[2:] or "\n" for line in block[1].splitlines(keepends=True)))


def pins(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith(("#", "-r", "mlx=="))}


@pytest.mark.parametrize("job", JOBS)
def test_the_header_has_the_pins_of_the_project_with_mlx_for_cuda(job):
    wanted = {
        "mlx[cuda12]" + pin.partition("]")[2].split(";")[0] if pin.startswith("mlx[cpu]") else pin
        for pin in pins("requirements.txt")
    }
    assert set(header(job)["dependencies"]) == wanted
    assert header(job)["requires-python"] == ">=3.11"


@pytest.fixture
def code(hub_root: Path, hub: dict[str, str], tmp_path: Path) -> str:
    """The address of an archive of the project, in GitHub's layout."""
    folder = hub_root / "models" / "tester" / "code"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "code.tar.gz", "w:gz") as archive:
        archive.add(make_clone(tmp_path / "clone"), "project-0123456")
    return f"{hub['HF_ENDPOINT']}/tester/code/resolve/0123456/code.tar.gz"


def start(job: str, root: Path, *options: str, env: dict[str, str]):
    """Run a job's file in an empty folder, as the Hub does."""
    folder = Path(tempfile.mkdtemp(dir=root))
    shutil.copy(ROOT / "jobs" / f"{job}.py", folder)
    # Share the kernels that MLX compiled for other tests: they take a minute.
    kernels = Path(tempfile.gettempdir(), "mlx")
    kernels.mkdir(exist_ok=True)
    (folder / "mlx").symlink_to(kernels)
    return subprocess.run(
        [sys.executable, f"{job}.py", *options],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_jobs_train_publish_continue_and_evaluate(code, hub, hub_root, tmp_path):
    env = hub | {"CODE": code}
    steps = ("--set", "training.max_steps=2", "--set", "dataset.eval_split=0.1")
    done = start("sft", tmp_path, REPO, *steps, env=env)
    assert done.returncode == 0, done.stderr
    published = hub_root / "models" / REPO
    adapters = (published / "adapters" / "adapters.safetensors").read_bytes()
    evaluation = json.loads((published / "evaluation.json").read_text())
    assert evaluation["summary"]["queries"] == QUERIES
    assert list((hub_root / "models" / f"{REPO}-gguf").glob("*.gguf"))

    # An equal model is refused, with the figures in the log.
    done = start("grpo", tmp_path, REPO, *steps, "--set", "grpo.eval_prompts=0", env=env)
    assert "GRPO from outputs/published/adapters" in done.stdout, done.stderr
    assert done.returncode == 2 and "not shown to be better than the published model" in done.stderr
    assert (published / "adapters" / "adapters.safetensors").read_bytes() == adapters

    # The evaluation job publishes nothing.
    commits = (hub_root / "requests.log").read_text().count("/commit/")
    done = start("eval", tmp_path, REPO, "--max-queries", "3", "--verbose", env=env)
    assert done.returncode == 0, done.stderr
    assert "outputs/published/adapters" in done.stdout
    assert commits and (hub_root / "requests.log").read_text().count("/commit/") == commits


def test_user_errors_print_one_line_and_stop_the_job(code, hub, tmp_path):
    for address in ("", "main", f"{hub['HF_ENDPOINT']}/tester/code/resolve/0123456/other.tar.gz"):
        done = start("sft", tmp_path, REPO, env=hub | {"CODE": address})
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ") and "CODE" in done.stderr
    # After a failed command, nothing is evaluated or published.
    env = hub | {"CODE": code}
    done = start("sft", tmp_path, REPO, "--set", "training.epoch=1", env=env)
    assert done.returncode == 2 and "did you mean training.epochs?" in done.stderr
    assert "eval.py" not in done.stdout
    done = start("eval", tmp_path, "tester/nobodys", env=env)
    assert done.returncode != 0 and "eval.py" not in done.stdout
    assert "hf_loopback" not in done.stdout + done.stderr


def test_the_originals_options_are_understood():
    from jobs.steps import modern

    assert modern(["sft", "--upload-repo", REPO, "--sft-only"]) == ["sft", REPO]
    assert modern(["sft", REPO, "--set", "a.b=1"]) == ["sft", REPO, "--set", "a.b=1"]
    assert modern(["eval", REPO, "--sft-only"]) == ["eval", REPO, "--sft-only"]
    assert modern(["sft", "--upload-repo"]) == ["sft", "--upload-repo"]
    assert modern([]) == []
