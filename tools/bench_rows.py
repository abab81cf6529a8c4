"""
One B3 step at Qwen3's vocabulary and 12,352 new rows, three ways. Not a test: asserts no time.

rows: train_b3.py's own, new rows beside a base that is only read, the loss over each label's range.
mask: full matrices of V + new rows, trained under a gradient mask, the logits of every position.
peft: PEFT's TrainableTokens on input embedding and head, the logits of every position.

Same weights, ids and labels. With the softmax of `rows` taken over everything, as the others do, loss and gradients are
asserted equal first; what is timed is forward, backward and AdamW. Steps are interleaved in one process, medians
printed; peak memory is that of a fresh process for each way, in MB over what the loaded model takes, AdamW's state
included.

$ python -m tools.bench_rows
"""
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import TrainableTokensConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.bench_label_rows import resident  # noqa: E402
from data import Record, collate, token_row  # noqa: E402
from token_model import TokenLM  # noqa: E402
from uti import Grammar, TokenSpace  # noqa: E402

V, WIDTH = 151_936, 1024
SPACE = TokenSpace(                                    # 4 markers, 8,252 codes of pictures, 4 x 1,024 of sounds: 12,352
    {'name': 'bench', 'text_rows': V, 'tokenizer_sha256': '', 'end_of_text': 151_645},
    {'class': '', 'settings': {}, 'sha256': '', 'size': 64, 'grid': (8, 8), 'codes': 8252},
    {'class': '', 'settings': {}, 'sha256': '', 'sample_rate': 16000, 'samples': 16000, 'frames': 16, 'codebooks': 4,
     'codes': 1024})


def load(way):
    """(model, batch, trained parameters) of one way; the same weights in all."""
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False)).eval().requires_grad_(False)
    llm.set_attn_implementation('rows')
    torch.manual_seed(1)
    lm = TokenLM(llm, SPACE)
    grammar, rng, rows = Grammar(SPACE), np.random.default_rng(0), []
    for task in ('i2t', 'a2t', 't2i', 't2a'):
        modality = 'image' if 'i' in task else 'audio'
        payload = rng.integers(*grammar.bounds(grammar.payload_ranges[modality]))
        rows.append(token_row(Record('', modality, payload, rng.integers(0, 151_000, 24), ''), task, grammar, 128))
    batch = collate(rows, [None] * len(rows), 0)
    if way in ('rows', 'everything'):
        lm.typed_head = way == 'rows'
        return lm, batch, [lm.new_in, lm.new_out]
    for module, new in (llm.model.embed_tokens, lm.new_in), (llm.lm_head, lm.new_out):
        module.weight = torch.nn.Parameter(torch.cat([module.weight, new.detach()]), requires_grad=False)
    if way == 'mask':
        trained = [llm.model.embed_tokens.weight.requires_grad_(), llm.lm_head.weight.requires_grad_()]
        for p in trained:
            p.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:V]), grad[V:]]))
        return llm, batch, trained
    new = list(range(V, SPACE.total))
    llm = get_peft_model(llm, TrainableTokensConfig(
        token_indices=new, target_modules=['embed_tokens', 'lm_head'], task_type='CAUSAL_LM'))
    return llm, batch, [p for p in llm.parameters() if p.requires_grad]


def loss_of(way, model, batch):
    if way in ('rows', 'everything'):
        return model(batch)
    llm = model.get_base_model() if way == 'peft' else model
    logits = llm(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False,
                 attention_mask={'full_attention': None}, rows=batch.rows).logits[0]
    targets = torch.full_like(batch.input_ids, -100).index_copy(0, batch.label_positions, batch.labels)
    return F.cross_entropy(logits.float(), targets, reduction='sum')


def step(way, model, batch, optimizer):
    loss = loss_of(way, model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def gradients(way):
    """Loss and the gradient of the new rows, as numbers: (loss, (2, new, D))."""
    model, batch, trained = load(way)
    loss = loss_of(way, model, batch)
    loss.backward()
    return loss.item(), torch.stack([p.grad[-SPACE.n_new:] for p in trained]).numpy()


def seconds(ways, n=3):
    """{way: n times}, interleaved."""
    made = {way: load(way) for way in ways}
    optimizers = {way: torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0) for way, (*_, trained) in made.items()}
    times = {way: [] for way in ways}
    for _ in range(n + 1):                             # the first one warms up
        for way, (model, batch, _) in made.items():
            start = time.time()
            step(way, model, batch, optimizers[way])
            times[way].append(time.time() - start)
    return {way: np.array(t[1:]) for way, t in times.items()}


def peak(way):
    """MB that two steps add to the process at its peak."""
    model, batch, trained = load(way)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    Path('/proc/self/clear_refs').write_text('5')      # the peak starts anew, at what is there now
    before = resident('VmRSS')
    for _ in range(2):
        step(way, model, batch, optimizer)
    return resident('VmHWM') - before


def alone(function, *args):
    """In a process of its own, so that nothing stays behind."""
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(function, args)


if __name__ == '__main__':
    wanted, want = alone(gradients, 'everything')
    for way in 'mask', 'peft':
        loss, found = alone(gradients, way)
        assert abs(loss - wanted) < 1e-5 * abs(wanted), (way, loss, wanted)
        assert np.abs(found - want).max() < 1e-4 * np.abs(want).max(), way
    times = alone(seconds, ('rows', 'everything', 'mask', 'peft'))
    for way, t in times.items():
        print(f'{way:<10} {np.median(t):.2f} s a step, {alone(peak, way):.0f} MB more at the peak')
    for way in 'mask', 'peft':
        print(f'{way} / rows: {np.median(times[way] / times["rows"]):.2f} x the time, pair by pair')
