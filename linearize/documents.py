"""Where text comes from: built in, local files of several formats, hub data sets. All of it is checked before any work starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from linearize.errors import InputError, ResourceError

BUILTIN, TEACHER = "builtin", "teacher"
PARQUET, LINES = ".parquet", ".jsonl"
SUFFIXES = {".txt", ".md", ".rst", ".py", LINES, PARQUET}
EXTRA = "pip install 'linearize[data]'"
PASS = "pass a .txt, .jsonl or .parquet file, a folder, a glob, a hub data set or 'builtin'"
Chat = Callable[[list[Any]], str]


def plain_chat(messages: list[Any]) -> str:
    """A conversation without a template: to check that one can be read, where no tokenizer is at hand."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def chat_of(tokenizer: Any) -> Chat:
    """Conversations by the tokenizer's own template. InputError where it has none."""

    def chat(messages: list[Any]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("has messages, and this tokenizer has no chat template", "", "give plain documents in 'text'")
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return chat


def is_teacher(source: str) -> bool:
    """Whether a source is text that is yet to be sampled: `teacher`, or so many tokens of it, as in teacher:500k."""
    return source.partition(":")[0] == TEACHER


def documents(source: str, chat: Chat = plain_chat) -> list[str]:
    """Documents of 'builtin' (the Python manual's topics, with every Python), a file, folder or glob, or a hub data set.

    Rows of JSON lines, Parquet files and data sets hold `text`, or `messages`, which `chat` makes a text of.
    InputError names what cannot be read, and where.
    """
    if source == BUILTIN:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if is_teacher(source):
        fix = "distill keeps what it sampled in OUTPUT.teacher, which serves as any folder does"
        raise InputError("only distill samples the teacher's text", source, fix)
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    else:
        files = [path] if path.is_file() else sorted(Path(p) for p in glob(str(path), recursive=True) if Path(p).is_file())
    if not files and (path.suffix or path.exists() or source.count("/") != 1):
        raise InputError("no text found", source, PASS)
    found = [doc for file in files for doc in _read(file, chat)] if files else list(_hub(source, chat))
    found = [doc for doc in found if doc.strip()]
    if not found:
        raise InputError("the text is empty", source, "pass a file with some text in it")
    return found


def _read(path: Path, chat: Chat) -> Iterator[str]:
    if path.suffix == PARQUET:
        yield from _parquet(path, chat)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte {error.start})", str(path), "convert it: iconv -t UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read ({error.strerror})", str(path), "check the path and its permissions") from None
    if path.suffix != LINES:
        yield text
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise InputError("not JSON", f"{path}:{number}", "one JSON object a line, with 'text' or 'messages'") from None
        yield _document(row, f"{path}:{number}", chat)


def _parquet(path: Path, chat: Chat) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ResourceError("Parquet files need pyarrow", str(path), EXTRA) from None
    try:
        file = ParquetFile(path)
    except ArrowInvalid:
        raise InputError("not a Parquet file", str(path), "write it again, or pass .jsonl") from None
    columns = _columns(file.schema_arrow.names, str(path))
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield _document(row, f"{path}, row {number}", chat)


def _hub(source: str, chat: Chat) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("no such file, and hub data sets need datasets", source, EXTRA) from None
    try:
        rows = load_dataset(source, split="train")
    except Exception as error:  # whatever the hub, the network or the data set raises
        raise InputError(f"cannot load the data set ({type(error).__name__})", source, "pass a local file or folder") from None
    columns = _columns(rows.column_names, source)
    for number, row in enumerate(rows.select_columns(columns), start=1):
        yield _document(row, f"{source}, row {number}", chat)


def _columns(names: Sequence[str], where: str) -> list[str]:
    """The column that holds documents."""
    found = [name for name in ("text", "messages") if name in names][:1]
    if not found:
        raise InputError(f"has columns {', '.join(names)}; expected text or messages", where, "name the documents' column 'text'")
    return found


def _document(row: Any, where: str, chat: Chat) -> str:
    """The text of one row. InputError if it has none, or messages that are no conversation."""
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not messages:
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(f"has {has}; expected text or messages", where, "name the field with the document 'text'")
    good = isinstance(messages, list) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in messages)
    if not good:
        raise InputError("messages need role and content", where, 'write them as [{"role": "user", "content": "…"}, …]')
    try:
        return chat(messages)
    except InputError as error:
        raise InputError(error.what, where, error.fix) from None
    except Exception as error:  # a template is a program: this one refuses the conversation
        raise InputError(f"the chat template refuses it: {error}", where, "correct the conversation") from None
