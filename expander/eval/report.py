"""What an evaluation says: each output measured, all of them summed up, as plain text.

Pure functions over results: no model, no file. Intervals are percentile bootstraps over queries and
not over samples, because the samples of one query are not independent.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from expander.nearness import SLOT, template_of
from expander.prompt import TYPES
from expander.qmd import kept_lines
from reward import (
    PARTS,
    RATINGS,
    clean_expansion,
    echoes,
    only_mode,
    parse_expansion,
    score_expansion_detailed,
)

RATING_NAMES = (*(name for _, name in RATINGS), "Failed")
LINE_TYPES = (*TYPES, "invalid")
FLAGS = ("valid", "truncated", "echoing", "empty", "wrong_language")
RESAMPLES, CONFIDENCE = 10_000, 95
LEAKS_SHOWN = 20
LINE_PREFIX = re.compile(rf"^\s*(?:{'|'.join(TYPES)})\s*:", re.MULTILINE)
WORD = re.compile(r"\w+")
# Scripts that are written together count as one.
JOINED_SCRIPTS = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}
# The least word Jaccard at which a line counts as the reference's line.
GOLDEN_THRESHOLDS = {"lex": 0.5, "vec": 0.35, "hyde": 0.25}


def script_counts(text: str) -> Counter[str]:
    """The letters of a text by script, which is the first word of a letter's Unicode name.

    >>> script_counts("Git コミット").most_common()
    [('CJK', 4), ('LATIN', 3)]
    """
    names = (unicodedata.name(char, "").partition(" ")[0] for char in text if char.isalpha())
    return Counter(JOINED_SCRIPTS.get(name, name) for name in names)


def in_wrong_language(query: str, text: str) -> bool:
    """Whether under a quarter of the lines' letters are in the query's script.

    That script is the most frequent one other than Latin when it has a quarter of the query's
    letters, because technical names are Latin everywhere. So an English answer to a Russian query
    is seen, and names in a line do no harm; German is not told from English.

    >>> in_wrong_language("настройка postgresql", "lex: postgresql settings")
    True
    >>> in_wrong_language("настройка postgresql", "lex: postgresql параметры")
    False
    """
    asked = script_counts(only_mode(query)[0])
    found = script_counts(LINE_PREFIX.sub("", text))
    if not asked or not found:
        return False
    script, letters = max(
        ((name, n) for name, n in asked.items() if name != "LATIN"),
        key=lambda entry: entry[1],
        default=("LATIN", asked.total()),
    )
    if letters < asked.total() / 4:
        script = "LATIN"
    return found[script] < found.total() / 4


def measure(query: str, text: str, truncated: bool = False) -> dict:
    """One output: its rubric score, its flaws, and what QMD would keep of it."""
    score = score_expansion_detailed(query, text)
    lines, valid = score.pop("parsed"), score.pop("valid")
    base, _ = only_mode(query)
    return {
        "text": text,
        "truncated": truncated,
        "valid": valid and bool(text.strip()),
        "empty": not text.strip(),
        "echoing": any(echoes(line, base) for line in lines["lex"] + lines["vec"]),
        "wrong_language": in_wrong_language(query, text),
        "lines": {kind: len(lines[kind]) for kind in LINE_TYPES},
        "kept": len(kept_lines(query, text)),
        "score": score,
    }


def result_of(query: str, category: str | None, samples: Sequence[dict]) -> dict:
    """One query's entry in the results: its score is the mean over its samples."""
    return {
        "query": query,
        "category": category,
        "trained_on": False,
        "percentage": mean(sample["score"]["percentage"] for sample in samples),
        "samples": list(samples),
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The percentile interval of the mean, at CONFIDENCE percent; `values` has one for each query."""
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # A hundred resamples at a time: all at once would be large for a long list of queries.
    means = [
        array[rng.integers(len(array), size=(100, len(array)))].mean(axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def average(results: Sequence[dict], seed: int) -> dict:
    scores = [result["percentage"] for result in results]
    return {
        "queries": len(scores),
        "average": mean(scores),
        "interval": list(bootstrap(scores, seed)),
    }


def summarize(results: Sequence[dict], seed: int) -> dict:
    """Every figure of the report. Shares go from 0 to 1 and count samples; averages count queries.

    Args:
        results: from `result_of`, at least one.
    """
    samples = [sample for result in results for sample in result["samples"]]
    scores = [sample["score"] for sample in samples]
    unseen = [result for result in results if not result["trained_on"]]
    categories: dict[str, list[dict]] = {}
    for result in results:
        categories.setdefault(result["category"] or "no category", []).append(result)
    lines = sum(sum(sample["lines"].values()) for sample in samples)
    return average(results, seed) | {
        "samples": len(samples),
        "unseen": average(unseen, seed) if unseen else None,
        "ratings": {n: sum(score["rating"] == n for score in scores) for n in RATING_NAMES},
        "parts": {part: mean(score[part] for score in scores) for part in PARTS},
        "total": mean(score["total"] for score in scores),
        "max_possible": mean(score["max_possible"] for score in scores),
        "shares": {flag: mean(sample[flag] for sample in samples) for flag in FLAGS},
        "lines": {kind: mean(sample["lines"][kind] for sample in samples) for kind in LINE_TYPES},
        "qmd": {
            "kept": mean(sample["kept"] for sample in samples),
            "kept_share": sum(sample["kept"] for sample in samples) / max(lines, 1),
            "falls_back": mean(not sample["kept"] for sample in samples),
        },
        "texts": text_figures(results),
        "categories": {name: average(of_one, seed) for name, of_one in categories.items()},
    }


def text_figures(results: Sequence[dict]) -> dict[str, float]:
    """What a rubric that judges one answer at a time does not see, over all samples of `results`.

    Returns:
        "distinct", the share of lines that repeat no earlier one of their answer; "templates", the
        share that stands in the answer to another query too, the queries' own words aside (it grows
        with the number of queries); "characters", the mean length of an answer.
    """
    distinct, lines, queries_of = 0, [], {}
    for result in results:
        query = only_mode(result["query"])[0]
        for sample in result["samples"]:
            parsed = parse_expansion(clean_expansion(sample["text"])[0])
            found = [(kind, text) for kind in TYPES for text in parsed[kind]]
            distinct += len({(kind, text.lower()) for kind, text in found})
            for kind, text in found:
                template = kind, template_of(text, query)
                lines.append(template)
                queries_of.setdefault(template, set()).add(query)
    templates = sum(len(queries_of[line]) > 1 and line[1] != SLOT for line in lines)
    return {
        "distinct": distinct / max(len(lines), 1),
        "templates": templates / max(len(lines), 1),
        "characters": mean(len(sample["text"]) for r in results for sample in r["samples"]),
    }


def match_lines(lines: Sequence[str], reference: Sequence[str], threshold: float) -> int:
    """How many lines are one of the reference's, each taken once, the closest pairs first.

    Two lines are as close as the Jaccard index of their sets of lower-case words.

    >>> match_lines(["auth settings", "login"], ["auth settings file", "cookies"], 0.5)
    1
    """
    ours, theirs = ([set(WORD.findall(x.lower())) for x in side] for side in (lines, reference))
    pairs = [
        (len(a & b) / max(len(a | b), 1), i, j)
        for i, a in enumerate(ours)
        for j, b in enumerate(theirs)
    ]
    used_ours, used_theirs = set(), set()
    for closeness, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if closeness >= threshold and i not in used_ours and j not in used_theirs:
            used_ours.add(i)
            used_theirs.add(j)
    return len(used_ours)


def compare_golden(
    results: Sequence[dict], references: Sequence[Sequence[tuple[str, str]]]
) -> dict:
    """Precision, recall and F1 of the lines by type and over all, counted over every sample.

    Args:
        references: the (type, text) lines wanted for each of the results.
    """
    counts = {kind: Counter() for kind in (*TYPES, "all")}
    for result, wanted in zip(results, references, strict=True):
        for sample in result["samples"]:
            parsed = parse_expansion(clean_expansion(sample["text"])[0])
            for kind, threshold in GOLDEN_THRESHOLDS.items():
                reference = [text for type_, text in wanted if type_ == kind]
                found = {
                    "matched": match_lines(parsed[kind], reference, threshold),
                    "lines": len(parsed[kind]),
                    "reference": len(reference),
                }
                counts[kind].update(found)
                counts["all"].update(found)
    return {
        "queries": len(results),
        "types": {
            kind: {
                "precision": n["matched"] / max(n["lines"], 1),
                "recall": n["matched"] / max(n["reference"], 1),
                "f1": 2 * n["matched"] / max(n["lines"] + n["reference"], 1),
            }
            for kind, n in counts.items()
        },
    }


def printable(text: str) -> str:
    """A model's text without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"  {first:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        for first, *rest in rows
    )


def format_average(figures: dict) -> str:
    low, high = figures["interval"]
    return f"{figures['average']:.1f} %  ({CONFIDENCE} % interval {low:.1f} to {high:.1f})"


def format_sample(query: str, sample: dict) -> str:
    """One output: its points, each line with what QMD does with it, every deduction."""
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
    """What is known of the queries that the model was trained on, one line an item."""
    out = []
    if leaks["queries"]:
        out.append(f"LEAK     {len(leaks['queries'])} of these queries were trained on:")
        out += [f"           {printable(query)}" for query in leaks["queries"][:LEAKS_SHOWN]]
        if len(leaks["queries"]) > LEAKS_SHOWN:
            out.append("           and so on: the results file has them all")
        if summary["unseen"]:
            out.append(f"         without them {format_average(summary['unseen'])}")
    elif leaks["checked"]:
        out.append(f"leaks    none of these queries was trained on, says {leaks['checked'][-1]}")
    out += [f"leaks    unknown for {folder}: it has no queries.json" for folder in leaks["unknown"]]
    if not leaks["checked"] and not leaks["unknown"]:
        out.append(
            "leaks    unknown: without an adapter there is no record of the training queries"
        )
    return "\n".join(out)


def format_summary(summary: dict, leaks: dict) -> str:
    """The summary; what decides stands first."""
    qmd, texts, counted = summary["qmd"], summary["texts"], f"{summary['queries']} queries"
    if summary["samples"] > summary["queries"]:
        counted += f", {summary['samples']} samples"
    parts = "  ".join(f"{part} {points:.1f}" for part, points in summary["parts"].items())
    shares = summary["shares"].items()
    rows = [("category", "queries", "average", f"{CONFIDENCE} % interval")]
    for name, of_one in summary["categories"].items():
        low, high = of_one["interval"]
        rows.append(
            (name, str(of_one["queries"]), f"{of_one['average']:.1f} %", f"{low:.1f} to {high:.1f}")
        )
    return "\n".join(
        [
            f"average  {format_average(summary)}, {counted}",
            "ratings  " + "  ".join(f"{name} {n}" for name, n in summary["ratings"].items()),
            f"QMD      would keep {qmd['kept']:.2f} lines a query ({qmd['kept_share']:.1%} of them) "
            f"and fall back to the raw query for {qmd['falls_back']:.1%}",
            format_leaks(summary, leaks),
            "",
            "outputs  " + "  ".join(f"{name.replace('_', ' ')} {x:.1%}" for name, x in shares),
            "lines    " + "  ".join(f"{kind} {n:.2f}" for kind, n in summary["lines"].items()),
            f"texts    distinct lines {texts['distinct']:.1%}  shared with other queries "
            f"{texts['templates']:.1%}  characters {texts['characters']:.0f}",
            f"points   {parts}  total {summary['total']:.1f} of {summary['max_possible']:.1f}",
            "",
            table(rows),
        ]
    )


def format_golden(figures: dict) -> str:
    rows = [(f"golden, {figures['queries']} queries", "precision", "recall", "F1")]
    rows += [
        (kind, f"{x['precision']:.1%}", f"{x['recall']:.1%}", f"{x['f1']:.1%}")
        for kind, x in figures["types"].items()
    ]
    return table(rows)
