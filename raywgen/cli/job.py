"""The commands `raywgen job ...` submit, watch and stop jobs on a Ray cluster; `raywgen status` shows a run."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.table import Table

from raywgen.cli.settings import out
from raywgen.progress import plain
from raywgen.stops import keeping

_FOLLOW_SECONDS = 2.0

app = typer.Typer(no_args_is_help=True, help="Send jobs to a Ray cluster, watch them, stop them.")
Address = Annotated[
    str | None,
    typer.Option(help="Dashboard or head node; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else this machine."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as `raywgen job list` names it.")]


# Options after the job's name belong to the job.
@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A script of jobs/, such as train or generate.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help="An argument of the job.")
    ] = None,
    address: Address = None,
    working_dir: Annotated[str, typer.Option(help="Folder that is sent to every node; it holds jobs/.")] = ".",
    runtime_env: Annotated[
        str | None, typer.Option(help="YAML of packages that nodes install first, such as cluster/runtime_env.yaml.")
    ] = None,
    send: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A file or variable to send although it looks like a secret; repeat."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the log until the job ends.")] = True,
) -> None:
    """Submit a job, after checking the cluster, the token, its room, and the size and secrets of the upload.

    raywgen job submit --address http://127.0.0.1:8265 train configs/igpg/digits.yaml num_workers=8 out=/mnt/raywgen/a

    The same as `ray job submit --working-dir . -- python jobs/train.py ...`, which works too. The exit status is 1 if
    the job fails.
    """
    from raywgen.cluster.connect import connect
    from raywgen.cluster.submit import Job
    from raywgen.cluster.submit import submit as submit_job

    client = connect(address)
    request = Job(
        name=job, arguments=arguments or [], working_dir=working_dir, runtime_env=runtime_env, send=send or []
    )
    submitted = submit_job(client, request)
    job_id = submitted.id
    if submitted.left_out:
        names = plain(", ".join(submitted.left_out))
        out.print(f"not sent, as secrets are kept there (send one by --send PATH): {names}", soft_wrap=True)
    out.print(f"{job_id}: {plain(request.entrypoint())}", highlight=False, soft_wrap=True)
    where = f" --address {address}" if address else ""
    out.print(f"watch: raywgen job status{where} {job_id}; stop: raywgen job stop{where} {job_id}", soft_wrap=True)
    if wait:
        _follow(client, job_id)


@app.command()
def status(job_id: Id, address: Address = None) -> None:
    """Show a job's state, and its progress if the run folder can be read from here.

    raywgen job status raysubmit_X1y2Z3
    """
    from raywgen.cluster.connect import connect
    from raywgen.cluster.submit import OUT, find

    client = connect(address)
    found = find(client, job_id)
    out.print(f"{job_id}: {found.status}", highlight=False)
    out.print(f"command: {plain(found.entrypoint)}", highlight=False, soft_wrap=True)
    if found.message:
        out.print(f"message: {plain(found.message)}", highlight=False, soft_wrap=True)
    if lines := _run_lines((found.metadata or {}).get(OUT)):
        _print_lines(lines)
    elif lines := client.get_job_logs(job_id).strip().splitlines():
        out.print(f"last line: {plain(lines[-1].strip())}", highlight=False, soft_wrap=True)


@app.command()
def logs(
    job_id: Id,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Print the log until the job ends.")] = False,
) -> None:
    """Print a job's log, the lines that the command would print here."""
    from raywgen.cluster.connect import connect
    from raywgen.cluster.submit import find

    client = connect(address)
    find(client, job_id)
    if follow:
        _follow(client, job_id)
    else:
        sys.stdout.write(client.get_job_logs(job_id))


@app.command()
def stop(job_id: Id, address: Address = None) -> None:
    """Stop a job. Training up to the last checkpoint is kept, and the same command continues from there."""
    from raywgen.cluster.connect import connect
    from raywgen.cluster.submit import find
    from raywgen.cluster.submit import stop as end

    client = connect(address)
    state = end(client, job_id)
    out.print(f"{job_id}: {state}", highlight=False)
    if state == "STOPPED":
        out.print(f"submitted again, it goes on: {plain(find(client, job_id).entrypoint)}", soft_wrap=True)


@app.command("list")
def list_jobs(address: Address = None) -> None:
    """List the jobs that the cluster knows, newest first."""
    from raywgen.cluster.connect import connect

    table = Table("job", "state", "begun", "command")
    jobs = [job for job in connect(address).list_jobs() if job.submission_id]
    for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True):
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
        table.add_row(job.submission_id, str(job.status), begun, plain(job.entrypoint))
    out.print(table)


def run_status_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, a path or URI: the `out` of `raywgen train`.")
    ],
    follow: Annotated[bool, typer.Option("--follow", help="Show it again whenever it changes, until the end.")] = False,
) -> None:
    """Show the progress of a run from its folder alone, without Ray, also while it runs.

    raywgen status runs/igpg --follow

    It says the stage, step, loss, rate and time left, the newest checkpoint, how many workers there are and were, and
    why they were started again.
    """
    from raywgen.training.status import run_status

    status = run_status(run)
    _print_lines(status.lines())
    with keeping("the run itself goes on"):
        while follow and not status.done:
            time.sleep(_FOLLOW_SECONDS)
            before, status = status, run_status(run)
            if (status.step, status.stage, status.done, status.starts) != (
                before.step,
                before.stage,
                before.done,
                before.starts,
            ):
                out.print()
                _print_lines(status.lines())


def _run_lines(folder: str | None) -> list[str]:
    """Describes the progress of a job's run; empty if its folder cannot be read from here."""
    if not folder:
        return []
    # Imported late: torch takes seconds.
    from raywgen.storage import Storage, StorageError
    from raywgen.training.run_folder import CONFIG
    from raywgen.training.status import run_status

    try:
        return run_status(folder).lines() if Storage.at(folder).size(CONFIG) is not None else []
    except (StorageError, OSError):
        return []


def _follow(client: object, job_id: str) -> None:
    from raywgen.cluster.submit import follow

    with keeping(
        f"{job_id} goes on; `raywgen job logs {job_id} --follow` shows it, `raywgen job stop {job_id}` ends it"
    ):
        state = follow(client, job_id, sys.stdout.write)  # pyright: ignore[reportArgumentType]
    out.print(f"{job_id}: {state}", highlight=False)
    if state != "SUCCEEDED":
        sys.exit(1)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        out.print(plain(line), highlight=False, soft_wrap=True)
