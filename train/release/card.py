"""The model card, made from the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.files import read_json
from model.config import ModelConfig
from model.placement import parameter_count
from train.checkpoint.manifest import Manifest
from train.config import RunConfig
from train.order import flatten_weights
from train.phases import PhaseTable
from train.tracking import format_seconds, read_lines

CURVES = "curves.png"
"""Picture of the run up to this checkpoint; the card shows it where the folder has it."""


def model_card(
    config: ModelConfig,
    manifest: Manifest,
    proof: dict[str, Any],
    license: str | None,
    run: RunConfig | None,
    run_folder: Path | None,
    curves: bool,
) -> str:
    """Markdown with a front matter that the Hub reads.

    Args:
        manifest: the checkpoint's. proof: its `title` is the card's, and what the example loads; its `card` is text
            that the user adds, and stands where readers look first.
        license: the Hub's identifier for the weights' licence.
        run: the run's config, None for converted weights. run_folder: where its records are.
        curves: whether the folder has the picture `CURVES`.
    """
    parts = [_front_matter(config, license), f"# {proof['title']}\n", _lead(config, manifest, run, proof)]
    parts += [proof["card"] + "\n"] if "card" in proof else []
    parts += [_loading(proof), _architecture(config)]
    if run is not None and run_folder is not None:
        elsewhere = _steps_elsewhere(run_folder)
        parts += [_training(manifest, run, elsewhere), _data(manifest, run)]
        parts.append(_hardware(run_folder, manifest.step, elsewhere))
        parts.append(_held_out(run_folder, PhaseTable(run), manifest.step))
    if curves:
        parts.append(f"![Loss, held-out loss, learning rate and gradient norm up to this checkpoint]({CURVES})\n")
    parts += [_checks(proof), _LIMITS, _CITATION]
    return "\n".join(part for part in parts if part)


def _front_matter(config: ModelConfig, license: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"license: {license}"] if license else []
    return "\n".join([*lines, f"tags: [{config.family}, mamba, pretrained]", "---", ""])


def _cell(text: str) -> str:
    """Text of the user's as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _lead(config: ModelConfig, manifest: Manifest, run: RunConfig | None, proof: dict[str, Any]) -> str:
    at = ""
    mixer = "Mamba1" if config.family == "zamba" else "Mamba2"
    if run is not None:
        total = PhaseTable(run).total_steps
        at = (
            f" This is the state after {manifest.step:,} of {total:,} steps ({manifest.tokens:,} "
            f"tokens), in the phase `{manifest.phase}`."
        )
    return (
        f"A {config.family} base language model: a backbone of {config.num_layers} {mixer} layers and "
        f"{config.num_shared_blocks} shared attention block{'s' * (config.num_shared_blocks > 1)} called "
        f"{config.num_calls} times, {parameter_count(config):,} parameters, in {proof['dtype']}.{at}\n"
    )


def _loading(proof: dict[str, Any]) -> str:
    name = proof["title"]
    revision = f', revision="{proof["revision"]}"' if proof["revision"] else ""
    lines = [
        "## How to load\n",
        f"With `transformers` (checked with {proof['transformers']}); instead of a name, a folder will do:\n",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{revision})',
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{revision}, dtype="auto")',
        'ids = tokenizer("The shared block", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))",
        "```\n",
    ]
    if proof.get("tokenizer_unchecked"):
        lines.append("The tokenizer is the one that came with the converted model; its ids could not be checked.\n")
    elif proof["tokenizer_sha256"] is None:
        lines.append("The repository has no tokenizer: none came with the checkpoint.\n")
    return "\n".join(lines)


def _architecture(config: ModelConfig) -> str:
    mamba = config.mamba
    rows = {
        "layers": f"{config.num_layers}, each with a {'Mamba1' if config.family == 'zamba' else 'Mamba2'} mixer",
        "hidden size": f"{config.hidden_size:,}",
        "Mamba": f"state {mamba.d_state}, convolution {mamba.d_conv}, expansion {mamba.expand}, {mamba.num_heads} heads"
        + (f", {mamba.ngroups} groups" if config.family == "zamba2" else f", dt rank {mamba.dt_rank}"),
        "shared attention blocks": f"{config.num_shared_blocks}, called at layers "
        + ", ".join(map(str, config.hybrid_layers))
        + " (counted from 0)",
        "attention": f"{config.num_attention_heads} heads of {config.head_dim}, over the stream and the embedding side "
        "by side" + (f"; rotary embedding, theta {config.rope_theta:g}" if config.rope else ""),
        "adapters of each call": f"{' and '.join(config.adapters)}, rank {config.adapter_rank}"
        if config.adapters
        else "none",
        "MLP": f"{config.intermediate_size:,}, gated GELU",
        "vocabulary": f"{config.vocab_size:,}, embedding tied to the output",
        "longest sequence": f"{config.max_position_embeddings:,} tokens",
        "parameters": f"{parameter_count(config):,}",
    }
    return "\n".join(["## Architecture\n", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""])


def _steps_elsewhere(folder: Path) -> int:
    """How many steps the checkpoint had that a run directory began with: more than 0 in a fork.

    Metrics of a step up to there are those of a run whose first rows of starts were lost.
    """
    first = min((row["from_step"] for row in read_lines(folder / "starts.jsonl")), default=0)
    return 0 if any(row["step"] <= first for row in read_lines(folder / "metrics.jsonl")) else first


def _fork(step: int, elsewhere: int) -> str:
    """What the settings of a fork's config are not: those of the steps before it."""
    if not elsewhere:
        return ""
    if step <= elsewhere:
        return "All steps were trained in another run directory; the settings below are those of its fork.\n"
    return (
        f"Steps 1 to {elsewhere:,} were trained in another run directory, of which this run is a fork; settings and "
        "hardware below are those of the steps after.\n"
    )


def _training(manifest: Manifest, run: RunConfig, elsewhere: int) -> str:
    step, optimizer = manifest.step, run.optimizer
    rows = []
    for span in PhaseTable(run).spans:
        if span.first_step > max(step, 1):
            break
        done = max(min(step, span.last_step) - span.first_step + 1, 0)
        rate = span.config.learning_rate
        end = f" to {rate.final:g}" if rate.final is not None else ""
        rows.append(
            f"| {span.name} | {done:,} of {span.steps:,} | {done * run.tokens_per_step:,} | "
            f"{rate.shape}, peak {rate.peak:g}{end}, warm-up {rate.warmup_steps:,} steps |"
        )
    return "\n".join([
        "## Training\n", *filter(None, [_fork(step, elsewhere)]),
        f"{manifest.tokens:,} tokens in {step:,} steps of {run.global_batch_size} sequences of "
        f"{run.sequence_length:,} tokens; {run.precision.compute} compute with float32 masters; AdamW, betas "
        f"{optimizer.betas[0]:g} and {optimizer.betas[1]:g}, weight decay {optimizer.weight_decay:g}, gradients "
        f"clipped at norm {optimizer.clip_grad_norm:g}.\n",
        "| phase | steps | tokens | learning rate |", "|---|---|---|---|", *rows, "",
    ])  # fmt: skip


def _data(manifest: Manifest, run: RunConfig) -> str:
    table = PhaseTable(run)
    spans = [span for span in table.spans if span.first_step <= max(manifest.step, 1)]
    licences = _licences(run)
    shares = {span.name: flatten_weights(run, span.index) for span in spans}
    names = dict.fromkeys(name for row in shares.values() for name in row)
    rows = [
        f"| {_cell(name)} | {_cell(licences[name])} | "
        + " | ".join(f"{row[name]:.2%}" if name in row else "-" for row in shares.values()) + " |"
        for name in names
    ]  # fmt: skip
    replay = [
        f"Of phase {span.name}, {share:.0%} replays {phase}."
        for span in spans
        for phase, share in span.config.replay.items()
    ]
    return "\n".join([
        "## Data\n", "Share of each phase's sequences:\n",
        f"| source | licence | {' | '.join(shares)} |", f"|---|---|{'---|' * len(shares)}", *rows, "",
        *([" ".join(replay) + "\n"] if replay else []),
    ])  # fmt: skip


def _licences(run: RunConfig) -> dict[str, str]:
    """Source -> its licence: the mixture's, or else what the manifests of its shards say where they are still there."""
    sources = [source for phase in run.phases for source in phase.mixture.sources]
    given = {source.name: source.licence for source in sources if source.licence}
    return {s.name: given.get(s.name) or _licence_of_shards(Path(s.path)) for s in sources}


def _licence_of_shards(folder: Path) -> str:
    """Those of all shards, as they may come from more than one preparation; `unknown` is that of none given."""
    found = {_licence_in(path) for path in sorted(folder.glob("train-*.manifest.json"))} or {"unknown"}
    return ", ".join(sorted(found - {"unknown"}) + ["not stated"] * ("unknown" in found))


def _licence_in(manifest: Path) -> str:
    try:
        return str(read_json(manifest)["licence"] or "unknown")
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def _hardware(folder: Path, step: int, elsewhere: int) -> str:
    starts = [row for row in read_lines(folder / "starts.jsonl") if row["from_step"] < max(step, 1)]
    rows = [row for row in read_lines(folder / "metrics.jsonl") if row["step"] <= step]
    if not starts or not rows:
        return ""
    machines = dict.fromkeys((row["processes"], row["device"], row["tensor"]) for row in starts)
    spent = format_seconds(sum(row["step_seconds"] for row in rows))
    counted = f"Steps {elsewhere + 1:,} to {step:,}: " if elsewhere else ""
    used = counted + "; ".join(f"{n} x {device}, tensor parallel {tensor}" for n, device, tensor in machines)
    skipped = sum(row["skipped"] for row in rows)
    return f"## Hardware\n\n{used}; {spent} in training steps, {len(starts) - 1} restarts, {skipped} updates skipped.\n"


def _held_out(folder: Path, table: PhaseTable, step: int) -> str:
    rows = [row for row in read_lines(folder / "evaluations.jsonl") if row["step"] <= step]
    if not rows:
        return ""
    ends = {span.last_step: f"after {span.name}" for span in table.spans}
    last = rows[-1]["step"]
    moments = {at: ends.get(at, "before training" if at == 0 else f"step {at:,}")
               for at in sorted({0, last, *ends} & {row["step"] for row in rows})}  # fmt: skip
    losses = {(row["source"], row["step"]): row for row in rows}
    lines = []
    for source in dict.fromkeys(row["source"] for row in rows):
        cells = [losses.get((source, at), {}).get("loss") for at in moments]
        tokens = max(row["tokens"] for row in rows if row["source"] == source)
        lines.append(
            f"| {_cell(source)} | " + " | ".join("-" if c is None else f"{c:.4f}" for c in cells) + f" | {tokens:,} |"
        )
    return "\n".join([
        "## Held-out loss\n", "Nats a token, on text kept out of training:\n",
        f"| source | {' | '.join(moments.values())} | tokens |", f"|---|{'---|' * len(moments)}---|", *lines, "",
    ])  # fmt: skip


def _checks(proof: dict[str, Any]) -> str:
    logits, ids = proof["logits"], proof["tokenizer_ids"]
    tokens = f" The tokenizer gives sentencepiece's ids on {ids['texts']} probe texts." if ids else ""
    return (
        "## Checked before release\n\n"
        f"Loaded strictly by transformers {proof['transformers']}. Logits against the training code's, relative: "
        f"{logits['float32']['relative']:.1e} in float32, {logits['bfloat16']['relative']:.1e} in bfloat16. Greedy "
        f"text equal.{tokens} Details in `release.json`; hashes of all files in `SHA256SUMS`.\n"
    )


_LIMITS = (
    "## Limits\n\nA base model: not tuned to follow instructions or to refuse. It repeats errors and biases of its "
    "data, and is not moderated.\n"
)

_CITATION = """## Citation

```bibtex
@article{glorioso2024zamba,
  title={Zamba: A Compact 7B SSM Hybrid Model},
  author={Glorioso, Paolo and Anthony, Quentin and Tokpanov, Yury and Whittington, James and Pilault, Jonathan and
          Ibrahim, Adam and Millidge, Beren},
  journal={arXiv preprint arXiv:2405.16712}, year={2024}
}
@article{glorioso2024zamba2,
  title={The Zamba2 Suite: Technical Report},
  author={Glorioso, Paolo and Anthony, Quentin and Tokpanov, Yury and Golubeva, Anna and Shyam, Vasudev and
          Whittington, James and Pilault, Jonathan and Millidge, Beren},
  journal={arXiv preprint arXiv:2411.15242}, year={2024}
}
```
"""
