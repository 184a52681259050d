"""Shows how training is sent to a Ray cluster as a job, followed, and read when it is done.

The cluster is the one whose dashboard is the first argument (`http://127.0.0.1:8265` after `ray start --head`), or that
`RAY_ADDRESS` names; further arguments are settings of `raywgen train`, such as `out=s3://bucket/run`, where every node
and this machine can read it. Run it in a clone of raywgen, which is sent along. It takes as long as the training; the
settings below need about a minute on a corpus of the demo.

    python examples/submit_job.py http://127.0.0.1:8265 corpus=/mnt/raywgen/corpus out=/mnt/raywgen/run
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from raywgen.cluster.connect import connect
from raywgen.cluster.submit import Job, submit
from raywgen.training.status import run_status

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("generator.task_loss.num_steps=200", "num_workers=1")


def main(address: str | None, settings: list[str]) -> str:
    """Sends the job, follows it to its end, and returns how it ended."""
    client = connect(address)
    given = {setting.partition("=")[0] for setting in settings}
    defaults = [setting for setting in SMALL if setting.partition("=")[0] not in given]
    job = Job(name="train", arguments=["hypernetwork", *defaults, *settings], working_dir=str(ROOT))
    sent = submit(client, job)
    print(f"{sent.id}: {job.entrypoint()}")
    while not (status := client.get_job_status(sent.id)).is_terminal():
        time.sleep(2)
    print(client.get_job_logs(sent.id))
    print(f"{sent.id}: {status.value}")
    out = next((setting.removeprefix("out=") for setting in settings if setting.startswith("out=")), "")
    if out and status.value == "SUCCEEDED":
        print("\n".join(run_status(out).lines()))
    return status.value


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:])
