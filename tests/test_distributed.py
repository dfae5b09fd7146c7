"""Several ranks on this machine: what one process gives, and an end when one of them is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from dtypes import float32_only, tolerance
from ports import free_ports

from expander.train import distributed

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
STEPS = [
    "dataset.eval_split=0.2",  # of 24 rows: a step of SFT takes 16 or 3, one of GRPO 2 prompts or 1
    "training.max_steps=10",
    "training.eval_steps=5",
    "training.warmup_ratio=0",
    "training.save_interval_minutes=null",
    "training.save_steps=1000",
    "lora.dropout=0",
]
SFT = ["training.learning_rate=1e-4"]  # the model must still end its completions
GRPO = [
    "training.learning_rate=1e-3",
    "training.gradient_accumulation_steps=4",
    "grpo.reward=percentage",
    "grpo.num_generations=4",
    "grpo.max_completion_length=12",
    "grpo.eval_prompts=3",
    "grpo.penalties.truncated=0.5",  # rewards differ in most groups, else Adam follows rounding
    "lora.target_modules=[q_proj, v_proj, down_proj]",
]


@pytest.fixture(scope="module")
def options(tiny_qwen3: Path, rows: Path, tmp_path_factory) -> dict[str, list[str]]:
    """The command line of each stage, on a tiny Qwen3 that ends its completions."""
    base = tiny.end_early(shutil.copytree(tiny_qwen3, tmp_path_factory.mktemp("base") / "qwen3"))
    every = [f"dataset.name={rows}", *STEPS]
    settings = {"sft": [f"model.base={base}", *every, *SFT], "grpo": [*every, *GRPO]}
    return {
        stage: [stage, *(part for setting in values for part in ("--set", setting))]
        for stage, values in settings.items()
    }


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory) -> Path:
    """A working directory in which one process has done both stages."""
    folder = tmp_path_factory.mktemp("alone")
    for stage in ("sft", "grpo"):
        subprocess.run(
            [sys.executable, TRAIN, *options[stage]], cwd=folder, check=True, capture_output=True
        )
    return folder


@pytest.fixture
def macs(alone, tmp_path) -> list[Path]:
    """A folder for each of two ranks, with the SFT adapter in both: nothing else is shared."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        shutil.copytree(alone / "outputs" / "sft", folder / "outputs" / "sft")
    return folders


def start(
    arguments: Sequence[str | Path], folders: Sequence[Path], only: int | None = None
) -> list[subprocess.Popen]:
    """Python with these arguments as one rank in each folder (or as one of them), as mlx.launch
    would start it."""
    first = free_ports(len(folders))
    hosts = folders[0] / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(len(folders))]))
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ
            | {
                "MLX_HOSTFILE": str(hosts),
                "MLX_RANK": str(rank),
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
        if only in (None, rank)
    ]


def until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed: {process.stderr.read()}")


def end(processes: list[subprocess.Popen], within: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none may take longer, or end in a traceback."""
    deadline = time.monotonic() + within
    results = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            assert "Traceback" not in error, error
            results.append((process.returncode, out, error))
    finally:
        for process in processes:
            process.kill()
    return results


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(stage: str, folder: Path, alone: Path) -> None:
    """Every figure of every step is close to one process's, and so is the adapter."""
    bound = tolerance(float32=1e-4, bfloat16=5e-2)
    here, there = (where / "outputs" / stage for where in (folder, alone))
    steps, expected = metrics(here), metrics(there)
    assert [record["step"] for record in steps][-1] == 10
    clocks = ("seconds", "per_second", "memory")
    for record, wanted in zip(steps, expected, strict=True):
        assert record.keys() == wanted.keys()
        for name, value in wanted.items():
            if not any(clock in name for clock in clocks):
                assert record[name] == pytest.approx(value, abs=bound), (record["step"], name)
    for name in ("adapters.safetensors", "last/adapters.safetensors"):
        weights, others = (mx.load(str(where / name)) for where in (here, there))
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            assert mx.abs(weight - others[key]).max().item() < bound, (name, key)
    assert {p.relative_to(here) for p in here.rglob("*")} == {
        p.relative_to(there) for p in there.rglob("*")
    }


# The same result


def test_sft_by_mlx_launch_gives_the_result_of_one_process(options, alone, tmp_path):
    done = subprocess.run(
        [
            Path(sys.executable).parent / "mlx.launch",
            *("-n", "2", "--backend", "ring", "--starting-port", str(free_ports(2))),
            *("--", sys.executable, TRAIN, *options["sft"]),
        ],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert_same("sft", tmp_path, alone)
    assert "training on 2 ranks" in done.stdout
    assert done.stdout.count("step 7/10") == done.stdout.count("next: python train.py grpo") == 1


@float32_only  # rounding differs with the batch, and may change a sampled token
def test_grpo_on_two_machines_gives_the_result_of_one_process(options, alone, macs):
    before = sorted(macs[1].rglob("*"))
    (code, out, error), (other_code, other_out, _) = end(start([TRAIN, *options["grpo"]], macs))
    assert (code, other_code) == (0, 0), error
    assert_same("grpo", macs[0], alone)
    samples, expected = (
        [json.loads(line) for line in (f / "outputs/grpo/samples.jsonl").read_text().splitlines()]
        for f in (macs[0], alone)
    )
    assert [s["completion"] for s in samples] == [s["completion"] for s in expected]
    assert sum(r.get("grad_norm", 0) > 1e-3 for r in metrics(macs[0] / "outputs/grpo")) > 5
    assert "step 10/10" in out
    assert other_out == "" and sorted(macs[1].rglob("*")) == before  # rank 0 alone prints, writes


# A rank that is lost, stopped or hangs


def test_a_killed_rank_ends_the_run_and_one_process_continues(options, alone, macs):
    shutil.rmtree(macs[0] / "outputs")
    processes = start([TRAIN, *options["sft"]], macs)
    until(processes[0], "step 3/10")
    processes[1].kill()
    (code, _, error), (killed, *_) = end(processes, within=60)
    assert (code, killed) == (2, -signal.SIGKILL)
    [said] = [line for line in error.splitlines() if line.startswith("error: ")]
    assert "the connection to another rank was lost; step" in said and "--resume" in said
    done = subprocess.run(
        [sys.executable, TRAIN, *options["sft"], "--resume"],
        cwd=macs[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same("sft", macs[0], alone)


@float32_only  # rounding differs with the batch, and may change a sampled token
def test_a_signal_to_any_rank_stops_all_and_two_continue(options, alone, macs):
    processes = start([TRAIN, *options["grpo"]], macs)
    until(processes[0], "step 2/10")
    processes[1].send_signal(signal.SIGTERM)
    for code, _, _ in (results := end(processes)):
        assert code == 128 + signal.SIGTERM
    assert "--resume (and the same options)" in results[0][2] and results[1][2] == ""
    (code, out, error), (other_code, *_) = end(start([TRAIN, *options["grpo"], "--resume"], macs))
    assert (code, other_code) == (0, 0), error
    assert "resuming at step" in out
    assert_same("grpo", macs[0], alone)


def patched(constant: str, seconds: int, *arguments: str) -> list[str]:
    """train.py as one would run it, but with a shorter time-out."""
    code = (
        f"import runpy, sys; from expander.train import distributed; distributed.{constant} = {seconds}; "
        f"sys.argv = {['train.py', *arguments]!r}; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    return ["-c", code]


def test_a_rank_that_hangs_ends_the_run(options, macs):
    shutil.rmtree(macs[0] / "outputs")
    processes = start(patched("TIMEOUT_SECONDS", 10, *options["sft"]), macs)
    until(processes[0], "step 2/10")
    processes[1].send_signal(signal.SIGSTOP)
    [(code, _, error)] = end(processes[:1])
    processes[1].kill()
    processes[1].communicate()
    assert code == 1
    assert "error: no exchange between the ranks for 10 seconds" in error and "is saved in" in error
    assert any((macs[0] / "outputs/sft/checkpoints").glob("step-*"))


def test_ranks_that_never_connect(options, tmp_path):
    """Rank 0 waits for the others; the last one tries to reach them."""
    waiting = start(patched("CONNECT_SECONDS", 3, *options["sft"]), [tmp_path] * 2, only=0)
    [(code, _, error)] = end(waiting)
    assert code == 1 and error.startswith("Timeout") and "in _connect" in error
    (tmp_path / "none.json").write_text("")  # what `mlx.launch -n 1` makes
    done = subprocess.run(
        [sys.executable, TRAIN, *options["sft"]],
        cwd=tmp_path,
        env=os.environ | {"MLX_HOSTFILE": "none.json", "MLX_RANK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("rank 1: error: cannot connect to the other ranks: ")


# What the ranks exchange


def exchange_with_others() -> None:
    """What each of three ranks does in the test below."""
    import mlx.core as mx

    from expander.train import distributed as d

    with d.joined():
        rank = d.rank()
        found = {
            "gathered": d.gather({"rank": rank, "text": "é" * rank, "none": None}),
            "collected": d.collect([letter * 2 for letter in d.share_out("abcdefgh")]),
            "sum": d.all_sum({"a": mx.full((2, 2), rank + 0.1), "b": [mx.array([1.0])]}),
            "first": d.broadcast({"w": mx.array([rank + 0.25]), "n": mx.array(7 * rank + 1)}),
        }
        d.check_same(data=[1, 2], model="m")
        try:
            d.check_same(data=[1, 2], configuration="c" * (rank // 2), model=rank)
        except ValueError as error:
            found["differing"] = str(error)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        print(json.dumps(found, default=lambda array: array.tolist()), flush=True)
        d.barrier()


def test_three_ranks_exchange_what_they_have(tmp_path):
    code = "import test_distributed as t; from expander import cli; cli.run(t.exchange_with_others)"
    results = end(start(["-c", code], [tmp_path] * 3))
    assert [code for code, *_ in results] == [2, -signal.SIGKILL, 2]
    [found] = [json.loads(line) for line in results[0][1].splitlines()[1:]]
    assert found["gathered"] == [
        {"rank": rank, "text": "é" * rank, "none": None} for rank in range(3)
    ]
    assert found["collected"] == [letter * 2 for letter in "abcdefgh"]
    assert found["sum"]["a"] == [[pytest.approx(3.3)] * 2] * 2
    assert found["sum"]["b"] == [[pytest.approx(3.0)]]
    assert found["first"] == {"w": [0.25], "n": 1}
    assert "configuration and model; copy" in found["differing"]
    assert results[0][2].splitlines()[-1] == "error: the connection to another rank was lost"


@pytest.mark.parametrize(("items", "ranks"), [(8, 3), (2, 3), (0, 2), (5, 1), (16, 4)])
def test_shares_are_even_and_cover_all_items(items, ranks, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share_out(list(range(items))))
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_gets_back_what_it_gave():
    tree = {"a": mx.array([1.0])}
    assert distributed.gather("x") == ["x"] and distributed.collect([1, 2]) == [1, 2]
    assert distributed.share_out([1, 2]) == [1, 2]
    assert distributed.all_sum(tree) is tree
