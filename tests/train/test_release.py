"""Release and conversion as a user runs them: what is written, that it is the model, and that faults stop it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import load_model_config
from model.placement import placements
from tests.model import test_vllm_names as vllm
from tests.train.fixtures import TINY_ZAMBA, TINY_ZAMBA2, pretrain, program, run_mapping, write_data, write_run
from train.checkpoint.weights import open_weights
from train.release.files import write_weights


@pytest.fixture(scope="module", params=["zamba2", "zamba"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, release) of a run in bfloat16 that ended within the anneal, TP 2 with sequence parallelism."""
    folder = tmp_path_factory.mktemp(request.param)
    write_data(folder)
    mapping = run_mapping(folder, TINY_ZAMBA2 if request.param == "zamba2" else TINY_ZAMBA)
    mapping |= {"parallel": {"tensor": 2, "sequence": True}, "precision": {"compute": "bfloat16"}}
    mapping["evaluation"]["sequences"] = 2
    assert pretrain(2, write_run(folder, mapping)).returncode == 0
    checkpoint = folder / "run" / "checkpoints" / "step-00000014"
    done = program("train.release", checkpoint, "--out", folder / "released", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["strict_load"] is True
    return checkpoint, folder / "released"


def test_folder_is_complete_and_proven(released: tuple[Path, Path]) -> None:
    _, folder = released
    proof = json.loads((folder / "release.json").read_text())
    assert proof["logits"]["float32"]["relative"] < 1e-4
    assert 0 < proof["logits"]["bfloat16"]["relative"] < 0.1
    assert proof["greedy"]["equal"] and len(proof["greedy"]["ids"]) == 32 + 16
    assert proof["revision"] == "iter6"  # 14 steps, the first phase ended at 8
    assert proof["dtype"] == "bfloat16"
    assert proof["tokenizer_ids"]["differ"] == 0
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
                     "README.md", "release.json", "SHA256SUMS"}  # fmt: skip
    check = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=False)
    assert check.returncode == 0
    assert "| anneal | 6 of 6 |" in (folder / "README.md").read_text()


def test_weights_are_the_masters_rounded(released: tuple[Path, Path]) -> None:
    checkpoint, folder = released
    master = open_weights(checkpoint).tensor("embedding.weight")
    assert master.dtype == torch.float32
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(stored, master.to(torch.bfloat16))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    config = load_model_config(TINY_ZAMBA2)
    table = placements(config)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/model\.safetensors'"):
            write_weights(tmp_path, config, lambda n: torch.zeros(table[n].shape), lambda n: torch.float32, 10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_vllm_would_load_the_folder(released: tuple[Path, Path]) -> None:
    folder = released[1]
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "zamba":
        pytest.skip("vLLM has no Zamba of the first generation")
    vllm.check(config, {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()})


def test_again_says_that_it_is_there(released: tuple[Path, Path]) -> None:
    checkpoint, folder = released
    before = (folder / "release.json").stat().st_mtime_ns
    done = program("train.release", checkpoint, "--out", folder)
    assert done.returncode == 0 and "is there already" in done.stdout
    assert (folder / "release.json").stat().st_mtime_ns == before
    other = program("train.release", checkpoint, "--out", folder, "--dtype", "float32")
    assert other.returncode == 2 and other.stderr.startswith("error: --out:")


def test_there_and_back_is_bit_exact(released: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = released
    done = program("model.convert", folder, "--out", tmp_path / "converted")
    assert done.returncode == 0, done.stderr
    arguments = ("train.release", ".", "--out", tmp_path / "again", "--max-shard-size", "1e6")
    done = program(*arguments, cwd=tmp_path / "converted")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again" / "release.json").read_text())["source"]["checkpoint"] == "converted"
    shards = sorted((tmp_path / "again").glob("model-*.safetensors"))
    assert len(shards) > 1
    again = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["weight_map"]
    first = load_file(folder / "model.safetensors")
    assert set(again) == set(first) == set(index)
    for name, tensor in first.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("fault", "words"),
    [("missing", "missing"), ("extra", "no such tensor"), ("misshaped", "must have shape"), ("nan", "finite"),
     ("truncated", "cannot be read")],
)  # fmt: skip
def test_bad_weights_are_refused(released: tuple[Path, Path], tmp_path: Path, fault: str, words: str) -> None:
    source = tmp_path / "hf"
    shutil.copytree(released[1], source)
    file = source / "model.safetensors"
    tensors = load_file(file)
    name = "model.final_layernorm.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["model.layers.0.surprise.weight"] = torch.zeros(3)
    elif fault == "misshaped":
        tensors[name] = torch.zeros(3)
    elif fault == "nan":
        tensors[name][1] = float("nan")
    save_file(tensors, file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    done = program("model.convert", source, "--out", tmp_path / "out")
    assert done.returncode == 4
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    if fault == "nan":  # found while the checkpoint is written
        assert program("model.convert", source, "--out", tmp_path / "deep" / "er" / "out").returncode == 4
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_damaged_checkpoint_is_not_released(released: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "step-00000014"
    shutil.copytree(released[0], damaged)
    file = next(damaged.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = program("train.release", damaged, "--out", tmp_path / "out")
    assert done.returncode == 4 and file.name in done.stderr
    assert not (tmp_path / "out").exists()
    done = program("train.release", damaged, "--out", tmp_path / "deep" / "er" / "out")
    assert done.returncode == 4 and not (tmp_path / "deep").exists()


@pytest.mark.slow
@pytest.mark.parametrize("begun", [True, False], ids=["later", "not at all"])
def test_a_run_without_metrics_of_the_checkpoint(released: tuple[Path, Path], tmp_path: Path, begun: bool) -> None:
    """A checkpoint that was copied into a run's directory, where that has no metrics yet or only of later steps."""
    run = tmp_path / "run"
    shutil.copytree(released[0], run / "checkpoints" / released[0].name)
    shutil.copy(released[0].parents[1] / "config.yaml", run)
    if begun:
        row = json.loads((released[0].parents[1] / "metrics.jsonl").read_text().splitlines()[-1])
        (run / "metrics.jsonl").write_text(json.dumps({**row, "step": 15}) + "\n")
        shutil.copy(released[0].parents[1] / "evaluations.jsonl", run)
    done = program("train.release", run / "checkpoints" / released[0].name, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert "curves.png" not in card and not (tmp_path / "out" / "curves.png").exists()
    assert ("## Held-out loss" in card) == begun and "14 of 14 steps" in card


@pytest.mark.slow
def test_installed_cuda_kernels_are_not_given_cpu_tensors(released: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers would call causal-conv1d on the CPU where it can be imported; here a stand-in that then raises."""
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def causal_conv1d_fn(*a, **k): raise RuntimeError('Expected x.is_cuda() to be true')\n"
        "causal_conv1d_update = causal_conv1d_fn\n"
    )
    done = program("train.release", released[0], "--out", tmp_path / "out", first=tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_tokenizer_is_found_out(released: tuple[Path, Path], tmp_path: Path) -> None:
    """Ids that differ on the probe text stop a release; here by a vocabulary with two pieces swapped."""
    from common.errors import CheckFailed
    from data_prep.tokenizer import load_tokenizer
    from train.release.tokenizer import check_ids

    folder = tmp_path / "swapped"
    shutil.copytree(released[1], folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁over"] = vocabulary["▁over"], vocabulary["▁the"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckFailed, match="transformers gives"):
        check_ids(folder, load_tokenizer("mistral-v0.1"))
