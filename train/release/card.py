"""The model card, made from the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.placement import parameter_count
from train.checkpoint.weights import Weights
from train.order import flatten_weights
from train.phases import PhaseTable


def revision_of(table: PhaseTable, step: int) -> str:
    """The published scheme: `iter<steps>` within the first phase, then steps since that phase's end."""
    first = table.spans[0].last_step
    return f"iter{step if step <= first else step - first}"


def _licences(run: Any) -> set[str]:
    return {source.licence or "unknown" for phase in run.phases for source in phase.mixture.sources}


def _phase_rows(run: Any, step: int) -> list[str]:
    rows = []
    for span in PhaseTable(run).spans:
        if span.first_step > step:
            break
        done = min(step, span.last_step) - span.first_step + 1
        rate = span.config.learning_rate
        shares = ", ".join(f"{n} {s:.1%}" for n, s in flatten_weights(run, span.index).items())
        end = f" to {rate.final:g}" if rate.final is not None else ""
        rows.append(
            f"| {span.name} | {done:,} of {span.steps:,} | {done * run.tokens_per_step:,} | "
            f"{rate.shape}, peak {rate.peak:g}{end} | {shares} |"
        )
    return rows


def _held_out_rows(folder: Path, step: int) -> list[str]:
    path = folder / "evaluations.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    last = max((r["step"] for r in rows if r["step"] <= step), default=None)
    return [f"| {r['source']} | {r['loss']:.4f} | {r['tokens']:,} |" for r in rows if r["step"] == last]


def model_card(weights: Weights, name: str, run: Any | None, run_folder: Path | None, proof: dict[str, Any],
               dtype: str) -> str:  # fmt: skip
    """Markdown with a front matter that the Hub reads.

    Args:
        run: the run's config, None for converted weights. run_folder: where its records are.
    """
    config, step = weights.config, weights.manifest.step
    licences = sorted(_licences(run)) if run else []
    mixer = "Mamba1" if config.family == "zamba" else "Mamba2"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{config.family}, mamba]"]
    lines += ["---", "", f"# {name}", ""]
    lines += [
        f"A {config.family} language model: a {mixer} backbone of {config.num_layers} layers with "
        f"{config.num_shared_blocks} shared attention block{'s' if config.num_shared_blocks > 1 else ''} called "
        f"{config.num_calls} times, {parameter_count(config):,} parameters, released in {dtype}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'ids = tokenizer("The", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))",
        "```",
        "",
    ]
    if run:
        lines += ["## Training", "", f"{weights.manifest.tokens:,} tokens in {step:,} steps of "
                  f"{run.global_batch_size} sequences of {run.sequence_length} tokens, {run.precision.compute}, "
                  f"AdamW (betas {run.optimizer.betas}, weight decay {run.optimizer.weight_decay}).", "",
                  "| phase | steps | tokens | learning rate | data |", "|---|---|---|---|---|",
                  *_phase_rows(run, step), ""]  # fmt: skip
        lines += [f"Licences of the training data: {', '.join(licences)}.", ""]
    if run_folder and (rows := _held_out_rows(run_folder, step)):
        lines += ["## Held-out loss", "", "| source | nats per token | tokens |", "|---|---|---|", *rows, ""]
    logits = proof["logits"]["float32"]
    lines += [
        "## Checked before release", "",
        f"Loaded strictly by transformers {proof['transformers']}; float32 logits differ from the training code's by "
        f"{logits['relative']:.1e} (relative); greedy text equal; details in `release.json`.", "",
        "## Limits", "",
        "A base model: not tuned to follow instructions or to refuse. It repeats errors and biases of its data.", "",
        "## Citation", "",
        "Zamba: arXiv 2405.16712. Zamba2: arXiv 2411.15242.", "",
    ]  # fmt: skip
    return "\n".join(lines)
