"""What a training pass over packed rows costs, part by part, and what other attention, output layers, sizes and compilers make of it.

    python bench/training_pass.py                               # one GPU, both shapes, about ten minutes
    python bench/training_pass.py --only course --seconds 240   # one shape; after so many seconds no further variant starts
    python bench/training_pass.py --small --out small.json  # a smoke test on any machine, under a minute

Shapes: `pocket`, SmolLM2-135M, rows of 120 + 256 tokens; `course`, Qwen2.5-Math-1.5B, rows of 150 + 1,024; eight rows have a prompt
in common, which each repeats unless a variant says `a prompt once a group` (its MFU counts what is computed). Weights are random,
in float32, products in bfloat16; the learning rate is 0, so that all variants see the same weights. Of a shape it measures:

**products**: each matrix product of a pass alone, forward and both of the backward pass: the seconds that no kernel elsewhere
can save. **attention**: each implementation alone on the rows of a pass, and how far its output and gradients are from float32.
**variants**: `accumulate_gradients` on the rows, then clipping and optimizer (`optimizer_s`). `today` is the project's path with prompts repeated; every
other row changes one thing of it (`VARIANTS`), and `together` joins the best of each kind if it gained over 1%. Per pass:
`layers_forward_s`, `output_s` (output layer and loss, forward and backward), and `layers_backward_s`, the rest. `update_s` is the
update of 256 responses that follows from this. `loss_off`, `gradient_off`: relative differences on a few rows, in norm,
from `today` and from float32 (`exact`, one example after the other); `gradient_max_off`: the largest over the largest.
**kernels**: seconds of the GPU's kernels by kind in one pass, of the first and the last variant.

MFU = model FLOPs / seconds / the bfloat16 matrix rate measured here; FLOPs as in training_throughput.py: 6 · (weights of the layers ·
tokens + vocabulary · hidden · response tokens + layers · heads · head size · Σ n²), recomputation not counted, optimizer's time not
either. A variant that fails is stored as its error; one whose package or GPU is missing stands in `left_out`.
"""
import importlib.util
import json
import math
import re
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import grpo_step as G  # the bench beside this one

STORED = G.STORED.with_name("training_pass.json")
SHAPES = {  # configuration, tokens of prompt and response, rows, rows in a pass
    "pocket": (dict(vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True), 120, 256, 255, 85),
    "course": (dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                    num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True), 150, 1024, 24, 4)}
TINY = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True)  # heads of 64, as pocket's
GPU, LIGER, LIGER_HOPPER = "a GPU", "liger_kernel", "liger_kernel, cutlass"
GROUP = 8  # rows of one prompt
CHECKED = 8  # rows whose loss and gradient are compared, at most those of a pass: float32 keeps four times as much
VARIANTS = {  # what differs from today's path, and what it needs
    "today": ({}, None),
    "attention: flash-attn 2": ({"attention": "packed_fa2"}, "flash_attn"),
    "attention: PyTorch's, keys not repeated": ({"attention": "packed_unrepeated"}, GPU),
    "attention: cuDNN's": ({"attention": "packed_cudnn"}, GPU),
    "pass: twice the rows": ({"rows": 2}, None),
    "pass: three times the rows": ({"rows": 3}, None),
    "pass: three times the rows, a prompt once a group": ({"rows": 3, "shared": True}, None),
    "output: one slice": ({"max_logits": 2**40}, None),
    "output: slices of one response": ({"max_logits": 1}, None),
    "output: not compiled": ({"output": "eager"}, None),
    "output: computed again in the backward pass": ({"output": "again"}, None),
    "output: Liger's for Hopper, loss and entropy in the product": ({"output": "liger", "max_logits": 2**40}, LIGER_HOPPER),
    "output: Liger's with the loss (no entropy)": ({"output": "liger_loss", "max_logits": 2**40}, LIGER),
    "layers: not compiled": ({"layers": "eager"}, GPU),
    "layers: Liger's, not compiled": ({"layers": "liger"}, LIGER),
    "layers: computed again in the backward pass": ({"layers": "again"}, None),
    "layers: compiled for this length": ({"layers": dict(dynamic=False)}, GPU),
    "layers: max-autotune": ({"layers": dict(dynamic=False, mode="max-autotune-no-cudagraphs")}, GPU),
}
KERNELS = {  # the first that fits a kernel's name
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|gemv|splitk|cublas|triton_tem|_mm_|fused_scaled",
    "optimizer": r"multi_tensor|adam",
    "copies": r"memcpy|memset",
    "compiled, pointwise": r"triton_poi|triton_per|triton_red|liger|_kernel_",
    "not compiled": r"elementwise|reduce|cat|index|norm|softmax",
}


# --- what is run

def sizes(shape: str, small: bool) -> tuple[dict, int, int, int, int]:
    return (TINY, *((12, 20, 8, 3) if shape == "pocket" else (10, 30, 6, 2))) if small else SHAPES[shape]


def make_rows(shape: str, small: bool) -> list:
    """Rows of random tokens; half of the responses have a positive advantage, half a negative one, as GRPO's."""
    import random

    from cs336_alignment.packing import Example
    (config, prompt, response, n, _), rng = sizes(shape, small), random.Random(0)
    draw = lambda k: rng.choices(range(config["vocab_size"]), k=k)
    prompts = [draw(prompt) for _ in range(math.ceil(n / GROUP))]
    return [Example(prompts[i // GROUP], draw(response), {"weight": (1.5, -0.5)[i % 2] / (n * response)}) for i in range(n)]


def build(shape: str, small: bool):
    """The policy with random weights, always the same ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    make, config = (LlamaForCausalLM, LlamaConfig) if shape == "pocket" else (Qwen2ForCausalLM, Qwen2Config)
    torch.manual_seed(0)
    with torch.device("cuda" if G.on_gpu() else "cpu"):
        return make(config(**sizes(shape, small)[0])).float()


def more_attention() -> None:
    """Registers what the package has no use for (yet): PyTorch's kernel with its keys not repeated, and cuDNN's."""
    import torch
    from torch.nn.attention import varlen
    from transformers import AttentionInterface

    from cs336_alignment import packing as P

    def unrepeated(*args):
        return varlen.varlen_attn(*args, window_size=(-1, 0))

    def cudnn(*args):  # the private operator: the public function hands causality over as a window
        with mock.patch.object(varlen, "_should_use_cudnn", lambda device: True):
            return torch.ops.torch_attn._varlen_attn(*args, True)[0]

    for name, attend, grouped in (("packed_unrepeated", unrepeated, True), ("packed_cudnn", cudnn, False)):
        AttentionInterface.register(name, partial(P.packed_attention, attend, grouped=grouped))
        P.ATTENTION[name] = lambda: None


def again_log_probs(model, hidden, labels, temperature=1.0):
    """`head_log_probs` whose logits are not kept for the backward pass."""
    from torch.utils.checkpoint import checkpoint

    from cs336_alignment import packing as P
    return checkpoint(ORIGINAL or P.head_log_probs, model, hidden, labels, temperature, use_reentrant=False)


def liger_log_probs(model, hidden, labels, temperature=1.0):
    """The same by Liger's output layer with loss and entropy in one kernel (on Hopper; elsewhere its plain version)."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as fused

    from cs336_alignment import packing as P
    dtype = P.compute_dtype(model)
    weight = model.get_output_embeddings().weight.to(dtype)
    nll, entropy = fused.apply(hidden.to(dtype), weight, labels, temperature, return_entropy=True)
    return -nll, entropy.detach().float()


def liger_loss_log_probs(model, hidden, labels, temperature=1.0):
    """Log-probs by Liger's older kernel, in chunks of about 1,000 tokens; it knows no entropy: zeros."""
    import torch
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as fused

    from cs336_alignment import packing as P
    dtype, chunks = P.compute_dtype(model), 16  # of logits, in multiples of the hidden states' size
    weight = model.get_output_embeddings().weight.to(dtype)
    nll = fused.apply(hidden.to(dtype), weight, labels, None, None, -100, 0.0, 0.0, "none", None, False, torch.float32,
                      False, False, False, None, None, chunks)[0]
    return -nll, torch.zeros_like(nll)


ORIGINAL = None  # packing.head_log_probs, while it is patched


@contextmanager
def output_layer(kind: str | None):
    """Within it `backward_in_slices` has another output layer: eager, again, liger, liger_loss; None is the project's."""
    from cs336_alignment import packing as P
    global ORIGINAL
    ORIGINAL = P.head_log_probs
    other = {"eager": ("fused_token_log_probs", lambda: P.token_log_probs), "again": ("head_log_probs", again_log_probs),
             "liger": ("head_log_probs", liger_log_probs), "liger_loss": ("head_log_probs", liger_loss_log_probs)}
    with mock.patch.object(P, *other[kind]) if kind else ExitStack():
        yield


@contextmanager
def changed(model, options: dict):
    """The model, and the package, as a variant has them."""
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    from cs336_alignment import packing as P
    layers = options.get("layers", dict(dynamic=True))
    with ExitStack() as later:
        if layers == "liger":
            from liger_kernel import transformers as liger
            for module in (modeling_llama, modeling_qwen2):  # it replaces the module's function, for good
                later.enter_context(mock.patch.object(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb))
            kind = "llama" if model.config.model_type == "llama" else "qwen2"
            getattr(liger, f"apply_liger_kernel_to_{kind}")(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
        elif layers == "again":
            P.checkpoint_activations(model, compiled=G.on_gpu())
        elif layers != "eager" and G.on_gpu():
            for layer in model.base_model.layers:
                layer.compile(**layers)
        if "attention" in options:
            P.use_attention(model, options["attention"])
        later.enter_context(mock.patch.object(P, "SHARE_PROMPTS", options.get("shared", False)))
        later.enter_context(output_layer(options.get("output")))
        yield model


# --- measuring

def clock(call, turns: int) -> list[float]:
    """Seconds of each of `turns` calls, after one to warm up."""
    import torch
    seconds = []
    for _ in range(1 + turns):
        if G.on_gpu():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if G.on_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def gradient_sample(model):
    """Some 16 million numbers of the gradient, at even steps, on the CPU; the gradient is cleared."""
    import torch
    stride = max(1, sum(p.numel() for p in model.parameters()) // 2**24)
    sample = torch.cat([p.grad.flatten()[::stride].float() for p in model.parameters()]).cpu()
    model.zero_grad(set_to_none=True)
    return sample


def loss_and_gradient(model, rows: list, tokens: int, max_logits: int) -> tuple:
    from cs336_alignment import packing as P
    return P.accumulate_gradients(model, rows, P.sft_loss, tokens, max_logits)["loss"], gradient_sample(model)


def exact(shape: str, small: bool, rows: list, tokens: int) -> tuple:
    """Loss and gradient with everything in float32, not compiled, the attention one example after the other."""
    from cs336_alignment import packing as P
    model = build(shape, small)
    with (mock.patch.object(P, "compute_dtype", lambda model: model.dtype), mock.patch.object(P, "SHARE_PROMPTS", False),
          output_layer("eager")):
        return loss_and_gradient(model, rows, tokens, P.MAX_LOGITS)


def differences(found: tuple, reference: tuple) -> dict[str, float]:
    """Relative differences of loss and gradient."""
    (loss, g), (true_loss, true_g) = found, reference
    off = g - true_g
    return {"loss_off": abs(loss / true_loss - 1), "gradient_off": (off.norm() / true_g.norm()).item(),
            "gradient_max_off": (off.abs().max() / true_g.abs().max()).item()}


def pass_parts(model, packed, max_logits: int, turns: int, whole_s: float) -> dict[str, float]:
    """Seconds of the parts of one pass that takes `whole_s`."""
    from cs336_alignment import packing as P
    with P.packed_mode(model):
        forward = min(clock(lambda: P.hidden_states(model, packed), turns))
        leaf = P.hidden_states(model, packed).detach().requires_grad_()

    def output():
        for s in P.response_slices(packed.lengths, max_logits // model.config.vocab_size):
            log_probs, entropy = P.head_log_probs(model, leaf[s], packed.labels[s])
            P.sft_loss(log_probs, entropy, {name: x[s] for name, x in packed.side.items()})[0].sum().backward()

    head = min(clock(output, turns))
    model.zero_grad(set_to_none=True)
    return {"layers_forward_s": forward, "output_s": head, "layers_backward_s": whole_s - forward - head}


def measure(shape: str, small: bool, options: dict, turns: int, references: dict, peak: float, profile: bool) -> dict:
    """A row of the table: seconds, MFU, memory, differences from the references (the first becomes `today`)."""
    import torch
    from decode_profile import kernel_seconds

    from cs336_alignment import packing as P
    from cs336_alignment.distributed import clip_gradients
    _, prompt, response, n, a_pass = sizes(shape, small)
    rows, per_pass = make_rows(shape, small), min(n, a_pass * options.get("rows", 1))
    tokens, max_logits = per_pass * (prompt + response - 1), options.get("max_logits", P.MAX_LOGITS)
    with changed(build(shape, small), options) as model:
        start = time.perf_counter()
        found = loss_and_gradient(model, rows[:min(CHECKED, a_pass)], tokens, max_logits)
        row = {"first_s": time.perf_counter() - start}
        off = {name: differences(found, reference) for name, reference in references.items()}
        references.setdefault("today", found)
        optimizer = P.make_optimizer(model, 0.0)
        gradients = lambda: P.accumulate_gradients(model, rows, P.sft_loss, tokens, max_logits)
        passes = gradients()["micro_batches"]
        optimizer.step()  # with the optimizer's state in place, memory is what it is in a run
        free_peak()
        seconds = clock(gradients, turns)
        steps = clock(lambda: (clip_gradients(model, 1.0), optimizer.step()), turns)
        row |= {"passes": passes, "gradients_s": min(seconds), "gradients_s_all": seconds,
                "optimizer_s": min(steps), "update_s": min(seconds) * 256 / n + min(steps),
                "mfu": flops_of(model, rows, tokens) / min(seconds) / peak, "off": off}
        if G.on_gpu():
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        packed = P.pack_for(model, [rows[i] for i in P.bins_for(model, rows, tokens)[0]])
        one = lambda: P.backward_in_slices(model, packed, P.sft_loss, max_logits)
        row |= pass_parts(model, packed, max_logits, turns, min(clock(one, turns)))
        if profile:
            kernels = kernel_seconds(one)
            largest = sorted(kernels.items(), key=lambda k: -k[1])[:30]
            row |= {"kernels_s": by_kind(kernels), "largest_kernels_ms": {k[:160]: 1e3 * v for k, v in largest}}
    return row


def flops_of(model, rows: list, tokens: int) -> float:
    """Model FLOPs of the rows, less those of prompts that share theirs with the row before in a pass."""
    from training_throughput import model_flops

    from cs336_alignment import packing as P
    bins = P.bins_for(model, rows, tokens) if P.SHARE_PROMPTS else []
    again = [rows[j].prompt_ids for bin in bins for i, j in zip(bin, bin[1:]) if rows[i].prompt_ids == rows[j].prompt_ids]
    return model_flops(model, rows, False) - model_flops(model, [P.Example([*ids, 0], []) for ids in again], False)


def free_peak() -> None:
    import torch
    if G.on_gpu():
        torch.cuda.reset_peak_memory_stats()


def by_kind(kernels: dict[str, float]) -> dict[str, float]:
    """Sums over the kernels of each kind of `KERNELS`."""
    sums = {}
    for name, s in kernels.items():
        kind = next((kind for kind, names in KERNELS.items() if re.search(names, name, re.IGNORECASE)), "other")
        sums[kind] = sums.get(kind, 0.0) + s
    return sums


# --- parts alone

def product_seconds(shape: str, small: bool, rows: int, peak: float) -> dict:
    """Each matrix product of a pass of `rows` rows alone: its share of the matrix rate, and the seconds of all in a pass."""
    import torch
    c, prompt, response, *_ = sizes(shape, small)
    tokens, h, f = rows * (prompt + response - 1), c["hidden_size"], c["intermediate_size"]
    kv = h // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = {"q, o": (h, h, 2), "k, v": (h, kv, 2), "gate, up": (h, f, 2), "down": (f, h, 1)}
    table = {name: (tokens, *size, c["num_hidden_layers"]) for name, size in layer.items()}
    slices = max(1, rows * response * c["vocab_size"] / 2**29)  # as large as the package's (MAX_LOGITS)
    table["output"] = (round(rows * response / slices), h, c["vocab_size"], slices, 1)
    kinds = {"forward": lambda x, w, y: x @ w.T, "to inputs": lambda x, w, y: y @ w, "to weights": lambda x, w, y: y.T @ x}
    total, shares, flops = 0.0, {}, 0.0
    for name, (n, inner, outer, times, layers) in table.items():
        make = partial(torch.randn, device="cuda" if G.on_gpu() else "cpu", dtype=torch.bfloat16)
        x, w, y = make(n, inner), make(outer, inner), make(n, outer)
        s = {kind: min(clock(lambda: [product(x, w, y) for _ in range(10)], 3)) / 10 for kind, product in kinds.items()}
        shares[name] = {kind: 2 * n * inner * outer / s[kind] / peak for kind in kinds}
        total += sum(s.values()) * times * layers
        flops += 6 * n * inner * outer * times * layers
    return {"rows": rows, "tokens": tokens, "share_of_matrix_rate": shares, "pass_s": total, "all": flops / total / peak}


def attention_rows(shape: str, small: bool, rows: int, turns: int, names: dict[str, str]) -> list[dict]:
    """Each attention alone, on the rows of a pass: seconds forward and both ways, FLOP/s (half of n² counts), differences."""
    import torch
    from transformers import AttentionInterface
    c, prompt, response, *_ = sizes(shape, small)
    n, heads, kv = prompt + response - 1, c["num_attention_heads"], c["num_key_value_heads"]
    d, dtype = c["hidden_size"] // heads, torch.bfloat16 if G.on_gpu() else torch.float32
    torch.manual_seed(0)
    device = "cuda" if G.on_gpu() else "cpu"
    true = [torch.randn(1, k, rows * n, d, device=device) for k in (heads, kv, kv)]
    up = torch.randn(1, rows * n, heads, d, device=device)
    borders, module = torch.arange(0, rows * n + 1, n, dtype=torch.int32, device=device), mock.Mock(head_dim=d)

    def run(name: str, dtype) -> tuple:
        inputs = [x.to(dtype).requires_grad_() for x in true]
        attend = AttentionInterface()[name]
        forward = lambda: attend(module, *inputs, None, scaling=d ** -0.5, cu_seq_lens_q=borders, max_length_q=n,
                                 cu_seq_lens_k=borders, max_length_k=n)[0]
        both = lambda: torch.autograd.grad(forward(), inputs, up.to(dtype))
        return forward, both, [x.float() for x in (forward().detach(), *both())]

    _, _, reference = run("packed", torch.float32)
    found = []
    for label, name in names.items():
        try:
            forward, both, values = run(name, dtype)
            a, b = (min(clock(call, max(turns, 5))) for call in (forward, both))
            off = {part: ((x - y).norm() / y.norm()).item() for part, x, y in zip(("output", "dq", "dk", "dv"), values, reference)}
            flops = 2 * heads * d * rows * n ** 2  # of the forward pass; 2.5 times that for the backward pass
            found.append({"attention": label, "forward_s": a, "forward_and_backward_s": b, "off": off,
                          "forward_tflops": flops / a / 1e12, "tflops": 3.5 * flops / b / 1e12})
        except Exception as error:
            found.append({"attention": label, "error": f"{type(error).__name__}: {error}"[:500]})
        print(f"  {json.dumps(found[-1])[:230]}", flush=True)
    return found


# --- a shape

def missing(need: str | None) -> str | None:
    """Why a variant cannot run here; None if it can."""
    if need and not G.on_gpu():
        return "needs a GPU"
    absent = [name for name in (need or GPU).split(", ") if name != GPU and importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def joined(rows: list[dict]) -> tuple[str, dict]:
    """The options that gained over 1% against `today`, the best of each kind, and their names."""
    done = {r["variant"]: r["gradients_s"] for r in rows if "gradients_s" in r}
    best = {}
    for name, s in done.items():
        kind, _, what = name.partition(": ")
        if what and s < 0.99 * done.get("today", 0) and s < done.get(best.get(kind), math.inf):
            best[kind] = name
    options = {}
    for name in best.values():
        options |= VARIANTS[name][0]
    return " + ".join(best.values()), options


def one_shape(shape: str, small: bool, turns: int, seconds: float, peak: float, only: str, save) -> None:
    """All parts of a shape; `save` takes what is there after each."""
    from cs336_alignment import packing as P
    begin = time.perf_counter()
    _, prompt, response, n, a_pass = sizes(shape, small)
    result = {"rows": n, "rows_of_a_pass": a_pass, "tokens_of_a_row": prompt + response - 1, "response_tokens": response,
              "variants": [], "left_out": {}}
    if G.on_gpu():
        more_attention(), P.register_varlen()
        if not missing("flash_attn"):
            P.register_flash_attn()
    result["products"] = [product_seconds(shape, small, k * a_pass, peak) for k in (1, 2)]
    names = {"one example after the other": "packed"} | ({"PyTorch's (today)": "packed_varlen"} if G.on_gpu() else {})
    names |= {name.partition(": ")[2]: o["attention"] for name, (o, need) in VARIANTS.items()
              if "attention" in o and not missing(need)}
    result["attention"] = attention_rows(shape, small, a_pass, turns, names)
    save(result)
    rows = make_rows(shape, small)[:min(CHECKED, a_pass)]
    references = {"exact": exact(shape, small, rows, a_pass * (prompt + response - 1))}
    chosen = {name: v for name, v in VARIANTS.items() if name == "today" or re.search(only, name)}

    def attempt(name: str, options: dict, profile: bool) -> None:
        free()
        try:
            row = {"variant": name} | measure(shape, small, options, turns, references, peak, profile)
            show(row)
        except Exception as error:
            traceback.print_exc(limit=4)
            row = {"variant": name, "error": f"{type(error).__name__}: {error}"[:2000]}
        result["variants"].append(row | {"options": options})
        save(result)

    for name, (options, need) in chosen.items():
        why = missing(need) or (time.perf_counter() - begin > seconds and name != "today" and "no time left")
        if why:
            result["left_out"][name] = why
        else:
            attempt(name, options, name == "today")
    together, options = joined(result["variants"])
    if options:
        attempt(f"together: {together}", options, True)
    save(result | {"wall_s": time.perf_counter() - begin})


def free() -> None:
    """Frees what the last variant held."""
    from cs336_alignment import packing as P
    P.fused_token_log_probs.cache_clear()
    G.free()


def show(row: dict) -> None:
    off = row["off"].get("today") or row["off"]["exact"]
    print(f"{row['variant'][:60]:60} MFU {row['mfu']:6.1%}  {1e3 * row['gradients_s'] / row['passes']:8.1f} ms a pass "
          f"({1e3 * row['layers_forward_s']:.1f} + {1e3 * row['output_s']:.1f} + {1e3 * row['layers_backward_s']:.1f})  "
          f"optimizer {1e3 * row['optimizer_s']:.1f}  {row.get('peak_gb', 0):.1f} GB  first {row['first_s']:.0f} s  "
          f"loss off {off['loss_off']:.1e}, gradient {off['gradient_off']:.1e}", flush=True)


def versions() -> dict[str, str | None]:
    """Of the packages that matter here; None where one is missing."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    return {name: of(name) for name in ("torch", "transformers", "triton", "flash-attn", "liger-kernel", "nvidia-cutlass-dsl",
                                        "nvidia-cudnn-cu13")}


def main(out: Path = STORED, small: bool = False, turns: int = typer.Option(3, min=1, help="timed, of each part"),
         only: str = typer.Option("", help="pocket or course; default both"),
         variants: str = typer.Option("", help="only variants that this regular expression finds, and today"),
         seconds: float = typer.Option(400, help="of a shape, after which no further variant starts")) -> None:
    """Measures, prints a table, writes JSON after each variant."""
    if only not in ("", *SHAPES):
        G.refuse(f"--only is pocket or course, not {only!r}")
    from cs336_alignment.cli import bench_refusal
    if problem := bench_refusal(small, out, STORED, G.on_gpu()):
        G.refuse(problem)
    import platform

    import torch

    from cs336_alignment.runs import environment
    gpu = torch.cuda.get_device_name() if G.on_gpu() else f"{platform.machine()} CPU"
    peak, result = G.matrix_rate(), json.loads(out.read_text()) if out.exists() else {}
    print(f"{gpu}, bfloat16 matrix rate {peak / 1e12:,.1f} TFLOP/s, {versions()}")
    failed = []
    for shape in [only] if only else SHAPES:
        machine = {"gpu": gpu, "matrix_tflops": peak / 1e12, "small": small, "versions": versions(),
                   "commit": environment()["commit"]}
        print(f"\n{shape}", flush=True)

        def save(measured: dict) -> None:
            result[shape] = machine | measured
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
        one_shape(shape, small, turns, seconds, peak, variants, save)
        failed += [f"{shape}, {row['variant']}" for row in result[shape]["variants"] if "error" in row]
        for name, why in result[shape]["left_out"].items():
            print(f"left out: {name} ({why})")
    print(f"\nwritten: {out}; failed:", "; ".join(failed) or "nothing")
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    typer.run(main)
