"""examples/report.py: the data in its plots, and a page without scripts or external files."""

import base64
import json
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from examples import report as page
from expander.eval.comparison import SCHEMA, compare
from expander.eval.measure import measure, result_of

HOSTILE = '<script>alert(1)</script><img src="https://example.org/x">\x1b[31m&amp;'
STEPS = [
    {"step": 0, "eval_score": 50.0},
    {"step": 1, "reward": 0.5, "reward_std": 0.1, "frac_reward_zero_std": 0.25, "kl": 0.0}
    | {f"completions/{k}": v for k, v in zip(("mean_length", "min_length"), (20, 10), strict=True)}
    | {"completions/max_length": 40, "completions/clipped_ratio": 0.5, "tokens_per_second": 7.0},
    {"step": 2, "reward": 0.7, "reward_std": None, "frac_reward_zero_std": 0.5, "kl": None}
    | {f"completions/{k}": v for k, v in zip(("mean_length", "min_length"), (30, 15), strict=True)}
    | {"completions/max_length": 35, "completions/clipped_ratio": 0.0, "tokens_per_second": 9.0},
    {"step": 2, "eval_score": 60.0},
]
RESULT = {"stage": "grpo", "best_step": 2, "seconds": 125.0, "versions": {"mlx": "0.32.4"}}


def write_run(folder: Path, rows=STEPS, result=RESULT, config="model:\n  sft: nowhere\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 3, "rew', encoding="utf-8")  # cut off
    if result:
        (folder / "run.json").write_text(json.dumps(result), encoding="utf-8")
    if config:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return folder


def write_results(path: Path, outputs: dict[str, str], samples: int = 1) -> Path:
    """Write a results file as eval.py -o does, with one text per query."""
    results = [
        result_of(query, f"$\\frac{{ <b>{i % 2}", [measure(query, text)] * samples)
        for i, (query, text) in enumerate(outputs.items())
    ]
    record = {"schema": SCHEMA, "model": {"name": HOSTILE}, "decode": {}, "results": results}
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


class Page(HTMLParser):
    """The tags, the images and the visible text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.images, self.attributes, self.text = [], [], set(), ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text += data


def lines(plot: page.Plot) -> dict[str, tuple[list, list]]:
    """The labelled lines of a plot: label → (x, y)."""
    axes = Figure().subplots()
    plot.draw(axes)
    drawn = {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}
    return {label: xy for label, xy in drawn.items() if not label.startswith("_")}


# Reading a run's folder


def test_points_are_the_logged_numbers(tmp_path):
    run = page.read_run(write_run(tmp_path))
    assert run.points("reward") == ([1, 2], [0.5, 0.7])
    assert run.points("kl") == ([1], [0.0])
    assert run.points("loss") == ([], [])
    assert run.stage == "GRPO"
    assert run.missing == ["1 broken lines of metrics.jsonl"]


def test_missing_files_are_reported(tmp_path):
    run = page.read_run(write_run(tmp_path, [{"step": 1, "loss": 2.0}], None, None))
    assert run.stage == "SFT"
    assert run.missing[:2] == [
        "time, memory and versions: the run has not finished",
        "configuration",
    ]
    with pytest.raises(ValueError, match=r"x: not a training run's folder: it has no metrics"):
        page.read_run(tmp_path / "x")


def test_the_sft_run_is_shown_if_its_adapter_is_unchanged(tmp_path):
    sft = write_run(tmp_path / "sft", [{"step": 1, "loss": 2.0}])
    run = page.read_run(write_run(tmp_path / "grpo", config=f"model:\n  sft: {sft}\n"))
    assert page.read_sft(run) is None and len(run.missing) == 1  # no copy of an SFT adapter
    (tmp_path / "grpo" / "sft").mkdir()
    for folder in (sft, tmp_path / "grpo" / "sft"):
        (folder / "adapters.safetensors").write_bytes(b"weights")
    assert page.read_sft(run).points("loss") == ([1], [2.0])
    (sft / "adapters.safetensors").write_bytes(b"trained again")
    assert page.read_sft(run) is None
    assert run.missing[1:] == [f"SFT run: model.sft {sft} is missing or was retrained since"]


# Plots


def test_grpo_plots(tmp_path):
    plots = {plot.name: plot for plot in page.run_plots(page.read_run(write_run(tmp_path)))}
    assert list(plots) == ["reward", "kl", "lengths", "shares"]
    drawn = lines(plots["reward"])
    assert drawn["reward"] == [[1, 2], [0.5, 0.7]]
    assert drawn["held-out, greedy"] == [[0, 2], [0.5, 0.6]]
    assert drawn["best step"][0] == [2, 2]
    assert lines(plots["lengths"])["mean"] == [[1, 2], [20, 30]]
    assert lines(plots["shares"])["groups of equal rewards"] == [[1, 2], [25, 50]]
    assert lines(plots["shares"])["completions cut off"] == [[1, 2], [50, 0]]

    axes = Figure().subplots()
    plots["reward"].draw(axes)
    [band] = axes.collections
    assert band.get_datalim(axes.transData).extents == pytest.approx([1, 0.4, 2, 0.7])


def test_a_long_metric_is_smoothed(tmp_path):
    rows = [{"step": step, "loss": float(step % 2)} for step in range(1, 41)]
    rows[39]["val_loss"] = 0.25
    [plot] = page.run_plots(page.read_run(write_run(tmp_path, rows, result={})))
    drawn = lines(plot)
    assert drawn["training"] == [list(range(2, 41)), [0.5] * 39]
    assert drawn["validation"] == [[40], [0.25]]


GOOD = "hyde: Set the auth provider in config.yaml, then restart it.\nlex: auth settings\nvec: sign in\n"
BEFORE = {"auth config": "", "borscht": GOOD, HOSTILE: HOSTILE}
AFTER = {"auth config": GOOD, "borscht": GOOD, HOSTILE: f"lex: {HOSTILE}\n"}


def test_evaluation_plots(tmp_path):
    paths = (
        write_results(tmp_path / "a.json", BEFORE),
        write_results(tmp_path / "b.json", AFTER),
    )
    records = [page.read_results(path) for path in paths]
    summaries = compare(*records, seed=0)["summaries"]
    scores, categories = page.evaluation_plots([r["results"] for r in records], summaries)
    axes = Figure().subplots()
    scores.draw(axes)
    counts = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert [sum(of_side) for of_side in counts] == [3, 3]
    good = int(measure("auth config", GOOD)["score"]["percentage"] // 10)
    assert counts[0][0] >= 1 and counts[1][good] >= 1
    axes = Figure().subplots()
    categories.draw(axes)
    shown = [container[0].get_xdata().tolist() for container in axes.containers]
    assert shown == [[x["average"] for x in reversed(s["categories"].values())] for s in summaries]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "$\\frac{ <b>1 (1)",
        "$\\frac{ <b>0 (2)",
    ]


# The page


def test_the_page_is_self_contained_and_has_no_scripts(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "grpo", config=f"model: {{sft: nowhere}}\n# {HOSTILE}\n")
    samples = [
        {"step": step, "query": HOSTILE, "completion": HOSTILE, "reward": reward}
        for step, reward in ((1, 0.9), (2, 0.25), (2, 0.75), (2, 0.5))
    ]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    write_results(tmp_path / "a.json", BEFORE, samples=2)
    write_results(tmp_path / "b.json", AFTER)
    monkeypatch.chdir(tmp_path)
    arguments = ["report.py", "grpo", "--before", "a.json", "--after", "b.json"]
    monkeypatch.setattr(sys, "argv", arguments)
    page.main()
    assert capsys.readouterr() == ("grpo/report/report.html: open it in a browser\n", "")
    out = folder / "report"
    plots = ["scores", "categories", "grpo-reward", "grpo-kl", "grpo-lengths", "grpo-shares"]
    assert {path.name for path in out.iterdir()} == {f"{x}.png" for x in plots} | {"report.html"}

    shown = Page(out / "report.html")
    for name, source in zip(plots, shown.images, strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (out / f"{name}.png").read_bytes()
    assert not set(shown.tags) & {"script", "link", "iframe", "object", "form", "a", "b"}
    assert not shown.attributes & {"href", "onerror", "onclick", "onload", "srcset"}
    assert "default-src 'none'" in (out / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in shown.text

    assert "<script>alert(1)</script><img" in shown.text  # as text, not as tags
    assert "2m05s" in shown.text and "mlx 0.32.4" in shown.text and "9 (median step)" in shown.text
    assert "Not shown: 1 broken lines of metrics.jsonl" in shown.text
    assert "best reward 0.750" in shown.text and "worst reward 0.250" in shown.text
    assert "0.900" not in shown.text  # from an earlier step
    assert "B wins" in shown.text and "A, before: the first of 2 samples" in shown.text


def test_wrong_arguments_and_a_missing_matplotlib(tmp_path, monkeypatch, run):
    done = run(["examples/report.py", "grpo", "--before", "a.json"], cwd=tmp_path)
    assert done.returncode == 2 and "--before and --after go together" in done.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(ValueError, match=r"^the plots need matplotlib: pip install matplotlib$"):
        page.main()


def test_the_gain_of_the_search_is_plotted_per_query(tmp_path):
    rows = [
        {"id": f"q{n}", "bare": 0.5, "expanded": value} for n, value in enumerate((0.7, 0.4, 0.5))
    ]
    found = {"per_query": rows}
    plot = page.Plot("gain", "Gain", "", partial(page.draw_gains, [found, found]))
    curve = lines(plot)["B, after"]
    assert curve[0] == [1, 2, 3] and curve[1] == pytest.approx([-0.1, 0.0, 0.2])


def test_collections_of_both_evaluations_are_shown(tmp_path):
    def record(gain: float, *names: str) -> dict:
        change = {"mean": gain, "interval": [gain, gain]}
        found = {
            "embedder": "wordllama",
            "queries": {"measured": 2},
            "bare": {"ndcg@10": 0.5},
            "baseline": {"ndcg@10": 0.5},
            "expanded": {"ndcg@10": 0.5 + gain, "gain": {"ndcg@10": change}},
            "per_query": [{"id": f"q{n}", "bare": 0.5, "expanded": 0.5 + gain} for n in (1, 2)],
        }
        return {"retrieval": dict.fromkeys(names, found)}

    html = page.retrieval_section([record(0.1, "vault", "a"), record(0.2, "b", "vault")], tmp_path)
    assert "vault: nDCG@10 +0.100" in html and "B finds more" in html and "0.700" in html
    assert [path.name for path in tmp_path.glob("*.png")] == ["gain-1.png"]
    assert page.retrieval_section([record(0.1, "a"), {"retrieval": None}], tmp_path) == ""
