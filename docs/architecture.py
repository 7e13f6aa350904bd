"""Prints docs/architecture.md from the imports and docstrings: python docs/architecture.py > docs/architecture.md"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODELING = ROOT / "modeling"
HEAD = """# The packages of modeling/

Each package, or module beside them, has one idea. An arrow goes from a package to those that it imports; an arrow that
others imply is left out. `main.py` loads a stage by its name, so that `--help` needs no torch.
`tests/test_architecture.py` checks who may import whom, and that this page is what `docs/architecture.py` prints.
"""


@cache
def files() -> dict[str, Path]:
    """Every module of the project with its file."""
    found = {"main": ROOT / "main.py"}
    for path in sorted(MODELING.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str) -> dict[str, set[str]]:
    """The modules of the project that a module imports, anywhere in its file, and the names from each."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(files()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: set() for alias in node.names if alias.name in files()}
        elif isinstance(node, ast.ImportFrom) and node.module in files():
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                source, names = (inner, set()) if inner in files() else (node.module, {alias.name})
                found.setdefault(source, set()).update(names)
    return found


def package_of(module: str) -> str:
    """`data` for `modeling.data.sources`; a module outside modeling/ is its own."""
    return module.removeprefix("modeling.").split(".")[0]


def graph() -> dict[str, set[str]]:
    """The packages that each package imports."""
    found: dict[str, set[str]] = {}
    for module in files().keys() - {"modeling"}:
        package = package_of(module)
        found.setdefault(package, set()).update({package_of(target) for target in imports(module)} - {package})
    return found


def _below(package: str, packages: dict[str, set[str]]) -> set[str]:
    return packages[package].union(*(_below(target, packages) for target in packages[package]))


def page() -> str:
    """The text of docs/architecture.md."""
    packages = graph()
    order = sorted(packages, key=lambda p: (p != "main", -len(_below(p, packages)), p))  # from top to bottom
    lines = [HEAD, "```mermaid", "graph TD"]
    for package in order:
        implied = set().union(*(_below(target, packages) for target in packages[package]))
        lines += [f"  {package} --> {target}" for target in order if target in packages[package] - implied]
    lines += ["```", "", "| package | what it is | modules | imports |", "|---|---|---|---|"]
    for package in order:
        own = [path for module, path in files().items() if package_of(module) == package]
        sentence = re.split(r"(?<=\.)\s", ast.get_docstring(ast.parse(own[0].read_text())) or "")[0]
        modules = ", ".join(path.stem for path in own[1:])
        name = f"`{package}/`" if modules else f"`{own[0].name}`"
        lines.append(f"| {name} | {sentence} | {modules} | {', '.join(t for t in order if t in packages[package])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
