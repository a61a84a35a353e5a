"""A GGUF file, read as far as its header: what it holds, without a weight in memory.

The layout is that of the GGUF specification, read by the `gguf` package. Tensor shapes stand there with the fastest
running axis first.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinecli.errors import (
    DamagedCheckpointError,
    MissingPackageError,
    MissingPathError,
    UnsupportedFamilyError,
    reason_of,
)
from spinecli.evaluation.bench.cost import Cost

SUFFIX = ".gguf"
INSTALL_GGUF = "install it with pip install 'spinecli[gguf]'"

_IN_BLOCKS = "blk."
_OPENING = (("add_bos", ""), ("bos", "_id"))
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
# matrices of which a token meets only the chosen experts'
_EXPERTS = "_exps."
# llama.cpp keeps keys and values in 16 bits unless told otherwise
_CACHE_ELEMENT = 2


@dataclass(frozen=True)
class StoredMatrix:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    """Such as f16 or q8_0."""
    bytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    architecture: str
    metadata: dict[str, Any]
    """The architecture's own keys, without its name before them."""
    tensors: tuple[StoredMatrix, ...]
    opening: tuple[int, ...] = ()
    """The token that llama.cpp puts in front of a text, if the file asks for that."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.metadata["block_count"])

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model was made for; None if the file does not say."""
        return self.metadata.get("context_length")

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return next(tensor.shape[-1] for tensor in self.tensors if tensor.name == _EMBEDDING)

    @property
    def parameters(self) -> int:
        """All weights, a tied head counted once."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def block_parameters(self) -> int:
        """Those in the blocks."""
        return sum(tensor.elements for tensor in self.tensors if tensor.name.startswith(_IN_BLOCKS))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def precision(self) -> str:
        """The type that holds most of the bytes."""
        held: Counter[str] = Counter()
        for tensor in self.tensors:
            held[tensor.type_name] += tensor.bytes
        return held.most_common(1)[0][0]

    def cost(self) -> Cost:
        """What llama.cpp computes and reads for a token, its 16-bit cache included."""
        in_blocks = [tensor for tensor in self.tensors if tensor.name.startswith(_IN_BLOCKS)]
        heads, kv_heads = self._per_block("head_count"), self._per_block("head_count_kv")
        width = int(self.metadata["embedding_length"])
        key = int(self.metadata.get("attention.key_length") or width // max(*heads, 1))
        value = int(self.metadata.get("attention.value_length") or key)
        by_name = {tensor.name: tensor for tensor in self.tensors}
        head = by_name.get(_HEAD) or by_name[_EMBEDDING]
        return Cost(
            matrices=sum(tensor.elements * self._used(tensor) for tensor in in_blocks if len(tensor.shape) > 1),
            head=head.elements,
            weight_bytes=sum(tensor.bytes * self._used(tensor) for tensor in in_blocks) + head.bytes,
            query_width=sum(heads) * (key + value) // 2,
            cache_width=sum(kv_heads) * (key + value),
            cache_element=_CACHE_ELEMENT,
        )

    def _per_block(self, name: str) -> list[int]:
        """A count that holds for all blocks, or is listed for each."""
        found = self.metadata.get(f"attention.{name}", self.metadata.get("attention.head_count", 0))
        return [int(count) for count in found] if isinstance(found, list) else [int(found)] * self.blocks

    def _used(self, tensor: StoredMatrix) -> float:
        """The share of a tensor that one token meets."""
        if _EXPERTS not in tensor.name:
            return 1.0
        return float(self.metadata["expert_used_count"] / self.metadata["expert_count"])


def read_gguf(path: Path) -> GgufFile:
    """Read a header and check that it describes a language model.

    Raises: MissingPathError, MissingPackageError, DamagedCheckpointError, UnsupportedFamilyError.
    """
    if not path.is_file():
        raise MissingPathError(f"{path} does not exist; name a {SUFFIX} file.")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingPackageError(f"{path} is a GGUF file, which the package gguf reads; {INSTALL_GGUF}.") from error
    # what gguf raises depends on where a file breaks off
    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        prefix = f"{architecture}."
        metadata = {
            name.removeprefix(prefix): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(prefix)
        }
        begun, first = (reader.fields.get(f"tokenizer.ggml.{name}_token{end}") for name, end in _OPENING)
        opening = (int(first.contents()),) if begun and first and begun.contents() else ()
        tensors = tuple(
            StoredMatrix(
                tensor.name,
                tuple(int(size) for size in tensor.shape),
                tensor.tensor_type.name.lower(),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        )
    except (ValueError, LookupError, TypeError, OverflowError, ArithmeticError) as error:
        raise DamagedCheckpointError(
            f"{path} is not a whole GGUF file ({reason_of(error)}); write it again."
        ) from error
    found = GgufFile(path, architecture, metadata, tensors, opening)
    try:
        found.cost()
        _ = found.vocabulary
    except (LookupError, StopIteration, TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedFamilyError(
            f"{path} ({architecture}) holds no language model with blocks and attention; name one that does."
        ) from error
    return found
