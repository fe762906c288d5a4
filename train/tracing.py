"""Chrome traces of chosen steps (`profile` in the run config), for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from train.config import Profile, RunConfig
from train.phases import PhaseTable

logger = logging.getLogger(__name__)


def idle_profile(config: RunConfig, processes: int) -> Iterator[str]:
    """What `profile` asks for and will not get, as warnings."""
    if (profile := config.profile) is None:
        return
    last, absent = PhaseTable(config).total_steps, [rank for rank in profile.ranks if rank >= processes]
    if profile.steps[0] > last:
        yield f"profile.steps: {list(profile.steps)}: the run ends at step {last}: nothing is recorded"
    if absent:
        yield f"profile.ranks: {absent}: ranks are 0 to {processes - 1}: nothing is recorded of these"


class StepProfile:
    """Records the config's steps on its ranks; on others, and without one, nothing.

    A trace, `RUN/profile/steps-A-B-rankR.json.gz`, is written when its last step is done, or when training ends before.
    """

    def __init__(self, config: Profile | None, folder: Path, rank: int) -> None:
        self._steps = config.steps if config is not None and rank in config.ranks else None
        self._folder, self._rank = folder / "profile", rank
        self._recording: Any = None
        self._first = self._last = 0

    def begin(self, step: int) -> None:
        """Before a step."""
        if self._steps is None or self._recording is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._recording, self._first = torch.profiler.profile(activities=activities), step
        self._recording.start()

    def end(self, step: int) -> None:
        """After a step."""
        self._last = step
        if self._steps is not None and step == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Writes what is being recorded."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        recording.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first}-{self._last}-rank{self._rank}.json.gz"
        aside = path.with_name(f".{path.name}")
        recording.export_chrome_trace(str(aside))
        aside.replace(path)
        logger.info("profile of steps %d to %d: %s", self._first, self._last, path)
