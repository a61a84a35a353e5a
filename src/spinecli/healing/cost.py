"""What a heal run will cost, said before it starts."""

from __future__ import annotations

import torch
from pydantic import JsonValue

from spinecli.checkpoints.checkpoint import Checkpoint
from spinecli.checkpoints.counting import size_of
from spinecli.checkpoints.stream.speed import product_speed
from spinecli.healing.config import Train
from spinecli.healing.distillation import JUDGEMENTS, TOKENS_TOGETHER, steps_for
from spinecli.healing.loss import LOGIT_BYTES
from spinecli.healing.request import HealRequest
from spinecli.healing.targets import rows_per_file
from spinecli.lora.cost import TrainingCosts

# Resident memory of Python with torch, transformers and PEFT imported, before any weight is read.
_IMPORTS_BYTES = 550_000_000
# Of a trained parameter, all float32: itself, its gradient, Adam's two moments, and the best so far.
_TRAINED_BYTES = 20
# Tensors of the logits' size that a chunk of positions holds with its gradients.
_LOGITS = 5
# Times as many activations stay as lora/cost.py counts, which leaves out norms that are trained, and copies: measured
# 1.7 for 1.1 billion parameters and 2.2 to 2.4 for 135 million.
_KEPT = 2
# Share of the speed of matrix products that a whole model reaches, from a profile of one of 135M parameters.
_USE = {torch.float32: 0.7, torch.bfloat16: 0.35, torch.float16: 0.35}
_FLOAT = torch.float32.itemsize
_ENTRY_BYTES = 6


def foresee(request: HealRequest) -> dict[str, JsonValue]:
    """Rows, steps, memory, disk space and time; no text is written and nothing is trained."""
    training, length = request.config.training, request.text.length
    train = min(training.batch_size, request.text.rows - request.held_out)
    steps = steps_for(request.config.text.tokens, train, length)
    costs = _costs(request.student)
    ranks = training.ranks(request.student.blocks)
    work = steps * costs.step(request.student.shapes, ranks, train, length).flops
    if training.train is Train.full:
        work = work * 3 // 2
    judged = (JUDGEMENTS + 2) * request.held_out
    work += judged * costs.step(request.student.shapes, ranks, 1, length).forward_flops
    if request.teacher:
        work += request.text.rows * length * _forward(request.teacher, length)
    speed = product_speed(request.student, request.compute) * _USE[request.compute.dtype]
    answers = request.text.rows * length * training.top_k * _ENTRY_BYTES if request.teacher else 0
    return {
        "rows": request.text.rows,
        "held_out": request.held_out,
        "steps": steps,
        "tokens": steps * train * length,
        "trained_parameters": trained_parameters(request),
        "memory_bytes": run_memory(request),
        "disk_bytes": answers + request.student.bytes,
        "predicted_seconds": work / speed,
    }


def trained_parameters(request: HealRequest) -> int:
    """How many numbers are trained; norms are left out where anything else is."""
    student, training = request.student, request.config.training
    if training.train is Train.full:
        return sum(torch.Size(each.shape).numel() for each in student.tensors.values())
    if training.train is Train.norms:
        return sum(each.shape[0] for name, each in student.tensors.items() if "norm" in name and len(each.shape) == 1)
    return _costs(student).adapter_parameters(student.shapes, training.ranks(student.blocks))


def run_memory(request: HealRequest) -> int:
    """Estimated peak resident bytes: of the teacher's stream or of training, which do not happen at once."""
    student, training, length = request.student, request.config.training, request.text.length
    width = request.compute.dtype.itemsize
    kept = _FLOAT if training.train is Train.full else width
    parameters = sum(torch.Size(each.shape).numel() for each in student.tensors.values())
    together = max(1, TOKENS_TOGETHER // length)
    ranks = training.ranks(student.blocks)
    saved = _costs(student).saved_values(student.shapes, ranks, together, length)
    entering = together * length * student.d_model
    activations = _KEPT * max(saved) + student.blocks * entering if training.recompute else _KEPT * sum(saved)
    trained = trained_parameters(request)
    frozen = 0 if training.train is Train.full else parameters * kept
    learning = frozen + trained * _TRAINED_BYTES + activations * width + _LOGITS * LOGIT_BYTES
    moments = [learning, request.text.memory_bytes]
    if request.teacher:
        teacher = request.teacher
        streams = 2 * rows_per_file(teacher.d_model, length) * length * teacher.d_model * _FLOAT
        outer = sum(torch.Size(teacher.tensors[name].shape).numel() for name in teacher.outer_names())
        moments.append(streams + outer * width + _LOGITS * LOGIT_BYTES)
    return _IMPORTS_BYTES + max(moments)


def _costs(checkpoint: Checkpoint) -> TrainingCosts:
    head = int(checkpoint.config.vocab_size) * checkpoint.d_model
    return TrainingCosts.of(checkpoint, checkpoint.family.projections, head, head_per_token=True, head_trained=False)


def _forward(checkpoint: Checkpoint, length: int) -> int:
    """FLOPs a token of a forward pass with the head."""
    head = 2 * int(checkpoint.config.vocab_size) * checkpoint.d_model
    return int(size_of(checkpoint, length).block_flops_per_token) + head
