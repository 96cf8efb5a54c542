"""Files of ``torch.save``: pickles, which are programs. They are read without running any (``weights_only``)."""

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
"""Bytes of the pickle that are searched for names."""


def load_pickle(file: Path, advice: str = "copy it again") -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, numbers, text and containers of these. ``advice`` is for one that
    is damaged.

    Raises:
        UserError: it names code, unpacks to more than its size, or is no such file.
    """
    try:
        program = _program(file)
        if b"bytearray" in program:  # torch lets it through, and it makes gigabytes of one number
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")
        # as an open file: by its name torch would read it in another way. Namespaces, which timm's hold, are plain data
        plain = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(), file.open("rb") as opened, plain:
            warnings.simplefilter("ignore")  # of protocols and TorchScript: either works or is refused
            return torch.load(opened, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        named = [refused[1]] if refused else _names(program)
        if named:
            raise UserError(
                f"{file} holds code ({printable(some(named))}), and rome loads tensors alone, so nothing "
                "of it was run: load it where you trust it, torch.save(model.state_dict(), ...) and give that file"
            ) from error
        raise UserError(f"{file} cannot be read (it is not a checkpoint of torch.save); {advice}") from error
    except Exception as error:  # a damaged file raises almost any kind
        raise UserError(f"{file} cannot be read ({first_line(error)}); {advice}") from error


def _program(file: Path) -> bytes:
    """The beginning of the pickle.

    Raises:
        UserError: the zip around it is compressed, as torch's never are, so a small file could fill the memory.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":  # how torch tells
            opened.seek(0)
            return opened.read(LOOKED_AT)
        with zipfile.ZipFile(opened) as parts:
            entries, size = parts.infolist(), file.stat().st_size
            whole = sum(entry.file_size for entry in entries)
            if whole > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(
                    f"{file} is compressed, {size:,} bytes for {whole:,}, as no file of torch.save is: unpack it where "
                    "you trust it and save it again"
                )
            inner = next((entry for entry in entries if entry.filename.endswith("data.pkl")), None)
            return b"" if inner is None else parts.open(inner).read(LOOKED_AT)


def _names(program: bytes) -> list[str]:
    """What a pickle, or several in a row, would call by name."""
    found, words, source = dict[str, None](), ["", ""], io.BytesIO(program)
    try:
        while source.tell() < len(program):
            for step, argument, _ in pickletools.genops(source):
                if step.name in ("GLOBAL", "INST"):
                    found[str(argument).replace(" ", ".")] = None
                elif step.name == "STACK_GLOBAL":
                    found[".".join(words)] = None
                elif "UNICODE" in step.name:
                    words = [words[1], str(argument)]
    except Exception:  # where the pickles end, or it is none
        pass
    return list(found)
