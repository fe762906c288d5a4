"""The encoder against sentencepiece, id by id: real text of five kinds, and hostile strings.

python -m benchmarks.data_prep_tokenizer_parity --megabytes 120 --hostile 50000
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from benchmarks.data_prep_kinds import FOLDERS, documents
from data_prep.tokenizer import Tokenizer, load_tokenizer

Maker = Callable[[random.Random], str]
_PLANES = 17


def _spaces(r: random.Random) -> str:
    runs = [
        r.choice([" ", "\u2581", "\t", "\n", "\u00a0", "\u3000"]) * r.randint(1, 70) for _ in range(r.randint(1, 6))
    ]
    return r.choice(["", "x"]).join(r.choice([run, f"{run}a", f"a{run}"]) for run in runs)


def _planes(r: random.Random) -> str:
    codes = (r.randrange(_PLANES) << 16 | r.randrange(1 << 16) for _ in range(r.randint(1, 60)))
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def _scripts(r: random.Random) -> str:
    start = r.choice([0x20, 0xA0, 0x370, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1100, 0x3040, 0x4E00, 0xAC00, 0x1F300])
    return "".join(chr(start + r.randrange(160)) for _ in range(r.randint(1, 80)))


def _controls(r: random.Random) -> str:
    marks = [
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<0x0A>",
        "<0x00>",
        "<0xFF>",
        "[INST]",
        "[/INST]",
        "<|im_end|>",
        " ",
        "\n",
        "a",
    ]
    return "".join(r.choices(marks, k=r.randint(1, 12)))


def _bytes(r: random.Random) -> str:
    """Text cut inside a character and random bytes, decoded as the readers decode them; NUL and other controls."""
    whole = _planes(r).encode()
    cut = whole[r.randrange(4) : max(1, len(whole) - r.randrange(4))] + r.randbytes(r.randrange(6))
    return cut.decode(errors="replace") + chr(r.randrange(32)) * r.randint(0, 3) + "\0" * r.randint(0, 2)


def _letters(r: random.Random) -> str:
    """No borders to cut at: long words, repeats, digits, base64."""
    letters = r.choice(["ab", "a", "aeinrst", "0123456789", "ABCDEFabcdef0123456789+/", "=-_", ".,;:", "\u00e9e"])
    return "".join(r.choices(letters, k=r.randint(1, 400)))


def _salad(pieces: list[str]) -> Maker:
    return lambda r: "".join(r.choices(pieces, k=r.randint(1, 25)))


def _megabyte(r: random.Random) -> str:
    unit = r.choice(
        ["a", " ", "\u2581", "ab", "return ", "\u65e5\u672c", "0", "=", "\U0001d518", "</s>", "x" * 63 + " ", "\n"]
    )
    filler = r.choice([unit, unit + "".join(r.choices("abcdefghij ", k=9973))])
    return (filler * (1_000_000 // len(filler) + 1))[:1_000_000]


def hostile(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[tuple[str, Iterator[str]]]:
    """(class, strings) of `count` strings in all, and forty lines of a million characters."""
    pieces = [tokenizer.processor.id_to_piece(i).replace("\u2581", " ") for i in range(tokenizer.vocab_size)]
    makers: dict[str, Maker] = {
        "runs of spaces": _spaces,
        "all planes": _planes,
        "scripts": _scripts,
        "control tokens as text": _controls,
        "truncated UTF-8, NUL": _bytes,
        "words without borders": _letters,
        "pieces, shuffled": _salad(pieces),
    }
    for number, (name, maker) in enumerate(makers.items()):
        share = count * (number + 1) // len(makers) - count * number // len(makers)
        r = random.Random(f"{seed} {name}")
        yield name, (maker(r) for _ in range(share))
    r = random.Random(f"{seed} megabyte")
    yield "lines of a megabyte", (_megabyte(r) for _ in range(40))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= 4 << 20:
            yield held
            held, size = [], 0
    if held:
        yield held


def compare(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int, int, int, float, float]:
    """Texts, bytes, ids, differing texts; CPU seconds of ours and of sentencepiece."""
    count = size = tokens = differ = 0
    seconds = [0.0, 0.0]
    for batch in _batches(texts):
        start = time.process_time()
        ids, lengths = tokenizer.encode_flat(batch)
        middle = time.process_time()
        reference = tokenizer.processor.encode(batch, out_type=int, num_threads=1)
        seconds[0] += middle - start
        seconds[1] += time.process_time() - middle
        ends = np.cumsum(lengths)
        for end, length, row in zip(ends, lengths, reference, strict=True):
            differ += not np.array_equal(ids[end - length : end], np.asarray(row, ids.dtype))
        count, size, tokens = count + len(batch), size + sum(len(t.encode()) for t in batch), tokens + len(ids)
    return count, size, tokens, differ, seconds[0], seconds[1]


def main() -> int:
    """Command line entry; exit code 5 when an id differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=120, help="of real text")
    parser.add_argument("--hostile", type=int, default=50_000, help="strings")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer()
    tokenizer.encode_flat(["load the tables and compile"])
    share = arguments.megabytes / len(FOLDERS)
    rows: list[tuple[str, Iterable[str]]] = [
        (kind, (text for _, text in documents(kind, share, arguments.seed))) for kind in FOLDERS
    ]
    rows += hostile(tokenizer, arguments.hostile, arguments.seed)
    print(f"{'':24}{'texts':>8}{'MB':>8}{'ids':>12}{'differ':>8}{'ours MB/s':>11}{'sentencepiece':>15}")
    total, wrong = [0, 0, 0], 0
    for name, texts in rows:
        count, size, tokens, differ, ours, theirs = compare(tokenizer, texts)
        total, wrong = [a + b for a, b in zip(total, (count, size, tokens), strict=True)], wrong + differ
        speeds = f"{size / 1e6 / max(ours, 1e-9):11.1f}{size / 1e6 / max(theirs, 1e-9):15.2f}"
        print(f"{name:24}{count:8,}{size / 1e6:8.1f}{tokens:12,}{differ:8}{speeds}", flush=True)
    print(f"{'all':24}{total[0]:8,}{total[1] / 1e6:8.1f}{total[2]:12,}{wrong:8}")
    return 5 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
