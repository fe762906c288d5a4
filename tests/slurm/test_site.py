"""slurm/site.sh by itself: what it needs no Slurm for."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from .conftest import REPOSITORY


def test_a_setup_that_prints_does_not_mix_with_what_a_command_says(site: Callable[..., str]) -> None:
    file = site(SITE_SETUP="echo Welcome; export MET=1")
    script = f"ZAMBA_SITE={file}; source slurm/site.sh; in_site bash -c 'echo $MET'"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "Welcome\n")
