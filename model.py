"""
The model: a frozen vision tower, a trainable connector, a Qwen3 that is frozen or has LoRA, and the loss at label
positions. What a trained one does is in inference.py.

Letters: B examples, P patches, N image tokens, T tokens of all examples together, L tokens of the longest example,
M labels, D width of the language model, Dv of the tower, Dr of the resampler, V text rows.

Batches are not padded: a batch is one sequence of T tokens, its examples end to end, and positions start anew in each.
Only attention has to keep the examples apart; there, and only there, they are laid out as (B, L).
"""
import hashlib
import inspect
import json
import math
import os
import signal
import warnings
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file, logging

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:                                    # torch before 2.10
    varlen_attn = None

from common import (
    all_gather, barrier, first_line, in_parts, progress, read_sealed, sha256_file, sha256_tensors, write_sealed)
from examples import picture_keys, remember_pictures
from media import BadSample

# -----------------------------------------------------------------------------
# loading what stays frozen

logging.disable_progress_bar()
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


def load_llm(path, dtype=torch.float32):
    """A frozen Qwen3 language model whose attention takes unpadded batches."""
    config = load_config(path)
    if config.model_type != 'qwen3':
        raise SystemExit(f'{path}: model_type is {config.model_type!r}, wanted qwen3')
    llm = pretrained(AutoModelForCausalLM, path, dtype, attn_implementation='unpadded')
    return llm.eval().requires_grad_(False)


class Tower(nn.Module):
    """A frozen SigLIP or fixed-resolution SigLIP2 vision tower: uint8 pixels in, patch features out; no class token.

    layer: -1 is last_hidden_state, after the tower's final norm; -2 is the input of the last block, and so on down.
    Blocks above the chosen layer and the pooling head are not kept.
    """
    def __init__(self, model, layer=-1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
        super().__init__()
        config = model.config
        depth = config.num_hidden_layers
        if not -depth <= layer <= -1:
            raise SystemExit(f'tower_layer = {layer}: this tower has {depth} layers, wanted -{depth} to -1')
        self.layer = layer
        self.width = config.hidden_size                # Dv
        self.image_size = config.image_size            # pixels
        self.side = config.image_size // config.patch_size   # patches; P = side ** 2
        self.embeddings = model.embeddings
        self.blocks = model.encoder.layers[:depth + 1 + layer]
        self.norm = model.post_layernorm if layer == -1 else nn.Identity()
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels):
        """uint8 (B, 3, H, W) -> (B, P, Dv)."""
        hidden = self.embeddings((pixels.float() - self.mean) / self.std)                       # (B, P, Dv)
        for block in self.blocks:
            hidden = block(hidden, attention_mask=None)
        return self.norm(hidden)


def image_settings(path):
    """How the tower's processor prepares an image: {'size', 'resample', 'mean', 'std'}.

    Exits with one line when the tower comes without a processor, or with one that does something else than read_image
    and Tower do.
    """
    config = load_config(path)
    side = getattr(config, 'vision_config', config).image_size
    file, stored = read_processor(path)
    size = stored.get('size', side)
    sides = size.values() if isinstance(size, dict) else [size]        # {'height', 'width'} or {'shortest_edge'}
    if any(n != side for n in sides):
        raise SystemExit(f'{file}: size is {size}, but the tower takes {side} x {side} pixels; restore its processor')
    if False in (stored.get('do_resize'), stored.get('do_rescale'), stored.get('do_normalize')):
        raise SystemExit(f'{file}: wanted a processor that resizes, rescales and normalises')
    wanted = {'image_mean': 3, 'image_std': 3, 'resample': 1}          # numbers
    for name, n in wanted.items():
        values = stored.get(name)
        numbers = values if isinstance(values, list) else [values]
        if len(numbers) != n or any(type(x) not in (int, float) for x in numbers):
            raise SystemExit(f'{file}: {name} is {values!r}, wanted {n} number(s); restore the processor')
    return {'size': side, 'resample': stored['resample'], 'mean': stored['image_mean'], 'std': stored['image_std']}


def read_processor(path):
    """(file, the settings of an image processor in it), from where transformers looks: inside processor_config.json,
    which version 5 writes, else in preprocessor_config.json."""
    reasons = []
    for name in 'processor_config.json', 'preprocessor_config.json':
        if Path(path).is_dir() and not Path(path, name).exists():
            reasons.append(f'{name} is not there')
            continue
        try:
            file = cached_file(path, name)
        except Exception as e:                         # the hub has none, or it cannot be reached: its words say which
            reasons.append(f'{name}: {first_line(e)}')
            continue
        try:
            stored = json.loads(Path(file).read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            raise SystemExit(f'{file}: not valid JSON ({e}); restore it')
        if name == 'processor_config.json' and isinstance(stored, dict):
            stored = stored.get('image_processor')
            if stored is None:                         # of an older version: it is about texts
                reasons.append(f'{name} has no "image_processor"')
                continue
        if not isinstance(stored, dict):
            raise SystemExit(f'{file}: found {type(stored).__name__}, wanted a JSON object; restore it')
        return file, stored
    raise SystemExit(f'{path}: cannot read how its images are prepared ({"; ".join(reasons)}); wanted one of the two')


def load_tower(path, layer=-1, dtype=torch.float32):
    """The vision tower of a SigLIP checkpoint, whole (with its text tower) or vision only."""
    config = load_config(path)
    if config.model_type not in ('siglip', 'siglip_vision_model'):
        raise SystemExit(f'{path}: model_type is {config.model_type!r}, wanted siglip '
                         '(fixed resolution; NaFlex is not supported)')
    model = pretrained(SiglipVisionModel, path, dtype, ignore=('text_model.', 'logit_'),
                       config=getattr(config, 'vision_config', config))
    settings = image_settings(path)
    return Tower(model, layer, mean=settings['mean'], std=settings['std'])


# -----------------------------------------------------------------------------
# the connector


class ResamplerBlock(nn.Module):
    """The latents attend to the patches and to each other, then an MLP. Both sides are normed first."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_latents = nn.LayerNorm(width)
        self.norm_patches = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents, patches):
        """(B, N, Dr), (B, P, Dr) -> (B, N, Dr)."""
        def split_heads(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                            # (B, heads, ., width)

        normed = self.norm_latents(latents)
        sources = torch.cat([self.norm_patches(patches), normed], dim=1)                        # (B, P + N, Dr)
        key, value = self.key_value(sources).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            split_heads(self.query(normed)), split_heads(key), split_heads(value))
        latents = latents + self.out(attended.transpose(1, 2).flatten(2))                       # (B, N, Dr)
        return latents + self.mlp(self.norm_mlp(latents))


def grid_positions(side, width):
    """Fixed sine and cosine features of each patch's row and column, (side * side, width), unit variance."""
    frequency = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency                                             # (side, width / 4)
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=1)                                     # (side, width / 2)
    rows = one_axis[:, None].expand(-1, side, -1)
    columns = one_axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1) * 2 ** 0.5


class Connector(nn.Module):
    """Patch features (B, P, Dv) -> image tokens (B, N, D): a Perceiver resampler, then an MLP into the LLM's width.

    embed_rms: root mean square of the LLM's embeddings; image tokens start at that size.
    """
    def __init__(self, patch_width, side, llm_width, num_image_tokens=64, width=512, depth=2, heads=8, vision_ln=False,
                 embed_rms=0.03):
        super().__init__()
        self.vision_ln = nn.LayerNorm(patch_width) if vision_ln else nn.Identity()
        self.enter = nn.Linear(patch_width, width)
        self.register_buffer('positions', grid_positions(side, width), persistent=False)        # (P, Dr)
        self.latents = nn.Parameter(torch.randn(num_image_tokens, width) * 0.5)                 # (N, Dr)
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        inner = 4 * llm_width
        self.projector = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, llm_width))
        # norm gives unit variance, and this weight keeps it; of such z, E[gelu(z)^2] = 0.425
        nn.init.normal_(self.projector[0].weight, std=width ** -0.5)
        nn.init.normal_(self.projector[2].weight, std=embed_rms * (0.425 * inner) ** -0.5)
        nn.init.zeros_(self.projector[2].bias)

    def forward(self, patches):
        patches = self.enter(self.vision_ln(patches)) + self.positions                          # (B, P, Dr)
        latents = self.latents.expand(len(patches), -1, -1)                                     # (B, N, Dr)
        for block in self.blocks:
            latents = block(latents, patches)
        return self.projector(self.norm(latents))                                               # (B, N, D)


# -----------------------------------------------------------------------------
# attention over unpadded examples


def unpadded_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **kwargs):
    """Causal attention inside each example of an unpadded batch; with layout = None ordinary SDPA (generation).

    query, key, value: (1, heads, T, head width); key and value may have fewer heads. layout: see data.padded_layout.
    A pad stands after its example's end, so the causal mask alone hides it from every real token. A GPU needs no pads.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **kwargs)

    if has_varlen(value) and not dropout:
        q, k, v = (heads[0].transpose(0, 1).to(value.dtype) for heads in (query, key, value))   # (T, heads, .)
        attended = varlen_attn(q, k, v, layout.boundaries, layout.boundaries, layout.longest, layout.longest,
                               scale=scaling, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
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
        if v.device.type == 'cpu' and v.dtype == torch.bfloat16 and v.shape[2] <= SHORT:
            attended = short_attention(q, k, v, scaling=scaling, dropout=dropout)               # (B, heads, L, .)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                                      enable_gqa=q.shape[1] != k.shape[1])
        tokens = attended.transpose(1, 2).flatten(0, 1)                                         # (B * L, heads, .)
        outputs.append(tokens.index_select(0, unpad_index))
    return torch.cat(outputs)[None], None                                                       # (1, T, heads, .)


def has_varlen(value):
    """Is there a kernel for examples of any lengths where this tensor is?"""
    if not value.is_cuda or value.dtype not in (torch.bfloat16, torch.float16) or varlen_attn is None:
        return False
    known = inspect.signature(varlen_attn).parameters  # its first version took neither
    return {'window_size', 'enable_gqa'} <= known.keys() and torch.cuda.get_device_capability(value.device) >= (8, 0)


SHORT = 256                    # tokens up to which short_attention is the faster


def short_attention(query, key, value, scaling=None, dropout=0.0):
    """Causal attention by its definition, every score kept.

    In bf16 on a CPU torch's kernel, which keeps none, takes 4 to 8 times as long for examples of 64 to 160 tokens.
    query: (B, heads, L, head width); key and value may have fewer heads, each shared by a group of query heads.
    """
    length = query.shape[2]
    group = query.shape[1] // key.shape[1]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query = query.unflatten(1, (-1, group)).flatten(2, 3)                                       # (B, kv, group L, .)
    scores = (query * scaling) @ key.transpose(2, 3)                                            # (B, kv, group L, L)
    future = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1)               # (L, L)
    weights = F.dropout((scores + future.repeat(group, 1)).softmax(-1), dropout)
    return (weights @ value).unflatten(2, (group, length)).flatten(1, 2)                        # (B, heads, L, .)


AttentionInterface.register('unpadded', unpadded_attention)
AttentionMaskInterface.register('unpadded', sdpa_mask)   # for generation, which pads

# Given as a dict, transformers takes masks as they are; left out, it would build (1, 1, T, T) ones, and the layout
# already says who sees whom. The second key is for the layers of models with a sliding window.
NO_MASKS = {'full_attention': None, 'sliding_attention': None}


# -----------------------------------------------------------------------------
# the grafted model


def precision_of(llm):
    """bf16 autocast where the frozen weights are bf16: what is trained, in float32, holds the master weights."""
    if llm.dtype == torch.bfloat16:
        return torch.autocast(llm.device.type, torch.bfloat16)
    return nullcontext()


def hidden_states(llm, embeds, batch):
    """Last hidden states (T, D) of an unpadded batch with these input embeddings, (T, D)."""
    return llm.model(inputs_embeds=embeds[None], position_ids=batch.position_ids[None], attention_mask=NO_MASKS,
                     use_cache=False, layout=batch.layout).last_hidden_state[0]


def checkpoint_layers(llm):
    """From here on a layer keeps its input for the backward pass, and there computes the rest of what it needs again:
    the same numbers, masks of dropout included, in less memory and more time."""
    for layer in llm.model.layers:
        layer.forward = partial(computed_again, layer.forward)


def computed_again(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def label_losses(hidden, head, labels, chunk=2048):
    """Cross entropy of each label, (M,), in nats. hidden: (M, D), the states that predict them and no others.

    Logits exist for `chunk` labels at a time; with more labels they are computed again in the backward pass.
    """
    def losses_of(hidden, labels):
        logits = head(hidden).float()                  # bf16 has 8 bits: too few for a sum over V ids
        return F.cross_entropy(logits, labels, reduction='none')

    if len(labels) <= chunk:
        return losses_of(hidden, labels)
    losses = []
    for hidden_chunk, label_chunk in zip(hidden.split(chunk), labels.split(chunk)):
        losses.append(checkpoint(losses_of, hidden_chunk, label_chunk, use_reentrant=False))
    return torch.cat(losses)


class VLM(nn.Module):
    """Tower (None when features come from a cache), connector and language model. forward(batch): summed loss, nats."""
    def __init__(self, tower, connector, llm):
        super().__init__()
        assert llm.config._attn_implementation == 'unpadded', 'another attention would look across examples'
        self.tower = tower
        self.connector = connector
        self.llm = llm

    def precision(self):
        return precision_of(self.llm)

    def train(self, mode=True):
        """Frozen parts stay in eval mode: only a part with something to learn follows."""
        self.training = mode
        for part in self.tower, self.connector, self.llm:
            if part is not None:                       # no tower with a feature cache, neither with text alone
                part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def image_tokens(self, images):
        """uint8 pixels (images, 3, H, W) or patch features (images, P, Dv) -> (images, N, D)."""
        with self.precision():
            patches = self.tower(images) if images.ndim == 4 else images                        # (images, P, Dv)
            # a cache holds fp16
            return self.connector(patches.to(self.connector.enter.weight.dtype))

    def embed(self, input_ids, image_positions=None, image_tokens=None):
        """Embeddings (T, D) of ids (T,), image tokens (images, N, D) written over the positions (images * N,). No host
        sync."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        if image_positions is None or len(image_positions) == 0:
            return embeds
        return embeds.index_copy(0, image_positions, image_tokens.flatten(0, 1).to(embeds.dtype))

    def embed_prompt(self, ids, image_starts, image_tokens=None):
        """Embeddings (T, D) of one prompt. image_tokens: (images, N, D), from each of image_starts on, or None."""
        device = self.llm.device
        ids = torch.as_tensor(ids, dtype=torch.long, device=device)
        if image_tokens is None:
            return self.embed(ids)
        starts = torch.as_tensor(image_starts, dtype=torch.long, device=device)
        positions = starts[:, None] + torch.arange(image_tokens.shape[1], device=device)
        return self.embed(ids, positions.flatten(), image_tokens)

    def nll(self, batch, image_tokens=None):
        """Loss of every label, (M,), in nats. image_tokens: (images, N, D), others than those of the batch's own
        images."""
        if image_tokens is None and batch.images is not None:
            image_tokens = self.image_tokens(batch.images)
        embeds = self.embed(batch.input_ids, batch.image_positions, image_tokens)               # (T, D)
        with self.precision():
            hidden = hidden_states(self.llm, embeds, batch)                                     # (T, D)
            hidden = hidden.index_select(0, batch.logit_positions)                              # (M, D)
            return label_losses(hidden, self.llm.lm_head, batch.labels)

    def forward(self, batch):
        return self.nll(batch).sum()


def load_vlm(llm, vision, shape, tower_layer=-1, dtype=torch.float32, device='cpu'):
    """A VLM with both base models frozen and a fresh connector in float32. Seed before calling.

    shape: {'num_image_tokens', 'width', 'depth', 'heads', 'vision_ln'} of the Connector.
    """
    llm = load_llm(llm, dtype)
    tower = load_tower(vision, tower_layer, dtype)
    rms = llm.get_input_embeddings().weight.detach().float().square().mean().sqrt().item()
    connector = Connector(tower.width, tower.side, llm.config.hidden_size, embed_rms=rms, **shape)
    return VLM(tower, connector, llm).to(device)


def lora(llm, r, alpha, dropout, targets):
    """Put trainable LoRA matrices into the language model, in place. Returns PEFT's wrapper, which saves and merges.

    targets: names of modules, or a regular expression over full names; exits with one line when it finds none.
    """
    from peft import LoraConfig, get_peft_model        # slow to import, and only A2 and B4 need it
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type='CAUSAL_LM')
    try:
        adapter = get_peft_model(llm, config)
    except ValueError as e:
        raise SystemExit(f'lora_targets = {targets!r}: {e}')
    for module in adapter.modules():
        if isinstance(module, BaseTunerLayer):         # else every input goes to float32, and autocast brings it back
            module.cast_input_dtype_enabled = False
    return adapter


# -----------------------------------------------------------------------------
# the tower's features, each image once


PART = 1024                                            # pictures in a file: what a kill can cost


class Features(Mapping):
    """{path: fp16 (P, Dv)} of cached features, memory-mapped."""
    def __init__(self, tables, places):
        self.tables = tables                           # [(pictures, P, Dv)]
        self.places = places                           # {path: PART * its table + its row}

    def __getitem__(self, path):
        table, row = divmod(self.places[path], PART)
        return self.tables[table][row]

    def __iter__(self):
        return iter(self.places)

    def __len__(self):
        return len(self.places)


@torch.no_grad()
def cache_features(folder, tower, paths, read, device, batch_size=64, max_gb=math.inf, rank=0, world_size=1):
    """Features of image files; unreadable images are left out. None, in words, when they would be larger than max_gb.

    A picture is known by its bytes, features by those, the tower's weights, its layer and the preprocessing: only what
    is new is computed, a part by each rank. Processes that want the same part wait for each other; a finished one is
    only read. A signal ends the run at once: finished parts stay. read: a partial of read_image.
    """
    with ended_by_signals('the features of the tower were not finished'):
        paths = sorted(map(str, set(paths)))
        picture_bytes = 2 * tower.side ** 2 * tower.width
        n_bytes = picture_bytes * len(paths)
        if n_bytes > 1e9 * max_gb:
            if rank == 0:
                print(f'{folder}: the features of {len(paths):,} pictures would take {n_bytes / 1e9:,.3g} GB, more '
                      f'than feature_cache_gb = {max_gb:g}: none are kept, the tower runs every step')
            return None
        keys, new_stamps = picture_keys(paths, folder, rank=rank, world_size=world_size)
        hexes = [key.tobytes().hex() if key.any() else None for key in keys]
        pictures = {key: path for key, path in zip(hexes, paths) if key}       # each once
        name = f'features-{tower_key(tower, read)}'
        # at first each rank makes its parts; on machines with disks of their own those of the others are still missing
        for share in slice(rank, None, world_size), slice(None):
            missing = sorted(pictures.keys() - known_features(folder, name).keys())
            if not max(all_gather(len(missing))):      # and so nobody writes while another one still looks
                break
            if rank == 0:
                print(f'{folder}: features of {len(missing):,} of {len(pictures):,} pictures are not there yet, '
                      f'{picture_bytes * len(missing) / 1e9:,.3g} GB', flush=True)
            for part in in_parts(missing, PART)[share]:
                make_part(folder, name, tower, {key: pictures[key] for key in part}, read=read, device=device,
                          batch_size=batch_size)
            barrier()
        if new_stamps is not None and pictures:
            remember_pictures(paths, folder, new_stamps, keys)
        return open_features(folder, name, dict(zip(paths, hexes)))


def tower_key(tower, read):
    """Over what decides features besides the picture: the tower's weights, its layer, the preprocessing."""
    weights = sha256_tensors([*tower.state_dict().items(), ('mean', tower.mean), ('std', tower.std)])
    # the keywords: size and resample
    return hashlib.sha256(f'{weights} {tower.layer} {getattr(read, "keywords", None)}'.encode()).hexdigest()[:16]


def known_features(folder, name):
    """{sha256 of a picture: (the file of its features, its row, -1 for a picture that cannot be decoded)}."""
    known = {}
    for seal in sorted(Path(folder).glob(f'{name}-*.json')):
        file = seal.with_suffix('.npy')
        if file.exists():
            sealed = read_sealed(seal, 'stage A1 or A2')
            require_features(file, sealed)
            broken = set(sealed['broken'])
            for row, key in enumerate(sealed['pictures']):
                known[key] = (file, -1 if row in broken else row)
    return known


def require_features(file, sealed):
    """Exit with one line when a file is not the one that was sealed. Its bytes are read only when its size or time is
    another one: a cache may be larger than what a start should read."""
    if [file.stat().st_size, file.stat().st_mtime_ns] == sealed.get('stamp'):
        return
    if sealed.get('features_sha256') != sha256_file(file):
        raise SystemExit(f'{file}: its sha256 is not that in {file.with_suffix(".json").name}; remove both, a run '
                         'makes them anew')


def open_features(folder, name, key_of):
    """Features of the paths, {path: sha256 of the picture}, that have any."""
    known = known_features(folder, name)
    files = sorted({known[key][0] for key in key_of.values() if key in known})
    first_place = {file: PART * n for n, file in enumerate(files)}
    places = {}
    for path, key in key_of.items():
        file, row = known.get(key, (None, -1))
        if row >= 0:
            places[path] = first_place[file] + row
    return Features([np.load(file, mmap_mode='r') for file in files], places)


def make_part(folder, name, tower, pictures, read, device, batch_size):
    """The features of some pictures, {sha256: path}, in a file of their own, unless another process has made it."""
    part = hashlib.sha256(''.join(pictures).encode()).hexdigest()[:12]
    file = Path(folder) / f'{name}-{part}.npy'
    seal = file.with_suffix('.json')                   # written last: where both are, the features are whole
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{file}.lock'):
            if not (seal.exists() and file.exists()):
                write_features(file, tower, pictures, read=read, device=device, batch_size=batch_size)
    except OSError as e:
        raise SystemExit(f'{file}: cannot write the features of the tower here ({e.strerror or e}); set '
                         "feature_cache to another folder, or to ''")


def write_features(file, tower, pictures, read, device, batch_size):
    """The file of make_part, and beside it, sealed, what is in it: the pictures in the order of the rows, the rows of
    those that cannot be decoded."""
    file.unlink(missing_ok=True)                       # one without a seal takes the place of the new one
    beside = file.with_name(f'.{file.name}')           # we hold its lock: what a kill has left there is ours
    paths = list(pictures.values())
    shape = (len(paths), tower.side ** 2, tower.width)
    broken = []
    try:
        with open(beside, 'wb') as f:
            np.lib.format.write_array_header_1_0(f, {'descr': '<f2', 'fortran_order': False, 'shape': shape})
            # a disk that is too small is met here, and not in the middle
            os.posix_fallocate(f.fileno(), f.tell(), 2 * math.prod(shape))
            for part in progress(in_parts(range(len(paths)), batch_size), 'tower features'):
                features, unreadable = features_of(part, tower, paths, read=read, device=device)
                broken += unreadable
                f.write(features)                      # not through a memory map: it ends in SIGBUS on a full disk
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)
    stamp = [file.stat().st_size, file.stat().st_mtime_ns]
    write_sealed(file.with_suffix('.json'), {'broken': broken, 'features_sha256': sha256_file(file), 'stamp': stamp,
                                             'pictures': list(pictures)})


def features_of(part, tower, paths, read, device):
    """(fp16 (B, P, Dv) of the images of these indices, zeros for those that cannot be read; the indices of those)."""
    features = np.zeros((len(part), tower.side ** 2, tower.width), np.float16)
    pixels = {}
    for n, k in enumerate(part):
        try:
            pixels[n] = read(paths[k])
        except BadSample:
            pass
    if pixels:
        batch = torch.from_numpy(np.stack(list(pixels.values()))).to(device)
        features[list(pixels)] = tower(batch).to(torch.float16).cpu().numpy()
    return features, [k for n, k in enumerate(part) if n not in pixels]


@contextmanager
def ended_by_signals(words):
    """SIGTERM and Ctrl-C end the run in this block with one line, whatever noted them before."""
    def leave(number, frame):
        raise SystemExit(f'{signal.Signals(number).name} stopped this run: {words}')

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
