"""What a command imports: PyTorch alone takes seconds; what needs no network does without. No test of time."""

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
}


@pytest.mark.parametrize(("arguments", "code"), [*CODES.items(), ("stage=nothing", 2)])
def test_what_needs_no_network_imports_none(tmp_path, arguments, code):
    command = [sys.executable, "-X", "importtime", str(ROOT / "main.py"), *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "hydra" in imported and not imported & HEAVY


def test_the_package_imports_its_python_interface_on_first_use():
    code = "import sys, modeling; print('torch' in sys.modules, 'load_model' in dir(modeling)); modeling.load_model"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]


def test_stages_import_plots_wandb_and_the_compiler_when_they_need_them():
    code = "import sys, modeling.stages.evaluate; print('torch' in sys.modules, 'torch._dynamo' in sys.modules)"
    code += "; import modeling.stages.train; print({'matplotlib', 'wandb'} & {*sys.modules} != set())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_imports_ask_no_device():
    """Else CUDA would not work in the processes that the launcher forks."""
    code = "import torch; asked = []; torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0"
    code += "; import modeling.stages.train, modeling.stages.sample, modeling.stages.evaluate; print(asked)"
    code += "; torch.cuda.is_available(); print(len(asked))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["[]", "1"], ["[]", "0"])  # 0: a PyTorch without CUDA
