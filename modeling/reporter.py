"""Who hears what happens in training, and the one who listens to nothing."""

from typing import Protocol

from torch import Tensor


class Reporter(Protocol):
    """Hears what happens in training; nothing that it does changes the result."""

    def started(self, step: int) -> None:
        """Training begins, or goes on, after `step` steps."""

    def stepped(self, step: int) -> None:
        """A step is done, on the host's side; the device may still compute."""

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """Values of one step; `seconds`: time of all training steps so far."""

    def sampled(self, step: int, images: Tensor) -> None:
        """uint8 [N, C, H, W], drawn with the EMA weights from fixed noise."""


class Silent:
    """A Reporter that does nothing: of all processes but the first, and of benchmarks."""

    def started(self, step: int) -> None:
        """See Reporter."""

    def stepped(self, step: int) -> None:
        """See Reporter."""

    def logged(self, step: int, row: dict[str, float], seconds: float) -> None:
        """See Reporter."""

    def sampled(self, step: int, images: Tensor) -> None:
        """See Reporter."""
