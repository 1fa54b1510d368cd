"""A sweep of real runs in processes of their own, as typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")


@pytest.mark.slow
def test_a_sweep_of_two_jobs_trains_two_runs(tmp_path: Path) -> None:
    """Four steps each, side by side: one folder per run, and other losses for another seed."""
    sweep = "train -m +exp=smoke seed=0,1 name=s_${seed} evaluator=[] hydra/launcher=joblib"
    done = subprocess.run(
        [sys.executable, "-m", "gradeclip_ft", *sweep.split(), "hydra.launcher.n_jobs=2"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == [
        "s_0",
        "s_1",
    ]
    losses = []
    for name in ("s_0", "s_1"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        steps = [row for row in rows if "loss" in row]
        assert steps[-1]["step"] == 4
        losses.append(steps[-1]["loss"])
        assert (tmp_path / "runs" / name / "weights.safetensors").is_file()
    assert losses[0] != losses[1]
