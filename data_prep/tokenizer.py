"""The Mistral v0.1 tokenizer: found by name or path, checked by hash, sentencepiece's own ids."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from common.config import expand_path
from common.errors import DataError
from common.files import sha256_file

if TYPE_CHECKING:
    from data_prep.fast_encoder import FastEncoder

MODEL_VARIABLE = "ZAMBA_TOKENIZER_MODEL"
# Mistral-7B-v0.1's tokenizer.model, shipped by mistral-common (Apache-2.0) as data/tokenizer.model.v1.
KNOWN_SHA256 = {"mistral-v0.1": "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"}


class Tokenizer:
    """A SentencePiece model. A document is encoded whole, as plain text: ``</s>`` in a text is not a control token.

    Attributes:
        path: the model file.
        sha256: its hash, in hex.
        vocab_size: number of ids.
        bos_id, eod_id: ids written before and after a document where the config asks for it.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        self.path, self.sha256 = path, sha256
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError("tokenizer", path, f"is not a SentencePiece model: {error}", "give one") from None
        self._fast: FastEncoder | None = None
        self.vocab_size = int(self.processor.vocab_size())
        self.bos_id = int(self.processor.bos_id())
        self.eod_id = int(self.processor.eos_id())

    def encode(self, text: str) -> np.ndarray:
        """The ids of one document, int32 (tokens,), without BOS or EOD."""
        return np.asarray(self.processor.encode(text, out_type=int), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        rows = self.processor.encode(list(texts), out_type=int, num_threads=1)
        return [np.asarray(row, dtype=np.int32) for row in rows]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end (tokens,), and tokens of each, int64 (texts,).

        Mistral v0.1 is encoded by `data_prep.fast_encoder`, any other model by sentencepiece; the ids are the same.
        """
        if self.sha256 in KNOWN_SHA256.values():
            if self._fast is None:
                from data_prep.fast_encoder import FastEncoder  # numba: only data preparation needs it

                self._fast = FastEncoder(self.processor)
            return self._fast.encode(texts)
        rows = self.encode_batch(texts)
        return np.concatenate([np.zeros(0, np.int32), *rows]), np.array([len(row) for row in rows], np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Exact inverse of `encode` for valid text, except that U+2581 comes back as a space."""
        return str(self.processor.decode([int(i) for i in ids]))


def find_model(name_or_path: str) -> Path:
    """The model file for a known name (see `KNOWN_SHA256`) or a path.

    Raises:
        DataError: there is none; says how to get it.
    """
    if name_or_path not in KNOWN_SHA256:
        path = Path(str(expand_path(name_or_path)))
        if not path.is_file():
            names = ", ".join(KNOWN_SHA256)
            raise DataError("tokenizer", name_or_path, "no such file or name", f"give {names} or a tokenizer.model")
        return path
    if given := os.environ.get(MODEL_VARIABLE):
        path = Path(given)
    else:
        # find_spec does not run the package, whose import is slow and pins unrelated versions.
        spec = importlib.util.find_spec("mistral_common")
        folders = list(spec.submodule_search_locations or []) if spec else []
        path = Path(folders[0]) / "data" / "tokenizer.model.v1" if folders else Path("mistral_common")
    if not path.is_file():
        cure = f"pip install mistral-common, or set {MODEL_VARIABLE} to the path of Mistral-7B-v0.1's tokenizer.model"
        raise DataError("tokenizer", name_or_path, f"its model file is not at {path}", cure)
    return path


@functools.cache
def load_tokenizer(name_or_path: str = "mistral-v0.1") -> Tokenizer:
    """Loads ``mistral-v0.1`` (hash checked) or any ``tokenizer.model`` (hash recorded).

    Raises:
        DataError: missing, not a SentencePiece model, or not the file of that name.
    """
    path = find_model(name_or_path)
    sha256 = sha256_file(path)
    expected = KNOWN_SHA256.get(name_or_path)
    if expected and sha256 != expected:
        limit = f"{path} has sha256 {sha256}, not {expected}"
        raise DataError("tokenizer", name_or_path, limit, "give Mistral-7B-v0.1's tokenizer.model")
    return Tokenizer(path, sha256)
