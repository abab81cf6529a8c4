"""
A small SigLIP that tells the emoji apart, trained on the spot on the pictures that are not held out.

reads   data/emoji/captions.json and its pictures
writes  data/emoji/vision/, a Hugging Face folder, and report.json in it

$ python -m emoji.tower

In a step every picture is one of some hundred names: a softmax over them as the text tower reads them, with a few of
their tags. Half of the patches are left out at random, which halves a step and makes it harder to learn by heart.

Letters: B pictures, K names, P patches, D width.
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from emoji.pictures import PIXELS, ROOT, read_list
from small.models import descend, make_tokenizer, save_base_model

N_TEXT = 24                    # ids of a name with its tags, at most


def tiny_siglip(tokenizer, width=192):
    layers = {'hidden_size': width, 'intermediate_size': 3 * width, 'num_attention_heads': width // 32}
    text_config = {
        **layers, 'num_hidden_layers': 1, 'projection_size': width, 'vocab_size': len(tokenizer),
        'max_position_embeddings': N_TEXT, 'bos_token_id': None,
        'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    vision_config = {**layers, 'num_hidden_layers': 6, 'image_size': PIXELS, 'patch_size': 8}
    model = SiglipModel(SiglipConfig(text_config=text_config, vision_config=vision_config))
    model.set_attn_implementation('whole')             # of model.py: sooner than others in bf16 at this size
    torch.nn.init.constant_(model.logit_scale, math.log(12))
    return model


# -----------------------------------------------------------------------------
# pictures


def load_pictures(records):
    """(B, 4, PIXELS, PIXELS) uint8, the last channel being what is drawn."""
    pictures = [np.asarray(Image.open(ROOT / record['image'])) for record in records]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def on_colour(pictures, colours):
    """RGBA in 0 .. 1, (B, 3) -> (B, 3, ...) over these colours, in -1 .. 1 as SigLIP takes them."""
    rgb = pictures[:, :3]
    drawn = pictures[:, 3:]
    return 2 * (rgb * drawn + colours[:, :, None, None] * (1 - drawn)) - 1


def varied(pictures, strength):
    """uint8 RGBA -> (B, 3, ...): moved, turned, mirrored, in other colours, on white or on some other colour.

    strength: 1 for as far as a thing can still be recognised, 0 for as it is on white.
    """
    n = len(pictures)
    about = lambda middle, width, *shape: torch.empty(n, *shape).uniform_(-width, width) * strength + middle
    happens = lambda share, *shape: torch.rand(n, *shape) < share * strength
    pictures = pictures / 255
    scale = about(1.05, 0.28)                          # above 1 it gets smaller
    angle = about(0, 0.3)                              # radians
    mirror = torch.where(happens(0.5), -1.0, 1.0)
    shift = about(0, 0.2, 2)
    across = torch.stack([scale * mirror * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1)
    down = torch.stack([scale * mirror * angle.sin(), scale * angle.cos(), shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), pictures.shape, align_corners=False)
    pictures = F.grid_sample(pictures, grid, align_corners=False)
    rgb = (pictures[:, :3] * about(0.95, 0.22, 3, 1, 1)).clamp(0, 1)
    gray = rgb.mean(1, keepdim=True).expand_as(rgb)
    rgb = torch.where(happens(0.2, 1, 1, 1), gray, rgb)
    colours = torch.where(happens(0.5, 1), torch.rand(n, 3), torch.ones(n, 3))
    return on_colour(torch.cat([rgb, pictures[:, 3:]], 1), colours)


def embed(model, pixels, n_kept=None):
    """(B, 3, PIXELS, PIXELS) -> (B, D) of length 1, from all patches or from n_kept of each picture."""
    vision = model.vision_model
    patches = vision.embeddings(pixels)                                                         # (B, P, D)
    if n_kept:
        kept = torch.rand(patches.shape[:2]).topk(n_kept).indices                               # (B, n_kept)
        patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
    hidden = vision.encoder(inputs_embeds=patches).last_hidden_state
    return F.normalize(vision.head(vision.post_layernorm(hidden)), dim=1)


# -----------------------------------------------------------------------------
# names


def in_words(thing, rng):
    """'hedgehog , animal mammal spiny': a name and, of its kind and its tags, some words or none."""
    words = thing['kind'].split(', ') + list(thing['tags'])
    n = int(rng.integers(0, min(4, len(words)) + 1))
    return ' '.join([thing['name'], ',', *rng.choice(words, n, replace=False)])


def embed_texts(model, tokenizer, texts):
    ids = tokenizer(texts, padding='max_length', truncation=True, max_length=N_TEXT, return_tensors='pt')['input_ids']
    ids = ids[:, :int((ids != tokenizer.pad_token_id).sum(1).max())]
    return F.normalize(model.text_model(input_ids=ids).pooler_output, dim=1)


def share_named(model, tokenizer, records, names):
    """Shares of the pictures whose own name, of these, comes first, and among the first five."""
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        texts = torch.cat([embed_texts(model, tokenizer, names[n:n + 256]) for n in range(0, len(names), 256)])
        right = torch.tensor([names.index(record['thing']['name']) for record in records])[:, None]
        found = []
        for part in load_pictures(records).split(256):
            found.append(embed(model, on_colour(part / 255, torch.ones(len(part), 3))) @ texts.T)
        best = torch.cat(found).topk(5, dim=1).indices                                          # (B, 5)
    return [round((best[:, :n] == right).any(1).float().mean().item(), 4) for n in (1, 5)]


# (steps, highest learning rate, strength of what varied() does): first so that nothing is learned by heart
ROUNDS = (3000, 2e-3, 1.0), (1400, 1.2e-3, 0.5)


def make_tower(rounds=ROUNDS, batch=128, n_others=192, seed=1):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    records = read_list('captions')
    things = {record['thing']['name']: record['thing'] for record in records}
    names = sorted(things)
    tokenizer = make_tokenizer([in_words(thing, rng) for thing in things.values() for _ in range(4)], n_ids=1500)
    model = tiny_siglip(tokenizer)
    pictures = load_pictures(records)
    labels = np.array([names.index(record['thing']['name']) for record in records])

    def loss_of_step(step, n_steps, strength):
        chosen = rng.choice(len(records), batch, replace=False)
        others = rng.choice(len(names), n_others, replace=False)
        candidates = np.union1d(labels[chosen], others)                                         # (K,), sorted
        right = torch.from_numpy(np.searchsorted(candidates, labels[chosen]))
        n_kept = 32 if step < 0.9 * n_steps else None
        found = embed(model, varied(pictures[chosen], strength), n_kept)                               # (B, D)
        texts = embed_texts(model, tokenizer, [in_words(things[names[k]], rng) for k in candidates])   # (K, D)
        logits = model.logit_scale.exp() * (found @ texts.T)
        return F.cross_entropy(logits.float(), right, label_smoothing=0.1)

    for n_steps, learning_rate, strength in rounds:
        loss_of = partial(loss_of_step, n_steps=n_steps, strength=strength)
        descend(model, loss_of, n_steps, learning_rate, 'tower')
    model.eval()
    report = {'pictures': len(records), 'names': len(names)}
    for name in 'eval_known', 'eval_new':
        held_out = read_list(name)
        candidates = sorted({record['thing']['name'] for record in held_out} | set(names))
        report[name] = share_named(model, tokenizer, held_out, candidates)
    processor = SiglipImageProcessorPil(size={'height': PIXELS, 'width': PIXELS})
    folder = ROOT / 'vision'
    folder.mkdir(exist_ok=True)
    save_base_model(folder, model, tokenizer, processor, report=report)
    print(report)


if __name__ == '__main__':
    make_tower()
