"""
Worlds for tests, made in seconds: real files, real model classes.

tiny: pictures of the small world, its text, and base models that have learned little or nothing.
colours: a world that a tiny model masters. Its language model has learned one thing, to repeat a word that it has read
four times; what stands for a word, image tokens or new rows, steers it. Pictures are of four colours; of codes, each
word has its quarter of every range.
pairs: the same with two words: the colours of a picture's left and right half. There are sixteen captions.
"""
import json

import numpy as np
import torch
from PIL import Image
from stub_codecs import AUDIO, IMAGE, StubUTI
from transformers import (
    AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipConfig, SiglipImageProcessorPil, SiglipModel)

import uti
from common import write_sealed
from lists import read_texts
from shards import Caption, Medium, write_shard
from small.make import make_captions, make_text
from small.models import descend, make_tokenizer
from uti import Grammar, TokenSpace

COLOURS = {'red': (220, 40, 40), 'blue': (50, 80, 220), 'green': (40, 180, 60), 'yellow': (230, 210, 60)}
WORDS = [f' {colour}' for colour in COLOURS]


def make_tiny(root):
    """captions/, instruct/, text/, llm/ and vision/: 200 pictures, a 2-layer Qwen3 and a 2-layer SigLIP."""
    make_captions(root / 'captions', n=200)
    make_captions(root / 'instruct', n=150, seed=7, kind='instruct')
    make_text(root / 'text', n_train=2000, n_eval=60)
    captions = json.loads((root / 'captions' / 'data.json').read_text())
    captions = [record['conversations'][1]['value'] for record in captions]
    # 500 ids are few: the captions' words, and the colours alone, become whole ones first
    texts = [*10 * captions, *1000 * list(COLOURS), *read_texts(root / 'text' / 'train.jsonl')]
    tokenizer = make_tokenizer(texts, n_ids=500)
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None))
    ids = []
    for text in read_texts(root / 'text' / 'replay.jsonl')[:2000]:     # as varied as the end of what the real one reads
        ids += tokenizer(text)['input_ids']
    ids = torch.tensor(ids[:len(ids) // 32 * 32]).view(-1, 32)                                  # (B, 32)

    def loss_of_step(step):
        batch = ids[step * 16:step * 16 + 16]
        return llm(batch, labels=batch).loss

    # some steps: a random model cannot be steered
    descend(llm, loss_of_step, n_steps=80, learning_rate=1e-2, title='tiny llm')
    llm.save_pretrained(root / 'llm')
    tokenizer.save_pretrained(root / 'llm')
    layers = {'hidden_size': 32, 'intermediate_size': 64, 'num_attention_heads': 2, 'num_hidden_layers': 2}
    config = SiglipConfig(text_config={**layers, 'vocab_size': 512, 'bos_token_id': None, 'eos_token_id': 1},
                          vision_config={**layers, 'image_size': 32, 'patch_size': 8})
    SiglipModel(config).save_pretrained(root / 'vision')
    SiglipImageProcessorPil(size={'height': 32, 'width': 32}).save_pretrained(root / 'vision')


def make_colours(root, tiny):
    """llm/, pictures/ and shards/."""
    make_copier(root / 'llm', tiny)
    make_pictures(root / 'pictures')
    make_shards(root / 'shards', tiny)


def make_copier(folder, tiny):
    """A Qwen3 that continues `x w w w w y` with `w <|im_end|>`."""
    def teach(ids, end):
        ids[:, 1:5] = ids[:, 6:7]
        ids[:, 7] = end

    make_repeater(folder, tiny, n_ids=8, n_given=6, n_steps=250, teach=teach)


def make_repeater(folder, tiny, n_ids, n_given, n_steps, teach):
    """A Qwen3 that continues the n_given first of n_ids ids as teach(random ids (B, T), end) sets them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tiny / 'llm'))
    end = tokenizer.convert_tokens_to_ids('<|im_end|>')

    def loss_of_step(step):
        ids = torch.randint(3, 500, (32, n_ids))                                                # (B, T)
        teach(ids, end)
        labels = ids.clone()
        labels[:, :n_given] = -100
        return llm(ids, labels=labels).loss

    descend(llm, loss_of_step, n_steps=n_steps, learning_rate=1e-2, title='copier')
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pairs(root, tiny):
    """llm/ and pictures/: a Qwen3 that continues `x v v w w y z` with `v w <|im_end|>`, and 240 pictures with
    captions.json."""
    def teach(ids, end):
        ids[:, 1:3] = ids[:, 7:8]
        ids[:, 3:5] = ids[:, 8:9]
        ids[:, 9] = end

    make_repeater(root / 'llm', tiny, n_ids=10, n_given=7, n_steps=300, teach=teach)
    (root / 'pictures').mkdir()
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    captions = []
    for k in range(240):
        left, right = (names[i] for i in rng.integers(4, size=2))
        pixels = np.zeros((32, 32, 3), int)
        pixels[:, :16] = COLOURS[left]
        pixels[:, 16:] = COLOURS[right]
        pixels = np.clip(pixels + rng.integers(-20, 20, 3), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / 'pictures' / f'{k}.png')
        turns = [{'from': 'human', 'value': '<image>'}, {'from': 'gpt', 'value': f'{left} {right}'}]
        captions.append({'id': f'pair {k}', 'image': f'{k}.png', 'conversations': turns})
    (root / 'pictures' / 'captions.json').write_text(json.dumps(captions))


def make_pictures(folder):
    """120 pictures, each of one colour, with captions.json, chats.json of one or two turns, and text.jsonl."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = []
    chats = []
    for k in range(120):
        colour = list(COLOURS)[k % 4]
        shade = np.clip(COLOURS[colour] + rng.integers(-20, 20, 3), 0, 255)
        item = {'id': f'picture {k}', 'image': f'{k}.png'}
        Image.new('RGB', (32, 32), tuple(shade.tolist())).save(folder / item['image'])
        answer = {'from': 'gpt', 'value': colour}
        captions.append({**item, 'conversations': [{'from': 'human', 'value': '<image>'}, answer]})
        turns = [{'from': 'human', 'value': '<image>\nWhich colour?'}, answer]
        if k % 2:
            turns += [{'from': 'human', 'value': 'Again?'}, answer]
        chats.append({**item, 'conversations': turns})
    (folder / 'captions.json').write_text(json.dumps(captions))
    (folder / 'chats.json').write_text(json.dumps(chats))
    with open(folder / 'text.jsonl', 'w') as f:        # as the language model writes
        for word in WORDS:
            for start in 'so', 'now', 'again':
                f.write(json.dumps({'text': f'{start}{4 * word} then{word}'}) + '\n')


def make_shards(folder, tiny, image=IMAGE, shuffled=False):
    """60 items of each modality to train on, 24 to evaluate, 6 golden; shuffled: texts to train on are of any kind."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / 'llm')
    space = tiny_space(tokenizer, image)
    grammar = Grammar(space)
    rng = np.random.default_rng(0)
    texts = [tokenizer.encode(word) for word in WORDS]
    folder.mkdir()
    space.save(folder / 'token_space.json')
    splits = {}
    for split, n in ('train', 60), ('eval', 24), ('golden', 6):
        media = []
        captions = []
        for modality, meta in ('image', {'size': 4}), ('audio', {'n_samples': 8, 'sample_rate': 8}):
            first, end = grammar.bounds(grammar.payload_ranges[modality])
            quarter = (end - first) // 4
            for k in range(n):
                id = f'{split} {modality} {k}'
                kind = k % 4
                codes = first + kind * quarter + rng.integers(0, quarter)
                if shuffled and split == 'train':
                    kind = rng.integers(4)
                captions.append(Caption(id, len(media), texts[kind]))
                media.append(Medium(id, modality, codes, meta))
        side = write_shard(folder, f'{split}-00000', space, media, captions)
        splits[split] = {'shards': [{'name': side['name'], 'sha256': side['shard_sha256']}]}
    write_sealed(folder / 'index.json', {'token_space': space.sha256, 'splits': splits})
    (folder / 'gates.json').write_text(json.dumps({'passed': True, 'gates': []}))
    return folder


def tiny_space(tokenizer, image=IMAGE):
    base = {'name': 'tiny', 'text_rows': 512, 'tokenizer_sha256': uti.tokenizer_sha256(tokenizer),
            'end_of_text': tokenizer.convert_tokens_to_ids('<|im_end|>')}
    return TokenSpace(base, image, AUDIO)


class TinyUTI(StubUTI):
    """A codec of four patches and one of eight samples, over the tiny world's tokenizer."""
    @classmethod
    def build(cls, llm, *codecs, **sizes):
        tokenizer = AutoTokenizer.from_pretrained(llm)
        return cls(tiny_space(tokenizer), tokenizer)
