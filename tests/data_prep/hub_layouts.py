"""The layouts and column schemas of the hub data sets that `configs/data_prep` names, as generated local folders."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Row = dict[str, Any]
FILES, ROWS, NULLS = 3, 340, 9
"""Of the three files of a schema, the second has nulls and the third lacks a column."""


class Layout(NamedTuple):
    """How one data set lies on the hub."""

    files: tuple[str, str, str]
    """Below the repository's root."""
    extra: Callable[[int], Row]
    """The columns beside the text ones, by row number."""
    texts: tuple[str, ...] = ("text",)
    """The columns that the text is made of; the last one is the one damaged."""


def _names(pattern: str) -> tuple[str, str, str]:
    return pattern.format(0), pattern.format(1), pattern.format(2)


def _json(**values: Any) -> str:
    return orjson.dumps(values).decode()


def _zyda(i: int) -> Row:
    features = _json(mean_word_length=4.7, fraction_non_alphanumeric=0.18, fraction_numerical=0.01)
    return {"source": "c4_en", "filtering_features": features, "source_other": _json(url=f"https://a.test/{i}")}


def _fineweb(i: int) -> Row:
    row = {
        "id": f"<urn:uuid:{i:08d}>",
        "dump": "CC-MAIN-2013-20",
        "url": f"https://a.test/{i}",
        "file_path": "s3://x/y",
    }
    return row | {"language": "en", "language_score": 0.97, "token_count": 300, "score": 3.2, "int_score": 3}


def _dclm(i: int) -> Row:
    metadata = {"Content-Length": "1234", "WARC-Record-ID": f"<urn:uuid:{i:08d}>", "WARC-Type": "response"}
    row: Row = {"bff_contained_ngram_count_before_dedupe": 2, "language_id_whole_page_fasttext": {"en": 0.99}}
    row |= {
        "metadata": metadata,
        "previous_word_count": 512,
        "url": f"https://a.test/{i}",
        "warcinfo": "robots: classic",
    }
    return row | {"fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.14}


def _starcoder(i: int) -> Row:
    row = {"max_stars_repo_path": f"src/{i}.py", "max_stars_repo_name": "a/b", "max_stars_count": i or None}
    return row | {"id": str(10**6 + i)}


def _refinedweb(i: int) -> Row:
    row: Row = {"url": f"https://a.test/{i}", "timestamp": datetime(2020, 1, 1) + timedelta(hours=i)}
    return row | {"dump": "CC-MAIN-2020-05", "segment": "157", "image_urls": [[f"https://a.test/{i}.png", "alt"]]}


def _pes2o(i: int) -> Row:
    row = {"added": "2022-10-17T00:00:00.000Z", "created": "2015-01-01T00:00:00.000Z", "id": str(i)}
    return row | {"source": "s2orc/train", "version": "v2"}


def _dolma(i: int) -> Row:
    row: Row = {"id": f"http://a.test/{i}", "added": "2023-04-11T09:57:03Z", "created": "2020-01-17T12:48:23Z"}
    return row | {
        "source": "common-crawl",
        "metadata": {"bucket": "head", "cc_segment": "crawl-data/x"},
        "version": "1",
    }


_ZYDA = "data/zyda_no_starcoder/{}/{{}}.parquet"
_NEMO = "data/{}/{{}}.parquet"
_STARS = (
    "python/train-00000-of-00059.parquet",
    "python/train-00001-of-00059.parquet",
    "c/train-00000-of-00053.parquet",
)
_ORCA = ("1M-GPT4-Augmented.parquet", "2M-GPT3_5-Augmented.parquet", "3_5M-GPT3_5-Augmented.parquet")
_WIKI = "20231101.en/train-{:05d}-of-00041.parquet"


def _zyda_part(name: str) -> Layout:
    return Layout(_names(_ZYDA.format(name)), _zyda)


def _nemo(name: str, extra: Callable[[int], Row]) -> Layout:
    return Layout(_names(_NEMO.format(name)), lambda i: {"nemo_id": f"{name.split('/')[0]}-{i}", **extra(i)})


LAYOUTS: dict[str, dict[str, Layout]] = {
    "zyda": {
        "starcoder": Layout(_names("data/zyda_starcoder/zyda_starcoder-languages/{}.parquet"), _zyda),
        "refinedweb": _zyda_part("zyda_refinedweb"),
        "peS2o": _zyda_part("zyda_peS2o"),
        "arxiv": _zyda_part("zyda_arxiv"),
        "c4-en": _zyda_part("c4_en"),
        "pile-uncopyrighted": _zyda_part("zyda_pile-uncopyrighted"),
        "slimpajama": _zyda_part("zyda_slimpajama"),
    },
    "zyda-components": {
        "starcoder": Layout(_STARS, _starcoder, ("content",)),
        "refinedweb": Layout(_names("data/train-{:05d}-of-05534-b8fc5348cbe605a5.parquet"), _refinedweb, ("content",)),
        "peS2o": Layout(_names("data/v2/train-{:05d}-of-00020.json.gz"), _pes2o),
        "arxiv": _zyda_part("zyda_arxiv"),
        "c4-en": Layout(
            _names("en/c4-train.{:05d}-of-01024.json.gz"),
            lambda i: {"timestamp": "2019-04-25T12:57:54Z", "url": f"https://a.test/{i}"},
        ),
        "pile-uncopyrighted": Layout(
            _names("train/{:02d}.jsonl.zst"), lambda i: {"meta": {"pile_set_name": "Pile-CC"}}
        ),
        "slimpajama": Layout(
            _names("train/chunk1/example_train_{}.jsonl.zst"), lambda i: {"meta": {"redpajama_set_name": "RedPajamaC4"}}
        ),
    },
    "zyda2": {
        "fwe3": _nemo("fwe3/CC-MAIN-2013-20", _fineweb),
        "dclm_crossdeduped": _nemo(
            "dclm_crossdeduped/global-shard_01_of_10/local-shard_0_of_10",
            lambda i: {**_dclm(i), "language_id_whole_page_fasttext": {"en": 0.99}},
        ),
        "zyda_crossdeduped-filtered": _nemo("zyda_crossdeduped-filtered/zyda_arxiv", _zyda),
        "dolma-cc_crossdeduped-filtered": _nemo("dolma-cc_crossdeduped-filtered", _dolma),
    },
    "zyda2-components": {
        "fineweb-edu": Layout(_names("data/CC-MAIN-2013-20/train-{:05d}-of-00014.parquet"), _fineweb),
        "dclm": Layout(_names("global-shard_01_of_10/local-shard_0_of_10/shard_{:08d}_processed.jsonl.zst"), _dclm),
        "zyda": _zyda_part("zyda_peS2o"),
        "dolma-cc": Layout(_names("cc_en_head/cc_en_head-{:04d}.json.gz"), _dolma),
    },
    "anneal": {
        "instruct": Layout(
            _ORCA,
            lambda i: {"id": f"flan.{i}", "system_prompt": "" if i % 2 else "Be brief."},
            ("question", "response"),
        ),
        "math": Layout(
            _names("data/train-{:05d}-of-00114-5f5d3a3a8a7b4a52.parquet"),
            lambda i: {
                "url": f"https://a.test/{i}",
                "date": datetime(2016, 2, 1),
                "metadata": _json(extraction_info={}),
            },
        ),
        "textbooks": Layout(
            _names("data/auto_math_text/train-{:05d}-of-00018.parquet"),
            lambda i: {"prompt": "Write a text", "text_token_length": 90, "seed_data": "x", "format": "textbook"},
        ),
        "wikipedia": Layout(
            _names(_WIKI), lambda i: {"id": str(i), "url": f"https://a.test/{i}", "title": f"Title {i}"}
        ),
        "arxiv-anneal": _zyda_part("zyda_arxiv"),
    },
}


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
        return
    data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else zstandard.compress(data))


def build(root: Path, layout: Layout, words: list[str], seed: int) -> list[list[str]]:
    """Writes the files of a data set; returns the texts of every whole record, column by column."""
    r = random.Random(seed)
    whole: list[list[str]] = []
    for number, name in enumerate(layout.files):
        rows = []
        for i in range(ROWS):
            texts: dict[str, Any] = {column: " ".join(r.choices(words, k=40)) for column in layout.texts}
            if number == 1 and i % (ROWS // NULLS) == 3:
                texts[layout.texts[-1]] = None
            if number == 2:
                del texts[layout.texts[-1]]
            else:
                whole.extend([list(texts.values())] if None not in texts.values() else [])
            rows.append({**texts, **layout.extra(number * ROWS + i)})
        _write(root / name, rows)
    return whole
