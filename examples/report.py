"""A page about a training run to look at: plots, figures, texts, the configuration.

    python examples/report.py outputs/grpo
    python examples/report.py outputs/grpo --before sft.json --after grpo.json

Writes report.html, which needs no other file and no network, and its plots as PNG files. The two
results are those of eval.py -o. Left out: the curves of several runs in one plot.
"""

import argparse
import base64
import json
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from textwrap import dedent

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.eval.comparison import compare, format_difference, read_results, side_by_side
from expander.eval.report import format_sample, printable
from expander.files import atomic_write, digest, write_text
from expander.rows import file_rows

TEMPLATE = Path(__file__).with_suffix(".html")
ADAPTER, METRICS = "adapters.safetensors", "metrics.jsonl"
# Okabe and Ito's colours, which the colour-blind tell apart.
GREY, BLUE, ORANGE = "#8c8c8c", "#0072b2", "#d55e00"
# Above the axes, in one row.
LEGEND = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "fontsize": 8.5}
LEGEND |= {"columnspacing": 1.2, "handlelength": 1.5}
SHOWN = 3  # queries of each kind
FEW_POINTS = 30


def text(value: object) -> str:
    """Anything as HTML text."""
    return escape(printable(str(value)))


@dataclass
class TrainingRun:
    """What a run's folder says; `missing` has a sentence for each part that is not there."""

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
    """
    Raises:
        ValueError: the folder holds no run's metrics.
    """
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder}: no training run's folder: there is no {METRICS} in it")
    missing = []

    def rows(name: str) -> list[dict]:
        if not (folder / name).is_file():
            return []
        found = [row for _, row in file_rows(folder / name)]
        whole = [row for row in found if isinstance(row, dict)]
        if len(whole) < len(found):
            missing.append(f"{len(found) - len(whole)} broken lines of {name}")
        return whole

    config = next(
        (path for x in (".", "checkpoints") if (path := folder / x / "config.yaml").is_file()), None
    )
    result = {}
    if (folder / "run.json").is_file():
        result = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    else:
        missing.append("time, memory and versions: the run has not come to its end")
    if config is None:
        missing.append("its configuration")
    return TrainingRun(
        folder,
        rows(METRICS),
        rows("samples.jsonl"),
        result,
        config.read_text(encoding="utf-8") if config else "",
        missing,
    )


def read_sft(run: TrainingRun) -> TrainingRun | None:
    """The SFT run that a GRPO run went on from, if its folder still holds that adapter."""
    beneath = run.folder / "sft"
    if not (beneath / ADAPTER).is_file():
        return None
    origin = yaml.safe_load(run.config)["model"]["sft"] if run.config else ""
    for folder in (beneath, Path(origin).expanduser()):
        files = [folder / METRICS, folder / ADAPTER]
        if all(map(Path.is_file, files)) and digest(files[1]) == digest(beneath / ADAPTER):
            return read_run(folder)
    run.missing.append(f"its SFT run: model.sft {origin} is not there, or was trained again since")
    return None


# Plots


@dataclass
class Plot:
    """`draw` puts it on matplotlib's axes; the size is in inches."""

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
    """One metric by step; of a long and noisy one also the running mean."""
    import numpy as np

    steps, values = run.points(key)
    values = scale * np.array(values)
    window = len(values) // 20
    marker = "o" if len(values) <= FEW_POINTS else None
    if window > 1:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        values = np.convolve(values, np.full(window, 1 / window), mode="valid")
        steps = steps[window - 1 :]
        axes.set_xlabel(f"step; bold: the mean of {window}")
    axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)


def run_plots(run: TrainingRun) -> list[Plot]:
    """The plots for which the run has the metrics."""
    best = run.result.get("best_step")

    def by_step(draw: Callable) -> Callable:
        def draw_all(axes) -> None:
            axes.set_xlabel("step")
            draw(axes)
            if isinstance(best, int):
                axes.axvline(best, color=GREY, linestyle=":", label="step kept")
            axes.xaxis.get_major_locator().set_params(integer=True)

        return draw_all

    def loss(axes) -> None:
        line(axes, run, "loss", "training", BLUE)
        steps, values = run.points("val_loss")
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="validation")
        axes.set_ylabel("nats a token")

    def reward(axes) -> None:
        rows = [row for row in run.metrics if {"reward", "reward_std"} <= row.keys()]
        ends = [
            [row["reward"] + sign * (row["reward_std"] or 0) for row in rows] for sign in (-1, 1)
        ]
        axes.fill_between([row["step"] for row in rows], *ends, color=BLUE, alpha=0.12, linewidth=0)
        line(axes, run, "reward", "reward", BLUE)
        steps, values = run.points("eval_score")
        values = [value / 100 for value in values]
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="held-out, greedy")

    def kl(axes) -> None:
        line(axes, run, "kl", "KL", BLUE)
        axes.ticklabel_format(axis="y", style="plain")
        axes.set_ylabel("nats a token")

    def lengths(axes) -> None:
        ends = [run.points(f"completions/{end}_length") for end in ("min", "max")]
        axes.fill_between(ends[0][0], ends[0][1], ends[1][1], color=BLUE, alpha=0.12, linewidth=0)
        line(axes, run, "completions/mean_length", "mean", BLUE)
        axes.set_ylabel("tokens")

    def shares(axes) -> None:
        line(axes, run, "frac_reward_zero_std", "groups of equal rewards", BLUE, 100)
        line(axes, run, "completions/clipped_ratio", "completions cut off", ORANGE, 100)
        axes.set_ylim(-3, 103)
        axes.set_ylabel("%")

    plots = {
        "loss": Plot(
            "loss", "Loss", "Cross-entropy of the completions; validation on held-out rows.", loss
        ),
        "reward": Plot(
            "reward",
            "Reward",
            "Mean of a step's completions; the band is a standard deviation within a group to each "
            "side. Held-out queries are scored without the penalties.",
            reward,
        ),
        "kl": Plot("kl", "KL to the SFT model", "How far the policy has moved.", kl),
        "completions/mean_length": Plot(
            "lengths", "Lengths", "Completions; the band is from shortest to longest.", lengths
        ),
        "frac_reward_zero_std": Plot(
            "shares", "Lost signal", "A group of equal rewards teaches nothing.", shares
        ),
    }
    return [
        Plot(plot.name, plot.title, plot.caption, by_step(plot.draw))
        for key, plot in plots.items()
        if run.points(key)[0]
    ]


def evaluation_plots(sides: Sequence[Sequence[dict]], summaries: Sequence[dict]) -> list[Plot]:
    """Of A and B: the results and the summary of each, for the same queries."""
    labels = ("A, before", "B, after")

    def scores(axes) -> None:
        values = [[result["percentage"] for result in side] for side in sides]
        axes.hist(values, bins=range(0, 101, 10), color=(GREY, BLUE), label=labels)
        axes.set_xlabel("score, %")
        axes.set_ylabel("queries")
        axes.yaxis.get_major_locator().set_params(integer=True)

    names = list(summaries[0]["categories"])[::-1]

    def categories(axes) -> None:
        for summary, label, colour, shift in zip(
            summaries, labels, (GREY, BLUE), (0.15, -0.15), strict=True
        ):
            rows = [summary["categories"][name] for name in names]
            means = [row["average"] for row in rows]
            spread = [
                [abs(mean - row["interval"][end]) for mean, row in zip(means, rows, strict=True)]
                for end in (0, 1)
            ]
            heights = [place + shift for place in range(len(names))]
            axes.errorbar(
                means, heights, xerr=spread, fmt="o", color=colour, markersize=4, label=label
            )
        queries = [summaries[0]["categories"][name]["queries"] for name in names]
        shown = [f"{printable(x)[:28]} ({n})" for x, n in zip(names, queries, strict=True)]
        axes.set_yticks(range(len(names)), shown, fontsize=9, parse_math=False)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("average score, %")

    return [
        Plot("scores", "Scores", "How many queries got which score.", scores),
        Plot(
            "categories",
            "Categories",
            "Averages with their 95 % intervals; in brackets, the number of queries.",
            categories,
            height=1.2 + 0.32 * len(names),
        ),
    ]


# The page


def figures(plots: Sequence[Plot], folder: Path, prefix: str = "") -> str:
    """Save the plots; the HTML that shows them and needs no file."""
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
    """run.json as a table, with the speed that the metrics tell."""
    shown = dict(run.result)
    if "seconds" in shown:
        shown["time"] = cli.duration(shown.pop("seconds"))
    if speeds := sorted(run.points("tokens_per_second")[1]):
        shown["tokens a second"] = f"{speeds[len(speeds) // 2]:.0f} (median step)"
    rows = []
    for name, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {x}" for part, x in value.items())
        if isinstance(value, float):
            value = round(value, 4)
        rows.append(f"<tr><th>{text(name.replace('_', ' '))}</th><td>{text(value)}</td></tr>")
    left_out = "".join(f'<p class="quiet">Not shown: {text(part)}</p>' for part in run.missing)
    return f"<table>{''.join(rows)}</table>{left_out}"


def card(title: str, answers: Sequence[tuple[str, str]]) -> str:
    """One query and the (heading, answer) pairs to it, side by side where there is room."""
    shown = []
    for heading, answer in answers:
        lines = "".join(f"<div>{text(line)}</div>" for line in answer.split("\n"))
        shown.append(f'<div><strong>{text(heading)}</strong><div class="lines">{lines}</div></div>')
    return (
        f'<article class="card"><h3>{text(title)}</h3><div class="grid">{"".join(shown)}</div>'
        "</article>"
    )


def sampled(run: TrainingRun) -> str:
    """The best and the worst completion of each group logged last."""
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
    """A's text and B's, each with its points and what QMD does with every line."""
    shown = {}
    for heading, result in (("A, before", a), ("B, after", b)):
        first = format_sample(result["query"], result["samples"][0]).partition("\n")[2]
        if (count := len(result["samples"])) > 1:
            heading += f": the first of {count} samples, which score {result['percentage']:.1f} %"
        shown[heading] = dedent(first).rstrip()
    if len(set(shown.values())) == 1:
        return [("A and B alike", *set(shown.values()))]
    return list(shown.items())


def evaluation_section(paths: tuple[Path, Path], folder: Path) -> str:
    records = tuple(map(read_results, paths))
    result = compare(*records, seed=records[1].get("seed", 0))
    of_a, of_b = ({x["query"]: x for x in record["results"]} for record in records)
    common = [query for query in of_a if query in of_b]
    plots = evaluation_plots(
        [[of_[query] for query in common] for of_ in (of_a, of_b)], result["summaries"]
    )
    legend = "".join(
        f"<br>{letter}: {text(path)}, {text((record['model'] or {}).get('name', 'scored only'))}"
        for letter, path, record in zip("AB", paths, records, strict=True)
    )
    head, *rows = side_by_side(result["summaries"])
    lines = [
        "<tr>" + f"<th>{text(name)}</th>" + "".join(f"<td>{text(x)}</td>" for x in cells) + "</tr>"
        for name, *cells in rows
    ]
    table = (
        f'<table class="figures"><thead><tr>{"".join(f"<th>{text(x)}</th>" for x in head)}</tr>'
        f"</thead>{''.join(lines)}</table>"
    )
    ranked = sorted(common, key=lambda query: of_b[query]["percentage"])
    kinds = {
        "Changed most": [change["query"] for change in result["changes"][:SHOWN]],
        "Worst in B": ranked[:SHOWN],
        "Best in B": ranked[: -SHOWN - 1 : -1],
    }
    texts = [
        f"<h3>{kind}</h3>"
        + "".join(card(query, answers(of_a[query], of_b[query])) for query in queries)
        for kind, queries in kinds.items()
        if queries
    ]
    return (
        f"<section><h2>Before and after</h2><pre>{text(format_difference(result))}</pre>"
        f'<p class="quiet">{legend.removeprefix("<br>")}</p>{figures(plots, folder)}'
        f"<h3>Figures</h3>{table}{''.join(texts)}</section>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a page about a training run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that train.py wrote")
    parser.add_argument("--before", type=Path, metavar="A", help="results of eval.py -o, and")
    parser.add_argument("--after", type=Path, metavar="B", help="those of the model after it")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: RUN/report")
    arguments = parser.parse_args()
    if bool(arguments.before) != bool(arguments.after):
        parser.error("--before and --after go together")
    try:
        import matplotlib  # noqa: F401, needed for the plots alone
    except ImportError:
        raise ValueError("the plots need matplotlib: pip install matplotlib") from None

    run = read_run(arguments.run)
    runs = [found for found in (run, read_sft(run)) if found]
    folder = arguments.output or arguments.run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    sections = [run_section(each, folder) for each in runs]
    if arguments.before:
        sections.insert(0, evaluation_section((arguments.before, arguments.after), folder))
    title = text(f"Training report: {arguments.run}")
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    page = template.substitute(title=title, body="\n".join([f"<h1>{title}</h1>", *sections]))
    write_text(folder / "report.html", page)
    print(f"{folder / 'report.html'}: open it in a browser")


if __name__ == "__main__":
    cli.run(main)
