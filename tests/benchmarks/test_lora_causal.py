"""`lora-causal` on a decoder of a few thousand values that is trained here."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raywgen.benchmarks.lora_causal import LoRACausalConfig, measure
from raywgen.benchmarks.small_decoder import DecoderConfig
from tests.text_encoders import SIGNS, make_sentences

ROWS = ("none", "average", "shared", "gradient", "gradient_all", "shuffled")
WRITTEN = tuple(f"hypernetwork{part}" for part in ("", "_text", "_examples"))


def small(folder: Path) -> LoRACausalConfig:
    path = make_sentences(folder / "signs.parquet", 400)
    others = [f"{' '.join([word] * 3)} {n % 7}" for n in range(40) for word in SIGNS]
    pq.write_table(pa.table({"sentence": others, "label": [0] * len(others)}), folder / "others.parquet")
    counts = ["num_seen_tasks=2", "num_validation_tasks=1", "num_unseen_tasks=1", "num_steps=4", "checkpoint_steps=[4]"]
    return LoRACausalConfig(
        data=[path],
        decoder=DecoderConfig(
            paths=[str(folder / "others.parquet")], vocab_size=300, width=16, num_layers=2, num_steps=5, batch_size=8
        ),
        distributed=False,
        methods=["hypernetwork"],
        shot=4,
        rates=[1e-2],
        steps=[1, 3],
        shared_rates=[1.0],
        zoo=[*counts, "tasks.kind=domain-classes", "tasks.first_layer=1", "tasks.max_tokens=8", "tasks.limit=20"],
        hypernetwork=["generator.task_loss.num_steps=3", "generator.width=16", "num_query_samples=4"],
        out=str(folder / "out"),
    )


@pytest.mark.slow
def test_every_row_is_judged_on_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYWGEN_CACHE", str(tmp_path / "cache"))
    config = small(tmp_path)
    figures, conditions = measure(config)
    assert set(figures) == {f"{prefix}{name}_4" for name in (*ROWS, *WRITTEN) for prefix in ("", "ms_")}
    assert all(figures[f"ms_{name}_4"] > 0 for name in ("gradient", "hypernetwork", "shuffled"))
    (details,) = conditions["each"]
    assert details["gradient"]["steps"] in (1, 3)
    gain, _ = details["paired_differences"]["gradient - none"]
    assert gain == pytest.approx(figures["gradient_4"] - figures["none_4"], abs=1e-3)
    # Training on all texts of a domain helps on its others, and the decoder is found trained.
    assert figures["gradient_all_4"] < figures["none_4"]
    again, _ = measure(config)
    assert again["none_4"] == figures["none_4"]


def test_what_is_missing_is_named() -> None:
    decoder = DecoderConfig(paths=["b.parquet"])
    with pytest.raises(ValueError, match="data: give Parquet files of texts"):
        LoRACausalConfig()
    with pytest.raises(ValueError, match="base: give a causal language model, or the files"):
        LoRACausalConfig(data=["a.parquet"])
    with pytest.raises(ValueError, match=r"methods=\['vae'\]"):
        LoRACausalConfig(data=["a.parquet"], decoder=decoder, methods=["vae"])


def test_files_are_left_out() -> None:
    config = LoRACausalConfig(data=["a.parquet"], left_out=["c.parquet"], base="model")
    zoo = config.zoo_of(0, "model").tasks
    assert (zoo.paths, zoo.num_unseen_paths, zoo.base) == (["a.parquet", "c.parquet"], 1, "model")
