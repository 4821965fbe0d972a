"""`ota-merge moments compress`: what it writes, what it says about it, and merges that read it as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jobs
import numpy as np
import oracle
import pytest
import torch
from checkpoints import CURVATURE, SHAPES, make_set, model_digests, save_sharded
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ota_kernels import InputError, OutputError, RecipeError, merge, plan
from ota_kernels.backends import reference
from ota_kernels.cli.moments_compress import compress as command
from ota_kernels.io.curvature import CurvatureFile
from ota_kernels.moments.agreement import mask_agreement
from ota_kernels.moments.compress import compress
from ota_kernels.moments.relative_error import Errors
from ota_kernels.run.rules import Rules
from ota_kernels.tensors.log8 import LARGEST_ERROR

FORMATS = ("rank1", "bf16", "log8")
ADAM = {"step": "7", "beta2": "0.9"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three experts; their second moments have zeros, rows of zeros, and rows far apart."""
    made = make_set(tmp_path_factory.mktemp("models"), SHAPES | {"wide": (180, 200)})
    for t, moments in enumerate(made.curvatures):
        rng = np.random.default_rng(t)
        for v in moments.values():
            if v.ndim == 2 and v.numel():
                v *= torch.as_tensor(np.float32(10.0 ** rng.uniform(-6, 2, (v.shape[0], 1))))
                v[rng.random(v.shape) < 0.03] = 0
                v[1] = 0
        save_file(moments, made.curvature_files[t], metadata=ADAM)
    return made


@pytest.fixture(scope="module")
def files(models, tmp_path_factory) -> dict[str, list[Path]]:
    """By format, the compressed file of each expert; by "FORMAT, expanded" the same values in float32."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for form in FORMATS:
        found[form] = [folder / f"{form}{t}.safetensors" for t in range(3)]
        found[f"{form}, expanded"] = [folder / f"{form}{t}.expanded.safetensors" for t in range(3)]
        for source, out, full in zip(
            models.curvature_files, found[form], found[f"{form}, expanded"], strict=True
        ):
            compress(source, out, form)
            save_file(expanded(out), full, metadata=ADAM)
    found["full"] = models.curvature_files
    return found


def expanded(path: Path) -> dict[str, torch.Tensor]:
    """What a file of second moments stands for, float32, as the reference reads it."""
    file = CurvatureFile.open(path, "file")
    shapes = {name: file.shape(name) for name in file.names}
    return {
        name: reference.curvature(file.curvature(name), int(np.prod(shape))).reshape(shape)
        for name, shape in shapes.items()
    }


def recipe(models, paths: list[Path], **parameters) -> dict:
    made = models.recipe(**parameters)
    for model, path in zip(made["models"], paths, strict=True):
        model["parameters"]["preconditioner_path"] = str(path)
    return made


def is_matrix(v: torch.Tensor) -> bool:
    return v.ndim == 2 and v.numel() > 0


class TestFiles:
    def test_bf16_is_rounded_to_nearest_even(self, models, files):
        found = load_file(files["bf16"][0])
        for name, v in models.curvatures[0].items():
            assert found[name].dtype == torch.bfloat16
            torch.testing.assert_close(found[name], v.bfloat16(), rtol=0, atol=0)

    def test_rank1_holds_the_sums_of_matrices(self, models, files):
        found = load_file(files["rank1"][0])
        for name, v in models.curvatures[0].items():
            if not is_matrix(v):
                assert torch.equal(found.pop(name), v)
                continue
            rows, columns = found.pop(f"{name}.exp_avg_sq_row"), found.pop(f"{name}.exp_avg_sq_col")
            torch.testing.assert_close(rows, v.double().sum(1).float(), rtol=2.0**-23, atol=0)
            torch.testing.assert_close(columns, v.double().sum(0).float(), rtol=2.0**-23, atol=0)
        assert not found

    def test_log8_holds_codes_and_a_scale_per_row(self, models, files):
        found = load_file(files["log8"][0])
        values = expanded(files["log8"][0])
        for name, v in models.curvatures[0].items():
            if v.ndim < 2 or v.numel() == 0:
                assert torch.equal(found.pop(name), v)
                continue
            codes, scales = found.pop(f"{name}.exp_avg_sq_log8"), found.pop(f"{name}.exp_avg_sq_scale")
            assert (codes.dtype, codes.shape) == (torch.uint8, v.shape)
            assert (scales.dtype, scales.shape) == (torch.float32, (v[..., 0].numel(),))
            error = (values[name].double() - v.double()).abs()
            assert (error <= LARGEST_ERROR * v.double()).all()
            assert torch.equal(codes == 0, v == 0)
        assert not found

    @pytest.mark.parametrize("form", FORMATS)
    def test_every_tensor_is_aligned(self, files, form):
        file = CurvatureFile.open(files[form][0], "file")
        for name in file.names:
            for key in file.keys_of(name):
                buffer = file.key_buffer(key)
                assert buffer.offset % buffer.dtype.itemsize == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("form", FORMATS)
    def test_moments_of_16_bits(self, tmp_path, form, dtype):
        v = (torch.rand(9, 30, generator=torch.Generator().manual_seed(0)) + 1e-3).to(dtype)
        save_file({"w": v}, tmp_path / "half.safetensors")
        save_file({"w": v.float()}, tmp_path / "float.safetensors")
        for name in ("half", "float"):
            compress(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.out.safetensors", form)
        found, truth = (load_file(tmp_path / f"{name}.out.safetensors") for name in ("half", "float"))
        assert found.keys() == truth.keys()
        assert all(torch.equal(found[key], truth[key]) for key in truth)

    def test_any_curvature_file_will_do(self, models, tmp_path):
        v = models.curvatures[0]
        save_sharded(tmp_path / "sharded", {f"{n}.exp_avg_sq": x for n, x in v.items()}, 2, ADAM)
        state = {n: {"exp_avg_sq": x, "step": 7} for n, x in v.items()}
        torch.save({"state": state, "param_groups": [{"betas": (0.8, 0.9)}]}, tmp_path / "state.pt")
        for form in FORMATS:
            truth = tmp_path / f"{form}.safetensors"
            compress(models.curvature_files[0], truth, form)
            for source in ("sharded", "state.pt"):
                out = tmp_path / f"{form}-{source}.safetensors"
                compress(tmp_path / source, out, form)
                assert metadata(out) == metadata(truth)
                assert load_file(out).keys() == load_file(truth).keys()
                assert all(torch.equal(x, load_file(truth)[key]) for key, x in load_file(out).items())

    def test_steps_that_differ_are_left_out(self, tmp_path):
        state = {name: {"exp_avg_sq": torch.ones(2, 2), "step": step} for name, step in (("a", 7), ("b", 8))}
        torch.save({"state": state, "param_groups": [{"betas": (0.8, 0.9)}]}, tmp_path / "state.pt")
        summary = compress(tmp_path / "state.pt", tmp_path / "out.safetensors", "bf16")
        assert (summary.step, summary.beta2) == (None, None)
        assert metadata(tmp_path / "out.safetensors") == {"format": "pt"}

    def test_sums_stay_what_they_are(self, files, tmp_path):
        """Whatever the format: nothing is smaller."""
        truth = load_file(files["rank1"][0])
        for form in ("rank1", "log8"):
            compress(files["rank1"][0], tmp_path / f"{form}.safetensors", form)
            found = load_file(tmp_path / f"{form}.safetensors")
            sums = [key for key in truth if key.endswith(("_row", "_col"))]
            assert sums
            assert all(torch.equal(found[key], truth[key]) for key in sums)

    def test_codes_can_become_sums(self, files, tmp_path):
        for source in ("log8", "log8, expanded"):
            compress(files[source][0], tmp_path / f"{source}.safetensors", "rank1")
        one, other = (load_file(tmp_path / f"{source}.safetensors") for source in ("log8", "log8, expanded"))
        for key in other:
            if key.endswith(("_row", "_col")):
                assert torch.equal(one[key], other[key])


def metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


class TestSummary:
    @pytest.mark.parametrize("form", FORMATS)
    def test_errors_zeros_and_sizes(self, models, files, tmp_path, form):
        summary = compress(models.curvature_files[0], tmp_path / "out.safetensors", form)
        after, errors, zeros, kept, elements = expanded(files[form][0]), [], 0, 0, 0
        for name, v in models.curvatures[0].items():
            if form == "bf16" or (v.ndim >= 2 and v.numel() and (form == "log8" or v.ndim == 2)):
                exact, found = v.double().numpy(), after[name].double().numpy()
                errors.append((np.abs(found - exact) / np.where(exact == 0, 1, exact))[exact > 0])
                elements += exact.size
                zeros += (exact == 0).sum()
                kept += ((exact == 0) & (found == 0)).sum()
        errors = np.sort(np.concatenate(errors))
        assert (summary.format, summary.elements) == (form, elements)
        assert (summary.zeros, summary.zeros_kept) == (zeros, kept)
        assert zeros > 0
        assert summary.error_max == pytest.approx(errors[-1], rel=1e-6)
        for share, found in ((0.5, summary.error_median), (0.99, summary.error_99)):
            assert found == pytest.approx(np.quantile(errors, share, method="inverted_cdf"), rel=2.0**-6)
        assert summary.bytes_before == sum(v.nbytes for v in models.curvatures[0].values())
        assert summary.bytes_after == CurvatureFile.open(tmp_path / "out.safetensors", "out").total_bytes
        assert summary.ratio == summary.bytes_before / summary.bytes_after
        assert (summary.step, summary.beta2) == (7, 0.9)
        assert summary.tensors + summary.copied == len(models.curvatures[0])

    def test_rank1_of_a_large_matrix_is_100_times_smaller(self, tmp_path):
        save_file({"w": torch.rand(700, 700)}, tmp_path / "v.safetensors")
        assert compress(tmp_path / "v.safetensors", tmp_path / "out.safetensors", "rank1").ratio > 100

    def test_quantiles_of_no_elements(self):
        assert Errors().quantile(0.5) == 0.0


class TestMerges:
    @pytest.mark.parametrize("backend", ["native", "reference"])
    @pytest.mark.parametrize("scope", ["model", "tensor"])
    @pytest.mark.parametrize("form", FORMATS)
    def test_a_file_merges_as_what_it_stands_for(self, models, files, tmp_path, form, scope, backend):
        parameters = {"density": 0.3, "density_scope": scope, "bias_correction": True, "normalise": "model"}
        reports = {}
        for kind in (form, f"{form}, expanded"):
            made = recipe(models, files[kind], **parameters)
            reports[kind] = merge(made, tmp_path / kind, backend=backend)
        assert model_digests(tmp_path / form) == model_digests(tmp_path / f"{form}, expanded")
        one, other = (reports[kind] for kind in (form, f"{form}, expanded"))
        assert one["experts"] == other["experts"]
        assert one["bytes_read"] < other["bytes_read"]

    @pytest.mark.parametrize(
        "options",
        [
            {"threads": 1, "tile_elements": 1000},
            {"threads": 3, "tile_elements": 7001, "candidates_memory": 0},
            {"threads": 2, "tile_elements": 1 << 20},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("scope", ["model", "tensor"])
    @pytest.mark.parametrize("form", ["rank1", "log8"])
    def test_tiles_and_threads_change_nothing(self, models, files, tmp_path, form, scope, options):
        parameters = {"saliency_mass": 0.8, "density_scope": scope}
        merge(recipe(models, files[f"{form}, expanded"], **parameters), tmp_path / "expanded")
        merge(recipe(models, files[form], **parameters), tmp_path / "out", **options)
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expanded")

    @pytest.mark.parametrize("scope", ["model", "tensor"])
    @pytest.mark.parametrize("form", ["rank1", "log8"])
    def test_an_interrupted_merge_goes_on(self, models, files, tmp_path, form, scope):
        parameters = {"density": 0.3, "density_scope": scope}
        merge(recipe(models, files[f"{form}, expanded"], **parameters), tmp_path / "expanded")
        made, options = recipe(models, files[form], **parameters), {"threads": 1, "tile_elements": 4096}
        with pytest.raises(KeyboardInterrupt):
            jobs.merge(made, tmp_path / "out", Rules(before=jobs.Interrupt("tile", 6)), **options)
        report = merge(made, tmp_path / "out", resume=True, **options)
        assert report["resumed"]
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "expanded")

    @pytest.mark.parametrize("on_file", [False, True], ids=["", "rank1_approx on the file"])
    @pytest.mark.parametrize("bias_correction", [False, True])
    @pytest.mark.parametrize("scope", ["model", "tensor"])
    def test_sums_in_a_file_are_rank1_approx(self, models, files, tmp_path, scope, bias_correction, on_file):
        parameters = {"density": 0.3, "density_scope": scope, "bias_correction": bias_correction}
        made = recipe(models, files["full"], rank1_approx=True, **parameters)
        merge(made, tmp_path / "approximated")
        merge(recipe(models, files["rank1"], rank1_approx=on_file, **parameters), tmp_path / "out")
        assert model_digests(tmp_path / "out") == model_digests(tmp_path / "approximated")

    @pytest.mark.parametrize("parameters", [{"rank1_approx": True}, {"rank": 2}, {"rescale": True}], ids=str)
    def test_codes_can_be_factored(self, models, files, tmp_path, parameters):
        for kind in ("log8", "log8, expanded"):
            merge(recipe(models, files[kind], density=0.3, **parameters), tmp_path / kind)
        assert model_digests(tmp_path / "log8") == model_digests(tmp_path / "log8, expanded")

    @pytest.mark.parametrize("form", ["full", *FORMATS])
    def test_the_plan_counts_what_is_read(self, models, files, form):
        def itemsize(v: torch.Tensor) -> int:
            sizes = {"full": 4, "bf16": 2, "rank1": 0 if is_matrix(v) else 4}
            return sizes.get(form, 1 if v.ndim >= 2 and v.numel() else 4)

        found = plan(recipe(models, files[form], precond_threshold=1e-16))
        assert found.bytes_in == sum(
            v.numel() * (2 * 4 + 3 * itemsize(v)) for v in models.curvatures[0].values()
        )

    def test_no_pass_is_counted_for_sums_that_are_there(self, models, files):
        passes = {
            kind: plan(recipe(models, files[kind], rank1_approx=True)).passes for kind in ("full", "rank1")
        }
        assert passes == {"full": 2, "rank1": 1}

    def test_rank_of_sums_is_an_error(self, models, files):
        with pytest.raises(InputError, match=r"rank10.safetensors: .*rank 1.*leave out `rank`"):
            plan(recipe(models, files["rank1"], rank=2))


# The keys of a file that is to be refused: what is changed of a good one, and what the error says.
ROW, COLUMN, CODES, SCALE = (f"w.exp_avg_sq{suffix}" for suffix in ("_row", "_col", "_log8", "_scale"))
SUMS = {ROW: torch.ones(4), COLUMN: torch.ones(3)}
EIGHT_BITS = {CODES: torch.ones(4, 3, dtype=torch.uint8), SCALE: torch.ones(4)}
BAD_FILES = {
    "full and log8": ({"w": torch.ones(4, 3)} | EIGHT_BITS, ["'w' in two forms", "remove one"]),
    "sums and log8": (SUMS | EIGHT_BITS, ["'w' in two forms", ROW, CODES]),
    "no column sums": ({ROW: torch.ones(4)}, [COLUMN, "is missing"]),
    "no row sums": ({COLUMN: torch.ones(3)}, [ROW, "is missing"]),
    "no scales": ({CODES: EIGHT_BITS[CODES]}, [SCALE, "is missing"]),
    "no codes": ({SCALE: torch.ones(4)}, [CODES, "is missing"]),
    "sums of another shape": (SUMS | {ROW: torch.ones(5)}, ["shape [5, 3]", "the tensor [4, 3]"]),
    "a matrix of sums": (SUMS | {COLUMN: torch.ones(3, 1)}, [COLUMN, "shape [3, 1]", "vector"]),
    "too few scales": (EIGHT_BITS | {SCALE: torch.ones(3)}, [SCALE, "shape [3], not [4]"]),
    "codes of a vector": ({CODES: torch.ones(12, dtype=torch.uint8), SCALE: torch.ones(1)}, [CODES, "[12]"]),
    "sums of 16 bits": (SUMS | {ROW: torch.ones(4, dtype=torch.bfloat16)}, [ROW, "is bfloat16", "float32"]),
    "codes of 16 bits": (
        EIGHT_BITS | {CODES: torch.ones(4, 3, dtype=torch.int16)},
        [CODES, "int16", "uint8"],
    ),
    "a negative sum": (
        SUMS | {COLUMN: torch.tensor([1.0, -1.0, 1.0])},
        [COLUMN, "1 of 3 values are negative", "index 1"],
    ),
    "a sum that is NaN": (SUMS | {ROW: torch.tensor([1.0, 1.0, 1.0, torch.nan])}, [ROW, "1 of 4", "index 3"]),
    "a scale that is infinite": (
        EIGHT_BITS | {SCALE: torch.tensor([torch.inf, 1, 1, torch.inf])},
        [SCALE, "2 of 4", "index 0"],
    ),
}


@pytest.mark.parametrize(("tensors", "facts"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_refused(tmp_path, tensors, facts):
    models = make_set(tmp_path, {"w": (4, 3)}, experts=1)
    save_file(tensors, models.curvature_files[0])
    with pytest.raises(InputError) as raised:
        merge(models.recipe(), tmp_path / "out")
    text = str(raised.value)
    assert str(models.curvature_files[0]) in text
    assert [fact for fact in facts if fact not in text] == []
    assert "\n" not in text


@pytest.mark.parametrize("scale", [torch.finfo(torch.float32).max, 1.0])
def test_a_scale_too_large_is_found_by_the_merge(tmp_path, scale):
    models = make_set(tmp_path, {"w": (4, 3)}, experts=1)
    codes = torch.full((4, 3), 255, dtype=torch.uint8)
    save_file({CODES: codes, SCALE: torch.tensor([1, scale, 1, 1])}, models.curvature_files[0])
    if scale == 1:
        merge(models.recipe(), tmp_path / "out")
        return
    with pytest.raises(InputError, match=r"exp_avg_sq\.safetensors: w: 3 of 12 curvature .* flat index 3"):
        merge(models.recipe(), tmp_path / "out")


class TestRefusals:
    @pytest.fixture
    def source(self, tmp_path) -> Path:
        save_file({"a": torch.ones(3), "w": torch.ones(40, 30)}, tmp_path / "v.safetensors")
        return tmp_path / "v.safetensors"

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("value", [-1e-30, np.nan, np.inf])
    def test_values_that_are_no_second_moments(self, tmp_path, form, value):
        v = torch.ones(400, 1000)
        v[3, 1] = v[399, 5] = value
        save_file({"w": v}, tmp_path / "v.safetensors")
        (tmp_path / "out.safetensors").write_bytes(b"before")
        with pytest.raises(InputError, match=r"v\.safetensors: 'w': 2 of 400000 values .* flat index 3001"):
            compress(tmp_path / "v.safetensors", tmp_path / "out.safetensors", form, overwrite=True)
        assert (tmp_path / "out.safetensors").read_bytes() == b"before"
        assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "v.safetensors"]

    @pytest.mark.parametrize(
        ("form", "fact"), [("bf16", "infinite in bfloat16"), ("rank1", "overflow float32")]
    )
    def test_values_too_large_for_the_format(self, tmp_path, form, fact):
        save_file({"w": torch.full((2, 2), torch.finfo(torch.float32).max)}, tmp_path / "v.safetensors")
        with pytest.raises(InputError, match=f"v.safetensors: 'w': .*{fact}"):
            compress(tmp_path / "v.safetensors", tmp_path / "out.safetensors", form)
        assert os.listdir(tmp_path) == ["v.safetensors"]

    def test_an_output_that_exists(self, source, tmp_path):
        out = tmp_path / "out.safetensors"
        out.write_bytes(b"before")
        with pytest.raises(OutputError, match=r"out\.safetensors: exists: .*--overwrite"):
            compress(source, out, "log8")
        compress(source, out, "log8", overwrite=True)
        assert CODES in load_file(out)

    def test_a_file_in_place_of_itself(self, source):
        compress(source, source, "log8", overwrite=True)
        assert torch.equal(expanded(source)["w"], torch.ones(40, 30))

    @pytest.mark.parametrize("name", ["out.pt", ".", "none/out.safetensors"])
    def test_an_output_that_cannot_be(self, source, tmp_path, name):
        with pytest.raises(OutputError, match=r"name|folder"):
            compress(source, tmp_path / name, "log8")

    def test_an_unknown_format(self, source, tmp_path):
        with pytest.raises(RecipeError, match="'fp4' is none of rank1, bf16, log8"):
            compress(source, tmp_path / "out.safetensors", "fp4")


DENSITIES = (0.1, 0.3, 0.6)


@pytest.mark.parametrize("form", FORMATS)
def test_mask_agreement(models, files, form):
    """Of the masks that the float64 reference selects over the whole model."""
    found = mask_agreement(models.base_folder, models.expert_folders[0], files["full"][0], files[form][0])
    values = [expanded(path) for path in (files["full"][0], files[form][0])]
    edits = {
        name: oracle.task_vector(models.experts[0][name].double().numpy(), base.double().numpy())
        for name, base in models.base.items()
    }
    scores = [
        np.concatenate([oracle.score(v[name].numpy(), d).ravel() for name, d in edits.items()])
        for v in values
    ]
    assert found.keys() == set(DENSITIES)
    for density, index in found.items():
        one, other = (oracle.kept_by_density(s, density) for s in scores)
        assert index == (one & other).sum() / (one | other).sum()


def test_tensors_without_moments_take_no_part_in_masks(models, tmp_path):
    part = {name: v for name, v in models.curvatures[0].items() if "mlp" in name}
    save_file(part, tmp_path / "part.safetensors")
    compress(tmp_path / "part.safetensors", tmp_path / "out.safetensors", "log8")
    folders = models.base_folder, models.expert_folders[0]
    found = mask_agreement(*folders, tmp_path / "part.safetensors", tmp_path / "out.safetensors", [1.0, 1e-6])
    assert found == {1e-6: 1.0, 1.0: 1.0}  # nothing is kept, and everything


class TestCommand:
    def run(self, *arguments):
        return CliRunner().invoke(command, [str(a) for a in arguments])

    def test_says_what_it_did(self, models, tmp_path):
        source, out = models.curvature_files[0], tmp_path / "out.safetensors"
        done = self.run(source, out, "--format", "log8")
        assert done.exit_code == 0
        assert out.is_file()
        for fact in ("times smaller", "relative error", "zeros"):
            assert fact in done.output
        assert "Jaccard" not in done.output
        assert "bias_correction" not in done.output

    def test_as_json_with_masks(self, models, tmp_path):
        source, out = models.curvature_files[0], tmp_path / "out.safetensors"
        folders = "--base", models.base_folder, "--expert", models.expert_folders[0]
        done = self.run(source, out, "--format", "bf16", "--json", *folders)
        found = json.loads(done.output)
        truth = mask_agreement(models.base_folder, models.expert_folders[0], source, out)
        assert found.pop("mask_agreement") == {str(density): index for density, index in truth.items()}
        again = compress(source, tmp_path / "again.safetensors", "bf16")
        assert found == again.as_dict()
        assert "Jaccard" in self.run(source, out, "--format", "bf16", "--overwrite", *folders).output

    def test_says_that_bias_cannot_be_corrected(self, models, tmp_path):
        save_file(models.curvatures[0], tmp_path / CURVATURE)
        done = self.run(tmp_path / CURVATURE, tmp_path / "out.safetensors", "--format", "rank1")
        assert "`bias_correction` cannot use this file" in done.output

    def test_base_without_expert(self, models, tmp_path):
        out = tmp_path / "out.safetensors"
        done = self.run(models.curvature_files[0], out, "--format", "log8", "--base", models.base_folder)
        assert done.exit_code == 2
        assert "--base and --expert go together" in done.output
        assert not out.exists()
