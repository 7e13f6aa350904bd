"""A feature extractor that takes no time."""

import pytest
import torch
from torch import nn

from modeling.evaluation import fid


class Pixels(nn.Module):
    """The first values of an image as its features."""

    def forward(self, images):
        return images.flatten(1)[:, :2], images.flatten(1)[:, :3]


@pytest.fixture
def pixels(monkeypatch):
    """In place of the Inception network."""
    monkeypatch.setattr(fid, "FEATURES", [2, 3])
    return fid.Inception(Pixels(), "0123456789abcdef", torch.device("cpu"))
