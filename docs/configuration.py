"""Prints docs/configuration.md from conf/ and its comments: python docs/configuration.py > docs/configuration.md"""

import re
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Python puts the folder of a script there alone

from modeling.recipe import CONF, composed
from modeling.settings.groups import GROUPS, TopConfig

ROOT = Path(__file__).parents[1]
KINDS = {bool: "true, false", bool | None: "true, false, null"}
HEAD = """# Configuration

Every key, made by `docs/configuration.py` from `conf/`, its comments, and the ranges of
`modeling/settings/groups.py`. On the command line a key is `group.key=value` and a choice `group=choice`, behind `-S`
for `dvc exp run`. Where the choices of a group differ, each is named. `python main.py --cfg job experiment=demo`
prints what a command composes to.
"""


def comments(*paths: Path) -> dict[str, str]:
    """The comment of each key; different ones of several files, each after the file's name."""
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            if match := re.fullmatch(r"(\w+): [^#]* # (.*)", line):
                found.setdefault(match[1], {}).setdefault(match[2], path.stem)
    for texts in found.values():
        for text in [text for text in texts if any(text != other and text in other for other in texts)]:
            del texts[text]
    alone = {key: next(iter(texts)) for key, texts in found.items() if len(texts) == 1}
    return {key: "; ".join(f"{stem}: {text}" for text, stem in texts.items()) for key, texts in found.items()} | alone


def head(path: Path) -> str:
    """The comment above all keys."""
    lines = re.match(r"(?:# @package _global_\n)?((?:#.*\n)*)", path.read_text())
    return " ".join(line.lstrip("# ") for line in lines[1].splitlines()) if lines else ""


def shown(value: object) -> str:
    """A value as one types it."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def default(values: dict[str, str]) -> str:
    """The value of each choice as one cell; choices of the same value together."""
    if len(values) == 1 or len({*values.values()}) > 1:
        same: dict[str, list[str]] = {}
        for choice, value in values.items():
            same.setdefault(value, []).append(choice)
        return "; ".join(f"`{value}` ({', '.join(choices)})" for value, choices in same.items())
    return f"`{next(iter(values.values()))}`"


def table(rows: list[tuple[str, ...]], *names: str) -> list[str]:
    """Lines of Markdown; `|` in a cell is escaped."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in [list(names), ["---" for _ in names], *cells])]


def allowed(group: str) -> dict[str, str]:
    """What each key of a group, or of none, may be; different ranges of several choices, each after the choice."""
    schemas = {"": TopConfig} if not group else GROUPS[group].choices or {"": GROUPS[group].base}
    found: dict[str, dict[str, str]] = {}
    for choice, schema in schemas.items():
        for f in fields(schema):
            bound = re.sub("^(allowed are|must be|must lie|must) ", "", f.metadata.get("allowed", ""))
            found.setdefault(f.name, {}).setdefault(bound or KINDS.get(f.type, ""), choice)
    return {
        key: "; ".join(f"{choice}: {bound}" if len(bounds) > 1 else bound for bound, choice in bounds.items())
        for key, bounds in found.items()
    }


def keys_of(group: str) -> dict[str, tuple[str, str, str]]:
    """Of each key of a group, or of none: its default, what it may be, and what it is."""
    if group:
        paths = sorted((CONF / group).glob("*.yaml"), key=lambda path: (path.stem != shipped(group), path.stem))
        said = comments(*(CONF / "shared").glob(f"{group}.yaml"), *paths)
        prefix = f"{group}."
        of_choice = {path.stem: composed(f"{group}={path.stem}") for path in paths}
    else:
        said, prefix, of_choice = comments(CONF / "config.yaml"), "", {"": composed()}
        # What says what to run and where is in no recipe.
        of_choice[""] = {"stage": "all", "out_dir": None} | of_choice[""]
    ranges, found = allowed(group), {}
    for key in dict.fromkeys(key for values in of_choice.values() for key in values if key.startswith(prefix)):
        name = key.removeprefix(prefix)
        if "." in name or (group and name == GROUPS[group].key):
            continue
        values = {choice: shown(each[key]) for choice, each in of_choice.items() if key in each}
        everywhere = len(values) == len(of_choice)
        cell = f"`{values.popitem()[1]}`" if everywhere and len({*values.values()}) == 1 else default(values)
        found[name] = cell, ranges[name], said.get(name, "")
    return found


def shipped(group: str) -> str:
    """The choice that conf/config.yaml makes."""
    found = re.search(rf"^  - {group}: (\w+)", (CONF / "config.yaml").read_text(), re.M)
    assert found, group
    return found[1]


def page() -> str:
    """The text of docs/configuration.md."""
    lines = [HEAD.rstrip(), "", "## Keys of no group"]
    lines += table(
        [(f"`{key}`", *about) for key, about in keys_of("").items()], "key", "default", "allowed", "what it is"
    )
    for group, schema in GROUPS.items():
        lines += ["", f"## `{group}`"]
        paths = sorted((CONF / group).glob("*.yaml"), key=lambda path: (path.stem != shipped(group), path.stem))
        if len(paths) > 1:
            about = [(path, head(path), comments(path).get(schema.key, "")) for path in paths]
            rows = [
                (
                    f"`{group}={path.stem}`{' (default)' if path == paths[0] else ''}",
                    " ".join(part for part in said if part),
                )
                for path, *said in about
            ]
            lines += table(rows, "choice", "what it is")
        lines += table(
            [(f"`{group}.{key}`", *about) for key, about in keys_of(group).items()],
            "key",
            "default",
            "allowed",
            "what it is",
        )
    lines += [
        "",
        "## `experiment`",
        "",
        "A recipe: choices and values of several groups at once; what is typed beside it wins.",
    ]
    rows = [(f"`experiment={path.stem}`", head(path)) for path in sorted((CONF / "experiment").glob("*.yaml"))]
    lines += table(rows, "choice", "what it is")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
