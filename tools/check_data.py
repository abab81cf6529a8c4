"""
What tools/check.py looks at of the data: the files that a config names, its lists, its texts, what is held out of them.
Media and lengths are looked at in samples that are spread over the lists.
"""
import json
import math
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors.numpy import load_file

from grounding import SET_SIZE, shared_phrases
from lists import Item, read_llava, read_texts
from media import BadSample, read_audio, read_image
from shards import KINDS, read_index, read_manifest, read_sound_folder
from uti import TASKS

REPO = Path(__file__).resolve().parent.parent
SMALL = REPO / 'data' / 'small'
DATA = ('data_json', 'image_root', 'manifests', 'manifest_jsonl', 'sound_dir', 'sound_captions', 'text_jsonl',
        'replay_jsonl')
MODELS = ('llm', 'vision', 'image_codec', 'audio_codec')
FROM = {'align_dir': 'a1', 'audit_dir': 'b1', 'shards_dir': 'b2', 'new_rows_dir': 'b3'}   # setting: who writes it
N_SAMPLED = 1000               # media files whose existence is looked at, and samples that become tokens
N_DECODED = 8                  # of them, decoded to their end
B1_ITEMS = 32                  # of each modality, by B1's first gate


@dataclass
class Stage:
    """A config, and what has been found out about it."""
    path: str
    chain: list                        # all stages that are looked at, this one too
    kind: str = ''                     # a1, a2, b1, b2, b3 or b4; '' where the config is wrong; a sweep's runs are a1
    settings: dict = field(default_factory=dict)
    not_made: list = field(default_factory=list)       # parts of the small world that it names and that are missing
    samples: list = field(default_factory=list)        # Items or CaptionedMedia of its lists
    media: dict = field(default_factory=dict)          # modality: [path], each once
    n_train: dict = field(default_factory=dict)        # B3, B4: modality: captions to train on
    longest: tuple = ()                # tokens, labels and images of the longest example sampled
    n_wrong: int = 0

    def say(self, kind, text):
        self.n_wrong += kind == 'WRONG'
        print(f'{kind:<5} {self.path}: {text}', flush=True)

    def ok(self, text):
        self.say('ok', text)

    def note(self, text):
        self.say('note', text)

    def wrong(self, text):
        self.say('WRONG', text)

    def before(self, name):
        """The stage of the chain that writes what the setting of this name reads, or None."""
        for other in self.chain:
            if other.kind == FROM[name] and same_path(other.settings['out_dir'], self.settings.get(name)):
                return other

    def setting(self, name):
        """A setting, of the stage that this one goes on from where it has none; that may have run before."""
        if self.settings.get(name):
            return self.settings[name]
        for folder in 'align_dir', 'new_rows_dir':
            if self.settings.get(folder):
                other = self.before(folder)
                log = Path(self.settings[folder], 'log.jsonl')
                if other:
                    return other.settings.get(name)
                if log.exists():
                    with open(log) as f:
                        return json.loads(f.readline())['settings'].get(name)


class Reasons(dict):
    """In the place of BadSamples: {sample: why it is wrong}, of any number."""
    def add(self, id, reason, key=None):
        self.setdefault(id if key is None else key, str(reason))


def same_path(a, b):
    return bool(a and b) and Path(a).resolve() == Path(b).resolve()


# -----------------------------------------------------------------------------
# files


def how_to_get(path):
    """Where the table in README.md says that a data file comes from, or what to do."""
    for line in (REPO / 'README.md').read_text().splitlines():
        cells = [cell.strip() for cell in line.split('|')]
        if len(cells) < 5:
            continue
        for place in re.findall(r'`(data/[^`]*)`', cells[3]):
            if str(path) == place or (place.endswith('/') and f'{path}/'.startswith(place)):
                return f'get {cells[2]}; put it in {cells[3]}'.replace('`', '')
    return 'is the path right?'


def check_files(stage):
    """Whether the data and the models that a config names are there; True when its lists can be read."""
    all_there = True
    for name in DATA:
        value = stage.settings.get(name) or ()
        for path in [value] if isinstance(value, str) else value:
            if stage.not_made and Path(path).resolve().is_relative_to(SMALL):
                all_there = False
            elif not Path(path).exists():
                all_there = False
                stage.wrong(f'{name}: no {path}; {how_to_get(path)}')
    for name in MODELS:
        value = stage.settings.get(name)
        if not value or local_folder(value) or (stage.not_made and Path(value).resolve().is_relative_to(SMALL)):
            continue
        if re.fullmatch(r'[\w.-]+(/[\w.-]+)?', value) and not value.startswith(('data/', 'out/', '.')):
            stage.note(f'{name} = {value}: not checked, a hub name that is not in the local cache')
        else:
            stage.wrong(f'{name}: no folder {value}')
    return all_there


@cache
def local_folder(name):
    """The folder of a Hugging Face model on this machine, '' where it has none."""
    if Path(name).is_dir():
        return name
    try:
        file = try_to_load_from_cache(name, 'config.json')
    except HFValidationError:
        return ''
    return str(Path(file).parent) if isinstance(file, str) else ''


@cache
def read_captioned(path, root, max_images):
    """(samples, Reasons) of a list: of LLaVA's when root is its images, of sounds when path is a CSV, else a
    manifest."""
    reasons = Reasons()
    if Path(path).suffix == '.csv':
        samples = read_sound_folder(root, path, reasons)
    elif root:
        samples = read_llava(path, root, reasons, max_images=max_images)
    else:
        samples = read_manifest(path, reasons)
    return list(samples), reasons


def lists_of(settings):
    """[(path, root)] of the lists that a config names."""
    found = []
    if settings.get('data_json'):
        found.append((settings['data_json'], settings['image_root']))
    if settings.get('sound_dir'):
        found.append((settings['sound_captions'], settings['sound_dir']))
    manifests = [*settings.get('manifests', ()), settings.get('manifest_jsonl')]
    return found + [(path, '') for path in manifests if path]


def check_lists(stage):
    """How many samples are wrong, and how many media files of a sample are missing or damaged."""
    n_wrong = 0
    wrong = {}
    for path, root in lists_of(stage.settings):
        try:
            samples, reasons = read_captioned(path, root, stage.settings.get('max_images', 1))
        except SystemExit as e:
            stage.wrong(str(e))
            continue
        ids = {sample.id for sample in samples}
        n_double = sum('#' in id and id.rpartition('#')[0] in ids for id in ids)
        double = f', {n_double} with the id of another, which get a number' if n_double else ''
        stage.ok(f'{path}: {len(samples)} samples{double}')
        wrong.update({f'{path} {key}': reason for key, reason in reasons.items()})
        for sample in samples:
            modality = getattr(sample, 'modality', 'image')
            files = sample.images if isinstance(sample, Item) else [sample.path]
            for file in files:
                stage.media.setdefault(modality, {})[file] = None
            if not files and stage.kind in ('a1', 'b2'):
                wrong[f'{path} {sample.id}'] = f'{path}: id {sample.id!r}: a caption without an image'
                continue
            stage.samples.append(sample)
    if wrong:
        n_wrong = len(wrong)
        first = next(iter(wrong.values()))
        say_bad(stage, n_wrong, f'{n_wrong} samples that cannot be used, the first: {first}')
    for modality, files in stage.media.items():
        stage.media[modality] = list(files)
        check_media(stage, modality, n_wrong)


def say_bad(stage, n, text):
    """WRONG when there are more bad samples than the config lets pass, else a note."""
    limit = stage.settings['max_bad_samples']
    say = stage.wrong if n > limit else stage.note
    say(f'{text}; max_bad_samples = {limit}')


def spread(items, n):
    """Up to n of the items, from the first to the last."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)]


def check_media(stage, modality, n_wrong):
    """Whether files of a modality are there, and whole. n_wrong: samples that are wrong already."""
    files = stage.media[modality]
    sampled = spread(files, N_SAMPLED)
    there = [file for file in sampled if Path(file).is_file()]
    decoded = spread(there, N_DECODED)
    missing = set(sampled) - set(there)
    damaged = []
    for file in decoded:
        try:
            read_image(file, 64) if modality == 'image' else read_audio(file, 24_000, 240_000)
        except BadSample as e:
            damaged.append(str(e))
    if missing:
        about = round(len(missing) / len(sampled) * len(files))
        say_bad(stage, n_wrong + about, f'{len(missing)} of {len(sampled)} {modality} files looked for are not there, '
                f'which makes about {about} of {len(files)}; the first: {min(missing)}')
    if damaged:
        about = round(len(damaged) / len(decoded) * len(files))
        say_bad(stage, n_wrong + about, f'{len(damaged)} of {len(decoded)} {modality} files do not decode, the first: '
                f'{damaged[0]}')
    if not missing and not damaged:
        stage.ok(f'{len(files)} {modality} files: of {len(sampled)} none is missing, of {len(decoded)} all decode')


def check_texts(stage):
    """Plain texts: enough, and not the ones that are trained on."""
    settings = stage.settings
    texts = read_texts(settings['text_jsonl'])[:settings['n_text']]
    if len(texts) < settings['n_text']:
        stage.note(f'{settings["text_jsonl"]}: {len(texts)} texts of n_text = {settings["n_text"]}')
    if settings.get('replay_jsonl'):
        shared = shared_phrases(texts, read_texts(settings['replay_jsonl'])[:20_000])
        if shared > 0:
            stage.note(f'{shared:.0%} of the phrases of {settings["text_jsonl"]} are in {settings["replay_jsonl"]} '
                       'too: the text gate then says little')


# -----------------------------------------------------------------------------
# held-out sets



def check_held_out(stage):
    settings = stage.settings
    for modality, files in stage.media.items():
        n = len(files)
        if stage.kind in ('a1', 'a2'):
            wanted = settings['n_eval'] + settings['n_golden']
            if n <= wanted:
                stage.wrong(f'{n} pictures for n_eval + n_golden = {wanted}, and some to train on: add data or '
                                    'lower them')
            elif min(settings['n_eval'], settings['n_retrieval']) < SET_SIZE:
                stage.note(f'n_eval and n_retrieval are below {SET_SIZE}: the gates find one among fewer')
        elif stage.kind == 'b1' and min(n, settings['n_items']) < B1_ITEMS:
            stage.wrong(f'{min(n, settings["n_items"])} {modality} files to measure: B1\'s first gate wants '
                                f'{B1_ITEMS}')
        elif stage.kind == 'b2':
            check_shares(stage, modality, n)
    for other in stage.chain:
        is_next = stage.kind == 'b2' and stage.samples and other.kind and other.before('shards_dir') is stage
        for modality in modalities_of(other) - stage.media.keys() if is_next else ():
            other.wrong(f'its task_weights name tasks of {modality}, and {stage.path} has no list with any')


def check_shares(stage, modality, n):
    """What B2 will hold out of n files against what B3 and B4 ask of its shards."""
    settings = stage.settings
    n_golden = settings['n_golden']
    by_share = settings['eval_share'] * max(0, n - n_golden)
    exactly = settings.get('n_eval', 0)                # where B2 counts, its share is only what may be more
    least = max(exactly, math.floor(by_share - 2 * by_share ** 0.5))
    if n <= n_golden + max(exactly, 1):
        stage.wrong(f'{n} {modality} files for {n_golden} golden and {max(exactly, 1)} held-out ones, and some to '
                    'train on: add data or lower n_eval and n_golden')
        return
    held_out = max(round(by_share), exactly)
    stage.ok(f'about {held_out} of {n} {modality} files will be held out, and {n_golden} golden')
    n_captions = sum(getattr(sample, 'modality', 'image') == modality for sample in stage.samples)
    for other in stage.chain:
        if other.kind and other.before('shards_dir') is stage and modality in modalities_of(other):
            other.n_train[modality] = round(n_captions * (1 - (held_out + n_golden) / n))
            judge_shards(other, modality, least, n_golden, stage.settings['out_dir'])


def judge_shards(stage, modality, n_eval, n_golden, where):
    """Whether shards with at least so many held-out files of a modality are enough for B3 or B4."""
    asked = max(8, stage.settings.get('gate_items', 0))
    wanted = stage.settings['n_eval']
    golden = stage.settings['n_golden']
    if n_eval < asked:
        stage.wrong(f'{where} may hold out only {n_eval} {modality} files, the gates here ask {asked}: raise n_eval '
                    'or eval_share of B2, or add data')
    elif n_eval < wanted:
        stage.note(f'{where} may hold out only {n_eval} {modality} files of n_eval = {wanted}')
    if n_golden < golden:
        say = stage.wrong if stage.kind == 'b4' else stage.note
        say(f'{where} has {n_golden} golden {modality} files, n_golden here is {golden}: B4 wants all to decode')


def modalities_of(stage):
    tasks = stage.settings['task_weights'] | stage.settings.get('task_weights_start', {})
    return {TASKS[task][0] for task, weight in tasks.items() if weight}


def check_shards(stage):
    """Count what shards that are there already hold, for B3 and B4."""
    folder = stage.settings['shards_dir']
    if stage.before('shards_dir') or not Path(folder, 'index.json').exists():
        return
    index, _ = read_index(folder)
    count = {}
    for split, held in index['splits'].items():
        kinds = [load_file(Path(folder, f'{shard["name"]}.safetensors'))['kinds'] for shard in held['shards']]
        count[split] = np.bincount(np.concatenate([[], *kinds]).astype(int), minlength=len(KINDS))
    for modality in modalities_of(stage):
        k = KINDS.index(modality)
        stage.n_train[modality] = count['train'][k]
        stage.ok(f'{folder} has {stage.n_train[modality]} {modality} files to train on, {count["eval"][k]} held out')
        judge_shards(stage, modality, count['eval'][k], count['golden'][k], folder)
