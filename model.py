"""
The model: a frozen tower, a trainable connector, a frozen or LoRA-tuned Qwen3, the loss on label rows, generation.

Letters: B rows, P patches, N image tokens, T tokens of all rows together, L tokens of the longest row, M labels,
D LLM width, V text rows.

Rows are never padded: a batch is one sequence of T tokens, every row after the other, with positions counted anew in
each row. Only attention needs rows apart; there, and only there, they are laid out as (B, L).
"""
import hashlib
import json
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipVisionModel)
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import cached_file, logging

from common import all_gather, all_sum, frozen_dtype, sha256_file, sha256_tensors, write_atomic
from data import BadSample, Item, Template, read_image

# -----------------------------------------------------------------------------
# loading what stays frozen

logging.disable_progress_bar()
warnings.filterwarnings('ignore', '`is_gradient_checkpointing` is deprecated')   # peft's call, not a reader's concern
logging.set_verbosity_error()                          # its load report lists the text tower; check_loaded is stricter


def check_loaded(path, info, ignore=()):
    """from_pretrained fills missing weights at random and only reports it; here it is an error."""
    unexpected = [k for k in info['unexpected_keys'] if not k.startswith(tuple(ignore))]
    for what, keys in (('lacks', info['missing_keys']), ('has unknown', unexpected),
                       ('has misshapen', info['mismatched_keys'])):
        if keys:
            raise SystemExit(f'{path} {what} weights: {", ".join(map(str, sorted(keys)[:3]))} ({len(keys)} in all); '
                             'wanted a complete checkpoint of this class')


def pretrained(cls, path, **how):
    """cls.from_pretrained with weights that are all there, or one clear line."""
    try:
        model, info = cls.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    except Exception as e:                             # missing, cut or foreign files raise all kinds
        raise SystemExit(f'{path}: cannot load its weights ({str(e).strip().splitlines()[0]}); '
                         'wanted a whole Hugging Face checkpoint')
    return model, info


def load_config(path):
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as e:
        raise SystemExit(f'{path}: no Hugging Face model here ({str(e).splitlines()[0]})')


def load_tokenizer(path):
    load_config(path)                                  # one clear line when nothing is there
    return AutoTokenizer.from_pretrained(path)


def load_llm(path, dtype=torch.float32):
    """A causal language model of the Qwen3 class, frozen, attention laid out for unpadded rows."""
    config = load_config(path)
    if config.model_type != 'qwen3':
        raise SystemExit(f'{path}: model_type is {config.model_type!r}, wanted qwen3')
    llm, info = pretrained(AutoModelForCausalLM, path, dtype=dtype, attn_implementation='rows')
    check_loaded(path, info)
    return llm.eval().requires_grad_(False)


class Tower(nn.Module):
    """A frozen SigLIP or fixed-resolution SigLIP2 vision tower: uint8 pixels in, patch features out; no class token.

    layer: -1 is last_hidden_state, after the tower's final norm; -2 is what the last block got, and so on down.
    Blocks above the chosen layer and the pooling head are not kept.
    """
    def __init__(self, model, layer=-1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
        super().__init__()
        depth = model.config.num_hidden_layers
        if not -depth <= layer <= -1:
            raise SystemExit(f'tower_layer = {layer}: this tower has {depth} layers, wanted -{depth} to -1')
        self.embeddings = model.embeddings
        self.blocks = model.encoder.layers[:depth + 1 + layer]
        self.norm = model.post_layernorm if layer == -1 else nn.Identity()
        self.layer, self.width, self.image_size = layer, model.config.hidden_size, model.config.image_size
        self.side = model.config.image_size // model.config.patch_size
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels):
        """uint8 (B, 3, H, W) -> (B, P, Dv)."""
        hidden = self.embeddings((pixels.float() - self.mean) / self.std)
        for block in self.blocks:
            hidden = block(hidden, attention_mask=None)
        return self.norm(hidden)


def image_settings(path):
    """How the tower's processor prepares a picture: {'size', 'resample', 'mean', 'std'} of preprocessor_config.json."""
    config = load_config(path)
    vision = getattr(config, 'vision_config', config)
    settings = {'size': vision.image_size, 'resample': 3, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    try:
        stored = json.loads(Path(cached_file(path, 'preprocessor_config.json')).read_text())
    except OSError:
        return settings
    except ValueError as e:
        raise SystemExit(f'{path}: its preprocessor_config.json is not valid JSON ({e})')
    return {'size': settings['size'], 'resample': stored.get('resample', 3),
            'mean': stored.get('image_mean', [0.5] * 3), 'std': stored.get('image_std', [0.5] * 3)}


def load_tower(path, layer=-1, dtype=torch.float32):
    """The vision tower of a SigLIP checkpoint, whole (with its text tower) or vision only."""
    config = load_config(path)
    if config.model_type not in ('siglip', 'siglip_vision_model'):
        raise SystemExit(f'{path}: model_type is {config.model_type!r}, wanted siglip '
                         '(fixed resolution; NaFlex is not supported)')
    config = getattr(config, 'vision_config', config)
    model, info = pretrained(SiglipVisionModel, path, config=config, dtype=dtype)
    check_loaded(path, info, ignore=('text_model.', 'logit_'))
    prepare = image_settings(path)
    return Tower(model, layer, prepare['mean'], prepare['std'])


# -----------------------------------------------------------------------------
# the connector


class ResamplerBlock(nn.Module):
    """Latents look at the patches and at each other, then an MLP. Both sides are normed first."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_latents, self.norm_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, latents, patches):
        normed = self.norm_latents(latents)
        sources = torch.cat([self.norm_patches(patches), normed], dim=1)                        # (B, P + N, Dr)

        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                            # (B, h, ., Dr / h)

        key, value = self.key_value(sources).chunk(2, dim=-1)
        seen = F.scaled_dot_product_attention(split(self.query(normed)), split(key), split(value))
        latents = latents + self.out(seen.transpose(1, 2).flatten(2))                           # (B, N, Dr)
        return latents + self.mlp(self.norm_mlp(latents))


def grid_positions(side, width):
    """Fixed sine and cosine features of each patch's row and column, (side * side, width), unit variance."""
    frequency = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency                                             # (side, width / 4)
    one = torch.cat([angle.sin(), angle.cos()], dim=1)                                          # (side, width / 2)
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
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
        self.register_buffer('positions', grid_positions(side, width), persistent=False)
        self.latents = nn.Parameter(torch.randn(num_image_tokens, width) * 0.5)
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projector = nn.Sequential(nn.Linear(width, 4 * llm_width), nn.GELU(), nn.Linear(4 * llm_width, llm_width))
        nn.init.normal_(self.projector[0].weight, std=width ** -0.5)
        # E[gelu(z)^2] = 0.425
        nn.init.normal_(self.projector[2].weight, std=embed_rms * (0.425 * 4 * llm_width) ** -0.5)
        nn.init.zeros_(self.projector[2].bias)

    def forward(self, patches):
        patches = self.enter(self.vision_ln(patches)) + self.positions                          # (B, P, Dr)
        latents = self.latents.expand(len(patches), -1, -1)
        for block in self.blocks:
            latents = block(latents, patches)
        return self.projector(self.norm(latents))                                               # (B, N, D)


# -----------------------------------------------------------------------------
# attention over unpadded rows


def rows_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, rows=None, **kwargs):
    """Causal attention inside each row of an unpadded batch; with rows = None the ordinary SDPA (generation).

    query, key, value: (1, heads, T, width); rows: Batch.rows. A filled-up place stands after its row's end, so the
    causal mask alone keeps every real token from seeing it.
    """
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
                                      **kwargs)
    out, sizes = [], [len(slots) for _, slots in rows]
    for (places, slots), *parts in zip(rows, *(x[0].split(sizes, dim=1) for x in (query, key, value))):
        q, k, v = (x.index_select(1, places.view(-1)).unflatten(1, places.shape).transpose(0, 1) for x in parts)
        if v.device.type == 'cpu' and v.dtype == torch.bfloat16:
            seen = short_attention(q, k, v, scaling, dropout)                                   # (B, heads, L, width)
        else:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                                  enable_gqa=q.shape[1] != k.shape[1])
        out.append(seen.transpose(1, 2).flatten(0, 1).index_select(0, slots))
    return torch.cat(out)[None], None                                                           # (1, T, heads, width)


def short_attention(query, key, value, scaling=None, dropout=0.0):
    """Causal attention by its definition, every score kept: in bf16 on a CPU the kernel that keeps none takes 4 to 8
    times as long for rows of 64 to 160. query: (B, heads, L, width); key and value may have fewer heads."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    query = query.unflatten(1, (-1, groups)).flatten(2, 3)                                      # (B, kv, g L, width)
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.transpose(2, 3)               # (B, kv, g L, L)
    ahead = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu(1).repeat(groups, 1)
    weights = F.dropout((scores + ahead).softmax(-1), dropout)
    return (weights @ value).unflatten(2, (groups, length)).flatten(1, 2)                       # (B, heads, L, width)


AttentionInterface.register('rows', rows_attention)
AttentionMaskInterface.register('rows', sdpa_mask)


# -----------------------------------------------------------------------------
# the grafted model


def label_losses(hidden, head, labels, chunk=2048):
    """Cross entropy in nats of each label, (M,), from the hidden states at label positions only, (M, D).

    Logits exist for `chunk` labels at a time; with more labels than that they are computed again in the backward pass.
    """
    def part(h, y):
        return F.cross_entropy(head(h).float(), y, reduction='none')
    if len(labels) <= chunk:
        return part(hidden, labels)
    return torch.cat([checkpoint(part, h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(chunk), labels.split(chunk))])


class VLM(nn.Module):
    """tower (or None when features come from a cache) + connector + LLM. forward(batch) -> summed loss in nats."""
    def __init__(self, tower, connector, llm):
        super().__init__()
        assert llm.config._attn_implementation == 'rows', 'with another attention rows of a batch would see each other'
        self.tower, self.connector, self.llm = tower, connector, llm

    def precision(self):
        """bf16 autocast where the frozen weights are bf16: the connector's float32 weights are the masters."""
        half = self.llm.dtype == torch.bfloat16
        return torch.autocast(self.llm.device.type, torch.bfloat16) if half else nullcontext()

    def train(self, mode=True):
        """Frozen parts stay in eval mode: only a part with something to learn follows."""
        self.training = mode
        for part in self.tower, self.connector, self.llm:
            if part is not None:
                part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def image_tokens(self, images):
        """uint8 pixels (B, 3, H, W) or patch features (B, P, Dv) -> (B, N, D)."""
        with self.precision():
            patches = self.tower(images) if images.ndim == 4 else images
            return self.connector(patches.to(self.connector.enter.weight.dtype))

    def embed(self, input_ids, image_positions, image_tokens):
        """Text embeddings (T, D) with the image tokens written over the places that the batch names. No host sync."""
        embeds = self.llm.get_input_embeddings()(input_ids)
        if image_positions is None or len(image_positions) == 0:
            return embeds
        return embeds.index_copy(0, image_positions, image_tokens.flatten(0, 1).to(embeds.dtype))

    def nll(self, batch, image_tokens=None):
        """Loss of every label, (M,), in nats. image_tokens: to put others in the place of the batch's own."""
        if image_tokens is None and batch.images is not None:
            image_tokens = self.image_tokens(batch.images)
        embeds = self.embed(batch.input_ids, batch.image_positions, image_tokens)               # (T, D)
        masks = {'full_attention': None, 'sliding_attention': None}
        with self.precision():
            hidden = self.llm.model(
                inputs_embeds=embeds[None], position_ids=batch.position_ids[None], attention_mask=masks,
                use_cache=False, rows=batch.rows).last_hidden_state[0]       # (T, D)
            return label_losses(hidden.index_select(0, batch.label_positions), self.llm.lm_head, batch.labels)

    def forward(self, batch):
        return self.nll(batch).sum()


def load_vlm(llm, vision, shape, tower_layer=-1, dtype=torch.float32, device='cpu'):
    """A VLM with both base models frozen and a fresh connector in float32.

    shape: {'num_image_tokens', 'width', 'depth', 'heads', 'vision_ln'} of the Connector. Seed before calling.
    """
    llm, tower = load_llm(llm, dtype), load_tower(vision, tower_layer, dtype)
    rms = llm.get_input_embeddings().weight.detach().float().square().mean().sqrt().item()
    connector = Connector(tower.width, tower.side, llm.config.hidden_size, embed_rms=rms, **shape)
    return VLM(tower, connector, llm).to(device)


@torch.no_grad()
def cache_features(folder, tower, paths, read, device, batch_size=64):
    """Patch features of images on disk: fp16, memory-mapped, {image path: (P, Dv) array}.

    The file's name is a sha256 over the tower's weights and layer and every image's bytes: other inputs, other file.
    Two processes that want the same one wait for each other. Images that cannot be read are left out.
    """
    paths = sorted({str(p) for p in paths if Path(p).is_file()})
    weights = sha256_tensors([*tower.state_dict().items(), ('mean', tower.mean), ('std', tower.std)])
    key = hashlib.sha256(weights.encode())
    key.update(f'{tower.layer} {getattr(read, "keywords", None)}'.encode())
    for path in paths:
        key.update(Path(path).read_bytes())
    file = Path(folder) / f'features-{key.hexdigest()[:24]}.npy'
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{file}.lock'):
        if not file.exists():
            beside, broken = file.with_suffix('.tmp'), []
            table = np.lib.format.open_memmap(beside, 'w+', np.float16, (len(paths), tower.side ** 2, tower.width))
            for start in tqdm(range(0, len(paths), batch_size), 'tower features', disable=None):
                pixels = {k: read_or_none(read, paths[k]) for k in range(start, min(start + batch_size, len(paths)))}
                broken += [k for k, p in pixels.items() if p is None]
                whole = [k for k, p in pixels.items() if p is not None]
                if whole:
                    features = tower(torch.from_numpy(np.stack([pixels[k] for k in whole])).to(device))
                    table[whole] = features.to(torch.float16).cpu().numpy()
            table.flush()
            write_atomic(file.with_suffix('.json'), json.dumps({'broken': broken}))
            beside.replace(file)
    table, broken = np.load(file, mmap_mode='r'), set(json.loads(file.with_suffix('.json').read_text())['broken'])
    return {path: table[k] for k, path in enumerate(paths) if k not in broken}


def read_or_none(read, path):
    try:
        return read(path)
    except BadSample:
        return None


CONDITIONS = ('correct', 'shuffled', 'zero', 'noise')


@torch.no_grad()
def image_ablation(vlm, load, batch_size, seed, rank=0, world_size=1):
    """What is the right image worth? {condition: summed loss of each of load.rows, (items,)} in nats, on every rank.

    correct: the item's own image; shuffled: another item's, dealt over the whole set so that nobody keeps its own;
    zero: image tokens of zeros; noise: Gaussian with the mean and deviation that real tokens have in each dimension.
    """
    vlm.eval()
    rows, device = load.rows, vlm.llm.device
    deal = np.random.default_rng(seed).permutation(len(rows))
    partner = dict(zip(deal.tolist(), np.roll(deal, 1).tolist()))
    mine = range(rank, len(rows), world_size)
    parts = [list(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]

    def tokens_of(items):
        return vlm.image_tokens(load.images([rows[i] for i in items]).to(device))              # (B, N, D)

    own = [tokens_of(part) for part in parts]
    moments = sum(torch.stack([t.double().sum((0, 1)), t.double().square().sum((0, 1))]) for t in own)
    n = all_sum(sum(t.shape[0] * t.shape[1] for t in own))
    mean, square = sum(m.to(device) for m in all_gather(moments.cpu())) / n
    std = (square - mean ** 2).clamp(min=0).sqrt()
    mine = {c: {} for c in CONDITIONS}
    for part, tokens in zip(parts, own):
        batch = load.collate([rows[i] for i in part]).to(device)
        draws = torch.stack([torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(i)) for i in part])
        noise = (mean + std * draws.to(device)).to(tokens.dtype)
        others = tokens_of([partner[i] for i in part])
        for condition, put in zip(CONDITIONS, (tokens, others, torch.zeros_like(tokens), noise)):
            losses = vlm.nll(batch, put).double()
            sums = torch.zeros(len(part), dtype=torch.float64, device=device).index_add(0, batch.label_rows, losses)
            mine[condition].update(zip(part, sums.tolist()))
    vlm.train()
    everyone = all_gather(mine)
    return {c: np.array([loss for _, loss in sorted(pair for part in everyone for pair in part[c].items())])
            for c in CONDITIONS}


# -----------------------------------------------------------------------------
# generation from embeddings


def pick(logits, temperature, top_p, generator, top_k=0):
    """One token id per row from logits (B, V). temperature 0 is greedy; generator: one a row, for independent rows;
    top_k: of the k likeliest, 0 for of all."""
    if temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered, order = ordered[:, :top_k], order[:, :top_k]
    ordered = torch.softmax(ordered, dim=-1)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)   # keeps the smallest set reaching top_p
    drawn = torch.cat([torch.multinomial(row.cpu(), 1, generator=g) for row, g in zip(ordered, generator)])
    return order.gather(1, drawn.to(order.device)[:, None])[:, 0]


def left_padded(prompts):
    """[(T_i, D)] embeddings -> (B, L, D) padded on the left, the mask (B, L), and positions (B, L) from each start."""
    longest, lengths, device = max(map(len, prompts)), [len(p) for p in prompts], prompts[0].device
    embeds = torch.stack([F.pad(p, (0, 0, longest - len(p), 0)) for p in prompts])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
    return embeds, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def generate(llm, prompts, max_new_tokens, stop_ids, temperature=0.0, top_p=1.0, seeds=None):
    """Continue prompts given as embeddings, [(T_i, D)]; returns [[ids without the stop id]].

    Prompts are padded on the left and masked; a row's ids do not depend on its batch mates. seeds: one a row, when
    sampling.
    """
    embeds, mask, positions = left_padded(prompts)
    generators = [torch.Generator().manual_seed(s) for s in seeds or range(len(prompts))]
    cache, stops = DynamicCache(config=llm.config), set(stop_ids)
    out, live = [[] for _ in prompts], set(range(len(prompts)))
    for _ in range(max_new_tokens):
        hidden = llm.model(None, mask, positions, cache,        # by place: transformers 5.2x renamed the last of them
                           inputs_embeds=embeds, use_cache=True).last_hidden_state[:, -1]
        ids = pick(llm.lm_head(hidden), temperature, top_p, generators)                              # (B,)
        for row, token in enumerate(ids.tolist()):
            if row in live and token in stops:
                live.discard(row)
            elif row in live:
                out[row].append(token)
        if not live:
            break
        embeds = llm.get_input_embeddings()(ids)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return out


@torch.no_grad()
def complete_rows(vlm, load, prompts, batch_size, max_new_tokens, stop_ids, rank=0, world_size=1):
    """Greedy continuations, lists of ids, on every rank. prompts: [(row of load.rows, length of its prompt in ids)]."""
    vlm.eval()
    mine, done, device = list(range(rank, len(prompts), world_size)), {}, vlm.llm.device
    for part in (mine[i:i + batch_size] for i in range(0, len(mine), batch_size)):
        embeds = []
        for i in part:
            row, length = prompts[i]
            tokens = vlm.image_tokens(load.images([row]).to(device)) if row.image_at >= 0 else None
            n = 0 if tokens is None else tokens.shape[1]
            places = row.image_at + torch.arange(n, device=device)
            ids = torch.as_tensor(row.ids[:length], dtype=torch.long, device=device)
            embeds.append(vlm.embed(ids, places, tokens))
        with vlm.precision():
            done.update(zip(part, generate(vlm.llm, embeds, max_new_tokens, stop_ids)))
    vlm.train()
    done = {i: ids for part in all_gather(done) for i, ids in part.items()}
    return [done[i] for i in range(len(prompts))]


# -----------------------------------------------------------------------------
# a trained model in use, here or after it has left


class Speaker:
    """A VLM and what stands between a picture file and words: `speaker.say(speaker.see('picture.png'))`."""
    def __init__(self, vlm, llm, vision, max_seq_len):
        self.vlm, self.tokenizer, prepare = vlm.eval(), load_tokenizer(llm), image_settings(vision)
        self.template = Template(self.tokenizer, len(vlm.connector.latents), max_seq_len)
        self.read = partial(read_image, size=prepare['size'], resample=prepare['resample'])

    @torch.no_grad()
    def see(self, file):
        """Picture file -> image tokens (1, N, D)."""
        return self.vlm.image_tokens(torch.from_numpy(self.read(file))[None].to(self.vlm.llm.device))

    @torch.no_grad()
    def say(self, tokens, turns=None, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=0):
        """The model's text about image tokens. turns: [(question, answer), ..., (question, None)] for a model of stage
        A2; None for a caption of stage A1."""
        item = Item('said', 'image', tuple(turns or (('', ''),)))
        row = self.template.chat(item) if turns else self.template.caption(item)
        if row.truncated:
            raise SystemExit(f'the chat is longer than max_seq_len = {self.template.max_seq_len}: start a new one')
        device = self.vlm.llm.device
        ids = torch.as_tensor(row.ids if turns else row.ids[:row.labelled[0]], dtype=torch.long, device=device)
        places = row.image_at + torch.arange(self.template.n, device=device)
        with self.vlm.precision():
            out = generate(self.vlm.llm, [self.vlm.embed(ids, places, tokens)], max_new_tokens, [self.template.end],
                           temperature, top_p, [seed])
        return self.tokenizer.decode(out[0], skip_special_tokens=True).strip()


def require_frozen(named, sha256, where):
    """The dtype, by its name, in which frozen weights that are loaded as they are stored have this sha256: the one they
    had in training. Exits when in none."""
    named = list(named)
    for name in 'bfloat16', 'float32':
        if sha256_tensors(named, getattr(torch, name)) == sha256:
            return name
    raise SystemExit(f'{where} was trained on other frozen weights than those of its base models today: restore them, '
                     'or say where they are')


def load_exported(folder, llm='', vision='', device='cpu'):
    """The Speaker of a Track A run that has left: a folder that `python sample.py RUN --export FOLDER` wrote.

    llm, vision: where the two base models are, if not where its config.json says. Exits with one line when a file is
    damaged or a base model is not the one that was trained with.
    """
    from peft import PeftModel
    from safetensors.torch import load_file
    folder = Path(folder)
    try:
        said = json.loads((folder / 'config.json').read_text())
        model, files = {**said['model']}, said['files']
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f'{folder}: no exported run of Track A here ({e}); sample.py writes one with --export')
    for name, sha256 in files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
            raise SystemExit(f'{folder}/{name} is not the file that config.json describes: export the run again')
    model.update({name: where for name, where in (('llm', llm), ('vision', vision)) if where})
    vlm = load_vlm(**model, dtype='auto')
    frozen = [(n, p) for n, p in vlm.named_parameters() if not p.requires_grad]
    require_frozen(frozen, said['frozen_sha256'], folder)
    for _, p in frozen:                                # and not the model: rotary frequencies stay in float32
        p.data = p.data.to(frozen_dtype('auto', torch.device(device)))
    vlm.connector.load_state_dict(load_file(folder / 'connector.safetensors'))
    if said['stage'] == 'a2':
        PeftModel.from_pretrained(vlm.llm, folder)     # puts LoRA into the language model in its place
    return Speaker(vlm.to(device), model['llm'], model['vision'], said['max_seq_len'])
