"""The merge in a work folder that is open: shards, journal, engine; by one process or by several.

rank 0 makes the shards --> all see them, and read all journals --> what is found of the model, together
--> each: lots taken, merged, recorded in a journal of its own --> thresholds of the model, together
--> each: its undecided elements settled --> checksums, together --> the state, from all journals
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BackendError, RunError
from ..io import journal
from ..io.checksums import Sums
from ..io.pages import check_reads
from ..io.workfolder import WorkFolder
from ..io.writer import ShardWriter
from ..select.pending import Pending, Store
from ..tensors.result import Counts
from ..tensors.segment import Segment
from . import scale
from .copies import copied
from .decide import Decider
from .engine import Decided, Engine, Event, Merged, Range
from .found import ModelFound
from .options import Progress
from .shares import lot_bytes, lots_of, ranges_of
from .sinks import FileSink
from .state import State, record_of

if TYPE_CHECKING:
    from .job import Job


class Done(NamedTuple):
    """seconds: by stage, of this rank."""

    state: State
    decider: Decider
    checksums: Sums
    seconds: dict[str, float]


class Merging:
    """One rank's part of a job in its work folder."""

    def __init__(self, job: Job, work: WorkFolder, progress: Progress) -> None:
        self._job, self._work, self._progress = job, work, progress
        self._ranks = job.ranks
        self._begun = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def run(self) -> Done:
        """Raises RunError where the merge can go on later, InputError where inputs must change."""
        job, work, ranks = self._job, self._work, self._ranks
        several, is_first = ranks.several, ranks.rank == 0
        writer = None
        if is_first:
            work.records(job.fingerprint, job.sources_seen)  # refuses what is another merge's
            writer = ShardWriter(work.files, job.plan.layout, shared=several)
        store = Store(job.plan.candidates_memory, work.path / "candidates.bin", ranks.rank)
        try:
            if several:
                work.meet(ranks.tell, ranks.wait, is_first)
            if writer is None:
                writer = ShardWriter(work.files, job.plan.layout, create=False, shared=True)
            records = work.records(job.fingerprint, job.sources_seen)
            ranks.wait()  # journals have been read: they may grow
            state = State(_in_order(records), len(job.inputs.entries))
            with job.pool() as pool:
                decider = job.decider(pool)
                self._merge(state, records.get(ranks.rank, []), writer, store, decider)
                self._progress.stage("sync", 0)
                part = (ranks.rank, ranks.size)
                checksums = writer.checksums(pool.run, ranks.total, part)
            if several:
                ranks.wait()  # all journals are on the disk: what they say together is reported
                both = State(_in_order(work.records(job.fingerprint, job.sources_seen)), len(state.counts))
                both.fresh, state = state.fresh, both
                _check_whole(state, job)
        finally:
            if writer is not None:
                writer.close()
            store.close()
        self._lap("sync")
        return Done(state, decider, checksums, self._seconds)

    def _lap(self, stage: str) -> None:
        """Seconds since the last one."""
        self._seconds[stage] = time.perf_counter() - self._begun - sum(self._seconds.values())

    def _merge(
        self, state: State, own: list[dict], writer: ShardWriter, store: Store, decider: Decider
    ) -> None:
        """Merge and record everything; own: the records of this rank's journal."""
        job = self._job

        def sync() -> None:
            writer.sync()
            store.sync()

        log = journal.Journal(self._work.path, sync, self._ranks.rank)
        try:
            if not own:
                log.append({"fingerprint": job.fingerprint, "inputs": job.sources_seen})
            log.append(state.begin(job.backend.NAME))
            if state.found is None:
                self._progress.stage("survey", 0)
                state.found = self._agreed(scale.decide(decider, always=True))
                check_reads()
            if not any("found" in record for record in own):
                log.append({"found": asdict(state.found)})
            self._lap("survey")
            for index, thresholds in job.surveys.decided.items():
                if index not in state.decided:
                    known = Decided(index, thresholds, False)
                    log.append(record_of(known), of_data=False)
                    state.add(known)
            weights = job.inputs.bytes_per_element
            self._progress.stage("merge", job.inputs.total_bytes)
            self._progress.advance(sum(state.done_elements(i) * w for i, w in enumerate(weights)))
            engine = Engine(
                job.tensors,
                FileSink(writer, job.places, job.read_ahead, job.release),
                decider=decider,
                found=state.found,
                tile_elements=job.plan.tile_elements,
                store=store,
                decided=state.decided,
                bundles=job.bundles,
                ranks=self._ranks,
                backend=job.summing(writer),
            )
            try:
                for event in itertools.chain(self._copy(state, writer), self._events(engine, state, decider)):
                    self._ranks.check()
                    log.append(record_of(event), of_data=not isinstance(event, Decided))
                    if isinstance(event, Decided) and event.index is None:
                        job.surveys.keep({None: event.thresholds})  # before its tiles are patched
                    for segment in state.add(event):
                        done = (segment.stop - segment.start) * weights[segment.index]
                        self._progress.advance(self._ranks.done(done))
            except (KeyboardInterrupt, RunError, BackendError):
                with contextlib.suppress(RunError):
                    for event in engine.checkpoint():
                        log.append(record_of(event))
                raise
            job.surveys.keep(engine.decided)
            self._lap("merge")
        finally:
            log.close()

    def _agreed(self, found: ModelFound) -> ModelFound:
        """With the scale that rank 0 has found: hosts may round its sums in other ways."""
        told = self._ranks.tell(lambda: None if found.scale is None else asdict(found.scale))
        return replace(found, scale=None if told is None else scale.Scale(**told))

    def _events(self, engine: Engine, state: State, decider: Decider) -> Iterator[Event]:
        """Of this rank's part: tensors of which some tiles wait already, then lots that it takes."""
        ranks, waiting = self._ranks, state.pending
        by_tensor = decider.brackets and not decider.model_scope
        whose = (lambda p: p.segment.index) if by_tensor else (lambda p: p.file)
        own = [p for p in waiting if whose(p) % ranks.size == ranks.rank]
        dealt = {p.segment.index for p in waiting} if by_tensor and ranks.several else set()
        return engine.run(self._todo(state, decider, own, dealt), own)

    def _todo(
        self, state: State, decider: Decider, own: Iterable[Pending], dealt: set[int]
    ) -> Iterator[Range]:
        """dealt: tensors that are no lots, since their other tiles must be on the same rank."""
        job, ranks = self._job, self._ranks
        gaps = {i: state.gaps(i, tensor.numel) for i, tensor in job.tensors.items()}
        for index in sorted({p.segment.index for p in own} & dealt):
            yield from ((index, *gap) for gap in gaps[index])
        weights = job.inputs.bytes_per_element
        left = sum((b - a) * weights[i] for i, of_tensor in gaps.items() for a, b in of_tensor)
        most = lot_bytes(left, ranks.size) if ranks.several else sys.maxsize
        pieces = [
            piece
            for i, tensor in job.tensors.items()
            if i not in dealt
            for piece in ranges_of(decider, i, tensor, gaps[i], int(most // max(weights[i], 1)))
        ]
        lots, sizes = lots_of(pieces, weights, most if ranks.several else 0)
        for lot in ranks.take(lots, sizes):
            yield from lot

    def _copy(self, state: State, writer: ShardWriter) -> Iterator[Event]:
        """Tensors that no backend computes."""
        job = self._job
        todo = [i for i, e in enumerate(job.inputs.entries) if not e.is_computed and state.gaps(i, e.numel)]
        for index in self._ranks.take(todo, [job.inputs.entries[i].numel for i in todo]):
            entry = job.inputs.entries[index]
            for start, piece in copied(job.backend, entry, job.rules.copy_bytes):
                writer.copy(job.places[index], start, piece)
            yield Merged([(Segment(index, 0, entry.numel), Counts([]))])


def _in_order(journals: dict[int, list[dict]]) -> list[dict]:
    return [record for records in journals.values() for record in records]


def _check_whole(state: State, job: Job) -> None:
    """Nothing may be missing of what all ranks have recorded."""
    entries = job.inputs.entries
    sizes = {i: e.numel for i, e in enumerate(entries) if not e.is_computed}
    sizes |= {i: tensor.numel for i, tensor in job.tensors.items()}
    waiting = {p.segment.index for p in state.pending}
    for i, numel in sizes.items():
        if i in waiting or state.gaps(i, numel):
            name = entries[i].name
            raise RunError(f"{name} is not whole in the journals of all processes: --resume merges it")
