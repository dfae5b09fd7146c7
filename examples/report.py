"""Write an HTML report of a training run: plots, figures, sampled texts, configuration.

    python examples/report.py outputs/grpo
    python examples/report.py outputs/grpo --before sft.json --after grpo.json

Writes a self-contained report.html and its plots as PNG files. The two result files come from
eval.py -o. Left out: the curves of several runs in one plot.
"""

import argparse
import base64
import json
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path
from textwrap import dedent

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.eval.comparison import (
    compare,
    compare_retrieval,
    format_difference,
    format_retrieval_difference,
    read_results,
    side_by_side,
)
from expander.eval.report import format_retrieval, format_sample
from expander.files import atomic_write, digest, write_text
from expander.rows import file_rows
from expander.text import printable

TEMPLATE = Path(__file__).with_suffix(".html")
ADAPTER, METRICS = "adapters.safetensors", "metrics.jsonl"
# From Okabe and Ito's palette, which is safe for colour-blind readers.
GREY, BLUE, ORANGE = "#8c8c8c", "#0072b2", "#d55e00"
# One row above the axes.
LEGEND = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "fontsize": 8.5}
LEGEND |= {"columnspacing": 1.2, "handlelength": 1.5}
SIDES = ("A, before", "B, after")
QUERIES_SHOWN = 3  # of each kind
FEW_POINTS = 30  # up to this many, each point gets a marker


def text(value: object) -> str:
    """Escape any value for HTML, without control characters."""
    return escape(printable(str(value)))


@dataclass
class TrainingRun:
    """The contents of a run's folder; `missing` names each part that it lacks."""

    folder: Path
    metrics: list[dict]
    samples: list[dict]
    result: dict
    config: str
    missing: list[str]

    @property
    def stage(self) -> str:
        return "GRPO" if self.points("reward")[0] else "SFT"

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was logged as a number, and its values."""
        found = [(row.get("step"), row.get(key)) for row in self.metrics]
        found = [point for point in found if all(isinstance(x, int | float) for x in point)]
        return [step for step, _ in found], [value for _, value in found]


def read_run(folder: Path) -> TrainingRun:
    """Read a run's folder.

    Raises:
        ValueError: the folder has no metrics.
    """
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder}: not a training run's folder: it has no {METRICS}")
    missing = []

    def rows(name: str) -> list[dict]:
        if not (folder / name).is_file():
            return []
        found = [row for _, row in file_rows(folder / name)]
        valid = [row for row in found if isinstance(row, dict)]
        if len(valid) < len(found):
            missing.append(f"{len(found) - len(valid)} broken lines of {name}")
        return valid

    config = next(
        (path for x in (".", "checkpoints") if (path := folder / x / "config.yaml").is_file()), None
    )
    result = {}
    if (folder / "run.json").is_file():
        result = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    else:
        missing.append("time, memory and versions: the run has not finished")
    if config is None:
        missing.append("configuration")
    return TrainingRun(
        folder,
        rows(METRICS),
        rows("samples.jsonl"),
        result,
        config.read_text(encoding="utf-8") if config else "",
        missing,
    )


def read_sft(run: TrainingRun) -> TrainingRun | None:
    """The SFT run that a GRPO run started from, if its folder still has the same adapter."""
    copy = run.folder / "sft"
    if not (copy / ADAPTER).is_file():
        return None
    origin = yaml.safe_load(run.config)["model"]["sft"] if run.config else ""
    for folder in (copy, Path(origin).expanduser()):
        files = [folder / METRICS, folder / ADAPTER]
        if all(map(Path.is_file, files)) and digest(files[1]) == digest(copy / ADAPTER):
            return read_run(folder)
    run.missing.append(f"SFT run: model.sft {origin} is missing or was retrained since")
    return None


# Plots


@dataclass
class Plot:
    """A plot; `draw` draws it on matplotlib axes, `height` is in inches."""

    name: str
    title: str
    caption: str
    draw: Callable
    height: float = 3.2

    def save(self, path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2, self.height), dpi=160, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        self.draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, **LEGEND)
        atomic_write(path, lambda temporary: figure.savefig(temporary, format="png"))


def line(axes, run: TrainingRun, key: str, label: str, colour: str, scale: float = 1.0) -> None:
    """Draw a metric by step; a long one faintly, with its running mean over it."""
    steps, values = run.points(key)
    values = scale * np.array(values)
    window = len(values) // 20
    marker = "o" if len(values) <= FEW_POINTS else None
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        steps = steps[window - 1 :]
        axes.set_xlabel(f"step (bold: mean of {window} steps)")
    axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)


def band(axes, steps: Sequence[int], low: Sequence[float], high: Sequence[float]) -> None:
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.12, linewidth=0)


def dots(axes, steps: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label=label)


def draw_loss(run: TrainingRun, axes) -> None:
    line(axes, run, "loss", "training", BLUE)
    dots(axes, *run.points("val_loss"), "validation")
    axes.set_ylabel("nats per token")


def draw_reward(run: TrainingRun, axes) -> None:
    rows = [row for row in run.metrics if {"reward", "reward_std"} <= row.keys()]
    low, high = (
        [row["reward"] + sign * (row["reward_std"] or 0) for row in rows] for sign in (-1, 1)
    )
    band(axes, [row["step"] for row in rows], low, high)
    line(axes, run, "reward", "reward", BLUE)
    steps, percentages = run.points("eval_score")
    dots(axes, steps, [value / 100 for value in percentages], "held-out, greedy")


def draw_kl(run: TrainingRun, axes) -> None:
    line(axes, run, "kl", "KL", BLUE)
    axes.ticklabel_format(axis="y", style="plain")
    axes.set_ylabel("nats per token")


def draw_lengths(run: TrainingRun, axes) -> None:
    (steps, low), (_, high) = (run.points(f"completions/{x}_length") for x in ("min", "max"))
    band(axes, steps, low, high)
    line(axes, run, "completions/mean_length", "mean", BLUE)
    axes.set_ylabel("tokens")


def draw_shares(run: TrainingRun, axes) -> None:
    line(axes, run, "frac_reward_zero_std", "groups of equal rewards", BLUE, 100)
    line(axes, run, "completions/clipped_ratio", "completions cut off", ORANGE, 100)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("%")


# By the metric that a run must have: the plot's name, title, caption and function.
RUN_PLOTS = {
    "loss": (
        "loss",
        "Loss",
        "Cross-entropy of the completions; validation on held-out rows.",
        draw_loss,
    ),
    "reward": (
        "reward",
        "Reward",
        "Mean over a step's completions; the band shows the standard deviation within a group. "
        "Held-out queries are scored without penalties.",
        draw_reward,
    ),
    "kl": ("kl", "KL to the SFT model", "Distance of the policy from its start.", draw_kl),
    "completions/mean_length": (
        "lengths",
        "Lengths",
        "Completions; the band spans shortest to longest.",
        draw_lengths,
    ),
    "frac_reward_zero_std": (
        "shares",
        "Lost signal",
        "A group of equal rewards has no advantage to learn from.",
        draw_shares,
    ),
}


def run_plots(run: TrainingRun) -> list[Plot]:
    """The plots for which the run has the metrics, each with the best step marked."""
    best = run.result.get("best_step")

    def by_step(draw: Callable, axes) -> None:
        axes.set_xlabel("step")
        draw(run, axes)
        if isinstance(best, int):
            axes.axvline(best, color=GREY, linestyle=":", label="best step")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return [
        Plot(name, title, caption, partial(by_step, draw))
        for metric, (name, title, caption, draw) in RUN_PLOTS.items()
        if run.points(metric)[0]
    ]


def draw_scores(sides: Sequence[Sequence[dict]], axes) -> None:
    values = [[result["percentage"] for result in side] for side in sides]
    axes.hist(values, bins=range(0, 101, 10), color=(GREY, BLUE), label=SIDES)
    axes.set_xlabel("score, %")
    axes.set_ylabel("queries")
    axes.yaxis.get_major_locator().set_params(integer=True)


def draw_categories(summaries: Sequence[dict], axes) -> None:
    names = list(summaries[0]["categories"])[::-1]
    for summary, label, colour, shift in zip(
        summaries, SIDES, (GREY, BLUE), (0.15, -0.15), strict=True
    ):
        rows = [summary["categories"][name] for name in names]
        means = [row["average"] for row in rows]
        errors = [
            [abs(mean - row["interval"][end]) for mean, row in zip(means, rows, strict=True)]
            for end in (0, 1)
        ]
        heights = [place + shift for place in range(len(names))]
        axes.errorbar(means, heights, xerr=errors, fmt="o", color=colour, markersize=4, label=label)
    queries = [summaries[0]["categories"][name]["queries"] for name in names]
    labels = [f"{printable(x)[:28]} ({n})" for x, n in zip(names, queries, strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=9, parse_math=False)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("average score, %")


def evaluation_plots(sides: Sequence[Sequence[dict]], summaries: Sequence[dict]) -> list[Plot]:
    """Plots of two evaluations.

    Args:
        sides: the results of A and of B, for the same queries.
        summaries: the summaries of A and of B.
    """
    return [
        Plot("scores", "Scores", "Number of queries by score.", partial(draw_scores, sides)),
        Plot(
            "categories",
            "Categories",
            "Averages with 95 % intervals; the number of queries is in brackets.",
            partial(draw_categories, summaries),
            height=1.2 + 0.32 * len(summaries[0]["categories"]),
        ),
    ]


def draw_gains(found: Sequence[dict], axes) -> None:
    for result, label, colour in zip(found, SIDES, (GREY, BLUE), strict=True):
        gains = sorted(row["expanded"] - row["bare"] for row in result["per_query"])
        axes.plot(range(1, len(gains) + 1), gains, color=colour, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("queries, from the largest loss to the largest gain")
    axes.set_ylabel("change in nDCG@10")


# The page


def figures(plots: Sequence[Plot], folder: Path, prefix: str = "") -> str:
    """Save the plots as PNG files; return HTML with the images embedded."""
    out = []
    for plot in plots:
        path = folder / f"{prefix}{plot.name}.png"
        plot.save(path)
        data = base64.b64encode(path.read_bytes()).decode()
        out.append(
            f'<figure class="card"><h3>{plot.title}</h3><img alt="{plot.title}. {plot.caption}" '
            f'src="data:image/png;base64,{data}"><figcaption>{plot.caption}</figcaption></figure>'
        )
    return f'<div class="grid">{"".join(out)}</div>'


def facts(run: TrainingRun) -> str:
    """run.json as an HTML table, with the median speed from the metrics."""
    shown = dict(run.result)
    if "seconds" in shown:
        shown["time"] = cli.duration(shown.pop("seconds"))
    if speeds := sorted(run.points("tokens_per_second")[1]):
        shown["tokens per second"] = f"{speeds[len(speeds) // 2]:.0f} (median step)"
    rows = []
    for name, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {x}" for part, x in value.items())
        if isinstance(value, float):
            value = round(value, 4)
        rows.append(f"<tr><th>{text(name.replace('_', ' '))}</th><td>{text(value)}</td></tr>")
    missing = "".join(f'<p class="quiet">Not shown: {text(part)}</p>' for part in run.missing)
    return f"<table>{''.join(rows)}</table>{missing}"


def card(title: str, answers: Sequence[tuple[str, str]]) -> str:
    """HTML of one query and its (heading, answer) pairs, side by side if there is room."""
    shown = []
    for heading, answer in answers:
        lines = "".join(f"<div>{text(line)}</div>" for line in answer.split("\n"))
        shown.append(f'<div><strong>{text(heading)}</strong><div class="lines">{lines}</div></div>')
    return (
        f'<article class="card"><h3>{text(title)}</h3><div class="grid">{"".join(shown)}</div>'
        "</article>"
    )


def sampled(run: TrainingRun) -> str:
    """HTML of the best and the worst completion of each group at the last logged step."""
    last = run.samples[-1]["step"]
    rows = [row for row in run.samples if row["step"] == last]
    cards = []
    for query, group in groupby(rows, key=lambda row: row["query"]):
        ranked = sorted(group, key=lambda row: row["reward"])
        pairs = {"best": ranked[-1], "worst": ranked[0]} if len(ranked) > 1 else {"": ranked[0]}
        answers = [
            (f"{k} reward {row['reward']:.3f}", row["completion"]) for k, row in pairs.items()
        ]
        cards.append(card(query, answers))
    return f"<h3>Sampled at step {text(last)}</h3>{''.join(cards)}"


def run_section(run: TrainingRun, folder: Path) -> str:
    plots = figures(run_plots(run), folder, prefix=f"{run.stage.lower()}-")
    samples = sampled(run) if run.samples else ""
    config = f'<h3>Configuration</h3><pre class="config">{text(run.config)}</pre>'
    return (
        f"<section><h2>{run.stage}: {text(run.folder)}</h2>{plots}{facts(run)}{samples}"
        f"{config if run.config else ''}</section>"
    )


def answers(a: dict, b: dict) -> list[tuple[str, str]]:
    """(heading, text) of A and B: points, and each line with whether QMD keeps it."""
    shown = {}
    for heading, result in zip(SIDES, (a, b), strict=True):
        first = format_sample(result["query"], result["samples"][0]).partition("\n")[2]
        if (count := len(result["samples"])) > 1:
            heading += f": the first of {count} samples, which score {result['percentage']:.1f} %"
        shown[heading] = dedent(first).rstrip()
    if len(set(shown.values())) == 1:
        return [("A and B (identical)", *set(shown.values()))]
    return list(shown.items())


def evaluation_figures(summaries: Sequence[dict]) -> str:
    """HTML table of the figures of A, B and their difference."""
    head, *rows = side_by_side(summaries)
    lines = [
        "<tr>" + f"<th>{text(name)}</th>" + "".join(f"<td>{text(x)}</td>" for x in cells) + "</tr>"
        for name, *cells in rows
    ]
    return (
        f'<table class="figures"><thead><tr>{"".join(f"<th>{text(x)}</th>" for x in head)}</tr>'
        f"</thead>{''.join(lines)}</table>"
    )


def retrieval_section(records: Sequence[dict], folder: Path) -> str:
    """HTML of the collections that both evaluations have searched; empty if there are none."""
    both = [record.get("retrieval") or {} for record in records]
    names = [name for name in both[0] if name in both[1]]
    if not names:
        return ""
    tables = "".join(
        f"<h4>{text(side)}</h4><pre>{text(format_retrieval({n: found[n] for n in names}))}</pre>"
        for side, found in zip(SIDES, both, strict=True)
    )
    verdicts = "\n".join(format_retrieval_difference(compare_retrieval(*records, seed=0)))
    plots = [
        Plot(
            f"gain-{number}",
            f"Gain on {printable(name)}",
            "Change in nDCG@10 by the expansions over the bare query, per query.",
            partial(draw_gains, [found[name] for found in both]),
        )
        for number, name in enumerate(names, 1)
    ]
    return (
        f"<section><h2>Does a search find more?</h2><pre>{text(verdicts)}</pre>"
        f"{figures(plots, folder)}{tables}</section>"
    )


def evaluation_section(paths: tuple[Path, Path], folder: Path) -> str:
    records = tuple(map(read_results, paths))
    result = compare(*records, seed=records[1].get("seed", 0))
    a, b = ({x["query"]: x for x in record["results"]} for record in records)
    common = [query for query in a if query in b]
    sides = [[side[query] for query in common] for side in (a, b)]
    plots = evaluation_plots(sides, result["summaries"])
    legend = "<br>".join(
        f"{letter}: {text(path)}, {text((record['model'] or {}).get('name', 'scored only'))}"
        for letter, path, record in zip("AB", paths, records, strict=True)
    )
    ranked = sorted(common, key=lambda query: b[query]["percentage"])
    kinds = {
        "Changed most": [change["query"] for change in result["changes"][:QUERIES_SHOWN]],
        "Worst in B": ranked[:QUERIES_SHOWN],
        "Best in B": ranked[: -QUERIES_SHOWN - 1 : -1],
    }
    texts = [
        f"<h3>{kind}</h3>" + "".join(card(query, answers(a[query], b[query])) for query in queries)
        for kind, queries in kinds.items()
        if queries
    ]
    return (
        f"<section><h2>Before and after</h2><pre>{text(format_difference(result))}</pre>"
        f'<p class="quiet">{legend}</p>{figures(plots, folder)}<h3>Figures</h3>'
        f"{evaluation_figures(result['summaries'])}{''.join(texts)}</section>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an HTML report of a training run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of train.py")
    parser.add_argument("--before", type=Path, metavar="A", help="results before, from eval.py -o")
    parser.add_argument("--after", type=Path, metavar="B", help="results after, from eval.py -o")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="output folder (default: RUN/report)"
    )
    arguments = parser.parse_args()
    if bool(arguments.before) != bool(arguments.after):
        parser.error("--before and --after go together")
    try:
        import matplotlib  # noqa: F401, needed only for the plots
    except ImportError:
        raise ValueError("the plots need matplotlib: pip install matplotlib") from None

    run = read_run(arguments.run)
    runs = [found for found in (run, read_sft(run)) if found]
    folder = arguments.output or arguments.run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    sections = [run_section(each, folder) for each in runs]
    if arguments.before:
        paths = (arguments.before, arguments.after)
        sections.insert(0, evaluation_section(paths, folder))
        sections.insert(0, retrieval_section([read_results(path) for path in paths], folder))
    title = text(f"Training report: {arguments.run}")
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    page = template.substitute(title=title, body="\n".join([f"<h1>{title}</h1>", *sections]))
    write_text(folder / "report.html", page)
    print(f"{folder / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    cli.run(main)
