"""Reading files of ``torch.save`` without running code. They are pickles, which can run any (``weights_only``)."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from rome.core.errors import UserError, first_line, printable, some

LOOKED_AT = 1 << 24
"""Number of bytes at the beginning of a pickle that are searched for names."""


def load_pickle(file: Path, advice: str = "copy it again") -> Any:
    """Load what ``torch.save`` wrote, on the CPU: tensors, numbers, text and containers of these.

    Args:
        advice: what to do about a damaged file, for the message.

    Raises:
        UserError: the file names code, is compressed, or was not written by ``torch.save``.
    """
    try:
        program = _read_pickle(file)
        if b"bytearray" in program:  # torch allows it, though one number can allocate gigabytes
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")
        # opened here, because torch reads a named file differently. timm's files hold namespaces, which are plain data
        plain = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(), file.open("rb") as opened, plain:
            warnings.simplefilter("ignore")  # on protocols and TorchScript, which either work or are refused
            return torch.load(opened, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        named = [refused[1]] if refused else _names(program)
        if named:
            raise UserError(
                f"{file} holds code ({printable(some(named))}), and rome loads only tensors, so none of it was run: "
                "if you trust it, load it with torch, torch.save(model.state_dict(), ...) and give that file"
            ) from error
        raise UserError(f"{file} cannot be read (it is not a checkpoint of torch.save); {advice}") from error
    except Exception as error:  # a damaged file raises almost any kind
        raise UserError(f"{file} cannot be read ({first_line(error)}); {advice}") from error


def _read_pickle(file: Path) -> bytes:
    """Read the beginning of the pickle in a file.

    Raises:
        UserError: the zip archive around it is compressed. torch's never are, and a small file could fill the memory.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":  # torch's own test for a zip archive
            opened.seek(0)
            return opened.read(LOOKED_AT)
        with zipfile.ZipFile(opened) as parts:
            entries, size = parts.infolist(), file.stat().st_size
            whole = sum(entry.file_size for entry in entries)
            if whole > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(
                    f"{file} is compressed, {size:,} bytes for {whole:,}, unlike any file of torch.save: if you trust "
                    "it, unpack it and save it again"
                )
            inner = next((entry for entry in entries if entry.filename.endswith("data.pkl")), None)
            return b"" if inner is None else parts.open(inner).read(LOOKED_AT)


def _names(program: bytes) -> list[str]:
    """Names of the functions and classes that a pickle, or several in a row, would call."""
    found, strings, source = dict[str, None](), ["", ""], io.BytesIO(program)
    try:
        while source.tell() < len(program):
            for step, argument, _ in pickletools.genops(source):
                if step.name in ("GLOBAL", "INST"):
                    found[str(argument).replace(" ", ".")] = None
                elif step.name == "STACK_GLOBAL":
                    found[".".join(strings)] = None
                elif "UNICODE" in step.name:
                    strings = [strings[1], str(argument)]
    except Exception:  # the end of the pickles, or not a pickle
        pass
    return list(found)
