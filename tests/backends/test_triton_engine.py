"""The Triton backend behind the engine: whole merges through the ring, tiles that are on the device already,
and what happens when memory runs out or the device fails.

Merges run on a GPU where there is one, else under Triton's interpreter, which must be chosen before Triton is
imported: then one test runs this file's classes of merges in a process of their own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import replace

import jobs
import numpy as np
import pytest
import torch
from alone import passes_interpreted
from checkpoints import assert_same_tensors, load_merged, make_set
from tolerances import assert_close

import ota_kernels
from ota_kernels import InputError, RunError, merge, plan
from ota_kernels.backends import triton
from ota_kernels.io import journal
from ota_kernels.moments.compress import compress
from ota_kernels.run.packing import pack, unpack
from ota_kernels.run.rules import Rules
from ota_kernels.select.bracket import Bracket
from ota_kernels.tensors.terms import score_bits

RUNS_HERE = triton.verify()[0]

# What a reader of errors sees; the drivers' own texts.
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 34.00 MiB."
LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later."


@pytest.mark.skipif(RUNS_HERE, reason="the merges below run in this process")
def test_under_the_interpreter():
    passes_interpreted(__file__, "OnTheDevice")


SHAPES = {
    "embed_tokens.weight": (40, 30),
    "layers.0.mlp.weight": (31, 37),
    "layers.0.norm.weight": (37,),
    "scale": (),
    "empty": (0, 3),
}
VARIANTS = {
    "density": {"density": 0.3, "normalise": "model"},
    "mass, rank 1": {"saliency_mass": 0.8, "density_scope": "tensor", "rank1_approx": True},
    "ties": {"masked_task_vector_merge_method": "ties", "ties_density": 0.4, "density": 0.5},
    "rescale": {
        "masked_task_vector_merge_method": "linear",
        "rescale": True,
        "density": [0.3, 0.6],
        "density_scope": "tensor",
    },
}
OPTIONS = {"tile_elements": 700, "threads": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("models"), SHAPES, experts=2)


def _wide(selection, scores):
    low, high = (float(np.float32(np.quantile(np.asarray(scores), q))) for q in (0.5, 0.9))
    return Bracket(low, score_bits(high) - score_bits(low))


# Every threshold is bracketed, between the scores at which densities 0.5 and 0.1 begin.
WIDE = Rules(bracket=_wide)


def assert_agree(models, one, other) -> None:
    """Two merged folders of bfloat16, element by element."""
    expected = load_merged(other)
    for name, tensor in load_merged(one).items():
        operands = torch.stack([m[name].double().abs() for m in (models.base, *models.experts)])
        edits = torch.stack([(m[name].double() - models.base[name].double()).abs() for m in models.experts])
        operand = torch.maximum(operands.amax(0), 4 * edits.amax(0))
        found, truth = (x.double().numpy() for x in (tensor, expected[name]))
        assert_close("bfloat16", found, truth, operand.numpy(), len(models.experts))


def recorded(out) -> list[dict]:
    return journal.read(out.parent / f".{out.name}.ota-merge")[0]


def waiting(out) -> int:
    """Undecided elements with operands that the journal knows of."""
    return sum(record["pending"][-1]["several"] for record in recorded(out) if "pending" in record)


class TestMergesOnTheDevice:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_are_those_of_native(self, models, tmp_path, variant):
        recipe = models.recipe(**VARIANTS[variant])
        found = merge(recipe, tmp_path / "triton", backend="triton", **OPTIONS)
        truth = merge(recipe, tmp_path / "native", backend="native", **OPTIONS)
        assert found["tensors"] == truth["tensors"]
        assert found["experts"] == truth["experts"]
        assert (found["backend"], found["backends"], truth["backends"]) == ("triton", ["triton"], ["native"])
        assert_agree(models, tmp_path / "triton", tmp_path / "native")

    def test_of_packs_are_those_of_the_experts(self, models, tmp_path):
        recipes = [models.recipe(density=0.3), models.recipe(density=0.3)]
        for t, (packed, plain) in enumerate(zip(*(r["models"] for r in recipes), strict=True)):
            packed["model"], plain["model"] = str(tmp_path / f"e{t}.pack"), str(tmp_path / f"e{t}")
            pack([models.expert_folders[t]], packed["model"], base=models.base_folder, density=0.4)
            unpack(packed["model"], plain["model"])
        for recipe, out in zip(recipes, ("packs", "experts"), strict=True):
            merge(recipe, tmp_path / out, backend="triton", **OPTIONS)
        assert_same_tensors(load_merged(tmp_path / "packs"), load_merged(tmp_path / "experts"))

    def test_of_whole_matrices_are_those_of_native(self, models, tmp_path):
        """Streamed, and of tensors that are there."""
        recipe = models.recipe("tsv", density=0.3, calibrate="svc")
        for backend in ("triton", "native"):
            merge(recipe, tmp_path / backend, backend=backend, **OPTIONS)
        assert_agree(models, tmp_path / "triton", tmp_path / "native")
        merged = ota_kernels.merge_state_dicts(
            models.base, models.experts, method="tsv", density=0.3, calibrate="svc", backend="triton"
        )
        assert_same_tensors(merged, load_merged(tmp_path / "triton"))

    def test_are_planned_with_their_pinned_memory(self, models):
        """A tile in flight takes its pages and as much pinned memory; three are in flight at least."""

        def bytes_of_tiles(**options) -> int:
            peaks = [plan(models.recipe(), tile_elements=n, **options).peak_memory for n in (10_000, 20_000)]
            return peaks[1] - peaks[0]

        native_tiles = bytes_of_tiles(backend="native", threads=4)
        assert bytes_of_tiles(backend="triton", threads=4) == 2 * native_tiles
        assert [plan(models.recipe(), backend="triton", threads=n).threads for n in (1, 3, 5)] == [3, 3, 5]

    def test_of_log8_with_brackets_are_those_of_native(self, models, tmp_path):
        compressed = [tmp_path / f"{t}.safetensors" for t in range(2)]
        for source, file in zip(models.curvature_files, compressed, strict=True):
            compress(source, file, "log8")
        recipe = models.recipe(density=0.3)
        for model, file in zip(recipe["models"], compressed, strict=True):
            model["parameters"]["preconditioner_path"] = str(file)
        found = jobs.merge(recipe, tmp_path / "triton", WIDE, backend="triton", **OPTIONS)
        truth = jobs.merge(recipe, tmp_path / "native", WIDE, backend="native", **OPTIONS)
        assert (found["tensors"], found["experts"]) == (truth["tensors"], truth["experts"])
        assert_agree(models, tmp_path / "triton", tmp_path / "native")

    def test_repair_what_is_not_finite(self, tmp_path):
        models = make_set(tmp_path / "models", SHAPES, experts=2)
        models.experts[1]["layers.0.mlp.weight"].view(-1)[[5, 900]] = torch.nan
        models.curvatures[0]["embed_tokens.weight"].view(-1)[3] = -1.0
        models.save()
        with pytest.raises(InputError, match=r"embed_tokens.weight: 1 of 1200 curvature values.*index 3"):
            merge(models.recipe(), tmp_path / "out", backend="triton", **OPTIONS)
        recipe = models.recipe(on_nonfinite="base", density=0.4)
        found = merge(recipe, tmp_path / "triton", backend="triton", **OPTIONS)
        truth = merge(recipe, tmp_path / "native", backend="native", **OPTIONS)
        assert found["repaired"] == truth["repaired"] == 3
        assert found["tensors"] == truth["tensors"]
        assert_agree(models, tmp_path / "triton", tmp_path / "native")

    def test_go_on_with_another_backend(self, models, tmp_path):
        """Masks do not depend on the backend: native settles what triton left undecided."""
        recipe = models.recipe(density=0.3)
        for backend in ("triton", "native"):
            jobs.merge(recipe, tmp_path / backend, WIDE, backend=backend, **OPTIONS)
        truth = jobs.merge(recipe, tmp_path / "truth", WIDE, backend="native")

        out, stopping = tmp_path / "out", replace(WIDE, before=jobs.Interrupt("tile", 4))
        with pytest.raises(KeyboardInterrupt):
            jobs.merge(recipe, out, stopping, backend="triton", tile_elements=700, threads=3)
        assert waiting(out) > 0  # in the file
        found = jobs.merge(recipe, out, WIDE, backend="native", resume=True)
        assert found["backends"] == ["triton", "native"]
        assert (found["tensors"], found["experts"]) == (truth["tensors"], truth["experts"])
        alone = [load_merged(tmp_path / backend) for backend in ("triton", "native")]
        for name, tensor in load_merged(out).items():
            elements = tensor.view(torch.int16)
            assert torch.stack([elements == x[name].view(torch.int16) for x in alone]).any(0).all(), name


class TestFaultsOnTheDevice:
    __test__ = RUNS_HERE

    @pytest.mark.parametrize(
        "error",
        [torch.OutOfMemoryError(OUT_OF_MEMORY), RuntimeError("CUDA error: out of memory"),
         RuntimeError("Triton Error [CUDA]: out of memory")],
        ids=str,
    )  # fmt: skip
    def test_memory_that_runs_out_leaves_fewer_slots(
        self, models, tmp_path, failing_launches, monkeypatch, caplog, error
    ):
        """Two tiles are under way, and the second one finds no room: it is merged after the first."""
        from ota_kernels.backends.triton.ring import Slot

        both, load = threading.Barrier(2), Slot.load

        def together(slot, arrays):
            if not both.broken:
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(timeout=20)
                both.abort()
            return load(slot, arrays)

        def fault(number, elements):
            if number == 2:
                raise error

        monkeypatch.setattr(Slot, "load", together)
        failing_launches += [fault]
        recipe = models.recipe(precond_threshold=1e-16)
        with caplog.at_level(logging.WARNING, "ota_kernels"):
            report = merge(recipe, tmp_path / "out", backend="triton", **OPTIONS)
        assert [m for m in caplog.messages if "tiles in flight" in m and "out of memory" in m]
        truth = merge(recipe, tmp_path / "native", backend="native")
        assert report["tensors"] == truth["tensors"]
        assert_agree(models, tmp_path / "out", tmp_path / "native")

    def test_a_tile_without_room_is_halved(self, models, tmp_path, failing_launches, monkeypatch):
        from ota_kernels.backends.triton import backend

        monkeypatch.setattr(backend, "_SMALLEST_TILE", 100)
        sizes = []

        def fault(number, elements):
            sizes.append(elements)
            if elements > 400:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)

        failing_launches += [fault]
        recipe = models.recipe(density=0.3)
        report = merge(recipe, tmp_path / "out", backend="triton", tile_elements=1200, threads=4)
        truth = merge(recipe, tmp_path / "native", backend="native")
        assert report["tensors"] == truth["tensors"]
        assert_agree(models, tmp_path / "out", tmp_path / "native")
        assert max(sizes) == 1200
        assert {300, 600} < set(sizes)

    def test_a_small_tile_without_room_is_an_error(self, models, tmp_path, failing_launches):
        def fault(number, elements):
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

        failing_launches += [fault]
        with pytest.raises(
            RunError, match=r"no room for a tile of .*34.00 MiB.*--resume with --backend native"
        ):
            merge(models.recipe(precond_threshold=1e-16), tmp_path / "out", backend="triton", **OPTIONS)

    @pytest.mark.parametrize("kind", ["lost", "compile", "resources", "compiler"])
    def test_other_faults_end_in_a_line_and_the_journal_resumes(
        self, models, tmp_path, failing_launches, kind
    ):
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources

        error, words = {
            "lost": (RuntimeError(LOST), "an illegal memory access"),
            "compile": (CompilationError("a = b\nc = d", None, "no such op"), "does not compile: no such op"),
            "resources": (
                OutOfResources(300_000, 200_000, "shared memory"),
                "out of resource: shared memory",
            ),
            "compiler": (FileNotFoundError(2, "No such file", "ptxas"), "ptxas"),
        }[kind]

        def fault(number, elements):
            if number > 2:
                raise error

        failing_launches += [fault]
        recipe, out = models.recipe(precond_threshold=1e-16), tmp_path / "out"
        with pytest.raises(RunError, match=words) as caught:
            merge(recipe, out, backend="triton", tile_elements=700, threads=3)
        message = str(caught.value)
        assert message.startswith("triton on ")
        assert message.endswith("--resume with --backend native goes on on the CPU")
        assert "\n" not in message
        report = merge(recipe, out, backend="native", resume=True)
        assert report["resumed"]
        assert report["backends"] == ["triton", "native"]
        truth = merge(recipe, tmp_path / "native", backend="native")
        assert report["tensors"] == truth["tensors"]
        assert_agree(models, out, tmp_path / "native")

    def test_what_waits_for_thresholds_outlives_a_fault(self, models, tmp_path, failing_launches):
        tiles = []

        def fault(number, elements):
            tiles.extend([number] * (elements == 400))  # samples for `lambda` have other sizes
            if len(tiles) > 4:
                raise RuntimeError(LOST)

        failing_launches += [fault]
        recipe, out = models.recipe(density=0.3), tmp_path / "out"
        with pytest.raises(RunError, match="illegal memory access"):
            jobs.merge(recipe, out, WIDE, backend="triton", tile_elements=400, threads=3)
        assert waiting(out) > 0
        report = jobs.merge(recipe, out, WIDE, backend="native", resume=True)
        truth = jobs.merge(recipe, tmp_path / "native", WIDE, backend="native")
        assert (report["tensors"], report["experts"]) == (truth["tensors"], truth["experts"])

    def test_a_survey_that_fails_is_an_error_too(self, models, tmp_path, monkeypatch):
        from ota_kernels.backends.triton import survey

        def lost(*_):
            raise RuntimeError(LOST)

        monkeypatch.setattr(survey, "power_sum", lost)
        recipe = models.recipe(normalise="model")
        with pytest.raises(RunError, match=r"an illegal memory access.*--backend native"):
            merge(recipe, tmp_path / "out", backend="triton", **OPTIONS)
        assert merge(recipe, tmp_path / "out", backend="native", resume=True)["backends"] == [
            "triton",
            "native",
        ]
