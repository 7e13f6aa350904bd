"""EMA against its closed form, and its copy of the model."""

import pytest
import torch
from torch import nn

from modeling.training.ema import EMA


def linear(value):
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def test_constant_weights_follow_the_closed_form():
    net = linear(0.0)
    ema = EMA(net, 0.9)
    ema.num_updates = 10**9  # past the warm-up
    nn.init.constant_(net.weight, 2.0)
    for _ in range(7):
        ema.update()
    assert ema.model.weight.item() == pytest.approx(2 * (1 - 0.9**7), rel=1e-5)


def test_warm_up_forgets_the_start():
    net = linear(1.0)
    ema = EMA(net, 0.9999)
    nn.init.constant_(net.weight, 0.0)
    ema.update()
    assert ema.model.weight.item() == pytest.approx(0.1)


def test_the_copy_is_in_eval_mode_and_shares_nothing_with_the_model():
    net = linear(1.0).train()
    ema = EMA(net, 0.5)
    nn.init.constant_(net.weight, 3.0)
    assert net.training and not ema.model.training and ema.model.weight.item() == 1.0


def test_state_round_trip():
    ema = EMA(linear(1.0), 0.5)
    ema.update()
    other = EMA(linear(9.0), 0.5)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.model.weight, ema.model.weight) and other.num_updates == 1
