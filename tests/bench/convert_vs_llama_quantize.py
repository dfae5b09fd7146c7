"""Compare convert.py's files with those that llama.cpp's own quantiser makes from its f32 file.

    PYTHONPATH=tests python -m tests.bench.convert_vs_llama_quantize --llama DIR

DIR is as in kquants_vs_ggml. A random Qwen3 of 16 layers with rows of 256 values is exported in every
quantised type; tensors are compared byte for byte and keys one by one. The exit code is 1 if anything
differs.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import tiny

from expander.convert.gguf_file import FILE_TYPES
from tests.bench.kquants_vs_ggml import QuantizeParams, library

TYPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m")


def contents(path: Path) -> tuple[dict, dict]:
    """The keys and tensors of a file, by name."""
    reader = gguf.GGUFReader(path)
    keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return keys, {t.name: (t.tensor_type, t.data.tobytes()) for t in reader.tensors}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama", type=Path, required=True, metavar="DIR")
    llama = library(parser.parse_args().llama, "libllama")
    llama.llama_model_quantize_default_params.restype = QuantizeParams
    llama.llama_model_quantize.restype = ctypes.c_uint32
    same = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape = {"layers": 16, "hidden": 256, "kv_heads": 2, "head_dim": 64, "ffn": 512}
        model = tiny.make_qwen3(folder / "model", **shape)
        options = ["--model", model, "--output", folder, "--name", "ours"]
        command = [sys.executable, "convert.py", *options, "--quantize", "f32", *TYPES]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for kind in TYPES:
            params = llama.llama_model_quantize_default_params()
            params.ftype = int(FILE_TYPES[kind])
            theirs = folder / f"theirs-{kind}.gguf"
            source = folder / "ours-f32.gguf"
            llama.llama_model_quantize(
                str(source).encode(), str(theirs).encode(), ctypes.byref(params)
            )
            ours, reference = contents(folder / f"ours-{kind}.gguf"), contents(theirs)
            for what, a, b in zip(("keys", "tensors"), ours, reference, strict=True):
                equal = sum(a[name] == b.get(name) for name in a)
                print(f"{kind}: {equal}/{len(b)} {what} equal")
                same &= equal == len(a) == len(b)
    sys.exit(not same)


if __name__ == "__main__":
    main()
