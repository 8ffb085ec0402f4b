"""Train a small language model on the source code of Python's standard library.

Nothing is downloaded. The same file runs unchanged on one process or many, on CPUs or GPUs, under DDP or FSDP2:

    python examples/language_model.py
    paceline launch examples/language_model.py
    paceline launch --use_fsdp --mixed_precision bf16 examples/language_model.py --width 512 --layers 8

It saves checkpoints as it goes. Stop it with Ctrl-C, then resume it on any number of ranks:

    paceline launch examples/language_model.py --resume
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from paceline import Accelerator, ProjectConfiguration, set_seed

VOCABULARY = 256  # every byte is a token


class Attention(nn.Module):
    """Causal self-attention over [batch, time, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Let each position attend to itself and those before it."""
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and the MLP, each with a residual connection."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class LanguageModel(nn.Module):
    """A decoder-only transformer over bytes, with tied input and output embeddings."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._initialise)
        self.head.weight = self.tokens.weight

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn tokens [batch, time] into logits [batch, time, vocabulary]."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Windows(Dataset[Tensor]):
    """Consecutive windows of `context` + 1 bytes; each byte is predicted from the bytes before it."""

    def __init__(self, text: bytes, context: int) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.data[start : start + self.context + 1].long()


def read_text(limit: int) -> tuple[bytes, bytes]:
    """Read the standard library's sources as a training text and a held-out text (every twentieth file)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files += sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py"))
    files = [file for file in files if "site-packages" not in file.parts and "test" not in file.parts]
    train = b"".join(file.read_bytes() for i, file in enumerate(files) if i % 20)[:limit]
    held_out = b"".join(file.read_bytes() for i, file in enumerate(files) if not i % 20)
    return train, held_out[: limit // 50]


def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss of each window, in nats per byte. Shape [batch]."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2).float(), windows[:, 1:], reduction="none").mean(dim=1)


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Tensor]) -> float:
    """Return the mean loss over the held-out text. Each window counts once on any number of ranks."""
    model.eval()
    gathered = [accelerator.gather_for_metrics(losses(model, windows)) for windows in loader]
    model.train()
    return float(torch.cat(gathered).mean())


@torch.no_grad()
def generate(model: nn.Module, prompt: str, length: int, context: int, device: torch.device) -> str:
    """Continue a prompt. Every rank must call it, since a forward under FSDP is collective; all draw the same bytes."""
    model.eval()
    draw = torch.Generator().manual_seed(0)
    text = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(length):
        logits = model(text[:, -context:])[0, -1].float().cpu()
        chosen = torch.multinomial(torch.softmax(logits / 0.7, dim=0), 1, generator=draw)
        text = torch.cat([text, chosen.to(device)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    """Train, validate, print a sample, save the weights."""
    args = arguments()
    set_seed(args.seed)
    project = ProjectConfiguration(
        project_dir=args.output,
        automatic_checkpoint_naming=True,
        total_limit=2,
        save_in_background=True,
        save_on_signals=("SIGINT", "SIGTERM", "SIGUSR1"),
    )
    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate, project_config=project)
    train_text, held_out_text = read_text(args.bytes)
    train = DataLoader(Windows(train_text, args.context), args.batch_size, shuffle=True, drop_last=True)
    held_out = DataLoader(Windows(held_out_text, args.context), args.batch_size)
    model = LanguageModel(args.width, args.layers, args.heads, args.context)
    size = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.95))
    warm_up = min(20, args.steps // 5 + 1)
    scheduler = LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, max(0.05, 1 - step / max(args.steps, 1))))
    model, optimizer, train, held_out, scheduler = accelerator.prepare(model, optimizer, train, held_out, scheduler)

    accelerator.print(accelerator.describe())
    accelerator.print(f"\n{size:,} parameters, {len(train_text):,} bytes of Python to train on")
    if args.resume:
        accelerator.print(f"resuming from {accelerator.load_state() or 'step 0: there is no checkpoint yet'}")
    step, tokens = optimizer.num_steps, 0
    before = validate(accelerator, model, held_out)
    accelerator.print(f"validation loss at step {step}: {before:.3f} nats per byte\n")

    bar = tqdm(total=args.steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    started = time.perf_counter()
    while step < args.steps:
        for windows in train:
            with accelerator.accumulate(model):
                loss = losses(model, windows).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            tokens += windows.shape[0] * args.context * accelerator.num_processes
            if not accelerator.sync_gradients:
                continue
            step += 1
            bar.update()
            if step % 10 == 0 or step == args.steps:
                # loss.item() waits for the device, so do it only now and then.
                speed = tokens / (time.perf_counter() - started)
                memory = accelerator.peak_memory() / 1e9
                bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tokens/s, {memory:.2f} GB")
            if step % args.save_every == 0:
                accelerator.save_state()
            if step == args.steps:
                break
    bar.close()

    after = validate(accelerator, model, held_out)
    accelerator.print(f"\nvalidation loss: {before:.3f} -> {after:.3f} nats per byte")
    sample = generate(model, "def ", args.sample, args.context, accelerator.device)
    accelerator.print(f"\n--- a sample ---\n{sample}\n---")
    accelerator.save_model(model, args.output)
    accelerator.print(f"weights: {args.output}/model.safetensors")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps (default 240)")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per rank and micro-batch (default 16)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimizer step (default 1)")
    parser.add_argument("--context", type=int, default=128, help="bytes per window (default 128)")
    parser.add_argument("--width", type=int, default=160, help="width of the model (default 160)")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks (default 4)")
    parser.add_argument("--heads", type=int, default=5, help="attention heads (default 5)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    parser.add_argument("--bytes", type=int, default=8_000_000, help="bytes of training text (default 8,000,000)")
    parser.add_argument("--sample", type=int, default=300, help="bytes to generate at the end (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the sample order (default 0)")
    parser.add_argument("--output", default="runs/language_model", help="folder for checkpoints and weights")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints (default 50)")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in the output folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
