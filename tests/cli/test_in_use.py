"""A second command on the folder of another one is refused in one line, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from raywgen import cli
from raywgen.corpus import Corpus
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import evaluate
from raywgen.evaluation.finetune import FinetuneConfig, finetune
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.bundle import build_generator, save_bundle
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig
from raywgen.locks import LOCK, InUseError, only_one
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks.encoder_training import EncoderConfig, train_encoder
from raywgen.training import TrainConfig, launch
from raywgen.training.data import data_spec, measure_normalizers
from tests.conftest import TINY_ZOO, make_zoo


@pytest.mark.parametrize("command", ["train", "zoo train", "encoder train", "generate", "evaluate", "finetune"])
def test_a_folder_in_use_is_refused(command: str, zoo_corpus: Corpus, tmp_path: Path) -> None:
    out, corpus = str(tmp_path / "out"), zoo_corpus.location
    tiny = IGPGConfig(tokenizer=TokenizerConfig(quantiser=QuantiserConfig(num_levels=2, num_codes=4), width=8))
    run = str(tmp_path / "run")
    generator = build_generator("igpg", tiny, measure_normalizers(zoo_corpus), data_spec(zoo_corpus), 0)
    save_bundle(generator, f"{run}/generator", {})
    work = {
        "train": lambda: launch([TrainConfig(generator=tiny, corpus=corpus, out=out, num_workers=0)]),
        "zoo train": lambda: make_zoo(TINY_ZOO, out),
        "encoder train": lambda: train_encoder(EncoderConfig(path="images.parquet", out=out)),
        "generate": lambda: generate(GenerateConfig(generator=run, corpus=corpus, out=out)),
        "evaluate": lambda: evaluate(EvaluateConfig(generator=run, corpus=corpus, out=out)),
        "finetune": lambda: finetune(FinetuneConfig(generator=run, corpus=corpus, start=["random"], out=out)),
    }
    with only_one(out), pytest.raises(InUseError, match=f"{out} is in use"):
        work[command]()
    assert [path.name for path in Path(out).iterdir()] == [LOCK]


def test_the_command_says_it_in_one_line(
    zoo_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    arguments = ["train", "lohp", f"corpus={zoo_corpus.location}", f"out={out}", "num_workers=0"]
    monkeypatch.setattr("sys.argv", ["raywgen", *arguments])
    with only_one(out), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert f"{out} is in use: `raywgen train lohp" in message
