"""A protein language model's embedding of every residue: ESM-2 through `transformers`, where that is installed.

In: a protein and the name of a model, or the folder that it was saved in. Out: its last hidden layer. Every chain is one
sequence of the residues that are there; missing ones leave no trace. Runs on the processor, one chain at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dig_scale.errors import UserError
from dig_scale.importers.residues import THREE_LETTER, standard_name
from dig_scale.system import System

UNKNOWN = "X"
"""The letter of a residue that is no standard amino acid."""
_ONE_LETTER = {name: letter for letter, name in THREE_LETTER.items()}


def sequences(system: System) -> dict[int, str]:
    """One-letter sequence of every chain, by its index."""
    letters = np.array([_ONE_LETTER.get(standard_name(name), UNKNOWN) for name in system.residue_names])
    return {int(chain): "".join(letters[system.chain_index == chain]) for chain in np.unique(system.chain_index)}


def embedded(system: System, name: str) -> np.ndarray:
    """Last hidden layer [N, C] float32 of each residue within its chain, by the model of this name or in this folder.

    Raises UserError where transformers is not installed, there is no such model, or it does not read residues one by one.
    """
    tokenizer, model = _loaded(name)
    found = np.zeros((system.n_sites, model.config.hidden_size), np.float32)
    for chain, sequence in sequences(system).items():
        tokens = tokenizer(sequence, return_tensors="pt")
        if tokens["input_ids"].shape[1] != len(sequence) + 2:
            raise UserError(
                f"{name}: its tokenizer makes {tokens['input_ids'].shape[1]} tokens of the {len(sequence)} residues of "
                f"chain {chain + 1} of system {system.name!r}, expected one of each and two at the ends, as ESM-2's does"
            )
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state[0, 1:-1]
        found[system.chain_index == chain] = hidden.float().numpy()
    return found


def _loaded(name: str) -> tuple[Any, Any]:
    """Tokenizer and model, every weight of it read."""
    try:
        from transformers import AutoConfig, EsmForMaskedLM, EsmTokenizer
    except ImportError:
        raise UserError(f"esm2:{name} needs transformers: pip install 'dig-scale[esm]'") from None
    architecture: Any = EsmForMaskedLM
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind == "esm":
            tokenizer = EsmTokenizer.from_pretrained(name)
            whole, report = architecture.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # a missing folder, no network, a damaged file: each its own exception
        problem = " ".join(str(error).split())[:300]
        raise UserError(
            f"esm2:{name}: no model of that name, and no folder with config.json, vocab.txt and weights ({problem})"
        ) from None
    if kind != "esm":
        raise UserError(
            f"esm2:{name} is a model of type {kind!r}, expected an ESM-2 such as facebook/esm2_t33_650M_UR50D"
        )
    missing = sorted(key for key in report["missing_keys"] if key.startswith(("esm.embeddings.", "esm.encoder.")))
    if missing:
        raise UserError(
            f"esm2:{name}: {len(missing)} weights are missing, the first {missing[0]!r}; get the model whole"
        )
    return tokenizer, whole.esm.eval()
