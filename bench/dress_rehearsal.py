"""Dress rehearsal of the course track: every command for two steps, on a model of Qwen2.5-Math-1.5B's shape.

    python bench/dress_rehearsal.py                                      # one GPU
    python bench/dress_rehearsal.py --only sft --only baselines          # some of the commands
    python bench/dress_rehearsal.py --small --out rehearsal.json         # a CPU: a tiny model, short responses

The weights are random (the real ones were never here), so no accuracy means anything. Two things stand in for what such a
model lacks. The reward is a coin, by the response's checksum, as nothing would ever be right and no step would train. The
problems are GSM-Symbolic's, as MATH is not shipped. Sizes are the handout's: 256 rollouts of at most 1,024 tokens.
For each command: exit status, seconds, seconds a step (the last one of its log), and the peak memory of the whole GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "results" / "bench" / "dress_rehearsal.json"
EVALUATED = dict(eval_data="gsm_symbolic", n_eval=256)
TRAINED = dict(model="{model}", data="gsm_symbolic") | EVALUATED
RUN = "--model {model} --seeds 1 --steps 2 --only"
COMMANDS = {  # name: the command's words, and what it is told with --set
    "zero-shot": ("evaluate_math --model {model} --data gsm_symbolic", {}),
    "sft": ("sft_math_reasoning", TRAINED | dict(n_train=128, epochs=1, min_steps=0, evaluations=1)),
    "ei": ("sft_math_reasoning_ei", TRAINED | dict(n_ei_steps=2, questions=64))}
COMMANDS |= {name: (f"grpo_experiments {name} {RUN} {variant}", dict(train_data="gsm_symbolic") | EVALUATED)
             for name, variant in {"lr-sweep": "lr1e-06", "baselines": "no_baseline", "length-norm": "masked_normalize",
                                   "std-norm": "no_std", "off-policy": "e2_b128", "off-policy-sweep": "broad_e4_b64",
                                   "clip-ablation": "broad_e4_b64_no_clip", "prompt-ablation": "question_only",
                                   "variants": "dapo_e2_b128"}.items()}
SMALL = {"evaluate_math": {}, "sft_math_reasoning": dict(n_eval=8, max_tokens=12, batch_size=8, n_train=16),
         "sft_math_reasoning_ei": dict(n_eval=8, max_tokens=12, questions=8, batch_size=8),
         "grpo_experiments": dict(n_eval=8, max_tokens=12, rollout_batch_size=16, train_batch_size=16, group_size=4,
                                  gradient_accumulation_steps=1, epochs_per_rollout_batch=1)}
COIN = '''import zlib
from cs336_alignment import drgrpo_grader
def coin(response, truth):
    reward = float(zlib.crc32(response.encode()) % 2)
    return {"format_reward": reward, "answer_reward": reward, "reward": reward}
drgrpo_grader.reward_fn_of = lambda prompt: coin
'''


def random_model(folder: Path, small: bool) -> None:
    """Saves random bfloat16 weights, and SmolLM2's tokenizer with names for the ids that only the model has."""
    import torch
    from training_throughput import QWEN_1_5B  # the bench beside this one
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from cs336_alignment.models import model_dir
    tokenizer = AutoTokenizer.from_pretrained(model_dir("smollm2-135m"))
    tiny = dict(QWEN_1_5B, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2)
    torch.manual_seed(0)
    config = Qwen2Config(**tiny if small else QWEN_1_5B, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    taken = set(saved["model"]["vocab"].values()) | {token["id"] for token in saved["added_tokens"]}
    saved["model"]["vocab"] |= {f"<extra_{i}>": i for i in range(config.vocab_size) if i not in taken}
    (folder / "tokenizer.json").write_text(json.dumps(saved))


def rehearse(name: str, model: Path, home: Path, small: bool) -> dict:
    """Runs one command in a process of its own; what it took."""
    from grpo_step import WholeGPU

    from cs336_alignment.runs import read_metrics
    words, settings = COMMANDS[name]
    module, *words = words.format(model=model).split()
    if module == "evaluate_math":
        words += ["--n", "8", "--max-tokens", "12"] if small else ["--n", "256"]
    settings = settings | (SMALL[module] if small else {})
    command = [sys.executable, "-m", f"cs336_alignment.{module}", *words, "--track", "course", "--root", str(home / name),
               *(word for k, v in settings.items() for word in ("--set", f"{k}={v}".format(model=model)))]
    begin = time.perf_counter()
    with WholeGPU() as gpu:
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(home), str(ROOT), os.environ.get("PYTHONPATH", "")])})
    steps = [line["wall_s"] for file in (home / name).glob("*/*/metrics.jsonl") for line in read_metrics(file.parent)
             if any(key.startswith("train/") for key in line)]
    took = {"exit": done.returncode, "seconds": round(time.perf_counter() - begin, 1), "peak_gb": round(gpu.peak, 1),
            "step_s": round(steps[-1] - steps[-2], 2) if len(steps) > 1 else None, "steps": len(steps)}
    return took | ({"error": (done.stderr or done.stdout).strip().splitlines()[-5:]} if done.returncode else {})


def main(out: Path = STORED, small: bool = False,
         only: Annotated[list[str], typer.Option(help="this command (repeat for several)")] = []) -> None:
    """Rehearses the commands one after the other; JSON is written after each. Exit status 1 if one failed."""
    import torch
    sys.path.insert(0, str(ROOT))
    from cs336_alignment.cli import bench_refusal
    if unknown := set(only) - set(COMMANDS):
        refuse(f"no command {', '.join(sorted(unknown))}; there are: {', '.join(COMMANDS)}")
    if problem := bench_refusal(small, out, STORED, torch.cuda.is_available()):
        refuse(problem)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result = {"gpu": card, "torch": torch.__version__, "small": small, "commands": {}}
    with tempfile.TemporaryDirectory(prefix="rehearsal_") as folder:
        home = Path(folder)
        (home / "sitecustomize.py").write_text(COIN)  # Python runs it at the start of each process
        random_model(home / "model", small)
        for name in only or COMMANDS:
            took = result["commands"][name] = rehearse(name, home / "model", home, small)
            print(f"{name}: {took}", flush=True)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(int(any(took["exit"] for took in result["commands"].values())))


def refuse(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(2)


if __name__ == "__main__":
    typer.run(main)
