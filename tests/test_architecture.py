"""The packages: who may import whom; few arguments; registries, settings and conf/ with the same choices."""

import ast
import importlib.util
from dataclasses import fields
from graphlib import TopologicalSorter

import pytest
import yaml
from helpers.configs import group
from helpers.pipeline import ROOT

from modeling.data.sources import SOURCES
from modeling.diffusion.samplers import SAMPLERS, SPACINGS
from modeling.diffusion.schedule import SCHEDULES
from modeling.settings.groups import GROUPS
from modeling.training.optimizer import OPTIMIZERS


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architecture, configuration, troubleshooting = map(script, ("architecture", "configuration", "troubleshooting"))

LOWEST = {"seeds", "settings", "reliability"}
INFERENCE = {"inference", "build", "data", "distributed", "diffusion", *LOWEST}
MAY_IMPORT = {
    "seeds": set(),
    "settings": set(),
    "reliability": set(),
    "diffusion": set(),
    "distributed": {"reliability", "settings"},
    "data": LOWEST,
    "config": {"reliability", "settings"},
    "build": {"diffusion", *LOWEST},
    "inference": INFERENCE - {"inference"},
    "interop": {"diffusion", "reliability", "settings"},
    "checkpoints": {"build", "interop", "diffusion", *LOWEST},
    "training": {"checkpoints", "interop", *INFERENCE},
    "evaluation": {"checkpoints", "interop", *INFERENCE},
    "reporting": {"checkpoints", "interop", "training", *INFERENCE},
    "recipe": {"reliability", "settings"},
    "pages": {"reliability", "settings", "recipe"},
    "stages": {"checkpoints", "interop", "training", "evaluation", "reporting", "pages", "recipe", *INFERENCE},
    "commands": {"checkpoints", "interop", "training", "evaluation", "reporting", "pages", "recipe", *INFERENCE},
    "api": {"stages", "checkpoints", "interop", "recipe", "config", *INFERENCE},
    "main": {"config", "distributed", "recipe", "reliability", "settings", "stages"},
}
MOST_ARGUMENTS = 7
REGISTRIES = {"sampler": SAMPLERS, "diffusion": SCHEDULES, "data": SOURCES, "optimizer": OPTIMIZERS}


def test_every_package_imports_only_what_it_may():
    packages = architecture.graph()
    assert packages.keys() == MAY_IMPORT.keys()
    assert not {(package, target) for package, found in packages.items() for target in found - MAY_IMPORT[package]}


def test_no_rule_and_no_import_closes_a_circle():
    tuple(TopologicalSorter(MAY_IMPORT).static_order())
    modules = {module: architecture.imports(module).keys() for module in architecture.files()}
    tuple(TopologicalSorter(modules).static_order())  # of the modules within a package too


def test_the_command_line_and_the_reports_import_one_thing_each():
    used = {target for target in architecture.imports("main") if target.startswith("modeling.distributed")}
    assert used == {"modeling.distributed.launcher"}  # the others need torch
    reports = [module for module in architecture.files() if module.startswith("modeling.reporting")]
    found = [imported for module in reports for imported in architecture.imports(module).items()]
    names = {(target, *found) for target, found in found if target.startswith("modeling.training")}
    assert names == {("modeling.training.trainer", "Reporter")}


def test_the_page_is_what_the_script_prints():
    page = (ROOT / "docs/architecture.md").read_text()
    assert page == architecture.page(), "run python docs/architecture.py > docs/architecture.md"


def test_the_page_of_the_configuration_is_what_the_script_prints_and_says_what_each_key_is():
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == configuration.page(), "run python docs/configuration.py > docs/configuration.md"
    keys = [line.split(" | ") for line in page.splitlines() if line.count(" | ") == 3]
    assert len(keys) > 60 and not [key for key, *_, meaning in keys if not meaning.strip(" |")]


def test_the_page_of_messages_is_what_the_script_prints_and_knows_each_way_to_raise_one():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert page == troubleshooting.page(), "run python docs/troubleshooting.py > docs/troubleshooting.md"
    lines = [line.strip("-` ") for line in page.splitlines() if line.startswith("- ``")]
    assert len(lines) > 70
    assert "sampler.guidance_scale=<value>: the model is not class-conditional" in lines  # of a variable with two texts
    assert "no model in <path>: train one first (stage=train) or name a file" in lines


def test_no_function_takes_many_arguments():
    many = []
    for module, path in architecture.files().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                names = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)} - {"self", "cls"}
                if len(names) > MOST_ARGUMENTS:
                    many.append(f"{module}.{getattr(node, 'name', 'lambda')}")
    assert many == ["modeling.diffusion.unet.__init__"]  # of UNet


@pytest.mark.parametrize("name", REGISTRIES)
def test_registry_settings_and_conf_have_the_same_choices(name):
    schema = GROUPS[name]
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "conf" / name).glob("*.yaml")}
    # A file without the key is a variant of the choice that its defaults name.
    chosen = {stem: content.get(schema.key) or content["defaults"][0] for stem, content in files.items()}
    assert REGISTRIES[name].keys() == schema.choices.keys() == {*chosen.values()} <= chosen.keys()
    for stem, choice in chosen.items():
        assert type(group(name, stem)) is schema.choices[choice]


def test_settings_allow_the_spacings_of_the_registry():
    (key,) = (f for f in fields(GROUPS["sampler"].base) if f.name == "spacing")
    assert key.metadata["allowed"] == f"allowed are {', '.join(SPACINGS)}"


def test_every_group_has_a_folder_of_conf():
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert folders == {*GROUPS, "experiment", "shared"}
    assert {path.stem for path in (ROOT / "conf/shared").iterdir()} <= GROUPS.keys()
