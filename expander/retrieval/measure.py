"""Does an expansion find more? Judged search results with and without it, as figures and as text.

`judge` searches a collection with the bare query, with a baseline that needs no model, and with
expansions, and compares them by nDCG@10, recall@20 and MRR (ir-measures, trec_eval's definitions).
It neither decodes nor reads files.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import ir_measures
from ir_measures import RR, R, nDCG

from expander.prompt import TYPES
from expander.qmd import JS_WHITESPACE, falls_back
from expander.retrieval.collection import Collection
from expander.retrieval.index import Searcher, searched_lines
from expander.statistics import CONFIDENCE, bootstrap, mean
from expander.text import printable, table

MEASURES = {"ndcg@10": nDCG @ 10, "recall@20": R @ 20, "mrr": RR}
NAMES = {str(measure): name for name, measure in MEASURES.items()}
DECIDING = "ndcg@10"
RAREST = 3  # words of the baseline
SHOWN = 3  # worst and best queries
TIE = 1e-9

Lines = Sequence[tuple[str, str]]
# A query id's figures by the names of MEASURES.
Scores = dict[str, dict[str, float]]


class Judge:
    """The measures of rankings against one collection's judgements."""

    def __init__(self, collection: Collection):
        self.qrels, self.judged_only = collection.qrels, collection.judged_only
        self._evaluator = ir_measures.evaluator(MEASURES.values(), collection.qrels)

    def scores(self, rankings: Mapping[str, Sequence[str]]) -> Scores:
        """nDCG@10, recall@20 and MRR of document ids, best first, by query id.

        Queries without judgements are left out. With `judged_only`, so are unjudged documents.
        """
        run, scores = {}, {}
        for query, ranking in rankings.items():
            if query not in self.qrels:
                continue
            if self.judged_only:
                ranking = [document for document in ranking if document in self.qrels[query]]
            # trec_eval orders by score, and equal scores by document id: give every rank its own.
            run[query] = {document: float(-rank) for rank, document in enumerate(ranking)}
            scores[query] = dict.fromkeys(MEASURES, 0.0)
        for metric in self._evaluator.iter_calc({q: r for q, r in run.items() if r}):
            if metric.query_id in scores:
                scores[metric.query_id][NAMES[str(metric.measure)]] = metric.value
        return scores


def baseline_lines(query: str, frequency: Callable[[str], int]) -> list[tuple[str, str]]:
    """Lex lines that need no model: the pairs of the query's three rarest words.

    Words are what QMD would search for; those that no document matches are left out, and so is a
    pair that is the whole query.

    Args:
        frequency: word → number of documents that match it (`Searcher.frequency`).

    >>> counts = {"how": 90, "sync": 5, "two": 40, "calendars": 2}
    >>> baseline_lines("how sync two calendars", counts.get)
    [('lex', 'sync two'), ('lex', 'sync calendars'), ('lex', 'two calendars')]
    """
    words = [word.strip(JS_WHITESPACE) for word in query.replace('"', " ").split()]
    counts = {word: frequency(word) for word in words if not word.startswith("-")}
    rarest = sorted((word for word in counts if counts[word]), key=counts.get)[:RAREST]
    pairs = combinations([word for word in counts if word in rarest], 2)
    return [("lex", pair) for pair in map(" ".join, pairs) if pair != query]


def judge(
    collection: Collection,
    searcher: Searcher,
    expansions: Mapping[str, Sequence[str]],
    seed: int = 42,
) -> dict:
    """Measure expansions on a collection; the result is what JSON can hold.

    Only queries that are judged, expanded, and that QMD would not skip (`skips_expansion`) count. A
    query's figure is the mean over its samples; "worst" takes each query's worst sample by nDCG@10.

    Args:
        searcher: of the collection's documents.
        expansions: query id → raw completions, one or more samples.
        seed: for the confidence intervals, which are paired and over queries.

    Returns:
        "bare", "baseline" and "expanded", each with the means "ndcg@10", "recall@20" and "mrr"; all
        but "bare" with "gain" over it: mean, interval, and the shares of queries that are better
        and worse by nDCG@10. The same by line "types" and for the "worst" sample; counts of
        "queries" and "lines"; every query's nDCG@10 and expansions in "per_query"; "worst_queries"
        and "best_queries" with their lines.

    Raises:
        ValueError: no query is left to measure.
    """
    texts = collection.queries
    judged = [query for query in texts if query in collection.qrels]
    asked = [query for query in judged if not searcher.skips_expansion(texts[query])]
    queries = [query for query in asked if expansions.get(query)]
    if not queries:
        raise ValueError(
            f"collection {collection.name}: nothing to measure; of its {len(judged)} judged queries "
            f"QMD would expand {len(asked)}, and none of those has an expansion"
        )
    lines = {q: [searched_lines(texts[q], text) for text in expansions[q]] for q in queries}
    every = [line for samples in lines.values() for sample in samples for line in sample]
    searcher.prepare([texts[query] for query in queries])
    searcher.prepare(text for kind, text in every if kind != "lex")
    scorer = Judge(collection)

    def measured(lines: Mapping[str, Sequence[Lines]]) -> dict[str, list[dict[str, float]]]:
        return score_samples(scorer, searcher, texts, lines)

    def only(kind: str) -> dict[str, list[Lines]]:
        return {q: [[x for x in sample if x[0] == kind] for sample in lines[q]] for q in queries}

    bare = _mean_scores(measured({query: [()] for query in queries}))
    baseline = {q: [baseline_lines(texts[q], searcher.frequency)] for q in queries}
    samples = measured(lines)
    means = _mean_scores(samples)
    worst = {query: min(found, key=lambda x: x[DECIDING]) for query, found in samples.items()}
    systems = {"baseline": _mean_scores(measured(baseline)), "expanded": means, "worst": worst}
    types = {kind: _mean_scores(measured(only(kind))) for kind in TYPES} | {"all": means}
    per_query = [
        {"id": query, "query": texts[query], "bare": bare[query][DECIDING]}
        | {name: scores[query][DECIDING] for name, scores in systems.items()}
        | {"expansions": list(expansions[query])}
        for query in queries
    ]
    losses, wins = _extremes(per_query)
    for row in losses + wins:
        query, choose = row["id"], min if row in losses else max
        number = choose(range(len(lines[query])), key=lambda n: samples[query][n][DECIDING])
        row["lines"] = _shown_lines(lines[query][number], searcher)
    return {
        "collection": collection.name,
        "documents": len(collection.documents),
        "embedder": searcher.embedder,
        "judged_only": collection.judged_only,
        "queries": {
            "judged": len(judged),
            "without_expansion": len(asked) - len(queries),
            "strong_signal": len(judged) - len(asked),
            "measured": len(queries),
        },
        "samples": sum(map(len, lines.values())),
        "bare": _means(bare),
        **{name: _means(x) | {"gain": gain(x, bare, seed)} for name, x in systems.items()},
        "types": {kind: _means(x) | {"gain": gain(x, bare, seed)} for kind, x in types.items()},
        "lines": _line_figures(
            every, [falls_back(texts[q], x) for q in queries for x in expansions[q]], searcher
        ),
        "per_query": per_query,
        "worst_queries": losses,
        "best_queries": wins,
    }


def score_samples(
    scorer: Judge,
    searcher: Searcher,
    texts: Mapping[str, str],
    lines: Mapping[str, Sequence[Lines]],
) -> dict[str, list[dict[str, float]]]:
    """The figures of each sample of each query.

    Args:
        texts: query id → query.
        lines: query id → the searched lines of each of its samples.
    """
    found: dict[str, list[dict[str, float]]] = {query: [] for query in lines}
    for number in range(max(map(len, lines.values()))):
        rankings = {
            query: searcher.search(texts[query], samples[number])
            for query, samples in lines.items()
            if number < len(samples)
        }
        for query, figures in scorer.scores(rankings).items():
            found[query].append(figures)
    return found


def gain(scores: Scores, bare: Scores, seed: int) -> dict:
    """How much better `scores` are than those of the bare queries.

    Returns:
        For each measure "mean" and "interval" of the paired difference, at 95 %; "better" and
        "worse", the shares of queries by nDCG@10, from 0 to 1.
    """
    differences = {
        name: [scores[query][name] - bare[query][name] for query in bare] for name in MEASURES
    }
    return {
        name: {"mean": mean(values), "interval": list(bootstrap(values, seed))}
        for name, values in differences.items()
    } | {
        "better": mean(value > TIE for value in differences[DECIDING]),
        "worse": mean(value < -TIE for value in differences[DECIDING]),
    }


def _mean_scores(samples: Mapping[str, Sequence[dict[str, float]]]) -> Scores:
    return {
        query: {name: mean(figures[name] for figures in found) for name in MEASURES}
        for query, found in samples.items()
    }


def _means(scores: Scores) -> dict[str, float]:
    return {name: mean(figures[name] for figures in scores.values()) for name in MEASURES}


def _line_figures(lines: Lines, gave_up: Sequence[bool], searcher: Searcher) -> dict:
    """Lines that QMD searches with, by type per expansion; lex lines without a hit; fallbacks.

    Args:
        lines: of all expansions.
        gave_up: for each expansion, whether QMD keeps none of its lines.
    """
    lex = [text for kind, text in lines if kind == "lex"]
    return {
        "searched": {kind: sum(x == kind for x, _ in lines) / len(gave_up) for kind in TYPES},
        "lex": len(lex),
        "lex_without_hit": sum(not searcher.hits(text) for text in lex),
        "falls_back": mean(gave_up),
    }


def _extremes(per_query: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Copies of the rows with the largest losses and with the largest gains."""
    ordered = sorted(per_query, key=lambda row: row["expanded"] - row["bare"])
    losses = [dict(row) for row in ordered[:SHOWN] if row["expanded"] - row["bare"] < -TIE]
    wins = [dict(row) for row in ordered[::-1][:SHOWN] if row["expanded"] - row["bare"] > TIE]
    return losses, wins


def _shown_lines(lines: Lines, searcher: Searcher) -> list[dict]:
    return [
        {
            "type": kind,
            "text": text,
            "hits": len(searcher.hits(text) if kind == "lex" else searcher.nearest(text)),
        }
        for kind, text in lines
    ]


# As text


def format_retrieval(result: dict) -> str:
    """The result of `judge` for a terminal: a table, what became of the lines, a few queries."""
    queries, lines = result["queries"], result["lines"]
    many = result["samples"] > queries["measured"]
    rows = [
        ("", "nDCG@10", "recall@20", "MRR", f"gain, {CONFIDENCE} % interval", "better", "worse")
    ]
    rows.append(_row("bare query", result["bare"]))
    rows.append(_row("baseline without a model", result["baseline"]))
    rows.append(_row("expanded", result["expanded"]))
    if many:
        rows.append(_row("  worst sample", result["worst"]))
    rows += [_row(f"  {kind} lines only", result["types"][kind]) for kind in TYPES]
    left_out = [
        f"{queries[key]} {reason}"
        for key, reason in (
            ("strong_signal", "that QMD would not expand (strong signal)"),
            ("without_expansion", "without an expansion"),
        )
        if queries[key]
    ]
    searched = "  ".join(f"{kind} {count:.2f}" for kind, count in lines["searched"].items())
    share = lines["lex_without_hit"] / max(lines["lex"], 1)
    out = [
        f"{result['collection']}: {result['documents']} documents, {queries['measured']} queries"
        + (f", {result['samples']} expansions" if many else "")
        + f", vectors by {result['embedder']}",
        *([f"left out: {', '.join(left_out)}"] if left_out else []),
        *(["documents that nobody judged are left out"] if result["judged_only"] else []),
        "",
        *map(str.rstrip, table(rows).split("\n")),
        "",
        f"verdict  {verdict(result['expanded']['gain'])}",
        f"lines    searched per expansion: {searched}",
        f"         {share:.0%} of {lines['lex']} lex lines found nothing; nothing kept from "
        f"{lines['falls_back']:.0%} of the expansions",
    ]
    for title, shown in (("worst", result["worst_queries"]), ("best", result["best_queries"])):
        for row in shown:
            change = row["expanded"] - row["bare"]
            out += [
                "",
                f"{title:<6} {change:+.3f}  {row['bare']:.3f} to {row['expanded']:.3f}  "
                f"{printable(row['query'])[:60]}",
            ]
            for line in row["lines"]:
                text = printable(line["text"])
                text = f"{text[:69]}…" if len(text) > 70 else text
                out.append(f"  found {line['hits']:>2}  {line['type']}: {text}")
    return "\n".join(out)


def verdict(figures: dict) -> str:
    """What the interval of the nDCG@10 gain over the bare query allows to say."""
    low, high = figures[DECIDING]["interval"]
    if low > 0:
        return "the expansions improve the search"
    return "the expansions make the search worse" if high < 0 else "no difference shown"


def _row(name: str, figures: dict) -> tuple[str, ...]:
    cells = [f"{figures[measure]:.3f}" for measure in MEASURES]
    if "gain" not in figures:
        return name, *cells, "", "", ""
    change = figures["gain"][DECIDING]
    low, high = change["interval"]
    return (
        name,
        *cells,
        f"{change['mean']:+.3f} ({low:+.3f} to {high:+.3f})",
        f"{figures['gain']['better']:.0%}",
        f"{figures['gain']['worse']:.0%}",
    )
