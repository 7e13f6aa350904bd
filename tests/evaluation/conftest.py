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
def no_network(monkeypatch, tmp_path):
    """Nothing is in PyTorch's cache folder, and nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.fixture
def pixels(monkeypatch):
    """In place of the Inception network."""
    monkeypatch.setattr(fid, "FEATURES", [2, 3])
    return fid.Inception(Pixels(), "0123456789abcdef", torch.device("cpu"))
