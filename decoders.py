"""
Language models of transformers as they are: loading, attention over unpadded batches, the loss at label positions,
LoRA, generation from embeddings, and the check that all of it gives what the stock model gives.

Letters: B examples or prompts, T tokens of all examples together, L tokens of the longest, M labels, D width of the
language model, V text rows.

Batches are not padded: a batch is one sequence of T tokens, its examples end to end, and positions start anew in each.
Only attention has to keep the examples apart; there, and only there, they are laid out as (B, L).
"""
import inspect
import re
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:                                    # torch before 2.10
    varlen_attn = None

from common import first_line
from data import padded_layout

# -----------------------------------------------------------------------------
# loading what stays frozen

bars_are_off = are_progress_bars_disabled()            # as HF_HUB_DISABLE_PROGRESS_BARS in the environment says
logging.disable_progress_bar()                         # of what is loaded, and of what is downloaded with it, ...
if sys.stderr.isatty() and not bars_are_off:
    enable_progress_bars()                             # ... but 16 GB are not downloaded in silence
logging.set_verbosity_error()                          # its load report lists the text tower; pretrained() is stricter
warnings.filterwarnings('ignore', '`is_gradient_checkpointing` is deprecated')   # raised inside peft


def pretrained(cls, path, dtype, ignore=(), **options):
    """cls.from_pretrained, with every weight read from the checkpoint and none left over, or one clear line.

    from_pretrained fills missing weights at random and only reports them; here they are an error.
    ignore: prefixes of weights that may be left over.
    """
    try:
        model, info = cls.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
            **options)
    except Exception as e:                             # missing, cut or foreign files raise all kinds
        raise SystemExit(f'{path}: cannot load its weights ({first_line(e)}); wanted a whole Hugging Face checkpoint')
    unknown = [name for name in info['unexpected_keys'] if not name.startswith(tuple(ignore))]
    problems = {'lacks': info['missing_keys'], 'has unknown': unknown, 'has misshapen': info['mismatched_keys']}
    for problem, names in problems.items():
        if names:
            first = ', '.join(map(str, sorted(names)[:3]))
            raise SystemExit(f'{path} {problem} weights: {first} ({len(names)} in all); '
                             'wanted a complete checkpoint of this class')
    return model


def load_config(path):
    """The configuration of a Hugging Face model; exits with one line when there is none."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)   # code in a model's folder never runs
    except Exception as e:
        raise SystemExit(f'{path}: no Hugging Face model here ({first_line(e)})')


def load_tokenizer(path):
    """The tokenizer of a Hugging Face model; exits with one line when it is absent or damaged."""
    load_config(path)                                  # one clear line when nothing is there
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:                             # a damaged tokenizer.json raises a plain one
        raise SystemExit(f'{path}: cannot load its tokenizer ({first_line(e)}); wanted a whole tokenizer.json')
    if not tokenizer.encode('a', add_special_tokens=False):            # what transformers makes where there is no file
        raise SystemExit(f'{path}: its tokenizer is empty; wanted a whole tokenizer.json')
    return tokenizer


def save_pretrained(part, folder):
    """part.save_pretrained of a model, a tokenizer or a processor, with an OSError where the disk is full."""
    try:
        part.save_pretrained(folder)
    except Exception as e:                             # the tokenizers library raises a plain one
        raise OSError(first_line(e)) from e


def load_llm(path, dtype=torch.float32, device='cpu'):
    """A frozen language model whose attention takes unpadded batches; exits with one line where it would not give what
    the stock model gives."""
    load_config(path)                                  # one clear line when nothing is there
    llm = pretrained(AutoModelForCausalLM, path, dtype, attn_implementation='unpadded')
    llm = llm.eval().requires_grad_(False).to(device)
    require_parity(llm, path)
    return llm


def embed_scale(llm):
    """What the embedding layer multiplies its rows by: Gemma's by the root of the width. Image tokens stand beside what
    it gives out; new rows are rows of its matrix."""
    return float(getattr(llm.get_input_embeddings(), 'embed_scale', 1.0))


def embedding_rms(llm):
    """Root mean square of what the embedding layer gives out."""
    return llm.get_input_embeddings().weight.detach().float().square().mean().sqrt().item() * embed_scale(llm)


# -----------------------------------------------------------------------------
# attention over unpadded examples


def unpadded_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None,
                       sliding_window=None, softcap=None, windows=None, **kwargs):
    """Causal attention inside each example of an unpadded batch; with layout = None ordinary SDPA (generation).

    query, key, value: (1, heads, T, head width); key and value may have fewer heads. layout: see data.padded_layout.
    A pad stands after its example's end, so the causal mask alone hides it from every real token. A GPU needs no pads.
    sliding_window: how many tokens a token sees, itself the last. softcap: of Gemma2. windows: a list that notes
    each layer's, for require_parity.
    """
    if layout is None and softcap is not None:
        attended = short_attention(query, key, value, scaling=scaling, dropout=dropout, softcap=softcap,
                                   mask=attention_mask)
        return attended.transpose(1, 2), None
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **kwargs)
    for name in 's_aux', 'position_bias':
        if kwargs.get(name) is not None:
            raise ValueError(f'its attention has {name}, which this one does not know')
    if windows is not None:
        windows.append(sliding_window)

    if has_varlen(value) and not dropout and softcap is None:
        q, k, v = (heads[0].transpose(0, 1).to(value.dtype) for heads in (query, key, value))   # (T, heads, .)
        window = (sliding_window - 1, 0) if sliding_window else (-1, 0)
        attended = varlen_attn(q, k, v, layout.boundaries, layout.boundaries, layout.longest, layout.longest,
                               scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1])
        return attended[None], None                                                             # (1, T, heads, .)

    def padded(tokens, pad_index):
        """(heads, tokens of a group, .) -> (B, heads, L, .)"""
        return tokens.index_select(1, pad_index.view(-1)).unflatten(1, pad_index.shape).transpose(0, 1)

    sizes = [len(unpad_index) for _, unpad_index in layout]
    queries = query[0].split(sizes, dim=1)
    keys = key[0].split(sizes, dim=1)
    values = value[0].split(sizes, dim=1)
    outputs = []
    for n, (pad_index, unpad_index) in enumerate(layout):
        # gather a group's tokens as (B, L), attend, take the real ones back
        q = padded(queries[n], pad_index)
        k = padded(keys[n], pad_index)
        v = padded(values[n], pad_index)
        mask = None                                    # causal
        if sliding_window and sliding_window < v.shape[2]:
            mask = window_mask(v, sliding_window)
        is_short = v.device.type == 'cpu' and v.dtype == torch.bfloat16 and v.shape[2] <= SHORT
        if is_short or softcap is not None:
            attended = short_attention(q, k, v, scaling=scaling, dropout=dropout, softcap=softcap, mask=mask)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling,
                                                      dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
        tokens = attended.transpose(1, 2).flatten(0, 1)                                         # (B * L, heads, .)
        outputs.append(tokens.index_select(0, unpad_index))
    return torch.cat(outputs)[None], None                                                       # (1, T, heads, .)


def has_varlen(value):
    """Is there a kernel for examples of any lengths where this tensor is?"""
    if not value.is_cuda or value.dtype not in (torch.bfloat16, torch.float16) or varlen_attn is None:
        return False
    known = inspect.signature(varlen_attn).parameters  # its first version took neither
    return {'window_size', 'enable_gqa'} <= known.keys() and torch.cuda.get_device_capability(value.device) >= (8, 0)


def window_mask(value, window):
    """(L, L), who sees whom: each token the `window` tokens up to itself. value: (B, heads, L, head width)."""
    causal = torch.ones(value.shape[2], value.shape[2], dtype=torch.bool, device=value.device).tril()
    return causal.triu(1 - window)


SHORT = 256                    # tokens up to which short_attention is the faster


def short_attention(query, key, value, scaling=None, dropout=0.0, softcap=None, mask=None):
    """Attention by its definition, every score kept.

    In bf16 on a CPU torch's kernel, which keeps none, takes 4 to 8 times as long for examples of 64 to 160 tokens.
    query: (B, heads, L, head width); key and value may have fewer heads, each shared by a group of query heads. mask:
    bool, (L, K) or (B, 1, L, K), who sees whom of K keys; None is causal. softcap: no score gets beyond it.
    """
    length = query.shape[2]
    n_keys = key.shape[2]
    group = query.shape[1] // key.shape[1]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query = query.unflatten(1, (-1, group)).flatten(2, 3)                                       # (B, kv, group L, .)
    scores = (query * scaling) @ key.transpose(2, 3)                                            # (B, kv, group L, K)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(length, n_keys, dtype=torch.bool, device=scores.device).tril(n_keys - length)
    # not -inf: a pad at the left sees nobody, and its weights have to be numbers
    unseen = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout((scores + torch.cat(group * [unseen], dim=-2)).softmax(-1), dropout)
    return (weights @ value).unflatten(2, (group, length)).flatten(1, 2)                        # (B, heads, L, .)


AttentionInterface.register('unpadded', unpadded_attention)
AttentionMaskInterface.register('unpadded', sdpa_mask)   # for generation, which pads

# A mask of four dimensions is taken as it is by every decoder; left out, (1, 1, T, T) ones would be built, and the
# layout already says who sees whom
NO_MASK = torch.zeros(1, 1, 1, 1)


# -----------------------------------------------------------------------------
# through the model


def precision_of(llm):
    """bf16 autocast where the frozen weights are bf16: what is trained, in float32, holds the master weights."""
    if llm.dtype == torch.bfloat16:
        return torch.autocast(llm.device.type, torch.bfloat16)
    return nullcontext()


def hidden_states(llm, embeds, batch, **noted):
    """Last hidden states (T, D) of an unpadded batch with these input embeddings, (T, D)."""
    return llm.base_model(inputs_embeds=embeds[None], position_ids=batch.position_ids[None], attention_mask=NO_MASK,
                          use_cache=False, layout=batch.layout, **noted).last_hidden_state[0]


def checkpoint_layers(llm):
    """From here on a layer keeps its input for the backward pass, and there computes the rest of what it needs again:
    the same numbers, masks of dropout included, in less memory and more time."""
    for layer in llm.base_model.layers:
        layer.forward = partial(computed_again, layer.forward)


def computed_again(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def final_logits(llm, logits):
    """What stands between a head and the probabilities: a factor in Cohere and Granite, a cap in Gemma."""
    config = llm.config
    if getattr(config, 'logit_scale', None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, 'logits_scaling', None) is not None:
        logits = logits / config.logits_scaling
    cap = getattr(config, 'final_logit_softcapping', None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def text_logits(llm, hidden):
    """(M, D) -> (M, V)"""
    return final_logits(llm, llm.get_output_embeddings()(hidden))


LOGITS_AT_ONCE = 2 ** 25                               # 128 MB in float32


def label_losses(hidden, head, labels, n_ids, head_learns=True, at_once=LOGITS_AT_ONCE):
    """Cross entropy of each label, (M,), in nats. hidden: (M, D), the states that predict them and no others; head:
    (M, D) -> (M, n_ids), logits.

    There are never more than about at_once logits, however many the labels. Under a head that does not learn a chunk's
    gradient is made with its loss, and it alone is kept; else a chunk is computed again in the backward pass.
    """
    chunk = max(1, at_once // n_ids)                   # labels
    if len(labels) <= chunk:
        return losses_of(hidden, head, labels)
    if torch.is_grad_enabled() and not head_learns:
        return ChunkedLosses.apply(hidden, head, labels, chunk)
    losses = []
    for hidden_chunk, label_chunk in zip(hidden.split(chunk), labels.split(chunk)):
        losses.append(checkpoint(losses_of, hidden_chunk, head, label_chunk, use_reentrant=False))
    return torch.cat(losses)


def text_losses(llm, hidden, labels):
    """label_losses over the text rows, which never learn."""
    n_rows = llm.get_output_embeddings().weight.shape[0]
    return label_losses(hidden, partial(text_logits, llm), labels, n_rows, head_learns=False)


def losses_of(hidden, head, labels):
    logits = head(hidden).float()                      # bf16 has 8 bits: too few for a sum over V ids
    return F.cross_entropy(logits, labels, reduction='none')


class ChunkedLosses(torch.autograd.Function):
    """losses_of, a chunk of labels at a time, under a head that does not learn."""
    @staticmethod
    def forward(ctx, hidden, head, labels, chunk):
        losses = []
        gradients = []
        for hidden_chunk, label_chunk in zip(hidden.split(chunk), labels.split(chunk)):
            with torch.enable_grad():
                hidden_chunk = hidden_chunk.detach().requires_grad_()
                of_chunk = losses_of(hidden_chunk, head, label_chunk)
                # a label's loss depends on its own state only: the gradient of the sum has that of each
                gradients += torch.autograd.grad(of_chunk.sum(), hidden_chunk)
            losses.append(of_chunk.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, of_losses):
        gradients, = ctx.saved_tensors                                                          # (M, D)
        return (gradients * of_losses[:, None]).to(gradients.dtype), None, None, None


def tuned_parts(llm):
    """{full name: module} of what full_tune trains: the layers and the last norm, whatever they are called; not what
    ids are looked up in, and not the head."""
    body = getattr(llm.base_model, 'decoder', llm.base_model)          # OPT's is a part of its body
    prefix = next(name for name, module in llm.named_modules() if module is body)
    parts = {}
    for name, part in body.named_children():
        if not isinstance(part, nn.Embedding) and any(True for _ in part.parameters()):
            parts[f'{prefix}.{name}'] = part
    return parts


def layer_matrices(llm):
    """A regular expression over the full names of all matrices inside the decoder's layers, for PEFT."""
    names = [name for name, module in llm.named_modules() if isinstance(module, nn.Linear)]
    kinds = {re.sub(r'\.\d+\.', '.#.', name) for name in names if re.search(r'\.\d+\.', name)}
    if not kinds:                                      # GPT-2 has layers of its own making
        raise SystemExit(f'a {llm.config.model_type} has no linear layers to put LoRA on: take another language model, '
                         'or name lora_targets')
    return '|'.join(re.escape(kind).replace(r'\#', r'\d+') for kind in sorted(kinds))


def lora(llm, r, alpha, dropout, targets):
    """Put trainable LoRA matrices into the language model, in place. Returns PEFT's wrapper, which saves and merges.

    targets: names of modules, or a regular expression over full names, '' for layer_matrices; exits with one line when
    it finds none.
    """
    from peft import LoraConfig, get_peft_model        # slow to import, and only A2 and B4 need it
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets or layer_matrices(llm),
                        task_type='CAUSAL_LM')
    try:
        adapter = get_peft_model(llm, config)
    except (ValueError, re.error) as e:
        raise SystemExit(f'lora_targets = {targets!r}: {e}')
    for module in adapter.modules():
        if isinstance(module, BaseTunerLayer):         # else every input goes to float32, and autocast brings it back
            module.cast_input_dtype_enabled = False
    return adapter


def with_lora(llm, settings, state):
    """The LoRA of a run, put into a language model in its place. settings: the run's; state: its tensors by PEFT's
    names. Returns PEFT's wrapper."""
    from peft import set_peft_model_state_dict
    adapter = lora(llm, settings['lora_r'], settings['lora_alpha'], settings['lora_dropout'], settings['lora_targets'])
    set_peft_model_state_dict(adapter, state)
    return adapter


# -----------------------------------------------------------------------------
# generation from embeddings


def pick(logits, temperature, top_p, generators, top_k=0):
    """The next id of each of B examples, (B,), from logits (B, V).

    temperature 0 is greedy; generators: one for each example, so that it draws the same whoever else is in the batch;
    top_k: draw among the k likeliest ids, 0 for among all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    is_cut = bool(top_k) or top_p < 1
    if is_cut:                                         # the likeliest first
        logits, order = logits.sort(dim=-1, descending=True, stable=True)                       # (B, V) each
    if top_k:
        logits = logits[:, :top_k]
    probabilities = torch.softmax(logits, dim=-1)
    if top_p < 1:
        of_likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(of_likelier >= top_p, 0)   # keeps the smallest set that reaches top_p
    # the first id up to which the probabilities add up to more than a drawn number; those of 0 add nothing
    cumulative = probabilities.double().cumsum(-1)                                              # (B, V)
    draws = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    threshold = torch.stack(draws).to(cumulative.device) * cumulative[:, -1:]                   # (B, 1)
    drawn = torch.searchsorted(cumulative, threshold, right=True)                               # (B, 1)
    drawn = drawn.clamp(max=cumulative.shape[1] - 1)   # rounded up, a threshold can be all of it
    return (order.gather(1, drawn) if is_cut else drawn)[:, 0]


def seeded_generators(seeds, n):
    """n torch generators; with seeds = None those of seeds 0, 1, ..."""
    return [torch.Generator().manual_seed(seed) for seed in (range(n) if seeds is None else seeds)]


class GrowingLayer(DynamicLayer):
    """A layer's keys and values, (B, heads, tokens, .), with room for more: a new token is written behind the others,
    and they are copied once in ROOM tokens, not for each."""
    ROOM = 64

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = [states[:, :, :0] for states in (key_states, value_states)]
        first = self.get_seq_length()
        end = first + key_states.shape[2]
        for n, states in enumerate((key_states, value_states)):
            room = self.rooms[n]
            if room.shape[2] < end:
                self.rooms[n] = states.new_empty(*states.shape[:2], end + self.ROOM, states.shape[3])
                self.rooms[n][:, :, :first] = room[:, :, :first]
            self.rooms[n][:, :, first:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.rooms)
        return self.keys, self.values


class Continuation:
    """Prompts of any lengths, [(T_i, D)] embeddings, that go on together, one token at a time, from a cache.

    They are padded on the left, so that every next token has the same index; the mask hides the pads, and positions
    count from each prompt's own start.
    """
    def __init__(self, llm, prompts):
        self.llm = llm
        self.cache = DynamicCache(config=llm.config)
        self.cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.cache.layers]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
        longest = max(len(prompt) for prompt in prompts)
        padded = [F.pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts]
        self.embeds = torch.stack(padded)                                                       # (B, L, D)
        columns = torch.arange(longest, device=lengths.device)
        self.mask = (columns >= longest - lengths[:, None]).long()                              # (B, L)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)                                # (B, L)

    def hidden(self):
        """The state that the next token is predicted from, (B, D)."""
        body = self.llm.base_model
        # its name changed between transformers 5.20 and 5.24
        name = 'cache' if 'cache' in inspect.signature(body.forward).parameters else 'past_key_values'
        return body(inputs_embeds=self.embeds, attention_mask=self.mask, position_ids=self.positions, use_cache=True,
                    **{name: self.cache}).last_hidden_state[:, -1]

    def append(self, embeds):
        """Go on with these tokens, (B, D)."""
        self.embeds = embeds[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(embeds), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1


@torch.no_grad()
def generate(llm, prompts, max_new_tokens, stop_ids, temperature=0.0, top_p=1.0, seeds=None):
    """Continue prompts given as embeddings, [(T_i, D)]. Returns lists of ids, without the stop id.

    What a prompt is continued with does not depend on the others. seeds: one for each prompt, when sampling.
    """
    generators = seeded_generators(seeds, len(prompts))
    continuation = Continuation(llm, prompts)
    outputs = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = text_logits(llm, continuation.hidden())                                            # (B, V)
        ids = pick(logits, temperature, top_p=top_p, generators=generators)                     # (B,)
        for n, token in enumerate(ids.tolist()):
            if n not in unfinished:                    # its row of the batch runs on to the end, unused
                continue
            if token in stop_ids:
                unfinished.remove(n)
            else:
                outputs[n].append(token)
        if not unfinished:
            break
        continuation.append(llm.get_input_embeddings()(ids))
    return outputs


# -----------------------------------------------------------------------------
# the check: what is done here is what the stock model does

LENGTHS = 5, 9                                         # tokens of two examples
N_NEW = 4                                              # tokens that each goes on with


@torch.no_grad()
def parity(llm):
    """How far this is from the stock model: {'logits': the largest difference, 'loss': that of an example's mean in
    nats per label, 'greedy': how far a greedy id of ours lies below the stock model's likeliest one, in logits}.

    Ours: two examples in one unpadded batch, and their greedy continuation in one padded one, from embeddings. Stock:
    its own forward of each alone, from ids, with the attention that its authors wrote down.
    """
    generator = torch.Generator().manual_seed(0)       # its own: what is drawn after loading stays the same
    embed = llm.get_input_embeddings()
    examples = [torch.randint(embed.weight.shape[0], (n,), generator=generator).to(llm.device) for n in LENGTHS]
    with precision_of(llm):
        new = torch.tensor(generate(llm, [embed(example) for example in examples], N_NEW, stop_ids=[])).to(llm.device)
        examples = [torch.cat([example, ids]) for example, ids in zip(examples, new)]
        lengths = [len(example) for example in examples]
        positions = torch.cat([torch.arange(n, device=llm.device) for n in lengths])
        batch = SimpleNamespace(position_ids=positions, layout=padded_layout(lengths).to(llm.device))
        windows = []
        hidden = hidden_states(llm, embed(torch.cat(examples)), batch, windows=windows)         # (T, D)
        ours = text_logits(llm, hidden).float().split(lengths)                                  # (tokens, V) each
    require_all_layers(llm, windows)
    llm.set_attn_implementation('eager')
    try:
        stock = [llm(input_ids=example[None], use_cache=False).logits[0].float() for example in examples]
    finally:
        llm.set_attn_implementation('unpadded')
    found = {'logits': [], 'loss': [], 'greedy': []}
    for example, our, true, ids in zip(examples, ours, stock, new):
        found['logits'].append((our - true).abs().max().item())
        labels = example[1:]
        found['loss'].append(abs(F.cross_entropy(our[:-1], labels) - F.cross_entropy(true[:-1], labels)).item())
        before = true[-N_NEW - 1:-1]                   # what the new ids were predicted by
        found['greedy'].append((before.max(-1).values - before.gather(1, ids[:, None])[:, 0]).max().item())
    return {name: max(values) for name, values in found.items()}


def require_all_layers(llm, windows):
    """ValueError unless every layer attends through unpadded_attention and gives its window. windows: those noted."""
    config = llm.config
    kinds = getattr(config, 'layer_types', None) or []
    unknown = sorted(set(kinds) - {'full_attention', 'sliding_attention'})
    if unknown:
        raise ValueError(f'it has layers of {", ".join(unknown)}')
    if len(windows) != config.num_hidden_layers:
        raise ValueError(f'{len(windows)} of its {config.num_hidden_layers} layers attend by a layout: in the others '
                         'the examples of a batch would see each other')
    n_sliding = kinds.count('sliding_attention')
    n_noted = len(windows) - windows.count(None)
    if n_noted < n_sliding:
        raise ValueError(f'{n_sliding} of its layers have a sliding window, {n_noted} of them give it')


def require_parity(llm, where):
    """Exit with one line unless what is done here with this model is what its stock forward does.

    Cheap enough for every start, and the same on every rank: seven passes of at most 26 tokens.
    """
    kind = llm.config.model_type
    try:
        found = parity(llm)
    except Exception as e:                             # what a model cannot take raises all kinds
        raise SystemExit(f'{where}: a {kind} cannot be trained here: {first_line(e)}; take another language model')
    bar = 1e-3 if llm.dtype == torch.float32 else 0.2  # bf16 has 8 bits; what is wrong is wrong by whole nats
    if not max(found['loss'], found['greedy']) <= bar:   # NaN too
        raise SystemExit(f'{where}: a {kind} comes out otherwise here than in transformers: the loss of an example by '
                         f'{found["loss"]:.2g} nats per label, a greedy id by {found["greedy"]:.2g} in its logit, '
                         f'allowed {bar:g}; take another language model')
