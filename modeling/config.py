"""The checks of the configuration: the only module that sees a DictConfig.

Types and unknown keys are checked by OmegaConf against the dataclasses of settings.py; ranges and what must fit
together, here. Whatever is wrong raises ConfigError with one line that names the key.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from modeling.errors import ConfigError
from modeling.settings import (
    CHOICES,
    GROUPS,
    MAX_TIMESTEPS,
    STAGES,
    AdamConfig,
    AdamWConfig,
    Config,
    DDIMConfig,
    DiffusionConfig,
    FolderConfig,
    LinearConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    SGDConfig,
    ShapesConfig,
    SigmoidConfig,
    TrainerConfig,
)

BETA_MIN = 1e-8  # below it, the first step would add no noise that a float could tell from none
TOP = {"stage": str, "seed": int, "device": str, "precision": str, "deterministic": bool}
_ALLOWED = sorted({*TOP, "out_dir", "experiment", *CHOICES, *GROUPS})


def load_config(cfg: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Checks a composed configuration and turns it into dataclasses.

    Args:
        cfg: the composition.
        overrides: what the user typed, as `group=choice` or `group.key=value`; remembered in Config.named.

    Raises:
        ConfigError: a key that does not exist, a wrong type, a value out of range; the message names the key.
    """
    for key in cfg:
        if key not in _ALLOWED:
            raise ConfigError(no_such_key(str(key)))
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        group, _, name = key.partition(".")
        chooses, choices = CHOICES.get(group, ("name", {}))
        if name == chooses and (value in choices or group == "model"):
            raise ConfigError(f"{override}: write {group}={value}, which sets all keys of the group")
    groups: dict[str, Any] = {}
    for group in (*CHOICES, *GROUPS):
        _require(isinstance(cfg.get(group), DictConfig), group, cfg.get(group), "a group of keys is expected")
        groups[group] = _structured(group, cfg[group])
        for key, value in vars(groups[group]).items():
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
            _require(all(map(math.isfinite, numbers)), f"{group}.{key}", value, "must be finite")
    top = {key: cfg.get(key) for key in TOP}
    for key, expected in TOP.items():
        _require(type(top[key]) is expected, key, top[key], f"must be of type {expected.__name__}")
    out_dir = cfg.get("out_dir")
    _require(out_dir is None or type(out_dir) is str, "out_dir", out_dir, "must be a path, or null")
    named = frozenset(re.split(r"[@=]", override.lstrip("+~"))[0] for override in overrides)
    config = Config(out_dir=out_dir, named=named, **top, **groups)
    _check(config)
    return config


def _structured(group: str, node: DictConfig) -> Any:
    schema = GROUPS.get(group)
    if schema is None:
        key, choices = CHOICES[group]
        choice = node.get(key)
        _require(choice in choices, f"{group}.{key}", choice, f"allowed are {', '.join(choices)}")
        schema = choices[choice]
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        name = error.full_key or error.key
        key = group if name is None else ".".join([group, str(name)])
        if isinstance(error, ConfigKeyError):
            raise ConfigError(no_such_key(key)) from None
        if isinstance(error, MissingMandatoryValue):
            missing = [f"{group}.{k!s}" for k in node if OmegaConf.is_missing(node, k)]
            raise ConfigError(f"{(missing or [key])[0]}: must be given") from None
        raise ConfigError(f"{key}: {str(error.msg or error).splitlines()[0]}") from None


def no_such_key(key: str) -> str:
    """What to tell whoever typed a key that does not exist, or not with their choice of its group."""
    group, _, name = key.partition(".")
    choices = CHOICES[group][1] if group in CHOICES else {group: GROUPS[group]} if group in GROUPS else {}
    keys = {choice: [f.name for f in fields(schema)] for choice, schema in choices.items()}
    elsewhere = [choice for choice, names in keys.items() if name in names]
    if elsewhere:
        return f"{key}: a key of {' and '.join(f'{group}={choice}' for choice in elsewhere)} only"
    allowed = dict.fromkeys(name for names in keys.values() for name in names) if name and keys else _ALLOWED
    return f"{key}: no such key; allowed are {', '.join(allowed)}"


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value}: {allowed}")


def _positive(group: str, config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value > 0, f"{group}.{key}", value, "must be greater than 0")


def _one_of(key: str, value: str, *allowed: str) -> None:
    _require(value in allowed, key, value, f"allowed are {', '.join(allowed)}")


def _check(c: Config) -> None:
    _one_of("stage", c.stage, *STAGES)
    _one_of("device", c.device, "auto", "cpu", "cuda")
    _one_of("precision", c.precision, "auto", "bf16", "fp32")
    _require(c.seed >= 0, "seed", c.seed, "must not be negative")
    if isinstance(c.data, ShapesConfig):
        _positive("data", c.data, "num_train", "num_test")
        _require(c.data.image_size >= 8, "data.image_size", c.data.image_size, "must be at least 8 pixels")
        _require(c.data.seed >= 0, "data.seed", c.data.seed, "must not be negative")
    if isinstance(c.data, FolderConfig):
        _require(c.data.path != "", "data.path", c.data.path, "must be the folder of your images")
        _require(0 < c.data.test_fraction < 1, "data.test_fraction", c.data.test_fraction, "must lie in (0, 1)")
    _check_model(c.model)
    _check_diffusion(c.diffusion)
    _check_optimizer(c.optimizer)
    _check_trainer(c.trainer, c.diffusion.num_timesteps)
    p = c.trainer.label_dropout
    _require(c.model.class_conditional or p == 0, "trainer.label_dropout", p, "needs model.class_conditional=true")
    _check_sampler(c.sampler, c.diffusion.num_timesteps)
    _positive("evaluation", c.evaluation, "batch_size")
    n = c.evaluation.bpd_images
    _require(n is None or n > 1, "evaluation.bpd_images", n, "must be at least 2, or null for all")
    n = c.evaluation.bpd_timesteps
    _require(n is None or n > 0, "evaluation.bpd_timesteps", n, "must be at least 1, or null for all")
    n = c.evaluation.fid_samples
    _require(n is None or n >= 10, "evaluation.fid_samples", n, "must be at least 10, or null to leave FID out")
    digest = c.evaluation.inception_sha256
    good = re.fullmatch("[0-9a-f]{8,64}", digest) is not None
    _require(good, "evaluation.inception_sha256", digest, "must be 8 to 64 hexadecimal digits")
    _one_of("wandb.mode", c.wandb.mode, "online", "offline", "disabled")
    _positive("wandb", c.wandb, "timeout")


def _check_model(m: ModelConfig) -> None:
    _positive("model", m, "model_channels", "num_res_blocks", "num_heads", "norm_groups")
    _require(bool(m.channel_mult) and min(m.channel_mult) > 0, "model.channel_mult", m.channel_mult, "must be positive")
    fits = m.model_channels % m.norm_groups == 0
    _require(fits, "model.norm_groups", m.norm_groups, f"must divide model.model_channels={m.model_channels}")
    heads_fit = all(mult * m.model_channels % m.num_heads == 0 for mult in m.channel_mult)
    _require(heads_fit, "model.num_heads", m.num_heads, "must divide the channels at every resolution")
    _require(
        m.model_channels % 2 == 0 and m.model_channels >= 4, "model.model_channels", m.model_channels, "must be even"
    )
    _require(0 <= m.dropout < 1, "model.dropout", m.dropout, "must lie in [0, 1)")


def _check_diffusion(d: DiffusionConfig) -> None:
    allowed = f"allowed are 1 to {MAX_TIMESTEPS}"
    _require(1 <= d.num_timesteps <= MAX_TIMESTEPS, "diffusion.num_timesteps", d.num_timesteps, allowed)
    if isinstance(d, LinearConfig):
        _require(BETA_MIN <= d.beta_start < 1, "diffusion.beta_start", d.beta_start, f"must lie in [{BETA_MIN}, 1)")
        _require(0 < d.beta_end < 1, "diffusion.beta_end", d.beta_end, "must lie in (0, 1)")
        _require(
            d.beta_start < d.beta_end, "diffusion.beta_start", d.beta_start, f"must be below beta_end={d.beta_end}"
        )
    if isinstance(d, SigmoidConfig):
        _require(d.start < d.end, "diffusion.start", d.start, f"must be below end={d.end}")
        _positive("diffusion", d, "tau")
    _one_of("diffusion.prediction_type", d.prediction_type, "epsilon", "sample", "v_prediction")
    _one_of("diffusion.variance", d.variance, "fixed_large", "fixed_small", "learned")
    gamma = d.min_snr_gamma
    _require(
        gamma is None or gamma > 0, "diffusion.min_snr_gamma", gamma, "must be above 0, or null for the simple loss"
    )


def _check_sampler(s: SamplerConfig, num_timesteps: int) -> None:
    _positive("sampler", s, "num_samples", "batch_size")
    allowed = f"allowed are 1 to {num_timesteps}, diffusion.num_timesteps"
    _require(1 <= s.steps <= num_timesteps, "sampler.steps", s.steps, allowed)
    _require(s.seed >= 0, "sampler.seed", s.seed, "must not be negative")
    _require(s.guidance_scale >= 0, "sampler.guidance_scale", s.guidance_scale, "must not be negative")
    if isinstance(s, DDIMConfig):
        _require(0 <= s.eta <= 1, "sampler.eta", s.eta, "must lie in [0, 1]")


def _check_optimizer(o: OptimizerConfig) -> None:
    _positive("optimizer", o, "lr")
    _require(o.warmup_steps >= 0, "optimizer.warmup_steps", o.warmup_steps, "must not be negative")
    _one_of("optimizer.lr_decay", o.lr_decay, "none", "cosine", "linear")
    _require(o.grad_clip is None or o.grad_clip > 0, "optimizer.grad_clip", o.grad_clip, "must be above 0, or null")
    if isinstance(o, AdamConfig):
        good = len(o.betas) == 2 and all(0 <= b < 1 for b in o.betas)
        _require(good, "optimizer.betas", o.betas, "must be two numbers in [0, 1)")
        _positive("optimizer", o, "eps")
    else:
        _require(0 <= o.momentum < 1, "optimizer.momentum", o.momentum, "must lie in [0, 1)")
    if isinstance(o, AdamWConfig | SGDConfig):
        _require(o.weight_decay >= 0, "optimizer.weight_decay", o.weight_decay, "must not be negative")


def _check_trainer(t: TrainerConfig, num_timesteps: int) -> None:
    positive = ("steps", "batch_size", "log_every", "evaluate_every", "evaluate_images", "sample_every")
    _positive("trainer", t, *positive, "sample_images", "checkpoint_every", "checkpoint_minutes")
    _positive("trainer", t, "nproc")
    size = t.micro_batch_size
    _require(size is None or size > 0, "trainer.micro_batch_size", size, "must be at least 1, or null for the batch")
    _require(0 <= t.ema_decay < 1, "trainer.ema_decay", t.ema_decay, "must lie in [0, 1)")
    _require(0 <= t.label_dropout < 1, "trainer.label_dropout", t.label_dropout, "must lie in [0, 1)")
    _one_of("trainer.timestep_sampling", t.timestep_sampling, "uniform", "stratified")
    allowed = f"allowed are 1 to {num_timesteps}, diffusion.num_timesteps"
    _require(1 <= t.sample_steps <= num_timesteps, "trainer.sample_steps", t.sample_steps, allowed)
