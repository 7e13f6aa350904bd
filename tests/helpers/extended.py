"""Runs what docs/extending.md adds, in a copy of the repository with its patches, and prints what came of it as JSON.

python extended.py <file.npz> <output folder>, in the copy, which is the first on PYTHONPATH. One process for all of it.
"""

import json
import math
import runpy
import sys
from pathlib import Path

import torch

from helpers.runs import curves
from modeling.build import build_schedule
from modeling.diffusion.model import Prediction
from modeling.diffusion.samplers import euler_sample, timestep_subsequence
from modeling.diffusion.schedule import NoiseSchedule, linear_betas, log_snr_betas
from modeling.interop.diffusers import load_diffusers
from modeling.settings.groups import parse_group


def main(*arguments):
    sys.argv = ["main.py", *arguments]
    runpy.run_path("main.py", run_name="__main__")


def euler(steps, variance):
    """What Euler's sampler makes of x_T = 1 for data from N(0, variance), and the exact solution of the ODE."""
    alphas_cumprod = NoiseSchedule(linear_betas(1000, 1e-4, 0.02)).alphas_cumprod

    def predict(x, t):
        a = alphas_cumprod[t].reshape(-1, 1, 1, 1)
        total = a * variance + 1 - a  # the variance of x_t
        return Prediction(a.sqrt() * variance * x / total, (1 - a).sqrt() * x / total, 0.0)

    x_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x_0 = euler_sample(predict, x_T, timestep_subsequence(alphas_cumprod, steps), alphas_cumprod, lambda: 1 / 0)
    first, last = (alphas_cumprod[[0, -1]] * (variance - 1) + 1).tolist()
    return x_0.item(), alphas_cumprod[0].item() ** 0.5 * variance / math.sqrt(first * last)


def run(npz, out):
    found = {"euler": [euler(steps, 0.25) for steps in (50, 100, 200)], "standard_normal": euler(10, 1.0)}
    typed = ["experiment=tiny", "data=npz", f"data.path={npz}"]
    typed += ["diffusion=log_snr", "sampler=euler", "trainer.ema_every=2", f"out_dir={out}"]
    for optimizer in ("adam", "radam"):
        for stage in ("prepare", "train"):
            main(*typed, f"optimizer={optimizer}", "optimizer.warmup_steps=0", f"stage={stage}")
        found[optimizer] = curves(out)
    for stage in ("evaluate", "export"):
        main(*typed, "optimizer=radam", f"stage={stage}")
    found["evaluate"] = json.loads((out / "reports/evaluate-details.json").read_text())
    found["ema_updates"] = [torch.load(path)["ema"]["num_updates"] for path in Path("runs").glob("*/step-*4.pt")]
    read = parse_group("diffusion", load_diffusers(out / "diffusers")[1]["config"]["diffusion"])
    found["exported"] = build_schedule(read).betas.tolist()
    found["betas"] = log_snr_betas(20, 13.3, -5.0).tolist()
    return found


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]))))
