"""Training inputs: rows, prompts and the SFT adapter; and what `--dry-run` reports about them."""

import random
from collections.abc import Sequence
from pathlib import Path

from expander.config import Config, to_yaml
from expander.model import ADAPTER_CONFIG, DOWNLOADS, HUB_ID, Chain, ModelError, read_chain
from expander.prompt import encode_prompt
from expander.qmd import QMD_SYSTEM_PROMPT
from expander.rows import Example, Rows, load_rows, local_files, looks_local
from expander.train import distributed
from expander.train.memory import preflight

Prompt = tuple[str, list[int]]  # the query, and the ids of the prompt that asks for its expansion


def read_rows(config: Config, prefix: str = "") -> Rows:
    """Load and split the rows of `dataset.name`, and print their counts."""
    data = config.dataset
    rows = load_rows(
        data.name,
        split=data.split,
        text_field=data.text_field,
        prompt_field=data.prompt_field,
        eval_split=data.eval_split,
        max_samples=data.max_samples,
        seed=config.training.seed,
    )
    print(f"{prefix}{data.name}: {rows.summary()}")
    return rows


def nothing_to_train_on(config: Config) -> ValueError:
    return ValueError(f"dataset.name {config.dataset.name}: no row is left to train on")


def encode_prompts(examples: Sequence[Example], config: Config, tokenizer) -> list[Prompt]:
    """The prompt of each example, next to its query, which is never parsed back out."""
    data, rng, prompts = config.dataset, random.Random(config.training.seed), []
    for example in examples:
        # QMD sends its system turn with every query; train with it on this share of the prompts.
        system = QMD_SYSTEM_PROMPT if rng.random() < data.qmd_system_prompt_share else None
        intent = example.intent if data.intent else None
        prompts.append((example.query, encode_prompt(tokenizer, example.query, system, intent)))
    return prompts


def split_prompts(rows: Rows, config: Config, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """GRPO's training prompts, and the held-out prompts that choose the best adapter.

    Raises:
        ValueError: no row is left to train on.
    """
    prompts = encode_prompts(rows.train, config, tokenizer)
    if not prompts:
        raise nothing_to_train_on(config)
    held_out = rows.validation[: config.grpo.eval_prompts]
    return prompts, encode_prompts(held_out, config, tokenizer)


def sft_adapter(config: Config) -> str:
    """The folder or Hub id of the SFT adapter that GRPO starts from.

    Raises:
        ValueError: it is a folder without an adapter, or the output folder as well.
    """
    folder = Path(config.model.sft).expanduser()
    on_the_hub = HUB_ID.fullmatch(config.model.sft) and folder.parts[0] not in ("outputs", "data")
    if not folder.exists() and on_the_hub:
        return config.model.sft
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"model.sft {folder}: no SFT adapter in this folder; run python train.py sft first, or "
            "choose another folder with --set model.sft=DIR"
        )
    if folder.resolve() == Path(config.model.output).expanduser().resolve():
        raise ValueError(
            f"model.output and model.sft are the same folder, {folder}; choose another output"
        )
    return str(folder)


def sft_chain(config: Config, files: Sequence[str] = DOWNLOADS) -> Chain:
    """The SFT adapter that GRPO starts from, over its base.

    Raises:
        ValueError: as `sft_adapter`, or a model on the Hub is no adapter.
    """
    chain = read_chain(sft_adapter(config), files)
    if not chain.adapters:
        raise ValueError(f"model.sft {chain.name}: a whole model; name an adapter")
    return chain


def report_memory(stage: str, config: Config, chain: Chain, longest: int, prefix: str = "") -> None:
    """Print the memory estimate, and a warning if it exceeds what the device recommends.

    Args:
        longest: tokens of the longest row (sft) or prompt (grpo).
    """
    line, warning = preflight(stage, config, chain, longest)
    print(f"{prefix}{line}")
    if warning:
        distributed.warn(warning)


def dry_run(stage: str, config: Config) -> None:
    """Print the resolved configuration, what would be loaded, and the memory estimate.

    No weights are loaded; for a model on the Hub, only config.json is downloaded.
    """
    print(to_yaml(config).rstrip())
    base, data = config.model.base, config.dataset.name
    start = base if stage == "sft" else sft_adapter(config)
    if stage == "grpo":
        print(f"# start: {start} (fused), fresh LoRA over it")
    else:
        print(f"# base: {base} ({'local folder' if Path(base).expanduser().is_dir() else 'Hub'})")
    if local_files(data) or looks_local(data):
        read_rows(config, prefix="# data: ")
    else:
        print(f"# data: {data} (Hub)")
    print(f"# result: {config.model.output}")
    try:
        files = ["config.json"]
        chain = read_chain(base, files) if stage == "sft" else sft_chain(config, files)
        # Nothing is tokenised yet: assume rows as long as allowed, and short queries.
        longest = config.training.max_length if stage == "sft" else 64
        report_memory(stage, config, chain, longest, prefix="# ")
    except ModelError as error:
        print(f"# memory: not estimated: {error}")
