"""What to type in place of an override that Hydra's grammar refuses."""

import shlex

import pytest
from helpers.configs import composed
from hydra.errors import HydraException

from main import _how_to_quote


def advice(override):
    with pytest.raises(HydraException) as raised:
        composed("data=folder", override)
    return _how_to_quote(raised.value)


@pytest.mark.parametrize("value", ["a=b", "/a,b", "/a[1]", "(x)", "it's", "/a#b", '"a"b=c', "{x", "x ~"])
def test_the_advice_gives_the_value_as_it_was_typed(value):
    line = advice(f"data.path={value}")
    start, quoted = line.split("quote the value twice: ")
    assert start == f"data.path={value}: "
    (word,) = shlex.split(quoted.removesuffix("; several values need --multirun"))
    assert composed("data=folder", word).data.path == value and ("--multirun" in quoted) == ("," in value)


def test_home_and_words_without_a_value():
    assert advice("data.path=~/data") == "data.path=~/data: write $HOME for ~: data.path=$HOME/data"
    assert advice("images").startswith("images: not of the form key=value; quote a value with blanks twice: 'data.p")
    assert _how_to_quote(HydraException("another error")) is None
