"""Mutate the JSON files of models, adapters and results, and check how loading them fails.

    python -m tests.bench.fuzz_models --count 1000 --seed 0

Each mutation must load, or end in a ValueError of one line that names the damaged file. A mutation
that loads as another model than the original is printed, to be judged by hand.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chains
import mlx.core as mx
import tiny

from expander import model as models
from expander.eval.comparison import compare, read_results
from expander.eval.expand import decode_settings
from expander.eval.measure import measure_all, summarize
from expander.files import write_json
from expander.model import read_chain

TOKENS = mx.array([[5, 300, 17, 44, 260, 9, 301, 2]])
TEXT = "<|im_start|>user\nexpand: C++ and C#, 42 café"
SLOW = 10.0  # seconds
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-300, 1e300, 10**9, 10**30, 2**63),
    *(float("nan"), float("inf"), "", "x", "64", "\0", ".", "..", "/", "a" * 5000, [], [[]], {}),
    *([1], ["x"], {"x": 1}, {"type": "yarn"}, "default", "linear", "full_attention", "float16"),
)


def places(value: object, way: tuple = ()) -> list[tuple]:
    """The ways to the values inside a JSON value, a long list's and a long object's first ones only."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = []
    for key, part in items[:40]:
        found.append((*way, key))
        if isinstance(part, (dict, list)):
            found += places(part, (*way, key))
    return found


def mutate(value: object, rng: random.Random) -> tuple[object, str]:
    """A copy with one value replaced, removed or added; and a description."""
    value = json.loads(json.dumps(value))
    ways = places(value)
    # Keys near the top matter most.
    way = rng.choice([w for w in ways if len(w) <= rng.choice((1, 1, 2, 3, 9))] or ways)
    target = value
    for step in way[:-1]:
        target = target[step]
    kind = rng.choice(("replace", "replace", "replace", "remove", "number"))
    if kind == "remove":
        del target[way[-1]]
        return value, f"remove {way}"
    old = target[way[-1]]
    new = rng.choice(VALUES)
    if kind == "number" and isinstance(old, (int, float)):
        new = rng.choice((old * 2, old // 2, old + 1, old - 1, -old, float(old), str(old)))
    target[way[-1]] = new
    return value, f"{way} = {new!r:.40}"


def damage(path: Path, rng: random.Random) -> str:
    """Change a file: one value of it mostly, its bytes now and then."""
    if rng.random() < 0.9:
        value, what = mutate(json.loads(path.read_text(encoding="utf-8")), rng)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return f"{path.name}: {what}"
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
        what = f"cut off at {len(data)}"
    else:
        at = rng.randrange(len(data))
        data[at] = rng.randrange(256)
        what = f"byte {at} = {data[at]}"
    path.write_bytes(data)
    return f"{path.name}: {what}"


def fingerprint(folder: Path) -> tuple:
    model, tokenizer = models.load_chain(read_chain(str(folder)), fuse_last=True)
    models.end_token(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return [round(x, 3) for x in model(TOKENS)[0, -1, :8].tolist()], ids


def results_file(path: Path) -> Path:
    texts = ("lex: auth setup\nvec: how to set up auth\n", "no line")
    queries = [("auth config", "short"), ("tls", None)]
    results = measure_all(queries, [[(text, False)] for text in texts])
    record = {
        "schema": 1,
        "model": {"name": "a", "base": "b", "adapters_sha256": {}},
        "decode": decode_settings("greedy", 10, False, 1),
        "seed": 0,
        "summary": summarize(results, 0),
        "results": results,
    }
    write_json(path, record)
    return path


def setups(root: Path) -> list[tuple[Path, list[str], object]]:
    """(folder, files to damage, a function of the folder)."""

    def compared(folder: Path) -> object:
        record = read_results(folder / "results.json")
        return compare(record, record, 0)["summaries"]

    out = []
    for name, make in (("llama", tiny.make_llama), ("qwen2", tiny.make_qwen2)):
        out.append((make(root / name, layers=1), list(FILES), fingerprint))
    base = tiny.make_qwen3(root / "qwen3", layers=1)
    out.append((base, list(FILES), fingerprint))
    out.append((chains.make_chain(root / "chain", base), ["adapter_config.json"], fingerprint))
    out.append((root / "chain" / "grpo", ["sft/adapter_config.json"], fingerprint))
    (root / "results").mkdir()
    results_file(root / "results" / "results.json")
    out.append((root / "results", ["results.json"], compared))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, counts = random.Random(arguments.seed), Counter()
    with tempfile.TemporaryDirectory() as temporary:
        cases = setups(Path(temporary))
        expected = [str(run(folder)) for folder, _, run in cases]
        for number in range(arguments.count):
            index = rng.randrange(len(cases))
            folder, files, run = cases[index]
            name = rng.choice(files)
            copy = folder.with_name(f"{folder.name}-copy")
            shutil.copytree(folder, copy)
            what = f"{number} {folder.name}: {damage(copy / name, rng)}"
            started = time.monotonic()
            try:
                same = str(run(copy)) == expected[index]
                outcome = "loads as before" if same else "LOADS AS ANOTHER"
            except ValueError as error:
                text = str(error)
                named = Path(name).name in text or str(copy) in text or "ChatML" in text
                outcome = "refused" if named and "\n" not in text else "UNCLEAR MESSAGE"
                what += f" -> {text}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome, what = "TRACEBACK", f"{what} -> {type(error).__name__}: {error}"
            if time.monotonic() - started > SLOW:
                outcome = "SLOW"
            counts[outcome] += 1
            if outcome.isupper():
                print(f"{outcome}  {what:.300}")
            shutil.rmtree(copy)
    print(dict(counts))


if __name__ == "__main__":
    main()
