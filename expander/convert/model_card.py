"""The README.md of a published model, rendered from model_card.md."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from expander.config import load_config
from expander.eval.report import format_retrieval, format_summary
from expander.files import read_json
from expander.model import HUB_ID, Chain
from expander.prompt import render_prompt, user_message
from expander.rows import looks_local

CARD, EVALUATION, RESULT = "README.md", "evaluation.json", "run.json"
LANGUAGE = re.compile(r"[a-z]{2,3}")  # ISO 639
TEMPLATE = Path(__file__).parent / "model_card.md"


def run_config(chain: Chain) -> Path | None:
    """The configuration file of the chain's last training run; None if there is no such file."""
    paths = [folder / "config.yaml" for folder in chain.adapters[-1:]]
    return next((path for path in paths if path.is_file()), None)


def licence(chain: Chain) -> dict:
    """The licence entries of the base model's own card; empty if it has no card."""
    path = chain.path / CARD
    if chain.revision:
        try:
            path = Path(HfApi().hf_hub_download(chain.base, CARD, revision=chain.revision))
        except EntryNotFoundError:
            return {}
    if not path.is_file():
        return {}
    data = ModelCard.load(path, ignore_metadata_errors=True).data
    return {key: data.get(key) for key in ("license", "license_name", "license_link")}


def training_data(chain: Chain) -> dict[str, list[str]]:
    """The card's entries about the rows of the last run: data set, if on the Hub, and languages."""
    found: dict[str, list[str]] = {}
    if config := run_config(chain):
        name = load_config("sft", config)[0].dataset.name
        if HUB_ID.fullmatch(name) and not looks_local(name):
            found["datasets"] = [name]
        result = config.parent / RESULT
        languages = read_json(result).get("languages") if result.is_file() else None
        codes = [code for code in languages or () if LANGUAGE.fullmatch(code)]
        found["language"] = codes or [
            "en"
        ]  # older runs have no record; the published rows are English
    return found


def eval_results(summary: dict, decode: dict, source: str) -> list[EvalResult]:
    """The figures that the Hub shows next to the card; `source` is the URL of the evaluation."""
    metrics = {
        "average": summary["average"],
        "excellent": 100 * summary["ratings"]["Excellent"] / summary["samples"],
        "valid_format": 100 * summary["shares"]["valid"],
        "kept_lines": summary["qmd"]["kept"],
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="search-queries",
            dataset_name=f"{summary['queries']} search queries",
            dataset_args=decode,
            metric_type=name,
            metric_value=round(value, 2),
            source_name=EVALUATION,
            source_url=source,
        )
        for name, value in metrics.items()
    ]


def render_card(
    repo: str, model_repo: str, gguf: str, chain: Chain, record: dict, terms: dict
) -> str:
    """The card of `repo`, which is `model_repo` or the repository of its GGUF files.

    Args:
        gguf: the file name for the commands on the card.
        record: the evaluation, with its "publication".
        terms: from `licence`.
    """
    endpoint, summary = HfApi().endpoint, record["summary"]
    source = f"{endpoint}/{model_repo}/blob/main/{EVALUATION}"
    origin = {"library_name": "gguf", "base_model": model_repo, "base_model_relation": "quantized"}
    if repo == model_repo:
        origin = {"library_name": "mlx"}
        if chain.revision:  # a local base has no page to link to
            origin |= {"base_model": chain.base, "base_model_relation": "finetune"}
    data = ModelCardData(
        pipeline_tag="text-generation",
        tags=["query-expansion", "qmd"],
        model_name=repo,
        eval_results=eval_results(summary, record["decode"], source),
        **origin,
        **training_data(chain),
        **terms,
    )
    config = run_config(chain)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo=repo,
        model_repo=model_repo,
        name=model_repo.split("/")[1],
        gguf=gguf,
        quantization=gguf.removesuffix(".gguf").rpartition("-")[2].upper(),
        endpoint=endpoint,
        source=source,
        base=chain.base if chain.revision else Path(chain.base).name,
        revision=chain.revision,
        adapters=len(chain.adapters),
        figures=format_summary(summary, record["leaks"]),
        retrieval=format_retrieval(record["retrieval"]),
        decode=", ".join(f"{name} {value}" for name, value in record["decode"].items()),
        message=user_message("auth config", instruction=chain.frame().instruction),
        prompt=render_prompt("auth config", frame=chain.frame()).rstrip("\n"),
        config=config and config.read_text(encoding="utf-8").rstrip("\n"),
        **record["publication"],
    )
    return str(card)
