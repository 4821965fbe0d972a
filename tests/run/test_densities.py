"""`densities`: thresholds, counts and splits against a sort of all scores, whatever the sample said."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from checkpoints import ModelSet, edited, make_set, random_tensors, second_moments, write_recipe
from safetensors.torch import save_file

from ota_kernels import InputError, RecipeError, merge
from ota_kernels.cli import density_tables
from ota_kernels.planning.roles import DETAILED_ROLES, detailed_role, layer_of
from ota_kernels.run.grid.counts import Collected
from ota_kernels.run.grid.densities import densities
from ota_kernels.run.grid.search import Reading

# Name -> shape, role, layer.
TENSORS = {
    "model.embed_tokens.weight": ((40, 24), "embeddings", "none"),
    "model.layers.0.self_attn.q_proj.weight": ((24, 24), "q", "0"),
    "model.layers.0.self_attn.k_proj.weight": ((12, 24), "k", "0"),
    "model.layers.0.mlp.down_proj.weight": ((24, 31), "down", "0"),
    "model.layers.0.input_layernorm.weight": ((24,), "norms", "0"),
    "model.layers.1.self_attn.q_proj.weight": ((24, 24), "q", "1"),
    "model.layers.1.mlp.down_proj.weight": ((24, 31), "down", "1"),
    "model.norm.weight": ((24,), "norms", "none"),
    "empty": ((0, 5), "other", "none"),
    "scale": ((), "other", "none"),
    "lm_head.weight": ((40, 24), "output", "none"),
}
SHAPES = {name: shape for name, (shape, _, _) in TENSORS.items()}
GRID = (1e-4, 0.01, 0.05, 0.3, 0.5, 0.7, 0.99, 1.0)
MASSES = (0.5, 0.9, 0.999, 1.0)
ELEMENTS = sum(int(np.prod(shape)) for shape in SHAPES.values())


def make(root, *, dtype=torch.bfloat16, base_dtype=torch.bfloat16, experts=2, change=None) -> ModelSet:
    """A saved set of Llama-like names; change(models) edits it before it is saved."""
    base = random_tensors(SHAPES, 0, base_dtype)
    models = ModelSet(
        root,
        base,
        [edited(base, 100 + t, dtype) for t in range(experts)],
        [second_moments(base, 200 + t) for t in range(experts)],
    )
    if change is not None:
        change(models)
    return models.save()


def heavy_ties(models: ModelSet) -> None:
    """Edits of 0 and of two sizes, one curvature: at most three different scores."""
    generator = torch.Generator().manual_seed(1)
    for expert, curvature in zip(models.experts, models.curvatures, strict=True):
        for name, base in models.base.items():
            edits = torch.randint(0, 3, base.shape, generator=generator)
            base.fill_(0.5)
            expert[name] = base + edits.to(base.dtype) * 0.25
            curvature[name] = torch.full_like(curvature[name], 1e-10)


def no_edits(models: ModelSet) -> None:
    """The second expert is the base."""
    models.experts[1] = {name: tensor.clone() for name, tensor in models.base.items()}


def an_outlier(models: ModelSet) -> None:
    """One element of the first expert holds nearly all of its saliency."""
    models.experts[0]["lm_head.weight"][17, 5] = 1e4


def half_unchanged(models: ModelSet) -> None:
    """The thresholds of 0.5 and beyond lie among saliencies of 0."""
    generator = torch.Generator().manual_seed(2)
    for expert in models.experts:
        for name, base in models.base.items():
            same = torch.rand(base.shape, generator=generator) < 0.55
            expert[name] = torch.where(same, base, expert[name])


CHANGES = {
    "random": None,
    "heavy-ties": heavy_ties,
    "no-edits": no_edits,
    "outlier": an_outlier,
    "half-unchanged": half_unchanged,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> ModelSet:
    return make(tmp_path_factory.mktemp("models"))


def scores_of(models: ModelSet, t: int) -> dict[str, np.ndarray]:
    """Expert t's scores by the formula, float32, flat."""

    def exact(tensors, name):
        return tensors[name].double().numpy().ravel()

    return {
        name: oracle.score(
            models.curvatures[t][name].numpy().ravel(),
            oracle.task_vector(exact(models.experts[t], name), exact(models.base, name)),
        )
        for name in models.base
    }


def check_row(row: dict, mask: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    """One row against the mask of all elements. Its threshold is the least score that is kept; where the k-th
    largest is 0, the least number above 0; and 0 where everything is kept."""
    ordered = np.sort(np.concatenate(list(scores.values())))[::-1].astype(np.float64)
    count = int(mask.sum())
    assert row["kept"] == count
    if "mass" not in row:
        k = int(Fraction(str(row["density"])) * ELEMENTS)
        expected = max(ordered[k - 1], 2.0**-149) if row["density"] < 1 else 0
        keeps_some = k > 0
    else:
        keeps_some = count > 0
        expected = ordered[count - 1]
    assert row["threshold"] == (expected * 2.0**-64 if keeps_some else None)


def check_split(row: dict, mask: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    """The kept elements of each role and layer, from the names."""
    pieces = np.split(mask, np.cumsum([s.size for s in scores.values()])[:-1])
    for part, place in (("roles", 1), ("layers", 2)):
        expected = dict.fromkeys((spec[place] for spec in TENSORS.values()), 0)
        for name, piece in zip(scores, pieces, strict=True):
            expected[TENSORS[name][place]] += int(piece.sum())
        assert row[part] == expected


def check(found: dict, models: ModelSet) -> None:
    """Every row of every expert against a sort of its scores."""
    for t, expert in enumerate(found["experts"]):
        scores = scores_of(models, t)
        whole = np.concatenate(list(scores.values()))
        for row in expert["densities"]:
            mask = oracle.kept_by_density(whole, row["density"])
            check_row(row, mask, scores)
            check_split(row, mask, scores)
        for row in expert["masses"]:
            mask = oracle.kept_by_mass(whole, row["mass"])
            check_row(row, mask, scores)
            assert row["density"] == mask.sum() / ELEMENTS


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_as_a_sort_of_all_scores(tmp_path, change):
    models = make(tmp_path, change=change)
    found = densities(models.recipe(), GRID, MASSES)
    assert found["elements"] == ELEMENTS
    assert [row["density"] for row in found["experts"][0]["densities"]] == list(GRID)
    assert [row["mass"] for row in found["experts"][0]["masses"]] == list(MASSES)
    check(found, models)


def test_a_density_inside_a_tie_keeps_the_whole_tie(tmp_path):
    """About a third of the elements share the highest score, a third the next, a third score 0."""
    models = make(tmp_path, change=heavy_ties)
    found = densities(models.recipe(), [0.01, 0.2, 0.5, 0.9, 1.0])
    for t, expert in enumerate(found["experts"]):
        scores = np.concatenate(list(scores_of(models, t).values()))
        values, counts = np.unique(scores, return_counts=True)
        assert values.size == 3
        top, above_zero = counts[2], counts[1] + counts[2]
        kept = [row["kept"] for row in expert["densities"]]
        assert kept == [top, top, above_zero, above_zero, ELEMENTS]


def test_splits_add_up(models):
    found = densities(models.recipe(), GRID)
    for part in ("roles", "layers"):
        assert sum(found[part].values()) == found["elements"]
        for expert in found["experts"]:
            for row in expert["densities"]:
                assert sum(row[part].values()) == row["kept"]
                assert all(row[part][key] <= found[part][key] for key in row[part])


def test_the_recipes_own_selections_play_no_part(models):
    plain = densities(models.recipe())
    assert densities(models.recipe(density=0.3)) == plain
    assert densities(models.recipe(precond_threshold=[1e-9, 1e-20], density_scope="tensor")) == plain


TINY_TILES = Reading(tile=100, smallest=100)  # many units of work: a tensor is several tiles


def test_tiles_threads_and_backends_change_no_number(models):
    one = densities(models.recipe(), GRID, MASSES, threads=1, reading=TINY_TILES)
    check(one, models)
    assert densities(models.recipe(), GRID, MASSES, threads=2, reading=TINY_TILES) == one
    reference = densities(models.recipe(), GRID, MASSES, backend="reference", reading=TINY_TILES)
    assert reference == one | {"backend": "reference"}


def infinite(*arguments) -> list[np.ndarray]:
    """A sample by which every prediction misses."""
    return [np.full((4096, 16), np.inf, np.float32)] * 2


def without_passes(found: dict) -> dict:
    return {key: value for key, value in found.items() if key != "passes"}


def test_a_large_enough_model_takes_one_pass(tmp_path):
    found = densities(make_set(tmp_path, {"a.weight": (400, 300), "b.weight": (300, 200)}).recipe())
    assert found["passes"] == 1


def test_a_bad_sample_costs_a_pass_and_changes_no_number(models):
    found = densities(models.recipe(), GRID, MASSES, reading=Reading(sample=infinite))
    assert found["passes"] == 2
    check(found, models)


def test_without_room_to_collect(models):
    """Thresholds from histograms of the predicted high halves; the splits from a second pass."""
    collected = densities(models.recipe(), GRID, MASSES)
    counted = densities(models.recipe(), GRID, MASSES, reading=Reading(collects=False))
    assert counted["passes"] >= 2
    assert without_passes(counted) == without_passes(collected)


def test_without_room_and_with_a_bad_sample(models):
    found = densities(models.recipe(), GRID, MASSES, reading=Reading(sample=infinite, collects=False))
    assert found["passes"] == 3
    check(found, models)


def test_more_to_collect_than_the_sample_promised(models):
    """The first collection runs out of room; the next pass knows what it will hold."""
    made = []

    def collected(experts, groups, room):
        made.append(Collected(experts, groups, room if made else 0))
        return made[-1]

    found = densities(models.recipe(), GRID, MASSES, reading=Reading(collected=collected))
    assert found["passes"] == 2
    check(found, models)


def nonfinite(models: ModelSet) -> None:
    models.experts[0]["lm_head.weight"][3, 4] = float("nan")
    models.curvatures[1]["model.embed_tokens.weight"][0, 0] = -1.0


def partly_without_curvature(models: ModelSet) -> None:
    for curvature in models.curvatures:
        del curvature["model.layers.1.mlp.down_proj.weight"]


FORMS = {
    "rank-1": (None, {"rank1_approx": True}),
    "rank-2": (None, {"rank": 2}),
    "nonfinite": (nonfinite, {"on_nonfinite": "base"}),
    "uniform": (partly_without_curvature, {"missing_curvature": "uniform"}),
    "base": (partly_without_curvature, {"missing_curvature": "base"}),
}


@pytest.mark.parametrize(("change", "parameters"), FORMS.values(), ids=FORMS)
def test_as_a_merge_keeps(tmp_path, change, parameters):
    """Thresholds and counts are those of a merge of the same recipe at each density."""
    models = make(tmp_path, change=change)
    grid = (0.02, 0.4)
    found = densities(models.recipe(**parameters), grid)
    for i, density in enumerate(grid):
        recipe = models.recipe(density=density, **parameters)
        report = merge(recipe, tmp_path / f"merged{i}")
        for expert, merged in zip(found["experts"], report["experts"], strict=True):
            row = expert["densities"][i]
            assert row["kept"] + found["always_kept"] == merged["kept"]
            thresholds = {tensor["thresholds"][0] for tensor in report["tensors"].values()}
            assert found["experts"][0]["densities"][i]["threshold"] in thresholds
    down = int(np.prod(SHAPES["model.layers.1.mlp.down_proj.weight"]))
    assert found["always_kept"] == (down if parameters == {"missing_curvature": "uniform"} else 0)
    assert found["elements"] == ELEMENTS - (down if "missing_curvature" in parameters else 0)


def test_bias_correction_divides_the_thresholds(tmp_path):
    """1 - beta2^step = 1 - 0.5^2 = 3/4 of the first expert's curvature: thresholds 4/3 as high."""
    models = make(tmp_path)
    save_file(models.curvatures[0], models.curvature_files[0], metadata={"step": "2", "beta2": "0.5"})
    save_file(models.curvatures[1], models.curvature_files[1], metadata={"step": "100", "beta2": "0.5"})
    plain, corrected = (densities(models.recipe(bias_correction=b)) for b in (False, True))
    for before, after in zip(
        plain["experts"][0]["densities"], corrected["experts"][0]["densities"], strict=True
    ):
        assert after["threshold"] == pytest.approx(before["threshold"] * 4 / 3, rel=1e-6)


def test_a_threshold_merges_as_its_density(tmp_path, models):
    """The printed number, given as `precond_threshold`, keeps the same edits."""
    found = densities(models.recipe(), [0.05, 0.6])
    for i, density in enumerate((0.05, 0.6)):
        rows = [expert["densities"][i] for expert in found["experts"]]
        by_density = merge(models.recipe(density=density), tmp_path / f"density{i}")
        thresholds = [float(f"{row['threshold']:.9g}") for row in rows]
        by_threshold = merge(models.recipe(precond_threshold=thresholds), tmp_path / f"threshold{i}")
        kept = [expert["kept"] for expert in by_threshold["experts"]]
        assert kept == [expert["kept"] for expert in by_density["experts"]] == [row["kept"] for row in rows]


def test_without_a_base_curvature_is_the_saliency(models):
    recipe = models.recipe()
    del recipe["base_model"]
    found = densities(recipe, [0.25])
    for t, expert in enumerate(found["experts"]):
        h = np.sort(np.concatenate([v.numpy().ravel() for v in models.curvatures[t].values()]))[::-1]
        assert expert["densities"][0]["threshold"] == h[int(0.25 * ELEMENTS) - 1]


def test_nothing_to_select_from(tmp_path):
    found = densities(make_set(tmp_path, {"empty": (0, 3)}, experts=1).recipe(), [0.5, 1.0])
    assert found["elements"] == 0
    assert [row["kept"] for row in found["experts"][0]["densities"]] == [0, 0]


def test_a_value_that_is_not_finite_is_an_error(tmp_path):
    models = make(tmp_path, change=nonfinite)
    with pytest.raises(InputError, match=r"expert0.*lm_head\.weight: 1 of 960 weight values .* index 76;"):
        densities(models.recipe())


@pytest.mark.parametrize(
    "grid", [[], ["x"], [None], [0], [-0.1], [1.5], [float("nan")], ["0.1", 0.10]], ids=str
)
def test_wrong_grids(models, grid):
    with pytest.raises(RecipeError, match=r"^grid: "):
        densities(models.recipe(), grid)
    with pytest.raises(RecipeError, match=r"^masses: "):
        densities(models.recipe(), masses=grid)


def test_wrong_methods(models):
    with pytest.raises(RecipeError, match="linear selects no edits"):
        densities(models.recipe("linear"))


def test_memory_limits(models):
    with pytest.raises(RecipeError, match=r"--memory-limit [0-9]+MB") as failure:
        densities(models.recipe(), memory_limit="50MB", threads=1)
    named = str(failure.value).split("--memory-limit ")[1].split(",")[0]
    check(densities(models.recipe(), memory_limit=named, threads=1), models)


class TestCommand:
    @pytest.fixture
    def recipe(self, models, tmp_path):
        return write_recipe(tmp_path / "recipe.yaml", models.recipe(density=0.2))

    def test_json(self, models, recipe, ota_merge):
        code, printed, _ = ota_merge("densities", recipe, "--json", "--grid", "0.3,0.01", "--threads", "1")
        assert code == 0
        assert json.loads(printed) == densities(models.recipe(), [0.01, 0.3])

    def test_tables(self, models, recipe, ota_merge):
        """All numbers of the rows are there, thresholds exact, nothing wraps."""
        code, printed, _ = ota_merge("densities", recipe)
        assert code == 0
        lines = printed.splitlines()
        assert max(map(len, lines)) <= 100
        rows = [line.split() for line in lines]
        for expert in densities(models.recipe())["experts"]:
            assert expert["model"] in lines
            for row in expert["densities"]:
                (cells,) = (
                    cells for cells in rows if cells[1:2] == [str(row["kept"])] and _is(cells[2], row)
                )
                assert float(cells[0]) == row["density"]

    @pytest.mark.parametrize("grid", ["", "x", "0", "0.5,1.01", "nan", "0.1,,0.2", "0.1,0.10"])
    def test_wrong_grids(self, recipe, ota_merge, grid):
        code, printed, errors = ota_merge("densities", recipe, "--grid", grid)
        assert (code, printed) == (2, "")
        assert errors.startswith("error: grid: ")
        assert errors.count("\n") == 1

    def test_wrong_recipes(self, models, tmp_path, ota_merge):
        linear = write_recipe(tmp_path / "linear.yaml", models.recipe("linear"))
        code, printed, errors = ota_merge("densities", linear)
        assert (code, printed) == (2, "")
        assert "give an `ota` recipe" in errors


def _is(text: str, row: dict) -> bool:
    """Whether a printed threshold is the row's, to the last bit of float32."""
    return np.float32(float(text) * 2.0**64) == np.float32(row["threshold"] * 2.0**64)


def test_layers_are_grouped_into_sixteen_rows():
    for count, rows, size in ((1, 1, 1), (16, 16, 1), (17, 9, 2), (32, 16, 2), (80, 16, 5)):
        groups = density_tables._grouped([str(i) for i in range(count)])
        assert (len(groups), len(groups[0])) == (rows, size)
        assert [name for group in groups for name in group] == [str(i) for i in range(count)]


@pytest.mark.parametrize(
    ("kept", "total", "text"),
    [
        (0, 0, "-"),
        (0, 9, "0.00"),
        (1, 10**6, "<.01"),
        (1, 100, "1.00"),
        (9995, 100_000, "10.0"),
        (1, 8, "12.5"),
        (9999, 10_000, "99.9"),
        (9, 9, "100"),
    ],
)
def test_percentages_have_four_characters(kept, total, text):
    assert density_tables._percent(kept, total) == text


ROLES = {
    "model.layers.3.self_attn.q_proj.weight": ("q", 3),
    "model.layers.3.self_attn.k_proj.bias": ("k", 3),
    "model.layers.3.self_attn.v_proj.weight": ("v", 3),
    "model.layers.31.self_attn.o_proj.weight": ("o", 31),
    "model.layers.3.self_attn.q_norm.weight": ("norms", 3),
    "model.layers.3.mlp.gate_proj.weight": ("gate", 3),
    "model.layers.3.mlp.up_proj.weight": ("up", 3),
    "model.layers.3.mlp.down_proj.weight": ("down", 3),
    "model.layers.3.mlp.experts.7.down_proj.weight": ("down", 3),
    "model.layers.3.mlp.gate.weight": ("other", 3),
    "model.layers.3.block_sparse_moe.experts.0.w1.weight": ("gate", 3),
    "model.layers.3.block_sparse_moe.experts.0.w2.weight": ("down", 3),
    "model.layers.3.block_sparse_moe.experts.0.w3.weight": ("up", 3),
    "model.layers.3.post_attention_layernorm.weight": ("norms", 3),
    "model.norm.weight": ("norms", None),
    "model.embed_tokens.weight": ("embeddings", None),
    "lm_head.weight": ("output", None),
    "transformer.h.0.attn.c_attn.weight": ("other", 0),
    "h.0.attn.c_proj.weight": ("o", 0),
    "h.0.mlp.c_fc.weight": ("up", 0),
    "h.0.mlp.c_proj.bias": ("down", 0),
    "h.0.ln_1.weight": ("norms", 0),
    "transformer.ln_f.bias": ("norms", None),
    "transformer.wte.weight": ("embeddings", None),
    "wpe.weight": ("embeddings", None),
    "gpt_neox.layers.2.attention.query_key_value.weight": ("other", 2),
    "gpt_neox.layers.2.attention.dense.weight": ("o", 2),
    "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": ("up", 2),
    "gpt_neox.layers.2.mlp.dense_4h_to_h.bias": ("down", 2),
    "gpt_neox.final_layer_norm.weight": ("norms", None),
    "gpt_neox.embed_in.weight": ("embeddings", None),
    "embed_out.weight": ("output", None),
    "bert.encoder.layer.3.attention.self.query.weight": ("q", 3),
    "encoder.layer.3.attention.self.key.bias": ("k", 3),
    "encoder.layer.3.attention.self.value.weight": ("v", 3),
    "encoder.layer.3.attention.output.dense.weight": ("o", 3),
    "encoder.layer.3.intermediate.dense.weight": ("up", 3),
    "encoder.layer.3.output.dense.bias": ("down", 3),
    "encoder.layer.3.output.LayerNorm.weight": ("norms", 3),
    "embeddings.position_embeddings.weight": ("embeddings", None),
    "scale": ("other", None),
    "weight": ("other", None),
    "": ("other", None),
}


@pytest.mark.parametrize(("name", "expected"), ROLES.items(), ids=ROLES)
def test_detailed_roles(name, expected):
    assert (detailed_role(name), layer_of(name)) == expected
    assert detailed_role(name) in DETAILED_ROLES
