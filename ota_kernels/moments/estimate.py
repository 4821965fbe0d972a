"""The empirical Fisher diagonal of a causal language model: F_i = 1/N sum_n (dL_n / dw_i)^2.

L_n is the loss of sample n by itself: the mean over its tokens, from the second on, of the negative log
likelihood of the token given those before it, in float32 from the model's logits; labels are the text's own
tokens. Each sample's gradient is squared before anything is averaged (batches of one), which is what the
Fisher diagonal asks for: the square of a batch's mean gradient shrinks with the batch. The model is in
evaluation mode, so there is no dropout. A parameter that is used twice (tied embeddings) has one gradient,
the sum of both uses. One that a sample does not reach (an expert that no token is routed to) has gradient 0.

Memory: the weights (4 bytes per parameter in float32, 2 in bfloat16), one sample's activations and logits (a
few times tokens x vocabulary x 4 bytes), and the largest gradients: each is squared, added and dropped as
soon as backward has it. The sums take 4 bytes per parameter: on the CPU in a mapped file, which the system
may write out and drop; on a GPU beside the weights. On the disk they take 8 bytes per parameter until OUT is
there.

Sums are float32. N terms that are all positive lose less than N 2^-24 of their sum, 1.5e-5 for 256 samples,
where the mean of 256 random samples is itself uncertain by more than a percent; float64 sums would double
memory and disk traffic for digits that are noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import __version__
from ..errors import BackendError, InputError, OutputError, RecipeError, RunError
from ..io.header import read_header
from ..io.hub import resolve_model
from ..io.reader import FILE_SUFFIX, Checkpoint
from . import causal_lm
from .adapter_weights import add_adapter
from .readers.adapter import config_of
from .samples import Drawn, Sample, draw
from .sums import Sums, check_unfinished, remove_finished

DTYPES = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
# A commit writes all sums. A kill loses what was computed since the last one: half a minute, or longer where
# commits at that pace would take more than this share of the time.
COMMIT_SECONDS = 30.0
COMMIT_SHARE = 0.05

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Summary:
    """What an estimate did.

    samples: N; tokens: predicted ones, over all samples; cut: samples that were longer than `max_length`;
    skipped: texts of less than two tokens; elements: of the curvature; resumed: samples of an earlier run.
    """

    out: Path
    samples: int
    tokens: int
    cut: int
    skipped: int
    elements: int
    resumed: int


def estimate(
    model: str | os.PathLike,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    samples: int = 256,
    max_length: int = 512,
    text_key: str = "text",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Write the empirical Fisher diagonal of `model` on texts of `data` to `out`, as curvature for a merge.

    model: a folder that transformers loads, with its tokenizer, or a hub id, or "base+adapter" of two of
    them, the second a LoRA adapter; data: JSON lines with a string
    under text_key, of which `samples` are drawn at random by `seed` (all, where there are less) and cut after
    max_length tokens; out: a .safetensors file: float32 >= 0, named as the model's tensors. Its metadata has
    neither step nor beta2, because nothing decays in a mean: `bias_correction` in a recipe is an error for
    it. dtype: of weights and gradients; bfloat16 has 8 significant bits. resume: go on with an estimate that
    was stopped, to the same result (bit for bit on a CPU with the same number of threads). progress: told how
    many samples of how many are done.

    Raises RecipeError for an option, InputError for a model or data that cannot be used or gradients that are
    not finite, OutputError for `out`, BackendError without the GPU that was asked for, RunError (resumable)
    while running.
    """
    _check_options(samples, max_length, seed, dtype)
    target, out, data = _device(device), Path(out).resolve(), Path(data)
    _check_out(out, resume=resume, overwrite=overwrite)
    transformers = causal_lm.import_transformers()
    folder, adapter = _models(os.fspath(model))
    checkpoint = Checkpoint.open(folder, str(model))
    _check_apart(out, [*checkpoint.files, *(adapter.files if adapter else ()), data])
    tokenize = causal_lm.load_tokenizer(transformers, folder)
    drawn = draw(data, tokenize, count=samples, max_length=max_length, text_key=text_key, seed=seed)
    causal_lm.check_samples(causal_lm.load_config(transformers, folder), drawn, folder, data)

    fingerprint = _fingerprint(checkpoint, adapter, drawn, dtype, target.type)
    if resume and _metadata(out).get("fingerprint") == fingerprint:
        remove_finished(out, fingerprint)
        elements = sum(info.numel for info in read_header(out).tensors.values())
        return _summary(out, drawn, elements, resumed=len(drawn.samples))
    if out.exists() and not overwrite:
        raise OutputError(f"{out} is another estimate or file: choose another name, or add --overwrite")
    with Sums(out, fingerprint, resume=resume, overwrite=overwrite) as sums:
        resumed = sums.done
        try:
            loaded = causal_lm.load_model(transformers, folder, getattr(torch, dtype)).to(target)
            parameters = causal_lm.named_as_stored(loaded, checkpoint)
            if adapter is not None:
                add_adapter(parameters, adapter)
            shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            sums.allocate(shapes, _new_metadata(len(drawn.samples), fingerprint))
            _add_all(loaded, parameters, drawn.samples, sums, data, progress or _silent)
        except torch.OutOfMemoryError as error:
            raise RunError(
                "the GPU has too little memory: try a smaller --max-length, --dtype bfloat16 or --device cpu"
            ) from error
        sums.publish()
    elements = sum(parameter.numel() for parameter in parameters.values())
    return _summary(out, drawn, elements, resumed)


def _silent(done: int, total: int) -> None:
    """A Progress that shows nothing."""


def _check_options(samples: int, max_length: int, seed: int, dtype: str) -> None:
    for name, value, least in (("samples", samples, 1), ("max-length", max_length, 2), ("seed", seed, 0)):
        if value < least:
            raise RecipeError(f"--{name} must be at least {least}, not {value}")
    if dtype not in DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}: choose {' or '.join(DTYPES)}")


def _device(name: str) -> torch.device:
    if name not in DEVICES:
        raise RecipeError(f"unknown device {name!r}: choose {', '.join(DEVICES)}")
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise BackendError("--device cuda: torch finds no GPU here; --device cpu runs without")
    return torch.device("cuda" if found and name != "cpu" else "cpu")


def _check_out(out: Path, *, resume: bool, overwrite: bool) -> None:
    if out.suffix != FILE_SUFFIX:
        raise OutputError(f"the output {out} must be a {FILE_SUFFIX} file: that is what a merge reads")
    if out.is_dir():
        raise OutputError(f"the output {out} is a folder; name a file")
    if out.exists() and not (resume or overwrite):
        raise OutputError(f"the output {out} exists: choose another name, or add --overwrite")
    check_unfinished(out, resume=resume, overwrite=overwrite)


def _check_apart(out: Path, inputs: list[Path]) -> None:
    if any(out == path.resolve() for path in inputs):
        raise OutputError(f"the output {out} is an input too: choose another name")


def _models(text: str) -> tuple[Path, Checkpoint | None]:
    """The folder of the model, and the adapter of "base+adapter"."""
    base, plus, adapter = text.rpartition("+")
    if not plus or os.path.exists(os.path.expanduser(text)):
        return resolve_model(text), None
    return resolve_model(base), Checkpoint.open(resolve_model(adapter), f"adapter {adapter}")


def _fingerprint(
    checkpoint: Checkpoint, adapter: Checkpoint | None, drawn: Drawn, dtype: str, device: str
) -> str:
    """Changes whenever the result might: the weights' files, the samples' tokens, how they are computed."""
    parts = [__version__, checkpoint.fingerprint(), checkpoint.config, dtype, device]
    parts += [adapter.fingerprint(), config_of(adapter.root)] if adapter is not None else []
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for sample in drawn.samples:
        digest.update(len(sample.ids).to_bytes(8, "little") + sample.ids.tobytes())
    return digest.hexdigest()


def _new_metadata(samples: int, fingerprint: str) -> dict[str, str]:
    return {"format": "pt", "source_format": "fisher", "samples": str(samples), "fingerprint": fingerprint}


def _metadata(out: Path) -> dict[str, str]:
    """That of the file at `out`; empty where there is none that can be read."""
    try:
        return read_header(out).metadata
    except InputError:
        return {}


def _summary(out: Path, drawn: Drawn, elements: int, resumed: int) -> Summary:
    return Summary(out, len(drawn.samples), drawn.predicted, drawn.cut, drawn.skipped, elements, resumed)


def _add_all(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    samples: tuple[Sample, ...],
    sums: Sums,
    data: Path,
    progress: Progress,
) -> None:
    """Add the squared gradients of the samples that `sums` lacks; commit now and then and at the end."""
    squares = _Squares(parameters, sums)
    committed, interval = time.monotonic(), COMMIT_SECONDS
    progress(sums.done, len(samples))
    for done, sample in enumerate(samples[sums.done :], start=sums.done + 1):
        try:
            squares.add(model, sample, f"{data}: line {sample.line}")
        except InputError:
            sums.remove()  # nothing to resume: the model or the data must change
            raise
        progress(done, len(samples))
        if done == len(samples):
            squares.commit(done)
        elif time.monotonic() - committed >= interval:
            started = time.monotonic()
            squares.commit(done)
            squares.load()
            committed = time.monotonic()
            interval = max(COMMIT_SECONDS, (committed - started) / COMMIT_SHARE)


class _Squares:
    """Squares the gradients of `parameters` as backward makes them, and adds them to `sums`."""

    def __init__(self, parameters: dict[str, nn.Parameter], sums: Sums) -> None:
        self._parameters, self._sums = parameters, sums
        self._mapped: dict[str, Tensor] = {}  # the file's memory
        self._totals: dict[str, Tensor] = {}  # that memory, or its copy beside the weights
        self._square_sum = torch.zeros((), device=next(iter(parameters.values())).device)  # of all gradients
        self.load()
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(self._hook(name))

    def load(self) -> None:
        """Go on from the last commit."""
        self._totals = {}  # the GPU may not have room for two
        self._mapped = {name: torch.from_numpy(array) for name, array in self._sums.open().items()}
        self._totals = {name: total.to(self._parameters[name].device) for name, total in self._mapped.items()}

    def _hook(self, name: str) -> Callable[[nn.Parameter], None]:
        def square(parameter: nn.Parameter) -> None:
            gradient = parameter.grad.float()
            parameter.grad = None
            self._totals[name].addcmul_(gradient, gradient)
            self._square_sum += torch.linalg.vector_norm(gradient).square()

        return square

    def add(self, model: nn.Module, sample: Sample, where: str) -> None:
        """One sample's loss and backward. InputError, naming `where`, if a square is not finite."""
        loss = _loss(model, torch.from_numpy(sample.ids).to(self._square_sum.device))
        loss.backward()
        # The sum of all squares is not finite once one of them is not, so one number speaks for all.
        if not torch.isfinite(self._square_sum + loss.detach()):
            raise InputError(
                f"{where}: the loss is {loss.item():.4g}, its squared gradients not finite: "
                "remove the line, or look for NaN in the model"
            )

    def commit(self, done: int) -> None:
        for name, mapped in self._mapped.items():
            if mapped is not self._totals[name]:
                mapped.copy_(self._totals[name])
        self._sums.commit(done)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of ids[1:], in float32. ids: int64[n]."""
    batch = ids[None]
    logits = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits[0]
    return cross_entropy(logits[:-1].float(), ids[1:])
