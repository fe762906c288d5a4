"""The data of a run, opened and checked against its tokenizer and its model."""

from __future__ import annotations

from common.errors import ConfigError
from data_prep.tokenizer import Tokenizer, load_tokenizer
from train.config import RunConfig
from train.data import TrainingData


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        DataError: it is missing or damaged. ConfigError: it has more ids than the model.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            config.model.vocab_size,
            f"is below the tokenizer's {tokenizer.vocab_size} ids",
            "enlarge it or use another tokenizer",
        )
    return tokenizer


def open_data(config: RunConfig, planning: bool = False) -> TrainingData:
    """The sources of all phases and their order; `planning` as in `TrainingData`.

    Raises:
        DataError: a source or the tokenizer is missing or damaged. ConfigError: the tokenizer does not fit the model.
    """
    return TrainingData(config, open_tokenizer(config).sha256, planning)
