"""What a command imports: PyTorch alone takes seconds; what needs no network does without. No test of time."""

import json
import subprocess
import sys

import pytest
from helpers.pipeline import ROOT

HEAVY = {"torch", "torchvision", "wandb", "matplotlib", "dvc", "tqdm", "psutil"}


CODES = {
    "--help": 0,
    "--cfg job": 0,
    "model.no_such_key=1": 2,
    "trainer.steps=0": 2,
    "optimizer.lr=fast": 2,
    "stage=report out_dir=.": 1,
    "stage=nothing": 2,
}
EACH = """
import json, os, runpy, sys
import hydra  # what all of them import
main, *commands = sys.argv[1:]
sys.path[0] = os.path.dirname(main)
for k, command in enumerate(commands):
    if os.fork() == 0:
        sys.argv, code = [main, *command.split()], None
        try:
            runpy.run_path(main, run_name="__main__")
        except SystemExit as end:
            code = end.code
        with open(f"{k}.json", "w") as file:
            json.dump([code or 0, [*{name.split(".")[0] for name in sys.modules}]], file)
        os._exit(0)
    os.wait()
"""


def test_what_needs_no_network_imports_none(tmp_path):
    command = [sys.executable, "-c", EACH, str(ROOT / "main.py"), *CODES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    for k, (arguments, code) in enumerate(CODES.items()):
        found, imported = json.loads((tmp_path / f"{k}.json").read_text())
        assert (found, HEAVY & {*imported}) == (code, set()), f"{arguments}: {done.stderr}"
        assert "modeling" in imported


@pytest.mark.no_cover
def test_the_mark_no_cover_stops_all_of_coverage():
    assert sys.gettrace() is None


def test_the_package_imports_its_python_interface_on_first_use():
    code = "import sys, modeling; print('torch' in sys.modules, 'load_model' in dir(modeling)); modeling.load_model"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]


def test_stages_import_what_takes_long_when_they_need_it_and_ask_no_device():
    """Plots, W&B and the compiler; and CUDA would not work in the processes that the launcher forks."""
    code = "import sys, torch; asked = []; torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0"
    code += "; import modeling.stages.evaluate; print('torch._dynamo' in sys.modules)"
    code += "; import modeling.stages.train, modeling.stages.sample; print({'matplotlib', 'wandb'} & {*sys.modules})"
    code += "; print(asked); torch.cuda.is_available(); print(len(asked))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *found, asked = done.stdout.split()
    assert found == ["False", "set()", "[]"] and asked in "10"  # 0: a PyTorch without CUDA
