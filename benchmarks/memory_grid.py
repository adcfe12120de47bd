"""Peak memory of real training steps on one GPU beside what `training/memory.py` foretells, over a grid of shapes.

    python benchmarks/memory_grid.py [--only 8b-bf16 smol-bf16 ...] [--seconds 55] [--out FILE.json]

Weights are random and made on the device. Each point is one step (forward, backward) after a tiny one that lets the
libraries allocate what they keep. Groups that end in `-compiled` compile the layers: one layer's code serves all, so a
model of 4 layers is compiled, and depth is measured with plain layers. What does not fit into --seconds is left out
and named. Prints a line a point and the worst errors; above all, what the tables of constants leave unexplained.
"""

import argparse
import gc
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import veritune  # noqa: F401  sets how GPU memory is taken, which bitsandbytes, starting CUDA, would settle

# isort: split
import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from veritune import config
from veritune.model import adapter, load, lora, self_check
from veritune.model.compiled import compile_layers, gradients
from veritune.model.shape import Shape
from veritune.model.verdict import label_logits, label_loss
from veritune.tokens.trie import Trie, build
from veritune.training import memory, optimizer

LLAMA = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072}
SHAPES: dict[str, Any] = {
    "8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, **LLAMA,
    ),
    "qwen": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768,
    ),
    "smol": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, **LLAMA,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    tokens: int
    length: int
    recomputed: float = 0  # part of all layers
    together: int = 8


@dataclass(frozen=True)
class Group:
    """Points that share a model: measured in one go."""

    shape: str
    precision: str
    rank: int
    points: tuple[Point, ...]
    compiled: bool = False
    layers: int | None = None

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.precision}-r{self.rank}" + ("-compiled" if self.compiled else "")


WIDE = (Point(16384, 320), Point(16384, 320, 1), Point(16384, 1024, 0.5), Point(8192, 4096), Point(4096, 256, 0, 1))
FEW = (Point(16384, 320), Point(8192, 2048, 0.5), Point(2048, 256, 1))
GRID = (
    Group("smol", "bf16", 16, (*WIDE, Point(16384, 64))),
    Group("qwen", "bf16", 16, (*WIDE, Point(16384, 64))),
    Group("8b", "bf16", 16, WIDE),
    Group("8b", "nf4", 16, FEW),
    Group("8b", "bf16", 16, (*FEW, Point(32768, 320), Point(8192, 4096), Point(16384, 1024, 1, 32)), True, 4),
    Group("qwen", "bf16", 64, FEW),
    Group("8b", "nf4", 64, (Point(4096, 320), Point(16384, 320, 1))),
    Group("8b", "nf4", 16, FEW, compiled=True, layers=4),
    Group("qwen", "bf16", 16, (*FEW, Point(16384, 64)), compiled=True),
    Group("smol", "bf16", 128, (*FEW, Point(16384, 64)), compiled=True),
)


def base_of(group: Group, device: torch.device) -> load.Base:
    """A model with random weights, made on the device in the group's precision."""
    torch.manual_seed(0)
    settings = type(SHAPES[group.shape]).from_dict(SHAPES[group.shape].to_dict())
    settings.num_hidden_layers = group.layers or settings.num_hidden_layers
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[: settings.num_hidden_layers]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).eval()
    if group.precision == "nf4":
        for layer in load.layers(model):
            four_bit(layer, device)
        model.is_loaded_in_4bit = True
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None and tensor.is_meta:
                made = torch.empty_like(tensor, device=device)
                made = made.fill_(1) if "Norm" in type(module).__name__ else made.normal_(std=0.02)
                module._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
    model.tie_weights()
    rotary = model.model.rotary_emb
    inverse, _ = type(rotary).compute_default_rope_parameters(model.config, device)
    rotary.inv_freq, rotary.original_inv_freq = inverse, inverse.clone()
    return load.Base(model, None, device, group.precision, group.shape)


def four_bit(layer: torch.nn.Module, device: torch.device) -> None:
    """Puts random NF4 products in the place of a layer's plain ones."""
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                new = Linear4bit(
                    child.in_features, child.out_features, bias=child.bias is not None, device="meta",
                    compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
                )  # fmt: skip
                random = torch.randn(child.out_features, child.in_features, dtype=torch.bfloat16, device=device) * 0.02
                options: dict[str, Any] = {"requires_grad": False, "quant_type": "nf4", "module": new}
                new.weight = Params4bit(random, **options)._quantize(device)
                if child.bias is not None:
                    new.bias = child.bias
                setattr(parent, name, new.requires_grad_(False))


def batch(point: Point, vocabulary: int) -> Trie:
    """A trie of about `point.tokens` tokens: rows of `point.length`, a fifth of it a question that `together` share."""
    rng = np.random.default_rng(0)
    head, asked = rng.integers(5, vocabulary, 20, dtype=np.int32), max(point.length // 5, 10)
    own, rows, size = max(point.length - 20 - asked, 1), [], 20
    while True:
        question = rng.integers(5, vocabulary, asked, dtype=np.int32)
        size += asked
        for _ in range(point.together):
            size += own
            if rows and size > point.tokens:
                return build(rows)
            rows.append(np.concatenate((head, question, rng.integers(5, vocabulary, own, dtype=np.int32))))


def measure(group: Group, device: torch.device, until: float) -> tuple[list[dict[str, Any]], list[Point]]:
    """One step for each point of a group, and the points that time did not suffice for."""
    torch.cuda.reset_peak_memory_stats()
    base = base_of(group, device)
    self_check.use_paths(base.model)
    weights = torch.cuda.memory_allocated()
    model = adapter.add_adapter(base, config.Lora(rank=group.rank), seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    stepper = optimizer.make(parameters, config.Train())
    shape = Shape.of(base.model.config.to_dict())
    depth = len(load.layers(model))

    def forward(trie: Trie) -> torch.Tensor:
        labels = torch.arange(len(trie.ends), device=device) % 2 == 0
        return label_loss(label_logits(model, trie, device), labels, (7, 11)) / len(trie.ends)

    load.set_training(model)
    forward(batch(Point(512, 64), shape.vocabulary)).backward()
    stepper.step()  # gradients stay: in all micro-batches of a step but the first they are there
    compiling = time.perf_counter()
    if group.compiled:
        trie = batch(Point(1024, 128), shape.vocabulary)
        print("compiled:", compile_layers(model, lambda: gradients(model, lambda: forward(trie))) or "ok", flush=True)
        forward(trie).backward()
    compiling = time.perf_counter() - compiling
    job = memory.Job(group.precision, config.Lora(rank=group.rank), "adamw_torch", group.compiled)
    done, left = [], []
    for point in group.points:
        if time.perf_counter() > until:
            left.append(point)
            continue
        trie, recomputed = batch(point, shape.vocabulary), round(point.recomputed * depth)
        load.set_training(model, recomputed=recomputed)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        try:
            loss = forward(trie)
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
            del loss
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            lora.forget(model)
            print(f"{group.name} {point}: out of memory", flush=True)
            continue
        seconds = time.perf_counter() - start
        free, total = torch.cuda.mem_get_info()
        size = memory.Batch.of(trie)
        foretold = memory.peak(shape, job, size, recomputed)
        peak = torch.cuda.max_memory_allocated()
        done.append({
            "group": group.name, "layers": depth, **vars(point), **vars(size), "recomputed_layers": recomputed,
            "measured": peak, "foretold": round(foretold.total), "error": foretold.total / peak - 1,
            "reserved": torch.cuda.max_memory_reserved(), "outside": total - free - torch.cuda.memory_reserved(),
            "weights": weights, "foretold_weights": round(foretold.weights), "before": before,
            "foretold_before": round(foretold.weights + foretold.adapter + foretold.libraries),
            "kept": kept, "foretold_kept": round(foretold.kept), "working": peak - before - kept,
            "foretold_working": round(foretold.working), "seconds": round(seconds, 3),
            "tokens_s": round(trie.tokens / seconds), "compiling": round(compiling, 1),
        })  # fmt: skip
        show(done[-1])
    return done, left


def show(it: dict[str, Any]) -> None:
    """A point's line: measured and foretold, whole and in parts, GiB."""
    gib = {key: it[key] / 2**30 for key in it if key.removeprefix("foretold_") in ("before", "kept", "working")}
    parts = "  ".join(f"{key} {gib[key]:.3f}/{gib[f'foretold_{key}']:.3f}" for key in ("before", "kept", "working"))
    print(
        f"{it['group']:22} T {it['tokens']:6} len {it['length']:4} reach {it['reach']:.0f} rows "
        f"{it['rows']:4} again {it['recomputed_layers']:2}/{it['layers']:2}  measured {it['measured'] / 2**30:7.3f} "
        f"foretold {it['foretold'] / 2**30:7.3f} ({it['error']:+.1%})  {parts}  reserved "
        f"+{it['reserved'] / it['measured'] - 1:.1%} outside {it['outside'] / 2**30:.2f}  {it['tokens_s']:,} tokens/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), help="groups whose name begins so")
    parser.add_argument("--seconds", type=float, default=55, help="no point begins later than this")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "memory.json")
    o = parser.parse_args()
    device, start = torch.device("cuda"), time.perf_counter()
    points, left = [], []
    for group in GRID:
        if o.only and not any(group.name.startswith(name) for name in o.only):
            continue
        if time.perf_counter() - start > o.seconds:
            left.append(group.name)
            continue
        done, missed = measure(group, device, start + o.seconds)
        points += done
        left += [f"{group.name} {point}" for point in missed]
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    o.out.write_text(json.dumps({**about, "points": points, "left_out": left}, indent=1))
    for group in sorted({it["group"] for it in points}):
        errors = [it["error"] for it in points if it["group"] == group]
        print(f"{group:22} {min(errors):+.1%} to {max(errors):+.1%} over {len(errors)} points")
    print(f"{len(points)} points in {time.perf_counter() - start:.0f} s, {about}; left out: {left or 'none'}")


if __name__ == "__main__":
    main()
