"""jsonl to .bin/.idx: ours against Megatron's builder fed by sentencepiece, same input, same run, same bytes.

pip install -r benchmarks/requirements.txt
python -m benchmarks.data_prep_tokenize --megabytes 30
"""

from __future__ import annotations

import argparse
import filecmp
import importlib
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

from benchmarks.data_prep_corpus import documents
from data_prep.config import Source
from data_prep.indexed import write_index
from data_prep.readers import read_records
from data_prep.tokenizer import load_tokenizer

_BATCH_BYTES = 8 << 20


def ours(path: Path, prefix: Path) -> None:
    """The product's reader, encoder and index writer."""
    tokenizer = load_tokenizer()
    source = Source(name="s", path=str(path), format="jsonl")
    lengths: list[np.ndarray] = []
    with open(f"{prefix}.bin", "wb") as binary:

        def flush(texts: list[str]) -> None:
            ids, counted = tokenizer.encode_flat(texts)
            binary.write(np.insert(ids, np.cumsum(counted), tokenizer.eod_id).astype(np.uint16).tobytes())
            lengths.append(counted + 1)

        held: list[str] = []
        size = 0
        for record in read_records(path, source):
            held.append(record.text or "")
            size += len(held[-1])
            if size >= _BATCH_BYTES:
                flush(held)
                held, size = [], 0
        flush(held)
    with open(f"{prefix}.idx", "wb") as index:
        write_index(index, np.concatenate(lengths), np.dtype(np.uint16))


def megatron(path: Path, prefix: Path) -> None:
    """Megatron-LM's tools/preprocess_data.py in short: json, sentencepiece, IndexedDatasetBuilder."""
    import json

    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = load_tokenizer()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    with open(path) as file:
        for line in file:
            ids = [*tokenizer.processor.encode(json.loads(line)["text"], out_type=int), tokenizer.eod_id]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=30)
    texts = documents(parser.parse_args().megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "raw.jsonl"
        path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
        start = time.process_time()
        load_tokenizer().encode_flat(["load the tables and compile"])
        print(f"{len(texts)} documents, {size:.1f} MB; start-up {time.process_time() - start:.1f} s, not counted below")
        importlib.import_module("megatron.core.datasets.indexed_dataset")  # its import is not counted either

        seconds = {}
        for function in (ours, megatron):
            start = time.process_time()
            function(path, Path(folder) / function.__name__)
            seconds[function.__name__] = time.process_time() - start
            print(f"{function.__name__:10} {size / seconds[function.__name__]:7.2f} MB per CPU second of one process")
        print(f"ratio      {seconds['megatron'] / seconds['ours']:7.2f}")
        for suffix in ("bin", "idx"):
            same = filecmp.cmp(f"{folder}/ours.{suffix}", f"{folder}/megatron.{suffix}", shallow=False)
            print(f".{suffix} identical: {same}")


if __name__ == "__main__":
    main()
