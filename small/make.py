"""
Stage 0: the small world. Data whose truth is known and base models trained on the spot, so that every stage runs on two
CPU cores without a network and its results can be checked.

reads   nothing
writes  data/small/{captions,instruct,sounds,text,llm,vision,image_codec,audio_codec}/
        formats: LLaVA JSON + images/, JSONL + audio/, JSONL, Hugging Face folders
done    when every part that was asked for is in place; a finished part is left alone

$ python -m small.make                                # every part
$ python -m small.make --parts="('captions','llm')"   # only these
$ python -m small.make --score=out/a1_small           # a stage's predictions against the truth; exits 1 below the bar
$ python -m small.make --score=out/b4_small           # the same, and what it drew and sounded by what is seen and heard

What a scene or a sound is and how it is drawn or played, named and read back: world.py. Scenes of `captions`,
`instruct` and `vision` come from different seeds; no scene is in both `captions` and `instruct`.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from small import corpus
from small.world import (
    BACKGROUNDS, COLOURS, NUMBERS, PATCH, PIXELS, PLACES, RATE, SHAPES, SIZES, Scene, Sound, Thing, agreement, caption,
    chat, choose, draw, hear, play, random_scene, random_sound, score_caption, score_sound_caption, see, sound_caption)

REPO = Path(__file__).resolve().parent.parent
ROOT = REPO / 'data' / 'small'
Named = namedtuple('Named', 'id')                      # an item of which only the id matters

# -----------------------------------------------------------------------------
# text


def make_text(folder, n_train=64_000, n_eval=1_000, n_replay=6_000):
    """train, eval and replay JSONL, one {"text", "told"} a line, told: how many characters of it cannot be predicted;
    the last two files are as varied as the end of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(101)
    for name, n in ('train', n_train), ('eval', n_eval), ('replay', n_replay):
        with open(folder / f'{name}.jsonl', 'w') as f:
            for k in tqdm(range(n), f'text/{name}', disable=None):
                told, rest = corpus.document(rng, k / n if name == 'train' else 1.0)
                f.write(json.dumps({'text': told + rest, 'told': len(told)}) + '\n')


# -----------------------------------------------------------------------------
# base models

SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>']


def make_tokenizer(texts, n_ids=700):
    """Qwen's byte-level BPE, with Qwen's way of splitting and its special tokens, trained on the texts."""
    from transformers import Qwen2Tokenizer

    plain = (re.sub('|'.join(map(re.escape, SPECIALS)), ' ', text) for text in texts)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(plain, n_ids, new_special_tokens=SPECIALS, show_progress=False)
    tokenizer.eos_token, tokenizer.pad_token = '<|im_end|>', '<|endoftext|>'
    return tokenizer


def optimizer_for(model, learning_rate):
    """Muon for the matrices inside the layers, AdamW for the rest: fewer steps to the same loss than AdamW alone."""
    import torch
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and '.layers.' in name]
    taken = set(map(id, inside))
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [torch.optim.Muon(inside, lr=learning_rate, weight_decay=0.01, adjust_lr_fn='match_rms_adamw'),
            torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))]


def half_dtype():
    """'bfloat16' where this machine's processor multiplies it, four times as fast as float32; else 'float32'."""
    import torch
    has = getattr(torch.cpu, 'get_capabilities', dict)()   # older torch does not say
    return 'bfloat16' if has.get('avx512_bf16') or has.get('amx_bf16') else 'float32'


def descend(model, loss_of_step, n_steps, learning_rate, title):
    """n_steps of training with a short warm-up and a linear way down. loss_of_step(step) -> scalar loss."""
    import torch
    half = half_dtype() == 'bfloat16'
    optimizers = optimizer_for(model, learning_rate)
    bar = tqdm(range(n_steps), title, disable=None)
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = learning_rate * min((step + 1) / 20, (n_steps - step) / (0.5 * n_steps), 1)
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f'{loss.item():.3f}')


def look_nearby(llm, dims=(5, 8), strength=0.05):
    """Half of the first layer's heads start by looking at the few places before them, as some heads of trained models
    do. One dimension of every embedding is the same; queries and keys made from it differ only by their rotation, so
    their product falls with the distance. `dims`: how many of the fastest rotations each such head uses."""
    import torch
    attention, width = llm.model.layers[0].self_attn, llm.config.head_dim
    with torch.no_grad():
        llm.model.embed_tokens.weight[:, -1] = 0.1
        attention.k_proj.weight[:12, -1] = 0.3
        for head, n in enumerate(dims):
            attention.q_proj.weight[head * width:head * width + n, -1] = 0.3
        torch.nn.init.normal_(attention.o_proj.weight[:, :len(dims) * width], std=strength)


def make_llm(folder, text_folder, batch=32, learning_rate=8e-3):
    """A tiny Qwen3 with its tokenizer: tied embeddings and more rows than ids, like the small Qwen3 models.

    Reads the corpus once, in its order, `batch` documents a step, each document attending to itself only.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from data import Row, collate, read_texts
    from model import VLM
    torch.manual_seed(102)
    train = [json.loads(line) for line in (text_folder / 'train.jsonl').read_text().splitlines()]
    tokenizer = make_tokenizer([document['text'] for document in train])
    end = tokenizer.convert_tokens_to_ids('<|endoftext|>')
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=768, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10_000,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=end))
    llm.set_attn_implementation('rows')
    for layer in llm.model.layers:                     # blocks that start as nothing let the words through at once
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    look_nearby(llm)
    model = VLM(None, None, llm)

    def rows_of(parts):
        """[(what is no label, what is)] -> [Row]"""
        ids = [tokenizer(list(texts))['input_ids'] for texts in zip(*parts)]
        return [Row(Named(str(n)), np.array(told + said, np.int32), np.arange(max(len(told), 1), len(told + said)), -1,
                    False) for n, (told, said) in enumerate(zip(*ids))]

    def losses_of(rows):
        return model.nll(collate(rows, [None] * len(rows), 0))

    def answers_right(n_things, kind, n=64):
        """Share of answers about n_things things in which every id has more than half of the probability."""
        rng, rows = np.random.default_rng(109), []
        while len(rows) < n:
            told, turns = corpus.interview(rng, n_things, 1, (kind,))
            if turns:
                asked, header, answer = corpus.chatml(told, turns).rpartition('assistant\n')
                rows += rows_of([(asked + header, answer)])
        worst = np.array([part.max().item() for part in losses_of(rows).split([len(r.labelled) for r in rows])])
        return round(float((worst < math.log(2)).mean()), 3)

    rows = rows_of([(d['text'][:d['told']], d['text'][d['told']:] + '<|endoftext|>') for d in train])
    descend(llm, lambda step: losses_of(sorted(rows[step * batch:(step + 1) * batch], key=len)).mean(),
            len(rows) // batch, learning_rate, 'llm')
    with torch.no_grad():
        held_out = [('', text + '<|endoftext|>') for text in read_texts(text_folder / 'eval.jsonl')]
        loss = losses_of(rows_of(held_out)).mean().item()
        right = {kind: answers_right(3, kind) for kind in dict.fromkeys(corpus.KINDS)}
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report = {'heldout_loss': round(loss, 4), 'heldout_perplexity': round(math.exp(loss), 3),
              'train_tokens': sum(len(r) for r in rows), 'answers_right_about_three_things': right}
    (folder / 'report.json').write_text(json.dumps(report))
    print(f'llm: {report}')


def edited(scene, rng):
    """The scene with one attribute of one object, or the background, changed: what a tower has to tell apart."""
    if rng.random() < 0.12:
        return scene._replace(background=choose(rng, BACKGROUNDS.keys() - {scene.background}))
    k = int(rng.integers(len(scene.things)))
    thing, free = scene.things[k], PLACES.keys() - {t.place for t in scene.things}
    key = choose(rng, ('size', 'colour', 'shape', 'shape', 'shape', 'place'))
    others = free if key == 'place' else set(
        {'size': SIZES, 'colour': COLOURS, 'shape': SHAPES}[key]) - {getattr(thing, key)}
    things = list(scene.things)
    things[k] = thing._replace(**{key: choose(rng, others)})
    return scene._replace(things=tuple(sorted(things, key=lambda t: list(PLACES).index(t.place))))


def make_vision(folder, n_steps=800, learning_rate=2e-3, n_groups=32, group=4):
    """A tiny SigLIP trained with its sigmoid loss on pairs of a picture and a text that names everything in it.

    Batches hold groups of near-identical scenes, so that shape, size and place have to be seen, not only colours; the
    first part shows one object at a time, which is learned sooner and helps with more.
    """
    import torch
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    def describe(scene):
        return ' '.join(f'{t.place} {t.size} {t.colour} {t.shape}' for t in scene.things) + f' {scene.background}'

    torch.manual_seed(103)
    rng = np.random.default_rng(103)
    tokenizer = make_tokenizer([describe(random_scene(rng)) for _ in range(500)])
    layers, length = {'hidden_size': 128, 'intermediate_size': 384, 'num_attention_heads': 4}, 18
    model = SiglipModel(SiglipConfig(
        text_config={**layers, 'num_hidden_layers': 2, 'vocab_size': len(tokenizer), 'max_position_embeddings': length,
                     'projection_size': 128, 'bos_token_id': None, 'eos_token_id': tokenizer.eos_token_id,
                     'pad_token_id': tokenizer.pad_token_id},
        vision_config={**layers, 'num_hidden_layers': 4, 'image_size': PIXELS, 'patch_size': PATCH}))
    with torch.no_grad():                              # SigLIP's start: temperature 10, bias -10
        model.logit_scale.fill_(math.log(10))
        model.logit_bias.fill_(-10)

    seen = set()

    def scenes_to_learn(n_things):
        scenes = []
        for _ in range(n_groups):
            scenes.append(random_scene(rng, n_things))
            for k in range(1, group):                  # edits of edits: some differ in one attribute, some in more
                scenes.append(edited(scenes[-1 - int(rng.integers(k))], rng))
        seen.update(scenes)
        return scenes

    def score(scenes):
        """SigLIP's output for these scenes, drawn and named."""
        pixels = torch.from_numpy(np.stack([draw(s, rng) for s in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
        text = tokenizer([describe(s) for s in scenes], padding='max_length', max_length=length, return_tensors='pt')
        return model(pixel_values=pixels, input_ids=text['input_ids'], return_loss=True)

    def loss_of_step(step):
        return score(scenes_to_learn(1 if step < 0.4 * n_steps else None)).loss

    descend(model, loss_of_step, n_steps, learning_rate, 'vision')

    report = tower_report(score, seen, rng)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={'height': PIXELS, 'width': PIXELS}).save_pretrained(folder)
    (folder / 'report.json').write_text(json.dumps(report))
    print(f'vision: {report}')


def tower_report(score, seen, rng):
    """How often a picture's own text scores highest: of 256 scenes, and of 8 that differ in an attribute or two.

    score(scenes) gives SigLIP's output; none of the scenes is one that was `seen`.
    """
    import torch

    def held_out(n, draw_one):
        """n different scenes that were not trained on."""
        found = []
        while len(found) < n:
            scene = draw_one()
            if scene not in seen and scene not in found:
                found.append(scene)
        return found

    def retrieval(groups):
        """Share of pictures whose own text scores highest among the texts of its group."""
        right = [score(scenes).logits_per_image.argmax(1) == torch.arange(len(scenes)) for scenes in groups]
        return round(torch.cat(right).float().mean().item(), 4)

    starts = held_out(64, lambda: random_scene(rng))
    near = [held_out(8, lambda scene=scene: edited(edited(scene, rng), rng)) for scene in starts]
    with torch.no_grad():
        return {'retrieval_of_256': retrieval([held_out(256, lambda: random_scene(rng))]),
                'retrieval_of_8_near_identical': retrieval(near)}


# -----------------------------------------------------------------------------
# the parts, on demand

def make_captions(folder, n=14_000, seed=104, kind='captions', taken=()):
    """LLaVA-Pretrain JSON, images/, and truth.json ({id: scene}). No scene twice, none of `taken`."""
    (folder / 'images').mkdir(parents=True)
    rng, records, truth, used = np.random.default_rng(seed), [], {}, set(taken)
    for k in tqdm(range(n), kind, disable=None):
        scene = random_scene(rng)
        while scene in used:                           # there are only 768 scenes with one object: later ones have more
            scene = random_scene(rng)
        used.add(scene)
        id, image = f'{kind}-{k:06d}', f'{k:06d}.png'
        Image.fromarray(draw(scene, rng)).save(folder / 'images' / image)
        record = {'id': id, 'image': image}
        if kind == 'captions':
            record['conversations'] = [{'from': 'human', 'value': 'Describe the image briefly.\n<image>'},
                                       {'from': 'gpt', 'value': caption(scene, rng)}]
        else:
            turns = chat(scene, rng)
            record['kinds'] = [t[0] for t in turns]
            record['conversations'] = [{'from': who, 'value': value} for _, ask, answer in turns
                                       for who, value in (('human', ask), ('gpt', answer))]
            record['conversations'][0]['value'] = '<image>\n' + record['conversations'][0]['value']
        records.append(record)
        truth[id] = scene
    (folder / 'data.json').write_text(json.dumps(records))
    (folder / 'truth.json').write_text(json.dumps(truth))


def make_instruct(folder):
    taken = [Scene(tuple(Thing(*t) for t in things), ground)
             for things, ground in json.loads((folder.parent / 'captions' / 'truth.json').read_text()).values()]
    make_captions(folder, n=6000, seed=105, kind='instruct', taken=taken)


def make_sounds(folder, n=2400, seed=108):
    """manifest.jsonl: {"id", "source", "audio", "text"} a line, two a clip; audio/; truth.json: {id: sound}."""
    import soundfile
    (folder / 'audio').mkdir(parents=True)
    rng, truth = np.random.default_rng(seed), {}
    with open(folder / 'manifest.jsonl', 'w') as f:
        for k in tqdm(range(n), 'sounds', disable=None):
            sound, audio, texts = random_sound(rng), f'audio/{k:06d}.wav', []
            soundfile.write(folder / audio, play(sound, rng), RATE, subtype='PCM_16')
            while len(texts) < 2:
                text = sound_caption(sound, rng)
                texts += [text] * (text not in texts)
            for n_text, text in enumerate(texts):
                id = f'sounds-{k:06d}-{n_text}'
                f.write(json.dumps({'id': id, 'source': 'sounds', 'audio': audio, 'text': text}) + '\n')
                truth[id] = sound
    (folder / 'truth.json').write_text(json.dumps(truth))


def make_image_codec(folder):
    from small.codecs import make_image_codec
    make_image_codec(folder)


def make_audio_codec(folder):
    from small.codecs import make_audio_codec
    make_audio_codec(folder)


PARTS = {                                              # part: what it needs, how it is made
    'captions': ((), make_captions),
    'instruct': (('captions',), make_instruct),
    'text': ((), make_text),
    'llm': (('text',), lambda folder: make_llm(folder, folder.parent / 'text')),
    'vision': ((), make_vision),
    'sounds': ((), make_sounds),
    'image_codec': ((), make_image_codec),
    'audio_codec': ((), make_audio_codec),
}
MODELS = ('llm', 'vision', 'image_codec', 'audio_codec')   # made side by side on one thread each


def ensure(*parts, root=ROOT):
    """Build the missing ones of these parts (and what they need); returns the small world's folder."""
    for part in parts:
        if part not in PARTS:
            raise SystemExit(f'no part is called {part!r}: wanted some of {", ".join(PARTS)}')
    missing = [part for part in parts if not (root / part).exists()]
    for part in missing:
        ensure(*PARTS[part][0], root=root)
        if part not in MODELS:
            build(part, root)
    code = 'import sys; from small import make; make.build(sys.argv[1], make.Path(sys.argv[2]))'
    quiet = {'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'TRANSFORMERS_VERBOSITY': 'error'}
    children = [subprocess.Popen([sys.executable, '-c', code, part, str(root)], cwd=REPO,
                                 env={**os.environ, 'OMP_NUM_THREADS': '1', **quiet})
                for part in missing if part in MODELS]
    if any([child.wait() for child in children]):
        raise SystemExit(f'{root}: a base model could not be made, its own message is above; run again to go on')
    return Path(os.path.relpath(root))


def build(part, root):
    """Make one part in a folder beside its place and rename it when it is whole; others that want it wait."""
    from common import writing                         # and torch with it: only when something is to be made
    with writing(root / part):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f'.{part}.lock'):
            if not (root / part).exists():
                beside = root / f'{part}.tmp'
                shutil.rmtree(beside, ignore_errors=True)
                PARTS[part][1](beside)
                os.replace(beside, root / part)


# -----------------------------------------------------------------------------
# a stage's predictions against the truth

def score_run(out_dir, root=ROOT):
    """{kind of caption or question: (right, asked)} of out_dir/predictions.jsonl, by what the scenes really hold.

    Captions and descriptions count attributes; every other answer is right when it is the true one to the letter.
    """
    try:
        lines = (Path(out_dir) / 'predictions.jsonl').read_text().splitlines()
    except OSError as e:
        raise SystemExit(f'{out_dir}: no predictions.jsonl ({e.strerror}); run the stage to its end first')
    predictions, tally = [json.loads(line) for line in lines], {}
    kind = 'instruct' if predictions and 'turn' in predictions[0] else 'captions'
    truth = json.loads((root / kind / 'truth.json').read_text())
    asked_for = {r['id']: r.get('kinds') for r in json.loads((root / kind / 'data.json').read_text())}
    for p in predictions:
        things, background = truth[p['id']]
        scene = Scene(tuple(Thing(*t) for t in things), background)
        name = f"{NUMBERS[len(things)]} object{'s' * (len(things) > 1)}"
        if kind == 'instruct':
            name = asked_for[p['id']][p['turn']]
        right, asked = score_caption(p['prediction'], scene)
        if kind == 'instruct':                         # every answer counts one; a description, its share of attributes
            right, asked = right / asked if name == 'describe' else p['prediction'] == p['truth'], 1
        before = tally.get(name, (0, 0))
        tally[name] = (before[0] + right, before[1] + asked)
    return tally


def score_tokens(out_dir, root=ROOT):
    """{task: (right, asked)} of the attributes in a B4 run's predictions/, and in what it said of the golden items at
    its first and at its last checkpoint. Texts are read, pictures and sounds are seen and heard."""
    import soundfile
    out, tally = Path(out_dir), {}
    scenes, sounds = (json.loads((root / kind / 'truth.json').read_text()) for kind in ('captions', 'sounds'))
    steps = sorted((out / 'golden').glob('step_*'))
    files = {path.stem: path for path in sorted((out / 'predictions').glob('*.jsonl'))}
    files.update({f'{task} {when}': steps[n] / f'{task}.jsonl' for task in ('i2t', 'a2t') if task in files
                  for when, n in (('first', 0), ('last', -1))})
    for name, path in files.items():
        right, asked, task = 0, 0, name[:3]
        for n, p in enumerate(map(json.loads, path.read_text().splitlines())):
            if task in ('i2t', 't2i'):
                things, background = scenes[p['id']]
                true = Scene(tuple(Thing(*t) for t in things), background)
            else:
                true = Sound(*sounds[p['id']])
            if task == 't2i':
                r, a = agreement(see(Image.open(path.with_suffix('') / f'{n:03d}.png')), true)
            elif task == 't2a':
                r, a = agreement(hear(soundfile.read(path.with_suffix('') / f'{n:03d}.wav')[0]), true)
            else:
                r, a = (score_caption if task == 'i2t' else score_sound_caption)(p['prediction'], true)
            right, asked = right + r, asked + a
        tally[name] = right, asked
    return tally


if __name__ == '__main__':
    from configure import configure
    parts = tuple(PARTS)           # what to build
    score = ''                     # or: an out dir whose predictions to score
    bar = 0.90                     # below this share the score's exit status is 1
    bar_written = 0.85             # the same for what a B4 run drew and sounded
    points_lost = 0.02             # so much less than at first may it describe right at last
    configure(globals())
    if score:
        bars = {'all': bar}
        if (Path(score) / 'predictions').is_dir():
            tally = score_tokens(score)
            bars = {task: bar_written if task[:2] == 't2' else bar for task in tally if len(task) == 3}
            bars.update({f'{task} last': tally[f'{task} first'][0] / max(tally[f'{task} first'][1], 1) - points_lost
                         for task in ('i2t', 'a2t') if task in tally})
        else:
            tally = score_run(score)
            tally['all'] = tuple(map(sum, zip(*tally.values()))) if tally else (0, 0)
        for name, (right, asked) in sorted(tally.items()):
            print(f'{name:<12} {right / max(asked, 1):7.2%}  {right:.4g} of {asked}')
        (Path(score) / 'truth.json').write_text(json.dumps(tally))
        for name, wanted in bars.items():
            right, asked = tally[name]
            if not asked or right / asked < wanted:
                raise SystemExit(f'{score}: {name} {right / max(asked, 1):.2%} right, wanted {wanted:.0%}')
        if not bars:
            raise SystemExit(f'{score}: no predictions to score; run the stage to its end first')
    else:
        print(f'the small world is in {ensure(*parts)}')
