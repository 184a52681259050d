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
    position.py   how far a run is, by the names of its checkpoints
    patience.py   tries again what a storage has refused
"""

from typing import TYPE_CHECKING

from raywgen.lazy import lazy_names

if TYPE_CHECKING:
    from raywgen.training.checkpoints.errors import CheckpointError as CheckpointError
    from raywgen.training.checkpoints.errors import CheckpointWarning as CheckpointWarning
    from raywgen.training.checkpoints.errors import SaveError as SaveError
    from raywgen.training.checkpoints.fits import check_fits as check_fits
    from raywgen.training.checkpoints.group import Alone as Alone
    from raywgen.training.checkpoints.group import Group as Group
    from raywgen.training.checkpoints.group import agree_on_folder as agree_on_folder
    from raywgen.training.checkpoints.index import INDEX as INDEX
    from raywgen.training.checkpoints.index import TrainState as TrainState
    from raywgen.training.checkpoints.manager import CheckpointManager as CheckpointManager
    from raywgen.training.checkpoints.manager import Retention as Retention
    from raywgen.training.checkpoints.position import CHECKPOINTS as CHECKPOINTS
    from raywgen.training.checkpoints.reader import Checkpoint as Checkpoint
    from raywgen.training.checkpoints.slices import Part as Part
    from raywgen.training.checkpoints.slices import Slice as Slice
    from raywgen.training.checkpoints.slices import own_slices as own_slices

if not TYPE_CHECKING:  # Type checkers would take any name for one that is there.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "raywgen.training.checkpoints.errors": ["CheckpointError", "CheckpointWarning", "SaveError"],
            "raywgen.training.checkpoints.fits": ["check_fits"],
            "raywgen.training.checkpoints.group": ["Alone", "Group", "agree_on_folder"],
            "raywgen.training.checkpoints.index": ["INDEX", "TrainState"],
            "raywgen.training.checkpoints.manager": ["CheckpointManager", "Retention"],
            "raywgen.training.checkpoints.position": ["CHECKPOINTS"],
            "raywgen.training.checkpoints.reader": ["Checkpoint"],
            "raywgen.training.checkpoints.slices": ["Part", "Slice", "own_slices"],
        },
    )
