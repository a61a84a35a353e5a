"""Encoders with fewer heads: known to transformers' Auto classes here, and to a stranger's through the checkpoint.

A checkpoint of such a family carries `modeling_narrow_encoder.py` and names its classes under `auto_map`. spine itself
never runs that copy: it uses the module that is installed with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from spinecli.checkpoints import modeling_narrow_encoder as narrow
from spinecli.checkpoints.family import Family, families


def register_narrow_encoders() -> None:
    """Let transformers open `narrow_bert` and `narrow_roberta` in this process; calling it again changes nothing."""
    for config, bare, masked, classifier in (
        (
            narrow.NarrowBertConfig,
            narrow.NarrowBertModel,
            narrow.NarrowBertForMaskedLM,
            narrow.NarrowBertForSequenceClassification,
        ),
        (
            narrow.NarrowRobertaConfig,
            narrow.NarrowRobertaModel,
            narrow.NarrowRobertaForMaskedLM,
            narrow.NarrowRobertaForSequenceClassification,
        ),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, bare, exist_ok=True)
        AutoModelForMaskedLM.register(config, masked, exist_ok=True)
        AutoModelForSequenceClassification.register(config, classifier, exist_ok=True)


def auto_map(family: Family) -> dict[str, str]:
    """config.json's `auto_map`: where a stranger's transformers finds the classes of a shipped family."""
    module = str(family.modelling_file).removesuffix(".py")
    config = str(family.bare_architecture).removesuffix("Model") + "Config"
    return {
        "AutoConfig": f"{module}.{config}",
        "AutoModel": f"{module}.{family.bare_architecture}",
        "AutoModelForMaskedLM": f"{module}.{family.architecture}",
        "AutoModelForSequenceClassification": f"{module}.{family.classification_architecture}",
    }


def modelling_source(config: dict[str, Any]) -> Path | None:
    """The modelling file that a checkpoint with this config.json needs beside it; None if transformers has it."""
    family = families().get(config.get("model_type", ""))
    return Path(__file__).with_name(family.modelling_file) if family and family.modelling_file else None
