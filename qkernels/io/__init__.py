"""Model files: safetensors with versioned JSON metadata, never pickle."""

from qkernels.io.file import ModelFile, ModelFileError, ModuleEntry, read_header
from qkernels.io.load import load_model
from qkernels.io.save import save_model

__all__ = [
    "ModelFile",
    "ModelFileError",
    "ModuleEntry",
    "load_model",
    "read_header",
    "save_model",
]
