"""The compare command: the order, the parameters that differ, its table and its page; and once with DVC itself."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
from helpers.pages import Page
from helpers.pipeline import environment
from PIL import Image

from modeling.commands import compare
from modeling.reliability.errors import UserError

NAMES = ["[red]<script>", "second", "third"]


def state(name, params=None, executor=None, error=None, **metrics):
    """What `dvc exp show --json` says of an experiment."""
    data = {
        "timestamp": "2026-01-02T03:04:05",
        "metrics": {
            "reports/evaluate.json": {"data": metrics} if metrics else {"error": {"type": "FileNotFoundError"}}
        },
        "params": {"params.yaml": {"data": params or {}}},
    }
    rev = {"rev": f"{name}-0123456789", "name": name, "data": data, "error": error}
    return {"name": name, "revs": [rev], "executor": executor and {"state": executor}}


def shown(*experiments, **workspace):
    """A workspace, and a commit without metrics with its experiments."""
    first, head = state("workspace", **workspace)["revs"][0], state("master")["revs"][0]
    return [first | {"rev": "workspace", "name": None}, head | {"experiments": list(experiments)}]


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
    return compare.parse(shown(*done, *waiting, state("runs", executor="running", fid=1.0)))


def ranked(rows):
    return {row.name: row.rank for row in rows if row.rank}


def test_rows_tell_what_is_done_from_what_is_not(rows):
    states = {row.name: row.state for row in rows}
    assert states == {"workspace": "", "master": "", **dict.fromkeys(NAMES, ""), "waits": "queued"} | {
        "broke": "failed",
        "runs": "running",
    }
    assert not any(row.metrics for row in rows if row.state) and rows[2].created == "01-02 03:04"
    (unnamed,) = compare.parse([{"rev": "0123456789", "name": None, "data": None}])
    assert (unnamed.name, unnamed.metrics) == ("0123456", {})


def test_the_best_is_first(rows):
    assert compare.rank(rows, None) == "bits_per_dim" and {*ranked(rows).values()} == {1}  # equal ones share a number
    assert compare.rank(rows, "held_out_loss") == "held_out_loss"
    assert ranked(rows) == dict(zip(NAMES, (3, 1, 2), strict=True))
    rows[2].metrics["images"] = 10
    compare.rank(rows, "images")  # more is better
    assert ranked(rows) == dict(zip(NAMES, (1, 2, 2), strict=True))
    with pytest.raises(UserError, match="--sort-by x: allowed are held_out_loss, bits_per_dim, images"):
        compare.rank(rows, "x")


def test_the_order_is_by_fid_only_if_all_have_it(rows):
    rows[2].metrics["fid_1000"] = 4.0
    assert compare.rank(rows, None) == "bits_per_dim"
    for row in rows[3:5]:
        row.metrics["fid_1000"] = 3.0
    assert compare.rank(rows, None) == "fid_1000"
    for row in rows[2:5]:
        row.metrics = {"images": 1.0} if row is rows[2] else {"held_out_loss": 1.0}
    assert compare.rank(rows, None) == "held_out_loss" and rows[2].rank is None
    assert compare.rank(compare.parse(shown(state("waits", executor="queued"))), None) == ""
    with pytest.raises(UserError, match="none yet"):
        compare.rank([], "fid")


def test_only_what_differs_is_told_what_is_unusual_first(rows):
    found = dict(zip([row.name for row in rows], compare.differences(rows), strict=True))
    assert found["workspace"] == found["master"] == {}
    assert next(iter(found["second"].items())) == ("optimizer.lr", 0.2)
    assert [*found["waits"].items()] == [
        ("seed", 5),
        ("data.name", "shapes"),
        ("optimizer.lr", 0.1),
        ("optimizer.name", "adam"),
    ]
    same = compare.parse(shown(*(state(name, {"seed": 1}, held_out_loss=1.0) for name in "ab")))
    assert not any(compare.differences(same))
    rows[2].params["data.name"] = "cifar10"
    assert any("different data" in note for note in compare.notes(rows, "fid"))
    assert not compare.notes(same, "")


def test_there_are_ten_columns_at_most(rows):
    rows[2].metrics |= {f"fid_{k}": 1.0 for k in range(9)} | {"bits_per_dim_stderr": 0.5, "images_per_second": 2.0}
    rows[2].metrics |= {"wavelet_distance": 0.1, "recognised": 0.5}
    headings, cells = compare.table(rows, 20)
    assert len(headings) == 10 and {*map(len, cells)} == {10} and "3.000 ± 0.500" in cells[2]
    assert max(len(row[-1]) for row in cells) <= 20


def run(monkeypatch, experiments, *arguments):
    monkeypatch.setattr(compare, "shown_by_dvc", lambda all_commits: experiments)
    compare.run(arguments)


def done(count=3, **params):
    each = enumerate([*NAMES, *(f"more-{k}" for k in range(count))][:count])
    return shown(*(state(name, {"seed": k} | params, held_out_loss=1.0 / (k + 1)) for k, name in each))


def test_the_table_fits_and_names_are_text(monkeypatch, capsys):
    keys = {"model": {f"key_{k}": "x" * 20 for k in range(9)}}
    run(monkeypatch, [*done(), *shown(state("long" * 30, keys, held_out_loss=2.0))], "--sort-by=held_out_loss")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= compare.WIDTH and lines[0].split()[:3] == ["rank", "experiment", "created"]
    assert [line.split()[1] for line in lines[1:4]] == ["third", "second", "[red]<script>"]
    assert lines[-1] == "best first by held_out_loss"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    run(monkeypatch, done())
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert 100 < max(map(len, plain.splitlines())) <= 150


def test_only_the_named_are_compared(monkeypatch, capsys):
    run(monkeypatch, done(), "second", "third")
    printed = capsys.readouterr().out
    assert "second" in printed and "third" in printed and "red" not in printed and "master" not in printed
    with pytest.raises(UserError, match="no experiment nobody: there are workspace, master,"):
        run(monkeypatch, done(), "nobody")
    with pytest.raises(UserError, match=r"no experiments yet: .*, or -A"):
        run(monkeypatch, shown())
    with pytest.raises(UserError, match=r"no experiments yet: make one with dvc exp run -S experiment=demo$"):
        run(monkeypatch, shown(), "-A")


def test_the_page_shows_curves_and_samples_side_by_side(monkeypatch, tmp_path):
    files = {"curves/loss.csv": b"step,loss\n1,0.5\n2,0.25\n"}
    Image.new("RGB", (32, 32), "red").save(tmp_path / "samples.png")
    files["samples.png"] = (tmp_path / "samples.png").read_bytes()
    monkeypatch.setattr(compare, "reader", lambda row: ({} if row.name == "third" else files).get)
    run(monkeypatch, done(), "--html", str(tmp_path / "page.html"))
    page = Page((tmp_path / "page.html").read_text()).check()
    assert page.text["figcaption"] == ["Training loss", "second", "[red]<script>"]
    assert NAMES[0] in page.text["td"] and {"seed"} == {*page.text["code"]}
    found = {each["name"]: each for each in page.data["experiments"]}
    assert found["second"]["curves"] == {"loss": [[1, 0.5], [2, 0.25]]} and found["third"]["curves"] == {}
    assert found["third"]["metrics"] == {"held_out_loss": pytest.approx(1 / 3)} and found["third"]["rank"] == 1


DVC_YAML = """
stages:
  train:
    cmd: cp -r source/. reports/ && test ${seed} -lt 9
    params: [seed]
    outs: [reports/curves]
    metrics:
      - reports/evaluate.json:
          cache: false
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small one, with an experiment that is done, and one that waits."""
    root = tmp_path / "repository"
    files = {
        ".dvc/config": "[core]\nanalytics = false\n",
        ".gitignore": "/reports/curves\n",
        "dvc.yaml": DVC_YAML,
        "params.yaml": "seed: 0\n",
        "reports/.keep": "",
        "source/curves/loss.csv": "step,loss\n1,0.5\n",
        "source/evaluate.json": '{"held_out_loss": 0.5}',
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    for key, value in environment(root).items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(root)
    commands = (
        "git init -q",
        "git add -A",
        "git commit -qm start",
        "dvc exp run -q -n done -S seed=1",
        "dvc exp run -q -n waits --queue -S seed=3",
    )
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)
    return root


def test_experiments_of_dvc(repository, capsys):
    compare.run(["done", "waits", "workspace", "--html", "page.html"])
    page = Page((repository / "page.html").read_text()).check()
    found = {each["name"]: each for each in page.data["experiments"]}
    assert found["done"]["metrics"] == {"held_out_loss": 0.5} and found["done"]["curves"] == {"loss": [[1, 0.5]]}
    assert found["workspace"]["curves"] == found["done"]["curves"] and found["waits"]["state"] == "queued"
    assert "seed=3" in capsys.readouterr().out
    shutil.rmtree(repository / ".dvc/cache")
    read = compare.reader(
        compare.Experiment(**{key: each for key, each in found["done"].items() if key not in ("rank", "curves")})
    )
    assert read("curves/loss.csv") is None and read("evaluate.json") == b'{"held_out_loss": 0.5}'


def test_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", "-A"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(compare.__file__, run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: dvc exp show: you are not inside of a DVC repository")
