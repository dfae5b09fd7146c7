"""Describe a data set: lengths, categories, languages, repetition, near duplicates.

    python dataset/analyze_data.py                          the rows of data/
    python dataset/analyze_data.py rows.jsonl --top 20

Categories are counted twice: by the labels of the rows, and by rules on the queries. The rules overlap,
and those on wording know only English. A language is the label of a row or, without one, the script of
its query. For scores by the rubric, use score_data.py.
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
from expander.text import in_wrong_language, printable, script_counts, table
from reward import extract_named_entities, only_mode

NGRAM = 4  # words
# A sentence with this many words, apart from those of the query, in this many rows is a template.
TEMPLATE_ROWS, TEMPLATE_WORDS = 3, 4
ENGLISH = frozenset("the and of to for with what how which why when does do is are from".split())


def wording(pattern: str) -> Callable[[str], bool]:
    """A rule: whether a query matches a pattern, in any case."""
    found = re.compile(pattern, re.IGNORECASE)
    return lambda query: found.search(query) is not None


# Rules on the query as written, without its /only: suffix.
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


def bare_query(example: Example) -> str:
    """The query without its /only: suffix."""
    return ONLY_SUFFIX.sub("", example.query)


def language_of(example: Example) -> str:
    """The language label of a row; without one, the script of its query."""
    scripts = script_counts(only_mode(example.query)[0]).most_common(1)
    return example.language or f"unlabelled, {scripts[0][0] if scripts else 'no letters'}"


def answers_in_english(example: Example) -> bool:
    """Whether a fifth of the words are frequent English words."""
    words = [word.lower() for _, text in example.lines for word in WORD.findall(text)]
    return sum(word in ENGLISH for word in words) >= max(1, len(words) / 5)


def in_other_language(example: Example) -> bool:
    """Whether an answer has another script than its query, or is English and labelled otherwise."""
    foreign = example.language not in (None, "en")
    text = render_lines(example.lines)
    # ASCII is Latin script. This check saves half of the time of the whole analysis.
    latin = (example.query + text).isascii()
    wrong_script = not latin and in_wrong_language(example.query, text)
    return wrong_script or (foreign and answers_in_english(example))


def templates(examples: Iterable[Example]) -> dict[str, list[tuple[str, int]]]:
    """Sentences that differ only in the words of their query.

    Returns:
        (template, number of rows) pairs by line type, most frequent first.
    """
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
    """The number of texts that contain each sequence of NGRAM words."""
    found: Counter[str] = Counter()
    for text in texts:
        words = WORD.findall(text.lower())
        found.update({" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)})
    return found


def lengths(name: str, values: Iterable[int]) -> tuple[str, ...]:
    """A table row: the name, the number of values, and their quantiles."""
    ordered = sorted(values)
    at = (ordered[round(share * (len(ordered) - 1))] for share in (0, 0.05, 0.5, 0.95, 1))
    return (name, str(len(ordered)), *map(str, at))


def counted(name: str, count: int, total: int) -> tuple[str, str, str]:
    """A table row: the name, a count, and its share of the total."""
    return name, str(count), f"{count / total:.1%}"


def print_lengths(examples: Sequence[Example]) -> None:
    rows = [("length", "count", "min", "5 %", "median", "95 %", "max")]
    rows.append(lengths("query, words", (len(bare_query(e).split()) for e in examples)))
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
            rows.append(lengths(f"{kind}, lines per full row", full))
    hydes = [len(text) for e in examples for kind, text in e.lines if kind == "hyde"]
    outside = sum(not 50 <= size <= 200 for size in hydes)
    print(table(rows), f"  hyde lines outside 50-200 characters: {outside}", sep="\n", end="\n\n")


def print_categories(examples: Sequence[Example]) -> None:
    labels = Counter(e.category or "unlabelled" for e in examples)
    rules = {name: sum(rule(bare_query(e)) for e in examples) for name, rule in RULES.items()}
    rules["only"] = sum(e.is_only for e in examples)
    rows = [("category", "labelled", "share", "by rule", "share")]
    for name in [*rules, *(name for name, _ in labels.most_common() if name not in rules)]:
        labelled, by_rule = (
            counted("", found[name], len(examples))[1:] if name in found else ("", "")
            for found in (labels, rules)
        )
        rows.append((printable(name), *labelled, *by_rule))
    print(table(rows), end="\n\n")


def print_examples(examples: Sequence[Example], count: int) -> None:
    """Print the first `count` queries of each category, by label or else by rule."""
    found: dict[str, list[str]] = {}
    for example in examples:
        query = bare_query(example)
        rules = (name for name, rule in RULES.items() if rule(query))
        found.setdefault(example.category or next(rules, "other"), []).append(example.query)
    for name, queries in sorted(found.items()):
        print_list(f"queries, {printable(name)}:", queries[:count])
    print()


def print_languages(examples: Sequence[Example]) -> None:
    found = Counter(map(language_of, examples))
    rows = [("language", "rows", "share")]
    rows += [counted(printable(name), n, len(examples)) for name, n in found.most_common()]
    labelled = [e for e in examples if e.language not in (None, "en")]
    print(table(rows))
    print(
        f"  labelled as another language than English: {len(labelled) / len(examples):.1%} in "
        f"{len({e.language for e in labelled})} languages\n"
        f"  answered in another language or script: {sum(map(in_other_language, examples))}\n"
    )


def print_list(title: str, lines: Iterable[str]) -> None:
    print(title, *(f"  {printable(line)}" for line in lines), sep="\n")


def print_repetition(examples: Sequence[Example], top: int) -> None:
    for kind, found in templates(examples).items():
        rows = sum(count for _, count in found)
        title = f"template sentences, {kind}: {len(found)}, in {rows} rows"
        print_list(title, (f"{count:>5}  {text}" for text, count in found[:top]))
    for kind in TYPES:
        found = ngrams(text for e in examples for k, text in e.lines if k == kind)
        if found:
            distinct = f"{len(found) / found.total():.1%} of {found.total()} are distinct"
            title = f"sequences of {NGRAM} words, {kind}: {distinct}; most frequent:"
            print_list(title, (f"{n:>5}  {words}" for words, n in found.most_common(top)))


def print_duplicates(examples: Sequence[Example], top: int) -> None:
    queries = list(dict.fromkeys(normal_query(e.query) for e in examples))
    print(f"rows with the query of an earlier row: {len(examples) - len(queries)}")
    pairs = list(near_duplicates(dict.fromkeys(map(base_query, queries))))
    title = f"queries that nearly repeat an earlier query: {len(pairs)}"
    print_list(title, (f"{first}  ~  {later}" for first, later in pairs[:top]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Describe a data set.")
    add = parser.add_argument
    add("data", nargs="*", default=[DATA], help=f"files, folders or globs (default: {DATA})")
    add(
        "--top",
        type=int,
        default=5,
        metavar="N",
        help="number of examples per finding (default: 5)",
    )
    add("--input", metavar="DATA", help="the same as the first argument")
    add(
        "--show-examples",
        type=cli.integer_from(0),
        default=0,
        metavar="N",
        help="also print N queries of each category (default: 0)",
    )
    args = parser.parse_args()

    examples = read_files(args.data if args.input is None else [args.input])
    print(f"{len(examples)} rows\n")
    print_lengths(examples)
    print_categories(examples)
    if args.show_examples:
        print_examples(examples, args.show_examples)
    print_languages(examples)
    print_repetition(examples, args.top)
    print_duplicates(examples, args.top)


if __name__ == "__main__":
    cli.run(main)
