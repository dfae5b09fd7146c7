# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "mlx[cuda12]==0.32.4",
#     "mlx-lm==0.32.2",
#     "transformers==5.23.0",
#     "tokenizers==0.23.3",
#     "datasets==5.2.0",
#     "huggingface_hub==2.4.0",
#     "httpx2==2.16.2",
#     "pyyaml==6.0.3",
#     "numpy==2.4.6",
#     "gguf==0.19.0",
#     "safetensors==0.8.0",
#     "wordllama==0.4.0.post1",
#     "ir-measures==0.4.3",
# ]
# ///
r"""Train SFT on one of the Hub's GPUs, evaluate the model, publish it as OWNER/NAME.

    hf jobs uv run --flavor a10g-small --timeout 3h --secrets HF_TOKEN \
        -e CODE=https://github.com/OWNER/PROJECT/archive/COMMIT.tar.gz \
        jobs/sft.py OWNER/NAME [options of train.py sft]
"""

import os
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

# This file comes alone: it fetches the project, whose jobs/steps.py does the work.
folder = Path(tempfile.mkdtemp())
try:
    with (
        urllib.request.urlopen(os.environ.get("CODE", "")) as stream,
        tarfile.open(fileobj=stream, mode="r|gz") as archive,
    ):
        archive.extractall(folder, filter="data")
except (OSError, ValueError, tarfile.TarError) as error:
    sys.exit(f"error: CODE must be the address of the project's .tar.gz at one commit: {error}")
os.chdir(next(folder.iterdir()))
os.execv(sys.executable, [sys.executable, "-m", "jobs.steps", "sft", *sys.argv[1:]])
