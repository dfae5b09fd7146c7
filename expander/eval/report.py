"""An evaluation as plain text."""

from expander.prompt import TYPES
from expander.qmd import kept_lines
from expander.statistics import CONFIDENCE
from expander.text import printable, table
from reward import PARTS

LEAKS_SHOWN = 20
MISMATCHES_SHOWN = 3


def format_average(figures: dict) -> str:
    low, high = figures["interval"]
    return f"{figures['average']:.1f} %  ({CONFIDENCE} % interval {low:.1f} to {high:.1f})"


def format_sample(query: str, sample: dict) -> str:
    """One expansion: points, each line with whether QMD keeps it, and deductions."""
    score = sample["score"]
    points = "  ".join(f"{part} {score[part]}" for part in PARTS)
    cut_off = "; cut off at the token limit" if sample["truncated"] else ""
    out = [
        printable(query),
        f"  {score['percentage']:.1f} % {score['rating']}{cut_off}",
        f"  {score['total']} of {score['max_possible']} points: {points}",
    ]
    for line in filter(str.strip, sample["text"].split("\n")):
        out.append(f"  {'keeps' if kept_lines(query, line) else 'drops'}  {printable(line)}")
    out += [f"  -      {printable(fault)}" for fault in score["deductions"]]
    return "\n".join(out) + "\n"


def format_leaks(summary: dict, leaks: dict) -> str:
    """Which evaluated queries the model was trained on, as far as its adapters record it."""
    out = []
    if leaks["queries"]:
        out.append(f"LEAK     trained on {len(leaks['queries'])} of these queries:")
        out += [f"           {printable(query)}" for query in leaks["queries"][:LEAKS_SHOWN]]
        if len(leaks["queries"]) > LEAKS_SHOWN:
            out.append("           ... the file written with -o lists them all")
        if summary["unseen"]:
            out.append(f"         without them {format_average(summary['unseen'])}")
    elif leaks["checked"]:
        folder = leaks["checked"][-1]
        out.append(f"leaks    none of these queries is in the training record of {folder}")
    out += [f"leaks    unknown for {folder}: it has no queries.json" for folder in leaks["unknown"]]
    if not leaks["checked"] and not leaks["unknown"]:
        out.append("leaks    unknown: a model without adapters has no record of training queries")
    return "\n".join(out)


def format_categories(categories: dict) -> str:
    rows = [("category", "queries", "average", f"{CONFIDENCE} % interval")]
    for name, figures in categories.items():
        low, high = figures["interval"]
        average = f"{figures['average']:.1f} %"
        rows.append((name, str(figures["queries"]), average, f"{low:.1f} to {high:.1f}"))
    return table(rows)


def format_summary(summary: dict, leaks: dict) -> str:
    """The figures of `summarize`, most important first."""
    qmd, texts, counted = summary["qmd"], summary["texts"], f"{summary['queries']} queries"
    if summary["samples"] > summary["queries"]:
        counted += f", {summary['samples']} samples"
    parts = "  ".join(f"{part} {points:.1f}" for part, points in summary["parts"].items())
    shares = summary["shares"].items()
    return "\n".join(
        [
            f"average  {format_average(summary)}, {counted}",
            "ratings  " + "  ".join(f"{name} {n}" for name, n in summary["ratings"].items()),
            f"QMD      would keep {qmd['kept']:.2f} lines per query ({qmd['kept_share']:.1%} of them) "
            f"and fall back to the raw query for {qmd['falls_back']:.1%}",
            format_leaks(summary, leaks),
            "",
            "outputs  " + "  ".join(f"{name.replace('_', ' ')} {x:.1%}" for name, x in shares),
            "lines    " + "  ".join(f"{kind} {n:.2f}" for kind, n in summary["lines"].items()),
            f"texts    distinct lines {texts['distinct']:.1%}  shared with other queries "
            f"{texts['templates']:.1%}  characters {texts['characters']:.0f}",
            f"points   {parts}  total {summary['total']:.1f} of {summary['max_possible']:.1f}",
            "",
            format_categories(summary["categories"]),
        ]
    )


def format_golden(figures: dict, mismatches: bool) -> str:
    """Word overlap with the references by type, and examples of lines without a match."""
    rows = [(f"golden, {figures['queries']} queries", "precision", "recall", "F1")]
    rows += [
        (kind, f"{x['precision']:.1%}", f"{x['recall']:.1%}", f"{x['f1']:.1%}")
        for kind, x in figures["types"].items()
    ]
    if not mismatches:
        return table(rows)
    out = [table(rows)]
    for kind in TYPES:
        found = [x for x in figures["mismatches"] if x["type"] == kind]
        out += ["", f"{kind}: {len(found)} expansions with lines that do not match"]
        for each in found[:MISMATCHES_SHOWN]:
            out.append(f"  {printable(each['query'])}")
            out += [f"    only here       {printable(text)}" for text in each["lines"]]
            out += [f"    only reference  {printable(text)}" for text in each["reference"]]
    return "\n".join(out)


def format_retrieval(retrieval: dict[str, dict]) -> str:
    """nDCG@10 of the bare query, the baseline without a model and the expansions, by collection."""
    rows = [
        ("collection", "queries", "bare", "baseline", "expanded", f"gain, {CONFIDENCE} % interval")
    ]
    for name, found in retrieval.items():
        change = found["expanded"]["gain"]["ndcg@10"]
        low, high = change["interval"]
        cells = [f"{found[system]['ndcg@10']:.3f}" for system in ("bare", "baseline", "expanded")]
        queries = str(found["queries"]["measured"])
        rows.append((name, queries, *cells, f"{change['mean']:+.3f} ({low:+.3f} to {high:+.3f})"))
    return table(rows)


def format_speed(speed: dict) -> str:
    alone = speed["alone"]
    return (
        f"speed    {speed['tokens_per_second']:.0f} tokens/s: {speed['tokens']} in "
        f"{speed['seconds']:.1f} s, up to {speed['batch_size']} rows at once; the first query "
        f"alone: {alone['tokens']} in {alone['seconds']:.1f} s"
    )


def format_record(record: dict, samples: bool, summary: bool, mismatches: bool = False) -> str:
    """An evaluation's report.

    Args:
        samples: include every expansion.
        summary: include the summary; otherwise only what is known about leaks.
        mismatches: include examples of lines that match no reference line.
    """
    out = []
    if samples:
        out += [
            format_sample(x["query"], sample) for x in record["results"] for sample in x["samples"]
        ]
    if model := record["model"]:
        out.append(f"{model['name']}: {' + '.join([model['base'], *model['adapters_sha256']])}")
    out.append(
        "decoding " + "  ".join(f"{name} {value}" for name, value in record["decode"].items())
    )
    format_figures = format_summary if summary else format_leaks
    out.append(format_figures(record["summary"], record["leaks"]))
    if record["speed"]:
        out += ["", format_speed(record["speed"])]
    if record["golden"]:
        out += ["", format_golden(record["golden"], mismatches)]
    return "\n".join(out)
