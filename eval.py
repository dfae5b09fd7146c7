"""Evaluate a model: score its expansions, and measure whether a search finds more with them.

    python eval.py --model outputs/grpo --retrieval -o results.json
    python eval.py --model outputs/grpo                       the score only, evals/queries.txt
    python eval.py --model outputs/grpo --query "auth config" a single query
    python eval.py --model outputs/grpo --decode qmd --samples 4 --qmd-system-prompt
    python eval.py --compare sft.json grpo.json               is B better than A?
    python eval.py --score-only outputs.jsonl                 expansions from another tool

The score is reward.py's: it measures form and word overlap. --retrieval runs QMD's search, without its
reranker, on judged collections (default: evals/vault), with the bare queries and with their expansions.
"""

import argparse
import sys

from expander import cli
from expander.eval import golden as overlap
from expander.queries import checked_query


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Expand queries with a model, score the expansions, and compare results.",
        epilog="example: python eval.py --model outputs/grpo --decode qmd -o results.json",
    )
    add, count, or_none = parser.add_argument, cli.integer_from(1), cli.integer_from(0)
    add("positional_model", metavar="MODEL", nargs="?", type=cli.name, help="same as --model")
    add(
        "--model",
        type=cli.name,
        help="adapter folder, model folder or Hub id (default: outputs/grpo, else sft)",
    )
    base_help = "use this base model instead of the one that the adapter names"
    add("--base-model", type=cli.name, metavar="NAME", help=base_help)
    sft_help = "fuse this adapter first: for a GRPO adapter that does not name its SFT adapter"
    add("--sft-model", type=cli.name, metavar="NAME", help=sft_help)
    add(
        "--queries",
        type=cli.path,
        metavar="FILE",
        help="text file with one query per line (default: evals/queries.txt)",
    )
    add("--query", metavar="TEXT", help="expand a single query")
    queries_help = "use only the first N queries (default: 0, all)"
    add("--max-queries", type=or_none, metavar="N", default=0, help=queries_help)
    tokens_help = "token limit of an expansion (default: 200; 600 with --decode qmd)"
    add("--max-new-tokens", "--max-tokens", type=count, metavar="N", help=tokens_help)
    time_help = "cut off an expansion after so many seconds (default: 0, never)"
    add("--max-time", type=cli.seconds, metavar="SECONDS", default=0.0, help=time_help)
    batch_help = "maximum number of expansions decoded together (default: 64)"
    add("--batch-size", type=count, metavar="N", default=64, help=batch_help)
    decode_help = "choose the likeliest token, or sample under QMD's grammar (default: greedy)"
    add("--decode", choices=("greedy", "qmd"), default="greedy", help=decode_help)
    add("--qmd-system-prompt", action="store_true", help="add the system prompt that QMD may send")
    samples_help = "expansions per query, with --decode qmd (default: 1)"
    add("--samples", type=count, metavar="N", default=1, help=samples_help)
    seed_help = "seed for sampling and confidence intervals (default: 42)"
    add("--seed", type=cli.integer_from(0), metavar="N", default=42, help=seed_help)
    add("-o", "--output", type=cli.path, metavar="FILE", help="write the results to a JSON file")
    add("-v", "--verbose", action="store_true", help="print each expansion and its deductions")
    add("--summary-only", action="store_true", help="the default; overrides -v")
    add("--fail-under", type=float, metavar="N", help="exit with 1 if the average is below N %%")
    add(
        "--retrieval",
        nargs="*",
        type=cli.name,
        metavar="COLLECTION",
        help="measure the search on these collections (default: evals/vault), decoding as QMD does",
    )
    add(
        "--embedder",
        metavar="NAME",
        default="wordllama",
        help="vectors for --retrieval: wordllama (default), none, or http://HOST:PORT/v1#MODEL",
    )
    score_help = 'score the expansions in a JSON Lines file of {"query", "expansion"}'
    add("--score-only", type=cli.path, metavar="FILE", help=score_help)
    compare_help = "compare two result files written with -o"
    add("--compare", type=cli.path, nargs=2, metavar=("A", "B"), help=compare_help)
    overlap.add_options(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Tidy `args.model`, `args.query` and limits; exit with a usage error on contradictions."""
    if args.model and args.positional_model:
        parser.error("MODEL and --model are both given: use one of them")
    args.model = args.model or args.positional_model
    args.max_queries = args.max_queries or None
    args.verbose = args.verbose and not args.summary_only
    if (args.base_model or args.sft_model) and (args.score_only or args.compare):
        parser.error("--base-model and --sft-model need a model to expand with")
    if unused := overlap.unused(args):
        parser.error(f"{unused[0]} needs --golden FILE")
    if sum(x is not None for x in (args.query, args.queries, args.score_only, args.compare)) > 1:
        parser.error("use only one of --query, --queries, --score-only and --compare")
    if args.query is not None:
        try:
            args.query = checked_query(args.query)
        except ValueError as error:
            parser.error(f"--query: {error}")
    if args.compare and (args.output or args.golden or args.fail_under is not None):
        parser.error("--compare cannot be used with --output, --golden or --fail-under")
    if args.retrieval is not None and (args.compare or args.query is not None):
        parser.error("--retrieval cannot be used with --compare or --query")
    if args.samples > 1 and args.decode == "greedy" and args.retrieval is None:
        parser.error("--samples: greedy decoding has one result; add --decode qmd")
    if args.fail_under is not None and not 0 <= args.fail_under <= 100:
        parser.error("--fail-under takes a percentage from 0 to 100")


def evaluate(args: argparse.Namespace) -> int:
    """Expand or read expansions, then measure, write and print; return the exit code."""
    from expander.eval import inputs, measure, report
    from expander.eval.comparison import SCHEMA
    from expander.eval.expand import Expander
    from expander.files import check_writable, write_json
    from expander.model import read_chain, trained_model
    from expander.retrieval import evaluate as retrieval

    if args.output:  # fail before the evaluation, not after it
        check_writable(args.output)
    golden = inputs.read_golden(args.golden, args.sample, args.seed) if args.golden else {}
    chain = None
    if args.score_only:
        queries, expansions = inputs.read_expansions(args.score_only, args.max_queries)
        decoding = {"decode": {"mode": "score-only"}, "speed": None}
    else:
        queries = inputs.choose_queries(args.query, args.queries, golden)[: args.max_queries]
        chain = read_chain(args.model or trained_model(), base=args.base_model, sft=args.sft_model)
    references = inputs.find_references(golden, queries)
    if args.golden and not references:
        raise ValueError(f"--golden {args.golden}: the file has none of the evaluated queries")
    tasks = []
    if args.retrieval is not None:
        sources = args.retrieval or [str(retrieval.VAULT)]
        tasks = retrieval.prepare(sources, args.embedder, args.max_queries)

    if args.score_only:
        texts = {query: found for (query, _), found in zip(queries, expansions, strict=True)}
        expand = retrieval.look_up({q: [x.text for x in found] for q, found in texts.items()})
    else:
        model = Expander(
            chain,
            args.max_new_tokens,
            args.qmd_system_prompt,
            args.batch_size,
            args.seed,
            args.max_time,
        )
        samples = args.samples if args.decode == "qmd" else 1
        expansions, decoding = model.expand(queries, args.decode, samples)
        expand = model.as_qmd(args.samples)
    results = measure.measure_all(queries, expansions)
    matched = None
    if references:
        matched = measure.compare_golden(results, references, overlap.thresholds(args))
    record = {
        "schema": SCHEMA,
        "model": chain.describe() | {"weights_sha256": chain.base_hashes()} if chain else None,
        "decode": decoding["decode"],
        "seed": args.seed,
        "summary": measure.summarize(results, args.seed),
        "leaks": inputs.mark_leaks(results, chain.adapters if chain else ()),
        "golden": matched,
        "speed": decoding["speed"],
        "retrieval": {
            task.collection.name: retrieval.evaluate(task, expand, args.seed) for task in tasks
        },
        "results": results,
    }
    if args.output:  # before anything is printed: a broken pipe must not lose it
        write_json(args.output, record)
    single = args.query is not None
    shown = {"samples": args.verbose or single, "mismatches": args.show_mismatches}
    print(report.format_record(record, summary=not single, **shown))
    for found in record["retrieval"].values():
        print(f"\n{retrieval.format_retrieval(found)}")
    if not single and not tasks:
        print("\nretrieval  not measured; add --retrieval to see whether a search finds more")
    if args.output:
        print(f"\n{args.output}: results of {len(results)} queries")
    average = record["summary"]["average"]
    if args.fail_under is not None and average < args.fail_under:
        print(f"average {average:.1f} % is below --fail-under {args.fail_under:g}", file=sys.stderr)
        return 1
    if (
        args.fail_under_f1 is not None
        and (f1 := matched["types"]["all"]["f1"]) < args.fail_under_f1
    ):
        print(f"F1 {f1:.3f} is below --fail-under-f1 {args.fail_under_f1:g}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    args = parse_arguments()
    if not args.compare:
        return evaluate(args)
    from expander.eval.comparison import compare_files

    print(compare_files(args.compare, args.seed))
    return 0


if __name__ == "__main__":
    cli.run(main)
