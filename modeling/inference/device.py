"""Where to compute and in which precision: chosen once, for training, sampling and evaluation."""

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modeling.reliability.container import cores
from modeling.reliability.errors import ConfigError

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PLACE_AT_MOST = 2**30  # bytes of a data set that a CPU run copies to memory; a larger one stays in its file
Module = TypeVar("Module", bound=nn.Module)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from CPU to CUDA without waiting for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def widest(device: torch.device) -> torch.dtype:
    """The float type of the most digits that a device has: float64, but float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def now(device: torch.device) -> float:
    """The time in seconds, of time.perf_counter, when the device has done all that it was asked for."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def computes_in_bf16(device: torch.device) -> bool:
    """Whether PyTorch multiplies in bf16 in hardware. A CPU without emulates it, up to fifty times slower than float32.

    So does an ARM CPU in effect, whatever it has: the backward pass of convolutions is a plain loop there.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Any = torch.cpu.get_capabilities() if device.type == "cpu" else {}  # on MPS it was never tried
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class Compute:
    """A device, and whether its networks run under bf16 autocast."""

    device: torch.device
    bf16: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def seed(self, seed: int) -> None:
        """Seeds the device's default generator; torch.manual_seed also seeds all others and inspects the call stack."""
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def place(self, images: Tensor) -> Tensor:
        """The data set on the device, unless it needs more than half of its free memory.

        On a CPU: in memory and channel by channel, from which a batch is drawn in two thirds of the time.
        """
        if self.device.type == "cuda":
            return images.to(self.device) if images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2 else images
        if self.device.type == "mps":
            return images.to(self.device) if images.nbytes <= PLACE_AT_MOST else images
        return images.contiguous() if images.nbytes <= PLACE_AT_MOST else images

    def place_model(self, model: Module) -> Module:
        """The model on the device; channels-last on CUDA only: what convolutions gain on a CPU, GroupNorm loses."""
        if widest(self.device) == torch.float32:
            model = model.float()  # the constants of the schedule, which are rounded where they are used in any case
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    def compiled(
        self, function: Callable[..., Tensor], wanted: bool | None, replayed: bool = False
    ) -> Callable[..., Tensor]:
        """A module or a method of one, its forward and backward pass compiled if that is wanted; None: on CUDA only.

        The result shares its weights. Rounding differs, and dropout draws other numbers.

        `replayed`: on CUDA each pass is recorded as a CUDA graph, which then takes one call of the host, except under
        deterministic algorithms. What a pass returned, gradients included, is overwritten by the next one.
        """
        if wanted is False or (wanted is None and self.device.type != "cuda"):
            return function
        log.info("compiling the network: its first call takes a minute or more")
        # The backward pass is compiled in a thread of autograd, where no setting holds but those given here.
        options: dict[str, Any] = {}
        if torch.are_deterministic_algorithms_enabled():
            options["deterministic"] = True
        elif replayed and self.device.type == "cuda":
            options["triton.cudagraphs"] = True
        # One size each: for sizes that vary, the compiler gives up the memory layout of convolutions.
        return torch.compile(function, dynamic=False, options=options or None)

    def describe(self) -> str:
        """The device and the precision, for people."""
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads > 1)}"
        if self.device.type != "cpu":
            name = "Apple GPU by MPS" if self.device.type == "mps" else torch.cuda.get_device_name(self.device)
        return f"{name}, {'bf16 autocast' if self.bf16 else 'float32'}"


def choose_compute(device: str, precision: str, deterministic: bool = False, threads: int | None = None) -> Compute:
    """Resolves `auto`: CUDA where there is one; bf16 where the hardware computes in it. ConfigError if it is not there.

    MPS, which computes in float32 here, is never chosen by itself.

    `deterministic`: for the rest of this process, the same bits each time on CUDA too, which is slower; if not, cuDNN
    searches for its fastest kernels. A CPU gives the same bits in any case. `threads`: of a CPU; None: one for each
    core that may be used.
    """
    if threads is None:
        threads = _default_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise ConfigError("device=cuda: PyTorch finds no CUDA device here; allowed are auto, cpu")
    if cuda and not _kernels_run():
        version, name = torch.__version__, torch.cuda.get_device_name()
        if device == "cuda":
            raise ConfigError(f"device=cuda: PyTorch {version} has no kernels for this {name}; allowed are auto, cpu")
        log.warning("PyTorch %s has no kernels for this %s, so the CPU computes: see docs/machines.md", version, name)
        cuda = False
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: PyTorch finds no Apple GPU here; allowed are auto, cpu")
    # "cuda" is the current device; each of several processes has made another one current: see collectives.py.
    chosen = torch.device("cuda" if cuda else device.replace("auto", "cpu"))
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler: 1.5 s
        torch.use_deterministic_algorithms(deterministic)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # else it fills new tensors, which takes time
    has_bf16 = computes_in_bf16(chosen)
    if precision == "bf16" and not has_bf16:
        if chosen.type == "cuda":
            raise ConfigError("precision=bf16: this CUDA device has none; allowed are auto, fp32")
        if chosen.type == "mps":
            raise ConfigError("precision=bf16: not with device=mps; allowed are auto, fp32")
        log.warning("precision=bf16: this CPU has none and emulates it, up to fifty times slower than precision=fp32")
    if chosen.type == "cuda":
        # PyTorch prefers it on Hopper for heads as wide as the paper's, 256, where gradients of NaN have been reported.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # by default convolutions have 10 bits of mantissa
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
        torch.backends.cudnn.benchmark = not deterministic
    elif chosen.type == "cpu":
        _keep_freed_memory()
    return Compute(chosen, precision == "bf16" or (precision == "auto" and has_bf16))


def _kernels_run() -> bool:
    """Whether this PyTorch computes on the CUDA device: its wheels have no kernels for old ones."""
    try:
        torch.ones(1, device="cuda").add_(1)
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        return False
    return True


def _default_threads() -> int:
    """As many as PyTorch chooses; unless the user has said how many, no more than the cores that may be used."""
    chosen = torch.get_num_threads()
    return chosen if "OMP_NUM_THREADS" in os.environ else min(chosen, cores())


def _keep_freed_memory() -> None:
    """glibc keeps freed blocks of up to a gigabyte: clearing new pages is 5 to 8 % of a step (docs/speed.md)."""
    # Other C libraries have no mallopt.
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)
