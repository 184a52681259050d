from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from raywgen import cli
from raywgen.tasks.encoders import EncoderError, load_encoder

SETTINGS = ["path=digits", "size=16", "width=4", "way=8", "num_episodes=2", "validation_episodes=10"]


def test_an_encoder_is_trained_and_its_folder_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, ["encoder", "train", *SETTINGS, "out=encoder"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "accuracy on validation classes" in result.stdout
    assert "encoder holds the encoder" in result.stdout
    assert load_encoder("encoder").fingerprint


def test_without_images_the_key_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["encoder", "train", f"out={tmp_path / 'encoder'}"])
    assert isinstance(result.exception, EncoderError)
    assert "path is empty" in str(result.exception)
