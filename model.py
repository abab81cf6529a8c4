"""
The model: a frozen vision tower, a trainable connector, a language model that is frozen or has LoRA. How examples go
through the language model is in decoders.py, what a trained one does in inference.py.

Letters: B examples, P patches, N image tokens, T tokens of all examples together, M labels, D width of the language
model, Dv of the tower, Dr of the resampler.
"""
import hashlib
import json
import math
import os
import signal
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, CLIPVisionModel, Dinov2Model, SiglipVisionModel
from transformers.utils import cached_file

from common import (
    all_gather, barrier, first_line, in_parts, one_process_at_a_time, progress, read_sealed, sha256_file,
    sha256_tensors, write_sealed)
from decoders import (
    SHORT, embedding_rms, hidden_states, load_config, load_llm, precision_of, pretrained, text_losses)
from examples import picture_keys, remember_pictures
from media import BadSample, read_image
from sharding import back_to_shards, make_whole

# -----------------------------------------------------------------------------
# attention without a mask


def whole_attention(query, key, value, scaling=None):
    """Attention of every query to every key, by the way that is the faster one. (B, heads, N, .), (B, heads, S, .)"""
    n_scores = query.shape[2] * key.shape[2]
    if query.device.type == 'cpu' and query.dtype == torch.bfloat16 and n_scores <= SHORT ** 2:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ((query * scaling) @ key.transpose(2, 3)).softmax(-1) @ value
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)


def tower_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """whole_attention as transformers calls it; a tower has no mask, and no dropout where it is frozen."""
    return whole_attention(query, key, value, scaling).transpose(1, 2), None                    # (B, P, heads, .)


AttentionInterface.register('whole', tower_attention)

# -----------------------------------------------------------------------------
# the vision tower, which stays frozen


class Tower(nn.Module):
    """A frozen SigLIP, fixed-resolution SigLIP2, CLIP or DINOv2 vision tower: uint8 pixels in, patch features out; no
    class token.

    layer: -1 is last_hidden_state, after the tower's final norm, which CLIP has none of; -2 is the input of the last
    block, and so on down. Blocks above the chosen layer and the pooling head are not kept. image_size: in pixels, where
    it is not the config's: DINOv2 takes any multiple of its patches.
    """
    def __init__(self, model, layer=-1, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), image_size=None):
        super().__init__()
        config = model.config
        depth = config.num_hidden_layers
        if not -depth <= layer <= -1:
            raise SystemExit(f'tower_layer = {layer}: this tower has {depth} layers, wanted -{depth} to -1')
        self.layer = layer
        self.width = config.hidden_size                # Dv
        self.image_size = image_size or config.image_size   # pixels
        self.side = self.image_size // config.patch_size   # patches; P = side ** 2
        self.embeddings = model.embeddings
        self.norm_before = getattr(model, 'pre_layrnorm', nn.Identity())   # of CLIP, and its spelling
        layers = model.encoder.layer if config.model_type == 'dinov2' else model.encoder.layers
        self.blocks = layers[:depth + 1 + layer]
        norms = {'siglip_vision_model': 'post_layernorm', 'dinov2': 'layernorm'}
        has_norm = layer == -1 and config.model_type in norms
        self.norm = getattr(model, norms[config.model_type]) if has_norm else nn.Identity()
        self.n_before = 0 if config.model_type == 'siglip_vision_model' else 1   # the class token
        self.register_buffer('mean', torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer('std', torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pixels):
        """uint8 (B, 3, H, W) -> (B, P, Dv)."""
        hidden = self.embeddings((pixels.float() - self.mean) / self.std)                       # (B, P, Dv)
        hidden = self.norm_before(hidden)
        for block in self.blocks:
            hidden = block(hidden, attention_mask=None)
        return self.norm(hidden[:, self.n_before:])


def image_settings(path):
    """How the tower's processor prepares an image: {'size', 'resample', 'mean', 'std'}, and 'shortest' where it cuts
    out the middle.

    Exits with one line when the tower comes without a processor, or with one that does something else than read_image
    and Tower do.
    """
    config = load_config(path)
    config = getattr(config, 'vision_config', config)
    side = config.image_size
    file, stored = read_processor(path)
    is_cropped = bool(stored.get('do_center_crop'))
    size = stored.get('crop_size' if is_cropped else 'size', side)
    sides = list(size.values()) if isinstance(size, dict) else [size]  # {'height', 'width'} or {'shortest_edge'}
    if config.model_type == 'dinov2' and type(sides[0]) is int and sides[0] % config.patch_size == 0:
        side = sides[0]                                # its positions are stretched to any size
    if any(n != side for n in sides):
        raise SystemExit(f'{file}: size is {size}, but the tower takes {side} x {side} pixels; restore its processor')
    if False in (stored.get('do_resize'), stored.get('do_rescale'), stored.get('do_normalize')):
        raise SystemExit(f'{file}: wanted a processor that resizes, rescales and normalises')
    factor = stored.get('rescale_factor', 1 / 255)     # Tower takes pixels from 0 to 255 to 0 to 1 before mean and std
    if type(factor) not in (int, float) or abs(255 * factor - 1) > 1e-3 or stored.get('rescale_offset'):
        raise SystemExit(f'{file}: rescale_factor is {factor!r}, wanted 1 / 255 and no rescale_offset: restore the '
                         'processor, or take another tower')
    wanted = {'image_mean': 3, 'image_std': 3, 'resample': 1}          # numbers
    for name, n in wanted.items():
        values = stored.get(name)
        numbers = values if isinstance(values, list) else [values]
        if len(numbers) != n or any(type(x) not in (int, float) for x in numbers):
            raise SystemExit(f'{file}: {name} is {values!r}, wanted {n} number(s); restore the processor')
    settings = {'size': side, 'resample': stored['resample'], 'mean': stored['image_mean'], 'std': stored['image_std']}
    if is_cropped:
        shortest = stored.get('size')
        shortest = shortest.get('shortest_edge') if isinstance(shortest, dict) else shortest
        if type(shortest) is not int or shortest < side:
            raise SystemExit(f'{file}: size is {stored.get("size")!r}, wanted a shortest_edge of at least {side} '
                             'pixels, of which the middle is cut out')
        settings['shortest'] = shortest
    return settings


def image_reading(settings):
    """read_image as the settings of image_settings have it."""
    named = {name: settings[name] for name in ('size', 'resample', 'shortest') if name in settings}
    return partial(read_image, **named)


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


TOWERS = {'siglip': SiglipVisionModel, 'clip': CLIPVisionModel, 'dinov2': Dinov2Model}


def load_tower(path, layer=-1, dtype=torch.float32):
    """The vision tower of a SigLIP, CLIP or DINOv2 checkpoint, whole (with its text tower) or vision only."""
    config = load_config(path)
    kind = config.model_type.removesuffix('_vision_model')
    if kind not in TOWERS:
        raise SystemExit(f'{path}: model_type is {config.model_type!r}, wanted siglip, clip or dinov2 '
                         '(fixed resolution; NaFlex is not supported)')
    model = pretrained(TOWERS[kind], path, dtype, config=getattr(config, 'vision_config', config),
                       attn_implementation='whole',
                       ignore=('text_model.', 'logit_', 'text_projection', 'visual_projection'))
    settings = image_settings(path)
    return Tower(model, layer, mean=settings['mean'], std=settings['std'], image_size=settings['size'])


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
        attended = whole_attention(split_heads(self.query(normed)), split_heads(key), split_heads(value))
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

    embed_rms: of embedding_rms; image tokens start at that size. learned_edges: N + 2 embeddings, the first and the
    last of them the same for every image: for a tokenizer without markers of an image.
    """
    def __init__(self, patch_width, side, llm_width, num_image_tokens=64, width=512, depth=2, heads=8, vision_ln=False,
                 learned_edges=False, embed_rms=0.03):
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
        self.edges = None
        if learned_edges:
            self.edges = nn.Parameter(torch.randn(2, llm_width) * embed_rms)                    # (2, D)

    def forward(self, patches):
        patches = self.enter(self.vision_ln(patches)) + self.positions                          # (B, P, Dr)
        latents = self.latents.expand(len(patches), -1, -1)                                     # (B, N, Dr)
        for block in self.blocks:
            latents = block(latents, patches)
        tokens = self.projector(self.norm(latents))                                             # (B, N, D)
        if self.edges is None:
            return tokens
        start, end = self.edges.expand(len(tokens), 1, -1, -1).to(tokens.dtype).unbind(2)       # (B, 1, D) each
        return torch.cat([start, tokens, end], dim=1)                                           # (B, N + 2, D)


# -----------------------------------------------------------------------------
# the grafted model


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
        """Frozen parts stay in eval mode: only a part with something to learn follows. Weights in shards are whole in
        eval mode."""
        self.training = mode
        if self.llm is not None:
            if mode:
                back_to_shards(self.llm)
            else:
                make_whole(self.llm)
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
            return text_losses(self.llm, hidden, batch.labels)

    def forward(self, batch):
        return self.nll(batch).sum()


def load_vlm(llm, vision, shape, tower_layer=-1, dtype=torch.float32, device='cpu'):
    """A VLM with both base models frozen and a fresh connector in float32. Seed before calling.

    shape: {'num_image_tokens', 'width', 'depth', 'heads', 'vision_ln', 'learned_edges'} of the Connector.
    """
    llm = load_llm(llm, dtype, device)
    tower = load_tower(vision, tower_layer, dtype)
    connector = Connector(tower.width, tower.side, llm.config.hidden_size, embed_rms=embedding_rms(llm), **shape)
    return VLM(tower, connector, llm).to(device)


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
        mine = slice(rank, None, world_size)
        everybodys = slice(None)                       # still missing on machines with disks of their own
        for share in mine, everybodys:
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
        with one_process_at_a_time(f'{file}.lock', f'computes features for {folder}'):
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
