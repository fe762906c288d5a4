"""What the doctor sees of a machine before anything is computed on it: packages, GPUs, limits, disks, the tokenizer."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
GIB = 2**30

_ALONE = ("torch", "deepspeed", "megatron-core", "transformers", "triton")
"""Packages with a row each; the others share one while they are in order."""

_SPARE = {"wandb": "tracking.wandb: off needs none", "mistral-common": "or ZAMBA_TOKENIZER_MODEL=the file"}
"""Dependencies that a run can do without."""

_SHARED_DISKS = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "fuse.sshfs", "panfs"}

ROOM = 100e9
"""Bytes: with less free space for runs there is a warning. One checkpoint of Zamba-7B is 87 GB."""


@dataclass(frozen=True)
class Row:
    """One check.

    status: fault: a run would fail or be wrong; warn: it works, worse than it could; skip: not there, and not needed.
    value: what was found. cure: what to do about it. group: rows that are shown as one while they are in order.
    """

    check: str
    status: Literal["ok", "warn", "fault", "skip"]
    value: str
    cure: str = ""
    group: str = ""


def host() -> Iterator[Row]:
    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / GIB
    yield Row("host", "ok", f"{socket.gethostname()}: {cores} cores, {memory:.0f} GiB, {platform.release()}")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Row("open files", "ok" if soft >= 1024 else "fault", f"at most {soft}", "ulimit -n 65536")
    if Path("/dev/infiniband").exists():
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        free = locked == resource.RLIM_INFINITY
        cure = "ulimit -l unlimited; under Slurm, LimitMEMLOCK=infinity for slurmd"
        yield Row("locked memory", "ok" if free else "fault", "unlimited" if free else f"{locked} bytes", cure)
    if os.path.isdir("/dev/shm"):
        shared = os.statvfs("/dev/shm")
        size = shared.f_blocks * shared.f_frsize / GIB
        cure = "a container needs --shm-size=16g (or --ipc=host): NCCL and gloo use it"
        yield Row("shared memory", "ok" if size >= 1 else "warn", f"/dev/shm, {size:.1f} GiB", cure)


@cache
def _project() -> dict[str, Any]:
    return tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]


def packages(gpu: bool) -> Iterator[Row]:
    """Python and every package of pyproject.toml, against the ranges there; extras where they are installed."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not PROJECT.is_file():
        yield Row("packages", "skip", "run it from a checkout to compare versions: pyproject.toml has the ranges")
        return
    wanted = _project()["requires-python"]
    right = platform.python_version() in SpecifierSet(wanted)
    yield Row("python", "ok" if right else "fault", f"{platform.python_version()} (tested: {wanted})", f"use {wanted}")
    required = [Requirement(line) for line in _project()["dependencies"]]
    yield from _versions("other packages", required, missing="fault")
    for extra, lines in _project()["optional-dependencies"].items():
        if extra == "dev" or (extra == "cuda" and not gpu):
            continue
        # Optional kernels have stand-ins: whether one is there is told by the kernels' own rows.
        yield from _versions(f"extra {extra}", [Requirement(line) for line in lines], missing="skip")


def _versions(title: str, requirements: list[Any], missing: Literal["fault", "skip"]) -> Iterator[Row]:
    """Rows of those that stand alone or are out of order, then one for the rest."""
    from packaging.version import Version

    rest = []
    for requirement in requirements:
        name, cure = requirement.name, f"pip install '{requirement}'"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            status: Any = "warn" if name in _SPARE else missing
            yield Row(name, status, "not installed", f"{cure}; {_SPARE[name]}" if name in _SPARE else cure)
            continue
        # A vendor's build (2.11.0a0+nv25.10) counts as the version it leads to.
        if not requirement.specifier.contains(Version(version).base_version):
            yield Row(name, "fault", f"{version} (tested: {requirement.specifier})", cure)
        elif name in _ALONE:
            yield Row(name, "ok", f"{version} (tested: {requirement.specifier})")
        else:
            rest.append(f"{name} {version}")
    if rest:
        known = f"{len(rest)} in their tested ranges" if len(rest) > 4 else ", ".join(rest)
        yield Row(title, "ok", known)


def devices() -> Iterator[Row]:
    """The driver, and each GPU: kind, memory, who else is on it, memory errors, peer access."""
    present = _nvidia_smi("name,driver_version,ecc.errors.uncorrected.volatile.total")
    if not torch.cuda.is_available():
        yield from _without_gpu(present)
        return
    driver = present[0][1] if present else "unknown"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    yield Row("driver", "ok", f"{driver}; torch has CUDA {torch.version.cuda}, NCCL {nccl}")
    count = torch.cuda.device_count()
    for index in range(count):
        found = torch.cuda.get_device_properties(index)
        capable = (found.major, found.minor) >= (8, 0)
        value = f"{found.name}, {found.total_memory / GIB:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Row(f"gpu {index}", "ok" if capable else "fault", value, "bfloat16 needs an Ampere or newer GPU")
        free, total = torch.cuda.mem_get_info(index)
        if total - free > 3 * GIB:
            used = f"{(total - free) / GIB:.1f} GiB in use before anything was started"
            yield Row(f"gpu {index} memory", "warn", used, "end what else runs there (nvidia-smi)")
    for index, (_, _, errors) in enumerate(present):
        if errors.isdigit() and int(errors):
            many = f"{errors} uncorrected memory errors"
            yield Row(f"gpu {index} ECC", "fault", many, "take the node out and have the GPU looked at")
    lonely = [
        f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not torch.cuda.can_device_access_peer(a, b)
    ]
    if count > 1:
        value = f"none between {', '.join(lonely)}" if lonely else "between all GPUs"
        cure = "check nvidia-smi topo -m, and that all GPUs of the node are visible to each process"
        yield Row("peer access", "warn" if lonely else "ok", value, cure)


def _without_gpu(present: list[list[str]]) -> Iterator[Row]:
    if not present and os.environ.get("SLURM_JOB_ID"):
        value = "no GPU in this Slurm job: the CPU path is checked"
        yield Row("devices", "warn", value, "if the nodes have GPUs, ask for them: srun --gpus-per-node=N")
    elif not present:
        yield Row("devices", "skip", "no GPU: the CPU path is checked")
    elif torch.version.cuda is None:
        value = f"{len(present)} x {present[0][0]}, but torch {torch.__version__} is for CPUs"
        yield Row("devices", "fault", value, "install a torch with CUDA in this environment")
    else:
        value = f"{len(present)} x {present[0][0]}, driver {present[0][1]}; torch (CUDA {torch.version.cuda}) sees none"
        cure = "update the driver, or take torch for an older CUDA; check CUDA_VISIBLE_DEVICES and the container"
        yield Row("devices", "fault", value, cure)


def _nvidia_smi(query: str) -> list[list[str]]:
    """A row of fields for each GPU that the driver knows; none where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def places(folder: Path) -> Iterator[Row]:
    """The disk of runs and data (`folder`), and the folders of caches."""
    yield from _disk(folder)
    caches = {
        "TMPDIR": (Path(tempfile.gettempdir()), True),
        "TRITON_CACHE_DIR": (Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton")).expanduser(), True),
        "NUMBA_CACHE_DIR": (Path(os.environ.get("NUMBA_CACHE_DIR", PROJECT.parent)), True),
        "HF_HOME": (Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(), False),
    }
    for variable, (place, many) in caches.items():
        there = _nearest(place)
        value = f"{place}: {_free(there)} free, {_file_system(there)}"
        if not os.access(there, os.W_OK):
            yield Row(variable, "fault", f"{place} cannot be written", f"export {variable}=a folder of yours")
        elif many and _file_system(there) in _SHARED_DISKS:
            yield Row(variable, "warn", value, f"export {variable}=a node-local folder: every rank writes there")
        else:
            yield Row(variable, "ok", value)


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.resolve().parents) if place.exists())


def _free(path: Path) -> str:
    status = os.statvfs(path)
    return f"{status.f_bavail * status.f_frsize / 1e9:,.0f} GB"


def _file_system(path: Path) -> str:
    """Type of the file system that holds `path`, as in /proc/mounts."""
    best, kind = "", "unknown"
    real = str(path.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, found, *_ = line.split()
        place = place.replace("\\040", " ")
        if (real == place or real.startswith(place.rstrip("/") + "/")) and len(place) >= len(best):
            best, kind = place, found
    return kind


def _disk(folder: Path) -> Iterator[Row]:
    """Free space, speed of a write that is flushed, and the locks that keep two runs apart."""
    there, megabytes = _nearest(folder), 256
    status = os.statvfs(there)
    room = status.f_bavail * status.f_frsize
    cure = "train.plan says what a run needs; --folder DIR checks another place"
    value = f"{folder.resolve()}: {_free(there)} free, {_file_system(there)}"
    yield Row("disk for runs", "ok" if room >= ROOM else "warn", value, cure)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            block, begin = os.urandom(1 << 20), time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = megabytes * 2**20 / (time.perf_counter() - begin)
            yield _locks(file.name)
    except OSError as error:
        yield Row("disk write", "fault", f"{there}: {error.strerror}", "make it writable, or use --folder DIR")
        return
    yield Row("disk write", "ok" if speed > 1e8 else "warn", f"{speed / 1e9:.2f} GB/s, one process", "a faster disk")


def _locks(path: str) -> Row:
    """Whether a second process is kept off a locked file: a run directory has one writer."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Row("locks", "fault", f"refused: {error.strerror}", "mount with locks (Lustre: -o flock)")
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=False)
    kept = done.returncode != 0 and b"BlockingIOError" in done.stderr
    cure = "mount with locks (Lustre: -o flock): two runs could write one folder"
    return Row("locks", "ok" if kept else "fault", "work" if kept else "a second process was not kept off", cure)


def tokenizer(name: str = "mistral-v0.1") -> Iterator[Row]:
    """The tokenizer's file, by its hash, and the fast encoder against sentencepiece on a line of text."""
    from common.errors import UserError
    from data_prep.tokenizer import load_tokenizer

    probe = "Zamba: 12,5 € naïve \t</s> \U0001f40d 日本語\r\n  x"
    try:
        found = load_tokenizer(name)
        fast, _ = found.encode_flat([probe])
    except UserError as error:
        yield Row("tokenizer", "fault", f"{error.value}: {error.limit}", error.cure)
        return
    right = fast.tolist() == found.encode(probe).tolist()
    value = f"{name}, {found.vocab_size:,} ids, sha256 {found.sha256[:12]}"
    cure = "numba miscompiles here: reinstall numba and numpy"
    yield Row("tokenizer", "ok" if right else "fault", value if right else "differs from sentencepiece", cure)


def compiler() -> Iterator[Row]:
    """Triton builds its launchers with a C compiler when a kernel first runs."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    cure = "apt-get install gcc, or load the cluster's module"
    yield Row("C compiler", "ok" if found else "fault", found or "none", cure)
