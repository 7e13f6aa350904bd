"""The compare command: its table and its page; and once with DVC itself."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
from helpers.experiments import NAMES, shown, state
from helpers.pages import Page
from helpers.pipeline import environment
from PIL import Image

from modeling.commands import compare
from modeling.pages.experiments import Experiment
from modeling.reliability.errors import UserError


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


def test_columns_without_room_are_named_and_the_others_whole(monkeypatch, capsys):
    measured = {"wavelet_distance": 0.05, "wavelet_distance_stderr": 0.003, "bits_per_dim": 2.4, "recognised": 0.99}
    measured |= {"bits_per_dim_stderr": 0.02, "held_out_loss": 0.02, "images": 19200, "images_per_second": 102.9}
    run(monkeypatch, shown(state("pupal-cony", **measured)))
    lines = capsys.readouterr().out.splitlines()
    for whole in ("experiment", "wavelet distance", "bits/dim", "loss", "differs in"):
        assert whole in lines[0]
    assert "pupal-cony" in lines[1] and max(map(len, lines)) <= compare.WIDTH
    assert lines[-2] == "no room for: recognised, images, images/s; --html shows all"


def test_only_the_named_are_compared(monkeypatch, capsys):
    run(monkeypatch, done(), "second", "third")
    printed = capsys.readouterr().out
    assert "second" in printed and "third" in printed and "red" not in printed and "master" not in printed
    with pytest.raises(UserError, match=r"no experiment nobody: there are \[red\]<script>, second, third$"):
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
    assert page.text["figcaption"] == ["Training loss, of the output", "second", "[red]<script>"]
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
    compare.run(["--all-commits"])
    _, *rows, _ = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in rows} == {"done", "waits", "workspace"}  # not the commit, which trained nothing
    shutil.rmtree(repository / ".dvc/cache")
    read = compare.reader(
        Experiment(**{key: each for key, each in found["done"].items() if key not in ("rank", "curves")})
    )
    assert read("curves/loss.csv") is None and read("evaluate.json") == b'{"held_out_loss": 0.5}'


def test_an_error_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", "-A"])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_path(compare.__file__, run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: dvc exp show: you are not inside of a DVC repository")
