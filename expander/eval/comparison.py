"""Two results files of eval.py compared, query by query."""

import json
from collections.abc import Sequence
from pathlib import Path

from expander.eval.report import CONFIDENCE, FLAGS, bootstrap, mean, printable, summarize, table

SCHEMA = 1
SHOWN = 10
RESULT_KEYS = {"query", "category", "trained_on", "percentage", "samples"}


def read_results(path: Path) -> dict:
    """A results file that this version understands.

    Raises:
        ValueError: unreadable, no results file, or of another schema version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(f"{path}: not a results file; write one with eval.py -o")
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"{path}: its schema is {record['schema']!r}, this version reads {SCHEMA}; "
            "evaluate again with -o"
        )
    results = record.get("results")
    complete = isinstance(results, list) and {"model", "decode"} <= record.keys()
    if not complete or not all(isinstance(x, dict) and x.keys() >= RESULT_KEYS for x in results):
        raise ValueError(f"{path}: the results are incomplete; evaluate again with -o")
    return record


def compare(a: dict, b: dict, seed: int) -> dict:
    """B less A, paired by query.

    Args:
        a, b: from `read_results`.

    Raises:
        ValueError: no query is in both.
    """
    of_a, of_b = ({result["query"]: result for result in x["results"]} for x in (a, b))
    common = [query for query in of_a if query in of_b]
    if not common:
        raise ValueError("--compare: the two files have no query in common")
    differences = {q: of_b[q]["percentage"] - of_a[q]["percentage"] for q in common}
    values = list(differences.values())
    unseen = [d for q, d in differences.items() if not _seen(of_a[q], of_b[q])]
    largest = sorted((q for q in common if differences[q]), key=lambda q: -abs(differences[q]))
    settings = {**a["decode"], **b["decode"]}
    return {
        "queries": len(common),
        "only_a": len(of_a) - len(common),
        "only_b": len(of_b) - len(common),
        "settings": {
            name: [a["decode"].get(name), b["decode"].get(name)]
            for name in settings
            if a["decode"].get(name) != b["decode"].get(name)
        },
        "difference": mean(values),
        "interval": list(bootstrap(values, seed)),
        "wins": sum(value > 0 for value in values),
        "losses": sum(value < 0 for value in values),
        "ties": sum(value == 0 for value in values),
        "trained_on": len(common) - len(unseen),
        "difference_unseen": mean(unseen) if unseen else None,
        "summaries": [summarize([of_[q] for q in common], seed) for of_ in (of_a, of_b)],
        "changes": [
            {"query": q, "difference": differences[q], "a": of_a[q], "b": of_b[q]}
            for q in largest[:SHOWN]
        ],
    }


def _seen(a: dict, b: dict) -> bool:
    return a["trained_on"] or b["trained_on"]


def side_by_side(summaries: Sequence[dict]) -> list[tuple[str, ...]]:
    """The figures of A and B side by side, and B less A."""

    def row(name: str, pick, form: str) -> tuple[str, ...]:
        a, b = map(pick, summaries)
        return name, f"{a:{form}}", f"{b:{form}}", f"{b - a:+{form}}"

    rows = [("", "A", "B", "B - A"), row("average %", lambda s: s["average"], ".1f")]
    rows += [
        row(name, lambda s, name=name: s["ratings"][name], "d") for name in summaries[0]["ratings"]
    ]
    rows += [row(flag.replace("_", " "), lambda s, f=flag: s["shares"][f], ".1%") for flag in FLAGS]
    rows += [
        row("lines a query", lambda s: sum(s["lines"].values()), ".2f"),
        row("lines QMD keeps", lambda s: s["qmd"]["kept"], ".2f"),
        row("share of lines kept", lambda s: s["qmd"]["kept_share"], ".1%"),
        row("falls back", lambda s: s["qmd"]["falls_back"], ".1%"),
        row("distinct lines", lambda s: s["texts"]["distinct"], ".1%"),
        row("shared with others", lambda s: s["texts"]["templates"], ".1%"),
        row("characters", lambda s: s["texts"]["characters"], ".0f"),
    ]
    return rows


def format_difference(result: dict) -> str:
    """The verdict of `compare` with its interval, and what speaks against trusting it."""
    out = []
    if result["settings"]:
        differing = (f"{name} {a} and {b}" for name, (a, b) in result["settings"].items())
        out.append(f"warning: A and B were decoded differently: {', '.join(differing)}")
    low, high = result["interval"]
    verdict = (
        "B scores higher" if low > 0 else "A scores higher" if high < 0 else "no difference shown"
    )
    out += [
        f"B - A  {result['difference']:+.2f} points  ({CONFIDENCE} % interval {low:+.2f} to "
        f"{high:+.2f}): {verdict}",
        f"B wins {result['wins']}, loses {result['losses']}, ties {result['ties']} of "
        f"{result['queries']} queries; {result['only_a']} are only in A, {result['only_b']} only in B",
    ]
    if result["trained_on"]:
        rest = result["difference_unseen"]
        out.append(
            f"LEAK: A or B was trained on {result['trained_on']} of them; "
            + (f"without these {rest:+.2f} points" if rest is not None else "none is left without")
        )
    return "\n".join(out)


def format_comparison(names: tuple[str, str], records: tuple[dict, dict], result: dict) -> str:
    out = [
        f"{letter}: {name}  ({(record['model'] or {}).get('name', 'scored only')})"
        for letter, name, record in zip("AB", names, records, strict=True)
    ]
    out += ["", format_difference(result), "", table(side_by_side(result["summaries"]))]
    if result["changes"]:
        out += ["", "largest changes:"]
    for change in result["changes"]:
        out += ["", f"{change['difference']:+.1f}  {printable(change['query'])}"]
        for letter in "ab":
            text = printable(change[letter]["samples"][0]["text"]).strip()
            out.append(f"  {letter.upper()} {change[letter]['percentage']:.1f} %")
            out += [f"    {line}" for line in text.split("\n") if line.strip()]
    return "\n".join(out)
