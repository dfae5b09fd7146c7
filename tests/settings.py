"""Configurations for tests: the defaults of configs/sft.yaml with a test's own values over them."""

from dataclasses import replace

from expander.config import Config, load_config


def default_config(**sections) -> Config:
    """The default configuration; `sections` replace whole sections."""
    return replace(load_config("sft")[0], **sections)


def section(name: str, /, **values):
    """One section, such as "training", with some of its keys changed."""
    return replace(getattr(default_config(), name), **values)
