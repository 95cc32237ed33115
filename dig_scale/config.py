"""The schema of a recipe: frozen pydantic models. An unknown key is an error; presence means enabled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from dig_scale.config_physics import Ablate, PhysicsInformed, Posterior
from dig_scale.config_properties import GuideSpec, Predict, SteerSpec
from dig_scale.config_section import PositiveFloat, PositiveInt, Section
from dig_scale.template_layout import TEMPLATE_FEATURES

Facet = Literal["fcc111", "fcc100", "fcc110", "bcc110", "hcp0001"]
CalculatorName = Literal["emt", "tblite", "pyscf"]
LANGUAGE_MODEL, TEMPLATE = "esm2:", "template:"
"""What the name of a language model and the file of a known structure begin with where a file of representations may stand."""


class SurfaceSpec(Section):
    """A slab with one adsorbate, built by ASE: `metal` is its element, `size` its cells along the surface and its layers."""

    metal: str
    facet: Facet = "fcc111"
    size: tuple[PositiveInt, PositiveInt, PositiveInt] = (2, 2, 4)
    lattice_constant: PositiveFloat | None = None
    """Å; when absent the equilibrium of effective medium theory for the fcc metals it knows, else ASE's tabulated value."""
    lattice_constant_c: PositiveFloat | None = None
    """Å; of hcp metals, with the same default."""
    vacuum: PositiveFloat = 14.0
    """Å between the slab and its next image along the third vector."""
    fixed_layers: int = Field(default=2, ge=0)
    """Layers at the bottom that do not move."""
    adsorbate: str | None = "O"
    """An element, or the name of a molecule known to ase.build.molecule; none leaves a clean slab."""
    site: str = "fcc"
    """ASE's name of the site: ontop, bridge, fcc, hcp, hollow, shortbridge or longbridge, as the facet has them."""
    height: PositiveFloat = 1.2
    """Å; of the adsorbate's lowest atom above the top layer."""


class CalculatorSpec(Section):
    """What gives energies and forces: effective medium theory, GFN-xTB (tblite), or density functional theory (pyscf)."""

    name: CalculatorName = "emt"
    method: Literal["GFN1-xTB", "GFN2-xTB"] = "GFN1-xTB"
    """Of tblite."""
    electronic_temperature: PositiveFloat = 300.0
    """K; of tblite's occupations."""
    functional: str = "pbe"
    """Of pyscf, as are those below."""
    basis: str = "gth-szv"
    """Of periodic systems; it goes with `pseudopotential`."""
    pseudopotential: str = "gth-pade"
    molecule_basis: str = "def2-svp"
    """Of systems without periodic directions, all electrons."""
    kpoints: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)
    cutoff_hartree: PositiveFloat | None = None
    """Plane-wave cutoff of the density's grid; PySCF's own choice, which is fine and slow, when absent."""
    smearing_ev: PositiveFloat | None = None
    """Fermi smearing of the occupations: metals need it."""


class ComplexSpec(Section):
    """A ligand where it sits in the pocket of a protein; the same sites as those of the reader `pocket` of [[imports]].

    Files are relative to the recipe; ${NAME} stands for an environment variable.
    """

    protein: Path
    """PDB or mmCIF."""
    ligand: Path
    """SDF or MOL2 with all atoms, in the protein's frame."""
    name_of_ligand: str | None = None
    """Which molecule of the file; needed where it holds several."""
    cutoff: PositiveFloat = 10.0
    """Å; residues with a heavy atom this near to the pocket's place are in."""
    shell: PositiveFloat | None = None
    """Å; of them, only atoms this near are sites of the model; dynamics has whole residues with hydrogens all the same."""
    defined_by: tuple[str, ...] = ()
    """Ligands of the file whose poses are the pocket's place; all of them when empty."""


class SystemSpec(Section):
    """One system of a run: exactly one of `sequence` (ACE-ALA-NME), `file` (PDB, mmCIF, SDF), `smiles`, `prepared` (files of
    an AMBER, GROMACS or OpenMM system), `surface` (a slab with an adsorbate) or `complex` (a ligand in its pocket)."""

    name: str
    sequence: str | None = None
    file: Path | None = None
    smiles: str | None = None
    prepared: tuple[Path, ...] | None = None
    surface: SurfaceSpec | None = None
    complex: ComplexSpec | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SystemSpec:
        sources = ("sequence", "file", "smiles", "prepared", "surface", "complex")
        given = [key for key in sources if getattr(self, key) is not None]
        if len(given) != 1:
            found = ", ".join(given) if given else "none"
            raise ValueError(f"system {self.name!r} needs exactly one of {', '.join(sources)}; found {found}")
        return self


class Import(Section):
    """Data that are there already, instead of or beside simulated ones: files of a public format, and its reader's options.

    Files are relative to the recipe; ${NAME} stands for an environment variable.
    """

    reader: Literal["backbone", "backbone-trajectory", "pocket", "catalyst", "crystals", "trajectory"]
    files: tuple[Path, ...] = Field(min_length=1)
    name: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class StructureSearch(Section):
    """Crystals of a composition found without data: random cells relaxed to minima, each new one a structure."""

    composition: str
    """Atoms of the cell, as in Cu4 or Cu3Al."""
    candidates: PositiveInt = 100
    """Random cells that are tried."""
    volume_per_atom: tuple[PositiveFloat, PositiveFloat]
    """Å³, least and most, before relaxation."""
    shortest_distance: PositiveFloat = 1.5
    """Å; no two atoms of a random cell are nearer, images included."""
    pressure_gpa: float = 0.0
    calculator: CalculatorSpec = CalculatorSpec()
    seed: int = Field(default=1, ge=0)
    workers: PositiveInt | None = None
    """Processes; one per core when absent."""


class ReplicaExchange(Section):
    """Temperature replica exchange: one rung per temperature, the first is the target."""

    temperatures: tuple[PositiveFloat, ...] = Field(min_length=2)
    """K, ascending; the first equals `simulate.temperature`."""
    exchange_interval_ps: PositiveFloat = 1.0


class ExplicitSolvent(Section):
    """Water and ions around a peptide or protein; takes the place of `implicit_solvent`."""

    model: Literal["tip3p", "spce"] = "tip3p"
    padding_nm: PositiveFloat = 1.0
    """Water between the sphere around the solute and the box's side."""
    ionic_strength: float = Field(default=0.15, ge=0)
    """mol/L of NaCl beyond what neutralises the solute."""
    box: Literal["cube", "dodecahedron", "octahedron"] = "dodecahedron"
    cutoff_nm: PositiveFloat = 1.0
    pressure_bar: PositiveFloat = 1.0
    pressure_equilibration_ps: float = Field(default=100.0, ge=0)
    """Run with a barostat that sets the box, once per system; production is at constant volume. 0: none."""


class Simulate(Section):
    """How trajectories are generated (OpenMM)."""

    force_field: tuple[str, ...] = ("amber14/protein.ff14SB.xml",)
    implicit_solvent: Literal["obc2", "none"] = "obc2"
    explicit_solvent: ExplicitSolvent | None = None
    temperature: PositiveFloat = 300.0
    """K."""
    friction_per_ps: PositiveFloat = 1.0
    time_step_fs: PositiveFloat | None = None
    """When absent as long as the system takes: 4 for force fields of biomolecules with heavy hydrogens (2 with light ones, 1
    without constraints) and for surfaces, at most 2 for MMFF94."""
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
    calculator: CalculatorSpec | None = None
    """What gives energies and forces of surfaces; effective medium theory when absent."""
    walkers: PositiveInt = 1
    """Copies of a system that one actor advances together, each with a trajectory of `frames` frames; surfaces gain most."""
    slab_layers: Literal["held", "free"] = "held"
    """Whether whole mobile layers of a slab keep their place along the surface; in small cells free ones slide."""
    seed: int = 1


class Pack(Section):
    """How trajectories become training shards."""

    atoms: Literal["all", "heavy", "residues"] = "all"
    """Sites of the model: all atoms, atoms but hydrogen, or residues with the frames of their backbones."""
    temperature: PositiveFloat | None = None
    """K; keep only trajectories at this temperature (default: the target temperature of `simulate`)."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    split_by: Literal["frame", "block", "trajectory"] = "block"
    frames_per_member: PositiveInt = 64
    members_per_shard: PositiveInt = 64
    stride: PositiveInt = 1
    seed: int = 1


class Condition(Section):
    """A property of a structure that conditions a model: a label of its frames, its typical value and its spread."""

    name: str
    centre: float
    spread: PositiveFloat


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
    sites: Literal["atoms", "anchored", "residues", "crystal"] = "atoms"
    """What the network reads and answers: free atoms; sites about anchors (pockets, slabs with their images), with their
    displacements; residues, with their frames; or a crystal's atoms and cell."""
    cutoff: PositiveFloat = 5.0
    """Å; periodic images of sites beyond it are not seen."""
    conditions: tuple[Condition, ...] = ()
    """Properties that the model can be asked for."""
    site_features: int = Field(default=0, ge=0)
    """Width of what the model reads of each site beside its identity: 384 of AlphaFold2's single representation, the width of a
    language model; 0 reads none, and needs none."""
    pair_features: int = Field(default=0, ge=0)
    """The same of pairs of sites: 128 of AlphaFold2's pair representation."""
    superposed_template: bool = False
    """Residues: whether a template (`template:FILE`, 42 site features) is also laid on the noised chain, so that every residue is
    shown its place there; worth it where samples are variants of a known fold."""
    kernels: Literal["auto", "reference", "triton"] = "auto"
    """`auto`: fused kernels on a GPU, their fast form on a CPU; `reference`: plain PyTorch from the formulas."""

    @property
    def guide_vectors(self) -> int:
        """Vectors that every site brings of its own."""
        return 2 * self.superposed_template + (self.sites == "anchored")

    @model_validator(mode="after")
    def _template_is_of_residues(self) -> Model:
        if self.superposed_template and (self.sites != "residues" or self.site_features != TEMPLATE_FEATURES):
            raise ValueError(
                f"superposed_template is for sites = 'residues' with site_features = {TEMPLATE_FEATURES}, those of template:FILE"
            )
        return self

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
    rotation_noise_min: PositiveFloat = 0.02
    rotation_noise_max: PositiveFloat = 1.65
    """rad; IGSO(3) width of residue frames at t = 0 and 1, geometric in t (DiG)."""
    fractional_noise_min: PositiveFloat = 0.005
    fractional_noise_max: PositiveFloat = 0.5
    """Width of the wrapped normal on a crystal's fractional coordinates at t = 0 and 1, geometric in t."""
    lattice_noise_min: PositiveFloat = 0.01
    lattice_noise_max: PositiveFloat = 20.0
    """Noise on a cell's coordinates, which are of order 1, at t = 0 and 1."""
    volume_per_site: PositiveFloat = 10.0
    """Å³; typical volume per atom of the crystals."""
    lattice_spread: PositiveFloat = 0.2
    """Standard deviation over the crystals of the logarithm of their cells' edges."""


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
    batches: Literal["one-system", "mixed"] = "one-system"
    """Whether the frames of a batch are all of one system, or of any; many systems of few frames want `mixed`."""
    condition_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of the frames whose properties are hidden from a conditioned model, so that it also learns to do without."""
    physics_informed: PhysicsInformed | None = None
    posterior: Posterior | None = None
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
    conditions: dict[str, float] = Field(default_factory=dict)
    """Wanted values of the properties that the model is conditioned on, by name; the others are left open."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance: 1 samples p(x | c), more sharpens c, 0 ignores it."""
    guide: GuideSpec | None = None
    steer: SteerSpec | None = None
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
    states: tuple[str, ...] = ()
    """NAME:PROPERTY:LOW:HIGH, as in left:dihedral:4,6,8,10:0:180; free energies between them; one name, several windows: all."""
    seed: int = 1


class Recipe(Section):
    """A run: systems, and one section per stage. A stage whose section is absent is not part of the run."""

    name: str
    seed: int = 1
    systems: tuple[SystemSpec, ...] = ()
    imports: tuple[Import, ...] = ()
    searches: tuple[StructureSearch, ...] = ()
    simulate: Simulate | None = None
    pack: Pack | None = None
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train | None = None
    predict: Predict | None = None
    sample: Sample = Sample()
    serve: Serve = Serve()
    evaluate: Evaluate = Evaluate()
    ablate: Ablate | None = None

    @model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        names = [spec.name for spec in self.systems]
        if len(set(names)) != len(names):
            raise ValueError("two systems have the same name")
        exchange = self.simulate.replica_exchange if self.simulate else None
        if exchange and self.simulate and exchange.temperatures[0] != self.simulate.temperature:
            raise ValueError("simulate.replica_exchange.temperatures must start with simulate.temperature")
        if exchange and self.simulate and self.simulate.walkers > 1:
            raise ValueError(
                "simulate.walkers must be 1 with simulate.replica_exchange, whose temperatures are its walkers"
            )
        energetic = self.train and (self.train.physics_informed or self.train.posterior)
        if self.predict and (self.ablate or energetic):
            raise ValueError("[predict] trains no score model, which learning from an energy and [ablate] are about")
        return self
