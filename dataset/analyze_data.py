"""What a data set is made of: lengths, categories, languages, repetition, near-duplicates.

    python dataset/analyze_data.py                          the rows of data/
    python dataset/analyze_data.py rows.jsonl --top 20

Categories are the rows' own labels, and beside them what a rule finds in the queries alone; the
rules overlap, and those on wording know English only. A language is the row's label, or else the
script. What a row is worth by the rubric, score_data.py says.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root

from expander import cli
from expander.nearness import SLOT, WORD, near_duplicates, template_of
from expander.prompt import TYPES, render_lines
from expander.queries import ONLY_SUFFIX, base_query, normal_query
from expander.rows import DATA, Example, read_files
from reward import extract_named_entities, only_mode

NGRAM = 4  # words
# A sentence is a template when it stands in so many rows, the words of their queries aside.
TEMPLATE_ROWS, TEMPLATE_WORDS = 3, 4
ENGLISH = frozenset("the and of to for with what how which why when does do is are from".split())


def wording(pattern: str) -> Callable[[str], bool]:
    found = re.compile(pattern, re.IGNORECASE)
    return lambda query: found.search(query) is not None


# By the query without its /only: suffix, in its own case.
RULES: dict[str, Callable[[str], bool]] = {
    "short": lambda query: len(query.split()) <= 2,
    "entities": lambda query: bool(extract_named_entities(query)),
    "personal": wording(r"\b(my|our|i|we|me|us|mine|mum|dad|grandma|meeting|diary|journal)\b|'s\b"),
    "how-to": wording(
        r"\bhow (to|do|can|should)\b|^(add|bake|block|build|change|choose|clean|compile|configure"
        r"|convert|cook|create|cut|deploy|disable|do|encrypt|find|fix|fold|get|grow|install|keep|learn"
        r"|make|mend|move|plant|prune|read|remove|repair|replace|restore|run|season|set|sew|sharpen"
        r"|start|stop|store|teach|test|train|turn|update|use|write)\b"
    ),
    "errors": wording(
        r"error|exception|fail|cannot|can't|could not|denied|refused|not found|undefined|timeout"
        r"|timed out|crash|fatal|panic|invalid|abort|traceback|killed|exit code|(?-i:\bE[A-Z]{4,}\b)"
        r"|(?-i:\bSIG[A-Z]+\b)|\b0x[0-9a-f]+\b|\b[45]\d\d\b"
    ),
    "recency": wording(
        r"\b(latest|newest|recent(ly)?|new in|what'?s new|changed?|changes|changelog|today|tonight"
        r"|yesterday|tomorrow|current(ly)?|(this|last|next) (week|month|year|quarter|\w+day)"
        r"|20[2-9]\d)\b"
    ),
    "comparison": wording(
        r"\b(vs\.?|versus|compared?|comparison|difference|differences|differ|trade-?offs?|better"
        r"|instead of|rather than|or)\b"
    ),
    "long": lambda query: len(query.split()) >= 10,
    "quoted": lambda query: '"' in query,
    "negation": wording(r"(^|\s)-\w|\b(without|not|except)\b"),
}


def query_of(example: Example) -> str:
    """The query without its /only: suffix."""
    return ONLY_SUFFIX.sub("", example.query)


def language_of(example: Example) -> str:
    """The row's label; without one, the script of its query's letters."""
    from expander.eval.report import script_counts

    scripts = script_counts(only_mode(example.query)[0]).most_common(1)
    return example.language or f"unlabelled, {scripts[0][0] if scripts else 'no letters'}"


def answers_in_english(example: Example) -> bool:
    """Whether a fifth of the words are of a few that are frequent in English."""
    words = [word.lower() for _, text in example.lines for word in WORD.findall(text)]
    return sum(word in ENGLISH for word in words) >= max(1, len(words) / 5)


def in_other_language(example: Example) -> bool:
    """Whether the answer is not in the query's script, or in English where the label is not."""
    from expander.eval.report import in_wrong_language

    foreign = example.language not in (None, "en")
    text = render_lines(example.lines)
    # ASCII is Latin script; asking so saves half of the whole analysis.
    latin = (example.query + text).isascii()
    astray = not latin and in_wrong_language(example.query, text)
    return astray or (foreign and answers_in_english(example))


def templates(examples: Iterable[Example]) -> dict[str, list[tuple[str, int]]]:
    """(template, rows) by type, most frequent first: sentences that only the query's words vary."""
    rows = {kind: Counter() for kind in TYPES}
    for example in examples:
        for kind, template in {(k, template_of(x, example.query)) for k, x in example.lines}:
            rows[kind][template] += 1
    return {
        kind: [
            (template, count)
            for template, count in counted.most_common()
            if count >= TEMPLATE_ROWS
            and sum(word != SLOT for word in template.split()) >= TEMPLATE_WORDS
        ]
        for kind, counted in rows.items()
    }


def ngrams(texts: Iterable[str]) -> Counter[str]:
    """How many of the texts hold each run of NGRAM words."""
    found: Counter[str] = Counter()
    for text in texts:
        words = WORD.findall(text.lower())
        found.update({" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)})
    return found


def lengths(name: str, values: Iterable[int]) -> tuple[str, ...]:
    ordered = sorted(values)
    at = (ordered[round(share * (len(ordered) - 1))] for share in (0, 0.05, 0.5, 0.95, 1))
    return (name, str(len(ordered)), *map(str, at))


def counted(name: str, count: int, total: int) -> tuple[str, str, str]:
    return name, str(count), f"{count / total:.1%}"


def print_lengths(examples: Sequence[Example]) -> None:
    from expander.eval.report import table

    rows = [("length", "count", "least", "5 %", "median", "95 %", "most")]
    rows.append(lengths("query, words", (len(query_of(e).split()) for e in examples)))
    for kind, unit, size in (
        ("hyde", "characters", len),
        ("lex", "words", lambda text: len(text.split())),
        ("vec", "characters", len),
    ):
        sizes = [size(text) for e in examples for k, text in e.lines if k == kind]
        if sizes:
            rows.append(lengths(f"{kind}, {unit}", sizes))
        full = [sum(k == kind for k, _ in e.lines) for e in examples if not e.is_only]
        if full:
            rows.append(lengths(f"{kind}, lines a full row", full))
    hydes = [len(text) for e in examples for kind, text in e.lines if kind == "hyde"]
    astray = sum(not 50 <= size <= 200 for size in hydes)
    print(table(rows), f"  hyde lines outside 50-200 characters: {astray}", sep="\n", end="\n\n")


def print_categories(examples: Sequence[Example]) -> None:
    from expander.eval.report import printable, table

    labels = Counter(e.category or "none" for e in examples)
    rules = {name: sum(rule(query_of(e)) for e in examples) for name, rule in RULES.items()}
    rules["only"] = sum(e.is_only for e in examples)
    rows = [("category", "labelled", "share", "by rule", "share")]
    for name in [*rules, *(name for name, _ in labels.most_common() if name not in rules)]:
        told = [
            counted("", found[name], len(examples))[1:] if name in found else ("", "")
            for found in (labels, rules)
        ]
        rows.append((printable(name), *told[0], *told[1]))
    print(table(rows), end="\n\n")


def print_languages(examples: Sequence[Example]) -> None:
    from expander.eval.report import printable, table

    found = Counter(map(language_of, examples))
    rows = [("language", "rows", "share")]
    rows += [counted(printable(name), n, len(examples)) for name, n in found.most_common()]
    labelled = [e for e in examples if e.language not in (None, "en")]
    print(table(rows))
    print(
        f"  labelled other than English: {len(labelled) / len(examples):.1%} in "
        f"{len({e.language for e in labelled})} languages\n"
        f"  answered in another language or script: {sum(map(in_other_language, examples))}\n"
    )


def print_found(what: str, lines: Iterable[str]) -> None:
    from expander.eval.report import printable

    print(what, *(f"  {printable(line)}" for line in lines), sep="\n")


def print_repetition(examples: Sequence[Example], top: int) -> None:
    for kind, found in templates(examples).items():
        rows = sum(count for _, count in found)
        what = f"template sentences, {kind}: {len(found)}, in {rows} rows"
        print_found(what, (f"{count:>5}  {text}" for text, count in found[:top]))
    for kind in TYPES:
        found = ngrams(text for e in examples for k, text in e.lines if k == kind)
        if found:
            distinct = f"{len(found) / found.total():.1%} of {found.total()} are distinct"
            what = f"runs of {NGRAM} words, {kind}: {distinct}; in most lines:"
            print_found(what, (f"{n:>5}  {run}" for run, n in found.most_common(top)))


def print_doubles(examples: Sequence[Example], top: int) -> None:
    queries = list(dict.fromkeys(normal_query(e.query) for e in examples))
    print(f"rows whose query stands in an earlier row: {len(examples) - len(queries)}")
    pairs = list(near_duplicates(dict.fromkeys(map(base_query, queries))))
    what = f"queries that nearly repeat an earlier one: {len(pairs)}"
    print_found(what, (f"{first}  ~  {later}" for first, later in pairs[:top]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Show what a data set is made of.")
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"files, folders, globs ({DATA})")
    add("--top", type=int, default=5, metavar="N", help="examples of each finding (default: 5)")
    args = parser.parse_args()

    examples = read_files(args.data)
    print(f"{len(examples)} rows\n")
    print_lengths(examples)
    print_categories(examples)
    print_languages(examples)
    print_repetition(examples, args.top)
    print_doubles(examples, args.top)


if __name__ == "__main__":
    cli.run(main)
