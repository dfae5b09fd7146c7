"""What a run starts from: rows, prompts, the SFT adapter; and a dry run's account of them."""

import random
import sys
from pathlib import Path

from expander.config import Config, to_yaml


def read_rows(config: Config):
    """The data set's rows, split, as the configuration asks."""
    from expander.rows import load_rows

    data = config.dataset
    return load_rows(
        data.name,
        split=data.split,
        text_field=data.text_field,
        prompt_field=data.prompt_field,
        eval_split=data.eval_split,
        max_samples=data.max_samples,
        seed=config.training.seed,
    )


def encode_prompts(examples, config: Config, tokenizer) -> list[tuple[str, list[int]]]:
    """(query, prompt ids) of each example; the query travels along, never parsed back out."""
    from expander.prompt import render_prompt
    from expander.qmd import QMD_SYSTEM_PROMPT

    rng, pairs = random.Random(config.training.seed), []
    for example in examples:
        # QMD sends its system turn with every query; this share of the prompts shows it.
        share = config.dataset.qmd_system_prompt_share
        system = QMD_SYSTEM_PROMPT if rng.random() < share else None
        intent = example.intent if config.dataset.intent else None
        text = render_prompt(example.query, system, intent)
        pairs.append((example.query, tokenizer.encode(text, add_special_tokens=False)))
    return pairs


def sft_folder(config: Config) -> Path:
    folder = Path(config.model.sft).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model.sft {folder}: there is no SFT adapter; run python train.py sft first, or name "
            "its folder with --set model.sft=DIR"
        )
    if folder.resolve() == Path(config.model.output).expanduser().resolve():
        raise ValueError(
            f"model.output and model.sft are the same folder, {folder}: choose another"
        )
    return folder


def dry_run(stage: str, config: Config) -> None:
    """Print the resolved configuration, what would be loaded and the memory that it would take.

    No model is loaded; of a Hub model, config.json alone is fetched.
    """
    from expander import model as models
    from expander.rows import local_files, looks_local
    from expander.train.memory import preflight

    print(to_yaml(config).rstrip())
    base, data = config.model.base, config.dataset.name
    start = base if stage == "sft" else str(sft_folder(config))
    if stage == "grpo":
        print(f"# start: {start} (fused), fresh LoRA over it")
    else:
        print(f"# base: {base} ({'local folder' if Path(base).expanduser().is_dir() else 'Hub'})")
    if local_files(data) or looks_local(data):
        print(f"# data: {data}: {read_rows(config).summary()}")
    else:
        print(f"# data: {data} (Hub)")
    print(f"# result: {config.model.output}")
    try:
        chain = models.read_chain(start, files=["config.json"])
        # Nothing is tokenised yet: rows may be as long as allowed, a query's prompt is short.
        longest = config.training.max_length if stage == "sft" else 64
        memory, warning = preflight(stage, config, chain, longest)
    except models.ModelError as error:
        memory, warning = f"memory: not estimated: {error}", None
    print(f"# {memory}")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
