"""README.md and docs/: every test, file, link, command, key and choice that a page names exists.

Every command is parsed by its own program, and its overrides composed and validated, also of what needs a GPU, a
network or hours. They are listed by `pytest tests/test_docs.py -rP`. Those of main.py run, with the tiny recipe, and
main.py with what those of `dvc exp run` set. test_pipeline.py runs the pipeline under DVC, its tables, `dvc repro`,
`dvc pull`, and the Python blocks; test_dvc_resume.py the queue; test_extending.py the commands of extending.md, which
need its patches; test_benchmarks.py the benchmarks, and tests/commands the tables.
"""

import argparse
import ast
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import fields
from importlib.util import find_spec

import pytest
from dvc.cli.parser import get_main_parser
from helpers.configs import load
from helpers.images import write_images
from helpers.pipeline import ROOT, TINY
from helpers.processes import Launched
from helpers.runs import plain_run

from modeling.api import TrainedModel
from modeling.settings.groups import GROUPS, STAGES

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("modeling", "tests", "conf", "docs", "benchmarks", "examples")
# of `model` in python.md, which is no group
OF_A_MODEL = {*vars(TrainedModel), *TrainedModel.__init__.__code__.co_names}
NO_KEYS = {"json", "safetensors", "py", "test"}  # data.json is no key of the group data
TESTS = {
    (path.name, node.name)
    for path in (ROOT / "tests").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}


def code(page):
    """What stands in backticks or in a fenced block, without patches and quoted messages."""
    text = re.sub("^```diff\n.*?^```$|^- `` .*?$", "", page.read_text(), flags=re.M | re.S)
    fenced = re.findall("^ *```\\w*\n(.*?)^ *```$", text, re.M | re.S)
    return [*fenced, *re.findall("`([^`\n]+)`", re.sub("^ *```.*?^ *```$", "", text, flags=re.M | re.S))]


def missing_tests(span):
    for file, name in re.findall(r"(?:(\w+\.py)::)?(?<!\.)\b(test_\w+)\b(?!\.py)", span):
        if not any(name == known and file in ("", where) for where, known in TESTS):
            yield f"{file}::{name}" if file else name


def missing_files(span):
    for name in re.findall(r"[\w./-]+", span):
        if name.split("/")[0] in FOLDERS and "/" in name and not (ROOT / name).exists():
            yield name
    for name in re.findall(r"(?<![\w./-])\w+\.py\b", span):
        if not (ROOT / name).exists() and not any(any((ROOT / top).rglob(name)) for top in FOLDERS):
            yield name


def missing_commands(span):
    for name in re.findall(r"python -m ((?:benchmarks|examples|modeling)[\w.]*)", span):
        path = ROOT / name.replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            yield f"python -m {name}"
    targets = re.findall("^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    yield from (f"make {name}" for name in re.findall(r"\bmake ([a-z]+)", span) if name not in targets)


def missing_settings(span):
    groups = "|".join(GROUPS)
    for group, key in re.findall(rf"(?<![\w./])({groups})\.([a-z]\w*)", span):
        schema = GROUPS[group]
        keys = {field.name for choice in (schema.base, *schema.choices.values()) for field in fields(choice)}
        if key not in keys | NO_KEYS | (OF_A_MODEL if group == "model" else set()):
            yield f"{group}.{key}"
    for group, choice in re.findall(rf"(?<![\w./])({groups}|experiment)=(\w+)", span):
        added = f"+++ b/conf/{group}/{choice}.yaml" in (ROOT / "docs/extending.md").read_text()
        if not (added or (ROOT / "conf" / group / f"{choice}.yaml").exists()):
            yield f"{group}={choice}"
    yield from (f"stage={stage}" for stage in re.findall(r"\bstage=(\w+)", span) if stage not in STAGES)


@pytest.mark.parametrize("missing", [missing_tests, missing_files, missing_commands, missing_settings])
def test_what_the_pages_name_in_code_exists(missing):
    absent = {page.name: sorted({name for span in code(page) for name in missing(span)}) for page in PAGES}
    assert not {page: names for page, names in absent.items() if names}


def test_links_lead_somewhere():
    links = [(page.parent, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    assert not [link for folder, link in links if "://" not in link and not (folder / link).exists()]


def test_faults_are_counted_as_the_tests_inject_them():
    page = (ROOT / "docs/reliability.md").read_text()
    examples = re.findall(r"max_examples=(\d+)", (ROOT / "tests/test_fuzz.py").read_text())
    assert f"| {sum(map(int, examples)):,}: {examples[0]} configurations," in page
    kills = (ROOT / "tests/reliability/test_kill.py").read_text()
    (moments,) = map(int, re.findall(r"^RANDOM_KILLS = (\d+)", kills, re.M))
    (places,) = re.findall(r"^AIMED_KILLS = \[(.*)\] \* 2", kills, re.M)
    assert f"| {moments + 2 * len(places.split()) + 1}: {moments} at random moments, 2 each" in page


OTHERS = ("extending.md", "troubleshooting.md")  # patches that add choices; messages that quote parts of commands


def commands(program):
    """The words of each command of a program in the pages, without repetitions; placeholders become `x`."""
    found = {}
    for page in PAGES:
        for span in code(page):
            for line in span.replace("\\\n", " ").splitlines():
                if re.search(rf"(?<![\w.-]){program}( |$)", line) and page.name not in OTHERS and "..." not in line:
                    words = shlex.split(re.sub("<[^<>]+>", "x", line), comments=True)
                    while program in words:
                        words = words[words.index(program) + 1 :]
                        end = next((k for k, word in enumerate(words) if word in ("&&", ">", "|", "or")), len(words))
                        found[shlex.join(words[:end])] = words[:end]
    print(*(f"{program} {words}" for words in found), sep="\n")
    return found.values()


def check_overrides(words):
    overrides = [word for word in words if re.match(r"[\w.]+=", word) and not word.startswith("x=")]
    assert load(*(re.sub(r"=([^\[,'\"]+),.*", r"=\1", each) for each in overrides))  # of a sweep the first value


def test_commands_of_main_compose_and_are_valid():
    found = commands("main.py")
    for words in found:
        check_overrides(words)
    assert len(found) > 15


SHORT = ("experiment=tiny", "experiment=demo")  # the recipes that need no network and no hours


@pytest.fixture
def repository(tmp_path_factory, tmp_path):
    """A folder as the repository's root is after a run of the tiny recipe."""
    done = plain_run(tmp_path_factory)
    shutil.copytree(done / "out", tmp_path / "root")
    shutil.copytree(done / "state/runs", tmp_path / "root/runs")
    (run,) = {path.parent for path in (tmp_path / "root/runs").glob("*/step-*.pt")}
    run.rename(run.with_name("x"))  # as the placeholders are read
    return tmp_path / "root"


def run_tiny(repository, words):
    """Runs main.py with the tiny recipe in place of its own, if that needs no network and no hours; whether it does."""
    recipes = [word for word in words if word.startswith("experiment=")]
    if any(recipe not in SHORT for recipe in recipes):
        return False
    arguments = [*TINY, *(word for word in words if word not in recipes)]
    run = Launched(repository, arguments, repository, {"DVC_ROOT": str(repository)})
    assert run.end() == 0, f"{words}: {run.printed()}"
    return True


def test_commands_of_main_run(repository):
    without = ["stage=sample", "model.weights=x"]  # x is no model
    assert sum(run_tiny(repository, words) for words in commands("main.py") if words != without) > 12


def test_what_commands_of_dvc_set_runs(repository):
    """In training, but for data of the network; test_device.py compiles."""
    write_images(repository / "x", (32, 32), (32, 32))
    ran = []
    for words in commands("dvc"):
        overrides = (getattr(get_main_parser().parse_args(words), "set_param", None) or []) if len(words) > 1 else []
        overrides = [re.sub(r"=([^\[,'\"]+),.*", r"=\1", each) for each in overrides]  # of a sweep the first value
        known = not overrides or overrides in ran or {"data=cifar100", "trainer.compile=true"} & {*overrides}
        if not known and run_tiny(repository, [*overrides, "stage=train"]):
            ran.append(overrides)
    assert len(ran) > 8


def test_commands_of_dvc_parse_and_compose():
    found, parser = commands("dvc"), get_main_parser()
    for words in found:
        if len(words) > 1 or words in (["pull"], ["repro"], ["status"]):  # else named alone, as `dvc exp run` may be
            check_overrides(getattr(parser.parse_args(words), "set_param", None) or [])
    assert len(found) > 15
    for page in PAGES:  # in the middle of a sentence
        for span in code(page):
            if span.startswith("-S ") and page.name != "extending.md":
                check_overrides(re.sub("<[^<>]+>", "x", span).split()[1::2])


def test_what_needs_a_network_or_hours_is_marked():
    """The rows of commands.md that compose to data of the network, or to a training of more than a demo."""
    page = (ROOT / "docs/commands.md").read_text().splitlines()
    alone = r"`((?:dvc exp run|python main.py) [^`]*experiment=[^`]*|dvc exp run(?: -S data=[^`]*)?)`"
    found = 0
    for wanted, shown in (line.split("|")[1:3] for line in page if line.startswith("| ")):
        for command in re.findall(alone, shown):
            typed = shlex.split(re.sub("<[^<>]+>", "x", command))
            config = load(*(word for word in typed if "=" in word and "stage=" not in word))
            needs = wanted.rpartition("(")[2]
            assert ("network" in needs) == (config.data.name not in ("shapes", "shapes_tiny", "folder")), command
            long = config.trainer.steps > 2000 and "stage=check" not in command
            assert bool(re.search("hour|a large GPU", needs)) == long, command
            found += 1
    assert found >= 7


class Parsed(Exception):
    pass


def test_commands_of_modules_parse(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser, *arguments):
        raise Parsed(parse(parser, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    found = [words for words in commands("-m") if words[0].startswith(("modeling", "benchmarks"))]
    for module, *arguments in found:
        if module.startswith("modeling") or find_spec("diffusers"):
            monkeypatch.setattr(sys, "argv", [module, *arguments])
            monkeypatch.delitem(sys.modules, module, raising=False)
            with pytest.raises(Parsed):
                runpy.run_module(module, run_name="__main__")
    assert len(found) > 8
