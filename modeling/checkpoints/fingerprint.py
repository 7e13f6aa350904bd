"""Fingerprints: names for a training run by all that determines its result, the code included."""

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that depend on plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(*entries: str) -> str:
    """SHA-256 over the files that modules of the package import."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in imported_files(*entries))).hexdigest()


def imported_files(*entries: str, package: Path = PACKAGE) -> list[Path]:
    """The package's files that modules such as "training.trainer" import, directly or not, and their own; sorted."""
    found: set[Path] = set()
    queue = [entry.split(".") for entry in entries]
    while queue:
        name = queue.pop()
        around = [package.joinpath(*name[:k]) / "__init__.py" for k in range(len(name) + 1)]
        for path in {package.joinpath(*name).with_suffix(".py"), *around} - found:
            if not path.is_file():
                continue
            found.add(path)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
                    module = str(node.module).split(".")[1:]
                    queue += [[*module, alias.name] for alias in node.names]  # a module, or a name in one
                    queue.append(module)
    return sorted(found)
