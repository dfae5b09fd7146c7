"""Evaluate a model: expand queries, score the expansions, say what QMD would make of them.

    python eval.py --model outputs/grpo -o results.json       all queries of evals/queries.txt
    python eval.py --model outputs/grpo --query "auth config" one query
    python eval.py --model outputs/grpo --decode qmd --samples 4 --qmd-system-prompt
    python eval.py --compare sft.json grpo.json               is B better than A?
    python eval.py --score-only outputs.jsonl                 text that another tool wrote

The score is reward.py's rubric: form and word overlap, not whether a search finds more. QMD's
retrieval is not run; what is counted is which lines QMD would keep.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from expander import cli

GREEDY_MAX_TOKENS = 200

Queries = list[tuple[str, str | None]]  # (query, category)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Expand queries with a model, score the expansions, compare two results.",
        epilog="example: python eval.py --model outputs/grpo --decode qmd -o results.json",
    )
    add, count = parser.add_argument, cli.integer_from(1)
    add("positional_model", metavar="MODEL", nargs="?", help="the same as --model")
    add("--model", help="adapter folder, model folder or Hub id (default: outputs/grpo, else sft)")
    add("--queries", type=Path, metavar="FILE", help="one a line (default: evals/queries.txt)")
    add("--query", metavar="TEXT", help="answer this one query")
    add("--max-queries", type=count, metavar="N", help="stop after the first N")
    add("--max-new-tokens", type=count, metavar="N", help="default: 200, with --decode qmd 600")
    add("--batch-size", type=count, metavar="N", default=32, help="rows at once (default: 32)")
    add("--decode", choices=("greedy", "qmd"), default="greedy", help="qmd: sampled as QMD does")
    add("--qmd-system-prompt", action="store_true", help="with the system turn that QMD may send")
    add("--samples", type=count, metavar="N", default=1, help="texts a query, with --decode qmd")
    add(
        "--seed",
        type=cli.integer_from(0),
        default=42,
        help="of sampling and of the intervals (default: 42)",
    )
    add("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON")
    add("-v", "--verbose", action="store_true", help="show every expansion and its deductions")
    add("--golden", type=Path, metavar="FILE", help="JSON Lines of reference expansions to match")
    add("--fail-under", type=float, metavar="N", help="exit 1 when the average is under N percent")
    add("--score-only", type=Path, metavar="FILE", help='JSON Lines of {"query", "expansion"}')
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two files that -o wrote")
    args = parser.parse_args()

    if args.model and args.positional_model:
        parser.error("the model is named twice")
    args.model = args.model or args.positional_model
    if sum(x is not None for x in (args.query, args.queries, args.score_only, args.compare)) > 1:
        parser.error("--query, --queries, --score-only and --compare exclude each other")
    if args.query is not None:
        args.query = " ".join(args.query.split())
        if not args.query or not args.query.isprintable():
            parser.error("--query: the query is empty or holds characters that are no text")
    if args.compare and (args.output or args.golden or args.fail_under is not None):
        parser.error("--compare takes neither --output, --golden nor --fail-under")
    if args.samples > 1 and args.decode == "greedy":
        parser.error("--samples: greedy decoding gives one text; add --decode qmd")
    if args.fail_under is not None and not 0 <= args.fail_under <= 100:
        parser.error("--fail-under takes a percentage from 0 to 100")
    return args


def score_outputs(path: Path) -> list[dict]:
    """Results of the texts in a JSON Lines file; rows of one query are its samples.

    Raises:
        ValueError: no row, or the first broken one as "path:line: reason".
    """
    from expander.eval.report import measure, result_of
    from expander.prompt import render_lines
    from expander.rows import file_rows

    samples: dict[str, list[dict]] = {}
    categories: dict[str, str | None] = {}
    for place, row in file_rows(path):
        if isinstance(row, ValueError):
            raise ValueError(f"{place}: {row}")
        fields = row if isinstance(row, dict) else {}
        query, text = fields.get("query"), fields.get("expansion", fields.get("output"))
        if isinstance(text, list) and all(isinstance(x, list) and len(x) == 2 for x in text):
            text = render_lines(text)
        if not isinstance(query, str) or not query.strip() or not isinstance(text, str):
            raise ValueError(f'{place}: expected {{"query": text, "expansion": text}}')
        category = fields.get("category")
        categories.setdefault(query.strip(), category if isinstance(category, str) else None)
        samples.setdefault(query.strip(), []).append(measure(query.strip(), text))
    if not samples:
        raise ValueError(f"--score-only {path}: contains no rows")
    return [result_of(query, categories[query], samples[query]) for query in samples]


def read_golden(path: Path) -> dict:
    """The reference expansions by `normal_query`, as `Example`s; any row format will do."""
    from expander.queries import normal_query
    from expander.rows import load_rows

    if not path.is_file():
        raise ValueError(f"--golden {path}: there is no such file")
    return {normal_query(row.query): row for row in load_rows(str(path)).train}


def choose_queries(args: argparse.Namespace, golden: dict) -> Queries:
    """What the arguments ask for: one query, a file of them, those of the golden file, or ours."""
    from expander.queries import EVALUATION_QUERIES, read_queries

    if args.query is not None:
        queries: Queries = [(args.query, None)]
    elif golden and not args.queries:
        queries = [(row.query, row.category) for row in golden.values()]
    else:
        queries = read_queries(args.queries or EVALUATION_QUERIES)
    return queries[: args.max_queries]


def decode_settings(args: argparse.Namespace) -> dict:
    """What decides the text besides the model; --compare warns where two runs differ in it."""
    from dataclasses import asdict

    from expander.qmd import SAMPLING

    settings = {
        "mode": args.decode,
        "max_new_tokens": args.max_new_tokens or GREEDY_MAX_TOKENS,
        "qmd_system_prompt": args.qmd_system_prompt,
        "samples": args.samples,
    }
    if args.decode == "qmd":
        settings["max_new_tokens"] = args.max_new_tokens or SAMPLING.max_tokens
        sampling = asdict(SAMPLING)
        settings |= {name: sampling[name] for name in ("temperature", "top_k", "top_p")}
    return settings


def encode_prompts(queries: Queries, tokenizer, config: dict, settings: dict) -> list[list[int]]:
    """The token ids of every prompt.

    Raises:
        ValueError: one is too long for the model's context.
    """
    from expander.prompt import encode_prompt
    from expander.qmd import QMD_SYSTEM_PROMPT

    system = QMD_SYSTEM_PROMPT if settings["qmd_system_prompt"] else None
    context, limit = config.get("max_position_embeddings"), settings["max_new_tokens"]
    prompts = []
    for query, _ in queries:
        ids = encode_prompt(tokenizer, query, system)
        if context and len(ids) + limit > context:
            raise ValueError(
                f"query {query[:40]!r} of {len(query)} characters: its prompt of {len(ids)} tokens "
                f"and {limit} new ones exceed the model's context of {context}"
            )
        prompts.append(ids)
    return prompts


def expand(chain, queries: Queries, settings: dict, batch_size: int, seed: int):
    """Decode every query: (results, speed)."""
    from expander import model as models
    from expander.decode import Sampler, generate, length_groups, random_keys
    from expander.eval.report import measure, result_of

    model, tokenizer = models.load_chain(chain, fuse_last=True)
    end, config = models.end_token(tokenizer), models.model_config(chain.path)
    prompts = encode_prompts(queries, tokenizer, config, settings)
    if settings["mode"] == "qmd":
        from expander.eval.grammar import QmdSampler, token_table

        grammar = token_table(tokenizer, config["vocab_size"], end)

    def decode(chosen: Sequence[int], samples: int, progress=None):
        """(completions of these queries, seconds)"""
        sampler = Sampler()
        if settings["mode"] == "qmd":
            names = [f"{queries[i][0]}\n{sample}" for i in chosen for sample in range(samples)]
            sampler = QmdSampler(grammar, random_keys(names, seed))
        start = time.monotonic()
        completions = generate(
            model,
            [prompts[i] for i in chosen],
            max_tokens=settings["max_new_tokens"],
            end=end,
            samples=samples,
            sampler=sampler,
            batch_size=batch_size,
            progress=progress,
        )
        return completions, time.monotonic() - start

    samples = settings["samples"]
    show = cli.Progress("expanded", len(queries) * samples)
    order, decoded, seconds = [], [], 0.0
    for group in length_groups(list(map(len, prompts))):
        completions, spent = decode(group, samples, lambda n: show(len(decoded) + n))
        order.extend(group)
        decoded.extend(completions)
        seconds += spent
    # The batch's seconds say nothing about how long a user waits for one query.
    (alone, *_), seconds_alone = decode([0], 1) if len(decoded) > 1 else (decoded, seconds)

    results = {}
    for place, index in enumerate(order):
        measured = []
        for completion in decoded[place * samples : (place + 1) * samples]:
            text = completion.text(tokenizer)
            measured.append(measure(queries[index][0], text, not completion.finished))
        results[index] = result_of(*queries[index], measured)
    tokens = sum(len(completion.tokens) for completion in decoded)
    speed = {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "batch_size": batch_size,
        "alone": {"tokens": len(alone.tokens), "seconds": seconds_alone},
    }
    return [results[index] for index in range(len(queries))], speed


def find_leaks(chain, results: list[dict]) -> dict:
    """Mark and name the queries that an adapter of the chain was trained on."""
    from expander.queries import query_digest, read_query_digests

    leaks = {"checked": [], "unknown": [], "queries": []}
    trained_on: set[str] = set()
    for folder in chain.adapters if chain else ():
        digests = read_query_digests(folder)
        leaks["unknown" if digests is None else "checked"].append(str(folder))
        trained_on |= digests or set()
    for result in results:
        result["trained_on"] = query_digest(result["query"]) in trained_on
        if result["trained_on"]:
            leaks["queries"].append(result["query"])
    return leaks


def check_output(path: Path) -> None:
    """Fail before the work is done and not after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: not a file that can be written")


def print_results(args: argparse.Namespace, record: dict) -> None:
    from expander.eval import report

    if args.verbose or args.query is not None:
        for result in record["results"]:
            for sample in result["samples"]:
                print(report.format_sample(result["query"], sample))
    if model := record["model"]:
        print(f"{model['name']}: {' + '.join([model['base'], *model['adapters_sha256']])}")
    print("decoding " + "  ".join(f"{name} {value}" for name, value in record["decode"].items()))
    format_figures = report.format_leaks if args.query is not None else report.format_summary
    print(format_figures(record["summary"], record["leaks"]))
    if speed := record["speed"]:
        alone = speed["alone"]
        print(
            f"\nspeed    {speed['tokens_per_second']:.0f} tokens/s: {speed['tokens']} in "
            f"{speed['seconds']:.1f} s, up to {speed['batch_size']} rows at once; the first query "
            f"alone: {alone['tokens']} in {alone['seconds']:.1f} s"
        )
    if record["golden"]:
        print(f"\n{report.format_golden(record['golden'])}")


def evaluate(args: argparse.Namespace) -> int:
    from expander.eval.comparison import SCHEMA
    from expander.eval.report import compare_golden, summarize
    from expander.queries import normal_query

    if args.output:
        check_output(args.output)
    golden = read_golden(args.golden) if args.golden else {}
    chain, settings, speed = None, {"mode": "score-only"}, None
    if args.score_only:
        results = score_outputs(args.score_only)[: args.max_queries]
        queries = [(result["query"], None) for result in results]
    else:
        queries = choose_queries(args, golden)
    wanted = {query: golden.get(normal_query(query)) for query, _ in queries}
    if args.golden and not any(wanted.values()):
        raise ValueError(f"--golden {args.golden}: none of the evaluated queries is in it")
    if not args.score_only:
        from expander import model as models

        chain = models.read_chain(args.model or models.trained_model())
        settings = decode_settings(args)
        results, speed = expand(chain, queries, settings, args.batch_size, args.seed)

    leaks = find_leaks(chain, results)
    matched = [result for result in results if wanted[result["query"]]]
    references = [wanted[result["query"]].lines for result in matched]
    record = {
        "schema": SCHEMA,
        "model": chain.describe() if chain else None,
        "decode": settings,
        "seed": args.seed,
        "summary": summarize(results, args.seed),
        "leaks": leaks,
        "golden": compare_golden(matched, references) if matched else None,
        "speed": speed,
        "results": results,
    }
    print_results(args, record)
    if args.output:
        from expander.files import write_json

        if chain:
            record["model"]["weights_sha256"] = chain.base_hashes()
        write_json(args.output, record)
        print(f"\n{args.output}: results of {len(results)} queries")
    average = record["summary"]["average"]
    if args.fail_under is not None and average < args.fail_under:
        print(f"average {average:.1f} % is under --fail-under {args.fail_under:g}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    args = parse_arguments()
    if not args.compare:
        return evaluate(args)
    from expander.eval.comparison import compare, format_comparison, read_results

    records = tuple(map(read_results, args.compare))
    result = compare(*records, args.seed)
    print(format_comparison(tuple(map(str, args.compare)), records, result))
    return 0


if __name__ == "__main__":
    cli.run(main)
