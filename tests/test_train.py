"""train.py as a user types it: both stages, the same result however often stopped, clear errors."""

import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

from expander.model import read_chain

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
SFT = [
    "dataset.eval_split=0.2",
    "training.max_steps=6",
    "training.eval_steps=2",
    "training.learning_rate=1e-3",
    "training.save_interval_minutes=null",
    "training.save_steps=1",
    "training.max_skipped_steps=2",
    "lora.dropout=0.1",
]
GRPO = [
    "dataset.eval_split=0.2",
    "training.max_steps=6",
    "training.eval_steps=3",
    "training.learning_rate=1e-3",
    "training.warmup_ratio=0",
    "training.gradient_accumulation_steps=4",
    "grpo.reward=percentage",
    "grpo.num_generations=4",
    "training.save_interval_minutes=null",
    "training.save_steps=1",
    "grpo.max_completion_length=12",
    "grpo.eval_prompts=2",
    "lora.target_modules=[q_proj, v_proj, down_proj]",
]


def sets(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def base(tiny_qwen3: Path, tmp_path_factory) -> Path:
    """The tiny Qwen3, but one that ends its completions."""
    return tiny.end_early(shutil.copytree(tiny_qwen3, tmp_path_factory.mktemp("base") / "qwen3"))


def train(folder: Path, stage: str, *options: str | Path, **more) -> str:
    """Run a stage to its end with `folder` as the working directory; what it printed."""
    done = subprocess.run(
        [sys.executable, TRAIN, stage, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **more,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sft_options(base: Path, rows: Path) -> list[str]:
    return sets([f"model.base={base}", f"dataset.name={rows}", *SFT])


@pytest.fixture(scope="module")
def grpo_options(rows: Path) -> list[str]:
    return sets([f"dataset.name={rows}", *GRPO])


@pytest.fixture(scope="module")
def sft_run(sft_options, tmp_path_factory) -> Path:
    """A working directory with a finished SFT run."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "said").write_text(train(folder, "sft", *sft_options))
    return folder


@pytest.fixture(scope="module")
def grpo_run(sft_run, grpo_options, tmp_path_factory) -> Path:
    """A working directory with a finished GRPO run on the SFT run's adapter."""
    folder = tmp_path_factory.mktemp("grpo")
    shutil.copytree(sft_run / "outputs", folder / "outputs")
    (folder / "said").write_text(train(folder, "grpo", *grpo_options))
    return folder


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory) -> Iterator[dict]:
    """A default run with no Hub to reach, begun first: the Hub's client retries for 20 seconds."""
    folder = tmp_path_factory.mktemp("unreachable")
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(folder / "home" / "hub"),
            "HF_DATASETS_CACHE": str(folder / "home" / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
        }
        process = subprocess.Popen(
            [sys.executable, TRAIN, "sft"],
            cwd=folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        yield {"folder": folder, "environment": environment, "process": process}
        process.kill()
        process.communicate()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


# What a run leaves


def test_sft_leaves_an_adapter_its_configuration_and_metrics(sft_run, base):
    output = sft_run / "outputs" / "sft"
    chain = read_chain(str(output))
    assert chain.path == base and chain.adapters == (output,)
    weights = mx.load(str(output / "adapters.safetensors"))
    assert all(mx.abs(w).max().item() > 0 for w in weights.values())  # lora_b begins at 0
    assert not (output / "checkpoints").exists()

    steps = metrics(output)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [record["step"] for record in steps if "val_loss" in record] == [2, 4, 6]
    result = json.loads((output / "run.json").read_text())
    assert (result["stage"], result["steps"], result["best_step"]) == ("sft", 6, 6)
    assert result["best_value"] == min(r["val_loss"] for r in steps if "val_loss" in r)
    said = (sft_run / "said").read_text()
    assert "24 rows read, 0 duplicate queries dropped" in said
    assert said.splitlines()[-1] == "next: python train.py grpo"


def test_mlx_lms_own_command_loads_the_adapter(sft_run, base):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlx_lm", "generate", "--model", base, "--prompt", "tls"),
            *("--adapter-path", "outputs/sft", "--max-tokens", "3"),
        ],
        cwd=sft_run,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("==========")


def test_grpo_leaves_a_chain_of_its_own(grpo_run, base):
    output = grpo_run / "outputs" / "grpo"
    chain = read_chain(str(output))
    assert chain.path == base and chain.adapters == (output / "sft", output)
    copied = (output / "sft" / "adapters.safetensors").read_bytes()
    assert copied == (grpo_run / "outputs" / "sft" / "adapters.safetensors").read_bytes()
    last = read_chain(str(output / "last"))
    assert [path.resolve() for path in last.adapters] == [output / "sft", output / "last"]

    steps = [record for record in metrics(output) if "reward" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    # Something was learnt from: without it the tests below would compare untouched adapters.
    assert any(record["reward_std"] > 0 and record["grad_norm"] > 0 for record in steps)
    assert any(record["kl"] > 1e-6 for record in steps)
    learnt = mx.load(str(output / "last" / "adapters.safetensors"))
    assert all(mx.abs(w).max().item() > 0 for w in learnt.values())
    evaluated = [record["step"] for record in metrics(output) if "eval_score" in record]
    assert evaluated == [0, 3, 6]
    record = json.loads((output / "run.json").read_text())
    rewards = [record["eval_reward"] for record in metrics(output) if "eval_reward" in record]
    assert record["best_is"] == "highest held-out reward"
    assert record["best_value"] == max(rewards)


@pytest.fixture
def after_sft(sft_run, tmp_path) -> Path:
    """A working directory of its own with the SFT run's result."""
    shutil.copytree(sft_run / "outputs", tmp_path / "outputs")
    return tmp_path


@pytest.fixture
def short_grpo(after_sft, grpo_options, run):
    """`short_grpo("section.key=value", ...)` runs GRPO to its end; the process, which exited with 0."""

    def call(*settings: str) -> subprocess.CompletedProcess[str]:
        done = run(["train.py", "grpo", *grpo_options, *sets(settings)], cwd=after_sft)
        assert done.returncode == 0, done.stderr
        return done

    return call


def learnt(adapter: Path) -> float:
    weights = mx.load(str(adapter / "adapters.safetensors"))
    return max(mx.abs(w).max().item() for name, w in weights.items() if name.endswith("lora_b"))


def test_equal_rewards_teach_nothing_and_are_told(short_grpo, tmp_path):
    """Nearly greedy and of one token, a group's completions are one and the same."""
    limits = ["grpo.max_completion_length=1", "generation.temperature=1e-3", "training.max_steps=2"]
    done = short_grpo(*limits)
    assert "warning: step 1: every group has equal rewards" in done.stderr
    assert done.stderr.count("warning: ") == 1  # once
    assert "no step beat the SFT model" in done.stdout
    assert learnt(tmp_path / "outputs" / "grpo" / "last") == 0


def test_when_every_completion_is_cut_off(short_grpo, tmp_path):
    """It is told, and where they are left out of the loss, there is none."""
    masked = ["grpo.max_completion_length=1", "grpo.mask_truncated=true", "training.max_steps=1"]
    done = short_grpo(*masked)
    assert "warning: step 1: every completion was cut off" in done.stderr
    [step] = [record for record in metrics(tmp_path / "outputs/grpo") if "reward" in record]
    assert step["grad_norm"] == 0 and step["kl"] == 0


def test_one_prompt_is_enough(short_grpo, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"query": "auth", "output": [["lex", "auth login"]]}\n')
    done = short_grpo("dataset.name=one.jsonl", "training.max_steps=2", "training.epochs=2")
    assert "1 prompts, 2 steps of 2 x 4 completions" in done.stdout
    assert "adapter of step 2" in done.stdout  # none held out: the last one


def test_grpo_follows_what_a_search_finds_line_by_line(short_grpo, tmp_path):
    searched = ["grpo.reward=retrieval", "grpo.credit=line", "grpo.retrieval.embedder=none"]
    done = short_grpo(*searched, "training.max_steps=2")
    assert "documents, vectors by none" in done.stdout and "gain " in done.stdout
    steps = [record for record in metrics(tmp_path / "outputs/grpo") if "reward" in record]
    assert all(
        {"rewards/gain", "rewards/lex_without_hit", "reward_seconds"} <= x.keys() for x in steps
    )
    evaluated = [record for record in metrics(tmp_path / "outputs/grpo") if "eval_gain" in record]
    assert evaluated[0]["step"] == 0


def test_line_credit_without_a_search_is_one_line(after_sft, grpo_options, run):
    options = [*grpo_options, *sets(["grpo.credit=line", "grpo.reward=percentage"])]
    done = run(["train.py", "grpo", *options], cwd=after_sft)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "grpo.credit line needs grpo.reward retrieval" in done.stderr


def test_a_reward_that_raises_ends_the_run_and_loses_no_step(
    after_sft, grpo_options, monkeypatch, capfd
):
    from expander.train import rewards

    score, calls = rewards.score_expansion_detailed, []

    def failing(query: str, text: str) -> dict:
        calls.append(query)
        if len(calls) > 2 + 8:  # the held-out queries and the first step's groups
            raise KeyError("broken")
        return score(query, text)

    monkeypatch.chdir(after_sft)
    monkeypatch.setattr(rewards, "score_expansion_detailed", failing)
    saves = sets(["training.save_steps=50"])
    monkeypatch.setattr(sys, "argv", ["train.py", "grpo", *grpo_options, *saves])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TRAIN), run_name="__main__")
    error = capfd.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: the reward of query {calls[-1]!r}, completion ")
    assert "failed: KeyError: 'broken'; step 1 is saved in outputs/grpo/checkpoints" in error
    assert [path.name for path in Path("outputs/grpo/checkpoints").glob("step-*")] == [
        "step-000001"
    ]


# The same result, however often it is stopped


def until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} was never printed: {process.stderr.read()}")


def stop(folder: Path, options: Sequence[str], text: str, signum: int, delay: float = 0.0) -> str:
    """Start training, send a signal once `text` is printed; what was said on stderr."""
    process = subprocess.Popen(
        [sys.executable, TRAIN, *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        until(process, text)
        time.sleep(delay)
        process.send_signal(signum)
        process.stdout.read()
        error = process.stderr.read()
    assert "Traceback" not in error
    assert process.returncode in (-signum, 128 + signum), error
    return error


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stopped_and_a_killed_run_resume_to_the_same_bytes(stage, request, tmp_path):
    options = [stage, *request.getfixturevalue(f"{stage}_options")]
    whole = request.getfixturevalue(f"{stage}_run") / "outputs" / stage
    if stage == "grpo":
        shutil.copytree(request.getfixturevalue("sft_run") / "outputs", tmp_path / "outputs")
    checkpoints = tmp_path / "outputs" / stage / "checkpoints"

    said = stop(tmp_path, options, "step 2/6", signal.SIGTERM)
    assert "python train.py" in said and "--resume" in said
    assert any(checkpoints.glob("step-*"))
    refused = subprocess.run(
        [sys.executable, TRAIN, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "--resume" in refused.stderr

    delay = random.uniform(0, 0.1)  # anywhere in a step or a save; all must do
    stop(tmp_path, [*options, "--resume"], "step 4/6", signal.SIGKILL, delay)
    said = train(tmp_path, *options, "--resume")
    assert "resuming at step" in said
    output = tmp_path / "outputs" / stage
    for name in ("adapters.safetensors", "last/adapters.safetensors", "config.yaml"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), (name, delay)

    def without_times(record: dict) -> dict:
        clocks = ("seconds", "per_second", "memory")
        return {k: v for k, v in record.items() if not any(clock in k for clock in clocks)}

    assert [*map(without_times, metrics(output))] == [*map(without_times, metrics(whole))]
    assert files(output) == files(whole)


def test_weights_that_are_not_finite_end_the_run_without_a_result(base, sft_options, tmp_path, run):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = mx.load(str(broken / "model.safetensors"))
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = mx.full(weights[name].shape, mx.nan)
    mx.save_safetensors(str(broken / "model.safetensors"), weights, {"format": "pt"})
    done = run(["train.py", "sft", *sft_options, *sets([f"model.base={broken}"])], cwd=tmp_path)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "grad_norm not finite at step 2" in line
    assert "2 steps in a row" in line and "rows.jsonl:" in line
    assert not (tmp_path / "outputs/sft/adapters.safetensors").exists()


# Before anything is loaded


def test_dry_run_and_help_load_nothing_heavy(sft_run):
    for arguments in (["sft", "--dry-run"], ["grpo", "--dry-run"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", TRAIN, *arguments],
            cwd=sft_run,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-500:]
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "argparse" in imported
        heavy = {"mlx_lm", "transformers", "datasets", "gguf"}
        if "--help" in arguments:
            heavy |= {"mlx", "mlx.core", "numpy"}  # a dry run asks MLX for the device's memory
        assert not imported & heavy
        if "--dry-run" in arguments:
            assert "learning_rate: " in done.stdout and "# result: outputs/" in done.stdout
    assert files(sft_run / "outputs") == {
        path for path in files(sft_run / "outputs") if path.parts[0] == "sft"
    }


def test_dry_run_counts_local_rows(sft_run, rows):
    said = train(sft_run, "sft", "--dry-run", "--set", f"dataset.name={rows}")
    assert "24 rows read" in said and "# base: Qwen/Qwen3-1.7B (Hub)" in said
    assert (
        "# memory: not estimated: model Qwen/Qwen3-1.7B: could not download it from the Hub" in said
    )


def test_dry_run_tells_the_memory_of_both_stages(sft_run, base):
    said = train(sft_run, "sft", "--dry-run", "--set", f"model.base={base}")
    assert "# memory: about " in said
    assert "# memory: about " in train(sft_run, "grpo", "--dry-run")


def test_dry_run_proposes_what_fits(sft_run, base):
    """16 million tokens a pass are terabytes of activations."""
    sets = [f"model.base={base}", "training.batch_size=4096", "training.max_length=4096"]
    done = subprocess.run(
        [sys.executable, TRAIN, "sft", "--dry-run", *(x for s in sets for x in ("--set", s))],
        cwd=sft_run,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "this run needs about " in done.stderr and "--set training.batch_size=" in done.stderr


# What a user can get wrong


@pytest.fixture
def mistake(tmp_path, monkeypatch, capfd):
    """`mistake("sft", ...)` runs train.py in this process, in an empty folder; its one line.

    It checks what holds for every mistake: exit code 2, one line, no file left behind.
    """
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> str:
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TRAIN), run_name="__main__")
        error = capfd.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert files(tmp_path) == before
        return error

    return run


def test_mistakes_in_the_configuration(mistake, tmp_path):
    assert "none.yaml: config file not found" in mistake("sft", "--config", "none.yaml")
    (tmp_path / "c.yaml").write_text("training: {learning_rte: 1}\n")
    said = mistake("sft", "--config", "c.yaml")
    assert "training.learning_rte: unknown key; did you mean training.learning_rate?" in said
    (tmp_path / "c.yaml").write_text("training: {epochs: five}\n")
    said = mistake("sft", "--config", "c.yaml")
    assert "training.epochs: 'five' is not allowed; it takes a number" in said
    assert "section.key=value" in mistake("grpo", "--set", "training.epochs")


def test_mistakes_in_the_data(mistake, base, tmp_path):
    model = f"model.base={base}"
    (tmp_path / "empty.jsonl").write_text("")
    said = mistake("sft", *sets([model, "dataset.name=empty.jsonl"]))
    assert "empty.jsonl: contains no rows" in said
    (tmp_path / "broken.jsonl").write_text('{"query": "a", "output": [["lex", "b"]]}\n{"query": \n')
    said = mistake("sft", *sets([model, "dataset.name=broken.jsonl"]))
    assert "broken.jsonl:2: not valid JSON" in said
    said = mistake("sft", *sets([model, "dataset.name=data/none.jsonl"]))
    assert "data/none.jsonl: no such file" in said
    assert "no such file" in mistake("sft", *sets(["dataset.name=data/none.jsonl"]), "--dry-run")
    (tmp_path / "long.jsonl").write_text('{"query": "a", "output": [["lex", "b"]]}\n')
    said = mistake("sft", *sets([model, "dataset.name=long.jsonl", "training.max_length=16"]))
    assert "no row is left to train on" in said


def test_nothing_left_to_train_on(mistake, sft_run, tmp_path):
    """Every training row of the folder is held out by its val.jsonl."""
    (tmp_path / "rows").mkdir()
    for name in ("train", "val"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(
            '{"query": "a", "output": [["lex", "b"]]}\n'
        )
    sft = sft_run / "outputs" / "sft"
    assert "left to train on" in mistake("grpo", *sets([f"model.sft={sft}", "dataset.name=rows"]))


def test_mistakes_in_the_model(mistake, base, rows, tmp_path):
    data = f"dataset.name={rows}"
    said = mistake("sft", *sets([data, "model.base=models/none/here"]))
    assert "model models/none/here: no such folder" in said
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"model_type": "gemma3"}
    (other / "config.json").write_text(json.dumps(config))
    said = mistake("sft", *sets([data, "model.base=other"]))
    assert "'gemma3' is not supported; supported: qwen3" in said


def test_grpo_before_sft(mistake, sft_run, rows):
    data = f"dataset.name={rows}"
    assert "run python train.py sft first" in mistake("grpo", *sets([data]))
    sft = sft_run / "outputs" / "sft"
    said = mistake("grpo", *sets([data, f"model.sft={sft}", f"model.output={sft}"]))
    assert "are the same folder" in said
    said = mistake("grpo", *sets([data, f"model.sft={sft}", "grpo.num_generations=3"]))
    assert "must be a multiple of grpo.num_generations (3)" in said
    said = mistake("grpo", *sets([data, f"model.sft={sft}", "grpo.num_generations=1"]))
    assert "grpo.num_generations: '1' is not allowed" in said


def test_an_output_folder_that_cannot_be_written(mistake, base, rows, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = mistake(
        "sft", *sets([f"model.base={base}", f"dataset.name={rows}", "model.output=file/sft"])
    )
    assert "model.output file/sft: cannot be written" in said
    assert (tmp_path / "file").read_text() == "in the way"


def test_resume_with_nothing_to_resume(mistake, base, rows):
    options = sets([f"model.base={base}", f"dataset.name={rows}"])
    assert "holds no unfinished run" in mistake("sft", *options, "--resume")


def test_a_stage_that_is_none(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "dpo"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert caught.value.code == 2 and "invalid choice: 'dpo'" in capfd.readouterr().err


# The Hub


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_model_that_the_hub_does_not_have(hub, run, rows, tmp_path):
    options = sets([f"dataset.name={rows}", "model.base=nobody/nothing"])
    said = one_line(run(["train.py", "sft", *options], cwd=tmp_path, env=hub))
    assert "model nobody/nothing: could not download it from the Hub" in said
    assert not files(tmp_path / "outputs")


def test_a_data_set_that_the_hub_does_not_have(hub, run, tmp_path):
    done = run(["train.py", "sft", *sets(["dataset.name=nobody/rows"])], cwd=tmp_path, env=hub)
    assert "dataset.name nobody/rows: not a local path, and could not be downloaded" in one_line(
        done
    )


def test_a_hub_that_cannot_be_reached(unreachable, run, rows):
    folder = unreachable["folder"]
    said = one_line(
        run(
            ["train.py", "sft", *sets([f"dataset.name={rows}", "model.output=other"])],
            cwd=folder,
            env=unreachable["environment"],
        )
    )
    assert "copy the model's folder" in said
    process = unreachable["process"]
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "dataset.name" in error and "without the Hub, use a file" in error
    assert not files(folder / "outputs")
