"""ESM-2's embeddings and AlphaFold2's representations as features of a protein, from import to what a model is trained on."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dig_scale.cli import app
from dig_scale.config import Import, Model, Recipe, Sample
from dig_scale.ensemble import read_ensemble
from dig_scale.errors import UserError
from dig_scale.importers.backbone import residue_chain
from dig_scale.importers.language_model import embedded, sequences
from dig_scale.importers.readers import run_import
from dig_scale.importers.representations import represented
from dig_scale.importers.sequence import parse_sequence
from dig_scale.model.checkpoint import Checkpoint, save_checkpoint
from dig_scale.model.score_model import ScoreModel
from dig_scale.recipe_files import load_recipe
from dig_scale.records import pack_dataset, read_trajectory_system
from dig_scale.stages.sample import shared_out
from dig_scale.system import System
from dig_scale.training.data import open_split
from tests.kinds import SMALL, case

CHIGNOLIN = "GYDPETGTWG"
WIDTH = 16
RECIPE = """
name = "chignolin"

[[imports]]
reader = "{reader}"
files = ["chignolin.pdb"{again}]
options = {{ representations = "{representations}" }}

[pack]
validation_fraction = 0.0

[model]
sites = "residues"
site_features = {width}
{pair}

[train]
"""


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ESM-2 of two layers, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("esm2")
    letters = [*"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-"]
    tokens = ["<cls>", "<pad>", "<eos>", "<unk>", *letters, "<null_1>", "<mask>"]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    transformers.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=len(tokens),
        mask_token_id=len(tokens) - 1,
        pad_token_id=1,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        position_embedding_type="rotary",
        token_dropout=True,
        emb_layer_norm_before=False,
        initializer_range=0.5,
    )
    transformers.EsmForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chignolin(shared_data: Path, tmp_path: Path) -> Path:
    """A folder with a structure of ten residues."""
    (tmp_path / "chignolin.pdb").write_text((shared_data / "bioemu_tests" / "chignolin.pdb").read_text())
    return tmp_path


def chain(sequence: str, name: str = "chain") -> System:
    return residue_chain(name, parse_sequence(sequence))


def alphafold_file(path: Path, residues: int) -> Path:
    generator = np.random.default_rng(0)
    np.savez(path, single=generator.normal(size=(residues, 384)), pair=generator.normal(size=(residues, residues, 128)))
    return path


def recipe_in(folder: Path, representations: str, width: int, reader: str = "backbone", pair: int = 0) -> Recipe:
    again = ', "chignolin.pdb"' if reader == "backbone-trajectory" else ""
    text = RECIPE.format(
        reader=reader,
        again=again,
        representations=representations,
        width=width,
        pair=f"pair_features = {pair}" if pair else "",
    )
    (folder / "chignolin.toml").write_text(text)
    return load_recipe(folder / "chignolin.toml")


def test_every_residue_gets_the_models_last_layer(esm: Path) -> None:
    from transformers import EsmForMaskedLM, EsmTokenizer

    tokens = EsmTokenizer.from_pretrained(esm)(CHIGNOLIN, return_tensors="pt")
    with torch.inference_mode():
        hidden = EsmForMaskedLM.from_pretrained(esm).eval()(**tokens, output_hidden_states=True).hidden_states[-1]
    found = embedded(chain(CHIGNOLIN), str(esm))
    assert found.shape == (10, WIDTH) and found.dtype == np.float32
    np.testing.assert_allclose(found, hidden[0, 1:-1].numpy(), atol=1e-5)
    assert np.abs(found[6] - found[9]).max() > 1e-2  # both are glycine: it is the context that differs


def test_every_chain_is_a_sequence_of_its_own(esm: Path) -> None:
    system = case("protein").system
    assert sequences(system) == {0: "AGSW", 1: "AKX"}
    found = embedded(system, str(esm))
    np.testing.assert_allclose(found[:4], embedded(chain("AGSW"), str(esm)), atol=1e-5)
    np.testing.assert_allclose(found[4:6], embedded(system.select([4, 5, 6]), str(esm))[:2], atol=1e-5)


@pytest.mark.parametrize("reader", ["backbone", "backbone-trajectory"])
@pytest.mark.parametrize("source", ["esm2", "alphafold2"])
def test_a_recipe_brings_features_from_its_import_to_the_training_data(
    esm: Path, chignolin: Path, source: str, reader: str
) -> None:
    alphafold_file(chignolin / "chignolin.npz", 10)
    given, width, pair = {"esm2": (f"esm2:{esm}", WIDTH, 0), "alphafold2": ("chignolin.npz", 384, 128)}[source]
    recipe = recipe_in(chignolin, given, width, reader, pair)
    (store,) = run_import(recipe.imports[0], chignolin / "trajectories")
    system = read_trajectory_system(store)
    assert system.site_features is not None and (system.pair_features is not None) == (pair > 0)
    assert system.origin["representations"] == (given if source == "esm2" else "chignolin.npz")
    pack_dataset(recipe, [chignolin / "trajectories"], chignolin / "dataset")
    data = open_split(chignolin / "dataset", "train", recipe, torch.device("cpu"))
    assert data is not None
    (context,) = data.contexts
    np.testing.assert_array_equal(context.site_features[0].numpy(), system.site_features)
    assert context.pair_features.shape == (1, 10, 10, pair)
    assert run_import(recipe.imports[0], chignolin / "trajectories") == [store]  # the same again: what is there stays


def test_the_command_imports_what_the_recipe_says(chignolin: Path) -> None:
    alphafold_file(chignolin / "chignolin.npz", 10)
    recipe_in(chignolin, "chignolin.npz", 384)
    out = chignolin / "trajectories"
    done = CliRunner().invoke(app, ["import", str(chignolin / "chignolin.toml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    system = read_trajectory_system(out / "chignolin" / "chignolin.zarr")
    assert system.pair_features is not None and system.pair_features.shape == (10, 10, 128)


def test_files_and_folders_of_a_recipe_count_from_it_and_names_of_models_stay(tmp_path: Path) -> None:
    wanted = {
        "a/b.npz": str(tmp_path / "a/b.npz"),
        "${DIG_SCALE_UNSET}/b.npz": "${DIG_SCALE_UNSET}/b.npz",
        "esm2:facebook/esm2_t6_8M_UR50D": "esm2:facebook/esm2_t6_8M_UR50D",
        "esm2:./model": f"esm2:{tmp_path / 'model'}",
    }
    for given, found in wanted.items():
        assert recipe_in(tmp_path, given, 8).imports[0].options["representations"] == found


@pytest.mark.parametrize("reader", ["backbone", "backbone-trajectory"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("other.npz", r"other.npz: single and pair are of 7 residues, system 'chignolin' has 10"),
        ("nowhere.npz", "no representations at .*nowhere.npz"),
        ("single.npz", r"single.npz: no 'pair' among \['single'\]"),
        ("wide.npz", r"wide.npz: single has shape \(10, 10\), expected \(10, 384\)"),
        ("${DIG_SCALE_UNSET}/x.npz", "names an environment variable that is not set"),
        ("esm2:./nowhere", "esm2:.*nowhere: no model of that name, and no folder with config.json"),
    ],
)
def test_representations_that_do_not_fit_are_told_in_one_line(
    chignolin: Path, reader: str, given: str, words: str
) -> None:
    alphafold_file(chignolin / "other.npz", 7)
    np.savez(chignolin / "single.npz", single=np.zeros((10, 384)))
    np.savez(chignolin / "wide.npz", single=np.zeros((10, 10)), pair=np.zeros((10, 10, 128)))
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(UserError, match=words) as caught:
        run_import(recipe_in(chignolin, given, 384, reader).imports[0], chignolin / "trajectories")
    assert "\n" not in str(caught.value)
    assert not list(chignolin.glob("trajectories/*/*.zarr"))


def test_residues_left_out_are_named_where_numbers_differ(tmp_path: Path) -> None:
    system = residue_chain("cut", ("ALA", "GLY"), {"left_out": ["cut.pdb: A MET 1 (no N)"]})
    with pytest.raises(UserError, match=r"of 3 residues, system 'cut' has 2 \(left out of it: cut.pdb: A MET 1"):
        represented(system, str(alphafold_file(tmp_path / "cut.npz", 3)))


def test_a_molecule_has_no_residues_to_represent(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"representations are of residues, and system .* is a molecule"):
        represented(case("molecule").system, "esm2:any")


def test_an_option_that_is_no_text_is_refused(chignolin: Path) -> None:
    entry = Import(reader="backbone", files=(chignolin / "chignolin.pdb",), options={"representations": 3})
    with pytest.raises(UserError, match="option 'representations': 3"):
        run_import(entry, chignolin / "trajectories")


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *others: Any) -> Any:
        if name.startswith("transformers"):
            raise ImportError(name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'dig-scale\[esm\]'"):
        represented(chain("AG"), "esm2:any")


def test_a_model_of_another_type_or_with_missing_weights_is_refused(esm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a model of type 'bert', expected an ESM-2"):
        embedded(chain("AG"), str(tmp_path / "bert"))
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in esm.iterdir():
        (cut / path.name).write_bytes(path.read_bytes())
    kept = {name: value for name, value in load_file(esm / "model.safetensors").items() if ".layer.1." not in name}
    save_file(kept, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing, the first 'esm.encoder.layer.1"):
        embedded(chain("AG"), str(cut))


def checkpoint_of(folder: Path, reads: Mapping[str, int], *systems: System) -> Path:
    torch.manual_seed(0)
    model = Model.model_validate(SMALL | {"sites": "residues", "radial_knots": 0} | dict(reads))
    weights, averaged = (ScoreModel(model).state_dict() for _ in range(2))
    content = Checkpoint(weights, averaged, Recipe(name="random", model=model), systems, step=0)
    return save_checkpoint(folder / "model.safetensors", content)


def test_a_new_protein_is_sampled_with_features_of_its_own(esm: Path, chignolin: Path) -> None:
    trained = represented(chain("AGSW", "trained"), f"esm2:{esm}")
    checkpoint, out = checkpoint_of(chignolin, {"site_features": WIDTH}, trained), chignolin / "out"
    asked = ["sample", str(checkpoint), "--out", str(out), "--system", CHIGNOLIN]
    asked += ["--num", "2", "--steps", "2", "--workers", "1"]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, UserError)
    assert "has no site_features, this model reads 16" in str(refused.exception)
    done = CliRunner().invoke(app, [*asked, "--representation", f"esm2:{esm}"])  # the refusal has left no trace in OUT
    assert done.exit_code == 0, done.output
    ensemble = read_ensemble(out)
    assert ensemble.n_samples == 2 and ensemble.system.residue_names[0] == "GLY"
    np.testing.assert_allclose(ensemble.system.site_features, embedded(chain(CHIGNOLIN), str(esm)), atol=2e-3)
    (draws,) = shared_out(checkpoint, str(chignolin / "chignolin.pdb"), Sample(), out, f"esm2:{esm}")
    np.testing.assert_array_equal(draws.system.site_features, ensemble.system.site_features)


def test_representations_that_nobody_reads_are_refused(tmp_path: Path) -> None:
    one, two = chain("AGSW", "one"), chain("AGSWA", "two")
    (tmp_path / "single").mkdir()
    alone = checkpoint_of(tmp_path / "single", {}, one)
    with pytest.raises(UserError, match="this model reads none"):
        shared_out(alone, None, Sample(), tmp_path / "out", "x.npz")
    with pytest.raises(UserError, match="is of one system: name it with --system"):
        shared_out(checkpoint_of(tmp_path, {"site_features": 16}, one, two), None, Sample(), tmp_path, "x.npz")
