"""Evaluation figures: one expansion measured, all of them summarised, compared with references.

Pure functions: no model, no files.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from expander.nearness import SLOT, template_of
from expander.prompt import TYPES
from expander.qmd import kept_lines
from expander.statistics import bootstrap, mean
from expander.text import in_wrong_language
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
COUNTED_LINES = (*TYPES, "invalid")
FLAGS = ("valid", "truncated", "echoing", "empty", "wrong_language")
WORD = re.compile(r"\w+")

Queries = Sequence[tuple[str, str | None]]  # (query, category)
References = Mapping[str, Sequence[tuple[str, str]]]  # query → (type, text) lines


class Expansion(NamedTuple):
    """One sampled text; `truncated` if it was cut off at the token limit."""

    text: str
    truncated: bool = False


def measure(query: str, text: str, truncated: bool = False) -> dict:
    """Measure one expansion: its score, its flags, and how many lines QMD would keep."""
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
        "lines": {kind: len(lines[kind]) for kind in COUNTED_LINES},
        "kept": len(kept_lines(query, text)),
        "score": score,
    }


def result_of(query: str, category: str | None, samples: Sequence[dict]) -> dict:
    """One query's entry in the results; its score is the mean over its samples.

    Args:
        samples: from `measure`, at least one.
    """
    return {
        "query": query,
        "category": category,
        "trained_on": False,
        "percentage": mean(sample["score"]["percentage"] for sample in samples),
        "samples": list(samples),
    }


def measure_all(queries: Queries, expansions: Sequence[Sequence[Expansion]]) -> list[dict]:
    """The results of all queries, given the expansions of each."""
    return [
        result_of(query, category, [measure(query, *expansion) for expansion in samples])
        for (query, category), samples in zip(queries, expansions, strict=True)
    ]


def average(results: Sequence[dict], seed: int) -> dict:
    scores = [result["percentage"] for result in results]
    return {
        "queries": len(scores),
        "average": mean(scores),
        "interval": list(bootstrap(scores, seed)),
    }


def summarize(results: Sequence[dict], seed: int) -> dict:
    """All figures of the report. Shares are between 0 and 1.

    Averages and intervals are over queries; points, shares and line counts are over samples.

    Args:
        results: from `result_of`, at least one.
        seed: of the bootstrap intervals.
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
        "lines": {
            kind: mean(sample["lines"][kind] for sample in samples) for kind in COUNTED_LINES
        },
        "qmd": {
            "kept": mean(sample["kept"] for sample in samples),
            "kept_share": sum(sample["kept"] for sample in samples) / max(lines, 1),
            "falls_back": mean(not sample["kept"] for sample in samples),
        },
        "texts": text_figures(results),
        "categories": {name: average(group, seed) for name, group in categories.items()},
    }


def text_figures(results: Sequence[dict]) -> dict[str, float]:
    """Figures that a rubric cannot see because it scores one expansion at a time.

    Returns:
        "distinct": share of lines that differ from the earlier lines of their expansion;
        "templates": share of lines that another query's expansion has too, apart from the words
        of the queries (it grows with the number of queries);
        "characters": mean length of an expansion.
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


def match_lines(
    lines: Sequence[str], reference: Sequence[str], threshold: float
) -> list[tuple[int, int]]:
    """The lines that match a reference line, one to one, closest pairs first, as pairs of indices.

    Closeness is the Jaccard index of the two lines' sets of lower-case words.

    >>> match_lines(["login", "auth settings"], ["auth settings file", "cookies"], 0.5)
    [(1, 0)]
    """
    ours, theirs = ([set(WORD.findall(x.lower())) for x in side] for side in (lines, reference))
    pairs = [
        (len(a & b) / max(len(a | b), 1), i, j)
        for i, a in enumerate(ours)
        for j, b in enumerate(theirs)
    ]
    matched: dict[int, int] = {}
    for closeness, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if closeness >= threshold and i not in matched and j not in matched.values():
            matched[i] = j
    return list(matched.items())


def compare_golden(
    results: Sequence[dict], references: References, thresholds: Mapping[str, float]
) -> dict:
    """Precision, recall and F1 of the lines by type and for all types, over every sample.

    Results without a reference are left out.

    Args:
        thresholds: by type, the minimum closeness of lines that match.

    Returns:
        "queries", "thresholds", "types", and under "mismatches" the lines without a match.
    """
    results = [result for result in results if result["query"] in references]
    counts = {kind: Counter() for kind in (*TYPES, "all")}
    mismatches = []
    for result in results:
        wanted = references[result["query"]]
        for sample in result["samples"]:
            parsed = parse_expansion(clean_expansion(sample["text"])[0])
            for kind in TYPES:
                lines = parsed[kind]
                reference = [text for type_, text in wanted if type_ == kind]
                matched = dict(match_lines(lines, reference, thresholds[kind]))
                found = {"matched": len(matched), "lines": len(lines), "reference": len(reference)}
                counts[kind].update(found)
                counts["all"].update(found)
                extra = [text for i, text in enumerate(lines) if i not in matched]
                missing = [x for j, x in enumerate(reference) if j not in matched.values()]
                if extra or missing:
                    query = result["query"]
                    mismatches.append(
                        {"query": query, "type": kind, "lines": extra, "reference": missing}
                    )
    return {
        "queries": len(results),
        "thresholds": dict(thresholds),
        "types": {
            kind: {
                "precision": n["matched"] / max(n["lines"], 1),
                "recall": n["matched"] / max(n["reference"], 1),
                "f1": 2 * n["matched"] / max(n["lines"] + n["reference"], 1),
            }
            for kind, n in counts.items()
        },
        "mismatches": mismatches,
    }
