"""Files of B-scans as their turn comes, a few B-scans at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from monai.data import list_data_collate

from pipeline.errors import ConfigurationError, InputError, lamina_cause
from pipeline.inference.batch import BatchRun
from pipeline.oct.formats import read_oct
from pipeline.oct.volume import OctVolume

__all__ = ["BScanLoader"]


class BScanLoader:
    """The batches of a run over files of B-scans, each batch of one file.

    What `AcceptedLoader` is for inputs of one item: give it to MONAI's evaluator in place of a
    DataLoader. It has no length, and iterating again goes on with the next batch, so that an engine
    can be run again past an input that failed. The rest of a file that was rejected meanwhile is
    left. No more than one batch waits while another is at work.

    A batch holds `image` `(b, 1, h, w)` and whatever else `transform` leaves, `name` (of the input,
    the same in all items), `image_path`, `index` of the B-scan, and `bscans`, how many the file
    has. Rows that the file gives are not handed on; they stand in `volume`.

    Args:
        batch: the run, which is told of inputs that are left out.
        transform: from `image` (a B-scan `(H, W)` as stored), `white` and `scale_y_um` to what the
            network takes; `LoadBScand` comes first.
        batch_size: B-scans per step, at most.
        num_workers: threads that prepare the next batch meanwhile; 0 prepares it when asked.

    Attributes:
        volume: the file that the last batch is of; None before the first and after the last one.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    def __init__(
        self,
        batch: BatchRun,
        transform: Callable[[Mapping[str, Any]], Any],
        batch_size: int = 4,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ConfigurationError(
                f"batch_size is {batch_size} and num_workers {num_workers}; expected at least 1 "
                "and 0"
            )
        self.batch = batch
        self.transform = transform
        self.batch_size = int(batch_size)
        self.volume: OctVolume | None = None
        self._threads = ThreadPoolExecutor(num_workers, "bscan") if num_workers else None
        self._left: set[str] = set()  # of which nothing more is wanted
        self._batches: Iterator[Any] | None = None
        batch.closing.callback(self.close)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._sound()
        return next(self._batches)

    def close(self) -> None:
        """End the threads; there is no further batch."""
        self._batches = iter(())
        self.volume = None
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _sound(self) -> Iterator[Any]:
        """Yield the batches of sound files, and reject the others."""
        for part in _ahead(self._parts(), 0 if self._threads is None else 1):
            if not part.is_first and not self.batch.is_open(part.name):
                self._left.add(part.name)
                continue
            try:
                items = part.collated()
                if part.origin is not None:
                    self.batch.begin({part.name: part.origin()})
            except Exception as error:
                cause = lamina_cause(error)
                if not isinstance(cause, InputError):
                    raise
                self._left.add(part.name)
                self.batch.reject(part.name, "read", str(cause))
                continue
            self.volume = part.volume
            yield items
        self.volume = None

    def _parts(self) -> Iterator[_Part]:
        """Yield a few B-scans of a file at a time; a file that cannot be read ends with its error.

        Grey values are read in this thread, in order, as streams demand it.
        """
        for case in self.batch.pending:
            name, start = str(case["name"]), 0
            try:
                volume = read_oct(case["image"])
                count = volume.bscans.shape[0]
                for start in range(0, count, self.batch_size):
                    pixels = volume.bscans[start : min(start + self.batch_size, count)]
                    about = _about(case, volume)
                    items = [
                        self._begun(self._prepared, {**about, "image": one, "index": start + k})
                        for k, one in enumerate(pixels)
                    ]
                    origin = None if start else self._begun(self.batch.origins, case)
                    yield _Part(name, volume, items, origin)
                    if name in self._left:
                        break
            except InputError as error:
                yield _Part(name, failed=error, is_later=start > 0)

    def _begun(self, work: Callable[[Any], Any], given: Any) -> Callable[[], Any]:
        """Return what gives the result of `work`, which a thread begins at once if there is one."""
        if self._threads is None:
            return partial(work, given)
        return self._threads.submit(work, given).result

    def _prepared(self, given: Mapping[str, Any]) -> dict[str, Any]:
        item: dict[str, Any] = self.transform(given)
        return {**item, "image_path": given["image_path"]}


@dataclass(frozen=True)
class _Part:
    """A few B-scans of a file, or why they could not be read.

    Attributes:
        name: of the file.
        volume: the file.
        items: each gives a B-scan, prepared.
        origin: gives what the file's results are made from; None after its first part.
        failed: the error in place of B-scans.
        is_later: whether such an error came after the first part.
    """

    name: str
    volume: OctVolume | None = None
    items: list[Callable[[], Any]] = field(default_factory=list)
    origin: Callable[[], dict[str, Any]] | None = None
    failed: InputError | None = None
    is_later: bool = False

    @property
    def is_first(self) -> bool:
        return self.origin is not None or (self.failed is not None and not self.is_later)

    def collated(self) -> Any:
        if self.failed is not None:
            raise self.failed
        return list_data_collate([item() for item in self.items])


def _ahead(parts: Iterator[_Part], count: int) -> Iterator[_Part]:
    """Yield `parts`, of which `count` are begun before they are asked for."""
    waiting: deque[_Part] = deque()
    for part in parts:
        waiting.append(part)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _about(case: Mapping[str, Any], volume: OctVolume) -> dict[str, Any]:
    """Return what every B-scan of a file says."""
    return {
        "name": str(case["name"]),
        "image_path": str(case["image"]),
        "bscans": volume.bscans.shape[0],
        "white": float(volume.white),
        "scale_y_um": volume.scale_y_um,
    }
