"""Training speed of veritune's peers on the rows of workload.py: each in its own process, given its best.

    python benchmarks/peers.py make DIR [--weights GGUF]            a model folder, an untrained adapter in DIR/adapter
    python benchmarks/peers.py trl ROWS.npz DIR --bits 4|16 --batch N [--recompute] [--losses FILE --adapter FOLDER]
    python benchmarks/peers.py unsloth ROWS.npz DIR --bits 4|16 --batch N

Without `--weights` the model is the 8B shape with random ones. Rows come as padded batches of whole rows in veritune's
order (8 solutions of a question side by side), each with one label token; with `--by-length` in batches of rows of like
length, so that little is padding, dealt evenly to the windows. Prints a RESULT line: examples/s is the median of three
windows after warm-up.
Needs trl and datasets, and for Unsloth an environment with it.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import workload

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="0")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path, weights: str | None) -> None:
    """A model as transformers saves it, with a tokenizer that nothing is asked of, and an adapter to start from."""
    import torch
    from tokenizers import Tokenizer, models
    from train_speed import random_base
    from transformers import PreTrainedTokenizerFast

    from veritune import config
    from veritune.model import adapter, load

    if weights:
        base = load.load_base(config.Model(path=weights, base="bf16"))
    else:
        base = random_base("8b", torch.device("cuda"), "bf16")
    base.model.save_pretrained(folder, max_shard_size="4GB")
    words = {"<unk>": 0, "<pad>": 128004, "<eos>": 128009, "<bos>": 128000}
    tok = base.tokenizer or PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        **{f"{name}_token": f"<{name}>" for name in ("unk", "pad", "eos", "bos")},
    )
    if weights:  # Unsloth refuses a padding token that ends a text, too; what pads counts for nothing
        tok.pad_token = tok.convert_ids_to_tokens(0)
    tok.save_pretrained(folder)
    adapter.add_adapter(base, config.Lora(), seed=0).save_pretrained(folder / "adapter")


WINDOWS = 3


def by_length(lengths: list[int], batch: int, steps: int) -> list[int]:
    """Row numbers of `steps` batches: those that warm up first, then three windows, each with rows of all lengths."""
    timed = WINDOWS * ((steps - 3) // WINDOWS)
    out = []
    for first, count in ((0, steps - timed), (steps - timed, timed)):
        rows = sorted(range(first * batch, (first + count) * batch), key=lengths.__getitem__)
        batches = [rows[i * batch : (i + 1) * batch] for i in range(count)]
        parts = 1 if first == 0 else WINDOWS
        out += [row for window in range(parts) for part in batches[window::parts] for row in part]
    return out


def dataset(o: argparse.Namespace) -> tuple[Any, float]:
    """The first rows as TRL takes them, and their mean length."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    ids, labels, _, answers = workload.read(o.rows)
    count = o.batch * o.steps
    assert count <= len(ids), "the file has too few rows"
    whole = [np.append(ids[i], answers[0 if labels[i] else 1]).tolist() for i in range(count)]
    if o.by_length:
        whole = [whole[i] for i in by_length([len(row) for row in whole], o.batch, o.steps)]
    table = {
        "input_ids": whole,
        "labels": [[-100] * (len(row) - 1) + row[-1:] for row in whole],
        "attention_mask": [[1] * len(row) for row in whole],
    }
    # A fingerprint of our own: datasets would pickle the table, which fails with some versions of dill and pyarrow.
    return Dataset(InMemoryTable(pa.table(table)), fingerprint="rows"), sum(map(len, whole)) / count


def longest(o: argparse.Namespace) -> int:
    """Tokens of the file's longest row and its label, 2,048 or more: by themselves trainers cut what is longer."""
    return max(2048, *(len(row) + 1 for row in workload.read(o.rows)[0]))


def train(model: Any, tok: Any, o: argparse.Namespace, name: str, started: float) -> None:
    """A run of TRL's trainer over rows in their order, timed by windows of steps."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows, mean = dataset(o)
    marks: list[float] = []
    on_gpu = torch.cuda.is_available()

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    class Marks(TrainerCallback):
        def on_step_begin(self, *unused: Any, **more: Any) -> None:
            wait()
            marks.append(time.perf_counter())

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    settings = SFTConfig(
        output_dir="/tmp/peer", per_device_train_batch_size=o.batch, max_steps=o.steps, learning_rate=2e-4,
        gradient_accumulation_steps=1,  # Unsloth makes it 2
        lr_scheduler_type="constant", use_cpu=not on_gpu, optim=o.optim, bf16=on_gpu, warmup_steps=0,
        gradient_checkpointing=o.recompute, logging_steps=1, save_strategy="no", report_to=[],
        max_length=longest(o),
        gradient_checkpointing_kwargs={"use_reentrant": False} if o.recompute else None, packing=False,
        disable_tqdm=True, max_grad_norm=1.0, dataset_kwargs={"skip_prepare_dataset": True},
        **({"use_liger_kernel": True} if o.liger else {}),
    )  # fmt: skip
    trainer = InOrder(model=model, args=settings, train_dataset=rows, processing_class=tok, callbacks=[Marks()])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    wait()
    marks.append(time.perf_counter())
    width = (o.steps - 3) // WINDOWS
    warm = o.steps - WINDOWS * width
    windows = [(marks[warm + (i + 1) * width] - marks[warm + i * width]) / width for i in range(WINDOWS)]
    speed = o.batch / statistics.median(windows)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "engine": name + " by length" * o.by_length, "batch": o.batch, "examples/s": round(speed, 1),
        "prompt tokens/s": round(speed * mean),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
        "ready s": round(marks[1] - started, 1),
        "mean length": round(mean, 1), "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }  # fmt: skip
    print("RESULT " + json.dumps(result), flush=True)
    if o.losses:
        o.losses.write_text(json.dumps(losses))


def trl(o: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    capped(o.cap)
    started, device = time.perf_counter(), 0 if torch.cuda.is_available() else "cpu"
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(
        o.model, quantization_config=four if o.bits == 4 else None, dtype=torch.bfloat16, device_map={"": device},
        attn_implementation="sdpa",
    )  # fmt: skip
    if o.bits == 4:
        how = {"use_reentrant": False}
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=o.recompute, gradient_checkpointing_kwargs=how
        )
    if o.adapter:
        model = PeftModel.from_pretrained(model, o.adapter, is_trainable=True)
    else:
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if o.recompute:
        model.enable_input_require_grads()
    how = " recomputed" * o.recompute + " liger" * o.liger
    train(model, AutoTokenizer.from_pretrained(o.model), o, f"TRL {'nf4' if o.bits == 4 else 'bf16'}{how}", started)


def unsloth(o: argparse.Namespace) -> None:
    started = time.perf_counter()
    import torch
    from unsloth import FastLanguageModel

    capped(o.cap)
    model, tok = FastLanguageModel.from_pretrained(
        o.model, max_seq_length=longest(o), dtype=torch.bfloat16, load_in_4bit=o.bits == 4, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if o.recompute else False, random_state=0,
    )  # fmt: skip
    if o.adapter:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(Path(o.adapter) / "adapter_model.safetensors"))
    how = " recomputed" * o.recompute
    train(model, tok, o, f"Unsloth {'nf4' if o.bits == 4 else 'bf16'}{how}", started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("make")
    verb.add_argument("folder", type=Path)
    verb.add_argument("--weights", help="a GGUF, instead of random weights")
    for name in ("trl", "unsloth"):
        verb = verbs.add_parser(name)
        verb.add_argument("rows", type=Path)
        verb.add_argument("model")
        verb.add_argument("--bits", type=int, choices=(4, 16), default=16)
        verb.add_argument("--batch", type=int, default=16)
        verb.add_argument("--steps", type=int, default=12)
        verb.add_argument("--optim", default="adamw_torch_fused")
        verb.add_argument("--recompute", action="store_true")
        verb.add_argument("--by-length", action="store_true")
        verb.add_argument("--cap", type=float, help="GiB of GPU memory that may be used")
        verb.add_argument("--liger", action="store_true")
        verb.add_argument("--adapter")
        verb.add_argument("--losses", type=Path)
    o = parser.parse_args()
    if o.verb == "make":
        make(o.folder, o.weights)
    elif o.verb == "trl":
        trl(o)
    else:
        unsloth(o)


def capped(gib: float | None) -> None:
    """Lets this process use so much of the GPU's memory only."""
    import torch

    if gib:
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    main()
