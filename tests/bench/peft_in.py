"""PEFT's adapters read by us: logits next to PEFT's own, and our PEFT export read by PEFT. By hand:

    python -m tests.bench.peft_in --torch /path/to/python

The other interpreter is one whose environment has `torch transformers peft` and none of this project.
It makes adapters with random weights over tiny random models and computes logits with them. Exit code 1
if a logit differs by more than 1e-4 or an adapter of another kind is not refused in one line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4
TOKENS = [[5, 300, 17, 44, 260, 9, 301, 2]]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOTH = ["embed_tokens", "lm_head"]
# Options of LoraConfig by name; every one over a tied and an untied base.
LORAS = {
    "plain": {"target_modules": ALL},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"q_proj": 5, r".*\.down_proj": 1, "layers.0.self_attn.v_proj": 40},
    },
    "patterns, rslora": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
    "one layer": {"target_modules": ALL, "layers_to_transform": [1]},
    "the original's": {
        "target_modules": ALL,
        "modules_to_save": BOTH,
        "ensure_weight_tying": True,
    },
    "both, each its own": {"target_modules": ALL, "modules_to_save": BOTH},
    "embedding": {"target_modules": ALL, "modules_to_save": ["embed_tokens"]},
    "embedding, tied": {
        "target_modules": ALL,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "head": {"target_modules": ALL, "modules_to_save": ["lm_head"]},
}
REFUSED = {
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "bias": {"target_modules": ["q_proj"], "bias": "all"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "embedding LoRA": {"target_modules": ["q_proj", "embed_tokens"]},
    "IA3": None,
}


def torch_side(folder: Path) -> None:
    """Make the adapters, and compute PEFT's logits; runs in the other interpreter."""
    import torch
    from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def load(base: str):
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def logits(model) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(TOKENS)).logits.numpy()

    def make(base: str, options: dict | None, out: Path) -> np.ndarray:
        if options is None:
            config = IA3Config(
                target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
            )
        else:
            config = LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **options)
        torch.manual_seed(len(out.name))
        model = get_peft_model(load(base), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(out)
        return logits(model)

    plan = json.loads((folder / "plan.json").read_text())
    for case in plan["made"]:
        out = Path(case["out"])
        np.save(folder / f"{out.name}.npy", make(case["base"], case["options"], out))
    for case in plan["chains"]:
        model = PeftModel.from_pretrained(load(case["base"]), case["sft"]).merge_and_unload()
        model = PeftModel.from_pretrained(model, case["grpo"])
        np.save(folder / f"{case['name']}.npy", logits(model.eval()))
    for case in plan["exported"]:
        model = PeftModel.from_pretrained(load(case["base"]), case["peft"])
        np.save(folder / f"{case['name']}.npy", logits(model.eval()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare PEFT adapters that we read with PEFT.")
    parser.add_argument("--torch", required=True, metavar="PYTHON", help="the other interpreter")
    parser.add_argument("--torch-side", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.torch_side:
        torch_side(arguments.torch_side)
        return 0

    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    from expander.convert.formats import write_peft
    from expander.model import ModelError, load_chain, read_chain
    from tests import tiny

    folder = Path(tempfile.mkdtemp())
    bases = {
        "tied": tiny.make_qwen3(folder / "tied"),
        "untied": tiny.make_qwen2(folder / "untied", tied=False),
    }
    made = [
        {
            "name": f"{name}, {kind}",
            "base": str(base),
            "options": options,
            "out": str(folder / f"adapter-{kind}-{number}"),
        }
        for kind, base in bases.items()
        for number, (name, options) in enumerate((LORAS | REFUSED).items())
        if not (
            kind == "untied" and (name in REFUSED or (options or {}).get("ensure_weight_tying"))
        )
    ]
    places = {case["name"]: case["out"] for case in made}
    chain = {
        "name": "SFT and GRPO",
        "base": str(bases["tied"]),
        "sft": places["the original's, tied"],
        "grpo": places["rslora, tied"],
    }
    plan = folder / "plan.json"

    def run(**cases: list) -> None:
        plan.write_text(json.dumps({"made": [], "chains": [], "exported": []} | cases))
        other = [arguments.torch, __file__, "--torch", "-", "--torch-side", folder]
        subprocess.run(other, check=True)

    run(made=made, chains=[chain])
    worst, failed, exported = 0.0, [], []

    def compare(name: str, chain, saved: str) -> None:
        nonlocal worst
        model, _ = load_chain(chain)
        ours = np.array(model(mx.array(TOKENS)))
        wanted = np.load(folder / f"{saved}.npy")
        difference = float(abs(ours - wanted).max())
        worst = max(worst, difference)
        print(f"{name:35}  logits to {abs(wanted).max():6.1f}  difference {difference:.1e}")
        if difference > TOLERANCE:
            failed.append(name)

    for case in made:
        name, out = case["name"], Path(case["out"])
        try:
            found = read_chain(str(out))
            if name.rpartition(", ")[0] in REFUSED:
                print(f"{name}: not refused")
                failed.append(name)
                continue
            compare(name, found, out.name)
        except ModelError as error:
            print(f"{name:35}  refused: {str(error).removeprefix(str(folder))}")
            if name.rpartition(", ")[0] not in REFUSED or "\n" in str(error):
                failed.append(name)
            continue
        write_peft(found, folder / "exports" / out.name)
        export = {"name": f"export-{out.name}", "base": case["base"], "label": name}
        exported.append(export | {"peft": str(folder / "exports" / out.name), "ours": str(out)})
    stack = read_chain(chain["grpo"], sft=chain["sft"])
    compare("SFT and GRPO", stack, "SFT and GRPO")
    write_peft(stack, folder / "exports" / "stack")
    run(exported=exported)
    for case in exported:
        compare(f"exported: {case['label']}", read_chain(case["ours"]), case["name"])
    print(f"largest difference {worst:.1e}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
