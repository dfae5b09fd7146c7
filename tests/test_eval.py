"""The eval.py command: models, decoding, leaks, input and output files, and error messages."""

import hashlib
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from expander import model as models
from expander.eval import report
from expander.eval.measure import measure
from expander.queries import query_digest, read_query_digests, write_query_digests

ROOT = Path(__file__).parent.parent
SHORT = ("--max-new-tokens", "10")
GOOD = "lex: nginx tls settings\nlex: nginx certificate file\nvec: how to set up tls in nginx\n"


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error message, which must be one line and no traceback."""
        lines = self.err.strip().split("\n")
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), self
        return lines[0]


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path) -> Callable[..., Done]:
    """`evaluate("--model", folder)` runs eval.py in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def evaluate(*args: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        return Done(ended.value.code, *capsys.readouterr())

    return evaluate


@pytest.fixture(scope="module")
def queries(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.txt"
    path.write_text(
        "## a comment\n# servers\nnginx TLS\nrotate nginx logs every night\n\n# food\n"
        "sourdough starter smells like acetone\nnginx TLS\nbread /only:lex\n",
        encoding="utf-8",
    )
    return path


def add_adapter(policy, folder: Path, seed: int, **record: object) -> None:
    """Put random LoRA layers on the model and save them as an adapter folder."""
    mx.random.seed(seed)
    config = models.lora_config(policy, 4, 8.0, 0.0, ["q_proj", "v_proj"])
    models.add_lora(policy, config)
    weights = models.adapter_weights(policy)
    noise = [(name, 0.3 * mx.random.normal(w.shape)) for name, w in sorted(weights.items())]
    policy.load_weights(noise, strict=False)
    models.save_adapter(folder, dict(noise), config | record)


@pytest.fixture(scope="module")
def trained(tiny_qwen3, tmp_path_factory) -> dict[str, Path]:
    """Folders of an SFT adapter, a GRPO adapter over it, and that chain fused."""
    root = tmp_path_factory.mktemp("trained")
    folders = {name: root / name for name in ("sft", "grpo", "fused", "quantized")}
    model = models.load_base(tiny_qwen3)
    add_adapter(model, folders["sft"], 1, model=str(tiny_qwen3), revision=None)
    shutil.copytree(folders["sft"], folders["grpo"] / "sft")
    models.fuse(model)
    add_adapter(model, folders["grpo"], 2, parent="sft")
    models.fuse(model)
    shutil.copytree(tiny_qwen3, folders["fused"])
    mx.save_safetensors(
        str(folders["fused"] / "model.safetensors"), dict(tree_flatten(model.parameters()))
    )
    model = models.load_base(tiny_qwen3, bits=4)
    add_adapter(model, folders["quantized"], 1, model=str(tiny_qwen3), quantize_bits=4)
    return folders


def texts(path: Path) -> dict[str, list[str]]:
    record = json.loads(path.read_text(encoding="utf-8"))
    return {x["query"]: [sample["text"] for sample in x["samples"]] for x in record["results"]}


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- the command itself


def test_help_loads_nothing_heavy(run):
    done = run(["eval.py", "--help"], env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and "--compare" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "expander" in imported and imported.isdisjoint(
        {"mlx", "mlx_lm", "numpy", "transformers"}
    )


def test_one_query(tiny_qwen3, evaluate):
    done = evaluate(tiny_qwen3, "--query", "auth  config", "--decode", "qmd", *SHORT)
    assert done.code == 0, done.err
    lines = done.out.split("\n")
    assert lines[0] == "auth config"
    assert "%" in lines[1] and "points: format" in lines[2]
    assert lines[3].split()[0] in ("keeps", "drops")
    assert lines[3].split()[1] in ("lex:", "vec:", "hyde:")
    assert "\x1b" not in done.out + done.err and "average" not in done.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--query", "a", "--queries", "b.txt"], "use only one of"),
        (["--query", " "], "--query: the query is ' ', which is empty"),
        (["--query", "\u200b"], "which is empty"),
        (["--query", "a\x00b"], "control character U+0000"),
        (["--query", "a\x1b[0m"], "control character U+001B"),
        (["--query", "caf\udce9"], "surrogate"),
        (["--model", "", "--query", "a"], "--model: the name is empty"),
        (["", "--query", "a"], "the name is empty"),
        (["--query", "a", "-o", ""], "the name is empty"),
        (["--score-only", "$NO_SUCH_NAME/a"], "$NO_SUCH_NAME is not set"),
        (["--samples", "2"], "add --decode qmd"),
        (["--max-queries", "-1"], "not an integer >= 0"),
        (["--fail-under", "101"], "a percentage from 0 to 100"),
        (["--compare", "a.json", "b.json", "-o", "c.json"], "--compare cannot be used with"),
        (["a", "--model", "b"], "MODEL and --model"),
    ],
)
def test_contradicting_arguments_are_rejected(args, message, evaluate):
    done = evaluate(*args)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


# --- models


def test_every_adapter_of_a_chain_takes_effect(trained, tiny_qwen3, queries, evaluate):
    found = {}
    for name, folder in {**trained, "base": tiny_qwen3}.items():
        done = evaluate("--model", folder, "--queries", queries, *SHORT, "-o", f"{name}.json")
        assert done.code == 0, done.err
        found[name] = texts(Path(f"{name}.json"))
    assert found["fused"] == found["grpo"]
    assert len({json.dumps(found[name]) for name in ("base", "sft", "grpo", "quantized")}) == 4


def test_the_default_model_is_grpo_or_else_sft(trained, tiny_qwen3, queries, evaluate):
    assert "outputs/grpo or outputs/sft" in evaluate("--queries", queries).error
    shutil.copytree(trained["sft"], "outputs/sft")
    assert evaluate("--queries", queries, *SHORT).out.startswith("outputs/sft: ")
    shutil.copytree(trained["grpo"], "outputs/grpo")
    out = evaluate("--queries", queries, *SHORT).out
    assert out.startswith(f"outputs/grpo: {tiny_qwen3} + outputs/grpo/sft + outputs/grpo\n")


def test_a_hub_model_is_recorded_by_its_revision(run, hub, tmp_path, queries):
    path = tmp_path / "results.json"
    args = ["--model", "Qwen/Qwen3-1.7B", "--queries", queries, *SHORT, "-o", path]
    done = run(["eval.py", *args], env=hub)
    assert done.returncode == 0, done.stderr
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    assert model["base"] == "Qwen/Qwen3-1.7B" and len(model["revision"]) == 40
    assert model["weights_sha256"] == {} == model["adapters_sha256"]


@pytest.mark.parametrize("name", ["empty", "outputs/none", "none"])
def test_a_folder_without_a_model_is_an_error(name, evaluate):
    Path("empty").mkdir()
    assert f"model {name}: " in evaluate("--model", name, "--query", "a").error


# --- decoding


def test_greedy_text_does_not_depend_on_the_batch(trained, queries, evaluate):
    args = ("--model", trained["sft"], "--max-new-tokens", "24")
    for size in (1, 2, 32):
        done = evaluate(*args, "--queries", queries, "--batch-size", size, "-o", f"{size}.json")
        assert done.code == 0, done.err
    in_batch = texts(Path("32.json"))
    assert len(in_batch) == 4 and texts(Path("1.json")) == texts(Path("2.json")) == in_batch
    for query, text in in_batch.items():
        evaluate(*args, "--query", query, "-o", "alone.json")
        assert texts(Path("alone.json")) == {query: text}


@pytest.mark.parametrize("query", ["می‌خواهم کتاب بخوانم", "👨‍👩‍👧 photos", "e\u0301tude"])
def test_a_query_written_with_joiners_or_accents_is_expanded(query, trained, evaluate):
    done = evaluate(trained["sft"], "--query", query, "--max-new-tokens", "2", "-o", "one.json")
    assert done.code == 0 and list(texts(Path("one.json"))) == [query]


def test_qmd_decoding_depends_on_seed_query_and_prompt(trained, queries, evaluate):
    def sampled(*args: str) -> dict[str, list[str]]:
        done = evaluate(trained["sft"], "--decode", "qmd", *SHORT, "-o", "q.json", *args)
        assert done.code == 0, done.err
        return texts(Path("q.json"))

    four = ("--queries", str(queries), "--samples", "3")
    first = sampled(*four)
    assert all(len(set(x)) == 3 for x in first.values())
    assert all(text.startswith(("lex: ", "vec: ", "hyde: ")) for x in first.values() for text in x)
    assert sampled(*four, "--batch-size", "5") == first
    assert sampled("--query", "nginx TLS") == {"nginx TLS": first["nginx TLS"][:1]}
    assert sampled(*four, "--seed", "7") != first
    assert sampled(*four, "--qmd-system-prompt") != first


def test_a_query_of_ten_thousand_characters(trained, evaluate):
    long = "flights to Lisbon in May are cheapest on a Tuesday " * 200
    assert len(long) > 10_000
    Path("queries.txt").write_text(f"nginx TLS\n{long}\nbread\n", encoding="utf-8")
    done = evaluate(trained["sft"], "--queries", "queries.txt", *SHORT, "-o", "long.json")
    assert done.code == 0, done.err
    together = texts(Path("long.json"))
    assert list(together) == ["nginx TLS", long.strip(), "bread"]
    evaluate(trained["sft"], "--query", "bread", *SHORT, "-o", "bread.json")
    assert texts(Path("bread.json"))["bread"] == together["bread"]


def test_a_query_beyond_the_models_context(trained, evaluate):
    Path("queries.txt").write_text("a b c " * 20_000, encoding="utf-8")
    error = evaluate(trained["sft"], "--queries", "queries.txt").error
    assert "of 119999 characters" in error and "exceed the model's context of 40960" in error


# --- leaks


def test_query_digests_ignore_case_spaces_and_only_suffixes(tmp_path):
    expected = hashlib.sha256(b"auth config").hexdigest()[:16]
    assert query_digest("Auth  Config") == query_digest("auth config /only:lex") == expected
    composed = hashlib.sha256("café".encode()).hexdigest()[:16]  # as earlier adapters recorded it
    assert (
        query_digest("Café") == query_digest("cafe\u0301") == query_digest("café\u200b") == composed
    )
    persian = "می‌خواهم"
    assert query_digest(persian) == hashlib.sha256(persian.encode()).hexdigest()[:16]
    write_query_digests(tmp_path, ["auth config /only:lex", "Auth config", "pie"])
    record = json.loads((tmp_path / "queries.json").read_text(encoding="utf-8"))
    assert record == {"schema": 1, "sha256": sorted([expected, query_digest("pie")])}
    assert read_query_digests(tmp_path) == {expected, query_digest("pie")}
    assert read_query_digests(tmp_path / "none") is None


def test_trained_on_queries_are_listed(trained, queries, evaluate, tmp_path):
    folder = tmp_path / "leaky"
    shutil.copytree(trained["grpo"], folder)
    write_query_digests(folder, ["pie"])
    write_query_digests(folder / "sft", ["Nginx  tls", "Bread"])  # as training rows had them
    done = evaluate(folder, "--queries", queries, *SHORT, "-o", "leaks.json")
    assert "LEAK     trained on 2 of these queries:" in done.out
    assert "   nginx TLS\n" in done.out and "   bread /only:lex\n" in done.out
    record = json.loads(Path("leaks.json").read_text(encoding="utf-8"))
    assert record["leaks"]["queries"] == ["nginx TLS", "bread /only:lex"]
    clean = [x["percentage"] for x in record["results"] if not x["trained_on"]]
    assert len(clean) == 2
    assert record["summary"]["unseen"]["average"] == pytest.approx(sum(clean) / 2)
    assert f"without them {sum(clean) / 2:.1f} %" in done.out


def test_no_leaks_no_record_and_a_broken_record_differ(trained, queries, evaluate, tmp_path):
    assert (
        f"unknown for {trained['sft']}"
        in evaluate(trained["sft"], "--queries", queries, *SHORT).out
    )
    folder = tmp_path / "clean"
    shutil.copytree(trained["sft"], folder)
    write_query_digests(folder, ["pie"])
    out = evaluate(folder, "--queries", queries, *SHORT).out
    assert "none of these queries is in the training record" in out
    (folder / "queries.json").write_text('{"schema": 2}', encoding="utf-8")
    assert "not a record of training queries" in evaluate(folder, "--queries", queries).error


# --- the results file


def test_the_results_file_is_complete(trained, tiny_qwen3, queries, evaluate):
    done = evaluate(
        *("--model", trained["grpo"], "--queries", queries, "--max-queries", "3"),
        *("--seed", "5", *SHORT, "-o", "new/results.json"),
    )
    assert done.code == 0, done.err
    assert [path.name for path in Path("new").iterdir()] == ["results.json"]  # no temporary file
    record = json.loads(Path("new/results.json").read_text(encoding="utf-8"))

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert record["schema"] == 1 and record["seed"] == 5
    assert record["decode"] == {
        "mode": "greedy",
        "max_new_tokens": 10,
        "qmd_system_prompt": False,
        "samples": 1,
    }
    assert record["model"] == {
        "name": str(trained["grpo"]),
        "base": str(tiny_qwen3),
        "revision": None,
        "quantize_bits": None,
        "weights_sha256": {"model.safetensors": sha256(tiny_qwen3 / "model.safetensors")},
        "adapters_sha256": {
            str(folder): sha256(folder / "adapters.safetensors")
            for folder in (trained["grpo"] / "sft", trained["grpo"])
        },
        "adapters_scale": [2.0, 2.0],
    }
    assert [(x["query"], x["category"]) for x in record["results"]] == [
        ("nginx TLS", "servers"),
        ("rotate nginx logs every night", "servers"),
        ("sourdough starter smells like acetone", "food"),
    ]
    for x in record["results"]:
        assert x["samples"] == [measure(x["query"], x["samples"][0]["text"], truncated=True)]
    assert record["speed"]["tokens"] == 3 * 10


def test_an_unwritable_output_fails_before_the_evaluation(trained, evaluate):
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name, reason in {"folder": "folder", "pipe": "nobody reads"}.items():
        done = evaluate("none", "--query", "a", "-o", name)  # no such model either
        assert reason in done.error and f"'{name}'" in done.error
    assert Path("pipe").is_fifo() and Path("folder").is_dir()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_results_are_written_even_if_they_cannot_be_printed(error, evaluate, monkeypatch):
    jsonl(Path("outputs.jsonl"), {"query": "nginx TLS", "expansion": GOOD})

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(report, "format_record", fail)
    done = evaluate("--score-only", "outputs.jsonl", "-o", "scored.json")
    assert done.code == (141 if isinstance(error, BrokenPipeError) else 2)
    assert texts(Path("scored.json")) == {"nginx TLS": [GOOD]}


def test_an_ascii_terminal_shows_escapes(run, tmp_path):
    path = jsonl(tmp_path / "outputs.jsonl", {"query": "café", "expansion": "lex: café\n"})
    args = ["--score-only", path, "-v", "-o", tmp_path / "scored.json"]
    done = run(["eval.py", *args], env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "caf\\xe9" in done.stdout
    assert texts(tmp_path / "scored.json") == {"café": ["lex: café\n"]}


def test_results_go_to_a_pipe_or_through_a_link(evaluate):
    jsonl(Path("outputs.jsonl"), {"query": "nginx TLS", "expansion": GOOD})
    Path("link.json").symlink_to("target.json")
    assert evaluate("--score-only", "outputs.jsonl", "-o", "link.json").code == 0
    assert Path("link.json").is_symlink() and texts(Path("target.json")) == {"nginx TLS": [GOOD]}


# --- queries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "contains no queries"),
        (b"# category\n\n## comment\n", "contains no queries"),
        (b"nginx\ncaf\xe9\n", "queries.txt:2: not UTF-8"),
        (b"nginx\nca\0fe\n", "queries.txt:2: text contains the control character U+0000"),
        ("\ufeff\u200b\n \u2060 \n".encode(), "contains no queries"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    ],
)
def test_invalid_query_files(content, message, evaluate):
    if content is not None:
        Path("queries.txt").write_bytes(content)
    error = evaluate("--queries", "queries.txt").error
    assert "--queries queries.txt" in error and message in error


# --- expansions from other tools, references, thresholds, comparison


def test_score_only(evaluate):
    jsonl(
        Path("outputs.jsonl"),
        {"query": "nginx TLS", "expansion": GOOD, "category": "servers"},
        {"query": "nginx TLS", "output": "no lines"},
        {"query": "bread", "output": [["lex", "rye loaf"], ["vec", "how to bake a rye loaf"]]},
    )
    done = evaluate("--score-only", "outputs.jsonl", "-o", "scored.json", "-v")
    assert done.code == 0, done.err
    record = json.loads(Path("scored.json").read_text(encoding="utf-8"))
    assert record["model"] is None and record["decode"] == {"mode": "score-only"}
    first, second = record["results"]
    assert first["samples"] == [measure("nginx TLS", GOOD), measure("nginx TLS", "no lines")]
    assert second["samples"][0]["text"] == "lex: rye loaf\nvec: how to bake a rye loaf"
    assert "2 queries, 3 samples" in done.out
    assert 'line without lex:, vec: or hyde: "no lines"' in done.out  # -v shows deductions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows"),
        ('{"query": "a", "expansion": "lex: b"}\n{"query": "a"', "outputs.jsonl:2: not valid JSON"),
        ('{"query": "a"}\n', 'outputs.jsonl:1: expected {"query": text, "expansion": text'),
        ("[]\n", "outputs.jsonl:1: expected"),
        ('{"query": "a", "output": [["lex"]]}\n', "outputs.jsonl:1: expected"),
        ('{"query": "a", "output": [["lex", null]]}\n', "outputs.jsonl:1: expected"),
        ('{"query": "a", "output": [["vec", {"x": 1}]]}\n', "outputs.jsonl:1: expected"),
        ('{"query": "a", "output": [[1, "b"]]}\n', "outputs.jsonl:1: expected"),
        ('{"query": "a", "output": [["lex", "b"], "vec: c"]}\n', "outputs.jsonl:1: expected"),
        ('{"query": null, "output": "lex: b"}\n', "outputs.jsonl:1: expected"),
        ('{"query": " \\u200b", "output": "lex: b"}\n', "outputs.jsonl:1: the query is"),
        ('{"query": "a\\u0000", "output": "lex: b"}\n', "outputs.jsonl:1: text contains"),
        (
            '{"query": "a", "query": "b", "output": ""}\n',
            "outputs.jsonl:1: not valid JSON (the key",
        ),
        ('{"query": "a", "output": "", "score": NaN}\n', "outputs.jsonl:1: not valid JSON (NaN"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "a Git LFS pointer"),
    ],
)
def test_invalid_files_of_expansions(content, message, evaluate):
    Path("outputs.jsonl").write_text(content, encoding="utf-8")
    assert message in evaluate("--score-only", "outputs.jsonl").error


def test_one_query_in_several_spellings_has_several_samples(evaluate):
    spellings = ("café menu", "cafe\u0301 menu", "caf\u00e9\u200b  menu ", "\ufeffcafé\u2060 menu")
    jsonl(Path("outputs.jsonl"), *({"query": x, "expansion": GOOD} for x in spellings))
    assert evaluate("--score-only", "outputs.jsonl", "-o", "scored.json").code == 0
    assert texts(Path("scored.json")) == {"café menu": [GOOD] * 4}


def test_a_line_break_of_another_kind_stays_in_its_line(evaluate):
    pairs = [["lex", "a\rvec: b\u2028c"], ["vec", "d\nlex: e"]]
    jsonl(Path("outputs.jsonl"), {"query": "a", "output": pairs})
    assert evaluate("--score-only", "outputs.jsonl", "-o", "scored.json").code == 0
    assert texts(Path("scored.json")) == {"a": ["lex: a vec: b c\nvec: d lex: e"]}


def test_figures_against_references_are_reported(evaluate):
    jsonl(Path("outputs.jsonl"), {"query": "nginx TLS", "expansion": GOOD})
    reference = {
        "query": "Nginx tls",
        "output": [["lex", "nginx tls settings"], ["vec", "why does the certificate expire"]],
    }
    golden = jsonl(Path("golden.jsonl"), reference, {"query": "pie", "output": [["lex", "apple"]]})
    args = ("--score-only", "outputs.jsonl", "--golden", golden)
    done = evaluate(*args, "-o", "scored.json")
    assert done.code == 0, done.err
    matched = json.loads(Path("scored.json").read_text(encoding="utf-8"))["golden"]
    assert matched["queries"] == 1
    assert matched["types"]["lex"] == pytest.approx({"precision": 0.5, "recall": 1, "f1": 2 / 3})
    assert matched["types"]["vec"]["f1"] == 0
    assert matched["types"]["all"]["precision"] == pytest.approx(1 / 3)
    assert "50.0%  100.0%  66.7%" in done.out
    jsonl(golden, {"query": "pie", "output": [["lex", "apple"]]})
    assert "none of the evaluated queries" in evaluate(*args).error
    assert "no such file" in evaluate("--golden", "none.jsonl").error


def test_golden_queries_are_the_default_queries(trained, rows, evaluate):
    done = evaluate(trained["sft"], "--golden", rows, *SHORT, "--max-queries", "5", "-o", "g.json")
    assert done.code == 0, done.err
    asked = [json.loads(line)["query"] for line in rows.read_text(encoding="utf-8").splitlines()]
    assert list(texts(Path("g.json"))) == asked[:5]
    assert "golden, 5 queries" in done.out


def test_fail_under(evaluate):
    jsonl(Path("outputs.jsonl"), {"query": "nginx TLS", "expansion": GOOD})
    scored = measure("nginx TLS", GOOD)["score"]["percentage"]
    args = ("--score-only", "outputs.jsonl", "--fail-under")
    assert evaluate(*args, str(scored)).code == 0
    done = evaluate(*args, str(scored + 0.1))
    assert done.code == 1
    assert done.err == f"average {scored} % is below --fail-under {scored + 0.1:g}\n"


def test_compare(evaluate):
    for name, expansion in {"a": "no lines", "b": GOOD}.items():
        rows = [{"query": q, "expansion": expansion} for q in ("nginx TLS", "nginx tls port")]
        jsonl(Path(f"{name}.jsonl"), *rows)
        assert evaluate("--score-only", f"{name}.jsonl", "-o", f"{name}.json").code == 0
    done = evaluate("--compare", "a.json", "b.json")
    assert done.code == 0, done.err
    assert "B wins 2, loses 0, ties 0 of 2 queries" in done.out and "B scores higher" in done.out
    same = evaluate("--compare", "a.json", "a.json").out
    assert "B - A  +0.00 points  (95 % interval +0.00 to +0.00): no difference shown" in same
    Path("old.json").write_text('{"schema": 0, "results": []}', encoding="utf-8")
    assert "its schema is 0" in evaluate("--compare", "a.json", "old.json").error
    assert "cannot be read" in evaluate("--compare", "a.json", "none.json").error


def test_word_overlap_has_the_originals_options(evaluate):
    jsonl(Path("outputs.jsonl"), {"query": "nginx tls", "expansion": GOOD})
    golden = jsonl(
        Path("golden.jsonl"), {"query": "nginx tls", "output": [["lex", "nginx tls port"]]}
    )
    args = ("--score-only", "outputs.jsonl", "--golden", golden, "-o", "g.json")

    def matched(*options: str) -> float:
        assert evaluate(*args, *options).code == 0
        return json.loads(Path("g.json").read_text())["golden"]["types"]["lex"]["recall"]

    # {nginx tls settings} and {nginx tls port}: 2 of 4 words.
    assert matched() == matched("--type-thresholds") == matched("--threshold", "0.5") == 1
    assert matched("--threshold", "0.6", "--type-thresholds") == 0
    done = evaluate(*args, "--threshold", "0.6", "--show-mismatches")
    assert "only reference  nginx tls port" in done.out
    assert evaluate(*args, "--fail-under-f1", "0.5").code == 0  # 1 match of 3 + 1 lines: 0.5
    done = evaluate(*args, "--fail-under-f1", "0.51")
    assert done.code == 1 and done.err == "F1 0.500 is below --fail-under-f1 0.51\n"
    done = evaluate("--score-only", "outputs.jsonl", "--sample", "3")
    assert done.code == 2 and "--sample needs --golden" in done.err
    assert evaluate(*args, "--threshold", "nan").code == 2


def test_a_sample_of_the_references_is_drawn_by_the_seed(trained, rows, evaluate):
    def drawn(seed: str) -> list[str]:
        args = (trained["sft"], "--golden", rows, "--sample", "3", "--seed", seed)
        assert evaluate(*args, "--max-tokens", "4", "-o", "g.json").code == 0
        return list(texts(Path("g.json")))

    assert len(drawn("1")) == 3
    assert drawn("1") == drawn("1") != drawn("2")


def test_an_sft_adapter_and_a_base_named_by_hand(trained, tiny_qwen3, queries, evaluate, tmp_path):
    """The original's --sft-model and --base-model: a GRPO adapter that records neither."""
    alone = shutil.copytree(trained["grpo"], tmp_path / "alone")
    shutil.rmtree(alone / "sft")
    config = json.loads((alone / "adapter_config.json").read_text())
    del config["parent"]
    (alone / "adapter_config.json").write_text(json.dumps(config))
    args = ("--queries", queries, "--max-queries", "0", *SHORT)
    assert "does not name its base model" in evaluate(alone, *args).error
    parts = ("--sft-model", trained["sft"], "--base-model", tiny_qwen3)
    assert evaluate("--model", alone, *parts, *args, "-o", "parts.json").code == 0
    assert evaluate(trained["grpo"], *args, "-o", "whole.json").code == 0
    assert texts(Path("parts.json")) == texts(Path("whole.json"))
    assert "not an adapter folder" in evaluate(tiny_qwen3, *parts, *args).error
    done = evaluate("--score-only", "x", "--base-model", "y")
    assert done.code == 2 and "need a model" in done.err


def test_an_expansion_is_cut_off_after_max_time(trained, queries, evaluate):
    args = (trained["sft"], "--queries", queries, "--max-new-tokens", "50", "-o", "cut.json")
    assert evaluate(*args, "--max-time", "0.000001", "--summary-only", "-v").code == 0
    record = json.loads(Path("cut.json").read_text())
    assert record["decode"]["max_seconds"] == 1e-6
    assert record["speed"]["tokens"] == len(record["results"])  # one token each
    assert all(x["samples"][0]["truncated"] for x in record["results"])
    assert evaluate(*args, "--max-time", "-1").code == 2
