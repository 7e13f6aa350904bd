"""README.md and docs/: every test, file, link, command, key and choice that a page names exists."""

import ast
import re
from dataclasses import fields

import pytest
from helpers.pipeline import ROOT

from modeling.settings import GROUPS, STAGES

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = ("modeling", "tests", "conf", "docs", "benchmarks")
NO_KEYS = {"json", "safetensors", "py", "test"}  # data.json is no key of the group data
TESTS = {
    (path.name, node.name)
    for path in (ROOT / "tests").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}


def code(page):
    """What stands in backticks or in a fenced block, without the patches, which are no text of ours."""
    text = re.sub("^```diff\n.*?^```$", "", page.read_text(), flags=re.M | re.S)
    fenced = re.findall("^```\\w*\n(.*?)^```$", text, re.M | re.S)
    return [*fenced, *re.findall("`([^`\n]+)`", re.sub("^```.*?^```$", "", text, flags=re.M | re.S))]


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
    for name in re.findall(r"python -m ((?:benchmarks|modeling)[\w.]*)", span):
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
        if key not in keys | NO_KEYS:
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
