"""A benchmark's rows say where and with what they were measured, on a machine that lacks some of it too."""

from __future__ import annotations

from importlib import metadata

from benchmarks.rows import NOT_INSTALLED, PACKAGES, machine, version_of


def test_a_package_that_is_absent_is_said_to_be_so() -> None:
    assert version_of("dig-scale-no-such-package") == NOT_INSTALLED
    assert version_of("numpy") == metadata.version("numpy")


def test_a_machine_names_the_version_of_every_package() -> None:
    assert machine()["versions"].keys() == set(PACKAGES)
