"""A store gives back what was put in, in a form any Zarr v3 reader opens, and refuses what it cannot hold."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from dig_shards import FieldSpec, ShardError, TrajectoryReader, TrajectoryWriter, break_lock
from dig_shards.lock import lock_path


def test_read_returns_values_within_half_a_grid_step(tmp_path, write_trajectory, arrays):
    reader = TrajectoryReader(write_trajectory(tmp_path / "t.zarr", 53))
    expected = arrays(5, 0, 0, 53)
    positions = reader.read("positions", 0, 53)
    assert (reader.n_frames, reader.is_finished, positions.dtype) == (53, True, np.float32)
    # Half a step of the 1e-3 grid, and the float32 rounding of values up to 20.
    assert np.abs(positions - expected["positions"]).max() <= 0.5e-3 + 4e-6
    np.testing.assert_array_equal(reader.read("energy", 0, 53), expected["energy"])
    np.testing.assert_array_equal(reader.read("charge", 0, 53), expected["charge"])


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (15, 17), (16, 32), (3, 53), (52, 53)])
def test_any_range_is_that_slice_of_the_whole(tmp_path, write_trajectory, start, stop):
    reader = TrajectoryReader(write_trajectory(tmp_path / "t.zarr", 53))
    np.testing.assert_array_equal(
        reader.read_raw("positions", start, stop), reader.read_raw("positions", 0, 53)[start:stop]
    )


def test_encoding_decoded_values_gives_the_same_integers(tmp_path, fields, write_trajectory, arrays):
    first = TrajectoryReader(write_trajectory(tmp_path / "first.zarr", 16))
    decoded = {spec.name: first.read(spec.name, 0, 16) for spec in first.fields}
    with TrajectoryWriter.create(tmp_path / "second.zarr", first.fields, first.attributes, 16) as writer:
        writer.append_chunk(decoded)
        writer.finish()
    second = TrajectoryReader(tmp_path / "second.zarr")
    np.testing.assert_array_equal(first.read_raw("positions", 0, 16), second.read_raw("positions", 0, 16))
    assert first.fingerprint() == second.fingerprint()


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64"]
)
def test_zarr_itself_opens_the_store_without_a_warning(tmp_path, dtype):
    scale = 0.5 if dtype.startswith("int") else None
    fields = [FieldSpec("values", (3,), dtype, scale, "K"), FieldSpec("step", (), "int64")]
    values = np.arange(15).reshape(5, 3)
    with TrajectoryWriter.create(tmp_path / "t.zarr", fields, {"a": [1, "Å"]}, 4) as writer:
        writer.append_chunk({"values": values[:4], "step": np.arange(4)})
        writer.finish({"values": values[4:], "step": np.arange(4, 5)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "t.zarr", mode="r")
        assert {name for name, _ in group.arrays()} == {"values", "step"}
        array = group["values"]
        stored = np.asarray(array[:])
    assert str(array.dtype) == dtype
    np.testing.assert_array_equal(stored * (scale or 1), values)
    np.testing.assert_array_equal(np.asarray(group["step"][:]), np.arange(5))
    assert array.attrs["unit"] == "K"
    assert group.attrs["user"] == {"a": [1, "Å"]}


def test_all_zero_chunks_are_stored(tmp_path):
    with TrajectoryWriter.create(tmp_path / "t.zarr", [FieldSpec("x", (2,), "int32", 1e-3)], {}, 4) as writer:
        writer.append_chunk({"x": np.zeros((4, 2))})
        writer.finish()
    reader = TrajectoryReader(tmp_path / "t.zarr")
    reader.verify()
    assert reader.read("x", 0, 4).tolist() == [[0, 0]] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_value_is_refused_by_trajectory_field_and_frame(tmp_path, fields, arrays, bad):
    with TrajectoryWriter.create(tmp_path / "run-7.zarr", fields(5), {}, 8) as writer:
        writer.append_chunk(arrays(5, 0, 0, 8))
        chunk = arrays(5, 0, 8, 16)
        chunk["positions"][3, 2, 1] = bad
        with pytest.raises(ShardError, match=r"run-7\.zarr: field positions, frame 11: .* is not finite"):
            writer.append_chunk(chunk)
        assert writer.n_frames == 8
        writer.append_chunk(arrays(5, 0, 8, 16))
    assert TrajectoryReader(tmp_path / "run-7.zarr").n_frames == 16


@pytest.mark.parametrize(
    ("dtype", "scale", "value"),
    [("int32", 1e-3, 2147483.7), ("int16", 1e-2, -327.70), ("int8", None, 128), ("int64", 1.0, 2.0**63)],
)
def test_value_outside_the_grid_is_refused(tmp_path, dtype, scale, value):
    with (
        TrajectoryWriter.create(tmp_path / "t.zarr", [FieldSpec("x", (), dtype, scale)], {}, 1) as writer,
        pytest.raises(ShardError, match=r"field x, frame 0: .* is outside"),
    ):
        writer.append_chunk({"x": np.array([value])})


def test_float_overflow_and_fractions_in_integer_fields_are_refused(tmp_path):
    specs = [FieldSpec("small", (), "float32"), FieldSpec("whole", (), "int32")]
    with TrajectoryWriter.create(tmp_path / "t.zarr", specs, {}, 1) as writer:
        with pytest.raises(ShardError, match="overflows float32"):
            writer.append_chunk({"small": np.array([1e300]), "whole": np.array([1])})
        with pytest.raises(ShardError, match="is no integer"):
            writer.append_chunk({"small": np.array([1.0]), "whole": np.array([1.5])})


def test_wrong_fields_shapes_and_counts_are_refused(tmp_path, fields, arrays):
    with TrajectoryWriter.create(tmp_path / "t.zarr", fields(5), {}, 8) as writer:
        good = arrays(5, 0, 0, 8)
        for bad, message in [
            ({"positions": good["positions"]}, "expected \\['charge', 'energy', 'positions'\\]"),
            ({**good, "positions": good["positions"][:, :4]}, r"shape \[8, 4, 3\], expected \[frames, 5, 3\]"),
            ({**good, "energy": good["energy"][:7]}, "differ in frame count"),
            (arrays(5, 0, 0, 7), "chunk of 7 frames given, expected 8"),
        ]:
            with pytest.raises(ShardError, match=message):
                writer.append_chunk(bad)
        assert writer.n_frames == 0


def test_finished_store_takes_no_more_and_survives_resume(tmp_path, write_trajectory, arrays):
    path = write_trajectory(tmp_path / "t.zarr", 20)
    with TrajectoryWriter.resume(path) as writer:
        assert (writer.n_frames, writer.is_finished) == (20, True)
        with pytest.raises(ShardError, match="takes no more"):
            writer.append_chunk(arrays(5, 0, 0, 16))
        with pytest.raises(ShardError, match="takes no more"):
            writer.finish()
    TrajectoryReader(path).verify()


def test_resume_removes_what_follows_the_last_complete_chunk(tmp_path, fields, arrays):
    path = tmp_path / "t.zarr"
    with TrajectoryWriter.create(path, fields(5), {}, 8) as writer:
        writer.append_chunk(arrays(5, 0, 0, 8))
        committed = (path / "energy" / "zarr.json").read_bytes()
        writer.append_chunk(arrays(5, 0, 8, 16))
    # What a kill leaves after the second chunk's data and all but one field's metadata.
    (path / "energy" / "zarr.json").write_bytes(committed)
    (path / "energy" / "zarr.json.tmp").write_bytes(b"{")
    assert TrajectoryReader(path).n_frames == 8
    with TrajectoryWriter.resume(path) as writer:
        assert writer.n_frames == 8
        assert {file.name for file in (path / "energy").iterdir()} == {"zarr.json", "c.0"}
        writer.finish(arrays(5, 0, 8, 11))
    TrajectoryReader(path).verify()
    np.testing.assert_array_equal(TrajectoryReader(path).read("energy", 0, 11), arrays(5, 0, 0, 11)["energy"])


def test_create_refuses_to_overwrite(tmp_path, write_trajectory, fields):
    path = write_trajectory(tmp_path / "t.zarr", 20)
    with pytest.raises(ShardError, match="already exists"):
        TrajectoryWriter.create(path, fields(5), {}, 16)
    assert not lock_path(path).exists()


def test_second_live_writer_is_refused_until_the_first_closes(tmp_path, fields):
    path = tmp_path / "t.zarr"
    with TrajectoryWriter.create(path, fields(5), {}, 8), pytest.raises(ShardError, match=f"process {os.getpid()}"):
        TrajectoryWriter.resume(path)
    TrajectoryWriter.resume(path).close()
    assert not lock_path(path).exists()


def test_lock_of_a_dead_process_is_broken(tmp_path, fields):
    path = tmp_path / "t.zarr"
    TrajectoryWriter.create(path, fields(5), {}, 8).close()
    code = f"import os, dig_shards; w = dig_shards.TrajectoryWriter.resume({str(path)!r}); os._exit(0)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert lock_path(path).exists()
    TrajectoryWriter.resume(path).close()


def test_lock_of_another_host_holds_until_broken_and_the_old_writer_notices(tmp_path, fields, arrays, monkeypatch):
    path = tmp_path / "t.zarr"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("platform.node", lambda: "elsewhere")
        old = TrajectoryWriter.create(path, fields(5), {}, 8)
    with pytest.raises(ShardError, match="host elsewhere"):
        TrajectoryWriter.resume(path)
    break_lock(path)
    with TrajectoryWriter.resume(path) as new:
        with pytest.raises(ShardError, match="taken over"):
            old.append_chunk(arrays(5, 0, 0, 8))
        old.close()
        new.append_chunk(arrays(5, 0, 0, 8))
    assert TrajectoryReader(path).n_frames == 8


def test_reader_of_a_growing_store_sees_whole_chunks(tmp_path, fields, arrays):
    path = tmp_path / "t.zarr"
    with TrajectoryWriter.create(path, fields(5), {}, 8) as writer:
        assert TrajectoryReader(path).n_frames == 0
        writer.append_chunk(arrays(5, 0, 0, 8))
        reader = TrajectoryReader(path)
        assert (reader.n_frames, reader.is_finished) == (8, False)
        with pytest.raises(ShardError, match=r"frames 0\.\.9 asked, the store holds 0\.\.8"):
            reader.read("positions", 0, 9)
        with pytest.raises(ShardError, match="no field 'forces'; it has positions, energy, charge"):
            reader.read("forces", 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Bad.name", ()), "no dots"),
        (("x", (0,)), "empty axis"),
        (("x", (), "complex64"), "complex64"),
        (("x", (), "float32", 1e-3), "needs an integer dtype"),
        (("x", (), "int32", -1.0), "positive"),
    ],
)
def test_impossible_field_is_refused(arguments, message):
    with pytest.raises(ShardError, match=message):
        FieldSpec(*arguments)


@pytest.mark.parametrize("attributes", [{"x": float("nan")}, {"x": {1, 2}}, {"dig_seal": "0" * 64}])
def test_attributes_that_are_not_plain_json_are_refused_and_leave_nothing(tmp_path, fields, attributes):
    with pytest.raises(ShardError):
        TrajectoryWriter.create(tmp_path / "t.zarr", fields(5), attributes, 8)
    assert list(tmp_path.iterdir()) == []


def test_missing_store_is_named(tmp_path: Path):
    for opening in (TrajectoryReader, TrajectoryWriter.resume):
        with pytest.raises(ShardError, match="nowhere"):
            opening(tmp_path / "nowhere.zarr")
