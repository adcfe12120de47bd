"""Training speed of veritune: examples/s, tokens/s, share of the device's matrix rate, peak memory.

    python benchmarks/train_speed.py ROWS.npz [--shape 8b | --model FOLDER] [--base bf16] [--together 8] [--profile]
    python benchmarks/train_speed.py ROWS.npz --model FOLDER --adapter FOLDER --losses FILE     beside peers.py

ROWS comes from workload.py. Weights of a shape are random: speed needs no others.
"""

import argparse
import json
import time
from pathlib import Path

import veritune  # noqa: F401  sets how GPU memory is taken, which bitsandbytes, starting CUDA, would settle

# isort: split
import numpy as np
import torch
import workload
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, LlamaConfig

from veritune import config
from veritune.model import adapter, graphs, load, precision, self_check
from veritune.model.compiled import compile_layers, gradients
from veritune.model.shape import Shape
from veritune.model.verdict import label_logits, label_loss
from veritune.tokens.trie import build, split
from veritune.training import fit, memory, optimizer, room

SHAPES = {
    "8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
    ),
    "0.5b": LlamaConfig(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=False,
    ),
    "135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=False,
    ),
    "tiny": LlamaConfig(
        vocab_size=128256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    ),
}  # fmt: skip


def random_base(shape: str, device: torch.device, held: str) -> load.Base:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    torch.set_default_dtype(was)
    model = model.to_empty(device=device)
    for name, tensor in model.state_dict().items():
        tensor.fill_(1) if "norm" in name else tensor.normal_(std=0.02)
    rotary = model.model.rotary_emb
    inverse, _ = type(rotary).compute_default_rope_parameters(model.config, device)
    rotary.inv_freq.copy_(inverse), rotary.original_inv_freq.copy_(inverse)
    model.requires_grad_(False).eval()
    if held == "nf4":
        model.is_loaded_in_4bit = True  # what PEFT asks
        for layer in load.layers(model):
            for name, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    layer.set_submodule(name, to_nf4(module))
    return load.Base(model, None, device, held, shape)


def to_nf4(module: torch.nn.Linear) -> Linear4bit:
    """A layer as transformers would load it with load_in_4bit, double quantisation and bf16 products."""
    packed = Linear4bit(
        module.in_features, module.out_features, False, torch.bfloat16, True, "nf4", device=torch.device("meta")
    )
    weight = Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    packed.weight = weight._quantize(module.weight.device)
    return packed


def way_of(base: load.Base, rows: list[np.ndarray], o: argparse.Namespace) -> fit.Fit:
    """Micro-batch and recomputed layers as veritune would choose them for steps of these rows, under the cap if any."""
    held = "bf16" if o.unpacked else o.base
    job = memory.Job(held, config.Lora(rank=o.rank), config.Train().optimizer, not o.eager)
    steps = [rows[i : i + o.examples] for i in range(0, min(len(rows), 8 * o.examples), o.examples)]
    settings = config.Train(
        gradient_checkpointing="on" if o.checkpointing else "auto", micro_batch_tokens=o.micro_batch_tokens
    )
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    shape, of, space = Shape.of(base.model.config.to_dict()), fit.mix(steps, shared=True), fit.room_of(free, o.cap)
    return fit.choose(shape, job, settings, of, space, room.card_of(torch.cuda.get_device_name()))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 product of square matrices of random numbers, 8192 wide on a GPU."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    wait(device)
    start = time.perf_counter()
    for _ in range(10):
        torch.mm(a, b)
    wait(device)
    return 2 * n**3 * 10 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--model", help="real weights instead of a shape")
    parser.add_argument("--base", default="bf16")
    parser.add_argument("--together", type=int, default=8)
    parser.add_argument("--rank", type=int, default=config.Lora().rank)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, help="default: as veritune would choose")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps in a window")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--unpacked", action="store_true", help="hold an NF4 base as bf16 on the GPU")
    parser.add_argument("--cap", type=float, help="GiB of GPU memory that may be used")
    parser.add_argument("--graphs", action="store_true", help="record passes as CUDA graphs")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--adapter", help="an adapter folder to start from")
    parser.add_argument("--losses", type=Path, help="where to write the loss of each step, as JSON")
    o = parser.parse_args()
    device = load.pick_device("auto")
    o.graphs = o.graphs and device.type == "cuda"
    rows, labels, questions, answers = workload.read(o.rows)
    started = time.perf_counter()
    if o.shape == "135m" and not o.model:
        rows = [row % 49152 for row in rows]
    base = load.load_base(config.Model(path=o.model, base=o.base)) if o.model else random_base(o.shape, device, o.base)
    if o.cap:  # a shape's weights are made in bf16 first
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(o.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    if o.graphs:
        graphs.own_stream(device)
    said = lambda what: print(f"{what} after {time.perf_counter() - started:.0f} s", flush=True)  # noqa: E731
    said("weights made")
    said(f"paths: {self_check.check_paths(base, 2048) or 'ok'}")
    model = adapter.add_adapter(base, config.Lora(rank=o.rank), seed=0, start_from=o.adapter)
    if o.unpacked:
        precision.hold_unpacked(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    stepper = optimizer.make(parameters, config.Train())
    text = base.model.config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_layer = 2 * text.hidden_size * (text.num_attention_heads + text.num_key_value_heads) * width
    frozen = text.num_hidden_layers * (per_layer + 3 * text.hidden_size * text.intermediate_size)
    starts = np.flatnonzero(np.r_[True, questions[1:] != questions[:-1]])
    picks = np.concatenate([np.arange(s, min(s + o.together, len(rows))) for s in starts])

    recomputed = len(load.layers(model)) if o.checkpointing else 0
    if device.type == "cuda":
        way = way_of(base, [rows[i] for i in picks], o)
        o.micro_batch_tokens, recomputed = way.budget, way.recomputed
        said(f"micro-batches of {way.budget:,} tokens, {recomputed} layers recomputed, "
             f"{way.peak.total / 2**30:.1f} GiB foreseen")  # fmt: skip
    load.set_training(model, recomputed=recomputed)

    def batch(step: int, budget: int = o.micro_batch_tokens or 16384) -> list:
        at = (step * o.examples) % (len(picks) - o.examples)
        chosen = picks[at : at + o.examples]
        parts = split([rows[i] for i in chosen], budget)
        return [(build([rows[chosen[i]] for i in p]), torch.from_numpy(labels[chosen[p]])) for p in parts]

    losses: list[torch.Tensor] = []

    def step(micros: list) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for trie, y in micros:
            loss = passes.backward(trie, y.numpy(), 1 / o.examples) if passes is not None else None
            if loss is None:
                loss = label_loss(label_logits(model, trie, device), y.to(device), answers).div(o.examples)
                loss.backward()
            total = total + loss.detach()
        losses.append(total)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=passes is None)
        return norm

    count = 3 + o.windows * o.steps
    micros = [batch(i) for i in range(count)]
    if not o.eager and device.type == "cuda":
        # Plain layers take up to twice the memory: few rows, as in a run.
        trie, y = batch(0, min(o.micro_batch_tokens // 2, room.PROBE_TOKENS))[0]
        loss = lambda: label_loss(label_logits(model, trie, device), y.to(device), answers)  # noqa: E731
        problem = compile_layers(model, lambda: gradients(model, loss), precision=o.base)
        said(f"compiled: {problem or 'ok'}")
    passes = None
    if o.graphs:
        trie, y = micros[0][0]
        loss = lambda: label_loss(label_logits(model, trie, device), y.to(device), answers)  # noqa: E731
        passes, problem = graphs.record(model, device, answers, trie, y.numpy(), loss, precision=o.base)
        said(f"recorded: {problem or 'ok'}")
    start = time.perf_counter()
    step(micros[0])
    wait(device)
    first, ready = time.perf_counter() - start, time.perf_counter() - started
    norms = [float(step(micros[i])) for i in (1, 2)]
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, tokens, whole = [], [], []  # of a step, by window; tokens of the trie, and of all its rows in full
    for window in range(o.windows):
        start = time.perf_counter()
        part = micros[3 + window * o.steps : 3 + (window + 1) * o.steps]
        for m in part:
            step(m)
        wait(device)
        seconds.append((time.perf_counter() - start) / o.steps)
        tokens.append(sum(t.tokens for m in part for t, _ in m) / o.steps)
        whole.append(sum(int((t.positions[t.ends] + 1).sum()) for m in part for t, _ in m) / o.steps)
    speeds = sorted(o.examples / s for s in seconds)
    rates = sorted(t / s for t, s in zip(tokens, seconds, strict=True))
    prompts = sorted(t / s for t, s in zip(whole, seconds, strict=True))
    rate = matrix_rate(device)
    plain = sum(len(rows[i]) for i in picks) / len(picks)
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 1) if device.type == "cuda" else None
    result = {
        "engine": f"veritune {o.base}" + " unpacked" * o.unpacked + f" {recomputed} layers again" * bool(recomputed)
        + " graphs" * o.graphs, "model": o.model or o.shape, "together": o.together,
        "cap GiB": o.cap, "micro-batch tokens": o.micro_batch_tokens,
        "examples/s": round(speeds[len(speeds) // 2], 1), "tokens/s": round(rates[len(rates) // 2]),
        "prompt tokens/s": round(prompts[len(prompts) // 2]),
        "share of matrix rate": round(rates[len(rates) // 2] * 4 * frozen / rate, 3),
        "TFLOP/s of matrix rate": round(rate / 1e12, 2), "mean length": round(plain, 1),
        "tokens a row": round(float(np.mean(tokens)) / o.examples, 1),
        "peak GiB": peak, "first step s": round(first, 1),
        "ready s": round(ready, 1),
        "gradient norms": norms,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    print("RESULT " + json.dumps(result), flush=True)
    if o.losses:
        o.losses.write_text(json.dumps([float(loss) for loss in losses]))
    if o.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            step(micros[4])
            torch.cuda.synchronize()
        print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=70)[:7000])


if __name__ == "__main__":
    main()
