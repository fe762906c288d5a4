"""Results of an evaluation as tables."""

from __future__ import annotations

from typing import Any

from train.plan_view import console, gibibytes, table


def show(result: dict[str, Any]) -> None:
    """Prints the parts that are there."""
    out = console()
    step = "" if result["step"] is None else f" (step {result['step']})"
    print(f"{result['target']}{step}")
    if "sources" in result:
        print(f"held-out loss, {result['dtype']}, windows of {result['length']} tokens")
        made = table("", "source", "nats a token", "perplexity", "tokens")
        for name, row in result["sources"].items():
            made.add_row(name, _number(row["loss"]), _number(row["perplexity"], ",.2f"), f"{row['tokens']:,}")
        out.print(made, highlight=False)
    if "tasks" in result:
        print(f"lm-eval {result['lm_eval']['version']}")
        made = table("", "task", "metric", "value", "error")
        for task, metrics in result["tasks"].items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    error = metrics.get(metric.replace(metric.split()[0], f"{metric.split()[0]}_stderr", 1))
                    made.add_row(task, metric, _number(value), "-" if error is None else f"{error:.4f}")
        out.print(made, highlight=False)
    if "generation" in result:
        options = result["generation_options"]
        print(
            f"generation of {options['new_tokens']} tokens, batch {options['batch']}, {options['dtype']}, "
            f"{options['device']}; weights {gibibytes(options['weights_bytes'])}"
        )
        made = table("", "context", "first token", "tokens/s", "cache", "peak memory")
        for row in result["generation"]:
            made.add_row(
                f"{row['context']:,}", f"{row['first_token_seconds']:.3f} s", f"{row['tokens_per_second']:,.1f}",
                gibibytes(row["cache_bytes"]), gibibytes(row["peak_bytes"]),
            )  # fmt: skip
        out.print(made, highlight=False)
    if "picture" in result:
        print(f"picture: {result['picture']}")


def _number(value: float | None, form: str = ".4f") -> str:
    return "not finite" if value is None else format(value, form)
