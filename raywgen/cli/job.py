"""`raywgen job ...`: send jobs to a Ray cluster, watch them, stop them; `raywgen status`: how far a run is."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from raywgen.cli.settings import out
from raywgen.progress import plain

app = typer.Typer(no_args_is_help=True, help="Send jobs to a Ray cluster, watch them, stop them.")
Address = Annotated[
    str | None,
    typer.Option(help="Dashboard or head node; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else this machine."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="A job's id, as `raywgen job list` names it.")]


# What follows the job's name is the job's own.
@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def submit(
    job: Annotated[str, typer.Argument(metavar="JOB", help="A script of jobs/, such as train or generate.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGUMENT]...", help="As the job takes it.")] = None,
    address: Address = None,
    working_dir: Annotated[str, typer.Option(help="Sent to every node; holds jobs/.")] = ".",
    runtime_env: Annotated[
        str | None, typer.Option(help="YAML of what nodes install first, such as cluster/runtime_env.yaml.")
    ] = None,
    send: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="A file (or variable) that may go although it looks like a secret; repeat."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the log until the job ends.")] = True,
) -> None:
    """Send a job, after a look at cluster, token, room, and the size and secrets of what is sent.

    raywgen job submit --address http://127.0.0.1:8265 train configs/igpg/digits.yaml num_workers=8 out=/mnt/raywgen/a

    The same as `ray job submit --working-dir . -- python jobs/train.py ...`, which works too. Ends with status 1 where
    the job does not succeed.
    """
    from raywgen.cluster.connect import connect
    from raywgen.cluster.submit import Job
    from raywgen.cluster.submit import submit as submit_job

    client = connect(address)
    told = Job(name=job, arguments=arguments or [], working_dir=working_dir, runtime_env=runtime_env, send=send or [])
    submitted = submit_job(client, told)
    job_id = submitted.id
    if submitted.left_out:
        names = plain(", ".join(submitted.left_out))
        out.print(f"not sent, as secrets are kept there (send one by --send PATH): {names}", soft_wrap=True)
    out.print(f"{job_id}: {plain(told.entrypoint())}", highlight=False, soft_wrap=True)
    where = f" --address {address}" if address else ""
    out.print(f"watch: raywgen job status{where} {job_id}; stop: raywgen job stop{where} {job_id}", soft_wrap=True)
    if wait:
        _follow(client, job_id)


@app.command()
def status(job_id: Id, address: Address = None) -> None:
    """Show a job's state, and how far its run is where the run folder can be read from here.

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
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Until the job ends.")] = False,
) -> None:
    """Print a job's log: the same lines that the command prints where it is started by hand."""
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
    """End a job. What it has trained stays, up to the last checkpoint: the same command again goes on from there."""
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
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder: the `out` of `raywgen train`.")],
) -> None:
    """Show how far a run is, from its folder alone: also while it runs, without Ray.

    raywgen status runs/igpg
    """
    from raywgen.training.status import run_status

    _print_lines(run_status(run).lines())


def _run_lines(folder: str | None) -> list[str]:
    """Describes how far a job's run is; empty where its folder cannot be read from here."""
    if not folder or not Path(folder).is_dir():
        return []
    # Not before: they bring torch, for which no look at a job should wait.
    from raywgen.training.run_folder import CONFIG
    from raywgen.training.status import run_status

    return run_status(folder).lines() if (Path(folder) / CONFIG).is_file() else []


def _follow(client: object, job_id: str) -> None:
    from raywgen.cluster.submit import follow

    state = follow(client, job_id, sys.stdout.write)  # pyright: ignore[reportArgumentType]
    out.print(f"{job_id}: {state}", highlight=False)
    if state != "SUCCEEDED":
        sys.exit(1)


def _print_lines(lines: list[str]) -> None:
    for line in lines:
        out.print(plain(line), highlight=False, soft_wrap=True)
