"""`raywgen job ...` against a real head node: what it refuses, what it shows, and that a stopped run goes on."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raywgen.corpus import Corpus
from raywgen.training import read_metrics
from tests.jobs.conftest import ROOT, SMALL, LocalCluster

pytestmark = pytest.mark.slow

CONFIG = "configs/igpg/digits.yaml"


def refusal(answer: tuple[int, str]) -> str:
    """The one line of a command that ended with status 1."""
    status, text = answer
    assert status == 1, text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    return line


def test_a_wrong_token(one_node: LocalCluster, zoo_corpus: Corpus, tmp_path: Path) -> None:
    """Said within seconds, where Ray itself waits for twenty and gives no reason."""
    listing, training = ("job", "list"), ("train", CONFIG, f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}")
    wrong = {"RAY_ADDRESS": one_node.head, "RAY_AUTH_TOKEN": "wrong"}
    listed, trained = one_node.raywgen(listing, training, **wrong)
    assert f"Ray at {one_node.dashboard} refuses the token: export RAY_AUTH_MODE=token" in refusal(listed)
    assert f"Ray at {one_node.head} refuses the token: export RAY_AUTH_MODE=token" in refusal(trained)
    nobody = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "RAY_ADDRESS": one_node.head}
    for answer in one_node.raywgen(listing, training, **nobody):
        assert "refuses a client without token: export RAY_AUTH_MODE=token" in refusal(answer)


def test_what_the_cluster_cannot_run_is_refused_before_anything_is_sent(
    one_node: LocalCluster, zoo_corpus: Corpus, tmp_path: Path
) -> None:
    run = ["train", CONFIG, f"corpus={zoo_corpus.location}", f"out={tmp_path / 'run'}", *SMALL]
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "train.py").touch()
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(200 * 2**20)
    submit = ["job", "submit"]
    cases = [
        ([*submit, *run, "num_workers=8"], "4 CPU on 1 node: give num_workers=3, or add nodes"),
        ([*submit, *run, "num_workers=1", "device=cuda"], "num_workers=1 asks for 1 x 1 GPU"),
        ([*submit, *run, "sed=1"], "unknown key 'sed' in the command line; did you mean 'seed'?"),
        ([*submit, "trian"], "has no trian.py; jobs there: adapt, benchmark"),
        ([*submit, "--working-dir", str(tmp_path), "train"], "largest are data.bin (200.0 MiB)"),
        ([*submit, "--runtime-env", "none.yaml", *run], "runtime environment none.yaml does not exist"),
        (["job", "status", "nobody"], "the cluster knows no job 'nobody'"),
    ]
    # Until the head node's monitor has said that no autoscaler runs.
    time.sleep(max(0.0, one_node.started + 6 - time.monotonic()))
    listing = ["job", "list"]
    before, *answers, after = one_node.raywgen(listing, *(command for command, _ in cases), listing)
    for answer, (_, said) in zip(answers, cases, strict=True):
        assert said in refusal(answer)
    assert before == after
    # The same in the job itself, for those who send it by Ray's own command.
    plain = ("ray", "job", "submit", "--working-dir", str(ROOT), "--", "python", "jobs/train.py", *run[1:])
    done = one_node.run(*plain, "num_workers=8")
    assert done.returncode == 1
    assert "give num_workers=3, or add nodes" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_stopped_job_goes_on(one_node: LocalCluster, zoo_corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "igpg"
    # More steps than the test has time for.
    small = [setting for setting in SMALL if not setting.startswith("generator.tokenizer.num_steps=")]
    run = [CONFIG, f"corpus={zoo_corpus.location}", f"out={out}", *small, "generator.tokenizer.num_steps=100000"]
    # Ray Train looks for new checkpoints every half a second; an interval has to take longer than that.
    run += ["num_workers=1", "checkpoint_every=200", "log_every=5", "validate_every=100000"]
    before, kept = run_until_stopped(one_node, run, at_least=400)
    assert 0 < kept <= before[-1]["step"] + 1 + 5
    after, kept_later = run_until_stopped(one_node, run, at_least=kept + 400)
    # Rows hold the time they were written at: these were not written again.
    resumed = [old["step"] for old, row in zip(before, after, strict=False) if old == row][-1]
    assert kept - 200 - 5 <= resumed < kept, "it went on from the newest checkpoint, or at worst from the one before"
    steps = [row["step"] for row in after]
    assert steps == list(range(0, steps[-1] + 1, 5))
    assert kept_later >= kept + 400


def run_until_stopped(cluster: LocalCluster, run: list[str], at_least: int) -> tuple[list[dict[str, Any]], int]:
    """Submits, waits for a checkpoint, looks, stops; gives the log's rows and the newest checkpoint's step."""
    out = next(Path(setting.removeprefix("out=")) for setting in run if setting.startswith("out="))
    ((status, text),) = cluster.raywgen(["job", "submit", "--no-wait", "train", *run])
    assert status == 0, text
    (job_id,) = set(re.findall(r"raysubmit_\w+", text))
    deadline = time.monotonic() + 300
    while newest_step(out) < at_least:
        if time.monotonic() > deadline:
            pytest.fail(cluster.raywgen(["job", "logs", job_id])[0][1])
        time.sleep(0.5)
    looked, stopped, listed, run_status = cluster.raywgen(
        ["job", "status", job_id], ["job", "stop", job_id], ["job", "list"], ["status", str(out)]
    )
    assert f"{job_id}: RUNNING" in looked[1]
    assert re.search(r"tokenizer: step \d+ of 100000, loss", looked[1])
    assert f"{job_id}: STOPPED" in stopped[1]
    assert "submitted again, it goes on: python jobs/train.py" in stopped[1]
    assert job_id in listed[1]
    assert "igpg, under way" in run_status[1]
    return read_metrics(out), newest_step(out)


def newest_step(out: Path) -> int:
    """Of the newest checkpoint in the run folder; one may be written or removed right now."""
    steps = [0]
    for path in out.glob("checkpoints/*/index.json"):
        with suppress(FileNotFoundError, json.JSONDecodeError):
            steps.append(json.loads(path.read_text())["step"])
    return max(steps)
