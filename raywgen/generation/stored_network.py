"""A network in one or several files of weights: put into a module, and written again with some tensors replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raywgen.corpus.errors import CorpusError
from raywgen.corpus.sharded import is_index, read_weight_map
from raywgen.files import in_one_step, remedy, sync, sync_folder
from raywgen.out_folder import local_file, local_out
from raywgen.weights import WeightsError, load_state_dict, save_state_dict
from raywgen.weights.kinds import weights_suffix
from raywgen.weights.names import plain_names
from raywgen.weights.safetensors_stream import SafetensorsError, in_dtype, overwrite_tensors, stored_names
from raywgen.weights.safetensors_writer import read_metadata

_SAFETENSORS = ".safetensors"
_COUNTER = "num_batches_tracked"
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNetwork:
    """The files of one network.

    Attributes:
        path: The path that the user gave.
        files: The files that hold its tensors.
        index: The index of several files; None for a network of one.
    """

    path: str
    files: tuple[Path, ...]
    index: Path | None = None

    @classmethod
    def at(cls, path: str) -> StoredNetwork:
        """Finds the files of a network.

        Args:
            path: A file of weights, the index of several, or a folder with such an index.

        Raises:
            WeightsError: There is no such file, a folder has no index or several, or a file that an index names is
                missing.
        """
        place = Path(_local(path))
        if place.is_dir():
            found = [one for one in sorted(place.iterdir()) if is_index(one.name)]
            if len(found) != 1:
                raise WeightsError(
                    f"{path} is a folder with {len(found)} indices of networks; name the file of the network, or its "
                    "model.safetensors.index.json"
                )
            place = found[0]
        if not is_index(place.name):
            return cls(path=path, files=(place,))
        try:
            names = read_weight_map(str(place.absolute())).values()
        except CorpusError as error:
            raise WeightsError(str(error)) from error
        files = tuple(place.parent / name for name in dict.fromkeys(names))
        if missing := [file for file in files if not file.is_file()]:
            raise WeightsError(f"{missing[0]} is missing, {place} names it; fetch it again")
        return cls(path=path, files=files, index=place)

    @property
    def is_safetensors(self) -> bool:
        """Whether all files are safetensors, of which tensors can be replaced at their places."""
        return all(file.name.lower().endswith(_SAFETENSORS) for file in self.files)

    @property
    def network_name(self) -> str:
        """The architecture's name that generation wrote into the metadata; empty without one."""
        return read_metadata(self.files[0]).get("network", "") if self.is_safetensors else ""

    def load_into(self, module: nn.Module, network: str) -> dict[str, str]:
        """Reads all tensors into a module, one file at a time.

        Args:
            module: A module with exactly these tensors; wrappers in the names are ignored.
            network: Name of the architecture, for messages.

        Returns:
            The stored name of each tensor of the module that is stored.

        Raises:
            WeightsError, UnsafeFileError: A file is missing, damaged or of another kind, or the module has other
                tensors.
        """
        own = module.state_dict()
        own_names = dict(zip(plain_names(list(own)), own, strict=True))
        names = [name for file in self.files for name in load_state_dict(file)]
        stored = dict(zip(plain_names(names), names, strict=True))
        self._check_names(own_names, stored, network)
        targets = {name: own_names[plain] for plain, name in stored.items()}
        for file in self.files:
            state = {targets[name]: tensor for name, tensor in load_state_dict(file).items()}
            for name, tensor in state.items():
                _check_fits(self.path, name, tensor, own[name], network)
            module.load_state_dict(state, strict=False)
        return {target: name for name, target in targets.items()}

    def target(self, out: str) -> Path:
        """Returns the file, or for several the folder, that `write` writes; by default a new one beside the network.

        Raises:
            OutError: `out` is a URI, a folder for a network of one file, or a file or a folder that nobody meant for
                one of several.
            WeightsError: Something else than the network is there already, or `out` would be of another kind.
        """
        place = self.files[0] if self.index is None else self.index.parent
        if not out:
            place = place if place.name else place.absolute()
            name = place.name if self.index is not None else place.name.removesuffix(weights_suffix(place.name))
            out = str(place.with_name(f"{name}-statistics{'' if self.index is not None else _SAFETENSORS}"))
        if self.index is None:
            target = Path(local_file(out, "network.safetensors", "raywgen statistics"))
            if not target.name.lower().endswith(_SAFETENSORS):
                raise WeightsError(f"out={out}: networks are written as .safetensors; give such a name")
        else:
            target = Path(_local(out))
            target = target.parent if is_index(target.name) else target
            if not self.is_at(target):
                local_out(str(target), "network", "raywgen statistics")
            if not self.is_safetensors:
                raise WeightsError(
                    f"{self.path}: several torch files are not written again; convert them to safetensors"
                )
        if target.exists() and not self.is_at(target):
            raise WeightsError(f"out={target} exists already; name another place, or remove it first")
        return target

    def is_at(self, target: Path) -> bool:
        """Whether the network itself lies at a place."""
        place = self.files[0] if self.index is None else self.index.parent
        return target.exists() and place.exists() and target.samefile(place)

    def write(self, target: Path, tensors: Mapping[str, Tensor]) -> None:
        """Writes the network with some tensors replaced; all other bytes of safetensors files stay as they are.

        Files get their names when all are complete.

        Args:
            target: As `target` returns it.
            tensors: New values by stored name.

        Raises:
            WeightsError: The disk is full, the folder cannot be written, or a dtype cannot hold a value.
        """
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.index is not None:
                self._write_several(target, tensors)
            elif self.is_safetensors:
                with in_one_step(target) as partial:
                    _copy(self.files[0], partial, tensors)
                    if self.is_at(target):
                        shutil.copymode(target, partial)
            else:
                state = load_state_dict(self.files[0])
                new = {name: in_dtype(tensors[name], state[name].dtype, name) for name in state if name in tensors}
                save_state_dict(state | new, target, {})
        except (OSError, SafetensorsError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            raise WeightsError(
                f"cannot write {target}: {reason}; {remedy(error)} and run the same command again"
            ) from error

    def _write_several(self, target: Path, tensors: Mapping[str, Tensor]) -> None:
        assert self.index is not None
        is_new = not target.exists()
        folder = target.with_name(f".{target.name}.{os.getpid()}") if is_new else target / f".statistics.{os.getpid()}"
        folder.mkdir()
        try:
            changed = [file for file in self.files if is_new or not tensors.keys().isdisjoint(stored_names(file))]
            for file in changed:
                _copy(file, folder / file.name, tensors)
                sync(folder / file.name)
            if is_new:
                shutil.copyfile(self.index, folder / self.index.name)
                sync(folder / self.index.name)
                folder.rename(target)
            else:
                for file in changed:
                    shutil.copymode(file, folder / file.name)
                    (folder / file.name).replace(target / file.name)
                folder.rmdir()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        sync_folder(target)
        sync_folder(target.parent)

    def _check_names(self, own: Mapping[str, str], stored: Mapping[str, str], network: str) -> None:
        missing = [name for name in own if name not in stored and not name.endswith(_COUNTER)]
        unknown = [name for name in stored if name not in own]
        if not missing and not unknown:
            return
        lacks = f"it lacks {_listed(missing)}" if missing else ""
        beyond = f"the network has no {_listed(unknown)}" if unknown else ""
        raise WeightsError(
            f"{self.path} does not fit network={network}: {' and '.join(filter(None, (lacks, beyond)))}; name the "
            "architecture, with its arguments, that these weights are of"
        )


def _local(path: str) -> str:
    """Returns a path of this machine.

    Raises:
        WeightsError: It is empty or a URI.
    """
    if not path.strip() or "://" in path:
        raise WeightsError(f"'{path}' is no path of this machine; fetch the network first, and give its local path")
    return path


def _copy(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    shutil.copyfile(source, target)
    overwrite_tensors(target, {name: tensors[name] for name in stored_names(target) if name in tensors})


def _check_fits(path: str, name: str, tensor: Tensor, own: Tensor, network: str) -> None:
    if tensor.shape != own.shape:
        raise WeightsError(
            f"{path} does not fit network={network}: '{name}' has shape {list(tensor.shape)}, the network's "
            f"{list(own.shape)}; name the architecture, with its arguments, that these weights are of"
        )
    if torch.is_floating_point(own) and not torch.is_floating_point(tensor):
        raise WeightsError(f"{path}: '{name}' is {tensor.dtype}, a packed form that no module runs on; unpack it first")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_MOST_NAMED]) + more
