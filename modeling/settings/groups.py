"""Every key of the configuration: its type, its range, and what it affects. Defaults are in conf/; checks in config.py.

A group whose keys depend on a choice has a base class for the common keys and a subclass for each choice that has keys
of its own. Imports no torch, so that main.py starts fast.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from modeling.settings.keys import Group, at_least, fraction, not_negative, one_of, positive, setting

MAX_TIMESTEPS = 1_000_000  # T: more would not fit into the memory of a small machine
BETA_MIN = 1e-8  # below it, the first step would add no noise that a float could tell from none
COLOURS = ("white", "grey", "black")
STAGES = ("all", "check", "validate", "watch", "prepare", "train", "sample", "evaluate", "report", "export")


def _is_colour(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 3
    return value in COLOURS or (numbers and all(type(v) is int and 0 <= v <= 255 for v in value))


@dataclass(kw_only=True)
class DataConfig(Group):
    name: str
    # For dvc.yaml alone; with defaults, since older model files do not have them.
    watch: list[str] = field(default_factory=list, metadata={"affects": "nothing"})
    after: str = field(default="validated", metadata={"affects": "nothing"})


@dataclass(kw_only=True)
class ShapesConfig(DataConfig):
    num_train: int = positive()
    num_test: int = positive()
    image_size: int = setting(lambda v: v >= 8, "must be at least 8 pixels")
    seed: int = not_negative()


@dataclass(kw_only=True)
class FolderConfig(DataConfig):
    path: str = setting(lambda v: v != "", "must be the folder of your images")
    test_fraction: float = setting(lambda v: 0 < v < 1, "must lie in (0, 1)")
    image_size: int | None = at_least(8, "for images of one size")
    channels: int = setting(lambda v: v in (1, 3), "allowed are 1 and 3")
    background: Any = setting(_is_colour, f"allowed are {', '.join(COLOURS)}, or [red, green, blue], each 0 to 255")
    skip_unreadable: bool


@dataclass(kw_only=True)
class MNISTConfig(DataConfig):
    image_size: int = setting(
        lambda v: v >= 28 and v % 2 == 0, "must be even, and at least the 28 pixels of the images"
    )


@dataclass(kw_only=True)
class ModelConfig(Group):
    name: str = setting(affects="nothing")
    patch_size: int = positive(before=1)
    model_channels: int = setting(lambda v: v >= 4 and v % 2 == 0, "must be even")
    channel_mult: list[int] = setting(lambda v: len(v) > 0 and min(v) > 0, "must be positive")
    num_res_blocks: int = positive()
    attention_resolutions: list[int]
    num_heads: int = positive()
    dropout: float = fraction()
    norm_groups: int = positive()
    scale_shift: bool = setting(before=False)
    class_conditional: bool
    weights: str | None = setting(affects="nothing")

    def fits(self, config: "Config") -> Iterable[tuple[bool, str, str]]:
        divides = self.model_channels % self.norm_groups == 0
        yield divides, "norm_groups", f"must divide model.model_channels={self.model_channels}"
        heads_fit = all(mult * self.model_channels % self.num_heads == 0 for mult in self.channel_mult)
        yield heads_fit, "num_heads", "must divide the channels at every resolution"


@dataclass(kw_only=True)
class DiffusionConfig(Group):
    schedule: str
    num_timesteps: int = setting(lambda v: 1 <= v <= MAX_TIMESTEPS, f"allowed are 1 to {MAX_TIMESTEPS}")
    prediction_type: str = one_of("epsilon", "sample", "v_prediction")
    variance: str = one_of("fixed_large", "fixed_small", "learned")
    min_snr_gamma: float | None = setting(lambda v: v is None or v > 0, "must be above 0, or null for the simple loss")


@dataclass(kw_only=True)
class LinearConfig(DiffusionConfig):
    beta_start: float = setting(lambda v: BETA_MIN <= v < 1, f"must lie in [{BETA_MIN}, 1)")
    beta_end: float = setting(lambda v: 0 < v < 1, "must lie in (0, 1)")

    def fits(self, config: "Config") -> Iterable[tuple[bool, str, str]]:
        yield self.beta_start < self.beta_end, "beta_start", f"must be below beta_end={self.beta_end}"


@dataclass(kw_only=True)
class LinearScaledConfig(LinearConfig):
    def fits(self, config: "Config") -> Iterable[tuple[bool, str, str]]:
        yield from super().fits(config)
        least = math.floor(1000 * self.beta_end) + 1
        yield self.num_timesteps >= least, "num_timesteps", f"must be at least {least} for beta_end={self.beta_end}"


@dataclass(kw_only=True)
class SigmoidConfig(DiffusionConfig):
    start: float
    end: float
    tau: float = positive()

    def fits(self, config: "Config") -> Iterable[tuple[bool, str, str]]:
        yield self.start < self.end, "start", f"must be below end={self.end}"


@dataclass(kw_only=True)
class TabulatedConfig(DiffusionConfig):
    betas: list[float]


@dataclass(kw_only=True)
class OptimizerConfig(Group):
    name: str
    lr: float = positive()
    warmup_steps: int = not_negative()
    lr_decay: str = one_of("none", "cosine", "linear")
    grad_clip: float | None = setting(lambda v: v is None or v > 0, "must be above 0, or null")


@dataclass(kw_only=True)
class AdamConfig(OptimizerConfig):
    betas: list[float] = setting(lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "must be two numbers in [0, 1)")
    eps: float = positive()


@dataclass(kw_only=True)
class AdamWConfig(AdamConfig):
    weight_decay: float = not_negative()


@dataclass(kw_only=True)
class MuonConfig(AdamConfig):
    momentum: float = fraction()


@dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    momentum: float = fraction()
    weight_decay: float = not_negative()


@dataclass(kw_only=True)
class TrainerConfig(Group):
    steps: int = positive(affects="outputs")
    batch_size: int = positive()
    ema_decay: float = fraction()
    random_flip: bool
    timestep_sampling: str = one_of("uniform", "stratified")
    label_dropout: float = fraction()
    guide_at: float | None = setting(lambda v: v is None or 0 < v < 1, "must lie in (0, 1), or null for no guide")
    log_every: int = positive(affects="outputs")
    evaluate_every: int = positive(affects="outputs")
    evaluate_images: int = positive(affects="outputs")
    sample_every: int = positive(affects="outputs")
    sample_images: int = positive(affects="outputs")
    sample_steps: int = setting(affects="outputs")
    checkpoint_every: int = positive(affects="nothing")
    checkpoint_minutes: float = positive(affects="nothing")
    compile: bool | None = setting(affects="nothing")
    micro_batch_size: int | None = at_least(1, "for the batch", "nothing")
    nproc: int = positive(affects="nothing")
    resume: str = setting(affects="outputs")

    def fits(self, config: "Config") -> Iterable[tuple[bool, str, str]]:
        yield _steps_fit(self.sample_steps, "sample_steps", config)
        labels = config.model.class_conditional or self.label_dropout == 0
        yield labels, "label_dropout", "needs model.class_conditional=true"


@dataclass(kw_only=True)
class SamplerConfig(Group):
    name: str
    steps: int
    spacing: str = one_of("uniform", "quadratic", "log_snr", "karras")
    clip_denoised: bool
    num_samples: int = positive()
    batch_size: int = positive()
    seed: int = not_negative()
    guidance_scale: float = not_negative()
    autoguidance_scale: float = not_negative()
    label: str | None
    compile: bool

    def method(self) -> dict[str, Any]:
        """How an image is drawn, and not which, how many and how fast: what a model file remembers."""
        others = ("num_samples", "batch_size", "seed", "label", "compile")
        return {key: value for key, value in vars(self).items() if key not in others}

    def evaluations(self) -> int:
        """Of networks, an image: a step takes one, and one more for each kind of guidance."""
        return self.steps * (1 + (self.guidance_scale != 1) + (self.autoguidance_scale != 1))

    def caption(self) -> str:
        """What people read about it beside samples."""
        spacing = "" if self.spacing == "uniform" else f"{self.spacing} "
        guidance = "" if self.guidance_scale == 1 else f", guidance {self.guidance_scale:g}"
        guidance += "" if self.autoguidance_scale == 1 else f", autoguidance {self.autoguidance_scale:g}"
        label = "" if self.label is None else f", {self.label}"
        return f"{self.name}, {self.steps} {spacing}steps{guidance}{label}, seed {self.seed}"

    def fits(self, config: "Config") -> Iterable[tuple[bool, str, str]]:
        yield _steps_fit(self.steps, "steps", config)


@dataclass(kw_only=True)
class DDIMConfig(SamplerConfig):
    eta: float = setting(lambda v: 0 <= v <= 1, "must lie in [0, 1]")


def _steps_fit(steps: int, key: str, config: "Config") -> tuple[bool, str, str]:
    most = config.diffusion.num_timesteps
    return 1 <= steps <= most, key, f"allowed are 1 to {most}, diffusion.num_timesteps"


@dataclass(kw_only=True)
class EvaluationConfig(Group):
    batch_size: int = positive()
    num_samples: int = setting(lambda v: v >= 4, "must be at least 4")
    bpd_images: int | None = at_least(2, "for all")
    bpd_timesteps: int | None = at_least(1, "for all")
    fid_samples: int | None = at_least(10, "to leave FID out")
    inception_weights: str | None
    inception_sha256: str = setting(
        lambda v: bool(re.fullmatch("[0-9a-f]{8,64}", v)), "must be 8 to 64 hexadecimal digits"
    )


@dataclass(kw_only=True)
class WandbConfig(Group):
    mode: str = one_of("online", "offline", "disabled")
    project: str
    entity: str | None
    timeout: float = positive()


@dataclass(kw_only=True)
class TopConfig(Group):
    """The keys that are in no group."""

    stage: str = one_of(*STAGES)
    out_dir: str | None
    seed: int = not_negative()
    device: str = one_of("auto", "cpu", "cuda", "mps")
    precision: str = one_of("auto", "bf16", "fp32")
    deterministic: bool
    threads: int | None = at_least(1, "for one for each core that may be used", "nothing")


@dataclass(kw_only=True)
class Config(TopConfig):
    """The whole configuration of a command."""

    data: DataConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    sampler: SamplerConfig
    evaluation: EvaluationConfig
    wandb: WandbConfig
    named: frozenset[str] = frozenset()
    """Groups and keys that the user typed."""

    def ends_matter(self) -> bool:
        """Whether the number of steps changes the steps before the last: then a longer run is another one."""
        return self.optimizer.lr_decay != "none" or self.trainer.guide_at is not None

    def names(self, group: str) -> bool:
        """Whether the user asked for something in a group, so that a model file must agree with it."""
        typed = any(key.split(".")[0] == group and key != "model.weights" for key in self.named)
        return typed or "experiment" in self.named


@dataclass(frozen=True)
class Schema:
    """The dataclass of a group; with choices: the key that chooses, and the dataclass of each choice."""

    base: type[Group]
    key: str = "name"
    choices: dict[str, type[Group]] = field(default_factory=dict)


GROUPS = {
    "data": Schema(
        DataConfig,
        choices={
            "cifar10": DataConfig,
            "cifar100": DataConfig,
            "fashion_mnist": MNISTConfig,
            "folder": FolderConfig,
            "mnist": MNISTConfig,
            "shapes": ShapesConfig,
            "svhn": DataConfig,
        },
    ),
    "model": Schema(ModelConfig),
    "diffusion": Schema(
        DiffusionConfig,
        "schedule",
        {
            "linear": LinearConfig,
            "linear_scaled": LinearScaledConfig,
            "cosine": DiffusionConfig,
            "sigmoid": SigmoidConfig,
            "tabulated": TabulatedConfig,
        },
    ),
    "optimizer": Schema(
        OptimizerConfig,
        choices={
            "adam": AdamConfig,
            "adamw": AdamWConfig,
            "muon": MuonConfig,
            "sgd": SGDConfig,
        },
    ),
    "trainer": Schema(TrainerConfig),
    "sampler": Schema(
        SamplerConfig,
        choices={
            "ddpm": SamplerConfig,
            "ddim": DDIMConfig,
            "dpm_solver": SamplerConfig,
            "unipc": SamplerConfig,
        },
    ),
    "evaluation": Schema(EvaluationConfig),
    "wandb": Schema(WandbConfig),
}


# Keys that older model files do not have, with what was done then.
_ADDED = {"folder": {"image_size": None, "channels": 3, "background": "white", "skip_unreadable": False}}


def parse_group(group: str, values: dict[str, Any]) -> Any:
    """The dataclass of a group from the plain values that a model file holds."""
    schema = GROUPS[group]
    if not schema.choices:
        return schema.base(**values)
    choice = values[schema.key]
    return schema.choices[choice](**{**_ADDED.get(choice, {}), **values})
