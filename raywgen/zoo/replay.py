"""Trains a trajectory again from its recorded facts, with the same result to the last bit."""

from __future__ import annotations

import torch

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.manifest import MANIFEST
from raywgen.stored_config import stored_config
from raywgen.tasks import Recorded, build_network, build_task, fit
from raywgen.weights import StateDict
from raywgen.zoo.config import ZooConfig
from raywgen.zoo.plan import ZooStack, plan_zoo
from raywgen.zoo.stacks import fit_networks, training_data, trajectory_id_of


def replay(corpus: Corpus, trajectory_id: str) -> dict[int, StateDict]:
    """Trains the stack in which a trajectory was trained, from its start.

    The whole stack is trained, because the number of networks in a matrix product decides the last bits of each.

    Returns:
        The weights of the trajectory by step.

    Raises:
        CorpusError: The corpus is no zoo, or does not hold the trajectory.
    """
    config, stack, index = _find(corpus, trajectory_id)
    tasks = [build_task(spec.task_recipe) for spec in stack.trajectories]
    recorded = fit_networks(stack, config, tasks)
    return _of(recorded, index)


def go_on(corpus: Corpus, trajectory_id: str, step: int) -> dict[int, StateDict]:
    """Continues the training of a trajectory's stack from a stored step, with its stored optimiser state.

    Returns:
        The weights of the trajectory by step.

    Raises:
        CorpusError: The corpus is no zoo, does not hold the trajectory, or has no optimiser tensors.
    """
    config, stack, index = _find(corpus, trajectory_id)
    tasks = [build_task(spec.task_recipe) for spec in stack.trajectories]
    ids = [f"{trajectory_id_of(stack, n, task.id)}/step-{step}" for n, task in enumerate(tasks)]
    if step and corpus.select(checkpoint_id=f"{ids[0]}/optimizer").num_rows == 0:
        raise CorpusError(
            f"{corpus.location} keeps no optimiser tensors of step {step}; train with keep_optimizer=true"
        )
    states = [corpus.state_dict(name) for name in ids]
    optimizers = [corpus.state_dict(f"{name}/optimizer") for name in ids] if step else []
    start = Recorded(step=step, state_N=_stacked(states), optimizer_N=_stacked(optimizers) if optimizers else {})
    recorded = fit(
        build_network(stack.start.network.recipe),
        start,
        training_data(tasks),
        stack.fit,
        order_seeds=[spec.order_seed for spec in stack.trajectories],
        record_steps=[later for later in config.checkpoint_steps if later >= step],
        execution=stack.execution,
    )
    return _of(recorded, index)


def _find(corpus: Corpus, trajectory_id: str) -> tuple[ZooConfig, ZooStack, int]:
    recipe = corpus.manifest["recipe"]
    if "zoo" not in recipe:
        raise CorpusError(f"{corpus.location} was not made by `raywgen zoo train`; only a zoo can be trained again")
    content = recipe["zoo"] | {"stack_size": recipe["stack_size"]}
    loaded = stored_config(ZooConfig, content, f"{corpus.location}/{MANIFEST}")
    rows = corpus.select(trajectory_id=trajectory_id)
    if rows.num_rows == 0 or "stack" not in rows.column_names:
        raise CorpusError(f"{corpus.location} holds no trajectory '{trajectory_id}'; see its facts")
    name = rows.column("stack")[0].as_py()
    for stack in plan_zoo(loaded, recipe.get("executions")).stacks:
        for index, spec in enumerate(stack.trajectories):
            if stack.name == name and trajectory_id_of(stack, index, build_task(spec.task_recipe).id) == trajectory_id:
                return loaded, stack, index
    raise CorpusError(f"{corpus.location}: '{trajectory_id}' lies in no stack of the recipe")


def _of(recorded: list[Recorded], index: int) -> dict[int, StateDict]:
    return {record.step: {name: tensor[index] for name, tensor in record.state_N.items()} for record in recorded}


def _stacked(states: list[StateDict]) -> StateDict:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}
