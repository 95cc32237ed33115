"""Published files load strictly, are told apart by their keys, and say what does not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dig_scale.errors import UserError
from dig_scale.model.published.weights import PublishedKind, PublishedModel, load_published
from tests.dig_scale.model.published.published_files import (
    SMALL,
    Shapes,
    bioemu_config,
    bioemu_table,
    carbon_table,
    catalyst_table,
    count,
    flat,
    ligand_table,
    protein_table,
    random_state,
    save,
    small_protein_table,
    structure_table,
)

BIOEMU = structure_table(512, 256, 8, 32, 1024)


def assert_holds(model: PublishedModel, shapes: Shapes) -> None:
    state = model.net.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
    assert not any(value.is_meta for value in state.values())
    assert all(value.dtype == torch.float32 for value in state.values())
    assert not model.net.training


@pytest.mark.parametrize(
    ("kind", "table", "tensors", "values"),
    [
        (PublishedKind.DIG_PROTEIN, protein_table, 248, 81_916_294),
        (PublishedKind.DIG_CATALYST, catalyst_table, 236, 51_435_777),
        (PublishedKind.DIG_LIGAND, ligand_table, 264, 58_025_377),
        (PublishedKind.DIG_CARBON, carbon_table, 307, 95_701_763 + 256),
    ],
)
def test_dig_files_of_the_published_sizes_load_with_no_key_left_over(
    kind: PublishedKind, table: Callable[[], Shapes], tensors: int, values: int, tmp_path: Path
) -> None:
    shapes = table()
    assert (len(shapes), count(shapes)) == (tensors, values)
    inner = "state_dict" if kind is PublishedKind.DIG_PROTEIN else "model"
    content = {inner: OrderedDict((f"module.{key}", value) for key, value in flat(shapes).items())}
    model = load_published(save(content, tmp_path / "published.pt"))
    assert model.kind is kind
    assert_holds(model, shapes)


@pytest.mark.parametrize(("extra", "tensors"), [("false", 172), ("true", 220)])
def test_bioemu_files_of_both_layouts_load_with_no_key_left_over(extra: str, tensors: int, tmp_path: Path) -> None:
    shapes = bioemu_table(BIOEMU, 8, 512, 256, int(extra == "true"))
    assert len(shapes) == tensors
    (tmp_path / "config.yaml").write_text(bioemu_config(extra))
    model = load_published(save(flat(shapes), tmp_path / "checkpoint.ckpt"))
    assert model.kind is PublishedKind.BIOEMU
    assert model.config is not None
    assert model.config.rotations["num_omega"] == 200
    assert_holds(model, shapes)


def test_weights_arrive_as_they_stand_in_the_file(tmp_path: Path) -> None:
    state = random_state(small_protein_table())
    model = load_published(save({"state_dict": state}, tmp_path / "small.pth"))
    assert all(torch.equal(value, state[key]) for key, value in model.net.state_dict().items())


def test_double_and_half_precision_become_single(tmp_path: Path) -> None:
    shapes = catalyst_table(**SMALL)
    for dtype in (torch.float64, torch.float16):
        assert_holds(load_published(save({"model": flat(shapes, dtype)}, tmp_path / "checkpoint.pt")), shapes)


def test_ligand_files_give_the_moving_average_where_they_have_one(tmp_path: Path) -> None:
    shapes = ligand_table(**SMALL)
    average = random_state(shapes, seed=1)
    content = {"model": random_state(shapes), "extra_state": {"ema": average}}
    model = load_published(save(content, tmp_path / "checkpoint_prolig.pt"))
    assert all(torch.equal(value, average[key]) for key, value in model.net.state_dict().items())


def test_old_catalyst_read_outs_are_averaged_and_shared(tmp_path: Path) -> None:
    state = random_state(catalyst_table(**SMALL))
    old = {key: value for key, value in state.items() if not key.startswith("force_proj_delta_pos.")}
    weight = old.pop("force_proj.force_proj.weight")
    old |= {f"force_proj.force_proj{axis}.weight": weight + axis for axis in (1, 2, 3)}
    old["force_proj.force_proj.bias"] = torch.zeros(1)
    loaded = load_published(save({"model": old}, tmp_path / "old.pt")).net.state_dict()
    for head in ("force_proj", "force_proj_delta_pos"):
        torch.testing.assert_close(loaded[f"{head}.force_proj.weight"], weight + 2)
        assert torch.equal(loaded[f"{head}.q_proj.weight"], state["force_proj.q_proj.weight"])


def test_carbon_files_may_lack_the_unread_table(tmp_path: Path) -> None:
    shapes = carbon_table(**SMALL)
    state = flat(shapes)
    del state["encoder.graph_encoder.sid_encoder.weight"]
    assert_holds(load_published(save({"model": state}, tmp_path / "carbon.pt")), shapes)


def test_misfits_are_named_with_their_shapes(tmp_path: Path) -> None:
    state = flat(small_protein_table())
    del state["st_module.encoder.layers.1.norm2.bias"]
    state["st_module.new"] = torch.zeros(1)
    state["st_module.encoder.layers.0.attn.fc_out.weight"] = torch.zeros(64, 5)
    with pytest.raises(UserError) as raised:
        load_published(save({"state_dict": state}, tmp_path / "broken.pth"))
    message = str(raised.value)
    assert "broken.pth looks like dig-protein" in message
    assert "1 missing: st_module.encoder.layers.1.norm2.bias" in message
    assert "1 unexpected: st_module.new" in message
    assert "layers.0.attn.fc_out.weight (64, 5) instead of (64, 256)" in message
    assert "\n" not in message


def test_a_truncated_network_is_not_taken_for_a_smaller_one(tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in small_protein_table().items() if not key.startswith("st_module.diff_head")}
    with pytest.raises(UserError, match=r"12 missing: st_module\.diff_head\.fc_t\.0\.weight"):
        load_published(save({"state_dict": flat(shapes)}, tmp_path / "cut.pth"))


def test_unknown_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other\.pt: not a published network .* begin with embedding\.weight"):
        load_published(save({"embedding.weight": torch.zeros(2)}, tmp_path / "other.pt"))
    with pytest.raises(UserError, match="no checkpoint at"):
        load_published(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"text\.pt: cannot be read"):
        load_published(tmp_path / "text.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_published(save({"epoch": 3}, tmp_path / "epoch.pt"))


class Danger:
    """Writes a file when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return open, ("written_by_a_pickle", "w")


def test_a_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be read as a file of tensors alone"):
        load_published(save({"state_dict": Danger()}, tmp_path / "danger.pt"))
    assert not (tmp_path / "written_by_a_pickle").exists()


def test_bioemu_needs_its_configuration_and_understands_every_entry(tmp_path: Path) -> None:
    path = save(flat(bioemu_table(BIOEMU, 8, 512, 256)), tmp_path / "checkpoint.ckpt")
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        load_published(path)
    config = tmp_path / "config.yaml"
    config.write_text(bioemu_config().replace("dropout: 0.1", "dropuot: 0.1"))
    with pytest.raises(UserError, match=r"config\.yaml, score_model: entries \['dropuot'\] are not known"):
        load_published(path)
    config.write_text(bioemu_config().replace("CosineVPSDE", "LinearVPSDE"))
    with pytest.raises(UserError, match="LinearVPSDE"):
        load_published(path)
    config.write_text("sdes: {}")
    with pytest.raises(UserError, match="no score_model section"):
        load_published(path)
