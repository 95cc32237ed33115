"""DeepSpeed's stages agree with each other, with one rank, and with an interrupted run; its known traps stay shut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dig_scale.config import Train
from dig_scale.errors import TrainingError
from dig_scale.training.zero import deepspeed_settings, join_ranks, share_of
from tests.dig_scale.training.rank_groups import RankGroup

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def by_stage(pair: RankGroup) -> dict[int, list[dict[str, Any]]]:
    return {stage: pair.run("engine_job", stage=stage, steps=5) for stage in STAGES}


@pytest.fixture(scope="module")
def resumed(pair: RankGroup, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("resume")
    return {stage: pair.run("resume_job", stage=stage, folder=str(folder / str(stage))) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_weights_at_start_are_the_modules_own_at_every_stage(by_stage: dict[int, Any], stage: int) -> None:
    assert by_stage[stage][0]["start_equals_module"]
    assert by_stage[stage][0]["start"] == by_stage[0][0]["start"]


@pytest.mark.parametrize("stage", STAGES)
def test_all_stages_give_the_same_losses_and_norms(by_stage: dict[int, Any], stage: int) -> None:
    for rank in (0, 1):
        assert by_stage[stage][rank]["losses"] == pytest.approx(by_stage[0][0]["losses"], abs=1e-6)
        assert by_stage[stage][rank]["norms"] == pytest.approx(by_stage[0][0]["norms"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_average_is_the_same_at_every_stage(by_stage: dict[int, Any], stage: int) -> None:
    assert by_stage[stage][0]["average"] == pytest.approx(by_stage[0][0]["average"], rel=1e-5, abs=1e-4)
    assert by_stage[stage][0]["average"] != by_stage[stage][0]["weights"]


@pytest.mark.parametrize("stage", STAGES)
def test_fragments_are_deepspeeds_weights_and_stay_live(by_stage: dict[int, Any], stage: int) -> None:
    for answer in by_stage[stage]:
        assert answer["agrees_with_deepspeed"]
        assert answer["cached_views_are_live"]


@pytest.mark.parametrize("stage", STAGES)
def test_fragments_cover_every_element_once(by_stage: dict[int, Any], stage: int) -> None:
    parts = [tuple(part) for answer in by_stage[stage] for part in answer["covered"]]
    if stage == 0:
        assert parts[: len(parts) // 2] == parts[len(parts) // 2 :]
        parts = parts[: len(parts) // 2]
    elements = [(name, element) for name, low, high in parts for element in range(low, high)]
    assert len(elements) == len(set(elements)) == by_stage[stage][0]["numel"]


@pytest.mark.parametrize("stage", STAGES)
def test_replaced_weights_are_used_and_given_back_to_the_last_bit(by_stage: dict[int, Any], stage: int) -> None:
    assert by_stage[stage][0]["replaced_differs"]
    assert by_stage[stage][0]["restored"]


def test_one_rank_equals_two(single: RankGroup, by_stage: dict[int, Any]) -> None:
    (alone,) = single.run("engine_job", stage=0, steps=5)
    assert alone["losses"] == pytest.approx(by_stage[0][0]["losses"], abs=1e-6)
    assert alone["norms"] == pytest.approx(by_stage[0][0]["norms"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("saved", [2, 4])
def test_resume_gives_the_same_losses_to_the_last_bit(resumed: dict[int, Any], stage: int, saved: int) -> None:
    for answer in resumed[stage]:
        assert answer[str(saved)]["losses"] == answer["expected"][saved:]
        assert answer[str(saved)]["average_equal"]


@pytest.mark.parametrize("stage", STAGES)
def test_resume_keeps_group_settings_and_step_counters(resumed: dict[int, Any], stage: int) -> None:
    for answer in resumed[stage]:
        assert answer["2"]["weight_decay"] == [0.05, 0.0]
        assert answer["2"]["step_counters"] == [6.0]


@pytest.mark.parametrize("stage", [0, 3])
def test_accumulation_and_recomputation_change_no_loss(pair: RankGroup, by_stage: dict[int, Any], stage: int) -> None:
    (first, _) = pair.run("accumulation_job", stage=stage, precision="fp32")
    assert first["losses"] == pytest.approx(by_stage[stage][0]["losses"][:4], abs=1e-6)


def test_bf16_with_accumulation_and_recomputation_runs_at_stage_3(pair: RankGroup, by_stage: dict[int, Any]) -> None:
    (first, _) = pair.run("accumulation_job", stage=3, precision="bf16")
    assert first["losses"] == pytest.approx(by_stage[3][0]["losses"][:4], rel=0.05)
    assert first["losses"] != pytest.approx(by_stage[3][0]["losses"][:4], abs=1e-6)


def test_no_extension_is_compiled(pair: RankGroup, by_stage: dict[int, Any]) -> None:
    assert not pair.extensions.exists() or not list(pair.extensions.iterdir())


def test_batch_that_does_not_divide_is_refused_with_numbers() -> None:
    with pytest.raises(TrainingError, match=r"256 is not a multiple of 3 ranks"):
        share_of(Train(global_batch=256), 3)
    with pytest.raises(TrainingError, match=r"128 rows per rank, not a multiple of train.micro_batch = 100"):
        share_of(Train(global_batch=256, micro_batch=100), 2)


def test_settings_follow_the_recipe() -> None:
    settings = deepspeed_settings(Train(global_batch=64, micro_batch=8, zero_stage=2, gradient_clip=0.7), 4, 5000)
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.7
    assert settings["zero_optimization"]["reduce_bucket_size"] == 5000


def test_missing_rank_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(TrainingError, match=r"RANK.*not set; start with"):
        join_ranks()


def test_stage_3_leaves_torchs_own_linear_in_place(pair: RankGroup) -> None:
    """DeepSpeed's replacement stays for the life of the process and changes the last bits of every later run in it."""
    pair.run("engine_job", stage=3, steps=1)
    assert pair.run("linear_job") == [torch.nn.functional.linear.__module__] * 2
