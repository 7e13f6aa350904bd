"""DVC notices when the user's own files have changed, and looks at nothing for the other sources."""

import os

import pytest
from dvc.repo import Repo
from dvc.utils.hydra import compose_and_dump
from helpers.configs import CONF, load
from helpers.images import write_images
from helpers.pipeline import ROOT

from modeling.reliability.errors import ConfigError
from modeling.stages import prepare, watch


def test_other_files_other_content(tmp_path):
    images, out = tmp_path / "images", tmp_path / "out/data/files"
    write_images(images / "cat", *[(8, 8)] * 3)

    def look():
        config = load("data=folder", f"data.path={images}")
        watch.run(config, tmp_path / "out")
        return out.read_text()

    found = [look()]
    assert found == [look()] and found[0].startswith("3 files, ")
    write_images(images / "dog", (8, 8))
    found.append(look())
    os.utime(images / "cat/000.png", (1, 1))
    found.append(look())
    (images / "cat").rename(images / "fox")
    found.append(look())
    assert len({*found}) == 4
    with pytest.raises(ConfigError, match="stage=watch: data=cifar10 has no files of yours"):
        watch.run(load(), tmp_path)


@pytest.mark.parametrize(
    ("typed", "watched"),
    [
        (["data=cifar10"], False),
        (["data=shapes"], False),
        (["data=mnist"], False),
        (["data=folder", "data.path=x"], True),
    ],
)
def test_only_a_users_folder_is_looked_at_in_every_run(tmp_path, typed, watched):
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    compose_and_dump(str(tmp_path / "params.yaml"), str(CONF), None, "config", ".", typed)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
    always = {name for name, stage in stages.items() if stage.always_changed}
    needed = {os.path.relpath(dep.fs_path, tmp_path) for dep in stages["prepare"].deps}
    assert always == ({"watch@files"} if watched else set())
    assert needed & {"data/validated", "data/files"} == {"data/files" if watched else "data/validated"}
    if watched:
        assert [os.path.relpath(each.fs_path, tmp_path) for each in stages["watch@files"].outs] == ["data/files"]
        assert [os.path.relpath(each.fs_path, tmp_path) for each in stages["watch@files"].deps] == ["data/validated"]


def test_prepare_refuses_what_the_model_cannot_take_before_any_work(tmp_path, monkeypatch):
    write_images(tmp_path / "images", *[(28, 28)] * 3)
    typed = ["data=folder", f"data.path={tmp_path / 'images'}", f"out_dir={tmp_path / 'out'}", "model=tiny"]
    with pytest.raises(ConfigError, match=r"model.attention_resolutions=\[7\] fits 28 x 28"):
        prepare.run(load(*typed), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.delitem(prepare.FORMS, "folder")  # a source need not know the form of its images
    prepare.run(load(*typed), tmp_path / "out")
    assert (tmp_path / "out/data/folder/data.json").exists()
