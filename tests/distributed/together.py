"""Run by test_processes.py in two processes: collectives.py, shares.py, and what goes wrong there."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling.checkpoints.checkpoint import read_checkpoint
from modeling.distributed import collectives as d
from modeling.distributed import shares
from modeling.evaluation.fid import Inception, reference_features
from modeling.inference.kept import kept_samples
from modeling.reliability.container import cores
from modeling.reliability.errors import ConnectionLost, Stopped, UserError
from modeling.reliability.signals import poll, stop_requests
from modeling.training.ema import EMA
from modeling.training.state import CheckpointFolder, TrainingState


def exchange(folder):
    mine = d.rank()
    assert d.world_size() == 2 and d.is_first() == (mine == 0)
    assert [list(shares.share(n)) for n in (5, 1)] == ([[0, 1], []], [[2, 3, 4], [0]])[mine]
    assert d.any_process(mine == 1) and not d.any_process(False)
    assert d.any_process_each(False, mine == 1) == [False, True]
    summed = [torch.full((2, 3), 1.0 + mine), torch.tensor(10.0 * mine)]
    d.sum_over_processes(summed)
    assert torch.equal(summed[0], torch.full((2, 3), 3.0)) and summed[1] == 10
    sent = d.from_first(lambda: {"rank": mine, "t": torch.arange(3), "none": None})
    assert sent["rank"] == 0 and torch.equal(sent["t"], torch.arange(3)) and sent["none"] is None
    for n in (7, 2, 1):  # of a single row, one process makes none
        table = shares.sharded(n, lambda rows: torch.arange(rows.start, rows.stop)[:, None] ** 2)
        assert table.flatten().tolist() == [k**2 for k in range(n)]
    d.check_same([torch.ones(3), torch.zeros(2)], "ones")
    with pytest.raises(UserError, match=r"^these differ between the processes"):
        d.check_same([torch.ones(3), torch.tensor([float(mine)])], "these")


def quality(folder):
    inception = Inception.__new__(Inception)
    inception.device, inception.sha256 = torch.device("cpu"), "x"
    weights = torch.randn(3, 3056, generator=torch.Generator().manual_seed(0))

    class Network(nn.Module):
        def forward(self, rgb):
            return (rgb.float().mean((2, 3)) @ weights).split([2048, 1008], dim=1)

    inception.network = Network()
    images = torch.randint(0, 256, (9, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    drawn = []

    def draw(indices):
        drawn.append(indices)
        return images[indices.start : indices.stop]

    for times in (5, 5):  # the second time they are read; 4 of 9 images: a last batch of one
        found = list(kept_samples(folder / "kept", 9, 2, draw))
        assert torch.equal(torch.cat(found), images) and len(drawn) == times
    pool, logits = inception.features(found)
    alone = torch.cat([part for part in inception.network(images)], dim=1)
    assert torch.allclose(torch.cat([pool, logits], dim=1), alone, rtol=1e-5, atol=1e-3)
    first, again = (reference_features(inception, images, "data", folder, 4) for _ in range(2))
    assert torch.equal(first, pool) or torch.allclose(first, pool)
    assert len(again) == (9 if d.is_first() else 0)


def stop_elsewhere(folder):
    """A request to the second process stops the first too, in the middle of its rows."""

    def work(rows):
        if d.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(600):
            poll()
            time.sleep(0.05)
        raise AssertionError("nobody stopped this")

    with stop_requests(), pytest.raises(Stopped):
        shares.sharded(4, work)


def save(folder):
    """However long the first process writes, the second goes on only when the checkpoint is there."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = TrainingState(model, EMA(model, 0.9), optimizer, torch.device("cpu"))
    state.step = 1
    if d.is_first():
        time.sleep(1)
    state.save(CheckpointFolder(folder / "state"))
    assert read_checkpoint(folder / "state" / "step-000000001.pt")["step"] == 1
    d.barrier()
    again = TrainingState(nn.Linear(2, 2), EMA(model, 0.9), optimizer, torch.device("cpu"))
    again.resume(CheckpointFolder(folder / "state" if d.is_first() else Path()), 2)
    assert again.step == 1 and torch.equal(again.model.weight, d.from_first(lambda: model.weight.detach()))


def lose(folder):
    """The second process dies, and the first one notices at once."""
    d.barrier()
    if d.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    since = time.monotonic()
    with pytest.raises(ConnectionLost, match="has ended or cannot be reached"):
        d.barrier()
    assert time.monotonic() - since < 10
    print("lose", flush=True)
    os._exit(0)  # the end of the group waits for both


if __name__ == "__main__":
    folder = Path(os.environ["MODELING_JOB"])
    del os.environ["OMP_NUM_THREADS"]
    torch.set_num_threads(7)
    with d.group("cpu"):
        assert torch.get_num_threads() == max(1, cores() // 2)  # both may use all of them
        for name in sys.argv[1:]:
            globals()[name](folder)
            print(name, flush=True)
