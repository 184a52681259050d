"""A run's checkpoints: how far it is and all that it needs to go on, whoever trains it and wherever it lies.

A checkpoint is a folder with a part from each worker, which holds slices of tensors, and an index that says where the
values of every tensor lie. The index is written last, when all parts are durable, and holds their digests, so that a
checkpoint that is damaged or half there is noticed and the one before it is taken. No worker holds more than its own
slices when a checkpoint is saved, and any number of workers reads just the ranges that they need.

    slices.py     what each worker writes
    index.py      the position of a run, its tensors, and where their values lie
    writer.py     writes a checkpoint
    reader.py     reads one
    manager.py    the checkpoints of a run folder: the newest, those that are kept, and saving beside training
    fits.py       refuses a checkpoint of another generator
    group.py      the workers that save together
    patience.py   tries again what a storage has refused
"""

from raywgen.training.checkpoints.errors import CheckpointError, CheckpointWarning, SaveError
from raywgen.training.checkpoints.fits import check_fits
from raywgen.training.checkpoints.group import Alone, Group, agree_on_folder
from raywgen.training.checkpoints.index import INDEX, TrainState
from raywgen.training.checkpoints.manager import CHECKPOINTS, CheckpointManager, Retention
from raywgen.training.checkpoints.reader import Checkpoint
from raywgen.training.checkpoints.slices import Part, Slice, own_slices

__all__ = [
    "CHECKPOINTS",
    "INDEX",
    "Alone",
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointWarning",
    "Group",
    "Part",
    "Retention",
    "SaveError",
    "Slice",
    "TrainState",
    "agree_on_folder",
    "check_fits",
    "own_slices",
]
