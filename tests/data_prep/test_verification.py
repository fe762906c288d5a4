"""Verification by exact Jaccard similarity: against plain Python sets, and in whole runs."""

from __future__ import annotations

import random
import string
from pathlib import Path

import numpy as np
import pytest
import xxhash

from common.errors import DataError
from data_prep.config import load_config
from data_prep.manifests import Unit
from data_prep.plan import load_plan
from data_prep.shingles import PRESETS, fold, jaccard, ngram_set
from data_prep.stages.dedup import duplicates_of
from data_prep.verification import LEADERS, FoldedTexts, verified


def grams(text: str, preset: str) -> set:
    """The n-grams of a text, by plain Python."""
    n = PRESETS[preset].ngram
    if PRESETS[preset].unit == "char":
        units: list[str] | str = " ".join(text.lower().split())
    else:
        units = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return {tuple(units[i : i + n]) for i in range(max(1, len(units) - n + 1))}


def similarity(a: str, b: str, preset: str) -> float:
    x, y = grams(a, preset), grams(b, preset)
    return len(x & y) / len(x | y)


def edited(words: list[str], edits: int, r: random.Random) -> str:
    copy = list(words)
    for _ in range(edits):
        copy[r.randrange(len(copy))] = f"new{r.randrange(10**6)}"
    return " ".join(copy) + "."


def texts_of(seed: int, count: int = 30) -> list[str]:
    """Texts and edited copies of them, from alike to hardly alike."""
    r = random.Random(seed)
    found = []
    for _ in range(count):
        words = [f"word{r.randrange(3000)}" for _ in range(r.choice((5, 60, 300)))]
        found += [edited(words, edits, r) for edits in (0, 1, 4, 15)]
    return found


@pytest.mark.parametrize("preset", list(PRESETS))
def test_jaccard_equals_plain_python(preset):
    texts = texts_of(1)
    sets = [ngram_set(fold(text), PRESETS[preset]) for text in texts]
    values = []
    for i in range(0, len(texts), 4):
        for a, b in ((i, i), (i, i + 1), (i, i + 2), (i, i + 3), (i + 1, (i + 4) % len(texts))):
            values.append(similarity(texts[a], texts[b], preset))
            assert jaccard(sets[a], sets[b]) == pytest.approx(values[-1], abs=1e-12)
    assert min(values) == 0 and max(values) == 1 and len(set(values)) > 20
    assert jaccard(ngram_set(b"!!!" * (preset != "zyda2"), PRESETS[preset]), sets[0]) == 0


def stored(folder: Path, texts: list[str], files: int) -> FoldedTexts:
    """Texts as the read stage leaves them, in several files."""
    bases = np.linspace(0, len(texts), files + 1).astype(np.int64)
    for number in range(files):
        parts = [fold(text) for text in texts[bases[number] : bases[number + 1]]]
        (folder / f"{number}.folded.bin").write_bytes(b"".join(parts))
        table = [np.cumsum([0, *map(len, parts)]).tolist(), [0, *map(xxhash.xxh3_64_intdigest, parts)]]
        np.save(folder / f"{number}.folded.npy", np.array(table, np.uint64))
    return FoldedTexts(bases, folder, [Unit("", "", str(number), "") for number in range(files)])


def test_links_are_kept_at_the_threshold(tmp_path):
    """Every pair that is linked reaches the threshold, what has such a partner in its bucket is linked."""
    texts = texts_of(2)
    with stored(tmp_path, texts, 90) as folded:  # more files than may be open at once
        assert [folded[i] for i in (119, 0, 60, 119)] == [fold(texts[i]) for i in (119, 0, 60, 119)]
        # Buckets of two groups each: their first is like the next three only as far as the edits go.
        links = [(i, j) for i in range(0, 120, 8) for j in range(i + 1, i + 8)]
        buckets = np.random.default_rng(0).permutation(np.array(links).reshape(-1, 7, 2))
        found = verified(buckets.reshape(-1, 2), folded, PRESETS["zyda"])
    expected = []
    for first in range(0, 120, 8):
        leaders: list[int] = []
        for rank in range(first, first + 8):
            leader = next((x for x in leaders if similarity(texts[x], texts[rank], "zyda") >= 0.4), None)
            if leader is None:
                leaders.append(rank)
            else:
                expected.append((leader, rank))
    assert [tuple(pair) for pair in found.tolist()] == expected
    assert 0 < len(expected) < 15 * 6 and any(a % 8 for a, _ in expected)


def test_a_bucket_of_unlike_documents_is_bounded(tmp_path):
    texts = [f"{word} " * 30 for word in string.ascii_lowercase[: LEADERS + 2]]
    texts += [texts[LEADERS - 1], texts[LEADERS], "?!", "?!"]
    with stored(tmp_path, texts, 1) as folded:
        links = np.array([(0, other) for other in range(1, len(texts))], np.int64)
        assert verified(links, folded, PRESETS["zyda"]).tolist() == [[LEADERS - 1, LEADERS + 2]]
        assert verified(links[-1:], folded, PRESETS["zyda"]).tolist() == []
        assert verified(links[:0], folded, PRESETS["zyda"]).shape == (0, 2)
        signs = np.array([(LEADERS + 4, LEADERS + 5)], np.int64)
        assert verified(signs, folded, PRESETS["zyda"]).tolist() == signs.tolist()  # no word, but the same bytes


@pytest.mark.parametrize(("suffix", "place"), [("bin", 3), ("npy", 3), ("npy", 70), ("npy", 128 + 9), ("npy", -1)])
def test_a_folded_text_that_changed_is_named(tmp_path, suffix, place):
    """Its bytes, the head of the table, an offset, a hash."""
    with stored(tmp_path, ["one two", "three four"], 1) as folded:
        path = tmp_path / f"0.folded.{suffix}"
        data = bytearray(path.read_bytes())
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"0.folded.*: has changed .*; remove {tmp_path}/0.manifest.json and run"):
            assert [folded[0], folded[1]]


def test_a_verified_run_drops_only_what_is_alike(workplace):
    """Pairs on both sides of the threshold: without verification many of the less similar ones count as duplicates."""
    r = random.Random(9)
    texts = []
    for _ in range(120):
        words = [f"word{r.randrange(10**5)}" for _ in range(200)]
        texts += [edited(words, 0, r), edited(words, 9, r)]  # a Jaccard similarity of about 0.35
    texts += [edited(texts[0].split(), 1, r)]
    for number in range(3):
        rows = [{"id": str(i), "text": text} for i, text in enumerate(texts) if i % 3 == number]
        workplace.jsonl(f"raw/v/{number}.jsonl", rows)
    source = [{"name": "v", "path": "raw/v/*.jsonl", "format": "jsonl"}]
    workplace.write_config(sources=source, stages={"dedup": {"exact": True, "minhash": "zyda"}})
    for output in ("plain", "checked", "again"):
        verify = str(output != "plain").lower()
        workplace.cli("run", "prep.yaml", f"stages.dedup.verify={verify}", f"output={output}", "held_out=0")
    plain, checked = (workplace.manifests("dedup-clusters", output)[0] for output in ("plain", "checked"))
    assert plain["duplicates"] > checked["duplicates"]
    bands = workplace.manifests("dedup-bands", "checked")
    assert sum(m["unlike"] for m in bands) > 20 and all(
        m["unlike"] == 0 for m in bands if m["options"]["band"] == "exact"
    )
    assert not list((workplace.folder / "plain").rglob("*.folded.*"))
    workplace.cli("report", "prep.yaml", "stages.dedup.verify=true", "output=checked", "held_out=0")
    assert "by way of others" in (workplace.folder / "checked/report.html").read_text()
    (workplace.folder / "checked/report.html").unlink()
    (workplace.folder / "checked/report.png").unlink(missing_ok=True)
    assert workplace.hashes("again") == workplace.hashes("checked")

    overrides = ["stages.dedup.verify=true", f"output={workplace.folder / 'checked'}", "held_out=0"]
    plan = load_plan(load_config(workplace.folder / "prep.yaml", overrides))
    order = [i for number in range(3) for i in range(number, len(texts), 3)]
    duplicate = np.concatenate([duplicates_of(plan, unit) for unit in plan.read_units])
    for rank, i in enumerate(order):
        near = [j for j in order[:rank] if j // 2 == i // 2 or 0 in (i, j)]
        alike = [j for j in near if similarity(texts[i], texts[j], "zyda") >= 0.4]
        assert not duplicate[rank] or alike  # nothing is dropped without an earlier one that is alike
    assert duplicate[order.index(len(texts) - 1)]  # one word of 200 changed
