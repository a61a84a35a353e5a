"""Calibration and evaluation text: files, hub data sets, and text that is always there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spinecli.data.columns import CONVERSATIONS, TEXTS, recognised, text_columns
from spinecli.data.conversations import ChatTokenizer, Conversation, joined, read_conversation
from spinecli.data.files import kind_of, read_text
from spinecli.data.hub import hub_name, read_hub
from spinecli.data.python_docs import DESCRIPTION, python_docs
from spinecli.data.tables import ROW_KINDS, Numbered, Table, read_table
from spinecli.errors import CalibrationTextError, DataError, MissingPathError

_BUILTIN = "builtin:"
_HUB_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    reference: str
    """As the user named it."""
    description: str
    """For a person: what this text is."""
    documents: tuple[str, ...]
    """Empty where there are conversations, which every tokenizer writes in its own way."""
    conversations: tuple[Conversation, ...] = ()

    @property
    def content(self) -> str:
        """All documents as one text."""
        return self.documents[0] if len(self.documents) == 1 else "\n\n".join(self.documents)

    def content_for(self, tokenizer: ChatTokenizer, opening: str = "") -> str:
        """The text as a model with this tokenizer reads it: conversations are rendered by its chat template.

        Args:
            opening: what every row of tokens begins with by itself, so that neither text nor conversation does.

        Raises: TokenizerError if a template is needed and there is none, DataError if it refuses a conversation.
        """
        if self.conversations:
            return joined(self.conversations, tokenizer, self.reference, opening)
        return self.content.removeprefix(opening)


def load_text(reference: str, *, limit_characters: int | None = None) -> Text:
    """The text that `reference` names.

    The rows of a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file by their text column, any other file as plain
    text, `builtin:python-docs`, `builtin:tiny-calibration`, `builtin:tiny-evaluation`, or a hub data set
    `owner/name[:split]` (train by default).

    Args:
        limit_characters: about how much of a hub data set to fetch.

    Raises: MissingPathError, CalibrationTextError, OfflineError.
    """
    if reference.startswith(_BUILTIN):
        return _builtin(reference)
    path = Path(reference).expanduser()
    try:
        if path.is_file():
            text = _file(reference, path)
        elif path.exists():
            raise CalibrationTextError(f"{path} is a directory; name a text or jsonl file.")
        elif (hub := hub_name(reference)) is None:
            raise MissingPathError(
                f"{path} does not exist; name a text or jsonl file, or a hub data set as owner/name."
            )
        else:
            table = read_hub(hub[0], hub[1] or "train", streaming=True)
            text = _of_rows(reference, f"hub data set {reference}", table, limit_characters or _HUB_CHARACTERS)
    except DataError as error:
        raise CalibrationTextError(str(error)) from error
    if not (text.conversations or any(each.strip() for each in text.documents)):
        raise CalibrationTextError(f"{reference} holds no text; name another file.")
    return text


def _builtin(reference: str) -> Text:
    name = reference.removeprefix(_BUILTIN)
    if name == "python-docs":
        return Text(reference, DESCRIPTION, (python_docs(),))
    for split in ("calibration", "evaluation"):
        if name == f"tiny-{split}":
            from spinecli.demo.texts import demo_text

            return Text(reference, f"stories, {split}", (demo_text(split),))
    raise CalibrationTextError(
        f"There is no text {reference}; the built-in texts are {_BUILTIN}python-docs, {_BUILTIN}tiny-calibration and "
        f"{_BUILTIN}tiny-evaluation."
    )


def _file(reference: str, path: Path) -> Text:
    if kind_of(path) in ROW_KINDS:
        return _of_rows(reference, path.name, read_table(path))
    return Text(reference, path.name, (read_text(path),))


def _of_rows(reference: str, description: str, table: Table, limit_characters: int | None = None) -> Text:
    texts: list[str] = []
    conversations: list[Conversation] = []
    size = 0
    for row in table:
        found = _read_row(table, row)
        if isinstance(found, str):
            texts.append(found)
            size += len(found)
        else:
            conversations.append(found)
            size += sum(len(turn.content) for turn in found)
        if texts and conversations:
            raise DataError(f"{table.place(row[0])} holds a conversation beside rows of plain text; separate them.")
        if limit_characters is not None and size >= limit_characters:
            break
    return Text(reference, description, tuple(texts), tuple(conversations))


def _read_row(table: Table, numbered: Numbered) -> str | Conversation:
    number, row = numbered
    # rows of one file may differ in their columns, and the first that holds text is read
    names = text_columns(tuple(name for name, value in row.items() if isinstance(value, str)))
    chat = recognised(row, CONVERSATIONS)
    if chat is not None and not names:
        return read_conversation(row[chat], table.place(number), chat)
    if not names:
        raise _textless(table, number, row)
    pieces = [str(row[name]) for name in names]
    return pieces[0] if len(pieces) == 1 else "\n".join(piece for piece in pieces if piece.strip())


def _textless(table: Table, number: int, row: Iterable[str]) -> DataError:
    place = table.place(number)
    column = recognised(row, TEXTS)
    if column is not None:
        return DataError(f"{place} has no text in column {column!r}; fix or remove the row.")
    return DataError(
        table.wrong_separator or f"{place} has none of the text columns {', '.join(TEXTS)}; rename its column."
    )
