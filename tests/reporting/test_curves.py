"""The curves of a run: cut back on a resume, robust against damage, published and drawn."""

import resource
import signal

import pytest
from PIL import Image

from modeling.reliability.errors import UserError
from modeling.reporting.curves import Curves


def row(step, **changes):
    return {"step": step, "images": step, "lr": 0.1, "loss": 1 / step, "grad_norm": 2.0, "seconds": step} | changes


@pytest.fixture
def path(tmp_path):
    """A file with the rows of steps 1 to 3."""
    curves = Curves(tmp_path / "train.csv", 0)
    for step in (1, 2, 3):
        curves.add(row(step))
    return tmp_path / "train.csv"


def test_a_resume_cuts_back_and_writes_the_same_again(path):
    whole = path.read_text()
    with path.open("a") as file:
        file.write("4,4,0.")  # cut by a kill
    curves = Curves(path, 3)
    assert [found["step"] for found in curves.rows()] == [1, 2]
    assert curves.add(row(3)) == curves.rows()[-1] == row(3, loss=0.333333333)
    assert path.read_text() == whole


DAMAGED = ["3,3,0.1,x,2,,3", "3,3,0.1,nan,2,,3", "3,,0.1,1,2,,3", "x,3,0.1,1,2,,3", "3,3,0.1,1,2,,3,4", "3,3,0,1"]
DAMAGED += ["3,3,0.1,1,2,,", "3,3,0.1,1,2,,0", "2.5,3,0.1,1,2,,3"]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_row_is_dropped(path, line):
    whole = path.read_text()
    path.write_text(f"{whole}{line}\n")
    assert [found["step"] for found in Curves(path, 9).rows()] == [1, 2, 3] and path.read_text() == whole


def test_a_damaged_header_drops_all_rows(path):
    path.write_text(path.read_text().replace("loss", "1oss", 1))
    assert Curves(path, 9).rows() == []


def test_each_published_series_is_without_gaps_and_times_and_the_picture_has_both_losses(path, tmp_path):
    curves = Curves(path, 9)
    curves.add({"step": 4, "images": 4, "lr": 0.1, "held_out_loss": 0.5, "seconds": 4})
    curves.publish(tmp_path / "curves")
    published = {file.stem: file.read_text().split() for file in (tmp_path / "curves").iterdir()}
    assert published == {
        "lr": ["step,lr", "1,0.1", "2,0.1", "3,0.1", "4,0.1"],
        "loss": ["step,loss", "1,1", "2,0.5", "3,0.333333333"],
        "grad_norm": ["step,grad_norm", "1,2", "2,2", "3,2"],
        "held_out_loss": ["step,held_out_loss", "4,0.5"],
    }
    curves.plot(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (840, 480)


def test_a_full_disk_is_one_line(path):
    curves, before = Curves(path, 9), path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limit[1]))
    try:
        with pytest.raises(UserError, match=r"train\.csv cannot be written: File too large"):
            curves.add(row(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert path.read_bytes() == before
