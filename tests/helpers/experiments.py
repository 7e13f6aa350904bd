"""What DVC says of experiments."""

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
