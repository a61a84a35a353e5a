"""How well a classifier answers labelled examples: accuracy, loss and macro F1.

loss      mean over the examples of -log softmax(logits)[right label], over all outputs of the model, in nats
accuracy  share of the examples whose largest logit is the right label's; its standard error is
          sqrt(accuracy * (1 - accuracy) / (examples - 1)), as lm-eval has it
F1        of a label: 2 * right / (answers with it + examples of it)
macro F1  mean of F1 over the labels that the examples have, so that models side by side share their labels
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spinecli.artifacts.context import RunContext
from spinecli.data.batches import Batch, evaluation_batches
from spinecli.data.encoding import Encoded
from spinecli.errors import MeasurementError
from spinecli.evaluation.labelled import LabelledSet
from spinecli.evaluation.results import ClassificationResult

_BATCH = 64


@dataclass(frozen=True)
class ClassificationScore:
    """A classifier's answers, summed up."""

    accuracy: float
    accuracy_error: float
    """One standard error; 0 for a single example."""
    nll: float
    """In nats."""
    f1: tuple[float, ...]
    """One a label of the data; NaN for those that no example has."""

    @property
    def macro_f1(self) -> float:
        """Mean over the labels that the examples have."""
        present = [value for value in self.f1 if not math.isnan(value)]
        return math.fsum(present) / len(present)

    def f1_by_label(self, labels: Sequence[str]) -> dict[str, float]:
        """F1 of the labels that the examples have, by their names in the data."""
        return {label: value for label, value in zip(labels, self.f1, strict=True) if not math.isnan(value)}


def classify(
    examples: LabelledSet, index: int, model: nn.Module, device: str, context: RunContext
) -> ClassificationResult:
    """Let the loaded model `index` of the evaluation answer all examples.

    Raises: MeasurementError if its loss is NaN or infinite.
    """
    logits = class_logits(model, examples.encoded[index], device, context)
    found = classification_score(logits, examples.targets(index), examples.matches[index].outputs)
    return ClassificationResult(
        data=examples.config.data,
        description=examples.description,
        accuracy=found.accuracy,
        accuracy_error=found.accuracy_error,
        nll=found.nll,
        macro_f1=found.macro_f1,
        f1=found.f1_by_label(examples.dataset.labels),
        examples=len(examples.dataset),
        shortened=examples.encoded[index].shortened,
        max_length=examples.max_length,
        matched_by=examples.matches[index].by,
    )


@torch.no_grad()
def class_logits(model: nn.Module, encoded: Encoded, device: str, context: RunContext) -> Tensor:
    """The logits of every row, in the rows' order: (rows, outputs) float64 on the CPU."""
    segmented = _tells_segments_apart(model)
    found: Tensor | None = None
    done = 0
    for batch in evaluation_batches(encoded, _BATCH):
        logits = model(**_inputs(batch.to(device), segmented)).logits.double().cpu()
        if found is None:
            found = logits.new_empty(len(encoded), logits.shape[1])
        found[batch.row_numbers] = logits
        done += len(batch.row_numbers)
        context.progress("labelled examples", done, len(encoded))
    assert found is not None  # a data set is never empty
    return found


def classification_score(logits: Tensor, targets: Tensor, outputs: Sequence[int]) -> ClassificationScore:
    """Sum up the answers.

    Args:
        logits: (examples, outputs) float64.
        targets: (examples,) int64, the output that is right.
        outputs: the output of each label of the data.

    Raises: MeasurementError if the loss is NaN or infinite.
    """
    nll = float(nn.functional.cross_entropy(logits, targets))
    if not math.isfinite(nll):
        raise MeasurementError(f"The loss is {nll}; compute with --dtype float32, or the model is broken.")
    answers = logits.argmax(dim=1)
    examples = len(targets)
    accuracy = int((answers == targets).sum()) / examples
    error = math.sqrt(accuracy * (1 - accuracy) / (examples - 1)) if examples > 1 else 0.0
    return ClassificationScore(accuracy, error, nll, tuple(_f1(answers, targets, output) for output in outputs))


def _f1(answers: Tensor, targets: Tensor, output: int) -> float:
    answered, wanted = answers == output, targets == output
    if not bool(wanted.any()):
        return math.nan
    return 2 * int((answered & wanted).sum()) / int(answered.sum() + wanted.sum())


def _inputs(batch: Batch, segmented: bool) -> dict[str, Tensor]:
    inputs = batch.model_inputs()
    return inputs if segmented else {name: value for name, value in inputs.items() if name != "token_type_ids"}


def _tells_segments_apart(model: nn.Module) -> bool:
    """Whether the model takes a number for each text of a pair; tokenizers make them for models that do not, too."""
    bare: Any = getattr(model, "get_base_model", lambda: model)()
    taken = "token_type_ids" in inspect.signature(type(bare).forward).parameters
    return taken and getattr(bare.config, "type_vocab_size", 0) > 1
