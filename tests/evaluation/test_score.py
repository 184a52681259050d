from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raywgen.corpus import Corpus, UnknownFactError
from raywgen.evaluation.score import score_file
from raywgen.weights import LayoutMismatchError, NonFiniteWeightsError, StateDict, UnsafeFileError


@pytest.fixture
def stored(zoo_corpus: Corpus) -> tuple[str, float, StateDict]:
    """Task, recorded accuracy and weights of some stored network."""
    row = zoo_corpus.select(split="unseen").take([0]).to_pylist()[0]
    return row["task_id"], row["test_accuracy"], zoo_corpus.state_dict(row["checkpoint_id"])


def test_a_stored_network_scores_what_its_facts_say(
    stored: tuple[str, float, StateDict], zoo_corpus: Corpus, tmp_path: Path
) -> None:
    task_id, accuracy, state = stored
    save_file(state, tmp_path / "net.safetensors")
    torch.save(state, tmp_path / "net.pt")
    for name in ("net.safetensors", "net.pt"):
        found = score_file(tmp_path / name, zoo_corpus, task_id)
        assert found.accuracy == pytest.approx(accuracy, abs=1e-6)
        assert found.num_test_samples == 597


def test_bad_weights_are_named(stored: tuple[str, float, StateDict], zoo_corpus: Corpus, tmp_path: Path) -> None:
    task_id, _, state = stored
    path = tmp_path / "net.safetensors"
    save_file({**state, "0.bias": state["0.bias"] * float("nan")}, path)
    with pytest.raises(NonFiniteWeightsError, match=r"net\.safetensors.*'0\.bias'.*NaN"):
        score_file(path, zoo_corpus, task_id)
    save_file({**state, "0.bias": torch.zeros(99)}, path)
    with pytest.raises(LayoutMismatchError, match=r"'0\.bias' is float32\[99\], the layout asks for"):
        score_file(path, zoo_corpus, task_id)
    with pytest.raises(UnknownFactError, match="has no task 'digits/none'"):
        score_file(path, zoo_corpus, "digits/none")


class _Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('executed', 'w').close()",))


def test_pickled_code_is_refused_by_the_command_and_never_runs(zoo_corpus: Corpus, tmp_path: Path) -> None:
    torch.save({"0.weight": _Exploit()}, tmp_path / "evil.pt")
    with pytest.raises(UnsafeFileError, match=r"evil\.pt holds pickled code"):
        score_file(tmp_path / "evil.pt", zoo_corpus, next(iter(zoo_corpus.tasks)))
    task_id = next(iter(zoo_corpus.tasks))
    command = [sys.executable, "-m", "raywgen", "score", "evil.pt", "--corpus", zoo_corpus.location]
    done = subprocess.run([*command, "--task", task_id], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "evil.pt holds pickled code" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "executed").exists()
