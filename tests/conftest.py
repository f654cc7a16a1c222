"""What several test modules start from."""

import pytest

from tests.tiny import tiny_checkpoint, tiny_listener, waves


@pytest.fixture(scope="module")
def lm():
    """A tiny random Mel-LLM."""
    return tiny_listener()


@pytest.fixture(scope="module")
def clips():
    """Three clips of different lengths, for `tiny.TEXTS`."""
    return waves(1.0, 0.7, 1.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with an adapter of noise in `model`, and a manifest of noise with texts."""
    place = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(place)
    return place
