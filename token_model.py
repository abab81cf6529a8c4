"""
The token model of Track B: a frozen Qwen3 with new rows for the ids of images and sounds, the typed head, sampling
under the grammar, and an export that needs none of this.

Letters: B rows, T tokens of all rows together, M labels, D LLM width, V text rows, N codes of a payload.

The new rows are parameters of their own. The base matrices are read where they lie: never copied, never given a
gradient or an optimizer state, whether the base ties them or not.
"""
import copy
import hashlib
import io
import json
import math
import os
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicCache

from common import all_gather, write_atomic
from data import collate, prompt_of, with_prompt
from model import generate, label_losses, left_padded, load_llm, pick
from uti import SPECIALS, TASKS, TokenSpace

# -----------------------------------------------------------------------------
# the model


def fresh_rows(matrix, n, noise):
    """n rows around the mean row of a base matrix (V, D), in float32: all alike but for noise of this deviation."""
    mean = matrix.detach().mean(0, dtype=torch.float32)                                         # (D,)
    return nn.Parameter(mean + noise * torch.randn(n, matrix.shape[1]).to(mean.device))


class TokenLM(nn.Module):
    """Qwen3 and the new rows of a token space. forward(batch) -> summed loss in nats.

    typed_head: a label's probability is taken over the range that the grammar expects there, so that text has exactly
    the base model's probabilities; False: over every id, which is what an engine without the grammar computes.
    Seed before calling.
    """
    def __init__(self, llm, space, typed_head=True, noise=0.02):
        super().__init__()
        assert llm.config._attn_implementation == 'rows', 'with another attention rows of a batch would see each other'
        rows = llm.get_input_embeddings().weight.shape[0]
        if rows != space.n_text:
            raise SystemExit(f'the language model has {rows} embedding rows, the token space counts {space.n_text} '
                             'text rows: take the base model that it was made for')
        self.llm, self.space, self.typed_head = llm, space, typed_head
        self.new_in = fresh_rows(llm.get_input_embeddings().weight, space.n_new, noise)
        self.new_out = fresh_rows(llm.get_output_embeddings().weight, space.n_new, noise)

    def precision(self):
        """bf16 autocast where the frozen weights are bf16: the new rows in float32 are the masters."""
        half = self.llm.dtype == torch.bfloat16
        return torch.autocast(self.llm.device.type, torch.bfloat16) if half else nullcontext()

    def train(self, mode=True):
        """A language model with nothing to learn stays in eval mode."""
        self.training = mode
        self.llm.train(mode and any(p.requires_grad for p in self.llm.parameters()))
        return self

    def embed(self, ids):
        """Ids of the whole space, (...), -> (..., D). Both tables are looked up everywhere and one answer is kept: that
        is less than a host sync costs, and a row that is not kept gets a gradient of exactly 0."""
        base, first = self.llm.get_input_embeddings().weight, self.space.n_text
        old = F.embedding(ids.clamp(max=first - 1), base)
        new = F.embedding((ids - first).clamp(min=0), self.new_in).to(old.dtype)
        return torch.where((ids >= first)[..., None], new, old)

    def hidden(self, batch):
        """Last hidden states of an unpadded batch, (T, D)."""
        masks = {'full_attention': None, 'sliding_attention': None}
        return self.llm.model(
            inputs_embeds=self.embed(batch.input_ids)[None], position_ids=batch.position_ids[None],
            attention_mask=masks, use_cache=False, rows=batch.rows).last_hidden_state[0]

    def range_logits(self, index, hidden):
        """(M, D) -> (M, size): logits over range number `index` of the space alone."""
        r, first = self.space.ranges[index], self.space.n_text
        if r.name == 'text':
            return self.llm.lm_head(hidden)
        return F.linear(hidden, self.new_out[r.first - first:r.end - first].to(hidden.dtype))

    def all_logits(self, hidden):
        """(M, D) -> (M, V + new): logits over every id."""
        return torch.cat([self.llm.lm_head(hidden), F.linear(hidden, self.new_out.to(hidden.dtype))], dim=-1)

    def nll(self, batch):
        """Loss of every label, (M,), in nats, in the batch's order: sorted by range."""
        with self.precision():
            hidden = self.hidden(batch).index_select(0, batch.label_positions)                  # (M, D)
            if not self.typed_head:
                return label_losses(hidden, self.all_logits, batch.labels)
            ranges = batch.label_ranges or [(self.space.by_name['text'], batch.n_labels)]   # rows that say none: text
            counts = [count for _, count in ranges]
            return torch.cat([
                label_losses(h, partial(self.range_logits, index), y - self.space.ranges[index].first)
                for (index, _), h, y in zip(ranges, hidden.split(counts), batch.labels.split(counts))])

    def forward(self, batch):
        return self.nll(batch).sum()

    def rows_state(self):
        """The new rows, {'new_in', 'new_out'}: (new, D) each, float32."""
        return {'new_in': self.new_in.detach(), 'new_out': self.new_out.detach()}

    @torch.no_grad()
    def load_rows(self, state, where='these rows'):
        """Take rows_state() of another run; exits when the shape is another."""
        for name, mine in self.rows_state().items():
            if state[name].shape != mine.shape:
                raise SystemExit(f'{where}: {name} is {tuple(state[name].shape)}, wanted {tuple(mine.shape)}')
            mine.copy_(state[name])


def load_token_lm(llm, space, typed_head=True, noise=0.02, dtype=torch.float32, device='cpu'):
    """A TokenLM on a frozen base model with fresh rows. Seed before calling."""
    return TokenLM(load_llm(llm, dtype), space, typed_head, noise).to(device)


# -----------------------------------------------------------------------------
# what the right medium is worth, and what became of text


@torch.no_grad()
def row_sums(lm, rows, batch_size, rank=0, world_size=1):
    """Summed loss of each row in nats, and how many of its labels got more than half of the probability: (rows,) each,
    on every rank."""
    lm.eval()
    mine, done = list(range(rank, len(rows), world_size)), {}
    for part in (mine[i:i + batch_size] for i in range(0, len(mine), batch_size)):
        batch = collate([rows[i] for i in part], [None] * len(part), 0).to(lm.llm.device)
        losses = lm.nll(batch).double()
        each = torch.stack([losses, (losses < math.log(2)).double()], dim=1)                    # (M, 2)
        sums = each.new_zeros(len(part), 2).index_add(0, batch.label_rows, each)
        done.update(zip(part, sums.tolist()))
    lm.train()
    done = {i: sums for part in all_gather(done) for i, sums in part.items()}
    return np.array([done[i] for i in range(len(rows))]).reshape(-1, 2).T


def row_losses(lm, rows, batch_size, rank=0, world_size=1):
    """Summed loss of each row, (rows,), in nats, on every rank."""
    return row_sums(lm, rows, batch_size, rank, world_size)[0]


def with_media(row, codes):
    """A reading row with other codes in the place of its own, which stand after the start marker."""
    ids = row.ids.copy()
    ids[1:1 + len(codes)] = codes
    return replace(row, ids=ids)


def dealt(keys, seed):
    """Another item for each, in an order drawn over the whole set: one whose key, bytes, is another. Items of one key
    stand together in the order, so everyone goes past as many as the commonest key has; with more than half of the
    items under one key there is no such deal."""
    drawn = [hashlib.sha256(f'{seed} '.encode() + key).digest() for key in keys]
    order = sorted(range(len(keys)), key=lambda i: (drawn[i], i))
    partner = dict(zip(order, np.roll(order, -max(Counter(keys).values())).tolist()))
    return [partner[i] for i in range(len(keys))]


def swapped_media(rows, n, seed):
    """Reading rows, each with the n codes of another item: dealt over the whole set, never the same medium again."""
    partners = dealt([row.item.media.encode() for row in rows], seed)
    return [with_media(row, rows[partner].ids[1:1 + n]) for row, partner in zip(rows, partners)]


def random_media(rows, grammar, modality, seed):
    """Reading rows with random codes, each legal in its place."""
    first, end = grammar.bounds(grammar.payload_ranges[modality])
    return [with_media(row, np.random.default_rng([seed, i]).integers(first, end)) for i, row in enumerate(rows)]


def swapped_prompts(rows, seed):
    """Writing rows, each behind the prompt of another item: dealt over the whole set, never the same words again."""
    prompts = [prompt_of(row) for row in rows]
    partners = dealt([prompt.tobytes() for prompt in prompts], seed)
    return [with_prompt(row, prompts[partner]) for row, partner in zip(rows, partners)]


@torch.no_grad()
def text_difference(lm, rows, rank=0, world_size=1):
    """Largest difference between this model's log probability of a text id and the stock base model's, over every id
    at every position of these rows, on every rank."""
    lm.eval()
    mine, masks = [0.0], {'full_attention': None, 'sliding_attention': None}
    for row in rows[rank::world_size]:
        batch = collate([row], [None], 0).to(lm.llm.device)
        with lm.precision():
            stock = lm.llm(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None],
                           attention_mask=masks, use_cache=False, rows=batch.rows).logits[0]
            hidden = lm.hidden(batch)
            ours = lm.range_logits(0, hidden) if lm.typed_head else lm.all_logits(hidden)       # (T, V or V + new)
        ours = ours.float().log_softmax(-1)[:, :lm.space.n_text]
        mine.append((ours - stock.float().log_softmax(-1)).abs().max().item())
    lm.train()
    return float(np.max([d for part in all_gather(mine) for d in part]))   # of NaN and numbers: NaN, which fails


def training_bytes(lm, optimizer):
    """Bytes of gradients and optimizer state, here as counted and for training the full matrices as computed."""
    width, tied = lm.new_in.shape[1], lm.llm.config.tie_word_embeddings
    full = (lm.space.n_text + lm.space.n_new) * width * 4 * (1 if tied else 2)
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    return {'gradient': 4 * (lm.new_in.numel() + lm.new_out.numel()),
            'optimizer': sum(t.numel() * t.element_size() for t in state),
            'full_gradient': full, 'full_optimizer': 2 * full}


# -----------------------------------------------------------------------------
# sampling under the grammar


@torch.no_grad()
def write_codes(lm, grammar, task, prompts, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, seeds=None):
    """Draw or sound: the codes (B, N) that follow prompts, lists of text ids; global ids, each in its place's range.

    Every payload has the token space's exact length, so its end marker is not sampled. guidance g: a row without
    prompt runs beside each one, and logits = uncond + g (cond - uncond). seeds: one a row; a row's codes do not depend
    on its batch mates.
    """
    device, n = lm.llm.device, len(prompts)
    if TASKS[task][1] != 'write':
        raise SystemExit(f'task {task!r} writes no payload: wanted t2i or t2a')
    starts = [grammar.prompt(task, text=text) for text in prompts]
    starts += [grammar.prompt(task)] * n if guidance != 1 else []
    generators = [torch.Generator().manual_seed(s) for s in seeds or range(n)]
    with lm.precision():
        embeds, mask, positions = left_padded([lm.embed(torch.from_numpy(s).long().to(device)) for s in starts])
        cache, out = DynamicCache(config=lm.llm.config), []
        for index in grammar.payload_ranges[TASKS[task][0]].tolist():
            hidden = lm.llm.model(None, mask, positions, cache,     # by place: see generate in model.py
                                  inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1]
            logits = lm.range_logits(index, hidden).float()                                     # (B or 2 B, size)
            if guidance != 1:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
            out.append(pick(logits, temperature, top_p, generators, top_k) + lm.space.ranges[index].first)   # (B,)
            embeds = lm.embed(out[-1].repeat(len(starts) // n))[:, None]
            mask = torch.cat([mask, mask.new_ones(len(starts), 1)], dim=1)
            positions = positions[:, -1:] + 1
    return torch.stack(out, dim=1).cpu().numpy()


def read_text(lm, grammar, task, payloads, max_new_tokens, temperature=0.0, top_p=1.0, seeds=None):
    """Describe: text ids, without <|im_end|>, for each payload of global ids. Base head and base rows: text only."""
    starts = [torch.from_numpy(grammar.prompt(task, payload)).long().to(lm.llm.device) for payload in payloads]
    with torch.no_grad(), lm.precision():
        return generate(lm.llm, [lm.embed(s) for s in starts], max_new_tokens, [lm.space.text_end], temperature, top_p,
                        seeds)


# -----------------------------------------------------------------------------
# what others load


def save_rows(lm, folder, **meta):
    """Write folder/{trainable_rows.pt,trainable_rows.json,token_space.json}, each whole or absent. Returns the folder.

    trainable_rows.pt: rows_state(), tensors only, loads with weights_only=True. Row i is id V + i of the token space.
    """
    folder = Path(folder)
    body = io.BytesIO()
    torch.save({name: rows.cpu() for name, rows in lm.rows_state().items()}, body)
    write_atomic(folder / 'trainable_rows.pt', body.getvalue())
    lm.space.save(folder / 'token_space.json')
    write_atomic(folder / 'trainable_rows.json', json.dumps({
        'base': lm.space.base['name'], 'token_space': lm.space.sha256, 'typed_head': lm.typed_head,
        'first_id': lm.space.n_text, 'rows': {name: list(rows.shape) for name, rows in lm.rows_state().items()},
        'sha256': hashlib.sha256(body.getvalue()).hexdigest(), **meta}, indent=1) + '\n')
    return folder


def load_rows(lm, folder):
    """Put the rows that save_rows wrote into lm; exits when they are damaged or of another token space."""
    folder = Path(folder)
    lm.space.require(TokenSpace.load(folder / 'token_space.json'), folder)
    try:
        body, meta = (folder / 'trainable_rows.pt').read_bytes(), json.loads(
            (folder / 'trainable_rows.json').read_text())
    except (OSError, ValueError) as e:
        raise SystemExit(f'{folder}: cannot read its trainable rows ({e}); stage B3 writes them')
    if hashlib.sha256(body).hexdigest() != meta['sha256'] or meta['token_space'] != lm.space.sha256:
        raise SystemExit(f'{folder}/trainable_rows.pt is not the file that trainable_rows.json describes; run B3 again')
    lm.load_rows(torch.load(io.BytesIO(body), weights_only=True), folder)
    return meta


def whole_matrix(base, rows):
    """(V, D) and (new, D) -> (V + new, D) in the base's precision."""
    return torch.cat([base.detach(), rows.detach().to(base.dtype)])


@torch.no_grad()
def export(lm, tokenizer, folder):
    """A Hugging Face folder that AutoModelForCausalLM loads as it is, with these logits over every id: vocab_size is
    the whole token space's, embedding and head are matrices of their own. The tokenizer beside it spells every new id;
    generation is greedy unless asked otherwise, and ends where a text or a payload ends.
    """
    folder, config = Path(folder), copy.deepcopy(lm.llm.config)
    config.vocab_size, config.tie_word_embeddings = lm.space.total, False
    config._attn_implementation = 'sdpa'
    weights = {**lm.llm.state_dict(),
               'model.embed_tokens.weight': whole_matrix(lm.llm.get_input_embeddings().weight, lm.new_in),
               'lm_head.weight': whole_matrix(lm.llm.get_output_embeddings().weight, lm.new_out)}
    with torch.device('meta'):
        stock = AutoModelForCausalLM.from_config(config, dtype=lm.llm.dtype)
    stock.load_state_dict(weights, assign=True)        # refuses a missing or an unknown weight
    ends = [lm.space.text_end, lm.space.special['<|img_end|>'], lm.space.special['<|aud_end|>']]
    pad = lm.space.text_end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stock.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=pad)
    beside = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(beside, ignore_errors=True)
    stock.save_pretrained(beside)
    spelled = copy.deepcopy(tokenizer)
    names = [f'<|text_{i}|>' for i in range(len(tokenizer), lm.space.n_text)]      # rows the tokenizer has no id for
    names += [*SPECIALS, *(f'<|{r.name}_{i}|>' for r in lm.space.ranges[2:] for i in range(r.size))]
    spelled.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert spelled.convert_tokens_to_ids(names[-1]) == lm.space.total - 1 == len(spelled) - 1
    spelled.save_pretrained(beside)
    lm.space.save(beside / 'token_space.json')
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return folder


@torch.no_grad()
def export_difference(lm, folder, rows):
    """Largest difference between our logits over every id and those of a fresh stock load of export()'s folder."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.llm.dtype).to(lm.llm.device).eval()
    lm.eval()
    lm.llm.set_attn_implementation(stock.config._attn_implementation)   # another kernel rounds otherwise in bf16
    largest = [0.0]
    for row in rows:
        ids = torch.from_numpy(row.ids).long().to(lm.llm.device)[None]                          # (1, T)
        hidden = lm.llm.model(inputs_embeds=lm.embed(ids), use_cache=False).last_hidden_state
        largest.append((lm.all_logits(hidden) - stock(ids, use_cache=False).logits).abs().max().item())
    lm.llm.set_attn_implementation('rows')
    lm.train()
    return float(np.max(largest))
