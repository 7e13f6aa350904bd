"""The settings: one dataclass a group of the configuration. Plain data, known to every stage; checked in config.py."""

from dataclasses import dataclass, field

MAX_TIMESTEPS = 1_000_000  # T: more would not fit into the memory of a small machine
STAGES = ("all", "prepare", "train", "sample", "evaluate", "export")


@dataclass
class Cifar10Config:
    name: str


@dataclass
class ShapesConfig:
    name: str
    num_train: int
    num_test: int
    image_size: int
    seed: int


@dataclass
class FolderConfig:
    name: str
    path: str
    test_fraction: float


@dataclass
class ModelConfig:
    name: str
    model_channels: int
    channel_mult: list[int]
    num_res_blocks: int
    attention_resolutions: list[int]
    num_heads: int
    dropout: float
    norm_groups: int
    class_conditional: bool = False
    weights: str | None = None


@dataclass
class DiffusionConfig:
    schedule: str
    num_timesteps: int
    prediction_type: str
    variance: str
    min_snr_gamma: float | None = None


@dataclass
class LinearConfig(DiffusionConfig):
    beta_start: float = 1e-4
    beta_end: float = 0.02


@dataclass
class SigmoidConfig(DiffusionConfig):
    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0


@dataclass
class _OptimizerConfig:
    name: str
    lr: float
    warmup_steps: int
    lr_decay: str
    grad_clip: float | None


@dataclass
class AdamConfig(_OptimizerConfig):
    betas: list[float] = field(default_factory=list)
    eps: float = 1e-8


@dataclass
class AdamWConfig(AdamConfig):
    weight_decay: float = 0.0


@dataclass
class SGDConfig(_OptimizerConfig):
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass
class TrainerConfig:
    steps: int
    batch_size: int
    ema_decay: float
    random_flip: bool
    timestep_sampling: str
    label_dropout: float
    log_every: int
    evaluate_every: int
    evaluate_images: int
    sample_every: int
    sample_images: int
    sample_steps: int
    checkpoint_every: int
    checkpoint_minutes: float = 10.0
    resume: str = "auto"
    compile: bool | None = None
    micro_batch_size: int | None = None
    nproc: int = 1


@dataclass
class SamplerConfig:
    name: str
    steps: int
    clip_denoised: bool
    num_samples: int
    batch_size: int
    seed: int
    guidance_scale: float = 1.0
    label: str | None = None
    compile: bool = False


@dataclass
class DDIMConfig(SamplerConfig):
    eta: float = 0.0


@dataclass
class EvaluationConfig:
    batch_size: int
    bpd_images: int | None
    bpd_timesteps: int | None
    fid_samples: int | None
    inception_weights: str | None
    inception_sha256: str


@dataclass
class WandbConfig:
    mode: str
    project: str
    entity: str | None
    timeout: float


DataConfig = Cifar10Config | ShapesConfig | FolderConfig
OptimizerConfig = AdamConfig | AdamWConfig | SGDConfig


@dataclass
class Config:
    stage: str
    out_dir: str | None
    seed: int
    device: str
    precision: str
    deterministic: bool
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

    def names(self, group: str) -> bool:
        """Whether the user asked for something in a group, so that a model file must agree with it."""
        typed = any(key.split(".")[0] == group and key != "model.weights" for key in self.named)
        return typed or "experiment" in self.named


# Groups whose keys depend on a choice: the key that chooses, and the dataclass of each choice.
CHOICES: dict[str, tuple[str, dict[str, type]]] = {
    "data": ("name", {"cifar10": Cifar10Config, "shapes": ShapesConfig, "folder": FolderConfig}),
    "diffusion": ("schedule", {"linear": LinearConfig, "cosine": DiffusionConfig, "sigmoid": SigmoidConfig}),
    "optimizer": ("name", {"adam": AdamConfig, "adamw": AdamWConfig, "sgd": SGDConfig}),
    "sampler": ("name", {"ddpm": SamplerConfig, "ddim": DDIMConfig, "dpm_solver": SamplerConfig}),
}
GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "trainer": TrainerConfig,
    "evaluation": EvaluationConfig,
    "wandb": WandbConfig,
}
