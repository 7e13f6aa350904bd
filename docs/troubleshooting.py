"""Prints docs/troubleshooting.md from the code: python docs/troubleshooting.py > docs/troubleshooting.md"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAISED = {"UserError": 0, "ConfigError": 0, "ConnectionLost": 0, "Stopped": 0, "require": 3}  # where the text stands
HEAD = """# Troubleshooting

A command that cannot go on ends with one line, and says in it what to type; exit code 2 is a wrong key or value, 75 a
stop with all work saved, 1 anything else. A traceback is a bug. These are all such lines, made by
`docs/troubleshooting.py` from the code; `<...>` is filled in. What each key may be is in
[configuration.md](configuration.md), and a value outside it is refused as `<key>=<value>: must be ...` or
`allowed are ...`.

## Lines of other programs

| line | what to do |
|---|---|
| `Could not override '<key>'` of DVC | there is no such key: `python main.py <key>=1` names those there are |
| `Sweep overrides can't be used without '--queue'` of DVC | `dvc exp run --queue`, then `dvc queue start` |
| `Experiment conflicts with existing experiment` of DVC | another `--name`, or `--force` |
| `is busy, it is being blocked by` of DVC | wait for the other `dvc exp run`, or use `--queue` |
| `No file hash info found` of DVC | nothing: there are no outputs yet |
| `HEAD detached` of Git, after DVC was killed | `git switch main` |
"""
DOING = {  # by the beginning of the module's path: the first that fits
    "Configuring": (
        "config.py",
        "settings/",
        "recipe.py",
        "main.py",
        "build.py",
        "stages/validate",
        "reliability/errors",
    ),
    "Preparing data": ("data/", "stages/prepare"),
    "Training and resuming": ("training/", "stages/train", "stages/check", "checkpoints/checkpoint", "checkpoints/run"),
    "Sampling, evaluating and exporting": (
        "api.py",
        "checkpoints/model",
        "evaluation/",
        "stages/evaluate",
        "stages/sample",
        "stages/export",
        "interop/",
    ),
    "Comparing and reporting": ("commands/", "pages/", "stages/report", "reporting/"),
    "Using devices, processes, disks and signals": ("",),
}


def text_of(node: ast.AST) -> Iterator[str]:
    """The texts that an expression can be, with `<name>` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(next(text_of(part), "") for part in node.values)
    elif isinstance(node, ast.FormattedValue):
        simple = isinstance(node.value, ast.Name | ast.Attribute)
        yield f"<{ast.unparse(node.value).split('.')[-1] if simple else '...'}>"


def _names(nodes: list[ast.expr]) -> list[str]:
    return [node.id for node in nodes if isinstance(node, ast.Name)]


def messages(path: Path) -> Iterator[str]:
    """What a module may end a command with; where a variable holds the text, what is assigned to it."""
    tree = ast.parse(path.read_text())
    for scope in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        assigned = [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
        for node in ast.walk(scope):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name in RAISED and isinstance(node, ast.Call) and len(node.args) > RAISED[name]:
                said = node.args[RAISED[name]]
                if isinstance(said, ast.Name):
                    before = [
                        each for each in assigned if each.lineno < node.lineno and said.id in _names(each.targets)
                    ]
                    said = max(before, key=lambda each: each.lineno).value if before else said
                key = [*text_of(node.args[1]), "<key>"][0] + "=<value>: " if name == "require" else ""
                yield from (key + text for text in text_of(said))
        if scope.name in ("explain", "misfit", "no_such_key", "_how_to_quote"):  # their texts are lines of errors
            returned = [node.value for node in ast.walk(scope) if isinstance(node, ast.Return) and node.value]
            yield from (text for value in returned for text in text_of(value))


def page() -> str:
    """The text of docs/troubleshooting.md."""
    found: dict[str, list[str]] = {doing: [] for doing in DOING}
    for path in [ROOT / "main.py", *sorted((ROOT / "modeling").rglob("*.py"))]:
        name = path.relative_to(ROOT).as_posix().removeprefix("modeling/")
        doing = next(doing for doing, starts in DOING.items() if name.startswith(starts))
        found[doing] += [line for line in messages(path) if re.search(r"\w", re.sub("<.*?>", "", line))]
    lines = [HEAD.rstrip()]
    for doing, said in found.items():
        lines += ["", f"## {doing}", "", *(f"- `` {line} ``" for line in dict.fromkeys(said))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
