"""
One A1 step at Qwen3's vocabulary: logits at label rows against logits at every position. Not a test: asserts no time.

Same model, rows and connector; loss and gradients are asserted equal first. Runs are interleaved in one process,
medians printed; peak memory is that of a fresh process for each way, in MB over what the loaded model takes.

$ python -m tools.bench_label_rows
"""
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Row, collate  # noqa: E402
from small.make import Named  # noqa: E402
from model import VLM, Connector  # noqa: E402

ROWS, LABELS, TOKENS = 8, 24, 64                       # 8 captions of 24 label tokens, 64 image tokens


def build():
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)).eval().requires_grad_(False)
    llm.set_attn_implementation('rows')
    vlm = VLM(None, Connector(1152, 27, 1024), llm)
    rng = np.random.default_rng(0)
    first = TOKENS + 3
    rows = [Row(Named('x'), rng.integers(0, 151_000, first + LABELS).astype(np.int32),
                np.arange(first, first + LABELS, dtype=np.int32), 1, False) for _ in range(ROWS)]
    images = [rng.standard_normal((729, 1152)).astype(np.float32) for _ in rows]
    return vlm, collate(rows, images, TOKENS)


def label_rows(vlm, batch):
    return vlm(batch)


def full_logits(vlm, batch):
    """Every position through the head, everything but the labels masked out: what `labels=` does in most code."""
    embeds = vlm.embed(batch.input_ids, batch.image_positions, vlm.image_tokens(batch.images))
    hidden = vlm.llm.model(inputs_embeds=embeds[None], position_ids=batch.position_ids[None],
                           attention_mask={'full_attention': None}, use_cache=False,
                           rows=batch.rows).last_hidden_state[0]
    targets = torch.full_like(batch.input_ids, -100).index_copy(0, batch.label_positions, batch.labels)
    return torch.nn.functional.cross_entropy(vlm.llm.lm_head(hidden).float(), targets, reduction='sum')


def gradients(way, vlm, batch):
    vlm.zero_grad()
    loss = way(vlm, batch)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in vlm.connector.parameters()])


def resident(field):
    """VmRSS or VmHWM, its peak, of this process in MB (Linux)."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(way):
    """MB that a step adds to the process at its peak."""
    vlm, batch = build()
    Path('/proc/self/clear_refs').write_text('5')      # the peak starts anew, at what is there now
    before = resident('VmRSS')
    gradients(way, vlm, batch)
    return resident('VmHWM') - before


if __name__ == '__main__':
    vlm, batch = build()
    (a, ga), (b, gb) = gradients(label_rows, vlm, batch), gradients(full_logits, vlm, batch)
    assert abs(a - b) < 1e-5 * abs(b) and torch.allclose(ga, gb, rtol=1e-3, atol=1e-5 * gb.abs().max()), (a, b)
    seconds = {label_rows: [], full_logits: []}
    for _ in range(5):
        for way, times in seconds.items():
            start = time.time()
            gradients(way, vlm, batch)
            times.append(time.time() - start)
    del vlm, batch
    context = multiprocessing.get_context('spawn')
    for way, times in seconds.items():
        with context.Pool(1) as pool:
            memory = pool.apply(peak, (way,))
        print(f'{way.__name__:<12} {np.median(times):.2f} s a step, {memory:.0f} MB more at the peak')
    ratio = np.median(np.array(seconds[full_logits]) / np.array(seconds[label_rows]))
    print(f'full logits / label rows: {ratio:.2f} x the time, pair by pair')
