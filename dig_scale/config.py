"""The schema of a recipe: TOML in, frozen pydantic models out. An unknown key is an error; presence means enabled.

`load_recipe(path, overrides)` reads a file (or the name of a bundled recipe) and applies `--set section.key=value`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dig_scale.errors import RecipeError

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of all recipe sections: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SystemSpec(Section):
    """One system of a run: exactly one of `sequence` (ACE-ALA-NME), `file` (PDB, mmCIF, SDF) or `smiles`."""

    name: str
    sequence: str | None = None
    file: Path | None = None
    smiles: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SystemSpec:
        given = [key for key in ("sequence", "file", "smiles") if getattr(self, key) is not None]
        if len(given) != 1:
            found = ", ".join(given) if given else "none"
            raise ValueError(f"system {self.name!r} needs exactly one of sequence, file, smiles; found {found}")
        return self


class ReplicaExchange(Section):
    """Temperature replica exchange: one rung per temperature, the first is the target."""

    temperatures: tuple[PositiveFloat, ...] = Field(min_length=2)
    """K, ascending; the first equals `simulate.temperature`."""
    exchange_interval_ps: PositiveFloat = 1.0


class Simulate(Section):
    """How trajectories are generated (OpenMM)."""

    force_field: tuple[str, ...] = ("amber14/protein.ff14SB.xml",)
    implicit_solvent: Literal["obc2", "none"] = "obc2"
    temperature: PositiveFloat = 300.0
    """K."""
    friction_per_ps: PositiveFloat = 1.0
    time_step_fs: PositiveFloat = 4.0
    constraints: Literal["h-bonds", "none"] = "h-bonds"
    hydrogen_mass: PositiveFloat = 3.0
    """amu; mass is taken from the bonded heavy atom (hydrogen mass repartitioning)."""
    frame_spacing_ps: PositiveFloat = 1.0
    frames: PositiveInt = 10_000
    """Frames per (system, replica), at every temperature."""
    equilibration_ps: float = Field(default=50.0, ge=0)
    replicas: PositiveInt = 2
    chunk_frames: PositiveInt = 250
    """Frames per chunk: the unit that a killed run carries on from."""
    actors: PositiveInt | None = None
    """Ray actors; one per core when absent."""
    replica_exchange: ReplicaExchange | None = None
    seed: int = 1


class Pack(Section):
    """How trajectories become training shards."""

    atoms: Literal["all", "heavy"] = "all"
    temperature: PositiveFloat | None = None
    """K; keep only trajectories at this temperature (default: the target temperature of `simulate`)."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    split_by: Literal["frame", "block", "trajectory"] = "block"
    frames_per_member: PositiveInt = 64
    members_per_shard: PositiveInt = 64
    stride: PositiveInt = 1
    seed: int = 1


class Model(Section):
    """Size of the Graphormer score model."""

    layers: PositiveInt = 4
    width: PositiveInt = 128
    heads: PositiveInt = 8
    feed_forward: PositiveInt = 256
    radial_kernels: PositiveInt = 64
    vector_channels: PositiveInt = 16
    """Channels of the geometric (vector and pseudo-scalar) filters."""
    max_path_length: PositiveInt = 8
    radial_knots: int = Field(default=1024, ge=0)
    """Knots of the radial bias table; 0 evaluates the direct form for every pair."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """`auto`: fused kernels on a GPU, their fast form on a CPU; `reference`: plain PyTorch from the formulas."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Model:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Diffusion(Section):
    """Forward process: `dig-sigmoid` is DiG's discrete VP schedule, `log-linear` and `power` are continuous-time."""

    schedule: Literal["dig-sigmoid", "log-linear", "power"] = "power"
    steps: PositiveInt = 500
    """Steps N of the discrete DiG schedule."""
    beta_start: PositiveFloat = 1e-7
    beta_end: PositiveFloat = 2e-2
    noise_min: PositiveFloat = 0.01
    """Å; sigma/alpha at t = 0 of a continuous-time schedule."""
    noise_max: PositiveFloat = 20.0
    """Å; sigma/alpha at t = 1 of a continuous-time schedule."""
    power: PositiveFloat = 7.0
    """rho of the `power` schedule (Karras et al. 2022, eq. 5)."""


class Train(Section):
    """How the model is trained (DeepSpeed)."""

    steps: PositiveInt = 5_000
    global_batch: PositiveInt = 256
    micro_batch: PositiveInt | None = None
    """Frames per rank per forward pass; global_batch / ranks when absent."""
    ranks: PositiveInt | None = None
    """Processes started by the command line on one machine; cores (CPU) or GPUs when absent."""
    learning_rate: PositiveFloat = 1e-3
    final_learning_rate_fraction: float = Field(default=0.02, ge=0, le=1)
    warmup_steps: int = Field(default=200, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    activation_checkpointing: Literal["none", "blocks"] = "none"
    time_sampling: Literal["antithetic", "uniform"] = "antithetic"
    log_every: PositiveInt = 50
    validate_every: PositiveInt = 500
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    seed: int = 1


SolverName = Literal["ancestral", "euler-maruyama", "heun", "dpm-solver++2m-ode", "dpm-solver++2m-sde"]


class Sample(Section):
    """How ensembles are drawn."""

    solver: SolverName = "dpm-solver++2m-sde"
    steps: PositiveInt = 40
    num: PositiveInt = 10_000
    batch: PositiveInt = 512
    seed: int = 1
    workers: PositiveInt | None = None
    """Sampling processes on one machine; one per core (CPU) or GPU when absent."""


class Serve(Section):
    """How the sampling service runs (Ray Serve)."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    replicas: PositiveInt = 1
    max_batch: PositiveInt = 256
    """Walkers advanced together by one replica."""
    max_samples_per_request: PositiveInt = 100_000
    max_queued_requests: PositiveInt = 64


class Evaluate(Section):
    """How an ensemble is compared with a reference."""

    bins: PositiveInt = 36
    bootstrap: PositiveInt = 200
    seed: int = 1


class Recipe(Section):
    """A run: systems, and one section per stage. A stage whose section is absent is not part of the run."""

    name: str
    seed: int = 1
    systems: tuple[SystemSpec, ...] = ()
    simulate: Simulate | None = None
    pack: Pack | None = None
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train | None = None
    sample: Sample = Sample()
    serve: Serve = Serve()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        names = [spec.name for spec in self.systems]
        if len(set(names)) != len(names):
            raise ValueError("two systems have the same name")
        exchange = self.simulate.replica_exchange if self.simulate else None
        if exchange and self.simulate and exchange.temperatures[0] != self.simulate.temperature:
            raise ValueError("simulate.replica_exchange.temperatures must start with simulate.temperature")
        return self


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a TOML file or the name of a bundled one, with `section.key=value` overrides; raises RecipeError."""
    path = resolve_recipe_path(source)
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        content = apply_override(content, override)
    content = _anchor_files(content, path.parent)
    return parse_recipe(content, str(path))


def parse_recipe(content: dict[str, Any], source: str) -> Recipe:
    """Recipe from plain data; `source` is named in the RecipeError."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}" for item in error.errors()]
        raise RecipeError(f"{source}: " + "; ".join(lines)) from None


def bundled_recipes() -> dict[str, Path]:
    """Name -> path of the recipes that come with the project (the wheel's copy, or launch/recipes in a checkout)."""
    packaged = Path(str(resources.files("dig_scale"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parent.parent / "launch" / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def resolve_recipe_path(source: str | Path) -> Path:
    """Path of a recipe given as a file or a bundled name; raises RecipeError listing the bundled names."""
    path = Path(source)
    if path.is_file():
        return path
    bundled = bundled_recipes()
    if str(source) in bundled:
        return bundled[str(source)]
    raise RecipeError(f"no recipe {str(source)!r}: give a .toml file or one of {', '.join(bundled)}")


def apply_override(content: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `content` with one `section.key=value` applied; the value is read as TOML, else as a string."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"override {override!r}: expected section.key=value, as in train.learning_rate=1e-4")
    return _with_value(content, key.strip().split("."), _toml_value(text.strip()), override)


def _with_value(content: dict[str, Any], keys: list[str], value: Any, override: str) -> dict[str, Any]:
    if len(keys) == 1:
        return content | {keys[0]: value}
    inner = content.get(keys[0], {})
    if not isinstance(inner, dict):
        raise RecipeError(f"override {override!r}: {keys[0]} is not a section")
    return content | {keys[0]: _with_value(inner, keys[1:], value, override)}


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _anchor_files(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """System files in a recipe are relative to the recipe."""
    systems = content.get("systems")
    if not isinstance(systems, list):
        return content
    anchored = [
        spec | {"file": str(folder / spec["file"])} if isinstance(spec, dict) and "file" in spec else spec
        for spec in systems
    ]
    return content | {"systems": anchored}
