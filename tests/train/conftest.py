"""One undisturbed run, made once, that the tests of this folder copy, continue and compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.train.fixtures import small_run, write_run
from tests.train.ranks import Ranks, train

LAYOUT = ("parallel.tensor=2", "parallel.sequence=true")


@dataclass
class Trial:
    """A run directory of one test's own, and how to start the run there."""

    file: Path
    folder: Path

    def start(self, *overrides: object, world: int = 2, layout: tuple[str, ...] = LAYOUT, **given: Any) -> Ranks:
        overrides = (f"run_dir={self.folder}", *layout, *overrides)
        return Ranks(world, self.file, *overrides, log=self.folder.with_suffix(".log"), **given)

    def ends(self, *overrides: object, codes: list[int] | None = None, **given: Any) -> str:
        """Runs to the end, expects exit codes (0 of all ranks), returns what this start printed."""
        log = self.folder.with_suffix(".log")
        before = len(log.read_text()) if log.exists() else 0
        ranks = self.start(*overrides, **given)
        found = ranks.wait()
        output = ranks.output[before:]
        assert found == (codes or [0] * len(found)), output
        return output


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 steps in two phases, tensor 2 with sequence parallelism, float32, checkpoints at 3, 6, 8, 9, 12, 14 (8, 12 and
    14 are kept). `run.yaml` lies beside it.
    """
    folder = tmp_path_factory.mktemp("undisturbed")
    mapping = small_run(folder, micro_batch_size=8, checkpoint={"every": 3, "keep_last": 2})
    train(2, write_run(folder, mapping), *LAYOUT, log=folder / "log")
    return folder / "run"


@pytest.fixture
def trial(undisturbed: Path, tmp_path: Path) -> Trial:
    """A run from the start."""
    return Trial(undisturbed.parent / "run.yaml", tmp_path / "run")


@pytest.fixture
def copied(undisturbed: Path, trial: Trial) -> Trial:
    """The finished run, copied."""
    shutil.copytree(undisturbed, trial.folder)
    return trial


@pytest.fixture
def back_at(copied: Trial) -> Callable[[int], Trial]:
    """The copied run as if it had been killed after its checkpoint of a step (8 or 12)."""

    def back(step: int) -> Trial:
        for path in (copied.folder / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        return copied

    return back
