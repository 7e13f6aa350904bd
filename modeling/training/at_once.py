"""How many images go through the network at a time in training, and the sampler of its sample grids.

No size here changes a result; a stop waits for one batch.
"""

from modeling.distributed.shares import share
from modeling.settings.groups import SamplerConfig, TrainerConfig

EVALUATION_BATCH = 100  # of the held-out loss, at most
GRID_BATCH = 64  # of the sample grid, at most


def images_at_once(config: TrainerConfig) -> int:
    """The most that go through the network together in a training step of this process."""
    whole = len(share(config.batch_size))
    return min(config.micro_batch_size or whole, whole)


def without_gradients(config: TrainerConfig, most: int) -> int:
    """The batch for what needs no gradients, whose images need a seventh of the memory."""
    return min(most, 4 * images_at_once(config))


def grid_sampler(config: TrainerConfig) -> SamplerConfig:
    """The sampler of the sample grids, without guidance: what is near the solution of the ODE after few steps."""
    return SamplerConfig(
        name="unipc",
        steps=config.sample_steps,
        spacing="log_snr",
        clip_denoised=True,
        num_samples=config.sample_images,
        batch_size=without_gradients(config, GRID_BATCH),
        seed=0,
        guidance_scale=1.0,
        autoguidance_scale=1.0,
        label=None,
        compile=False,
    )
