"""Inputs as their turn comes: the sound ones in batches, the others noted and left out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from monai.data import DataLoader, list_data_collate
from torch.utils.data import Dataset, get_worker_info

from pipeline.errors import ConfigurationError, InputError, LaminaError, lamina_cause
from pipeline.inference.batch import BatchRun
from pipeline.inference.sidecars import Origins

__all__ = ["AcceptedLoader"]


class AcceptedLoader:
    """The batches of a run over files, without the inputs that cannot be read.

    Give it to MONAI's evaluator in place of a DataLoader. Each input is read once, when its turn
    comes, and its hash is taken right behind, while the system still holds the file in memory. Both
    happen in the loader's workers where there are any. It has no length, since only its end shows
    how many inputs are sound, and it is passed through once: iterating again goes on with the next
    batch, so that an engine can be run again past an input that failed.

    Args:
        batch: the run, which is told of inputs that are left out.
        dataset: reads `batch.pending`, in its order.
        batch_size: inputs per step; where a step fails, all of its inputs are rejected.
        num_workers: processes that read ahead; 0 reads in this one.
        settings: further arguments of MONAI's `DataLoader`.

    Raises:
        ConfigurationError: `dataset` is of another length than `batch.pending`.
    """

    def __init__(
        self,
        batch: BatchRun,
        dataset: Dataset[Any],
        batch_size: int = 1,
        num_workers: int = 0,
        **settings: Any,
    ) -> None:
        length = len(dataset)  # type: ignore[arg-type]  # torch leaves it to the subclasses
        if length != len(batch.pending):
            raise ConfigurationError(
                f"a dataset of {length} items for {len(batch.pending)} pending inputs; give "
                "it batch.pending as its data"
            )
        self._batch = batch
        self._loader = DataLoader(
            _Guarded(dataset, batch.pending, batch.origins),
            num_workers=num_workers,
            batch_size=batch_size,
            collate_fn=_collated,
            **settings,
        )
        self._loaded: Iterator[_Loaded] | None = None
        batch.closing.callback(self.close)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._loaded is None:
            self._loaded = iter(self._loader)
        while True:
            try:
                loaded = next(self._loaded)
            except Exception as error:
                # torch's own frame holds the error, and so for long the workers behind it, too
                traceback.clear_frames(error.__traceback__)
                raise
            for item in loaded.refused:
                if not isinstance(item.error, InputError):
                    raise item.error
                self._batch.reject(item.name, "read", str(item.error))
            if loaded.origins:
                self._batch.begin(loaded.origins)
                return loaded.items

    def close(self) -> None:
        """End the workers; there is no further batch."""
        self._loaded = iter(())


class _Read(NamedTuple):
    """An input that was read, and what it is made from."""

    name: str
    item: Any
    origin: dict[str, Any]


class _Refused(NamedTuple):
    """An input that was not read, and why."""

    name: str
    error: LaminaError


class _Loaded(NamedTuple):
    """One step of the loader.

    Args:
        items: of the sound inputs, collated; None where there is none.
        origins: of the sound inputs by their names.
        refused: the other inputs.
    """

    items: Any
    origins: dict[str, dict[str, Any]]
    refused: list[_Refused]


class _Guarded(Dataset[Any]):
    """A dataset whose unusable items are returned with their error, and not raised.

    Args:
        dataset: what is read.
        cases: the inputs, in the same order.
        origins: returns what the result of a case is made from.
    """

    def __init__(
        self, dataset: Dataset[Any], cases: Sequence[Mapping[str, Any]], origins: Origins
    ) -> None:
        self.dataset = dataset
        self.cases = cases
        self.origins = origins

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: Any) -> _Read | _Refused:
        case = self.cases[index]
        name = str(case["name"])
        try:
            return _Read(name, self.dataset[index], self.origins(case))
        except Exception as error:
            cause = lamina_cause(error)
            if isinstance(cause, InputError):
                return _Refused(name, InputError(str(cause)))
            if cause is None or get_worker_info() is None:
                raise
            return _Refused(name, cause)  # whole: on its way from a worker torch would rewrite it


def _collated(given: Sequence[_Read | _Refused]) -> _Loaded:
    read = [one for one in given if isinstance(one, _Read)]
    return _Loaded(
        items=list_data_collate([_given(one.item) for one in read]) if read else None,
        origins={one.name: one.origin for one in read},
        refused=[one for one in given if isinstance(one, _Refused)],
    )


def _given(item: Any) -> Any:
    """Return an item without what it lacks, such as a label: None has no batch."""
    if not isinstance(item, Mapping):
        return item
    return {key: value for key, value in item.items() if value is not None}
