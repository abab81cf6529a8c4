"""
The small world's base models: a tiny Qwen3 that reads and writes its text, and a tiny SigLIP that sees its pictures.

Letters: B examples, M labels.
"""
import json
import math
import re

import numpy as np
import torch
from transformers import (
    Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipConfig, SiglipImageProcessorPil, SiglipModel)

from common import Progress, frozen_dtype
from data import collate
from examples import NO_IMAGES, Example
from lists import Item, read_texts
from decoders import save_pretrained
from model import VLM
from small import corpus
from small.world import (
    BACKGROUNDS, COLOURS, PATCH, PIXELS, PLACES, SHAPES, SIZES, choose, draw, part_seed, random_scene)

# -----------------------------------------------------------------------------
# what both base models are made with

QWEN_SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>']


def make_tokenizer(texts, n_ids=700):
    """Qwen's byte-level BPE, with Qwen's way of splitting and its special tokens, trained on the texts."""
    special = re.compile('|'.join(map(re.escape, QWEN_SPECIALS)))
    plain = (special.sub(' ', text) for text in texts)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        plain, n_ids, new_special_tokens=QWEN_SPECIALS, show_progress=False)
    tokenizer.eos_token = '<|im_end|>'
    tokenizer.pad_token = '<|endoftext|>'
    return tokenizer


def optimizers_for(model, learning_rate):
    """Muon for the matrices inside the layers, AdamW for the rest: fewer steps to the same loss than AdamW alone."""
    inside = []
    rest = []
    for name, p in model.named_parameters():
        group = inside if p.ndim == 2 and '.layers.' in name else rest
        group.append(p)
    optimizers = [torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))]
    if inside:
        optimizers.insert(0, torch.optim.Muon(inside, lr=learning_rate, weight_decay=0.01,
                                              adjust_lr_fn='match_rms_adamw'))
    return optimizers


def descend(model, loss_of_step, n_steps, learning_rate, title, position=0):
    """n_steps of training with a short warm-up and a linear way down. loss_of_step(step) -> scalar loss."""
    # where the CPU multiplies bfloat16, it does so four times as fast as float32
    bfloat16 = frozen_dtype('auto', torch.device('cpu')) == torch.bfloat16
    optimizers = optimizers_for(model, learning_rate)
    bar = Progress(n_steps, title, position=position)
    for step in range(n_steps):
        # up in 20 steps, down to nothing over the second half
        lr = learning_rate * min((step + 1) / 20, (n_steps - step) / (0.5 * n_steps), 1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.update(loss=loss.item())
    bar.close()


def save_base_model(folder, *parts, report):
    for part in parts:
        save_pretrained(part, folder)
    (folder / 'report.json').write_text(json.dumps(report))


# -----------------------------------------------------------------------------
# the language model


def make_llm(folder, batch=32, learning_rate=8e-3, seed=1, position=0):
    """A tiny Qwen3 with its tokenizer: tied embeddings and more rows than ids, like the small Qwen3 models.

    Reads the corpus once, in its order, `batch` documents per step, each document attending to itself only.
    """
    torch.manual_seed(part_seed('llm', seed))
    documents = [json.loads(line) for line in (folder.parent / 'text' / 'train.jsonl').read_text().splitlines()]
    tokenizer = make_tokenizer([document['text'] for document in documents])
    llm = tiny_qwen3(tokenizer)
    model = VLM(None, None, llm)

    def losses_of(examples):
        return model.nll(collate(examples))            # (M,), of all labels

    def loss_of_step(step):
        examples = train_set[step * batch:(step + 1) * batch]
        return losses_of(sorted(examples, key=len)).mean()   # sorted: attention pads to the longest of its group

    pairs = []
    for document in documents:
        text = document['text'] + '<|endoftext|>'
        pairs.append((text[:document['n_context']], text[document['n_context']:]))
    train_set = text_examples(tokenizer, pairs)
    descend(llm, loss_of_step, len(train_set) // batch, learning_rate, 'llm', position)
    with torch.no_grad():
        # all tokens are labels here, those of the contexts too: this loss stays above that of training
        texts = read_texts(folder.parent / 'text' / 'eval.jsonl')
        loss = losses_of(text_examples(tokenizer, [('', text + '<|endoftext|>') for text in texts])).mean().item()
        right = {}
        for kind in dict.fromkeys(corpus.KINDS):
            right[kind] = answers_right(tokenizer, losses_of, kind, seed)
    save_base_model(folder, llm, tokenizer, report={
        'heldout_loss': round(loss, 4), 'heldout_perplexity': round(math.exp(loss), 3),
        'train_tokens': sum(len(example) for example in train_set), 'answers_right_about_three_things': right})


def tiny_qwen3(tokenizer):
    """0.9 M parameters, with a start from which looking up words is learned sooner than from the usual one."""
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=768,                                # rows to spare above the tokenizer's ids, as in the real one
        tie_word_embeddings=True,                      # as in the real ones up to 4B
        hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=1024, rope_theta=10_000,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    llm.set_attn_implementation('unpadded')
    for layer in llm.model.layers:                     # blocks that start as nothing let the words through at once
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    look_nearby(llm)
    return llm


def look_nearby(llm, dims=(5, 8), strength=0.05):
    """Half of the first layer's heads start by looking at the few positions before them, as in trained models.

    One dimension of every embedding is the same. Queries and keys made from it differ only by their rotation, so their
    product falls with the distance. dims: the number of the fastest rotations that each such head uses.
    """
    attention = llm.model.layers[0].self_attn
    width = llm.config.head_dim
    with torch.no_grad():
        llm.model.embed_tokens.weight[:, -1] = 0.1
        attention.k_proj.weight[:12, -1] = 0.3         # the fastest rotations come first
        for head, n in enumerate(dims):
            attention.q_proj.weight[head * width:head * width + n, -1] = 0.3
        torch.nn.init.normal_(attention.o_proj.weight[:, :len(dims) * width], std=strength)


def text_examples(tokenizer, pairs):
    """[(context, answer)] -> [Example], the ids of the answer being labels."""
    contexts, answers = zip(*pairs)
    contexts = tokenizer(list(contexts))['input_ids']
    answers = tokenizer(list(answers))['input_ids']
    examples = []
    for n, (context, answer) in enumerate(zip(contexts, answers)):
        ids = np.array(context + answer, np.int32)
        label_positions = np.arange(max(len(context), 1), len(ids))    # nothing is before the first id to predict it
        examples.append(Example(Item(str(n), (), ()), ids, label_positions, NO_IMAGES, truncated=False))
    return examples


def answers_right(tokenizer, losses_of, kind, seed, n=64):
    """Share of answers, to one kind of question about three things, whose every id has more than half of the
    probability."""
    rng = np.random.default_rng(part_seed('llm_report', seed))
    pairs = []
    while len(pairs) < n:
        description, turns = corpus.interview(rng, n_things=3, n_turns=1, kinds=(kind,))
        if turns:                                      # else the question had no one answer
            question, header, answer = corpus.as_chat(description, turns).rpartition('assistant\n')
            pairs.append((question + header, answer))
    examples = text_examples(tokenizer, pairs)
    losses = losses_of(examples).split([len(example.label_positions) for example in examples])
    right = [part.max().item() < math.log(2) for part in losses]   # the worst id of each answer
    return round(np.mean(right).item(), 3)


# -----------------------------------------------------------------------------
# the vision tower


def make_vision(folder, n_steps=800, learning_rate=2e-3, n_groups=32, group=4, seed=1, position=0):
    """A tiny SigLIP trained with its sigmoid loss on pairs of a picture and a text that names everything in it.

    Batches hold groups of near-identical scenes, so that shape, size and place count and not only colours; the first
    part shows one object at a time, which is learned sooner and helps with more.
    """
    torch.manual_seed(part_seed('vision', seed))
    rng = np.random.default_rng(part_seed('vision', seed))
    tokenizer = make_tokenizer([in_words(random_scene(rng)) for _ in range(500)])
    model = tiny_siglip(tokenizer)
    trained_on = set()

    def compare(scenes):
        """SigLIP's output for these scenes, drawn and in words."""
        pixels = torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes]))    # (B, 64, 64, 3) uint8
        texts = tokenizer([in_words(scene) for scene in scenes], padding='max_length', return_tensors='pt',
                          max_length=model.config.text_config.max_position_embeddings)
        return model(pixel_values=pixels.permute(0, 3, 1, 2) / 127.5 - 1, input_ids=texts['input_ids'],
                     return_loss=True)

    def loss_of_step(step):
        n_things = 1 if step < 0.4 * n_steps else None   # None: as many as random_scene likes
        scenes = []
        for _ in range(n_groups):
            scenes += similar_scenes(rng, n_things, group)
        trained_on.update(scenes)
        return compare(scenes).loss

    descend(model, loss_of_step, n_steps, learning_rate, 'vision', position)
    report = tower_report(compare, trained_on, rng)
    processor = SiglipImageProcessorPil(size={'height': PIXELS, 'width': PIXELS})
    save_base_model(folder, model, tokenizer, processor, report=report)


def in_words(scene):
    """top left small red circle bottom right big blue cross gray"""
    things = [f'{thing.place} {thing.size} {thing.colour} {thing.shape}' for thing in scene.things]
    return ' '.join([*things, scene.background])


def tiny_siglip(tokenizer):
    layers = {'hidden_size': 128, 'intermediate_size': 384, 'num_attention_heads': 4}
    text_config = {
        **layers, 'num_hidden_layers': 2, 'projection_size': 128, 'vocab_size': len(tokenizer),
        'max_position_embeddings': 18,                 # three objects and a background are 16 tokens
        'bos_token_id': None, 'eos_token_id': tokenizer.eos_token_id, 'pad_token_id': tokenizer.pad_token_id}
    vision_config = {**layers, 'num_hidden_layers': 4, 'image_size': PIXELS, 'patch_size': PATCH}
    model = SiglipModel(SiglipConfig(text_config=text_config, vision_config=vision_config))
    model.set_attn_implementation('whole')             # of model.py: a third of a step is saved in bf16
    with torch.no_grad():                              # SigLIP's start: temperature 10, bias -10
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)
    return model


def similar_scenes(rng, n_things, n):
    """n scenes, each after the first an edit of one before it: some differ in one attribute, some in more."""
    scenes = [random_scene(rng, n_things)]
    for k in range(1, n):
        scenes.append(edited(scenes[-1 - int(rng.integers(k))], rng))
    return scenes


def edited(scene, rng):
    """The scene with one attribute of one object, or the background, changed: what a tower has to tell apart."""
    if rng.random() < 0.12:
        return scene._replace(background=choose(rng, BACKGROUNDS.keys() - {scene.background}))
    things = list(scene.things)
    k = int(rng.integers(len(things)))
    attribute = choose(rng, ('size', 'colour', 'shape', 'shape', 'shape', 'place'))
    options = {'size': SIZES, 'colour': COLOURS, 'shape': SHAPES, 'place': PLACES}[attribute]
    others = set(options) - {getattr(things[k], attribute)}
    if attribute == 'place':
        others -= {thing.place for thing in things}
    things[k] = things[k]._replace(**{attribute: choose(rng, others)})
    # one that moved may have to move in the list: things stand in reading order
    things.sort(key=lambda thing: list(PLACES).index(thing.place))
    return scene._replace(things=tuple(things))


def tower_report(compare, trained_on, rng):
    """Shares of pictures whose own text scores highest: of 256 scenes, and of 8 that differ in an attribute or two.

    compare(scenes) gives SigLIP's output. None of the scenes was trained on.
    """
    def held_out(n, draw_one):
        """n different scenes that draw_one() makes."""
        found = []
        while len(found) < n:
            scene = draw_one()
            if scene not in trained_on and scene not in found:
                found.append(scene)
        return found

    def retrieval(groups):
        right = []
        for scenes in groups:
            best = compare(scenes).logits_per_image.argmax(1)
            right.append(best == torch.arange(len(scenes)))
        return round(torch.cat(right).float().mean().item(), 4)

    # the near ones are edits of edits, so the scene between them need not be among the eight
    starts = held_out(64, lambda: random_scene(rng))
    near = []
    for scene in starts:
        near.append(held_out(8, lambda scene=scene: edited(edited(scene, rng), rng)))
    with torch.no_grad():
        of_256 = retrieval([held_out(256, lambda: random_scene(rng))])
        return {'retrieval_of_256': of_256, 'retrieval_of_8_near_identical': retrieval(near)}
