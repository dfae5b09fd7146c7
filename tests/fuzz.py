"""Fuzz the commands with damaged files; run by hand, it is no test of the suite.

    python -m tests.fuzz --seed 1 --count 2000
    python -m tests.fuzz --seed 1 --case 137 --keep /tmp/case     one case again, with its files

Each case damages a file and gives it to a command in this process. A finding is: a traceback, more
than 10 s, a long error, a file changed or left behind that the command does not own, and exit code 0
although a strict reader refuses the input or the output is incomplete.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before the libraries read it

import argparse
import contextlib
import importlib
import io
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import yaml

import eval as evaluation
import train
from expander import cli, model
from expander.config import KEYS, load_config, to_yaml
from expander.convert.gguf_tokenizer import read_tokenizer
from tests import chains, tiny
from tests.damage import VALUES, damage

ROWS = Path(__file__).parent / "rows.jsonl"
SECONDS = 10
Case = tuple[Callable[[], int | None], Callable[[], str]]  # a command, and a check of its result


class Hang(BaseException):
    """A case took longer than SECONDS."""


# What must hold


def strict(pairs: list) -> dict:
    assert len(dict(pairs)) == len(pairs), "a key is given twice"
    return dict(pairs)


def refused(data: bytes) -> str:
    """Why a strict reader refuses a JSON value; empty if it does not."""
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=strict)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError, AssertionError) as error:
        return f"a strict reader refuses {data[:80]!r}: {error}"
    return ""


def refused_rows(data: bytes) -> str:
    return "".join(refused(line) for line in data.split(b"\n") if line.strip())


def refused_yaml(data: bytes) -> str:
    names = [name.value for name, _ in yaml.compose(data, yaml.SafeLoader).value]
    return "" if len(set(names)) == len(names) else "a section is given twice"


def miscounted(rows: bytes, path: Path) -> str:
    samples = [x for result in json.loads(path.read_text())["results"] for x in result["samples"]]
    return "" if len(samples) == rows.count(b'"query"') else "a row without its sample"


# Cases


def command(main: Callable, *arguments: object) -> Callable[[], int | None]:
    return lambda: setattr(sys, "argv", ["command", *map(str, arguments)]) or main()


def dry_run(stage: str, *arguments: object, **values: object) -> Callable[[], int | None]:
    sets = [x for name, v in values.items() for x in ("--set", f"{name.replace('__', '.')}={v}")]
    return command(train.main, stage, *arguments, *sets, "--dry-run")


def rows_case(rng: Random, base: Path) -> Case:
    path = damage(rng, Path(rng.choice(("rows.jsonl", "rows.jsonl", "scored.jsonl"))))
    before, name = path.read_bytes(), rng.choice((path, ".", "*.jsonl", "**/rows.jsonl"))
    scripts = (("clean_data", "--fix", "--in-place"), ("validate_schema",), ("analyze_data",))
    script, *options = rng.choice(scripts)
    main = importlib.import_module(f"dataset.{script}").main
    score = command(evaluation.main, "--score-only", path, "-o", "out.json", "-v")
    train_on = dry_run("sft", model__base=base, dataset__name=name)
    choices = (
        (command(main, path, *options), lambda: refused_rows(path.read_bytes())),
        (score, lambda: refused_rows(before) or miscounted(before, Path("out.json"))),
        (train_on, lambda: refused_rows(Path("rows.jsonl").read_bytes())),
    )
    return rng.choice(choices)


def config_case(rng: Random, base: Path) -> Case:
    path, stage = Path("config.yaml"), rng.choice(("sft", "grpo"))
    if rng.random() < 0.7:
        damage(rng, path)
    texts = [*VALUES, "1e999", "012", "1:30", "a #b", "[q_proj]", "{a: 1, a: 2}", "*", "3", "0.5"]
    settings = [f"{rng.choice(list(KEYS))}={rng.choice(texts)}" for _ in range(rng.randrange(3))]
    arguments = [x for setting in settings for x in ("--set", setting)]

    def check() -> str:
        config, _ = load_config(stage, path, settings)
        Path("again.yaml").write_text(to_yaml(config), encoding="utf-8")
        same = load_config(stage, "again.yaml")[0] == config
        return refused_yaml(path.read_bytes()) or ("" if same else "read back to another one")

    return dry_run(stage, "--config", path, *arguments, dataset__name="rows.jsonl"), check


def model_case(rng: Random, base: Path, *files: str) -> Case:
    damage(rng, Path(rng.choice(files)))

    def load() -> None:
        chain = model.read_chain("adapter")
        model.load_chain(chain, fuse_last=True)
        read_tokenizer(chain.path, model.model_config(chain.path)["vocab_size"])

    dry = dry_run("grpo", model__sft="adapter", dataset__name="rows.jsonl")
    return rng.choice((load, load, dry)), lambda: ""


def adapter_case(rng: Random, base: Path) -> Case:
    return model_case(rng, base, "adapter/adapter_config.json", "adapter/adapters.safetensors")


def base_case(rng: Random, base: Path) -> Case:
    return model_case(rng, base, "base/config.json", "base/config.json", "base/tokenizer.json")


def results_case(rng: Random, base: Path) -> Case:
    paths = [damage(rng, Path("results.json")), Path("other.json")]
    compare = command(evaluation.main, "--compare", *rng.sample(paths, 2))
    return compare, lambda: refused(paths[0].read_bytes())


CASES = {
    make.__name__.removesuffix("_case"): make
    for make in (rows_case, config_case, adapter_case, base_case, results_case)
}


# The runner


def make_world(world: Path, base: Path) -> None:
    """The files of a case before its damage, in the current folder; `base` is never damaged."""
    small = {"layers": 1, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab_pad": 3}
    for folder in (base, world / "base"):
        tiny.make_qwen3(folder, **small)
    os.chdir(world)
    chains.make_adapter(Path("adapter"), Path("base"), rank=2)
    Path("rows.jsonl").write_bytes(b"".join(ROWS.read_bytes().splitlines(keepends=True)[:8]))
    rows = [{"query": f"q{n}", "expansion": f"lex: q{n} a\nvec: what is q{n}"} for n in range(5)]
    Path("scored.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [f"model.base={base}", "model.sft=adapter"]
    Path("config.yaml").write_text(to_yaml(load_config("sft", None, settings)[0]))
    for name in ("results.json", "other.json"):
        command(evaluation.main, "--score-only", "scored.jsonl", "-o", name)()


def snapshot() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def run_case(case: Case) -> tuple[int, str]:
    """(exit code, finding); the finding is empty if all is well."""
    run, check = case
    before, errors = snapshot(), io.StringIO()
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            cli.run(run)
    except SystemExit as end:
        code, error = end.code, errors.getvalue()
    except BaseException:  # Hang, or what would be a traceback
        return -1, traceback.format_exc()
    finally:
        signal.alarm(0)
    after = snapshot()
    changed = {str(x) for x in before.keys() | after.keys() if before.get(x) != after.get(x)}
    if changed - {"out.json", "rows.jsonl", "scored.jsonl"} or len(changed) > 1:
        return code, f"changed {sorted(changed)}"
    if code not in (0, 1, 2) or "Traceback" in error:
        return code, f"exit code {code}: {error}"
    if code == 2 and ("error: " not in error or max(map(len, error.split("\n"))) > 1500):
        return code, f"not a short error: {error[:2000]!r}"
    try:
        return code, check() if code == 0 else ""
    except Exception:
        return code, f"exit 0 with a wrong result: {traceback.format_exc()}"


def hang(signum: int, frame: object) -> None:
    raise Hang


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the commands with damaged files.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--kinds", nargs="*", default=CASES, help=f"of {', '.join(CASES)}")
    parser.add_argument("--case", type=int, help="run only this case")
    parser.add_argument("--keep", type=Path, help="copy the files of --case to this new folder")
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, hang)
    codes, findings, slowest, kinds = Counter(), 0, 0.0, list(args.kinds)
    with tempfile.TemporaryDirectory() as temporary:
        world, base, case = (Path(temporary) / name for name in ("world", "base", "case"))
        with contextlib.redirect_stdout(io.StringIO()):
            make_world(world, base)
        for number in range(args.count) if args.case is None else [args.case]:
            shutil.copytree(world, case)
            os.chdir(case)
            kind, began = kinds[number % len(kinds)], time.monotonic()
            code, finding = run_case(CASES[kind](Random(f"{args.seed}/{number}"), base))
            slowest = max(slowest, time.monotonic() - began)
            codes[f"{kind} exit {code}"] += 1
            if finding:
                findings += 1
                print(f"--- {number} {kind}, exit {code}: {finding.strip()}", flush=True)
            if args.keep:
                shutil.copytree(case, args.keep)
            os.chdir(temporary)
            shutil.rmtree(case)
    print(f"{codes.total()} cases, slowest {slowest:.1f} s: {findings} findings; {dict(codes)}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
