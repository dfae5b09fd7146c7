"""Compare two result files of eval.py, query by query."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from expander.eval.measure import COUNTED_LINES, FLAGS, summarize
from expander.files import read_json
from expander.queries import visible_text
from expander.statistics import CONFIDENCE, bootstrap, mean
from expander.text import printable, table
from reward import PARTS

SCHEMA = 1
# The embedded collection, by whose figures a model may be published.
GATE = "vault"
CHANGES_SHOWN = 10
NUMBER = (int, float)
# What is read of a results file: the types of its values, and of each value in a list.
SHAPE = {
    "model": (dict, type(None)),
    "decode": (dict,),
    "results": [
        {
            "query": (str,),
            "category": (str, type(None)),
            "trained_on": (bool,),
            "percentage": NUMBER,
            "samples": [
                {"text": (str,), "kept": NUMBER}
                | dict.fromkeys(FLAGS, (bool,))
                | {
                    "lines": dict.fromkeys(COUNTED_LINES, NUMBER),
                    "score": {"rating": (str,), "percentage": NUMBER}
                    | dict.fromkeys((*PARTS, "total", "max_possible"), NUMBER),
                }
            ],
        }
    ],
}
# Of the keys that not every file has: those of earlier versions, and of expansions that were only scored.
OPTIONAL = {"seed": (int,)}
MODEL_SHAPE = {"name": (str,), "base": (str,), "adapters_sha256": (dict,)}
RETRIEVAL_SHAPE = {"embedder": (str,), "per_query": [{"id": (str,), "expanded": NUMBER}]}


def _faults(value: object, shape: Mapping | list | tuple, place: str) -> Iterator[str]:
    """Where the value differs from the shape: "results[0].samples is missing"."""
    if isinstance(shape, tuple):
        is_switch = isinstance(value, bool) and bool not in shape
        if is_switch or not isinstance(value, shape):
            yield f"{place} is {value!r:.40}"
        elif shape is NUMBER and not abs(value) < 1e9:
            yield f"{place} is out of range"
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{place} is not a list of at least one"
        else:
            for index, item in enumerate(value):
                yield from _faults(item, shape[0], f"{place}[{index}]")
    elif not isinstance(value, dict):
        yield f"{place or 'the file'} is not an object"
    else:
        for name, inner in shape.items():
            inside = f"{place}.{name}" if place else name
            if name not in value:
                yield f"{inside} is missing"
            else:
                yield from _faults(value[name], inner, inside)


def _value_faults(record: dict) -> Iterator[str]:
    """Values of the right type that no evaluation writes."""
    results = record["results"]
    for index, result in enumerate(results):
        if not 0 <= result["percentage"] <= 100:
            yield f"results[{index}].percentage is {result['percentage']}"
    if len({visible_text(result["query"]) for result in results}) < len(results):
        yield "a query is in it twice"


def read_results(path: Path) -> dict:
    """Read a file that `eval.py -o` wrote.

    Raises:
        ValueError: it cannot be read, is not a results file, or has another schema version.
    """
    record = read_json(path)
    if "schema" not in record:
        raise ValueError(f"{path}: not a results file; create one with eval.py -o")
    if record["schema"] != SCHEMA or isinstance(record["schema"], bool):
        raise ValueError(
            f"{path}: its schema is {record['schema']!r:.40}, this version reads {SCHEMA}; "
            "evaluate again with -o"
        )
    retrieval = record.get("retrieval") or {}
    if not isinstance(retrieval, dict):
        raise ValueError(
            f"{path}: the results are incomplete or damaged: retrieval is not an object"
        )
    shape = SHAPE | {key: types for key, types in OPTIONAL.items() if key in record}
    if retrieval:
        shape["retrieval"] = dict.fromkeys(retrieval, RETRIEVAL_SHAPE)
    if isinstance(named := record.get("model"), dict):
        shape["model"] = {key: types for key, types in MODEL_SHAPE.items() if key in named}
    fault = next(_faults(record, shape, ""), None) or next(_value_faults(record), None)
    if fault:
        raise ValueError(
            f"{path}: the results are incomplete or damaged: {fault}; evaluate again with -o"
        )
    return record


def compare(a: dict, b: dict, seed: int) -> dict:
    """The differences B - A in percentage points, paired by query.

    Args:
        a, b: from `read_results`.
        seed: seed for the bootstrap intervals.

    Raises:
        ValueError: the two have no query in common.
    """
    sides = [
        {visible_text(result["query"]): result for result in record["results"]} for record in (a, b)
    ]
    common = [query for query in sides[0] if query in sides[1]]
    if not common:
        raise ValueError("--compare: the two files have no query in common")
    pairs = {query: (sides[0][query], sides[1][query]) for query in common}
    differences = {q: y["percentage"] - x["percentage"] for q, (x, y) in pairs.items()}
    values = list(differences.values())
    trained_on = {q for q, (x, y) in pairs.items() if x["trained_on"] or y["trained_on"]}
    unseen = [d for q, d in differences.items() if q not in trained_on]
    largest = sorted((q for q in common if differences[q]), key=lambda q: -abs(differences[q]))
    return {
        "queries": len(common),
        "only_a": len(sides[0]) - len(common),
        "only_b": len(sides[1]) - len(common),
        "settings": {
            name: [a["decode"].get(name), b["decode"].get(name)]
            for name in {**a["decode"], **b["decode"]}
            if a["decode"].get(name) != b["decode"].get(name)
        },
        "difference": mean(values),
        "interval": list(bootstrap(values, seed)),
        "wins": sum(value > 0 for value in values),
        "losses": sum(value < 0 for value in values),
        "ties": sum(value == 0 for value in values),
        "trained_on": len(trained_on),
        "difference_unseen": mean(unseen) if unseen else None,
        "summaries": [summarize([side[q] for q in common], seed) for side in sides],
        "retrieval": compare_retrieval(a, b, seed),
        "changes": [
            {"query": q, "difference": differences[q], "a": pairs[q][0], "b": pairs[q][1]}
            for q in largest[:CHANGES_SHOWN]
        ],
    }


def compare_retrieval(a: dict, b: dict, seed: int) -> dict[str, dict]:
    """Differences B - A in nDCG@10, paired by query, for each collection that both measured.

    Returns:
        By collection: "queries", "difference", "interval", and the numbers of queries that B finds
        "better" and "worse"; only "embedders" if the two have different vectors.
    """
    found = {}
    both = (a.get("retrieval") or {}, b.get("retrieval") or {})
    for name in [name for name in both[0] if name in both[1]]:
        sides = [retrieval[name] for retrieval in both]
        embedders = [side["embedder"] for side in sides]
        if embedders[0] != embedders[1]:
            found[name] = {"embedders": embedders}
            continue
        values = [{row["id"]: row["expanded"] for row in side["per_query"]} for side in sides]
        differences = [
            values[1][query] - values[0][query] for query in values[0] if query in values[1]
        ]
        if differences:
            found[name] = {
                "queries": len(differences),
                "difference": mean(differences),
                "interval": list(bootstrap(differences, seed)),
                "better": sum(value > 0 for value in differences),
                "worse": sum(value < 0 for value in differences),
            }
    return found


def format_retrieval_difference(retrieval: dict[str, dict]) -> list[str]:
    """A line per collection of `compare_retrieval`."""
    lines = []
    for name, result in retrieval.items():
        if "embedders" in result:
            a, b = result["embedders"]
            lines.append(f"search  {name}: not comparable, vectors by {a} and {b}")
            continue
        low, high = result["interval"]
        verdict = (
            "B finds more" if low > 0 else "A finds more" if high < 0 else "no difference shown"
        )
        lines.append(
            f"search  {name}: nDCG@10 {result['difference']:+.3f}  ({CONFIDENCE} % interval "
            f"{low:+.3f} to {high:+.3f}) over {result['queries']} queries: {verdict}"
        )
    return lines


def side_by_side(summaries: Sequence[dict]) -> list[tuple[str, ...]]:
    """Table rows: a figure's name, its values for A and B, and B - A."""

    def row(name: str, pick, form: str) -> tuple[str, ...]:
        a, b = map(pick, summaries)
        return name, f"{a:{form}}", f"{b:{form}}", f"{b - a:+{form}}"

    rows = [("", "A", "B", "B - A"), row("average %", lambda s: s["average"], ".1f")]
    rows += [
        row(name, lambda s, name=name: s["ratings"][name], "d") for name in summaries[0]["ratings"]
    ]
    rows += [row(flag.replace("_", " "), lambda s, f=flag: s["shares"][f], ".1%") for flag in FLAGS]
    rows += [
        row("lines per query", lambda s: sum(s["lines"].values()), ".2f"),
        row("lines QMD keeps", lambda s: s["qmd"]["kept"], ".2f"),
        row("share of lines kept", lambda s: s["qmd"]["kept_share"], ".1%"),
        row("falls back", lambda s: s["qmd"]["falls_back"], ".1%"),
        row("distinct lines", lambda s: s["texts"]["distinct"], ".1%"),
        row("shared with others", lambda s: s["texts"]["templates"], ".1%"),
        row("characters", lambda s: s["texts"]["characters"], ".0f"),
    ]
    return rows


def format_difference(result: dict) -> str:
    """The verdict of `compare` with its interval, and warnings that limit its validity."""
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
            + (f"without them {rest:+.2f} points" if rest is not None else "no others are left")
        )
    return "\n".join(out)


def format_comparison(names: Sequence[str], records: Sequence[dict], result: dict) -> str:
    """The comparison as text.

    Args:
        names: the two files, as they are shown.
        records: from `read_results`.
        result: from `compare`.
    """
    out = [
        f"{letter}: {name}  ({(record['model'] or {}).get('name', 'scored only')})"
        for letter, name, record in zip("AB", names, records, strict=True)
    ]
    out += ["", format_difference(result), *format_retrieval_difference(result["retrieval"])]
    out += ["", table(side_by_side(result["summaries"]))]
    if result["changes"]:
        out += ["", "largest changes:"]
    for change in result["changes"]:
        out += ["", f"{change['difference']:+.1f}  {printable(change['query'])}"]
        for letter in "ab":
            text = printable(change[letter]["samples"][0]["text"]).strip()
            out.append(f"  {letter.upper()} {change[letter]['percentage']:.1f} %")
            out += [f"    {line}" for line in text.split("\n") if line.strip()]
    return "\n".join(out)


def compare_files(paths: Sequence[Path], seed: int) -> str:
    """Compare two files that `eval.py -o` wrote; return the text to print."""
    records = [read_results(path) for path in paths]
    return format_comparison(list(map(str, paths)), records, compare(*records, seed))
