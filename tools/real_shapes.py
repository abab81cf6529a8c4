"""
Base models, codecs and data of real shape with nothing in them: real classes at real widths with few layers and random
weights, and lists in the real formats. They lie where the real configs look for them, below one folder; for
tools/rehearsal.py.
"""
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AddedToken, AutoTokenizer, JanusVQVAE, JanusVQVAEConfig, MimiConfig, MimiModel, Qwen2Tokenizer, Qwen3Config,
    Qwen3ForCausalLM, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel)

from media import write_sound
from tools.memory import KNOWN
from tools.synthetic import caption, chat, text

# the ids after Qwen3's vocabulary, in their order; those of the second line are no special tokens
SPECIAL = ('endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end '
           'vision_start vision_end vision_pad image_pad video_pad').split()
NOT_SPECIAL = ('<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> '
               '<|file_sep|> <tool_response> </tool_response> <think> </think>').split()
N_PLAIN_IDS = 151_643                                  # of Qwen3's vocabulary without them
PICTURE_SIZES = [(336, 336), (500, 375), (375, 500), (640, 480)]   # pixels


# -----------------------------------------------------------------------------
# base models and codecs


def make_tokenizer(n_plain_ids=N_PLAIN_IDS):
    """A byte-level BPE of our words with Qwen3's ids: its number of plain ones, then its added tokens. Most of the
    plain ids stand for words that no text has."""
    rng = np.random.default_rng(0)
    trained = Qwen2Tokenizer().train_new_from_iterator([text(rng, 400) for _ in range(50)], 2000, show_progress=False)
    bpe = json.loads(trained.backend_tokenizer.to_str())['model']
    vocab = {}
    for word in bpe['vocab']:
        if not word.startswith('<|'):
            vocab[word] = len(vocab)
    while len(vocab) < n_plain_ids:
        vocab[f'Ġunused{len(vocab)}'] = len(vocab)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe['merges']])
    tokenizer.add_tokens([AddedToken(f'<|{name}|>', special=True, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in NOT_SPECIAL])
    tokenizer.eos_token = '<|im_end|>'
    tokenizer.pad_token = '<|endoftext|>'
    return tokenizer


def save_model(model, folder, dtype=torch.float32):
    model.to(dtype).save_pretrained(folder)


def make_llm(folder, shape, n_layers, tokenizer):
    """A Qwen3 in bfloat16, as it is published. tokenizer: a folder of the real one, or '' for our own."""
    config = Qwen3Config(**{**shape, 'num_hidden_layers': n_layers, 'bos_token_id': None})
    tokenizer = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else make_tokenizer()
    config.eos_token_id = tokenizer.convert_tokens_to_ids('<|im_end|>')
    config.pad_token_id = tokenizer.convert_tokens_to_ids('<|endoftext|>')
    save_model(Qwen3ForCausalLM(config), folder, torch.bfloat16)
    tokenizer.save_pretrained(folder)


def make_tower(folder, shape, n_layers):
    config = SiglipVisionConfig(**{**shape, 'num_hidden_layers': n_layers})
    save_model(SiglipVisionModel(config), folder)
    size = {'height': config.image_size, 'width': config.image_size}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)


def make_image_codec(folder):
    """The VQ of Janus-Pro inside the checkpoint of a larger model, one block of two at each width: 24 x 24 codes of
    16,384 for 384 x 384 pixels."""
    config = JanusVQVAEConfig(num_patches=24, num_res_blocks=1)
    model = JanusVQVAE(config)
    folder.mkdir(parents=True)
    tensors = {f'model.vqmodel.{name}': tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps({'model_type': 'janus', 'vq_config': config.to_dict()}))


def make_audio_codec(folder):
    """Mimi: 12.5 frames a second, 32 codebooks of 2,048."""
    model = MimiModel(MimiConfig())
    for name, buffer in model.named_buffers():
        if name.endswith('codebook.embed_sum'):        # zeros: every frame would have the same code
            buffer.normal_()
    save_model(model, folder)


# -----------------------------------------------------------------------------
# data


def write_picture(path, rng):
    """A JPEG of usual size and bytes: soft colours with noise upon them."""
    width, height = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
    soft = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(soft, np.int16) + rng.integers(-12, 13, (height, width, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_clip(path, rng, seconds, rate=44_100):
    """Dull noise that swells and fades."""
    noise = np.convolve(rng.normal(size=round(seconds * rate)), np.ones(16) / 4, mode='same')
    swell = 0.5 + 0.5 * np.sin(np.linspace(0, rng.uniform(5, 50), len(noise)))
    write_sound(path, (0.2 * noise / noise.std() * swell).clip(-1, 1).astype(np.float32), rate)


def write_llava(path, image_root, record_of, n, rng):
    """A LLaVA JSON of n records of tools/synthetic.py, and its pictures."""
    records = [record_of(rng, k) for k in range(n)]
    for name in sorted({record['image'] for record in records}):
        write_picture(image_root / name, rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


def write_texts(path, n, rng):
    with open(path, 'w') as f:
        for _ in range(n):
            f.write(json.dumps({'text': f'{text(rng, rng.integers(20, 80))}.'}) + '\n')


def make_data(root, n_pictures, n_sounds):
    """What the real configs name below data/: LLaVA-Pretrain, LLaVA-Instruct, Clotho, plain texts."""
    rng = np.random.default_rng(0)
    data = root / 'data'
    write_llava(data / 'LLaVA-Pretrain' / 'blip_laion_cc_sbu_558k.json', data / 'LLaVA-Pretrain' / 'images', caption,
                n_pictures, rng)
    write_llava(data / 'LLaVA-Instruct' / 'llava_instruct_150k.json', data / 'LLaVA-Instruct' / 'train2017', chat,
                2 * n_pictures, rng)
    write_texts(data / 'heldout_text.jsonl', 32, rng)
    write_texts(data / 'replay_text.jsonl', 64, rng)
    clotho = data / 'Clotho'
    (clotho / 'development').mkdir(parents=True)
    with open(clotho / 'clotho_captions_development.csv', 'w', newline='') as captions:
        table = csv.writer(captions)
        table.writerow(['file_name', *(f'caption_{k}' for k in range(1, 6))])
        for k in range(n_sounds):
            name = f'a sound {k}.wav'                  # Clotho's have spaces in them
            write_clip(clotho / 'development' / name, rng, rng.uniform(15, 30))
            table.writerow([name, *(text(rng, rng.integers(8, 20)) for _ in range(5))])


def make_all(root, llm, llm_shape, tower_shape, n_layers, n_pictures, n_sounds, tokenizer='', codecs=True):
    """Everything that the real configs of one base model name, below root. llm: its name; shapes: of KNOWN."""
    torch.manual_seed(0)
    root = Path(root)
    make_llm(root / llm, llm_shape, n_layers, tokenizer)
    make_tower(root / 'google' / 'siglip2-so400m-patch14-384', tower_shape, n_layers)
    if codecs:
        make_image_codec(root / 'deepseek-community' / 'Janus-Pro-1B')
        make_audio_codec(root / 'kyutai' / 'mimi')
    make_data(root, n_pictures, n_sounds)
    shutil.copytree(Path(__file__).resolve().parent.parent / 'configs', root / 'configs')


def known_shapes(llm):
    """(of the language model, of the tower)"""
    return KNOWN[llm], KNOWN['google/siglip2-so400m-patch14-384']
