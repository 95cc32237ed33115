"""dig-scale: Distributional Graphormer as a distributed system, from simulation to equilibrium ensembles."""

__version__ = "0.1.0"
