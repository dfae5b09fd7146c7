"""uv: its pins are those of requirements.txt, its lock is public, and `uv run` runs every command."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
COMMANDS = (
    "uv run train.py sft --dry-run --set dataset.name='data/*.jsonl' --set model.base=base",
    "uv run eval.py --help",
    "uv run convert.py --help",
    "uv run reward.py",
    "uv run dataset/prepare_data.py",
)


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line.replace('"', "'") for line in lines if line and not line.startswith(("#", "-r"))]


def test_pyproject_has_the_pins_of_the_requirements_files():
    assert PROJECT["project"]["dependencies"] == requirements("requirements.txt")
    assert PROJECT["dependency-groups"]["dev"] == requirements("requirements-dev.txt")


def test_the_lock_is_up_to_date():
    """What `uv lock --check` compares, without the network."""
    locked = {package["name"]: package for package in LOCK["package"]}
    root = locked[PROJECT["project"]["name"]]["metadata"]
    for pins, specifiers in (
        (PROJECT["project"]["dependencies"], root["requires-dist"]),
        (PROJECT["dependency-groups"]["dev"], root["requires-dev"]["dev"]),
    ):
        versions = {re.split(r"[\[=;]", pin)[0].replace("_", "-"): pin for pin in pins}
        assert versions.keys() == {entry["name"] for entry in specifiers}
        for name, pin in versions.items():
            version = re.search(r"==([^;]+)", pin)[1]
            assert locked[name]["version"] == version
            assert all(x["specifier"] == f"=={version}" for x in specifiers if x["name"] == name)
    wanted = PROJECT["project"]["requires-python"].split(",")
    assert sorted(LOCK["requires-python"].split(", ")) == sorted(wanted)


def test_the_lock_names_only_public_addresses_and_hashes_every_file():
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    hosts = set(re.findall(r"\w+://[^/\"]*", text))
    assert hosts == {"https://pypi.org", "https://files.pythonhosted.org"}
    for package in LOCK["package"]:
        assert package["source"] in ({"registry": "https://pypi.org/simple"}, {"virtual": "."})
        for file in [*package.get("wheels", []), *filter(None, [package.get("sdist")])]:
            assert file["url"].startswith("https://files.pythonhosted.org/packages/")
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"])


def test_the_lock_has_mlx_for_both_systems_and_no_torch():
    locked = {package["name"]: package for package in LOCK["package"]}
    assert not [name for name in locked if re.match(r"torch|nvidia|triton", name)]
    assert any("macosx" in x["url"] and "arm64" in x["url"] for x in locked["mlx-metal"]["wheels"])
    assert any("linux" in wheel["url"] for wheel in locked["mlx-cpu"]["wheels"])


@pytest.mark.skipif(not UV, reason="uv is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_uv_runs_the_command(command, tiny_qwen3, tmp_path):
    for path in (*ROOT.glob("*.py"), ROOT / "configs", ROOT / "dataset", ROOT / "evals"):
        (tmp_path / path.name).symlink_to(path)
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "tests" / "rows.jsonl", tmp_path / "data")
    (tmp_path / "base").symlink_to(tiny_qwen3)
    # As printed, in the environment of this test: a second one would be gigabytes to download.
    env = {
        "UV_PROJECT_ENVIRONMENT": sys.prefix,
        "UV_NO_SYNC": "1",
        "UV_FROZEN": "1",
        "UV_OFFLINE": "1",
        "UV_NO_CONFIG": "1",
    }
    done = subprocess.run(
        [UV, *shlex.split(command)[1:]],
        cwd=tmp_path,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "prepare_data" not in command or (tmp_path / "data" / "train" / "train.jsonl").is_file()


def test_the_documentation_shows_these_commands():
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    shown = {line.split("  #")[0].strip() for line in text.splitlines() if "uv run" in line}
    scripts = {shlex.split(command)[2] for command in COMMANDS}
    assert scripts <= {shlex.split(line)[2] for line in shown if line.startswith("uv run")}
