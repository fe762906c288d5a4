"""From raw text to released folders: one submission after another, each job waiting for the one before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from tests.data_prep.conftest import Workplace
from tests.data_prep.conftest import workplace as workplace
from tests.train.fixtures import metrics, run_mapping, write_run

from .conftest import Cluster
from .test_data_prep_jobs import prepared


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_data_then_both_phases_then_scores_then_releases(
    cluster: Cluster, site: Callable[..., str], workplace: Workplace
) -> None:
    config, facts = prepared(workplace, dedup=None), site(DATA_TASKS="1", RELEASE_TASKS="2")
    folder = workplace.folder
    mapping = run_mapping(folder)
    for phase, name in zip(mapping["phases"], "ab", strict=True):
        phase["mixture"] = {"sources": [{"name": name, "path": str(folder / "out" / "shards" / name), "weight": 1}]}
    file = write_run(folder, mapping)

    def submitted(script: str, *arguments: object) -> list[str]:
        text = cluster("bash", f"slurm/{script}.sbatch", *map(str, arguments), ZAMBA_SITE=facts)
        return re.findall(r"job (\d+)", text)

    # Nothing is prepared yet when the rest of the chain is submitted.
    data = submitted("data_prep", config)[-1]
    [first] = submitted("pretrain", f"--dependency=afterok:{data}", file, "--until", "pretrain")
    [second] = submitted("pretrain", f"--dependency=afterok:{first}", file)
    scores = [folder / "phase1.json", folder / "end.json"]
    [early] = submitted("evaluate", f"--dependency=afterok:{first}", mapping["run_dir"], "--out", scores[0])
    [late] = submitted("evaluate", f"--dependency=afterok:{second}", mapping["run_dir"], "--out", scores[1])
    [released] = submitted("release", f"--dependency=afterok:{late}", mapping["run_dir"], "--out", folder / "released")
    assert all(state.startswith("PENDING") for state in cluster.state(released).values())

    states = cluster.wait(released, 700)
    assert set(states) == {"0", "1"} and {state.split()[0] for state in states.values()} == {"COMPLETED"}
    assert [row["phase"] for row in metrics(folder / "run")] == ["pretrain"] * 8 + ["anneal"] * 6
    assert cluster.wait(early)["0"].startswith("COMPLETED")
    evaluations = {(r["step"], r["source"]): r["loss"] for r in metrics(folder / "run", "evaluations.jsonl")}
    for path in scores:
        score = json.loads(path.read_bytes())
        for name, row in score["sources"].items():
            assert row["loss"] == pytest.approx(evaluations[score["step"], name], rel=1e-5)
    assert json.loads(scores[1].read_bytes())["step"] == 14
    found = sorted(
        str(path.parent.relative_to(folder / "released")) for path in folder.glob("released/**/release.json")
    )
    assert found == ["anneal/iter4", "anneal/iter6", "pretrain/iter8"]

    [again] = submitted("release", folder / "run" / "checkpoints" / "step-00000014", "--out", folder / "one")
    assert cluster.wait(again)["0"].startswith("COMPLETED") and (folder / "one" / "config.json").is_file()


@pytest.mark.slow
def test_what_follows_a_failure_is_cancelled(cluster: Cluster, site: Callable[..., str], workplace: Workplace) -> None:
    """The score of a run that failed is never waited for."""
    facts = site()
    text = cluster("bash", "slurm/evaluate.sbatch", str(workplace.folder / "nothing"), ZAMBA_SITE=facts)
    job = re.search(r"job (\d+), (\S+)", text)
    after = f"--dependency=afterok:{job[1]}"
    text = cluster("bash", "slurm/release.sbatch", after, "runs/x", "--out", "x", ZAMBA_SITE=facts)
    assert cluster.wait(job[1])["0"].startswith("FAILED")
    states = cluster.wait(re.search(r"job (\d+)", text)[1])
    assert {state.split()[0] for state in states.values()} == {"CANCELLED"}
    with open(job[2]) as log:
        assert "error: target: " in log.read()
