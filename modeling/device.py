"""Where to compute and in which precision: one choice, made once, for training, sampling and evaluation."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modeling.errors import ConfigError

PLACE_AT_MOST = 2**30  # bytes of a data set that a CPU run copies to memory; a larger one stays in its file
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Compute:
    """A device, and whether its networks run under bf16 autocast."""

    device: torch.device
    bf16: bool

    def autocast(self) -> torch.autocast:
        """The context in which a network runs."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def generator(self, seed: int) -> torch.Generator:
        """A fresh generator on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def place(self, images: Tensor) -> Tensor:
        """The data set on the device if at most half of its free memory is needed; as it is, if not.

        On a CPU: in memory and channel by channel, from which a batch is drawn in two thirds of the time.
        """
        cuda = self.device.type == "cuda"
        if cuda and images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2:
            return images.to(self.device)
        if not cuda and images.nbytes <= PLACE_AT_MOST:
            return images.contiguous()
        return images

    def place_model(self, model: Module) -> Module:
        """The model on the device, in the memory layout that its convolutions like best.

        Channels-last for tensor cores. A CPU is not faster with it: what convolutions gain, GroupNorm loses.
        """
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    def describe(self) -> str:
        """For people: the device and the precision."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        return f"{name}, {'bf16 autocast' if self.bf16 else 'float32'}"


def choose_compute(device: str, precision: str) -> Compute:
    """Resolves `auto`: CUDA where there is one; bf16 where the hardware computes in it.

    Raises:
        ConfigError: CUDA or bf16 is asked for and not there.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; allowed are auto, cpu")
    # "cuda" is the current device; each of several processes has made another one that: see distributed.py.
    chosen = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    if chosen.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise ConfigError("precision=bf16: this CUDA device has none; allowed are auto, fp32")
    else:
        # An older PyTorch cannot say what the CPU has: float32 is always right.
        probe: Any = getattr(torch.cpu, "get_capabilities", dict)
        capabilities = probe()
        has_bf16 = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return Compute(chosen, precision == "bf16" or (precision == "auto" and has_bf16))
