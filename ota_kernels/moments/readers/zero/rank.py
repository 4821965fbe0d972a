"""One rank's file of a DeepSpeed ZeRO checkpoint: the state of its optimizer, whichever stage wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import InputError
from ....io.header import quoted
from ....io.inert import Inert
from ..eight_bit import NESTED
from ..state import State, as_number
from . import files
from .files import LABEL


@dataclass(frozen=True)
class Rank:
    """The file of one rank.

    state: its optimizer_state_dict; base: the state dict of the torch optimizer in it, {"state": by flat
    group, "param_groups": [...]}; spreads: whether every parameter is cut into one share per rank (ZeRO-3);
    is_lean: whether padding was cut off ("elastic checkpoints"); round_robin: whether ZeRO-2 dealt the
    parameters out to the ranks instead of keeping their order (round_robin_gradients).
    """

    path: Path
    state: Mapping[str, Any]
    base: Mapping[str, Any]
    spreads: bool
    is_lean: bool
    round_robin: bool

    @classmethod
    def load(cls, path: Path) -> Rank:
        """Raises InputError for a file that holds no state of a ZeRO optimizer."""
        where = f"{LABEL}: {path}"
        content = files.load(path)
        state = content.get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise InputError(f"{where}: has no dict optimizer_state_dict: was it written by ZeRO?")
        if state.get("ds_zero_partition_groups") is not None:
            raise InputError(f"{where}: experts spread over ranks are not supported")
        spreads = "fp32_flat_groups" in state
        key = "optimizer_state_dict" if spreads else "base_optimizer_state"
        base = state.get(key)
        is_lean = isinstance(base, list)
        if is_lean:
            base = {"state": dict(enumerate(base)), "param_groups": []}
        if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
            raise InputError(f"{where}: {key} is not an optimizer's state: was it written by ZeRO-1, 2 or 3?")
        check_param_groups(base.get("param_groups"), where)
        return cls(path, state, base, spreads, is_lean, files.is_round_robin(content))

    @property
    def where(self) -> str:
        return f"{LABEL}: {self.path}"

    @property
    def partition_counts(self) -> list[int]:
        """How many ranks share each flat group. Raises InputError where the file does not say."""
        counts = self.state.get("partition_count")
        counts = counts if isinstance(counts, list) else [counts]
        if not counts or not all(isinstance(count, int) for count in counts):
            raise InputError(f"{self.where}: has no partition_count: was it written by ZeRO-1, 2 or 3?")
        return counts

    @property
    def group_count(self) -> int:
        """Flat groups: one for each param_group in ZeRO-1 and 2, several in ZeRO-3."""
        if self.is_lean:
            return len(self.base["state"])
        return sum(len(group["params"]) for group in self.base["param_groups"])

    def partition(self, index: int) -> State | None:
        """What the optimizer keeps for flat group `index`; None where it was never stepped."""
        values = self.base["state"].get(index)
        where = f"{self.where}: group {index}"
        if values is not None and not isinstance(values, dict):
            raise InputError(f"{where}: is not a dict of an optimizer's state")
        if not values:
            return None
        nested = values.get(NESTED)
        values = values | nested if isinstance(nested, dict) else values
        kept = {key: value for key, value in values.items() if key != NESTED}
        return State(kept, self.path, where, param_group(self.base["param_groups"], index))

    @property
    def common_step(self) -> float | None:
        """Steps taken, which lean checkpoints say for all groups."""
        return as_number(self.state.get("base_optimizer_state_step"), f"{self.where}: step")

    def padding(self, index: int) -> int | None:
        """Elements at the end of the partition that are no parameter's; None where the file does not say."""
        return 0 if self.is_lean else self._of_group("group_paddings", index, int)

    def gaps(self, index: int, parameters: int) -> list[int]:
        """Padding behind each parameter of a flat group (`parameter_alignment`); none in older files."""
        gaps = self._of_group("param_alignment_paddings", index, list)
        if gaps is None:
            return [0] * parameters
        if len(gaps) != parameters or not all(isinstance(gap, int) and gap >= 0 for gap in gaps):
            raise InputError(
                f"{self.where}: param_alignment_paddings of group {index} is not one number for each of "
                f"its {parameters} parameters"
            )
        return gaps

    def listed_fragments(self, index: int) -> dict[str, tuple[int, int]] | None:
        """(offset, elements) of each parameter in this partition as the file lists them, or None.

        With round_robin_gradients DeepSpeed (0.19.8) lists places in the order before the deal, where the
        values do not lie; the model's file names them in the order after it.
        """
        mapping = None if self.round_robin else self._of_group("param_slice_mappings", index, dict)
        if mapping is None:
            return None
        places = {name: address.attributes for name, address in mapping.items() if isinstance(address, Inert)}
        return {name: (place.get("start"), place.get("numel")) for name, place in places.items()}

    def _of_group(self, key: str, index: int, kind: type) -> Any:
        """Entry `index` of a list with one for each flat group; None in files that have no such list."""
        entries = self.state.get(key)
        if entries is None:
            return None
        if not isinstance(entries, list) or len(entries) <= index or not isinstance(entries[index], kind):
            raise InputError(
                f"{self.where}: {key} has no {kind.__name__} for group {index}: {quoted(entries)}"
            )
        return entries[index]


def check_param_groups(groups: Any, where: str) -> None:
    """Raise InputError unless `groups` is a list of an optimizer's param_groups."""
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise InputError(f"{where}: param_groups is not a list of an optimizer's groups")


def param_group(groups: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The one of param_groups that holds flat group `index`; empty where none does."""
    return next((group for group in groups if index in group["params"]), {})
