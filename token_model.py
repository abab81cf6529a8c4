"""
The token model of Track B: a frozen language model with new rows for the ids of images and audio, the typed head,
sampling under the grammar, and an export that needs none of this.

Letters: B examples, T tokens of all examples together, M labels, D width of the language model, V text rows, N codes of
a payload.

The new rows are parameters of their own. The base matrices are read where they are: never copied, never given a
gradient or an optimizer state, whether the base ties them or not.
"""
import copy
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AddedToken, AutoModelForCausalLM, GenerationConfig

from common import first_line, gather_in_order, in_parts, one_line_io_errors, rank_parts, write_atomic
from data import collate
from decoders import (
    NO_MASK, Continuation, embed_scale, final_logits, generate, hidden_states, label_losses, load_llm, pick,
    precision_of, save_pretrained, seeded_generators, text_logits, text_losses)
from grounding import Prediction
from inference import sum_by_example
from media import contact_sheet, write_picture, write_sound
from sharding import back_to_shards, make_whole
from shards import prompt_of, with_media, with_prompt
from templates import answer_text
from uti import TASKS, TokenSpace

# -----------------------------------------------------------------------------
# the model


def fresh_rows(matrix, n, noise):
    """n rows around the mean row of a base matrix (V, D), in float32: all alike but for noise of this deviation."""
    mean = matrix.detach().mean(0, dtype=torch.float32)                                         # (D,)
    return nn.Parameter(mean + noise * torch.randn(n, matrix.shape[1]).to(mean.device))


class TokenModel(nn.Module):
    """A language model and the new rows of a token space. forward(batch): summed loss in nats. Seed before calling.

    typed_head: probabilities are over the range that the grammar expects at each label, so that text has exactly those
    of the base model; False: over every id, which is what an engine without the grammar computes.
    """
    def __init__(self, llm, space, typed_head=True, noise=0.02):
        super().__init__()
        assert llm.config._attn_implementation == 'unpadded', 'another attention would look across examples'
        n_rows = llm.get_input_embeddings().weight.shape[0]
        if llm.get_output_embeddings().bias is not None:
            raise SystemExit(f'the head of a {llm.config.model_type} has a bias, new rows have none: take another '
                             'language model')
        if n_rows != space.n_text:
            raise SystemExit(f'the language model has {n_rows} embedding rows, the token space counts {space.n_text} '
                             'text rows: take the base model that it was made for')
        self.llm = llm
        self.space = space
        self.typed_head = typed_head
        self.embed_scale = embed_scale(llm)
        self.new_in = fresh_rows(llm.get_input_embeddings().weight, space.n_new, noise)         # (new, D)
        self.new_out = fresh_rows(llm.get_output_embeddings().weight, space.n_new, noise)       # (new, D)

    def precision(self):
        return precision_of(self.llm)

    def train(self, mode=True):
        """A language model with nothing to learn stays in eval mode. Weights in shards are whole in eval mode."""
        if mode:
            back_to_shards(self.llm)
        else:
            make_whole(self.llm)
        self.training = mode                           # LoRA's dropout, or layers tuned whole
        self.llm.train(mode and any(p.requires_grad for p in self.llm.parameters()))
        return self

    def embed(self, ids):
        """Ids of the whole space, (...), -> (..., D)."""
        # both tables are looked up for every id and one answer is kept: that costs less than a host sync to tell them
        # apart, and an answer that is not kept has a gradient of exactly 0
        first_new = self.space.n_text
        old = self.llm.get_input_embeddings()(ids.clamp(max=first_new - 1))
        new = F.embedding((ids - first_new).clamp(min=0), self.new_in)
        if self.embed_scale != 1:
            new = new * self.embed_scale
        new = new.to(old.dtype)
        return torch.where((ids >= first_new)[..., None], new, old)

    def embed_prompt(self, ids):
        """int32 array (T,) -> (T, D)."""
        return self.embed(torch.from_numpy(ids).long().to(self.llm.device))

    def hidden(self, batch):
        """Last hidden states of an unpadded batch, (T, D)."""
        return hidden_states(self.llm, self.embed(batch.input_ids), batch)

    def range_logits(self, index, hidden):
        """(M, D) -> (M, size): logits over range number `index` of the space alone."""
        ids = self.space.ranges[index]
        if ids.name == 'text':
            return text_logits(self.llm, hidden)
        first_new = self.space.n_text
        rows = self.new_out[ids.first - first_new:ids.end - first_new]                          # (size, D)
        return self.row_logits(hidden, rows.to(hidden.dtype))

    def row_logits(self, hidden, rows):
        """(M, D), output rows (size, D) -> (M, size)"""
        return final_logits(self.llm, F.linear(hidden, rows))

    def range_rows(self, dtype):
        """{index of a range: its output rows (size, D)}, of all ranges but text."""
        indices = [index for index, ids in enumerate(self.space.ranges) if ids.name != 'text']
        sizes = [self.space.ranges[index].end - self.space.ranges[index].first for index in indices]
        # one split: of a slice for each range, every one would fill a whole matrix with zeros on the way back
        return dict(zip(indices, self.new_out.to(dtype).split(sizes)))

    def all_logits(self, hidden):
        """(M, D) -> (M, V + new): logits over every id."""
        new = self.row_logits(hidden, self.new_out.to(hidden.dtype))
        return torch.cat([text_logits(self.llm, hidden), new], dim=-1)

    def nll(self, batch):
        """Loss of every label, (M,), in nats, in the batch's order: sorted by range."""
        with self.precision():
            hidden = self.hidden(batch).index_select(0, batch.logit_positions)                  # (M, D)
            if not self.typed_head:
                return label_losses(hidden, self.all_logits, batch.labels, self.space.total)
            # batches of text alone do not name their ranges
            label_ranges = batch.label_ranges or [(self.space.by_name['text'], batch.n_labels)]
            # the labels stand sorted: one slice, one small head for each range
            counts = [count for _, count in label_ranges]
            hidden_by_range = hidden.split(counts)
            labels_by_range = batch.labels.split(counts)
            rows = self.range_rows(hidden.dtype)
            losses = []
            for n, (index, _) in enumerate(label_ranges):
                labels = labels_by_range[n] - self.space.ranges[index].first   # indices into the range's logits
                if index in rows:
                    head = partial(self.row_logits, rows=rows[index])
                    losses.append(label_losses(hidden_by_range[n], head, labels, len(rows[index])))
                else:
                    losses.append(text_losses(self.llm, hidden_by_range[n], labels))
            return torch.cat(losses)

    def forward(self, batch):
        return self.nll(batch).sum()

    def new_rows_state(self):
        """The new rows, {'new_in', 'new_out'}: (new, D) each, float32."""
        return {'new_in': self.new_in.detach(), 'new_out': self.new_out.detach()}

    @torch.no_grad()
    def load_new_rows_state(self, state, where='these rows'):
        """Take new_rows_state() of another run; exits with one line when it has another shape."""
        for name, rows in self.new_rows_state().items():   # they share the parameters' memory
            if state[name].shape != rows.shape:
                raise SystemExit(f'{where}: {name} is {tuple(state[name].shape)}, wanted {tuple(rows.shape)}')
            rows.copy_(state[name])


def load_token_model(llm, space, typed_head=True, noise=0.02, dtype=torch.float32, device='cpu'):
    """A TokenModel on a frozen base model, with fresh rows. Seed before calling."""
    return TokenModel(load_llm(llm, dtype, device), space, typed_head=typed_head, noise=noise).to(device)


# -----------------------------------------------------------------------------
# evaluation: losses, ablations, what became of text


@torch.no_grad()
def example_sums(model, examples, batch_size, rank=0, world_size=1):
    """(losses, n_right), (examples,) each, on every rank.

    losses: each example's summed loss in nats; n_right: number of its labels with more than half of the probability.
    """
    model.eval()
    sums = []                                          # of this rank's examples, two numbers each
    for part in rank_parts(examples, batch_size, rank, world_size):
        batch = collate(part).to(model.llm.device)
        losses = model.nll(batch).double()                                                      # (M,)
        is_right = (losses < math.log(2)).double()     # -log p < log 2: p is above a half
        sums.extend(sum_by_example(torch.stack([losses, is_right], dim=1), batch).tolist())
    model.train()
    losses, n_right = np.array(gather_in_order(sums)).reshape(-1, 2).T
    return losses, n_right


def crossed_losses(model, task, examples, sets, batch_size, rank=0, world_size=1):
    """The loss of every example of a set behind every input of the set: (sets, n, n) float64, in nats, on every rank.

    [s, i, j] is that of what example j reads or writes, given the media or the prompt of example i. sets: of
    matching_sets, all of n indices.
    """
    tables = []
    for members in sets:
        pairs = []
        for j in members:
            for i in members:
                if TASKS[task][1] == 'read':
                    pairs.append(with_media(examples[j], examples[i].item.payload))
                else:
                    pairs.append(with_prompt(examples[j], prompt_of(examples[i])))
        losses, _ = example_sums(model, pairs, batch_size, rank=rank, world_size=world_size)
        tables.append(losses.reshape(len(members), len(members)).T)
    return np.stack(tables)


def matching_keys(task, examples):
    """(input, output) of each example, for matching_sets."""
    keys = [(example.item.media_sha256, example.item.text.tobytes()) for example in examples]
    return keys if TASKS[task][1] == 'read' else [(text, media) for media, text in keys]


def derangement(keys, seed):
    """For each item the index of another one whose key differs; every item is taken once. keys: bytes.

    The items stand in a circle, sorted by a hash of seed and key, so that those of one key are neighbours. Each takes
    the item that stands as many steps further on as the commonest key has items: past all of its own key. With more
    than half of the items under one key that is not possible.
    """
    hashes = [hashlib.sha256(f'{seed} '.encode() + key).digest() for key in keys]
    # equal hashes mean equal keys; the index makes the order one and the same everywhere
    circle = np.array(sorted(range(len(keys)), key=lambda i: (hashes[i], i)))
    n_steps = max(Counter(keys).values())
    partner = np.empty(len(keys), int)
    partner[circle] = np.roll(circle, -n_steps)
    return partner.tolist()


def shuffled_media(examples, n, seed):
    """Reading examples, each with the n codes of another: a derangement, and never the same file again."""
    partners = derangement([example.item.media_sha256.encode() for example in examples], seed)
    return [with_media(example, examples[k].ids[1:1 + n]) for example, k in zip(examples, partners)]


def random_media(examples, grammar, modality, seed):
    """Reading examples with random codes, each from the range of its position."""
    first, end = grammar.bounds(grammar.payload_ranges[modality])                               # (N,) each
    changed = []
    for i, example in enumerate(examples):
        codes = np.random.default_rng([seed, i]).integers(first, end)                           # (N,)
        changed.append(with_media(example, codes))
    return changed


def shuffled_prompts(examples, seed):
    """Writing examples, each behind the prompt of another: a derangement, and never the same words again."""
    prompts = [prompt_of(example) for example in examples]
    partners = derangement([prompt.tobytes() for prompt in prompts], seed)
    return [with_prompt(example, prompts[k]) for example, k in zip(examples, partners)]


@torch.no_grad()
def text_difference(model, examples, rank=0, world_size=1):
    """Largest difference between this model's log probability of a text id and the stock base model's, over every id at
    every position of these examples, on every rank."""
    model.eval()
    differences = []
    for example in examples[rank::world_size]:
        batch = collate([example]).to(model.llm.device)
        with model.precision():
            # the base model's own path: its embedding, its head, nothing of ours but the attention
            stock = model.llm(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None],
                              attention_mask=NO_MASK, use_cache=False, layout=batch.layout).logits[0]   # (T, V)
            hidden = model.hidden(batch)                                                        # (T, D)
            if model.typed_head:
                ours = model.range_logits(model.space.by_name['text'], hidden)                  # (T, V)
            else:
                ours = model.all_logits(hidden)                                                 # (T, V + new)
        ours = ours.float().log_softmax(-1)[:, :model.space.n_text]
        differences.append((ours - stock.float().log_softmax(-1)).abs().max().item())
    model.train()
    return largest(gather_in_order(differences))


def largest(differences):
    """NaN when one of them is, or when there are none: a gate fails on it."""
    return float(np.max(differences)) if differences else math.nan


def training_bytes(model, optimizer):
    """Bytes of gradients and optimizer state: as they are, and what training the whole matrices would take."""
    n_matrices = 1 if model.llm.config.tie_word_embeddings else 2
    # float32 takes 4 bytes, and AdamW keeps two numbers for each weight
    full = (model.space.n_text + model.space.n_new) * model.new_in.shape[1] * 4 * n_matrices
    n_bytes = 0
    for state in optimizer.state.values():
        for value in state.values():
            if value.ndim:                             # and not the step count
                n_bytes += value.numel() * value.element_size()
    return {'gradient': 4 * (model.new_in.numel() + model.new_out.numel()),
            'optimizer': n_bytes,
            'full_gradient': full,
            'full_optimizer': 2 * full}


# -----------------------------------------------------------------------------
# sampling under the grammar


@torch.no_grad()
def write_codes(model, grammar, task, prompts, temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, seeds=None):
    """Draw, or generate audio: the codes that follow prompts, (B, N), global ids, each in the range of its position.

    prompts: B lists of text ids. A payload has the exact length of the token space, so its end marker is not sampled.
    guidance g: logits = without prompt + g (with prompt - without prompt). seeds: one for each prompt; what a prompt
    gets does not depend on the others.
    """
    modality, direction = TASKS[task]
    if direction != 'write':
        raise SystemExit(f'task {task!r} writes no payload: wanted t2i or t2a')
    starts = [grammar.prompt(task, text=text) for text in prompts]
    guided = guidance != 1
    if guided:                                         # the second half of the batch: the same without its prompt
        starts += [grammar.prompt(task)] * len(prompts)
    generators = seeded_generators(seeds, len(prompts))
    codes = []                                         # (B,) of each position
    with model.precision():
        continuation = Continuation(model.llm, [model.embed_prompt(ids) for ids in starts])
        for index in grammar.payload_ranges[modality].tolist():   # the one legal range of each position
            logits = model.range_logits(index, continuation.hidden()).float()                   # (B or 2 B, size)
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance * (conditional - unconditional)
            drawn = pick(logits, temperature, top_p=top_p, generators=generators, top_k=top_k)  # (B,)
            ids = model.space.ranges[index].first + drawn
            codes.append(ids)
            continuation.append(model.embed(ids.repeat(2) if guided else ids))
    return torch.stack(codes, dim=1).cpu().numpy()


@torch.no_grad()
def read_text(model, grammar, task, payloads, max_new_tokens, temperature=0.0, top_p=1.0, seeds=None):
    """Describe: the text ids, without <|im_end|>, that follow each payload of global ids. Its head has text only."""
    prompts = [model.embed_prompt(grammar.prompt(task, payload)) for payload in payloads]
    with model.precision():
        return generate(model.llm, prompts, max_new_tokens, stop_ids=[model.space.text_end], temperature=temperature,
                        top_p=top_p, seeds=seeds)


def complete_task(model, grammar, task, examples, batch_size, max_new_tokens, temperature, guidance, rank=0,
                  world_size=1):
    """What the model makes of each example's prompt, a list of text ids or of codes; in their order, on every rank.

    Texts are greedy, of at most max_new_tokens; codes have temperature and guidance, and example i has seed i, so that
    batch size and number of ranks do not change them.
    """
    model.eval()
    outputs = []
    for part in rank_parts(range(len(examples)), batch_size, rank, world_size):
        records = [examples[i].item for i in part]
        if TASKS[task][1] == 'read':
            payloads = [record.payload for record in records]
            outputs.extend(read_text(model, grammar, task, payloads, max_new_tokens=max_new_tokens))
        else:
            prompts = [record.text.tolist() for record in records]
            codes = write_codes(model, grammar, task, prompts, temperature=temperature, guidance=guidance, seeds=part)
            outputs.extend(codes.tolist())
    model.train()
    return gather_in_order(outputs)


def predictions_of(examples, outputs, tokenizer, max_new_tokens):
    """[Prediction] of the outputs of complete_task for a task that reads."""
    predictions = []
    for example, ids in zip(examples, outputs):
        truth = example.item.text
        predictions.append(Prediction(answer_text(tokenizer, truth), answer_text(tokenizer, ids),
                                      is_cut=len(ids) >= max_new_tokens, truth_is_cut=len(truth) >= max_new_tokens))
    return predictions


def write_completions(path, task, examples, outputs, tokenizer, uti=None, batch_size=16):
    """Write the outputs of complete_task: path.jsonl, a line for each example. For one rank.

    With a UTI, codes are also decoded, batch_size at a time, into path/000.png or .wav, ..., and of pictures into one
    sheet, path.png, with the first prompts. Returns what was decoded, [array], or [].
    """
    modality, direction = TASKS[task]
    truths = [tokenizer.decode(example.item.text) for example in examples]
    lines = []
    for example, truth, output in zip(examples, truths, outputs):
        record = {'id': example.item.id, 'media_sha256': example.item.media_sha256, 'truth': truth}
        if direction == 'read':
            record['prediction'] = answer_text(tokenizer, output)
        else:
            record['codes'] = output
        lines.append(json.dumps(record) + '\n')
    write_atomic(f'{path}.jsonl', ''.join(lines))
    if direction == 'read' or uti is None:
        return []

    decode = uti.decode_image if modality == 'image' else uti.decode_audio   # (3, H, W) uint8, or (samples,) float32
    metas = [example.item.meta for example in examples]
    decoded = []
    for part in in_parts(range(len(outputs)), batch_size):   # a decoder takes more memory than codes suggest
        decoded += decode(np.array([outputs[i] for i in part]), [metas[i] for i in part])
    folder = Path(path)
    if modality == 'audio':
        for n, wave in enumerate(decoded):
            write_sound(folder / f'{n:03d}.wav', wave, uti.space.audio['sample_rate'])
        return decoded
    files = [folder / f'{n:03d}.png' for n in range(len(decoded))]
    for file, pixels in zip(files, decoded):
        write_picture(file, Image.fromarray(pixels.transpose(1, 2, 0)))
    contact_sheet(f'{path}.png', [(file,) for file in files[:64]], truths[:64])
    return decoded


# -----------------------------------------------------------------------------
# what others load


def save_new_rows(model, folder, **meta):
    """Write folder/{trainable_rows.pt,trainable_rows.json,token_space.json}, each whole or absent. Returns the folder.

    trainable_rows.pt: new_rows_state(), tensors only, loads with weights_only=True. Row i is id V + i of the space.
    """
    folder = Path(folder)
    state = model.new_rows_state()
    body = io.BytesIO()
    torch.save({name: rows.cpu() for name, rows in state.items()}, body)
    described = {
        'base': model.space.base['name'],
        'token_space': model.space.sha256,
        'typed_head': model.typed_head,
        'first_id': model.space.n_text,
        'rows': {name: list(rows.shape) for name, rows in state.items()},
        'sha256': hashlib.sha256(body.getvalue()).hexdigest(),
        **meta}
    write_atomic(folder / 'trainable_rows.pt', body.getvalue())
    model.space.save(folder / 'token_space.json')
    # last: beside an older one, or none, these rows are refused
    write_atomic(folder / 'trainable_rows.json', json.dumps(described, indent=1) + '\n')
    return folder


def load_new_rows(model, folder):
    """Put the rows that save_new_rows wrote into the model; exits with one line when they are damaged or of another
    token space. Returns what trainable_rows.json says."""
    folder = Path(folder)
    model.space.require(TokenSpace.load(folder / 'token_space.json'), folder)
    try:
        body = (folder / 'trainable_rows.pt').read_bytes()
        meta = json.loads((folder / 'trainable_rows.json').read_text())
        described = (meta['sha256'], meta['token_space'])
        if described != (hashlib.sha256(body).hexdigest(), model.space.sha256):
            raise SystemExit(f'{folder}/trainable_rows.pt is not the file that trainable_rows.json describes; '
                             'run B3 again')
        # tensors only: a pickle of anything else is refused, its code does not run
        state = torch.load(io.BytesIO(body), map_location='cpu', weights_only=True)
        model.load_new_rows_state(state, folder)
    except Exception as e:                             # damaged files raise all kinds
        raise SystemExit(f'{folder}: cannot read its trainable rows ({first_line(e)}); run B3 again')
    return meta


@torch.no_grad()
def stock_model(model, pad_token_id=None):
    """A stock model of transformers with these logits over every id: its embedding and its head hold the new rows, and
    are not tied.

    Generation is greedy unless asked otherwise, and ends where a text or a payload ends.
    """
    llm = model.llm
    space = model.space
    config = copy.deepcopy(llm.config)
    config.vocab_size = space.total
    config.tie_word_embeddings = False
    config._attn_implementation = None                 # 'unpadded' is ours alone

    def with_new_rows(base, rows):
        return torch.cat([base, rows.to(base.dtype)])                                           # (V + new, D)

    # tuned layers are masters in float32; no state_dict(), which gives weights in shards as shards
    weights = {name: p.detach().to(llm.dtype) for name, p in llm.named_parameters()}
    name_of = {module: name for name, module in llm.named_modules()}
    for layer, rows in (llm.get_input_embeddings(), model.new_in), (llm.get_output_embeddings(), model.new_out):
        weights[f'{name_of[layer]}.weight'] = with_new_rows(layer.weight, rows)
    with torch.device('meta'):                         # no memory: the weights are there already
        stock = AutoModelForCausalLM.from_config(config, dtype=llm.dtype, trust_remote_code=False)
    stock.load_state_dict(weights, assign=True)        # refuses a missing or an unknown weight
    ends = [space.text_end, space.special['<|img_end|>'], space.special['<|aud_end|>']]
    stock.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=space.text_end if pad_token_id is None else pad_token_id)
    return stock


def spelling_tokenizer(tokenizer, space):
    """The tokenizer with a token for every id of the space: <|img_start|>, <|image_0|>, <|audio_1_7|>, ..."""
    # the base model has rows that its tokenizer has no id for; without a name for them the new ids would slide down
    names = [f'<|text_{i}|>' for i in range(len(tokenizer), space.n_text)]
    names += list(space.special)
    for ids in space.ranges[2:]:                       # after text and special
        names += [f'<|{ids.name}_{i}|>' for i in range(ids.size)]
    spelling = copy.deepcopy(tokenizer)
    spelling.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert spelling.convert_tokens_to_ids(names[-1]) == space.total - 1 == len(spelling) - 1
    return spelling


def export_stock(model, tokenizer, folder):
    """Write a Hugging Face folder that stock AutoModelForCausalLM and AutoTokenizer load. It replaces an older one."""
    folder = Path(folder)
    with one_line_io_errors(folder):
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as hidden:
            beside = Path(hidden) / folder.name
            save_pretrained(stock_model(model, tokenizer.pad_token_id), beside)
            save_pretrained(spelling_tokenizer(tokenizer, model.space), beside)
            model.space.save(beside / 'token_space.json')
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(beside, folder)
    return folder


@torch.no_grad()
def export_difference(model, folder, examples):
    """Largest difference between our logits over every id and those of a fresh stock load of export_stock's folder.

    Ours are of one product with all rows, as the stock model has it: a GPU picks its kernel by how many rows there are,
    and two products, as all_logits has them, may add up in another order. The same product leaves nothing but the
    weights and the states to differ. What all_logits gives counts where it is further off than rounding.
    """
    llm = model.llm
    # as a stranger loads it: from disk, without our attention or our rows
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=llm.dtype, trust_remote_code=False)
    stock.to(llm.device).eval()
    model.eval()
    llm.set_attn_implementation(stock.config._attn_implementation)   # another kernel rounds otherwise in bf16
    every_row = torch.cat([llm.get_output_embeddings().weight, model.new_out.to(llm.dtype)])    # (V + new, D)
    differences = []
    for example in examples:
        ids = torch.from_numpy(example.ids).long().to(llm.device)[None]                         # (1, T)
        hidden = llm.base_model(inputs_embeds=model.embed(ids), use_cache=False).last_hidden_state   # (1, T, D)
        ours = model.row_logits(hidden, every_row)                                              # (1, T, V + new)
        differences.append((ours - stock(ids, use_cache=False).logits).abs().max().item())
        apart = (model.all_logits(hidden) - ours).abs().max().item()
        if not apart <= max(4 * torch.finfo(llm.dtype).eps, 1e-4) * ours.abs().max().item():   # NaN too
            differences.append(apart)
    llm.set_attn_implementation('unpadded')
    model.train()
    return largest(differences)
