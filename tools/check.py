"""
Will a chain of stages come to its end? Finds in under a minute what would fail after a day; no model is built.

reads   configs of any stages, and what they name; data is looked at in samples
writes  a line for each finding: ok, note or WRONG, the config, what was found
done    when all of it has been looked at; exits 1 when something is WRONG

$ python -m tools.check configs/a1_qwen3_8b.py configs/a2_qwen3_8b.py
$ python -m tools.check configs/b2_qwen3_0.6b.py configs/b4_qwen3_0.6b.py --card_gib=24 --ranks=1

A config's stage is what its name says (a1_mine.py, mine_a1.py), else that of the one script that takes its settings.
The network is not asked: of a hub name only what is in the local cache is looked at.
"""
import contextlib
import io
import itertools
import math
import os
import re
import shutil
import sys
from pathlib import Path

from transformers import Qwen3Config, SiglipVisionConfig

from common import first_line, has_checkpoint
from configure import configure
from templates import ChatTemplate
from gates import require_passed
from decoders import load_tokenizer
from small import make
from tools.check_data import (
    FROM, N_SAMPLED, REPO, Stage, check_files, check_held_out, check_lists, check_shards, check_texts, local_folder,
    same_path, say_bad, spread)
from tools.memory import GIB, KNOWN, Step, Trained, known_config, memory_needed
from uti import TASKS, TokenSpace

SCRIPTS = {'a11': 'sweep_a11.py', 'a1': 'train_a1.py', 'a2': 'train_a2.py', 'b1': 'uti.py', 'b2': 'build_b2.py',
           'b3': 'train_b3.py', 'b4': 'train_b4.py'}
READ_AND_WRITE = [task for task, (modality, _) in TASKS.items() if modality]
SAME = ('llm', 'image_codec', 'image_prefix', 'audio_codec', 'audio_prefix')   # along a chain
TYPICAL = {'a1': (128, 40, 1), 'a2': (1024, 400, 1)}   # tokens, labels and images where they are not known
PICTURE_CODES = {'deepseek-community/Janus-Pro-1B': (24 * 24, 16_384)}         # codes of a picture, of how many
SOUND_CODES = {'kyutai/mimi': (12.5, 32, 2048)}        # frames a second, codebooks, codes of each

# -----------------------------------------------------------------------------
# settings


def read_settings(kind, path, flags=()):
    """(settings, parts of the small world that are missing) of a config. The script runs as far as it judges its
    settings, so that its own lines say what is wrong with them; a config's ensure() builds nothing."""
    script = REPO / SCRIPTS[kind]
    above = re.split(r'^ *(?:rank, world_size, device = init_ranks|lock = lock_run)\(', script.read_text(),
                     flags=re.MULTILINE)[0]
    not_made = []

    def look(*parts):
        not_made.extend(make.missing_parts(parts, make.ROOT))
        return Path(os.path.relpath(make.ROOT))

    ensure, make.ensure = make.ensure, look
    argv, sys.argv = sys.argv, [str(script), str(path), *flags]
    namespace = {'__name__': '__main__', '__file__': str(script)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(above, script, 'exec'), namespace)
    except Exception as e:                             # a config is code, which may raise anything
        raise SystemExit(f'{path}: {type(e).__name__}: {first_line(e)}')
    finally:
        make.ensure, sys.argv = ensure, argv
    return namespace['config'], not_made


def stage_of(path):
    """The kind of a config, by a word of its name or by the only script that takes it."""
    for word in re.split(r'\W|_', Path(path).stem):
        if word in SCRIPTS:
            return word
    fits = []
    for kind in SCRIPTS:
        with contextlib.suppress(SystemExit):
            read_settings(kind, path)
            fits.append(kind)
    if len(fits) != 1:
        raise SystemExit(f'{path}: fits the settings of {", ".join(fits) or "no stage"}; name it like a1_mine.py, with '
                         f'one of {", ".join(SCRIPTS)}')
    return fits[0]


def read_sweep(sweep):
    """(settings, missing parts) of the last run of a sweep; every point of its grid has to be one that A1 takes."""
    points = [dict(zip(sweep['grid'], values)) for values in itertools.product(*sweep['grid'].values())]
    if not sweep['grid'] or not points:
        raise SystemExit(f'grid = {sweep["grid"]!r} has no point')
    for point in points:
        flags = [f'--{key}={value}' for key, value in {**sweep['overrides'], **point}.items()]
        found = read_settings('a1', sweep['base_config'], [*flags, f'--out_dir={sweep["out_dir"]}'])
    return found


def read_stage(path, chain):
    """The Stage of a config, whose settings may be wrong."""
    try:
        kind = stage_of(path)
        settings, not_made = read_settings(kind, path)
        if kind == 'a11':
            settings, not_made = read_sweep(settings)
        for name in 'task_weights', 'task_weights_start':
            if wrong := settings.get(name, {}).keys() - READ_AND_WRITE:
                raise SystemExit(f'{name} names {", ".join(wrong)}: wanted some of {", ".join(READ_AND_WRITE)}')
    except SystemExit as e:
        stage = Stage(path, chain)
        stage.wrong(str(e).removeprefix(f'{path}: '))
        return stage
    stage = Stage(path, chain, kind.replace('a11', 'a1'), settings, not_made)
    stage.ok(f'{SCRIPTS[kind]} takes its settings')
    if not_made:
        stage.note(f'data/small has no {", ".join(sorted(set(not_made)))} yet: the first start makes what is missing, '
                   'or python -m small.make; not checked')
    return stage


# -----------------------------------------------------------------------------
# the chain



def check_inputs(stage):
    """Each folder that a stage reads is made by a config given here, or is there with gates that passed."""
    for name in FROM:
        folder = stage.settings.get(name)
        if not folder:
            continue
        other = stage.before(name)
        if other is None or Path(folder, 'gates.json').exists():
            try:
                require_passed(folder, stage.settings['allow_failed_gates'])
                stage.ok(f'{name}: {folder} is there and may be used')
            except SystemExit as e:
                say = stage.note if other else stage.wrong
                say(f'{name}: {e}' + (f' (made by {other.path})' if other else ''))
        else:
            stage.ok(f'{name}: {folder} is made by {other.path}')
        for key in SAME if other else ():
            mine = stage.setting(key)
            theirs = other.setting(key)
            if key in stage.settings | {'llm': 0} and theirs is not None and mine is not None and mine != theirs:
                stage.wrong(f'{key} = {mine!r}, but {other.path} has {theirs!r}: they have to be the same')
    out = stage.settings['out_dir']
    for other in stage.chain:
        if other is not stage and same_path(other.settings.get('out_dir'), out):
            stage.wrong(f'out_dir = {out!r} is also that of {other.path}')
    if has_checkpoint(Path(out, 'ckpt')) and not stage.settings.get('resume', True):
        try:
            require_passed(out, False)
            stage.note(f'{out} has finished and passed already')
        except SystemExit:
            stage.wrong(f'{out} holds a checkpoint: add --resume=True to go on with it, or set another out_dir')


# -----------------------------------------------------------------------------
# lengths, memory, time, disk



def codes_of(stage):
    """{modality: (codes of a file, ids that they are of)} of a Track B stage, as far as they are known."""
    settings = stage.settings
    for folder in settings.get('audit_dir'), settings.get('shards_dir'), settings['out_dir']:
        if folder and Path(folder, 'token_space.json').exists():
            space = TokenSpace.load(Path(folder, 'token_space.json'))
            found = {}
            if space.image:
                found['image'] = (math.prod(space.image['grid']), space.image['codes'])
            if space.audio:
                books = space.audio['codebooks']
                found['audio'] = (space.audio['frames'] * books, space.audio['codes'] * books)
            return found
    for name in 'audit_dir', 'shards_dir':
        other = stage.before(name)
        if other:
            return codes_of(other)
    found = {}
    if settings.get('image_codec') in PICTURE_CODES:
        found['image'] = PICTURE_CODES[settings['image_codec']]
    if settings.get('audio_codec') in SOUND_CODES and 'clip_seconds' in settings:
        rate, all_books, codes = SOUND_CODES[settings['audio_codec']]
        books = settings['audio_codebooks'] or all_books
        found['audio'] = (math.ceil(settings['clip_seconds'] * rate) * books, codes * books)
    return found


def check_lengths(stage):
    """max_seq_len against image tokens or codes, and the share of samples that it cuts."""
    most = stage.settings['max_seq_len']
    if stage.kind in ('a1', 'a2'):
        room = most - (stage.setting('num_image_tokens') or 0) - 2
    else:
        room = most - max([n for n, _ in codes_of(stage).values()], default=0) - 3
    if room < 8:
        stage.wrong(f'max_seq_len = {most} leaves {max(room, 0)} tokens for text after the image or its codes')
        return
    folder = local_folder(stage.setting('llm') or '-')
    if not stage.samples or not folder or stage.kind == 'b1':
        return
    sampled = spread(stage.samples, N_SAMPLED)
    if stage.kind == 'b2':
        tokenizer = load_tokenizer(folder)
        cut = sum(len(tokenizer.encode(sample.text if hasattr(sample, 'text') else sample.turns[0][1])) > room
                  for sample in sampled)
        if cut:
            about = round(cut / len(sampled) * len(stage.samples))
            say_bad(stage, about, f'about {about} samples are longer than max_seq_len = {most} and are left out')
        return
    template = ChatTemplate(load_tokenizer(folder), stage.setting('num_image_tokens') or 0, most)
    make_example = template.caption if stage.kind == 'a1' else template.chat
    examples = [make_example(sample) for sample in sampled]
    stage.longest = (max(map(len, examples)), max(len(example.label_positions) for example in examples),
                     max(len(example.image_starts) for example in examples))
    cut = sum(example.truncated for example in examples) / len(examples)
    say = stage.wrong if cut > stage.settings['gate_truncated'] else stage.ok
    say(f'{cut:.1%} of the samples are cut at max_seq_len = {most}; the longest has {stage.longest[0]} tokens')


def base_config(name, cls):
    """The config of a base model by name, or None where this machine does not know it."""
    if name and (name in KNOWN or local_folder(name)):
        return known_config(name if name in KNOWN else local_folder(name), cls)


def check_memory(stage, card_gib, ranks):
    """A step's memory by tools/memory.py against the card."""
    settings = stage.settings
    track_a = stage.kind in ('a1', 'a2')
    llm = base_config(stage.setting('llm'), Qwen3Config)
    tower = base_config(stage.setting('vision'), SiglipVisionConfig) if track_a else None
    codes = {} if track_a else codes_of(stage)
    if llm is None or (tower is None if track_a else not codes):
        stage.note('memory: not checked, the sizes of its base models or codecs are not known here')
        return
    shape = {}
    where = {'ranks': ranks, 'checkpointing': settings['gradient_checkpointing'],
             'shard': settings['shard'] and ranks > 1}
    if track_a:
        tokens, labels, images = stage.longest or TYPICAL[stage.kind]
        for name in 'num_image_tokens', 'connector_width', 'connector_depth', 'connector_heads':
            shape[name.removeprefix('connector_')] = stage.setting(name)
        shape['vision_ln'] = bool(stage.setting('vision_ln'))
        step = Step(settings['micro_batch_size'], tokens, labels, images=images, **where)
    else:
        most = max(n for n, _ in codes.values())
        tokens = min(most + 100, settings['max_seq_len'])
        _, code_range = codes.get('image', codes.get('audio'))
        step = Step(settings['micro_batch_size'], tokens, 20, codes=most + 1, code_range=code_range, **where)
    trained = Trained(shape, 4 + sum(ids for _, ids in codes.values()), lora_r=settings.get('lora_r', 16),
                      lora_dropout=settings.get('lora_dropout', 0.0), full_tune=settings.get('full_tune', False))
    peak = memory_needed(stage.kind, llm, tower, step, trained)['peak'] / GIB
    text = (f'{peak:.1f} GiB by formula for {step.micro_batch_size} examples of {tokens} tokens, on a card of '
            f'{card_gib:g}')
    if peak * 1.1 + 1 <= card_gib:                     # as in docs/bigger.md: the allocator, and CUDA itself
        stage.ok(f'memory: {text}')
    else:
        stage.wrong(f'memory: {text} with a tenth and 1 GiB to spare: lower micro_batch_size, or set '
                    'gradient_checkpointing or shard')


def check_time(stage, ranks):
    """Steps, and passes over the data."""
    settings = stage.settings
    batch = settings['global_batch_size']
    n_micro = math.ceil(batch / settings['micro_batch_size'])
    if n_micro % ranks:
        stage.note(f'a step is {n_micro} x micro_batch_size on {ranks} GPUs: some of them wait')
    n_steps = settings['n_steps']
    if n_steps or settings['epoch_samples']:
        n_steps = n_steps or max(1, round(settings['epochs'] * settings['epoch_samples'] / batch))
        if settings['eval_every'] > n_steps:
            stage.note(f'eval_every = {settings["eval_every"]}: no checkpoint before the end, step {n_steps}')
        text = f'{n_steps} steps of {batch}'
    else:
        text = f'as many steps of {batch} as {settings["epochs"]:g} x {settings["epoch_minutes"]:g} minutes allow'
    for name, share, n_train in sizes_of_a_pass(stage):
        if n_steps:
            text += f'; {share * n_steps * batch / n_train:.2f} passes over {n_train} {name}'
        else:
            text += f'; one pass over {n_train} {name} is {math.ceil(n_train / share / batch)} steps'
    stage.ok(text)


def sizes_of_a_pass(stage):
    """[(what, its share of the examples of a step, how many there are)], where that is known."""
    settings = stage.settings
    replayed = settings['replay_share'] if settings.get('replay_jsonl') else 0.0
    n_train = len(stage.samples) - settings['n_eval'] - settings['n_golden']
    if stage.samples and n_train > 0:
        return [('samples', 1 - replayed, n_train)]
    found = []
    weights = settings.get('task_weights', {})
    for task, weight in weights.items():
        n_train = stage.n_train.get(TASKS[task][0])
        if weight > 0 and n_train:
            found.append((f'of {task}', (1 - replayed) * weight / sum(weights.values()), n_train))
    return found


def check_cache(stage):
    """Disk for the tower's features."""
    folder = stage.settings.get('feature_cache')
    tower = base_config(stage.setting('vision'), SiglipVisionConfig)
    if not folder or tower is None or not stage.media:
        return
    patches = (tower.image_size // tower.patch_size) ** 2
    size = 2 * patches * tower.hidden_size * len(stage.media.get('image', ())) / GIB
    place = Path(folder)
    while not place.exists():
        place = place.absolute().parent
    free = shutil.disk_usage(place).free / GIB
    say = stage.wrong if size > free else stage.ok
    say(f'feature_cache: {size:.1f} GiB in {folder}, where {free:.0f} are free')


def check(paths, card_gib, ranks):
    """Look at these configs; returns how many things are wrong."""
    chain = []
    for path in paths:
        chain.append(read_stage(path, chain))
    stages = [stage for stage in chain if stage.kind]

    def look(check, stage, *args):
        try:
            return check(stage, *args)
        except SystemExit as e:                        # what a reader of the stages says of its input
            stage.wrong(str(e))

    for stage in stages:
        if check_files(stage):
            look(check_lists, stage)
            if 'text_jsonl' in stage.settings:
                look(check_texts, stage)
    for stage in stages:
        check_inputs(stage)
        check_held_out(stage)
        if 'shards_dir' in stage.settings:
            look(check_shards, stage)
        if 'max_seq_len' in stage.settings:
            look(check_lengths, stage)
        if 'global_batch_size' in stage.settings:
            look(check_memory, stage, card_gib, ranks)
            check_time(stage, ranks)
        look(check_cache, stage)
    return sum(stage.n_wrong for stage in chain)


if __name__ == '__main__':
    # -----------------------------------------------------------------------------
    # settings; override any with --key=value
    card_gib = 80.0                # memory of a GPU
    ranks = 8                      # GPUs in all
    config = configure(globals(), [arg for arg in sys.argv[1:] if arg.startswith('-')])
    # -----------------------------------------------------------------------------
    paths = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
    if not paths:
        raise SystemExit('no config is given: wanted some, like configs/a1_small.py')
    n_wrong = check(paths, card_gib, ranks)
    print(f'{n_wrong} WRONG' if n_wrong else 'nothing is wrong, as far as this can tell')
    sys.exit(1 if n_wrong else 0)
