"""The training loop: one step after another, each a pure function of (config, step) and the state before it."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from common.errors import Exit, HealthError
from common.version import VERSION
from model.flops import flops_per_token
from train.checkpoint.manager import CheckpointManager
from train.checkpoint.manifest import FileEntry, Fingerprints, Manifest
from train.config import Run
from train.data import MicroBatch, Prefetcher, StepBatch, TrainingData
from train.distributed import Layout, first_fault
from train.engine import Engine
from train.evaluation import evaluate
from train.graph import Graphed
from train.hardware import memory_in_use, peak_flops
from train.health import Signals, SkipRule, Watchdog
from train.tracing import StepProfile
from train.tracking import Tracker, finite, now

logger = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Everything one rank needs for the steps of a run."""

    run: Run
    config_sha256: str
    layout: Layout
    model: nn.Module
    engine: Engine
    data: TrainingData
    checkpoints: CheckpointManager
    rule: SkipRule
    watchdog: Watchdog
    signals: Signals
    tracker: Tracker | None
    """Only on the first rank."""
    restarts: int
    fingerprints: Fingerprints
    wandb_run_id: str | None
    step: int
    """Steps done."""

    def __post_init__(self) -> None:
        config = self.run.config
        self.table = self.data.order.table
        self._flops = flops_per_token(config.model, config.sequence_length)
        self._peak = peak_flops(self.layout.device)
        self._checkpoint_seconds = 0.0
        self._profile = StepProfile(config.profile, self.run.folder, self.layout.rank)
        self._graph: Graphed | None = None
        if config.cuda_graph and self.layout.device.type == "cuda":
            self._graph = Graphed(self._micro_batch, self.model, lambda fault: first_fault(self.layout, fault))

    def train(self, end: int) -> Exit:
        """Trains to the state after step `end`, or to a signal."""
        start = self.step
        if self._evaluation_was_missed(start) and not self._evaluate(start):
            return Exit.REQUEUE
        prefetcher = Prefetcher(self.data, self.layout, start + 1, end)
        try:
            for step in range(start + 1, end + 1):
                last = step == end
                self._profile.begin(step)
                stop = self._step(step, prefetcher) and not last
                self._profile.end(step)
                # Saved before the evaluation, whose time may not be left: the next start makes up for it. None makes
                # up for the last one: a run is finished when its last checkpoint is there.
                saved = not last and (stop or self._checkpoint_is_due(step))
                if saved:
                    self._save(step)
                if not stop and self._evaluation_is_due(step):
                    stop = not self._evaluate(step, to_the_end=last)
                if last or (stop and not saved):
                    self._save(step)
                self.checkpoints.poll()
                if stop:
                    self._finish_saving(step)
                    return Exit.REQUEUE
            self._finish_saving(end)
            return Exit.DONE
        except HealthError:  # all ranks agree on it, so the checkpoint on its way to disk need not be lost
            self._finish_saving(self.step)
            raise
        finally:
            prefetcher.close()
            with contextlib.suppress(RuntimeError):
                self._profile.close()

    # --- one step ------------------------------------------------------------------------------

    def _step(self, step: int, prefetcher: Prefetcher) -> bool:
        """One optimizer step; True when a rank was asked to stop."""
        config, begin = self.run.config, time.perf_counter()
        self.watchdog.beat(step, "waiting for data")
        with record_function("wait for data"):
            batch = prefetcher.get(step)
        data_seconds = time.perf_counter() - begin
        with record_function("forward and backward"):
            sums = self._forward_backward(step, batch)
        loss, source_loss, stop, rank_seconds = self._share(sums, batch, begin)
        self.watchdog.beat(step, "gradient reduction and update")
        with record_function("reduce gradients"):
            grad_norm = self.engine.reduce_gradients()
        learning_rate = self.table.learning_rate(step)
        skipped = self.rule.skips(loss, grad_norm)
        if skipped:
            self.engine.skip()
        else:
            with record_function("update"):
                self.engine.update(learning_rate, grad_norm)
        seconds = time.perf_counter() - begin
        if self.tracker:
            rate = config.tokens_per_step / seconds / self.layout.world
            self.tracker.step(
                {
                    "step": step,
                    "phase": self.table.at(step).name,
                    "tokens": step * config.tokens_per_step,
                    "loss": finite(loss),
                    "source_loss": {name: finite(value) for name, value in source_loss.items()},
                    "learning_rate": learning_rate,
                    "grad_norm": finite(grad_norm),
                    "skipped": skipped,
                    "samples": batch.samples,
                    "tokens_per_second_per_gpu": rate,
                    "mfu": self._flops * rate / self._peak if self._peak else None,
                    "step_seconds": seconds,
                    "fastest_rank_seconds": min(rank_seconds),
                    "slowest_rank_seconds": max(rank_seconds),
                    "slowest_rank": rank_seconds.index(max(rank_seconds)),
                    "data_seconds": data_seconds,
                    "checkpoint_seconds": self._checkpoint_seconds,
                    "memory_bytes": memory_in_use(self.layout.device),
                    "restarts": self.restarts,
                    "time": now(),
                }
            )
        self.step = step
        self._checkpoint_seconds = 0.0
        if skipped:
            self._after_skip(step, loss, grad_norm, batch)
        return stop

    def _forward_backward(self, step: int, batch: StepBatch) -> Tensor:
        """Runs the micro-batches; returns each local sequence's summed loss, float64, in order."""
        sums, ended = [], []

        def beat(number: int) -> None:
            self.watchdog.beat(step, f"forward and backward, micro-batch {number} of {len(batch.micro_batches)}")

        def moved(micro: MicroBatch) -> list[Tensor | None]:
            given = (micro.tokens, micro.targets, micro.document_ids)
            return [None if part is None else part.to(self.layout.device, non_blocking=True) for part in given]

        # All before the first: such a copy may wait for the stream, which has a whole micro-batch to do in a replay.
        inputs = [moved(micro) for micro in batch.micro_batches]
        run: Callable[..., Tensor] = self._graph or self._micro_batch
        for number, given in enumerate(inputs, 1):
            beat(number)
            sums.append(run(*given))
            if self.layout.device.type == "cuda":
                ended.append(torch.cuda.current_stream().record_event())
        for number, event in enumerate(ended, 1):  # a GPU may be many micro-batches behind
            beat(number)
            event.synchronize()
        return torch.cat(sums)

    def _micro_batch(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Adds a micro-batch's gradients to the engine's sums; returns each sequence's summed loss, float64."""
        losses = self.model(tokens, targets, document_ids)
        sums = losses.detach().double().sum(dim=1)
        self.engine.backward(losses.sum() / self.run.config.tokens_per_step)
        return sums

    def _share(self, sums: Tensor, batch: StepBatch, begin: float) -> tuple[float, dict[str, float], bool, list[float]]:
        """(loss, loss per source, whether any rank must stop, each rank's seconds): one collective."""
        layout, names = self.layout, self.data.order.sources
        count = len(names)
        shared = torch.zeros(count + 1 + layout.world, dtype=torch.float64, device=layout.device)
        # Tensor-parallel ranks hold the same losses: one of them speaks, so that the sum is exact.
        if layout.tensor_rank == 0:
            sources = torch.cat([micro.sources for micro in batch.micro_batches]).to(layout.device)
            shared.index_add_(0, sources, sums)
        shared[count] = float(self.signals.asked())
        if layout.device.type == "cuda":
            torch.cuda.synchronize()
        shared[count + 1 + layout.rank] = time.perf_counter() - begin
        if layout.world > 1:
            dist.all_reduce(shared)
        values = shared.tolist()
        length = self.run.config.sequence_length
        sequences = [int((batch.triples[:, 0] == index).sum()) for index in range(count)]
        by_source = {n: v / (s * length) for n, v, s in zip(names, values, sequences, strict=False) if s}
        loss = math.fsum(values[:count]) / self.run.config.tokens_per_step
        return loss, by_source, values[count] > 0, values[count + 1 :]

    def _after_skip(self, step: int, loss: float, grad_norm: float, batch: StepBatch) -> None:
        if self.layout.is_main:
            names = self.data.order.sources
            windows = " ".join(f"{names[s]}:{e}:{w}" for s, e, w in batch.triples.tolist())
            logger.warning(
                "step %d: update skipped (loss %g, norm %g); its windows: %s", step, loss, grad_norm, windows
            )
        if self.rule.exhausted:
            raise HealthError(
                "health.max_skipped",
                self.rule.config.max_skipped,
                f"{self.rule.skipped} updates were skipped, the last at step {step}",
                "look at the skipped windows in RUN/logs/train.log; raise the limit or lower the learning rate",
            )

    # --- between steps -------------------------------------------------------------------------

    def _checkpoint_is_due(self, step: int) -> bool:
        policy = self.run.config.checkpoint
        return step % policy.every == 0 or (policy.keep_phase_ends and self.table.is_phase_end(step))

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.run.config.evaluation.every
        return step == 0 or bool(every and step % every == 0) or self.table.is_phase_end(step)

    def _evaluation_was_missed(self, start: int) -> bool:
        """Whether the state that the run goes on from was due for an evaluation that no record has. Collective."""
        missed = [self.tracker is not None and start not in self.tracker.evaluated]
        dist.broadcast_object_list(missed, src=0, device=self.layout.device)
        return self._evaluation_is_due(start) and missed[0]

    def _evaluate(self, step: int, to_the_end: bool = False) -> bool:
        """Scores and records all sources; False, without a record, when a rank was asked to stop between two of them.

        Args:
            to_the_end: such a signal is not heard.
        """
        config, stopped = self.run.config, False
        if config.evaluation.sequences == 0:
            return True

        def stop() -> bool:
            nonlocal stopped
            stopped = not to_the_end and self._asked_to_stop()
            return stopped

        self._release_graph()  # evaluation needs memory of its own
        results = evaluate(
            self.model,
            self.data.held_out,
            self.layout,
            length=config.sequence_length,
            sequences=config.evaluation.sequences,
            batch=config.micro_batch_size,
            document_reset=config.document_reset,
            progress=lambda source: self.watchdog.beat(step, f"evaluation on {source}"),
            stop=stop,
        )
        if self.tracker and results and not stopped:
            phase = self.table.at(max(step, 1)).name
            self.tracker.evaluation(step, phase, [(r.source, r.loss, r.tokens) for r in results])
        return not stopped

    def _asked_to_stop(self) -> bool:
        """Whether a rank was. Collective."""
        asked = torch.tensor(float(self.signals.asked()), device=self.layout.device)
        if self.layout.world > 1:
            dist.all_reduce(asked)
        return bool(asked.item())

    def _save(self, step: int) -> None:
        self.watchdog.beat(step, "saving a checkpoint")
        if self.tracker:
            self.tracker.sync()
        self._checkpoint_seconds = self.checkpoints.save(self.engine, self._describer(step), step, self.watchdog.alive)

    def _release_graph(self) -> None:
        if self._graph is not None:
            self._graph.release()

    def _finish_saving(self, step: int) -> None:
        self._release_graph()  # after it the process groups may go
        self.watchdog.beat(step, "writing the last checkpoint")
        self.checkpoints.wait(self.watchdog.alive)
        self.watchdog.beat(step, "copying to checkpoint.mirror")
        self.checkpoints.finish_copies(self.watchdog.alive, self.run.config.health.hang_seconds)

    def _describer(self, step: int):  # type: ignore[no-untyped-def]
        """A function that makes the manifest of the state after `step`; what changes later is read now."""
        config, layout = self.run.config, self.layout
        facts = {
            "step": step,
            "phase": self.table.at(step).name,
            "tokens": step * config.tokens_per_step,
            "health": self.rule.state(),
            "optimizer_step": self.engine.optimizer_step,
        }

        def describe(files: dict[str, FileEntry]) -> Manifest:
            return Manifest(
                kind="train",
                files=files,
                model=self.run.resolved["model"],
                config_sha256=self.config_sha256,
                fingerprints=self.fingerprints,
                wandb_run_id=self.wandb_run_id,
                layout={"tensor": layout.tensor, "sequence": int(layout.sequence), "data": layout.data},
                code_version=VERSION,
                **facts,  # type: ignore[arg-type]
            )

        return describe


def log_to(folder: Path, main: bool) -> None:
    """Python logging to the console and `RUN/logs/train.log`, on the first rank only."""
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if main:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        handlers = [logging.StreamHandler(), logging.FileHandler(folder / "logs" / "train.log")]
    logging.basicConfig(
        level=logging.INFO if main else logging.ERROR,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=handlers,
        force=True,
    )
