"""The global loss against a plain cross-entropy, and two processes against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradeclip_ft.losses import contrastive_loss


def test_global_loss_is_the_symmetric_cross_entropy_of_eq_21() -> None:
    image, text = torch.randn(6, 8), torch.randn(6, 8)
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    target = torch.arange(6)
    expected = (
        torch.nn.functional.cross_entropy(14 * cosines, target)
        + torch.nn.functional.cross_entropy(14 * cosines.T, target)
    ) / 2
    got = contrastive_loss(image, text, torch.tensor(14.0))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.ddp
def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Value and gradient of both losses, phrase counts (5, 0), (3, 7) and (0, 0) (traps: C1-C4)."""
    script = Path(__file__).with_name("two_processes.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    output = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(output)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == 13
    for case, error in report.items():
        # fp32 sums in another order
        assert error < 1e-5, f"{case}: {error}"
