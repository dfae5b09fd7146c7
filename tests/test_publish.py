"""Publishing to the loopback Hub: what is refused, what becomes public, and interrupted uploads."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from chains import fused, make_adapter, make_chain
from dtypes import tolerance
from safetensors.numpy import load_file
from settings import default_config

import convert
from expander import model as models
from expander.config import to_yaml
from expander.convert import formats, model_card, publish
from expander.eval.comparison import SCHEMA
from expander.eval.measure import measure, result_of, summarize
from expander.prompt import render_prompt
from expander.statistics import bootstrap

ROOT = Path(__file__).parent.parent
TOKEN = "hf_thisMustNeverBeSeen"
REPO, GGUF_REPO = "tester/expander", "tester/expander-gguf"
GREEDY = {"mode": "greedy", "max_new_tokens": 200, "qmd_system_prompt": False, "samples": 1}
QUERIES = ("nginx tls", "rotate logs", "bread starter", "meeting notes")


def good(query: str) -> str:
    """Three lines that score 91.7 %."""
    first, second = query.split()
    return f"lex: {first} settings\nlex: {second} file\nvec: how to set up {query} at home\n"


def poor(query: str) -> str:
    """A text without a valid line: 0 %."""
    return f"I do not know {query}"


def retrieval(gain: float = 0.05, spread: float = 0.0) -> dict:
    """Figures of the embedded collection: 20 queries with nDCG@10 of 0.5 before and a mean gain."""
    gains = [gain + spread * (-1) ** number for number in range(20)]
    rows = [{"id": f"q{n}", "bare": 0.5, "expanded": 0.5 + value} for n, value in enumerate(gains)]
    change = {"mean": gain, "interval": list(bootstrap(gains, 42))}
    return {
        "embedder": "wordllama",
        "queries": {"measured": len(rows)},
        "bare": {"ndcg@10": 0.5},
        "baseline": {"ndcg@10": 0.5},
        "expanded": {"ndcg@10": 0.5 + gain, "gain": {"ndcg@10": change}},
        "per_query": rows,
    }


def evaluation(
    folder: Path,
    text: Callable[[str], str] = good,
    queries: tuple[str, ...] = QUERIES,
    trained_on: tuple[str, ...] = (),
    search: dict | None = None,
    **decode: object,
) -> dict:
    """The results file of eval.py -o if the model in `folder` answered each query with `text`."""
    chain = models.read_chain(str(folder))
    results = [result_of(query, None, [measure(query, text(query))]) for query in queries]
    for result in results:
        result["trained_on"] = result["query"] in trained_on
    return {
        "schema": SCHEMA,
        "model": chain.describe() | {"weights_sha256": chain.base_hashes()},
        "decode": GREEDY | decode,
        "seed": 42,
        "summary": summarize(results, 42),
        "leaks": {"checked": [], "unknown": [str(folder)], "queries": list(trained_on)},
        "golden": None,
        "speed": None,
        "retrieval": {"vault": search or retrieval()},
        "results": results,
    }


def save(record: dict, folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def chain(tiny_qwen3: Path, tmp_path: Path) -> Path:
    """SFT and GRPO over the tiny model, with a good evaluation in the folder."""
    folder = make_chain(tmp_path / "runs", tiny_qwen3)
    save(evaluation(folder), folder)
    return folder


@pytest.fixture
def push(hub, tmp_path, monkeypatch) -> Callable[..., None]:
    """`push(folder, *arguments)` runs convert.py --push in this process, on the loopback Hub."""
    api = functools.partial(huggingface_hub.HfApi, endpoint=hub["HF_ENDPOINT"])
    monkeypatch.setattr(publish, "HfApi", api)
    monkeypatch.setattr(model_card, "HfApi", api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", hub["HF_HUB_CACHE"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def push(folder: Path, *arguments: object, to: tuple = ("--push", REPO)) -> None:
        export = ("--model", folder, "--output", tmp_path / "gguf", "--quantize", "q8_0")
        command = ["convert.py", *export, "--name", "small", *to, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        convert.main()

    return push


@pytest.fixture
def public(hub_root: Path) -> Callable[[str], set[str]]:
    """`public(repo)`: the names of the files that the Hub shows in a repository."""

    def public(repo: str) -> set[str]:
        folder = hub_root / "models" / repo
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    return public


def requests(hub_root: Path) -> list[str]:
    """Method and path of every request so far."""
    lines = (hub_root / "requests.log").read_text().splitlines()
    return [" ".join(line.split()[:2]) for line in lines]


def read_card(hub_root: Path, repo: str = REPO) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(hub_root / "models" / repo / "README.md")


# What becomes public


def test_first_publication(
    chain, push, public, hub_root, tiny_qwen3, tmp_path, monkeypatch, capsys
):
    home = tiny_qwen3.parent.parent
    assert tmp_path.is_relative_to(home)
    monkeypatch.setenv("HOME", str(home))
    config = default_config()
    config.model.base = str(tmp_path / "base")
    (chain / "config.yaml").write_text(f"{to_yaml(config)}# {TOKEN}\n", encoding="utf-8")
    push(chain)

    bridge = {"template", "params"}  # for ollama run hf.co/...
    assert public(GGUF_REPO) == {"README.md", "Modelfile", "small-q8_0.gguf"} | bridge
    adapters = {
        f"adapters/{below}{name}"
        for below in ("", "sft/")
        for name in ("adapters.safetensors", "adapter_config.json")
    }
    model = {path.name for path in tiny_qwen3.iterdir() if path.name != "model.safetensors"}
    model |= {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    model |= {"chat_template.jinja"}
    assert public(REPO) == model | adapters | {"README.md", "evaluation.json"}
    repo = hub_root / "models" / REPO
    weights = load_file(repo / "model-00001-of-00001.safetensors")
    for name, expected in fused(chain).items():
        bound = tolerance(float32=1e-5, bfloat16=1e-2)
        np.testing.assert_allclose(weights[name], expected, rtol=bound, atol=bound)
    hashes = list(models.read_chain(str(chain)).hashes().values())
    assert list(models.read_chain(str(repo / "adapters")).hashes().values()) == hashes
    record = json.loads((repo / "evaluation.json").read_text())
    assert list(record["model"]["adapters_sha256"].values()) == hashes

    # Everything is uploaded before the first commit; the one with the evaluation is the last.
    posts = [line for line in requests(hub_root) if line.startswith(("PUT", "POST"))]
    commits = [line for line in posts if "/commit/" in line]
    assert commits == [f"POST /api/models/{x}/commit/main" for x in (GGUF_REPO, REPO)]
    sent = [index for index, line in enumerate(posts) if line.startswith("PUT")]
    assert len(sent) == 4 and max(sent) < posts.index(commits[0])

    printed = "".join(capsys.readouterr())
    for path in [*hub_root.rglob("*"), *(tmp_path / "gguf").rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert TOKEN.encode() not in content, path
            if path.is_relative_to(repo):
                assert str(home).encode() not in content, path
    assert TOKEN not in printed
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == [
        "Modelfile",
        "params",
        "small-q8_0.gguf",
        "template",
    ]


def test_the_card(chain, push, hub_root):
    (chain / "config.yaml").write_text(to_yaml(default_config()), encoding="utf-8")
    push(chain)
    card = read_card(hub_root)
    summary = evaluation(chain)["summary"]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["average"] == pytest.approx(summary["average"], abs=0.01) and summary["average"]
    assert (values["valid_format"], values["kept_lines"]) == (100, 3)
    low, high = summary["interval"]
    for part in (
        f"average  {summary['average']:.1f} %  (95 % interval {low:.1f} to {high:.1f}), 4 queries",
        "ratings  Excellent",
        "The first model published here.",
        'generate: "hf:tester/expander-gguf/small-q8_0.gguf"',
        "ollama run hf.co/tester/expander-gguf:Q8_0 ",
        "lms get https://huggingface.co/tester/expander-gguf",
        "mlx_lm.generate --model tester/expander",
        f"```text\n{render_prompt('auth config')}```",
        "with 2 LoRA adapters fused into it",
        "Licence: that of its base model.",
        "push_to_hub: false",
    ):
        assert part in card.text, part
    assert "--force" not in card.text
    files = read_card(hub_root, GGUF_REPO)
    assert (files.data.base_model, files.data.library_name) == (REPO, "gguf")
    assert files.data.base_model_relation == "quantized"
    # The configuration's data set is the Hub's; without a record, its rows are English.
    assert (card.data.datasets, card.data.language) == ([default_config().dataset.name], ["en"])
    (chain / "run.json").write_text('{"languages": ["de", "en", "not a code"]}')
    config = default_config()
    config.dataset.name = "data/*.jsonl"
    (chain / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    found = model_card.training_data(models.read_chain(str(chain)))
    assert found == {"language": ["de", "en"]}
    assert files.text.replace(GGUF_REPO, REPO, 1) == card.text


def test_the_card_has_the_bases_revision_and_licence(chain, push, hub_root):
    base = hub_root / "models" / "Qwen" / "Qwen3-1.7B"
    revision = "0123456789abcdef0123456789abcdef01234567"
    known = models.read_chain(str(chain))
    on_hub = dataclasses.replace(known, base="Qwen/Qwen3-1.7B", revision=revision)
    assert model_card.licence(on_hub) == {}
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    terms = model_card.licence(on_hub)
    assert terms["license"] == "apache-2.0"
    record = evaluation(chain) | {"publication": {"verdict": "First.", "forced": None}}
    text = model_card.render_card(REPO, REPO, "x.gguf", on_hub, record, terms)
    card = huggingface_hub.ModelCard(text)
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "Qwen/Qwen3-1.7B")
    assert card.data.base_model_relation == "finetune"
    assert f"at revision `{revision}`" in card.text and "Licence: apache-2.0." in card.text


# Better, worse, not comparable


def test_better_worse_and_forced(chain, push, public, hub_root, tiny_qwen3, tmp_path):
    first = make_adapter(tmp_path / "first", tiny_qwen3, seed=5)
    save(evaluation(first, poor), first)
    push(first, "--quantize", "q8_0", "f16")
    assert "small-f16.gguf" in public(GGUF_REPO)

    push(chain)
    assert "small-f16.gguf" not in public(GGUF_REPO)  # it has the weights of the previous model
    assert "Better than the model it replaced:" in read_card(hub_root).text

    before = {repo: public(repo) for repo in (REPO, GGUF_REPO)}, len(requests(hub_root))
    with pytest.raises(
        ValueError, match=r"worse than the published model: .* % against"
    ) as refused:
        push(first)
    assert "over 4 queries: 0 better, 4 worse, 0 the same" in str(refused.value)
    assert before[0] == {repo: public(repo) for repo in (REPO, GGUF_REPO)}
    assert not any(line.startswith("P") for line in requests(hub_root)[before[1] :])

    push(first, "--force", "smaller, for old Macs")
    text = read_card(hub_root).text
    assert "Published although it is worse than the published model:" in text
    assert "**Published with `--force`:** smaller, for old Macs" in text
    assert "adapters/sft/adapters.safetensors" not in public(REPO)
    push(first, "--quantize", "f16")  # the same model again: the card keeps the verdict
    assert read_card(hub_root).text == text.replace("small-q8_0", "small-f16").replace(
        ":Q8_0", ":F16"
    )


def test_a_model_without_an_evaluation_is_not_comparable(chain, push, hub_root):
    folder = hub_root / "models" / REPO
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"of somebody else's tool")
    with pytest.raises(ValueError, match=r"not comparable: .* has no evaluation\.json"):
        push(chain)
    (folder / "evaluation.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"the published evaluation.json: its schema is 99"):
        push(chain)
    assert not any(line.startswith("P") for line in requests(hub_root))


@pytest.fixture(scope="module")
def folder(tiny_qwen3, tmp_path_factory) -> Path:
    """An adapter over the tiny model, for tests that need no Hub. Read only."""
    return make_adapter(tmp_path_factory.mktemp("adapter"), tiny_qwen3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": QUERIES[:3]}, r"other queries: 1 only there, 0 only here"),
        ({"max_new_tokens": 100}, r"decoding settings: max_new_tokens 200 and 100"),
        ({"trained_on": QUERIES}, r"not comparable .* training data"),
        ({"text": poor}, r"not shown to be better .* \+0.00 points .* 4 the same"),
    ],
)
def test_a_model_that_is_not_better_is_refused(folder, change, message):
    with pytest.raises(ValueError, match=message):
        publish.judge(evaluation(folder, **change), evaluation(folder, poor))


def test_a_model_that_worsens_the_search_is_refused(folder):
    """Than the bare query, or than the published model; an interval that covers zero passes."""
    for found in (retrieval(0.05), retrieval(0.0, spread=0.1), retrieval(-0.01, spread=0.1)):
        publish.judge_search(evaluation(folder, search=found))
    worse = evaluation(folder, search=retrieval(-0.05))
    with pytest.raises(ValueError, match=r"than searching with the bare query: nDCG@10 -0\.050"):
        publish.judge_search(worse)
    new, old = (evaluation(folder, search=retrieval(gain)) for gain in (0.02, 0.05))
    publish.judge_search(old, new)
    with pytest.raises(ValueError, match=r"than the published model: nDCG@10 -0\.030"):
        publish.judge_search(new, old)
    del old["retrieval"]  # published by an earlier version
    publish.judge_search(new, old)


def test_publishing_needs_retrieval_figures_and_force_overrides_them(chain, push, hub_root):
    record = evaluation(chain, search=retrieval(-0.05))
    save(record | {"retrieval": {}}, chain)
    with pytest.raises(ValueError, match=r"needs the retrieval figures .*eval\.py .*--retrieval"):
        push(chain, "--force", "a test")
    save(record, chain)
    with pytest.raises(ValueError, match=r"worse for the search .*--force"):
        push(chain)
    assert all(request.startswith("GET ") for request in requests(hub_root))
    push(chain, "--force", "a baseline to beat")
    text = read_card(hub_root).text
    assert "worse for the search" in text and "a baseline to beat" in text
    assert "vault" in text and "-0.050" in text


def test_the_verdict_ignores_training_queries(folder):
    """The model is better on its one training query and worse on the other three."""
    old = evaluation(folder, lambda query: poor(query) if query == QUERIES[0] else good(query))
    new = evaluation(folder, lambda query: good(query) if query == QUERIES[0] else poor(query))
    new["results"][0]["trained_on"] = True
    with pytest.raises(ValueError, match="over 3 queries: 0 better, 3 worse"):
        publish.judge(new, old)


# The evaluation must belong to these weights


TAMPERED = {
    "adapters.safetensors": "adapters",
    "sft/adapters.safetensors": "adapters",
    "adapter_config.json": "adapter scales",
    "base": "base weights",
}


@pytest.mark.parametrize("part", TAMPERED)
def test_tampered_weights(chain, push, hub_root, part, tiny_qwen3, tmp_path):
    record = evaluation(chain)
    if part == "base":
        record["model"]["weights_sha256"]["model.safetensors"] = "0" * 64
        save(record, chain)
    elif part == "adapter_config.json":
        config = json.loads((chain / part).read_text())
        config["lora_parameters"]["scale"] *= 3
        (chain / part).write_text(json.dumps(config))
    else:
        content = bytearray((chain / part).read_bytes())
        content[-1] ^= 1
        (chain / part).write_bytes(content)
    what = TAMPERED[part]
    with pytest.raises(ValueError, match=rf"does not belong to .* \({what} differ\)"):
        push(chain, "--force", "no reason is enough")
    assert not (hub_root / "requests.log").read_text()
    assert not (tmp_path / "gguf").exists()


def test_no_evaluation(chain, push):
    save(evaluation(chain) | {"model": None}, chain)
    with pytest.raises(ValueError, match="does not belong to"):
        push(chain)
    (chain / "evaluation.json").unlink()
    with pytest.raises(
        ValueError, match=r"evaluation\.json does not exist; run python eval\.py --model"
    ):
        push(chain, "--force", "no reason is enough")


# Interrupted and failed uploads


def test_an_interrupted_upload_is_resumed(chain, push, public, hub, hub_root, tmp_path):
    """The command is killed while it uploads, then run again."""
    (hub_root / "cut").write_text("300000")
    command = ["convert.py", "--model", chain, "--output", tmp_path / "gguf", "--push", REPO]
    command = [sys.executable, *command, "--quantize", "q8_0", "--name", "small"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | hub, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 900
        while not any(line.startswith("CUT") for line in requests(hub_root)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert public(REPO) == public(GGUF_REPO) == set()
    assert not (hub_root / "uploads" / "models").exists()

    (hub_root / "cut").unlink()
    already = {path.name for path in (hub_root / "uploads").rglob("*")}
    started = len(requests(hub_root))
    push(chain)
    assert {"small-q8_0.gguf"} < public(GGUF_REPO)
    assert {"evaluation.json", "adapters/adapters.safetensors"} < public(REPO)
    again = {line.split("/")[-1] for line in requests(hub_root)[started:] if "PUT" in line}
    assert again and not again & already


def test_a_failure_between_the_two_commits(chain, push, public, hub_root, monkeypatch):
    commit = huggingface_hub.HfApi.create_commit

    def fail_for_the_model(api, repo, *arguments, **options):
        if repo == REPO:
            raise RuntimeError(f"no route to host; sent Bearer {TOKEN}\nand more")
        return commit(api, repo, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfApi, "create_commit", fail_for_the_model)
        with pytest.raises(OSError, match="Hub request failed") as stopped:
            push(chain)
    assert str(stopped.value) == (
        "tester/expander: Hub request failed: no route to host; sent Bearer *** and more; "
        "tester/expander-gguf is public and tester/expander is not; run the same command again to "
        "send what is missing"
    )
    assert stopped.value.__suppress_context__
    assert public(GGUF_REPO) and not public(REPO)
    push(chain)
    assert "evaluation.json" in public(REPO)


def test_a_commit_since_the_verdict(chain, push, hub_root, monkeypatch, tiny_qwen3):
    push(chain)
    other = make_adapter(chain.parent / "other", tiny_qwen3, seed=7)
    save(evaluation(other), other)
    write = formats.write_mlx

    def commit_by_somebody_else(*arguments):
        (hub_root / "models" / REPO / "note.txt").write_text("new")
        write(*arguments)

    monkeypatch.setattr(publish, "write_mlx", commit_by_somebody_else)
    with pytest.raises(OSError, match=r"412 .* tester/expander is not; run the same command again"):
        push(other, "--force", "a test")


# Who may, and where to


def test_no_login(chain, push, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(ValueError, match=r"Hub login; run hf auth login"):
        push(chain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--push", "expander"), "expected OWNER/NAME"),
        (("--evaluation", "x.json"), "add --push OWNER/NAME"),
        (("--no-push", "--force", "x"), "add --push OWNER/NAME"),
    ],
)
def test_arguments_that_cannot_work(chain, push, arguments, message):
    with pytest.raises(ValueError, match=message):
        push(chain, *arguments, to=())


def test_push_needs_a_gguf_file(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert.py", "--push", REPO, "--mlx", "fused"])
    with pytest.raises(ValueError, match="--push needs a GGUF file"):
        convert.main()


def test_push_to_hub_in_the_configuration(chain, push, public, tmp_path):
    config = default_config()
    config.model.push_to_hub = True
    (chain / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    push(chain, to=("--no-push",))
    assert (tmp_path / "gguf" / "small-q8_0.gguf").exists() and not public("tester/small")
    (chain / "evaluation.json").rename(chain / "elsewhere.json")
    with pytest.raises(ValueError, match="needs an evaluation"):
        push(chain, to=())
    push(chain, "--evaluation", chain / "elsewhere.json", to=())
    assert "evaluation.json" in public("tester/small")
    assert "small-q8_0.gguf" in public("tester/small-gguf")
