"""The CUDA extension before anything is compiled: its sources, what it asks of a machine, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dig_kernels import cuda_extension


@pytest.mark.parametrize(("longest", "width", "element_size"), [(192, 32, 2), (112, 64, 4)])
def test_a_sample_whose_gradient_has_no_room_is_refused_before_the_forward(
    longest: int, width: int, element_size: int
) -> None:
    of_a_hopper = 227 * 1024
    cuda_extension.check_small_backward(longest, width, element_size, of_a_hopper)
    with pytest.raises(RuntimeError, match=rf"{longest + 1} sites .* {of_a_hopper}: use shorter"):
        cuda_extension.check_small_backward(longest + 1, width, element_size, of_a_hopper)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_so() -> None:
    assert not cuda_extension.is_available()
    with pytest.raises(RuntimeError, match="need a GPU"):
        cuda_extension.load_extension()


@pytest.mark.parametrize("place", ["csrc", "dig_kernels/csrc"])
def test_the_sources_are_found_in_a_checkout_and_in_an_installed_package(tmp_path: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"CUDA sources are not at .*dig_kernels/csrc nor .*csrc: install"):
        cuda_extension.sources_of(tmp_path / "dig_kernels")
    (tmp_path / place / "binding.cpp").touch()
    assert cuda_extension.sources_of(tmp_path / "dig_kernels") == tmp_path / place
