"""
What a step takes here, beside what it takes as others write it. Not tests: no time is asserted.

captions  A1: eight captions of 9 to 30 labels behind 64 image tokens. Others: the tower in every step, rows filled up
          to the longest, a mask, the logits of every position. Ours: the tower in every step, or features from a cache
chats     A2: LoRA over chats up to 512 and up to 2,048 tokens, half of them labels. Others: rows filled up to the
          longest in the order they come (padded), or four of like length at a time (grouped)
new_rows  B3: 12,352 new ids, new rows beside a base that is only read and the loss over each label's range. Others:
          full matrices under a gradient mask (mask) and PEFT's TrainableTokens (peft), logits of every position
drawing   B4: pictures of 576 codes, 16 at a time. Others: generate() of transformers with a mask over the logits

Four layers of Qwen3-0.6B's width under its whole vocabulary, 16,384 rows for chats. Loss and gradients, or ids, are
asserted equal first. The variants take turns in one process; ratios are medians over the turns, of CPU seconds, or on a
GPU of seconds between two events. Peak memory is that of a fresh process for each, in MB over what the loaded model
takes. Products: the share of a step that its matrix products alone would take.

$ python -m tools.bench
$ python -m tools.bench new_rows
"""
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel)

from common import in_parts
from data import collate
from decoders import NO_MASK, hidden_states, layer_matrices, lora, precision_of, text_losses
from examples import NO_IMAGES, Example
from lists import Item
from model import VLM, Connector, Tower
from shards import Record, token_example
from token_model import TokenModel, stock_model, write_codes
from uti import Grammar, TokenSpace

TEXT_ROWS = 151_936                                    # of Qwen3
CHAT_ROWS = 16_384                                     # of chats: others keep the logits of every position
WIDTH = 1024
N_IMAGE_TOKENS = 64


def space_of(side, codes):
    """Four markers, pictures of side x side codes, and sounds of 4 x 1,024."""
    return TokenSpace(
        {'name': 'bench', 'text_rows': TEXT_ROWS, 'tokenizer_sha256': '', 'end_of_text': 151_645},
        {'class': '', 'settings': {}, 'sha256': '', 'size': 8 * side, 'grid': (side, side), 'codes': codes},
        {'class': '', 'settings': {}, 'sha256': '', 'sample_rate': 16000, 'samples': 16000, 'frames': 16,
         'codebooks': 4, 'codes': 1024})


SPACE = space_of(8, 8252)                              # of new_rows: 12,352 new ids
DRAWN = space_of(24, 16_384)                           # of drawing
N_DRAWN = 16                                           # pictures
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')

# -----------------------------------------------------------------------------
# measuring


class Trial(NamedTuple):
    """A variant, loaded."""
    loss: Callable                                     # () -> the summed loss of a batch
    trained: list                                      # of parameters
    optimizer: torch.optim.Optimizer | None = None


def step(trial):
    trial.loss().backward()
    if trial.optimizer is not None:
        trial.optimizer.step()
    for p in trial.trained:                            # only these have a gradient
        p.grad = None


def loss_and_gradients(load, variant):
    """(loss, [gradient of each trained parameter])."""
    trial = load(variant)
    loss = trial.loss()
    loss.backward()
    return loss.item(), [p.grad.float().cpu().numpy() for p in trial.trained]


def seconds_of(function):
    """CPU seconds of a call, which other work on the machine does not lengthen much; of a GPU, those of its queue."""
    if DEVICE.type == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.process_time()
    function()
    return time.process_time() - start


def seconds(functions, n):
    """{name: (n,) times} of functions {name: callable}, which take turns."""
    times = {name: [] for name in functions}
    for _ in range(n):
        for name, function in functions.items():
            times[name].append(seconds_of(function))
    return {name: np.array(of_one) for name, of_one in times.items()}


def seconds_per_step(load, variants, n):
    trials = {variant: load(variant) for variant in variants}
    for trial in trials.values():
        step(trial)                                    # warms up
    return seconds({variant: lambda trial=trial: step(trial) for variant, trial in trials.items()}, n)


def resident(field):
    """VmRSS, or VmHWM, its peak, of this process in MB (Linux)."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024


def peak(load, variant):
    """MB that two steps add at their peak, the optimizer's state included."""
    trial = load(variant)
    if DEVICE.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew, at what is there now
        before = resident('VmRSS')
    for _ in range(2):
        step(trial)
    if DEVICE.type == 'cuda':
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    return resident('VmHWM') - before


class Products(TorchDispatchMode):
    """Counts the matrix products in its block: {(function, shape, strides and dtype of each tensor): how many}."""
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            self.counts[function, tuple((tuple(t.shape), t.stride(), t.dtype) for t in args)] += 1
        return function(*args, **kwargs or {})


def products_share(load, variant, n=5):
    """The time of a step's matrix products, each alone, as a share of the step's."""
    trial = load(variant)
    with Products() as products:
        step(trial)
    of_step = np.median([seconds_of(lambda: step(trial)) for _ in range(n)])
    of_products = 0.0
    for (function, tensors), count in products.counts.items():
        args = [torch.empty_strided(*t[:2], dtype=t[2], device=DEVICE).normal_() for t in tensors]
        function(*args)
        of_products += count * np.median([seconds_of(partial(function, *args)) for _ in range(3)])
    return of_products / of_step


def alone(function, *args):
    """In a process of its own, so that nothing stays behind."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:      # one that is killed is an error
        return pool.submit(function, *args).result()


def same(found, wanted, dtype):
    """Whether (loss, gradients) are those wanted. The others add up in another order, and bf16 has 8 bits."""
    loose = 1e-5 if dtype == torch.float32 else 1e-2
    if abs(found[0] - wanted[0]) > loose * abs(wanted[0]):
        return False
    for gradient, want in zip(found[1], wanted[1], strict=True):
        gradient = gradient[-len(want):]               # of a full matrix: its new rows, which come last
        if np.linalg.norm(gradient - want) > 10 * loose * np.linalg.norm(want):
            return False
    return True


HEADER = """| case | ours | s | MB | products | others | s | MB | ours is faster by |
|---|---|---|---|---|---|---|---|---|"""


def compare(case, load, ours, others, same_as_others=None, n=5):
    """Assert that variants agree, then print a line of the table for each of ours beside each of the others.

    load(variant, dtype) -> Trial. same_as_others: the variant of ours that computes what the others do.
    """
    for dtype in torch.float32, torch.bfloat16:
        of_dtype = partial(load, dtype=dtype)
        wanted = alone(loss_and_gradients, of_dtype, same_as_others or ours[0])
        for variant in (*others, *(() if same_as_others else ours[1:])):
            found = alone(loss_and_gradients, of_dtype, variant)
            assert same(found, wanted, dtype), (case, dtype, variant, found[0], wanted[0])
        times = alone(seconds_per_step, of_dtype, (*ours, *others), n)
        memory = {variant: alone(peak, of_dtype, variant) for variant in (*ours, *others)}
        name = f'{case}, {"fp32" if dtype == torch.float32 else "bf16"}'
        for ours_one in ours:
            share = alone(products_share, of_dtype, ours_one)
            for other in others:
                # a ratio for each turn, then their median: a busy machine slows all the variants of a turn down
                ratio = np.median(times[other] / times[ours_one])
                print(f'| {name} | {ours_one} | {np.median(times[ours_one]):.2f} | {memory[ours_one]:.0f} '
                      f'| {share:.0%} | {other} | {np.median(times[other]):.2f} | {memory[other]:.0f} '
                      f'| {ratio:.2f} |', flush=True)


def qwen3(dtype, tied=True, text_rows=TEXT_ROWS):
    """Four layers of Qwen3-0.6B, frozen."""
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=text_rows, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied))
    llm.set_attn_implementation('unpadded')
    return llm.to(DEVICE, dtype).eval().requires_grad_(False)


class Padded(NamedTuple):
    """Examples filled up to the longest, (B, L) each."""
    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor                               # -100 where there is none


def padded(examples):
    shape = len(examples), max(map(len, examples))
    ids = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for n, example in enumerate(examples):
        ids[n, :len(example)] = torch.from_numpy(example.ids)
        mask[n, :len(example)] = 1
        labels[n, example.label_positions] = ids[n, example.label_positions]
    return Padded(ids.to(DEVICE), mask.to(DEVICE), labels.to(DEVICE))


def stock_loss(llm, rows, **inputs):
    """The summed loss as most code has it: a mask, the logits of every position, in float32."""
    with precision_of(llm):
        logits = llm(attention_mask=rows.mask, use_cache=False, **inputs).logits                # (B, L, V)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows.labels[:, 1:].flatten(), reduction='sum')


# -----------------------------------------------------------------------------
# captions


def load_captions(variant, dtype):
    """Variants: tower, cached; stock."""
    llm = qwen3(dtype)                                 # seeds; the others are drawn after it
    tower = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12, image_size=224,
        patch_size=16)).to(DEVICE, dtype).eval()
    connector = Connector(768, 14, WIDTH).to(DEVICE)
    rng = np.random.default_rng(0)
    first = N_IMAGE_TOKENS + 3
    examples = []
    for n_labels in sorted(rng.integers(9, 31, 8).tolist(), reverse=True):
        ids = rng.integers(0, TEXT_ROWS, first + n_labels).astype(np.int32)
        label_positions = np.arange(first, len(ids), dtype=np.int32)
        examples.append(Example(Item('x', ('x',), ()), ids, label_positions, np.array([1]), truncated=False))
    images = [[rng.integers(0, 256, (3, 224, 224), np.uint8)] for _ in examples]
    trained = list(connector.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    if variant == 'stock':
        llm.set_attn_implementation('sdpa')
        return Trial(partial(stock_captions, llm, tower, connector, padded(examples), np.concatenate(images)), trained,
                     optimizer)
    tower.set_attn_implementation('whole')
    vlm = VLM(Tower(tower), connector, llm).to(DEVICE)
    batch = collate(examples, images, N_IMAGE_TOKENS).to(DEVICE)
    if variant == 'cached':
        with vlm.precision():
            batch.images = vlm.tower(batch.images)     # in use they are rounded to fp16
    return Trial(lambda: vlm(batch), trained, optimizer)


def stock_captions(llm, tower, connector, rows, images):
    with precision_of(llm):
        with torch.no_grad():
            pixels = torch.from_numpy(images).to(DEVICE).float() / 127.5 - 1
            patches = tower(pixels.to(tower.dtype)).last_hidden_state                           # (B, P, Dv)
        tokens = connector(patches.float())                                                     # (B, N, D)
    embeds = llm.get_input_embeddings()(rows.ids)
    parts = [embeds[:, :1], tokens.to(embeds.dtype), embeds[:, 1 + N_IMAGE_TOKENS:]]
    return stock_loss(llm, rows, inputs_embeds=torch.cat(parts, dim=1))


# -----------------------------------------------------------------------------
# chats


def load_chats(variant, dtype, n, longest):
    """Variants: ours; padded, grouped."""
    llm = qwen3(dtype, text_rows=CHAT_ROWS)
    settings = {'r': 16, 'lora_alpha': 32, 'target_modules': layer_matrices(llm), 'task_type': 'CAUSAL_LM'}
    if variant == 'ours':
        lora(llm, 16, 32, dropout=0.0, targets='')
    else:
        llm.set_attn_implementation('sdpa')
        get_peft_model(llm, LoraConfig(**settings))
    trained = []
    torch.manual_seed(1)
    for p in llm.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)         # B starts as zeros, and A would have no gradient
            trained.append(p)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.lognormal(np.log(longest / 4), 0.8, n).clip(20, longest).astype(int).tolist():
        ids = rng.integers(0, CHAT_ROWS, length).astype(np.int32)
        label_positions = np.arange(length // 2, length, dtype=np.int32)
        examples.append(Example(SimpleNamespace(id='x'), ids, label_positions, NO_IMAGES, truncated=False))
    by_length = sorted(examples, key=len, reverse=True)
    if variant == 'ours':
        return Trial(partial(packed_loss, llm, collate(by_length).to(DEVICE)), trained, optimizer)
    groups = [padded(examples)]
    if variant == 'grouped':
        groups = [padded(part) for part in in_parts(by_length, 4)]
    return Trial(partial(grouped_loss, llm, groups), trained, optimizer)


def packed_loss(llm, batch):
    with precision_of(llm):
        hidden = hidden_states(llm, llm.get_input_embeddings()(batch.input_ids), batch)
        return text_losses(llm, hidden.index_select(0, batch.logit_positions), batch.labels).sum()


def grouped_loss(llm, groups):
    """A backward pass for each group but the last, whose loss is returned with what the others came to."""
    total = 0.0
    for rows in groups[:-1]:
        loss = stock_loss(llm, rows, input_ids=rows.ids)
        loss.backward()
        total += loss.item()
    return stock_loss(llm, groups[-1], input_ids=groups[-1].ids) + total


# -----------------------------------------------------------------------------
# new_rows


def everywhere(llm, batch, **inputs):
    """The loss by every position's logits, all but the labels masked out: what `labels=` does in most code."""
    with precision_of(llm):
        logits = llm(position_ids=batch.position_ids[None], attention_mask=NO_MASK, use_cache=False,
                     layout=batch.layout, **inputs).logits[0]                                       # (T, V)
    targets = torch.full_like(batch.input_ids, -100).index_copy(0, batch.logit_positions, batch.labels)
    return F.cross_entropy(logits.float(), targets, reduction='sum')


def token_batch():
    """One example of each task."""
    grammar = Grammar(SPACE)
    rng = np.random.default_rng(0)
    examples = []
    for task, modality in ('i2t', 'image'), ('a2t', 'audio'), ('t2i', 'image'), ('t2a', 'audio'):
        payload = rng.integers(*grammar.bounds(grammar.payload_ranges[modality]))
        record = Record('', modality, payload, rng.integers(0, TEXT_ROWS, 24), '', {})
        examples.append(token_example(record, task, grammar, max_seq_len=128))
    return collate(examples)


def load_new_rows(variant, dtype):
    """Variants: ours; ours with the softmax over everything, as the others have it; mask; peft. The same weights."""
    llm = qwen3(dtype, tied=False)
    torch.manual_seed(1)
    model = TokenModel(llm, SPACE, typed_head=variant == 'ours').to(DEVICE)
    batch = token_batch().to(DEVICE)
    # a loss is summed over all labels in every variant; what differs is where logits exist, and what gets a gradient
    if variant in ('ours', 'ours_all_logits'):
        trained = [model.new_in, model.new_out]
        loss = lambda: model(batch)
    else:
        widen(llm.model.embed_tokens, model.new_in)
        widen(llm.lm_head, model.new_out)
        trained = under_mask(llm) if variant == 'mask' else under_peft(llm)
        loss = lambda: everywhere(llm, batch, input_ids=batch.input_ids[None])
    return Trial(loss, trained, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True))


def widen(module, new):
    weight = torch.cat([module.weight, new.detach().to(module.weight.dtype)])                   # (V + new, D)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)


def under_mask(llm):
    # the whole matrices get a gradient, and AdamW keeps two moments of them: the mask comes after that
    trained = [llm.model.embed_tokens.weight, llm.lm_head.weight]
    for p in trained:
        p.requires_grad_(True)
        p.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:TEXT_ROWS]), grad[TEXT_ROWS:]]))
    return trained


def under_peft(llm):
    new = list(range(TEXT_ROWS, SPACE.total))
    config = TrainableTokensConfig(token_indices=new, target_modules=['embed_tokens', 'lm_head'], task_type='CAUSAL_LM')
    get_peft_model(llm, config)                        # changes llm itself
    return [p for p in llm.parameters() if p.requires_grad]


# -----------------------------------------------------------------------------
# drawing


class OneRange(LogitsProcessor):
    """Hides all ids but those of the range of the next position."""
    def __init__(self, grammar, n_prompt):
        self.first, self.end = grammar.bounds(grammar.payload_ranges['image'])                  # (N,) each
        self.n_prompt = n_prompt

    def __call__(self, input_ids, scores):
        n = input_ids.shape[1] - self.n_prompt
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.first[n]:self.end[n]] = 0
        return scores + allowed


def load_drawing(dtype, n_codes):
    """{variant: () -> greedy ids (B, n_codes)}."""
    llm = qwen3(dtype, tied=False)
    model = TokenModel(llm, DRAWN).to(DEVICE).eval()
    grammar = Grammar(DRAWN)
    grammar.payload_ranges = {'image': grammar.payload_ranges['image'][:n_codes]}
    prompts = np.random.default_rng(0).integers(0, TEXT_ROWS, (N_DRAWN, 20)).tolist()
    exported = stock_model(model)                      # a part of it, which no file has, is on no device
    stock = Qwen3ForCausalLM(exported.config)
    stock.load_state_dict(exported.state_dict(), assign=True)
    stock.to(DEVICE, dtype).eval()
    starts = torch.tensor(np.stack([grammar.prompt('t2i', text=text) for text in prompts])).long().to(DEVICE)

    def generate():
        rule = LogitsProcessorList([OneRange(grammar, starts.shape[1])])
        out = stock.generate(starts, attention_mask=torch.ones_like(starts), max_new_tokens=n_codes, do_sample=False,
                             logits_processor=rule)
        return out[:, starts.shape[1]:].cpu().numpy()
    return {'ours': lambda: write_codes(model, grammar, 't2i', prompts, temperature=0.0), 'generate': generate}


def compare_drawing(n_codes=576):
    for dtype in torch.float32, torch.bfloat16:
        ids = {name: draw() for name, draw in load_drawing(dtype, 24).items()}
        if dtype == torch.float32:                     # in bf16 two codes may be equally likely
            assert np.array_equal(ids['ours'], ids['generate'])
        times = alone(seconds_of_drawing, dtype, n_codes)
        ours, others = (np.median(times[name]) for name in ('ours', 'generate'))
        name = f'drawing {N_DRAWN} x {n_codes} codes, {"fp32" if dtype == torch.float32 else "bf16"}'
        print(f'| {name} | ours | {ours:.1f} | | | generate | {others:.1f} | | {others / ours:.2f} |', flush=True)


def seconds_of_drawing(dtype, n_codes):
    return seconds(load_drawing(dtype, n_codes), 1)


CASES = {
    'captions': partial(compare, 'captions', load_captions, ['tower', 'cached'], ['stock']),
    'chats 512': partial(compare, '16 chats up to 512', partial(load_chats, n=16, longest=512), ['ours'],
                         ['padded', 'grouped'], n=3),
    'chats 2048': partial(compare, '8 chats up to 2,048', partial(load_chats, n=8, longest=2048), ['ours'],
                          ['padded', 'grouped'], n=3),
    'new_rows': partial(compare, 'new rows', load_new_rows, ['ours'], ['mask', 'peft'], 'ours_all_logits', n=3),
    'drawing': compare_drawing,
}


if __name__ == '__main__':
    which = sys.argv[1] if len(sys.argv) > 1 else ''
    if not any(case.startswith(which) for case in CASES):
        raise SystemExit(__doc__.strip())
    else:
        print(HEADER)
        for case, compare_it in CASES.items():
            if case.startswith(which):
                compare_it()
