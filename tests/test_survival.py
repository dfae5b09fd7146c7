"""A run among other programs: terminals, pipes, other runs, changed inputs, files of others."""

import errno
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from expander.cli import Interrupted
from expander.config import Config, load_config
from expander.train.checkpoint import Checkpoints
from expander.train.lock import Lock
from expander.train.run import Run

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"


@pytest.fixture
def config(tmp_path) -> Config:
    settings = ["training.save_interval_minutes=null", "training.save_steps=1000"]
    return load_config("sft", None, [f"model.output={tmp_path / 'run'}", *settings])[0]


class NoModel:
    """A model and an optimiser without parameters."""

    def __init__(self):
        self.state = {}

    def trainable_parameters(self):
        return {}

    def load_weights(self, *_, **__):
        pass


def finish(run: Run) -> None:
    model = NoModel()
    record = {"loss": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0}
    run.finish_step(record, "loss 1", model, model, sources=["rows.jsonl:1"])


def new_run(config: Config, total: int = 10, **options) -> Run:
    return Run(config, "sft", total, **{"resume": False, "overwrite": False} | options)


# Changed inputs


def start_and_stop(config: Config, **inputs) -> None:
    """A run that is stopped after its first step."""
    run = new_run(config)
    run.pin_inputs(**inputs)
    with pytest.raises(Interrupted), run:
        run.begin_step()
        run.stop.received = signal.SIGTERM
        finish(run)


def test_a_resume_needs_the_inputs_of_the_start(config):
    start_and_stop(config, model=("model.sft a", {"sha": 1}), data=("the data of b", [1, 2]))
    same = {"model": ("model.sft a", {"sha": 1}), "data": ("the data of b", [1, 2])}
    new_run(config, resume=True).pin_inputs(**same)
    for name, changed, label in (("model", {"sha": 2}, "model.sft a"), ("data", [2, 1], "of b")):
        inputs = same | {name: (same[name][0], changed)}
        with pytest.raises(ValueError, match=rf"{label} .*SHA-256 .*--overwrite"):
            new_run(config, resume=True).pin_inputs(**inputs)
    new_run(config, overwrite=True).pin_inputs(model=("model.sft a", {"sha": 2}))


def test_sft_does_not_continue_on_other_rows(tmp_path, rows):
    base = tiny.end_early(tiny.make_qwen3(tmp_path / "base", layers=1))
    shutil.copy(rows, tmp_path / "rows.jsonl")
    settings = [f"model.base={base}", "dataset.name=rows.jsonl", "dataset.eval_split=0"]
    settings += ["training.max_steps=50", "training.batch_size=1"]
    command = [sys.executable, TRAIN, "sft", *(x for s in settings for x in ("--set", s))]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[8:]), encoding="utf-8")
    done = subprocess.run(
        [*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "rows.jsonl" in done.stderr and "--overwrite" in done.stderr


# Terminals and pipes


def in_terminal(command: str, folder: Path, until: str = "", key: bytes = b"") -> str:
    """Output of a shell command on a pseudo-terminal; `key` is typed once `until` is shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvp("bash", ["bash", "-c", command])
    shown, deadline = "", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            data = os.read(terminal, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        shown += data.decode(errors="replace")
        if key and until in shown:
            os.write(terminal, key)
            key = b""
    os.close(terminal)
    os.waitpid(pid, 0)
    return shown


@pytest.fixture(scope="module")
def training(tmp_path_factory, rows) -> str:
    """A shell command that trains SFT for 300 short steps."""
    base = tiny.end_early(tiny.make_qwen3(tmp_path_factory.mktemp("base"), layers=1))
    settings = [f"model.base={base}", f"dataset.name={rows}", "dataset.eval_split=0"]
    settings += ["training.max_steps=300", "training.batch_size=1"]
    return " ".join([sys.executable, str(TRAIN), "sft", *(f"--set {s}" for s in settings)])


@pytest.mark.parametrize("variables", ["TERM=xterm-256color", "FORCE_COLOR=1 TERM=dumb"])
def test_steps_and_the_answer_to_ctrl_c_show_on_a_terminal(variables, training, tmp_path):
    shown = in_terminal(f"{variables} {training}", tmp_path, until="step 2/", key=b"\x03")
    assert "step 1/300" in shown and "stopping after this step" in shown
    assert "saved in outputs/sft/checkpoints/step-" in shown


def test_ctrl_c_through_tee_saves_the_step(training, tmp_path):
    command = f"{training} 2>&1 | tee log; echo ${{PIPESTATUS[0]}} > code"
    in_terminal(command, tmp_path, until="step 2/", key=b"\x03")
    deadline = time.monotonic() + 30  # tee ends first, and with it the terminal
    while not list(tmp_path.glob("outputs/sft/checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_reader_that_ends_stops_the_run_after_saving(training, tmp_path):
    done = subprocess.run(
        ["bash", "-c", f"{training} | head -4; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGPIPE
    assert "saved in outputs/sft/checkpoints/step-" in done.stderr
    assert "Traceback" not in done.stderr


class Broken:
    """A stream whose writes fail."""

    def __init__(self, error: OSError):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


def test_a_full_stdout_ends_the_step_lines_but_not_the_run(config, monkeypatch, capsys):
    with new_run(config, total=2) as run:
        monkeypatch.setattr(sys, "stdout", Broken(OSError(errno.ENOSPC, "No space left on device")))
        for _ in range(2):
            run.begin_step()
            finish(run)
    assert run.finished
    assert "No space left on device" in capsys.readouterr().err
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_closed_terminal_saves(config, monkeypatch):
    """SIGHUP arrives, and both streams are gone."""
    gone = Broken(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(Interrupted) as stop, new_run(config) as run:
        run.begin_step()
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(sys, "stderr", gone)
        os.kill(os.getpid(), signal.SIGHUP)
        finish(run)
    assert stop.value.signum == signal.SIGHUP and run.checkpoints.steps() == [1]


# Other runs


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds the lock of `folder` until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from expander.train.lock import Lock\n"
        "with Lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_the_folder_is_refused_until_the_first_ends(config):
    folder = Path(config.model.output)
    other = hold(folder)
    try:
        with pytest.raises(ValueError, match=rf"process {other.pid} on {socket.gethostname()}"):
            new_run(config)
    finally:
        other.kill()
        other.communicate()
    assert (folder / ".lock").is_file()  # left behind by the kill
    with new_run(config):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert not (folder / ".lock").exists()


def test_a_lock_of_another_machine_is_respected(tmp_path):
    (tmp_path / ".lock").write_text('{"host": "other-mac", "pid": 1}')
    with pytest.raises(ValueError, match=r"process 1 on other-mac.*delete .*\.lock"):
        Lock(tmp_path).check()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}'])
def test_a_damaged_lock_file_blocks_nobody(text, tmp_path):
    (tmp_path / ".lock").write_text(text)
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize(("pid", "held"), [(None, True), (2**22 + 1, False)])
def test_on_a_drive_without_locks_the_process_id_decides(pid, held, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("expander.train.lock.fcntl.flock", unsupported)
    holder = {"host": socket.gethostname(), "pid": pid or os.getppid()}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    if held:
        with pytest.raises(ValueError, match="is in use"):
            Lock(tmp_path).check()
    else:
        Lock(tmp_path).check()


# Files of others


def test_only_own_checkpoints_are_deleted(tmp_path):
    ours = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        ours.save(step, {}, {"optimizer": {}})
    others = ["other-model/weights.bin", "notes.txt", "step-100/model.pt", ".cache/index"]
    others += ["step-000500/model.safetensors"]
    for name in others:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    (tmp_path / f".{os.getpid()}-3").mkdir()  # half-written by a killed run
    ours.save(3, {}, {"optimizer": {}})
    (tmp_path / "config.yaml").write_text("ours")
    ours.clear("config.yaml")
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(others)


def test_a_configuration_of_another_program_is_not_replaced(config):
    path = Path(config.model.output) / "checkpoints" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("optimizer: lion\n")
    with pytest.raises(ValueError, match=r"config\.yaml .*another\s+model\.output"):
        new_run(config, overwrite=True)
    assert path.read_text() == "optimizer: lion\n"
