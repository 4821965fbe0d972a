"""The page of a merge: its numbers against plain numpy; a browser fetches nothing and finds no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from checkpoints import load_merged, make_set
from click.testing import CliRunner
from safetensors.torch import load_file

import ota_kernels
from ota_kernels.cli import cli
from ota_kernels.errors import InputError
from ota_kernels.run.analysis import analyse, effective_rank

pytest.importorskip("matplotlib")

SHAPES = {
    "model.embed_tokens.weight": (60, 16),
    **{f"model.layers.{i}.self_attn.q_proj.weight": (16, 16) for i in range(2)},
    **{f"model.layers.{i}.input_layernorm.weight": (16,) for i in range(2)},
}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    models = make_set(tmp_path_factory.mktemp("models"), SHAPES)
    out = models.root / "<b>out"
    recipe = models.recipe(saliency_mass=0.8, **{"lambda": "auto"})
    ota_kernels.merge(recipe | {"dtype": "float32"}, out)
    return models, out


def edits_of(models) -> list[dict[str, np.ndarray]]:
    base = load_file(models.base_folder / "model.safetensors")
    experts = [load_file(folder / "model.safetensors") for folder in models.expert_folders]
    return [{n: (x[n].double() - base[n].double()).numpy() for n in base} for x in experts]


def test_the_numbers_are_those_of_the_edits(merged):
    models, out = merged
    found = analyse(out)
    edits, overall = edits_of(models), found["overall"]
    flat = [np.concatenate([d[n].reshape(-1) for n in sorted(d)]) for d in edits]
    np.testing.assert_allclose(overall["gram"], [[a @ b for b in flat] for a in flat], rtol=1e-5, atol=1e-8)
    assert overall["changed"] == [np.count_nonzero(d) for d in flat]
    assert overall["kept"] == [e["kept"] for e in found["report"]["experts"]]
    assert sum(overall["keepers"]) == overall["elements"] == sum(np.prod(s) for s in SHAPES.values())
    assert sum(k * c for k, c in enumerate(overall["keepers"])) == sum(overall["kept"])
    both = np.array(overall["both"])
    assert np.diag(both).tolist() == overall["kept"]
    assert (np.array(overall["opposed"]) <= both).all()
    base = load_file(models.base_folder / "model.safetensors")
    result = load_merged(out)
    length = sum(float((result[n].double() - base[n].double()).square().sum()) for n in base)
    assert overall["merged"] == pytest.approx(length, rel=1e-4)
    assert found["automatic"] == pytest.approx(found["report"]["lambda"]["auto"], rel=1e-4)  # all is sampled
    query = next(g for g in found["groups"] if g["layer"] == "1" and g["role"] == "q")
    assert query["kept"] == found["report"]["tensors"]["model.layers.1.self_attn.q_proj.weight"]["kept"]


def test_effective_rank():
    assert effective_rank(np.eye(5)) == pytest.approx(5)
    assert effective_rank(np.outer(np.ones(4), np.arange(7.0))) == pytest.approx(1, rel=1e-5)
    assert effective_rank(np.zeros((3, 4))) == 0


class _Fetched(HTMLParser):
    """Every address that a page names, and every tag that may run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [
            f"{tag} {k}={v}" for k, v in attrs if k in ("src", "srcset", "action", "data", "poster")
        ]
        self.found += [f"{tag} {v}" for k, v in attrs if k.endswith("href") and not v.startswith("#")]
        self.found += [tag] if tag in ("script", "link", "iframe", "object", "embed", "img") else []


def test_the_page_names_nothing_to_fetch_and_escapes_what_it_shows(merged):
    _, out = merged
    result = CliRunner().invoke(cli, ["report", str(out)])
    assert result.exit_code == 0
    text = (out / "report.html").read_text()
    assert not _Fetched(text).found
    assert not re.search(r"url\((?!#)|@import", text)
    assert "<b>out" not in text
    assert "Merge &lt;b&gt;out" in text
    assert text.count("<svg") == 4
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) or max(map(ids.count, ids)) < 5  # matplotlib's own names of axes repeat


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: .ci/run installs Debian's")
@pytest.mark.parametrize("width", [400, 1600])
def test_a_browser_finds_no_error_and_asks_for_nothing(merged, tmp_path, width):
    _, out = merged
    page = tmp_path / "page.html"
    CliRunner().invoke(cli, ["report", str(out), "--html", str(page)], catch_exceptions=False)
    log = tmp_path / "net.json"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr"),
        *(f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "What is kept, by layer and role" in done.stdout
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert not {url for url in asked if "page" in url or not re.search(r"google|gvt1|chromium", url)}


def test_run_writes_the_page_too(merged, tmp_path):
    models, _ = merged
    recipe = models.recipe_file("ota", density=0.3)
    result = CliRunner().invoke(cli, ["run", str(recipe), str(tmp_path / "out"), "--report", "-q"])
    assert result.exit_code == 0, result.output
    assert "30" in (tmp_path / "out" / "report.html").read_text()


def test_as_json_and_what_is_no_merge(merged, tmp_path):
    _, out = merged
    found = json.loads(CliRunner().invoke(cli, ["report", str(out), "--json"]).stdout)
    assert {"report", "overall", "groups", "ranks", "automatic"} <= found.keys()
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="is no merge of this version"):
            analyse(folder)
