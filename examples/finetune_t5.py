"""Fine-tune a T5 at 4096 tokens: its biases stay tables over the distance, so no [H, T, T] mask is ever made.

    python examples/finetune_t5.py --model google-t5/t5-small --steps 100

Without --model, a small T5 with random weights. The task is made here: copy what stands between two marks.
"""

import argparse
import resource

import torch
from transformers import T5Config, T5ForConditionalGeneration

from posattn.integrations.transformers import convert


def batch_of(size, length, vocabulary):
    """Texts [B, T] with two marks, and what stands between them, [B, 16]."""
    texts = torch.randint(10, vocabulary, (size, length))
    starts = torch.randint(1, length - 18, (size,)).tolist()
    for text, start in zip(texts, starts):
        text[start - 1], text[start + 16] = 8, 9
    return texts, torch.stack([text[start : start + 16] for text, start in zip(texts, starts)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a T5 checkpoint's name or folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--smoke", action="store_true", help="a few short steps, to see that it runs")
    args = parser.parse_args()
    steps, length, size = (2, 64, 2) if args.smoke else (args.steps, args.length, 2)

    torch.manual_seed(0)
    if args.model:
        model = T5ForConditionalGeneration.from_pretrained(args.model)
    else:
        small = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 2, "vocab_size": 256}
        model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0))
    convert(model)  # in place: the same weights, the same state_dict
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before = bias.detach().clone()

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        texts, answers = batch_of(size, length, min(model.config.vocab_size, 256))
        loss = model(input_ids=texts, labels=answers).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step:3}  loss {loss.item():.3f}")

    moved = (bias - before).abs().max().item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{length} tokens: the relative bias moved by up to {moved:.4f}; {peak:.0f} MB at the peak of this process")


if __name__ == "__main__":
    main()
