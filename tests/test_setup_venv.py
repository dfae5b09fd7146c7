"""examples/setup_venv.sh with stand-ins for the Pythons of a machine: nothing is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL = f"{sys.base_prefix}/bin/python3.{sys.version_info.minor}"
# A Python that reports a version, and that creates environments without pip, which is quick.
FAKE = """#!/bin/sh
if [ "$1" = -c ]; then
    exec {real} -c 'import sys; sys.version_info = {version}; exec(sys.argv[1])' "$2"
fi
{real} -m venv --without-pip "$3"
echo {name} >"$3/made_by"
"""
# A working environment as uv creates it, without pip; it logs what it installs.
LOGGING = """#!/bin/sh
case "$*" in
-c*) ;;
"-m pip --version") [ -e has_pip ] ;;
"-m uv "*) echo uv >>calls; [ ! -e no_uv ] ;;
*) echo "$*" >>calls; : >has_pip; ! read -r line <requirements.txt || [ "$line" != "# fails" ] ;;
esac
"""


class Machine:
    """A project folder, and a PATH with nothing but the given Pythons and a few tools."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder / "project", folder / "bin"
        self.venv = self.folder / ".venv"
        self.bin.mkdir()
        shutil.copytree(ROOT / "examples", self.folder / "examples")
        (self.folder / "requirements.txt").write_text("# nothing\n")
        for tool in ("bash", "cat", "cmp", "ls", "rm"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def fake(self, path: Path, version: tuple[int, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE.format(real=REAL, version=version, name=path.name))
        path.chmod(0o755)

    def add_python(self, name: str, version: tuple[int, int]) -> None:
        self.fake(self.bin / name, version)

    def bash(self, function: str) -> subprocess.CompletedProcess[str]:
        script = (
            f"set -euo pipefail; . examples/setup_venv.sh; python=$PWD/.venv/bin/python; {function}"
        )
        return subprocess.run(
            [self.bin / "bash", "-c", script],
            cwd=self.folder,
            env={"PATH": str(self.bin)},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def made_by(self) -> str:
        return (self.venv / "made_by").read_text().strip()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_python_with_wheels_is_chosen(machine):
    for name, version in (
        ("python3", (3, 9)),  # Xcode's
        ("python3.14", (3, 14)),
        ("python3.12", (3, 12)),
        ("python3.11", (3, 11)),
    ):
        machine.add_python(name, version)
    done = machine.bash("_create_venv")
    assert (done.returncode, done.stdout) == (0, "") and machine.made_by == "python3.12"
    # A working environment stays, whatever else is installed later.
    machine.add_python("python3.13", (3, 13))
    assert machine.bash("_create_venv").stdout == "" and machine.made_by == "python3.12"


def test_without_a_suitable_python_nothing_is_created_or_deleted(machine):
    machine.add_python("python3", (3, 9))
    machine.add_python("python3.12", (3, 10))  # a command that is not what its name says
    machine.fake(machine.venv / "bin" / "python", (3, 9))
    (machine.venv / "pyvenv.cfg").touch()
    done = machine.bash("setup_venv requirements.txt")
    assert done.returncode == 1 and (machine.venv / "pyvenv.cfg").exists()
    (line,) = done.stderr.splitlines()
    assert "3.11 or newer" in line and "python@3.12" in line


def old(machine: Machine) -> None:
    machine.fake(machine.venv / "bin" / "python", (3, 9))


def dangling(machine: Machine) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").symlink_to("/opt/homebrew/bin/python3.12.missing")


def other_machine(machine: Machine) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").write_bytes(b"\xcf\xfa\xed\xfe not for this machine")
    (machine.venv / "bin" / "python").chmod(0o755)


def upgraded(machine: Machine) -> None:
    subprocess.run([REAL, "-m", "venv", "--without-pip", machine.venv], check=True)
    (packages,) = (machine.venv / "lib").iterdir()
    packages.rename(packages.with_name("python3.4"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (old, "Python 3.9"),
        (dangling, "does not run"),
        (other_machine, "does not run"),
        (upgraded, "another Python"),
    ],
)
def test_an_environment_that_does_not_work_is_replaced(machine, make, reason):
    make(machine)
    (machine.venv / "pyvenv.cfg").touch()
    machine.add_python("python3.11", (3, 11))
    done = machine.bash("_create_venv")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("replacing .venv") and reason in line and "python3.11" in line
    assert machine.made_by == "python3.11" and not (machine.venv / "lib" / "python3.4").exists()


def test_a_link_is_replaced_without_touching_its_target(machine, tmp_path):
    target = tmp_path / "elsewhere"
    machine.fake(target / "bin" / "python", (3, 9))
    (target / "pyvenv.cfg").touch()
    machine.venv.symlink_to(target)
    machine.add_python("python3.11", (3, 11))
    assert machine.bash("_create_venv").returncode == 0
    assert (target / "pyvenv.cfg").exists() and not machine.venv.is_symlink()


def test_another_folder_of_that_name_is_not_deleted(machine):
    machine.venv.mkdir()
    (machine.venv / "notes.txt").write_text("mine")
    machine.add_python("python3.11", (3, 11))
    done = machine.bash("_create_venv")
    assert done.returncode == 1 and "rename or delete it" in done.stderr
    assert (machine.venv / "notes.txt").read_text() == "mine"


def test_packages_are_installed_once_and_again_after_a_change(machine):
    python = machine.venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(LOGGING)
    python.chmod(0o755)
    assert machine.bash("setup_venv requirements.txt").returncode == 0
    pip = "-m pip install --quiet --disable-pip-version-check"
    calls = machine.folder / "calls"
    assert calls.read_text().splitlines() == ["-m ensurepip", f"{pip} uv", "uv"]

    assert machine.bash("setup_venv requirements.txt").stdout == ""
    (machine.folder / "requirements.txt").write_text("# changed\n")
    assert "installing" in machine.bash("setup_venv requirements.txt").stdout
    assert calls.read_text().splitlines()[3:] == [f"{pip} uv", "uv"]

    # pip takes over from uv, which does not know of pip's mirrors.
    calls.unlink()
    (machine.folder / "no_uv").touch()
    (machine.folder / "requirements.txt").write_text("# changed again\n")
    assert machine.bash("setup_venv requirements.txt").returncode == 0
    assert calls.read_text().splitlines() == [f"{pip} uv", "uv", f"{pip} -r requirements.txt"]

    # A failed installation is tried again.
    calls.unlink()
    (machine.folder / "requirements.txt").write_text("# fails\n")
    for _ in range(2):
        assert machine.bash("setup_venv requirements.txt; echo went on").stdout.count("\n") == 1
    assert calls.read_text().splitlines() == 2 * [f"{pip} uv", f"{pip} -r requirements.txt"]
