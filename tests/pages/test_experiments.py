"""The rows of several experiments: the order, the parameters that differ, and the cells of their table."""

import pytest
from helpers.experiments import NAMES, shown, state

from modeling.pages import experiments
from modeling.reliability.errors import UserError


@pytest.fixture
def rows():
    settings = [
        {"data": {"name": "shapes"}, "optimizer": {"lr": lr, "name": "adam"}, "seed": 0, "wandb": {"mode": mode}}
        for lr, mode in ((0.1, "a"), (0.2, "b"), (0.1, "c"))
    ]
    losses = (0.3, 0.1, 0.2)
    each = zip(NAMES, settings, losses, strict=True)
    done = [state(name, params, held_out_loss=loss, bits_per_dim=3.0, images=9) for name, params, loss in each]
    waiting = [state("waits", settings[0] | {"seed": 5}, "queued"), state("broke", error={"msg": "failed"}, old=1.0)]
    return experiments.parse(shown(*done, *waiting, state("runs", executor="running", fid=1.0)))


def ranked(rows):
    return {row.name: row.rank for row in rows if row.rank}


def test_rows_tell_what_is_done_from_what_is_not(rows):
    states = {row.name: row.state for row in rows}
    assert states == {"workspace": "", "master": "", **dict.fromkeys(NAMES, ""), "waits": "queued"} | {
        "broke": "failed",
        "runs": "running",
    }
    assert not any(row.metrics for row in rows if row.state) and rows[2].created == "01-02 03:04"
    (unnamed,) = experiments.parse([{"rev": "0123456789", "name": None, "data": None}])
    assert (unnamed.name, unnamed.metrics) == ("0123456", {})


def test_the_best_is_first(rows):
    assert experiments.rank(rows, None) == "bits_per_dim" and {*ranked(rows).values()} == {
        1
    }  # equal ones share a number
    assert experiments.rank(rows, "held_out_loss") == "held_out_loss"
    assert ranked(rows) == dict(zip(NAMES, (3, 1, 2), strict=True))
    rows[2].metrics["images"] = 10
    experiments.rank(rows, "images")  # more is better
    assert ranked(rows) == dict(zip(NAMES, (1, 2, 2), strict=True))
    with pytest.raises(UserError, match="--sort-by x: allowed are held_out_loss, bits_per_dim, images"):
        experiments.rank(rows, "x")


def test_the_order_is_by_fid_only_if_all_have_it(rows):
    rows[2].metrics["fid_1000"] = 4.0
    assert experiments.rank(rows, None) == "bits_per_dim"
    for row in rows[3:5]:
        row.metrics["fid_1000"] = 3.0
    assert experiments.rank(rows, None) == "fid_1000"
    for row in rows[2:5]:
        row.metrics = {"images": 1.0} if row is rows[2] else {"held_out_loss": 1.0}
    assert experiments.rank(rows, None) == "held_out_loss" and rows[2].rank is None
    assert experiments.rank(experiments.parse(shown(state("waits", executor="queued"))), None) == ""
    with pytest.raises(UserError, match="none yet"):
        experiments.rank([], "fid")


def test_distances_of_different_numbers_of_samples_give_no_order(rows):
    for row, count in zip(rows[2:5], (300, 1000, 1000), strict=True):
        row.metrics["wavelet_distance"] = 0.1
        row.params["evaluation.num_samples"] = count
    assert experiments.rank(rows, None) == "bits_per_dim"
    (note,) = [note for note in experiments.notes(rows, "bits_per_dim") if "do not compare" in note]
    assert note.startswith("wavelet distance: of different numbers of samples (evaluation.num_samples)")
    rows[2].params["evaluation.num_samples"] = 1000
    assert experiments.rank(rows, None) == "wavelet_distance" and len(experiments.notes(rows, "x")) == 1


def test_only_what_differs_is_told_what_is_unusual_first(rows):
    found = dict(zip([row.name for row in rows], experiments.differences(rows), strict=True))
    assert found["workspace"] == found["master"] == {}
    assert next(iter(found["second"].items())) == ("optimizer.lr", 0.2)
    assert [*found["waits"].items()] == [
        ("seed", 5),
        ("data.name", "shapes"),
        ("optimizer.lr", 0.1),
        ("optimizer.name", "adam"),
    ]
    same = experiments.parse(shown(*(state(name, {"seed": 1}, held_out_loss=1.0) for name in "ab")))
    assert not any(experiments.differences(same))
    rows[2].params["data.name"] = "cifar10"
    assert any("different data" in note for note in experiments.notes(rows, "fid"))
    assert not experiments.notes(same, "")


def test_there_are_ten_columns_at_most(rows):
    rows[2].metrics |= {f"fid_{k}": 1.0 for k in range(9)} | {"bits_per_dim_stderr": 0.5, "images_per_second": 2.0}
    rows[2].metrics |= {"wavelet_distance": 0.1, "recognised": 0.5}
    headings, cells = experiments.table(rows, 20)
    assert len(headings) == 10 and {*map(len, cells)} == {10} and "3.000 ± 0.500" in cells[2]
    assert max(len(row[-1]) for row in cells) <= 20
