"""The whole pipeline at a size for two CPU cores: the programs that a real run uses, one after the other.

Every command is printed before it runs, so that it can be run by hand. Each goes on from where it was cut
short, so a demo that was killed is started again by the same command (make demo).
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

from common.errors import ArgumentParser, CheckFailed, run_main
from common.files import read_json, write_json
from model.plain_transformers import use_plain_transformers

MODELS = ("zamba2-tiny", "zamba-tiny")
DATA_CONFIG = "configs/data_prep/demo.yaml"
RUN_CONFIG = "configs/runs/demo.yaml"
PROMPT = "def "

FALL = 3.0
"""Nats by which each source's held-out loss must fall over the run."""
RISE = 0.1
"""Nats by which a phase-1 source's held-out loss may rise in the anneal."""


def _run(title: str, *command: object) -> None:
    """Prints and runs one of the project's programs; its failure is this program's."""
    words = [sys.executable, "-m", *map(str, command)]
    print(f"\n== {title}\n$ {shlex.join(['python', *words[1:]])}", flush=True)
    program = subprocess.Popen(words)
    try:
        program.wait()
    except KeyboardInterrupt:  # the program has met the same Ctrl-C: it may have a checkpoint to write
        program.wait()
        raise
    if program.returncode:
        sys.exit(program.returncode)


def _layout() -> tuple[int, list[str]]:
    """(processes, overrides): two CPU processes with TP 2, or the GPUs that are there."""
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    gpus = int(subprocess.run(count, check=True, capture_output=True, text=True).stdout)
    if gpus == 0:
        return 2, []
    processes = min(gpus, 2)
    sequence = "true" if processes == 2 else "false"
    return processes, [
        "precision.compute=bfloat16",
        f"parallel.tensor={processes}",
        f"parallel.sequence={sequence}",
    ]


def main() -> int:
    parser = ArgumentParser(prog="python -m train.demo", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    arguments = parser.parse_args()
    begin = time.monotonic()
    name = "demo" if arguments.model == MODELS[0] else f"demo-{arguments.model}"
    run, release = Path("runs") / name, Path("releases") / f"demo-{arguments.model}"
    processes, overrides = _layout()
    overrides += [f"name={name}", f"run_dir={run}", f"model=configs/model/{arguments.model}.yaml"]

    _run("raw text: this Python's own standard library", "data_prep.demo_text", "--out", "data/demo/raw")
    _run("data preparation: filter, deduplicate, tokenize, shards", "data_prep", "run", DATA_CONFIG)
    _run("the plan", "train.plan", RUN_CONFIG, *overrides, "--processes", processes)
    _run(
        "pretrain and anneal",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "-m",
        "train.pretrain",
        RUN_CONFIG,
        *overrides,
    )
    from train.release.series import newest_complete

    _run("release", "train.release", newest_complete(run), "--out", release)
    _run("report", "train.report", run)
    text = _continue(release)
    _summary(run, release, text, time.monotonic() - begin)
    return 0


def _continue(release: Path) -> str:
    """A continuation of `PROMPT` by the released folder, with nothing but transformers on the CPU."""
    use_plain_transformers()
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(release)
    model = transformers.AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.manual_seed(0)
    out = model.generate(ids, max_new_tokens=48, do_sample=True, temperature=0.7, top_k=40)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def held_out(run: Path) -> dict[str, dict[str, float]]:
    """Source -> {before, phase name, ...} held-out losses at step 0 and at each phase's last step."""
    from train.tracking import read_lines

    losses: dict[str, dict[str, float]] = {}
    for row in read_lines(run / "evaluations.jsonl"):
        key = "before" if row["step"] == 0 else row["phase"]
        losses.setdefault(row["source"], {})[key] = row["loss"]  # a phase's last row is its end
    return losses


def check(run: Path) -> list[tuple[str, bool]]:
    """What the demo promises, and whether it came true."""
    from data_prep.statistics import unigram_entropy

    checks = []
    for source, loss in held_out(run).items():
        before, pretrained, annealed = loss["before"], loss["pretrain"], loss["anneal"]
        if source == "qa":
            fell = annealed < pretrained
            checks.append((f"{source}: falls in the anneal ({pretrained:.2f} -> {annealed:.2f})", fell))
            continue
        shards = sorted(Path(f"data/demo/shards/{source}").glob("train-*.bin"))
        entropy = unigram_entropy([str(s.with_suffix("")) for s in shards])
        checks += [
            (f"{source}: falls by {FALL:g} nats or more ({before:.2f} -> {annealed:.2f})", before - annealed >= FALL),
            (f"{source}: ends below the entropy of a unigram model ({entropy:.2f})", annealed < entropy),
            (f"{source}: rises by at most {RISE:g} in the anneal ({annealed - pretrained:+.2f})",
             annealed - pretrained <= RISE),
        ]  # fmt: skip
    return checks


def _summary(run: Path, release: Path, text: str, seconds: float) -> None:
    proof = read_json(release / "release.json")
    logits = proof["logits"]["float32"]
    checks = check(run)
    write_json(run / "demo.json", {"seconds": round(seconds, 1), "checks": dict(checks), "text": text})
    print(f"\n== done in {seconds:.0f} s (set-up not counted)")
    for what, held in checks:
        print(f"  {'ok ' if held else 'NOT'} {what}")
    print(
        f"  ok  transformers loads the release strictly; float32 logits differ by {logits['relative']:.0e} "
        f"relative, {logits['largest']:.0e} at most\n\n"
        f"the model goes on from {PROMPT!r}:\n  " + text.replace("\n", "\n  ") + "\n\n"
        f"curves          {run}/report.png\n"
        f"every step      {run}/metrics.jsonl\n"
        f"checkpoints     {run}/checkpoints/\n"
        f"released model  {release}/\n\n"
        "next: kill it while it trains and start it again (make demo-clean demo); make demo MODEL=zamba-tiny;\n"
        f"      python -m train.plan {RUN_CONFIG} name=longer run_dir=runs/longer phases.0.steps=2000;\n"
        "      your own data: docs/data.md",
        flush=True,
    )
    if failed := [what for what, held in checks if not held]:
        raise CheckFailed("demo", len(failed), f"not held: {'; '.join(failed)}", "look at the curves")


if __name__ == "__main__":
    run_main(main)
