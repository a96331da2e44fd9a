"""A small encoder and a small drawn data set, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_trials import DATASET
from transformers import Dinov2Config, Dinov2Model

from trainables.data.opened import Data, Folders, open_data


def save_encoder(folder: Path, **changes: object) -> Path:
    """A random 4-block Dinov2 at 32 px, layer scale 1, saved as transformers saves it."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8, **changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a 4-block encoder without dropout, as DINOv2 is."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def restless_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dropout and stochastic depth in every block."""
    return save_encoder(tmp_path_factory.mktemp("restless"), hidden_dropout_prob=0.1, drop_path_rate=0.2)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """160 phantom images at 32 px: 125 to train on, 22 to validate, 13 to test, four classes."""
    folder = tmp_path_factory.mktemp("phantom")
    return open_data(DATASET, Folders(folder / "drawn", folder / "decoded", folder / "splits"))
