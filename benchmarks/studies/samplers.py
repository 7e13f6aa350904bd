"""How near the samplers come to the solution of the ODE: `python -m benchmarks.studies.samplers out_dir=.`

For every sampler that solves the ODE, spacing and number of steps: the root mean square difference from the solution
from the same noise, over all pixels, in levels of 0 to 255. Once on trained models, whose solution is DDIM with all
their time steps, and once on data whose solution is exact (benchmarks/mixture.py). --models takes files, separated by
commas, in place of the model of out_dir; --guidance are the scales for class-conditional models. A step is an
evaluation of the network (NFE), with guidance two.
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.command import figure, run_study
from benchmarks.machine import describe
from benchmarks.mixture import Mixture
from benchmarks.project import RESULTS, compute_of, configure
from modeling.diffusion.model import DiffusionModel
from modeling.diffusion.samplers import SAMPLERS, SPACINGS, Predict, timestep_subsequence
from modeling.diffusion.schedule import NoiseSchedule, cosine_betas, linear_betas
from modeling.inference.samples import SampleNoise
from modeling.reliability.terminal import counted
from modeling.settings.groups import Config
from modeling.stages.sample import load_for

SOLVERS = ("ddim", "dpm_solver", "unipc")  # DDPM draws noise on its way and has no such solution
SCHEDULES = {"linear": linear_betas(1000, 1e-4, 0.02), "cosine": cosine_betas(1000)}
FIRST = 1_000_000  # number of the first sample: none of them is one that the reports show


class Problem(NamedTuple):
    """What is solved, and the solution, both from the same noise."""

    title: str
    predict: Predict
    noise: Tensor
    alphas_cumprod: Tensor
    solution: Tensor

    def solve(self, sampler: str, spacing: str, steps: int) -> Tensor:
        """What a sampler makes of the noise."""
        timesteps = timestep_subsequence(self.alphas_cumprod, steps, spacing)
        return SAMPLERS[sampler](self.predict, self.noise, timesteps, self.alphas_cumprod, lambda: self.noise)

    def error(self, sampler: str, spacing: str, steps: int) -> float:
        """The distance from the solution, in levels."""
        off = self.solve(sampler, spacing, steps).double() - self.solution.double()
        return off.square().mean().sqrt().item() * 127.5


def mixture_problem(name: str, pixels: int = 1024) -> Problem:
    """The best possible model of the mixture, and the exact solution."""
    schedule, mixture = NoiseSchedule(SCHEDULES[name]), Mixture()
    abar = schedule.alphas_cumprod

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        return mixture.denoise(x_t, abar[t].reshape(-1, 1, 1, 1))

    model: Any = DiffusionModel(network, schedule, "sample")  # type: ignore[arg-type]  # no weights
    x_T = torch.randn(1, 1, 1, pixels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = mixture.solution(x_T, abar[-1], torch.ones(()))
    return Problem(f"mixture, {name}", partial(model.predict, clip_denoised=False), x_T, abar, solution)


def trained_problems(config: Config, images: int, guidance: list[float]) -> Iterator[Problem]:
    """A trained model under each guidance that it can take."""
    compute = compute_of(config)
    model, meta, _ = load_for(config, Path(config.out_dir or "."))
    model = compute.place_model(model)
    diffusion = meta["config"]["diffusion"]
    indices = range(FIRST, FIRST + images)
    x_T = SampleNoise(0, indices, meta["image_shape"], compute.device)()
    labels = torch.tensor(indices, device=compute.device) % model.num_classes if model.num_classes else None
    for scale in guidance if model.num_classes else [1.0]:

        def predict(x_t: Tensor, t: Tensor, scale: float = scale) -> Any:
            with compute.autocast():
                return model.predict(x_t, t, y=labels, guidance_scale=scale)

        parts = [meta["config"].get("data", {}).get("name", "model"), diffusion["schedule"]]
        parts += [diffusion["prediction_type"], *([f"guidance {scale:g}"] if labels is not None else [])]
        title = ", ".join(parts)
        problem = Problem(title, predict, x_T, model.schedule.alphas_cumprod, x_T)
        yield problem._replace(solution=problem.solve("ddim", "uniform", model.schedule.num_timesteps))


def compare(overrides: list[str], images: int, steps: str, guidance: str, models: str) -> dict[str, Any]:
    """Solves every problem by every sampler, spacing and number of steps."""
    named = [[f"model.weights={path}"] for path in models.split(",")] if models else [[]]
    configs = [configure(*overrides, *more) for more in named]
    scales = [float(scale) for scale in guidance.split(",")]
    trained = itertools.chain.from_iterable(trained_problems(config, images, scales) for config in configs)
    found = []
    for problem in itertools.chain(trained, map(mixture_problem, SCHEDULES)):
        ways = [*itertools.product(SOLVERS, SPACINGS)]
        errors = {}
        for sampler, spacing in counted(problem.title, ways, "ways"):
            counts = [n for n in map(int, steps.split(",")) if n <= len(problem.alphas_cumprod)]
            errors[f"{sampler}, {spacing}"] = {n: problem.error(sampler, spacing, n) for n in counts}
        found.append({"problem": problem.title, "levels": errors})
    return {"images": images, "seed": 0, "found": found, "machine": describe(compute_of(configs[0]).device)}


def tables(found: dict[str, Any]) -> str:
    """A table in Markdown of each problem, the least error of each column in bold."""
    lines = []
    for each in found["found"]:
        rows = each["levels"]
        counts = list(next(iter(rows.values())))
        lines += [f"\n{each['problem']}:\n", f"| sampler, spacing | {' | '.join(map(str, counts))} |"]
        lines += ["|---" * (len(counts) + 1) + "|"]
        least = {n: min(errors[n] for errors in rows.values()) for n in counts}
        for way, errors in rows.items():
            cells = [f"**{errors[n]:.2f}**" if errors[n] == least[n] else f"{errors[n]:.2f}" for n in counts]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Error against NFE, one picture for each problem: colours are samplers, line styles spacings."""
    rows = math.ceil(len(found["found"]) / 3)
    with figure(path, 15, 4.5 * rows, rows=rows, columns=3, squeeze=False) as grid:
        styles = dict(zip(SPACINGS, (":", "--", "-", "-."), strict=True))
        for axes in grid.flat[len(found["found"]) :]:
            axes.remove()
        for axes, each in zip(grid.flat, found["found"], strict=False):
            for way, errors in each["levels"].items():
                sampler, spacing = way.split(", ")
                look: dict[str, Any] = {"color": f"C{SOLVERS.index(sampler)}", "linestyle": styles[spacing]}
                axes.plot([*errors], [*errors.values()], marker=".", label=way, **look)
            axes.set(xscale="log", yscale="log", title=each["problem"], xlabel="steps (NFE; with guidance twice)")
            axes.set_xticks([*errors], [*map(str, errors)])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[0, 0].set_ylabel("RMS difference from the ODE's solution, levels of 255")
        handles, ways = grid[0, 0].get_legend_handles_labels()
        grid[0, 0].figure.legend(handles, ways, loc="outside lower center", ncols=len(SPACINGS))


options: dict[str, Any] = {"images": 8, "steps": "5,8,10,15,20,25,50", "guidance": "1", "models": ""}
main = partial(run_study, compare, plot, tables, out=RESULTS / "samplers", **options)

if __name__ == "__main__":
    main()
