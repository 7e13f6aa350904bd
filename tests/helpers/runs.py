"""Training runs of the real command line that finish in seconds, and what they leave on the disk."""

import csv
import hashlib

from safetensors.torch import load_file

from helpers.once import once
from helpers.pipeline import TINY, main
from helpers.processes import Launched
from modeling.checkpoints.checkpoint import step_of

# Every kind of work in few steps, each at its own interval.
RECIPE = [
    *TINY,
    "model.model_channels=8",
    "model.channel_mult=[1,2]",
    "model.attention_resolutions=[4]",
    "model.dropout=0.1",
    "optimizer.warmup_steps=10",
    "optimizer.lr=1e-3",
    "precision=fp32",  # on a CPU faster than bf16 for so small a network
    "trainer.steps=40",
    "trainer.log_every=5",
    "trainer.evaluate_every=10",
    "trainer.sample_every=20",
    "trainer.sample_steps=20",
    "trainer.checkpoint_every=7",
]


def launch(folder, *changes, stage="train", recipe=RECIPE, limits=None, out="out", **environment):
    """A process of main.py with its output in `folder`/`out` and, unless DVC_ROOT is given, its state in root/.

    `out` None: where a plain run writes by itself.
    """
    place = [] if out is None else [f"out_dir={folder / out}"]
    arguments = [*recipe, f"stage={stage}", *place, *changes]
    return Launched(folder, arguments, folder, environment, limits)


def finish(folder, *changes, code=0, **options):
    """Launches a process and checks its exit code; gives all that it printed, or its one line if it failed."""
    run = launch(folder, *changes, **options)
    assert run.end() == code, run.printed()
    return run.printed() if code == 0 else run.last_line()


def plain_run(tmp_path_factory):
    """A folder with all of one small plain run of all stages: its state, its outputs in out/, what it printed."""

    def make(folder):
        done = main(folder / "state", folder, *TINY, f"out_dir={folder / 'out'}")
        assert done.returncode == 0, done.stderr
        (folder / "printed").write_text(done.stdout)

    return once(tmp_path_factory, "plain", make)


def run_folder(folder, root="root"):
    """The folder of the only run."""
    (found,) = (path for path in (folder / root / "runs").iterdir() if path.name not in ("data", "samples"))
    return found


def saved_step(folder, root="root"):
    """The newest checkpoint's step; 0 if there is none."""
    return max(map(step_of, (folder / root / "runs").glob("*/step-*.pt")), default=0)


def curves(out):
    """The published series: the value at each step, by name."""
    found = {}
    for path in (out / "reports/curves").iterdir():
        with path.open() as file:
            found[path.stem] = {int(row["step"]): float(row[path.stem]) for row in csv.DictReader(file)}
    return found


def hashes(out):
    """The hash of each published file that is the same in equal runs."""
    timed = ("train.json", "train-details.json")
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in timed and not p.name.startswith(".")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def weights(out):
    """The bytes of each tensor of the published model."""
    tensors = load_file(out / "models/model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
